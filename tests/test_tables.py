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


def test_a_line_of_the_table_says_mean_difference_relative_gain_and_peak():
    rows = {"grpo": [a_run("grpo", s) for s in range(3)], "prompt": [a_run("prompt", s) for s in range(3)]}
    for run in rows["prompt"]:
        run.evaluations[-1]["passes"]["pass@8"] += 0.21
    name, seeds, value, against, minus, relative, peak, *_ = tables.outcome(Row("prompt", 3), rows)
    assert (name, seeds, against, minus, relative) == ("prompt", "3", "grpo", "+26.0 [+26.0, +26.0]", "+50.0%")
    assert value.startswith("78.0 [") and peak == "78.0"
    assert tables.outcome(Row("grpo", 3), rows)[3:9] == ["", "", "", "61.0", "30.0 [30.0, 30.0]", ""]


def test_a_row_is_compared_with_that_which_it_is_held_against_on_the_seeds_that_both_have(monkeypatch):
    rows = {"grpo": [a_run("grpo", s) for s in range(3)], "grpo-4-minibatches": [a_run("grpo", 2)],
            "rollout-4-minibatches": [a_run("rollout", s) for s in range(3)]}
    rows["rollout-4-minibatches"][2].evaluations[-1].update(mean=0.45, passes={"pass@8": 0.80})
    monkeypatch.setattr(tables, "study", lambda: {"made-up": rows})
    found = cells(tables.outcome_tables().split("\n\n**")[1])
    assert (found["row"], found["against"]) == ("rollout-4-minibatches", "grpo-4-minibatches")
    assert (found["paired difference"], found["mean@16, paired difference"]) == ("+26.0", "+15.0")
    del rows["grpo-4-minibatches"]
    assert cells(tables.outcome_tables().split("\n\n**")[1])["paired difference"] == ""


def test_runs_that_began_from_different_base_models_are_not_compared():
    ours, theirs = a_run("rollout"), a_run("grpo")
    ours.config["loaded"] = {"model": {"head": "another"}}
    with pytest.raises(ValueError, match="began from different base models"):
        tables.outcome(Row("rollout", 1), {"grpo": [theirs], "rollout": [ours]})


def test_the_kinds_are_shown_in_pass_at_8_and_over_all_responses():
    rows = {mode: [a_run(mode, s) for s in range(2)] for mode in ("grpo", "both")}
    assert cells(tables.kind_table("x", rows)) == {
        "kind": "b", "grpo, pass@8": "25.5", "both, pass@8": "33.0", "grpo, pass@1": "20.0", "both, pass@1": "20.0"}


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
