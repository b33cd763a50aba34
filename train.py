"""GRPO with two adversaries, in one file: `python train.py --preset arithmetic --mode prompt`.

`Trainer.step` is the algorithm, top to bottom. GRPO, Prompt-GDRO, Rollout-GDRO and both together are one path: in mode
"grpo" every prompt's weight is 1 and every prompt's number of rollouts is n_bar. Apart from the policy and its
optimiser, state changes only at the end of a step, in `Trainer._end_step`.

With torchrun every rank holds the whole batch and a copy of everything; work (prompts to sample, rollouts to train on)
is shared out by tokens, and results meet in one collective: a sum of arrays in which each rank filled its own places.
"""

import dataclasses
import hashlib
import json
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import tasks
from config import Config, check, parse_args
from data import Problem, batch_order, encode_prompts, load_problems, stop_token_ids
from gdro import (
    SIGNALS,
    DifficultyBins,
    PromptGDRO,
    RolloutGDRO,
    bin_shares,
    errors_by,
    means_by,
)
from kernels import group_advantage, grpo_token_loss
from metrics import Evaluation, table
from model import ModelConfig, Transformer, fetch
from ranks import Ranks, RunError, say, share_out
from reward import Grader
from rollout import (
    Batch,
    Sampling,
    TorchEngine,
    VLLMEngine,
    choose_engine,
    draw_together,
    make_engine,
    rollout_seed,
)
from runfolder import (
    RunFolder,
    full_disk_explained,
    jsonable,
    portable,
    restore,
    save_checkpoint,
    save_model,
)

MEASURE_EVERY = 4  # entropy and mismatch are measured on the first rollout of every fourth prompt of a batch

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


def micro_batches(batch: Batch, rollouts: np.ndarray, max_tokens: int, device: torch.device) -> list[Micro]:
    """Packs `rollouts` into rows of at most max_tokens (a longer one gets its own row), similar lengths together."""
    cost, rows, filled = batch.cost(), [], 0
    for r in rollouts[np.argsort(cost[rollouts], kind="stable")]:
        if not rows or filled + cost[r] > max_tokens:
            rows.append([])
            filled = 0
        rows[-1].append(int(r))
        filled += cost[r]
    return [_micro(batch, np.array(row), device) for row in rows]


