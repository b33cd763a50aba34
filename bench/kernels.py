"""The kernels timed beside plain torch and beside other projects' (`python -m bench kernels`), and what the compiler
makes of them for sm_90 (`python -m bench sm90`).

On CUDA every operation runs forward and forward+backward against

    eager, compile     the whole logits in plain torch, as it stands and through torch.compile
    liger, cce         liger-kernel and cut-cross-entropy, where they are installed

A provider that does not import, does not fit or raises stays in the table with its reason. Inputs are N(0, 1)/sqrt(D)
numbers, never zeros, which flatter a GPU's clock. Providers alternate, inputs rotate, and medians are reported: `ms`
between CUDA events, `cold ms` likewise right after L2 was overwritten. `MiB` is the most memory that torch held beyond
what it held before the call, results included. Errors are against float64 on the operands as they are: the largest
absolute one of what comes out, the relative one (in norm) of the gradients at SAMPLE rows. `same bits` says whether two
runs gave the same. `predicted` is what the operation's arithmetic and bytes should take at the speeds below, written
down before anything was measured.

Without CUDA the torch references stand beside whole logits: seconds, and the memory that a fresh process needs more.
"""

import functools
import importlib
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType

from kernels import group_advantage, linear_logprob
from kernels.backend import triton

DEVICE = "cuda"
VOCABULARY = 151_936
SAMPLE = 512  # rows of each gradient that are compared with float64
SETS = 3  # of inputs, in rotation
L2_FLUSH_BYTES = 512 << 20
RACE_SECONDS, MIN_ROUNDS, MAX_ROUNDS = 1.0, 5, 50
LAST_START_SECONDS = 390  # no case begins later: the whole is to end within eight minutes
WHOLE_LOGITS_BYTES = 16  # a logit's share of the peak in plain torch: bf16 logits, float32 log-probs, both gradients

# What the predictions assume of an H200.
FORWARD_FLOPS, BOTH_FLOPS, BYTES_PER_SECOND, LAUNCH_US = 600e12, 650e12, 4.3e12, 2.0


# ------------------------------------------------------------------------------------------------ plain torch


def plain_linear(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(1, dtype=torch.float32).gather(1, targets[:, None]).squeeze(1)


def plain_linear_and_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    log_p = (hidden @ weight.T).log_softmax(1, dtype=torch.float32)
    return torch.stack((log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)))


# ------------------------------------------------------------------------------------------------ other projects


