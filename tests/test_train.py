"""The loop as a whole: one path for all modes, no result depends on how the work is split, nothing is lost."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import gloo, two_ranks

import tasks
import train as train_module
from config import ADVERSARIES, PRESETS, Config, parse_args
from gdro import RULES
from kernels import group_advantage
from model import Transformer
from ranks import Ranks, RunError, deal_rows
from rollout import Batch
from runfolder import FolderLock, RunFolder, Tracker, environment, scalars, write_json
from train import Step, Stop, Trainer, nothing_to_learn, pack, set_up

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def signals_as_before():
    """A run in this process takes Ctrl-C and SIGTERM over."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flags(base: Path, out: Path, **changes) -> list[str]:
    sums = base.parent / "sums.jsonl"
    values = {"model": base, "out_dir": out, "engine": "torch", "steps": 4, "prompts_per_step": 24,
              "minibatch_prompts": 12, "eval_problems": 6, "eval_rollouts": 2, "train_problems": 72, "save_every": 2,
              "train_data": sums, "eval_data": sums, "allow_overlap": 1, "max_response_tokens": 8,
              "learning_rate": 1e-3, **changes}
    return ["--preset", "arithmetic", *(str(x) for k, v in values.items() for x in (f"--{k}", v))]


def launch(base: Path, out: Path, *extra: str, processes: int = 1, **changes) -> subprocess.Popen:
    """train.py as a user starts it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "train.py", *flags(base, out, **changes), *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def logged(process: subprocess.Popen, out: Path, steps: int) -> str:
    """metrics.jsonl of a running process as soon as it tells of so many steps."""
    metrics, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return metrics.read_text()


def finish(process: subprocess.Popen, status: int = 0) -> str:
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


def command_line(*argv: str) -> int | str:
    """train.py in this process: its exit status, or the words with which it gives up."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["train.py", *argv])
        train_module.main()
    code = end.value.code
    del end  # which holds the run, and the run its folder's lock
    return code


def main(base: Path, out: Path, *extra: str, **changes) -> int | str:
    return command_line(*flags(base, out, **changes), *extra)


def log(out: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def trainer_of(base: Path, tmp_path: Path, **changes) -> Trainer:
    cfg, _ = parse_args(flags(base, tmp_path / "run", **changes))
    trainer = Trainer(cfg, Ranks())
    trainer.engine.load_weights(trainer.weights())
    return trainer


def run_steps(trainer: Trainer, steps: int) -> list[dict]:
    return [{k: v for k, v in trainer.step(i)[0].items() if k not in ("seconds", "mode")} for i in range(steps)]


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for _, w in trainer.weights()])


def watch(trainer: Trainer, method: str) -> list[Step]:
    """The Steps that go through a method of this trainer from now on, as it leaves them."""
    seen, call = [], getattr(trainer, method)
    setattr(trainer, method, lambda s: (call(s), seen.append(Step(**vars(s)))))
    return seen


