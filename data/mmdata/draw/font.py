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


LETTERS, COLUMNS, ROWS = 3, 8, 24
"""Letters of a word, and dots of a picture: columns of a letter with the gaps beside it, rows of them all."""


def word_mask(word: str, width: int, height: int) -> np.ndarray:
    """A word across the middle of a picture, as large a share of it whatever its size: bool[height, width].

    A letter takes a third of the width. Its dots are oblong in a picture that is: eyes that see every picture as one
    square see letters of one size.

    Args:
        word: of three capital letters.
        width: pixels, at least `LETTERS * COLUMNS`.
        height: pixels, at least `ROWS`.
    """
    box = np.zeros((7, LETTERS, COLUMNS), dtype=np.bool_)
    for i, letter in enumerate(word):
        box[:, i, 1:6] = GLYPHS[letter]
    high, wide = height // ROWS, width // (LETTERS * COLUMNS)
    drawn = np.kron(box.reshape(7, -1), np.ones((high, wide), dtype=np.bool_))
    mask = np.zeros((height, width), dtype=np.bool_)
    top, left = (height - drawn.shape[0]) // 2, (width - drawn.shape[1]) // 2
    mask[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    return mask
