"""The processes of a run: where they work, what is refused before hours are lost, and what meets in a collective."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import choose_preset
from ranks import Ranks, RunError, choose_device, cuda_usable, driver_version

ROOT = Path(__file__).parents[1]
NVRM = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here torch can use the GPU")


def python(code: str, *, processes: int = 1, **environment: str) -> subprocess.CompletedProcess:
    """`code` as a program beside the modules of this repository, under torchrun if there are several."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--no-python"]
    command = [*([sys.executable, *torchrun] if processes > 1 else []), sys.executable, "-c", code]
    path = os.pathsep.join(filter(None, (environment.pop("first", ""), str(ROOT))))
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)


# ---- the device


@no_gpu
def test_a_gpu_that_torch_cannot_use_is_an_error_unless_the_cpu_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = tmp_path / "version"
    assert not cuda_usable(driver)  # no driver, no GPU
    driver.write_text(NVRM)
    with pytest.raises(RunError, match=r"driver, 535\.183\.01, but torch 2\..* can't use .*CUDA_VISIBLE_DEVICES= "):
        cuda_usable(driver)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # may be a mistake
    with pytest.raises(RunError):
        cuda_usable(driver)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not cuda_usable(driver)


@no_gpu
def test_neither_preset_nor_device_is_chosen_beside_such_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    smi = tmp_path / "nvidia-smi"  # what WSL has in the place of the file
    smi.write_text("#!/bin/sh\necho 470.57.02\n")
    smi.chmod(0o755)
    assert driver_version(tmp_path / "none") == "470.57.02"
    for choice in (lambda: choose_preset({}), Ranks):
        with pytest.raises(RunError, match=r"driver, 470\.57\.02"):
            choice()
    smi.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    assert driver_version(tmp_path / "none") is None and choose_preset({}) == "arithmetic"


def test_each_process_has_a_gpu_of_its_own_or_all_work_on_the_cpu():
    assert choose_device(3, 0) == torch.device("cpu")
    assert choose_device(3, 4) == torch.device("cuda", 3)
    with pytest.raises(RunError, match=r"process 4 \(LOCAL_RANK\) has no GPU: torch can use 4 .*--nproc_per_node=4"):
        choose_device(4, 4)


# ---- what cannot be shared out


def test_more_ranks_than_prompts_are_refused_and_more_than_a_mini_batch_has_rollouts_is_said(capsys):
    ranks = Ranks()
    ranks.world = 8
    ranks.check_work(prompts=8, minibatch_rollouts=8)
    assert capsys.readouterr().out == ""
    ranks.check_work(prompts=8, minibatch_rollouts=4)
    assert "8 ranks share the 4 rollouts of a mini-batch" in capsys.readouterr().out
    with pytest.raises(RunError, match="8 ranks and --prompts_per_step 7"):
        ranks.check_work(prompts=7, minibatch_rollouts=28)


# ---- vLLM beside a GPU


@pytest.mark.parametrize("package, problem", [
    ("raise ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')", "No module named 'vllm'"),
    ("raise ImportError('libcudart.so.13: cannot open shared object file')", "ImportError: libcudart.so.13"),
])
def test_a_vllm_that_does_not_run_is_an_error_on_a_gpu_and_a_sentence_on_the_cpu(tmp_path, package, problem):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(package)
    ended = python("import torch\nfrom rollout import choose_engine\nfor device in ('cpu', 'cuda'):\n"
                   "    print(*choose_engine('auto', torch.device(device)), flush=True)", first=str(tmp_path))
    *_, on_cpu, error = [x for x in ended.stdout.splitlines() if x.startswith(("torch ", "ValueError: "))]
    assert ended.returncode == 1
    assert on_cpu.startswith("torch vLLM can't be imported (") and problem in on_cpu
    assert problem in error and "pip install -r requirements.txt, or take --engine torch" in error


# ---- collectives

MERGED = """
import numpy as np
import torch.distributed as dist
from ranks import Ranks

ranks = Ranks()
assert dist.get_world_size() == 2 and ranks.backend == "gloo"
ranks.mesh  # of the group that there is
for dtype in (np.float64, np.float32, np.int64, np.bool_):
    mine = np.zeros((2, 3), dtype)
    mine[ranks.rank] = (1, 0, 1)
    merged = ranks.merge(mine)
    assert merged.dtype == dtype and merged.tolist() == [[1, 0, 1]] * 2, merged
    assert not mine[1 - ranks.rank].any()  # what was given stays as it was
    assert (ranks.merge(np.asfortranarray(mine)) == merged).all()
    assert ranks.merge(np.zeros((3, 0), dtype)).shape == (3, 0)
tiny = np.array([5e-324, 1 / 3, 2.0**63]) * (ranks.rank == 0)
assert (ranks.merge(tiny) == [5e-324, 1 / 3, 2.0**63]).all()
assert ranks.merge(np.array([2**63 - 1]) * ranks.rank).tolist() == [2**63 - 1]
ranks.leave()
assert not dist.is_initialized()
"""


@no_gpu
def test_host_arrays_of_every_type_and_of_no_size_merge_exactly():
    ended = python(MERGED, processes=2)
    assert ended.returncode == 0, ended.stdout


ALONE = """
import torch
import torch.distributed as dist
from ranks import Ranks

ranks = Ranks()
assert not dist.is_initialized()
for _ in range(2):
    ranks.mesh
assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
x = torch.arange(3.0, device=ranks.device)
dist.all_reduce(x)
assert x.tolist() == [0, 1, 2]
host = torch.arange(3.0)
dist.all_reduce(host)
ranks.leave()
assert not dist.is_initialized()
"""


def test_a_lone_process_gets_a_group_of_its_own_when_asked():
    ended = python(ALONE)
    assert ended.returncode == 0, ended.stdout


HELD = """
import sys
import torch.distributed as dist
import train
from config import parse_args
from ranks import Ranks

leave, groups = Ranks.leave, []

def watched(ranks):
    groups.append(dist.group.WORLD)
    leave(ranks)

Ranks.leave = watched
try:
    train.run(*parse_args({flags}))
except SystemExit as end:
    assert not end.code, end.code
assert sys.getrefcount(groups[0]) == 2, sys.getrefcount(groups[0])  # of the list, of the call
"""


def test_nothing_holds_the_group_that_a_run_has_left(base, tmp_path):
    """Such a group ends with the interpreter, which at times aborted a complete run of two ranks on a busy machine."""
    flags = ["--preset", "arithmetic", "--model", str(base), "--engine", "torch", "--dtype", "bfloat16", "--steps", "1",
             "--prompts_per_step", "8", "--minibatch_prompts", "4", "--kl_beta", "0.001", "--eval_problems", "4",
             "--eval_rollouts", "2", "--compile", "false", "--out_dir", str(tmp_path / "run")]
    ended = python(HELD.format(flags=flags))
    assert ended.returncode == 0, ended.stdout
