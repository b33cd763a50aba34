"""GRPO with two adversaries, in one file: `python train.py --preset arithmetic --mode prompt`.

`Trainer.step` is the algorithm, and the methods below it stand in the order in which it calls them. GRPO, Prompt-GDRO,
Rollout-GDRO and both together are one path: in mode "grpo" every prompt's weight is 1 and every prompt's number of
rollouts is n_bar. Apart from the policy, its optimiser and the engine's copy, state changes in `learn`, at the end.

With torchrun every rank knows the whole batch and holds a shard of the model (ranks.py); work (prompts to sample,
rollouts to train on) is dealt out by tokens, and results meet as sums of arrays in which each rank filled its own
places. Suffixes name axes: P prompts of a batch, R rollouts, N response tokens, B bins.

Left out is what the method does not need; README says where LoRA, a schedule or sampling one step ahead would go.
"""

import dataclasses
import hashlib
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from config import Config, given_flags, parse_args, train_flags

if __name__ == "__main__":
    given_flags(train_flags())  # answers --help and wrong flags before the seconds that torch takes to import

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import plan
import tasks
from data import Problem, batch_order, check_overlap, encode_prompts, hold_out
from gdro import RULES, SIGNALS, DifficultyBins, PromptGDRO, RolloutGDRO, bin_shares, errors_by, means_by
from kernels import group_advantage
from metrics import Evaluation, table, ungraded
from model import Transformer
from policy import Policy
from ranks import Ranks, RunError, deal_rows, full, reshard, say, shard
from reward import Grader, check_golds, extract
from rollout import Batch, Sampling, choose_engine, draw_part, make_engine, rollout_seed
from runfolder import FolderLock, RunFolder, Tracker, jsonable, portable, write_json
from watchdog import progress, watching

ADVANTAGE_CLIP = 5.0  # advantages (3) are clipped to [-5, 5]
WEIGHT_DECAY = 0.01  # AdamW's, decoupled, on all weights
GRAD_CLIP = 1.0  # global gradient norm
MAX_LOG_RATIO = 20.0  # |log ratio| is clamped here, with zero gradient outside: exp(20) is already 5e8
MEASURE_EVERY = 2  # entropy and mismatch are measured on the first rollout of every second prompt of a batch
PREVIEW = -2  # in the place of a step's number; the evaluations' is -1
DIVERGED = ("the weights are those before this update. --resume goes on from the last checkpoint, with a lower "
            "--learning_rate for instance")

# ------------------------------------------------------------------------------------------------ the objective


def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor | None, advantage: Tensor, weight: Tensor,
              token_weight: Tensor, offsets: Tensor, *, eps_low: float, eps_high: float,
              beta: float) -> tuple[Tensor, Tensor, Tensor, int]:
    """GRPO's clipped surrogate with a KL penalty over S packed responses, and Prompt-GDRO's weight.

        loss = sum_s token_weight_s sum_t (beta KL_t - weight_s J_t)

    logp, old_logp, ref_logp (N,): log-probs of the response tokens now, when they were drawn, under the base.
    advantage (S,): A of (3). weight (S,) > 0: omega of (16); to scale A by it scales (5) by it. token_weight (S,):
    1 / (P n_i L_s) is the paper's mean over tokens, then a prompt's rollouts, then prompts (7); 1 / (R L_s) weighs
    rollouts alike. offsets (S + 1,) int64: response s is tokens offsets[s]:offsets[s + 1], none empty.

    Returns the loss, and detached J (5) and KL (6) of each response, (S,), and how many tokens the clip took out.
    """
    length = offsets.diff()
    owner = torch.repeat_interleave(torch.arange(len(length), device=logp.device), length, output_size=len(logp))
    A = advantage[owner]
    ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # (4)
    J = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)  # (5)
    kl = torch.zeros_like(logp)
    if beta:
        log_ratio = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = log_ratio.exp() - log_ratio - 1  # (6), the k3 estimator
    loss = (token_weight[owner] * (beta * kl - weight[owner] * J)).sum()  # (7) with (16)

    J_S, kl_S = (x.new_zeros(len(length)).index_add(0, owner, x.detach()) / length for x in (J, kl))
    return loss, J_S, kl_S, int((J < ratio * A).sum())


