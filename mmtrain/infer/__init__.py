"""Decoding from a trained model."""

from mmtrain.infer.generate import Sampling, continue_prompt, generate
from mmtrain.infer.load import load_for_decoding

__all__ = ["Sampling", "continue_prompt", "generate", "load_for_decoding"]
