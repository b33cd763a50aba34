"""Log-probabilities of given tokens straight from hidden states and head, without logits of the whole batch.

    logit[t, v] = hidden[t] . weight[v] / temperature
    logp[t]     = logit[t, target_t] - lse[t],   lse[t] = log sum_v exp logit[t, v]
    entropy[t]  = lse[t] - sum_v p[t, v] logit[t, v]

With 16,384 tokens and 151,936 words the logits alone are 10 GB in float32, and as much again in backward. Here they
exist only a piece at a time. On CUDA:

    forward    a program walks through 4,096 columns for 128 rows, logits staying in registers, and leaves three numbers
               a row, which combine exactly into lse and entropy: the maximum, and two sums relative to it,
                   peak = max_v l_v,   total = sum_v exp(l_v - peak),   moment = sum_v exp(l_v - peak) (l_v - peak).
               A moment relative to the maximum keeps a constant added to all logits out of the entropy's rounding.
    backward   goes through the vocabulary in slices. A slice's logits are computed again, become their own gradient,
               dlogits_v = g (1[v = target] - p_v) for an incoming gradient g of logp, are written once, in the
               operands' dtype, and taken up by two matrix products:
               dweight[slice] = dlogits^T hidden, finished, and dhidden += dlogits weight[slice].

Why slices of the vocabulary and not of the tokens: only dhidden, the smaller by far, is then accumulated, in float32.
Why float32 from the accumulator to the softmax, whatever the operands: rounded to bf16, log-probs at this vocabulary
are off by up to 3e-2, and the p - 1 of a confident token changes its sign.

The entropy is for the log, not for the loss: it carries no gradient.

Tokens whose incoming gradient is exactly zero (rollouts of prompts that all succeeded or all failed, tokens that the
clip holds) are left out of backward, a tile of rows at a time: whole responses are long runs of such rows. Leaving a
tile out changes no bit of what remains, as every sum goes through its terms in a fixed order and would add zeros. No
atomics, no locks, no library product that chooses its order by the shape: the same bits twice, and with more zeros.

The torch reference takes rows in chunks, the whole vocabulary at once.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import INTERPRETED, TensorDescriptor, jit, tl, triton, use_triton

IGNORE_INDEX = -100  # the ecosystem's target of a row that counts for nothing
MAX_LOGITS = 1 << 24  # elements of one chunk of the reference's float32 logits: 64 MiB, or what 128 rows need
MAX_EXTRA_BYTES = 448 << 20  # of Triton's backward: a slice of dlogits beside the float32 gradient of the hidden states
SPLIT = 4096  # vocabulary columns that one program of Triton's forward folds; fixed, so that results are
LOWEST = tl.constexpr(-1e30)  # stands for -inf at columns past the end: -inf breeds NaN where it meets a weight of 0
LN2 = tl.constexpr(math.log(2))


# ------------------------------------------------------------------------------------------------ torch reference


def _live(grad_logp: Tensor) -> Tensor:
    """Which rows have a gradient, (T,) bool; NaN is one."""
    return grad_logp != 0


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the rows, each of at most MAX_LOGITS logits or, if that is too few, of 128 rows."""
    size = max(1, MAX_LOGITS // (128 * len(weight))) * 128
    return [slice(first, first + size) for first in range(0, len(hidden), size)]


def _words(targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) each: the targets, 0 for those that are no word, and which are one."""
    known = (targets >= 0) & (targets < len(weight))
    return torch.where(known, targets, 0), known


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    return (hidden.to(weight.dtype) / temperature) @ weight.T


def _forward_reference(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool,
                       out: Tensor) -> None:
    """The target's logit, NaN where the target is no word, lse and entropy of every row into `out` (3, T)."""
    weight, (word, known) = weight.to(out.dtype), _words(targets, weight)
    for rows in _chunks(hidden, weight):
        logits = _logits(hidden[rows], weight, temperature)
        out[0, rows] = torch.where(known[rows], logits.gather(1, word[rows, None]).squeeze(1), torch.nan)
        peak = logits.amax(dim=1)
        logits.sub_(peak[:, None])
        if entropy:
            p = logits.exp()
            total = p.sum(dim=1)
            out[2, rows] = total.log() - p.mul_(logits).sum(dim=1) / total
        else:
            total = logits.exp_().sum(dim=1)
        out[1, rows] = peak + total.log()


def _backward_reference(grad_logp, hidden, weight, targets, lse, temperature: float, dhidden: Tensor,
                        dweight: Tensor | None) -> None:
    """Adds the gradients to dhidden (T, D) and dweight (V, D)."""
    weight, live, (word, known) = weight.to(lse.dtype), _live(grad_logp), _words(targets, weight)
    for rows in _chunks(hidden, weight):
        if not live[rows].any():
            continue
        g = grad_logp[rows] / temperature
        p = _logits(hidden[rows], weight, temperature).sub_(lse[rows, None]).exp_()
        dlogits = p.mul_(-g[:, None])  # (n, V)
        dlogits.scatter_add_(1, word[rows, None], torch.where(known[rows], g, 0.0)[:, None])
        dhidden[rows] += dlogits @ weight
        if dweight is not None:
            dweight += dlogits.T @ hidden[rows].to(dlogits.dtype)


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
def _fold(logits, peak, total, moment, ENTROPY: tl.constexpr):
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
        peak, total, moment = _fold(left, peak, total, moment, ENTROPY)
        peak, total, moment = _fold(right, peak, total, moment, ENTROPY)
    out = split.to(tl.int64) * T + row
    tl.store(peak_ST + out, peak * LN2, mask=row < T)
    tl.store(total_ST + out, total, mask=row < T)
    tl.store(moment_ST + out, moment * LN2, mask=row < T)
    tl.store(chosen_T + row, chosen * LN2, mask=(row < T) & (target >= first) & (target < last))


@jit
def _dlogits_kernel(hidden, head, targets, lse_T, grad_logp_T, live, count, dlogits, T, N, D, first,
                    SCALE: tl.constexpr, TEMPERATURE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    DEPTH: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr):
    """A tile of the logits of the slice `head`, N columns from `first` on, becomes its gradient."""
    place, slab = _place(T, tl.cdiv(N, COLUMNS), ROWS, GROUP)
    if place >= tl.load(count):
        return
    start = tl.load(live + place) * ROWS
    logits = _logits_tile(hidden, head, start, slab * COLUMNS, D, SCALE, ROWS, COLUMNS, DEPTH, ACC, WIDEN)
    row = start + tl.arange(0, ROWS)
    column = first + slab * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    lse = tl.load(lse_T + row, mask=row < T, other=0.0)[:, None]  # past the end logits are 0, too: finite, times 0
    target = tl.load(targets + row, mask=row < T, other=-1)[:, None]
    grad = tl.load(grad_logp_T + row, mask=row < T, other=0.0)[:, None]
    gradient = tl.where(column == target, grad, 0.0) - tl.exp(logits * LN2 - lse) * grad
    dlogits.store([place * ROWS, slab * COLUMNS], (gradient / TEMPERATURE).to(dlogits.dtype))


@jit
def _dhidden_kernel(dlogits, head, live, count, dhidden, T, N, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    DEPTH: tl.constexpr, GROUP: tl.constexpr, ACC: tl.constexpr, WIDEN: tl.constexpr):
    """A tile of dhidden += dlogits @ head; the sum goes on where the slice before left it."""
    place, slab = _place(T, tl.cdiv(D, COLUMNS), ROWS, GROUP)
    if place >= tl.load(count):
        return
    row = tl.load(live + place) * ROWS + tl.arange(0, ROWS)[:, None]
    column = slab * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at, mask = dhidden + row.to(tl.int64) * D + column, (row < T) & (column < D)
    tile = tl.load(at, mask=mask, other=0.0)
    for n in range(0, N, DEPTH):
        d, w = dlogits.load([place * ROWS, n]), head.load([n, slab * COLUMNS])
        if WIDEN:
            d, w = d.to(ACC), w.to(ACC)
        tile = tl.dot(d, w, tile, input_precision="ieee", out_dtype=ACC)
    tl.store(at, tile, mask=mask)


@jit
def _dweight_kernel(dlogits, hidden, live, count, dweight, N, D, stride, ADD: tl.constexpr, TILE: tl.constexpr,
                    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
                    ACC: tl.constexpr, WIDEN: tl.constexpr):
    """A tile of dweight[slice] (+)= dlogits^T hidden over the live tiles of TILE rows, DEPTH of them at a time."""
    place, slab = _place(N, tl.cdiv(D, COLUMNS), ROWS, GROUP)
    row = place * ROWS + tl.arange(0, ROWS)[:, None]
    column = slab * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    at, mask = dweight + row.to(tl.int64) * stride + column, (row < N) & (column < D)
    tile = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    if ADD:
        tile = tl.load(at, mask=mask, other=0.0)
    STEPS: tl.constexpr = TILE // DEPTH
    for step in range(0, tl.load(count) * STEPS):
        t = tl.load(live + step // STEPS) * TILE + step % STEPS * DEPTH
        d, h = dlogits.load([step * DEPTH, place * ROWS]), hidden.load([t, slab * COLUMNS])
        if WIDEN:
            d, h = d.to(ACC), h.to(ACC)
        tile = tl.dot(d.T, h, tile, input_precision="ieee", out_dtype=ACC)
    tl.store(at, tile.to(dweight.dtype.element_ty), mask=mask)


def _accumulator(x: Tensor):
    """The dtype that sums over x's entries are kept in, as Triton names it: float32, or float64 for float64."""
    return tl.float64 if x.element_size() == 8 else tl.float32


def _aligned(x: Tensor) -> Tensor:
    """x (n, D) as tensor descriptors want it, rows contiguous and at multiples of 16 bytes: itself or a padded copy."""
    unit = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % unit == 0 and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, -x.shape[1] % unit)).contiguous()


