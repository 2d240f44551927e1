"""Fields of a JSON body, each read once with its type and range."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mmtrain.errors import nearest
from mmtrain.infer.endpoint.refusal import Refusal, wrong


def parse_body(data: bytes) -> Fields:
    """Read the bytes of a body.

    Raises:
        Refusal: they are no JSON object in UTF-8. NaN and Infinity are no JSON.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8 (byte {error.start:,})", code="invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON ({str(error)[:100]})", code="invalid_json") from None
    if not isinstance(body, dict):
        raise Refusal(400, f"the body must be a JSON object, not {_kind(body)}", code="invalid_json")
    return Fields(body)


class Fields:
    """The fields of a body that have not been read yet; null is the same as none.

    Args:
        body: what was sent.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}
        self._known: list[str] = []

    def take(self, name: str) -> Any:
        """Return a field of any type, None without it; it counts as read."""
        self._known.append(name)
        return self._left.pop(name, None)

    def boolean(self, name: str, default: bool = False) -> bool:
        """Return a field that is true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise wrong(name, value, "must be true or false")
        return value

    def integer(self, name: str, default: int | None, low: int, high: int | None = None) -> int | None:
        """Return a whole number from `low` to `high`."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise wrong(name, value, "must be a whole number")
        if value < low or (high is not None and value > high):
            raise wrong(
                name, value, f"must be at least {low:,}" if high is None else f"must lie in {low:,} to {high:,}"
            )
        return value

    def number(self, name: str, default: float, allowed: Callable[[float], bool], range_text: str) -> float:
        """Return a finite number that `allowed` is true of; `range_text` says which those are."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise wrong(name, value, "must be a number")
        if abs(value) > 1e18 or not math.isfinite(value) or not allowed(value):
            raise wrong(name, value, f"must lie in {range_text}")
        return float(value)

    def text(self, name: str) -> str | None:
        """Return a field that is text."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise wrong(name, value, "must be text")
        return value if value is None else checked_text(name, value)

    def texts(self, name: str, most: int, longest: int) -> tuple[str, ...]:
        """Return a field that is a text or a list of texts, none of them empty."""
        value = self.take(name)
        values = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
            raise wrong(name, value, "must be a text or a list of texts")
        if len(values) > most:
            raise wrong(name, value, f"has {len(values):,} texts; {most} are allowed")
        for one in values:
            if not 0 < len(one) <= longest:
                raise wrong(name, one, f"each text must have 1 to {longest:,} characters")
            checked_text(name, one)
        return tuple(values)

    def ids(self, name: str, vocab_size: int, most: int) -> tuple[int, ...]:
        """Return a field that is a list of token ids."""
        value = self.take(name)
        if value is None:
            return ()
        if not is_list_of_ids(value) or len(value) > most:
            raise wrong(name, value, f"must be a list of {most} token ids at most")
        return checked_ids(name, value, vocab_size)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse a field whose effect is not here, unless its value is one that has none."""
        value = self.take(name)
        if value is not None and not any(value == one and isinstance(value, bool) == isinstance(one, bool)
                                         for one in allowed):  # fmt: skip
            raise wrong(name, value, "is not supported here; leave it out")

    def ignore(self, names: Iterable[str]) -> None:
        """Pass over fields that change nothing of an answer."""
        for name in names:
            self.take(name)

    def finish(self) -> None:
        """Refuse the fields that nothing has read: they might have changed the answer.

        Raises:
            Refusal: the first of them.
        """
        for name in self._left:
            name = name[:60].encode("utf-8", "backslashreplace").decode()  # half of a surrogate pair could not be sent
            message = f"{name!r} is no parameter of this endpoint; {nearest(name, self._known)}"
            raise Refusal(400, message, name, "unknown_parameter")


def is_list_of_ids(value: Any) -> bool:
    """Whether a value is a list of whole numbers, one at least."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def checked_ids(param: str, ids: list[int], vocab_size: int) -> tuple[int, ...]:
    """Return ids that are all known to the tokenizer.

    Raises:
        Refusal: one is not.
    """
    if min(ids) < 0 or max(ids) >= vocab_size:
        bad = next(one for one in ids if not 0 <= one < vocab_size)
        raise wrong(param, bad, f"is no token id of this model: 0 to {vocab_size - 1} are")
    return tuple(ids)


def checked_text(param: str, text: str) -> str:
    """Return a text that has a UTF-8 form.

    Raises:
        Refusal: it holds half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise wrong(param, text[error.start : error.end], f"is no character (at {error.start:,})") from None
    return text


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number or null")
