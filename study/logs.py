"""Logs and what is computed from them: the numbers behind every figure and table (each function is tested).

A bin that no prompt of a batch was in is absent (NaN), never zero. Suffixes name axes: T steps, B bins (0 = hardest),
S bases, E evaluations.
"""

import functools
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy.stats import ttest_1samp

from metrics import headline_k, whole_lines
from study.rows import BOTH_TASKS, HERE, PARTS

RESULTS = HERE / "results" / "study"
MODES = {"grpo": "GRPO", "prompt": "Prompt-GDRO", "rollout": "Rollout-GDRO", "both": "both"}
TAIL = 0.6  # tail averages are over the steps at or past this quantile

# ------------------------------------------------------------------------------------------------ logs


class Missing(ValueError):
    """A figure or table needs something that the logs do not hold."""


@dataclass(frozen=True)
class Run:
    """What a run folder holds: config.json, metrics.jsonl, and eval.json if there is one."""

    name: str  # the folder's
    config: dict
    log: list[dict]
    evaluations: list[dict]
    decoded: dict = field(default_factory=dict)  # the last policy's figures, decoded as the paper does; of some rows

    @classmethod
    def load(cls, folder: Path) -> "Run":
        settings, log, evaluations = (folder / name for name in ("config.json", "metrics.jsonl", "eval.json"))
        if "mode" not in (config := json.loads(settings.read_text()) if settings.exists() else {}):
            raise Missing(f"{folder} is no run folder: it has no config.json of a run (best/ and model/ are of models)")
        return cls(folder.resolve().name, config, whole_lines(log) if log.exists() else [],
                   json.loads(evaluations.read_text()) if evaluations.exists() else [])

    @property
    def subject(self) -> str:
        """What was trained on what: "Qwen3-1.7B-Base on dapo", or "arithmetic", a task's own base on the task."""
        model, data = last_name(self.config["model"]), last_name(self.config["train_data"])
        return model if model == data else f"{model} on {data}"

    @property
    def mode(self) -> str:
        return self.config["mode"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def base(self) -> int:
        """Number of the base model that a run of the study began from."""
        return int(self.config["model"].split(":")[1])

    @property
    def steps(self) -> np.ndarray:
        return np.array([line["step"] for line in self.log])

    @property
    def share(self) -> np.ndarray:
        """Of a batch's prompts, by bin, (T, B): 0 where the bin is absent."""
        return self.series("bins", "share")

    def bins(self, key: str) -> np.ndarray:
        """What the log has of bins under a key, (T, B): NaN where the bin is absent from the step."""
        return np.where(self.share > 0, self.series("bins", key), np.nan)

    def series(self, *path: str) -> np.ndarray:
        """The values of one key of every line, e.g. series("bins", "share"): (T,) or (T, B), NaN for null. Raises
        Missing where a line has none."""
        if not self.log:
            raise Missing(f"{self.name}: metrics.jsonl has no step yet")
        values = self.log
        for key in path:
            if any(key not in v for v in values):
                raise Missing(f"{self.name}: metrics.jsonl has no {'/'.join(path)} in some lines")
            values = [v[key] for v in values]
        return np.array(values, float)

    def last(self) -> dict:
        return self.evaluations[-1]


def last_name(source: str) -> str:
    """data/mine.jsonl -> mine, Qwen/Qwen3-1.7B-Base -> Qwen3-1.7B-Base, arithmetic:3 -> arithmetic"""
    path, task = Path(source), source.partition(":")[0]
    return task if task in BOTH_TASKS else path.stem if path.suffix in (".jsonl", ".json", ".parquet") else path.name


# ------------------------------------------------------------------------------------------------ the study's

Sweep = dict[float, list[Run]]  # learning rate -> the runs at it, by base model


def row_file(task: str, row: str) -> Path:
    return RESULTS / task / f"{row}.jsonl.gz"


def kept_lines(file: Path) -> dict[str, str]:
    """Name of a run -> its line, of all that a row's file holds. Names come first: none is parsed for them."""
    if not file.exists():
        return {}
    with gzip.open(file, "rt") as lines:
        return {line.split('"', 4)[3]: line for line in lines}


@functools.cache
def sweeps() -> dict[str, dict[str, Sweep]]:
    """task -> row -> its complete runs, in the order of rows.py; a task or row without any is left out."""
    found: dict[str, dict[str, Sweep]] = {}
    for row in (row for part in PARTS.values() for row in part):
        for task in row.rates:
            sweep: Sweep = {}
            for line in kept_lines(row_file(task, row.name)).values():
                run = Run(**json.loads(line))
                sweep.setdefault(run.config["learning_rate"], []).append(run)
            if sweep:
                found.setdefault(task, {})[row.name] = dict(sorted(sweep.items()))
    return found


@functools.cache
def study() -> dict[str, dict[str, list[Run]]]:
    """task -> row -> one run a base, by base, at its cross-fitted rate."""
    return {task: {row: cross_fitted(sweep) for row, sweep in rows.items()} for task, rows in sweeps().items()}


# ------------------------------------------------------------------------------------------------ what is computed


def stages(steps: int, count: int = 4) -> np.ndarray:
    """Evenly spaced steps from the first to the last, as indices; fewer when there are fewer."""
    return np.unique(np.linspace(0, steps - 1, count).round().astype(int))


def tail(x_T: np.ndarray) -> np.ndarray:
    """Mean over the steps from the 60th percentile on; NaN only where a bin was absent from all of them."""
    late = x_T[int(np.ceil(TAIL * (len(x_T) - 1))):]
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.nansum(late, axis=0) / np.isfinite(late).sum(axis=0)


def normalised(x_TB: np.ndarray) -> np.ndarray:
    """Rows that sum to 1; NaN counts as 0."""
    x_TB = np.nan_to_num(x_TB)
    return x_TB / x_TB.sum(axis=-1, keepdims=True)


def mean_bin(x_TB: np.ndarray) -> np.ndarray:
    """Mean bin index under the normalised rows, (T,)."""
    return normalised(x_TB) @ np.arange(x_TB.shape[-1])


def mass_from(x_TB: np.ndarray, low: int) -> np.ndarray:
    """Mass in the bins from `low` on, (T,)."""
    return normalised(x_TB)[..., low:].sum(axis=-1)


def entropy(x_TB: np.ndarray) -> np.ndarray:
    """Shannon entropy of the normalised rows in nats, (T,)."""
    p = normalised(x_TB)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=-1)