def _forward_triton(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool,
                    out: Tensor) -> None:
    """As `_forward_reference`."""
    (T, D), V = hidden.shape, len(weight)
    tiles, splits = _tiles(hidden.dtype), triton.cdiv(V, SPLIT)
    peak_ST, total_ST, moment_ST = out.new_empty(3, splits, T)
    out[0] = torch.nan
    hidden, weight = _aligned(hidden), _aligned(weight)
    _fold_kernel[(triton.cdiv(T, tiles.ROWS) * splits,)](
        TensorDescriptor.from_tensor(hidden, [tiles.ROWS, tiles.DEPTH]),
        TensorDescriptor.from_tensor(weight, [tiles.COLUMNS, tiles.DEPTH]), targets, peak_ST, total_ST, moment_ST,
        out[0], T, V, D, SCALE=math.log2(math.e) / temperature, SPLIT=SPLIT, ENTROPY=entropy,
        ACC=_accumulator(hidden), WIDEN=INTERPRETED, **tiles._asdict())
    peak = peak_ST.amax(dim=0)
    drop = peak_ST - peak
    total = (drop.exp() * total_ST).sum(dim=0)
    out[1] = peak + total.log()
    if entropy:
        out[2] = total.log() - (drop.exp() * (moment_ST + total_ST * drop)).sum(dim=0) / total


