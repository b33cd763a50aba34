import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import reward
from reward import Grader, equivalent, extract, score

DATA = Path(__file__).parents[2] / "shared" / "data"

RIGHT = [  # answer, gold
    ("5", "5"), ("5.", "5"), ("5.0", "5"), ("+5", "5"), ("05", "5"), ("$5$", "5"), (r"\$5.00", "5"), ("-$5", "-5"),
    ("1,000", "1000"), ("1{,}000", "1000"), (r"1\,000", "1000"), ("12,345,678.50", "12345678.5"), (".5", "1/2"),
    ("−3", "-3"), ("6/8", "3/4"), (r"\frac{3}{4}", "0.75"), (r"\dfrac{1}{2}", "1/2"), (r"-\frac{1}{2}", "-0.5"),
    (r"\frac12", "0.5"), ("1e3", "1000"), (r"1.5\times10^{-7}", "1.5e-7"), ("10^{6}", "1000000"), ("10^3", "1000"),
    (r"\text{red}", "red"), (r"\left(1, 2\right)", "(1,2)"), (r"2\sqrt{2}", r"\sqrt{8}"), (r"\sqrt2", r"\sqrt{2}"),
    ("x=5", "5"), ("1,2", "2, 1"), (r"\{1,2\}", "1,2"), (r"\pm 5", "5, -5"), ("x^2+2x+1", "(x+1)^2"), ("p-q", "-q+p"),
    ("1/2+1/3", "5/6"), (r"\frac{\pi}{2}", r"\frac12\pi"), (r"90^\circ", "90"), (r"5\text{ cm}", "5"), ("5 cm", "5"),
    (r"50\%", "50"), ("[1,2)", r"\left[1, 2\right)"), (r"2\frac12", "5/2"), ("2^{10}", "1024"), ("6-5i", "6 - 5i"),
    (r"\text{(A)}", "A"), (r"\infty", r"\infty"), (r"x \in [-2,7]", "[-2,7]"), ("3!", "6"), (r"\(7\)", "7"),
]
WRONG = [
    ("5", "6"), ("", "5"), ("-5", "5"), ("0.33", "1/3"), ("0.333333", "1/3"), ("1.5e-7", "1.6e-7"), ("2 1/2", "21/2"),
    ("1, 234", "1234"), ("10^{-20}", "10^{-21}"), ("1/0", "5"), (r"\sqrt{2}", r"\sqrt{3}"), ("(1,2)", "(2,1)"),
    ("[1,2]", "[1,2)"), ("1,2", "1,2,3"), ("5, 6", "5"), ("5 or 6", "5"), ("red", "green"), ("x+1", "x+2"),
    (r"\frac{", "5"), ("}{", "5"), (r"\text{yes}", r"\text{no}"), ("3.1416", r"\pi"), ("5" * 600, "5"), ("nan", "0"),
    (r"\infty", "5"), ("__import__", "5"),
]


def test_the_table_has_sixty_pairs():
    assert len(RIGHT) + len(WRONG) >= 60


@pytest.mark.parametrize("answer, gold", RIGHT)
def test_right(answer, gold):
    assert equivalent(answer, gold)


@pytest.mark.parametrize("answer, gold", WRONG)
def test_wrong(answer, gold):
    assert not equivalent(answer, gold)


@pytest.mark.parametrize("response, answer", [
    (r"Answer: 1 #### 2 then 3, so \boxed{4}. Wait, 5.", "4"),
    (r"\boxed{1} and then \fbox{2}", "2"),
    (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{x = \boxed{5}}", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\\boxed{6}", "6"),
    (r"\boxed {7}", "7"),
    (r"} { \boxed{8}", "8"),
    (r"\boxed{9} but perhaps \boxed{10", "9"),
    (r"Put it within \boxed{}. Answer: 11", "11"),
    ("Answer: 1\n#### 2\nThe final answer is: **12**. I hope it is correct. 3", "12"),
    ("**Answer:** 13", "13"),
    ("ANSWER:\n 14 \n15", "14"),
    ("the answer is 3.5.", "3.5."),
    ("so 3 + 4 = 7\n#### 1,234\n", "1,234"),
    ("10 - 3 = 7", "7"),
    ("x=-5", "-5"),
    ("that is -$1,234.50.", "-$1,234.50"),
    ("3/4 of it", "3/4"),
    ("from 5-3", "3"),
    ("no idea", None),
    ("", None),
])
def test_extraction_order(response, answer):
    assert extract(response) == answer


