"""VLLMEngine: variable counts in one call, log-probabilities that are the policy's, weights that are never stale."""
import inspect
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist


def take_cudas_path() -> None:
    """From here on vLLM for CPU takes Triton for usable, as interpreted it is, and schedules as on CUDA."""
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=None)  # what vLLM looks for
    from vllm.platforms.cpu import CpuPlatform
    from vllm.triton_utils import HAS_TRITON

    del backends["cpu"]
    assert HAS_TRITON
    settle = CpuPlatform.check_and_update_config

    def as_on_cuda(platform: type, config) -> None:
        settle(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(as_on_cuda)


if CUDAS_PATH := "VLLM_TEST_CUDAS_PATH" in os.environ:
    take_cudas_path()
transformers = pytest.importorskip("transformers", reason="transformers makes the reference model")

import rollout  # noqa: E402  (after the skips)
from ranks import RunError  # noqa: E402
from rollout import Sampling, VLLMEngine, choose_engine, make_engine, rollout_seed  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
try:
    choose_engine("vllm", DEVICE)
except ValueError as error:
    pytest.skip(str(error), allow_module_level=True)

ROOT = Path(__file__).parents[1]
CASES = ("tied", "untied")  # of the model's head
# On CUDA vLLM's allocator serves one engine a process, so there each case is a process of its own that runs this file.
CASE = os.environ.get("VLLM_TEST_CASE")
here = (CASE,) if CASE else CASES if DEVICE.type == "cpu" else ()
# Largest difference from the policy's log-probabilities: with the right weights at most, with wrong ones at least. In
# bf16 the former was 0.11 on CPU, the latter 4.6.
RIGHT, WRONG = (1e-4, 1.0) if DEVICE.type == "cpu" else (0.4, 1.0)
VOCAB, STOP = 97, 1
SIZES = dict(dtype=torch.float32 if DEVICE.type == "cpu" else torch.bfloat16, max_prompt_tokens=160,
             max_response_tokens=24, max_rollouts=64, seed=7, gpu_memory_utilization=0.1)
LONG = [(3 * i) % VOCAB for i in range(150)]  # longer than one cache block of 128 tokens, so its prefix gets cached
PROMPTS = [[5, 6, 7], LONG, [9] * 20, [11, 12]]
N_P, SEED_P = [3, 8, 0, 1], [rollout_seed(0, 0, str(p)) for p in range(4)]
WARM = Sampling(max_tokens=4 if CUDAS_PATH else 24, temperature=0.7, stop_ids=(STOP,))


def save_tiny(path, tied):
    """A random Qwen3 sharp enough for wrong weights to show (vLLM's CPU attention has no heads narrower than 32)."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=tied, max_position_embeddings=256,
        initializer_range=0.15, bos_token_id=0, eos_token_id=2)
    transformers.Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=here)
def setup(request, tmp_path_factory):
    """(engine, its policy in transformers, whether start-up left the process's state alone), one engine at a time."""
    path = save_tiny(tmp_path_factory.mktemp("model"), request.param == "tied")
    os.environ["LOCAL_WORLD_SIZE"] = "5"
    set_num_threads, numa_maps = torch.set_num_threads, Path("/proc/self/numa_maps")

    def state():
        memory = {line.split()[1] for line in numa_maps.open()} if numa_maps.exists() else None
        return (memory, os.environ["LOCAL_WORLD_SIZE"], os.environ.get("LD_PRELOAD"), torch.get_num_threads(),
                sorted(os.sched_getaffinity(0)), torch.set_num_threads is set_num_threads)

    before = state()
    engine = make_engine("vllm", path, device=DEVICE, **SIZES)
    kept = state() == before
    if CUDAS_PATH:
        config = engine.llm.llm_engine.vllm_config
        assert config.use_v2_model_runner and config.scheduler_config.async_scheduling
    policy = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().requires_grad_(False)
    yield engine, policy, kept
    engine.close()
    del os.environ["LOCAL_WORLD_SIZE"]


def named_tensors(policy):
    tied = policy.config.tie_word_embeddings
    return ((name, tensor) for name, tensor in policy.state_dict().items() if not (tied and name == "lm_head.weight"))


def perturb(policy):
    for parameter in policy.parameters():
        parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter))


