"""Bytes that a step reads and writes around its products and attention: norms, gates, activations, sums, the loss.

Elements a token, of the type that products compute in, as the READMEs of the kernels count them (`mmkernels/norm`,
`norm_gate`, `swiglu`, `moe`), and torch's own additions; D model width, I width of all heads, F feed-forward width, k
experts a token, V vocabulary:

| | forward | backward |
|---|---|---|
| first norm | 2 D | 3 D |
| residual and second norm | 4 D | 5 D |
| residual behind the feed-forward | 3 D | 2 D |
| gradients of what several read, added: the two norms' results, by a residual and a product each | | 6 D |
| the same by both projections of lightning | | 3 D |
| norm and gate of lightning | 3 I | 5 I |
| SwiGLU, of a shared expert too | 3 F | 5 F |
| SwiGLU of k experts | 3 k F | 5 k F |
| rows to experts and back | (2 + 2 k) D | (2 + 2 k) D |
| loss: logits read twice, their gradient written | 3 V | |
| last norm | 2 D | 3 D |

RoPE, routers, the embedding and casts of weights are left out, and SiLU of lightning: its kernels' time has that in it.
"""

from __future__ import annotations

from mmtrain.config import ModelConfig, ParallelConfig
from mmtrain.model.mixers.registry import LIGHTNING


def streamed_elements(model: ModelConfig, parallel: ParallelConfig, kept: float = 1.0) -> float:
    """Elements that a step reads and writes for each token of its rows.

    Args:
        model: the architecture.
        parallel: says whether blocks are computed again; all but the last addition then is.
        kept: share of the assignments to experts that are not dropped.
    """
    width, inner, ffn = model.hidden_size, model.inner_size, model.ffn_hidden_size
    lightning = model.layer_types.count(LIGHTNING.letter) / model.num_layers
    if model.num_experts:
        rows = model.top_k * kept
        middle = rows * ffn + (model.shared_ffn_hidden_size or 0)
        travels = (2 + 2 * rows) * width
    else:
        middle, travels = float(ffn), 0.0
    forward = 6 * width + lightning * 3 * inner + 3 * middle + travels
    backward = 16 * width + lightning * (3 * width + 5 * inner) + 5 * middle + travels
    block = forward * (1 + parallel.recomputes) + 3 * width + backward
    return model.num_layers * block + 5 * width + 3 * model.vocab_size
