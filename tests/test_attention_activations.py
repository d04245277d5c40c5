"""Activation functions between the two matrix products: values and gradients, also where they have a kink."""

import torch
import torch.nn.functional as F
from attention_pass_run import check
from torch import nn

SLOPES = torch.linspace(0.1, 0.6, 3)
ACTIVATIONS = {
    "relu6": F.relu6, "elu": F.elu, "celu": lambda s: F.celu(s, 0.7), "selu": F.selu, "mish": F.mish,
    "gelu": lambda s: F.gelu(s, approximate="tanh"), "silu": F.silu, "softplus": lambda s: F.softplus(s, 2.0, 3.0),
    "logsigmoid": F.logsigmoid, "leaky_relu": nn.LeakyReLU(0.2), "hardtanh": nn.Hardtanh(-2, 1),
    "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish, "hardshrink": lambda s: F.hardshrink(s, 1.0),
    "softshrink": lambda s: F.softshrink(s, 1.0), "tanhshrink": F.tanhshrink, "softsign": F.softsign,
    "threshold": lambda s: F.threshold(s, 1.0, -5.0), "prelu": lambda s: F.prelu(s, SLOPES),
    "sign": lambda s: s.sign() * torch.log1p(s.abs()), "expm1": lambda s: torch.expm1(s * 0.2),
    "sinh": lambda s: torch.sinh(s * 0.2), "cosh": lambda s: (s * 0.2).cosh(), "clamp": lambda s: s.clamp(-2, 1),
    "exact_gelu": F.gelu, "erf": torch.erf, "erfc": torch.special.erfc, "arctan": lambda s: s.arctan() * 2,
    "logaddexp": lambda s: torch.logaddexp(s, s.new_zeros(())),
    "tan": lambda s: torch.tan(s * 0.1), "log10": lambda s: (s.abs() + 1).log10(),
    "nan_to_num": lambda s: (s / s).nan_to_num(0.5), "isnan": lambda s: s.masked_fill((s / s).isnan(), -3.0),
    "isinf": lambda s: s.masked_fill((1 / s).isinf(), 2.0),
}  # fmt: skip


def test_activations_of_scores():
    """All of them on scores that are whole numbers, so that kinks are met."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-2, 3, (2, 3, 7, 4), generator=generator).float().requires_grad_() for _ in range(2))
    v = torch.randn(2, 3, 7, 5, generator=generator).requires_grad_()

    def function(q, k, v):
        results = [F.softmax(f(q @ k.mT), -1) @ v for f in ACTIVATIONS.values()]
        return torch.stack([(n + 1) * result for n, result in enumerate(results)])

    check(function, q, k, v, sites=len(ACTIVATIONS))


def test_numbers_of_modules_that_are_symbolic():
    """With dynamic shapes Dynamo makes a module's floats inputs of the graph."""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ELU(0.7), nn.LeakyReLU(0.3), nn.Hardtanh(-2.0, 2.5), nn.Softshrink(0.3)])

        def forward(self, q, k, v):
            return torch.stack([F.softmax(f(q @ k.mT), -1) @ v for f in self.layers])

    inputs = [torch.randn(2, 3, n, 4).requires_grad_() for n in (6, 7, 7)]
    check(Layers(), *inputs, sites=4, dynamic=True)
