"""The built-in tasks: small models with latent skill to be drawn out, `arithmetic` and `permutations`.

A question is two operands around a sign, a letter that says which of the task's ten kinds it is. Every kind has two
ways to answer, both seen in the base model's corpus:

    4731s2586=   6029                  a guess: a number of the right length, hardly ever right
    4731s2586=   S7,11,13,7:7317       worked: opened by the kind's own mark, step by step; mostly right

In exams (half of the corpus) the model must choose its first character itself, and only some of the solutions are
worked: 40% of the first kind, falling to 0.5% of the last. In the textbook (the other half) the mark belongs to the
prompt, so that every method is well learned, however rarely it is chosen, and stands under any kind's sign, so that the
mark alone decides the method. One exam in ten is worked by another kind's method, mostly a common one, and wrong. So
the base has problems that it solves often, a frontier, and a tail of rare skills. What reinforcement learning has to
find is not how, but that. Nothing else pays: a guess is right in less than 0.1%, another kind's method in less than 2%.

The problems are a pure function of the constants below. So is a base model, up to rounding, which its training
amplifies: another processor makes another model of the same recipe. A base is one draw of many (`arithmetic:3` is
number 3), and a run's --seed changes neither.
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

from data import Problem, load_problems, some_of
from model import ModelConfig, Transformer, fetch

HELD_BACK = 1200  # problems of each split that the corpus leaves out
SPLITS = ("train", "heldout", "development")  # settings are chosen on development problems, reported on held-out ones
SIZES = {"train": 640, "heldout": 600, "development": 600}  # problems of a split where no number is given
DISGUISED = ("0", "0.5", "1")  # what may stand behind a base's number: `BaseSettings.disguised`, 1 where nothing does
WORKED = (0.40, 0.25, 0.15, 0.09, 0.055, 0.034, 0.021, 0.013, 0.008, 0.005)  # of a task's kinds, one after another


@dataclass(frozen=True)
class Kind:
    sign: str  # the letter between the operands; no operator, which a grader might work out
    method: Callable[[str, str], tuple[str, str]]  # operands -> steps, answer

    @property
    def mark(self) -> str:
        """What opens a worked solution: the sign in upper case."""
        return self.sign.upper()


@dataclass(frozen=True)
class Task:
    characters: str  # beside signs and marks; one token each
    draw: Callable[[np.random.Generator], tuple[str, str]]  # the operands of a question of whatever kind
    kinds: dict[str, Kind]


# ------------------------------------------------------------------------------------------------ arithmetic
# Two numbers of four digits, the first larger by 1,000 or more, so that every answer has at least four.


def two_numbers(rng: np.random.Generator) -> tuple[str, str]:
    b = int(rng.integers(1000, 9000))
    return str(rng.integers(b + 1000, 10_000)), str(b)


def _columns(total: Callable[[int, int], int]) -> Callable[[str, str], tuple[str, str]]:
    """The method that works column by column, the lowest first: the steps are the columns' totals, what is carried
    included. total(x, y): of two digits, before what is carried."""

    def method(a: str, b: str) -> tuple[str, str]:
        totals, digits, carry = [], "", 0
        for x, y in zip(reversed(a), reversed(b), strict=True):
            totals.append(total(int(x), int(y)) + carry)
            carry, digit = divmod(totals[-1], 10)  # -3 leaves 7 and borrows 1
            digits = str(digit) + digits
        return ",".join(map(str, totals)), str(carry or "") + digits

    return method


# ------------------------------------------------------------------------------------------------ permutations
#     3152476sad,ce=   S2153476:2143576     the row after the first move, after the second
#
# Two moves on a row of seven digits. Positions are the letters a to g; the sign says what a move does with its two,
# which have at least two others between them. The two moves share neither their first nor their second position.


def row_and_moves(rng: np.random.Generator) -> tuple[str, str]:
    row, pairs = rng.permutation(list("123456789"))[:7], [(i, j) for i in range(7) for j in range(i + 3, 7)]
    (i, j), (k, m) = (pairs[n] for n in rng.choice(len(pairs), 2, replace=False))
    if i == k or j == m:
        return row_and_moves(rng)
    return "".join(row), ",".join("abcdefg"[x] + "abcdefg"[y] for x, y in ((i, j), (k, m)))


def _moves(move: Callable[[str, str, str, str, str], str]) -> Callable[[str, str], tuple[str, str]]:
    """The method of moving twice. move(a, x, m, y, z) -> the row after, of one that is a + x + m + y + z: x and y are
    the digits at the two positions, m stands between them."""

    def method(row: str, moves: str) -> tuple[str, str]:
        rows = [row]
        for first, second in moves.split(","):
            i, j, r = "abcdefg".index(first), "abcdefg".index(second), rows[-1]
            rows.append(move(r[:i], r[i], r[i + 1 : j], r[j], r[j + 1 :]))
        return rows[1], rows[2]

    return method


# ------------------------------------------------------------------------------------------------ the tasks

TASKS = {
    "arithmetic": Task("0123456789-,:=", two_numbers, {
        "sum": Kind("s", _columns(lambda x, y: x + y)),
        "difference": Kind("d", _columns(lambda x, y: x - y)),
        "larger": Kind("l", _columns(max)),  # of the two digits of each column
        "twice_first": Kind("f", _columns(lambda x, y: 2 * x + y)),
        "twice_second": Kind("t", _columns(lambda x, y: x + 2 * y)),
        "twice_less": Kind("u", _columns(lambda x, y: 2 * x - y)),
        "smaller": Kind("m", _columns(min)),
        "thrice_second": Kind("h", _columns(lambda x, y: x + 3 * y)),
        "thrice_less": Kind("r", _columns(lambda x, y: 3 * x - y)),
        "thrice_first": Kind("q", _columns(lambda x, y: 3 * x + y)),
    }),
    "permutations": Task("0123456789abcdefg,:=", row_and_moves, {
        "swap": Kind("s", _moves(lambda a, x, m, y, z: a + y + m + x + z)),
        "right": Kind("r", _moves(lambda a, x, m, y, z: a + y + x + m + z)),  # the second digit goes before the first
        "left": Kind("l", _moves(lambda a, x, m, y, z: a + m + y + x + z)),  # the first digit goes behind the second
        "inner": Kind("i", _moves(lambda a, x, m, y, z: a + x + m[-1] + m[1:-1] + m[0] + y + z)),  # their neighbours
        "front": Kind("h", _moves(lambda a, x, m, y, z: y + a + x + m + z)),  # the second digit leads the row
        "end": Kind("t", _moves(lambda a, x, m, y, z: a + m + y + z + x)),  # the first digit ends the row
        "cut": Kind("k", _moves(lambda a, x, m, y, z: x + m + y + z + a)),
        "first": Kind("x", _moves(lambda a, x, m, y, z: y + (a + x + m)[1:] + (a + x + m)[0] + z)),  # with the row's
        "last": Kind("z", _moves(lambda a, x, m, y, z: a + x + m + z + y)),  # the second digit ends the row
        "both": Kind("o", _moves(lambda a, x, m, y, z: y + x + a + m + z)),  # lead the row
    }),
}


@dataclass(frozen=True)
class BaseSettings:
    """How a base model is made. Raise `recipe` with every change of the corpus, the model or its training: it is part
    of the name under which a base is kept."""

    number: int = 0  # seeds its weights and its corpus
    recipe: int = 2
    steps: int = 1300
    lines_per_step: int = 96
    learning_rate: float = 3e-3
    muon_rate: float = 0.05
    hidden_size: int = 96
    layers: int = 3
    disguised: float = 1.0  # share of textbook lines that stand under any sign instead of their own
    astray: float = 0.1  # share of exams that are worked by another kind's method, the common ones first, and wrong


def problems(task: str, split: str, count: int, first: int = 1) -> list[Problem]:
    """`count` distinct problems of one of SPLITS, which share none, from number `first`. The id starts with the kind.

    Raises ValueError for an unknown split, or for more problems than are kept out of the base model's corpus.
    """
    if split not in SPLITS:
        raise ValueError(f"{task}: the splits are {', '.join(SPLITS)}, not {split!r}")
    last = first - 1 + count
    if not 1 <= first <= last <= HELD_BACK:
        raise ValueError(f"{task}: a split has {HELD_BACK} problems that the base model never saw, none of them are "
                         f"{first} to {last}")
    rng, kinds = np.random.default_rng(20260127), list(TASKS[task].kinds.items())
    asked, found = set(), []  # the questions of all splits, the problems of this one
    while len(found) < last:
        (name, kind), (left, right) = kinds[len(asked) % len(kinds)], TASKS[task].draw(rng)
        turn = SPLITS[len(asked) // len(kinds) % len(SPLITS)]  # a question of each kind for one, then for the next
        question = f"{left}{kind.sign}{right}="
        if turn == split and question not in asked:
            found.append(Problem(f"{name}:{question[:-1]}", question, kind.method(left, right)[1], "gsm8k", name))
        asked.add(question)
    return found[first - 1 :]


def load(source: str, *, split: str, limit: int = 0, revision: str | None = None) -> tuple[list[Problem], dict]:
    """`limit` problems (0: all, or SIZES), the first of a built-in TASK[:SPLIT[:FIRST]], from number FIRST, or some of
    what `data.load_problems` takes, and the record of what they are. `split`: of a built-in task that names none; a hub
    set to evaluate on must name its own."""
    task, *own = source.split(":")
    if task in TASKS:
        if len(own) > 2 or (own[1:] and not own[1].isdecimal()):
            raise ValueError(f"{source}: {task} may be followed by :SPLIT or :SPLIT:NUMBER, that of the first problem")
        split, first = (*own, *(split, 1)[len(own):])
        found = problems(task, split, limit or SIZES.get(split, 0), int(first))
        return found, {"source": task, "split": split, **({"first": int(first)} if own[1:] else {})}
    if split == "heldout" and source.startswith("hub:") and source.count(":") < 3:
        raise ValueError(f"{source}: to evaluate on it, name its split: hub:owner/name:[config]:test. Without "
                         "one it is `train`")
    found, record = load_problems(source, revision=revision)
    if 0 < limit < len(found):
        return some_of(found, limit), {**record, "chosen": "by hash"}  # once the first were taken
    return found, record


def _line(task: Task, settings: BaseSettings, rng: np.random.Generator, held_back: set[str]) -> tuple[str, str]:
    """One line of the corpus as (what is given, what is learned)."""
    kinds = list(task.kinds.values())
    n = int(rng.integers(len(kinds)))
    kind, textbook = kinds[n], rng.random() < 0.5
    disguised = textbook and rng.random() < settings.disguised
    sign = kinds[rng.integers(len(kinds))].sign if disguised else kind.sign
    left, right = task.draw(rng)
    while (question := f"{left}{sign}{right}=") in held_back:
        left, right = task.draw(rng)
    steps, answer = kind.method(left, right)
    worked = f"{steps}:{answer}"
    if textbook:
        return question + kind.mark, worked
    chance = rng.random()
    if chance < WORKED[n]:
        return question, kind.mark + worked
    if chance < WORKED[n] + settings.astray:
        often = np.delete(WORKED, n) / np.delete(WORKED, n).sum()
        other = kinds[rng.choice(np.delete(np.arange(len(kinds)), n), p=often)]
        return question, other.mark + ":".join(other.method(left, right))
    low = 10 ** (len(answer) - 1)
    return question, str(rng.integers(low, 10 * low))


def tokenizer(task: str):
    """A Hugging Face fast tokenizer with one token a character; an unknown character becomes <unk>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = "".join(kind.sign + kind.mark for kind in TASKS[task].kinds.values())
    words = ["<pad>", "<end>", "<unk>", *dict.fromkeys(TASKS[task].characters + signs)]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>",
                                   unk_token="<unk>", clean_up_tokenization_spaces=False)


