"""How good is a policy? mean@k and pass@k with intervals, on the paper's benchmarks or on any file of problems.

    python eval.py --model out/arithmetic-prompt-0                   # a run: its last evaluation again, with intervals
    python eval.py --model out/arithmetic-prompt-0/best --k 64      # one of its models, with another k
    python eval.py --model Qwen/Qwen3-1.7B-Base --benchmarks paper
    python eval.py --regrade out/eval-Qwen3-1.7B-Base
    python eval.py --compare out/eval-before out/eval-after          # the paired differences, after - before

The figures are those of metrics.py, as in `train.py --eval_every`; a response cut at the length limit counts as wrong,
as in training, unless a --reward says else. The folder holds eval_samples.jsonl, a line a response, and eval.json. An
interrupted evaluation goes on where it was, a larger --k draws what is missing, and one of other weights, data or
settings is refused; with torchrun the problems are dealt out, and the figures do not depend on the number of processes.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config import ASKED, EVAL_FLAGS, PROMPT_SUFFIX, Config, check_bounds, eval_flag, eval_flags, given_flags, of_run

if __name__ == "__main__":
    given_flags(eval_flags(__doc__))  # answers --help and wrong flags before the seconds that torch takes to import

import numpy as np
import torch
from tqdm import tqdm

import metrics
import tasks
from data import SUFFIXES, Problem, check_overlap, encode_prompts, hold_out
from metrics import by_kind, figures, headline_k, intervals, pass_at_k, whole_lines
from policy import Policy
from ranks import Ranks, RunError, say
from reward import Grader, check_golds
from rollout import Sampling, choose_engine, draw_part, make_engine, rollout_seed
from runfolder import FolderLock, environment, portable, replace_text, write_json
from watchdog import progress, watching

PAPER_BENCHMARKS = ("math500", "aime24", "aime25", "amc23", "minerva", "olympiad", "gpqa")
CHUNK = 64  # problems that a rank draws between two writes to eval_samples.jsonl
PAPER = Path(__file__).parent / "results" / "paper.json"  # its Table 1

# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class Sample:
    """A line of eval_samples.jsonl: one response and the verdict on it."""

    benchmark: str
    id: str  # of the problem, as are prompt (without suffix and template), gold, style (a key of reward.STYLES), kind
    prompt: str
    gold: str
    style: str
    kind: str
    sample: int  # counts the problem's responses from 0
    response: str
    tokens: int
    finish: str  # "stop", or "length" for a response cut at the limit: wrong unless a --reward says else
    extracted: str | None = None
    right: bool = False
    timed_out: bool = False  # the grader gave up: counts as wrong
    failed: bool = False  # the grader raised an exception over it: counts as wrong
    messages: Sequence[dict[str, str]] = ()  # of a chat, as in Problem
    columns: dict[str, object] = field(default_factory=dict)  # the row's others, as in Problem


def lines_of(samples: list[Sample]) -> str:
    return "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in samples)


def read_samples(path: Path) -> list[Sample]:
    """The whole lines of `path`; a last one without its newline was cut by a kill and is left out.

    Raises ValueError for a file that holds something else.
    """
    try:
        return [Sample(**line) for line in whole_lines(path)]
    except TypeError as error:
        raise ValueError(f"{path} holds lines that are not samples: {error}") from error


def grade(samples: list[Sample], grader: Grader) -> list[Sample]:
    """The samples with verdicts of the grader as it is now."""
    problems = [Problem(s.id, s.prompt, s.gold, s.style, s.kind, s.messages, s.columns) for s in samples]
    grades = grader.grade([s.response for s in samples], problems, cut=[s.finish == "length" for s in samples])
    return [dataclasses.replace(s, right=g.reward > 0, extracted=g.extracted, timed_out=g.timed_out, failed=g.failed)
            for s, g in zip(samples, grades, strict=True)]


def by_problem(samples: list[Sample]) -> dict[tuple[str, str], list[Sample]]:
    """(benchmark, id) -> the responses to this problem, wherever among the samples they stand."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for s in samples:
        groups.setdefault((s.benchmark, s.id), []).append(s)
    if len({len(group) for group in groups.values()}) > 1:
        raise ValueError("some problems have more responses than others; the evaluation is incomplete or mixed")
    return groups


