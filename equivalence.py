"""Are two answers the same? Exact rules for what an answer is made of, then math-verify for single expressions.

An answer is normalised (LaTeX dress taken off), then taken apart: lists and sets, tuples and intervals, unions, plus
or minus, `x = ...`, units. The parts are compared as

    number       by exact rational value: 0.333 is not 1/3. 50% is 1/2, and also 50 where no sign is asked for.
    word         by its letters, whatever their case
    unit         must agree where both sides give one
    list, set    in any order, equal in number; {1, 2} and 1, 2 are the same, {1, 2} and (1, 2) are not
    tuple        in order, and a bare list may stand for it; (1, 2) and [1, 2] differ
    expression   by math-verify

`compare` without the last step says None where it would be needed: that is the part whose running time nothing bounds.

math-verify 0.9 is asked about single expressions alone, because of what it gets wrong or takes too lightly (each is a
row of the table in the tests): units are ignored (5 cm = 5 m), sets and tuples are one ({1, 2} = (1, 2)), repeated
entries vanish (5, 5 = 5), subscripts vanish (1011_2 = 1011_3), words are products of letters (dog = god), and
0.\\overline{3} is not 1/3. Beyond that:
- LaTeX extraction only. ExprExtractionConfig hands text to sympy's parse_expr, which is `eval`.
- No code from text. LaTeX has a way to `exec` too: an infinite sum is evaluated with sympy's lambdify, which prints
  symbols by name into source code. `_no_code` therefore stands between them and sympy's `eval` and `exec`.
- No time-outs of its own: they are SIGALRM, which fails off the main thread and cannot interrupt a long C call.
- Numbers are compared to 12 decimals of 40 digits; by default 10^{-8}\\sqrt{2} would equal 10^{-8}\\sqrt{3}.
- We catch nothing around it: `parse` and `verify` turn every Exception (syntax errors, RecursionError, MemoryError,
  sympy's own) into "no match".
"""

import contextlib
import functools
import logging
import re
import sys
from collections.abc import Callable
from fractions import Fraction

MAX_NUMBER = 64  # characters; longer digit strings are compared as strings
MAX_ANSWER = 512  # characters; a longer answer is right only if it is the gold answer to the letter
MAX_POWER = 400  # digits of an integer power that is multiplied out here

Ask = Callable[[str, str], bool]  # answer, gold -> are these two expressions equal?


# ---- normal form

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[−–]", "-"), (r"×", r"\\times "), (r"·|⋅", r"\\cdot "), (r"π", r"\\pi "), (r"∞", r"\\infty "),
        (r"±", r"\\pm "), (r"∪", r"\\cup "), (r"≤", r"\\le "), (r"≥", r"\\ge "), (r"∈", r"\\in "),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"√\s*(\d+)", r"\\sqrt{\1}"), (r"²", "^2"), (r"³", "^3"),
        (r"\\infin\b|\binfinity\b|\binf\b", r"\\infty "), (r"\\emptyset|∅", r"\\varnothing "),
        (r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|limits)(?![a-zA-Z])\.?", ""),
        (r"\\[dtc]frac", r"\\frac"), (r"\\([gl])eq?(?:slant)?(?![a-zA-Z])", r"\\\1e "),
        (r"\\[!,;:]|\\(?:q?quad|thinspace)(?![a-zA-Z])", "\x01"),  # a gap: between digits it groups thousands
        (r"(?<=\d)\x01(?=\d{3}(?!\d))", ""), ("\x01", " "),
        (r"\{,\}", ","), (r"\\?\$|\\[()\[\]]|[£€]", ""),
        (r"(?:\^\s*\{?\s*(?:\\circ|∘)\s*\}?|°|\\degrees?(?![a-zA-Z]))\s*([CF](?![a-zA-Z]))?", r" degrees\1 "),
        (r"\\?%|\\?\bpercent\b", "%"),
        (r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf)|operatorname|mbox|hbox)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:boxed|fbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"), (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"),
        (r"\\ |~|\\\\$", " "),
        (r"[\s*]+$|^[\s*]+", ""), (r"(?<=.)[.,;]$", ""),
        (r"\s+", " "),
        # "2 1/2" is not 21/2, "5 cm" not the product 5cm, and "1, 234" not 1,234: elsewhere a space means nothing
        (r"(?<![\w,)}%]) | (?![\w(\\%-])|(?<=[)}%,]) (?=[-(\\{%])|(?<=\\ge) |(?<=\\le) ", ""),
    ]
]


