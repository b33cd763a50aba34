"""The kernels against their definitions in float64: every claim of the torch reference and of the Triton kernel, which
is compiled where there is a CUDA device and interpreted elsewhere.

Shapes are small because the interpreter is slow, and odd because tiles are not: rows, words and depths that no tile
divides, targets on the borders of tiles and of splits.
"""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.kernels import forget_peak, in_fresh_process, resident_mib
from config import parse_args
from kernels import backend, group_advantage, linear_logprob
from ranks import Ranks
from train import Trainer

ADVANTAGE, LINEAR = (importlib.import_module(f"kernels.{name}") for name in (
    "group_advantage", "linear_logprob"))  # the package has functions so named
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
FORWARD = {F64: 1e-12, F32: 1e-5, BF16: 2e-5}  # absolute
# relative to the norm; compiled, dlogits are rounded to bf16, too
GRADIENT = {F64: 1e-12, F32: 1e-5, BF16: 2**-8} if DEVICE == "cpu" else {F64: 1e-12, F32: 1e-4, BF16: 2**-7}
on_triton = pytest.mark.parametrize("how", ["triton"], indirect=True)
on_torch = pytest.mark.parametrize("how", ["torch"], indirect=True)


@pytest.fixture(params=["torch", "triton"])
def how(request, monkeypatch):
    """The backend. Parts of Triton that it imports late, at the first launch, ask the environment again."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="the kernels need Triton, which is not installed")
        if DEVICE == "cpu":
            monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


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


def linear_case(T=37, V=251, D=24, dtype=F32, seed=0):
    """hidden, weight, targets, incoming gradients; logits are N(0, 4), the first targets lie on borders of tiles."""
    g = generator(seed)
    hidden, weight = (torch.randn(rows, D, generator=g) for rows in (T, V))
    targets = torch.randint(V, (T,), generator=g)
    border = torch.tensor([y for y in (V - 1, 0, 127, 128, 255, 256, 1023, 1024) if y < V][:T], dtype=torch.long)
    targets[: len(border)] = border
    return ((2 * D**-0.5 * hidden).to(DEVICE, dtype), weight.to(DEVICE, dtype), targets.to(DEVICE),
            torch.randn(T, generator=g).to(DEVICE))


def log_softmax(logits, targets):
    """logp, entropy of whole logits; 0 at targets of -100."""
    log_p = logits.log_softmax(1)
    logp, entropy = log_p.gather(1, targets.clamp(min=0)[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(1)
    return logp.masked_fill(targets == -100, 0.0), entropy.masked_fill(targets == -100, 0.0)


def plain(hidden, weight, targets, grad, temperature=1.0, dtype=F64):
    """logp, entropy, gradient in hidden, in weight by whole logits in `dtype`, from the operands as they are."""
    h, w = (x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight))
    logp, entropy = log_softmax(h @ w.T / temperature, targets)
    return logp.detach(), entropy.detach(), *torch.autograd.grad((grad * logp).sum(), (h, w))


def linear(hidden, weight, targets, grad, how, **options):
    """The same of the kernel."""
    h, w = (x.detach().requires_grad_() for x in (hidden, weight))
    logp, entropy = linear_logprob(h, w, targets, entropy=True, backend=how, **options)
    assert logp.dtype == entropy.dtype == torch.promote_types(hidden.dtype, F32) and not entropy.requires_grad
    return logp.detach(), entropy, *torch.autograd.grad(logp, (h, w), grad.to(logp.dtype))


def assert_true(got, expected, dtype, bound=0.0):
    """logp, entropy to an absolute bound, gradients relative to their norm; `bound` where that of the dtype is less."""
    for x, y in zip(got[:2], expected[:2], strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0, atol=max(FORWARD[dtype], bound))
    for x, y in zip(got[2:], expected[2:], strict=True):
        assert x.dtype == dtype and relative_error(x, y) < max(GRADIENT[dtype], 2 * bound)


def in_small_parts(monkeypatch) -> None:
    """The reference in chunks of 128 rows, the kernel's backward in slices of 1024 words."""
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", 1)
    monkeypatch.setattr(LINEAR, "MAX_EXTRA_BYTES", 0)


