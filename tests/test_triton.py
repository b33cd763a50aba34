"""The Triton kernels against float64 truth: compiled where there is a CUDA device, interpreted elsewhere.

Shapes are small because the interpreter is slow, and odd because tiles are not: rows, words and depths that no tile
divides, targets on the borders of tiles and of splits.
"""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from test_kernels import naive_advantage
from test_train import trainer_of
from torch import Tensor

import tasks
from kernels import backend, group_advantage, grpo_token_loss, linear_logprob

pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")

ADVANTAGE, LOSS, LINEAR = (importlib.import_module(f"kernels.{name}") for name in (
    "group_advantage", "grpo_token_loss", "linear_logprob"))  # the package has functions so named
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}  # absolute
GRADIENT = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # of the norm


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Parts of Triton that it imports late, at the first launch, ask the environment again."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid):
        self.launches += 1
        return self.kernel[grid]


def count(monkeypatch, module, name: str) -> Counted:
    counted = Counted(getattr(module, name))
    monkeypatch.setattr(module, name, counted)
    return counted


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


# ------------------------------------------------------------------------------------------------- linear_logprob


def linear_case(T=37, V=251, D=24, dtype=torch.float32, seed=0):
    """hidden, weight, targets; logits are N(0, 4), the first targets lie on the borders of tiles and splits."""
    g = generator(seed)
    hidden, weight = (torch.randn(rows, D, generator=g) for rows in (T, V))
    targets = torch.randint(V, (T,), generator=g)
    border = torch.tensor([y for y in (V - 1, 0, 127, 128, 255, 256, 511, 512) if y < V][:T], dtype=torch.long)
    targets[: len(border)] = border
    return (2 * D**-0.5 * hidden).to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE)


def weights_of(T: int, which: str = "both", seed=1) -> tuple[Tensor | None, Tensor | None]:
    """Incoming gradients of log-probs and of entropies."""
    a, b = torch.randn(2, T, generator=generator(seed), dtype=torch.float64).to(DEVICE)
    return (None if which == "entropy" else a), (None if which == "logp" else b)


def combine(logp, entropy, a, b):
    return sum((k * x).sum() for k, x in ((a, logp), (b, entropy)) if k is not None)


def log_softmax(logits, targets):
    """(logp, entropy) of float64 logits; 0 at targets of -100."""
    log_p = logits.log_softmax(1)
    logp = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)
    return logp.masked_fill(targets == -100, 0.0), entropy.masked_fill(targets == -100, 0.0)


