"""A tiny case of the whole-step bench, and our weights under the names of its peers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdata.rows.loader import PackedBatch
from mmtrain.bench.step_cases import Case, batches, model_config
from mmtrain.config import ModelConfig
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing

TINY = ("model.num_layers=2", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16",
        "model.rotary_dim=8", "model.ffn_hidden_size=96", "model.vocab_size=512", "model.post_norm=false")  # fmt: skip


def tiny(pattern: str, *overrides: str, mean_document: int = 0) -> tuple[ModelConfig, list[PackedBatch]]:
    """A pre-norm model, as the peers are, and the two micro-batches of a step."""
    options = (*TINY, f"model.layer_pattern={pattern}", *overrides)
    case = Case("hybrid_410m", options, micro_batches=2, seq_len=128, mean_document=mean_document)
    config = model_config(case)
    return config, batches(case, config.vocab_size, 0)


def our_loss(model: nn.Module, config: ModelConfig, row: PackedBatch) -> Tensor:
    """Our mean loss of a micro-batch."""
    labels_T = row.labels_BS.masked_fill(~row.loss_mask_BS, -100).flatten()
    packing = Packing(row.cu_seqlens, row.position_ids_BS.flatten(), row.max_seqlen)
    output = model(*ModelInputs(row.tokens_BS.flatten(), packing, labels_T, config.rope_base))
    return output.ce_sum / row.loss_mask_BS.sum()


def copy_of(weights: dict[str, Tensor], model: nn.Module) -> None:
    """Fill a peer's model; all of its parameters have to be given, and no others."""
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(weights), set(parameters) ^ set(weights)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name].reshape(parameter.shape))
