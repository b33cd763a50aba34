"""Numbers in the README and in docs/ are those of the logs in results/, and what they name exists."""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

import plan
from config import parse_args
from metrics import Evaluation
from study import logs
from study import tables as tabulated
from study.rows import BEST, DIAL, HALF, PARTS

ROOT = Path(__file__).parents[1]
TEXTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PROSE = " ".join(" ".join(TEXTS.values()).split())
study, tables = functools.cache(logs.study), functools.cache(tabulated.tables)


def minus(task: str, row: str, other: str, figure=logs.headline) -> str:
    """Paired difference of two rows in points, with its interval."""
    return tabulated.spread(100 * logs.paired(study()[task][row], study()[task][other], figure), signed=True)


def cell(table: str, row: str, column: str) -> str:
    """One cell of a table that plots.py --table prints."""
    lines = tables().split(f"**{table}**\n\n")[1].split("\n\n")[0].splitlines()
    head = [c.strip() for c in lines[0].strip("|").split("|")]
    for line in lines[2:]:
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[0] == row:
            return cells[head.index(column)]
    raise KeyError(f"{table}: no row {row}")


def at_rate(task: str, row: str, other: str, rates=BEST, figure=logs.headline) -> np.ndarray:
    """Paired differences of two rows in points, both at the task's one rate of `rates`."""
    sweep, (rate,) = logs.sweeps()[task], rates[task]
    return 100 * logs.paired(sweep[row][rate], sweep[other][rate], figure)


