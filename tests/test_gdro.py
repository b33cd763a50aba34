"""Claims about the two adversaries. The references are brute force or a few lines written from the paper's text."""

import functools
import io
import itertools
import math
import warnings
from bisect import bisect_right
from fractions import Fraction

import numpy as np
import pytest

from gdro import BUDGETS, SIGNALS, UTILITIES, DifficultyBins, JointChoice, PromptGDRO, RolloutGDRO, expected_gain

TENTHS = [k / 10 for k in range(1, 10)]
EXACT_N = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16)  # c/n is recorded without rounding


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


# ---------------------------------------------------------------------------------------------- difficulty bins


class NaiveBins:
    """Section 2 in exact arithmetic, one list of successes a prompt."""

    def __init__(self, edges, history, decay, delta, success, unseen_rate):
        self.edges, self.delta = [Fraction(str(e)) for e in edges], Fraction(str(delta))
        self.history, self.decay, self.success = history, Fraction(str(decay)), success
        self.unseen_rate = Fraction(str(unseen_rate))
        self.unseen = bisect_right(self.edges, self.unseen_rate)
        self.seen, self.bin = {}, {}

    def lookup(self, ids):
        return [self.bin.get(i, self.unseen) for i in ids]

    def rates(self, ids):
        return [float(self.estimate(self.seen.get(i, [self.unseen_rate]))) for i in ids]

    def estimate(self, past):
        last = past[-self.history :]
        weights = [self.decay**age for age in reversed(range(len(last)))]
        return sum(w * x for w, x in zip(weights, last, strict=True)) / sum(weights)

    def update(self, ids, correct, n):
        for i, c, k in zip(ids, correct, n, strict=True):
            value = Fraction(int(c), int(k)) if self.success == "rate" else Fraction(int(c > 0))
            past = self.seen.setdefault(i, [])
            past.append(value)
            estimate = self.estimate(past)
            target = bisect_right(self.edges, estimate)
            if len(past) == 1:
                self.bin[i] = target
                continue
            b = self.bin[i]
            passed_up = b < len(self.edges) and estimate >= self.edges[b] + self.delta
            passed_down = b > 0 and estimate < self.edges[b - 1] - self.delta
            if passed_up or passed_down:
                self.bin[i] = target


def random_visits(rng, steps, prompts=30, batch=10, counts=EXACT_N):
    """Batches (ids, correct, n) over prompts of drifting skill."""
    skill = rng.random(prompts)
    for _ in range(steps):
        skill = np.clip(skill + rng.normal(0, 0.1, prompts), 0, 1)
        chosen = rng.choice(prompts, batch, replace=False)
        n = rng.choice(counts, batch)
        yield [f"prompt-{i}" for i in chosen], rng.binomial(n, skill[chosen]), n


@pytest.mark.parametrize("success", ["rate", "any"])
@pytest.mark.parametrize("edges, history, decay, delta, unseen_rate", [
    (TENTHS, 50, 1, 0.03, 0.5), (TENTHS, 10, 1, 0.03, 0.0), (TENTHS, 4, 1, 0, 1.0), (TENTHS, 20, 0.5, 0.03, 0.0),
    ([0.1, 0.2, 0.4, 0.6, 0.8, 0.9], 7, 0.75, 0.05, 0.4),
    ([0.4, 0.75], 1, 1, 0.03, 0.75), ([0.5], 20, 1, 0.25, 0.49), ([], 5, 1, 0.03, 0.5),
    ([0.25, 0.5, 0.75], 64, 1, 0.6, 0.3),
])
def test_bins_and_rates_equal_a_naive_loop(edges, history, decay, delta, unseen_rate, success):
    rng = np.random.default_rng(len(edges) + history)
    bins = DifficultyBins(edges, history=history, decay=decay, hysteresis=delta, success=success,
                          unseen_rate=unseen_rate)
    naive = NaiveBins(edges, history, decay, delta, success, unseen_rate)
    everyone = [f"prompt-{i}" for i in range(30)] + ["never visited"]
    assert bins.num_bins == len(edges) + 1
    for ids, correct, n in random_visits(rng, 150):
        assert bins.lookup(everyone).tolist() == naive.lookup(everyone)
        assert bins.rates(everyone) == pytest.approx(naive.rates(everyone), abs=1e-11)
        bins.update(ids, correct, n)
        naive.update(ids, correct, n)
    assert bins.lookup(everyone).tolist() == naive.lookup(everyone)


@pytest.mark.parametrize("visits, expected", [
    # edges 0.3 and 0.7, delta 0.05, H = 1: the estimate is the last visit, in twentieths
    ([0], 0), ([5], 0), ([6], 1), ([13], 1), ([14], 2), ([20], 2),  # a first visit: bins hold their lower edge
    ([0, 6], 0), ([0, 7], 1), ([0, 14], 2), ([0, 20], 2),  # up: not at the edge, at edge + delta
    ([10, 14], 1), ([10, 15], 2),
    ([10, 6], 1), ([10, 5], 1), ([10, 4], 0), ([10, 0], 0),  # down: not at edge - delta, below it
    ([20, 14], 2), ([20, 13], 2), ([20, 12], 1), ([20, 5], 0), ([20, 0], 0),
    ([20, 13, 12, 13, 14], 1), ([0, 6, 0, 6], 0),  # inside the margin a prompt stays where it was
])
def test_a_prompt_leaves_its_bin_exactly_when_it_passes_the_margin(visits, expected):
    bins = DifficultyBins([0.3, 0.7], history=1, hysteresis=0.05)
    for c in visits:
        bins.update(["x"], [c], [20])
    assert bins.lookup(["x"]).tolist() == [expected]


