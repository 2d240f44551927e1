"""Lightning attention of rows that GPUs share, its core and the whole layer, beside a head all-to-all and one GPU.

One GPU has as many tokens as each GPU has of the row, so that equal times are equal rates per token. The head
all-to-all is not overlapped with the layer's output gate, as nobody's is.

Legend: S tokens of a rank, H heads, K head width, X = 3 K, D model width.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from mmkernels.lightning import silu_lightning_attention
from mmtrain.bench.context_peers import HeadExchange
from mmtrain.bench.context_report import Bench, Figures, check
from mmtrain.bench.context_rows import cut_row, first_tokens, short_documents
from mmtrain.bench.timeline import record
from mmtrain.bench.timing import Clock, slowest, timed_apart
from mmtrain.config import ModelConfig
from mmtrain.model.mixers.attention import AttentionCall, LocalAttention
from mmtrain.model.mixers.lightning import LightningAttention
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel.collectives import start_gather_into
from mmtrain.parallel.context.context_parallel import ContextAttention
from mmtrain.parallel.context.state_exchange import StateExchange

ALONE, PEER = "one GPU alone", "head all-to-all"
COPIES = ", copy engines"
"""What fetches the states; NCCL's all-gather where a way is not called so."""
WAYS = {
    f"{name}{how}": table
    for name, table in {"balanced, 8 chunks": ("balanced", 8), "contiguous, 1 chunk": ("contiguous", 1)}.items()
    for how in (COPIES, "")
}
CHECKED = 2**15
"""Tokens of a row up to which the core's results are compared with those of one GPU."""


