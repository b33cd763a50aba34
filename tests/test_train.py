"""The loop as a whole: one path for all modes, no result depends on how the work is split, nothing is lost."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import two_ranks

import tasks
import train as train_module
from config import PRESETS, Config, nearest, parse_args
from kernels import group_advantage
from model import Transformer
from ranks import Ranks, RunError, deal, deal_rows
from rollout import Batch
from runfolder import RunFolder, Tracker, environment, scalars, write_json
from train import (
    Decision,
    StopSignal,
    Trainer,
    Update,
    nothing_to_learn,
    pack,
    set_up,
)

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
              "train_data": sums, "eval_data": sums, "max_response_tokens": 8, "learning_rate": 1e-3, **changes}
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


def main(base: Path, out: Path, *extra: str, **changes) -> int | str:
    """train.py in this process: its exit status, or the words with which it gives up."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["train.py", *flags(base, out, **changes), *extra])
        train_module.main()
    return end.value.code


def log(out: Path) -> list[dict]:
    """metrics.jsonl without what the clock says."""
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def trainer_of(base: Path, tmp_path: Path, **changes) -> Trainer:
    cfg, _, _ = parse_args(flags(base, tmp_path / "run", **changes))
    trainer = Trainer(cfg, Ranks())
    trainer.engine.load_weights(trainer.weights())
    return trainer


def run_steps(trainer: Trainer, steps: int) -> list[dict]:
    return [{k: v for k, v in trainer.step(i)[0].items() if k not in ("seconds", "mode")} for i in range(steps)]


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([w.detach().flatten() for _, w in trainer.weights()])


# ---- one path

def test_grpo_is_both_adversaries_at_rest_bit_for_bit(base, tmp_path):
    """Prompt-GDRO with eta 0 has weights 1, Rollout-GDRO with one arm has n_bar: the same weights come out."""
    grpo = trainer_of(base, tmp_path, mode="grpo")
    rest = trainer_of(base, tmp_path, mode="both", prompt_eta=0.0, n_min=4, n_max=4)
    assert run_steps(grpo, 4) == run_steps(rest, 4)
    assert torch.equal(weights(grpo), weights(rest))
    assert not torch.equal(weights(grpo), weights(trainer_of(base, tmp_path)))  # and they did move


def test_every_mode_draws_the_same_prompts_and_first_batch(base, tmp_path):
    lines = {mode: run_steps(trainer_of(base, tmp_path, mode=mode), 1)[0] for mode in ("grpo", "prompt", "both")}
    assert lines["grpo"] == lines["prompt"]  # before anything is known, both are GRPO
    assert lines["grpo"]["reward_mean"] == lines["both"]["reward_mean"]


def test_all_modes_write_the_same_keys_and_spend_the_same_rollouts(base, tmp_path):
    lines = {mode: trainer_of(base, tmp_path, mode=mode).step(0)[0] for mode in ("grpo", "prompt", "rollout", "both")}
    keys = {json.dumps([sorted(x), sorted(x["bins"]), sorted(x["seconds"])]) for x in lines.values()}
    assert len(keys) == 1
    assert {x["rollouts"] for x in lines.values()} == {96}
    for line in lines.values():
        assert all(len(v) == 10 for v in line["bins"].values())
        absent = [b for b, share in enumerate(line["bins"]["share"]) if share == 0]
        assert absent and all(line["bins"][k][b] is None for k in ("reward", "rollouts", "tokens") for b in absent)
        assert all(isinstance(x, float) for k in ("score", "weight") for x in line["bins"][k])


def test_the_surrogate_signal_is_zero_on_one_minibatch(base, tmp_path):
    """Centred advantages at ratio 1 sum to zero over a prompt's rollouts: the paper's signal (7) sees nothing."""
    trainer = trainer_of(base, tmp_path, minibatch_prompts=24, prompt_signal="surrogate", share_normalize="off")
    line, _ = trainer.step(0)
    assert line["grad_norm"] > 0 and np.abs(line["bins"]["score"]).max() == 0  # logged before the update
    assert np.abs(trainer.prompt_gdro.score_B).max() < 1e-5


