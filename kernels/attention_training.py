"""The logical operator ``attention_training``: attention whose gradient comes with it, for vendors that have it as one.

:func:`attend` takes what ``vblackwell::attention`` takes and means the same. The default is that operator, whose two
directions are chosen apart; a vendor's own ``autograd.Function`` may take its place where it can express the case.
The function is called while autograd records, or while AOTAutograd traces, and what it calls is recorded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vbcompile.compat_symbols import size_hint
from vbcompile.device import get_target
from vbcompile.kernels import attention as logical
from vbcompile.kernels.attention_case import AttentionCase
from vbcompile.kernels.registry import (
    Implementation,
    always,
    as_text,
    following,
    forced_implementation,
    never_refuses,
    operator,
)

NAME = "operators"


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    score_function: str,
    *,
    implementations: str = "",
) -> tuple[Tensor, ...]:
    """``(out, ...)`` of attention; only the first result is the same for every implementation.

    Args:
        q, k, v, captured, scale, dropout_p, seed, score_function: see :mod:`vbcompile.kernels.attention`.
        implementations: the option of that name.
    """
    arguments = q, k, v, captured, scale, dropout_p, seed, score_function
    with following(implementations):
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))):
            return by_operators(*arguments)
        case = training_case(q, k, v, captured, dropout_p > 0, score_function)
        return operator("attention_training").choose(get_target(q.device), case).implementation.run(*arguments)


def by_operators(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    captured: Sequence[Tensor],
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    score_function: str,
) -> tuple[Tensor, ...]:
    """The operators ``attention`` and ``attention_backward``."""
    named = {n: wanted for n in ("attention", "attention_backward") if (wanted := forced_implementation(n))}
    arguments = q, k, v, captured, scale, dropout_p, seed, score_function
    return logical.attention(*arguments, implementations=as_text(named))


def training_case(
    q: Tensor, k: Tensor, v: Tensor, captured: Sequence[Tensor], dropout: bool, score_function: str
) -> AttentionCase:
    """The case of tensors that may be fake, with hints for symbolic sizes."""

    def shape(t: Tensor) -> tuple[int, ...]:
        return tuple(map(size_hint, t.shape))

    return AttentionCase(
        q.dtype,
        shape(q),
        shape(k),
        shape(v),
        tuple((shape(t), t.dtype) for t in captured),
        dropout,
        score_function,
        needs=(True, True, True, *(t.requires_grad for t in captured)),
    )


operator("attention_training").register(Implementation(NAME, by_operators, never_refuses, always(1.0)))