@functools.cache
def found() -> dict[str, str]:
    """The numbers that the texts state, computed."""
    sweeps = [sweep for rows in logs.sweeps().values() for sweep in rows.values()]
    runs = [run for sweep in sweeps for group in sweep.values() for run in group]
    out = {"bases": str(min(len(rows["grpo"]) for rows in study().values())), "runs": str(len(runs)),
           "hours": f"{sum(r.config.get('seconds', 0) for r in runs) / 3600:.0f}"}
    for names, title in ((("beats", "moved", "adaptive", "rule"), "The questions"),
                         (("again", "moved_again"), "The questions at 300 steps"),
                         (("fresh", "fresh_moved", "fresh_gain"), "The questions on fresh bases")):
        for name, (question, *_) in zip(names, tabulated.QUESTIONS[title], strict=True):
            out |= {f"{name}_{key}": cell(title, question, column) for key, column in
                    (("pass", "pass@8"), ("mean", "mean@16"), ("rare", "three rarest kinds"), ("answer", "answer"),
                     ("p", "p (Holm)"), ("pairs", "pairs"))}
    for row in ("maxrl", "rollout", "rollout-maxrl", "tilt"):
        out[f"all_{row}"] = cell("In short", row, "pass@8 - grpo's")
    for x, task in (("a", "arithmetic"), ("p", "permutations")):
        out |= {f"{key}_{x}": minus(task, row, "grpo") for key, row in
                (("tilt", "tilt"), ("rollout", "rollout"), ("prompt", "prompt"), ("both", "both-maxrl"))}
        out |= {f"{key}_mean_{x}": minus(task, row, "grpo", tabulated.mean_success) for key, row in
                (("both", "both-maxrl"), ("rm", "rollout-maxrl"))}
        mean = {row: np.mean([logs.headline(r.last()) for r in runs]) for row, runs in study()[task].items()}
        out[f"rel_{x}"] = f"{100 * (mean['rollout-maxrl'] / mean['grpo'] - 1):+.1f}%"
        out[f"over_{x}"] = f"{100 * (mean['rollout-maxrl'] / max(mean['maxrl'], mean['tilt']) - 1):+.1f}%"
        out |= {f"{row}_{x}": cell(f"The paper's settings: {task}", row, "paired difference")
                for row in ("paper-prompt", "paper-rollout")}
        out |= {f"riv_{row.name}_{x}": cell(f"Rivals: {task}", row.name, "paired difference")
                for row in PARTS["Rivals"]}
        out |= {f"{utility}_{x}": tabulated.spread(at_rate(task, f"rollout-{utility}", "grpo"), signed=True)
                for utility in ("variance", "surrogate")}
        of_counts = functools.partial(cell, f"What the allocations did: {task}")
        out |= {f"wse_{x}": of_counts("rollout", "WSE (33)"),
                f"wse_variance_{x}": of_counts("rollout-variance", "WSE (33)"),
                f"v28_{x}": of_counts("rollout-variance", "variance (28)"),
                f"law_{x}": of_counts("rollout-variance", "(28) by the law (30)")}
        out[f"one_{x}"] = cell(f"Exact budgets: {task}", "rollout", "steps with one choice")
        out[f"outer_{x}"] = cell(f"What weights and bins became: {task}", "prompt", "prompts in outer two bins")
        rank = at_rate(task, "rollout-rank-maxrl", "rollout-maxrl")
        out |= {f"rank_old_{x}": f"{rank[:4].mean():+.1f}", f"rank_new_{x}": f"{rank[4:].mean():+.1f}"}
    dial = {column: [cell(f"The dial: {task}", share, column) for task in study() for share in (*DIAL, "1")]
            for column in ("grpo", "maxrl - grpo, pass@8", "rollout-maxrl - maxrl, pass@8")}
    for key, task_cells in (("dial_a", dial["grpo"][:3]), ("dial_p", dial["grpo"][3:])):
        out[key] = ", ".join(f"{float(x):.0f}" for x in task_cells)
    for key, column in (("dial_rule", "maxrl - grpo, pass@8"), ("dial_moved", "rollout-maxrl - maxrl, pass@8")):
        means = [float(x.split(" [")[0]) for x in dial[column]]
        out[key] = f"{min(means):+.1f} to {max(means):+.1f}"
    for key, row, figure in (("rank_all", "rollout-maxrl", logs.headline), ("rank_rule", "maxrl", logs.headline),
                             ("rank_mean", "rollout-maxrl", tabulated.mean_success),
                             ("rank_rule_mean", "maxrl", tabulated.mean_success)):
        both = [at_rate(task, "rollout-rank-maxrl", row, figure=figure) for task in study()]
        out[key] = tabulated.spread(np.concatenate(both), signed=True)
    twice = [at_rate(task, f"rollout-maxrl{part}", f"maxrl{part}") for task in study() for part in ("", "-fresh")]
    out["gain_twice"] = tabulated.spread(np.concatenate(twice), signed=True)
    rank = np.concatenate([at_rate(task, "rank-maxrl-fresh", "rollout-maxrl-fresh") for task in study()])
    out["rank_gain_fresh"] = tabulated.spread(rank, signed=True)
    fixed = np.concatenate([at_rate(task, "rollout-maxrl-long", "maxrl-long", HALF) for task in study()])
    out |= {"fixed_pass": tabulated.spread(fixed, signed=True), "fixed_p": f"{logs.p_value(fixed):.2f}"}
    out["base0_a"] = f"{at_rate('arithmetic', 'rollout-maxrl-300', 'maxrl-300', HALF)[0]:+.1f}"
    for row in ("grpo", "maxrl", "rollout-maxrl", "weights-maxrl"):
        on = sorted({cell("By kind at 300 steps, bases with pass@1 over 15%: arithmetic", kind, f"{row}-long")[0]
                     for kind in ("thrice_second", "thrice_less", "thrice_first")})
        out[f"rare_{row}"] = " to ".join(dict.fromkeys((on[0], on[-1])))
    best, twice = ([float(cell("By rate: arithmetic", row.name, f"pass@8, {rate}")) for row in PARTS["The arena"][1:]]
                   for rate in ("2e-4", "4e-4"))
    cost = np.subtract(best, twice)
    out["cost_least"], out["cost_most"], out["rate_cost"] = f"{min(cost):.0f}", f"{max(cost):.0f}", f"{cost[2]:.0f}"
    weights = [cell(f"What weights and bins became: {task}", "paper-prompt", f"{end} ever applied")
               for task in study() for end in ("least", "greatest")]
    out["weight_low"], out["weight_high"] = (f"{f(map(float, weights)):.2f}" for f in (min, max))
    sizes = np.mean([r.series("surrogate_abs").mean(axis=0) for r in study()["arithmetic"]["grpo"]], axis=0)
    out["S0"], out["S1"] = f"{sizes[0]:.0e}", f"{sizes[1]:.0e}"
    for name, signal in (("SNR_S", "surrogate"), ("SNR_R", "reward")):
        ratios = np.concatenate([logs.noise_ratios(r, signal) for r in study()["arithmetic"]["grpo"]])
        out[name] = f"{np.nanmedian(ratios):.2f}"
    return out


def test_results_tables_md_is_what_plots_prints():
    kept = (ROOT / "results" / "TABLES.md").read_text()
    assert kept == tables() + "\n", "python plots.py --table > results/TABLES.md"


@pytest.mark.parametrize("name, fewest", [("README.md", 13), ("study.md", 30)])
def test_every_line_of_a_result_table_is_one_that_plots_prints(name, fewest):
    text = TEXTS[name].split("## Install")[0]
    shown = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(shown) >= fewest and not [line for line in shown if line not in set(tables().splitlines())]


