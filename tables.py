"""From logs to the study's tables in Markdown: `tables()`, which python plots.py --table prints."""

from collections.abc import Callable

import numpy as np

import logs
from logs import MODES, Run, entropy, headline, interval, noise_ratios, paired, pairs, present, study, tail
from study import PARTS, Row

NOTE = """Figures are of the last checkpoint, in percent, on held-out problems answered 16 times each at temperature 1
without truncation. Peak is the best evaluation of each run, chosen on the problems reported. Means over seeds, with 95%
t-intervals over them; differences are paired by seed."""


def exact_configurations(count_B: np.ndarray, arms_K: np.ndarray, total: int) -> int:
    """In how many ways can each present bin (count > 0) take one arm so that sum count * n is `total`?

    The coefficient of x^total in the product over bins of sum_n x^(count n), multiplied as one integer: x is a power of
    two past the sum of all coefficients, K^B, so that none reaches into the next.
    """
    counts, arms = count_B[count_B > 0].tolist(), arms_K.tolist()
    bits, product = (len(arms) ** len(counts)).bit_length(), 1
    for count in counts:
        product = sum(product << bits * count * n for n in arms)
    return product >> bits * total & (1 << bits) - 1


def mean_success(evaluation: dict) -> float:
    return evaluation["mean"]


def worst_kind(evaluation: dict) -> float:
    return min(kind[2] for kind in evaluation["by_kind"].values())


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def spread(values: np.ndarray, signed: bool = False, digits: int = 1) -> str:
    """Mean over seeds and 95% interval: 62.9 [58.1, 67.6]."""
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    mean, low, high = (form.format(x) for x in interval(values))
    return mean if len(values) < 2 else f"{mean} [{low}, {high}]"


def difference(runs: list[Run], baseline: list[Run], figure: Callable[[dict], float]) -> str:
    """Paired, in points; empty where no seed is in both."""
    values = paired(runs, baseline, figure)
    return spread(100 * values, True) if len(values) else ""


def outcome(row: Row, found: dict[str, list[Run]]) -> list[str]:
    """One line of a table of outcomes, figures in percent."""
    runs = found[row.name]
    last, against = [r.last() for r in runs], found.get(row.against, [])
    if not runs[0].log or row.name == row.against:  # the untrained model is not a method
        against = []
    minus = difference(runs, against, headline)
    ours, theirs = ([headline(r.last()) for r in group] for group in pairs(runs, against))
    return [row.name, str(len(runs)), spread(100 * np.array([headline(e) for e in last])), row.against if minus else "",
            minus, f"{100 * (np.mean(ours) / np.mean(theirs) - 1):+.1f}%" if minus else "",
            f"{100 * np.mean([max(map(headline, r.evaluations)) for r in runs]):.1f}",
            spread(100 * np.array([mean_success(e) for e in last])), difference(runs, against, mean_success),
            f"{100 * np.mean([worst_kind(e) for e in last]):.1f}",
            f"{np.mean([r.series('tokens_generated').sum() for r in runs]) / 1e3:.0f}" if runs[0].log else "0"]


def outcome_tables() -> str:
    """Every part of the study for every task: outcomes, and paired differences to the row that each is held against."""
    head = ["row", "seeds", "pass@8", "against", "paired difference", "relative", "peak pass@8", "mean@16",
            "mean@16, paired difference", "worst kind, pass@8", "thousand tokens"]
    out = []
    for part, rows in PARTS.items():
        for task, found in study().items():
            lines = [outcome(row, found) for row in rows if row.name in found]
            if lines:
                out.append(f"**{part}: {task}**\n\n{markdown(head, lines)}")
    return "\n\n".join(out)


def summary_table() -> str:
    """The first two parts in short, both tasks side by side: pass@8 and mean@16, each with its paired difference."""
    lines = []
    for row in (*list(PARTS.values())[0], *list(PARTS.values())[1]):
        own = row.name == row.against or row.flags.get("steps") == 0
        line = [row.name, "" if own else row.against]
        for found in study().values():
            runs, against = found.get(row.name, []), [] if own else found.get(row.against, [])
            for figure in (headline, mean_success):
                mean = f"{100 * np.mean([figure(r.last()) for r in runs]):.1f}" if runs else ""
                line.append(f"{mean}, {difference(runs, against, figure)}".removesuffix(", "))
        lines.append(line)
    head = [f"{task}, {figure}" for task in study() for figure in ("pass@8", "mean@16")]
    return "**In short**\n\n" + markdown(["row", "against", *head], lines)


def kind_table(task: str, rows: dict[str, list[Run]]) -> str:
    """pass@8 and pass@1 by kind of problem, means over seeds, in percent: a loss in the second hides in the first."""
    modes = [m for m in ("base", *MODES) if m in rows]
    kinds = rows[modes[0]][0].last()["by_kind"]
    lines = [[kind, *(f"{100 * np.mean([r.last()['by_kind'][kind][place] for r in rows[m]]):.1f}"
                      for place in (2, 1) for m in modes)] for kind in kinds]
    head = ["kind", *(f"{m}, pass@{k}" for k in (8, 1) for m in modes)]
    return f"**pass@8 and pass@1 by kind: {task}**\n\n" + markdown(head, lines)


