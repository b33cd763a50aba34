"""From logs to what python plots.py prints, in Markdown: --table the study's `tables()`, or with runs `run_table`;
--samples a `sample_page` of each run."""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from metrics import markdown
from study import logs
from study.logs import (
    Missing,
    Run,
    Sweep,
    entropy,
    headline,
    headline_k,
    holm,
    interval,
    last_name,
    noise_ratios,
    p_value,
    paired,
    pairs,
    present,
    stages,
    study,
    sweeps,
    tail,
    whole_lines,
)
from study.rows import ASKED_AGAIN, BEST, DIAL, LONGER, PARTS, Row, written

NOTE = """Figures are of the end of training, in percent, on 600 held-out problems answered 16 times each at
temperature 1 without truncation. The unit is a base model: means over bases with 95% t-intervals over them, differences
paired by base. A base reports at the learning rate that is best for its row in the mean over the other bases of its
task."""
REACHED = (0.8, 0.9)  # pass@8 at which `reach_table` looks
RAREST = 3  # of the kinds of a task, which come from the most to the least often worked
FOUND = 0.15  # pass@1 from which on a kind counts as found
# Questions that were fixed before their rows ran, by table: (question, row, the row that it is held against)
QUESTIONS = {
    "The questions": (("Is Rollout-GDRO with maxrl better than maxrl alone?", "rollout-maxrl", "maxrl"),
                      ("Is moving rollouts better than the same counts as weights?", "rollout-maxrl", "weights-maxrl"),
                      ("Is Prompt-GDRO better than a fixed tilt?", "prompt", "tilt"),
                      ("Is maxrl, a fixed rule, better than grpo?", "maxrl", "grpo")),
    "The questions at 300 steps": (
        ("Is Rollout-GDRO with maxrl better than maxrl alone, after 300 steps?", "rollout-maxrl-long", "maxrl-long"),
        ("Is moving rollouts better than the same counts as weights, after 300 steps?", "rollout-maxrl-long",
         "weights-maxrl-long")),
    "The questions on fresh bases": (
        ("Are rollouts by rank with maxrl better than maxrl alone?", "rank-maxrl-fresh", "maxrl-fresh"),
        ("Is moving rollouts by rank better than the same counts as weights?", "rank-maxrl-fresh",
         "rank-weights-maxrl-fresh"),
        ("Is Rollout-GDRO (gain) with maxrl better than maxrl alone, asked again?", "rollout-maxrl-fresh",
         "maxrl-fresh")),
}
EQUAL = 3.0  # points: an interval inside this either way is a no
RUN_NOTE = """Figures in percent, as far as each run is. best: the evaluation of the highest pass@k, chosen on the
problems that it reports; worst kind: of the last evaluation; hours: of training steps, without evaluations."""
STAGES = 3  # of training that a page of samples shows
LINES = {"prompt": 12, "response": 24, "gold": 4, "found": 4}  # the most that it shows of a text


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


def rarest_kinds(evaluation: dict) -> float:
    return float(np.mean([kind[2] for kind in list(evaluation["by_kind"].values())[-RAREST:]]))


def spread(values: np.ndarray, signed: bool = False, digits: int = 1) -> str:
    """Mean over bases and 95% interval: 62.9 [58.1, 67.6]."""
    form = f"{{:{'+' if signed else ''}.{digits}f}}"
    mean, low, high = (form.format(x) for x in interval(values))
    return mean if len(values) < 2 else f"{mean} [{low}, {high}]"


def percent(values: Iterable[float]) -> str:
    return f"{100 * np.mean(list(values)):.1f}"


def difference(runs: list[Run], baseline: list[Run], figure: Callable[[dict], float]) -> str:
    """Paired, in points; empty where no base is in both."""
    values = paired(runs, baseline, figure)
    return spread(100 * values, True) if len(values) else ""


