"""What an evaluation says: mean@k, pass@k and their intervals, of one policy on one set of problems.

    mean@m  the mean share of right responses among the m drawn for each problem
    pass@k  the chance that at least one of k responses is right, estimated without bias from the m >= k drawn:
            1 - C(m - c, k) / C(m, k) for c right ones
    [a, b]  95% interval: percentiles of the bootstrap over problems, or `intervals` says what where all are alike;
            unknown, [null, null], for one problem

And how the files are read in which such things are logged.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb
from pathlib import Path

import numpy as np


def pass_at_k(correct: np.ndarray, drawn: int, k: int) -> np.ndarray:
    """Unbiased pass@k of problems with `correct` (P,) right responses of `drawn`, (P,). Needs k <= drawn."""
    table = np.array([1 - comb(drawn - c, k) / comb(drawn, k) for c in range(drawn + 1)])
    return table[np.asarray(correct)]


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of the means over problems of values (P, figures): their ends, (figures,) each. What is drawn is a
    function of the shape alone."""
    P = len(values)
    counts = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), size=draws)  # (draws, P)
    return tuple(np.percentile(counts @ values / P, (2.5, 97.5), axis=0))


def intervals(values: np.ndarray, least: float = 0.0) -> list[list[float | None]]:
    """[low, high] of the mean over problems of each column of values (P, figures), which lie between `least` and 1.

    Where all P problems are alike, so is every draw of the bootstrap, and [0, 0] reads as certainty. They tell that
    others are rare: if a share u of problems were others, P in a row without one would have the chance (1 - u)^P, 2.5%
    at u = 1 - 0.025^(1/P). Those may be anything, so the mean lies within u of the way to `least` or 1. For none right,
    or all, it is the exact interval of Clopper and Pearson: [0, 3.7 / P] for many problems.
    """
    if len(values) == 1:  # which says nothing of the spread over problems
        return [[None, None]] * values.shape[1]
    value, u = values[0], 1 - 0.025 ** (1 / len(values))
    if_alike = value - u * (value - least), value + u * (1 - value)
    return np.where(np.ptp(values, axis=0) == 0, if_alike, bootstrap(values)).T.tolist()


def figures(right: np.ndarray) -> dict[str, list[float | None]]:
    """name -> [value, low, high] for mean@m and pass@1, 2, 4, ... up to m. right: (P, m) bool."""
    drawn = right.shape[1]
    by_problem = {f"mean@{drawn}": right.mean(axis=1)}  # (P,) each
    for k in (2**i for i in range(drawn.bit_length())):
        by_problem[f"pass@{k}"] = pass_at_k(right.sum(axis=1), drawn, k)
    ends = intervals(np.stack(list(by_problem.values()), axis=1))
    return {name: [float(values.mean()), *end] for (name, values), end in zip(by_problem.items(), ends, strict=True)}


def headline_k(drawn: int) -> int:
    """The k of the one pass@k that is shown first: 8 as in the paper, or the largest power of two up to `drawn`."""
    return min(8, 1 << drawn.bit_length() - 1)


def by_kind(kinds: list[str], right: np.ndarray) -> dict[str, list[float]]:
    """kind -> [problems, mean, pass@k] with headline_k. kinds: (P,), "" = "all"; right: (P, m) bool."""
    passed_P = pass_at_k(right.sum(axis=1), right.shape[1], headline_k(right.shape[1]))
    kind_P = np.array([kind or "all" for kind in kinds])
    return {str(kind): [int((kind_P == kind).sum()), float(right[kind_P == kind].mean()),
                        float(passed_P[kind_P == kind].mean())] for kind in dict.fromkeys(kind_P)}


def ungraded(responses: int, timeouts: int, failures: int) -> str:
    """What to say of those among `responses` that count as wrong for want of a verdict; "" where there are none."""
    if not timeouts + failures:
        return ""
    warning = "WARNING: " if 2 * (timeouts + failures) > responses else ""
    return f"{warning}of {responses} responses {timeouts} timed out in grading, {failures} failed, and count as wrong"


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation during training, by the names that they have in eval.json."""

    step: int  # training steps before it
    problems: int
    rollouts: int  # responses drawn per problem
    mean: float  # mean@rollouts
    passes: dict[str, float]  # "pass@1", "pass@2", "pass@4", ... up to rollouts
    response_tokens_mean: float
    truncated_frac: float
    by_kind: dict[str, list[float]]  # kind of problem -> [problems, mean, pass@k]
    intervals: dict[str, list[float | None]] = field(default_factory=dict)  # "mean@16" and so on -> [low, high], 95%
    timeouts: int = 0  # responses that were not graded in time, and count as wrong
    failures: int = 0  # over which the grader, or a reward of one's own, raised

    @classmethod
    def of(cls, step: int, kinds: list[str], right: np.ndarray, response_tokens_mean: float, truncated_frac: float,
           timeouts: int = 0, failures: int = 0) -> "Evaluation":
        """kinds: of the P problems, "" = of none in particular; right: (P, rollouts) bool."""
        found = figures(right)
        passes = {name: f[0] for name, f in found.items() if name.startswith("pass@")}
        return cls(step, len(kinds), right.shape[1], float(right.mean()), passes, response_tokens_mean,
                   truncated_frac, by_kind(kinds, right), {name: f[1:] for name, f in found.items()}, timeouts,
                   failures)

    @property
    def shown(self) -> str:
        """The pass@k that is shown first, and by which evaluations are compared."""
        return f"pass@{headline_k(self.rollouts)}"

    def line(self) -> str:
        said = ungraded(self.problems * self.rollouts, self.timeouts, self.failures)
        cut = f", {self.truncated_frac:.1%} cut" if self.truncated_frac else ""
        return (f"step {self.step}: mean@{self.rollouts} {self.mean:.1%}, {self.shown} {self.passes[self.shown]:.1%} "
                f"on {self.problems} held-out problems{cut}{said and '. '}{said}")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table: one line of titles, then as many cells in each of the lines."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def table(evaluations: list[Evaluation]) -> str:
    """A Markdown table in percent: one column an evaluation, rows for all problems and for each kind."""
    first = evaluations[0]
    figures = {f"mean@{first.rollouts}": [e.mean for e in evaluations],
               first.shown: [e.passes[e.shown] for e in evaluations]}
    if len(first.by_kind) > 1:
        figures |= {f"{first.shown}, {kind}": [e.by_kind[kind][2] for e in evaluations] for kind in first.by_kind}
    for name in ("timeouts", "failures"):
        if any(counts := [getattr(e, name) for e in evaluations]):
            figures[f"grader {name}"] = [n / (first.problems * first.rollouts) for n in counts]
    head = [f"{first.problems} held-out problems x {first.rollouts}, percent", *(f"step {e.step}" for e in evaluations)]
    return "\n" + markdown(head, [[name, *(f"{100 * x:.1f}" for x in values)] for name, values in figures.items()])


def whole_lines(path: Path) -> list[dict]:
    """The lines of a .jsonl file; what follows the last line break is being written, or was cut by a kill. Raises
    ValueError, with the place and the remedy, for a line that is no JSON object."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], 1):
        try:
            found.append({**json.loads(line)})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no JSON object ({error}): a crash of the machine may leave "
                             f"such. Delete the line: sed -i {number}d {path}") from error
    return found
