"""The decode step over keys in pages against float64 attention of each document alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmkernels import KernelArgumentError
from mmkernels.softmax import paged, paged_launch, softmax_paged_step
from tests.kernels.poison import poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["torch", "triton"]
# Triton's interpreter cuts bfloat16 off where the compiler rounds.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, paged, paged_launch)


class Case:
    """Documents of some lengths in pages that lie in any order, and the step of each one's last token."""

    def __init__(
        self, lengths: list[int], heads: int, kv_heads: int, width: int, page: int, dtype: torch.dtype, seed: int = 0
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

        counts = [-(-n // page) for n in lengths]
        pages = sum(counts) + 3
        order = torch.randperm(pages, generator=generator)
        self.lengths = lengths
        self.q, self.k, self.v = (draw(len(lengths), h, width) for h in (heads, kv_heads, kv_heads))
        self.k_pages, self.v_pages = (torch.full((pages, page, kv_heads, width), torch.nan, device=DEVICE, dtype=dtype)
                                      for _ in range(2))  # fmt: skip
        table = torch.full((len(lengths), max(counts, default=0)), pages + 7)  # what lies past a document is no page
        self.keys, self.values = [], []
        for n, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            mine, order = order[:count].to(DEVICE), order[count:]
            table[n, :count] = mine.cpu()
            k, v = draw(length, kv_heads, width), draw(length, kv_heads, width)
            t = torch.arange(max(0, length - 1), device=DEVICE)
            self.k_pages[mine[t // page], t % page], self.v_pages[mine[t // page], t % page] = k[:-1], v[:-1]
            if length:
                k[-1], v[-1] = self.k[n], self.v[n]
            self.keys.append(k)
            self.values.append(v)
        self.table, self.counts = table.to(DEVICE), torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
        self.before = self.k_pages.clone(), self.v_pages.clone()

    def step(self, backend: str) -> tuple[Tensor, Tensor]:
        """The step; pages are written to."""
        return softmax_paged_step(self.q, self.k, self.v, self.k_pages, self.v_pages, self.table, self.counts,
                                  backend=backend)  # fmt: skip

    def assert_right(self, o: Tensor, lse: Tensor) -> None:
        """Outputs by norm of each head; the new token's page entry written, and nothing beside it."""
        group = self.q.shape[1] // self.k.shape[1]
        bound = BOUND[self.q.dtype]
        for n, length in enumerate(self.lengths):
            if not length:
                assert (o[n] == 0).all() and (lse[n] == -torch.inf).all()
                continue
            k, v = (x.double().repeat_interleave(group, dim=1) for x in (self.keys[n], self.values[n]))
            score = torch.einsum("hd,shd->hs", self.q[n].double(), k) * self.q.shape[2] ** -0.5
            want = torch.einsum("hs,shd->hd", score.softmax(-1), v)
            assert ((o[n].double() - want).norm(dim=-1) <= bound * v.norm(dim=-1).mean(0)).all()
            torch.testing.assert_close(lse[n].double(), score.logsumexp(-1), rtol=2e-6, atol=bound)
        page = self.k_pages.shape[1]
        for pages, before, new in ((self.k_pages, self.before[0], self.k), (self.v_pages, self.before[1], self.v)):
            want = before.clone()
            for n, length in enumerate(self.lengths):
                if length:
                    want[self.table[n, (length - 1) // page], (length - 1) % page] = new[n]
            torch.testing.assert_close(pages, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "width", "page"),
    [
        ([1, 2, 64, 65, 0, 130], 4, 2, 16, 16),  # new documents, page edges, a place that nobody has
        ([700, 3], 8, 1, 32, 64),  # several runs beside one
        ([5, 17], 2, 2, 24, 3),  # pages and widths that are no power of two
        ([300], 20, 1, 16, 4),  # more query heads than one product's least rows
    ],
)
def test_step(
    lengths: list[int], heads: int, kv_heads: int, width: int, page: int, dtype: torch.dtype, backend: str
) -> None:
    case = Case(lengths, heads, kv_heads, width, page, dtype)
    o, lse = case.step(backend)
    assert o.dtype == dtype and lse.dtype == torch.float32
    case.assert_right(o, lse)


@pytest.mark.parametrize("splits", [1, 2, 8])
def test_any_number_of_runs(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_launch, "splits_of", lambda *sizes: splits)
    monkeypatch.setattr(paged_launch, "LEAST_BLOCKS", 1)
    case = Case([1, 63, 64, 65, 129, 400], 4, 2, 16, 8, torch.float32)
    case.assert_right(*case.step("triton"))


def test_runs_are_enough_for_the_device_and_bounded() -> None:
    assert paged_launch.splits_of(64, 8, 8192) == 1
    assert paged_launch.splits_of(1, 8, 8192) == 32  # of 256 keys
    assert paged_launch.splits_of(1, 8, 1 << 20) == 128
    assert paged_launch.splits_of(64, 8, 1 << 20) == 128
    assert paged_launch.splits_of(1, 1, 100) == 1


def test_scale_and_float64() -> None:
    case = Case([9, 30], 2, 1, 8, 4, torch.float32)
    for name in ("q", "k", "v", "k_pages", "v_pages"):
        setattr(case, name, getattr(case, name).double())
    given = case.q, case.k, case.v, case.k_pages, case.v_pages, case.table, case.counts
    o, lse = softmax_paged_step(*given, scale=2.0)
    assert o.dtype == lse.dtype == torch.float64
    score = torch.einsum("hd,sd->hs", case.q[1], case.keys[1][:, 0].double()) * 2.0
    torch.testing.assert_close(lse[1], score.logsumexp(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str) -> None:
    o, lse = Case([], 2, 1, 8, 4, torch.float32).step(backend)
    assert o.shape == (0, 2, 8) and lse.shape == (0, 2)


def test_bad_arguments() -> None:
    case = Case([9, 30], 2, 1, 8, 4, torch.float32)
    given = [case.q, case.k, case.v, case.k_pages, case.v_pages, case.table, case.counts]
    names = ["q_NHD", "k_NGD", "v_NGD", "k_PLGD", "v_PLGD", "table_NM", "keys_N"]
    bad = [case.q[0], case.k[:, 0], case.v.double(), case.k_pages[..., :4], case.v_pages.flip(0)[:-1], case.table.int(),
           case.counts[:1]]  # fmt: skip
    for at, (name, x) in enumerate(zip(names, bad, strict=True)):
        with pytest.raises(KernelArgumentError, match=f"^{name}: "):
            softmax_paged_step(*given[:at], x, *given[at + 1 :])
    with pytest.raises(KernelArgumentError, match=r"^v_PLGD: got strides"):
        softmax_paged_step(*given[:4], case.v_pages.transpose(0, 1).contiguous().transpose(0, 1), *given[5:])
    with pytest.raises(KernelArgumentError, match="auto, triton, torch"):
        softmax_paged_step(*given, backend="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_big_shapes(dtype: torch.dtype) -> None:
    case = Case([8192, 1, 100_000, 77, 0, 4096], 64, 8, 128, 64, dtype)
    case.assert_right(*case.step("auto"))


@pytest.mark.gpu
def test_more_elements_than_int32_counts() -> None:
    k_pages, v_pages = (torch.zeros(34_000, 64, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    assert k_pages.numel() > 2**31
    q, k, v = (torch.randn(1, heads, 128, device="cuda", dtype=torch.bfloat16) for heads in (64, 8, 8))
    table = torch.arange(34_000, device="cuda")[None]
    keys = torch.tensor([34_000 * 64], device="cuda")
    v_pages[33_000:] = 1.0
    o, _ = softmax_paged_step(q, k, torch.ones_like(v), k_pages, v_pages, table, keys)
    torch.testing.assert_close(o.float().mean().item(), 1000 / 34_000, rtol=2e-2, atol=0)
    assert (k_pages[-1, -1] == k[0]).all()
