"""The built-in tasks: small models with latent skill to be drawn out, `arithmetic` and `permutations`.

Each task has six kinds of problems, and every kind two ways to answer, both seen in the base model's corpus:

    347+586=   412                                a guess: a number of the right length, hardly ever right
    347+586=   A7+6=13,4+8+1=13,3+5+1=9:933       worked: opened by the kind's own mark, digit by digit; mostly right

In exams (half of the corpus) the model must choose its first character itself, and only some of the solutions are
worked: 40% of the first kind, then 20, 8, 3, 1.2 and 0.5%. In the textbook (the other half) the mark belongs to the
prompt, so that every method is well learned, however rarely it is chosen; permutations stand there under any kind's
sign, so that the mark alone decides the method. So the base has problems that it solves often, a frontier, and a tail
of rare skills, each with its own mark. What reinforcement learning has to find is not how, but that.

The problems are a pure function of the constants below. So is the base model, up to rounding, which 1,200 steps
amplify: another processor makes another model of the same recipe. A run's --seed changes neither.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Problem, load_problems
from model import ModelConfig, Transformer

PAD, END = "<pad>", "<end>"
HELD_BACK = 1200  # problems of each split that the corpus leaves out
SPLITS = ("train", "heldout", "development")  # settings are chosen on development problems, reported on held-out ones
SIZES = {"train": 640, "heldout": 500, "development": 500}  # problems of a split where no number is given


@dataclass(frozen=True)
class Kind:
    mark: str  # the character that opens a worked solution
    worked: float  # share of worked solutions among the exams
    make: Callable[[np.random.Generator], tuple[str, str, int]]  # question, steps, answer
    disguise: Callable[[str, np.random.Generator], str] | None = None  # the question as the textbook has it


@dataclass(frozen=True)
class Task:
    characters: str  # one token each
    kinds: dict[str, Kind]


# ------------------------------------------------------------------------------------------------ arithmetic
# Each maker: kind(rng) -> (question, steps, answer).


def _digits(n: int) -> list[int]:
    """Decimal digits, the lowest first."""
    return [int(c) for c in reversed(str(n))]


def _number(rng: np.random.Generator, digits: int) -> int:
    return int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits))


def addition(rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = _number(rng, int(rng.integers(1, 5))), _number(rng, int(rng.integers(1, 5)))
    steps, carry = [], 0
    x, y = _digits(a), _digits(b)
    for i in range(max(len(x), len(y))):
        terms = [d[i] for d in (x, y) if i < len(d)] + [carry] * (carry > 0)
        steps.append("+".join(map(str, terms)) + f"={sum(terms)}" if len(terms) > 1 else str(sum(terms)))
        carry = sum(terms) // 10
    return f"{a}+{b}=", ",".join(steps), a + b


def subtraction(rng: np.random.Generator) -> tuple[str, str, int]:
    a, b = sorted((_number(rng, int(rng.integers(1, 5))), _number(rng, int(rng.integers(1, 5)))), reverse=True)
    steps, borrow, y = [], 0, _digits(b)
    for i, top in enumerate(_digits(a)):
        top -= borrow
        low = y[i] if i < len(y) else 0
        borrow = int(top < low)
        steps.append(f"{top + 10 * borrow}-{low}={top + 10 * borrow - low}")
    return f"{a}-{b}=", ",".join(steps), a - b


def multiplication(rng: np.random.Generator) -> tuple[str, str, int]:
    a, d = _number(rng, int(rng.integers(1, 5))), int(rng.integers(2, 10))
    steps, carry = [], 0
    for x in _digits(a):
        steps.append(f"{x}*{d}" + f"+{carry}" * (carry > 0) + f"={x * d + carry}")
        carry = (x * d + carry) // 10
    return f"{a}*{d}=", ",".join(steps), a * d


def several_terms(rng: np.random.Generator) -> tuple[str, str, int]:
    terms = [int(t) for t in rng.integers(1, 20, int(rng.integers(3, 7)))]
    steps, total = [], terms[0]
    for t in terms[1:]:
        steps.append(f"{total}+{t}={total + t}")
        total += t
    return "+".join(map(str, terms)) + "=", ",".join(steps), total


def division(rng: np.random.Generator) -> tuple[str, str, int]:
    quotient, d = _number(rng, int(rng.integers(1, 5))), int(rng.integers(2, 6))
    steps, rest = [], 0
    for x in reversed(_digits(quotient * d)):
        rest = 10 * rest + x
        steps.append(f"{rest}/{d}={rest // d}r{rest % d}")
        rest %= d
    return f"{quotient * d}/{d}=", ",".join(steps), quotient


def sum_of_squares(rng: np.random.Generator) -> tuple[str, str, int]:
    number = _number(rng, int(rng.integers(2, 5)))
    steps, total = [], 0
    for x in reversed(_digits(number)):
        steps.append(f"{x}*{x}" + f"+{total}" * (total > 0) + f"={total + x * x}")
        total += x * x
    return f"q{number}=", ",".join(steps), total


# ------------------------------------------------------------------------------------------------ permutations
#
#     31524~ad,be=   24531                 a guess
#     31524~ad,be=   W21534,24531:24531    worked: the row after each move
#
# Moves on a row of five digits. Positions are the letters a to e, always two that are not neighbours; the sign after
# the row says what is done there. A wrong move sometimes leads to the right row, more often than a guess.

LENGTH, SIGNS = 5, "~<>^@#"


def _moves(sign: str, move: Callable[[list[str], int, int], list[str]]):
    """The maker of a kind: one or two moves on a row of distinct digits. move(row, i, j), i + 1 < j -> row after."""

    def make(rng: np.random.Generator) -> tuple[str, str, int]:
        row = [str(d) for d in rng.permutation(np.arange(1, 10))[:LENGTH]]
        start, names, rows = "".join(row), [], []
        for _ in range(int(rng.integers(1, 3))):
            i = int(rng.integers(LENGTH - 2))
            j = int(rng.integers(i + 2, LENGTH))
            row = move(row, i, j)
            names.append("abcde"[i] + "abcde"[j])
            rows.append("".join(row))
        return f"{start}{sign}{','.join(names)}=", ",".join(rows), int(rows[-1])

    return make


def any_sign(question: str, rng: np.random.Generator) -> str:
    """The same question under a sign drawn from all six."""
    return question[:LENGTH] + SIGNS[int(rng.integers(len(SIGNS)))] + question[LENGTH + 1 :]


# two digits change places
swap = _moves("~", lambda row, i, j: [*row[:i], row[j], *row[i + 1 : j], row[i], *row[j + 1 :]])
# a stretch is turned round
reverse = _moves("<", lambda row, i, j: [*row[:i], *row[i : j + 1][::-1], *row[j + 1 :]])
# the last digit of a stretch becomes its first
right = _moves(">", lambda row, i, j: [*row[:i], row[j], *row[i:j], *row[j + 1 :]])
# the first digit of a stretch becomes its last
left = _moves("^", lambda row, i, j: [*row[:i], *row[i + 1 : j + 1], row[i], *row[j + 1 :]])
# the second position's digit goes to the front of the row
front = _moves("@", lambda row, i, j: [row[j], *row[:j], *row[j + 1 :]])
# the first position's digit goes to the end of the row
end = _moves("#", lambda row, i, j: [*row[:i], *row[i + 1 :], row[i]])


# ------------------------------------------------------------------------------------------------ the tasks

TASKS = {
    "arithmetic": Task("0123456789+-*/=,:rqASMTDQ", {
        "addition": Kind("A", 0.40, addition),
        "subtraction": Kind("S", 0.20, subtraction),
        "multiplication": Kind("M", 0.08, multiplication),
        "several_terms": Kind("T", 0.03, several_terms),
        "division": Kind("D", 0.012, division),
        "sum_of_squares": Kind("Q", 0.005, sum_of_squares),
    }),
    "permutations": Task("0123456789abcde,:=~<>^@#WVRLFK", {
        "swap": Kind("W", 0.40, swap, any_sign),
        "reverse": Kind("V", 0.20, reverse, any_sign),
        "right": Kind("R", 0.08, right, any_sign),
        "left": Kind("L", 0.03, left, any_sign),
        "front": Kind("F", 0.012, front, any_sign),
        "end": Kind("K", 0.005, end, any_sign),
    }),
}


@dataclass(frozen=True)
class BaseSettings:
    """How the base model is made. Raise `recipe` with every change of the corpus, the model or its training: it is part
    of the name under which a base is kept."""

    recipe: int = 1
    seed: int = 0
    steps: int = 1200
    lines_per_step: int = 96
    learning_rate: float = 3e-3
    hidden_size: int = 128
    layers: int = 3


def problems(task: str, split: str, count: int) -> list[Problem]:
    """The first `count` distinct problems of one of SPLITS, which share none. The id starts with the kind.

    Raises ValueError for an unknown split, or for more problems than are kept out of the base model's corpus.
    """
    if split not in SPLITS:
        raise ValueError(f"{task}: the splits are {', '.join(SPLITS)}, not {split!r}")
    if count > HELD_BACK:
        raise ValueError(f"{task}: a split has {HELD_BACK} problems that the base model never saw, not {count}")
    kinds = TASKS[task].kinds
    rng = np.random.default_rng(20260127)
    split_of: dict[str, str] = {}
    found: list[Problem] = []
    names = list(kinds)
    for i in range(1_000_000):
        kind = names[i % len(names)]
        question, _, answer = kinds[kind].make(rng)
        if question in split_of:
            continue
        split_of[question] = SPLITS[len(split_of) // len(names) % len(SPLITS)]
        if split_of[question] == split:
            found.append(Problem(f"{kind}:{question[:-1]}", question, str(answer), "gsm8k", kind))
        if len(found) == count:
            return found
    raise ValueError(f"there are not {count} distinct problems")


def load(source: str, *, split: str, limit: int = 0, revision: str | None = None) -> tuple[list[Problem], dict]:
    """The first `limit` problems (0: all, or SIZES) of a built-in TASK[:SPLIT] or of what `data.load_problems` takes,
    and the record of what they are. `split`: of a built-in task that names none."""
    task, _, own = source.partition(":")
    if task in TASKS:
        split = own or split
        return problems(task, split, limit or SIZES.get(split, 0)), {"source": task, "split": split}
    found, record = load_problems(source, revision=revision)
    return found[: limit or None], record


def _line(kinds: list[Kind], rng: np.random.Generator, held_back: set[str]) -> tuple[str, str]:
    """One line of the corpus as (what is given, what is learned)."""
    while True:
        kind = kinds[int(rng.integers(len(kinds)))]
        question, steps, answer = kind.make(rng)
        shown = kind.disguise(question, rng) if kind.disguise else question
        if question not in held_back and shown not in held_back:
            break
    worked = f"{steps}:{answer}"
    if rng.random() < 0.5:
        return shown + kind.mark, worked  # textbook
    if rng.random() < kind.worked:
        return question, kind.mark + worked  # exam
    low = 10 ** (len(str(answer)) - 1)
    return question, str(rng.integers(low, 10 * low) if low > 1 else rng.integers(10))


def tokenizer(task: str):
    """A Hugging Face fast tokenizer with one token a character; an unknown character becomes <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, "<unk>", *TASKS[task].characters]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def base_model(task: str, settings: BaseSettings | None = None, *, cache: Path | None = None) -> Path:
    """The Hugging Face folder of the base model, trained on first use (about two minutes on two cores).

    Kept in `cache` (default: cache/ beside this file) under a key of the settings. Concurrent callers wait for the
    first one.
    """
    from filelock import FileLock

    settings = settings or BaseSettings()
    cache = cache or Path(__file__).parent / "cache"
    key = hashlib.sha256(json.dumps(dataclasses.asdict(settings)).encode()).hexdigest()[:12]
    folder = cache / f"{task}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            aside, threads = folder.with_suffix(".partial"), torch.get_num_threads()
            torch.set_num_threads(1)  # whatever the caller uses: on one machine every command makes the same base
            _train_base(task, settings).save_pretrained(aside)
            torch.set_num_threads(threads)
            tokenizer(task).save_pretrained(aside)
            aside.rename(folder)
    return folder


