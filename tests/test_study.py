"""Every row of the study is a run that train.py accepts, and what is kept of a run is what it logged."""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import study.rows as study
import tasks
from config import PRESETS, Config, check, parse_args
from study.rows import Row, Run

RUNS = study.runs("")


def config(run: Run) -> Config:
    """What train.py makes of the run's command."""
    return parse_args(run.command()[2:])[0]


def test_every_run_is_one_that_train_accepts_from_its_base_at_its_rate_on_all_held_out_problems():
    for run in RUNS:
        cfg = config(run)
        check(cfg)
        assert (cfg.model, cfg.train_data, cfg.eval_data) == (run.model, run.task, run.task)
        assert cfg.seed == run.base and cfg.learning_rate == run.rate and cfg.out_dir.endswith(run.name)
        assert cfg.eval_problems == tasks.SIZES["heldout"] == 600 and cfg.eval_rollouts == 16


def test_a_row_differs_from_grpo_at_its_rate_and_base_by_its_flags_alone():
    for run in RUNS:
        flags = {k: v for k, v in run.row.flags.items() if k != "adversary"}
        whose = {k: v for k, v in run.row.flags.items() if k == "adversary"}
        grpo = dataclasses.replace(run.row, name="grpo", flags={"mode": "grpo", **whose})
        own, grpo = config(run), config(dataclasses.replace(run, row=grpo))
        assert own == dataclasses.replace(grpo, out_dir=own.out_dir, **flags)
        assert all(getattr(own, k) != getattr(grpo, k) for k in set(flags) - {"mode", "rule"})


def test_rows_of_a_task_train_on_equally_many_rollouts_as_the_preset_has():
    for run in RUNS:
        cfg = config(run)
        steps = 300 if run.row.name.endswith(("-300", "-long")) else PRESETS[run.task][1]["steps"]
        assert cfg.steps == (0 if run.row.name == "base" else steps)
        assert (cfg.prompts_per_step, cfg.rollouts_per_prompt) == (64, 4)
        assert cfg.rollout_budget != "dual"  # the only budget that holds on average alone


def test_a_row_is_held_against_another_of_its_tasks():
    rows = {row.name: row for part in study.PARTS.values() for row in part}
    for row in rows.values():
        assert set(row.tasks) <= set(rows[row.against].tasks) and rows[row.against].bases >= row.bases


def test_runs_are_named_row_rate_base_and_parts_run_base_by_base(monkeypatch):
    assert len({r.name for r in RUNS}) == len(RUNS) and all(float(study.written(r.rate)) == r.rate for r in RUNS)
    assert study.written(2e-4) == "2e-4"
    rows = (Row("a-row", bases=2, rates=(1e-4, 2e-4), tasks=("x",)),
            Row("b", bases=1, rates=(1e-4,), further={"y": (5e-5,)}, tasks=("x", "y")))
    monkeypatch.setattr(study, "PARTS", {"one": rows, "two": (Row("c", bases=1, rates=(1e-3,), tasks=("y",)),)})
    assert [r.name for r in study.runs("")] == [
        "x/a-row-1e-4-0", "x/a-row-2e-4-0", "x/b-1e-4-0", "y/b-1e-4-0", "y/b-5e-5-0", "x/a-row-1e-4-1",
        "x/a-row-2e-4-1", "y/c-1e-3-0"]
    assert [r.name for r in study.runs("y/b-5")] == ["y/b-5e-5-0"]


def folder_of(path: Path, base: int, rate: str = "2e-4", steps: int = 1, ended: int = 1) -> Path:
    """A run folder as train.py leaves it, of `steps` steps, evaluated last after `ended`."""
    folder = path / f"some-row-{rate}-{base}"
    folder.mkdir(exist_ok=True)
    line = {"step": 3, "x": [0.123456, None, 2, 1e-9], "y": {"z": -12345.678, "name": "0.123456"},
            "seconds": {"update": 1.23456, "total": 2.34567}}
    (folder / "config.json").write_text(json.dumps({"preset": "a-task", "seed": base, "steps": steps}))
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "eval.json").write_text(json.dumps([{"step": ended, "mean": 0.123456789}]))
    return folder


