"""Calls of other people's kernels. A peer that is not installed has no call, and its cells stay empty."""

from __future__ import annotations

import functools
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.harness import Bench, with_backward
from bench.gpu.inputs import Attention
from bench.gpu.table import Call, Peer


@functools.cache
def missing_fla() -> str | None:
    """Why flash-linear-attention cannot be used; None if it can."""
    try:
        import fla.modules
        import fla.ops.simple_gla  # noqa: F401
    except Exception as error:  # its imports look at the driver, and raise many things
        return f"{type(error).__name__}: {error}"
    return None


def simple_gla(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, cu_seqlens: Tensor | None = None) -> Peer:
    """FLA's nearest thing to lightning attention; it wants int64 offsets."""
    name = "FLA chunk_simple_gla"
    if missing_fla():
        return Peer(name, None)
    from fla.ops.simple_gla import chunk_simple_gla

    gamma = -slopes
    return Peer(name, lambda: chunk_simple_gla(q, k, v, scale=1.0, g_gamma=gamma, cu_seqlens=cu_seqlens)[0])


def recurrent_gla(q_BHD: Tensor, k_BHD: Tensor, v_BHD: Tensor, slopes: Tensor, state: Tensor) -> Peer:
    """FLA's step of one token, which writes the new state to a tensor of its own."""
    name = "FLA fused_recurrent_simple_gla"
    if missing_fla():
        return Peer(name, None)
    from fla.ops.simple_gla import fused_recurrent_simple_gla

    q, k, v = (x[:, None] for x in (q_BHD, k_BHD, v_BHD))
    gamma = -slopes
    return Peer(
        name,
        lambda: fused_recurrent_simple_gla(
            q, k, v, g_gamma=gamma, scale=1.0, initial_state=state, output_final_state=True
        ),
    )


def layer_core(qkv_BTHX: Tensor, gate_BTI: Tensor, weight_I: Tensor, slopes: Tensor, eps: float) -> Peer:
    """The same of a layer, composed of FLA's parts: SiLU and split, attention, gated norm."""
    name = "FLA composed"
    if missing_fla():
        return Peer(name, None)
    from fla.modules import FusedRMSNormGated
    from fla.ops.simple_gla import chunk_simple_gla

    norm = FusedRMSNormGated(
        weight_I.shape[0], eps=eps, activation="sigmoid", device=weight_I.device, dtype=weight_I.dtype
    )
    norm.weight = weight_I
    gamma, width = -slopes, qkv_BTHX.shape[-1] // 3

    def run() -> Tensor:
        q, k, v = F.silu(qkv_BTHX).split(width, dim=-1)
        return norm(chunk_simple_gla(q, k, v, scale=1.0, g_gamma=gamma)[0].flatten(-2), gate_BTI)

    return Peer(name, run)


def dense_softmax(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor) -> Peer:
    """Causal attention of whole rows with grouped heads, by cuDNN."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTD, is_causal=True, enable_gqa=True)

    return Peer("cuDNN SDPA, dense", run)


def varlen_softmax(bench: Bench, leaves: tuple[Tensor, Tensor, Tensor], do: Tensor, cu: Tensor, longest: int) -> Peer:
    """FlashAttention-2 of packed rows; K and V are repeated to all heads only where it refuses fewer of them."""
    name = "varlen_attn (FA2)"
    q, k, v = leaves
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        bench.note(name, error)
        return Peer(name, None)
    grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    repeat = q.shape[1] // k.shape[1]

    def native() -> Tensor:
        return varlen_attn(q, k, v, cu, cu, longest, longest, window_size=(-1, 0), **grouped)

    def repeated() -> Tensor:
        wide = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
        return varlen_attn(q, *wide, cu, cu, longest, longest, window_size=(-1, 0))

    return Peer(name, native) if _runs(bench, name, native, leaves, do) else Peer(f"{name}, K V repeated", repeated)


def _runs(bench: Bench, name: str, call: Call, leaves: tuple[Tensor, ...], do: Tensor) -> bool:
    try:
        with_backward(call, leaves, do)()
    except Exception as error:
        bench.note(name, error)
        return False
    return True


def tune_fla(bench: Bench) -> None:
    """Let FLA choose its block shapes on a long row: it keeps the choice of the first call for every length."""
    if missing_fla():
        return
    x = Attention.draw(bench.device, 1, bench.cap(32768), 64)
    call = simple_gla(*x.leaves, x.slopes).call
    with torch.no_grad():
        call()
    with_backward(call, x.leaves, x.do)()
