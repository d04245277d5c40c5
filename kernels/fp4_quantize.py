"""Round a weight to FP4: choose the scales, then the nearest codes. No calibration data is needed.

Methods:
    ``mse``: each block takes the scale that minimises its squared error. NVFP4 tries the nine E4M3 scales from two
        below to six above the one that maps the block's largest magnitude to 6 (after "ScaleSweep", arXiv 2606.07618);
        MXFP4 tries the power of two of the OCP specification and its two neighbours, and the whole weight takes the
        tensor scale from 1 to 2 that suits it best: how far its magnitudes are from a power of two then costs nothing.
    ``nearest``: that scale alone, as NVIDIA's tools and the OCP specification compute it.
    ``four_over_six``: NVFP4 only; the better of mapping the largest magnitude to 6 or to 4 (arXiv 2512.02010).
    ``fp8``: as ``mse``, for products in FP8, where code times scale is rounded to E4M3: scales and codes have the least
        squared error after that rounding, to which the error without it is added with a weight of 0.2. MXFP4's
        products are exact there, so it means ``mse``.

A weight that was decoded from NVFP4 as NVIDIA's tools make it, or from MXFP4, comes back with the same value.

Relative error ``|W - Q| / |W|`` of Gaussian weights: NVFP4 0.081 / 0.095 / 0.087 / 0.0825, MXFP4 0.1115 / 0.115; after
rounding to E4M3 ``mse`` has 0.0835 and ``fp8`` 0.0818. With tensor
scale 1 MXFP4 has 0.1112 to 0.1126, by the place of the standard deviation in its octave.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from vbcompile.kernels.fp4 import PackedWeight, decode_rows, row_ranges
from vbcompile.kernels.fp4_formats import (
    E2M1_MAX,
    E4M3_MAX,
    MXFP4,
    NVFP4,
    Fp4Format,
    decode_e2m1,
    decode_scales,
    encode_e2m1,
    encode_e4m3,
    floor_log2,
    fp4_format,
    pack_nibbles,
)

_SOURCE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SMALLEST_SCALE = 2.0**-126  # smaller ones are subnormal: imprecise, and flushed to zero by some devices
_REPEATED = 0.01  # relative error below which a weight has been in FP4 before; bfloat16 rounding makes 0.002
_EXACT_WEIGHT = 0.2  # of the error without FP8 rounding, when scales are chosen for products in FP8
_PHASES = 4  # tensor scales that MXFP4 tries within an octave
_SAMPLE = 2**16  # elements that they are tried on
_HEADROOM_MAX = 256.0  # largest nearest-rule scale when a block may take one up to 1.75 times larger, which is 448


def quantize(
    weight: Tensor,
    format_name: str = "nvfp4",
    *,
    method: str = "mse",
    per_row: bool = False,
    block_size: int | None = None,
    name: str = "weight",
) -> PackedWeight:
    """Pack ``weight`` on its own device; scratch is a few MiB on a CPU, up to 200 MiB on an accelerator, at any size.

    Args:
        weight: ``[N, K]`` or a stack of experts ``[E, N, K]``, any strides; float64, float32, bfloat16 or float16.
        format_name: ``nvfp4`` or ``mxfp4``.
        method: how block scales are chosen, see the module.
        per_row: NVFP4 gets one tensor scale a row instead of one a matrix; for rows of very different magnitude.
        block_size: checked against the format's when given.
        name: what errors call the weight.

    Returns:
        The packed weight; K is padded with zeros to whole blocks.

    Raises:
        ValueError: unknown format, method or block size; a weight that is not of these shapes and dtypes, has a row
            shorter than a block, holds NaN or infinity, or has no data (``meta``).
    """
    fmt = fp4_format(format_name, block_size)
    scale_rule(fmt, method)
    refusal = refuse_weight(weight, fmt)
    if refusal:
        raise ValueError(f"{name}: {refusal}")
    with torch.no_grad():
        largest = row_maxima(weight)
        if not bool(torch.isfinite(largest).all()):
            raise ValueError(f"{name}: holds NaN or infinity (as float32), which FP4 cannot represent")
        return pack_finite(weight, largest, fmt, method, per_row)


def pack_finite(weight: Tensor, largest: Tensor, fmt: Fp4Format, method: str, per_row: bool = False) -> PackedWeight:
    """Pack a weight that :func:`refuse_weight` accepts, without waiting for the device.

    ``largest`` is its :func:`row_maxima`; where one is NaN or infinite, what comes out means nothing.
    """
    tensor_scale = _tensor_scale(weight, largest, fmt, method, per_row)
    for_fp8 = method == "fp8" and fmt.has_tensor_scale
    codes, block_scales = _pack_rows(weight, tensor_scale, fmt, scale_rule(fmt, method), for_fp8)
    lead = weight.shape[:-1]
    return PackedWeight(
        codes.view(*lead, -1), block_scales.view(*lead, -1), tensor_scale, fmt.name, tuple(weight.shape)
    )


def row_maxima(weight: Tensor) -> Tensor:
    """Largest magnitude of each row as float32 ``[N]`` or ``[E, N]``; NaN where the row holds one."""
    amax = torch.empty(weight.shape[:-1].numel(), device=weight.device)
    for start, stop, rows in _row_chunks(weight):
        amax[start:stop] = rows.abs().amax(dim=1)  # amax propagates NaN
    return amax.view(weight.shape[:-1])


def refuse_weight(weight: Tensor, fmt: Fp4Format) -> str | None:
    """Why ``weight`` cannot be packed, judged without reading its data; None where it can."""
    if weight.is_meta:
        return "the weight is on the meta device and has no data; load or initialise it first"
    if weight.dtype not in _SOURCE_DTYPES:
        return f"{weight.dtype} weights cannot be quantized; valid: {', '.join(map(str, _SOURCE_DTYPES))}"
    if weight.layout != torch.strided:
        return f"the weight is {weight.layout}, not dense"
    if weight.ndim not in (2, 3) or weight.numel() == 0:
        return f"shape {list(weight.shape)} is not a matrix [N, K] or a stack [E, N, K] with elements"
    if weight.shape[-1] < fmt.block_size:
        return f"K = {weight.shape[-1]} is too small: {fmt.name} has blocks of {fmt.block_size} elements"
    return None


def relative_error(weight: Tensor, packed: PackedWeight) -> float:
    """``|weight - dequantize(packed)| / |weight|`` (Frobenius norms), 0 for zeros; waits for the device once."""
    parts = [
        torch.hstack(_norms(rows - decode_rows(packed, start, stop), rows)) for start, stop, rows in _row_chunks(weight)
    ]
    error = total = 0.0
    for peak, error_norm, norm in torch.stack(parts).tolist():  # products of these may not fit float32
        error, total = math.hypot(error, peak * error_norm), math.hypot(total, peak * norm)
    return error / total if total else 0.0


def _norms(error: Tensor, x: Tensor, per: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Largest magnitude of ``x``; in units of it, the Euclidean norms of ``error`` and ``x``, of ``per`` parts each."""
    peak = x.abs().amax()
    unit = torch.where(peak == 0, 1.0, peak)
    error_norm, norm = ((t / unit).reshape(per, -1).norm(dim=1) for t in (error, x))
    return peak, error_norm, norm


