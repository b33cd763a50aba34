"""Rules of one line: what a prompt's advantages are multiplied by for its own successes, whatever the adversaries do.

With rewards of two values every centred advantage is f(c, n) times GRPO's standardised one, where c of a prompt's n
rollouts are right; so one factor a prompt holds them all. Where all or none are right the advantages are 0 anyway.
"""

from collections.abc import Callable

import numpy as np

TILT = 4.0  # the exponent that Prompt-GDRO's weights have with the signal `reward` and eta_q = 2


def _among_mixed(factor: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray, np.ndarray],
                                                                        np.ndarray]:
    """A rule of p = c / n where 0 < p < 1, and 0 elsewhere."""

    def rule(correct_P: np.ndarray, n_P: np.ndarray, rate_P: np.ndarray) -> np.ndarray:
        p = correct_P / n_P
        mixed = (p > 0) & (p < 1)
        return np.where(mixed, factor(np.where(mixed, p, 0.5)), 0.0)

    return rule


def pass_at_k(correct_P: np.ndarray, n_P: np.ndarray, rate_P: np.ndarray) -> np.ndarray:
    """Pass@k training (arXiv 2508.10751), k = 2: sqrt((1 - R) p / (R (1 - p))), with R = 1 - C(n - c, k) / C(n, k) the
    chance that k of the n rollouts hold a right one. With four rollouts a larger k rewards the first success alone."""
    wrong_P = n_P - correct_P
    missed_P = wrong_P * (wrong_P - 1) / np.maximum(n_P * (n_P - 1), 1)
    mixed = (correct_P > 0) & (wrong_P > 0)
    odds_P = np.divide(correct_P, wrong_P, out=np.zeros(len(n_P)), where=mixed)
    return np.sqrt(np.divide(missed_P * odds_P, 1 - missed_P, out=np.zeros(len(n_P)), where=mixed))


def tilt(correct_P: np.ndarray, n_P: np.ndarray, rate_P: np.ndarray) -> np.ndarray:
    """exp(-TILT p_hat) at mean 1: the weights that Prompt-GDRO tends to when nothing changes."""
    factor_P = np.exp(-TILT * rate_P)
    return factor_P / factor_P.mean()


# name -> rule(correct_P, n_P, rate_P) -> (P,): of a prompt's n_P rollouts correct_P are right; rate_P is its share of
# right ones at earlier visits.
RULES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "grpo": lambda correct_P, n_P, rate_P: np.ones(len(n_P)),
    "dr_grpo": _among_mixed(lambda p: 2 * np.sqrt(p * (1 - p))),  # 2503.20783: +-1 rewards, centred and no more
    "maxrl": _among_mixed(lambda p: np.sqrt((1 - p) / p)),  # 2602.02710: 0/1 rewards over their mean, minus 1
    "pass_at_k": pass_at_k,
    "tilt": tilt,
}
