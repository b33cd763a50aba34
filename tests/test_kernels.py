"""The torch references against their definitions: float64, brute-force loops, and torch.distributions."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import group_advantage, grpo_token_loss, linear_logprob

ROOT = Path(__file__).parents[1]
LINEAR = importlib.import_module("kernels.linear_logprob")  # the package has a function of this name


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------- linear_logprob


def linear_case(n=23, d=16, v=41, dtype=torch.float32, seed=0):
    g = generator(seed)
    hidden, weight = (torch.randn(rows, d, generator=g) for rows in (n, v))
    return (2 * d**-0.5 * hidden).to(dtype), weight.to(dtype), torch.randint(v, (n,), generator=g)  # logits: N(0, 4)


def truth(hidden, weight, targets, temperature=1.0):
    """(logp, entropy) in float64 from the operands as they are."""
    logits = hidden.double() @ weight.double().T / temperature
    logp = logits.log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    return logp, torch.distributions.Categorical(logits=logits).entropy()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("max_logits", [1 << 24, 41 * 4, 1], ids=["one chunk", "chunks of 4 rows", "row by row"])
def test_logprob_and_entropy_equal_float64(monkeypatch, max_logits, temperature):
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", max_logits)
    case = linear_case()
    logp, entropy = linear_logprob(*case, temperature=temperature, entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    for got, expected in zip((logp, entropy), truth(*case, temperature), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(linear_logprob(*case, temperature=temperature), logp)


@pytest.mark.parametrize("max_logits", [1 << 24, 1])
def test_no_rows_give_no_logprobs(monkeypatch, max_logits):
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", max_logits)
    logp, entropy = linear_logprob(*linear_case(n=0), entropy=True)
    assert logp.shape == entropy.shape == (0,)


def test_bf16_operands_do_not_round_the_logits():
    case = linear_case(n=64, d=64, v=500, dtype=torch.bfloat16)
    logp, entropy = linear_logprob(*case, entropy=True)
    assert logp.dtype == entropy.dtype == torch.float32
    expected_logp, expected_entropy = truth(*case)
    assert (logp - expected_logp).abs().max() < 1e-5 and (entropy - expected_entropy).abs().max() < 1e-5
    rounded = (case[0] @ case[1].T).double().log_softmax(1).gather(1, case[2][:, None]).squeeze(1)
    assert (rounded - expected_logp).abs().max() > 3e-3  # what the bound above excludes


def test_logits_far_beyond_exp_stay_exact():
    hidden, weight, targets = linear_case()
    logp = linear_logprob(hidden * 1e3, weight, targets)
    expected, _ = truth(hidden * 1e3, weight, targets)
    assert expected.min() < -1000
    torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=2e-3)


def test_entropy_does_not_feel_a_constant_added_to_all_logits():
    hidden, weight, targets = linear_case()
    weight[:, 0], hidden[:, 0] = 1.0, torch.linspace(-1000, 1000, len(hidden)).round()
    _, entropy = linear_logprob(hidden, weight, targets, entropy=True)
    torch.testing.assert_close(entropy.double(), truth(hidden, weight, targets)[1], rtol=0, atol=2e-4)


def linear_gradients(hidden, weight, targets, dtype=None):
    """Gradients of a random combination of log-probs and entropies in hidden and weight, in float64."""
    hidden, weight = (x.to(dtype or x.dtype).clone().requires_grad_() for x in (hidden, weight))
    logp, entropy = linear_logprob(hidden, weight, targets, temperature=0.8, entropy=True)
    a, b = torch.randn(2, len(targets), generator=generator(1), dtype=torch.float64)
    (a * logp + b * entropy).sum().backward()
    return hidden.grad.double(), weight.grad.double()


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("rows", [1, 4, 22, 23])
def test_chunks_do_not_change_the_gradient(monkeypatch, rows):
    case = linear_case()
    exact = linear_gradients(*case, dtype=torch.float64)
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", rows * 41)
    for got, expected in zip(linear_gradients(*case), exact, strict=True):
        assert relative_error(got, expected) < 1e-5


def test_chunks_do_not_change_the_gradient_in_bf16(monkeypatch):
    case = linear_case(n=2048, dtype=torch.bfloat16)
    exact = linear_gradients(*case, dtype=torch.float64)
    whole = linear_gradients(*case)
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", 16 * 41)
    for chunked, unchunked, expected in zip(linear_gradients(*case), whole, exact, strict=True):
        assert relative_error(chunked, expected) < 1.5 * relative_error(unchunked, expected)


def test_temperature_divides_the_gradient_in_the_weight(monkeypatch):
    """A head scaled by 1/temperature is the same distribution, chunked or not."""
    hidden, weight, targets = linear_case()
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", 5 * 41)
    grads = []
    for scale, temperature in ((1.0, 0.7), (1 / 0.7, 1.0)):
        w = weight.clone().requires_grad_()
        linear_logprob(hidden, w * scale, targets, temperature=temperature).square().sum().backward()
        grads.append(w.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_logits", [1 << 24, 7 * 2], ids=["whole", "chunked"])
def test_linear_logprob_passes_gradcheck(monkeypatch, max_logits):
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", max_logits)
    hidden, weight, targets = linear_case(n=5, d=3, v=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets, temperature=0.7, entropy=True),
        (hidden.requires_grad_(), weight.requires_grad_()))


# MiB that a process of its own holds at most (VmHWM) beyond what it held before, after forward and after backward:
# with chunks of 4 MiB, then with whole logits.
PEAK = """
import importlib, torch
module, T, V = importlib.import_module("kernels.linear_logprob"), 2048, 16384
function, targets = module.linear_logprob, torch.randint(V, (T,))
operands = torch.randn(T, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True)

