"""Texts of Parquet files: strings of any kind, binary columns that hold UTF-8, and fields of nested columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

_ROWS = 256  # rows decoded at a time, at most
_BATCH_BYTES = 1 << 22  # bytes decoded at a time, about


def row_groups(path: Path | str) -> int:
    """Number of row groups of a file; 0 if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_row_groups
    except (pa.ArrowException, OSError):
        return 0


def column_of(schema: pa.Schema, text_field: str) -> list[str] | None:
    """Names that lead to a text column, from the outermost in; None if there is no such column of text.

    A column of that very name comes before a path of names joined by dots.
    """
    names = [text_field] if text_field in schema.names else text_field.split(".")
    if names[0] not in schema.names:
        return None
    kind = schema.field(names[0]).type
    for name in names[1:]:
        if not _is_struct(kind) or kind.get_field_index(name) < 0:
            return None
        kind = kind.field(name).type
    return names if _is_text(kind) else None


def text_columns(table: pq.ParquetFile) -> list[tuple[str, int]]:
    """Columns of text, nested ones joined by dots, with the bytes that they take in the first row group."""
    sizes: dict[str, int] = {}
    if table.metadata.num_row_groups:
        group = table.metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        sizes = {column.path_in_schema: column.total_uncompressed_size for column in columns}
    return [(name, sizes.get(name, 0)) for field in table.schema_arrow for name in _text_names(field)]


def values(table: pq.ParquetFile, names: list[str], groups: range) -> Iterator[Any]:
    """Values of a column, row by row: str, bytes or None.

    Raises:
        ArrowException, OSError: the file is damaged.
        UnicodeDecodeError: a column declared as text does not hold UTF-8.
    """
    facts = [table.metadata.row_group(i) for i in groups]
    rows = sum(group.num_rows for group in facts)
    width = sum(group.total_byte_size for group in facts) // max(rows, 1)
    batch_rows = min(max(_BATCH_BYTES // max(width, 1), 1), _ROWS)
    for batch in table.iter_batches(batch_rows, row_groups=groups, columns=[".".join(names)], use_threads=False):
        column = batch.column(batch.schema.get_field_index(names[0]))
        for value in column.to_pylist():
            for name in names[1:]:
                value = None if value is None else value[name]
            yield value


def _is_struct(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_struct(kind)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = ("is_string", "is_large_string", "is_string_view", "is_binary", "is_large_binary", "is_binary_view",
             "is_fixed_size_binary", "is_null")  # fmt: skip
    return any(getattr(pa.types, test)(kind) for test in tests)


def _text_names(field: pa.Field, prefix: str = "") -> Iterator[str]:
    if _is_struct(field.type):
        for i in range(field.type.num_fields):
            yield from _text_names(field.type.field(i), f"{prefix}{field.name}.")
    elif _is_text(field.type):
        yield f"{prefix}{field.name}"
