"""Every row of the study is a run that train.py accepts, and what is kept of a run is what it logged."""

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tasks
from config import PRESETS, Config, check, parse_args
from metrics import Evaluation
from study import __main__ as command
from study import logs, rows
from study.rows import Row, Trial, trials

TRIALS = trials()


def config(trial: Trial) -> Config:
    """What train.py makes of the trial's command."""
    return parse_args(trial.command(Path("out/study", trial.name))[2:])[0]


def test_every_trial_is_a_run_that_train_accepts_from_its_base_at_its_rate_and_differs_from_grpo_by_its_flags_alone():
    for trial in TRIALS:
        cfg, flags = config(trial), {k: v[trial.task] if isinstance(v, dict) else v
                                     for k, v in trial.row.flags.items() if k != "adversary"}
        check(cfg)
        fresh = trial.row in rows.PARTS[rows.WAY]
        assert cfg.train_data == trial.task + ":train:561" * fresh
        assert cfg.eval_data == trial.task + ":heldout:601" * fresh
        share = [trial.row.disguised] if trial.row.name.partition("-disguised-")[2] else []
        assert cfg.model.split(":") == [trial.task, str(trial.base), *share]
        assert cfg.seed == trial.base + 100 * trial.seed and cfg.learning_rate == trial.rate
        assert cfg.out_dir.endswith(trial.name)
        assert cfg.eval_problems == tasks.SIZES["heldout"] == 600 and cfg.eval_rollouts == 16
        usual = {"mode": "grpo", **{k: v for k, v in trial.row.flags.items() if k == "adversary"}}
        grpo = config(dataclasses.replace(trial, row=dataclasses.replace(trial.row, name="grpo", flags=usual)))
        assert cfg == dataclasses.replace(grpo, out_dir=cfg.out_dir, **flags)
        if "prompts_per_step" not in flags:  # rows of a shape say the usual one, too
            assert all(getattr(cfg, k) != getattr(grpo, k) for k in set(flags) - {"mode", "rule"})


def test_rows_of_a_task_train_on_equally_many_rollouts_as_the_preset_has():
    for trial in TRIALS:
        cfg, row = config(trial), trial.row.name
        whole_way = trial.row in (*rows.PARTS[rows.SHAPE], *rows.PARTS[rows.WAY])
        on_the_way = {"grpo-way": "16x16", "maxrl-way": "16x16", "moved-way": "32x8", "weights-way": "32x8"}
        shape = rows.SHAPES.get(on_the_way.get(row, row.rpartition("-")[2]))
        usual = 0 if row == "base" else PRESETS[trial.task][1]["steps"]
        assert cfg.steps == (rows.LENGTH[trial.task] if whole_way else usual)
        assert (cfg.prompts_per_step, cfg.rollouts_per_prompt) == (shape or (64, 4))
        assert cfg.prompts_per_step * cfg.rollouts_per_prompt == 256
        assert cfg.prompts_per_step == cfg.minibatch_prompts * (1 if row.endswith("-one") else 4)
        assert cfg.rollout_budget != "dual"  # the only budget that holds on average alone


def test_trials_are_named_row_rate_base_and_have_the_bases_of_the_row_that_they_are_held_against():
    assert len({t.name for t in TRIALS}) == len(TRIALS) and all(float(rows.written(t.rate)) == t.rate for t in TRIALS)
    names = {row.name: row for part in rows.PARTS.values() for row in part}
    assert all(set(row.bases) <= set(names[row.against].bases) for row in names.values())
    assert [t.name for t in trials("permutations/maxrl-2e-4")] == [f"permutations/maxrl-2e-4-{b}" for b in range(8)]


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """A place of its own for what the command reads and writes."""
    for module, name in ((command, "OUT"), (logs, "RESULTS")):
        monkeypatch.setattr(module, name, tmp_path / name)
    return tmp_path


def one_step(path: Path, base: int, rate: str = "2e-4") -> Path:
    """A run folder as train.py leaves it, of one step."""
    folder = path / f"some-row-{rate}-{base}"
    folder.mkdir(exist_ok=True)
    line = {"step": 3, "x": [0.123456, None, 2, 1e-9], "y": {"z": -12345.678, "name": "0.123456"},
            "seconds": {"update": 1.23456, "total": 2.34567}}
    (folder / "config.json").write_text(json.dumps({"preset": "a-task", "seed": base}))
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "eval.json").write_text(json.dumps([{"step": 1, "mean": 0.123456789}]))
    return folder


