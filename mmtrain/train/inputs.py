"""The corpora of a run, opened and checked before anything else starts."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from mmdata.corpus.open import open_corpus, tokenizer_path
from mmdata.corpus.split import Split
from mmdata.errors import DataError
from mmdata.rows.loader import Rows
from mmdata.rows.mixture import Mixture
from mmdata.rows.stream import RowStream
from mmdata.tokenizer import load_tokenizer
from mmtrain.config import DataConfig, PhaseConfig, SourceConfig
from mmtrain.errors import ConfigError
from mmtrain.train.curriculum import phase_seed


class RunInputs:
    """Tokenizer, training streams and held-out rows of a run.

    Raises:
        ConfigError: the tokenizer has more tokens than the model.
        DataError: a corpus or tokenizer is missing, truncated, corrupt or empty, or holds ids beyond the vocabulary.
    """

    def __init__(self, data: DataConfig, phases: list[PhaseConfig], vocab_size: int) -> None:
        self.data, self.phases, self.vocab_size = data, phases, vocab_size
        self.tokenizer = load_tokenizer(data.tokenizer or tokenizer_path(data.all_sources[0].path))
        if self.tokenizer.vocab_size > vocab_size:
            raise ConfigError(
                "model.vocab_size", vocab_size, f"the tokenizer has {self.tokenizer.vocab_size} tokens",
                f"give model.vocab_size={self.tokenizer.vocab_size} or more, or another data.tokenizer",
            )  # fmt: skip
        self._splits: dict[str, tuple[Split, Split | None]] = {}
        for source in self._all_sources():
            self._splits[source.path] = open_corpus(
                source.path, vocab_size=vocab_size, valid_fraction=data.valid_fraction, seed=data.seed
            )
        for index in range(len(phases)):  # too little text for a row is found here
            self.train_stream(index)

    def train_stream(self, phase_index: int) -> Rows:
        """Rows of a phase: a mixture where it has several sources; every phase has an order of its own."""
        phase, seed = self.phases[phase_index], phase_seed(self.data.seed, phase_index)
        sources = phase.sources or self.data.all_sources
        streams = [
            self._stream(self._splits[source.path][0], phase.seq_len, seed, self.data.packing) for source in sources
        ]
        return streams[0] if len(streams) == 1 else Mixture(streams, [source.weight for source in sources], seed)

    def valid_stream(self, seq_len: int) -> RowStream | None:
        """Held-out rows of the first source, or None where there are none; the same rows at each validation."""
        valid = self._splits[self.data.all_sources[0].path][1]
        if valid is None or valid.is_empty or self.data.valid_rows == 0:
            return None
        try:
            return self._stream(valid, seq_len, self.data.seed, "concat")
        except DataError:  # less than a row of held-out text: pad it
            return self._stream(valid, seq_len, self.data.seed, "best_fit")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, int32 [tokenizer's vocabulary]."""
        counts = np.zeros(self.vocab_size, dtype=np.int32)
        counts[: self.tokenizer.vocab_size] = self.tokenizer.token_bytes()
        return counts

    def _all_sources(self) -> list[SourceConfig]:
        return [*self.data.all_sources, *(s for phase in self.phases for s in phase.sources or [])]

    def _stream(self, split: Split, seq_len: int, seed: int, packing: str) -> RowStream:
        return RowStream(
            split.corpus, seq_len=seq_len, seed=seed, packing=packing, eod_id=self.tokenizer.eod_id,
            documents=split.documents, vocab_size=self.vocab_size,
        )  # fmt: skip
