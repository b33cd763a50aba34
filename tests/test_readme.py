"""Numbers in the README are those of the logs in results/."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest

import logs
import tables as tabulated

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())


@functools.cache
def tables() -> str:
    return tabulated.tables()


@functools.cache
def study() -> dict:
    return logs.study()


def gain(task: str, row: str, figure=logs.headline) -> tuple[float, float, float]:
    """Paired difference to GRPO in points, with its interval."""
    rows = study()[task]
    return logs.interval(100 * logs.paired(rows[row], rows["grpo"], figure))


def points(task: str, row: str, figure=logs.headline) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain(task, row, figure))


def relative(task: str, row: str) -> str:
    rows = study()[task]
    _, baseline = logs.pairs(rows[row], rows["grpo"])
    return f"{gain(task, row)[0] / np.mean([logs.headline(r.last()) for r in baseline]):+.0f}%"


def cell(table: str, row: str, column: str) -> str:
    """One cell of a table that plots.py --table prints."""
    lines = tables().split(f"**{table}**\n\n")[1].split("\n\n")[0].splitlines()
    head = [c.strip() for c in lines[0].strip("|").split("|")]
    for line in lines[2:]:
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[0] == row:
            return cells[head.index(column)]
    raise KeyError(f"{table}: no row {row}")


def kinds(task: str, kind: str) -> dict[str, str]:
    return {mode: cell(f"pass@8 and pass@1 by kind: {task}", kind, f"{mode}, pass@8") for mode in ("base", *logs.MODES)}


@functools.cache
def found() -> dict[str, str]:
    """The numbers of "What we found" and of the table after it, as they are written there."""
    a, out = "arithmetic", {}
    for task in study():
        for row in ("prompt", "rollout", "both"):
            out[f"{row}_{task[0]}"], out[f"{row}_{task[0]}_rel"] = points(task, row), relative(task, row)
    for name, row in {"paper_prompt": "paper-prompt", "paper_rollout": "paper-rollout", "paper_both": "paper-both",
                      "by_prompt": "rollout-by-prompt", "as_weights": "rollout-as-weights", "rank": "rollout-rank",
                      "variance": "rollout-variance", "knapsack": "rollout-knapsack"}.items():
        out[name] = points(a, row)
    rows = study()[a]
    for row in ("prompt", "rollout"):
        four = [r for r in rows[row] if r.seed < 4]
        out[f"{row}_4"] = tabulated.spread(100 * logs.paired(four, rows["grpo"], logs.headline), signed=True)
    from study import PARTS

    sensitivity = {row.name: gain(a, row.name) for row in PARTS["Sensitivity"]}
    assert all(low < 0 < high for _, low, high in sensitivity.values())
    assert min(sensitivity, key=sensitivity.get) == "prompt-eta-4"
    assert max(sensitivity, key=sensitivity.get) == "prompt-no-mean-1"
    means = sorted(mean for mean, _, _ in sensitivity.values())
    out["sens_min"], out["sens_max"] = f"{means[0]:+.1f}", f"{means[-1]:+.1f}"
    alone = np.mean(100 * logs.paired([r for r in rows["prompt"] if r.seed < 4], rows["grpo"], logs.headline))
    assert all(sensitivity[f"prompt-{r}"][0] < alone for r in ("eta-0.65", "class-share", "any-of-n"))
    for name, kind in {"st": "several_terms", "add": "addition", "sq": "sum_of_squares"}.items():
        out |= {f"{name}_{mode}": value for mode, value in kinds(a, kind).items()}
    out |= {f"left_{mode}": value for mode, value in kinds("permutations", "left").items()}
    after = [float(out[f"sq_{mode}"]) for mode in logs.MODES]
    out["sq_min"], out["sq_max"] = f"{min(after):.1f}", f"{max(after):.1f}"
    weights = "What weights and bins became: arithmetic"
    out["pw_min"], out["pw_max"] = (cell(weights, "paper-prompt", f"{c} ever applied")
                                    for c in ("least", "greatest"))
    out["OUTER_ANY"], out["OUTER_RATE"] = (cell(weights, r, "prompts in outer two bins")
                                           for r in ("prompt-any-of-n", "prompt"))
    allocations = "What the allocations did: arithmetic"
    out["pr_most"] = cell(allocations, "paper-rollout", "most rollouts of a bin")
    out["wse_gain"] = cell(allocations, "rollout", "WSE (33)").removeprefix("+")
    out["VAR_GOT"] = cell(allocations, "rollout-variance", "variance (28)").removeprefix("-")
    out["VAR_LAW"] = cell(allocations, "rollout-variance", "(28) by the law (30)").removeprefix("-")
    exact = "Exact budgets: arithmetic"
    out["ONE_PAPER"], out["ONE_EXACT"] = (cell(exact, r, "steps with one choice")
                                          for r in ("paper-rollout", "rollout-exact"))
    first, second = np.mean([r.series("surrogate_abs").mean(axis=0) for r in rows["grpo"]], axis=0)
    out["S0"], out["S1"] = f"{first:.0e}", f"{second:.0e}"
    for name, signal in (("SNR_S", "surrogate"), ("SNR_R", "reward")):
        ratios = np.concatenate([logs.noise_ratios(r, signal) for r in rows["grpo"]])
        out[name] = f"{np.nanmedian(ratios):.2f}"
    return out


def test_results_tables_md_is_what_plots_prints():
    assert (ROOT / "results" / "TABLES.md").read_text() == tabulated.tables() + "\n", \
        "python plots.py --table > results/TABLES.md"


def section(title: str) -> str:
    """The README from this heading to the next one of any level."""
    return README.split(f"# {title}\n")[1].split("\n#")[0]


def test_every_line_of_a_result_table_is_one_that_plots_prints():
    shown = [line for title in ("Group-DRO for LLM reasoning, from scratch", "The study")
             for line in section(title).splitlines() if line.startswith("| ")]
    printed = set(tables().splitlines())
    assert len(shown) > 20 and not [line for line in shown if line not in printed]


# What the README says in words, with the places of the numbers that `found` computes.
SAID = (
    "the weights stay between {pw_min} and {pw_max}, and pass@8 moves by {paper_prompt} points",
    "some bin gets {pr_most} rollouts a prompt in the mean of all steps, and pass@8 moves by {paper_rollout} points",
    "Both at once: {paper_both}, the one of the three",
    "{prompt_a} points ({prompt_a_rel}) on arithmetic, {prompt_p} ({prompt_p_rel}) on permutations",
    "on permutations, {rollout_p} points ({rollout_p_rel}), at equal rollouts",
    "on arithmetic, {rollout_a} ({rollout_a_rel}), the interval still touches zero",
    "{both_a} points ({both_a_rel}) on arithmetic, more than either; {both_p} ({both_p_rel}) on permutations, less",
    "from {st_grpo} with GRPO to {st_prompt}, {st_rollout} and {st_both} (prompt, rollout, both)",
    "`left` from {left_grpo} to {left_prompt}, {left_rollout} and {left_both}",
    "addition falls from {add_grpo} to {add_prompt}, {add_rollout} and {add_both}",
    "{sq_base} before training, {sq_min} to {sq_max} after",
    "(`rollout-by-prompt`) {by_prompt}; with 4 rollouts",
    "(`rollout-as-weights`) {as_weights}; `rollout` itself on these seeds {rollout_4}",
    "raises the weighted standard error (33) by {wse_gain}; counts by variance, as the analysis wants, give {variance}",
    "E3's ranks give {rank} and Knapsack's value {knapsack}",
    "`prompt` on four seeds gives {prompt_4}; with one setting changed the mean runs from {sens_min} (eta 4) to",
    "to {sens_max} (weights not rescaled to mean 1)",
    "a prompt's loss is {S0}, rounding; on the second {S1}.",
    "Between bins it spreads {SNR_S} times what noise alone would",
    "minus the reward {SNR_R} times.",
    "one choice in {ONE_PAPER} of the steps of `paper-rollout`, {ONE_EXACT} of `rollout-exact`",
    "Any puts {OUTER_ANY} of prompts into the outer two bins and depends on n; tuned: the rate, {OUTER_RATE}",
    "*raises* WSE by {wse_gain}; `variance` lowers (28) by {VAR_GOT} of at most {VAR_LAW}",
)


@pytest.mark.parametrize("said", SAID)
def test_what_the_readme_says_in_words_is_computed_from_the_logs(said):
    assert said.format(**found()) in PROSE


def test_every_test_and_file_that_the_readme_names_exists():
    readme = (ROOT / "README.md").read_text()
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    for name in re.findall(r"`(test_\w+)`", readme):
        assert f"def {name}" in tests or (ROOT / "tests" / f"{name}.py").exists(), name
    for name in re.findall(r"`([\w/]+\.(?:py|txt))`", readme):
        assert (ROOT / name).exists(), name


def test_the_speeds_are_those_of_the_files():
    readme = " ".join((ROOT / "README.md").read_text().split())
    grader = json.loads((ROOT / "results" / "bench" / "grader.json").read_text())["grader"]
    numbers, symbolic, mix, hostile = grader
    assert f"{round(numbers['ours/s'], -3):,.0f} verdicts a second" in readme
    assert f"{symbolic['ours/s']:.0f} on answers" in readme and f"{round(mix['ours/s'], -3):,.0f} on a mix" in readme
    assert f"{numbers['ratio']:.0f}, {symbolic['ratio']:.1f} and {mix['ratio']:.1f} times math-verify" in readme
    assert f"was {hostile['longest delay s']:.1f} s" in readme
    memory = json.loads((ROOT / "results" / "kernels" / "cpu.json").read_text())["memory"]
    for row in memory:
        if row.get("phase") in ("behaviour", "update"):
            assert f"{row['chunked MiB, on top']:,.0f} MiB" in readme
            assert f"{row['whole logits MiB, on top']:,.0f} MiB" in readme
