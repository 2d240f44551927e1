"""The command line: one error line for every mistake of a user, tracebacks for bugs, nothing left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmtrain.config.cli import compose, hydra_entry
from mmtrain.errors import ConfigError, UserError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
GIVEN = ["run.name=a", "data.path=b"]


@pytest.fixture
def command(monkeypatch, tmp_path, capfd):
    """Run the entry with arguments in an empty folder; returns exit code, stdout, stderr lines and configurations."""

    def call(*arguments, run=lambda config: None, rank=None):
        seen = []
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *arguments])
        if rank is not None:
            for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 4, "MASTER_PORT": 1}.items():
                monkeypatch.setenv(name, str(value))
            monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        code = 0
        try:
            hydra_entry(lambda config: (seen.append(config), run(config)), CONFIGS)
        except SystemExit as stop:
            code = stop.code
        assert not list(tmp_path.iterdir()), "Hydra left something behind"
        assert sys.argv == ["pretrain.py", *arguments] and "HYDRA_FULL_ERROR" not in os.environ
        captured = capfd.readouterr()
        return code, captured.out, captured.err.splitlines(), seen

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return call


def test_default_stage_and_overrides(command):
    code, _, errors, (config,) = command(*GIVEN, "model.hidden_size=64", "stage.token_scale=1/2")
    assert (code, errors) == (0, [])
    assert (config.stage.name, config.model.name, config.model.hidden_size) == ("pretrain", "tiny", 64)
    assert config.stage.token_scale == 0.5


@pytest.mark.parametrize("stage", ["stage=long_ctx", "+stage=long_ctx"])
def test_stage_with_and_without_plus(command, stage):
    code, _, _, (config,) = command(stage, *GIVEN, "stage.scale=0.25")
    assert (code, config.stage.name, config.stage.scale, len(config.stage.phases)) == (0, "long_ctx", 0.25, 3)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.hiden_size=3", "error: model.hiden_size=3: unknown option; did you mean 'model.hidden_size'?"),
        ("hidden_size=3", "error: hidden_size=3: unknown option; did you mean 'model.hidden_size'?"),
        ("modle.hidden_size=3", "error: modle.hidden_size=3: unknown option; did you mean 'model'?"),
        ("seed=3", "error: seed=3: unknown option; did you mean 'data.seed' or 'run.seed'?"),
        ("+optim.beta3=3", "error: optim.beta3=3: unknown option; did you mean 'optim.beta2'?"),
        ("model=tiney", "error: model=tiney: not a known choice; did you mean 'tiny'?"),
        ("+stage=long_cxt", "error: stage=long_cxt: not a known choice; did you mean 'long_ctx'?"),
        ("optim=adam", "error: optim=adam: not a known choice; did you mean 'adamw'?"),
        ("data.sources=[1", "error: data.sources=[1: not readable; quote special characters"),
        ("model.rotary_dim=66", "error: model.rotary_dim=66: must be even and at most head_dim=64"),
        ("model.top_k=9", "error: model.top_k=9: must lie between 1 and num_experts=8"),
        ("model.num_kv_heads=3", "error: model.num_kv_heads=3: must divide num_heads=4"),
        ("model.hidden_size=wide", "error: model.hidden_size=wide: expected int, got str"),
        ("run.seed=1,2", "error: run.seed=1,2: several values; add -m"),
        ("+run.seed=1", "error: run.seed=1: already set by the configuration; leave out the +: run.seed=1"),
        ("run.name=${model.nam}", "error: run.name=${...}: Interpolation key 'model.nam' not found"),
        ("run.name=???", "error: run.name=(missing): required; for example torchrun "),
    ],
)
def test_mistakes_are_one_line_with_the_fix(command, argument, expected):
    code, out, errors, seen = command(*GIVEN, argument)
    assert (code, out, len(errors), seen) == (2, "", 1, [])
    assert errors[0].startswith(expected)


def test_input_errors_of_the_run_are_one_line_and_bugs_are_not(command):
    def refuse(config):
        raise ConfigError("run.name", config.run.name, "exists\nwith another configuration", "choose another")

    code, _, errors, _ = command(*GIVEN, run=refuse)
    assert (code, errors) == (2, ["error: run.name=a: exists with another configuration; choose another"])

    def crash(config):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        command(*GIVEN, run=crash)


def test_errors_of_other_packages_are_input_errors_too(command):
    from mmdata.errors import DataError
    from mmkernels.common.errors import KernelArgumentError

    for error in (DataError("x.bin: truncated; prepare it again"), KernelArgumentError("q", "int64", "a float type")):

        def refuse(config, error=error):
            raise error

        code, _, errors, _ = command(*GIVEN, run=refuse)
        assert (code, errors) == (2, [f"error: {error}"])


def test_an_error_is_a_user_s_by_its_mark_and_by_nothing_else(command):
    def fail(error):
        def run(config):
            raise error

        return run

    class Refusal(UserError):
        pass

    assert command(*GIVEN, run=fail(Refusal("no")))[::2] == (2, ["error: no"])
    for bug in (ValueError("bug"), RuntimeError("bug")):
        with pytest.raises(type(bug), match="bug"):
            command(*GIVEN, run=fail(bug))


def test_sweep_runs_every_point_and_says_which_failed(command):
    code, _, errors, seen = command("-m", "run.name=a,b", "data.path=b", "model.hidden_size=64,0")
    assert code == 2 and len(errors) == 2 and "model.hidden_size=0" in errors[0]
    assert [config.run.name for config in seen] == ["a", "b"]
    code, _, errors, seen = command("model=tiny,proxy_100m", "-m", "run.name=${model.name}", "data.path=b")
    assert (code, errors) == (0, []) and [config.run.name for config in seen] == ["tiny", "proxy_100m"]


def test_printing_the_configuration_and_help(command):
    code, out, errors, seen = command("--cfg", "job", "model=moe_28b")
    assert (code, errors, seen) == (0, [], []) and "num_experts: 16" in out and "name: pretrain_8k" in out


def test_other_ranks_let_rank_zero_speak(command, monkeypatch):
    waits = []
    monkeypatch.setattr("mmtrain.config.telling.time.sleep", waits.append)

    def refuse(config):
        raise ConfigError("data.path", "b", "not on this host", "copy it")

    code, _, errors, _ = command(*GIVEN, "model=tiney", rank=0)
    assert code == 2 and errors[0].startswith("error: ") and waits == []
    code, _, errors, _ = command(*GIVEN, "model=tiney", rank=3)  # the same on all ranks: rank 0 has told it
    assert code == 2 and errors == [] and waits == [5.0]
    code, _, errors, _ = command(*GIVEN, rank=3, run=refuse)
    assert (code, errors, waits) == (2, ["error on rank 3: data.path=b: not on this host; copy it"], [5.0, 5.0])


def test_compose_raises_one_error_type():
    assert compose(["model=moe_28b", *GIVEN], CONFIGS).model.num_experts == 16
    for wrong in ("model=tiney", "model.hiden_size=3", "a=[1", "model.top_k=99", "run.seed=1,2"):
        with pytest.raises(ConfigError):
            compose([*GIVEN, wrong], CONFIGS)


def test_as_a_program_without_torch(tmp_path):
    program = (
        f"import sys\nfrom pathlib import Path\nfrom mmtrain.config.cli import hydra_entry\n"
        f"def run(config):\n    print(config.model.name, 'torch' in sys.modules)\n    raise RuntimeError('bug')\n"
        f"hydra_entry(run, Path({str(CONFIGS)!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", program, *GIVEN], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == "tiny False\n"
    assert "Traceback" in done.stderr and "RuntimeError: bug" in done.stderr
    assert not list(tmp_path.iterdir())


def test_sweeps_keep_the_text_of_each_point(command):
    code, _, errors, seen = command("-m", "run.name=1_0,2e3", "data.path=007")
    assert (code, errors) == (0, [])
    assert [(config.run.name, config.data.path) for config in seen] == [("1_0", "007"), ("2e3", "007")]
    code, _, errors, seen = command("-m", "run.name=range(1,3)", "data.path=b")
    assert (code, [config.run.name for config in seen]) == (0, ["1", "2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "--cfg", "job", "run.name=a,b"], "error: --cfg=with -m: a sweep has many configurations; leave out -m"),
        (["foo"], "error: command line=foo: neither option=value nor a flag; see --help"),
        (["--model", "tiny"], "error: --model=--model: not a flag; options are written option=value, without dashes"),
        (["--data.path=x"], "error: --data.path=x: not a flag; options are written option=value, without dashes; write "
                            "data.path=x"),
        (["--cfgg", "job"], "error: --cfgg=--cfgg: not a flag; options are written option=value, without dashes; did "
                            "you mean '--cfg'?"),
        (["--learning-rate", "1"], "error: --learning-rate=--learning-rate: not a flag; options are written "
                                   "option=value, without dashes; the learning rate is a schedule of the stage"),
    ],
)  # fmt: skip
def test_flags_that_are_none_are_one_line(command, arguments, message):
    code, out, errors, seen = command(*GIVEN[1:], *arguments)
    assert (code, out, len(errors), seen) == (2, "", 1, [])
    assert errors[0].startswith(message)
