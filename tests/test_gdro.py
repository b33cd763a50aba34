"""Claims about the two adversaries and the rules. The references are brute force or a few lines written from the
paper's text."""

import functools
import io
import itertools
import math
from bisect import bisect_right
from fractions import Fraction

import numpy as np
import pytest
import torch

from gdro import (
    BUDGETS,
    RULES,
    SIGNALS,
    TILT,
    UTILITIES,
    DifficultyBins,
    JointChoice,
    PromptGDRO,
    RolloutGDRO,
)
from kernels import group_advantage

TENTHS = [k / 10 for k in range(1, 10)]
EXACT_N = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16)  # c/n is recorded without rounding
KNOWN = [name for name, utility in UTILITIES.items() if utility.known_for_every_arm]


def through_npz(state):
    """What np.savez and a load that refuses pickles make of a state."""
    file = io.BytesIO()
    np.savez(file, **state)
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        return {name: saved[name] for name in saved.files}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def with_constants(adversary, **constants):
    """An adversary with other constants than its class has, to see that each acts."""
    for name, value in constants.items():
        assert hasattr(adversary, name)
        setattr(adversary, name, value)
    return adversary


# ---------------------------------------------------------------------------------------------- difficulty bins


class NaiveBins:
    """Section 2 in exact arithmetic, one list of successes a prompt."""

    def __init__(self, edges, history, delta, success, unseen_rate):
        self.edges, self.delta = [Fraction(str(e)) for e in edges], Fraction(str(delta))
        self.history, self.success, self.unseen_rate = history, success, Fraction(str(unseen_rate))
        self.seen, self.bin = {}, {}

    def lookup(self, ids):
        return [self.bin.get(i, bisect_right(self.edges, self.unseen_rate)) for i in ids]

    def estimates(self, ids):
        return [float(self.estimate(self.seen.get(i, [self.unseen_rate]))) for i in ids]

    def estimate(self, past):
        last = past[-self.history :]
        return Fraction(sum(last), len(last))

    def update(self, ids, correct, n):
        for i, c, k in zip(ids, correct, n, strict=True):
            past = self.seen.setdefault(i, [])
            past.append(Fraction(int(c), int(k)) if self.success == "rate" else Fraction(int(c > 0)))
            estimate = self.estimate(past)
            b = self.bin.get(i)
            passed_up = b is not None and b < len(self.edges) and estimate >= self.edges[b] + self.delta
            passed_down = b is not None and b > 0 and estimate < self.edges[b - 1] - self.delta
            if b is None or passed_up or passed_down:
                self.bin[i] = bisect_right(self.edges, estimate)


def random_visits(rng, steps, prompts=30, batch=10, counts=EXACT_N):
    """Batches (ids, correct, n) over prompts of drifting skill."""
    skill = rng.random(prompts)
    for _ in range(steps):
        skill = np.clip(skill + rng.normal(0, 0.1, prompts), 0, 1)
        chosen = rng.choice(prompts, batch, replace=False)
        n = rng.choice(counts, batch)
        yield [f"prompt-{i}" for i in chosen], rng.binomial(n, skill[chosen]), n


@pytest.mark.parametrize("success", ["rate", "any"])
@pytest.mark.parametrize("edges, history, delta, unseen_rate", [
    (TENTHS, 50, 0.03, 0.5), (TENTHS, 10, 0.03, 0.0), (TENTHS, 4, 0, 1.0), ([0.4, 0.75], 1, 0.03, 0.75),
    ([0.5], 20, 0.25, 0.49), ([], 5, 0.03, 0.5), ([0.25, 0.5, 0.75], 64, 0.6, 0.3)])
def test_bins_and_estimates_equal_a_naive_loop(edges, history, delta, unseen_rate, success):
    rng = np.random.default_rng(len(edges) + history)
    bins = DifficultyBins(edges, history=history, hysteresis=delta, success=success, unseen_rate=unseen_rate)
    naive = NaiveBins(edges, history, delta, success, unseen_rate)
    everyone = [f"prompt-{i}" for i in range(30)] + ["never visited"]
    assert bins.num_bins == len(edges) + 1
    for ids, correct, n in random_visits(rng, 150):
        assert bins.lookup(everyone).tolist() == naive.lookup(everyone)
        assert bins.estimates(everyone) == pytest.approx(naive.estimates(everyone), abs=1e-11)
        bins.update(ids, correct, n)
        naive.update(ids, correct, n)
    assert bins.lookup(everyone).tolist() == naive.lookup(everyone)


