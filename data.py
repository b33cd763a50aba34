"""Problems with checkable answers: DAPO and the benchmarks from the Hugging Face hub, or a local file.

Everything is checked before the first step: a training run should not find the row without an answer at night.
The order of prompts is a function of (seed, step), so a resumed run needs no saved sampler.
"""

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reward import STYLES, Problem, boxed

log = logging.getLogger(__name__)

BUILT_IN = ("arithmetic", "permutations")  # the keys of tasks.TASKS, for what must not import tasks
# short name -> (repository, config, split); the ids of the paper's training set and benchmarks
HUB_SETS = {
    "dapo": ("open-r1/DAPO-Math-17k-Processed", "en", "train"),
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("MathArena/aime_2025", None, "train"),
    "amc23": ("math-ai/amc23", None, "test"),
    "minerva": ("math-ai/minervamath", None, "test"),
    "olympiad": ("math-ai/olympiadbench", None, "test"),
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
}
# the first column present is taken; `solution` last, as MATH-500 has both a worked solution and an answer
PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "reward_model")  # the last: raw DAPO and other verl data
KIND_COLUMNS = ("kind", "level", "subject", "type", "category")  # MATH has a level beside its subject or type
ID_COLUMNS = ("id", "uid", "unique_id", "Record ID")
CHOICE_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))  # of GPQA
SUFFIXES = (".jsonl", ".json", ".parquet")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")  # what chat models end a turn with, where it is not their eos token


# ---- loading

def load_problems(source: str, *, revision: str | None = None) -> tuple[list[Problem], dict]:
    """Problems of `source`, and the record of what exactly they are.

    source: a path ending in .jsonl, .json (a list of objects) or .parquet; a key of HUB_SETS; or
        `hub:owner/name[:config[:split]]` (split: train). Columns: PROMPT_COLUMNS and ANSWER_COLUMNS; optional are
        style, KIND_COLUMNS and ID_COLUMNS. Behind a hub set `@` and its commit, branch or tag may stand.
    revision: it, and wins over what `source` says; a full commit sha needs no network if the set is cached.
    Returns the problems in file order, and {source, counts: {rows, merged, conflicting}} with {repo, config, split,
    revision: the commit sha} or {sha256}: no absolute path, so it can be published and compared.
    Raises ValueError for any content that cannot be trained on, with file, row and remedy; FileNotFoundError for a
    missing file; ConnectionError for a hub set that cannot be had.
    """
    name, _, named = source.partition("@")
    if name in HUB_SETS or name.startswith("hub:"):
        rows, record = _read_hub(name, revision or named or None)
    elif source and (Path(source).suffix or "/" in source or Path(source).exists()):
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for hub sets; {Path(source).name} is a local file")
        rows, record = _read_file(_local(source))
        name = Path(source).name
    else:
        known = (*BUILT_IN, *HUB_SETS)
        raise ValueError(f"unknown problem set {source!r}{_meant(name, known)} Give a local {', '.join(SUFFIXES)} "
                         f"file, one of {', '.join(known)}, or hub:owner/name[:config[:split]], and behind a hub set "
                         "@revision where it matters")
    if not rows:
        raise ValueError(f"{name} has no rows")
    problems, counts = _merge([(where, _problem(row, f"{name}, {where}")) for where, row in rows], name)
    return problems, {"source": name, **record, "counts": {"rows": len(rows), **counts}}


def _local(source: str) -> Path:
    path = Path(source)
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hub = f" On the hub it would be hub:{source}" if not path.suffix and source.count("/") == 1 else ""
        raise FileNotFoundError(f"no file {source}{_meant(path.name, beside)}{hub}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{source} is none of the files that can be read: {', '.join(SUFFIXES)}")
    return path


def _meant(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names)
    return f"; is it {' or '.join(near)}?" if near else "."


def _read_file(path: Path) -> tuple[list[tuple[str, dict]], dict]:
    """Rows, each with how to find it: "line 3" (1-based) in a .jsonl, "row 3" (1-based) elsewhere."""
    content = path.read_bytes()
    record = {"sha256": hashlib.sha256(content).hexdigest()}
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path.name} is not a parquet file: {error}") from error
        return [(f"row {i}", row) for i, row in enumerate(table.to_pylist(), 1)], record
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")  # a byte-order mark, as editors on Windows write it
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv") from error
    if path.suffix == ".jsonl":
        # split at \n alone: str.splitlines would also cut at U+2028, which JSON allows inside strings
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [(where, _json(line, f"{path.name}, {where}")) for where, line in lines], record
    rows = _json(text, path.name) if text.strip() else []
    if not isinstance(rows, list):
        raise ValueError(f"{path.name} must be a list of objects, it is a {type(rows).__name__}")
    return [(f"row {i}", row) for i, row in enumerate(rows, 1)], record


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error


