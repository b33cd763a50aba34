"""The study: every run behind results/study is a row of this file.

    python study.py --list                        what there is, and what is done
    python study.py                               runs what is missing, two at a time (--jobs), one thread each
    python study.py --only permutations/both      runs whose name contains this; to run them again, delete their file
    python plots.py --table                       what came out

A run goes to out/study/TASK/ROW-SEED; when it is complete, its config, log (four significant digits, seconds in total
alone) and evaluations become one line of results/study/TASK/ROW.jsonl.gz (`seconds` of its config are those of its last
sitting). Ctrl-C lets the runs finish their step and checkpoint; the same command goes on. Settings were chosen on
development problems with seeds from 100 on; the rows report held-out problems with seeds from 0 on. On another
processor the base models are others (tasks.py): run a row again with that which it is held against.
"""

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent
OUT, RESULTS = HERE / "out" / "study", HERE / "results" / "study"
DIGITS = 4
RUNNING: set[subprocess.Popen] = set()
STOP = threading.Event()
WRITING = threading.Lock()  # two runs of a row may end at once


@dataclass(frozen=True)
class Row:
    name: str
    seeds: int  # 0, 1, ...
    flags: dict[str, object] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("arithmetic",)
    against: str = "grpo"  # the row that it is compared with, seed by seed


BOTH_TASKS = ("arithmetic", "permutations")
COMMON = {"engine": "torch", "eval_problems": 1000, "eval_every": 50, "eval_first": False, "save_every": 0}
# Parts of the study -> rows, in the order in which they run. The flags are what differs from the task's preset, whose
# adversary is "tuned"; every row but the bases trains on the same number of rollouts.
PARTS = {
    "The four modes": (
        Row("base", 1, {"steps": 0, "eval_first": True}, BOTH_TASKS),
        Row("grpo", 8, {"mode": "grpo"}, BOTH_TASKS),
        Row("prompt", 8, {"mode": "prompt"}, BOTH_TASKS),
        Row("rollout", 8, {"mode": "rollout"}, BOTH_TASKS),
        Row("both", 8, {"mode": "both"}, BOTH_TASKS),
    ),
    # Nobody had tried another step size before. Run later, on another machine, whose arithmetic made another base model
    # of the same recipe: these rows compare among themselves.
    "Other step sizes, a second base": (
        Row("second-base", 1, {"steps": 0, "eval_first": True}, BOTH_TASKS, "second-base"),
        Row("second-base-grpo", 8, {"mode": "grpo"}, BOTH_TASKS, "second-base-grpo"),
        Row("second-base-rollout", 8, {"mode": "rollout"}, BOTH_TASKS, "second-base-grpo"),
        Row("grpo-4-minibatches", 8, {"mode": "grpo", "minibatch_prompts": 16}, BOTH_TASKS, "second-base-grpo"),
        Row("rollout-4-minibatches", 8, {"mode": "rollout", "minibatch_prompts": 16}, BOTH_TASKS, "grpo-4-minibatches"),
        Row("grpo-lr-4e-4", 8, {"mode": "grpo", "learning_rate": 4e-4}, ("permutations",), "second-base-grpo"),
    ),
    "The paper's settings": (
        Row("paper-prompt", 8, {"adversary": "paper", "mode": "prompt"}),
        Row("paper-rollout", 8, {"adversary": "paper", "mode": "rollout"}),
        Row("paper-both", 8, {"adversary": "paper", "mode": "both"}),
    ),
    "What the adversary sees": (
        Row("prompt-surrogate", 4, {"mode": "prompt", "prompt_signal": "surrogate", "share_normalize": "off"}),
        Row("prompt-variance", 4, {"mode": "prompt", "prompt_signal": "variance"}),
        Row("grpo-1-minibatch", 1, {"mode": "grpo", "minibatch_prompts": 64}),  # all signals are logged in every mode
    ),
    "Who allocates best": (
        Row("rollout-by-prompt", 4, {"mode": "rollout", "averaging": "prompt"}),
        Row("rollout-as-weights", 4, {"mode": "rollout", "allocation": "weights"}),
        Row("rollout-exact", 4, {"mode": "rollout", "rollout_budget": "exact"}),
        Row("rollout-variance", 4, {"mode": "rollout", "rollout_utility": "variance"}),
        Row("rollout-rank", 4, {"mode": "rollout", "rollout_utility": "rank"}),
        Row("rollout-knapsack", 4, {"mode": "rollout", "rollout_utility": "knapsack"}),
        Row("rollout-surrogate", 4, {"mode": "rollout", "rollout_utility": "surrogate"}),
    ),
    "Sensitivity": (
        Row("prompt-any-of-n", 4, {"mode": "prompt", "bin_success": "any"}),
        Row("prompt-no-mean-1", 4, {"mode": "prompt", "mean_one": False}),
        Row("prompt-class-share", 4, {"mode": "prompt", "share_normalize": "on"}),
        Row("prompt-eta-0.65", 4, {"mode": "prompt", "prompt_eta": 0.65}),
        Row("prompt-eta-4", 4, {"mode": "prompt", "prompt_eta": 4}),
        Row("prompt-3-bins", 4, {"mode": "prompt", "bin_edges": "0.4,0.75"}),
        Row("prompt-6-bins", 4, {"mode": "prompt", "bin_edges": "0.1,0.2,0.4,0.6,0.8"}),
        Row("prompt-history-3", 4, {"mode": "prompt", "bin_history": 3}),
        Row("prompt-hysteresis", 4, {"mode": "prompt", "bin_hysteresis": 0.03}),
        Row("prompt-gamma-0.1", 4, {"mode": "prompt", "prompt_gamma": 0.1}),
    ),
}