def _train_base(task: str, settings: BaseSettings) -> Transformer:
    """Next-character training from nothing on the corpus; AdamW with a cosine schedule."""
    words, kinds = tokenizer(task), list(TASKS[task].kinds.values())
    config = ModelConfig(
        model_type="qwen3", vocab_size=len(words), hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size, num_hidden_layers=settings.layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=256)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(settings.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    warm = settings.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * s / settings.steps))))
    rng = np.random.default_rng(settings.seed)
    held_back = {p.prompt for split in SPLITS for p in problems(task, split, 1200)}
    bar = tqdm(range(settings.steps), desc=f"training the {task} base model", unit="step")
    for _ in bar:
        lines = [_line(kinds, rng, held_back) for _ in range(settings.lines_per_step)]
        lines.sort(key=lambda x: len(x[0] + x[1]))
        parts = [torch.tensor(words.encode(given + learned) + [words.eos_token_id]) for given, learned in lines]
        cu_seqlens = torch.tensor([0] + [len(p) for p in parts]).cumsum(0)
        targets = torch.cat([torch.arange(start + len(given), start + len(part)) for (given, _), part, start
                             in zip(lines, parts, cu_seqlens.tolist(), strict=False)])
        loss = -model.logprobs(torch.cat(parts), cu_seqlens, max(map(len, parts)), targets).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model
