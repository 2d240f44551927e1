"""Cases of the whole-step bench: models, and the micro-batches of random tokens that they train on."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mmdata.rows.loader import PackedBatch
from mmtrain.bench.context_step import packed_row
from mmtrain.config import ModelConfig
from mmtrain.config.cli import compose

STEPS = 4  # with rows of their own; then the same come round again
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SOFTMAX_ONLY = "model.layer_pattern=S"
EXPERTS = ("model.num_experts=8", "model.ffn_hidden_size=1408", "model.top_k=2")
SIXTEEN = ("model.num_experts=16", *EXPERTS[1:], SOFTMAX_ONLY)
SEVENTY = ("model.num_layers=12", "model.hidden_size=640", "model.num_heads=10", "model.head_dim=64",
           "model.rotary_dim=32", "model.ffn_hidden_size=1792", "model.num_experts=0", SOFTMAX_ONLY)  # fmt: skip

RECOMPUTED = {"activation_checkpoint": "block"}


@dataclass(frozen=True)
class Case:
    """A model and the micro-batches of its step.

    Attributes:
        model: a preset.
        overrides: of it.
        rows: of a micro-batch.
        micro_batches: of a step.
        seq_len: tokens of a row.
        mean_document: tokens of a document, on average; 0: each row is one document.
        parallel: options of the layout.
    """

    model: str
    overrides: tuple[str, ...] = ()
    rows: int = 1
    micro_batches: int = 4
    seq_len: int = 8192
    mean_document: int = 1000
    parallel: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of a GPU and step."""
        return self.rows * self.seq_len * self.micro_batches


# fmt: off
CASES: dict[str, Case] = {
    "410m": Case("hybrid_410m"),
    "410m-4rows": Case("hybrid_410m", rows=4, micro_batches=2),
    "410m-softmax": Case("hybrid_410m", (SOFTMAX_ONLY,)),
    "410m-softmax-one-document": Case("hybrid_410m", (SOFTMAX_ONLY,), mean_document=0),
    "1b": Case("hybrid_1b"),
    "1b-2rows": Case("hybrid_1b", rows=2, micro_batches=2),
    "1b-softmax": Case("hybrid_1b", (SOFTMAX_ONLY,)),
    "1b-softmax-one-document": Case("hybrid_1b", (SOFTMAX_ONLY,), mean_document=0),
    "1b-experts-2rows": Case("hybrid_1b", EXPERTS, rows=2),
    "1b-16experts": Case("hybrid_1b", SIXTEEN[:-1]),
    "1b-16experts-softmax-one-document": Case("hybrid_1b", SIXTEEN, mean_document=0),
    "100m": Case("proxy_100m"),
    "70m-softmax": Case("proxy_100m", SEVENTY),
    "100m-4rows": Case("proxy_100m", rows=4, micro_batches=2),
    "100m-16k-recompute": Case("proxy_100m", seq_len=16384, parallel=RECOMPUTED),
    "410m-32k": Case("hybrid_410m", seq_len=2**15, micro_batches=1, parallel=RECOMPUTED),
    "410m-128k": Case("hybrid_410m", seq_len=2**17, micro_batches=1, parallel=RECOMPUTED),
    "410m-256k": Case("hybrid_410m", seq_len=2**18, micro_batches=1, parallel=RECOMPUTED),
    "410m-512k": Case("hybrid_410m", seq_len=2**19, micro_batches=1, parallel=RECOMPUTED),
    "410m-1m": Case("hybrid_410m", seq_len=2**20, micro_batches=1, parallel=RECOMPUTED),
    "410m-softmax-recompute": Case("hybrid_410m", (SOFTMAX_ONLY,), parallel=RECOMPUTED),
    "410m-softmax-32k": Case("hybrid_410m", (SOFTMAX_ONLY,), seq_len=2**15, micro_batches=1, parallel=RECOMPUTED),
    "410m-softmax-256k": Case("hybrid_410m", (SOFTMAX_ONLY,), seq_len=2**18, micro_batches=1, parallel=RECOMPUTED),
    "410m-softmax-512k": Case("hybrid_410m", (SOFTMAX_ONLY,), seq_len=2**19, micro_batches=1, parallel=RECOMPUTED),
    "410m-softmax-1m": Case("hybrid_410m", (SOFTMAX_ONLY,), seq_len=2**20, micro_batches=1, parallel=RECOMPUTED),
    "7b-mixers": Case("hybrid_7b", ("model.num_layers=4", "model.layer_pattern=L", "model.ffn_hidden_size=512",
                                    "model.vocab_size=4096"), seq_len=2**16, micro_batches=1,
                      parallel=RECOMPUTED),
    "410m-recompute": Case("hybrid_410m", parallel=RECOMPUTED),
    # As many tokens a step as one row of 256K: the optimizer's part is the same, and lengths of rows are compared.
    "410m-8k-x32": Case("hybrid_410m", micro_batches=32, parallel=RECOMPUTED),
    "410m-32k-x8": Case("hybrid_410m", seq_len=2**15, micro_batches=8, parallel=RECOMPUTED),
    "410m-softmax-8k-x32": Case("hybrid_410m", (SOFTMAX_ONLY,), micro_batches=32, parallel=RECOMPUTED),
}
# fmt: on


def model_config(case: Case) -> ModelConfig:
    """The case's architecture."""
    given = ["stage=quickstart", f"model={case.model}", "data.path=none", "run.name=bench", *case.overrides]
    return compose(given, CONFIGS).model


def batches(case: Case, vocabulary: int, step: int, rank: int = 0) -> list[PackedBatch]:
    """The micro-batches of a step on a rank, on the host; each rank has rows of its own, and each of `STEPS` steps."""
    first = (rank * STEPS + step) * case.micro_batches
    return [batch(case, vocabulary, first + i) for i in range(case.micro_batches)]


def batch(case: Case, vocabulary: int, seed: int) -> PackedBatch:
    """A micro-batch of rows of documents whose lengths are exponentially distributed, at least 16 tokens each."""
    rng = random.Random(seed)
    rows = [packed_row(_lengths(case, rng), vocabulary, seed * 64 + row) for row in range(case.rows)]
    offsets = [row.cu_seqlens[1:] + number * case.seq_len for number, row in enumerate(rows)]
    joined = {name: torch.cat([getattr(row, name) for row in rows])
              for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS")}  # fmt: skip
    return PackedBatch(
        **joined, cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), *offsets]).int(), rows=(seed,)
    )


def _lengths(case: Case, rng: random.Random) -> list[int]:
    left, found = case.seq_len, []
    while left:
        length = min(left, 16 + int(rng.expovariate(1 / case.mean_document))) if case.mean_document else left
        found.append(length)
        left -= length
    return found
