"""A checkpoint of any run as a whole model on one device."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from mmdata.tokenizer import Tokenizer, load_tokenizer
from mmtrain.checkpoint.dcp import find_checkpoint, read_meta
from mmtrain.config import DataConfig, ModelConfig, StageConfig
from mmtrain.config.schema import build
from mmtrain.model.init import meta_model
from mmtrain.model.model import HybridLM
from mmtrain.train.curriculum import RunPlan, scaled_phases
from mmtrain.train.inputs import tokenizer_path


def load_for_decoding(
    path: Path, tokenizer: str | None = None, device: str | None = None
) -> tuple[HybridLM, Tokenizer]:
    """Read the newest checkpoint at or below `path` and the tokenizer it was trained with.

    The model is fp32 (the master weights), in evaluation mode, with the RoPE base of the phase it was saved in.

    Raises:
        ConfigError: there is no complete checkpoint.
        DataError: the tokenizer is gone or broken.
    """
    checkpoint = find_checkpoint("checkpoint", str(path))
    meta = read_meta(checkpoint)
    data = build(DataConfig, meta["config"]["data"], "data")
    made = load_tokenizer(tokenizer or data.tokenizer or tokenizer_path(data.all_sources[0].path))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = meta_model(build(ModelConfig, meta["config"]["model"], "model")).to_empty(device=place)
    state = {"model": model.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that one process is enough
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    model.load_state_dict(state["model"])
    stage = build(StageConfig, meta["config"]["stage"], "stage")
    plan = RunPlan(scaled_phases(stage), 1, 1)
    model.rope_base = plan.phases[plan.step(max(meta["step"] - 1, 0)).phase_index].phase.rope_base
    return model.eval(), made
