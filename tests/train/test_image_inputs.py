"""A run's inputs where a corpus holds images: its rows beside text's, steps resumed anywhere, any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmdata.errors import DataError
from mmdata.images.batch import ImageBatch
from mmdata.prepare.pipeline import PrepareOptions, prepare
from mmtrain.config import DataConfig, PhaseConfig, SourceConfig
from mmtrain.config.schema import Count
from mmtrain.train.batches import BatchReader
from mmtrain.train.curriculum import Progress, RunStep
from mmtrain.train.inputs import RunInputs
from tests.data.images.made import prepared, write_images, write_records

SEQ_LEN, STEP, STEPS = 48, 6, 4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[SourceConfig]:
    """A corpus with images and one of text, of one tokenizer, 5 to 1."""
    folder = tmp_path_factory.mktemp("mixed")
    names = write_images(folder / "images", [(16 + 2 * i, 30) for i in range(20)] + [(64, 64)])
    records = [{"image": f"images/{name}", "question": "which?", "answer": name} for name in names]
    prepared(write_records(folder, records), folder / "vl", valid_fraction=0.1)
    (folder / "text").mkdir()
    for i in range(20):
        (folder / "text" / f"{i}.txt").write_text(f"text number {i} " * 9)
    prepare(PrepareOptions([folder / "text"], folder / "plain", tokenizer=str(folder / "vl"), workers=1))
    return [SourceConfig(str(folder / "vl"), 5.0), SourceConfig(str(folder / "plain"), 1.0)]


def inputs_of(sources: list[SourceConfig], seq_len: int = SEQ_LEN) -> RunInputs:
    phase = PhaseConfig("p", Count(seq_len), 1e4, Count(1000), [], [], None)
    return RunInputs(DataConfig(sources=sources), [phase], 320)


def read(inputs: RunInputs, ranks: int, first: int) -> list[torch.Tensor | tuple]:
    """Rows of the steps from `first` on, in the stream's order, with the tiles of their images."""
    readers = [BatchReader(inputs, rank, ranks, 1, num_workers=0) for rank in range(ranks)]
    rows: dict[int, tuple] = {}
    for step in range(first, STEPS):
        now = RunStep(Progress(), 0, step * STEP, STEP, 1e-4)
        for batch in (batch for reader in readers for batch in reader.read(now)):
            assert isinstance(batch, ImageBatch)
            images = tuple((image.source, image.first) for image in batch.images)
            rows[batch.rows[0]] = (batch.tokens_BS, batch.loss_mask_BS, batch.tiles_TCHW, images, batch.real_tokens)
    for reader in readers:
        reader.close()
    assert sorted(rows) == list(range(first * STEP, STEPS * STEP))
    return [rows[i] for i in sorted(rows)]


def equal(a: list, b: list) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("ranks", "first"), [(1, 1), (2, 0), (3, 2)])
def test_steps_read_the_same_rows_on_any_ranks_and_from_any_step(
    sources: list[SourceConfig], ranks: int, first: int
) -> None:
    inputs = inputs_of(sources)
    whole = read(inputs, 1, 0)
    assert 0 < sum(not images for *_, images, _ in whole) < 8  # rows of text are among them
    assert equal(read(inputs_of(sources), ranks, first), whole[first * STEP :])


def test_held_out_rows_and_fingerprints(sources: list[SourceConfig]) -> None:
    inputs = inputs_of(sources)
    valid = inputs.valid_stream(SEQ_LEN)
    assert valid is not None and valid[0].images
    assert {"places", "labels"} <= set(inputs.fingerprints()["sources"][0]["train"]["files"])
    assert inputs.epochs([SEQ_LEN * 60])[0].consumed > 0


def test_documents_that_no_row_holds_are_told_before_training(sources: list[SourceConfig]) -> None:
    notes = "\n".join(inputs_of(sources, 23).notes)
    assert "documents are left out, as a row of seq_len 23 is too short for an image" in notes
    assert "left out" not in "\n".join(inputs_of(sources).notes)
    with pytest.raises(DataError, match="nothing is left"):
        inputs_of([SourceConfig(sources[0].path, 1.0)], 4)


def test_a_run_without_images_reads_as_it_did(sources: list[SourceConfig], tmp_path: Path) -> None:
    inputs = inputs_of(sources[1:])
    (batch,) = BatchReader(inputs, 0, 1, 1, 0).read(RunStep(Progress(), 0, 0, 1, 1e-4))
    assert not isinstance(batch, ImageBatch) and batch.real_tokens is None