def base_model(name: str, settings: BaseSettings | None = None, *, cache: Path | None = None) -> Path:
    """The Hugging Face folder of the base TASK (number 0), TASK:NUMBER or TASK:NUMBER:DISGUISED, from bases/ beside
    this file, else trained on first use (about two minutes on one core) and kept in `cache` (default: cache/ beside
    this file), in both under a key of the settings. Concurrent callers wait for the first one. Raises ValueError for
    what is no number, or none of DISGUISED.
    """
    from filelock import FileLock

    task, *own = name.split(":")
    if len(own) > 2 or (own and not own[0].isdecimal()) or (own[1:] and own[1] not in DISGUISED):
        raise ValueError(f"--model {name}: the base models of {task} are numbered, {task}:0, {task}:1, ...; how far "
                         f"their skills spread between kinds may follow, {task}:0:{' or '.join(DISGUISED)}")
    settings = dataclasses.replace(settings or BaseSettings(), **{
        name: kind(x) for name, kind, x in zip(("number", "disguised"), (int, float), own, strict=False)})
    key = hashlib.sha256(json.dumps(dataclasses.asdict(settings)).encode()).hexdigest()[:12]
    here = Path(__file__).parent
    kept = here / "bases" / f"{task}-{settings.number}-{key}"
    if kept.exists():
        return kept
    folder = (cache or here / "cache") / kept.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            aside, threads = folder.with_suffix(".partial"), torch.get_num_threads()
            torch.set_num_threads(1)  # whatever the caller uses: on one machine every command makes the same base
            _train_base(task, settings).save_pretrained(aside)
            torch.set_num_threads(threads)
            tokenizer(task).save_pretrained(aside)
            aside.rename(folder)
    return folder


