"""Log-probabilities of given tokens straight from hidden states and head, without logits of the whole batch.

    logit[t, v] = hidden[t] . weight[v] / temperature
    logp[t]     = logit[t, target_t] - lse[t],   lse[t] = log sum_v exp logit[t, v]
    entropy[t]  = lse[t] - sum_v p[t, v] logit[t, v]

With 16,384 tokens and 151,936 words the logits alone are 10 GB in float32, and as much again in backward. Here they
exist only a piece at a time. Both directions go through the vocabulary in slices:

    forward    each slice leaves three numbers a row, which combine exactly into lse and entropy (`softmax.py`). On
               CUDA its logits never leave the registers.
    backward   each slice's logits are computed again and become their own gradient, dlogits. It is written once, in
               the operands' dtype, and two matrix products take it up: dweight[slice] = dlogits^T hidden, finished,
               and dhidden += dlogits weight[slice].

Why slices of the vocabulary and not of the tokens: only dhidden, the smaller by far, is then accumulated, in float32.
Why float32 from the accumulator to the softmax, whatever the operands: rounded to bf16, log-probs at this vocabulary
are off by up to 3e-2, and the p - 1 of a confident token changes its sign.

Tokens whose incoming gradients are exactly zero (rollouts of prompts that all succeeded or all failed, tokens that the
clip holds) are left out of backward, in blocks of 64: whole responses are long runs of such rows, and leaving out
aligned blocks keeps the order of every sum that remains. All sums have a fixed order: no atomics, the same bits twice.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import IGNORE_INDEX, INTERPRETED, TensorDescriptor, accumulator, jit, tl, triton, use_triton
from kernels.softmax import LN2, LOWEST, Partial, check_targets, fold, logit_gradient, pick, tile_gradient

MAX_LOGITS = 1 << 24  # elements of one slice of the reference's float32 logits: 64 MiB
MAX_EXTRA_BYTES = 400 << 20  # of Triton's backward: a slice of dlogits beside the rows' copy and float32 gradient
ROW_BLOCK = 64  # granularity at which rows without gradient are left out
SPLIT = 4096  # vocabulary columns that one program of Triton's forward folds; fixed, so that results are


class Rows(NamedTuple):
    """What backward needs of each row, (T, D) and (T,); grad_entropy is None where the entropy was not used."""

    hidden: Tensor
    targets: Tensor
    lse: Tensor
    entropy: Tensor
    grad_logp: Tensor
    grad_entropy: Tensor | None


# ------------------------------------------------------------------------------------------------ torch reference

def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)  # float64 stays float64, for gradcheck
    return (hidden.to(wide) / temperature) @ weight.to(wide).T


def _fold_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float,
                    entropy: bool) -> tuple[Partial, Tensor]:
    """The partials of S slices, stacked (S, T), and the logits of the targets (T,); NaN for one that is no word."""
    columns = max(1, MAX_LOGITS // len(hidden))
    partials, chosen = [], torch.full_like(targets, torch.nan, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for first in range(0, len(weight), columns):
        logits = _logits(hidden, weight[first : first + columns], temperature)  # (T, slice)
        here = pick(logits, targets - first)
        chosen = torch.where(here.isnan(), chosen, here)
        partials.append(Partial.of(logits, entropy))
    return Partial(*map(torch.stack, zip(*partials, strict=True))), chosen


def _dlogits_reference(row: Rows, head: Tensor, first: int, temperature: float) -> Tensor:
    """The gradient in hidden @ head.T, (T, slice), for the slice of the weight, `head`, that begins at `first`."""
    log_p = _logits(row.hidden, head, temperature) - row.lse[:, None]
    h = None if row.grad_entropy is None else row.grad_entropy / temperature
    return logit_gradient(log_p, row.targets - first, row.entropy, row.grad_logp / temperature, h)


# ------------------------------------------------------------------------------------------------ Triton


class Tiles(NamedTuple):
    """Tile of logits (ROWS, COLUMNS), summed DEPTH at a time; GROUP tiles of rows share the weight's tiles in L2."""

    ROWS: int
    COLUMNS: int
    DEPTH: int
    GROUP: int
    num_warps: int
    num_stages: int


def _tiles(dtype: torch.dtype) -> Tiles:
    if INTERPRETED:
        return Tiles(32, 128, 32, 2, 4, 2)
    if dtype.itemsize == 2:
        return Tiles(128, 256, 64, 16, 8, 4)  # of the tiles tried for sm_90 the largest that spills no register
    return Tiles(64, 64, 16, 16, 8, 3)  # float32 runs on the ordinary cores, in full precision; likewise


