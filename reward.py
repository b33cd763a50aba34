"""Is this response right? +1 or -1, for text that a model wrote and that nobody has read.

Three stages. `extract` finds the answer in the response, in time linear in its length. `_quick` decides almost every
case exactly, with string rules and rational arithmetic, in this process. What is left (surds, sets, intervals,
polynomials) is asked of math-verify, whose running time nothing bounds (`9^{9^{9^9}}`): `Grader` asks it in worker
processes that can be killed, `score` and `equivalent` ask it right here and are for answers one trusts.

What math-verify 0.9 is asked, and why so:
- LaTeX extraction only. ExprExtractionConfig hands text to sympy's parse_expr, which is `eval`.
- No code from text. LaTeX has a way to `exec` too: an infinite sum is evaluated with sympy's lambdify, which prints
  symbols by name into source code. `_no_code` therefore stands between them and sympy's `eval` and `exec`.
- No time-outs of its own: they are SIGALRM, which fails off the main thread and cannot interrupt a long C call.
- We catch nothing around it: `parse` and `verify` turn every Exception (syntax errors, RecursionError, MemoryError,
  sympy's own) into "no match". What ends a worker regardless (the OOM killer, a crash in C) is a death, handled below.
"""

import contextlib
import functools
import json
import logging
import multiprocessing
import multiprocessing.connection
import re
import signal
import sys
import time
from collections import deque
from fractions import Fraction

MAX_NUMBER = 64  # characters; longer digit strings are compared as strings
MAX_ANSWER = 512  # characters; a longer answer is right only if it is the gold answer to the letter
MAX_CACHE = 100_000  # graded pairs kept
START_SECONDS = 120  # a worker imports the main script again, which may import torch from a slow disk
WORKER_BYTES = 2 << 30  # of address space that a worker may add: 10^5 x 10^5 zeros are a MemoryError, no swap storm

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w.)}}\]])[-+]\$?)?(?:{_DIGITS})(?:/(?:{_DIGITS}))?", re.ASCII)
_BRACE = re.compile(r"\\{1,2}(?P<box>boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANSWER = re.compile(r"\banswer\**(?:\s{0,4}:|\s{1,4}is\b:?)", re.IGNORECASE)


# ---- extraction

def _boxed(text: str) -> str | None:
    """Content of the last-opened box that is closed and not empty (an echoed "within \\boxed{}" is no answer)."""
    stack, best = [], (-1, -1)
    for token in _BRACE.finditer(text):
        if token["box"] or token[0] == "{":
            stack.append(token.end() if token["box"] else -1)
        elif token[0] == "}" and stack:
            start = stack.pop()
            if start > best[0] and text[start : min(token.start(), start + MAX_ANSWER)].strip():
                best = (start, token.start())
    return text[slice(*best)].strip() if best[0] >= 0 else None


def _line_after(text: str, start: int) -> str | None:
    """The first sentence of the first line with something on it; "Answer: 42. I hope ..." is "42"."""
    line = text[start:].lstrip(" \t\r\n*:").partition("\n")[0]
    return re.split(r"\.\s", line, maxsplit=1)[0].strip(" \t\r*") or None


def _answer_line(text: str) -> str | None:
    ends = deque((m.end() for m in _ANSWER.finditer(text)), maxlen=1)
    return _line_after(text, ends[0]) if ends else None


def _hashes(text: str) -> str | None:
    start = text.rfind("####")
    return _line_after(text, start + 4) if start >= 0 else None


def _last_number(text: str) -> str | None:
    last = deque(_NUMBER.finditer(text.replace("−", "-")), maxlen=1)
    return last[0][0].rstrip(".") if last else None


# style -> where to look, in this order; the first that finds something is the answer
STYLES = {
    "math": (_boxed, _answer_line, _hashes, _last_number),  # \boxed{x}, "Answer: x" / "answer is x", "#### x", number
    "number": (_last_number,),  # word problems and arithmetic: the last number, whatever surrounds it
}


def extract(response: str, style: str = "math") -> str | None:
    """The answer that `response` gives, or None if it gives none. An unknown `style` (see STYLES) is a KeyError."""
    found = (find(response) for find in STYLES[style])
    return next((answer for answer in found if answer is not None), None)


# ---- equivalence

_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"−", "-"),
        (r"\\[!,;:]|\\?\$|\\[()\[\]]|\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1"),
        (r"\{,\}", ","),
        (r"\\?%", "%"),
        (r"\\ |~", " "),
        (r"^([-+]?)(?=10\^)", r"\g<1>1\\times"),
        # "2 1/2" is not 21/2 and "1, 234" is not 1,234: a space before a digit stays after a digit or a comma
        (r"(?<![\d,\s])\s+|\s+(?![\d\s])", ""),
        (r"(?<=.)\.$", ""),
    ]
]
_POWER = r"(?:(?:\\times|\\cdot|×|\*)10\^(?:\{([-+]?\d{1,3})\}|(\d))|[eE]([-+]?\d{1,3}))?"
_PLAIN = re.compile(rf"([-+]?)({_DIGITS})(?:/({_DIGITS})|{_POWER})", re.ASCII)
_FRAC = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{(\d+)\}", re.ASCII)


