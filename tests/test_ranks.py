"""The processes of a run: where they work, what is refused before hours are lost, and what meets in a collective."""

import gc
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import gloo
from torch.distributed.fsdp import FSDPModule

import train
from config import choose_preset, parse_args
from ranks import Ranks, RunError, choose_device, cuda_usable

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="here torch can use the GPU")


# ---- the device


@no_gpu
def test_a_gpu_that_torch_cannot_use_is_an_error_unless_the_cpu_is_asked_for(tmp_path, monkeypatch):
    driver, smi = tmp_path / "version", tmp_path / "nvidia-smi"  # the latter is what WSL has in the place of the file
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cuda_usable(driver)  # no driver, no GPU
    smi.write_text("#!/bin/sh\necho No devices were found\nexit 6\n")
    smi.chmod(0o755)
    assert not cuda_usable(driver)
    smi.write_text("#!/bin/sh\necho GPU 0\n")
    for choice in (lambda: choose_preset({}), Ranks, lambda: cuda_usable(driver)):
        with pytest.raises(RunError, match=r"driver, but torch 2\..* can't use a GPU.*CUDA_VISIBLE_DEVICES= "):
            choice()
    smi.unlink()
    driver.write_text("NVRM version: ...")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")  # may be a mistake
    with pytest.raises(RunError):
        cuda_usable(driver)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not cuda_usable(driver)


def test_each_process_has_a_gpu_of_its_own_or_all_work_on_the_cpu():
    assert choose_device(3, 0) == torch.device("cpu")
    assert choose_device(3, 4) == torch.device("cuda", 3)
    with pytest.raises(RunError, match=r"process 4 \(LOCAL_RANK\) has no GPU: torch can use 4 .*--nproc_per_node=4"):
        choose_device(4, 4)


# ---- what cannot be shared out


def test_more_ranks_than_prompts_are_refused():
    ranks = Ranks()
    ranks.world = 8
    ranks.check_work(prompts=8)
    with pytest.raises(RunError, match="8 ranks and --prompts_per_step 7"):
        ranks.check_work(prompts=7)


# ---- collectives


def meet() -> None:
    ranks = Ranks()
    assert dist.get_world_size() == 2 and ranks.backend == "gloo"
    assert ranks.mesh.size() == 2  # of the group that there is
    for dtype in (np.float64, np.float32, np.int64, np.bool_):
        mine = np.zeros((2, 3), dtype, order="F")
        mine[ranks.rank] = (1, 0, 1)
        merged = ranks.merge(mine)
        assert merged.dtype == dtype and merged.tolist() == [[1, 0, 1]] * 2
        assert not mine[1 - ranks.rank].any()  # what was given stays as it was
    assert ranks.merge(np.zeros((3, 0))).shape == (3, 0)
    tiny = np.array([5e-324, 1 / 3, 2.0**63]) * (ranks.rank == 0)
    assert (ranks.merge(tiny) == [5e-324, 1 / 3, 2.0**63]).all()
    assert ranks.merge(np.array([2**63 - 1]) * ranks.rank).tolist() == [2**63 - 1]
    with pytest.raises(RunError, match="ranks disagree on this"):
        ranks.assert_equal(ranks.rank, "this")
    ranks.leave()
    assert not dist.is_initialized()


def test_host_arrays_of_every_type_and_of_no_size_merge_exactly():
    gloo(2, meet)


def left_behind(flags: list[str]) -> list[int]:
    """Of a run: how many sharded modules and optimisers there are when the engine ends, which may end the group; and
    how many references to the group when the run has ended, with those of a list and of the call that counts."""
    leave, groups, alive = Ranks.leave, [], []

    def watched(ranks: Ranks, close) -> None:
        def counted() -> None:
            gc.unfreeze()  # objects that vLLM froze are in no list
            alive.extend(x for x in gc.get_objects() if issubclass(type(x), FSDPModule | torch.optim.Optimizer))
            close()

        groups.append(dist.group.WORLD)
        leave(ranks, counted)

    Ranks.leave = watched  # in a process of its own
    try:
        train.run(*parse_args(flags))
    except SystemExit as end:
        assert not end.code, end.code
    return [len(alive), sys.getrefcount(groups[0])]


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_nothing_holds_the_group_that_a_run_has_left(base, tmp_path, engine):
    """Such a group ends with the interpreter, which at times aborted a complete run of two ranks on a busy machine."""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vLLM is an optional second step of the CPU installation")
    flags = ["--preset", "arithmetic", "--model", str(base), "--engine", engine, "--dtype", "bfloat16", "--steps", "1",
             "--prompts_per_step", "8", "--minibatch_prompts", "4", "--kl_beta", "0.001", "--eval_problems", "4",
             "--eval_rollouts", "2", "--out_dir", str(tmp_path / "run")]
    assert gloo(1, left_behind, flags, limit=30 if engine == "torch" else 120) == [[0, 2]]
