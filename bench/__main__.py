"""Measurements side by side, in one run: `python -m bench NAME ... [--out FILE.json]`.

adversary  bins and both adversaries, one step at the paper's size: 256 prompts of 14,116, 10 bins, 1,024 rollouts
step       a whole training step of the arithmetic preset, by phase, in every mode
kernels    CUDA, minutes: every kernel beside plain torch, torch.compile and the installed ones of other projects.
           CPU, one minute: the torch reference beside whole logits, seconds and memory
update     CUDA, four minutes: log-probs and update of Qwen3-1.7B and 4B with random weights, 16 rollouts of 4,096
           tokens: seconds, MFU and memory beside what `train.py --plan` says
way        CPU, minutes: a fifth of the training of each row of the study's "What the way costs", from its first base
trl        CPU, --trl PYTHON, three minutes: a step of the arithmetic preset beside TRL's GRPOTrainer
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import plan
import tasks
from bench.kernels import bench_kernels, in_fresh_process, milliseconds
from config import Config, parse_args
from data import batch_order
from gdro import BUDGETS, DifficultyBins, PromptGDRO, RolloutGDRO
from metrics import markdown
from model import ModelConfig, Transformer
from ranks import Ranks, fill, shard
from rollout import Batch
from runfolder import environment
from study.rows import BOTH_TASKS, LENGTH, PARTS, WAY, Trial
from train import GRAD_CLIP, WEIGHT_DECAY, Step, Trainer

PEAK_FLOPS = plan.CARDS["H100"].flops  # bf16 operations a second of an H100 or H200, for MFU


def bench_adversary() -> list[dict]:
    """Everything that a step asks of bins and adversaries, on random outcomes: the median of 200 steps."""
    rows, P, ids = [], 256, np.array([f"problem-{i}" for i in range(14_116)])
    for budget in BUDGETS:
        rng, bins, times = np.random.default_rng(0), DifficultyBins(np.arange(1, 10) / 10), []
        prompt, rollout = PromptGDRO(bins.num_bins), RolloutGDRO(bins.num_bins, utility="gain", budget=budget)
        for _ in range(200):
            batch, loss_P, chance_P = rng.choice(ids, P, replace=False).tolist(), rng.normal(size=P), rng.random(P)
            start = time.perf_counter()
            bin_P = bins.lookup(batch)
            n_P = rollout.allocate(bin_P)
            correct_P = rng.binomial(n_P, chance_P)
            prompt.weights(bin_P)
            prompt.update(bin_P, loss_P)
            rollout.update(bin_P, n_P, loss_P, correct_P)
            bins.update(batch, correct_P, n_P)
            times.append(time.perf_counter() - start)
        rows.append({"budget": budget, "ms": 1000 * statistics.median(times)})
    return rows


def our_steps(flags: list[str], steps: int) -> list[dict]:
    """Lines of the log of the first steps of a run with these flags, with all that a step took in `seconds`: as wall
    time in `total`, of the process alone in `CPU`."""
    cfg = parse_args([*flags, "--engine", "torch"])[0]
    torch.set_num_threads(cfg.threads)
    trainer, lines = Trainer(cfg, Ranks()), []
    with trainer.grader:
        for i in range(steps):
            start, cpu = time.perf_counter(), time.process_time()
            line, _ = trainer.step(i)
            line["seconds"] |= {"total": time.perf_counter() - start, "CPU": time.process_time() - cpu}
            lines.append(line)
    return lines


def bench_step(steps: int = 6) -> list[dict]:
    """Median seconds by phase over `steps` steps, after one to warm up."""
    rows = []
    for mode in ("grpo", "prompt", "rollout", "both"):
        lines = our_steps(["--preset", "arithmetic", "--mode", mode], 1 + steps)[1:]
        rows.append({"what": mode, **{phase: statistics.median(x["seconds"][phase] for x in lines)
                                      for phase in lines[0]["seconds"]},
                     "tokens_generated": statistics.median(x["tokens_generated"] for x in lines)})
    return rows


def bench_way() -> list[dict]:
    """Seconds by phase of the first fifth of a training, evaluations left out."""
    rows = []
    for row, task in itertools.product(PARTS[WAY], BOTH_TASKS):
        lines = our_steps(Trial(task, row, row.rates[task][0], row.bases[0]).flags(), LENGTH[task] // 5)
        rows.append({"what": f"{task}/{row.name}", **{phase: sum(line["seconds"][phase] for line in lines)
                                                      for phase in lines[0]["seconds"]},
                     "tokens_generated": sum(line["tokens_generated"] for line in lines)})
    return rows


# ------------------------------------------------------------------------------------------------ on a GPU


class RandomTrainer(Trainer):
    """What `behaviour` and `update` need of a Trainer: random weights, sharded as in a run; it draws nothing."""

    def __init__(self, cfg: Config, ranks: Ranks, config: ModelConfig):
        self.cfg, self.ranks, self.device, self.reference, self.optimizer_steps = cfg, ranks, ranks.device, None, 0
        with torch.device("meta"):
            self.model = Transformer(config)
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


def update_rows(cfg: Config, config: ModelConfig, shares: tuple[float, ...], rollouts: int = 16, prompt: int = 150,
                response: int = 3946, repeats: int = 2) -> list[dict]:
    """Both phases, updates at every share of layers recomputed, first without torch.compile: the mean of `repeats`
    after a first one. MFU: of the operations that the model needs, recomputed ones left out. GiB: torch's peak."""
    ranks, rows = Ranks(), []
    trainer, batch = RandomTrainer(cfg, ranks, config), random_batch(config.vocab_size, rollouts, prompt, response)
    s = Step(number=0, seconds={}, batch=batch, n_P=np.full(rollouts // 4, 4), weight_P=np.ones(rollouts // 4),
             advantage_R=np.tile([1.0, -1.0, 0.5, -0.5], rollouts // 4), acts_R=np.ones(rollouts, bool))
    calls = {"log-probs": partial(trainer.behaviour, s), "training": partial(trainer.update, s)}
    tokens = int(batch.cost().sum())
    work = [("log-probs", 0.0), *(("training", share) for share in shares)]
    for compiled, (phase, share) in itertools.product((False, True), work):
        if compiled and phase == "log-probs":
            trainer.model.compile_blocks()
        trainer.model.gradient_checkpointing = share
        first = milliseconds(calls[phase]) / 1000
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = statistics.mean(milliseconds(calls[phase]) for _ in range(repeats)) / 1000
        passes, planned = (3, plan.TRAIN_SHARE) if phase == "training" else (1, plan.LOGPROB_SHARE)
        flops = tokens * plan.token_flops(config, prompt + response)
        peaks = plan.phases(config, dataclasses.replace(cfg, gradient_checkpointing=share), 1, 1, 0)
        rows.append({"model": cfg.model, "phase": "update" if phase == "training" else phase, "compiled": compiled,
                     "recomputed": share, "tokens": tokens, "first s": first, "s": took,
                     "planned s": (passes + share) * flops / (planned * PEAK_FLOPS),
                     "MFU %": 100 * passes * flops / (took * PEAK_FLOPS),
                     "GiB": torch.cuda.max_memory_allocated() / plan.GIB,
                     "planned GiB": (peaks[phase] - plan.VLLM_ASLEEP) / plan.GIB})
    ranks.leave()
    return rows


def bench_update() -> list[dict]:
    """On one H200, with the least share of layers recomputed with which it holds the model, and with all."""
    if not torch.cuda.is_available():
        sys.exit("bench update: needs a GPU")
    rows = []
    for size, least in (("1.7b", 0.0), ("4b", 0.25)):
        cfg = parse_args(["--preset", f"qwen3-{size}", "--kl_beta", "0", "--max_mismatch", "1e9",
                          "--prompts_per_step", "4", "--minibatch_prompts", "4"])[0]
        rows += in_fresh_process(update_rows, cfg, plan.known_model(cfg.model), (least, 1.0))
    return rows


# ------------------------------------------------------------------------------------------------ beside TRL


def trl_steps(python: str, steps: int, compiled: bool) -> list[dict]:
    """`our_steps` from TRL's GRPOTrainer, on the same problems in the same batches, with one thread like ours. Exits
    with what it said when it fails."""
    cfg, problems = parse_args(["--preset", "arithmetic"])[0], tasks.problems("arithmetic", "train", 640)
    order = [problems[i] for s in range(steps) for i in batch_order(len(problems), cfg.prompts_per_step, cfg.seed, s)]
    setting = {**dataclasses.asdict(cfg), "model": str(tasks.base_model("arithmetic")), "steps": steps,
               "prompts": [p.prompt for p in order], "answers": [p.answer for p in order], "compiled": compiled,
               "weight_decay": WEIGHT_DECAY, "grad_clip": GRAD_CLIP}
    done = subprocess.run([python, "-I", str(Path(__file__).with_name("trl.py"))], input=json.dumps(setting),
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"bench trl: {python} trl.py failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # libraries print as they are imported


def bench_trl(python: str, steps: int = 10, warm: int = 10) -> list[dict]:
    """Medians over `steps` steps after `warm`, by default one pass over the problems, before which bins know nothing.
    CPU seconds say more than the total where others want the cores too."""
    count, rows = warm + steps, []
    runs = {**{f"ours, {mode}": our_steps(["--preset", "arithmetic", "--mode", mode], count)
               for mode in ("grpo", "both")},
            "TRL": trl_steps(python, count, False), "TRL, compiled": trl_steps(python, count, True)}
    for name, lines in runs.items():
        late = lines[warm:]
        rows.append({"what": name, "version": lines[0].get("trl"),
                     "total s": statistics.median(x["seconds"]["total"] for x in late),
                     "CPU s": statistics.median(x["seconds"]["CPU"] for x in late),
                     "tokens": statistics.mean(x["tokens_generated"] for x in late),
                     "mean reward": statistics.mean(x["reward_mean"] for x in late)})
    return rows


def markdown_table(title: str, rows: list[dict]) -> str:
    def cell(x) -> str:
        if x is None or isinstance(x, str | bool):
            return "" if x is None else str(x)
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"

    return f"\n### {title}\n\n" + markdown(tuple(rows[0]), [[cell(x) for x in row.values()] for row in rows])


BENCHES = {"adversary": bench_adversary, "step": bench_step, "kernels": bench_kernels, "update": bench_update,
           "way": bench_way, "trl": bench_trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("names", nargs="+", choices=BENCHES, metavar="NAME", help="which to run; see above")
    parser.add_argument("--out", type=Path, help="write the figures, with versions and hardware, to this .json file")
    parser.add_argument("--trl", metavar="PYTHON", help="interpreter of an environment that has TRL, for `trl`")
    args = parser.parse_args()
    if "trl" in args.names and not args.trl:
        parser.error("trl needs --trl PYTHON of another environment: pip install trl==1.16.0 torch==2.13.0 there")
    benches = {**BENCHES, "trl": partial(bench_trl, args.trl)}
    results = {name: benches[name]() for name in args.names}
    print(*map(markdown_table, results, results.values()), sep="\n")
    if args.out:
        args.out.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
