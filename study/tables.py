"""From logs to what python plots.py prints, in Markdown: --table the study's `tables()`, or with runs `run_table`;
--samples a `sample_page` of each run."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from metrics import headline_k, markdown, whole_lines
from study import cost, logs
from study.logs import Missing, Run, headline, mean_success, study, sweeps
from study.rows import BOTH_TASKS, METHODS, PARTS, SHAPE, SHAPES, WAY, Row, written

NOTE = """All {runs} runs took {hours:.0f} hours in sum, one thread each. Figures are of the end of training, in
percent, on 600 held-out problems answered 16 times each; differences in points, paired by base model, the pairs of both
tasks together where no task is named, with 95% t-intervals over pairs. docs/study.md explains rows and rates."""
Pair = tuple[str, str]  # a row and the one that it is held against
# What was asked before its rows ran, by table: is the first row of a pair better? Holm adjusts the p of a table.
QUESTIONS: dict[str, tuple[Pair, ...]] = {
    "The questions": (("rollout-maxrl", "maxrl"), ("rollout-maxrl", "weights-maxrl"), ("prompt", "tilt"),
                      ("maxrl", "grpo")),
    "The questions on fresh bases": (("rank-maxrl-fresh", "maxrl-fresh"),
                                     ("rank-maxrl-fresh", "rank-weights-maxrl-fresh"),
                                     ("rollout-maxrl-fresh", "maxrl-fresh")),
    "At other shapes": tuple((f"{ours}-50-{shape}", f"{theirs}-50-{shape}") for shape in ("32x8", "16x16")
                             for ours, theirs in (("rank", "maxrl"), ("rank", "weights"), ("maxrl", "grpo"))),
    "Without maxrl, with one optimiser step": (("rank-tilt", "tilt"), ("rollout-rank", "grpo"), ("rollout", "weights"),
                                               ("rank-one", "maxrl-one"), ("maxrl-one", "grpo-one")),
}
# How far rows lie apart, beside how far runs do that differ by their seed alone.
CHANCE: tuple[Pair, ...] = (
    ("maxrl-again", "maxrl"), ("rollout-rank-maxrl-again", "rollout-rank-maxrl"),
    ("rank-weights-maxrl-again", "rank-weights-maxrl"),
    ("rollout-rank-maxrl", "maxrl"), ("rollout-rank-maxrl", "rank-weights-maxrl"))
# What was asked of the way there, before its bases were trained: does the first row of a pair cost less?
COSTS: tuple[Pair, ...] = (("moved-way", "maxrl-way"), ("moved-way", "weights-way"), ("maxrl-way", "grpo-way"))


def difference(task: str, pair: Pair, figure: Callable[[dict], float]) -> np.ndarray:
    """Of two rows in points, base by base; none where one has not run. Where one has a single rate, the other is held
    against it at that rate, if it has any runs there; else both report at their cross-fitted rates."""
    sweep = [sweeps().get(task, {}).get(row, {}) for row in pair]
    single = next((rate for rates in sweep if len(rates) == 1 for rate in rates), None)
    return logs.paired(*(rates.get(single, study().get(task, {}).get(row, []))
                         for rates, row in zip(sweep, pair, strict=True)), figure)


def pooled(pair: Pair, figure: Callable[[dict], float] = headline) -> np.ndarray:
    """The same on all bases of both tasks."""
    return np.concatenate([difference(task, pair, figure) for task in BOTH_TASKS])


def spread(values: np.ndarray) -> str:
    """Mean and 95% interval: +8.2 [+5.2, +11.1]; empty for fewer than two values."""
    if len(values) < 2:
        return ""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*logs.interval(values))


def percent(values: Iterable[float]) -> str:
    return f"{100 * np.mean(list(values)):.1f}"


def compared(pair: Pair) -> dict[str, str]:
    """What tables say of a comparison: column -> cell."""
    return {"pairs": str(len(pooled(pair))), "pass@8": spread(pooled(pair)),
            "pass@1": spread(pooled(pair, mean_success)),
            **{f"pass@8, {task}": spread(difference(task, pair, headline)) for task in BOTH_TASKS}}


def table(title: str, lines: list[dict[str, str]]) -> str:
    """Lines of column -> cell; a line without a column leaves it empty."""
    head = list(dict.fromkeys(column for line in lines for column in line))
    return f"**{title}**\n\n{markdown(head, [[line.get(column, '') for column in head] for line in lines])}"


def question_table(title: str, pairs: tuple[Pair, ...]) -> str:
    p = logs.holm([logs.p_value(pooled(pair)) for pair in pairs])
    return table(title, [{"rows": " - ".join(pair), **compared(pair), "p (Holm)": f"{adjusted:.2g}"}
                         for pair, adjusted in zip(pairs, p, strict=True)])


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
        lines.append({**line, "minus": pair[1], **compared(pair)} if row.name not in (pair[1], "base") else line)
    return table(title, lines)


def runs_at(task: str, row: str, which: int = 0) -> list[Run]:
    """All runs of a row at the lowest of its rates, or at another; none where it has not run."""
    rates = list(sweeps().get(task, {}).get(row, {}).values())
    return rates[which] if rates else []


def shape_levels(task: str) -> dict[int, float]:
    """Number of a base -> the one level that all rows and shapes are measured by: where GRPO ends there at half the
    rate, in the mean over the shapes."""
    ends = logs.by_base([run for shape in SHAPES for run in runs_at(task, f"grpo-{shape}")])
    return {base: cost.level(runs) for base, runs in ends.items()}


def shape_table() -> str:
    """By row, shape and rate: the share of its rollouts that a run needs to the level (geometric means over bases), how
    many runs stand there by the first evaluation or never do, pass@8 at the end. The least share over both tasks is
    what a row is asked about at."""
    lines = []
    for row, which in ((r, i) for r in PARTS[SHAPE] for i in range(len(r.rates["arithmetic"]))):
        line, shares = {"row": row.name, "rate": ("half", "full")[which]}, []
        for task in BOTH_TASKS:
            runs, levels = runs_at(task, row.name, which), shape_levels(task)
            shares.append(cost.log_costs(runs, levels) - np.log(cost.spent(runs[0])[-1]))
            line |= {f"{task}: share": percent([np.exp(shares[-1].mean())]),
                     f"{task}: first, never": "{}, {}".format(*cost.at_bounds(runs, levels)),
                     f"{task}: pass@8": percent(headline(run.last()) for run in runs)}
        lines.append({**line, "share": percent([np.exp(np.mean(shares))])})
    return table("What a level costs, by the shape of the batch", lines)


def measured(task: str, row: str, *, swapped: bool = False) -> tuple[list[Run], dict[int, float]]:
    """A row's runs, and by base the level at which GRPO's second run from there ends, or its first if `swapped`. The
    run that sets the level is not among GRPO's own."""
    setting = [run for run in runs_at(task, "grpo-way") if (run.seed == run.base) == swapped]
    return [run for run in runs_at(task, row) if run not in setting], {r.base: cost.level([r]) for r in setting}


