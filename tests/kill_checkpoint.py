"""Kills one of two ranks that write checkpoints, again and again, and checks what is left: PYTHONPATH=. python
tests/kill_checkpoint.py [kills]. Not a test of pytest's, since a kill at a moment drawn at random proves little once.

Both save as fast as they can, and `kill -9` strikes one of them after a delay drawn from the kill's number. One to
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


def state(step: int) -> dict[str, torch.Tensor]:
    """Tensors (9 MB in all, sharded where there are several ranks) of nothing but the step's number."""
    model = torch.nn.Linear(750, 1000)
    if dist.is_initialized():
        fully_shard(model)
    return {f"{kind}.{k}": torch.full_like(p, step) for kind in ("weight", "exp_avg", "exp_avg_sq")
            for k, p in model.named_parameters()}


def found(path: Path) -> int:
    """The step that is found, forgetting those after it, as when a run goes on; every element must be of it."""
    folder, tensors, ranks = RunFolder(Config(out_dir=str(path))), state(-1), Ranks()
    if (loaded := folder.load(tensors, ranks)) is None:
        return 0
    arrays, record = loaded
    parts = [t.to_local() if hasattr(t, "to_local") else t for t in tensors.values()]
    assert {float(x) for part in parts for x in part.unique()} | set(arrays["bins"]) == {record["next_step"]}
    if ranks.rank == 0:
        folder.forget_after(record["next_step"])
    return record["next_step"]


def write(path: Path, begin: int, victim: int, delay: float) -> None:
    """Saves one step after the other until rank `victim` is killed; the first writes down which were finished."""
    folder, ranks = RunFolder(Config(out_dir=str(path))), Ranks()
    if ranks.rank == victim:
        subprocess.Popen(["sh", "-c", f"sleep {delay}; kill -9 {os.getpid()}"])
    for step in itertools.count(begin):
        folder.save(state(step), {"bins": np.full(100, step)}, {"next_step": step}, ranks)
        if ranks.rank == 0:
            replace_text(path / "finished", str(step))


def main() -> None:
    step, unfinished, kills = 0, 0, int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "finished").write_text("0")
        for kill in range(kills):
            rng = np.random.default_rng(kill)
            victim, delay = int(rng.integers(2)), float(rng.uniform(0.05, 1))
            try:
                gloo(2, write, path, step + 1, victim, delay)
            except (ProcessExitedException, ProcessRaisedException) as error:  # of the killed, or of the one left
                assert "SIGKILL" in str(error) or "onnection" in str(error), error
            finished, partial = int((path / "finished").read_text()), list((path / "checkpoint").glob("*.partial"))
            unfinished += len(partial)
            step = gloo(1 + kill % 3, found, path)[0]
            print(f"kill {kill}: rank {victim} after {delay:.2f} s, finished {finished}, found {step}, "
                  f"{'something' if partial else 'nothing'} aside")
            assert finished <= step <= finished + 1
    print(f"{kills} kills, {unfinished} of them while a checkpoint was written; nothing that was finished is lost")


if __name__ == "__main__":
    main()
