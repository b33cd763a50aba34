"""Problems from files and from the hub, and what a tokenizer makes of them; whatever is wrong is named."""

import dataclasses
import datetime
import functools
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import score

import data
import tasks
from config import Config
from data import (
    Problem,
    batch_order,
    check_overlap,
    encode_prompts,
    hold_out,
    load_problems,
    some_of,
    stop_token_ids,
)
from eval import TrainedRun
from reward import Grader


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)) + "\n"
        path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix, prompt, answer", [
    (".jsonl", "problem", "answer"), (".json", "question", "final_answer"), (".parquet", "prompt", "solution"),
])
def test_local_files_in_either_naming(tmp_path, suffix, prompt, answer):
    source = Path(write(tmp_path / f"set{suffix}", [{prompt: " 1+1? ", answer: "2"}, {prompt: "2+2?", answer: "4"}]))
    problems, record = load_problems(str(source))
    assert [(p.prompt, p.answer) for p in problems] == [("1+1?", "2"), ("2+2?", "4")]
    assert len(problems[0].id) == 16 and int(problems[0].id, 16) >= 0
    assert record == {"source": f"set{suffix}", "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
                      "counts": {"rows": 2, "merged": 0, "conflicting": 0}}
    assert load_problems(str(source)) == (problems, record)


@pytest.mark.parametrize("row, answer, style", [
    *(({"answer": given, "solution": "no"}, answer, "math") for given, answer in (
        (["5"], "5"), (["5", "7"], "5, 7"), (3, "3"), (2.0, "2"), (2.5, "2.5"))),
    ({"answer": "so 9*2\n#### 18"}, "18", "gsm8k"),
    ({"reward_model": {"ground_truth": "2", "style": "rule"}}, "2", "math"),
    ({"solution": "34", "reward_model": {"ground_truth": "34"}}, "34", "math"),  # DAPO as processed
    # nothing else is cut from an answer, and of a worked solution the box is one
    *(({name: r"\boxed{3} or \boxed{5}", "solution": r"\boxed{3}"}, r"\boxed{3} or \boxed{5}", "math")
      for name in ("answer", "final_answer")),
    ({"solution": r"We have $r = 3$, so \boxed{\left(3, \frac{\pi}{2}\right)}."}, r"\left(3, \frac{\pi}{2}\right)",
     "math"),
    ({"solution": r"First \boxed{1}. #### Step 2. Then \fbox{x = \boxed{5}}"}, "5", "math"),  # a heading is no answer
    ({"solution": "Within \\boxed{} they want it: 4\n#### 18"}, "18", "gsm8k"),
    ({"solution": "34"}, "34", "math"),
])
def test_answers_and_worked_solutions_take_their_usual_shapes(tmp_path, row, answer, style):
    [problem], _ = load_problems(write(tmp_path / "a.jsonl", [{"problem": "?", **row}]))
    assert (problem.answer, problem.style) == (answer, style)


@pytest.mark.parametrize("row, kind", [
    ({"kind": "carry", "level": 2}, "carry"), ({"level": 5.0, "subject": "Algebra"}, "5"),
    ({"subject": " Number Theory "}, "Number Theory"), ({"level": None, "subject": "Algebra"}, ""), ({}, ""),
])
def test_the_first_column_of_a_kind_is_the_kind(tmp_path, row, kind):
    options = {name: str(i) for i, name in enumerate(data.CHOICE_COLUMNS)}
    problems, _ = load_problems(write(tmp_path / "a.jsonl", [{"problem": "?", "answer": "1"} | row]))
    choices, _ = load_problems(write(tmp_path / "b.jsonl", [options | row]))
    assert [p.kind for p in problems + choices] == [kind, kind]


def test_lines_end_at_newlines_alone_and_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"problem": "a\u2028b\x85c", "answer": 1}\r\n\r\n{"problem": "d", "answer": 2}'.encode())
    assert [p.prompt for p in load_problems(str(path))[0]] == ["a\u2028b\x85c", "d"]


def test_chat_messages_and_own_ids(tmp_path):
    messages = [{"role": "user", "content": " 1+1?"}]
    row = {"prompt": messages, "reward_model": {"ground_truth": "2", "style": "rule"}, "id": 7}
    problems, _ = load_problems(write(tmp_path / "a.parquet", [row]))
    assert problems == [Problem("7", "1+1?", "2", "math")]


@pytest.mark.parametrize("rows, message", [
    ([], r"set.jsonl has no rows"),
    ([{"text": "1+1?", "answer": "2"}], r"set.jsonl, line 1: none of the columns text, answer is called problem"),
    ([{"problem": "1+1?", "label": "2"}], r"line 1: none of the columns problem, label is called answer or"),
    ([{"problem": "a", "answer": "2"}, {"problem": "b", "answer": " "}], r"line 2: the answer is empty.*remove"),
    ([{"problem": "a", "answer": float("nan")}], r"line 1: the answer is empty"),
    ([{"problem": " ", "choices": ["x", "y"], "answer": 0}], r"line 1: the prompt is empty"),
    ([{"problem": "a", "answer": "1"}, {"problem": "b", "answer": "1", "style": "maths"}],
     r"line 2: unknown answer style 'maths'; there are math"),
    ([{"problem": "\ud800", "answer": "2"}], r"line 1: the prompt is empty or not text"),
    ([{"prompt": [{"role": "system", "content": "x"}], "answer": "2"}], r"line 1: the prompt is empty"),
    (["text"], r"line 1: must be an object, it is a str"),
    ([{"problem": "a", "answer": "1", "id": 3}, {"problem": "b", "answer": "1", "id": "3"}], r"line 1 and line 2.*'3'"),
    ([{"problem": "a", "answer": "1"}, {"problem": "a", "answer": "2"}], r"nothing left"),
])
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_problems(write(tmp_path / "set.jsonl", rows))


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"problem": "a", "answer": "1"}\n\n{"problem": ', r"a.jsonl, line 3: broken JSON"),
    ("a.json", b"[1, 2", r"a.json: broken JSON .*line 1 "),
    ("a.json", b'{"problem": "a"}', r"a.json must be a list of objects, it is a dict"),
    ("a.jsonl", b'{"problem": "\xff"}', r"a.jsonl is not UTF-8 \(byte 13\)"),
    ("a.json", "\ufeff".encode(), r"a.json has no rows"),
    ("a.parquet", b"not parquet at all", r"a.parquet is not a parquet file"),
])
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_problems(str(tmp_path / name))


@pytest.mark.parametrize("source, error, message", [
    ("math-500", ValueError, r"set 'math-500'; is it math500\?.*\.jsonl.*dapo.*hub:owner/name"),
    ("aime23", ValueError, "is it aime25 or aime24 or amc23"), ("", ValueError, r"set ''\."),
    ("hub:name", ValueError, "not of the form"), ("hub:a/b:c:d:e", ValueError, "not of the form"),
    ("data/gsm_tran.jsonl", FileNotFoundError, r"^no file data/gsm_tran.jsonl; is it gsm_train.jsonl or gsm_test.json"),
    ("data/0.jsonl", FileNotFoundError, r"^no file data/0.jsonl\.$"),
    ("dat/gsm_train.jsonl", FileNotFoundError, r"^no file dat/gsm_train.jsonl\.$"),
    ("owner/name", FileNotFoundError, r"^no file owner/name\. On the hub it would be hub:owner/name$"),
    *((name, ValueError, rf"{name} is none of .*: \.jsonl, \.json, \.parquet") for name in ("set", "data/set.csv")),
])
def test_a_source_that_is_none_is_named_beside_what_was_meant(tmp_path, monkeypatch, source, error, message):
    (tmp_path / "data").mkdir()
    for name in "data/gsm_train.jsonl", "data/gsm_test.jsonl", "data/set.csv", "set":
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_problems(source)


def test_repeats_are_merged_and_conflicts_dropped(tmp_path, caplog):
    rows = [("a", "1"), ("b", "2"), (" a ", "1"), ("c", "3"), ("c", "4"), ("c", "3"), ("d", "5")]
    problems, record = load_problems(write(tmp_path / "a.jsonl", [{"problem": p, "answer": a} for p, a in rows]))
    assert [(p.prompt, p.answer) for p in problems] == [("a", "1"), ("b", "2"), ("d", "5")]
    counts = record["counts"]
    assert counts == {"rows": 7, "merged": 1, "conflicting": 3}
    assert len(problems) + counts["merged"] + counts["conflicting"] == counts["rows"]
    assert "1 repeated rows merged, 3 rows dropped" in caplog.text


