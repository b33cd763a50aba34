"""The kernels timed beside plain torch and beside other projects' (`python -m bench kernels`).

Every operation runs forward and, where it has a backward, with it, in bf16 on CUDA, against

    eager, compile     plain torch, which holds the whole logits, as it stands and through torch.compile
    liger, cce         liger-kernel and cut-cross-entropy, where they are installed

On a CPU, in float32, `ours` is the torch reference (Linux; MALLOC_MMAP_THRESHOLD_=131072 makes `MiB` exact).

Inputs are N(0, 1)/sqrt(D) numbers, never zeros, which flatter a GPU's clock. Providers take turns: `ms` is a median.
`MiB` is the most memory that a call needs beyond what was held before it, results included; `error` the largest one of
the first 512 results of a forward pass, against float64 on the operands as they are. A provider that does not import,
does not fit or raises stays in the table with its reason.
"""

import functools
import importlib
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels import group_advantage, linear_logprob
from kernels.backend import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
VOCABULARY = 151_936
ROUNDS = 20 if DEVICE == "cuda" else 3
# A peer's limits are a result, not a failure of the bench; whatever our own raise is a failure.
PEER_ERRORS = (ImportError, RuntimeError, AssertionError, ValueError, TypeError,
               *([triton.TritonError] if triton else []))

# ------------------------------------------------------------------------------------------------ who takes part


def plain_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(T,) log-probs in float32, of float64 operands in float64."""
    logits = hidden @ weight.T
    log_p = logits.log_softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return log_p.gather(1, targets[:, None]).squeeze(1)


def load_liger(chunk_mem_const: int | None = None) -> Callable:
    """`chunk_mem_const` is its memory budget, in units of the hidden states; None leaves the default, 1."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options = [None, None, -100, 0.0, 0.0, "none"]  # bias, class weights, ignore_index, z-loss, smoothing, reduction
    if chunk_mem_const is not None:
        # softcap, z-loss wanted, accumulator's dtype, token scaling, accuracy, predictions, two of dispatch
        options += [None, False, None, False, False, False, None, None, chunk_mem_const]
    return lambda *given: -LigerFusedLinearCrossEntropyFunction.apply(*given, *options)[0]


def load_cce() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda *given: -linear_cross_entropy(*given, reduction="none")


class Case(NamedTuple):
    """An operation at one size."""

    operation: str
    name: str
    loaders: dict[str, Callable[[], Callable]]  # provider -> what gives the function to call
    arguments: tuple[Tensor, ...]  # of that function
    grad: Tensor | None  # the gradient that comes in; None where there is no backward
    truth: Tensor  # the first results in float64


