"""A run whose model is known by heart: each token of a chain is followed by the next, whatever came before."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from mmdata.tokenizer_identity import BYTES_FILE
from mmtrain.build import build_model
from mmtrain.checkpoint.manifest import write_manifest
from mmtrain.config import ModelConfig
from mmtrain.model.model import HybridLM

TEXT = "né€😀!"  # bytes that are all different; the last one is followed by the end of the document, that by the first
EOD = 256
CONFIG = ModelConfig("small", vocab_size=264, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
                     ffn_hidden_size=24, layer_pattern="LS", rotary_dim=4, num_experts=4)  # fmt: skip


@torch.no_grad()
def chain_model(text: str = TEXT, certainty: float = 1.0) -> HybridLM:
    """Make a model over bytes that continues `text` from any of its bytes; an id of no token is second to the end."""
    model = build_model(CONFIG)
    for name, parameter in model.named_parameters():
        if "norm" not in name and not name.startswith("embed_tokens"):
            parameter.zero_()
    ids = [*text.encode(), EOD]
    for here, following in zip(ids, [*ids[1:], ids[0]], strict=True):
        unit_D = torch.nn.functional.normalize(model.embed_tokens.weight[here], dim=0)
        model.lm_head.weight[following] = certainty * unit_D
        if following == EOD:
            model.lm_head.weight[EOD + 1] = 0.9 * certainty * unit_D  # the tokenizer has no such token
    return model.eval()


def save_run(run: Path, model: HybridLM, *, tokenizer: bool = True, data: dict | None = None, **record: object) -> Path:
    """Write a run folder with one checkpoint, as training would; returns the checkpoint."""
    checkpoint = run / "checkpoints" / "step-00000004"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict()}, checkpoint_id=checkpoint, no_dist=True)
    config = {"model": asdict(model.config), "data": data or {"path": "gone"}}
    meta = {"step": 4, "tokens": 256, "rope_base": 1e4, "config": config, "format": 2, **record}
    (checkpoint / "meta.json").write_text(json.dumps(meta))
    if tokenizer:
        byte_tokenizer(checkpoint / "tokenizer")
    write_manifest(checkpoint, 4, {})
    return checkpoint


def byte_tokenizer(folder: Path) -> None:
    """Save the byte tokenizer into a folder."""
    folder.mkdir(parents=True)
    (folder / BYTES_FILE).write_text('{"kind": "bytes"}\n')


def file_tokenizer(folder: Path, words: int = 0) -> Path:
    """Save a byte-level BPE tokenizer with some added words into a folder; returns the folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end_of_document>", special=True)])
    made.add_tokens([f"word{i}" for i in range(words)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder
