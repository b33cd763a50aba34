"""Problems with checkable answers: DAPO and the benchmarks from the Hugging Face hub, or a local file.

Everything is checked before the first step: a training run should not find the row without an answer at night.
The order of prompts is a function of (seed, step), so a resumed run needs no saved sampler.
"""

import dataclasses
import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from reward import STYLES, Problem, boxed, compare

log = logging.getLogger(__name__)

BUILT_IN = ("arithmetic", "permutations")  # the keys of tasks.TASKS, for what must not import tasks
# short name -> owner/name[:config[:split]]; the ids of the paper's training set and benchmarks
HUB_SETS = {
    "dapo": "open-r1/DAPO-Math-17k-Processed:en",
    "math500": "HuggingFaceH4/MATH-500::test",
    "aime24": "HuggingFaceH4/aime_2024",
    "aime25": "MathArena/aime_2025",
    "amc23": "math-ai/amc23::test",
    "minerva": "math-ai/minervamath::test",
    "olympiad": "math-ai/olympiadbench::test",
    "gpqa": "Idavidrein/gpqa:gpqa_diamond",
}
# the first column present is taken; `solution` last, as MATH-500 has both a worked solution and an answer
PROMPT_COLUMNS = ("problem", "question", "prompt")
ANSWER_COLUMNS = ("answer", "final_answer", "solution", "reward_model")  # the last: raw DAPO and other verl data
KIND_COLUMNS = ("kind", "level", "subject", "type", "category")  # MATH has a level beside its subject or type
ID_COLUMNS = ("id", "uid", "unique_id", "Record ID")
CHOICE_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))  # of GPQA
OPTION_COLUMNS = ("choices", "options")  # of other sets: a list, in the order to which the answer refers
CONTEXT_COLUMNS = ("body", "context", "passage", "article", "paragraph")  # in any case; not part of the prompt
LETTERS = "ABCDEFGHIJ"  # of options; reward.py knows no more
ROLES = ("system", "user", "assistant")  # others are passed over by many a chat template
NESTED = re.compile(r"""\s*(?:\[\s*["']|\{\s*")""")  # how a text begins that is JSON; [3, 5] and {1, 2} are mathematics
SUFFIXES = (".jsonl", ".json", ".parquet")
END_OF_TURN = ("<|im_end|>", "<|eot_id|>")  # what chat models end a turn with, where it is not their eos token


# ---- loading

