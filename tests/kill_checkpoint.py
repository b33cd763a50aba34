"""Kills one of several ranks that write checkpoints, again and again, and checks what is left: PYTHONPATH=. python
tests/kill_checkpoint.py [kills]. Not a test of pytest's, since a kill at a moment drawn at random proves little once.

Two ranks save as fast as they can, and `kill -9` strikes one of them after a delay drawn from the kill's number. One to
three ranks then load: they must find the last checkpoint that was finished, or the one after it, and every element must
be of its step. The two go on from there.
"""

import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from conftest import gloo
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from config import Config
from ranks import Ranks
from runfolder import RunFolder, replace_text


def state(step: int) -> tuple[dict, dict]:
    """Tensors (9 MB in all, sharded where there are several ranks) and arrays of nothing but the step's number."""
    torch.manual_seed(0)
    model = torch.nn.Linear(750, 1000)
    if dist.is_initialized():
        fully_shard(model)
    tensors = {f"{kind}.{k}": torch.full_like(p, step) for kind in ("weight", "exp_avg", "exp_avg_sq")
               for k, p in model.named_parameters()}
    return tensors, {"bins": np.full(100, step)}


def load(folder: RunFolder) -> int:
    """The step that is found; every element must be of it."""
    tensors, arrays = state(-1)
    loaded = folder.load(tensors, Ranks())
    if loaded is None:
        return 0
    arrays, record = loaded
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors.values()]
    assert {float(x) for part in parts for x in part.unique()} | set(arrays["bins"]) == {record["next_step"]}
    return record["next_step"]


def check(path: Path) -> int:
    """The step that is found, forgetting those after it, as when a run goes on."""
    folder = RunFolder(Config(out_dir=str(path)))
    step = load(folder)
    if Ranks().rank == 0:
        folder.forget_after(step)
    return step


def write(path: Path, begin: int, victim: int, delay: float) -> None:
    """Saves one step after the other until rank `victim` is killed; the first writes down which were finished."""
    folder, ranks = RunFolder(Config(out_dir=str(path))), Ranks()
    for step in itertools.count(begin):
        tensors, arrays = state(step)
        if step == begin and ranks.rank == victim:
            subprocess.Popen(["sh", "-c", f"sleep {delay}; kill -9 {os.getpid()}"])
        folder.save(tensors, arrays, {"next_step": step}, 1, ranks)
        if ranks.rank == 0:
            replace_text(path / "finished", str(step))


def main() -> None:
    found, unfinished = 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "finished").write_text("0")
        for kill in range(int(sys.argv[1]) if len(sys.argv) > 1 else 20):
            rng = np.random.default_rng(kill)
            victim, delay = int(rng.integers(2)), float(rng.uniform(0.05, 1))
            try:
                gloo(2, write, path, found + 1, victim, delay)
            except (ProcessExitedException, ProcessRaisedException) as error:  # of the killed, or of the one left
                assert "SIGKILL" in str(error) or "onnection" in str(error), error
            finished, partial = int((path / "finished").read_text()), list((path / "checkpoint").glob("*.partial"))
            unfinished += len(partial)
            files = sum(1 for p in partial for _ in p.iterdir())
            found = gloo(1 + kill % 3, check, path)[0]
            print(f"kill {kill}: rank {victim} after {delay:.2f} s, finished {finished}, found {found}, "
                  f"{f'{files} files aside' if partial else 'nothing aside'}")
            assert finished <= found <= finished + 1
    print(f"{kill + 1} kills, {unfinished} of them while a checkpoint was written; nothing that was finished is lost")


if __name__ == "__main__":
    main()
