"""The two adversaries of GDRO (arXiv 2601.19280): who gets weight, and who gets rollouts. numpy only, no other state.

Once a step the trainer asks three questions and, at the end of the step, reports what happened:

    bin_P = bins.lookup(ids_P)             which difficulty bin is each prompt in?            (10)-(11)
    n_P   = rollout_gdro.allocate(bin_P)   how many rollouts does each prompt get?            (17)-(21)
    w_B   = prompt_gdro.weights(bin_P)     by what are each bin's advantages multiplied?      (12)-(16)
    ...
    prompt_gdro.update(...); rollout_gdro.update(...); bins.update(...)     the only lines that change state

Suffixes name axes: P prompts of a batch, B bins (0 = hardest), K arms n_min..n_max. Symbols are the paper's. `prompt`
and `rollouts` are GRPO's group; the groups of "group DRO" are the `bins`. GRPO itself is `PromptGDRO(eta=0)` (every
weight is exp(0) = 1) with `RolloutGDRO(n_min=n_max=n_bar)` (one arm).

Every `state_dict` is a flat dict of numpy arrays, for `np.savez` without pickle and for a part of the same settings.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import NamedTuple

import numpy as np


class DifficultyBins:
    """Sorts prompts online by their recent success, (10)-(11), with hysteresis.

    edges:       the B - 1 inner edges, ascending in (0, 1). Bin b holds [a_b, a_{b+1}), the last one also 1.
    history:     H, how many of a prompt's last visits count; all there are while fewer.
    hysteresis:  delta. A prompt leaves its bin upwards when its estimate reaches a_{b+1} + delta, downwards when it
                 falls below a_b - delta, and then goes to the bin of its estimate. The first visit places it freely.
    success:     what a visit with c correct of n rollouts records. "rate" = c/n: its expectation does not depend on
                 n, so that allocation does not move the bins. "any" = (c > 0), the paper's pass@k, which does.
    unseen_rate: the estimate that a prompt has before its first visit (official code: 0, i.e. the hardest bin).
    """

    def __init__(self, edges: Sequence[float], *, history: int = 50, hysteresis: float = 0.03, success: str = "rate",
                 unseen_rate: float = 0.5):
        # Edges, margins and estimates are compared at 12 decimals, where 0.3 - 0.03 is 27/100.
        self.edges = np.round(np.asarray(edges, dtype=np.float64), 12)
        if self.edges.size and not (np.all(np.diff(self.edges) > 0) and 0 < self.edges[0] and self.edges[-1] < 1):
            raise ValueError(f"bin edges must ascend strictly inside (0, 1), got {list(edges)}")
        if success not in ("rate", "any"):
            raise ValueError(f"success must be 'rate' or 'any', got {success!r}")
        if history < 1 or hysteresis < 0:
            raise ValueError(f"need history >= 1 and hysteresis >= 0, got {history} and {hysteresis}")
        self.num_bins = len(self.edges) + 1
        self.history, self.success, self.unseen_rate = history, success, unseen_rate
        self._leave_up = np.round(np.append(self.edges, np.inf) + hysteresis, 12)
        self._leave_down = np.round(np.append(-np.inf, self.edges) - hysteresis, 12)
        self._record: dict[str, deque[float]] = {}  # successes of a prompt's last visits, the newest last
        self._bin: dict[str, int] = {}

    def lookup(self, ids: Sequence[str]) -> np.ndarray:
        """Bins of the prompts, (P,) int64, from what earlier steps saw. Changes nothing."""
        unseen = int(np.digitize(self.unseen_rate, self.edges))
        return np.array([self._bin.get(i, unseen) for i in ids], np.int64)

    def estimates(self, ids: Sequence[str]) -> np.ndarray:
        """pass@k_hat of (10) of the prompts, (P,), from what earlier steps saw. Changes nothing."""
        return np.array([self._estimate(i) if i in self._record else self.unseen_rate for i in ids], np.float64)

    def _estimate(self, prompt: str) -> float:
        """(10): mean success of the prompt's last H visits."""
        record = self._record[prompt]
        return round(sum(record) / len(record), 12)

    def update(self, ids: Sequence[str], correct_P: np.ndarray, n_P: np.ndarray) -> None:
        """Records a visit of each prompt, `correct_P` of `n_P` rollouts right, and moves it between bins, (11)."""
        correct_P, n_P = np.asarray(correct_P, np.int64), np.asarray(n_P, np.int64)
        if not len(ids) == len(set(ids)) == len(correct_P) == len(n_P):
            raise ValueError(f"{len(set(ids))} different ids of {len(ids)}, {len(correct_P)} counts of correct and "
                             f"{len(n_P)} of rollouts: a step visits a prompt once")
        if np.any(n_P < 1) or np.any(correct_P < 0) or np.any(correct_P > n_P):
            raise ValueError("every prompt needs 0 <= correct <= n and n >= 1")
        success_P = correct_P / n_P if self.success == "rate" else correct_P > 0
        for prompt, success in zip(ids, success_P, strict=True):
            self._record.setdefault(prompt, deque(maxlen=self.history)).append(float(success))
            estimate, now = self._estimate(prompt), self._bin.get(prompt)
            if now is None or estimate >= self._leave_up[now] or estimate < self._leave_down[now]:
                self._bin[prompt] = int(np.digitize(estimate, self.edges))  # a_b <= estimate < a_{b+1}

    def state_dict(self) -> dict[str, np.ndarray]:
        record = np.full((len(self._record), self.history), np.nan)
        for row, successes in zip(record, self._record.values(), strict=True):
            row[: len(successes)] = successes
        return {"ids": np.array(list(self._record), dtype=np.str_), "bin": np.array(list(self._bin.values()), np.int64),
                "record": record}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        ids = [str(i) for i in state["ids"]]
        self._record = {i: deque(row[~np.isnan(row)].tolist(), self.history)
                        for i, row in zip(ids, state["record"], strict=True)}
        self._bin = dict(zip(ids, state["bin"].tolist(), strict=True))