def test_number_style_reads_the_last_number_only():
    assert extract(r"\boxed{3} 4 apples", "number") == "4"
    assert score("the answer is 3 or 4.", "4", "number") == 1.0 and score("", "4", "number") == -1.0
    with pytest.raises(KeyError):
        extract("4", "word")


@pytest.mark.parametrize("text", [
    "{" * 2**20, "}" * 2**20, "{}" * 2**19, r"\boxed{" * 2**17, r"\boxed{" * 2**17 + "}" * 2**17, "\\" * 2**20,
    r"\boxed" + " " * 2**20, "answer" + " " * 2**20, "answer:" * 2**17, "*" * 2**20, "####" * 2**18, "1" * 2**20,
    "1," * 2**19, "1,111" * 2**18, "-" * 2**20, "1/" * 2**19, "1." * 2**19, "answer is " + "1. " * 2**18, "\0" * 2**20,
], ids=range(19))
def test_extraction_is_linear_on_a_megabyte(text):
    start = time.monotonic()
    assert score(text, "7") == -1.0
    assert time.monotonic() - start < 5  # quadratic time would be hours


def test_hostile_answers_are_graded_and_hurt_nobody(tmp_path):
    deep = r"\frac{" * 60 + "1" + "}{1}" * 60
    answers = [deep, "\0", "\ud800", "(" * 200, r"\boxed{" * 60, "$" * 500, r"\operatorname{zeros}(99999,99999)"]
    with Grader(timeout=10) as grader:
        rewards, _ = grader.score_all([f"Answer: {a}" for a in answers], [r"\sqrt{2}"] * len(answers))
        assert rewards == [-1.0] * len(answers)
        assert grader.score_all([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == ([1.0], 0)


@pytest.mark.parametrize("payload", [
    "__import__('os').system('touch X')",
    r"\text{__import__('os').system('touch X')}",
    r"\sum_{n=0}^{\infty} \frac{1}{n!} \cdot \text{open}^n \cdot 1",
    r"\frac{1}{__import__('os').system('touch X')}",
])
def test_nothing_in_an_answer_is_run(payload, tmp_path, monkeypatch):
    import sympy.core.evalf

    monkeypatch.chdir(tmp_path)
    tried, made, real = [], [], sympy.core.evalf.lambdify

    def lambdify(*args):  # the way from a symbol's name to `exec`
        tried.append(args)
        made.append(real(*args))

    monkeypatch.setattr(sympy.core.evalf, "lambdify", lambdify)
    assert not equivalent(payload, r"2.5\pi")
    assert bool(tried) == ("sum" in payload)  # the danger is real
    assert not made and not list(tmp_path.iterdir())


def test_code_cannot_pass_the_two_doors_of_sympy():
    import sympy

    with reward._no_code():
        assert sympy.Number("8") == 8
        for door in (lambda: sympy.sympify("x + 1"), lambda: sympy.lambdify(sympy.Symbol("x"), 1)):
            with pytest.raises(NotImplementedError, match="answer is data"):
                door()
    assert sympy.lambdify([], sympy.sympify("1 + 1"))() == 2  # opened again


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, timeout=1.0) as grader:
        grader.score_all([r"\boxed{\sqrt{8}}", r"\boxed{\sqrt{7}}"], [r"2\sqrt{2}"] * 2)  # both started and warm
        yield grader


TOWER = r"\boxed{9^{9^{9^9}}}"


def test_time_out_is_counted_and_kept_to(grader):
    start = time.monotonic()
    rewards, timeouts = grader.score_all([TOWER, r"\boxed{\sqrt{18}}", TOWER, "3"], [r"\sqrt{2}", r"3\sqrt{2}"] * 2)
    assert (rewards, timeouts) == ([-1.0, 1.0, -1.0, -1.0], 2)  # two responses, asked about once
    assert time.monotonic() - start < 2 * grader.timeout


def test_a_killed_worker_loses_no_response(monkeypatch):
    with Grader(workers=2, timeout=5.0) as grader:
        responses = [rf"\boxed{{\sqrt{{{4 * i}}}}}" for i in range(2, 30)]
        golds = [rf"2\sqrt{{{i}}}" for i in range(2, 30)]
        grader.score_all(responses[:2], golds[:2])
        assign, killed = grader._assign, []

        def kill_once(queue):
            assign(queue)
            busy = [w for w in grader._workers if w.job and w.ready]
            if len(killed) < 1 and busy and len(queue) < 20:
                killed.append(os.kill(busy[0].process.pid, signal.SIGKILL))

        monkeypatch.setattr(grader, "_assign", kill_once)
        assert grader.score_all(responses, golds) == ([1.0] * len(golds), 0)
        assert killed


def test_an_answer_that_kills_two_workers_is_a_time_out(grader, monkeypatch):
    receive = reward._Worker.receive

    def die_of_it(self, *args):
        if "\\beta" in self.job[0] and self.ready:
            raise EOFError
        receive(self, *args)

    monkeypatch.setattr(reward._Worker, "receive", die_of_it)
    assert grader.score_all([r"\boxed{\beta}", r"\boxed{\sqrt{12}}"], [r"\alpha", r"2\sqrt{3}"]) == ([-1.0, 1.0], 1)


def test_equal_pairs_are_asked_once(grader, monkeypatch):
    asked = []
    give = reward._Worker.give
    monkeypatch.setattr(reward._Worker, "give", lambda self, job, t: (asked.append(job), give(self, job, t)))
    for _ in range(2):
        assert grader.score_all([r"\boxed{\sqrt{20}}"] * 3, [r"2\sqrt{5}"] * 3) == ([1.0] * 3, 0)
    assert len(asked) == 1


def test_the_cheap_path_starts_no_process():
    with Grader() as grader:
        assert grader.score_all(["3", "4", "none"], ["3", "5", "6"]) == ([1.0, -1.0, -1.0], 0)
        assert not grader._workers
        with pytest.raises(ValueError):
            grader.score_all(["3"], [])
    with pytest.raises(ValueError, match="style"):
        Grader(style="word")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_parent_killed_by_9(tmp_path):
    script = tmp_path / "train.py"  # as a user runs it: spawn imports the main script again
    script.write_text("""
import json, sys
from reward import Grader
if __name__ == "__main__":
    grader = Grader(workers=2, timeout=60)
    print(grader.score_all([r"\\boxed{\\sqrt{8}}", r"\\boxed{\\sqrt{7}}"], [r"2\\sqrt{2}"] * 2), file=sys.stderr)
    print(json.dumps([w.process.pid for w in grader._workers]), flush=True)
    grader.score_all([r"\\boxed{9^{9^{9^9}}}"], [r"\\sqrt{2}"])  # one worker computes, the other waits
""")
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE,
                              env=os.environ | {"PYTHONPATH": str(Path(reward.__file__).parent)})
    pids = json.loads(parent.stdout.readline())
    time.sleep(0.5)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5

    def alive(pid):
        status = Path(f"/proc/{pid}/status")
        try:
            return "State:\tZ" not in status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


def test_importing_reward_imports_nothing_heavy():
    code = "import sys, reward; assert not {'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(reward.__file__).parent, check=True)


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA.name}/ of word problems beside the checkout")
@pytest.mark.parametrize("wrapping", [r"so \boxed{%s}.", "Answer: %s", "The answer is $%s$.", "work\n#### %s", "so %s"])
def test_gold_answers_are_right_in_each_wrapping(wrapping):
    golds = [json.loads(line)["answer"] for f in sorted(DATA.glob("*.jsonl")) for line in f.open(encoding="utf-8")]
    with Grader() as grader:
        rewards, timeouts = grader.score_all([wrapping % gold for gold in golds], golds)
        assert set(rewards) == {1.0} and timeouts == 0 and not grader._workers