@jit
def _logits_tile(hidden, weight, row, column, D, SCALE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                 DEPTH: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr):
    """(ROWS, COLUMNS) of SCALE * hidden @ weight.T; the descriptors give 0 beyond the ends."""
    tile = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    for d in range(0, D, DEPTH):
        h, w = hidden.load([row, d]), weight.load([column, d])
        if WIDEN:
            h, w = h.to(ACC), w.to(ACC)
        tile = tl.dot(h, w.T, tile, input_precision="ieee", out_dtype=ACC)
    return tile * SCALE


@jit
def _place(T, columns, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """This program's (tile of rows, tile of columns): GROUP tiles of rows go through the columns side by side."""
    pid, tiles = tl.program_id(0), tl.cdiv(T, ROWS)
    group = pid // (GROUP * columns)
    height = tl.minimum(tiles - group * GROUP, GROUP)
    within = pid % (GROUP * columns)
    return group * GROUP + within % height, within // height


@jit
def _fold_kernel(hidden, weight, targets, peak_ST, total_ST, moment_ST, chosen_T, T, V, D, SCALE: tl.constexpr,
                 SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
                 GROUP: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr):
    """One tile of rows over SPLIT columns: the running maximum and sums stay in registers. SCALE holds log2(e)."""
    tile, split = _place(T, tl.cdiv(V, SPLIT), ROWS, GROUP)
    row = tile * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + row, mask=row < T, other=-1)
    peak = tl.full((ROWS,), LOWEST, ACC)
    total, moment, chosen = tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC)
    first, last = split * SPLIT, tl.minimum(split * SPLIT + SPLIT, V)
    for start in range(first, last, COLUMNS):
        logits = _logits_tile(hidden, weight, tile * ROWS, start, D, SCALE, ROWS, COLUMNS, DEPTH, ACC, WIDEN)
        column = start + tl.arange(0, COLUMNS)[None, :]
        chosen += tl.sum(tl.where(column == target[:, None], logits, 0.0), axis=1)
        logits = tl.where(column < last, logits, LOWEST)
        left, right = tl.split(logits.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))  # else registers are spilled
        peak, total, moment = fold(left, peak, total, moment, 1, ENTROPY)
        peak, total, moment = fold(right, peak, total, moment, 1, ENTROPY)
    out = split.to(tl.int64) * T + row
    tl.store(peak_ST + out, peak * LN2, mask=row < T)
    tl.store(total_ST + out, total, mask=row < T)
    tl.store(moment_ST + out, moment * LN2, mask=row < T)
    tl.store(chosen_T + row, chosen * LN2, mask=(row < T) & (target >= first) & (target < last))


@jit
def _dlogits_kernel(hidden, weight, targets, lse_T, entropy_T, grad_logp_T, grad_entropy_T, dlogits, T, V, D, first,
                    SCALE: tl.constexpr, TEMPERATURE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    DEPTH: tl.constexpr, GROUP: tl.constexpr, ENTROPY: tl.constexpr, ACC: tl.constexpr,
                    WIDEN: tl.constexpr):
    """One tile of the logits of a slice of V columns from `first` on, turned into its gradient."""
    tile, slab = _place(T, tl.cdiv(V, COLUMNS), ROWS, GROUP)
    logits = _logits_tile(hidden, weight, tile * ROWS, slab * COLUMNS, D, SCALE, ROWS, COLUMNS, DEPTH, ACC, WIDEN)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = first + slab * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    lse = tl.load(lse_T + row, mask=row < T, other=0.0)[:, None]
    grad = tl.load(grad_logp_T + row, mask=row < T, other=0.0)[:, None]
    target = tl.load(targets + row, mask=row < T, other=-1)[:, None]
    entropy, grad_entropy = lse, grad
    if ENTROPY:
        entropy = tl.load(entropy_T + row, mask=row < T, other=0.0)[:, None]
        grad_entropy = tl.load(grad_entropy_T + row, mask=row < T, other=0.0)[:, None]
    gradient = tile_gradient(logits * LN2 - lse, column == target, entropy, grad, grad_entropy, ENTROPY) / TEMPERATURE
    dlogits.store([tile * ROWS, slab * COLUMNS], gradient.to(dlogits.dtype))


