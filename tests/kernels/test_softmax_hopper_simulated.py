"""Packed softmax attention for Hopper, without one: its programs run as Python (`gluon_simulator.py`)."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmkernels.softmax import Suffixes, dispatch, softmax_attention, softmax_suffix_backward, softmax_suffix_forward
from mmkernels.softmax.backends import cpu, cudnn
from mmkernels.softmax.naive import naive_softmax_attention, naive_softmax_block
from tests.kernels.gluon_simulator import Simulated

launch = pytest.importorskip("mmkernels.softmax.hopper.launch")
tiles = pytest.importorskip("mmkernels.softmax.hopper.tiles")
CPU = torch.device("cpu")
KERNELS = ("softmax_hopper_kernel", "softmax_hopper_dq_kernel", "softmax_hopper_dkv_kernel")
BOUND = 1e-2  # bfloat16 probabilities and their gradients, by norm


@pytest.fixture(autouse=True)
def simulated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Simulated]:
    """Launches on this CPU go to the simulator, of a machine with three multiprocessors."""
    kernels = {name: Simulated(getattr(launch, name)) for name in KERNELS}
    for name, kernel in kernels.items():
        monkeypatch.setattr(launch, name, kernel)
    monkeypatch.setattr(launch, "_processors", lambda device: 3)
    return kernels


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(inputs: list[Tensor], documents: Any) -> list[Tensor]:
    """Output, log-sum-exp and gradients in float64, document by document."""
    *qkv, do = (x.double() for x in inputs)
    leaves = [x.detach().requires_grad_() for x in qkv]
    found, scale = [], leaves[0].shape[2] ** -0.5
    starts = zip(accumulate(documents.queries, initial=0), accumulate(documents.keys, initial=0), strict=True)
    for (query, key), queries, keys in zip(starts, documents.queries, documents.keys, strict=False):
        q, k, v = leaves[0][query : query + queries], *(x[key : key + keys] for x in leaves[1:])
        if documents.causal:  # the queries are the last tokens: those before them get queries of zero
            q = torch.cat([q.new_zeros(keys - queries, *q.shape[1:]), q])
        o, lse = naive_softmax_block(q, k, v, documents.causal, scale)
        found.append((o[len(o) - queries :], lse[:, len(o) - queries :]))
    o, lse = torch.cat([o for o, _ in found]), torch.cat([lse for _, lse in found], dim=1)
    return [o.detach(), lse.detach(), *torch.autograd.grad(o, leaves, do)]


def check(
    queries: tuple[int, ...], keys: tuple[int, ...] | None = None, causal: bool = True, heads: tuple[int, int] = (4, 2),
    width: int = 64,
) -> None:  # fmt: skip
    documents = tiles.Documents(queries, keys or queries, causal, CPU)
    tokens, rows = sum(documents.queries), sum(documents.keys)
    wide = draw(tokens, heads[0] + 1, width, seed=0)  # q as a projection of more than it gives it
    inputs = [
        wide[:, : heads[0]],
        *(draw(rows, heads[1], width, seed=s) for s in (1, 2)),
        draw(tokens, heads[0], width, seed=3),
    ]
    q, k, v, do = inputs
    scale = width**-0.5
    o, lse = launch.forward(q, k, v, documents, scale)
    got = [o, lse, *launch.backward(do, q, k, v, o, lse, documents, scale)]
    for name, x, wanted in zip(("o", "lse", "dq", "dk", "dv"), got, exact(inputs, documents), strict=True):
        error = (x.double() - wanted).norm()
        assert torch.isfinite(x).all() and error <= BOUND * (wanted.norm() + 0.1 * wanted.numel() ** 0.5), (name, error)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 128, 129, 200])
def test_one_document(tokens: int, simulated: dict[str, Simulated]) -> None:
    check((tokens,))
    assert [kernel.launches for kernel in simulated.values()] == [1, 1, 1]


def test_documents_of_many_lengths() -> None:
    check((5, 0, 64, 1, 130, 63, 2, 0, 1))


@pytest.mark.parametrize("heads", [(1, 1), (3, 1), (2, 2), (4, 1), (8, 2)])
def test_heads(heads: tuple[int, int]) -> None:
    check((70, 130), heads=heads)


def test_more_blocks_than_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies wait for room that the products before have left."""
    monkeypatch.setattr(launch, "STAGES", {64: 2})
    check((700, 300))


