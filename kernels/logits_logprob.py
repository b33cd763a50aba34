"""Log-probabilities and entropies of given tokens from logits that exist already.

    logp[t]    = logits[t, target_t] / temperature - lse[t]
    entropy[t] = lse[t] - sum_v p[t, v] logits[t, v] / temperature

The sibling of `linear_logprob` for other people's models and for decoding, where a logit tensor is given. All there is
to win is traffic: log_softmax writes as much as it reads, its backward keeps that copy, and an entropy on top makes
several passes more. Here forward reads the logits once and backward reads them once and writes the gradient once, on
request over the logits themselves. Sums are float32 whatever the logits' dtype, in a fixed order.

The forward kernel keeps a running maximum and sums for every one of LANES columns that it walks down side by side, so
that its loop needs no exchange between threads; only at the end are the lanes folded into one.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import IGNORE_INDEX, INTERPRETED, accumulator, clamp, jit, tl, triton, use_triton
from kernels.softmax import LN2, LOWEST, check_targets, chunks, fold, logit_gradient, of_whole_rows, tile_gradient

MAX_LOGITS = 1 << 24  # elements that the reference holds in float32 at once: 64 MiB
LANES, STEPS = (64, 2) if INTERPRETED else (1024, 8)  # a tile of the row: STEPS strides of LANES columns
BLOCK = 128 if INTERPRETED else 4096  # columns of one program of backward


# ------------------------------------------------------------------------------------------------ torch reference


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """A copy in the accumulators' dtype, divided by the temperature."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    return x if temperature == 1 else x.div_(temperature)


def _forward_reference(logits: Tensor, targets: Tensor, temperature: float, entropy: bool, out: Tensor) -> None:
    """The target's logit, lse and entropy of every row into `out` (3, T)."""
    for rows in chunks(*logits.shape, MAX_LOGITS):
        found = of_whole_rows(_scaled(logits[rows], temperature), targets[rows], entropy)
        out[:, rows] = torch.stack(found)


def _backward_reference(logits, targets, lse, entropy, grad_logp, grad_entropy, temperature: float, out) -> None:
    for rows in chunks(*logits.shape, MAX_LOGITS):
        log_p = _scaled(logits[rows], temperature).sub_(lse[rows, None])
        h = None if grad_entropy is None else grad_entropy[rows] / temperature
        out[rows] = logit_gradient(log_p, targets[rows], entropy[rows], grad_logp[rows] / temperature, h)


# ------------------------------------------------------------------------------------------------ Triton


@jit
def _forward_kernel(logits, targets, chosen_T, lse_T, entropy_T, V, stride, SCALE: tl.constexpr, STEPS: tl.constexpr,
                    LANES: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr):
    """One row a program. SCALE holds log2(e) / temperature: inside, logits are in units of log 2."""
    t = tl.program_id(0).to(tl.int64)  # T * V passes 2^31
    row = logits + t * stride
    at = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    peak = tl.full((LANES,), LOWEST, ACC)
    total, moment = tl.zeros((LANES,), ACC), tl.zeros((LANES,), ACC)
    for start in range(0, V, STEPS * LANES):
        x = tl.load(row + start + at, mask=start + at < V, other=float("-inf")).to(ACC)
        peak, total, moment = fold(clamp(x * SCALE, LOWEST, float("inf")), peak, total, moment, 0, ENTROPY)
    highest = tl.max(peak, axis=0)
    drop = peak - highest
    mass = tl.sum(tl.exp2(drop) * total, axis=0)
    tl.store(lse_T + t, (highest + tl.log2(mass)) * LN2)
    if ENTROPY:
        mean = tl.sum(tl.exp2(drop) * (moment + total * drop), axis=0) / mass
        tl.store(entropy_T + t, (tl.log2(mass) - mean) * LN2)
    target = tl.load(targets + t)
    known = (target >= 0) & (target < V)
    x = tl.load(row + target, mask=known, other=0.0).to(ACC) * (SCALE * LN2)
    tl.store(chosen_T + t, tl.where(known, x, float("nan")))


@jit
def _backward_kernel(logits, targets, lse_T, entropy_T, grad_logp_T, grad_entropy_T, gradient, V, stride,
                     gradient_stride, SCALE: tl.constexpr, TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
                     ENTROPY: tl.constexpr, ACC: tl.constexpr):
    """One block of a row a program; reads its logits before it writes, so that both may be the same memory."""
    blocks = tl.cdiv(V, BLOCK)
    t = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + t * stride + column, mask=column < V, other=0.0).to(ACC)
    lse, grad = tl.load(lse_T + t), tl.load(grad_logp_T + t)
    entropy, grad_entropy = lse, grad
    if ENTROPY:
        entropy, grad_entropy = tl.load(entropy_T + t), tl.load(grad_entropy_T + t)
    log_p = clamp(x * (SCALE * LN2) - lse, LOWEST, float("inf"))
    out = tile_gradient(log_p, column == tl.load(targets + t), entropy, grad, grad_entropy, ENTROPY) / TEMPERATURE
    tl.store(gradient + t * gradient_stride + column, out.to(gradient.dtype.element_ty), mask=column < V)


