r"""Is this response right? +1 or -1, for text that a model wrote and that nobody has read.

`extract` finds the answer in the response, in time linear in its length; where it looks is a named style. `compare`
decides in this process what is exact and cheap, nearly all that training meets: equal text, plain numbers, units,
words, lists and sets part by part. What is left (surds, polynomials, equations) is asked of math-verify, whose running
time nothing bounds (`9^{9^{9^9}}`): `Grader` asks it in worker processes that can be killed. What math-verify does not
look at (letters, subscripts, units) must agree before it is asked: a false match is what training would find.

A worker is this very file run as a program: it starts in a second whatever the trainer has imported, shares no memory
with CUDA or vLLM, and gets its work through a pipe as JSON, parsed and never unpickled. The work is done in a fork of
it, and where that must be killed the next one has all imports from its first millisecond.
"""

import contextlib
import hashlib
import json
import logging
import math
import multiprocessing.connection
import multiprocessing.reduction
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
import types
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from watchdog import end_with_parent, progress

log = logging.getLogger(__name__)

NO_ANSWERS = ("proof", "notfound", "nan", "null", "n/a")  # what sets write where there is none
MAX_ANSWER = 512  # characters; a longer answer is right only if it is the gold answer to the letter
WORKER_BYTES = 2 << 30  # of address space that a worker may add: 10^5 x 10^5 zeros are a MemoryError, no swap storm
DIGITS = 1000  # to which math-verify compares irrational numbers, in place of 15: 10^{-20} is not 10^{-21}


@dataclass(frozen=True)
class Problem:
    """One question with a checkable answer."""

    id: str
    prompt: str
    answer: str
    style: str = "math"  # where a response states its answer, a key of STYLES
    kind: str = ""  # what evaluations tell apart; "" = nothing
    # Of a chat, role and content of each; () = one, the user's, which `prompt` is. (No hash: dicts have none.)
    messages: Sequence[dict[str, str]] = field(default=(), hash=False)
    columns: dict[str, object] = field(default_factory=dict, hash=False)  # the row's others, as JSON, for a reward


# ---- extraction

_BRACE = re.compile(r"\\{1,2}(?P<box>boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_COLON = re.compile(r"""answer[*_`"']{0,4}\s{0,4}[:：]""", re.IGNORECASE)
_ANSWER = re.compile(
    rf"\b(?:{_COLON.pattern}|answer\**\s{{1,4}}is\b(?:\s(?:indeed|therefore|thus|then|simply|exactly|equal to)\b)?)"
    r"|^[#* ]{0,8}(?:final )?answer[* ]{0,8}$", re.IGNORECASE | re.MULTILINE)
_HASHES = re.compile(  # no titles: "#### Step 2", "#### 2. Check"
    r"(?<!#)#{4,}(?!#|\W{0,9}(?i:step|part|case|problem|solution|final)\b|\s?\d[.)] [A-Z][^.\n]*$)", re.MULTILINE)
_GAP = re.compile(r"(?:[ \t\r\n*_:：`\"']|(?:\$\$?|\\\[|\\\()[ \t]*\n)*")  # before what is stated; $$ is none of it
_END = re.compile(  # of what a line states: "12. I hope", "12, because"; but not in Mr. Smith, J. Smith, U.S. team
    r"""(?<!\b[MDS][rst])(?<!\bMrs)(?<![\s.("'][A-Z])\.[*_`"'$)]*\s+(?=[^\w\s]|[A-Z])|(?<=\d)\.[*_`"'$)]*\s"""
    r"""|,?\s(?:because|since|as|which)\b""")
_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"""(?:(?<![\w.)}}\]])[-+]\$?)?(?:
    (?:(?<![\^_])\d{{1,3}}[ \u00a0]?)?(?:\\[dt]?frac(?:\d|\{{-?\d+\}}){{2}}|[¼-¾⅐-⅞]|\d\d?/\d{{1,3}}(?![\d/.]))  # 2 2/3
    | (?:\d{{1,3}}(?:(?:,\\!|\{{,\}}|\\,|[\u00a0\u2009\u202f])\d{{3}})+(?!\d)(?:\.\d+)?|{_DECIMAL})  # 1\,250
      (?:/(?:{_DECIMAL})|(?:[ ]?(?:\\times|\\cdot|[×·*])[ ]?10)?\^(?:\{{-?\d+\}}|-?\d+))?  # 1.2 \times 10^{{5}}
    )(?:[ ](?:hundred|thousand|million|billion|trillion)\b)?""", re.VERBOSE)
