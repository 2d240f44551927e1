"""JSON that a user wrote: everything that makes it unusable is one kind of error. Needs no torch."""

from __future__ import annotations

import json
import re
from typing import Any

# A backslash that is meant, and a character of two escapes: neither is half of a character.
_WHOLE = re.compile(r"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str) -> Any:
    r"""Return what JSON text holds.

    Python's own reader also fails with RecursionError and plain ValueError, and takes half of a character (an escape
    such as ``\ud800`` without its other half), which no tokenizer and no file takes afterwards.

    Raises:
        json.JSONDecodeError: it is no JSON, nested too deeply, or has a number that is too long or half of a character;
            `msg` says which.
    """
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number has too many digits", text, 0) from None
    if "\\u" in text and (half := _HALF.search(_WHOLE.sub(lambda whole: " " * len(whole[0]), text))):
        raise json.JSONDecodeError(
            f"{text[half.start() : half.start() + 6]} is half of a character", text, half.start()
        )
    return found
