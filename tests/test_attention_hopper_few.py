"""Hopper's attention of few queries: what it takes, its machine code, and on a card its results."""

from unittest.mock import patch

import pytest
import torch
from attention_forms import bottom_right, captured_mask, make_function, plus, same_document, shorter_than
from matrix import forms
from triton_aot import Launch, compile_launch

from vbcompile.device_catalog import catalog_target
from vbcompile.kernels import attention_hopper_few as few
from vbcompile.kernels import attention_problem, attention_triton
from vbcompile.kernels.attention_parts import split_count
from vbcompile.kernels.triton_target import interpreted

pytest.importorskip("triton")
PLAIN = make_function()
MASKED = make_function(mask=captured_mask, empty_rows="zero")


def tensors(batch=1, heads=2, group=4, queries=1, keys=512, dim=128, dtype=torch.bfloat16, device="cpu"):
    q = torch.randn(batch, heads, group, queries, dim, device=device).to(dtype)
    k, v = (torch.randn(batch, heads, 1, keys, dim, device=device).to(dtype) for _ in range(2))
    return q, k, v


def bools(*shape):
    return torch.ones(shape, dtype=torch.bool)


def refusal(inputs, function=PLAIN, captured=(), scale=0.1, arch="sm_90"):
    with patch.object(attention_problem, "arch_of", lambda t: arch):
        problem = attention_problem.describe(*inputs, list(captured), scale, 0.0, function)
    found = few.operands(problem, *inputs)
    return found if isinstance(found, str) else None


# -------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("change", "function", "captured", "reason"),
    [
        ({}, PLAIN, (), None),
        ({"queries": 8, "dim": 64, "dtype": torch.float16}, PLAIN, (), None),
        ({}, MASKED, (bools(1, 1, 1, 1, 512),), None),
        ({"queries": 3}, MASKED, (bools(1, 2, 1, 1, 512),), None),
        ({}, make_function(mask=bottom_right), (), None),
        ({"queries": 2}, make_function(mask=bottom_right), (), "the same for all rows"),
        ({"queries": 2}, MASKED, (bools(1, 1, 1, 2, 512),), "the same for all rows"),
        ({}, MASKED, (bools(1, 1, 4, 1, 512),), "the same for all rows"),
        ({}, make_function(plus(0)), (torch.zeros(1, 1, 1, 1, 512),), "score function"),
        ({"queries": 9}, PLAIN, (), "32 rows"),
        ({"dim": 80}, PLAIN, (), "head sizes"),
        ({"dtype": torch.float32}, PLAIN, (), "float16 and bfloat16"),
    ],
)
def test_calls_are_refused_with_a_reason(change, function, captured, reason):
    found = refusal(tensors(**change), function, captured)
    assert found is None if reason is None else reason in found


def test_layouts_and_devices_are_refused_with_a_reason():
    q, k, v = tensors(batch=2)
    assert "sm_90" in refusal((q, k, v), arch="sm_80")
    assert "score function" in refusal((q, k, v), scale=-0.1)
    assert refusal((q, *(t.transpose(1, 3).contiguous().transpose(1, 3) for t in (k, v)))) is None
    assert "leading axes" in refusal((q, *(t.expand(2, 2, 4, -1, -1)[:, :, :, ::2] for t in (k, v))))
    assert "last dimension" in refusal((q, k.mT.contiguous().mT, v))
    with patch.object(few, "refuses_triton", lambda: "another Triton"):
        assert refusal((q, k, v)) == "another Triton"


@pytest.mark.parametrize(
    ("slots", "programs", "tiles", "expected"),
    [(132, 8, 512, 16), (132, 6, 512, 22), (264, 300, 512, 1), (132, 8, 3, 3), (132, 1, 9999, 128)],
)
def test_number_of_parts(slots, programs, tiles, expected):
    assert split_count(slots, programs, tiles) == expected


@pytest.mark.parametrize(
    ("programs", "masked", "expected"),
    [(8, False, (4, 1)), (66, False, (4, 1)), (67, False, (3, 2)), (256, False, (3, 2)), (8, True, (3, 2))],
)
def test_programs_of_a_multiprocessor(programs, masked, expected):
    config = few.choose_config(128, programs, 132, masked)
    assert (config.stages, config.programs) == expected


# ---------------------------------------------------------------------------------------------- machine code
def record(inputs, function, captured=()):
    launches = []
    with (
        patch.object(few, "get_target", lambda device: catalog_target("sm_90")),
        patch.multiple(
            attention_problem,
            launch=lambda kernel, grid, *a, **options: launches.append(Launch(kernel, a, options)),
            arch_of=lambda t: "sm_90",
        ),
    ):
        attention_triton.forward(*inputs, list(captured), 0.1, 0.0, None, function)
    return launches


COMPILED = [  # heads, group, queries, keys, head size, mask
    (8, 4, 1, 32768, 128, "none"),
    (8, 4, 1, 32768, 128, "bool"),
    (2, 1, 3, 1000, 64, "lengths"),
    (2, 8, 4, 1000, 128, "none"),
    (300, 1, 1, 1000, 64, "bool"),
]


@pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
@pytest.mark.parametrize(("heads", "group", "queries", "keys", "dim", "mask"), forms(COMPILED, lambda *f: f[0] == 8))
def test_machine_code(heads, group, queries, keys, dim, mask):
    function, captured = {
        "none": (PLAIN, ()),
        "bool": (MASKED, (bools(1, 1, 1, 1, keys),)),
        "lengths": (make_function(mask=shorter_than), (torch.ones(1, 1, 1, 1, 1, dtype=torch.int64),)),
    }[mask]
    launch, *others = record(tensors(1, heads, group, queries, keys, dim), function, captured)
    assert launch.kernel.__name__ == "attention_hopper_decode_kernel"
    assert [o.kernel.__name__ for o in others] == ["attention_merge_kernel"] * (heads < 300)
    report = compile_launch(launch, "sm_90")
    assert report.spills == 0 and report.registers <= 128 and report.shared * (2 if heads == 300 else 1) <= 228 * 1024
    assert all(mark in report.assembly["ptx"] for mark in ("wgmma", "cp.async.bulk.tensor"))


# ---------------------------------------------------------------------------------------------------- on a card
def attend(q, k, v, keep, scale):
    scores = q @ k.mT * scale
    scores = scores if keep is None else scores.masked_fill(~keep, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.double().logsumexp(-1)


def check(inputs, function, captured=(), keep=None):
    scale = inputs[0].shape[-1] ** -0.5
    problem = attention_problem.describe(*inputs, list(captured), scale, 0.0, function)
    assert isinstance(few.operands(problem, *inputs), few.Operands)
    out, lse = attention_triton.forward(*inputs, list(captured), scale, 0.0, None, function)
    exact, exact_lse = attend(*(t.double() for t in inputs), keep, scale)
    plain, _ = attend(*inputs, keep, scale)
    assert (out.double() - exact).norm() <= 2 * (plain.double() - exact).norm()
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-3, rtol=1e-5)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1, 63, 65, 512, 4100, 32768])
@pytest.mark.parametrize(("group", "queries"), [(1, 1), (4, 1), (7, 1), (8, 4), (2, 3)])
def test_matches_float64(hopper_gpu, keys, group, queries):
    check(tensors(2, 3, group, queries, keys, device="cuda"), PLAIN)
    check(tensors(1, 8, group, queries, keys, 64, torch.float16, device="cuda"), PLAIN)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [300, 8192, 20001])
@pytest.mark.parametrize("kind", ["prefix", "left padding", "every third", "nothing", "lengths", "documents"])
def test_masks(hopper_gpu, keys, kind):
    inputs = tensors(3, 8, 4, 1, keys, device="cuda")
    j = torch.arange(keys, device="cuda")
    ends = torch.tensor([1, keys // 3, keys - 1], device="cuda").view(3, 1, 1, 1, 1)
    if kind == "lengths":
        check(inputs, make_function(mask=shorter_than, empty_rows="zero"), [ends], j < ends)
        return
    if kind == "documents":
        own, others = torch.tensor([0, 1, 2], device="cuda").view(3, 1, 1, 1, 1), (j * 3 // keys).view(1, 1, 1, 1, keys)
        check(inputs, make_function(mask=same_document, empty_rows="zero"), [own, others], own == others)
        return
    keep = {"prefix": j < ends, "left padding": j >= ends, "every third": (j % 3 == 0) & (ends >= 0),
            "nothing": (j < ends) & (ends > 1)}[kind]  # fmt: skip
    check(inputs, MASKED, [keep], keep)


@pytest.mark.gpu
def test_what_a_mask_leaves_out_is_not_read(hopper_gpu):
    q, k, v = tensors(1, 8, 4, 1, 16384, device="cuda")
    keep = torch.zeros(1, 1, 1, 1, 16384, dtype=torch.bool, device="cuda")
    keep[..., 5000:9000] = True
    for t in (k, v):
        t[..., : 5000 // 64 * 64, :] = torch.nan
        t[..., 9024:, :] = torch.nan
    out, _ = attention_triton.forward(q, k, v, [keep], 0.1, 0.0, None, MASKED)
    kept = [t[..., 5000:9000, :].double() for t in (k, v)]
    want, _ = attend(q.double(), *kept, None, 0.1)
    torch.testing.assert_close(out.double(), want, atol=1e-2, rtol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["hopper", "general"])
def test_streams_and_graphs_at_once(hopper_gpu, kernel, monkeypatch):
    """No launch's parts are another's: on several streams, in branches of a graph, between its replays."""
    if kernel == "general":
        monkeypatch.setattr(few, "operands", lambda *call: "not now")
    sets = [tensors(batch, 8, 4, 1, keys, device="cuda") for batch, keys in ((1, 2048), (2, 700), (1, 8192))]

    def run(n):
        return attention_triton.forward(*sets[n], [], 0.1, 0.0, None, PLAIN)[0]

    want = [run(n).clone() for n in range(3)]
    torch.cuda.synchronize()
    side, graph, found = torch.cuda.Stream(), torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        for _ in range(8):
            found.append((run(0), 0))
            with torch.cuda.stream(side):
                found.append((run(1), 1))
        torch.cuda.current_stream().wait_stream(side)
    other = torch.cuda.Stream()
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        other.wait_stream(torch.cuda.current_stream())
        graph.replay()
        with torch.cuda.stream(other):
            alone = run(2)
        torch.cuda.current_stream().wait_stream(other)
        wrong += sum((out != want[n]).sum() for out, n in [*found, (alone, 2)])
    assert wrong.item() == 0
