"""Runs the rows of rows.py; python plots.py --table prints what came out.

    python -m study --list                       every run, whether it is done, and how train.py is called
    python -m study                              runs what is missing, two at a time (--jobs), one thread each
    python -m study --only permutations/maxrl-2e-4   of these, those whose TASK/ROW-RATE-BASE contains this
    python -m study --again --only permutations/maxrl-2e-4-3
                                                 runs them once more, done or not, into out/again, and prints recorded
                                                 and new figures side by side; results/ stays as it is

A run goes to out/study/TASK/ROW-RATE-BASE; when it is complete, its config, log (three significant digits, seconds in
total alone) and evaluations become one line of results/study/TASK/ROW.jsonl.gz, and the folder goes (`seconds` of its
config are those of its last sitting). Ctrl-C lets the runs finish their step and checkpoint; the same command goes on.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from metrics import markdown
from study.logs import Run, headline, kept_lines, row_file
from study.rows import HERE, Trial, trials

OUT, AGAIN = HERE / "out" / "study", HERE / "out" / "again"
DIGITS = 3
WRITING = threading.Lock()  # two runs of a row may end at once


def recorded(trial: Trial) -> str | None:
    """Its line of results/, a Run in JSON."""
    return kept_lines(row_file(trial.task, trial.row.name)).get(trial.name.partition("/")[2])


def train(trial: Trial, folder: Path) -> str | None:
    """Trains it into the folder, or goes on there, to the end; None, or what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        code = subprocess.run(trial.command(folder), cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                              stdout=output, stderr=subprocess.STDOUT).returncode
    last = (folder / "output.txt").read_text().replace("\r", "\n").strip().splitlines()[-1:]
    return f"{trial.name}: train.py ended with {code}: {' '.join(last)}" if code else None


def train_and_keep(trial: Trial) -> str | None:
    folder, start = OUT / trial.name, time.monotonic()
    failure = train(trial, folder)
    if not failure:
        keep(folder, time.monotonic() - start)
        shutil.rmtree(folder)
    return failure


def train_again(trial: Trial) -> str | None:
    shutil.rmtree(AGAIN / trial.name, ignore_errors=True)
    return train(trial, AGAIN / trial.name)


def comparison(chosen: list[Trial]) -> str:
    """A table in percent of what is recorded of runs beside what `train_again` gave, of those that came to an end."""
    lines = []
    for trial in chosen:
        line, folder = recorded(trial), AGAIN / trial.name
        if line and (folder / "eval.json").exists():
            old, new = Run(**json.loads(line)).last(), Run.load(folder).last()
            figures = headline(old), headline(new), old["mean"], new["mean"]
            lines.append([trial.name, *(f"{100 * x:.1f}" for x in figures),
                          "yes" if old["by_kind"] == new["by_kind"] else "no"])
    return markdown(["run", "pass@8, recorded", "again", "pass@1, recorded", "again", "equal bit for bit"], lines)


def rounded(number: str) -> float:
    """Of a number with a fraction in JSON, its DIGITS significant digits."""
    return float(f"{float(number):.{DIGITS}g}")


def keep(folder: Path, seconds: float) -> None:
    """Adds a complete run folder, named ROW-RATE-BASE, to the file of its row, or replaces it there. The same runs give
    the same bytes, in whatever order they came."""
    config, evaluations = (json.loads((folder / name).read_text()) for name in ("config.json", "eval.json"))
    if evaluations[-1]["step"] < config["steps"]:
        raise ValueError(f"{folder} is not complete: its last evaluation is of step {evaluations[-1]['step']}")
    config["seconds"] = round(seconds, 1)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line, parse_float=rounded) for line in lines]
    for line in log:
        line["seconds"] = {"total": line["seconds"]["total"]}
    record = {"name": folder.name, "config": config, "log": log, "evaluations": evaluations}
    file = row_file(config["preset"], folder.name.rsplit("-", 3)[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    with WRITING:
        lines = {**kept_lines(file), folder.name: json.dumps(record, separators=(",", ":")) + "\n"}
        order = sorted(lines, key=lambda name: (int(name.rpartition("-")[2]), name))
        aside = file.with_name(file.name + ".partial")
        aside.write_bytes(gzip.compress("".join(lines[name] for name in order).encode(), 9, mtime=0))
        aside.replace(file)


def work(chosen: list[Trial], jobs: int, one: Callable[[Trial], str | None] = train_and_keep) -> int:
    """Does `one` of each; 0, 1 if any failed, 130 after Ctrl-C, which a terminal sends to the running ones too."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            ends = tqdm(pool.map(one, chosen), total=len(chosen), unit="run")
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--list", action="store_true", help="say what there is and what is done, and run nothing")
    instead.add_argument("--again", action="store_true", help="run those of --only once more, and compare")
    args = parser.parse_args()
    chosen = trials(args.only)
    if not chosen:
        parser.error(f"--only {args.only}: no run has that in its name")
    if args.again and not args.only:
        parser.error("--again needs --only: which runs")
    if args.list:
        for trial in chosen:
            flags = {"preset": trial.task, **trial.settings()}
            print("done   " if recorded(trial) else "missing", trial.name, *(f"--{k} {v}" for k, v in flags.items()))
    elif args.again:
        status = work(chosen, args.jobs, train_again)
        print(comparison(chosen))
        sys.exit(status)
    else:
        sys.exit(work([trial for trial in chosen if not recorded(trial)], args.jobs))


if __name__ == "__main__":
    main()