def test_margins_are_exact_in_decimals():
    """0.3 + 0.03 and 0.3 - 0.03 are not the floats 0.33 and 0.27 that 33/100 and 27/100 are."""
    up = DifficultyBins(TENTHS, history=200)
    for c in [0] * 67 + [1] * 32:
        up.update(["x"], [c], [1])
    assert up.lookup(["x"]) == 2
    up.update(["x"], [1], [1])  # 33 of 100
    assert up.lookup(["x"]) == 3
    down = DifficultyBins(TENTHS, history=200)
    for c in [1] * 27 + [0] * 73:
        down.update(["x"], [c], [1])
    assert down.lookup(["x"]) == 3  # 27 of 100
    down.update(["x"], [0], [1])
    assert down.lookup(["x"]) == 2


@pytest.mark.parametrize("edges", [[2 / 3], [1 / 7, 2 / 7, 3 / 7, 4 / 7, 5 / 7, 6 / 7]])
def test_without_a_margin_edges_that_are_no_decimals_are_reached_too(edges):
    """(11) with delta = 0: whatever the path, a prompt is in the bin of its estimate."""
    for edge in edges:
        wanted = Fraction(edge).limit_denominator(10)
        bins = DifficultyBins(edges, hysteresis=0)
        for c in [0] * (wanted.denominator - wanted.numerator) + [1] * wanted.numerator:
            bins.update(["x"], [c], [1])
        assert bins.lookup(["x"]) == np.digitize(edge, edges)


@pytest.mark.parametrize("unseen_rate, expected", [(0, 0), (0.29, 0), (0.3, 1), (0.5, 1), (0.7, 2), (1, 2)])
def test_unseen_prompts_are_where_unseen_rate_says(unseen_rate, expected):
    bins = DifficultyBins([0.3, 0.7], unseen_rate=unseen_rate)
    bins.update(["seen"], [0], [4])
    assert bins.lookup(["new", "seen", "newer"]).tolist() == [expected, 0, expected]


def test_rate_bins_do_not_depend_on_how_c_over_n_was_reached():
    for n in range(2, 13):
        for c in range(n + 1):
            bins = DifficultyBins(TENTHS)
            bins.update(["x"], [c], [n])
            assert bins.lookup(["x"]) == bisect_right([Fraction(k, 10) for k in range(1, 10)], Fraction(c, n)), (c, n)


def enumerated_bin(success, n, odds):
    """Bin of a prompt of pass rate 1/odds after every outcome of n rollouts was visited as often as it is likely."""
    bins = DifficultyBins([0.2, 0.3, 0.45, 0.55, 0.8, 0.9, 0.95], history=64, hysteresis=0, success=success)
    for outcome in itertools.product(range(odds), repeat=n):
        bins.update(["x"], [outcome.count(0)], [n])
    return int(bins.lookup(["x"])[0])


def test_rate_bins_do_not_depend_on_n_in_expectation_and_any_bins_do():
    assert [enumerated_bin("rate", n, 2) for n in (1, 2, 3, 4, 5, 6)] == [3] * 6
    assert [enumerated_bin("any", n, 2) for n in (1, 2, 3, 4, 5, 6)] == [3, 4, 5, 6, 7, 7]  # 1 - 2^-n
    assert [enumerated_bin("rate", n, 4) for n in (1, 2, 3)] == [1] * 3
    assert [enumerated_bin("any", n, 4) for n in (1, 2, 3)] == [1, 2, 4]  # 1 - (3/4)^n


@pytest.mark.parametrize("success", ["rate", "any"])
def test_growth_keeps_records(success):
    rng = np.random.default_rng(0)
    crowded, alone = (DifficultyBins(TENTHS, history=6, success=success) for _ in range(2))
    newcomers = iter(range(100_000))
    for size in (1, 2, 3, 100, 1, 257, 1000):
        others = [f"other-{next(newcomers)}" for _ in range(size)]
        c = int(rng.integers(0, 5))
        crowded.update([*others, "x"], [*rng.integers(0, 5, size), c], [4] * (size + 1))
        alone.update(["x"], [c], [4])
        assert crowded.lookup(["x"]) == alone.lookup(["x"])
    state = crowded.state_dict()
    row = state["ids"].tolist().index("x")
    np.testing.assert_array_equal(state["record"][row], alone.state_dict()["record"][0])
    assert state["visits"][row] == 7 and len(state["ids"]) == 1 + 1364


@pytest.mark.parametrize("success", ["rate", "any"])
@pytest.mark.parametrize("saved_after", [0, 1, 40])
def test_bins_loaded_from_a_file_continue_identically(success, saved_after):
    rng = np.random.default_rng(saved_after)
    make = functools.partial(DifficultyBins, [0.4, 0.75], history=5, success=success, unseen_rate=0.8)
    kept, loaded = make(), make()
    loaded.update(["stale"], [0], [4])  # loading replaces what was there
    for step, (ids, correct, n) in enumerate(random_visits(rng, 80, prompts=60)):
        if step == saved_after:
            state = through_npz(kept.state_dict())
            loaded.load_state_dict(state)
            before = {name: array.copy() for name, array in state.items()}
        kept.update(ids, correct, n)
        if step >= saved_after:
            loaded.update(ids, correct, n)
            assert_same_state(kept.state_dict(), loaded.state_dict())
            assert kept.lookup([*ids, "new", "stale"]).tolist() == loaded.lookup([*ids, "new", "stale"]).tolist()
    assert_same_state(before, state)  # the file's arrays are not written to


def test_a_state_of_bins_is_a_snapshot_and_questions_change_nothing():
    bins = DifficultyBins([0.5])
    bins.update(["a"], [0], [4])
    state = bins.state_dict()
    frozen = {name: array.copy() for name, array in state.items()}
    bins.lookup(["a", "b"])
    bins.rates(["b", "a"])[:] = 0.7
    assert_same_state(bins.state_dict(), frozen)
    for _ in range(3):
        bins.update(["a"], [4], [4])
    assert bins.lookup(["a"]) == 1 and frozen["bin"] == 0
    assert_same_state(state, frozen)


@pytest.mark.parametrize("arguments, message", [
    (dict(edges=[0.5, 0.5]), "ascend"), (dict(edges=[0.6, 0.5]), "ascend"), (dict(edges=[0, 0.5]), "ascend"),
    (dict(edges=[0.5, 1]), "ascend"), (dict(edges=[0.5], success="all"), "success"),
    (dict(edges=[0.5], history=0), "history"),
    (dict(edges=[0.5], decay=0), "decay"),
    (dict(edges=[0.5], hysteresis=-0.01), "hysteresis"),
])
def test_bins_refuse_settings_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        DifficultyBins(**arguments)


