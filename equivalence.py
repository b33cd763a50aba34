"""Are two answers the same? Exact rules for what an answer is made of, then math-verify for single expressions.

An answer is normalised (LaTeX dress taken off), then taken apart: lists and sets, tuples and intervals, unions, plus
or minus, `x = ...`, units. The parts are compared as

    number       by exact rational value: 0.333 is not 1/3. 50% is 1/2, and also 50 where no sign is asked for.
    word         by its letters, whatever their case
    time of day  by the clock: noon is 12 PM, 3:05 PM is 15:05 and 3:05; without a.m. or p.m., 3:05 may be a ratio
    unit         must agree where both sides give one
    list, set    in any order, equal in number; {1, 2} and 1, 2 are the same, {1, 2} and (1, 2) are not
    tuple        in order, and a bare list may stand for it; (1, 2) and [1, 2] differ
    expression   by math-verify
    equation     as the other, if the difference of its sides is that of the other times a number: 2x = 6 and x = 3

`compare` without the last step says None where it would be needed: that is the part whose running time nothing bounds.

math-verify 0.9 is asked about single expressions alone, because of what it gets wrong or takes too lightly (each is a
row of the table in the tests): units are ignored (5 cm = 5 m), sets and tuples are one ({1, 2} = (1, 2)), repeated
entries vanish (5, 5 = 5), subscripts vanish (1011_2 = 1011_3), words are products of letters (dog = god), mixed
numbers too (2\\frac{1}{2}\\pi = \\pi), and 0.\\overline{3} is not 1/3. Beyond that:
- LaTeX extraction only. ExprExtractionConfig hands text to sympy's parse_expr, which is `eval`.
- No code from text. LaTeX has a way to `exec` too: an infinite sum is evaluated with sympy's lambdify, which prints
  symbols by name into source code. `_no_code` therefore stands between them and sympy's `eval` and `exec`.
- No time-outs of its own: they are SIGALRM, which fails off the main thread and cannot interrupt a long C call.
- Numbers of our own making: it takes two that differ by less than 10^{-n} for the same, 1/2004! and 1/2006! too, and
  reads decimals as floats. `_exact` puts our comparison in the place of its own: exact for rationals, else relative.
- Two equations are one to it if they have the same solutions for one letter; we hand it one, scaled to the other.
- Nothing bounds what it raises (AttributeError and TypeError from sympy on i < 1): that is no match, and counted.
"""

import contextlib
import functools
import logging
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from fractions import Fraction

MAX_NUMBER = 64  # characters; longer digit strings are compared as strings
MAX_ANSWER = 512  # characters; a longer answer is right only if it is the gold answer to the letter
MAX_POWER = 400  # digits of an integer power that is multiplied out here
DIGITS = 1000  # to which two irrational numbers must agree, of the larger of their terms

Ask = Callable[[str, str], bool]  # answer, gold -> are these two expressions equal?


# ---- normal form

