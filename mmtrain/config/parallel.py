"""Options of the layout: how the model and its work are spread over processes."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field

from mmtrain.config.allowed import at_least, check_allowed, one_of
from mmtrain.config.checks import require
from mmtrain.config.option_marks import FREE_ON_RESUME, LAYOUT

AUTO = "auto"
"""Value of an option that the program chooses."""


@dataclass
class ParallelConfig:
    """Layout of the model over processes; :func:`~mmtrain.parallel.layout.plan_layout` checks that it can be made.

    Attributes:
        micro_batch_rows: rows that one process runs at once.
        fit: where the axes below do not fit the number of processes, as after a restart on fewer, take the nearest
            that do: divisors of `tp`, `etp`, `cp`, `pp` and `ep`, the first of these kept longest. ``parallel=auto``
            sets it.
        activation_checkpoint: activations that are computed again in backward: ``none``; ``block``, all of each block
            but its input; ``selective``, those but the output of softmax attention, whose cost grows with the length of
            documents. true is ``block``, false ``none``.
        offload_block_inputs: hold the inputs of blocks in host memory between forward and backward: true, of all, or
            of a number of a rank's first blocks, whose inputs wait longest, where host memory has no room for all.
            Needs `activation_checkpoint`.
        ffn_chunk_tokens: tokens that a dense feed-forward or shared expert works on at once, and rows that experts do;
            nothing but its input waits for backward, where the first product is computed again: under recomputation
            for nothing in a dense layer, else 2 of a feed-forward's 9 products more. null: all tokens at once. A chunk
            of experts should have thousands of rows for each of a rank's experts.
        lightning_head_groups: groups of heads that a lightning layer works on one after the other, and of tokens after
            its norm; between forward and backward its attention's output alone waits, and backward holds one group's
            projection, SiLU and their gradients in place of all heads'. Costs the layer's mixer once more, but for its
            output projection. They divide the heads that a rank of `tp` has.
        reshard_after_forward: free gathered parameters between forward and backward (ZeRO-3), or keep them until the
            step's last backward, so that they are gathered once a step (ZeRO-2, or 1 without the next). ZeRO-1 of data
            parallelism alone runs without FSDP2's hooks, for much less work of the host. ``auto`` keeps them where that
            lets a phase run from `cuda_graphs` and fits the device with its margin, and else frees them.
        sync_every_micro_batch: reduce gradients after every micro-batch (less memory) or once a step.
        tp: tensor parallelism of attention, embedding, head and loss, with sequence parallelism.
        pp: pipeline parallelism; ranks that share the depth.
        cp: context parallelism; ranks that share each row of tokens. ``auto`` is chosen for each phase before the run
            starts: 1, or where a phase cannot run on the processes (fewer rows a step than they need) or does not fit
            the device with its margin, the least larger number with which it does. A number is taken as it is, 1 too. A
            run that is resumed keeps what its checkpoint's run chose.
        cp_chunks: equal chunks of a row that each of these ranks owns. More of them even out the work of the softmax
            layers better, and cost a lightning state each; `zigzag` is even for one document with 2.
        cp_table: which rank owns which chunks: ``balanced``, from each row's documents, so that the work of the softmax
            layers is even; ``zigzag`` or ``contiguous``.
        cp_softmax: how keys and values of a document get to its later queries: ``allgather``, by groups of heads;
            ``ring``, with the least memory; ``varlen``, all at once, copied to each piece of a document, which short
            chunks want; or ``auto``.
        cp_states: how states of lightning layers get to later chunks: ``collectives``, an all-gather; or ``auto``, by
            which copy engines fetch them out of the other GPUs' memory where all ranks of `cp` are on one host.
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
        balance_images: share the work of a model's eyes out evenly over all ranks of dp, cp and tp, whatever images
            fell to whose rows; false: among the ranks that have the same rows.
        cuda_graphs: record forward and backward between softmax layers once, and launch them as CUDA graphs: the host
            launches a few graphs a micro-batch in place of thousands of kernels, for the same bits. ``auto`` does so
            where it can: on one GPU, or with data parallelism alone that gathers and reduces once a step
            (`reshard_after_forward` and `sync_every_micro_batch` false); without `offload_block_inputs`,
            `lightning_head_groups` or selective recomputation; for micro-batches of 65,536 tokens at most. true refuses
            to run without, false is for debugging.
        aux_loss_over: tokens whose fractions the auxiliary loss takes: those of a ``micro_batch``, of a ``sequence``,
            or of the ``global_batch``. The last are the step before's; at the first step all are even.
    """

    micro_batch_rows: int = field(default=1, metadata=at_least(1))
    fit: bool = field(default=False, metadata=LAYOUT)
    activation_checkpoint: bool | str = field(
        default="none", metadata={**FREE_ON_RESUME, **one_of("none", "selective", "block")}
    )
    offload_block_inputs: bool | int = field(default=False, metadata={**FREE_ON_RESUME, **at_least(0)})
    ffn_chunk_tokens: int | None = field(
        default=None, metadata={**LAYOUT, **at_least(1, fix="give null for all tokens at once")}
    )
    lightning_head_groups: int = field(default=1, metadata={**LAYOUT, **at_least(1)})
    reshard_after_forward: bool | str = field(default=AUTO, metadata={**FREE_ON_RESUME, **one_of(AUTO)})
    sync_every_micro_batch: bool = field(default=False, metadata=LAYOUT)
    tp: int = field(default=1, metadata={**LAYOUT, **at_least(1)})
    pp: int = field(default=1, metadata={**LAYOUT, **at_least(1)})
    cp: int | str = field(default=AUTO, metadata={**LAYOUT, **at_least(1), **one_of(AUTO)})
    cp_chunks: int = field(default=8, metadata={**LAYOUT, **at_least(1)})
    cp_table: str = field(default="balanced", metadata={**LAYOUT, **one_of("balanced", "zigzag", "contiguous")})
    cp_softmax: str = field(default="auto", metadata={**LAYOUT, **one_of("auto", "ring", "allgather", "varlen")})
    cp_states: str = field(default="auto", metadata={**LAYOUT, **one_of("auto", "collectives")})
    ep: int = field(default=1, metadata={**LAYOUT, **at_least(1)})
    etp: int = field(default=1, metadata={**LAYOUT, **at_least(1)})
    pp_schedule: str = field(default="1f1b", metadata={**LAYOUT, **one_of("1f1b", "interleaved", "zero_bubble")})
    pp_chunks: int = field(default=1, metadata={**LAYOUT, **at_least(1)})
    token_groups: int | str = field(default=1, metadata={**LAYOUT, **at_least(1), **one_of("auto")})
    exchange: str = field(default="auto", metadata={**LAYOUT, **one_of("auto", "direct", "collectives")})
    global_router: bool = False
    balance_images: bool = field(default=True, metadata=LAYOUT)
    cuda_graphs: bool | str = field(default=AUTO, metadata={**FREE_ON_RESUME, **one_of(AUTO)})
    aux_loss_over: str = field(default="micro_batch", metadata=one_of("micro_batch", "sequence", "global_batch"))

    def __post_init__(self) -> None:
        if isinstance(self.activation_checkpoint, bool):  # as it was written before there were three choices
            self.activation_checkpoint = "block" if self.activation_checkpoint else "none"

    @property
    def reshards(self) -> bool:
        """Whether gathered parameters are freed between forward and backward; ``auto`` that nobody settled does."""
        return self.reshard_after_forward is not False

    def offloads(self, number: int) -> bool:
        """Whether the input of a rank's block goes to host memory; `number` counts the rank's blocks from 0."""
        wanted = self.offload_block_inputs
        return wanted if isinstance(wanted, bool) else number < wanted

    @property
    def recomputes(self) -> bool:
        """Whether blocks are computed again in backward, in whole or in part."""
        return self.activation_checkpoint != "none"

    @property
    def cp_size(self) -> int:
        """Ranks that share a row: `cp`, or the 1 that ``auto`` begins with as long as nothing is chosen."""
        return 1 if isinstance(self.cp, str) else self.cp

    def validate(self) -> None:
        """Refuse sizes below 1, unknown choices, and chunks that the schedule cannot run."""
        check_allowed(self, "parallel")
        self._check_direct()
        require(self.pp_schedule != "interleaved" or self.pp_chunks > 1, "parallel.pp_chunks", self.pp_chunks,
                 "pp_schedule=interleaved needs more than one chunk a rank",
                 "give parallel.pp_chunks=2 or parallel.pp_schedule=1f1b")  # fmt: skip
        require(self.pp_schedule != "1f1b" or self.pp_chunks == 1, "parallel.pp_chunks", self.pp_chunks,
                 "pp_schedule=1f1b runs one chunk a rank",
                 "give parallel.pp_chunks=1 or parallel.pp_schedule=interleaved")  # fmt: skip
        zero_bubble = self.pp > 1 and self.pp_schedule == "zero_bubble"
        require(not (zero_bubble and self.recomputes), "parallel.activation_checkpoint",
                 self.activation_checkpoint, "zero_bubble would run every block again for each of its weights",
                 "turn it off, or choose another parallel.pp_schedule")  # fmt: skip
        require(not (zero_bubble and self.ffn_chunk_tokens is not None), "parallel.ffn_chunk_tokens",
                 self.ffn_chunk_tokens, "zero_bubble would compute every chunk again for each of its weights",
                 "give null, or choose another parallel.pp_schedule")  # fmt: skip
        require(not (zero_bubble and self.lightning_head_groups > 1), "parallel.lightning_head_groups",
                 self.lightning_head_groups, "zero_bubble would compute every group again for each of its weights",
                 "give 1, or choose another parallel.pp_schedule")  # fmt: skip
        require(self.recomputes or not self.offload_block_inputs, "parallel.offload_block_inputs",
                 self.offload_block_inputs, "without recomputation blocks hold more than their inputs",
                 "give parallel.activation_checkpoint=block or selective too")  # fmt: skip
        require(self.cuda_graphs is not True or not self.unrecorded, "parallel.cuda_graphs", True,
                 f"{self.unrecorded} cannot be part of a graph", "give parallel.cuda_graphs=auto")  # fmt: skip
        senders, sharers = self.ep * self.etp, self.cp_size * self.tp
        require(not self.global_router or (senders % sharers == 0 and senders > sharers), "parallel.global_router",
                 self.global_router, f"ep {self.ep} x etp {self.etp} = {senders} ranks must hold several whole "
                 f"micro-batches, each on cp {self.cp_size} x tp {self.tp} = {sharers} ranks",
                 "raise parallel.ep, or turn it off")  # fmt: skip

    @property
    def unrecorded(self) -> str:
        """What these options ask for that CUDA graphs cannot hold; empty if nothing."""
        if self.offload_block_inputs:
            return "copies of offload_block_inputs to host memory"
        if self.lightning_head_groups > 1:
            return "groups of heads that lightning_head_groups computes again"
        return (
            "attention that activation_checkpoint=selective keeps" if self.activation_checkpoint == "selective" else ""
        )

    def _check_direct(self) -> None:
        """Refuse to read rows directly where collectives are needed."""
        why = (
            "rows travel where ep is above 1" if self.ep == 1
            else f"token_groups={self.token_groups} overlaps collectives with computing" if self.token_groups != 1
            else f"slices of experts on etp={self.etp} ranks need their rows from others than tp={self.tp}"
            if self.etp not in (1, self.tp)
            else "the rows of a pooled capacity have no fixed slots" if self.global_router
            else f"rows that cp={self.cp} ranks share have no fixed slots on any of them" if self.cp_size > 1
            else None
        )  # fmt: skip
        require(self.exchange != "direct" or why is None, "parallel.exchange", self.exchange, str(why),
                 "give parallel.exchange=auto, which takes what works")  # fmt: skip


@dataclass
class PhaseParallelConfig:
    """Options of the layout that a phase has of its own; null takes the run's `parallel` option of the same name."""

    def over(self, run: ParallelConfig) -> ParallelConfig:
        """Return the layout of a phase of a run with these options."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(run, **own)


def _with_optional_fields(cls: type, of: type) -> type:
    """Return `cls` with every option of the dataclass `of`, each null unless given, with the same allowed values."""
    hints = typing.get_type_hints(of)
    fields = [
        (one.name, hints[one.name] | None, field(default=None, metadata=one.metadata)) for one in dataclasses.fields(of)
    ]
    made = dataclasses.make_dataclass(cls.__name__, fields, bases=(cls,), namespace={"__module__": cls.__module__})
    attributes = (of.__doc__ or "").partition("    Attributes:")[2]
    made.__doc__ = f"{cls.__doc__}\n\n    Attributes:{attributes}"
    return made


PhaseParallelConfig = _with_optional_fields(PhaseParallelConfig, ParallelConfig)  # type: ignore[misc]
