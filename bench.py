"""Timings side by side, in one run: `python bench.py [adversary] [engine] [step] [--out FILE.json]` (default: all).

adversary  bins and adversaries, one step at the paper's size: 256 prompts of 14,116, 10 bins, 11 arms, 1,024 rollouts
engine     TorchEngine against transformers' generate on the arithmetic base model, 256 rollouts
step       a whole training step of the arithmetic preset, by phase, in every mode
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import arithmetic
from gdro import BUDGETS, UTILITIES, DifficultyBins, PromptGDRO, RolloutGDRO
from rollout import Sampling, TorchEngine, rollout_seed
from train import Ranks, Trainer, environment, parse_args


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median wall-clock milliseconds of a call, after one to warm up."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


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

    folder, tokenizer = arithmetic.base_model(), arithmetic.tokenizer()
    problems = arithmetic.problems("train", 64)
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


def markdown(title: str, rows: list[dict]) -> str:
    def cell(x) -> str:
        return x if isinstance(x, str) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.4g}"

    columns = list(rows[0])
    table = [columns, ["---"] * len(columns), *([cell(x) for x in row.values()] for row in rows)]
    return f"\n### {title}\n" + "\n".join(f"| {' | '.join(line)} |" for line in table)


BENCHES = {"adversary": bench_adversary, "engine": bench_engine, "step": bench_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("what", nargs="*", choices=[*BENCHES, []], help="which to run; all without any")
    parser.add_argument("--out", type=Path, help="write the figures, with versions and hardware, to this .json file")
    args = parser.parse_args()
    results = {name: BENCHES[name]() for name in args.what or BENCHES}
    for name, rows in results.items():
        print(markdown(name, rows))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": environment(), **results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