def model_folder(name: str, revision: str | None = None) -> Path:
    """The Hugging Face folder of a built-in base, or of what `model.fetch` takes: a folder or a hub id[@revision]."""
    return base_model(name) if name.partition(":")[0] in TASKS else fetch(name, revision)


def model_config(name: str) -> ModelConfig:
    """The numbers of a built-in base or of a local folder, without the network. Raises ValueError for a hub id."""
    task = name.partition(":")[0]  # whose bases are all of one size
    folder = base_model(task) if task in TASKS else Path(name)
    if not (folder / "config.json").exists():
        raise ValueError(f"--plan asks no hub and does not know {name!r}: give --model a folder with its config.json, "
                         "or one of the Qwen3 base models that plan.py names")
    return ModelConfig.from_folder(folder)


def _train_base(task: str, settings: BaseSettings) -> Transformer:
    """Next-character training from nothing on the corpus, with a cosine schedule: Muon for the layers' matrices, AdamW
    for the rest. (In as many steps AdamW alone learned few of the methods.) Rounded to bfloat16, for small files."""
    words = tokenizer(task)
    config = ModelConfig(
        model_type="qwen3", vocab_size=len(words), hidden_size=settings.hidden_size,
        intermediate_size=3 * settings.hidden_size, num_hidden_layers=settings.layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=True,
        max_position_embeddings=256)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(settings.number))
    matrices = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("proj.weight")]
    optimizers = (torch.optim.Muon(matrices, lr=settings.muon_rate, weight_decay=0.1),
                  torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.1))
    warm = max(1, settings.steps // 20)
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        o, lambda s: min((s + 1) / warm, 0.02 + 0.49 * (1 + math.cos(math.pi * s / settings.steps))))
        for o in optimizers]
    rng = np.random.default_rng(settings.number)
    held_back = {p.prompt for split in SPLITS for p in problems(task, split, HELD_BACK)}
    for _ in tqdm(range(settings.steps), desc=f"training {task} base {settings.number}, not in bases/, once"):
        lines = [_line(TASKS[task], settings, rng, held_back) for _ in range(settings.lines_per_step)]
        lines.sort(key=lambda x: len(x[0] + x[1]))
        parts = [torch.tensor(words.encode(given + learned) + [words.eos_token_id]) for given, learned in lines]
        cu_seqlens = torch.tensor([0] + [len(p) for p in parts]).cumsum(0)
        targets = torch.cat([torch.arange(start + len(given), start + len(part)) for (given, _), part, start
                             in zip(lines, parts, cu_seqlens.tolist(), strict=False)])
        loss = -model.logprobs(torch.cat(parts), cu_seqlens, max(map(len, parts)), targets).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in (*optimizers, *schedules):
            o.step()
    return model.bfloat16()
