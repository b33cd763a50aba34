"""Numbers in the README and in docs/ are those of the logs in results/, and what they name exists."""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import logs
import tables as tabulated
from metrics import Evaluation
from model import ModelConfig
from policy import Policy
from study import PARTS

ROOT = Path(__file__).parents[1]
TEXTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PROSE = " ".join(" ".join(TEXTS.values()).split())
study, tables = functools.cache(logs.study), functools.cache(tabulated.tables)


def minus(task: str, row: str, other: str, figure=logs.headline, seeds: int = 99) -> str:
    """Paired difference of two rows in points, with its interval."""
    kept = [r for r in study()[task][row] if r.seed < seeds]
    return tabulated.spread(100 * logs.paired(kept, study()[task][other], figure), signed=True)


def percent(task: str, row: str, figure=logs.headline) -> str:
    return f"{100 * np.mean([figure(r.last()) for r in study()[task][row]]):.1f}"


def cell(table: str, row: str, column: str) -> str:
    """One cell of a table that plots.py --table prints."""
    lines = tables().split(f"**{table}**\n\n")[1].split("\n\n")[0].splitlines()
    head = [c.strip() for c in lines[0].strip("|").split("|")]
    for line in lines[2:]:
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[0] == row:
            return cells[head.index(column)]
    raise KeyError(f"{table}: no row {row}")


def of_kind(name: str, task: str, kind: str, k: int) -> dict[str, str]:
    """pass@k of one kind by mode, under keys NAME_MODE."""
    title = f"pass@8 and pass@1 by kind: {task}"
    return {f"{name}_{mode}": cell(title, kind, f"{mode}, pass@{k}") for mode in logs.MODES}


@functools.cache
def found() -> dict[str, str]:
    """The numbers that the texts state, computed."""
    a, p = "arithmetic", "permutations"
    out = {"paper_prompt": minus(a, "paper-prompt", "grpo"), "paper_rollout": minus(a, "paper-rollout", "grpo"),
           "paper_both": minus(a, "paper-both", "grpo"), "by_prompt": minus(a, "rollout-by-prompt", "grpo"),
           "as_weights": minus(a, "rollout-as-weights", "grpo"), "rank": minus(a, "rollout-rank", "grpo"),
           "variance": minus(a, "rollout-variance", "grpo"), "knapsack": minus(a, "rollout-knapsack", "grpo"),
           "prompt_4": minus(a, "prompt", "grpo", seeds=4), "rollout_4": minus(a, "rollout", "grpo", seeds=4),
           "eta4_mean": minus(a, "prompt-eta-4", "grpo", tabulated.mean_success),
           "class_mean": minus(a, "prompt-class-share", "grpo", tabulated.mean_success),
           **of_kind("st", a, "several_terms", 8), **of_kind("left", p, "left", 8), **of_kind("add1", a, "addition", 1),
           **of_kind("right1", p, "right", 1), **of_kind("front1", p, "front", 1)}
    for x, task in (("a", a), ("p", p)):
        out |= {f"{row}_{x}": minus(task, row, "grpo") for row in ("prompt", "rollout")}
        out |= {f"both_prompt_{x}": minus(task, "both", "prompt"), f"b1_{x}": percent(task, "base"),
                f"b2_{x}": percent(task, "second-base"), f"g1_{x}": percent(task, "grpo"),
                f"g2_{x}": percent(task, "second-base-grpo"), f"g4_{x}": percent(task, "grpo-4-minibatches"),
                f"step_{x}": minus(task, "grpo-4-minibatches", "second-base-grpo"),
                f"r2_{x}": minus(task, "second-base-rollout", "second-base-grpo"),
                f"r2_mean_{x}": minus(task, "second-base-rollout", "second-base-grpo", tabulated.mean_success),
                f"r4_{x}": minus(task, "rollout-4-minibatches", "grpo-4-minibatches"),
                f"r4_mean_{x}": minus(task, "rollout-4-minibatches", "grpo-4-minibatches", tabulated.mean_success)}
    out["lr_p"] = minus(p, "grpo-lr-4e-4", "second-base-grpo")
    sensitivity = {row.name: logs.interval(100 * logs.paired(study()[a][row.name], study()[a]["grpo"], logs.headline))
                   for row in PARTS["Sensitivity"]}
    assert all(low < 0 < high for _, low, high in sensitivity.values())
    assert min(sensitivity, key=sensitivity.get) == "prompt-eta-4"
    assert max(sensitivity, key=sensitivity.get) == "prompt-no-mean-1"
    means = sorted(mean for mean, _, _ in sensitivity.values())
    out["sens_min"], out["sens_max"] = f"{means[0]:+.1f}", f"{means[-1]:+.1f}"
    weights = "What weights and bins became: arithmetic"
    out["pw_min"], out["pw_max"] = (cell(weights, "paper-prompt", f"{c} ever applied") for c in ("least", "greatest"))
    out["OUTER_ANY"], out["OUTER_RATE"] = (cell(weights, r, "prompts in outer two bins")
                                           for r in ("prompt-any-of-n", "prompt"))
    allocations = "What the allocations did: arithmetic"
    out["pr_most"] = cell(allocations, "paper-rollout", "most rollouts of a bin")
    out["wse_gain"] = cell(allocations, "rollout", "WSE (33)").removeprefix("+")
    out["VAR_GOT"] = cell(allocations, "rollout-variance", "variance (28)").removeprefix("-")
    out["VAR_LAW"] = cell(allocations, "rollout-variance", "(28) by the law (30)").removeprefix("-")
    out["ONE_PAPER"], out["ONE_EXACT"] = (cell("Exact budgets: arithmetic", r, "steps with one choice")
                                          for r in ("paper-rollout", "rollout-exact"))
    first, second = np.mean([r.series("surrogate_abs").mean(axis=0) for r in study()[a]["grpo"]], axis=0)
    out["S0"], out["S1"] = f"{first:.0e}", f"{second:.0e}"
    for name, signal in (("SNR_S", "surrogate"), ("SNR_R", "reward")):
        ratios = np.concatenate([logs.noise_ratios(r, signal) for r in study()[a]["grpo"]])
        out[name] = f"{np.nanmedian(ratios):.2f}"
    return out