@pytest.mark.parametrize("shape, dtype, temperature", [
    ((0, 17, 8), F32, 1.0), ((1, 17, 8), BF16, 0.5), ((5, 37, 16), F64, 1.7), ((37, 251, 24), F32, 0.6),
    ((33, 257, 128), F64, 1.0), ((6, 300, 13), BF16, 1.7), ((10, 1100, 8), F32, 1.7), ((150, 40, 16), BF16, 0.5),
], ids=str)
def test_linear_logprob_equals_float64(monkeypatch, how, shape, dtype, temperature):
    monkeypatch.setattr(LINEAR, "SPLIT", 256)
    in_small_parts(monkeypatch)
    case = linear_case(*shape, dtype=dtype)
    slices = count(monkeypatch, LINEAR, "_dlogits_kernel")
    got = linear(*case, how, temperature=temperature)
    assert_true(got, plain(*case, temperature), dtype)
    assert slices.launches == (how == "triton" and shape[0] > 0) * math.ceil(shape[1] / 1024)
    assert torch.equal(linear_logprob(*case[:3], temperature=temperature, backend=how), got[0])


@pytest.mark.parametrize("name, bound", [
    ("from -1000 to 1000", 2e-4), ("far beyond exp", 4e-3), ("a word far above all others", 4e-5)])
def test_logits_may_lie_anywhere(how, name, bound):
    """A constant added to a row costs no more than the rounding of its logits."""
    hidden, weight, targets, grad = linear_case()
    if name == "from -1000 to 1000":
        weight[:, 0], hidden[:, 0] = 1.0, torch.linspace(-1000, 1000, 37).round()
    elif name == "far beyond exp":
        hidden *= 1e3
    else:
        hidden[:, 1], weight[:, 1] = 1.0, 0.0
        weight[200, 1] = 40.0
        targets[::2] = 200
    got, expected = linear(hidden, weight, targets, grad, how), plain(hidden, weight, targets, grad)
    assert_true(got, expected, F32, bound)
    assert name != "far beyond exp" or expected[0].min() < -1000


