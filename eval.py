"""How good is a policy? mean@k and pass@k with intervals, on the paper's benchmarks or on any file of problems.

    python eval.py --model out/arithmetic-prompt-0                   # a run: its last evaluation again, with intervals
    python eval.py --model out/arithmetic-prompt-0/best --k 64       # one of its models, as the run evaluates but for k
    python eval.py --model Qwen/Qwen3-1.7B-Base --benchmarks paper
    python eval.py --regrade out/eval-Qwen3-1.7B-Base

The figures are those of metrics.py, as in `train.py --eval_every`; a response cut at the length limit counts as wrong,
as in training. The folder holds eval_samples.jsonl, a line a response, and eval.json. An interrupted evaluation goes on
where it was, and one of other weights, data or settings is refused; with torchrun the problems are dealt out, and the
figures do not depend on the number of processes.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import metrics
import tasks
from config import PROMPT_SUFFIX, Config, add_flag, check_bounds, of_run
from data import HUB_SETS, SUFFIXES, Problem, encode_prompts
from metrics import by_kind, figures, headline_k
from policy import Policy
from ranks import Ranks, RunError, say
from reward import Grader, check_golds
from rollout import Sampling, choose_engine, draw_part, make_engine, rollout_seed
from runfolder import environment, portable, replace_text, write_json
from watchdog import progress, watching

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
    failed: bool  # the grader raised an exception over it: counts as wrong
    prompt: str  # of the problem, without suffix and template
    kind: str  # of the problem


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
    problems = [Problem(id=s.id, prompt=s.prompt, answer=s.gold, style=s.style, kind=s.kind) for s in samples]
    grades = grader.grade([s.response for s in samples], problems, cut=[s.finish == "length" for s in samples])
    return [dataclasses.replace(s, right=g.right, extracted=g.extracted, timed_out=g.timed_out, failed=g.failed)
            for s, g in zip(samples, grades, strict=True)]


def summary(samples: list[Sample]) -> dict[str, dict]:
    """benchmark -> problems, responses, figures, counts and, where its problems have kinds, metrics.by_kind; then
    "aime", if both years are there, and "all"."""
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
        by_problem = [list(group) for _, group in groupby(of, key=lambda s: s.id)]
        if len({len(group) for group in by_problem}) > 1:
            counts = Counter(map(len, by_problem))
            raise ValueError(f"{name}: problems with {sorted(counts)} responses; the file is incomplete or mixed")
        right[name] = np.array([[s.right for s in group] for group in by_problem])
        add(name, [right[name]], of)
        if any(kinds := [group[0].kind for group in by_problem]):
            rows[name]["by_kind"] = by_kind(kinds, right[name])
    if {"aime24", "aime25"} <= right.keys():
        add("aime", [right["aime24"], right["aime25"]], [s for s in samples if s.benchmark in ("aime24", "aime25")])
    if len(right) > 1 and len({r.shape[1] for r in right.values()}) == 1:
        add("all", [np.concatenate(list(right.values()))], samples)
    return rows


def markdown(rows: dict[str, dict], model: str) -> str:
    """The table, in percent with intervals; for a model of the paper, its figures beside ours. Then the kinds."""
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
    blocks = [[head, *lines]]
    for benchmark, row in rows.items():
        if kinds := row.get("by_kind"):
            head = [f"{benchmark}, by kind", "problems", "pass@1", f"pass@{headline_k(row['responses'])}"]
            blocks.append([head, *([kind, str(n), f"{100 * mean:.1f}", f"{100 * passed:.1f}"]
                                   for kind, (n, mean, passed) in kinds.items())])
    pages = [metrics.markdown(head, lines) for head, *lines in blocks]
    return "\n\n".join([pages[0] + note, *pages[1:]])


# ------------------------------------------------------------------------------------------------ a run's model

# flag -> the setting of a run that it is taken from, if not given
FROM_RUN = {"k": "eval_rollouts", "temperature": "eval_temperature", "top_p": "eval_top_p", "top_k": "eval_top_k",
            **{name: name for name in (
                "seed", "max_prompt_tokens", "max_response_tokens", "prompt_suffix", "chat_template", "stop_tokens",
                "answer_style", "reward", "allow_bad_golds", "engine", "dtype", "threads", "max_rollouts",
                "grader_timeout")}}
OF_MACHINE = ("gpu_memory_utilization", "grader_workers", "stall_seconds")
SETTINGS = {flag: Config.__dataclass_fields__[name] for flag, name in
            {**FROM_RUN, **{name: name for name in OF_MACHINE}}.items()}
# Defaults and help of a flag where they are not the setting's.
DEFAULTS = {"max_prompt_tokens": 0, "max_response_tokens": 0, "prompt_suffix": None, "gpu_memory_utilization": 0.85}
HELP = {
    "k": "responses drawn for each problem", "temperature": "0 = greedy, with --k 1", "seed": "of every response",
    "max_prompt_tokens": "longer prompts are left out and counted; 0 = a half of the context, at most 3200",
    "max_response_tokens": "a response cut here counts as wrong; 0 = what the context leaves, at most 4096",
    "gpu_memory_utilization": "vLLM: share of GPU memory",
    "stall_seconds": "end an evaluation in which no rank moves for so long; 0 = never"}


@dataclass(frozen=True)
class Run:
    """A run of train.py, one of whose models is evaluated."""

    folder: Path
    model: Path  # a folder in it: model/, best/
    settings: Config
    loaded: dict  # what it trained and evaluated on, as its config.json has it

    @classmethod
    def find(cls, name: str) -> "Run | None":
        """The run if `name` is its folder or one of a model in it. Raises FileNotFoundError for one without a model."""
        for folder, model in ((Path(name), Path(name) / "model"), (Path(name).parent, Path(name))):
            config = folder / "config.json"
            saved = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
            if "loaded" in saved and model.is_dir():
                return cls(folder, model, of_run(folder, "auto", {})[0], saved["loaded"])
            if "loaded" in saved and folder == Path(name):
                raise FileNotFoundError(f"{name} has no model/ yet: finish it with train.py --out_dir {name} --resume, "
                                        "or name another model in it")
        return None

    @property
    def name(self) -> str:
        run = self.folder.resolve().name
        return run if self.model.name == "model" else f"{run}-{self.model.name}"

    def held_out(self, limit: int) -> tuple[str, list[Problem], dict]:
        """What the run evaluates on, its first `limit` (0: all): name, problems, record. Raises ValueError or
        FileNotFoundError where it cannot be had as it was."""
        cfg, flag = self.settings, "eval_data" if self.settings.eval_data else "train_data"
        source, was = getattr(cfg, flag), self.loaded[flag]
        instead = "name the problems to evaluate on with --benchmarks (and --problems)"
        try:
            problems, record = tasks.load(source, split="heldout" if cfg.eval_data else "train",
                                          limit=limit if cfg.eval_data else cfg.train_problems,
                                          revision=was.get("revision"))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{source}, --{flag} of {self.folder}, is not there: {instead}") from error
        if record.get("sha256") != was.get("sha256"):
            raise ValueError(f"{source}, --{flag} of {self.folder}, has changed since: {instead}")
        if cfg.eval_data:
            return source, problems, record
        last = self.loaded["eval_data"]["last"]  # the end of train_data, not trained on
        return "heldout", problems[-last:][: limit or None], {**record, "last": last}


# ------------------------------------------------------------------------------------------------ drawing


@dataclass
class Benchmark:
    """The problems of one benchmark, encoded."""

    name: str
    problems: list[Problem]
    prompts: list[list[int]]
    record: dict


def load_benchmarks(args: argparse.Namespace, tokenizer, grader: Grader) -> tuple[list[Benchmark], dict[str, str]]:
    """Those that could be had, and why a hub set could not. Raises ValueError or FileNotFoundError for all other
    reasons, and ConnectionError where it is the run's own."""
    sets, found, missing = [], [], {}
    for name in args.benchmarks or []:
        try:
            sets.append((name, *tasks.load(name, split="heldout", limit=args.problems)))
        except ConnectionError as error:
            missing[name] = str(error)
            say(f"WARNING: {name} is left out. {error}")
    for name, problems, record in sets if args.benchmarks else [args.run.held_out(args.problems)]:
        suffix = args.prompt_suffix
        if suffix is None:
            suffix = "" if name.partition(":")[0] in tasks.TASKS else PROMPT_SUFFIX
        problems, prompts, counts = encode_prompts(problems, tokenizer, suffix=suffix, chat_template=args.chat_template,
                                                   max_tokens=args.max_prompt_tokens)
        if counts["too_long"]:
            say(f"{name}: {counts['too_long']} problems over {args.max_prompt_tokens} tokens are left out")
        label = Path(name).stem if name.endswith(SUFFIXES) else name
        if label in {b.name for b in found}:
            raise ValueError(f"two benchmarks are called {label!r}; rename a file or name it once")
        if args.answer_style != "auto":
            problems = [dataclasses.replace(p, style=args.answer_style) for p in problems]
        if not args.reward:
            check_golds(problems, grader, allowed=args.allow_bad_golds, name=label)
        # What is asked, to the token: the record cannot name the code of a built-in task or the tokenizer's files.
        asked = hashlib.blake2b(json.dumps([(p.answer, p.style, ids) for p, ids in zip(problems, prompts, strict=True)]
                                           ).encode(), digest_size=8).hexdigest()
        found.append(Benchmark(label, problems, prompts, {**record, "prompt_suffix": suffix, "encoded": counts,
                                                          "asked": asked}))
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
        batch = draw_part(engine, ranks, [b.prompts[p] for b, p in part], [k] * len(part), seed_P,
                          sampling).exchange(ranks)
        if ranks.rank == 0:
            responses = batch.texts(tokenizer, range(len(batch.owner)))
            drawn = [Sample(name, p.id, j, p.answer, p.style, responses[r], None, False, False, int(batch.lengths[r]),
                            "length" if batch.truncated[r] else "stop", False, p.prompt, p.kind)
                     for r, (name, p, j) in enumerate((b.name, b.problems[p], j) for b, p in part for j in range(k))]
            samples += grade(drawn, grader)
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in samples[-len(drawn):]))
            bar.set_postfix(right=f"{np.mean([s.right for s in samples]):.3f}")
        bar.update(len(part))
    bar.close()
    return samples


