"""The step that lays a model over processes for inference: the same parts of the same parameters as in training."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

from torch import nn
from torch.distributed.tensor import DTensor

from mmtrain.model.model import HybridLM
from mmtrain.model.moe.layer import MoE
from mmtrain.parallel.dtensor_params import local_tensor
from mmtrain.parallel.expert.expert_parallel import place_experts
from mmtrain.parallel.mesh import ParallelContext
from mmtrain.parallel.serving.own_experts import OwnExperts
from mmtrain.parallel.serving.same_tokens import GatheredHead, SameTokensLookup, SameTokensRegion
from mmtrain.parallel.tensor.tensor_parallel import first_row, place_over_tp


def lay_out_for_inference(model: HybridLM, context: ParallelContext) -> None:
    """Split a (meta) model's weights over tp, and its experts' over ep and etp; all ranks get the same tokens.

    Parameters that are split are DTensors then, so that checkpoints of any layout are read into them;
    :func:`keep_own_parts` makes them plain again. Nothing is sharded over replicas: a layer has no time to gather them.
    The model gives logits and hidden states; it has no loss any more.
    """
    layout = context.layout
    if layout.tp > 1:
        mesh = context.dense["tp"]
        group = mesh.get_group()
        place_over_tp(model, mesh, SameTokensRegion(group))
        model.embed_tokens.lookup = SameTokensLookup(first_row(model.config.vocab_size, mesh), group)
        model.lm_head = GatheredHead(model.lm_head, model.config.vocab_size, group)
        model.token_loss, model.label_score = partial(_no_loss), partial(_no_loss)
    if layout.ep * layout.etp > 1:
        axes = context.expert["ep", "etp"]
        call = OwnExperts(axes["ep"].get_local_rank(), layout.ep, axes._flatten("own_experts").get_group())
        for block in model.layers:
            assert isinstance(block.ffn, MoE)
            place_experts(block.ffn.experts, axes)
            block.ffn.experts.call = call


def keep_own_parts(model: nn.Module) -> None:
    """Make every parameter the plain tensor that is this rank's part of it, in the same memory."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                module.register_parameter(name, nn.Parameter(local_tensor(parameter), parameter.requires_grad))


def _no_loss(*arguments: Any) -> NoReturn:
    raise RuntimeError("a model that is laid out for inference over several ranks has no loss")
