"""Runs the rows of rows.py; python plots.py --table prints what came out.

    python -m study --list                       every run, how train.py is called, and the line with which it ended
    python -m study                              runs what is missing, two at a time (--jobs), one thread each
    python -m study --only permutations/maxrl-2e-4   of these, those whose TASK/ROW-RATE-BASE contains this

A run goes to out/study/TASK/ROW-RATE-BASE, a base's second run to ROW-RATE-BASE.1; when it is complete, its config,
log (three significant digits, seconds in total alone) and evaluations become one line of
results/study/TASK/ROW.jsonl.gz, and the folder goes (`seconds` of its config are those of its last sitting). Ctrl-C
lets the runs finish their step and checkpoint; the same command goes on.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from metrics import Evaluation
from study.logs import Run, kept_lines, row_file
from study.rows import HERE, Trial, trials

OUT = HERE / "out" / "study"
DIGITS = 3
WRITING = threading.Lock()  # two runs of a row may end at once


def recorded(trial: Trial) -> str | None:
    """Its line of results/, a Run in JSON."""
    return kept_lines(row_file(trial.task, trial.row.name)).get(trial.name.partition("/")[2])


def train(trial: Trial) -> str | None:
    """Trains it, or goes on, to the end, and keeps it; None, or what went wrong."""
    folder, start = OUT / trial.name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    commands = [trial.command(folder)]
    if trial.row.decoded:
        commands.append([sys.executable, str(HERE / "eval.py"), "--model", str(folder), "--temperature", "0.6",
                         "--top_p", "0.8", "--top_k", "20", "--out", str(folder / "decoded")])
    for command in commands:
        with open(folder / "output.txt", "a") as output:
            code = subprocess.run(command, cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output,
                                  stderr=subprocess.STDOUT).returncode
        if code:
            last = (folder / "output.txt").read_text().replace("\r", "\n").strip().splitlines()[-1:]
            return f"{trial.name}: {Path(command[1]).name} ended with {code}: {' '.join(last)}"
    keep(folder, time.monotonic() - start)
    shutil.rmtree(folder)
    return None


def rounded(number: str) -> float:
    """Of a number with a fraction in JSON, its DIGITS significant digits."""
    return float(f"{float(number):.{DIGITS}g}")


def keep(folder: Path, seconds: float) -> None:
    """Adds a complete run folder, named ROW-RATE-BASE, to the file of its row, or replaces it there. The same runs give
    the same bytes, in whatever order they came."""
    config, evaluations = (json.loads((folder / name).read_text()) for name in ("config.json", "eval.json"))
    config["seconds"] = round(seconds, 1)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line, parse_float=rounded) for line in lines]
    for line in log:
        line["seconds"] = {"total": line["seconds"]["total"]}
    record = {"name": folder.name, "config": config, "log": log, "evaluations": evaluations}
    if (decoded := folder / "decoded" / "eval.json").exists():
        (record["decoded"],) = json.loads(decoded.read_text())["figures"].values()
    file = row_file(config["preset"], folder.name.rsplit("-", 3)[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    with WRITING:
        lines = {**kept_lines(file), folder.name: json.dumps(record, separators=(",", ":")) + "\n"}
        order = sorted(lines, key=lambda name: (float(name.rpartition("-")[2]), name))
        aside = file.with_name(file.name + ".partial")
        aside.write_bytes(gzip.compress("".join(lines[name] for name in order).encode(), 9, mtime=0))
        aside.replace(file)


def work(chosen: list[Trial], jobs: int) -> int:
    """Trains each; 0, 1 if any failed, 130 after Ctrl-C, which a terminal sends to the running ones too."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            ends = tqdm(pool.map(train, chosen), total=len(chosen), unit="run")
            failures = [failure for failure in ends if failure]
        except KeyboardInterrupt:
            print("stopping when the running ones have written their checkpoints", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
            return 130
    print("\n".join(failures), end="\n" * bool(failures))
    return int(bool(failures))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs whose TASK/ROW-RATE-BASE contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each [2]")
    parser.add_argument("--list", action="store_true", help="say what there is and what came out, and run nothing")
    args = parser.parse_args()
    chosen = trials(args.only)
    if not chosen:
        parser.error(f"--only {args.only}: no run has that in its name")
    if not args.list:
        sys.exit(work([trial for trial in chosen if not recorded(trial)], args.jobs))
    for trial in chosen:
        line = recorded(trial)
        ended = Evaluation(**Run(**json.loads(line)).last()).line() if line else "missing"
        print(f"{trial.name}: {ended}\n    python train.py", *trial.flags())


if __name__ == "__main__":
    main()
