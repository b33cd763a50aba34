"""The study: every run behind results/study is a row of this file.

    python -m study --list                        what there is, and what is done
    python -m study                               runs what is missing, two at a time (--jobs), one thread each
    python -m study --only permutations/maxrl-2e-4   runs whose name contains this; to run them again, delete their file
    python plots.py --table                       what came out

A run is a row at one learning rate from one base model; its seed is the base's number. It goes to
out/study/TASK/ROW-RATE-BASE; when it is complete, its config, log (three significant digits, seconds in total alone)
and evaluations become one line of results/study/TASK/ROW.jsonl.gz, and the folder goes (`seconds` of its config are
those of its last sitting). Ctrl-C lets the runs finish their step and checkpoint; the same command goes on. The base
models are in bases/; where one is not, it is trained, and on another processor it is another (tasks.py).
"""

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).parent.parent
OUT, RESULTS = HERE / "out" / "study", HERE / "results" / "study"
DIGITS = 3
RUNNING: set[subprocess.Popen] = set()
STOP = threading.Event()
WRITING = threading.Lock()  # two runs of a row may end at once


BOTH_TASKS = ("arithmetic", "permutations")
RATES = (1e-4, 2e-4, 4e-4)
HIGHER = {"permutations": (8e-4,)}  # there 4e-4 was the best of RATES in every row
BEST = {"arithmetic": (2e-4,), "permutations": (4e-4,)}  # in every row of the arena; as in config.RATES


@dataclass(frozen=True)
class Row:
    name: str
    flags: dict[str, object] = field(default_factory=dict)
    against: str = "grpo"  # the row that it is compared with, base by base
    rates: tuple[float, ...] = RATES  # learning rates; a row whose best is at an end gets the next one beyond it
    further: dict[str, tuple[float, ...]] = field(default_factory=lambda: HIGHER)  # such rates, by task
    bases: int = 8  # 0, 1, ...
    first: int = 0  # base; one whose outcome raised a question doesn't answer it
    tasks: tuple[str, ...] = BOTH_TASKS
    disguised: str = "1"  # share of the base's textbook that stands under any sign (tasks.BaseSettings)


def at_best(name: str, flags: dict[str, object], against: str = "grpo", bases: int = 4, disguised: str = "1") -> Row:
    """A row at one rate, that which was the best of its task in the arena."""
    return Row(name, flags, against, (), BEST, bases, disguised=disguised)


ROLLOUT_MAXRL = {"mode": "rollout", "rule": "maxrl"}
RANK_MAXRL = {**ROLLOUT_MAXRL, "rollout_utility": "rank"}
BOTH_MAXRL = {"mode": "both", "rule": "maxrl", "averaging": "prompt"}
PAPER = {"adversary": "paper", "kl_beta": 0.001}
MEMORIES = {"h1": {"bin_history": 1}, "h2": {"bin_history": 2},
            "fine": {"bin_edges": "0.02,0.05,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"}}
