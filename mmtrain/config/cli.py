"""Command line to checked configuration: Hydra's features, with every mistake of a user told in one line.

Hydra composes and sweeps; its logs and output folders are off (the run folder belongs to the trainer), and its errors
are replaced by ``error: option=value: problem; fix`` and exit code 2. Errors that nobody expected keep their traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmtrain.config import PretrainConfig, load_config
from mmtrain.config.diagnose import check_flags, check_name, diagnose
from mmtrain.config.essentials import check_essentials
from mmtrain.config.overrides import Given, read_overrides, with_text
from mmtrain.config.process_env import Processes, join_launcher, read_processes
from mmtrain.config.telling import leave_for_torchrun, tell
from mmtrain.errors import ConfigError, OutOfDeviceMemory, RankLost, RunStopped, is_user_error
from mmtrain.output import say

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

DEFAULT_STAGE = "pretrain"
SWEEP_FLAGS = ("-m", "--multirun")
PLAN_FLAG = "--plan"


def hydra_entry(run: Callable[[PretrainConfig], None], config_dir: Path, config_name: str = "pretrain") -> None:
    """Call `run` with the configuration that the command line composes, once, or once a point of a ``-m`` sweep.

    A sweep goes on past a point whose input is wrong, and the exit code says so at its end.

    Args:
        run: what to do with a checked configuration.
        config_dir: the folder of YAML groups.
        config_name: the YAML file at its root.

    Raises:
        SystemExit: after one line on stderr: code 1 for a run that could not save its end, 2 for a wrong input, 3 for
            one that lost a rank, 4 for one whose loss stayed not finite, 5 (with a table) for one whose device is full,
            6 for one on a faulty device, 128 + n for one that signal n stopped.
    """
    config_dir = Path(config_dir).resolve()
    texts, flags = _split(sys.argv[1:])
    if "--help" in flags or "-h" in flags:
        from mmtrain.config.options_page import help_text

        say(help_text(config_dir, sys.argv[0]))
        return
    processes = None
    try:
        processes = join_launcher()
        check_flags(flags)
        given = _with_stage(read_overrides(texts))
        if PLAN_FLAG in flags:
            flags, given = [flag for flag in flags if flag != PLAN_FLAG], _to_plan(given)
        for one in given:
            check_name(one, config_dir)
    except ConfigError as error:
        tell(_one_line(error), processes is not None, processes)
        sys.exit(2)
    _run_hydra(run, given, flags, config_dir, config_name, processes)


def note(line: str) -> None:
    """Print a line about what takes its time on stderr, on the main process."""
    if read_processes().rank == 0:
        print(f"note: {line}", file=sys.stderr, flush=True)


def _run_hydra(
    run: Callable[[PretrainConfig], None],
    given: list[Given],
    flags: list[str],
    config_dir: Path,
    config_name: str,
    processes: Processes,
) -> None:
    """Let Hydra compose and sweep, and tell what goes wrong (SystemExit)."""
    sweeping = any(flag in SWEEP_FLAGS for flag in flags)
    failures: list[tuple[str, bool]] = []

    def task(composed: DictConfig) -> None:
        composing = True
        try:
            config = _typed(composed, given)
            composing = False
            run(config)
        except (
            RankLost,
            RunStopped,
            OutOfDeviceMemory,
        ) as error:  # a sweep ends too: others need the ranks
            error.tell()
            leave_for_torchrun(str(error))
            sys.exit(error.exit_code)
        except Exception as error:
            if (code := getattr(error, "EXIT_CODE", None)) is not None:  # the work cannot be kept: told in one line
                tell(_one_line(error), True, processes)
                sys.exit(code)
            if not is_user_error(error):
                raise
            failures.append((_one_line(error), composing))
            if sweeping:  # else told below, after Hydra has put its state away
                tell(*failures[-1], processes)

    with _hydra_set_up(given, flags, sweeping):
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        try:
            hydra.main(version_base="1.3", config_path=str(config_dir), config_name=config_name)(task)()
        except (HydraException, OmegaConfBaseException) as error:
            tell(_one_line(diagnose(given, config_dir, sweeping) or error), True, processes)
            sys.exit(2)
    if failures:
        if not sweeping:
            tell(*failures[-1], processes)
        sys.exit(2)


def _to_plan(given: list[Given]) -> list[Given]:
    """Ask for the plan alone, for which neither a name nor a corpus has to be given."""
    named = {one.option for one in given}
    missing = [] if "run.name" in named else [("run.name", "plan")]
    missing += [] if {"data.path", "data.sources"} & named else [("data.path", "unknown")]
    return [*given, *(Given(option, value, f"{option}={value}") for option, value in [("run.plan", "true"), *missing])]


def compose(arguments: list[str], config_dir: Path, config_name: str = "pretrain") -> PretrainConfig:
    """Compose and check one configuration without running anything, for tools and tests.

    Args:
        arguments: overrides as on the command line; ``stage`` defaults to the paper's first stage.
        config_dir: the folder of YAML groups.
        config_name: the YAML file at its root.

    Raises:
        ConfigError: whatever is wrong with the overrides or the configuration they make.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    given = _with_stage(read_overrides(_split(arguments)[0]))
    for one in given:
        check_name(one, Path(config_dir))
    try:
        with initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3"):
            composed = hydra_compose(config_name, [one.hydra for one in given])
    except (HydraException, OmegaConfBaseException) as error:
        wrong = diagnose(given, Path(config_dir), sweeping=False)
        raise wrong or ConfigError("command line", " ".join(arguments), _one_line(error), "see --help") from error
    return _typed(composed, given)


