"""The page of figures that Prometheus reads."""

from __future__ import annotations

from collections.abc import Mapping

from mmtrain.infer.endpoint.engine_thread import Books

TYPE = "text/plain; version=0.0.4; charset=utf-8"


def figures(books: Books, answers: Mapping[int, int], inside: int) -> str:
    """Return the page.

    Args:
        books: of the engine.
        answers: number of HTTP responses by status.
        inside: continuations that are at work or wait, and those whose client has not been answered yet.
    """
    lines = []
    for name, value in books.counts.items():
        lines += [f"# TYPE mmtrain_engine_{name}_total counter", f"mmtrain_engine_{name}_total {value}"]
    for name, value in {**books.occupancy._asdict(), "inside": inside}.items():
        lines += [f"# TYPE mmtrain_engine_{name} gauge", f"mmtrain_engine_{name} {value}"]
    lines.append("# TYPE mmtrain_http_responses_total counter")
    lines += [f'mmtrain_http_responses_total{{status="{status}"}} {count}' for status, count in sorted(answers.items())]
    return "\n".join(lines) + "\n"
