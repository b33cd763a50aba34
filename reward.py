"""Is this response right? +1 or -1, for text that a model wrote and that nobody has read.

Three stages. `extract` finds the answer in the response, in time linear in its length; where it looks is a named style.
`equivalence.compare` decides almost every case in this process, exactly. What is left (surds, polynomials) is asked of
math-verify, whose running time nothing bounds (`9^{9^{9^9}}`): `Grader` asks it in worker processes that can be killed.

A worker is this very file run as a program, so it starts in about a second whatever the trainer has imported, shares
no memory with CUDA or vLLM, and gets its work through a pipe as JSON: bytes that are text, parsed and never unpickled.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import re
import signal
import string
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from equivalence import MAX_ANSWER, NUMBER_DIGITS, PLAIN, SPACES, VULGAR, ask_math_verify, compare, equivalent, failures

MAX_CACHE = 100_000  # graded pairs kept
CHUNK = 32  # pairs that a worker gets at a time
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
    return line and (_boxed(line) or line)


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
    for found in (_boxed(text), _answer_line(text)):
        content = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{", "", found or "")
        if letter := _LETTER.match(content):
            return letter[1].upper()
    last = deque(_LETTER_IN_BRACKETS.finditer(text), maxlen=1)
    return (last[0][1] or last[0][2]) if last else None


# style -> where to look, in this order; the first that finds something is the answer
STYLES = {
    "math": (_boxed, _answer_line, _hashes, _last_number),  # \boxed{x}, "Answer: x" / "answer is x", "#### x", number
    "dapo": (_answer_in_the_tail,),  # "Answer: x" in the last 300 characters, nothing else
    # word problems and arithmetic: what follows ####, what is in the box, each if there is a number, or the last number
    "gsm8k": (lambda text: _value(_hashes(text)), lambda text: _value(_boxed(text)), _last_number),
    "choice": (_choice,),
}


def extract(response: str, style: str = "math") -> str | None:
    """The answer that `response` gives, or None if it gives none. An unknown `style` (see STYLES) is a KeyError."""
    found = (find(response) for find in STYLES[style])
    return next((answer for answer in found if answer is not None), None)


def score(response: str, answer: str, style: str = "math") -> float:
    """+1.0 if `response` gives `answer`, else -1.0; in this process, without time-out (see `Grader`)."""
    return 1.0 if equivalent(extract(response, style), answer) else -1.0


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
    with open("/proc/self/statm") as file:  # on top of what is mapped already
        limit = int(file.read().split()[0]) * resource.getpagesize() + WORKER_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    """Worker: [[answer, gold], ...] in; true, false or FAILED out for each as soon as it is known."""
    _confine()
    ask_math_verify("x", "y")  # pays for the imports before the first deadline runs
    pipe.send_bytes(b"null")  # ready
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the trainer is gone
        while True:
            for answer, gold in json.loads(pipe.recv_bytes()):
                before = failures.total()
                verdict = compare(answer, gold, ask_math_verify) or (failures.total() > before and FAILED)
                pipe.send_bytes(json.dumps(verdict).encode())


class _Worker:
    def __init__(self):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], stdin=subprocess.DEVNULL,
                                        pass_fds=[theirs.fileno()])  # a new program: never a fork of one with a GPU
        theirs.close()  # ours must be the only other end, or neither side would ever see end-of-file
        self.ready, self.jobs, self.deadline = False, deque(), float("inf")

    def give(self, jobs: list[tuple[str, str]], timeout: float) -> None:
        self.jobs, self.deadline = deque(jobs), time.monotonic() + (timeout if self.ready else START_SECONDS)
        with contextlib.suppress(BrokenPipeError):  # it died while idle: its pipe reads end-of-file, seen in `_grade`
            self.pipe.send_bytes(json.dumps(jobs).encode())

    def receive(self, timeout: float, verdicts: dict) -> None:
        """Takes one reply; the clock of the next job starts now."""
        reply = json.loads(self.pipe.recv_bytes())
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

    right: bool
    extracted: str | None  # the answer found, None if there is none
    timed_out: bool  # not graded in time, or two workers died of it; counts as wrong
    failed: bool = False  # math-verify raised an exception over it; counts as wrong

    @property
    def reward(self) -> float:
        return 1.0 if self.right else -1.0


class Grader:
    """Grades responses; no answer can hold it for longer than `timeout` seconds. A context manager.

    workers: processes, started when first needed. timeout: seconds for one answer, hard: its worker is killed and
    replaced. Use it from the main thread: workers die with the thread that started them.
    """

    def __init__(self, *, workers: int = 2, timeout: float = 5.0):
        if workers < 1 or timeout <= 0:
            raise ValueError(f"{workers=}, {timeout=}: both must be positive")
        self.num_workers, self.timeout = workers, timeout
        self._workers: list[_Worker] = []
        self._cache: dict[tuple[str | None, str], bool | str] = {}

    def grade(self, responses: list[str], answers: list[str], styles: list[str],
              cut: Sequence[bool] | None = None) -> list[Grade]:
        """One verdict a response; R texts, R gold answers and R keys of STYLES, else ValueError.

        `cut`: which responses ended at the length limit (none if not given); those are wrong, whatever they say. Equal
        (extracted, gold) pairs are decided once, now and later.
        """
        if unknown := set(styles) - STYLES.keys():
            raise ValueError(f"unknown answer style {sorted(unknown)}; there are {', '.join(STYLES)}")
        cut = [False] * len(responses) if cut is None else cut
        pairs = [(None if over else extract(r, style), gold)
                 for r, gold, style, over in zip(responses, answers, styles, cut, strict=True)]
        verdicts = {p: self._cache[p] if p in self._cache else compare(*p) for p in dict.fromkeys(pairs)}
        hard = self._grade([p for p, verdict in verdicts.items() if verdict is None])
        verdicts |= hard
        # a time-out is not kept: it may have been the machine's fault
        self._cache |= {p: verdict for p, verdict in hard.items() if verdict is not None}
        while len(self._cache) > MAX_CACHE:
            del self._cache[next(iter(self._cache))]  # the oldest
        return [Grade(verdicts[p] is True, p[0], verdicts[p] is None, verdicts[p] == FAILED) for p in pairs]

    def _grade(self, jobs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | str | None]:
        """job -> verdict; FAILED where math-verify raised, None where the deadline passed or two workers died of it."""
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
                idle.append(_Worker())
                self._workers.append(idle[0])
            share = min(CHUNK, -(-len(queue) // self.num_workers))
            idle.popleft().give([queue.popleft() for _ in range(share)], self.timeout)

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


if __name__ == "__main__":
    _serve(multiprocessing.connection.Connection(int(sys.argv[1])))
