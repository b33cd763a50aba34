"""The token loss against its definition, token by token in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loss import grpo_token_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32 = torch.float64, torch.float32


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


LENGTHS = (1, 2, 63, 64, 65, 130)


def loss_case(lengths=(1, 2, 63, 64, 65), dtype=F64, seed=0):
    """logp, old_logp, advantage, offsets, token_weight and ref_logp by name.

    Some tokens are at their reference; some responses have advantage 0, one has weight 0.
    """
    g = generator(seed)
    n, S = sum(lengths), len(lengths)
    logp = -4 * torch.rand(n, generator=g, dtype=F64)
    noise = 0.4 * torch.randn(2, n, generator=g, dtype=F64)
    A, weight = torch.randn(S, generator=g, dtype=F64), torch.rand(S, generator=g, dtype=F64)
    A[1::4], weight[0] = 0, 0
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    ref = logp + noise[1]
    ref[::5] = logp[::5]
    case = [x.to(DEVICE, dtype) for x in (logp, logp + noise[0], A, weight)]
    case.insert(3, offsets.to(DEVICE))
    return case, {"ref_logp": ref.to(DEVICE, dtype)}


def loop_loss(logp, old_logp, advantage, offsets, token_weight, *, eps_low=0.2, eps_high=0.28, beta=0.0,
              ref_logp=None):
    """(loss, surrogate, kl, clipped, idle, gradient) token by token through autograd, in float64, with the clip
    written as the two cases it is."""
    x = logp.double().detach().requires_grad_()
    tokens, old, loss, stats = x.unbind(), old_logp.double(), torch.zeros((), dtype=F64), []
    for s, a in enumerate(advantage.double()):
        surrogate = kl = clips = 0
        for t in range(int(offsets[s]), int(offsets[s + 1])):
            objective = (tokens[t] - old[t]).exp() * a
            if a > 0 and objective > (1 + eps_high) * a:
                objective, clips = (1 + eps_high) * a, clips + 1
            elif a < 0 and objective > (1 - eps_low) * a:
                objective, clips = (1 - eps_low) * a, clips + 1
            surrogate += objective.item()
            token = -objective
            if beta:
                log_ratio = ref_logp[t].double() - tokens[t]
                k3 = log_ratio.exp() - log_ratio - 1
                kl += k3.item()
                token = token + beta * k3
            loss = loss + token_weight[s].double() * token
        length = int(offsets[s + 1] - offsets[s])
        stats.append((surrogate / length, kl / length, clips))
    loss.backward()
    idle = [(g == 0).sum().item() for g in x.grad.split(offsets.diff().tolist())]
    surrogate_S, kl_S, clipped_S = torch.tensor(stats, dtype=F64).unbind(1)
    return loss.detach(), surrogate_S, kl_S, clipped_S, torch.tensor(idle), x.grad


def loss_of(case, scale=1.0, **options):
    """(loss, surrogate, kl, clipped, idle, gradient of `scale` times the loss)."""
    case = [x.to(DEVICE) for x in case]
    options = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in options.items()}
    logp = case[0].clone().requires_grad_()
    result = grpo_token_loss(logp, *case[1:], **options)
    (scale * result.loss).backward()
    assert not any(x.requires_grad for x in result[1:])
    return *(x.detach().cpu() for x in result), logp.grad.cpu()


@pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
@pytest.mark.parametrize("options", [
    {}, {"eps_low": 0.0, "eps_high": 0.5}, {"beta": 0.04, "ref_logp": True},
], ids=str)
def test_token_loss_equals_a_loop(options, dtype):
    case, extra = loss_case(LENGTHS, dtype=dtype)
    options = {k: extra[k] if v is True else v for k, v in options.items()}
    got, expected = loss_of(case, **options), loop_loss(*case, **options)
    eps = 1e-5 if dtype == F32 else 1e-12
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y.double(), rtol=eps, atol=eps)
    clipped, idle = got[3].sum(), got[4].sum()
    assert 0 < clipped and 0 < idle < len(case[0]) and ("beta" in options or clipped < idle)
    torch.testing.assert_close(loss_of(case, -3.0, **options)[5], -3 * got[5], rtol=1e-6, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["no KL", "KL"])
def test_token_loss_passes_gradcheck(beta):
    (logp, *rest), extra = loss_case((1, 2, 3), seed=2)
    ratio = (logp - rest[0]).exp()
    assert min((ratio - edge).abs().min() for edge in (0.8, 1.28)) > 1e-4  # no kink under the probe
    rest, extra = [x.to(DEVICE) for x in rest], {k: x.to(DEVICE) for k, x in extra.items()}
    assert torch.autograd.gradcheck(lambda x: grpo_token_loss(x, *rest, **extra, beta=beta).loss,
                                    (logp.to(DEVICE).requires_grad_(),))


def single_tokens(log_ratios, advantages, dtype=F64):
    """A case of responses of one token each, of weight 1."""
    n = len(log_ratios)
    return [torch.tensor(log_ratios, dtype=dtype), torch.zeros(n, dtype=dtype), torch.tensor(advantages, dtype=dtype),
            torch.arange(n + 1), torch.ones(n, dtype=dtype)]


def test_the_clip_takes_the_gradient_exactly_where_it_says():
    """With a positive advantage only above 1 + eps_high, with a negative one only below 1 - eps_low."""
    table = [(2.0, 1.279, False, 1.279), (2.0, 1.281, True, 1.28), (2.0, 9.0, True, 1.28),
             (2.0, 0.799, False, 0.799), (2.0, 0.01, False, 0.01),
             (-2.0, 0.801, False, 0.801), (-2.0, 0.799, True, 0.8), (-2.0, 0.01, True, 0.8),
             (-2.0, 1.281, False, 1.281), (-2.0, 9.0, False, 9.0), (0.0, 9.0, False, 9.0), (0.0, 0.01, False, 0.01)]
    A, ratio, clipped, value = (np.array(column) for column in zip(*table, strict=True))
    got = loss_of(single_tokens(np.log(ratio).tolist(), A.tolist()))
    assert got[3].bool().tolist() == clipped.tolist()
    np.testing.assert_allclose(got[1], value * A, rtol=1e-12)
    np.testing.assert_allclose(got[5], np.where(clipped, 0.0, -ratio * A), rtol=1e-12)


@pytest.mark.parametrize("widths", [{"eps_low": 0.0}, {"eps_high": 0.0}, {"eps_low": 0.0, "eps_high": 0.0}], ids=str)
def test_a_ratio_exactly_on_either_edge_is_not_clipped(widths):
    """Ratio 1 with widths 0 is the one edge that floating point hits exactly."""
    got = loss_of(single_tokens([0.0, 0.0], [2.0, -2.0], F32), **widths)
    assert not got[3].any() and not got[4].any() and got[5].tolist() == [-2.0, 2.0]
    if len(widths) == 2:
        beyond = loss_of(single_tokens([1e-3, -1e-3], [2.0, -2.0], F32), **widths)
        assert beyond[3].all() and beyond[4].all() and not beyond[5].any()


def test_absurd_ratios_stay_finite_and_without_gradient():
    log_ratio, A = [-1000.0, -20.5, 20.5, 1000.0] * 2, [-1.0] * 4 + [1.0] * 4
    got = loss_of(single_tokens([*log_ratio, 0.0], [*A, 1.0], F32))
    assert all(x.isfinite().all() for x in got) and got[5].tolist() == [0.0] * 8 + [-1.0] and got[4].sum() == 8
    limit = [math.copysign(20, x) for x in log_ratio]
    value = [min(math.exp(x) * a, (1.28 if x > 0 else 0.8) * a) for x, a in zip(limit, A, strict=True)]
    np.testing.assert_allclose(got[1][:-1], value, rtol=1e-5)
    kl = loss_of(single_tokens([0.0] * 8, [0.0] * 8, F32), beta=0.5, ref_logp=torch.tensor(log_ratio))  # the other
    np.testing.assert_allclose(kl[2], [math.exp(x) - x - 1 for x in limit], rtol=1e-5)
    assert not kl[5].any() and kl[4].all()


def test_at_ratio_one_the_surrogate_is_the_advantage_and_the_gradient_its_policy_gradient():
    (logp, _, A, offsets, weight), _ = loss_case(dtype=F32)
    got = loss_of((logp, logp, A, offsets, weight))
    torch.testing.assert_close(got[1], A, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[5], -(weight * A).repeat_interleave(offsets.diff()), rtol=1e-6, atol=1e-7)
    assert not got[3].any()


def test_at_the_reference_there_is_no_kl_gradient():
    case, _ = loss_case(dtype=F32)
    case[2] = torch.zeros_like(case[2])
    got = loss_of(case, beta=0.04, ref_logp=case[0])
    assert all((x == 0).all() for x in (*got[:4], got[5])) and torch.equal(got[4], case[3].diff().float())


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Over the whole vocabulary, its expectation under the policy is KL(policy || reference)."""
    policy, reference = torch.randn(2, 9, generator=generator(4), dtype=F64).log_softmax(1)
    p = policy.exp()  # one response a word, weighted by its probability
    got = loss_of((policy, policy, torch.zeros_like(p), torch.arange(10), p), beta=1.0, ref_logp=reference)
    torch.testing.assert_close(got[0], (p * (policy - reference)).sum(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("place, beta", [(0, 0.0), (1, 0.0), (0, 0.04)])
def test_a_nan_logprob_gives_a_nan_loss(place, beta):
    case, extra = loss_case(dtype=F32)
    case[place][70] = torch.nan
    got = loss_of(case, beta=beta, ref_logp=extra["ref_logp"])
    assert got[0].isnan() and got[5][70].isnan() and got[5].isnan().sum() == 1 and not got[3].isnan().any()


def test_the_three_averagings_are_choices_of_token_weight():
    (logp, old, A, offsets, _), _ = loss_case((3, 1, 4, 1, 5, 9, 2))
    L, n_P = offsets.diff().double(), [3, 1, 2, 1]  # rollouts of each prompt
    n_R = torch.tensor([n for n in n_P for _ in range(n)], dtype=F64)
    R, P, T = 7, len(n_P), float(L.sum())
    J = loss_of((logp, old, A, offsets, torch.ones_like(L)))[1]  # mean over a response's tokens
    means = {
        "prompts": (1 / (P * n_R * L), torch.stack([group.mean() for group in J.split(n_P)]).mean()),
        "rollouts": (1 / (R * L), J.mean()),
        "tokens": (torch.ones_like(L) / T, (J * L).sum() / T),
    }
    for weight, mean in means.values():
        torch.testing.assert_close(loss_of((logp, old, A, offsets, weight))[0], -mean)
    assert len({round(mean.item(), 6) for _, mean in means.values()}) == 3  # and they are not the same thing


def test_a_batch_is_the_sum_of_its_parts():
    """Weights carry the denominators, so no split into micro-batches changes loss or reports."""
    (logp, old, A, offsets, weight), extra = loss_case()
    whole, parts = loss_of((logp, old, A, offsets, weight), beta=0.1, **extra), []
    for a, b in ((0, 2), (2, 3), (3, 5)):
        at = slice(int(offsets[a]), int(offsets[b]))
        parts.append(loss_of((logp[at], old[at], A[a:b], offsets[a : b + 1] - offsets[a], weight[a:b]), beta=0.1,
                             **{k: x[at] for k, x in extra.items()}))
    loss, *rest = zip(*parts, strict=True)
    for part, expected in zip((sum(loss), *map(torch.cat, rest)), whole, strict=True):
        torch.testing.assert_close(part, expected)


def test_no_responses_lose_nothing():
    empty = torch.zeros(0)
    got = loss_of((empty, empty, empty, torch.zeros(1, dtype=torch.long), empty))
    assert got[0] == 0 and all(x.shape == (0,) for x in got[1:])


def test_beta_without_a_reference_and_mixed_dtypes_raise():
    case, extra = loss_case()
    with pytest.raises(ValueError, match="needs ref_logp"):
        grpo_token_loss(*case, beta=0.01)
    with pytest.raises(ValueError, match=r"ref_logp must be \(195,\) torch.float64, got \(195,\) torch.float32"):
        grpo_token_loss(*case, ref_logp=extra["ref_logp"].float())
