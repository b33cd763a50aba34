"""Ends a run in which nothing moves any more, and leaves in RUN/stall-rankN.txt what each rank was doing.

A kernel that hangs, a collective that one rank never enters, a disk that does not answer: a run would hold its GPUs
until somebody looks. `progress` is called wherever something has moved: at the borders of phases, for each token of a
rollout (TorchEngine), each step of vLLM's engine, each verdict, micro-batch and weight. A thread of each rank watches
its own clock and, through the launcher's store, whether any other rank moved; when none did for --stall_seconds it
writes the file and ends the process, whatever the main thread is stuck in. Nothing has to be agreed on: ranks that hang
can't agree.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

POLL_SECONDS = 5.0  # at most, between two looks; a tenth of the limit where that is less
STDERR = 2  # the descriptor: trackers put objects of their own into sys.stderr
LATER = 10.0  # seconds after which the timer in C ends what the watching thread could not


@dataclass
class Work:
    """What this process is at, for those who will ask why it hung."""

    phase: str = "start"
    step: int | None = None
    moves: int = 0      # calls of `progress`
    moved: float = 0.0  # monotonic time of the last one


_work = Work()


def progress(phase: str | None = None, *, step: int | None = None) -> None:
    """Says that this process moves, and what it is at; what isn't given stays."""
    if phase is not None:
        _work.phase = phase
    if step is not None:
        _work.step = step
    _work.moved = time.monotonic()
    _work.moves += 1


@contextmanager
def watching(folder: Path, seconds: float, remedy: str = "--resume goes on from the last checkpoint") -> Iterator[None]:
    """Inside, the process ends with status 1, and a line that ends with `remedy`, once no rank has moved for so many
    seconds; 0 = never.

    The clock starts at the first `progress`: before it a model may have to be downloaded.
    """
    global _work
    _work = Work()
    if not seconds:
        yield
        return
    watch = _Watch(folder, seconds, remedy)
    try:
        yield
    finally:
        watch.over.set()
        watch.thread.join()
        faulthandler.cancel_dump_traceback_later()


class _Watch:
    """The threads that watch. They share nothing with the main thread that it could hold while it hangs."""

    def __init__(self, folder: Path, seconds: float, remedy: str):
        self.folder, self.seconds, self.remedy = folder, seconds, remedy
        self.poll = min(POLL_SECONDS, seconds / 10)
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.over, self.others_moved = threading.Event(), 0.0
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        if self.world > 1:
            threading.Thread(target=self._listen, daemon=True).start()

    def silence(self) -> float:
        """Seconds since any rank moved."""
        return time.monotonic() - max(_work.moved, self.others_moved) if _work.moves else 0.0

    def _watch(self) -> None:
        while self.silence() <= self.seconds:
            # Where the main thread hangs and keeps Python's lock, this one never runs again: then a timer in C writes
            # all stacks to stderr and ends the process. So it does if the disk for the report does not answer.
            faulthandler.dump_traceback_later(self.seconds + LATER, exit=True, file=STDERR)
            if self.over.wait(self.poll):
                return
        faulthandler.dump_traceback_later(LATER, exit=True, file=STDERR)
        self._report()
        faulthandler.cancel_dump_traceback_later()
        time.sleep(3 * self.poll)  # a rank that goes breaks the others' collectives: let them write first
        os._exit(1)

    def _listen(self) -> None:
        """Adds this rank's moves to a sum of all ranks' in the launcher's store: while it grows, some rank moves."""
        from torch.distributed import TCPStore  # here, for the grader's workers import this file and need no torch

        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        told = total = 0
        while not self.over.wait(self.poll):
            moves = _work.moves
            known, total = total, store.add("watchdog/moves", moves - told)
            told = moves
            if total != known:
                self.others_moved = time.monotonic()

    def _report(self) -> None:
        path, work = self.folder / f"stall-rank{self.rank}.txt", _work
        own, silence = time.monotonic() - work.moved, self.silence()
        where = f"phase {work.phase}" + (f", step {work.step}" if work.step is not None else "")
        print(f"rank {self.rank}: no rank has moved for {silence:.0f} seconds (--stall_seconds {self.seconds:g}), the "
              f"run ends. This one is in {where}; its stacks: {path}. {self.remedy}",
              file=sys.stderr, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            print(f"rank {self.rank} of {self.world}, {datetime.now():%Y-%m-%d %H:%M:%S}", where,
                  f"this rank last moved {own:.1f} seconds ago, some rank {silence:.1f}", sep="\n", file=file)
            print(file=file, flush=True)
            faulthandler.dump_traceback(file)