@pytest.mark.parametrize("source, revision, asked", [
    ("hub:me/mine", None, ("me/mine", None, "train", "main of me/mine")),
    ("hub:me/mine:cfg:test@v2", None, ("me/mine", "cfg", "test", "v2 of me/mine")),
    ("math500@" + "b" * 40, None, ("HuggingFaceH4/MATH-500", None, "test", "b" * 40)),  # nothing to resolve
    ("math500@v2", "c" * 40, ("HuggingFaceH4/MATH-500", None, "test", "c" * 40)),  # the commit that a resumed run had
])
def test_a_hub_set_comes_from_the_commit_of_its_revision(hub, source, revision, asked):
    [problem], record = load_problems(source, revision=revision)
    assert (problem.prompt, problem.answer) == ("1+1?", "2")
    assert hub == [asked]
    assert record == {**dict(zip(("repo", "config", "split", "revision"), asked, strict=True)),
                      "source": source.partition("@")[0], "counts": {"rows": 1, "merged": 0, "conflicting": 0}}


def test_an_unreachable_hub_says_which_set_and_what_to_do(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"(?s)math500 \(HuggingFaceH4/MATH-500\).*log in.*local"):
        load_problems("math500")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple]:
    """What is asked of a hub whose every set is rows.parquet, and whose commits are called "REVISION of REPOSITORY"."""
    import datasets
    import huggingface_hub

    asked, load = [], datasets.load_dataset

    def load_dataset(repo, config, *, split, revision):
        asked.append((repo, config, split, revision))
        return load("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", cache_dir=str(tmp_path))

    write(tmp_path / "rows.parquet", [{"problem": "1+1?", "answer": "2"}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(
        dataset_info=lambda repo, revision: SimpleNamespace(sha=f"{revision or 'main'} of {repo}")))
    return asked


def tokenizer_of(words: list[str], **special):
    """A tokenizer of these words, most of one character, the first of which stands for all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_of(["<unk>", "<eos>", "<|im_end|>", *"abc+=?"], eos_token="<eos>",
                        additional_special_tokens=["<|im_end|>"])


@pytest.fixture
def chat(tokenizer, monkeypatch):
    template = ("{% for m in messages %}b{{ m['content'] }}<|im_end|>{% endfor %}"
                "{% if add_generation_prompt %}c{% endif %}")
    monkeypatch.setattr(tokenizer, "chat_template", template)
    return tokenizer


def problems_of(*prompts):
    return [Problem(str(i), prompt, "1") for i, prompt in enumerate(prompts)]


def test_encoding_appends_the_suffix_and_drops_what_is_too_long(tokenizer):
    problems = problems_of("a+b", "a+b+c+a", "c")
    kept, ids, record = encode_prompts(problems, tokenizer, suffix="=?", chat_template="auto", max_tokens=5)
    assert kept == [problems[0], problems[2]]
    assert ids == [[3, 6, 4, 7, 8], [5, 7, 8]]
    assert record == {"chat_template": False, "too_long": 1, "tokens_max": 5, "tokens_mean": 4.0}
    with pytest.raises(ValueError, match="none of 3 prompts fits in 2 tokens"):
        encode_prompts(problems, tokenizer, suffix="=?", chat_template="auto", max_tokens=2)


def test_the_chat_template_is_applied_when_asked(chat):
    for mode, expected in ("auto", [4, 3, 7, 2, 5]), ("always", [4, 3, 7, 2, 5]), ("never", [3, 7]):
        _, ids, _ = encode_prompts(problems_of("a"), chat, suffix="=", chat_template=mode, max_tokens=9)
        assert ids == [expected]


def with_special_tokens(template: str):
    """A tokenizer whose post-processor writes this around every text, as Llama's and T5's do."""
    from tokenizers import processors

    tokenizer = tokenizer_of(["<unk>", "<s>", "</s>", *"ab="], bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return tokenizer


@pytest.mark.parametrize("template, expected", [
    ("<s> $A", [1, 3, 5]), ("$A", [3, 5]),  # with and without a start token of its own
    ("<s> $A </s>", [1, 3, 5]), ("$A </s>", [3, 5]),  # behind an end token nothing follows
])
def test_a_base_model_s_prompt_has_the_tokenizer_s_start_token_and_no_end_token(template, expected):
    tokenizer = with_special_tokens(template)
    _, ids, record = encode_prompts(problems_of("a", "<s>a"), tokenizer, suffix="=", chat_template="auto",
                                    max_tokens=9)
    assert ids == [expected, [1, 3, 5]] and record["chat_template"] is False  # never two start tokens
    tokenizer.chat_template = "<s>b{{ messages[0]['content'] }}b"  # writes the special tokens alone
    _, ids, _ = encode_prompts(problems_of("a"), tokenizer, suffix="", chat_template="always", max_tokens=9)
    assert ids == [[1, 4, 3, 4]]


def test_bad_encodings_are_named(tokenizer, chat, monkeypatch):
    with pytest.raises(ValueError, match=r"problem 0: the tokenizer does not know \['é', 'ß', 'x'\]; remove"):
        encode_prompts(problems_of("éaßé"), tokenizer, suffix="x", chat_template="never", max_tokens=9)
    monkeypatch.setattr(chat, "chat_template", "user {{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match="does not know what the chat template adds"):
        encode_prompts(problems_of("a"), chat, suffix="", chat_template="always", max_tokens=9)
    monkeypatch.setattr(chat, "chat_template", None)
    with pytest.raises(ValueError, match="problem 0: the prompt encodes to no tokens"):
        encode_prompts(problems_of(""), tokenizer, suffix="", chat_template="never", max_tokens=9)
    with pytest.raises(ValueError, match="the tokenizer has none"):
        encode_prompts(problems_of("a"), tokenizer, suffix="", chat_template="always", max_tokens=9)


def test_stop_tokens(tokenizer, chat, monkeypatch):
    assert stop_token_ids(chat, generation_config=None) == (1, 2)
    monkeypatch.setattr(chat, "chat_template", None)
    assert stop_token_ids(tokenizer, generation_config=None) == (1,)
    assert stop_token_ids(tokenizer, generation_config={"eos_token_id": 5}) == (1, 5)
    assert stop_token_ids(tokenizer, generation_config={"eos_token_id": [7, 1]}) == (1, 7)
    assert stop_token_ids(tokenizer, generation_config=None, override="?, a") == (3, 8)
    for override in ("<stop>", ""):
        with pytest.raises(ValueError, match="stop tokens"):
            stop_token_ids(tokenizer, generation_config=None, override=override)
    silent = SimpleNamespace(get_vocab=dict, eos_token_id=None, chat_template=None)
    with pytest.raises(ValueError, match="neither tokenizer nor generation_config"):
        stop_token_ids(silent, generation_config={})


def test_batch_order_is_pure_and_covers_an_epoch_without_repeats():
    num, per = 23, 5
    steps = num // per
    for epoch in range(3):
        batches = [batch_order(num, per, seed=1, step=epoch * steps + i) for i in range(steps)]
        assert all(batch.shape == (per,) for batch in batches)
        seen = np.concatenate(batches)
        assert len(set(seen.tolist())) == steps * per and seen.min() >= 0 and seen.max() < num
    assert (batch_order(num, per, 1, 6) == batch_order(num, per, 1, 6)).all()
    assert (batch_order(num, per, 1, 0) != batch_order(num, per, 2, 0)).any()
    assert (batch_order(num, per, 1, 0) != batch_order(num, per, 1, steps)).any()
    assert sorted(batch_order(num, num, 0, 3)) == list(range(num))
    for bad in (num + 1, 0):
        with pytest.raises(ValueError, match="prompts_per_step"):
            batch_order(num, bad, 0, 0)


GPQA = {"Record ID": "rec06", "Question": "Two states with energies ...", "Correct Answer": "10^-4 eV",
        "Incorrect Answer 1": "10^-11 eV", "Incorrect Answer 2": "10^-8 eV", "Incorrect Answer 3": "10^-9 eV"}


def test_a_row_of_gpqa_becomes_a_question_with_four_letters(tmp_path):
    [problem], _ = load_problems(write(tmp_path / "a.jsonl", [GPQA]))
    assert problem.style == "choice" and problem.id == "rec06" and problem.prompt.startswith(GPQA["Question"] + "\n")
    letter = {line[4:]: line[1] for line in problem.prompt.splitlines() if line[:1] == "("}
    assert letter.keys() == {GPQA[c] for c in data.CHOICE_COLUMNS[1:]} and letter["10^-4 eV"] == problem.answer


def test_the_right_option_stands_in_every_place_alike(tmp_path):
    rows = [{**GPQA, "Question": f"Question {i}?", "Record ID": str(i)} for i in range(400)]
    problems, _ = load_problems(write(tmp_path / "g.jsonl", rows))
    counts = [sum(p.answer == letter for p in problems) for letter in "ABCD"]
    assert min(counts) > 70 and sum(counts) == 400
    assert load_problems(write(tmp_path / "h.jsonl", rows[::-1]))[0] == problems[::-1]  # the order is the question's


# ---- other people's files


def chat_of(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CHAT = (("system", "c=c"), ("user", "b"), ("assistant", "c"), ("user", "a+b"))


@pytest.mark.parametrize("change", [0, 1, 2, 3])
def test_two_rows_are_one_prompt_only_if_all_their_messages_are_the_same(tmp_path, change):
    other = [(role, content + "=" * (i == change)) for i, (role, content) in enumerate(CHAT)]
    rows = [{"prompt": chat_of(*turns), "answer": i} for i, turns in enumerate((CHAT, other))]
    rows += [{"prompt": json.dumps(chat_of(*CHAT)), "answer": 0}]  # the same as text
    rows += [{"prompt": "\n\n".join(f"{role}: {content}" for role, content in CHAT), "answer": 2}]  # not the same
    problems, record = load_problems(write(tmp_path / "a.jsonl", rows))
    assert [list(p.messages) for p in problems] == [chat_of(*CHAT), chat_of(*other), []]
    assert problems[0].prompt == problems[2].prompt == "system: c=c\n\nuser: b\n\nassistant: c\n\nuser: a+b"
    assert record["counts"] == {"rows": 4, "merged": 1, "conflicting": 0} and len({p.id for p in problems}) == 3
    assert Problem(**json.loads(json.dumps(dataclasses.asdict(problems[0])))).messages == chat_of(*CHAT)  # in a worker


@pytest.mark.parametrize("turns", [
    [("user", "x"), ("assistant", "y")], [("human", "x")], [("user", None)],
    [("user", [{"type": "text", "text": "x"}])],
    [("developer", "x"), ("user", "y")], [("system", "x"), ("user", "")], [("system", "\ud800"), ("user", "y")]])
def test_a_chat_that_would_not_go_in_as_it_is_is_refused_with_its_row(tmp_path, turns):
    rows = [{"prompt": "x", "answer": 1}, {"prompt": chat_of(*turns), "answer": 2}]
    with pytest.raises(ValueError, match="line 2: the prompt is empty, or no chat of messages with a role"):
        load_problems(write(tmp_path / "a.jsonl", rows))


def test_a_reward_of_ones_own_sees_the_messages_of_a_chat_and_the_other_columns(tmp_path):
    row = {"prompt": chat_of(*CHAT), "answer": "5", "extra_info": {"worth": [0.1]}}
    problem = load_problems(write(tmp_path / "a.jsonl", [row]))[0][0]
    (tmp_path / "mine.py").write_text("def turns(response, problem):\n    return len(problem.messages) * "
                                      "problem.columns['extra_info']['worth'][0]\n")
    with Grader(workers=1, timeout=20, reward=f"{tmp_path}/mine.py:turns") as grader:
        assert [g.reward for g in grader.grade(["4", "5"], [problem] * 2)] == [len(CHAT) / 10] * 2


@pytest.mark.parametrize("suffix", data.SUFFIXES)
def test_columns_that_were_not_taken_stay_with_the_problem_as_json(tmp_path, suffix):
    taken = {"id": 7, "problem": "Q", "answer": "5", "level": "hard", "style": "math"}
    others = {"uid": "u", "solution": "so 5", "subject": "sums", "options": ["x"], "tests": [{"in": "1", "out": 2.5}],
              "limit": 3, "ok": True, "none": None, "nan": float("nan")}
    more = {"day": datetime.date(2000, 1, 1)} if suffix == ".parquet" else {}
    [problem], _ = load_problems(write(tmp_path / f"a{suffix}", [taken | others | more]))
    assert problem.id == "7" and problem.columns == others | {"nan": None} | dict.fromkeys(more)
    assert problem in {problem: 1} and problem != dataclasses.replace(problem, columns={})
    sent = json.dumps(dataclasses.asdict(problem), allow_nan=False)
    assert dataclasses.replace(Problem(**json.loads(sent)), messages=()) == problem
    [problem], _ = load_problems(write(tmp_path / f"b{suffix}", [GPQA | {"Subdomain": "optics"}]))
    assert problem.columns == {"Subdomain": "optics"}


def test_all_messages_go_through_the_template_and_the_suffix_stands_behind_the_last(chat, tmp_path, monkeypatch):
    problems, _ = load_problems(write(tmp_path / "a.jsonl", [{"prompt": chat_of(*CHAT), "answer": 1}]))
    encode = functools.partial(encode_prompts, problems, chat, suffix="=", max_tokens=99)
    [text] = chat.batch_decode(encode(chat_template="auto")[1])
    assert text.replace(" ", "") == "bc=c<|im_end|>bb<|im_end|>bc<|im_end|>ba+b=<|im_end|>c"
    monkeypatch.setattr(chat, "chat_template", "{{ messages[-1]['content'] }}")
    with pytest.raises(ValueError, match="template leaves out 'c=c' of the system"):
        encode(chat_template="auto", suffix="b")
    monkeypatch.setattr(chat, "chat_template", "{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match=r"refuses its messages \(no system\).*--chat_template never"):
        encode(chat_template="auto")
    with pytest.raises(ValueError, match=rf"problem {problems[0].id} \('system: c.*need a chat template"):
        encode(chat_template="never")


@pytest.mark.parametrize("source, style", [
    ("openai/gsm8k", "gsm8k"), ("DigitalLearningGmbH/MATH-lighteval", "math"), ("math_dapo", "dapo"), (None, "math"),
    ("numina_olympiads", "math")])
@pytest.mark.parametrize("as_text", [False, True])
def test_verl_s_rows_are_graded_as_their_source_asks(tmp_path, source, style, as_text):
    reward_model = {"style": "rule", "ground_truth": "7"}
    row = {"prompt": chat_of(("user", "3+4?")), "data_source": source,
           "reward_model": json.dumps(reward_model) if as_text else reward_model}
    [problem], _ = load_problems(write(tmp_path / "a.jsonl", [row]))
    assert (problem.answer, problem.style) == ("7", style)
    asked = {"gsm8k": "#### 7", "math": r"\boxed{7}", "dapo": "Answer: 7"}[style]
    assert score(asked, problem.answer, problem.style) == 1 and score(asked, "8", problem.style) == -1
    [problem], _ = load_problems(write(tmp_path / "a.jsonl", [row | {"style": "choice"}]))  # the row's own wins
    assert problem.style == "choice"


@pytest.mark.parametrize("row, answer", [
    ({"reward_model": {"ground_truth": '["3", "5"]'}}, "3, 5"), ({"answer": ' ["34"]'}, "34"),
    ({"answer": ["1/2", "0.5"]}, "1/2"),
    ({"answer": "[3, 5]"}, "[3, 5]"), ({"answer": "{1, 2}"}, "{1, 2}"), ({"answer": "[[1, 2], [3, 4]]"},) * 2,
    ({"answer": [[1, 2], [3, 4]]}, None), ({"answer": ["3", None]}, None), ({"answer": '["3", ["5"]]'}, None),
    ({"answer": "['3', '5']"}, None), ({"answer": '{"value": 3}'}, None), ({"answer": {"value": 3}}, None),
    ({"reward_model": '{"style": "rule"}'}, None), ({"reward_model": "rule"}, None), ({"reward_model": "7"}, None)])
def test_an_answer_with_lists_or_objects_in_it_is_read_as_meant_or_refused_with_its_row(tmp_path, row, answer):
    source = write(tmp_path / "a.jsonl", [{"prompt": "?"} | row])
    if answer is None:
        with pytest.raises(ValueError, match="line 1: the answer is empty or not text|line 1, answer: broken JSON"):
            load_problems(source)
    else:
        expected = answer if isinstance(answer, str) else answer["answer"]
        assert [p.answer for p in load_problems(source)[0]] == [expected]


@pytest.mark.parametrize("column", data.OPTION_COLUMNS)
@pytest.mark.parametrize("options, answer, letter", [
    (["x", "y"], 1, "B"), (["x", "y", "z"], "C", "C"), (["x", "y"], "0", "A"), (["x", "y"], 2, None),
    ([1, 2, 3], 1, None), (["x", "y"], "y", None), (["B", "A"], "A", None), (["x", ""], 0, None),
    (["x", "y"], True, None), ({"A": "x", "B": "y"}, "A", None), ("x, y", "A", None), ([*"qrstuvwxyzp"], 0, None)])
def test_options_stand_behind_the_question_and_the_letter_is_the_gold(tmp_path, column, options, answer, letter):
    row = {"question": "Q", column: options, "answer": answer}
    if letter:
        [problem], _ = load_problems(write(tmp_path / "a.jsonl", [row]))
        assert (problem.answer, problem.style) == (letter, "choice")
        lines = [f"({name}) {option}" for name, option in zip("ABC", options, strict=False)]
        assert problem.prompt.splitlines() == ["Q", "", *lines, "", "Answer with the letter of the right option."]
        row["question"] = chat_of(*CHAT)
    with pytest.raises(ValueError, match="line 1: (which of the options is|the answer is empty)"):
        load_problems(write(tmp_path / "a.jsonl", [row]))
    if answer is not True:  # options beside a style of its own, and none at all, are passed over
        rows = [row | {"question": "Q", "style": "math"}, row | {"question": "R", column: None}]
        assert [p.prompt for p in load_problems(write(tmp_path / "a.jsonl", rows))[0]] == ["Q", "R"]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", b'{"problem": "?", "answer": 1' + b"0" * 5000 + b"}", "a.jsonl, line 1: .*4300 digits.*as text"),
    ("a.jsonl", b'{"problem": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.jsonl, line 1: .*recursion.*flat")])
def test_numbers_and_lists_that_python_does_not_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_problems(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_column_that_a_parquet_file_has_twice_is_named_and_one_of_32_bits_reads_as_it_was_written(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array([x]) for x in ("Q", "5", "6")]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=["problem", "answer", "answer"]),
                                tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet has several columns answer; rename or drop"):
        load_problems(str(tmp_path / "a.parquet"))
    half = pyarrow.table({"problem": ["Q", "R"], "answer": pyarrow.array([0.53, 3], type=pyarrow.float32())})
    pyarrow.parquet.write_table(half, tmp_path / "b.parquet")
    assert [p.answer for p in load_problems(str(tmp_path / "b.parquet"))[0]] == ["0.53", "3"]


def kinds_in_turn(number):
    return [Problem(f"id{i}", f"{i}+{i}", "1", kind="first" if i < number // 2 else "second") for i in range(number)]


def test_what_is_held_out_is_the_same_whatever_the_order_of_the_rows_and_of_every_kind():
    problems = kinds_in_turn(400)
    trained, held_out, chosen = hold_out(problems, None)
    assert chosen == {"by": "hash", "count": 40} and len(held_out) == 40
    assert trained == [p for p in problems if p not in held_out]  # in their order
    assert hold_out(problems[::-1], None) == (trained[::-1], held_out, chosen)  # its first few are the same, too
    assert 10 <= sum(p.kind == "first" for p in held_out) <= 30
    renamed = [dataclasses.replace(p, id=f"other{p.id}") for p in problems]
    assert [p.prompt for p in hold_out(renamed, None)[1]] == [p.prompt for p in held_out]
    assert [p.prompt for p in held_out[:3]] == ["108+108", "268+268", "380+380"]  # on every machine
    assert len(hold_out(kinds_in_turn(5000), None)[1]) == 200
    with pytest.raises(ValueError, match="one problem alone .*--eval_data"):
        hold_out(problems[:1], None)


def test_an_older_run_goes_on_with_the_tail_that_it_held_out():
    problems = kinds_in_turn(50)
    assert hold_out(problems, {"held out of": "train_data", "last": 5}) == (problems[:45], problems[45:], {"last": 5})
    once = hold_out(problems, None)
    assert hold_out(problems, {"held out of": "train_data", **once[2]}) == once


def test_prompts_of_both_train_and_eval_data_are_counted_and_refused_above_a_share(caplog):
    problems = kinds_in_turn(100)
    trained, evaluated = problems[:52], [dataclasses.replace(p, id="x" + p.id) for p in problems[50:]]
    check_overlap(trained, evaluated[2:], allowed=0)
    assert not caplog.text
    check_overlap(trained, evaluated, allowed=0.04)
    assert "2 of 50 problems stand in train_data, too, such as '50+50'" in caplog.text
    with pytest.raises(ValueError, match=r"2 of 50 .*--allow_overlap SHARE \(now 0.02\)"):
        check_overlap(trained, evaluated, allowed=0.02)


def test_a_problem_is_the_same_whatever_its_case_gaps_and_punctuation_but_not_its_numbers_and_signs(caplog):
    asked = ["Ann has 7 dimes in her bank . How many?", "Ann has 7 dimes in her bank. how many", "Ann has 70 dimes.",
             "3-5=", "3+5=", "2.5 + 1", "25 + 1", "1 2", "12"]
    problems = [Problem(str(i), prompt, "1") for i, prompt in enumerate(asked)]
    with pytest.raises(ValueError, match="1 of 9"):
        check_overlap(problems[:1], problems[1:] + [Problem("x", "?", "1")], allowed=0)
    for i, problem in enumerate(problems[2:], 2):
        check_overlap([problem], problems[:i] + problems[i + 1 :], allowed=0)
    once = [Problem(f"{mark}{i}", f"What is {i} + 1{mark}", "1") for i in range(40) for mark in (" ?", "?")]
    trained, held_out, _ = hold_out(once, None)
    check_overlap(trained, held_out, allowed=0)
    assert len(held_out) == 8 and len(trained) < 72
    assert f"{72 - len(trained)} problems are not trained on" in caplog.text


def test_some_of_a_sorted_file_are_of_all_its_kinds_and_in_its_order(tmp_path):
    rows = [{"problem": p.prompt, "answer": 1, "kind": p.kind} for p in kinds_in_turn(400)]
    source = write(tmp_path / "a.jsonl", rows)
    some, whole = (tasks.load(source, split="heldout", limit=limit)[0] for limit in (40, 0))
    assert len(some) == 40 and 10 <= sum(p.kind == "first" for p in some) <= 30
    assert some == [p for p in whole if p in some] == some_of(whole, 40)
    assert [p.prompt for p in some] == sorted((p.prompt for p in some), key=lambda text: int(text.partition("+")[0]))


def test_a_column_of_context_that_no_prompt_has_is_told(tmp_path, caplog):
    row = {"Body": "Ann has 3 apples.", "question": "How many?", "answer": 3}
    [problem], _ = load_problems(write(tmp_path / "a.jsonl", [row]))
    assert problem.prompt == "How many?" and "a.jsonl: the column Body is not part of the prompts" in caplog.text


def test_a_hub_set_to_evaluate_on_names_its_split():
    for source in ("hub:openai/gsm8k", "hub:openai/gsm8k:main@abc"):
        with pytest.raises(ValueError, match="name its split: hub:owner/name:"):
            tasks.load(source, split="heldout")


def test_an_older_run_is_evaluated_on_its_tail_and_a_new_one_on_what_it_held_out(tmp_path):
    rows = [{"problem": p.prompt, "answer": 1} for p in kinds_in_turn(50)]
    source = write(tmp_path / "a.jsonl", rows)
    problems, record = load_problems(source)
    cfg = Config(train_data=source, eval_data="", eval_problems=3)
    for chosen in {"last": 5}, {"by": "hash", "count": 5}:
        loaded = {"train_data": record, "eval_data": {"held out of": "train_data", **chosen}}
        run = TrainedRun(tmp_path, tmp_path, loaded)
        assert run.held_out(cfg) == ("heldout", hold_out(problems, chosen)[1][:3], {**record, **chosen})