def normalise(text: str) -> str:
    """Text without what LaTeX and style put around the same mathematics."""
    text = text.strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


# ---- numbers

NUMBER_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_POWER = r"(?:(?:\\times|\\cdot|\*) ?10\^(?:\{([-+]?\d{1,3})\}|(\d))|[eE]([-+]?\d{1,3}))?"
_PLAIN = re.compile(rf"([-+]?)({NUMBER_DIGITS})(?: ?/ ?({NUMBER_DIGITS})|{_POWER})", re.ASCII)
_FRACTION = re.compile(r"([-+]?)\\frac\{ ?([-+]?\d+) ?\}\{ ?([-+]?\d+) ?\}", re.ASCII)
_MIXED = re.compile(r"([-+]?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))", re.ASCII)
_INTEGER_POWER = re.compile(r"([-+]?)(\d{1,9})\^(?:\{(-?\d{1,3})\}|(\d))", re.ASCII)
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\overline\{(\d+)\}", re.ASCII)


def rational(text: str) -> Fraction | None:
    """The exact value of a number: 1,000  -2.50  3/4  \\frac{3}{4}  1\\frac12  1.5\\times10^{-7}  2^{10}
    0.\\overline{3}; None for anything else. Raises ZeroDivisionError for 1/0."""
    if len(text) > MAX_NUMBER:
        return None
    if match := _FRACTION.fullmatch(text):
        sign, top, bottom = match.groups()
        value = Fraction(int(top), int(bottom))
    elif match := _PLAIN.fullmatch(text):
        sign, top, bottom, *power = match.groups()
        top, bottom = (Fraction(part.replace(",", "")) for part in (top, bottom or "1"))
        value = top / bottom * Fraction(10) ** next((int(p) for p in power if p), 0)
    elif match := _MIXED.fullmatch(text):
        sign, whole, *parts = match.groups()
        top, bottom = (int(part) for part in parts if part)
        value = int(whole) + Fraction(top, bottom)
    elif match := _INTEGER_POWER.fullmatch(text):
        sign, base, long, short = match.groups()
        exponent = int(long or short)
        if len(base) * abs(exponent) > MAX_POWER:
            return None
        value = Fraction(int(base)) ** exponent
    elif match := _REPEATING.fullmatch(text):
        sign, whole, head, cycle = match.groups()
        shift = 10 ** len(head)
        value = Fraction(int(whole + head or "0"), shift) + Fraction(int(cycle), shift * (10 ** len(cycle) - 1))
    else:
        return None
    return -value if sign == "-" else value


# ---- units

