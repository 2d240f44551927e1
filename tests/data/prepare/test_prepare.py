import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from mmdata.corpus.indexed import IndexedCorpus
from mmdata.corpus.manifest import read_manifest, sha256_file
from mmdata.corpus.token_range import check_token_range
from mmdata.errors import DataError
from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmdata.prepare.pool import make_shard
from mmdata.prepare.recipes import recipe_files
from mmdata.prepare.summary import summary
from mmdata.prepare.workfolder import work_folder
from mmdata.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
NAMES = {"train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.json", "manifest.json"}


def run(inputs, output, **options):
    return prepare(PrepareOptions(inputs=[inputs], output=output, **({"workers": 1, "tokenizer": "bytes"} | options)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_in(folder: Path, split: str) -> list[str]:
    corpus, tokenizer = IndexedCorpus(folder / split), load_tokenizer(folder)
    documents = [corpus.document(i).tolist() for i in range(corpus.num_documents)]
    assert all(document[-1] == tokenizer.eod_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


@pytest.fixture
def big_folder(tmp_path) -> Path:
    """Real text in files large enough to be a shard each."""
    folder = tmp_path / "big"
    folder.mkdir()
    source = Path(json.__file__).parents[1]
    text = "".join((source / name).read_text() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py"))
    for i in range(4):
        (folder / f"{i}.py").write_text(f"# {i}\n" + text[: 300_000 + i] * 2)
    return folder


def test_texts_come_back_with_trained_bpe(text_folder, tmp_path):
    (text_folder / "bad.txt").write_bytes(b"\xff\xff")
    (text_folder / "x.bin").write_bytes(b"x")
    out = tmp_path / "out"
    manifest = run(text_folder, out, tokenizer="train", vocab_size=300, valid_fraction=0.2).manifest
    assert set(os.listdir(out)) == NAMES
    originals = {path: path.read_text() for path in sorted(text_folder.glob("[0-9]*.txt"))}
    valid = texts_in(out, "valid")
    assert valid == [t for t in originals.values() if t in valid] and 0 < len(valid) < 30
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    assert 0.18 < tokens["valid"] / sum(tokens.values()) <= 0.2
    assert texts_in(out, "train") == [t for t in originals.values() if t not in valid]
    assert (originals[text_folder / "00.txt"] in valid) == (originals[text_folder / "59.txt"] in valid)
    assert manifest == read_manifest(out)
    assert manifest.vocab_size == 300 and manifest.dtype == "uint16" and manifest.tokenizer["kind"] == "trained"
    assert {reason: entry["count"] for reason, entry in manifest.skipped.items()} == {"not UTF-8": 1, "other suffix": 1}
    for name, split in manifest.splits.items():
        corpus, texts = IndexedCorpus(out / name), texts_in(out, name)
        assert (split.documents, split.tokens) == (len(texts), corpus.num_tokens)
        assert split.bytes == sum(len(text.encode()) for text in texts)
        assert split.bytes == load_tokenizer(out).token_bytes()[corpus.data].sum()
        assert split.max_token_id == corpus.data.max()
        assert all(facts["sha256"] == sha256_file(out / file) for file, facts in split.files.items())
        assert "by its manifest" in check_token_range(corpus, 300)
        with pytest.raises(DataError, match="holds token id"):
            check_token_range(corpus, split.max_token_id)
    lines = summary(manifest, out).split("\n")
    assert len(lines) == 3 and "bad.txt" in lines[1] and f"data.path={out}" in lines[2]


def test_megatron_reads_the_result(text_folder, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    run(text_folder, tmp_path / "out", valid_fraction=0.2)
    for split in ("train", "valid"):
        ours, theirs = IndexedCorpus(tmp_path / "out" / split), IndexedDataset(str(tmp_path / "out" / split))
        assert ours.num_documents == len(theirs) > 0
        assert all(np.array_equal(ours.document(i), theirs[i]) for i in range(len(theirs)))


@pytest.mark.slow
def test_workers_and_a_crash_change_nothing(big_folder, tmp_path, monkeypatch):
    options = {"tokenizer": "train", "vocab_size": 400, "valid_fraction": 0.3}
    plain = run(big_folder, tmp_path / "plain", **options)
    assert len(plain.manifest.splits) == 2
    run(big_folder, tmp_path / "two", **options | {"workers": 2})
    assert contents(tmp_path / "plain") == contents(tmp_path / "two")

    made = []

    def crashing(task):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(task.number)
        return make_shard(task)

    monkeypatch.setattr("mmdata.prepare.pool.make_shard", crashing)
    with pytest.raises(KeyboardInterrupt):
        run(big_folder, tmp_path / "crashed", **options)
    assert os.listdir(tmp_path / "crashed") == [".partial"]
    with pytest.raises(DataError, match="unfinished run with other inputs or options"):
        run(big_folder, tmp_path / "crashed", **options | {"vocab_size": 401})
    monkeypatch.setattr("mmdata.prepare.pool.make_shard", lambda task: made.append(task.number) or make_shard(task))
    run(big_folder, tmp_path / "crashed", **options)
    assert made == [0, 1, 2, 3]  # no shard was made twice
    assert contents(tmp_path / "plain") == contents(tmp_path / "crashed")


def test_sigkill_and_again(big_folder, tmp_path):
    out, plain = tmp_path / "killed", tmp_path / "plain"
    tokenizer = tmp_path / "plain" / "tokenizer.json"
    run(big_folder, plain, tokenizer="train", vocab_size=400)
    shutil.copy(tokenizer, tmp_path / "given.json")
    command = [sys.executable, str(ROOT / "launch/prepare.py"), "--input", str(big_folder), "--output", str(out)]
    command += ["--tokenizer", str(tmp_path / "given.json"), "--workers", "2"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) as process:
        while process.poll() is None and not list(out.glob(".partial/shards/*.json")):
            time.sleep(0.01)
        children = children_of(process.pid)
        assert children
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert os.listdir(out) == [".partial"]
    deadline = time.monotonic() + 10  # the workers go when they see that their parent has gone
    while any(running(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    logged = []
    options = PrepareOptions([big_folder], out, str(tmp_path / "given.json"), workers=1)
    prepare(options, logged.append)
    assert "going on from an earlier run" in logged[0]
    for name in NAMES - {"manifest.json"}:
        assert (out / name).read_bytes() == (plain / name).read_bytes()


def test_done_refused_forced(text_folder, tmp_path):
    out = tmp_path / "out"
    first = run(text_folder, out)
    before = contents(out)
    assert not first.reused and run(text_folder, out).reused
    with pytest.raises(DataError, match="made from other inputs or options"):
        run(text_folder, out, valid_fraction=0.5)
    (text_folder / "new.txt").write_text("new")
    with pytest.raises(DataError, match="made from other inputs"):
        run(text_folder, out)
    assert contents(out) == before
    run(text_folder, out, force=True, valid_fraction=0.0)
    assert set(os.listdir(out)) == {"train.bin", "train.idx", "manifest.json"}
    (out / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="is not as the manifest says"):
        run(text_folder, out, valid_fraction=0.0)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"already holds train\.bin"):
        run(text_folder, out, valid_fraction=0.0)


def test_force_replaces_a_trained_tokenizer(text_folder, tmp_path):
    for size in (280, 300):
        manifest = run(text_folder, tmp_path / "out", tokenizer="train", vocab_size=size, force=True).manifest
        assert manifest.vocab_size == size == load_tokenizer(tmp_path / "out").vocab_size
        corpus = IndexedCorpus(tmp_path / "out" / "train")
        assert (corpus.data >= 280).any() == (size == 300)


def test_two_at_once_are_refused(text_folder, tmp_path):
    with (
        work_folder(tmp_path / "out", "request", False),
        pytest.raises(DataError, match="another process"),
    ):
        run(text_folder, tmp_path / "out", force=True)


def test_nothing_usable(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(DataError, match="the corpus is empty"):
        run(folder, tmp_path / "out")
    (folder / "a.txt").write_bytes(b"\xff")
    for tokenizer in ("bytes", "train"):
        with pytest.raises(DataError, match="the corpus is empty"):
            run(folder, tmp_path / "out", tokenizer=tokenizer)
        assert not (tmp_path / "out").exists()
    (folder / "a.txt").write_text("only one")
    assert set(run(folder, tmp_path / "out", valid_fraction=0.9).manifest.splits) == {"train"}
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(DataError, match="--valid-fraction"):
            run(folder, tmp_path / "out2", valid_fraction=bad)


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "data"), os.environ.get("PYTHONPATH", "")])
    }


def children_of(pid: int) -> list[str]:
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == str(pid):
                found.append(stat.parent.name)
    return found


def running(pid: str) -> bool:
    """Whether a process is there and not a zombie that only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cli(text_folder, tmp_path, capsys):
    arguments = ["--input", str(text_folder), "--output", str(tmp_path / "out"), "--tokenizer", "bytes"]
    command = [sys.executable, str(ROOT / "launch/prepare.py"), *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3
    assert done.stderr.startswith("warning: held out: ") and done.stderr.count("\n") == 1
    main = runpy.run_path(str(ROOT / "launch/prepare.py"))["main"]
    assert main(arguments) == 0
    again = capsys.readouterr()
    assert "already done" in again.err and again.out == done.stdout
    assert main(["--recipe", "nosuch", "--output", str(tmp_path / "x")]) == 2
    bad = capsys.readouterr()
    assert bad.err.startswith("error: --recipe nosuch") and bad.err.count("\n") == 1
    assert "stdlib" in bad.err and not (tmp_path / "x").exists()


def test_stdlib_recipe_finds_the_library_and_nothing_else():
    files = recipe_files("stdlib", ROOT / "data" / "recipes")
    assert files == sorted(files) and len(files) > 300 and Path(json.__file__).resolve() in [f.resolve() for f in files]
    assert not any("site-packages" in str(file) or file.suffix != ".py" for file in files)


def test_recipes_are_those_of_the_folder_handed_in(tmp_path):
    (tmp_path / "two.py").write_text("from pathlib import Path\n\ndef files():\n    return [Path('a'), Path('b')]\n")
    (tmp_path / "none.py").write_text("def files():\n    return []\n")
    assert recipe_files("two", tmp_path) == [Path("a"), Path("b")]
    with pytest.raises(DataError, match="--recipe none finds no file"):
        recipe_files("none", tmp_path)
    with pytest.raises(DataError, match=f"--recipe stdlib is not known: there are none, two in {tmp_path}"):
        recipe_files("stdlib", tmp_path)


def test_recipe_option_works_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "launch/prepare.py"), "--recipe", "nosuch", "--output", "out"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "there are stdlib in" in done.stderr