def test_results_tables_md_is_what_plots_prints():
    kept = (ROOT / "results" / "TABLES.md").read_text()
    assert kept == tables() + "\n", "python plots.py --table > results/TABLES.md"


@pytest.mark.parametrize("name, fewest", [("README.md", 11), ("study.md", 25)])
def test_every_line_of_a_result_table_is_one_that_plots_prints(name, fewest):
    text = TEXTS[name].split("## Install")[0]
    shown = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(shown) >= fewest and not [line for line in shown if line not in set(tables().splitlines())]


# What the texts say, with the places of the numbers that `found` computes.
SAID = (
    "four mini-batches move its pass@8 by {step_a} points on arithmetic and {step_p} on permutations, "
    "where four times the rate gives {lr_p}",
    "{r2_p} points at two mini-batches and {r4_p} at four, and does not show on arithmetic, {r2_a} and {r4_a}",
    "moves GRPO on permutations from {g1_p} to {g2_p}, as much as a mode does",
    "the first solves {b1_p} of the problems in eight tries, the second {b2_p} (arithmetic {b1_a} and {b2_a})",
    "after 100 steps of the same GRPO it is {g1_p} and {g2_p} ({g1_a} and {g2_a})",
    "the weights that it applied span {pw_min} to {pw_max}, and pass@8 moves by {paper_prompt} points",
    "some bin gets {pr_most} rollouts a prompt in the mean of all steps, and pass@8 moves by {paper_rollout} points",
    "Both at once: {paper_both}.",
    "{prompt_a} points of pass@8 on arithmetic, {prompt_p} on permutations, at the step that nobody tuned",
    "for Rollout-GDRO**: {rollout_a} and {rollout_p} points, at equal rollouts",
    "{r2_a} and {r2_p} points at two mini-batches, {r4_a} and {r4_p} at four, and in mean@16 {r2_mean_a} "
    "and {r2_mean_p}, {r4_mean_a} and {r4_mean_p}.",
    "on arithmetic {both_prompt_a} points more than `prompt`; on permutations {both_prompt_p}, an "
    "interval that holds 0",
    "from {st_grpo} with GRPO to {st_prompt}, {st_rollout} and {st_both} in pass@8",
    "`left` from {left_grpo} to {left_prompt}, {left_rollout} and {left_both}",
    "addition falls from {add1_grpo} to {add1_prompt}, {add1_rollout} and {add1_both}",
    "from {right1_grpo} to {right1_prompt}, {right1_rollout} and {right1_both}",
    "from {front1_grpo} to {front1_prompt}, {front1_rollout} and {front1_both}",
    "(`rollout-by-prompt`) {by_prompt}; with 4 rollouts",
    "(`rollout-as-weights`) {as_weights}; `rollout` itself on these seeds {rollout_4}",
    "raises the weighted standard error (33) by {wse_gain}; counts by variance, as the analysis wants, give {variance}",
    "E3's ranks give {rank} and Knapsack's value {knapsack}",
    "On four seeds `prompt` gives {prompt_4}; with one setting changed the mean runs from {sens_min} "
    "(eta 4) to {sens_max}",
    "eta 4 gives {eta4_mean} points and class shares {class_mean}",
    "was {both_prompt_p} points against `prompt`",
    "a prompt's loss is {S0}, rounding; on the second {S1}.",
    "Between bins it spreads {SNR_S} times what noise alone would",
    "minus the reward {SNR_R} times.",
    "one choice in {ONE_PAPER} of the steps of `paper-rollout`, {ONE_EXACT} of `rollout-exact`",
    "Any puts {OUTER_ANY} of prompts into the outer two bins and depends on n; tuned: the rate, {OUTER_RATE}",
    "*raises* WSE by {wse_gain}; `variance` lowers (28) by {VAR_GOT} of at most {VAR_LAW}",
)


