"""The pipeline behind launch/prepare.py: text files in, a corpus folder out, resumable at any point.

Work goes on in `OUTPUT/.partial`: the tokenizer, then one set of files for each finished shard, then the merged
corpus. Only whole, synced files are renamed to their final names, the manifest last of all.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmdata.corpus.manifest import FORMAT, NAME, Manifest, sha256_file
from mmdata.corpus.split import check_fraction, held_out_warning
from mmdata.corpus.writer import fsync, token_dtype
from mmdata.errors import DataError
from mmdata.prepare.bpe import SAMPLE_BYTES, Sample, train_bpe
from mmdata.prepare.collect import Source, collect, plan_shards
from mmdata.prepare.first_look import first_look
from mmdata.prepare.merge import merge_shards
from mmdata.prepare.pool import cores, run_shards
from mmdata.prepare.shards import ShardTask
from mmdata.prepare.skips import Skip, SkipLog
from mmdata.prepare.sources import Piece
from mmdata.prepare.text_files import parse_separator
from mmdata.prepare.workfolder import Prepared, make_corpus
from mmdata.text_parts import LARGEST_PART
from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmdata.tokenizer_identity import identity_of_file

_RULES = 2  # of choosing documents and holding some out: a corpus made by other rules is not the one asked for


@dataclass(frozen=True)
class PrepareOptions:
    """A request: the text, the folder, the tokenizer and the split.

    Attributes:
        inputs: files and folders.
        output: the corpus folder.
        tokenizer: "train", "bytes", or the path of a tokenizer.json or of a folder that holds one.
        vocab_size: of the tokenizer to be trained.
        valid_fraction: share of tokens held out, in whole documents, in [0, 1).
        workers: processes; None is one for each core that this process may use. Never changes the result.
        text_field: JSON key or Parquet column that holds the text; names joined by dots lead into objects.
        separator: text between the documents of a text file, as `parse_separator` reads it; None makes a file one.
        suffixes: if given, the only file suffixes taken from folders.
        recipe: name recorded in the manifest in place of a long list of inputs.
        force: replace what `output` holds.
    """

    inputs: Sequence[Path]
    output: Path
    tokenizer: str = "train"
    vocab_size: int = 32768
    valid_fraction: float = 0.01
    workers: int | None = None
    text_field: str = "text"
    separator: str | None = None
    suffixes: Sequence[str] = ()
    recipe: str | None = None
    force: bool = False


def prepare(options: PrepareOptions, log: Callable[[str], None] = lambda line: None) -> Prepared:
    """Make the corpus folder that `options` ask for, going on from an interrupted run of the same request.

    `log` gets a line for each thing worth telling. Raises KeyboardInterrupt as it comes: the work so far is kept.

    Raises:
        DataError: bad options or inputs, no document at all, or an output folder that holds something else.
    """
    check_fraction(options.valid_fraction)
    if options.workers is not None and options.workers < 1:
        raise DataError(f"--workers is {options.workers}: it must be at least 1; leave it out for one a core")
    if options.separator is not None:
        parse_separator(options.separator)
    output = Path(options.output)
    sources, skips = collect(options.inputs, options.suffixes, exclude=output)
    if not sources:
        passed = SkipLog(skips).reasons() or "it holds no file"
        raise DataError(f"the corpus is empty: no file to read in --input ({passed})")
    request = _fingerprint(options, sources)
    return make_corpus(
        output, request, options.force, lambda partial: _build(options, request, sources, skips, partial, log)
    )


def _build(
    options: PrepareOptions,
    request: str,
    sources: Sequence[Source],
    skips: list[Skip],
    partial: Path,
    log: Callable[[str], None],
) -> Manifest:
    """Make tokenizer, shards and merged files, all ready to be renamed; return their manifest."""
    planned = plan_shards(sources, separated=options.separator is not None)
    for line in first_look(sources, options.text_field):
        log(line)
    tokenizer, facts = _make_tokenizer(options, planned, partial, log)
    dtype = token_dtype(tokenizer.vocab_size)
    path = "bytes" if facts["kind"] == "bytes" else str(partial / "tokenizer.json")
    shard_folder = partial / "shards"
    shard_folder.mkdir(exist_ok=True)
    tasks = [
        ShardTask(i, tuple(pieces), str(shard_folder), path, facts["sha256"], options.text_field, dtype.name,
                  options.separator)
        for i, pieces in enumerate(planned)
    ]  # fmt: skip
    largest = max((source.size for source in sources if source.kind == "text"), default=0)
    if not tokenizer.cuts_exactly and largest > LARGEST_PART:
        log(f"this tokenizer has no exact cut: texts are cut at white space every {LARGEST_PART >> 20} M characters")
    run_shards(tasks, options.workers or cores(), log)
    splits, read_skips = merge_shards(tasks, partial, dtype, options.valid_fraction)
    named = {"recipe": options.recipe} if options.recipe else {"paths": [str(path) for path in options.inputs]}
    all_skips = SkipLog(skips)
    all_skips.merge(read_skips)
    inputs = named | {"files": len(sources), "bytes": sum(source.size for source in sources)}
    manifest = Manifest(
        request=request,
        tokenizer=facts,
        vocab_size=tokenizer.vocab_size,
        eod_id=tokenizer.eod_id,
        dtype=dtype.name,
        splits=splits,
        inputs=inputs
        | {"text_field": options.text_field, "valid_fraction": options.valid_fraction}
        | ({} if options.separator is None else {"separator": options.separator}),
        skipped=all_skips.facts(),
    )
    if options.valid_fraction and (warning := _held_out_warning(manifest)):
        log(f"warning: {warning}")
    manifest.write(partial / NAME)
    fsync(partial / NAME)
    return manifest


def _make_tokenizer(
    options: PrepareOptions, planned: Sequence[Sequence[Piece]], partial: Path, log: Callable[[str], None]
) -> tuple[Tokenizer, dict[str, Any]]:
    """Tokenizer, also saved as `partial/tokenizer.json` (but for bytes), and the manifest's facts about it."""
    if options.tokenizer == "bytes":
        return load_tokenizer("bytes"), {"kind": "bytes", "sha256": ""}
    path, facts_path = partial / "tokenizer.json", partial / "tokenizer.facts"
    if not (facts_path.exists() and path.exists()):
        if options.tokenizer == "train":
            separator = None if options.separator is None else parse_separator(options.separator)
            sample = Sample(planned, options.text_field, separator)
            if (size := min(sum(piece.weight for shard in planned for piece in shard), SAMPLE_BYTES)) >= 4e6:
                log(f"training BPE on up to {size / 1e6:.0f} MB of text")
            facts = {"kind": "trained", **train_bpe(sample, options.vocab_size, path)}
            log(f"trained BPE on {facts['bytes'] / 1e6:.1f} MB of text in {facts['documents']} documents")
        else:
            facts = {"kind": "file"}
            shutil.copyfile(_tokenizer_file(options.tokenizer), path)
        fsync(path)
        known_by = {"sha256": sha256_file(path), "content": identity_of_file(path).content}
        facts_path.write_text(json.dumps(facts | known_by), encoding="utf-8")
    tokenizer = load_tokenizer(path)
    if options.tokenizer == "train" and tokenizer.vocab_size < options.vocab_size:
        log(f"the text yields a vocabulary of {tokenizer.vocab_size}, not the {options.vocab_size} asked for")
    return tokenizer, json.loads(facts_path.read_text(encoding="utf-8"))


