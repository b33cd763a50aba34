"""Cells of the tables against loops over the logs."""

import itertools
import json

import numpy as np
import pytest
from test_logs import a_run, folder_of

from study import logs, tables
from study.rows import Row


def test_configurations_of_an_exact_budget_are_counted_like_an_enumeration():
    rng, arms = np.random.default_rng(3), np.arange(2, 7)
    for _ in range(30):
        count_B = rng.integers(0, 6, 4)
        total = 4 * int(count_B.sum())
        present = count_B[count_B > 0]
        expected = sum(int(present @ np.array(n)) == total for n in itertools.product(arms, repeat=len(present)))
        assert tables.exact_configurations(count_B, arms, total) == expected
    count_B = rng.integers(1, 12, 20)  # too many to enumerate; every choice has one total
    least, most = 2 * int(count_B.sum()), 6 * int(count_B.sum())
    ways = [tables.exact_configurations(count_B, arms, total) for total in range(least, most + 1)]
    assert sum(ways) == 5**20 and ways == ways[::-1]
    assert tables.exact_configurations(np.array([45, 19]), np.arange(2, 13), 256) == 1


def cells(table: str) -> dict[str, str]:
    """The last line of a table by its heads."""
    head, *_, last = ([cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:])
    return dict(zip(head, last, strict=True))


def test_a_line_of_the_table_says_rate_mean_difference_relative_gain_and_worst_kind():
    rows = {"grpo": [a_run("grpo", s) for s in range(3)], "prompt": [a_run("prompt", s) for s in range(3)]}
    for run in rows["prompt"]:
        run.evaluations[-1]["passes"]["pass@8"] += 0.21
        run.evaluations[-1]["by_kind"]["b"][2] += 0.125
    rows["prompt"][2].config["learning_rate"] = 4e-4
    line = dict(zip(HEAD, tables.outcome(Row("prompt"), rows, {}), strict=True))
    assert (line["row"], line["bases"], line["rate"]) == ("prompt", "3", "1e-4 (2) 4e-4 (1)")
    assert (line["against"], line["paired difference"], line["relative"]) == ("grpo", "+26.0 [+26.0, +26.0]", "+50.0%")
    assert line["pass@8"] == "78.0"
    assert (line["worst kind, pass@8"], line["worst kind, paired difference"]) == ("41.0", "+15.0 [+15.0, +15.0]")
    base = dict(zip(HEAD, tables.outcome(Row("grpo"), rows, {}), strict=True))
    assert (base["rate"], base["mean@16"]) == ("1e-4", "30.0")
    assert base["against"] == base["paired difference"] == base["mean@16, paired difference"] == ""


HEAD = ["row", "bases", "rate", "pass@8", "against", "paired difference", "relative", "mean@16",
        "mean@16, paired difference", "worst kind, pass@8", "worst kind, paired difference", "thousand tokens"]


def test_a_row_is_compared_with_that_which_it_is_held_against_on_the_bases_that_both_have(monkeypatch):
    rows = {"grpo": [a_run("grpo", s) for s in range(3)], "maxrl": [a_run("grpo", 2)],
            "rollout-maxrl": [a_run("rollout", s) for s in range(3)]}
    rows["rollout-maxrl"][2].evaluations[-1].update(mean=0.45, passes={"pass@8": 0.80})
    monkeypatch.setattr(tables, "study", lambda: {"made-up": rows})
    found = cells(tables.outcome_tables())
    assert list(found) == HEAD and (found["row"], found["against"]) == ("rollout-maxrl", "maxrl")
    assert (found["paired difference"], found["mean@16, paired difference"]) == ("+26.0", "+15.0")
    del rows["maxrl"]
    assert cells(tables.outcome_tables())["paired difference"] == ""


