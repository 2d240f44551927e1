"""Rows that a layer of experts sends and receives on a rank: by capacity, or exact ones.

Legend: N tokens of a micro-batch, D model width, F expert width (of this rank's slice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmtrain.parallel.memory.workload import Workload

IMBALANCE = 1.5
"""Rows that the busiest rank receives over the mean, where no capacity limits them. Ours, to be measured."""


@dataclass(frozen=True)
class ExpertRows:
    """Rows of one layer's experts on one rank.

    Attributes:
        travel: whether rows go to other ranks.
        direct: whether they are read out of peer buffers; taken to be so wherever a host of 8 GPUs could.
        sent: rows for this rank's tokens; those of experts that lie here too.
        received: rows that this rank's experts multiply.
    """

    travel: bool
    direct: bool
    sent: int
    received: int


def expert_rows(work: Workload) -> ExpertRows:
    """Count the rows of a layer (`mmtrain.parallel.expert.exchange` and `mmtrain.parallel.routing` make them)."""
    model, parallel, layout = work.model, work.parallel, work.layout
    if not model.num_experts:
        return ExpertRows(False, False, 0, 0)
    factor, experts = model.capacity_factor, model.num_experts
    assignments = work.own_tokens * model.top_k
    if layout.ep * layout.etp == 1:
        limit = assignments if factor is None else math.ceil(assignments * factor)
        rows = min(assignments, limit)
        return ExpertRows(False, False, rows, rows)
    if factor is None or parallel.global_router or layout.cp > 1:  # rows of exact size
        most = IMBALANCE if factor is None else factor
        return ExpertRows(True, False, assignments, math.ceil(layout.etp * assignments * most))
    capacity = min(math.ceil(work.mixer_tokens * model.top_k / experts * factor), work.mixer_tokens)
    whole = layout.etp == layout.tp > 1  # each rank of tp sends all rows to its slice of the experts
    slots = experts * (capacity if whole else -(-capacity // layout.tp))
    alone = layout.etp == 1 or whole
    direct = parallel.exchange != "collectives" and parallel.token_groups == 1 and alone and 1 < layout.ep <= 8
    return ExpertRows(True, direct, slots, slots if whole else slots * layout.etp)