def table_rows(names: list[str]) -> dict[str, list[str]]:
    """Row of a table -> its benchmarks: each of `names`; then "aime", whose two years have 30 problems each, and "all".
    """
    together = {name: [name] for name in names}
    if {"aime24", "aime25"} <= together.keys():
        together["aime"] = ["aime24", "aime25"]
    return together | ({"all": names} if len(names) > 1 else {})


def summary(samples: list[Sample]) -> dict[str, dict]:
    """Row -> problems, responses, figures, counts, styles and, of a benchmark whose problems have kinds,
    metrics.by_kind and figures of each."""
    groups, names, rows = by_problem(samples), list(dict.fromkeys(s.benchmark for s in samples)), {}
    for row, benchmarks in table_rows(names).items():
        asked = [group for (benchmark, _), group in groups.items() if benchmark in benchmarks]
        of = [s for group in asked for s in group]
        right = np.array([[s.right for s in group] for group in asked])
        rows[row] = {"problems": len(right), "responses": right.shape[1], **figures(right),
                     "tokens_mean": float(np.mean([s.tokens for s in of])),
                     "truncated_frac": float(np.mean([s.finish == "length" for s in of])),
                     "no_answer_frac": float(np.mean([s.extracted is None for s in of])),
                     "grader_timeouts": sum(s.timed_out for s in of), "grader_failures": sum(s.failed for s in of),
                     "styles": sorted({s.style for s in of})}
        if row in names and any(kinds := [group[0].kind for group in asked]):
            rows[row]["by_kind"] = by_kind(kinds, right)
            kind_P = np.array([kind or "all" for kind in kinds])
            rows[row]["by_kind_figures"] = {kind: figures(right[kind_P == kind]) for kind in rows[row]["by_kind"]}
    return rows


def cell(figure: Sequence[float | None], sign: str = "") -> str:
    """A value and its interval, of 1, as percent: 12.5 [8.1, 17.0], or 12.5 [-] where it is unknown."""
    value, *ends = [f"{100 * x:{sign}.1f}" for x in figure if x is not None]
    return f"{value} [{', '.join(ends) or '-'}]"


def markdown(rows: dict[str, dict], model: str, reward: str = "") -> str:
    """The table, in percent with intervals; for a model of the paper, its mean@8, and pass@8 over all, beside ours.
    Then, of each row, the kinds and what was not graded. pass@1 is mean@m and left out. reward: one's own, if any."""
    names = [n for n in next(iter(rows.values())) if n.startswith(("mean@", "pass@")) and n != "pass@1"]
    published = json.loads(PAPER.read_text(encoding="utf-8"))
    methods = next((m for size, m in published["table"].items() if f"Qwen3-{size}" in model), {})
    columns = published["columns"]
    lines = []
    for benchmark, row in rows.items():
        graded = [reward, "-"] if reward else [", ".join(row["styles"]), f"{100 * row['no_answer_frac']:.1f}"]
        column = "pass@8" if benchmark == "all" and rows.keys() >= set(PAPER_BENCHMARKS) else benchmark
        paper = [f"{m[columns.index(column)]:.2f}" if column in columns else "" for m in methods.values()]
        lines.append([benchmark, str(row["problems"]), *(cell(row[n]) for n in names), *graded,
                      f"{100 * row['truncated_frac']:.1f}", *paper])
    head = ["benchmark", "problems", *names, "style", "no answer", "cut", *(f"paper, {m}" for m in methods)]
    pages = ["Percent [95% interval]; no answer: none was found in this style, or cut", metrics.markdown(head, lines)]
    for benchmark, row in rows.items():
        if kinds := row.get("by_kind"):
            lines = [[kind, str(n), *(cell(row["by_kind_figures"][kind][name]) for name in names)]
                     for kind, (n, *_) in kinds.items()]
            pages.append(metrics.markdown([f"{benchmark}, by kind", "problems", *names], lines))
        counts = row["problems"] * row["responses"], row["grader_timeouts"], row["grader_failures"]
        pages += [f"{benchmark}: {said}"] if (said := metrics.ungraded(*counts)) else []
    return "\n\n".join(pages)


