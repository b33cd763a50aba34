"""The bench's own machinery, and what the compiler makes of the kernels that matter most."""

import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import bench.__main__ as bench
import plan
from bench import kernels as bench_kernels
from config import parse_args
from model import Transformer
from ranks import Ranks

ROOT = Path(__file__).parents[1]


def compiled_for_sm90(*operations: str) -> list[dict]:
    """In a process of its own, where Triton compiles even if these tests run it as an interpreter."""
    triton = importlib.util.find_spec("triton")
    if triton is None or not (Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("needs Triton with its NVIDIA tools")
    code = f"import json, bench.kernels as b; print(json.dumps(b.compile_for_sm90({operations!r})))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_linear_logprob_in_bf16_uses_wgmma_and_tma_and_spills_nothing_on_sm_90():
    rows = [r for r in compiled_for_sm90("linear_logprob") if r["form"].startswith("bfloat16")]
    kernels = {"_fold_kernel", "_dlogits_kernel", "_dhidden_kernel", "_dweight_kernel"}
    assert {r["kernel"] for r in rows} == kernels and len(rows) == 5
    for row in rows:
        assert row["spill stores"] == row["spill loads"] == row["stack bytes"] == 0, row
        assert row["wgmma"] and row["TMA loads"], row
        assert row["shared KiB"] < 227, row  # what a block may have


CASES = {"linear": functools.partial(bench_kernels.linear_case, 64, 500, 32),
         "linear, half": functools.partial(bench_kernels.linear_case, 64, 500, 32, live=0.5),
         "linear, entropy": functools.partial(bench_kernels.linear_case, 64, 500, 32, entropy=True),
         "advantage": functools.partial(bench_kernels.advantage_case, 8, 40)}


@pytest.mark.parametrize("name", CASES)
def test_what_is_timed_on_cuda_computes_what_it_is_compared_with(monkeypatch, name):
    """Every case on the CPU, where nothing is timed: ours and plain torch give the truth and its gradients."""
    given = {}
    monkeypatch.setattr(bench_kernels, "DEVICE", "cpu")
    monkeypatch.setattr(bench_kernels, "compare", lambda operation, case, calls, make, truth, **rest: given.update(
        calls=calls, make=make, truth=truth, **rest) or [])
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert list(CASES[name]()) == []
    inputs, truth = given["make"](0), given["truth"]
    if name == "advantage":  # whose truth is plain torch's
        rewards, offsets, weights = (x.numpy() for x in inputs.arguments)
        groups = np.split(rewards, offsets[1:-1])
        exact = [w * (g - g.mean()) / (g.std() + 1e-6) for g, w in zip(groups, weights, strict=True)]
        assert truth.out.numpy() == pytest.approx(np.concatenate(exact), abs=1e-12)
    for provider in ("ours", "eager"):
        call = given["calls"][provider]
        out = bench_kernels.forward(call, inputs)
        assert (out.double() - truth.out).abs().max() < (2e-2 if inputs.arguments[0].dtype == torch.bfloat16 else 1e-6)
        if "both" in given["predicted"]:
            gradients = bench_kernels.forward_and_backward(call, inputs)
            for got, expected, rows in zip(gradients, truth.gradients, truth.rows, strict=True):
                assert (got[rows].double() - expected).norm() / expected.norm() < 1e-2


def test_update_runs_both_phases_with_a_gradient_for_every_token(monkeypatch):
    """Of a tiny model on the CPU, without the compiler."""
    calls, update = [], bench.Trainer.update
    monkeypatch.setattr(Transformer, "compile_blocks", lambda model: calls.append("compiled"))
    monkeypatch.setattr(bench.Trainer, "update", lambda *given: calls.append(update(*given)) or calls[-1])
    cfg, _, _ = parse_args(["--preset", "qwen3-1.7b", "--kl_beta", "0", "--max_mismatch", "1e9", "--prompts_per_step",
                            "4", "--minibatch_prompts", "4", "--microbatch_tokens", "64"])
    tiny = dataclasses.replace(plan.known_model(cfg.model), vocab_size=300, hidden_size=32, intermediate_size=64,
                               num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    ranks = Ranks()
    rows = list(bench.update_rows(ranks, "tiny", cfg, tiny, (0.0, 1.0), prompt=5, response=11, repeats=1))
    ranks.leave()
    assert [(r["phase"], r["compiled"], r["recomputed"]) for r in rows] == [
        (phase, compiled, share) for compiled in (False, True)
        for phase, share in (("update", 0.0), ("log-probs", 0), ("update", 1.0))]
    assert calls.count("compiled") == 1 and all(r["tokens"] == 16 * 16 and r["s"] > 0 for r in rows)
    assert all(c.idle_frac == 0 and c.grad_norm > 0 for c in calls if c != "compiled")


def test_a_rollout_of_advantage_0_that_is_trained_on_changes_nothing_but_the_work():
    (usual, every), left_out = (list(bench.our_steps("grpo", 2, every=e)) for e in (False, True)), []
    for a, b in zip(usual, every, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["reward_mean"] == b["reward_mean"]
        left_out.append(1 - a["ranks"]["tokens_trained"][0] / b["ranks"]["tokens_trained"][0])
    assert min(left_out) > 0.3, left_out  # most prompts of this base are solved by none of four


def test_trl_without_an_environment_of_its_own_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "trl"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "pip install trl==" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="failed"):
        next(bench.trl_steps("false", 1, False))


def test_tables_split_where_columns_change():
    rows = [{"a": 1, "b": None}, {"a": 2, "b": True}, {"c": 12_345.6}]
    assert bench.tables("x", rows) == ("\n### x\n\n| a | b |\n| --- | --- |\n| 1 |  |\n| 2 | yes |\n"
                                         "\n| c |\n| --- |\n| 12,346 |\n")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_of_memory_is_seen_and_forgotten():
    held = bench_kernels.forget_peak()
    bytearray(64 << 20)[:] = bytes(64 << 20)
    assert bench_kernels.resident_mib("VmHWM") - held > 60
    assert bench_kernels.forget_peak() > 0 and bench_kernels.resident_mib("VmHWM") - held < 60
