"""Texts that are only scored, as requests: those with one context read it once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from mmtrain.infer.serving.generation import Generation, GenerationRequest
from mmtrain.vision.prompt_images import PromptImages


def reading_requests(
    texts: Sequence[Sequence[int]], starts: Sequence[int] | None, images: Sequence[PromptImages | None] | None
) -> list[GenerationRequest]:
    """Return a request for each text, which generates nothing and scores its tokens.

    Args:
        texts: ids.
        starts: place of the first token of each that is scored, 1 at least; None: the second token of all.
        images: of each text; None: text alone.
    """
    return [
        GenerationRequest(tuple(tokens), max_tokens=0, prompt_logprobs=True, score_from=start,
                          keep_prefix=(start - 1,) if 1 < start <= len(tokens) else (), images=shown)
        for tokens, start, shown in zip(texts, starts or [1] * len(texts), images or [None] * len(texts), strict=True)
    ]  # fmt: skip


def read_by_context(
    requests: Sequence[GenerationRequest],
    generate: Callable[[list[GenerationRequest]], list[Generation]],
    kept: int,
) -> list[Generation]:
    """Serve requests of :func:`reading_requests`; results in their order.

    Args:
        requests: what lies before `score_from`, with its images, is the context.
        generate: serves requests together.
        kept: contexts that the prefix cache keeps at once; 0: none, and all requests go together.
    """
    of_context: dict[Hashable, list[int]] = {}
    for place, one in enumerate(requests):
        shown = () if one.images is None else one.images.digests
        context = (one.tokens[: one.score_from - 1], shown) if one.keep_prefix else place
        of_context.setdefault(context, []).append(place)
    contexts, at_once = list(of_context.values()), kept or max(1, len(of_context))
    made: dict[int, Generation] = {}
    for first in range(0, len(contexts), at_once):
        own = contexts[first : first + at_once]
        # The first text of each reads it; the others begin when it is known, or they would read it beside it.
        for places in ([alike[0] for alike in own], [place for alike in own for place in alike[1:]]):
            made |= zip(places, generate([requests[place] for place in places]), strict=True)
    return [made[place] for place in range(len(requests))]
