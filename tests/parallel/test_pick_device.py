"""The device of a process, by the launcher's variables and the GPUs that it sees."""

from __future__ import annotations

import pytest
import torch

from mmtrain.config import ClusterConfig
from mmtrain.config.process_env import Processes
from mmtrain.errors import ConfigError
from mmtrain.parallel import mesh


def pick(monkeypatch: pytest.MonkeyPatch, gpus: int, device: str = "cuda", **place: object) -> torch.device:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(mesh, "read_processes", lambda: Processes(**place))
    return mesh.pick_device(ClusterConfig(device=device))


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(monkeypatch, 0, "auto") == torch.device("cpu")
    assert pick(monkeypatch, 4, local_rank=3) == torch.device("cuda", 3)
    assert pick(monkeypatch, 1, local_rank=3, own_gpu=True) == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("gpus", "place", "message"),
    [
        (
            0,
            {},
            r"cluster\.device=cuda: torch .* (finds no GPU here|is a build without CUDA); give cluster\.device=cpu",
        ),
        (1, {"local_rank": 1}, r"local rank 1 has no GPU: this host shows 1; .*torchrun --nproc-per-node 1\)"),
        (
            4,
            {"local_rank": None, "rank": 2, "world_size": 4},
            r"LOCAL_RANK=\(missing\): rank 2 does not know which of 4",
        ),
    ],
)
def test_what_cannot_be_is_one_line(monkeypatch: pytest.MonkeyPatch, gpus: int, place: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pick(monkeypatch, gpus, **place)