def _normalise(text: str) -> str:
    text = text.strip()
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _rational(text: str) -> Fraction | None:
    """The exact value of a plain number (1,000  -2.50  3/4  \\frac{3}{4}  1.5\\times10^{-7}), else None."""
    if len(text) > MAX_NUMBER:
        return None
    if match := _FRAC.fullmatch(text):
        sign, top, bottom, *power = *match.groups(), None
    elif match := _PLAIN.fullmatch(text):
        sign, top, bottom, *power = match.groups()
    else:
        return None
    top, bottom = (Fraction(part.replace(",", "")) for part in (top, bottom or "1"))
    exponent = next((int(p) for p in power if p), 0)
    return (-1 if sign == "-" else 1) * top / bottom * Fraction(10) ** exponent


def _quick(answer: str | None, gold: str) -> bool | None:
    """True or False where strings and rational numbers can tell, None where math-verify must be asked."""
    if not answer:
        return False
    if max(len(answer), len(gold)) > MAX_ANSWER:
        return answer == gold
    answer, gold = _normalise(answer), _normalise(gold)
    if answer == gold:
        return answer != ""
    try:
        a, g = _rational(answer), _rational(gold)
    except ZeroDivisionError:  # 5/0 is no number and equals none
        return False
    return None if a is None or g is None else a == g


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
    return parse, functools.partial(math_verify.verify, timeout_seconds=None)


def _symbolic(answer: str, gold: str) -> bool:
    parse, verify = _math_verify()
    with _no_code():
        return verify(parse(rf"\boxed{{{gold}}}"), parse(rf"\boxed{{{answer}}}"))


def equivalent(answer: str, gold: str) -> bool:
    """Is `answer` the same value as `gold`? Two plain numbers must be equal exactly: 0.33 is not 1/3. No time-out."""
    quick = _quick(answer, gold)
    return _symbolic(answer, gold) if quick is None else quick


def score(response: str, answer: str, style: str = "math") -> float:
    """+1.0 if `response` gives `answer`, else -1.0; in this process, without time-out (see `Grader`)."""
    found = extract(response, style)
    return 1.0 if found is not None and equivalent(found, answer) else -1.0


# ---- workers

