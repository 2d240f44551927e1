import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.split import split_documents
from mmdata.corpus.token_range import check_token_range, scan_tokens
from mmdata.corpus.writer import CorpusWriter
from mmdata.errors import DataError

DOCUMENTS = [[[5, 6, 7], [8, 9]], [[1]], [[]], [[2, 3], [], [4]]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_reads_what_megatron_writes(megatron_corpus, dtype):
    corpus = IndexedCorpus(megatron_corpus(DOCUMENTS, dtype))
    assert corpus.dtype == dtype and corpus.num_documents == 4 and corpus.num_tokens == 9
    assert corpus.doc_lengths.tolist() == [5, 1, 0, 3] and corpus.doc_lengths.dtype == np.int64
    assert [corpus.document(i).tolist() for i in range(4)] == [[5, 6, 7, 8, 9], [1], [], [2, 3, 4]]
    assert corpus.tokens(0, 2, 4).tolist() == [7, 8]
    assert [corpus.document_at(i) for i in range(9)] == [0] * 5 + [1] + [3] * 3
    with pytest.raises(IndexError):
        corpus.tokens(1, 0, 2)


def test_megatron_reads_what_we_write(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    documents = [np.arange(n, dtype=np.int64) for n in (3, 1, 70_000)]
    with CorpusWriter(tmp_path / "ours", np.dtype(np.int32)) as writer:
        for document in documents:
            writer.add(document)
    theirs = IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == 3 and theirs.document_indices.tolist() == [0, 1, 2, 3]
    for i, document in enumerate(documents):
        assert np.array_equal(theirs[i], document)
        assert np.array_equal(IndexedCorpus(tmp_path / "ours").document(i), document)


def test_pickles_by_path(megatron_corpus):
    corpus = pickle.loads(pickle.dumps(IndexedCorpus(megatron_corpus(DOCUMENTS))))
    assert corpus.document(0).tolist() == [5, 6, 7, 8, 9]


def _truncate(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:-count])


def _patch(path: Path, offset: int, data: bytes) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(data)] = data
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: Path(f"{p}.bin").unlink(), "megatron.bin is missing"),
        (lambda p: Path(f"{p}.idx").unlink(), "megatron.idx is missing"),
        (lambda p: _truncate(Path(f"{p}.bin"), 2), "megatron.bin is not a usable"),
        (lambda p: _truncate(Path(f"{p}.idx"), 8), "bytes where its header asks for"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"MMI"), "less than a header"),
        (lambda p: _patch(Path(f"{p}.idx"), 0, b"XX"), "does not start with the header"),
        (lambda p: _patch(Path(f"{p}.idx"), 17, b"\x07"), "dtype code 7"),
        (lambda p: _patch(Path(f"{p}.idx"), 17, b"\x63"), "dtype code 99"),
        (lambda p: _patch(Path(f"{p}.idx"), 34, struct.pack("<i", -3)), "negative"),
        (lambda p: _patch(Path(f"{p}.idx"), 34, struct.pack("<i", 4)), "pointers do not follow"),
        (lambda p: _patch(Path(f"{p}.idx"), 34 + 12 * 7, struct.pack("<q", 1)), "boundaries do not run"),
        (lambda p: _patch(Path(f"{p}.idx"), 18, struct.pack("<Q", 1 << 60)), "bytes where its header asks for"),
    ],
)
def test_damaged_files_are_one_line_errors(megatron_corpus, damage, words):
    prefix = megatron_corpus(DOCUMENTS)
    damage(prefix)
    with pytest.raises(DataError, match=words) as caught:
        IndexedCorpus(prefix)
    assert "\n" not in str(caught.value)


def test_folder_in_place_of_a_prefix_is_explained(megatron_corpus):
    with pytest.raises(DataError, match="is a folder: name a corpus in it"):
        IndexedCorpus(megatron_corpus(DOCUMENTS).parent)


def test_token_range(megatron_corpus):
    corpus = IndexedCorpus(megatron_corpus(DOCUMENTS))
    assert "9 of 9 tokens" in check_token_range(corpus, 10)
    with pytest.raises(DataError, match=r"megatron.bin, document 0: token id 9 is outside 0\.\.8"):
        check_token_range(corpus, 9)
    negative = IndexedCorpus(megatron_corpus([[[1]], [[2, -1]]], np.int32, "negative"))
    with pytest.raises(DataError, match="document 1: token id -1"):
        scan_tokens(negative, 101)


def test_split_documents_by_hash(megatron_corpus):
    documents = [[[i % 97, i % 89, 3]] for i in range(400)] + [[[5, 5, 3]], [[]], [[5, 5, 3]]]
    corpus = IndexedCorpus(megatron_corpus(documents))
    train, valid = split_documents(corpus, 0.2)
    assert sorted([*train, *valid]) == [*range(401), 402]
    assert 40 < len(valid) < 120
    assert (400 in valid) == (402 in valid)
    assert not np.array_equal(valid, split_documents(corpus, 0.2, seed=1)[1])
    assert len(split_documents(corpus, 0.0)[1]) == 0


def test_import_is_light_and_silent():
    modules = "mmdata, mmdata.prepare.pipeline, mmdata.corpus.open, mmdata.corpus.writer"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, env=_env(), check=False)
    assert done.returncode == 0 and not done.stderr and not done.stdout


def _env() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
