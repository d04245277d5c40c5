"""FP4 scales and codes in plain PyTorch: the meaning of ``vblackwell::fp4_quantize``, on every device.

Rows are taken a few MiB at a time, so that scratch does not grow with the weight.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vbcompile.kernels.fp4 import row_ranges
from vbcompile.kernels.fp4_formats import (
    E2M1_MAX,
    E4M3_MAX,
    MXFP4,
    NVFP4,
    Fp4Format,
    decode_scales,
    encode_e2m1,
    encode_e4m3,
    floor_log2,
    fp4_format,
    pack_nibbles,
    round_e2m1,
)

_SMALLEST_SCALE = 2.0**-126  # smaller ones are subnormal: imprecise, and flushed to zero by some devices
_REPEATED = 0.01  # relative error below which a weight has been in FP4 before; bfloat16 rounding makes 0.002
EXACT_WEIGHT = 0.2  # of the error without FP8 rounding, when scales are chosen for products in FP8
_PHASES = 4  # tensor scales that MXFP4 tries within an octave
_SAMPLE = 2**16  # elements that they are tried on
SEARCHED = {"nvfp4": (2, 6), "mxfp4": (1, 1)}  # how many scale bytes below and above the nearest rule's are tried
_HEADROOM_MAX = 256.0  # largest nearest-rule scale when a block may take one up to 1.75 times larger, which is 448


def quantize_reference(weight: Tensor, format_name: str, method: str, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and tensor scale; does not wait for the device."""
    fmt = fp4_format(format_name)
    scale = choose_tensor_scale(weight, fmt, method, per_row)
    for_fp8 = method == "fp8" and fmt.has_tensor_scale
    codes, block_scales = _pack_rows(weight, scale, fmt, scale_rule(fmt, method), for_fp8)
    lead = weight.shape[:-1]
    return codes.view(*lead, -1), block_scales.view(*lead, -1), scale


def _row_maxima(weight: Tensor) -> Tensor:
    """Largest magnitude of each row as float32 ``[N]`` or ``[E, N]``; 0 where the row holds NaN or infinity."""
    amax = torch.empty(weight.shape[:-1].numel(), device=weight.device)
    for start, stop, rows in row_chunks(weight):
        amax[start:stop] = rows.abs().amax(dim=1)  # amax propagates NaN
    return torch.where(amax.isfinite(), amax, 0).view(weight.shape[:-1])