def rates(runs: list[Run]) -> str:
    """The rates at which the bases report: 2e-4, or 1e-4 (3) 2e-4 (5)."""
    count = Counter(r.config["learning_rate"] for r in runs)
    return " ".join(written(rate) + f" ({count[rate]})" * (len(count) > 1) for rate in sorted(count))


def held_against(row: Row, found: dict[str, list[Run]], swept: dict[str, Sweep]) -> list[Run]:
    """The runs that a row is compared with: at its own rate where it has only one, else at their cross-fitted ones."""
    rates = {r.config["learning_rate"] for r in found[row.name]}
    if len(swept.get(row.name, ())) == 1 and rates <= swept.get(row.against, {}).keys():
        return swept[row.against][rates.pop()]
    return found.get(row.against, [])


def outcome(row: Row, found: dict[str, list[Run]], swept: dict[str, Sweep]) -> list[str]:
    """One line of a table of outcomes, figures in percent."""
    runs = found[row.name]
    last, against = [r.last() for r in runs], held_against(row, found, swept)
    if row.name == row.against or not runs[0].log:  # the untrained model is not a method
        against = []
    minus = difference(runs, against, headline)
    ours, theirs = ([headline(r.last()) for r in group] for group in pairs(runs, against))
    return [row.name, str(len(runs)), rates(runs) if runs[0].log else "",
            percent(map(headline, last)), row.against if minus else "",
            minus, f"{100 * (np.mean(ours) / np.mean(theirs) - 1):+.1f}%" if minus else "",
            percent(map(mean_success, last)), difference(runs, against, mean_success),
            percent(map(worst_kind, last)), difference(runs, against, worst_kind),
            f"{np.mean([r.series('tokens_generated').sum() for r in runs]) / 1e3:.0f}" if runs[0].log else "0"]


def outcome_tables() -> str:
    """Every part of the study for every task: outcomes, and paired differences to the row that each is held against."""
    head = ["row", "bases", "rate", "pass@8", "against", "paired difference", "relative", "mean@16",
            "mean@16, paired difference", "worst kind, pass@8", "worst kind, paired difference", "thousand tokens"]
    out = []
    for part, rows in PARTS.items():
        for task, found in study().items():
            lines = [outcome(row, found, sweeps().get(task, {})) for row in rows if row.name in found]
            if lines:
                out.append(f"**{part}: {task}**\n\n{markdown(head, lines)}")
    return "\n\n".join(out)


def summary_table() -> str:
    """The arena in short: pass@8 by task, and differences to grpo over the pairs of both tasks."""
    lines = []
    for row in (row.name for row in PARTS["The arena"] if all(row.name in found for found in study().values())):
        line = [row, *(percent(headline(r.last()) for r in found[row]) for found in study().values())]
        if row not in ("base", "grpo"):
            passed = pooled(row, "grpo", headline)
            line += [spread(passed, True), f"{(passed > 0).sum()} of {len(passed)}",
                     *(spread(pooled(row, "grpo", figure), True) for figure in (mean_success, rarest_kinds))]
        lines.append(line + [""] * (5 + len(study()) - len(line)))
    head = ["row", *study(), "pass@8 - grpo's", "ahead in", "mean@16 - grpo's", "three rarest kinds - grpo's"]
    return "**In short**\n\n" + markdown(head, lines)


def pooled(row: str, other: str, figure: Callable[[dict], float]) -> np.ndarray:
    """Paired differences of two rows in points, the bases of all tasks together."""
    found = [paired(f[row], f[other], figure) for f in study().values() if row in f and other in f]
    return 100 * np.concatenate(found) if found else np.zeros(0)


def verdict(values: np.ndarray, p: float) -> str:
    """yes or no, the reverse (p, adjusted, below 0.05), no (the interval inside +-EQUAL) or undecided."""
    mean, low, high = interval(values)
    if p < 0.05:
        return "yes" if mean > 0 else "no, the reverse"
    return "no" if -EQUAL < low and high < EQUAL else "undecided"


