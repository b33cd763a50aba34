"""Cells of the tables against loops over the logs."""

import dataclasses
import json
from collections.abc import Callable

import numpy as np
import pytest
from test_cost import planted
from test_logs import a_run, folder_of, from_base

from study import cost, logs, tables
from study.rows import BOTH_TASKS, PARTS, SHAPE
from train import collapsed


def lines_of(table: str) -> list[dict[str, str]]:
    """Its lines by their heads."""
    head, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()
                       if line.startswith("|"))
    return [dict(zip(head, line, strict=True)) for line in lines]


@pytest.fixture
def found(monkeypatch) -> Callable:
    """found(rows, sweeps) makes these the study's of both tasks."""
    def replace(rows: dict, sweeps: dict | None = None) -> None:
        monkeypatch.setattr(tables, "study", lambda: dict.fromkeys(BOTH_TASKS, rows))
        monkeypatch.setattr(tables, "sweeps", lambda: dict.fromkeys(BOTH_TASKS, sweeps or {}))

    return replace


def runs_of(gain: float, bases: int = 3) -> list[logs.Run]:
    """Whose pass@8 is that of the base plus a gain in points and, of the first base, one point more."""
    runs = [from_base("grpo", base) for base in range(bases)]
    for run in runs:
        run.evaluations[-1]["passes"]["pass@8"] += (gain + (run.seed == 0)) / 100
    return runs


def test_a_row_is_compared_with_that_which_it_is_held_against_on_the_bases_that_both_have(found):
    rows = {"grpo": runs_of(0), "maxrl": runs_of(10, bases=2), "rollout-maxrl": runs_of(20)}
    rows["maxrl"][0].config["learning_rate"] = 4e-4
    for run in rows["rollout-maxrl"]:
        run.evaluations[-1]["mean"] += 0.04
    found(rows)
    grpo, maxrl, rollout = (line for line in lines_of(tables.outcome_table("x", PARTS["The arena"]))
                            if line["arithmetic: rates"])
    assert grpo["minus"] == grpo["pairs"] == grpo["pass@8"] == "" and grpo["arithmetic: pass@8"] == "52.3"
    assert (maxrl["minus"], maxrl["pairs"], maxrl["arithmetic: rates"]) == ("grpo", "4", "1e-4 (1), 4e-4 (1)")
    assert (rollout["minus"], rollout["pairs"]) == ("maxrl", "4")  # two bases of two tasks
    assert (rollout["pass@8"], rollout["pass@1"]) == ("+10.0 [+10.0, +10.0]", "+4.0 [+4.0, +4.0]")
    assert rollout["pass@8, arithmetic"] == "+10.0 [+10.0, +10.0]" and rollout["permutations: pass@1"] == "34.0"
    against_grpo = lines_of(tables.outcome_table("x", PARTS["The arena"], "grpo"))
    assert [line["pairs"] for line in against_grpo if line["minus"] and line["row"] == "rollout-maxrl"] == ["6"]


def test_a_row_of_one_rate_is_compared_at_that_rate(found):
    fitted, at_rate, ours = runs_of(0), runs_of(3), runs_of(5)
    sweeps = {"grpo": {1e-4: fitted, 4e-4: at_rate}, "rollout": {4e-4: ours}}
    found({"grpo": fitted, "rollout": ours}, sweeps)
    assert tables.difference("arithmetic", ("rollout", "grpo"), logs.headline) == pytest.approx([2, 2, 2])
    sweeps["rollout"][1e-4] = ours  # of several rates the cross-fitted runs are held against such
    assert tables.difference("arithmetic", ("rollout", "grpo"), logs.headline) == pytest.approx([5, 5, 5])


def test_questions_are_pooled_over_tasks_and_adjusted_within_their_table(found):
    rng, (title, pairs) = np.random.default_rng(0), next(iter(tables.QUESTIONS.items()))
    rows = {row: runs_of(rng.normal(0, 5)) for pair in pairs for row in pair}
    for run in (run for runs in rows.values() for run in runs):
        run.evaluations[-1]["passes"]["pass@8"] += rng.normal(0, 0.02)
    found(rows)
    values = [np.tile(logs.paired(*(rows[row] for row in pair), logs.headline), 2) for pair in pairs]
    adjusted = logs.holm([logs.p_value(v) for v in values])
    lines = lines_of(tables.question_table(title, pairs))
    for line, pair, v, p in zip(lines, pairs, values, adjusted, strict=True):
        assert (line["rows"], line["pairs"], line["p (Holm)"]) == (" - ".join(pair), "6", f"{p:.2g}")
        assert line["pass@8"] == "{:+.1f} [{:+.1f}, {:+.1f}]".format(*logs.interval(v))