def norms(error: Tensor, x: Tensor, per: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Largest magnitude of ``x``; in units of it, the Euclidean norms of ``error`` and ``x``, of ``per`` parts each."""
    peak = x.abs().amax()
    unit = torch.where(peak == 0, 1.0, peak)
    error_norm, norm = ((t / unit).reshape(per, -1).norm(dim=1) for t in (error, x))
    return peak, error_norm, norm


ScaleRule = Callable[[Tensor], Sequence[Tensor]]
"""Maps each block's largest magnitude, in units of the tensor scale (float32 ``[B]``), to candidate scale bytes."""


def scale_rule(fmt: Fp4Format, method: str) -> ScaleRule:
    """The candidates of a method; raises ValueError with the valid methods."""
    rules = _RULES[fmt.name]
    if method not in rules:
        raise ValueError(f"unknown method {method!r} for {fmt.name}; valid methods: {', '.join(rules)}")
    return rules[method]


def _divide(x: Tensor, by: float) -> Tensor:
    """Rounded correctly everywhere, so that ties fall alike: CUDA multiplies by the reciprocal of a Python number."""
    return x / torch.full((), by, device=x.device)


def _nvfp4_nearest(amax: Tensor) -> Sequence[Tensor]:
    return [encode_e4m3(_divide(amax, E2M1_MAX))]


def _nvfp4_mse(amax: Tensor) -> Sequence[Tensor]:
    base = encode_e4m3(_divide(amax, E2M1_MAX))
    return [(base + step).clamp(1, NVFP4.largest_scale) for step in _steps(NVFP4)]


def _nvfp4_four_over_six(amax: Tensor) -> Sequence[Tensor]:
    wanted = _divide(amax, E2M1_MAX)
    return [encode_e4m3(wanted), encode_e4m3(wanted * 1.5)]


def _mxfp4_nearest(amax: Tensor) -> Sequence[Tensor]:
    return [(floor_log2(amax) - 2 + 127).clamp(0, MXFP4.largest_scale)]  # 2**2 is the largest power of two in E2M1


def _mxfp4_mse(amax: Tensor) -> Sequence[Tensor]:
    (base,) = _mxfp4_nearest(amax)
    return [(base + step).clamp(0, MXFP4.largest_scale) for step in _steps(MXFP4)]


def _steps(fmt: Fp4Format) -> tuple[int, ...]:
    below, above = SEARCHED[fmt.name]
    return (0, *range(-below, 0), *range(1, above + 1))


_RULES: dict[str, dict[str, ScaleRule]] = {
    "nvfp4": {"mse": _nvfp4_mse, "nearest": _nvfp4_nearest, "four_over_six": _nvfp4_four_over_six, "fp8": _nvfp4_mse},
    "mxfp4": {"mse": _mxfp4_mse, "nearest": _mxfp4_nearest, "fp8": _mxfp4_mse},
}


def choose_tensor_scale(weight: Tensor, fmt: Fp4Format, method: str, per_row: bool) -> Tensor:
    """Float32 ``[..., 1]``, or ``[..., N]`` with ``per_row``."""
    if not fmt.has_tensor_scale:
        scale = torch.ones((), device=weight.device) if method == "nearest" else _phase(weight, fmt, method)
        return scale.repeat(*weight.shape[:-2], 1)
    largest = _row_maxima(weight)
    if not per_row:
        largest = largest.amax(dim=-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, _divide(largest, E4M3_MAX * E2M1_MAX).clamp_min(_SMALLEST_SCALE))
    if method == "nearest":
        return scale
    return torch.where(_was_nvfp4(weight, scale), scale, scale * (E4M3_MAX / _HEADROOM_MAX))


def _was_nvfp4(weight: Tensor, tensor_scale: Tensor) -> Tensor:
    """Whether the first rows are, up to bfloat16 rounding, values decoded from NVFP4 with this tensor scale.

    They then keep the scales that they were made with; any other tensor scale would round them a second time.
    """
    _, stop, rows = next(row_chunks(weight))
    unit = tensor_scale.expand(weight.shape[:-1]).flatten()[:stop].unsqueeze(1)
    x = _in_blocks(rows, NVFP4)
    _, error, norm = norms(_rounded(x, unit, NVFP4, _nvfp4_nearest) - x, x)
    return error < _REPEATED * norm


def _phase(weight: Tensor, fmt: Fp4Format, method: str) -> Tensor:
    """The tensor scale from 1 to 2 with the least error on a sample of the rows; 1 where others are no better."""
    x = _in_blocks(_sample_rows(weight), fmt)
    units = torch.tensor([2.0 ** (step / _PHASES) for step in range(_PHASES)], device=weight.device)
    unit = units.repeat_interleave(x.shape[0]).unsqueeze(1)
    x = x.repeat(_PHASES, 1, 1)  # one search for all
    _, error, _ = norms(_rounded(x, unit, fmt, scale_rule(fmt, method)) - x, x, per=_PHASES)
    return units[error.argmin()]


def _sample_rows(weight: Tensor) -> Tensor:
    """Rows spread over all of ``weight``, about ``_SAMPLE`` elements, as contiguous float32 ``[rows, K]``."""
    experts = weight.detach() if weight.ndim == 3 else weight.detach()[None]
    some = experts[:: -(-experts.shape[0] // 8)]
    rows = max(1, _SAMPLE // (some.shape[0] * some.shape[2]))
    return some[:, :: max(1, some.shape[1] // rows)].float().reshape(-1, some.shape[2]).contiguous()


def _rounded(x: Tensor, unit: Tensor, fmt: Fp4Format, rule: ScaleRule) -> Tensor:
    """Values of ``x [R, B, block]`` rounded to FP4 with tensor scales ``unit [R, 1]``."""
    scale = (decode_scales(choose_scales(x, unit, fmt, rule), fmt) * unit).unsqueeze(-1)
    return round_e2m1(x / torch.where(scale == 0, math.inf, scale)) * scale


# --- codes ------------------------------------------------------------------------------------------------------------


def row_chunks(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, rows)`` over all matrices, rows counted throughout, as contiguous float32 ``[rows, K]``."""
    n, k = weight.shape[-2:]
    for expert, matrix in enumerate(weight.detach() if weight.ndim == 3 else weight.detach()[None]):
        for start, stop in row_ranges(n, k, weight.device):
            yield expert * n + start, expert * n + stop, matrix[start:stop].float().contiguous()


def _pack_rows(
    weight: Tensor, tensor_scale: Tensor, fmt: Fp4Format, rule: ScaleRule, for_fp8: bool
) -> tuple[Tensor, Tensor]:
    """Codes ``[rows, Kp / 2]`` and block scales ``[rows, Kp / block]`` of all rows."""
    rows, blocks = weight.shape[:-1].numel(), -(-weight.shape[-1] // fmt.block_size)
    unit = tensor_scale.expand(weight.shape[:-1]).reshape(rows, 1)
    codes = torch.empty(rows, blocks * fmt.block_size // 2, dtype=torch.uint8, device=weight.device)
    block_scales = torch.empty(rows, blocks, dtype=torch.uint8, device=weight.device)
    for start, stop, chunk in row_chunks(weight):
        x = _in_blocks(chunk, fmt)
        scales = choose_scales(x, unit[start:stop], fmt, rule, for_fp8)
        block_scales[start:stop] = scales
        codes[start:stop] = pack_nibbles(encode_blocks(x, scales, unit[start:stop], fmt, for_fp8).flatten(1))
    return codes, block_scales


def _in_blocks(rows: Tensor, fmt: Fp4Format) -> Tensor:
    """``rows [R, K]`` as ``[R, B, block]``, padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % fmt.block_size))
    return padded.view(rows.shape[0], -1, fmt.block_size)


def encode_blocks(x: Tensor, block_scales: Tensor, unit: Tensor, fmt: Fp4Format, for_fp8: bool = False) -> Tensor:
    """Nearest codes for given scales, or the best ones ``for_fp8``.

    Args:
        x: float32 ``[R, B, block]``.
        block_scales: bytes ``[R, B]``; where the scale is 0 every code is a zero, where it is NaN any.
        unit: tensor scale of each row, float32 ``[R, 1]``.

    Returns:
        uint8 ``[R, B, block]``, 0 to 15.
    """
    scale = decode_scales(block_scales, fmt) * unit
    scaled = x / torch.where(scale == 0, math.inf, scale).unsqueeze(-1)
    if for_fp8:
        shift = _threshold_shift(_odd_ratio(block_scales)).unsqueeze(-1)
        octave = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(1, E2M1_MAX))))
        scaled = torch.where(scaled.abs() < 1, scaled, scaled - torch.sign(scaled) * shift * octave)
    return encode_e2m1(scaled)


def choose_scales(x: Tensor, unit: Tensor, fmt: Fp4Format, rule: ScaleRule, for_fp8: bool = False) -> Tensor:
    """Scale bytes (int32 ``[R, B]``): of those that ``rule`` proposes, the one with the least squared error.

    0 for blocks of zeros, that of NaN for blocks that hold NaN or infinity. ``x`` and ``unit`` are those of
    :func:`encode_blocks`.
    """
    flat = x.abs().div_(unit.unsqueeze(-1)).view(-1, fmt.block_size).t().contiguous()  # [block, R * B]
    amax = flat.amax(dim=0)
    broken = ~amax.isfinite()
    amax.masked_fill_(broken, 0)
    candidates = rule(amax)
    chosen = candidates[0] if len(candidates) == 1 else _least_error(flat, candidates, fmt, for_fp8)
    return torch.where(amax == 0, 0, chosen).masked_fill_(broken, fmt.nan_scale).view(x.shape[:2])


def _least_error(x: Tensor, candidates: Sequence[Tensor], fmt: Fp4Format, for_fp8: bool) -> Tensor:
    """The candidate with the least squared error for each column of ``x [block, B]``, the first of equals.

    ``x`` is overwritten. Errors are measured in units of the first candidate's scale, so that none overflows.
    """
    base = decode_scales(candidates[0].clamp_min(1), fmt)
    x.div_(base)
    scaled, rounded, spacing = (torch.empty_like(x) for _ in range(3))
    best, least = candidates[0], torch.full_like(base, math.inf)
    for candidate in candidates:
        ratio = decode_scales(candidate, fmt) / base
        torch.mul(x, torch.where(ratio == 0, 0, 1 / ratio), out=scaled)
        if for_fp8:
            error = _fp8_error(scaled, _odd_ratio(candidate), rounded, spacing)
        else:
            _round_e2m1(scaled, rounded, spacing)
            error = rounded.sub_(scaled).square_().sum(dim=0)
        error.mul_(ratio.square_())
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _odd_ratio(scales: Tensor) -> Tensor:
    """What the codes 1.5, 3 and 6 times an E4M3 scale (its byte) are multiplied by when rounded to E4M3: of 1.5 times
    the mantissa, rounded to eighths below 2 and to quarters above."""
    exact = [1.5 * (1 + mantissa / 8) for mantissa in range(8)]
    steps = [8 if value < 2 else 4 for value in exact]
    ratios = [round(value * step) / step / value for value, step in zip(exact, steps, strict=True)]
    return torch.tensor(ratios, device=scales.device)[(scales & 7).long()]


def _threshold_shift(odd_ratio: Tensor) -> Tensor:
    """How far the thresholds beside 1.5 move, in units of the octave's first value, when 1.5 is this many times it."""
    return 0.75 * (odd_ratio - 1) / (1 + EXACT_WEIGHT)


def _fp8_error(x: Tensor, odd_ratio: Tensor, rounded: Tensor, scratch: Tensor) -> Tensor:
    """Squared error of each column of ``x [block, B] >= 0``, in units of its scale, for products in FP8.

    The best codes; ``odd_ratio`` of each column's scale. ``rounded`` and ``scratch`` are overwritten.
    """
    torch.bitwise_and(x.view(torch.int32), 0x7F800000, out=scratch.view(torch.int32))  # 2**floor(log2(x))
    scratch.clamp_max_(4.0).mul_(scratch >= 1)
    moved = torch.addcmul(x, scratch, _threshold_shift(odd_ratio), value=-1)
    _round_e2m1(moved, rounded, scratch)
    odd = (rounded.view(torch.int32) & 0x400000) != 0
    exact = rounded.sub(x).square_().sum(dim=0)
    rounded.mul_(torch.where(odd, odd_ratio, 1.0)).sub_(x)
    return rounded.square_().sum(dim=0).add_(exact, alpha=EXACT_WEIGHT)


def _round_e2m1(x: Tensor, out: Tensor, scratch: Tensor) -> None:
    """``out`` = ``x >= 0`` rounded to E2M1 magnitudes, saturating; contiguous float32 buffers of one shape.

    Adding and taking away ``1.5 * 2**23`` spacings leaves a multiple of the spacing, rounded half to even: five passes
    over memory where comparisons take many more.
    """
    torch.clamp_max(x, E2M1_MAX, out=out)
    torch.bitwise_and(out.view(torch.int32), 0x7F800000, out=scratch.view(torch.int32))  # 2**floor(log2(x))
    scratch.clamp_min_(1.0)
    out.add_(scratch, alpha=1.5 * 2.0**22).sub_(scratch, alpha=1.5 * 2.0**22)