# What l(x) is in (8), the loss whose bin means the adversaries see: signal(loss_P, reward_P, n_P) -> (P,), with loss_P
# that of (7), KL included and without the adversary's weight, and reward_P the mean +-1 reward of n_P rollouts.
SIGNALS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "surrogate": lambda loss_P, reward_P, n_P: loss_P,  # (5)-(7): zero at ratio 1, advantages being centred
    "reward": lambda loss_P, reward_P, n_P: -reward_P,  # appendix B, footnote: L_b = -E[reward]
    "variance": lambda loss_P, reward_P, n_P: (1 - reward_P**2) * n_P / np.maximum(n_P - 1, 1),  # v of (28)
}


def means_by(index: np.ndarray, value: np.ndarray, groups: int) -> np.ndarray:
    """Mean of `value` over the entries of each index, (groups,); NaN for an index that does not occur."""
    count = np.bincount(index, minlength=groups)
    total = np.bincount(index, weights=value, minlength=groups)
    return np.divide(total, count, out=np.full(groups, np.nan), where=count > 0)


def errors_by(index: np.ndarray, value: np.ndarray, groups: int) -> np.ndarray:
    """Standard errors of `means_by`, (groups,); NaN where fewer than two entries tell."""
    variance = means_by(index, (value - means_by(index, value, groups)[index]) ** 2, groups)
    count = np.bincount(index, minlength=groups)
    return np.sqrt(np.divide(variance, count - 1, out=np.full(groups, np.nan), where=count > 1))


def bin_shares(bin_P: np.ndarray, num_bins: int) -> np.ndarray:
    """q_hat of (13), the prompts of each bin over those of the batch, (B,)."""
    return np.bincount(bin_P, minlength=num_bins) / max(len(bin_P), 1)


