"""Products with weights that are kept in int8, dequantised inside the product. See README.md beside this file."""

from mmkernels.int8_weights.api import grouped_int8_mlp, int8_linear
from mmkernels.int8_weights.int8_weight import (
    GROUP,
    Int8Weight,
    columns,
    dequantise,
    empty_int8,
    quantise,
    quantise_into,
    rows,
    scale_columns,
)

__all__ = [
    "GROUP",
    "Int8Weight",
    "columns",
    "dequantise",
    "empty_int8",
    "grouped_int8_mlp",
    "int8_linear",
    "quantise",
    "quantise_into",
    "rows",
    "scale_columns",
]
