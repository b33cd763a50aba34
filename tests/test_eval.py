"""An evaluation is the same however it was interrupted or shared out, and that of a run's model is the run's own; what
was made of other weights, data or settings is refused."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import two_ranks

import eval as eval_module
import tasks
from eval import PAPER_BENCHMARKS, Sample, evaluate, markdown, parse_args, summary
from model import Transformer
from ranks import Ranks, RunError
from reward import Grader
from runfolder import FolderLock

ROOT = Path(__file__).parents[1]


# ---- the command

def flags(base: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(base), "--benchmarks", str(base.parent / "sums.jsonl"), "arithmetic", "--engine", "torch",
            "--problems", "100", "--k", "4", "--temperature", "1", "--top_p", "1",
            "--top_k", "0", "--prompt_suffix", "", "--max_prompt_tokens", "32", "--max_response_tokens", "8",
            "--out", str(out), *more]


def run(base: Path, out: Path, *more: str) -> dict:
    evaluate(parse_args(flags(base, out, *more)))
    return json.loads((out / "eval.json").read_text())


@pytest.fixture(scope="module")
def evaluated(base, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run(base, out)
    return out


def test_an_evaluation_writes_every_response_and_the_figures(evaluated):
    lines = [json.loads(x) for x in (evaluated / "eval_samples.jsonl").read_text().splitlines()]
    saved = json.loads((evaluated / "eval.json").read_text())
    assert len(lines) == 800 and lines[0].keys() == Sample.__dataclass_fields__.keys()
    assert [x["benchmark"] for x in lines] == ["sums"] * 400 + ["arithmetic"] * 400
    for row, of in ((saved["figures"]["sums"], lines[:400]), (saved["figures"]["all"], lines)):
        assert row["mean@4"][0] == pytest.approx(np.mean([x["right"] for x in of])) and 0 < row["mean@4"][0] < 1
        assert row["truncated_frac"] == np.mean([x["finish"] == "length" for x in of]) > 0
    assert not any(x["right"] for x in lines if x["finish"] == "length")
    assert all(x["right"] == (x["extracted"] == x["gold"]) for x in lines if x["finish"] == "stop")
    assert saved["settings"]["eval_rollouts"] == 4 and str(evaluated.parent) not in json.dumps(saved)
    assert list(saved["figures"]["arithmetic"]["by_kind"]) == list(tasks.TASKS["arithmetic"].kinds)
    assert "by_kind" not in saved["figures"]["sums"]


@pytest.mark.parametrize("kept", [0, 64 * 4 + 7, 140 * 4])
def test_an_interrupted_evaluation_goes_on_to_the_same_file(base, evaluated, tmp_path, kept, monkeypatch):
    whole = (evaluated / "eval_samples.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "eval_samples.jsonl").write_text("".join(lines[:kept]) + lines[kept][:20])  # killed in mid-line
    settings = json.loads((evaluated / "eval.json").read_text())["settings"]
    (tmp_path / "eval.json").write_text(json.dumps({"settings": settings}))
    drawn, draw = [], eval_module.draw_part

    def record(engine, ranks, prompts, *rest, **more):
        drawn.append(len(prompts))
        return draw(engine, ranks, prompts, *rest, **more)

    monkeypatch.setattr(eval_module, "draw_part", record)
    saved = run(base, tmp_path)
    assert (tmp_path / "eval_samples.jsonl").read_text() == whole
    assert saved["figures"] == json.loads((evaluated / "eval.json").read_text())["figures"]
    assert sum(drawn) == 200 - kept // 256 * 64  # whole chunks of 64 problems are kept
    drawn.clear()
    run(base, tmp_path)
    assert not drawn  # finished: nothing is drawn again


def test_a_larger_k_draws_the_others_and_ends_as_if_all_were_drawn_at_once(base, evaluated, tmp_path, monkeypatch):
    fewer = run(base, tmp_path, "--k", "1")["settings"]
    kept, drawn, draw = (tmp_path / "eval_samples.jsonl").read_text(), [], eval_module.draw_part

    def killed(engine, ranks, prompts, n_P, *rest, first):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append((len(prompts), set(n_P), first))
        return draw(engine, ranks, prompts, n_P, *rest, first=first)

    monkeypatch.setattr(eval_module, "draw_part", killed)
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path)
    assert json.loads((tmp_path / "eval.json").read_text())["settings"] == fewer  # which its figures are of
    monkeypatch.undo()
    figures, whole = run(base, tmp_path)["figures"], json.loads((evaluated / "eval.json").read_text())["figures"]
    assert drawn == [(64, {3}, 1)] * 2 and figures == whole
    lines = (tmp_path / "eval_samples.jsonl").read_text()
    assert lines.startswith(kept) and sorted(lines.splitlines()) == sorted(
        (evaluated / "eval_samples.jsonl").read_text().splitlines())
    run(base, tmp_path)
    assert (tmp_path / "eval_samples.jsonl").read_text() == lines  # finished: nothing is drawn again


@two_ranks
def test_two_processes_evaluate_alike(base, evaluated, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval.py",
               *flags(base, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "eval_samples.jsonl").read_text() == (evaluated / "eval_samples.jsonl").read_text()
    assert "| arithmetic | 100 |" in done.stdout


def test_other_weights_are_refused_wherever_they_lie(base, evaluated, tmp_path):
    same, other = shutil.copytree(base, tmp_path / "same"), shutil.copytree(base, tmp_path / "model")
    model = Transformer.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    model.save_pretrained(other)
    again = shutil.copytree(evaluated, tmp_path / "out")
    assert run(base, again, "--model", str(same))["figures"] == json.loads(
        (evaluated / "eval.json").read_text())["figures"]
    with pytest.raises(FileExistsError, match="other weights or config.json; choose another --out or delete it"):
        run(base, again, "--model", str(other))
    (again / "eval.json").unlink()  # responses that nothing speaks for
    with pytest.raises(FileExistsError, match="no eval.json says of what"):
        run(base, again)


def test_the_same_weights_with_another_tokenizer_are_refused(base, evaluated, tmp_path):
    file = shutil.copytree(base, tmp_path / "model") / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["vocab"] |= {"1": words["model"]["vocab"]["2"], "2": words["model"]["vocab"]["1"]}
    file.write_text(json.dumps(words))
    with pytest.raises(FileExistsError, match="other prompts, tokens or answers in sums, "):
        run(base, evaluated, "--model", str(tmp_path / "model"))


def test_a_changed_data_file_is_refused(base, tmp_path):
    data = tmp_path / "sums.jsonl"
    shutil.copy(base.parent / "sums.jsonl", data)
    small = ["--benchmarks", str(data), "--problems", "3", "--k", "1"]
    run(base, tmp_path / "out", *small)
    data.write_text("\n" + data.read_text())  # to the byte, as what it was cannot be known
    with pytest.raises(FileExistsError, match="other content in sums;"):
        run(base, tmp_path / "out", *small)


@pytest.mark.parametrize("flag, value, was", [
    ("--stop_tokens", "0,1", "other --stop_tokens"), ("--top_k", "5", r"--top_k 0 \(now 5\)"),
    ("--seed", "1", r"--seed 0 \(now 1\)"), ("--k", "3", r"--k 4 \(now 3\);"),
    ("--answer_style", "gsm8k", "--answer_style auto"),
    ("--prompt_suffix", "=", "other --prompt_suffix and prompts, tokens or answers in sums,"),
    ("--benchmarks", "arithmetic", r": --benchmarks sums arithmetic \(now arithmetic\);")])
def test_what_changes_the_question_or_the_answer_is_another_evaluation(base, evaluated, flag, value, was):
    with pytest.raises(FileExistsError, match=was):
        run(base, evaluated, flag, value)


# ---- a run's model

TRAINED = {"steps": 2, "eval_problems": 60}
UNTRAINED = {"steps": 0, "eval_data": "", "train_problems": 90, "max_prompt_tokens": 0}


@pytest.fixture(scope="module", params=[TRAINED, UNTRAINED], ids=["own eval_data", "held out of train_data"])
def trained(request, base, tmp_path_factory) -> Path:
    """A run as the command leaves it."""
    out, sums = tmp_path_factory.mktemp("runs") / "mine", base.parent / "sums.jsonl"
    values = {"model": base, "out_dir": out, "engine": "torch", "seed": 5, "prompts_per_step": 24, "train_data": sums,
              "minibatch_prompts": 12, "max_response_tokens": 8, "eval_data": sums, "eval_rollouts": 4,
              "eval_temperature": 1.3, "eval_top_k": 9, "learning_rate": 1e-2, "allow_overlap": 1, **request.param}
    subprocess.run([sys.executable, "train.py", "--preset", "arithmetic",
                    *(str(x) for k, v in values.items() for x in (f"--{k}", v))], cwd=ROOT, check=True, timeout=300)
    return out


def test_a_run_is_evaluated_again_as_it_evaluated_itself(trained, tmp_path, capsys):
    own = json.loads((trained / "eval.json").read_text())[-1]
    evaluate(parse_args(["--model", str(trained), "--out", str(tmp_path)]))
    saved, said = json.loads((tmp_path / "eval.json").read_text()), capsys.readouterr().out
    (row,) = saved["figures"].values()
    assert [row["problems"], row["responses"]] == [own["problems"], own["rollouts"]]
    assert row["mean@4"] == pytest.approx([own["mean"], *own["intervals"]["mean@4"]]) and 0 < own["mean"] < 1
    assert {k: row[k][0] for k in own["passes"]} == own["passes"]
    assert [row["tokens_mean"], row["truncated_frac"]] == [own["response_tokens_mean"], own["truncated_frac"]]
    assert f"as {trained}: --k 4 --temperature 1.3 --top_p 1.0 --top_k 9 --seed 5" in said
    assert saved["settings"]["model"] == "mine" and str(trained.parent) not in json.dumps(saved)
    before = (tmp_path / "eval_samples.jsonl").read_text()
    evaluate(parse_args(["--model", str(trained / "model"), "--out", str(tmp_path)]))  # finished: as it was
    assert (tmp_path / "eval_samples.jsonl").read_text() == before
    with pytest.raises(FileExistsError, match=r"--k 4 \(now 2\)"):
        evaluate(parse_args(["--model", str(trained), "--out", str(tmp_path), "--k", "2"]))


def test_a_run_whose_data_are_gone_or_changed_says_so_and_takes_others(trained, base, tmp_path, monkeypatch, capsys):
    moved = shutil.copytree(trained, tmp_path / "mine")
    (moved / "paths.json").unlink()  # as on another machine: config.json names the file and not its folder
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="sums.jsonl"):
        evaluate(parse_args(["--model", "mine", "--out", "a"]))
    Path("sums.jsonl").write_text('{"question": "1s1=", "answer": 2}\n' * 2)
    with pytest.raises(ValueError, match="sums.jsonl.* has changed since: name the problems .* with --benchmarks"):
        evaluate(parse_args(["--model", "mine", "--out", "b"]))
    evaluate(parse_args(["--model", "mine", "--benchmarks", "sums.jsonl", "--out", "c"]))
    assert "the run trained on, too, is not counted: sums.jsonl" in capsys.readouterr().out
    assert json.loads(Path("c/eval.json").read_text())["figures"]["sums"]["problems"] == 1


def test_problems_that_the_run_trained_on_are_counted(trained, base, tmp_path, caplog):
    evaluate(parse_args(["--model", str(trained), "--benchmarks", str(base.parent / "sums.jsonl"), "--k", "1",
                         "--out", str(tmp_path)]))
    config = json.loads((trained / "config.json").read_text())
    both = 100 if config["eval_data"] else 81  # of the first 90 nine are held out
    assert f"sums: {both} of 100 problems stand in train_data, too" in caplog.text


def test_settings_that_went_are_no_obstacle_to_an_older_run(trained, tmp_path):
    config = json.loads((trained / "config.json").read_text()) | {"weight_cap": 5.0, "rollout_utility": "coverage"}
    older = shutil.copytree(trained, tmp_path / "older")
    (older / "config.json").write_text(json.dumps(config))
    evaluate(parse_args(["--model", str(older), "--out", str(tmp_path / "out")]))
    assert (tmp_path / "out" / "eval_samples.jsonl").read_text()


def test_the_hub_set_of_a_run_is_taken_at_the_commit_that_it_had(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "mine")
    (tmp_path / "mine" / "paths.json").unlink()
    config = json.loads((trained / "config.json").read_text())
    config |= {"eval_data": "math500", "loaded": {"eval_data": {"revision": "c0ffee"}}}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(tasks, "load_problems", lambda source, revision: ([f"{source} at {revision}"], {}))  # the hub
    args = parse_args(["--model", str(tmp_path / "mine"), "--problems", "0"])
    assert args.run.held_out(args.cfg)[1] == ["math500 at c0ffee"]


def test_a_run_without_a_model_says_how_to_get_one(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "mine", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(FileNotFoundError, match="no model/ yet.*--resume"):
        parse_args(["--model", str(tmp_path / "mine")])


def test_two_evaluations_are_compared_problem_by_problem(tmp_path, capsys):
    """Problems of pass rates 0, 1/4, ... of which half gain a quarter: the interval is of the gains alone."""
    for name, m, gain in (("a", 4, 0), ("b", 8, 1)):
        right = [m // 4 * (i % 4 + gain * (i % 2)) for i in range(40)]
        samples = [Sample(b, str(i), f"{i}", "1", "math", "", j, "1", 5, "stop", right=j < right[i])
                   for b in ("x", "y") for i in range(40) for j in range(m)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval_samples.jsonl").write_text(eval_module.lines_of(samples))
        (tmp_path / name / "eval.json").write_text(json.dumps({"settings": {
            "eval_rollouts": m, "eval_temperature": 0.6 + gain, "weights": name, "benchmarks": {"x": {}, "y": {}}}}))
    a, b = tmp_path / "a", tmp_path / "b"
    eval_module.compare(*parse_args(["--compare", str(a), str(b)]).compare)
    said, rows = capsys.readouterr().out, {}
    for line in said.splitlines():
        cells = [x.strip() for x in line.split("|")]
        rows |= {cells[1]: cells[2:-1]} if len(cells) > 1 else {}
    assert list(rows) == ["benchmark", "---", "x", "y", "all"]
    assert rows["benchmark"] == ["problems", "mean@4/8", "pass@4"]
    assert rows["x"][0] == "40" and rows["all"][0] == "80" and rows["x"] == rows["y"]
    value, low, high = (float(x) for x in re.findall(r"[+-][\d.]+", rows["x"][1]))
    assert value == 12.5 and 8 < low < 10 and 15 < high < 17  # 12.5 +- 1.96 * 12.5 / sqrt(40)
    assert "was asked or graded in other ways" in said and "weights" not in said
    assert "--k 4 (there 8), --temperature 0.6 (there 1.6)" in said
    with pytest.raises(ValueError, match=r"has no eval_samples.jsonl: it holds no evaluation .* with --model"):
        eval_module.compare(a, tmp_path)
    (b / "eval_samples.jsonl").write_text(eval_module.lines_of([s for s in samples if s.id != "7"]))
    with pytest.raises(ValueError, match="differ in their problems: 2 stand in one alone, such as '7' of x"):
        eval_module.compare(a, b)


def test_evaluations_have_folders_of_their_own(trained):
    shutil.copytree(trained / "model", trained / "best", dirs_exist_ok=True)
    models = [["arithmetic:3"], ["Qwen/Qwen3-4B"], ["Qwen/Qwen3-4B@v1"], [str(trained)], [str(trained / "best")],
              [str(trained), "--benchmarks", "aime24", "my/sums.jsonl"], [str(trained), "--benchmarks", "hub:a/b:c"]]
    assert [str(parse_args(["--model", *m]).out) for m in models] == [
        "out/eval-arithmetic-3", "out/eval-Qwen3-4B", "out/eval-Qwen3-4B-v1", "out/eval-mine", "out/eval-mine-best",
        "out/eval-mine-aime24-sums", "out/eval-mine-hub-a-b-c"]
    assert parse_args(["--model", str(trained / "model")]).out == parse_args(["--model", str(trained)]).out
    with pytest.raises(ValueError, match="must stay"):  # its eval.json is another's
        parse_args(["--model", str(trained), "--out", str(trained)])


# ---- grading

def changed(folder: Path, *more: str) -> int:
    """How many verdicts --regrade changes."""
    with pytest.MonkeyPatch.context() as context, contextlib.redirect_stdout(io.StringIO()) as printed:
        context.chdir(folder)  # where a reward of one's own lies
        eval_module.regrade(parse_args(["--regrade", ".", *more]))
    return int(re.search(r"\n(\d+) of 800 verdicts changed", printed.getvalue())[1])


def test_regrading_prints_the_same_table_and_counts_changed_verdicts(evaluated, tmp_path, capsys):
    old = eval_module.read_samples(evaluated / "eval_samples.jsonl")
    wrong = next(i for i, s in enumerate(old) if s.finish == "stop" and not s.right)
    other = [*old[:wrong], dataclasses.replace(old[wrong], right=True), *old[wrong + 1 :]]
    (tmp_path / "eval_samples.jsonl").write_text(eval_module.lines_of(other))
    (tmp_path / "eval.json").write_text(json.dumps({"settings": {"model": "me/Qwen3-8B-mine"}}))
    eval_module.regrade(parse_args(["--regrade", str(tmp_path)]))
    printed, rows = capsys.readouterr().out, json.loads((evaluated / "eval.json").read_text())["figures"]
    assert markdown(rows, "me/Qwen3-8B-mine") in printed and "1 of 800 verdicts changed" in printed
    settings = {"model": "x", "benchmarks": {"sums": {"problems": 300}}}
    (tmp_path / "eval.json").write_text(json.dumps({"settings": settings}))
    eval_module.regrade(parse_args(["--regrade", str(tmp_path)]))
    assert "holds 200 of 300 problems: the evaluation was interr" in capsys.readouterr().out
    (tmp_path / "eval.json").write_text(json.dumps({"settings": {"model": "me/Qwen3-8B-mine"}}))
    joined = tmp_path / "joined.jsonl"  # of two evaluations: a problem's responses are no neighbours
    joined.write_text(eval_module.lines_of(sorted(old, key=lambda s: s.sample % 2)))
    eval_module.regrade(parse_args(["--regrade", str(joined)]))
    assert markdown(rows, "me/Qwen3-8B-mine") in capsys.readouterr().out


def test_regrading_takes_another_style_and_another_reward(evaluated, tmp_path):
    old = eval_module.read_samples(evaluated / "eval_samples.jsonl")
    out = shutil.copytree(evaluated, tmp_path / "out")
    assert changed(out, "--answer_style", "dapo") == sum(s.right for s in old)  # nobody writes "Answer:"
    (out / "mine.py").write_text("def asks_for_zero(response, problem):\n"
                                 "    return 0.5 if problem.prompt.startswith('0s') else -0.5\n")
    new = [s.prompt.startswith("0s") for s in old]
    assert changed(out, "--reward", "mine.py:asks_for_zero") == sum(s.right != n for s, n in zip(old, new, strict=True))
    settings = json.loads((out / "eval.json").read_text())["settings"] | {"reward": "mine.py:asks_for_zero"}
    (out / "eval.json").write_text(json.dumps({"settings": settings}))
    assert changed(out) == changed(out, "--reward", "mine.py:asks_for_zero") > 0  # what was graded so is graded so


def test_a_reward_of_ones_own_sees_messages_columns_and_cuts_again(tmp_path):
    (tmp_path / "mine.py").write_text("def asked(response, problem):\n    return response.cut and problem.messages[0]"
                                      "['role'] == 'system' and problem.columns.get('worth', 0.5)\n")
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1s1="}]
    lines = eval_module.lines_of([
        Sample("b", "1", "1s1=", "2", "math", "", 0, "2", 1, finish, messages=messages, columns=columns)
        for finish, columns in (("length", {"worth": -1}), ("length", {}), ("stop", {}))])
    (tmp_path / "eval_samples.jsonl").write_text(lines.replace(', "columns": {}', ""))  # as they were before columns
    with Grader(workers=1, timeout=20, reward=f"{tmp_path}/mine.py:asked") as grader:
        again = eval_module.grade(eval_module.read_samples(tmp_path / "eval_samples.jsonl"), grader)
    assert [s.right for s in again] == [False, True, False]


def test_an_evaluation_with_a_reward_of_ones_own_names_its_content(base, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def short(response, problem):\n    return 0.3 if len(response) == 1 else -1\n")
    more = ["--benchmarks", "arithmetic", "--problems", "20", "--reward", f"{file}:short"]
    saved = run(base, tmp_path / "out", *more)
    samples = eval_module.read_samples(tmp_path / "out" / "eval_samples.jsonl")
    assert [s.right for s in samples] == [len(s.response) == 1 for s in samples]
    assert saved["settings"]["reward"] == "mine.py:short" and 0 < saved["figures"]["arithmetic"]["mean@4"][0] < 1
    file.write_text(file.read_text().replace("0.3", "0.4"))
    with pytest.raises(FileExistsError, match="other code in --reward"):
        run(base, tmp_path / "out", *more)


def test_gold_answers_that_nobody_can_give_are_refused_until_admitted(base, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "1s1=", "answer": "So it is clear that 1 and 1 have a sum of 2"}\n'
                   '{"question": "2s1=", "answer": 3}\n')
    with pytest.raises(ValueError, match="(?s)bad: 1 of 2 .*--allow_bad_golds"):
        run(base, tmp_path / "out", "--benchmarks", str(bad))
    assert run(base, tmp_path / "out", "--benchmarks", str(bad), "--allow_bad_golds", "0.5")["figures"]["bad"]


def test_an_evaluation_does_not_write_beside_another(base, tmp_path):
    other = FolderLock(tmp_path / "out", Ranks())
    with pytest.raises(RunError, match=r"out is in use: process \d+ on "):
        run(base, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [other.path]


# ---- benchmarks

def test_a_misspelt_file_is_an_error_before_anything_is_drawn(base, tmp_path):
    two = ["--benchmarks", "arithmetic", "misspelt.jsonl"]
    command = [sys.executable, "eval.py", *flags(base, tmp_path / "out", *two)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("eval.py: ")
    assert "misspelt.jsonl" in done.stderr and not (tmp_path / "out").exists()


def test_a_hub_set_that_cannot_be_had_is_left_out_with_a_warning(base, tmp_path, monkeypatch, capsys):
    take = tasks.load_problems

    def gated(source: str, revision: str | None):
        if source == "gpqa":
            raise ConnectionError("log in")
        return take(source, revision=revision)

    monkeypatch.setattr(tasks, "load_problems", gated)
    small = ["--benchmarks", str(base.parent / "sums.jsonl"), "gpqa", "--problems", "3", "--k", "1"]
    assert list(run(base, tmp_path / "out", *small)["figures"]) == ["sums"]
    assert "WARNING: gpqa is left out. log in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no benchmark could be loaded"):
        run(base, tmp_path / "none", "--benchmarks", "gpqa")


def test_the_papers_row_stands_beside_its_models_and_aime_is_the_mean_of_two_years():
    samples = [Sample(b, "1", "1", "1", "math", "", j, "1", 5, "stop", right=j > (1 if b == "aime24" else 3))
               for b in PAPER_BENCHMARKS for j in range(8)]
    rows = summary(samples)
    assert list(rows) == [*PAPER_BENCHMARKS, "aime", "all"]
    assert rows["aime"]["mean@8"][0] == (rows["aime24"]["mean@8"][0] + rows["aime25"]["mean@8"][0]) / 2 == 0.625
    lines = {x.split(" | ")[0][2:]: x for x in markdown(rows, "Qwen/Qwen3-4B-Base").splitlines()}
    assert lines["aime"].endswith("| 11.25 | 12.92 | 13.96 |") and lines["all"].endswith("| 56.31 | 63.70 | 62.27 |")
    assert "paper" not in markdown(rows, "arithmetic") + markdown(rows, "meta-llama/Llama-3.1-8B")
    some = {name: row for name, row in rows.items() if name != "gpqa"}
    assert "| all |" in (page := markdown(some, "Qwen/Qwen3-4B-Base")) and "| 56.31 |" not in page
    assert parse_args(["--model", "x"]).benchmarks == list(PAPER_BENCHMARKS)


def test_kinds_have_rows_of_their_own_and_the_whole_is_pooled_over_problems():
    of = {"sum": [[1, 0, 0, 0], [1, 1, 1, 1]], "root": [[0, 0, 0, 0]], "": [[1, 1, 1, 1]]}
    samples = [Sample("mine" if kind else "other", f"{kind}{i}", "1", "1", "math", kind, j, "1", 5, "stop", right=r > 0)
               for kind, problems in of.items() for i, right in enumerate(problems) for j, r in enumerate(right)]
    rows = summary(samples)
    assert rows["mine"]["by_kind"] == {"sum": [2, 0.625, 1.0], "root": [1, 0.0, 0.0]}
    assert markdown(rows, "").splitlines()[-4:] == [
        "| mine, by kind | problems | mean@4 | pass@2 | pass@4 |", "| --- | --- | --- | --- | --- |",
        "| sum | 2 | 62.5 [25.0, 100.0] | 75.0 [50.0, 100.0] | 100.0 [15.8, 100.0] |",
        "| root | 1 | 0.0 [-] | 0.0 [-] | 0.0 [-] |"]
    assert [rows[name]["problems"] for name in rows] == [3, 1, 4] and rows["all"]["mean@4"][0] == 9 / 16


def test_one_problem_has_no_interval_and_a_response_without_a_verdict_is_told():
    rows = summary([Sample("one", "1", "1", "1", "math", "", 0, "1", 5, "stop", timed_out=True)])
    assert markdown(rows, "").splitlines()[2:] == [
        "| benchmark | problems | mean@1 | style | no answer | cut |", "| --- | --- | --- | --- | --- | --- |",
        "| one | 1 | 0.0 [-] | math | 100.0 | 0.0 |", "",
        "one: WARNING: of 1 responses 1 timed out in grading, 0 failed, and count as wrong"]
    assert json.loads(json.dumps(rows))["one"]["mean@1"] == [0.0, None, None]


@pytest.mark.parametrize("arguments, message", [
    ([], "--model"), (["--model", "x", "--bench", "y"], "did you mean --benchmarks?"),
    (["--model", "x", "--eval_rollouts", "8"], "did you mean --k?"),
    (["--model", "x", "--k", "0"], "--k must be at least 1"),
    (["--model", "x", "--temperature", "0"], "use it with --k 1"),
    (["--regrade", "x", "--k", "4"], "--k: what was drawn already"),
    (["--compare", "x", "y", "--problems", "4"], "--problems: what was drawn already")])
def test_wrong_flags_are_refused(arguments, message, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_args(arguments)
    assert message in capsys.readouterr().err + str(error.value)
