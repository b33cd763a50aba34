"""What only a GPU can show. Every test skips itself elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import arithmetic
from model import PackedAttention, Transformer
from rollout import Sampling, TorchEngine
from train import MasterAdamW, Ranks, parse_args

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    settings = arithmetic.BaseSettings(steps=100, lines_per_step=32, hidden_size=64, layers=2)
    return arithmetic.base_model(settings, cache=tmp_path_factory.mktemp("cache"))


def packed_batch(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([5, 1, 30, 17])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    tokens = torch.randint(3, 28, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    first = torch.isin(torch.arange(len(tokens)), cu_seqlens)
    return tokens.to(device), cu_seqlens.to(device), (~first).nonzero().squeeze(1).to(device)


def test_varlen_flash_attention_equals_the_padded_one_forward_and_backward(base):
    """bf16 on CUDA takes varlen attention; float32 on CUDA the padded form: the same numbers up to bf16."""
    grads, logps = [], []
    for dtype in (torch.bfloat16, torch.float32):
        model = Transformer.from_pretrained(base, dtype=dtype, device="cuda")
        tokens, cu_seqlens, targets = packed_batch("cuda")
        logp = model.logprobs(tokens, cu_seqlens, 30, targets)
        logp.sum().backward()
        logps.append(logp.detach())
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.float())
    assert logps[0].dtype == torch.float32 and (logps[0] - logps[1]).abs().mean() < 0.05
    assert torch.nn.functional.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.99


def test_float32_on_the_gpu_equals_the_cpu(base):
    out = []
    for device in ("cpu", "cuda"):
        model = Transformer.from_pretrained(base, dtype=torch.float32, device=device)
        tokens, cu_seqlens, targets = packed_batch(device)
        out.append(model.logprobs(tokens, cu_seqlens, 30, targets).detach().cpu())
    assert torch.allclose(out[0], out[1], atol=1e-3)


def test_torch_engine_log_probs_agree_with_the_trainer_in_bf16(base):
    engine = TorchEngine(base, dtype=torch.bfloat16, device=torch.device("cuda"), max_rollouts=64)
    model = Transformer.from_pretrained(base, dtype=torch.bfloat16, device="cuda")
    prompt = [4, 13, 5, 17]
    rollouts = engine.generate([prompt], [64], [1], Sampling(20, stop_ids=(1,)))
    differences = []
    for r in rollouts:
        tokens = torch.tensor(prompt + r.tokens.tolist(), device="cuda")
        cu_seqlens = torch.tensor([0, len(tokens)], device="cuda")
        targets = torch.arange(len(prompt), len(tokens), device="cuda")
        logp = model.logprobs(tokens, cu_seqlens, len(tokens), targets).detach().cpu()
        differences.append((logp - torch.from_numpy(r.logprobs)).abs())
    assert torch.cat(differences).mean() < 0.05


def test_bf16_weights_with_float32_masters_learn_on_cuda(base, tmp_path):
    cfg, _, _ = parse_args(["--preset", "arithmetic", "--learning_rate", "1e-6", "--weight_decay", "0"])
    model = Transformer.from_pretrained(base, dtype=torch.bfloat16, device="cuda")
    optimizer = MasterAdamW(model, cfg)
    before = optimizer.master.detach().clone()
    tokens, cu_seqlens, targets = packed_batch("cuda")
    model.logprobs(tokens, cu_seqlens, 30, targets).sum().backward()
    assert all(p.grad is None for p in model.parameters())  # accumulated into the float32 buffer
    assert optimizer.step(Ranks(), "here") > 0
    assert 0 < (optimizer.master - before).abs().max() < 2e-6


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_a_run_trains_sleeps_wakes_and_evaluates(base, tmp_path, engine):
    if engine == "vllm":
        pytest.importorskip("vllm")
    out = tmp_path / "run"
    command = [sys.executable, "train.py", "--preset", "arithmetic", "--model", str(base), "--engine", engine,
               "--mode", "both", "--steps", "4", "--prompts_per_step", "24", "--minibatch_prompts", "12",
               "--eval_every", "2", "--eval_problems", "12", "--eval_rollouts", "2", "--kl_beta", "0.001",
               "--gpu_memory_utilization", "0.2", "--out_dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(x["mismatch"]["mean"] < 0.05 for x in lines)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_hold_the_same_state(base, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py",
               "--preset", "arithmetic", "--model", str(base), "--engine", "torch", "--mode", "both", "--steps", "3",
               "--prompts_per_step", "24", "--minibatch_prompts", "12", "--eval_problems", "12", "--eval_rollouts", "2",
               "--out_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr


def test_packed_attention_takes_the_flash_path_in_half_precision():
    """Guards the condition above: were the padded path taken in bf16, the first test would compare it with itself."""
    calls = []
    import model as model_module

    real = model_module.varlen_attn
    model_module.varlen_attn = lambda *a, **k: calls.append(1) or real(*a, **k)
    try:
        cu_seqlens = torch.tensor([0, 3, 8], device="cuda")
        q = torch.randn(8, 4, 32, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(8, 2, 32, device="cuda", dtype=torch.bfloat16)
        PackedAttention(cu_seqlens, 5)(0, q, k, k)
    finally:
        model_module.varlen_attn = real
    assert calls
