"""Assembly that decodes FP4 weights of the layout ``fragments2t`` to E4M3, without a multiplication.

The bytes of ``code * scale`` for the codes 0 to 7 are a table of two words, from which ``prmt`` takes four at a time.
With the byte ``b`` of the scale itself (exponent and mantissa) they are 0, ``b - 8``, ``b``, ``q``, ``b + 8``,
``q + 8``, ``b + 16``, ``q + 16``, where ``q``, one and a half times the scale rounded to nearest even, is ``b + 4``, or
``b + 5`` for mantissas of 1 to 5 eighths. A scale less than ``2**-11`` of the largest of its row counts as that.
"""

_OFFSET = 40  # scale bytes count exponents from 2**-9; E4M3 from 2**-7, of which three are left out
_SMALLEST = _OFFSET + 8  # of which half is zero, and one and a half no subnormal
_TIMES_4 = 0x01010101


def _add(target: str, value: str, constant: int) -> str:
    """PTX of a sum on the units that multiply, which have nothing else to do here; ``one`` is not known to be 1."""
    return f"mad.lo.u32 {target}, {value}, one, {constant % 2**32:#x};"


def _table(row: int, byte: int) -> str:
    """PTX of a row's table ``l{row}``, ``h{row}``; its scale is byte ``byte`` of the words that ``_scales`` makes."""
    pick = f"0x{4 + byte}{byte}{4 + byte}{byte}"
    return f"prmt.b32 t, b, q, {pick}; {_add(f'h{row}', 't', 0x10100808)} prmt.b32 l{row}, t, d, 0x10{4 + byte}8;"


def _scales(word: str) -> str:
    """PTX that makes bytes of scales, of half of them and of one and a half (``b``, ``d``, ``q``)."""
    return "\n".join(
        (
            # smaller scales have no byte of their own; no byte is above 151, so that none carries into the next
            f"{_add('t', word, (128 - _SMALLEST) * _TIMES_4)} prmt.b32 t, t, 0, 0xBA98;",
            f"and.b32 b, {word}, t; not.b32 t, t; and.b32 t, t, {_SMALLEST * _TIMES_4:#x}; or.b32 v, b, t;",
            f"{_add('b', 'v', -_OFFSET * _TIMES_4)} {_add('d', 'v', -(_OFFSET + 8) * _TIMES_4)}",
            f"{_add('t', 'v', (2 - _OFFSET) * _TIMES_4)} {_add('u', 'v', (3 - _OFFSET) * _TIMES_4)}",
            f"or.b32 t, t, u; and.b32 t, t, 0x04040404; {_add('q', 'v', (4 - _OFFSET) * _TIMES_4)}",
            "shr.u32 t, t, 2; add.u32 q, q, t;",
        )
    )


def _word(codes: str, results: tuple[str, str]) -> str:
    """PTX that looks up the eight codes of a word: four bytes for each of two rows."""
    first, second = results
    return "\n".join(
        (
            f"shl.b32 u, {codes}, 2; shr.u32 w, {codes}, 8; and.b32 s, {codes}, 0x00170017;",
            "and.b32 t, u, 0x77007700; or.b32 s, s, t; and.b32 t, w, 0x00600060; or.b32 s, s, t;",
            f"prmt.b32 t, s, s, 0x3120; prmt.b32 {first}, l0, h0, t;",
            f"prmt.b32 t, s, s, 0x2031; prmt.b32 {second}, l1, h1, t;",
            # signs
            f"shr.u32 t, {codes}, 2; and.b32 t, t, 0x00800080; or.b32 {first}, {first}, t;",
            f"shf.l.wrap.b32 t, {codes}, {codes}, 26; and.b32 t, t, 0x80008000; or.b32 {first}, {first}, t;",
            f"and.b32 t, w, 0x00800080; or.b32 {second}, {second}, t;",
            f"shf.l.wrap.b32 t, {codes}, {codes}, 28; and.b32 t, t, 0x80008000; or.b32 {second}, {second}, t;",
        )
    )


def pair_assembly(scale_words: int) -> tuple[str, str, int, int]:
    """PTX that decodes two words of codes, its constraints, how many results a word has, and how many words it takes.

    Operands: a word of four E4M3 for the first of a thread's rows and each word of codes, the same for the second row,
    the two words of codes, and (twice) a word of scale bytes: ``[group, row]`` of both words of codes if
    ``scale_words`` is 2; of 1, they share the first group.
    """
    text = ["{ .reg .b32 t, u, v, w, s, b, d, q, one, r<4>, l<2>, h<2>; mov.u32 one, %nctaid.y;", _scales("$6")]
    for word in range(2):
        if word == 0 or scale_words == 2:
            text += [_table(row, 2 * word + row) for row in range(2)]
        text.append(_word(f"${4 + word}", (f"r{word}", f"r{2 + word}")))
    text += [f"mov.b32 ${i}, r{i};" for i in range(4)]
    return "\n".join(text) + "\n}", "=r,=r,=r,=r,r,r,r,r", 2, 2