@pytest.fixture(scope="module")
def two_steps(base, tmp_path_factory) -> Path:
    """The folder of a run of two steps at another temperature than the preset's; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert main(base, out, steps=2, temperature=0.9) == 0
    return out


@pytest.fixture
def finished(two_steps, tmp_path) -> Path:
    return shutil.copytree(two_steps, tmp_path / "run")


# ---- one path

ALIKE = {
    "both adversaries at rest": ({}, dict(mode="both", prompt_eta=0.0, n_min=4, n_max=4), ()),
    "the settings of adversaries that do not act": (  # the bins are others, and nobody asks them
        dict(adversary="paper", averaging=ADVERSARIES["tuned"]["averaging"]),
        dict(adversary="tuned", n_max=9, rollout_eta=2.0), ("bins", "signals")),
    "the clip beside a ratio of 1": (dict(minibatch_prompts=24), dict(minibatch_prompts=24, eps_low=0.1), ()),
}


@pytest.mark.parametrize("case", ALIKE)
def test_plain_grpo_trains_alike_bit_for_bit_whatever_has_no_effect_beside_it(base, tmp_path, case):
    """So four modes are one path, and what config.idle_settings names changes nothing."""
    *changes, apart = ALIKE[case]
    one, other = (trainer_of(base, tmp_path, **c) for c in changes)
    for a, b in zip(run_steps(one, 2), run_steps(other, 2), strict=True):
        assert {**a, **dict.fromkeys(apart)} == {**b, **dict.fromkeys(apart)}
    assert torch.equal(weights(one), weights(other))
    assert not torch.equal(weights(one), weights(trainer_of(base, tmp_path)))  # and they did move


def test_all_modes_begin_with_the_same_batch_write_the_same_keys_and_spend_the_same_rollouts(base, tmp_path):
    steps = {mode: trainer_of(base, tmp_path, mode=mode).step(0) for mode in ("grpo", "prompt", "rollout", "both")}
    assert len({json.dumps([sorted(x), sorted(x["bins"]), sorted(x["seconds"])]) for x, _ in steps.values()}) == 1
    apart = dict.fromkeys(("mode", "seconds", "shadow_price_dp"))
    for line, samples in steps.values():  # before anything is known, all are GRPO
        assert ({**line, **apart}, samples) == ({**steps["grpo"][0], **apart}, steps["grpo"][1])
    assert line["rollouts"] == 96 and all(len(v) == 10 for v in line["bins"].values())
    absent = [b for b, share in enumerate(line["bins"]["share"]) if share == 0]
    assert absent and all(line["bins"][k][b] is None for k in ("reward", "rollouts", "tokens") for b in absent)
    assert all(isinstance(x, float) for k in ("score", "weight") for x in line["bins"][k])


def test_prompt_weights_scale_the_gradient_of_their_bin_and_leave_the_adversarys_signal_alone(base, tmp_path):
    """(16): doubling the weight of the only bin doubles the gradient. On one mini-batch the ratio is 1, and centred
    advantages sum to 0 over a prompt's rollouts: the paper's signal (7) sees nothing."""
    norms = []
    for factor in (1.0, 2.0):
        trainer = trainer_of(base, tmp_path, mode="prompt", mean_one="false", prompt_eta=1.0, prompt_signal="surrogate",
                             minibatch_prompts=24)
        trainer.prompt_gdro._score_B[:] = np.log(factor)
        steps = watch(trainer, "learn")
        line, _ = trainer.step(0)
        norms.append(line["grad_norm"])
        assert line["bins"]["weight"] == pytest.approx([factor] * 10) and np.abs(steps[0].loss_P).max() < 1e-5
        assert steps[0].surrogate_R == pytest.approx(steps[0].advantage_R, abs=1e-5)
        assert trainer.prompt_gdro.score_B[5] == pytest.approx((1 - 0.12) * np.log(factor), abs=1e-6)
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4) and norms[0] > 0


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_multiplies_clipped_advantages_and_the_adversary_sees_it(base, tmp_path, rule):
    rng, trainer, P = np.random.default_rng(0), trainer_of(base, tmp_path, rule=rule, kl_beta=0.5), 24
    ids = [p.id for p in trainer.problems[:P]]
    trainer.bins.update(ids[1:4], [4, 1, 0], [4] * 3)
    s = Step(number=0, ids_P=ids, grad_norm=1.0)
    trainer.decide(s)
    assert s.estimate_P[:5].tolist() == [0.5, 1, 0.25, 0, 0.5]  # unseen ones are 0.5
    s.n_P = rng.integers(2, 13, P)
    s.n_P[:3] = 4, 4, 40
    owner, offsets = np.repeat(np.arange(P), s.n_P), np.concatenate(([0], s.n_P.cumsum()))
    s.reward_R = np.where(rng.random(len(owner)) < rng.random(P)[owner], 1.0, -1.0)
    s.reward_R[:48] = [1] * 4 + [-1] * 43 + [1]  # two prompts that teach nothing, one so rare that it is clipped
    s.correct_P = np.bincount(owner, s.reward_R > 0).astype(int)
    trainer.advantages(s)
    plain, constant = (x.numpy() for x in group_advantage(*map(torch.from_numpy, (s.reward_R, offsets)), clip=5.0))
    factor_P = RULES[rule](s.correct_P, s.n_P, s.estimate_P)
    assert s.advantage_R == pytest.approx(plain * factor_P[owner], rel=1e-12, abs=0) and plain.max() == 5
    assert s.constant_P.tolist() == constant.tolist() and s.constant_P[:2].all()

    ratio_R, s.kl_R = rng.uniform(0.5, 1.5, len(owner)), rng.random(len(owner))  # so that the surrogate is not 0
    s.surrogate_R, s.batch = ratio_R * s.advantage_R, Batch([[1]] * P, owner, *[None] * 4)
    trainer.rollout_gdro.update = lambda *report: None  # which would refuse counts that are no arms
    trainer.learn(s)
    expected = [(0.5 * s.kl_R - factor_P[p] * ratio_R * plain)[owner == p].mean() for p in range(P)]
    assert s.loss_P == pytest.approx(expected, rel=1e-9, abs=1e-12)


# ---- no split changes the objective

def gradient(trainer: Trainer) -> torch.Tensor:
    """Gradient of the first mini-batch of step 0, before the optimiser uses it."""
    captured, step = [], trainer.optimizer_step

    def record(number: int) -> float:
        captured.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        return step(number)

    trainer.optimizer_step = record
    trainer.step(0)
    return captured[0]


@pytest.mark.parametrize("averaging", ["prompt", "rollout"])
def test_any_micro_batch_split_gives_the_same_gradient(base, tmp_path, averaging):
    whole, split, single = (gradient(trainer_of(base, tmp_path, averaging=averaging, microbatch_tokens=n, kl_beta=0.1,
                                                prompts_per_step=12, mode="rollout", rollout_utility="variance"))
                            for n in (100_000, 150, 1))
    assert whole.abs().max() > 0
    assert torch.allclose(whole, split, atol=1e-6) and torch.allclose(whole, single, atol=1e-6)


def test_what_cannot_move_the_weights_is_left_out_and_entropy_and_mismatch_are_of_a_fixed_sample(
        base, tmp_path, monkeypatch):
    packed, gradients, lines, acting = [], [], [], []

    def record(batch, rollouts, *rest):
        packed[-1] += len(rollouts)
        return pack(batch, rollouts, *rest)

    monkeypatch.setattr(train_module, "pack", record)
    for kl_beta in (0.0, 1e-30):  # the second is too small to be felt, yet keeps every rollout
        packed.append(0)
        trainer = trainer_of(base, tmp_path, kl_beta=kl_beta)
        steps = watch(trainer, "behaviour")
        gradients.append(gradient(trainer))
        lines.append(trainer.step(1)[0])
        first, s = steps
        acting.append(first.acts_R.sum())
        everywhere = Step(**{**vars(first), "acts_R": np.ones(96, bool)})
        trainer_of(base, tmp_path).behaviour(everywhere)  # with the weights of step 0
        measured_R = np.isin(np.arange(96), range(0, 96, 8))  # the first of 4 of every second of 24 prompts
        known_N = np.repeat(first.acts_R | measured_R, first.batch.lengths)
        assert np.allclose(first.old_N[known_N], everywhere.old_N[known_N], atol=1e-5)
        assert not first.old_N[~known_N].any()
        measured_N = np.repeat(measured_R, s.batch.lengths)
        assert lines[-1]["measured"] == {"rollouts": 12, "tokens": measured_N.sum()} and lines[-1]["entropy"] > 0
        mismatch_N = np.abs(s.batch.sampler_logp - s.old_N)[measured_N]
        assert lines[-1]["mismatch"] == pytest.approx({"mean": mismatch_N.mean(), "max": mismatch_N.max()})
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0
    assert 0 < acting[0] < acting[1] == 96 and packed[0] < packed[1]
    assert 0 < lines[0]["zero_std_frac"] < 1 and 0 < lines[0]["idle_frac"] < 1
    for key in ("loss", "clip_frac", "grad_norm"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-3, abs=1e-6)


def test_a_rank_without_work_packs_two_tokens_that_nothing_is_asked_of():
    """One alone would have torch.compile make graphs for it."""
    nothing = pack(None, np.zeros(0, int), torch.device("cpu"))
    assert len(nothing.tokens) == 2 and len(nothing.targets) == len(nothing.places) == 0


@pytest.mark.parametrize("ranks, pieces, most", [(1, 60, 100), (3, 60, 100), (4, 200, 64), (4, 3, 100), (2, 0, 50)])
def test_all_ranks_get_as_many_rows_of_about_the_same_cost(ranks, pieces, most):
    cost = np.random.default_rng(pieces).integers(1, 60, pieces)
    cost[:1] += 70  # more than a row may hold
    rows = deal_rows(cost, most, ranks)
    assert len(rows) == ranks and len({len(mine) for mine in rows}) == 1 and rows[0]
    assert sorted(i for mine in rows for row in mine for i in row) == list(range(pieces))
    for place in zip(*rows, strict=True):
        assert all(len(row) <= 1 or cost[row].sum() <= most for row in place)
    if pieces >= 60:
        loads = [sum(cost[row].sum() for row in mine) for mine in rows]
        assert max(loads) < 1.05 * min(loads)
        assert len(rows[0]) <= 1 + np.ceil(1.1 * cost.sum() / (most * ranks))


@two_ranks
def test_two_processes_equal_one(base, tmp_path):
    options = dict(mode="both", kl_beta=0.01, rollout_utility="variance", steps=4)
    assert main(base, tmp_path / "one", **options) == 0
    output = finish(launch(base, tmp_path / "two", processes=2, **options))
    assert "pass@2" in output
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two) == 4 and all(line["grad_norm"] > 0 for line in one)
    for a, b in zip(one, two, strict=True):
        a.pop("idle_frac"), b.pop("idle_frac")  # with KL: where log-prob and reference agree to the last bit
        close(a, b)


def close(a, b) -> None:
    """Equal up to float summation."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            close(a[k], b[k])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    else:
        assert a == b


