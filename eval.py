"""How good is a policy? mean@k and pass@k with intervals, on the paper's benchmarks or on any file of problems.

    python eval.py --model Qwen/Qwen3-1.7B-Base --benchmarks paper --k 8 --out out/base
    python eval.py --model out/arithmetic-prompt-0/model --benchmarks arithmetic
    python eval.py --regrade out/base/eval_samples.jsonl

The figures are those of metrics.py, as in `train.py --eval_every`; a response cut at the length limit counts as wrong,
as in training. The folder holds eval_samples.jsonl, a line a response, and eval.json. An interrupted evaluation goes on
where it was; with torchrun the problems are dealt out, and the figures do not depend on the number of processes.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

import tasks
from config import PROMPT_SUFFIX
from data import HUB_SETS, SUFFIXES, Problem, encode_prompts
from metrics import figures
from policy import Policy
from ranks import Ranks, RunError, say
from reward import Grader
from rollout import Sampling, choose_engine, draw_together, make_engine, rollout_seed
from runfolder import environment, portable, replace_text, write_json

PAPER_BENCHMARKS = ("math500", "aime24", "aime25", "amc23", "minerva", "olympiad", "gpqa")
CHUNK = 64  # problems that a rank draws between two writes to eval_samples.jsonl
PAPER = Path(__file__).parent / "results" / "paper.json"  # its Table 1


# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class Sample:
    """A line of eval_samples.jsonl: one response and the verdict on it."""

    benchmark: str
    id: str  # of the problem
    sample: int  # counts the problem's responses from 0
    gold: str
    style: str  # where the answer is looked for, a key of reward.STYLES
    response: str
    extracted: str | None
    right: bool
    timed_out: bool  # the grader gave up: counts as wrong
    tokens: int
    finish: str  # "stop", or "length" for a response cut at the limit: counts as wrong
    failed: bool = False  # math-verify raised an exception over it: counts as wrong


def read_samples(path: Path) -> list[Sample]:
    """The whole lines of `path`; a last one without its newline was cut by a kill and is left out.

    Raises ValueError, naming the line, for one that is not a sample.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            samples.append(Sample(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path.name}, line {number} is not a sample: {error}") from error
    return samples


def grade(samples: list[Sample], grader: Grader) -> list[Sample]:
    """The samples with verdicts of the grader as it is now."""
    grades = grader.grade([s.response for s in samples], [s.gold for s in samples], [s.style for s in samples],
                          cut=[s.finish == "length" for s in samples])
    return [dataclasses.replace(s, right=g.right, extracted=g.extracted, timed_out=g.timed_out, failed=g.failed)
            for s, g in zip(samples, grades, strict=True)]


def summary(samples: list[Sample]) -> dict[str, dict]:
    """benchmark -> problems, responses, figures and counts; then "aime", if both years are there, and "all"."""
    right: dict[str, np.ndarray] = {}
    rows: dict[str, dict] = {}

    def add(name: str, strata: list[np.ndarray], of: list[Sample]) -> None:
        rows[name] = {"problems": sum(map(len, strata)), "responses": strata[0].shape[1], **figures(strata),
                      "tokens_mean": float(np.mean([s.tokens for s in of])),
                      "truncated_frac": float(np.mean([s.finish == "length" for s in of])),
                      "no_answer_frac": float(np.mean([s.extracted is None for s in of])),
                      "grader_timeouts": sum(s.timed_out for s in of), "grader_failures": sum(s.failed for s in of)}

    for name in dict.fromkeys(s.benchmark for s in samples):
        of = [s for s in samples if s.benchmark == name]
        by_problem = [[s.right for s in group] for _, group in groupby(of, key=lambda s: s.id)]
        if len({len(group) for group in by_problem}) > 1:
            counts = Counter(map(len, by_problem))
            raise ValueError(f"{name}: problems with {sorted(counts)} responses; the file is incomplete or mixed")
        right[name] = np.array(by_problem)
        add(name, [right[name]], of)
    if {"aime24", "aime25"} <= right.keys():
        add("aime", [right["aime24"], right["aime25"]], [s for s in samples if s.benchmark in ("aime24", "aime25")])
    if len(right) > 1 and len({r.shape[1] for r in right.values()}) == 1:
        add("all", [np.concatenate(list(right.values()))], samples)
    return rows


def markdown(rows: dict[str, dict], model: str) -> str:
    """The table, in percent with intervals; for a model of the paper, its figures beside ours."""
    names = [n for n in dict.fromkeys(n for row in rows.values() for n in row) if n.startswith(("mean@", "pass@"))]
    published = json.loads(PAPER.read_text(encoding="utf-8")) if PAPER.exists() else {"table": {}, "columns": []}
    methods = next((m for size, m in published["table"].items() if f"-{size}" in model), {})
    columns = published["columns"]
    head = ["benchmark", "problems", *names, "cut", *(f"paper, {m}" for m in methods)]
    lines = []
    for benchmark, row in rows.items():
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in row[n])) if n in row else "" for n in names]
        column = "pass@8" if benchmark == "all" else benchmark
        paper = [f"{m[columns.index(column)]:.2f}" if column in columns else "" for m in methods.values()]
        lines.append([benchmark, str(row["problems"]), *cells, f"{100 * row['truncated_frac']:.1f}%", *paper])
    note = "\n\npaper: mean@8 of each benchmark, and pass@8 over all" if methods else ""
    return "\n".join(f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *lines)) + note