@pytest.mark.parametrize("ids, correct, n, message", [
    (["a", "b", "a"], [1, 1, 1], [2, 2, 2], "twice"), (["a"], [3], [2], "correct <= n"),
    (["a"], [-1], [2], "0 <= correct"), (["a"], [0], [0], "n >= 1"),
])
def test_bins_refuse_a_bad_step_and_keep_their_state(ids, correct, n, message):
    bins = DifficultyBins([0.5])
    bins.update(["z"], [1], [2])
    before = bins.state_dict()
    with pytest.raises(ValueError, match=message):
        bins.update(ids, correct, n)
    assert_same_state(bins.state_dict(), before)


@pytest.mark.parametrize("correct, n", [([1], [2]), ([1, 1], [2, 2]), ([1, 1, 1], [2])])
def test_bins_refuse_lists_of_unequal_length_and_keep_their_state(correct, n):
    bins = DifficultyBins([0.5])
    with pytest.raises(ValueError):
        bins.update(["a", "b", "c"], correct, n)
    assert bins.lookup(["a", "b", "c"]).tolist() == [bins.unseen_bin] * 3


def test_bins_refuse_a_state_of_another_kind():
    rate, any_ = DifficultyBins([0.5], history=5), DifficultyBins([0.5], history=5, success="any")
    for other in (any_, DifficultyBins([0.5], history=6)):
        with pytest.raises(ValueError, match="another `success` or `history`"):
            other.load_state_dict(rate.state_dict())
    with pytest.raises(ValueError, match="another `success` or `history`"):
        rate.load_state_dict(any_.state_dict())


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
    dict(mean_one=True, gamma=0.4, share=False), dict(gamma=0), dict(gamma=1, mean_one=True), dict(eta=2, cap=100),
    dict(floor=0.3), dict(beta=1),
], ids=str)
def test_weights_match_eq_12_to_16(changes):
    s = {**PAPER, **changes}
    data = PromptGDRO(7, eta=s["eta"], beta=s["beta"], gamma=s["gamma"], score_clip=s["clip"], weight_cap=s["cap"],
                      share_normalize=s["share"], share_floor=s["floor"], mean_one=s["mean_one"])
    batches = list(random_batches(np.random.default_rng(3), 60, 7))
    reference = paper_weights([(b.tolist(), x.tolist()) for b, x in batches], 7, **s)
    for (bin_P, loss_P), (score, q, weights) in zip(batches, reference, strict=True):
        np.testing.assert_allclose(data.score_B, [score.get(b, 0) for b in range(7)], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(data.q_B, q, rtol=1e-10)
        np.testing.assert_allclose(data.weights(bin_P)[bin_P], weights, rtol=1e-10)
        data.update(bin_P, loss_P)


def scored(score_B, **settings):
    data = PromptGDRO(len(score_B), **settings)
    data.load_state_dict({"score": np.asarray(score_B, float)})
    return data


def test_the_clip_and_the_cap_bind():
    bin_P = np.arange(4)
    clipped = scored([-9, -2, 1, 9], eta=0.5, score_clip=2).weights(bin_P)[bin_P]
    np.testing.assert_allclose(clipped, np.exp([-1, -1, 0.5, 1]))
    capped = scored([-9, -2, 1, 9], eta=0.5, score_clip=100, weight_cap=1.1).weights(bin_P)[bin_P]
    np.testing.assert_allclose(capped, [math.exp(-4.5), math.exp(-1), 1.1, 1.1])


@pytest.mark.parametrize("gamma", [0, 0.01, 0.3, 1])
def test_q_is_a_distribution_with_floor_gamma_over_B(gamma):
    q_B = scored([-5, -1, 0, 2, 5], eta=3, gamma=gamma).q_B
    assert q_B.sum() == pytest.approx(1)
    assert np.all(q_B >= gamma / 5 * (1 - 1e-12))
    assert q_B[0] == pytest.approx(gamma / 5, rel=1e-6, abs=1e-12)  # the floor is reached: exp(-30) of the best bin
    assert np.all(np.diff(q_B) >= 0)


def test_the_first_visit_starts_a_score_and_absent_bins_keep_theirs():
    data = PromptGDRO(3, beta=0.25, share_normalize=False)
    data.update(np.array([1, 1]), np.array([2.0, 4.0]))
    assert data.score_B.tolist() == [0, 3, 0]
    data.update(np.array([0]), np.array([-1.0]))
    assert data.score_B.tolist() == [-1, 3, 0]
    data.update(np.array([1]), np.array([7.0]))
    assert data.score_B.tolist() == [-1, 4, 0]
    assert np.isnan(data.state_dict()["score"][2])


def test_class_shares_divide_the_loss_down_to_the_floor():
    bin_P = np.repeat([0, 1, 2], [10, 29, 1])  # shares 0.25, 0.725, 0.025
    data = PromptGDRO(4, share_floor=0.05)
    data.update(bin_P, np.ones(40))
    np.testing.assert_allclose(data.score_B, [4, 1 / 0.725, 20, 0])


def test_mean_one_weights_have_mean_one_over_the_batch_unless_the_cap_binds():
    rng = np.random.default_rng(0)
    for bin_P, _ in random_batches(rng, 200, 6):
        score_B = rng.normal(0, 2, 6)
        weights = scored(score_B, mean_one=True, weight_cap=1e9).weights(bin_P)[bin_P]
        assert weights.mean() == pytest.approx(1)
        shifted = scored(score_B + 1.5, mean_one=True, weight_cap=1e9, score_clip=100).weights(bin_P)[bin_P]
        unclipped = scored(score_B, mean_one=True, weight_cap=1e9, score_clip=100).weights(bin_P)[bin_P]
        np.testing.assert_allclose(shifted, unclipped)  # the step size does not depend on the level of the scores
    rare = scored([5, -5], mean_one=True).weights(np.repeat([0, 1], [1, 99]))[np.repeat([0, 1], [1, 99])]
    assert rare[0] == 15 and rare.mean() < 1


def test_eta_zero_is_grpo_every_weight_is_exactly_one():
    data = PromptGDRO(5, eta=0)
    for bin_P, loss_P in random_batches(np.random.default_rng(0), 20, 5):
        data.update(bin_P, 100 * loss_P)
        assert np.all(data.weights(bin_P) == 1.0)


@pytest.mark.parametrize("eta", [0.2, 0.65, 3])
def test_q_solves_the_entropic_problem_of_lemma_4_1(eta):
    rng = np.random.default_rng(1)
    score_B = rng.normal(0, 1.5, 8).clip(-5, 5)

    def objective(q):  # sum q S + H(q) / eta, (22)
        return q @ score_B - np.sum(q * np.log(np.maximum(q, 1e-300)), axis=-1) / eta

    q_B = scored(score_B, eta=eta, gamma=0).q_B
    best = objective(q_B)
    assert best == pytest.approx(math.log(sum(math.exp(eta * s) for s in score_B)) / eta)
    assert score_B.max() <= best <= score_B.max() + math.log(8) / eta
    others = rng.dirichlet(np.full(8, 0.5), 3000)
    assert np.all(objective(others) <= best + 1e-12)
    near = np.abs(q_B * (1 + 1e-3 * rng.normal(size=(3000, 8))))
    assert np.all(objective(near / near.sum(axis=1, keepdims=True)) <= best + 1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_raises_and_changes_nothing(bad):
    bin_P, loss_P = np.array([0, 1]), np.array([0.5, bad])
    data, compute = PromptGDRO(2), RolloutGDRO(2)
    before = data.state_dict(), compute.state_dict()
    with pytest.raises(ValueError, match="not finite"):
        data.update(bin_P, loss_P)
    with pytest.raises(ValueError, match="not finite"):
        compute.update(bin_P, np.array([4, 4]), loss_P, np.array([0, 0]))
    assert_same_state(data.state_dict(), before[0])
    assert_same_state(compute.state_dict(), before[1])


@pytest.mark.parametrize("settings", [
    dict(eta=-1), dict(beta=0), dict(beta=1.1), dict(gamma=-0.1), dict(gamma=1.1), dict(score_clip=0),
    dict(weight_cap=0), dict(share_floor=0),
], ids=str)
def test_prompt_gdro_refuses_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="need eta >= 0"):
        PromptGDRO(3, **settings)


def test_prompt_gdro_refuses_the_state_of_another_number_of_bins():
    with pytest.raises(ValueError, match="3 bins, not 4"):
        PromptGDRO(4).load_state_dict(PromptGDRO(3).state_dict())


def test_the_surrogate_is_blind_on_policy_and_the_reward_is_not():
    """(3)-(7) at ratio 1: J_ij = A_ij, which sum to zero over a prompt's rollouts."""
    rng = np.random.default_rng(0)
    bin_P = np.repeat(np.arange(4), 8)
    reward_PN = np.where(rng.random((32, 6)) < 0.2 + 0.2 * bin_P[:, None], 1.0, -1.0)
    advantage_PN = (reward_PN - reward_PN.mean(1, keepdims=True)) / (reward_PN.std(1, keepdims=True) + 1e-6)
    ratio_PN = np.ones_like(advantage_PN)
    surrogate_PN = np.minimum(ratio_PN * advantage_PN, ratio_PN.clip(0.8, 1.28) * advantage_PN)
    loss_P, reward_P, n_P = -surrogate_PN.mean(1), reward_PN.mean(1), np.full(32, 6)
    assert np.abs(advantage_PN).max() > 0.5  # not blind for want of advantages
    assert np.abs(SIGNALS["surrogate"](loss_P, reward_P, n_P)).max() < 1e-12
    np.testing.assert_array_equal(SIGNALS["reward"](loss_P, reward_P, n_P), -reward_P)
    np.testing.assert_allclose(SIGNALS["variance"](loss_P, reward_P, n_P), reward_PN.var(1, ddof=1), atol=1e-12)

    blind, seeing = PromptGDRO(4), PromptGDRO(4, share_normalize=False)
    blind.update(bin_P, SIGNALS["surrogate"](loss_P, reward_P, n_P))
    seeing.update(bin_P, SIGNALS["reward"](loss_P, reward_P, n_P))
    np.testing.assert_allclose(blind.weights(bin_P), 1, atol=1e-12)
    assert np.all(np.diff(seeing.omega_B) < 0)  # bin 0, the hardest, gets the greatest weight
    drifting = rng.normal(size=32)
    np.testing.assert_array_equal(SIGNALS["surrogate"](drifting, reward_P, n_P), drifting)  # a loss: no sign, no scale


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
            again = JointChoice(value.copy(), count.copy(), spread=mixed).arms(total)
            assert arm.tolist() == again[0].tolist() and extra.tolist() == again[1].tolist(), where

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


def check_counts(bin_P, n_P, *, total, n_min, n_max, budget):
    assert n_P.shape == bin_P.shape and np.issubdtype(n_P.dtype, np.integer)
    assert n_min <= n_P.min() and n_P.max() <= n_max
    assert n_P.sum() == total
    mixed = 0
    for b in np.unique(bin_P):
        n = n_P[bin_P == b]
        assert np.ptp(n) <= (budget == "spread")
        assert np.all(np.diff(n) <= 0)  # the remainder goes to the first prompts of the batch
        mixed += np.ptp(n) > 0
    assert mixed <= (budget == "spread")


@pytest.mark.parametrize("budget", ["exact", "spread"])
def test_the_budget_is_spent_exactly_within_bounds_and_by_bin(budget):
    rng = np.random.default_rng(7)
    fractional = 0
    for _ in range(600):
        bins, prompts = rng.integers(1, 11), rng.integers(1, 48)
        n_min = int(rng.integers(1, 4))
        n_max = n_min + int(rng.integers(0, 11))
        total = int(rng.integers(n_min, n_max + 1)) * prompts
        if budget == "spread":
            total = int(rng.integers(n_min * prompts, n_max * prompts + 1))
        n_bar = total / prompts
        fractional += not n_bar.is_integer()
        compute = compute_with(random_scores(rng, bins, n_max - n_min + 1), mu=rng.normal(), n_min=n_min, n_max=n_max,
                               n_bar=n_bar, budget=budget, utility=rng.choice(list(UTILITIES)))
        bin_P = rng.choice(bins, prompts, p=rng.dirichlet(np.full(bins, 0.5)))
        check_counts(bin_P, compute.allocate(bin_P), total=total, n_min=n_min, n_max=n_max, budget=budget)
    assert fractional == 0 if budget == "exact" else fractional > 240


@pytest.mark.parametrize("prompts, total", [(100, 435), (1000, 4001), (7, 29)])
def test_a_total_that_is_whole_up_to_rounding_is_met(prompts, total):
    """4.35 * 100 is 434.99999999999994."""
    compute = RolloutGDRO(2, n_bar=total / prompts, budget="spread")
    assert compute.allocate(np.arange(prompts) % 2).sum() == total


@pytest.mark.parametrize("budget", ["exact", "spread"])
@pytest.mark.parametrize("utility", UTILITIES)
def test_allocation_is_the_best_configuration_and_its_price_the_difference_quotient(utility, budget):
    """Bandit utilities: the most probable configuration. Known ones: (19), bins weighed by their share."""
    rng = np.random.default_rng(5)
    by_share = utility not in ("surrogate", "official")
    gamma = 0.1
    for _ in range(60):
        arms_K = np.arange(2, 2 + rng.integers(2, 6))
        score_BK, mu = rng.normal(0, 1.5, (4, len(arms_K))), rng.normal(0, 0.3)
        n_bar = int(rng.integers(arms_K[0], arms_K[-1] + 1))
        compute = compute_with(score_BK, mu=mu, n_max=int(arms_K[-1]), n_bar=n_bar, gamma=gamma, utility=utility,
                               budget=budget)
        bin_P = rng.choice(4, 14, p=[0.1, 0.5, 0, 0.4])
        n_P = compute.allocate(bin_P)

        present, count = np.unique(bin_P, return_counts=True)
        value = np.log(paper_probabilities(score_BK, arms_K, eta=0.65, gamma=gamma, mu=mu))[present]
        if by_share:
            value = 0.65 * (score_BK - mu * arms_K)[present] * count[:, None]
        optima = brute_optima(value, count, budget == "spread")
        extra = int(n_P.sum()) - 2 * 14
        mean_n = [n_P[bin_P == b].mean() for b in present]
        achieved = sum(np.interp(n, arms_K, v) for n, v in zip(mean_n, value, strict=True))
        assert achieved == pytest.approx(optima[extra], abs=1e-5)
        low = max((t for t in optima if t < extra), default=extra)
        high = min((t for t in optima if t > extra), default=extra)
        assert compute.shadow_price_dp == pytest.approx((optima[high] - optima[low]) / (high - low), abs=1e-5)


def test_exact_budgets_can_leave_one_configuration_and_spread_ones_do_not():
    """PAPER.md, section 9: 45 and 19 prompts, mean 4."""
    bin_P = np.repeat([3, 8], [45, 19])
    assert [(a, b) for a in range(2, 13) for b in range(2, 13) if 45 * a + 19 * b == 4 * 64] == [(4, 4)]
    score_BK = np.zeros((10, 11))
    score_BK[3] = 10 * np.arange(11)  # bin 3 wants many, bin 8 few
    score_BK[8] = -10 * np.arange(11)
    assert np.all(compute_with(score_BK, budget="exact").allocate(bin_P) == 4)
    n_P = compute_with(score_BK, budget="spread").allocate(bin_P)
    assert n_P.sum() == 256
    assert np.all(n_P[bin_P == 8] == 2)
    assert sorted(n_P[bin_P == 3].tolist()) == [4] * 7 + [5] * 38  # 256 - 38 = 218 = 45 * 4 + 38


@pytest.mark.parametrize("budget", ["exact", "spread"])
@pytest.mark.parametrize("utility", UTILITIES)
def test_allocation_is_uniform_when_nothing_was_observed_and_when_eta_is_zero(utility, budget):
    rng = np.random.default_rng(2)
    for n_bar in (2, 4, 7, 12):
        for _ in range(5):
            bin_P = rng.integers(0, 6, 40)
            fresh = RolloutGDRO(6, n_bar=n_bar, utility=utility, budget=budget)
            assert np.all(fresh.allocate(bin_P) == n_bar)
            indifferent = compute_with(rng.normal(size=(6, 11)), n_bar=n_bar, utility=utility, budget=budget, eta=0)
            assert np.all(indifferent.allocate(bin_P) == n_bar)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("utility", UTILITIES)
def test_one_arm_is_grpo_uniform_always(utility, budget):
    rng = np.random.default_rng(0)
    compute = RolloutGDRO(5, n_min=4, n_max=4, n_bar=4, utility=utility, budget=budget)
    for bin_P, loss_P in random_batches(rng, 15, 5):
        n_P = compute.allocate(bin_P)
        assert np.all(n_P == 4)
        assert compute.shadow_price_dp is None
        compute.update(bin_P, n_P, loss_P, rng.integers(0, 5, len(bin_P)))
    assert compute.state_dict()["mu"] == 0


def test_an_exact_budget_that_cannot_be_met_raises_and_names_the_remedy():
    bin_P = np.repeat([0, 1], [45, 19])
    assert not [1 for a in range(2, 13) for b in range(2, 13) if 45 * a + 19 * b == 4.5 * 64]
    with pytest.raises(ValueError, match="no arms meet.*45, 19.*whole n_bar or budget 'spread'"):
        RolloutGDRO(2, n_bar=4.5, budget="exact").allocate(bin_P)
    assert RolloutGDRO(2, n_bar=4.5, budget="spread").allocate(bin_P).sum() == 288
    assert RolloutGDRO(2, n_bar=4.5, budget="exact").allocate(np.repeat([0, 1], [32, 32])).sum() == 288


@pytest.mark.parametrize("budget", ["exact", "spread"])
def test_a_total_that_is_not_whole_raises(budget):
    with pytest.raises(ValueError, match="3 prompts of 4.5 rollouts.*not a whole number"):
        RolloutGDRO(2, n_bar=4.5, budget=budget).allocate(np.array([0, 1, 1]))


def test_allocation_follows_the_prompts_when_the_batch_is_permuted():
    rng = np.random.default_rng(4)
    for _ in range(50):
        bin_P, order = rng.integers(0, 5, 32), rng.permutation(32)
        score_BK = rng.normal(0, 2, (5, 11))
        exact = compute_with(score_BK, budget="exact")
        np.testing.assert_array_equal(exact.allocate(bin_P[order]), exact.allocate(bin_P)[order])
        spread = compute_with(score_BK, budget="spread")
        np.testing.assert_array_equal(np.bincount(bin_P[order], spread.allocate(bin_P[order])),
                                      np.bincount(bin_P, spread.allocate(bin_P)))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("utility", UTILITIES)
def test_allocate_changes_no_state_and_repeats_itself(utility, budget):
    rng = np.random.default_rng(0)
    score_BK, bin_P = rng.normal(0, 2, (5, 11)), rng.integers(0, 5, 40)
    compute = compute_with(score_BK, mu=0.2, step=9, utility=utility, budget=budget)
    before = compute.state_dict()
    first = compute.allocate(bin_P)
    assert_same_state(compute.state_dict(), before)
    np.testing.assert_array_equal(compute.allocate(bin_P), first)
    twin = compute_with(score_BK, mu=0.2, step=9, utility=utility, budget=budget)
    np.testing.assert_array_equal(twin.allocate(bin_P), first)


# ----------------------------------------------------------------------- Rollout-GDRO: the dual budget, the price


def test_arm_probabilities_match_eq_20():
    rng = np.random.default_rng(0)
    for gamma, mu, eta in itertools.product([0, 0.01, 0.5, 1], [-0.4, 0, 0.7], [0, 0.65, 2]):
        score_BK = random_scores(rng, 4, 11).clip(-20, 20)
        compute = compute_with(score_BK, mu=mu, gamma=gamma, eta=eta)
        p_BK = np.exp(compute.log_prob_BK())
        np.testing.assert_allclose(p_BK, paper_probabilities(score_BK, np.arange(2, 13), eta=eta, gamma=gamma, mu=mu),
                                   rtol=1e-9)
        assert np.all(p_BK >= gamma / 11 * (1 - 1e-9))


def test_log_probabilities_stay_finite_where_an_arm_underflows():
    log_p_BK = compute_with([[0.0, -1e6, -1e6]], n_max=4, n_bar=3, gamma=0).log_prob_BK()
    assert np.all(np.isfinite(log_p_BK)) and log_p_BK[0, 0] == 0 and np.all(log_p_BK[0, 1:] < -600)


def test_dual_draws_arms_by_their_probabilities_and_independently_by_bin():
    rng = np.random.default_rng(0)
    score_BK, bin_P, draws = rng.normal(0, 1, (4, 5)), np.array([3, 1, 3, 1, 1]), 8000
    settings = dict(mu=0.1, n_min=2, n_max=6, gamma=0.1, budget="dual", seed=3)
    compute = compute_with(score_BK, **settings)
    played = np.empty((draws, 2), int)
    for step in range(draws):
        compute.load_state_dict({**compute.state_dict(), "step": np.array(step)})
        n_P = compute.allocate(bin_P)
        assert n_P[0] == n_P[2] and n_P[1] == n_P[3] == n_P[4]  # one count a bin
        played[step] = n_P[0], n_P[1]
    assert compute.shadow_price_dp is None
    p_BK = paper_probabilities(score_BK, np.arange(2, 7), eta=0.65, gamma=0.1, mu=0.1)
    for column, b in enumerate([3, 1]):
        frequency_K = np.bincount(played[:, column], minlength=7)[2:] / draws
        assert np.all(np.abs(frequency_K - p_BK[b]) < 4 * np.sqrt(p_BK[b] * (1 - p_BK[b]) / draws))
    assert abs(np.corrcoef(played.T)[0, 1]) < 4 / math.sqrt(draws)
    assert abs(np.corrcoef(played[1:, 0], played[:-1, 0])[0, 1]) < 4 / math.sqrt(draws)
    other = [compute_with(score_BK, **{**settings, "seed": 4, "step": s}).allocate(bin_P)[0] for s in range(50)]
    assert played[:50, 0].tolist() != other


def test_mu_moves_by_alpha_times_the_excess():
    compute = RolloutGDRO(3, n_bar=4, alpha_mu=0.5, budget="dual")
    mu = 0.0
    for n_P in ([2, 2, 2], [12, 3, 5], [4, 4, 4], [9, 2, 6]):
        compute.update(np.arange(3), np.array(n_P), np.zeros(3), np.zeros(3, int))
        mu += 0.5 * (sum(n_P) / 3 - 4)
        assert compute.state_dict()["mu"] == pytest.approx(mu)
    assert compute.state_dict()["step"] == 4


def test_mu_never_moves_under_budgets_that_are_met():
    rng = np.random.default_rng(0)
    for budget in ("exact", "spread"):
        compute = RolloutGDRO(5, budget=budget, alpha_mu=1)
        for bin_P, loss_P in random_batches(rng, 20, 5):
            compute.update(bin_P, compute.allocate(bin_P), loss_P, np.zeros(len(bin_P), int))
        assert compute.state_dict()["mu"] == 0


def dual_means(alpha_mu, steps=600):
    """Mean rollouts a prompt of each step where every rollout more is worth 0.3 to its bin."""
    rng = np.random.default_rng(0)
    compute = RolloutGDRO(8, alpha_mu=alpha_mu, budget="dual", seed=1)
    means = []
    for _ in range(steps):
        bin_P = rng.integers(0, 8, 32)
        n_P = compute.allocate(bin_P)
        compute.update(bin_P, n_P, -0.3 * n_P, np.zeros(32, int))
        means.append(n_P.mean())
    return np.array(means)


def test_the_price_holds_the_mean_near_n_bar_over_time():
    assert dual_means(alpha_mu=0)[200:].mean() > 7  # unpriced, the bandits want far more than 4
    assert abs(dual_means(alpha_mu=0.05)[200:].mean() - 4) < 0.2


# -------------------------------------------------------------------------------------- Rollout-GDRO: the scores


@pytest.mark.parametrize("utility", UTILITIES)
def test_arm_scores_are_an_ema_of_the_utility_from_its_first_visit(utility):
    rng = np.random.default_rng(8)
    arms = range(1, 6)
    compute = RolloutGDRO(4, n_min=1, n_max=5, n_bar=3, beta=0.3, utility=utility)
    score = {}
    for bin_P, loss_P in random_batches(rng, 40, 4, prompts=9):
        n_P = rng.integers(1, 6, 9)
        correct_P = rng.binomial(n_P, 0.3)
        seen = {}  # (bin, n) -> utility
        for b in set(bin_P.tolist()):
            mine = [(int(n), int(c), x) for n, c, x, d in zip(n_P, correct_P, loss_P, bin_P, strict=True) if d == b]
            if utility in ("surrogate", "official"):  # (17)-(18): only arms that were played
                sign = -1 if utility == "surrogate" else 1
                for arm in {n for n, _, _ in mine}:
                    seen[b, arm] = sign * np.mean([x for n, _, x in mine if n == arm])
            elif utility == "variance":  # (28)
                spread = [np.var([1] * c + [-1] * (n - c), ddof=1) for n, c, _ in mine if n > 1]
                if spread:
                    seen |= {(b, arm): -np.mean(spread) / arm for arm in arms}
            else:
                rate = (sum(c for _, c, _ in mine) + 0.5) / (sum(n for n, _, _ in mine) + 1)
                rule = {"gain": lambda n, p: brute_gain(n, p, 8), "knapsack": brute_knapsack, "rank": lambda n, p: p,
                        "gain_per_rollout": lambda n, p: brute_gain(n, p, 8) / n, "coverage": brute_coverage,
                        "likelihood": lambda n, p: sum((1 - p) ** i for i in range(n))}
                seen |= {(b, arm): rule[utility](arm, rate) for arm in arms}
        if utility == "rank":  # from n_min = 1 for the easiest to 1 + 2 (n_bar - n_min) = 5 for the hardest
            order = sorted({(-p, b) for (b, _), p in seen.items()})
            place = {b: 1 + 4 * i / max(len(order) - 1, 1) for i, (_, b) in enumerate(order)}
            seen = {(b, arm): -((arm - place[b]) ** 2) for b, arm in seen}
        for key, u in seen.items():
            score[key] = 0.7 * score[key] + 0.3 * u if key in score else u
        compute.update(bin_P, n_P, loss_P, correct_P)
        expected = [[score.get((b, arm), np.nan) for arm in arms] for b in range(4)]
        np.testing.assert_allclose(compute.state_dict()["score"], expected, rtol=1e-9, atol=1e-12)


def test_surrogate_prefers_arms_of_low_loss_and_official_arms_of_high_loss():
    bin_P, n_P, loss_P = np.repeat([0, 1], 2), np.array([2, 6, 2, 6]), np.array([-1.0, 1.0, 1.0, -1.0])
    for utility, many in (("surrogate", 1), ("official", 0)):
        compute = RolloutGDRO(2, n_max=6, utility=utility)
        compute.update(bin_P, n_P, 3 * loss_P, np.zeros(4, int))
        assert compute.allocate(bin_P)[bin_P == many].min() > 4 > compute.allocate(bin_P)[bin_P != many].max()


def brute_knapsack(n, p):
    """The chance that n rollouts are neither all right nor all wrong, over all outcomes, times p (1-p)^2."""
    mixed = [p ** sum(o) * (1 - p) ** (n - sum(o)) for o in itertools.product([0, 1], repeat=n) if 0 < sum(o) < n]
    return sum(mixed) * p * (1 - p) ** 2


def brute_coverage(n, p):
    """The chance that one of n rollouts is right, over all outcomes."""
    return sum(p ** sum(o) * (1 - p) ** (n - sum(o)) for o in itertools.product([0, 1], repeat=n) if any(o))


def brute_gain(n, p, k):
    """Over all 2^n outcomes: k (1-p)^(k-1) E[sum of the positive advantages (3)]."""
    expected = 0.0
    for reward in itertools.product([-1, 1], repeat=n):
        right = reward.count(1)
        if 0 < right < n:
            r = np.array(reward)
            advantage = (r - r.mean()) / r.std()
            expected += p**right * (1 - p) ** (n - right) * advantage[advantage > 0].sum()
    return k * (1 - p) ** (k - 1) * expected


@pytest.mark.parametrize("k", [1, 8])
def test_expected_gain_equals_enumeration(k):
    arms_K, rate_B = np.array([1, 2, 3, 5, 8]), np.array([0.02, 0.1, 0.5, 0.93])
    brute = [[brute_gain(int(n), float(p), k) for n in arms_K] for p in rate_B]
    np.testing.assert_allclose(expected_gain(arms_K, rate_B, k), brute, rtol=1e-9, atol=1e-15)


def test_expected_gain_equals_monte_carlo_at_the_paper_s_largest_count():
    c = np.random.default_rng(0).binomial(12, 0.15, 200_000)
    sampled = 8 * 0.85**7 * np.sqrt(c * (12 - c)).mean()
    assert expected_gain(np.arange(2, 13), np.array([0.15]))[0, -1] == pytest.approx(sampled, rel=0.01)


def test_expected_gain_is_zero_where_nothing_can_be_learnt_and_unknown_where_nothing_was_seen():
    gain_BK = expected_gain(np.arange(1, 6), np.array([0.0, 1.0, np.nan]))
    assert np.all(gain_BK[:2] == 0) and np.all(np.isnan(gain_BK[2]))


def variance_problem(seed):
    """A `variance` adversary that saw one step, its (v_b, shares) by hand, and the batch to allocate for."""
    rng = np.random.default_rng(seed)
    bin_P = np.repeat(np.arange(4), rng.multinomial(196, np.full(4, 0.25)) + 15)
    rng.shuffle(bin_P)
    correct_P = rng.binomial(8, np.array([0.03, 0.1, 0.25, 0.5])[bin_P])
    compute = RolloutGDRO(4, n_min=1, n_max=40, n_bar=8, gamma=0, utility="variance", budget="spread")
    compute.update(bin_P, np.full(256, 8), rng.normal(size=256), correct_P)
    v_P = np.array([np.var([1] * c + [-1] * (8 - c), ddof=1) for c in correct_P])
    v_B = np.array([v_P[bin_P == b].mean() for b in range(4)])
    return compute, bin_P, v_B, np.bincount(bin_P) / 256


@pytest.mark.parametrize("seed", range(5))
def test_the_variance_utility_approaches_the_square_root_rule_of_theorem_4_2(seed):
    compute, bin_P, v_B, share_B = variance_problem(seed)
    n_P = compute.allocate(bin_P)
    optimal_n_B = 8 * np.sqrt(v_B) / (share_B @ np.sqrt(v_B))  # (30)
    optimum = share_B @ (v_B / optimal_n_B)  # (28) at (30)
    achieved = np.mean(v_B[bin_P] / n_P)
    assert optimum * (1 - 1e-12) <= achieved < 1.02 * optimum
    assert achieved < 0.97 * np.mean(v_B[bin_P] / 8)  # and it is worth having
    mean_n_B = np.bincount(bin_P, n_P) / np.bincount(bin_P)
    assert np.all(np.abs(mean_n_B - optimal_n_B) < 1)
    # The DP's price of a rollout is the shadow price whose best response (31), sqrt(v_b / mu), is (30).
    assert np.sqrt(v_B / (compute.shadow_price_dp / 0.65)) == pytest.approx(optimal_n_B, rel=0.12)


def test_known_utilities_need_no_exploration():
    """After one step at equal counts `variance` and `gain` score every arm, `surrogate` only the one it played."""
    bin_P = np.repeat([0, 1, 2], 4)
    for utility, known in (("surrogate", [4]), ("official", [4]), ("variance", range(2, 13)), ("gain", range(2, 13))):
        compute = RolloutGDRO(4, utility=utility)
        compute.update(bin_P, np.full(12, 4), np.ones(12), np.arange(12) % 5)
        score_BK = compute.state_dict()["score"]
        for b in range(3):
            assert (np.flatnonzero(np.isfinite(score_BK[b])) + 2).tolist() == list(known)
        assert np.all(np.isnan(score_BK[3]))


@pytest.mark.parametrize("settings, message", [
    (dict(n_min=0), "1 <= n_min"), (dict(n_min=5, n_bar=4), "n_min <= n_bar"), (dict(n_bar=13), "n_bar <= n_max"),
    (dict(utility="regret"), "utility must be one of"), (dict(budget="about"), "budget one of"),
    (dict(eta=-1), "need eta"), (dict(gamma=1.5), "need eta"), (dict(gamma=-0.5), "need eta"),
    (dict(beta=0), "need eta"), (dict(beta=1.1), "need eta"),
], ids=str)
def test_rollout_gdro_refuses_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        RolloutGDRO(3, **settings)


def test_rollout_gdro_refuses_a_state_of_another_shape():
    for other in (RolloutGDRO(3), RolloutGDRO(4, n_max=11)):
        with pytest.raises(ValueError, match="bins, arms"):
            RolloutGDRO(4).load_state_dict(other.state_dict())


@pytest.mark.parametrize("n", [1, 5])
def test_counts_that_are_no_arm_are_refused(n):
    """n_min 2, n_max 4: five rollouts of bin 0 must not be booked on an arm of bin 1, nor one of bin 1 on bin 0."""
    with pytest.raises(ValueError):
        RolloutGDRO(3, n_min=2, n_max=4, n_bar=3).update(np.array([1]), np.array([n]), np.ones(1), np.zeros(1, int))


def test_a_step_of_single_rollouts_says_nothing_of_variance_and_warns_of_nothing():
    compute = RolloutGDRO(2, n_min=1, n_max=2, n_bar=1, utility="variance")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute.update(np.array([0, 1]), np.array([1, 1]), np.zeros(2), np.array([0, 1]))
    assert np.all(np.isnan(compute.state_dict()["score"]))


# ------------------------------------------------------------------------------------------------------ together


@pytest.mark.parametrize("signal, mean_one", [("surrogate", False), ("reward", True)])
@pytest.mark.parametrize("success", ["rate", "any"])
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
            bin_P = bins.lookup(ids)
            n_P, weight_P = compute.allocate(bin_P), data.weights(bin_P)[bin_P]
            correct_P = np.random.default_rng(seed).binomial(n_P, skill[chosen])
            loss_P = SIGNALS[signal](0.1 * noise_P, 2 * correct_P / n_P - 1, n_P)
            data.update(bin_P, loss_P)
            compute.update(bin_P, n_P, loss_P, correct_P)
            bins.update(ids, correct_P, n_P)
            steps.append((bin_P.tolist(), n_P.tolist(), weight_P.tolist()))
        assert steps[0] == steps[1]
        for old, new in zip(running, resumed, strict=True):
            assert_same_state(old.state_dict(), new.state_dict())
        assert budget == "dual" or n_P.sum() == 48
        assert np.all(np.isfinite(weight_P)) and np.all((0 < weight_P) & (weight_P <= 15))
        assert n_P.min() >= 2 and n_P.max() <= 8
        visited |= set(bin_P.tolist())
    assert len(visited) >= 3
