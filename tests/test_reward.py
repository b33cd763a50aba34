"""Finding answers, comparing them, and the processes that do it.

answers.jsonl holds answers beside gold answers as a careful human grader judges them, without the question before him,
from their meaning and not from what any program says of them: the gold answer is exact, so a rounded value is wrong; a
form (reduced, factored) is not asked for; a unit that only one side gives is no mistake, one that differs is. Not in
it, as the grader gets it wrong: 2\\frac{1}{2}\\pi is taken for the product \\pi and not for 5\\pi/2.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import equivalent, score
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
from reward import STYLES, Grade, Grader, Problem, ask_math_verify, check_golds, compare, extract

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = [json.loads(line) for line in open(Path(__file__).with_name("answers.jsonl"), encoding="utf-8")]


# ---- extraction

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
    ("the answer is 3.5.", "3.5"),
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


@pytest.mark.parametrize("style, response, answer", [
    ("gsm8k", "3 apples and 4\n#### 1,234 apples\nso 7", "1,234 apples"),
    ("gsm8k", r"\boxed{18}, since 9 eggs at $2", "18"),
    ("gsm8k", r"$\boxed{\$3.50}$ for 2", r"\$3.50"),
    ("gsm8k", r"\boxed{many} or 4 apples", "4"),
    ("gsm8k", "12*3=36", "36"),
    ("math", "so \\boxed{42}. The answer is:\n$$\n42.5\n$$", "42.5"),
    ("math", "\\boxed{42}\n\n#### 2. Verification\nok", "42"),
    ("math", r"\boxed{42}. This answer is verified by $x=7$.", "42"),
    ("math", "\\boxed{42}\nThe answer is in the form $m+n$.", "42"),
    ("math", r"\boxed{\text{The answer is } 42}", r"\text{The answer is } 42"),
    ("math", "\\boxed{42}. No: the answer is x = 43.", "x = 43"),
    ("dapo", "Answer: 5\n" + "so on " * 20 + "\nAnswer: $\\frac{1}{2}$", r"$\frac{1}{2}$"),
    ("dapo", "**Answer:** \\boxed{34}", "34"),
    ("dapo", "Answer: 5\n" + "x" * 300, None),  # out of the tail
    ("dapo", "the answer is 5, " + r"\boxed{5}", "5"),  # as --prompt_suffix asks
    ("dapo", "the answer is 5", None),  # not in a form that was asked for
    ("dapo", "Answer:\n\\[\n\\boxed{34}\n\\]", "34"),
    ("choice", r"\boxed{B}", "B"),
    ("choice", r"\boxed{\text{(C) 12 eV}}", "C"),
    ("choice", "Answer: (d)", "D"),
    ("choice", "The correct answer is **option A**.", "A"),
    ("choice", "(A) is wrong, so it must be (B).", "B"),
    ("choice", "Let us see.\n\nC", "C"),
    ("choice", "A proton decays.", None),
    ("choice", r"\boxed{12}", None),
    ("choice", r"\boxed{A, B}", None),
    ("choice", r"(A) or \boxed{\text{B or C}}", None),
    ("choice", r"\boxed{\text{a neutron}}", None),
])
def test_styles_look_where_they_say(style, response, answer):
    assert extract(response, style) == answer


@pytest.mark.parametrize("text, answer", [
    ("so we get 2 2/3 cups", "2 2/3"), ("it took -1 1/2 hours", "-1 1/2"), ("so 2½ cups", "2½"),
    (r"so $2\frac{2}{3}$ cups", r"2\frac{2}{3}"), (r"so $2 \dfrac23$.", r"2 \dfrac23"),
    (r"is $-\frac{1}{2}$", r"-\frac{1}{2}"), (r"is $\frac{-11}{2}$", r"\frac{-11}{2}"),
    # no mixed numbers
    ("in 2020 1/2 of the people", "1/2"), ("2.5 1/2", "1/2"), ("2-1/2", "1/2"), ("1,250 1/2", "1/2"),
    ("x^2 1/2", "1/2"), ("of 2 3", "3"), ("on 5 1/2/2020", "2020"), ("2, 1/2", "1/2"),
    # other numbers of more than digits
    (r"so $1.2 \times 10^{5}$ of it", r"1.2 \times 10^{5}"), ("3*10^-4", "3*10^-4"), ("is 2^{10}", "2^{10}"),
    ("is x^{10}", "10"), (r"so $1\,234$", r"1\,234"), (r"so $1{,}234.5$", r"1{,}234.5"), ("so ١٢ of them", "١٢"),
    ("as 3:4", "4"), ("so $1.5 million", "1.5 million"), ("3 millionaires", "3"),
])
def test_the_last_number_in_prose_is_read_whole(text, answer):
    assert extract(text, "math") == extract(text, "gsm8k") == answer


@pytest.mark.parametrize("box, right, wrong", [
    (r"1{,}250", "1250", "250"), (r"\frac{11}{2}", "5.5", "2"), (r"\$18", "18", "81"),
    (r"18 \text{ dollars}", "18", "8"), ("18 apples", "18", "1"), 
    (r"18 \text{ eggs left}", "18", "19"), (r"18\%", "18", "81"),
    ("x=18", "18", "8"), ("9 + 9", "18", "9"), ("9 * 2 = 18", "18", "2"), ("18, 20", "20, 18", "20"),
    ("18x", "18x", "18"), ("half of 18", "half of 18", "18"), ("not 18", "not 18", "18"), ("3!", "6", "3"),
    ("- 18", "-18", "18"), (r"\sqrt{16}", "4", "16"), (r"1.2 \times 10^5", "120000", "5"),
    (r"2\frac{1}{2} \text{ cups}", "5/2", "2"), (r"\$1,250.50", "1250.5", "50"), ("**18**", "18", "8"),
    ("18 of 20", "18 of 20", "20"), ("twenty-half 18", "twenty-half 18", "18"),
])
def test_what_a_box_says_in_a_word_problem_counts_as_a_whole(box, right, wrong):
    for wrapping in (r"6 eggs, so $\boxed{%s}$ in 7 days", "6 eggs\n#### %s"):
        assert score(wrapping % box, right, "gsm8k") == 1.0 and score(wrapping % box, wrong, "gsm8k") == -1.0


@pytest.mark.parametrize("response, gold, style", [
    (r"<think>maybe \boxed{7}</think> The answer is 8.", "8", "math"), (r"<think>\boxed{7}</think>", "7", "math"),
    (r"<think>\boxed{7}</think> So it makes 8.", "8", "math"),
    (r"\boxed{3}. Wait. The answer is 5.", "5", "math"), (r"\boxed{3}. So the answer is correct.", "3", "math"),
    ("The answer is **12**.", "12", "math"), ("Answer: **12**.", "12", "dapo"), ("Answer: `13`", "13", "dapo"),
    ("The answer is indeed 12.", "12", "math"), ("The answer is 12, because 3*4=12.", "12", "math"),
    ('The answer is "12".', "12", "math"), ("Answer： 12", "12", "math"), ("Answer： 12", "12", "dapo"),
    ("The answer is:\n\n12\n", "12", "math"), ("### Final Answer\n\n**12**", "12", "math"),
    ("**Answer**\n12 apples", "12", "math"), ("#### Step 2\nso \\boxed{18}", "18", "gsm8k"),
    ("#### Step 2\nso 18", "18", "gsm8k"), ("#### **Part 1**\nso 18", "18", "math"), ("#### 18 apples", "18", "gsm8k"),
    ("Answer: A) red", "A", "choice"), ("The answer is A because x", "A", "choice"),
    (r"\boxed{C}. No: the answer is B, not C.", "B", "choice"),
])
def test_the_last_statement_counts_in_whatever_dress(response, gold, style):
    assert score(response, gold, style) == 1.0 and score(response, "7.5", style) == -1.0


@pytest.mark.parametrize("line, answer", [
    ("Mr. Smith. I hope so", "Mr. Smith"), ("Dr. Who", "Dr. Who"), ("St. Louis", "St. Louis"),
    ("the U.S. team", "the U.S. team"), ("J. K. Rowling. This is", "J. K. Rowling"), ("No. 5. So", "No. 5"),
    ("No. Because it is odd", "No"), ("5 ft. 3 in. The rest", "5 ft. 3 in"), ("42. I hope this helps.", "42"),
    ("3.14. So", "3.14"), ("x = 3. Check: 3", "x = 3"), ("5 cm. Then", "5 cm"), ("Mrs. Hilt. She", "Mrs. Hilt"),
])
def test_the_answer_line_ends_with_a_sentence_and_not_with_an_abbreviation(line, answer):
    assert extract(f"Answer: {line}") == extract(f"#### {line}") == extract(f"Answer: {line}", "dapo") == answer


def test_an_unknown_style_is_refused_by_name():
    with pytest.raises(KeyError, match="word"):
        extract("4", "word")


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=300) | st.text("\\{}boxed answer:(A)#$0123,./ \n*%", max_size=200))
def test_extraction_takes_any_text(style, text):
    found = extract(text, style)
    assert found is None or (found.strip() and len(found) <= len(text))


@pytest.mark.parametrize("text", [
    "{" * 2**18, "}" * 2**18, "{}" * 2**17, r"\boxed{" * 2**15, r"\boxed{" * 2**15 + "}" * 2**15, "\\" * 2**18,
    r"\boxed" + " " * 2**18, "answer" + " " * 2**18, "answer:" * 2**15, "*" * 2**18, "####" * 2**16, "1" * 2**18,
    "1," * 2**17, "Answer: " + "Mr. " * 2**16, "answer is " + "A. " * 2**16, "1 1/" * 2**16, "1\\,111" * 2**15,
    r"\boxed{" + "a" * 2**18 + "1}", r"\boxed{1" + r"\text{a}" * 2**15 + "}", "1:11" * 2**16, "1 " * 2**17,
    "1^" * 2**17, "1,111" * 2**16, "-" * 2**18, "1/" * 2**17, "1." * 2**17, "answer is " + "1. " * 2**16, "\0" * 2**18,
], ids=range(28))
def test_extraction_is_linear_on_a_long_text(text):
    start = time.monotonic()
    assert score(text, "7") == -1.0
    assert time.monotonic() - start < 5  # quadratic time would be hours


# ---- comparison

@pytest.mark.parametrize("kind", dict.fromkeys(row["kind"] for row in ROWS))
def test_answers_are_judged_as_a_human_would(kind):
    rows = [row for row in ROWS if row["kind"] == kind]
    assert [row for row in rows if equivalent(row["answer"], row["gold"]) is not row["right"]] == []


def test_without_the_library_the_verdict_is_right_or_open_and_most_are_decided():
    verdicts = [compare(row["answer"], row["gold"]) for row in ROWS]
    assert [row for row, verdict in zip(ROWS, verdicts, strict=True) if verdict not in (row["right"], None)] == []
    assert [row for row in ROWS if not row["right"] and compare(row["gold"], row["answer"])
            and row["answer"] != "5 (wrong)"] == []  # of a gold it would be a unit
    assert sum(verdict is not None for verdict in verdicts) >= 0.6 * len(ROWS)  # of a table made to be hard


@pytest.mark.parametrize("gold", ["5", r"\emptyset", "None", "0", "no solution"])
def test_no_answer_is_wrong(gold):
    assert compare(None, gold) is False and compare("", gold) is False


# ---- properties

def fraction_forms(value: Fraction) -> list[str]:
    """Ways to write a number, all exact."""
    n, d = value.numerator, value.denominator
    sign = "-" if n < 0 else ""
    forms = [f"{n}/{d}", rf"\frac{{{n}}}{{{d}}}", rf"{sign}\dfrac{{{abs(n)}}}{{{d}}}", rf"\tfrac{{{3 * n}}}{{{3 * d}}}",
             f"{2 * n}/{2 * d}", f"${n}/{d}$", rf"\frac{{{-n}}}{{{-d}}}"]
    if d == 1:
        forms += [str(n), f"{n}.0", f"{n}.", f"{n:,}", f"{n:,}".replace(",", "{,}"), f"x = {n}"]
    whole, rest = divmod(abs(n), d)
    if whole and rest:
        forms += [rf"{sign}{whole}\frac{{{rest}}}{{{d}}}", f"{sign}{whole} {rest}/{d}"]
    if 10**6 % d == 0:
        decimal = f"{abs(n) * 10**6 // d:07d}"
        forms += [f"{sign}{decimal[:-6]}.{decimal[-6:]}", f"{sign}{decimal[:-6]}.{decimal[-6:]}000"]
    return forms


integers = st.integers(-(10**9), 10**9)
rationals = st.builds(Fraction, st.integers(-3000, 3000), st.integers(1, 60) | st.sampled_from([100, 125, 1000]))
SQUAREFREE = [2, 3, 5, 6, 7, 10, 11, 13, 15, 17, 19, 21, 23, 30, 42, 101]
surds = st.tuples(st.integers(-50, 50).filter(bool), st.sampled_from(SQUAREFREE))
numbers = st.one_of(
    integers.map(str),
    integers.map(lambda n: f"{n:,}"),
    rationals.flatmap(lambda value: st.sampled_from(fraction_forms(value))),
    st.decimals(-1000, 1000, places=4).map(str),
    surds.map(lambda s: rf"{s[0]}\sqrt{{{s[1]}}}"),
    st.integers(2, 40).map(lambda n: rf"\frac{{{n}\pi}}{{7}}"),
    st.integers(1, 99).map(lambda n: f"{n}x^2-{n + 1}x"),
)
answers = st.one_of(
    numbers,
    st.lists(integers.map(str), min_size=2, max_size=4).map(lambda xs: f"({', '.join(xs)})"),
    st.lists(numbers.filter(lambda t: "," not in t and "=" not in t), min_size=2, max_size=3).map(
        lambda xs: f"({', '.join(xs)})"),
    st.lists(integers.map(str), min_size=1, max_size=4).map(lambda xs: rf"\{{{', '.join(xs)}\}}"),
    st.tuples(st.sampled_from("[("), st.integers(-99, 0), st.integers(1, 99), st.sampled_from(")]")).map(
        lambda p: f"{p[0]}{p[1]}, {p[2]}{p[3]}"),
    st.sampled_from(["A", "(B)", "even", r"\text{Monday}", r"\infty", r"\emptyset", "no solution", r"90^\circ"]),
)
DRESS = ["{}", " {} ", "${}$", r"\({}\)", r"\,{}\!", r"\displaystyle {}", "{}\n"]


@settings(max_examples=100, deadline=None)
@given(answers, st.sampled_from(DRESS))
def test_an_answer_is_itself_in_any_dress(answer, dress):
    assert equivalent(answer, answer)
    assert equivalent(dress.format(answer), answer) and equivalent(answer, dress.format(answer))


@settings(max_examples=300, deadline=None)
@given(rationals, rationals, st.booleans(), st.data())
def test_two_ways_to_write_numbers_are_compared_by_value(one, other, same, data):
    other = one if same else other
    a, g = data.draw(st.sampled_from(fraction_forms(one))), data.draw(st.sampled_from(fraction_forms(other)))
    assert compare(a, g) is compare(g, a) is (one == other)


@settings(max_examples=150, deadline=None)
@given(st.one_of(integers.map(str), st.decimals(-1000, 1000, places=4).map(str)), st.data())
def test_another_digit_is_wrong(number, data):
    at = data.draw(st.sampled_from([i for i, c in enumerate(number) if c.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != number[at]]))
    changed = number[:at] + digit + number[at + 1 :]
    assert compare(changed, number) is False and compare(number, changed) is False
    assert equivalent(f"(1, {changed})", f"(1, {number})") is False
    assert equivalent(rf"{changed}\text{{ cm}}", number) is False


@settings(max_examples=100, deadline=None)
@given(st.lists(integers, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_order_is_of_tuples_and_not_of_sets(values, random):
    shuffled = random.sample(values, len(values))
    inside, mixed = (", ".join(map(str, v)) for v in (values, shuffled))
    assert compare(rf"\{{{mixed}\}}", rf"\{{{inside}\}}") is compare(mixed, inside) is True
    assert compare(mixed, rf"\{{{inside}\}}") is compare(rf"\{{{mixed}\}}", inside) is True
    assert compare(f"({mixed})", f"({inside})") is (values == shuffled)
    assert compare(", ".join(map(str, values[:-1])), inside) is False


FRAGMENTS = [
    *r"\{}()[]^_,;. =%$/-+*!|'15xy0m&°√∞²−", "000", "cm", "per", " per ", " and ", " or ", "no", "word", "10^{", "e5",
    r"\frac", r"\frac{1}{2}", r"\sqrt", r"\pm", r"\cup", r"\{", r"\}", r"\text{", r"\in ", r"\left(", r"\right]",
    r"\overline{3}", r"\times", r"\,", r"^\circ", r"\boxed{", r"\log_2", r"\begin{pmatrix}", "\\\\",
]
noise = st.text(max_size=60) | st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


@settings(max_examples=500, deadline=None)
@given(noise, noise | answers)
def test_any_text_is_compared_quickly_and_without_an_error(answer, gold):
    start = time.monotonic()
    assert compare(answer, gold) in (True, False, None)
    assert compare(answer, answer) is (answer.strip() != "" and reward.normalise(answer) != "")
    assert time.monotonic() - start < 1


SLOW = [
    "{" * 512, "(" * 512, "()" * 256, "1," * 256, "1 " * 256, "a " * 256, "1" * 512, "1,111" * 100, "x=" * 256,
    "$" * 512, "^" + " " * 500, r"\text{" * 80, r"\frac{" * 80, r"\frac" + " " * 500, r"\pm" * 170, r"\cup " * 100,
    r"\{" * 256, "abc" + " -'" * 160, "5" + " / a" * 120 + "!", "5 a" + " per" * 120 + " !", "5 a" + " per" * 120,
    "5 (" + "a" * 500, "(a" * 256, "5 (a" * 120, "5 [" + "a/" * 240 + "]", "1\u2009" * 250, "1.a" * 170, "⁴" * 512,
    "x=" + "a" * 500, "10:30 " * 85, "½" * 40,
    "−" * 512, "∘" * 512, "5" + " " * 500 + "!", "word " * 102, "9^{999}", "1e999", "999999999^{44}", "\\" * 512,
    "5 cm" * 128, "5 mod" * 100, r"\log_" * 100, "5" * 600, "Ab-" * 170, ",".join("123456789" * 14),
]


@pytest.mark.parametrize("answer", SLOW, ids=range(len(SLOW)))
def test_an_answer_made_to_be_slow_is_not(answer):
    start = time.monotonic()
    for gold in ("5", r"\{1, 2\}", answer[:-1], answer[::-1]):
        assert compare(answer, gold) in (True, False, None)
    assert time.monotonic() - start < 5  # a pattern that backtracks takes for ever


@settings(max_examples=60, deadline=None)
@given(answers, answers)
def test_the_library_only_decides_what_was_left_open(answer, gold):
    quick = compare(answer, gold)
    assert quick is None or quick is compare(answer, gold, ask_math_verify)


def test_a_failure_of_the_library_is_no_match(monkeypatch):
    """Nothing bounds what it raises; memory is another matter, after which the process is not to be trusted."""
    import math_verify

    def broken(*args, **kwargs):
        raise errors.pop()

    monkeypatch.setattr(math_verify, "verify", broken)
    errors = [AttributeError("no xreplace"), RecursionError(), KeyError("Ne")]
    assert [equivalent(r"\sqrt{8}", r"2\sqrt{2}") for _ in range(3)] == [False] * 3 and not errors
    errors.append(MemoryError())
    with pytest.raises(MemoryError):
        equivalent(r"\sqrt{8}", r"2\sqrt{2}")


def test_hostile_answers_are_graded_and_hurt_nobody(tmp_path):
    deep = r"\frac{" * 60 + "1" + "}{1}" * 60
    answers = [deep, "\0", "\ud800", "(" * 200, r"\boxed{" * 60, "$" * 500, r"\operatorname{zeros}(99999,99999)"]
    with Grader(workers=1, timeout=10) as grader:
        rewards, _ = scores(grader, [f"Answer: {a}" for a in answers], [r"\sqrt{2}"] * len(answers))
        assert rewards == [-1.0] * len(answers)
        assert scores(grader, [r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == ([1.0], 0)


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
    assert not ask_math_verify(payload, r"2.5\pi") and not equivalent(payload, r"2.5\pi")
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


# ---- the grader

def problems_of(golds, style="math"):
    return [Problem(str(i), "?", gold, style) for i, gold in enumerate(golds)]


def scores(grader, responses, golds):
    """(rewards, time-outs)"""
    grades = grader.grade(responses, problems_of(golds))
    return [g.reward for g in grades], sum(g.timed_out for g in grades)


def test_a_grade_tells_what_was_found():
    with Grader() as grader:
        grades = grader.grade(["so 4", "none"], problems_of(["4", "4"], "gsm8k"))
        assert grades == [Grade(1.0, "4"), Grade(-1.0, None)] and [g.reward > 0 for g in grades] == [True, False]


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=2, timeout=1.0) as grader:
        scores(grader, [r"\boxed{\sqrt{8}}", r"\boxed{\sqrt{7}}"], [r"2\sqrt{2}"] * 2)  # both started and warm
        yield grader


def test_a_worker_starts_without_what_the_trainer_has_loaded(grader):
    """It runs this project's grader alone: no torch, no main script, whatever the parent imported."""
    maps = Path(f"/proc/{grader._workers[0].process.pid}/maps")
    if not maps.exists():
        pytest.skip("reads /proc")
    assert "torch" in sys.modules or "torch" not in maps.read_text()
    assert "libtorch" not in maps.read_text()


