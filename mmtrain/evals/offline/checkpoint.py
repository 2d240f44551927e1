"""What identifies a checkpoint in the results of its evaluation, and the held-out text of its run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmdata.corpus.array_cache import cache_beside
from mmdata.corpus.open import open_corpus, tokenizer_identity
from mmdata.corpus.split import Split
from mmdata.tokenizer_identity import TokenizerIdentity
from mmtrain.checkpoint.manifest import MANIFEST
from mmtrain.checkpoint.progress import RECORD, read_meta
from mmtrain.config import DataConfig, ModelConfig
from mmtrain.errors import ConfigError

_NAMED = (MANIFEST, RECORD, "config.json", "model.safetensors.index.json")
_PLACES, _BLOCK = 64, 1 << 14  # of a file of weights that are looked at: a file of 5 GB has a tensor or two between two


def identity(path: Path, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Return what a checkpoint is known by, as JSON.

    ``sha256`` is that of its small files: of a run's checkpoint the manifest, which has the checksums of all others. A
    Hugging Face folder has no checksums, and two exports of one architecture differ in their weights alone: a sample of
    the bytes of its files tells them apart.

    Args:
        path: its folder.
        model: its model, with the RoPE base at work.
        vocab_size: of its tokenizer.
    """
    state = hashlib.sha256()
    for name in _NAMED:
        if (path / name).is_file():
            state.update(name.encode() + (path / name).read_bytes())
    for file in sorted(path.glob("*.safetensors")):
        state.update(f"{file.name} {file.stat().st_size}".encode())
        for block in _sampled(file):
            state.update(block)
    meta = checkpoint_meta(path)
    return {
        "path": str(path.resolve()), "step": meta.get("step"), "tokens": meta.get("tokens"),
        "sha256": state.hexdigest(), "model": model.name, "rope_base": model.rope_base, "vocab_size": model.vocab_size,
        "tokenizer_vocab": vocab_size,
    }  # fmt: skip


def _sampled(file: Path) -> Iterator[bytes]:
    """Blocks of a file at even distances, its beginning and end among them; all of a small one."""
    last = max(0, file.stat().st_size - _BLOCK)
    with file.open("rb") as stream:
        for place in sorted({last * number // (_PLACES - 1) for number in range(_PLACES)}):
            stream.seek(place)
            yield stream.read(_BLOCK)


def run_of(path: Path) -> Path | None:
    """Return the run's folder that a checkpoint lies in; None for one that lies elsewhere."""
    path = path.resolve()
    return path.parents[1] if path.parent.name == "checkpoints" else None


def held_out_text(
    checkpoint: Path, corpus: str | None, vocab_size: int, tokenizer: TokenizerIdentity | None
) -> tuple[str, Split] | None:
    """Open held-out documents: those of a corpus that is given, or else of the checkpoint's run.

    Where a corpus keeps none, they are chosen as the run chose them, by its seed and fraction.

    Args:
        checkpoint: its folder.
        corpus: path of a corpus; None looks for the run's first one.
        vocab_size: of the model.
        tokenizer: that the checkpoint was trained with, where it is known.

    Returns:
        Path and documents; None where none was given and the run's corpus is not found.

    Raises:
        ConfigError: the corpus has no held-out part, or was made with another tokenizer.
        DataError: it is damaged, or not there.
    """
    data = _data(checkpoint_meta(checkpoint))
    source = corpus or next((path for path in _sources(checkpoint_meta(checkpoint)) if Path(path).exists()), None)
    if source is None:
        return None
    option, value = ("--corpus", source) if corpus else ("checkpoint", checkpoint)
    own = tokenizer_identity(source)
    if own is not None and tokenizer is not None and not own.same_as(tokenizer):
        raise ConfigError(option, value, f"{source} was made with {own}, the checkpoint with {tokenizer}",
                          "prepare it with the run's tokenizer (--tokenizer)")  # fmt: skip
    fraction, seed = data.get("valid_fraction"), data.get("seed")
    _, held_out = open_corpus(
        source, vocab_size=vocab_size, cache=cache_beside(source, data.get("cache_dir")),
        valid_fraction=DataConfig.valid_fraction if fraction is None else fraction,
        seed=DataConfig.seed if seed is None else seed,
    )  # fmt: skip
    if held_out is None or held_out.num_tokens == 0:
        raise ConfigError(option, value, f"{source} has no held-out part", "prepare it with --valid-fraction 0.01, or "
                          "give --corpus with another")  # fmt: skip
    return source, held_out


def checkpoint_meta(path: Path) -> Mapping[str, Any]:
    """Return the record of a checkpoint; an empty one where there is none, as of a Hugging Face folder."""
    try:
        found = read_meta(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _data(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    config = meta.get("config")
    data = config.get("data") if isinstance(config, Mapping) else None
    return data if isinstance(data, Mapping) else {}


def _sources(meta: Mapping[str, Any]) -> list[str]:
    """Paths of the run's first corpus, as it was resolved and as it was typed."""
    found = []
    corpora, data = meta.get("corpora"), _data(meta)
    for sources in (corpora.get("sources") if isinstance(corpora, Mapping) else None, data.get("sources")):
        if isinstance(sources, list) and sources and isinstance(sources[0], Mapping):
            found += [str(sources[0][name]) for name in ("resolved", "path") if sources[0].get(name)]
    return [*found, *([str(data["path"])] if data.get("path") else [])]
