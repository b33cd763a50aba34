"""The cost of a level on planted curves."""

import numpy as np
import pytest
from test_logs import from_base

from study import cost
from study.logs import Run


def planted(curve: list[float], base: int = 0, seed: int = 0, every: int = 25) -> Run:
    """A run of 256 rollouts a step that is evaluated `every` steps at these percentages of pass@8."""
    run = from_base("grpo", base, seed=seed)
    log = [{"rollouts": 256, "tokens_generated": 1000 + step, "tokens_trained": 3000, "zero_std_rollouts_frac": 0.5}
           for step in range(every * (len(curve) - 1))]
    evaluations = [{"step": every * i, "rollouts": 16, "passes": {"pass@8": y / 100}} for i, y in enumerate(curve)]
    return Run(run.name, run.config, log, evaluations)


def test_the_cost_is_where_the_line_between_evaluations_crosses_the_level():
    run = planted([20, 40, 80, 90])
    assert cost.cost(run, 60) == 256 * 37.5 and cost.cost(run, 80) == 256 * 50
    assert cost.cost(run, 80, "tokens generated") == sum(1000 + step for step in range(50))
    assert cost.cost(run, 80, "tokens trained") == 50 * 1500
    # at least the first evaluation after the base's, at most the whole run, or what is said of those beyond
    assert cost.cost(run, 10) == cost.cost(run, 30) == 256 * 25
    assert cost.cost(run, 90) == cost.cost(run, 99) == 256 * 75 and cost.cost(run, 99, beyond=2) == 256 * 150
    assert cost.at_bounds([run, planted([20, 30, 40], 1), planted([5, 6, 7], 2)], {0: 40, 1: 35, 2: 8}) == (1, 1)


def test_a_noisy_plateau_is_pooled_before_its_first_crossing():
    noisy, flat = [20, 60, 76, 64, 71, 69, 70, 70], [20, 60] + 6 * [70]
    assert cost.fitted(planted(noisy)) == pytest.approx(flat)
    assert cost.cost(planted(noisy), 70.5) == 256 * 175  # 76 for a moment is no 70.5
    assert cost.cost(planted(noisy), 68) == cost.cost(planted(flat), 68) == 256 * 45


def test_the_fitted_curve_is_the_nearest_of_those_that_never_fall():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 100, 5).astype(float)
    grid = np.array(np.meshgrid(*5 * [np.arange(0, 100, 4.0)])).reshape(5, -1).T
    rising = grid[np.all(np.diff(grid) >= 0, axis=1)]
    best, ours = ((rising - y) ** 2).sum(axis=1).min(), cost.fitted(planted(list(y)))
    assert np.all(np.diff(ours) >= -1e-9) and ((ours - y) ** 2).sum() <= best + 1e-9


def test_the_level_is_two_points_below_the_mean_end_and_at_most_95():
    assert cost.level([planted([20, 50, 70]), planted([20, 60, 80])]) == 73
    assert cost.level([planted([20, 99])]) == 95


def test_equal_curves_have_the_ratio_1_and_planted_shares_are_found():
    rng = np.random.default_rng(1)
    curves = {base: [20 + 60 * (1 - np.exp(-e * rng.uniform(0.2, 0.5))) for e in range(13)] for base in range(16)}
    runs = [planted(curve, base) for base, curve in curves.items()]
    levels = {run.base: cost.level([run]) for run in runs}
    equal = cost.log_costs(runs, levels) - cost.log_costs(runs[::-1], levels)
    assert cost.ratio(equal) == (1, 1, 1) and cost.sign_flip(equal) == 1
    half = [planted(run_curve, base, every=50) for base, run_curve in curves.items()]  # twice the way
    twice = cost.log_costs(half, levels) - cost.log_costs(runs, levels)
    assert cost.ratio(twice) == pytest.approx((2, 2, 2)) and cost.sign_flip(twice) == pytest.approx(2 / 2**16)


def test_a_base_s_seeds_are_averaged_in_log_cost():
    runs = [planted([20, 40, 80], 3), planted([20, 30, 50, 70, 80], 3, seed=103), planted([20, 80, 80], 5)]
    found = cost.log_costs(runs, {5: 60, 3: 60})
    assert found == pytest.approx([np.log(256 * 25), np.mean(np.log([256 * 37.5, 256 * 62.5]))])


def test_the_interval_and_the_p_of_a_ratio_are_of_the_bases():
    difference_S = np.log(np.random.default_rng(2).uniform(0.5, 1.3, 10))
    signs = np.array(np.meshgrid(*10 * [[-1, 1]])).reshape(10, -1).T
    share = np.mean(np.abs(signs @ difference_S) >= abs(difference_S.sum()) - 1e-12)
    assert cost.sign_flip(difference_S) == pytest.approx(share)
    value, low, high = cost.ratio(difference_S)
    assert low < value < high and value == pytest.approx(np.exp(difference_S.mean()))