def test_the_cost_of_a_level_is_told_by_shape_and_rate(found):
    def runs(*curve: float) -> list[logs.Run]:
        return [planted(list(curve), base) for base in range(2)]

    sweeps = {row.name: dict.fromkeys(row.rates["arithmetic"], runs(20, 60, 80, 90)) for row in PARTS[SHAPE]}
    for shape, end in {"64x4": 70, "32x8": 72, "16x16": 74}.items():  # so the level is 70
        sweeps[f"grpo-{shape}"][1e-4] = runs(20, 40, end, end)
    sweeps["maxrl-64x4"][2e-4] = runs(20, 20, 20, 20)
    found({}, sweeps)
    assert tables.shape_levels("arithmetic") == {0: 70, 1: 70}
    lines = {(line["row"], line["rate"]): line for line in lines_of(tables.shape_table())}
    half, full = lines["maxrl-64x4", "half"], lines["maxrl-64x4", "full"]
    assert half["arithmetic: share"] == half["permutations: share"] == half["share"] == "50.0"  # 37.5 of 75 steps
    assert (half["arithmetic: pass@8"], half["arithmetic: first, never"]) == ("90.0", "0, 0")
    assert (full["share"], full["arithmetic: first, never"]) == ("100.0", "0, 2")
    assert ("rank-maxrl-64x4", "full") not in lines


def test_the_way_is_compared_at_the_level_of_grpo_s_second_seed_which_costs_nothing(found):
    def runs(row: str, shares: list[float], seed: int = 0) -> list[logs.Run]:
        """Whose curve is 20 at the base's and 80 after a share of 100 steps, by base."""
        curves = [planted([20] + [80 if 25 * e >= 100 * s else 20 + 60 * 25 * e / (100 * s) for e in range(1, 5)], b,
                          seed=seed + b) for b, s in enumerate(shares)]
        decoded = {"pass@8": [0.5, 0, 1], "pass@1": [0.25, 0, 1], "by_kind": {"a": [5, 0, 0.5], "b": [5, 0, 0.5]}}
        return [dataclasses.replace(run, decoded=decoded) for run in curves]

    rng = np.random.default_rng(0)
    grpo, noise = [1.0] * 6, rng.uniform(0.97, 1.03, 6)
    sweeps = {"grpo-way": {1e-4: runs("grpo", grpo) + runs("grpo", [0.25] * 6, seed=100)},
              "maxrl-way": {1e-4: runs("maxrl", list(0.75 * noise))},
              "weights-way": {1e-4: runs("w", list(0.5 * noise))},
              "moved-way": {1e-4: runs("m", list(0.5 * noise[::-1]))}}
    for run in (r for rows in sweeps.values() for r in rows[1e-4]):
        run.evaluations[-1].update(mean=0.5, by_kind={"a": [5, 0.1, 0.5], "b": [5, 0.2, 0.4]})
    found({}, sweeps)
    assert cost.log_costs(*tables.measured("arithmetic", "grpo-way")) == pytest.approx(
        [np.log(256 * 100 * 58 / 60)] * 6)  # to 78
    moved, same, maxrl = lines_of(tables.cost_table())
    assert (moved["rows"], moved["pairs"], moved["costs less?"]) == ("moved-way / maxrl-way", "12", "yes")
    assert moved["rollouts"].startswith("0.67 [0.6") and moved["p (Holm)"] == f"{3 * 2 / 2**12:.2g}"
    assert same["costs less?"] == "no" and same["rollouts"].startswith("1.00 [0.9") and maxrl["costs less?"] == "yes"
    assert moved["tokens trained"].startswith("0.67") and moved["arithmetic"].startswith("0.67")
    grpo, _, moved, weights = lines_of(tables.readme_table())
    assert (grpo["method"], grpo["prompts x rollouts"]) == ("GRPO", "16 x 16") and moved["method"] == "rank with maxrl"
    assert grpo["rollouts to GRPO's end"] == "1.00 [1.00, 1.00]" and weights["rollouts to GRPO's end"][:3] == "0.5"
    assert (moved["pass@8 at GRPO's budget"], moved["pass@1"]) == ("80.0", "50.0")
    lines = {line["row"]: line for line in lines_of(tables.way_table())}
    assert lines["moved-way"]["first, never"] == "0, 0" and lines["moved-way"]["kinds found"] == "1.0"
    assert lines["moved-way"]["pass@8, decoded"] == "50.0" and lines["moved-way"]["kinds found, decoded"] == "2.0"