def load_liger(chunk_mem_const: int | None = None) -> Callable:
    """`chunk_mem_const` is its memory budget, in units of the hidden states; None leaves the default, 1."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    options = [None, None, -100, 0.0, 0.0, "none"]  # bias, class weights, ignore_index, z-loss, smoothing, reduction
    if chunk_mem_const is not None:
        # softcap, z-loss wanted, accumulator's dtype, token scaling, accuracy, predictions, two of dispatch
        options += [None, False, None, False, False, False, None, None, chunk_mem_const]
    return lambda hidden, weight, targets: -LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets,
                                                                                       *options)[0]


def load_cce() -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, targets: -linear_cross_entropy(hidden, weight, targets, reduction="none")


LINEAR_PEERS = {"liger": load_liger, "liger, chunk_mem_const 16": functools.partial(load_liger, 16), "cce": load_cce}
# A peer's limits are a result, not a failure of the bench; whatever our own raise is a failure.
PEER_ERRORS = (RuntimeError, AssertionError, ValueError, TypeError, *([triton.TritonError] if triton else []))


def reason(error: Exception) -> str:
    """One line for a cell; of an assertion without a message, what it asserted."""
    text = str(error).strip() or traceback.extract_tb(error.__traceback__)[-1].line
    return f"{type(error).__name__}: {text}".splitlines()[0].replace("|", "/")[:120]


def providers(ours: Callable, plain: Callable, peers: dict[str, Callable[[], Callable]]) -> dict[str, Callable | str]:
    """Name -> what to call, or the reason why there is nothing to call."""
    torch.compiler.reset()  # one compilation a shape; past eight torch.compile would fall back to eager in silence
    out = {"ours": ours, "eager": plain, "compile": torch.compile(plain, dynamic=False)}
    for name, load in peers.items():
        try:
            out[name] = load()
        except ImportError as error:
            out[name] = reason(error)
    return out


# ------------------------------------------------------------------------------------------------ measuring on CUDA


class Inputs(NamedTuple):
    arguments: tuple  # of a provider
    leaves: tuple  # those of them that get gradients
    grad: Tensor | None  # incoming


def detached(inputs: Inputs) -> Inputs:
    return Inputs(tuple(x.detach() for x in inputs.arguments), (), None)


def forward(call: Callable, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return call(*inputs.arguments)


def forward_and_backward(call: Callable, inputs: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(call(*inputs.arguments), inputs.leaves, inputs.grad))


DIRECTIONS = {"forward": forward, "both": forward_and_backward}


@functools.cache
def l2_flush() -> Tensor:
    return torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)


def event_ms(call: Callable[[], object], *, cold: bool = False) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cold:
        l2_flush().zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


cold_ms = functools.partial(event_ms, cold=True)


def wall_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def race(run: Callable, calls: dict[str, Callable], sets: list[Inputs], clock: Callable) -> dict[str, float]:
    """Median milliseconds of each provider, all taking turns."""
    once = {name: clock(functools.partial(run, call, sets[0])) for name, call in calls.items()}
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(1000 * RACE_SECONDS / max(sum(once.values()), 1e-3))))
    times = {name: [] for name in calls}
    for i in range(rounds):
        for name, call in calls.items():
            times[name].append(clock(functools.partial(run, call, sets[i % SETS])))
    return {name: statistics.median(x) for name, x in times.items()}


def peak_mib(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def on_device(call: Callable[[], object], repeats: int = 20) -> tuple[float, float]:
    """Kernels and copies that one call launches, and the microseconds that the device works on them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    work = [e for e in profile.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    return len(work) / repeats, sum(e.time_range.elapsed_us() for e in work) / repeats


class Truth(NamedTuple):
    """In float64: what comes out, and each gradient at some of its rows."""

    out: Tensor
    gradients: tuple[Tensor, ...] = ()
    rows: tuple[Tensor | slice, ...] = ()


def errors(direction: str, result, truth: Truth, names: tuple[str, ...]) -> dict[str, float | None]:
    """By column; those of the other direction are None."""
    columns = dict.fromkeys(("error", *(f"d{name} error" for name in names)))
    if direction == "forward":
        columns["error"] = float((result.double() - truth.out[..., : result.shape[-1]]).abs().max())
        return columns
    for name, got, expected, rows in zip(names, result, truth.gradients, truth.rows, strict=True):
        columns[f"d{name} error"] = float((got[rows].double() - expected).norm() / expected.norm())
    return columns


def examine(direction: str, call: Callable, make: Callable[[int], Inputs], truth: Truth, names: tuple) -> dict:
    """Errors, memory and whether two runs agree in every bit; inputs are made anew, for a run may overwrite them."""
    results = []
    for _ in range(2):  # the first compiles and tunes
        inputs = make(0)
        peak = peak_mib(lambda inputs=inputs: results.append(DIRECTIONS[direction](call, inputs)))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return {"MiB": peak, **errors(direction, results[1], truth, names), "same bits": same}


def compare(operation: str, case: str, calls: dict[str, Callable | str], make: Callable[[int], Inputs], truth: Truth, *,
            predicted: dict[str, float], names: tuple[str, ...] = (), whole_logits: int = 0,
            small: bool = False) -> Iterator[dict]:
    """A row a direction and provider. `predicted` has the directions to run and the milliseconds expected of ours.

    `whole_logits` counts the logits that plain torch keeps. `small` operations are all launches: their rows have the
    launches, the device's own time and the whole call's, host included, in microseconds.
    """
    torch.cuda.empty_cache()
    absent = {name: call for name, call in calls.items() if isinstance(call, str)}
    calls = {name: call for name, call in calls.items() if name not in absent}
    needed, free = whole_logits * WHOLE_LOGITS_BYTES, torch.cuda.mem_get_info()[0]
    if needed > free:
        for name in ("eager", "compile"):
            absent[name] = f"whole logits need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
            del calls[name]
    for direction, ms in predicted.items():
        run, facts, notes = DIRECTIONS[direction], {}, dict(absent)

        def fresh(i: int, leaves: bool = direction == "both") -> Inputs:
            return make(i) if leaves else detached(make(i))

        for name, call in calls.items():
            try:
                facts[name] = examine(direction, call, fresh, truth, names)
            except PEER_ERRORS as error:
                if name == "ours":
                    raise
                notes[name] = reason(error)
        sets = [fresh(i) for i in range(SETS)]
        warm, cold = (race(run, {name: calls[name] for name in facts}, sets, clock)
                      for clock in (wall_ms if small else event_ms, cold_ms))
        nothing = dict.fromkeys(("MiB", "error", *(f"d{name} error" for name in names), "same bits"))
        for name in (*facts, *notes):
            ran, expected = name in facts, ms if name == "ours" else None
            row = {"operation": operation, "case": case, "direction": direction, "provider": name}
            if small:
                count, device = on_device(functools.partial(run, calls[name], sets[0])) if ran else (None, None)
                row |= {"launches": count, "device us": device, "predicted us": expected and 1000 * expected,
                        "cold us": 1000 * cold[name] if ran else None, "call us": 1000 * warm[name] if ran else None}
            else:
                row |= {"ms": warm.get(name), "cold ms": cold.get(name), "predicted ms": expected}
            row["ours / it"] = warm["ours"] / warm[name] if ran and "ours" in warm else None
            yield {**row, **facts.get(name, nothing), "note": notes.get(name)}


# ------------------------------------------------------------------------------------------------ the operations


def seeded(i: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(i)


def linear_inputs(T: int, V: int, D: int, i: int, *, live: float = 1.0) -> Inputs:
    """bf16. The last 1 - `live` of every 1,024 incoming gradients are exactly zero, as those of whole responses are."""
    draw = functools.partial(torch.randn, generator=seeded(i), device=DEVICE)
    hidden, weight = draw(T, D).bfloat16().requires_grad_(), (draw(V, D) / D**0.5).bfloat16().requires_grad_()
    targets = torch.randint(V, (T,), generator=seeded(i), device=DEVICE)
    grad = torch.where(torch.arange(T, device=DEVICE) % 1024 < 1024 * live, draw(T), 0.0)
    return Inputs((hidden, weight, targets), (hidden, weight), grad)


def dlogits(logits: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In float64: log-probs of the targets and entropies stacked (2, n), and the gradient of the former."""
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    out = torch.stack((log_p.gather(1, targets[:, None]).squeeze(1), -(p * log_p).sum(1)))
    del log_p
    gradient = p.mul_(-grad.double()[:, None])
    return out, gradient.scatter_add_(1, targets[:, None], grad.double()[:, None])


@torch.no_grad()
def linear_truth(inputs: Inputs, *, entropy: bool = False) -> Truth:
    """Half of the sampled rows of the weight are targets: the others' gradients are tiny."""
    hidden, weight, targets = inputs.arguments
    rows = torch.randperm(len(hidden), generator=seeded(0), device=DEVICE)[:SAMPLE]
    others = torch.randperm(len(weight), generator=seeded(1), device=DEVICE)[: SAMPLE // 2]
    words = torch.cat((targets[rows[: SAMPLE // 2]], others)).unique()
    head = weight.double()
    outs, dweight = [], torch.zeros(len(words), weight.shape[1], device=DEVICE, dtype=torch.float64)
    for chunk in torch.arange(len(hidden), device=DEVICE).split(1024):
        h = hidden[chunk].double()
        out, gradient = dlogits(h @ head.T, targets[chunk], inputs.grad[chunk])
        outs.append(out)
        dweight += gradient[:, words].T @ h
    dhidden = dlogits(hidden[rows].double() @ head.T, targets[rows], inputs.grad[rows])[1] @ head
    out = torch.cat(outs, dim=1)
    return Truth(out if entropy else out[0], (dhidden, dweight), (rows, words))


def our_linear(hidden, weight, targets):
    return linear_logprob(hidden, weight, targets)


def our_linear_and_entropy(hidden, weight, targets):
    return torch.stack(linear_logprob(hidden, weight, targets, entropy=True))


def linear_case(T: int, V: int, D: int, what: str = "", *, live: float = 1.0,
                entropy: bool = False) -> Iterator[dict]:
    make = functools.partial(linear_inputs, T, V, D, live=live)
    flops = 2 * T * V * D
    predicted = {"forward": 1000 * flops / FORWARD_FLOPS, "both": 1000 * (1 + 3 * live) * flops / BOTH_FLOPS}
    if entropy:  # as the trainer asks for it: without gradients
        calls, predicted = (our_linear_and_entropy, plain_linear_and_entropy, {}), {
            "forward": predicted["forward"]}
    else:
        calls = our_linear, plain_linear, LINEAR_PEERS
        if live < 1:  # forward is that of the plain case
            del predicted["forward"]
    return compare("linear_logprob", f"T {T}, V {V}, D {D}{what}", providers(*calls), make,
                   linear_truth(make(0), entropy=entropy), predicted=predicted, names=("hidden", "weight"),
                   whole_logits=T * V)


def device_ms(launches: int, moved: int) -> float:
    return launches * LAUNCH_US / 1000 + 1000 * moved / BYTES_PER_SECOND


def advantage_inputs(groups: int, rollouts: int, i: int) -> Inputs:
    """Groups of 2 to 12 rollouts with rewards -1 and 1."""
    rng = np.random.default_rng(i)
    size = np.full(groups, 2)
    while (left := rollouts - size.sum()) > 0:
        lucky = rng.permutation(np.flatnonzero(size < 12))[:left]
        size[lucky] += rng.integers(0, 2, len(lucky))
    arrays = rng.choice([-1.0, 1.0], rollouts), np.concatenate(([0], size.cumsum())), rng.random(groups)
    return Inputs(tuple(torch.from_numpy(x).to(DEVICE) for x in arrays), (), None)


def advantage_case(groups: int, rollouts: int) -> Iterator[dict]:
    make = functools.partial(advantage_inputs, groups, rollouts)
    reference = importlib.import_module("kernels.group_advantage")._reference

    def ours(rewards, offsets, weights):
        return group_advantage(rewards, offsets, weights, clip=5.0)[0]

    def plain(rewards, offsets, weights):
        return reference(rewards, offsets, weights, 1e-6, 5.0)[0]

    return compare("group_advantage", f"{rollouts} rollouts, {groups} groups", providers(ours, plain, {}), make,
                   Truth(plain(*make(0).arguments)), small=True,
                   predicted={"forward": device_ms(1, 16 * (rollouts + groups))})


def cuda_cases() -> Iterator[Callable[[], Iterator[dict]]]:
    """What matters most comes first."""
    for T, D in ((16_384, 2048), (4096, 2048), (16_384, 4096)):
        yield functools.partial(linear_case, T, VOCABULARY, D)
    yield functools.partial(linear_case, 16_384, VOCABULARY, 2048, ", half of the gradients 0", live=0.5)
    yield functools.partial(linear_case, 16_384, VOCABULARY, 2048, ", with entropy", entropy=True)
    yield functools.partial(linear_case, 4095, 151_937, 2056)
    for groups, rollouts in ((256, 1024), (4096, 16_384)):
        yield functools.partial(advantage_case, groups, rollouts)
    for T, D in ((4096, 4096), (16_384, 2560), (4096, 2560)):
        yield functools.partial(linear_case, T, VOCABULARY, D)


def cuda_rows() -> list[dict]:
    start, rows = time.perf_counter(), []
    for case in cuda_cases():
        if time.perf_counter() - start > LAST_START_SECONDS:
            print(f"not run, for lack of time: {case.func.__name__} {case.args}", flush=True)
            continue
        for row in case():  # shown as they come: a run cut short leaves something
            print(f"{time.perf_counter() - start:4.0f} s", row, flush=True)
            rows.append(row)
    return sorted(rows, key=lambda row: row["operation"] != "linear_logprob")  # stable: one table an operation


# ------------------------------------------------------------------------------------------------ without CUDA


def in_fresh_process(function: Callable, *arguments):
    """function(*arguments) in a new interpreter: nothing is warm, and no memory lies about."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def resident_mib(what: str) -> float:
    """VmRSS, memory that this process holds, or VmHWM, the most since `forget_peak`. Linux."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak() -> float:
    """Begins a new peak and returns what is held now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib("VmRSS")


CPU_CALLS = {"ours": linear_logprob, "whole logits": plain_linear}
CPU_SHAPES = [(512, VOCABULARY, 256), (2048, 32_000, 256)]


def cpu_inputs(T: int, V: int, D: int) -> Inputs:
    """float32, logits of N(0, 1)."""
    g = torch.Generator().manual_seed(0)
    leaves = tuple((torch.randn(rows, D, generator=g) / D**0.25).requires_grad_() for rows in (T, V))
    return Inputs((*leaves, torch.randint(V, (T,), generator=g)), leaves, torch.randn(T, generator=g))


def cpu_peaks(provider: str, T: int, V: int, D: int) -> dict[str, float]:
    """By direction: the most MiB beyond what the process held before. For a process of its own."""
    call, inputs, peaks = CPU_CALLS[provider], cpu_inputs(T, V, D), {}
    for direction, run in DIRECTIONS.items():
        held = forget_peak()
        run(call, inputs)
        peaks[direction] = resident_mib("VmHWM") - held
    return peaks


def cpu_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_rows(rounds: int = 3) -> list[dict]:
    """Memory of each provider in a process of its own, then seconds of both here, taking turns."""
    rows = []
    for T, V, D in CPU_SHAPES:
        MiB = [in_fresh_process(cpu_peaks, name, T, V, D) for name in CPU_CALLS]
        inputs = cpu_inputs(T, V, D)
        for direction, run in DIRECTIONS.items():
            times = [[cpu_seconds(functools.partial(run, call, inputs)) for call in CPU_CALLS.values()]
                     for _ in range(rounds)]
            ours, whole = map(statistics.median, zip(*times, strict=True))
            a, b = (peaks[direction] for peaks in MiB)
            rows.append({"operation": "linear_logprob", "case": f"T {T}, V {V}, D {D}, float32",
                         "direction": direction, "ours s": ours, "whole logits s": whole, "ratio of s": ours / whole,
                         "ours MiB": a, "whole logits MiB": b, "ratio of MiB": a / b})
    return rows


def bench_kernels() -> list[dict]:
    """Every operation beside plain torch and other projects' kernels on CUDA, the references beside plain on a CPU."""
    if torch.cuda.is_available():
        return cuda_rows()
    print("There is no GPU: what follows are the torch references on the CPU, not the kernels.")
    return cpu_rows()


# ------------------------------------------------------------------------------------------------ the compiler's view

OPERATIONS = ("linear_logprob", "group_advantage")


class SM90:
    """All that Triton asks of a driver before it compiles. There is no device behind it."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


class Compiled:
    """In a kernel's place: a launch compiles it for exactly the arguments of the launch, notes it, and runs nothing."""

    def __init__(self, kernel, found: list):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        return lambda *args, **options: self.found.append(self.kernel.warmup(*args, grid=grid, **options))


def launches() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(operation, which form, a call that launches its kernels) with the divisibilities of training shapes.

    The calls go in below the check that the tensors are on a GPU: small ones on the CPU stand for large ones there.
    """
    linear, advantage = (importlib.import_module(f"kernels.{name}") for name in OPERATIONS)
    T, V, D = 128, 4096, 256
    row, targets = torch.ones(T), torch.zeros(T, dtype=torch.long)
    offsets = torch.tensor([0, 64, T])
    for dtype in (torch.bfloat16, torch.float32):
        x = [torch.zeros(rows, D, dtype=dtype) for rows in (T, V)]
        what = str(dtype).removeprefix("torch.")
        for entropy in (False, True):
            yield "linear_logprob", what + ", entropy" * entropy, functools.partial(
                linear._forward, *x, targets, 1.0, entropy, True)
        yield "linear_logprob", what, functools.partial(
            linear._backward, row, *x, targets, row, 1.0, True, True)
    yield "group_advantage", "float64, weights, clip", functools.partial(
        advantage._launch, row.double(), offsets, row[:2].double(), 1e-6, 5.0)


def disassembled(cubin: bytes) -> dict[str, int]:
    """What the machine code needs and contains, from the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (subprocess.run([tools / tool, *options, file.name], capture_output=True, text=True,
                                      check=True).stdout
                       for tool, options in (("cuobjdump", ["-res-usage"]), ("nvdisasm", [])))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    count = {what: len(re.findall(rf"\b{code}\b", sass)) for what, code in
             (("spill stores", "STL"), ("spill loads", "LDL"), ("wgmma", "HGMMA"), ("TMA loads", "UTMALDG"))}
    return {"registers": int(registers), "stack bytes": int(stack), **count}


def compile_for_sm90(operations: tuple[str, ...]) -> list[dict]:
    """Changes Triton's driver and the kernels' modules for good: in a process of its own, please."""
    triton.runtime.driver.set_active(SM90())
    found: list = []
    for name in operations:
        module = importlib.import_module(f"kernels.{name}")
        for key, kernel in list(vars(module).items()):
            if key.endswith("_kernel") and isinstance(kernel, triton.JITFunction):
                setattr(module, key, Compiled(kernel, found))
    rows = []
    for operation, what, launch in launches():
        if operation in operations:
            found.clear()
            launch()
            for kernel in {k.metadata.name: k for k in found}.values():  # slices launch the same ones again
                rows.append({"operation": operation, "kernel": kernel.metadata.name, "form": what,
                             "warps": kernel.metadata.num_warps, "stages": kernel.metadata.num_stages,
                             **disassembled(kernel.asm["cubin"]),
                             "shared KiB": math.ceil(kernel.metadata.shared / 102.4) / 10})
    return rows


def bench_sm90() -> list[dict]:
    """Every Triton kernel compiled for sm_90 as a launch on CUDA would: what the machine code needs and contains."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("bench sm90: TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it")
    if triton is None:
        sys.exit("bench sm90: Triton is not installed: pip install triton")
    return in_fresh_process(compile_for_sm90, OPERATIONS)
