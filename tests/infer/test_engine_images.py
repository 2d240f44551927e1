"""The engine answers requests with images as whole forward passes do, however prompts are cut, shared and batched."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from mmtrain.infer.engine import Engine
from mmtrain.infer.planning.weights import ServingLayout, weight_bytes_on
from mmtrain.infer.quantised.replace import quantise_model
from mmtrain.infer.serving import document_images
from mmtrain.infer.serving.generation import RequestRefused
from mmtrain.vision.encoder import ImageEncoder
from mmtrain.vision.flops import count_vision_parameters
from mmtrain.vision.layers import Affine
from mmtrain.vision.prompt_images import PromptImages
from tests.infer.seen import asked, greedy_seeing, prompt_of, seeing_model, whole_logits
from tests.infer.served import SMALL, assert_nothing_held, full_logits, greedy, request, seen_logits, text_of
from tests.vision.small import IMAGE

SHAPES = {
    "in the middle": (6, (60, 25, 0), 4),
    "first, two, last": ((28, 28, 1), 3, (20, 70, 2), (28, 28, 3)),
    "alone": ((50, 50, 4),),
}


@pytest.mark.parametrize("prefill_tokens", [1, 7, 4096])
@pytest.mark.parametrize("graphs", [False, True])
def test_answers_are_those_of_whole_passes_however_prompts_are_cut(prefill_tokens: int, graphs: bool) -> None:
    model = seeing_model()
    prompts = [prompt_of(model, *parts) for parts in SHAPES.values()]
    texts = [text_of(12), text_of(1)]
    texts = [tuple(min(token, IMAGE - 1) for token in text) for text in texts]
    options = replace(SMALL, prefill_tokens=prefill_tokens, max_running=4, memory_bytes=1 << 24, cuda_graphs=graphs)
    engine = Engine(model.train(), options=options)
    asks = [asked(*prompt) for prompt in prompts]
    with seen_logits() as seen:
        made = engine.generate([asks[0], request(texts[0], 5), asks[1], request(texts[1], 5), asks[2]])
    assert [one.tokens for one in (made[1], made[3])] == [greedy(model, text, 5) for text in texts]
    for (tokens, images), one in zip(prompts, (made[0], made[2], made[4]), strict=True):
        assert one.tokens == greedy_seeing(model, tokens, images)
        row = (*tokens, *one.tokens)
        full = whole_logits(model, row, images)
        for length in range(len(tokens), len(row)):
            torch.testing.assert_close(seen[row[:length]], full[length - 1], rtol=0, atol=1e-5)
    assert_nothing_held(engine)


def kept(model: torch.nn.Module, **options: object) -> Engine:
    """An engine whose prefix cache keeps every 4 tokens."""
    sizes = dict(prefix_slots=40, prefix_interval=4, memory_bytes=1 << 24)
    return Engine(model, options=replace(SMALL, **(sizes | options)))


def test_the_same_image_is_found_again_and_another_of_its_size_is_not() -> None:
    model = seeing_model()
    engine = kept(model)
    same, other = (6, (60, 25, 0), 4), (6, (60, 25, 1), 4)
    first = engine.generate([asked(*prompt_of(model, *same))])[0]
    again = engine.generate([asked(*prompt_of(model, *same))])[0]
    tokens, images = prompt_of(model, *same)
    assert first.prefix_tokens == 0 and again.prefix_tokens > images.spans[0][0] + 8
    assert again.tokens == first.tokens == greedy_seeing(model, tokens, images)
    another = engine.generate([asked(*prompt_of(model, *other))])[0]
    assert another.prefix_tokens <= images.spans[0][0]  # the text before it, and nothing of it
    assert another.tokens == greedy_seeing(model, *prompt_of(model, *other))


def test_an_image_in_two_layouts_of_as_many_tokens_is_two_images() -> None:
    model = seeing_model()
    _, images = prompt_of(model, 2, (60, 25, 0), 2)
    turned = replace(images.layouts[0], first_row=images.layouts[0].first_row + 1)
    assert replace(images, layouts=(turned,)).digests != images.digests


def test_what_is_known_of_two_images_is_not_known_of_their_order() -> None:
    model = seeing_model()
    engine = kept(model)
    one, other = prompt_of(model, (28, 28, 0), (28, 28, 1), 3), prompt_of(model, (28, 28, 1), (28, 28, 0), 3)
    assert one[0] == other[0]
    found = engine.generate([asked(*one)]) + engine.generate([asked(*other)])
    assert found[1].prefix_tokens == 0 and found[1].tokens == greedy_seeing(model, *other)


def test_key_bytes_of_parts_are_those_of_the_whole() -> None:
    tokens, images = prompt_of(seeing_model(), 3, (60, 25, 0), (28, 28, 1), 2)
    whole = images.key_bytes(tokens, 0, len(tokens))
    for middle in range(len(tokens) + 1):
        assert images.key_bytes(tokens, 0, middle) + images.key_bytes(tokens, middle, len(tokens)) == whole


def test_images_are_looked_at_once_a_request_in_bounded_batches() -> None:
    model = seeing_model()
    tokens, images = prompt_of(model, (60, 25, 0), 2, (20, 70, 1), 2, (50, 50, 2))
    sizes: list[int] = []
    features = ImageEncoder.features

    def told(self: ImageEncoder, tiles: torch.Tensor) -> torch.Tensor:
        sizes.append(len(tiles))
        return features(self, tiles)

    with mock.patch.object(ImageEncoder, "features", told), mock.patch.object(document_images, "TILES_AT_ONCE", 4):
        engine = Engine(model, options=replace(SMALL, prefill_tokens=5, memory_bytes=1 << 24))
        number = engine.submit(asked(tokens, images))
        looked = list(sizes)
        engine.step()
        engine.pause(number)  # its memory is gone: it is read again, and not looked at again
        engine.resume(number)
        made = [news.generation for _ in range(60) for news in engine.step() if news.generation is not None]
    assert looked == sizes and max(sizes) <= 4
    assert sum(sizes) == len(images.tiles_N3SS) == engine.metrics.image_tiles
    assert made[0].tokens == greedy_seeing(model, tokens, images)


def test_scores_of_given_text_see_the_image() -> None:
    model = seeing_model()
    engine = kept(model, prefix_interval=None, prefill_tokens=4096)
    tokens, images = prompt_of(model, 2, (60, 25, 0), 6)
    _, others = prompt_of(model, 2, (60, 25, 1), 6)
    start = len(tokens) - 3
    found = engine.read_all([tokens, tokens, tokens], [start] * 3, [images, others, others])
    for one, shown in zip(found, (images, others, others), strict=True):
        log_probs = whole_logits(model, tokens, shown).log_softmax(-1)
        wanted = [float(log_probs[place - 1, tokens[place]]) for place in range(start, len(tokens))]
        np.testing.assert_allclose(one.prompt_logprobs, wanted, atol=1e-5)
    assert found[2].prefix_tokens == start - 1 and found[1].prefix_tokens == 0


def test_text_alone_is_served_as_by_a_model_without_eyes() -> None:
    model, text = seeing_model(), tuple(min(token, IMAGE - 1) for token in text_of(20))
    with seen_logits() as seen:
        Engine(model, options=SMALL).generate([request(text, 1)])
    torch.testing.assert_close(seen[text], full_logits(model, text)[-1], rtol=0, atol=1e-5)


def refused(tokens: tuple[int, ...], images: PromptImages | None, model: torch.nn.Module | None = None) -> str:
    engine = Engine(model or seeing_model(), options=replace(SMALL, memory_bytes=1 << 24))
    with pytest.raises(RequestRefused) as caught:
        engine.submit(asked(tokens, images))
    assert engine.unfinished == 0 and engine.metrics.refused == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    model = seeing_model()
    tokens, images = prompt_of(model, 3, (60, 25, 0), 2)
    assert "is a placeholder without an image" in refused(tokens, None)
    assert "is a placeholder without an image" in refused((*tokens, IMAGE), images)
    assert "has no placeholders of its own" in refused((1, *tokens), images)
    assert "has no placeholders of its own" in refused(tokens[:-4], images)
    assert "2 images have 8 tiles" in refused(tokens, replace(images, layouts=images.layouts * 2, firsts=(3, 3)))
    doubled = replace(images, tiles_N3SS=np.concatenate([images.tiles_N3SS] * 2), layouts=images.layouts * 2)
    assert "has no placeholders of its own" in refused(tokens, replace(doubled, firsts=(3, 3)))
    assert "tiles are torch.uint8 of [3, 14, 28]" in refused(
        tokens, replace(images, tiles_N3SS=images.tiles_N3SS[:, :, :14])
    )
    assert "the model has no eyes" in refused(tokens, images, full_text_model())


def full_text_model() -> torch.nn.Module:
    """A model without eyes."""
    from tests.infer.served import served_model

    return served_model()


def test_int8_leaves_the_eyes_alone_and_the_plan_counts_them() -> None:
    model = seeing_model()
    before = {name: value.clone() for name, value in model.encoder.named_parameters()}
    quantise_model(model)
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.named_parameters())
    assert isinstance(model.encoder.vision_tower.layers[0].fc1, Affine)
    parts = weight_bytes_on(model.config, ServingLayout(), "bf16", torch.device("cuda"))
    assert parts["eyes"] == 2 * sum(count_vision_parameters(model.config).values())
    quarter = weight_bytes_on(replace(model.config, num_kv_heads=4), ServingLayout(tp=4, ep=4), "int8",
                              torch.device("cuda"))  # fmt: skip
    assert quarter["eyes"] == parts["eyes"]