TOWER = r"\boxed{9^{9^{9^9}}}"


def test_time_out_is_counted_and_kept_to(grader):
    start = time.monotonic()
    rewards, timeouts = scores(grader, [TOWER, r"\boxed{\sqrt{18}}", TOWER, "3"], [r"\sqrt{2}", r"3\sqrt{2}"] * 2)
    assert (rewards, timeouts) == ([-1.0, 1.0, -1.0, -1.0], 2)  # two responses, asked about once
    assert time.monotonic() - start < 2 * grader.timeout


def test_a_killed_worker_loses_no_response(monkeypatch):
    with Grader(workers=2, timeout=5.0) as grader:
        responses = [rf"\boxed{{\sqrt{{{4 * i}}}}}" for i in range(2, 30)]
        golds = [rf"2\sqrt{{{i}}}" for i in range(2, 30)]
        scores(grader, responses[:2], golds[:2])
        ask, killed = reward._Worker.ask, []

        def kill_once(self, job, seconds):
            if not killed:
                killed.append(os.kill(self.process.pid, signal.SIGKILL))
            return ask(self, job, seconds)

        monkeypatch.setattr(reward._Worker, "ask", kill_once)
        assert scores(grader, responses, golds) == ([1.0] * len(golds), 0)
        assert killed


