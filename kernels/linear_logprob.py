"""Log-probabilities of given tokens straight from hidden states and head, without logits of the whole batch.

    logit[t, v] = hidden[t] . weight[v] / temperature
    logp[t]     = logit[t, target_t] - logsumexp_v logit[t, v]
    entropy[t]  = -sum_v p[t, v] log p[t, v]

With 16,384 tokens and 151,936 words the logits alone are 10 GB in float32, and as much again in backward. So rows are
worked off in chunks whose logits stay under `MAX_LOGITS`; backward computes a chunk's logits again (activation
checkpointing), so that at no time more than one chunk exists. Logits are float32 from the accumulator to the softmax,
whatever the dtype of the operands: rounded to bf16, log-probs at this vocabulary are off by up to 3e-2.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 24  # elements of one chunk of float32 logits: 64 MiB


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0,
                   entropy: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets`, and the entropy of the distributions they were drawn from.

    hidden (N, D) and weight (V, D) of one floating dtype, targets (N,) int64 -> logp (N,) float32, and with `entropy`
    also the entropy (N,) float32, in nats. Both are differentiable in hidden and weight.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f"shapes do not fit: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
                         f"targets {tuple(targets.shape)}")
    full = torch.promote_types(hidden.dtype, torch.float32)  # float64 stays float64, for gradcheck
    weight = weight.to(full)  # once: chunks then add up their gradients in float32, whatever the weight's dtype
    rows = max(1, MAX_LOGITS // weight.shape[0])
    if len(hidden) <= rows:
        return _chunk(hidden, weight, targets, temperature, entropy)
    parts = [checkpoint(_chunk, h, weight, t, temperature, entropy, use_reentrant=False)
             for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)]
    return tuple(torch.cat(p) for p in zip(*parts, strict=True)) if entropy else torch.cat(parts)


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool):
    logits = hidden.to(weight.dtype) @ weight.T / temperature  # (n, V)
    logps = logits.log_softmax(dim=1)
    logp = logps.gather(1, targets[:, None]).squeeze(1)
    if not entropy:
        return logp
    return logp, -(logps.exp() * logps).sum(dim=1)
