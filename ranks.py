"""The processes of a run: how work is dealt out among them, and how their results meet.

With torchrun every rank holds the results of all; work is dealt out by its cost, and results meet in one collective: a
sum of arrays in which each rank filled its own places and left zeros elsewhere, which is exact.
"""

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


class RunError(RuntimeError):
    """A run that must stop, with a message that says all a user needs."""


def say(*words: object) -> None:
    """Prints on the first rank only."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(" ".join(map(str, words)))


class Ranks:
    """The processes of a run, and the one collective they need."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # A rank that dies should fail the others within minutes, not after the default half hour of silence.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=15))

    def merge(self, array: np.ndarray) -> np.ndarray:
        """Sum over ranks of arrays in which each rank filled its own places and left zeros elsewhere. Exact."""
        if self.world == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def sum_(self, tensor: torch.Tensor) -> None:
        if self.world > 1:
            dist.all_reduce(tensor)

    def leave(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def assert_equal(self, digest: int, what: str) -> None:
        """Raises when the ranks do not hold the same 63-bit digest."""
        mine = np.zeros(self.world, np.int64)
        mine[self.rank] = digest
        all_digests = self.merge(mine)
        if len(set(all_digests.tolist())) > 1:
            raise RunError(f"ranks disagree on {what}: digests {all_digests.tolist()}")


def deal(cost: np.ndarray, ranks: int) -> np.ndarray:
    """Which rank does which piece of work, (n,): the costliest first, each to the rank with least so far."""
    load, owner = np.zeros(ranks), np.zeros(len(cost), int)
    for i in np.argsort(-cost, kind="stable"):
        owner[i] = load.argmin()
        load[owner[i]] += cost[i]
    return owner
