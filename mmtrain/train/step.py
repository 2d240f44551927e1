"""One optimizer step: accumulate micro-batches, reduce, clip, update, and say what happened."""

from __future__ import annotations

import torch

from mmdata.rows.loader import PackedBatch
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing, RealTokens
from mmtrain.optim.optimizer import set_lr
from mmtrain.parallel.parallel_model import ParallelModel
from mmtrain.train.statistics import StepResult, StepStatistics


def model_inputs(batch: PackedBatch, rope_base: float, device: torch.device) -> ModelInputs:
    """A micro-batch of packed rows, flattened, on the device."""
    longest, lengths = batch.max_seqlen, tuple(batch.cu_seqlens.diff().tolist())  # read before they leave the host
    real = None
    if batch.real_tokens is not None:
        real = RealTokens.from_rows(batch.real_tokens, batch.tokens_BS.shape[1], device)
    batch = batch.to(device)
    labels_T = batch.labels_BS.masked_fill(~batch.loss_mask_BS, IGNORE).flatten()
    packing = Packing(batch.cu_seqlens, batch.position_ids_BS.flatten(), longest, lengths, real)
    return ModelInputs(batch.tokens_BS.flatten(), packing, labels_T, rope_base)


def train_step(
    model: ParallelModel,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    lr: float,
    rope_base: float,
    *,
    clip_grad: float | None,
) -> StepResult:
    """Run this rank's micro-batches of a step and update the weights.

    Args:
        batches: packed rows; every replica has as many batches.
        lr: learning rate of the step.
        rope_base: RoPE base of the phase.
        clip_grad: largest global norm of the gradient; None does not clip.
    """
    context = model.context
    mine = [sum(int(b.loss_mask_BS.sum()) for b in batches), sum(b.num_real_tokens for b in batches)]
    counts = torch.tensor(mine, dtype=torch.int64, device=context.device)
    model.sum_over_replicas(counts)  # over whole rows, before anything is cut
    statistics = StepStatistics(model.module.config, model)
    inputs = (model_inputs(batch, rope_base, context.device) for batch in batches)
    for result in model.forward_backward(inputs, len(batches), counts[0]):
        statistics.add(result)
    grad_norm = model.clip_gradients(clip_grad)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    statistics.reduce()
    times = model.end_step(statistics.assigned_LE)
    return statistics.result(grad_norm, counts, len(batches) * context.dp_size, times)