def linear_case(T: int, V: int, D: int, *, half: bool = False) -> Case:
    """`half`: 512 of every 1,024 incoming gradients are exactly zero, as those of whole responses are."""
    draw = functools.partial(torch.randn, generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
    hidden, weight = draw(T, D).to(DTYPE).requires_grad_(), (draw(V, D) / D**0.5).to(DTYPE).requires_grad_()
    targets = draw(T).argsort() * 7919 % V
    grad = torch.where(torch.arange(T, device=DEVICE) % 1024 < (512 if half else 1024), draw(T), 0.0)
    with torch.no_grad():
        truth = plain_linear(hidden[:512].double(), weight.double(), targets[:512])
    loaders = {"ours": lambda: linear_logprob, "eager": lambda: plain_linear,
               "compile": lambda: torch.compile(plain_linear, dynamic=False), "liger": load_liger,
               "liger, chunk_mem_const 16": functools.partial(load_liger, 16), "cce": load_cce}
    name = f"T {T}, V {V}, D {D}" + ", half of the gradients 0" * half
    return Case("linear_logprob", name, loaders, (hidden, weight, targets), grad, truth)


def advantage_case(groups: int, rollouts: int) -> Case:
    """Groups of 2 rollouts and more with rewards -1 and 1."""
    reference = importlib.import_module("kernels.group_advantage")._reference

    def ours(rewards, offsets, weights):
        return group_advantage(rewards, offsets, weights, clip=5.0)[0]

    def plain(rewards, offsets, weights):
        return reference(rewards, offsets, weights, 1e-6, 5.0)[0]

    rng = np.random.default_rng(0)
    size = 2 + rng.multinomial(rollouts - 2 * groups, np.full(groups, 1 / groups))
    arrays = rng.choice([-1.0, 1.0], rollouts), np.concatenate(([0], size.cumsum())), rng.random(groups)
    arguments = tuple(torch.from_numpy(x).to(DEVICE) for x in arrays)
    loaders = {"ours": lambda: ours, "eager": lambda: plain, "compile": lambda: torch.compile(plain, dynamic=False)}
    return Case("group_advantage", f"{rollouts} rollouts, {groups} groups", loaders, arguments, None, plain(*arguments))


def cases() -> Iterator[Case]:
    if DEVICE == "cpu":
        yield from (linear_case(512, VOCABULARY, 256), linear_case(2048, 32_000, 256))
        return
    for T, D in ((16_384, 2048), (4096, 2048), (16_384, 2560), (16_384, 4096)):
        yield linear_case(T, VOCABULARY, D)
    yield linear_case(16_384, VOCABULARY, 2048, half=True)
    yield linear_case(4095, 151_937, 2056)
    for groups, rollouts in ((256, 1024), (4096, 16_384)):
        yield advantage_case(groups, rollouts)


# ------------------------------------------------------------------------------------------------ measuring


def forward(call: Callable, arguments: tuple, grad: Tensor | None) -> Tensor:
    with torch.no_grad():  # detached, for a peer that sees a gradient wanted computes it in its forward pass
        return call(*(x.detach() for x in arguments))


def both(call: Callable, arguments: tuple, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(call(*arguments), [x for x in arguments if x.requires_grad], grad)


def milliseconds(call: Callable[[], object]) -> float:
    torch.get_device_module().synchronize()
    begun = time.perf_counter()
    call()
    torch.get_device_module().synchronize()
    return 1000 * (time.perf_counter() - begun)


def peak_mib(call: Callable[[], object]) -> float:
    if DEVICE == "cpu":
        held = forget_peak()
        call()
        return resident_mib("VmHWM") - held
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def resident_mib(what: str) -> float:
    """VmRSS, memory that this process holds, or VmHWM, the most since `forget_peak`. Linux."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak() -> float:
    """Begins a new peak and returns what is held now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


def in_fresh_process(function: Callable, *arguments):
    """function(*arguments) in a new interpreter: nothing is warm, and no memory lies about."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(case: Case) -> Iterator[dict]:
    """A row a direction and provider; of one that cannot run, its reason in `note`."""
    torch.compiler.reset()  # one compilation a shape; past eight torch.compile would fall back to eager in silence
    for direction in (forward, both)[: 1 if case.grad is None else 2]:
        calls, facts = {}, {}
        for name, load in case.loaders.items():
            try:
                function = load()
                call = functools.partial(direction, function, case.arguments, case.grad)
                call()  # compiles and tunes
                error = forward(function, case.arguments, None)[: len(case.truth)].double() - case.truth
                facts[name] = {"MiB": peak_mib(call), "error": float(error.abs().max()), "note": None}
                calls[name] = call
            except PEER_ERRORS as failure:
                if name == "ours":
                    raise
                reason = f"{type(failure).__name__}: {failure}".splitlines()[0].replace("|", "/")
                facts[name] = {"MiB": None, "error": None, "note": reason[:120]}
        times = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].append(milliseconds(call))
        ms = {name: statistics.median(x) for name, x in times.items()}
        for name, found in facts.items():
            yield {"operation": case.operation, "case": case.name, "direction": direction.__name__, "provider": name,
                   "ms": ms.get(name), "ours / it": ms["ours"] / ms[name] if name in ms else None, **found}


def bench_kernels() -> list[dict]:
    return [row for case in cases() for row in measure(case)]