# ------------------------------------------------------------------------------------------------ a run's model


@dataclass(frozen=True)
class TrainedRun:
    """A run of train.py, one of whose models is evaluated."""

    folder: Path
    model: Path  # a folder in it: model/, best/
    loaded: dict  # what it trained and evaluated on, as its config.json has it

    @classmethod
    def find(cls, name: str) -> "TrainedRun | None":
        """The run if `name` is its folder or one of a model in it. Raises FileNotFoundError for one without a model."""
        path = Path(name)
        for folder, model in ((path, path / "model"), (path.parent, path)):
            config = folder / "config.json"
            loaded = json.loads(config.read_text(encoding="utf-8")).get("loaded") if config.exists() else None
            if loaded and model.is_dir():
                return cls(folder, model, loaded)
            if loaded and folder == path:
                others = ", ".join(str(p.parent) for p in path.glob("*/config.json"))
                raise FileNotFoundError(f"{name} has no model/ yet: finish it with train.py --out_dir {name} --resume, "
                                        f"or name another model; in it are: {others or 'none'}")
        return None

    @property
    def name(self) -> str:
        run = self.folder.resolve().name
        return run if self.model.name == "model" else f"{run}-{self.model.name}"

    def held_out(self, cfg: Config) -> tuple[str, list[Problem], dict]:
        """What the run evaluates on, its first cfg.eval_problems (0: all): name, problems, record. Raises ValueError or
        FileNotFoundError where it cannot be had as it was."""
        if cfg.eval_data:
            return cfg.eval_data, *self._load("eval_data", cfg.eval_data, "heldout", cfg.eval_problems)
        problems, record = self._load("train_data", cfg.train_data, "train", cfg.train_problems)
        _, held_out, chosen = hold_out(problems, self.loaded["eval_data"])
        return "heldout", held_out[: cfg.eval_problems or None], {**record, **chosen}

    def trained_on(self, cfg: Config) -> list[Problem]:
        """What the run trained on; nothing, and a line that says so, where that is not here as it was."""
        try:
            if "repo" in self.loaded["train_data"]:
                raise ValueError(f"{cfg.train_data} is on the hub")
            problems, _ = self._load("train_data", cfg.train_data, "train", cfg.train_problems)
        except (ValueError, FileNotFoundError) as error:
            say(f"how many problems stand in what the run trained on, too, is not counted: {error}")
            return []
        return problems if cfg.eval_data else hold_out(problems, self.loaded["eval_data"])[0]

    def _load(self, flag: str, source: str, split: str, limit: int) -> tuple[list[Problem], dict]:
        was = self.loaded[flag]
        problems, record = tasks.load(source, split=split, limit=limit, revision=was.get("revision"))
        if any(record.get(k) != was.get(k) for k in ("sha256", "chosen")):
            raise ValueError(f"{source}, or what --{flag} of {self.folder} takes of it, has changed since: name the "
                             "problems to evaluate on with --benchmarks")
        return problems, record


# ------------------------------------------------------------------------------------------------ drawing

Question = tuple[str, Problem, list[int]]  # benchmark, problem, its prompt encoded


