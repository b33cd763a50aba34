"""GRPO with two adversaries, in one file: `python train.py --preset arithmetic --mode prompt`.

`Trainer.step` is the algorithm, top to bottom. GRPO, Prompt-GDRO, Rollout-GDRO and both together are one path: in mode
"grpo" every prompt's weight is 1 and every prompt's number of rollouts is n_bar. Apart from the policy and its
optimiser, state changes only at the end of a step, in `Trainer._end_step`.

With torchrun every rank knows the whole batch and holds a shard of the model (sharding.py); work (prompts to sample,
rollouts to train on) is dealt out by tokens, and results meet as sums of arrays in which each rank filled its own
places.
"""

import dataclasses
import hashlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tasks
from config import Config, parse_args
from data import Problem, batch_order, encode_prompts
from gdro import SIGNALS, DifficultyBins, PromptGDRO, RolloutGDRO, bin_shares, errors_by, means_by
from kernels import group_advantage
from loss import grpo_token_loss
from metrics import Evaluation, table
from model import Transformer
from plan import check_memory
from policy import Policy
from ranks import Ranks, RunError, deal_rows, full, reshard, say, shard
from reward import Grade, Grader, check_golds, extract
from rollout import Batch, Part, Sampling, choose_engine, draw_part, make_engine, rollout_seed, to_text
from rules import RULES
from runfolder import RunFolder, Tracker, jsonable, portable, write_json
from watchdog import progress, watching

DIVERGED = ("the weights are those before this update. --resume goes on from the last checkpoint, with a lower "
            "--learning_rate for instance")
MEASURE_EVERY = 2  # entropy and mismatch are measured on the first rollout of every second prompt of a batch

# ------------------------------------------------------------------------------------------------ packing


@dataclass
class Micro:
    """Some rollouts packed for one forward pass, on the device."""

    rollouts: np.ndarray  # (S,) which
    places: np.ndarray  # (n,) their positions in the batch's flat arrays
    tokens: torch.Tensor  # (T,) prompt and response of each, end to end
    cu_seqlens: torch.Tensor  # (S + 1,)
    max_seqlen: int
    targets: torch.Tensor  # (n,) indices of the response tokens in `tokens`
    offsets: torch.Tensor  # (S + 1,) borders of the responses among the n targets