FAILS = r"\boxed{x<0}", r"x \ne 3"  # math-verify: KeyError, Unequality


def test_an_exception_in_math_verify_is_counted_quiet_and_wrong_and_its_worker_lives(capfd):
    with Grader(workers=1, timeout=60) as grader:
        assert scores(grader, [r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == ([1.0], 0)
        pipe = grader._workers[0].pipe
        others = (r"\boxed{\sqrt{12}}", r"2\sqrt{3}"), (r"\boxed{\sqrt{7}}", r"\sqrt{5}")
        answers, golds = zip(FAILS, others[0], FAILS, others[1], strict=True)
        assert scores(grader, answers, golds) == ([-1.0, 1.0, -1.0, -1.0], 0)
        for _ in range(2):  # asked about once, counted every time
            failed = [g.failed for g in grader.grade(answers, problems_of(golds))]
            assert failed == [True, False, True, False]
        assert [w.pipe for w in grader._workers] == [pipe] and not pipe.closed
    assert capfd.readouterr() == ("", "")


def test_a_response_that_was_cut_is_wrong_whatever_it_says(grader):
    grades = grader.grade([r"\boxed{5}"] * 2, problems_of(["5"] * 2), cut=[False, True])
    assert [(g.reward > 0, g.extracted, g.timed_out) for g in grades] == [(True, "5", False), (False, None, False)]


def test_the_cheap_path_starts_no_process():
    with Grader() as grader:
        assert scores(grader, ["3", "4", "none"], ["3", "5", "6"]) == ([1.0, -1.0, -1.0], 0)
        assert not grader._workers
        with pytest.raises(ValueError):
            grader.grade(["3"], [])


# ---- a reward of one's own

def write_reward(path, body: str, head: str = "") -> str:
    path.write_text(f"{head}\ndef score(response, problem):\n    {body}\n", encoding="utf-8")
    return f"{path}:score"


@pytest.mark.parametrize("spec, content, message", [
    ("none.py:score", None, r"--reward is FILE.py:FUNCTION, got .*cannot read .*none.py: .*No such file"),
    ("r.py", None, "--reward is FILE.py:FUNCTION"), ("r.py:", "", "there is no function"),
    ("r.py:score", "score = 3", r"there is no function score in .*r.py"),
    ("r.py:score", "x = 1\ndef score(:", r"^--reward: .*r.py does not compile: invalid syntax \(r.py, line 2\)$"),
    ("r.py:score", "import no_such_module", "no_such_module"),
    ("r.py:score", b"\xff", r"cannot read .*r.py: 'utf-8' codec"),
])
def test_a_reward_that_cannot_be_had_says_why(tmp_path, spec, content, message):
    if content is not None:
        (tmp_path / spec.rpartition(":")[0]).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, ImportError), match=message):
        Grader(reward=f"{tmp_path}/{spec}")