def ema(old: np.ndarray, new: np.ndarray, beta: float) -> np.ndarray:
    """(1 - beta) old + beta new where new is a number; a NaN in `old` (never seen) takes `new`, a NaN in `new` keeps
    `old`. Starting at the first visit leaves no bias towards an arbitrary first score."""
    mixed = np.where(np.isnan(old), new, (1 - beta) * old + beta * new)
    return np.where(np.isnan(new), old, mixed)


class PromptGDRO:
    """The data adversary, (12)-(16): exponential weights over bins, realised by scaling advantages.

    eta, beta:       eta_q of (14), EMA rate of (12).
    share_normalize: divide a bin's loss by max(q_hat(b), SHARE_FLOOR), as the paper's experiments do (13).
    mean_one:        weigh prompts by q(b), (15), rescaled to mean 1 over the batch, then capped (the official code
                     does both the other way round), instead of by omega(b), (16). Steps are then as large as GRPO's.
    """

    GAMMA = 0.01  # uniform mixing of (15)
    SCORE_CLIP = 5.0  # C of (14); the paper gives none
    WEIGHT_CAP = 15.0  # omega_max of (16)
    SHARE_FLOOR = 0.05  # of (13)

    def __init__(self, num_bins: int, *, eta: float = 0.65, beta: float = 0.12, share_normalize: bool = True,
                 mean_one: bool = False):
        if eta < 0 or not 0 < beta <= 1:
            raise ValueError(f"need eta >= 0 and 0 < beta <= 1, got {eta} and {beta}")
        self.num_bins, self.eta, self.beta = num_bins, eta, beta
        self.share_normalize, self.mean_one = share_normalize, mean_one
        self._score_B = np.full(num_bins, np.nan)  # NaN: the bin was never in a batch

    @property
    def score_B(self) -> np.ndarray:
        """S of (12), (B,); 0 for a bin never seen."""
        return np.nan_to_num(self._score_B)

    @property
    def omega_B(self) -> np.ndarray:
        """(14): exp(eta * clip(S, -C, C)), (B,)."""
        return np.exp(self.eta * np.clip(self.score_B, -self.SCORE_CLIP, self.SCORE_CLIP))

    @property
    def q_B(self) -> np.ndarray:
        """(15): (1 - gamma) omega / sum omega + gamma / B, (B,)."""
        omega_B = self.omega_B
        return (1 - self.GAMMA) * omega_B / omega_B.sum() + self.GAMMA / self.num_bins

    def weights(self, bin_P: np.ndarray) -> np.ndarray:
        """(16): what multiplies the advantages of each bin's prompts in this batch, (B,) float64. Changes nothing."""
        if not self.mean_one:
            return np.minimum(self.omega_B, self.WEIGHT_CAP)
        q_B = self.q_B
        relative_B = q_B / q_B[bin_P].mean()
        relative_B[np.isclose(relative_B, 1, rtol=0, atol=1e-12)] = 1.0  # equal q weigh exactly 1
        return np.minimum(relative_B, self.WEIGHT_CAP)

    def update(self, bin_P: np.ndarray, loss_P: np.ndarray) -> None:
        """(13) and (12), with the losses (7) of the step's prompts, (P,), computed from unweighted advantages."""
        if not np.all(np.isfinite(loss_P)):
            raise ValueError("a prompt loss is not finite")
        loss_B = means_by(bin_P, loss_P, self.num_bins)
        if self.share_normalize:
            loss_B = loss_B / np.maximum(bin_shares(bin_P, self.num_bins), self.SHARE_FLOOR)
        self._score_B = ema(self._score_B, loss_B, self.beta)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"score": self._score_B.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._score_B = state["score"].copy()


