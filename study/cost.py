"""What the way to a level costs: the rollouts, or tokens, after which a run's curve of pass@8 first stands there.

S bases, E evaluations of a run, the base's first. Costs are compared by their logs, base by base.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import isotonic_regression
from scipy.stats import permutation_test

from metrics import bootstrap
from study.logs import Run, by_base, headline

BELOW = 2.0  # points under the end that is to be reached: what noise at the end would else decide
CEILING = 95.0  # of a level, in percent

SPENT: dict[str, Callable[[dict], float]] = {  # by one step, whose line of the log is given
    "rollouts": lambda line: line["rollouts"],
    "tokens generated": lambda line: line["tokens_generated"],
    # Groups whose rollouts all scored alike are not trained on; their lengths are taken for those of the others.
    "tokens trained": lambda line: line["tokens_trained"] * (1 - line["zero_std_rollouts_frac"]),
}


def spent(run: Run, what: str = "rollouts") -> np.ndarray:
    """What the run had spent when it was evaluated, (E,)."""
    so_far = np.concatenate(([0], np.cumsum([SPENT[what](line) for line in run.log])))
    return so_far[[e["step"] for e in run.evaluations]]


def fitted(run: Run) -> np.ndarray:
    """Its curve of pass@8 in percent, (E,): the nearest one that never falls, by pooling adjacent violators."""
    return isotonic_regression([100 * headline(e) for e in run.evaluations]).x


def level(runs: Sequence[Run]) -> float:
    """Where these runs end in the mean, less BELOW points, at most CEILING."""
    return min(float(np.mean([fitted(run)[-1] for run in runs])) - BELOW, CEILING)


def cost(run: Run, level: float, what: str = "rollouts", beyond: float = 1.0) -> float:
    """What the run spent until its fitted curve, straight between evaluations, crosses `level`: at least what the first
    evaluation after the base's took, and, for one that never crosses, the whole run's times `beyond`."""
    x_E, y_E = spent(run, what), fitted(run)
    above = np.flatnonzero(y_E >= level)
    if not len(above):
        return float(x_E[-1] * beyond)
    i = above[0]
    crossing = x_E[i] if not i else np.interp(level, y_E[i - 1 : i + 1], x_E[i - 1 : i + 1])
    return float(max(crossing, x_E[1]))


def log_costs(runs: Sequence[Run], levels: dict[int, float], **how) -> np.ndarray:
    """Log of what each base's runs cost in the mean over its seeds, (S,), in the order of `levels`, base -> level."""
    of = by_base(list(runs))
    return np.array([np.mean([np.log(cost(run, levels[base], **how)) for run in of[base]]) for base in levels])


def at_bounds(runs: Sequence[Run], levels: dict[int, float]) -> tuple[int, int]:
    """How many of the runs stand at the level by their first evaluation, and how many never do."""
    costs = [(run, cost(run, levels[run.base], beyond=2.0)) for run in runs if run.base in levels]
    return (sum(c == spent(run)[1] for run, c in costs), sum(c > spent(run)[-1] for run, c in costs))


def ratio(difference_S: np.ndarray) -> tuple[float, float, float]:
    """Of differences of log costs: the ratio of costs, and its 95% interval by the bootstrap over bases."""
    low, high = bootstrap(difference_S[:, None])
    return tuple(float(np.exp(x)) for x in (difference_S.mean(), low[0], high[0]))


def sign_flip(difference_S: np.ndarray) -> float:
    """p that the mean is 0, two-sided: the share of all 2^S choices of signs that put it as far away."""
    return float(permutation_test((difference_S,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue)


def answer(difference_S: np.ndarray, p: float) -> str:
    """Whether the first of two rows costs less, by the rule that was fixed before any run; p: Holm's."""
    value, low, high = ratio(difference_S)
    if p < 0.05 and value < 1:
        return "yes"
    return "no" if value >= 1 or (low > 0.9 and high < 1.1) else "undecided"