def test_a_reward_is_loaded_with_the_hash_of_its_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_bytes(b"\xef\xbb\xbfdef score(response, problem):\r\n    return len(response) / 10\r\n")
    source = Grader(reward=f"{path}:score").source
    assert source.define()(["abc"], [None]) == [0.3] and source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_reward_of_one_s_own_gets_response_and_problem_and_its_value_is_the_reward(tmp_path):
    body = "return (1 if extract(response, problem.style) == '4' else -0.5) * facts[problem.id, problem.prompt, " \
           "problem.answer, problem.style, problem.kind]"
    facts = {("a", "2+2?\ud800", "gold", "math", "sums"): 1.0, ("b", "é", "", "gsm8k", ""): 0.5}
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom reward import extract\n" \
           f"facts = {facts!a}\n@dataclass\nclass Its:\n    own: int"
    spec = write_reward(tmp_path / "r.py", body, head)
    problems = [Problem(*fields) for fields in facts]
    with Grader(workers=2, timeout=20, reward=spec) as grader:
        grades = grader.grade([r"\boxed{4}", "4", "\ud8005", "0"], [*problems, *problems])
    assert grades == [Grade(1.0, "4"), Grade(0.5, "4"), Grade(-0.5, "5"), Grade(-0.25, "0")]
    assert [g.reward > 0 for g in grades] == [True, True, False, False]


