"""From logs to what python plots.py prints, in Markdown: --table the study's `tables()`, or with runs `run_table`;
--samples a `sample_page` of each run."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from metrics import headline_k, markdown, whole_lines
from study import cost, logs
from study.logs import Missing, Run, headline, mean_success, study, sweeps
from study.rows import BOTH_TASKS, HALF, PARTS, SHAPE, SHAPES, WAY, Row, written

NOTE = """All {runs} runs took {hours:.0f} hours in sum, one thread each. Figures are of the end of training, in
percent, on 600 held-out problems answered 16 times each; differences in points, paired by base model, the pairs of both
tasks together where no task is named, with 95% t-intervals over pairs. docs/study.md explains rows and rates."""
RAREST = 3  # of the kinds of a task, which come from the most to the least often worked
Pair = tuple[str, str]  # a row and the one that it is held against
# What was asked before its rows ran, by table: is the first row of a pair better? Holm adjusts the p of a table.
QUESTIONS: dict[str, tuple[Pair, ...]] = {
    "The questions": (("rollout-maxrl", "maxrl"), ("rollout-maxrl", "weights-maxrl"), ("prompt", "tilt"),
                      ("maxrl", "grpo")),
    "The questions at 300 steps": (("rollout-maxrl-long", "maxrl-long"), ("rollout-maxrl-long", "weights-maxrl-long")),
    "The questions on fresh bases": (("rank-maxrl-fresh", "maxrl-fresh"),
                                     ("rank-maxrl-fresh", "rank-weights-maxrl-fresh"),
                                     ("rollout-maxrl-fresh", "maxrl-fresh")),
}
# What was asked of the way there, before its bases were trained: does the first row of a pair cost less?
COSTS: tuple[Pair, ...] = (("moved-way", "maxrl-way"), ("moved-way", "weights-way"), ("maxrl-way", "grpo-way"))
# What development compares, at half the rate: moving where both have the usual shape and where each has its best, the
# rule likewise, and choices that stand near each other.
SHAPE_PAIRS: tuple[Pair, ...] = (
    ("rank-maxrl-64x4", "maxrl-64x4"), ("rank-maxrl-32x8", "maxrl-16x16"), ("maxrl-16x16", "grpo-16x16"),
    ("maxrl-16x16", "maxrl-32x8"), ("rank-maxrl-32x8", "rank-maxrl-16x16"), ("rank-maxrl-32x8", "rollout-maxrl-32x8"))
# What README shows: line -> the pairs whose differences it takes together
README: dict[str, list[Pair]] = {
    "maxrl - grpo": [("maxrl", "grpo")],
    "rank with maxrl - maxrl": [("rank-maxrl-fresh", "maxrl-fresh")],
    "rank with maxrl - its counts as weights": [("rank-maxrl-fresh", "rank-weights-maxrl-fresh")],
    "gain with maxrl - maxrl": [("rollout-maxrl", "maxrl"), ("rollout-maxrl-fresh", "maxrl-fresh")],
    "Prompt-GDRO - tilt": [("prompt", "tilt")],
    "rank with maxrl - gain with maxrl": [("rank-maxrl-fresh", "rollout-maxrl-fresh")],
    "the paper's settings: Prompt-GDRO - GRPO": [("paper-prompt", "paper-grpo")],
    "the paper's settings: Rollout-GDRO - GRPO": [("paper-rollout", "paper-grpo")],
}


def rarest_kinds(evaluation: dict) -> float:
    return float(np.mean([kind[2] for kind in list(evaluation["by_kind"].values())[-RAREST:]]))


def difference(task: str, pair: Pair, figure: Callable[[dict], float]) -> np.ndarray:
    """Of two rows in points, base by base; none where one has not run. A row of one rate is held against the other's
    runs at that rate where there are any, else both report at their cross-fitted rates."""
    ours, theirs = (study().get(task, {}).get(row, []) for row in pair)
    rates = list(sweeps().get(task, {}).get(pair[0], ()))
    if len(rates) == 1:
        theirs = sweeps()[task].get(pair[1], {}).get(rates[0], theirs)
    return logs.paired(ours, theirs, figure)


def pooled(pairs: Iterable[Pair], figure: Callable[[dict], float] = headline) -> np.ndarray:
    """Their differences on all bases of both tasks."""
    return np.concatenate([difference(task, pair, figure) for pair in pairs for task in BOTH_TASKS])


def spread(values: np.ndarray) -> str:
    """Mean and 95% interval: +8.2 [+5.2, +11.1]; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*logs.interval(values))


