"""Tokenizer of a run: where it is found, and the refusal of any other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdata.corpus.open import tokenizer_path
from mmdata.errors import DataError
from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmdata.tokenizer_identity import BYTES, TokenizerIdentity, identity_of_path
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.run_folder import TOKENIZER
from mmtrain.errors import ConfigError


def tokenizer_of_run(checkpoint: Path, meta: Mapping[str, Any], given: str | None, vocab_size: int) -> Tokenizer:
    """Load the tokenizer that a checkpoint was trained with.

    It is looked for in the checkpoint, in its run's folder, and where the configuration says: `data.tokenizer`, or the
    first corpus. Relative paths are tried from every folder above the checkpoint, the nearest first, and then from the
    current one. A tokenizer that is not the one on record is passed over.

    Args:
        checkpoint: its folder.
        meta: its record; old ones have no hash of the tokenizer.
        given: tokenizer.json, a folder with one, or "bytes", to be taken instead; None looks for the run's.
        vocab_size: tokens of the model.

    Raises:
        ConfigError: the given one is not the run's, or has more tokens than the model; or none is found.
        DataError: the given one is missing or broken.
    """
    expected = recorded_identity(meta)
    if given is None:
        path, tokenizer = _find(checkpoint, meta, expected)
        _check_size("checkpoint", checkpoint, f"its tokenizer, {path},", tokenizer, vocab_size)
        return tokenizer
    tokenizer = load_tokenizer(given)
    _check_size("--tokenizer", given, "it", tokenizer, vocab_size)
    own = identity_of_path(given)
    if expected is None:
        with contextlib.suppress(ConfigError):  # nothing to compare with: taken at the user's word
            expected = identity_of_path(_find(checkpoint, meta, None)[0])
    if expected is not None and not own.same_as(expected):
        raise ConfigError("--tokenizer", given, f"it is {own}, but {checkpoint} was trained with {expected}",
                          "leave it out, or give the run's own")  # fmt: skip
    return tokenizer


def identity_of_checkpoint(checkpoint: Path) -> TokenizerIdentity | None:
    """Return the identity of the tokenizer that a checkpoint, or a Hugging Face folder, was trained with.

    It is on its record, or that of the tokenizer that lies with it; None where there is neither.
    """
    with contextlib.suppress(OSError, ValueError):
        if (found := recorded_identity(read_meta(checkpoint))) is not None:
            return found
    for path in (checkpoint / TOKENIZER, checkpoint / "tokenizer.json"):
        if path.exists():
            with contextlib.suppress(DataError):
                return identity_of_path(path)
    return None


def recorded_identity(meta: Mapping[str, Any]) -> TokenizerIdentity | None:
    """Return the identity of the tokenizer in a checkpoint's record; None where it has none that can be read."""
    corpora = meta.get("corpora")
    record = corpora.get("tokenizer") if isinstance(corpora, Mapping) else None
    if not isinstance(record, Mapping) or not isinstance(record.get("kind"), str):
        return None
    names = ("kind", "sha256", "content", "vocab_size")
    identity = TokenizerIdentity(**{name: record.get(name) for name in names})
    return identity if identity.kind == BYTES or identity.sha256 or identity.content else None


def _find(checkpoint: Path, meta: Mapping[str, Any], expected: TokenizerIdentity | None) -> tuple[str, Tokenizer]:
    """Return path and tokenizer of the first place with the expected one; None expects any.

    Raises:
        ConfigError: it is in none, with what was found in each.
    """
    tried: list[str] = []
    for path, told in _places(checkpoint, meta):
        try:
            tokenizer = load_tokenizer(path)
            identity = identity_of_path(path)
        except DataError as error:
            exists = path != BYTES and Path(path).exists()
            tried.append(str(error) if exists else f"none at {told}")
            continue
        if expected is None or identity.same_as(expected):
            return path, tokenizer
        tried.append(f"{path} is {identity}, not {expected}")
    places = "; ".join(dict.fromkeys(tried)) or "its record names no corpus"
    raise ConfigError("checkpoint", checkpoint, f"its tokenizer is not found: {places}",
                      'give --tokenizer with a tokenizer.json, a folder that holds one, or "bytes"')  # fmt: skip


def _places(checkpoint: Path, meta: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield paths where a run's tokenizer may be, likeliest first, each with what to call it in a message."""
    checkpoint = checkpoint.resolve()
    folders = [checkpoint, *([checkpoint.parents[1]] if checkpoint.parent.name == "checkpoints" else [])]
    for folder in folders:
        yield str(folder / TOKENIZER), str(folder / TOKENIZER)
    config = meta.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    if not isinstance(data, Mapping):
        return
    if data.get("tokenizer") == BYTES:
        yield BYTES, BYTES
    elif data.get("tokenizer"):
        yield from ((str(path), _told(data["tokenizer"])) for path in _readings(checkpoint, data["tokenizer"]))
    else:
        for corpus in _corpora(meta, data):
            for path in _readings(checkpoint, corpus):
                try:
                    yield str(tokenizer_path(str(path))), _told(corpus)
                except DataError:
                    yield str(path), _told(corpus)


def _corpora(meta: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paths of the first corpus: as it was resolved where the run was started, and as it was typed."""
    corpora = meta.get("corpora")
    for sources in (corpora.get("sources") if isinstance(corpora, Mapping) else None, data.get("sources")):
        if isinstance(sources, list) and sources and isinstance(sources[0], Mapping):
            yield from (str(sources[0][name]) for name in ("resolved", "path") if sources[0].get(name))
    if data.get("path"):
        yield str(data["path"])


def _readings(checkpoint: Path, path: str) -> list[Path]:
    """Return what a recorded path may stand for, as the folder that the run was started in is not on record."""
    if Path(path).is_absolute():
        return [Path(path)]
    return list(dict.fromkeys([*(folder / path for folder in checkpoint.parents), Path.cwd() / path]))


def _told(path: str) -> str:
    return path if Path(path).is_absolute() else f"{path}, seen from any folder above the checkpoint or the current one"


def _check_size(option: str, value: Any, named: str, tokenizer: Tokenizer, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        problem = f"{named} has {tokenizer.vocab_size:,} tokens, the model only {vocab_size:,}"
        raise ConfigError(option, value, problem, "give --tokenizer with the one that the run was trained with")
