"""Units of an evaluation: one sample each, with what is to be asked and how the answer is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from mmdata.tokenizer import Tokenizer
from mmtrain.config.evals import NEEDLE_KINDS
from mmtrain.errors import ConfigError
from mmtrain.evals.answering import RowScore
from mmtrain.evals.files.choices import Question, choice_rows, score_choices
from mmtrain.evals.files.chrf import chrf
from mmtrain.evals.files.mtob import ANSWER_TOKENS, DIRECTIONS, Translation, first_line, read_mtob
from mmtrain.evals.files.read_choices import read_choices, read_longbench
from mmtrain.evals.offline.image_units import image_works
from mmtrain.evals.offline.request import FILE_OPTIONS, IMAGES, PERPLEXITY, QUESTION_TASKS, EvalRequest
from mmtrain.evals.offline.work import Figures, Work, digest_of
from mmtrain.evals.perplexity import bucket_nats, text_row
from mmtrain.evals.ruler.match import one_found, share_found
from mmtrain.evals.ruler.prompt import Kit, Prompt, ShortLength, generator
from mmtrain.evals.ruler.questions import QuestionSet, answer_from_documents, read_hotpotqa, read_squad
from mmtrain.evals.ruler.registry import TASKS, depth_of, make_prompt
from mmtrain.evals.sample import Cell, SampleBuilder
from mmtrain.model.loss import IGNORE
from mmtrain.vision.prompts import ImagePrompts


class Unit(NamedTuple):
    """A place of the evaluation.

    Attributes:
        task: its name.
        length: tokens; None for samples of files, which are as long as they are.
        depth: where what is asked for lies.
        index: number of the sample.
        prepare: makes the sample.
    """

    task: str
    length: int | None
    depth: float | None
    index: int
    prepare: Callable[[], Work]

    @property
    def key(self) -> str:
        """Name of the place."""
        return f"{self.task}/{self.length}/{self.depth}/{self.index}"


def list_units(request: EvalRequest, kit: Kit, prompts: ImagePrompts | None = None) -> list[Unit]:
    """Return all units, made ones by task and length; files are read, and nothing is made yet.

    Args:
        request: see there.
        kit: makes prompts of text.
        prompts: makes those with images, where any are asked for.

    Raises:
        ConfigError: a file is damaged, or a length is too short for a task.
    """
    units: list[Unit] = []
    for task in request.tasks:
        if not request.made(task):
            units += _file_units(request, task, kit.tokenizer, prompts)
            continue
        maker = _maker(request, task, kit)
        for length in request.lengths:
            for index in range(request.samples):
                depth = _depth(request, task, index)
                units.append(Unit(task, length, depth, index, partial(maker, length, depth, index)))
    _check_lengths(request, units)
    return units


def _depth(request: EvalRequest, task: str, index: int) -> float | None:
    if task in NEEDLE_KINDS:
        return request.depths[index % len(request.depths)]
    return depth_of(task, request.depths, index) if task in TASKS else None


def _check_lengths(request: EvalRequest, units: Sequence[Unit]) -> None:
    """Make the samples of the shortest length of each task, which must hold them, and rows of text of each length."""
    for unit in units:
        if unit.length is not None and (
            unit.length == request.lengths[0] or (unit.task, unit.index) == (PERPLEXITY, 0)
        ):
            try:
                unit.prepare()
            except ShortLength as error:
                raise ConfigError("--lengths", f"{unit.length:,}", f"{unit.task} {error} with this tokenizer",
                                  "give a longer one, or leave the task out") from None  # fmt: skip


def _maker(request: EvalRequest, task: str, kit: Kit) -> Callable[[int, float | None, int], Work]:
    if task == PERPLEXITY:
        return partial(_row, kit, request.seed)
    if task in NEEDLE_KINDS:
        builder = SampleBuilder(kit.haystack, kit.tokenizer, request.seed)
        return partial(_trained, builder, task, len(request.depths))
    if task in QUESTION_TASKS:
        path, option = dict(request.files)[task], FILE_OPTIONS[task]
        questions = (read_squad if task == "qa_1" else read_hotpotqa)(path, option)
        return partial(_question, kit, request.seed, task, questions)
    return partial(_made, kit, request.seed, task)


def _made(kit: Kit, seed: int, task: str, length: int, depth: float | None, index: int) -> Work:
    return _of_prompt(kit.tokenizer, make_prompt(kit, seed, task, length, depth, index))


def _question(
    kit: Kit, seed: int, task: str, questions: QuestionSet, length: int, depth: float | None, index: int
) -> Work:
    rng = generator(seed, task, length, index)
    return _of_prompt(kit.tokenizer, answer_from_documents(kit, length, 0.0, rng, questions))


def _of_prompt(tokenizer: Tokenizer, prompt: Prompt) -> Work:
    def judge(ids: Sequence[int]) -> Figures:
        text = tokenizer.decode(list(ids))
        scored = (one_found if prompt.one_suffices else share_found)(text, prompt.answers)
        return {"score": scored, "answer": text[:500], "expected": list(prompt.answers)}

    facts = {"repeats": round(prompt.laps, 3)} if prompt.laps > 1 else {}
    return Work(prompt.digest, [prompt.tokens_T], prompt.max_tokens, judge, facts)


def _trained(builder: SampleBuilder, kind: str, depths: int, length: int, depth: float | None, index: int) -> Work:
    """A sample of training's evaluation: the same that a run with this seed scores, if it has this length and depth."""
    cell = Cell(kind, length, 0.0 if depth is None else depth)
    if (needed := builder.overhead(cell, index // depths)) >= length:
        raise ShortLength(needed + 1)
    sample = builder.build(cell, index // depths)
    asked = np.flatnonzero(sample.labels_T != IGNORE) + 1  # a label is the next token

    def judge(scores: Sequence[RowScore]) -> Figures:
        found, places = scores[0], asked - asked[0]
        right, nats = found.likeliest_N[places], -found.log_probs_N[places].astype(np.float64)
        return {"score": 100.0 * bool(right.all()), "labelled": len(asked), "correct": int(right.sum()),
                "nats": float(nats.sum())}  # fmt: skip

    facts = {"repeats": round(sample.laps, 3)} if sample.laps > 1 else {}
    digest = digest_of([sample.tokens_T, sample.labels_T])
    return Work(digest, [sample.tokens_T], 0, judge, facts, (int(asked[0]),))


def _row(kit: Kit, seed: int, length: int, depth: float | None, index: int) -> Work:
    tokens_T, is_document = text_row(kit.haystack, length, seed, index)

    def judge(scores: Sequence[RowScore]) -> Figures:
        nats = bucket_nats(scores[0].log_probs_N)
        return {"loss": float(nats.sum() / (length - 1)), "bucket_nats": nats.tolist()}

    return Work(digest_of([tokens_T]), [tokens_T], 0, judge, {"one_document": is_document})


def _file_units(request: EvalRequest, task: str, tokenizer: Tokenizer, prompts: ImagePrompts | None) -> Iterator[Unit]:
    path, option = dict(request.files)[task], FILE_OPTIONS[task]
    made: list[Callable[[], Work]]
    if task == IMAGES:
        assert prompts is not None
        made = list(image_works(request, tokenizer, prompts))
    elif task in DIRECTIONS:
        sentences = read_mtob(path, task, request.mtob_book, option)
        made = [partial(_translation, tokenizer, sentence) for sentence in sentences]
    else:
        questions = (read_longbench if task == "longbench_v2" else read_choices)(path, option)
        made = [partial(_choice, tokenizer, question) for question in questions]
    for index, prepare in enumerate(made):
        yield Unit(task, None, None, index, prepare)


def _choice(tokenizer: Tokenizer, question: Question) -> Work:
    rows, counts = zip(*choice_rows(tokenizer, question), strict=True)

    def judge(scores: Sequence[RowScore]) -> Figures:
        log_probs_C = np.array([score.log_probs_N.sum(dtype=np.float64) for score in scores])
        scored = score_choices(log_probs_C, question.choices, question.answer)
        return {"score": 100.0 * scored.acc, **scored._asdict(), "groups": list(question.groups)}

    facts = {"name": question.name, "chance": 100 / len(rows)}
    starts = tuple(len(row) - count for row, count in zip(rows, counts, strict=True))
    return Work(digest_of(rows, question.answer), list(rows), 0, judge, facts, starts)


def _translation(tokenizer: Tokenizer, sentence: Translation) -> Work:
    prompt_T = np.array(tokenizer.encode(sentence.prompt), dtype=np.int64)

    def judge(ids: Sequence[int]) -> Figures:
        text = first_line(tokenizer.decode(list(ids)))
        return {"score": chrf([text], [sentence.reference]), "answer": text, "expected": [sentence.reference]}

    digest = digest_of([prompt_T], sentence.reference)
    return Work(digest, [prompt_T], ANSWER_TOKENS, judge, {"name": sentence.name})