def test_prompt_weights_scale_the_gradient_of_their_bin(base, tmp_path):
    """(16): doubling the weight of the only bin doubles the gradient, and leaves the adversary's own signal alone."""
    norms, scores = [], []
    for factor in (1.0, 2.0):
        trainer = trainer_of(base, tmp_path, mode="prompt", mean_one="false", prompt_eta=1.0, prompt_signal="surrogate",
                             minibatch_prompts=24, advantage_clip=100)
        trainer.prompt_gdro._score_B[:] = np.log(factor)
        norms.append(trainer.step(0)[0]["grad_norm"])
        scores.append(trainer.prompt_gdro.score_B[5] - (1 - 0.12) * np.log(factor))
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-4)
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_multiplies_advantages_beside_the_adversary_which_sees_the_rule_and_not_its_own_weight(
        base, tmp_path, rule):
    rng, trainer = np.random.default_rng(0), trainer_of(base, tmp_path, rule=rule)
    ids = [p.id for p in trainer.problems[:4]]
    trainer.bins.update(ids[1:], [4, 1, 0], [4] * 3)
    assert trainer.decide(ids).rate_P.tolist() == [0.5, 1, 0.25, 0]  # the first is unseen
    n_P, P = rng.integers(2, 13, 24), 24
    n_P[:2] = 4
    owner, offsets = np.repeat(np.arange(P), n_P), np.concatenate(([0], n_P.cumsum()))
    reward_R = np.where(rng.random(len(owner)) < rng.random(P)[owner], 1.0, -1.0)
    reward_R[:8] = [1] * 4 + [-1] * 4  # which teach nothing
    rate_P, weight_P, share_R = rng.random(P), rng.uniform(0.2, 5, P), rng.uniform(0.5, 1.5, len(owner))
    plain, constant = (x.numpy() for x in group_advantage(torch.from_numpy(reward_R), torch.from_numpy(offsets)))
    factor_P = RULES[rule](np.array([(g > 0).sum() for g in np.split(reward_R, offsets[1:-1])]), n_P, rate_P)
    batch = Batch([[1]] * P, owner, np.arange(len(owner) + 1), np.zeros(len(owner), int),
                  np.zeros(len(owner), np.float32), np.zeros(len(owner), bool))
    for weights in (weight_P, np.ones(P)):
        decided = Decision(np.zeros(P, int), n_P, n_P, weights, np.ones(10), np.zeros(10), rate_P, 0.0, None)
        advantage_R, constant_P, applied_P = trainer.advantages(reward_R, decided)
        assert (applied_P == factor_P).all()
        assert advantage_R == pytest.approx(plain * (factor_P * weights)[owner], rel=1e-12, abs=0)
        assert (constant_P == constant).all() and constant_P[:2].all()
        # A surrogate that is not 0.
        update = Update(np.zeros(1), share_R * advantage_R, np.zeros(len(owner)), 0.0, 1.0, 0.0, 0.0)
        loss_P = trainer.outcome(decided, batch, reward_R, constant_P, update).loss_P
        expected = [-(share_R * plain)[owner == p].mean() * factor_P[p] for p in range(P)]
        assert loss_P == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert (rule == "grpo") == np.array_equal(advantage_R, plain)


# ---- no split changes the objective

def gradient(trainer: Trainer) -> torch.Tensor:
    """Gradient of the first mini-batch of step 0, before the optimiser uses it."""
    captured, step = [], trainer.optimizer_step

    def record(where: str) -> float:
        captured.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
        return step(where)

    trainer.optimizer_step = record
    trainer.step(0)
    return captured[0]


@pytest.mark.parametrize("averaging", ["prompt", "rollout", "token"])
def test_any_micro_batch_split_gives_the_same_gradient(base, tmp_path, averaging):
    whole, split, single = (gradient(trainer_of(base, tmp_path, averaging=averaging, microbatch_tokens=n, kl_beta=0.1,
                                                prompts_per_step=12, mode="rollout", rollout_utility="variance"))
                            for n in (100_000, 150, 1))
    assert whole.abs().max() > 0
    assert torch.allclose(whole, split, atol=1e-6) and torch.allclose(whole, single, atol=1e-6)


def test_leaving_out_rollouts_of_advantage_0_changes_nothing_but_the_work(base, tmp_path, monkeypatch):
    packed = []

    def record(batch, rollouts, *rest):
        packed.append(len(rollouts))
        return pack(batch, rollouts, *rest)

    monkeypatch.setattr(train_module, "pack", record)
    gradients, lines = [], []
    for kl_beta in (0.0, 1e-30):  # the second is too small to be felt, yet keeps every rollout
        trainer = trainer_of(base, tmp_path, kl_beta=kl_beta)
        gradients.append(gradient(trainer))
        lines.append(trainer.step(1)[0])
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].abs().max() > 0
    half = len(packed) // 2
    assert sum(packed[:half]) < sum(packed[half:])
    assert 0 < lines[0]["zero_std_frac"] < 1 and 0 < lines[0]["idle_frac"] < 1
    for key in ("loss", "clip_frac", "grad_norm"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-3, abs=1e-6)