def lead_lag(weight_TB: np.ndarray, share_TB: np.ndarray) -> np.ndarray:
    """(32): how many bins the mean of the weights lies above that of the prompts, (T,).

    Weights are normalised over all bins, so equal ones do not give 0 but (B - 1) / 2 minus the prompts' mean bin.
    """
    return mean_bin(weight_TB) - mean_bin(share_TB)


def budget_share(run: Run) -> np.ndarray:
    """Share of a step's rollouts that each bin was given, (T, B)."""
    return normalised(run.share * np.nan_to_num(run.bins("rollouts")))


def bin_sigma(runs: list[Run]) -> np.ndarray:
    """sigma_b of (33), (B,): root of the mean within-prompt variance of the reward, once for all steps and runs; NaN
    for a bin never seen."""
    share = np.concatenate([r.share for r in runs])
    variance = np.concatenate([r.series("signals", "variance", "mean") for r in runs])
    with np.errstate(invalid="ignore"):  # 0 / 0
        return np.sqrt(np.nansum(share * variance, axis=0) / (share * np.isfinite(variance)).sum(axis=0))


def wse(share_TB: np.ndarray, sigma_B: np.ndarray, rollouts_TB: np.ndarray) -> np.ndarray:
    """(33): sum_b q_b sigma_b / sqrt(n_b) over the bins present, (T,)."""
    return np.where(share_TB > 0, share_TB * sigma_B / np.sqrt(np.where(share_TB > 0, rollouts_TB, 1)), 0).sum(axis=-1)


def square_root_law(share_TB: np.ndarray, sigma_B: np.ndarray, n_bar: float) -> np.ndarray:
    """(30) with the variances known: n_b = n_bar sigma_b / sum_j q_j sigma_j, not rounded, (T, B)."""
    sigma_B = np.nan_to_num(sigma_B)
    return n_bar * sigma_B / (share_TB * sigma_B).sum(axis=-1, keepdims=True)


def interval(x_S: np.ndarray) -> tuple[float, float, float]:
    """Mean over two seeds or more and its 95% t-interval."""
    low, high = ttest_1samp(x_S, 0).confidence_interval()
    return float(np.mean(x_S)), float(low), float(high)


def p_value(x_S: np.ndarray) -> float:
    """Of the two-sided t-test that the mean is 0."""
    return float(ttest_1samp(x_S, 0).pvalue)


def holm(p_M: list[float]) -> list[float]:
    """Holm's adjustment of M p-values: the chance of one or more false findings among all that stay below it."""
    adjusted, least = dict.fromkeys(range(len(p_M)), 0.0), 0.0
    for place, m in enumerate(sorted(range(len(p_M)), key=p_M.__getitem__)):
        least = adjusted[m] = max(least, min(1.0, (len(p_M) - place) * p_M[m]))
    return list(adjusted.values())


def headline(evaluation: dict) -> float:
    """pass@8, or that of the largest k that there is."""
    return evaluation["passes"][f"pass@{headline_k(evaluation['rollouts'])}"]


def mean_success(evaluation: dict) -> float:
    """pass@1, from all that were drawn."""
    return evaluation["mean"]


def cross_fitted(sweep: Sweep) -> list[Run]:
    """Of each base its runs at the rate whose headline is best in the mean over the OTHER bases, so that no base has a
    say in what it reports. Of bases that have runs at every rate."""
    at = {rate: by_base(runs) for rate, runs in sweep.items()}
    bases = sorted(set.intersection(*map(set, at.values())))

    def elsewhere(rate: float, base: int) -> float:
        return sum(mean_over(headline, at[rate][other]) for other in bases if other != base)

    return [run for base in bases for run in at[max(at, key=lambda rate: elsewhere(rate, base))][base]]


def by_base(runs: list[Run]) -> dict[int, list[Run]]:
    """Number of a base -> its runs, one or more seeds."""
    return {base: [r for r in runs if r.base == base] for base in sorted({r.base for r in runs})}


def mean_over(figure: Callable[[dict], float], runs: list[Run]) -> float:
    """Of a figure of their last evaluations."""
    return float(np.mean([figure(r.last()) for r in runs]))


def paired(runs: list[Run], baseline: list[Run], figure: Callable[[dict], float]) -> np.ndarray:
    """Differences in points of a figure of the last evaluations, by the bases in both, (S,): a base's seeds are
    averaged, and it moves the figures as much as a mode. Raises ValueError where a base is not the same in both."""
    ours, theirs = by_base(runs), by_base(baseline)
    both = [base for base in ours if base in theirs]
    for a, b in ((a, b) for base in both for a in ours[base] for b in theirs[base]):
        if a.config["loaded"]["model"]["head"] != b.config["loaded"]["model"]["head"]:
            raise ValueError(f"{a.name} and {b.name} began from different base models and cannot be compared")
    return np.array([100 * (mean_over(figure, ours[base]) - mean_over(figure, theirs[base])) for base in both])
