"""megatron-core's MoE layer in the fastest setting that runs without Transformer Engine."""

from __future__ import annotations

import torch
from torch import nn

from mmtrain.parallel.layout import Layout


def megatron_moe(hidden: int, ffn: int, experts: int, top_k: int, capacity: float, layout: Layout) -> nn.Module:
    """The layer on this rank, bf16; its process groups have been made by `mmtrain.parallel.mesh`."""
    from megatron.core import tensor_parallel
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=16, ffn_hidden_size=ffn, moe_ffn_hidden_size=ffn,
        num_moe_experts=experts, moe_router_topk=top_k, moe_token_dispatcher_type="alltoall", moe_aux_loss_coeff=0.01,
        moe_expert_capacity_factor=capacity, moe_pad_expert_input_to_capacity=True, add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, bf16=True, params_dtype=torch.bfloat16,
        tensor_model_parallel_size=layout.tp, expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp, sequence_parallel=layout.tp > 1, gradient_accumulation_fusion=False,
    )  # fmt: skip
    build = get_moe_module_spec(use_te=False, num_experts=experts, moe_grouped_gemm=False)
    return build(config, layer_number=1, pg_collection=get_default_pg_collection()).cuda()
