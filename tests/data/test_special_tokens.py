"""No text gives a special token, whatever the kind of tokenizer; and long texts give the ids of whole ones."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mmdata import text_parts
from mmdata import tokenizer as module
from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmdata.special_tokens import unspellable
from mmdata.text_parts import cut_pattern
from mmdata.tokenizer import SpeltSpecialToken, load_tokenizer

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
CORPUS = ["the cat sat on the mat </s> <s> and <image> said: hello", "a text, naturally; on and on <pad>"] * 20
SPELT = ["</s>", "the end </s> is not <s> the </s></s> end", "<image><pad>", "hello</s>", "＜/s＞ the cat"]


def unigram(folder: Path) -> Path:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>")
    return save(backend, trainer, folder)


def word_piece(folder: Path) -> Path:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    return save(backend, trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", *SPECIAL]), folder)


def sentence_piece_bpe(folder: Path) -> Path:
    """BPE over whole text, which a merge has taught the end of a document."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Replace("▁", " ")
    path = save(backend, trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", *SPECIAL]), folder)
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    for merge in (["<", "/"], ["</", "s"], ["</s", ">"]):
        spec["model"]["merges"].insert(0, merge)
        vocab.setdefault("".join(merge), len(vocab))
    spec["model"]["merges"].sort(
        key=lambda merge: "</s".startswith(merge[0]) and "".join(merge) in "</s>", reverse=True
    )
    path.write_text(json.dumps(spec))
    return path


def word_level(folder: Path) -> Path:
    backend = Tokenizer(models.WordLevel(unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return save(backend, trainers.WordLevelTrainer(vocab_size=60, special_tokens=["</s>"]), folder)


def save(backend, trainer, folder: Path) -> Path:
    trainer.show_progress = False
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


KINDS = {"unigram": unigram, "word_piece": word_piece, "sentence_piece_bpe": sentence_piece_bpe}


def raw(path: Path) -> Tokenizer:
    """The tokenizers package's own reading."""
    backend = Tokenizer.from_file(str(path))
    backend.encode_special_tokens = True
    return backend


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize("kind", KINDS)
def test_spelt_special_tokens_are_text(tmp_path, kind, marked):
    path = KINDS[kind](tmp_path)
    if not marked:  # names that the file forgets to mark as special: added tokens are then matched in plain text
        spec = json.loads(path.read_text())
        spec["added_tokens"] = [
            token | {"special": False} for token in spec["added_tokens"] if token["content"] != "<s>"
        ]
        path.write_text(json.dumps(spec))
    tokenizer, backend = load_tokenizer(path), raw(path)
    special = {backend.token_to_id(name) for name in SPECIAL}
    assert tokenizer.eod_id == backend.token_to_id("</s>")
    assert tokenizer.eod_id in backend.encode("</s>", add_special_tokens=False).ids  # the trap is there
    for text in SPELT:
        ids = tokenizer.encode(text)
        assert ids and special.isdisjoint(ids), text
        assert tokenizer.encode_batch([text, "the cat"])[0] == ids
        flat, lengths = tokenizer.encode_documents([text], np.dtype(np.int32))
        assert flat.tolist() == [*ids, tokenizer.eod_id] and lengths.tolist() == [len(ids) + 1]
        if kind == "unigram":
            assert "s" in tokenizer.decode(ids) or "image" in tokenizer.decode(ids)
    for text in ("the cat sat", "on 日本 the mat"):  # all else is as it was, unknown tokens too
        assert tokenizer.encode(text) == backend.encode(text, add_special_tokens=False).ids


def test_only_the_names_change(tmp_path):
    for made in KINDS.values():
        spec = json.loads(made(tmp_path).read_text())
        backend = Tokenizer.from_str(json.dumps(spec))
        names = {name: backend.token_to_id(name) for name in SPECIAL}
        other = Tokenizer.from_str(json.dumps(unspellable(spec, names)))
        kept = {name: i for name, i in backend.get_vocab(True).items() if name not in names}
        assert kept.items() <= other.get_vocab(True).items() and other.get_vocab_size() == backend.get_vocab_size()


def test_a_corpus_holds_eod_at_ends_only_and_what_cannot_be_said_is_told(tmp_path):
    texts = [*SPELT, "the cat", "on the mat"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for name, made in (KINDS | {"word_level": word_level}).items():
        options = PrepareOptions(
            [tmp_path / "a.jsonl"], tmp_path / name, str(made(tmp_path)), valid_fraction=0, workers=1
        )
        manifest = prepare(options).manifest
        tokens = np.fromfile(tmp_path / name / "train.bin", np.uint16)
        assert (
            (tokens == manifest.eod_id).sum()
            == manifest.splits["train"].documents
            == (2 if name == "word_level" else 7)
        )
        special = [i for n, i in raw(tmp_path / name / "tokenizer.json").get_vocab().items() if n in SPECIAL]
        assert set(special) & set(tokens.tolist()) == {manifest.eod_id}
        told = manifest.skipped.get("only a special token can say it", {"count": 0})
        assert told["count"] == len(texts) - manifest.splits["train"].documents
    with pytest.raises(SpeltSpecialToken, match="special token </s>"):  # a word unknown to a tokenizer that has no unk
        load_tokenizer(tmp_path / "word_level").encode("zebra")


def test_a_long_document_that_cannot_be_said_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("mmdata.prepare.text_files.FRAGMENT", 100)
    monkeypatch.setattr("mmdata.prepare.streams.CHUNK", 64)
    monkeypatch.setattr(text_parts, "PART", 30)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("the cat sat on the mat and " * 50 + "zebra " + "the cat " * 100)
    (tmp_path / "in" / "b.txt").write_text("the cat")
    path = word_level(tmp_path)
    prepare(PrepareOptions([tmp_path / "in"], tmp_path / "out", str(path), valid_fraction=0, workers=1))
    tokens = np.fromfile(tmp_path / "out" / "train.bin", np.uint16).tolist()
    assert tokens == [*load_tokenizer(path).encode("the cat"), load_tokenizer(path).eod_id]


SPLIT = pre_tokenizers.Split
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pre_tokenizer(name: str):
    from tokenizers import Regex

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "gpt2_prefix": pre_tokenizers.ByteLevel(add_prefix_space=True),
        "gpt4": pre_tokenizers.Sequence([SPLIT(Regex(GPT4), "isolated"), byte_level]),
        "o200k": pre_tokenizers.Sequence([SPLIT(Regex(O200K), "isolated"), byte_level]),
        "bert": pre_tokenizers.BertPreTokenizer(),
        "words": pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)]),
        "spaces": pre_tokenizers.WhitespaceSplit(),
        "metaspace": pre_tokenizers.Metaspace(),
        "metaspace_first": pre_tokenizers.Metaspace(prepend_scheme="first"),
        "t5": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
    }[name]


