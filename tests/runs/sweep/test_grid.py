"""The grid of a sweep: what multiplies it, which runs reach several lengths, what is refused before anything starts."""

from __future__ import annotations

import pytest

from mmtrain.config.cli import compose
from mmtrain.errors import ConfigError
from mmtrain.model.flops import step_flops
from mmtrain.runs.sweep.checks import check_fit
from mmtrain.runs.sweep.command import Request, read_request
from mmtrain.runs.sweep.grid import SweepRun, grid_runs
from tests.runs.sweep.stand_in import CONFIGS

TINY = ("sweep=tiny_cpu", "data.path=corpus")


def request(*overrides: str, multirun: bool = True) -> Request:
    return read_request([*TINY, *overrides], multirun, CONFIGS)


def grid(*overrides: str) -> list[SweepRun]:
    return grid_runs(request(*overrides), CONFIGS)


def test_the_grid_is_a_product() -> None:
    runs = grid("sweep.lr=1e-3,3e-3", "optim.beta2=0.95,0.99", "sweep.architectures=softmax,hybrid")
    assert len(runs) == 2 * 3 * 2 * 2 and len({run.name for run in runs}) == len(runs)
    config = compose([*runs[-1].overrides, "run.name=x"], CONFIGS)
    assert config.optim.beta2 == 0.99 and config.model.layer_pattern == "LLLLLLLS"
    assert config.stage.phases[0].lr[-1].end == 3e-3 == runs[-1].learning_rate
    assert runs[-1].name.endswith("-lr0.003-beta20.99")


def test_optim_lr_is_the_sweep_s_rate() -> None:
    assert {run.learning_rate for run in grid("optim.lr=1e-3,3e-3")} == {1e-3, 3e-3}


def test_a_size_may_be_its_number_alone() -> None:
    runs = grid("sweep.sizes=300K,1M,2M", "sweep.architectures=hybrid", "sweep.compute=[1e13,2e13,4e13]")
    assert [run.size for run in runs] == ["300K", "1M", "2M"]
    assert runs[1].activated == pytest.approx(1e6, rel=0.01)