def peak():
    return next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmHWM")) / 1024

function(*(x[:, :8] for x in operands), targets % 8, entropy=True)[0].sum().backward()  # what the first call loads
for x in operands:
    x.grad = None
before = peak()
for module.MAX_LOGITS in (1 << 20, T * V):
    logp, entropy = function(*operands, targets, entropy=True)
    print(peak() - before)
    gradient = torch.autograd.grad(logp.sum() + entropy.sum(), operands)
    print(peak() - before)
    del gradient, logp, entropy
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from Linux's /proc")
def test_no_more_than_a_chunk_of_logits_ever_exists():
    """2048 x 16384 logits are 128 MiB in float32; either direction must do with a few chunks of 8 MiB."""
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    forward, both, whole_forward, whole_both = map(float, done.stdout.split())
    assert forward < 48 and both < 48
    assert whole_forward > 100 and whole_both > 100  # the probe sees logits where they are made whole


def test_the_backward_keeps_no_logits():
    """Of what autograd holds between forward and backward, nothing is larger than the operands."""
    kept = []
    hidden, weight, targets = linear_case(n=300, d=4, v=200)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets, entropy=True)
    assert max(kept) == 300 * 4


def test_operands_of_two_dtypes_raise():
    hidden, weight, targets = linear_case()
    for h, w in ((hidden, weight.bfloat16()), (hidden.double(), weight), (hidden.long(), weight.long())):
        with pytest.raises(TypeError, match="one floating dtype"):
            linear_logprob(h, w, targets)


@pytest.mark.parametrize("wrong", [41, -1, -99, 10**9])
def test_a_target_that_is_no_word_raises(wrong):
    hidden, weight, targets = linear_case()
    targets[7] = wrong
    with pytest.raises(IndexError, match=rf"targets\[7\] is {wrong}, and there are 41 words"):
        linear_logprob(hidden, weight, targets)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_raises(temperature):
    hidden, weight, targets = linear_case()
    with pytest.raises(ValueError, match="temperature must be positive"):
        linear_logprob(hidden, weight, targets, temperature=temperature)


@pytest.mark.parametrize("max_logits", [1 << 24, 23 * 5], ids=["whole", "in slices"])
def test_rows_with_target_minus_100_count_for_nothing(monkeypatch, max_logits):
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", max_logits)
    hidden, weight, targets = linear_case()
    ignored = torch.arange(23) % 3 == 0
    holes = targets.masked_fill(ignored, -100)
    grads = []
    for h, y in ((hidden, holes), (hidden[~ignored], targets[~ignored])):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = linear_logprob(h, w, y, entropy=True)
        (logp.square() + entropy).sum().backward()
        grads.append((logp, entropy, h.grad, w.grad))
    for x, y in zip(grads[0][:3], grads[1][:3], strict=True):
        assert (x[ignored] == 0).all()
        torch.testing.assert_close(x[~ignored], y)
    torch.testing.assert_close(grads[0][3], grads[1][3])
    assert (linear_logprob(hidden, weight, torch.full_like(targets, -100)) == 0).all()