def test_what_is_kept_says_what_was_logged_to_three_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    study.keep(folder_of(tmp_path, 4), 12.34)
    (line,) = study.kept_lines(tmp_path / "results" / "a-task" / "some-row.jsonl.gz").values()
    assert json.loads(line) == {
        "name": "some-row-2e-4-4", "config": {"preset": "a-task", "seed": 4, "steps": 1, "seconds": 12.3},
        "log": [{"step": 3, "x": [0.123, None, 2, 1e-9], "y": {"z": -12300.0, "name": "0.123456"},
                 "seconds": {"total": 2.35}}],
        "evaluations": [{"step": 1, "mean": 0.123456789}]}  # whole


def test_runs_kept_at_once_are_all_there_by_base_and_the_same_runs_give_the_same_bytes(tmp_path, monkeypatch):
    folders = [folder_of(tmp_path, base, rate) for base in range(6) for rate in ("1e-4", "2e-4")]
    files = []
    for order in (folders, folders[::-1]):
        monkeypatch.setattr(study, "RESULTS", tmp_path / f"results-{len(files)}")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(study.keep, order))
        study.keep(order[5])  # again: replaced, not doubled
        files.append(study.row_file("a-task", "some-row"))
    assert list(study.kept_lines(files[0])) == [folder.name for folder in folders]
    assert files[0].read_bytes() == files[1].read_bytes() and len(list(files[0].parent.iterdir())) == 1
    runs = ((2e-4, 5), (2e-4, 6), (4e-4, 5))
    assert [Run("a-task", Row("some-row"), rate, base).done() for rate, base in runs] == [True, False, False]


def test_a_run_that_stopped_early_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    with pytest.raises(ValueError, match="some-row-2e-4-0 is not complete: its last evaluation is of step 50"):
        study.keep(folder_of(tmp_path, 0, steps=100, ended=50))


def test_a_run_that_fails_is_reported_with_its_last_words_and_kept_once_it_is_complete(
        base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "OUT", tmp_path / "out")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    sums = base.parent / "sums.jsonl"
    small = dict(model=base, train_data=sums, eval_data=sums, eval_problems=4, eval_rollouts=2, steps=2,
                 prompts_per_step=8, minibatch_prompts=8, max_response_tokens=8)
    diverging, lower = (Run("arithmetic", Row("some-row", {**small, **more}), 1e-4, 0)
                        for more in ({"learning_rate": 1e39}, {}))  # beyond float32
    assert study.work([diverging], 1) == 1 and not diverging.done()
    assert "arithmetic/some-row-1e-4-0: train.py ended with 1: train.py: step 1: " in capsys.readouterr().out
    assert "--resume" in lower.command()  # for the folder is there
    assert study.work([lower], 1) == 0 and lower.done() and not (study.OUT / lower.name).exists()
    assert not capsys.readouterr().out


def test_an_unknown_row_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--only", "nothing-like-it"])
    with pytest.raises(SystemExit):
        study.main()
    assert "--only nothing-like-it: no run has that in its name" in capsys.readouterr().err


def test_the_list_says_of_each_run_whether_it_is_done_and_how_train_would_be_called(monkeypatch, capsys):
    monkeypatch.setattr(study, "kept_lines", lambda file: ["grpo-1e-4-0"] if file.name == "grpo.jsonl.gz" else [])
    monkeypatch.setattr(sys, "argv", ["study.py", "--list", "--only", "arithmetic/grpo"])
    study.main()
    (done, name, *flags), (missing, *_), *_ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (done, name, missing) == ("done", "arithmetic/grpo-1e-4-0", "missing")
    assert parse_args(flags)[0] == dataclasses.replace(config(study.runs(name)[0]), out_dir="out/arithmetic-0-grpo-0")
