"""Steps of torchtitan's Llama 3 (0.2): softmax attention alone, dense, a row a document. It rotates whole heads."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmtrain.bench.step_fla import shard
from mmtrain.bench.step_peers import PeerJob
from mmtrain.errors import ConfigError

SETTINGS = "torchtitan 0.2 Llama 3, SDPA (cuDNN, then flash), blocks and loss compiled, torch's fused AdamW, "
ONE = "bf16 autocast over fp32 weights"
SEVERAL = "FSDP2 of bf16 over fp32 parameters, gathered and reduced (fp32) once a step"


def cross_entropy(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """The mean loss in fp32, as torchtitan has it; labels of -100 are left out."""
    return F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten())


class TitanStep:
    """Steps as torchtitan sets them up: autocast on one GPU, FSDP2 on several.

    Raises:
        ConfigError: a shape that torchtitan's model cannot have.
    """

    def __init__(self, job: PeerJob) -> None:
        from torchtitan.models.llama3.model.args import TransformerModelArgs
        from torchtitan.models.llama3.model.model import Transformer

        config = job.config
        filled = config.head_dim * config.num_heads == config.hidden_size
        if not filled or 3 * config.ffn_hidden_size < 8 * config.hidden_size:
            raise ConfigError("--peers", f"titan, {config.name}", "heads must fill its width, and the feed-forward be "
                              "8/3 of it or wider", "give another case")  # fmt: skip
        self.rows = [(one.tokens_BS, one.labels_BS.masked_fill(~one.loss_mask_BS, -100)) for one in job.on_device]
        shape = TransformerModelArgs(
            dim=config.hidden_size, n_layers=config.num_layers, n_heads=config.num_heads,
            n_kv_heads=config.num_kv_heads, vocab_size=config.vocab_size, norm_eps=config.norm_eps,
            multiple_of=config.ffn_hidden_size,  # to which the width of the feed-forward is rounded up
            rope_theta=config.rope_base, max_seq_len=self.rows[0][0].shape[1],
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(job.device), torch.no_grad():
            self.model = Transformer(shape)
            self.model.init_weights()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        layers = list(self.model.layers.values())
        for layer in layers:
            layer.compile(fullgraph=True)
        self.loss = torch.compile(cross_entropy)
        self.several = dist.is_initialized() and dist.get_world_size() > 1
        if self.several:
            shard(self.model, layers)
        self.device = job.device
        fused = job.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=fused
        )
        self.settings = SETTINGS + (SEVERAL if self.several else ONE)

    def __call__(self) -> float:
        """Train one step and return the loss of its last micro-batch."""
        for number, (tokens_BS, labels_BS) in enumerate(self.rows):
            if self.several:
                last = number == len(self.rows) - 1
                self.model.set_requires_gradient_sync(last)
                self.model.set_is_last_backward(last)
                self.model.set_reshard_after_backward(last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.several):
                loss = self.loss(self.model(tokens_BS), labels_BS)
            (loss / len(self.rows)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def close(self) -> None:
        """Nothing is held elsewhere."""