def percent(values: Iterable[float]) -> str:
    return f"{100 * np.mean(list(values)):.1f}"


def cells(*pairs: Pair) -> dict[str, str]:
    """What tables say of a comparison: column -> cell."""
    return {"pairs": str(len(pooled(pairs))), "pass@8": spread(pooled(pairs)),
            "pass@1": spread(pooled(pairs, mean_success))}


def detailed(pair: Pair) -> dict[str, str]:
    """The same with pass@8 by task and of rare kinds."""
    return {**cells(pair), **{f"pass@8, {task}": spread(difference(task, pair, headline)) for task in BOTH_TASKS},
            "pass@8, three rarest kinds": spread(pooled([pair], rarest_kinds))}


def table(title: str, lines: list[dict[str, str]]) -> str:
    """Lines of column -> cell; a line without a column leaves it empty."""
    head = list(dict.fromkeys(column for line in lines for column in line))
    return f"**{title}**\n\n{markdown(head, [[line.get(column, '') for column in head] for line in lines])}"


def adjusted() -> dict[Pair, float]:
    """p of each pair of QUESTIONS, by Holm over those of its table."""
    out: dict[Pair, float] = {}
    for pairs in QUESTIONS.values():
        out |= zip(pairs, logs.holm([logs.p_value(pooled([pair])) for pair in pairs]), strict=True)
    return out


def readme_table() -> str:
    """p is Holm's where the line is one question, else that of its own t-test."""
    lines, holms = [], adjusted()
    for name, pairs in README.items():
        plain = f"{logs.p_value(pooled(pairs)):.2g}, unadjusted"
        p = f"{holms[pairs[0]]:.2g}" if len(pairs) == 1 and pairs[0] in holms else plain
        lines.append({"rows": name, **cells(*pairs), "p": p})
    return table("README", lines)


def question_tables() -> list[str]:
    p = adjusted()
    return [table(title, [{"rows": " - ".join(pair), **detailed(pair), "p (Holm)": f"{p[pair]:.2g}"} for pair in pairs])
            for title, pairs in QUESTIONS.items()]


def outcome_table(title: str, rows: tuple[Row, ...], against: str = "") -> str:
    """Rows in pass@8 and pass@1 by task, and differences to `against`, or to the row that each is held against."""
    lines = []
    for row in rows:
        line, pair = {"row": row.name}, (row.name, against or row.against)
        for task, runs in ((task, found[row.name]) for task, found in study().items() if row.name in found):
            rates = Counter(r.config["learning_rate"] for r in runs)
            line |= {f"{task}: rates": ", ".join(f"{written(rate)} ({rates[rate]})" for rate in sorted(rates)),
                     f"{task}: pass@8": percent(headline(r.last()) for r in runs),
                     f"{task}: pass@1": percent(mean_success(r.last()) for r in runs)}
        lines.append({**line, "minus": pair[1], **detailed(pair)} if row.name not in (pair[1], "base") else line)
    return table(title, lines)


def shape_levels(task: str) -> dict[int, float]:
    """Number of a base -> the one level that all rows and shapes are measured by: where GRPO ends there at half the
    rate, in the mean over the shapes. Of bases on which it ran at all of them."""
    rate, rows = HALF[task][0], [f"grpo-{shape}" for shape in SHAPES]
    ends = logs.by_base([run for row in rows for run in sweeps().get(task, {}).get(row, {}).get(rate, [])])
    return {base: cost.level(runs) for base, runs in ends.items() if len(runs) == len(rows)}


def shape_table() -> str:
    """By row, shape and rate: the share of its rollouts that a run needs to the level (geometric means over bases), how
    many runs stand there by the first evaluation or never do, pass@8 at the end. The least share over both tasks is
    what a row is asked about at."""
    lines, rates = [], ("half", "full")
    for row, which in ((r, i) for r in PARTS[SHAPE] for i in range(len(r.rates["arithmetic"]))):
        line, both = {"row": row.name, "rate": rates[which]}, []
        for task in BOTH_TASKS:
            levels, rate = shape_levels(task), row.rates[task][which]
            runs = [run for run in sweeps().get(task, {}).get(row.name, {}).get(rate, []) if run.base in levels]
            if runs:
                here = {run.base: levels[run.base] for run in runs}
                both.append(cost.log_costs(runs, here) - np.log(cost.spent(runs[0])[-1]))
                line |= {f"{task}: share": percent([np.exp(both[-1].mean())]),
                         f"{task}: first, never": "{}, {}".format(*cost.at_bounds(runs, here)),
                         f"{task}: pass@8": percent(headline(run.last()) for run in runs)}
        lines.append({**line, "share": percent([np.exp(np.concatenate(both).mean())]) if both else "",
                      "runs": str(sum(map(len, both)))})
    return table("What a level costs, by the shape of the batch", lines)