def _tokenizer_file(given: str) -> Path:
    """Path of the tokenizer.json that --tokenizer PATH means, checked to be usable."""
    path = Path(given) / "tokenizer.json" if Path(given).is_dir() else Path(given)
    load_tokenizer(path)
    return path


def _fingerprint(options: PrepareOptions, sources: Sequence[Source]) -> str:
    """SHA-256 over everything that decides the result: path, size and modification time of files, and the options."""
    if options.tokenizer == "train":
        tokenizer = f"train {options.vocab_size}"
    elif options.tokenizer == "bytes":
        tokenizer = "bytes"
    else:
        tokenizer = sha256_file(_tokenizer_file(options.tokenizer))
    facts = [FORMAT, _RULES, tokenizer, options.valid_fraction, options.text_field, options.separator]
    facts.append(list(options.suffixes))
    return hashlib.sha256(json.dumps([facts, [asdict(source) for source in sources]]).encode()).hexdigest()


def _held_out_warning(manifest: Manifest) -> str | None:
    """One line if too little is held out, with the way to more."""
    tokens = {name: split.tokens for name, split in manifest.splits.items()}
    warning = held_out_warning(tokens.get("valid", 0), sum(tokens.values()))
    if warning is None:
        return None
    if "valid" in tokens:
        return f"{warning}; hold out more with --valid-fraction"
    return f"{warning}: there is one document only; --separator tells where documents of a text file end"