def answers(title: str) -> list[dict[str, str]]:
    """The questions of a table with their answers: differences pooled over tasks, p adjusted by Holm over those of the
    table. Empty while a question has fewer than two pairs."""
    questions = QUESTIONS[title]
    values = [pooled(row, other, headline) for _, row, other in questions]
    if not all(len(v) > 1 for v in values):
        return []
    adjusted, out = holm([p_value(v) for v in values]), []
    for (question, row, other), v, p in zip(questions, values, adjusted, strict=True):
        by_task = {task: difference(f.get(row, []), f.get(other, []), headline) for task, f in study().items()}
        rest = {name: spread(pooled(row, other, figure), True) for name, figure in (
            ("mean@16", mean_success), ("three rarest kinds", rarest_kinds), ("worst kind", worst_kind))}
        out.append({"question": question, "rows": f"{row} - {other}", "pairs": str(len(v)), "pass@8": spread(v, True),
                    "p (Holm)": f"{p:.2g}", "answer": verdict(v, p), **by_task, **rest})
    return out


def question_tables() -> list[str]:
    """Each table of questions, and all in short."""
    found = {title: lines for title in QUESTIONS if (lines := answers(title))}
    short = ("question", "pairs", "pass@8", "p (Holm)", "answer", "mean@16", "three rarest kinds")
    tables = {**found, "All questions in short": [{name: line[name] for name in short}
                                                  for lines in found.values() for line in lines]}
    return [f"**{title}**\n\n" + markdown(list(lines[0]), [list(line.values()) for line in lines])
            for title, lines in tables.items() if lines]


def rate_table(task: str, rows: dict[str, Sweep]) -> str:
    """What the tuning saw: pass@8 and mean@16 of every row at every rate, means over bases."""
    tried = sorted({rate for sweep in rows.values() for rate in sweep if len(sweep) > 1})
    lines = [[name, *(f"{100 * np.mean([figure(r.last()) for r in sweep[rate]]):.1f}" if rate in sweep else ""
                      for figure in (headline, mean_success) for rate in tried)]
             for name, sweep in rows.items() if len(sweep) > 1]
    head = ["row", *(f"{name}, {written(rate)}" for name in ("pass@8", "mean@16") for rate in tried)]
    return f"**By rate: {task}**\n\n" + markdown(head, lines)


def dial_table(task: str, rows: dict[str, Sweep]) -> str:
    """What rules gain against how much skills spread between kinds, the share of the textbook that stands under any
    sign, on the bases that have all shares, at one rate. Empty while there are none."""
    names = {share: [name + f"-disguised-{share}" * (share != "1") for name in ("grpo", "maxrl", "rollout-maxrl")]
             for share in (*DIAL, "1")}
    if not all(name in rows for of_share in names.values() for name in of_share):
        return ""
    (rate,), lines = BEST[task], []
    runs = {share: [rows[name][rate] for name in of_share] for share, of_share in names.items()}
    bases = set.intersection(*({r.seed for r in group} for found in runs.values() for group in found))
    for share, found in runs.items():
        grpo, maxrl, both = ([r for r in group if r.seed in bases] for group in found)
        lines.append([share, str(len(bases)), percent(headline(r.last()) for r in grpo),
                      *(difference(a, b, figure) for a, b in ((maxrl, grpo), (both, maxrl))
                        for figure in (headline, mean_success, worst_kind))])
    head = ["share under any sign", "bases", "grpo", *(f"{pair}, {figure}" for pair in (
        "maxrl - grpo", "rollout-maxrl - maxrl") for figure in ("pass@8", "mean@16", "worst kind"))]
    return f"**The dial: {task}**\n\n" + markdown(head, lines)


def first_at(run: Run, level: float) -> int | None:
    """Step of the first evaluation with this pass@8, None where there is none."""
    return next((e["step"] for e in run.evaluations if headline(e) >= level), None)


