"""What a run will need, before it runs: bytes on each GPU by phase, seconds of a step, hours.

`python train.py --plan` prints `report`, without a GPU, and `check_memory` refuses by the same numbers what cannot fit.
The trainer's bytes follow from what autograd and FSDP2 keep; tests compare them with what both allocate on fake tensors
and with the peaks of a lone H200, which they hit within 1%, or overshoot by up to 10% where blocks are compiled. vLLM's
bytes and all seconds rest on the constants below, two of them measured there. Nothing was measured on several GPUs.

P parameters are sharded over the N ranks of a node (several nodes hold copies): b of them in each block, r in the root,
which is embedding, head and last norm. A forward pass takes `width` bytes a number.
"""

import functools
from math import ceil
from typing import NamedTuple

from config import Config
from kernels.linear_logprob import MAX_EXTRA_BYTES
from metrics import markdown
from model import QK_NORM, ModelConfig

GIB = 2**30
USABLE = 0.95  # of what is free: the rest is for NCCL's buffers and for what the allocator cannot use
VLLM_FIXED = 1.7 * GIB  # its CUDA graphs, which go with the weights when it sleeps, and its workspaces
VLLM_ASLEEP = 1.0 * GIB  # what it keeps when it sleeps: workspaces, its kernels' code. Guessed: never measured yet
PER_NODE = 8  # GPUs of a node in the tables
MEAN_PROMPT, MEAN_RESPONSE, EVAL_PROBLEMS = 150, 1200, 500  # unless the limits or --eval_problems are lower
DECODE_STEP = 0.003  # seconds of a decoding step that depend on no model: scheduler, launches, drawing
AWAKENING, GRADING = 2.0, 0.003  # seconds of a step for sleep and wake-up; of a rollout for its text and grade
# Of a card's peak: operations, operations, bandwidth. The first two: the least that one H200 had (docs/speed.md).
TRAIN_SHARE, LOGPROB_SHARE, DECODE_SHARE = 0.46, 0.48, 0.6
NVLINK, INFINIBAND = 300e9, 40e9  # bytes a second of one GPU inside a node and between nodes


class Card(NamedTuple):
    memory: tuple[int, int]  # bytes free and in all, as torch.cuda.mem_get_info gives them in a process of its own
    flops: float  # bf16 operations a second at most
    bandwidth: float  # bytes a second of its memory at most


CARDS = {"24 GB": Card((int(23.1 * GIB), int(23.6 * GIB)), 165e12, 1.0e12),  # RTX 4090
         "80 GB": Card((int(78.66 * GIB), int(79.19 * GIB)), 989e12, 3.35e12),  # H100
         "141 GB": Card((int(139.3 * GIB), int(139.8 * GIB)), 989e12, 4.8e12)}  # H200
SHOWN = [("24 GB", 1), *((name, world) for name in ("80 GB", "141 GB") for world in (1, 2, 4, 8, 16))]
# What --plan knows without the hub: hidden size, inner size, layers, heads, whether embedding and head are one.
QWEN3 = {"Qwen/Qwen3-0.6B-Base": (1024, 3072, 28, 16, True), "Qwen/Qwen3-1.7B-Base": (2048, 6144, 28, 16, True),
         "Qwen/Qwen3-4B-Base": (2560, 9728, 36, 32, True), "Qwen/Qwen3-8B-Base": (4096, 12288, 36, 32, False)}


def known_model(name: str) -> ModelConfig | None:
    """The numbers of a key of QWEN3, at whatever revision (`name@revision`), or None."""
    if (known := QWEN3.get(name.partition("@")[0])) is None:
        return None
    hidden, inner, layers, heads, tied = known
    return ModelConfig("qwen3", 151936, hidden, inner, layers, heads, num_key_value_heads=8, head_dim=128,
                       rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=tied, max_position_embeddings=32768)


@functools.cache
def sizes(model: ModelConfig) -> tuple[int, int, int]:
    """P, r and b."""
    P, root = model.num_parameters(), model.hidden_size * (model.vocab_size * (2 - model.tie_word_embeddings) + 1)
    return P, root, (P - root) // model.num_hidden_layers


def width(cfg: Config) -> int:
    return 4 if cfg.dtype == "float32" else 2


