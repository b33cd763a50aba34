"""Measurements side by side, in one run: `python -m bench [NAME ...] [--out FILE.json]`.

Without names the first three, which take about a minute on two CPU cores:
adversary  bins and adversaries, one step at the paper's size: 256 prompts of 14,116, 10 bins, 11 arms, 1,024 rollouts
engine     TorchEngine against transformers' generate on the arithmetic base model, 256 rollouts
step       a whole training step of the arithmetic preset, by phase, in every mode

By name only:
threads    CPU: a step with one thread, one a core, and one a core that sleeps while it waits, alone and beside others
grader     verdicts a second with two workers beside math-verify alone, and the longest delay by 2,000 hostile strings
kernels    CUDA, under 8 minutes: every kernel against plain torch, torch.compile and the installed ones of other
           projects. CPU, under 3 minutes: the torch references against whole logits, seconds and memory
memory     Linux, CPU: peak memory of a training step with 151,936 words, with and without whole logits; needs 16 GB
update     CUDA, about four minutes: log-probs and update of Qwen3-1.7B and 4B with random weights, 16 rollouts of 4,096
           tokens: seconds, MFU and memory beside what `train.py --plan` says
sm90       needs Triton but no GPU: what the compiler makes of every kernel for sm_90 (H100, H200)
trl        CPU, --trl PYTHON, about three minutes: a step of the arithmetic preset beside TRL's GRPOTrainer
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

import model
import plan
import tasks
import train
from bench.kernels import VOCABULARY, bench_kernels, bench_sm90, forget_peak, in_fresh_process, resident_mib
from config import Config, parse_args
from data import batch_order
from gdro import BUDGETS, UTILITIES, DifficultyBins, PromptGDRO, RolloutGDRO
from metrics import markdown
from ranks import Ranks, fill, shard
from reward import Grader, Problem
from rollout import Batch, Sampling, TorchEngine, rollout_seed
from runfolder import environment
from train import Clock, Trainer

PEAK_FLOPS = plan.CARDS["80 GB"].flops  # bf16 operations a second of an H100 or H200, for MFU


def bench_adversary() -> list[dict]:
    """All calls of a step on random outcomes, bins included: lookup and update, weights, allocate."""
    rows = []
    P, ids = 256, [f"problem-{i}" for i in range(14_116)]
    configurations = [("prompt", "", "")] + [("rollout", u, b) for b in BUDGETS for u in UTILITIES]
    for kind, utility, budget in configurations:
        rng = np.random.default_rng(0)
        bins = DifficultyBins(np.arange(1, 10) / 10)
        for start in range(0, len(ids) - P, P):
            bins.update(ids[start : start + P], rng.integers(0, 5, P), np.full(P, 4))
        prompt = PromptGDRO(bins.num_bins)
        rollout = RolloutGDRO(bins.num_bins, utility=utility, budget=budget) if kind == "rollout" else None

        def step(bins=bins, prompt=prompt, rollout=rollout, rng=rng):
            batch = [ids[i] for i in rng.choice(len(ids), P, replace=False)]
            loss_P, solved = rng.normal(size=P), rng.random(P)
            start = time.perf_counter()
            bin_P = bins.lookup(batch)
            n_P = np.full(P, 4) if rollout is None else rollout.allocate(bin_P)
            spent = time.perf_counter() - start
            correct_P = rng.binomial(n_P, solved)
            start = time.perf_counter()
            if rollout is None:
                prompt.weights(bin_P)
                prompt.update(bin_P, loss_P)
            else:
                rollout.update(bin_P, n_P, loss_P, correct_P)
            bins.update(batch, correct_P, n_P)
            return spent + time.perf_counter() - start

        step()
        rows.append({"what": " ".join((kind, utility, budget)).strip(),
                     "ms": 1000 * statistics.median(step() for _ in range(200))})
    return rows


def bench_engine() -> list[dict]:
    """Tokens a second of 64 prompts x 4 rollouts, alternating the two so that both see the same machine.

    Two loads on the same weights: "sampled" stops at the end token as in training, where most answers are short and a
    few long; "full" always draws 64 tokens, so that nothing is gained by not waiting for the longest.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder, tokenizer = tasks.base_model("arithmetic"), tasks.tokenizer("arithmetic")
    problems = tasks.problems("arithmetic", "train", 64)
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = TorchEngine(folder, dtype=torch.float32, device=torch.device("cpu"), max_rollouts=256)
    padded = tokenizer([p.prompt for p in problems for _ in range(4)], padding=True, padding_side="left",
                       return_tensors="pt")
    rows = []
    for load, stop in (("sampled", (tokenizer.eos_token_id,)), ("full", ())):
        sampling = Sampling(64, stop_ids=stop)
        options = GenerationConfig(do_sample=True, max_new_tokens=64, top_k=0, top_p=1.0, temperature=1.0,
                                   pad_token_id=0, eos_token_id=list(stop) or None)
        rates = {"ours": [], "transformers": []}
        for repeat in range(6):
            start = time.perf_counter()
            out = ours.generate(prompts, [4] * 64, [rollout_seed(repeat, 0, p.id) for p in problems], sampling)
            rates["ours"].append(sum(len(r.tokens) for r in out) / (time.perf_counter() - start))
            torch.manual_seed(repeat)
            start = time.perf_counter()
            with torch.inference_mode():
                new = theirs.generate(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"],
                                      generation_config=options)[:, padded["input_ids"].shape[1] :]
            seconds = time.perf_counter() - start
            ends = (new == stop[0]).int() if stop else torch.zeros_like(new)
            length = torch.where(ends.any(1), ends.argmax(1) + 1, new.shape[1])
            rates["transformers"].append(int(length.sum()) / seconds)
        ours_rate, theirs_rate = (statistics.median(rates[k][1:]) for k in ("ours", "transformers"))
        rows.append({"what": f"{load}, 256 rollouts", "ours tokens/s": ours_rate, "transformers tokens/s": theirs_rate,
                     "ratio": ours_rate / theirs_rate})
    return rows


