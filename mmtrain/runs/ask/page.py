"""A page of pictures with questions and a model's answers: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from mmtrain.runs.ask.answers import KindScore
from mmtrain.runs.ask.questions import ImageQuestion

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
    title: str, scores: Sequence[KindScore], questions: Sequence[ImageQuestion], answers: Sequence[str], most: int
) -> str:
    """Return the page.

    Args:
        title: of it.
        scores: by kind.
        questions: that were asked.
        answers: of the model, one a question.
        most: pictures on it, as many of each kind as of any other; those of no file format that browsers show are left
            out.
    """
    shown = _chosen(questions, most)
    cards = [card for i in shown if (card := _card(questions[i], answers[i]))]
    rows = "".join(
        f"<tr><td>{escape(one.kind)}</td><td>{one.accuracy:.1%}</td><td>{one.blind / one.asked:.1%}</td>"
        f"<td>{one.asked:,}</td></tr>"
        for one in scores
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1>"
        "<table><tr><th>questions on</th><th>right</th><th>commonest answer</th><th>asked</th></tr>"
        f'{rows}</table><div class="cards">{"".join(cards)}</div></body></html>\n'
    )


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
