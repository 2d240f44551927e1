"""Prompts come from text, a file or standard input; what cannot be one is refused in a line."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from mmtrain.errors import ConfigError
from mmtrain.infer import prompt
from mmtrain.infer.prompt import read_prompt


class Input(io.TextIOWrapper):
    """Standard input with these bytes."""

    def __init__(self, data: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="ascii")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_the_prompt_is_taken_from_where_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_bytes("\ufeffOnce, né\r\n".encode())
    file = str(tmp_path / "story.txt")
    assert read_prompt(" as typed\n", None, Input(b"not read")) == " as typed\n"
    assert read_prompt(None, file, Input(b"not read")) == "Once, né"
    assert read_prompt(None, None, Input("a\n\nné\n\n".encode())) == "a\n\nné\n"  # one newline alone goes
    for text, name in (("-", None), (None, "-")):
        assert read_prompt(text, name, Input(b"typed\n", terminal=True)) == "typed"
    assert read_prompt(None, None, Input(b"")) == read_prompt("", None, None) == ""


def test_a_prompt_that_cannot_be_one_is_refused_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(text: str | None = None, file: object = None, stdin: Input | None = None) -> str:
        with pytest.raises(ConfigError) as caught:
            read_prompt(text, None if file is None else str(file), stdin)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    monkeypatch.setattr(prompt, "LIMIT", 8)
    (tmp_path / "long.txt").write_text("123456789")
    assert "byte 0xe9 at 1" in refusal(file=tmp_path / "latin.txt")
    assert "is longer than" in refusal(file=tmp_path / "long.txt")
    assert "No such file" in refusal(file=tmp_path / "gone.txt")
    assert "Is a directory" in refusal(file=tmp_path)
    assert "is not UTF-8" in refusal(stdin=Input(b"\xff\xfe"))
    assert "is longer than" in refusal(stdin=Input(b"123456789"))
    assert "is not UTF-8" in refusal(text="n\udce9")  # how Python hands over a byte of the command line
    assert "no prompt given" in refusal(stdin=Input(b"", terminal=True))
    assert "no prompt given" in refusal(stdin=None)