class Row:
    """A row of one length and one choice of documents that all ways compute.

    Attributes:
        alone: milliseconds of one GPU with its share of the tokens, by what is measured.
    """

    def __init__(self, bench: Bench, mixer: LightningAttention, tokens: int, documents: str) -> None:
        self.bench, self.mixer, self.tokens = bench, mixer, tokens
        self.copies, self.gathers = StateExchange(bench.group), StateExchange(bench.group, "collectives")
        whole = tokens * bench.ranks
        self.lengths = short_documents(whole) if documents == "many" else (whole,)
        self.alone: dict[str, tuple[float, float]] = {}
        if documents == "many":
            bench.documents[f"lightning, {tokens} tokens a GPU, {bench.ranks} GPUs"] = list(self.lengths)

    def way(self, name: str) -> tuple[AttentionCall, Packing, Tensor | None]:
        """The attention call, its packing, and the places in the row of this rank's tokens (None: it is alone)."""
        bench = self.bench
        if name == ALONE:
            lengths = first_tokens(self.lengths, self.tokens)
            return LocalAttention(), Packing.from_lengths(list(lengths), bench.device), None
        if name == PEER:
            index_S = torch.arange(self.tokens, device=bench.device) + bench.rank * self.tokens
            return HeadExchange(bench.group), Packing.from_lengths(list(self.lengths), bench.device), index_S
        packing = cut_row(self.lengths, bench.ranks, bench.rank, *WAYS[name], bench.device)
        exchange = self.copies if name.endswith(COPIES) else self.gathers
        return ContextAttention(bench.group, "auto", exchange), packing, packing.index_S

    def core(self, name: str) -> Figures:
        """The attention between the projections."""
        call, packing, index_S = self.way(name)
        slopes_H = self.mixer.slopes_on(self.bench.device)
        shape = self.mixer.num_heads, 3 * self.mixer.head_dim
        wanted = None
        if index_S is not None and self.tokens * self.bench.ranks <= CHECKED:
            qkv_SHX, do_SHK, wanted = self._of_whole(index_S, slopes_H, shape)
        else:
            qkv_SHX, do_SHK = self._draw(self.tokens, shape, 1 + self.bench.rank)
        *times, found = timed_apart(
            lambda: call.begin_lightning(qkv_SHX, slopes_H, packing)(), [qkv_SHX], do_SHK, self.bench.seconds
        )
        return self._figures("core", name, times, found, wanted)

    def _of_whole(
        self, index_S: Tensor, slopes_H: Tensor, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """This rank's part of a whole row's inputs, and of its results, which are computed here."""
        qkv_THX, do_THK = self._draw(self.tokens * self.bench.ranks, shape, 0)
        whole = Packing.from_lengths(list(self.lengths), self.bench.device)
        o_THK = silu_lightning_attention(qkv_THX[None], slopes_H, cu_seqlens=whole.cu_seqlens)[0]
        (dqkv_THX,) = torch.autograd.grad(o_THK, qkv_THX, do_THK)
        qkv_SHX = qkv_THX.detach()[index_S].requires_grad_()
        return qkv_SHX, do_THK[index_S], [o_THK.detach()[index_S], dqkv_THX[index_S]]

    def _draw(self, tokens: int, shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
        device, dtype = self.bench.device, self.mixer.qkv_proj.weight.dtype
        generator = torch.Generator(device).manual_seed(seed)
        heads, columns = shape
        qkv_SHX, do_SHK = (
            torch.randn(tokens, heads, n, device=device, dtype=dtype, generator=generator)
            for n in (columns, columns // 3)
        )
        return qkv_SHX.requires_grad_(), do_SHK

    def layer(self, name: str) -> Figures:
        """The layer with its projections, whose gradients stay on each rank."""
        call, leaves, y_SD = self.layer_call(name)
        *times, found = timed_apart(call, leaves, torch.randn_like(y_SD), self.bench.seconds)
        self.mixer.attention = LocalAttention()
        return self._figures("layer", name, times, found, None) | self._gather(name)

    def layer_call(self, name: str) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
        """The layer's forward, what it is differentiated by, and its input."""
        self.mixer.attention, packing, _ = self.way(name)
        weights = list(self.mixer.parameters())
        width, device = self.mixer.qkv_proj.weight.shape[1], self.bench.device
        x_SD = torch.randn(self.tokens, width, device=device, dtype=weights[0].dtype).requires_grad_()
        rope = x_SD.new_empty(self.tokens, 0), x_SD.new_empty(self.tokens, 0)  # which it does not use
        return lambda: self.mixer(x_SD, packing, rope), [x_SD, *weights], x_SD

    def _figures(
        self, what: str, name: str, times: Sequence[float], found: list[Tensor], wanted: list[Tensor] | None
    ) -> Figures:
        figures = {"forward_ms": round(times[0], 3), "backward_ms": round(times[1], 3)}
        if name == ALONE:
            self.alone[what] = times[0], times[1]
        elif what in self.alone:
            alone = self.alone[what]
            figures["of_alone"] = ", ".join(f"{a / ms:.3f}" for a, ms in zip(alone, times, strict=True))
            figures["both"] = round(sum(alone) / sum(times), 3)
        return figures | check(found, wanted)

    def _gather(self, name: str) -> Figures:
        """Milliseconds that the all-gather of the states takes with nothing beside it."""
        if name not in WAYS or name.endswith(COPIES):
            return {}
        chunks, width = WAYS[name][1], self.mixer.head_dim
        mine = torch.zeros(chunks, self.mixer.num_heads, width, width, device=self.bench.device)
        states, clock, times = mine.new_empty(chunks * self.bench.ranks, *mine.shape[1:]), Clock(mine.device), []
        for _ in range(8):
            begin = clock.mark()
            start_gather_into(states, mine, self.bench.group).wait()
            times.append((begin, clock.mark()))
        clock.wait()
        return {"gather_ms": round(*slowest([statistics.median(clock.ms(*one) for one in times[3:])], mine.device), 3)}


def build_mixer(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LightningAttention:
    """The first layer of a model, with random weights, alike on all ranks."""
    torch.manual_seed(0)
    with torch.device("meta"):
        mixer = LightningAttention(config, 0)
    mixer = mixer.to_empty(device=device).to(dtype)
    for weight in mixer.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5) if weight.ndim > 1 else torch.nn.init.ones_(weight)
    return mixer


def measure_lightning(
    bench: Bench, config: ModelConfig, dtype: torch.dtype, lengths: Sequence[int], trace: int = 0
) -> None:
    """Measure core and layer each way at each number of tokens a GPU; draw the layer's timeline at `trace` of them."""
    mixer = build_mixer(config, bench.device, dtype)
    for tokens in lengths:
        for documents in ("many", "one"):
            row = Row(bench, mixer, tokens, documents)
            measures: dict[str, Callable[[str], Figures]] = {"core": row.core}
            if documents == "many":
                measures["layer"] = row.layer
            for what, measure in measures.items():
                for name in (ALONE, *WAYS, PEER):
                    label = {"tokens": tokens, "what": what, "way": name, "documents": documents}
                    bench.case("lightning", label, partial(measure, name))
            row.copies.close()
    if trace and bench.device.type == "cuda":
        _draw_timeline(Row(bench, mixer, trace, "many"))


def _draw_timeline(row: Row) -> None:
    """The main process's kernels in forward and backward of a layer, as a picture."""
    bench, name = row.bench, next(iter(WAYS))
    run, _, _ = row.layer_call(name)

    def both() -> None:
        y = run()
        y.backward(torch.ones_like(y))

    for _ in range(3):
        both()
    path = bench.out / f"lightning-{bench.ranks}-{row.tokens}.png" if bench.context.is_main else None
    record(both, path, f"lightning layer, {row.tokens} tokens a GPU, {bench.ranks} GPUs, {name}")
    row.mixer.zero_grad(set_to_none=True)
