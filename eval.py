"""How good is a policy on held-out problems? mean@k and pass@k; `train.py --steps 0` evaluates a model as it is.

    mean@k  the mean share of right responses
    pass@k  the chance that at least one of k responses is right, estimated without bias from m >= k of them:
            1 - C(m - c, k) / C(m, k) for c right ones
"""

import dataclasses
from dataclasses import dataclass
from math import comb

import numpy as np

from data import Problem


def pass_at_k(correct: np.ndarray, drawn: int, k: int) -> np.ndarray:
    """Unbiased pass@k of problems with `correct` (P,) right responses of `drawn`, (P,). Needs k <= drawn."""
    if not 1 <= k <= drawn:
        raise ValueError(f"pass@{k} needs at least {k} responses a problem, there are {drawn}")
    table = np.array([1 - comb(drawn - c, k) / comb(drawn, k) for c in range(drawn + 1)])
    return table[np.asarray(correct)]


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation."""

    step: int  # training steps before it
    problems: int
    rollouts: int  # responses drawn per problem
    mean: float  # mean@rollouts
    passes: dict[int, float]  # k -> pass@k, for the powers of two up to rollouts
    response_tokens_mean: float
    truncated_frac: float
    by_kind: dict[str, list[float]]  # what precedes ":" in an id, if there are at most 20 -> [problems, mean, pass@k]

    @property
    def k(self) -> int:
        """The k of the headline: 8 as in the paper, or the largest there is."""
        return min(8, max(self.passes))

    @classmethod
    def of(cls, step: int, problems: list[Problem], right: np.ndarray, response_tokens_mean: float,
           truncated_frac: float) -> "Evaluation":
        """right: (P, rollouts) bool."""
        drawn, correct = right.shape[1], right.sum(axis=1)
        powers = [2**i for i in range(drawn.bit_length()) if 2**i <= drawn]
        headline = pass_at_k(correct, drawn, min(8, powers[-1]))
        kinds = np.array([p.id.split(":")[0] if ":" in p.id else "all" for p in problems])
        if len(set(kinds)) > 20:  # ids that merely contain a colon
            kinds[:] = "all"
        by_kind = {str(kind): [int((kinds == kind).sum()), float(right[kinds == kind].mean()),
                               float(headline[kinds == kind].mean())] for kind in dict.fromkeys(kinds)}
        return cls(step, len(problems), drawn, float(right.mean()),
                   {k: float(pass_at_k(correct, drawn, k).mean()) for k in powers},
                   response_tokens_mean, truncated_frac, by_kind)

    def to_json(self) -> dict:
        out = dataclasses.asdict(self)
        return {**out, "passes": {f"pass@{k}": v for k, v in self.passes.items()}}

    @classmethod
    def from_json(cls, saved: dict) -> "Evaluation":
        return cls(**{**saved, "passes": {int(k.removeprefix("pass@")): v for k, v in saved["passes"].items()}})

    def line(self) -> str:
        return (f"step {self.step}: mean@{self.rollouts} {self.mean:.3f}, pass@{self.k} {self.passes[self.k]:.3f} "
                f"on {self.problems} held-out problems")


def table(evaluations: list[Evaluation]) -> str:
    """A Markdown table: one column an evaluation, rows for all problems and for each kind."""
    first = evaluations[0]
    head = [f"| {first.problems} held-out problems x {first.rollouts} |"]
    rows = [f"| mean@{first.rollouts} |", f"| pass@{first.k} |"]
    if len(first.by_kind) > 1:
        rows += [f"| pass@{first.k}, {kind} |" for kind in first.by_kind]
    for e in evaluations:
        head.append(f" step {e.step} |")
        values = [e.mean, e.passes[e.k]]
        if len(first.by_kind) > 1:
            values += [e.by_kind[kind][2] for kind in first.by_kind]
        rows = [row + f" {value:.3f} |" for row, value in zip(rows, values, strict=True)]
    return "\n".join(["", "".join(head), "|---|" + "---|" * len(evaluations), *rows])