@dataclass(frozen=True)
class BinStats:
    """What one step says of each bin; NaN where it says nothing."""

    arms_K: np.ndarray  # rollout counts n_min..n_max
    n_bar: float  # their mean over the batch
    loss_BK: np.ndarray  # mean prompt loss of the bin's prompts that were given n_k rollouts
    rate_B: np.ndarray  # pass rate (c + 1/2) / (n + 1) over all rollouts of the bin: never 0, so that no bin starves
    variance_B: np.ndarray  # v_b: unbiased variance of the +-1 reward within a prompt, averaged over prompts


def expected_gain(arms_K: np.ndarray, rate_B: np.ndarray, k: int = 8) -> np.ndarray:
    """k (1-p)^(k-1) * E_{c ~ Bin(n, p)} sqrt(c (n - c)), (B, K): slope of pass@k times what n rollouts teach.

    A group of n rollouts with c correct ones hands out positive standardised advantage of total mass sqrt(c (n - c)).
    """
    n_K = arms_K[:, None]
    c_C = np.arange(arms_K.max() + 1)
    choose_KC = np.array([[comb(int(n), int(c)) for c in c_C] for n in arms_K], float)  # 0 where c > n
    mass_KC = choose_KC * np.sqrt(np.maximum(c_C * (n_K - c_C), 0))
    p = rate_B[:, None, None]
    pmf_mass = mass_KC * p**c_C * (1 - p) ** np.maximum(n_K - c_C, 0)  # (B, K, C)
    return k * (1 - rate_B[:, None]) ** (k - 1) * pmf_mass.sum(axis=2)


def rank_value(arms_K: np.ndarray, rate_B: np.ndarray, n_bar: float) -> np.ndarray:
    """-(n - n_rank)^2, (B, K): E3's rule (arXiv 2505.18573). n_rank = n_min + 2 (n_bar - n_min) rank, with ranks from
    0 for the easiest bin of the step to 1 for the hardest."""
    seen = np.isfinite(rate_B)
    rank_B = np.full(len(rate_B), np.nan)
    rank_B[seen] = np.argsort(np.argsort(-rate_B[seen], kind="stable")) / max(seen.sum() - 1, 1)
    target_B = arms_K[0] + 2 * (n_bar - arms_K[0]) * rank_B
    return -((arms_K - target_B[:, None]) ** 2.0)


class Utility(NamedTuple):
    """J_hat_b(n) of (17)-(18): value(a step's statistics) -> (B, K), NaN where it is unknown.

    One that is known for every arm has nothing to explore: the joint choice takes (19) as it stands, the sum of
    utility - mu n over the batch's prompts. Else only the arms that were played are known, and it takes the paper's
    "highest joint probability", the sum of the bins' log-probabilities, where every bin counts once.
    """

    value: Callable[[BinStats], np.ndarray]
    known_for_every_arm: bool


UTILITIES = {
    "surrogate": Utility(lambda s: -s.loss_BK, known_for_every_arm=False),  # the paper
    "variance": Utility(lambda s: -s.variance_B[:, None] / s.arms_K, known_for_every_arm=True),  # (28)
    "gain": Utility(lambda s: expected_gain(s.arms_K, s.rate_B), known_for_every_arm=True),
    "rank": Utility(lambda s: rank_value(s.arms_K, s.rate_B, s.n_bar), known_for_every_arm=True),
}
BUDGETS = ("exact", "spread", "dual")