def load_problems(source: str, *, revision: str | None = None) -> tuple[list[Problem], dict]:
    """Problems of `source`, and the record of what exactly they are.

    source: a path ending in .jsonl, .json (a list of objects) or .parquet; a key of HUB_SETS; or
        `hub:owner/name[:config[:split]]` (split: train). Columns: PROMPT_COLUMNS (text, or chat messages) and
        ANSWER_COLUMNS; optional are style, OPTION_COLUMNS, KIND_COLUMNS and ID_COLUMNS. All others are kept for a
        reward of one's own. Behind a hub set `@` and its commit, branch or tag may stand.
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
    if left_out := [column for column in problems[0].columns if column.lower() in CONTEXT_COLUMNS]:
        log.warning("%s: the column %s is not part of the prompts; if its text belongs to the question, write it there",
                    name, " and ".join(left_out))
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
            table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path.name} is not a parquet file that can be read: {error}") from error
        if twice := [name for name in dict.fromkeys(table.column_names) if table.column_names.count(name) > 1]:
            raise ValueError(f"{path.name} has several columns {', '.join(twice)}; rename or drop all but one")
        for i, column in enumerate(table.schema):
            if column.type == pyarrow.float32():  # 0.53, which as 64 bits is 0.5299999713897705
                table = table.set_column(i, column.name, table[i].cast(pyarrow.string()).cast(pyarrow.float64()))
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
    except (RecursionError, ValueError) as error:  # no JSON; lists in lists; more digits than Python reads
        why = str(error).partition(";")[0]
        raise ValueError(f"{where}: broken JSON ({why}); mend it, give a long number as text and deep nesting flat, or "
                         "remove it") from error


def _read_hub(source: str, revision: str | None) -> tuple[list[tuple[str, dict]], dict]:
    repo, config, split, *more = HUB_SETS.get(source, source.removeprefix("hub:")).split(":") + ["", ""]
    config, split = config or None, split or "train"
    if repo.count("/") != 1 or any(more):
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
        row = _shuffled(row, where)
    prompt, messages = _asked(_column(row, PROMPT_COLUMNS, where), where)
    (answer, style), own = _gold(row, where), _text(row.get("style"))
    style = own or style
    if style not in STYLES:
        raise ValueError(f"{where}: unknown answer style {style!r}; there are {', '.join(STYLES)}")
    for field, value in ("prompt", prompt), ("answer", answer):
        if not value:
            raise ValueError(f"{where}: the {field} is empty or not text; write it as text or remove the row")
    kind = _text(next((row[c] for c in KIND_COLUMNS if c in row), "")).strip()
    options = next((row[c] for c in OPTION_COLUMNS if row.get(c)), None)
    if options and own in ("", "choice"):
        prompt, answer = _choice(prompt, answer, None if messages else options, where)
        style = "choice"
    problem = Problem("", prompt, answer, style, kind, messages)
    own_id = next((c for c in ID_COLUMNS if row.get(c) not in (None, "")), None)
    taken = [next((c for c in names if c in row), "") for names in (PROMPT_COLUMNS, ANSWER_COLUMNS, KIND_COLUMNS)]
    taken = {own_id, "style", *taken, *CHOICE_COLUMNS, *(OPTION_COLUMNS if style == "choice" else ())}
    others = {name: _as_json(value) for name, value in row.items() if name not in taken}
    return dataclasses.replace(problem, id=str(row[own_id]) if own_id else _hash(problem), columns=others)


def _asked(value, where: str) -> tuple[str, tuple[dict[str, str], ...]]:
    """A prompt as `Problem.prompt` and `Problem.messages`, from text or from chat messages, as in raw DAPO."""
    if isinstance(value, str) and value.startswith("[{") and value.endswith("}]"):
        value = _json(value, f"{where}, prompt")
    if not isinstance(value, list):
        return _text(value).strip(), ()
    turns = tuple({name: m.get(name) for name in ("role", "content")} if isinstance(m, dict) else {} for m in value)
    readable = all(m.get("role") in ROLES and _text(m["content"]) == m["content"] for m in turns)
    if not turns or not readable or turns[-1]["role"] != "user" or not turns[-1]["content"]:
        raise ValueError(f"{where}: the prompt is empty, or no chat of messages with a role ({', '.join(ROLES)}) and "
                         "text as content, the last the user's")
    text = turns[0]["content"] if len(turns) == 1 else "\n\n".join(f"{m['role']}: {m['content']}" for m in turns)
    return text.strip(), turns if len(turns) > 1 else ()


def _gold(row: dict, where: str) -> tuple[str, str]:
    """(answer, or "" for what is none; style as far as the other columns tell)"""
    answer, style = _nested(_column(row, ANSWER_COLUMNS, where), where), "math"
    if isinstance(answer, dict):  # verl's rows, whose prompts ask in the way of their source
        source, answer = _text(row.get("data_source")).lower(), _nested(answer.get("ground_truth"), where)
        style = next((known for known in ("gsm8k", "dapo") if known in source), "math")
    elif row.keys().isdisjoint(ANSWER_COLUMNS[:-1]):  # a reward_model that is none
        return "", style
    if isinstance(answer, list):
        parts = [_text(part).strip() for part in answer]
        if all(compare(part, parts[0]) for part in parts[1:]):  # ways to write one answer
            parts = parts[:1]
        answer = ", ".join(parts) if all(parts) else ""
    answer = _text(answer)
    if row.keys().isdisjoint(ANSWER_COLUMNS[:2]):  # a worked solution, as in MATH
        answer = boxed(answer) or answer
    _, hashes, answer = answer.rpartition("####")  # GSM8K: "... #### 18"
    return answer.strip(), "gsm8k" if hashes else style


def _nested(value, where: str):
    return _json(value, f"{where}, answer") if isinstance(value, str) and NESTED.match(value) else value


def _shuffled(row: dict, where: str) -> dict:
    """A GPQA row with its four options as `choices`, in an order that only the question's text decides."""
    question, *options = (_column(row, (name,), where) for name in CHOICE_COLUMNS)
    seed = int.from_bytes(hashlib.blake2b(_text(question).strip().encode(), digest_size=8).digest(), "big")
    order = np.random.default_rng(seed).permutation(4).tolist()  # place -> option; option 0 is the right one
    return {**row, "question": question, "choices": [options[i] for i in order], "answer": LETTERS[order.index(0)]}


