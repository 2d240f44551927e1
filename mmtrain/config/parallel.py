"""Options of the layout: how the model and its work are spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmtrain.config.checks import choose, require
from mmtrain.config.option_marks import FREE_ON_RESUME


@dataclass
class ParallelConfig:
    """Layout of the model over processes; :func:`~mmtrain.parallel.layout.plan_layout` checks that it can be made.

    Attributes:
        micro_batch_rows: rows that one process runs at once.
        activation_checkpoint: recompute each block in backward.
        reshard_after_forward: free gathered parameters between forward and backward (ZeRO-3), or keep them until the
            step's last backward, so that they are gathered once a step (ZeRO-2, or 1 without the next).
        sync_every_micro_batch: reduce gradients after every micro-batch (less memory) or once a step.
        tp: tensor parallelism of attention, embedding, head and loss, with sequence parallelism.
        pp: pipeline parallelism; ranks that share the depth.
        cp: context parallelism; ranks that share a sequence.
        ep: expert parallelism; ranks that share the experts of a layer.
        etp: tensor parallelism inside an expert; free to differ from `tp`.
        pp_schedule: order of a pipeline's work: ``1f1b``, ``interleaved`` or ``zero_bubble``, which keeps parameters
            gathered and reduces gradients once, whatever the two options above say.
        pp_chunks: model chunks that a pipeline rank holds; above 1 for ``interleaved``, 1 for ``1f1b``, any number for
            ``zero_bubble``.
        token_groups: groups of a rank's experts, each with the tokens sent to it: one travels while another computes. A
            multiple of the number of experts cuts the tokens of each one too.
            ``auto`` measures at the start of a run which number is fastest, which need not be the same in the next run.
        exchange: how rows reach the experts of other ranks: ``direct``, out of the other GPUs' memory, which needs one
            token group, a capacity of each micro-batch's own, and ep (and etp, if above 1, the same ranks as tp) on one
            host; ``collectives``, whatever the layout; or ``auto``, which is direct on GPUs where it can be.
        global_router: pool an expert's capacity over all ranks that send to a copy of it, instead of one share a rank.
        aux_loss_over: tokens whose fractions the auxiliary loss takes: those of a ``micro_batch``, of a ``sequence``,
            or of the ``global_batch``. The last are the step before's; at the first step all are even.
    """

    micro_batch_rows: int = 1
    activation_checkpoint: bool = field(default=False, metadata=FREE_ON_RESUME)
    reshard_after_forward: bool = field(default=True, metadata=FREE_ON_RESUME)
    sync_every_micro_batch: bool = False
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    pp_schedule: str = "1f1b"
    pp_chunks: int = 1
    token_groups: int | str = 1
    exchange: str = "auto"
    global_router: bool = False
    aux_loss_over: str = "micro_batch"

    def validate(self) -> None:
        """Refuse sizes below 1, unknown choices, and chunks that the schedule cannot run."""
        for name in ("micro_batch_rows", "tp", "pp", "cp", "ep", "etp", "pp_chunks"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name}", value, "must be at least 1", "for example 1")
        groups = self.token_groups
        require(groups == "auto" or (isinstance(groups, int) and groups >= 1), "parallel.token_groups", groups,
                 "must be a number from 1 on, or auto", "for example 1")  # fmt: skip
        choose("parallel.exchange", self.exchange, ("auto", "direct", "collectives"))
        self._check_direct()
        require(self.cp == 1, "parallel.cp", self.cp, "context parallelism is not available yet", "give parallel.cp=1")
        choose("parallel.pp_schedule", self.pp_schedule, ("1f1b", "interleaved", "zero_bubble"))
        require(self.pp_schedule != "interleaved" or self.pp_chunks > 1, "parallel.pp_chunks", self.pp_chunks,
                 "pp_schedule=interleaved needs more than one chunk a rank",
                 "give parallel.pp_chunks=2 or parallel.pp_schedule=1f1b")  # fmt: skip
        require(self.pp_schedule != "1f1b" or self.pp_chunks == 1, "parallel.pp_chunks", self.pp_chunks,
                 "pp_schedule=1f1b runs one chunk a rank",
                 "give parallel.pp_chunks=1 or parallel.pp_schedule=interleaved")  # fmt: skip
        zero_bubble = self.pp > 1 and self.pp_schedule == "zero_bubble"
        require(not (zero_bubble and self.activation_checkpoint), "parallel.activation_checkpoint",
                 self.activation_checkpoint, "zero_bubble would run every block again for each of its weights",
                 "turn it off, or choose another parallel.pp_schedule")  # fmt: skip
        senders = self.ep * self.etp
        require(not self.global_router or (senders % self.tp == 0 and senders > self.tp), "parallel.global_router",
                 self.global_router, f"ep {self.ep} x etp {self.etp} = {senders} ranks must hold several whole "
                 f"micro-batches, each on tp={self.tp} ranks", "raise parallel.ep, or turn it off")  # fmt: skip
        choose("parallel.aux_loss_over", self.aux_loss_over, ("micro_batch", "sequence", "global_batch"))

    def _check_direct(self) -> None:
        """Refuse to read rows directly where collectives are needed."""
        why = (
            "rows travel where ep is above 1" if self.ep == 1
            else f"token_groups={self.token_groups} overlaps collectives with computing" if self.token_groups != 1
            else f"slices of experts on etp={self.etp} ranks need their rows from others than tp={self.tp}"
            if self.etp not in (1, self.tp)
            else "the rows of a pooled capacity have no fixed slots" if self.global_router
            else None
        )  # fmt: skip
        require(self.exchange != "direct" or why is None, "parallel.exchange", self.exchange, str(why),
                 "give parallel.exchange=auto, which takes what works")  # fmt: skip
