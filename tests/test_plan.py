"""The plan of a run: its bytes are those that autograd and FSDP2 allocate, and what it refuses could not fit."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import model as model_module
import plan
import train
from config import parse_args
from model import ModelConfig, Transformer
from plan import CARDS, GIB, QWEN3, cache_tokens, check_memory, known_model, over, phases, report, step_seconds
from ranks import shard


class FlashAttention:
    """PackedAttention's branch for CUDA, which fake tensors can take on the CPU."""

    def __init__(self, cu_seqlens: torch.Tensor, max_seqlen: int):
        self.cu, self.longest = cu_seqlens.int(), max_seqlen
        self.positions = torch.arange((len(cu_seqlens) - 1) * max_seqlen)  # sequences of one length

    def __call__(self, layer: int, q, k, v):
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(q, k, v, self.cu, self.cu, self.longest, self.longest, window_size=(-1, 0), enable_gqa=True)


class FusedNorm(torch.autograd.Function):
    """What CUDA's RMSNorm keeps, its input and 1/rms; on the CPU it would be put together from parts that keep more."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:2])


@pytest.fixture
def allocated(monkeypatch):
    """allocated(model, tokens, world, ...) -> bytes that one of `world` ranks has allocated at most, in the second row
    of a mini-batch or without gradient; of fake tensors, with collectives that send nothing."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setattr(model_module, "PackedAttention", FlashAttention)
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda norm, x: FusedNorm.apply(x, norm.weight))

    def measure(config: ModelConfig, tokens: int, world: int, *, checkpointing: float = 1.0, grad: bool = True) -> int:
        dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
        mesh = dist.init_device_mesh("cpu", (world,))
        ranks = SimpleNamespace(world=world, device=torch.device("cpu"), mesh=mesh)
        cu_seqlens = torch.arange(0, tokens + 1, 1024)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = Transformer(config)
            model.gradient_checkpointing = checkpointing
            shard(model, ranks, compute=torch.bfloat16)
            row, targets = torch.zeros(tokens, dtype=torch.long), torch.arange(1, tokens)
            for _ in range(1 + grad):
                with FSDPMemTracker(model) as tracker, torch.set_grad_enabled(grad):
                    logp = model.logprobs(row, cu_seqlens, 1024, targets)
                    if grad:
                        logp.sum().backward()
                del logp
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

    yield measure


@pytest.fixture(autouse=True)
def no_group_stays():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def model_of(size: str, **changes) -> ModelConfig:
    return dataclasses.replace(known_model(f"Qwen/Qwen3-{size}-Base"), **changes)


def config(*argv: str):
    return parse_args(["--preset", "qwen3-1.7b", *argv])[0]


@pytest.mark.parametrize("size, layers, tokens, world, checkpointing, grad", [
    ("1.7B", 6, 16384, 8, 1.0, True), ("8B", 12, 16384, 8, 1.0, True),
    ("4B", 6, 16384, 2, 0.0, True), ("4B", 6, 16384, 8, 0.5, True),
    # the root's end
    ("1.7B", 3, 1024, 1, 1.0, True), ("1.7B", 3, 1024, 8, 1.0, True), ("8B", 3, 1024, 2, 1.0, True),
    # without gradient
    ("1.7B", 4, 16384, 8, 1.0, False), ("8B", 4, 16384, 8, 1.0, False)])
def test_what_is_planned_is_what_is_allocated_beside_the_shards(allocated, size, layers, tokens, world, checkpointing,
                                                                grad):
    """Layers of the real width; the first two rows tell that their number is counted right."""
    model = model_of(size, num_hidden_layers=layers)
    cfg = config("--microbatch_tokens", str(tokens), "--max_prompt_tokens", "500", "--max_response_tokens", "500",
                 "--kl_beta", "0", "--gradient_checkpointing", str(checkpointing))
    of_rank = 4 * plan.parameters(model) / world
    shards, absent = of_rank * (1 + grad), 2 * of_rank + plan.VLLM_ASLEEP  # neither an optimiser nor vLLM is there
    planned = phases(model, cfg, world, 8, 0)["training" if grad else "log-probs"]
    assert planned - absent - shards == pytest.approx(
        allocated(model, tokens, world, checkpointing=checkpointing, grad=grad) - shards, rel=0.1)


def test_parameters_are_those_of_the_models_names():
    counts = [plan.parameters(known_model(name)) / 1e9 for name in QWEN3]
    assert counts == pytest.approx([0.596, 1.721, 4.022, 8.191], abs=1e-3)
    assert known_model("Qwen/Qwen3-4B-Base@3b2c") == known_model("Qwen/Qwen3-4B-Base") and known_model("a/b") is None


def refused(size: str, world: int, memory: tuple[int, int], *argv: str) -> str:
    """What check_memory says, "" where it lets the run begin; nodes of 8."""
    try:
        check_memory(model_of(size), config(*argv), world, 8, memory)
    except ValueError as error:
        return str(error)
    return ""


