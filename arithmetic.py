"""Six kinds of arithmetic problems with worked solutions: `kind(rng) -> (question, steps, answer)`. See `tasks.py`."""

import numpy as np

CHARACTERS = "0123456789+-*/=,:rqASMTDQ"


def _digits(n: int) -> list[int]:
    """Decimal digits, the lowest first."""
    return [int(c) for c in reversed(str(n))]


def _number(rng: np.random.Generator, digits: int) -> int:
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def addition(rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = _number(rng, int(rng.integers(1, 5))), _number(rng, int(rng.integers(1, 5)))
    steps, carry = [], 0
    x, y = _digits(a), _digits(b)
    for i in range(max(len(x), len(y))):
        terms = [d[i] for d in (x, y) if i < len(d)] + [carry] * (carry > 0)
        steps.append("+".join(map(str, terms)) + f"={sum(terms)}" if len(terms) > 1 else str(sum(terms)))
        carry = sum(terms) // 10
    return f"{a}+{b}=", ",".join(steps), a + b


def subtraction(rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = sorted((_number(rng, int(rng.integers(1, 5))), _number(rng, int(rng.integers(1, 5)))), reverse=True)
    steps, borrow, y = [], 0, _digits(b)
    for i, top in enumerate(_digits(a)):
        top -= borrow
        low = y[i] if i < len(y) else 0
        borrow = int(top < low)
        steps.append(f"{top + 10 * borrow}-{low}={top + 10 * borrow - low}")
    return f"{a}-{b}=", ",".join(steps), a - b


def multiplication(rng: np.random.Generator) -> tuple[str, str, int]:
    a, d = _number(rng, int(rng.integers(1, 5))), int(rng.integers(2, 10))
    steps, carry = [], 0
    for x in _digits(a):
        steps.append(f"{x}*{d}" + f"+{carry}" * (carry > 0) + f"={x * d + carry}")
        carry = (x * d + carry) // 10
    return f"{a}*{d}=", ",".join(steps), a * d


def several_terms(rng: np.random.Generator) -> tuple[str, str, int]:
    terms = [int(t) for t in rng.integers(1, 20, int(rng.integers(3, 7)))]
    steps, total = [], terms[0]
    for t in terms[1:]:
        steps.append(f"{total}+{t}={total + t}")
        total += t
    return "+".join(map(str, terms)) + "=", ",".join(steps), total


def division(rng: np.random.Generator) -> tuple[str, str, int]:
    quotient, d = _number(rng, int(rng.integers(1, 5))), int(rng.integers(2, 6))
    steps, rest = [], 0
    for x in reversed(_digits(quotient * d)):
        rest = 10 * rest + x
        steps.append(f"{rest}/{d}={rest // d}r{rest % d}")
        rest %= d
    return f"{quotient * d}/{d}=", ",".join(steps), quotient


def sum_of_squares(rng: np.random.Generator) -> tuple[str, str, int]:
    number = _number(rng, int(rng.integers(2, 5)))
    steps, total = [], 0
    for x in reversed(_digits(number)):
        steps.append(f"{x}*{x}" + f"+{total}" * (total > 0) + f"={total + x * x}")
        total += x * x
    return f"q{number}=", ",".join(steps), total