def bench_step(steps: int = 6) -> list[dict]:
    """Median seconds by phase over `steps` steps, after one to warm up."""
    rows = []
    for mode in ("grpo", "prompt", "rollout", "both"):
        with tempfile.TemporaryDirectory() as out:
            cfg, _, _ = parse_args(["--preset", "arithmetic", "--mode", mode, "--engine", "torch", "--out_dir", out])
            trainer = Trainer(cfg, Ranks())
            lines = [trainer.step(i)[0] for i in range(steps + 1)][1:]
        rows.append({"what": mode, **{phase: statistics.median(x["seconds"][phase] for x in lines)
                                      for phase in lines[0]["seconds"]},
                     "tokens_generated": statistics.median(x["tokens_generated"] for x in lines)})
    return rows


def bench_threads(steps: int = 6) -> list[dict]:
    """Median and worst seconds of a step of the arithmetic preset: one thread of PyTorch, one a core, and one a core
    that sleeps while it waits (libgomp's spin otherwise), alone and beside a process on every core but one, and all."""
    cores, rows = os.cpu_count(), []
    ways = {"1 thread": {"OMP_NUM_THREADS": "1"}, f"{cores} threads": {"OMP_NUM_THREADS": str(cores)},
            f"{cores} threads, passive": {"OMP_NUM_THREADS": str(cores), "OMP_WAIT_POLICY": "passive"}}
    for beside in sorted({0, cores - 1, cores}):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
        for what, changed in ways.items():
            with tempfile.TemporaryDirectory() as out:
                subprocess.run(
                    [sys.executable, str(Path(__file__).with_name("train.py")), "--preset", "arithmetic", "--engine",
                     "torch", "--threads", "0", "--steps", str(steps + 1), "--eval_problems", "8", "--eval_every", "0",
                     "--out_dir", f"{out}/run"], env={**os.environ, **changed}, check=True, capture_output=True)
                lines = Path(out, "run", "metrics.jsonl").read_text().splitlines()
            seconds = [json.loads(line)["seconds"]["total"] for line in lines][1:]
            rows.append({"what": what, "busy processes beside": beside, "median s a step": statistics.median(seconds),
                         "worst s": max(seconds)})
        for process in busy:
            process.kill()
            process.wait()
    return rows