def test_entropy_and_mismatch_are_of_a_fixed_sample_and_old_log_probs_taken_where_needed(base, tmp_path):
    taken = {}
    for kl_beta in (0.0, 1e-30):
        trainer = trainer_of(base, tmp_path, kl_beta=kl_beta)
        behaviour, seen = trainer.behaviour, []

        def record(batch, acts_R, step, behaviour=behaviour, seen=seen):
            found = behaviour(batch, acts_R, step)
            seen.append((batch, acts_R, found[0], behaviour(batch, np.ones(96, bool), step)[0]))
            return found

        trainer.behaviour = record
        line, _ = trainer.step(0)
        (batch, acts_R, old_N, everywhere_N), = seen
        measured_R = np.isin(np.arange(96), range(0, 96, 8))  # the first of 4 of every second of 24 prompts
        known_N = np.repeat(acts_R | measured_R, batch.lengths)
        assert np.allclose(old_N[known_N], everywhere_N[known_N], atol=1e-5) and not old_N[~known_N].any()
        measured_N, taken[kl_beta] = np.repeat(measured_R, batch.lengths), acts_R.sum()
        assert line["measured"] == {"rollouts": 12, "tokens": measured_N.sum()}
        mismatch_N = np.abs(batch.sampler_logp - old_N)[measured_N]
        assert line["mismatch"] == {"mean": pytest.approx(mismatch_N.mean()), "max": pytest.approx(mismatch_N.max())}
        assert line["entropy"] > 0
    assert 0 < taken[0.0] < taken[1e-30] == 96


def test_token_weights_are_the_three_ways_of_averaging(base, tmp_path):
    trainer = trainer_of(base, tmp_path, mode="rollout")
    n_P = np.array([2, 3, 4, 3])
    offsets = np.concatenate(([0], np.arange(1, 13).cumsum()))
    batch = Batch([[1]] * 4, np.repeat(np.arange(4), n_P), offsets, np.zeros(78, int), np.zeros(78, np.float32),
                  np.zeros(12, bool))
    inside = np.array([0, 2])
    length = batch.lengths
    for averaging, weight_of_prompt in (("prompt", {0: 1 / 2, 2: 1 / 2}), ("rollout", {0: 2 / 6, 2: 4 / 6}),
                                        ("token", {0: 3 / 33, 2: 30 / 33})):
        trainer.cfg = dataclasses.replace(trainer.cfg, averaging=averaging)
        weight_R = trainer.token_weights(batch, n_P, inside) * length
        for p in range(4):
            assert weight_R[batch.owner == p].sum() == pytest.approx(weight_of_prompt.get(p, 0.0))


def test_prompts_that_weigh_1_are_rollouts_weighted_by_q_n_bar_over_n_at_mean_1(base, tmp_path):
    """So no further option is needed for the weights that undo an allocation."""
    trainer = trainer_of(base, tmp_path, mode="both")
    n_P, q_P = np.array([2, 3, 4, 7]), np.array([0.5, 2.0, 0.1, 0.7])
    lengths = np.arange(1, 17)
    batch = Batch([[1]] * 4, np.repeat(np.arange(4), n_P), np.concatenate(([0], lengths.cumsum())),
                  np.zeros(lengths.sum(), int), np.zeros(lengths.sum(), np.float32), np.zeros(16, bool))
    weight = {}
    for averaging in ("prompt", "rollout"):
        trainer.cfg = dataclasses.replace(trainer.cfg, averaging=averaging)
        weight[averaging] = trainer.token_weights(batch, n_P, np.arange(4)) * lengths
    by_rollout_R = (q_P * n_P.mean() / n_P)[batch.owner]
    np.testing.assert_allclose(weight["prompt"] * (q_P / q_P.mean())[batch.owner],
                               weight["rollout"] * by_rollout_R / by_rollout_R.mean())