SPACES = "\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000"  # in a class of a pattern: all but the one on a keyboard
VULGAR = "\u00bc-\u00be\u2150-\u215e"  # one half and so on, each one character
PLAIN = {  # for str.translate: digits of any script, full-width forms and signs that only look different
    **{c: str(unicodedata.decimal(chr(c))) for c in range(128, 0x20000) if unicodedata.category(chr(c)) == "Nd"},
    **{c: chr(c - 0xFEE0) for c in range(0xFF01, 0xFF5F)},
    **str.maketrans("−–‐‑﹣⁄∕٫٬", "-----//.,", "\u200b\u200e\u200f\u2060\ufeff"),
}
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻₀₁₂₃₄₅₆₇₈₉", "0123456789+-0123456789")
_MARK = "\x02"  # stands before what \text{...} held: 5 \text{ m} is a length, 5 m may be a product
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"×", r"\\times "), (r"·|⋅", r"\\cdot "), (r"π", r"\\pi "), (r"∞", r"\\infty "),
        (r"±", r"\\pm "), (r"∪", r"\\cup "), (r"≤", r"\\le "), (r"≥", r"\\ge "), (r"∈", r"\\in "),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"), (r"√\s*(\d+)", r"\\sqrt{\1}"),
        (r"[²³¹⁰⁴-⁹⁺⁻]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}"),
        (r"[₀-₉]+", lambda m: f"_{{{m[0].translate(_RAISED)}}}"),
        (f"[{VULGAR}]", lambda m: r"\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄"))),
        (r"(?<=[\w)}])\*\*(?=[\w({+-])", "^"), (r"\^([-+]\d+|\d{2,})|\^\(([-+]?\d+)\)", r"^{\1\2}"),
        (r"(?<=\d) ?[xX] ?(?=10\^)", r"\\times "), (r"(?<=[\d.])[eE]([-+]?\d{1,3})(?!\w)", r"\\times 10^{\1}"),
        (r"(?i)(?<=[\s\d~{(])([ap])\. ?m\b\.?", r"\1m"),  # half past ten a.m.
        (r"\\infin\b|\binfinity\b|\binf\b", r"\\infty "), (r"\\emptyset|∅|\\\{\s*\\\}", r"\\varnothing "),
        (r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|limits)(?![a-zA-Z])\.?", ""),
        (r"\\[dtc]frac", r"\\frac"), (r"\\([gl])eq?(?:slant)?(?![a-zA-Z])", r"\\\1e "),
        (r"(?<=\d),\s*\\!\s*(?=\d{3})", ","),
        # a gap: between digits it groups thousands
        (rf"(?<!\\)\\[!,;: ]|[~{SPACES}]|\\(?:q?quad|thinspace)(?![a-zA-Z])", "\x01"),
        (r"(?<=\d)(?<![_^]\d)\x01+(?=\d{3}(?!\d))", ""), ("\x01", " "), (r"\{([,:])\}", r"\1"),
        (r"\\\\$", " "), (r"\s+", " "),
        (r"(?:\{\})?\^ ?\{? ?(?:\\circ|∘) ?\}?|\\degrees?(?![a-zA-Z])", "°"),
        (r"°(?: ?(?:\\(?:text|mathrm) ?\{ ?)?([CF])(?![a-zA-Z])\}?)?", r" degrees\1 "),
        (r"\\?%|\\?\bpercent\b", "%"), (r"(?<=[\d}]) ?[(\[] ?% ?[)\]]", "%"),
        (r"\\(?:text|mbox) ?\{ ?(and|or) ?\}", r" \1 "),
        (r"\\(?:text(?:bf|it|rm|sf)?|math(?:rm|bf|it|sf)|operatorname|mbox|hbox) ?\{ ?([^{}]*)\}", rf" {_MARK}\1 "),
        # money is a unit; else $ is LaTeX's own
        (r"^([-+]?) ?(?:\\\$|\$(?=[^$]*$)) ?([-+]?[\d.,]+(?: *\x02?[mb]illion)?)", r"\1\2 dollars"),
        (r"^([-+]?)£ ?([\d.,]+)", r"\1\2 gbp"), (r"^([-+]?)€ ?([\d.,]+)", r"\1\2 euros"), (r"\\?\$|\\[()\[\]]", ""),
        (r"\\frac ?\{ ?\x02([^{}]*)\} ?\{ ?\x02([^{}]*)\}", " \x02\\1/\\2"),  # kilometres over hours
        (r"(\x02[A-Za-z]+) *\\cdot *\x02?(?=[A-Za-z])", r"\1 "), (r"(\^\{[^{}]*\}) ?(?=\d)", r"\1\\cdot "),
        (r"(?<=[\d ])(sq|cu|ft|in|yd|mi|lbs?|oz|hrs?|mins?|secs?)\.(?= |$)", r"\1"),
        (r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}"), (r"\\frac ?(\d) ?\{", r"\\frac{\1}{"),
        (r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}"), (r"\\sqrt ?(\d)", r"\\sqrt{\1}"),
        (r"(?<=\\frac\{)(\d{1,3}),(\d{3})(?=\})", r"\1\2"),
        (r"([_^]) ?\{ ?\x02?(\w) ?\}(?!\d)", r"\1\2"), (r"^\((\w+)\)(?=_)", r"\1"),
        (r"^[ *]*\x02|[ *]+$|^[ *]+", ""), (r"(?<=.)[.,;]$", ""), (r" +", " "),
        (r"(?i)^(?:12(?::00)? ?)?\x02?noon$", "12:00 pm"), (r"(?i)^(?:12(?::00)? ?)?\x02?midnight$", "12:00 am"),
        (r"(?<=\d) ?\x02?o'clock$", ":00"),
        # "2 1/2" is not 21/2, "5 cm" not the product 5cm, and "1, 234" not 1,234: elsewhere a space means nothing
        (r"(?<![\w,)}%]) | (?![\w(\\%\x02-])|(?<=[)}%,]) (?=[-(\\{%])|(?<=\\ge) |(?<=\\le) ", ""),
    ]
]


