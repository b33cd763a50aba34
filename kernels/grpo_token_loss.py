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

and backward only scales it. On CUDA one program walks down one response, so one launch gives loss, gradient and
statistics; each response's sums have a fixed order.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import INTERPRETED, clamp, jit, tl, use_triton

MAX_LOG_RATIO = 20.0  # |log ratio| is clamped here, with zero gradient outside: exp(20) is already 5e8
BLOCK = 64 if INTERPRETED else 1024  # tokens that one program holds at a time


class TokenLoss(NamedTuple):
    loss: Tensor  # () float32, differentiable in logp; all others are detached
    surrogate: Tensor  # (S,) J_s of (5), in the advantages given
    kl: Tensor  # (S,) KL_s; 0 where beta is 0
    clipped: Tensor  # (S,) number of tokens whose gradient the clip removed
    idle: Tensor  # (S,) number of tokens whose gradient is exactly 0, clipped ones included


def _reference(logp, old_logp, advantage, offsets, token_weight, ref_logp, correction, eps_low: float, eps_high: float,
               beta: float) -> tuple[Tensor, Tensor]:
    """(gradient (N,), per response (5, S): loss, surrogate, kl, clipped, idle)."""
    limit = MAX_LOG_RATIO
    length = offsets.diff()  # (S,)
    owner = torch.repeat_interleave(torch.arange(len(length), device=logp.device), length)  # (N,)
    A = advantage[owner]
    log_ratio = logp - old_logp
    ratio = log_ratio.clamp(-limit, limit).exp()
    surrogate = torch.minimum(ratio * A, ratio.clamp(1 - eps_low, 1 + eps_high) * A)
    clipped = surrogate < ratio * A
    slope = torch.where(clipped | (log_ratio.abs() > limit), 0.0, ratio * A)
    factor = torch.ones_like(logp) if correction is None else correction
    kl, kl_slope = torch.zeros_like(logp), torch.zeros_like(logp)
    if beta:
        log_ratio = ref_logp - logp
        inverse = log_ratio.clamp(-limit, limit).exp()
        kl = inverse - log_ratio.clamp(-limit, limit) - 1
        kl_slope = torch.where(log_ratio.abs() > limit, 0.0, 1 - inverse)
    gradient = token_weight[owner] * (beta * kl_slope - slope * factor)
    columns = torch.stack((beta * kl - surrogate * factor, surrogate, kl, clipped.to(logp.dtype),
                           (gradient == 0).to(logp.dtype)))
    out = logp.new_zeros(5, len(length)).index_add(1, owner, columns)
    out[0] *= token_weight
    out[1:3] /= length
    return gradient, out