def test_micro_batches_hold_every_rollout_once_with_its_own_tokens():
    rng = np.random.default_rng(0)
    n_P = np.array([2, 0, 5, 1])
    lengths = rng.integers(1, 30, n_P.sum())
    offsets = np.concatenate(([0], lengths.cumsum()))
    prompts = [list(range(1, 2 + p)) for p in range(4)]
    tokens = rng.integers(0, 50, offsets[-1])
    batch = Batch(prompts, np.repeat(np.arange(4), n_P), offsets, tokens, np.zeros(len(tokens), np.float32),
                  np.zeros(len(lengths), bool))
    seen = []
    (rows,) = deal_rows(batch.cost(), 40, 1)
    for micro in (pack(batch, row, torch.device("cpu")) for row in rows):
        assert len(micro.tokens) <= 40 or len(micro.rollouts) == 1
        assert torch.equal(micro.tokens[micro.targets], torch.from_numpy(tokens[micro.places]))
        for s, r in enumerate(micro.rollouts):
            start, end = micro.cu_seqlens[s], micro.cu_seqlens[s + 1]
            assert micro.tokens[start:end].tolist() == prompts[batch.owner[r]] + batch.response(r).tolist()
            assert micro.offsets[s + 1] - micro.offsets[s] == lengths[r]
        seen.extend(micro.rollouts.tolist())
    assert sorted(seen) == list(range(len(lengths)))


def test_work_is_dealt_out_evenly():
    cost = np.random.default_rng(0).integers(1, 100, 200)
    owner = deal(cost, 3)
    loads = [cost[owner == r].sum() for r in range(3)]
    assert max(loads) - min(loads) <= cost.max() and sum(loads) == cost.sum()


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
        of_one, of_two = a.pop("ranks"), b.pop("ranks")
        for key in ("tokens_generated", "tokens_trained"):
            assert len(of_two[key]) == 2 and sum(of_two[key]) == of_one[key][0] > 0
            assert max(of_two[key]) < 1.6 * min(of_two[key])
        assert of_one["idle_frac"] == [0.0] and min(of_two["idle_frac"]) == 0 <= max(of_two["idle_frac"]) < 1
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


def test_a_second_ctrl_c_stops_at_once(capsys):
    stop = StopSignal()
    signal.raise_signal(signal.SIGINT)
    assert stop.asked and "stopping after this step" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_stop_during_the_first_evaluation_comes_before_the_first_step(base, tmp_path):
    cfg, preset, _ = parse_args(flags(base, tmp_path / "run"))
    trainer, folder, evaluations = set_up(cfg, preset, False)
    evaluate = trainer.evaluate
    trainer.evaluate = lambda step: (signal.raise_signal(signal.SIGINT), evaluate(step))[1]
    with trainer.grader:
        assert not train_module.train(trainer, folder, evaluations)
    assert trainer.next_step == 0 and not (folder.path / "metrics.jsonl").read_text()


def test_a_tracker_gets_every_number_and_one_that_fails_is_named_once_and_left_out(base, tmp_path, capsys):
    line = trainer_of(base, tmp_path).step(0)[0]
    numbers = dict(scalars(line))
    assert numbers["reward_mean"] == line["reward_mean"] and numbers["seconds/total"] == line["seconds"]["total"]
    seen = {f"bins/share/{b}": q for b, q in enumerate(line["bins"]["share"])}
    assert seen.items() <= numbers.items() and "bins/reward/0" not in numbers  # null: no prompt stands there yet
    tracker, calls = Tracker("none", tmp_path), []
    tracker.log(line)

    def unreachable(values: dict, step: int):
        calls.append(step)
        raise ConnectionError("no route")

    tracker.write = unreachable
    tracker.log(line)
    tracker.log(line)
    assert calls == [0] and capsys.readouterr().out.count("failed (no route)") == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "_open", unreachable)
        Tracker("wandb", 1).log(line)  # that it cannot be opened does not end the run either
    assert "wandb failed (no route)" in capsys.readouterr().out


def test_an_evaluation_that_a_stop_did_not_wait_for_is_made_up(base, tmp_path):
    cfg, preset, _ = parse_args(flags(base, tmp_path / "run", steps=4, eval_every=2, save_every=0))
    trainer, folder, evaluations = set_up(cfg, preset, False)
    step = trainer.step

    def interrupted(i: int):
        done = step(i)
        if i == 1:
            signal.raise_signal(signal.SIGINT)
        return done

    trainer.step = interrupted
    with trainer.grader:
        assert not train_module.train(trainer, folder, evaluations)
    assert [e.step for e in evaluations] == [0]
    trainer, folder, evaluations = set_up(cfg, preset, True)
    with trainer.grader:
        assert train_module.train(trainer, folder, evaluations)
    assert [e.step for e in evaluations] == [0, 2, 4]