def _read_hub(source: str, revision: str | None) -> tuple[list[tuple[str, dict]], dict]:
    if source in HUB_SETS:
        repo, config, split = HUB_SETS[source]
    else:
        repo, config, split = (source.removeprefix("hub:").split(":") + ["", ""])[:3]
        config, split = config or None, split or "train"
        if repo.count("/") != 1 or source.count(":") > 3:
            raise ValueError(f"{source!r} is not of the form hub:owner/name[:config[:split]]")
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # HTTPError: the root of all its refusals

    try:
        if not (revision and len(revision) == 40 and set(revision) <= set("0123456789abcdef")):
            revision = huggingface_hub.HfApi().dataset_info(repo, revision=revision).sha
        table = datasets.load_dataset(repo, config, split=split, revision=revision)
    except (HTTPError, OfflineModeIsEnabled, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ConnectionError(
            f"cannot load {source} ({repo}) from the hub: {error}\nIf it is private or gated, log in (`hf auth login`) "
            f"and accept its terms; without network, give a local {', '.join(SUFFIXES)} file instead") from error
    record = {"repo": repo, "config": config, "split": split, "revision": revision}
    return [(f"row {i}", row) for i, row in enumerate(table, 1)], record


def _problem(row: dict, where: str) -> Problem:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object, it is a {type(row).__name__}")
    if CHOICE_COLUMNS[1] in row:
        return _multiple_choice(row, where)
    prompt = _column(row, PROMPT_COLUMNS, where)
    if isinstance(prompt, list):  # chat messages, as in raw DAPO
        users = [m.get("content") for m in prompt if isinstance(m, dict) and m.get("role") == "user"]
        prompt = users[-1] if users else None
    answer, style = _column(row, ANSWER_COLUMNS, where), "math"
    if isinstance(answer, dict):  # verl's rows, whose prompts ask for a last line "Answer: ..."
        answer, style = answer.get("ground_truth"), "dapo"
    if isinstance(answer, list):
        answer = ", ".join(_text(part) for part in answer)
    prompt, answer = _text(prompt).strip(), _text(answer)
    if row.keys().isdisjoint(ANSWER_COLUMNS[:2]):  # a worked solution, as in MATH
        answer = boxed(answer) or answer
    _, hashes, answer = answer.rpartition("####")  # GSM8K: "... #### 18"
    answer, style = answer.strip(), _text(row.get("style")) or ("gsm8k" if hashes else style)
    if style not in STYLES:
        raise ValueError(f"{where}: unknown answer style {style!r}; there are {', '.join(STYLES)}")
    for field, value in ("prompt", prompt), ("answer", answer):
        if not value:
            raise ValueError(f"{where}: the {field} is empty or not text; fill it in or remove the row")
    return Problem(_id(row, prompt), prompt, answer, style, _kind(row))


def _multiple_choice(row: dict, where: str) -> Problem:
    """A GPQA row: the four options behind the question, in an order that only the question's text decides."""
    question, *options = (_text(_column(row, (name,), where)).strip() for name in CHOICE_COLUMNS)
    if not question or not all(options):
        raise ValueError(f"{where}: one of {', '.join(CHOICE_COLUMNS)} is empty; fill it in or remove the row")
    seed = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big")
    order = np.random.default_rng(seed).permutation(4)  # place -> option; option 0 is the right one
    lines = [f"({letter}) {options[option]}" for letter, option in zip("ABCD", order, strict=True)]
    prompt = "\n".join([question, "", *lines, "", "Answer with the letter of the right option."])
    return Problem(_id(row, prompt), prompt, "ABCD"[list(order).index(0)], "choice", _kind(row))


def _id(row: dict, prompt: str) -> str:
    own = next((str(row[c]) for c in ID_COLUMNS if row.get(c) not in (None, "")), None)
    return own or hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()


def _kind(row: dict) -> str:
    return next((_text(row[c]).strip() for c in KIND_COLUMNS if c in row), "")


def _column(row: dict, accepted: tuple[str, ...], where: str):
    for name in accepted:
        if name in row:
            return row[name]
    raise ValueError(f"{where}: none of the columns {', '.join(row)} is called {' or '.join(accepted)}; rename one")


def _text(value) -> str:
    """Text as it is, numbers as they are read (5, not 5.0), "" for what is neither: null, nan, lone surrogates."""
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value if math.isfinite(value) else ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return str(value) if str(value).isascii() or str(value).encode(errors="ignore").decode() == value else ""


def _merge(found: list[tuple[str, Problem]], name: str) -> tuple[list[Problem], dict]:
    """One problem a prompt; rows == problems + merged + conflicting. Two answers to one prompt cannot both be right."""
    rows_of: dict[str, tuple[str, str]] = {}  # id -> (prompt, where)
    answers: dict[str, set[str]] = {}  # prompt -> its answers
    for where, problem in found:
        prompt, first = rows_of.setdefault(problem.id, (problem.prompt, where))
        if prompt != problem.prompt:
            raise ValueError(f"{name}: {first} and {where} have the id {problem.id!r} and different prompts; "
                             "make the ids unique or drop the id column")
        answers.setdefault(problem.prompt, set()).add(problem.answer)
    consistent = [problem for _, problem in found if len(answers[problem.prompt]) == 1]
    first_of: dict[str, Problem] = {}
    for problem in consistent:
        first_of.setdefault(problem.prompt, problem)
    problems = list(first_of.values())
    counts = {"merged": len(consistent) - len(problems), "conflicting": len(found) - len(consistent)}
    if any(counts.values()):
        log.warning("%s: %d repeated rows merged, %d rows dropped whose prompt has several answers",
                    name, counts["merged"], counts["conflicting"])
    if not problems:
        raise ValueError(f"{name}: nothing left, every prompt has several different answers")
    return problems, counts


# ---- encoding

def encode_prompts(problems: list[Problem], tokenizer, *, suffix: str, chat_template: str,
                   max_tokens: int) -> tuple[list[Problem], list[list[int]], dict]:
    """The problems that fit, their token ids, and counts.

    tokenizer: Hugging Face. suffix: appended to each prompt. chat_template: "auto" (if the tokenizer has one),
    "always" or "never". max_tokens: longer prompts are dropped and counted.
    Returns problems and ids in the given order, and {chat_template, too_long, tokens_max, tokens_mean}.
    Raises ValueError for a template that is missing, an empty encoding, a character the tokenizer does not know, or
    if nothing fits.
    """
    if chat_template == "always" and not tokenizer.chat_template:
        raise ValueError("chat_template='always', but the tokenizer has none; use 'never' or an instruct model")
    use_template = chat_template != "never" and bool(tokenizer.chat_template)
    texts = [problem.prompt + suffix for problem in problems]
    if use_template:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                               add_generation_prompt=True) for text in texts]
    all_ids = _encode(texts, tokenizer, special=not use_template)  # a template writes the special tokens itself
    for problem, ids in zip(problems, all_ids, strict=True):
        if not ids or ids == [tokenizer.bos_token_id]:
            raise ValueError(f"problem {problem.id}: the prompt encodes to no tokens")
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            found = [c for c in dict.fromkeys(problem.prompt + suffix)
                     if tokenizer.unk_token_id in tokenizer(c, add_special_tokens=False)["input_ids"]]
            raise ValueError(
                f"problem {problem.id}: the tokenizer does not know {found or 'what the chat template adds'}; remove "
                "the problem, give another --prompt_suffix or --chat_template, or use another tokenizer")
    kept = [(problem, ids) for problem, ids in zip(problems, all_ids, strict=True) if len(ids) <= max_tokens]
    if not kept:
        raise ValueError(f"none of {len(problems)} prompts fits in {max_tokens} tokens; raise the limit")
    lengths = [len(ids) for _, ids in kept]
    record = {"chat_template": use_template, "too_long": len(problems) - len(kept), "tokens_max": max(lengths),
              "tokens_mean": sum(lengths) / len(lengths)}
    return [problem for problem, _ in kept], [ids for _, ids in kept], record