@pytest.mark.parametrize("normal", [None, "nfc", "bert"])
@pytest.mark.parametrize(
    "name", ["gpt2", "gpt2_prefix", "gpt4", "o200k", "bert", "words", "spaces", "metaspace", "metaspace_first", "t5"]
)
def test_cuts_are_exact(tmp_path, monkeypatch, name, normal):
    generator = random.Random(0)
    words = ["a", "word", " ", " ", "\n", "\n\n", "  ", "'s", "é", "e\u0301", "1", ".", "\u2028", "、", "日本", "字",
             "\r\n", "،x", "S", "'", "!", "Ω", "ﬁ", "(", ")", "\t", "\u0301", "한", "кот"]  # fmt: skip
    texts = ["".join(generator.choices(words, k=200)) for _ in range(40)]
    byte_level = name in ("gpt2", "gpt2_prefix", "gpt4", "o200k")
    backend = Tokenizer(models.BPE() if byte_level else models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizer(name)
    backend.normalizer = {None: None, "nfc": normalizers.NFC(), "bert": normalizers.BertNormalizer()}[normal]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "</s>"], initial_alphabet=alphabet)
    trainer.show_progress = False
    backend.train_from_iterator(texts, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.cuts_exactly == (normal != "bert" or name in ("bert", "words", "spaces", "t5"))
    if not tokenizer.cuts_exactly:
        return
    cuts = 0
    for trial, text in enumerate(texts):
        monkeypatch.setattr(text_parts, "PART", 5 + trial)
        monkeypatch.setattr(module, "PART", 5 + trial)
        cuts += len(list(text_parts.parts(text, tokenizer.cut))) - 1
        flat, _ = tokenizer.encode_documents([text], np.dtype(np.int32))
        assert flat[:-1].tolist() == tokenizer.encode(text)
    assert cuts > 20


def test_tokenizers_without_an_exact_cut(tmp_path):
    byte_level = {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}
    assert cut_pattern({"pre_tokenizer": byte_level})
    assert cut_pattern({"pre_tokenizer": None}) is None
    assert cut_pattern({"pre_tokenizer": byte_level, "normalizer": {"type": "Precompiled"}}) is None
    assert cut_pattern({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": ".+"}, "behavior": "Isolated"}}) is None
    for token in ({"content": "two words"}, {"content": "<x>", "lstrip": True}):
        assert cut_pattern({"pre_tokenizer": byte_level, "added_tokens": [token]}) is None
    assert not load_tokenizer(sentence_piece_bpe(tmp_path)).cuts_exactly