@pytest.mark.parametrize("value, reward", [("1", 1.0), ("True", 1.0), ("-1", -1.0), ("0", 0.0),
                                           ("__import__('numpy').float32(0.25)", 0.25)])
def test_any_number_from_minus_one_to_one_is_a_reward(tmp_path, value, reward):
    with Grader(workers=1, timeout=20, reward=write_reward(tmp_path / "r.py", f"return {value}")) as grader:
        assert grader.grade(["x"], problems_of(["y"])) == [Grade(reward, None)]


@pytest.mark.parametrize("body, said", [
    ("return 1 / 0", "ZeroDivisionError"), ("return 1.5", "a reward is a number from -1 to 1, not 1.5"),
    ("return float('nan')", "not nan"), ("return None", "TypeError"),
    ("return '1'", "TypeError"), ("score(response, problem)", "RecursionError"),
])
def test_what_goes_wrong_in_a_reward_counts_as_wrong_and_its_traceback_is_logged_once(tmp_path, caplog, body, said):
    spec = write_reward(tmp_path / "r.py", f"if response != 'good': {body}\n    return 0.5")
    with Grader(workers=1, timeout=20, reward=spec) as grader:
        for _ in range(2):
            grades = grader.grade(["bad", "good", "worse"], problems_of("123"))
            assert grades == [Grade(-1.0, None, failed=True), Grade(0.5, None), Grade(-1.0, None, failed=True)]
    [record] = caplog.records
    assert re.search(rf"r.py failed(?s:.*)Traceback(?s:.*){said}", record.getMessage())