def cheaper(pair: Pair, tasks: tuple[str, ...] = BOTH_TASKS, *, swapped: bool = False, **how) -> np.ndarray:
    """Differences in log cost of two rows, on all bases of the tasks."""
    ours, theirs = (np.concatenate([cost.log_costs(*measured(task, row, swapped=swapped), **how) for task in tasks])
                    for row in pair)
    return ours - theirs


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


def readme_table() -> str:
    """README's: what share of GRPO's rollouts each row of the way needs to get where GRPO ends, and where it ends
    itself when it has spent as many."""
    lines = []
    for row in PARTS[WAY]:
        last = [run.last() for task in BOTH_TASKS for run in runs_at(task, row.name)]
        lines.append({"method": METHODS[row.name], "prompts x rollouts": row.shape,
                      "rollouts to GRPO's end": share(cheaper((row.name, "grpo-way"))),
                      "pass@8 at GRPO's budget": percent(map(headline, last)),
                      "pass@1": percent(map(mean_success, last))})
    return table("README", lines)


def way_table() -> str:
    """By row: runs that stand at the level by the first evaluation or never do, the mean of the fitted curve, where it
    ends as the paper decodes, and how many of the ten kinds end with a pass@8 of half or more."""
    lines = []
    for row in (row.name for row in PARTS[WAY]):
        runs = [run for task in BOTH_TASKS for run in runs_at(task, row)]
        bounds = np.sum([cost.at_bounds(*measured(task, row)) for task in BOTH_TASKS], axis=0)
        last, decoded = [run.last() for run in runs], [run.decoded for run in runs]
        lines.append({
            "row": row, "first, never": "{}, {}".format(*bounds),
            "mean of the curve": f"{np.mean([cost.fitted(run).mean() for run in runs]):.1f}",
            "kinds found": f"{np.mean([found_kinds(e) for e in last]):.1f}",
            **{f"{name}, decoded": percent(d[name][0] for d in decoded) for name in ("pass@8", "pass@1")},
            "kinds found, decoded": f"{np.mean([found_kinds(d) for d in decoded]):.1f}"})
    return table("The way, row by row", lines)


def found_kinds(evaluation: dict) -> int:
    return sum(kind[2] >= 0.5 for kind in evaluation["by_kind"].values())


def chance_table() -> str:
    """CHANCE, and the standard deviation of a difference over pairs, in points of pass@8."""
    return table("Chance", [{"rows": " - ".join(pair), **compared(pair), "standard deviation":
                             f"{pooled(pair).std(ddof=1):.1f}"} for pair in CHANCE])


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


def tables() -> str:
    """All of the study, as results/TABLES.md holds it."""
    runs = [run for rows in sweeps().values() for sweep in rows.values() for group in sweep.values() for run in group]
    note = NOTE.format(runs=len(runs), hours=sum(run.config.get("seconds", 0) for run in runs) / 3600)
    answers = [readme_table(), cost_table(), way_table()]
    questions = [question_table(title, pairs) for title, pairs in QUESTIONS.items()]
    against_grpo = outcome_table("The arena against grpo", PARTS["The arena"], "grpo")
    parts = [outcome_table(part, rows) for part, rows in PARTS.items() if part not in (SHAPE, WAY)]
    rest = [chance_table(), weight_table()]
    return "\n\n".join([note, *answers, shape_table(), *questions, against_grpo, *parts, *rest])


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