def whole_logits(hidden, weight, targets, *, temperature=1.0, entropy=False):
    """linear_logprob as it is mostly written: logits of the whole batch, and autograd."""
    log_p = (hidden @ weight.T / temperature).log_softmax(dim=1)
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    return (logp, -(log_p.exp() * log_p).sum(dim=1)) if entropy else logp


def memory_of_a_step(folder: Path, whole: bool) -> dict:
    """One training step: by phase the peak in MiB and what of it came on top, and what the two forms must agree on.

    A random model solves nothing, all advantages would be 0 and no backward would run: coins are tossed for rewards.
    """
    if whole:
        model.linear_logprob = whole_logits
    cfg, _, _ = parse_args(["--preset", "arithmetic", "--model", str(folder), "--engine", "torch",
                            "--prompts_per_step", "16", "--minibatch_prompts", "16"])
    trainer, peaks = Trainer(cfg, Ranks()), {}

    def watched(name: str, method: Callable) -> Callable:
        def call(*args, **kwargs):
            held = forget_peak()
            out = method(*args, **kwargs)
            peaks[name] = resident_mib("VmHWM"), resident_mib("VmHWM") - held
            return out

        return call

    grade = trainer.grade

    def toss(part, problems):
        coins = np.random.default_rng(0).choice([-1.0, 1.0], len(part.rollouts))
        return [g._replace(reward=coin) for g, coin in zip(grade(part, problems), coins, strict=True)]

    trainer.grade = toss
    train.draw_part = watched("sample", train.draw_part)
    for name in ("behaviour", "update"):
        setattr(trainer, name, watched(name, getattr(trainer, name)))
    with trainer.grader:
        line, _ = trainer.step(0)
    return {"MiB": peaks, **{k: line[k] for k in ("tokens_generated", "loss", "grad_norm", "entropy")}}