def test_a_reward_is_held_to_the_deadline_and_the_others_get_theirs(tmp_path, caplog):
    spec = write_reward(tmp_path / "r.py", "time.sleep(60 * (response == 'slow'))\n    return 1", "import time")
    with Grader(workers=2, timeout=1.0, reward=spec) as grader:
        assert grader.grade(["1", "2"], problems_of("12")) == [Grade(1.0, "1"), Grade(1.0, "2")]  # started
        start = time.monotonic()
        grades = grader.grade(["slow", *"12345"], problems_of("012345"))
        assert time.monotonic() - start < 10
    assert grades == [Grade(-1.0, None, timed_out=True), *(Grade(1.0, c) for c in "12345")] and not caplog.records


def test_a_killed_worker_costs_its_job_and_not_the_start_of_another(tmp_path):
    spec = write_reward(tmp_path / "r.py", "time.sleep(60)", "import time")
    with Grader(workers=1, timeout=0.1, reward=spec) as grader:
        start = time.monotonic()
        assert all(g.timed_out for g in grader.grade([str(i) for i in range(20)], problems_of("1" * 20)))
        assert time.monotonic() - start < 8  # 2 of them deadlines; each worker's imports would take most of a second
        threads = Path(f"/proc/{grader._workers[0].process.pid}/task")
        assert not threads.exists() or len(list(threads.iterdir())) == 1  # no other would live on in a fork


