"""Time of lightning attention on this CPU: the chunked backend beside a plain block loop under autograd.

    PYTHONPATH=kernels python kernels/bench/lightning_cpu.py [--threads 1 2] [--repeats 7] [--quick]

Rates are real operations of the method at hand: ours for the chunk length it chose, the loop's for blocks of 256.
Their fraction is of this machine's float32 matrix product, 1024 cubed, timed between the cases of the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels import lightning_attention
from mmkernels.lightning.eager.plan import make_plan

BLOCK = 256


@dataclass(frozen=True)
class Case:
    """One shape; ``documents`` > 1 packs that many of random lengths into the row."""

    tokens: int
    heads: int
    width: int
    documents: int = 1
    dtype: torch.dtype = torch.float32
    quick: bool = True


CASES = (
    Case(2048, 8, 32),
    Case(2048, 4, 64),
    Case(2048, 8, 64),
    Case(2048, 8, 64, documents=4),
    Case(2048, 8, 64, documents=30),
    Case(2048, 8, 64, dtype=torch.bfloat16),
    Case(8192, 16, 64, quick=False),
    Case(8192, 16, 128, quick=False),
)


def block_loop(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, slopes_H: Tensor) -> Tensor:
    """The textbook way: a Python loop over blocks of 256 with the state carried, gradients by autograd."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD))
    s_H11 = slopes_H[:, None, None]
    i = torch.arange(BLOCK, dtype=q.dtype)
    lag_CC = i[:, None] - i[None, :]
    mask_HCC = torch.exp(-s_H11 * lag_CC.clamp(min=0)) * (lag_CC >= 0)
    into_HC1, total = torch.exp(-s_H11 * (i[:, None] + 1)), q.shape[2]
    state = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    outputs = []
    for start in range(0, total, BLOCK):
        m = min(BLOCK, total - start)
        qb, kb, vb = (x[:, :, start : start + m] for x in (q, k, v))
        intra = torch.matmul(torch.matmul(qb, kb.transpose(-1, -2)) * mask_HCC[:, :m, :m], vb)
        outputs.append(intra + torch.matmul(qb * into_HC1[:, :m], state))
        outof_HC1 = torch.exp(-s_H11 * (m - 1 - i[:m, None]))
        state = torch.exp(-s_H11 * m) * state + torch.matmul((kb * outof_HC1).transpose(-1, -2), vb)
    return torch.cat(outputs, dim=2).transpose(1, 2)


def best_ms(run: Callable[[], object], repeats: int) -> float:
    """Smallest of ``repeats`` times after one warm-up, in ms: the least disturbed by other programs."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def matmul_rate(repeats: int) -> float:
    """GFLOP/s of a 1024-cubed float32 product."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / best_ms(lambda: a @ b, 3 * repeats) / 1e6


def operations(case: Case, ours: bool) -> tuple[float, float]:
    """Operations of forward, and of forward and backward together."""
    plan = make_plan(1, case.tokens, case.heads, case.width, 4)
    chunk = plan.chunk if ours else BLOCK
    scan = 2 * plan.widest * case.width**2 / chunk if ours else 0.0
    forward = 4 * chunk * case.width + 4 * case.width**2 + scan
    # Autograd of the loop multiplies twice for each product of its forward: 8 + 8; ours recomputes scores: 10 + 8.
    backward = (10 if ours else 8) * chunk * case.width + 8 * case.width**2 + scan
    scale = case.tokens * case.heads
    return forward * scale, (forward + backward) * scale


def measure(case: Case, repeats: int) -> None:
    """Print the rows of one case."""
    torch.manual_seed(0)
    qkv = torch.randn(1, case.tokens, case.heads, 3 * case.width).to(case.dtype)
    q, k, v = (x.detach().requires_grad_() for x in qkv.split(case.width, dim=-1))
    slopes = 2.0 ** (-8.0 * torch.arange(1, case.heads + 1) / case.heads)
    do = torch.randn(1, case.tokens, case.heads, case.width).to(case.dtype)
    cuts = torch.randperm(case.tokens - 1)[: case.documents - 1].sort().values + 1
    ends = torch.tensor([0]), cuts, torch.tensor([case.tokens])
    cu_seqlens = torch.cat(ends).int() if case.documents > 1 else None

    def ours() -> Tensor:
        return lightning_attention(q, k, v, slopes, cu_seqlens=cu_seqlens, backend="chunked")[0]

    def loop() -> Tensor:
        return block_loop(q.float(), k.float(), v.float(), slopes).to(q.dtype)

    rate = matmul_rate(repeats)
    for name, run in (("chunked", ours), ("block loop", loop)):
        if case.documents > 1 and run is loop:
            continue
        with torch.no_grad():
            forward_ms = best_ms(run, repeats)
        both_ms = best_ms(lambda run=run: torch.autograd.grad(run(), (q, k, v), do), repeats)
        ops, both_ops = operations(case, run is ours)
        label = f"{case.tokens} x {case.heads} x {case.width}, {case.documents} doc, {str(case.dtype)[6:]}"
        cells = [f"{label:32}", f"{name:10}"]
        for ms, count in ((forward_ms, ops), (both_ms, both_ops)):
            cells.append(f"{ms:8.2f} ms {count / ms / 1e6:5.0f} GFLOP/s {100 * count / ms / 1e6 / rate:3.0f}%")
        print(" | ".join(cells), flush=True)


def main() -> None:
    """Run the table for each thread count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="leave out the long rows")
    args = parser.parse_args()
    for threads in args.threads:
        torch.set_num_threads(threads)
        print(f"{threads} thread(s), float32 product {matmul_rate(args.repeats):.0f} GFLOP/s")
        print(f"{'tokens x heads x width':32} | {'method':10} | {'forward':29} | forward and backward")
        for case in CASES:
            if case.quick or not args.quick:
                measure(case, args.repeats)


if __name__ == "__main__":
    main()
