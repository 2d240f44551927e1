"""Training rows of each phase, and how much of each source they read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from mmdata.corpus.array_cache import ArrayCache
from mmdata.corpus.buckets import in_bucket
from mmdata.corpus.documents import Documents, choose
from mmdata.corpus.fingerprint import digest_of
from mmdata.corpus.split import Split
from mmdata.images.stream import left_out_lines, open_stream
from mmdata.images.stream_batches import stream_rules
from mmdata.rows.loader import Rows
from mmdata.rows.mixture import Mixture
from mmdata.rows.stream import RowStream
from mmdata.rows.token_mixture import Component, TokenMixture, row_tokens, window_rows
from mmtrain.config import DataConfig, PhaseConfig, SourceConfig
from mmtrain.train.curriculum import phase_seed
from mmtrain.train.epochs import SourceUse, shared_out
from mmtrain.train.phase_mixture import Part, PhaseMixture, phase_mixtures
from mmtrain.train.source_tokenizers import common_sources, named_sources


class PhaseRows:
    """Streams of training rows, one a phase, each with an order of its own.

    A phase without buckets, transition or long sources reads one corpus, or gives each row to one of several; any other
    meets its shares in tokens.

    Args:
        data: the run's data options.
        phases: scaled.
        splits: training documents of each corpus, by path.
        caches: of each corpus, by path.
        eod_id: of the run's tokenizer.
        vocab_size: of the model.

    Attributes:
        left_out: a line for each corpus with images of which a phase leaves documents out.
        mixtures: what each phase reads, where its shares are met in tokens; None where each row is of one source.

    Raises:
        ConfigError: no documents for a bucket.
        DataError: too little text for a row, or corpora with images of one phase that were prepared by different rules.
    """

    def __init__(
        self,
        data: DataConfig,
        phases: Sequence[PhaseConfig],
        splits: Mapping[str, Split],
        caches: Mapping[str, ArrayCache],
        eod_id: int,
        vocab_size: int,
    ) -> None:
        self._data, self._phases, self._splits, self._caches = data, phases, splits, caches
        self._eod_id, self._vocab_size = eod_id, vocab_size
        self._parts: dict[Part, Documents] = {}
        self.mixtures = phase_mixtures(data, phases, self._documents)
        self.left_out: list[str] = []
        for index in range(len(phases)):  # too little text for a row is found here
            stream = self.stream(index)
            stream_rules(stream)  # corpora of one phase with different tiles, too
            found = left_out_lines(stream)
            self.left_out += [line for line in found if line not in self.left_out]

    def stream(self, index: int) -> Rows:
        """Rows of a phase."""
        phase, seed = self._phases[index], phase_seed(self._data.seed, index)
        mixture = self.mixtures[index]
        if mixture is not None:
            return self._token_mixture(phase, mixture, seed)
        sources = phase.sources or self._data.all_sources
        streams = [self._corpus_stream(source.path, phase.seq_len, seed) for source in sources]
        return streams[0] if len(streams) == 1 else Mixture(streams, [source.weight for source in sources], seed)

    def uses(self, phase_tokens: Sequence[int]) -> list[SourceUse]:
        """Return what each phase reads of each of its sources, or of those documents of them that it reads.

        Args:
            phase_tokens: tokens that each phase consumes (`epochs.tokens_by_phase`).
        """
        found = []
        for index, tokens in enumerate(phase_tokens):
            if (mixture := self.mixtures[index]) is not None:
                found += self._mixed_uses(index, mixture, tokens)
                continue
            named = self._named(index)
            shares = shared_out(tokens, [source.weight for _, source in named])
            for (option, source), share in zip(named, shares, strict=True):
                found.append(self._use(index, option, source, Part(source.path), share))
        return found

    def _named(self, index: int) -> list[tuple[str, SourceConfig]]:
        """Return a phase's sources with the option that names each."""
        own = self._phases[index].sources or []
        named = [(f"stage.phases[{index}].sources[{j}].path", source) for j, source in enumerate(own)]
        return named or common_sources(self._data)

    def _mixed_uses(self, index: int, mixture: PhaseMixture, tokens: int) -> list[SourceUse]:
        """Return what a phase reads of each part of its mixture, up to some tokens of it."""
        schedule = self._token_mixture(self._phases[index], mixture, 0).schedule
        given = schedule.tokens_before(math.ceil(tokens / schedule.row_tokens))
        named = [*self._named(index), *named_sources(self._data, self._phases)]
        found = []
        for part, consumed in zip(mixture.parts, given, strict=True):
            option, source = next(one for one in named if one[1].path == part.path)
            found.append(self._use(index, option, source, part, consumed))
        return found

    def _use(self, index: int, option: str, source: SourceConfig, part: Part, consumed: float) -> SourceUse:
        split, everything = self._splits[part.path], part == Part(part.path)
        own = source.max_epochs is not None
        return SourceUse(
            phase=index,
            option=option,
            path=source.path,
            corpus=digest_of(split.corpus.fingerprint()),
            consumed=consumed,
            tokens=split.num_tokens if everything else self._documents(part).num_tokens,
            from_tokens=part.from_tokens,
            below=part.below,
            limit=source.max_epochs if own else self._data.max_epochs,
            limit_option=f"{option.removesuffix('.path')}.max_epochs" if own else "data.max_epochs",
        )

    def _token_mixture(self, phase: PhaseConfig, mixture: PhaseMixture, seed: int) -> TokenMixture:
        """Rows of a phase whose shares are met in tokens."""
        components = [
            Component(self._splits[part.path].corpus, self._documents(part), self._caches[part.path])
            for part in mixture.parts
        ]
        shares = [mixture.end.get(part, Fraction(0)) for part in mixture.parts]
        rows = window_rows(components, shares, phase.seq_len)
        needed = math.ceil(phase.tokens / row_tokens(self._data.packing, phase.seq_len, rows))
        return TokenMixture(
            components, mixture.segments(needed), seq_len=phase.seq_len, seed=seed, packing=self._data.packing,
            eod_id=self._eod_id, vocab_size=self._vocab_size,
        )  # fmt: skip

    def _documents(self, part: Part) -> Documents:
        """Training documents of a part; there may be none."""
        if part not in self._parts:
            split, cache = self._splits[part.path], self._caches[part.path]
            every = split.kept or choose(split.corpus, split.documents, cache)
            self._parts[part] = in_bucket(split.corpus, every, part.from_tokens, part.below, cache)
        return self._parts[part]

    def _corpus_stream(self, path: str, seq_len: int, seed: int) -> RowStream:
        """Rows of a corpus alone."""
        split = self._splits[path]
        return open_stream(
            split.corpus, seq_len=seq_len, seed=seed, packing=self._data.packing, eod_id=self._eod_id,
            documents=split.kept or split.documents, vocab_size=self._vocab_size, cache=self._caches[path],
        )  # fmt: skip
