"""GRPO's advantage (3) for rollout groups of any sizes, with a weight for each on top: in training that of the rule.

    A[i, j] = clip((r[i, j] - mean_i) / (std_i + eps), -clip, clip) * weight[i]

mean_i and std_i (population) are over the rollouts of prompt i. The order matters: the weight comes after the clip, so
that clipping does not undo it. A group whose rewards are all equal, singletons included, gives exactly 0: in floating
point the mean of equal numbers need not be that number, and dividing such dust by eps can reach 0.3. The variance is
taken in a second pass, about the mean: the one-pass form cancels. Everything inside is float64; a step has thousands
of rewards, so what counts on CUDA is the number of launches, one here and some thirty in plain torch.
"""

import torch
from torch import Tensor

from kernels.backend import INTERPRETED, clamp, jit, tl, use_triton

BLOCK = 8 if INTERPRETED else 32  # rollouts that one program, a warp, holds at a time; groups may be longer


def _reference(rewards: Tensor, offsets: Tensor, weights: Tensor | None, eps: float,
               clip: float | None) -> tuple[Tensor, Tensor]:
    size = offsets.diff()  # (P,)
    owner = torch.repeat_interleave(torch.arange(len(size), device=rewards.device), size)  # (R,)
    r = rewards.double()
    low = torch.full((len(size),), torch.inf, dtype=r.dtype, device=r.device).scatter_reduce(0, owner, r, "amin")
    high = torch.full_like(low, -torch.inf).scatter_reduce(0, owner, r, "amax")
    constant = high <= low
    mean = torch.zeros_like(low).index_add(0, owner, r) / size
    centred = torch.where(constant[owner], 0.0, r - mean[owner])
    std = (torch.zeros_like(low).index_add(0, owner, centred**2) / size).sqrt()
    advantage = torch.where(constant[owner], 0.0, centred / (std[owner] + eps))  # 0 / 0 with eps = 0
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    if weights is not None:
        advantage = advantage * weights.double()[owner]
    return advantage.to(rewards.dtype), constant


@jit
def _kernel(rewards, offsets, weights, advantages, constant, EPS: tl.constexpr, CLIP: tl.constexpr,
            BLOCK: tl.constexpr):
    """One group a program, in three walks over its rewards."""
    group = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + group), tl.load(offsets + group + 1)
    lane = tl.arange(0, BLOCK)
    low, high = tl.full((BLOCK,), float("inf"), tl.float64), tl.full((BLOCK,), float("-inf"), tl.float64)
    total, squares = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + lane
        r = tl.load(rewards + at, mask=at < last, other=0.0).to(tl.float64)
        low = tl.minimum(low, tl.where(at < last, r, float("inf")))
        high = tl.maximum(high, tl.where(at < last, r, float("-inf")))
        total += r
    size = tl.maximum(last - first, 1).to(tl.float64)
    mean = tl.sum(total, axis=0) / size
    equal = (tl.max(high, axis=0) <= tl.min(low, axis=0)) & (mean == mean)  # min and max pass over NaN
    for start in range(first, last, BLOCK):
        at = start + lane
        centred = tl.where(at < last, tl.load(rewards + at, mask=at < last, other=0.0).to(tl.float64) - mean, 0.0)
        squares += centred * centred
    scale = tl.where(equal, 1.0, tl.sqrt(tl.sum(squares, axis=0) / size) + EPS)
    for start in range(first, last, BLOCK):
        at = start + lane
        advantage = (tl.load(rewards + at, mask=at < last, other=0.0).to(tl.float64) - mean) / scale
        if CLIP is not None:
            advantage = clamp(advantage, -CLIP, CLIP)
        if weights is not None:
            advantage *= tl.load(weights + group).to(tl.float64)
        advantage = tl.where(equal, 0.0, advantage)
        tl.store(advantages + at, advantage.to(advantages.dtype.element_ty), mask=at < last)
    tl.store(constant + group, equal)


def _launch(rewards: Tensor, offsets: Tensor, weights: Tensor | None, eps: float,
            clip: float | None) -> tuple[Tensor, Tensor]:
    advantages, constant = torch.empty_like(rewards), rewards.new_empty(len(offsets) - 1, dtype=torch.bool)
    if len(constant):
        _kernel[(len(constant),)](rewards, offsets, weights, advantages, constant, EPS=eps, CLIP=clip,
                                  BLOCK=BLOCK, num_warps=1)
    return advantages, constant


def group_advantage(rewards: Tensor, offsets: Tensor, weights: Tensor | None = None, *, eps: float = 1e-6,
                    clip: float | None = None, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """rewards (R,), offsets (P + 1,) int64 from 0 to R, weights (P,) or None -> advantages (R,) in the rewards' dtype,
    and constant (P,) bool: which prompts' rewards are all equal (empty groups too), so that they teach nothing.

    Group i is rewards[offsets[i]:offsets[i + 1]] and may be empty. Offsets are checked on CPU (ValueError); on
    CUDA that would wait for the device, and they must be right.
    """
    if rewards.ndim != 1 or offsets.ndim != 1 or not len(offsets) or offsets.is_floating_point():
        raise ValueError(f"rewards must be (R,) and offsets integers (P + 1,), got {tuple(rewards.shape)} and "
                         f"{tuple(offsets.shape)} {offsets.dtype}")
    if weights is not None and weights.shape != (len(offsets) - 1,):
        raise ValueError(f"weights must be ({len(offsets) - 1},), got {tuple(weights.shape)}")
    if offsets.device.type == "cpu" and (offsets[0] != 0 or offsets[-1] != len(rewards) or (offsets.diff() < 0).any()):
        raise ValueError(f"offsets must go from 0 to {len(rewards)} and never fall, got {int(offsets[0])} to "
                         f"{int(offsets[-1])}, smallest step {int(offsets.diff().min()) if len(offsets) > 1 else None}")
    if not use_triton(backend, rewards):
        return _reference(rewards, offsets, weights, eps, clip)
    return _launch(rewards.contiguous(), offsets.contiguous(), None if weights is None else weights.contiguous(), eps,
                   clip)