@pytest.mark.parametrize("V, level", [(1, -1e3), (127, 30.0), (128, -1e3), (257, -30.0)])
def test_words_that_do_not_exist_stay_out_of_the_sum(monkeypatch, how, V, level):
    """Tiles reach past V, where logits are 0: beside real ones at -30 they, or a maximum begun at 0, would be all."""
    monkeypatch.setattr(LINEAR, "SPLIT", 256)
    hidden, weight, *rest = linear_case(3, V, 8, dtype=F64)
    hidden[:, 0], weight[:, 0] = 1.0, level
    for x, y in zip(linear(hidden, weight, *rest, how), plain(hidden, weight, *rest), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@on_torch
def test_chunks_cost_bf16_no_precision(monkeypatch, how):
    """What is summed over chunks of rows, the gradient in the weight, is rounded once."""
    case = linear_case(2048, 41, 16, dtype=BF16)
    exact, whole = plain(*case), linear(*case, how)
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", 1)
    for chunked, unchunked, expected in zip(linear(*case, how)[2:], whole[2:], exact[2:], strict=True):
        assert relative_error(chunked, expected) < 1.5 * relative_error(unchunked, expected)


def test_linear_logprob_passes_gradcheck(how):
    hidden, weight, targets, _ = linear_case(2, 4, 2, dtype=F64)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, targets, temperature=0.7, backend=how),
                                    (hidden.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("rows", [slice(3, 9), slice(None)], ids=["some", "all"])
def test_rows_with_target_minus_100_count_for_nothing(how, rows):
    case = linear_case()
    case[2][rows] = -100
    got = linear(*case, how)
    assert_true(got, plain(*case), F32)
    assert all((x[rows] == 0).all() for x in got[:3])


VIEWS = {  # of a matrix (n, 24), none of them contiguous and at a multiple of 16 bytes
    "every other row": lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2],
    "columns that begin off the grid": lambda x: torch.cat((x[:, :3], x, x[:, :2]), 1)[:, 3:27],
    "columns that begin on it": lambda x: torch.cat((x[:, :8], x), 1)[:, 8:],
    "transposed": lambda x: x.T.contiguous().T,
    "memory that begins off the grid": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
    "one row many times": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("name, dtype", [*zip(VIEWS, (F32, BF16) * 3, strict=True), ("transposed", F32)])
def test_strides_change_no_bit(how, name, dtype):
    hidden, weight, targets, grad = linear_case(9, 140, 24, dtype=dtype)
    h, w = map(VIEWS[name], (hidden, weight))
    assert not h.is_contiguous() or h.data_ptr() % 16
    apart = [torch.stack((x, torch.zeros_like(x)), dim=1)[:, 0] for x in (targets, grad)]
    got, expected = linear(h, w, *apart, how), linear(*(x.clone(memory_format=torch.contiguous_format)
                                                        for x in (h, w)), targets, grad, how)
    if how == "triton" or DEVICE == "cpu":  # cuBLAS has other products for a transposed matrix
        assert all(torch.equal(x, y) for x, y in zip(got[:2], expected[:2], strict=True))
    assert all(x.allclose(y, atol=FORWARD[dtype], rtol=0) for x, y in zip(got[:2], expected[:2], strict=True))
    assert all(relative_error(x, y.double()) < GRADIENT[dtype] / 4 for x, y in zip(got[2:], expected[2:], strict=True))


# Which of the rows, in tiles and a ragged rest, have an incoming gradient: backward leaves out tiles that have none.
LIVE = {
    "none": lambda tile, T: [],
    "the last tile only": lambda tile, T: range(3 * tile, T),
    "every other tile": lambda tile, T: [r for r in range(T) if r // tile % 2],
    "scattered rows": lambda tile, T: [3, 2 * tile + 1, 2 * tile + 3, T - 1],
    "halves of tiles": lambda tile, T: range(tile + tile // 2, 2 * tile + tile // 2),
}


def zero_row_case(how, name, V=40, dtype=F32):
    """hidden, weight, targets, gradients of three tiles of rows and 17 more, and which are not zero."""
    tile = 128 if how == "torch" else LINEAR._tiles(dtype).ROWS
    T = 3 * tile + 17
    hidden, weight, targets, grad = linear_case(T, V, 16, dtype=dtype)
    live = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    live[list(LIVE[name](tile, T))] = True
    return hidden, weight, targets, torch.where(live, grad, 0.0), live


@pytest.mark.parametrize("name, V, dtype", [
    ("none", 40, F32), ("the last tile only", 40, BF16),
    ("every other tile", 1100, BF16), ("scattered rows", 40, F32), ("halves of tiles", 40, F32),
])
def test_leaving_out_rows_without_gradient_changes_no_bit(monkeypatch, how, name, V, dtype):
    in_small_parts(monkeypatch)
    hidden, weight, targets, grad, live = zero_row_case(how, name, V, dtype)
    _, lse, _ = LINEAR._forward(hidden, weight, targets, 1.0, False, how == "triton")
    results = []
    for _ in range(2):
        results.append(LINEAR._backward(grad, hidden, weight, targets, lse, 1.0, True, how == "triton"))
        monkeypatch.setattr(LINEAR, "_live", lambda grad_logp: torch.ones_like(grad_logp, dtype=torch.bool))
    (dh, dw), (dh_all, dw_all) = results
    assert torch.equal(dh, dh_all) and torch.equal(dw, dw_all) and (dh[~live] == 0).all()
    assert bool(dw.any()) == (name != "none")
    _, _, dh_true, dw_true = plain(hidden, weight, targets, grad)
    assert relative_error(dh, dh_true) < GRADIENT[dtype]
    assert name == "none" or relative_error(dw, dw_true) < GRADIENT[dtype]


def test_tiles_without_gradient_are_really_left_out(monkeypatch, how):
    """Hidden states of theirs that are NaN, and what stood in memory before, must not be read in backward."""
    monkeypatch.setattr(LINEAR, "MAX_LOGITS", 1)
    hidden, weight, targets, grad, live = zero_row_case(how, "every other tile")
    hidden[~live] = torch.nan
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: empty(*shape, **kw).fill_(torch.nan))
    _, _, dh, dw = linear(hidden, weight, targets, grad, how)
    assert dh.isfinite().all() and dw.isfinite().all() and (dh[~live] == 0).all() and dw.any()


def test_nan_gradients_are_not_left_out(how):
    hidden, weight, targets, grad, _ = zero_row_case(how, "none")
    grad[40] = torch.nan
    _, _, dh, dw = linear(hidden, weight, targets, grad, how)
    assert dh[40].isnan().all() and dw.isnan().all()


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_frozen_operands_get_no_gradient_and_spoil_none(how, frozen):
    hidden, weight, targets, grad = linear_case(9, 140, 24)
    expected = linear(hidden, weight, targets, grad, how)
    operands = [hidden.clone(), weight.clone()]
    operands[1 - frozen].requires_grad_()
    (grad * linear_logprob(*operands, targets, backend=how)).sum().backward()
    assert operands[frozen].grad is None and torch.equal(operands[1 - frozen].grad, expected[3 - frozen])


def test_the_backward_keeps_no_logits(how):
    """Of what autograd holds between forward and backward, nothing is larger than the operands."""
    kept = []
    hidden, weight, targets, _ = linear_case(40, 50, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets, entropy=True, backend=how)
    assert max(kept) == 50 * 4


def peaks_of_the_reference() -> list[float]:
    """MiB on top of what was held: forward and backward in chunks of 128 rows, forward and backward at once."""
    hidden, weight, targets, grad = linear_case(2048, 16384, 8)
    linear(*linear_case(), "torch")  # loads what a first call loads
    operands, peaks = (hidden.requires_grad_(), weight.requires_grad_()), []
    for LINEAR.MAX_LOGITS in (1, 2048 * 16384):
        held = forget_peak()
        logp, _ = linear_logprob(*operands, targets, entropy=True, backend="torch")
        peaks.append(resident_mib("VmHWM") - held)
        held = forget_peak()
        torch.autograd.grad(logp, operands, grad)
        peaks.append(resident_mib("VmHWM") - held)
    return peaks


@pytest.mark.skipif(DEVICE == "cuda" or not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_no_more_than_a_chunk_of_logits_ever_exists(monkeypatch):
    """2048 x 16384 logits are 128 MiB in float32; either direction must do with a few chunks of 128 rows, 8 MiB.

    In a process of its own, whose allocator gives back what is freed: else what it keeps counts, or hides what counts.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    peaks = in_fresh_process(peaks_of_the_reference)
    assert max(peaks[:2]) < 48
    assert min(peaks[2:]) > 100  # the probe sees logits where they are made whole


@pytest.mark.skipif(DEVICE == "cuda", reason="targets are not checked there, and the rest is as on CPU")
@pytest.mark.parametrize("change, error, message", [
    (dict(weight=torch.zeros(7, 4)), ValueError, "shapes do not fit"),
    (dict(weight=torch.zeros(7)), ValueError, "shapes do not fit"),
    (dict(hidden=torch.zeros(5, 3, 1)), ValueError, "shapes do not fit"),
    (dict(targets=torch.zeros(4, dtype=torch.long)), ValueError, "shapes do not fit"),
    (dict(weight=torch.zeros(7, 3, dtype=BF16)), TypeError, "one floating dtype"),
    (dict(hidden=torch.zeros(5, 3, dtype=torch.long), weight=torch.zeros(7, 3, dtype=torch.long)), TypeError,
     "one floating dtype"),
    *((dict(temperature=t), ValueError, "temperature must be positive") for t in (0.0, math.nan)),
    *((dict(targets=torch.tensor([0, y, 1, 2, 3])), IndexError, rf"targets\[1\] is {y}, and there are 7 words")
      for y in (7, -1)),
])
def test_arguments_that_do_not_fit_raise(change, error, message):
    case = dict(hidden=torch.zeros(5, 3), weight=torch.zeros(7, 3), targets=torch.zeros(5, dtype=torch.long))
    with pytest.raises(error, match=message):
        linear_logprob(**case | change)


# ------------------------------------------------------------------------------------------------ group_advantage


def naive_advantage(rewards, sizes, weights=None, *, eps=1e-6, clip=None):
    """Equation (3), then the clip, then the weight, one rollout at a time."""
    out, constant = [], []
    for i, group in enumerate(np.split(np.asarray(rewards, np.float64), np.cumsum(sizes)[:-1])):
        constant.append(len(set(group.tolist())) <= 1)
        for r in group:
            a = 0.0 if constant[-1] else r - group.mean()
            if a:
                a /= np.sqrt(((group - group.mean()) ** 2).mean()) + eps  # population: divided by n
            if clip is not None:
                a = min(max(a, -clip), clip)
            out.append(a if weights is None else a * float(weights[i]))
    return np.array(out), constant


def advantage(how, rewards, sizes, weights=None, dtype=F64, offsets_dtype=torch.int64, **options):
    """(advantages, constant) of the kernel, as numpy and a list."""
    offsets = torch.tensor([0, *np.cumsum(sizes, dtype=int)], dtype=offsets_dtype, device=DEVICE)
    weights = None if weights is None else torch.tensor(weights, dtype=F32, device=DEVICE)
    got, constant = group_advantage(torch.tensor(rewards, dtype=dtype, device=DEVICE), offsets, weights, backend=how,
                                    **options)
    assert got.dtype == dtype and constant.dtype == torch.bool
    return got.double().cpu().numpy(), constant.tolist()


SIZES = [1, 0, 2, 3, 7, 8, 64, 9, 0, 100]


@pytest.mark.parametrize("options", [
    {}, {"eps": 0.1, "clip": 0.75}, {"eps": 0.0}, {"eps": 1e3},
], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_advantage_equals_a_loop_on_ragged_groups(how, options, weighted):
    rng = np.random.default_rng(0)
    rewards = np.where(rng.random(sum(SIZES)) < 0.5, rng.normal(size=sum(SIZES)), 1.0)
    weights = np.float32([1, 2, 0, 0.3, -1.5, 2, 3, 0.5, 1, 2.5]) if weighted else None
    got, constant = advantage(how, rewards, SIZES, weights, **options)
    expected, expected_constant = naive_advantage(rewards, SIZES, weights, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-13)
    assert constant == expected_constant == [n < 2 for n in SIZES]
    rounded, _ = advantage(how, rewards, SIZES, weights, F32, torch.int32, **options)
    np.testing.assert_allclose(rounded, expected, rtol=2e-3 if options.get("eps") == 0.0 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
@pytest.mark.parametrize("options", [{}, {"eps": 0.0}], ids=str)
def test_equal_rewards_give_exactly_zero(how, dtype, options):
    """In floating point the mean of equal numbers need not be that number: 0.1 is such a one."""
    sizes, values = [1, 2, 3, 7, 10, 31], (0.1, 0.3, 2.7, -1.0, 1e6)
    rewards = np.concatenate([np.full(sum(sizes), value) for value in values])
    got, constant = advantage(how, rewards, sizes * len(values), [7.0] * len(sizes) * len(values), dtype, **options)
    assert (got == 0).all() and all(constant)


def test_a_large_common_reward_does_not_drown_the_difference(how):
    """1e6 and 1e6 + 1 in float32: two passes in float64 keep the deviation that E[r^2] - E[r]^2 loses."""
    got, _ = advantage(how, np.float32([1e6, 1e6 + 1] * 100), [200], dtype=F32)
    np.testing.assert_allclose(got, [-1, 1] * 100, rtol=1e-5)
    near = np.array([100, 100, 100.001, 100.002])
    np.testing.assert_allclose(advantage(how, near, [4], eps=0.0)[0], (near - near.mean()) / near.std(), rtol=1e-9)


def test_no_groups_and_empty_groups(how):
    assert advantage(how, [], [])[1] == [] and advantage(how, [], [0, 0])[1] == [True, True]


@pytest.mark.parametrize("rewards", [[np.nan], [np.nan, 1.0], [1.0] * 9 + [np.nan]],
                         ids=["alone", "first", "in the second block"])
@pytest.mark.parametrize("clip", [None, 3.0])
def test_a_nan_reward_is_not_hidden(how, rewards, clip):
    """A group with NaN is not one of equal rewards."""
    got, constant = advantage(how, rewards, [len(rewards)], dtype=F32, clip=clip)
    assert np.isnan(got).all() and constant == [False]


@pytest.mark.skipif(DEVICE == "cuda", reason="a check there would wait for the device")
@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3]])
def test_offsets_that_fall_or_do_not_span_the_rewards_raise(offsets):
    with pytest.raises(ValueError, match="offsets must go from 0 to 3 and never fall"):
        group_advantage(torch.ones(3), torch.tensor(offsets))


# -------------------------------------------------------------------------------------------- linear_logprob in torch


def operation(name: str, on: bool):
    """A registered operation with arguments as the public function makes them."""
    ops, (hidden, weight, targets, grad) = torch.ops.group_dro, linear_case(6, 40, 16)
    targets[2] = -100
    if name == "forward":
        return ops.linear_logprob, (hidden, weight, targets, 0.7, True, on)
    _, lse, _ = ops.linear_logprob(hidden, weight, targets, 0.7, True, on)
    sideways = hidden.T.contiguous().T
    return ops.linear_logprob_backward, (grad, sideways if name.endswith("transposed") else hidden, weight, targets,
                                         lse, 0.7, not name.endswith("frozen"), on)


@pytest.mark.parametrize("name", ["forward", "backward", "backward, transposed", "backward, frozen"])
def test_operations_are_what_torch_is_told_of_them(how, name):
    torch.library.opcheck(*operation(name, how == "triton"))


# ------------------------------------------------------------------------------------------------ which form runs


def calls(how):
    hidden, weight, targets, _ = (x.cpu() for x in linear_case(2, 5, 3))
    return [lambda: linear_logprob(hidden, weight, targets, backend=how),
            lambda: group_advantage(torch.ones(3), torch.tensor([0, 3]), backend=how)]


KERNELS = [(LINEAR, "_fold_kernel"), (ADVANTAGE, "_kernel")]


@pytest.mark.parametrize("how, without, message", [
    ("cuda", None, "'auto', 'triton' or 'torch', got 'cuda'"), ("triton", "INTERPRETED", "need CUDA tensors"),
    ("triton", "triton", "not installed"),
])
def test_a_backend_that_cannot_run_raises_where_it_is_asked_for(monkeypatch, how, without, message):
    if without is not None:
        pytest.importorskip("triton")
        monkeypatch.setattr(backend, without, None)
    for call in calls(how):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(DEVICE == "cuda", reason="CPU tensors take no compiled kernel")
@pytest.mark.parametrize("asked, devices, launches", [
    ("auto", {"cuda"}, 0), ("auto", {"cuda", "cpu"}, 1), ("triton", {"cuda"}, 1), ("torch", {"cuda", "cpu"}, 0),
])
@on_triton
def test_the_backend_decides_which_form_runs(monkeypatch, how, asked, devices, launches):
    monkeypatch.setattr(backend, "AUTO_DEVICES", devices)
    counted = [count(monkeypatch, *kernel) for kernel in KERNELS]
    for call in calls(asked):
        call()
    assert [k.launches for k in counted] == [launches] * 2


@pytest.mark.skipif(DEVICE == "cuda", reason="the trainer's bf16 on CUDA is too coarse for this comparison")
@on_triton
def test_a_training_step_on_the_kernels_is_one_on_the_references(how, base, tmp_path, monkeypatch):
    counted = [count(monkeypatch, *kernel) for kernel in KERNELS + [(LINEAR, "_dlogits_kernel")]]
    sums, found = str(base.parent / "sums.jsonl"), []
    cfg, _ = parse_args([
        "--preset", "arithmetic", "--model", str(base), "--train_data", sums, "--eval_data", sums, "--mode", "both",
        "--engine", "torch", "--prompts_per_step", "12", "--minibatch_prompts", "6", "--max_response_tokens", "6",
        "--learning_rate", "1e-3", "--kl_beta", "0.1", "--allow_overlap", "1", "--out_dir", str(tmp_path)])
    for devices in (set(), {"cpu"}):
        assert not any(k.launches for k in counted)
        monkeypatch.setattr(backend, "AUTO_DEVICES", devices)
        trainer = Trainer(cfg, Ranks())
        trainer.engine.load_weights(trainer.weights())
        before = torch.cat([w.detach().flatten() for _, w in trainer.weights()])
        line, _ = trainer.step(0)
        assert line["mismatch"]["max"] < 1e-5 and line["zero_std_frac"] < 1
        flat = {part: torch.cat([t.flatten() for name, t in trainer.tensors().items() if name.startswith(part)])
                for part in ("weight", "exp_avg.")}
        found.append({"change": flat["weight"] - before, "gradient": flat["exp_avg."],
                      "prompt scores": torch.from_numpy(trainer.prompt_gdro.score_B),
                      "arm scores": torch.from_numpy(trainer.rollout_gdro.log_prob_BK()),
                      **{k: torch.tensor(line[k]) for k in ("loss", "grad_norm", "kl", "entropy", "surrogate_abs")}})
    linear, advantage, dlogits = (k.launches for k in counted)
    assert advantage == 1 and linear > dlogits >= 1
    assert found[0]["gradient"].norm() > 0.01 and found[0]["prompt scores"].any()
    for name, expected in found[0].items():  # Adam divides by the gradient, however small: more rounding
        assert (found[1][name] - expected).norm() <= (1e-3 if name == "change" else 1e-5) * expected.norm() + 1e-6
