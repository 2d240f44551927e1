"""Loading of any run's checkpoint as a whole model on one device."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from mmdata.corpus.open import tokenizer_path
from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmtrain.checkpoint.listing import find_checkpoint
from mmtrain.checkpoint.progress import read_meta
from mmtrain.checkpoint.rope_base import rope_base_of
from mmtrain.checkpoint.safe_load import load_shards, metadata_of
from mmtrain.config import DataConfig, ModelConfig
from mmtrain.config.checks import require
from mmtrain.config.schema import build
from mmtrain.model.init import meta_model
from mmtrain.model.model import HybridLM


def load_for_decoding(
    path: Path, tokenizer: str | None = None, device: str | None = None, rope_base: float | None = None
) -> tuple[HybridLM, Tokenizer]:
    """Read the newest checkpoint at or below `path` and the tokenizer it was trained with.

    Args:
        path: a run folder, or one of its checkpoints.
        tokenizer: tokenizer.json, a folder with one, or "bytes"; None takes the run's.
        device: where the model goes; None: "cuda" when there is one, else "cpu".
        rope_base: RoPE base to decode with; None takes the one that the checkpoint was saved with.

    Returns:
        The model in fp32 (the master weights) and evaluation mode, whose configuration holds the RoPE base; and the
        tokenizer.

    Raises:
        ConfigError: there is no complete checkpoint, it is damaged, or its RoPE base is neither known nor given, or
            cannot be one.
        DataError: the tokenizer is gone or broken.
    """
    checkpoint = find_checkpoint("checkpoint", path, lambda line: print(f"note: {line}", file=sys.stderr, flush=True))
    meta = read_meta(checkpoint)
    data = build(DataConfig, meta["config"]["data"], "data")
    made = load_tokenizer(tokenizer or data.tokenizer or tokenizer_path(data.all_sources[0].path))
    if rope_base is None:
        rope_base = rope_base_of(checkpoint, meta)
    require(rope_base > 1, "--rope-base", rope_base, "must be above 1", "leave it out, or give for example 10000")
    config = replace(build(ModelConfig, meta["config"]["model"], "model"), rope_base=rope_base)
    model = meta_model(config).to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
    state = {"model": model.state_dict()}
    load_shards("checkpoint", checkpoint, metadata_of("checkpoint", checkpoint), state, alone=True)
    model.load_state_dict(state["model"])
    return model.eval(), made
