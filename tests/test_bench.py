"""The bench's own machinery, and what the compiler makes of the kernels that matter most."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bench
import kernels.bench

ROOT = Path(__file__).parents[1]


def compiled_for_sm90(*operations: str) -> list[dict]:
    """In a process of its own, where Triton compiles even if these tests run it as an interpreter."""
    triton = importlib.util.find_spec("triton")
    if triton is None or not (Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("needs Triton with its NVIDIA tools")
    code = f"import json, kernels.bench as b; print(json.dumps(b.compile_for_sm90({operations!r})))"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_linear_logprob_in_bf16_uses_wgmma_and_tma_and_spills_nothing_on_sm_90():
    rows = [r for r in compiled_for_sm90("linear_logprob") if r["form"].startswith("bfloat16")]
    kernels = {"_fold_kernel", "_dlogits_kernel", "_dhidden_kernel", "_dweight_kernel"}
    assert {r["kernel"] for r in rows} == kernels and len(rows) == 5
    for row in rows:
        assert row["spill stores"] == row["spill loads"] == row["stack bytes"] == 0, row
        assert row["wgmma"] and row["TMA loads"], row
        assert row["shared KiB"] < 227, row  # what a block may have


def test_a_rollout_of_advantage_0_that_is_trained_on_changes_nothing_but_the_work():
    (usual, every), left_out = (list(bench.our_steps("grpo", 2, every=e)) for e in (False, True)), []
    for a, b in zip(usual, every, strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4) and a["reward_mean"] == b["reward_mean"]
        left_out.append(1 - a["ranks"]["tokens_trained"][0] / b["ranks"]["tokens_trained"][0])
    assert min(left_out) > 0.3, left_out  # most prompts of this base are solved by none of four


def test_trl_without_an_environment_of_its_own_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "trl"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "pip install trl==" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="failed"):
        next(bench.trl_steps("false", 1, False))


def test_tables_split_where_columns_change():
    rows = [{"a": 1, "b": None}, {"a": 2, "b": True}, {"c": 12_345.6}]
    assert bench.markdown("x", rows) == ("\n### x\n\n| a | b |\n| --- | --- |\n| 1 |  |\n| 2 | yes |\n"
                                         "\n| c |\n| --- |\n| 12,346 |\n")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_of_memory_is_seen_and_forgotten():
    held = kernels.bench.forget_peak()
    bytearray(64 << 20)[:] = bytes(64 << 20)
    assert kernels.bench.resident_mib("VmHWM") - held > 60
    assert kernels.bench.forget_peak() > 0 and kernels.bench.resident_mib("VmHWM") - held < 60
