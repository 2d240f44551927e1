"""An evaluation as a whole: figures of models that are known, files, a second try, and what is refused beforehand."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmdata.tokenizer_identity import TokenizerIdentity
from mmtrain.errors import ConfigError
from mmtrain.evals.answering import Answerer
from mmtrain.evals.offline.checkpoint import identity
from mmtrain.evals.offline.evaluation import Evaluation
from mmtrain.evals.offline.progress import Progress
from mmtrain.evals.offline.request import EvalRequest
from mmtrain.evals.offline.run import SampleLog, run_units
from mmtrain.evals.offline.table import headline, tables
from mmtrain.evals.offline.units import Unit, Work
from mmtrain.evals.offline.write import name_of
from tests.evals.answerers import Bigrams, Copier, Guesser, Score
from tests.evals.files.test_read import LONGBENCH, mtob, squad, write
from tests.evals.text import TOKENIZER
from tests.infer.chain import CONFIG


def evaluation(run: Path, request: EvalRequest, corpus: Path | None = None, **more: Any) -> Evaluation:
    checkpoint = run / "checkpoints" / "step-00000004"
    return Evaluation(request, checkpoint, CONFIG, TOKENIZER, more.get("identity"), corpus and str(corpus))


def evaluate(run: Path, request: EvalRequest, answerer: Answerer, out: Path, batch: int = 4) -> dict[str, Any]:
    made = evaluation(run, request)
    told: list[str] = []
    result, files = made.run(answerer, made.folder(out), batch, Progress(made.units, told.append).done, "cpu")
    assert told[-1].startswith(f"[{len(made.units)}/{len(made.units)}] ") and all(file.is_file() for file in files)
    return result


MADE = ("niah_single_2", "vt", "fwe", "needle", "mr_niah")


def test_a_copier_gets_all_and_a_guesser_nothing(run: Path, tmp_path: Path) -> None:
    request = EvalRequest(MADE, (4096, 6000), samples=3, depths=(0.0, 1.0))
    for answerer, score in ((Copier(), 100.0), (Guesser(), 0.0)):
        found = evaluate(run, request, answerer, tmp_path / str(score))
        assert [row["score"] for row in found["scores"]] == [score] * 12
        assert {row["task"] for row in found["scores"]} == {*MADE, "ruler"}
        assert {cell["kind"] for cell in found["cells"]} == {*MADE} - {"fwe"}
        assert {(cell["depth"], cell["samples"]) for cell in found["cells"] if cell["kind"] == "vt"} == {(0, 2), (1, 1)}
        assert all(cell["passed"] == score for cell in found["cells"])
        assert headline(found) == "; ".join(f"{task} {score:.1f} at 4,096, {score:.1f} at 6,000"
                                            for task in ("ruler", "needle", "mr_niah"))  # fmt: skip


def test_the_files_hold_seeds_hashes_and_identity(run: Path, tmp_path: Path) -> None:
    request = EvalRequest(("needle", "perplexity"), (4096,), samples=2, seed=7)
    found = evaluate(run, request, Copier(), tmp_path)
    (path,) = tmp_path.glob("eval-step-00000004-????????.json")
    made = json.loads(path.read_text())
    assert made["format"] == "mmtrain.eval/1" and made["request"]["seed"] == 7 and made["checkpoint"]["step"] == 4
    assert len(made["checkpoint"]["sha256"]) == 64 and made["text"]["corpus"].startswith("/")
    assert all(len(sample["hash"]) == 64 and sample["tokens"] == 4096 for sample in made["samples"])
    assert len({sample["hash"] for sample in made["samples"]}) == 4 and "answer" not in made["samples"][0]
    assert path.with_suffix(".png").is_file() and path.with_suffix(".txt").read_text() == tables(found)
    lines = [json.loads(line) for line in path.with_suffix(".samples.jsonl").read_text().splitlines()]
    assert lines[0]["answer"].strip() == lines[0]["expected"][0]


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary_s(run: Path, tmp_path: Path) -> None:
    found = evaluate(run, EvalRequest(("perplexity",), (512, 4096), samples=3), Copier(), tmp_path)
    for one, length in zip(found["perplexity"], (512, 4096), strict=True):
        assert one["rows"] == 3 and one["loss"] == pytest.approx(math.log(257))
        assert all(bucket["loss"] == pytest.approx(math.log(257)) for bucket in one["buckets"])
        assert one["buckets"][-1]["last"] == length - 1
    assert "from 2,896 on" in headline(found) and "2,896 - 4,095" in tables(found)


def test_a_second_try_asks_only_what_is_missing(run: Path, tmp_path: Path) -> None:
    request = EvalRequest(("needle", "perplexity"), (4096,), samples=3)
    first, again, other = Copier(), Copier(), Copier()
    base = evaluate(run, request, first, tmp_path)
    (log,) = tmp_path.glob("*.samples.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:4]) + lines[4][:20])  # killed while it wrote
    assert evaluate(run, request, again, tmp_path)["scores"] == base["scores"]
    assert (first.calls, again.calls) == (6, 2) and len(log.read_text().splitlines()) == 7
    evaluate(run, EvalRequest(("needle", "perplexity"), (4096,), samples=3, seed=1), other, tmp_path)
    assert other.calls == 6 and len(list(tmp_path.glob("*.json"))) == 2


def test_prompts_are_handed_over_together_up_to_the_batch(run: Path, tmp_path: Path) -> None:
    sizes: list[int] = []

    class Counting(Copier):
        def generate(self, prompts: Any, max_tokens: Any) -> list[list[int]]:
            sizes.append(len(prompts))
            return super().generate(prompts, max_tokens)

    evaluate(run, EvalRequest(("needle", "vt"), (4096, 5000), samples=5), Counting(), tmp_path, batch=3)
    assert sizes == [3, 2] * 4


def test_a_file_that_was_changed_is_asked_again(run: Path, tmp_path: Path) -> None:
    first, again = Copier(), Copier()
    path = questions(tmp_path / "q.jsonl", 5)
    request = EvalRequest(("choices",), files=(("choices", path),))
    evaluate(run, request, first, tmp_path / "out")
    path.write_text(path.read_text().replace("q3", "Q3"))
    evaluate(run, request, again, tmp_path / "out")
    assert (first.calls, again.calls) == (10, 2)


@pytest.mark.parametrize("place", [0, 1, 1 << 20, 5 << 20, -1])
def test_exports_of_one_architecture_in_folders_of_one_name_are_two_checkpoints(tmp_path: Path, place: int) -> None:
    """Neither takes over what the other has answered: the names of their files differ."""
    names = []
    for run, weight in (("a", 0), ("b", 1), ("c", 0)):
        folder = tmp_path / run / "hf"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        weights = np.zeros(6 << 20, np.uint8)
        weights[place : place + (1 << 17) if place >= 0 else None] = weight  # as a small tensor
        weights.tofile(folder / "model.safetensors")
        names.append(name_of(EvalRequest(("vt",), (4096,)), identity(folder, CONFIG, 257), {}))
    assert names[0] == names[2] != names[1]


def test_each_answer_has_its_own_room_within_a_batch(tmp_path: Path) -> None:
    class Fills:
        def generate(self, prompts: Any, max_tokens: Any) -> list[list[int]]:
            return [[7] * most for most in max_tokens]

    works = [
        Work(str(i), [np.zeros(3, dtype=np.int64)], 2 + i, lambda ids: {"score": float(len(ids))}, {}) for i in (0, 3)
    ]
    units = [Unit("vt", 8, None, i, partial(works.__getitem__, i)) for i in range(2)]
    request, log = EvalRequest(("vt",), (8,)), SampleLog(tmp_path / "x.jsonl")
    found = run_units(units, Fills(), request, log, 8, lambda record: None)  # type: ignore[arg-type]
    assert [record["score"] for record in found] == [2, 5]


def questions(path: Path, count: int, choices: int = 2) -> Path:
    rng = np.random.default_rng(0)
    lines = ({"question": f"q{i}", "choices": [f"c{j}{'x' * int(rng.integers(5))}" for j in range(choices)],
              "answer": int(rng.integers(choices))} for i in range(count))  # fmt: skip
    return write(path, "".join(json.dumps(line) + "\n" for line in lines))


def test_choices_of_a_guesser_are_right_by_chance(run: Path, tmp_path: Path) -> None:
    for choices in (2, 4):
        path = questions(tmp_path / f"{choices}.jsonl", 600, choices)
        found = evaluate(run, EvalRequest(("choices",), files=(("choices", path),)), Guesser(), tmp_path / "out")
        figures = found["files"]["choices"]
        assert figures["chance"] == pytest.approx(100 / choices) and figures["questions"] == 600
        assert figures["acc"] == pytest.approx(100 / choices, abs=6)
        assert figures["acc_norm"] == pytest.approx(100 / choices, abs=6)


def test_choices_of_a_model_that_knows_are_right(run: Path, tmp_path: Path) -> None:
    path = questions(tmp_path / "q.jsonl", 20, 3)
    data = [{**LONGBENCH, "answer": letter, "_id": letter} for letter in "ABCD"]
    right = [json.loads(line) for line in path.read_text().splitlines()]
    wanted = {f"{one['question']} {one['choices'][one['answer']]}" for one in right}

    class Knows(Copier):
        def score(self, rows: Any, starts: Any) -> list[Any]:
            return [self._of(TOKENIZER.decode(row.tolist()), len(row) - start)
                    for row, start in zip(rows, starts, strict=True)]  # fmt: skip

        def _of(self, text: str, count: int) -> Any:
            self.calls += 1
            right = text in wanted or (self.calls > 60 and self.calls % 5 == 1)
            return Score(np.full(count, 0 if right else -50, dtype=np.float32), np.full(count, right))

    files = (("choices", path), ("longbench_v2", write(tmp_path / "data.json", data)))
    found = evaluate(run, EvalRequest(("choices", "longbench_v2"), files=files), Knows(), tmp_path / "out")["files"]
    assert [found[task]["acc"] for task in found] == [100, 100] == [found[task]["acc_norm"] for task in found]
    assert all(-1e-3 < figures["log_acc_norm2"] <= 0 for figures in found.values())


def test_choices_against_a_plain_loop(run: Path, tmp_path: Path) -> None:
    model, path = Bigrams(), questions(tmp_path / "q.jsonl", 40, 3)
    found = evaluate(run, EvalRequest(("choices",), files=(("choices", path),)), model, tmp_path / "out")
    right, logs = 0, []
    for line in path.read_text().splitlines():
        one = json.loads(line)
        sums = []
        for choice in one["choices"]:
            ids = list(f"{one['question']} {choice}".encode())
            begin = len(one["question"])
            sums.append(sum(model.log_probs_VV[ids[i - 1], ids[i]] for i in range(begin, len(ids))))
        right += int(np.argmax(sums)) == one["answer"]
        by_byte = [total / len(choice) for total, choice in zip(sums, one["choices"], strict=True)]
        logs.append(by_byte[one["answer"]] - math.log(sum(map(math.exp, by_byte))))
    figures = found["files"]["choices"]
    assert figures["acc"] == pytest.approx(100 * right / 40)
    assert figures["log_acc_norm2"] == pytest.approx(np.mean(logs), rel=1e-5)


def test_longbench_by_difficulty_and_length_and_mtob_by_chrf(run: Path, tmp_path: Path) -> None:
    data = [LONGBENCH, {**LONGBENCH, "difficulty": "easy", "length": "short", "answer": "A"}]
    files = (("longbench_v2", write(tmp_path / "data.json", data)), ("mtob_ek", mtob(tmp_path / "mtob")))

    class Same(Copier):
        def generate(self, prompts: Any, max_tokens: Any) -> list[list[int]]:
            return [TOKENIZER.encode(" Bal.\nmore") for _ in prompts]

    found = evaluate(run, EvalRequest(("longbench_v2", "mtob_ek"), files=files), Same(), tmp_path / "out")
    figures = found["files"]["longbench_v2"]
    assert figures["acc"] == 50 and figures["log_acc_norm2"] == pytest.approx(math.log(1 / 4))
    assert {name: part["acc"] for name, part in figures["groups"].items()} == {
        "easy": 100, "hard": 0, "medium": 0, "short": 100
    }  # fmt: skip
    assert found["files"]["mtob_ek"]["chrf"] == 100
    assert "mtob_ek: chrF 100.00 over 1 sentences" in tables(found) and "longbench_v2 50.0%" in headline(found)


def test_questions_over_documents_run(run: Path, tmp_path: Path) -> None:
    made = squad()
    made["data"][0]["paragraphs"][0]["context"] = "The one who keeps the lamp is Ann."
    made["data"][0]["paragraphs"][0]["qas"][0]["question"] = "who keeps the lamp?"
    request = EvalRequest(("qa_1",), (700,), 2, files=(("qa_1", write(tmp_path / "s.json", made)),))
    assert evaluate(run, request, Copier(), tmp_path / "out")["scores"][0]["score"] == 100


def test_longer_samples_are_refused_by_name_or_left_out_and_counted(run: Path, tmp_path: Path) -> None:
    data = [LONGBENCH, {**LONGBENCH, "_id": "long one", "context": "x" * 500}]
    files = (("longbench_v2", write(tmp_path / "data.json", data)),)
    with pytest.raises(ConfigError, match=r"--max-length=400: longbench_v2, long one, has \d+ tokens, and none is cut"):
        evaluation(run, EvalRequest(("longbench_v2",), files=files, max_length=400))
    request = EvalRequest(("longbench_v2",), files=files, max_length=400, leave_out_longer=True)
    figures = evaluate(run, request, Guesser(), tmp_path / "out")["files"]["longbench_v2"]
    assert (figures["questions"], figures["left_out"]) == (1, 1)
    request = EvalRequest(("longbench_v2",), files=files, max_length=5, leave_out_longer=True)
    with pytest.raises(ConfigError, match="--max-length=5: leaves all 2 samples out"):
        evaluation(run, request)


def test_what_cannot_be_run_is_refused_before_the_weights_are_read(run: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lengths=300: vt needs 1,\d\d\d tokens at least with this tokenizer"):
        evaluation(run, EvalRequest(("vt",), (300, 4096)))
    with pytest.raises(ConfigError, match=r"--lengths=1,048,576: the held-out text has"):
        evaluation(run, EvalRequest(("perplexity",), (512, 2**20)))
    other = TokenizerIdentity("json", "ab" * 32, "cd" * 32, 300)
    with pytest.raises(ConfigError, match=r"was made with the byte tokenizer, the checkpoint with a tokenizer\.json"):
        evaluation(run, EvalRequest(("needle",), (4096,)), corpus, identity=other)
    moved = tmp_path / "moved" / "checkpoints" / "step-00000004"
    moved.mkdir(parents=True)
    with pytest.raises(ConfigError, match="--corpus=None: is needed for needle, perplexity: the run's corpus is not"):
        evaluation(tmp_path / "moved", EvalRequest(("needle", "vt", "perplexity"), (4096,)))
    assert len(evaluation(tmp_path / "moved", EvalRequest(("vt",), (4096,))).units) == 10  # needs no text
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(ConfigError, match="--out=None: is needed"):
        Evaluation(EvalRequest(("vt",), (4096,)), bare, CONFIG, TOKENIZER, None, None).folder(None)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out=.*cannot be made"):
        evaluation(run, EvalRequest(("vt",), (4096,))).folder(tmp_path / "file" / "x")