def normalise(text: str) -> str:
    """Text without what LaTeX and style put around the same mathematics."""
    text = text.translate(PLAIN).strip()
    if (box := re.match(r"\\(?:boxed|fbox)\s*(?=\{)", text)) and _closes_last(text[box.end() :]):
        text = text[box.end() + 1 : -1].strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


# ---- numbers

NUMBER_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_POWER = r"(?: ?(?:\\times|\\cdot|\*) ?10\^(?:\{([-+]?\d{1,3})\}|(\d)))?"
_PLAIN = re.compile(rf"([-+]?) ?({NUMBER_DIGITS})(?: ?/ ?({NUMBER_DIGITS})|{_POWER})", re.ASCII)
_FRACTION = re.compile(r"([-+]?)\\frac\{ ?([-+]?\d+) ?\}\{ ?([-+]?\d+) ?\}", re.ASCII)
_MIXED = re.compile(r"(?<![\d.^_])([-+]?)(\d+) ?(?:\\frac\{(\d+)\}\{(\d+)\}|(?<= )(\d+)/(\d+))", re.ASCII)
_INTEGER_POWER = re.compile(r"([-+]?)(\d{1,9})\^(?:\{(-?\d{1,3})\}|(\d))", re.ASCII)
_REPEATING = re.compile(r"([-+]?)(\d*)\.(\d*)\\overline\{(\d+)\}", re.ASCII)
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_MULTIPLE = re.compile(rf"(.*[\d}}]) ?{_MARK}?({'|'.join(_MULTIPLES)})")


def rational(text: str) -> Fraction | None:
    """The exact value of a number: 1,000  -2.50  3/4  \\frac{3}{4}  1\\frac12  1.5\\times10^{-7}  2^{10}
    0.\\overline{3}  5 million; None for anything else. Raises ZeroDivisionError for 1/0."""
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
    elif match := _MULTIPLE.fullmatch(text):
        factor = rational(match[1])
        return None if factor is None else factor * _MULTIPLES[match[2]]
    elif re.fullmatch(r"[-+]?\d{1,3}(?: \d{3})+(?:\.\d+)?", text, re.ASCII):
        sign, value = "", Fraction(text.replace(" ", ""))
    else:
        return None
    return -value if sign == "-" else value


# ---- units

_UNITS = {  # what means the same; a unit not listed is the same as itself and as its plural
    "mm": "millimeter millimetre", "cm": "centimeter centimetre", "m": "meter metre", "km": "kilometer kilometre",
    "in": "inch inches", "ft": "foot feet", "mi": "mile", "yd": "yard", "g": "gram", "kg": "kilogram", "lb": "pound",
    "s": "sec second", "min": "minute", "h": "hr hour", "l": "L liter litre", "ml": "mL milliliter millilitre",
    "degrees": "degree deg", "dollars": "dollar", "cents": "cent", "euros": "euro", "gbp": "", "rad": "radian",
    "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "ampere amp", "K": "kelvin", "Hz": "hertz", "eV": "",
    "degreesC": "", "degreesF": "", "am": "", "pm": "", "units": "unit", "mi/h": "mph", "km/h": "kph kmh",
}
_UNIT_OF = {word: unit for unit, words in _UNITS.items() for word in (unit, *words.split())}
_POWERS_OF_UNITS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_NO_UNITS = set("is not no wrong right more less than minus plus times over squared cubed out of if for when where but "
                "then mod pi and or the a an we get so because since incorrect false never neither nor".split())
