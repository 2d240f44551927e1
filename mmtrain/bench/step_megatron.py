"""Steps of megatron-core's GPTModel without Transformer Engine or apex: softmax attention alone, dense or with experts.

Legend: S tokens of a row, B rows, H heads, G key/value heads, K head dimension.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmtrain.bench.step_peers import PeerJob
from mmtrain.config import ModelConfig

SETTINGS = (
    "megatron-core GPTModel, local spec, attention by torch's SDPA (cuDNN), fused SwiGLU, bias-dropout and "
    "cross-entropy, bf16 parameters, its DDP and distributed optimizer with fp32 gradients and main parameters, "
    "torch's fused AdamW"
)
EXPERT_SETTINGS = ", experts one after the other (no grouped GEMM without Transformer Engine), all-to-all dispatcher, "


class FlashAttention(nn.Module):
    """Causal attention of whole rows by torch's SDPA, in the place of megatron-core's unfused one."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """[S, B, H, K] and twice [S, B, G, K] to [S, B, H * K]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        # One alone: an order among several would outlive the `with` (torch 2.11), and slow down the next peer.
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION if query.is_cuda else SDPBackend.MATH):
            o_BHSK = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return o_BHSK.permute(2, 0, 1, 3).flatten(2)


def transformer_config(config: ModelConfig, dtype: torch.dtype, ep: int, on_cpu: bool, graphs: bool) -> Any:
    """megatron-core's options of our model's shape: its residuals are pre-norm."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts: dict[str, Any] = {}
    if config.num_experts:
        experts = {
            "num_moe_experts": config.num_experts, "moe_ffn_hidden_size": config.ffn_hidden_size,
            "moe_router_topk": config.top_k, "moe_token_dispatcher_type": "alltoall",
            "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": config.aux_loss_coef,
            "moe_expert_capacity_factor": config.capacity_factor,
            "moe_pad_expert_input_to_capacity": config.capacity_factor is not None,
        }  # fmt: skip
    return TransformerConfig(
        num_layers=config.num_layers, hidden_size=config.hidden_size, num_attention_heads=config.num_heads,
        num_query_groups=config.num_kv_heads, kv_channels=config.head_dim, ffn_hidden_size=config.ffn_hidden_size,
        normalization="RMSNorm", layernorm_epsilon=config.norm_eps, add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, hidden_dropout=0.0, attention_dropout=0.0, bias_activation_fusion=True,
        bias_dropout_fusion=True, cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="native",
        apply_rope_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
        bf16=dtype == torch.bfloat16, params_dtype=dtype, pipeline_dtype=dtype, expert_model_parallel_size=ep,
        use_cpu_initialization=on_cpu, cuda_graph_impl="full_iteration" if graphs else "none", **experts,
    )  # fmt: skip


def build_model(config: ModelConfig, seq_len: int, transformer: Any) -> nn.Module:
    """GPTModel of our shape, of the local spec with flash attention; process groups have been made."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = get_gpt_layer_local_spec(
        num_experts=config.num_experts or None, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    spec = copy.deepcopy(spec)
    spec.submodules.self_attention.submodules.core_attention = FlashAttention
    return GPTModel(
        transformer, spec, config.vocab_size, seq_len, share_embeddings_and_output_weights=False,
        position_embedding_type="rope", rotary_percent=config.rotary_dim / config.head_dim,
        rotary_base=round(config.rope_base),
    )  # fmt: skip


