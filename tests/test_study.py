"""Every row of the study is a run that train.py accepts, and what is kept of a run is what it logged."""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import study
from config import ADVERSARIES, check, parse_args

RUNS = study.runs("")


def config(run: study.Run):
    """What train.py makes of the run's command."""
    return parse_args(run.command()[2:])[0]


def test_every_run_is_one_that_train_accepts_on_held_out_problems():
    for run in RUNS:
        cfg = config(run)
        check(cfg)
        assert cfg.seed == run.seed and cfg.out_dir.endswith(run.name) and cfg.eval_problems == 1000
        assert (cfg.model, cfg.train_data, cfg.eval_data) == (run.task,) * 3


def effective(run: study.Run) -> dict:
    """Its settings, with what "auto" stands for."""
    fields = dataclasses.asdict(config(run))
    if fields["share_normalize"] == "auto":
        fields["share_normalize"] = "on" if fields["prompt_signal"] == "surrogate" else "off"
    return fields


def test_a_row_differs_from_that_of_its_mode_by_its_flags_alone():
    of_mode = {(r.task, r.row.name): effective(r) for r in RUNS if r.seed == 0}
    for run in (r for r in RUNS if r.seed == 0 and r.row.flags.get("steps") != 0):
        own, plain = of_mode[run.task, run.row.name], of_mode[run.task, run.row.flags["mode"]]
        differing = {k for k in own if own[k] != plain[k]} - {"out_dir"}
        flags = set(run.row.flags) - {"mode"}
        if "adversary" in flags:
            flags = set(ADVERSARIES["tuned"]) | {"share_normalize"}  # "auto", and so on with the surrogate
        assert differing == flags - {k for k in flags if own[k] == plain[k]} and (differing or not flags)
        assert all(own[k] != plain[k] for k in set(run.row.flags) - {"mode", "adversary"} - {"share_normalize"})


def test_rows_of_a_task_train_on_equally_many_rollouts():
    trained = {(c.prompts_per_step, c.rollouts_per_prompt, c.steps) for r in RUNS if (c := config(r)).steps}
    assert trained == {(64, 4, 100)}
    assert all(config(r).rollout_budget != "dual" for r in RUNS)  # the only budget that holds on average alone


def test_a_row_is_held_against_another_of_its_tasks():
    rows = {row.name: row for part in study.PARTS.values() for row in part}
    for row in rows.values():
        assert set(row.tasks) <= set(rows[row.against].tasks) and rows[row.against].seeds >= row.seeds


def test_names_are_unique_and_parts_run_seed_by_seed():
    names = [r.name for r in RUNS]
    assert len(set(names)) == len(names)
    modes = [r.seed for r in RUNS[: sum(row.seeds * len(row.tasks) for row in study.PARTS["The four modes"])]]
    assert modes == sorted(modes)


def folder_of(path: Path, seed: int, steps: int = 1, ended: int = 1) -> Path:
    """A run folder as train.py leaves it, of `steps` steps, evaluated last after `ended`."""
    folder = path / f"some-row-{seed}"
    folder.mkdir(exist_ok=True)
    line = {"step": 3, "x": [0.123456, None, 2, 1e-9], "y": {"z": -12345.678, "name": "0.123456"},
            "seconds": {"update": 1.23456, "total": 2.34567}}
    (folder / "config.json").write_text(json.dumps({"preset": "a-task", "seed": seed, "steps": steps}))
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "eval.json").write_text(json.dumps([{"step": ended, "mean": 0.123456789}]))
    return folder


def test_what_is_kept_says_what_was_logged_to_four_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    study.keep(folder_of(tmp_path, 4), 12.34)
    (line,) = study.kept_lines(tmp_path / "results" / "a-task" / "some-row.jsonl.gz").values()
    assert json.loads(line) == {
        "name": "some-row-4", "config": {"preset": "a-task", "seed": 4, "steps": 1, "seconds": 12.3},
        "log": [{"step": 3, "x": [0.1235, None, 2, 1e-9], "y": {"z": -12350.0, "name": "0.123456"},
                 "seconds": {"total": 2.346}}],
        "evaluations": [{"step": 1, "mean": 0.123456789}]}  # whole


def test_runs_kept_at_once_are_all_there_by_seed_and_the_same_runs_give_the_same_bytes(tmp_path, monkeypatch):
    folders = [folder_of(tmp_path, seed) for seed in range(12)]
    files = []
    for order in (folders, folders[::-1]):
        monkeypatch.setattr(study, "RESULTS", tmp_path / f"results-{len(files)}")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(study.keep, order))
        study.keep(order[5])  # again: replaced, not doubled
        files.append(study.row_file("a-task", "some-row"))
    assert list(study.kept_lines(files[0])) == [f"some-row-{seed}" for seed in range(12)]
    assert files[0].read_bytes() == files[1].read_bytes() and len(list(files[0].parent.iterdir())) == 1
    row = study.Row("some-row", 13)
    assert study.Run("a-task", row, 11).done() and not study.Run("a-task", row, 12).done()


def test_a_run_that_stopped_early_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    with pytest.raises(ValueError, match="some-row-0 is not complete: its last evaluation is of step 50"):
        study.keep(folder_of(tmp_path, 0, steps=100, ended=50))


def test_a_run_that_fails_is_reported_with_its_last_words_and_kept_once_it_is_complete(
        base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "OUT", tmp_path / "out")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    sums = base.parent / "sums.jsonl"
    small = dict(model=base, train_data=sums, eval_data=sums, eval_problems=4, eval_rollouts=2, steps=2,
                 prompts_per_step=8, minibatch_prompts=8, max_response_tokens=8)
    diverging, lower = (study.Run("arithmetic", study.Row("some-row", 1, {**small, "learning_rate": rate}), 0)
                        for rate in (1e30, 1e-4))
    assert study.work([diverging], 1) == 1 and not diverging.done()
    assert "arithmetic/some-row-0: train.py ended with 1: train.py: step 1: " in capsys.readouterr().out
    assert "--resume" in lower.command()  # for the folder is there
    assert study.work([lower], 1) == 0 and lower.done()
    assert not capsys.readouterr().out


def test_an_unknown_row_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--only", "nothing-like-it"])
    with pytest.raises(SystemExit):
        study.main()
    assert "--only nothing-like-it: no run has that in its name" in capsys.readouterr().err


def test_the_list_says_of_each_run_whether_it_is_done_and_how_train_would_be_called(monkeypatch, capsys):
    monkeypatch.setattr(study, "kept_lines", lambda file: ["grpo-0"] if file.name == "grpo.jsonl.gz" else [])
    monkeypatch.setattr(sys, "argv", ["study.py", "--list", "--only", "arithmetic/grpo"])
    study.main()
    (done, name, *flags), (missing, *_), *_ = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (done, name, missing) == ("done", "arithmetic/grpo-0", "missing")
    (run,) = study.runs("arithmetic/grpo-0")
    assert parse_args(flags)[0] == dataclasses.replace(config(run), out_dir="out/arithmetic-grpo-0")
