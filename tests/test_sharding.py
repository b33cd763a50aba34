"""However the model is spread over processes, the same training comes out."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import two_ranks
from test_train import ROOT, flags

# name -> flags: the surrogate feeds both adversaries; the reward and rollouts alone do, with a KL term and blocks
# recomputed; more ranks than rollouts that act.
CASES = {
    "surrogate": dict(mode="both", adversary="paper", microbatch_tokens=300),
    "reward": dict(mode="both", kl_beta=0.1, gradient_checkpointing=0.5, microbatch_tokens=150, learning_rate=1e-4),
    "slow": dict(mode="grpo", learning_rate=1e-6),
    "few": dict(mode="prompt", prompts_per_step=4, rollouts_per_prompt=2, minibatch_prompts=1),
}


def steps(base: Path, out: Path, processes: int, nodes: int = 1, how: str = "usual", dtype: str = "float32",
          cases: tuple[str, ...] = ("surrogate", "reward", "few"), limit: int = 100) -> dict:
    """What tests/sharded_steps.py found of the cases on so many processes."""
    words = []
    for case in cases:
        options = CASES[case] | {"dtype": dtype, "engine": "torch"}
        words += ["+"] * bool(words) + [case, *flags(base, out / "run", **options)]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={processes // nodes}",
                "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "tests/sharded_steps.py", str(out / "found.pt"),
               how, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launched = [subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT) for _ in range(nodes)]
    for process in launched:
        output, _ = process.communicate(timeout=limit)
        assert process.returncode == 0, output
    return torch.load(out / "found.pt", weights_only=True)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory) -> dict:
    """Of one process that is not sharded."""
    return steps(base, tmp_path_factory.mktemp("alone"), 1)


@two_ranks
@pytest.mark.parametrize("processes, nodes, how", [(1, 1, "compiled"), (2, 1, "usual"), (4, 2, "usual")],
                         ids=["1, compiled", "2", "2 nodes of 2"])
def test_sharded_training_equals_that_of_one_process(base, alone, tmp_path, processes, nodes, how):
    found = steps(base, tmp_path, processes, nodes, how)
    for case, one in alone.items():
        many = found[case]
        assert min(one["grad_norm"]) > 0 and len(many["rollouts"][0]) == processes
        assert [sum(n) for n in many["rollouts"]] == [sum(n) for n in one["rollouts"]]
        for key in ("loss", "grad_norm", "kl"):
            assert many[key] == pytest.approx(one[key], rel=2e-4, abs=1e-6), (case, key)
        assert (many["masters"] - one["masters"]).abs().max() < 2e-4  # of steps of 1e-3; Adam divides small by small
        assert (many["masters"] - one["masters"]).norm() < 1e-4 * one["masters"].norm()
        if case == "surrogate":  # its last bits depend on who summed what
            for name, value in one["adversaries"].items():
                torch.testing.assert_close(many["adversaries"][name], value, rtol=0, atol=1e-6, equal_nan=True)
        else:
            assert many["hash"] == one["hash"], case
    assert any(min(n) == 0 for n in found["few"]["rollouts"]) == (processes == 4)  # a rank without work


def test_bf16_runs_have_float32_masters_which_learn_where_bf16_alone_stands_still(base, tmp_path):
    """A step of 1e-6 is far below what bf16 resolves: six of them, in float32, are not lost."""
    one = steps(base, tmp_path, 1, dtype="bfloat16", cases=("slow",))["slow"]
    assert one["masters"].dtype == torch.float32 and min(one["grad_norm"]) > 0
    moved = (one["masters"] - one["began"]).abs()
    assert 0 < moved.max() < 1e-5 and (moved > 1e-7).float().mean() > 0.5
    assert (one["masters"].bfloat16() == one["began"].bfloat16()).float().mean() > 0.9
