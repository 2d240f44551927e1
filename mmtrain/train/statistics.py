"""Figures of a step, summed by name on the device, over micro-batches and then over ranks, and read once.

Legend: L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.model.flops import step_flops
from mmtrain.model.model import LossOutput
from mmtrain.model.moe.router import RouterStats
from mmtrain.model.preference import FIGURES
from mmtrain.parallel.expert.comm_streams import CommTimes
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.parallel.pipeline.micro_batch import MicroBatchResult
from mmtrain.train.image_counts import NAMES, image_counts, image_flops
from mmtrain.train.pairs import PairFigures

WHOLE = ("grad_norm", "learned", "tokens", "skipped", "spike", "stops", "writing", "images")
"""Figures of the whole step that are not summed here: every rank has them."""


@dataclass(frozen=True)
class StepResult:
    """Figures of a step over all ranks; padding counts in none of them.

    Attributes:
        loss: mean cross-entropy over labelled tokens, or loss over preference pairs, in nats.
        aux_loss: auxiliary loss, summed over layers, mean over micro-batches.
        grad_norm: global norm before clipping.
        tokens: tokens of text in the global batch.
        skipped: whether loss or gradient was not finite, or over its limit, so that the weights were left alone.
        spike: whether it was skipped for its size alone.
        stop: whether some rank wants the run to stop after this step.
        writing: whether some rank was still writing a checkpoint within this step.
        cp_balance: softmax work of the busiest of the ranks that share a row over their mean, mean over micro-batches;
            None where none do.
        image_balance: tiles of images that the busiest rank of data and context parallelism looked at over their mean;
            None where there is one such rank, or none had a tile.
        figures: means over micro-batches of what the model tells besides its losses.
        memory: bytes, the most that any rank's device has held so far; 0 on a CPU.
        flops: useful operations, forward and backward, of the assignments that were kept, and of images.
        router_load: [layers][experts], assignments before drops over the even share; empty without experts.
        drop_rate: share of the global batch's assignments dropped, a layer.
        drop_rate_alone: share that each micro-batch's own capacity would have dropped, without the global router.
        router_entropy: mean over the global batch's tokens, in nats, a layer.
        preference: of preference training.
        images: counts of images by the names of `mmtrain.train.image_counts`; empty of a model without eyes.
        exchange_s: seconds that this rank's communication around experts took.
        exchange_waited_s: seconds of them that computing waited.
    """

    loss: float
    aux_loss: float
    grad_norm: float
    flops: float
    tokens: int
    router_load: list[list[float]]
    drop_rate: list[float]
    drop_rate_alone: list[float]
    router_entropy: list[float]
    skipped: bool = False
    spike: bool = False
    stop: bool = False
    writing: bool = False
    cp_balance: float | None = None
    image_balance: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    preference: PairFigures | None = None
    memory: int = field(default=0, compare=False)
    images: Mapping[str, int] = field(default_factory=dict)
    exchange_s: float = field(default=0.0, compare=False)  # times do not make results differ
    exchange_waited_s: float = field(default=0.0, compare=False)


class NamedSums:
    """Sums with names and shapes in one float64 tensor, so that one all-reduce and one copy take all of them.

    float64: counts must survive the sum. `sums[name]` is a view to add to.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        sizes = [math.prod(shape) for shape in shapes.values()]
        self.flat = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        parts = zip(shapes.items(), self.flat.split(sizes), strict=True)
        self._views = {name: part.view(shape) for (name, shape), part in parts}

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def on_host(self) -> dict[str, Tensor]:
        """All of them in host memory; waits for the device once."""
        flat = self.flat.cpu()
        return {name: flat[view.storage_offset() :][: view.numel()].view(view.shape)
                for name, view in self._views.items()}  # fmt: skip