def test_margins_are_exact_in_decimals():
    """0.4 + 0.03 and 0.2 - 0.05 are not the floats 0.43 and 0.15 that 43/100 and 15/100 are."""
    up, down = (0.03, [0] * 57 + [1] * 42, 1, 3, 4), (0.05, [1] * 15 + [0] * 85, 0, 2, 1)
    for delta, before, last, left, arrived in (up, down):
        bins = DifficultyBins(TENTHS, history=200, hysteresis=delta)
        for c in before:
            bins.update(["x"], [c], [1])
        assert bins.lookup(["x"]) == left  # 42 of 99, 15 of 100
        bins.update(["x"], [last], [1])
        assert bins.lookup(["x"]) == arrived  # 43 of 100, 15 of 101


@pytest.mark.parametrize("edges", [[2 / 3], [1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7]])
def test_without_a_margin_edges_that_are_no_decimals_are_reached_too(edges):
    """(11) with delta = 0: whatever the path, a prompt is in the bin of its estimate."""
    for edge in edges:
        wanted = Fraction(edge).limit_denominator(10)
        bins = DifficultyBins(edges, hysteresis=0)
        for c in [0] * (wanted.denominator - wanted.numerator) + [1] * wanted.numerator:
            bins.update(["x"], [c], [1])
        assert bins.lookup(["x"]) == np.digitize(edge, edges)


def test_a_state_of_bins_is_a_snapshot_and_questions_change_nothing():
    bins, other = DifficultyBins([0.5]), DifficultyBins([0.5])
    bins.update(["a"], [0], [4])
    other.update(["stale"], [4], [4])
    state = bins.state_dict()
    frozen = {name: array.copy() for name, array in state.items()}
    bins.lookup(["a", "b"])
    bins.estimates(["b", "a"])[:] = 0.7
    assert_same_state(bins.state_dict(), frozen)
    other.load_state_dict(state)
    for _ in range(3):
        bins.update(["a"], [4], [4])
        other.update(["a"], [4], [4])
    assert bins.lookup(["a"]) == 1
    assert_same_state(other.state_dict(), bins.state_dict())  # without "stale"
    assert_same_state(state, frozen)


# ---------------------------------------------------------------------------------------------------- Prompt-GDRO


def paper_weights(batches, num_bins, *, eta, beta, gamma, clip, cap, share, floor, mean_one):
    """(12)-(16) in plain Python: yields scores, q and the prompts' weights of each batch before it is recorded."""
    score = {}
    for bin_P, loss_P in batches:
        omega = [math.exp(eta * max(-clip, min(clip, score.get(b, 0.0)))) for b in range(num_bins)]
        q = [(1 - gamma) * o / sum(omega) + gamma / num_bins for o in omega]
        mean_q = sum(q[b] for b in bin_P) / len(bin_P)
        yield score, q, [min(cap, q[b] / mean_q if mean_one else omega[b]) for b in bin_P]
        for b in set(bin_P):
            losses = [x for x, c in zip(loss_P, bin_P, strict=True) if c == b]
            loss = sum(losses) / len(losses)
            if share:
                loss /= max(len(losses) / len(bin_P), floor)
            score[b] = (1 - beta) * score[b] + beta * loss if b in score else loss


def random_batches(rng, steps, num_bins, prompts=24):
    """Batches of unequal bins, many of them absent, with losses of bin-dependent size."""
    centre = rng.normal(0, 2, num_bins)
    for _ in range(steps):
        present = rng.choice(num_bins, rng.integers(1, num_bins + 1), replace=False)
        bin_P = rng.choice(present, prompts, p=rng.dirichlet(np.full(len(present), 0.7)))
        yield bin_P, rng.normal(centre[bin_P], 1)


PAPER = dict(eta=0.65, beta=0.12, gamma=0.01, clip=5.0, cap=15.0, share=True, floor=0.05, mean_one=False)


@pytest.mark.parametrize("changes", [
    {}, dict(mean_one=True), dict(share=False), dict(clip=0.5), dict(cap=1.2), dict(mean_one=True, cap=1.2),
    dict(mean_one=True, gamma=0.4, share=False), dict(gamma=1, mean_one=True), dict(eta=2, cap=100), dict(floor=0.3),
    dict(beta=1)], ids=str)