def _confine() -> None:
    """Leave signals to the trainer, bound the memory, and (Linux) die with the parent even if it is killed with -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the whole process group; the trainer ends us
    if sys.platform != "linux":
        return  # there the end of the pipe, which closes with the parent, ends a worker that is not computing
    import ctypes
    import resource

    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL) != 0:  # 1 = PR_SET_PDEATHSIG
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    with open("/proc/self/statm") as file:  # on top of what is mapped already: torch alone maps gigabytes
        limit = int(file.read().split()[0]) * resource.getpagesize() + WORKER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(pipe) -> None:
    """Worker: [answer, gold] in, true or false out, as JSON (bytes that are text are parsed, never unpickled)."""
    _confine()
    _symbolic("x", "y")  # pays for the imports before the first deadline runs
    pipe.send_bytes(b"null")  # ready
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer is gone
        while True:
            pipe.send_bytes(json.dumps(_symbolic(*json.loads(pipe.recv_bytes()))).encode())


class _Worker:
    def __init__(self):
        spawn = multiprocessing.get_context("spawn")  # never fork a process that holds a GPU; no sibling gets our pipe
        self.pipe, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs,), daemon=True, name="grader")
        self.process.start()
        theirs.close()  # ours must be the only other end, or neither side would ever see end-of-file
        self.ready, self.job, self.deadline = False, None, float("inf")

    def give(self, job: tuple, timeout: float) -> None:
        self.job, self.deadline = job, time.monotonic() + (timeout if self.ready else START_SECONDS)
        with contextlib.suppress(BrokenPipeError):  # it died while idle: its pipe reads end-of-file, seen in `_grade`
            self.pipe.send_bytes(json.dumps(job).encode())

    def receive(self, timeout: float, verdicts: dict) -> None:
        reply = json.loads(self.pipe.recv_bytes())
        if reply is None:  # ready, with its first job in the pipe: the clock of that job starts now
            self.ready, self.deadline = True, time.monotonic() + timeout
        else:
            verdicts[self.job], self.job = reply, None

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Grader:
    """Scores responses; no answer can hold it for longer than `timeout` seconds. A context manager.

    style: a key of STYLES. workers: processes, started when first needed. timeout: seconds for one answer, hard: its
    worker is killed and replaced. Use it from the main thread: workers die with the thread that started them.
    """

    def __init__(self, *, style: str = "math", workers: int = 2, timeout: float = 5.0):
        if style not in STYLES or workers < 1 or timeout <= 0:
            raise ValueError(f"{style=}, {workers=}, {timeout=}: need style in {sorted(STYLES)}, the others positive")
        self.style, self.num_workers, self.timeout = style, workers, timeout
        self._workers: list[_Worker] = []
        self._cache: dict[tuple[str | None, str], bool] = {}

    def score_all(self, responses: list[str], answers: list[str]) -> tuple[list[float], int]:
        """Rewards in {-1.0, +1.0}, one a response, and how many of the responses were not graded in time.

        responses, answers: R texts each, else ValueError. Equal (answer, gold) pairs are graded once.
        """
        pairs = [(extract(r, self.style), gold) for r, gold in zip(responses, answers, strict=True)]
        verdicts = {p: self._cache[p] if p in self._cache else _quick(*p) for p in dict.fromkeys(pairs)}
        hard = self._grade([p for p, verdict in verdicts.items() if verdict is None])
        verdicts |= hard
        # a time-out is not kept: it may have been the machine's fault
        self._cache |= {p: verdict for p, verdict in hard.items() if verdict is not None}
        while len(self._cache) > MAX_CACHE:
            del self._cache[next(iter(self._cache))]  # the oldest
        return [1.0 if verdicts[p] else -1.0 for p in pairs], sum(verdicts[p] is None for p in pairs)

    def _grade(self, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        """job -> verdict; None where the deadline passed or two workers died of it."""
        queue, died, verdicts = deque(jobs), set(), {}
        try:
            while len(verdicts) < len(jobs):
                self._assign(queue)
                busy = [w for w in self._workers if w.job]
                patience = max(0.0, min(w.deadline for w in busy) - time.monotonic())
                readable = multiprocessing.connection.wait([w.pipe for w in busy], patience)
                for worker in busy:
                    job = worker.job
                    if worker.pipe in readable:
                        try:
                            worker.receive(self.timeout, verdicts)
                        except (EOFError, ConnectionResetError):
                            # it died (memory, a crash in C): once may be bad luck, twice is the answer's doing
                            self._drop(worker)
                            if job in died:
                                verdicts[job] = None
                            else:
                                died.add(job)
                                queue.append(job)
                    elif time.monotonic() >= worker.deadline:
                        self._drop(worker)
                        verdicts[job] = None
        finally:
            for worker in [w for w in self._workers if w.job]:  # interrupted: a late reply must not meet a new job
                self._workers.remove(worker)
                worker.kill()
        return verdicts

    def _assign(self, queue: deque) -> None:
        for worker in [w for w in self._workers if not w.job and not w.process.is_alive()]:
            self._drop(worker)
        idle = deque(w for w in self._workers if not w.job)
        while queue and (idle or len(self._workers) < self.num_workers):
            if not idle:
                idle.append(_Worker())
                self._workers.append(idle[0])
            idle.popleft().give(queue.popleft(), self.timeout)

    def _drop(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.kill()
        if not worker.ready:
            raise RuntimeError(f"a grading worker did not start (exit code {worker.process.exitcode}): see its output "
                               "above; is math-verify installed, and the main script guarded by __name__?")

    def close(self) -> None:
        """Kills the workers. Scoring again would start new ones."""
        while self._workers:
            self._workers.pop().kill()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()
