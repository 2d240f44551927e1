"""Tokens that arrive one by one become whole characters, the same text as all tokens at once, never taken back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mmdata.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from mmtrain.infer.serving.generation import GenerationRequest
from mmtrain.infer.serving.stop import StopText, WholeText, text_of
from mmtrain.infer.text_stream import TextStream
from tests.infer.chain import file_tokenizer

TEXT = "Plain words, then né, ∀x∈ℝ, 漢字かな, \u1e9b\u0323, 👩🏽‍🚀 and 😀😀.\n\tEnd" * 8


def sentence_piece(folder: Path) -> Tokenizer:
    """A Unigram tokenizer with words, and bytes for all else, that marks spaces and drops a text's first one."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    pieces = ["▁Plain", "▁words", ",", "▁then", "▁and", "▁", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Backend(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in pieces)], 0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken("</s>", special=True)])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture(params=["bytes", "byte-level", "sentence piece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "byte-level":
        return load_tokenizer(file_tokenizer(tmp_path / "made"))
    return sentence_piece(tmp_path / "made")


@pytest.mark.parametrize("start", [0, 3, 21])
def test_pieces_are_whole_characters_and_make_the_whole_text(tokenizer: Tokenizer, start: int) -> None:
    ids = tokenizer.encode(TEXT)
    while not TEXT.startswith(prompt := tokenizer.decode(ids[:start])):
        start += 1  # to the end of a character
    stream = TextStream(tokenizer, ids[:start])
    pieces = [stream.push(token) for token in ids[start:]]
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""
    assert "".join(pieces) == TEXT[len(prompt) :]
    assert sum(map(bool, pieces)) > 0.5 * len(TEXT) / 8  # as they come, not at the end
    assert len(stream._ids) <= 40  # the work of a token does not grow with the text


def test_broken_characters_wait_for_the_end_and_are_replaced() -> None:
    stream = TextStream(ByteTokenizer())
    assert [stream.push(byte) for byte in b"a\xf0\x9f"] == ["a", "", ""]
    assert stream.push(ord("b")) == "\ufffdb"
    assert [stream.push(byte) for byte in "\u20ac".encode()[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


@pytest.mark.parametrize("start", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("broken", [False, True])
def test_text_at_the_end_is_that_of_a_stream(tokenizer: Tokenizer, start: int, broken: bool) -> None:
    """Also where the prompt ends within a character, and where ids make none."""
    ids = tokenizer.encode(TEXT)
    if broken:
        random.Random(start).shuffle(ids)
    streamed, whole = StopText(tokenizer, ids[:start]), WholeText(tokenizer, ids[:start])
    text = "".join(streamed.push(token) for token in ids[start:-1])
    assert [whole.push(token) for token in ids[start:-1]] == [""] * (len(ids) - start - 1)
    assert whole.broken_off() == text.rstrip("\ufffd") and streamed.broken_off() == ""
    text += streamed.push(ids[-1]) + streamed.finish()
    whole.push(ids[-1])
    assert whole.finish() == text and not whole.stopped


def test_stop_texts_are_looked_for_as_tokens_come() -> None:
    made = {
        (stream, stop): type(text_of(ByteTokenizer(), GenerationRequest((1,), stop=stop, stream_text=stream)))
        for stream in (False, True)
        for stop in ((), ("x",))
    }
    assert made.pop((False, ())) is WholeText and set(made.values()) == {StopText}