def signal_table(task: str, rows: dict[str, list[Run]]) -> str:
    """What the signals are worth: |surrogate| by optimiser step of a batch, and spread between bins over noise."""
    lines = []
    for name in ("grpo-1-minibatch", "grpo", "grpo-4-minibatches"):
        for signal in ("surrogate", "reward", "variance"):
            if name not in rows:
                continue
            ratios = np.concatenate([noise_ratios(r, signal) for r in rows[name]])
            size = np.concatenate([np.abs(r.series("signals", signal, "mean")).ravel() for r in rows[name]])
            by_update = np.mean([r.series("surrogate_abs").mean(axis=0) for r in rows[name]], axis=0)
            lines.append([name, str(len(rows[name])), signal, f"{np.nanmedian(size):.1e}",
                          " ".join(f"{x:.0e}" for x in by_update) if signal == "surrogate" else "",
                          f"{np.nanmedian(ratios):.2f}", f"{100 * np.mean(ratios[np.isfinite(ratios)] > 2):.0f}%"])
    head = ["runs", "seeds", "signal", "median size of a bin's", "mean size by optimiser step of a batch",
            "median signal to noise", "steps over 2"]
    return f"**Signals: {task}**\n\n" + markdown(head, lines)


def allocation_table(task: str, rows: dict[str, list[Run]]) -> str:
    """What the allocations did: spread of counts, wasted rollouts, and (28), (33) against uniform counts."""
    lines = []
    for name, runs in rows.items():
        if not runs[0].log or (runs[0].mode not in ("rollout", "both") and name != "grpo"):
            continue
        sigma = np.nan_to_num(logs.bin_sigma(runs))
        ratio, proxy, law, most = [], [], [], []
        for r in runs:
            q, n = r.series("bins", "share"), np.nan_to_num(r.series("bins", "rollouts"), nan=1.0)
            even, best = np.full_like(q, r.n_bar), np.maximum(logs.square_root_law(q, sigma, r.n_bar), 1e-9)
            ratio.append(logs.wse(q, sigma, n).sum() / logs.wse(q, sigma, even).sum())
            proxy.append((q * sigma**2 / n).sum() / (q * sigma**2 / even).sum())
            law.append((q * sigma**2 / best).sum() / (q * sigma**2 / even).sum())
            most.append(np.nanmax(r.series("bins", "rollouts"), axis=1).mean())
        lines.append([name, str(len(runs)), f"{np.mean(most):.1f}",
                      *(f"{100 * np.mean([r.series(key).mean() for r in runs]):.0f}%"
                        for key in ("zero_std_frac", "zero_std_rollouts_frac")),
                      *(f"{100 * (np.mean(x) - 1):+.1f}%" for x in (ratio, proxy, law))])
    head = ["row", "seeds", "most rollouts of a bin", "prompts of no signal", "rollouts of no signal",
            "WSE (33)", "variance (28)", "(28) by the law (30)"]
    return f"**What the allocations did: {task}**\n\n" + markdown(head, lines)


def weight_table(task: str, rows: dict[str, list[Run]]) -> str:
    """What weights and bins became: weights of bins present, averaged over the tail of a run and at their extremes."""
    lines = []
    for name, runs in rows.items():
        if not runs[0].log or runs[0].mode == "rollout":
            continue
        weight = [present(r, r.series("bins", "weight")) for r in runs]
        share = [r.series("bins", "share") for r in runs]
        lines.append([name, str(len(runs)),
                      *(f"{np.mean([extreme(tail(w)) for w in weight]):.3f}" for extreme in (np.nanmin, np.nanmax)),
                      f"{min(map(np.nanmin, weight)):.3f}", f"{max(map(np.nanmax, weight)):.3f}",
                      f"{100 * np.mean([tail(q)[0] + tail(q)[-1] for q in share]):.0f}%",
                      f"{np.mean([tail(np.exp(entropy(q))) for q in share]):.1f}"])
    head = ["row", "seeds", "least weight, tail mean", "greatest weight, tail mean", "least ever applied",
            "greatest ever applied", "prompts in outer two bins", "exp(entropy of shares)"]
    return f"**What weights and bins became: {task}**\n\n" + markdown(head, lines)


def exact_table(task: str, rows: dict[str, list[Run]]) -> str:
    """How often an exact budget with one count a bin leaves a single choice, from the bins that the runs had."""
    lines = []
    for name, runs in rows.items():
        if name not in ("grpo", "rollout", "paper-rollout", "rollout-exact"):
            continue
        ways = []
        for r in runs:
            P, arms = r.config["prompts_per_step"], np.arange(r.config["n_min"], r.config["n_max"] + 1)
            for share_B in r.series("bins", "share"):
                ways.append(exact_configurations(np.rint(share_B * P).astype(int), arms, round(P * r.n_bar)))
        lines.append([name, str(len(ways)), f"{100 * np.mean(np.array(ways) <= 1):.0f}%", f"{np.median(ways):.0f}"])
    return f"**Exact budgets: {task}**\n\n" + markdown(
        ["bins of", "steps", "steps with one choice", "median choices"], lines)


def tables() -> str:
    functions = (kind_table, allocation_table, weight_table, signal_table, exact_table)
    by_task = [table(task, rows) for table in functions for task, rows in study().items()]
    return "\n\n".join([NOTE, summary_table(), outcome_tables(), *by_task])
