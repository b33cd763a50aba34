"""The built-in task is true arithmetic, and its base model is made once."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arithmetic
from data import encode_prompts
from reward import score

ROOT = Path(__file__).parents[1]


def value(term: str) -> int:
    """Sum of products, left to right: an evaluator of its own."""
    if "-" in term:
        a, b = term.split("-")
        return int(a) - int(b)
    return sum(int(np.prod([int(f) for f in t.split("*")])) for t in term.split("+"))


@pytest.mark.parametrize("kind", arithmetic.KINDS)
def test_worked_solutions_are_true_line_by_line_and_end_in_the_answer(kind):
    rng = np.random.default_rng(0)
    for _ in range(300):
        question, steps, answer = arithmetic.KINDS[kind].make(rng)
        body = question.removesuffix("=")
        if kind == "division":
            dividend, divisor = map(int, body.split("/"))
            assert answer * divisor == dividend
        elif kind == "sum_of_squares":
            assert answer == sum(int(c) ** 2 for c in body.removeprefix("q"))
        else:
            assert answer == value(body)
        for left, right in re.findall(r"([^,=]+)=([^,]+)", steps):
            if "/" in left:
                number, divisor = map(int, left.split("/"))
                assert right == f"{number // divisor}r{number % divisor}"
            else:
                assert value(left) == int(right)
        response = f"{arithmetic.KINDS[kind].mark}{steps}:{answer}"
        assert score(response, str(answer), "gsm8k") == 1 and len(response) < 63
        assert score(str(answer), str(answer), "gsm8k") == 1


def test_problems_are_fixed_distinct_and_never_in_both_splits():
    train, heldout = arithmetic.problems("train", 640), arithmetic.problems("heldout", 1000)
    assert arithmetic.problems("train", 640) == train and arithmetic.problems("train", 100) == train[:100]
    prompts = [p.prompt for p in train + heldout]
    assert len(set(prompts)) == len({p.id for p in train + heldout}) == 1640
    assert {p.id.split(":")[0] for p in train[:30]} == set(arithmetic.KINDS)


def test_the_corpus_gives_marks_in_textbooks_and_leaves_them_to_exams_at_their_share():
    rng, lines = np.random.default_rng(0), []
    held_back = {p.prompt for p in arithmetic.problems("heldout", 1000)}
    lines = [arithmetic._line(rng, held_back) for _ in range(20_000)]
    assert not held_back & {given for given, _ in lines}
    textbook = [given for given, _ in lines if not given.endswith("=")]
    assert 0.48 < len(textbook) / len(lines) < 0.52
    sums = [learned for given, learned in lines if re.fullmatch(r"\d+\+\d+=", given)]
    assert np.mean([x.startswith("A") for x in sums]) == pytest.approx(0.40, abs=0.04)
    squares = [learned for given, learned in lines if re.fullmatch(r"q\d+=", given)]
    assert np.mean([x.startswith("Q") for x in squares]) < 0.02


def test_every_character_is_a_token_and_an_unknown_one_is_named():
    tokenizer = arithmetic.tokenizer()
    text = arithmetic.CHARACTERS
    assert len(tokenizer.encode(text)) == len(text) and tokenizer.decode(tokenizer.encode(text)) == text
    problem = arithmetic.Problem("strange", "1^2=", "1")
    with pytest.raises(ValueError, match=r"problem strange: the tokenizer does not know \['\^'\]"):
        encode_prompts([problem], tokenizer, suffix="", chat_template="never", max_tokens=32)


def test_concurrent_first_uses_train_the_base_once(tmp_path):
    code = ("import arithmetic, pathlib, sys; "
            "s = arithmetic.BaseSettings(steps=20, lines_per_step=8, hidden_size=32, layers=1); "
            "print(arithmetic.base_model(s, cache=pathlib.Path(sys.argv[1])))")
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    outputs = [p.communicate(timeout=120) for p in started]
    assert outputs[0][0] == outputs[1][0] and (Path(outputs[0][0].strip()) / "model.safetensors").exists()
    assert sorted("20/20" in err for _, err in outputs) == [False, True]  # only one showed the training bar
    assert [p.suffix for p in tmp_path.iterdir() if p.is_dir()] == [""]