_IN_BRACKETS = re.compile(rf"(.*[^ ])( ?[(\[]) ?({_MARK}?)[ (]*([A-Za-z/ ]+(?:\^[23])?[A-Za-z/ ]*)[)\]]+")
_WORDS_AT_THE_END = re.compile(rf"[ {_MARK}A-Za-z/]*(?:\^[23])?(?:[ {_MARK}A-Za-z/]*)$")


def _split_unit(text: str) -> tuple[str, tuple[str, ...]]:
    """("5", ("cm",)) of "5 cm", ("5", ("m", "/", "s")) of "5 m/s"; (text, ()) where no unit stands behind a value.

    A unit was LaTeX text, or stands behind a plain number and is known or a word of three letters: 5 cm, 5 apples.
    It may stand in brackets: 5 (cm), and so may both: (5 cm).
    """
    given = text
    if text[0] == "(" and _closes_last(text):
        text = text[1:-1].strip()
    if match := _IN_BRACKETS.fullmatch(text):
        value, bracket, mark, phrase = match.groups()
        text = value + (" " if bracket != "(" or mark else "") + mark + phrase  # 5(m) is a product
    tail = text.rfind(f" {_MARK}")
    if tail > 0:
        value, phrase, marked = text[:tail], text[tail:], True
    else:
        start = _WORDS_AT_THE_END.search(text).start()
        value, phrase, marked = text[:start].strip(), text[start:], False
    phrase = re.sub(r"\bper\b", "/", phrase.replace(_MARK, "")).strip()
    words = re.findall(r"[A-Za-z]+|/|\^[23]", phrase)
    whole = "".join(words) == phrase.replace(" ", "")
    if not value or not 0 < len(words) <= 6 or not whole or words[0][0] == "^" or _NO_UNITS & set(words):
        return given, ()
    if words[0] in _MULTIPLES:
        value, words = f"{value} {words[0]}", words[1:]
        if not words:
            return given, ()
    if not marked:
        known = all(w in _UNIT_OF or w in _POWERS_OF_UNITS or w.removesuffix("s") in _UNIT_OF or not w.isalpha()
                    for w in words)
        noun = len(words[0]) > 2
        joined_letter = len(words[0]) == 1 and text[len(value)] != " "  # 5m is a product
        if rational(value.removesuffix("%")) is None or not (known or noun) or joined_letter:
            return given, ()
    names: list[str] = []
    power = None
    for word in words:
        if word in _POWERS_OF_UNITS:
            power = _POWERS_OF_UNITS[word]
            continue
        stem = word.removesuffix("s") if len(word) > 2 else word
        names += re.findall(r"[A-Za-z]+|/", _UNIT_OF.get(word) or _UNIT_OF.get(stem) or stem.lower()) or [word]
        if power and word.isalpha():
            names.append(power)
            power = None
    return value.strip(), tuple(names)


# ---- comparison

