"""Numbers in the README are those of the logs in results/."""

import functools
import json
import re
from pathlib import Path

import numpy as np

import plots

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROSE = " ".join(README.split())


@functools.cache
def tables() -> str:
    return plots.tables()


@functools.cache
def study() -> dict:
    return plots.study()


def gain(task: str, row: str, figure=plots.pass8) -> tuple[float, float, float]:
    """Paired difference to GRPO in points, with its interval."""
    rows = study()[task]
    return plots.interval(100 * plots.paired(rows[row], rows["grpo"], figure))


def points(task: str, row: str, figure=plots.pass8) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gain(task, row, figure))


def relative(task: str, row: str) -> str:
    rows = study()[task]
    _, baseline = plots.pairs(rows[row], rows["grpo"])
    return f"{gain(task, row)[0] / np.mean([plots.pass8(r.last()) for r in baseline]):+.0f}%"


def cell(table: str, row: str, column: str) -> str:
    """One cell of a table that plots.py --table prints."""
    lines = tables().split(f"**{table}**\n\n")[1].split("\n\n")[0].splitlines()
    head = [c.strip() for c in lines[0].strip("|").split("|")]
    for line in lines[2:]:
        cells = [c.strip() for c in line.strip("|").split("|")]
        if cells[0] == row:
            return cells[head.index(column)]
    raise KeyError(f"{table}: no row {row}")


def test_results_tables_md_is_what_plots_prints():
    assert (ROOT / "results" / "TABLES.md").read_text() == plots.tables() + "\n", \
        "python plots.py --table > results/TABLES.md"


def section(title: str) -> str:
    """The README from this heading to the next one of any level."""
    return README.split(f"# {title}\n")[1].split("\n#")[0]


def test_every_line_of_a_result_table_is_one_that_plots_prints():
    shown = [line for title in ("Group-DRO for LLM reasoning, from scratch", "The study")
             for line in section(title).splitlines() if line.startswith("| ")]
    printed = set(tables().splitlines())
    assert len(shown) > 20 and not [line for line in shown if line not in printed]


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