# What the texts say, with the places of the numbers that `found` computes.
SAID = (
    "a prompt's loss is {S0}, rounding; on the second {S1}.",
    "Between bins it spreads {SNR_S} times what noise alone would",
    "minus the reward {SNR_R} times.",
    "would leave one choice in {one_a} of the steps",
    "{outer_a} of prompts in the outer two bins",
    "*changes* WSE by {wse_a} and {wse_p} (arithmetic, permutations), by variance by {wse_variance_a} and "
    "{wse_variance_p}, and the latter is {riv_rollout-variance_a} and {riv_rollout-variance_p} points",
    "All {runs} runs took {hours} hours in sum,",
    "`rollout-maxrl` is {rel_a} and {rel_p} above grpo in",
    "which is pass@1, it gains {rm_mean_a} and {rm_mean_p} points.",
    "twice the best rate costs {cost_least} points of GRPO on arithmetic and {rate_cost} of `rollout-maxrl`, the",
    "where the first question has {beats_pass} now); the p-values",
    "of each task `rollout-maxrl` is {over_a} and {over_p}, and no pass@8",
    "row, not planned, it is {fixed_pass} (p {fixed_p}).",
    "In mean@16 moved rollouts keep {moved_again_mean}.",
    "arithmetic the three rarest on {rare_rollout-maxrl} of 7 bases, weights on {rare_weights-maxrl}, maxrl on "
    "{rare_maxrl}, GRPO on {rare_grpo}.",
    "of 50 steps, commit `9a35af7`, {base0_a} at half of",
    "eight, at the best rate: {rank_rule} points of pass@8 above maxrl alone over 16 pairs, {rank_rule_mean} of "
    "mean@16, {rank_all} against `gain` with",
    "are better than maxrl alone: {fresh_pass} points of pass@8 (p {fresh_p}), {fresh_mean} of mean@16.",
    "must be moved stays open: {fresh_moved_pass} above the same counts as weights (p {fresh_moved_p}).",
    "as much and scatters more, {fresh_gain_pass} (over the 32 pairs of both times {gain_twice}, not adjusted), "
    "and the two are not told apart, {rank_gain_fresh}.",
    "Prompt-GDRO is {paper-prompt_a} and {paper-prompt_p} points of pass@8 (arithmetic, permutations), "
    "Rollout-GDRO {paper-rollout_a} and {paper-rollout_p}.",
    "The prompt weights never left {weight_low} to {weight_high}: on a batch's",
    "**Rules.** Pass@k training gains {riv_pass-at-k_a} and {riv_pass-at-k_p} points over GRPO,",
    "GRPO {riv_dr-grpo_a} and {riv_dr-grpo_p}.",
    "GRPO**: by the paper's utility {surrogate_a} and {surrogate_p} points, by variance (28), which its analysis "
    "asks for, {variance_a} and {variance_p}: on arithmetic worse",
    "Against `gain`, Knapsack RL {riv_rollout-knapsack_a} and {riv_rollout-knapsack_p}, a fixed schedule by the "
    "rank of a bin (E3) {riv_rollout-rank_a} and {riv_rollout-rank_p}.",
    "a prompt instead of 12: {riv_rollout-maxrl-32_a} and {riv_rollout-maxrl-32_p}.",
    "On permutations GRPO reaches {dial_p} at 0, 0.5 and 1, so there the dial does set how hard the search is; on"
    " arithmetic {dial_a}. maxrl's gain over GRPO is positive at every share, {dial_rule}, and what Rollout-GDRO "
    "adds to it, {dial_moved}, is nowhere told",
    "tuned against tuned it is {prompt_a} and {prompt_p} points against GRPO, and a fixed exponent of the bins' "
    "estimate, the control that was missing, gives {tilt_a} and {tilt_p}.",
    "by expected gain beat GRPO*: {rollout_a} and {rollout_p} now.",
    "maxrl and prompts weighing 1 {both_a} and {both_p}, and {both_mean_a} and {both_mean_p} in mean@16.",
    "weighted standard error (33) by {wse_a} and {wse_p}; counts by variance change (28) itself by {v28_a} and "
    "{v28_p} only, where its square-root law would allow {law_a} and {law_p}.",
    "Prompt-GDRO is {paper-prompt_a} and {paper-prompt_p} points of pass@8 with weights of {weight_low} to "
    "{weight_high}, Rollout-GDRO {paper-rollout_a} and {paper-rollout_p}.",
    "utility** (`--adversary tuned`) Rollout-GDRO gains {all_rollout} points over GRPO,",
    "success rate in the batch, {all_maxrl}; both together {all_rollout-maxrl}.",
    "rank`), does add to it: {fresh_pass} over 16 pairs,",
    "twice the best rate costs {cost_least} to {cost_most} points.",
)


