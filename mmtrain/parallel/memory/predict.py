"""The peak of a device's memory in a step, found by walking through the moments of a step at which it may be.

A moment is what lives at one time: weights and optimizer always, activations that grow through forward and shrink
through backward, gradients that grow through backward, and the buffers of the work at hand. The peak is the largest
moment of the worst rank. Bytes are those that torch's allocator hands out (`memory_gib` in metrics); what CUDA, NCCL
and fragmentation take besides is the margin (:func:`margin_bytes`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmtrain.model.mixers.registry import SOFTMAX
from mmtrain.parallel.layout import BUCKET_ELEMENTS
from mmtrain.parallel.memory.activations import AROUND_ATTENTION, layer_activations
from mmtrain.parallel.memory.communication import lasting_buffers, mixer_buffers
from mmtrain.parallel.memory.eyes import EyesMemory, eyes_memory
from mmtrain.parallel.memory.trained import TrainedShares
from mmtrain.parallel.memory.workload import (
    FP32,
    Parameters,
    Workload,
    layer_parameters,
    root_parameters,
    stage_layers,
)

GIB = 2**30
PARTS = ("parameters", "optimizer", "gradients", "gathered", "block inputs", "mixers", "feed-forward", "norms",
         "images", "loss", "communication", "transient")  # fmt: skip
"""Parts of a prediction, in the order of the table."""
WORKSPACE = 96 * 2**20
"""Bytes of cuBLAS workspaces, tables of positions and other small things. Ours: to be measured."""
CONTEXT_GIB, NCCL_GIB, FRAGMENTS = 0.7, 2.3, 0.03
"""Memory that torch's allocator does not hand out: of CUDA and loaded kernels, of NCCL's channels (2.3 GiB for the
first all-to-all at 64 channels: `mmtrain/bench/results/2026-11-22-moe-h200x4/nccl.md`), and the share that lies in
fragments. The first and the last are ours: to be measured."""


@dataclass(frozen=True)
class MemoryPrediction:
    """Peak of the worst rank.

    Attributes:
        parts: bytes at the peak, by PARTS.
        moment: when it is.
    """

    parts: Mapping[str, float]
    moment: str

    @property
    def peak(self) -> float:
        """Bytes that torch's allocator has handed out at the peak."""
        return sum(self.parts.values())

    @property
    def gib(self) -> float:
        """The peak in GiB."""
        return self.peak / GIB


def margin_bytes(peak: float, world: int) -> float:
    """Bytes that a device needs beside those of the prediction: CUDA's context, NCCL, fragments."""
    return (CONTEXT_GIB + (NCCL_GIB if world > 1 else 0.0)) * GIB + FRAGMENTS * peak


def predict(work: Workload) -> MemoryPrediction:
    """Predict the peak of the worst rank of a phase."""
    moments = (moment for rank in range(work.layout.pp) for moment in _Rank(work, rank).moments())
    name, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    return MemoryPrediction({part: parts.get(part, 0.0) for part in PARTS}, name)


def peak_with_layers(work: Workload, pp_rank: int, letters: str) -> float:
    """Predict the bytes at the peak of one rank of a pipeline if it held layers of these kinds, first to last."""
    return max(sum(parts.values()) for _, parts in _Rank(work, pp_rank, letters).moments())


