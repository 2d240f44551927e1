"""Special tokens of a `tokenizer.json`, and a form of the file in which no text can spell them.

Byte-level BPE keeps special tokens apart from text. Other models do not: their vocabulary lists "</s>" like any word,
so a text that spells it comes out as the token itself.
"""

from __future__ import annotations

import copy
from typing import Any

EOD_NAMES = (
    "<end_of_document>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<end_of_sentence>",
)  # fmt: skip
# Names that stand for control or for another modality even where a file forgets to mark them as special.
_KNOWN_NAMES = """
    <s> <pad> <bos> <mask> <sep> <cls> [PAD] [CLS] [SEP] [MASK] [BOS] [EOS] <|begin_of_text|> <|startoftext|> <|bos|>
    <|eos|> <|pad|> <|padding|> <|im_start|> <|eot_id|> <|eom_id|> <|start_header_id|> <|end_header_id|> <start_of_turn>
    <end_of_turn> <image> </image> <img> </img> <|image|> <|image_pad|> <|vision_start|> <|vision_end|> <|vision_pad|>
    <image_soft_token> <start_of_image> <end_of_image> <video> <|video|> <|video_pad|> <audio> <|audio|>
"""
_KNOWN = frozenset(EOD_NAMES) | frozenset(_KNOWN_NAMES.split())
_NEVER = "\U0010ffff"  # no character: no text holds it


def special_ids(spec: dict[str, Any], vocab: dict[str, int], eod_id: int) -> frozenset[int]:
    """Ids that must never come from text: EOD, tokens marked as special, and those with a well-known name.

    The model's own token for unknown text is not among them, unless it is EOD.

    Args:
        spec: the content of a `tokenizer.json`.
        vocab: id of every token, added ones too.
        eod_id: id of the end-of-document token.
    """
    added = {token["id"] for token in spec.get("added_tokens") or [] if token.get("special")}
    known = {i for name, i in vocab.items() if name in _KNOWN}
    unknown = vocab.get(_unknown_token(spec.get("model") or {}) or "", -1)
    return frozenset((added | known) - {unknown} | {eod_id})


def unspellable(spec: dict[str, Any], names: dict[str, int]) -> dict[str, Any]:
    """Copy of a `tokenizer.json` with the tokens `names` (name to id) renamed to what no text holds; ids stay.

    The model then takes a text that spells one of them apart like any other text.
    """
    spec = copy.deepcopy(spec)
    model = spec["model"]
    new = {name: f"{_NEVER}{i}" for name, i in names.items() if name != _unknown_token(model)}
    if isinstance(model.get("vocab"), list):  # Unigram: [piece, score] in the order of ids
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {new.get(piece, piece): i for piece, i in model["vocab"].items()}
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, new)]
    for token in spec.get("added_tokens") or []:
        token["content"] = new.get(token["content"], token["content"])
    spec["post_processor"] = None  # it looks its tokens up by name
    return spec


def _unknown_token(model: dict[str, Any]) -> str | None:
    """Name of the token that stands for text outside the vocabulary, if there is one."""
    if isinstance(model.get("vocab"), list):
        index = model.get("unk_id")
        return None if index is None else model["vocab"][index][0]
    return model.get("unk_token")


def _touches(merge: str | list[str], names: dict[str, str]) -> bool:
    """Whether a BPE merge takes or makes one of the tokens."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
