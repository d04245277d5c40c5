"""What ``vblackwell::fp4_linear`` does to its sums before it stores them: an activation, or the gate of a SwiGLU.

    ``silu``, ``gelu``, ``gelu_tanh``, ``relu``           out = f(y)                        [..., N]
    ``gated_silu``, ``gated_gelu``, ...                   out = f(y of gate) * y of up      [..., N / 2]

where ``y`` is the linear layer with its bias. The rows of a gated weight come in turns of eight, the first eight of the
gate, the first eight of up, and so on: a thread of a tensor-core kernel then holds both sums of a column of the result.
"""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

TURN: Final = 8
_GATED: Final = "gated_"
FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
EPILOGUES: Final = ("none", *FUNCTIONS, *(_GATED + name for name in FUNCTIONS))


def gated(function: str) -> str:
    """The epilogue that multiplies ``function`` of the gate with up."""
    return _GATED + function


def is_gated(epilogue: str) -> bool:
    return epilogue.startswith(_GATED)


def function_of(epilogue: str) -> str:
    """The activation's name alone; ``none`` where there is none."""
    return epilogue.removeprefix(_GATED)


def out_features(n: int, epilogue: str) -> int:
    """Columns of the result of a weight of ``n`` rows."""
    return n // 2 if is_gated(epilogue) else n


def epilogue_options(epilogue: str) -> dict[str, object]:
    """The constants that the kernels take."""
    return {"FUNCTION": function_of(epilogue), "GATED": is_gated(epilogue)}


def check_epilogue(n: int, epilogue: str) -> None:
    """Raise ValueError where there is no such epilogue, or the weight's rows do not make turns."""
    if epilogue not in EPILOGUES:
        raise ValueError(f"unknown epilogue {epilogue!r}; valid: {', '.join(EPILOGUES)}")
    if is_gated(epilogue) and n % (2 * TURN):
        raise ValueError(f"fp4_linear: {n} rows cannot hold gate and up in turns of {TURN}")


def turns(n: int, gate_first: bool, device: torch.device) -> Tensor:
    """Where each row of a gated weight ``[n, K]`` comes from, of gate and up below one another (or up and gate)."""
    halves = torch.arange(n, device=device).view(2, -1, TURN)
    return (halves if gate_first else halves.flip(0)).transpose(0, 1).flatten()


def apply_epilogue(y: Tensor, epilogue: str) -> Tensor:
    """The meaning, in plain PyTorch: computed in float32 (float64 for float64), rounded once to the dtype of ``y``."""
    if epilogue == "none":
        return y
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    function = FUNCTIONS[function_of(epilogue)]
    if not is_gated(epilogue):
        return function(wide).to(y.dtype)
    gate, up = wide.unflatten(-1, (-1, 2, TURN)).unbind(-2)
    return (function(gate) * up).flatten(-2).to(y.dtype)