_VALUE = re.compile(r"(?:[A-Za-z]\w?(?:\(\w+\))? ?= ?)?[-+([{|]*[\d\\$.√π]")
_LETTER = re.compile(r"""[\W_]*(?:(?i:option|choice|answer)\W+)?([A-J]|[a-j](?=\W*$|[).:,]))
    (?![\w'^=+/-]|\s(?!and|or)[a-z])  # "A neutron"
    (?P<more>\W*(?:[,&/]|\b(?:and|or)\b)\W*[A-J]\b)?""", re.VERBOSE)
_LETTER_IN_BRACKETS = re.compile(r"\(([A-J])\)|^\W*([A-J])\W*$", re.MULTILINE)


def _box(text: str) -> tuple[int, str] | None:
    """Where the last-opened box that is closed and not empty (no echoed "within \\boxed{}") starts, and its content."""
    stack, best = [], (-1, -1)
    for token in _BRACE.finditer(text):
        if token["box"] or token[0] == "{":
            stack.append(token.end() if token["box"] else -1)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start > best[0] and text[start : min(token.start(), start + MAX_ANSWER)].strip():
                best = (start, token.start())
    return (best[0], text[slice(*best)].strip()) if best[0] >= 0 else None


def boxed(text: str) -> str | None:
    """Content of the last \\boxed{...} in `text`."""
    return found[1] if (found := _box(text)) else None


def _line_after(text: str, pattern: re.Pattern) -> tuple[int, str] | None:
    """Where the last match ends, and what the first line behind it states: "Mr. X" of "Answer: **Mr. X**, since he"."""
    start = next(iter(deque((m.end() for m in pattern.finditer(text)), maxlen=1)), len(text))
    line = text[_GAP.match(text, start).end() :].partition("\n")[0]
    line = _END.split(f" {line}", maxsplit=1)[0].strip(" \t\r*_`\"'.,;")
    return (start, line) if line else None


def _last_number(text: str) -> str | None:
    last = deque(_NUMBER.finditer(text), maxlen=1)
    return last[0][0].rstrip(".") if last else None


def _math(text: str) -> str | None:
    """The last of \\boxed{x}, "Answer: x" or "answer is x", and "#### x", else the last number. A line takes the place
    of a box before it only if it begins with a number or LaTeX, or x = one: "the answer is correct" does not."""
    box = _box(text)
    end = box[0] + len(box[1]) if box else -1
    stated = [line for pattern in (_ANSWER, _HASHES) if (line := _line_after(text, pattern))
              and (not box or line[0] > end and _VALUE.match(line[1]))]
    return max([box, *stated] if box else stated)[1] if box or stated else _last_number(text)


def _dapo(text: str) -> str | None:
    """What "Answer: x" says in the last 300 characters, as in verl's math_dapo, else a box in them: prompts of DAPO's
    rows ask for the former, and --prompt_suffix behind them for the latter."""
    found = _line_after(text[-300:], _COLON)
    return boxed(found[1]) or found[1] if found else boxed(text[-300:])


def _gsm8k(text: str) -> str | None:
    """Word problems and arithmetic: the last of "#### x" and \\boxed{x} with a number in it, else the last number."""
    stated = [found for found in (_line_after(text, _HASHES), _box(text)) if found and _NUMBER.search(found[1])]
    return max(stated)[1] if stated else _last_number(text)