COMMON = {"engine": "torch", "eval_problems": 600, "eval_every": 0, "eval_first": False, "save_every": 0}
DIAL = ("0", "0.5")  # shares of the textbook under any sign, beside 1 (Row.disguised)
CURVES = {"steps": 300, "eval_every": 25, "eval_first": True}
LONGER = "Longer: 300 steps"
FRESH = "On fresh bases: rollouts by rank"
ASKED_AGAIN = "The first question again, at 300 steps"
HALF = {task: (rate / 2,) for task, (rate,) in BEST.items()}  # what 300 steps want, as it turned out
TWO_RATES = {task: (*HALF[task], *BEST[task]) for task in BEST}
# Parts of the study -> rows, in the order in which they run. The flags are what differs from the task's preset, whose
# adversary is "tuned"; every row but the bases trains on the same number of rollouts.
PARTS = {
    "The arena": (
        Row("base", {"steps": 0, "eval_first": True}, "base", (1e-4,), {}),
        Row("grpo", {"mode": "grpo"}),
        Row("maxrl", {"mode": "grpo", "rule": "maxrl"}),
        Row("rollout-maxrl", {"mode": "rollout", "rule": "maxrl"}, "maxrl"),
        Row("weights-maxrl", {"mode": "rollout", "rule": "maxrl", "allocation": "weights"}, "maxrl"),
        Row("rollout", {"mode": "rollout"}),
        Row("prompt", {"mode": "prompt"}, "tilt"),
        Row("tilt", {"mode": "grpo", "rule": "tilt"}),
        Row("both-maxrl", BOTH_MAXRL, "maxrl"),
    ),
    "Memory: how long the bins remember": tuple(
        at_best(f"{row}-{name}", {**flags, **memory}, row)
        for row, flags in (("rollout-maxrl", ROLLOUT_MAXRL), ("both-maxrl", BOTH_MAXRL))
        for name, memory in MEMORIES.items()),
    "The paper's settings": (
        Row("paper-grpo", {"mode": "grpo", **PAPER}, "paper-grpo", further={}, bases=4),
        Row("paper-prompt", {"mode": "prompt", **PAPER}, "paper-grpo", further={}, bases=4),
        Row("paper-rollout", {"mode": "rollout", **PAPER}, "paper-grpo", further={}, bases=4),
    ),
    LONGER: tuple(
        Row(f"{row}-300", {**flags, **CURVES}, against, (), HALF, 4)
        for row, flags, against in (
            ("grpo", {"mode": "grpo"}, "grpo-300"), ("maxrl", {"mode": "grpo", "rule": "maxrl"}, "grpo-300"),
            ("rollout", {"mode": "rollout"}, "grpo-300"), ("rollout-maxrl", ROLLOUT_MAXRL, "maxrl-300"))),
    FRESH: tuple(
        Row(f"{row}-fresh", flags, "maxrl-fresh", (), BEST, 16, first=8)
        for row, flags in (
            ("maxrl", {"mode": "grpo", "rule": "maxrl"}), ("rank-maxrl", RANK_MAXRL),
            ("rank-weights-maxrl", {**RANK_MAXRL, "allocation": "weights"}), ("rollout-maxrl", ROLLOUT_MAXRL))),
    ASKED_AGAIN: tuple(
        Row(f"{row}-long", {**flags, "steps": 300}, f"{against}-long", (), TWO_RATES, first=1)
        for row, flags, against in (
            ("maxrl", {"mode": "grpo", "rule": "maxrl"}, "grpo"), ("rollout-maxrl", ROLLOUT_MAXRL, "maxrl"),
            ("weights-maxrl", {**ROLLOUT_MAXRL, "allocation": "weights"}, "maxrl"),
            ("grpo", {"mode": "grpo"}, "grpo"))),
    "Rivals": (
        at_best("dr-grpo", {"mode": "grpo", "rule": "dr_grpo"}),
        *(at_best(f"rollout-{utility}{suffix}", {"mode": "rollout", "rule": rule, "rollout_utility": utility}, against,
                  8 if utility == "rank" and rule == "maxrl" else 4)  # no worse than gain on four
          for rule, suffix, against in (("grpo", "", "rollout"), ("maxrl", "-maxrl", "rollout-maxrl"))
          for utility in ("rank", "variance", "surrogate")),
        at_best("rollout-maxrl-32", {**ROLLOUT_MAXRL, "n_max": 32}, "rollout-maxrl"),
    ),
    "The dial: skills that spread between kinds": tuple(
        at_best(f"{row}-disguised-{share}", flags, f"{against}-disguised-{share}", disguised=share)
        for share in DIAL
        for row, flags, against in (
            ("grpo", {"mode": "grpo"}, "grpo"), ("maxrl", {"mode": "grpo", "rule": "maxrl"}, "grpo"),
            ("rollout-maxrl", ROLLOUT_MAXRL, "maxrl"))),
}


@dataclass(frozen=True)
class Run:
    task: str
    row: Row
    rate: float
    base: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.row.name}-{written(self.rate)}-{self.base}"

    @property
    def model(self) -> str:
        return f"{self.task}:{self.base}" + (f":{self.row.disguised}" if self.row.disguised != "1" else "")

    def settings(self) -> dict[str, object]:
        """What differs from the task's preset."""
        return {**COMMON, "model": self.model, "learning_rate": written(self.rate), **self.row.flags, "seed": self.base}

    def command(self) -> list[str]:
        settings = {**self.settings(), "out_dir": OUT / self.name}
        resume = ["--resume"] if (OUT / self.name / "config.json").exists() else []
        flags = [str(x) for k, v in settings.items() for x in (f"--{k}", v)]
        return [sys.executable, str(HERE / "train.py"), "--preset", self.task, *flags, *resume]

    def done(self) -> bool:
        return self.name.partition("/")[2] in kept_lines(row_file(self.task, self.row.name))

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
        shutil.rmtree(folder)
        return None


def written(rate: float) -> str:
    """0.0002 -> 2e-4"""
    mantissa, exponent = f"{rate:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


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
    """Adds a complete run folder, named ROW-RATE-BASE, to the file of its row, or replaces it there. The same runs give
    the same bytes, in whatever order they came."""
    config, evaluations = (json.loads((folder / name).read_text()) for name in ("config.json", "eval.json"))
    if evaluations[-1]["step"] < config["steps"]:
        raise ValueError(f"{folder} is not complete: its last evaluation is of step {evaluations[-1]['step']}")
    if seconds is not None:
        config["seconds"] = round(seconds, 1)
    log = [rounded(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines() if line]
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


def runs(only: str) -> list[Run]:
    """All runs whose name contains `only`: part by part, and in it base by base, so that what is done early compares
    all rows of a part."""
    parts = [[Run(task, row, rate, base) for row in rows for task in row.tasks
              for rate in (*row.rates, *row.further.get(task, ())) for base in range(row.first, row.bases)]
             for rows in PARTS.values()]
    return [r for part in parts for r in sorted(part, key=lambda r: r.base) if only in r.name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs whose TASK/ROW-RATE-BASE contains this")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each [2]")
    parser.add_argument("--list", action="store_true", help="say what there is and what is done, and run nothing")
    args = parser.parse_args()
    chosen = runs(args.only)
    if not chosen:
        parser.error(f"--only {args.only}: no run has that in its name")
    if args.list:
        for run in chosen:
            flags = {"preset": run.task, **run.settings()}
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