def token_weights(averaging: str, batch: Batch, n_P: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Weight of one token of each rollout in the loss of the mini-batch `prompts`, (R,); they sum to 1 over it."""
    inside = np.isin(batch.owner, prompts)
    rollouts_R = len(prompts) * n_P[batch.owner] if averaging == "prompt" else inside.sum()
    return np.where(inside, 1 / (rollouts_R * batch.lengths), 0.0)


# ------------------------------------------------------------------------------------------------ packing


@dataclass
class Micro:
    """Some rollouts packed for one forward pass, on the device."""

    rollouts: np.ndarray  # (S,) which
    places: np.ndarray  # (n,) their positions in the batch's flat arrays
    tokens: Tensor  # (T,) prompt and response of each, end to end
    cu_seqlens: Tensor  # (S + 1,)
    max_seqlen: int
    targets: Tensor  # (n,) indices of the response tokens in `tokens`
    offsets: Tensor  # (S + 1,) borders of the responses among the n targets


def pack(batch: Batch, rollouts: np.ndarray, device: torch.device) -> Micro:
    """These rollouts in one row, end to end."""

    def put(x: np.ndarray) -> Tensor:
        return torch.from_numpy(x).to(device, non_blocking=True)

    if not len(rollouts):
        # For a rank that has no work but must be there when the others gather weights and sum gradients: tokens that
        # nothing is asked of. Two, for one alone would have torch.compile make graphs for it.
        none = np.zeros(0, np.int64)
        return Micro(none, none, put(np.zeros(2, np.int64)), put(np.array([0, 2])), 2, put(none), put(np.array([0])))
    sequences = [np.concatenate((batch.prompts[batch.owner[r]], batch.response(r))).astype(np.int64) for r in rollouts]
    length, total = batch.lengths[rollouts], np.array([len(s) for s in sequences])
    end = total.cumsum()
    targets = np.concatenate([np.arange(e - n, e) for e, n in zip(end, length, strict=True)])
    places = np.concatenate([np.arange(*batch.offsets[r : r + 2]) for r in rollouts])
    return Micro(rollouts, places, put(np.concatenate(sequences)), put(np.concatenate(([0], end))), int(total.max()),
                 put(targets), put(np.concatenate(([0], length.cumsum()))))


# ------------------------------------------------------------------------------------------------ the trainer


class Step(SimpleNamespace):
    """One batch: what is asked, and what the methods of the Trainer find out about it, in the order in which `step`
    calls them. Each name is explained where it is first given a value."""


def adversaries(cfg: Config) -> tuple[DifficultyBins, PromptGDRO, RolloutGDRO]:
    """Bins and adversaries of a mode. One that does not act is the same object with eta 0, or with one arm."""
    try:
        edges = [float(e) for e in cfg.bin_edges.split(",") if e.strip()]
    except ValueError as error:
        raise ValueError(f"--bin_edges must be numbers with commas between them, got {cfg.bin_edges!r}") from error
    bins = DifficultyBins(edges, history=cfg.bin_history, hysteresis=cfg.bin_hysteresis, success=cfg.bin_success,
                          unseen_rate=cfg.unseen_rate)
    prompt = PromptGDRO(bins.num_bins, eta=cfg.prompt_eta if cfg.mode in ("prompt", "both") else 0.0,
                        share_normalize=cfg.prompt_signal == "surrogate", mean_one=cfg.mean_one)
    n_bar = cfg.rollouts_per_prompt
    n_min, n_max = (cfg.n_min, cfg.n_max) if cfg.mode in ("rollout", "both") else (n_bar, n_bar)
    rollout = RolloutGDRO(bins.num_bins, n_min=n_min, n_max=n_max, n_bar=n_bar, eta=cfg.rollout_eta,
                          utility=cfg.rollout_utility, budget=cfg.rollout_budget, seed=cfg.seed)
    return bins, prompt, rollout


class Trainer:
    """Everything a run holds. `step` is the algorithm."""

    def __init__(self, cfg: Config, ranks: Ranks, loaded: dict | None = None):
        """`loaded`: what the run to be resumed had loaded; its hub commits are taken again, wherever `main` is now."""
        self.cfg, self.ranks, self.device, self.pinned = cfg, ranks, ranks.device, loaded or {}
        self.bins, self.prompt_gdro, self.rollout_gdro = adversaries(cfg)
        self.learners = {"bins": self.bins, "prompt": self.prompt_gdro, "rollout": self.rollout_gdro}
        self.record: dict = {}  # what was loaded, for config.json
        self.grader = Grader(workers=cfg.grader_workers, timeout=cfg.grader_timeout, reward=cfg.reward)
        if self.grader.source:
            self.record["reward"] = {"sha256": self.grader.source.sha256}
        self._load_model()
        self._load_data()
        say(self.summary())
        cfg = self.cfg  # with the limits that depend on the model
        progress("engine")  # from here on, with all downloads done, the watchdog watches
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.learning_rate, weight_decay=WEIGHT_DECAY,
                                           fused=True)
        for p in self.model.parameters():  # as AdamW itself makes it at its first step: a checkpoint goes in before
            self.optimizer.state[p] = {"step": torch.zeros((), device=self.device), "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": torch.zeros_like(p)}
        self.engine = make_engine(
            self.record["engine"], self.policy.folder, dtype=self.policy.dtype, device=self.device,
            max_prompt_tokens=cfg.max_prompt_tokens, max_response_tokens=cfg.max_response_tokens,
            max_rollouts=cfg.max_rollouts, seed=cfg.seed, gpu_memory_utilization=cfg.gpu_memory_utilization)
        self.next_step = self.optimizer_steps = 0
        self.stop = Stop(ranks)
        self.lost_steps = 0  # in a row, in which most responses got no verdict

    # -- setting up

    def _load_model(self) -> None:
        cfg = self.cfg
        folder = tasks.model_folder(cfg.model, self.pinned.get("model", {}).get("folder"))
        self.policy = Policy.open(folder, dtype=cfg.dtype, device=self.device, stop_tokens=cfg.stop_tokens)
        prompt, response = self.policy.config.limits(cfg.max_prompt_tokens, cfg.max_response_tokens)
        self.cfg = cfg = dataclasses.replace(cfg, max_prompt_tokens=prompt, max_response_tokens=response)
        engine, why = choose_engine(cfg.engine, self.device)
        say(f"engine: {engine}. {why}")
        cuda = self.device.type == "cuda"
        if cuda:
            plan.check_memory(self.policy.config, dataclasses.replace(cfg, engine=engine), self.ranks.world,
                              self.ranks.in_node, torch.cuda.mem_get_info())
        load = partial(Transformer.from_pretrained, folder, device=self.device,
                       shard=partial(shard, ranks=self.ranks, compute=self.policy.dtype))
        self.model = load(dtype=torch.float32)  # at lr 1e-6 an update is far below what bf16 resolves
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        self.reference = load(dtype=self.policy.dtype).requires_grad_(False) if cfg.kl_beta else None
        for model in (self.model, self.reference) if cuda else ():
            if model is not None:
                model.compile_blocks()
        # The folder's name is a commit or a recipe's hash; hashes tell apart folders that share a name, `head` bases
        # of one recipe that were trained on different processors.
        head = full(self.model.head, self.policy.dtype).cpu().view(torch.uint8).numpy()
        self.record |= {"engine": engine, "model": {
            "name": portable(cfg.model), "folder": folder.name,
            "head": hashlib.blake2b(head, digest_size=8).hexdigest(), "stop_ids": list(self.policy.stop_ids),
            "weights": self.ranks.from_all(self.policy.weights_hash() if self.ranks.rank == 0 else "")[0]}}

    def _load_data(self) -> None:
        cfg = self.cfg
        problems = self._load("train_data", "train", cfg.train_data, cfg.train_problems)
        if cfg.eval_data:
            held_out = self._load("eval_data", "heldout", cfg.eval_data, cfg.eval_problems)
            check_overlap(problems, held_out, allowed=cfg.allow_overlap)
        else:
            problems, held_out, chosen = hold_out(problems, self.pinned.get("eval_data"))
            held_out = held_out[: cfg.eval_problems or None]
            self.record["eval_data"] = {"held out of": "train_data", **chosen}
        self.problems, self.prompts = self._encode("train_data", problems)
        self.eval_set = self._encode("eval_data", held_out)
        batch_order(len(self.problems), cfg.prompts_per_step, cfg.seed, 0)  # raises when there are too few

    def _load(self, name: str, split: str, source: str, limit: int) -> list[Problem]:
        problems, self.record[name] = tasks.load(source, split=split, limit=limit,
                                                 revision=self.pinned.get(name, {}).get("revision"))
        return problems

    def _encode(self, name: str, problems: list[Problem]) -> tuple[list[Problem], list[list[int]]]:
        cfg = self.cfg
        problems, tokens, counts = encode_prompts(
            problems, self.policy.tokenizer, suffix=cfg.prompt_suffix, chat_template=cfg.chat_template,
            max_tokens=cfg.max_prompt_tokens, rows=self.policy.config.vocab_size)
        if cfg.answer_style != "auto":
            problems = [dataclasses.replace(p, style=cfg.answer_style) for p in problems]
        golds = check_golds(problems, self.grader, allowed=cfg.allow_bad_golds, name=name)
        styles = sorted({p.style for p in problems})
        self.record[name] |= {"encoded": counts, "problems": len(problems), "styles": styles, **golds}
        dropped = f", {counts['too_long']} over {cfg.max_prompt_tokens} tokens dropped" if counts["too_long"] else ""
        say(f"{name}: {len(problems)} problems{dropped}")
        return problems, tokens

    def summary(self) -> str:
        """What is trained on what, how it is asked, where the answer is looked for, what ends it, when bins differ."""
        cfg, data = self.cfg, self.record["train_data"]
        graded = cfg.reward or f"looking for the answer as {', '.join(data['styles'])}"
        asked = "through the chat template" if data["encoded"]["chat_template"] else "as they are"
        stops = ", ".join(map(repr, self.policy.tokenizer.convert_ids_to_tokens(list(self.policy.stop_ids))))
        return (f"{portable(cfg.model)} on {portable(cfg.train_data)}: prompts go in {asked}, with "
                f"{cfg.prompt_suffix!r} behind them; {stops} or {cfg.max_response_tokens} tokens end a response, "
                f"graded by {graded}. From step {-(-len(self.problems) // cfg.prompts_per_step)} on prompts come again "
                "and have bins of their own; until then all share that of the unseen")

    def preview(self) -> None:
        """Before anything long: two of four responses and what was found in them, then how long drawing takes. No step
        has these seeds, and the next `load_weights` drops what an engine keeps of the prompts. Collective."""
        cfg, tokenizer = self.cfg, self.policy.tokenizer
        chosen = batch_order(len(self.problems), cfg.prompts_per_step, cfg.seed, 0)[: max(4, self.ranks.world)]
        s = Step(number=PREVIEW, problems=[self.problems[i] for i in chosen], prompts=[self.prompts[i] for i in chosen],
                 ids_P=[self.problems[i].id for i in chosen], n_P=np.ones(len(chosen), int),
                 sampling=Sampling(cfg.max_response_tokens, cfg.temperature, stop_ids=self.policy.stop_ids))
        progress("preview")
        for method in (self.draw, self.grade, self.exchange):
            method(s)
        for r, problem in enumerate(s.problems[:2]):
            text, = self.policy.texts([s.batch.response(r)])
            found = "" if cfg.reward else f"found {extract(text, problem.style)!r}, "
            say(f"\nprompt: ... {tokenizer.decode(s.prompts[r])[-160:]!r}\n"
                f"response: {text[:160]!r}{f' ... {text[160:][-160:]!r}' if text[160:] else ''}\n"
                f"{found}the answer is {problem.answer!r}: reward {s.reward_R[r]:+g}; {s.batch.lengths[r]} tokens, "
                f"{'cut' if s.batch.truncated[r] else 'ended by itself'}")
        # An estimate: others are as long as these, and the speed is that of as many as are decoded at once, of which
        # only the first tokens are drawn, and nothing ends them.
        limit, mean = cfg.max_response_tokens, s.batch.lengths.mean()
        evaluation = len(self.eval_set[0]) * cfg.eval_rollouts
        n_P = np.full(len(s.n_P), max(1, cfg.max_rollouts * self.ranks.world // len(s.n_P)))
        few, start = Sampling(min(16, limit), cfg.temperature), time.perf_counter()
        self.draw(Step(**{**vars(s), "n_P": n_P, "sampling": few}))
        speed = n_P.sum() * few.max_tokens / max(self.ranks.from_all(time.perf_counter() - start))
        run = (cfg.steps * cfg.prompts_per_step * cfg.rollouts_per_prompt
               + evaluation * sum(map(cfg.due, range(cfg.steps + 1))))
        times = [timedelta(seconds=round(rollouts * mean / speed)) for rollouts in (evaluation, run)]
        say(f"{ungraded(len(s.reward_R), s.timeouts, s.failures)}\nestimate (h:mm:ss): an evaluation draws for "
            f"{times[0]}, the run for {times[1]} in all, at {speed:,.0f} tokens a second and {mean:.0f} a response, "
            f"as above; {limit / mean:.1f} times as long if all reached {limit}. Grading and training come on top: the "
            "bar tells after a step\n")

    # -- one step

    def step(self, number: int) -> tuple[dict, list[dict]]:
        """One batch: (a line for metrics.jsonl, lines for samples.jsonl). `number` counts from 0."""
        progress(step=number)
        index_P = batch_order(len(self.problems), self.cfg.prompts_per_step, self.cfg.seed, number)
        s = Step(number=number, seconds={}, problems=[self.problems[i] for i in index_P],
                 prompts=[self.prompts[i] for i in index_P], ids_P=[self.problems[i].id for i in index_P],
                 sampling=Sampling(self.cfg.max_response_tokens, self.cfg.temperature, stop_ids=self.policy.stop_ids))
        for phase, method in (
                ("adversary", self.decide),  # bins, weights, rollout counts: (10)-(11), (14)-(16), (19)-(20)
                ("generate", self.draw), ("reward", self.grade), ("exchange", self.exchange),
                ("advantage", self.advantages),  # (3)
                ("logprob", self.behaviour),  # what (4) and (6) compare with
                ("update", self.update),  # (4)-(7), with the weight of (16)
                ("sync", lambda s: self.engine.load_weights(self.weights())),
                ("adversary", self.learn)):  # (10)-(13), (17)-(18), (21)
            progress(phase)
            start = time.perf_counter()
            method(s)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            s.seconds[phase] = s.seconds.get(phase, 0.0) + time.perf_counter() - start
        return self.log_line(s), self.samples(s)

    def decide(self, s: Step) -> None:
        """How many rollouts each prompt gets and how much its advantages weigh, from what earlier steps saw."""
        s.bin_P, s.estimate_P = self.bins.lookup(s.ids_P), self.bins.estimates(s.ids_P)  # (11), (10)
        s.allocated_P = s.n_P = self.rollout_gdro.allocate(s.bin_P)  # rollouts of each prompt
        s.mu, s.price = self.rollout_gdro.mu, self.rollout_gdro.shadow_price_dp  # (21); marginal value of a rollout
        s.score_B, s.weight_B = self.prompt_gdro.score_B, self.prompt_gdro.weights(s.bin_P)  # (12), (16)
        s.weight_P = s.weight_B[s.bin_P]  # what multiplies the advantages of each prompt
        if self.cfg.allocation == "weights":
            n_bar = self.cfg.rollouts_per_prompt
            s.n_P, s.weight_P = np.full_like(s.allocated_P, n_bar), s.weight_P * s.allocated_P / n_bar
            mean_B = means_by(s.bin_P, s.weight_P, self.bins.num_bins)
            s.weight_B = np.where(np.isnan(mean_B), s.weight_B, mean_B)

    def draw(self, s: Step) -> None:
        """This rank's part of the batch, with its own engine."""
        seed_P = [rollout_seed(self.cfg.seed, s.number, i) for i in s.ids_P]
        evaluates = s.number < 0
        s.part = draw_part(self.engine, self.ranks, s.prompts, s.n_P, seed_P, s.sampling, bar=evaluates)
        if not evaluates:
            self.engine.sleep()  # training wants the memory

    def grade(self, s: Step) -> None:
        """This rank's responses, while other ranks still decode."""
        s.grades = self.grader.grade(
            self.policy.texts(r.tokens for r in s.part.rollouts),
            [s.problems[p] for p in s.part.owner_R[s.part.mine_R]],
            cut=np.array([r.truncated for r in s.part.rollouts], bool))

    def exchange(self, s: Step) -> None:
        """What all ranks drew, with its rewards."""
        s.batch, s.reward_R = s.part.exchange(self.ranks), np.zeros(len(s.part.owner_R))  # rewards are in [-1, 1]
        s.reward_R[s.part.mine_R] = [g.reward for g in s.grades]
        s.reward_R = self.ranks.merge(s.reward_R)
        s.correct_P = np.bincount(s.batch.owner, weights=s.reward_R > 0, minlength=len(s.n_P)).astype(int)
        # How many rollouts are -1 for want of a verdict.
        s.timeouts, s.failures = self.ranks.merge(np.array([sum(g.timed_out for g in s.grades),
                                                            sum(g.failed for g in s.grades)]))
        asked = len(s.reward_R) if self.cfg.reward else int((~s.batch.truncated).sum())
        if s.number >= 0:
            self.lost_steps = self.lost_steps + 1 if 2 * (s.timeouts + s.failures) > asked else 0
        if self.lost_steps == 3 or (self.cfg.reward and 0 < asked == s.failures):
            failure = next(filter(None, self.ranks.from_all(self.grader.failure)), "").strip()
            running = " (most, in three steps running)" if self.lost_steps == 3 else ""
            raise RunError(
                f"step {self.next_step}: {ungraded(asked, s.timeouts, s.failures).removeprefix('WARNING: ')}{running}. "
                f"{failure and 'First failure: '}{failure.splitlines()[-1] + '. ' if failure else ''}"
                f"Raise --grader_timeout ({self.cfg.grader_timeout:g} s) and go on with --resume, or mend "
                f"{self.cfg.reward or 'the golds'} and begin anew")

    def advantages(self, s: Step) -> None:
        """(3), times the rule's factor."""
        # what the rule multiplies a prompt's advantages by, for its own successes
        s.factor_P = RULES[self.cfg.rule](s.correct_P, s.n_P, s.estimate_P)
        offsets_P = np.concatenate(([0], s.n_P.cumsum()))
        advantage, constant = group_advantage(
            *(torch.from_numpy(x).to(self.device) for x in (s.reward_R, offsets_P, s.factor_P)), clip=ADVANTAGE_CLIP)
        s.advantage_R, s.constant_P = advantage.cpu().numpy(), constant.cpu().numpy()  # constant: all scored alike
        # Without a KL term a rollout of advantage 0 adds exactly 0 to loss, statistics and gradient: left out.
        s.acts_R = (s.advantage_R != 0) | bool(self.cfg.kl_beta)

    @torch.no_grad()
    def behaviour(self, s: Step) -> None:
        """Log-probs under the policy that drew the tokens, and under the base, where the loss needs them.

        Measured is the first rollout of every MEASURE_EVERY-th prompt, whatever its reward: entropy and mismatch must
        not depend on who has an advantage. Raises RunError where sampler and trainer differ by more than rounding.
        """
        batch = s.batch
        first_P = np.unique(batch.owner, return_index=True)[1]
        s.measured_R = np.isin(np.arange(len(batch.owner)), first_P[::MEASURE_EVERY])
        old_N, ref_N, entropy_N = (np.zeros(len(batch.tokens), np.float32) for _ in range(3))
        for wanted_R, measure in ((s.measured_R, True), (s.acts_R & ~s.measured_R, False)):
            for micro in self.micro_batches(batch, wanted_R):
                out = self.logprobs(self.model, micro, entropy=measure)
                logp, entropy = out if measure else (out, torch.zeros_like(out))
                old_N[micro.places], entropy_N[micro.places] = logp.cpu().numpy(), entropy.cpu().numpy()
                if self.reference is not None:
                    ref_N[micro.places] = self.logprobs(self.reference, micro).cpu().numpy()
        if self.reference is not None:
            reshard(self.reference)
        s.old_N, s.ref_N, entropy_N = self.ranks.merge(np.stack((old_N, ref_N, entropy_N)))
        measured_N = np.repeat(s.measured_R, batch.lengths)
        s.entropy_N, s.mismatch_N = entropy_N[measured_N], np.abs(batch.sampler_logp - s.old_N)[measured_N]
        if not s.mismatch_N.mean() <= self.cfg.max_mismatch:  # nor is NaN
            raise RunError(
                f"step {s.number}: sampler and trainer log-probs differ by {s.mismatch_N.mean():.4f} on average (at "
                f"most {s.mismatch_N.max():.2f}), more than --max_mismatch {self.cfg.max_mismatch}: the sampler's "
                "weights are stale, or an arithmetic breaks down. Nothing was updated; --engine torch or --dtype "
                "float32 tells which")

    def update(self, s: Step) -> None:
        """The optimiser steps of one batch, one a mini-batch of prompts; every weight is fixed before any split."""
        cfg, batch, P = self.cfg, s.batch, len(s.n_P)
        weight_R, put = s.weight_P[batch.owner], partial(torch.tensor, dtype=torch.float32, device=self.device)
        s.surrogate_R, s.kl_R = np.zeros(len(weight_R)), np.zeros(len(weight_R))  # 0 of what is left out
        losses, norms, clipped, active = [], [], 0, 0
        for start in range(0, P, cfg.minibatch_prompts):
            prompts = np.arange(start, min(start + cfg.minibatch_prompts, P))
            token_weight_R, loss_sum = token_weights(cfg.averaging, batch, s.n_P, prompts), 0.0
            for micro in self.micro_batches(batch, s.acts_R & (token_weight_R > 0)):
                mine, places = micro.rollouts, micro.places
                logp = self.logprobs(self.model, micro)
                logp.retain_grad()  # to count the tokens that move nothing
                loss, surrogate_S, kl_S, cut = grpo_loss(
                    logp, put(s.old_N[places]), put(s.ref_N[places]), put(s.advantage_R[mine]), put(weight_R[mine]),
                    put(token_weight_R[mine]), micro.offsets, eps_low=cfg.eps_low, eps_high=cfg.eps_high,
                    beta=cfg.kl_beta)
                loss.backward()
                loss_sum += loss.item()
                s.surrogate_R[mine], s.kl_R[mine] = surrogate_S.cpu().numpy(), kl_S.cpu().numpy()
                clipped, active = clipped + cut, active + int((logp.grad != 0).sum())
            losses.append(float(self.ranks.merge(np.array([loss_sum]))[0]))
            if not np.isfinite(losses[-1]):
                raise RunError(f"step {s.number}: the loss is {losses[-1]}; {DIVERGED}")
            norms.append(self.optimizer_step(s.number))
        s.surrogate_R, s.kl_R = self.ranks.merge(np.stack((s.surrogate_R, s.kl_R)))
        clipped, active = self.ranks.merge(np.array([clipped, active])) / len(batch.tokens)
        s.loss, s.grad_norm, s.clip_frac, s.idle_frac = np.mean(losses), np.mean(norms), clipped, 1 - active

    def optimizer_step(self, number: int) -> float:
        """Clips the gradient, updates, frees it. Returns the norm before clipping.

        Raises RunError, with the weights untouched, when the norm is not finite.
        """
        gradients = [p.grad for p in self.model.parameters()]
        # One rank's norm for all: nodes that hold copies must clip alike to the last bit.
        norm = self.ranks.from_all(float(full(torch.nn.utils.get_total_norm(gradients))))[0]
        if not np.isfinite(norm):
            raise RunError(f"step {number}: the gradient norm is {norm}; {DIVERGED}")
        for gradient in gradients:
            gradient.mul_(min(1.0, GRAD_CLIP / (norm + 1e-6)))
        self.optimizer.step()
        self.optimizer.zero_grad()  # freed: vLLM wants the memory
        self.optimizer_steps += 1
        return norm

    def learn(self, s: Step) -> None:
        """The one place where adversaries and bins change; the same on every rank, which is checked."""
        P = len(s.n_P)
        s.loss_P = means_by(s.batch.owner, self.cfg.kl_beta * s.kl_R - s.surrogate_R, P)  # (6)-(7)
        s.reward_P = means_by(s.batch.owner, s.reward_R, P)  # the mean of a prompt's rollouts
        s.signals = {name: signal(s.loss_P, s.reward_P, s.n_P) for name, signal in SIGNALS.items()}
        self.prompt_gdro.update(s.bin_P, s.signals[self.cfg.prompt_signal])
        self.rollout_gdro.update(s.bin_P, s.n_P, s.loss_P, s.correct_P)
        self.bins.update(s.ids_P, s.correct_P, s.n_P)
        touched = (self.prompt_gdro.score_B, self.rollout_gdro.log_prob_BK(), self.bins.lookup(s.ids_P),
                   np.array([self.rollout_gdro.mu, s.grad_norm]))
        digest = hashlib.blake2b(b"".join(a.tobytes() for a in touched), digest_size=8).digest()
        self.ranks.assert_equal(int.from_bytes(digest, "big") >> 1, "the adversaries' state after this step")

    def log_line(self, s: Step) -> dict:
        """A line of metrics.jsonl (docs/log.md); by bin, B entries each, null for an absent bin."""
        cfg, batch, B = self.cfg, s.batch, self.bins.num_bins
        mean_B = partial(means_by, s.bin_P, groups=B)
        return jsonable({
            "step": s.number, "mode": cfg.mode, "seed": cfg.seed,
            "seconds": {**s.seconds, "total": sum(s.seconds.values())},
            "truncated_frac": batch.truncated.mean(), "response_tokens_mean": batch.lengths.mean(),
            "rollouts": len(batch.owner), "rollouts_mean": len(batch.owner) / len(batch.prompts),
            "tokens_generated": batch.lengths.sum(), "tokens_trained": batch.cost().sum(),
            "reward_timeouts": s.timeouts, "reward_failures": s.failures, "entropy": s.entropy_N.mean(),
            "mismatch": {"mean": s.mismatch_N.mean(), "max": s.mismatch_N.max()},
            "measured": {"rollouts": s.measured_R.sum(), "tokens": len(s.mismatch_N)},
            "reward_mean": s.reward_P.mean(), "solved_frac": (s.correct_P > 0).mean(),
            "zero_std_frac": s.constant_P.mean(), "zero_std_rollouts_frac": s.constant_P @ s.n_P / s.n_P.sum(),
            "loss": s.loss, "kl": s.kl_R.mean(), "clip_frac": s.clip_frac, "idle_frac": s.idle_frac,
            "grad_norm": s.grad_norm, "lr": cfg.learning_rate, "shadow_price": s.mu, "shadow_price_dp": s.price,
            "bins": {"share": bin_shares(s.bin_P, B), "reward": mean_B(s.reward_P), "score": s.score_B,
                     "weight": s.weight_B, "allocated": mean_B(s.allocated_P), "rollouts": mean_B(s.n_P),
                     "tokens": means_by(s.bin_P[batch.owner], batch.lengths, B)},
            "signals": {name: {"mean": mean_B(value_P), "error": errors_by(s.bin_P, value_P, B)}
                        for name, value_P in s.signals.items()},
            "surrogate_abs": [np.abs(s.loss_P[i : i + cfg.minibatch_prompts]).mean()
                              for i in range(0, len(s.loss_P), cfg.minibatch_prompts)],
            "eval": None})

    def samples(self, s: Step) -> list[dict]:
        """Lines of samples.jsonl: the first rollout of the batch's first prompts."""
        first_P = np.unique(s.batch.owner, return_index=True)[1][:4]
        texts = self.policy.texts(map(s.batch.response, first_P))
        return jsonable([{
            "step": s.number, "id": s.ids_P[p], "kind": s.problems[p].kind or None, "bin": s.bin_P[p], "n": s.n_P[p],
            "weight": s.weight_P[p], "factor": s.factor_P[p], "answer": s.problems[p].answer,
            "found": None if self.cfg.reward else extract(texts[p], s.problems[p].style),
            "reward": s.reward_R[r], "right": s.reward_R[r] > 0, "truncated": s.batch.truncated[r],
            "prompt": s.problems[p].prompt, "response": texts[p]} for p, r in enumerate(first_P)])

    # -- what a step calls

    def logprobs(self, model: Transformer, micro: Micro, *, entropy: bool = False):
        progress()
        return model.logprobs(micro.tokens, micro.cu_seqlens, micro.max_seqlen, micro.targets,
                              temperature=self.cfg.temperature, entropy=entropy)

    def micro_batches(self, batch: Batch, wanted_R: np.ndarray) -> Iterator[Micro]:
        """This rank's part of the wanted rollouts, dealt out by tokens, in rows."""
        rollouts = np.flatnonzero(wanted_R)
        rows = deal_rows(batch.cost()[rollouts], self.cfg.microbatch_tokens, self.ranks.world)[self.ranks.rank]
        return (pack(batch, rollouts[row], self.device) for row in rows)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, whole tensor in the dtype of a forward pass), one at a time. Collective."""
        for name, p in self.model.named_parameters():
            progress()
            yield name, full(p, self.policy.dtype)

    def evaluate(self, step: int) -> Evaluation | None:
        """mean@k and pass@k on the held-out problems with the current weights; seeds do not depend on the step. None
        when it is asked to stop before all ranks have drawn and graded theirs."""
        cfg, (problems, prompts) = self.cfg, self.eval_set
        s = Step(number=-1, problems=problems, prompts=prompts, ids_P=[p.id for p in problems],
                 n_P=np.full(len(problems), cfg.eval_rollouts), sampling=Sampling(
                     cfg.max_response_tokens, cfg.eval_temperature, cfg.eval_top_p, cfg.eval_top_k,
                     self.policy.stop_ids))
        progress("evaluate", step=step)
        with suppress(KeyboardInterrupt):
            self.stop.at_once = True
            if not self.stop.asked:
                self.draw(s)
                self.grade(s)
            self.stop.at_once = False
        if self.stop():
            return None
        self.exchange(s)
        return Evaluation.of(step, [p.kind for p in problems], s.reward_R.reshape(len(problems), -1) > 0,
                             float(s.batch.lengths.mean()), float(s.batch.truncated.mean()), int(s.timeouts),
                             int(s.failures))

    # -- going on

    def tensors(self) -> dict[str, Tensor]:
        """The live weights and AdamW's moments of them, shards where they are sharded: weight.NAME, exp_avg.NAME,
        exp_avg_sq.NAME."""
        state = self.optimizer.state
        return {f"{kind}.{name}": tensor for name, p in self.model.named_parameters() for kind, tensor in (
            ("weight", p.detach()), ("exp_avg", state[p]["exp_avg"]), ("exp_avg_sq", state[p]["exp_avg_sq"]))}

    def checkpoint(self, evaluations: list[Evaluation]) -> tuple[dict, dict, dict]:
        """All that is needed to go on exactly: tensors, arrays, and a state that is JSON."""
        arrays = {f"{name}/{k}": v for name, part in self.learners.items() for k, v in part.state_dict().items()}
        return self.tensors(), arrays, {"next_step": self.next_step, "optimizer_steps": self.optimizer_steps,
                                        "evaluations": [dataclasses.asdict(e) for e in evaluations]}

    def restore(self, arrays: dict, state: dict) -> list[Evaluation]:
        """Takes over what `checkpoint` gave, but for the tensors, which were filled in place; the evaluations until
        then."""
        self.next_step, self.optimizer_steps = state["next_step"], state["optimizer_steps"]
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.optimizer_steps)
        for name, part in self.learners.items():
            part.load_state_dict({k.split("/")[1]: v for k, v in arrays.items() if k.startswith(name + "/")})
        return [Evaluation(**e) for e in state["evaluations"]]


# ------------------------------------------------------------------------------------------------ the loop


class Stop:
    """Ctrl-C and SIGTERM: the first asks for a stop after the step, or ends an evaluation; the second ends the process.
    Called, it says whether any rank was asked: all stop, or none. Collective."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.asked = ranks, False
        self.at_once = False  # raise KeyboardInterrupt when asked; not in collectives: others may never be

    def __call__(self) -> bool:
        return bool(self.ranks.merge(np.array([self.asked], int))[0])

    def listen(self, folder: RunFolder) -> None:
        """From here on the signals come here."""
        def ask(number: int, frame) -> None:
            if self.asked:  # no exception, of which torch and callbacks from C would make others, or nothing
                kept = [path.name for path in folder.checkpoints().values()] or ["no checkpoint"]
                say(f"stopped at once, {kept[0]} is kept; go on with: python train.py --out_dir {folder.path} --resume")
                sys.stdout.flush()
                os._exit(130)
            self.asked = True
            say("stopping", "the evaluation" if self.at_once else "after this step", "(again to stop at once)")
            if self.at_once:
                raise KeyboardInterrupt

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)


