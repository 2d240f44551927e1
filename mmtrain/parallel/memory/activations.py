"""Activations of a layer on a rank, in bytes: what stays from forward to backward, and what backward takes besides.

Each count is read off what the modules' autograd functions save. Names of parts are those of the prediction's table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmtrain.parallel.memory.expert_rows import expert_rows
from mmtrain.parallel.memory.workload import FP32, Workload

SEGMENTS = 264
"""Heads times segments that a lightning kernel splits a row into, to fill a device: two for each multiprocessor."""


AROUND_ATTENTION = "around attention"


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer for one micro-batch.

    Attributes:
        block_input: the hidden states that enter.
        mixer: the mixer's own.
        feed_forward: those of the dense feed-forward, or of router and experts.
        norms: the hidden states between the parts, and what norms keep.
        mixer_input: the part of `norms` that is still needed when the mixer is differentiated.
        attention_output: the part of `mixer` that `selective` keeps.
        mixer_backward: gradients and buffers while the mixer is differentiated.
        feed_forward_backward: likewise of the feed-forward.
    """

    block_input: float
    mixer: float
    feed_forward: float
    norms: float
    mixer_input: float
    attention_output: float
    mixer_backward: float
    feed_forward_backward: float

    @property
    def whole(self) -> Mapping[str, float]:
        """Everything that backward needs, by part."""
        return {
            "block inputs": self.block_input,
            "mixers": self.mixer,
            "feed-forward": self.feed_forward,
            "norms": self.norms,
        }

    def kept(self, policy: str, on_host: bool) -> Mapping[str, float]:
        """What stays on the device between forward and backward, by part.

        Args:
            policy: `parallel.activation_checkpoint`; or ``around attention``: `block` in CUDA graphs, which begin and
                end in softmax layers, and recompute what follows attention.
            on_host: whether block inputs go to host memory.
        """
        if policy == "none":
            return self.whole
        if policy == AROUND_ATTENTION:
            return {"block inputs": self.block_input, "mixers": self.mixer, "norms": self.mixer_input}
        attention = self.attention_output if policy == "selective" else 0.0
        return {"block inputs": 0.0 if on_host else self.block_input, "mixers": attention}


def layer_activations(work: Workload, letter: str) -> LayerActivations:
    """Count the activations of a layer of a kind."""
    model, layout, size = work.model, work.layout, work.compute_bytes
    memory, tokens = work.mixer_memory(letter), work.mixer_tokens
    hidden = work.own_tokens * model.hidden_size * size
    gathered = tokens * model.hidden_size * size  # hidden itself where tp is 1
    states = memory.state * FP32 * work.parallel.cp_chunks if layout.cp > 1 else 0
    if memory.state and layout.cp == 1:
        states = min(SEGMENTS, model.num_heads * max(1, tokens // 256)) * model.head_dim**2 * FP32
    mixer = tokens * (memory.kept * size + memory.kept_fp32 * FP32) + states
    dense = not model.num_experts
    feed_forward, forward_backward = _dense(work) if dense else _experts(work)
    norms = gathered + hidden + (gathered if dense else hidden) + 2 * FP32 * work.own_tokens
    recorded = work.records_graphs and memory.recorded_backward is not None
    backward = memory.recorded_backward if recorded else memory.backward
    arriving = gathered if layout.tp > 1 else 0  # a gradient that is gathered over tp
    return LayerActivations(
        block_input=hidden,
        mixer=mixer,
        feed_forward=feed_forward,
        norms=norms,
        mixer_input=gathered,
        attention_output=tokens * (memory.attention_output * size + memory.attention_fp32 * FP32),
        mixer_backward=tokens * backward * size + 2 * hidden + gathered + arriving,
        feed_forward_backward=forward_backward + 2 * hidden + arriving,
    )


def _dense(work: Workload) -> tuple[float, float]:
    return _swiglu(work, work.model.ffn_hidden_size // work.layout.tp)


def _swiglu(work: Workload, width: int) -> tuple[float, float]:
    """Kept: the first product (2 widths) and the activation. Backward: the gradient of the first product, of tokens.

    In chunks nothing is kept; backward has a chunk's first product, activation, and their gradients, the gradient of
    tokens, and sums of the weights' gradients.
    """
    hidden, tokens, size, chunk = work.model.hidden_size, work.mixer_tokens, work.compute_bytes, work.ffn_chunk
    if chunk is None:
        return 3 * tokens * width * size, (2 * width + hidden) * tokens * size
    sums = 3 * hidden * width * FP32 if chunk < tokens else 0
    return 0.0, (6 * width * min(chunk, tokens) + hidden * tokens) * size + sums


def _experts(work: Workload) -> tuple[float, float]:
    """Kept: rows sorted by expert, the first product, the outputs; logits and route. Backward: their gradients."""
    model, layout, size, rows = work.model, work.layout, work.compute_bytes, expert_rows(work)
    hidden, width = model.hidden_size, model.ffn_hidden_size // layout.etp
    kept = (rows.sent * hidden + rows.received * (hidden + (2 * width if work.ffn_chunk is None else 0))) * size
    kept += work.row_tokens * (model.num_experts * FP32 + model.top_k * 12) + rows.sent * 8
    if not rows.travel:  # outputs are gone when the products are differentiated
        backward = rows.received * (2 * width + max(width, hidden)) * size
        chunked = rows.received * 2 * hidden * size  # gradients of the outputs and of the rows
    else:
        arriving = 0 if rows.direct else rows.received * hidden
        sent = rows.sent * hidden * (1 if rows.direct else 2)
        backward = (sent + arriving + rows.received * (2 * hidden + 3 * width)) * size
        chunked = (sent + arriving + rows.received * 2 * hidden) * size
    if work.ffn_chunk is not None:
        sums = 3 * model.num_experts // layout.ep * hidden * width * FP32 if work.ffn_chunk < rows.received else 0
        backward = chunked + min(work.ffn_chunk, rows.received) * (6 * width + hidden) * size + sums
    if model.shared_ffn_hidden_size:
        shared_kept, shared_backward = _swiglu(work, model.shared_ffn_hidden_size // layout.tp)
        kept += shared_kept + 3 * work.own_tokens * hidden * FP32  # the blend is float32
        backward += shared_backward
    return kept, backward
