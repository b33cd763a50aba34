"""The bench's own machinery, what the compiler makes of the kernels, and the tables of docs/speed.md."""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
import plan
from bench import kernels
from config import parse_args
from model import Transformer

ROOT = Path(__file__).parents[1]


def test_kernels_of_the_head_in_bf16_use_wgmma_and_tma_and_no_kernel_spills_on_sm_90():
    """In a process of its own, where Triton compiles even if these tests run it as an interpreter."""
    triton = importlib.util.find_spec("triton")
    if triton is None or not (Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("needs Triton with its NVIDIA tools")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, ROOT / "tests/sm90.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *head, advantage = map(json.loads, done.stdout.splitlines())
    assert {r["kernel"] for r in head} == {"_fold_kernel", "_dlogits_kernel", "_dhidden_kernel", "_dweight_kernel"}
    assert len(head) == 5 and advantage["kernel"] == "_kernel"
    for row in (*head, advantage):
        assert row["stack bytes"] == 0, row  # where spilled registers would lie
    for row in head:
        assert row["wgmma"] and row["TMA loads"] and row["shared KiB"] < 227, row  # what a block may have


@pytest.mark.parametrize("make", [lambda: kernels.linear_case(1024, 500, 32, half=True),
                                  lambda: kernels.advantage_case(8, 40)], ids=["linear", "advantage"])
def test_what_is_timed_computes_one_thing_and_who_fails_stays_with_the_reason(make, monkeypatch):
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    monkeypatch.setattr(kernels, "DTYPE", torch.float32)
    case = make()
    loaders = {"ours": case.loaders["ours"], "eager": case.loaders["eager"], "broken": lambda: [].not_there()}
    monkeypatch.setattr(kernels, "PEER_ERRORS", AttributeError)
    rows = list(kernels.measure(case._replace(loaders=loaders)))
    directions = ("forward", "both") if case.grad is not None else ("forward",)
    assert [(r["direction"], r["provider"]) for r in rows] == [(d, name) for d in directions for name in loaders]
    for *ran, broken in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert all(row["error"] < 1e-5 and row["ms"] > 0 and row["note"] is None for row in ran)
        assert broken["note"].startswith("AttributeError: ") and broken["ms"] is None
    if case.grad is not None:
        ours, plain = (kernels.both(loaders[name](), case.arguments, case.grad) for name in ("ours", "eager"))
        assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(ours, plain, strict=True))


def test_update_runs_both_phases_with_a_gradient_for_every_token(monkeypatch):
    """Of a tiny model on the CPU, without the compiler."""
    calls, update = [], bench.Trainer.update
    monkeypatch.setattr(Transformer, "compile_blocks", lambda model: calls.append("compiled"))
    monkeypatch.setattr(bench.Trainer, "update", lambda trainer, s: update(trainer, s) or calls.append(vars(s).copy()))
    cfg = parse_args(["--preset", "qwen3-1.7b", "--kl_beta", "0", "--max_mismatch", "1e9", "--prompts_per_step", "4",
                      "--minibatch_prompts", "4", "--microbatch_tokens", "64"])[0]
    tiny = dataclasses.replace(plan.known_model(cfg.model), vocab_size=300, hidden_size=32, intermediate_size=64,
                               num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    rows = bench.update_rows(cfg, tiny, (0.0, 1.0), prompt=5, response=11, repeats=1)
    assert [(r["phase"], r["compiled"], r["recomputed"]) for r in rows] == [
        (phase, compiled, share) for compiled in (False, True)
        for phase, share in (("log-probs", 0.0), ("update", 0.0), ("update", 1.0))]
    assert calls.count("compiled") == 1 and all(r["tokens"] == 16 * 16 and r["s"] > 0 for r in rows)
    assert all(c["idle_frac"] == 0 and c["grad_norm"] > 0 for c in calls if c != "compiled")


def test_the_command_writes_what_it_measured_and_trl_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "BUDGETS", ("spread",))
    monkeypatch.setattr(sys, "argv", ["bench", "adversary", "--out", str(tmp_path / "out.json")])
    bench.main()
    [row] = json.loads((tmp_path / "out.json").read_text())["adversary"]
    assert row["budget"] == "spread" and row["ms"] > 0 and "| spread |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["bench", "trl"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "pip install trl==" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="failed"):
        bench.trl_steps("false", 1, False)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_of_memory_is_seen_and_forgotten():
    held = kernels.forget_peak()
    bytearray(64 << 20)[:] = bytes(64 << 20)
    assert kernels.resident_mib("VmHWM") - held > 60
    assert kernels.forget_peak() > 0 and kernels.resident_mib("VmHWM") - held < 60


# ------------------------------------------------------------------------------------------------ docs/speed.md


def table_after(head: str) -> list[list[str]]:
    """Cells of the table of docs/speed.md that begins with `head`, without its two first lines."""
    text = (ROOT / "docs" / "speed.md").read_text()
    rows = itertools.takewhile(lambda line: line.startswith("|"), text[text.index(head):].splitlines())
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows][2:]


def test_milliseconds_and_memory_of_the_head_are_those_of_the_file():
    rows = json.loads((ROOT / "results" / "kernels" / "h200.json").read_text())["kernels"]
    rows = {(r["case"], r["direction"], r["provider"]): f"{r['ms']:.1f} ({r['MiB']:,.0f})"
            for r in rows if r["operation"] == "linear_logprob"}
    tokens = width = None
    for what, direction, *cells in table_after("| tokens x width |"):
        tokens, width = (tokens, width) if what.startswith("the same") else what.replace(",", "").split(" x ")
        case = f"T {tokens}, V 151936, D {width}" + what.removeprefix("the same") * what.startswith("the same")
        providers = "ours", "eager", "compile", "liger", "liger, chunk_mem_const 16", "cce"
        assert cells == [rows[case, direction.replace("and backward", "both"), p] for p in providers], (what, direction)


def test_what_one_gpu_took_is_what_the_file_has():
    rows = json.loads((ROOT / "results" / "bench" / "h200.json").read_text())["update"]
    rows = {(r["model"][11:-5], r["phase"], r["compiled"], r["recomputed"]): r for r in rows}
    for size, compiled, share, *cells in table_after("| | blocks compiled |"):
        row, logprobs = (rows[size, phase, compiled == "yes", x] for phase, x in (("update", float(share)),
                                                                                  ("log-probs", 0)))
        said = [f"{row['s']:.2f}", f"{row['MFU %']:.1f}%", f"{row['GiB']:.1f}", f"{row['planned GiB']:.1f}"]
        said += [f"{logprobs['s']:.2f}", f"{logprobs['MFU %']:.1f}%"] if share != "1" else ["", ""]
        assert cells == said, (size, compiled, share)