def set_up(cfg: Config, preset: str, resume: bool) -> tuple[Trainer, RunFolder, list[Evaluation]]:
    """Everything loaded and checked, the run folder begun or reopened, the weights in the engine."""
    adversaries(cfg)  # raises what is wrong with a value before a folder is looked at
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    # Collectives outlast the watchdog, which says more than they do when a rank is missing.
    ranks, folder = Ranks(max(900, 2 * cfg.stall_seconds)), RunFolder(cfg)
    ranks.check_work(cfg.prompts_per_step)
    folder.lock = FolderLock(folder.path, ranks)
    loaded = folder.loaded_before(resume)
    folder.check_shared(ranks)
    trainer, evaluations = Trainer(cfg, ranks, loaded), []
    if saved := folder.load(trainer.tensors(), ranks):
        evaluations = trainer.restore(*saved)
    elif resume:
        say(f"--resume: {folder.path} has no checkpoint yet, starting from the beginning")
    else:
        trainer.preview()  # before there is a run to go on with: who sees that a setting is wrong gives another
    if saved:
        folder.refuse_other(jsonable(trainer.record))
    if trainer.next_step > cfg.steps:
        raise ValueError(f"--steps {cfg.steps}: this run has done {trainer.next_step} already; give as many or more")
    if ranks.rank == 0:
        if saved:
            folder.record_change(trainer.next_step)
            folder.write_evaluations(evaluations)
        else:
            folder.start(preset, jsonable(trainer.record))
        folder.forget_after(trainer.next_step)
        say(folder.size(trainer.policy.config.num_parameters(), trainer.policy.dtype.itemsize))
    trainer.engine.load_weights(trainer.weights())
    return trainer, folder, evaluations


