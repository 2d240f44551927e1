"""What a device's memory follows from, and the sizes on a rank that follow from it in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.mixers.registry import MixerMemory, Placement, mixer_spec
from mmtrain.parallel.layout import Layout, keeps_whole_weights, records_graphs

FP32 = 4
"""Bytes of master weights, gradients and moments, whatever products are computed in."""


@dataclass(frozen=True)
class Workload:
    """A phase of training as memory sees it.

    Attributes:
        model: a validated model.
        parallel: options of the phase's layout.
        layout: sizes of all axes.
        seq_len: tokens of a row.
        micro_batches: most that a rank runs in a step.
        compute_bytes: bytes of an element of products: 2 for bf16, 4 for fp32.
        host_optimizer: whether parameters, gradients and moments lie in host memory.
        stages: numbers of the layers of every stage of a pipeline; empty balances them by cost alone.
        frozen: patterns of the parameters that are not trained (`mmtrain.model.frozen`).
    """

    model: ModelConfig
    parallel: ParallelConfig
    layout: Layout
    seq_len: int
    micro_batches: int
    compute_bytes: int
    host_optimizer: bool = False
    stages: tuple[range, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def row_tokens(self) -> int:
        """Tokens of a micro-batch, on all ranks that share it."""
        return self.parallel.micro_batch_rows * self.seq_len

    @property
    def mixer_tokens(self) -> int:
        """Tokens that a rank's mixers and dense feed-forwards work on."""
        return self.row_tokens // self.layout.cp

    @property
    def own_tokens(self) -> int:
        """Tokens that lie on a rank between them: sequence parallelism shares a micro-batch out over tp."""
        return self.mixer_tokens // self.layout.tp

    @property
    def ffn_chunk(self) -> int | None:
        """Tokens of a dense feed-forward, or rows of experts, that are worked on at once; None: all."""
        return self.parallel.ffn_chunk_tokens

    def mixer_memory(self, letter: str) -> MixerMemory:
        """What the mixer of a kind of layer holds on a rank of tp."""
        return mixer_spec(letter).memory_on(self.model, self.layout.tp, self.parallel.lightning_head_groups)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of whole parameters wait for the step's last micro-batch."""
        return not self.parallel.sync_every_micro_batch and self.micro_batches > 1

    @property
    def zero_bubble(self) -> bool:
        """Whether gradients of weights are computed apart, from parameters that stay gathered."""
        return self.layout.pp > 1 and self.parallel.pp_schedule == "zero_bubble"

    @property
    def keeps_whole(self) -> bool:
        """Whether a rank keeps copies of all parameters to compute with, and sums of all gradients."""
        return keeps_whole_weights(self.layout, self.parallel, self.host_optimizer)

    @property
    def records_graphs(self) -> bool:
        """Whether CUDA graphs run the layers, in memory that they keep."""
        text = self.model.vision is None
        return text and records_graphs(self.layout, self.parallel, self.host_optimizer, self.row_tokens)

    @property
    def keeps_gathered(self) -> bool:
        """Whether blocks' parameters stay gathered between forward and backward."""
        return self.zero_bubble or not self.parallel.reshards


@dataclass(frozen=True)
class Parameters:
    """Elements of the parameters of a layer, or of several, on a rank before data parallelism shards them.

    Attributes:
        dense: sharded over dp and cp.
        experts: sharded over edp.
    """

    dense: int
    experts: int

    @property
    def whole(self) -> int:
        """All of them."""
        return self.dense + self.experts

    def sharded(self, layout: Layout) -> float:
        """Those that stay on a rank."""
        return self.dense / layout.replicas + self.experts / layout.edp

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts)


def layer_parameters(model: ModelConfig, layout: Layout, letter: str) -> Parameters:
    """Parameters of a layer of a kind on a rank of tp, ep and etp."""
    mixer, hidden, tp = mixer_spec(letter), model.hidden_size, layout.tp
    dense = (mixer.matrix_weights(model) + mixer.vector_weights(model)) // tp + 2 * hidden
    if tp > 1 and Placement.REPLICATED in mixer.placements(model, tp).values():  # k and v of few heads lie on all ranks
        dense += 2 * model.num_kv_heads * model.head_dim * hidden * (tp - 1) // tp
    expert = 3 * hidden * model.ffn_hidden_size
    if not model.num_experts:
        return Parameters(dense + expert // tp, 0)
    shared = 3 * hidden * model.shared_ffn_hidden_size // tp + (hidden if model.shared_ffn_hidden_size else 0)
    return Parameters(
        dense + model.num_experts * hidden + shared, model.num_experts * expert // (layout.ep * layout.etp)
    )


def root_parameters(model: ModelConfig, layout: Layout, embedding: bool, head: bool) -> Parameters:
    """Parameters of a stage outside of its layers: a part of the embedding, norm and head."""
    table = -(-model.vocab_size // layout.tp) * model.hidden_size
    return Parameters(embedding * table + head * (table + model.hidden_size), 0)


def stage_layers(work: Workload, pp_rank: int) -> list[Sequence[int]]:
    """Numbers of the layers of each of the stages of a pipeline's rank."""
    if work.layout.pp == 1:
        return [range(work.model.num_layers)]
    stages: Sequence[range] = work.stages
    if not stages:
        from mmtrain.parallel.pipeline.split import split_layers  # brings torch

        stages = split_layers(work.model, work.layout.pp * work.parallel.pp_chunks, work.seq_len)
    return [stages[number] for number in range(pp_rank, len(stages), work.layout.pp)]