class _Rank:
    """The moments of one rank of a pipeline (or the only one), with layers of these kinds; none: those that it has."""

    def __init__(self, work: Workload, pp_rank: int, letters: str = "") -> None:
        self.work, layout = work, work.layout
        kinds_of = work.model.layer_types
        numbers = [] if letters else [layer for part in stage_layers(work, pp_rank) for layer in part]
        self.letters = list(letters) or [kinds_of[layer] for layer in numbers]
        kinds = sorted(set(self.letters))
        self.layer = {letter: layer_parameters(work.model, layout, letter) for letter in kinds}
        self.activations = {letter: layer_activations(work, letter) for letter in kinds}
        self.first, self.last = pp_rank == 0, pp_rank == layout.pp - 1
        self.eyes = eyes_memory(work) if self.first else EyesMemory()
        self.root = root_parameters(work.model, layout, self.first, self.last) + self.eyes.ends
        self._take_frozen(numbers)
        self.flights = micro_batches_in_flight(work, pp_rank)
        # Gathering and reducing take a flat buffer besides, but for ranks that are alone.
        self.flat = 1 if layout.replicas == layout.edp == 1 else 2

    def _take_frozen(self, numbers: Sequence[int]) -> None:
        """Find what is trained of each layer, of embedding and head, and the first layer that backward comes to.

        Layers without numbers, which are tried out for a rank, count as trained.
        """
        self.trained = [self.layer[letter] for letter in self.letters]
        self.root_trained, self.table_trained, self.lowest = self.root, self._table, 0
        if not self.work.frozen:
            return
        shares = TrainedShares(self.work.model, self.work.frozen)
        self.trained = [shares.layer(n, self.trained[i]) for i, n in enumerate(numbers)] or self.trained
        self.table_trained = shares.end("lm_head", self._table)
        embedding = self.first * shares.end("embed_tokens", self._table)
        head = self.last * (self.table_trained + shares.end("norm", self.work.model.hidden_size))
        self.root_trained = Parameters(embedding + head, 0) + self.eyes.ends_trained
        # Other stages get hidden states that want a gradient, and so does this one from eyes that are trained.
        if self.first and not embedding and not self._eyes_trained.whole:
            found = (i for i, parameters in enumerate(self.trained) if parameters.whole)
            self.lowest = next(found, len(self.trained))

    def moments(self) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Every moment: its name, and bytes by part."""
        for last in (False, True) if self.work.micro_batches > 1 else (True,):
            yield from self._micro_batch(last)
        held = self._lasting()
        if not (self.work.host_optimizer or self.work.keeps_whole):
            held["gradients"] += FP32 * self._all_trained.sharded(self.work.layout)
        yield "the optimizer's step", held

    @property
    def _all(self) -> Parameters:
        return sum((self.layer[letter] for letter in self.letters), self.root + self.eyes.tower)

    @property
    def _all_trained(self) -> Parameters:
        return sum(self.trained, self.root_trained + self.eyes.tower_trained)

    @property
    def _eyes_trained(self) -> Parameters:
        return self.eyes.tower_trained + self.eyes.ends_trained

    def _lasting(self) -> Counter[str]:
        """What lives from step to step."""
        work, held = self.work, Counter[str]()
        if not work.host_optimizer:
            held["parameters"] = FP32 * self._all.sharded(work.layout)
            held["optimizer"] = 2 * FP32 * self._all_trained.sharded(work.layout)
        held["gathered"] = work.compute_bytes * (self.root.whole + work.keeps_gathered * self.eyes.tower.whole)
        held["communication"] = lasting_buffers(work)
        if work.keeps_whole:
            self._add_whole(held)
        held["transient"] = WORKSPACE + work.row_tokens * 25 + work.mixer_tokens * work.model.rotary_dim * FP32
        if work.records_graphs:
            held["transient"] += self._beside_graphs() * work.mixer_tokens * work.compute_bytes
        return held

    def _add_whole(self, held: Counter[str]) -> None:
        """Add copies of all parameters and sums of gradients; several ranks exchange them, one shares its own."""
        work, whole, ranks = self.work, self._all.whole, self.work.layout.replicas
        trained = self._all_trained
        if ranks == 1:
            held["gathered"] = work.compute_bytes * whole if work.compute_bytes != FP32 else 0.0
            held["gradients"] = FP32 * trained.whole
        else:
            held["gathered"] = work.compute_bytes * whole
            held["gradients"] = FP32 * (trained.whole + trained.sharded(work.layout))
            buffers = min(BUCKET_ELEMENTS, trained.whole) * (1 if trained.whole <= BUCKET_ELEMENTS else 2)
            held["communication"] += FP32 * buffers * (1 + 1 / ranks)

    def _beside_graphs(self) -> int:
        """Elements a token that graphs hold besides: the embeddings, and what lies around softmax attention.

        Of each softmax layer a copy of attention's result, its gradient and the residual's. Once the gradients of q, k
        and v; and the scratch memory of attention, which is in no graph and shares none of theirs.
        """
        model, count = self.work.model, self.letters.count(SOFTMAX.letter)
        if not count:
            return model.hidden_size
        gradients = model.inner_size + 2 * model.num_kv_heads * model.head_dim
        scratch = SOFTMAX.memory_on(model, 1).recorded_backward
        return count * (2 * model.inner_size + model.hidden_size) + gradients + scratch + model.hidden_size

    def _micro_batch(self, last: bool) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Moments of the backward pass of the oldest micro-batch in flight, the last of a step or an earlier one."""
        work, size = self.work, self.work.compute_bytes
        reduces = (last or work.parallel.sync_every_micro_batch) and not work.zero_bubble
        offloads = work.parallel.offloads
        per_layer = [Counter(self.activations[letter].kept(self._policy(letter), offloads(number)))
                     if number >= self.lowest else Counter() for number, letter in enumerate(self.letters)]  # fmt: skip
        all_kept = sum(per_layer, Counter[str]())
        others = Counter({part: (self.flights - 1) * value for part, value in all_kept.items()})
        held = self._lasting()
        if work.parallel.offload_block_inputs:
            held["block inputs"] += self.activations[self.letters[0]].block_input  # on its way, beside the one at work
        held += others
        held += self._stage_outputs()
        held["images"] += self.flights * self.eyes.kept
        if self.last:
            yield from self._loss(held + all_kept, last)
            held["gradients"] += 0 if work.keeps_whole else size * self.table_trained  # until the stage's end
        whole, trained = [self.layer[letter] for letter in self.letters], self.trained
        for number in range(len(self.letters) - 1, self.lowest - 1, -1):
            letter, own = self.letters[number], trained[number]
            before = sum(per_layer[:number], Counter[str]())
            now = held + before
            now["gradients"] += self._gradients(trained[:number], trained[number + 1 :], last, reduces)
            if work.keeps_whole:  # products add to the sums, but for those of experts
                now["gradients"] += size * own.experts
            else:
                now["gradients"] += size * own.whole + (FP32 * own.whole if self.flat > 1 or not reduces else 0)
            now["gathered"] += self._gathered(whole[: number + 1], whole[number], last)
            yield from self._layer(f"backward of layer {number + 1} of {len(self.letters)} ({letter})", now, letter)
        if self.lowest:
            below = held + Counter({"gathered": self._gathered(whole, self._largest, last)})
            yield from self._layer("forward of the frozen layers", below, self.letters[0])
        yield from self._eyes_backward(held, last, reduces)
        if work.keeps_whole:
            return
        root = self.root_trained.whole
        held["gradients"] += self._gradients([], [*trained, self.eyes.tower_trained], last, reduces) + size * (
            root - self.last * self.table_trained
        )
        held["gradients"] += FP32 * root * (1 + (1 / work.layout.replicas if reduces else 0))
        yield "reduction of the embedding's gradient", held

    def _eyes_backward(
        self, held: Counter[str], last: bool, reduces: bool
    ) -> Iterator[tuple[str, Mapping[str, float]]]:
        """The backward pass of a layer of the eyes, or its forward pass where they are frozen."""
        work, eyes, size = self.work, self.eyes, self.work.compute_bytes
        if not eyes.kept:
            return
        now = held + Counter({"images": eyes.at_work})
        if not work.keeps_whole:
            now["gradients"] += self._gradients([eyes.tower_trained], self.trained, last, reduces)
            own = eyes.layer.whole if eyes.tower_trained.whole else 0
            now["gradients"] += size * own + FP32 * own + size * self.root_trained.whole
            now["gathered"] += 0 if work.keeps_gathered else self.flat * size * eyes.layer.whole
        yield "backward of the eyes", now

    def _layer(self, name: str, held: Counter[str], letter: str) -> Iterator[tuple[str, Mapping[str, float]]]:
        """The two halves of a layer's backward: all of its activations are there, computed again if need be."""
        found = self.activations[letter]
        half = held + Counter(found.whole)
        half["transient"] += found.feed_forward_backward
        yield f"{name}, feed-forward", half
        half = held + Counter(
            {"block inputs": found.block_input, "mixers": found.mixer, "norms": found.mixer_input,
             "communication": mixer_buffers(self.work, letter)}
        )  # fmt: skip
        half["transient"] += found.mixer_backward
        yield f"{name}, mixer", half

    def _loss(self, held: Counter[str], last: bool) -> Iterator[tuple[str, Mapping[str, float]]]:
        """Forward and backward of the head, whose gradients are made in forward."""
        work, size = self.work, self.work.compute_bytes
        hidden, gathered = (n * work.model.hidden_size * size for n in (work.own_tokens, work.mixer_tokens))
        chunk = min(work.model.loss_chunk_tokens, work.mixer_tokens)
        logits = chunk * (-(-work.model.vocab_size // work.layout.tp) + work.model.hidden_size) * size
        held = held + Counter()
        held["gradients"] += self._gradients(self.trained, [], last, False)
        held["gathered"] += self._gathered([self.layer[letter] for letter in self.letters], self._largest, last)
        held["norms"] += 2 * hidden  # before and after the last norm
        table = 0 if work.keeps_whole else self.table_trained  # products add to the sum of its gradients
        forward = held + Counter({"loss": FP32 * table + gathered + logits})
        yield "forward of the loss", forward
        yield "backward of the loss", held + Counter({"loss": (FP32 + size) * table + 2 * hidden})

    def _stage_outputs(self) -> Counter[str]:
        """Hidden states that the stages of a pipeline pass on, kept by its schedule."""
        if self.work.layout.pp == 1:
            return Counter()
        hidden = self.work.own_tokens * self.work.model.hidden_size * self.work.compute_bytes
        return Counter({"communication": (self.flights + 2) * hidden})

    def _gradients(self, before: list[Parameters], after: list[Parameters], last: bool, reduces: bool) -> float:
        """Bytes of gradients of layers that are still to be differentiated in this micro-batch, and of those done."""
        work = self.work
        if work.keeps_whole:  # their sums are among what lasts
            return 0.0
        zero = Parameters(0, 0)
        todo, done = sum(before, zero), sum(after, zero)
        several, root = work.micro_batches > 1, self.root_trained + self.eyes.tower_trained
        if work.zero_bubble or (work.accumulates and not last):
            found = done.whole + ((todo.whole + root.whole) if several else 0)
        elif work.accumulates:
            found = todo.whole + root.whole + self._on_device(done)
        else:
            found = self._on_device(done) + (self._on_device(todo + root) if several else 0)
        return FP32 * found

    def _on_device(self, parameters: Parameters) -> float:
        """Elements of sharded gradients that stay on the device."""
        return 0.0 if self.work.host_optimizer else parameters.sharded(self.work.layout)

    def _gathered(self, todo: list[Parameters], own: Parameters, last: bool) -> float:
        """Bytes of gathered parameters of blocks, with a layer at work and, where they come from others, the next."""
        size = self.work.compute_bytes
        if self.work.keeps_whole:  # all of them are, and last
            return 0.0
        if not self.work.keeps_gathered:
            return self.flat * size * own.whole
        if last and not self.work.zero_bubble:
            return size * sum(parameters.whole for parameters in todo)
        return size * sum(self.layer[letter].whole for letter in self.letters)

    @property
    def _largest(self) -> Parameters:
        return max(self.layer.values(), key=lambda parameters: parameters.whole)

    @property
    def _table(self) -> int:
        return -(-self.work.model.vocab_size // self.work.layout.tp) * self.work.model.hidden_size

    def _policy(self, letter: str) -> str:
        """What a layer of a kind recomputes; a graph begins and ends inside of softmax layers."""
        policy = str(self.work.parallel.activation_checkpoint)
        recorded = letter == SOFTMAX.letter and self.work.records_graphs
        return AROUND_ATTENTION if recorded and policy == "block" else policy


def micro_batches_in_flight(work: Workload, pp_rank: int) -> float:
    """Return the micro-batches that a rank holds activations of when a backward begins, each over all of its layers."""
    pp, chunks = work.layout.pp, work.parallel.pp_chunks
    if pp == 1:
        return 1.0
    if work.parallel.pp_schedule == "1f1b":
        return float(min(work.micro_batches, pp - pp_rank))
    # Forward passes of chunks before the first backward (Megatron-LM's warm-up; torch's is the same number).
    warm_up = (pp - pp_rank - 1) * 2 + (chunks - 1) * pp + 1
    return max(1.0, min(work.micro_batches * chunks, warm_up) / chunks)
