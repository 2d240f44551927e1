"""Made prompts: exact lengths, answers that stand in them, the same hash on every machine, and what guessing gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmtrain.errors import ConfigError
from mmtrain.evals.haystack import Haystack
from mmtrain.evals.ruler import made_words
from mmtrain.evals.ruler.match import one_found, share_found
from mmtrain.evals.ruler.prompt import Kit, Prompt, ShortLength
from mmtrain.evals.ruler.registry import GROUPS, TASKS, depth_of, make_prompt
from tests.evals.answerers import Copier, Guesser
from tests.evals.text import TOKENIZER, VOCAB, split
from tests.infer.chain import file_tokenizer

DEPTHS = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(TOKENIZER, Haystack(split(tmp_path_factory.mktemp("text")), "x", TOKENIZER, VOCAB))


def make(kit: Kit, task: str, length: int, index: int = 0, seed: int = 0) -> Prompt:
    return make_prompt(kit, seed, task, length, depth_of(task, DEPTHS, index), index)


@pytest.mark.parametrize("task", TASKS)
def test_a_copier_gets_all_and_a_guesser_nothing(kit: Kit, task: str) -> None:
    copier, guesser = Copier(), Guesser()
    for index, length in enumerate((4096, 8191, 16384)):
        prompt = make(kit, task, length, index)
        assert len(prompt.tokens_T) + prompt.max_tokens == length and prompt.tokens_T.dtype == np.int64
        assert TOKENIZER.eod_id not in prompt.tokens_T
        scores = []
        for answerer in (copier, guesser):
            (ids,) = answerer.generate([prompt.tokens_T], [prompt.max_tokens])
            scores.append(share_found(TOKENIZER.decode(ids), prompt.answers))
        assert scores == [100, 0], (index, prompt.answers)
        assert len(TOKENIZER.encode(" " + " ".join(prompt.answers))) <= prompt.max_tokens


@pytest.mark.parametrize("task", TASKS)
def test_other_tokenizers_give_exact_lengths_too(kit: Kit, task: str, tmp_path: Path) -> None:
    from mmdata.tokenizer import load_tokenizer

    other = load_tokenizer(file_tokenizer(tmp_path, words=3))
    made = Kit(other, Haystack(split(tmp_path), "x", other, 300))
    for length in (5000, 12_345):
        prompt = make(made, task, length)
        assert len(prompt.tokens_T) + prompt.max_tokens == length


def test_held_out_text_is_not_turned_to_tokens_again(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: (sizes.append(len(text)), encode(text))[1])
    totals = []
    for length in (8192, 2**20):
        make(kit, "needle", length)
        totals.append(sum(sizes))
        sizes.clear()
    assert abs(totals[0] - totals[1]) < 60  # names of cities differ


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2**20, 2**22])
def test_a_million_and_four_million_tokens(kit: Kit, task: str, length: int) -> None:
    prompt = make(kit, task, length)
    (ids,) = Copier().generate([prompt.tokens_T], [prompt.max_tokens])
    assert len(prompt.tokens_T) + prompt.max_tokens == length
    assert share_found(TOKENIZER.decode(ids), prompt.answers) == 100


PINNED = {
    "niah_single_1": "0506443d4983b18e",
    "niah_single_2": "6a42ded9decc68f3",
    "niah_multikey_2": "53d02e2fccbed984",
    "niah_multikey_3": "57d1a56af6388329",
    "niah_multiquery": "e2b5c63cd1ad6344",
    "vt": "4c5828f2929592a7",
    "cwe": "621c0fdf009927bb",
    "fwe": "f3c5aaa6ac48f85f",
    "needle": "1352efcbe8da8559",
    "mr_niah": "7dfc6993daaad79e",
}  # fmt: skip


@pytest.mark.parametrize("task", PINNED)
def test_hashes_are_the_same_on_every_machine(kit: Kit, task: str) -> None:
    assert make(kit, task, 8192, 1).digest[:16] == PINNED[task]


@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_a_function_of_seed_length_and_index(kit: Kit, task: str) -> None:
    base = make(kit, task, 8192)
    make(kit, task, 8192, 3)
    assert make(kit, task, 8192).digest == base.digest
    others = [make(kit, task, 8192, 3), make(kit, task, 8192, seed=1), make(kit, task, 8193)]
    assert len({base.digest, *(other.digest for other in others)}) == 4


def test_the_digest_tells_prompt_answers_and_room_apart() -> None:
    base = Prompt(np.array([1, 2, 3]), ("a", "b"), 5)
    others = [
        Prompt(np.array([1, 2, 4]), ("a", "b"), 5),
        Prompt(np.array([1, 2, 3]), ("a,", "b"), 5),
        Prompt(np.array([1, 2, 3]), ("a", "b"), 6),
        Prompt(np.array([1, 2, 3]), ("a", "b"), 5, one_suffices=True),
    ]
    assert len({base.digest, *(other.digest for other in others)}) == 5  # fmt: skip
    assert base.digest == Prompt(np.array([1, 2, 3], dtype=np.int32), ("a", "b"), 5, depth=0.5).digest


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_is_too_short_says_the_least(kit: Kit, task: str) -> None:
    with pytest.raises(ShortLength) as found:
        make(kit, task, 64)
    least = found.value.least
    assert 64 < least < 3000
    needed = make(kit, task, least + 300)  # names and numbers that are drawn differ by a few tokens
    assert len(needed.tokens_T) + needed.max_tokens == least + 300


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_multivalue", "needle", "mr_niah"])
def test_what_is_asked_for_lies_at_its_depth(kit: Kit, task: str) -> None:
    for index in range(3):
        prompt = make(kit, task, 16384, index)
        text = TOKENIZER.decode(prompt.tokens_T.tolist())
        assert prompt.depth is not None
        assert text.index(prompt.answers[0]) / len(text) == pytest.approx(prompt.depth, abs=0.06)


def test_several_answers_lie_apart_and_keys_differ(kit: Kit) -> None:
    for task, count in (("niah_multivalue", 4), ("niah_multiquery", 4), ("niah_multikey_1", 1)):
        prompt = make(kit, task, 16384)
        assert len(set(prompt.answers)) == len(prompt.answers) == count
        text = TOKENIZER.decode(prompt.tokens_T.tolist())
        assert text.count("\nThe special magic number of ") == 4 + 1 - (task != "niah_multikey_1")


def test_the_paper_s_sentence_stands_in_the_text(kit: Kit) -> None:
    prompt = make(kit, "needle", 4096, 1)
    text = TOKENIZER.decode(prompt.tokens_T.tolist())
    assert text.count(f" number is: {prompt.answers[0]}\n") == 1
    assert text.split()[-6:-3] == ["The", "special", "magic"] and text.endswith("number is:")


def test_rounds_have_needles_at_a_quarter_half_and_three_quarters(kit: Kit) -> None:
    text = TOKENIZER.decode(make(kit, "mr_niah", 32768).tokens_T.tolist())
    places = [i / len(text) for i in range(len(text)) if text.startswith("\nUser: Make a list", i)]
    assert places == pytest.approx([0.25, 0.5, 0.75], abs=0.02)
    assert [depth_of("mr_niah", (0.0,), index) for index in range(4)] == [0.25, 0.5, 0.75, 0.25]


def test_common_words_stand_as_often_as_is_said(kit: Kit) -> None:
    for length, common, other in ((16384, 30, 3), (4096, 6, 1)):
        prompt = make(kit, "cwe", length)
        body = TOKENIZER.decode(prompt.tokens_T.tolist()).rpartition("A numbered list")[2]
        words = [word for word in body.partition("\nQuestion")[0].split() if word.isalpha()]
        counts = {word: words.count(word) for word in prompt.answers}
        assert set(counts.values()) == {common}
        listed = [word for word in set(words) if word not in prompt.answers and len(word) == 6]
        assert sum(words.count(word) == other for word in listed) > len(listed) - 8


def test_frequent_words_are_the_second_to_fourth_of_a_zeta_distribution(kit: Kit) -> None:
    prompt = make(kit, "fwe", 65536)
    words = TOKENIZER.decode(prompt.tokens_T.tolist()).split()
    counts = [words.count(word) for word in prompt.answers]
    assert counts[0] / counts[1] == pytest.approx(9 / 4, rel=0.02) and counts[1] / counts[2] == pytest.approx(
        16 / 9, rel=0.02
    )


def test_the_frequent_words_are_never_level_with_the_next_one(kit: Kit) -> None:
    for length in range(440, 1200):
        prompt = make(kit, "fwe", length)
        (ids,) = Copier().generate([prompt.tokens_T], [prompt.max_tokens])
        assert share_found(TOKENIZER.decode(ids), prompt.answers) == 100, length
        assert len(prompt.tokens_T) + prompt.max_tokens == length


def test_words_that_are_drawn_differ() -> None:
    rng = np.random.default_rng(0)
    for draw in (
        made_words.words,
        made_words.keys,
        made_words.numbers,
        made_words.uuids,
        made_words.coded_words,
        made_words.names,
    ):
        assert len(set(draw(rng, 2000))) == 2000
    assert all(len(number) == 7 and number[0] != "0" for number in made_words.numbers(rng, 100))


def test_tasks_with_text_say_that_there_is_none() -> None:
    bare = Kit(TOKENIZER, None)
    for task, made in TASKS.items():
        if made.needs_text:
            with pytest.raises(ConfigError, match="--corpus"):
                make(bare, task, 8192)
        else:
            assert make(bare, task, 8192).laps == 0


def test_a_text_that_repeats_is_told(kit: Kit) -> None:
    assert make(kit, "needle", 4 * kit.haystack.num_tokens).laps > 3.5


def test_groups_name_tasks() -> None:
    assert all(task in TASKS for group in GROUPS.values() for task in group)
    assert len(GROUPS["ruler"]) == 11


@pytest.mark.parametrize(
    ("text", "answers", "share", "one"),
    [
        (" 123, and 456.", ("123", "456"), 100, 100),
        ("456", ("123", "456"), 50, 100),
        ("ABC def", ("abc", "DEF", "x"), 200 / 3, 100),
        ("1234567", ("123",), 100, 100),
        ("", ("a",), 0, 0),
        ("12 3", ("123",), 0, 0),
    ],
)
def test_answers_are_found_as_ruler_finds_them(text: str, answers: tuple[str, ...], share: float, one: float) -> None:
    assert share_found(text, answers) == pytest.approx(share) and one_found(text, answers) == one