class RolloutGDRO:
    """The compute adversary, (17)-(21): one bandit per bin over rollout counts, one budget over all bins.

    Arm scores are EMAs of `utility` that start at the first visit; L_b(n) = -score + mu n is (20); a bin's arm
    probabilities are (1 - gamma) softmax(-eta L) + gamma / K. EXP3P's importance weights are left out: the joint
    choice is an argmax, so an arm's probability of being played is not the bandit's. Utilities that are known for
    every arm need no probabilities unless the budget is "dual".

    budget "exact":  one count a bin, the best configuration with sum n_P = P n_bar, by dynamic programming (DP).
           "spread": the same total, but counts inside a bin may differ by one (the remainder dealt to the first prompts
                     of the batch), scored by linear interpolation. Then the equality never dictates the choice.
           "dual":   every bin draws its arm; only mu, (21), holds the mean near n_bar over time.
    After `allocate`, `shadow_price_dp` is the DP's marginal value of one more rollout: the difference quotient of its
    optimum between the nearest feasible totals; None where there is none. With an exact budget mu never moves.
    """

    GAMMA = 0.01  # uniform mixing of EXP3P
    BETA = 0.4  # EMA rate of the arms' scores
    ALPHA_MU = 0.05  # step size of (21)

    def __init__(self, num_bins: int, *, n_min: int = 2, n_max: int = 12, n_bar: float = 4, eta: float = 0.65,
                 utility: str = "surrogate", budget: str = "exact", seed: int = 0):
        if not 1 <= n_min <= n_bar <= n_max:
            raise ValueError(f"need 1 <= n_min <= n_bar <= n_max, got n_min={n_min}, n_bar={n_bar}, n_max={n_max}")
        if utility not in UTILITIES or budget not in BUDGETS or eta < 0:
            raise ValueError(f"utility must be one of {list(UTILITIES)}, budget one of {list(BUDGETS)} and eta 0 or "
                             f"more, got {utility!r}, {budget!r} and {eta}")
        self.num_bins, self.n_bar, self.arms_K, self.eta = num_bins, n_bar, np.arange(n_min, n_max + 1), eta
        self.utility, self.budget, self.seed = UTILITIES[utility], budget, seed
        self.mu, self.step = 0.0, 0
        self._score_BK = np.full((num_bins, len(self.arms_K)), np.nan)  # NaN: the arm was never observed
        self.shadow_price_dp: float | None = None  # a diagnostic of the last allocate(), not state

    def penalised_BK(self) -> np.ndarray:
        """-L of (20): score - mu n, (B, K); an arm never observed scores 0."""
        return np.nan_to_num(self._score_BK) - self.mu * self.arms_K

    def log_prob_BK(self) -> np.ndarray:
        """Log-probabilities of the arms of each bin, (B, K)."""
        logit_BK = self.eta * self.penalised_BK()
        p_BK = np.exp(logit_BK - logit_BK.max(axis=1, keepdims=True))
        p_BK /= p_BK.sum(axis=1, keepdims=True)
        # The floor only keeps log() finite where gamma = 0 and an arm's probability underflows.
        return np.log(np.maximum((1 - self.GAMMA) * p_BK + self.GAMMA / len(self.arms_K), 1e-300))

    def allocate(self, bin_P: np.ndarray) -> np.ndarray:
        """(19): rollout counts of the batch's prompts, (P,) int64. Changes no state but sets the diagnostic
        `shadow_price_dp`; raises ValueError if the budget cannot be met."""
        present, slot_P, count = np.unique(bin_P, return_inverse=True, return_counts=True)
        self.shadow_price_dp = None
        if self.budget == "dual":
            rng = np.random.default_rng((self.seed, self.step))
            cdf = np.exp(self.log_prob_BK()[present]).cumsum(axis=1)
            arm = (rng.random((len(present), 1)) * cdf[:, -1:] > cdf).sum(axis=1)
            return self.arms_K[arm][slot_P]
        total = round(self.n_bar * len(bin_P))
        if abs(total - self.n_bar * len(bin_P)) > 1e-6:
            raise ValueError(f"{len(bin_P)} prompts of {self.n_bar} rollouts on average are not a whole number")
        if self.utility.known_for_every_arm:
            value = self.eta * self.penalised_BK()[present] * count[:, None]
        else:
            value = self.log_prob_BK()[present]  # (bins present, K)
        # Equal choices go to the one nearest the uniform one; too small to outweigh a real difference.
        value = value - 1e-9 * count[:, None] * (self.arms_K - self.n_bar) ** 2
        choice = JointChoice(value, count, spread=self.budget == "spread")
        extra = total - int(self.arms_K[0]) * len(bin_P)
        if not np.isfinite(choice.best(extra)):
            raise ValueError(f"no arms meet a mean of exactly {self.n_bar} rollouts with {count.tolist()} prompts in "
                             f"bins {present.tolist()}; take a whole n_bar or budget 'spread'")
        self.shadow_price_dp = choice.marginal_value(extra)
        arm, remainder = choice.arms(extra)
        n_P = self.arms_K[arm][slot_P]
        for slot in np.flatnonzero(remainder):
            n_P[np.flatnonzero(slot_P == slot)[: remainder[slot]]] += 1
        return n_P

    def update(self, bin_P: np.ndarray, n_P: np.ndarray, loss_P: np.ndarray, correct_P: np.ndarray) -> None:
        """The scores' EMA from the step's prompt losses (7) and numbers of correct rollouts, all (P,); then (21)."""
        if not np.all(np.isfinite(loss_P)):
            raise ValueError("a prompt loss is not finite")
        if not np.all(np.isin(n_P, self.arms_K)):
            raise ValueError(f"rollout counts must be arms {self.arms_K[0]}..{self.arms_K[-1]}, got {set(n_P)}")
        stats = self._stats(bin_P, np.asarray(n_P), loss_P, np.asarray(correct_P))
        self._score_BK = ema(self._score_BK, self.utility.value(stats), self.BETA)
        self.mu += self.ALPHA_MU * (float(np.mean(n_P)) - self.n_bar)
        self.step += 1

    def _stats(self, bin_P: np.ndarray, n_P: np.ndarray, loss_P: np.ndarray, correct_P: np.ndarray) -> BinStats:
        B, K = self._score_BK.shape
        arm_P = n_P - self.arms_K[0]
        loss_BK = means_by(bin_P * K + arm_P, loss_P, B * K)
        drawn_B = np.bincount(bin_P, weights=n_P, minlength=B)
        correct_B = np.bincount(bin_P, weights=correct_P, minlength=B)
        rate_B = np.where(drawn_B > 0, (correct_B + 0.5) / (drawn_B + 1), np.nan)
        many = n_P > 1  # one rollout has no variance
        n, c = n_P[many], correct_P[many]
        variance_B = means_by(bin_P[many], 4 * c * (n - c) / (n * (n - 1)), B)
        return BinStats(self.arms_K, self.n_bar, loss_BK.reshape(B, K), rate_B, variance_B)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"score": self._score_BK.copy(), "mu": np.array(self.mu), "step": np.array(self.step)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self._score_BK = state["score"].copy()
        self.mu, self.step = float(state["mu"]), int(state["step"])