def train(trainer: Trainer, folder: RunFolder, evaluations: list[Evaluation]) -> bool:
    """Steps, evaluations and checkpoints up to cfg.steps; False when it was asked to stop before the end. The policy of
    the best evaluation stays in best/."""
    cfg, first = trainer.cfg, trainer.ranks.rank == 0
    trainer.stop.listen(folder)
    tracker = Tracker(cfg.tracker if first else "none", folder.path)

    def logged(evaluation: Evaluation) -> dict:
        return {k: v for k, v in dataclasses.asdict(evaluation).items() if k != "by_kind"}

    def evaluate() -> dict | None:
        latest = trainer.evaluate(trainer.next_step)
        if latest is None:
            return None
        evaluations.append(latest)
        if first:
            folder.write_evaluations(evaluations)
        if trainer.next_step and all(latest.passes[e.shown] > e.passes[e.shown] for e in evaluations[:-1]):
            trainer.policy.save(trainer.model, folder.path / "best", write=first)
            if first:
                write_json(folder.path / "best" / "evaluation.json", dataclasses.asdict(latest))
        say(latest.line())
        return logged(latest)

    # of the base, one that a stop left out, or one that the tracker forgets with the steps after it
    known = [logged(e) for e in evaluations if e.step == trainer.next_step]
    if known or cfg.due(trainer.next_step):
        tracker.log({"step": trainer.next_step, "eval": known[0] if known else evaluate()})
    bar = tqdm(total=cfg.steps, initial=trainer.next_step, desc=f"{cfg.mode} seed {cfg.seed}", unit="step",
               disable=not first)
    begun, recent, warned, stopping = [], [], False, trainer.stop()
    while trainer.next_step < cfg.steps and not stopping:
        line, samples = trainer.step(trainer.next_step)
        trainer.next_step += 1
        folder.lock.check()
        stopping, last = trainer.stop(), trainer.next_step == cfg.steps
        if cfg.due(trainer.next_step) and not stopping:
            line["eval"] = evaluate()
            stopping = trainer.stop()  # which would have ended it
        if first:
            folder.append("metrics.jsonl", [line])
            folder.append("samples.jsonl", samples)
            tracker.log(line, samples)
        begun, recent = [*begun, line][:3], [*recent, line][-10:]
        if trainer.next_step == 3 and (hint := nothing_to_learn(begun)):
            say(hint)
        if not warned and (hint := collapsed(begun, recent)):
            warned = True
            say(hint)
        bar.update()
        lost = {name: line[f"reward_{name}"] for name in ("timeouts", "failures") if line[f"reward_{name}"]}
        bar.set_postfix(lost, reward=f"{line['reward_mean']:+.3f}", solved=f"{line['solved_frac']:.2f}",
                        cut=f"{line['truncated_frac']:.0%}", tokens=f"{line['response_tokens_mean']:.0f}",
                        mismatch=f"{line['mismatch']['mean']:.0e}", grad_norm=f"{line['grad_norm']:.1e}")
        progress("save")
        if stopping or last or (cfg.save_every and trainer.next_step % cfg.save_every == 0):
            folder.save(*trainer.checkpoint(evaluations), trainer.ranks)
    bar.close()
    return trainer.next_step >= cfg.steps and not stopping