def test_a_row_of_one_rate_is_compared_at_that_rate():
    sweep = {rate: [a_run("grpo", s) for s in range(3)] for rate in (1e-4, 4e-4)}
    ours = [a_run("rollout", s) for s in range(3)]
    for run in (*sweep[4e-4], *ours):
        run.config["learning_rate"] = 4e-4
    found, swept = {"grpo": sweep[1e-4], "rollout": ours}, {"grpo": sweep, "rollout": {4e-4: ours}}
    assert tables.held_against(Row("rollout"), found, swept) == sweep[4e-4]
    swept["rollout"][1e-4] = ours  # of several rates the cross-fitted runs are held against such
    assert tables.held_against(Row("rollout"), found, swept) == sweep[1e-4]


def test_the_dial_compares_rows_at_each_share_on_the_bases_that_have_all():
    rows = {}
    for i, suffix in enumerate(("-disguised-0", "-disguised-0.5", "")):
        for j, name in enumerate(("grpo", "maxrl", "rollout-maxrl")):
            runs = [a_run("grpo", seed) for seed in range(2 if suffix else 5)]
            for run in runs:
                run.evaluations[-1]["passes"]["pass@8"] = (50 + 10 * run.seed + (i + 1) * (1, 3, 6)[j]) / 100
            rows[name + suffix] = {1e-4: [], 2e-4: runs}
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in
             tables.dial_table("arithmetic", rows).splitlines()[2:]]
    assert [(line[0], line[1], line[3], line[6]) for line in lines[2:]] == [
        (share, "2", f"+{2 * i}.0 [+{2 * i}.0, +{2 * i}.0]", f"+{3 * i}.0 [+{3 * i}.0, +{3 * i}.0]")
        for i, share in ((1, "0"), (2, "0.5"), (3, "1"))]
    del rows["maxrl-disguised-0.5"]
    assert tables.dial_table("arithmetic", rows) == ""


def test_how_fast_a_row_learns_is_its_mean_and_the_step_at_which_each_base_is_there():
    runs = [a_run("grpo", seed) for seed in range(2)]
    for run, values in zip(runs, ((0.3, 0.9, 0.8), (0.2, 0.5, 0.6)), strict=True):
        run.evaluations[:] = [{**run.evaluations[0], "step": 25 * i, "passes": {"pass@8": value}}
                              for i, value in enumerate(values)]
    found = cells(tables.reach_table("x", {"maxrl-300": {2e-4: runs}}))
    assert list(found.values()) == ["maxrl-300", "2e-4", "55.0", "25, never", "25, never"]
    assert tables.reach_table("x", {"grpo": {2e-4: runs}}) == ""


def test_runs_that_began_from_different_base_models_are_not_compared():
    ours, theirs = a_run("rollout"), a_run("grpo")
    ours.config["loaded"] = {"model": {"head": "another"}}
    with pytest.raises(ValueError, match="began from different base models"):
        tables.outcome(Row("rollout"), {"grpo": [theirs], "rollout": [ours]}, {})


def arena(gains: dict[str, float], bases: int = 8) -> dict[str, list]:
    """Rows of runs whose pass@8 is that of the base plus the row's gain and a little noise."""
    rng, rows = np.random.default_rng(0), {}
    for row in ("grpo", "maxrl", "rollout-maxrl", "weights-maxrl", "prompt", "tilt"):
        rows[row] = [a_run("grpo", base) for base in range(bases)]
        for run in rows[row]:
            run.evaluations[-1]["passes"]["pass@8"] += gains.get(row, 0) / 100 + rng.normal(0, 0.005)
    return rows


