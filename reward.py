"""Is this response right? +1 or -1, for text that a model wrote and that nobody has read.

Three stages. `extract` finds the answer in the response, in time linear in its length; where it looks is a named style.
`equivalence.compare` decides almost every case in this process, exactly. What is left (surds, polynomials) is asked of
math-verify, whose running time nothing bounds (`9^{9^{9^9}}`): `Grader` asks it in worker processes that can be killed.

A worker is this very file run as a program, so it starts in about a second whatever the trainer has imported, shares
no memory with CUDA or vLLM, and gets its work through a pipe as JSON: bytes that are text, parsed and never unpickled.

A reward of one's own, `--reward FILE.py:function`, takes the place of all three stages and runs in the same workers
under the same deadline.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import re
import signal
import string
import subprocess
import sys
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, SupportsFloat

from equivalence import MAX_ANSWER, NUMBER_DIGITS, PLAIN, SPACES, VULGAR, ask_math_verify, compare, equivalent, failures
from watchdog import progress

log = logging.getLogger(__name__)

MAX_CACHE = 100_000  # graded pairs kept
CHUNK = 32  # jobs that a worker gets at a time
START_SECONDS = 120  # for imports from a slow disk
WORKER_BYTES = 2 << 30  # of address space that a worker may add: 10^5 x 10^5 zeros are a MemoryError, no swap storm
DAPO_TAIL = 300  # characters at the end of a response that count in the style `dapo`, as in verl's math_dapo

FAILED = "failed"  # a worker's reply where math-verify raised an exception and nothing else made the answer right

_FRACTION = rf"\\[dtc]?frac(?:[ ]?(?:\d|\{{[ ]?-?\d[\d,]*[ ]?\}})){{2}}|[{VULGAR}]"
_GROUPS = rf"\d{{1,3}}(?:(?:,\\!|\{{,\}}|\\[,;:\ ]|[~{SPACES}])\d{{3}})+(?!\d)(?:\.\d+)?"  # 1\,250
_POWER = (r"(?:[ ]?(?:\\times|\\cdot|[×·*xX])[ ]?(?:10|\{10\}))?"
          r"(?:(?:\^|\*\*)(?:\{[-+]?\d+\}|\([-+]?\d+\)|[-+]?\d+)|[⁺⁻]?[⁰¹²³⁴-⁹]+)|[eE][-+]?\d{1,3}(?!\w)")
_NUMBER = re.compile(rf"""(?:(?<![\w.)}}\]])[-+]\$?)?(?:
    (?:(?<![\^_])\d{{1,3}}(?:[ {SPACES}~]|\\[,;:\ ])?)?(?:{_FRACTION})  # \frac23, 2\frac23
    | (?<![\^_])\d{{1,3}}[ {SPACES}]\d\d?/\d{{1,3}}(?![\d/.])  # 2 2/3
    | \d{{1,2}}(?::[0-5]\d){{0,2}}[ ]?[aApP]\.?[mM]\b  # a time of day
    | (?:{_GROUPS}|{NUMBER_DIGITS})(?:/(?:{NUMBER_DIGITS})|{_POWER}|\\overline\{{\d+\}})?
    )(?:\$?[ ](?:hundred|thousand|million|billion|trillion)\b)?""", re.ASCII | re.VERBOSE)
_BRACE = re.compile(r"\\{1,2}(?P<box>boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)

# a period behind one of these, or behind an initial, ends a sentence only if the next word begins one: Mr. Smith
_TITLES = set(
    "Mr Mrs Ms Dr St Mt Ft Lt Col Gen Maj Capt Sgt Prof Rev Hon Gov Sen Rep Jr Sr Ph.D Co Corp Inc Ltd vs al".split())
# and behind one of these also if it is a capital letter that follows: No. 5, but "No. Mr. X is wrong"
_SHORTENED = set(
    "No Nos Eq Fig Vol Ch Sec p pp Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec ft in yd mi lb lbs oz pt qt gal "
    "tsp tbsp hr hrs min mins sec secs wk yr yrs sq cu approx ca etc Ave Blvd Rd Dept".split())
_FIRST_WORDS = set(
    "I We You He She It They The This Thus That These There Then Therefore Hence So Since Because As And But For If In "
    "Let Now Note Here To By Each Both All My Our His Her Please Next First Finally Check Also However Answer "
    "Explanation Solution Step Given Using After Where When What With From Done because since".split())

_QUANTITIES = set(
    "no not never wrong half third thirds quarter quarters twice double triple times squared cubed plus minus less "
    "more over of out per percent hundred thousand million billion trillion dozen pi divided between".split())
_LETTER = re.compile(r"\W*(?:(?:option|choice|answer)\W+)?([A-Ja-j])(?![\w'^=+/-])", re.IGNORECASE)
_LETTER_IN_BRACKETS = re.compile(r"\(([A-J])\)|^\W*([A-J])\W*$", re.MULTILINE)


@dataclass(frozen=True)
class Problem:
    """One question with a checkable answer."""

    id: str
    prompt: str
    answer: str
    style: str = "math"  # where a response states its answer, a key of STYLES
    kind: str = ""  # what evaluations tell apart; "" = nothing


# ---- extraction

def boxed(text: str) -> str | None:
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


def _ends_sentence(word: str, after: str) -> bool:
    """Whether the period behind `word` ends a sentence, if `after` follows: not in Mr. Smith, J. Smith and 5 ft. 3."""
    word = word[len(word.rstrip(f".{string.ascii_letters}")) :]
    after = re.match(r"[*_\"'“(]*(\w*)", after)[1]
    if after in _FIRST_WORDS:
        return True
    if word in _SHORTENED:
        return after[:1].isupper()
    initial = len(word) == 1 and word.isupper() or re.fullmatch(r"(?:[A-Za-z]\.)+[A-Za-z]", word)  # J, U.S, p.m
    return not (word in _TITLES or initial and after[:1].isalpha())


def _line_after(text: str, start: int) -> str | None:
    """The first sentence of the first line with something on it; "Answer: Mr. X. I hope ..." is "Mr. X"."""
    line = text[start:].lstrip(" \t\r\n*:").partition("\n")[0]
    for word, after in itertools.pairwise(re.finditer(r"\S+", line)):
        if word[0][-1] == "." and _ends_sentence(word[0][:-1], after[0]):
            line = line[: word.end() - 1]
            break
    return line.strip(" \t\r*") or None


def _last_line_after(pattern: re.Pattern, text: str) -> str | None:
    ends = deque((m.end() for m in pattern.finditer(text)), maxlen=1)
    return _line_after(text, ends[0]) if ends else None


_answer_line = functools.partial(_last_line_after, re.compile(r"\banswer\**(?:\s{0,4}:|\s{1,4}is\b:?)", re.IGNORECASE))
_answer_colon = functools.partial(_last_line_after, re.compile(r"answer\**\s{0,4}:", re.IGNORECASE))
_hashes = functools.partial(_last_line_after, re.compile("#{4,}"))


def _answer_in_the_tail(text: str) -> str | None:
    line = _answer_colon(text[-DAPO_TAIL:])
    return line and (boxed(line) or line)


def _last_number(text: str) -> str | None:
    last = deque(_NUMBER.finditer(text.translate(PLAIN)), maxlen=1)
    return last[0][0].rstrip(".") if last else None


def _value(text: str | None) -> str | None:
    """What a box or a line says, as a whole, if there is a number in it; "18 apples" is 18."""
    rest, numbers = _NUMBER.subn(" ", (text or "").translate(PLAIN))
    return _last_number(text) if numbers == 1 and _only_words(rest) else text if numbers else None


def _only_words(rest: str) -> bool:
    """Whether the `rest` beside a number leaves it as it is: no sign, no letter of algebra, no word of quantity."""
    rest = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}|\\?\$|\*\*|[€£]", r" \1 ", rest)
    words = re.findall(r"[A-Za-z']+", rest)
    signs = re.search(r"[^A-Za-z\s.,:;'-]|(?<![A-Za-z])-|-(?![A-Za-z])", rest)
    return not signs and not any(w.lower() in _QUANTITIES or len(w) == 1 and w not in "aAI" for w in words)


def _choice(text: str) -> str | None:
    """A letter A to J: that of the box or the answer line, else the last one in brackets or alone on its line."""
    for found in (boxed(text), _answer_line(text)):
        content = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{", "", found or "")
        if letter := _LETTER.match(content):
            return letter[1].upper()
    last = deque(_LETTER_IN_BRACKETS.finditer(text), maxlen=1)
    return (last[0][1] or last[0][2]) if last else None


_STATED = boxed, _answer_line, _hashes  # \boxed{x}, "Answer: x" / "answer is x", "#### x"
# style -> where to look, in this order; the first that finds something is the answer
STYLES = {
    "math": (*_STATED, _last_number),
    "dapo": (_answer_in_the_tail,),  # "Answer: x" in the last 300 characters, nothing else
    # word problems and arithmetic: what follows ####, what is in the box, each if there is a number, or the last number
    "gsm8k": (lambda text: _value(_hashes(text)), lambda text: _value(boxed(text)), _last_number),
    "choice": (_choice,),
}


def extract(response: str, style: str = "math") -> str | None:
    """The answer that `response` gives, or None if it gives none. An unknown `style` (see STYLES) is a KeyError."""
    found = (find(response) for find in STYLES[style])
    return next((answer for answer in found if answer is not None), None)


def score(response: str, answer: str, style: str = "math") -> float:
    """+1.0 if `response` gives `answer`, else -1.0; in this process, without time-out (see `Grader`)."""
    return 1.0 if equivalent(extract(response, style), answer) else -1.0


# ---- a reward of one's own

class _Source(NamedTuple):
    """A reward function as text. The workers get the text and not the path: one that is started late in a run, in the
    place of one that was killed, must not run what the file has become meanwhile."""

    path: str
    function: str
    text: str
    sha256: str  # of the file

    @classmethod
    def read(cls, spec: str) -> "_Source":
        path, colon, function = spec.rpartition(":")
        if not (colon and function and path.endswith(".py")):
            raise ValueError(f"--reward must be FILE.py:FUNCTION, got {spec!r}")
        try:
            content = Path(path).read_bytes()
            return cls(path, function, content.decode("utf-8-sig"), hashlib.sha256(content).hexdigest())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--reward {spec}: cannot read {path}: {error}") from error

    def define(self) -> Callable[[str, Problem], float]:
        """Runs the file, which the user wrote and named, and returns its function."""
        module = sys.modules["_custom_reward"] = types.ModuleType("_custom_reward")
        module.__file__ = self.path
        try:
            exec(compile(self.text, self.path, "exec"), vars(module))
        except Exception as error:
            raise ValueError(f"--reward: {self.path} does not run: {type(error).__name__}: {error}") from error
        if not hasattr(module, self.function):
            raise ValueError(f"--reward: there is no {self.function} in {self.path}")
        if not callable(function := getattr(module, self.function)):
            raise ValueError(f"--reward: {self.function} in {self.path} is no function but {function!r:.100}")
        return function


# ---- workers

def _confine() -> None:
    """Leave signals to the trainer and (Linux) die with the parent even if it is killed with -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the whole process group; the trainer ends us
    if sys.platform != "linux":
        return  # there the end of the pipe, which closes with the parent, ends a worker that is not computing
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL) != 0:  # 1 = PR_SET_PDEATHSIG
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def _bound_memory() -> None:
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm") as file:  # on top of what is mapped already
        limit = int(file.read().split()[0]) * resource.getpagesize() + WORKER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _same(answer: str, gold: str) -> bool | str:
    before = failures.total()
    return compare(answer, gold, ask_math_verify) or (failures.total() > before and FAILED)


