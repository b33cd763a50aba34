"""A run in which nothing moves ends and says where; one that is slow goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import gloo, two_ranks
from torch.multiprocessing.spawn import ProcessExitedException

from ranks import Ranks
from watchdog import progress, watching

ROOT = Path(__file__).parents[1]
pytestmark = two_ranks

# Two ranks that meet in a collective; `body` is what the first one does before.
MEETING = """
import os, signal, sys, time
from ctypes import CDLL, PyDLL
from pathlib import Path
import numpy as np
from ranks import Ranks
from watchdog import progress, watching

def work():
    {body}

with watching(Path(sys.argv[1]), float(sys.argv[2])):
    ranks = Ranks()
    progress("generate", step=7)
    if ranks.rank == 0:
        work()
    ranks.merge(np.ones(1))
ranks.leave()
"""


def start(program: list, *, processes: int = 2, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *launcher]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *(torchrun if processes > 1 else []), *map(str, program)], cwd=ROOT,
                            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def meeting(tmp_path: Path, body: str, seconds: float, **options) -> tuple[int, str, float]:
    """Status, output and duration of MEETING."""
    script, begun = tmp_path / "meeting.py", time.monotonic()
    script.write_text(MEETING.format(body=body))
    process = start([script, tmp_path / "run", seconds], **options)
    output, _ = process.communicate(timeout=100)
    return process.returncode, output, time.monotonic() - begun


def test_a_rank_that_hangs_ends_both_and_their_files_name_phase_step_and_function(tmp_path):
    status, output, took = meeting(tmp_path, "time.sleep(600)", 2)
    assert status != 0 and took < 60, output
    hung, waiting = ((tmp_path / "run" / f"stall-rank{rank}.txt").read_text() for rank in (0, 1))
    assert hung.startswith("rank 0 of 2") and waiting.startswith("rank 1 of 2")
    assert "phase generate, step 7\n" in hung
    last = re.search(r"this rank last moved ([\d.]+) seconds ago", hung)
    assert 2 <= float(last[1]) < 10
    assert " in work\n" in hung and " in merge\n" in waiting
    for rank in (0, 1):
        assert f"rank {rank}: no rank has moved for" in output and f"stall-rank{rank}.txt" in output


@pytest.mark.parametrize("library", ["CDLL", "PyDLL"], ids=["", "that keeps the lock of Python"])
def test_a_call_in_c_is_no_hiding_place(tmp_path, library):
    status, output, took = meeting(tmp_path, f"{library}(None).sleep(600)", 1, processes=1)
    assert status == 1
    if library == "CDLL":
        assert " in work\n" in (tmp_path / "run" / "stall-rank0.txt").read_text()
    else:  # no thread of Python's runs again; a timer in C writes to stderr
        assert " in work\n" in output and took < 60


def test_a_disk_that_does_not_answer_costs_the_file_and_not_the_end(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "stall-rank0.txt")  # to open it is to wait for a reader
    status, output, _ = meeting(tmp_path, "time.sleep(600)", 1, processes=1)
    assert status == 1 and " in work\n" in output


@pytest.mark.parametrize("body, seconds", [
    ("for _ in range(12): time.sleep(0.5); progress()", 2), ("time.sleep(3)", 0)], ids=["", "0 seconds are no limit"])
def test_a_rank_may_wait_as_long_as_another_one_moves(tmp_path, body, seconds):
    status, output, _ = meeting(tmp_path, body, seconds)
    assert status == 0 and not (tmp_path / "run").exists(), output


def test_a_killed_rank_ends_one_that_hears_nothing_of_it_within_the_limit(tmp_path):
    """As with NCCL, whose collectives do not notice: rank 1 is deaf to SIGTERM, and the launcher is patient."""
    script = tmp_path / "deaf.py"
    script.write_text(MEETING.format(body="os.kill(os.getpid(), signal.SIGKILL)").replace(
        "    ranks.merge", "    signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600); ranks.merge"))
    process = start([script, tmp_path / "run", 3], launcher=("--shutdown_timeout", "600"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "rank 1: no rank has moved for" in output
    assert (tmp_path / "run" / "stall-rank1.txt").exists()


def lose(folder: Path) -> None:
    """Rank 0 dies. Rank 1, which takes a SIGTERM for "stop after this step" as train.py does, then wants to meet it."""
    if Ranks().rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with watching(folder / "run", 0):
        progress("generate", step=7)
        Ranks().merge(np.ones(1))


def test_a_collective_that_breaks_ends_the_other_rank_with_one_line(tmp_path):
    with pytest.raises(ProcessExitedException):
        gloo(2, lose, tmp_path)
    (said,) = (tmp_path / "stderr").read_text().split("\n")[1:-1]
    assert said.startswith("rank 1: another rank died or does not answer; the run ends. This one is in phase generate")
    assert "lost-rank1.txt. Go on" in said and "gloo" in (tmp_path / "run" / "lost-rank1.txt").read_text()


def test_ranks_end_with_a_launcher_that_is_killed(tmp_path):
    script = tmp_path / "sleeping.py"
    script.write_text("import os, time\nfrom pathlib import Path\nfrom watchdog import watching\n\n"
                      f"with watching(Path('{tmp_path}'), 0):\n"
                      f"    Path('{tmp_path}', os.environ['RANK']).touch()\n    time.sleep(600)\n")
    process, deadline = start([script]), time.monotonic() + 60
    while not (tmp_path / "0").exists() or not (tmp_path / "1").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate(timeout=20)  # until nobody holds the pipe any more


# ---- train.py


def training(base: Path, out: Path, *extra) -> subprocess.Popen:
    sums = base.parent / "sums.jsonl"
    values = {"model": base, "out_dir": out, "engine": "torch", "prompts_per_step": 24, "minibatch_prompts": 12,
              "train_problems": 72, "eval_problems": 6, "train_data": sums, "eval_data": sums, "eval_every": 0,
              "allow_overlap": 1,
              "max_response_tokens": 8, "save_every": 0, "steps": 500}
    return start(["train.py", "--preset", "arithmetic", *(x for k, v in values.items() for x in (f"--{k}", v)), *extra])


def test_a_run_that_hangs_in_a_phase_ends_and_says_which(base, tmp_path):
    """The second rank waits for a verdict on a response of the first step."""
    reward = tmp_path / "slow.py"
    reward.write_text("import os, time\n\ndef slow(response, problem):\n"
                      f"    begun = os.path.exists('{tmp_path}/run/config.json')\n"
                      "    return time.sleep(600 * begun * int(os.environ['RANK'])) or 1.0\n")
    process = training(base, tmp_path / "run", "--reward", f"{reward}:slow", "--grader_timeout", 600,
                       "--grader_workers", 1, "--stall_seconds", 15)  # workers may take some seconds to start
    output, _ = process.communicate(timeout=100)
    assert process.returncode != 0, output
    waiting, hung = ((tmp_path / "run" / f"stall-rank{rank}.txt").read_text() for rank in (0, 1))
    assert "phase exchange, step 0\n" in waiting and " in exchange\n" in waiting
    assert "phase reward, step 0\n" in hung and "reward.py" in hung and "merge" not in hung


def test_an_evaluation_that_hangs_ends_too_and_says_how_it_goes_on(base, tmp_path):
    (tmp_path / "slow.py").write_text("import time\n\ndef slow(response, problem):\n    return time.sleep(600)\n")
    process = start(["eval.py", "--model", base, "--benchmarks", "arithmetic", "--problems", 4, "--out",
                     tmp_path / "out", "--reward", f"{tmp_path}/slow.py:slow", "--grader_timeout", 600, "--engine",
                     "torch", "--max_response_tokens", 8, "--stall_seconds", 2], processes=1)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "Go on from what was saved" in output, output
    assert "reward.py" in (tmp_path / "out" / "stall-rank0.txt").read_text()


def test_sigterm_to_the_launcher_ends_both_ranks_after_the_step_with_a_checkpoint(base, tmp_path):
    process, metrics = training(base, tmp_path / "run"), tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    done = [json.loads(x)["step"] for x in metrics.read_text().splitlines()][-1] + 1
    assert process.returncode != 0 and f"stopped after {done} steps" in output, output
    assert (tmp_path / "run" / "checkpoint" / f"step_{done}" / "state.json").exists()
    assert not list((tmp_path / "run").glob("stall*"))
