"""Command line to checked configuration: Hydra's features, with every mistake of a user told in one line.

Hydra composes and sweeps; its logs and output folders are off (the run folder belongs to the trainer), and its errors
are replaced by ``error: option=value: problem; fix`` and exit code 2. Errors that nobody expected keep their traceback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from mmtrain.config import PretrainConfig, load_config
from mmtrain.config.diagnose import diagnose
from mmtrain.errors import ConfigError, RankLost, RunStopped, is_user_error

if typing.TYPE_CHECKING:
    from omegaconf import DictConfig

DEFAULT_STAGE = "pretrain"
OTHER_RANKS_WAIT_SECONDS = 5.0


def hydra_entry(run: Callable[[PretrainConfig], None], config_dir: Path, config_name: str = "pretrain") -> None:
    """Call `run` with the configuration that the command line composes, once, or once a point of a ``-m`` sweep.

    A sweep goes on past a point whose input is wrong, and the exit code says so at its end.

    Args:
        run: what to do with a checked configuration.
        config_dir: the folder of YAML groups.
        config_name: the YAML file at its root.

    Raises:
        SystemExit: after one line on stderr: code 1 for a run that could not save its end, 2 for a wrong input, 3 for
            one that lost a rank, 4 for one whose loss stayed not finite, 128 + n for one that signal n stopped.
    """
    overrides, flags = _split(sys.argv[1:])
    failures: list[str] = []

    def task(composed: DictConfig) -> None:
        try:
            run(_typed(composed))
        except (RankLost, RunStopped) as error:  # a sweep ends too: its other points need the same ranks
            error.tell()
            sys.exit(error.exit_code)
        except Exception as error:
            if (code := getattr(error, "EXIT_CODE", None)) is not None:  # the work cannot be kept: told in one line
                _report(_one_line(error))
                sys.exit(code)
            if not is_user_error(error):
                raise
            failures.append(_one_line(error))
            if not sweeping:
                return  # reported below, after Hydra has put its state away
            _report(failures[-1])

    sweeping = any(flag in ("-m", "--multirun") for flag in flags)
    with _hydra_set_up(overrides, flags, sweeping):
        import hydra
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        try:
            hydra.main(version_base="1.3", config_path=str(Path(config_dir).resolve()), config_name=config_name)(task)()
        except (HydraException, OmegaConfBaseException) as error:
            wrong = diagnose(overrides, Path(config_dir), sweeping)
            _fail(_one_line(wrong or error))
    if failures:
        _fail(None if sweeping else failures[-1])


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

    overrides, _ = _split(arguments)
    try:
        with initialize_config_dir(str(Path(config_dir).resolve()), version_base="1.3"):
            composed = hydra_compose(config_name, _with_stage(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        wrong = diagnose(overrides, Path(config_dir), sweeping=False)
        raise wrong or ConfigError("command line", " ".join(arguments), _one_line(error), "correct it") from error
    return _typed(composed)


def _typed(composed: DictConfig) -> PretrainConfig:
    """Resolve interpolations and build the typed configuration.

    Raises:
        ConfigError: an interpolation that names nothing, or any check of the configuration.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        option = getattr(error, "full_key", None) or "config"
        problem = str(error).splitlines()[0]
        raise ConfigError(option, "${...}", problem, "refer to options as ${group.option}") from error
    return load_config(typing.cast("dict[str, Any]", values))


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separate overrides from flags, so that they may be mixed (argparse wants the overrides in one piece)."""
    is_override = [("=" in arg and not arg.startswith("-")) or arg.startswith("~") for arg in arguments]
    overrides = [arg for arg, yes in zip(arguments, is_override, strict=True) if yes]
    return overrides, [arg for arg, yes in zip(arguments, is_override, strict=True) if not yes]


def _with_stage(overrides: list[str]) -> list[str]:
    """Accept ``stage=x`` for ``+stage=x``, and add the default stage when none is given."""
    named = [f"+{text}" if text.startswith("stage=") else text for text in overrides]
    if not any(text.startswith("+stage=") for text in named):
        named.insert(0, f"+stage={DEFAULT_STAGE}")
    return named


@contextlib.contextmanager
def _hydra_set_up(overrides: list[str], flags: list[str], sweeping: bool) -> Iterator[None]:
    """Give Hydra its command line, make it raise, and send a sweep's bookkeeping to a folder that goes away."""
    before_argv, before_error = sys.argv[1:], os.environ.get("HYDRA_FULL_ERROR")
    with contextlib.ExitStack() as stack:
        extra = []
        if sweeping and not any(text.startswith("hydra.sweep.dir=") for text in overrides):
            extra = [f"hydra.sweep.dir='{stack.enter_context(tempfile.TemporaryDirectory(prefix='mmtrain_sweep_'))}'"]
        sys.argv[1:] = [*_with_stage(overrides), *extra, *flags]
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


def _report(line: str) -> None:
    """Print the error line once a run.

    Every rank meets the same mistake. Rank 0 tells it; the others wait for torchrun to end them, so that they do not
    bring rank 0 down before it has spoken. A rank that is still alive then has met the mistake alone, and tells it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank != 0:
        time.sleep(OTHER_RANKS_WAIT_SECONDS)
    print(f"error: {line}" if rank == 0 else f"error on rank {rank}: {line}", file=sys.stderr, flush=True)


def _fail(line: str | None) -> NoReturn:
    if line is not None:
        _report(line)
    sys.exit(2)
