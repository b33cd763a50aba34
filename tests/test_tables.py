"""Cells of the tables against loops over the logs."""

import itertools

import numpy as np
import pytest
from test_logs import a_run

import logs
import tables
from study import Row


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
    line = dict(zip(HEAD, tables.outcome(Row("prompt"), rows), strict=True))
    assert (line["row"], line["bases"], line["rate"]) == ("prompt", "3", "1e-4 (2) 4e-4 (1)")
    assert (line["against"], line["paired difference"], line["relative"]) == ("grpo", "+26.0 [+26.0, +26.0]", "+50.0%")
    assert line["pass@8"].startswith("78.0 [")
    assert (line["worst kind, pass@8"], line["worst kind, paired difference"]) == ("41.0", "+15.0 [+15.0, +15.0]")
    base = dict(zip(HEAD, tables.outcome(Row("grpo"), rows), strict=True))
    assert (base["rate"], base["mean@16"]) == ("1e-4", "30.0 [30.0, 30.0]")
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


def test_runs_that_began_from_different_base_models_are_not_compared():
    ours, theirs = a_run("rollout"), a_run("grpo")
    ours.config["loaded"] = {"model": {"head": "another"}}
    with pytest.raises(ValueError, match="began from different base models"):
        tables.outcome(Row("rollout"), {"grpo": [theirs], "rollout": [ours]})


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
    for line in tables.question_table().splitlines()[4:]:
        _, rows, bases, value, p, answer, *_ = (cell.strip() for cell in line[1:-1].split("|"))
        by_rows[rows] = answer
        assert bases == "16" and 0 <= float(p) <= 1
    assert by_rows == {"rollout-maxrl - maxrl": "yes", "rollout-maxrl - weights-maxrl": "yes",
                       "prompt - tilt": "no, the reverse", "maxrl - grpo": "yes"}
    ours, theirs = (np.concatenate([[100 * logs.headline(r.last()) for r in t[row]] for t in tasks.values()])
                    for row in ("maxrl", "grpo"))
    assert tables.pooled("maxrl", "grpo", logs.headline) == pytest.approx(ours - theirs)


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
