"""GRPO's clipped surrogate with KL penalty, (4)-(6), over packed responses of any lengths.

    rho_t  = exp(logp_t - old_logp_t)                                                (4)
    J_s    = 1/L_s sum_t min(rho_t A_s, clip(rho_t, 1 - eps_low, 1 + eps_high) A_s)  (5)
    KL_s   = 1/L_s sum_t exp(ref_t - logp_t) - (ref_t - logp_t) - 1                  (6), the k3 estimator
    loss   = sum_s token_weight_s * L_s * (-J_s + beta * KL_s)

Every way of averaging is a choice of `token_weight`, the weight of one token of response s in the loss: 1 / (P n_i L_s)
is the paper's mean over tokens, then a prompt's rollouts, then prompts (7); 1 / (R L_s) weighs rollouts alike; 1 / T
weighs tokens alike (DAPO).

The gradient is known as soon as the loss is, so forward stores it,

    dloss/dlogp_t = token_weight_s (beta (1 - exp(ref_t - logp_t)) - rho_t A_s [the unclipped term is the smaller]),

and backward only scales it. So the tokens of gradient 0 are counted as they are, not by a second set of rules.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOG_RATIO = 20.0  # |log ratio| is clamped here, with zero gradient outside: exp(20) is already 5e8


class TokenLoss(NamedTuple):
    loss: Tensor  # () float32, differentiable in logp; all others are detached
    surrogate: Tensor  # (S,) J_s of (5), in the advantages given
    kl: Tensor  # (S,) KL_s; 0 where beta is 0
    clipped: Tensor  # (S,) number of tokens whose gradient the clip removed
    idle: Tensor  # (S,) number of tokens whose gradient is exactly 0, clipped ones included


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, old_logp, advantage, offsets, token_weight, ref_logp, eps_low: float, eps_high: float,
                beta: float):
        limit, length = MAX_LOG_RATIO, offsets.diff()  # (S,)
        owner = torch.repeat_interleave(torch.arange(len(length), device=logp.device), length, output_size=len(logp))
        A = advantage[owner]
        log_ratio = logp - old_logp
        ratio = log_ratio.clamp(-limit, limit).exp()
        surrogate = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)
        clipped = surrogate < ratio * A
        slope = torch.where(clipped | (log_ratio.abs() > limit), 0.0, ratio * A)
        kl, kl_slope = torch.zeros_like(logp), torch.zeros_like(logp)
        if beta:
            log_ratio = ref_logp - logp
            inverse = log_ratio.clamp(-limit, limit).exp()
            kl = inverse - log_ratio.clamp(-limit, limit) - 1
            kl_slope = torch.where(log_ratio.abs() > limit, 0.0, 1 - inverse)
        gradient = token_weight[owner] * (beta * kl_slope - slope)
        ctx.save_for_backward(gradient)
        columns = torch.stack((beta * kl - surrogate, surrogate, kl, clipped.to(logp.dtype),
                               (gradient == 0).to(logp.dtype)))
        out = logp.new_zeros(5, len(length)).index_add(1, owner, columns)
        out[0] *= token_weight
        out[1:3] /= length
        loss, *stats = out[0].sum(), *out[1:].clone()
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        return ctx.saved_tensors[0] * grad_loss, *[None] * 8


def grpo_token_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, offsets: Tensor, token_weight: Tensor, *,
                    eps_low: float = 0.2, eps_high: float = 0.28, beta: float = 0.0,
                    ref_logp: Tensor | None = None) -> TokenLoss:
    """logp, old_logp, ref_logp (N,) over response tokens and advantage, token_weight (S,), all float32 or all float64;
    offsets (S + 1,) int64: response s is tokens offsets[s]:offsets[s + 1], none empty."""
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp")
    per_token = {"logp": logp, "old_logp": old_logp, "ref_logp": ref_logp}
    per_response = {"advantage": advantage, "token_weight": token_weight}
    for expected, given in (((len(logp),), per_token), ((len(offsets) - 1,), per_response)):
        for name, x in given.items():
            if x is not None and (x.shape != expected or x.dtype != logp.dtype):
                raise ValueError(f"{name} must be {expected} {logp.dtype}, got {tuple(x.shape)} {x.dtype}")
    return TokenLoss(*_TokenLoss.apply(logp, old_logp, advantage, offsets, token_weight, ref_logp, eps_low, eps_high,
                                       beta))
