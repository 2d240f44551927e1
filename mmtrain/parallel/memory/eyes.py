"""Memory of a model's eyes on a rank of a pipeline's first stage: parameters, and activations of its share of tiles.

A micro-batch has as many tiles as its tokens can be of, and the ranks that train rows share them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmtrain.config import VisionConfig
from mmtrain.parallel.memory.trained import TrainedShares
from mmtrain.parallel.memory.workload import FP32, Parameters, Workload
from mmtrain.vision.flops import count_vision_parameters

ZERO = Parameters(0, 0)


@dataclass(frozen=True)
class EyesMemory:
    """Parameters of the eyes, which every rank of tp has, and bytes of one micro-batch.

    Attributes:
        tower: parameters of the vision transformer.
        tower_trained: those that are trained.
        ends: parameters of the projector and the newline, which are gathered with the embedding.
        ends_trained: those that are trained.
        layer: parameters of a layer of the vision transformer.
        kept: activations that wait for backward.
        at_work: what a layer of the vision transformer takes besides while it is differentiated, or runs.
    """

    tower: Parameters = ZERO
    tower_trained: Parameters = ZERO
    ends: Parameters = ZERO
    ends_trained: Parameters = ZERO
    layer: Parameters = ZERO
    kept: float = 0.0
    at_work: float = 0.0


def eyes_memory(work: Workload) -> EyesMemory:
    """Count what a rank has of the eyes; nothing for a model of text."""
    vision = work.model.vision
    if vision is None:
        return EyesMemory()
    counts = count_vision_parameters(work.model)
    tower, ends = counts["vision_tower"], counts["projector"] + counts["newline"]
    trained = [tower, ends]
    if work.frozen:
        shares = TrainedShares(work.model, work.frozen)
        ends_trained = shares.end("encoder.projector", counts["projector"])
        ends_trained += shares.end("encoder.newline_D", counts["newline"])
        trained = [shares.end("encoder.vision_tower", tower), ends_trained]
    tiles = tiles_of_a_rank(work)
    layer = _of_a_layer(vision) * tiles * (vision.patches + 1) * work.compute_bytes
    return EyesMemory(
        Parameters(tower, 0),
        Parameters(trained[0], 0),
        Parameters(ends, 0),
        Parameters(trained[1], 0),
        Parameters(tower // vision.num_layers, 0),
        _tower_kept(work, vision, tiles, layer, trained[0] > 0) + _projector_kept(work, vision),
        layer,
    )


def tiles_of_a_rank(work: Workload) -> int:
    """Return the most tiles of a micro-batch that a rank looks at: where every token is of an image."""
    assert work.model.vision is not None
    return math.ceil(work.row_tokens / work.model.vision.patches / (work.layout.cp * work.layout.tp))


def _of_a_layer(vision: VisionConfig) -> int:
    """Elements a token that a layer keeps.

    The input of each norm and its result (4 W), q, k and v (3 W), attention's result (W), the feed-forward before and
    behind its activation (2 F; quick_gelu keeps its sigmoid and the product within it too).
    """
    inner = 2 if vision.activation == "gelu" else 4
    return 8 * vision.hidden_size + inner * vision.ffn_hidden_size


def _tower_kept(work: Workload, vision: VisionConfig, tiles: int, layer: float, trained: bool) -> float:
    """Bytes of a share's tiles and of what its layers keep; a frozen tower keeps nothing but its features."""
    tokens, size = tiles * (vision.patches + 1), work.compute_bytes
    pixels = 3 * vision.tile_size**2
    features = tokens * vision.hidden_size * size
    held = pixels * (work.row_tokens / vision.patches + tiles) + features
    if not trained:
        return held
    layers = vision.num_layers - vision.unused_layers
    every = features if work.parallel.activation_checkpoint == "block" else layer
    return held + pixels * tiles * size + layers * every + 2 * FP32 * 2 * layers * tokens


def _projector_kept(work: Workload, vision: VisionConfig) -> float:
    """Bytes of features, the two products, the activation between them, and the embeddings that take them in."""
    return work.own_tokens * (vision.hidden_size + 5 * work.model.hidden_size) * work.compute_bytes
