"""A run with eyes, of weights that were drawn, beside the data set that it would be trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from mmdata.draw.write import DrawOptions, draw
from mmdata.images.grid import TileRules
from mmdata.prepare_images.pipeline import ImageOptions, prepare_images
from mmdata.prepare_images.template import Template
from mmdata.tokenizer import load_tokenizer
from mmtrain.build import build_model
from mmtrain.config import ModelConfig
from mmtrain.vision.images import tile_rules
from tests.infer.chain import save_run
from tests.vision.small import small_eyes, small_vl_config

TEMPLATE = Template(user="Q: {}\n", assistant="A: {}\n")


class SeeingRun(NamedTuple):
    """A run folder, its data set, and its model."""

    run: Path
    drawn: Path
    corpus: Path
    model: ModelConfig


def make_seeing_run(folder: Path) -> SeeingRun:
    """Draw 12 pictures, prepare them, and save a run of a small model."""
    drawn, corpus = folder / "drawn", folder / "corpus"
    draw(DrawOptions(drawn, images=12, tile=28))
    eyes = small_eyes()
    rules: TileRules = tile_rules(eyes)
    prepare_images(ImageOptions([drawn / "train_conversations.jsonl"], corpus, "train", vocab_size=330, rules=rules,
                                template=TEMPLATE, workers=1), log=lambda line: None)  # fmt: skip
    tokenizer = load_tokenizer(corpus)
    image_token = tokenizer.special_tokens["<image>"]
    config = replace(small_vl_config(dict(image_token=image_token), num_experts=0), vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = build_model(config, seed=4)
    corpora = {"sources": [{"option": "data.path", "path": "gone", "resolved": str(corpus)}]}
    save_run(folder / "run", model, tokenizer=False, data={"path": str(corpus), "tokenizer": None}, corpora=corpora)
    return SeeingRun(folder / "run", drawn, corpus, config)
