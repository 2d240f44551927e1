"""What an offline evaluation is asked for, as a command line says it, checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config.evals import NEEDLE_KINDS
from mmtrain.config.schema import parse_count
from mmtrain.errors import ConfigError, nearest
from mmtrain.evals.files.mtob import BOOKS, DIRECTIONS
from mmtrain.evals.ruler.registry import GROUPS, TASKS

PERPLEXITY = "perplexity"
IMAGES = "images"
CHOICES_BY = ("text", "letter")
FILE_OPTIONS = {
    "longbench_v2": "--longbench-file", "choices": "--choices-file", **dict.fromkeys(DIRECTIONS, "--mtob-folder"),
    "qa_1": "--squad-file", "qa_2": "--hotpotqa-file",
    IMAGES: "--images",
}  # fmt: skip
"""Tasks whose data a user has on disk, and the option that names them."""
ALL_GROUPS = {**GROUPS, "needles": NEEDLE_KINDS}
"""Names that stand for several tasks; `needles` are the kinds of `evals.needles`, as training scores them."""
QUESTION_TASKS = ("qa_1", "qa_2")
LEAST, MOST = 16, 2**22
MOST_SAMPLES = 10**6  # of a task and length: all are listed before the first is made


@dataclass(frozen=True)
class EvalRequest:
    """Tasks and how they are run.

    Attributes:
        tasks: names, groups resolved, each once.
        lengths: tokens of a sample with its answer, ascending; of tasks that are made.
        samples: of each task and length; of files all are read.
        seed: of the draws.
        depths: where what is asked for lies; samples take them in turn.
        files: of each task that reads files, the path.
        mtob_book: "none", a name of MTOB's books, or a file.
        max_length: tokens of a sample of a file; None is without limit.
        leave_out_longer: longer ones are left out and counted, where they would be refused.
        answer_tokens: of an answer to a question on images, at most.
        choices_by: what is scored of choices of such questions, their "text" or their "letter".
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    samples: int = 10
    seed: int = 0
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    files: tuple[tuple[str, Path], ...] = ()
    mtob_book: str = "full"
    max_length: int | None = None
    leave_out_longer: bool = False
    answer_tokens: int = 32
    choices_by: str = CHOICES_BY[0]

    def made(self, task: str) -> bool:
        """Whether samples of a task are made, at the lengths that are asked for."""
        return task in (*TASKS, *NEEDLE_KINDS, *QUESTION_TASKS, PERPLEXITY)

    def needs_text(self) -> list[str]:
        """Return the tasks that take held-out text."""
        return [task for task in self.tasks
                if task in (PERPLEXITY, *NEEDLE_KINDS) or (task in TASKS and TASKS[task].needs_text)]  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Return the request as JSON."""
        own = {"answer_tokens": self.answer_tokens, "choices_by": self.choices_by} if IMAGES in self.tasks else {}
        return own | {
            "tasks": list(self.tasks), "lengths": list(self.lengths), "samples": self.samples, "seed": self.seed,
            "depths": list(self.depths), "files": {task: str(path) for task, path in self.files},
            "mtob_book": self.mtob_book, "max_length": self.max_length, "leave_out_longer": self.leave_out_longer,
        }  # fmt: skip

    def validate(self) -> None:
        """Refuse what cannot be run.

        Raises:
            ConfigError: a number is out of range, lengths are missing, or a file is not there.
        """
        if not 1 <= self.samples <= MOST_SAMPLES:
            raise ConfigError("--samples", self.samples, f"must be at least 1, and {MOST_SAMPLES:,} at most",
                              "give for example 50")  # fmt: skip
        if self.answer_tokens < 1:
            raise ConfigError("--answer-tokens", self.answer_tokens, "must be at least 1", "leave it out for 32")
        if self.seed < 0:
            raise ConfigError("--seed", self.seed, "must be at least 0", "leave it out for 0")
        for depth in self.depths:
            if not 0 <= depth <= 1:
                raise ConfigError("--depths", depth, "must lie in [0, 1]", "0 is the beginning, 1 right at the end")
        made = [task for task in self.tasks if self.made(task)]
        if made and not self.lengths:
            raise ConfigError("--lengths", None, f"is needed for {', '.join(made)}", "give --lengths 4Ki,32Ki")
        if self.leave_out_longer and self.max_length is None:
            raise ConfigError("--leave-out-longer", "true", "says nothing without a length", "give --max-length 128Ki")
        files = dict(self.files)
        for task in self.tasks:
            option = FILE_OPTIONS.get(task)
            if option and task not in files:
                raise ConfigError(option, None, f"is needed for {task}, whose data are not made here",
                                  "give their path, or leave the task out")  # fmt: skip
            if option and not files[task].exists():
                raise ConfigError(option, files[task], "no such file or folder", "give a path that is there")
        if self.mtob_book not in ("none", *BOOKS) and not Path(self.mtob_book).is_file():
            raise ConfigError("--mtob-book", self.mtob_book, "is neither a book of MTOB nor a file",
                              f"give none, {', '.join(BOOKS)}, or a text file")  # fmt: skip


def parse_tasks(text: str, files: Sequence[str]) -> tuple[str, ...]:
    """Read names of tasks and groups, with commas between them.

    Args:
        text: of ``--tasks``.
        files: tasks whose files are given; `ruler` has those of its question tasks.

    Raises:
        ConfigError: there is no such name, or none at all.
    """
    found: list[str] = []
    known = [*TASKS, *NEEDLE_KINDS, *ALL_GROUPS, *FILE_OPTIONS, PERPLEXITY]
    for name in (part.strip() for part in text.split(",")):
        if name in ALL_GROUPS:
            found += ALL_GROUPS[name]
            found += [task for task in QUESTION_TASKS if name == "ruler" and task in files]
        elif name in known:
            found.append(name)
        else:
            raise ConfigError("--tasks", name or text, "is no task", nearest(name, known))
    return tuple(dict.fromkeys(found))


def parse_lengths(text: str | None) -> tuple[int, ...]:
    """Read counts of tokens, with commas between them, such as ``4Ki,128Ki,1Mi``; None is none.

    Raises:
        ConfigError: one is no count, or out of range, or given twice.
    """
    if text is None:
        return ()
    found = [parse_count(part.strip(), "--lengths") for part in text.split(",")]
    for length in found:
        if not LEAST <= length <= MOST:
            raise ConfigError("--lengths", f"{length:,}", f"must lie in [{LEAST}, {MOST:,}]", "give 4Ki to 4Mi")
    if len(set(found)) < len(found):
        raise ConfigError("--lengths", text, "names one twice", "name each once")
    return tuple(sorted(found))


def parse_depths(text: str) -> tuple[float, ...]:
    """Read depths, with commas between them.

    Raises:
        ConfigError: one is no number, or given twice.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError("--depths", text, "is no list of numbers", "give --depths 0,0.5,1") from None
    if len(set(found)) < len(found):
        raise ConfigError("--depths", text, "names one twice", "name each once")
    return found
