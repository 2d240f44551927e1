"""The model that a configuration describes: of text alone, or with eyes."""

from __future__ import annotations

import torch

from mmtrain.config import ModelConfig
from mmtrain.model.init import initialise
from mmtrain.model.model import HybridLM
from mmtrain.vision.contrastive_model import ContrastiveModel
from mmtrain.vision.model import VisionLanguageModel


def meta_model(config: ModelConfig) -> HybridLM:
    """Make a model without memory, to be sharded, given memory, and filled by :func:`initialise` or a checkpoint."""
    with torch.device("meta"):
        if config.vision is None:
            return HybridLM(config)
        return VisionLanguageModel(config) if config.vision.contrastive is None else ContrastiveModel(config)


def build_model(config: ModelConfig, device: torch.device | str = "cpu", seed: int = 1234) -> HybridLM:
    """Make a model with initial weights, whole, on one device, in fp32 (for tests, tools and decoding)."""
    model = meta_model(config).to_empty(device=device)
    initialise(model, seed)
    return model
