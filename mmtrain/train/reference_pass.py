"""The frozen reference of preference training: its log-probabilities of every pair, computed once and kept.

They are computed by the weights that the run starts from, in the layout of its model, before the first step. So
training has one model in memory, and every later epoch and launch reads what is kept. The other way, a second copy of
the weights that runs beside each step, costs its memory and about a third more time in every step. Nothing of the
reference depends on how rows are shared out: each is run alone, and dropless.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch.distributed as dist

from mmdata.corpus.fingerprint import digest_of
from mmdata.images.batch import ImageBatch
from mmdata.images.stream_batches import read_batches
from mmdata.rows.loader import PackedBatch
from mmdata.rows.mixture import Mixture
from mmdata.rows.stream import RowStream
from mmtrain.checkpoint.agreement import on_main
from mmtrain.config import PretrainConfig
from mmtrain.train.inputs import RunInputs
from mmtrain.train.pairs import LogProbs, References, usable_pairs
from mmtrain.train.reference_store import FOLDER, ReferenceStore
from mmtrain.train.session import Session
from mmtrain.train.step import model_inputs

PART_ROWS = 256
"""Rows of a part: what an interrupted pass does again, at most. Ours."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a stream.

    Attributes:
        number: of the part.
        stream: number of the stream.
        rows: of the stream.
    """

    number: int
    stream: int
    rows: range

    def share(self, rank: int, ranks: int) -> list[int]:
        """Return a rank's rows: every rank has as many, the last again where there are too few."""
        mine = range(self.rows.start + rank, self.rows.start + -(-len(self.rows) // ranks) * ranks, ranks)
        return [min(row, self.rows.stop - 1) for row in mine]


class ReferencePass:
    """Every pair that a run trains on or validates with, in parts.

    Args:
        config: every option of the run; its stage has a preference.
        inputs: of the run.
        run: folder of the run.
        checkpoint: fingerprint of the reference.

    Attributes:
        store: what is known of them.
    """

    def __init__(self, config: PretrainConfig, inputs: RunInputs, run: Path, checkpoint: str) -> None:
        phase, preference = inputs.phases[0], config.stage.preference
        assert preference is not None
        self._beta, self._rope_base, self._workers = preference.beta, phase.rope_base, config.data.num_workers
        self._streams, self._parts = _streams(inputs, phase.seq_len), []
        for number, (_, rows) in enumerate(self._streams):
            for first in range(0, rows, PART_ROWS):
                part = Part(len(self._parts), number, range(first, min(first + PART_ROWS, rows)))
                self._parts.append(part)
        work = [[digest_of(stream.corpus.fingerprint()), rows] for stream, rows in self._streams]
        identity = {
            "format": 1, "checkpoint": checkpoint, "seq_len": int(phase.seq_len), "rope_base": phase.rope_base,
            "data_seed": config.data.seed, "part_rows": PART_ROWS, "rows": digest_of({"rows": work}),
        }  # fmt: skip
        self.store = ReferenceStore(run / FOLDER, identity, len(self._parts))

    def missing(self) -> list[int]:
        """Return the parts that are still to be computed. Collective."""
        return on_main(self.store.missing)

    def run(self, session: Session, note: Callable[[str], None]) -> None:
        """Compute the parts that are missing, with the weights that a session has. Collective.

        Args:
            session: with the reference's weights.
            note: is told, in a line, what was done.

        Raises:
            OSError: the run's folder cannot be written; on all ranks.
        """
        began, missing = time.perf_counter(), set(self.missing())
        on_main(self.store.open)
        pairs = unusable = 0
        for number, (stream, _) in enumerate(self._streams):
            parts = [part for part in self._parts if part.stream == number and part.number in missing]
            for part, found in self._scored(session, stream, parts):
                on_main(lambda part=part, found=found: self.store.write(part.number, found))
                pairs, unusable = pairs + len(found), unusable + sum(one is None for one in found.values())
        left = f", {unusable} left out as an image cannot be had" if unusable else ""
        known = len(self._parts) - len(missing)
        before = f" ({known} of {len(self._parts)} parts were there)" if known else ""
        note(f"reference  log-probabilities of {pairs:,} pairs{left} in {time.perf_counter() - began:.1f} s, kept in "
             f"{self.store.folder}{before}")  # fmt: skip

    def references(self) -> References:
        """Return all of them, on every rank. Collective."""
        return References(self._beta, on_main(self.store.read))

    def _scored(
        self, session: Session, stream: RowStream, parts: list[Part]
    ) -> Iterator[tuple[Part, dict[str, LogProbs | None]]]:
        """Yield what the reference says of each part's pairs, the same on all ranks."""
        context = session.context
        shares = [part.share(context.dp_rank, context.dp_size) for part in parts]
        rows = [[row] for share in shares for row in share]
        with session.model.evaluating(), closing(read_batches(stream, rows, num_workers=self._workers)) as batches:
            for part, share in zip(parts, shares, strict=True):
                mine: dict[str, LogProbs | None] = {}
                for batch in islice(batches, len(share)):
                    mine |= self._score(session, batch)
                yield part, _gathered(mine)

    def _score(self, session: Session, batch: PackedBatch) -> dict[str, LogProbs | None]:
        """Return what this rank learns of a batch's pairs: nothing where the head is elsewhere."""
        device, vision = session.context.device, session.model.module.config.vision
        inputs = model_inputs(batch, self._rope_base, device, vision, References(self._beta))
        score = session.model.score_pairs(inputs)
        if score is None or not isinstance(batch, ImageBatch):
            return {}
        found: dict[str, LogProbs | None] = dict.fromkeys(batch.pair_ids)
        for i, (chosen, rejected) in zip(usable_pairs(batch), score.log_prob_P2.tolist(), strict=True):
            found[batch.pair_ids[i]] = chosen, rejected
        return found


def _streams(inputs: RunInputs, seq_len: int) -> list[tuple[RowStream, int]]:
    """Return every stream of pairs, and the rows of it that hold them all, or that a validation reads."""
    training = inputs.train_stream(0)
    streams = training.streams if isinstance(training, Mixture) else [training]
    found = [(stream, stream.rows_per_epoch()) for stream in streams if isinstance(stream, RowStream)]
    valid = inputs.valid_stream(seq_len)
    return found if valid is None else [*found, (valid, min(inputs.data.valid_rows, valid.rows_per_epoch()))]


def _gathered(mine: dict[str, LogProbs | None]) -> dict[str, LogProbs | None]:
    """Return what all ranks have found. Ranks that share a head or a row have found the same."""
    every: list[dict[str, LogProbs | None] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return {name: one for found in every if found is not None for name, one in found.items()}