def test_the_note_above_the_tables_and_the_flags_of_its_row_are_true_of_every_run():
    rows = [row for part in PARTS.values() for row in part]
    for row, run in [(r, run) for found in logs.study().values() for r in rows for run in found.get(r.name, [])]:
        flags = {k: v[run.config["preset"]] if isinstance(v, dict) else v for k, v in row.flags.items()}
        assert all(run.config[k] == v for k, v in flags.items() if k != "adversary")
        assert [run.config[f"eval_{key}"] for key in ("rollouts", "temperature", "top_p", "top_k")] == [16, 1, 1, 0]
        assert run.last()["step"] == run.config["steps"] and run.config["loaded"]["eval_data"]["split"] == "heldout"


def test_of_no_kept_run_it_would_have_been_said_that_it_collapsed_for_none_did():
    runs = [run for rows in logs.sweeps().values() for sweep in rows.values() for group in sweep.values()
            for run in group if run.log]
    assert len(runs) >= 800 and min(run.last()["mean"] for run in runs) > 0.01
    assert not [run for run in runs
                if any(collapsed(run.log[:3], run.log[i - 10 : i]) for i in range(10, len(run.log) + 1))]


def test_the_table_of_runs_has_what_the_logs_say_whatever_k_and_without_evaluations_too():
    run = a_run("rollout", 3, changes={"rule": "maxrl", "model": "tiny", "train_data": "data/mine.jsonl"})
    few, begun = a_run("grpo", 1), a_run("prompt")
    few.evaluations[-1].update(passes={"pass@1": 0.1, "pass@4": 0.5}, rollouts=4)
    begun.evaluations.clear()
    begun.log.clear()
    eight, four, none = lines_of(tables.run_table([run, few, begun]))
    assert eight == {
        "run": "rollout-3", "trained": "tiny on mine", "mode": "rollout", "rule": "maxrl", "seed": "3", "steps": "12",
        "hours": "0.01", "evaluated at step": "12", "pass@8": "66.0", "mean@16": "30.0", "pass@4": "", "mean@4": ""}
    assert (four["pass@8"], four["pass@4"]) == ("", "50.0")
    assert (none["steps"], none["hours"], none["evaluated at step"], none["pass@8"]) == ("0", "0", "", "")


def sample(step: int = 0, **changes) -> dict:
    return {"step": step, "id": "sum-1", "kind": None, "bin": 5, "n": 4, "weight": 1.25, "factor": 2.0, "answer": "7",
            "found": "8", "reward": -1.0, "right": False, "truncated": False, "prompt": "3+4=",
            "response": f"at {step}", **changes}


def test_a_page_of_samples_shows_the_start_the_middle_and_the_end_of_training(tmp_path):
    folder = folder_of(a_run("rollout"), tmp_path / "a-run")
    samples = [sample(step, id=f"p{i}") for step in range(11) for i in range(4)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples) + '{"step": 11, "re')
    page = tables.sample_page(folder)
    assert page.startswith("# a-run: made-up, mode rollout")
    assert [line for line in page.splitlines() if line.startswith("##")] == [
        f"## step {step}, of 0 to 10" for step in (0, 5, 10)]
    shown = [line.split()[2] for line in page.splitlines() if line.startswith("    response")]
    assert shown == [str(step) for step in (0, 5, 10) for _ in range(4)]


def test_a_sample_says_verdict_numbers_and_texts_and_shows_control_characters():
    assert tables.sample_text(sample(response="two\nlines")).splitlines() == [
        "**sum-1: wrong** (reward -1, bin 5, n 4, weight 1.25, factor 2)", "", "    prompt    3+4=",
        "    response  two", "              lines", "    answer    7", "    found     8"]
    cut = tables.sample_text(sample(reward=1.0, right=True, truncated=True, found=None, response=""))
    assert cut.startswith("**sum-1: right, cut at the length limit** (reward 1,")
    assert "response  (empty)" in cut and "found" not in cut and "kind" not in cut
    assert "    kind      twice" in tables.sample_text(sample(kind="twice"))
    assert tables.visible("a\tb\x1b[2J\r\u202e\x00 é 中 \\frac") == "a\\tb\\x1b[2J\\r\\u202e\\x00 é 中 \\frac"
    assert "\\x1b" in tables.sample_text(sample(response="\x1b[31mred", id="\x1b")).splitlines()[3]