def load_benchmarks(args: argparse.Namespace, cfg: Config, policy: Policy,
                    grader: Grader) -> tuple[list[Question], dict[str, dict]]:
    """All that is asked, and the record of each benchmark by its name. Hub sets that cannot be had are left out with a
    warning: gpqa wants a login. Raises ValueError or FileNotFoundError for another, and where none is left."""
    sets, questions, records = [] if args.benchmarks else [args.run.held_out(cfg)], [], {}
    for name in args.benchmarks or []:
        try:
            sets.append((name, *tasks.load(name, split="heldout", limit=cfg.eval_problems)))
        except ConnectionError as error:
            say(f"WARNING: {name} is left out. {error}")
    if not sets:
        raise ValueError("no benchmark could be loaded")
    trained_on = args.run.trained_on(cfg) if args.run and args.benchmarks else []
    for name, problems, record in sets:
        label = label_of(name)
        if label in records:
            raise ValueError(f"two benchmarks are called {label!r}; rename a file or name it once")
        check_overlap(trained_on, problems, allowed=1, name=label)
        suffix = cfg.prompt_suffix
        if suffix is None:
            suffix = "" if name.partition(":")[0] in tasks.TASKS else PROMPT_SUFFIX
        problems, prompts, counts = encode_prompts(
            problems, policy.tokenizer, suffix=suffix, chat_template=cfg.chat_template,
            max_tokens=cfg.max_prompt_tokens, rows=policy.config.vocab_size)
        if counts["too_long"]:
            say(f"{label}: {counts['too_long']} problems over {cfg.max_prompt_tokens} tokens are left out")
        if cfg.answer_style != "auto":
            problems = [dataclasses.replace(p, style=cfg.answer_style) for p in problems]
        check_golds(problems, grader, allowed=cfg.allow_bad_golds, name=label)
        # What is asked, to the token: the record cannot name the code of a built-in task or the tokenizer's files.
        asked = json.dumps([(p.answer, p.style, ids) for p, ids in zip(problems, prompts, strict=True)])
        records[label] = {"problems": len(problems), **record, "prompt_suffix": suffix, "encoded": counts,
                          "asked": hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()}
        questions += [(label, problem, tokens) for problem, tokens in zip(problems, prompts, strict=True)]
    return questions, records