@pytest.mark.parametrize("said", SAID)
def test_what_the_texts_say_is_computed_from_the_logs(said):
    assert said.format(**found()) in PROSE


def test_every_test_file_and_page_that_the_texts_name_exists():
    tests = "".join(p.read_text() for p in (ROOT / "tests").glob("*.py"))
    for text in TEXTS.values():
        for name in re.findall(r"`(test_\w+)`", text):
            assert f"def {name}" in tests or (ROOT / "tests" / f"{name}.py").exists(), name
        for name in re.findall(r"`([\w/.]+\.(?:py|txt|json|cff))`", text):
            assert (ROOT / name).exists() or name in ("config.json", "eval.json"), name
    for page, text in TEXTS.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for name in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            assert (folder / name).exists(), name


def test_the_end_of_the_first_run_is_what_its_evaluation_says():
    last = json.loads((ROOT / "results" / "first_run" / "eval.json").read_text())[-1]
    assert f"{Evaluation.from_json(last).line()}\nmodel: out/arithmetic-prompt-0/model" in TEXTS["README.md"]


def test_what_the_readme_says_of_80_gb_cards_is_what_the_check_of_memory_does(monkeypatch):
    """Of a card with 78.66 of 79.19 GiB free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(78.66 * 2**30), int(79.19 * 2**30)))
    sizes = {"1.7B": (2048, 6144, 28, 16, True), "4B": (2560, 9728, 36, 32, True), "8B": (4096, 12288, 36, 32, False)}
    fits = {}
    for name, (hidden, inner, layers, heads, tied) in sizes.items():
        config = ModelConfig(
            model_type="qwen3", vocab_size=151936, hidden_size=hidden, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8, head_dim=128, rope_theta=1e6,
            rms_norm_eps=1e-6, tie_word_embeddings=tied, max_position_embeddings=32768)
        policy = Policy(Path(), config, torch.bfloat16, None, (), {})
        for utilization in (0.5, 0.4, 0.01):
            try:
                policy.check_memory(torch.device("cuda"), with_reference=True, engine="vllm", utilization=utilization)
                fits[name, utilization] = True
            except ValueError:
                fits[name, utilization] = False
    assert "1.7B asks for `--gpu_memory_utilization 0.4`, 4B and 8B do not fit" in PROSE
    assert [key for key, fit in fits.items() if fit] == [("1.7B", 0.4), ("1.7B", 0.01)]


def test_the_readme_is_short():
    words = re.findall(r"\S*\w\S*", TEXTS["README.md"])  # a border of a table is none
    assert len(TEXTS["README.md"].splitlines()) <= 150 and len(words) <= 1500


def test_every_logged_key_is_explained_and_no_other():
    line = study()["arithmetic"]["grpo"][0].log[0]
    explained = set(re.findall(r"`(\w+)`", "".join(x.split("|")[1] for x in TEXTS["log.md"].splitlines()
                                                   if x.startswith("| `"))))
    later = {"measured", "reward_failures"}  # not logged yet when the study ran
    assert set(line) | later == explained


def test_the_seconds_by_threads_are_those_of_the_file():
    rows = json.loads((ROOT / "results" / "bench" / "threads.json").read_text())["threads"]
    one, two, passive = ([row for row in rows if row["what"] == what]
                         for what in ("1 thread", "2 threads", "2 threads, passive"))
    said = [f"{row['median s a step']:.2f}" for pair in zip(one, two, strict=True) for row in pair]
    assert ("takes {} s with one and {} s with two when nothing else runs; beside one busy process {} and {} s, beside "
            "two {} and {} s").format(*said) in PROSE
    assert "up to {:.1f} s".format(two[-1]["worst s"]) in PROSE
    assert "gives {}, {} and {} s".format(*(f"{row['median s a step']:.2f}" for row in passive)) in PROSE


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