@dataclass(frozen=True)
class Run:
    task: str
    row: Row
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.row.name}-{self.seed}"

    def command(self) -> list[str]:
        settings = {**COMMON, **self.row.flags, "seed": self.seed, "out_dir": OUT / self.name}
        resume = ["--resume"] if (OUT / self.name / "config.json").exists() else []
        flags = [str(x) for k, v in settings.items() for x in (f"--{k}", v)]
        return [sys.executable, str(HERE / "train.py"), "--preset", self.task, *flags, *resume]

    def done(self) -> bool:
        return f"{self.row.name}-{self.seed}" in kept_lines(row_file(self.task, self.row.name))

    def execute(self) -> str | None:
        """Runs it to the end and keeps what stays; None, or what went wrong."""
        folder, start = OUT / self.name, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "a") as output:
            # A session of its own: Ctrl-C reaches this program alone, which passes it on once (twice would kill).
            process = subprocess.Popen(self.command(), cwd=HERE, env={**os.environ, "OMP_NUM_THREADS": "1"},
                                       stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        RUNNING.add(process)
        if STOP.is_set():  # asked for while this one was being started
            process.terminate()
        code = process.wait()
        RUNNING.discard(process)
        if code:
            last = (folder / "output.txt").read_text().replace("\r", "\n").strip().splitlines()[-1:]
            return f"{self.name}: train.py ended with {code}: {' '.join(last)}"
        keep(folder, time.monotonic() - start)
        return None


def rounded(x):
    """JSON values with floats of DIGITS significant digits."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    if isinstance(x, list):
        return [rounded(v) for v in x]
    return float(f"{x:.{DIGITS}g}") if isinstance(x, float) else x


def row_file(task: str, row: str) -> Path:
    return RESULTS / task / f"{row}.jsonl.gz"


def kept_lines(file: Path) -> dict[str, str]:
    """Name of a run -> its line, of all that a row's file holds. Names come first: none is parsed for them."""
    if not file.exists():
        return {}
    with gzip.open(file, "rt") as lines:
        return {line.split('"', 4)[3]: line for line in lines}


def keep(folder: Path, seconds: float | None = None) -> None:
    """Adds a complete run folder, named ROW-SEED, to the file of its row, or replaces it there. The same runs give the
    same bytes, in whatever order they came."""
    config, evaluations = (json.loads((folder / name).read_text()) for name in ("config.json", "eval.json"))
    if evaluations[-1]["step"] < config["steps"]:
        raise ValueError(f"{folder} is not complete: its last evaluation is of step {evaluations[-1]['step']}")
    if seconds is not None:
        config["seconds"] = round(seconds, 1)
    log = [rounded(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines() if line]
    for line in log:
        line["seconds"] = {"total": line["seconds"]["total"]}
    record = {"name": folder.name, "config": config, "log": log, "evaluations": evaluations}
    file = row_file(config["preset"], folder.name.rpartition("-")[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    with WRITING:
        lines = {**kept_lines(file), folder.name: json.dumps(record, separators=(",", ":")) + "\n"}
        by_seed = sorted(lines, key=lambda name: int(name.rpartition("-")[2]))
        aside = file.with_name(file.name + ".partial")
        aside.write_bytes(gzip.compress("".join(lines[name] for name in by_seed).encode(), 9, mtime=0))
        aside.replace(file)


def runs(only: str) -> list[Run]:
    """All runs whose name contains `only`: part by part, and in it seed by seed, so that what is done early compares
    all rows of a part."""
    parts = [[Run(task, row, seed) for row in rows for task in row.tasks for seed in range(row.seeds)]
             for rows in PARTS.values()]
    return [r for part in parts for r in sorted(part, key=lambda r: r.seed) if only in r.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs whose TASK/ROW-SEED contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each [2]")
    parser.add_argument("--list", action="store_true", help="say what there is and what is done, and run nothing")
    args = parser.parse_args()
    chosen = runs(args.only)
    if not chosen:
        parser.error(f"--only {args.only}: no run has that in its name")
    if args.list:
        for run in chosen:
            flags = {"preset": run.task, "seed": run.seed, **COMMON, **run.row.flags}
            print("done   " if run.done() else "missing", run.name, *(f"--{k} {v}" for k, v in flags.items()))
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(work([r for r in chosen if not r.done()], args.jobs))


def work(missing: list[Run], jobs: int) -> int:
    """Executes the runs; 0, 1 if any failed, 130 after Ctrl-C or SIGTERM."""
    failures: list[str] = []
    bar = tqdm(total=len(missing), unit="run")

    def one(run: Run) -> None:
        if STOP.is_set():
            return
        failure = run.execute()
        bar.update()
        bar.set_postfix_str(run.name)
        if failure and not STOP.is_set():
            failures.append(failure)
            bar.write(failure)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            list(pool.map(one, missing))
        except KeyboardInterrupt:
            STOP.set()
            for process in list(RUNNING):
                process.terminate()
            bar.write("stopping when the running ones have written their checkpoints")
    bar.close()
    return 130 if STOP.is_set() else int(bool(failures))


if __name__ == "__main__":
    main()
