"""The loss (4)-(7) against its definition, token by token in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout import Batch
from train import grpo_loss, token_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32 = torch.float64, torch.float32
PAPER = dict(eps_low=0.2, eps_high=0.28, beta=0.0)


def loss_case(lengths=(1, 2, 63, 64, 65, 130), dtype=F64, seed=0) -> dict[str, Tensor]:
    """grpo_loss's tensors by name. Some tokens are at their reference; some responses have advantage 0."""
    g = torch.Generator().manual_seed(seed)
    n, S = sum(lengths), len(lengths)
    logp = -4 * torch.rand(n, generator=g, dtype=F64)
    noise = 0.4 * torch.randn(2, n, generator=g, dtype=F64)
    advantage = torch.randn(S, generator=g, dtype=F64)
    weight, token_weight = 0.1 + 3 * torch.rand(2, S, generator=g, dtype=F64)
    advantage[1::4] = 0
    ref = logp + noise[1]
    ref[::5] = logp[::5]
    case = dict(logp=logp, old_logp=logp + noise[0], ref_logp=ref, advantage=advantage, weight=weight,
                token_weight=token_weight)
    return {k: x.to(dtype) for k, x in case.items()} | {"offsets": torch.tensor([0, *np.cumsum(lengths)])}


def single_tokens(log_ratios, advantages, dtype=F32) -> dict[str, Tensor]:
    """Responses of one token each, of weight 1, at their reference."""
    old, ones = torch.zeros(len(log_ratios), dtype=dtype), torch.ones(len(log_ratios), dtype=dtype)
    logp = torch.tensor(log_ratios, dtype=dtype)
    return dict(logp=logp, old_logp=old, ref_logp=logp, advantage=torch.tensor(advantages, dtype=dtype), weight=ones,
                token_weight=ones, offsets=torch.arange(len(log_ratios) + 1))


def loop_loss(logp, old_logp, ref_logp, advantage, weight, token_weight, offsets, *, eps_low, eps_high, beta):
    """(loss, J, KL, clipped tokens, gradient) token by token through autograd, in float64, with the clip written as
    the two cases it is."""
    x = logp.double().detach().requires_grad_()
    tokens, old, loss, means, clipped = x.unbind(), old_logp.double(), torch.zeros((), dtype=F64), [], 0
    for s, A in enumerate(advantage.double()):
        J_s = kl_s = 0
        for t in range(int(offsets[s]), int(offsets[s + 1])):
            objective = (tokens[t] - old[t]).exp() * A
            if A > 0 and objective > (1 + eps_high) * A:
                objective, clipped = (1 + eps_high) * A, clipped + 1
            elif A < 0 and objective > (1 - eps_low) * A:
                objective, clipped = (1 - eps_low) * A, clipped + 1
            log_ratio = ref_logp[t].double() - tokens[t]
            kl = log_ratio.exp() - log_ratio - 1 if beta else torch.zeros(())
            loss = loss + token_weight[s].double() * (beta * kl - weight[s].double() * objective)
            J_s, kl_s = J_s + objective.item(), kl_s + kl.item()
        length = int(offsets[s + 1] - offsets[s])
        means.append((J_s / length, kl_s / length))
    loss.backward()
    return loss.detach(), *torch.tensor(means, dtype=F64).unbind(1), clipped, x.grad


def loss_of(case: dict[str, Tensor], **options):
    """(loss, J, KL, clipped tokens, gradient) of grpo_loss."""
    case = {k: x.to(DEVICE) for k, x in case.items()}
    logp = case.pop("logp").requires_grad_()
    loss, J_S, kl_S, clipped = grpo_loss(logp, **case, **{**PAPER, **options})
    gradient, = torch.autograd.grad(loss, logp)
    assert not J_S.requires_grad and not kl_S.requires_grad
    return loss.detach().cpu(), J_S.cpu(), kl_S.cpu(), clipped, gradient.cpu()


@pytest.mark.parametrize("dtype", [F64, F32], ids=["f64", "f32"])
@pytest.mark.parametrize("options", [{}, {"eps_low": 0.0, "eps_high": 0.5}, {"beta": 0.04}], ids=str)
def test_the_loss_equals_a_loop(options, dtype):
    case = loss_case(dtype=dtype)
    got, expected = loss_of(case, **options), loop_loss(**case, **{**PAPER, **options})
    eps = 1e-5 if dtype == F32 else 1e-12
    for i in (0, 1, 2, 4):
        assert got[i].dtype == dtype
        torch.testing.assert_close(got[i].double(), expected[i].double(), rtol=eps, atol=eps)
    assert 0 < got[3] == expected[3]  # the clip acts
    assert torch.equal(got[4] == 0, expected[4] == 0)
    if not options.get("beta"):  # with a KL term the clip or advantage 0 leaves its gradient
        assert (got[4] == 0).sum() == got[3] + case["offsets"].diff()[case["advantage"] == 0].sum()


@pytest.mark.parametrize("beta", [0.0, 0.04], ids=["no KL", "KL"])
def test_the_loss_passes_gradcheck(beta):
    case = {k: x.to(DEVICE) for k, x in loss_case((1, 2, 3), seed=2).items()}
    logp = case.pop("logp")
    ratio = (logp - case["old_logp"]).exp()
    assert min((ratio - edge).abs().min() for edge in (0.8, 1.28)) > 1e-4  # no kink under the probe
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, **case, **{**PAPER, "beta": beta})[0],
                                    (logp.requires_grad_(),))


