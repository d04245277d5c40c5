"""Hopper's FP4 product for many rows on a card: the ways it is cut up, and launches that begin while others end."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_fp4_linear import check_error

from vbcompile.device import get_target
from vbcompile.kernels import fp4_linear_hopper, fp4_linear_triton
from vbcompile.kernels.fp4_layout import to_layout
from vbcompile.kernels.fp4_linear import fp4_linear
from vbcompile.kernels.fp4_quantize import quantize
from vbcompile.kernels.registry import force

pytestmark = pytest.mark.gpu
CONFIGS = [
    replace(fp4_linear_hopper.wide_shape(*shape, splits, False, lag=lag), in_turns=in_turns)
    for shape, splits, (lag, in_turns) in itertools.product(
        ((16, 1), (32, 1), (64, 1), (128, 1), (256, 1), (64, 2)), (0, 1, 3), ((0, True), (2, False))
    )
]
CONFIGS += [
    fp4_linear_hopper.wide_shape(*shape, False, 3, 2) for shape in itertools.product((64, 128), (1,), (0, 1, 3))
]


@pytest.fixture(autouse=True)
def hopper():
    torch.manual_seed(0)
    if get_target("cuda").arch != "sm_90":
        pytest.skip("written for sm_90")


def weights(n, k, count, format_name="nvfp4"):
    return [
        to_layout(quantize(torch.randn(n, k, device="cuda") * 0.02, format_name), "fragments2t") for _ in range(count)
    ]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_way_to_cut_up_a_product(config):
    for (n, k), m, format_name in itertools.product(
        ((1000, 2904), (208, 7168)), (config.block_m + 3,), ("nvfp4", "mxfp4")
    ):
        (w,) = weights(n, k, 1, format_name)
        x, bias = torch.randn(m, k, device="cuda", dtype=torch.bfloat16), torch.randn(n, device="cuda")
        got = [
            fp4_linear_hopper.product_wide(x, *w.tensors, bias, k, format_name, w.layout, config=config)
            for _ in range(3)
        ]
        check_error(got[0], x, w, bias)
        assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


@pytest.mark.parametrize(("name", "m"), [("hopper", 64), ("hopper", 256), ("triton", 16), ("triton_stream", 16)])
def test_products_read_what_the_kernel_ahead_wrote(name, m):
    fp4_linear_triton.prepare(torch.device("cuda", torch.cuda.current_device()))
    layers = weights(4096, 4096, 3)

    def chain(x, wait):
        for i in range(24):
            w = layers[i % 3]
            x = fp4_linear(x, *w.tensors, None, 4096, "nvfp4", w.layout)
            if wait:
                torch.cuda.synchronize()
            x = x.clamp(-1, 1) if i % 2 else x
        return x

    with force(fp4_linear=name):
        x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
        want = chain(x, True)
        assert torch.equal(chain(x, False), want)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = chain(x, False)
        for _ in range(20):
            graph.replay()
            assert torch.equal(got, want)
