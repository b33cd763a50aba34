"""The study's own figures, of what it keeps in results/study, and how all figures look (plots.py draws with it too)."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from study import cost
from study.logs import Missing, Run, Sweep, by_base, headline, interval, paired
from study.rows import FRESH, METHODS, PARTS, WAY, written

matplotlib.use("Agg")
# Okabe and Ito's palette: told apart by colour-blind eyes and, by lightness, in print
COLOURS = {"grpo": "#666666", "prompt": "#0072B2", "rollout": "#D55E00", "both": "#009E73", "uniform": "#000000",
           "law": "#CC79A7"}
ROW_COLOURS = {"grpo": "#666666", "maxrl": "#E69F00", "rollout-maxrl": "#D55E00", "weights-maxrl": "#CC79A7",
               "rollout": "#F0A58F", "prompt": "#0072B2", "tilt": "#56B4E9", "both-maxrl": "#009E73",
               "rank-maxrl": "#332288", "rank-weights-maxrl": "#AA99DD", "moved": "#332288", "weights": "#AA99DD"}
PAGE = 7.0  # inches: the width of a paper's page
plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7,
                     "xtick.labelsize": 7, "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False,
                     "pdf.fonttype": 42, "figure.constrained_layout.use": True, "legend.frameon": False,
                     "lines.linewidth": 1.2, "axes.titlelocation": "left"})

Rows = dict[str, list[Run]]  # row -> its runs, by base


def rows_of(subjects, columns: int, *, height: float = 1.9, **kwargs):
    """A figure of one row of panels for each subject: (figure, axes of shape (subjects, columns))."""
    return plt.subplots(len(subjects), columns, figsize=(PAGE, height * len(subjects) + 0.35), squeeze=False, **kwargs)


def colour(row: str) -> str:
    """Of a row of the arena, or of one on fresh bases."""
    return ROW_COLOURS.get(row.removesuffix("-way").removesuffix("-fresh"), COLOURS["uniform"])


def figure_outcomes(tasks: dict[str, Rows]):
    """The arena, and the questions on fresh bases: paired difference in pass@8 to the row that each is held against;
    bases are ticks, bars are 95% intervals."""
    found = {}  # title -> the row, its differences by task
    for row in (row for part in ("The arena", FRESH) for row in PARTS[part]):
        values = [paired(rows.get(row.name, []), rows.get(row.against, []), headline) for rows in tasks.values()]
        if row.name != row.against and min(map(len, values)) > 1:
            found[f"{row.name} - {row.against}"] = row.name, values
    figure, axes = plt.subplots(1, len(tasks), figsize=(PAGE, 0.16 * len(found) + 0.9), squeeze=False, sharey=True)
    for i, (ax, task) in enumerate(zip(axes[0], tasks, strict=True)):
        for y, (row, by_task) in enumerate(found.values()):
            mean, low, high = interval(by_task[i])
            ax.plot(by_task[i], np.full(len(by_task[i]), y), "|", color=colour(row), alpha=0.5, markersize=5)
            ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=colour(row), markersize=3.5,
                        elinewidth=1.2)
        ax.axvline(0, color=COLOURS["uniform"], linewidth=0.8)
        ax.set(title=task, xlabel="pass@8, points")
        ax.set_yticks(range(len(found)), list(found))
        ax.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes[0, 0].set_ylim(len(found) - 0.5, -0.5)
    return figure


def lines_and_errors(ax, found: dict[str, tuple[list, np.ndarray]], names: dict[str, str] | None = None) -> None:
    """A line a row through the means over bases. found: row -> (x, percentages (bases, x)), the same bases in each;
    names: what the legend has for a row.

    The band is the standard error, over bases, of what a base has above its own mean over all rows: bases differ by
    more than rows do.
    """
    of_base = np.concatenate([values for _, values in found.values()], axis=1).mean(axis=1, keepdims=True)
    for row, (x, values) in found.items():
        mean = values.mean(axis=0)
        ax.plot(x, mean, ".-", color=colour(row), label=(names or {}).get(row, row))
        if len(values) > 1:
            error = (values - of_base).std(axis=0, ddof=1) / np.sqrt(len(values))
            ax.fill_between(x, mean - error, mean + error, color=colour(row), alpha=0.12, linewidth=0)


def figure_rates(tasks: dict[str, dict[str, Sweep]]):
    """The arena: pass@8 against the learning rate."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(PAGE, 2.9), squeeze=False, sharey=True)
    for ax, (task, rows) in zip(axes[0], tasks.items(), strict=True):
        swept = {row.name: rows[row.name] for row in PARTS["The arena"] if len(rows.get(row.name, ())) > 1}
        lines_and_errors(ax, {name: (list(sweep), 100 * np.array([[headline(r.last()) for r in runs]
                                                                  for runs in sweep.values()]).T)
                              for name, sweep in swept.items()})
        ax.set_xscale("log")
        rates = sorted({rate for sweep in swept.values() for rate in sweep})
        ax.set_xticks(rates, [written(r) for r in rates])
        ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ax.set(title=task, xlabel="learning rate", ylabel="pass@8, %" if ax is axes[0, 0] else "")
    return figure


def figure_way(tasks: dict[str, dict[str, Sweep]]):
    """The way: pass@8 against the rollouts spent, and where GRPO ends; a base's seeds in the mean."""
    figure, axes = plt.subplots(1, len(tasks), figsize=(PAGE, 2.6), squeeze=False, sharey=True)
    for ax, (task, rows) in zip(axes[0], tasks.items(), strict=True):
        found = {}
        for row in PARTS[WAY]:
            runs = by_base(sum(rows.get(row.name, {}).values(), []))
            if list(runs) != list(row.bases):
                raise Missing(f"{task} has not all runs of {row.name} yet")
            x = cost.spent(runs[row.bases[0]][0]) / 1000
            found[row.name] = x, 100 * np.array([np.mean([[headline(e) for e in run.evaluations] for run in seeds],
                                                         axis=0) for seeds in runs.values()])
        lines_and_errors(ax, found, {row.name: f"{METHODS[row.name]}, {row.shape}" for row in PARTS[WAY]})
        ax.axhline(found["grpo-way"][1][:, -1].mean(), color=colour("grpo"), linestyle="--", label="where GRPO ends")
        ax.set(title=task, xlabel="rollouts, thousands", ylabel="pass@8, %" if ax is axes[0, 0] else "")
    return figure


OF_ROWS = {"outcomes": figure_outcomes}
OF_SWEEPS = {"rates": figure_rates, "way": figure_way}
