"""Images of a request inside the engine: checked, looked at once, and their embeddings cut to what a step reads.

Legend: N tiles, Q tokens of a tile, W width of the vision transformer, I tokens of a prompt's images, T tokens of a
row, J tokens of images among them, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmtrain.config import ModelConfig
from mmtrain.errors import ConfigError
from mmtrain.infer.serving.generation import GenerationRequest, RequestRefused
from mmtrain.model.given_embeddings import GivenEmbeddings
from mmtrain.model.model import HybridLM
from mmtrain.model.packed_seq import to_device
from mmtrain.vision.images import Images
from mmtrain.vision.model import VisionLanguageModel
from mmtrain.vision.prompt_images import PromptImages

if TYPE_CHECKING:
    from mmtrain.infer.serving.scheduler import Chunk

TILES_AT_ONCE = 32
"""Tiles that the eyes look at together: 18 GFLOP each keep a GPU busy, and take 0.6 GB in all in bf16. Ours."""


@dataclass(frozen=True)
class DocumentImages:
    """Embeddings of the images of a prompt; they wait on the host, as many requests may wait.

    Attributes:
        images: of the request.
        at_I: int64, places of their tokens in the prompt, ascending.
        rows_ID: their embeddings, on the host, in the dtype of the weights.
    """

    images: PromptImages
    at_I: np.ndarray
    rows_ID: Tensor

    def between(self, start: int, stop: int) -> tuple[np.ndarray, Tensor]:
        """Return places, from `start` on, and embeddings of those tokens of a part of the prompt that are images'."""
        first, last = np.searchsorted(self.at_I, (start, stop))
        return self.at_I[first:last] - start, self.rows_ID[first:last]


def check_images(request: GenerationRequest, model: ModelConfig) -> None:
    """Refuse images that a model cannot look at, and placeholders that have none, before anything is computed.

    Raises:
        RequestRefused: the model has no eyes, an image does not stand on placeholders, a placeholder has no image, or
            tiles were cut by other rules.
    """
    images, vision = request.images, model.vision
    if vision is None:
        if images is not None:
            raise RequestRefused("request.images", len(images.layouts), "the model has no eyes", "leave them out")
        return
    tokens = np.array(request.tokens, dtype=np.int64)
    is_placeholder = tokens == vision.image_token
    if images is not None:
        _check_tiles(images, model)
        spans = images.spans
        following = [*(first for first, _ in spans[1:]), len(tokens)]
        for (first, last), limit in zip(spans, following, strict=True):
            if first < 0 or last > limit or not is_placeholder[first:last].all():
                raise RequestRefused(
                    "request.images", f"an image of {last - first} tokens at {first}", "has no placeholders of its own "
                    "there", f"write the token {vision.image_token} as often as it has tokens",
                )  # fmt: skip
            is_placeholder[first:last] = False
    if is_placeholder.any():
        place = int(is_placeholder.argmax())
        raise RequestRefused("request.tokens", f"token {vision.image_token} at {place}", "is a placeholder without an "
                             "image", "give the image, or leave the token out")  # fmt: skip


def _check_tiles(images: PromptImages, model: ModelConfig) -> None:
    assert model.vision is not None
    try:
        Images(torch.from_numpy(images.tiles_N3SS), images.layouts).check(model.vision)
    except ConfigError as error:
        raise RequestRefused("request.images", error.value, error.problem, error.fix) from None


@torch.no_grad()
def look_at(images: PromptImages, model: HybridLM) -> DocumentImages:
    """Make the embeddings of a prompt's images, of a bounded number of tiles at once.

    Args:
        images: as :func:`check_images` passes them.
        model: with eyes, in evaluation mode; every rank that shares its weights has the eyes whole.
    """
    assert isinstance(model, VisionLanguageModel) and model.encoder is not None
    encoder, device, rows = model.encoder, model.embed_tokens.weight.device, []
    for layouts, tiles_N3SS in _groups(images):
        x_NQW = torch.cat([encoder.features(part.to(device)) for part in tiles_N3SS.split(TILES_AT_ONCE)])
        rows.append(encoder.embeddings(x_NQW, layouts).to("cpu"))
    return DocumentImages(images, images.at_I, torch.cat(rows))


def _groups(images: PromptImages) -> Iterator[tuple[tuple, Tensor]]:
    """Whole images in their order, as many together as have no more tiles than are looked at at once, one at least."""
    layouts: list = []
    first = last = 0
    for layout in images.layouts:
        if layouts and last + layout.tiles - first > TILES_AT_ONCE:
            yield tuple(layouts), torch.from_numpy(images.tiles_N3SS[first:last])
            layouts, first = [], last
        layouts.append(layout)
        last += layout.tiles
    yield tuple(layouts), torch.from_numpy(images.tiles_N3SS[first:last])


def _shows_image(chunk: Chunk) -> bool:
    """Tell whether any token of a chunk is an image's."""
    document, count = chunk
    seen = document.images
    return seen is not None and len(seen.between(document.computed, document.computed + count)[0]) > 0


def show_images(chunks: Iterable[Chunk]) -> bool:
    """Tell whether any token of any of the chunks is an image's."""
    return any(chunk[0].images is not None and _shows_image(chunk) for chunk in chunks)


def given_of(
    chunks: Sequence[Chunk], device: torch.device, span: tuple[int, int] | None = None
) -> GivenEmbeddings | None:
    """Return the embeddings of the images' tokens in a row of documents; None where it has none.

    Args:
        chunks: the row's documents, end to end.
        device: of the model.
        span: first place of the row that this rank computes, and the one after the last; None: all. The tokens' places
            are counted from there.
    """
    places, rows, first = [], [], 0
    for document, count in chunks:
        if document.images is not None:
            at_J, rows_JD = document.images.between(document.computed, document.computed + count)
            places.append(at_J + first)
            rows.append(rows_JD)
        first += count
    if not places:
        return None
    at_J, rows_JD = np.concatenate(places), torch.cat(rows)
    if span is not None:
        here = (at_J >= span[0]) & (at_J < span[1])
        at_J, rows_JD = at_J[here] - span[0], rows_JD[torch.from_numpy(here)]
    if not len(at_J):
        return None
    return GivenEmbeddings(to_device(torch.from_numpy(at_J), device), to_device(rows_JD, device))