def test_a_question_is_answered_by_the_bases_of_all_tasks_and_by_holm(monkeypatch):
    tasks = {"one": arena({"rollout-maxrl": 8, "maxrl": 5, "prompt": -6}),
             "two": arena({"rollout-maxrl": 8, "maxrl": 4, "prompt": -6})}
    monkeypatch.setattr(tables, "study", lambda: tasks)
    by_rows = {}
    for line in tables.answers("The questions"):
        by_rows[line["rows"]] = line["answer"]
        assert line["pairs"] == "16" and 0 <= float(line["p (Holm)"]) <= 1
    assert by_rows == {"rollout-maxrl - maxrl": "yes", "rollout-maxrl - weights-maxrl": "yes",
                       "prompt - tilt": "no, the reverse", "maxrl - grpo": "yes"}
    assert all(tables.answers(title) == [] for title in list(tables.QUESTIONS)[1:])  # not run here
    full, short = tables.question_tables()
    assert len(full.splitlines()) == len(short.splitlines()) == 8 and len(full) > len(short)
    ours, theirs = (np.concatenate([[100 * logs.headline(r.last()) for r in t[row]] for t in tasks.values()])
                    for row in ("maxrl", "grpo"))
    assert tables.pooled("maxrl", "grpo", logs.headline) == pytest.approx(ours - theirs)


def test_the_short_table_pools_tasks_and_counts_the_pairs_that_are_ahead(monkeypatch):
    tasks = {"one": arena({"maxrl": 5}), "two": arena({"maxrl": -7}, bases=4)}
    monkeypatch.setattr(tables, "study", lambda: tasks)
    lines = {line[0]: line for line in ([cell.strip() for cell in x[1:-1].split("|")]
                                        for x in tables.summary_table().splitlines()[4:])}
    assert float(lines["maxrl"][3].split(" [")[0]) == pytest.approx((8 * 5 - 4 * 7) / 12, abs=0.7)
    assert lines["maxrl"][4] == "8 of 12" and lines["grpo"][3:] == [""] * 4
    kinds = {name: [5, 0.1, p] for name, p in (("a", 0.9), ("b", 0.1), ("c", 0.2), ("d", 0.6))}
    assert tables.rarest_kinds({"by_kind": kinds}) == pytest.approx(0.3)


@pytest.mark.parametrize("values, p, expected", [
    ([0.5, -0.5, 1.0, -1.0], 1.0, "no"), ([9.0, -5.0, 4.0, -1.0], 0.4, "undecided"), ([2.0, 2.1, 2.2], 0.01, "yes"),
    ([5.0, 5.1, 5.2], 0.06, "undecided"), ([-2.0, -2.1, -2.2], 0.01, "no, the reverse")])
def test_an_answer_is_yes_no_or_undecided(values, p, expected):
    assert tables.verdict(np.array(values), p) == expected


def test_the_kinds_are_shown_in_pass_at_8_over_all_responses_and_as_found():
    rows = {"grpo": [a_run("grpo", s) for s in range(2)], "rollout": [a_run("rollout", s) for s in range(2)]}
    rows["grpo"][0].evaluations[-1]["by_kind"]["b"][1] = 0.1
    eight, one, found = map(cells, tables.kind_table("x", rows).split("\n\n**"))
    assert eight == {"kind": "b", "grpo": "25.5", "rollout": "30.5"}
    assert one == {"kind": "b", "grpo": "15.0", "rollout": "20.0"}
    assert found == {"kind": "b", "grpo": "1 of 2", "rollout": "2 of 2"}


def test_the_table_of_rates_shows_every_rate_that_was_tried():
    sweep = {rate: [a_run("grpo", s) for s in range(2)] for rate in (1e-4, 2e-4)}
    for run in sweep[2e-4]:
        run.evaluations[-1]["passes"]["pass@8"] = 0.75
    table = tables.rate_table("x", {"grpo": sweep, "base": {1e-4: [a_run("grpo")]}})
    assert cells(table) == {"row": "grpo", "pass@8, 1e-4": "51.0", "pass@8, 2e-4": "75.0", "mean@16, 1e-4": "30.0",
                            "mean@16, 2e-4": "30.0"}


