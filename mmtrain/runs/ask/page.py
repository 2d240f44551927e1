"""A page of pictures with questions and a model's answers: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from mmtrain.runs.ask.questions import ImageQuestion
from mmtrain.runs.ask.scores import ScoreLine

_STYLE = """
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } td, th { padding: .2em .9em .2em 0; text-align: right }
td:first-child, th:first-child { text-align: left }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11em, 1fr)); gap: 1em }
.card { border: 1px solid #ccc; border-radius: 6px; padding: .7em }
.card img { width: 100%; height: 8em; object-fit: contain; image-rendering: pixelated; background: #f4f4f4 }
.right { color: #176c2d } .wrong { color: #a51d1d } .card p { margin: .3em 0 }
"""
_KINDS = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


def answers_page(
    title: str,
    right: Sequence[ScoreLine],
    preferred: Sequence[ScoreLine],
    questions: Sequence[ImageQuestion],
    answers: Sequence[str],
    most: int,
) -> str:
    """Return the page.

    Args:
        title: of it.
        right: shares of right answers by kind.
        preferred: shares of pairs whose right answer is preferred, by kind; there may be none.
        questions: that were asked.
        answers: of the model, one a question.
        most: pictures on it, as many of each kind as of any other; those of no file format that browsers show are left
            out.
    """
    shown = _chosen(questions, most)
    cards = [card for i in shown if (card := _card(questions[i], answers[i]))]
    tables = _table("questions on", "right", right) + _table("pairs on", "right answer preferred", preferred)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>{escape(title)}</h1>{tables}<div class="cards">{"".join(cards)}</div></body></html>\n'
    )


def _table(what: str, share: str, lines: Sequence[ScoreLine]) -> str:
    if not lines:
        return ""
    earlier = any(line.before is not None for line in lines)
    rows = "".join(
        f"<tr><td>{escape(line.kind)}</td><td>{line.share:.1%}</td>"
        + (f"<td>{line.before:.1%}</td>" if line.before is not None else "")
        + f"<td>{line.chance:.1%}</td><td>{line.asked:,}</td></tr>"
        for line in lines
    )
    before = "<th>before</th>" if earlier else ""
    head = f"<tr><th>{what}</th><th>{share}</th>{before}<th>{lines[0].by_chance}</th><th>asked</th></tr>"
    return f"<table>{head}{rows}</table>"


def _chosen(questions: Sequence[ImageQuestion], most: int) -> list[int]:
    """Return the numbers of questions to show: the first of each kind in turn."""
    by_kind: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        by_kind.setdefault(question.kind, []).append(i)
    deepest = max(map(len, by_kind.values()), default=0)
    turns = [numbers[k] for k in range(deepest) for numbers in by_kind.values() if k < len(numbers)]
    return turns[:most]


def _card(question: ImageQuestion, answer: str) -> str:
    data = question.picture() if question.images else b""
    kind = next((name for begin, name in _KINDS.items() if data.startswith(begin)), None)
    if kind is None:
        return ""
    right = answer == question.answer
    missed = "" if right else f" (right: {escape(question.answer)})"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f'<div class="card"><img alt="" src="{source}"><p>{escape(question.question)}</p>'
        f'<p class="{"right" if right else "wrong"}">{escape(answer) or "(nothing)"}{missed}</p></div>'
    )
