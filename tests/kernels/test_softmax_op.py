"""Softmax attention of packed rows, and of a ring's blocks, against float64 autograd of the definition."""

from __future__ import annotations

from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError
from mmkernels.softmax import dispatch, eager
from mmkernels.softmax.api import softmax_attention, softmax_attention_with_lse, softmax_backward, softmax_forward
from mmkernels.softmax.backends import cpu, cudnn, flash
from mmkernels.softmax.naive import naive_softmax_attention, naive_softmax_block

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
ROWS = [[37], [1], [0, 1, 9, 0, 0, 130, 1, 2, 0], [1, 1, 1], [0, 5], [64, 65]]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def offsets(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype, device=DEVICE)


def inputs(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Leaves q, k, v, and the gradient of the output."""
    shapes = [(tokens, heads, width), (tokens, groups, width), (tokens, groups, width), (tokens, heads, width)]
    q, k, v, do = (draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes))
    return [x.requires_grad_() for x in (q, k, v)], do


def with_gradients(results: tuple[Tensor, Tensor], leaves: list[Tensor], do: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(results[0], leaves, do)
    return dict(zip(("o", "lse", "dq", "dk", "dv"), (*(x.detach() for x in results), *grads), strict=True))


def exact_results(leaves: list[Tensor], do: Tensor, lengths: list[int], scale: float) -> dict[str, Tensor]:
    exact = [x.detach().double().requires_grad_() for x in leaves]
    return with_gradients(naive_softmax_attention(*exact, offsets(lengths), scale), exact, do.double())


def assert_close(got: Tensor, exact: Tensor, bound: float, name: str = "") -> None:
    """By norm. Numbers here are of size 1, and some gradients are the small difference of such."""
    error = (got.double() - exact.double()).norm()
    assert torch.isfinite(got).all() and error <= bound * (exact.norm() + 0.1 * exact.numel() ** 0.5), (name, error)


def assert_documents_close(got: dict[str, Tensor], exact: dict[str, Tensor], lengths: list[int], bound: float) -> None:
    assert got.keys() == exact.keys()
    for name, value in exact.items():
        assert got[name].shape == value.shape, name
        for lo, hi in pairwise([0, *accumulate(lengths)]):
            span = (slice(None), slice(lo, hi)) if name == "lse" else slice(lo, hi)
            assert_close(got[name][span], value[span], bound, f"{name} of {lo}..{hi}")


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(6, 2, 16), (4, 4, 8), (3, 1, 5)])
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_packed_rows(lengths: list[int], heads: int, groups: int, width: int, dtype: torch.dtype) -> None:
    leaves, do = inputs(sum(lengths), heads, groups, width, dtype)
    cu = offsets(lengths)
    got = with_gradients(softmax_attention_with_lse(*leaves, cu, lengths), leaves, do)
    assert all(got[name].dtype == dtype for name in got.keys() - {"lse"})
    assert got["lse"].dtype == torch.promote_types(dtype, torch.float32) and got["o"].is_contiguous()
    assert_documents_close(got, exact_results(leaves, do, lengths, width**-0.5), lengths, BOUND[dtype])
    assert torch.equal(softmax_attention(*leaves, cu, lengths), got["o"])


def test_lengths_from_offsets_of_either_type_scale_and_backend() -> None:
    lengths = [3, 0, 20]
    leaves, do = inputs(23, 4, 2, 8, torch.float64)
    exact = exact_results(leaves, do, lengths, 0.7)
    for dtype in (torch.int32, torch.int64):
        for backend in ("auto", "torch"):
            results = softmax_attention_with_lse(*leaves, offsets(lengths, dtype), None, scale=0.7, backend=backend)
            assert_documents_close(with_gradients(results, leaves, do), exact, lengths, 1e-13)


def test_views_and_expanded_gradients() -> None:
    lengths = [9, 1, 13]
    fused = draw(23, 4 + 2 + 2, 8).requires_grad_()
    o = softmax_attention(*fused.split([4, 2, 2], dim=1), offsets(lengths), lengths)
    (grad,) = torch.autograd.grad(o.sum(), fused)
    parts = [x.contiguous() for x in fused.detach().split([4, 2, 2], dim=1)]
    exact = exact_results(parts, torch.ones_like(o), lengths, 8**-0.5)
    assert_close(o.detach(), exact["o"], 1e-13)
    assert_close(grad, torch.cat([exact[name] for name in ("dq", "dk", "dv")], dim=1), 1e-13)

    heads_outermost = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts]
    columns_apart = [x.mT.contiguous().mT for x in parts]
    for views in (heads_outermost, columns_apart):
        assert_close(softmax_attention(*views, offsets(lengths), lengths), exact["o"], 1e-13)


@pytest.mark.parametrize("lengths", [[0], [0, 0]])
def test_a_row_without_tokens(lengths: list[int]) -> None:
    leaves, do = inputs(0, 4, 2, 8, torch.float32)
    got = with_gradients(softmax_attention_with_lse(*leaves, offsets(lengths), lengths), leaves, do)
    assert [list(x.shape) for x in got.values()] == [[0, 4, 8], [4, 0], [0, 4, 8], [0, 2, 8], [0, 2, 8]]


def test_lse_carries_no_gradient_and_nothing_is_saved_twice() -> None:
    leaves, _ = inputs(23, 4, 2, 8, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        o, lse = softmax_attention_with_lse(*leaves, offsets([23]), [23])
    assert o.requires_grad and not lse.requires_grad
    assert [x.data_ptr() for x in saved] == [x.data_ptr() for x in (*leaves, o, lse)]


BLOCKS = [eager, cpu] if DEVICE == "cpu" else [eager]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("queries", "keys", "causal"), [(7, 7, True), (40, 40, True), (7, 40, False), (40, 1, False)])
def test_block_with_any_output_and_lse(
    monkeypatch: pytest.MonkeyPatch, queries: int, keys: int, causal: bool, dtype: torch.dtype, block: ModuleType
) -> None:
    monkeypatch.setattr(eager, "MAX_SCORES", 6 * keys * 9)  # nine queries at a time
    check_block(block, queries, keys, 6, 2, 8, causal, dtype)


def check_block(
    block: ModuleType, queries: int, keys: int, heads: int, groups: int, width: int, causal: bool, dtype: torch.dtype
) -> None:
    """The block itself, and its backward for an output and a log-sum-exp that belong to more keys than it sees."""
    q, do, far = (draw(queries, heads, width, seed=i, dtype=dtype) for i in range(3))
    k, v = (draw(keys, groups, width, seed=i, dtype=dtype) for i in (3, 4))
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    o, lse = naive_softmax_block(*exact, causal, 0.3)
    got_o, got_lse = block.forward(q, k, v, causal, 0.3)
    assert_close(got_o, o.detach(), BOUND[dtype], "o")
    assert_close(got_lse, lse.detach(), BOUND[dtype], "lse")

    # Elsewhere there are keys with a log-sum-exp 0.5 higher, whose values average to `far`.
    here = torch.sigmoid(torch.tensor(-0.5, dtype=torch.float64, device=DEVICE))
    joined = here * o + (1 - here) * far.double()
    grads = block.backward(
        do, q, k, v, joined.detach().to(dtype), (lse.detach() - here.log()).to(got_lse.dtype), causal, 0.3
    )
    elsewhere = lse.detach() + 0.5
    total = torch.logaddexp(lse, elsewhere)
    share = torch.exp(lse - total).T[..., None]
    wanted = torch.autograd.grad(share * o + (1 - share) * far.double(), exact, do.double())
    for name, mine, other in zip(("dq", "dk", "dv"), grads, wanted, strict=True):
        assert mine.shape == other.shape and mine.dtype == dtype
        assert_close(mine, other, BOUND[dtype], name)


def ring(q: Tensor, k: Tensor, v: Tensor, do: Tensor, first: int) -> dict[str, Tensor]:
    """One document on two ranks, of which the first has ``first`` tokens, step by step."""
    parts = slice(0, first), slice(first, len(q))
    steps = [(0, 0, True), (1, 0, False), (1, 1, True)]  # queries of, keys of, causal
    seen: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for mine, theirs, causal in steps:
        seen[mine].append(softmax_forward(q[parts[mine]], k[parts[theirs]], v[parts[theirs]], causal))
    (o_0, lse_0), ((o_a, lse_a), (o_b, lse_b)) = seen[0][0], seen[1]
    lse_1 = torch.logaddexp(lse_a, lse_b)
    weights = [torch.exp(lse - lse_1).T[..., None] for lse in (lse_a, lse_b)]
    outputs = [o_0, (weights[0] * o_a + weights[1] * o_b).to(q.dtype)]
    lses = [lse_0, lse_1]
    grads = [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    for mine, theirs, causal in steps:
        rows, keys = parts[mine], parts[theirs]
        found = softmax_backward(do[rows], q[rows], k[keys], v[keys], outputs[mine], lses[mine], causal)
        for grad, part, span in zip(grads, found, (rows, keys, keys), strict=True):
            grad[span] += part
    return {"o": torch.cat(outputs), "lse": torch.cat(lses, dim=1), "dq": grads[0], "dk": grads[1], "dv": grads[2]}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("first", [1, 12, 20, 22])
def test_two_ranks_of_a_ring_equal_the_whole_document(first: int, dtype: torch.dtype) -> None:
    leaves, do = inputs(23, 4, 2, 8, dtype)
    got = ring(*(x.detach() for x in leaves), do, first)
    assert_documents_close(got, exact_results(leaves, do, [23], 8**-0.5), [23], BOUND[dtype])


def test_blocks_without_keys_or_queries() -> None:
    q, k = draw(5, 4, 8), draw(0, 2, 8)
    o, lse = softmax_forward(q, k, k, causal=False)
    assert torch.count_nonzero(o) == 0 and (lse == -torch.inf).all()
    dq, dk, dv = softmax_backward(q, q, k, k, o, torch.zeros_like(lse), causal=False)
    assert torch.count_nonzero(dq) == 0 and dk.shape == dv.shape == (0, 2, 8)
    keys = draw(5, 2, 8)
    o, lse = softmax_forward(q[:0], keys, keys, causal=False)
    dq, dk, dv = softmax_backward(o, q[:0], keys, keys, o, lse, causal=False)
    assert o.shape == dq.shape == (0, 4, 8) and lse.shape == (4, 0)
    assert torch.count_nonzero(dk) == torch.count_nonzero(dv) == 0


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Torch in the place of both CUDA kernels, with the names of the calls."""
    calls: list[str] = []

    class Dense:
        @staticmethod
        def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
            calls.append(f"cudnn {len(arguments[0])}")
            return eager.forward(*arguments)

        backward = staticmethod(eager.backward)

    def each(cu: Tensor) -> list[slice]:
        assert cu.dtype == torch.int32 and cu[0] == 0
        return [slice(lo, hi) for lo, hi in pairwise(cu.tolist())]

    def forward(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float) -> tuple[Tensor, Tensor]:
        calls.append(f"flash {cu.diff().tolist()}")
        assert longest == cu.diff().max() and len(q) == cu[-1]
        parts = [eager.forward(q[s], k[s], v[s], True, scale) for s in each(cu)]
        return torch.cat([o for o, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)

    def backward(
        do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu: Tensor, longest: int, scale: float
    ) -> list[Tensor]:
        parts = [eager.backward(do[s], q[s], k[s], v[s], o[s], lse[:, s], True, scale) for s in each(cu)]
        return [torch.cat(list(grads)) for grads in zip(*parts, strict=True)]

    monkeypatch.setattr(dispatch, "flash_fits", lambda q: True)
    monkeypatch.setattr(dispatch, "cudnn_fits", lambda q: True)
    monkeypatch.setattr(dispatch, "block_for", lambda q, k: Dense)
    monkeypatch.setattr(flash, "forward", forward)
    monkeypatch.setattr(flash, "backward", backward)
    monkeypatch.setattr(dispatch, "LONG", 10)
    return calls


MIXED = [
    ([3, 0, 9], ["flash [3, 0, 9]"]),
    ([10], ["cudnn 10"]),
    ([12, 10, 0], ["cudnn 12", "cudnn 10"]),
    ([1, 2, 30, 4, 0, 5, 11, 0, 14, 6], ["flash [1, 2]", "cudnn 30", "flash [4, 0, 5]", "cudnn 11", "cudnn 14",
                                        "flash [6]"]),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "wanted"), MIXED, ids=str)
def test_long_documents_go_one_by_one_and_those_between_together(
    lengths: list[int], wanted: list[str], stand_ins: list[str]
) -> None:
    leaves, do = inputs(sum(lengths), 4, 2, 8, torch.float64)
    got = with_gradients(softmax_attention_with_lse(*leaves, offsets(lengths, torch.int64), lengths), leaves, do)
    assert stand_ins == wanted
    assert_documents_close(got, exact_results(leaves, do, lengths, 8**-0.5), lengths, 1e-13)


def test_a_backend_takes_every_document(stand_ins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [1, 30, 4]
    leaves, _ = inputs(35, 4, 2, 8, torch.float64)
    for backend, wanted in [("flash", ["flash [1, 30, 4]"]), ("cudnn", ["flash [1]", "cudnn 30", "cudnn 4"])]:
        softmax_attention(*leaves, offsets(lengths), lengths, backend=backend)
        assert stand_ins == wanted
        stand_ins.clear()
    monkeypatch.setattr(dispatch, "cudnn_fits", lambda q: False)
    softmax_attention(*leaves, offsets(lengths), lengths)
    assert stand_ins == ["flash [1, 30, 4]"]


GOOD = dict(q=torch.zeros(6, 4, 8), k=torch.zeros(6, 2, 8), v=torch.zeros(6, 2, 8), cu_seqlens=torch.tensor([0, 2, 6]),
            lengths=[2, 4])  # fmt: skip
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("q_THD", "a tensor", {"q": [1.0]}),
    ("q_THD", "3 dimensions", {"q": torch.zeros(6, 32)}),
    ("q_THD", "float32", {"q": torch.zeros(6, 4, 8).int()}),
    ("q_THD", "at least one head", {"q": torch.zeros(6, 0, 8)}),
    ("k_TGD", "dtype of q_THD", {"k": torch.zeros(6, 2, 8).double()}),
    ("k_TGD", "device of q_THD", {"k": torch.zeros(6, 2, 8, device="meta")}),
    ("k_TGD", "divides the 4 heads", {"k": torch.zeros(6, 3, 8)}),
    ("k_TGD", "divides the 4 heads", {"k": torch.zeros(6, 0, 8)}),
    ("k_TGD", "8, that of q", {"k": torch.zeros(6, 2, 7)}),
    ("k_TGD", "as many as q has, 6", {"k": torch.zeros(5, 2, 8), "v": torch.zeros(5, 2, 8)}),
    ("v_TGD", r"that of k_TGD, \[6, 2, 8\]", {"v": torch.zeros(6, 4, 8)}),
    ("cu_seqlens", "int32", {"cu_seqlens": torch.tensor([0.0, 2, 6])}),
    ("cu_seqlens", "at least one document", {"cu_seqlens": torch.tensor([0])}),
    ("cu_seqlens", "device of q_THD", {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")}),
    ("cu_seqlens", "0 to 6", {"cu_seqlens": torch.tensor([0, 2, 5])}),
    ("cu_seqlens", "0 to 6", {"cu_seqlens": torch.tensor([1, 2, 6])}),
    ("cu_seqlens", "never decreasing", {"cu_seqlens": torch.tensor([0, 7, 6]), "lengths": None}),
    ("lengths", "those of cu_seqlens", {"lengths": [3, 3]}),
    ("lengths", "those of cu_seqlens", {"lengths": [6]}),
    ("backend", "auto, hopper, cudnn, flash, torch", {"backend": "fast"}),
    ("q_THD", "what backend='hopper' takes", {"backend": "hopper"}),
    ("q_THD", "what backend='cudnn' takes", {"backend": "cudnn"}),
    ("q_THD", "what backend='flash' takes", {"backend": "flash"}),
]


@pytest.mark.parametrize(("name", "allowed", "change"), BAD)
def test_bad_arguments_are_refused_by_name(name: str, allowed: str, change: dict[str, Any]) -> None:
    given = GOOD | change
    arguments = [given.pop(key) for key in ("q", "k", "v", "cu_seqlens", "lengths")]
    with pytest.raises(KernelArgumentError, match=f"^{name}: got .*allowed: .*{allowed}") as error:
        softmax_attention(*arguments, **given)
    assert error.value.argument == name


def test_bad_blocks_are_refused_by_name() -> None:
    q, k, lse = torch.zeros(6, 4, 8), torch.zeros(9, 2, 8), torch.zeros(4, 6)
    good = dict(do_THD=q, q_THD=q, k_SGD=k, v_SGD=k, o_THD=q, lse_HT=lse, causal=False)
    softmax_backward(**good)
    with pytest.raises(KernelArgumentError, match="causal: got True with 6 queries, 9 keys"):
        softmax_forward(q, k, k, causal=True)
    for name, allowed, change in [
        ("k_SGD", "divides", {"k_SGD": torch.zeros(9, 3, 8)}),
        ("causal", "as many", {"causal": True}),
        ("do_THD", r"\[6, 4, 8\]", {"do_THD": torch.zeros(5, 4, 8)}),
        ("o_THD", "dtype of q_THD", {"o_THD": q.double()}),
        ("lse_HT", "float32", {"lse_HT": lse.double()}),
        ("lse_HT", r"\[4, 6\]", {"lse_HT": lse.T}),
    ]:
        with pytest.raises(KernelArgumentError, match=f"^{name}: got .*allowed: .*{allowed}"):
            softmax_backward(**(good | change))


LONG_AND_SHORT = [1, 300, 0, 64, 129, 2, 500, 128, 127, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "hopper", "cudnn", "flash", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 2, 64), (4, 4, 128), (16, 2, 128), (4, 1, 72), (6, 2, 128)])
def test_packed_rows_on_the_gpu(
    monkeypatch: pytest.MonkeyPatch, heads: int, groups: int, width: int, dtype: torch.dtype, backend: str
) -> None:
    monkeypatch.setattr(dispatch, "LONG", 128)
    monkeypatch.setattr(dispatch, "LONG_BACKWARD", 128)
    monkeypatch.setattr(dispatch, "HOPPER_LEAST", 0)
    if backend == "hopper" and not dispatch.hopper_fits(torch.empty(1, heads, width, dtype=dtype, device=DEVICE)):
        pytest.skip("our kernels for Hopper do not take it")
    for lengths in (LONG_AND_SHORT, [700], [1], [0, 90, 3]):
        leaves, do = inputs(sum(lengths), heads, groups, width, dtype)
        results = softmax_attention_with_lse(*leaves, offsets(lengths), lengths, backend=backend)
        exact = exact_results(leaves, do, lengths, width**-0.5)
        assert_documents_close(with_gradients(results, leaves, do), exact, lengths, BOUND[dtype])


@pytest.mark.gpu
def test_ours_on_hopper_give_the_same_bits_twice() -> None:
    lengths = [3000, 1, 700, 5000]
    leaves, do = inputs(sum(lengths), 8, 2, 128, torch.bfloat16)
    if not dispatch.hopper_fits(leaves[0]):
        pytest.skip("no Hopper GPU")
    once, again = (
        with_gradients(softmax_attention_with_lse(*leaves, offsets(lengths), lengths), leaves, do) for _ in range(2)
    )
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.gpu
def test_rows_of_more_than_2_to_the_31_elements() -> None:
    """The last document of such a row, against that document alone."""
    lengths = [2048] * 128 + [700]
    row = torch.randn(sum(lengths), 64 + 8 + 8, 128, device=DEVICE, dtype=torch.bfloat16)
    do = torch.randn(sum(lengths), 64, 128, device=DEVICE, dtype=torch.bfloat16)
    assert do.numel() > 2**31

    def run(first: int, documents: list[int]) -> dict[str, Tensor]:
        leaves = [x[first:].detach().requires_grad_() for x in row.split([64, 8, 8], dim=1)]
        results = softmax_attention_with_lse(*leaves, offsets(documents), documents)
        found = with_gradients(results, leaves, do[first:])
        return {name: x[:, -700:] if name == "lse" else x[-700:] for name, x in found.items()}

    whole, alone = run(0, lengths), run(2048 * 128, [700])
    for name, value in alone.items():
        assert (whole[name].float() - value.float()).norm() <= 4e-3 * value.float().norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("width", [20, 160, 256])
def test_widths_that_cudnn_does_not_take(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(dispatch, "LONG", 128)
    leaves, do = inputs(sum(LONG_AND_SHORT), 4, 2, width, torch.bfloat16)
    results = softmax_attention_with_lse(*leaves, offsets(LONG_AND_SHORT), LONG_AND_SHORT)
    exact = exact_results(leaves, do, LONG_AND_SHORT, width**-0.5)
    assert_documents_close(with_gradients(results, leaves, do), exact, LONG_AND_SHORT, BOUND[torch.bfloat16])


@pytest.mark.gpu
def test_views_of_a_fused_projection_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LONG", 128)
    lengths, do = [300, 50, 300], draw(650, 4, 64, seed=9, dtype=torch.bfloat16)
    fused = draw(650, 4 + 2 + 2, 64, dtype=torch.bfloat16)
    views = fused.split([4, 2, 2], dim=1)
    layouts = [
        [x.contiguous() for x in views],
        views,
        [x.transpose(0, 1).contiguous().transpose(0, 1) for x in views],
        [x.contiguous() for x in views],  # cuDNN's graphs are cached by layout
    ]
    exact = exact_results(list(views), do, lengths, 0.125)
    for layout in layouts:
        leaves = [x.detach().requires_grad_() for x in layout]
        results = softmax_attention_with_lse(*leaves, offsets(lengths), lengths)
        assert_documents_close(with_gradients(results, leaves, do), exact, lengths, BOUND[torch.bfloat16])
    heads_outermost = do.transpose(0, 1).contiguous().transpose(0, 1)
    results = softmax_attention_with_lse(*leaves, offsets(lengths), lengths)
    assert_documents_close(with_gradients(results, leaves, heads_outermost), exact, lengths, BOUND[torch.bfloat16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(300, 300, True), (2, 2, True), (1, 2, False), (77, 200, False), (1000, 65, False)]
)
def test_cudnn_block_with_any_output_and_lse(
    queries: int, keys: int, causal: bool, width: int, dtype: torch.dtype
) -> None:
    check_block(cudnn, queries, keys, 8, 2, width, causal, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("first", [1, 64, 200, 499])
def test_two_ranks_of_a_ring_on_the_gpu(first: int) -> None:
    leaves, do = inputs(500, 8, 2, 64, torch.bfloat16)
    got = ring(*(x.detach() for x in leaves), do, first)
    assert_documents_close(got, exact_results(leaves, do, [500], 0.125), [500], 1.5 * BOUND[torch.bfloat16])


@pytest.mark.gpu
def test_the_host_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LONG", 128)
    leaves, do = inputs(sum(LONG_AND_SHORT), 8, 2, 64, torch.bfloat16)
    cu = offsets(LONG_AND_SHORT)
    softmax_attention(*leaves, cu, LONG_AND_SHORT).backward(do)  # build cuDNN's graphs first
    torch.cuda.set_sync_debug_mode("error")
    try:
        softmax_attention(*leaves, cu, LONG_AND_SHORT).backward(do)
    finally:
        torch.cuda.set_sync_debug_mode("default")