# ------------------------------------------------------------------------------------------------ both directions


@torch.library.custom_op("group_dro::logits_logprob", mutates_args=())
def _forward(logits: Tensor, targets: Tensor, temperature: float, entropy: bool,
             on_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse, entropy: (T,) each, in float32 or wider. Without `entropy` the last is not meant to be used."""
    T, V = logits.shape
    check_targets(targets, V)
    out = torch.zeros(3, T, device=logits.device, dtype=torch.promote_types(logits.dtype, torch.float32))
    if on_triton and T:
        _forward_kernel[(T,)](logits, targets, *out, V, logits.stride(0), SCALE=math.log2(math.e) / temperature,
                              STEPS=STEPS, LANES=LANES, ENTROPY=entropy, ACC=accumulator(logits), num_warps=4)
    else:
        _forward_reference(logits, targets, temperature, entropy, out)
    ignored = targets == IGNORE_INDEX
    return (out[0] - out[1]).masked_fill(ignored, 0.0), out[1].clone(), out[2].masked_fill(ignored, 0.0)


@_forward.register_fake
def _(logits, targets, temperature, entropy, on_triton):
    like = targets.new_empty(targets.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    return like, torch.empty_like(like), torch.empty_like(like)


@torch.library.custom_op("group_dro::logits_logprob_backward", mutates_args=("out",))
def _backward(grad_logp: Tensor, grad_entropy: Tensor | None, logits: Tensor, targets: Tensor, lse: Tensor,
              entropy: Tensor, temperature: float, on_triton: bool, out: Tensor) -> None:
    """The gradient in the logits, into `out` (T, V), which may be the logits themselves."""
    T, V = logits.shape
    counts = targets != IGNORE_INDEX
    grad_logp = torch.where(counts, grad_logp, 0.0)
    grad_entropy = None if grad_entropy is None else torch.where(counts, grad_entropy, 0.0)
    if on_triton and T:
        _backward_kernel[(T * triton.cdiv(V, BLOCK),)](
            logits, targets, lse, entropy, grad_logp, grad_entropy, out, V, logits.stride(0), out.stride(0),
            SCALE=math.log2(math.e) / temperature, TEMPERATURE=temperature, BLOCK=BLOCK,
            ENTROPY=grad_entropy is not None, ACC=accumulator(logits), num_warps=8)
    else:
        _backward_reference(logits, targets, lse, entropy, grad_logp, grad_entropy, temperature, out)


class _LogitsLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, entropy, inplace_backward, on_triton):
        logp, lse, entropy_T = _forward(logits, targets, temperature, entropy, on_triton)
        ctx.save_for_backward(logits, targets, lse, entropy_T)
        ctx.settings = temperature, inplace_backward, on_triton
        ctx.set_materialize_grads(False)
        return (logp, entropy_T.clone()) if entropy else (logp, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        logits, targets, lse, entropy_T = ctx.saved_tensors
        temperature, inplace_backward, on_triton = ctx.settings
        if grad_logp is None:
            grad_logp = torch.zeros_like(lse)
        out = logits.detach() if inplace_backward else torch.empty_like(logits)
        _backward(grad_logp, grad_entropy, logits.detach(), targets, lse, entropy_T, temperature, on_triton, out)
        return out, None, None, None, None, None


def logits_logprob(logits: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False,
                   inplace_backward: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets` under softmax(logits / temperature), and the entropy of that distribution, in nats.

    logits (T, V) of any floating dtype, contiguous along V, targets (T,) int64 -> logp (T,) float32 (float64 for
    float64), and with `entropy` also the entropy (T,); differentiable once. A target of -100 gives 0 and no gradient;
    any other that is no column raises IndexError on CPU and gives NaN on CUDA. -inf logits are words of probability 0.

    `inplace_backward` writes the gradient over the logits: nothing else may need them, and a second backward raises.
    """
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"shapes do not fit: logits {tuple(logits.shape)}, targets {tuple(targets.shape)}")
    if not logits.is_floating_point() or logits.stride(1) != 1:
        raise ValueError(f"logits must be floating and contiguous along V, got {logits.dtype}, {logits.stride()}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logp, entropy_T = _LogitsLogprob.apply(logits, targets.long().contiguous(), float(temperature), entropy,
                                           inplace_backward, use_triton(backend, logits))
    return (logp, entropy_T) if entropy else logp