@pytest.mark.parametrize("max_logits", [1 << 24, 23 * 5], ids=["whole", "in slices"])
def test_main_grad_is_added_to_and_autograd_gets_nothing(monkeypatch, max_logits):
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", max_logits)
    hidden, weight, targets = linear_case()
    plain, mine, main = weight.clone().requires_grad_(), weight.clone().requires_grad_(), torch.ones_like(weight)
    for at in (slice(0, 10), slice(10, 23)):
        linear_logprob(hidden[at], plain, targets[at]).square().sum().backward()
        linear_logprob(hidden[at], mine, targets[at], main_grad=main).square().sum().backward()
    assert mine.grad is None
    torch.testing.assert_close(main, 1 + plain.grad)
    with pytest.raises(ValueError, match="must have the shape of weight"):
        linear_logprob(hidden, weight, targets, main_grad=main[1:])


@pytest.mark.parametrize("hidden, weight, targets", [
    ((5, 3), (7, 4), 5), ((5, 3), (7, 3), 4), ((5, 3, 1), (7, 3), 5), ((5, 3), (7,), 5),
])
def test_linear_logprob_refuses_shapes_that_do_not_fit(hidden, weight, targets):
    with pytest.raises(ValueError, match="shapes do not fit"):
        linear_logprob(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.long))


# ------------------------------------------------------------------------------------------------ group_advantage


def naive_advantage(rewards, offsets, weights=None, *, eps=1e-6, clip=None, std_normalize=True):
    """Equation (3), then the clip, then the weight, one rollout at a time."""
    out, constant = np.zeros(len(rewards)), []
    for i, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        group = np.asarray(rewards[start:end], np.float64)
        constant.append(len(set(group.tolist())) <= 1)
        if constant[-1]:
            continue
        for j, r in enumerate(group):
            a = r - group.mean()
            if std_normalize:
                a /= np.sqrt(((group - group.mean()) ** 2).mean()) + eps  # population: divided by n
            if clip is not None:
                a = min(max(a, -clip), clip)
            out[start + j] = a if weights is None else a * float(weights[i])
    return out, constant


def ragged(seed, groups=40, values=(-1.0, 1.0)):
    """Rewards, offsets, weights of groups of 0 to 12 rollouts."""
    rng = np.random.default_rng(seed)
    size = rng.integers(0, 13, groups)
    size[:3] = 0, 1, 12
    rewards = rng.choice(values, size.sum()) if values else rng.normal(size=size.sum())
    return rewards, np.concatenate(([0], size.cumsum())), rng.uniform(0.1, 3, groups)


def advantage(rewards, offsets, weights=None, dtype=torch.float64, **options):
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    rewards = torch.tensor(np.asarray(rewards), dtype=dtype)
    a, constant = group_advantage(rewards, torch.tensor(offsets), weights, **options)
    assert a.dtype == dtype and constant.dtype == torch.bool
    return a.double().numpy(), constant.tolist()


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 0.1, 0.3, 1.0), None], ids=["signs", "levels", "normal"])
@pytest.mark.parametrize("options", [
    {}, {"eps": 0.1}, {"clip": 0.9}, {"std_normalize": False}, {"std_normalize": False, "clip": 0.4, "eps": 1.0},
])
@pytest.mark.parametrize("weighted", [False, True])
def test_advantage_equals_a_loop_on_ragged_groups(values, options, weighted):
    for seed in range(5):
        rewards, offsets, weights = ragged(seed, values=values)
        weights = weights.astype(np.float32) if weighted else None
        got, constant = advantage(rewards, offsets, weights, **options)
        expected, expected_constant = naive_advantage(rewards, offsets, weights, **options)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)
        assert constant == expected_constant and (got[expected == 0] == 0).all()


def test_the_deviation_is_the_populations():
    got, constant = advantage([1, 1, 1, -1], [0, 4], eps=0.0)  # mean 1/2, variance 3/4
    np.testing.assert_allclose(got, np.array([1, 1, 1, -3]) / 3**0.5, rtol=1e-12)
    assert constant == [False]