def test_the_papers_models_on_cards_as_they_report_themselves():
    h100, h200 = (int(78.66 * GIB), int(79.19 * GIB)), (int(139.27 * GIB), int(139.8 * GIB))
    fewest = {(size, card): min(world for world in (1, 2, 4, 8) if not refused(size, world, card))
              for size in ("1.7B", "4B", "8B") for card in (h100, h200)}
    assert fewest == {("1.7B", h100): 1, ("4B", h100): 2, ("8B", h100): 4,
                      ("1.7B", h200): 1, ("4B", h200): 1, ("8B", h200): 2}
    said = refused("8B", 1, h100)
    assert said.startswith("8.2B parameters do not fit 1 x 79.2 GiB, by estimate: sampling needs 146.")
    assert "training needs" in said and "78.7 GiB are free, 74.7 of them" in said and "more GPUs in a node" in said
    busy = refused("8B", 8, (int(30 * GIB), h100[1]))  # another process holds the rest
    assert "sampling needs" in busy and "30.0 GiB are free" in busy
    starved = refused("8B", 8, h100, "--gpu_memory_utilization", "0.25")
    assert "vLLM's KV cache needs 7296 tokens for one rollout and gets " in starved and "utilization above" in starved
    assert "sampling" not in starved and "utilization above" not in refused("8B", 1, h100, "--engine", "torch")


def test_a_second_node_holds_a_copy_and_no_reference_needs_less():
    model, cfg, total = model_of("8B"), config(), CARDS["H100"].memory[1]
    assert phases(model, cfg, 16, 8, total) == phases(model, cfg, 8, 8, total) != phases(model, cfg, 4, 8, total)
    without = phases(model, config("--kl_beta", "0"), 8, 8, total)
    assert all(peak < phases(model, cfg, 8, 8, total)[phase] for phase, peak in without.items())


def test_vllm_gets_what_its_share_leaves_beside_weights_and_working_memory():
    model, total = model_of("8B"), CARDS["H100"].memory[1]
    less, more = (cache_tokens(model, config("--gpu_memory_utilization", share), total) for share in ("0.5", "0.6"))
    assert (more - less) * 2 * 36 * 8 * 128 * 2 == pytest.approx(0.1 * total, rel=1e-4)  # keys and values, bf16
    assert cache_tokens(model, config("--gpu_memory_utilization", "0.1"), total) < 0


def test_a_plan_follows_the_flags_and_names_every_machine():
    name = "Qwen/Qwen3-4B-Base"
    said = report(config("--model", name), known_model(name))
    assert said.startswith(f"{name}: ") and "256 prompts x 4 rollouts" in said and "is an estimate" in said
    assert all(f"\n| {world} x {card} | " in said for card in ("H100", "H200") for world in (1, 2, 4, 8, 16))
    assert report(config("--model", name, "--microbatch_tokens", "8192"), known_model(name)) != said


def test_one_24_gb_card_holds_qwen3_06b_and_trains_it_in_about_two_hours():
    cfg = parse_args(["--preset", "qwen3-0.6b"])[0]
    model, card = known_model(cfg.model), CARDS["4090"]
    assert not over(model, cfg, 1, 1, card.memory)
    step = sum(step_seconds(model, cfg, 1, card, plan.mean_tokens(model, cfg)).values())
    assert 1.5 < cfg.steps * step / 3600 < 2.5


def test_cards_are_read_by_name_or_by_memory_and_peak():
    assert plan.machine("4xA100-40") == (4, "A100-40", CARDS["A100-40"])
    assert plan.machine("h200") == (1, "H200", CARDS["H200"])
    world, name, own = plan.machine("8x96GiB@494.5TFLOPS")
    assert (world, name) == (8, "96GiB@494.5TFLOPS") and own.memory[1] == 96 * GIB
    assert [2 * own.flops, 2 * own.bandwidth] == pytest.approx([CARDS["H100"].flops, CARDS["H100"].bandwidth])
    for text in ("", "3xRTX", "0xH100", "12xH100", "x4090x2", "8x96GiB"):
        with pytest.raises(ValueError, match=f"^--plan {text}: .* 4090, A100-40, A100-80, L40S, H100, H200, B200,"):
            plan.machine(text)


@pytest.mark.parametrize("cards, argv, least", [
    ("H100", "", ""),
    ("A100-80", "--gradient_checkpointing 0 --microbatch_tokens 32768", "--gradient_checkpointing 0.5"),
    ("A100-40", "--gpu_memory_utilization 0.3 --microbatch_tokens 131072", "--microbatch_tokens 16384"),
    ("A100-40", "--gpu_memory_utilization 0.3 --microbatch_tokens 65536 --gradient_checkpointing 0.5",
     "--microbatch_tokens 16384 --gradient_checkpointing 1.0"),
    ("L40S", "", "--gpu_memory_utilization 0.35"), ("H100", "--model Qwen/Qwen3-8B-Base", "4x"),
    ("4090", "--model Qwen/Qwen3-8B-Base", "Neither")])