def _ask(function: Callable, response: str, problem: dict) -> float | str:
    """What the user's function says, or the traceback of what went wrong in it."""
    try:
        value = function(response, Problem(**problem))
        if not isinstance(value, SupportsFloat) or not -1 <= float(value) <= 1:
            raise ValueError(f"a reward is a number from -1 to 1, not {value!r:.200}")
        return float(value)
    except MemoryError:
        raise  # what comes after it is not to be trusted
    except Exception:
        return traceback.format_exc()


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """Worker. In comes what to do, a _Source or null, then lists of jobs, [answer, gold] or [response, problem]; out
    goes the verdict on each as soon as it is known: true, false or FAILED; a reward or a traceback."""
    _confine()
    source = json.loads(pipe.recv_bytes())
    decide = functools.partial(_ask, _Source(*source).define()) if source else _same
    _bound_memory()  # behind what the user's file imports
    ask_math_verify("x", "y")  # pays for the imports before the first deadline runs
    pipe.send_bytes(b"null")  # ready
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer is gone
        while True:
            for job in json.loads(pipe.recv_bytes()):
                pipe.send_bytes(json.dumps(decide(*job)).encode())


class _Worker:
    def __init__(self, source: _Source | None):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL,
                                        pass_fds=[theirs.fileno()])  # a new program: never a fork of one with a GPU
        theirs.close()  # ours must be the only other end, or neither side would ever see end-of-file
        self.ready, self.jobs, self.deadline = False, deque(), float("inf")
        self._send(source)

    def _send(self, message) -> None:
        with contextlib.suppress(ConnectionError):  # it died: its pipe reads end-of-file, seen in `_grade`
            self.pipe.send_bytes(json.dumps(message, default=dataclasses.asdict).encode())

    def give(self, jobs: list[tuple], timeout: float) -> None:
        self.jobs, self.deadline = deque(jobs), time.monotonic() + (timeout if self.ready else START_SECONDS)
        self._send(jobs)

    def receive(self, timeout: float, verdicts: dict) -> None:
        """Takes one reply; the clock of the next job starts now."""
        reply = json.loads(self.pipe.recv_bytes())
        progress()
        if reply is None:
            self.ready = True
        else:
            verdicts[self.jobs.popleft()] = reply
        self.deadline = time.monotonic() + timeout

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Grade(NamedTuple):
    """The verdict on one response."""

    reward: float  # 1 or -1; of a reward of one's own, anything between
    extracted: str | None  # the answer found, None if there is none
    timed_out: bool = False  # not graded in time, or two workers died of it; counts as wrong
    failed: bool = False  # math-verify or the user's function raised an exception over it; counts as wrong

    @property
    def right(self) -> bool:
        return self.reward > 0


