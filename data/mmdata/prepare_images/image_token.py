"""The token that stands for images: which of a tokenizer's special tokens it is."""

from __future__ import annotations

from mmdata.errors import DataError
from mmdata.tokenizer import Tokenizer


def image_token_id(tokenizer: Tokenizer, given: str) -> int:
    """Id of the token that stands for images.

    Args:
        tokenizer: that must have it, as one that no text gives.
        given: its name or its number.

    Raises:
        DataError: the tokenizer has no such token, or text can give it.
    """
    special = tokenizer.special_tokens
    ids = {i: name for name, i in special.items() if i != tokenizer.eod_id}
    if given in special and special[given] != tokenizer.eod_id:
        return special[given]
    if given.isdecimal() and int(given) in ids:
        return int(given)
    known = ", ".join(f"{name} ({i})" for i, name in sorted(ids.items())[:12]) or "none"
    what = (
        "is a token that text can give" if given.isdecimal() and int(given) < tokenizer.vocab_size else "is not there"
    )
    raise DataError(
        f"--image-token {given}: in this tokenizer it {what}; give a special token, by name or id: {known}. "
        "Add one to the tokenizer.json (special: true), or train a tokenizer with --tokenizer train"
    )
