"""Rates that kernels reach at a model's own shapes on one GPU, all GPUs at once and none talking to another.

They are measured before a model is built, as its steps may fill the GPU, and hold no memory afterwards.

Legend: T tokens or rows, D and E input and output width of a matrix, N experts, F expert width.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.grouped_mlp.eager import grouped_mm
from mmtrain.bench.context_cases import StepCase
from mmtrain.bench.context_expected import SOFTMAX_BACKWARD, Rates
from mmtrain.bench.context_report import Bench, Figures
from mmtrain.bench.context_rows import first_tokens, heaviest
from mmtrain.bench.timing import Clock, slowest, timed_apart
from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.mixers.attention import LocalAttention
from mmtrain.model.mixers.lightning import decay_slopes
from mmtrain.model.mixers.registry import LIGHTNING, SOFTMAX
from mmtrain.model.packed_seq import Packing
from mmtrain.train.device import compute_dtype

PRODUCT_TOKENS, LIGHTNING_TOKENS, SOFTMAX_TOKENS = 2**14, 2**17, 2**18
"""Most tokens that products, lightning attention and softmax attention are measured on."""
SOFTMAX_WORK = 2.5e14
"""Operations of softmax attention, forward and backward, that are measured at the most: half a second on an H200."""
COPIED = {"cuda": 2**30, "cpu": 2**20}
"""Bytes of the copy that the bandwidth is measured with."""


class RatesOfModel:
    """Measures the rates of one model.

    Args:
        bench: the processes.
        config: the model.
        parallel: says how many tokens and heads are worked on at once.
        tokens: of the longest row.
    """

    def __init__(self, bench: Bench, config: ModelConfig, parallel: ParallelConfig, tokens: int) -> None:
        self.bench, self.config, self.parallel = bench, config, parallel
        self.own_tokens = max(1, tokens // bench.ranks)
        self.dtype = compute_dtype("auto", bench.device)
        self.layers = Counter(config.layer_types)

    def products(self) -> float:
        """Operations a second of products with dense matrices and of their gradients, as layers have them."""
        tokens = min(self.own_tokens, self.parallel.ffn_chunk_tokens or PRODUCT_TOKENS, PRODUCT_TOKENS)
        operations, milliseconds, matrices = 0.0, 0.0, self._matrices()
        for (inputs, outputs), count in matrices.items():
            x_TD, dy_TE, weight_ED = (
                self._draw(*one) for one in ((tokens, inputs), (tokens, outputs), (outputs, inputs))
            )
            operations += count * 3 * 2 * tokens * inputs * outputs
            milliseconds += count * self._ms(
                lambda x=x_TD, dy=dy_TE, weight=weight_ED: (F.linear(x, weight), dy @ weight, dy.t() @ x),
                2 / len(matrices),
            )
        return operations / milliseconds * 1e3

    def _matrices(self) -> Counter[tuple[int, int]]:
        """Matrices of all layers by inputs and outputs."""
        config, found = self.config, Counter[tuple[int, int]]()
        hidden, inner, kv_size = config.hidden_size, config.inner_size, config.num_kv_heads * config.head_dim
        for shape in ((hidden, 3 * inner), (hidden, inner), (inner, hidden)):
            found[shape] += self.layers[LIGHTNING.letter]
        for shape in ((hidden, inner), (hidden, kv_size), (hidden, kv_size), (inner, hidden)):
            found[shape] += self.layers[SOFTMAX.letter]
        width = config.shared_ffn_hidden_size if config.num_experts else config.ffn_hidden_size
        for shape in ((hidden, 2 * width), (width, hidden)):
            found[shape] += config.num_layers * (width > 0)
        return +found

    def experts(self) -> float:
        """Operations a second of experts' products and their gradients, with as many rows for each expert."""
        config = self.config
        if not config.num_experts:
            return 0.0
        experts, hidden, width = config.num_experts // self.parallel.ep, config.hidden_size, config.ffn_hidden_size
        most = self.parallel.ffn_chunk_tokens or PRODUCT_TOKENS * config.top_k
        rows = min(self.own_tokens * config.top_k, most)
        ends_N = (torch.arange(1, experts + 1, device=self.bench.device) * rows // experts).int()
        operations = milliseconds = 0.0
        for inputs, outputs in ((hidden, 2 * width), (width, hidden)):
            x_TD, dy_TE = self._draw(rows, inputs), self._draw(rows, outputs)
            run = partial(_grouped_products, x_TD, dy_TE, self._draw(experts, outputs, inputs), ends_N)
            operations += 3 * 2 * rows * inputs * outputs
            milliseconds += self._ms(run)
        return operations / milliseconds * 1e3

    def softmax(self, lengths: Sequence[int]) -> tuple[float, float]:
        """Operations a second of softmax attention, forward and backward, of a row of documents like these."""
        config = self.config
        if not self.layers[SOFTMAX.letter]:
            return 0.0, 0.0
        lengths = heaviest(lengths, SOFTMAX_TOKENS, SOFTMAX_WORK / (1 + SOFTMAX_BACKWARD) / 4 / config.inner_size)
        packing = Packing.from_lengths(list(lengths), self.bench.device)
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        leaves = [self._draw(sum(lengths), count, config.head_dim).requires_grad_() for count in heads]
        do_THK = self._draw(*leaves[0].shape)
        *times, _ = timed_apart(
            lambda: LocalAttention().softmax(*leaves, packing), leaves, do_THK, self.bench.seconds, warmup=1
        )
        useful = SOFTMAX.attention_flops(config, lengths)
        return useful / times[0] * 1e3, SOFTMAX_BACKWARD * useful / times[1] * 1e3

    def lightning(self, lengths: Sequence[int]) -> tuple[float, float]:
        """Seconds a token and layer of lightning attention, forward and backward, in groups of heads if there are."""
        config, groups = self.config, self.parallel.lightning_head_groups
        if not self.layers[LIGHTNING.letter]:
            return 0.0, 0.0
        tokens = min(max(1, sum(lengths) // self.bench.ranks), LIGHTNING_TOKENS)
        packing = Packing.from_lengths(list(first_tokens(lengths, tokens)), self.bench.device)
        slopes = decay_slopes(config.num_heads, 0, config.num_layers)[::groups]
        slopes_H = torch.tensor(slopes, dtype=torch.float32, device=self.bench.device)
        qkv_THX = self._draw(tokens, len(slopes), 3 * config.head_dim).requires_grad_()
        do_THK = self._draw(tokens, len(slopes), config.head_dim)
        *times, _ = timed_apart(partial(_lightning, qkv_THX, slopes_H, packing), [qkv_THX], do_THK, self.bench.seconds)
        return tuple(ms * groups / tokens / 1e3 for ms in times)

    def copy(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.ones(COPIED[self.bench.device.type] // 4, device=self.bench.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._ms(lambda: target.copy_(source)) * 1e3

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.bench.device, dtype=self.dtype)

    def _ms(self, run: Callable[[], object], part: float = 1.0) -> float:
        """Median milliseconds of calls that take a part of the bench's seconds, on the slowest rank."""
        clock, repeats = Clock(self.bench.device), 2
        run()
        for _ in range(2):  # the first calls say how many fit
            marks = [clock.mark()]
            for _ in range(repeats):
                run()
                marks.append(clock.mark())
            clock.wait()
            (ms,) = slowest([statistics.median(clock.ms(*pair) for pair in pairwise(marks))], self.bench.device)
            repeats = min(max(2, round(part * self.bench.seconds * 1e3 / max(ms, 1e-3))), 1000)
        return ms


def _lightning(qkv_THX: Tensor, slopes_H: Tensor, packing: Packing) -> Tensor:
    return LocalAttention().begin_lightning(qkv_THX, slopes_H, packing)()


def _grouped_products(x_TD: Tensor, dy_TE: Tensor, weight_NED: Tensor, ends_N: Tensor) -> None:
    grouped_mm(x_TD, weight_NED.transpose(1, 2), ends_N)
    grouped_mm(dy_TE, weight_NED, ends_N)
    grouped_mm(dy_TE.t(), x_TD, ends_N)


def measure_rates(
    bench: Bench, config: ModelConfig, parallel: ParallelConfig, cases: Sequence[StepCase], first: int
) -> dict[tuple[int, bool], Rates]:
    """Measure what the steps of each case are to be compared with; a row of the part ``rates`` each.

    Args:
        first: number of the first row, which draws its documents.

    Returns:
        Rates by tokens of a row, and whether it is a single document; those that could not be measured are left out.
    """
    of_model = RatesOfModel(bench, config, parallel, max(case.tokens for case in cases))
    found: dict[tuple[int, bool], Rates] = {}
    alike: list[float] = []

    def measure(case: StepCase) -> Figures:
        lengths = case.documents(first)[0]
        if not alike:
            alike.extend((of_model.products(), of_model.experts(), of_model.copy()))
        products, experts, copy = alike
        rates = Rates(products, experts, of_model.softmax(lengths), of_model.lightning(lengths), copy)
        found[case.tokens, not case.rows] = rates
        return rates.figures()

    distinct: dict[tuple[int, bool], StepCase] = {}
    for case in cases:
        distinct.setdefault((case.tokens, not case.rows), case)
    for key, case in distinct.items():
        label = {"tokens": case.tokens, "documents": "" if case.rows else "one"}
        if bench.case("rates", label, partial(measure, case)) is None:  # on some rank: none has them
            found.pop(key, None)
            alike.clear()
    return found
