"""Overrides of the command line as they are typed, made ready for Hydra.

Hydra's grammar reads ``2026_11_28`` and ``1234e56`` as numbers, ``true`` and ``null`` as what they are in YAML, before
anyone can ask whether the option is text. The schema knows: values of text options are put in quotes here, wherever
Hydra would make something else of them, inside lists, dicts and sweeps too. Its quoting rules and ``${...}`` stay.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from mmtrain.config import PretrainConfig
from mmtrain.config.option_tree import option_type
from mmtrain.errors import ConfigError

if typing.TYPE_CHECKING:
    from antlr4 import ParserRuleContext

_NUMBERS_IN_BRACKETS = re.compile(r"\[(\d+)\]")
_ANY = "x="  # stands for the option in front of a value that is parsed alone
_LITERAL_FUNCTIONS = ("choice", "sort", "shuffle", "tag")  # others take numbers: range, interval, int, float, ...


@dataclasses.dataclass(frozen=True)
class Given:
    """One override of the command line.

    Attributes:
        option: dotted name, list positions as numbers between dots.
        value: the text after the equals sign, as typed.
        hydra: the override as Hydra has to read it.
    """

    option: str
    value: str
    hydra: str


def read_override(text: str) -> Given:
    """Read ``option=value`` (or ``+option=value``, ``~option``) and quote what has to stay text.

    List positions may be written as error messages spell them: ``stage.phases[0].seq_len``.
    """
    name, equals, value = text.partition("=")
    name = _NUMBERS_IN_BRACKETS.sub(r".\1", name)
    option = name.lstrip("+~").strip()
    hint = option_type(PretrainConfig, option)
    if hint is None or not equals:
        return Given(option, value, name + equals + value)
    if re.search(r"\.\d+\.", option):  # an entry of a list may have left out what this sets
        name = f"++{option}"
    return Given(option, value, f"{name}={_kept(value, hint)}")


def _kept(value: str, hint: Any) -> str:
    """Return `value` with quotes around everything that is text by `hint` and would become something else."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not value.strip():
        return value
    try:
        OverridesParser.create().parse_override(_ANY + value)
    except HydraException:
        unreadable_text = text_kind(hint) is not None and value.lstrip()[0] not in "'\""
        return _quoted(value) if unreadable_text else value  # else Hydra's own error is the right one
    kept, place = [], 0
    for first, last in _text_in(_tree(value), hint):
        kept += [value[place:first], _quoted(value[first:last])]
        place = last
    return "".join([*kept, value[place:]])


def _quoted(text: str) -> str:
    """Return text in quotes, as Hydra reads them."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def text_kind(hint: Any) -> str | None:
    """Return ``text`` for a type of text, ``optional`` for one that may be null too, None for all others."""
    if hint is str:
        return "text"
    return "optional" if set(typing.get_args(hint)) == {str, type(None)} else None


def _tree(value: str) -> ParserRuleContext:
    """Parse a value, which is known to be readable, by Hydra's grammar."""
    from hydra.grammar.gen.OverrideLexer import CommonTokenStream, InputStream, OverrideLexer
    from hydra.grammar.gen.OverrideParser import OverrideParser

    return OverrideParser(CommonTokenStream(OverrideLexer(InputStream(_ANY + value)))).override().value()


def _text_in(node: ParserRuleContext, hint: Any) -> Iterator[tuple[int, int]]:
    """Yield where those parts of a value start and end that Hydra would not leave text, as they are by `hint`."""
    kind, text = type(node).__name__, text_kind(hint)
    if kind == "PrimitiveContext" or (text and kind in ("ListContainerContext", "DictContainerContext")):
        if kind != "PrimitiveContext" or _changes(node.getText(), text):
            yield node.start.start - len(_ANY), node.stop.stop + 1 - len(_ANY)
        return
    if kind == "FunctionContext" and node.ID().getText() not in _LITERAL_FUNCTIONS:
        return
    if kind == "ListContainerContext":
        args = [arg for arg in (hint, *typing.get_args(hint)) if typing.get_origin(arg) is list]
        hint = typing.get_args(args[0])[0] if args else None
    for child in node.children:
        if type(child).__name__ == "DictKeyValuePairContext":
            inner = option_type(hint, child.dictKey().getText()) if dataclasses.is_dataclass(hint) else None
            yield from _text_in(child.element(), inner)
        elif hasattr(child, "children"):
            yield from _text_in(child, hint)


def _changes(text: str, kind: str | None) -> bool:
    """Tell whether Hydra makes a number, a truth value or nothing of a primitive that is to be text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if kind is None or (kind == "optional" and text.lower() == "null"):
        return False
    return not isinstance(OverridesParser.create().parse_rule(text, "primitive"), str) and text[0] not in "'\""


def with_text(values: Any, written: Any, hint: Any, given: set[str], path: str = "") -> Any:
    """Turn values of text options into text where no text is lost by it.

    A value that an interpolation names, or that a sweep's ``range()`` made, is one; a bare number of a YAML file is
    not, as YAML has dropped how it was written: it stays a number, and the schema refuses it.

    Args:
        values: a nested configuration with its interpolations resolved.
        written: the same before that.
        hint: the type that it is to become.
        given: dotted names of the options that the command line sets.
        path: dotted name of `values`.
    """
    if text_kind(hint) is not None:
        known = isinstance(written, str) or path in given
        if not known or not isinstance(values, bool | int | float):
            return values
        return str(values).lower() if isinstance(values, bool) else str(values)
    if isinstance(values, dict) and isinstance(written, dict):
        return {
            key: with_text(value, written.get(key), option_type(hint, str(key)), given, f"{path}.{key}".lstrip("."))
            for key, value in values.items()
        }
    if isinstance(values, list) and isinstance(written, list):
        return [
            with_text(value, old, option_type(hint, str(i)), given, f"{path}.{i}")
            for i, (value, old) in enumerate(zip(values, written, strict=True))
        ]
    return values


def read_overrides(texts: Sequence[str]) -> list[Given]:
    """Read the overrides of a command line.

    Entries that are set one by one in a list that is empty by default, as in ``data.sources[0].path=DIR
    data.sources[1].path=DIR``, become one override of the whole list, which Hydra could not grow.
    """
    given = [read_override(text) for text in texts]
    lists: dict[str, list[Given]] = {}
    for one in given:
        if match := re.fullmatch(r"(.*\b(?:long_)?sources)\.\d+\.\w+", one.option):
            lists.setdefault(match[1], []).append(one)
    for path, parts in lists.items():
        if not any(one.option == path for one in given):
            given = [one for one in given if one not in parts] + [_whole_list(path, parts)]
    return given


def _whole_list(path: str, parts: Sequence[Given]) -> Given:
    """Write entries of a list, given one by one, as a list.

    Raises:
        ConfigError: a position is left out.
    """
    entries: dict[int, list[str]] = {}
    for one in parts:
        _, position, name = one.option.rsplit(".", 2)
        entries.setdefault(int(position), []).append(f"{name}: {one.hydra.partition('=')[2]}")
    if sorted(entries) != list(range(len(entries))):
        missing = next(i for i in range(len(entries)) if i not in entries)
        problem = f"positions {sorted(entries)} are given, which count from 0"
        raise ConfigError(f"{path}[{missing}]", "(missing)", problem, f"give {path}[{missing}].path too")
    text = "[" + ", ".join("{" + ", ".join(entries[i]) + "}" for i in sorted(entries)) + "]"
    return Given(path, text, f"{path}={text}")
