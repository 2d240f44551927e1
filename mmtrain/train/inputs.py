"""The corpora of a run, opened and checked before anything else starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmdata.corpus.array_cache import cache_beside
from mmdata.corpus.open import open_corpus, tokenizer_path
from mmdata.corpus.split import Split
from mmdata.errors import DataError
from mmdata.images.corpus import ImageCorpus
from mmdata.images.stream import left_out_lines, open_stream
from mmdata.rows.loader import Rows
from mmdata.rows.mixture import Mixture
from mmdata.rows.stream import RowStream
from mmdata.save_tokenizer import save_tokenizer
from mmdata.tokenizer import load_tokenizer
from mmdata.tokenizer_identity import identity_of_path
from mmtrain.config import DataConfig, ModelConfig, PhaseConfig
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import RunStep
from mmtrain.train.epochs import (
    SourceUse,
    check_epochs,
    epoch_lines,
    epoch_warnings,
    held_out_warning,
)
from mmtrain.train.phase_mixture import mixture_lines
from mmtrain.train.phase_rows import PhaseRows
from mmtrain.train.source_images import check_images
from mmtrain.train.source_tokenizers import check_tokenizers, named_sources


class RunInputs:
    """Tokenizer, training streams and held-out rows of a run.

    Args:
        data: the run's data options.
        phases: its phases, scaled.
        vocab_size: of the model.
        log: gets a line when the index of a large corpus is built, or waited for.

    Attributes:
        tokenizer: the run's.
        notes: lines about what could not be checked.

    Raises:
        ConfigError: the tokenizer has more tokens than the model, a corpus was made with another one, or there are no
            documents for a bucket.
        DataError: a corpus or tokenizer is missing, truncated, corrupt or empty, or holds ids beyond the vocabulary.
    """

    def __init__(
        self, data: DataConfig, phases: list[PhaseConfig], vocab_size: int, log: Callable[[str], None] | None = None
    ) -> None:
        self.data, self.phases, self.vocab_size = data, phases, vocab_size
        path = data.tokenizer or tokenizer_path(data.all_sources[0].path)
        self.tokenizer, self._identity = load_tokenizer(path), identity_of_path(path)
        if self.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                "model.vocab_size", vocab_size, f"the tokenizer has {self.tokenizer.vocab_size} tokens",
                f"give model.vocab_size={self.tokenizer.vocab_size} or more, or another data.tokenizer",
            )  # fmt: skip
        self._sources = named_sources(data, phases)
        self.notes = check_tokenizers(self._sources, data.tokenizer, self._identity)
        paths = dict.fromkeys(source.path for _, source in self._sources)
        self._caches = {path: cache_beside(path, data.cache_dir, log) for path in paths}
        self._splits: dict[str, tuple[Split, Split | None]] = {
            path: open_corpus(
                path, vocab_size=vocab_size, valid_fraction=data.valid_fraction, seed=data.seed, cache=cache
            )
            for path, cache in self._caches.items()
        }
        training = {path: train for path, (train, _) in self._splits.items()}
        self._rows = PhaseRows(data, phases, training, self._caches, self.tokenizer.eod_id, vocab_size)
        self.notes += self._rows.left_out

    def train_stream(self, phase_index: int) -> Rows:
        """Rows of a phase: a mixture where it has several sources; every phase has an order of its own."""
        return self._rows.stream(phase_index)

    def valid_stream(self, seq_len: int) -> RowStream | None:
        """Held-out rows of the first source, or None where there are none; the same rows at each validation."""
        first = self.data.all_sources[0].path
        valid = self._splits[first][1]
        if valid is None or valid.is_empty or self.data.valid_rows == 0:
            return None
        try:
            return self._valid_stream(first, seq_len, "concat")
        except DataError:  # less than a row of held-out text: pad it
            return self._valid_stream(first, seq_len, "best_fit")

    @property
    def held_out(self) -> Split | None:
        """Held-out documents of the first source; None where the corpus has none."""
        return self._splits[self.data.all_sources[0].path][1]

    def training_splits(self) -> list[tuple[str, str, Split]]:
        """Return the option, path and training documents of every source that is given."""
        return [(option, source.path, self._splits[source.path][0]) for option, source in self._sources]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 [tokenizer's vocabulary]."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        counts[: self.tokenizer.vocab_size] = self.tokenizer.token_bytes()
        return counts

    def prepare(self, step: RunStep | None) -> None:
        """Work out what the rows of a step need of large corpora: the order of an epoch's documents, above all.

        It may take minutes, so it is done before any process waits for another in a collective. One process of those
        that share a cache works, the others wait for it.

        Args:
            step: the first step of this launch; None, past the run's end, does nothing.
        """
        if step is None:
            return
        stream = self.train_stream(step.phase_index)
        if isinstance(stream, Mixture):
            stream.first_rows(step.first_row)
        else:
            stream[step.first_row]

    def fingerprints(self) -> dict[str, Any]:
        """Record, as JSON, of the tokenizer and of every corpus, by which a later launch knows them again.

        ``tokenizer`` holds its hashes, ``tokenizer_given`` the option; ``sources`` is a list of: the ``option`` that
        names a corpus, its ``path`` as it was typed and ``resolved``, and the fingerprints of its ``train`` and
        ``valid`` parts (None: chosen by a hash from the former, or missing).
        """
        sources = []
        for option, source in self._sources:
            train, valid = self._splits[source.path]
            apart = None if valid is None or valid.corpus is train.corpus else valid.corpus.fingerprint()
            sources.append({
                "option": option, "path": source.path, "resolved": str(Path(source.path).resolve()),
                "train": train.corpus.fingerprint(), "valid": apart,
            })  # fmt: skip
        return {"tokenizer": self._identity.as_dict(), "tokenizer_given": self.data.tokenizer, "sources": sources}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the run's tokenizer into a folder, from which `load_tokenizer(folder)` reads it back.

        Raises:
            OSError: the folder cannot be written.
        """
        save_tokenizer(self.tokenizer, folder)

    def epochs(self, phase_tokens: Sequence[int]) -> list[SourceUse]:
        """Return what each phase reads of each of its sources, by the weights of its mixture.

        Args:
            phase_tokens: tokens that each phase consumes (`epochs.tokens_by_phase`).
        """
        return self._rows.uses(phase_tokens)

    def check_epochs(self, phase_tokens: Sequence[int]) -> None:
        """Refuse a run that reads a corpus more often than its limit, where limits are strict (`data.strict_epochs`).

        Args:
            phase_tokens: as `epochs` takes them.

        Raises:
            ConfigError: naming every corpus, of all phases, in one line.
        """
        if self.data.strict_epochs:
            check_epochs(self.epochs(phase_tokens))

    def check_images(self, model: ModelConfig) -> list[str]:
        """Refuse images that the model cannot see, or that are not to be had; return lines for the header.

        Raises:
            ConfigError: as `source_images.check_images` does.
            DataError: Pillow is missing, or a row of a phase is too short for any held-out image.
        """
        lines = check_images(self._sources, self._splits, model)
        first = self._splits[self.data.all_sources[0].path][0].corpus
        for seq_len in dict.fromkeys(phase.seq_len for phase in self.phases) if isinstance(first, ImageCorpus) else ():
            valid = self.valid_stream(seq_len)
            lines += left_out_lines(valid) if valid is not None else []
        return lines

    def header_lines(self, phase_tokens: Sequence[int]) -> list[str]:
        """Return the lines that a run starts with.

        Mixtures that change over a phase or go by length, epochs of each corpus, what could not be checked, warnings.
        """
        uses, names = self.epochs(phase_tokens), [phase.name for phase in self.phases]
        lines = mixture_lines(self.data, self.phases, self._rows.mixtures)
        lines += [*epoch_lines(uses, names), *self.notes, *epoch_warnings(uses, names)]
        if self.data.valid_rows:
            option, source = self._sources[0]
            valid = self._splits[source.path][1]
            held, longest = 0 if valid is None else valid.num_tokens, max(int(phase.seq_len) for phase in self.phases)
            lines += filter(None, [held_out_warning(f"{option}={source.path}", held, longest)])
        return lines

    def _valid_stream(self, path: str, seq_len: int, packing: str) -> RowStream:
        """Held-out rows of a corpus."""
        valid = self._splits[path][1]
        assert valid is not None
        return open_stream(
            valid.corpus, seq_len=seq_len, seed=self.data.seed, packing=packing, eod_id=self.tokenizer.eod_id,
            documents=valid.kept or valid.documents, vocab_size=self.vocab_size, cache=self._caches[path],
        )  # fmt: skip