def _live_tiles(grad_logp: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Tiles of `rows` rows, those with a gradient first, in order, and how many these are, (1,); both int32.

    Both stay on the device: nothing waits for it.
    """
    live = _live(grad_logp)
    tiles = F.pad(live, (0, -len(live) % rows)).view(-1, rows).any(dim=1)
    return tiles.logical_not().byte().argsort(stable=True).int(), tiles.sum(dtype=torch.int32)[None]


def _backward_triton(grad_logp, hidden, weight, targets, lse, temperature: float, dhidden: Tensor,
                     dweight: Tensor | None, add: bool) -> None:
    """Adds to dhidden (T, D), and to dweight (V, D) too or, without `add`, writes it."""
    tiles, (T, D), V = _tiles(hidden.dtype), hidden.shape, len(weight)
    live, count = _live_tiles(grad_logp, tiles.ROWS)
    hidden, weight = _aligned(hidden), _aligned(weight)
    rows = triton.cdiv(T, tiles.ROWS) * tiles.ROWS
    dtype = lse.dtype if INTERPRETED else hidden.dtype  # the interpreter truncates to bf16 instead of rounding
    most = (MAX_EXTRA_BYTES - dhidden.nbytes) // (rows * dtype.itemsize)
    columns = min(triton.cdiv(V, 256) * 256, max(1024, most // 256 * 256))
    work = torch.empty(rows, columns, device=hidden.device, dtype=dtype)  # dlogits of a slice, live tiles first
    options = dict(ACC=_accumulator(hidden), WIDEN=INTERPRETED, **tiles._asdict())
    # to keep as many tiles in flight although the next one's place is itself loaded
    indirect = dict(options, TILE=tiles.ROWS, num_stages=2 * tiles.num_stages - 1)

    def described(x: Tensor, *block: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, list(block))

    def grid(rows: int, columns: int) -> tuple[int]:
        return (triton.cdiv(rows, tiles.ROWS) * triton.cdiv(columns, tiles.COLUMNS),)

    for first in range(0, V, columns):
        head = weight[first : first + columns]  # (N, D)
        N, dlogits = len(head), work[:, : len(head)]
        _dlogits_kernel[grid(T, N)](
            described(hidden, tiles.ROWS, tiles.DEPTH), described(head, tiles.COLUMNS, tiles.DEPTH), targets, lse,
            grad_logp, live, count, described(dlogits, tiles.ROWS, tiles.COLUMNS), T, N, D, first,
            SCALE=math.log2(math.e) / temperature, TEMPERATURE=temperature, **options)
        _dhidden_kernel[grid(T, D)](
            described(dlogits, tiles.ROWS, tiles.DEPTH), described(head, tiles.DEPTH, tiles.COLUMNS), live, count,
            dhidden, T, N, D, **options)
        if dweight is not None:
            _dweight_kernel[grid(N, D)](
                described(dlogits, tiles.DEPTH, tiles.ROWS), described(hidden, tiles.DEPTH, tiles.COLUMNS), live, count,
                dweight[first : first + columns], N, D, dweight.stride(0), ADD=add, **indirect)


# ------------------------------------------------------------------------------------------------ both directions


def _check_targets(targets: Tensor, words: int) -> None:
    """IndexError for a target that is no word. Not on CUDA, where it would wait for the device: there logp is NaN."""
    if targets.device.type == "cpu":
        wrong = ((targets < 0) | (targets >= words)) & (targets != IGNORE_INDEX)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise IndexError(f"targets[{row}] is {int(targets[row])}, and there are {words} words")


@torch.library.custom_op("group_dro::linear_logprob", mutates_args=())
def _forward(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy: bool,
             on_triton: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse, entropy: (T,) each, in float32 or wider; the last is 0 unless `entropy` asks for it."""
    _check_targets(targets, len(weight))
    out = torch.zeros(3, len(hidden), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))
    if len(hidden):
        (_forward_triton if on_triton else _forward_reference)(hidden, weight, targets, temperature, entropy, out)
    ignored = targets == IGNORE_INDEX
    return (out[0] - out[1]).masked_fill(ignored, 0.0), out[1].clone(), out[2].masked_fill(ignored, 0.0)


