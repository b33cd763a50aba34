"""From logs to the paper's figures. Reads run folders and results/, writes figures/ and nothing else.

    python plots.py                    every figure of the study, from results/, into figures/ (PNG and PDF)
    python plots.py RUN ...            the paper's from any runs, into figures/NAME/: one row for what was trained on
                                       what, seeds of one mode together
    python plots.py --live RUN ...     each run as it stands now, finished or not, likewise
    python plots.py --table            the study's tables in Markdown
    python plots.py --table RUN ...    one line a run
    python plots.py --samples RUN ...  rollouts to read, of the start, middle and end of training

Numbers of figures are the paper's. Values come from study/logs.py, the study's own figures from study/figures.py,
tables and samples from study/tables.py.
"""

import argparse
import hashlib
import signal
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from metrics import headline_k
from study import figures, logs
from study.figures import COLOURS, rows_of
from study.logs import MODES, Missing, Run, headline, stages, tail
from study.tables import run_table, sample_page, tables

FIGURES = Path(__file__).parent / "figures"
SUFFIXES, CREATOR = ("png", "pdf"), "group-dro plots.py"  # what is written, and the mark by which it is known again

# ------------------------------------------------------------------------------------------------ runs

Models = dict[str, dict[str, list[Run]]]  # what was trained on what, and the rule -> mode -> its runs by seed
OF_A_RUN = {"preset", "seed", "environment", "resumed", "seconds"}  # settings that runs of one mode may differ in


def by_model(runs: list[Run]) -> Models:
    """Groups runs; raises ValueError when runs of one model and mode differ in more than the seed."""
    models: Models = {}
    for run in sorted(runs, key=lambda r: r.seed):
        rule = run.config["rule"]
        modes = models.setdefault(run.subject if rule == "grpo" else f"{run.subject}, {rule}", {})
        modes.setdefault(run.mode, []).append(run)
        first = modes[run.mode][0]
        now, then = ({**r.config, **{k: v for was in r.config.get("resumed", []) for k, v in was["changed"].items()}}
                     for r in (run, first))  # as it went on
        differing = [k for k in sorted(now.keys() - OF_A_RUN) if now[k] != then.get(k)]
        if differing:
            raise ValueError(f"{run.subject}: {first.name} and {run.name} differ in {', '.join(differing)}; "
                             "figures take runs that differ in seed and mode, --table RUN ... takes any")
    return models


# ------------------------------------------------------------------------------------------------ drawing