def test_a_worker_that_takes_the_place_of_another_runs_the_file_as_it_was(tmp_path):
    spec = write_reward(tmp_path / "r.py", "return 0.5")
    with Grader(workers=1, timeout=20, reward=spec) as grader:
        assert grader.grade(["a"], problems_of("1"))[0].reward == 0.5
        write_reward(tmp_path / "r.py", "return 1")
        os.kill(grader._workers[0].process.pid, signal.SIGKILL)
        grader._workers[0].process.wait()
        assert grader.grade(["a"], problems_of("1"))[0].reward == 0.5


def test_a_reward_is_asked_once_for_equal_responses_of_a_call_and_anew_in_the_next(tmp_path):
    body = f"with open({str(tmp_path / 'asked')!r}, 'a') as file: file.write(response + problem.id + ' ')\n" \
           "    return 1 - response.cut / 2"
    one, two = problems_of(["5", "5"])
    with Grader(workers=1, timeout=20, reward=write_reward(tmp_path / "r.py", body)) as grader:
        for _ in range(2):
            grades = grader.grade(list("aabaaa"), [one, one, one, two, two, two], cut=[False] * 4 + [True] * 2)
            assert grades == [Grade(1.0, None)] * 4 + [Grade(0.5, None)] * 2
    assert (tmp_path / "asked").read_text() == "a0 b0 a1 a1 " * 2


def write_batch(path, body: str) -> str:
    path.write_text(f"import time\ndef score_batch(responses, problems):\n    {body}\n", encoding="utf-8")
    return f"{path}:score_batch"


def test_a_reward_in_batch_is_called_once_with_all_that_differ_and_never_for_nothing(tmp_path):
    body = f"with open({str(tmp_path / 'asked')!r}, 'a') as file: file.write(str(len(responses)))\n" \
           "    return [len(r) * p.columns['unit'] - r.cut for r, p in zip(responses, problems, strict=True)]"
    one, two = (Problem(str(unit), "?", "4", columns={"unit": unit}) for unit in (0.1, 0.2))
    with Grader(workers=2, timeout=20, reward=write_batch(tmp_path / "r.py", body)) as grader:
        assert grader.grade([], []) == []
        grades = grader.grade(["aa", "aa", "4", "aa", "aa"], [one, one, one, two, two], cut=np.arange(5) == 4)
    assert grades == [Grade(0.2, None), Grade(0.2, None), Grade(0.1, "4"), Grade(0.4, None), Grade(-0.6, None)]
    assert (tmp_path / "asked").read_text() == "4"


@pytest.mark.parametrize("body, said", [
    ("return [1] * (len(responses) - 1)", "2 rewards for 3 responses"),
    ("return [0, 1, -1.5]", "a reward is a number from -1 to 1, not -1.5"), ("return None", "TypeError"),
    ("time.sleep(60)", None)])