def shape_ratios() -> str:
    """Ratios of costs of SHAPE_PAIRS, with intervals by the bootstrap over the bases of both tasks, unadjusted."""

    def log_costs(row: str) -> np.ndarray:
        return np.concatenate([cost.log_costs(sweeps()[task][row][HALF[task][0]], shape_levels(task))
                               for task in BOTH_TASKS])

    return table("Shapes compared", [{"rows": " / ".join((a, b)), "rollouts": share(log_costs(a) - log_costs(b))}
                                     for a, b in SHAPE_PAIRS])


def way(task: str, row: str) -> list[Run]:
    """A row's runs, which have one rate."""
    return next(iter(sweeps().get(task, {}).get(row, {}).values()), [])


def way_costs(task: str, row: str, *, swapped: bool = False, **how) -> np.ndarray:
    """Log costs by base, (S,), of the level at which GRPO's second run from that base ends, or its first if `swapped`;
    the run that sets the level has no part in GRPO's own cost."""
    setting = [run for run in way(task, "grpo-way") if (run.seed == run.base) == swapped]
    runs = [run for run in way(task, row) if run not in setting]
    return cost.log_costs(runs, {run.base: cost.level([run]) for run in setting}, **how)


def cheaper(pair: Pair, tasks: tuple[str, ...] = BOTH_TASKS, **how) -> np.ndarray:
    """Differences in log cost of two rows, on all bases of the tasks."""
    return np.concatenate([way_costs(t, pair[0], **how) - way_costs(t, pair[1], **how) for t in tasks])


def share(difference_S: np.ndarray) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*cost.ratio(difference_S))


def cost_table() -> str:
    """The three answers: ratios of costs with 95% intervals by the bootstrap over bases."""
    lines, p = [], logs.holm([cost.sign_flip(cheaper(pair)) for pair in COSTS])
    for pair, adjusted_p in zip(COSTS, p, strict=True):
        lines.append({
            "rows": " / ".join(pair), "pairs": str(len(cheaper(pair))), "rollouts": share(cheaper(pair)),
            "p (Holm)": f"{adjusted_p:.2g}", "costs less?": cost.answer(cheaper(pair), adjusted_p),
            **{task: share(cheaper(pair, (task,))) for task in BOTH_TASKS},
            **{what: share(cheaper(pair, what=what)) for what in ("tokens generated", "tokens trained")},
            "seeds swapped": share(cheaper(pair, swapped=True)), "never = twice": share(cheaper(pair, beyond=2.0))})
    return table("What the way costs", lines)


def way_is_whole() -> bool:
    """Whether all its runs are there: nobody looks before."""
    return all(len(way(task, row.name)) == len(row.bases) * row.seeds for row in PARTS[WAY] for task in BOTH_TASKS)


def way_table() -> str:
    """By row: its cost as a share of GRPO's, runs at either bound, the mean of the fitted curve, where it ends at
    temperature 1 and as the paper decodes, and how many of the ten kinds end with a pass@8 of half or more."""
    lines = []
    for row in dict.fromkeys(row for pair in COSTS[::-1] for row in pair[::-1]):
        runs = [run for task in BOTH_TASKS for run in way(task, row)]
        last, decoded = [run.last() for run in runs], [run.decoded for run in runs]
        lines.append({
            "row": row, "runs": str(len(runs)), "share of GRPO's rollouts": share(cheaper((row, "grpo-way"))),
            "mean of the curve": f"{np.mean([cost.fitted(run).mean() for run in runs]):.1f}",
            "pass@8": percent(map(headline, last)), "pass@1": percent(map(mean_success, last)),
            "pass@8, decoded": percent(d["pass@8"][0] for d in decoded),
            "pass@1, decoded": percent(d["pass@1"][0] for d in decoded),
            "kinds found": f"{np.mean([sum(k[2] >= 0.5 for k in e['by_kind'].values()) for e in last]):.1f}"})
    return table("The way, row by row", lines)


