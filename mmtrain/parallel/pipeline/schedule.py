"""Pipeline parallelism: the schedules of torch.distributed.pipelining over micro-batches with packing of their own.

Every rank of the pipeline has all micro-batches' tokens, labels and packing, so that only hidden states travel. What
torch's schedule cuts into micro-batches is their numbers; a stage looks up the rest.

Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble

from mmtrain.config import ParallelConfig
from mmtrain.config.checks import require
from mmtrain.model.frozen import learns
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import HybridLM, LossOutput, ModelInputs, StageOutput
from mmtrain.model.preference import PairScore
from mmtrain.parallel.fsdp import reshard_all
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.pipeline.micro_batch import MicroBatchResult
from mmtrain.parallel.pipeline.stage import Stage, TorchStage

_MULTI = {"interleaved": ScheduleInterleaved1F1B, "zero_bubble": ScheduleInterleavedZeroBubble}


def check_schedule(config: ParallelConfig, option: str, value: object, micro_batches: int) -> None:
    """Refuse a number of micro-batches a step that the schedule cannot run.

    Raises:
        ConfigError: naming `option` with its `value`, and numbers that work.
    """
    if config.pp == 1:
        return
    require(micro_batches >= config.pp, option, value,
            f"{micro_batches} micro-batches a rank do not fill a pipeline of parallel.pp={config.pp} stages",
            f"give {config.pp} or more rows a data-parallel rank, or lower parallel.pp")  # fmt: skip
    rounds = micro_batches // config.pp
    require(config.pp_schedule == "1f1b" or micro_batches % rounds == 0, option, value,
            f"{micro_batches} micro-batches a rank cannot be run in {rounds} equal rounds, as "
            f"parallel.pp_schedule={config.pp_schedule} does",
            f"give {rounds * config.pp} micro-batches, or parallel.pp_schedule=1f1b")  # fmt: skip


class Pipeline:
    """This rank's stages, and the schedules that run them."""

    def __init__(
        self,
        model: HybridLM,
        stages: dict[int, HybridLM],
        context: ParallelContext,
        config: ParallelConfig,
        compute_dtype: torch.dtype,
    ) -> None:
        """`model` is all of this rank's part of the model; `stages` share its modules, by their number."""
        self.model, self.context, self.config, self.dtype = model, context, config, compute_dtype
        self.group, self.count = context.dense["pp"].get_group(), context.layout.pp * config.pp_chunks
        self.stages = {number: Stage(stage, config) for number, stage in stages.items()}
        self.schedules: dict[tuple[int, int], Schedule1F1B | ScheduleInterleaved1F1B] = {}

    def train(
        self, batches: Iterable[ModelInputs], count: int, token_scale: Tensor, aux_divisor: float
    ) -> list[MicroBatchResult]:
        """Run forward and backward of all micro-batches; returns the results of this rank's stages for each.

        Args:
            batches: the same on all ranks of the pipeline, all of T tokens.
            count: their number.
            token_scale: the loss is `ce_sum` times this, a scalar, plus the auxiliary losses of all stages.
            aux_divisor: of the auxiliary losses, summed over micro-batches.
        """
        batches, results = list(batches), []
        for stage in self.stages.values():
            stage.begin(batches, token_scale, 1 / aux_divisor, results)
        schedule = self._schedule(count, batches[0].tokens_T.shape[0])
        schedule.step(micro_batch=torch.arange(count), target=torch.arange(count), return_outputs=False)
        for stage in self.stages.values():
            if not learns(stage.model):
                reshard_all(stage.model)
        return results

    def forward(self, batch: ModelInputs) -> Tensor | None:
        """Summed loss of one micro-batch, where the last stage is; None elsewhere. Collective over the pipeline."""
        out = self._forward(batch, score=False)
        return out.ce_sum if isinstance(out, LossOutput) else None

    def score(self, batch: ModelInputs) -> LabelScore | PairScore | None:
        """Score of one micro-batch's labels, or of its pairs, where the last stage is; None elsewhere. Collective."""
        out = self._forward(batch, score=True)
        return out if isinstance(out, LabelScore | PairScore) else None

    def close(self) -> None:
        """There is nothing to free."""

    def peak_bytes(self) -> int:
        """The most that this rank's CUDA device has held for tensors."""
        return torch.cuda.max_memory_allocated()

    def take_notes(self) -> list[str]:
        """There is nothing to tell."""
        return []

    def _forward(self, batch: ModelInputs, *, score: bool) -> LossOutput | StageOutput | LabelScore | PairScore | None:
        """Output of this rank's last stage for one micro-batch."""
        ranks, rank = self.group.size(), self.group.rank()
        peer = [dist.get_global_rank(self.group, (rank + step) % ranks) for step in (-1, 1)]
        out: LossOutput | StageOutput | LabelScore | PairScore | None = None
        for number, stage in self.stages.items():
            inputs = batch.tokens_T
            if number > 0:
                inputs = self._hidden(batch.tokens_T.shape[0], self.context.device)
                dist.recv(inputs, src=peer[0], group=self.group)
            out = stage.model(*batch._replace(tokens_T=inputs), score=score)
            if number < self.count - 1:
                dist.send(out.h_TD.contiguous(), dst=peer[1], group=self.group)
        return out

    def _schedule(self, micro_batches: int, tokens: int) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """A schedule for so many micro-batches of so many tokens; it has the buffers for them."""
        key = (micro_batches, tokens)
        if key not in self.schedules:
            self.schedules.clear()  # batches and sequences grow: sizes of the past do not come back
            stages = [self._torch_stage(number, stage, tokens) for number, stage in self.stages.items()]
            options = {"n_microbatches": micro_batches, "loss_fn": _as_it_is, "scale_grads": False}
            if self.config.pp_schedule == "1f1b":
                self.schedules[key] = Schedule1F1B(stages[0], **options)
            else:
                self.schedules[key] = _MULTI[self.config.pp_schedule](stages, **options)
        return self.schedules[key]

    def _torch_stage(self, number: int, stage: Stage, tokens: int) -> TorchStage:
        hidden = self._hidden(tokens, "meta").requires_grad_()
        return TorchStage(
            stage,
            number,
            self.count,
            self.context.device,
            input_args=() if number == 0 else hidden,
            output_args=torch.empty((), device="meta") if number == self.count - 1 else hidden,
            group=self.group,
        )

    def _hidden(self, tokens: int, device: torch.device | str) -> Tensor:
        rows, width = tokens // self.context.layout.tp, self.model.config.hidden_size
        return torch.empty(rows, width, dtype=self.dtype, device=device)


def _as_it_is(loss: Tensor, _: Tensor) -> Tensor:
    """The last stage returns the loss itself."""
    return loss
