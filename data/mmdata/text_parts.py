"""Cutting a long text into parts that a tokenizer encodes one by one, with the ids of the whole text.

Encoding a text in one go takes some forty times its size in memory, so long ones go through in parts. A cut is exact
where the tokenizer's pre-tokenizer begins a new word whatever stands around it, and nothing else looks across.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

PART = 1 << 20  # characters of a part, about
LARGEST_PART = 1 << 24  # characters of a part at most: a text with no exact place in so many is cut all the same

# Letters to every version of Unicode, and punctuation that no pattern below joins to a letter before it.
_LETTER = (
    "A-Za-zÀ-ÖØ-öø-ž\u0391-\u03a1\u03a3-\u03a9\u03b1-\u03c9\u0410-\u044f\u05d0-\u05ea\u0621-\u063a\u0641-\u064a"
    "\u0905-\u0939\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_BEFORE = {"line": r"\n", "space": f" [{_LETTER}]", "mark": r"[,.;:!?)\]}。，、；：！？]"}
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_O200K_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]%s[\p{Ll}\p{Lm}\p{Lo}\p{M}]%s" + _CONTRACTIONS + "?|"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_KNOWN_SPLITS = frozenset([
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL,
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL,
    _O200K_WORD % ("*", "+") + _O200K_WORD % ("+", "*") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL,
])  # fmt: skip
# By character, or by words that normalise alone: nothing moves across a cut.
_LOCAL_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
_DROPS_SPACE = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}
_NEUTRAL = {"Digits", "Punctuation"}  # they split further, and look at single characters


def cut_pattern(spec: dict[str, Any]) -> re.Pattern[str] | None:
    """Pattern (of no width) of the places where a text may be cut without changing its ids; None if none is known.

    Args:
        spec: the content of a `tokenizer.json`.
    """
    normal = {step.get("type") for step in _steps(spec.get("normalizer"), "normalizers")}
    if not normal <= _LOCAL_NORMALIZERS:
        return None
    steps = [step for step in _steps(spec.get("pre_tokenizer"), "pretokenizers") if step["type"] not in _NEUTRAL]
    if "BertNormalizer" in normal and not any(step["type"] in _DROPS_SPACE for step in steps):
        return None  # it puts spaces around Chinese characters, which here would meet those of the text
    found = [_word_starts(step) for step in steps]
    allowed = [kinds for kinds in found if kinds is not None]
    places = set.intersection(*allowed) if allowed else set()
    if not places:
        return None
    pattern = _pattern(places)
    for token in spec.get("added_tokens") or []:
        joins = token.get("lstrip") or token.get("rstrip") or token.get("single_word")
        if pattern.search(token["content"]) or (joins and not token.get("special")):
            return None
    return pattern


def byte_level_cut(text: str, start: int) -> int:
    """`cut` of the tokenizers that launch/prepare.py trains, as they train on the parts that they encode."""
    found = _BYTE_LEVEL.search(text, start)
    return -1 if found is None else found.start()


class PartCutter:
    """Cutter of one text that comes in fragments into parts of about `PART` characters, at most `LARGEST_PART`.

    Args:
        cut: a tokenizer's `cut`. Where it finds no place in `LARGEST_PART` characters, the part ends at white space
            if there is any, and ids beside that place may differ from those of the whole text.
    """

    def __init__(self, cut: Callable[[str, int], int]) -> None:
        self._cut = cut
        self._text = ""

    def take(self, fragment: str, last: bool) -> Iterator[str]:
        """Parts that are ready with the next fragment, and with the `last` one the rest of the text."""
        text, start = self._text + fragment, 0
        while len(text) - start > PART:
            stop = self._cut(text, start + PART)
            if not 0 <= stop - start <= LARGEST_PART:
                if len(text) - start <= LARGEST_PART:
                    break
                stop = _forced(text, start)
            yield text[start:stop]
            start = stop
        self._text = "" if last else text[start:]
        if last and start < len(text):
            yield text[start:]


def parts(text: str, cut: Callable[[str, int], int]) -> Iterator[str]:
    """Parts of a whole text, as `PartCutter` makes them."""
    return PartCutter(cut).take(text, last=True)


def _forced(text: str, start: int) -> int:
    """End of a part that must end: before the last white space of its second half, else at full size."""
    stop = start + LARGEST_PART
    white = max(text.rfind(mark, start + LARGEST_PART // 2, stop) for mark in " \n")
    return white if white > 0 else stop


def _pattern(places: set[str]) -> re.Pattern[str]:
    """Pattern of no width: behind a letter, before one of `places`, keys of `_BEFORE`."""
    return re.compile(f"(?<=[{_LETTER}])(?={'|'.join(_BEFORE[kind] for kind in sorted(places))})")


def _steps(spec: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Steps of a normalizer or pre-tokenizer, sequences taken apart."""
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [step for part in spec[key] for step in _steps(part, key)]
    return [spec]


def _word_starts(step: dict[str, Any]) -> set[str] | None:
    """What begins a new word after a letter, as keys of `_BEFORE`; None for a step that splits nothing."""
    kind = step["type"]
    if kind == "ByteLevel":
        places = {"line", "space", "mark"} if step.get("use_regex", True) else None
        return {"space"} if step.get("add_prefix_space") else places
    if kind == "Split":
        known = step.get("pattern", {}).get("Regex") in _KNOWN_SPLITS
        ways = [("Isolated", False), ("Removed", True)]
        return {"line", "space", "mark"} if known and (step.get("behavior"), step.get("invert")) in ways else set()
    if kind in ("BertPreTokenizer", "Whitespace"):
        return {"line", "space", "mark"}
    if kind == "WhitespaceSplit":
        return {"line", "space"}
    return {"space"} if kind == "Metaspace" and step.get("split", True) else set()


_BYTE_LEVEL = _pattern({"line", "space", "mark"})
