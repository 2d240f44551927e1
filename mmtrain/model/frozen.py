"""Parameters that a phase leaves as they are, named by patterns over the parts of the model.

A pattern names a module or a parameter by its dotted name, ``layers.3.mixer``, and stands for every parameter in it.
Between dots, ``*`` stands for any text, ``?`` for one character and ``[0-3]`` for one of several: ``layers.*.mixer``.
A pattern that begins with ``!`` takes parameters out again: of the patterns that fit a parameter the last one counts,
so that ``["*", "!norm"]`` trains the last norm alone.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from mmtrain.errors import ConfigError

NOT = "!"


def is_frozen(name: str, patterns: Iterable[str]) -> bool:
    """Whether patterns freeze a parameter, given its dotted name in the whole model."""
    frozen = False
    for pattern in patterns:
        if _fits(name, pattern.removeprefix(NOT)):
            frozen = not pattern.startswith(NOT)
    return frozen


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let parameters of a model want no gradient: before it is laid out, and before it has an optimizer."""
    for name, parameter in model.named_parameters():
        if is_frozen(name, patterns):
            parameter.requires_grad_(False)


def learns(module: nn.Module) -> bool:
    """Whether a module has a parameter that is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())


def count_trained(model: nn.Module, patterns: Sequence[str]) -> tuple[int, int]:
    """Return the elements of the parameters that are trained, and of all; the model may be a meta one."""
    sizes = [(name, parameter.numel()) for name, parameter in model.named_parameters()]
    return sum(size for name, size in sizes if not is_frozen(name, patterns)), sum(size for _, size in sizes)


def check_frozen(option: str, patterns: Sequence[str], model: nn.Module) -> None:
    """Refuse patterns that name no part of the model, or leave nothing to train.

    Args:
        option: that gave them, for messages.
        patterns: at least one.
        model: the whole model, which may be a meta one.

    Raises:
        ConfigError: naming the pattern, with the nearest part that there is.
    """
    check_named(option, patterns, model)
    if all(is_frozen(name, patterns) for name, _ in model.named_parameters()):
        raise ConfigError(option, list(patterns), "leaves nothing to train", 'take a part out again, as in "!norm"')


def check_named(option: str, patterns: Sequence[str], model: nn.Module) -> None:
    """Refuse patterns that name no part of the model.

    Args:
        option: that gave them, for messages.
        patterns: at least one.
        model: the whole model, which may be a meta one.

    Raises:
        ConfigError: naming the pattern, with the nearest part that there is.
    """
    names = [name for name, _ in model.named_parameters()]
    for i, pattern in enumerate(patterns):
        if not any(_fits(name, pattern.removeprefix(NOT)) for name in names):
            raise ConfigError(f"{option}[{i}]", pattern, "fits no parameter of the model",
                              _nearest(pattern.removeprefix(NOT), names))  # fmt: skip


def _fits(name: str, pattern: str) -> bool:
    """Whether a pattern names a parameter, or a module that has it."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """Return what may have been meant: of parts of the model, layers of any number as ``*``."""
    found: dict[str, None] = {}
    for name in names:
        parts = re.sub(r"\.\d+\.", ".*.", name).split(".")
        found |= dict.fromkeys(".".join(parts[:size]) for size in range(1, len(parts) + 1))
    close = difflib.get_close_matches(re.sub(r"\.\d+(\.|$)", r".*\1", pattern), found, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "parts: " + ", ".join(one for one in found if "." not in one)
