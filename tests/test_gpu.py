"""What only a GPU can show. Every test skips itself elsewhere."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import group_advantage, linear_logprob
from model import Transformer
from ranks import Ranks, full, shard

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def on_ranks(world: int, *arguments: str) -> None:
    """Runs Python with these arguments, a process a GPU, and expects that it ends well."""
    if world > torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "--no-python"]
    command = [sys.executable, *([*torchrun, sys.executable] if world > 1 else []), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr


def packed_batch(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([5, 1, 30, 17])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    tokens = torch.randint(3, 28, (int(lengths.sum()),), generator=torch.Generator().manual_seed(0))
    first = torch.isin(torch.arange(len(tokens)), cu_seqlens)
    return tokens.to(device), cu_seqlens.to(device), (~first).nonzero().squeeze(1).to(device)


def logps_and_gradient(base, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU, in float32: log-probs of the packed batch, and the flat gradient of their sum in one matrix."""
    model = Transformer.from_pretrained(base, dtype=dtype, device=device)
    tokens, cu_seqlens, targets = packed_batch(device)
    logp = model.logprobs(tokens, cu_seqlens, 30, targets)
    assert logp.dtype == torch.float32
    logp.sum().backward()
    return logp.detach().cpu(), model.model.layers[0].self_attn.q_proj.weight.grad.float().flatten().cpu()


def test_varlen_flash_attention_equals_the_padded_one_forward_and_backward(base, monkeypatch):
    """bf16 on CUDA takes varlen attention; float32 the padded form, on either device: the same numbers up to bf16."""
    from torch.nn.attention import varlen

    calls, real = [], varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *a, **k: calls.append(1) or real(*a, **k))
    logp, gradient = logps_and_gradient(base, torch.float32, "cuda")
    assert not calls and torch.allclose(logp, logps_and_gradient(base, torch.float32, "cpu")[0], atol=1e-3)
    rounded, direction = logps_and_gradient(base, torch.bfloat16, "cuda")
    assert calls and (rounded - logp).abs().mean() < 0.05
    assert torch.nn.functional.cosine_similarity(direction, gradient, dim=0) > 0.99


def test_bf16_weights_with_float32_masters_learn_on_cuda(base):
    model = Transformer.from_pretrained(base, dtype=torch.float32, device="cuda",
                                        shard=lambda m: shard(m, Ranks(), compute=torch.bfloat16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)
    before = full(model.head).clone()
    tokens, cu_seqlens, targets = packed_batch("cuda")
    model.logprobs(tokens, cu_seqlens, 30, targets).sum().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in model.parameters())
    optimizer.step()
    assert 0 < (full(model.head) - before).abs().max() < 2e-6