# ------------------------------------------------------------------------------------------------ drawing


@dataclass
class Benchmark:
    """The problems of one benchmark, encoded."""

    name: str
    problems: list[Problem]
    prompts: list[list[int]]
    record: dict


def load_benchmarks(names: Iterable[str], tokenizer, args) -> tuple[list[Benchmark], dict[str, str]]:
    """Those that could be had, and why the others could not."""
    found, missing = [], {}
    for name in names:
        try:
            problems, record = tasks.load(name, split="heldout", limit=args.problems)
        except (ConnectionError, FileNotFoundError) as error:
            missing[portable(name)] = str(error)
            say(f"WARNING: {name} is left out. {error}")
            continue
        problems, prompts, counts = encode_prompts(
            problems, tokenizer, suffix="" if name.partition(":")[0] in tasks.TASKS else args.prompt_suffix,
            chat_template=args.chat_template, max_tokens=args.max_prompt_tokens)
        if counts["too_long"]:
            say(f"{name}: {counts['too_long']} problems over {args.max_prompt_tokens} tokens are left out")
        label = Path(name).stem if name.endswith(SUFFIXES) else name
        if label in {b.name for b in found}:
            raise ValueError(f"two benchmarks are called {label!r}; rename a file or name it once")
        found.append(Benchmark(label, problems, prompts, {**record, "encoded": counts}))
    return found, missing


def draw_samples(benchmarks: list[Benchmark], path: Path, engine, ranks: Ranks, tokenizer, sampling: Sampling, *,
                 k: int, seed: int, grader: Grader) -> list[Sample]:
    """Draws, grades and appends to `path` what is not there yet; all samples, in order, on every rank."""
    work = [(b, p) for b in benchmarks for p in range(len(b.problems))]
    chunk = CHUNK * ranks.world
    done = read_samples(path) if ranks.rank == 0 and path.exists() else []
    finished = len(done) // (chunk * k) * chunk  # problems of whole chunks
    if len(done) == len(work) * k:
        finished = len(work)
    finished = int(ranks.merge(np.array([finished * (ranks.rank == 0)]))[0])
    samples = done[: finished * k]
    if ranks.rank == 0:
        replace_text(path, "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in samples))
    bar = tqdm(total=len(work), initial=finished, unit="problem", desc="evaluating", disable=ranks.rank > 0)
    for start in range(finished, len(work), chunk):
        part = work[start : start + chunk]
        seed_P = [rollout_seed(seed, -1, b.problems[p].id) for b, p in part]
        batch = draw_together(engine, ranks, [b.prompts[p] for b, p in part], [k] * len(part), seed_P, sampling)
        if ranks.rank == 0:
            responses = batch.texts(tokenizer)
            drawn = [Sample(b.name, b.problems[p].id, j, b.problems[p].answer, b.problems[p].style, responses[r], None,
                            False, False, int(batch.lengths[r]), "length" if batch.truncated[r] else "stop")
                     for r, (b, p, j) in enumerate((b, p, j) for b, p in part for j in range(k))]
            samples += grade(drawn, grader)
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in samples[-len(drawn):]))
            bar.set_postfix(right=f"{np.mean([s.right for s in samples]):.3f}")
        bar.update(len(part))
    bar.close()
    return samples