def test_a_finished_run_can_be_extended_and_its_model_loads_elsewhere(base, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    assert main(base, out, steps=2, mode="prompt") == 0
    output = capsys.readouterr().out
    assert "| 6 held-out problems x 2, percent | step 0 | step 2 |" in output and "| pass@2 |" in output
    assert main(base, out, "--resume", steps=3, mode="prompt", learning_rate=1e-4) == 0
    resumed = json.loads((out / "config.json").read_text())["resumed"]
    assert resumed == [{"step": 2, "changed": {"steps": 3, "learning_rate": 1e-4}}] and log(out)[2]["lr"] == 1e-4
    assert [line["step"] for line in log(out)] == [0, 1, 2]
    assert [e["step"] for e in json.loads((out / "eval.json").read_text())] == [0, 2, 3]
    theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    ours = Transformer.from_pretrained(out / "model", dtype=torch.float32)
    assert all(torch.equal(p, dict(theirs.named_parameters())[n]) for n, p in ours.named_parameters())
    assert AutoTokenizer.from_pretrained(out / "model").decode([4, 17, 4]) == "1s1"
    config = (out / "config.json").read_text()
    assert str(tmp_path) not in config and str(base) not in config and json.loads(config)["steps"] == 2
    assert set(json.loads(config)) >= {f.name for f in dataclasses.fields(Config)} - {"out_dir"}
    samples = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert {"step", "id", "prompt", "response", "answer", "reward"} <= set(samples[0])


# ---- the optimiser

def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(base, tmp_path):
    trainer = trainer_of(base, tmp_path)
    before = weights(trainer)
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    trainer.model.head.grad[0, 3] = torch.nan
    with pytest.raises(RunError, match="step 7: the gradient norm is nan"):
        trainer.optimizer_step("step 7")
    assert torch.equal(before, weights(trainer))


def test_a_diverged_run_stops_with_the_step_and_a_remedy(base, tmp_path):
    output = main(base, tmp_path / "run", steps=5, learning_rate=1e39)
    assert re.match(r"train.py: step [01]: .*--", output)


@pytest.mark.parametrize("whose", ["sampler", "trainer"])
def test_log_probs_that_are_no_numbers_are_not_blamed_on_stale_weights(base, tmp_path, monkeypatch, whose):
    trainer = trainer_of(base, tmp_path)
    if whose == "trainer":
        trainer.model.model.norm.weight.data[0] = torch.nan
    draw = train_module.draw_part

    def broken(*args):
        part = draw(*args)
        part.rollouts[-1].logprobs[-1] = np.nan if whose == "sampler" else part.rollouts[-1].logprobs[-1]
        return part

    monkeypatch.setattr(train_module, "draw_part", broken)
    with pytest.raises(RunError, match=f"log-probs of the {whose} are not finite numbers") as error:
        trainer.step(0)
    assert "stale" not in str(error.value)


def test_a_run_that_cannot_learn_says_where_to_look(base, tmp_path, capsys):
    hopeless = tmp_path / "hopeless.jsonl"
    hopeless.write_text("".join(json.dumps({"question": f"{a}s1=", "answer": "none"}) + "\n" for a in range(30)))
    assert main(base, tmp_path / "a", steps=4, train_data=hopeless, train_problems=0) == 0
    output = capsys.readouterr().out
    assert output.count("WARNING: in the first 3 steps no response was right") == 1 and "--answer_style" in output
    assert main(base, tmp_path / "b", steps=4, max_response_tokens=1, stop_tokens="Q") == 0
    output = capsys.readouterr().out
    assert output.count("WARNING: every response of the first 3 steps was cut at 1 tokens") == 1
    assert nothing_to_learn(log(tmp_path / "b")[:3], Config()) and "--stop_tokens" in output
    lines = [{"truncated_frac": 1.0, "zero_std_frac": 1.0, "solved_frac": 0.0}] * 2
    assert nothing_to_learn([*lines, {**lines[0], "truncated_frac": 0.9, "zero_std_frac": 0.9}], Config()) is None


@pytest.mark.parametrize("prompts", [1, 2, 3])
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


def test_stale_sampler_weights_are_caught_on_the_step_where_they_happen(base, tmp_path):
    trainer = trainer_of(base, tmp_path)
    trainer.step(0)
    for p in trainer.engine.model.parameters():
        p.mul_(1.3)
    with pytest.raises(RunError, match="step 1: sampler and trainer log-probs differ"):
        trainer.step(1)


# ---- bad input

@pytest.mark.parametrize("changes, message", [
    (dict(prompts_per_step=0), "--prompts_per_step must be at least 1, got 0"),
    (dict(learning_rate="nan"), "--learning_rate must be above 0, got nan"),
    (dict(minibatch_prompts=25), "--minibatch_prompts 25 is more than --prompts_per_step 24"),
    (dict(train_problems=5), "prompts_per_step=24 must be from 1 to the number of problems, 5"),
    (dict(n_min=5, mode="rollout"), "4 is the mean, so it must lie between --n_min 5 and --n_max 12"),
    (dict(bin_edges="0.5,0.4"), "bin edges must ascend"),
    (dict(bin_edges="a,b"), "--bin_edges must be numbers"),
    (dict(eval_top_p=0), "--eval_top_p must be above 0"), (dict(eps_low=2), "--eps_low must be at most 1"),
    (dict(eval_temperature=0), "use it with --eval_rollouts 1"),
    (dict(mode="rollout", allocation="weights", rollout_utility="surrogate"), "--rollout_utility surrogate would only"),
    (dict(mode="rollout", allocation="weights", rollout_budget="dual"), "--rollout_budget dual, whose price"),
    (dict(max_response_tokens=1000), "and the model's context is 256"),
    (dict(train_data="nowhere.jsonl"), "nowhere.jsonl"),
    (dict(train_data="nonsense"), "unknown problem set"),
    (dict(model="no/such/folder"), "no folder"), (dict(model="arithmetic:x"), "--model arithmetic:x: the base models"),
    (dict(max_prompt_tokens=2), "none of 72 prompts fits"),
])
def test_bad_settings_are_refused_with_their_names(base, tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        trainer_of(base, tmp_path, **changes)


def test_unknown_and_abbreviated_flags_are_refused_with_what_they_may_have_meant(capsys):
    for argv in (["--mode", "gdro"], ["--mean_one", "maybe"], ["--rule", "rloo"], ["--learning_rat", "1"]):
        with pytest.raises(SystemExit) as stop:
            parse_args(argv)
        assert stop.value.code == 2
    assert "unrecognized arguments: --learning_rat 1; did you mean --learning_rate?" in capsys.readouterr().err
    assert [nearest(x) for x in ("lr", "train_data", "eval_evry", "kl_bet", "zzz")] == [
        "learning_rate", "train_data", "eval_every", "kl_beta", None]


def test_the_preset_is_that_of_what_is_named_and_never_another_in_silence(capsys):
    for argv, expected in ((["--model", "arithmetic:3"], "arithmetic"),
                           (["--train_data", "permutations"], "permutations"),
                           (["--model", "m", "--train_data", "x.jsonl"], "own")):
        cfg, preset, _ = parse_args(argv)
        assert preset == expected and f"preset {expected} (auto: " in capsys.readouterr().out
    assert cfg.out_dir == "out/m-x-grpo-0"
    assert parse_args(["--preset", "arithmetic"])[0].out_dir == "out/arithmetic-grpo-0"
    assert parse_args(["--model", "arithmetic:3"])[0].out_dir == "out/arithmetic-3-grpo-0"
    with pytest.raises(ValueError, match="--train_data is missing"):
        parse_args(["--model", "some/model"])


def test_a_flag_that_has_no_effect_in_the_mode_is_named(capsys):
    parse_args(["--preset", "arithmetic", "--n_min", "3", "--prompt_eta", "1", "--rule", "maxrl"])
    assert "WARNING: --n_min, --prompt_eta have no effect in mode grpo" in capsys.readouterr().out
    parse_args(["--preset", "arithmetic", "--mode", "rollout", "--n_min", "3"])
    assert "WARNING" not in capsys.readouterr().out
    parse_args(["--preset", "arithmetic", "--mode", "rollout", "--n_min", "4"])
    assert "leaves Rollout-GDRO no choice" in capsys.readouterr().out


def test_mini_batches_are_no_larger_than_the_batch_unless_one_asks_for_it():
    assert parse_args(["--preset", "arithmetic", "--prompts_per_step", "8"])[0].minibatch_prompts == 8


def test_values_come_before_folders_and_a_folder_that_cannot_be_one_before_models(base, tmp_path):
    used = tmp_path / "run"
    assert main(base, used, steps=1) == 0
    assert "bin edges must ascend" in main(base, used, bin_edges="0.5,0.2")
    assert "Not a directory" in main(base, used / "config.json" / "run")


def test_resume_alone_goes_on_with_the_settings_of_the_run_and_says_what_changed(base, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    assert main(base, out, steps=2, temperature=0.9) == 0

    def resume(*more: str):
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr(sys, "argv", ["train.py", "--out_dir", str(out), "--resume", *more])
            train_module.main()
        return end.value.code, capsys.readouterr().out

    code, said = resume()
    assert code == 0 and "already at 2 of 2 steps" in said
    with pytest.raises(ValueError, match="nowhere holds no run to go on with"):
        parse_args(["--out_dir", str(tmp_path / "nowhere"), "--resume"])
    code, said = resume("--steps", "3", "--learning_rate", "2e-4")
    assert code == 0 and "--learning_rate was" in said and len(log(out)) == 3
    assert json.loads((out / "config.json").read_text())["temperature"] == 0.9
    code, said = resume("--steps", "4")
    assert code == 0 and "--learning_rate is 0.0002, as changed at step 2" in said and log(out)[3]["lr"] == 2e-4
    assert "--temperature 0.9" in resume("--temperature", "0.5")[0]
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((base.parent / "sums.jsonl").read_bytes())
    assert resume("--steps", "5", "--train_data", str(moved))[0] == 0  # the same content


def test_the_policy_of_the_best_evaluation_stays_in_best_and_every_stop_leaves_a_model(base, tmp_path):
    out = tmp_path / "run"
    assert main(base, out, steps=4, eval_every=1, eval_first=True, learning_rate=3e-3) == 0
    evaluations = json.loads((out / "eval.json").read_text())
    key = "pass@2" if "pass@2" in evaluations[0]["passes"] else max(evaluations[0]["passes"])
    best = max(evaluations, key=lambda e: (e["passes"][key], -e["step"]))
    assert (out / "model" / "model.safetensors").exists()
    if best["step"]:
        assert json.loads((out / "best" / "evaluation.json").read_text())["step"] == best["step"]
    else:
        assert not (out / "best").exists()


def test_a_best_policy_of_steps_that_are_done_again_is_forgotten(base, tmp_path):
    """Else the remedy for a run that diverged, to go on from a checkpoint, would leave the best of the lost branch."""
    cfg, _, _ = parse_args(flags(base, tmp_path / "run"))
    folder = RunFolder(cfg)
    for step, kept in ((2, True), (3, True), (4, False)):
        (folder.path / "best").mkdir(parents=True, exist_ok=True)
        write_json(folder.path / "best" / "evaluation.json", {"step": step})
        folder.forget_after(3)
        assert (folder.path / "best").exists() == kept


def test_only_paths_are_cut_to_their_last_name(base, tmp_path):
    cfg, _, _ = parse_args(flags(base, tmp_path / "run", prompt_suffix="/no_think"))
    folder = RunFolder(cfg)
    assert folder.config["prompt_suffix"] == "/no_think" and "prompt_suffix" not in folder.paths
    assert folder.config["train_data"] == "sums.jsonl" and Path(folder.paths["train_data"]).is_absolute()


def test_without_git_the_commit_is_unknown_and_the_run_goes_on(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["commit"] is None


def test_a_reward_of_ones_own_is_trained_on_and_one_that_always_fails_ends_the_run(base, tmp_path):
    (tmp_path / "mine.py").write_text("def short(response, problem):\n    return 0.5 if len(response) < 4 else -1.0\n\n"
                                      "def broken(response, problem):\n    return 1 / 0\n")
    assert main(base, tmp_path / "run", reward=f"{tmp_path}/mine.py:short", steps=1) == 0
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    ended = [x for x in samples if not x["truncated"]]
    assert ended and all(x["reward"] == (0.5 if len(x["response"]) < 4 else -1) for x in ended)
    message = main(base, tmp_path / "broken", reward=f"{tmp_path}/mine.py:broken", steps=1)
    assert re.search(r"mine.py:broken failed on all \d+ responses", message)


def test_a_tenth_of_the_training_data_is_held_out_where_no_other_is_named(base, tmp_path):
    trainer = trainer_of(base, tmp_path, eval_data="")
    ids = [p.id for p in tasks.load(str(base.parent / "sums.jsonl"), split="train", limit=72)[0]]
    trained, held_out = ([p.id for p in problems] for problems in (trainer.problems, trainer.eval_set[0]))
    assert trained == ids[:65] and held_out == ids[65:][:6]


def test_a_used_folder_other_settings_and_other_problems_are_refused(base, tmp_path):
    out = tmp_path / "run"
    assert main(base, out, steps=2) == 0
    message = finish(launch(base, out, steps=2), 1)
    assert "run holds a run already: add --resume" in message and "Traceback" not in message
    message = main(base, out, "--resume", steps=3, temperature=0.5)
    assert "--temperature 1.0" in message and "Only these may change: steps" in message
    fewer = tmp_path / "sums.jsonl"  # under the same name
    fewer.write_text("".join((base.parent / "sums.jsonl").read_text().splitlines(keepends=True)[:80]))
    assert "--resume with another train_data" in main(base, out, "--resume", steps=3, train_data=fewer)


def test_a_damaged_checkpoint_is_named_and_the_newest_whole_one_taken(base, tmp_path, capsys):
    cfg, preset, _ = parse_args(flags(base, tmp_path / "run", steps=3, save_every=1))
    trainer, folder, evaluations = set_up(cfg, preset, False)
    with trainer.grader:
        assert train_module.train(trainer, folder, evaluations)
    whole = log(tmp_path / "run")
    for step, path in zip((3, 2), folder.checkpoints(), strict=True):
        (path / "adversaries.npz").unlink()
        if step > 2:
            resumed, _, _ = set_up(cfg, preset, True)
            assert resumed.next_step == step - 1 and not path.exists()
            assert f"step_{step} is damaged" in capsys.readouterr().out
            assert log(tmp_path / "run") == whole[: step - 1]
    with pytest.raises(ValueError, match="holds no checkpoint that is whole"):
        set_up(cfg, preset, True)


def test_a_full_disk_says_what_is_kept_and_how_to_go_on(base, tmp_path):
    """/dev/full refuses every byte, as a full disk does."""
    out = tmp_path / "run"
    assert main(base, out, steps=2) == 0
    process = launch(base, out, "--resume", steps=500, save_every=0)
    whole = logged(process, out, 3)
    (out / "full").symlink_to("/dev/full")
    (out / "full").replace(out / "metrics.jsonl")
    output = finish(process, 1)
    assert re.search(r"train.py: no space left in .*; step_2 is kept. Free \d+ MiB, then go on with --resume", output)
    assert "Traceback" not in output
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").write_text(whole)
    assert main(base, out, "--resume", steps=3) == 0
    assert [line["step"] for line in log(out)] == [0, 1, 2]


def test_resume_without_a_checkpoint_says_so_and_begins(base, tmp_path, capsys):
    assert main(base, tmp_path / "new", "--resume", steps=1) == 0 and len(log(tmp_path / "new")) == 1
    assert "has no checkpoint yet" in capsys.readouterr().out


def test_presets_are_valid_and_the_papers_values_stand():
    for preset in set(PRESETS) - {"own"}:
        parse_args(["--preset", preset])  # which checks
    with pytest.raises(ValueError, match="--model is missing: own models and data"):
        parse_args(["--preset", "own", "--train_data", "my.jsonl"])
    cfg, _, _ = parse_args(["--preset", "qwen3-4b"])
    assert (cfg.prompts_per_step, cfg.minibatch_prompts, cfg.learning_rate, cfg.kl_beta) == (256, 128, 1e-6, 1e-3)
    assert (cfg.eps_low, cfg.eps_high, cfg.advantage_clip, cfg.temperature) == (0.2, 0.28, 5.0, 1.0)
    assert (cfg.prompt_signal, cfg.rollout_utility, cfg.rollout_budget) == ("surrogate", "surrogate", "exact")
    assert cfg.bin_success == "any"


def test_a_single_rollout_packs():
    batch = Batch([[5, 6]], np.zeros(1, int), np.array([0, 1]), np.array([1]), np.zeros(1, np.float32),
                  np.zeros(1, bool))
    micro = pack(batch, np.array([0]), torch.device("cpu"))
    assert micro.tokens.tolist() == [5, 6, 1] and micro.targets.tolist() == [2]
    nothing = pack(batch, np.zeros(0, int), torch.device("cpu"))
    assert len(nothing.tokens) == 2 and len(nothing.targets) == len(nothing.places) == 0


@two_ranks
def test_two_ranks_train_on_vllm_and_agree_with_its_log_probs(base, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is an optional second step of the CPU installation")
    output = finish(launch(base, tmp_path / "run", processes=2, engine="vllm", mode="both", steps=3))
    assert "engine: vllm" in output and "Traceback" not in output  # the engine and its groups end in order
    lines = log(tmp_path / "run")
    assert len(lines) == 3 and all(line["mismatch"]["max"] < 1e-3 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines[:2])  # so that stale weights would show