def linear_truth(hidden, weight, targets, a=None, b=None, temperature=1.0):
    """(logp, entropy, gradient in hidden, in weight) in float64 from the operands as they are."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logp, entropy = log_softmax(h @ w.T / temperature, targets)
    if a is not None or b is not None:
        combine(logp, entropy, a, b).backward()
    return logp.detach(), entropy.detach(), h.grad, w.grad


def linear(hidden, weight, targets, a=None, b=None, *, backend="triton", **options):
    """The same of the kernel."""
    h, w = (x.detach().requires_grad_() for x in (hidden, weight))
    logp, entropy = linear_logprob(h, w, targets, entropy=True, backend=backend, **options)
    if a is not None or b is not None:
        combine(logp, entropy, a, b).backward()
    return logp.detach(), entropy.detach(), h.grad, w.grad


def assert_true(got, expected, dtype, forward=None):
    """logp, entropy to an absolute bound, gradients relative to their norm; rows that must be 0 are exactly that."""
    for x, y in zip(got[:2], expected[:2], strict=True):
        assert x.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(x.double(), y, rtol=0, atol=forward or FORWARD[dtype])
    for x, y in zip(got[2:], expected[2:], strict=True):
        assert x.dtype == dtype and relative_error(x, y) < GRADIENT[dtype]


SHAPES = [(0, 17, 8), (1, 17, 8), (5, 37, 16), (37, 251, 24), (64, 1000, 64), (33, 257, 128), (6, 300, 13)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["f64", "f32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_equals_float64_at_any_shape(monkeypatch, shape, dtype):
    monkeypatch.setattr(LINEAR, "SPLIT", 256)
    case = linear_case(*shape, dtype=dtype)
    a, b = weights_of(shape[0])
    assert_true(linear(*case, a, b, temperature=1.7), linear_truth(*case, a, b, temperature=1.7), dtype)


@pytest.mark.parametrize("which", ["logp", "entropy", "both"])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_linear_equals_float64_at_any_temperature_and_for_any_gradient(temperature, which):
    case = linear_case()
    a, b = weights_of(37, which)
    got = linear(*case, a, b, temperature=temperature)
    assert_true(got, linear_truth(*case, a, b, temperature=temperature), torch.float32)
    assert torch.equal(linear_logprob(*case, temperature=temperature, backend="triton"), got[0])


def test_without_entropy_the_gradient_is_the_logprobs():
    hidden, weight, targets = linear_case()
    a, _ = weights_of(37)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    (a * linear_logprob(h, w, targets, backend="triton")).sum().backward()
    _, _, dh, dw = linear_truth(h, w, targets, a)
    assert relative_error(h.grad, dh) < 1e-5 and relative_error(w.grad, dw) < 1e-5


@pytest.mark.parametrize("V", [300, 1000, 1025])
def test_the_number_of_splits_does_not_matter(monkeypatch, V):
    case = linear_case(5, V, 16)
    results = []
    for split in (256, 512, 4096):
        monkeypatch.setattr(LINEAR, "SPLIT", split)
        results.append(linear(*case))
    for other in results[1:]:
        for x, y in zip(results[0][:2], other[:2], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 255, 256, 257])
@pytest.mark.parametrize("level", [-1000.0, -30.0, 30.0])
def test_words_that_do_not_exist_stay_out_of_the_sum(monkeypatch, V, level):
    """Tiles reach past V, where logits are 0: beside real ones at -30 they, or a maximum begun at 0, would be all."""
    monkeypatch.setattr(LINEAR, "SPLIT", 256)
    hidden, weight, targets = linear_case(3, V, 8, dtype=torch.float64)
    hidden[:, 0], weight[:, 0] = 1.0, level
    a, b = weights_of(3)
    got, expected = linear(hidden, weight, targets, a, b), linear_truth(hidden, weight, targets, a, b)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("level", [-30.0, 30.0])
def test_a_constant_added_to_all_logits_costs_float32_little(level):
    hidden, weight, targets = linear_case()
    hidden[:, 0], weight[:, 0] = 1.0, level
    a, b = weights_of(37)
    assert_true(linear(hidden, weight, targets, a, b), linear_truth(hidden, weight, targets, a, b), torch.float32)


def test_a_word_far_above_all_others():
    hidden, weight, targets = linear_case()
    hidden[:, 1], weight[:, 1] = 1.0, 0.0
    weight[200, 1] = 40.0
    targets[::2] = 200
    a, b = weights_of(37)
    got, expected = linear(hidden, weight, targets, a, b), linear_truth(hidden, weight, targets, a, b)
    assert expected[0][::2].max() > -1e-4 and expected[0].min() < -30
    assert_true(got, expected, torch.float32, forward=4e-5)  # a few units in the last place of 40


def test_equal_logits_give_the_uniform_distribution():
    hidden, weight, targets = linear_case()
    logp, entropy, _, _ = linear(hidden, weight[:1].expand(251, 24).contiguous(), targets)
    torch.testing.assert_close(logp, torch.full_like(logp, -math.log(251)), rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy, -logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [slice(3, 9), slice(None)], ids=["some", "all"])
def test_ignored_rows_give_zero_and_no_gradient(rows):
    hidden, weight, targets = linear_case()
    targets[rows] = -100
    a, b = weights_of(37)
    got, expected = linear(hidden, weight, targets, a, b), linear_truth(hidden, weight, targets, a, b)
    assert_true(got, expected, torch.float32)
    assert all((x[rows] == 0).all() for x in got[:3])


STRIDED = {  # a matrix (n, 24) that is not contiguous, of one that is
    "every other row": lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2],
    "columns that begin off the grid": lambda x: torch.cat((x[:, :3], x, x[:, :2]), 1)[:, 3:27],
    "columns that begin on it": lambda x: torch.cat((x[:, :8], x), 1)[:, 8:],
    "transposed": lambda x: x.T.contiguous().T,
    "memory that begins off the grid": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("name", STRIDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_strides_change_no_bit(name, dtype):
    hidden, weight, targets = linear_case(9, 140, 24, dtype=dtype)
    a, b = weights_of(9)
    expected = linear(hidden, weight, targets, a, b)
    view = STRIDED[name]
    assert not view(hidden).is_contiguous() or view(hidden).data_ptr() % 16
    for h, w in ((view(hidden), weight), (hidden, view(weight)), (view(hidden), view(weight))):
        got = linear(h, w, targets, a, b)
        assert all(torch.equal(x, y) for x, y in zip(got[:2], expected[:2], strict=True))
        assert all(relative_error(x, y.double()) < GRADIENT[dtype] / 4
                   for x, y in zip(got[2:], expected[2:], strict=True))


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_targets_may_be_every_other_one_of_a_row(how):
    hidden, weight, targets = linear_case(9, 140, 24)
    apart = torch.stack((targets, torch.zeros_like(targets)), dim=1)[:, 0]
    assert apart.stride() == (2,)
    assert torch.equal(linear_logprob(hidden, weight, apart, backend=how),
                       linear_logprob(hidden, weight, targets, backend=how))


def test_one_row_seen_many_times():
    hidden, weight, targets = linear_case(9, 140, 24)
    got = linear(hidden[:1].expand(9, 24), weight, targets)
    torch.testing.assert_close(got[0].double(), linear_truth(hidden[:1].expand(9, 24), weight, targets)[0],
                               rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_backward_in_several_slices_of_the_vocabulary(monkeypatch, dtype):
    monkeypatch.setattr(LINEAR, "MAX_EXTRA_BYTES", 0)
    kernel = count(monkeypatch, LINEAR, "_dlogits_kernel")
    case = linear_case(6, 2500, 8, dtype=dtype)
    case[2][-2:] = torch.tensor([1023, 1024])
    a, b = weights_of(6)
    got = linear(*case, a, b)
    assert kernel.launches == 3  # of at least 1024 columns
    assert_true(got, linear_truth(*case, a, b), dtype)


def test_linear_gradcheck():
    hidden, weight, targets = linear_case(3, 5, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: linear_logprob(h, w, targets, temperature=0.7, entropy=True, backend="triton"),
        (hidden.requires_grad_(), weight.requires_grad_()))


# Which of the rows, in tiles and a ragged rest, have an incoming gradient: backward leaves out tiles that have none.
TILE = {dtype: LINEAR._tiles(dtype).ROWS for dtype in (torch.float32, torch.bfloat16)}
LIVE = {
    "all": lambda tile, T: range(T), "none": lambda tile, T: [], "one tile": lambda tile, T: range(tile, 2 * tile),
    "all but the first tile": lambda tile, T: range(tile, T),
    "all but the last, ragged tile": lambda tile, T: range(3 * tile),
    "the last tile only": lambda tile, T: range(3 * tile, T),
    "every other tile": lambda tile, T: [r for r in range(T) if r // tile % 2],
    "scattered rows": lambda tile, T: [3, 2 * tile + 1, 2 * tile + 3, T - 1],
    "halves of tiles": lambda tile, T: range(tile + tile // 2, 2 * tile + tile // 2),
}


def zero_row_case(name, V, D=16, dtype=torch.float32):
    tile = TILE[dtype]
    T = 3 * tile + 17
    case, (a, b) = linear_case(T, V, D, dtype=dtype), weights_of(T)
    live = torch.zeros(T, dtype=torch.bool)
    live[list(LIVE[name](tile, T))] = True
    first = torch.arange(T) // tile % 2 == 0  # tiles of log-probs only, between them tiles of entropies only
    return case, a.float() * (live & first).to(DEVICE), b.float() * (live & ~first).to(DEVICE), live


def without_skipping(monkeypatch):
    """The very sums, with the terms that are zero left in."""
    monkeypatch.setattr(LINEAR, "_live", lambda grad_logp, _: torch.ones_like(grad_logp, dtype=torch.bool))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("how", ["triton", "torch"])
@pytest.mark.parametrize("name", LIVE)
def test_leaving_out_rows_without_gradient_changes_no_bit(monkeypatch, name, how, dtype):
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", 1)  # the reference in chunks of 128 rows, the kernels in slices
    monkeypatch.setattr(LINEAR, "MAX_EXTRA_BYTES", 0)
    case, a, b, live = zero_row_case(name, 1100 if name == "every other tile" else 40, dtype=dtype)
    main = torch.randn(case[1].shape, generator=generator(5)).to(DEVICE)
    results = []
    for skip in (True, False):
        added = main.clone()
        with monkeypatch.context() as m:
            if not skip:
                without_skipping(m)
            linear(*case, a, b, backend=how, main_grad=added)
            results.append((*linear(*case, a, b, backend=how)[2:], added))
    (dh, dw, added), (dh_all, dw_all, added_all) = results
    assert torch.equal(dh, dh_all) and torch.equal(dw, dw_all) and torch.equal(added, added_all)
    assert (dh[~live.to(DEVICE)] == 0).all()
    assert bool(dw.any()) == bool(live.any()) and torch.equal(added, main) == (name == "none")
    if dtype == torch.float32 and name != "none":
        _, _, dh_true, dw_true = linear_truth(*case, a, b)
        assert relative_error(dh, dh_true) < 1e-5 and relative_error(dw, dw_true) < 1e-5


def test_tiles_without_gradient_are_really_left_out(monkeypatch):
    """Their dlogits are never written: what stood in the workspace must not be read either."""
    case, a, b, live = zero_row_case("every other tile", 40)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: empty(*shape, **kw).fill_(torch.nan))
    _, _, dh, dw = linear(*case, a, b, backend="triton")
    assert dh.isfinite().all() and dw.isfinite().all() and (dh[~live.to(DEVICE)] == 0).all()
    tiles, count = LINEAR._live_tiles(a, b, TILE[torch.float32])
    assert tiles.tolist() == [1, 3, 0, 2] and count.tolist() == [2]


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_nan_gradients_are_not_left_out(how):
    case, a, b, _ = zero_row_case("none", 40)
    a[40] = torch.nan
    _, _, dh, dw = linear(*case, a, b, backend=how)
    assert dh[40].isnan().all() and dw.isnan().all()


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_a_tied_weight_collects_both_gradients(how):
    """The same matrix as embedding and head, over two accumulated micro-batches, as plain torch has it."""
    _, weight, targets = linear_case(20, 50, 16)
    tokens = targets.roll(1)
    mine, plain = (weight.clone().requires_grad_() for _ in range(2))
    for at in (slice(0, 12), slice(12, 20)):
        linear_logprob(mine[tokens[at]].tanh(), mine, targets[at], backend=how).square().sum().backward()
        log_softmax(plain[tokens[at]].tanh() @ plain.T, targets[at])[0].square().sum().backward()
    assert relative_error(mine.grad, plain.grad.double()) < 1e-6


@pytest.mark.parametrize("how", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_main_grad_collects_the_weights_gradient_in_float32(dtype, how):
    hidden, weight, targets = linear_case(40, 300, 16, dtype=dtype)
    a, b = weights_of(40)
    start = 1e-3 * torch.randn(300, 16, generator=generator(5)).to(DEVICE)
    main, w = start.clone(), weight.clone().requires_grad_()
    expected = start.double()
    for at in (slice(0, 25), slice(25, 40)):
        h = hidden[at].clone().requires_grad_()
        combine(*linear_logprob(h, w, targets[at], entropy=True, main_grad=main, backend=how), a[at], b[at]).backward()
        _, _, dh, dw = linear_truth(hidden[at], weight, targets[at], a[at], b[at])
        expected += dw
        assert relative_error(h.grad, dh) < GRADIENT[dtype]
    assert w.grad is None
    exact = dtype == torch.float32 or DEVICE == "cpu"  # compiled, dlogits are rounded to bf16 once
    assert relative_error(main, expected) < (1e-6 if exact else 2**-8)


def test_the_same_bits_twice():
    case, (a, b) = linear_case(64, 500, 32), weights_of(64)
    assert all(torch.equal(x, y) for x, y in zip(linear(*case, a, b), linear(*case, a, b), strict=True))


def test_float32_is_as_exact_as_plain_torch():
    case, (a, b) = linear_case(64, 1000, 64), weights_of(64)
    h, w = (x.clone().requires_grad_() for x in case[:2])
    plain = log_softmax(h @ w.T, case[2])
    combine(*plain, a, b).backward()
    exact = linear_truth(*case, a, b)
    for got, theirs, expected in zip(linear(*case, a, b), (*plain, h.grad, w.grad), exact, strict=True):
        assert relative_error(got, expected) < 1.5 * relative_error(theirs, expected) + 1e-7


def test_bf16_operands_are_as_exact_as_float32_logits_of_them():
    case, (a, b) = linear_case(64, 1000, 64, dtype=torch.bfloat16), weights_of(64)
    h, w = (x.clone().requires_grad_() for x in case[:2])
    plain = log_softmax(h.float() @ w.float().T, case[2])
    combine(*plain, a, b).backward()
    exact = linear_truth(*case, a, b)
    got = linear(*case, a, b)
    for mine, theirs, expected in zip(got[:2], plain, exact[:2], strict=True):
        assert (mine - expected).abs().max() < 2 * (theirs - expected).abs().max() + 1e-6
    slack = 1e-4 if DEVICE == "cpu" else 1e-2  # compiled, dlogits are rounded to bf16 once
    for mine, theirs, expected in zip(got[2:], (h.grad, w.grad), exact[2:], strict=True):
        assert relative_error(mine, expected) < relative_error(theirs, expected) + slack
    rounded, _ = log_softmax((case[0] @ case[1].T).double(), case[2])
    assert (rounded - exact[0]).abs().max() > 1e-3  # bf16 logits, which the first bound excludes


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_outputs_may_be_overwritten_after_forward(how):
    hidden, weight, targets = linear_case()
    a, b = weights_of(37)
    expected = linear(hidden, weight, targets, a, b, backend=how)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logp, entropy = linear_logprob(h, w, targets, entropy=True, backend=how)
    total = combine(logp, entropy, a, b)
    with torch.no_grad():
        logp.zero_(), entropy.zero_()
    total.backward()
    assert torch.equal(h.grad, expected[2]) and torch.equal(w.grad, expected[3])


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_frozen_operands_get_no_gradient_and_spoil_none(how):
    hidden, weight, targets = linear_case()
    a, b = weights_of(37)
    expected = linear(hidden, weight, targets, a, b, backend=how)
    for frozen in (0, 1):
        operands = [hidden.clone(), weight.clone()]
        operands[1 - frozen].requires_grad_()
        main = torch.zeros_like(weight)
        combine(*linear_logprob(*operands, targets, entropy=True, backend=how), a, b).backward()
        assert operands[frozen].grad is None and torch.equal(operands[1 - frozen].grad, expected[3 - frozen])
        combine(*linear_logprob(*operands, targets, entropy=True, backend=how, main_grad=main), a, b).backward()
        assert bool(main.any()) == (frozen == 0)  # a frozen weight's main_grad is left alone


# ------------------------------------------------------------------------------------------------ group_advantage


def advantage(rewards, sizes, weights=None, dtype=torch.float64, offsets_dtype=torch.int64, **options):
    """(advantages, constant) of the kernel, as numpy and a list."""
    offsets = torch.tensor([0, *np.cumsum(sizes, dtype=int)], dtype=offsets_dtype, device=DEVICE)
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float32, device=DEVICE)
    got, constant = group_advantage(torch.tensor(rewards, dtype=dtype, device=DEVICE), offsets, weights,
                                    backend="triton", **options)
    assert got.dtype == dtype and constant.dtype == torch.bool
    return got.double().cpu().numpy(), constant.tolist()


SIZES = [1, 0, 2, 3, 7, 8, 64, 9, 0, 100]


@pytest.mark.parametrize("options", [
    {}, {"eps": 0.1}, {"eps": 0.0}, {"eps": 1e3}, {"clip": 0.75}, {"std_normalize": False},
    {"std_normalize": False, "clip": 0.5, "eps": 1.0},
], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_advantage_equals_a_loop(options, weighted):
    rng = np.random.default_rng(0)
    rewards = np.where(rng.random(sum(SIZES)) < 0.5, rng.normal(size=sum(SIZES)), 1.0)
    weights = np.float32([1, 2, 0, 0.3, -1.5, 2, 3, 0.5, 1, 2.5]) if weighted else None
    offsets = [0, *np.cumsum(SIZES)]
    got, constant = advantage(rewards, SIZES, weights, **options)
    expected, expected_constant = naive_advantage(rewards, offsets, weights, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    assert constant == expected_constant == [n < 2 for n in SIZES]
    rounded, _ = advantage(rewards, SIZES, weights, torch.float32, torch.int32, **options)
    np.testing.assert_allclose(rounded, expected, rtol=2e-3 if options.get("eps") == 0.0 else 1e-5, atol=1e-6)


def test_a_group_longer_than_a_block_and_a_common_reward_that_drowns_one_pass():
    rewards = np.float32([1e6, 1e6 + 1] * 500)
    got, _ = advantage(rewards, [1000], dtype=torch.float32)
    np.testing.assert_allclose(got, [-1, 1] * 500, rtol=1e-5)
    near = np.array([100, 100, 100.001, 100.002])
    np.testing.assert_allclose(advantage(near, [4], eps=0.0)[0], (near - near.mean()) / near.std(), rtol=1e-9)


@pytest.mark.parametrize("value", [0.1, 0.3, 2.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_in_the_kernel(value, dtype):
    sizes = [1, 2, 3, 7, 10, 31, 64]
    for options in ({}, {"eps": 0.0}, {"std_normalize": False}):
        got, constant = advantage([value] * sum(sizes), sizes, [7.0] * len(sizes), dtype, **options)
        assert (got == 0).all() and all(constant)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_weight_comes_after_the_clip_in_the_kernel(sign):
    rewards = [0.0] * 99 + [1.0]  # the last is 9.95 deviations out
    for weight in (2.5, 0.0, -1.0):
        got, _ = advantage([sign * r for r in rewards], [100], [weight], clip=3.0)
        assert got[-1] == sign * 3 * weight
        np.testing.assert_allclose(got[:-1], -sign * weight * (1 / 99) ** 0.5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_rewards_meets_only_eps(scale):
    rewards = scale * np.random.default_rng(1).normal(size=20)
    np.testing.assert_allclose(advantage(rewards, [8, 12])[0], naive_advantage(rewards, [0, 8, 20])[0], rtol=1e-9)


def test_no_groups_and_empty_groups():
    assert advantage([], [])[1] == [] and advantage([], [0, 0])[1] == [True, True]


@pytest.mark.parametrize("how", ["triton", "torch"])
@pytest.mark.parametrize("rewards", [[np.nan], [np.nan, 1.0], [1.0, np.nan], [1.0] * 9 + [np.nan], [np.nan, 1.0, 0.0]],
                         ids=["alone", "first", "last", "in the second block", "among different"])
def test_a_nan_reward_is_not_hidden(how, rewards):
    """A group with NaN is not one of equal rewards."""
    for options in ({}, {"clip": 3.0}, {"std_normalize": False}):
        got, constant = group_advantage(torch.tensor(rewards, device=DEVICE),
                                        torch.tensor([0, len(rewards)], device=DEVICE), backend=how, **options)
        assert got.isnan().all() and not constant.any()


# ------------------------------------------------------------------------------------------------ grpo_token_loss

LENGTHS = [1, 2, 63, 64, 65, 1000] + ([1023, 1024, 1025, 5000] if DEVICE == "cuda" else [])


def loss_case(lengths=(1, 2, 63, 64, 65), dtype=torch.float64, seed=0):
    """logp, old_logp, advantage, offsets, token_weight on the CPU, and ref_logp, correction by name."""
    g = generator(seed)
    n, S = sum(lengths), len(lengths)
    logp = -4 * torch.rand(n, generator=g, dtype=torch.float64)
    noise = 0.4 * torch.randn(3, n, generator=g, dtype=torch.float64)
    A = torch.randn(S, generator=g, dtype=torch.float64)
    A[1::4] = 0
    offsets = torch.tensor([0, *np.cumsum(lengths)])
    positional = (logp, logp + noise[0], A, offsets, torch.rand(S, generator=g, dtype=torch.float64))
    extra = {"ref_logp": logp + noise[1], "correction": noise[2].exp()}
    extra["ref_logp"][::5] = logp[::5]
    return [x if x is offsets else x.to(dtype) for x in positional], {k: x.to(dtype) for k, x in extra.items()}


def loop_loss(logp, old_logp, advantage, offsets, token_weight, *, eps_low=0.2, eps_high=0.28, beta=0.0,
              ref_logp=None, correction=None):
    """(loss, surrogate, kl, clipped, idle, gradient) token by token through autograd, in float64."""
    x = logp.double().detach().requires_grad_()
    tokens, old = x.unbind(), old_logp.double()
    loss, stats = torch.zeros((), dtype=torch.float64), []

    def limited(log_ratio):  # beyond 20 a constant
        return log_ratio if abs(log_ratio) <= 20 else log_ratio.detach().clamp(-20, 20)

    for s, a in enumerate(advantage.double()):
        surrogate = kl = clips = 0
        for t in range(int(offsets[s]), int(offsets[s + 1])):
            ratio = limited(tokens[t] - old[t]).exp()
            free, held = ratio * a, ratio.detach().clamp(1 - eps_low, 1 + eps_high) * a
            clips += int(held < free)
            objective = held if held < free else free
            surrogate += objective.item()
            token = -objective * (1 if correction is None else correction[t].double())
            if beta:
                log_ratio = limited(ref_logp[t].double() - tokens[t])
                k3 = log_ratio.exp() - log_ratio - 1
                kl += k3.item()
                token = token + beta * k3
            loss = loss + token_weight[s].double() * token
        length = int(offsets[s + 1] - offsets[s])
        stats.append((surrogate / length, kl / length, clips))
    loss.backward()
    idle = [(g == 0).sum().item() for g in x.grad.split(offsets.diff().tolist())]
    surrogate_S, kl_S, clipped_S = torch.tensor(stats, dtype=torch.float64).unbind(1)
    return loss.detach(), surrogate_S, kl_S, clipped_S, torch.tensor(idle), x.grad


def loss_of(case, how="triton", **options):
    """(loss, surrogate, kl, clipped, idle, gradient) of the kernel."""
    case = [x.to(DEVICE) for x in case]
    options = {k: x.to(DEVICE) if isinstance(x, Tensor) else x for k, x in options.items()}
    logp = case[0].clone().requires_grad_()
    result = grpo_token_loss(logp, *case[1:], **options, backend=how)
    result.loss.backward()
    assert not any(x.requires_grad for x in result[1:])
    return *(x.detach().cpu() for x in result), logp.grad.cpu()


OPTIONS = [{}, {"eps_low": 0.0, "eps_high": 0.5}, {"beta": 0.04, "ref_logp": True}, {"correction": True},
           {"beta": 0.04, "ref_logp": True, "correction": True}]


def filled(options, extra):
    return {k: extra[k] if v is True else v for k, v in options.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_token_loss_equals_a_loop(options, dtype):
    case, extra = loss_case(LENGTHS, dtype=dtype)
    options = filled(options, extra)
    got, expected = loss_of(case, **options), loop_loss(*case, **options)
    eps = 1e-5 if dtype == torch.float32 else 1e-12 if DEVICE == "cpu" else 1e-6  # compiled, bounds are float32
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == dtype
        torch.testing.assert_close(x.double(), y.double(), rtol=eps, atol=eps)
    assert 0 < got[3].sum() < got[4].sum()  # some tokens are clipped, and more have no gradient


@pytest.mark.parametrize("options", [{}, {"beta": 0.04, "ref_logp": True, "correction": True}], ids=["no KL", "KL"])
def test_token_loss_gradcheck(options):
    (logp, *rest), extra = loss_case((3, 2, 5), seed=2)
    rest, options = [x.to(DEVICE) for x in rest], {k: v if isinstance(v, float) else v.to(DEVICE)
                                                   for k, v in filled(options, extra).items()}
    ratio = (logp - rest[0].cpu()).exp()
    assert min((ratio - edge).abs().min() for edge in (0.8, 1.28)) > 1e-4  # no kink under the probe
    assert torch.autograd.gradcheck(lambda x: grpo_token_loss(x, *rest, **options, backend="triton").loss,
                                    (logp.to(DEVICE).requires_grad_(),))


def one_token(log_ratio, A, how, **options):
    """(result, gradient) of one token of weight 1 beside an ordinary one."""
    case = (torch.tensor([log_ratio, -1.0]), torch.tensor([0.0, -1.0]), torch.tensor([A]), torch.tensor([0, 2]),
            torch.ones(1))
    return loss_of(case, how, **options)


@pytest.mark.parametrize("how", ["triton", "torch"])
@pytest.mark.parametrize("A", [-2.0, 2.0])
def test_a_ratio_exactly_on_either_edge_is_not_clipped(how, A):
    """Ratio 1 with widths 0 is the one edge that floating point hits exactly."""
    for widths in ({"eps_low": 0.0}, {"eps_high": 0.0}, {"eps_low": 0.0, "eps_high": 0.0}):
        got = one_token(0.0, A, how, **widths)
        assert got[3] == got[4] == 0 and got[5].tolist() == [-A, -A]
    beyond = one_token(math.copysign(1e-3, A), A, how, eps_low=0.0, eps_high=0.0)
    assert beyond[3] == beyond[4] == 1 and beyond[5][0] == 0


@pytest.mark.parametrize("how", ["triton", "torch"])
@pytest.mark.parametrize("log_ratio", [-1000.0, -20.5, 20.5, 1000.0])
@pytest.mark.parametrize("A", [-1.0, 1.0])
def test_absurd_ratios_stay_finite_and_without_gradient(how, log_ratio, A):
    got = one_token(log_ratio, A, how)
    assert all(x.isfinite().all() for x in got) and got[5].tolist() == [0.0, -A] and got[4] == 1
    free, held = math.exp(math.copysign(20, log_ratio)) * A, (1.28 if log_ratio > 0 else 0.8) * A
    assert got[1].item() == pytest.approx((min(free, held) + A) / 2, rel=1e-5)
    kl = one_token(0.0, 0.0, how, beta=0.5, ref_logp=torch.tensor([log_ratio, -1.0]))  # now the other ratio
    limit = math.copysign(20, log_ratio)
    assert kl[2].item() == pytest.approx((math.exp(limit) - limit - 1) / 2, rel=1e-5)
    assert kl[5].tolist() == [0.0, 0.0] and kl[4] == 2


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_at_the_reference_there_is_no_kl_gradient(how):
    case, _ = loss_case(dtype=torch.float32)
    case[2] = torch.zeros_like(case[2])
    got = loss_of(case, how, beta=0.04, ref_logp=case[0])
    assert all((x == 0).all() for x in (*got[:4], got[5])) and torch.equal(got[4], case[3].diff().float())


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_a_nan_logprob_gives_a_nan_loss(how):
    for place, options in ((0, {}), (1, {}), (0, {"beta": 0.04})):
        case, extra = loss_case(dtype=torch.float32)
        case[place][70] = torch.nan
        got = loss_of(case, how, **options, **({"ref_logp": extra["ref_logp"]} if options else {}))
        assert got[0].isnan() and got[5][70].isnan() and got[5].isnan().sum() == 1
        assert torch.equal(got[3:5][0].isnan(), torch.zeros(5, dtype=torch.bool))


@pytest.mark.parametrize("how", ["triton", "torch"])
def test_backward_scales_with_the_incoming_gradient(how):
    case, _ = loss_case(dtype=torch.float32)
    plain = loss_of(case, how)[5]
    case = [x.to(DEVICE) for x in case]
    x = case[0].clone().requires_grad_()
    (-3 * grpo_token_loss(x, *case[1:], backend=how).loss).backward()
    torch.testing.assert_close(x.grad.cpu(), -3 * plain, rtol=1e-6, atol=0)


def test_no_responses_lose_nothing():
    empty = torch.zeros(0, device=DEVICE)
    result = grpo_token_loss(empty, empty, empty, torch.zeros(1, dtype=torch.long, device=DEVICE), empty,
                             backend="triton")
    assert result.loss == 0 and all(x.shape == (0,) for x in result[1:])


# ------------------------------------------------------------------------------------------------ all three in torch


def operations(how: str):
    """Every registered operation with arguments as the public functions make them."""
    on = how == "triton"
    hidden, weight, targets = linear_case(6, 140, 16)
    targets[2] = -100
    a, b = (x.float() for x in weights_of(6))
    ops = torch.ops.group_dro
    logp, lse, entropy = ops.linear_logprob(hidden, weight, targets, 0.7, True, on)
    sideways = hidden.T.contiguous().T
    case, extra = loss_case((2, 5), dtype=torch.float32)
    rewards, offsets = torch.randn(7, generator=generator(3)).to(DEVICE), torch.tensor([0, 3, 3, 7], device=DEVICE)
    loss = [x.to(DEVICE) for x in (*case, *extra.values())]
    backward = (lse, entropy)
    return {
        "linear": (ops.linear_logprob, (hidden, weight, targets, 0.7, True, on)),
        "linear without entropy": (ops.linear_logprob, (hidden, weight, targets, 0.7, False, on)),
        "linear backward": (ops.linear_logprob_backward,
                            (a, b, hidden, weight, targets, *backward, None, 0.7, True, on)),
        "linear backward of transposed hidden states": (
            ops.linear_logprob_backward, (a, b, sideways, weight, targets, *backward, None, 0.7, True, on)),
        "linear backward to a frozen weight": (ops.linear_logprob_backward,
                                               (a, None, hidden, weight, targets, *backward, None, 0.7, False, on)),
        "linear backward to main_grad": (ops.linear_logprob_backward, (
            a, b, hidden, weight, targets, *backward, torch.zeros_like(weight), 0.7, True, on)),
        "advantage": (ops.group_advantage, (rewards, offsets, rewards[:3].clone(), 1e-6, 3.0, True, on)),
        "advantage without weights": (ops.group_advantage, (rewards, offsets, None, 1e-6, None, False, on)),
        "loss": (ops.grpo_token_loss, (*loss, 0.2, 0.28, 0.04, on)),
        "loss without reference": (ops.grpo_token_loss, (*loss[:5], None, None, 0.2, 0.28, 0.0, on)),
    }


@pytest.mark.parametrize("how", ["triton", "torch"])
@pytest.mark.parametrize("name", [
    "linear", "linear without entropy", "linear backward", "linear backward of transposed hidden states",
    "linear backward to a frozen weight", "linear backward to main_grad", "advantage",
    "advantage without weights", "loss", "loss without reference",
])
def test_operations_are_what_torch_is_told_of_them(name, how):
    torch.library.opcheck(*operations(how)[name])


def step_of_all(hidden, weight, targets, rewards, offsets, how, main_grad=None):
    """A function of all three operations, of (6,) tokens in two responses, for torch.compile."""
    A, _ = group_advantage(rewards, torch.tensor([0, 2], device=rewards.device), clip=3.0, backend=how)
    logp, entropy = linear_logprob(hidden, weight, targets, temperature=0.7, entropy=True, main_grad=main_grad,
                                   backend=how)
    loss = grpo_token_loss(logp, logp.detach() - 0.1, A, offsets, torch.ones_like(A), beta=0.04,
                           ref_logp=logp.detach() + 0.1, backend=how).loss
    return loss + entropy.sum()


@pytest.mark.parametrize("compiler, how, main", [
    ("aot_eager", "triton", False), ("aot_eager", "torch", False), ("aot_eager", "triton", True),
    ("inductor", "triton", False),
])
def test_compiled_whole_they_are_what_they_were(compiler, how, main):
    hidden, weight, targets = linear_case(6, 140, 16)
    rest = (torch.tensor([1.0, -1.0], device=DEVICE), torch.tensor([0, 2, 6], device=DEVICE))
    results = []
    for function in (step_of_all, torch.compile(step_of_all, backend=compiler, fullgraph=True)):
        operands = [x.clone().requires_grad_() for x in (hidden, weight)]
        main_grad = torch.ones_like(weight) if main else None
        loss = function(*operands, targets, *rest, how, main_grad)
        loss.backward()
        results.append([loss.detach(), operands[0].grad, main_grad if main else operands[1].grad])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------ which form runs


def calls(how):
    hidden, weight, targets = (x.cpu() for x in linear_case(2, 5, 3))
    (logp, *rest), _ = loss_case((2,), dtype=torch.float32)
    return [lambda: linear_logprob(hidden, weight, targets, backend=how),
            lambda: group_advantage(torch.ones(3), torch.tensor([0, 3]), backend=how),
            lambda: grpo_token_loss(logp, *rest, backend=how)]


KERNELS = [(LINEAR, "_fold_kernel"), (ADVANTAGE, "_kernel"), (LOSS, "_kernel")]


def test_an_unknown_backend_raises():
    for call in calls("cuda"):
        with pytest.raises(ValueError, match="'auto', 'triton' or 'torch', got 'cuda'"):
            call()


def test_triton_on_cpu_tensors_raises_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    for call in calls("triton"):
        with pytest.raises(ValueError, match="need CUDA tensors"):
            call()


def test_triton_that_is_not_installed_raises_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(backend, "triton", None)
    for call in calls("triton"):
        with pytest.raises(ValueError, match="not installed"):
            call()


@pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors take no compiled kernel")
@pytest.mark.parametrize("how, devices, launches", [
    ("auto", {"cuda"}, 0), ("auto", {"cuda", "cpu"}, 1), ("triton", {"cuda"}, 1), ("torch", {"cuda", "cpu"}, 0),
])
def test_the_backend_decides_which_form_runs(monkeypatch, how, devices, launches):
    monkeypatch.setattr(backend, "AUTO_DEVICES", devices)
    counted = [count(monkeypatch, *kernel) for kernel in KERNELS]
    for call in calls(how):
        call()
    assert [k.launches for k in counted] == [launches] * 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model that knows the shape of an answer."""
    cache = tmp_path_factory.mktemp("cache")
    sums = [{"question": f"{a}+{b}=", "answer": a + b} for a in range(5) for b in range(5)]
    (cache / "sums.jsonl").write_text("".join(json.dumps(x) + "\n" for x in sums))
    settings = tasks.BaseSettings(steps=150, lines_per_step=32, hidden_size=32, layers=1)
    return tasks.base_model("arithmetic", settings, cache=cache)