def test_weights_in_the_table_are_those_of_bins_present_in_the_tail_and_ever():
    runs = [a_run("prompt", s) for s in range(2)]
    applied = [[[w if q else np.nan for w, q in zip(line["bins"]["weight"], line["bins"]["share"], strict=True)]
                for line in run.log] for run in runs]
    found = cells(tables.weight_table("x", {"prompt": runs}))
    assert found["least ever applied"] == f"{np.nanmin(applied):.3f}"
    assert found["greatest ever applied"] == f"{np.nanmax(applied):.3f}"
    tails = np.nanmean(np.array(applied)[:, 7:], axis=1)  # steps 7 to 11 of 0 to 11
    assert found["least weight, tail mean"] == f"{np.mean(np.nanmin(tails, axis=1)):.3f}"
    assert found["greatest weight, tail mean"] == f"{np.mean(np.nanmax(tails, axis=1)):.3f}"


def test_the_note_above_the_tables_is_true_of_every_run():
    for run in (run for rows in logs.study().values() for runs in rows.values() for run in runs):
        assert [run.config[f"eval_{key}"] for key in ("rollouts", "temperature", "top_p", "top_k")] == [16, 1, 1, 0]
        assert run.last()["step"] == run.config["steps"] and run.config["loaded"]["eval_data"]["split"] == "heldout"


def test_allocations_in_the_table_equal_a_loop_over_the_log():
    rows = {"grpo": [a_run("grpo")], "rollout": [a_run("rollout")]}
    run = rows["rollout"][0]
    sigma, ours, even, most = logs.bin_sigma([run]), 0.0, 0.0, []
    for line in run.log:
        bins = line["bins"]
        most.append(max(n for n in bins["rollouts"] if n is not None))
        for q, s, n in zip(bins["share"], sigma, bins["rollouts"], strict=True):
            if n is not None:
                ours, even = ours + q * s**2 / n, even + q * s**2 / 4
    found = cells(tables.allocation_table("x", rows))
    assert (found["row"], found["most rollouts of a bin"]) == ("rollout", f"{np.mean(most):.1f}")
    assert found["variance (28)"] == f"{100 * (ours / even - 1):+.1f}%"


def test_signals_in_the_table_equal_a_loop_over_the_log():
    run = a_run("grpo")
    sizes = [abs(x) for line in run.log for x in line["signals"]["reward"]["mean"] if x is not None]
    line = next(x for x in tables.signal_table("x", {"grpo": [run]}).splitlines() if "| reward |" in x)
    assert f"| {np.median(sizes):.1e} |" in line


def run_lines(*runs) -> list[dict[str, str]]:
    head, _, *lines = ([cell.strip() for cell in line[1:-1].split("|")]
                       for line in tables.run_table(list(runs)).splitlines() if line.startswith("|"))
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_the_table_of_runs_has_what_the_logs_say_at_the_last_and_at_the_best_evaluation():
    run = a_run("rollout", 3, changes={"rule": "maxrl", "model": "tiny", "train_data": "data/mine.jsonl"})
    run.evaluations[1]["mean"] = 0.4
    (line,) = run_lines(run)
    assert line == {
        "run": "rollout-3", "trained": "tiny on mine", "mode": "rollout", "rule": "maxrl", "seed": "3", "steps": "12",
        "tokens": "1,200", "hours": "0.01", "evaluated on": "10 of made-up, temperature 1", "last at step": "12",
        "last pass@8": "66.0", "last mean@16": "40.0", "best at step": "12", "best pass@8": "66.0",
        "best mean@16": "40.0", "worst kind, pass@8": "b 33.0"}
    run.evaluations[0]["passes"]["pass@8"] = 0.7
    (line,) = run_lines(run)
    assert [line[f"best {x}"] for x in ("at step", "pass@8", "mean@16")] == ["6", "70.0", "30.0"]
    assert line["last pass@8"] == "66.0"