@jit
def _kernel(logp_N, old_logp_N, advantage_S, offsets, token_weight_S, ref_logp_N, correction_N, gradient_N, out, S,
            EPS_LOW: tl.constexpr, EPS_HIGH: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
            BLOCK: tl.constexpr):
    """One response a program."""
    s = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + s), tl.load(offsets + s + 1)
    A, weight = tl.load(advantage_S + s), tl.load(token_weight_S + s)
    dtype: tl.constexpr = logp_N.dtype.element_ty
    loss, surrogates, kls = tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), dtype)
    clips, idles = tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), dtype)
    for start in range(first, last, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < last
        logp = tl.load(logp_N + t, mask=inside, other=0.0)
        log_ratio = logp - tl.load(old_logp_N + t, mask=inside, other=0.0)
        ratio = tl.exp(clamp(log_ratio, -LIMIT, LIMIT))
        held = clamp(ratio, 1 - EPS_LOW, 1 + EPS_HIGH)
        clipped = held * A < ratio * A
        surrogate = tl.where(clipped, held, ratio) * A
        slope = tl.where(clipped | (tl.abs(log_ratio) > LIMIT), 0.0, ratio * A)
        objective = surrogate
        if correction_N is not None:
            correction = tl.load(correction_N + t, mask=inside, other=0.0)
            objective, slope = surrogate * correction, slope * correction
        penalty = -objective
        gradient = -slope
        if BETA != 0:
            log_ratio = tl.load(ref_logp_N + t, mask=inside, other=0.0) - logp
            limited = clamp(log_ratio, -LIMIT, LIMIT)
            inverse = tl.exp(limited)
            kl = inverse - limited - 1
            penalty += BETA * kl
            gradient += BETA * tl.where(tl.abs(log_ratio) > LIMIT, 0.0, 1 - inverse)
            kls += tl.where(inside, kl, 0.0)
        gradient *= weight
        tl.store(gradient_N + t, gradient, mask=inside)
        loss += tl.where(inside, penalty, 0.0)
        surrogates += tl.where(inside, surrogate, 0.0)
        clips += tl.where(inside & clipped, 1.0, 0.0)
        idles += tl.where(inside & (gradient == 0), 1.0, 0.0)
    length = (last - first).to(dtype)
    tl.store(out + s, tl.sum(loss, axis=0) * weight)
    tl.store(out + S + s, tl.sum(surrogates, axis=0) / length)
    tl.store(out + 2 * S + s, tl.sum(kls, axis=0) / length)
    tl.store(out + 3 * S + s, tl.sum(clips, axis=0))
    tl.store(out + 4 * S + s, tl.sum(idles, axis=0))


@torch.library.custom_op("group_dro::grpo_token_loss", mutates_args=())
def _token_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, offsets: Tensor, token_weight: Tensor,
                ref_logp: Tensor | None, correction: Tensor | None, eps_low: float, eps_high: float, beta: float,
                on_triton: bool) -> tuple[Tensor, Tensor]:
    """As `_reference`."""
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != len(logp) or (offsets.diff() < 1).any()):
        raise ValueError(f"offsets must go from 0 to {len(logp)} without empty responses, got {int(offsets[0])} to "
                         f"{int(offsets[-1])}, smallest step {int(offsets.diff().min()) if len(offsets) > 1 else None}")
    if not on_triton:
        return _reference(logp, old_logp, advantage, offsets, token_weight, ref_logp, correction, eps_low, eps_high,
                          beta)
    S = len(advantage)
    gradient, out = torch.empty_like(logp), logp.new_empty(5, S)
    if S:
        _kernel[(S,)](logp, old_logp, advantage, offsets, token_weight, ref_logp, correction, gradient, out, S,
                      EPS_LOW=eps_low, EPS_HIGH=eps_high, BETA=beta, LIMIT=MAX_LOG_RATIO, BLOCK=BLOCK, num_warps=4)
    return gradient, out


@_token_loss.register_fake
def _(logp, old_logp, advantage, offsets, token_weight, ref_logp, correction, eps_low, eps_high, beta, on_triton):
    return torch.empty_like(logp), logp.new_empty(5, len(advantage))


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, *rest):
        gradient, out = _token_loss(logp, *rest)
        ctx.save_for_backward(gradient)
        loss, *stats = out[0].sum(), *out[1:].clone()
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        return ctx.saved_tensors[0] * grad_loss, *[None] * 10


def grpo_token_loss(logp: Tensor, old_logp: Tensor, advantage: Tensor, offsets: Tensor, token_weight: Tensor, *,
                    eps_low: float = 0.2, eps_high: float = 0.28, beta: float = 0.0, ref_logp: Tensor | None = None,
                    correction: Tensor | None = None, backend: str = "auto") -> TokenLoss:
    """logp, old_logp, ref_logp, correction (N,) float32 over response tokens; advantage, token_weight (S,) float32;
    offsets (S + 1,) int64: response s is tokens offsets[s]:offsets[s + 1], none empty. All of one dtype.

    `correction` multiplies the surrogate of each token (importance of the trainer's behaviour policy against the
    sampler's); the reported `surrogate` leaves it out. Offsets are checked on CPU (ValueError), not on CUDA.
    """
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp")
    per_token = {"logp": logp, "old_logp": old_logp, "ref_logp": ref_logp, "correction": correction}
    per_response = {"advantage": advantage, "token_weight": token_weight}
    for expected, given in (((len(logp),), per_token), ((len(offsets) - 1,), per_response)):
        for name, x in given.items():
            if x is not None and (x.shape != expected or x.dtype != logp.dtype):
                raise ValueError(f"{name} must be {expected} {logp.dtype}, got {tuple(x.shape)} {x.dtype}")
    tensors = (x if x is None else x.contiguous()
               for x in (logp, old_logp, advantage, offsets, token_weight, ref_logp, correction))
    return TokenLoss(*_TokenLoss.apply(*tensors, eps_low, eps_high, beta, use_triton(backend, logp)))
