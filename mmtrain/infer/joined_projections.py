"""The two projections of a lightning layer's input as one product, for decode steps.

A decode step waits for the weights. The product of 64 tokens of `hybrid_7b` by W_qkv (12,288 x 4,096) has tiles for 96
of the 132 multiprocessors of an H200, and the one by W_gate (4,096 x 4,096) for fewer: 28.5 us and 12.5 a layer, where
the bytes need 32 together at the rate of a copy. One product of all 16,384 rows takes 35.6.

The weights stay two parameters, which lie one after the other in one tensor: names, state dicts and bytes are as they
were. Whether they lie so is seen anew in each call, from where they are: after a copy or a cast of the model, which
parts them, there are two products again.

Legend: T tokens, D model width, E rows of both weights, I rows of W_gate, N = 3 I rows of W_qkv.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmtrain.model.linear import Linear
from mmtrain.model.mixers.lightning import LightningAttention, project_apart

MOST_TOKENS = 512
"""Tokens of a row whose projections are one product: those of decode steps, and of these with short pieces of prompts.
Products of more wait for the tensor cores, which each keeps busy alone, and what reads columns of a joined result would
read gigabytes with gaps."""


@torch.no_grad()
def join_projections(model: nn.Module) -> None:
    """Lay the weights of each lightning layer's two projections one after the other, and compute both in one product.

    One layer after the other: beside the model, memory must hold the two weights of one. Layers whose projections are
    of another kind, as int8 ones are, stay as they are.

    Args:
        model: on its device, in the dtype that it is served in, with plain tensors as parameters. No gradient is asked
            of it.
    """
    for module in model.modules():
        if isinstance(module, LightningAttention) and _plain(module.qkv_proj, module.output_gate):
            _lay_end_to_end(module.qkv_proj.weight, module.output_gate.weight)
            module.project = project_at_once


def project_at_once(qkv_proj: Linear, output_gate: Linear, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return W_qkv x, [T, N], and W_gate x, [T, I]: columns of one tensor, if tokens are few and the weights together.

    No gradient goes through the one product: where one may be asked for, there are two.
    """
    both_ED = None
    if x_TD.shape[0] <= MOST_TOKENS and not torch.is_grad_enabled() and _plain(qkv_proj, output_gate):
        both_ED = end_to_end(qkv_proj.weight, output_gate.weight)
    if both_ED is None:
        return project_apart(qkv_proj, output_gate, x_TD)
    qkv_TN, gate_TI = F.linear(x_TD, both_ED).split([len(qkv_proj.weight), len(output_gate.weight)], dim=-1)
    return qkv_TN, gate_TI


def end_to_end(first_ND: Tensor, second_ID: Tensor) -> Tensor | None:
    """Return two matrices as one, [E, D], in their memory; None unless the second's rows follow the first's there."""
    alike = first_ND.dtype == second_ID.dtype and first_ND.shape[1] == second_ID.shape[1]
    whole = first_ND.is_contiguous() and second_ID.is_contiguous()
    storages = [one.untyped_storage().data_ptr() for one in (first_ND, second_ID)]
    follows = second_ID.storage_offset() == first_ND.storage_offset() + first_ND.numel()
    if not (alike and whole and storages[0] == storages[1] and follows):
        return None
    return first_ND.detach().as_strided((len(first_ND) + len(second_ID), first_ND.shape[1]), first_ND.stride())


def _plain(*modules: nn.Module) -> bool:
    return all(type(module) is Linear for module in modules)


def _lay_end_to_end(first: nn.Parameter, second: nn.Parameter) -> None:
    if end_to_end(first, second) is None:
        first.data, second.data = torch.cat([first.data, second.data]).split([len(first), len(second)])
