"""The grid of a sweep as a list of runs: their shapes, lengths, learning rates, and the points that each will give."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mmtrain.config import PretrainConfig
from mmtrain.config.cli import compose
from mmtrain.config.sweep import SizeConfig, SweepConfig
from mmtrain.errors import ConfigError
from mmtrain.model.flops import count_parameters, step_flops
from mmtrain.runs.sweep.command import Axis, Request
from mmtrain.runs.sweep.shapes import Shape, shape_of
from mmtrain.runs.sweep.words import batch_words, count_words, plain_name

OFF_LEVEL = 0.04  # by so much a run may miss the length asked for, as it is whole steps: groups stay within 1.1
NO_CORPUS = "unknown"
SAME_LEVEL = 0.01  # levels this near to a validation of a longer run are read off it


@dataclass(frozen=True)
class Level:
    """A length of the grid that a run reaches.

    Attributes:
        step: at which it is reached.
        group: the isoFLOP group that it belongs to, by its operations; None without such groups.
    """

    step: int
    group: str | None


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: its folder.
        architecture, size: the names that it was made from.
        settings: values of the axes, as overrides.
        shape: of its model.
        parameters, activated: of the model without embeddings, and those of them that a token meets.
        experts: of a layer, 0 for none.
        batch_tokens, steps: of the global batch, and optimizer steps of the whole run.
        warmup: steps of the learning rate's warm-up.
        every: steps between validations; 0 for the last one alone.
        learning_rate: after the warm-up.
        flops_per_token: operations of forward and backward, of rows that are one document each: an upper bound.
        levels: lengths of the grid that the run reaches, the last one its end.
        overrides: of launch/pretrain.py, but for `run.*`.
    """

    name: str
    architecture: str
    size: str
    settings: tuple[str, ...]
    shape: Shape
    parameters: int
    activated: int
    experts: int
    batch_tokens: int
    steps: int
    warmup: int
    every: int
    learning_rate: float
    flops_per_token: float
    levels: tuple[Level, ...]
    overrides: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> float:
        """Operations of the whole run."""
        return self.flops_per_token * self.tokens

    @property
    def series(self) -> tuple[str, ...]:
        """What the run shares with the others that one law is fitted to: all but size and length."""
        return (self.architecture, f"b{self.batch_tokens}", *self.settings)

    @property
    def usable_steps(self) -> list[int]:
        """Steps whose validations count as points: all past the warm-up, or the last alone."""
        if not self.every:
            return [self.steps]
        return [step for step in range(self.every, self.steps + 1, self.every) if step > self.warmup]


def grid_runs(request: Request, config_dir: Path) -> list[SweepRun]:
    """Return all runs of a sweep, in the order of its options.

    Args:
        request: the command line.
        config_dir: the folder of YAML groups.

    Raises:
        ConfigError: an option that cannot work, for the first run that it is wrong for.
    """
    runs: list[SweepRun] = []
    for architecture, settings in itertools.product(request.sweep.architectures, settings_of(request.axes)):
        base = _base(request, architecture, settings, config_dir)
        for number, size in enumerate(request.sweep.sizes):
            runs += _of_size(request, architecture, settings, base, size, f"sweep.sizes[{number}]")
    _check_names(runs)
    return runs


