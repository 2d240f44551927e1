"""Command line of a sweep, as Hydra's multirun spells it: ``-m sweep=NAME sweep.lr=1e-3,3e-3 optim.beta2=0.95,0.99``.

Hydra composes the sweep's file and reads every override. Its own sweeper is not used, as it knows the product of
independent options alone: here a size decides several options at once, a run's length follows from its size, and
the whole grid is priced and checked before anything starts. Nor are its launchers, which run all points in one process
(torch's process groups and CUDA_VISIBLE_DEVICES are a process's own) or pickle one Python call a job.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config.checks import choose
from mmtrain.config.diagnose import check_name
from mmtrain.config.option_tree import options_of
from mmtrain.config.overrides import Given, read_override
from mmtrain.config.sweep import SweepConfig, load_sweep
from mmtrain.errors import ConfigError, nearest

ALIASES = {"optim.lr": "sweep.lr"}  # a run's rate is a schedule of its stage, which the sweep makes
OWNED = {
    "run.name": "sweep.name", "run.dir": "sweep.dir", "run.resume": "nothing: a sweep goes on by itself",
    "run.max_steps": "sweep.tokens", "run.plan": "--plan", "stage": "sweep.tokens, sweep.lr and sweep.schedule",
    "log.valid_interval": "sweep.validations", "model.hidden_size": "sweep.sizes", "model.num_layers": "sweep.sizes",
    "model.ffn_hidden_size": "sweep.sizes", "model.num_heads": "sweep.sizes", "model.num_kv_heads": "sweep.sizes",
    "model.head_dim": "sweep.head_dim", "model.rotary_dim": "nothing: it is half of a head",
}  # fmt: skip
"""Options of a run that the sweep sets, and what says it there."""


@dataclass(frozen=True)
class Axis:
    """An override with several values, which multiplies the grid.

    Attributes:
        option: dotted name.
        values: overrides as launch/pretrain.py takes them, ``option=value``.
    """

    option: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        sweep: the checked options of the sweep.
        defaults: overrides of all runs that the sweep's file holds; those of an architecture come after them.
        given: those of the command line with one value, which come last.
        axes: those with several values.
    """

    sweep: SweepConfig
    defaults: tuple[str, ...]
    given: tuple[str, ...]
    axes: tuple[Axis, ...]

    @property
    def overrides(self) -> tuple[str, ...]:
        """All that is the same for every run."""
        return (*self.defaults, *self.given)


def read_request(arguments: Sequence[str], multirun: bool, config_dir: Path) -> Request:
    """Read and check the overrides of a sweep.

    Args:
        arguments: ``option=value`` texts.
        multirun: whether ``-m`` allows several values.
        config_dir: the folder of YAML groups.

    Raises:
        ConfigError: whatever is wrong with them.
    """
    name, own, runs = "", [], []
    for text in arguments:
        if text.startswith("-") or "=" not in text:
            raise ConfigError("command line", text, "neither option=value nor a flag", "see --help")
        option, _, value = text.partition("=")
        option = ALIASES.get(option, option)
        if option in ("sweep", "+sweep"):
            name = value
        elif option.startswith("sweep."):
            own.append(f"{option}={value}")
        else:
            runs.append(read_override(text))
    known = sorted(path.stem for path in (config_dir / "sweep").glob("*.yaml") if path.stem != "default")
    if not name:
        raise ConfigError("sweep", "(missing)", "no sweep is named", f"give sweep={' or '.join(known)}")
    choose("sweep", name, known)
    values = _compose(name, [_listed(text, multirun) for text in own], config_dir)
    sweep = load_sweep({**values, "sizes": _sizes(values.get("sizes"))})
    given, axes = _split_axes(runs, multirun)
    written = [read_override(text) for text in sweep.overrides]
    variants = [read_override(text) for variant in sweep.variants for text in variant.overrides]
    for one in [*written, *variants, *runs]:
        _check_run_option(one, config_dir)
    return Request(sweep, tuple(one.hydra for one in written), given, axes)


def _sizes(given: Any) -> Any:
    """Let a size be written as its number of parameters alone: ``70M`` is ``{name: 70M, parameters: 70M}``."""
    if not isinstance(given, list):
        return given
    return [{"name": str(size), "parameters": size} if isinstance(size, str | int | float) else size for size in given]


def _compose(name: str, overrides: list[str], config_dir: Path) -> dict[str, Any]:
    """Let Hydra compose the sweep's file with overrides of it.

    Raises:
        ConfigError: an override that Hydra does not take.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    for text in overrides:
        path, _, value = text.partition("=")
        kind: Any = SweepConfig
        for part in path.split(".")[1:]:
            names = options_of(kind) if isinstance(kind, type) else {}
            if part.isdigit() or not names:
                break
            if part not in names:
                raise ConfigError(path, value, "unknown option", nearest(part, names))
            kind = names[part]
    try:
        with initialize_config_dir(str(config_dir.resolve()), version_base="1.3"):
            composed = compose(f"sweep/{name}", [f"++{text}" for text in overrides])
        return typing.cast("dict[str, Any]", OmegaConf.to_container(composed["sweep"], resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        told = " ".join(str(error).split())
        raise ConfigError("sweep", " ".join([name, *overrides]), told, "see docs/sweeps.md") from error


def _listed(text: str, multirun: bool) -> str:
    """Write the values of a sweep's option that are parted by commas as a list, which the grid goes through.

    Raises:
        ConfigError: several values of an option that is no list, or without ``-m``.
    """
    option, _, value = text.partition("=")
    values = _values(option, text, multirun)
    hint = options_of(SweepConfig).get(option.removeprefix("sweep."))
    is_list = typing.get_origin(hint) is list
    if len(values) > 1 and not is_list:
        raise ConfigError(option, value, "several values of an option that all runs share", "give one")
    if is_list and not value.lstrip().startswith("["):
        return f"{option}=[{','.join(values)}]"
    return text


def _split_axes(runs: Sequence[Given], multirun: bool) -> tuple[tuple[str, ...], tuple[Axis, ...]]:
    """Tell overrides with one value from those with several."""
    fixed: list[str] = []
    axes: list[Axis] = []
    for one in runs:
        values = _values(one.option, one.hydra, multirun)
        if len(values) == 1:
            fixed.append(one.hydra)
        else:
            twins = sorted({value for value in values if values.count(value) > 1})
            if twins:
                raise ConfigError(one.option, one.value, f"has {', '.join(twins)} twice: points would be the same",
                                  "leave one out")  # fmt: skip
            prefix = one.hydra.partition("=")[0]
            axes.append(Axis(one.option, tuple(f"{prefix}={value}" for value in values)))
    return tuple(fixed), tuple(axes)


def _values(option: str, text: str, multirun: bool) -> list[str]:
    """Return the values of an override, as Hydra's grammar has them: one, or those of a sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    value = text.partition("=")[2]
    try:
        parsed = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(option, value, "not readable", f"quote special characters: \"{option}='...'\"") from error
    if not parsed.is_sweep_override():
        return [value]
    if not multirun:
        raise ConfigError(option, value, "several values", "add -m to sweep over them, or write a list as [a,b]")
    return list(parsed.sweep_string_iterator())


def _check_run_option(given: Given, config_dir: Path) -> None:
    """Refuse an option of a run that does not exist, or that the sweep sets itself (ConfigError)."""
    for option, instead in OWNED.items():
        if given.option == option or (option == "stage" and given.option.startswith("stage.")):
            raise ConfigError(given.option, given.value, "the sweep sets it for each of its runs", f"give {instead}")
    check_name(given, config_dir)