def _micro(batch: Batch, rollouts: np.ndarray, device: torch.device) -> Micro:
    sequences = [np.concatenate((batch.prompts[batch.owner[r]], batch.response(r))).astype(np.int64) for r in rollouts]
    length, total = batch.lengths[rollouts], np.array([len(s) for s in sequences])
    end = total.cumsum()
    targets = np.concatenate([np.arange(e - n, e) for e, n in zip(end, length, strict=True)])
    places = np.concatenate([np.arange(batch.offsets[r], batch.offsets[r + 1]) for r in rollouts])

    def put(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(device, non_blocking=True)

    return Micro(rollouts, places, put(np.concatenate(sequences)), put(np.concatenate(([0], end))), int(total.max()),
                 put(targets), put(np.concatenate(([0], length.cumsum()))))


# ------------------------------------------------------------------------------------------------ optimiser


class MasterAdamW:
    """AdamW on one flat float32 master of all weights; the model holds a copy in its own dtype.

    At lr 1e-6 an update is far below bf16's resolution, so bf16 weights alone would hardly move. Gradients, too, are
    accumulated over micro-batches in float32: each parameter's is added to the flat buffer as soon as it is complete.
    """

    def __init__(self, model: Transformer, cfg: Config):
        parameters = list(model.parameters())
        total = sum(p.numel() for p in parameters)
        device = parameters[0].device
        self.weights = torch.empty(total, dtype=parameters[0].dtype, device=device)  # what the model's parameters view
        self.master = torch.nn.Parameter(torch.empty(total, dtype=torch.float32, device=device))
        self.master.grad = torch.zeros_like(self.master)
        start = 0
        for p in parameters:
            place = slice(start, start + p.numel())
            self.weights[place] = p.data.flatten()
            p.data = self.weights[place].view(p.shape)
            p.main_grad = self.master.grad[place].view(p.shape)  # where the head's kernel adds straight away
            p.register_post_accumulate_grad_hook(self._accumulate)
            start = place.stop
        self.master.data.copy_(self.weights)
        self.adam = torch.optim.AdamW([self.master], lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2),
                                      eps=cfg.adam_eps, weight_decay=cfg.weight_decay, fused=True)
        self.base_rate, self.warmup, self.grad_clip, self.count = cfg.learning_rate, cfg.warmup_steps, cfg.grad_clip, 0

    @staticmethod
    def _accumulate(p: torch.Tensor) -> None:
        p.main_grad.add_(p.grad)
        p.grad = None

    @property
    def learning_rate(self) -> float:
        return self.base_rate * min(1.0, (self.count + 1) / max(1, self.warmup))

    @torch.no_grad()
    def step(self, ranks: Ranks, where: str) -> float:
        """Sums the ranks' gradients, clips, updates, clears. Returns the norm before clipping.

        Raises RunError, with the weights untouched, when the norm is not finite.
        """
        gradient = self.master.grad
        ranks.sum_(gradient)
        norm = float(torch.linalg.vector_norm(gradient))
        if not np.isfinite(norm):
            raise RunError(f"{where}: the gradient norm is {norm}; the weights are those before this update. "
                           "--resume goes on from the last checkpoint, with a lower --learning_rate for instance")
        gradient.mul_(min(1.0, self.grad_clip / (norm + 1e-6)))
        self.adam.param_groups[0]["lr"] = self.learning_rate
        self.adam.step()
        self.count += 1
        self.weights.copy_(self.master)
        gradient.zero_()
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self.adam.state.get(self.master, {})
        moments = {k: state[k] for k in ("exp_avg", "exp_avg_sq")} if state else {}
        return {"master": self.master.data, **moments}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], count: int) -> None:
        self.master.copy_(tensors["master"])
        self.weights.copy_(self.master)
        self.count = count
        if count:
            device = self.master.device
            self.adam.state[self.master] = {
                "step": torch.tensor(float(count), device=device),
                **{k: tensors[k].to(device, copy=True) for k in ("exp_avg", "exp_avg_sq")}}


# ------------------------------------------------------------------------------------------------ the trainer