def tossed(grade):
    """Coins for rewards: so small a model solves nothing, and all advantages would be 0."""

    def toss(batch, problems):
        rewards, timeouts, texts = grade(batch, problems)
        return np.random.default_rng(0).choice([-1.0, 1.0], len(rewards)), timeouts, texts

    return toss


@pytest.mark.skipif(DEVICE == "cuda", reason="the trainer's bf16 on CUDA is too coarse for this comparison")
def test_a_training_step_on_the_kernels_is_one_on_the_references(base, tmp_path, monkeypatch):
    counted = [count(monkeypatch, *kernel) for kernel in KERNELS + [(LINEAR, "_dlogits_kernel")]]
    lines, tensors = [], []
    for devices in (set(), {"cpu"}):
        assert not any(k.launches for k in counted)
        monkeypatch.setattr(backend, "AUTO_DEVICES", devices)
        trainer = trainer_of(base, tmp_path, mode="both", prompts_per_step=12, minibatch_prompts=6, train_problems=15,
                             eval_problems=5, max_response_tokens=6, kl_beta=0.1)
        monkeypatch.setattr(trainer, "grade", tossed(trainer.grade))
        before = trainer.optimizer.master.detach().clone()
        line, _ = trainer.step(0)
        # idle_frac: at the reference the KL's gradient is 0 or dust
        rounded = ("loss", "grad_norm", "kl", "entropy", "surrogate_abs", "idle_frac")
        line["signals"].pop("surrogate")  # as rounded; compared as surrogate_abs and as the scores it makes
        lines.append({k: v for k, v in line.items() if k != "seconds" and k not in rounded})
        tensors.append({"change": trainer.optimizer.master.detach() - before,
                        "gradient": trainer.optimizer.tensors()["exp_avg"],
                        **{k: torch.tensor(line[k]) for k in rounded[:5]},
                        "prompt scores": torch.from_numpy(trainer.prompt_gdro.score_B),
                        "arm scores": torch.from_numpy(trainer.rollout_gdro.log_prob_BK())})
    names = ("linear", "advantage", "loss", "dlogits")
    launches = dict(zip(names, (k.launches for k in counted), strict=True))
    assert launches["advantage"] == 1 and launches["linear"] > launches["dlogits"] >= launches["loss"] >= 1
    for line in lines:
        line["mismatch"] = line["mismatch"]["max"] < 1e-5
    assert lines[0] == lines[1] and lines[0]["mismatch"]
    assert lines[0]["zero_std_frac"] < 1 and tensors[0]["gradient"].norm() > 0.01 and tensors[0]["prompt scores"].any()
    for name, expected in tensors[0].items():  # Adam divides by the gradient, however small: more rounding
        torch.testing.assert_close(tensors[1][name].norm(), expected.norm(), rtol=1e-4, atol=1e-6)
        assert (tensors[1][name] - expected).norm() <= (1e-3 if name == "change" else 1e-5) * expected.norm() + 1e-6
