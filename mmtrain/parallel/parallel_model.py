"""The one door between training and parallelism: a model laid over processes, and all that training asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mmtrain.config import ParallelConfig
from mmtrain.model.init import initialise
from mmtrain.model.label_score import LabelScore
from mmtrain.model.model import HybridLM, ModelInputs
from mmtrain.model.preference import PairScore
from mmtrain.parallel.context.cut import RowCutter, SequenceSlice
from mmtrain.parallel.context.state_exchange import StateExchange
from mmtrain.parallel.expert.autotune import tune_token_groups
from mmtrain.parallel.expert.comm_streams import CommTimes
from mmtrain.parallel.expert.exchange import ExpertExchange
from mmtrain.parallel.fingerprint import gradient_fingerprints
from mmtrain.parallel.gradients import all_finite, clip_gradients
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.pipeline.micro_batch import MicroBatchResult, Schedule
from mmtrain.parallel.replicas import OddCopy, odd_copies
from mmtrain.parallel.routing import update_load_fractions
from mmtrain.parallel.vision.shared_work import SharedImageWork


class ParallelModel:
    """A model laid over processes; made by :func:`~mmtrain.parallel.parallelize.apply_parallel`.

    Every method is collective unless it says otherwise: all ranks call them in the same order.

    Attributes:
        module: this rank's part of the model, whose parameters are DTensors, for optimizers and checkpoints.
        context: the processes and their groups.
        cut: takes this rank's part of a micro-batch of whole rows; every method below takes whole ones.
        take_fingerprints: is given, on the main process, the fingerprints of the next step's gradients; None: nobody
            asks for them.
    """

    def __init__(
        self,
        module: HybridLM,
        context: ParallelContext,
        config: ParallelConfig,
        schedule: Schedule,
        exchange: ExpertExchange | None,
        states: StateExchange | None,
        compute_dtype: torch.dtype,
        host_parameters: bool = False,
    ) -> None:
        self.module, self.context = module, context
        self._config, self._schedule, self._dtype = config, schedule, compute_dtype
        self._exchange, self._states = exchange, states
        slice_of_tp = SequenceSlice(context.layout.tp, context.dense["tp"].get_local_rank())
        self.cut = RowCutter(context.layout.cp, context.cp_rank, config, slice_of_tp)
        self._device = torch.device("cpu") if host_parameters else context.device
        self.take_fingerprints: Callable[[dict[str, list[float]]], None] | None = None

    def initialise(self, seed: int) -> None:
        """Give the parameters memory and their initial weights. Not collective."""
        initialise(self.module.to_empty(device=self._device), seed)

    def forward_backward(
        self, batches: Iterable[ModelInputs], count: int, learned: Tensor
    ) -> Iterable[MicroBatchResult]:
        """Run this rank's micro-batches of a step, as the results are asked for; gradients are left reduced.

        The loss is the mean over the labelled tokens, or pairs, of the *global* batch, so it and its gradient do not
        depend on how rows fall to ranks; auxiliary losses are the mean over micro-batches.

        Args:
            batches: micro-batches of the same number of tokens, the same on all ranks that share them.
            count: their number.
            learned: labelled tokens, or preference pairs, of the global batch, a scalar on the device.
        """
        # FSDP takes the mean over replicas.
        token_scale = self.context.layout.replicas / learned.clamp(min=1).to(torch.float32).squeeze()
        if self._exchange is not None:
            self._exchange.start_timing()
        # Ranks that share a row have its auxiliary losses alike, and the mean over replicas is over them too.
        aux_divisor = count / self.context.layout.cp
        return self._schedule.train(map(self.cut, batches), count, token_scale, aux_divisor)

    def clip_gradients(self, max_norm: float | None, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Clip by the global norm and sum flags, as :func:`~mmtrain.parallel.gradients.clip_gradients` does."""
        self._fingerprint()
        norm, flags = clip_gradients(self.module.parameters(), max_norm, flags.to(self._device))
        return norm.to(self.context.device), flags.to(self.context.device)

    def _fingerprint(self) -> None:
        """Hand out the fingerprints of the gradients as they are, once, if they are asked for."""
        if self.take_fingerprints is not None:
            found = gradient_fingerprints(self.module, self._device)
            if self.context.is_main:
                self.take_fingerprints(found)
            self.take_fingerprints = None

    def end_step(self, assigned_LE: Tensor, skipped: Tensor) -> CommTimes:
        """Take the step's routing into account, and return the times of its communication around experts.

        Args:
            assigned_LE: assignments of the global batch, float64, for every layer of the whole model.
            skipped: bool scalar on the device, whether the step left the weights alone; it leaves fractions alone too.
        """
        update_load_fractions(self.module, assigned_LE, skipped)
        return CommTimes(0.0, 0.0) if self._exchange is None else self._exchange.read_times()

    def weights_are_finite(self) -> bool:
        """Whether no weight of any rank is infinite or not a number; waits for the device."""
        return all_finite(self.module.parameters())

    def odd_copies(self) -> list[OddCopy]:
        """Ranks whose copy of a parameter is not the others', as :func:`~mmtrain.parallel.replicas.odd_copies` does."""
        return odd_copies(self.module)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode, in which nothing is dropped, for the duration of a `with`. Not collective."""
        self.module.eval()
        try:
            yield
        finally:
            self.module.train()

    def evaluate(self, batch: ModelInputs) -> Tensor | None:
        """Summed loss of one micro-batch without gradients; None on ranks of a pipeline that do not learn it.

        Ranks that share its rows have the loss of their own tokens each.
        """
        with torch.no_grad():
            return self._schedule.forward(self.cut(batch))

    def score_labels(self, batch: ModelInputs) -> LabelScore | None:
        """Score of one micro-batch's labels without gradients; None on ranks of a pipeline that do not learn it.

        Figures summed with :meth:`sum_over_ranks` are those of all rows, each counted once.
        """
        with torch.no_grad():
            found = self._schedule.score(self.cut(batch))
        assert not isinstance(found, PairScore)
        return found

    def score_pairs(self, batch: ModelInputs) -> PairScore | None:
        """Log-probabilities of one micro-batch's preference pairs without gradients; None where its head is not.

        Ranks that share its rows, or its head, have the same.
        """
        with torch.no_grad():
            found = self._schedule.score(self.cut(batch))
        assert found is None or isinstance(found, PairScore)
        return found

    def sum_over_batches(self, x: Tensor) -> Tensor:
        """Sum in place over the ranks that have other rows, and return it: figures of whole rows."""
        dist.all_reduce(x, group=self.context.dense["dp"].get_group())
        return x

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """Sum in place over the ranks that have other rows, other tokens of a row, or other layers, and return it.

        Figures of whole rows are brought by the first of the ranks that share them alone (`context.cp_rank` 0).
        """
        dist.all_reduce(x, group=self.context.replicas.get_group())
        if self.context.layout.pp > 1:
            dist.all_reduce(x, group=self.context.dense["pp"].get_group())
        return x

    @property
    def is_tuned(self) -> bool:
        """Whether :meth:`tune` measures."""
        return self._exchange is not None and self._config.token_groups == "auto"

    def tune(self, tokens: int) -> list[str]:
        """Choose by measurement where options say `auto`; returns a line about each choice.

        Args:
            tokens: of a micro-batch on this rank.
        """
        if self._exchange is None:
            return []
        lines = []
        if self.is_tuned:
            lines.append(str(tune_token_groups(self._exchange, self.module.config, self.context, tokens, self._dtype)))
        if self._config.exchange == "auto":
            lines.append(f"exchange=auto took {self._exchange.exchange_reason}")
        return lines

    def take_tiles_seen(self) -> int:
        """Tiles of images that this rank has looked at in training since the last call. Not collective."""
        work = getattr(self.module, "image_work", None)
        if not isinstance(work, SharedImageWork):
            return 0
        seen, work.tiles_seen = work.tiles_seen, 0
        return seen

    def take_notes(self) -> list[str]:
        """Lines for the log about the steps since the last call. Not collective."""
        return self._schedule.take_notes() + ([] if self._states is None else self._states.take_notes())

    def peak_bytes(self) -> int:
        """The most that this rank's device has held for tensors and recorded graphs; 0 on a CPU. Not collective."""
        return self._schedule.peak_bytes() if self.context.device.type == "cuda" else 0

    def close(self) -> None:
        """Let go of what the layout holds besides parameters: groups, streams and memory shared between processes."""
        self._schedule.close()
        for exchange in (self._exchange, self._states):
            if exchange is not None:
                exchange.close()
