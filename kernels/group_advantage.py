"""GRPO's advantage (3) for rollout groups of any sizes, with the adversary's weight (16) on top.

    A[i, j] = clip((r[i, j] - mean_i) / (std_i + eps), -clip, clip) * weight[i]

mean_i and std_i (population) are over the rollouts of prompt i. The order matters: the weight comes after the clip, so
that clipping does not undo it. A group whose rewards are all equal, singletons included, gives exactly 0: in floating
point the mean of equal numbers need not be that number, and dividing such dust by eps can reach 0.3.
"""

import torch
from torch import Tensor


def group_advantage(rewards: Tensor, offsets: Tensor, weights: Tensor | None = None, *, eps: float = 1e-6,
                    clip: float | None = None, std_normalize: bool = True) -> tuple[Tensor, Tensor]:
    """rewards (R,), offsets (P + 1,) int64 from 0 to R, weights (P,) or None -> advantages (R,) in the rewards' dtype,
    and constant (P,) bool: which prompts' rewards are all equal (empty groups too), so that they teach nothing.

    Group i is rewards[offsets[i]:offsets[i + 1]] and may be empty. `std_normalize=False` is Dr. GRPO's variant.
    """
    if offsets[0] != 0 or offsets[-1] != len(rewards):
        raise ValueError(f"offsets must go from 0 to {len(rewards)}, got {int(offsets[0])} to {int(offsets[-1])}")
    size = offsets.diff()  # (P,)
    owner = torch.repeat_interleave(torch.arange(len(size), device=rewards.device), size)  # (R,)
    r = rewards.double()
    low = torch.full((len(size),), torch.inf, dtype=r.dtype, device=r.device).scatter_reduce(0, owner, r, "amin")
    high = torch.full_like(low, -torch.inf).scatter_reduce(0, owner, r, "amax")
    constant = high <= low
    mean = torch.zeros_like(low).index_add(0, owner, r) / size
    centred = torch.where(constant[owner], 0.0, r - mean[owner])
    advantage = centred
    if std_normalize:
        std = (torch.zeros_like(low).index_add(0, owner, centred**2) / size).sqrt()  # two passes: no cancellation
        advantage = torch.where(constant[owner], 0.0, centred / (std[owner] + eps))  # 0 / 0 with eps = 0
    if clip is not None:
        advantage = advantage.clamp(-clip, clip)
    if weights is not None:
        advantage = advantage * weights.double()[owner]
    return advantage.to(rewards.dtype), constant
