"""GRPO's clipped surrogate with KL penalty, (4)-(6), over packed responses of any lengths.

    rho_t  = exp(logp_t - old_logp_t)                                              (4)
    J_s    = 1/L_s sum_t min(rho_t A_s, clip(rho_t, 1 - eps_low, 1 + eps_high) A_s)  (5)
    KL_s   = 1/L_s sum_t exp(ref_t - logp_t) - (ref_t - logp_t) - 1                  (6), the k3 estimator
    loss   = sum_s token_weight_s * L_s * (-J_s + beta * KL_s)

Every way of averaging is a choice of `token_weight`, the weight of one token of response s in the loss: 1 / (P n_i L_s)
is the paper's mean over tokens, then a prompt's rollouts, then prompts (7); 1 / (R L_s) weighs rollouts alike; 1 / T
weighs tokens alike (DAPO).
"""

from typing import NamedTuple

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # |log ratio| is clamped here, with zero gradient outside: exp(20) is already 5e8


class TokenLoss(NamedTuple):
    loss: Tensor  # () float32, differentiable in logp
    surrogate: Tensor  # (S,) J_s of (5), detached, in the advantages given
    kl: Tensor  # (S,) KL_s, detached; 0 where beta is 0
    clipped: Tensor  # (S,) number of tokens whose gradient the clip removed


def grpo_token_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, offsets: Tensor, token_weight: Tensor, *,
                    eps_low: float = 0.2, eps_high: float = 0.28, beta: float = 0.0, ref_logp: Tensor | None = None,
                    correction: Tensor | None = None) -> TokenLoss:
    """logp, old_logp, ref_logp, correction (N,) float32 over response tokens; advantage, token_weight (S,) float32;
    offsets (S + 1,) int64: response s is tokens offsets[s]:offsets[s + 1], none empty.

    `correction` multiplies the surrogate of each token (importance of the trainer's behaviour policy against the
    sampler's); the reported `surrogate` leaves it out.
    """
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp")
    length = offsets.diff()  # (S,)
    owner = torch.repeat_interleave(torch.arange(len(length), device=logp.device), length)  # (N,)
    advantage_N = advantage[owner]
    ratio = (logp - old_logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    clipped_ratio = ratio.clamp(1 - eps_low, 1 + eps_high)
    surrogate = torch.minimum(ratio * advantage_N, clipped_ratio * advantage_N)
    objective = surrogate if correction is None else surrogate * correction
    kl = torch.zeros_like(logp)
    if beta:
        log_ratio = (ref_logp - logp).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = log_ratio.exp() - log_ratio - 1
    loss = (token_weight[owner] * (beta * kl - objective)).sum()

    def per_response(x: Tensor) -> Tensor:
        return torch.zeros_like(advantage).index_add(0, owner, x.detach())

    clipped = (clipped_ratio * advantage_N < ratio * advantage_N).to(logp.dtype)
    return TokenLoss(loss, per_response(surrogate) / length, per_response(kl) / length, per_response(clipped))