def _choice(question: str, gold: str, options: object, where: str) -> tuple[str, str]:
    """The options behind the question, and the letter of the one that `gold` means: by its letter or its place, from 0.
    """
    texts = [_text(option).strip() for option in options] if isinstance(options, list) else []
    places = {name: letter for place, letter in enumerate(LETTERS[: len(texts)]) for name in (letter, str(place))}
    if gold not in places or gold in texts or "" in texts or len(texts) > len(LETTERS):
        raise ValueError(f"{where}: which of the options is {gold!r}? They must be a list of at most {len(LETTERS)} "
                         "texts beside one message, the answer a letter or a place from 0, and none of the texts; or "
                         "write them into the prompt and give the row a `style`")
    lines = [f"({letter}) {text}" for letter, text in zip(LETTERS, texts, strict=False)]
    return "\n".join([question, "", *lines, "", "Answer with the letter of the right option."]), places[gold]


def key(problem: Problem) -> str:
    """What is asked, all messages of a chat: the same for two rows that are one prompt, and for no others."""
    return json.dumps(problem.messages) if problem.messages else problem.prompt


def _hash(problem: Problem) -> str:
    return hashlib.blake2b(key(problem).encode(), digest_size=8).hexdigest()


def _words(problem: Problem) -> str:
    """What is asked, whatever its case, gaps and punctuation: real sets have one problem in several such forms."""
    return " ".join(re.findall(r"\d[\d.,]*\d|\w+|[^\w\s.,;:!?'\"]", key(problem).casefold()))


def some_of(problems: list[Problem], count: int) -> list[Problem]:
    """`count` of them, in their order: those whose prompts have the smallest hashes, for files are often sorted."""
    chosen = {p.id for p in sorted(problems, key=_hash)[:count]}
    return [p for p in problems if p.id in chosen]


