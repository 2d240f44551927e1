"""Options of the layout: how the model and its work are spread over processes."""

from __future__ import annotations

from dataclasses import dataclass

from mmtrain.config.checks import choose, require


@dataclass
class ParallelConfig:
    """How the model is laid over processes; :func:`~mmtrain.parallel.layout.plan_layout` checks that it can be.

    Attributes:
        micro_batch_rows: rows that one process runs at once.
        activation_checkpoint: recompute each block in backward.
        reshard_after_forward: free gathered parameters between forward and backward (ZeRO-3) or keep them (ZeRO-2).
        sync_every_micro_batch: reduce gradients after every micro-batch (less memory) or once a step.
        tp: tensor parallelism of attention, embedding, head and loss, with sequence parallelism.
        pp: pipeline parallelism; ranks that share the depth.
        cp: context parallelism; ranks that share a sequence.
        ep: expert parallelism; ranks that share the experts of a layer.
        etp: tensor parallelism inside an expert; free to differ from `tp`.
        pp_schedule: order of a pipeline's work: ``1f1b``, ``interleaved`` or ``zero_bubble``.
        pp_chunks: model chunks that a pipeline rank holds; above 1 for ``interleaved``, 1 for ``1f1b``.
        token_groups: groups of tokens whose expert traffic and compute overlap; ``auto`` chooses.
        global_router: pool an expert's capacity over all ranks that send to a copy of it, instead of one share a rank.
        aux_loss_over: tokens that the auxiliary loss takes as one: a ``micro_batch``, ``sequence`` or ``global_batch``.
        dispatch: shapes of the expert all-to-all: ``static`` (padded to capacity), ``exact`` counts, or ``auto``.
    """

    micro_batch_rows: int = 1
    activation_checkpoint: bool = False
    reshard_after_forward: bool = True
    sync_every_micro_batch: bool = False
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp_schedule: str = "1f1b"
    pp_chunks: int = 1
    token_groups: int | str = 1
    global_router: bool = False
    aux_loss_over: str = "micro_batch"
    dispatch: str = "auto"

    def validate(self) -> None:
        """Refuse sizes below 1, unknown choices, and chunks that the schedule cannot run."""
        for name in ("micro_batch_rows", "tp", "pp", "cp", "ep", "etp", "pp_chunks"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name}", value, "must be at least 1", "for example 1")
        require(self.cp == 1, "parallel.cp", self.cp, "context parallelism is not available yet", "give parallel.cp=1")
        choose("parallel.pp_schedule", self.pp_schedule, ("1f1b", "interleaved", "zero_bubble"))
        require(self.pp_schedule != "interleaved" or self.pp_chunks > 1, "parallel.pp_chunks", self.pp_chunks,
                 "pp_schedule=interleaved needs more than one chunk a rank",
                 "give parallel.pp_chunks=2 or parallel.pp_schedule=1f1b")  # fmt: skip
        require(self.pp_schedule != "1f1b" or self.pp_chunks == 1, "parallel.pp_chunks", self.pp_chunks,
                 "pp_schedule=1f1b runs one chunk a rank",
                 "give parallel.pp_chunks=1 or parallel.pp_schedule=interleaved")  # fmt: skip
        groups = self.token_groups
        require(groups == "auto" or (isinstance(groups, int) and groups >= 1), "parallel.token_groups", groups,
                 "must be a number of at least 1, or auto", "for example 1")  # fmt: skip
        choose("parallel.aux_loss_over", self.aux_loss_over, ("micro_batch", "sequence", "global_batch"))
        choose("parallel.dispatch", self.dispatch, ("auto", "static", "exact"))