def nothing_to_learn(lines: list[dict]) -> str | None:
    """What to look at when none of these steps could teach anything, or None."""
    if any(line["zero_std_frac"] < 1 for line in lines):
        return None
    solved, cut = (np.mean([line[key] for line in lines]) for key in ("solved_frac", "truncated_frac"))
    lost = sum(line["reward_timeouts"] + line["reward_failures"] for line in lines)
    return (f"WARNING: so far all rollouts of a prompt scored alike: all advantages are 0 and nothing is learned. "
            f"{solved:.0%} of prompts were solved; {cut:.0%} of responses were cut, which only a --reward may call "
            f"right (does the model end them? --max_response_tokens, --stop_tokens); {lost} got no verdict "
            "(--grader_timeout). samples.jsonl shows whether they say their answer where --answer_style or --reward "
            "looks (--prompt_suffix, --chat_template)")


def collapsed(first: list[dict], last: list[dict]) -> str | None:
    """A warning when the last ten steps solved nothing, or lost more reward against the first three than any run of the
    study from which it recovered (0.25), or None. Entropy tells nothing: in most good runs it falls to a tenth."""
    before, now = (np.mean([line["reward_mean"] for line in lines]) for lines in (first, last))
    solved_before, solved_now = (any(line["solved_frac"] for line in lines) for lines in (first, last))
    if len(last) < 10 or now > before - 0.3 and (solved_now or not solved_before):
        return None
    return (f"WARNING: the policy has collapsed: the mean reward is {now:+.2f} over the last ten steps, {before:+.2f} "
            "over the first three. Begin again, or go on from an earlier checkpoint, with a lower --learning_rate")