class Clock:
    """Wall-clock seconds by phase of one step."""

    def __init__(self, device: torch.device):
        self.device, self.start = device, time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
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
    bins = DifficultyBins(edges, history=cfg.bin_history,
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


class Trainer:
    """Everything a run holds. `step` is the algorithm."""

    def __init__(self, cfg: Config, ranks: Ranks, loaded: dict | None = None):
        """`loaded`: what the run to be resumed had loaded; its hub commits are taken again, wherever `main` is now."""
        check(cfg)
        self.cfg, self.ranks, self.device, self.pinned = cfg, ranks, ranks.device, loaded or {}
        self.bins, self.prompt_gdro, self.rollout_gdro = adversaries(cfg)
        self.record: dict = {}  # what was loaded, for config.json
        folder = self._load_model()
        self._load_data(folder)
        self.optimizer = MasterAdamW(self.model, cfg)
        self.engine = self._make_engine(folder)
        self.grader = Grader(workers=cfg.grader_workers, timeout=cfg.grader_timeout)
        self.expected_tokens_B = np.full(self.bins.num_bins, 1.0)  # response tokens by bin, to share out generation
        self.next_step = 0

    # -- setting up

    def _load_model(self) -> Path:
        cfg = self.cfg
        if cfg.model in tasks.TASKS:
            folder = tasks.base_model(cfg.model)
        else:
            folder = fetch(cfg.model, self.pinned.get("model", {}).get("folder", cfg.model_revision))
        self.dtype = {"auto": torch.bfloat16 if self.device.type == "cuda" else torch.float32,
                      "bfloat16": torch.bfloat16, "float32": torch.float32}[cfg.dtype]
        self.engine_kind, why = choose_engine(cfg.engine, self.device)
        say(f"engine: {self.engine_kind}. {why}")
        check_memory(folder, cfg, self.device, self.dtype, self.engine_kind)
        self.model = Transformer.from_pretrained(folder, dtype=self.dtype, device=self.device)
        self.model.gradient_checkpointing = cfg.gradient_checkpointing
        self.reference = None
        if cfg.kl_beta:
            self.reference = Transformer.from_pretrained(folder, dtype=self.dtype, device=self.device)
            self.reference.requires_grad_(False)
        longest, needed = self.model.config.max_position_embeddings, cfg.max_prompt_tokens + cfg.max_response_tokens
        if needed > longest:
            raise ValueError(f"--max_prompt_tokens + --max_response_tokens is {needed} and the model's context is "
                             f"{longest}")
        # A hub snapshot's folder is named by its commit, a built-in base's by the hash of its recipe; the head's
        # hash tells apart local folders that share a name.
        head = hashlib.blake2b(self.model.head.detach().cpu().view(torch.uint8).numpy(), digest_size=8).hexdigest()
        self.record |= {"model": {"name": portable(cfg.model), "folder": folder.name, "head": head},
                        "engine": self.engine_kind}
        return folder

    def _load_data(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        cfg = self.cfg
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        generation = folder / "generation_config.json"
        self.generation_config = json.loads(generation.read_text()) if generation.exists() else None
        self.stop_ids = stop_token_ids(self.tokenizer, generation_config=self.generation_config,
                                       override=cfg.stop_tokens)
        self.problems, self.prompts = self._encode("train", cfg.train_data, cfg.train_revision, cfg.train_problems, 640)
        self.eval_set = self._encode("eval", cfg.eval_data, cfg.eval_revision, cfg.eval_problems, 500)
        batch_order(len(self.problems), cfg.prompts_per_step, cfg.seed, 0)  # raises when there are too few

    def _encode(self, name: str, source: str, revision: str, limit: int,
                built_in: int) -> tuple[list[Problem], list[list[int]]]:
        cfg = self.cfg
        task, _, split = source.partition(":")
        if task in tasks.TASKS:
            split = split or ("train" if name == "train" else "heldout")
            problems, record = tasks.problems(task, split, limit or built_in), {"source": task, "split": split}
        else:
            commit = self.pinned.get(f"{name}_data", {}).get("revision")
            problems, record = load_problems(source, revision=commit or (None if revision == "main" else revision))
        problems, tokens, counts = encode_prompts(
            problems[: limit or None], self.tokenizer, suffix=cfg.prompt_suffix, chat_template=cfg.chat_template,
            max_tokens=cfg.max_prompt_tokens)
        if cfg.answer_style != "auto":
            problems = [dataclasses.replace(p, style=cfg.answer_style) for p in problems]
        self.record[f"{name}_data"] = {**record, "encoded": counts, "problems": len(problems),
                                       "styles": sorted({p.style for p in problems})}
        dropped = f", {counts['too_long']} over {cfg.max_prompt_tokens} tokens dropped" if counts["too_long"] else ""
        say(f"{name}: {len(problems)} problems{dropped}")
        return problems, tokens

    def _make_engine(self, folder: Path) -> VLLMEngine | TorchEngine:
        cfg = self.cfg
        return make_engine(self.engine_kind, folder, dtype=self.dtype, device=self.device,
                           max_prompt_tokens=cfg.max_prompt_tokens, max_response_tokens=cfg.max_response_tokens,
                           max_rollouts=cfg.max_rollouts, seed=cfg.seed,
                           gpu_memory_utilization=cfg.gpu_memory_utilization)

    # -- one step

    def step(self, step: int) -> tuple[dict, list[dict]]:
        """One batch: (a line for metrics.jsonl, lines for samples.jsonl). `step` counts from 0."""
        cfg, clock = self.cfg, Clock(self.device)
        index_P = batch_order(len(self.problems), cfg.prompts_per_step, cfg.seed, step)
        problems, prompts = [self.problems[i] for i in index_P], [self.prompts[i] for i in index_P]
        ids_P, P, B = [p.id for p in problems], len(problems), self.bins.num_bins

        with clock("adversary"):
            bin_P = self.bins.lookup(ids_P)  # (P,) from what earlier steps saw
            n_P = self.rollout_gdro.allocate(bin_P)  # (P,)
            weight_P = self.prompt_gdro.weights(bin_P)  # (P,)
            share_B, allocated_B = bin_shares(bin_P, B), means_by(bin_P, n_P, B)
            acted_on = {"score": self.prompt_gdro.score_B, "weight": self.prompt_gdro.weights_by_bin(bin_P),
                        "allocated": allocated_B}
            mu = self.rollout_gdro.mu
            if cfg.allocation == "weights":
                weight_P = weight_P * n_P / cfg.rollouts_per_prompt
                acted_on["weight"] *= np.where(share_B > 0, allocated_B / cfg.rollouts_per_prompt, 1.0)
                n_P = np.full_like(n_P, cfg.rollouts_per_prompt)

        sampling = Sampling(cfg.max_response_tokens, cfg.temperature, stop_ids=self.stop_ids)
        seed_P = [rollout_seed(cfg.seed, step, i) for i in ids_P]
        with clock("generate"):
            batch = self.sample(prompts, n_P, seed_P, sampling, self.expected_tokens_B[bin_P])
            self.engine.sleep()
        with clock("reward"):
            reward_R, timeouts, texts = self.grade(batch, problems)
        with clock("advantage"):
            offsets_P = np.concatenate(([0], n_P.cumsum()))
            rewards, offsets, weights = (torch.from_numpy(x).to(self.device) for x in (reward_R, offsets_P, weight_P))
            advantage_R, constant_P = (x.cpu().numpy() for x in group_advantage(
                rewards, offsets, weights, clip=cfg.advantage_clip, std_normalize=cfg.std_normalize))
        with clock("logprob"):
            # Without a KL term a rollout of advantage 0 adds exactly 0 to loss, statistics and gradient: it is left out.
            acts_R = (advantage_R != 0) | bool(cfg.kl_beta)
            # A fixed sample, whatever the rewards: entropy and mismatch must not depend on who has an advantage.
            measured_R = np.isin(np.arange(len(batch.owner)), offsets_P[:-1:MEASURE_EVERY])
            old_N, ref_N, entropy_N = self.behaviour(batch, acts_R, measured_R)
            measured_N = np.repeat(measured_R, batch.lengths)
            mismatch_N = self.check_mismatch(batch.sampler_logp, old_N, measured_N, step)
        with clock("update"):
            update = self.update(batch, n_P, advantage_R, acts_R, old_N, ref_N, step)
        with clock("sync"):
            self.engine.load_weights(self.model.named_parameters())

        with clock("adversary"):
            # (7) in unweighted advantages: the clipped surrogate (5) is linear in a positive weight.
            loss_R = -update["surrogate_R"] / weight_P[batch.owner] + cfg.kl_beta * update["kl_R"]
            loss_P, reward_P = means_by(batch.owner, loss_R, P), means_by(batch.owner, reward_R, P)
            correct_P = np.bincount(batch.owner, weights=reward_R > 0, minlength=P).astype(int)
            tokens_B = means_by(bin_P[batch.owner], batch.lengths, B)
            signals = {name: signal(loss_P, reward_P, n_P) for name, signal in SIGNALS.items()}
            self._end_step(ids_P, bin_P, n_P, loss_P, signals[cfg.prompt_signal], correct_P, tokens_B,
                           update["grad_norm"])

        line = {
            "step": step, "mode": cfg.mode, "seed": cfg.seed, "seconds": clock.total(),
            "reward_mean": reward_P.mean(), "solved_frac": (correct_P > 0).mean(),
            "zero_std_frac": constant_P.mean(), "zero_std_rollouts_frac": constant_P[batch.owner].mean(),
            **batch.stats(), "entropy": entropy_N[measured_N].mean(),
            **{k: update[k] for k in ("loss", "kl", "clip_frac", "idle_frac", "grad_norm", "lr")},
            "mismatch": {"mean": mismatch_N.mean(), "max": mismatch_N.max()},
            "measured": {"rollouts": measured_R.sum(), "tokens": measured_N.sum()}, "reward_timeouts": timeouts,
            "shadow_price": mu, "shadow_price_dp": self.rollout_gdro.shadow_price_dp,
            "bins": {"share": share_B, "reward": means_by(bin_P, reward_P, B), **acted_on,
                     "rollouts": means_by(bin_P, n_P, B), "tokens": tokens_B},
            "signals": {name: {"mean": means_by(bin_P, value_P, B), "error": errors_by(bin_P, value_P, B)}
                        for name, value_P in signals.items()},
            "surrogate_abs": [np.abs(loss_P[start : start + cfg.minibatch_prompts]).mean()
                              for start in range(0, P, cfg.minibatch_prompts)],
            "eval": None}
        samples = [{"step": step, "id": ids_P[p], "bin": bin_P[p], "n": n_P[p], "weight": weight_P[p],
                    "answer": problems[p].answer, "reward": reward_R[r], "truncated": batch.truncated[r],
                    "prompt": problems[p].prompt, "response": texts[r]} for p, r in enumerate(offsets_P[:-1][:4])]
        return jsonable(line), jsonable(samples)

    def _end_step(self, ids_P, bin_P, n_P, loss_P, signal_P, correct_P, tokens_B, grad_norm) -> None:
        """The one place where adversaries and bins change; the same on every rank, which is checked."""
        self.prompt_gdro.update(bin_P, signal_P)
        self.rollout_gdro.update(bin_P, n_P, loss_P, correct_P)
        self.bins.update(ids_P, correct_P, n_P)
        self.expected_tokens_B = np.where(np.isnan(tokens_B), self.expected_tokens_B, tokens_B)
        touched = (self.prompt_gdro.score_B, self.rollout_gdro.log_prob_BK(), self.bins.lookup(ids_P),
                   self.expected_tokens_B, np.array([self.rollout_gdro.mu, grad_norm]))
        digest = hashlib.blake2b(b"".join(a.tobytes() for a in touched), digest_size=8).digest()
        self.ranks.assert_equal(int.from_bytes(digest, "big") >> 1, "the adversaries' state after this step")

    def sample(self, prompts: list[list[int]], n_P, seed_P: list[int], sampling: Sampling, expected_P) -> Batch:
        """Rollouts of all prompts on all ranks: each rank draws its share, then all hold everything."""
        tokens, logp, offsets, truncated_R = draw_together(self.engine, self.ranks, prompts, n_P, seed_P, sampling,
                                                           expected_P)
        return Batch(prompts, np.repeat(np.arange(len(prompts)), n_P), offsets, tokens, logp, truncated_R)

    def grade(self, batch: Batch, problems: list[Problem]) -> tuple[np.ndarray, int, list[str]]:
        """Rewards in {-1, +1} (R,) float64, time-outs, texts. Each rank grades its share; a cut response is wrong."""
        texts = self.tokenizer.batch_decode([batch.response(r).tolist() for r in range(len(batch.owner))],
                                            skip_special_tokens=True)
        mine_R = np.arange(len(texts)) % self.ranks.world == self.ranks.rank
        ask = np.flatnonzero(mine_R & ~batch.truncated)
        asked = [problems[batch.owner[r]] for r in ask]
        grades = self.grader.grade([texts[r] for r in ask], [p.answer for p in asked], [p.style for p in asked])
        reward_R = np.where(mine_R, -1.0, 0.0)
        reward_R[ask] = [g.reward for g in grades]
        timeouts = np.array([sum(g.timed_out for g in grades)])
        return self.ranks.share(reward_R), int(self.ranks.share(timeouts)[0]), texts

    @torch.no_grad()
    def behaviour(self, batch: Batch, acts_R: np.ndarray, measured_R: np.ndarray):
        """Log-probs (N,) of the response tokens under the policy that drew them and under the base (None without a KL
        term), and the policy's entropy, (N,). Taken where they are needed, 0 elsewhere: the policy's log-probs for
        rollouts that act or are measured, the base's for those that act, the entropy for those that are measured."""
        old_N, ref_N, entropy_N = out = np.zeros((3, len(batch.tokens)), np.float32)
        for wanted_R, measure in ((measured_R, True), (acts_R & ~measured_R, False)):
            for micro in micro_batches(batch, self.mine(batch, wanted_R), self.cfg.microbatch_tokens, self.device):
                if measure:
                    logp, entropy = self.logprobs(self.model, micro, entropy=True)
                    entropy_N[micro.places] = entropy.cpu().numpy()
                else:
                    logp = self.logprobs(self.model, micro)
                old_N[micro.places] = logp.cpu().numpy()
                if self.reference is not None:
                    ref_N[micro.places] = self.logprobs(self.reference, micro).cpu().numpy()
        old_N, ref_N, entropy_N = self.ranks.share(out)
        return old_N, ref_N if self.reference is not None else None, entropy_N

    def mine(self, batch: Batch, wanted_R: np.ndarray) -> np.ndarray:
        """This rank's part of the wanted rollouts, dealt out by tokens."""
        rollouts = np.flatnonzero(wanted_R)
        return rollouts[share_out(batch.cost()[rollouts], self.ranks.world) == self.ranks.rank]

    def logprobs(self, model: Transformer, micro: Micro, *, entropy: bool = False):
        return model.logprobs(micro.tokens, micro.cu_seqlens, micro.max_seqlen, micro.targets,
                              temperature=self.cfg.temperature, entropy=entropy)

    def check_mismatch(self, sampler_N: np.ndarray, old_N: np.ndarray, measured_N: np.ndarray, step: int) -> np.ndarray:
        """|log-prob of the sampler - log-prob of the trainer| of the measured tokens; raises when it is no longer
        rounding."""
        for whose, logp_N in (("sampler", sampler_N), ("trainer", old_N)):
            if bad := int((~np.isfinite(logp_N)).sum()):
                raise RunError(f"step {step}: {bad} of {len(logp_N)} log-probs of the {whose} are not finite numbers: its "
                               "forward pass breaks down. Nothing was updated; --dtype float32, or the other --engine, "
                               "tells whether the weights or the arithmetic are at fault")
        mismatch_N = np.abs(sampler_N - old_N)[measured_N]
        if mismatch_N.mean() > self.cfg.max_mismatch:
            raise RunError(
                f"step {step}: sampler and trainer log-probs differ by {mismatch_N.mean():.4f} on average (at most "
                f"{mismatch_N.max():.2f}), more than --max_mismatch {self.cfg.max_mismatch}: the sampler's weights are "
                "stale or its arithmetic differs. Nothing was updated; try --engine torch to tell which")
        return mismatch_N

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

    def update(self, batch: Batch, n_P, advantage_R: np.ndarray, acts_R: np.ndarray, old_N, ref_N, step: int) -> dict:
        """The optimiser steps of one batch, one a mini-batch of prompts; every weight is fixed before any split."""
        cfg, P, R = self.cfg, len(n_P), len(batch.owner)
        stats = np.zeros((4, R))  # surrogate J, KL, clipped and busy tokens: each rank fills its rollouts
        losses, norms = [], []
        self.model.train()
        for start in range(0, P, cfg.minibatch_prompts):
            prompts = np.arange(start, min(start + cfg.minibatch_prompts, P))
            weight_R = self.token_weights(batch, n_P, prompts)
            loss_sum, mine = np.zeros(1), self.mine(batch, acts_R & (weight_R > 0))
            for micro in micro_batches(batch, mine, cfg.microbatch_tokens, self.device):
                out = self.token_loss(batch, micro, advantage_R, weight_R, old_N, ref_N)
                out.loss.backward()
                loss_sum += out.loss.item()
                busy = micro.offsets.diff() - out.idle
                stats[:, micro.rollouts] = torch.stack((out.surrogate, out.kl, out.clipped, busy)).cpu().numpy()
            losses.append(float(self.ranks.share(loss_sum)[0]))
            if not np.isfinite(losses[-1]):
                raise RunError(f"step {step}: the loss is {losses[-1]}; the weights are those before this update")
            rate = self.optimizer.learning_rate
            norms.append(self.optimizer.step(self.ranks, f"step {step}"))
        stats = self.ranks.share(stats)
        return {"surrogate_R": stats[0], "kl_R": stats[1], "kl": float(stats[1].mean()), "loss": float(np.mean(losses)),
                "clip_frac": float(stats[2].sum() / len(batch.tokens)),
                "idle_frac": float(1 - stats[3].sum() / len(batch.tokens)),
                "grad_norm": float(np.mean(norms)), "lr": rate}

    def token_loss(self, batch: Batch, micro: Micro, advantage_R: np.ndarray, weight_R, old_N, ref_N):
        cfg = self.cfg

        def put(x: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(x.astype(np.float32)).to(self.device)

        correction = None
        if cfg.importance_cap:
            ratio = np.exp(old_N[micro.places] - batch.sampler_logp[micro.places])
            correction = put(np.minimum(ratio, cfg.importance_cap))
        return grpo_token_loss(
            self.logprobs(self.model, micro), put(old_N[micro.places]),
            put(advantage_R[micro.rollouts]), micro.offsets, put(weight_R[micro.rollouts]),
            eps_low=cfg.eps_low, eps_high=cfg.eps_high, beta=cfg.kl_beta,
            ref_logp=None if ref_N is None else put(ref_N[micro.places]), correction=correction)

    def evaluate(self, step: int) -> Evaluation:
        """mean@k and pass@k on the held-out problems with the current weights; seeds do not depend on the step."""
        cfg, (problems, prompts) = self.cfg, self.eval_set
        sampling = Sampling(cfg.max_response_tokens, cfg.eval_temperature, cfg.eval_top_p, cfg.eval_top_k,
                            self.stop_ids)
        n_P = np.full(len(problems), cfg.eval_rollouts)
        seed_P = [rollout_seed(cfg.seed, -1, p.id) for p in problems]
        batch = self.sample(prompts, n_P, seed_P, sampling, np.ones(len(problems)))
        reward_R, _, _ = self.grade(batch, problems)
        return Evaluation.of(step, problems, reward_R.reshape(len(problems), -1) > 0, float(batch.lengths.mean()),
                             float(batch.truncated.mean()))


def check_memory(folder: Path, cfg: Config, device: torch.device, dtype: torch.dtype, engine: str) -> None:
    """Refuses, before anything is loaded, a model whose replicated training state and engine cannot fit one GPU."""
    if device.type != "cuda":
        return
    parameters = ModelConfig.from_hf(json.loads((folder / "config.json").read_text())).num_parameters()
    # weights, one micro-batch's gradients, the reference; float32 master, gradient and two moments
    training = parameters * (dtype.itemsize * (3 if cfg.kl_beta else 2) + 16)
    free, total = torch.cuda.mem_get_info()
    sampling = int(cfg.gpu_memory_utilization * total) if engine == "vllm" else parameters * dtype.itemsize
    if training + sampling > 0.95 * free:
        raise ValueError(
            f"{parameters / 1e9:.1f}B parameters need {training / 2**30:.0f} GiB a GPU for training (replicated, not "
            f"sharded, for now) and {sampling / 2**30:.0f} GiB for the {engine} engine; {free / 2**30:.0f} of "
            f"{total / 2**30:.0f} GiB are free. Take a smaller model, a lower --gpu_memory_utilization (vLLM), or "
            "--kl_beta 0, which saves the reference")


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
    ranks, folder = Ranks(), RunFolder(cfg)
    checkpoints, loaded = folder.open(resume)
    trainer = Trainer(cfg, ranks, loaded)
    evaluations: list[Evaluation] = []
    if checkpoints:
        evaluations = restore(trainer, folder, checkpoints)
    elif resume:
        say(f"--resume: {folder.path} has no checkpoint yet, starting from the beginning")
    # Also a barrier: nobody writes before everybody has looked.
    ranks.assert_equal(trainer.next_step, "the step to begin with; is out_dir a folder that all nodes share?")
    if ranks.rank == 0:
        if not checkpoints:
            folder.start(preset, jsonable(trainer.record))
        else:
            for damaged in checkpoints[: [p.name for p in checkpoints].index(f"step_{trainer.next_step}")]:
                shutil.rmtree(damaged)  # its steps are done again
            folder.go_on(trainer.next_step, jsonable(trainer.record))
            folder.write_evaluations(evaluations)
        folder.truncate(trainer.next_step)
    trainer.engine.load_weights(trainer.model.named_parameters())
    return trainer, folder, evaluations


def train(trainer: Trainer, folder: RunFolder, evaluations: list[Evaluation]) -> bool:
    """Steps, evaluations and checkpoints up to cfg.steps; False when it was asked to stop before the end."""
    cfg, first, stop = trainer.cfg, trainer.ranks.rank == 0, StopSignal()

    def evaluate() -> dict:
        evaluations.append(trainer.evaluate(trainer.next_step))
        if first:
            folder.write_evaluations(evaluations)
        say(evaluations[-1].line())
        return {k: v for k, v in evaluations[-1].to_json().items() if k != "by_kind"}

    if cfg.eval_first and not evaluations:
        evaluate()
    bar = tqdm(total=cfg.steps, initial=trainer.next_step, desc=f"{cfg.mode} seed {cfg.seed}", unit="step",
               disable=not first)
    asked, begun = False, []
    while trainer.next_step < cfg.steps and not asked:
        line, samples = trainer.step(trainer.next_step)
        trainer.next_step += 1
        done = trainer.next_step
        last = done == cfg.steps
        asked = bool(trainer.ranks.share(np.array([stop.asked]))[0])  # all ranks stop, or none
        if last or (not asked and cfg.eval_every and done % cfg.eval_every == 0):
            line["eval"] = evaluate()
        if first:
            folder.append("metrics.jsonl", [line])
            folder.append("samples.jsonl", samples)
        if len(begun) < 3:
            begun.append(line)
            if len(begun) == 3 and (hint := nothing_to_learn(begun, cfg)):
                say(hint)
        bar.update()
        bar.set_postfix(reward=f"{line['reward_mean']:+.3f}", solved=f"{line['solved_frac']:.2f}",
                        tokens=f"{line['response_tokens_mean']:.0f}", mismatch=f"{line['mismatch']['mean']:.0e}")
        if first and (asked or last or (cfg.save_every and done % cfg.save_every == 0)):
            save_checkpoint(trainer, folder, evaluations)
    bar.close()
    return trainer.next_step >= cfg.steps


def nothing_to_learn(lines: list[dict], cfg: Config) -> str | None:
    """What to look at when none of these steps could teach anything, or None."""
    if all(line["truncated_frac"] == 1 for line in lines):
        return (f"WARNING: every response of the first {len(lines)} steps was cut at {cfg.max_response_tokens} tokens and "
                "counts as wrong. Does the model end its responses? Look at samples.jsonl, --stop_tokens, "
                "--chat_template, --max_response_tokens")
    if all(line["zero_std_frac"] == 1 for line in lines):
        same = {line["solved_frac"] for line in lines}
        what = {0.0: "no response was right", 1.0: "every response was right"}.get(
            same.pop() if len(same) == 1 else None, "all rollouts of a prompt scored alike")
        return (f"WARNING: in the first {len(lines)} steps {what}: all advantages are 0 and nothing is learned. Look at "
                "samples.jsonl: does a response say its answer where --answer_style looks, does --prompt_suffix or "
                "--chat_template ask for it, are the problems of the right difficulty?")
    return None


def main() -> None:
    try:
        cfg, preset, resume = parse_args()
        trainer, folder, evaluations = set_up(cfg, preset, resume)
    except (ValueError, OSError, RunError) as error:  # what was given; a later ValueError is a bug and keeps its trace
        sys.exit(f"train.py: {error}")
    try:
        with trainer.grader, full_disk_explained(trainer, folder):
            complete = train(trainer, folder, evaluations)
            if complete and trainer.ranks.rank == 0:
                save_model(trainer, folder.path / "model")
    except RunError as error:
        sys.exit(f"train.py: {error}")
    if complete:
        say(table(evaluations[:1] + evaluations[1:][-1:]))
        say(f"\nmodel: {folder.path / 'model'}   log: {folder.path / 'metrics.jsonl'}")
    else:
        say(f"stopped after {trainer.next_step} steps; go on with the same command and --resume")
    trainer.engine.close()
    trainer.ranks.leave()
    sys.exit(0 if complete else 130)


if __name__ == "__main__":
    main()