def bench_memory() -> list[dict]:
    """One step of the arithmetic preset, 64 rollouts, on a tiny random Qwen3 with the vocabulary of a real one.

    `behaviour` takes log-probs and entropies without gradients, `update` is forward, backward and AdamW; `sample`
    has one row of logits a rollout in either form. `peak` is of the process, `on top` beyond what it held when the
    phase began. The loss is 0 in both: the policy is still the one that drew, and advantages have mean 0. Raises
    AssertionError where the two forms do not agree to 1e-4.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = model.ModelConfig(
            model_type="qwen3", vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=10_000.0, rms_norm_eps=1e-6,
            tie_word_embeddings=True, max_position_embeddings=256)
        tiny = model.Transformer(config)
        tiny.init_weights(torch.Generator().manual_seed(0))
        tiny.save_pretrained(folder)
        tasks.tokenizer("arithmetic").save_pretrained(folder)
        chunked, whole = (in_fresh_process(memory_of_a_step, Path(folder), form) for form in (False, True))
    rows, same = [], [name for name in chunked if name != "MiB"]
    for phase, ours in chunked["MiB"].items():
        row, theirs = {"phase": phase}, whole["MiB"][phase]
        for what, a, b in zip(("peak", "on top"), ours, theirs, strict=True):
            row |= {f"chunked MiB, {what}": a, f"whole logits MiB, {what}": b, f"ratio, {what}": a / b}
        rows.append(row)
    for name in same:
        assert abs(chunked[name] - whole[name]) < 1e-4 * max(1, abs(whole[name])), (name, chunked, whole)
    return rows + [{"the same step": name, "chunked": chunked[name], "whole logits": whole[name]} for name in same]


class RandomTrainer(Trainer):
    """What `behaviour` and `update` need of a Trainer: random weights, sharded as in a run; it draws nothing."""

    def __init__(self, cfg: Config, ranks: Ranks, config: model.ModelConfig):
        self.cfg, self.ranks, self.reference, self.optimizer_steps = cfg, ranks, None, 0
        self.device = ranks.device
        with torch.device("meta"):
            self.model = model.Transformer(config)
        shard(self.model, self.ranks, compute=torch.bfloat16)
        self.model.to_empty(device=self.device)
        for p in self.model.parameters():
            fill(p, torch.ones(p.shape) if p.ndim == 1 else torch.randn(p.shape, device=self.device) * 0.02)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.learning_rate, fused=True)


def random_batch(words: int, rollouts: int, prompt: int, response: int) -> Batch:
    """Four rollouts a prompt, all of the same length."""
    rng, n = np.random.default_rng(0), rollouts * response
    return Batch([rng.integers(0, words, prompt).tolist() for _ in range(rollouts // 4)],
                 np.arange(rollouts) // 4, np.arange(rollouts + 1) * response, rng.integers(0, words, n),
                 np.zeros(n, np.float32), np.zeros(rollouts, bool))


def update_rows(ranks: Ranks, name: str, cfg: Config, config: model.ModelConfig, shares: tuple[float, ...],
                rollouts: int = 16, prompt: int = 150, response: int = 3946, repeats: int = 2) -> Iterator[dict]:
    """Both phases, at every share of layers recomputed, first without torch.compile: the mean of `repeats` after a
    first one. MFU: of the operations that the model needs, recomputed ones left out. GiB: torch's peak."""
    trainer, batch = RandomTrainer(cfg, ranks, config), random_batch(config.vocab_size, rollouts, prompt, response)
    advantage_R = np.tile([1.0, -1.0, 0.5, -0.5], rollouts // 4)
    n_P, acts_R = np.full(len(batch.prompts), 4), advantage_R != 0
    old_N, _, _ = trainer.behaviour(batch, acts_R, 0)  # others would clip tokens, whose gradient costs nothing
    tokens, length, on_gpu = int(batch.cost().sum()), prompt + response, trainer.device.type == "cuda"
    phases = {"update": (3, plan.TRAIN_SHARE,
                         lambda: trainer.update(batch, n_P, advantage_R, acts_R, old_N, None, 0)),
              "log-probs": (1, plan.LOGPROB_SHARE, lambda: trainer.behaviour(batch, acts_R, 0))}
    for compiled in (False, True):
        if compiled:
            trainer.model.compile_blocks()
        for share, (phase, (passes, planned_share, call)) in itertools.product(shares, phases.items()):
            if phase == "log-probs" and share != shares[0]:
                continue  # nothing is recomputed in them
            trainer.model.gradient_checkpointing, seconds = share, []
            for _ in range(1 + repeats):
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                clock = Clock(trainer.device)
                with clock(phase):
                    call()
                seconds.append(clock.seconds[phase])
            rate, flops = tokens / statistics.mean(seconds[1:]), plan.token_flops(config, length)
            bytes_ = plan.phases(config, dataclasses.replace(cfg, gradient_checkpointing=share), 1, 1, 0)
            recomputed = share if phase == "update" else 0
            yield {"model": name, "phase": phase, "compiled": compiled, "recomputed": recomputed,
                   "tokens": tokens, "s": tokens / rate, "planned s": tokens * flops * (passes + recomputed) / (
                       planned_share * PEAK_FLOPS), "tokens/s": rate, "MFU %": 100 * rate * passes * flops / PEAK_FLOPS,
                   "GiB": torch.cuda.max_memory_allocated() / plan.GIB if on_gpu else None,
                   "planned GiB": sum(bytes_["training" if passes == 3 else phase].values()) / plan.GIB,
                   "first s": seconds[0]}


def bench_update() -> list[dict]:
    """On one GPU; a size without a share of layers with which it fits is left out and said to be."""
    if not torch.cuda.is_available():
        sys.exit("bench update: needs a GPU")
    rows, memory = [], torch.cuda.mem_get_info()
    for size in ("1.7b", "4b"):
        cfg, _, _ = parse_args(["--preset", f"qwen3-{size}", "--kl_beta", "0", "--max_mismatch", "1e9",
                                "--prompts_per_step", "4", "--minibatch_prompts", "4"])
        config = plan.known_model(cfg.model)
        fits = [share for share in (0.0, 0.25, 0.5, 0.75, 1.0) if "training" not in plan.over(
            config, dataclasses.replace(cfg, gradient_checkpointing=share), 1, 1, memory)]
        if not fits:
            print(f"{cfg.model}: its state and activations are too much for one GPU of {memory[1] / plan.GIB:.0f} GiB")
            continue
        shares = tuple(sorted({fits[0], 1.0}))
        rows += in_fresh_process(updates_shown, cfg.model, cfg, config, shares)
    return rows


def updates_shown(*arguments) -> list[dict]:
    """`update_rows` in a process of its own, each shown as it comes: a run cut short leaves something."""
    ranks, rows = Ranks(), []
    for row in update_rows(ranks, *arguments):
        print(row, flush=True)
        rows.append(row)
    ranks.leave()
    return rows


def tables(title: str, rows: list[dict]) -> str:
    """A table of each run of rows that have the same columns."""

    def cell(x) -> str:
        if isinstance(x, bool) or x is None:
            return {True: "yes", False: "no", None: ""}[x]
        return x if isinstance(x, str) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"

    text = f"\n### {title}\n"
    for columns, group in itertools.groupby(rows, key=tuple):
        text += "\n" + markdown(columns, [[cell(x) for x in row.values()] for row in group]) + "\n"
    return text


def answer_pairs(rng: np.random.Generator, count: int) -> dict[str, list[tuple[str, str]]]:
    """load -> (response, gold), about half of them right: numbers, what only math-verify can tell, and a step's mix."""
    numbers = [(rf"so it is \boxed{{{n + wrong}}}.", f"{n:,}") for n, wrong in
               zip(rng.integers(0, 10**5, count), rng.integers(0, 2, count), strict=True)]
    symbolic = []
    for i, wrong in zip(rng.permutation(count) + 2, rng.integers(0, 2, count), strict=True):
        symbolic.append([(rf"thus \boxed{{\sqrt{{{4 * i + wrong}}}}}", rf"2\sqrt{{{i}}}"),
                         (rf"\boxed{{(x+{i})(x-{i + wrong})}}", rf"x^2-{i * i}"),
                         (rf"\boxed{{\frac{{{i + wrong}\pi}}{{{7 * i}}}}}", r"\frac{\pi}{7}")][i % 3])
    pool = [pair for some, right in ((numbers, 0.7), (symbolic, 0.3)) for pair in some[: int(count // 8 * right)]]
    mix = [pool[i] for i in rng.integers(0, len(pool), count)]  # eight responses a problem say much the same
    return {"numbers": numbers, "for math-verify": symbolic, "training mix with repeats": mix}


def bench_grader(count: int = 900) -> list[dict]:
    """Each load once through a fresh Grader whose workers are up, then through math-verify's own parse and verify."""
    import math_verify

    rows = []
    for load, pairs in answer_pairs(np.random.default_rng(0), count).items():
        responses, golds = [r for r, _ in pairs], [Problem("", "", gold) for _, gold in pairs]
        with Grader(workers=2) as grader:
            grader.grade([r"\boxed{\sqrt{8}}", r"\boxed{\sqrt{7}}"], [Problem("", "", r"2\sqrt{2}")] * 2)
            start = time.perf_counter()
            ours = [g.right for g in grader.grade(responses, golds)]
            seconds = time.perf_counter() - start
        start = time.perf_counter()
        theirs = [math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(response))
                  for response, gold in pairs]
        alone = time.perf_counter() - start
        differ = sum(a != b for a, b in zip(ours, theirs, strict=True))
        rows.append({"what": load, "ours/s": count / seconds, "math-verify/s": count / alone, "ratio": alone / seconds,
                     "right": f"{sum(ours)} of {count}", "verdicts that differ": differ})
    return rows + [longest_delay()]


def longest_delay(count: int = 2000, timeout: float = 1.0) -> dict:
    """Hostile answers one by one: the longest that a call took, of those that started no worker and of all."""
    rng, delays, gave_up = np.random.default_rng(1), [], 0
    pieces = ["{", "}", "\\frac{", "\\sqrt{", "^{9", "9^{9^{9", "(", "[", ",", "\0", "\ud800", "\u202e", "per ", "="]
    hard = [r"9^{9^{9^9}}", r"\operatorname{zeros}(99999,99999)", r"\sum_{n=0}^{\infty} \frac{1}{n!}^n", "10^{10^9}!"]
    with Grader(workers=1, timeout=timeout) as grader:
        for i in range(count):
            text = "".join(pieces[j] for j in rng.integers(0, len(pieces), rng.integers(1, 60)))
            text = hard[i // 100 % len(hard)] if i % 100 == 0 else text * (2500 if i % 50 == 1 else 1)
            start, workers = time.perf_counter(), list(grader._workers)
            grade = grader.grade([rf"Answer: {text}"], [Problem("", "", r"\sqrt{2}+\pi")])[0]
            delays.append((time.perf_counter() - start, workers == grader._workers or grade.timed_out))
            gave_up += grade.timed_out
    steady = max(d for d, kept in delays if kept)
    return {"what": f"{count} hostile strings, deadline {timeout:g} s", "longest delay s": steady,
            "with a worker's start s": max(d for d, _ in delays), "timed out": gave_up}


TRL_NEEDED = ("trl needs --trl PYTHON, the interpreter of another environment that has TRL (and, as one of the rows is "
              "compiled, a C++ compiler): python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0, "
              "then --trl trl/bin/python")


def our_steps(mode: str, steps: int, every: bool = False) -> Iterator[dict]:
    """A step of the arithmetic preset for every `next`, its line with all that it took in `seconds`. `every`: trains on
    rollouts of advantage 0 too, as others do."""
    cfg, _, _ = parse_args(["--preset", "arithmetic", "--mode", mode, "--engine", "torch"])
    torch.set_num_threads(cfg.threads)
    trainer = Trainer(cfg, Ranks())
    if every:
        behaviour, update = trainer.behaviour, trainer.update
        trainer.behaviour = lambda batch, acts_R, step: behaviour(batch, acts_R | True, step)
        trainer.update = lambda batch, n_P, adv_R, acts_R, *rest: update(batch, n_P, adv_R, acts_R | True, *rest)
    with trainer.grader:
        for i in range(steps):
            start, cpu = time.perf_counter(), time.process_time()
            line, _ = trainer.step(i)
            took = {"total": time.perf_counter() - start, "CPU": time.process_time() - cpu}
            yield {**line, "seconds": {**line["seconds"], **took}}


def trl_steps(python: str, steps: int, compiled: bool) -> Iterator[dict]:
    """The same from TRL's GRPOTrainer, on the same problems in the same batches, after one dict of what is installed.

    The process waits between steps, with one thread like ours. Exits with what it said when it fails.
    """
    cfg, _, _ = parse_args(["--preset", "arithmetic"])
    problems = tasks.problems("arithmetic", "train", 640)
    order = [problems[i] for s in range(steps) for i in batch_order(len(problems), cfg.prompts_per_step, cfg.seed, s)]
    setting = {**dataclasses.asdict(cfg), "model": str(tasks.base_model("arithmetic")), "steps": steps,
               "prompts": [p.prompt for p in order], "answers": [p.answer for p in order], "compiled": compiled}
    pipe, script = subprocess.PIPE, Path(__file__).with_name("trl.py")
    with tempfile.TemporaryFile("w+") as said, subprocess.Popen(
            [python, "-I", str(script)], stdin=pipe, stdout=pipe, stderr=said, text=True,  # without our `kernels`
            env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        for go in ("", json.dumps(setting) + "\n\n", *["\n"] * (steps - 1)):
            process.stdin.write(go)
            process.stdin.flush()
            if not (line := process.stdout.readline()):
                said.seek(0)
                sys.exit(f"bench trl: {python} {script.name} failed:\n{said.read()[-2000:]}")
            yield json.loads(line)


def bench_trl(python: str, steps: int = 10, warm: int = 10) -> list[dict]:
    """Each side takes a step in turn, so that all see the same machine: medians over `steps` rounds after `warm`, by
    default one pass over the problems, before which bins know nothing; and of the ratio to mode grpo within a round.

    `CPU`: seconds of the process alone, which say more than `total` where others want the cores too. `other`: bins and
    adversaries, prompts, rewards, advantages, weights to the engine. TRL's `compiled` is its torch_compile, which acts
    in `update` alone.
    """
    total = steps + warm
    theirs = {"TRL": trl_steps(python, total, False), "TRL, compiled": trl_steps(python, total, True)}
    found, _ = map(next, theirs.values())
    sides = {"ours, grpo": our_steps("grpo", total), "ours, both": our_steps("both", total),
             "ours, grpo, every rollout": our_steps("grpo", total, every=True), **theirs}
    load = f"{os.getloadavg()[0]:.1f}"
    rounds = list(zip(*sides.values(), strict=True))[warm:]  # zip takes the turns
    phases, rows = ("generate", "logprob", "update"), []
    for i, name in enumerate(sides):
        lines = [line[i] for line in rounds]
        for seconds in (line["seconds"] for line in lines):
            seconds["other"] = seconds["total"] - sum(seconds[phase] for phase in phases)
        ratio = {what: statistics.median(line[i]["seconds"][what] / line[0]["seconds"][what] for line in rounds)
                 for what in ("total", "CPU")}
        rows.append({"what": name, **{f"{phase} s": statistics.median(line["seconds"][phase] for line in lines)
                                      for phase in (*phases, "other", "total", "CPU")},
                     **{f"ratio, {what}": x for what, x in ratio.items()},
                     "tokens": statistics.mean(line["tokens_generated"] for line in lines),
                     "mean reward": statistics.mean(line["reward_mean"] for line in lines)})
    return [*rows, {"TRL's environment": ", ".join(f"{name} {number}" for name, number in found.items()),
                    "cores": os.cpu_count(), "load before": load, "after": f"{os.getloadavg()[0]:.1f}"}]


BENCHES = {"adversary": bench_adversary, "engine": bench_engine, "step": bench_step, "threads": bench_threads,
           "grader": bench_grader, "kernels": bench_kernels, "memory": bench_memory, "sm90": bench_sm90,
           "trl": bench_trl, "update": bench_update}
WITHOUT_NAMES = ("adversary", "engine", "step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], metavar="NAME", help="which to run; see above")
    parser.add_argument("--out", type=Path, help="write the figures, with versions and hardware, to this .json file")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment that has TRL, for `trl`")
    args = parser.parse_args()
    if "trl" in args.names and not args.trl:
        parser.error(TRL_NEEDED)
    if args.out and args.out.suffix != ".json":
        parser.error(f"--out must end in .json, got {args.out}")
    benches = {**BENCHES, "trl": partial(bench_trl, args.trl)}
    results = {name: benches[name]() for name in args.names or WITHOUT_NAMES}
    print("".join(tables(name, rows) for name, rows in results.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
