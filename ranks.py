"""The processes of a run: how work is dealt out among them, and how their results meet.

With torchrun every rank holds the results of all; work is dealt out by its cost, and results meet as sums of arrays in
which each rank filled its own places and left zeros elsewhere, which is exact. The model is spread over them by FSDP2.
"""

import functools
import gc
import itertools
import os
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

DRIVER = Path("/proc/driver/nvidia/version")  # there while the kernel has NVIDIA's driver


class RunError(RuntimeError):
    """A run that must stop, with a message that says all a user needs."""


def say(*words: object) -> None:
    """Prints on the first rank only."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(" ".join(map(str, words)))


def cuda_usable(driver: Path = DRIVER) -> bool:
    """Whether torch has a GPU to work on; an empty CUDA_VISIBLE_DEVICES asks for the CPU.

    Raises RunError where there is NVIDIA's driver and torch can't use it: a run would go to the CPU in silence.
    """
    if torch.cuda.is_available():
        return True
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return False
    smi = shutil.which("nvidia-smi")  # WSL has it in the place of the file
    if not driver.exists() and not (smi and subprocess.run([smi, "--list-gpus"], capture_output=True).returncode == 0):
        return False
    raise RunError(
        f"there is an NVIDIA driver, but torch {torch.__version__} (built for CUDA {torch.version.cuda}) can't use a "
        "GPU. Update the driver (CUDA 13 needs 580 or newer, CUDA 12 needs 525; nvidia-smi names it), install a "
        "torch that was built for it, or give the container its GPUs. To use the CPU on purpose, set "
        "CUDA_VISIBLE_DEVICES= (empty)")


def choose_device(local: int, gpus: int) -> torch.device:
    """What process `local` of a node with so many usable GPUs works on. Raises RunError where none is left for it."""
    if not gpus:
        return torch.device("cpu")
    if local >= gpus:
        raise RunError(f"process {local} (LOCAL_RANK) has no GPU: torch can use {gpus} on this node, one process each, "
                       f"numbered from 0. torchrun --nproc_per_node={gpus} or fewer")
    return torch.device("cuda", local)


class Ranks:
    """The processes of a run, and how what they know meets."""

    def __init__(self, patience: float = 900):
        """`patience`: seconds that a collective waits for the other ranks before it gives up."""
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.in_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        gpus = torch.cuda.device_count() if cuda_usable() else 0
        self.device = choose_device(int(os.environ.get("LOCAL_RANK", "0")), gpus)
        self.backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"  # host arrays never travel through the GPU
        if gpus:
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # No device_id: with one, `new_group` splits NCCL's communicator, a collective that ranks outside the group
            # enter even where it is gloo's, and those inside don't (torch 2.13). vLLM opens such groups, one a rank.
            dist.init_process_group(self.backend, timeout=timedelta(seconds=patience))
            dist.all_reduce(torch.zeros(1, device=self.device))  # what is wrong between the GPUs shows now

    def check_work(self, prompts: int) -> None:
        """Raises RunError for more ranks than prompts of a step, by which sampling is dealt out."""
        if self.world > prompts:
            raise RunError(f"{self.world} ranks and --prompts_per_step {prompts}: some would never sample. Take more "
                           "prompts or fewer ranks")

    @functools.cached_property  # each new one opens process groups, and each group communicators
    def mesh(self) -> DeviceMesh:
        """Over all ranks, by node where there are several: shard inside a node, replicate between nodes. Collective.

        A process without a group gets one of its own. Raises RunError for nodes that run unequally many processes.
        """
        if not dist.is_initialized():
            dist.init_process_group(self.backend, store=dist.HashStore(), rank=0, world_size=1)
        if len(set(per_node := self.from_all(self.in_node))) > 1:
            raise RunError(f"all nodes must run as many processes, --nproc_per_node, but they run {per_node}")
        shape = (self.world // self.in_node, self.in_node) if self.in_node < self.world else (self.world,)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])

    def merge(self, array: np.ndarray) -> np.ndarray:
        """Sum over ranks of arrays in which each rank filled its own places and left zeros elsewhere. Exact."""
        if self.world == 1:
            return array
        total = torch.from_numpy(np.array(array, order="C"))  # a copy, on the host
        dist.all_reduce(total)
        return total.numpy()

    def from_all(self, mine) -> list:
        """What each rank gives, by rank; a barrier, too."""
        if self.world == 1:
            return [mine]
        given = [None] * self.world
        dist.all_gather_object(given, mine)
        return given

    def leave(self, close: Callable[[], None] = lambda: None) -> None:
        """Ends the processes' group. Sharded models must be gone by then: what still holds the group lets it end with
        the interpreter only, and then its threads sometimes abort a run that was complete.

        `close` ends what else belongs to the group and may end the group itself, as vLLM does."""
        getattr(self.__dict__.get("mesh"), "_pg_registry", {}).clear()  # DTensor's caches keep the mesh
        gc.unfreeze()  # vLLM hides all that is there when it starts, the model too, from the collector
        gc.collect()
        close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def assert_equal(self, digest: int, what: str) -> None:
        """Raises when the ranks do not hold the same 63-bit digest."""
        if len(set(digests := self.from_all(digest))) > 1:
            raise RunError(f"ranks disagree on {what}: digests {digests}")


def deal(cost: np.ndarray, ranks: int) -> np.ndarray:
    """Which rank does which piece of work, (n,): the costliest first, each to the rank with least so far."""
    load, owner = np.zeros(ranks), np.zeros(len(cost), int)
    for i in np.argsort(-cost, kind="stable"):
        owner[i] = load.argmin()
        load[owner[i]] += cost[i]
    return owner


def deal_rows(cost: np.ndarray, most: int, ranks: int) -> list[list[np.ndarray]]:
    """[rank][row] -> the pieces of work in it, of (n,) with these costs: rows of at most `most`, but for a piece that
    is larger alone. All ranks have as many rows, of about the same cost in the same place, for they meet in every one;
    some are empty where there is too little work, and where there is none each rank has one that is."""
    for rows in itertools.count(max(1, int(np.ceil(cost.sum() / (most * ranks))))):
        owner = deal(cost, ranks * rows)
        load, pieces = (np.bincount(owner, weights=w, minlength=ranks * rows) for w in (cost, None))
        if np.all((load <= most) | (pieces <= 1)):
            break
    order = np.argsort(-load, kind="stable").reshape(rows, ranks)
    return [[np.flatnonzero(owner == row) for row in mine] for mine in order.T]


# ------------------------------------------------------------------------------------------------ the model, sharded


def is_sharded(ranks: Ranks, compute: torch.dtype) -> bool:
    """Whether this run's model is. (A lone process, too, in bf16, which needs float32 masters, and on a GPU.)"""
    return ranks.world > 1 or ranks.device.type == "cuda" or compute != torch.float32


