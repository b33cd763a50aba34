"""Ends a run in which nothing moves any more, or a part of which is gone, and leaves in its folder what each rank did.

A kernel that hangs, a collective that one rank never enters, a disk that does not answer: a run would hold its GPUs
until somebody looks. `progress` is called wherever something has moved: at the borders of phases, for each token of a
rollout (TorchEngine), each step of vLLM's engine, each verdict, micro-batch and weight. A thread of each rank watches
its own clock and, through the launcher's store, whether any other rank moved; when none did for --stall_seconds it
writes stall-rankN.txt and ends the process, whatever the main thread is stuck in. Nothing has to be agreed on: ranks
that hang can't agree. A collective that breaks, for another rank is gone, ends this one at once.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import print_exc

POLL_SECONDS = 5.0  # at most, between two looks; a tenth of the limit where that is less
STDERR = 2  # the descriptor: trackers put objects of their own into sys.stderr
LATER = 10.0  # seconds after which the timer in C ends what the watching thread could not


@dataclass
class Work:
    """What this process is at, for those who will ask why it hung."""

    phase: str = "start"
    step: int | None = None
    moves: int = 0             # calls of `progress`
    moved: float = 0.0         # monotonic time of the last one
    others_moved: float = 0.0  # when another rank was last seen to move


_work = Work()


def progress(phase: str | None = None, *, step: int | None = None) -> None:
    """Says that this process moves, and what it is at; what isn't given stays."""
    if phase is not None:
        _work.phase = phase
    if step is not None:
        _work.step = step
    _work.moved = time.monotonic()
    _work.moves += 1


def end_with_parent() -> None:
    """From here on this process ends with the one that started it, even where that is killed by -9. Linux alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG


@contextmanager
def watching(folder: Path, seconds: float) -> Iterator[None]:
    """Inside, the process ends with status 1 once no rank has moved for so many seconds (0 = never), where a
    collective breaks, and when the torchrun that started it is gone.

    The clock starts at the first `progress`: before it a model may have to be downloaded.
    """
    global _work
    _work = Work()
    over, poll = threading.Event(), min(POLL_SECONDS, seconds / 10)
    watch = threading.Thread(target=_watch, args=(over, poll, folder, seconds), daemon=True)
    if seconds:
        watch.start()
    if seconds and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        threading.Thread(target=_listen, args=(over, poll), daemon=True).start()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started it, and not nohup
        end_with_parent()
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError  # here, for the grader's workers import this file and need no torch

        # A collective broke (gloo's errors have no class of their own): nothing more can be done together, even what a
        # SIGTERM asked for.
        if isinstance(error, DistError) or "gloo/transport" in str(error):
            _report(folder, "lost", "another rank died or does not answer", lambda file: print_exc(file=file))
            os._exit(1)
        raise
    finally:
        over.set()
        if seconds:
            watch.join()
        faulthandler.cancel_dump_traceback_later()


# The two threads share nothing with the main one that it could hold while it hangs.


def _silence() -> float:
    """Seconds since any rank moved."""
    return time.monotonic() - max(_work.moved, _work.others_moved) if _work.moves else 0.0


def _watch(over: threading.Event, poll: float, folder: Path, seconds: float) -> None:
    while _silence() <= seconds:
        # Where the main thread hangs and keeps Python's lock, this one never runs again: then a timer in C writes all
        # stacks to stderr and ends the process. So it does if the disk for the report does not answer.
        faulthandler.dump_traceback_later(seconds + LATER, exit=True, file=STDERR)
        if over.wait(poll):
            return
    faulthandler.dump_traceback_later(LATER, exit=True, file=STDERR)
    _report(folder, "stall", f"no rank has moved for {_silence():.0f} seconds (--stall_seconds {seconds:g})",
            faulthandler.dump_traceback)
    faulthandler.cancel_dump_traceback_later()
    time.sleep(3 * poll)  # a rank that goes breaks the others' collectives: let them write first
    os._exit(1)


def _listen(over: threading.Event, poll: float) -> None:
    """Adds this rank's moves to a sum of all ranks' in the launcher's store: while it grows, some rank moves."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    told = total = 0
    while not over.wait(poll):
        moves = _work.moves
        known, total = total, store.add("watchdog/moves", moves - told)
        told = moves
        if total != known:
            _work.others_moved = time.monotonic()


def _report(folder: Path, kind: str, why: str, trace: Callable) -> None:
    """Says on stderr why this rank ends, and writes into KIND-rankN.txt what it was doing and what trace(file) adds."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    path, own, silence = folder / f"{kind}-rank{rank}.txt", time.monotonic() - _work.moved, _silence()
    where = f"phase {_work.phase}" + (f", step {_work.step}" if _work.step is not None else "")
    print(f"\nrank {rank}: {why}; the run ends. This one is in {where}; its trace: {path}. Go on from what was saved "
          "with the same command, of train.py with --resume", file=sys.stderr, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        print(f"rank {rank} of {world}", where,
              f"this rank last moved {own:.1f} seconds ago, some rank {silence:.1f}\n", sep="\n", file=file, flush=True)
        trace(file)
    sys.stdout.flush()