@pytest.mark.parametrize("value", [0.1, 0.3, 2.7, -1.0, 1e-6, 1e6, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [
    {}, {"std_normalize": False},
    {"eps": 0.0},
])
def test_equal_rewards_give_exactly_zero(value, dtype, options):
    sizes = np.concatenate((np.arange(1, 65), [100, 333, 999, 1000]))
    offsets = np.concatenate(([0], sizes.cumsum()))
    got, constant = advantage(np.full(sizes.sum(), value), offsets, np.full(len(sizes), 7.0), dtype, **options)
    assert (got == 0).all() and all(constant)


def test_a_mean_of_equal_numbers_need_not_be_that_number():
    """Why the zero above is no matter of course: the loop without its exception gets it wrong."""
    dust = [abs(np.float64(sum([x] * n)) / n - x) for x in (0.1, 0.3, 2.7) for n in range(1, 1001)]
    assert max(dust) > 0


def test_weight_comes_after_the_clip_and_the_clip_after_the_deviation():
    rewards = [0.0] * 99 + [1.0]  # the last is 9.95 deviations out
    got, _ = advantage(rewards, [0, 100], [2.5], clip=3.0)
    assert got[-1] == 7.5  # neither 3 (clip last) nor 2.475 (clip first: 0.99 is under it)
    np.testing.assert_allclose(got[:-1], 2.5 * -(1 / 99) ** 0.5, rtol=1e-4)


def test_an_outlier_is_clipped_on_either_side():
    rewards = np.array([0.0] * 99 + [1.0])
    assert advantage(rewards, [0, 100])[0][-1] == pytest.approx(99**0.5, rel=1e-4)
    assert advantage(rewards, [0, 100], clip=3.0)[0][-1] == 3.0
    assert advantage(-rewards, [0, 100], clip=3.0)[0][-1] == -3.0


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scale_reaches_the_advantage_only_through_eps(scale):
    rewards, offsets, _ = ragged(3, values=None)
    plain, _ = advantage(rewards, offsets, eps=1e-9)
    np.testing.assert_allclose(advantage(rewards * scale, offsets, eps=1e-9 * scale)[0], plain, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(advantage(rewards * scale, offsets)[0], naive_advantage(rewards * scale, offsets)[0],
                               rtol=1e-6, atol=1e-12)


def test_a_large_common_reward_does_not_drown_the_difference():
    """1e6 and 1e6 + 1 in float32: two passes in float64 keep the deviation that E[r^2] - E[r]^2 loses."""
    got, _ = advantage([1e6, 1e6 + 1] * 4, [0, 8], dtype=torch.float32)
    np.testing.assert_allclose(got, [-1, 1] * 4, rtol=1e-5)


@pytest.mark.parametrize("std_normalize", [True, False])
def test_centred_advantages_sum_to_zero_in_every_group(std_normalize):
    rewards, offsets, weights = ragged(1, values=None)
    got, _ = advantage(rewards, offsets, weights, std_normalize=std_normalize)
    sums = [got[a:b].sum() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    np.testing.assert_allclose(sums, 0, atol=1e-12)
    assert np.abs(got).max() > 1


def test_empty_groups_and_no_groups():
    got, constant = advantage([1.0, -1.0], [0, 0, 2, 2])
    np.testing.assert_allclose(got, [1, -1], rtol=1e-5)
    assert constant == [True, False, True]
    assert advantage([], [0])[1] == [] and advantage([], [0, 0, 0])[1] == [True, True]


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 4], [2, 3]])
def test_offsets_that_do_not_span_the_rewards_raise(offsets):
    with pytest.raises(ValueError, match="offsets must go from 0 to 3"):
        group_advantage(torch.ones(3), torch.tensor(offsets))


def test_offsets_that_fall_raise():
    with pytest.raises(ValueError, match="never fall"):
        group_advantage(torch.ones(3), torch.tensor([0, 2, 1, 3]))


# ------------------------------------------------------------------------------------------------ grpo_token_loss

LOWER, UPPER = 0.2, 0.28  # the defaults