_UNITS = {  # what means the same; a unit not listed is the same as itself and as its plural
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inches", "ft": "foot feet", "mi": "mile", "yd": "yard", "g": "gram", "kg": "kilogram", "lb": "pound",
    "s": "sec second", "min": "minute", "h": "hr hour", "l": "liter litre", "ml": "milliliter millilitre",
    "degrees": "degree deg", "dollars": "dollar", "cents": "cent", "rad": "radian", "sq": "square", "cu": "cubic",
    "mph": "", "n": "newton", "j": "joule", "w": "watt", "v": "volt", "a": "ampere amp", "k": "kelvin", "hz": "hertz",
}
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in (unit, *words.split())}
_NO_UNIT = {"pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "mod", "and", "or", "in"}  # after a number
_UNIT = re.compile(r"(.*[\d)}%]) ?((?:per |/ ?)?[A-Za-z]+(?:\^[23])?(?:(?: |/| / | per )[A-Za-z]+(?:\^[23])?)*)")


def _split_unit(text: str) -> tuple[str, tuple[str, ...]]:
    """("5", ("cm",)) of "5 cm", ("5", ("m", "/", "s")) of "5 m/s"; (text, ()) where no unit stands behind a number."""
    match = _UNIT.fullmatch(text)
    if not match or rational(match[1].rstrip("%")) is None and "\\" not in match[1] and "(" not in match[1]:
        return text, ()
    words = re.findall(r"[A-Za-z]+|/|\^[23]", match[2].replace(" per ", "/"))
    spaced = text[len(match[1])] == " "
    if words[0] in _NO_UNIT - ({"in"} if spaced else set()) or (not spaced and len(words[0]) == 1):
        return text, ()
    if len(words) == 1 and len(words[0]) == 1 and words[0].lower() not in _UNIT_OF:
        return text, ()
    names = [_UNIT_OF.get(w.lower(), _UNIT_OF.get(w.lower().removesuffix("s"), w.lower().removesuffix("s")))
             for w in words]
    for power, word in (("^2", "sq"), ("^3", "cu")):  # "square cm" is cm^2
        while word in names[:-1]:
            at = names.index(word)
            names[at : at + 2] = [names[at + 1], power]
    return match[1], tuple(names)


# ---- comparison

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_LEFT_SIDE = re.compile(r"(?:\\?[A-Za-z|∠][\w\\{}()',| ]*|[\d +*/^().-]+)(?:=|\\in )")
_SUBSCRIPT = re.compile(r"(?<!\\log)_(?:\{[^{}]*\}|.)")
_JOIN = re.compile(r" ?(?:[,;] ?(?:and |or )?|\band\b|\bor\b) ?")


def _split(text: str, separator: re.Pattern) -> list[str]:
    """Parts of `text` between separators outside all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if depth == 0 and (match := separator.match(text, position)) and match.end() > position:
            parts.append(text[start:position].strip())
            start = position = match.end()
            continue
        depth += (character in "([{") - (character in ")]}")
        depth = max(depth, 0)
        position += 2 if character == "\\" and text[position : position + 2] not in (r"\{", r"\}") else 1
    return [*parts, text[start:].strip()]


def _parts(text: str) -> tuple[str, list[str]]:
    """What `text` is and its parts: ("(]", [a, b]) an interval, "()" a tuple, "{}" a set, "," a list, "u" a union,
    "" a single thing."""
    if rational(text) is not None:
        return "", [text]
    pieces = _split(text, re.compile(r" ?\\cup ?"))
    if len(pieces) > 1:
        return "u", pieces
    pieces = _split(text, _JOIN)
    if len(pieces) > 1 and all(pieces):
        return ",", pieces
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inside = text[2:-2].strip()
        return "{}", _split(inside, _JOIN) if inside else []
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and _closes_last(text):
        inside = _split(text[1:-1].strip(), re.compile(r" ?, ?"))
        if len(inside) > 1 and all(inside):
            return text[0] + text[-1], inside
    if r"\pm" in text and text.count(r"\pm") == 1:
        plus, minus = text.replace(r"\pm", "+"), text.replace(r"\pm", "-")
        return ",", [normalise(plus).removeprefix("+").strip(), normalise(minus)]
    return "", [text]


def _closes_last(text: str) -> bool:
    """Whether the bracket that opens `text` is closed by its last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return position == len(text) - 1
    return False


def compare(answer: str | None, gold: str, ask: Ask | None = None) -> bool | None:
    """Whether `answer` is the same as `gold`; None where only `ask` could tell and it was not given."""
    if not answer or not answer.strip():
        return False
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer == gold
    try:
        return _compare(normalise(answer), normalise(gold), ask)
    except ZeroDivisionError:  # 5/0 is no number and equals none
        return False


def _compare(answer: str, gold: str, ask: Ask | None) -> bool | None:
    if answer == gold:
        return answer != ""
    if not answer or not gold:
        return False
    answer, gold = _without_left_side(answer, gold)
    (kind, ours), (kind_gold, theirs) = _parts(answer), _parts(gold)
    if kind == kind_gold == "":
        return _single(answer, gold, ask)
    kinds = {kind, kind_gold}
    if kind == kind_gold and kind[0] in "([" or kinds == {",", "()"}:  # in order
        if len(ours) != len(theirs):
            return False
        verdicts = [_compare(a, g, ask) for a, g in zip(ours, theirs, strict=True)]
        return False if False in verdicts else None if None in verdicts else True
    if kind == kind_gold or kinds == {",", "{}"}:
        return _any_order(ours, theirs, ask)
    if kinds == {"", "{}"}:  # {5} and 5
        return _any_order(ours, theirs, ask)
    return False if "" not in kinds or "," in kinds else _single(answer, gold, ask)


def _any_order(ours: list[str], theirs: list[str], ask: Ask | None) -> bool | None:
    """Whether each of ours is one of theirs and the other way round, each used once."""
    if len(ours) != len(theirs):
        return False
    left, unsure = list(theirs), False
    for a in ours:
        verdicts = [_compare(a, g, ask) for g in left]
        if True in verdicts:
            del left[verdicts.index(True)]
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _without_left_side(answer: str, gold: str) -> tuple[str, str]:
    """Both without `x =`, where only one has it or both have the same; a chain `2 + 3 = 5` is its last member."""
    found = [_LEFT_SIDE.match(text) if text.count("=") <= 2 else None for text in (answer, gold)]
    rest = [text[m.end() :].strip() if m else text for m, text in zip(found, (answer, gold), strict=True)]
    if all(found):
        sides = [m[0].removesuffix("=").removesuffix(r"\in ").replace(" ", "") for m in found]
        variables = all(len(s) == 1 and s.isalpha() for s in sides)
        if variables and sides[0] != sides[1]:
            return answer, gold
        return tuple(rest)
    if any(found):
        with_it = answer if found[0] else gold
        if _split(with_it, _JOIN) == [with_it]:  # "x = 1, y = 2" is taken apart first
            return tuple(rest)
    return answer, gold


def _single(answer: str, gold: str, ask: Ask | None) -> bool | None:
    (a, unit), (g, unit_gold) = _split_unit(answer), _split_unit(gold)
    if unit and unit_gold and unit != unit_gold:
        return False
    percent = [text.endswith("%") for text in (a, g)]
    a, g = (text.removesuffix("%").strip() for text in (a, g))
    numbers = rational(a), rational(g)
    if None not in numbers:
        if percent[0] == percent[1]:
            return numbers[0] == numbers[1]
        return numbers[0] == numbers[1] or numbers[0] * (100 if percent[1] else 1) == numbers[1] * (
            100 if percent[0] else 1)
    a, g = (re.sub(r"^\(([A-Za-z])\)$", r"\1", text) for text in (a, g))  # the choice (B)
    if a == g:
        return True
    words = [re.fullmatch(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*", text) for text in (a, g)]
    if any(words):
        return a.replace(" ", "").casefold() == g.replace(" ", "").casefold()
    if sorted(_SUBSCRIPT.findall(a)) != sorted(_SUBSCRIPT.findall(g)):
        return False
    if percent[0] != percent[1]:
        return False
    return None if ask is None else ask(a, g)


# ---- math-verify

@contextlib.contextmanager
def _no_code():
    """Within, no text of an answer reaches sympy's `eval` (parse_expr) or `exec` (lambdify)."""
    import sympy  # noqa: F401  (loads both modules; by name, as `sympy.utilities.lambdify` is a function)

    parser, compiler = sys.modules["sympy.parsing.sympy_parser"], sys.modules["sympy.utilities.lambdify"]
    parse_expr = parser.parse_expr

    def numbers_only(text, *args, **kwargs):
        if not re.fullmatch(r"[-+.\d]+", text, re.ASCII):  # sympy.Number("8") comes this way
            raise NotImplementedError("an answer is data: nothing in it is run")
        return parse_expr(text, *args, **kwargs)

    def refuse(*args, **kwargs):
        raise NotImplementedError("an answer is data: nothing in it is run")  # evalf then sums without lambdify

    parser.parse_expr, compiler.exec = numbers_only, refuse  # a module's globals shadow the builtins
    try:
        yield
    finally:
        parser.parse_expr = parse_expr
        del compiler.exec


@functools.cache
def _math_verify():
    import math_verify
    import sympy.physics.units  # noqa: F401  (simplify imports it late, and its names go through parse_expr)

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off; they must be
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    parse = functools.partial(math_verify.parse, extraction_config=[config], parsing_timeout=None)
    return parse, functools.partial(math_verify.verify, float_rounding=12, numeric_precision=40, timeout_seconds=None)


def ask_math_verify(answer: str, gold: str) -> bool:
    """math-verify's verdict on two expressions in LaTeX. No time-out."""
    parse, verify = _math_verify()
    with _no_code():
        return verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}"))


def equivalent(answer: str | None, gold: str) -> bool:
    """Is `answer` the same as `gold`? In this process and without time-out: for answers one trusts."""
    return compare(answer, gold, ask_math_verify)
