"""Files of a user: read as they are, and damaged ones refused with their line or record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmtrain.errors import ConfigError
from mmtrain.evals.files.choices import Question
from mmtrain.evals.files.mtob import first_line, read_mtob
from mmtrain.evals.files.read_choices import read_choices, read_longbench
from mmtrain.evals.ruler.questions import read_hotpotqa, read_squad


def write(path: Path, made: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(made if isinstance(made, str) else json.dumps(made), encoding="utf-8")
    return path


def test_choices_have_context_question_and_answers_of_three_kinds(tmp_path: Path) -> None:
    lines = [{"question": "q?", "choices": ["one", "two"], "answer": 1},
             {"context": "c", "question": "q?", "choices": ["one", "two"], "answer": "A"},
             {"context": "c", "choices": ["A", "B", "x"], "answer": "B", "more": 1},
             {"context": "c", "choices": ["x", "y", "z"], "answer": "z"}]  # fmt: skip
    path = write(tmp_path / "q.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n")
    found = read_choices(path, "--f")
    assert found[0] == Question("line 1", "q?", (" one", " two"), 1)
    assert [(one.name, one.context, one.answer) for one in found[1:]] == [
        ("line 3", "c\nq?", 0), ("line 5", "c", 1), ("line 7", "c", 2)
    ]  # fmt: skip


BAD_LINES = {
    '{"question": "q", "choices": ["a", "b"], "answer": 0': r"line 2 is no JSON",
    "[1]": "line 2 is no JSON object",
    '{"choices": ["a", "b"], "answer": 0}': r'line 2 has no text "question" or "context"',
    '{"question": 3, "choices": ["a", "b"], "answer": 0}': r'line 2 has no text "question" or "context"',
    '{"question": "q", "choices": ["a"], "answer": 0}': r'line 2 has no list "choices"',
    '{"question": "q", "choices": "ab", "answer": 0}': r'line 2 has no list "choices"',
    '{"question": "q", "choices": ["a", ""], "answer": 0}': r'line 2 has no list "choices"',
    '{"question": "q", "choices": ["a", "b"], "answer": 2}': r'line 2 has no "answer" that is one of its 2',
    '{"question": "q", "choices": ["a", "b"], "answer": true}': r'line 2 has no "answer"',
    '{"question": "q", "choices": ["a", "b"], "answer": "C"}': r'line 2 has no "answer"',
    '{"question": "q", "choices": ["a", "b"]}': r'line 2 has no "answer"',
    '{"question": "q", "choices": ["a", " "], "answer": 0}': r'line 2 has no list "choices"',
    r'{"question": "\\\ud83d\ude00\ud83d", "choices": ["a", "b"], "answer": 0}': r"no JSON \(\\ud83d is half of a char",
    f'{{"question": "q", "choices": ["a", "b"], "answer": {"9" * 5000}}}': "no JSON .a number has too many digits",
    "[" * 100_000: "line 2 is no JSON .nested too deeply",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"question": "q", "choices": ["x", "y"], "answer": 0})
    with pytest.raises(ConfigError, match=BAD_LINES[line]):
        read_choices(write(tmp_path / "q.jsonl", f"{good}\n{line}\n{good}\n"), "--f")


def test_whole_characters_of_two_escapes_and_escaped_backslashes_are_read(tmp_path: Path) -> None:
    line = r'{"question": "\\ud800 \ud83d\ude00", "choices": ["a", "b"], "answer": 0}'
    assert read_choices(write(tmp_path / "q.jsonl", line), "--f")[0].context == "\\ud800 \U0001f600"


def test_files_that_are_missing_empty_or_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--f=.*cannot be read"):
        read_choices(tmp_path / "gone.jsonl", "--f")
    with pytest.raises(ConfigError, match="holds no question"):
        read_choices(write(tmp_path / "empty.jsonl", "\n"), "--f")
    (tmp_path / "bytes.jsonl").write_bytes(b"abc\xff")
    with pytest.raises(ConfigError, match=r"not UTF-8 text .byte 3"):
        read_choices(tmp_path / "bytes.jsonl", "--f")


LONGBENCH = {"_id": "66f", "domain": "d", "sub_domain": "s", "difficulty": "hard", "length": "medium", "question": "Q?",
             "choice_A": "a1", "choice_B": "b1", "choice_C": "c1", "choice_D": "d1", "answer": "C",
             "context": "long text"}  # fmt: skip


def test_longbench_is_read_as_json_and_as_lines(tmp_path: Path) -> None:
    (one,) = read_longbench(write(tmp_path / "data.json", [LONGBENCH]), "--f")
    assert (one.name, one.choices, one.answer, one.groups) == ("66f", tuple("ABCD"), 2, ("hard", "medium"))
    assert one.context.startswith("long text\n\n") and "Q?\n(A) a1\n(B) b1\n(C) c1\n(D) d1\n" in one.context
    assert one.context.endswith("(")
    assert read_longbench(write(tmp_path / "data.jsonl", json.dumps(LONGBENCH) + "\n"), "--f") == [one]
    for made, problem in (
        ([LONGBENCH, {**LONGBENCH, "answer": "E"}], "record 2 has no .answer. A, B, C or D"),
        ([{**LONGBENCH, "choice_B": ""}], 'record 1 has no text "choice_B"'), ([3], "record 1 is no JSON object"),
        ({"data": []}, "is no list"), ([], "holds no question"), ('[{"a": 1,\n]', "is no JSON: .* in line 2"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=problem):
            read_longbench(write(tmp_path / "data.json", made), "--f")


def mtob(folder: Path, nested: bool = True) -> Path:
    splits, books = (folder / "splits", folder / "resources") if nested else (folder, folder)
    canary = {"big-bench-canary": "do not train"}
    write(splits / "test_examples_ek.json", [canary, {"original": "A dog.", "ground_truth": "Bal."}])
    write(splits / "test_examples_ke.json", [canary, {"original": "Bal.", "ground_truth": "A dog."}])
    write(books / "grammar_book.txt", "The grammar.")
    write(books / "grammar_book_for_claude_medium.txt", "Half.")
    return folder


@pytest.mark.parametrize("nested", [True, False])
def test_mtob_is_read_in_both_directions_with_each_book(tmp_path: Path, nested: bool) -> None:
    folder = mtob(tmp_path, nested)
    (one,) = read_mtob(folder, "mtob_ek", "full", "--f")
    assert one.prompt == "The grammar.\n\nTranslate from English to Kalamang.\nEnglish: A dog.\nKalamang:"
    assert (one.name, one.reference) == ("record 2", "Bal.")
    (one,) = read_mtob(folder, "mtob_ke", "medium", "--f")
    assert one.prompt.startswith("Half.\n\nTranslate from Kalamang to English.") and one.reference == "A dog."
    (one,) = read_mtob(folder, "mtob_ke", "none", "--f")
    assert one.prompt.startswith("Translate")
    (one,) = read_mtob(folder, "mtob_ke", str(write(tmp_path / "own.txt", "Mine.")), "--f")
    assert one.prompt.startswith("Mine.\n\n")
    with pytest.raises(ConfigError, match=r"has no grammar_book_for_claude_long\.txt"):
        read_mtob(folder, "mtob_ke", "long", "--f")
    with pytest.raises(ConfigError, match=r"has no test_examples_ke\.json"):
        read_mtob(tmp_path / "gone", "mtob_ke", "none", "--f")


@pytest.mark.parametrize(
    ("made", "problem"),
    [({}, "is no list"), ([{"canary": "x"}], "holds no sentence"), ([{}, 3], "record 2 is no JSON object"),
     ([{}, {"original": "x"}], 'record 2 has no text "ground_truth"'), ([{}, {"x": 1}], 'no text "original"')],
)  # fmt: skip
def test_damaged_mtob_is_refused(tmp_path: Path, made: Any, problem: str) -> None:
    write(tmp_path / "test_examples_ek.json", made)
    with pytest.raises(ConfigError, match=problem):
        read_mtob(tmp_path, "mtob_ek", "none", "--f")


def test_a_translation_is_the_first_line_of_what_comes() -> None:
    assert first_line("\n Bal. \nEnglish: next") == "Bal." and first_line(" \n") == ""


def squad() -> dict[str, Any]:
    asked = [{"question": "Who?", "answers": [{"text": "Ann"}, {"text": "Ann"}, {"text": "Bo"}]},
             {"question": "Why?", "answers": [], "is_impossible": True}]  # fmt: skip
    return {"data": [{"paragraphs": [{"context": "one", "qas": asked}, {"context": "two", "qas": []}]},
                     {"paragraphs": [{"context": "three", "qas": []}]}]}  # fmt: skip


def test_squad_and_hotpotqa_are_read(tmp_path: Path) -> None:
    found = read_squad(write(tmp_path / "s.json", squad()), "--s")
    (one,) = found.questions
    assert (one.text, one.answers, one.documents, one.near) == ("Who?", ("Ann", "Bo"), (0,), (0, 1))
    assert found.documents == ["one", "two", "three"] and found.option == "--s"
    made = [{"question": "Q", "answer": "yes", "context": [["T", ["a. ", "b."]], ["U", ["c."]]]},
            {"question": "R", "answer": "no", "context": [["T", ["a. ", "b."]]]}]  # fmt: skip
    found = read_hotpotqa(write(tmp_path / "h.json", made), "--h")
    assert found.documents == ["T\na. b.", "U\nc."]
    assert [one.documents for one in found.questions] == [(0, 1), (0,)]
    for reader, made in (
        (read_squad, [1]),
        (read_squad, {"data": [{}]}),
        (read_hotpotqa, squad()),
        (read_squad, {"data": []}),
    ):
        with pytest.raises(ConfigError, match=r"is not laid out|holds no question"):
            reader(write(tmp_path / "bad.json", made), "--s")


HOTPOTQA = {"question": "Q", "answer": "yes", "context": [["T", ["a."]]]}


@pytest.mark.parametrize("value", [5, None, ["x"]])
@pytest.mark.parametrize("name", ["question", "context", "answer"])
def test_what_is_no_text_in_squad_or_hotpotqa_is_refused_when_it_is_read(tmp_path: Path, name: str, value: Any) -> None:
    made = squad()
    paragraph = made["data"][0]["paragraphs"][0]
    of_name = {"context": paragraph, "question": paragraph["qas"][0], "answer": paragraph["qas"][0]["answers"][0]}
    of_name[name]["text" if name == "answer" else name] = value
    with pytest.raises(ConfigError, match="is not laid out as SQuAD's file"):
        read_squad(write(tmp_path / "s.json", made), "--s")
    with pytest.raises(ConfigError, match="is not laid out as HotpotQA's file"):
        read_hotpotqa(write(tmp_path / "h.json", [{**HOTPOTQA, name: value}]), "--h")


def test_answers_that_any_text_holds_are_passed_over(tmp_path: Path) -> None:
    made = squad()
    made["data"][0]["paragraphs"][0]["qas"][0]["answers"] += [{"text": ""}, {"text": " "}]
    (one,) = read_squad(write(tmp_path / "s.json", made), "--s").questions
    assert one.answers == ("Ann", "Bo")
    found = read_hotpotqa(write(tmp_path / "h.json", [HOTPOTQA, {**HOTPOTQA, "answer": " "}]), "--h")
    assert [one.answers for one in found.questions] == [("yes",)]
