"""Weights of capped scores, ``2 ** (factor * tanh(inner * score) - reference)``, in the registers of Hopper warpgroups.

Device functions in Triton's Gluon dialect, used by ``attention_hopper_step``. Capped weights lie within fixed bounds:
the same reference serves all rows and tiles, without maximum or rescaling.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_PART = 32  # elements of a thread that are computed, and if need be computed anew, together
_NAMES = ("OUT", "X", "BASE", "INNER", "FACTOR", "SHIFT", "END", "A", "B", "C")  # _PART operands each
_POLYNOMIAL = {
    2: "fma.rn.ftz.f32 w, t, {B}, {A};",
    3: "fma.rn.ftz.f32 w, t, {C}, {B}; fma.rn.ftz.f32 w, w, t, {A};",
}


def _capped(terms: int) -> gl.constexpr:
    """Weights by the polynomial of ``attention_hopper_tanh`` and, if any of the warp's scores turns out to be beyond
    its limit, all once more by the special function units. The exponentials leave time for that test."""
    fast = (
        f"fma.rn.ftz.f32 t, {{X}}, {{X}}, {{SHIFT}}; {_POLYNOMIAL[terms]} fma.rn.ftz.f32 w, w, {{X}}, {{BASE}};"
        "ex2.approx.ftz.f32 {OUT}, w; mov.b32 i, t; or.b32 all, all, i;"
    )
    slow = (
        "mul.rn.ftz.f32 t, {X}, {INNER}; tanh.approx.f32 t, t; fma.rn.ftz.f32 w, t, {FACTOR}, {BASE};"
        "ex2.approx.ftz.f32 {OUT}, w;"
    )
    operand = lambda name, place: f"${_NAMES.index(name) * _PART + place}"

    def each(text: str) -> str:
        operands = [{name: operand(name, place) for name in _NAMES} for place in range(_PART)]
        return "".join("{.reg .f32 t, w; .reg .b32 i;" + text.format(**own) + "}" for own in operands)

    return gl.constexpr(
        f"{{.reg .pred q; .reg .b32 all, end; mov.b32 all, 0; {each(fast)}"
        f"mov.b32 end, {operand('END', 0)}; setp.ge.u32 q, all, end; vote.sync.any.pred q, q, 0xFFFFFFFF;"
        f"@!q bra.uni DONE; {each(slow)} DONE: }}"
    )


_SHORT, _LONG = _capped(2), _capped(3)
_REGISTERS = gl.constexpr(",".join(["=&f"] * _PART + ["f"] * (len(_NAMES) - 1) * _PART))


@gluon.jit
def capped_exponentials(s, capped, TERMS: gl.constexpr):
    """Weights of part of a tile of products ``s``; ``capped`` as ``capped_numbers`` gives it."""
    reference, inner, factor, _, shift, end, a, b, long_shift, long_end, long_a, long_b, long_c = capped
    form: gl.constexpr = _SHORT if TERMS == 2 else _LONG
    arguments = [s, -reference, inner, factor, shift, end, a, b, b]
    if TERMS == 3:
        arguments = [s, -reference, inner, factor, long_shift, long_end, long_a, long_b, long_c]
    return gl.inline_asm_elementwise(form, _REGISTERS, arguments, dtype=gl.float32, is_pure=True, pack=32)