@_forward.register_fake
def _(hidden, weight, targets, temperature, entropy, on_triton):
    like = targets.new_empty(targets.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return like, torch.empty_like(like), torch.empty_like(like)


@torch.library.custom_op("group_dro::linear_logprob_backward", mutates_args=())
def _backward(grad_logp: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, temperature: float,
              needs_weight: bool, on_triton: bool) -> tuple[Tensor, Tensor]:
    """Gradients in hidden and weight; the second is empty where it is not needed."""
    grad_logp = grad_logp.masked_fill(targets == IGNORE_INDEX, 0.0).contiguous()
    dhidden = torch.zeros(hidden.shape, device=hidden.device, dtype=lse.dtype)
    dweight, add = None, True
    if needs_weight:  # Triton rounds its float32 sums once, where it writes them
        add = not on_triton or not len(hidden) or INTERPRETED and weight.dtype != lse.dtype
        dweight = torch.zeros(weight.shape, device=weight.device, dtype=lse.dtype) if add else torch.empty_like(
            weight, memory_format=torch.contiguous_format)
    given = grad_logp, hidden, weight, targets, lse, temperature, dhidden, dweight
    if len(hidden):
        _backward_triton(*given, add) if on_triton else _backward_reference(*given)
    return dhidden.to(hidden.dtype), weight.new_empty(0) if dweight is None else dweight.to(weight.dtype)


@_backward.register_fake
def _(grad_logp, hidden, weight, targets, lse, temperature, needs_weight, on_triton):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape if needs_weight else 0)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, on_triton):
        logp, lse, entropy_T = _forward(hidden, weight, targets, temperature, entropy, on_triton)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.settings = temperature, on_triton
        ctx.mark_non_differentiable(entropy_T)
        return logp, entropy_T

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, _):
        temperature, on_triton = ctx.settings
        needs_weight = ctx.needs_input_grad[1]
        dhidden, dweight = _backward(grad_logp, *ctx.saved_tensors, temperature, needs_weight, on_triton)
        return dhidden, dweight if needs_weight else None, None, None, None, None


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0, entropy: bool = False,
                   backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `targets`, and the entropy of the distributions they were drawn from, in nats.

    hidden (T, D) and weight (V, D) of one floating dtype, targets (T,) int64 -> logp (T,) float32 (float64 for
    float64), differentiable once in hidden and weight, and with `entropy` also the entropy (T,), which is not. A target
    of -100 gives 0 and no gradient; any other that is no row of weight raises IndexError on CPU and gives NaN on CUDA.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        raise ValueError(f"shapes do not fit: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, "
                         f"targets {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise TypeError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logp, entropy_T = _LinearLogprob.apply(hidden, weight, targets.long().contiguous(), float(temperature), entropy,
                                           use_triton(backend, hidden))
    return (logp, entropy_T) if entropy else logp
