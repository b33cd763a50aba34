"""pass@k is unbiased, and evaluations survive the log."""

from itertools import combinations

import numpy as np
import pytest

from data import Problem
from eval import Evaluation, pass_at_k, table


@pytest.mark.parametrize("drawn", [1, 2, 5, 8])
def test_pass_at_k_equals_the_enumeration_of_all_subsets(drawn):
    for k in range(1, drawn + 1):
        for correct in range(drawn + 1):
            right = [True] * correct + [False] * (drawn - correct)
            subsets = list(combinations(right, k))
            assert pass_at_k(np.array([correct]), drawn, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_needs_k_responses():
    with pytest.raises(ValueError, match="pass@4 needs at least 4 responses"):
        pass_at_k(np.array([1]), 3, 4)


def evaluation(step: int) -> Evaluation:
    problems = [Problem("sum:1", "", ""), Problem("sum:2", "", ""), Problem("product:1", "", "")]
    right = np.zeros((3, 16), bool)
    right[0, :4], right[2] = True, True
    return Evaluation.of(step, problems, right, 10.0, 0.5)


def test_figures_are_means_over_problems_and_by_kind():
    e = evaluation(0)
    assert e.mean == pytest.approx((0.25 + 0 + 1) / 3) and sorted(e.passes) == [1, 2, 4, 8, 16]
    assert e.passes[1] == pytest.approx(e.mean) and e.passes[16] == pytest.approx(2 / 3)
    assert e.by_kind["sum"] == [2, 0.125, pytest.approx(pass_at_k(np.array([4]), 16, 8)[0] / 2)]
    assert e.by_kind["product"] == [1, 1.0, 1.0] and e.k == 8


def test_evaluations_survive_json_and_print_as_markdown():
    import json

    e = evaluation(3)
    assert Evaluation.from_json(json.loads(json.dumps(e.to_json()))) == e
    lines = table([evaluation(0), e]).strip().splitlines()
    assert lines[0] == "| 3 held-out problems x 16 | step 0 | step 3 |"
    assert {line.count("|") for line in lines} == {4} and lines[2].startswith("| mean@16 | 0.417")