class JointChoice:
    """(19): max sum_b value[b, k_b] over one arm k_b a bin, for every total sum_b count[b] k_b of extra rollouts.

    E.g. two bins of 1 and 2 prompts with arms 2, 3, 4 and 2 extra rollouts to spend: one prompt takes both (arms 4, 2),
    or the two prompts take one each (2, 3); `spread` adds one for the first bin and one for a prompt of the second.
    With `spread`, a bin may also stand between two arms: r of its m prompts at arm k + 1, the others at k, worth
    value_k + (r/m) (value_{k+1} - value_k). Plain dynamic programming over the bins: an optimum for t extra rollouts is
    the best way to give some of them to the last bin and the rest to those before it. Between whole arms a bin's worth
    is linear, so some optimum has at most one bin there; a hair's breadth makes it the one that is chosen.
    """

    HAIR = 1e-10  # what standing between two arms costs: less than any real difference, more than rounding

    def __init__(self, value: np.ndarray, count: np.ndarray, *, spread: bool):
        self.count = count.astype(int)
        arm = np.arange(value.shape[1])
        self.worth = []  # of each bin: what t extra rollouts are worth to it, (m (K - 1) + 1,); -inf where it can't be
        for v, m in zip(value, self.count, strict=True):
            t = np.arange(m * arm[-1] + 1)
            forgone = np.where(t % m == 0, 0.0, self.HAIR if spread else np.inf)  # of a total between two arms
            self.worth.append(np.interp(t / m, arm, v) - forgone)
        self.best_of = [np.zeros(1)]  # after 0, 1, 2, ... bins: the optimum for each total
        for worth in self.worth:
            before = self.best_of[-1]
            best = np.full(len(before) + len(worth) - 1, -np.inf)
            for t in np.flatnonzero(np.isfinite(worth)):
                window = best[t : t + len(before)]
                np.maximum(window, before + worth[t], out=window)
            self.best_of.append(best)

    def best(self, extra: int) -> float:
        """The optimum for this total; -inf where no choice has it."""
        return float(self.best_of[-1][extra]) if 0 <= extra < len(self.best_of[-1]) else -np.inf

    def marginal_value(self, extra: int) -> float | None:
        """Difference quotient of the optimum between the nearest feasible totals on either side of `extra`."""
        feasible = np.flatnonzero(np.isfinite(self.best_of[-1]))
        below, above = feasible[feasible < extra], feasible[feasible > extra]
        low = below[-1] if len(below) else extra
        high = above[0] if len(above) else extra
        return (self.best(high) - self.best(low)) / int(high - low) if high > low else None

    def arms(self, extra: int) -> tuple[np.ndarray, np.ndarray]:
        """Arm index of each bin and how many of its prompts get one rollout more; the fewest rollouts among equals."""
        taken = np.zeros(len(self.count), int)
        for b in range(len(self.count) - 1, -1, -1):
            before, left = self.best_of[b], extra - taken[b + 1 :].sum()
            t = np.arange(max(0, left - len(before) + 1), min(left, len(self.worth[b]) - 1) + 1)
            taken[b] = t[np.argmax(before[left - t] + self.worth[b][t])]
        return taken // self.count, taken % self.count