def loss_case(seed=0, responses=6, spread=0.4, dtype=torch.float64):
    """logp, old_logp, advantage, offsets, token_weight, and ref_logp, correction by name."""
    g = generator(seed)
    length = torch.randint(1, 9, (responses,), generator=g)
    n = int(length.sum())
    logp = -torch.rand(n, generator=g, dtype=dtype) * 4
    noise = torch.randn(3, n, generator=g, dtype=dtype)
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), length.cumsum(0)))
    positional = (logp, logp + spread * noise[0], torch.randn(responses, generator=g, dtype=dtype), offsets,
                  torch.rand(responses, generator=g, dtype=dtype))
    return positional, {"ref_logp": logp + spread * noise[1], "correction": (0.3 * noise[2]).exp()}


def naive_loss(logp, old_logp, advantage, offsets, token_weight, *, eps_low=LOWER, eps_high=UPPER, beta=0.0,
               ref_logp=None, correction=None):
    """(4)-(6) one token at a time, with the clip written as the two cases it is."""
    loss, surrogates, kls, clips, idles = 0.0, [], [], [], []
    for s, a in enumerate(advantage.tolist()):
        surrogate = kl = clipped = idle = 0.0
        for t in range(int(offsets[s]), int(offsets[s + 1])):
            ratio, held = np.exp(float(logp[t] - old_logp[t])), clipped
            if a > 0 and ratio > 1 + eps_high:
                objective, clipped = (1 + eps_high) * a, clipped + 1
            elif a < 0 and ratio < 1 - eps_low:
                objective, clipped = (1 - eps_low) * a, clipped + 1
            else:
                objective = ratio * a
            surrogate += objective
            token_kl = 0.0
            if beta:
                d = float(ref_logp[t] - logp[t])
                token_kl = np.exp(d) - d - 1
            idle += (clipped > held or a == 0) and (not beta or ref_logp[t] == logp[t])
            kl += token_kl
            objective *= 1 if correction is None else float(correction[t])
            loss += float(token_weight[s]) * (beta * token_kl - objective)
        length = int(offsets[s + 1] - offsets[s])
        surrogates.append(surrogate / length), kls.append(kl / length), clips.append(clipped), idles.append(idle)
    return loss, surrogates, kls, clips, idles


@pytest.mark.parametrize("options", [
    {}, {"beta": 0.1}, {"beta": 0.1, "correction": True}, {"correction": True}, {"eps_low": 0.05, "eps_high": 0.5},
])
def test_loss_equals_a_loop_over_tokens(options):
    for seed in range(5):
        case, extra = loss_case(seed)
        given = {k: v for k, v in options.items() if k != "correction"}
        given |= {"ref_logp": extra["ref_logp"]} if "beta" in options else {}
        given |= {"correction": extra["correction"]} if "correction" in options else {}
        got, expected = grpo_token_loss(*case, **given), naive_loss(*case, **given)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, torch.tensor(y, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_idle_counts_the_tokens_without_gradient(beta):
    """Those of advantage 0 and those that the clip holds, unless the KL pulls at them; a weight of 0 idles all."""
    (logp, old, advantage, offsets, weight), extra = loss_case(3, responses=12)
    advantage[::3], weight[1] = 0.0, 0.0
    extra["ref_logp"][::2] = logp[::2]
    x = logp.clone().requires_grad_()
    result = grpo_token_loss(x, old, advantage, offsets, weight, beta=beta, **extra)
    result.loss.backward()
    idle = torch.stack([(g == 0).sum() for g in x.grad.split(offsets.diff().tolist())])
    assert torch.equal(result.idle, idle.double()) and result.idle[1] == offsets[2] - offsets[1]
    assert 0 < idle.sum() < len(logp) and (beta or (result.idle >= result.clipped).all())
    if not beta:
        assert torch.equal(result.idle[::3], offsets.diff()[::3].double())


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 3, 2, 4], [0, 1, 1, 4], [0, 5]])
def test_offsets_that_leave_a_response_empty_or_a_token_out_raise(offsets):
    x, per_response = torch.zeros(4), torch.ones(len(offsets) - 1)
    with pytest.raises(ValueError, match="offsets must go from 0 to 4 without empty responses"):
        grpo_token_loss(x, x, per_response, torch.tensor(offsets), per_response)


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}], ids=["no KL", "KL"])
def test_loss_passes_gradcheck(options):
    (logp, *rest), extra = loss_case(2)
    ratio = (logp - rest[0]).exp()
    assert min((ratio - edge).abs().min() for edge in (1 - LOWER, 1 + UPPER)) > 1e-4  # no kink under the probe
    assert torch.autograd.gradcheck(lambda x: grpo_token_loss(x, *rest, **options, **extra).loss,
                                    (logp.clone().requires_grad_(),))


