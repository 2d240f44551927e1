"""Argument checks of the public functions. They run before any work and never wait for a GPU by themselves.

Shape letters: B batch rows, T tokens, H heads, D width of q and k, E width of v, N documents (or batch rows).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from mmkernels.common.errors import KernelArgumentError

INPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and accumulation for an input dtype: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_attention(
    q_BTHD: Tensor,
    k_BTHD: Tensor,
    v_BTHE: Tensor,
    slopes_H: Tensor,
    cu_seqlens: Tensor | None,
    initial_state_NHDE: Tensor | None,
    check_values: bool | None,
    row_state: bool = False,
) -> None:
    """Refuse arguments of ``lightning_attention`` that do not fit together.

    Args:
        q_BTHD: queries; their dtype, device and shape decide.
        k_BTHD: keys.
        v_BTHE: values.
        slopes_H: decay slopes.
        cu_seqlens: document offsets or None.
        initial_state_NHDE: states before the first tokens or None.
        check_values: whether to read the values of ``slopes`` and ``cu_seqlens``, which waits for the device when
            they live on one; None means on CPU only.
        row_state: states belong to the packed row, not to its documents.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_qkv({"q_BTHD": q_BTHD, "k_BTHD": k_BTHD, "v_BTHD": v_BTHE}, "[B, T, H, D]", 4)
    values = check_values if check_values is not None else q_BTHD.device.type == "cpu"
    _check_slopes(slopes_H, q_BTHD, values)
    rows = q_BTHD.shape[0]
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, q_BTHD, values)
        rows = 1 if row_state else cu_seqlens.shape[0] - 1
    if initial_state_NHDE is not None:
        shape = (rows, q_BTHD.shape[2], q_BTHD.shape[3], v_BTHE.shape[3])
        _check_state("initial_state", initial_state_NHDE, shape, q_BTHD)