def _aligned(x: Tensor) -> Tensor:
    """x (n, D) as tensor descriptors want it, rows contiguous and at multiples of 16 bytes: itself or a padded copy."""
    unit = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % unit == 0 and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, -x.shape[1] % unit)).contiguous()


def _fold_triton(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float,
                 entropy: bool) -> tuple[Partial, Tensor]:
    """As `_fold_reference`, with slices of SPLIT columns; also with NaN for a target that is no word."""
    (T, D), V = hidden.shape, len(weight)
    tiles, acc = _tiles(hidden.dtype), accumulator(hidden)
    splits = triton.cdiv(V, SPLIT)
    out = torch.empty(3, splits, T, device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    chosen = torch.full((T,), torch.nan, device=hidden.device, dtype=out.dtype)
    hidden, weight = _aligned(hidden), _aligned(weight)
    _fold_kernel[(triton.cdiv(T, tiles.ROWS) * splits,)](
        TensorDescriptor.from_tensor(hidden, [tiles.ROWS, tiles.DEPTH]),
        TensorDescriptor.from_tensor(weight, [tiles.COLUMNS, tiles.DEPTH]), targets, *out, chosen, T, V, D,
        SCALE=math.log2(math.e) / temperature, SPLIT=SPLIT, ENTROPY=entropy, ACC=acc, WIDEN=INTERPRETED,
        **tiles._asdict())
    return Partial(*out), chosen


def _dlogits_triton(row: Rows, weight: Tensor, first: int, temperature: float, out: Tensor) -> None:
    """As `_dlogits_reference`, into `out` (T, slice)."""
    tiles, hidden, head = _tiles(weight.dtype), _aligned(row.hidden), _aligned(weight)
    _dlogits_kernel[(triton.cdiv(len(hidden), tiles.ROWS) * triton.cdiv(len(weight), tiles.COLUMNS),)](
        TensorDescriptor.from_tensor(hidden, [tiles.ROWS, tiles.DEPTH]),
        TensorDescriptor.from_tensor(head, [tiles.COLUMNS, tiles.DEPTH]), row.targets, row.lse, row.entropy,
        row.grad_logp, row.grad_entropy, TensorDescriptor.from_tensor(out, [tiles.ROWS, tiles.COLUMNS]),
        len(hidden), len(weight), weight.shape[1], first, SCALE=math.log2(math.e) / temperature,
        TEMPERATURE=temperature, ENTROPY=row.grad_entropy is not None, ACC=accumulator(hidden), WIDEN=INTERPRETED,
        **tiles._asdict())


# ------------------------------------------------------------------------------------------------ both directions


@torch.library.custom_op("group_dro::linear_logprob", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool,
             on_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse, entropy: (T,) each, in float32 or wider. Without `entropy` the last is not meant to be used."""
    check_targets(targets, len(weight))
    if not len(hidden):
        empty = hidden.new_empty(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
        return empty, empty.clone(), empty.clone()
    fold_all = _fold_triton if on_triton else _fold_reference
    slices, chosen = fold_all(hidden, weight, targets, temperature, entropy)
    lse, entropy_T = slices.lse_and_entropy()
    ignored = targets == IGNORE_INDEX
    return (chosen - lse).masked_fill(ignored, 0.0), lse, entropy_T.masked_fill(ignored, 0.0)


@_forward.register_fake
def _(hidden, weight, targets, temperature, entropy, on_triton):
    like = targets.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return like, torch.empty_like(like), torch.empty_like(like)


def _live_rows(grad_logp: Tensor, grad_entropy: Tensor | None) -> Tensor:
    """Indices of the rows of all blocks of ROW_BLOCK in which any gradient is not zero. Waits for the device."""
    live = grad_logp != 0
    if grad_entropy is not None:
        live |= grad_entropy != 0
    blocks = F.pad(live, (0, -len(live) % ROW_BLOCK)).view(-1, ROW_BLOCK).any(dim=1)
    return blocks.repeat_interleave(ROW_BLOCK)[: len(live)].nonzero().squeeze(1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in total's dtype whatever the operands'."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


@torch.library.custom_op("group_dro::linear_logprob_backward", mutates_args=("main_grad",))
def _backward(grad_logp: Tensor, grad_entropy: Tensor | None, hidden: Tensor, weight: Tensor, targets: Tensor,
              lse: Tensor, entropy: Tensor, main_grad: Tensor | None, temperature: float, needs_weight: bool,
              on_triton: bool) -> tuple[Tensor, Tensor]:
    """Gradients in hidden and weight; the second is empty where it is not needed or was added to main_grad."""
    counts = targets != IGNORE_INDEX
    grad_logp = torch.where(counts, grad_logp, 0.0)
    grad_entropy = None if grad_entropy is None else torch.where(counts, grad_entropy, 0.0)
    live = _live_rows(grad_logp, grad_entropy)
    row = Rows(hidden, targets, lse, entropy, grad_logp, grad_entropy)
    if len(live) < len(hidden):
        row = Rows(*(None if x is None else x[live] for x in row))
    (n, D), V = row.hidden.shape, len(weight)
    dweight = torch.zeros_like(weight) if needs_weight and main_grad is None else weight.new_empty(0)
    dhidden = torch.zeros(n, D, device=hidden.device, dtype=lse.dtype)
    work = None
    if on_triton:
        dtype = lse.dtype if INTERPRETED else hidden.dtype  # the interpreter truncates to bf16 instead of rounding
        taken = dhidden.nbytes + (row.hidden.nbytes if n < len(hidden) else 0)
        free = (MAX_EXTRA_BYTES - taken) // (max(1, n) * dtype.itemsize)
        work = torch.empty(n, min(triton.cdiv(V, 256) * 256, max(1024, free // 256 * 256)), device=hidden.device,
                           dtype=dtype)
    columns = max(1, MAX_LOGITS // max(1, n)) if work is None else work.shape[1]
    for first in range(0, V if n else 0, columns):
        head = weight[first : first + columns]  # (slice, D)
        if work is None:
            dlogits = _dlogits_reference(row, head, first, temperature)
        else:
            dlogits = work[:, : len(head)]
            _dlogits_triton(row, head, first, temperature, dlogits)
        _add_product(dhidden, dlogits, head)
        if main_grad is not None:
            _add_product(main_grad[first : first + columns], dlogits.T, row.hidden)
        elif needs_weight:
            dweight[first : first + columns] = dlogits.T @ row.hidden.to(dlogits.dtype)
    if n == len(hidden):
        return dhidden.to(hidden.dtype), dweight
    return torch.zeros_like(hidden).index_copy_(0, live, dhidden.to(hidden.dtype)), dweight


@_backward.register_fake
def _(grad_logp, grad_entropy, hidden, weight, targets, lse, entropy, main_grad, temperature, needs_weight, on_triton):
    whole = needs_weight and main_grad is None
    return torch.empty_like(hidden), torch.empty_like(weight) if whole else weight.new_empty(0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, main_grad, on_triton):
        logp, lse, entropy_T = _forward(hidden, weight, targets, temperature, entropy, on_triton)
        ctx.save_for_backward(hidden, weight, targets, lse, entropy_T)
        ctx.settings = temperature, main_grad, on_triton
        ctx.set_materialize_grads(False)
        return (logp, entropy_T.clone()) if entropy else (logp, None)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, targets, lse, entropy_T = ctx.saved_tensors
        temperature, main_grad, on_triton = ctx.settings
        if grad_logp is None:
            grad_logp = torch.zeros_like(lse)
        needs_weight = ctx.needs_input_grad[1]
        dhidden, dweight = _backward(grad_logp, grad_entropy, hidden, weight, targets, lse, entropy_T,
                                     main_grad if needs_weight else None, temperature, needs_weight, on_triton)
        return dhidden, dweight if needs_weight and main_grad is None else None, None, None, None, None, None


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False,
                   main_grad: Tensor | None = None, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets`, and the entropy of the distributions they were drawn from, in nats.

    hidden (T, D) and weight (V, D) of one floating dtype, targets (T,) int64 -> logp (T,) float32 (float64 for
    float64), and with `entropy` also the entropy (T,). Both are differentiable once in hidden and weight. A target of
    -100 gives 0 and no gradient; any other that is no row of weight raises IndexError on CPU and gives NaN on CUDA.
    `main_grad` (V, D), float32 as a rule: the gradient in weight is added to it, and autograd gets none.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f"shapes do not fit: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
                         f"targets {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise TypeError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if main_grad is not None and main_grad.shape != weight.shape:
        raise ValueError(f"main_grad {tuple(main_grad.shape)} must have the shape of weight {tuple(weight.shape)}")
    logp, entropy_T = _LinearLogprob.apply(hidden, weight, targets.long(), float(temperature), entropy, main_grad,
                                           use_triton(backend, hidden))
    return (logp, entropy_T) if entropy else logp