class StepStatistics:
    """Sums the figures of a step's micro-batches."""

    def __init__(self, config: ModelConfig, model: ParallelModel, of_pairs: bool = False) -> None:
        self.of_pairs = of_pairs
        self.config, self.model, self.flops, self.tokens_of_one = config, model, 0.0, 0
        layers, experts = (config.num_layers, config.num_experts) if config.num_experts else (0, 0)
        scalars = dict.fromkeys(("ce_sum", "aux_loss", "kept", "flops", "cp_balance", *WHOLE), ())
        per_layer = dict.fromkeys(("drop_rate", "drop_rate_alone", "entropy"), (layers,))
        pairs = {"preference": (len(FIGURES) if of_pairs else 0,)}
        ranks = dict.fromkeys(("memory", "tiles"), (dist.get_world_size(),))  # sums over ranks that keep each one's
        self.figures = tuple(model.module.figures)
        scalars |= dict.fromkeys(self.figures, ())
        images = {"images": (0 if config.vision is None else len(NAMES),)}
        shapes = {**scalars, "assigned": (layers, experts), **per_layer, **pairs, **images, **ranks}
        self.sums = NamedSums(shapes, model.context.device)

    @property
    def assigned_LE(self) -> Tensor:
        """Assignments to each expert of every layer, before drops: whole numbers in float64."""
        return self.sums["assigned"]

    @property
    def loss_is_finite(self) -> Tensor:
        """Whether this rank's losses are, a bool scalar on the device."""
        return self.sums["ce_sum"].isfinite() & self.sums["aux_loss"].isfinite()

    @property
    def loss_share(self) -> Tensor:
        """This rank's share of the global batch's summed loss, a float64 scalar: it counts once over all ranks."""
        return self.sums["ce_sum"] / self.model.context.layout.tp

    def add(self, result: MicroBatchResult) -> None:
        """Take in the figures that some layers left of a micro-batch; those with the head bring its loss."""
        out, packing, lengths = result.out, result.packing, result.packing.real_lengths
        self.tokens_of_one = self.tokens_of_one or max(packing.row_tokens, 1)
        if isinstance(out, LossOutput):
            self.sums["ce_sum"].add_(out.ce_sum)
        if self.model.context.cp_rank > 0:  # what follows is of whole rows, which the first of their ranks brings
            return
        if isinstance(out, LossOutput):
            self.flops += step_flops(self.config, lengths, kept_assignments=0).total
            self.sums["cp_balance"].add_(packing.balance)
            for name, value in out.figures.items():
                self.sums[name].add_(value)
            if out.preference is not None:
                self.sums["preference"].add_(out.preference)
        self.sums["aux_loss"].add_(out.aux_loss)
        if out.router:
            self._add_router(out.router, slice(result.layers.start, result.layers.stop), sum(lengths))

    def _add_router(self, stats: list[RouterStats], layers: slice, tokens: int) -> None:
        weight = tokens / self.tokens_of_one  # a mean over tokens counts by their number; 1 without padding
        drop_rate_L = torch.stack([s.drop_rate for s in stats]).double()
        self.sums["kept"].add_((1.0 - drop_rate_L).sum() * (tokens * self.config.top_k))
        self.sums["assigned"][layers].add_(torch.stack([s.assigned_E for s in stats]))
        self.sums["drop_rate"][layers].add_(drop_rate_L, alpha=weight)
        self.sums["drop_rate_alone"][layers].add_(torch.stack([s.drop_rate_alone for s in stats]), alpha=weight)
        self.sums["entropy"][layers].add_(torch.stack([s.entropy for s in stats]), alpha=weight)

    def reduce(self) -> None:
        """Sum over the ranks that had other rows or other layers; afterwards all have the same."""
        self.sums["flops"].fill_(self.flops)
        context = self.model.context
        self.sums["memory"][context.rank].fill_(self.model.peak_bytes())  # an assignment would wait for the device
        self.sums["tiles"][context.rank].fill_(self.model.take_tiles_seen())
        self.model.sum_over_ranks(self.sums.flat)

    def result(self, whole: Mapping[str, Tensor], micro_batches: int, times: CommTimes) -> StepResult:
        """Plain numbers, after :meth:`reduce`.

        Args:
            whole: figures that are the same on all ranks already, by the names of WHOLE.
            micro_batches: of all ranks.
            times: of this rank's communication around experts.
        """
        for name in WHOLE:
            self.sums[name].copy_(whole[name])
        sums = self.sums.on_host()
        learned, tokens = float(sums["learned"]), float(sums["tokens"])
        weights = max(tokens, 1.0) / self.tokens_of_one  # sum of those of `_add_router`
        assigned_LE = sums["assigned"]
        load_LE = assigned_LE * self.config.num_experts / assigned_LE.sum(1, keepdim=True).clamp(min=1)
        kept = step_flops(self.config, [], kept_assignments=float(sums["kept"]))
        images = image_counts(sums["images"].tolist())
        return StepResult(
            loss=float(sums["ce_sum"]) / max(learned, 1.0),
            aux_loss=float(sums["aux_loss"]) / micro_batches,
            cp_balance=float(sums["cp_balance"]) / micro_batches if self.model.context.layout.cp > 1 else None,
            image_balance=self._image_balance(sums["tiles"]),
            preference=PairFigures.of(sums["preference"].tolist()) if self.of_pairs else None,
            grad_norm=float(sums["grad_norm"]),
            flops=float(sums["flops"]) + kept.total + image_flops(self.config, images),
            tokens=int(tokens),
            router_load=load_LE.tolist(),
            drop_rate=(sums["drop_rate"] / weights).tolist(),
            drop_rate_alone=(sums["drop_rate_alone"] / weights).tolist(),
            router_entropy=(sums["entropy"] / weights).tolist(),
            skipped=bool(sums["skipped"]),
            spike=bool(sums["spike"]),
            stop=bool(sums["stops"]),
            writing=bool(sums["writing"]),
            figures={name: float(sums[name]) / micro_batches for name in self.figures},
            memory=int(sums["memory"].max()),
            images=images,
            exchange_s=times.seconds,
            exchange_waited_s=times.waited_seconds,
        )

    def _image_balance(self, tiles_R: Tensor) -> float | None:
        """The most tiles of a rank over the mean of those that look, the first stage's, of this rank's place in tp."""
        ranks, total = self.model.context.layout.replicas, float(tiles_R.sum())
        return float(tiles_R.max()) * ranks / total if ranks > 1 and total else None