def check_projection(qkv_BTHX: Tensor, slopes_H: Tensor, cu_seqlens: Tensor | None, check_values: bool | None) -> None:
    """Refuse arguments of ``silu_lightning_attention`` that do not fit together.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_tensor("qkv_BTHX", qkv_BTHX, 4, "[B, T, H, 3K]")
    if qkv_BTHX.dtype not in INPUT_DTYPES:
        raise KernelArgumentError("qkv_BTHX", f"dtype {qkv_BTHX.dtype}", "float32, bfloat16, float16 or float64")
    if qkv_BTHX.shape[3] % 3:
        raise KernelArgumentError("qkv_BTHX", f"shape {list(qkv_BTHX.shape)}", "a last dimension of 3 times the head's")
    values = check_values if check_values is not None else qkv_BTHX.device.type == "cpu"
    _check_slopes(slopes_H, qkv_BTHX, values)
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, qkv_BTHX, values)


def check_chunks(
    q_1THD: Tensor, v_1THE: Tensor, cu_seqlens: Tensor, initial_NHDE: Tensor, check_values: bool | None
) -> None:
    """Refuse states of chunks that do not cut the row evenly, or chunks in which no document begins.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_tensor("initial_NHDE", initial_NHDE, 4, "[N, H, D, E]")
    tokens, chunks = q_1THD.shape[1], initial_NHDE.shape[0]
    if chunks < 1 or tokens % chunks:
        raise KernelArgumentError("initial_NHDE", f"{chunks} chunks", f"a divisor of the {tokens} tokens")
    _check_state("initial_NHDE", initial_NHDE, (chunks, q_1THD.shape[2], q_1THD.shape[3], v_1THE.shape[3]), q_1THD)
    values = check_values if check_values is not None else q_1THD.device.type == "cpu"
    if values and tokens and not set(range(0, tokens, tokens // chunks)) <= set(cu_seqlens.tolist()):
        got = f"offsets without an edge of a chunk of {tokens // chunks} tokens"
        raise KernelArgumentError("cu_seqlens", got, "a document's part that begins with every chunk")


def check_chunk_gradients(
    inputs: tuple[Tensor, Tensor, Tensor],
    do_1THE: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    raw: tuple[Tensor, Tensor, Tensor] | None,
) -> None:
    """Refuse tensors of ``chunks_backward`` whose shape, dtype or device is not that of q, k and v.

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    pairs = [("do_1THE", do_1THE, inputs[2])]
    pairs += [(f"grads[{i}]", x, inputs[i]) for i, x in enumerate(grads)]
    pairs += [(f"raw[{i}]", x, inputs[i]) for i, x in enumerate(raw or ())]
    for name, x, like in pairs:
        if (x.shape, x.dtype, x.device) != (like.shape, like.dtype, like.device):
            got, want = ([list(y.shape), y.dtype, str(y.device)] for y in (x, like))
            raise KernelArgumentError(name, got, f"shape, dtype and device {want}")
    for i, x in enumerate(grads):
        if x.numel() and x.stride(3) != 1:
            raise KernelArgumentError(f"grads[{i}]", f"strides {x.stride()}", "a last stride of 1")


def check_states(states_MHDE: Tensor, slopes_H: Tensor, chunks: int, steps: Tensor) -> None:
    """Refuse states that are not those of the plan's chunks (shapes, dtypes and devices only).

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_tensor("states_MHDE", states_MHDE, 4, "[M, H, D, E]")
    if states_MHDE.shape[0] != chunks:
        raise KernelArgumentError("states_MHDE", f"{states_MHDE.shape[0]} states", f"those of {chunks} chunks")
    if states_MHDE.dtype not in (torch.float32, torch.float64):
        raise KernelArgumentError("states_MHDE", f"dtype {states_MHDE.dtype}", "float32 or float64")
    if steps.device != states_MHDE.device:
        raise KernelArgumentError("plan", f"device {steps.device}", f"the device of the states, {states_MHDE.device}")
    _check_slopes(slopes_H, states_MHDE.transpose(1, 2), values=False)


def check_decode(
    q_BHD: Tensor, k_BHD: Tensor, v_BHE: Tensor, slopes_H: Tensor, state_BHDE: Tensor, slots_B: Tensor | None = None
) -> None:
    """Refuse arguments of ``lightning_decode_step`` that do not fit together (shapes, dtypes and devices only).

    Raises:
        KernelArgumentError: names the argument, what it was, and what is allowed.
    """
    _check_qkv({"q_BHD": q_BHD, "k_BHD": k_BHD, "v_BHD": v_BHE}, "[B, H, D]", 3)
    _check_slopes(slopes_H, q_BHD, values=False)
    states = q_BHD.shape[0]
    if slots_B is not None:
        _check_tensor("slots_B", slots_B, 1, "[B]")
        _check_tensor("state_BHDE", state_BHDE, 4, "[states, H, D, E]")
        if slots_B.dtype != torch.int64 or slots_B.shape[0] != states or slots_B.device != q_BHD.device:
            got = f"{slots_B.dtype} {list(slots_B.shape)} on {slots_B.device}"
            raise KernelArgumentError("slots_B", got, f"int64 [{states}] on {q_BHD.device}")
        states = state_BHDE.shape[0]
    _check_state("state_BHDE", state_BHDE, (states, *q_BHD.shape[1:], v_BHE.shape[-1]), q_BHD)


def _check_tensor(name: str, value: object, ndim: int, layout: str) -> None:
    if not isinstance(value, Tensor):
        raise KernelArgumentError(name, type(value).__name__, f"a tensor {layout}")
    if value.ndim != ndim:
        raise KernelArgumentError(name, f"shape {list(value.shape)}", f"{ndim} dimensions {layout}")


def _check_qkv(inputs: dict[str, Tensor], layout: str, ndim: int) -> None:
    """Q decides: k must have its shape, v all but the last dimension, both its dtype and device."""
    (q_name, q), (k_name, k), (v_name, v) = inputs.items()
    for name, x in inputs.items():
        _check_tensor(name, x, ndim, layout)
        if x.dtype not in INPUT_DTYPES:
            raise KernelArgumentError(name, f"dtype {x.dtype}", "float32, bfloat16, float16 or float64")
        if x.dtype != q.dtype:
            raise KernelArgumentError(name, f"dtype {x.dtype}", f"the dtype of {q_name}, {q.dtype}")
        if x.device != q.device:
            raise KernelArgumentError(name, f"device {x.device}", f"the device of {q_name}, {q.device}")
    if k.shape != q.shape:
        raise KernelArgumentError(k_name, f"shape {list(k.shape)}", f"the shape of {q_name}, {list(q.shape)}")
    if v.shape[:-1] != q.shape[:-1]:
        want = f"the shape of {q_name} but for the last dimension, {list(q.shape[:-1])} + [any]"
        raise KernelArgumentError(v_name, f"shape {list(v.shape)}", want)


def _check_slopes(slopes_H: Tensor, q: Tensor, values: bool) -> None:
    heads = q.shape[-2]
    _check_tensor("slopes_H", slopes_H, 1, "[H]")
    if slopes_H.dtype not in (torch.float32, torch.float64):
        raise KernelArgumentError("slopes_H", f"dtype {slopes_H.dtype}", "float32 or float64")
    if slopes_H.shape[0] != heads:
        raise KernelArgumentError("slopes_H", f"shape {list(slopes_H.shape)}", f"one slope per head of q, [{heads}]")
    if slopes_H.device != q.device:
        raise KernelArgumentError("slopes_H", f"device {slopes_H.device}", f"the device of q, {q.device}")
    if slopes_H.requires_grad:
        raise KernelArgumentError("slopes_H", "requires_grad=True", "slopes without gradient (they are constants)")
    if values and heads and not bool(torch.isfinite(slopes_H).all() & (slopes_H >= 0).all()):
        raise KernelArgumentError("slopes_H", f"smallest value {slopes_H.min().item()}", "finite slopes >= 0")


def _check_cu_seqlens(cu_seqlens: Tensor, q_BTHD: Tensor, values: bool) -> None:
    _check_tensor("cu_seqlens", cu_seqlens, 1, "[N+1]")
    rows, tokens = q_BTHD.shape[:2]
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise KernelArgumentError("cu_seqlens", f"dtype {cu_seqlens.dtype}", "int32 or int64")
    if cu_seqlens.shape[0] < 2:
        raise KernelArgumentError("cu_seqlens", f"shape {list(cu_seqlens.shape)}", "[N+1] with at least one document")
    if cu_seqlens.device != q_BTHD.device:
        raise KernelArgumentError("cu_seqlens", f"device {cu_seqlens.device}", f"the device of q, {q_BTHD.device}")
    if rows != 1:
        raise KernelArgumentError("cu_seqlens", f"offsets with batch {rows}", "packed rows flattened to batch 1")
    if not values:
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise KernelArgumentError("cu_seqlens", f"first offset {offsets[0]}", "0")
    for lo, hi in pairwise(offsets):
        if hi < lo:
            raise KernelArgumentError("cu_seqlens", f"offset {hi} after {lo}", "offsets that never decrease")
    if offsets[-1] != tokens:
        raise KernelArgumentError("cu_seqlens", f"last offset {offsets[-1]}", f"the number of tokens T = {tokens}")


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    _check_tensor(name, state, 4, "[N or B, H, D, E]")
    if tuple(state.shape) != shape:
        raise KernelArgumentError(name, f"shape {list(state.shape)}", f"[documents or rows, H, D, E] = {list(shape)}")
    if state.dtype != state_dtype(q.dtype):
        raise KernelArgumentError(name, f"dtype {state.dtype}", f"{state_dtype(q.dtype)} for inputs of {q.dtype}")
    if state.device != q.device:
        raise KernelArgumentError(name, f"device {state.device}", f"the device of q, {q.device}")