def _typed(composed: DictConfig, given: Sequence[Given]) -> PretrainConfig:
    """Resolve interpolations and build the typed configuration.

    Raises:
        ConfigError: an interpolation that names nothing, or any check of the configuration.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    written = OmegaConf.to_container(composed, resolve=False)
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        option = getattr(error, "full_key", None) or "config"
        problem = str(error).splitlines()[0]
        raise ConfigError(option, "${...}", problem, "refer to options as ${group.option}") from error
    values = with_text(values, written, PretrainConfig, {one.option for one in given})
    check_essentials(values, given, sys.argv[0])
    return load_config(typing.cast("dict[str, Any]", values))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate overrides from flags, so that they may be mixed (argparse wants the overrides in one piece)."""
    is_override = [("=" in arg and not arg.startswith("-")) or arg.startswith("~") for arg in arguments]
    overrides = [arg for arg, yes in zip(arguments, is_override, strict=True) if yes]
    return overrides, [arg for arg, yes in zip(arguments, is_override, strict=True) if not yes]


def _with_stage(given: list[Given]) -> list[Given]:
    """Accept ``stage=x`` for ``+stage=x``, and add the default stage when none is given."""
    named = [Given(one.option, one.value, f"+{one.hydra}") if one.hydra.startswith("stage=") else one for one in given]
    if not any(one.option == "stage" for one in named):
        named.insert(0, Given("stage", DEFAULT_STAGE, f"+stage={DEFAULT_STAGE}"))
    return named


@contextlib.contextmanager
def _hydra_set_up(given: Sequence[Given], flags: list[str], sweeping: bool) -> Iterator[None]:
    """Give Hydra its command line, make it raise, and send a sweep's bookkeeping to a folder that goes away."""
    before_argv, before_error = sys.argv[1:], os.environ.get("HYDRA_FULL_ERROR")
    with contextlib.ExitStack() as stack:
        extra = []
        if sweeping and not any(one.option == "hydra.sweep.dir" for one in given):
            extra = [f"hydra.sweep.dir='{stack.enter_context(tempfile.TemporaryDirectory(prefix='mmtrain_sweep_'))}'"]
        sys.argv[1:] = [*(one.hydra for one in given), *extra, *flags]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its own message and exits
        try:
            yield
        finally:
            sys.argv[1:] = before_argv
            if before_error is None:
                del os.environ["HYDRA_FULL_ERROR"]
            else:
                os.environ["HYDRA_FULL_ERROR"] = before_error


def _one_line(error: Exception) -> str:
    text = str(error) or str(error.__cause__ or type(error).__name__)
    return " ".join(text.split())
