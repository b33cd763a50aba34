"""What a run will need, before it runs: bytes on each GPU by phase, seconds of a step, hours.

`python train.py --plan` prints `report`, without a GPU, and `check_memory` refuses by the same numbers what cannot fit.
The trainer's bytes follow from what autograd and FSDP2 keep; tests compare them with what both allocate on fake tensors
and with the peaks of a lone H200, which they hit within 1%, or overshoot by up to 10% where blocks are compiled. vLLM's
bytes and all seconds rest on the constants below, two of them measured there. Nothing was measured on several GPUs, and
what they send each other is left out of the seconds: it runs beside computing (docs/speed.md).

P parameters are sharded over the N ranks of a node (several nodes hold copies): b of them in each block, r in the root,
which is embedding, head and last norm. A forward pass takes `width` bytes a number.
"""

import dataclasses
import functools
import itertools
import re
import timeit
from collections import namedtuple
from math import ceil, inf
from pathlib import Path
from typing import NamedTuple

import torch

import tasks
from config import Config
from kernels.linear_logprob import MAX_EXTRA_BYTES
from metrics import markdown, whole_lines
from model import QK_NORM, ModelConfig, Transformer

GIB = 2**30
USABLE = 0.95  # of what is free: the rest is for NCCL's buffers and for what the allocator cannot use
VLLM_FIXED = 1.7 * GIB  # its CUDA graphs, which go with the weights when it sleeps, and its workspaces
VLLM_ASLEEP = 1.0 * GIB  # what it keeps when it sleeps: workspaces, its kernels' code. Guessed: never measured yet
PER_NODE = 8  # GPUs of a node in the tables
MEAN_PROMPT, MEAN_RESPONSE = 150, 1200  # unless the limits are lower, or a log tells
PROBLEMS, HELD_OUT = 500, 200  # of a benchmark; held out of train_data at most (data.hold_out)
Tokens = tuple[float, float]  # of a prompt and of a response, in the mean
GRADING = 0.003  # seconds for text and grade of a rollout of MEAN_RESPONSE tokens
# Of a card's peak: operations, operations, bandwidth. The first two: the least that one H200 had (docs/speed.md).
TRAIN_SHARE, LOGPROB_SHARE, DECODE_SHARE = 0.46, 0.48, 0.6
CPU_PARAMETERS = 200e6  # of the largest model for which a CPU is timed
parameters = functools.cache(ModelConfig.num_parameters)


class Card(NamedTuple):
    memory: tuple[int, int]  # bytes free and in all, as torch.cuda.mem_get_info gives them in a process of its own
    flops: float  # dense bf16 operations a second at most
    bandwidth: float  # bytes a second of its memory at most
    step: float = 0.003  # seconds of a decoding step that depend on no model: scheduler, launches, drawing
    awakening: float = 2.0  # seconds of a training step for sleep and wake-up of the sampler
    token: float = 0.0  # seconds of a drawn token, where not reading but computing takes them


def card(gib: float, tflops: float, bandwidth: float) -> Card:
    """Of GiB in all, as torch sees them, TFLOP/s and GB/s."""
    return Card((int((gib - 0.5) * GIB), int(gib * GIB)), tflops * 1e12, bandwidth * 1e9)


# The vendor's data sheets, SXM where there is a choice; GiB as torch reports them.
CARDS = {"4090": card(23.6, 165, 1008), "A100-40": card(39.4, 312, 1555), "A100-80": card(79.2, 312, 2039),
         "L40S": card(44.4, 362, 864), "H100": card(79.2, 989, 3350), "H200": card(139.8, 989, 4800),
         "B200": card(178, 2250, 7700)}
SHOWN = ("4090", *(f"{world}x{name}" for name in ("H100", "H200") for world in (1, 2, 4, 8, 16)))
# What --plan knows without the hub: hidden size, inner size, layers, heads, whether embedding and head are one.
SHAPES = {"0.6B": (1024, 3072, 28, 16, True), "1.7B": (2048, 6144, 28, 16, True), "4B": (2560, 9728, 36, 32, True),
          "8B": (4096, 12288, 36, 32, False)}
QWEN3 = {f"Qwen/Qwen3-{size}-Base": ModelConfig(
    "qwen3", 151936, *shape, num_key_value_heads=8, head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6,
    tie_word_embeddings=tied, max_position_embeddings=32768) for size, (*shape, tied) in SHAPES.items()}