def test_lists_of_tiles() -> None:
    """Most work first; a document may be left out, and the others stay where they are."""
    given = (100, 7), (300, 7), True
    assert tiles.query_tiles(*given, 64).tolist() == [
        [0, 100, 0, 200, 300], [64, 100, 0, 200, 300], [100, 107, 300, -100, 7]
    ]  # fmt: skip
    assert tiles.key_tiles(*given).tolist() == [
        *([first, 300, 0, 0, 100, 200] for first in (0, 128, 256)), [300, 307, 300, 100, 107, -100]
    ]  # fmt: skip
    assert tiles.query_tiles(*given, 64, {0}).tolist() == [[100, 107, 300, -100, 7]]
    assert tiles.key_tiles(*given, {0}).tolist() == [[300, 307, 300, 100, 107, -100]]


def test_heads_of_128() -> None:
    check((150, 3), width=128)


def test_last_tokens_of_documents() -> None:
    check((1, 64, 30, 130), (200, 100, 30, 131))


def test_all_keys_are_seen() -> None:
    check((70, 1, 130), (5, 140, 129), causal=False)
    check((3,), (300,), causal=False)


def test_units_share_the_heads_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [launch.splits_of(units, 6, 4) for units in (1, 3, 7, 8, 1000)] == [6, 6, 3, 1, 1]
    for enough in (0, 100):
        monkeypatch.setattr(launch, "ENOUGH_UNITS", enough)
        check((260, 7), heads=(8, 1))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self.bytes = max([self.bytes, *(x.nbytes for x in tree_leaves(made) if isinstance(x, Tensor))])
        return made


@pytest.mark.parametrize("left_out", [{0}, {0, 1}])
def test_a_few_short_documents_beside_a_long_one_take_no_memory_for_it(left_out: set[int]) -> None:
    """Its gradients are computed elsewhere: float32 sums of the whole row, one a split, would be for nothing."""
    lengths = (1920, 64)
    q, k, v, do = (draw(sum(lengths), heads, 64, seed=s) for s, heads in enumerate((8, 1, 1, 8)))
    o, lse = launch.forward(q, k, v, tiles.Documents(lengths, lengths, True, CPU), 0.125)
    others = tiles.Documents(lengths, lengths, True, CPU, frozenset(left_out))
    with LargestTensor() as made:
        grads = launch.backward(do, q, k, v, o, lse, others, 0.125)
    assert made.bytes == q.nbytes  # that of its gradient
    if 1 not in left_out:
        short = [x[1920:] for x in (q, k, v, do)]
        wanted = exact(short, tiles.Documents((64,), (64,), True, CPU))[2:]
        for found, exactly in zip(grads, wanted, strict=True):
            assert (found[1920:].double() - exactly).norm() < BOUND * exactly.norm()


def test_tensors_that_tiles_cannot_be_copied_from() -> None:
    documents = tiles.Documents((40,), (40,), True, CPU)
    q, k, v = (draw(40, 2, 66, seed=s)[:, :, 1:65] for s in range(3))
    o, _ = launch.forward(q, k, v, documents, 0.125)
    assert torch.equal(o, launch.forward(*(x.contiguous() for x in (q, k, v)), documents, 0.125)[0])
    one = draw(1, 2, 64, seed=4).as_strided((1, 2, 64), (1, 64, 1))  # one token, whose stride means nothing
    lone = tiles.Documents((1,), (1,), True, CPU)
    o, lse = launch.forward(one, one, one, lone, 0.125)
    assert torch.equal(o, one) and launch.backward(one, one, one, one, o, lse, lone, 0.125)[2].equal(one)