# --- scales -----------------------------------------------------------------------------------------------------------

ScaleRule = Callable[[Tensor], Sequence[Tensor]]
"""Maps each block's largest magnitude, in units of the tensor scale (float32 ``[B]``), to candidate scale bytes."""


def scale_rule(fmt: Fp4Format, method: str) -> ScaleRule:
    """The candidates of a method; raises ValueError with the valid methods."""
    rules = _RULES[fmt.name]
    if method not in rules:
        raise ValueError(f"unknown method {method!r} for {fmt.name}; valid methods: {', '.join(rules)}")
    return rules[method]


def _nvfp4_nearest(amax: Tensor) -> Sequence[Tensor]:
    return [encode_e4m3(amax / E2M1_MAX)]


def _nvfp4_mse(amax: Tensor) -> Sequence[Tensor]:
    base = encode_e4m3(amax / E2M1_MAX)
    return [(base + step).clamp(1, NVFP4.largest_scale) for step in (0, *range(-2, 0), *range(1, 7))]


def _nvfp4_four_over_six(amax: Tensor) -> Sequence[Tensor]:
    return [encode_e4m3(amax / E2M1_MAX), encode_e4m3(amax / E2M1_MAX * 1.5)]


def _mxfp4_nearest(amax: Tensor) -> Sequence[Tensor]:
    return [(floor_log2(amax) - 2 + 127).clamp(0, MXFP4.largest_scale)]  # 2**2 is the largest power of two in E2M1


def _mxfp4_mse(amax: Tensor) -> Sequence[Tensor]:
    (base,) = _mxfp4_nearest(amax)
    return [(base + step).clamp(0, MXFP4.largest_scale) for step in (0, -1, 1)]


_RULES: dict[str, dict[str, ScaleRule]] = {
    "nvfp4": {"mse": _nvfp4_mse, "nearest": _nvfp4_nearest, "four_over_six": _nvfp4_four_over_six, "fp8": _nvfp4_mse},
    "mxfp4": {"mse": _mxfp4_mse, "nearest": _mxfp4_nearest, "fp8": _mxfp4_mse},
}