def _encode(texts: list[str], tokenizer, *, special: bool) -> list[list[int]]:
    """Token ids with the tokenizer's own start token if `special`; never two of them, and never an end token, behind
    which a model has nothing more to say."""
    start, end, encoded = tokenizer.bos_token_id, tokenizer.eos_token_id, []
    for ids in tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []:
        if special and ids[-1:] == [end]:
            ids = ids[:-1]
        while start is not None and ids[:2] == [start, start]:
            ids = ids[1:]
        encoded.append(ids)
    return encoded


def stop_token_ids(tokenizer, *, generation_config: dict | None, override: str = "auto") -> tuple[int, ...]:
    """The ids that end a response, ascending.

    override: "auto" (eos of the tokenizer and of generation_config, and END_OF_TURN if the tokenizer has a chat
    template), or comma-separated tokens. Raises ValueError for an unknown token or if there is none at all.
    """
    vocabulary = tokenizer.get_vocab()
    if override != "auto":
        tokens = [token.strip() for token in override.split(",") if token.strip()]
        missing = [token for token in tokens if token not in vocabulary]
        if missing or not tokens:
            raise ValueError(f"stop tokens {override!r}: {missing or 'nothing'} in it is a token of the vocabulary")
        return tuple(sorted({vocabulary[token] for token in tokens}))
    configured = (generation_config or {}).get("eos_token_id")
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])} - {None}
    if tokenizer.chat_template:
        stops |= {vocabulary[token] for token in END_OF_TURN if token in vocabulary}
    if not stops:
        raise ValueError("neither tokenizer nor generation_config names an end-of-sequence token; name the stop tokens")
    return tuple(sorted(stops))


def batch_order(num_problems: int, prompts_per_step: int, seed: int, step: int) -> np.ndarray:
    """Indices (prompts_per_step,) int64 of the prompts of `step` (0-based), distinct: a function of the arguments.

    An epoch is num_problems // prompts_per_step steps through one fresh permutation; its remainder is left out, so
    that no prompt stands twice in a batch. Raises ValueError for more prompts per step than there are.
    """
    if not 1 <= prompts_per_step <= num_problems:
        raise ValueError(f"{prompts_per_step=} must be from 1 to the number of problems, {num_problems}")
    epoch, position = divmod(step, num_problems // prompts_per_step)
    order = np.random.default_rng((seed, epoch)).permutation(num_problems)  # (num_problems,)
    return order[position * prompts_per_step : (position + 1) * prompts_per_step]