def test_what_is_kept_says_what_was_logged_to_three_digits(folders):
    command.keep(one_step(folders, 4), 12.34)
    (line,) = logs.kept_lines(logs.row_file("a-task", "some-row")).values()
    assert json.loads(line) == {
        "name": "some-row-2e-4-4", "config": {"preset": "a-task", "seed": 4, "seconds": 12.3},
        "log": [{"step": 3, "x": [0.123, None, 2, 1e-9], "y": {"z": -12300.0, "name": "0.123456"},
                 "seconds": {"total": 2.35}}],
        "evaluations": [{"step": 1, "mean": 0.123456789}]}  # whole


def test_runs_kept_at_once_are_all_there_by_base_and_the_same_runs_give_the_same_bytes(folders, monkeypatch):
    runs, files = [one_step(folders, base, rate) for base in range(6) for rate in ("1e-4", "2e-4")], []
    for order in (runs, runs[::-1]):
        monkeypatch.setattr(logs, "RESULTS", folders / f"results-{len(files)}")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(command.keep, order, [1.0] * len(order)))
        command.keep(order[5], 1.0)  # again: replaced, not doubled
        files.append(logs.row_file("a-task", "some-row"))
    assert list(logs.kept_lines(files[0])) == [folder.name for folder in runs]
    assert files[0].read_bytes() == files[1].read_bytes() and len(list(files[0].parent.iterdir())) == 1
    chosen = ((2e-4, 5), (2e-4, 6), (4e-4, 5))
    assert [bool(command.recorded(Trial("a-task", Row("some-row"), rate, base))) for rate, base in chosen] == [
        True, False, False]


def test_a_run_that_fails_is_reported_and_is_kept_once_it_is_complete(base, folders, capsys):
    sums = base.parent / "sums.jsonl"
    small = dict(model=base, train_data=sums, eval_data=sums, allow_overlap=1, eval_problems=4, eval_rollouts=2,
                 steps=2, prompts_per_step=8, minibatch_prompts=8, max_response_tokens=8)
    diverging, lower = (Trial("arithmetic", Row("some-row", {**small, **more}, decoded=True), 1e-4, 0)
                        for more in ({"learning_rate": 1e39}, {}))  # beyond float32
    assert command.work([diverging], 1) == 1 and not command.recorded(diverging)
    assert "arithmetic/some-row-1e-4-0: train.py ended with 1: train.py: step 1: " in capsys.readouterr().out
    assert "--resume" in lower.command(command.OUT / lower.name)  # for the folder is there
    assert command.work([lower], 1) == 0 and command.recorded(lower) and not (command.OUT / lower.name).exists()
    assert not capsys.readouterr().out
    decoded = logs.Run(**json.loads(command.recorded(lower))).decoded
    assert (decoded["problems"], decoded["responses"]) == (4, 2) and 0 <= decoded["pass@2"][0] <= 1


def test_the_list_says_of_each_run_how_it_ended_and_how_train_would_be_called(monkeypatch, capsys):
    line = command.kept_lines(logs.row_file("arithmetic", "grpo"))["grpo-1e-4-0"]
    monkeypatch.setattr(command, "kept_lines", lambda file: {"grpo-1e-4-0": line} if "/grpo." in str(file) else {})
    monkeypatch.setattr(sys, "argv", ["study", "--list", "--only", "arithmetic/grpo"])
    command.main()
    done, flags, missing, *_ = capsys.readouterr().out.splitlines()
    ended = Evaluation(**json.loads(line)["evaluations"][-1]).line()
    assert (done, missing) == (f"arithmetic/grpo-1e-4-0: {ended}", "arithmetic/grpo-1e-4-1: missing")
    cfg, _ = parse_args(flags.split()[2:])
    assert cfg == dataclasses.replace(config(trials("arithmetic/grpo-1e-4-0")[0]), out_dir="out/arithmetic-0-grpo-0")
    monkeypatch.setattr(sys, "argv", ["study", "--only", "no-such"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--only no-such: no run has that in its name" in capsys.readouterr().err