def _choice(text: str) -> str | None:
    """A letter A to J: the last that a box or an answer line gives, none where it gives two, else the last letter in
    brackets or alone on its line."""
    for _, found in sorted(filter(None, (_box(text), _line_after(text, _ANSWER))), reverse=True):
        if letter := _LETTER.match(re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{", "", found)):
            return None if letter["more"] else letter[1].upper()
    last = deque(_LETTER_IN_BRACKETS.finditer(text), maxlen=1)
    return (last[0][1] or last[0][2]) if last else None


STYLES = {"math": _math, "dapo": _dapo, "gsm8k": _gsm8k, "choice": _choice}


def extract(response: str, style: str = "math") -> str | None:
    """The answer that `response` gives, or None if it gives none; behind `</think>` if there is one there. An unknown
    `style` (see STYLES) is a KeyError."""
    answer = STYLES[style](response.rpartition("</think>")[2])
    return STYLES[style](response) if answer is None else answer


# ---- comparison

_NO_UNITS = set("not more less than minus plus times over squared cubed out of if for when where mod or and base "
                "half halves third thirds quarters tenths dozen hundred thousand million billion trillion".split())
_MARK = "\x02"  # stands before what \text{...} held and before units: 5 \text{ m} is a length, 5 m may be a product
_SIGNS = str.maketrans({
    **dict.fromkeys("−–‐‑", "-"), "⁄": "/", "×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "±": r"\pm ",
    "∞": r"\infty ", "∪": r"\cup ", "≤": r"\le ", "≥": r"\ge ", "√": r"\sqrt ", "∈": r"\in ", "°": r"^\circ "})
_REWRITES = [(re.compile(pattern), new) for pattern, new in [
    ("[\u200b-\u200f\u2060\ufeff]", ""),  # without a width
    # what NFKC alone would make a gap of any kind, 21/2, x2 and 101
    ("[\u00a0\u2009\u202f]", "~"), (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "), (r"([⁺⁻]?[⁰¹²³⁴-⁹]+)", r"^{\1}"),
    (r"([₀-₉]+)", r"_{\1}"), (r"[^\x00-\x7f]+", lambda m: unicodedata.normalize("NFKC", m[0]).translate(_SIGNS)),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)(?![a-zA-Z])\.?", ""), (r"\\[dtc]frac", r"\\frac"),
    (r"(?<!\\)\\[!,;: ]|~|\\q?quad(?![a-zA-Z])", "\x01"),  # a gap: between digits it groups thousands
    (r"(?<=\d)(?<![_^]\d)(?:,?\x01+|\{,\})(?=\d{3}(?!\d))", ""), (r"[\x01\s]+", " "),
    (r"^[* ]+|[* ]+$|(?<=.)[.,;]$", ""), (r"(?<![a-zA-Z\\])(pi|infty|sqrt)(?![a-zA-Z])", r"\\\1"),
    (r"\\sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"), (r"(?<=[\d.])[eE]([-+]?\d{1,3})(?!\w)", r"\\times 10^{\1}"),
    (r"(?<=\d)(?:\^ ?\{? ?)?(?:\\(?:text|mathrm) ?\{)?(?:st|nd|rd|th)(?![a-zA-Z])\}*", ""),  # 12^{\text{th}}
    (r"\^ ?\{? ?(?:\\circ|o) ?\}?(?![a-zA-Z])", f" {_MARK}degrees "), (r"\\?%|\\?\bpercent\b", "%"),
    (r"\\text ?\{ ?(and|or) ?\}", r" \1 "), (r"\\(?:text\w*|math\w+|mbox) ?\{ ?([^{}]*)\}", rf" {_MARK}\1 "),
    (r"^([-+]?) ?(?:\\\$|\$(?=[^$]*$)) ?(?=[\d.])(.*)", rf"\1\2 {_MARK}dollar"),  # else $ is LaTeX's own
    (r"\\?\$|\\[()\[\]]", ""), (rf"([_^]) ?{_MARK}?(\w)", r"\1{\2}"), (rf"^[ {_MARK}]+", ""), (r" +", " "),
    # words behind a number are its unit; 5m, 6xyz and 6 m g are products
    (r"^([-+]?(?:[\d.,/ ]*\d\.?|\d*\\frac\{\d+\}\{\d+\})(?:\\times 10\^\{-?\d+\})?)(?: ?(?=(?:[ckm]m|kg|in|ft|mi|hr)\b)"
     r"| (?!(?:and|or)\b)(?=[A-Za-z]{3}|[mgshL](?:/[a-z]+)?(?:\^\{\d\})?$))", rf"\1 {_MARK}"),
]]


def normalise(text: str) -> str:
    """Text without what LaTeX, style and unicode put around the same mathematics; 1 \\pm 2 is 1 + 2, 1 - 2."""
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.replace(r"\pm", "+") + ", " + text.replace(r"\pm", "-") if text.count(r"\pm") == 1 else text.strip()


_RATIONAL = re.compile(rf"""([-+]?)\ ?(?:(\d+)\ )?(-?{_DECIMAL})(?:\ ?/\ ?(-?{_DECIMAL}))?
    (?:\ ?\\(?:times|cdot)\ ?10\^\{{([-+]?\d{{1,3}})\}})?""", re.VERBOSE)


def rational(text: str) -> Fraction | None:
    r"""The exact value of a number in normal form: 1,000  -2.50  3/4  2\frac{3}{4}  1.5\times 10^{-7}; None for
    anything else and more than 64 characters. Raises ZeroDivisionError for 1/0."""
    text = re.sub(r" ?\\frac ?\{ ?(-?[\d,.]+) ?\} ?\{ ?(-?[\d,.]+) ?\}", r" \1/\2", text[:65]).strip()
    if len(text) > 64 or not (found := _RATIONAL.fullmatch(text)):
        return None
    sign, whole, top, bottom, ten = (group and group.replace(",", "") for group in found.groups())
    value = Fraction(top) / Fraction(bottom or 1)
    if whole and not 0 < value < 1:  # 2 3 and the product 2\frac{4}{3}
        return None
    value = (value + int(whole or 0)) * Fraction(10) ** int(ten or 0)
    return -value if sign == "-" else value


def _split_unit(text: str) -> tuple[str, str]:
    """("5", "meter") of "5 meters", ("5", "m/s") of "5 m / s"; (text, "") where there is no unit."""
    value, _, unit = re.sub(r"(?<=[a-z]{3}) of [a-z ]+$", "", text).partition(f" {_MARK}")  # cups of flour
    words = set(re.findall("[a-z]+", unit))
    if not re.fullmatch(rf"(?:[A-Za-z/. {_MARK}]|\^\{{-?\d\}}|\\cdot)+", unit) or _NO_UNITS & words:
        return text, ""
    return value.strip(), re.sub(rf"(?<=\w\w)s\b|[. {_MARK}]", "", unit)


def _parts(text: str) -> tuple[str, list[str]]:
    r"""The brackets around all of `text` and its parts between commas, "and" and "or" outside further brackets: "()" of
    (1, 2), "{}" of \{1, 2\}, "" of 1, 2 and of what has no parts."""
    grouped = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda number: number[0].replace(",", ""), text)
    for brackets, inside in (*re.findall(r"^(\\\{|[(\[])(.*)(?:\\\}|[)\]])$", text, re.DOTALL), ("", grouped)):
        parts = re.split(r",(?![^()\[\]]*[)\]])", re.sub(r",? (?:and|or)\b|;", ",", inside))
        nested = any(re.search(r"[()\[\]]|\\[{}]", re.sub(r"[(\[][^()\[\]]*[)\]]", "", part)) for part in parts)
        if not nested and all(parts) and (len(parts) > 1 or brackets == r"\{"):
            return brackets and brackets[-1] + text[-1], [part.strip() for part in parts]
    return "", [text]


def compare(answer: str | None, gold: str, ask: Callable | None = None) -> bool | None:
    """Whether `answer` is the same as `gold`; None where only `ask`, math-verify, could tell and was not given."""
    if not answer or not answer.strip():
        return False
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer == gold
    if answer.strip() != gold.strip():  # 9 (apples), as in ASDiv
        gold = re.sub(r"^([-+]?[\d.,/]+) \(((?!mod\b)[A-Za-z ]{2,})\)$", r"\1 \2", gold.strip())
    try:
        return _compare(normalise(answer), normalise(gold), ask)
    except ZeroDivisionError:  # 5/0 is no number and equals no other text
        return answer == gold


def _tight(text: str) -> str:
    return re.sub(rf"{_MARK}|(?<!\d) +| +(?!\d)", "", text)


# what an answer may be called, x = or f(2) = or 2 + 3 =
_NAME = re.compile(r"((?:[^-+*/^<>=!()]|\([^()]*\))*|(?:\\[a-z]+|[^A-Za-z=<>!\\])*)(?:=|\\in(?![a-zA-Z])) *")


def _compare(answer: str, gold: str, ask: Callable | None) -> bool | None:
    if _tight(answer) == _tight(gold):
        return answer != ""
    (kind, ours), (kind_gold, theirs) = _parts(answer), _parts(gold)
    name, name_gold = len(ours) == 1 and _NAME.match(answer), len(theirs) == 1 and _NAME.match(gold)
    if name and name_gold and _tight(name[1]) != _tight(name_gold[1]):
        return False  # f(1) = 2 and f(2) = 2
    if name and name_gold or (name or name_gold) and (answer + gold).count("=") < 2:
        return _compare(answer[name.end() if name else 0 :], gold[name_gold.end() if name_gold else 0 :], ask)
    kinds = {kind, kind_gold}
    if len(ours) == len(theirs) == 1 and kinds != {"{}"}:
        return _single(ours[0], theirs[0], ask)
    if len(ours) != len(theirs) or not (kinds <= {"", "{}"} or kinds == {"", "()"} or kind == kind_gold):
        return False
    for part in ours:  # a list may stand for a set, in any order, and for a tuple, in its own
        verdicts = [_compare(part, other, ask) for other in (theirs if kinds <= {"", "{}"} else theirs[:1])]
        if True not in verdicts:
            return None if None in verdicts else False
        del theirs[verdicts.index(True)]  # each part has one of the gold to itself
    return True


def _single(answer: str, gold: str, ask: Callable | None) -> bool | None:
    (a, unit), (g, unit_gold) = _split_unit(answer), _split_unit(gold)
    percent = a.endswith("%"), g.endswith("%")
    if unit != unit_gold and (unit and unit_gold or any(percent)):
        return False
    a, g = (text.removesuffix("%").replace(_MARK, "").strip() for text in (a, g))
    x, y = rational(a), rational(g)
    if x is not None and y is not None:  # 50% is 1/2, and also 50, as golds often leave the sign out
        return x == y or percent[0] > percent[1] and x == 100 * y or percent[0] < percent[1] and 100 * x == y
    if percent[0] != percent[1]:
        return False
    if _tight(a) == _tight(g) or a.lower() == g.lower() and re.search(r"(?i)^(?:no|[a-j])$|^[^\\]*[a-z]{3}[^\\]*$", a):
        return True
    return False if _overlooked(a) != _overlooked(g) else ask and ask(a, g)


_COMMANDS = re.compile(  # what has letters and is none; math-verify drops the commands that are left here
    r"\\(?:begin|end|operatorname|mathbb|mathrm) ?\{[^{}]*\}|\\(?!prime|p?mod\b|[lc]?dots|[A-Z])[a-zA-Z]+")


def _overlooked(text: str) -> tuple[list[str], set[str], list[str]]:
    """Words, letters, subscripts and ratios, which math-verify takes for products or drops: they must be the same."""
    bare = _COMMANDS.sub(" ", text)
    words = re.findall(r".*:.*|\\[a-zA-Z{}]+|'|,(?!\d{3})|[A-Z]{2,}|[a-zA-Z]{3,}|^[a-zA-Z]{2}$", bare)  # dog, ABC
    subscripts = re.findall(r"(?<!\\log)_(?:\{[^{}]*\}|.)", text)
    return sorted(words), set(re.findall("[A-Za-z]", bare)) - set("ei"), sorted(subscripts)


# ---- math-verify

@contextlib.contextmanager
def _no_code():
    """Within, no text of an answer reaches sympy's `eval` (parse_expr) or `exec` (lambdify, of infinite sums)."""
    from unittest import mock

    import sympy  # noqa: F401  (loads both modules; by name, as `sympy.utilities.lambdify` is a function)

    parser, compiler = sys.modules["sympy.parsing.sympy_parser"], sys.modules["sympy.utilities.lambdify"]
    parse_expr = parser.parse_expr

    def refuse(text, *args, **kwargs):
        if re.fullmatch(r"[-+.\d]+", str(text), re.ASCII):  # sympy.Number("8") comes this way
            return parse_expr(text, *args, **kwargs)
        raise NotImplementedError("an answer is data: nothing in it is run")  # evalf then sums without lambdify

    with (mock.patch.object(parser, "parse_expr", refuse),
          mock.patch.object(compiler, "exec", refuse, create=True)):  # a module's globals shadow the builtins
        yield


def ask_math_verify(answer: str, gold: str) -> bool:
    """math-verify's verdict on two expressions or equations, read as LaTeX alone (its other reader is `eval`), units
    kept. No time-out (its own are SIGALRM, which cannot interrupt a long call of C). Nothing bounds what it raises."""
    import math_verify
    import sympy.physics.units  # noqa: F401  (simplify imports it late, and its names go through parse_expr)

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time-outs are off
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    with _no_code():
        parsed = [math_verify.parse(rf"\boxed{{{text}}}", [config], parsing_timeout=None, raise_on_error=True)
                  for text in (gold, answer)]
        return math_verify.verify(*parsed, float_rounding=DIGITS, numeric_precision=DIGITS, timeout_seconds=None,
                                  raise_on_error=True)


# ---- a reward of one's own

class Response(str):
    """What a reward of one's own gets of a response: its text, and in `cut` whether it ended at the length limit."""

    def __new__(cls, text: str, cut: bool = False):
        response = super().__new__(cls, text)
        response.cut = cut
        return response


class _Source(NamedTuple):
    """A reward function as text. The workers get the text and not the path: one that is started late in a run, in the
    place of one that was killed, must not run what the file has become meanwhile."""

    path: str
    function: str
    text: str
    sha256: str  # of the file

    @property
    def batch(self) -> bool:
        """Whether it takes all responses of a call at once, for a model behind an API."""
        return self.function.endswith("_batch")

    @classmethod
    def read(cls, spec: str) -> "_Source":
        path, _, function = spec.rpartition(":")
        try:
            content = Path(path).read_bytes()
            return cls(path, function, content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--reward is FILE.py:FUNCTION, got {spec!r}: cannot read {path}: {error}") from error

    def define(self) -> Callable[[Sequence[Response], Sequence[Problem]], Sequence[float]]:
        """Runs the file, which the user wrote and named, and returns its function, in any case as one of lists."""
        module = sys.modules["_custom_reward"] = types.ModuleType("_custom_reward")
        module.__file__ = self.path
        try:
            exec(compile(self.text, self.path, "exec"), vars(module))
        except SyntaxError as error:  # in the file, or in one that it imports
            raise ValueError(f"--reward: {self.path} does not compile: {error}") from error
        if not callable(function := getattr(module, self.function, None)):
            raise ValueError(f"--reward: there is no function {self.function} in {self.path}")
        return function if self.batch else lambda responses, problems: list(map(function, responses, problems))


# ---- workers

def _decide(function: Callable | None, jobs: list) -> list[float] | str:
    """The reward of each job, or the traceback of what went wrong. A job is [response, problem, cut] for `function`, or
    where that is None [answer, gold], 1 or -1."""
    try:
        if function is None:
            return [1.0 if compare(answer, gold, ask_math_verify) else -1.0 for answer, gold in jobs]
        values = list(function([Response(text, cut) for text, _, cut in jobs], [Problem(**p) for _, p, _ in jobs]))
        if len(values) != len(jobs):
            raise ValueError(f"{len(values)} rewards for {len(jobs)} responses")
        for value in values:
            if not -1 <= value <= 1:
                raise ValueError(f"a reward is a number from -1 to 1, not {value!r:.200}")
        return [float(value) for value in values]
    except MemoryError:
        raise  # what comes after it is not to be trusted
    except Exception:  # no list of what math-verify, sympy, the parser and a user's function raise is complete
        return traceback.format_exc()


def _fork_for_each(control: multiprocessing.connection.Connection) -> multiprocessing.connection.Connection:
    """Worker program. Takes pipes out of `control`: for each it kills the fork that it has and makes one that returns
    with the pipe. It has one thread and runs nothing of a user's: threads and a GPU bear no fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the whole process group; the trainer ends us
    end_with_parent()  # beyond Linux what is not computing ends with its pipe, which the parent closes
    ask_math_verify("x", "y")  # pays for the imports, once
    fork = None
    with contextlib.suppress(EOFError):  # the trainer is gone
        while True:
            pipe = multiprocessing.connection.Connection(multiprocessing.reduction.recv_handle(control))
            if fork:
                os.kill(fork, signal.SIGKILL)
                os.waitpid(fork, 0)
            fork = os.fork()
            if not fork:
                return pipe
            pipe.close()
    sys.exit()


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """The fork. In comes what to do, a _Source or null, then lists of jobs; out goes null when it is ready, then what
    `_decide` says of each list."""
    end_with_parent()
    source = json.loads(pipe.recv_bytes())
    function = _Source(*source).define() if source else None
    if sys.platform == "linux":
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + WORKER_BYTES, mapped + WORKER_BYTES))
    pipe.send_bytes(b"null")
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer is gone
        while True:
            pipe.send_bytes(json.dumps(_decide(function, json.loads(pipe.recv_bytes()))).encode())


class _Worker:
    """A process that decides a list of jobs at a time, in a fork of it that can be killed."""

    def __init__(self, source: _Source | None):
        self.source, self.process = source, None
        self.start()

    def start(self) -> None:
        """A fork in the place of the one before, which is killed; of a new process where that is gone."""
        if self.process is None or self.process.poll() is not None:
            self.control, theirs = multiprocessing.Pipe()
            self.process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL,
                                            pass_fds=[theirs.fileno()])  # a new program: never a fork with a GPU
            theirs.close()  # ours must be the only other end, or neither side would ever see end-of-file
        self.pipe, theirs = multiprocessing.Pipe()
        with theirs:
            multiprocessing.reduction.send_handle(self.control, theirs.fileno(), self.process.pid)
        self.ask(self.source, seconds=120)  # imports from a slow disk

    def ask(self, message: object, seconds: float) -> list[float] | str | None:
        """Its reply. TimeoutError after so many seconds, EOFError or another OSError if it died: then `start` is next.
        """
        try:
            self.pipe.send_bytes(json.dumps(message, default=asdict).encode())
            if not self.pipe.poll(seconds):
                raise TimeoutError
            reply = json.loads(self.pipe.recv_bytes())
        except BaseException:
            self.pipe.close()
            raise
        progress()
        return reply

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        self.control.close()


class Grade(NamedTuple):
    """The verdict on one response."""

    reward: float  # 1 or -1; of a reward of one's own, anything between; above 0 is right
    extracted: str | None  # the answer found, None if there is none
    timed_out: bool = False  # not graded in time, or two workers died of it; counts as wrong
    failed: bool = False  # math-verify or the user's function raised an exception over it; counts as wrong


class Grader(contextlib.AbstractContextManager):
    """Grades responses; no answer can hold it for longer than `timeout` seconds. A context manager.

    workers: processes, started when first needed. timeout: seconds for one answer, hard: its worker is killed and
    replaced. reward: "FILE.py:function" decides instead, called with a Response and its Problem: a number from -1 to 1,
    above 0 is right. One whose name ends in _batch is called once with lists of them and returns a list; it has the
    time that as many answers would have one by one, and what goes wrong counts for all. `source` then holds the file's
    text and sha256. Raises ValueError that says what is wrong with it.
    `failure`: the traceback of the first response over which math-verify or the reward raised, "" while there is none.
    """

    def __init__(self, *, workers: int = 2, timeout: float = 5.0, reward: str = ""):
        self.workers, self.timeout = workers, timeout
        self.source = _Source.read(reward) if reward else None
        if self.source:
            self.source.define()  # raises here rather than in a worker
        # a thread for each worker, to wait for it; they stay, as a worker dies with the thread that started it
        self._threads = ThreadPoolExecutor(workers)
        self._workers: deque[_Worker] = deque()  # those that wait for a job
        self.failure = ""

    def grade(self, responses: Sequence[str], problems: Sequence[Problem], *,
              cut: Sequence[bool] | None = None) -> list[Grade]:
        """One verdict for each of R responses to R problems; equal ones are decided once. cut: which responses ended at
        the length limit: those are wrong, whatever they say, unless a reward of one's own says else."""
        cut = [False] * len(responses) if cut is None else map(bool, cut)  # no numpy: they go out as JSON
        asked = list(zip(responses, problems, cut, strict=True))
        found = [None if over and not self.source else extract(text, p.style) for text, p, over in asked]
        jobs = asked if self.source else [(answer, p.answer) for answer, p in zip(found, problems, strict=True)]
        distinct = list(dict.fromkeys(jobs))
        calls = [distinct] if distinct and self.source and self.source.batch else [[job] for job in distinct]
        verdicts = {}
        for call, reply in zip(calls, self._threads.map(self._verdicts, calls), strict=True):
            verdicts |= zip(call, reply if isinstance(reply, list) else [reply] * len(call), strict=True)
        why = next((v for v in verdicts.values() if isinstance(v, str)), "")
        if self.source and why and not self.failure:
            log.warning("%s failed; there a response counts as wrong. This is said once:\n%s", self.source.path, why)
        self.failure = self.failure or why
        return [Grade(verdicts[job] if isinstance(verdicts[job], float) else -1.0, answer, verdicts[job] is None,
                      isinstance(verdicts[job], str)) for job, answer in zip(jobs, found, strict=True)]

    def _verdicts(self, jobs: list[tuple]) -> list[float] | str | None:
        """The rewards of jobs, what failed, or None where the deadline passed or two workers died of them."""
        if not self.source and (same := compare(*jobs[0])) is not None:
            return [2.0 * same - 1]
        seconds = self.timeout * math.ceil(len(jobs) / self.workers)
        for _ in range(2):  # a worker that dies (memory, a crash in C) may be bad luck; the second is their doing
            try:
                worker = self._workers.pop()
            except IndexError:
                worker = _Worker(self.source)
            try:
                return worker.ask(jobs, seconds)
            except TimeoutError:
                return None
            except (OSError, EOFError):
                continue
            finally:
                if worker.pipe.closed:
                    worker.start()
                self._workers.append(worker)
        return None

    def close(self, *exc) -> None:
        """Kills the workers and ends."""
        self._threads.shutdown(cancel_futures=True)
        while self._workers:
            self._workers.pop().kill()

    __exit__ = close


# ---- golds

def check_golds(problems: Sequence[Problem], grader: Grader, *, allowed: float, name: str) -> dict[str, int]:
    """{"bad_golds": how many golds hardly any response could match}, with a warning if there are any.

    Bad is a gold that is not graded right when a response gives it in a box, is longer than MAX_ANSWER, one of
    NO_ANSWERS, or a worked solution, which no response repeats. allowed: the share that may be; more is a
    ValueError, with examples.
    """
    if grader.source:
        return {"bad_golds": 0}
    given = grader.grade([rf"Answer: \boxed{{{p.answer}}}" for p in problems], problems)
    bad = [p for p, grade in zip(problems, given, strict=True)
           if grade.reward <= 0 or len(p.answer) > MAX_ANSWER or _ANSWER.search(p.answer)
           or p.answer.lower() in NO_ANSWERS or len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", p.answer)) > 5]
    if bad:
        examples = "\n".join(f"  {p.id} ({p.style}): {p.answer[:70]!r}" for p in bad[:3])
        message = (f"{name}: {len(bad)} of {len(problems)} gold answers could hardly be met by any response, such as\n"
                   f"{examples}\ngive a column `answer` with the bare answer (14, \\frac{{1}}{{2}}) or another `style`")
        if len(bad) > allowed * len(problems):
            raise ValueError(f"{message}, or admit a share of them with --allow_bad_golds SHARE (now {allowed:g})")
        log.warning("%s", message)
    return {"bad_golds": len(bad)}


if __name__ == "__main__":
    _serve(_fork_for_each(multiprocessing.connection.Connection(int(sys.argv[1]))))