def limits(model: ModelConfig, cfg: Config) -> tuple[int, int]:
    return model.limits(cfg.max_prompt_tokens, cfg.max_response_tokens)


def row_tokens(model: ModelConfig, cfg: Config) -> int:
    """Tokens of the longest packed row: a rollout longer than --microbatch_tokens has a row of its own."""
    return max(cfg.microbatch_tokens, sum(limits(model, cfg)))


def cache_bytes(model: ModelConfig, width: int) -> int:
    """Of the keys and values of one token."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * width


def activations(model: ModelConfig, tokens: int, *, checkpointing: float, width: int = 2) -> int:
    """Bytes of a row of tokens on top of weights and their gradients when they are most: in backward of the last
    block's MLP or, where rows are short, of the head. Kernels as on CUDA: flash attention, norms that keep their
    input."""
    D, inner, L = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    H, Hkv, norm = model.num_attention_heads, model.num_key_value_heads, QK_NORM[model.model_type]
    # Of a block: its input, both normed inputs and the sum between them (D each); q and k (before and after the norm),
    # v and what attention gave; gate, its silu, up and their product; in float32 lse and 1/rms.
    kept = width * (4 * D + (2 + norm) * (H + Hkv) * model.head_dim + 4 * inner) + 4 * (2 + H + norm * (H + Hkv))
    recomputed = round(checkpointing * L)
    layers = recomputed * width * D + (L - recomputed) * kept
    mlp = (kept if recomputed == L else width * D) + width * 2 * inner  # a block again; the gradients of silu and up
    columns = min(model.vocab_size, max(1024, (MAX_EXTRA_BYTES // tokens - 4 * D) // width))  # of a slice of logits
    head = width * 5 * D + 4 * D + width * columns
    return tokens * (layers + max(mlp, head))


def _largest(*moments: dict[str, float]) -> dict[str, float]:
    return max(moments, key=lambda parts: sum(parts.values()))


def phases(model: ModelConfig, cfg: Config, world: int, per_node: int, total: int) -> dict[str, dict[str, float]]:
    """Bytes on one GPU of `total` bytes, by phase and by part: the parts are there at once, at the phase's peak."""
    (P, root, block), N, w = sizes(model), min(world, per_node), width(cfg)
    table, tokens, tied = model.vocab_size * model.hidden_size, row_tokens(model, cfg), model.tie_word_embeddings
    state = {"masters": 4 * P / N, "moments": 8 * P / N} | ({"reference": w * P / N} if cfg.kl_beta else {})
    awake, asleep = {"vLLM": cfg.gpu_memory_utilization * total}, {"vLLM": VLLM_ASLEEP}
    if cfg.engine == "torch":  # keeps its weights; its cache takes half of what is free, and one rollout at least
        awake = {"sampler": w * P + sum(limits(model, cfg)) * cache_bytes(model, w)}
        asleep = {"sampler": w * P}
    # A block's weights are there twice, as they arrived and in place; so are the root's until those of a block come.
    models = 2 if cfg.kl_beta else 1
    forward = _largest(
        {"gathered": w * (models * root + 2 * block),
         "activations": tokens * w * 3 * (model.hidden_size + model.intermediate_size)},
        {"gathered": w * ((models + 1) * root + 2 * block), "activations": tokens * w * model.hidden_size})
    # Gradients of a block are on their way in float32; the head's wait for the root's end, where an embedding's of its
    # own joins them, or one that is the same matrix, and then their sum. A lone rank copies more.
    backward = _largest(
        {"gathered": w * (root + 2 * block),
         "unsharded gradients": w * (table + model.hidden_size * model.intermediate_size) + 4 * block,
         "activations": activations(model, tokens, checkpointing=cfg.gradient_checkpointing, width=w)},
        {"root's end": max((9 - tied) * (N == 1), w * (3 + tied)) * root + 4 * block})
    return {"sampling": state | awake, "log-probs": state | asleep | forward,
            "training": state | asleep | {"gradients": 4 * P / N} | backward,
            "saving": state | awake | {"a whole matrix": (4 + w) * table}}  # as gathered, and cast