# ------------------------------------------------------------------------------------------------ command line


def flags() -> argparse.ArgumentParser:
    usage = ("%(prog)s --model RUN|FOLDER|ID [--benchmarks NAME ...] [option ...]\n"
             "       %(prog)s --regrade FOLDER|FILE [option ...]")
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    built_in = ", ".join(tasks.TASKS)
    add("--model", help="a run of train.py (its last model; RUN/best: its best), evaluated as the run does it: its "
                        f"config.json stands in for all flags but --out, {', '.join(f'--{x}' for x in OF_MACHINE)}; or "
                        f"a Hugging Face folder or hub id; {built_in} = the base model of a built-in task")
    add("--revision", help="hub revision of the model")
    add("--benchmarks", nargs="+", metavar="NAME|FILE",
        help=f"any of {', '.join(n for n in HUB_SETS if n != 'dapo')}, {built_in}, hub:owner/name[:config[:split]], "
             f"or {'/'.join(SUFFIXES)} files, with spaces or commas between; paper = the seven of the paper [those of "
             "the run, else paper]")
    add("--regrade", type=Path, metavar="FOLDER|FILE",
        help="grade the eval_samples.jsonl of an evaluation again, without any model; --answer_style and --reward may "
             "be others")
    add("--problems", type=int, default=0, help="use the first so many of each benchmark; 0 = all [0]")
    add("--out", type=Path, help="folder for eval.json and eval_samples.jsonl [out/eval-RUN or -MODEL, and the "
                                 "benchmarks if given]")
    for flag, setting in SETTINGS.items():
        default = DEFAULTS.get(flag, setting.default)
        usual = f"{PROMPT_SUFFIX!r}, nothing for the built-in tasks" if flag == "prompt_suffix" else repr(default)
        add_flag(parser, setting, flag=flag, default=default, help=HELP.get(flag, ""), usual=usual)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, then what a run's config.json says, then the defaults. `run` is the Run that --model names, or None;
    `benchmarks` None is what that run evaluates on. Raises FileNotFoundError for a run without a model."""
    parser = flags()
    args = parser.parse_args(argv)
    if (args.model is None) == (args.regrade is None):
        parser.error("give --model to evaluate one, or --regrade to grade an evaluation again")
    run = Run.find(args.model) if args.model else None
    if run:
        before = {flag: getattr(run.settings, setting) for flag, setting in FROM_RUN.items()}
        before |= {"problems": run.settings.eval_problems} if args.benchmarks is None else {}
    else:
        before = {"reward": settings_beside(args.regrade).get("reward", "")} if args.regrade else {}
    unusual = {k: v for k, v in before.items() if v != parser.get_default(k)}
    parser.set_defaults(**before, run=run)
    args = parser.parse_args(argv)
    taken = [f"--{k} {shlex.quote(str(v))}" for k, v in unusual.items() if getattr(args, k) == v]
    if run and args.benchmarks is None:
        taken.append(f"on {portable(run.settings.eval_data) or 'what it held out of train_data'}")
    if taken:
        say(f"as in {run.folder if run else args.regrade}:", *taken)
    check(args, parser)
    names = [n for part in args.benchmarks or [] for n in part.split(",") if n]
    if args.model and not args.out:
        parts = [run.name if run else Path(args.model).resolve().name, *([args.revision] if args.revision else []),
                 *(Path(n).stem if n.endswith(SUFFIXES) else n for n in names)]
        args.out = Path("out") / re.sub(r"[^\w.-]+", "-", "-".join(["eval", *parts]))
    if names or not run:
        names = [m for n in names or ["paper"] for m in (PAPER_BENCHMARKS if n == "paper" else (n,))]
        args.benchmarks = list(dict.fromkeys(names))
    return args


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with what is wrong with a value."""
    try:
        for flag, setting in SETTINGS.items():
            check_bounds(setting, getattr(args, flag), flag)
    except ValueError as error:
        parser.error(str(error))
    if args.problems < 0:
        parser.error(f"--problems must be at least 0, got {args.problems}")
    if args.temperature == 0 and args.k > 1:
        parser.error("--temperature 0 gives the same response every time: use it with --k 1")
    if args.out and (args.out / "config.json").exists():
        parser.error(f"--out {args.out} holds a run or a model, whose eval.json must stay; choose another")


