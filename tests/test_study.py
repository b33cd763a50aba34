"""Every row of the study is a run that train.py accepts, and what is kept of a run is what it logged."""

import dataclasses
import json
import sys

import pytest

import study
from train import ADVERSARIES, check, parse_args

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
    for run in (r for r in RUNS if r.seed == 0 and r.row.name != "base"):
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


def test_names_are_unique_and_parts_run_seed_by_seed():
    names = [r.name for r in RUNS]
    assert len(set(names)) == len(names)
    modes = [r.seed for r in RUNS[: sum(row.seeds * len(row.tasks) for row in study.PARTS["The four modes"])]]
    assert modes == sorted(modes)


def test_what_is_kept_says_what_was_logged_to_four_digits(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    line = {"step": 3, "x": [0.123456, None, 2, 1e-9], "y": {"z": -12345.678, "name": "0.123456"}}
    (run / "config.json").write_text('{"seed": 1}')
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (run / "eval.json").write_text('[{"mean": 0.123456789}]')
    study.keep(run, tmp_path / "kept", 12.34)
    kept = json.loads((tmp_path / "kept" / "metrics.jsonl").read_text())
    assert kept == {"step": 3, "x": [0.1235, None, 2, 1e-9], "y": {"z": -12350.0, "name": "0.123456"}}
    assert json.loads((tmp_path / "kept" / "eval.json").read_text()) == [{"mean": 0.123456789}]  # whole
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == {"seed": 1, "seconds": 12.3}


def test_a_run_that_fails_is_reported_with_its_last_words_and_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "OUT", tmp_path / "out")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results")
    broken = study.Run("arithmetic", study.Row("broken", 1, {"mode": "grpo", "prompts_per_step": -1}), 0)
    assert "broken-0: train.py ended with 1: train.py: --prompts_per_step must be positive" in broken.execute()
    assert not broken.done() and study.work([broken], 1) == 1


def test_an_unknown_row_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", "--only", "nothing-like-it"])
    with pytest.raises(SystemExit):
        study.main()
    assert "--only nothing-like-it: no run has that in its name" in capsys.readouterr().err


def test_the_list_says_of_each_run_whether_it_is_done(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    done = tmp_path / "arithmetic" / "grpo-0"
    done.mkdir(parents=True)
    (done / "eval.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["study.py", "--list", "--only", "arithmetic/grpo"])
    study.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "done    arithmetic/grpo-0 --mode grpo" and lines[1].startswith("missing arithmetic/grpo-1")