def test_what_goes_wrong_in_a_batch_counts_for_all_of_it(tmp_path, body, said):
    with Grader(workers=2, timeout=20 if said else 0.3, reward=write_batch(tmp_path / "r.py", body)) as grader:
        start = time.monotonic()
        grades = grader.grade(list("abc"), problems_of("123"))
        assert grades == [Grade(-1.0, None, timed_out=not said, failed=bool(said))] * 3
        assert said in grader.failure if said else 0.6 <= time.monotonic() - start < 20  # two deadlines of a worker


def test_responses_longer_than_a_pipe_holds_are_graded(tmp_path):
    with Grader(workers=2, timeout=30, reward=write_reward(tmp_path / "r.py", "return len(response) / 1e6")) as grader:
        lengths = [100_000 + i for i in range(70)]
        grades = grader.grade(["x" * n for n in lengths], problems_of(["1"] * 70))
    assert [g.reward for g in grades] == [n / 1e6 for n in lengths]


def test_a_reward_that_kills_its_worker_twice_is_given_up(tmp_path):
    spec = write_reward(tmp_path / "r.py", "return os._exit(3) if response == 'die' else 1", "import os")
    with Grader(workers=1, timeout=20, reward=spec) as grader:
        grades = grader.grade(["die", "live"], problems_of("12"))
    assert grades == [Grade(-1.0, None, timed_out=True), Grade(1.0, None)]


@pytest.mark.skipif(sys.platform != "linux", reason="bounds memory by RLIMIT_AS")
def test_a_worker_s_memory_is_bounded(tmp_path):
    spec = write_reward(tmp_path / "r.py", "return len(bytearray(8 << 30 if response == 'much' else 1)) > 0")
    with Grader(workers=1, timeout=20, reward=spec) as grader:
        assert [g.timed_out for g in grader.grade(["much", "little"], problems_of("12"))] == [True, False]


# ---- golds

SENTENCE = "We add the two numbers: 5 + 9 = 14. So Ann has 14 apples in total."


@pytest.mark.parametrize("style, good, bad", [
    ("math", ["14", r"\left(3, \frac{\pi}{2}\right)", "72 (pieces of toy train track)", "x = 3 or x = 5",
              "does not exist", "Mr. Fox and Dr. Lee", r"\text{60 miles per hour}",
              r"C = \frac{def}{de + df + ef}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"],
     [SENTENCE, "The answer is 14", "Answer: 14", r"\boxed{3} or \boxed{5}", r"5} and \text{6", "1, " * 200 + "1"]),
    ("dapo", ["34", "Mrs. Hilt", r"\sqrt{2}"], [SENTENCE, "9" * 600]),
    ("gsm8k", ["18", "1,250", "18 apples", "$3.50", "2 1/2"], [SENTENCE, "yes", ""]),
    ("choice", ["A", "c", "(B)"], ["12", "A proton", "none of these", "K"]),
])
def test_a_gold_is_bad_if_no_response_or_only_a_literal_copy_is_right(grader, style, good, bad):
    for golds, expected in ((good, 0), (bad, 1)):
        found = [check_golds(problems_of([gold], style), grader, allowed=1, name="x")["bad_golds"] for gold in golds]
        assert found == [expected] * len(golds)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_die_with_a_parent_killed_by_9(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("""
import json, sys
from pathlib import Path
from reward import Grader, Problem
if __name__ == "__main__":
    grader = Grader(workers=2, timeout=60)
    grades = grader.grade([r"\\boxed{\\sqrt{8}}", r"\\boxed{\\sqrt{7}}"], [Problem("", "", r"2\\sqrt{2}")] * 2)
    print(grades, file=sys.stderr)
    forks = [Path(f"/proc/{w.process.pid}/task/{w.process.pid}/children").read_text() for w in grader._workers]
    print(json.dumps([*(w.process.pid for w in grader._workers), *map(int, forks)]), flush=True)
    grader.grade([r"\\boxed{9^{9^{9^9}}}"], [Problem("", "", r"\\sqrt{2}")])  # one worker computes, the other waits
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
    assert len(pids) == 4 and not any(map(alive, pids))


def test_importing_reward_imports_nothing_heavy():
    code = "import sys, reward; assert not {'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(reward.__file__).parent, check=True)


@pytest.mark.skipif(not DATA.exists(), reason=f"no {DATA.name}/ of word problems beside the checkout")
@pytest.mark.parametrize("wrapping", [r"so \boxed{%s}.", "Answer: %s", "The answer is $%s$.", "work\n#### %s", "so %s"])
def test_gold_answers_are_right_in_each_wrapping(wrapping):
    golds = [json.loads(line)["answer"] for f in sorted(DATA.glob("*.jsonl")) for line in f.open(encoding="utf-8")]
    with Grader() as grader:
        rewards, timeouts = scores(grader, [wrapping % gold for gold in golds], golds)
        assert set(rewards) == {1.0} and timeouts == 0 and not grader._workers