import json
import random
from pathlib import Path

import numpy as np
import pytest

from mmdata import text_parts
from mmdata import tokenizer as module
from mmdata.errors import DataError
from mmdata.prepare.bpe import Sample, train_bpe
from mmdata.prepare.collect import collect, plan_shards
from mmdata.tokenizer import EOD_TOKEN, load_tokenizer

REAL = Path(json.__file__).with_name("decoder.py").read_text() + "日本語 😀 naïve\r\n\t " + EOD_TOKEN + " end"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    shards = plan_shards(collect([Path(json.__file__).parent])[0])
    used = train_bpe(Sample(shards, "text"), 600, folder / "tokenizer.json")
    train_bpe(Sample(shards, "text"), 600, folder / "again.json")
    assert used["documents"] >= 4
    assert (folder / "tokenizer.json").read_bytes() == (folder / "again.json").read_bytes()
    return folder / "tokenizer.json"


@pytest.mark.parametrize("kind", ["bytes", "file", "folder"])
def test_round_trip_and_byte_counts(trained, kind):
    tokenizer = load_tokenizer({"bytes": "bytes", "file": trained, "folder": trained.parent}[kind])
    ids = tokenizer.encode(REAL)
    assert tokenizer.decode(ids) == REAL
    assert tokenizer.eod_id not in ids and max(ids) < tokenizer.vocab_size  # EOD spelt out is only text
    counts = tokenizer.token_bytes()
    assert counts.dtype == np.int32 and counts.shape == (tokenizer.vocab_size,) and counts[tokenizer.eod_id] == 0
    assert counts[ids].sum() == len(REAL.encode())
    assert np.count_nonzero(counts == 0) == 1
    texts = [REAL, "x", "é"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    flat, lengths = tokenizer.encode_documents(texts, np.dtype(np.uint16))
    want = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eod_id]]
    assert flat.tolist() == want and flat.dtype == np.uint16
    assert lengths.tolist() == [len(tokenizer.encode(text)) + 1 for text in texts]


def test_bytes_ids():
    tokenizer = load_tokenizer(None)
    assert (tokenizer.vocab_size, tokenizer.eod_id) == (257, 256)
    assert tokenizer.encode("aé") == [97, 195, 169] and tokenizer.decode([97, 256, 195, 169]) == "aé"


def test_long_texts_in_parts_give_the_same_ids(tmp_path, monkeypatch):
    generator = random.Random(0)
    words = ["a", "word", " ", "\n", "\n\n", "  ", "'s", "é", "1", ".", "\u2028"]
    texts = ["".join(generator.choices(words, k=300)) for _ in range(50)]
    (tmp_path / "a.txt").write_text("".join(texts))  # so that runs of white space become tokens
    train_bpe(Sample(plan_shards(collect([tmp_path])[0]), "text"), 400, tmp_path / "tokenizer.json")
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    for trial, text in enumerate(texts):
        monkeypatch.setattr(text_parts, "PART", 10 + trial)
        monkeypatch.setattr(module, "PART", 10 + trial)
        made = list(text_parts.parts(text, tokenizer.cut))
        assert len(made) > 1 and "".join(made) == text
        flat, _ = tokenizer.encode_documents([text], np.dtype(np.int32))
        assert flat[:-1].tolist() == tokenizer.encode(text)


def test_sample_is_capped_and_deterministic(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i} " * 20_000)
    shards = plan_shards(collect([tmp_path])[0])
    sample = list(Sample(shards, "text", limit=100_000))
    assert 50_000 < sum(map(len, sample)) <= 100_000 + len(shards)
    assert len(sample) == len(shards) > 2
    assert sample == list(Sample(shards, "text", limit=100_000))
    assert len(list(Sample(shards, "text"))) == 40


def test_bad_tokenizers(tmp_path, trained):
    with pytest.raises(DataError, match="is missing"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "tokenizer.json"
    for content in (b"{", b"[]", b"\xff", trained.read_bytes()[:-50]):
        broken.write_bytes(content)
        with pytest.raises(DataError, match=r"not a usable tokenizer.json") as caught:
            load_tokenizer(broken)
        assert "\n" not in str(caught.value)
    spec = json.loads(trained.read_text().replace(EOD_TOKEN, "<other>"))
    broken.write_text(json.dumps(spec))
    with pytest.raises(DataError, match="no end-of-document token"):
        load_tokenizer(broken)
    with pytest.raises(DataError, match="--vocab-size is 256"):
        train_bpe(Sample([], "text"), 256, tmp_path / "x.json")
