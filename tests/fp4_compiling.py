"""What the tests of the FP4 pass share: compiling, models whose weights hold their FP4 values, reasons."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from vbcompile.kernels.fp4 import dequantize
from vbcompile.kernels.fp4_quantize import quantize


def compiled(model, **options):
    options = {"mode": "speed", "strict": True, "downstream": "aot_eager", **options}
    return torch.compile(model, backend="vblackwell", options=options)


def interpreted(model, **options):
    """Compiled as far as the passes go: the rewritten graph runs as it is, which is quicker to make."""
    return compiled(model, downstream="eager", **options)


def rounded(weight, format_name="nvfp4"):
    return dequantize(quantize(weight.detach(), format_name), torch.float64).to(weight.dtype)


def decoded_twin(model, *names, format_name="nvfp4"):
    """A copy whose named weights hold their FP4 values."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            parameter = twin.get_parameter(name)
            parameter.copy_(rounded(parameter, format_name))
    return twin


class Feed(nn.Module):
    """Gated feed-forward block with a residual connection."""

    def __init__(self, width=128, hidden=256):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


FEED = ("gate.weight", "up.weight", "down.weight")


def reasons(report, action="left"):
    return [d.reason for d in report.decisions if d.pass_name == "fp4" and d.action == action]