def mean_loss(loss_mask_BS: Tensor, loss_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the labelled tokens, for the schedule and for the record."""
    loss = (loss_BS.float() * loss_mask_BS).sum() / loss_mask_BS.sum()
    return loss, loss.detach().clone()


def forward_step(rows: Iterator[dict[str, Tensor]], model: nn.Module) -> tuple[Tensor, Any]:
    """The schedule's forward pass of a micro-batch, and what makes a loss of it."""
    row = next(rows)
    loss_BS = model(row["tokens_BS"], row["position_ids_BS"], None, labels=row["labels_BS"])
    return loss_BS, partial(mean_loss, row["loss_mask_BS"])


class MegatronStep:
    """Steps as megatron-core's own training loop makes them, through its schedule.

    One process a GPU; groups of torch.distributed have been made, megatron-core's own are made here. With several GPUs
    gradients are scattered beside backward, and parameters gathered beside forward. Experts are each GPU's own, or with
    `experts_apart` shared out to all GPUs.
    """

    def __init__(self, job: PeerJob) -> None:
        with warnings.catch_warnings():  # on packages that are not here
            warnings.simplefilter("ignore")
            from megatron.core import parallel_state, tensor_parallel
            from megatron.core.distributed import finalize_model_grads
            from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        config, world = job.config, dist.get_world_size()
        ep = world if job.experts_apart and config.num_experts else 1
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(expert_model_parallel_size=ep, create_gloo_process_groups=False)
        on_cpu = job.device.type == "cpu"
        if on_cpu:
            torch.manual_seed(1)
        else:
            tensor_parallel.model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=job.graphs, force_reset_rng=True)
        transformer = transformer_config(config, torch.bfloat16, ep, on_cpu, job.graphs)
        names = ("tokens_BS", "position_ids_BS", "labels_BS", "loss_mask_BS")  # a graph's loader copies dictionaries
        self.rows = [{name: getattr(row, name) for name in names} for row in job.on_device]
        self.rows_shape = tuple(self.rows[0]["tokens_BS"].shape)
        model = build_model(config, self.rows_shape[1], transformer).to(job.device)
        if transformer.bf16:
            from megatron.core.transformer.module import Float16Module

            model = Float16Module(transformer, model)
        self.parameters = _whole(model, ep)
        self.model, self.optimizer = _wrap(model, transformer, overlap=world > 1)
        transformer.finalize_model_grads_func = finalize_model_grads
        if world > 1:
            transformer.no_sync_func = self.model.no_sync
        self.schedule = get_forward_backward_func()
        if job.graphs:
            from megatron.core.full_cuda_graph import FullCudaGraphWrapper

            self.schedule = FullCudaGraphWrapper(self.schedule, cuda_graph_warmup_steps=2)
        self.graphs = job.graphs
        self.settings = SETTINGS + (f"{EXPERT_SETTINGS}EP{ep}" if config.num_experts else "")

    def __call__(self) -> float:
        """Train one step and return the loss of its last micro-batch."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self.schedule(
            forward_step_func=forward_step, data_iterator=iter(self.rows), model=[self.model],
            num_microbatches=len(self.rows), seq_length=self.rows_shape[1], micro_batch_size=self.rows_shape[0],
            forward_only=False,
        )  # fmt: skip
        self.optimizer.step()
        return float(losses[-1])

    def close(self) -> None:
        """Destroy megatron-core's groups and recorded graphs."""
        from megatron.core import parallel_state

        if self.graphs:
            self.schedule.reset_cuda_graph()
        self.model = self.optimizer = self.schedule = None
        parallel_state.destroy_model_parallel()


def _wrap(model: nn.Module, transformer: Any, overlap: bool) -> tuple[Any, Any]:
    """megatron-core's DDP and distributed optimizer, whose AdamW is torch's, fused."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    options = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlap, overlap_param_gather=overlap,
        use_distributed_optimizer=True, average_in_collective=True,
    )  # fmt: skip
    wrapped = DistributedDataParallel(transformer, options, model)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-5, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8, clip_grad=1.0,
            bf16=transformer.bf16, params_dtype=transformer.params_dtype, use_distributed_optimizer=True,
            overlap_param_gather=overlap,
        ),
        [wrapped],
        use_gloo_process_groups=False,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["foreach"], group["fused"] = False, True
    return wrapped, optimizer


def _whole(model: nn.Module, ep: int) -> int:
    """Parameters of the whole model, of whose experts this process may hold a part."""
    return sum(p.numel() * (1 if getattr(p, "allreduce", True) else ep) for p in model.parameters())
