"""A training step against a reference that shares no code with it: transformers' model, and a naive auxiliary loss.

Layouts are compared with each other elsewhere; what all of them get wrong alike shows here.

Legend: B rows, T tokens of a row, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmtrain.build import build_model, meta_model
from mmtrain.config import ClusterConfig, ParallelConfig
from mmtrain.model.model import ModelInputs
from mmtrain.model.packed_seq import Packing
from mmtrain.parallel import mesh
from mmtrain.parallel.layout import plan_layout
from mmtrain.parallel.parallelize import apply_parallel
from tests.dist.layouts import whole
from tests.dist.pool import Pool
from tests.model.hf_oracle import flat_like_hf, hf_model, hf_name
from tests.model.small import relative, small_config

SEED, ROWS, LENGTH = 7, 2, 24
# A coefficient at which the auxiliary loss is most of the routers' gradients.
CONFIG = small_config(num_layers=2, layer_pattern="LS", num_experts=6, aux_loss_coef=1.0)
WAYS = {
    "one stage": (ParallelConfig(micro_batch_rows=ROWS), 1),
    "over sequences": (ParallelConfig(micro_batch_rows=ROWS, aux_loss_over="sequence"), 1),
    "pipeline": (ParallelConfig(micro_batch_rows=ROWS, pp=2), 2),
    "data and experts": (ParallelConfig(micro_batch_rows=ROWS, ep=2), 2),
    "tensor": (ParallelConfig(micro_batch_rows=ROWS, tp=2), 2),
}


def tokens_BT(batch: int) -> Tensor:
    """The rows of a micro-batch; micro-batches want other experts than each other."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(40 * batch, 40 * batch + 60, (ROWS, LENGTH), generator=generator)


def labels_BT(batch: int) -> Tensor:
    """Next tokens; the second micro-batch has fewer."""
    labels = tokens_BT(batch).roll(-1, 1)
    labels[:, : 8 * batch] = -100
    return labels


LABELLED = sum(int((labels_BT(batch) >= 0).sum()) for batch in (0, 1))


def ours(parallel: ParallelConfig) -> tuple[dict[str, Tensor], float]:
    """Whole gradients of a step of two micro-batches, and its auxiliary loss, as this rank has them."""
    context = mesh.start(ClusterConfig(device="cpu"), plan_layout(mesh.world_size(), parallel, CONFIG, [LENGTH]))
    try:
        model = apply_parallel(meta_model(CONFIG), context, parallel, torch.float32)
        model.initialise(SEED)
        batches = [ModelInputs(tokens_BT(number).flatten(), Packing.from_lengths([LENGTH] * ROWS),
                               labels_BT(number).flatten(), CONFIG.rope_base)
                   for number in range(context.dp_rank, 2, context.dp_size)]  # fmt: skip
        results = list(model.forward_backward(batches, len(batches), torch.tensor([LABELLED])))
        aux = torch.stack([result.out.aux_loss for result in results]).sum() / 2
        return whole(model.module, gradient=True), model.sum_over_ranks(aux).item()
    finally:
        mesh.stop()


def naive_aux(x_NTD: list[Tensor], weight_ED: Tensor) -> Tensor:
    """Mean over parts of coef E/k sum_i f_i m_i, in float64."""
    total = weight_ED.new_zeros((), dtype=torch.float64)
    for x_TD in x_NTD:
        logits = x_TD.double() @ weight_ED.double().T
        chosen = F.one_hot(logits.topk(CONFIG.top_k).indices, CONFIG.num_experts).sum(1).double()
        total = total + (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()
    return total / len(x_NTD) * CONFIG.aux_loss_coef * CONFIG.num_experts / CONFIG.top_k


def theirs(over_sequences: bool) -> tuple[dict[str, Tensor], float]:
    """Gradients of mean cross-entropy plus mean over micro-batches of the auxiliary losses, by transformers' names."""
    oracle = hf_model(build_model(CONFIG, seed=SEED))
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in oracle.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append((args[0], module.gate.weight)))
    loss, aux = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in (0, 1):
        logits = oracle(input_ids=tokens_BT(batch)).logits.flatten(0, 1).double()
        loss = loss + F.cross_entropy(logits, labels_BT(batch).flatten(), reduction="sum") / LABELLED
        for x_BTD, weight_ED in seen:
            parts = list(x_BTD) if over_sequences else [x_BTD.flatten(0, 1)]
            aux = aux + naive_aux(parts, weight_ED) / 2
        seen.clear()
    (loss + aux).backward()
    return {name: parameter.grad for name, parameter in oracle.named_parameters()}, aux.item()


REFERENCES: dict[bool, tuple[dict[str, Tensor], float]] = {}


def reference(over_sequences: bool) -> tuple[dict[str, Tensor], float]:
    if over_sequences not in REFERENCES:
        REFERENCES[over_sequences] = theirs(over_sequences)
    return REFERENCES[over_sequences]


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.slow) if w == "pipeline" else w for w in WAYS])
def test_gradients_of_a_step(pool: Pool, way: str) -> None:
    parallel, world = WAYS[way]
    gradients, aux = reference(parallel.aux_loss_over == "sequence")
    found: dict[str, Tensor] = {}
    for mine, loss in pool.run(ours, parallel, world=world):
        assert loss == pytest.approx(aux, rel=1e-6)
        found.update(mine)
    assert {hf_name(name) for name in found} == gradients.keys()
    for name, gradient in found.items():
        assert relative(flat_like_hf(name, gradient), gradients[hf_name(name)]) < 1e-4, name


def test_the_auxiliary_loss_is_felt_and_is_another_over_sequences() -> None:
    name = hf_name("layers.0.ffn.router.weight")
    assert relative(reference(True)[0][name], reference(False)[0][name]) > 1e-2
    without = hf_model(build_model(replace(CONFIG, aux_loss_coef=0.0), seed=SEED))
    for batch in (0, 1):
        logits = without(input_ids=tokens_BT(batch)).logits.flatten(0, 1)
        (F.cross_entropy(logits, labels_BT(batch).flatten(), reduction="sum") / LABELLED).backward()
    assert relative(reference(False)[0][name], dict(without.named_parameters())[name].grad) > 0.1