def _tensor_scale(weight: Tensor, largest: Tensor, fmt: Fp4Format, method: str, per_row: bool) -> Tensor:
    """Float32 ``[..., 1]``, or ``[..., N]`` with ``per_row``; ``largest`` are the :func:`row_maxima`."""
    if not fmt.has_tensor_scale:
        scale = torch.ones((), device=weight.device) if method == "nearest" else _phase(weight, fmt, method)
        return scale.repeat(*weight.shape[:-2], 1)
    if not per_row:
        largest = largest.amax(dim=-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, (largest / (E4M3_MAX * E2M1_MAX)).clamp_min(_SMALLEST_SCALE))
    if method == "nearest":
        return scale
    return torch.where(_was_nvfp4(weight, scale), scale, scale * (E4M3_MAX / _HEADROOM_MAX))


def _was_nvfp4(weight: Tensor, tensor_scale: Tensor) -> Tensor:
    """Whether the first rows are, up to bfloat16 rounding, values decoded from NVFP4 with this tensor scale.

    They then keep the scales that they were made with; any other tensor scale would round them a second time.
    """
    _, stop, rows = next(_row_chunks(weight))
    unit = tensor_scale.expand(weight.shape[:-1]).flatten()[:stop].unsqueeze(1)
    x = _in_blocks(rows, NVFP4)
    _, error, norm = _norms(_rounded(x, unit, NVFP4, _nvfp4_nearest) - x, x)
    return error < _REPEATED * norm


def _phase(weight: Tensor, fmt: Fp4Format, method: str) -> Tensor:
    """The tensor scale from 1 to 2 with the least error on a sample of the rows; 1 where others are no better."""
    x = _in_blocks(_sample_rows(weight), fmt)
    units = torch.tensor([2.0 ** (step / _PHASES) for step in range(_PHASES)], device=weight.device)
    unit = units.repeat_interleave(x.shape[0]).unsqueeze(1)
    x = x.repeat(_PHASES, 1, 1)  # one search for all
    _, error, _ = _norms(_rounded(x, unit, fmt, scale_rule(fmt, method)) - x, x, per=_PHASES)
    return units[error.argmin()]


def _sample_rows(weight: Tensor) -> Tensor:
    """Rows spread over all of ``weight``, about ``_SAMPLE`` elements, as contiguous float32 ``[rows, K]``."""
    experts = weight.detach() if weight.ndim == 3 else weight.detach()[None]
    some = experts[:: -(-experts.shape[0] // 8)]
    rows = max(1, _SAMPLE // (some.shape[0] * some.shape[2]))
    return some[:, :: max(1, some.shape[1] // rows)].float().reshape(-1, some.shape[2]).contiguous()


def _rounded(x: Tensor, unit: Tensor, fmt: Fp4Format, rule: ScaleRule) -> Tensor:
    """Values of ``x [R, B, block]`` rounded to FP4 with tensor scales ``unit [R, 1]``."""
    scales = choose_scales(x, unit, fmt, rule)
    return decode_e2m1(encode_blocks(x, scales, unit, fmt)) * (decode_scales(scales, fmt) * unit).unsqueeze(-1)


# --- codes ------------------------------------------------------------------------------------------------------------


def _row_chunks(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
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
    for start, stop, chunk in _row_chunks(weight):
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
        block_scales: bytes ``[R, B]``; where the scale is 0 every code is a zero.
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

    ``x`` and ``unit`` are those of :func:`encode_blocks`.
    """
    flat = x.abs().div_(unit.unsqueeze(-1)).view(-1, fmt.block_size).t().contiguous()  # [block, R * B]
    amax = flat.amax(dim=0)
    candidates = rule(amax)
    chosen = candidates[0] if len(candidates) == 1 else _least_error(flat, candidates, fmt, for_fp8)
    return torch.where(amax == 0, 0, chosen).view(x.shape[:2])


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
    return 0.75 * (odd_ratio - 1) / (1 + _EXACT_WEIGHT)


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
    return rounded.square_().sum(dim=0).add_(exact, alpha=_EXACT_WEIGHT)


def _round_e2m1(x: Tensor, out: Tensor, scratch: Tensor) -> None:
    """``out`` = ``x >= 0`` rounded to E2M1 magnitudes, saturating; contiguous float32 buffers of one shape.

    Adding and taking away ``1.5 * 2**23`` spacings leaves a multiple of the spacing, rounded half to even: five passes
    over memory where comparisons take many more.
    """
    torch.clamp_max(x, E2M1_MAX, out=out)
    torch.bitwise_and(out.view(torch.int32), 0x7F800000, out=scratch.view(torch.int32))  # 2**floor(log2(x))
    scratch.clamp_min_(1.0)
    out.add_(scratch, alpha=1.5 * 2.0**22).sub_(scratch, alpha=1.5 * 2.0**22)