def draw_samples(questions: list[Question], path: Path, engine, ranks: Ranks, policy: Policy, sampling: Sampling, *,
                 had: int, k: int, seed: int, grader: Grader, lock: FolderLock) -> list[Sample]:
    """Draws, grades and appends to `path` what is not there yet, each rank its part; all samples, in order, on rank 0.

    had: responses to a problem, up to k, of the evaluation that the folder holds. The others come behind it, the same
    as if all k were drawn at once, up to floating point.
    """
    chunk, samples = CHUNK * ranks.world, []
    # As they stand in the file: some questions, and which responses, those from `first` to before `end`.
    work = [(questions[start : start + chunk], first, end) for first, end in ((0, had), (had, k)) if first < end
            for start in range(0, len(questions), chunk)]
    ends = np.cumsum([len(part) * (end - first) for part, first, end in work])  # lines of the file up to there
    if ranks.rank == 0:
        samples = [s for s in read_samples(path) if s.sample < k] if path.exists() else []
        samples = samples[: max(ends[ends <= len(samples)], default=0)]  # whole parts
        replace_text(path, lines_of(samples))
    finished = ranks.from_all(len(samples))[0]
    bar = tqdm(total=len(questions) * k, initial=finished, unit="response", desc="evaluating", disable=ranks.rank > 0)
    for part, first, end in [work[w] for w in np.flatnonzero(ends > finished)]:
        n = end - first
        mine = draw_part(engine, ranks, [tokens for *_, tokens in part], [n] * len(part),
                         [rollout_seed(seed, -1, p.id) for _, p, _ in part], sampling, first=first)
        texts = policy.texts(rollout.tokens for rollout in mine.rollouts)
        drawn = [Sample(benchmark, p.id, p.prompt, p.answer, p.style, p.kind, first + int(r % n), text,
                        len(rollout.tokens), "length" if rollout.truncated else "stop", messages=p.messages,
                        columns=p.columns)
                 for r, text, rollout in zip(mine.mine_R, texts, mine.rollouts, strict=True)
                 for benchmark, p, _ in [part[r // n]]]
        drawn = sum(ranks.from_all(list(zip(mine.mine_R, grade(drawn, grader), strict=True))), [])  # of all ranks
        lock.check()
        if ranks.rank == 0:
            samples += [sample for _, sample in sorted(drawn)]
            with open(path, "a", encoding="utf-8") as file:
                file.write(lines_of(samples[-len(drawn):]))
            bar.set_postfix(right=f"{np.mean([s.right for s in samples]):.3f}")
        bar.update(len(part) * n)
    bar.close()
    return samples


# ------------------------------------------------------------------------------------------------ command line

# Where no run says it: token limits from the model's context, a suffix for all but the built-in tasks, and nearly the
# whole GPU for the engine.
DEFAULTS = {"max_prompt_tokens": 0, "max_response_tokens": 0, "prompt_suffix": None, "gpu_memory_utilization": 0.85}


def label_of(benchmark: str) -> str:
    """As tables and folders have it: of a file, its name without ending."""
    return Path(benchmark).stem if benchmark.endswith(SUFFIXES) else benchmark


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """model, regrade, benchmarks (None: what the run evaluates on), out; `run` is the TrainedRun that --model names, or
    None, and `cfg` the settings: those given, then the run's, then the defaults.

    Raises ValueError for a value that is wrong, FileNotFoundError for a run without a model.
    """
    given, own = given_flags(eval_flags(__doc__), argv), ("model", "regrade", "compare", "benchmarks", "out")
    args = argparse.Namespace(**{name: given.pop(name) for name in own})
    act = {"answer_style", "reward", "grader_workers", "grader_timeout"} if args.regrade else set()
    if not args.model and (idle := [f"--{eval_flag(name)}" for name in given if name not in act]):
        raise ValueError(f"{', '.join(idle)}: what was drawn already cannot be asked for otherwise; --regrade takes "
                         "--reward and --answer_style, --compare nothing else")
    args.run = run = TrainedRun.find(args.model) if args.model else None
    names = args.benchmarks or []
    if args.model and not args.out:
        parts = ["eval", run.name if run else Path(args.model).resolve().name, *map(label_of, names)]
        args.out = Path("out") / re.sub(r"[^\w.-]+", "-", "-".join(parts))
    if run:
        args.cfg, _ = of_run(run.folder, "auto", {"eval_problems": 0, **given} if names else given)
    else:
        before = {"reward": settings_in(args.regrade).get("reward", "")} if args.regrade else {}
        args.cfg = Config(**{**DEFAULTS, **before, **given})
    if names or not run:
        names = [m for n in names or ["paper"] for m in (PAPER_BENCHMARKS if n == "paper" else (n,))]
        args.benchmarks = list(dict.fromkeys(names))
    for name in EVAL_FLAGS:
        check_bounds(Config.__dataclass_fields__[name], getattr(args.cfg, name), eval_flag(name))
    if args.cfg.eval_temperature == 0 and args.cfg.eval_rollouts > 1:
        raise ValueError("--temperature 0 gives the same response every time: use it with --k 1")
    if args.model and (args.out / "config.json").exists():
        raise ValueError(f"--out {args.out} holds a run or a model, whose eval.json must stay; choose another")
    return args


# ------------------------------------------------------------------------------------------------ the two commands


def settings_in(folder: Path) -> dict:
    """Of the evaluation in `folder`, or of that whose file this is, as its eval.json has them; {} without one."""
    path = (folder.parent if folder.is_file() else folder) / "eval.json"
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return saved["settings"] if "settings" in saved else {}  # a run's own eval.json is a list


def saved_samples(path: Path) -> list[Sample]:
    """Of the evaluation in a folder, or of the file of one; says where it was interrupted."""
    samples = read_samples(path if path.is_file() else path / "eval_samples.jsonl")
    asked = sum(record.get("problems", 0) for record in settings_in(path).get("benchmarks", {}).values())
    if (found := len({(s.benchmark, s.id) for s in samples})) < asked:
        say(f"WARNING: {path} holds {found} of {asked} problems: the evaluation was interrupted")
    return samples


def regrade(args: argparse.Namespace) -> None:
    """Prints what the figures would be by the grader as it is now; nothing is written."""
    cfg, old = args.cfg, saved_samples(args.regrade)
    asked = old if cfg.answer_style == "auto" else [dataclasses.replace(s, style=cfg.answer_style) for s in old]
    with Grader(workers=cfg.grader_workers, timeout=cfg.grader_timeout, reward=cfg.reward) as grader:
        new = grade(asked, grader)
    print(markdown(summary(new), settings_in(args.regrade).get("model", ""), cfg.reward))
    print(f"\n{sum(a.right != b.right for a, b in zip(old, new, strict=True))} of {len(new)} verdicts changed")


# In words what no flag says, and in the record of a benchmark.
WORDS = {"weights": "other weights or config.json", "stop_ids": "other --stop_tokens",
         "reward_sha256": "other code in --reward", "sha256": "content",
         "asked": "prompts, tokens or answers", "prompt_suffix": "--prompt_suffix"}


def differences(was: dict, now: dict, here: str = "now") -> list[str]:
    """What tells the settings of an evaluation from those of another, of `here`, in words. The name under which weights
    lie does not."""
    of_was, of_now = was.get("benchmarks", {}), now.get("benchmarks", {})
    was, now = {**was, "benchmarks": " ".join(of_was)}, {**now, "benchmarks": " ".join(of_now)}
    said = [WORDS.get(k) or f"--{eval_flag(k)} {was.get(k)} ({here} {now.get(k)})"
            for k in {**was, **now} if was.get(k) != now.get(k) and k not in ("model", "folder")]
    for name in [name for name in of_was if name in of_now]:
        a, b = of_was[name], of_now[name]
        other = [WORDS.get(k, k) for k in {**a, **b} if a.get(k) != b.get(k) and k != "encoded"]  # "asked" tells it
        said += [f"other {' and '.join(other)} in {name}"] if other else []
    return said


def refuse_another(out: Path, settings: dict) -> int:
    """How many responses to a problem the evaluation in `out` has or began with, those asked for in a new folder.
    Raises FileExistsError where they are more, or it is one of other weights, data or settings."""
    was, k = settings_in(out), settings["eval_rollouts"]
    if not was and not (out / "eval_samples.jsonl").exists():
        return k
    had = was.get("eval_rollouts", k)
    if said := differences({**was, "eval_rollouts": max(k, had)}, settings) if was else ["no eval.json says of what"]:
        raise FileExistsError(f"{out} holds another evaluation: {', '.join(said)}; choose another --out or delete it")
    return had


def compare(a: Path, b: Path) -> None:
    """Prints how much higher the evaluation in `b` is than that in `a`, problem by problem: mean@m, and pass@k for a k
    that both have. Warns of other ways to ask. Raises ValueError where the problems are not the same."""
    for folder in (a, b):
        if not (folder / "eval_samples.jsonl").exists():
            raise ValueError(f"{folder} has no eval_samples.jsonl: it holds no evaluation by eval.py. Of a run or a "
                             f"model make one first, with --model {folder}")
    groups = [by_problem(saved_samples(folder)) for folder in (a, b)]
    asked = [{(s.benchmark, s.id, s.prompt, s.gold) for (s, *_) in of.values()} for of in groups]
    if alone := sorted(asked[0] ^ asked[1]):
        raise ValueError(f"{a} and {b} differ in their problems: {len(alone)} stand in one alone, such as "
                         f"{alone[0][2][:60]!r} of {alone[0][0]}; give both the same --benchmarks and --problems")
    right = [np.array([[s.right for s in of[problem]] for problem in groups[0]]) for of in groups]  # (P, m) each
    drawn, lines = [r.shape[1] for r in right], []
    k = headline_k(min(drawn))
    values = [np.stack((r.mean(axis=1), pass_at_k(r.sum(axis=1), r.shape[1], k)), axis=1) for r in right]  # (P, 2)
    for row, benchmarks in table_rows(list(dict.fromkeys(benchmark for benchmark, _ in groups[0]))).items():
        more = (values[1] - values[0])[[benchmark in benchmarks for benchmark, _ in groups[0]]]
        cells = [cell([x, *ends], "+") for x, ends in zip(more.mean(axis=0), intervals(more, -1.0), strict=True)]
        lines.append([row, str(len(more)), *cells])
    head = ["benchmark", "problems", f"mean@{'/'.join(map(str, dict.fromkeys(drawn)))}", f"pass@{k}"]
    print(f"{b} minus {a}, problem by problem: points [95% interval]\n\n{metrics.markdown(head, lines)}")
    # Flags alone: weights are meant to differ, and tokens with them.
    if said := [words for words in differences(settings_in(a), settings_in(b), "there") if "--" in words]:
        print(f"\nWARNING: {a} was asked or graded in other ways than {b}: {', '.join(said)}")


def evaluate(args: argparse.Namespace) -> None:
    cfg, run = args.cfg, args.run
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    slowest = CHUNK * cfg.eval_rollouts * 2 * cfg.grader_timeout  # seconds that grading may take one rank alone
    ranks = Ranks(max(900, 2 * cfg.stall_seconds) + slowest)
    folder = run.model if run else tasks.model_folder(args.model)
    policy = Policy.open(folder, dtype=cfg.dtype, device=ranks.device, stop_tokens=cfg.stop_tokens)
    prompt, response = policy.config.limits(cfg.max_prompt_tokens, cfg.max_response_tokens,
                                            *([] if run else [(3200, 4096)]))
    cfg = dataclasses.replace(cfg, max_prompt_tokens=prompt, max_response_tokens=response)
    kind, why = choose_engine(cfg.engine, ranks.device)
    say(f"engine: {kind}. {why}")
    with Grader(workers=cfg.grader_workers, timeout=cfg.grader_timeout, reward=cfg.reward) as grader:
        questions, records = load_benchmarks(args, cfg, policy, grader)
        asked = {name: getattr(cfg, name) for name in ASKED}
        settings = {"model": run.name if run else portable(args.model), "folder": folder.name,
                    "weights": policy.weights_hash() if ranks.rank == 0 else "", "engine": kind,
                    "dtype": str(policy.dtype)[6:], **asked, "stop_ids": list(policy.stop_ids),
                    "reward": portable(cfg.reward), "reward_sha256": grader.source.sha256 if grader.source else None,
                    "benchmarks": records}
        say(f"as {run.folder}:" if run else "settings:", *(f"--{eval_flag(k)} {v}" for k, v in asked.items()))
        lock = FolderLock(args.out, ranks)
        had = ranks.from_all(refuse_another(args.out, settings) if ranks.rank == 0 else None)[0]
        progress("engine")  # from here on, with all downloads done, the watchdog watches
        engine = make_engine(kind, folder, dtype=policy.dtype, device=ranks.device, seed=cfg.seed,
                             max_prompt_tokens=prompt, max_response_tokens=response, max_rollouts=cfg.max_rollouts,
                             gpu_memory_utilization=cfg.gpu_memory_utilization)
        if ranks.rank == 0 and not (args.out / "eval.json").exists():  # only now that the model runs
            write_json(args.out / "eval.json", {"settings": settings})
        sampling = Sampling(response, cfg.eval_temperature, cfg.eval_top_p, cfg.eval_top_k, policy.stop_ids)
        samples = draw_samples(questions, args.out / "eval_samples.jsonl", engine, ranks, policy, sampling,
                               had=had, k=cfg.eval_rollouts, seed=cfg.seed, grader=grader, lock=lock)
    if ranks.rank == 0:
        rows = summary(samples)
        write_json(args.out / "eval.json", {"settings": settings, "environment": environment(), "figures": rows})
        print(markdown(rows, settings["model"], settings["reward"]))
        print(f"\nfigures: {args.out / 'eval.json'}   responses: {args.out / 'eval_samples.jsonl'}")
    engine.close()
    ranks.leave()


def main() -> None:
    try:
        args = parse_args()
        if args.regrade:
            regrade(args)
        elif args.compare:
            compare(*args.compare)
        else:
            with watching(args.out, args.cfg.stall_seconds):
                evaluate(args)
    except (ValueError, OSError, RunError) as error:
        sys.exit(f"eval.py: {error}")
    except KeyboardInterrupt:
        say("eval.py: interrupted; the same command goes on where it was")
        sys.exit(130)


if __name__ == "__main__":
    main()
