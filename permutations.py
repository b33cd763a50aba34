"""Six kinds of moves on a row of five digits, with worked solutions: `kind(rng) -> (question, steps, answer)`.

    31524~ad,be=   24531                 a guess
    31524~ad,be=   W21534,24531:24531    worked: the row after each move

Positions are the letters a to e, always two that are not neighbours; the sign after the row says what is done there. A
wrong move sometimes leads to the right row, more often than a guess. See `tasks.py`.
"""

from collections.abc import Callable

import numpy as np

CHARACTERS = "0123456789abcde,:=~<>^@#WVRLFK"
LENGTH, SIGNS = 5, "~<>^@#"


def _moves(sign: str, move: Callable[[list[str], int, int], list[str]]):
    """The maker of a kind: one or two moves on a row of distinct digits. move(row, i, j), i + 1 < j -> row after."""

    def make(rng: np.random.Generator) -> tuple[str, str, int]:
        row = [str(d) for d in rng.permutation(np.arange(1, 10))[:LENGTH]]
        start, names, rows = "".join(row), [], []
        for _ in range(int(rng.integers(1, 3))):
            i = int(rng.integers(LENGTH - 2))
            j = int(rng.integers(i + 2, LENGTH))
            row = move(row, i, j)
            names.append("abcde"[i] + "abcde"[j])
            rows.append("".join(row))
        return f"{start}{sign}{','.join(names)}=", ",".join(rows), int(rows[-1])

    return make


def any_sign(question: str, rng: np.random.Generator) -> str:
    """The same question under a sign drawn from all six."""
    return question[:LENGTH] + SIGNS[int(rng.integers(len(SIGNS)))] + question[LENGTH + 1 :]


# two digits change places
swap = _moves("~", lambda row, i, j: [*row[:i], row[j], *row[i + 1 : j], row[i], *row[j + 1 :]])
# a stretch is turned round
reverse = _moves("<", lambda row, i, j: [*row[:i], *row[i : j + 1][::-1], *row[j + 1 :]])
# the last digit of a stretch becomes its first
right = _moves(">", lambda row, i, j: [*row[:i], row[j], *row[i:j], *row[j + 1 :]])
# the first digit of a stretch becomes its last
left = _moves("^", lambda row, i, j: [*row[:i], *row[i + 1 : j + 1], row[i], *row[j + 1 :]])
# the second position's digit goes to the front of the row
front = _moves("@", lambda row, i, j: [row[j], *row[:j], *row[j + 1 :]])
# the first position's digit goes to the end of the row
end = _moves("#", lambda row, i, j: [*row[:i], *row[i + 1 :], row[i]])