def test_where_a_card_holds_too_little_the_least_change_that_fits_is_said(tmp_path, cards, argv, least):
    argv = [*argv.split(), "--out_dir", str(tmp_path)]
    model = known_model(config(*argv).model)
    *table, said = report(config(*argv), model, cards, " ".join(argv)).splitlines()
    if least == "Neither":
        assert said.startswith(least)
        return
    assert said.startswith(f"To run {'the second row, with the least change that fits' if least else 'it'}: `")
    words = said.partition("`")[2][:-1].split()  # which can be pasted
    program = words.index("train.py")
    assert words[:program] == (["torchrun", "--nproc_per_node", "4"] if least == "4x" else ["python"])
    assert words[program + 1 :] == argv + least.removeprefix("4x").split()
    pasted = report(config(*words[program + 1 :]), model, f"{4 if least == '4x' else 1}x{cards}")
    assert pasted.splitlines()[-3] == table[-2]


def test_the_command_to_paste_has_the_flags_that_were_given_on_as_many_nodes_as_it_takes(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--mode", "both", "--plan", "16xH100", "--prompt_suffix", "a b",
                                     "--model", "Qwen/Qwen3-4B-Base", "--train_data", "dapo"])
    train.main()
    *_, row, _, said = capsys.readouterr().out.splitlines()
    assert row.startswith("| 16 x H100 |") and f"| {plan.USABLE * 78.7:.1f} | yes |" in row
    assert said == ("To run it, on each node: `torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 "
                    "--nproc_per_node 8 train.py --preset own --mode both --prompt_suffix 'a b' --model "
                    "Qwen/Qwen3-4B-Base --train_data dapo`")


def test_a_log_tells_how_long_responses_are_and_the_data_how_many_problems(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"response_tokens_mean": 300.0}\n{"response_tokens_mean": 500.0}\n{"cut')
    new, said = (report(config("--out_dir", str(tmp_path / name)), model_of("1.7B"), "H100") for name in ("none", ""))
    assert "of 150 + 1200 tokens, as assumed" in new
    assert f"of 150 + 400 tokens, the latter as in {tmp_path}/metrics.jsonl" in said
    for argv, problems in (("--preset arithmetic", 600), ("--preset arithmetic --eval_problems 50", 50),
                           ("--preset own --model m --train_data x.jsonl --eval_problems 0", 200),
                           ("--preset own --model m --train_data x.jsonl", 100), ("--preset qwen3-1.7b", 500)):
        assert plan.evaluated(parse_args(argv.split())[0]) == problems


def test_a_built_in_task_is_timed_on_this_cpu_by_the_command(tmp_path):
    """In a process of its own, as it sets threads and leaves memory behind."""
    root, argv = Path(plan.__file__).parent, ["--preset", "arithmetic", "--out_dir", str(tmp_path), "--plan"]
    said, named = (subprocess.run([sys.executable, "train.py", *argv, *cards], cwd=root, text=True, check=True,
                                  env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.PIPE).stdout
                   for cards in ([], ["2xL40S"]))
    row = said.splitlines()[-1].split(" | ")
    assert said.startswith("arithmetic: 0.4M parameters") and "evaluations of 600 problems" in said
    assert row[0] == "| this CPU, timed" and 0 < float(row[8].split()[0]) < 60 and row[-1].endswith("min |")
    assert "CPU" not in named and "\n| 2 x L40S | " in named


def test_seconds_are_those_of_the_operations_in_the_books():
    """8B, 8 GPUs: 2 N operations a token forward, 8 N with checkpointing, and attention."""
    model, cfg, card = model_of("8B"), config(), CARDS["H100"]
    seconds = step_seconds(model, cfg, 8, card, (150, 1200))
    tokens, N = 256 * 4 * 1350 / 8, plan.parameters(model) - 151936 * 4096
    forward = 2 * N * tokens / card.flops
    assert seconds["log-probs"] == pytest.approx(2 * forward / plan.LOGPROB_SHARE, rel=0.05)  # policy and reference
    assert seconds["training"] == pytest.approx(4 * forward / plan.TRAIN_SHARE, rel=0.05)


def test_the_plan_s_bytes_are_those_of_one_h200():
    """results/bench/h200.json, peaks of torch's allocator. torch.compile keeps less than the plan says."""
    rows = json.loads((Path(plan.__file__).parent / "results/bench/h200.json").read_text())["update"]
    assert len(rows) == 12
    for row in rows:
        cfg = dataclasses.replace(config("--kl_beta", "0"), model=row["model"],
                                  gradient_checkpointing=float(row["recomputed"]))
        phase = {"update": "training"}.get(row["phase"], row["phase"])
        planned = (phases(known_model(row["model"]), cfg, 1, 1, 0)[phase] - plan.VLLM_ASLEEP) / GIB  # without engine
        assert planned == pytest.approx(row["GiB"], rel=0.01) or row["compiled"] and 1 < planned / row["GiB"] < 1.11