# ------------------------------------------------------------------------------------------------ the two commands


def settings_beside(samples: Path) -> dict:
    """What eval.json says of the evaluation whose eval_samples.jsonl, or whose folder, this is; {} without one."""
    path = (samples if samples.is_dir() else samples.parent) / "eval.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return saved["settings"] if "settings" in saved else {}  # a run's own eval.json is a list


def regrade(args: argparse.Namespace) -> None:
    path = args.regrade / "eval_samples.jsonl" if args.regrade.is_dir() else args.regrade
    if not path.exists():
        raise ValueError(f"--regrade {args.regrade}: there is no {path}; an evaluation has one, a run has none: first "
                         "eval.py --model RUN")
    old = read_samples(path)
    if not old:
        raise ValueError(f"{path.name} holds no samples")
    asked = old if args.answer_style == "auto" else [dataclasses.replace(s, style=args.answer_style) for s in old]
    with Grader(workers=args.grader_workers, timeout=args.grader_timeout, reward=args.reward) as grader:
        new = grade(asked, grader)
    rows, model = summary(new), settings_beside(path).get("model", "")
    print(markdown(rows, model))
    print(f"\n{sum(a.right != b.right for a, b in zip(old, new, strict=True))} of {len(new)} verdicts changed"
          + ("" if args.out else "; nothing is written without --out"))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        replace_text(args.out / "eval_samples.jsonl", "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in new))
        settings = {"regraded": path.name, "model": model, "answer_style": args.answer_style, **reward_record(grader)}
        write_json(args.out / "eval.json", {"settings": settings, "environment": environment(), "figures": rows})


def reward_record(grader: Grader) -> dict:
    """What eval.json says of the reward; "" = that of reward.py."""
    source = grader.source
    return {"reward": portable(f"{source.path}:{source.function}"), "reward_sha256": source.sha256} if source else {
        "reward": ""}


def differences(saved, now, name: str) -> Iterator[str]:
    """What two settings of an evaluation differ in, as "k 8", with the value of the saved one."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in {**saved, **now}:
            yield from differences(saved.get(key), now.get(key), f"{name} {key}".strip())
    elif saved != now:
        yield f"{name} {saved!r}"


def refuse_another(out: Path, settings: dict) -> None:
    """Raises FileExistsError where `out` holds an evaluation that is not this one."""
    if not (out / "eval.json").exists() and not (out / "eval_samples.jsonl").exists():
        return
    saved = settings_beside(out)
    if saved.get("weights") != settings["weights"]:
        what = "was made of other weights" if "weights" in saved else "does not say of which weights it was made"
        raise FileExistsError(f"{out} {what}; choose another --out or delete it")
    named = {"model": None, "folder": None}  # what the weights are called where they lie now
    if differing := list(differences({**saved, **named}, {**settings, **named}, "")):
        raise FileExistsError(f"{out} holds an evaluation with {', '.join(differing)}; choose another --out")


def evaluate(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    ranks, run = Ranks(), args.run
    policy = Policy.open(run.model if run else tasks.model_folder(args.model, args.revision), dtype=args.dtype,
                         device=ranks.device, stop_tokens=args.stop_tokens)
    args.max_prompt_tokens, args.max_response_tokens = policy.config.limits(
        args.max_prompt_tokens, args.max_response_tokens, *([] if run else [(3200, 4096)]))
    kind, why = choose_engine(args.engine, ranks.device)
    say(f"engine: {kind}. {why}")
    with Grader(workers=args.grader_workers, timeout=args.grader_timeout, reward=args.reward) as grader:
        benchmarks, missing = load_benchmarks(args, policy.tokenizer, grader)
        if not benchmarks:
            raise ValueError("no benchmark could be loaded")
        names = ("k", "temperature", "top_p", "top_k", "seed", "max_prompt_tokens", "max_response_tokens",
                 "chat_template", "answer_style")
        settings = {"model": run.name if run else portable(args.model), "folder": policy.folder.name,
                    "weights": policy.weights_hash() if ranks.rank == 0 else "", "engine": kind,
                    "dtype": str(policy.dtype)[6:], **{name: getattr(args, name) for name in names},
                    "stop_ids": list(policy.stop_ids), **reward_record(grader),
                    "benchmarks": {b.name: {"problems": len(b.problems), **b.record} for b in benchmarks}}
        if run and args.reward == run.settings.reward and (
                settings.get("reward_sha256") != run.loaded.get("reward", {}).get("sha256")):
            say(f"WARNING: {args.reward} has changed since the run, whose own figures may differ")
        if ranks.rank == 0:
            refuse_another(args.out, settings)
        progress("engine")  # from here on, with all downloads done, the watchdog watches
        engine = make_engine(kind, policy.folder, dtype=policy.dtype, device=ranks.device, seed=args.seed,
                             max_prompt_tokens=args.max_prompt_tokens, max_response_tokens=args.max_response_tokens,
                             max_rollouts=args.max_rollouts, gpu_memory_utilization=args.gpu_memory_utilization)
        if ranks.rank == 0 and not (args.out / "eval.json").exists():  # only now that the model runs
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(args.out / "eval.json", {"settings": settings})
        sampling = Sampling(args.max_response_tokens, args.temperature, args.top_p, args.top_k, policy.stop_ids)
        samples = draw_samples(benchmarks, args.out / "eval_samples.jsonl", engine, ranks, policy.tokenizer, sampling,
                               k=args.k, seed=args.seed, grader=grader)
    if ranks.rank == 0:
        rows = summary(samples)
        write_json(args.out / "eval.json", {"settings": settings, "missing": missing, "environment": environment(),
                                            "figures": rows})
        print(markdown(rows, settings["model"]))
        for name in missing:
            print(f"left out: {name}")
        print(f"\nfigures: {args.out / 'eval.json'}   responses: {args.out / 'eval_samples.jsonl'}")
    engine.close()
    ranks.leave()


def main() -> None:
    try:
        args = parse_args()
        if args.regrade:
            regrade(args)
        else:
            with watching(args.out, args.stall_seconds, "The same command goes on where it was"):
                evaluate(args)
    except (ValueError, OSError, RunError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        sys.exit("eval.py: interrupted; the same command goes on where it was")


if __name__ == "__main__":
    main()