def test_weights_match_eq_12_to_16(changes):
    s = {**PAPER, **changes}
    data = PromptGDRO(7, eta=s["eta"], beta=s["beta"], share_normalize=s["share"], mean_one=s["mean_one"])
    if changes:  # else the constants of the class, which are the paper's
        with_constants(data, GAMMA=s["gamma"], SCORE_CLIP=s["clip"], WEIGHT_CAP=s["cap"], SHARE_FLOOR=s["floor"])
    batches = list(random_batches(np.random.default_rng(3), 60, 7))
    reference = paper_weights([(b.tolist(), x.tolist()) for b, x in batches], 7, **s)
    for (bin_P, loss_P), (score, q, weights) in zip(batches, reference, strict=True):
        np.testing.assert_allclose(data.score_B, [score.get(b, 0) for b in range(7)], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(data.q_B, q, rtol=1e-10)
        weight_P = data.weights(bin_P)[bin_P]
        np.testing.assert_allclose(weight_P, weights, rtol=1e-10)
        assert not s["mean_one"] or weight_P.max() == s["cap"] or weight_P.mean() == pytest.approx(1)
        data.update(bin_P, loss_P)


@pytest.mark.parametrize("mean_one", [False, True])
def test_eta_zero_is_grpo_every_weight_is_exactly_one(mean_one):
    data = PromptGDRO(5, eta=0, mean_one=mean_one)
    for bin_P, loss_P in random_batches(np.random.default_rng(0), 20, 5):
        data.update(bin_P, 100 * loss_P)
        assert np.all(data.weights(bin_P)[bin_P] == 1.0)


def test_signals_are_the_loss_minus_the_reward_and_the_unbiased_variance():
    rng = np.random.default_rng(0)
    reward_PN = np.where(rng.random((32, 6)) < rng.random((32, 1)), 1.0, -1.0)
    loss_P, reward_P, n_P = rng.normal(size=32), reward_PN.mean(1), np.full(32, 6)
    signals = {name: signal(loss_P, reward_P, n_P) for name, signal in SIGNALS.items()}
    np.testing.assert_array_equal(signals["surrogate"], loss_P)
    np.testing.assert_array_equal(signals["reward"], -reward_P)
    np.testing.assert_allclose(signals["variance"], reward_PN.var(1, ddof=1), atol=1e-12)
    assert SIGNALS["variance"](np.ones(1), np.ones(1), np.ones(1)) == 0  # one rollout has none


# --------------------------------------------------------------------------------------- Rollout-GDRO: the choice


def brute_optima(value, count, mixed):
    """{total: greatest sum of values} over every configuration; spread counts are valued by linear interpolation."""
    step = [1 if mixed else m for m in count]
    totals = [np.arange(0, m * (len(v) - 1) + 1, s) for v, m, s in zip(value, count, step, strict=True)]
    worth = [np.interp(t / m, np.arange(len(v)), v) for t, v, m in zip(totals, value, count, strict=True)]
    optima = {}
    for total, sum_ in zip(functools.reduce(np.add.outer, totals).ravel().tolist(),
                           functools.reduce(np.add.outer, worth).ravel().tolist(), strict=True):
        optima[total] = max(sum_, optima.get(total, -math.inf))
    return optima


def random_choices(rng, cases):
    """Small problems (value, count): rough, tied, convex, concave and nearly impossible arms."""
    kinds = ["normal", "ties", "all equal", "convex", "concave", "steep"]
    for case in range(cases):
        bins, arms = rng.integers(1, 4), rng.integers(1, 5)
        k = np.arange(arms)
        value = {
            "normal": rng.normal(size=(bins, arms)), "ties": rng.integers(0, 2, (bins, arms)).astype(float),
            "all equal": np.zeros((bins, arms)), "convex": rng.random((bins, 1)) * k**2 - rng.random((bins, 1)) * 4 * k,
            "concave": -rng.random((bins, 1)) / (k + 1), "steep": rng.choice([-690.0, -1.0, 0.0], (bins, arms)),
        }[kinds[case % len(kinds)]]
        yield value, rng.integers(1, 6, bins)


@pytest.mark.parametrize("mixed", [False, True], ids=["exact", "spread"])
def test_the_dp_optimum_choice_and_marginal_value_equal_brute_force(mixed):
    for value, count in random_choices(np.random.default_rng(0), 300):
        optima, whole = brute_optima(value, count, mixed), brute_optima(value, count, mixed=False)
        choice = JointChoice(value, count, spread=mixed)
        for total in range(-2, int(count.sum()) * (value.shape[1] - 1) + 3):
            where = f"{value.tolist()} {count.tolist()} {total}"
            if total not in optima:
                assert choice.best(total) == -np.inf, where
                continue
            assert choice.best(total) == pytest.approx(optima[total], rel=1e-9, abs=1e-9), where

            arm, extra = choice.arms(total)
            assert np.all((0 <= extra) & (extra < count)) and np.all(arm + (extra > 0) < value.shape[1]), where
            assert np.count_nonzero(extra) <= mixed, where
            if not value.any() and total in whole:
                assert not extra.any(), where  # nothing is mixed for nothing
            assert (count * arm + extra).sum() == total, where
            claimed = sum(np.interp(k + r / m, np.arange(len(v)), v)
                          for v, m, k, r in zip(value, count, arm, extra, strict=True))
            assert claimed == pytest.approx(optima[total], rel=1e-9, abs=1e-9), where

            below, above = [t for t in optima if t < total], [t for t in optima if t > total]
            low, high = max(below, default=total), min(above, default=total)
            if low == high:
                assert choice.marginal_value(total) is None, where
            else:
                slope = (optima[high] - optima[low]) / (high - low)
                assert choice.marginal_value(total) == pytest.approx(slope, rel=1e-9, abs=1e-8), where


def compute_with(score_BK, *, mu=0.0, step=0, **settings):
    compute = RolloutGDRO(len(score_BK), **settings)
    compute.load_state_dict({"score": np.asarray(score_BK, float), "mu": np.array(mu), "step": np.array(step)})
    return compute


def random_scores(rng, bins, arms):
    score_BK = rng.normal(0, rng.choice([0.1, 3, 300]), (bins, arms))
    score_BK[rng.random((bins, arms)) < rng.choice([0, 0.3, 0.9])] = np.nan  # arms never observed
    return score_BK


def paper_probabilities(score_BK, arms_K, *, eta, gamma, mu):
    """(20) and the exponential weights of its bandit: (1 - gamma) softmax(-eta L) + gamma / K."""
    rows = []
    for score_K in np.nan_to_num(score_BK):
        loss = [-s + mu * n for s, n in zip(score_K, arms_K, strict=True)]
        e = [math.exp(-eta * (x - min(loss))) for x in loss]
        rows.append([(1 - gamma) * x / sum(e) + gamma / len(e) for x in e])
    return np.array(rows)


@pytest.mark.parametrize("budget", ["exact", "spread"])
def test_the_budget_is_spent_exactly_within_bounds_and_by_bin(budget):
    rng = np.random.default_rng(7)
    fractional = 0
    for _ in range(600):
        bins, prompts, n_min = rng.integers(1, 11), rng.integers(1, 48), int(rng.integers(1, 4))
        n_max = n_min + int(rng.integers(0, 11))
        total = int(rng.integers(n_min, n_max + 1)) * prompts
        if budget == "spread":
            total = int(rng.integers(n_min * prompts, n_max * prompts + 1))
        fractional += total % prompts > 0
        compute = compute_with(random_scores(rng, bins, n_max - n_min + 1), mu=rng.normal(), n_min=n_min, n_max=n_max,
                               n_bar=total / prompts, budget=budget, utility=rng.choice(list(UTILITIES)))
        bin_P = rng.choice(bins, prompts, p=rng.dirichlet(np.full(bins, 0.5)))
        n_P = compute.allocate(bin_P)
        assert n_P.shape == bin_P.shape and np.issubdtype(n_P.dtype, np.integer)
        assert n_min <= n_P.min() and n_P.max() <= n_max and n_P.sum() == total
        groups = [n_P[bin_P == b] for b in np.unique(bin_P)]
        assert sum(np.ptp(n) for n in groups) <= (budget == "spread")  # one bin at most stands between two counts,
        assert all(np.all(np.diff(n) <= 0) for n in groups)  # and its first prompts get one more
    assert fractional == 0 if budget == "exact" else fractional > 240


@pytest.mark.parametrize("budget", ["exact", "spread"])
@pytest.mark.parametrize("utility", UTILITIES)
def test_allocation_is_the_best_configuration_and_its_price_the_difference_quotient(utility, budget):
    """Bandit utilities: the most probable configuration. Known ones: (19), bins weighed by their share."""
    rng = np.random.default_rng(5)
    for _ in range(60):
        arms_K = np.arange(2, 2 + rng.integers(2, 6))
        score_BK, mu = rng.normal(0, 1.5, (4, len(arms_K))), rng.normal(0, 0.3)
        n_bar = int(rng.integers(arms_K[0], arms_K[-1] + 1))
        compute = with_constants(compute_with(score_BK, mu=mu, n_max=int(arms_K[-1]), n_bar=n_bar, utility=utility,
                                              budget=budget), GAMMA=0.1)
        bin_P = rng.choice(4, 14, p=[0.1, 0.5, 0, 0.4])
        n_P = compute.allocate(bin_P)

        present, count = np.unique(bin_P, return_counts=True)
        value = np.log(paper_probabilities(score_BK, arms_K, eta=0.65, gamma=0.1, mu=mu))[present]
        if utility != "surrogate":
            value = 0.65 * (score_BK - mu * arms_K)[present] * count[:, None]
        optima = brute_optima(value, count, budget == "spread")
        extra = int(n_P.sum()) - 2 * 14
        mean_n = [n_P[bin_P == b].mean() for b in present]
        achieved = sum(np.interp(n, arms_K, v) for n, v in zip(mean_n, value, strict=True))
        assert achieved == pytest.approx(optima[extra], abs=1e-5)
        low = max((t for t in optima if t < extra), default=extra)
        high = min((t for t in optima if t > extra), default=extra)
        assert compute.shadow_price_dp == pytest.approx((optima[high] - optima[low]) / (high - low), abs=1e-5)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("utility", UTILITIES)
def test_allocation_is_uniform_before_anything_was_seen_with_eta_zero_and_with_one_arm(utility, budget):
    """The last is GRPO, always, and moves no price."""
    rng, settings = np.random.default_rng(2), dict(utility=utility, budget=budget)
    for n_bar in (2, 4, 7, 12) if budget != "dual" else ():
        bin_P, score_BK = rng.integers(0, 6, 40), rng.normal(size=(6, 11))
        assert np.all(RolloutGDRO(6, n_bar=n_bar, **settings).allocate(bin_P) == n_bar)
        assert np.all(compute_with(score_BK, n_bar=n_bar, eta=0, **settings).allocate(bin_P) == n_bar)
    compute = RolloutGDRO(5, n_min=4, n_max=4, n_bar=4, **settings)
    for bin_P, loss_P in random_batches(rng, 15, 5):
        n_P = compute.allocate(bin_P)
        assert np.all(n_P == 4) and compute.shadow_price_dp is None and compute.mu == 0
        compute.update(bin_P, n_P, loss_P, rng.integers(0, 5, len(bin_P)))


@pytest.mark.parametrize("budget", ["exact", "spread"])
@pytest.mark.parametrize("utility", KNOWN)
def test_eta_changes_nothing_where_every_arm_is_known(utility, budget):
    """So config.idle_settings says; but for 0, which makes all arms alike."""
    rng = np.random.default_rng(0)
    etas, uneven = [RolloutGDRO(10, eta=eta, utility=utility, budget=budget) for eta in (0.1, 0.65, 5.0)], 0
    for bin_P, loss_P in random_batches(rng, 100, 10, prompts=64):
        n_P, *others = (compute.allocate(bin_P) for compute in etas)
        assert all(np.array_equal(n_P, other) for other in others)
        uneven += np.ptp(n_P) > 0
        correct_P = rng.binomial(n_P, (bin_P + 0.5) / 10)
        for compute in etas:
            compute.update(bin_P, n_P, loss_P, correct_P)
    assert uneven > 30


# ----------------------------------------------------------------------- Rollout-GDRO: the dual budget, the price


def test_arm_probabilities_match_eq_20_and_their_logarithms_stay_finite():
    rng = np.random.default_rng(0)
    for gamma, mu, eta in itertools.product([0, 0.01, 0.5, 1], [-0.4, 0, 0.7], [0, 0.65, 2]):
        score_BK = random_scores(rng, 4, 11).clip(-20, 20)
        compute = compute_with(score_BK, mu=mu, eta=eta)
        if gamma != 0.01:  # the constant of the class
            with_constants(compute, GAMMA=gamma)
        p_BK = paper_probabilities(score_BK, np.arange(2, 13), eta=eta, gamma=gamma, mu=mu)
        np.testing.assert_allclose(np.exp(compute.log_prob_BK()), p_BK, rtol=1e-9)
    log_p_BK = with_constants(compute_with([[0.0, -1e6, -1e6]], n_max=4, n_bar=3), GAMMA=0).log_prob_BK()
    assert np.all(np.isfinite(log_p_BK)) and log_p_BK[0, 0] == 0 and np.all(log_p_BK[0, 1:] < -600)


def test_dual_draws_arms_by_their_probabilities_and_independently_by_bin():
    rng = np.random.default_rng(0)
    score_BK, bin_P, draws = rng.normal(0, 1, (4, 5)), np.array([3, 1, 3, 1, 1]), 8000
    settings = dict(mu=0.1, n_min=2, n_max=6, budget="dual")
    compute = compute_with(score_BK, seed=3, **settings)
    played = np.empty((draws, 2), int)
    for step in range(draws):
        compute.load_state_dict({**compute.state_dict(), "step": np.array(step)})
        n_P = compute.allocate(bin_P)
        assert n_P[0] == n_P[2] and n_P[1] == n_P[3] == n_P[4]  # one count a bin
        played[step] = n_P[0], n_P[1]
    assert compute.shadow_price_dp is None
    p_BK = paper_probabilities(score_BK, np.arange(2, 7), eta=0.65, gamma=0.01, mu=0.1)
    for column, b in enumerate([3, 1]):
        frequency_K = np.bincount(played[:, column], minlength=7)[2:] / draws
        assert np.all(np.abs(frequency_K - p_BK[b]) < 4 * np.sqrt(p_BK[b] * (1 - p_BK[b]) / draws))
    assert abs(np.corrcoef(played.T)[0, 1]) < 4 / math.sqrt(draws)
    assert abs(np.corrcoef(played[1:, 0], played[:-1, 0])[0, 1]) < 4 / math.sqrt(draws)
    other = [compute_with(score_BK, seed=4, step=s, **settings).allocate(bin_P)[0] for s in range(50)]
    assert played[:50, 0].tolist() != other


def test_mu_moves_by_alpha_times_the_excess_and_never_under_budgets_that_are_met():
    compute, mu = RolloutGDRO(3, budget="dual"), 0.0
    for n_P in ([2, 2, 2], [12, 3, 5], [4, 4, 4], [9, 2, 6]):
        compute.update(np.arange(3), np.array(n_P), np.zeros(3), np.zeros(3, int))
        mu += 0.05 * (sum(n_P) / 3 - 4)
        assert compute.state_dict()["mu"] == pytest.approx(mu)
    assert compute.state_dict()["step"] == 4
    for budget in ("exact", "spread"):
        compute = RolloutGDRO(5, budget=budget)
        for bin_P, loss_P in random_batches(np.random.default_rng(0), 20, 5):
            compute.update(bin_P, compute.allocate(bin_P), loss_P, np.zeros(len(bin_P), int))
        assert compute.state_dict()["mu"] == 0


@pytest.mark.parametrize("alpha_mu, low, high", [(0, 7, 12), (0.05, 3.8, 4.2)])
def test_the_price_holds_the_mean_near_n_bar_over_time(alpha_mu, low, high):
    """Where every rollout more is worth 0.3 to its bin, bandits without a price want far more than 4."""
    rng, means = np.random.default_rng(0), []
    compute = with_constants(RolloutGDRO(8, budget="dual", seed=1), ALPHA_MU=alpha_mu)
    for _ in range(600):
        bin_P = rng.integers(0, 8, 32)
        n_P = compute.allocate(bin_P)
        compute.update(bin_P, n_P, -0.3 * n_P, np.zeros(32, int))
        means.append(n_P.mean())
    assert low < np.mean(means[200:]) < high


# -------------------------------------------------------------------------------------- Rollout-GDRO: the scores


def brute_gain(n, p, k=8):
    """Over all 2^n outcomes: k (1-p)^(k-1) E[sum of the positive advantages (3)]."""
    expected = 0.0
    for reward in itertools.product([-1, 1], repeat=n):
        right = reward.count(1)
        if 0 < right < n:
            r = np.array(reward)
            advantage = (r - r.mean()) / r.std()
            expected += p**right * (1 - p) ** (n - right) * advantage[advantage > 0].sum()
    return k * (1 - p) ** (k - 1) * expected


def utilities_by_hand(utility, mine, arms):
    """{arm: utility} of a bin whose prompts are [(rollouts, right ones, loss)]; of `rank` the bin's rate."""
    if utility == "surrogate":  # (17)-(18): only arms that were played
        return {arm: -np.mean([x for n, _, x in mine if n == arm]) for arm in {n for n, _, _ in mine}}
    if utility == "variance":  # (28); one rollout has none
        spread = [np.var([1] * c + [-1] * (n - c), ddof=1) for n, c, _ in mine if n > 1]
        return {arm: -np.mean(spread) / arm for arm in arms} if spread else {}
    rate = (sum(c for _, c, _ in mine) + 0.5) / (sum(n for n, _, _ in mine) + 1)
    return {arm: brute_gain(arm, rate) if utility == "gain" else rate for arm in arms}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("most", [5, 1])
@pytest.mark.parametrize("utility", UTILITIES)
def test_arm_scores_are_an_ema_of_the_utility_from_its_first_visit(utility, most):
    rng, arms, score = np.random.default_rng(8), range(1, 6), {}
    compute = RolloutGDRO(4, n_min=1, n_max=5, n_bar=3, utility=utility)
    beta = 0.4  # of the class
    for bin_P, loss_P in random_batches(rng, 40, 4, prompts=9):
        n_P = rng.integers(1, most + 1, 9)
        correct_P = rng.binomial(n_P, 0.3)
        seen = {}  # (bin, arm) -> utility
        for b in set(bin_P.tolist()):
            mine = [(int(n), int(c), x) for n, c, x, d in zip(n_P, correct_P, loss_P, bin_P, strict=True) if d == b]
            seen |= {(b, arm): u for arm, u in utilities_by_hand(utility, mine, arms).items()}
        if utility == "rank":  # from n_min = 1 for the easiest to 1 + 2 (n_bar - n_min) = 5 for the hardest
            order = sorted({(-p, b) for (b, _), p in seen.items()})
            place = {b: 1 + 4 * i / max(len(order) - 1, 1) for i, (_, b) in enumerate(order)}
            seen = {(b, arm): -((arm - place[b]) ** 2) for b, arm in seen}
        for key, u in seen.items():
            score[key] = (1 - beta) * score[key] + beta * u if key in score else u
        compute.update(bin_P, n_P, loss_P, correct_P)
        expected = [[score.get((b, arm), np.nan) for arm in arms] for b in range(4)]
        np.testing.assert_allclose(compute.state_dict()["score"], expected, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("make, message", [
    (lambda: DifficultyBins([0.5, 0.5]), "ascend"), (lambda: DifficultyBins([0, 0.5]), "ascend"),
    (lambda: DifficultyBins([0.5, 1]), "ascend"), (lambda: DifficultyBins([0.5], success="all"), "success"),
    (lambda: DifficultyBins([0.5], history=0), "history"), (lambda: DifficultyBins([], hysteresis=-0.01), "hysteresis"),
    (lambda: PromptGDRO(3, eta=-1), "need eta"), (lambda: PromptGDRO(3, beta=0), "need eta"),
    (lambda: PromptGDRO(3, beta=1.1), "need eta"), (lambda: RolloutGDRO(3, n_min=0), "1 <= n_min"),
    (lambda: RolloutGDRO(3, n_min=5), "n_min <= n_bar"), (lambda: RolloutGDRO(3, n_bar=13), "n_bar <= n_max"),
    (lambda: RolloutGDRO(3, utility="regret"), "utility must be one of"),
    (lambda: RolloutGDRO(3, budget="about"), "budget one of"), (lambda: RolloutGDRO(3, eta=-1), "eta 0 or more"),
    (lambda: RolloutGDRO(2, n_bar=4.5).allocate(np.repeat([0, 1], [45, 19])),
     r"no arms meet.*45, 19.*whole n_bar or budget 'spread'"),
    (lambda: RolloutGDRO(2, n_bar=4.5).allocate(np.array([0, 1, 1])), "3 prompts of 4.5 .*not a whole number"),
    (lambda: RolloutGDRO(2, n_bar=4.5, budget="spread").allocate(np.array([0, 1, 1])), "not a whole number"),
])
def test_settings_that_make_no_sense_and_budgets_that_cannot_be_met_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("part, report, message", [
    ("bins", (["a", "b", "a"], [1, 1, 1], [2, 2, 2]), "once"), ("bins", (["a"], [3], [2]), "correct <= n"),
    ("bins", (["a"], [-1], [2]), "0 <= correct"), ("bins", (["a"], [0], [0]), "n >= 1"),
    ("bins", (["a", "b"], [1], [2]), "1 counts of correct"), ("bins", (["a"], [1], [2, 2]), "2 of rollouts"),
    *(("prompt", ([0, 1], [0.5, bad]), "not finite") for bad in (np.nan, np.inf, -np.inf)),
    *(("rollout", ([0, 1], [4, 4], [0.5, bad], [0, 0]), "not finite") for bad in (np.nan, np.inf)),
    *(("rollout", ([1], [n], [1.0], [0]), "counts must be arms") for n in (1, 13))])
def test_a_bad_report_is_refused_and_changes_nothing(part, report, message):
    """A count that is no arm must not be booked on an arm of the next bin."""
    adversary = {"bins": DifficultyBins([0.5]), "prompt": PromptGDRO(3), "rollout": RolloutGDRO(3)}[part]
    if part == "bins":
        adversary.update(["z"], [1], [2])
    before = adversary.state_dict()
    with pytest.raises(ValueError, match=message):
        adversary.update(*(x if isinstance(x[0], str) else np.array(x) for x in report))
    assert_same_state(adversary.state_dict(), before)


# ------------------------------------------------------------------------------------------------------ together


@pytest.mark.parametrize("signal, mean_one, success", [("surrogate", False, "any"), ("reward", True, "rate")])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("utility", UTILITIES)
def test_any_two_adversaries_run_together_and_resume_from_any_step(utility, budget, success, signal, mean_one):
    rng = np.random.default_rng(11)

    def fresh():
        return (DifficultyBins([0.2, 0.5, 0.8], history=4, success=success), PromptGDRO(4, mean_one=mean_one),
                RolloutGDRO(4, n_max=8, utility=utility, budget=budget, seed=5))

    running, skill = fresh(), rng.random(24)
    visited = set()
    for _ in range(15):  # a prompt is in half of them: more often than the history is long
        resumed = fresh()
        for old, new in zip(running, resumed, strict=True):
            state = old.state_dict()
            assert all(isinstance(a, np.ndarray) and a.dtype != object for a in state.values())
            new.load_state_dict(through_npz(state))
        chosen = rng.choice(24, 12, replace=False)
        ids, noise_P, seed = [f"p{i}" for i in chosen], rng.normal(size=12), int(rng.integers(1 << 30))
        steps = []
        for bins, data, compute in (running, resumed):
            before = [part.state_dict() for part in (bins, data, compute)]
            bin_P = bins.lookup(ids)
            n_P, weight_P = compute.allocate(bin_P), data.weights(bin_P)[bin_P]
            for part, state in zip((bins, data, compute), before, strict=True):  # questions change nothing
                assert_same_state(part.state_dict(), state)
            correct_P = np.random.default_rng(seed).binomial(n_P, skill[chosen])
            loss_P = SIGNALS[signal](0.1 * noise_P, 2 * correct_P / n_P - 1, n_P)
            data.update(bin_P, loss_P)
            compute.update(bin_P, n_P, loss_P, correct_P)
            bins.update(ids, correct_P, n_P)
            steps.append((bin_P.tolist(), n_P.tolist(), weight_P.tolist()))
        assert steps[0] == steps[1]
        for old, new in zip(running, resumed, strict=True):
            assert_same_state(old.state_dict(), new.state_dict())
        assert np.all(np.isfinite(weight_P)) and np.all((0 < weight_P) & (weight_P <= 15))
        visited |= set(bin_P.tolist())
    assert len(visited) >= 3


# ------------------------------------------------------------------------------------------------ fixed rules

GROUPS = [(c, n) for n in range(1, 13) for c in range(n + 1)]
CORRECT, N = (np.array(x) for x in zip(*GROUPS, strict=True))
RATE = np.random.default_rng(0).random(len(GROUPS))


def by_rule(rule: str) -> list[np.ndarray]:
    """Advantages of each group of GROUPS, the right rollouts first: GRPO's standardised +-1 rewards times the rule's
    factor."""
    rewards = np.concatenate([np.repeat([1.0, -1.0], [c, n - c]) for c, n in GROUPS])
    offsets = np.concatenate(([0], N.cumsum()))
    factors = torch.from_numpy(RULES[rule](CORRECT, N, RATE))
    found, _ = group_advantage(torch.from_numpy(rewards), torch.from_numpy(offsets), factors, eps=0.0)
    return np.split(found.numpy(), offsets[1:-1])


@pytest.mark.parametrize("rule, formula", {
    "grpo": lambda r: (r - r.mean()) / r.std(), "dr_grpo": lambda r: r - r.mean(),  # of +-1 rewards
    "maxrl": lambda r: (r + 1) / (r + 1).mean() - 1,  # of 0/1 rewards
    "tilt": lambda r: (r - r.mean()) / r.std()}.items())
def test_a_rule_is_its_papers_formula_rollout_by_rollout_and_gives_nothing_where_all_scored_alike(rule, formula):
    tilted = np.exp(-TILT * RATE) / np.exp(-TILT * RATE).mean() if rule == "tilt" else np.ones(len(RATE))
    for (c, n), advantage, factor in zip(GROUPS, by_rule(rule), tilted, strict=True):
        r = np.repeat([1.0, -1.0], [c, n - c])
        np.testing.assert_allclose(advantage, factor * formula(r) if 0 < c < n else 0, atol=1e-12)
        assert advantage.sum() == pytest.approx(0, abs=1e-12)


def test_maxrl_with_n_rollouts_follows_maximum_likelihood_truncated_at_order_n_minus_1():
    """Its mean over groups of n is (1 - (1 - p)^(n - 1)) / p times the gradient of p, a truncated series of 1 / p, the
    slope of log p. (Order n, as in the paper, takes the -1 of groups without a right rollout; here they teach nothing.)
    """
    for n, p in itertools.product((2, 4, 12), (0.02, 0.3, 0.9)):
        # The score d log pi / dp is 1 / p of a right rollout and -1 / (1 - p) of a wrong one.
        slope = 0.0
        for c in range(1, n):
            factor = RULES["maxrl"](np.array([c]), np.array([n]), np.array([p]))[0]
            right, wrong = factor * np.sqrt((n - c) / c), -factor * np.sqrt(c / (n - c))
            gradient = (c * right / p - (n - c) * wrong / (1 - p)) / n
            slope += math.comb(n, c) * p**c * (1 - p) ** (n - c) * gradient
        truncated = sum((1 - p) ** (k - 1) for k in range(1, n))
        assert slope == pytest.approx(truncated, rel=1e-9)
