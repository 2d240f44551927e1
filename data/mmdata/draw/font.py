"""Capital letters, five dots wide and seven high, drawn for this project."""

from __future__ import annotations

import numpy as np

_ROWS = """
A .###. #...# #...# ##### #...# #...# #...#
B ####. #...# #...# ####. #...# #...# ####.
C .#### #.... #.... #.... #.... #.... .####
D ####. #...# #...# #...# #...# #...# ####.
E ##### #.... #.... ####. #.... #.... #####
F ##### #.... #.... ####. #.... #.... #....
G .#### #.... #.... #..## #...# #...# .###.
H #...# #...# #...# ##### #...# #...# #...#
I ##### ..#.. ..#.. ..#.. ..#.. ..#.. #####
J ..### ...#. ...#. ...#. ...#. #..#. .##..
K #...# #..#. #.#.. ##... #.#.. #..#. #...#
L #.... #.... #.... #.... #.... #.... #####
M #...# ##.## #.#.# #.#.# #...# #...# #...#
N #...# ##..# #.#.# #..## #...# #...# #...#
O .###. #...# #...# #...# #...# #...# .###.
P ####. #...# #...# ####. #.... #.... #....
Q .###. #...# #...# #...# #.#.# #..#. .##.#
R ####. #...# #...# ####. #.#.. #..#. #...#
S .#### #.... #.... .###. ....# ....# ####.
T ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
U #...# #...# #...# #...# #...# #...# .###.
V #...# #...# #...# #...# #...# .#.#. ..#..
W #...# #...# #...# #.#.# #.#.# ##.## #...#
X #...# #...# .#.#. ..#.. .#.#. #...# #...#
Y #...# #...# .#.#. ..#.. ..#.. ..#.. ..#..
Z ##### ....# ...#. ..#.. .#... #.... #####
"""
GLYPHS = {
    line[0]: np.array([[dot == "#" for dot in row] for row in line[2:].split()], dtype=np.bool_)
    for line in _ROWS.strip().splitlines()
}
"""bool[7, 5] of each letter."""


def word_mask(word: str, width: int, height: int) -> np.ndarray:
    """A word in the largest whole-dot size that fits into a box, in its middle: bool[height, width].

    Args:
        word: of capital letters.
        width: pixels, at least 6 a letter less 1.
        height: pixels, at least 7.
    """
    gap = np.zeros((7, 1), dtype=np.bool_)
    columns = [part for letter in word for part in (GLYPHS[letter], gap)][:-1]
    dots = np.concatenate(columns, axis=1)
    scale = max(1, min(width // dots.shape[1], height // 7))
    drawn = np.kron(dots, np.ones((scale, scale), dtype=np.bool_))[:height, :width]
    mask = np.zeros((height, width), dtype=np.bool_)
    top, left = (height - drawn.shape[0]) // 2, (width - drawn.shape[1]) // 2
    mask[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    return mask