def reach_table(task: str, rows: dict[str, Sweep]) -> str:
    """How fast the longer runs learn, by row and rate: mean pass@8 of their evaluations, which come at even distances,
    and the steps of the first at which it is REACHED, base by base."""
    lines = [[row.name, written(rate), percent(headline(e) for r in runs for e in r.evaluations),
              *(", ".join(str(first_at(r, level) or "never") for r in runs) for level in REACHED)]
             for row in PARTS[LONGER] for rate, runs in rows.get(row.name, {}).items()]
    head = ["row", "rate", "mean pass@8 of all evaluations", *(f"steps to {level:.0%}, by base" for level in REACHED)]
    return f"**How fast: {task}**\n\n" + markdown(head, lines) if lines else ""


def kind_table(task: str, rows: dict[str, list[Run]], part: str = "The arena", of: str = "By kind") -> str:
    """By kind of problem and row of a part: pass@8, pass@1 (whose losses the first hides), bases that found it."""
    names, tables = [row.name for row in PARTS[part] if row.name in rows], []
    if not names:
        return ""
    for title, place in (("pass@8", 2), ("pass@1", 1), (f"bases with pass@1 over {FOUND:.0%}", None)):
        lines = []
        for kind in rows[names[0]][0].last()["by_kind"]:
            by_row = [[r.last()["by_kind"][kind] for r in rows[name]] for name in names]
            lines.append([kind, *(f"{100 * np.mean([k[place] for k in kinds]):.1f}" if place else
                                  f"{sum(k[1] > FOUND for k in kinds)} of {len(kinds)}" for kinds in by_row)])
        tables.append(f"**{of}, {title}: {task}**\n\n" + markdown(["kind", *names], lines))
    return "\n\n".join(tables)


