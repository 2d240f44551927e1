"""Paragraphs and tables that are written as plain text or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns.
        rows: cells.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Title:
    """A heading."""

    text: str


Block = str | Table | Title


def as_text(blocks: Sequence[Block]) -> str:
    """Write blocks for a terminal: columns are aligned, headings underlined."""
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            rows = [block.head, *block.rows]
            widths = [max(len(row[i]) for row in rows) for i in range(len(block.head))]
            lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
            parts.append("\n".join(line.rstrip() for line in lines))
        else:
            parts.append(f"{block.text}\n{'-' * len(block.text)}" if isinstance(block, Title) else block)
    return "\n\n".join(parts) + "\n"


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Write blocks as a page under a title."""
    parts = [f"# {title}"]
    for block in blocks:
        if isinstance(block, Table):
            rows = [block.head, ["---"] * len(block.head), *block.rows]
            parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows))
        else:
            parts.append(f"## {block.text}" if isinstance(block, Title) else block)
    return "\n\n".join(parts) + "\n"