def run(cfg: Config, command) -> None:
    """Sets up, trains, saves the policy, says how it ended, and exits. Takes what `parse_args` gives."""
    try:
        trainer, folder, evaluations = set_up(cfg, command.preset, command.resume)
    except (ValueError, OSError) as error:  # what was given; a later ValueError is a bug and keeps its trace
        raise RunError(str(error)) from error
    ranks, begun = trainer.ranks, trainer.next_step
    with folder.lock, trainer.grader, folder.full_disk_explained(12 * trainer.policy.config.num_parameters()):
        complete = train(trainer, folder, evaluations)
        trainer.policy.save(trainer.model, folder.path / "model", write=ranks.rank == 0)
    if complete and begun >= cfg.steps:
        say(f"already at {trainer.next_step} of {cfg.steps} steps; --steps N goes on")
    if complete:
        say(table(evaluations[:1] + evaluations[1:][-1:]))
        best = max(evaluations, key=lambda e: e.passes[e.shown])  # the first of several
        name, kept = f"step {best.step}" if best.step else "the base", folder.path / "best"
        say(f"\nbest: {name}, {best.shown} {best.passes[best.shown]:.1%},", kept if kept.exists() else "no best/")
        say(f"model: {folder.path / 'model'} ({str(trainer.policy.dtype)[6:]})   log: {folder.path / 'metrics.jsonl'}")
    else:
        say(f"stopped after {trainer.next_step} steps; go on with: python train.py --out_dir {folder.path} --resume")
    close = trainer.engine.close
    del trainer  # before the group ends: model, optimiser and reference hold it
    ranks.leave(close)
    sys.exit(0 if complete else 130)


def main() -> None:
    try:
        cfg, command = parse_args()
        if command.plan is not None:
            given = re.sub(r"--plan[= ]\S+ ?", "", shlex.join(sys.argv[1:])).strip()
            given = given if "--preset" in given else f"--preset {command.preset} {given}".strip()
            print(plan.report(cfg, plan.known_model(cfg.model) or tasks.model_config(cfg.model), command.plan, given))
            return
    except (ValueError, OSError, RunError) as error:
        sys.exit(f"train.py: {error}")
    with watching(Path(cfg.out_dir), cfg.stall_seconds):
        try:
            run(cfg, command)
        except RunError as error:
            sys.exit(f"train.py: {error}")
        except KeyboardInterrupt:  # while it loads: afterwards Stop takes the signals
            begun = (Path(cfg.out_dir) / "config.json").exists()
            say("interrupted before the first step;", "go on with --resume" if begun else "no run has begun")
            sys.exit(130)


if __name__ == "__main__":
    main()
