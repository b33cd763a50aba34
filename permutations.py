"""Six kinds of moves on a row of five digits, with worked solutions: `kind(rng) -> (question, steps, answer)`.

    31524~ad,be=   24531                 a guess: the row after all moves at once
    31524~ad,be=   W21534,24531:24531    worked: the row after each move

Positions are the letters a to e; the sign after the row says what is done there. See `tasks.py`.
"""

from collections.abc import Callable

import numpy as np

CHARACTERS = "0123456789abcde,:=~<>^#@WVIFRO"
LENGTH = 5


def _moves(sign: str, move: Callable[[list[str], np.random.Generator], tuple[str, list[str]]]):
    """The maker of a kind: one to four moves on a row of distinct digits, each `move` a (name, row afterwards)."""

    def make(rng: np.random.Generator) -> tuple[str, str, int]:
        row = [str(d) for d in rng.permutation(np.arange(1, 10))[:LENGTH]]
        start, names, rows = "".join(row), [], []
        for _ in range(int(rng.integers(1, 5))):
            name, row = move(row, rng)
            names.append(name)
            rows.append("".join(row))
        return f"{start}{sign}{','.join(names)}=", ",".join(rows), int(rows[-1])

    return make


def _two(rng: np.random.Generator) -> tuple[int, int]:
    """Two positions, the lower first."""
    i, j = sorted(int(x) for x in rng.permutation(LENGTH)[:2])
    return i, j


def _name(*positions: int) -> str:
    return "".join("abcde"[p] for p in positions)


def _swap(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    row = row.copy()
    row[i], row[j] = row[j], row[i]
    return _name(i, j), row


def _reverse(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    return _name(i, j), row[:i] + row[i : j + 1][::-1] + row[j + 1 :]


def _insert(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = (int(x) for x in rng.permutation(LENGTH)[:2])
    rest = row[:i] + row[i + 1 :]
    return _name(i, j), rest[:j] + [row[i]] + rest[j:]


def _front(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i = int(rng.integers(1, LENGTH))
    return row[i], [row[i], *row[:i], *row[i + 1 :]]


def _rotate(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = _two(rng)
    return _name(i, j), row[:i] + [row[j]] + row[i:j] + row[j + 1 :]


def _order(row: list[str], rng: np.random.Generator) -> tuple[str, list[str]]:
    i, j = (int(x) for x in rng.permutation(LENGTH)[:2])  # named backwards, the stretch descends
    low, high = min(i, j), max(i, j) + 1
    return _name(i, j), row[:low] + sorted(row[low:high], reverse=i > j) + row[high:]


swap = _moves("~", _swap)  # exchange two positions
reverse = _moves("<", _reverse)  # turn a stretch round
insert = _moves(">", _insert)  # take the digit from one position to another
front = _moves("^", _front)  # bring a digit, named by itself, to the front
rotate = _moves("@", _rotate)  # the last digit of a stretch becomes its first
order = _moves("#", _order)  # sort a stretch
