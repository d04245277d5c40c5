"""Tables that many layers read are computed once; other values stay as they are."""

import pytest
import torch
from torch import nn

from vbcompile.config import Config
from vbcompile.device_catalog import catalog_target
from vbcompile.kernels.computed_once import computed_once
from vbcompile.passes.pass_context import PassContext
from vbcompile.passes.shared_values import compute_once


class Rotary(nn.Module):
    """Layers that turn their input by one table of angles."""

    def __init__(self, layers=6, writes=False):
        super().__init__()
        self.layers, self.writes = layers, writes

    def forward(self, x, positions, frequencies):
        angles = positions[:, None] * frequencies
        table = torch.cat((angles, angles), -1)
        cos, sin = (table.cos() * 0.5).to(x.dtype), table.sin().to(x.dtype)
        if self.writes:
            cos.mul_(2)
        for _ in range(self.layers):
            half = x.shape[-1] // 2
            x = x * cos.unsqueeze(0) + torch.cat((-x[..., half:], x[..., :half]), -1) * sin.unsqueeze(0)
        return x


def rewritten(model, inputs, training=False, arch="sm_90", dynamic=False):
    found = []

    def backend(gm, example_inputs):
        context = PassContext(Config(fp4=True), catalog_target(arch), training, example_inputs=list(example_inputs))
        found.extend(compute_once(gm, context))
        found.extend(n for n in gm.graph.nodes if n.target is torch.ops.vblackwell.computed_once.default)
        return gm.forward

    torch._dynamo.reset()
    got = torch.compile(model, backend=backend, dynamic=dynamic)(*inputs)
    torch.testing.assert_close(got, model(*inputs))
    return found


def inputs(rows, features=64, dtype=torch.float32):
    x = torch.randn(2, rows, features, dtype=dtype)
    return x, torch.arange(rows, dtype=torch.float32), torch.rand(features // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_rotary_tables_are_computed_once(dtype, dynamic):
    found = rewritten(Rotary(), inputs(512, dtype=dtype), dynamic=dynamic)
    decisions, nodes = found[:2], found[2:]
    assert [d.action for d in decisions] == ["rewritten"] * 2 and "read by 6 nodes" in decisions[0].reason
    assert len(nodes) == 2 and all(len(node.users) == 6 for node in nodes)


def test_what_gains_nothing_stays():
    assert not rewritten(Rotary(), inputs(16))  # a decode step
    assert not rewritten(Rotary(layers=3), inputs(512))
    assert not rewritten(Rotary(), inputs(512), training=True)
    assert len(rewritten(Rotary(writes=True), inputs(512))) == 2  # sines alone: the cosines are written to


def test_the_operator():
    x = torch.randn(3, 4).t()
    got = computed_once(x)
    assert torch.equal(got, x) and got.is_contiguous() and got.data_ptr() != x.data_ptr()
    torch.library.opcheck(computed_once, (x.requires_grad_(),))
    (grad,) = torch.autograd.grad(computed_once(x).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