def test_runs_of_other_k_without_kinds_or_without_evaluations_stand_in_one_table_without_a_wrong_head():
    few, begun = a_run("grpo", 1, changes={"eval_data": ""}), a_run("prompt")
    for e in few.evaluations:
        e.update(passes={"pass@1": 0.1, "pass@4": 0.5}, rollouts=4, by_kind={"all": [10, 0.3, 0.5]})
    begun.evaluations.clear()
    begun.log.clear()
    eight, four, none = run_lines(a_run("grpo"), few, begun)
    assert (eight["last pass@8"], eight["last pass@4"]) == ("50.0", "")
    assert (four["last pass@8"], four["last pass@4"], four["worst kind, pass@8"]) == ("", "50.0", "")
    assert four["evaluated on"] == "10 of those held out, temperature 1"
    assert (none["steps"], none["tokens"], none["hours"]) == ("0", "0", "0")
    assert not any(none[name] for name in none if "@" in name or "step" in name and name != "steps")


def sample(step: int = 0, **changes) -> dict:
    return {"step": step, "id": "sum-1", "bin": 5, "n": 4, "weight": 1.25, "factor": 2.0, "answer": "7", "found": "8",
            "reward": -1.0, "right": False, "truncated": False, "prompt": "3+4=", "response": f"at {step}", **changes}


def page_of(tmp_path, samples: list[dict], cut: str = "", **changes) -> str:
    folder = folder_of(a_run("rollout", changes=changes), tmp_path / "a-run")
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples) + cut)
    return tables.sample_page(folder)


def test_a_page_of_samples_shows_the_start_the_middle_and_the_end_of_training(tmp_path):
    page = page_of(tmp_path, [sample(step, id=f"p{i}") for step in range(11) for i in range(4)], cut='{"step": 11, "re')
    assert page.startswith("# a-run: made-up, mode rollout")
    assert [line for line in page.splitlines() if line.startswith("##")] == [
        f"## step {step}, of 0 to 10" for step in (0, 5, 10)]
    shown = [line.split()[2] for line in page.splitlines() if line.startswith("    response")]
    assert shown == [str(step) for step in (0, 5, 10) for _ in range(4)]


def test_a_sample_says_verdict_numbers_gold_and_what_was_found(tmp_path):
    assert tables.sample_text(sample(), False).splitlines() == [
        "**sum-1: wrong** (reward -1, bin 5, n 4, weight 1.25, factor 2)", "", "    prompt    3+4=",
        "    response  at 0", "    gold      7", "    found     8"]
    own = sample(reward=0.25, found=None, right=True)
    assert tables.sample_text(sample(found=None), False).endswith("found     (no answer)")
    assert tables.sample_text(sample(reward=1.0, right=True, truncated=True), False).startswith(
        "**sum-1: right, cut at the length limit** (reward 1,")
    page = page_of(tmp_path, [own], reward="mine.py:score")  # it looks for no answer, so none is missing
    assert "**sum-1: right** (reward 0.25," in page and "found" not in page
    assert "response  (empty)" in tables.sample_text(sample(response=""), False)


def test_long_texts_lose_their_middle_which_is_counted_and_control_characters_show():
    text = "".join(f"line {i} has words\n" for i in range(50)) + "x" * 1000
    for most in (2, 5, 24):
        lines = tables.excerpt(text, most)
        assert len(lines) == most + 1 and max(map(len, lines)) <= 100
        assert lines[0] == "line 0 has words" and lines[-1].endswith("x")
        shown = sum(len(line) for i, line in enumerate(lines) if i != most // 2)
        left_out = int(lines[most // 2].split()[1].replace(",", ""))
        assert shown + left_out == len(text.replace("\n", ""))
    assert tables.excerpt("a b\n\n  c", 3) == ["a b", "", "  c"]
    assert tables.visible("a\tb\x1b[2J\r\u202e\x00 é 中 \\frac") == "a\\tb\\x1b[2J\\r\\u202e\\x00 é 中 \\frac"
    assert "\\x1b" in tables.sample_text(sample(response="\x1b[31mred", id="\x1b"), False).splitlines()[3]
