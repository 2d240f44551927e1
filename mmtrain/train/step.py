"""One optimizer step: accumulate micro-batches, reduce, clip, update, and say what happened."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdata.loader import PackedBatch
from mmtrain.config import ModelConfig
from mmtrain.model.flops import step_flops
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import LossOutput, StageOutput
from mmtrain.model.packing import Packing
from mmtrain.parallel.apply import set_gradient_sync
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.pipeline import pipeline_of
from mmtrain.parallel.stage import ModelInputs
from mmtrain.train.optimizer import clip_gradients, set_lr


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks.

    Attributes:
        loss: mean cross-entropy over labelled tokens, in nats.
        aux_loss: auxiliary loss, summed over layers, mean over micro-batches.
        grad_norm: global norm before clipping.
        flops: useful operations, forward and backward, of the assignments that were kept.
        router_load: [layers][experts], wanted assignments over the even share; empty without experts.
        drop_rate: share of assignments dropped, a layer.
        router_entropy: nats, a layer.
    """

    loss: float
    aux_loss: float
    grad_norm: float
    flops: float
    router_load: list[list[float]]
    drop_rate: list[float]
    router_entropy: list[float]


def model_inputs(batch: PackedBatch, device: torch.device) -> ModelInputs:
    """A micro-batch of packed rows, flattened, on the device."""
    longest, lengths = batch.max_seqlen, tuple(batch.cu_seqlens.diff().tolist())  # read before they leave the host
    batch = batch.to(device)
    labels_T = batch.labels_BS.masked_fill(~batch.loss_mask_BS, IGNORE).flatten()
    packing = Packing(batch.cu_seqlens, batch.position_ids_BS.flatten(), longest, lengths)
    return ModelInputs(batch.tokens_BS.flatten(), packing, labels_T)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[PackedBatch],
    lr: float,
    context: ParallelContext,
    *,
    clip_grad: float | None,
    sync_every_micro_batch: bool,
) -> StepResult:
    """Run this rank's micro-batches of a step and update the weights.

    The loss is the mean over the labelled tokens of the *global* batch, so it and its gradient do not depend on how
    rows fall to ranks; auxiliary losses are the mean over micro-batches.
    """
    labelled = torch.tensor([sum(int(b.loss_mask_BS.sum()) for b in batches)], dtype=torch.int64, device=context.device)
    dist.all_reduce(labelled, group=context.replicas.get_group())
    # FSDP takes the mean over replicas.
    token_scale = context.layout.replicas / labelled.clamp(min=1).to(torch.float32).squeeze()
    report = StepReport(model.config, context)
    if (pipeline := pipeline_of(model)) is not None:
        inputs = [model_inputs(batch, context.device) for batch in batches]
        for result in pipeline.train(inputs, token_scale, 1 / len(batches), sync_every_micro_batch):
            report.add(result.out, inputs[result.micro_batch].packing, result.layers)
    else:
        for i, batch in enumerate(batches):
            set_gradient_sync(model, sync_every_micro_batch or i == len(batches) - 1)
            inputs = model_inputs(batch, context.device)
            out = model(*inputs)
            (out.ce_sum * token_scale + out.aux_loss / len(batches)).backward()
            report.add(out, inputs.packing, list(range(model.config.num_layers)))
    grad_norm = clip_gradients(model.parameters(), clip_grad)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return report.reduce(grad_norm, labelled, len(batches) * context.dp_size)


class StepReport:
    """Sums the figures of a step's micro-batches on the device, and reads them once, at the end."""

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        self.config, self.context, self.flops = config, context, 0.0
        # float64: counts must survive the sum
        self.scalars = torch.zeros(3, dtype=torch.float64, device=context.device)
        shape = (config.num_layers, config.num_experts + 2) if config.num_experts else (0, 2)
        self.router = torch.zeros(shape, device=context.device)

    def add(self, out: LossOutput | StageOutput, packing: Packing, layers: list[int]) -> None:
        """Take in what these layers made of a micro-batch; those with the head bring its loss."""
        if isinstance(out, LossOutput):
            self.flops += step_flops(self.config, packing.lengths, kept_assignments=0).total
            self.scalars[0] += out.ce_sum.detach()
        self.scalars[1] += out.aux_loss.detach()
        if out.router:
            rows = [torch.cat([s.load_E, s.drop_rate[None], s.entropy[None]]).detach() for s in out.router]
            router = torch.stack(rows)
            self.scalars[2] += (1.0 - router[:, -2]).sum() * (sum(packing.lengths) * self.config.top_k)
            self.router[layers] += router

    def reduce(self, grad_norm: Tensor, labelled: Tensor, micro_batches: int) -> StepResult:
        """Sum over the ranks that had other rows or other layers, and return plain numbers, the same on each."""
        packed = torch.cat([self.scalars, self.scalars.new_tensor([self.flops]), self.router.flatten().double()])
        dist.all_reduce(packed, group=self.context.replicas.get_group())
        if self.context.layout.pp > 1:
            dist.all_reduce(packed, group=self.context.dense["pp"].get_group())
        values = torch.cat([packed, grad_norm.to(packed)[None], labelled.to(packed)]).tolist()
        ce_sum, aux_sum, kept, flops = values[:4]
        table = torch.tensor(values[4:-2]).view(self.router.shape) / micro_batches
        return StepResult(
            loss=ce_sum / max(values[-1], 1.0),
            aux_loss=aux_sum / micro_batches,
            grad_norm=values[-2],
            flops=flops + step_flops(self.config, [], kept_assignments=kept).total,
            router_load=table[:, :-2].tolist(),
            drop_rate=table[:, -2].tolist(),
            router_entropy=table[:, -1].tolist(),
        )
