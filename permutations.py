"""Six kinds of moves on a row of four digits, with worked solutions: `kind(rng) -> (question, steps, answer)`.

    3152~ad,bc=   72              a guess
    3152~ad,bc=   W2153,2513:25   worked: the row after each move

Positions are the letters a to d; the sign after the row says what is done there; asked are the first two digits of the
row that results. See `tasks.py`.
"""

from collections.abc import Callable

import numpy as np

CHARACTERS = "0123456789abcd,:=~#<>^@WXVRLN"
LENGTH = 4


def _moves(sign: str, move: Callable[[list[str], np.random.Generator], tuple[str, list[str]]]):
    """The maker of a kind: one to three moves on a row of distinct digits, each `move` a (name, row afterwards)."""

    def make(rng: np.random.Generator) -> tuple[str, str, int]:
        row = [str(d) for d in rng.permutation(np.arange(1, 10))[:LENGTH]]
        start, names, rows = "".join(row), [], []
        for _ in range(int(rng.integers(1, 4))):
            name, row = move(row, rng)
            names.append(name)
            rows.append("".join(row))
        return f"{start}{sign}{','.join(names)}=", ",".join(rows), int(rows[-1][:2])

    return make


def _two(rng: np.random.Generator) -> tuple[int, int]:
    """Two positions, the lower first."""
    i, j = sorted(int(x) for x in rng.permutation(LENGTH)[:2])
    return i, j


def _name(*positions: int) -> str:
    return "".join("abcd"[p] for p in positions)


def _swap(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    row = row.copy()
    row[i], row[j] = row[j], row[i]
    return _name(i, j), row


def _reverse(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    return _name(i, j), row[:i] + row[i : j + 1][::-1] + row[j + 1 :]


def _right(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    return _name(i, j), row[:i] + [row[j]] + row[i:j] + row[j + 1 :]


def _left(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    return _name(i, j), row[:i] + row[i + 1 : j + 1] + [row[i]] + row[j + 1 :]


def _step(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i = int(rng.integers(LENGTH - 1))
    return _name(i), row[:i] + [row[i + 1], row[i]] + row[i + 2 :]


def _exchange(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    x, y = row[i], row[j]
    return x + y, [{x: y, y: x}.get(digit, digit) for digit in row]


swap = _moves("~", _swap)  # exchange the digits in two positions
exchange = _moves("#", _exchange)  # exchange two digits, wherever they are
reverse = _moves("<", _reverse)  # turn a stretch round
right = _moves(">", _right)  # the last digit of a stretch becomes its first
left = _moves("^", _left)  # the first digit of a stretch becomes its last
step = _moves("@", _step)  # exchange a digit with its right neighbour
