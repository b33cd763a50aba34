"""An evaluation is the same however it was interrupted or shared out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import two_ranks

import eval as eval_module
import tasks
from eval import PAPER_BENCHMARKS, evaluate, markdown, parse_args, summary

ROOT = Path(__file__).parents[1]


# ---- the command

def flags(base: Path, out: Path, *more: str) -> list[str]:
    return ["--model", str(base), "--benchmarks", str(base.parent / "sums.jsonl"), "arithmetic", "--problems", "100",
            "--engine", "torch", "--k", "4", "--prompt_suffix", "", "--max_prompt_tokens", "32",
            "--max_response_tokens", "8", "--temperature", "1", "--top_p", "1", "--top_k", "0", "--out", str(out),
            *more]


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
    assert len(lines) == 800 and list(lines[0]) == ["benchmark", "id", "sample", "gold", "style", "response",
                                                   "extracted", "right", "timed_out", "tokens", "finish",
                                                   "failed"]
    assert [x["benchmark"] for x in lines] == ["sums"] * 400 + ["arithmetic"] * 400
    for row, of in ((saved["figures"]["sums"], lines[:400]), (saved["figures"]["all"], lines)):
        assert row["mean@4"][0] == pytest.approx(np.mean([x["right"] for x in of])) and 0 < row["mean@4"][0] < 1
        assert row["truncated_frac"] == np.mean([x["finish"] == "length" for x in of]) > 0
    assert not any(x["right"] for x in lines if x["finish"] == "length")
    assert all(x["right"] == (x["extracted"] == x["gold"]) for x in lines if x["finish"] == "stop")
    assert saved["settings"]["k"] == 4 and str(evaluated) not in json.dumps(saved)


@pytest.mark.parametrize("kept", [0, 64 * 4 + 7, 140 * 4])
def test_an_interrupted_evaluation_goes_on_to_the_same_file(base, evaluated, tmp_path, kept, monkeypatch):
    whole = (evaluated / "eval_samples.jsonl").read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "eval_samples.jsonl").write_text("".join(lines[:kept]) + lines[kept][:20])  # killed in mid-line
    settings = json.loads((evaluated / "eval.json").read_text())["settings"]
    (tmp_path / "eval.json").write_text(json.dumps({"settings": settings}))
    drawn, draw = [], eval_module.draw_together

    def record(engine, ranks, prompts, *rest):
        drawn.append(len(prompts))
        return draw(engine, ranks, prompts, *rest)

    monkeypatch.setattr(eval_module, "draw_together", record)
    saved = run(base, tmp_path)
    assert (tmp_path / "eval_samples.jsonl").read_text() == whole
    assert saved["figures"] == json.loads((evaluated / "eval.json").read_text())["figures"]
    assert sum(drawn) == 200 - kept // 256 * 64  # whole chunks of 64 problems are kept
    drawn.clear()
    run(base, tmp_path)
    assert not drawn  # finished: nothing is drawn again


@two_ranks
def test_two_processes_evaluate_alike(base, evaluated, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "eval.py",
               *flags(base, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "eval_samples.jsonl").read_text() == (evaluated / "eval_samples.jsonl").read_text()
    assert "| arithmetic | 100 |" in done.stdout


def test_other_settings_in_the_same_folder_are_refused(base, evaluated):
    with pytest.raises(FileExistsError, match="seed 0"):
        run(base, evaluated, "--seed", "1")


def test_regrading_gives_the_same_table_and_counts_changed_verdicts(evaluated, tmp_path, capsys):
    rows = json.loads((evaluated / "eval.json").read_text())["figures"]
    lines = (evaluated / "eval_samples.jsonl").read_text().splitlines()
    wrong = next(i for i, x in enumerate(lines) if json.loads(x)["finish"] == "stop" and not json.loads(x)["right"])
    lines[wrong] = json.dumps({**json.loads(lines[wrong]), "right": True})
    (tmp_path / "s.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "eval.json").write_text(json.dumps({"settings": {"model": "me/Qwen3-8B-mine"}}))
    eval_module.regrade(parse_args(["--regrade", str(tmp_path / "s.jsonl"), "--out", str(tmp_path / "again")]))
    printed = capsys.readouterr().out
    assert markdown(rows, "me/Qwen3-8B-mine") in printed and "1 of 800 verdicts changed" in printed
    assert "paper, GRPO" in printed
    assert json.loads((tmp_path / "again" / "eval.json").read_text())["figures"] == rows
    assert (tmp_path / "again" / "eval_samples.jsonl").read_text() == (evaluated / "eval_samples.jsonl").read_text()


def test_a_benchmark_that_cannot_be_had_is_named_and_the_others_go_on(base, tmp_path, monkeypatch, capsys):
    def gated(name, **_):
        raise ConnectionError(f"cannot load {name}: log in (`hf auth login`)")

    monkeypatch.setattr(tasks, "load_problems", gated)
    evaluate(parse_args(flags(base, tmp_path, "--benchmarks", "gpqa,arithmetic", "--problems", "10")))
    out = capsys.readouterr().out
    assert "left out: gpqa" in out and "| arithmetic | 10 |" in out
    assert "hf auth login" in json.loads((tmp_path / "eval.json").read_text())["missing"]["gpqa"]


def test_local_files_are_benchmarks_and_the_whole_is_pooled_over_problems(base, tmp_path):
    rows = [{"problem": f"{i}s1=", "answer": i + 1} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps([{"question": "2s2=", "final_answer": "4"}]))
    files = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.json'}"
    evaluate(parse_args(flags(base, tmp_path / "out", "--benchmarks", files)))
    rows = json.loads((tmp_path / "out" / "eval.json").read_text())["figures"]
    assert [rows[x]["problems"] for x in ("a", "b", "all")] == [6, 1, 7]
    assert rows["all"]["mean@4"][0] == pytest.approx((6 * rows["a"]["mean@4"][0] + rows["b"]["mean@4"][0]) / 7)


def test_the_papers_row_stands_beside_its_models():
    samples = [eval_module.Sample(b, "1", j, "1", "math", "1", "1", j > 3, False, 5, "stop")
               for b in PAPER_BENCHMARKS for j in range(8)]
    rows = summary(samples)
    assert list(rows) == [*PAPER_BENCHMARKS, "aime", "all"]
    lines = {x.split(" | ")[0][2:]: x for x in markdown(rows, "Qwen/Qwen3-4B-Base").splitlines()}
    assert lines["aime"].endswith("| 11.25 | 12.92 | 13.96 |") and lines["all"].endswith("| 56.31 | 63.70 | 62.27 |")
    assert "paper" not in markdown(rows, "arithmetic")
    assert parse_args(["--model", "x"]).benchmarks == list(PAPER_BENCHMARKS)


@pytest.mark.parametrize("arguments, message", [
    ([], "--model"), (["--model", "x", "--regrade", "y"], "--regrade"), (["--model", "x", "--k", "0"], "--k"),
    (["--model", "x", "--temperature", "0"], "--temperature"), (["--model", "x", "--bench", "aime24"], "--bench"),
])
def test_wrong_flags_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(arguments)
    assert message in capsys.readouterr().err
