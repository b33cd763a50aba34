"""Problems from files and from the hub, and what a tokenizer makes of them; whatever is wrong is named."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
from data import Problem, batch_order, encode_prompts, load_problems, stop_token_ids


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
    ({"reward_model": {"ground_truth": "2", "style": "rule"}}, "2", "dapo"),
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
    messages = [{"role": "system", "content": "be good"}, {"role": "user", "content": "1+1?"}]
    problems, _ = load_problems(write(tmp_path / "a.parquet", [{"prompt": messages, "answer": "2", "id": 7}]))
    assert problems == [Problem("7", "1+1?", "2")]


@pytest.mark.parametrize("rows, message", [
    ([], r"set.jsonl has no rows"),
    ([{"text": "1+1?", "answer": "2"}], r"set.jsonl, line 1: none of the columns text, answer is called problem"),
    ([{"problem": "1+1?", "label": "2"}], r"line 1: none of the columns problem, label is called answer or"),
    ([{"problem": "a", "answer": "2"}, {"problem": "b", "answer": " "}], r"line 2: the answer is empty.*remove"),
    ([{"problem": "a", "answer": float("nan")}], r"line 1: the answer is empty"),
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
    ("a.json", b"[1, 2", r"a.json: broken JSON at line 1"),
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


def test_a_local_file_has_no_revision(tmp_path):
    with pytest.raises(ValueError, match="is a local file"):
        load_problems(write(tmp_path / "a.jsonl", [{"problem": "a", "answer": 1}]), revision="main")


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