@pytest.mark.parametrize("said", SAID)
def test_what_the_texts_say_is_computed_from_the_logs(said):
    assert said.format(**found()) in PROSE


WRITTEN = ("config.json", "paths.json", "eval.json", "best/evaluation.json")  # by runs


def test_every_test_file_and_page_that_the_texts_name_exists():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    for text in TEXTS.values():
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}" in tests or (ROOT / "tests" / f"{name}.py").exists(), name
        for name in re.findall(r"`([\w/.]+\.(?:py|txt|json|cff))`", text):
            assert (ROOT / name).exists() or name in WRITTEN, name
    for page, text in TEXTS.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for name in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            assert (folder / name).exists(), name


def test_the_end_of_the_first_run_is_what_its_evaluation_says():
    last = json.loads((ROOT / "results" / "first_run" / "eval.json").read_text())[-1]
    assert f"{Evaluation.from_json(last).line()}\nmodel: out/arithmetic-prompt-0/model" in TEXTS["README.md"]


def test_the_readme_is_short():
    words = re.findall(r"\S*\w\S*", TEXTS["README.md"])  # a border of a table is none
    assert len(TEXTS["README.md"].splitlines()) <= 150 and len(words) <= 1500


def test_every_logged_key_is_explained_and_no_other():
    line = study()["arithmetic"]["grpo"][0].log[0]
    explained = set(re.findall(r"`(\w+)`", "".join(x.split("|")[1] for x in TEXTS["log.md"].splitlines()
                                                   if x.startswith("| `"))))
    assert set(line) | {"ranks"} == explained  # which is in later logs than the study's


def test_the_seconds_by_threads_are_those_of_the_file():
    rows = json.loads((ROOT / "results" / "bench" / "threads.json").read_text())["threads"]
    one, two, passive = ([row for row in rows if row["what"] == what]
                         for what in ("1 thread", "2 threads", "2 threads, passive"))
    said = [f"{row['median s a step']:.2f}" for pair in zip(one, two, strict=True) for row in pair]
    assert ("takes {} s with one and {} s with two when nothing else runs; beside one busy process {} and {} s, beside "
            "two {} and {} s").format(*said) in PROSE
    assert "up to {:.1f} s".format(two[-1]["worst s"]) in PROSE
    assert "gives {}, {} and {} s".format(*(f"{row['median s a step']:.2f}" for row in passive)) in PROSE


def test_what_fits_which_cards_is_what_plan_says():
    rows = [line.split("|")[1:-1] for line in TEXTS["README.md"].splitlines() if line.startswith("| `qwen3-")]
    assert len(rows) == 4
    for name, *cells in ([c.strip() for c in row] for row in rows):
        cfg, _, _ = parse_args(["--preset", name.split("`")[1]])
        model = plan.known_model(cfg.model)
        fewest = [next(n for n in (1, 2, 4, 8) if not plan.over(model, cfg, n, 8, plan.CARDS[card].memory))
                  for card in ("80 GB", "141 GB")]
        peak = max(sum(x.values()) for x in plan.phases(model, cfg, 8, 8, plan.CARDS["80 GB"].memory[1]).values())
        *_, step, _, hours = map(float, plan._time_row(model, cfg, "80 GB", 8)[1:])
        run = f"{hours:.1f}" if hours < 1 else f"{hours:.0f}"
        assert cells == [*map(str, fewest), f"{peak / plan.GIB:.0f} GiB", f"{step:.0f} s", f"{run} h"], name


def test_the_seconds_beside_trl_are_those_of_the_file():
    found = json.loads((ROOT / "results" / "bench" / "trl.json").read_text())["trl"]
    rows = {r["what"]: r for r in found if "what" in r}
    ours, both, theirs = (rows[what] for what in ("ours, grpo", "ours, both", "TRL"))
    assert (f"takes {ours['total s']:.2f} s, in mode `both` {both['total s']:.2f} s on a few tokens less, in the "
            f"GRPOTrainer of TRL 1.16 {theirs['total s']:.2f} s: {theirs['ratio, total']:.1f} times") in PROSE