def weight_table() -> str:
    """Weights that Prompt-GDRO applied to bins present, in the runs that report and in those at all rates; the mean
    absolute prompt loss (7) by optimiser step of a batch."""
    lines = []
    for task, row in ((task, row) for row in ("prompt", "paper-prompt") for task in BOTH_TASKS):
        line, runs = {"row": f"{row}, {task}"}, study()[task][row]
        for which, group in (("reported", runs), ("all rates", sum(sweeps()[task][row].values(), []))):
            weights = [r.bins("weight") for r in group]
            line[f"weights, {which}"] = f"{min(map(np.nanmin, weights)):.2f} to {max(map(np.nanmax, weights)):.2f}"
        losses = np.mean([r.series("surrogate_abs").mean(axis=0) for r in runs], axis=0)
        lines.append({**line, "prompt loss by optimiser step": " ".join(f"{x:.0e}" for x in losses)})
    return table("Weights", lines)


def allocation_table() -> str:
    """(33) of what Rollout-GDRO gave each bin, against uniform counts on the same prompts."""
    lines = []
    for task, row in ((task, row) for row in ("rollout", "rollout-variance") for task in BOTH_TASKS):
        runs = study()[task][row]
        sigma, n_bar = np.nan_to_num(logs.bin_sigma(runs)), runs[0].config["rollouts_per_prompt"]
        ours = [logs.wse(r.share, sigma, r.bins("rollouts")).sum() for r in runs]
        even = [logs.wse(r.share, sigma, np.full_like(r.share, n_bar)).sum() for r in runs]
        change = np.mean(np.divide(ours, even)) - 1
        lines.append({"row": f"{row}, {task}", "WSE (33)": f"{100 * change:+.1f}%"})
    return table("Allocations", lines)


def tables() -> str:
    """All of the study, as results/TABLES.md holds it."""
    runs = [run for rows in sweeps().values() for sweep in rows.values() for group in sweep.values() for run in group]
    note = NOTE.format(runs=len(runs), hours=sum(run.config.get("seconds", 0) for run in runs) / 3600)
    parts = [outcome_table("The arena against grpo", PARTS["The arena"], "grpo"),
             *(outcome_table(part, rows) for part, rows in PARTS.items() if part != WAY)]
    answers = [cost_table(), way_table()] if way_is_whole() else []
    return "\n\n".join([note, readme_table(), *question_tables(), *answers, shape_table(), shape_ratios(), *parts,
                        weight_table(), allocation_table()])


# ------------------------------------------------------------------------------------------------ any runs


def run_table(runs: list[Run]) -> str:
    """One line a run, with its last evaluation in percent. Runs that drew different numbers of responses have columns
    of their own, those without evaluations none; hours are those of training steps."""
    lines = []
    for run in runs:
        seconds = sum(line["seconds"]["total"] for line in run.log)
        line = {"run": run.name, "trained": run.subject, "mode": run.mode, "rule": run.config["rule"],
                "seed": str(run.seed), "steps": str(len(run.log)), "hours": f"{seconds / 3600:.3g}"}
        for e in run.evaluations[-1:]:
            line |= {"evaluated at step": str(e["step"]), f"pass@{headline_k(e['rollouts'])}": percent([headline(e)]),
                     f"mean@{e['rollouts']}": percent([mean_success(e)])}
        lines.append(line)
    return table("Runs", lines)


def sample_page(folder: Path) -> str:
    """Rollouts of a run to read, of its first, middle and last step. Raises Missing for a run that has none."""
    run, file = Run.load(folder), folder / "samples.jsonl"
    if not (samples := whole_lines(file) if file.exists() else []):
        raise Missing(f"{folder}: samples.jsonl is missing or empty; train.py writes it with the first step")
    steps = sorted({s["step"] for s in samples})
    page = [f"# {run.name}: {run.subject}, mode {run.mode}"]
    for step in (steps[i] for i in logs.stages(len(steps), 3)):
        page.append(f"## step {step}, of 0 to {steps[-1]}")
        page += [sample_text(s) for s in samples if s["step"] == step]
    return "\n\n".join(page)


def sample_text(sample: dict) -> str:
    """One rollout: verdict, numbers, then the texts; what is null is left out."""
    numbers = ", ".join(f"{key} {sample[key]:.3g}" for key in ("reward", "bin", "n", "weight", "factor"))
    verdict = ("right" if sample["right"] else "wrong") + ", cut at the length limit" * sample["truncated"]
    page = f"**{visible(sample['id'])}: {verdict}** ({numbers})\n"
    for name in ("kind", "prompt", "response", "answer", "found"):
        if sample.get(name) is not None:
            page += f"\n    {name:10}" + visible(sample[name] or "(empty)").replace("\n", "\n" + 14 * " ")
    return page


def visible(text: str) -> str:
    """Control characters, and what else has no glyph but a line's end, by their escapes: a terminal would obey them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
