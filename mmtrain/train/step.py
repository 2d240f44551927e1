"""One optimizer step: accumulate micro-batches, reduce, clip, update, and say what happened.

Legend: L layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmdata.rows.loader import PackedBatch
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.flops import step_flops
from mmtrain.model.loss import IGNORE
from mmtrain.model.model import LossOutput, StageOutput
from mmtrain.model.packed_seq import Packing
from mmtrain.optim.optimizer import clip_gradients, set_lr
from mmtrain.parallel.expert.expert_parallel import expert_call
from mmtrain.parallel.fsdp import set_micro_batch
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.pipeline.schedule import pipeline_of
from mmtrain.parallel.pipeline.stage import ModelInputs
from mmtrain.parallel.routing import take_fractions


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
        drop_rate_alone: share that each micro-batch's own capacity would have dropped, without the global router.
        router_entropy: nats, a layer.
        exchange_s: seconds that this rank's communication around experts took.
        exchange_waited_s: seconds of them that computing waited.
    """

    loss: float
    aux_loss: float
    grad_norm: float
    flops: float
    router_load: list[list[float]]
    drop_rate: list[float]
    drop_rate_alone: list[float]
    router_entropy: list[float]
    exchange_s: float = field(default=0.0, compare=False)  # times do not make results differ
    exchange_waited_s: float = field(default=0.0, compare=False)


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
    parallel: ParallelConfig,
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
    if (exchange := expert_call(model)) is not None:
        exchange.start_timing()
    if (pipeline := pipeline_of(model)) is not None:
        inputs = [model_inputs(batch, context.device) for batch in batches]
        for result in pipeline.train(inputs, token_scale, 1 / len(batches)):
            report.add(result.out, inputs[result.micro_batch].packing, result.layers)
    else:
        for i, batch in enumerate(batches):
            set_micro_batch(model, parallel, last=i == len(batches) - 1)
            inputs = model_inputs(batch, context.device)
            out = model(*inputs)
            (out.ce_sum * token_scale + out.aux_loss / len(batches)).backward()
            report.add(out, inputs.packing, list(range(model.config.num_layers)))
    grad_norm = clip_gradients(model.parameters(), clip_grad)
    set_lr(optimizer, lr)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    report.reduce()
    take_fractions(model, report.wanted_LE)
    result = report.result(grad_norm, labelled, len(batches) * context.dp_size)
    if exchange is None:
        return result
    taken, waited = exchange.read_times()
    return replace(result, exchange_s=taken, exchange_waited_s=waited)


class StepReport:
    """Sums the figures of a step's micro-batches on the device, and reads them once, at the end."""

    def __init__(self, config: ModelConfig, context: ParallelContext) -> None:
        self.config, self.context, self.flops = config, context, 0.0
        # float64: counts must survive the sum
        self.scalars = torch.zeros(4, dtype=torch.float64, device=context.device)
        shape = (config.num_layers, config.num_experts + 3) if config.num_experts else (0, 3)
        self.router = torch.zeros(shape, dtype=torch.float64, device=context.device)

    @property
    def wanted_LE(self) -> Tensor:
        """Assignments wanted of each expert of every layer, before drops: whole numbers in float64."""
        return self.router[:, :-3]

    def add(self, out: LossOutput | StageOutput, packing: Packing, layers: list[int]) -> None:
        """Take in what these layers made of a micro-batch; those with the head bring its loss."""
        if isinstance(out, LossOutput):
            self.flops += step_flops(self.config, packing.lengths, kept_assignments=0).total
            self.scalars[0] += out.ce_sum.detach()
        self.scalars[1] += out.aux_loss.detach()
        if out.router:
            rates = [torch.stack([s.drop_rate, s.drop_rate_alone, s.entropy]).double() for s in out.router]
            router = torch.stack([torch.cat([s.wanted_E, r]) for s, r in zip(out.router, rates, strict=True)])
            self.scalars[2] += (1.0 - router[:, -3]).sum() * (sum(packing.lengths) * self.config.top_k)
            self.router[layers] += router

    def reduce(self) -> None:
        """Sum over the ranks that had other rows or other layers; afterwards all have the same."""
        self.scalars[3] = self.flops
        packed = torch.cat([self.scalars, self.router.flatten()])
        dist.all_reduce(packed, group=self.context.replicas.get_group())
        if self.context.layout.pp > 1:
            dist.all_reduce(packed, group=self.context.dense["pp"].get_group())
        self.scalars, self.router = packed[:4], packed[4:].view(self.router.shape)

    def result(self, grad_norm: Tensor, labelled: Tensor, micro_batches: int) -> StepResult:
        """What was summed, as plain numbers."""
        packed = torch.cat([self.scalars, grad_norm.to(self.scalars)[None], labelled.to(self.scalars),
                            self.router.flatten()])  # fmt: skip
        ce_sum, aux_sum, kept, flops, norm, tokens, *table = packed.tolist()
        router = torch.tensor(table, dtype=torch.float64).view(self.router.shape)
        wanted_LE, rate_L3 = router[:, :-3], router[:, -3:] / micro_batches
        load_LE = wanted_LE * self.config.num_experts / wanted_LE.sum(1, keepdim=True).clamp(min=1)
        return StepResult(
            loss=ce_sum / max(tokens, 1.0),
            aux_loss=aux_sum / micro_batches,
            grad_norm=norm,
            flops=flops + step_flops(self.config, [], kept_assignments=kept).total,
            router_load=load_LE.tolist(),
            drop_rate=rate_L3[:, 0].tolist(),
            drop_rate_alone=rate_L3[:, 1].tolist(),
            router_entropy=rate_L3[:, 2].tolist(),
        )