def known_model(name: str) -> ModelConfig | None:
    """The numbers of a key of QWEN3, at whatever revision (`name@revision`), or None."""
    return QWEN3.get(name.partition("@")[0])


def machine(text: str) -> tuple[int, str, Card]:
    """`4xA100-40`, `h200` or `8x96GiB@500TFLOPS` -> how many of which card. Bandwidth of the last one is assumed to be
    to its peak as an H100's. Raises ValueError for what it does not know."""
    count, name = re.match(r"(?:([1-9]\d*)x)?(.*)", text.lower()).groups()
    world, known = int(count or 1), {name.lower(): (name, found) for name, found in CARDS.items()}
    if own := re.fullmatch(r"(\d+(?:\.\d+)?)gib@(\d+(?:\.\d+)?)tflops", name):
        gib, tflops = map(float, own.groups())
        known[name] = f"{gib:g}GiB@{tflops:g}TFLOPS", card(gib, tflops, 3350 / 989 * tflops)
    if name not in known or (world > PER_NODE and world % PER_NODE):
        raise ValueError(f"--plan {text}: known cards are {', '.join(CARDS)}, as in 4xA100-40; of others give memory "
                         "and dense bf16 peak, as in 8x96GiB@500TFLOPS; above 8 they are whole nodes of 8")
    return world, *known[name]


Sizes = namedtuple("Sizes", "P root block width cache response longest row")


@functools.cache
def sizes(model: ModelConfig, cfg: Config) -> Sizes:
    """P, r and b; bytes of a number in a forward pass, and of the keys and values of a token; tokens at most of a
    response, of one with its prompt, and of a packed row: one longer than --microbatch_tokens has a row of its own."""
    P, width = parameters(model), 4 if cfg.dtype == "float32" else 2
    root = model.hidden_size * (model.vocab_size * (2 - model.tie_word_embeddings) + 1)
    prompt, response = model.limits(cfg.max_prompt_tokens, cfg.max_response_tokens)
    return Sizes(P, root, (P - root) // model.num_hidden_layers, width,
                 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * width,
                 response, prompt + response, max(cfg.microbatch_tokens, prompt + response))