def signal_table(task: str, rows: dict[str, list[Run]]) -> str:
    """What the signals are worth: |surrogate| by optimiser step of a batch, and spread between bins over noise."""
    lines = []
    for name in (n for n in ("grpo", "prompt") if n in rows):
        for signal in ("surrogate", "reward", "variance"):
            ratios = np.concatenate([noise_ratios(r, signal) for r in rows[name]])
            size = np.concatenate([np.abs(r.series("signals", signal, "mean")).ravel() for r in rows[name]])
            by_update = np.mean([r.series("surrogate_abs").mean(axis=0) for r in rows[name]], axis=0)
            lines.append([name, str(len(rows[name])), signal, f"{np.nanmedian(size):.1e}",
                          " ".join(f"{x:.0e}" for x in by_update) if signal == "surrogate" else "",
                          f"{np.nanmedian(ratios):.2f}", f"{100 * np.mean(ratios[np.isfinite(ratios)] > 2):.0f}%"])
    head = ["runs", "bases", "signal", "median size of a bin's", "mean size by optimiser step of a batch",
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
    head = ["row", "bases", "most rollouts of a bin", "prompts of no signal", "rollouts of no signal",
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
    head = ["row", "bases", "least weight, tail mean", "greatest weight, tail mean", "least ever applied",
            "greatest ever applied", "prompts in outer two bins", "exp(entropy of shares)"]
    return f"**What weights and bins became: {task}**\n\n" + markdown(head, lines)


def exact_table(task: str, rows: dict[str, list[Run]]) -> str:
    """How often an exact budget with one count a bin leaves a single choice, from the bins that the runs had."""
    lines = []
    for name, runs in rows.items():
        if name not in ("grpo", "rollout", "paper-rollout"):
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
    long_kinds = partial(kind_table, part=ASKED_AGAIN, of="By kind at 300 steps")
    functions = (kind_table, long_kinds, allocation_table, weight_table, signal_table, exact_table)
    by_rate = [table(task, rows) for table in (reach_table, dial_table, rate_table) for task, rows in sweeps().items()]
    by_task = filter(None, [table(task, rows) for table in functions for task, rows in study().items()])
    return "\n\n".join([NOTE, summary_table(), *question_tables(), outcome_tables(), *filter(None, by_rate), *by_task])


# ------------------------------------------------------------------------------------------------ any runs


def run_table(runs: list[Run]) -> str:
    """One line a run. Runs that drew different numbers of responses have columns of their own."""
    lines = [run_line(run) for run in runs]
    head = list(dict.fromkeys(name for line in lines for name in line))
    return f"{RUN_NOTE}\n\n{markdown(head, [[line.get(name, '') for name in head] for line in lines])}"


def run_line(run: Run) -> dict[str, str]:
    """Column -> cell; without evaluations there are no columns for them."""
    tokens, hours = ((run.series(*path).sum() if run.log else 0) for path in (("tokens_generated",),
                                                                              ("seconds", "total")))
    line = {"run": run.name, "trained": run.subject, "mode": run.mode, "rule": run.rule, "seed": str(run.seed),
            "steps": str(len(run.log)), "tokens": f"{tokens:,.0f}", "hours": f"{hours / 3600:.3g}"}
    if not run.evaluations:
        return line
    last = run.last()
    line["evaluated on"] = (f"{last['problems']} of {last_name(run.config['eval_data']) or 'those held out'}, "
                            f"temperature {run.config['eval_temperature']:g}")
    for name, e in (("last", last), ("best", max(run.evaluations, key=headline))):
        line |= {f"{name} at step": str(e["step"]), f"{name} pass@{headline_k(e)}": f"{100 * headline(e):.1f}",
                 f"{name} mean@{e['rollouts']}": f"{100 * mean_success(e):.1f}"}
    if len(last["by_kind"]) > 1:
        worst = min(last["by_kind"], key=lambda kind: last["by_kind"][kind][2])
        line[f"worst kind, pass@{headline_k(last)}"] = f"{worst} {100 * worst_kind(last):.1f}"
    return line


def sample_page(folder: Path) -> str:
    """Rollouts of a run to read, of evenly spaced steps. Raises Missing for a run that has none."""
    run, samples = Run.load(folder), whole_lines(folder / "samples.jsonl")
    if not samples:
        raise Missing(f"{folder}: samples.jsonl is missing or empty; train.py writes it with the first step")
    steps = sorted({s["step"] for s in samples})
    page = [f"# {run.name}: {run.subject}, mode {run.mode}"]
    for step in (steps[i] for i in stages(len(steps), STAGES)):
        page.append(f"## step {step}, of 0 to {steps[-1]}")
        page += [sample_text(s, own_reward=bool(run.config.get("reward"))) for s in samples if s["step"] == step]
    return "\n\n".join(page)


def sample_text(sample: dict, own_reward: bool) -> str:
    """One rollout: verdict, numbers, then the texts. A reward of one's own looks for no answer."""
    numbers = ", ".join(f"{key} {sample[key]:.3g}" for key in ("reward", "bin", "n", "weight", "factor"))
    texts = {"prompt": sample["prompt"], "response": sample["response"], "gold": sample["answer"]}
    if not own_reward:
        texts["found"] = "(no answer)" if sample["found"] is None else sample["found"]
    verdict = ("right" if sample["right"] else "wrong") + ", cut at the length limit" * sample["truncated"]
    lines = [f"    {name if i == 0 else '':10}{line}".rstrip() for name, text in texts.items()
             for i, line in enumerate(excerpt(text or "(empty)", LINES[name]))]
    return f"**{visible(sample['id'])}: {verdict}** ({numbers})\n\n" + "\n".join(lines)


def excerpt(text: str, most: int, width: int = 100) -> list[str]:
    """The text in lines; of more than `most` the middle is left out and its characters, but for line ends, counted."""
    lines = [piece for line in text.split("\n") for piece in textwrap.wrap(
        visible(line), width, expand_tabs=False, replace_whitespace=False, drop_whitespace=False) or [""]]
    if len(lines) <= most:
        return lines
    head, tail = most // 2, len(lines) - (most - most // 2)
    left_out = sum(map(len, lines[head:tail]))
    return [*lines[:head], f"[... {left_out:,} characters left out ...]", *lines[tail:]]


def visible(text: str) -> str:
    """Control characters, and what else has no glyph, by their escapes: a terminal would obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