class Grader:
    """Grades responses; no answer can hold it for longer than `timeout` seconds. A context manager.

    workers: processes, started when first needed. timeout: seconds for one answer, hard: its worker is killed and
    replaced. reward: "FILE.py:function" decides instead, called with a response and its Problem: a number from -1 to 1,
    above 0 is right; `source` then holds the file's text and sha256. Raises ValueError that says what is wrong with it.
    Use it from the main thread: workers die with the thread that started them.
    """

    def __init__(self, *, workers: int = 2, timeout: float = 5.0, reward: str = ""):
        if workers < 1 or timeout <= 0:
            raise ValueError(f"{workers=}, {timeout=}: both must be positive")
        self.num_workers, self.timeout = workers, timeout
        self.source = _Source.read(reward) if reward else None
        if self.source:
            self.source.define()  # raises here rather than in a worker
        self._workers: list[_Worker] = []
        self._cache: dict[tuple[str | None, str], bool | str] = {}
        self._warned = False

    def grade(self, responses: Sequence[str], problems: Sequence[Problem], *,
              cut: Sequence[bool] | None = None) -> list[Grade]:
        """One verdict a response; R texts and the R problems they answer, whose styles are keys of STYLES, else
        ValueError.

        `cut`: which responses ended at the length limit (none if not given); those are wrong, whatever they say. Equal
        (extracted, gold) pairs are decided once, now and later; equal (response, problem) pairs once a call.
        """
        if unknown := {p.style for p in problems} - STYLES.keys():
            raise ValueError(f"unknown answer style {sorted(unknown)}; there are {', '.join(STYLES)}")
        cut = [False] * len(responses) if cut is None else cut
        found = [None if over else extract(r, p.style) for r, p, over in zip(responses, problems, cut, strict=True)]
        if self.source:
            return self._ask_user(responses, problems, cut, found)
        pairs = [(answer, p.answer) for answer, p in zip(found, problems, strict=True)]
        verdicts = {p: self._cache[p] if p in self._cache else compare(*p) for p in dict.fromkeys(pairs)}
        hard = self._grade([p for p, verdict in verdicts.items() if verdict is None])
        verdicts |= hard
        # a time-out is not kept: it may have been the machine's fault
        self._cache |= {p: verdict for p, verdict in hard.items() if verdict is not None}
        while len(self._cache) > MAX_CACHE:
            del self._cache[next(iter(self._cache))]  # the oldest
        return [Grade(1.0 if verdicts[p] is True else -1.0, p[0], verdicts[p] is None, verdicts[p] == FAILED)
                for p in pairs]

    def _ask_user(self, responses: Sequence[str], problems: Sequence[Problem], cut: Sequence[bool],
                  found: list[str | None]) -> list[Grade]:
        jobs = [None if over else (r, p) for r, p, over in zip(responses, problems, cut, strict=True)]
        verdicts = self._grade(list(dict.fromkeys(job for job in jobs if job)))
        if not self._warned and (why := next((v for v in verdicts.values() if isinstance(v, str)), None)):
            log.warning("%s:%s failed; where it does, a response counts as wrong. This is said once:\n%s",
                        self.source.path, self.source.function, why)
            self._warned = True
        verdicts[None] = -1.0
        return [Grade(verdicts[job] if isinstance(verdicts[job], float) else -1.0, answer, verdicts[job] is None,
                      isinstance(verdicts[job], str)) for job, answer in zip(jobs, found, strict=True)]

    def _grade(self, jobs: list[tuple]) -> dict[tuple, bool | float | str | None]:
        """job -> what a worker said (see `_serve`), None where the deadline passed or two workers died of it."""
        queue, died, verdicts = deque(jobs), set(), {}
        try:
            while len(verdicts) < len(jobs):
                self._assign(queue)
                busy = [w for w in self._workers if w.jobs]
                patience = max(0.0, min(w.deadline for w in busy) - time.monotonic())
                readable = multiprocessing.connection.wait([w.pipe for w in busy], patience)
                for worker in busy:
                    if worker.pipe in readable:
                        try:
                            worker.receive(self.timeout, verdicts)
                        except (EOFError, ConnectionResetError):
                            self._bury(worker, queue, died, verdicts)
                    elif time.monotonic() >= worker.deadline:
                        verdicts[worker.jobs.popleft()] = None
                        self._drop(worker, queue)
        finally:
            for worker in [w for w in self._workers if w.jobs]:  # interrupted: a late reply must not meet a new job
                self._workers.remove(worker)
                worker.kill()
        return verdicts

    def _assign(self, queue: deque) -> None:
        for worker in [w for w in self._workers if not w.jobs and w.process.poll() is not None]:
            self._drop(worker, queue)
        idle = deque(w for w in self._workers if not w.jobs)
        while queue and (idle or len(self._workers) < self.num_workers):
            if not idle:
                idle.append(_Worker(self.source))
                self._workers.append(idle[0])
            worker = idle.popleft()
            # one that is starting does not read yet: much text would fill its pipe and hold us
            share = min(CHUNK, -(-len(queue) // self.num_workers)) if worker.ready else 1
            worker.give([queue.popleft() for _ in range(share)], self.timeout)

    def _bury(self, worker: _Worker, queue: deque, died: set, verdicts: dict) -> None:
        """It died (memory, a crash in C) over its first job: once may be bad luck, twice is the answer's doing."""
        suspect = worker.jobs.popleft()
        self._drop(worker, queue)
        if suspect in died:
            verdicts[suspect] = None
        else:
            died.add(suspect)
            queue.append(suspect)

    def _drop(self, worker: _Worker, queue: deque) -> None:
        """Ends a worker; what it had not begun goes back to the queue."""
        self._workers.remove(worker)
        worker.kill()
        queue.extendleft(reversed(worker.jobs))
        worker.jobs.clear()
        if not worker.ready:
            raise RuntimeError(f"a grading worker did not start (exit code {worker.process.returncode}): see its "
                               "output above; is math-verify installed?")

    def close(self) -> None:
        """Kills the workers. Grading again would start new ones."""
        while self._workers:
            self._workers.pop().kill()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


# ---- golds

# how a response that gives the gold answer ends, style by style
_GIVEN = {"math": r"\boxed{%s}", "dapo": "Answer: %s", "gsm8k": "#### %s", "choice": "Answer: %s"}
_LATEX = re.compile(  # what has letters and is no word; \text{...} is left
    r"\\(?:begin|end)\s*\{[^{}]*\}(?:\{[^{}]*\})?|\\(?:operatorname\*?|math[a-z]*)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"(?<![A-Za-z_^])[A-Za-z]{2,}(?![A-Za-z])")
_WORDS_OF_SENTENCES = set(
    "is are was were be been has have had will would can could does did do so thus hence therefore because since we he "
    "she it they there this that these".split())


def bad_golds(problems: Sequence[Problem], grader: Grader) -> list[Problem]:
    """The problems that hardly any response could get right, in their order; none for a reward of one's own.

    Their gold is not graded right when a response gives it as its style asks; or is longer than MAX_ANSWER, right only
    to the letter; or is text in which an answer stands: "So Ann has 14 apples", which 14 does not equal.
    """
    if grader.source:
        return []
    given = grader.grade([_GIVEN[p.style] % p.answer for p in problems], problems)
    texts = [dataclasses.replace(p, style="math") for p in problems if _is_text(p.answer)]
    read = grader.grade([p.answer for p in texts], texts)
    unlike = {p.answer for p, grade in zip(texts, read, strict=True) if not grade.right}
    return [p for p, grade in zip(problems, given, strict=True)
            if not grade.right or len(p.answer) > MAX_ANSWER or p.answer in unlike]


def _is_text(gold: str) -> bool:
    """Whether a gold is a sentence or says where the answer stands, rather than a number with its unit, a formula or a
    name. Where there is no number a few words may well be the answer; the limits are from golds of a dozen benchmarks.
    """
    words = _WORD.findall(_LATEX.sub(" ", gold))
    sentence = len(words) >= 3 and any(word.lower() in _WORDS_OF_SENTENCES for word in words)
    return len(words) >= 6 or sentence and _last_number(gold) is not None or any(find(gold) for find in _STATED)


def check_golds(problems: Sequence[Problem], grader: Grader, *, allowed: float, name: str) -> dict[str, int]:
    """{"bad_golds": how many there are}, with a warning if there are any.

    allowed: the share of the problems that may have one. name: of the data set, for messages. Raises ValueError for a
    larger share, with examples and what to do.
    """
    bad = bad_golds(problems, grader)
    if bad:
        examples = "\n".join(f"  {p.id} ({p.style}): {p.answer[:70]!r}{'...' * (len(p.answer) > 70)}" for p in bad[:3])
        message = (f"{name}: {len(bad)} of {len(problems)} gold answers could hardly be met by any response, so that "
                   f"all would count as wrong (in brackets the style):\n{examples}\n"
                   r"give a column `answer` with the bare answer (14, \frac{1}{2}) or another `style`")
        if len(bad) > allowed * len(problems):
            raise ValueError(f"{message}, or admit a share of them with --allow_bad_golds SHARE (now {allowed:g})")
        log.warning("%s", message)
    return {"bad_golds": len(bad)}


if __name__ == "__main__":
    _serve(multiprocessing.connection.Connection(int(sys.argv[1])))