def pack(batch: Batch, rollouts: np.ndarray, device: torch.device) -> Micro:
    """These rollouts in one row, end to end. Of none: tokens that nothing is asked of, for a rank that has no work
    but must be there when the others gather weights and sum gradients. (Two tokens: one alone would have torch.compile
    make graphs for it.)"""
    sequences = [np.concatenate((batch.prompts[batch.owner[r]], batch.response(r))).astype(np.int64) for r in rollouts]
    length, sequences, none = batch.lengths[rollouts], sequences or [np.zeros(2, np.int64)], [np.zeros(0, np.int64)]
    total = np.array([len(s) for s in sequences])
    end = total.cumsum()
    targets = np.concatenate(none + [np.arange(e - n, e) for e, n in zip(end, length, strict=False)])
    places = np.concatenate(none + [np.arange(*batch.offsets[r : r + 2]) for r in rollouts])

    def put(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(device, non_blocking=True)

    return Micro(rollouts, places, put(np.concatenate(sequences)), put(np.concatenate(([0], end))), int(total.max()),
                 put(targets), put(np.concatenate(([0], length.cumsum()))))


# ------------------------------------------------------------------------------------------------ the trainer


class Clock:
    """Wall-clock seconds by phase of one step."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        progress(phase)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self) -> dict[str, float]:
        return {k: round(v, 6) for k, v in {**self.seconds, "total": time.perf_counter() - self.start}.items()}


def adversaries(cfg: Config) -> tuple[DifficultyBins, PromptGDRO, RolloutGDRO]:
    """Bins and adversaries of a mode. One that does not act is the same object with eta 0, or with one arm."""
    try:
        edges = [float(e) for e in cfg.bin_edges.split(",") if e.strip()]
    except ValueError as error:
        raise ValueError(f"--bin_edges must be numbers with commas between them, got {cfg.bin_edges!r}") from error
    bins = DifficultyBins(edges, history=cfg.bin_history, decay=cfg.bin_decay,
                          hysteresis=cfg.bin_hysteresis, success=cfg.bin_success, unseen_rate=cfg.unseen_rate)
    normalize = cfg.prompt_signal == "surrogate" if cfg.share_normalize == "auto" else cfg.share_normalize == "on"
    prompt = PromptGDRO(bins.num_bins, eta=cfg.prompt_eta if cfg.mode in ("prompt", "both") else 0.0,
                        beta=cfg.prompt_ema, gamma=cfg.prompt_gamma, score_clip=cfg.score_clip,
                        weight_cap=cfg.weight_cap, share_normalize=normalize, share_floor=cfg.share_floor,
                        mean_one=cfg.mean_one)
    n_bar = cfg.rollouts_per_prompt
    n_min, n_max = (cfg.n_min, cfg.n_max) if cfg.mode in ("rollout", "both") else (n_bar, n_bar)
    rollout = RolloutGDRO(bins.num_bins, n_min=n_min, n_max=n_max, n_bar=n_bar, eta=cfg.rollout_eta,
                          gamma=cfg.rollout_gamma, beta=cfg.rollout_ema, alpha_mu=cfg.alpha_mu,
                          utility=cfg.rollout_utility, budget=cfg.rollout_budget, seed=cfg.seed)
    return bins, prompt, rollout


@dataclass(frozen=True)
class Decision:
    """What bins and adversaries decide about a batch, from what earlier steps saw."""

    bin_P: np.ndarray  # difficulty bin of each prompt
    allocated_P: np.ndarray  # rollouts that Rollout-GDRO gives it
    n_P: np.ndarray  # rollouts that it gets: the same, or n_bar with --allocation weights
    weight_P: np.ndarray  # what multiplies its advantages
    weight_B: np.ndarray  # the same by bin
    score_B: np.ndarray  # Prompt-GDRO's scores behind the weights
    rate_P: np.ndarray  # its estimate (10), for the rule
    mu: float  # Rollout-GDRO's shadow price (21)
    price: float | None  # the marginal value of a rollout in its joint choice


@dataclass(frozen=True)
class Outcome:
    """What a step saw of its prompts."""

    reward_P: np.ndarray  # mean reward of a prompt's rollouts
    correct_P: np.ndarray  # how many of them were right
    loss_P: np.ndarray  # (7), from advantages without the adversary's weight
    signals: dict[str, np.ndarray]  # what Prompt-GDRO may be shown: name -> (P,)
    constant_P: np.ndarray  # whether its rollouts all scored alike
    tokens_B: np.ndarray  # mean response tokens by bin, NaN where it is absent


@dataclass(frozen=True)
class Update:
    """What the optimiser steps of a batch did."""

    tokens: np.ndarray  # (ranks,) that each rank trained on
    surrogate_R: np.ndarray  # J of (5), from weighted advantages
    kl_R: np.ndarray
    loss: float  # this and the norm: means over the optimiser steps
    grad_norm: float
    clip_frac: float  # tokens whose gradient the clip removed
    idle_frac: float  # tokens whose gradient is exactly 0


class Trainer:
    """Everything a run holds. `step` is the algorithm."""

    def __init__(self, cfg: Config, ranks: Ranks, loaded: dict | None = None):
        """`loaded`: what the run to be resumed had loaded; its hub commits are taken again, wherever `main` is now."""
        self.cfg, self.ranks, self.device, self.pinned = cfg, ranks, ranks.device, loaded or {}
        self.bins, self.prompt_gdro, self.rollout_gdro = adversaries(cfg)
        self.record: dict = {}  # what was loaded, for config.json
        self.grader = Grader(workers=cfg.grader_workers, timeout=cfg.grader_timeout, reward=cfg.reward)
        if self.grader.source:
            self.record["reward"] = {"sha256": self.grader.source.sha256}
        self._load_model()
        self._load_data()
        say(self.summary())
        cfg = self.cfg  # with the limits that depend on the model
        progress("engine")  # from here on, with all downloads done, the watchdog watches
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay,
                                           fused=True)
        self.optimizer_steps = 0
        self.engine = make_engine(
            self.record["engine"], self.policy.folder, dtype=self.policy.dtype, device=self.device,
            max_prompt_tokens=cfg.max_prompt_tokens, max_response_tokens=cfg.max_response_tokens,
            max_rollouts=cfg.max_rollouts, seed=cfg.seed, gpu_memory_utilization=cfg.gpu_memory_utilization)
        self.expected_tokens_B = np.full(self.bins.num_bins, 1.0)  # response tokens by bin, to deal out generation
        self.next_step = 0

    # -- setting up

    def _load_model(self) -> None:
        cfg = self.cfg
        revision = self.pinned.get("model", {}).get("folder") or (
            None if cfg.model_revision == "main" else cfg.model_revision)
        self.policy = Policy.open(tasks.model_folder(cfg.model, revision), dtype=cfg.dtype, device=self.device,
                                  stop_tokens=cfg.stop_tokens)
        prompt, response = self.policy.config.limits(cfg.max_prompt_tokens, cfg.max_response_tokens)
        self.cfg = cfg = dataclasses.replace(cfg, max_prompt_tokens=prompt, max_response_tokens=response)
        engine, why = choose_engine(cfg.engine, self.device)
        say(f"engine: {engine}. {why}")
        if self.device.type == "cuda":
            check_memory(self.policy.config, dataclasses.replace(cfg, engine=engine), self.ranks.world,
                         self.ranks.in_node, torch.cuda.mem_get_info())
        load = partial(Transformer.from_pretrained, self.policy.folder, device=self.device,
                       shard=partial(shard, ranks=self.ranks, compute=self.policy.dtype))
        self.model = load(dtype=torch.float32)  # at lr 1e-6 an update is far below what bf16 resolves
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        self.reference = load(dtype=self.policy.dtype).requires_grad_(False) if cfg.kl_beta else None
        if self.device.type == "cuda" and cfg.compile:
            for model in filter(None, (self.model, self.reference)):
                model.compile_blocks()
        # The folder's name is a commit or a recipe's hash; the head's hash tells apart folders that share a name.
        head = full(self.model.head, self.policy.dtype).cpu()
        head = hashlib.blake2b(head.view(torch.uint8).numpy(), digest_size=8).hexdigest()
        self.record |= {"model": {"name": portable(cfg.model), "folder": self.policy.folder.name, "head": head},
                        "engine": engine}

    def _load_data(self) -> None:
        cfg = self.cfg
        problems = self._load("train_data", "train", cfg.train_data, cfg.train_revision, cfg.train_problems)
        if cfg.eval_data:
            held_out = self._load("eval_data", "heldout", cfg.eval_data, cfg.eval_revision, cfg.eval_problems)
        else:
            count = min(200, max(1, len(problems) // 10))
            problems, held_out = problems[:-count], problems[-count:][: cfg.eval_problems or None]
            self.record["eval_data"] = {"held out of": "train_data", "last": count}
        self.problems, self.prompts = self._encode("train_data", problems)
        self.eval_set = self._encode("eval_data", held_out)
        batch_order(len(self.problems), cfg.prompts_per_step, cfg.seed, 0)  # raises when there are too few

    def _load(self, name: str, split: str, source: str, revision: str, limit: int) -> list[Problem]:
        commit = self.pinned.get(name, {}).get("revision") or (None if revision == "main" else revision)
        problems, self.record[name] = tasks.load(source, split=split, limit=limit, revision=commit)
        return problems

    def _encode(self, name: str, problems: list[Problem]) -> tuple[list[Problem], list[list[int]]]:
        cfg = self.cfg
        problems, tokens, counts = encode_prompts(
            problems, self.policy.tokenizer, suffix=cfg.prompt_suffix, chat_template=cfg.chat_template,
            max_tokens=cfg.max_prompt_tokens)
        if cfg.answer_style != "auto":
            problems = [dataclasses.replace(p, style=cfg.answer_style) for p in problems]
        styles, golds = sorted({p.style for p in problems}), check_golds(
            problems, self.grader, allowed=cfg.allow_bad_golds, name=name)
        self.record[name] |= {"encoded": counts, "problems": len(problems), "styles": styles, **golds}
        dropped = f", {counts['too_long']} over {cfg.max_prompt_tokens} tokens dropped" if counts["too_long"] else ""
        say(f"{name}: {len(problems)} problems{dropped}")
        return problems, tokens

    def summary(self) -> str:
        """One sentence: what is trained on what, how it is asked, where the answer is looked for, what ends it."""
        cfg, styles = self.cfg, ", ".join(self.record["train_data"]["styles"])
        asked = "through the chat template" if self.record["train_data"]["encoded"]["chat_template"] else "as they are"
        stops = ", ".join(map(repr, self.policy.tokenizer.convert_ids_to_tokens(list(self.policy.stop_ids))))
        return (f"{portable(cfg.model)} on {portable(cfg.train_data)}: prompts go in {asked}"
                + (f" with {cfg.prompt_suffix!r} behind them" if cfg.prompt_suffix else "")
                + (f", {cfg.reward} grades the responses" if cfg.reward else f", answers are looked for as {styles}")
                + f", {stops} or {cfg.max_response_tokens} tokens end a response")

    # -- one step

    def step(self, step: int) -> tuple[dict, list[dict]]:
        """One batch: (a line for metrics.jsonl, lines for samples.jsonl). `step` counts from 0."""
        cfg, clock = self.cfg, Clock(self.device)
        progress(step=step)
        index_P = batch_order(len(self.problems), cfg.prompts_per_step, cfg.seed, step)
        problems, prompts = [self.problems[i] for i in index_P], [self.prompts[i] for i in index_P]
        ids_P = [p.id for p in problems]

        with clock("adversary"):
            decided = self.decide(ids_P)
        with clock("generate"):
            sampling = Sampling(cfg.max_response_tokens, cfg.temperature, stop_ids=self.policy.stop_ids)
            seed_P = [rollout_seed(cfg.seed, step, i) for i in ids_P]
            part = draw_part(self.engine, self.ranks, prompts, decided.n_P, seed_P, sampling,
                             self.expected_tokens_B[decided.bin_P])
            self.engine.sleep()
        with clock("reward"):  # while other ranks still decode
            grades = self.grade(part, problems)
        with clock("exchange"):
            batch, reward_R, unclear, load = self.exchange(part, grades, clock)
        with clock("advantage"):
            advantage_R, constant_P, factor_P = self.advantages(reward_R, decided)
            # Without a KL term a rollout of advantage 0 adds exactly 0 to loss, statistics and gradient: left out.
            acts_R = (advantage_R != 0) | bool(cfg.kl_beta)
        with clock("logprob"):
            old_N, ref_N, measured = self.behaviour(batch, acts_R, step)
        with clock("update"):
            update = self.update(batch, decided.n_P, advantage_R, acts_R, old_N, ref_N, step)
        with clock("sync"):
            self.engine.load_weights(self.weights())
        with clock("adversary"):
            outcome = self.outcome(decided, batch, reward_R, constant_P, update)
            self._end_step(ids_P, decided, outcome, update.grad_norm)

        line = {"step": step, "mode": cfg.mode, "seed": cfg.seed, "seconds": clock.total(),
                **batch.stats(), **unclear, **measured, **self.log_line(decided, outcome, update),
                "ranks": {**load, "tokens_trained": update.tokens}, "eval": None}
        first_P = (decided.n_P.cumsum() - decided.n_P)[:4]  # each prompt's first rollout
        texts = to_text(self.policy.tokenizer, map(batch.response, first_P))
        samples = [{"step": step, "id": ids_P[p], "bin": decided.bin_P[p], "n": decided.n_P[p],
                    "weight": decided.weight_P[p], "factor": factor_P[p], "answer": problems[p].answer,
                    "found": None if cfg.reward else extract(texts[p], problems[p].style),
                    "reward": reward_R[r], "right": reward_R[r] > 0, "truncated": batch.truncated[r],
                    "prompt": problems[p].prompt, "response": texts[p]} for p, r in enumerate(first_P)]
        return jsonable(line), jsonable(samples)

    def decide(self, ids_P: list[str]) -> Decision:
        """How many rollouts each prompt gets and how much its advantages weigh. Changes nothing."""
        bin_P = self.bins.lookup(ids_P)
        allocated_P, weight_B = self.rollout_gdro.allocate(bin_P), self.prompt_gdro.weights(bin_P)
        n_P, weight_P = allocated_P, weight_B[bin_P]
        if self.cfg.allocation == "weights":
            n_bar = self.cfg.rollouts_per_prompt
            factor_B = means_by(bin_P, allocated_P / n_bar, self.bins.num_bins)
            n_P, weight_P = np.full_like(allocated_P, n_bar), weight_P * allocated_P / n_bar
            weight_B = weight_B * np.where(np.isnan(factor_B), 1.0, factor_B)
        return Decision(bin_P, allocated_P, n_P, weight_P, weight_B, self.prompt_gdro.score_B,
                        self.bins.rates(ids_P), self.rollout_gdro.mu, self.rollout_gdro.shadow_price_dp)

    def advantages(self, reward_R: np.ndarray, decided: Decision) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(3) times the rule's factor times (16), (R,); which prompts' rollouts all scored alike, (P,) bool; the
        factors, (P,)."""
        offsets_P = np.concatenate(([0], decided.n_P.cumsum()))
        correct_P = np.add.reduceat((reward_R > 0).astype(int), offsets_P[:-1])
        factor_P = RULES[self.cfg.rule](correct_P, decided.n_P, decided.rate_P)
        rewards, offsets, weights = (torch.from_numpy(x).to(self.device)
                                     for x in (reward_R, offsets_P, factor_P * decided.weight_P))
        advantage, constant = group_advantage(rewards, offsets, weights, clip=self.cfg.advantage_clip)
        return advantage.cpu().numpy(), constant.cpu().numpy(), factor_P

    def update(self, batch: Batch, n_P, advantage_R: np.ndarray, acts_R: np.ndarray, old_N, ref_N, step: int) -> Update:
        """The optimiser steps of one batch, one a mini-batch of prompts; every weight is fixed before any split."""
        cfg, P = self.cfg, len(n_P)
        # Of each rollout: J, KL, clipped tokens, tokens with a gradient. A rank fills its own; 0 for those left out.
        stats = np.zeros((4, len(batch.owner)))
        losses, norms, tokens = [], [], np.zeros(self.ranks.world)
        self.model.train()
        for start in range(0, P, cfg.minibatch_prompts):
            prompts = np.arange(start, min(start + cfg.minibatch_prompts, P))
            weight_R = self.token_weights(batch, n_P, prompts)
            loss_sum, (micros, load) = np.zeros(1), self.micro_batches(batch, acts_R & (weight_R > 0))
            tokens += load
            for micro in micros:
                out = self.token_loss(micro, advantage_R, weight_R, old_N, ref_N)
                out.loss.backward()
                loss_sum += out.loss.item()
                active = micro.offsets.diff() - out.idle
                stats[:, micro.rollouts] = torch.stack((out.surrogate, out.kl, out.clipped, active)).cpu().numpy()
            losses.append(float(self.ranks.merge(loss_sum)[0]))
            if not np.isfinite(losses[-1]):
                raise RunError(f"step {step}: the loss is {losses[-1]}; {DIVERGED}")
            norms.append(self.optimizer_step(f"step {step}"))
        surrogate_R, kl_R, clipped_R, active_R = self.ranks.merge(stats)
        N = len(batch.tokens)
        return Update(tokens, surrogate_R, kl_R, float(np.mean(losses)), float(np.mean(norms)),
                      clip_frac=float(clipped_R.sum() / N), idle_frac=float(1 - active_R.sum() / N))

    def optimizer_step(self, where: str) -> float:
        """Clips the gradient, updates, frees it. Returns the norm before clipping.

        Raises RunError, with the weights untouched, when the norm is not finite.
        """
        gradients = [p.grad for p in self.model.parameters()]
        # One rank's norm for all: nodes that hold copies must clip alike to the last bit.
        norm = self.ranks.from_all(float(full(torch.nn.utils.get_total_norm(gradients))))[0]
        if not np.isfinite(norm):
            raise RunError(f"{where}: the gradient norm is {norm}; {DIVERGED}")
        for gradient in gradients:
            gradient.mul_(min(1.0, self.cfg.grad_clip / (norm + 1e-6)))
        self.optimizer.step()
        self.optimizer.zero_grad()  # freed: vLLM wants the memory
        self.optimizer_steps += 1
        return norm

    def token_weights(self, batch: Batch, n_P: np.ndarray, prompts: np.ndarray) -> np.ndarray:
        """Weight of one token of each rollout in the loss of the mini-batch `prompts`, (R,); they sum to 1 over it."""
        inside = np.isin(batch.owner, prompts)
        length_R = batch.lengths
        weight_R = {
            "prompt": 1 / (len(prompts) * n_P[batch.owner] * length_R),  # (5)-(7): responses, rollouts, prompts
            "rollout": 1 / (inside.sum() * length_R),
            "token": np.full(len(length_R), 1 / length_R[inside].sum()),
        }[self.cfg.averaging]
        return np.where(inside, weight_R, 0.0)

    def token_loss(self, micro: Micro, advantage_R: np.ndarray, weight_R, old_N, ref_N):
        cfg = self.cfg

        def put(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x.astype(np.float32)).to(self.device)

        return grpo_token_loss(
            self.logprobs(self.model, micro), put(old_N[micro.places]),
            put(advantage_R[micro.rollouts]), micro.offsets, put(weight_R[micro.rollouts]),
            eps_low=cfg.eps_low, eps_high=cfg.eps_high, beta=cfg.kl_beta,
            ref_logp=None if ref_N is None else put(ref_N[micro.places]))

    def outcome(self, decided: Decision, batch: Batch, reward_R, constant_P, update: Update) -> Outcome:
        """What the step has to tell the adversaries."""
        # (7) without the adversary's weight: the clipped surrogate (5) is linear in a positive weight.
        loss_R = -update.surrogate_R / decided.weight_P[batch.owner] + self.cfg.kl_beta * update.kl_R
        P = len(decided.bin_P)
        loss_P, reward_P = means_by(batch.owner, loss_R, P), means_by(batch.owner, reward_R, P)
        return Outcome(
            reward_P, np.bincount(batch.owner, weights=reward_R > 0, minlength=P).astype(int), loss_P,
            {name: signal(loss_P, reward_P, decided.n_P) for name, signal in SIGNALS.items()}, constant_P,
            means_by(decided.bin_P[batch.owner], batch.lengths, self.bins.num_bins))

    def _end_step(self, ids_P: list[str], decided: Decision, outcome: Outcome, grad_norm: float) -> None:
        """The one place where adversaries and bins change; the same on every rank, which is checked."""
        self.prompt_gdro.update(decided.bin_P, outcome.signals[self.cfg.prompt_signal])
        self.rollout_gdro.update(decided.bin_P, decided.n_P, outcome.loss_P, outcome.correct_P)
        self.bins.update(ids_P, outcome.correct_P, decided.n_P)
        self.expected_tokens_B = np.where(np.isnan(outcome.tokens_B), self.expected_tokens_B, outcome.tokens_B)
        touched = (self.prompt_gdro.score_B, self.rollout_gdro.log_prob_BK(), self.bins.lookup(ids_P),
                   self.expected_tokens_B, np.array([self.rollout_gdro.mu, grad_norm]))
        digest = hashlib.blake2b(b"".join(a.tobytes() for a in touched), digest_size=8).digest()
        self.ranks.assert_equal(int.from_bytes(digest, "big") >> 1, "the adversaries' state after this step")

    # -- what a step calls

    def grade(self, part: Part, problems: list[Problem]) -> list[Grade]:
        """Of this rank's responses. Not collective."""
        return self.grader.grade(to_text(self.policy.tokenizer, [r.tokens for r in part.rollouts]),
                                 [problems[p] for p in part.owner_R[part.mine_R]],
                                 cut=np.array([r.truncated for r in part.rollouts], bool))

    def exchange(self, part: Part, grades: list[Grade], clock: Clock) -> tuple[Batch, np.ndarray, dict, dict]:
        """What all ranks drew, with rewards in [-1, 1] (R,) float64; how many are -1 for want of a verdict; by rank its
        tokens, and the share of the time until here that it waits for the slowest."""
        ranks = self.ranks
        spent = np.array(ranks.from_all(time.perf_counter() - clock.start))
        batch, reward_R = part.exchange(ranks), np.zeros(len(part.owner_R))
        reward_R[part.mine_R] = [g.reward for g in grades]
        timeouts, failures = ranks.merge(np.array([sum(g.timed_out for g in grades), sum(g.failed for g in grades)]))
        if self.cfg.reward and failures and failures == (~batch.truncated).sum():  # of all that it was asked about
            raise RunError(f"--reward {self.cfg.reward} failed on all {failures} responses: it raises (the first "
                           "traceback stands above), or gives no number in [-1, 1]")
        tokens = np.bincount(part.rank_P[batch.owner], weights=batch.lengths, minlength=ranks.world)
        return (batch, ranks.merge(reward_R), {"reward_timeouts": timeouts, "reward_failures": failures},
                {"tokens_generated": tokens, "idle_frac": 1 - spent / spent.max()})

    @torch.no_grad()
    def behaviour(self, batch: Batch, acts_R: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray | None, dict]:
        """Log-probs (N,) of the response tokens under the policy that drew them and under the base (None without a KL
        term), and what was measured of the policy. Taken where they are needed, 0 elsewhere.

        Measured is the first rollout of every MEASURE_EVERY-th prompt, whatever its reward: entropy and mismatch must
        not depend on who has an advantage.
        """
        measured_R = np.diff(batch.owner, prepend=-1) * (batch.owner % MEASURE_EVERY == 0) > 0
        out = np.zeros((3, len(batch.tokens)), np.float32)
        old_N, ref_N, entropy_N = out  # views: what is written to them stands in `out`
        for wanted_R, measure in ((measured_R, True), (acts_R & ~measured_R, False)):
            for micro in self.micro_batches(batch, wanted_R)[0]:
                if measure:
                    logp, entropy = self.logprobs(self.model, micro, entropy=True)
                    entropy_N[micro.places] = entropy.cpu().numpy()
                else:
                    logp = self.logprobs(self.model, micro)
                old_N[micro.places] = logp.cpu().numpy()
                if self.reference is not None:
                    ref_N[micro.places] = self.logprobs(self.reference, micro).cpu().numpy()
        if self.reference is not None:
            reshard(self.reference)
        old_N, ref_N, entropy_N = self.ranks.merge(out)
        measured_N = np.repeat(measured_R, batch.lengths)
        mismatch_N = self.check_mismatch(batch.sampler_logp, old_N, measured_N, step)
        return old_N, ref_N if self.reference is not None else None, {
            "entropy": entropy_N[measured_N].mean(), "mismatch": {"mean": mismatch_N.mean(), "max": mismatch_N.max()},
            "measured": {"rollouts": measured_R.sum(), "tokens": measured_N.sum()}}

    def check_mismatch(self, sampler_N: np.ndarray, old_N: np.ndarray, measured_N: np.ndarray, step: int) -> np.ndarray:
        """|log-prob of the sampler - log-prob of the trainer| of the measured tokens; raises when it is no longer
        rounding."""
        for whose, logp_N in (("sampler", sampler_N), ("trainer", old_N)):
            if bad := int((~np.isfinite(logp_N)).sum()):
                raise RunError(f"step {step}: {bad} of {len(logp_N)} log-probs of the {whose} are not finite numbers: "
                               "its forward pass breaks down. Nothing was updated; --dtype float32, or the other "
                               "--engine, tells whether the weights or the arithmetic are at fault")
        mismatch_N = np.abs(sampler_N - old_N)[measured_N]
        if mismatch_N.mean() > self.cfg.max_mismatch:
            raise RunError(
                f"step {step}: sampler and trainer log-probs differ by {mismatch_N.mean():.4f} on average (at most "
                f"{mismatch_N.max():.2f}), more than --max_mismatch {self.cfg.max_mismatch}: the sampler's weights are "
                "stale or its arithmetic differs. Nothing was updated; try --engine torch to tell which")
        return mismatch_N

    def logprobs(self, model: Transformer, micro: Micro, *, entropy: bool = False):
        progress()
        return model.logprobs(micro.tokens, micro.cu_seqlens, micro.max_seqlen, micro.targets,
                              temperature=self.cfg.temperature, entropy=entropy)

    def micro_batches(self, batch: Batch, wanted_R: np.ndarray) -> tuple[list[Micro], np.ndarray]:
        """This rank's part of the wanted rollouts, dealt out by tokens, in rows; the tokens of each rank."""
        rollouts = np.flatnonzero(wanted_R)
        cost = batch.cost()[rollouts]
        rows = deal_rows(cost, self.cfg.microbatch_tokens, self.ranks.world)
        return ([pack(batch, rollouts[row], self.device) for row in rows[self.ranks.rank]],
                np.array([sum(cost[row].sum() for row in mine) for mine in rows]))

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor in the dtype of a forward pass), one at a time. Collective."""
        for name, p in self.model.named_parameters():
            progress()
            yield name, full(p, self.policy.dtype)

    def log_line(self, decided: Decision, outcome: Outcome, update: Update) -> dict:
        """What metrics.jsonl says of a step beyond its rollouts; by bin, B entries each, NaN for an absent bin."""
        cfg, B, constant_P = self.cfg, self.bins.num_bins, outcome.constant_P

        def mean_B(value_P: np.ndarray) -> np.ndarray:
            return means_by(decided.bin_P, value_P, B)

        return {
            "reward_mean": outcome.reward_P.mean(), "solved_frac": (outcome.correct_P > 0).mean(),
            "zero_std_frac": constant_P.mean(), "zero_std_rollouts_frac": constant_P @ decided.n_P / decided.n_P.sum(),
            "loss": update.loss, "kl": float(update.kl_R.mean()), "clip_frac": update.clip_frac,
            "idle_frac": update.idle_frac, "grad_norm": update.grad_norm, "lr": cfg.learning_rate,
            "shadow_price": decided.mu, "shadow_price_dp": decided.price,
            "bins": {"share": bin_shares(decided.bin_P, B), "reward": mean_B(outcome.reward_P),
                     "score": decided.score_B, "weight": decided.weight_B, "allocated": mean_B(decided.allocated_P),
                     "rollouts": mean_B(decided.n_P), "tokens": outcome.tokens_B},
            "signals": {name: {"mean": mean_B(value_P), "error": errors_by(decided.bin_P, value_P, B)}
                        for name, value_P in outcome.signals.items()},
            "surrogate_abs": [np.abs(outcome.loss_P[start : start + cfg.minibatch_prompts]).mean()
                              for start in range(0, len(outcome.loss_P), cfg.minibatch_prompts)]}

    def evaluate(self, step: int) -> Evaluation:
        """mean@k and pass@k on the held-out problems with the current weights; seeds do not depend on the step."""
        cfg, (problems, prompts) = self.cfg, self.eval_set
        progress("evaluate", step=step)
        sampling = Sampling(cfg.max_response_tokens, cfg.eval_temperature, cfg.eval_top_p, cfg.eval_top_k,
                            self.policy.stop_ids)
        seed_P = [rollout_seed(cfg.seed, -1, p.id) for p in problems]
        clock = Clock(self.device)
        part = draw_part(self.engine, self.ranks, prompts, [cfg.eval_rollouts] * len(problems), seed_P, sampling,
                         bar=True)
        batch, reward_R, _, _ = self.exchange(part, self.grade(part, problems), clock)
        return Evaluation.of(step, [p.kind for p in problems], reward_R.reshape(len(problems), -1) > 0,
                             float(batch.lengths.mean()), float(batch.truncated.mean()))

    # -- going on

    def tensors(self) -> dict[str, torch.Tensor]:
        """The live weights and AdamW's moments of them, shards where they are sharded: weight.NAME, exp_avg.NAME,
        exp_avg_sq.NAME. Moments are 0 before the first update."""
        out = {}
        for name, p in self.model.named_parameters():
            moments = self.optimizer.state[p]
            if not moments:
                moments |= {"step": torch.zeros((), device=self.device), "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p)}
            out |= {f"weight.{name}": p.detach(), **{f"{k}.{name}": moments[k] for k in ("exp_avg", "exp_avg_sq")}}
        return out

    def checkpoint(self, evaluations: list[Evaluation]) -> tuple[dict, dict, dict]:
        """All that is needed to go on exactly: tensors, arrays, and a state that is JSON."""
        parts = {"bins": self.bins, "prompt": self.prompt_gdro, "rollout": self.rollout_gdro}
        arrays = {f"{name}/{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}
        return self.tensors(), {**arrays, "expected_tokens": self.expected_tokens_B}, {
            "next_step": self.next_step, "optimizer_steps": self.optimizer_steps,
            "evaluations": [e.to_json() for e in evaluations]}

    def restore(self, arrays: dict, state: dict) -> list[Evaluation]:
        """Takes over what `checkpoint` gave, but for the tensors, which were filled in place; the evaluations until
        then."""
        self.optimizer_steps = state["optimizer_steps"]
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.optimizer_steps)
        for name, part in (("bins", self.bins), ("prompt", self.prompt_gdro), ("rollout", self.rollout_gdro)):
            part.load_state_dict({k.split("/")[1]: v for k, v in arrays.items() if k.startswith(name + "/")})
        self.expected_tokens_B, self.next_step = arrays["expected_tokens"], state["next_step"]
        return [Evaluation.from_json(e) for e in state["evaluations"]]


# ------------------------------------------------------------------------------------------------ the loop


class StopSignal:
    """Ctrl-C and SIGTERM ask for a stop after the step; a second Ctrl-C is the ordinary one."""

    def __init__(self):
        self.asked = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = 1
        say("stopping after this step (again to stop at once)")


def set_up(cfg: Config, preset: str, resume: bool) -> tuple[Trainer, RunFolder, list[Evaluation]]:
    """Everything loaded and checked, the run folder begun or reopened, the weights in the engine."""
    adversaries(cfg)  # raises what is wrong with a value before a folder is looked at
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    # Collectives outlast the watchdog, which says more than they do when a rank is missing.
    ranks, folder = Ranks(max(900, 2 * cfg.stall_seconds)), RunFolder(cfg)
    ranks.check_work(cfg.prompts_per_step, cfg.minibatch_prompts * cfg.rollouts_per_prompt)
    loaded = folder.open(resume)
    folder.assert_shared(ranks)
    trainer = Trainer(cfg, ranks, loaded)
    tensors, evaluations = trainer.tensors(), []
    if saved := folder.load(tensors, ranks):
        evaluations = trainer.restore(*saved)
    elif resume:
        say(f"--resume: {folder.path} has no checkpoint yet, starting from the beginning")
    if ranks.rank == 0:
        if saved:
            folder.go_on(trainer.next_step, jsonable(trainer.record))
            folder.write_evaluations(evaluations)
        else:
            folder.start(preset, jsonable(trainer.record))
        folder.forget_after(trainer.next_step)
    trainer.engine.load_weights(trainer.weights())
    return trainer, folder, evaluations


def train(trainer: Trainer, folder: RunFolder, evaluations: list[Evaluation]) -> bool:
    """Steps, evaluations and checkpoints up to cfg.steps; False when it was asked to stop before the end. The policy of
    the best evaluation stays in best/."""
    cfg, first, stop = trainer.cfg, trainer.ranks.rank == 0, StopSignal()
    tracker = Tracker(cfg.tracker if first else "none", folder.path)

    def evaluate() -> dict:
        evaluations.append(trainer.evaluate(trainer.next_step))
        latest = evaluations[-1]
        if first:
            folder.write_evaluations(evaluations)
        if trainer.next_step and all(latest.passes[e.k] > e.passes[e.k] for e in evaluations[:-1]):
            trainer.policy.save(trainer.model, folder.path / "best", write=first)
            if first:
                write_json(folder.path / "best" / "evaluation.json", latest.to_json())
        say(latest.line())
        return {k: v for k, v in latest.to_json().items() if k != "by_kind"}

    def due() -> bool:
        return trainer.next_step == cfg.steps or bool(cfg.eval_every and trainer.next_step % cfg.eval_every == 0)

    def asked() -> bool:
        return bool(trainer.ranks.merge(np.array([stop.asked]))[0])  # all ranks stop, or none

    missed = trainer.next_step > 0 and due() and trainer.next_step not in [e.step for e in evaluations]
    if (cfg.eval_first and not evaluations) or missed:  # a stop does not wait for the evaluation that was due
        evaluate()
    bar = tqdm(total=cfg.steps, initial=trainer.next_step, desc=f"{cfg.mode} seed {cfg.seed}", unit="step",
               disable=not first)
    begun, stopping = [], asked()
    while trainer.next_step < cfg.steps and not stopping:
        line, samples = trainer.step(trainer.next_step)
        trainer.next_step += 1
        done, stopping = trainer.next_step, asked()
        last = done == cfg.steps
        if last or (due() and not stopping):
            line["eval"] = evaluate()
        if first:
            folder.append("metrics.jsonl", [line])
            folder.append("samples.jsonl", samples)
            tracker.log(line)
        if len(begun) < 3:
            begun.append(line)
            if len(begun) == 3 and (hint := nothing_to_learn(begun, cfg)):
                say(hint)
        bar.update()
        bar.set_postfix(reward=f"{line['reward_mean']:+.3f}", solved=f"{line['solved_frac']:.2f}",
                        cut=f"{line['truncated_frac']:.0%}", tokens=f"{line['response_tokens_mean']:.0f}",
                        mismatch=f"{line['mismatch']['mean']:.0e}")
        progress("save")
        if stopping or last or (cfg.save_every and done % cfg.save_every == 0):
            folder.save(*trainer.checkpoint(evaluations), cfg.keep, trainer.ranks)
    bar.close()
    return trainer.next_step >= cfg.steps


def nothing_to_learn(lines: list[dict], cfg: Config) -> str | None:
    """What to look at when none of these steps could teach anything, or None."""
    if all(line["truncated_frac"] == 1 for line in lines):
        return (f"WARNING: every response of the first {len(lines)} steps was cut at {cfg.max_response_tokens} tokens "
                "and counts as wrong. Does the model end its responses? Look at samples.jsonl, --stop_tokens, "
                "--chat_template, --max_response_tokens")
    if all(line["zero_std_frac"] == 1 for line in lines):
        same = {line["solved_frac"] for line in lines}
        what = {0.0: "no response was right", 1.0: "every response was right"}.get(
            same.pop() if len(same) == 1 else None, "all rollouts of a prompt scored alike")
        return (f"WARNING: in the first {len(lines)} steps {what}: all advantages are 0 and nothing is learned. Look "
                "at samples.jsonl: does a response say its answer where --answer_style looks, does --prompt_suffix or "
                "--chat_template ask for it, are the problems of the right difficulty?")
    return None


def main() -> None:
    try:
        cfg, preset, resume = parse_args()
    except (ValueError, OSError, RunError) as error:
        sys.exit(f"train.py: {error}")
    with watching(Path(cfg.out_dir), cfg.stall_seconds):
        run(cfg, preset, resume)


def run(cfg: Config, preset: str, resume: bool) -> None:
    """The command: sets up, trains, saves the policy, says how it ended, and exits."""
    try:
        trainer, folder, evaluations = set_up(cfg, preset, resume)
    except KeyboardInterrupt:
        sys.exit(130)  # while it loads: nothing is lost
    except (ValueError, OSError, RunError) as error:  # what was given; a later ValueError is a bug and keeps its trace
        sys.exit(f"train.py: {error}")
    try:
        with trainer.grader, folder.full_disk_explained(12 * trainer.policy.config.num_parameters()):
            begun = trainer.next_step
            complete = train(trainer, folder, evaluations)
            saved = trainer.ranks.from_all((folder.path / "model").exists())[0]
            if trainer.next_step > begun or not saved:
                trainer.policy.save(trainer.model, folder.path / "model", write=trainer.ranks.rank == 0)
    except RunError as error:
        sys.exit(f"train.py: {error}")
    if complete and begun >= trainer.cfg.steps:
        say(f"already at {trainer.next_step} of {trainer.cfg.steps} steps; --steps N goes on")
    if complete:
        say(table(evaluations[:1] + evaluations[1:][-1:]))
        say(f"\nmodel: {folder.path / 'model'}   log: {folder.path / 'metrics.jsonl'}")
    else:
        say(f"stopped after {trainer.next_step} steps; go on with: python train.py --out_dir {folder.path} --resume")
    trainer.engine.close()
    ranks = trainer.ranks
    del trainer
    ranks.leave()
    sys.exit(0 if complete else 130)


if __name__ == "__main__":
    main()