def test_other_documents_are_left_alone() -> None:
    """Neither what a neighbour says nor how large it is changes a document; its tiles are its own."""
    q, k, v, do = (draw(300, heads, 64, seed=s) for s, heads in enumerate((2, 1, 1, 2)))
    documents = tiles.Documents((100, 137, 63), (100, 137, 63), True, CPU)

    def run() -> list[Tensor]:
        o, lse = launch.forward(q, k, v, documents, 0.125)
        return [o, lse.t(), *launch.backward(do, q, k, v, o, lse, documents, 0.125)]

    before = run()
    for x in (q, k, v, do):
        x[100:237] = 3.0 * x[100:237].flip(0)
    for old, new in zip(before, run(), strict=True):
        assert torch.equal(old[:100], new[:100]) and torch.equal(old[237:], new[237:])
        assert not torch.equal(old[100:237], new[100:237])


def test_a_row_without_tokens() -> None:
    documents = tiles.Documents((), (), True, CPU)
    q, k = torch.empty(0, 2, 64, dtype=torch.bfloat16), torch.empty(0, 1, 64, dtype=torch.bfloat16)
    o, lse = launch.forward(q, k, k, documents, 1.0)
    assert [x.shape[0] for x in launch.backward(q, q, k, k, o, lse, documents, 1.0)] == [0, 0, 0]


def test_long_documents_go_through_cudnn_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the row is one call; here torch's kernel for CPUs stands for cuDNN."""
    monkeypatch.setattr(dispatch, "hopper_fits", lambda q: True)
    monkeypatch.setattr(dispatch, "cudnn_fits", lambda q: True)
    monkeypatch.setattr(dispatch, "HOPPER_LEAST", 0)
    monkeypatch.setattr(dispatch, "LONG_BACKWARD", 130)
    alone: list[int] = []

    def backward(do: Tensor, q: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        alone.append(len(q))
        return cpu.backward(do, q, *rest)

    monkeypatch.setattr(cudnn, "backward", backward)
    for lengths, wanted in (((140, 20, 0, 150, 7), [192, 192]), ((200,), [256]), ((100, 20), [])):
        alone.clear()
        q, k, v, do = (draw(sum(lengths), n, 64, seed=s).requires_grad_() for s, n in enumerate((4, 2, 2, 4)))
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        o = softmax_attention(q, k, v, cu_seqlens, lengths)
        got = torch.autograd.grad(o, (q, k, v), do.detach())
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = torch.autograd.grad(naive_softmax_attention(*exact, cu_seqlens, 0.125)[0], exact, do.detach().double())
        assert alone == wanted  # lengths rounded up to few
        for x, y in zip(got, want, strict=True):
            assert (x - y).norm() <= BOUND * y.norm()


def test_few_tokens_are_one_call_of_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hopper_fits", "cudnn_fits", "flash_fits"):
        monkeypatch.setattr(dispatch, name, lambda q: True)
    cu_seqlens = torch.tensor([0, 3000, 8192], dtype=torch.int32)
    for heads, ours in ((8, False), (16, True)):
        q = torch.empty(1, 1, 64, dtype=torch.bfloat16).expand(8192, heads, 64)
        (piece,) = dispatch.pieces_of("auto", q, cu_seqlens, [3000, 5192])
        assert piece.block is None and (piece.documents is not None) == ours
        (piece,) = dispatch.pieces_of("hopper", q, cu_seqlens, [3000, 5192])
        assert piece.documents is not None


def test_suffixes(monkeypatch: pytest.MonkeyPatch, simulated: dict[str, Simulated]) -> None:
    monkeypatch.setattr("mmkernels.softmax.suffixes.hopper_pays", lambda q: True)
    cu_queries, cu_keys = (torch.tensor(x, dtype=torch.int32) for x in ([0, 20, 21], [0, 90, 95]))
    documents = Suffixes((20, 1), (90, 5), cu_queries, cu_keys)
    q, k, v, do = (draw(n, heads, 64, seed=s) for s, (n, heads) in enumerate(((21, 4), (95, 2), (95, 2), (21, 4))))
    o, lse = softmax_suffix_forward(q, k, v, documents)
    got = [o, lse, *softmax_suffix_backward(do, q, k, v, o, lse, documents)]
    want = exact([q, k, v, do], tiles.Documents((20, 1), (90, 5), True, CPU))
    for x, y in zip(got, want, strict=True):
        assert (x - y).norm() <= BOUND * y.norm()
    assert [kernel.launches for kernel in simulated.values()] == [1, 1, 1]