def shard(model: nn.Module, ranks: Ranks, *, compute: torch.dtype) -> nn.Module:
    """Shards `model` (a Transformer, on the meta device or not) in place, to be computed with in `compute`.

    By PyTorch's FSDP2: every parameter is a float32 shard on each rank, the master that the optimiser moves; a block's
    weights are gathered in `compute` when it runs, and its gradients summed over the ranks, in float32. Sums, not
    means: the loss says what a token weighs. With several nodes the shards are of one node, and nodes hold replicas.
    """
    if not is_sharded(ranks, compute):
        return model
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=ranks.mesh, mp_policy=policy)
    for part in model.modules():
        if isinstance(part, FSDPModule) and ranks.world > 1:  # on every one: the root's does not reach the blocks
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "logprobs")  # training calls it, and the root's weights must be there
    return model


def reshard(model: nn.Module) -> None:
    """Back to shards: after a forward pass without a backward one the root's weights are whole."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def full(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole of a parameter, cast before it is gathered. Collective: all ranks ask for the same one."""
    p = p.detach() if dtype is None else p.detach().to(dtype)
    return p.full_tensor() if isinstance(p, DTensor) else p


@torch.no_grad()
def fill(p: Tensor, tensor: Tensor) -> None:
    """Copies the whole `tensor` into a parameter, every rank its own shard of it; nothing is sent."""
    if isinstance(p, DTensor):
        tensor = distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    p.copy_(tensor)