def activations(model: ModelConfig, cfg: Config) -> int:
    """Bytes of the longest row on top of weights and their gradients when they are most: in backward of the last
    block's MLP or, where rows are short, of the head. Kernels as on CUDA: flash attention, norms that keep their
    input."""
    D, inner, L, s = model.hidden_size, model.intermediate_size, model.num_hidden_layers, sizes(model, cfg)
    tokens, w, recomputed = s.row, s.width, round(cfg.gradient_checkpointing * L)
    H, Hkv, norm = model.num_attention_heads, model.num_key_value_heads, QK_NORM[model.model_type]
    # Of a block: its input, both normed inputs and the sum between them (D each); q and k (before and after the norm),
    # v and what attention gave; gate, its silu, up and their product; in float32 lse and 1/rms.
    kept = w * (4 * D + (2 + norm) * (H + Hkv) * model.head_dim + 4 * inner) + 4 * (2 + H + norm * (H + Hkv))
    layers = recomputed * w * D + (L - recomputed) * kept
    mlp = (kept if recomputed == L else w * D) + w * 2 * inner  # a block again; the gradients of silu and up
    columns = min(model.vocab_size, max(1024, (MAX_EXTRA_BYTES // tokens - 4 * D) // w))  # of a slice of logits
    head = w * 5 * D + 4 * D + w * columns
    return tokens * (layers + max(mlp, head))


def phases(model: ModelConfig, cfg: Config, world: int, per_node: int, total: int) -> dict[str, float]:
    """Bytes on one GPU of `total` bytes when they are most, by phase."""
    P, root, block, w, cache, _, longest, tokens = sizes(model, cfg)
    D, inner, table = model.hidden_size, model.intermediate_size, model.vocab_size * model.hidden_size
    N, tied, models = min(world, per_node), model.tie_word_embeddings, 2 if cfg.kl_beta else 1
    state = (12 + w * (models - 1)) * P / N  # masters, both moments and the reference
    awake, asleep = cfg.gpu_memory_utilization * total, VLLM_ASLEEP
    if cfg.engine == "torch":  # keeps its weights; its cache takes half of what is free, and one rollout at least
        awake, asleep = w * P + longest * cache, w * P
    # A block's weights are there twice, as they arrived and in place; so are the root's until those of a block come.
    forward = max(w * (models * root + 2 * block) + w * 3 * (D + inner) * tokens,
                  w * ((models + 1) * root + 2 * block) + w * D * tokens)
    # Gradients of a block are on their way in float32; the head's wait for the root's end, where an embedding's of its
    # own joins them, or one that is the same matrix, and then their sum. A lone rank copies more.
    gathered, gradients = w * (root + 2 * block), w * (table + D * inner) + 4 * block
    roots_end = max((9 - tied) * (N == 1), w * (3 + tied)) * root + 4 * block
    backward = max(gathered + gradients + activations(model, cfg), roots_end)
    return {"sampling": state + awake, "log-probs": state + asleep + forward,
            "training": state + asleep + 4 * P / N + backward,
            "saving": state + awake + (4 + w) * table}  # with the largest matrix whole, as gathered and cast


def cache_tokens(model: ModelConfig, cfg: Config, total: int) -> int:
    """Tokens whose keys and values vLLM can hold beside weights, activations and drawing; below 0 where these alone
    are too much."""
    s, rows = sizes(model, cfg), min(cfg.max_rollouts, 1024)
    batched = min(16384 if total >= 70 * GIB else 8192, rows * s.longest)  # vLLM's defaults
    own = VLLM_FIXED + batched * s.width * (2 * model.hidden_size + 3 * model.intermediate_size)
    own += rows * model.vocab_size * 4 * 5  # logits, log-probs and what drawing makes of them
    return int((cfg.gpu_memory_utilization * total - s.width * s.P - own) // s.cache)


def over(model: ModelConfig, cfg: Config, world: int, per_node: int, memory: tuple[int, int]) -> dict[str, str]:
    """What does not fit: phase -> what it needs; empty where all fits. memory: bytes free and in all."""
    free, total = memory
    found = {phase: f"{peak / GIB:.1f} GiB" for phase, peak in phases(model, cfg, world, per_node, total).items()
             if peak > USABLE * free}
    room = max(0, cache_tokens(model, cfg, total))
    if cfg.engine != "torch" and room < (longest := sizes(model, cfg).longest):
        found["vLLM's KV cache"] = (f"{longest} tokens for one rollout and gets {room} (--gpu_memory_utilization above "
                                    f"{cfg.gpu_memory_utilization} or shorter responses)")
    return found


def check_memory(model: ModelConfig, cfg: Config, world: int, per_node: int, memory: tuple[int, int]) -> None:
    """Raises ValueError, before anything is loaded, for a run with a phase that cannot fit one GPU. cfg.engine: as it
    was chosen; memory: bytes free and in all, torch.cuda.mem_get_info()."""
    found, (free, total) = over(model, cfg, world, per_node, memory), memory
    if found:
        raise ValueError(
            f"{parameters(model) / 1e9:.1f}B parameters do not fit {world} x {total / GIB:.1f} GiB, by estimate: "
            + ", ".join(f"{what} needs {need}" for what, need in found.items())
            + f". On each {free / GIB:.1f} GiB are free, {USABLE * free / GIB:.1f} of them usable. Try --kl_beta 0, "
            "more GPUs in a node, --gradient_checkpointing 1, a lower --gpu_memory_utilization or --microbatch_tokens")


def remedy(model: ModelConfig, cfg: Config, world: int, memory: tuple[int, int]) -> tuple[int, Config] | None:
    """The least change with which all fits, as cards and settings, or None. What stands first changes only where all
    behind it is not enough, and as little as it can; rows get no shorter than the longest rollout."""
    share, tokens, layers = cfg.gpu_memory_utilization, cfg.microbatch_tokens, cfg.gradient_checkpointing
    for cards, utilization, shorter, recomputed in itertools.product(
            [world, *(n for n in (2, 4, 8) if n > world)],
            sorted([share, *(n / 20 for n in range(1, 20))], key=lambda x: abs(x - share)),
            [tokens, *(tokens >> n for n in range(1, 9) if tokens >> n >= sizes(model, cfg).longest)],
            [layers, *(x for x in (0.25, 0.5, 0.75, 1.0) if x > layers)]):
        changed = dataclasses.replace(cfg, gpu_memory_utilization=utilization, microbatch_tokens=shorter,
                                      gradient_checkpointing=recomputed)
        if not over(model, changed, cards, PER_NODE, memory):
            return cards, changed
    return None


def mean_tokens(model: ModelConfig, cfg: Config, log: list[dict] | None = None) -> Tokens:
    """Responses as the lines of a run's log have them, else as assumed."""
    prompt, response = model.limits(cfg.max_prompt_tokens, cfg.max_response_tokens)
    mean = sum(line["response_tokens_mean"] for line in log) / len(log) if log else MEAN_RESPONSE
    return min(MEAN_PROMPT, prompt), min(mean, response)


def evaluated(cfg: Config) -> int:
    """Problems of an evaluation; where only the data would tell, as assumed."""
    if not cfg.eval_data:
        return min(cfg.eval_problems or HELD_OUT, HELD_OUT)
    return cfg.eval_problems or (tasks.SIZES["heldout"] if cfg.eval_data.partition(":")[0] in tasks.TASKS else PROBLEMS)


def decoding(model: ModelConfig, cfg: Config, tokens: Tokens, rollouts: float, card: Card) -> float:
    """Seconds in which one GPU draws so many rollouts: each decoding step reads the weights and all live caches."""
    (prompt, response), s = tokens, sizes(model, cfg)
    slots = min(cfg.max_rollouts, max(1, int(cache_tokens(model, cfg, card.memory[1]) // (prompt + response))))
    steps = response * max(0.0, rollouts / slots - 1) + s.response  # one of the last runs to the limit
    read = steps * s.width * s.P + rollouts * response * (prompt + response / 2) * s.cache
    return steps * card.step + read / (DECODE_SHARE * card.bandwidth) + rollouts * response * card.token


def token_flops(model: ModelConfig, tokens: int) -> float:
    """Operations of one token in one forward pass over sequences of so many: two a weight, but none in a table of
    embeddings, and causal attention."""
    multiplied = parameters(model) - (not model.tie_word_embeddings) * model.vocab_size * model.hidden_size
    return 2 * multiplied + 2 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * tokens


def step_seconds(model: ModelConfig, cfg: Config, world: int, card: Card, tokens: Tokens) -> dict[str, float]:
    """A step by phase."""
    rollouts, length = cfg.prompts_per_step * cfg.rollouts_per_prompt / world, sum(tokens)
    forward = rollouts * length * token_flops(model, length)
    return {"sampling": decoding(model, cfg, tokens, rollouts, card),
            "log-probs": (2 if cfg.kl_beta else 1) * forward / (LOGPROB_SHARE * card.flops),
            "training": (3 + cfg.gradient_checkpointing) * forward / (TRAIN_SHARE * card.flops),
            "the rest": card.awakening + GRADING * rollouts * tokens[1] / MEAN_RESPONSE}


def this_cpu(model: ModelConfig, cfg: Config, tokens: Tokens) -> Card:
    """One that takes as long as this machine's CPU, in float32 with random weights, by about a second of training on a
    packed row: to draw a token is taken for two thirds of the work, as it is for the built-in tasks."""
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    net, length = Transformer(model), ceil(sum(tokens))
    net.init_weights(torch.Generator())  # of others numbers come that are too small for a CPU to be fast
    rollouts = max(1, min(cfg.microbatch_tokens, int(1e10 / parameters(model))) // length)  # few of a large model
    row, borders = torch.randint(model.vocab_size, (rollouts * length,)), torch.arange(rollouts + 1) * length
    calls, took = timeit.Timer(
        lambda: net.logprobs(row, borders, length, torch.arange(1, len(row))).sum().backward()).autorange()
    token = took / (calls * len(row))
    return Card((1 << 50, 1 << 50), 3 * token_flops(model, length) / token / TRAIN_SHARE, inf, 0.0, 0.0, 2 / 3 * token)


def table_row(model: ModelConfig, cfg: Config, world: int, name: str, card: Card, tokens: Tokens) -> list[str]:
    """Of the table that --plan prints."""
    free, total = card.memory
    peaks, room = phases(model, cfg, world, PER_NODE, total).values(), max(0, cache_tokens(model, cfg, total))
    cells = [f"{world} x {name}", f"{room:,} ({room // sizes(model, cfg).longest})",
             *(f"{x / GIB:.1f}" for x in (*peaks, USABLE * free))]
    if found := over(model, cfg, world, PER_NODE, card.memory):
        return [*cells, "over: " + ", ".join(found), "", "", ""]
    seconds = step_seconds(model, cfg, world, card, tokens)
    step = sum(seconds.values())
    evaluation = decoding(model, cfg, tokens, evaluated(cfg) * cfg.eval_rollouts / world, card)
    run = cfg.steps * step + sum(map(cfg.due, range(cfg.steps + 1))) * evaluation
    return [*cells, "yes", f"{step:.1f} ({' + '.join(f'{x:.1f}' for x in seconds.values())})", f"{evaluation:.1f}",
            f"{run / 3600:.1f} h" if run >= 3600 else f"{run / 60:.1f} min"]


def report(cfg: Config, model: ModelConfig, cards: str = "all", given: str = "") -> str:
    """What --plan prints, in Markdown. model: the numbers of cfg.model. cards: what `machine` reads, or "all": SHOWN,
    and where there is no GPU and the model is small this machine's CPU. given: flags that the command to paste has."""
    path, s, note = Path(cfg.out_dir, "metrics.jsonl"), sizes(model, cfg), ""
    log = whole_lines(path) if path.exists() else []
    tokens = mean_tokens(model, cfg, log)
    machines = [machine(text) for text in (SHOWN if cards == "all" else [cards])]
    rows, (world, name, card) = [table_row(model, cfg, *one, tokens) for one in machines], machines[0]
    if cards == "all":
        if s.P <= CPU_PARAMETERS and not torch.cuda.is_available():
            row = table_row(model, cfg, 1, "", this_cpu(model, cfg, tokens), tokens)
            rows.append(["this CPU, timed", *[""] * 7, *row[8:]])
    elif enough := remedy(model, cfg, world, card.memory):
        gpus, changed = enough
        if enough != (world, cfg):
            rows.append(table_row(model, changed, gpus, name, card, tokens))
        flags = [f" --{flag} {x}" for flag, x in vars(changed).items() if x != getattr(cfg, flag)]
        nodes = f"--nnodes {gpus // PER_NODE} --rdzv_backend c10d --rdzv_endpoint HOST:29500 " * (gpus > PER_NODE)
        start = "python" if gpus == 1 else f"torchrun {nodes}--nproc_per_node {min(gpus, PER_NODE)}"
        note = (f"To run {'the second row, with the least change that fits' if rows[1:] else 'it'}"
                f"{', on each node' * (gpus > PER_NODE)}: `{start} train.py {given}{''.join(flags)}`")
    else:
        note = f"Neither settings nor {PER_NODE} of these cards are enough: --kl_beta 0, or a smaller model"
    return "\n".join([
        f"{cfg.model}: {s.P / 1e6:,.1f}M parameters. All that follows is an estimate: see plan.py.", "",
        f"**Memory**, GiB of each GPU: rows of {s.row:,} tokens, rollouts of up to "
        f"{s.longest:,}, --gpu_memory_utilization {cfg.gpu_memory_utilization}, --gradient_checkpointing "
        f"{cfg.gradient_checkpointing}. KV cache: tokens that vLLM holds, in brackets rollouts of full length. Then "
        f"the peak of each phase, which must fit what is usable, {USABLE:.0%} of what is free.", "",
        f"**Time** where it fits: a step draws {cfg.prompts_per_step} prompts x {cfg.rollouts_per_prompt} rollouts of "
        f"{tokens[0]:.0f} + {tokens[1]:.0f} tokens, {f'the latter as in {path}' if log else 'as assumed'}, and trains "
        f"on all; in brackets sampling, log-probs, training and the rest. The run: {cfg.steps} steps, evaluations of "
        f"{evaluated(cfg)} problems x {cfg.eval_rollouts} responses.", "",
        markdown(["GPUs", "KV cache", *phases(model, cfg, 1, 1, 0), "usable", "fits", "step s", "evaluation s", "run"],
                 rows), *(["", note] if note else [])])
