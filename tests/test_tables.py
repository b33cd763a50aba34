"""Cells of the tables against loops over the logs."""

import itertools

import numpy as np
from test_logs import a_run

import logs
import tables


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
    assert tables.exact_configurations(np.array([45, 19]), np.arange(2, 13), 256) == 1  # the example of the README


def test_a_line_of_the_table_says_mean_difference_relative_gain_and_peak():
    rows = {"grpo": [a_run("grpo", s) for s in range(3)], "prompt": [a_run("prompt", s) for s in range(3)]}
    for run in rows["prompt"]:
        run.evaluations[-1]["passes"]["pass@8"] += 0.21
    name, seeds, value, difference, relative, peak, *_ = tables.outcome("prompt", rows["prompt"], rows)
    assert (name, seeds, difference, relative) == ("prompt", "3", "+26.0 [+26.0, +26.0]", "+50.0%")
    assert value.startswith("78.0 [") and peak == "78.0"
    assert tables.outcome("grpo", rows["grpo"], rows)[3:6] == ["", "", "61.0"]


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
    cells = tables.allocation_table("x", rows).splitlines()[-1].strip("| ").split(" | ")
    assert cells[:3] == ["rollout", "1", f"{np.mean(most):.1f}"] and cells[6] == f"{100 * (ours / even - 1):+.1f}%"


def test_signals_in_the_table_equal_a_loop_over_the_log():
    run = a_run("grpo")
    sizes = [abs(x) for line in run.log for x in line["signals"]["reward"]["mean"] if x is not None]
    line = next(x for x in tables.signal_table("x", {"grpo": [run]}).splitlines() if "| reward |" in x)
    assert f"| {np.median(sizes):.1e} |" in line
