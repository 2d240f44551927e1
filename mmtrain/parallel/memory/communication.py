"""Buffers of communication on a rank that torch allocates: exchanges of experts' rows, context and tensor parallelism.

NCCL's own buffers are no part of it: a margin stands for them.
"""

from __future__ import annotations

from mmtrain.parallel.memory.expert_rows import expert_rows
from mmtrain.parallel.memory.workload import FP32, Workload

CONTEXT_BUDGET = 2**30
"""Bytes that softmax attention across ranks may take for a group of heads (`mmtrain.parallel.context.softmax_cp`)."""


def lasting_buffers(work: Workload) -> float:
    """Bytes held for the whole run: two peer buffers for experts' rows that are read directly, and two for states."""
    rows = expert_rows(work)
    held = 2.0 * rows.sent * work.model.hidden_size * work.compute_bytes if rows.direct else 0.0
    layout = work.layout
    # Ranks of cp lie tp apart; taken to read states directly wherever a host of 8 GPUs could.
    if layout.cp == 1 or layout.cp * layout.tp > 8 or work.parallel.cp_states == "collectives":
        return held
    state = max(work.mixer_memory(letter).state for letter in set(work.model.layer_types))
    return held + 2.0 * state * FP32 * work.parallel.cp_chunks


def mixer_buffers(work: Workload, letter: str) -> float:
    """Bytes that a layer's mixer takes while it runs: states or keys of other ranks, sums over tp."""
    model, layout, memory = work.model, work.layout, work.mixer_memory(letter)
    partial = work.mixer_tokens * model.hidden_size * work.compute_bytes if layout.tp > 1 else 0.0
    if layout.cp == 1:
        return partial
    if memory.attention_output:
        return partial + _softmax_buffers(work)
    return partial + memory.state * FP32 * (layout.cp + 2) * work.parallel.cp_chunks


def _softmax_buffers(work: Workload) -> float:
    """Keys, values and their float32 gradients, for documents of any length: one may fill the row.

    The buffers of `mmtrain.parallel.context.softmax_gather.head_bytes` for one group of heads, or for all heads of one
    rank's tails in the ring.
    """
    model, tokens, size = work.model, work.mixer_tokens, work.compute_bytes
    heads = max(1, model.num_kv_heads // work.layout.tp)
    received, shared = work.row_tokens - tokens // work.parallel.cp_chunks, tokens
    keys = 2 * (received + shared) * size
    grads = (2 * received + (work.layout.cp + 1) * shared) * FP32
    head = 2 * model.head_dim * (keys + grads)
    gather = max(head, min(CONTEXT_BUDGET, heads * head))
    ring = 2 * heads * model.head_dim * shared * (2 * size + 5 * FP32)
    way = work.parallel.cp_softmax
    if way == "ring" or (way == "auto" and head > CONTEXT_BUDGET and ring < head):
        return ring
    # Gradients of queries wait for the local part, in float32, where they fit.
    return gather + min(CONTEXT_BUDGET, tokens * model.inner_size // work.layout.tp * FP32)
