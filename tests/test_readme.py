"""Numbers in the README and in docs/ are those of files in results/, and what they name exists."""

import functools
import json
import re
from pathlib import Path

import pytest

import plan
from config import parse_args
from metrics import Evaluation
from study import logs
from study import tables as tabulated

ROOT = Path(__file__).parents[1]
TEXTS = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
WRITTEN = ("config.json", "paths.json", "eval.json", "best/evaluation.json", "state.json")  # by runs
tables = functools.cache(tabulated.tables)


def test_results_tables_md_is_what_plots_prints():
    kept = (ROOT / "results" / "TABLES.md").read_text()
    assert kept == tables() + "\n", "python plots.py --table > results/TABLES.md"


@pytest.mark.parametrize("name, fewest", [("README.md", 6), ("study.md", 20)])
def test_every_line_of_a_result_table_is_one_that_plots_prints(name, fewest):
    text = TEXTS[name].split("## Install")[0]
    shown = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(shown) >= fewest and not [line for line in shown if line not in set(tables().splitlines())]


@pytest.mark.parametrize("name", ["README.md", "study.md", "disagreements.md"])
def test_every_difference_in_prose_stands_in_a_table(name):
    found = re.findall(r"[+-]\d+\.\d \[[+-]\d+\.\d, [+-]\d+\.\d\]", TEXTS[name])
    assert found and not [x for x in found if x not in tables()]


def numbers(content) -> list[float]:
    """All numbers in a piece of JSON."""
    if isinstance(content, dict | list):
        return [x for part in (content.values() if isinstance(content, dict) else content) for x in numbers(part)]
    return [float(content)] if isinstance(content, int | float) and not isinstance(content, bool) else []


def test_every_measured_number_on_speed_rounds_one_in_a_file():
    measured = [x for path in (ROOT / "results").glob("*/*.json") for x in numbers(json.loads(path.read_text()))]
    said = re.findall(r"(?<![\w.`-])\d[\d,]*\.\d+(?![\w.`])", TEXTS["speed.md"])
    digits = {s: len(s.partition(".")[2]) for s in said}
    known = {d: {f"{x:,.{d}f}" for x in measured} for d in set(digits.values())}
    assert len(said) > 20 and not [s for s, d in digits.items() if s not in known[d]]


def test_everything_that_the_texts_name_exists():
    code = "".join(p.read_text() for p in ROOT.rglob("*.py") if not {".venv", "out"} & set(p.parts))
    for page, text in TEXTS.items():
        ours = re.sub(r"`[0-9a-f]{7}`", "", text) if page != "disagreements.md" else ""  # which names official code
        for name in re.findall(r"`(?:\w+\.)*([a-zA-Z_]\w+)\(?\)?`", ours):
            assert re.search(rf"\b{name}\b", code) or (ROOT / name).exists() or f"`{name}`" in TEXTS["log.md"], name
        for name in re.findall(r"`([\w/.]+\.(?:py|txt|json|cff|md))`", text):
            assert (ROOT / name).exists() or name in WRITTEN, name
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for name in re.findall(r"\]\(((?!http)[^)]+)\)", text):
            assert (folder / name).exists(), name


def test_every_flag_that_the_texts_give_is_one():
    known = "".join((ROOT / name).read_text() for name in ("config.py", "eval.py", "plots.py", "study/__main__.py",
                                                            "bench/__main__.py"))
    others = {"nproc_per_node", "nnodes", "rdzv_backend", "rdzv_endpoint", "shutdown_timeout"}  # of torchrun
    for text in TEXTS.values():
        for flag in set(re.findall(r"(?<![\w-])--(\w+)", text)) - others:
            assert re.search(rf"\b{flag}\b", known), flag


def test_the_end_of_the_first_run_is_what_its_evaluation_says():
    first = ROOT / "results" / "first_run"
    last = json.loads((first / "eval.json").read_text())[-1]
    assert f"`{Evaluation(**last).line()}`" in TEXTS["README.md"]
    others = list(first.glob("eval-*.json"))
    assert len(others) == 3
    for path in others:
        passed = Evaluation(**json.loads(path.read_text())[-1]).passes["pass@8"]
        assert f" {100 * passed:.1f}" in TEXTS["README.md"], path.name


def test_the_readme_is_short():
    words = re.findall(r"\S*\w\S*", TEXTS["README.md"])  # a border of a table is none
    assert len(TEXTS["README.md"].splitlines()) <= 120 and len(words) <= 1200


def test_every_logged_key_is_explained_and_no_other():
    line = logs.study()["arithmetic"]["grpo"][0].log[0]
    rows = [x.split("|")[1] for x in TEXTS["log.md"].splitlines() if x.startswith("| `")]
    explained = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert set(line) == explained


def test_what_fits_which_cards_is_what_plan_says():
    card, fewest, there, on_8 = plan.CARDS["H100"], [], [], []
    for name in ("qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-0.6b"):
        cfg, _ = parse_args(["--preset", name])
        model = plan.known_model(cfg.model)
        if name == "qwen3-0.6b":
            assert not plan.over(model, cfg, 1, 8, plan.CARDS["4090"].memory)
            continue
        fewest.append(next(n for n in (1, 2, 4, 8) if not plan.over(model, cfg, n, 8, card.memory)))
        for n, hours in ((fewest[-1], there), (8, on_8)):
            run = plan.table_row(model, cfg, n, "H100", card, plan.mean_tokens(model, cfg))[-1]
            hours.append(round(float(run.removesuffix(" h"))))
    said = "fit {}, {} and {} H100 and take {}, {} and {} hours there, {}, {} and {} on 8"
    assert said.format(*fewest, *there, *on_8) in " ".join(TEXTS["README.md"].split())