# ------------------------------------------------------------------------------------------------ command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    built_in = ", ".join(tasks.TASKS)
    add("--model", help=f"a Hugging Face folder or hub id; {built_in} = the base model of a built-in task")
    add("--revision", help="hub revision of the model")
    add("--benchmarks", nargs="+", default=["paper"], metavar="NAME|FILE",
        help=f"any of {', '.join(n for n in HUB_SETS if n != 'dapo')}, {built_in}, hub:owner/name[:config[:split]], "
             f"or {'/'.join(SUFFIXES)} files, with spaces or commas between; paper = the seven of the paper [paper]")
    add("--regrade", type=Path, metavar="FILE", help="grade this eval_samples.jsonl again, without any model")
    add("--k", type=int, default=8, help="responses drawn for each problem [8]")
    add("--problems", type=int, default=0, help="use the first so many of each benchmark; 0 = all [0]")
    add("--out", type=Path, help="folder for eval.json and eval_samples.jsonl [out/eval-MODEL]")
    add("--engine", default="auto", choices=["auto", "vllm", "torch"], help="what draws the responses [auto]")
    add("--temperature", type=float, default=0.6, help="0 = greedy, with --k 1 [0.6]")
    add("--top_p", type=float, default=0.8, help="1 = off [0.8]")
    add("--top_k", type=int, default=20, help="0 = off [20]")
    add("--seed", type=int, default=0, help="of every response [0]")
    add("--max_prompt_tokens", type=int, help="longer prompts are left out and counted [a half of the context, at most "
                                              "3200]")
    add("--max_response_tokens", type=int, help="a response cut here counts as wrong [what the context leaves, at most "
                                                "4096]")
    add("--prompt_suffix", default=PROMPT_SUFFIX,
        help=f"appended to every prompt but the built-in tasks' [{PROMPT_SUFFIX!r}]")
    add("--chat_template", default="auto", choices=["auto", "always", "never"],
        help="auto = when the tokenizer has one [auto]")
    add("--dtype", default="auto", choices=["auto", "bfloat16", "float32"], help="auto = bfloat16 on CUDA [auto]")
    add("--max_rollouts", type=int, default=256, help="responses decoded at once [256]")
    add("--gpu_memory_utilization", type=float, default=0.85, help="vLLM: share of GPU memory [0.85]")
    add("--grader_workers", type=int, default=2, help="processes for answers that need math-verify [2]")
    add("--grader_timeout", type=float, default=5.0, help="seconds per answer; past it a response is wrong [5]")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.regrade is None):
        parser.error("give --model to evaluate one, or --regrade to grade a file again")
    for name in ("k", "max_rollouts", "max_prompt_tokens", "max_response_tokens", "grader_workers", "grader_timeout"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(args, name)}")
    if args.temperature < 0 or (args.temperature == 0 and args.k > 1) or not 0 < args.top_p <= 1 or args.top_k < 0:
        parser.error("need --temperature > 0 (or 0 with --k 1), 0 < --top_p <= 1 and --top_k >= 0")
    names = [n for part in args.benchmarks for n in part.split(",") if n]
    args.benchmarks = list(dict.fromkeys(m for n in names for m in (PAPER_BENCHMARKS if n == "paper" else (n,))))
    return args