def test_one_run_of_a_constant_rate_reaches_all_budgets() -> None:
    for run in grid("sweep.compute=[1e12,2e12,4e12]"):
        assert [level.step for level in run.levels] == [run.steps // 4, run.steps // 2, run.steps]
        assert [level.group for level in run.levels] == ["1e+12", "2e+12", "4e+12"]
        assert all(level.step % run.every == 0 for level in run.levels) and run.every * 8 == run.steps
        assert run.flops == pytest.approx(4e12, rel=0.04)
        config = compose([*run.overrides, "run.name=x"], CONFIGS)
        assert config.log.valid_interval == run.every and config.stage.phases[0].tokens == run.tokens
        assert run.flops_per_token == step_flops(config.model, [512]).total / 512


def test_budgets_that_no_validation_is_at_get_a_run_each() -> None:
    one = ("sweep.architectures=hybrid", "sweep.sizes=[{name: a, layers: 8, hidden: 32, parameters: 100K}]")
    assert len(grid(*one, "sweep.compute=[1.1e12,4e12]")) == 2
    assert len(grid(*one, "sweep.compute=[1e12,4e12]", "sweep.schedule=cosine")) == 2
    assert len(grid(*one, "sweep.compute=[1e12,4e12]")) == 1


def test_a_level_inside_the_warm_up_gets_a_run_of_its_own() -> None:
    one = ("sweep.architectures=hybrid", "sweep.sizes=[{name: a, layers: 8, hidden: 32, parameters: 100K}]")
    long, short = grid(*one, "sweep.compute=[1e12,4e12]", "sweep.warmup=400")
    assert long.steps > 3 * short.steps and short.warmup == short.steps // 2
    assert all(step > long.warmup for step in long.usable_steps)


def test_a_decaying_rate_has_one_point_a_run() -> None:
    run = grid("sweep.schedule=cosine", "sweep.compute=[4e12]", "sweep.fit=false")[0]
    assert run.usable_steps == [run.steps] and run.every == 0
    segment = compose([*run.overrides, "run.name=x"], CONFIGS).stage.phases[0].lr[-1]
    assert (segment.kind, segment.end) == ("cosine", pytest.approx(segment.start / 10))


def test_the_rate_follows_the_size() -> None:
    runs = grid("sweep.architectures=hybrid", "sweep.lr_exponent=-0.5", "sweep.lr_at=100K", "sweep.lr=[1e-3]")
    for run in runs:
        assert run.learning_rate == pytest.approx(1e-3 * (run.activated / 1e5) ** -0.5)
    own = "sweep.sizes=[{name: a, layers: 8, hidden: 32, parameters: 100K, lr: 0.5}]"
    assert [run.learning_rate for run in grid("sweep.architectures=hybrid", own)] == [0.5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep=tiny_cup"], r"sweep=tiny_cup: not a known choice; did you mean 'tiny_cpu'"),
        (["sweep.architectures=hybird"], r"sweep.architectures=hybird: not a known choice; did you mean 'hybrid'"),
        (["sweep.architectures=[]"], r"sweep.architectures=\[\]: is empty"),
        (["sweep.sizes=[]"], r"sweep.sizes=\[\]: is empty"),
        (["sweep.lr=[]"], r"sweep.lr=\[\]: is empty"),
        (["sweep.compute=[]"], r"sweep.tokens=\[\]: exactly one of compute, tokens and tokens_per_parameter"),
        (["sweep.tokens=[1M]"], r"sweep.tokens=compute, tokens: exactly one of"),
        (["sweep.lr=1e-3,1e-3"], r"sweep.lr=.* has 0.001 twice"),
        (["optim.beta2=0.9,0.9"], r"optim.beta2=0.9,0.9: has 0.9 twice"),
        (["sweep.sizes=1M,1M"], r"sweep.sizes=.* has 1M twice"),
        (["sweep.lr=[-1]"], r"sweep.lr\[0\]=-1.0: must be above 0"),
        (["sweep.lrr=1"], r"sweep.lrr=1: unknown option; did you mean 'lr'"),
        (["optim.beta3=1"], r"optim.beta3=1: unknown option"),
        (["model.hidden_size=64"], r"model.hidden_size=64: the sweep sets it for each of its runs; give sweep.sizes"),
        (["stage.phases.0.tokens=1M"], r"stage.phases.0.tokens=1M: the sweep sets it"),
        (["run.name=x"], r"run.name=x: the sweep sets it .* sweep.name"),
        (["sweep.seq_len=512,1024"], r"sweep.seq_len=512,1024: several values of an option that all runs share"),
        (["sweep.batch_tokens=[1000]"], r"sweep.batch_tokens=1000: is not a whole number of rows of 512"),
        (["sweep.sizes=[{name: a}]"], r"sweep.sizes\[0\]=a: is neither a number of parameters nor a whole shape"),
        (["sweep.compute=[1e10,2e10,4e10]"], r"sweep.compute=.* miss it by more than 4%"),
        (["sweep.sizes=[{name: a, layers: 4, hidden: 32, ffn: 32}]", "sweep.architectures=hybrid"],
         r"4 layers are no whole number of LLLLLLLS"),
        (["sweep.lr_exponent=-0.5"], r"sweep.lr_at=None: lr_exponent=-0.5 needs a size to start from"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grid(*overrides)


def test_the_same_shape_under_two_names_is_refused() -> None:
    twins = "sweep.sizes=[{name: a, layers: 8, hidden: 32, ffn: 64}, {name: b, layers: 8, hidden: 32, ffn: 64}]"
    with pytest.raises(ConfigError, match="are the same point twice"):
        grid("sweep.architectures=hybrid", twins)


def test_several_values_need_m() -> None:
    with pytest.raises(ConfigError, match=r"optim.beta2=0.9,0.95: several values; add -m"):
        request("optim.beta2=0.9,0.95", multirun=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sweep.sizes=500K,1M", "sweep.compute=[1e13,2e13,4e13]"], "has 2 of the 3 sizes"),
        (["sweep.compute=[2e12,4e12]"], "needs 3 compute points, and there are 2"),
        (
            ["sweep.compute=[]", "sweep.tokens=[1Mi]", "sweep.sizes=[1M]", "sweep.schedule=cosine"],
            "fewer than 3 compute",
        ),
    ],
)
def test_grids_without_a_law_are_refused(overrides: list[str], message: str) -> None:
    made = request(*overrides)
    with pytest.raises(ConfigError, match=message):
        check_fit(made.sweep, grid_runs(made, CONFIGS))
    free = request(*overrides, "sweep.fit=false")
    check_fit(free.sweep, grid_runs(free, CONFIGS))