def cache_tokens(model: ModelConfig, cfg: Config, total: int) -> int:
    """Tokens whose keys and values vLLM can hold beside weights, activations and drawing; below 0 where these alone
    are too much."""
    w, rows = width(cfg), min(cfg.max_rollouts, 1024)
    batched = min(16384 if total >= 70 * GIB else 8192, rows * sum(limits(model, cfg)))  # vLLM's defaults
    own = VLLM_FIXED + batched * w * (2 * model.hidden_size + 3 * model.intermediate_size)
    own += rows * model.vocab_size * 4 * 5  # logits, log-probs and what drawing makes of them
    return int((cfg.gpu_memory_utilization * total - w * sizes(model)[0] - own) // cache_bytes(model, w))


def over(model: ModelConfig, cfg: Config, world: int, per_node: int, memory: tuple[int, int]) -> dict[str, str]:
    """What does not fit: phase -> what it needs; empty where all fits. memory: bytes free and in all."""
    free, total = memory
    peaks = {phase: sum(parts.values()) for phase, parts in phases(model, cfg, world, per_node, total).items()}
    found = {phase: f"{peak / GIB:.1f} GiB" for phase, peak in peaks.items() if peak > USABLE * free}
    longest, room = sum(limits(model, cfg)), max(0, cache_tokens(model, cfg, total))
    if cfg.engine != "torch" and room < longest:
        found["vLLM's KV cache"] = (f"{longest} tokens for one rollout and gets {room} (--gpu_memory_utilization above "
                                    f"{cfg.gpu_memory_utilization} or shorter responses)")
    return found


def check_memory(model: ModelConfig, cfg: Config, world: int, per_node: int, memory: tuple[int, int]) -> None:
    """Raises ValueError, before anything is loaded, for a run with a phase that cannot fit one GPU. cfg.engine: as it
    was chosen; memory: bytes free and in all, torch.cuda.mem_get_info()."""
    found, (free, total) = over(model, cfg, world, per_node, memory), memory
    if found:
        raise ValueError(
            f"{sizes(model)[0] / 1e9:.1f}B parameters do not fit {world} x {total / GIB:.1f} GiB, by estimate: "
            + ", ".join(f"{what} needs {need}" for what, need in found.items())
            + f". On each {free / GIB:.1f} GiB are free, {USABLE * free / GIB:.1f} of them usable. Try --kl_beta 0, "
            "more GPUs in a node, --gradient_checkpointing 1, a lower --gpu_memory_utilization or --microbatch_tokens")


def mean_tokens(model: ModelConfig, cfg: Config) -> tuple[int, int]:
    """Of a prompt and of a response, as assumed."""
    prompt, response = limits(model, cfg)
    return min(MEAN_PROMPT, prompt), min(MEAN_RESPONSE, response)


def decoding(model: ModelConfig, cfg: Config, rollouts: float, card: Card) -> float:
    """Seconds in which one GPU draws so many rollouts: each decoding step reads the weights and all live caches."""
    (prompt, response), w = mean_tokens(model, cfg), width(cfg)
    at_once = min(cfg.max_rollouts, max(1, cache_tokens(model, cfg, card.memory[1]) // (prompt + response)))
    steps = response * max(0.0, rollouts / at_once - 1) + limits(model, cfg)[1]  # one of the last runs to the limit
    read = steps * w * sizes(model)[0] + rollouts * response * (prompt + response / 2) * cache_bytes(model, w)
    return steps * DECODE_STEP + read / (DECODE_SHARE * card.bandwidth)


def token_flops(model: ModelConfig, tokens: int) -> float:
    """Operations of one token in one forward pass over sequences of so many: two a weight, but none in a table of
    embeddings, and causal attention."""
    multiplied = sizes(model)[0] - (not model.tie_word_embeddings) * model.vocab_size * model.hidden_size
    return 2 * multiplied + 2 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * tokens


def step_seconds(model: ModelConfig, cfg: Config, world: int, card: Card) -> dict[str, float]:
    """A step by phase. Sending runs beside computing: what takes longer counts."""
    (P, root, _), N, w = sizes(model), min(world, PER_NODE), width(cfg)
    rollouts, tokens = cfg.prompts_per_step * cfg.rollouts_per_prompt / world, sum(mean_tokens(model, cfg))
    models, minibatches = 2 if cfg.kl_beta else 1, cfg.prompts_per_step / cfg.minibatch_prompts
    forward, row = rollouts * tokens * token_flops(model, tokens), row_tokens(model, cfg)
    # A row gathers all weights, those of the blocks again in backward, and sends gradients; nodes add up theirs.
    others, gathered = (N - 1) / N, models * ceil(rollouts * tokens / row) * (N - 1) / N * w * P
    rows = ceil(minibatches) * ceil(rollouts * tokens / minibatches / row)
    inside, between = rows * others * (w * (2 * P - root) + 4 * P), rows * 8 * (1 - N / world) * P / N
    return {"sampling": decoding(model, cfg, rollouts, card),
            "log-probs": max(models * forward / (LOGPROB_SHARE * card.flops), gathered / NVLINK),
            "training": max((3 + cfg.gradient_checkpointing) * forward / (TRAIN_SHARE * card.flops),
                            inside / NVLINK + between / INFINIBAND),
            "the rest": AWAKENING + GRADING * rollouts + others * 4 * P / NVLINK}


def _memory_row(model: ModelConfig, cfg: Config, name: str, world: int) -> list[str]:
    memory = CARDS[name].memory
    by_phase, found = phases(model, cfg, world, PER_NODE, memory[1]), over(model, cfg, world, PER_NODE, memory)
    state = sum(by_phase["training"].get(part, 0) for part in ("masters", "moments", "gradients", "reference"))
    room = max(0, cache_tokens(model, cfg, memory[1]))
    return [f"{world} x {name}", f"{state / GIB:.1f}", f"{room:,} ({room // sum(limits(model, cfg))})",
            *(f"{sum(parts.values()) / GIB:.1f}" for parts in by_phase.values()),
            "over: " + ", ".join(found) if found else "yes"]


def _time_row(model: ModelConfig, cfg: Config, name: str, world: int) -> list[str]:
    seconds = step_seconds(model, cfg, world, CARDS[name])
    step = sum(seconds.values())
    evaluation = decoding(model, cfg, (cfg.eval_problems or EVAL_PROBLEMS) * cfg.eval_rollouts / world, CARDS[name])
    evaluations = sum(map(cfg.due, range(cfg.steps + 1)))
    hours = (cfg.steps * step + evaluations * evaluation) / 3600
    return [f"{world} x {name}", *(f"{x:.1f}" for x in (*seconds.values(), step, evaluation, hours))]


def report(cfg: Config, model: ModelConfig) -> str:
    """What --plan prints, in Markdown. model: the numbers of cfg.model."""
    prompt, response = mean_tokens(model, cfg)
    fitting = [(name, world) for name, world in SHOWN if not over(model, cfg, world, PER_NODE, CARDS[name].memory)]
    return "\n".join([
        f"{cfg.model}: {sizes(model)[0] / 1e9:.2f}B parameters. All that follows is an estimate: see plan.py.", "",
        f"**Memory**, estimated GiB of each GPU: rows of {row_tokens(model, cfg):,} tokens, rollouts of up to "
        f"{sum(limits(model, cfg)):,}, --gpu_memory_utilization {cfg.gpu_memory_utilization}, --gradient_checkpointing "
        f"{cfg.gradient_checkpointing}. State: masters, moments, gradients and reference, sharded inside a node of 8. "
        "KV cache: tokens that vLLM holds, in brackets rollouts of full length. The phases: their peaks, which must "
        f"fit {USABLE:.0%} of what is free.", "",
        markdown(["GPUs", "state", "KV cache", *phases(model, cfg, 1, 1, 0), "fits"],
                 [_memory_row(model, cfg, *shown) for shown in SHOWN]), "",
        f"**Time**, estimated where it fits: a step draws {cfg.prompts_per_step} prompts x {cfg.rollouts_per_prompt} "
        f"rollouts, assumed to have {prompt} + {response} tokens, and trains on all. The run: {cfg.steps} steps, "
        f"evaluations of {cfg.eval_problems or EVAL_PROBLEMS} problems x {cfg.eval_rollouts} responses.", "",
        markdown(["GPUs", "sampling s", "log-probs s", "training s", "the rest s", "step s", "evaluation s", "run h"],
                 [_time_row(model, cfg, *shown) for shown in fitting])])
