"""The rules are the papers' formulas, written out rollout by rollout, and keep what GRPO's advantages have."""

import itertools
from math import comb

import numpy as np
import pytest
import torch

from kernels import group_advantage
from rules import RULES, TILT

GROUPS = [(c, n) for n in range(1, 13) for c in range(n + 1)]
CORRECT, N = (np.array(x) for x in zip(*GROUPS, strict=True))
RATE = np.random.default_rng(0).random(len(GROUPS))


def advantages(rule: str) -> list[np.ndarray]:
    """Of each group of GROUPS, the right rollouts first: GRPO's standardised +-1 rewards times the rule's factor."""
    rewards = np.concatenate([np.repeat([1.0, -1.0], [c, n - c]) for c, n in GROUPS])
    offsets = np.concatenate(([0], N.cumsum()))
    weights = torch.from_numpy(RULES[rule](CORRECT, N, RATE))
    found, _ = group_advantage(torch.from_numpy(rewards), torch.from_numpy(offsets), weights, eps=0.0)
    return np.split(found.numpy(), offsets[1:-1])


@pytest.mark.parametrize("rule", RULES)
def test_advantages_of_a_group_sum_to_zero_and_are_finite(rule):
    for (c, n), a in zip(GROUPS, advantages(rule), strict=True):
        assert np.isfinite(a).all() and a.sum() == pytest.approx(0, abs=1e-12)
        assert (a == 0).all() if c in (0, n) else a[0] >= 0


def mixed(rule: str):
    return [(c, n, a) for (c, n), a in zip(GROUPS, advantages(rule), strict=True) if 0 < c < n]


def test_dr_grpo_is_the_centred_reward():
    for c, n, a in mixed("dr_grpo"):
        rewards = np.repeat([1.0, -1.0], [c, n - c])
        np.testing.assert_allclose(a, rewards - rewards.mean(), atol=1e-12)


def test_maxrl_is_the_0_1_reward_over_its_mean_minus_one():
    for c, n, a in mixed("maxrl"):
        rewards = np.repeat([1.0, 0.0], [c, n - c])
        np.testing.assert_allclose(a, (rewards - rewards.mean()) / rewards.mean(), atol=1e-12)


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
            slope += comb(n, c) * p**c * (1 - p) ** (n - c) * gradient
        truncated = sum((1 - p) ** (k - 1) for k in range(1, n))
        assert slope == pytest.approx(truncated, rel=1e-9)


def test_pass_at_2_rewards_pairs_that_hold_a_right_rollout_and_baselines_with_their_mean():
    """The advantage of a rollout is the mean over the pairs it is in of the standardised reward of the pair."""
    for c, n, a in mixed("pass_at_k"):
        right = np.arange(n) < c
        pairs = list(itertools.combinations(range(n), 2))
        reward = np.array([float(right[i] or right[j]) for i, j in pairs])
        if reward.std() == 0:
            assert np.allclose(a, 0)
            continue
        score = (reward - reward.mean()) / reward.std()
        expected = np.array([np.mean([s for s, pair in zip(score, pairs, strict=True) if i in pair])
                             for i in range(n)])
        np.testing.assert_allclose(a, expected, atol=1e-12)


def test_tilt_is_the_shape_of_prompt_gdro_at_mean_one_and_looks_at_the_past_alone():
    factor = RULES["tilt"](CORRECT, N, RATE)
    assert factor.mean() == pytest.approx(1)
    i, j = RATE.argmin(), RATE.argmax()
    assert factor[i] / factor[j] == pytest.approx(np.exp(TILT * (RATE[j] - RATE[i])))
    np.testing.assert_array_equal(factor, RULES["tilt"](N - CORRECT, N, RATE))
