"""Layouts of inference that cannot be: refused before ranks meet, or by all of them alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from mmtrain.errors import ConfigError
from mmtrain.infer.layout import RankLayout
from mmtrain.infer.open import open_model
from tests.dist.pool import Pool
from tests.dist.served_ranks import model_of
from tests.infer.chain import save_run

REFUSED = {
    RankLayout(tp=0): "--tp=0: must be at least 1",
    RankLayout(tp=3): r"--tp=3: model.num_heads 4 / tp 3 is not whole; give 1, 2, 4",
    RankLayout(ep=3): r"--ep=3: model.num_experts 4 / ep 3 is not whole; give 1, 2, 4",
    RankLayout(etp=5): r"--etp=5: model.ffn_hidden_size 48 / etp 5 is not whole; give 1, 2, 3, 6",
    RankLayout(cp=2, ep=2): r"--cp=2: spreads the keys of a model that each rank has whole; leave --tp, --ep",
    RankLayout(cp=0): r"--cp=0: must be at least 1",
    RankLayout(tp=2, ep=3): r"--tp=2: --ep 3 x --etp 1 = 3 ranks share experts, and neither number divides",
}


@pytest.mark.parametrize("layout", REFUSED, ids=str)
def test_layouts_that_cannot_be_are_refused_before_ranks_meet(
    layout: RankLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(max(layout.ranks, 1)))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConfigError, match=REFUSED[layout]):
        layout.check_processes()
        layout.plan(model_of("experts").config)
    with pytest.raises(ConfigError, match=r"--ep=2: model.num_experts=0"):
        RankLayout(ep=2).plan(model_of("dense").config)


def test_the_number_of_processes_is_that_of_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path / "run", model_of("dense"))
    with pytest.raises(ConfigError, match="--tp=2: takes 2 processes, not 1; start it with torchrun"):
        open_model(tmp_path / "run", RankLayout(tp=2)).__enter__()
    with pytest.raises(ConfigError, match="--cp=3: takes 3 processes, not 1; start it with torchrun"):
        open_model(tmp_path / "run", RankLayout(cp=3)).__enter__()
    for name, value in dict(RANK="0", WORLD_SIZE="4", LOCAL_RANK="0", MASTER_ADDR="h", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"--tp=1: 4 processes were started, and nothing says .* give --tp 4"):
        open_model(tmp_path / "run").__enter__()
    with pytest.raises(ConfigError, match="--device=cuda:1: ranks have a GPU each"):
        open_model(tmp_path / "run", RankLayout(tp=4), device="cuda:1").__enter__()


def refused_on_ranks(path: Path) -> str:
    """Open a checkpoint whose heads the ranks cannot share; returns the error, and whether a group was made."""
    try:
        with open_model(path, RankLayout(tp=3), device="cpu"):
            return "opened"
    except ConfigError as error:
        return f"{error} {dist.is_initialized()}"


def test_heads_that_cannot_be_shared_are_refused_by_all_ranks_without_a_group(pool: Pool, tmp_path: Path) -> None:
    save_run(tmp_path / "run", model_of("dense"))
    told = pool.run(refused_on_ranks, tmp_path / "run", world=3, timeout=60)
    assert all(one.startswith("--tp=3: model.num_heads 4 / tp 3 is not whole") and "False" in one for one in told)
    gone = pool.run(refused_on_ranks, tmp_path / "gone", world=3, timeout=60)
    assert "holds no complete checkpoint" in gone[0] and all("was refused by rank 0" in one for one in gone[1:])