@pytest.mark.parametrize("engine", ["torch", "vllm"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_trains_sleeps_wakes_and_evaluates(base, tmp_path, engine, world):
    """On two GPUs an engine a rank, which with vLLM joins the run's group; ranks that differ end the run."""
    if engine == "vllm":
        pytest.importorskip("vllm")
    flags = ["--preset", "arithmetic", "--model", str(base), "--engine", engine, "--mode", "both", "--steps", "4",
             "--prompts_per_step", "24", "--minibatch_prompts", "12", "--eval_every", "2", "--eval_problems", "12",
             "--eval_rollouts", "2", "--kl_beta", "0.001", "--gpu_memory_utilization", "0.2", "--stall_seconds", "300",
             "--out_dir", str(tmp_path / "run")]
    on_ranks(world, "train.py", *flags)
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(x["mismatch"]["mean"] < 0.05 for x in lines)


@pytest.mark.parametrize("world", [1, 2])
def test_tensors_meet_over_nccl_and_host_arrays_over_gloo(world):
    on_ranks(world, "-c", """
import numpy as np, torch, torch.distributed as dist
from ranks import Ranks
ranks = Ranks()
ranks.mesh
on_gpu = torch.ones(3, device=ranks.device)
dist.all_reduce(on_gpu)
assert on_gpu.tolist() == [ranks.world] * 3
assert ranks.merge(np.ones(3, np.int64) * (ranks.rank == 0)).tolist() == [1, 1, 1]
host = torch.ones(3)
dist.all_reduce(host)
assert host.tolist() == [ranks.world] * 3
ranks.leave()
""")


# ------------------------------------------------------------------------------------------------ kernels at full size

T, V = 16384, 151936  # T * V is beyond 2^31
SAMPLE = 512


def generator(seed=0):
    return torch.Generator("cuda").manual_seed(seed)


def head_case(D: int, V: int = V, T: int = T):
    """hidden, weight in bf16, targets, incoming gradient of the log-probs; logits are N(0, 4)."""
    g = generator()
    hidden = (torch.randn(T, D, device="cuda", generator=g) * 2 * D**-0.5).bfloat16()
    weight = torch.randn(V, D, device="cuda", generator=g).bfloat16()
    targets = torch.randint(V, (T,), device="cuda", generator=g)
    targets[:4] = torch.tensor([0, V - 1, 4095, 4096], device="cuda")
    targets[-1] = V - 1
    return hidden, weight, targets, torch.randn(T, device="cuda", generator=g)


def head_gradients(hidden, weight, targets, grad, **options):
    """logp, entropy, gradient in hidden, gradient in weight."""
    h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logp, entropy = linear_logprob(h, w, targets, entropy=True, backend="triton", **options)
    (grad * logp).sum().backward()
    return logp.detach(), entropy.detach(), h.grad, w.grad


def dlogits(logits, targets, grad):
    """(logp, entropy, gradient in the logits) of whole rows, in the logits' dtype."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(1)
    gradient = -p * grad[:, None]
    gradient.scatter_add_(1, targets[:, None], grad[:, None])
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy, gradient


def relative_error(got, expected) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def sampled_rows(T: int) -> torch.Tensor:
    """SAMPLE rows, the first and the last among them."""
    return torch.cat((torch.tensor([0, T - 1], device="cuda"),
                      torch.randperm(T, device="cuda", generator=generator(1))[: SAMPLE - 2])).unique()


@pytest.mark.parametrize("D, V", [(2048, V), (4096, V), (2056, V + 1)])
def test_linear_logprob_at_full_size_equals_the_exact_one_on_sampled_rows(D, V):
    hidden, weight, targets, grad = head_case(D, V)
    logp, entropy, dh, dw = head_gradients(hidden, weight, targets, grad)
    rows = sampled_rows(T)
    exact_head = weight.double()  # 5 GB at D = 4096
    plain_errors, errors = [], []
    for part in rows.split(64):
        logits = hidden[part].double() @ exact_head.T
        exact_logp, exact_entropy, gradient = dlogits(logits, targets[part], grad[part].double())
        assert (logp[part] - exact_logp).abs().max() < 1e-4
        assert (entropy[part] - exact_entropy).abs().max() < 1e-4
        exact = gradient @ exact_head
        _, _, plain = dlogits((hidden[part] @ weight.T).float(), targets[part], grad[part])  # logits in bf16
        errors.append((dh[part] - exact).norm())
        plain_errors.append((plain.bfloat16() @ weight - exact).norm())
        scale = exact.norm()
        assert errors[-1] <= plain_errors[-1] + 1e-2 * scale
    del exact_head, exact, logits, gradient, plain
    # The gradient of sampled words takes all tokens. Its exact form needs the lse of every row, which the rows above
    # have shown to be right to 1e-4; here it comes from float32 logits, in chunks of rows.
    words = torch.cat((targets[:4], sampled_rows(V)[: SAMPLE - 4])).unique()
    exact, plain = torch.zeros(len(words), D, device="cuda", dtype=torch.float64), torch.zeros(len(words), D,
                                                                                               device="cuda")
    wide = weight.float()
    for start in range(0, T, 1024):
        at = slice(start, start + 1024)
        _, _, gradient = dlogits(hidden[at].float() @ wide.T, targets[at], grad[at])
        exact += gradient[:, words].double().T @ hidden[at].double()
        _, _, gradient = dlogits((hidden[at] @ weight.T).float(), targets[at], grad[at])
        plain += (gradient[:, words].bfloat16().T @ hidden[at]).float()
    assert relative_error(dw[words], exact) <= relative_error(plain.bfloat16(), exact) + 1e-2


def test_the_bits_are_the_same_twice_and_with_rows_left_out_of_backward(monkeypatch):
    linear = importlib.import_module("kernels.linear_logprob")
    *case, grad = head_case(2048)
    live = (torch.arange(T, device="cuda") // 1000) % 3 == 0
    results = [head_gradients(*case, grad * live) for _ in range(2)]
    monkeypatch.setattr(linear, "_live", lambda grad_logp: torch.ones_like(grad_logp, dtype=torch.bool))
    for once, twice, whole in zip(*results, head_gradients(*case, grad * live), strict=True):
        assert torch.equal(once, twice) and torch.equal(once, whole)
    assert (results[0][2][~live] == 0).all()


@pytest.mark.parametrize("D", [2048, 4096])
def test_linear_logprob_needs_half_a_gigabyte_beyond_its_outputs(D):
    hidden, weight, targets, grad = head_case(D)
    linear_logprob(hidden[:64], weight, targets[:64], backend="triton")  # what a first call loads
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = linear_logprob(h, w, targets, entropy=True, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 0.5e9
    (grad * logp).sum().backward()
    outputs = h.grad.nbytes + w.grad.nbytes + logp.nbytes + entropy.nbytes
    assert torch.cuda.max_memory_allocated() - before < 0.5e9 + outputs
    assert T * V * 2 > 4e9  # what it must not hold


def launches(call) -> list[str]:
    """Names of the kernels that a call puts on the device, its second time."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA
            and not e.name.startswith(("Memcpy", "Memset"))]


def test_group_advantage_is_one_launch():
    rewards = torch.randn(4096, device="cuda")
    offsets = torch.arange(0, 4097, 8, device="cuda")
    weights = torch.rand(512, device="cuda")
    names = launches(lambda: group_advantage(rewards, offsets, weights, clip=3.0))
    assert names == ["_kernel"], names
