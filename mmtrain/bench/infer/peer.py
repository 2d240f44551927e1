"""transformers' MiniMaxForCausalLM on the same device: a prompt, then tokens one by one, as its users run it.

The model is that of an export (`mmtrain.hf`): a dense architecture is one with a single expert, which every token
meets. Its weights are random, in bf16; nothing is compiled, as its cache cannot be.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmtrain.bench.infer.cases import Peer
from mmtrain.config import ModelConfig
from mmtrain.hf.hf_config import OWN, config_json
from mmtrain.infer.compute_dtype import compute_dtype


def peer(case: Peer, config: ModelConfig, device: torch.device, steps: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Figures of transformers' model; a reason in their place where there is none."""
    try:
        import transformers

        model = peer_model(config, compute_dtype(case.precision, device), device)
    except ImportError as error:
        return {"skipped": f"transformers cannot be imported: {error}"}
    prompt_1T = torch.randint(config.vocab_size, (1, case.context), device=device)
    return {"transformers": transformers.__version__, "context": case.context,
            **_times(model, prompt_1T, steps, wait)}  # fmt: skip


def peer_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Transformers' model of an architecture, with random weights.

    Raises:
        ImportError: transformers is not there, or too old to have it.
    """
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    words = config_json(config, port=True, dtype=dtype, eos=None, longest=None,
                        reordered=config.rotary_dim != config.head_dim)  # fmt: skip
    for name in (OWN, "architectures", "model_type", "dtype"):
        del words[name]
    with torch.device(device):
        return MiniMaxForCausalLM(MiniMaxConfig(**words)).to(dtype).eval()


@torch.no_grad()
def _times(model: nn.Module, prompt_1T: Tensor, steps: int, wait: Callable[[], None]) -> dict[str, float]:
    """Seconds of a prompt, the second time, and the median of single tokens after it."""
    for _ in range(2):
        wait()
        began = time.perf_counter()
        out = model(input_ids=prompt_1T, use_cache=True, logits_to_keep=1)
        wait()
        prefill = time.perf_counter() - began
    seconds = []
    for _ in range(steps + 3):
        token_11 = out.logits[:, -1].argmax(-1, keepdim=True)
        wait()
        began = time.perf_counter()
        out = model(input_ids=token_11, use_cache=True, past_key_values=out.past_key_values)
        wait()
        seconds.append(time.perf_counter() - began)
    return {"prefill_seconds": prefill, "prefill_tokens_s": prompt_1T.shape[1] / prefill,
            "step_ms": statistics.median(seconds[3:]) * 1e3}  # fmt: skip
