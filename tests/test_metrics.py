"""pass@k is unbiased, intervals cover the truth, and an evaluation survives its file."""

import dataclasses
import json
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest

from metrics import Evaluation, bootstrap, figures, intervals, pass_at_k, table


@pytest.mark.parametrize("drawn", [1, 2, 5, 8])
def test_pass_at_k_equals_the_enumeration_of_all_subsets(drawn):
    for k in range(1, drawn + 1):
        for correct in range(drawn + 1):
            right = [True] * correct + [False] * (drawn - correct)
            subsets = list(combinations(right, k))
            assert pass_at_k(np.array([correct]), drawn, k)[0] == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("problems, responses", [(100, 8), (150, 1)])
def test_intervals_cover_the_truth_19_times_in_20(problems, responses):
    """Problems of pass rates from Beta(0.5, 1.5): mean 1/4, and pass@8 = 1 - E(1 - p)^8."""
    rng = np.random.default_rng(0)
    none_right = np.prod([(1.5 + i) / (2 + i) for i in range(responses)])
    truth = {f"mean@{responses}": 0.25, f"pass@{responses}": 1 - none_right}
    covered, trials = dict.fromkeys(truth, 0), 300
    for _ in range(trials):
        right = rng.random((problems, responses)) < rng.beta(0.5, 1.5, problems)[:, None]
        for name, (_, low, high) in figures(right).items():
            covered[name] = covered.get(name, 0) + (low <= truth.get(name, -1) <= high)
    for name in truth:
        assert 0.92 <= covered[name] / trials <= 0.985  # 3 standard errors, and the bootstrap's own bias


@pytest.mark.parametrize("problems", [2, 30, 500])
def test_problems_that_are_all_alike_leave_doubt(problems):
    for right in (0, 1):
        exact = binomtest(right * problems, problems).proportion_ci(method="exact")
        assert figures(np.full((problems, 2), right > 0))["pass@2"] == pytest.approx([right, exact.low, exact.high])
    u = 1 - exact.low
    (half,), (same,) = intervals(np.full((problems, 1), 0.5)), intervals(np.zeros((problems, 1)), -1.0)
    assert half == pytest.approx([0.5 - u / 2, 0.5 + u / 2])
    assert same == pytest.approx([-u, u])  # of differences
    values = np.arange(2 * problems).reshape(problems, 2) / (2 * problems)
    assert intervals(values) == np.stack(bootstrap(values), axis=1).tolist()  # others are the bootstrap's, to the bit


def evaluation(step: int) -> Evaluation:
    right = np.zeros((3, 16), bool)
    right[0, :4], right[2] = True, True
    return Evaluation.of(step, ["sum", "sum", "product"], right, 10.0, 0.5)


def test_figures_are_means_over_problems_and_by_kind():
    e = evaluation(0)
    assert e.mean == pytest.approx((0.25 + 0 + 1) / 3) and list(e.passes) == [f"pass@{k}" for k in (1, 2, 4, 8, 16)]
    assert e.passes["pass@1"] == pytest.approx(e.mean) and e.passes["pass@16"] == pytest.approx(2 / 3)
    assert e.by_kind["sum"] == [2, 0.125, pytest.approx(pass_at_k(np.array([4]), 16, 8)[0] / 2)]
    assert e.by_kind["product"] == [1, 1.0, 1.0] and e.shown == "pass@8"


def test_the_interval_of_one_problem_is_unknown():
    assert figures(np.array([[True, False]])) == {name: [mean, None, None] for name, mean in
                                                  (("mean@2", 0.5), ("pass@1", 0.5), ("pass@2", 1.0))}


def test_responses_without_a_verdict_are_told_loudly_where_they_are_most():
    lost = dataclasses.replace(evaluation(0), timeouts=20, failures=5)
    assert lost.line().endswith("held-out problems, 50.0% cut. WARNING: of 48 responses 20 timed out in "
                                "grading, 5 failed, and count as wrong")
    assert "WARNING" not in dataclasses.replace(lost, timeouts=3).line()
    assert table([lost, evaluation(3)]).splitlines()[-2:] == ["| grader timeouts | 41.7 | 0.0 |",
                                                              "| grader failures | 10.4 | 0.0 |"]
    older = {k: v for k, v in dataclasses.asdict(evaluation(3)).items() if k not in ("timeouts", "failures")}
    assert Evaluation(**older) == evaluation(3) and "responses" not in evaluation(3).line()


def test_evaluations_survive_json_and_print_as_markdown():
    e = evaluation(3)
    assert e.intervals["mean@16"][0] < e.mean < e.intervals["mean@16"][1]
    assert Evaluation(**json.loads(json.dumps(dataclasses.asdict(e)))) == e
    assert dataclasses.replace(e, truncated_frac=0.0).line().endswith("on 3 held-out problems")
    lines = table([evaluation(0), e]).strip().splitlines()
    assert lines[0] == "| 3 held-out problems x 16, percent | step 0 | step 3 |"
    assert {line.count("|") for line in lines} == {4} and lines[2].startswith("| mean@16 | 41.7")
