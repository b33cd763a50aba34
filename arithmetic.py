"""The built-in task: real arithmetic, six kinds of problems, and a small model with latent skill to be drawn out.

Every kind has two ways to answer, both seen in the base model's corpus:

    347+586=   933                                a guess: the digits at once; fails beyond small numbers
    347+586=   A7+6=13,4+8+1=13,3+5+1=9:933       worked: opened by the kind's own mark, digit by digit; succeeds

In exams (half of the corpus) the model must choose its first character itself, and only a share of the solutions is
worked: 40% of the additions, down to 0.5% of the sums of squares. In the textbook (the other half) the mark belongs to
the prompt, so that every method is well learned, however rarely it is chosen. So the base solves easy problems, has a
frontier at 5 to 50%, and a tail of rare skills, each with a mark of its own, that do not spread from one kind of
problem to the next. What reinforcement learning has to find is not how, but that.

The problems and the base model are pure functions of the constants below, never of a run's --seed.
"""

import hashlib
import inspect
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import Problem
from model import ModelConfig, Transformer

CHARACTERS = "0123456789+-*/=,:rqASMTDQ"
PAD, END = "<pad>", "<end>"


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


@dataclass(frozen=True)
class Kind:
    mark: str  # the character that opens a worked solution
    share: float  # of worked solutions among the exams
    make: Callable[[np.random.Generator], tuple[str, str, int]]  # question, steps, answer


KINDS = {
    "addition": Kind("A", 0.40, addition),
    "subtraction": Kind("S", 0.20, subtraction),
    "multiplication": Kind("M", 0.08, multiplication),
    "several_terms": Kind("T", 0.03, several_terms),
    "division": Kind("D", 0.012, division),
    "sum_of_squares": Kind("Q", 0.005, sum_of_squares),
}


@dataclass(frozen=True)
class BaseSettings:
    """How the base model is made."""

    seed: int = 0
    steps: int = 1200
    lines_per_step: int = 96
    learning_rate: float = 3e-3
    hidden_size: int = 128
    layers: int = 3


def problems(split: str, count: int) -> list[Problem]:
    """The first `count` distinct problems of "train" or "heldout"; the two share none. The id starts with the kind."""
    rng = np.random.default_rng(20260127)
    split_of: dict[str, str] = {}
    found: list[Problem] = []
    names = list(KINDS)
    for i in range(1_000_000):
        kind = names[i % len(names)]
        question, _, answer = KINDS[kind].make(rng)
        if question in split_of:
            continue
        split_of[question] = "train" if (len(split_of) // len(names)) % 2 else "heldout"
        if split_of[question] == split:
            found.append(Problem(f"{kind}:{question[:-1]}", question, str(answer), "gsm8k"))
        if len(found) == count:
            return found
    raise ValueError(f"there are not {count} distinct problems")


def _line(rng: np.random.Generator, held_back: set[str]) -> tuple[str, str]:
    """One line of the corpus as (what is given, what is learned)."""
    while True:
        kind = KINDS[list(KINDS)[int(rng.integers(len(KINDS)))]]
        question, steps, answer = kind.make(rng)
        if question not in held_back:
            break
    worked = f"{steps}:{answer}"
    if rng.random() < 0.5:
        return question + kind.mark, worked  # textbook
    return question, kind.mark + worked if rng.random() < kind.share else str(answer)  # exam


def tokenizer():
    """A Hugging Face fast tokenizer with one token a character; an unknown character becomes <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [PAD, END, "<unk>", *CHARACTERS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)


def base_model(settings: BaseSettings | None = None, *, cache: Path | None = None) -> Path:
    """The Hugging Face folder of the base model, trained on first use (about two minutes on two cores).

    Kept in `cache` (default: cache/ beside this file) under a key of the settings, of the corpus (its first lines) and
    of the training code. Concurrent callers wait for the first one.
    """
    from filelock import FileLock

    settings = settings or BaseSettings()
    cache = cache or Path(__file__).parent / "cache"
    rng = np.random.default_rng(settings.seed)
    corpus = [_line(rng, set()) for _ in range(500)]
    recipe = json.dumps([settings.__dict__, CHARACTERS, corpus, inspect.getsource(_train_base)])
    folder = cache / f"arithmetic-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            aside = folder.with_suffix(".partial")
            _train_base(settings).save_pretrained(aside)
            tokenizer().save_pretrained(aside)
            aside.rename(folder)
    return folder


def _train_base(settings: BaseSettings) -> Transformer:
    """Next-character training from nothing on the corpus; AdamW with a cosine schedule."""
    words = tokenizer()
    config = ModelConfig("qwen3", len(words), settings.hidden_size, 3 * settings.hidden_size, settings.layers, 4, 2, 32,
                         10_000.0, 1e-6, True, 256)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(settings.seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    warm = settings.steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * s / settings.steps))))
    rng = np.random.default_rng(settings.seed)
    held_back = {p.prompt for split in ("train", "heldout") for p in problems(split, 1200)}
    bar = tqdm(range(settings.steps), desc="training the arithmetic base model", unit="step")
    for _ in bar:
        lines = sorted((_line(rng, held_back) for _ in range(settings.lines_per_step)), key=lambda x: len(x[0] + x[1]))
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