def test_only_the_loss_carries_a_gradient():
    case, extra = loss_case()
    result = grpo_token_loss(case[0].clone().requires_grad_(), *case[1:], beta=0.1, **extra)
    assert result.loss.requires_grad
    assert not any(x.requires_grad for x in result[1:])


def one_token(ratio, advantage, **options):
    """(result, gradient in logp) of a single token at the given ratio, weight 1."""
    logp = torch.tensor([float(np.log(ratio))], dtype=torch.float64, requires_grad=True)
    result = grpo_token_loss(logp, torch.zeros_like(logp), torch.tensor([advantage], dtype=torch.float64),
                             torch.tensor([0, 1]), torch.ones(1, dtype=torch.float64), **options)
    return result, torch.autograd.grad(result.loss, logp)[0].item()


@pytest.mark.parametrize("advantage, ratio, is_clipped, value", [
    (2.0, 1.279, False, 1.279), (2.0, 1.281, True, 1.28), (2.0, 9.0, True, 1.28),  # positive: only above 1 + eps_high
    (2.0, 0.799, False, 0.799), (2.0, 0.01, False, 0.01),
    (-2.0, 0.801, False, 0.801), (-2.0, 0.799, True, 0.8), (-2.0, 0.01, True, 0.8),  # negative: only below 1 - eps_low
    (-2.0, 1.281, False, 1.281), (-2.0, 9.0, False, 9.0),
    (0.0, 9.0, False, 9.0), (0.0, 0.01, False, 0.01),
])
def test_the_clip_takes_the_gradient_exactly_where_it_says(advantage, ratio, is_clipped, value):
    result, gradient = one_token(ratio, advantage)
    assert result.clipped.item() == is_clipped
    assert result.surrogate.item() == pytest.approx(value * advantage, rel=1e-12)
    assert gradient == pytest.approx(0.0 if is_clipped else -ratio * advantage, rel=1e-12)


def test_the_two_clip_widths_are_not_mixed_up():
    wide_above, wide_below = dict(eps_low=0.01, eps_high=0.6), dict(eps_low=0.6, eps_high=0.01)
    for ratio, advantage, free, bound in ((1.5, 1.0, wide_above, wide_below), (0.5, -1.0, wide_below, wide_above)):
        assert one_token(ratio, advantage, **free)[0].clipped.item() == 0
        assert one_token(ratio, advantage, **bound)[0].clipped.item() == 1


def test_at_ratio_one_the_surrogate_is_the_advantage_and_the_gradient_its_policy_gradient():
    (logp, _, advantage, offsets, weight), _ = loss_case(dtype=torch.float32)
    x = logp.clone().requires_grad_()
    result = grpo_token_loss(x, logp, advantage, offsets, weight)
    result.loss.backward()
    torch.testing.assert_close(result.surrogate, advantage, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x.grad, -(weight * advantage).repeat_interleave(offsets.diff()), rtol=1e-6, atol=1e-7)
    assert (result.clipped == 0).all()


def test_k3_and_its_gradient_vanish_at_the_reference():
    case, _ = loss_case()
    logp = case[0].clone().requires_grad_()
    result = grpo_token_loss(logp, case[1], torch.zeros_like(case[2]), *case[3:], beta=0.5, ref_logp=case[0])
    result.loss.backward()
    assert (result.kl == 0).all() and result.loss == 0 and (logp.grad == 0).all()