def _as_json(value):
    """Text, numbers, and lists and objects of them as they are; null for what JSON has not: nan, dates, images."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):  # a map of parquet has tuples
        return [_as_json(part) for part in value]
    finite = math.isfinite(value) if isinstance(value, float) else isinstance(value, str | int)
    return value if finite else None


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
    rows_of: dict[str, tuple[str, str]] = {}  # id -> (what is asked, where)
    answers: dict[str, set[str]] = {}  # what is asked -> its answers
    first_of: dict[str, Problem] = {}  # what is asked -> the first row that asks it
    for where, problem in found:
        asked, first = rows_of.setdefault(problem.id, (key(problem), where))
        if asked != key(problem):
            raise ValueError(f"{name}: {first} and {where} have the id {problem.id!r} and different prompts; "
                             "make the ids unique or drop the id column")
        answers.setdefault(key(problem), set()).add(problem.answer)
        first_of.setdefault(key(problem), problem)
    problems = [problem for asked, problem in first_of.items() if len(answers[asked]) == 1]
    conflicting = sum(len(answers[key(problem)]) > 1 for _, problem in found)
    counts = {"merged": len(found) - conflicting - len(problems), "conflicting": conflicting}
    if any(counts.values()):
        log.warning("%s: %d repeated rows merged, %d rows dropped whose prompt has several answers",
                    name, counts["merged"], counts["conflicting"])
    if not problems:
        raise ValueError(f"{name}: nothing left, every prompt has several different answers")
    return problems, counts


def hold_out(problems: list[Problem], was: dict | None) -> tuple[list[Problem], list[Problem], dict]:
    """Those to train on, in their order and without what differs from a held-out one by case, gaps or punctuation; a
    tenth, at most 200, that is held out; how that was chosen: by the smallest hashes of the prompts, whatever the order
    of the rows. `was`: how a run to go on with did; once, it took the `last`."""
    if len(problems) < 2:
        raise ValueError("one problem alone leaves nothing to hold out of training: give more, or --eval_data")
    chosen = {"last": was["last"]} if was and "last" in was else {
        "by": "hash", "count": min(200, max(1, len(problems) // 10))}
    held_out = problems[-chosen["last"] :] if "last" in chosen else sorted(problems, key=_hash)[: chosen["count"]]
    asked = set(map(_words, held_out))
    trained = [p for p in problems if _words(p) not in asked]
    if alike := len(problems) - len(held_out) - len(trained):
        log.warning("%d problems are not trained on: but for case, gaps or punctuation they are held-out ones", alike)
    return trained, held_out, chosen


def check_overlap(trained: list[Problem], evaluated: list[Problem], *, allowed: float, name: str = "eval_data") -> None:
    """Warns of prompts that stand in both, but for case, gaps and punctuation; raises ValueError for more than a share
    `allowed` of those to evaluate."""
    asked = set(map(_words, trained))
    if both := [p for p in evaluated if _words(p) in asked]:
        message = (f"{name}: {len(both)} of {len(evaluated)} problems stand in train_data, too, such as "
                   f"{both[0].prompt[:60]!r}: they measure what was learned by heart")
        if len(both) > allowed * len(evaluated):
            raise ValueError(f"{message}; take others, or admit a share with --allow_overlap SHARE (now {allowed:g})")
        log.warning("%s", message)


# ---- encoding

def encode_prompts(problems: list[Problem], tokenizer, *, suffix: str, chat_template: str, max_tokens: int,
                   rows: float = math.inf) -> tuple[list[Problem], list[list[int]], dict]:
    """The problems that fit, their token ids, and counts.

    tokenizer: Hugging Face. suffix: appended to each prompt. chat_template: "auto" (if the tokenizer has one),
    "always" or "never". max_tokens: longer prompts are dropped and counted. rows: of the model's embedding.
    Returns problems and ids in the given order, and {chat_template, too_long, tokens_max, tokens_mean}.
    Raises ValueError for a template that is missing, an empty encoding, a character the tokenizer does not know, a
    token the model does not, or if nothing fits.
    """
    if chat_template == "always" and not tokenizer.chat_template:
        raise ValueError("chat_template='always', but the tokenizer has none; use 'never' or an instruct model")
    use_template = chat_template != "never" and bool(tokenizer.chat_template)
    if use_template:
        texts = [_through_template(problem, tokenizer, suffix) for problem in problems]
    elif chats := [p for p in problems if p.messages]:
        raise ValueError(f"problem {chats[0].id} ({chats[0].prompt[:60]!r}): several messages need a chat template; "
                         "take an instruct model and --chat_template auto, or write them as one message")
    else:
        texts = [problem.prompt + suffix for problem in problems]
    all_ids = _encode(texts, tokenizer, special=not use_template)  # a template writes the special tokens itself
    for problem, ids in zip(problems, all_ids, strict=True):
        if not ids or ids == [tokenizer.bos_token_id]:
            raise ValueError(f"problem {problem.id}: the prompt encodes to no tokens")
        if beyond := [i for i in ids if i >= rows]:
            raise ValueError(f"problem {problem.id}: the model has no embedding of {tokenizer.decode(beyond[0])!r}, id "
                             f"{beyond[0]} of {rows} rows; take the model's own tokenizer, or --chat_template never")
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


def _through_template(problem: Problem, tokenizer, suffix: str) -> str:
    """All messages as the model was trained to see them. Raises ValueError for a template that refuses them, or leaves
    out one of the system or the user (of the assistant's it may drop the reasoning)."""
    from jinja2 import TemplateError

    *earlier, last = problem.messages or [{"role": "user", "content": problem.prompt}]
    turns = [*earlier, {**last, "content": last["content"] + suffix}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"problem {problem.id}: the chat template refuses its messages ({error}); change them, or "
                         "give --chat_template never where each is one message") from error
    if lost := [m for m in turns if m["role"] != "assistant" and m["content"].strip() not in text]:
        raise ValueError(f"problem {problem.id}: the chat template leaves out {lost[0]['content'][:60]!r} of the "
                         f"{lost[0]['role']}; write it into the last message, or use another template")
    return text


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
    if ordinary := stops - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}:
        log.warning("a response ends at %s, which are no special tokens: generation_config.json says so, and "
                    "--stop_tokens may name others", tokenizer.convert_ids_to_tokens(sorted(ordinary)))
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
