"""Steps of a hybrid built of flash-linear-attention's (FLA's) layers: dense, packed rows, lightning and softmax layers.

FLA's nearest to lightning attention is `chunk_simple_gla` with a constant decay: its `chunk_lightning_attn` is the same
kernels with slopes that are not MiniMax's. Residuals are pre-norm, which FLA's norms fuse.

Legend: T tokens of all rows, D model width, H heads, G key/value heads, K head dimension, I = H * K.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmdata.rows.loader import PackedBatch
from mmtrain.bench.step_peers import PeerJob
from mmtrain.config import ModelConfig
from mmtrain.model.mixers.lightning import decay_slopes

SETTINGS = (
    "FLA {version}: chunk_simple_gla with our slopes, FusedRMSNormGated, RMSNorm with fused residual, GatedMLP with "
    "fused SwiGLU, RotaryEmbedding, FusedLinearCrossEntropyLoss; softmax layers by torch's varlen_attn; "
)
ONE = "bf16 parameters and gradients, torch's fused AdamW over fp32 copies"
SEVERAL = "FSDP2 of bf16 over fp32 parameters, gathered and reduced (fp32) once a step, torch's fused AdamW"


class Rows(NamedTuple):
    """Documents of a micro-batch.

    Attributes:
        bounds: int32 [n + 1] on the device.
        bounds_long: the same, int64, as FLA wants them.
        bounds_host: int64 [n + 1] on the host, so that FLA does not wait for the device.
        longest: tokens of the longest.
    """

    bounds: Tensor
    bounds_long: Tensor
    bounds_host: Tensor
    longest: int


class Lightning(nn.Module):
    """Lightning attention of FLA's kernels: SiLU of q, k and v, constant decay, norm over all heads, sigmoid gate."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        from fla.modules import FusedRMSNormGated

        super().__init__()
        self.head_dim, inner = config.head_dim, config.inner_size
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            nn.Linear(config.hidden_size, inner, bias=False) for _ in range(4)
        )
        self.norm = FusedRMSNormGated(inner, eps=config.lightning_norm_eps, activation="sigmoid")
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.slopes = decay_slopes(config.num_heads, layer, config.num_layers)
        self.gamma_H: Tensor | None = None  # no buffer, so that no cast of the module touches it

    def forward(self, x_1TD: Tensor, rows: Rows) -> Tensor:
        """[1, T, D] to [1, T, D]."""
        from fla.ops.simple_gla import chunk_simple_gla

        if self.gamma_H is None:
            self.gamma_H = -torch.tensor(self.slopes, dtype=torch.float32, device=x_1TD.device)
        heads = (-1, self.head_dim)
        q, k, v = (F.silu(project(x_1TD)).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        o_1THK, _ = chunk_simple_gla(
            q, k, v, scale=1.0, g_gamma=self.gamma_H, cu_seqlens=rows.bounds_long, cu_seqlens_cpu=rows.bounds_host
        )
        return self.o_proj(self.norm(o_1THK.flatten(-2), self.g_proj(x_1TD)))


class Softmax(nn.Module):
    """Grouped-query attention with FLA's RoPE and torch's packed flash attention (FLA's layer wants flash-attn)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        from fla.modules import RotaryEmbedding

        super().__init__()
        self.head_dim = config.head_dim
        key_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.inner_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(config.inner_size, config.hidden_size, bias=False)
        self.rotary = RotaryEmbedding(config.rotary_dim, base=config.rope_base)

    def forward(self, x_1TD: Tensor, rows: Rows) -> Tensor:
        """[1, T, D] to [1, T, D]."""
        heads = (-1, self.head_dim)
        q, k, v = (project(x_1TD).unflatten(-1, heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotary(q, k, max_seqlen=x_1TD.shape[1], cu_seqlens=rows.bounds_long)
        return self.o_proj(packed_attention(q[0], k[0], v[0], rows).flatten(-2)[None])


def packed_attention(q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, rows: Rows) -> Tensor:
    """Causal attention within documents, [T, H, K]: torch's packed flash attention, or SDPA of each on a CPU."""
    if q_THK.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        grouped = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        longest = rows.longest
        return varlen_attn(
            q_THK, k_TGK, v_TGK, rows.bounds, rows.bounds, longest, longest, window_size=(-1, 0), **grouped
        )
    lengths = rows.bounds_host.diff().tolist()
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q_THK, k_TGK, v_TGK)), strict=True)
    found = [F.scaled_dot_product_attention(*document, is_causal=True, enable_gqa=True) for document in documents]
    return torch.cat(found, dim=1).transpose(0, 1)


