#!/usr/bin/env python
"""Forward and backward of one hybrid MoE on a CPU, beside transformers' MiniMax in the same run.

8 layers of 7:1, hidden 256, 4 heads x 64, 8 experts of 512, top-2, vocabulary 4,096, one document of 2,048 tokens. Runs
of both alternate, so that a machine whose speed drifts is fair to both; medians are printed, and --save writes them to
`results/`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from mmtrain.build import build_model
from mmtrain.config import ModelConfig
from mmtrain.model.flops import step_flops
from mmtrain.model.mixers.registry import SOFTMAX
from mmtrain.model.packed_seq import Packing
from mmtrain.train.device import keep_freed_memory

TOKENS = 2048
CONFIG = ModelConfig("bench", vocab_size=4096, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64,
                     ffn_hidden_size=512, num_experts=8, rotary_dim=64, capacity_factor=None)  # fmt: skip


def ours(tokens_T: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward of mmtrain's model."""
    model = build_model(CONFIG).to(dtype)
    labels_T, packing = tokens_T.roll(-1), Packing.from_lengths([TOKENS])

    def run() -> None:
        out = model(tokens_T, packing, labels_T)
        (out.ce_sum / TOKENS + out.aux_loss).backward()
        model.zero_grad(set_to_none=True)

    return run


def theirs(tokens_T: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """One forward and backward of transformers' model, in its fastest setting found (its default: SDPA, grouped_mm)."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    c = CONFIG
    model = MiniMaxForCausalLM(
        MiniMaxConfig(
            vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_hidden_size,
            num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
            head_dim=c.head_dim, num_local_experts=c.num_experts, num_experts_per_tok=c.top_k,
            layer_types=["full_attention" if k == SOFTMAX.letter else "linear_attention" for k in c.layer_types],
            block_size=256, use_cache=False,
        )
    ).to(dtype)  # fmt: skip

    def run() -> None:
        model(input_ids=tokens_T[None], labels=tokens_T[None]).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def product(dtype: torch.dtype) -> Callable[[], None]:
    """The machine's ceiling: a square product."""
    a = torch.randn(2048, 2048).to(dtype)
    out = torch.empty_like(a)

    def run() -> None:
        torch.mm(a, a, out=out)

    return run


def alternate(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Figures of one precision."""
    tokens_T = torch.randint(0, CONFIG.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    seconds = alternate(
        {"ours": ours(tokens_T, dtype), "theirs": theirs(tokens_T, dtype), "mm": product(dtype)}, repeats
    )
    rate = 2 * 2048**3 / seconds["mm"]
    useful = step_flops(CONFIG, [TOKENS]).total
    return {
        "product_gflops": round(rate / 1e9, 1),
        "mmtrain_tokens_per_s": round(TOKENS / seconds["ours"], 1),
        "transformers_tokens_per_s": round(TOKENS / seconds["theirs"], 1),
        "mmtrain_of_product_rate": round(useful / seconds["ours"] / rate, 3),
        "transformers_of_product_rate": round(useful / seconds["theirs"] / rate, 3),
        "ratio": round(seconds["theirs"] / seconds["ours"], 3),
    }


def main() -> None:
    """Measure, print, and save when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="write results/<date>-cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as launch/pretrain.py does; both models gain by it
    warnings.simplefilter("ignore")
    import transformers

    result: dict = {
        "machine": {"cpu": _cpu_name(), "threads": options.threads, "python": platform.python_version()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "tokens": TOKENS,
    }
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        result[name] = measure(dtype, options.repeats)
        print(name, json.dumps(result[name]), flush=True)
    result["bf16_over_transformers_fp32"] = round(
        result["bf16"]["mmtrain_tokens_per_s"] / result["fp32"]["transformers_tokens_per_s"], 3
    )
    print("mmtrain bf16 over transformers fp32:", result["bf16_over_transformers_fp32"])
    if options.save:
        path = Path(__file__).parent / "results" / f"{datetime.date.today().isoformat()}-cpu.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {path}")


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
