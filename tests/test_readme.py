"""Numbers in the README are those of the logs in results/."""

import json
import re
import statistics
from pathlib import Path

ROOT = Path(__file__).parents[1]
MODES = {"grpo": "GRPO", "prompt": "Prompt-GDRO", "rollout": "Rollout-GDRO", "both": "both"}


def evaluations(mode: str, seed: int) -> list[dict]:
    return json.loads((ROOT / "results" / "arithmetic" / f"{mode}-{seed}" / "eval.json").read_text())


def test_the_result_table_is_computed_from_the_logs():
    rows = []
    base = evaluations("grpo", 0)[0]
    for mode, name in MODES.items():
        last = [evaluations(mode, seed)[-1] for seed in range(3)]
        cells = []
        for key in ("mean", "pass@8"):
            values = [e["mean"] if key == "mean" else e["passes"]["pass@8"] for e in last]
            cells.append(f"{statistics.mean(values):.3f} ({' '.join(f'{v:.3f}' for v in values)})")
        rows.append(f"| {name} | {cells[0]} | {cells[1]} |")
    bases = [evaluations("grpo", seed)[0] for seed in range(3)]
    base_cells = [f"{statistics.mean(v):.3f} ({' '.join(f'{x:.3f}' for x in v)})"
                  for v in ([e["mean"] for e in bases], [e["passes"]["pass@8"] for e in bases])]
    expected = [f"| base | {base_cells[0]} | {base_cells[1]} |", *rows]
    readme = (ROOT / "README.md").read_text()
    missing = [row for row in expected if row not in readme]
    assert not missing, "README lacks:\n" + "\n".join(missing)
    assert base["problems"] == 500


def test_the_paired_differences_to_grpo_are_computed_from_the_logs():
    readme = (ROOT / "README.md").read_text()

    def differences(mode: str, figure) -> str:
        pairs = [(figure(evaluations(mode, s)[-1]), figure(evaluations("grpo", s)[-1])) for s in range(3)]
        return " ".join(f"{ours - grpo:+.3f}" for ours, grpo in pairs)

    for mode in ("prompt", "rollout", "both"):
        assert differences(mode, lambda e: e["passes"]["pass@8"]) in readme
    assert f"({differences('prompt', lambda e: e['mean'])})" in readme
    assert all(x.startswith("-") for x in differences("both", lambda e: e["mean"]).split())
    runs = [evaluations(mode, s) for mode in MODES for s in range(3)]
    assert min(run[-1]["passes"]["pass@8"] - run[0]["passes"]["pass@8"] for run in runs) > 0.13
    squares = [run[-1]["by_kind"]["sum_of_squares"][2] for run in runs]
    assert f"to {min(squares):.2f}-{max(squares):.2f}," in readme


def test_the_quick_start_table_is_that_of_prompt_seed_0():
    first, *_, last = evaluations("prompt", 0)
    readme = (ROOT / "README.md").read_text()
    for kind, (_, _, before) in first["by_kind"].items():
        assert f"| pass@8, {kind} | {before:.3f} | {last['by_kind'][kind][2]:.3f} |" in readme
    assert f"| pass@8 | {first['passes']['pass@8']:.3f} | {last['passes']['pass@8']:.3f} |" in readme
    assert f"| mean@16 | {first['mean']:.3f} | {last['mean']:.3f} |" in readme


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