class Block(nn.Module):
    """A pre-norm layer, whose norms add the residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        from fla.modules import GatedMLP, RMSNorm

        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = (Lightning if config.layer_types[layer] == "L" else Softmax)(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, intermediate_size=config.ffn_hidden_size, fuse_swiglu=True)

    def forward(self, x_1TD: Tensor, residual_1TD: Tensor | None, rows: Rows) -> tuple[Tensor, Tensor]:
        """What is to be added to the residual, and the residual."""
        x_1TD, residual_1TD = self.mixer_norm(x_1TD, residual_1TD, prenorm=True)
        x_1TD, residual_1TD = self.mlp_norm(self.mixer(x_1TD, rows), residual_1TD, prenorm=True)
        return self.mlp(x_1TD), residual_1TD


class FlaModel(nn.Module):
    """The model with its loss, a mean over labelled tokens."""

    def __init__(self, config: ModelConfig) -> None:
        from fla.modules import FusedLinearCrossEntropyLoss, RMSNorm

        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss = FusedLinearCrossEntropyLoss()
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_1T: Tensor, labels_1T: Tensor, rows: Rows) -> Tensor:
        """The mean loss; labels of -100 are left out."""
        x_1TD, residual_1TD = self.embedding(tokens_1T), None
        for layer in self.layers:
            x_1TD, residual_1TD = layer(x_1TD, residual_1TD, rows)
        return self.loss(self.norm(x_1TD, residual_1TD), labels_1T, self.lm_head.weight)


class FlaStep:
    """Steps of the model: on one GPU with bf16 parameters, whose fp32 copies AdamW updates; on several under FSDP2."""

    def __init__(self, job: PeerJob) -> None:
        import fla

        self.several = dist.is_initialized() and dist.get_world_size() > 1
        torch.manual_seed(0)
        with torch.device(job.device):
            self.model = FlaModel(job.config)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        if job.compiled:
            for layer in self.model.layers:
                layer.compile()
        if self.several:
            shard(self.model, self.model.layers)
            self.weights = list(self.model.parameters())
        else:
            self.weights = [nn.Parameter(p.detach().clone()) for p in self.model.parameters()]
            self.model.bfloat16()
        fused = job.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
        self.rows = [_inputs(one, job.device) for one in job.micro_batches]
        way = SEVERAL if self.several else ONE
        self.settings = SETTINGS.format(version=fla.__version__) + way + (", blocks compiled" if job.compiled else "")

    def __call__(self) -> float:
        """Train one step and return the loss of its last micro-batch."""
        for number, row in enumerate(self.rows):
            if self.several:
                last = number == len(self.rows) - 1
                self.model.set_requires_gradient_sync(last)
                self.model.set_is_last_backward(last)
                self.model.set_reshard_after_backward(last)
            loss = self.model(*row)
            (loss / len(self.rows)).backward()
        parameters = list(self.model.parameters())
        if not self.several:
            for weight in self.weights:
                weight.grad = torch.empty_like(weight)
            torch._foreach_copy_([w.grad for w in self.weights], [p.grad for p in parameters])
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.several:
            with torch.no_grad():
                torch._foreach_copy_(parameters, self.weights)
            self.model.zero_grad(set_to_none=True)
        return loss.item()

    def close(self) -> None:
        """Nothing is held elsewhere."""


def shard(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Put a model under FSDP2, a group a layer; weights stay gathered in bf16 from the first forward of a step on."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": False}
    for layer in layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)


def _inputs(row: PackedBatch, device: torch.device) -> tuple[Tensor, Tensor, Rows]:
    labels_BS = row.labels_BS.masked_fill(~row.loss_mask_BS, -100)
    bounds = row.cu_seqlens.to(device)
    rows = Rows(bounds, bounds.long(), row.cu_seqlens.long(), row.max_seqlen)
    return row.tokens_BS.reshape(1, -1).to(device), labels_BS.reshape(1, -1).to(device), rows