@pytest.mark.parametrize("widths", [{"eps_low": 0.0}, {"eps_high": 0.0}, {"eps_low": 0.0, "eps_high": 0.0}], ids=str)
def test_a_ratio_exactly_on_either_edge_is_not_clipped(widths):
    """Ratio 1 with widths 0 is the one edge that floating point hits exactly."""
    got = loss_of(single_tokens([0.0, 0.0], [2.0, -2.0]), **widths)
    assert got[3] == 0 and got[4].tolist() == [-2.0, 2.0]
    if len(widths) == 2:
        beyond = loss_of(single_tokens([1e-3, -1e-3], [2.0, -2.0]), **widths)
        assert beyond[3] == 2 and not beyond[4].any()


def test_absurd_ratios_stay_finite_and_without_gradient():
    log_ratio, A = [-1000.0, -20.5, 20.5, 1000.0] * 2, [-1.0] * 4 + [1.0] * 4
    got = loss_of(single_tokens([*log_ratio, 0.0], [*A, 1.0]))
    assert got[0].isfinite() and got[4].tolist() == [0.0] * 8 + [-1.0]
    limit = [math.copysign(20, x) for x in log_ratio]
    value = [min(math.exp(x) * a, (1.28 if x > 0 else 0.8) * a) for x, a in zip(limit, A, strict=True)]
    np.testing.assert_allclose(got[1][:-1], value, rtol=1e-5)
    to_base = single_tokens([0.0] * 8, [0.0] * 8) | {"ref_logp": torch.tensor(log_ratio)}  # the other log-ratio
    kl = loss_of(to_base, beta=0.5)
    np.testing.assert_allclose(kl[2], [math.exp(x) - x - 1 for x in limit], rtol=1e-5)
    assert not kl[4].any()


def test_a_prompts_weight_scales_its_advantages_and_not_the_kl():
    """(16) on the loss is (5) with advantages times the weight; the J that is reported has no weight in it."""
    case = loss_case()
    plain = case | {"weight": torch.ones_like(case["weight"])}
    weighted, scaled = loss_of(case), loss_of(plain | {"advantage": case["advantage"] * case["weight"]})
    for i in (0, 3, 4):
        torch.testing.assert_close(weighted[i], scaled[i])
    torch.testing.assert_close(weighted[1], loss_of(plain)[1], rtol=0, atol=0)
    torch.testing.assert_close(weighted[1] * case["weight"], scaled[1])
    gradients = [loss_of(c, beta=0.1)[4] - loss_of(c)[4] for c in (case, plain)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].any()


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Over the whole vocabulary, its expectation under the policy is KL(policy || reference)."""
    policy, reference = torch.randn(2, 9, generator=torch.Generator().manual_seed(4), dtype=F64).log_softmax(1)
    p = policy.exp()  # one response a word, weighted by its probability
    got = loss_of(dict(logp=policy, old_logp=policy, ref_logp=reference, advantage=torch.zeros_like(p),
                       weight=torch.ones_like(p), token_weight=p, offsets=torch.arange(10)), beta=1.0)
    torch.testing.assert_close(got[0], (p * (policy - reference)).sum(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("which, beta", [("logp", 0.0), ("old_logp", 0.0), ("logp", 0.04), ("ref_logp", 0.04)])
def test_a_nan_logprob_gives_a_nan_loss(which, beta):
    """So a run ends by it (train.update)."""
    case = loss_case(dtype=F32)
    case[which][70] = torch.nan
    assert loss_of(case, beta=beta)[0].isnan()


def test_either_averaging_is_the_mean_it_says_and_prompts_of_weight_1_are_rollouts_weighted_by_q_n_bar_over_n():
    """(7), a mean over tokens, then a prompt's rollouts, then prompts; or over tokens, then rollouts. Prompts outside
    the mini-batch weigh nothing. No third is needed for weights that undo an allocation."""
    case, n_P, inside = loss_case((3, 1, 4, 1, 5, 9, 2, 6, 5)), np.array([3, 1, 2, 2, 1]), np.array([0, 2, 4])
    lengths = case["offsets"].diff().numpy()
    batch = Batch([[1]] * 5, np.repeat(np.arange(5), n_P), case["offsets"].numpy(), np.zeros(36, int),
                  np.zeros(36, np.float32), np.zeros(9, bool))
    here_R, case["weight"] = np.isin(batch.owner, inside), torch.ones(9, dtype=F64)
    J_P = loss_of(case)[1].split(n_P.tolist())
    means = {"prompt": torch.stack([J_P[p].mean() for p in inside]).mean(),
             "rollout": torch.cat([J_P[p] for p in inside]).mean()}
    weight = {name: token_weights(name, batch, n_P, inside) for name in means}
    for name, mean in means.items():
        assert (weight[name] @ lengths) == pytest.approx(1) and not weight[name][~here_R].any()
        torch.testing.assert_close(loss_of(case | {"token_weight": torch.from_numpy(weight[name])})[0], -mean)
    assert means["prompt"] != pytest.approx(means["rollout"].item(), rel=0.01)
    q_P = np.array([0.5, 9, 2.0, 9, 0.7])
    by_prompt_R, by_rollout_R = q_P[batch.owner] / q_P[inside].mean(), (q_P / n_P)[batch.owner]
    np.testing.assert_allclose(weight["prompt"] * by_prompt_R,
                               weight["rollout"] * by_rollout_R / by_rollout_R[here_R].mean())