_NOT_IN_NAMES = re.compile(r"[-+*/^<>]|^\d|\\(?:frac|sqrt|cdot|times|cup)")
_SUBSCRIPT = re.compile(r"(?<!\\log)_(?:\{[^{}]*\}|.)")
_JOIN = re.compile(r" ?(?:[,;] ?(?:and |or )?|\band\b|\bor\b) ?")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_NO_NAMES = {rf"\{c}" for c in "frac sqrt cdot times div pi ln log exp sin cos tan cot sec csc text mathrm".split()}
_TIME = re.compile(rf"(\d\d?)(?::([0-5]\d))?(?::([0-5]\d))? ?{_MARK}?([ap]m)?", re.ASCII | re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z]{3,}|[A-Za-z]+(?:[ '-][A-Za-z]{2,})+"
                    r"|[A-Z]\.[A-Z]|(?=.*[A-Za-z]{3})[A-Za-z '-]+(?:\.[A-Za-z '-]+)+")  # U.S., Mrs. Hilt
_SHORT_WORDS = {"no", "on", "up", "or", "am", "pm", "by", "to", "is", "it"}


def _split(text: str, separator: re.Pattern) -> list[str]:
    """Parts of `text` between separators outside all brackets."""
    parts, depth, start, position = [], 0, 0, 0
    while position < len(text):
        if depth == 0 and (match := separator.match(text, position)) and match.end() > position:
            parts.append(text[start:position].strip())
            start = position = match.end()
            continue
        depth = max(0, depth + (text[position] in "([{") - (text[position] in ")]}"))
        position += 2 if text[position] == "\\" and text[position + 1 : position + 2] not in "{}" else 1
    return [*parts, text[start:].strip()]


def _closes_last(text: str) -> bool:
    """Whether the bracket that opens `text` is closed by its last character."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return position == len(text) - 1
    return False


def _parts(text: str) -> tuple[str, list[str]]:
    """What `text` is and its parts: "()", "[)" and so on a tuple or interval, "{}" a set, "," a list, "u" a union,
    ":" a ratio, "" a single thing."""
    if rational(text) is not None:
        return "", [text]
    pieces = _split(text, re.compile(r" ?\\cup ?"))
    if len(pieces) > 1:
        return "u", pieces
    ungrouped = _GROUPED.sub(lambda match: match[0].replace(",", ""), text) if text[0] not in "([{\\" else text
    pieces = [x for piece in _split(ungrouped, _JOIN) for x in _plus_and_minus(piece)]
    if len(pieces) > 1 and all(pieces):
        return ",", pieces
    bare = text.replace(r"\{", "{").replace(r"\}", "}")
    if bare[0] == "{" and bare[-1] == "}" and _closes_last(bare):
        inside = text[2:-2] if text[0] == "\\" else text[1:-1]
        return "{}", [x for piece in _split(inside.strip(), _JOIN) for x in _plus_and_minus(piece)]
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and _closes_last(text):
        inside = _split(text[1:-1].strip(), re.compile(r" ?, ?"))
        if len(inside) > 1 and all(inside):
            return text[0] + text[-1], inside
    pieces = text.split(":")
    if len(pieces) > 1 and all(rational(piece.strip()) is not None for piece in pieces):
        return ":", [piece.strip() for piece in pieces]
    return "", [ungrouped]


def _plus_and_minus(text: str) -> list[str]:
    if text.count(r"\pm") != 1:
        return [text]
    return [normalise(text.replace(r"\pm", "+")).removeprefix("+").strip(), normalise(text.replace(r"\pm", "-"))]


def compare(answer: str | None, gold: str, ask: Ask | None = None) -> bool | None:
    """Whether `answer` is the same as `gold`; None where only `ask` could tell and it was not given."""
    if not answer or not answer.strip():
        return False
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer == gold
    try:
        numbers = rational(answer), rational(gold)
        if None not in numbers:  # most answers, most of the time
            return numbers[0] == numbers[1]
        return _compare(normalise(answer), normalise(gold), ask)
    except ZeroDivisionError:  # 5/0 is no number and equals no other text
        return answer == gold


def _compare(answer: str, gold: str, ask: Ask | None) -> bool | None:
    if answer == gold:
        return answer != ""
    if not answer or not gold:
        return False
    (kind, ours), (kind_gold, theirs) = _parts(answer), _parts(gold)
    if len(_sides(answer)) + len(_sides(gold)) > 2:
        if kind == kind_gold == "":
            return _equations(answer, gold, ask)
        if "" in (kind, kind_gold):  # x = \{1, 2\} and \{1, 2\}
            bare = [_right_side(text) if k == "" else text for k, text in ((kind, answer), (kind_gold, gold))]
            if None not in bare and bare != [answer, gold]:
                return _compare(*bare, ask)
    if {kind, kind_gold} <= {"", ":"} and (same := _same_time(answer, gold)) is not None:
        return same
    if kind == kind_gold == "":
        return _single(ours[0], theirs[0], ask)
    kinds = {kind, kind_gold}
    if kind == kind_gold and (kind[0] in "([" or kind == ":") or kinds == {",", "()"}:  # in order
        return _in_order(ours, theirs, ask)
    if kind == kind_gold or kinds == {",", "{}"}:
        return _any_order(ours, theirs, ask)
    if kinds == {"", "{}"} and r"\varnothing" not in answer + gold:  # {5} and 5
        return _any_order(ours, theirs, ask)
    if kinds == {"", ":"} and len(ours) + len(theirs) == 3:  # 3:4 and 3/4
        ratio, single = (ours, theirs[0]) if kind == ":" else (theirs, ours[0])
        return rational(single) == rational(ratio[0]) / rational(ratio[1])
    if "" in kinds and kinds & {"()", "(]", "[)", "[]", "u"}:  # x > 3 and (3, \infty)
        return None if ask is None else ask(answer, gold)
    return False


def _same_time(answer: str, gold: str) -> bool | None:
    """Whether two times of day are one, 3:05 and 3:05 pm and 15:05; None where they may be two ratios, or none."""
    clocks = [_TIME.fullmatch(text) for text in (answer, gold)]
    if not any(clock and clock[4] for clock in clocks):
        return None if (":0" in answer) == (":0" in gold) else False  # 3:05 is no ratio
    if not all(clock and (clock[2] or clock[4]) for clock in clocks):
        return False if ":" in answer + gold else None  # 10:30 am is not 1/3, but 7 am may be 7
    hours = [int(clock[1]) for clock in clocks]
    halves = {clock[4].lower() if clock[4] else "pm" if hour > 12 else "am" if hour == 0 else None
              for clock, hour in zip(clocks, hours, strict=True)} - {None}
    past = [(hour % 12, int(clock[2] or 0), int(clock[3] or 0)) for clock, hour in zip(clocks, hours, strict=True)]
    return past[0] == past[1] and len(halves) == 1 and max(hours) < 24


def _in_order(ours: list[str], theirs: list[str], ask: Ask | None) -> bool | None:
    if len(ours) != len(theirs):
        return False
    verdicts = [_compare(a, g, ask) for a, g in zip(ours, theirs, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _any_order(ours: list[str], theirs: list[str], ask: Ask | None) -> bool | None:
    """Whether each of ours is one of theirs and the other way round, each used once."""
    if len(ours) != len(theirs):
        return False
    if len(ours) > 32:  # quadratic; a longer list is the same to the letter or not at all
        return sorted(ours) == sorted(theirs)
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


def _sides(text: str) -> list[str]:
    return [side.strip() for side in re.split(r"(?<![<>!\\])=|\\in(?![a-zA-Z]) ?", text)]


def _is_name(side: str) -> bool:
    """Something that an answer may be called: x, f(x), a_n, AB, \\angle ABC, Area."""
    side = re.sub(r"\^\{?-1\}?", "", side)  # the inverse of a function
    return len(side) <= 40 and bool(re.search("[A-Za-z]", side)) and not _NOT_IN_NAMES.search(side)


def _right_side(text: str) -> str | None:
    """What follows `x =` or `2 + 3 =`, `text` itself where there is no equation, None for one of another kind."""
    *left, right = _sides(text)
    return right if all(_is_name(side) or not re.search("[A-Za-z]", side) for side in left) else None


def _equations(answer: str, gold: str, ask: Ask | None) -> bool | None:
    """`x = 3` against `3` or `3 = x`; two equations are the same if one is a multiple of the other."""
    ours, theirs = _sides(answer), _sides(gold)
    if min(len(ours), len(theirs)) == 1 or max(len(ours), len(theirs)) > 2:
        right = _right_side(answer), _right_side(gold)
        return False if None in right or right == (answer, gold) else _compare(*right, ask)
    tight = [[side.replace(" ", "").replace(_MARK, "") for side in sides] for sides in (ours, theirs)]
    if tight[0] == tight[1][::-1]:
        return True
    names = tight[0][0], tight[1][0]
    if _is_name(names[0]) and _is_name(names[1]):
        functions = sorted("f(x)" if re.fullmatch(r"[a-z]\([a-z]\)", name) else name for name in names)
        if names[0] == names[1] or functions == ["f(x)", "y"]:
            return _compare(ours[1], theirs[1], ask)
    letters = [set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", text)) - _NO_NAMES for text in (answer, gold)]
    if not all(letters):  # 2 + 3 = 5 is not 1 + 1 = 2
        return False if any(letters) else _in_order(ours, theirs, ask)
    other_case = {x.swapcase() for x in letters[0] - letters[1]} & (letters[1] - letters[0])
    words = [re.search("[A-Za-z]{3}", re.sub(r"\\[A-Za-z]+", "", name)) for name in names if _is_name(name)]
    if other_case or any(words) or not letters[0] & letters[1]:
        return False  # to math-verify X is x, and a word the product of its letters
    if set(_SUBSCRIPT.findall(answer)) != set(_SUBSCRIPT.findall(gold)):
        return False
    return None if ask is None else ask(answer, gold)


def _single(answer: str, gold: str, ask: Ask | None) -> bool | None:
    if re.sub(" (?=[A-Za-z])", "", answer) == re.sub(" (?=[A-Za-z])", "", gold):
        return True
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
    if percent[0] != percent[1]:
        return False
    a, g = _choice(a, g), _choice(g, a)
    was_text = _MARK in a + g
    a, g = (text.replace(_MARK, "").strip() for text in (a, g))
    if a == g:
        return True
    words = [bool(_WORDS.fullmatch(text)) or text.lower() in _SHORT_WORDS or was_text and text.isalpha()
             for text in (a, g)]
    if any(words):
        return _word(a) == _word(g)
    if sorted(_SUBSCRIPT.findall(a)) != sorted(_SUBSCRIPT.findall(g)):
        return False
    return None if ask is None else ask(a, g)


def _word(text: str) -> str:
    word = re.sub("[ .'-]", "", text).casefold()
    return r"\varnothing" if re.fullmatch("no(real)?solutions?", word) else word


def _choice(text: str, other: str) -> str:
    """(B) is B; "(B) 12" is B where the other is a letter, else 12; "B. red" is B where the other is a letter."""
    if re.match(r"[A-J]\.", text) and re.fullmatch(rf"{_MARK}?(?:[A-J]|\([A-J]\))", other):
        return text[0]
    match = re.fullmatch(rf"{_MARK}?\(([A-J])\)(?: ?{_MARK}?(.*))?", text)
    if not match:
        return text
    return match[1] if not match[2] or re.fullmatch(r"\(?[A-J]\)?", other) else match[2]


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
    from latex2sympy2_extended import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off; they must be
    dress = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, equations=False)
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0, normalization_config=dress)
    parse = functools.partial(math_verify.parse, extraction_config=[config], parsing_timeout=None,
                              raise_on_error=True)
    return parse, functools.partial(math_verify.verify, allow_set_relation_comp=True, timeout_seconds=None,
                                    raise_on_error=True)


@contextlib.contextmanager
def _exact():
    """Within, math-verify compares numbers by `_same_value`, wherever they stand: in matrices, in inequalities."""
    import math_verify.grader as library
    import sympy

    theirs = library.sympy_numeric_eq
    matrices = sympy.MatrixBase, sympy.MatrixExpr

    def numeric_eq(a, b, *precision):
        of_matrices = isinstance(a, matrices) or isinstance(b, matrices)  # entry by entry, which comes back to here
        return theirs(a, b, *precision) if of_matrices else _same_value(a, b)

    library.sympy_numeric_eq = numeric_eq
    try:
        yield
    finally:
        library.sympy_numeric_eq = theirs


def _same_value(a, b) -> bool:
    """Whether two sympy expressions are the same number, or have the same number before each product of symbols."""
    import sympy

    a, b = (e.xreplace({x: sympy.Rational(str(x)) for x in e.atoms(sympy.Float)}) for e in (a, b))
    difference = (a - b).doit()
    if symbols := difference.free_symbols:
        coefficients = defaultdict(int)
        for term in sympy.Add.make_args(difference.expand()):
            number, product = term.as_independent(*symbols, as_Add=False)
            coefficients[product] += number
        return all(map(_is_zero, coefficients.values()))
    return _is_zero(difference)


def _is_zero(number) -> bool:
    """Exactly for a rational; else to DIGITS digits of its largest term, so that tiny is not zero, nor huge inexact."""
    import sympy

    if number.is_Rational:
        return number.is_zero
    try:
        # an exact 0 may be sympy's, of a logarithm near 1: more digits tell
        return number.evalf(2, maxn=DIGITS, strict=True) == 0 and number.evalf(DIGITS) == 0
    except sympy.PrecisionExhausted:  # all cancel: it is 0, unless an integral or the like is not known any better
        sizes = [abs(term.evalf(30)) for term in sympy.Add.make_args(number)]
        return bool(abs(number.evalf(30)) <= 1e-25 * max(sizes))


def _multiple(gold, answer):
    """c * gold for the number c such that the two equations gold = 0 and answer = 0 may be one; None without such."""
    import sympy

    letters = sorted(gold.free_symbols | answer.free_symbols, key=str)
    point = {x: sympy.Rational(97 + 10 * i, 89 + 4 * i) for i, x in enumerate(letters)}  # nothing special about it
    factor = sympy.simplify((answer / gold).subs(point))
    usable = letters and factor.is_number and factor.is_finite and not factor.is_zero
    return factor * gold if usable else None


failures: Counter[str] = Counter()  # exception -> how often math-verify raised it in this process


def ask_math_verify(answer: str, gold: str) -> bool:
    """math-verify's verdict on two expressions or two equations in LaTeX. No time-out; `failures` counts exceptions."""
    texts = [_MIXED.sub(_improper, _in_radians(text.replace(_MARK, ""))) for text in (gold, answer)]
    try:
        return _verdict(*texts)
    except MemoryError:
        raise  # what comes after it is not to be trusted
    except Exception as error:  # no list of what math-verify, sympy and the parser raise is complete
        failures[type(error).__name__] += 1
        return False


def _verdict(gold: str, answer: str) -> bool:
    import sympy

    parse, verify = _math_verify()
    sides = _sides(gold), _sides(answer)
    equations = len(sides[0]) == len(sides[1]) == 2
    if equations:
        gold, answer = (f"({left})-({right})" for left, right in sides)
    with _no_code(), _exact():
        parsed = [parse(rf"\boxed{{{text}}}") for text in (gold, answer)]
        letters = {x.name for found in parsed for e in found if isinstance(e, sympy.Basic) for x in e.free_symbols}
        if letters == {"i"}:  # no index, no variable: the imaginary unit
            parsed = [[e.xreplace({x: sympy.I for x in e.free_symbols}) if isinstance(e, sympy.Basic) else e
                       for e in found] for found in parsed]
        if equations:
            if not all(found and isinstance(found[0], sympy.Expr) for found in parsed):
                return False
            multiple = _multiple(parsed[0][0], parsed[1][0])
            return multiple is not None and verify(multiple, parsed[1][0].doit())
        return verify(*parsed)


def _in_radians(text: str) -> str:
    if not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
        return text
    return re.sub(r"(\d+(?:\.\d+)?) ?degrees", r"(\\frac{\1\\pi}{180})", text)


def _improper(mixed: re.Match) -> str:
    """2\\frac{1}{2} as \\frac{5}{2}; 2\\frac{4}{3} is left the product that it is in 2\\frac{4}{3}\\pi."""
    sign, whole, *parts = mixed.groups()
    top, bottom = (int(part) for part in parts if part)
    return rf"{sign}\frac{{{int(whole) * bottom + top}}}{{{bottom}}}" if top < bottom else mixed[0]


def equivalent(answer: str | None, gold: str) -> bool:
    """Is `answer` the same as `gold`? In this process and without time-out: for answers one trusts."""
    return compare(answer, gold, ask_math_verify)
