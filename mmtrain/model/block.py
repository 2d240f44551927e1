"""One layer: a token mixer and a feed-forward, each with its norm and residual.

Legend: T tokens, D model width.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmtrain.config import ModelConfig
from mmtrain.model.ffn import SwiGLU
from mmtrain.model.ffn_chunks import ChunkedFeedForward
from mmtrain.model.frozen import learns
from mmtrain.model.host_inputs import HostInputs
from mmtrain.model.kept_attention import KeptAttention, KeptResult
from mmtrain.model.mixers.mixer import Mixer
from mmtrain.model.mixers.registry import mixer_spec
from mmtrain.model.moe.layer import MoE
from mmtrain.model.moe.router import RouterStats
from mmtrain.model.norm import RMSNorm
from mmtrain.model.packed_seq import Packing
from mmtrain.model.rope import RopeTable
from mmtrain.model.sequence import SequenceRegion, WholeSequence


class Block(nn.Module):
    """A layer of the hybrid.

    Post-norm (as released): x = RMSNorm(h); h = alpha x + Mixer(x); x = RMSNorm(h); h = alpha x + FFN(x): the residual
    is taken after the norm (MiniMax-01 section 2, Fig. 3). Pre-norm: h = h + Mixer(RMSNorm(h)), and so on.

    Attributes:
        spec: the kind of its mixer.
        sequence: brings the tokens of all ranks to the mixer, and sums its partial results over ranks.
        recompute: run forward again in backward and keep only the block's input, and what `keep_attention` says.
        host_inputs: takes the block's input to host memory until then; None leaves it where it is.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.alpha, self.post_norm = config.alpha, config.post_norm
        self.spec = mixer_spec(config.layer_types[layer])
        # Names of parameters seed their initial weights and key checkpoints (`mmtrain.model.init`): do not rename.
        self.input_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer: Mixer = self.spec.build(config, layer)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn = (
            MoE(config) if config.num_experts else SwiGLU(config.hidden_size, config.ffn_hidden_size, config.beta)
        )
        self.sequence: SequenceRegion = WholeSequence()
        self.recompute = False
        self.host_inputs: HostInputs | None = None

    def keep_attention(self) -> None:
        """Let recomputation spare softmax attention; after parallelism has put its own call in place."""
        self.mixer.attention = KeptAttention(self.mixer.attention)

    def chunk_feed_forward(self, tokens: int) -> None:
        """Let the feed-forward, its experts too, work on so many tokens (or rows) at a time, and save its input alone.

        The router still takes the micro-batch as a whole.
        """
        dense: SwiGLU | None = self.ffn if isinstance(self.ffn, SwiGLU) else None
        if isinstance(self.ffn, MoE):
            self.ffn.experts.chunk_rows = tokens
            dense = None if self.ffn.shared is None else self.ffn.shared.mlp
        if dense is not None:
            dense.call = ChunkedFeedForward(tokens)

    def forward(
        self, h_TD: Tensor, packing: Packing, rope: RopeTable, cache: Any = None
    ) -> tuple[Tensor, RouterStats | None]:
        """Return the next hidden states [T, D], and what the router did (None in a dense layer).

        Args:
            h_TD: hidden states of this process's tokens.
            packing: the documents that the tokens of all ranks belong to.
            rope: cosines and sines of the positions of the tokens of `packing`.
            cache: what the mixer remembers of documents that the tokens continue; None outside of inference.
        """
        if self._recomputes(h_TD):
            kept = KeptResult() if isinstance(self.mixer.attention, KeptAttention) else None
            options = {"use_reentrant": False, "preserve_rng_state": False}
            with contextlib.nullcontext() if self.host_inputs is None else self.host_inputs.hold():
                return checkpoint(self._run_keeping, h_TD, packing, rope, cache, kept, **options)
        return self._run(h_TD, packing, rope, cache)

    def _recomputes(self, given: Tensor) -> bool:
        """Whether there is a backward to compute again for: frozen layers at the bottom have none."""
        return self.recompute and torch.is_grad_enabled() and (given.requires_grad or learns(self))

    def _run_keeping(
        self, h_TD: Tensor, packing: Packing, rope: RopeTable, cache: Any, kept: KeptResult | None
    ) -> tuple[Tensor, RouterStats | None]:
        """Run with a place for the result of softmax attention, which the first run fills and the second finds."""
        if kept is None:
            return self._run(h_TD, packing, rope, cache)
        self.mixer.attention.result = kept
        try:
            return self._run(h_TD, packing, rope, cache)
        finally:
            self.mixer.attention.result = None

    def _run(self, h_TD: Tensor, packing: Packing, rope: RopeTable, cache: Any) -> tuple[Tensor, RouterStats | None]:
        x_TD = self.input_norm(h_TD)
        mixed_TD = self.mixer(self.sequence.gather_from(x_TD), packing, rope, cache)
        return self._feed_forward(mixed_TD, x_TD if self.post_norm else h_TD, packing)

    def before_attention(self, h_TD: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return q, k and v of a softmax layer, and its residual: the part of `forward` before its attention."""
        x_TD = self.input_norm(h_TD)
        return *self.mixer.project(self.sequence.gather_from(x_TD), rope), x_TD if self.post_norm else h_TD

    def after_attention(
        self, o_THK: Tensor, residual_TD: Tensor, packing: Packing
    ) -> tuple[Tensor, RouterStats | None]:
        """Return what `forward` returns, given the attention's result and what :meth:`before_attention` returned.

        Of this part recomputation keeps those two alone.
        """
        if self._recomputes(o_THK):
            options = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(self._finish, o_THK, residual_TD, packing, **options)
        return self._finish(o_THK, residual_TD, packing)

    def _finish(self, o_THK: Tensor, residual_TD: Tensor, packing: Packing) -> tuple[Tensor, RouterStats | None]:
        return self._feed_forward(self.mixer.finish(o_THK), residual_TD, packing)

    def _feed_forward(
        self, mixed_TD: Tensor, residual_TD: Tensor, packing: Packing
    ) -> tuple[Tensor, RouterStats | None]:
        """Return the block's result, given its mixer's, of which ranks may have parts of a sum."""
        mixed_TD = self.sequence.reduce_scatter_to(mixed_TD)
        x_TD, h_TD = self.post_attention_norm.after_residual(residual_TD, mixed_TD, self.alpha)
        out_TD, stats = self.ffn(x_TD, packing) if isinstance(self.ffn, MoE) else (self.ffn(x_TD), None)
        residual_TD = x_TD if self.post_norm else h_TD
        return torch.add(out_TD, residual_TD, alpha=self.alpha), stats