STEPS = partial(matplotlib.ticker.MaxNLocator, nbins="auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


def band(ax, runs: list[Run], values: list[np.ndarray], colour: str, label: str, style: str = "-", *,
         spread: bool = True) -> None:
    """Mean over seeds as a line and, with `spread`, their range as a band; only the steps that all have. Where there is
    nothing to draw, as no value is known, the legend has no entry."""
    length = min(map(len, values))
    stack = np.stack([v[:length] for v in values])
    steps = runs[0].steps[:length]
    ax.plot(steps, stack.mean(axis=0), style, color=colour, label=label if np.isfinite(stack).any() else "",
            marker="." if length == 1 else None)
    ax.xaxis.set_major_locator(STEPS())
    if spread and len(values) > 1:
        ax.fill_between(steps, stack.min(axis=0), stack.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def heatmap(ax, run: Run, key: str) -> None:
    """What the log has of bins under `key`: steps to the right, bins upwards (hardest at the bottom); hatched where the
    bin is absent. Weights and rollouts are on a logarithmic scale, white where they are uniform."""
    x_TB, steps = run.bins(key), run.steps
    uniform = {"weight": 1.0, "rollouts": run.config["rollouts_per_prompt"]}.get(key)
    if uniform:
        reach = max(float(np.nanmax(np.abs(np.log2(x_TB / uniform)))), 1.0)  # 2 times or half, at least
        norm, colours = matplotlib.colors.LogNorm(uniform * 2**-reach, uniform * 2**reach), "RdBu_r"
        apart = np.ceil(reach / 4)  # ticks, in powers of 2
        ticks = uniform * 2.0 ** (apart * np.arange(-(reach // apart), reach // apart + 1))
    else:
        low, high, gamma = (-1, 1, 1) if key == "reward" else (0, None, 0.5)  # below 1 it spreads small shares
        norm, colours, ticks = matplotlib.colors.PowerNorm(gamma, low, high), "viridis", None
    ax.axvspan(steps[0] - 0.5, steps[-1] + 0.5, hatch="////", facecolor="#EEEEEE", edgecolor="#BBBBBB", linewidth=0)
    image = ax.imshow(np.ma.masked_invalid(x_TB.T), aspect="auto", origin="lower", interpolation="nearest", zorder=2,
                      cmap=colours, norm=norm, extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, x_TB.shape[1] - 0.5))
    ax.set_yticks(range(0, x_TB.shape[1], max(1, x_TB.shape[1] // 5)))
    ax.xaxis.set_major_locator(STEPS())
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02, ticks=ticks, format="{x:.3g}")
    bar.ax.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def bin_ticks(ax, bins: int) -> None:
    ax.set_xticks(range(bins))
    ax.set_xlim(-0.6, bins - 0.4)
    ax.set_xlabel("difficulty bin (0 = hardest)")


# ------------------------------------------------------------------------------------------------ the paper's figures


def panels(models: Models, columns: int, *needed: str, **kwargs):
    """A figure of one row of panels for each model: (figure, (axes, name, mode -> runs) of each row).

    Where a mode that is needed is missing, runs of both adversaries stand in for it and the name says so; a model that
    has neither is left out. Raises Missing when that is all of them.
    """
    found: Models = {}
    for name, modes in models.items():
        lacking = [m for m in needed if m not in modes]
        if not lacking or "both" in modes:
            found[f"{name}, both" if lacking else name] = {**modes, **{m: modes["both"] for m in lacking}}
    if not found:
        raise Missing(f"there are no runs of mode {' and '.join(needed)}, nor of both")
    figure, axes = rows_of(found, columns, **kwargs)
    return figure, zip(axes, found.keys(), found.values(), strict=True)


def figure_1(models: Models):
    """Benchmarks by method; tail-average weights of Prompt-GDRO; tail-average rollouts of Rollout-GDRO."""
    figure, rows = panels(models, 3, "prompt", "rollout", height=2.1, gridspec_kw={"width_ratios": [1.7, 1, 1]})
    for (left, centre, right), name, modes in rows:
        benchmarks(left, name, {m: runs for m, runs in modes.items() if runs[0].mode == m})
        prompt, rollout = modes["prompt"], modes["rollout"]
        n_bar = rollout[0].config["rollouts_per_prompt"]
        bars(centre, [tail(r.bins("weight")) for r in prompt], COLOURS["prompt"], start=1)
        centre.axhline(1, color=COLOURS["uniform"], linestyle="--", label="uniform")
        centre.set_yscale("log")
        centre.yaxis.set_major_formatter("{x:g}")
        centre.set(title="Prompt-GDRO", ylabel="weight, tail average")
        bars(right, [tail(r.bins("rollouts")) for r in rollout], COLOURS["rollout"])
        right.axhline(n_bar, color=COLOURS["uniform"], linestyle="--", label="uniform")
        right.set(title="Rollout-GDRO", ylabel="rollouts, tail average")
        for ax, run in ((centre, prompt[0]), (right, rollout[0])):
            bin_ticks(ax, len(run.share[0]))
    return figure


def benchmarks(ax, name: str, modes: dict[str, list[Run]]) -> None:
    """pass@8 of the last evaluation over all problems and by kind, in percent: means over seeds, the seeds as dots."""
    shown = [m for m in MODES if m in modes and all(r.evaluations for r in modes[m])]
    if not shown:
        raise Missing(f"{name}: no run has an eval.json")
    last = [r.last() for m in shown for r in modes[m]]
    if len({(e["problems"], e["rollouts"]) for e in last}) > 1:
        raise Missing(f"{name}: the runs were evaluated on other problems, or with other numbers of responses")
    first, width = last[0], 0.8 / len(shown)
    after = "-".join(map(str, dict.fromkeys((min(e["step"] for e in last), max(e["step"] for e in last)))))
    kinds = list(first["by_kind"]) if len(first["by_kind"]) > 1 else []
    for i, mode in enumerate(shown):
        centres = np.arange(1 + len(kinds)) + (i - (len(shown) - 1) / 2) * width
        found = 100 * np.array([[headline(e), *(e["by_kind"][kind][2] for kind in kinds)]
                                for e in (r.last() for r in modes[mode])]).T  # (all and kinds, S)
        ax.bar(centres, found.mean(axis=1), width, color=COLOURS[mode], label=MODES[mode], alpha=0.75)
        ax.plot(np.repeat(centres, found.shape[1]), found.ravel(), ".", color="black", markersize=1.5)
    ax.set_xticks(range(1 + len(kinds)), ["all", *(k.replace("_", " ") for k in kinds)], rotation=25, ha="right")
    ax.set(title=f"{name}, step {after}\ndots: runs", ylabel=f"pass@{headline_k(first['rollouts'])}, %")


def bars(ax, values: list[np.ndarray], colour: str, start: float = 0) -> None:
    """Mean over seeds by bin as bars from `start`, the seeds as dots; an absent bin has neither."""
    stack = np.ma.masked_invalid(np.stack(values))
    mean = stack.mean(axis=0).filled(np.nan)
    ax.bar(range(len(mean)), mean - start, bottom=start, color=colour, alpha=0.75)
    if len(values) > 1:
        ax.plot(np.tile(range(len(mean)), len(values)), stack.ravel(), ".", color="black", markersize=2)


def maps(models: Models, mode: str, shown: dict[str, str]):
    """Maps of step by bin, of the first seed of each model. shown: title -> key of the log's bins."""
    figure, rows = panels(models, len(shown), mode)
    for axes, name, modes in rows:
        run = modes[mode][0]
        for ax, (title, key) in zip(axes, shown.items(), strict=True):
            heatmap(ax, run, key)
            ax.set(title=title, xlabel="step (hatched: bin absent)")
        axes[0].set(title=f"{name}\n{next(iter(shown))}, seed {run.seed}", ylabel="bin (0 = hardest)")
    return figure


def dynamics(models: Models, mode: str, what: str, acted: Callable[[Run], np.ndarray]):
    """Mean bin, mass in easy bins and entropy, of the prompts and of what an adversary made of them, (T, B)."""
    figure, rows = panels(models, 3, mode)
    for axes, name, modes in rows:
        runs = modes[mode]
        for values, colour, label in (([r.share for r in runs], COLOURS["grpo"], "prompts"),
                                      ([acted(r) for r in runs], COLOURS[mode], what)):
            band(axes[0], runs, [logs.mean_bin(v) for v in values], colour, label)
            for low, style in ((3, "-"), (8, "--")):
                band(axes[1], runs, [logs.mass_from(v, low) for v in values], colour, "", style)
            band(axes[2], runs, [logs.entropy(v) for v in values], colour, label)
        bins = len(runs[0].share[0])
        axes[2].axhline(np.log(bins), color=COLOURS["uniform"], linestyle=":", label="uniform over bins")
        axes[0].set(title=f"{name}\nmean bin", xlabel="step", ylabel="bin (0 = hardest)")
        axes[1].set(title="bins >= 3 (solid), >= 8 (dashed)", xlabel="step", ylabel="mass")
        axes[2].set(title="entropy", xlabel="step", ylabel="nats")
    return figure


def stage_bars(models: Models, mode: str, shown: dict[str, tuple[str, Callable[[Run], np.ndarray]]]):
    """Bars by bin at four stages: label -> (colour, values of a run, (T, B)). A stage is the mean over seeds and the
    steps around it, a twentieth of the run each way: a single batch is too noisy."""
    figure, rows = panels(models, 4, mode, height=1.5, sharey="row")
    width = 0.8 / len(shown)
    for axes, name, modes in rows:
        runs, steps = modes[mode], len(modes[mode][0].log)
        for ax, at in zip(axes, stages(steps), strict=False):
            around = slice(max(0, at - steps // 20), at + steps // 20 + 1)
            share = np.concatenate([r.share[around] for r in runs]).mean(axis=0)
            for i, (label, (colour, of)) in enumerate(shown.items()):
                mean = np.concatenate([of(r)[around] for r in runs]).mean(axis=0)
                places = np.arange(len(share)) + (i - (len(shown) - 1) / 2) * width
                ax.bar(places, np.where(share > 0, mean, np.nan), width, color=colour, label=label)
            ax.set(title=f"step {runs[0].steps[at]}")
            bin_ticks(ax, len(share))
        for ax in axes[len(stages(steps)):]:
            ax.set_visible(False)
        axes[0].set(title=f"{name}\nstep {runs[0].steps[0]}", ylabel="share of the batch")
    return figure


def figure_6(models: Models):
    """Left: lead-lag gap (32) of Prompt-GDRO. Right: weighted standard error (33) of Rollout-GDRO against uniform."""
    figure, rows = panels(models, 2, "prompt", "rollout")
    for (left, right), name, modes in rows:
        runs = modes["prompt"]
        gap = [logs.lead_lag(r.series("bins", "weight"), r.share) for r in runs]
        even = [logs.lead_lag(np.ones_like(x), x) for x in (r.share for r in runs)]
        band(left, runs, gap, COLOURS["prompt"], "Prompt-GDRO")
        band(left, runs, even, COLOURS["uniform"], "uniform", "--", spread=False)
        left.set(title=f"{name}\nlead-lag (32)", xlabel="step", ylabel="bins (lower: on harder ones)")
        runs = modes["rollout"]
        sigma, n_bar = logs.bin_sigma(runs), runs[0].config["rollouts_per_prompt"]
        share = [r.share for r in runs]
        law = [np.maximum(logs.square_root_law(q, sigma, n_bar), 1e-9) for q in share]
        choices = (("uniform", "uniform", [np.full_like(q, n_bar) for q in share], "--"),
                   ("rollout", "Rollout-GDRO", [r.bins("rollouts") for r in runs], "-"),
                   ("law", "square-root law (30), best for (28)", law, ":"))
        for key, label, rollouts, style in choices:
            values = [logs.wse(q, np.nan_to_num(sigma), n) for q, n in zip(share, rollouts, strict=True)]
            band(right, runs, values, COLOURS[key], label, style, spread=key == "rollout")
        right.set(title="weighted standard error (33)", xlabel="step", ylabel="reward units")
    return figure


PAPER_FIGURES: dict[str, Callable] = {
    "1": figure_1,
    "3": lambda models: maps(models, "prompt", {"prompt share": "share", "adversary weight": "weight",
                                                "realised reward": "reward"}),
    # where the prompts are and where the weights, normalised over bins
    "4": lambda models: dynamics(models, "prompt", "weights", lambda r: r.series("bins", "weight")),
    "5": lambda models: stage_bars(models, "prompt", {"prompts": (COLOURS["prompt"], lambda r: r.share)}),
    "6": figure_6,
    "7": lambda models: maps(models, "rollout", {"prompt share": "share", "rollouts per prompt": "rollouts"}),
    # where the prompts are and where the rollouts
    "8": lambda models: dynamics(models, "rollout", "rollouts", logs.budget_share),
    "9": lambda models: stage_bars(models, "rollout", {"prompts": (COLOURS["grpo"], lambda r: r.share),
                                                       "rollouts": (COLOURS["rollout"], logs.budget_share)}),
}


# ------------------------------------------------------------------------------------------------ a run at a glance


def curve(ax, run: Run, *, key: str, scale: float = 1) -> None:
    """A number of the log, from 0 up where it is never below. key: as trackers write it, "mismatch/mean"."""
    values = scale * run.series(*key.split("/"))
    band(ax, [run], [values], COLOURS[run.mode], "")
    ax.yaxis.set_major_formatter("{x:g}")
    if not (values < 0).any():
        top = np.nanmax(values) or 1
        ax.set_ylim(-0.04 * top, 1.1 * top)  # so that a line at 0 is seen


def lengths(ax, run: Run) -> None:
    """Mean response length and, on an axis of its own, the share of responses that were cut."""
    cut = 100 * run.series("truncated_frac")
    curve(ax, run, key="response_tokens_mean")
    right = ax.twinx()
    right.plot(run.steps, cut, ":", color=COLOURS["uniform"])
    right.set_ylim(-4, 110)
    right.spines["right"].set_visible(True)


def held_out(ax, run: Run) -> None:
    """pass@k of every evaluation and, where eval.json has it, the 95% interval over its problems."""
    if not run.evaluations:
        raise Missing("no evaluation yet")
    steps, name = [e["step"] for e in run.evaluations], f"pass@{headline_k(run.last()['rollouts'])}"
    ends = np.array([e.get("intervals", {}).get(name, [None, None]) for e in run.evaluations], float)
    ax.vlines(steps, *(100 * ends.T), color=COLOURS[run.mode], alpha=0.4)
    ax.plot(steps, [100 * headline(e) for e in run.evaluations], "o-", color=COLOURS[run.mode], markersize=3)
    ax.set_title(f"held-out {name}, %{' (bars: 95%)' if np.isfinite(ends).any() else ''}")


def phases(ax, run: Run) -> None:
    """Seconds of each step by phase, one upon the other."""
    total = run.series("seconds", "total")
    named = [run.series("seconds", phase) for phase in PHASES if phase != "other"]
    parts = [np.append(x, x[-1]) for x in (*named, total - sum(named))]  # a step is as wide as in the maps
    edges = np.append(run.steps, run.steps[-1] + 1) - 0.5
    ax.stackplot(edges, parts, labels=PHASES, colors=PHASES.values(), step="post")
    ax.set_ylim(0, 1.7 * total[len(total) > 1:].max())  # a first step that compiles may stand out
    ax.legend(loc="upper left", ncols=3, fontsize=6, handlelength=0.7, columnspacing=0.8, frameon=True, edgecolor="w")


PHASES = {"generate": "#56B4E9", "reward": "#E69F00", "logprob": "#CC79A7", "update": "#332288",
          "other": "#BBBBBB"}
CURVES: dict[str, Callable] = {  # title -> what draws it. Does it learn, what does it write, is it sound?
    "mean reward": partial(curve, key="reward_mean"), "held-out pass@k": held_out,
    "groups without advantage, %": partial(curve, key="zero_std_frac", scale=100),
    "response tokens (dotted: cut, %)": lengths, "entropy, nats": partial(curve, key="entropy"),
    "gradient norm": partial(curve, key="grad_norm"),
    "mismatch |sampler - trainer|, nats": partial(curve, key="mismatch/mean"), "seconds a step": phases}
ACTING = {"grpo": ("share",), "prompt": ("share", "reward", "weight", "tokens"),
          "rollout": ("share", "reward", "rollouts", "tokens"),
          "both": ("share", "reward", "weight", "rollouts")}  # what is shown by bin


def figure_overview(run: Run):
    """One run at a glance, finished or not; a panel says what the log lacks for it. A batch and an evaluation at step N
    are of the policy after N steps. Of its reward it asks no more than to lie in [-1, 1]."""
    mode = "prompt" if run.config.get("allocation") == "weights" else run.mode  # counts that are made weights
    panels = CURVES | {f"{key} by bin (0 = hardest)": partial(heatmap, key=key) for key in ACTING[mode]}
    figure, axes = rows_of(range(len(panels) // 3), 3, height=1.35, sharex=True)
    for ax, (title, panel) in zip(axes.flat, panels.items(), strict=True):
        ax.set_title(title)
        ax.grid(alpha=0.3, linewidth=0.5)
        try:
            panel(ax, run)
        except Missing as missing:
            ax.text(0.5, 0.5, textwrap.fill(str(missing), 24), transform=ax.transAxes, ha="center", va="center")
            ax.set_yticks([])
    last = max([0, *run.steps, *(e["step"] for e in run.evaluations)])
    axes[0, 0].xaxis.set_major_locator(STEPS())
    axes[0, 0].set_xlim(-max(0.5, last / 50), last + max(0.5, last / 50))
    figure.supxlabel("step (bars: 95% over held-out problems; hatched: bin absent)", fontsize=8)
    figure.suptitle(f"{run.name}: {run.subject}, mode {run.mode}, seed {run.seed}", x=0.01, ha="left", fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------ the command


def label(folders: list[Path]) -> str:
    """What figures of these runs are called: the first's name, how many more, and a hash, for names repeat."""
    places = "\n".join(str(folder.resolve()) for folder in folders)
    more = f"+{len(folders) - 1}" * (len(folders) > 1)
    return f"{folders[0].resolve().name}{more}-{hashlib.blake2b(places.encode(), digest_size=3).hexdigest()}"


def save(figure, name: str, folder: Path) -> None:
    """With one legend above the whole figure, each label once; panels that have one of their own keep it."""
    entries = {label: handle for ax in figure.axes if not ax.get_legend()
               for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4)
    folder.mkdir(parents=True, exist_ok=True)
    for suffix in SUFFIXES:
        undated = {"CreationDate": None} if suffix == "pdf" else {}  # the same logs, the same bytes
        figure.savefig(folder / f"{name}.{suffix}", dpi=200, metadata={"Creator": CREATOR, **undated})
    plt.close(figure)
    print(folder / f"{name}.png")


def draw(functions: dict[str, Callable], data, folder: Path) -> None:
    """Draws what the logs have data for, and says of the rest what is missing; what was drawn of it before goes. Raises
    ValueError if nothing could be drawn."""
    left_out = 0
    for name, function in functions.items():
        try:
            save(function(data), f"figure_{name}", folder)
        except Missing as missing:
            plt.close("all")
            left_out += 1
            print(f"figure {name} left out: {missing}", file=sys.stderr)
            for old in (folder / f"figure_{name}.{suffix}" for suffix in SUFFIXES):
                if old.exists() and CREATOR.encode() in old.read_bytes():
                    old.unlink()
    if left_out == len(functions):
        raise ValueError("nothing could be drawn of these runs; --live shows each as it stands")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders; none = the study's")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--live", action="store_true", help="an overview of each RUN, no figure of the paper")
    instead.add_argument("--table", action="store_true", help="print tables and draw nothing")
    instead.add_argument("--samples", action="store_true", help="print rollouts of each RUN and draw nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where figures go [the study's: figures/, others: "
                                                                "figures/NAME/, the first run's name, +N, a hash]")
    args = parser.parse_args()
    if (args.live or args.samples) and not args.runs:
        parser.error(f"--{'live' if args.live else 'samples'} needs RUN, one or more run folders")
    try:
        runs = [Run.load(folder) for folder in args.runs]
        own = FIGURES / label(args.runs) if runs else FIGURES
        if args.table:
            print(run_table(runs) if runs else tables())
        elif args.samples:
            print("\n\n".join(map(sample_page, args.runs)))
        elif args.live:
            for run, folder in zip(runs, args.runs, strict=True):
                save(figure_overview(run), f"overview_{label([folder])}", args.out or own)
        elif runs:
            draw(PAPER_FIGURES, by_model(runs), args.out or own)
        else:
            modes = {task: {m: rows[m] for m in MODES if m in rows} for task, rows in logs.study().items()}
            draw(PAPER_FIGURES, modes, args.out or own)
            draw(figures.OF_ROWS, logs.study(), args.out or own)
            draw(figures.OF_SWEEPS, logs.sweeps(), args.out or own)
    except ValueError as error:
        sys.exit(f"plots.py: {error}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` and `| less` may end it
    main()