def mismatch(policy, rollouts, temperature=0.7):
    """Largest difference of the rollouts' log-probabilities from the policy's own."""
    worst = 0.0
    for prompt, r in zip([PROMPTS[p] for p, n in enumerate(N_P) for _ in range(n)], rollouts, strict=True):
        ids = torch.tensor([prompt + r.tokens.tolist()])
        logp = (policy(ids).logits[0, len(prompt) - 1:-1].float() / temperature).log_softmax(-1)  # (L, V)
        drawn = logp.gather(1, ids[0, len(prompt):, None])[:, 0]                                  # (L,)
        worst = max(worst, (drawn - torch.from_numpy(r.logprobs)).abs().max().item())
    return worst


@pytest.mark.skipif(DEVICE.type == "cpu" or CASE is not None, reason="the cases run in this process")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_each_case_passes_in_a_process_of_its_own(case):
    ended = subprocess.run([sys.executable, "-m", "pytest", __file__], env={**os.environ, "VLLM_TEST_CASE": case},
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout


@pytest.mark.skipif(DEVICE.type == "cuda" or CASE is not None, reason="on CUDA all cases take it")
def test_what_vllm_runs_on_cuda_draws_loads_and_repeats_on_the_cpu_too():
    """Its newer runner, whose kernels Triton interprets here, and scheduling of a step ahead: three cases of those
    below, in a process of its own."""
    environment = {"VLLM_TEST_CASE": "tied", "VLLM_TEST_CUDAS_PATH": "1", "TRITON_INTERPRET": "1",
                   "VLLM_USE_V2_MODEL_RUNNER": "1"}
    cases = "variable_n or seeds_alone or (whole_weights and asleep)"
    ended = subprocess.run([sys.executable, "-m", "pytest", __file__, "-k", cases], env={**os.environ, **environment},
                           text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    assert ended.returncode == 0 and "3 passed" in ended.stdout, ended.stdout


def test_start_up_leaves_memory_threads_and_environment_alone(setup):
    assert setup[2]
    assert logging.getLogger("vllm.utils.jit_monitor").level == logging.ERROR  # whatever VLLM_LOGGING_LEVEL is


def test_variable_n_gives_prompt_major_rollouts_that_stop_or_are_truncated(setup):
    engine, policy, _ = setup
    rollouts = engine.generate(PROMPTS, np.array(N_P), SEED_P, WARM)
    assert len(rollouts) == sum(N_P)
    assert mismatch(policy, rollouts) < RIGHT  # against each rollout's own prompt, so the order is right
    for r in rollouts:
        assert r.tokens.dtype == np.int32 and r.logprobs.dtype == np.float32 and r.tokens.shape == r.logprobs.shape
        assert STOP not in r.tokens[:-1]
        assert (len(r.tokens) == WARM.max_tokens) if r.truncated else (r.tokens[-1] == STOP)
    assert len({r.truncated for r in engine.generate([[5]], [64], [3], WARM)}) == 2  # both endings occur
    assert engine.generate(PROMPTS, [0] * 4, SEED_P, WARM) == []


def test_seeds_alone_decide_the_tokens(setup):
    engine, _, _ = setup
    first, again, other = (engine.generate(PROMPTS, N_P, [s + d for s in SEED_P], WARM) for d in (0, 0, 1000))
    # in bf16 a prefix from the cache differs from a computed one by rounding, which may tip a token
    same = sum(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert same == len(first) or (DEVICE.type == "cuda" and same > len(first) / 2)
    assert sum(np.array_equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True)) <= 1
    assert len({r.tokens.tobytes() for r in first[3:11]}) > 4  # children of one request differ
    later, together = engine.generate([[5]], [2], [3], WARM, first=2), engine.generate([[5]], [4], [3], WARM)
    assert any(np.array_equal(a.tokens, b.tokens) for a, b in zip(later, together[2:], strict=True))
    largest = engine.generate([[5]], [2], [(1 << 63) - 2], WARM)  # rollout_seed's range is accepted
    assert len(largest) == 2


def test_truncated_distributions_report_their_own_logprobs(setup):
    greedy_like = setup[0].generate(PROMPTS, N_P, SEED_P, Sampling(max_tokens=8, top_k=1))
    assert all(np.allclose(r.logprobs, 0, atol=1e-6) for r in greedy_like)  # one candidate: probability 1


def test_only_the_stop_ids_stop(setup):
    rollouts = setup[0].generate([[5]], [64], [3], Sampling(max_tokens=24))
    assert all(r.truncated and len(r.tokens) == 24 for r in rollouts)
    assert any(2 in r.tokens[:-1] for r in rollouts)  # the model's own end-of-text token


def test_loaded_weights_are_the_ones_that_sample(setup):
    """Catches a stale tied head, packed layers left behind, and a prefix cache of old keys and values."""
    engine, policy, _ = setup
    for _ in range(2):
        engine.generate(PROMPTS, N_P, SEED_P, WARM)  # fills the prefix cache under the old weights
        old = engine.generate(PROMPTS, N_P, SEED_P, WARM)
        perturb(policy)
        assert mismatch(policy, old) > WRONG
        engine.load_weights(named_tensors(policy))
        assert mismatch(policy, engine.generate(PROMPTS, N_P, SEED_P, WARM)) < RIGHT


def test_a_prefix_cache_of_old_weights_is_refused(setup, monkeypatch):
    engine, policy, _ = setup
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="prefix cache"):
        patch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
        engine.load_weights(named_tensors(policy))
    engine.load_weights(named_tensors(policy))


@pytest.mark.parametrize("how", ["asleep", "half loaded"])
def test_an_engine_without_whole_weights_does_not_sample(setup, how):
    engine, policy, _ = setup

    def breaks_off():
        yield next(named_tensors(policy))
        raise KeyError("trainer")

    if how == "asleep":
        engine.sleep()
    else:
        with pytest.raises(KeyError):
            engine.load_weights(breaks_off())
    with pytest.raises(RuntimeError, match="load_weights"):
        engine.generate(PROMPTS, N_P, SEED_P, WARM)
    engine.load_weights(named_tensors(policy))
    assert mismatch(policy, engine.generate(PROMPTS, N_P, SEED_P, WARM)) < RIGHT


def test_engine_choice_says_why():
    other = torch.device("cpu" if DEVICE.type == "cuda" else "cuda")
    assert choose_engine("auto", DEVICE)[0] == choose_engine("vllm", DEVICE)[0] == "vllm"
    assert choose_engine("torch", DEVICE)[0] == choose_engine("torch", other)[0] == "torch"
    why = f"The installed vLLM runs on {DEVICE.type}, not on {other.type}."
    for name in ("vllm", "auto") if other.type == "cuda" else ("vllm",):  # a GPU is never left to the torch engine
        with pytest.raises(ValueError, match=f"{why} Install a vLLM built for {other.type} .*--engine torch"):
            choose_engine(name, other)
    if other.type == "cpu":
        assert choose_engine("auto", other) == ("torch", why)


# ---- what is passed to vLLM on CUDA, and in which order it is called


class Recorded:
    """Takes every call that VLLMEngine makes of vLLM's LLM, and does nothing."""

    def __init__(self, *args, **options):
        self.args, self.options, self.calls = args, options, []

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        self.calls.append((method, [name for name, _ in kwargs["weights_iterator"]]))

    def __getattr__(self, name: str):
        return lambda *args, **options: self.calls.append(
            (name, *(x for x in (*args, *options.values()) if not callable(x)))) or True


@pytest.fixture
def on_cuda(monkeypatch):
    """A VLLMEngine that takes its device for a GPU, with Recorded in the place of LLM."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(rollout, "_import_vllm", lambda: Recorded)
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10 << 30, 80 << 30))
    monkeypatch.setattr(rollout, "atexit", Recorded())
    return VLLMEngine("folder", **{**SIZES, "dtype": torch.bfloat16})


def test_weights_wake_before_they_are_loaded_and_the_cache_after(on_cuda):
    weights = [("norm", torch.ones(2)), ("head", torch.ones(3))]
    loading = [("reload_weights", ["norm", "head"]), ("apply_model",)]
    on_cuda.load_weights(weights)  # awake, as after the start
    assert on_cuda.llm.calls == [*loading, ("reset_prefix_cache",)]
    on_cuda.llm.calls.clear()
    assert not rollout.atexit.calls
    on_cuda.sleep()
    on_cuda.sleep()  # a second time is none
    on_cuda.load_weights(weights)
    assert on_cuda.llm.calls == [("sleep", 2), ("wake_up", ["weights"]), *loading, ("wake_up", ["kv_cache"]),
                                 ("reset_prefix_cache",)]
    assert [name for name, *_ in rollout.atexit.calls] == ["register", "unregister"]


@pytest.mark.parametrize("error, message", [
    (RuntimeError("CUDA Error: out of memory at cumem_allocator.cpp:120"),  # of vLLM's allocator
     r"\(weights\): 10.0 GiB were free .* --gpu_memory_utilization 0.1, 8.0 GiB\. --resume .*nvidia-smi"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), r"\(weights\): 10.0 GiB were free"),
    (RuntimeError("CUDA Error: invalid argument"), "^CUDA Error: invalid argument$")])
def test_too_little_memory_to_wake_up_says_how_much_there_was_and_what_to_do(on_cuda, error, message):
    def wake_up(tags):
        raise error

    on_cuda.sleep()
    on_cuda.llm.wake_up = wake_up
    with pytest.raises(RunError if "out of" in str(error) else RuntimeError, match=message):
        on_cuda.load_weights([])
    assert [name for name, *_ in rollout.atexit.calls] == ["register"]  # it sleeps on


def test_a_process_that_ends_while_the_engine_sleeps_says_why_and_nothing_after(tmp_path):
    script = """
import atexit, sys, rollout
atexit.register(print, "CUDA Error")
atexit.register(rollout._end_at_once, None)
print("log", end="")
sys.exit("train.py: why")"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "log") and ended.stderr.endswith("train.py: why\n")


def test_start_up_is_announced(on_cuda, capsys):
    VLLMEngine("folder", **SIZES)
    assert "vLLM starts: " in capsys.readouterr().out


def test_what_vllm_s_import_sets_for_itself_is_not_set_for_the_run():
    script = """
import os, rollout
rollout._import_vllm()
from torch._inductor import config
assert config.compile_threads == config.decide_compile_threads() == min(32, len(os.sched_getaffinity(0)))
assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == "0" and os.environ["VLLM_NO_USAGE_STATS"] == "1"
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_COMPILE_THREADS"}
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_vllm_knows_every_argument_and_its_head_multiplies_as_ours_does(on_cuda, monkeypatch):
    from vllm import LLM, EngineArgs

    known = {*inspect.signature(LLM).parameters, *inspect.signature(EngineArgs).parameters}
    assert on_cuda.llm.options.keys() <= known
    assert on_cuda.llm.options["hf_overrides"] == {"head_dtype": "float32"}
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setenv("RANK", "0")
    under_torchrun = VLLMEngine("folder", **SIZES).llm.options
    assert under_torchrun["distributed_executor_backend"] == "external_launcher"
    assert under_torchrun.keys() <= known