def test_the_speeds_are_those_of_the_files():
    grader = json.loads((ROOT / "results" / "bench" / "grader.json").read_text())["grader"]
    numbers, symbolic, mix, hostile = grader
    assert f"{round(numbers['ours/s'], -3):,.0f} verdicts a second" in PROSE
    assert f"{symbolic['ours/s']:.0f} on answers" in PROSE and f"{round(mix['ours/s'], -3):,.0f} on a mix" in PROSE
    assert f"{numbers['ratio']:.0f}, {symbolic['ratio']:.1f} and {mix['ratio']:.1f} times math-verify" in PROSE
    assert f"was {hostile['longest delay s']:.1f} s" in PROSE
    speeds = json.loads((ROOT / "results" / "bench" / "cpu.json").read_text())
    ms = {row["what"]: row["ms"] for row in speeds["adversary"]}
    assert (f"take {ms['prompt']:.2f} ms for Prompt-GDRO, with utility `gain` {ms['rollout gain exact']:.1f} ms for "
            f"Rollout-GDRO with the exact budget and {ms['rollout gain spread']:.1f} ms with `spread`") in PROSE
    sampled, full = (row["ratio"] for row in speeds["engine"])
    assert f"draws {sampled:.1f} times" in PROSE and f"end where they end, {full:.1f} times" in PROSE
    memory = json.loads((ROOT / "results" / "kernels" / "memory.json").read_text())["memory"]
    for row in memory:
        if row.get("phase") in ("behaviour", "update"):
            assert f"{row['chunked MiB, on top']:,.0f} MiB" in PROSE
            assert f"{row['whole logits MiB, on top']:,.0f} MiB" in PROSE


def table_after(text: str, head: str) -> list[list[str]]:
    """Cells of the table that begins with `head`, without its two first lines."""
    lines = text[text.index(head):].splitlines()
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows][2:]


@functools.cache
def kernel_rows() -> dict[tuple[str, str, str], dict]:
    rows = json.loads((ROOT / "results" / "kernels" / "h200.json").read_text())["kernels"]
    return {(row["case"], row["direction"], row["provider"]): row for row in rows}


def head_ms(tokens: int, width: int, direction: str, half: bool = False) -> float:
    case = f"T {tokens}, V 151936, D {width}" + ", half of the gradients 0" * half
    return kernel_rows()[case, direction, "ours"]["ms"]


def test_what_one_gpu_took_is_what_the_files_have():
    text, found = TEXTS["speed.md"], json.loads((ROOT / "results" / "bench" / "h200.json").read_text())
    rows = {(r["model"][11:-5], r["phase"], r["compiled"], r["recomputed"]): r for r in found["update"]}
    more = 4 * (head_ms(16384, 2048, "both") - head_ms(16384, 2048, "both", half=True)) * 15784 / 16384 / 1000
    backward = [head_ms(16384, width, "both") - head_ms(16384, width, "forward") for width in (2048, 2560)]
    missing = {"1.7B": more, "4B": more * backward[1] / backward[0]}
    assert "which is {:.3f} s by the table of kernels, {:.3f} s scaled".format(*missing.values()) in PROSE
    table = table_after(text, "| | blocks compiled |")
    assert len(table) == 6
    for size, compiled, share, *cells in table:
        row = rows[size, "update", compiled == "yes", float(share)]
        all_rows = row["s"] + missing[size]
        said = [f"{row['s']:.2f} ({all_rows:.2f})", f"{row['planned s']:.2f}",
                f"{row['MFU %']:.1f}% ({row['MFU %'] * row['s'] / all_rows:.1f}%)", f"{row['GiB']:.1f}",
                f"{row['planned GiB']:.1f}"]
        row = rows[size, "log-probs", compiled == "yes", 0]
        said += [f"{row['s']:.2f}", f"{row['planned s']:.2f}", f"{row['MFU %']:.1f}%"] if share != "1" else [""] * 3
        assert cells == said, (size, compiled, share)
    run = found["run"]["evaluations"][-1]
    assert f"ends at {100 * run['pass@8']:.1f} pass@8 and {100 * run['mean@16']:.1f} mean@16" in PROSE


def test_milliseconds_of_the_head_are_those_of_the_file():
    providers = ("ours", "", "eager", "compile", "liger", "liger, chunk_mem_const 16", "cce")
    table, shape = table_after(TEXTS["speed.md"], "| tokens, width |"), None
    assert len(table) == 10
    for what, direction, *cells in table:
        shape = shape if what.startswith("the same") else what.replace(",", "").split(" x ")
        case = f"T {shape[0]}, V 151936, D {shape[1]}" + what.removeprefix("the same") * what.startswith("the same")
        for provider, cell in zip(providers, cells, strict=True):
            row = kernel_rows().get((case, direction.replace("and backward", "both"), provider or "ours"))
            said = "" if row is None else f"{row['ms']:.1f} ({row['MiB']:,.0f})" if provider else (
                f"{row['predicted ms']:.1f}")
            assert cell == said, (what, direction, provider)
