"""One optimizer step: accumulate micro-batches, reduce, clip, update, and say what happened."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from mmdata.images.batch import ImageBatch
from mmdata.rows.loader import PackedBatch
from mmtrain.config import VisionConfig
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing, RealTokens, to_device
from mmtrain.optim.optimizer import update
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.train.caption_rows import caption_pairs
from mmtrain.train.image_counts import count_batches
from mmtrain.train.image_rows import image_inputs
from mmtrain.train.pairs import References
from mmtrain.train.spike_guard import NO_LIMITS, Limits
from mmtrain.train.statistics import StepResult, StepStatistics
from mmtrain.vision.caption_pairs import PairedInputs


class WeightsInUse(Protocol):
    """Reader of weights and moments beside the steps."""

    @property
    def is_writing(self) -> bool:
        """Whether it is still at work on this rank."""

    def let_go(self) -> None:
        """Return once weights and moments may change."""


def model_inputs(
    batch: PackedBatch,
    rope_base: float,
    device: torch.device,
    vision: VisionConfig | None = None,
    references: References | None = None,
) -> ModelInputs:
    """A micro-batch of packed rows, flattened, on the device.

    Args:
        batch: on the host.
        rope_base: of the phase.
        device: of the model.
        vision: options of the model's eyes, which get the batch's images.
        references: of preference training, which gets the batch's pairs.

    Raises:
        ConfigError: a pair has no log-probability of the reference.
    """
    longest, lengths = batch.max_seqlen, tuple(batch.cu_seqlens.diff().tolist())  # read before they leave the host
    real = None
    if batch.real_tokens is not None:
        real = RealTokens.from_rows(batch.real_tokens, batch.tokens_BS.shape[1], device)
    preferred = None if references is None else references.pairs_of(batch, device)
    seen = isinstance(batch, ImageBatch) and vision is not None
    captions = caption_pairs(batch) if seen and vision.contrastive is not None else None
    batch = batch.to(device)
    labels_T = batch.labels_BS.masked_fill(~batch.loss_mask_BS, IGNORE).flatten()
    packing = Packing(batch.cu_seqlens, batch.position_ids_BS.flatten(), longest, lengths, real)
    given = image_inputs(batch, vision) if seen else None
    if captions is not None:
        given = PairedInputs.over(given, captions)
    return ModelInputs(batch.tokens_BS.flatten(), packing, labels_T, rope_base, given, preferred)


def num_labelled(batch: PackedBatch) -> int:
    """Return the tokens of a batch that are learned from."""
    return int(batch.loss_mask_BS.sum())


def train_step(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    lr: float,
    rope_base: float,
    *,
    clip_grad: float | None,
    limits: Limits = NO_LIMITS,
    stop: Callable[[], bool] = lambda: False,
    saving: WeightsInUse | None = None,
    references: References | None = None,
) -> StepResult:
    """Run this rank's micro-batches of a step and update the weights.

    A step whose loss or gradient is not finite on any rank, or over its limit, leaves weights and optimizer as they
    were, on all ranks.

    Args:
        batches: packed rows; every replica has as many batches.
        lr: learning rate of the step.
        rope_base: RoPE base of the phase.
        clip_grad: largest global norm of the gradient; None does not clip.
        limits: largest loss and norm of a step that is taken.
        stop: asked once, after backward: whether this rank wants the run to stop.
        saving: what reads the weights meanwhile, a checkpoint that is being written; the update waits for it.
        references: of preference training, whose loss is the mean over the pairs of the global batch.
    """
    context = model.context
    vision = model.module.config.vision
    learn = references.count if references is not None else num_labelled
    mine = [sum(map(learn, batches)), sum(b.num_real_tokens for b in batches)]
    mine += count_batches(batches) if vision is not None else []
    counts = to_device(torch.tensor(mine, dtype=torch.int64), context.device)
    counts = model.sum_over_batches(counts)  # over whole rows, before any is cut
    learned, tokens = counts[:2]
    statistics = StepStatistics(model.module.config, model, of_pairs=references is not None)
    inputs = (model_inputs(batch, rope_base, context.device, vision, references) for batch in batches)
    for result in model.forward_backward(inputs, len(batches), learned):
        statistics.add(result)
    # All ranks must agree on both before any updates; no rank waits for its device here.
    finite, asked = statistics.loss_is_finite, (stop(), saving is not None and saving.is_writing)
    flags = torch.stack([~finite, *(finite.new_full((), one) for one in asked)]).double()
    flags = torch.cat([flags, statistics.loss_share[None]])
    grad_norm, (bad_losses, stops, writing, ce_sum) = model.clip_gradients(clip_grad, flags)
    broken = (bad_losses > 0) | ~grad_norm.isfinite()
    spike = ~broken & ((ce_sum > limits.loss * learned.double()) | (grad_norm > limits.grad_norm))
    skipped = broken | spike
    if saving is not None:
        saving.let_go()
    update(optimizer, lr, skipped)
    statistics.reduce()
    times = model.end_step(statistics.assigned_LE, skipped)
    whole = {"grad_norm": grad_norm, "learned": learned, "tokens": tokens, "skipped": skipped}
    whole |= {"spike": spike, "stops": stops, "writing": writing, "images": counts[2:]}
    return statistics.result(whole, len(batches) * context.dp_size, times)