def settings_of(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Return every combination of the axes' values; one empty one without axes."""
    return list(itertools.product(*(axis.values for axis in axes)))


def _common(request: Request, architecture: str, settings: Sequence[str]) -> list[str]:
    """Overrides of an architecture: the sweep's, the variant's, the command line's."""
    variant = next(one for one in request.sweep.variants if one.name == architecture)
    return [*request.defaults, *variant.overrides, *request.given, *settings]


def _base(request: Request, architecture: str, settings: Sequence[str], config_dir: Path) -> PretrainConfig:
    """Compose the options of an architecture; its shape and stage are replaced for every size."""
    given = _common(request, architecture, settings)
    try:
        return compose([*given, *without_corpus(given), "run.name=sweep"], config_dir)
    except ConfigError as error:
        problem = f"{error.problem} (architecture {architecture})"
        raise ConfigError(error.option, error.value, problem, error.fix) from error


def without_corpus(overrides: Sequence[str]) -> list[str]:
    """Return an override that stands for the corpus where none is given, as a plan needs none."""
    values = {text.partition("=")[0].lstrip("+"): text.partition("=")[2] for text in overrides}
    named = {option for option, value in values.items() if value not in ("", "null", "~")}
    return [] if {"data.path", "data.sources"} & named else [f"data.path={NO_CORPUS}"]


def _of_size(
    request: Request, architecture: str, settings: tuple[str, ...], base: PretrainConfig, size: SizeConfig, option: str
) -> Iterator[SweepRun]:
    """Yield the runs of one architecture and size: learning rates x batches x lengths."""
    sweep = request.sweep
    shape = shape_of(size, sweep, base.model, option)
    model = shape.applied(base.model)
    model.validate()
    if shape.num_layers % len(model.layer_pattern):
        raise ConfigError(option, size.name, f"{shape.num_layers} layers are no whole number of {model.layer_pattern}: "
                          f"{architecture} would be another architecture",
                          f"give a multiple of {len(model.layer_pattern)} layers")  # fmt: skip
    count = count_parameters(model)
    activated = count.activated_without_embeddings
    embeddings = count.by_part["embedding"] + count.by_part["head"]
    per_token = step_flops(model, [sweep.seq_len]).total / sweep.seq_len
    for lr, batch in itertools.product([size.lr] if size.lr else sweep.lr, sweep.batch_tokens):
        rate = lr if size.lr or not sweep.lr_at else lr * (activated / sweep.lr_at) ** sweep.lr_exponent
        for steps, levels in _lengths(sweep, batch, per_token, activated):
            run = SweepRun(
                name="", architecture=architecture, size=size.name, settings=settings, shape=shape,
                parameters=count.total - embeddings, activated=activated, experts=model.num_experts,
                batch_tokens=batch, steps=steps, warmup=min(sweep.warmup, steps // 2),
                every=steps // sweep.validations if sweep.schedule == "constant" else 0, learning_rate=rate,
                flops_per_token=per_token, levels=levels, overrides=(),
            )  # fmt: skip
            name = _name(sweep, run, lr)
            yield replace(run, name=name, overrides=tuple(_overrides(request, run, model.name)))


def _lengths(
    sweep: SweepConfig, batch: int, per_token: float, activated: int
) -> Iterator[tuple[int, tuple[Level, ...]]]:
    """Yield steps and levels of each run.

    With a constant learning rate, a length at which a longer run is validated needs no run of its own.

    Raises:
        ConfigError: a batch that is no whole number of rows, or a length that whole steps miss by too much.
    """
    if batch % sweep.seq_len:
        raise ConfigError("sweep.batch_tokens", batch, f"is not a whole number of rows of {sweep.seq_len}",
                          f"for example {-(-batch // sweep.seq_len) * sweep.seq_len}")  # fmt: skip
    parts = sweep.validations if sweep.schedule == "constant" else 1
    left = _wanted(sweep, per_token, activated)
    while left:
        option, longest, _ = left[0]
        steps = parts * max(1, round(longest / batch / parts))
        if abs(steps * batch / longest - 1) > OFF_LEVEL:
            problem = (
                f"{steps} steps of {batch:,} tokens, a multiple of {parts} validations, miss it by more "
                f"than {OFF_LEVEL:.0%}"
            )
            fix = "give longer runs, smaller batches or fewer validations"
            raise ConfigError(option, f"{longest:.4g} tokens", problem, fix)
        levels, others = [], []
        for one in left:
            part = one[1] / longest * parts
            on_the_way = round(part) >= 1 and abs(part / max(1, round(part)) - 1) < SAME_LEVEL
            step = steps * round(part) // parts
            if one is left[0] or (on_the_way and step > min(sweep.warmup, steps // 2)):
                levels.append(Level(step, one[2]))
            else:
                others.append(one)
        yield steps, tuple(sorted(levels, key=lambda level: level.step))
        left = others


def _wanted(sweep: SweepConfig, per_token: float, activated: int) -> list[tuple[str, float, str | None]]:
    """Return option, tokens and isoFLOP group of each length that is asked for, the longest first."""
    wanted = [("sweep.compute", flops / per_token, f"{flops:.4g}") for flops in sweep.compute]
    wanted += [("sweep.tokens", float(tokens), None) for tokens in sweep.tokens]
    wanted += [("sweep.tokens_per_parameter", ratio * activated, None) for ratio in sweep.tokens_per_parameter]
    return sorted(wanted, key=lambda one: -one[1])


def _name(sweep: SweepConfig, run: SweepRun, lr: float) -> str:
    """Name a run by what tells it from the others."""
    length = f"{run.levels[-1].group}FLOP" if sweep.compute else count_words(run.tokens)
    parts = [run.architecture, run.size, length.replace("+", "")]
    parts += [f"lr{lr:g}"] if len(sweep.lr) > 1 else []
    parts += [f"b{batch_words(run.batch_tokens)}"] if len(sweep.batch_tokens) > 1 else []
    parts += [setting.partition("=")[0].split(".")[-1] + setting.partition("=")[2] for setting in run.settings]
    return plain_name("-".join(parts))


def _overrides(request: Request, run: SweepRun, model_name: str) -> list[str]:
    """Return the options of a run, without its name and place."""
    sweep, batch = request.sweep, run.batch_tokens
    rate, warm, rest = run.learning_rate, run.warmup * batch, (run.steps - run.warmup) * batch
    segments = [f"{{kind: linear, tokens: {warm}, start: 0.0, end: {rate!r}}}"] if warm else []
    if sweep.schedule == "constant":
        segments.append(f"{{kind: constant, tokens: {rest}, end: {rate!r}}}")
    else:
        segments.append(f"{{kind: {sweep.schedule}, tokens: {rest}, start: {rate!r}, end: {rate / 10!r}}}")
    phase = (f"{{name: sweep, seq_len: {int(sweep.seq_len)}, rope_base: 10000.0, tokens: {run.tokens}, "
             f"batch: [{{at: 0, tokens: {batch}}}], lr: [{', '.join(segments)}]}}")  # fmt: skip
    return [
        "data.strict_epochs=true", "checkpoint.interval=0", "checkpoint.keep=1", "log.wandb=off", "log.plot=false",
        *_common(request, run.architecture, run.settings), *run.shape.overrides(), f"stage.phases=[{phase}]",
        f"log.valid_interval={run.every}",
    ]  # fmt: skip


def _check_names(runs: Sequence[SweepRun]) -> None:
    """Refuse runs that would be the same, or share a folder.

    Raises:
        ConfigError: naming the two.
    """
    by_name: dict[str, SweepRun] = {}
    by_options: dict[tuple[str, ...], SweepRun] = {}
    for run in runs:
        twin = by_options.setdefault(run.overrides, run)
        if twin is not run:
            raise ConfigError("sweep.sizes", f"{twin.name}, {run.name}", "are the same point twice",
                              "leave one of the sizes, rates or lengths out")  # fmt: skip
        if by_name.setdefault(run.name, run) is not run:
            raise ConfigError("sweep.sizes", run.name, "two runs would have this name", "rename a size")
