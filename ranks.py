"""The processes of a run: how work is dealt out among them, and how their results meet.

With torchrun every rank holds the results of all; work is dealt out by its cost, and results meet in one collective: a
sum of arrays in which each rank filled its own places and left zeros elsewhere, which is exact.
"""

import os
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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
        self.in_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # A rank that dies should fail the others within minutes, not after the default half hour of silence.
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=timedelta(minutes=15))

    def mesh(self) -> DeviceMesh:
        """Over all ranks, by node where there are several: shard inside a node, replicate between nodes."""
        if not dist.is_initialized():  # one process
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        if self.in_node < self.world:
            return init_device_mesh(self.device.type, (self.world // self.in_node, self.in_node),
                                    mesh_dim_names=("replicate", "shard"))
        return init_device_mesh(self.device.type, (self.world,))

    def merge(self, array: np.ndarray) -> np.ndarray:
        """Sum over ranks of arrays in which each rank filled its own places and left zeros elsewhere. Exact."""
        if self.world == 1:
            return array
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def gather(self, value: float) -> np.ndarray:
        """A number of each rank, (world,)."""
        mine = np.zeros(self.world)
        mine[self.rank] = value
        return self.merge(mine)

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


def deal_rows(cost: np.ndarray, most: int, ranks: int) -> list[list[np.ndarray]]:
    """[rank][row] -> the pieces of work in it, of (n,) with these costs: rows of at most `most`, but for a piece that is
    larger alone. All ranks have as many rows, of about the same cost in the same place, for they meet in every one; some
    are empty where there is too little work, and where there is none each rank has one that is."""
    rows = max(1, int(np.ceil(cost.sum() / (most * ranks))))
    while True:
        owner = deal(cost, ranks * rows)
        load, pieces = (np.bincount(owner, weights=w, minlength=ranks * rows) for w in (cost, None))
        if np.all((load <= most) | (pieces <= 1)):
            break
        rows += 1
    order = np.argsort(-load, kind="stable").reshape(rows, ranks)
    order[1::2] = order[1::2, ::-1]  # to and fro: no rank has the larger of every row
    return [[np.flatnonzero(owner == row) for row in mine] for mine in order.T]