def test_one_problem_and_three_ranks_give_what_one_rank_gives(base, tmp_path):
    """Two ranks have nothing to draw, to grade and to exchange in an evaluation."""
    few = dict(eval_problems=1, prompts_per_step=3, minibatch_prompts=3, steps=1)
    assert gloo(3, command_line, *flags(base, tmp_path / "three", **few), limit=120) == [0, 0, 0]
    assert main(base, tmp_path / "one", **few) == 0
    for a, b in zip(log(tmp_path / "three"), log(tmp_path / "one"), strict=True):
        close(a, b)


@two_ranks
def test_two_ranks_train_on_vllm_and_agree_with_its_log_probs(base, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is an optional second step of the CPU installation")
    output = finish(launch(base, tmp_path / "run", processes=2, engine="vllm", mode="both", steps=3))
    assert "engine: vllm" in output and "Traceback" not in output  # the engine and its groups end in order
    lines = log(tmp_path / "run")
    assert len(lines) == 3 and all(line["mismatch"]["max"] < 1e-3 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines[:2])  # so that stale weights would show


@pytest.mark.parametrize("prompts", [1, 3])
def test_a_batch_of_very_few_prompts_trains(base, tmp_path, prompts):
    line, samples = trainer_of(base, tmp_path, prompts_per_step=prompts, minibatch_prompts=1).step(0)
    assert len(samples) == prompts and line["rollouts"] == 4 * prompts


def test_counts_as_weights_are_logged_as_they_act(base, tmp_path):
    trainer = trainer_of(base, tmp_path, mode="rollout", allocation="weights", rollout_utility="variance",
                         rollout_budget="spread")
    trainer.bins.update([p.id for p in trainer.problems[:40]], np.zeros(40, int), np.full(40, 4))
    for b, arm in ((0, 2), (5, 10)):  # bin 0 wants few rollouts, the bin of the unseen many
        trainer.rollout_gdro._score_BK[b] = -np.abs(trainer.rollout_gdro.arms_K - arm)
    line, samples = trainer.step(0)
    bins = {k: np.array(v, float) for k, v in line["bins"].items()}
    here = bins["share"] > 0
    assert (bins["rollouts"][here] == 4).all() and line["rollouts"] == 96
    assert (bins["weight"][here] == bins["allocated"][here] / 4).all() and len(set(bins["allocated"][here])) > 1
    assert bins["share"] @ np.where(here, bins["allocated"], 0) == pytest.approx(4)
    assert (bins["weight"][~here] == 1).all() and np.isnan(bins["allocated"][~here]).all()
    assert all(s["n"] == 4 and 4 * s["weight"] in range(2, 13) for s in samples)


# ---- nothing is lost

@pytest.fixture
def one_thread():
    """As in what is launched, so that sums come out bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_and_resumed_run_writes_what_the_unbroken_run_wrote(base, tmp_path, one_thread, capsys):
    options = dict(mode="both", steps=7, save_every=3, rollout_budget="dual", kl_beta=0.01, eval_every=2)
    assert main(base, tmp_path / "unbroken", **options) == 0
    process = launch(base, tmp_path / "killed", **options)
    logged(process, tmp_path / "killed", 4)  # past the checkpoint of step 3
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "cut sho')  # as a kill in mid-write leaves it
    capsys.readouterr()
    assert main(base, tmp_path / "killed", "--resume", **options) == 0
    assert re.search("resuming from step_[36]", capsys.readouterr().out)
    assert log(tmp_path / "killed") == log(tmp_path / "unbroken")
    assert all(line["grad_norm"] > 0 for line in log(tmp_path / "unbroken"))
    for name in ("samples.jsonl", "eval.json", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "killed" / "checkpoint").iterdir()) == ["step_6", "step_7"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_finishes_the_step_and_saves(base, tmp_path, number):
    process = launch(base, tmp_path / "run", steps=500, save_every=0)
    logged(process, tmp_path / "run", 1)
    process.send_signal(number)
    output = finish(process, 130)
    done = len(log(tmp_path / "run"))
    assert f"stopped after {done} steps" in output and "--resume" in output
    assert (tmp_path / "run" / "checkpoint" / f"step_{done}" / "state.json").exists()
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_second_ctrl_c_ends_the_process_with_one_line_of_what_is_kept(base, finished, capfd):
    cfg, _ = parse_args(flags(base, finished))
    if not (pid := os.fork()):
        stop = Stop(Ranks())
        stop.listen(RunFolder(cfg))
        signal.raise_signal(signal.SIGINT)
        print("asked:", stop())
        signal.raise_signal(signal.SIGINT)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert capfd.readouterr().out == (
        "stopping after this step (again to stop at once)\nasked: True\nstopped at once, step_2 is kept; go on with: "
        f"python train.py --out_dir {finished} --resume\n")


def test_ctrl_c_ends_an_evaluation_and_a_resumed_run_draws_it_again(base, tmp_path, capsys):
    out = tmp_path / "run"
    cfg, command = parse_args(flags(base, out, steps=4, eval_every=2, save_every=0))

    def go(resume: bool, method: str, when) -> tuple[bool, list[int]]:
        """Whether a run came to its end, and its evaluations; Ctrl-C comes when `method` has done what `when` is true
        of."""
        trainer, folder, evaluations = set_up(cfg, command.preset, resume)
        call = getattr(trainer, method)
        setattr(trainer, method, lambda i: (call(i), when(i, trainer) and signal.raise_signal(signal.SIGINT))[0])
        with folder.lock, trainer.grader:
            return train_module.train(trainer, folder, evaluations), [e.step for e in evaluations]

    assert go(False, "draw", lambda s, trainer: s.number == -1) == (False, [])
    assert go(True, "evaluate", lambda step, trainer: step == 0) == (False, [0])  # it is over, and stays
    assert not (out / "metrics.jsonl").read_text()
    assert go(True, "step", lambda step, trainer: step == 1) == (False, [0])  # after the step, without its evaluation
    assert "has no checkpoint yet" in capsys.readouterr().out
    assert go(True, "grade", lambda s, trainer: s.number == -1 and trainer.next_step == 4) == (False, [0, 2])
    assert "stopping the evaluation" in capsys.readouterr().out
    assert go(True, "draw", lambda s, trainer: False) == (True, [0, 2, 4])
    assert [line["eval"] for line in log(out)] == [None] * 4


def evaluated(base: Path, out: Path, asked: int) -> list[bool]:
    """Whether an evaluation comes to its end, then another; Ctrl-C comes to rank `asked` as it draws the first."""
    trainer = trainer_of(base, out)
    trainer.stop.listen(RunFolder(trainer.cfg))
    draw = trainer.draw
    trainer.draw = lambda s: (draw(s), trainer.ranks.rank == asked and signal.raise_signal(signal.SIGINT))
    with trainer.grader:
        return [trainer.evaluate(0) is not None for _ in range(2 - (asked >= 0))]


def test_when_one_rank_is_asked_to_stop_no_rank_ends_the_evaluation(base, tmp_path):
    assert gloo(2, evaluated, base, tmp_path, 1) == [[False], [False]]


def test_the_first_responses_are_shown_with_the_hours_to_come_and_change_nothing(base, tmp_path, capsys, monkeypatch):
    assert main(base, tmp_path / "with", steps=1, engine="torch") == 0
    said = capsys.readouterr().out
    shown = r"prompt: \.\.\. '.*s.='\nresponse: '.*'\nfound .*, the answer is '\d+': reward [+-]1; \d tokens"
    assert len(re.findall(shown, said)) == 2
    assert re.search(r"an evaluation draws for \d:\d\d:\d\d, the run for .* if all reached 8", said)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "preview", lambda trainer: None)
        assert main(base, tmp_path / "without", steps=1) == 0
    assert log(tmp_path / "with") == log(tmp_path / "without")
    for name in ("eval.json", "samples.jsonl", "model/model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is in a new process
    monkeypatch.setattr(Trainer, "preview", lambda trainer: signal.raise_signal(signal.SIGINT))
    assert main(base, tmp_path / "other") == 130 and "no run has begun" in capsys.readouterr().out
    assert not (tmp_path / "other" / "config.json").exists()  # the same folder serves for the next attempt


def test_a_tracker_gets_every_number_and_one_that_fails_is_named_once_and_left_out(finished, tmp_path, capsys):
    line = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])
    numbers = dict(scalars(line))
    assert numbers["reward_mean"] == line["reward_mean"] and numbers["seconds/total"] == line["seconds"]["total"]
    seen = {f"bins/share/{b}": q for b, q in enumerate(line["bins"]["share"])}
    assert seen.items() <= numbers.items() and "bins/reward/0" not in numbers  # null: no prompt stands there yet
    tracker, calls, written = Tracker("tensorboard", tmp_path), [], []
    tracker.write = lambda values, step: written.append((step, values))
    evaluation, said = json.loads((finished / "eval.json").read_text())[0], {"prompt": "1s1=\n", "reward": -1.0}
    tracker.log({"step": 0, "eval": evaluation})  # the base's
    tracker.log({**line, "eval": {**evaluation, "step": 1}}, [{**said, "response": str(i)} for i in range(4)])
    assert [step for step, _ in written] == [0, 0, 0, 1]
    assert written[1][1]["eval/mean"] == evaluation["mean"] == written[3][1]["eval/mean"]
    assert written[2][1] == numbers | {f"samples/{i}": f"reward -1, prompt:\n\n    1s1=\n    \n\nresponse:\n\n    {i}"
                                       for i in range(2)}
    tracker.log({**line, "step": 1}, [{**said, "response": "2"}])
    assert not [key for key in written[-1][1] if key.startswith("samples")]

    def unreachable(values: dict, step: int):
        calls.append(step)
        raise ConnectionError("no route")

    tracker.write = unreachable
    tracker.log(line)
    tracker.log(line)
    assert calls == [0] and capsys.readouterr().out.count("failed (no route)") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "_open", lambda tracker, step: unreachable({}, step))
        Tracker("wandb", tmp_path).log(line)  # that it cannot be opened does not end the run either
    assert "wandb failed (no route)" in capsys.readouterr().out


def test_tensorboard_has_every_step_once_though_a_resumed_run_does_some_again(base, tmp_path):
    pytest.importorskip("tensorboard", reason="a tracker is the user's choice")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, options = tmp_path / "run", dict(tracker="tensorboard", eval_every=2, save_every=2)
    assert main(base, out, steps=4, **options) == 0
    shutil.rmtree(out / "checkpoint" / "step_4")  # as a kill after step 3 leaves it
    assert main(base, out, "--resume", steps=5, **options) == 0
    seen = EventAccumulator(str(out / "tensorboard")).Reload()
    steps = {key: [event.step for event in seen.Scalars(key)] for key in ("reward_mean", "eval/mean")}
    assert steps == {"reward_mean": [0, 1, 2, 3, 4], "eval/mean": [0, 2, 4, 5]}
    assert [event.step for event in seen.Tensors("samples/0/text_summary")] == [0]


def test_a_finished_run_tells_its_settings_and_results_and_its_model_loads_elsewhere(base, tmp_path, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(finished / "model", dtype=torch.float32)
    ours = Transformer.from_pretrained(finished / "model", dtype=torch.float32)
    assert all(torch.equal(p, dict(theirs.named_parameters())[n]) for n, p in ours.named_parameters())
    assert AutoTokenizer.from_pretrained(finished / "model").decode([4, 17, 4]) == "1s1"
    config, paths = (json.loads((finished / name).read_text()) for name in ("config.json", "paths.json"))
    assert str(base.parent) not in json.dumps(config) and config["train_data"] == "sums.jsonl"
    assert paths["train_data"] == str(base.parent / "sums.jsonl")
    assert config.keys() >= {f.name for f in dataclasses.fields(Config)} - {"out_dir"}
    cfg, _ = parse_args(flags(base, tmp_path / "run", prompt_suffix="/no_think"))
    assert RunFolder(cfg).config["prompt_suffix"] == "/no_think"  # which is no path
    samples = [json.loads(x) for x in (finished / "samples.jsonl").read_text().splitlines()]
    assert {"step", "id", "kind", "prompt", "response", "answer", "reward"} <= set(samples[0])


def test_resume_alone_goes_on_with_the_settings_of_the_run_and_says_what_changed(base, tmp_path, finished, capsys):
    def resume(*more: str):
        capsys.readouterr()
        return command_line("--out_dir", str(finished), "--resume", *more), capsys.readouterr().out

    assert "--temperature 0.9" in (message := resume("--temperature", "0.5")[0]) and "may change: steps" in message
    assert "--mean_one True" in resume("--adversary", "paper")[0]  # and all else in which the two differ
    assert "--steps 1: this run has done 2 already" in resume("--steps", "1")[0]
    code, said = resume()
    assert code == 0 and "already at 2 of 2 steps" in said
    code, said = resume("--steps", "3", "--learning_rate", "2e-4")
    assert code == 0 and "--learning_rate is 0.0002 from step 2 on" in said
    assert "| 6 held-out problems x 2, percent | step 0 | step 3 |" in said and "| pass@2 |" in said
    config = json.loads((finished / "config.json").read_text())
    assert config["resumed"][-1] == {"step": 2, "changed": {"steps": 3, "learning_rate": 2e-4}}
    code, said = resume("--steps", "4")
    assert code == 0 and "--learning_rate is 0.0002 from step 2 on" in said
    assert [(line["step"], line["lr"]) for line in log(finished)] == [(0, 1e-3), (1, 1e-3), (2, 2e-4), (3, 2e-4)]
    assert [e["step"] for e in json.loads((finished / "eval.json").read_text())] == [0, 2, 3, 4]
    assert config["temperature"] == 0.9 and config["steps"] == 2
    sums = (base.parent / "sums.jsonl").read_text()
    moved, fewer = tmp_path / "moved.jsonl", tmp_path / "sums.jsonl"
    moved.write_text(sums)
    fewer.write_text("".join(sums.splitlines(keepends=True)[:80]))
    assert resume("--steps", "5", "--train_data", str(moved))[0] == 0  # the same content
    assert "--resume with another train_data" in resume("--steps", "6", "--train_data", str(fewer))[0]


def test_values_come_before_folders_and_a_folder_that_cannot_be_one_before_models(base, tmp_path, finished):
    assert "bin edges must ascend" in main(base, finished, bin_edges="0.5,0.2")
    assert "run holds a run already: add --resume" in main(base, finished)
    assert "Not a directory" in main(base, finished / "config.json" / "run")
    with pytest.raises(ValueError, match="nowhere holds no run to go on with"):
        parse_args(["--out_dir", str(tmp_path / "nowhere"), "--resume"])


def test_a_run_does_not_go_on_beside_another_or_without_its_lock(finished):
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

    resume = ["--out_dir", str(finished), "--resume", "--steps", "3"]
    other = FolderLock(finished, Ranks())
    before = state()
    assert re.search(r"^train.py: .*run is in use: process \d+ on .* start this again$", command_line(*resume))
    assert state() == before
    del other
    cfg, command = parse_args(resume)
    trainer, folder, evaluations = set_up(cfg, command.preset, command.resume)
    folder.lock.path.unlink()
    with trainer.grader, pytest.raises(RunError, match="lock was removed"):
        train_module.train(trainer, folder, evaluations)
    assert len(log(finished)) == 2


def test_a_log_line_that_is_no_json_is_named_with_the_remedy(finished):
    metrics = finished / "metrics.jsonl"
    first, second = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(first + 9 * "\0" + "\n" + second)
    message = command_line("--out_dir", str(finished), "--resume")
    assert re.search(r"metrics.jsonl, line 2 is no JSON object .* Delete the line: sed -i 2d (.*)$", message)
    subprocess.run(message[message.index("sed"):].split(), check=True)
    assert command_line("--out_dir", str(finished), "--resume") == 0


def test_what_a_run_will_hold_is_said_before_its_first_step(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(base, out, steps=3, save_every=1, eval_every=1) == 0
    said = capsys.readouterr().out
    parameters = sum(w.numel() for w in Transformer.from_pretrained(base, dtype=torch.float32).parameters())
    on_disk = {top: sum(p.stat().st_size for p in (out / top).glob("**/*.safetensors"))
               for top in ("checkpoint", "model")}
    assert on_disk["checkpoint"] == pytest.approx(2 * 12 * parameters, rel=0.05)
    assert on_disk["model"] == pytest.approx(4 * parameters, rel=0.05)
    needed = 3 * 12 * parameters + 3 * 4 * parameters  # a third checkpoint in the making; model/, best/, one aside
    assert f"{out} takes up to {needed / 2**30:.1f} GiB" in said and said.index("takes up to") < said.index("step 1:")
    at = RunFolder(Config(out_dir=str(out)))
    assert at.size(2**50, 4).startswith("WARNING: ") and not at.size(1, 4).startswith("WARNING: ")


def test_a_full_disk_says_what_is_kept_and_how_to_go_on(base, finished):
    """/dev/full refuses every byte, as a full disk does."""
    process = launch(base, finished, "--resume", steps=500, save_every=0, temperature=0.9)
    whole = logged(process, finished, 3)
    (finished / "full").symlink_to("/dev/full")
    (finished / "full").replace(finished / "metrics.jsonl")
    output = finish(process, 1)
    assert re.search(r"train.py: no space left in .*; step_2 is kept. Free \d+ MiB, then go on with --resume", output)
    assert "Traceback" not in output
    (finished / "metrics.jsonl").unlink()
    (finished / "metrics.jsonl").write_text(whole)
    assert command_line("--out_dir", str(finished), "--resume", "--steps", "3") == 0
    assert [line["step"] for line in log(finished)] == [0, 1, 2]


def test_the_policy_of_the_best_evaluation_stays_in_best(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(base, out, steps=4, eval_every=1, learning_rate=3e-3) == 0
    said = capsys.readouterr().out
    evaluations = json.loads((out / "eval.json").read_text())
    assert [e["step"] for e in evaluations] == [0, 1, 2, 3, 4]
    best = max(evaluations, key=lambda e: (e["passes"]["pass@2"], -e["step"]))
    assert (out / "model" / "model.safetensors").exists()
    name, kept = (f"step {best['step']}", out / "best") if best["step"] else ("the base", "no best/")
    assert f"\nbest: {name}, pass@2 {best['passes']['pass@2']:.1%}, {kept}\n" in said
    if best["step"]:
        assert json.loads((out / "best" / "evaluation.json").read_text())["step"] == best["step"]
    else:
        assert not (out / "best").exists()
    stored = safetensors.torch.load_file(out / "model" / "model.safetensors")
    assert f"model ({str(next(iter(stored.values())).dtype)[6:]})" in said


def test_a_base_that_nothing_beats_is_said_to_be_the_best(base, tmp_path, capsys):
    assert main(base, tmp_path / "run", steps=1, learning_rate=1e-9) == 0
    assert re.search(r"\nbest: the base, pass@2 \d+.\d%, no best/\n", capsys.readouterr().out)
    assert not (tmp_path / "run" / "best").exists()


def test_what_is_left_of_steps_that_are_done_again_is_forgotten(base, tmp_path):
    """Else a damaged checkpoint would stand where the new one goes, and the remedy for a run that diverged, to go on
    from a checkpoint, would leave the best of the lost branch."""
    cfg, _ = parse_args(flags(base, tmp_path / "run"))
    folder = RunFolder(cfg)
    for step, kept in ((2, True), (3, True), (4, False)):
        for path in (folder.path / "best", folder.path / "checkpoint" / f"step_{step}"):
            path.mkdir(parents=True, exist_ok=True)
        write_json(folder.path / "best" / "evaluation.json", {"step": step})
        folder.forget_after(3)
        assert (folder.path / "best").exists() == (folder.path / "checkpoint" / f"step_{step}").exists() == kept


def test_without_git_the_commit_is_unknown_and_the_run_goes_on(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


# ---- what ends a run

def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(base, tmp_path):
    trainer = trainer_of(base, tmp_path)
    before = weights(trainer)
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    trainer.model.head.grad[0, 3] = torch.nan
    with pytest.raises(RunError, match="step 7: the gradient norm is nan"):
        trainer.optimizer_step(7)
    assert torch.equal(before, weights(trainer))


@pytest.mark.parametrize("where, message", [
    ("sampler", "step 0: sampler and trainer log-probs differ by nan"),
    ("trainer", "step 0: sampler and trainer log-probs differ by nan"),
    ("unmeasured", "step 0: the loss is nan; the weights are those before this update")])
def test_a_log_prob_that_is_no_number_ends_the_run_before_the_weights_are_touched(base, tmp_path, where, message):
    trainer = trainer_of(base, tmp_path, minibatch_prompts=24)
    draw, behaviour = trainer.draw, trainer.behaviour

    def broken_draw(s):
        draw(s)
        s.part.rollouts[0].logprobs[-1] = np.nan

    def broken_behaviour(s):
        behaviour(s)
        s.old_N[s.batch.offsets[np.flatnonzero(s.acts_R & ~s.measured_R)[0]]] = np.nan

    if where == "sampler":
        trainer.draw = broken_draw
    elif where == "trainer":
        trainer.model.model.norm.weight.data[0] = torch.nan
    else:
        trainer.behaviour = broken_behaviour
    before = weights(trainer)
    with pytest.raises(RunError, match=message):
        trainer.step(0)
    assert torch.equal(before.nan_to_num(), weights(trainer).nan_to_num())


def test_stale_sampler_weights_are_caught_on_the_step_where_they_happen(base, tmp_path):
    trainer = trainer_of(base, tmp_path)
    trainer.step(0)
    for p in trainer.engine.model.parameters():
        p.mul_(1.3)
    with pytest.raises(RunError, match="step 1: sampler and trainer log-probs differ"):
        trainer.step(1)


def test_a_run_that_cannot_learn_says_where_to_look(base, tmp_path, capsys):
    hopeless = tmp_path / "hopeless.jsonl"
    hopeless.write_text("".join(json.dumps({"question": f"{a}s1=", "answer": "none"}) + "\n" for a in range(30)))
    assert main(base, tmp_path / "a", steps=4, train_data=hopeless, train_problems=0) == 0
    assert capsys.readouterr().out.count("WARNING: so far all rollouts of a prompt scored alike") == 1
    assert main(base, tmp_path / "b", steps=4, max_response_tokens=1, stop_tokens="Q") == 0
    assert capsys.readouterr().out.count("0% of prompts were solved; 100% of responses were cut") == 1
    assert main(base, tmp_path / "c", steps=12, learning_rate=100, max_mismatch=1e9) == 0
    assert capsys.readouterr().out.count("WARNING: the policy has collapsed") == 1
    assert nothing_to_learn([*[{"zero_std_frac": 1.0}] * 2, {"zero_std_frac": 0.9}]) is None


# ---- what is asked for

@pytest.mark.parametrize("changes, message", [
    (dict(prompts_per_step=0), "--prompts_per_step must be at least 1, got 0"),
    (dict(rollouts_per_prompt=1), "--rollouts_per_prompt 1 teaches nothing"),
    (dict(learning_rate="nan"), "--learning_rate must be above 0, got nan"),
    (dict(minibatch_prompts=25), "--minibatch_prompts 25 is more than --prompts_per_step 24"),
    (dict(train_problems=5), "prompts_per_step=24 must be from 1 to the number of problems, 5"),
    (dict(n_min=5, mode="rollout"), "4 is the mean, so it must lie between --n_min 5 and --n_max 12"),
    (dict(bin_edges="0.5,0.4"), "bin edges must ascend"), (dict(bin_edges="a,b"), "--bin_edges must be numbers"),
    (dict(eps_low=2), "--eps_low must be at most 1"), (dict(eval_temperature=0), "use it with --eval_rollouts 1"),
    (dict(mode="rollout", allocation="weights", rollout_utility="surrogate"), "known for every arm (variance, gain,"),
    (dict(mode="rollout", allocation="weights", rollout_budget="dual"), "--rollout_budget exact or spread"),
    (dict(mode="rollout", allocation="weights", averaging="prompt"), "--averaging rollout: with prompt"),
    (dict(max_response_tokens=1000), "and the model's context is 256"),
    (dict(train_data="nowhere.jsonl"), "nowhere.jsonl"), (dict(train_data="nonsense"), "unknown problem set"),
    (dict(model="no/such/folder"), "no folder"), (dict(model="arithmetic:x"), "--model arithmetic:x: the base models"),
    (dict(max_prompt_tokens=2), "none of 72 prompts fits"),
])
def test_bad_settings_are_refused_with_their_names(base, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        trainer_of(base, tmp_path, **changes)


@pytest.mark.parametrize("argv, said", [
    ("--mode gdro", "invalid choice"), ("--mean_one maybe", "expected true or false"), ("--rule rloo", "invalid"),
    ("--learning_rat 1", "unrecognized arguments: --learning_rat 1; did you mean --learning_rate?"),
    ("--lr=1", "did you mean --learning_rate?"), ("--kl-bet 1", "did you mean --kl_beta?"),
    ("--zzz 1", "--help lists all flags")])
def test_unknown_and_abbreviated_flags_are_refused_with_what_they_may_have_meant(argv, said, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(argv.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_help_and_a_wrong_flag_are_answered_without_torch(program):
    here = Path(train_module.__file__).parent
    for flag, said in (("--help", "--answer_style"), ("--lamp", "unrecognized arguments: --lamp")):
        command = [sys.executable, "-X", "importtime", here / program, "--model", "x", flag]
        done = subprocess.run(command, capture_output=True, text=True, cwd=here)
        assert said in done.stdout + done.stderr and "numpy" in done.stderr
        assert not re.search(r"\| +(torch|transformers|tasks)\b", done.stderr)


def test_the_preset_is_that_of_what_is_named_and_never_another_in_silence(capsys):
    for preset in set(PRESETS) - {"own"}:
        cfg, command = parse_args(["--preset", preset])  # which checks
        assert vars(command) == {"preset": preset, "resume": False, "plan": None}
        assert cfg.out_dir == f"out/{preset}-grpo-0"
    for argv, expected in (("--model arithmetic:3", "arithmetic"), ("--train_data permutations", "permutations"),
                           ("--model m --train_data x.jsonl", "own")):
        cfg, command = parse_args(argv.split())
        assert command.preset == expected and f"preset {expected} (auto: " in capsys.readouterr().out
    assert cfg.out_dir == "out/m-x-grpo-0"
    assert parse_args(["--model", "arithmetic:3"])[0].out_dir == "out/arithmetic-3-grpo-0"
    assert parse_args(["--preset", "arithmetic", "--prompts_per_step", "8"])[0].minibatch_prompts == 8
    with pytest.raises(ValueError, match="--train_data is missing: own models and data"):
        parse_args(["--model", "some/model"])


@pytest.mark.parametrize("argv, idle", [
    ("--n_min 3 --prompt_eta 1 --rule maxrl", ["n_min", "prompt_eta"]), ("--mode prompt --n_max 6", ["n_max"]),
    ("--mode rollout --n_min 3 --mean_one true", ["mean_one"]), ("--mode both --prompt_eta 1 --n_min 3", []),
    ("--mode rollout --rollout_eta 1", ["rollout_eta"]), ("--mode rollout --rollout_eta 0", []),
    ("--mode rollout --rollout_eta 1 --rollout_budget dual", []),
    ("--mode rollout --rollout_eta 1 --rollout_utility surrogate", []),
    ("--minibatch_prompts 64 --eps_low 0.1 --eps_high 0.1", ["eps_low", "eps_high"]), ("--eps_low 0.1", [])])
def test_a_setting_without_effect_beside_the_others_is_named_when_given(argv, idle, capsys):
    parse_args(["--preset", "arithmetic", *argv.split()])
    assert sorted(re.findall(r"WARNING: --(\w+) has no effect", capsys.readouterr().out)) == sorted(idle)


def test_a_mean_at_either_end_of_the_arms_is_said_to_leave_no_choice(capsys):
    parse_args(["--preset", "arithmetic", "--mode", "rollout", "--n_min", "4"])
    assert "leaves Rollout-GDRO no choice" in capsys.readouterr().out


def test_a_reward_of_ones_own_is_trained_on_and_one_that_always_fails_ends_the_run(base, tmp_path):
    (tmp_path / "mine.py").write_text("def endless(response, problem):\n    return 0.5 if response.cut else -1.0\n\n"
                                      "def broken(response, problem):\n    return 1 / 0\n")
    assert main(base, tmp_path / "run", reward=f"{tmp_path}/mine.py:endless", steps=1, max_response_tokens=4) == 0
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {x["truncated"] for x in samples} == {True, False}
    assert all(x["reward"] == (0.5 if x["truncated"] else -1) for x in samples)
    message = main(base, tmp_path / "broken", reward=f"{tmp_path}/mine.py:broken", steps=1)
    assert re.search(r"(\d+) responses 0 timed out in grading, \1 failed.*ZeroDivisionError.*mend .*broken", message)


def test_three_steps_without_verdicts_end_the_run_and_time_outs_are_told_wherever_figures_are(base, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("import time\ndef slow(response, problem): time.sleep(9)\n")
    slow = dict(reward=f"{tmp_path}/mine.py:slow", grader_timeout=0.02, prompts_per_step=6, minibatch_prompts=6)
    assert main(base, tmp_path / "run", **slow, steps=2) == 0
    said, bar = capsys.readouterr()
    assert re.search(r"on 6 held-out problems(, [\d.]+% cut)?\. WARNING: of 12 responses \d+ timed out in", said)
    assert re.search(r"\| grader timeouts \| (\d+.\d) \| \d", said) and "timeouts=" in bar
    message = main(base, tmp_path / "run", "--resume", **slow, steps=9)
    assert re.search(r"step 4: of (\d+) responses \1 timed out.*three steps.*\(0.02 s.*--resume", message)


def test_a_tenth_of_the_training_data_is_held_out_where_no_other_is_named(base, tmp_path):
    trainer = trainer_of(base, tmp_path, eval_data="")
    ids = [p.id for p in tasks.load(str(base.parent / "sums.jsonl"), split="train", limit=72)[0]]
    trained, held_out = ([p.id for p in problems] for problems in (trainer.problems, trainer.eval_set[0]))
    assert len(trained) == 65 and len(held_out) == 6 and trained == [i for i in ids if i in trained]
    assert not set(trained) & set(held_out)
    older = Trainer(trainer.cfg, trainer.ranks, {"eval_data": {"held out of": "train_data", "last": 7}})
    assert [p.id for p in older.problems] == ids[:65] and [p.id for p in older.eval_set[0]] == ids[65:][:6]
    with pytest.raises(ValueError, match=r"6 of 6 problems stand in train_data.*--allow_overlap"):
        trainer_of(base, tmp_path, allow_overlap=0.9)
