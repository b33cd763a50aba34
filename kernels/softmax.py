"""The softmax that `linear_logprob` sums up piece by piece, and the gradient in its logits.

A piece of a row of logits leaves three numbers: its maximum and two sums relative to it,

    peak = max_v l_v,   total = sum_v exp(l_v - peak),   moment = sum_v exp(l_v - peak) (l_v - peak),

which combine exactly with those of other pieces into lse = log sum_v exp l_v and entropy = lse - sum_v p_v l_v. Taking
the moment relative to the maximum, too, keeps a constant added to all logits out of the entropy's rounding error.

Gradient, for incoming gradients g of log p_y and h of the entropy, with p = exp(l - lse):

    d/dl_v = g (1[v = y] - p_v) - h p_v (log p_v + entropy)
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import IGNORE_INDEX, jit, tl

LOWEST = tl.constexpr(-1e30)  # stands for -inf at columns past the end: -inf breeds NaN where it meets a weight of 0
LN2 = tl.constexpr(math.log(2))


class Partial(NamedTuple):
    """What pieces of the rows leave, (..., T) each."""

    peak: Tensor
    total: Tensor
    moment: Tensor

    @classmethod
    def of(cls, logits: Tensor, entropy: bool) -> "Partial":
        """Of logits (T, piece), which are overwritten. Without `entropy` the moment is 0."""
        peak = logits.amax(dim=1)
        logits.sub_(peak[:, None])
        if not entropy:
            return cls(peak, logits.exp_().sum(dim=1), torch.zeros_like(peak))
        p = logits.exp()
        return cls(peak, p.sum(dim=1), logits.mul_(p).sum(dim=1))

    def lse_and_entropy(self) -> tuple[Tensor, Tensor]:
        """(T,) each, of the partials (S, T) of S pieces."""
        peak = self.peak.amax(dim=0)
        drop = self.peak - peak
        total = (drop.exp() * self.total).sum(dim=0)
        moment = (drop.exp() * (self.moment + self.total * drop)).sum(dim=0)
        return peak + total.log(), total.log() - moment / total


def of_whole_rows(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(logit of the target, NaN where that is no column; lse; entropy), (n,) each, of logits (n, V), overwritten."""
    inside = (targets >= 0) & (targets < logits.shape[1])
    chosen = torch.where(inside, logits.gather(1, torch.where(inside, targets, 0)[:, None]).squeeze(1), torch.nan)
    return chosen, *Partial(*(x[None] for x in Partial.of(logits, entropy))).lse_and_entropy()


def chunks(rows: int, columns: int, most: int, multiple: int) -> list[slice]:
    """Slices of the rows, each of at most `most` logits or, if that is too few, of `multiple` rows."""
    size = max(1, most // (columns * multiple)) * multiple
    return [slice(first, first + size) for first in range(0, rows, size)]


def logit_gradient(log_p: Tensor, targets: Tensor, entropy: Tensor, grad_logp: Tensor,
                   grad_entropy: Tensor | None) -> Tensor:
    """The gradient above for log p (n, V), which is overwritten."""
    pull = grad_logp[:, None]
    if grad_entropy is not None:
        pull = pull + grad_entropy[:, None] * (log_p + entropy[:, None])
    gradient = log_p.exp_().mul_(pull).neg_()
    row = ((targets >= 0) & (targets < log_p.shape[1])).nonzero().squeeze(1)
    gradient[row, targets[row]] += grad_logp[row]
    return gradient


def check_targets(targets: Tensor, words: int) -> None:
    """IndexError for a target that is no word. Not on CUDA, where it would wait for the device: there logp is NaN."""
    if targets.device.type == "cpu":
        wrong = ((targets < 0) | (targets >= words)) & (targets != IGNORE_INDEX)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(f"targets[{row}] is {int(targets[row])}, and there are {words} words")


@jit
def fold(logits, peak, total, moment, ENTROPY: tl.constexpr):
    """Takes a tile of logits, in units of log 2, into its rows' running partials; starts from LOWEST, 0, 0."""
    higher = tl.maximum(peak, tl.max(logits, axis=1))
    drop = peak - higher
    logits -= higher[:, None]
    p = tl.exp2(logits)
    if ENTROPY:
        moment = tl.exp2(drop) * (moment + total * drop) + tl.sum(p * logits, axis=1)
    total = tl.exp2(drop) * total + tl.sum(p, axis=1)
    return higher, total, moment


@jit
def tile_gradient(log_p, is_target, entropy, grad_logp, grad_entropy, ENTROPY: tl.constexpr):
    """`logit_gradient` of a tile of log p in natural units; everything else broadcasts against it."""
    pull = grad_logp
    if ENTROPY:
        pull += grad_entropy * (log_p + entropy)
    return tl.where(is_target, grad_logp, 0.0) - tl.exp(log_p) * pull