def test_k3_is_positive_away_from_the_reference_and_pulls_back():
    for shift in (-1.0, 1.0):
        result, gradient = one_token(1.0, 0.0, beta=0.5, ref_logp=torch.tensor([shift], dtype=torch.float64))
        assert result.kl.item() == pytest.approx(np.exp(shift) - shift - 1)
        assert gradient == pytest.approx(0.5 * (1 - np.exp(shift)))  # of beta * KL: towards the reference


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    """Over the whole vocabulary, its expectation under the policy is KL(policy || reference)."""
    policy, reference = torch.randn(2, 9, generator=generator(4), dtype=torch.float64).log_softmax(1)
    weight = policy.exp()  # one response a word, weighted by its probability
    zero = torch.zeros_like(policy)
    result = grpo_token_loss(policy, policy, zero, torch.arange(10), weight, beta=1.0, ref_logp=reference)
    torch.testing.assert_close(result.loss, (weight * (policy - reference)).sum(), rtol=1e-12, atol=1e-14)


def test_beta_without_a_reference_raises():
    case, _ = loss_case()
    with pytest.raises(ValueError, match="needs ref_logp"):
        grpo_token_loss(*case, beta=0.01)


@pytest.mark.parametrize("log_ratio", [-1000.0, -100.0, -20.5, 20.5, 100.0, 1000.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_absurd_ratios_stay_finite(log_ratio, advantage):
    logp = torch.tensor([log_ratio, -1.0], requires_grad=True)
    result = grpo_token_loss(logp, torch.tensor([0.0, -1.0]), torch.tensor([advantage]), torch.tensor([0, 2]),
                             torch.tensor([0.5]), beta=0.1, ref_logp=torch.tensor([-log_ratio, -1.0]))
    result.loss.backward()
    assert all(torch.isfinite(x).all() for x in (*result, logp.grad))
    assert logp.grad[0] == 0 and logp.grad[1] == pytest.approx(-0.5 * advantage)  # its neighbour is not touched


def test_correction_multiplies_the_objective_only():
    (logp, *rest), extra = loss_case()
    reference, correction = extra["ref_logp"], extra["correction"]

    def run(**options):
        x = logp.clone().requires_grad_()
        result = grpo_token_loss(x, *rest, **options)
        return result, torch.autograd.grad(result.loss, x)[0]

    plain, objective_gradient = run()
    with_kl, both = run(beta=0.3, ref_logp=reference)
    corrected, gradient = run(beta=0.3, ref_logp=reference, correction=correction)
    torch.testing.assert_close(gradient, correction * objective_gradient + (both - objective_gradient))
    for a, b in zip(corrected[1:], with_kl[1:], strict=True):  # the reports leave it out
        assert torch.equal(a, b)
    assert torch.equal(plain.surrogate, corrected.surrogate) and corrected.loss != with_kl.loss


def test_the_three_averagings_are_choices_of_token_weight():
    (logp, old, advantage, offsets, _), _ = loss_case(responses=7)
    L = offsets.diff().double()
    n_P = [3, 1, 2, 1]  # rollouts of each prompt
    n_R = torch.tensor([n for n in n_P for _ in range(n)], dtype=torch.float64)
    R, P, T = 7, len(n_P), float(L.sum())
    ones = torch.ones(R, dtype=torch.float64)
    J = grpo_token_loss(logp, old, advantage, offsets, ones).surrogate  # mean over a response's tokens
    means = {
        "prompts": (1 / (P * n_R * L), torch.stack([group.mean() for group in J.split(n_P)]).mean()),
        "rollouts": (1 / (R * L), J.mean()),
        "tokens": (ones / T, (J * L).sum() / T),
    }
    for weight, mean in means.values():
        torch.testing.assert_close(grpo_token_loss(logp, old, advantage, offsets, weight).loss, -mean)
    assert len({round(mean.item(), 6) for _, mean in means.values()}) == 3  # and they are not the same thing


def test_a_batch_is_the_sum_of_its_parts():
    """Weights carry the denominators, so no split into micro-batches changes loss or reports."""
    (logp, old, advantage, offsets, weight), extra = loss_case()
    whole = grpo_token_loss(logp, old, advantage, offsets, weight, beta=0.1, **extra)
    parts = []
    for a, b in ((0, 2), (2, 3), (3, 6)):
        at = slice(int(offsets[a]), int(offsets[b]))
        parts.append(grpo_token_loss(logp[at], old[at], advantage[a:b], offsets[a : b + 1] - offsets[a], weight[a:b],
                                     beta=0.1, **{k: v[at] for k, v in extra.items()}))
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    for name in ("surrogate", "kl", "clipped", "idle"):
        torch.testing.assert_close(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
