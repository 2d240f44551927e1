#!/usr/bin/env python
"""Memory and time of the scores of one long row: a whole forward pass, as in training, beside the engine's pieces.

`python -m mmtrain.bench.evals_scoring_cpu --out FOLDER` writes FOLDER/scoring.json. Memory is counted, not sampled: the
peak bytes of all tensors that are alive beside the weights, keys and states of the engine among them.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mmdata.tokenizer import ByteTokenizer
from mmtrain.build import build_model
from mmtrain.config import ModelConfig
from mmtrain.infer.answering import EngineAnswerer, options_for
from mmtrain.infer.engine import Engine
from mmtrain.infer.serving.scoring import label_scores
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import Packing

CONFIG = ModelConfig("bench", vocab_size=4096, hidden_size=256, num_layers=8, num_heads=4, num_kv_heads=2, head_dim=64,
                     ffn_hidden_size=512, layer_pattern="LLLLLLLS", rotary_dim=32, num_experts=4)  # fmt: skip


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it made."""
        made = func(*args, **(kwargs or {}))
        for value in tree_flatten(made)[0]:
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if not key or key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def whole(model: HybridLM, row: np.ndarray) -> np.ndarray:
    """Log-probabilities by one pass."""
    tokens_T = torch.from_numpy(row)
    with torch.no_grad():
        h_TD = model.final_states(tokens_T, Packing.from_lengths([len(row)], tokens_T.device))
        return label_scores(model, h_TD, torch.arange(len(row) - 1), tokens_T[1:])[0].numpy()


def in_pieces(model: HybridLM, row: np.ndarray) -> np.ndarray:
    """The same by the engine, as `launch/eval.py` has it."""
    engine = Engine(model, ByteTokenizer(), replace(options_for(len(row), at_once=1), prefix_slots=0))
    return EngineAnswerer(engine).score([row], [1])[0].log_probs_N


def main() -> None:
    """Measure both at some lengths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(CONFIG).eval()
    ways: dict[str, Callable[[HybridLM, np.ndarray], np.ndarray]] = {"whole": whole, "engine": in_pieces}
    made: dict[str, Any] = {"torch": torch.__version__, "layers": CONFIG.layer_pattern,
                            "hidden_size": CONFIG.hidden_size, "rows": []}  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for length in options.lengths:
        row = np.random.default_rng(0).integers(0, CONFIG.vocab_size, length)
        record: dict[str, Any] = {"tokens": length}
        found = {}
        for name, way in ways.items():
            began = time.perf_counter()
            with Alive() as alive:
                found[name] = way(model, row)
            record |= {f"{name}_s": round(time.perf_counter() - began, 2), f"{name}_mib": round(alive.peak / 2**20, 1)}
        record["largest_difference"] = float(np.abs(found["whole"] - found["engine"]).max())
        made["rows"].append(record)
        print(json.dumps(record), flush=True)
        (options.out / "scoring.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