def regrade(args: argparse.Namespace) -> None:
    old = read_samples(args.regrade)
    if not old:
        raise ValueError(f"{args.regrade.name} holds no samples")
    with Grader(workers=args.grader_workers, timeout=args.grader_timeout) as grader:
        new = grade(old, grader)
    rows, beside = summary(new), args.regrade.with_name("eval.json")
    model = json.loads(beside.read_text())["settings"].get("model", "") if beside.exists() else ""
    print(markdown(rows, model))
    print(f"\n{sum(a.right != b.right for a, b in zip(old, new, strict=True))} of {len(new)} verdicts changed")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        replace_text(args.out / "eval_samples.jsonl", "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in new))
        settings = {"regraded": args.regrade.name, "model": model}
        write_json(args.out / "eval.json", {"settings": settings, "environment": environment(), "figures": rows})


def begin(out: Path, settings: dict, ranks: Ranks) -> None:
    """Opens the folder, or reopens that of the same evaluation; raises FileExistsError for another one's."""
    if ranks.rank == 0:
        path = out / "eval.json"
        if path.exists():
            saved = json.loads(path.read_text())["settings"]
            if differing := [k for k in settings if saved.get(k) != settings[k]]:
                was = ", ".join(f"{k} {saved.get(k)!r}" for k in differing)
                raise FileExistsError(f"{out} holds an evaluation with {was}; choose another --out")
        else:
            out.mkdir(parents=True, exist_ok=True)
            write_json(path, {"settings": settings})


def evaluate(args: argparse.Namespace) -> None:
    ranks = Ranks()
    policy = Policy.open(args.model, revision=args.revision, dtype=args.dtype, device=ranks.device)
    context = policy.config.max_position_embeddings
    args.max_prompt_tokens = args.max_prompt_tokens or min(3200, context // 2)
    args.max_response_tokens = args.max_response_tokens or min(4096, context - args.max_prompt_tokens)
    policy.check_context(args.max_prompt_tokens, args.max_response_tokens)
    benchmarks, missing = load_benchmarks(args.benchmarks, policy.tokenizer, args)
    if not benchmarks:
        raise ValueError("no benchmark could be loaded")
    kind, why = choose_engine(args.engine, ranks.device)
    say(f"engine: {kind}. {why}")
    names = ("k", "temperature", "top_p", "top_k", "seed", "max_prompt_tokens", "max_response_tokens", "prompt_suffix",
             "chat_template")
    settings = {"model": portable(args.model), "folder": policy.folder.name, "engine": kind,
                "dtype": str(policy.dtype)[6:], **{name: getattr(args, name) for name in names},
                "benchmarks": {b.name: {"problems": len(b.problems), **b.record} for b in benchmarks}}
    out = args.out or Path("out") / f"eval-{Path(args.model).name}"
    begin(out, settings, ranks)
    engine = make_engine(kind, policy.folder, dtype=policy.dtype, device=ranks.device, seed=args.seed,
                         max_prompt_tokens=args.max_prompt_tokens, max_response_tokens=args.max_response_tokens,
                         max_rollouts=args.max_rollouts, gpu_memory_utilization=args.gpu_memory_utilization)
    sampling = Sampling(args.max_response_tokens, args.temperature, args.top_p, args.top_k, policy.stop_ids)
    with Grader(workers=args.grader_workers, timeout=args.grader_timeout) as grader:
        samples = draw_samples(benchmarks, out / "eval_samples.jsonl", engine, ranks, policy.tokenizer, sampling,
                               k=args.k, seed=args.seed, grader=grader)
    if ranks.rank == 0:
        rows = summary(samples)
        write_json(out / "eval.json", {"settings": settings, "missing": missing, "environment": environment(),
                                       "figures": rows})
        print(markdown(rows, args.model))
        for name in missing:
            print(f"left out: {name}")
        print(f"\nfigures: {out / 'eval.json'}   responses: {out / 'eval_samples.jsonl'}")
    engine.close()
    ranks.leave()


def main() -> None:
    args = parse_args()
    try:
        regrade(args) if args.regrade else evaluate(args)
    except (ValueError, OSError, RunError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; the same command goes on where it was")


if __name__ == "__main__":
    main()