# ------------------------------------------------------------------------------------------------ fixed rules
#
# What a prompt's advantages are multiplied by for its own successes, whatever the adversaries do. With rewards of two
# values every centred advantage is f(c, n) times GRPO's standardised one, where c of a prompt's n rollouts are right;
# so one factor a prompt holds them all. Where all or none are right it is 0, as the advantages then are; but graded
# rewards, of more than two values, lose what they would teach there.

TILT = 4.0  # the exponent that Prompt-GDRO's weights have with the signal `reward` and eta_q = 2


def _among_mixed(factor: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray, np.ndarray, np.ndarray],
                                                                        np.ndarray]:
    """A rule of p = c / n where 0 < p < 1, and 0 elsewhere."""

    def rule(correct_P: np.ndarray, n_P: np.ndarray, estimate_P: np.ndarray) -> np.ndarray:
        p = correct_P / n_P
        mixed = (p > 0) & (p < 1)
        return np.where(mixed, factor(np.where(mixed, p, 0.5)), 0.0)

    return rule


def tilt(correct_P: np.ndarray, n_P: np.ndarray, estimate_P: np.ndarray) -> np.ndarray:
    """exp(-TILT pass@k_hat) at mean 1: the weights that Prompt-GDRO tends to when nothing changes."""
    factor_P = np.exp(-TILT * estimate_P)
    return factor_P / factor_P.mean()


# name -> rule(correct_P, n_P, estimate_P) -> (P,): of a prompt's n_P rollouts correct_P are right; estimate_P is (10),
# what earlier visits say of it.
RULES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "grpo": lambda correct_P, n_P, estimate_P: np.ones(len(n_P)),
    "dr_grpo": _among_mixed(lambda p: 2 * np.sqrt(p * (1 - p))),  # 2503.20783: +-1 rewards, centred and no more
    "maxrl": _among_mixed(lambda p: np.sqrt((1 - p) / p)),  # 2602.02710: 0/1 rewards over their mean, minus 1
    "tilt": tilt,
}
