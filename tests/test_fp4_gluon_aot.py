"""FP4 kernels in Triton's Gluon dialect, compiled for architectures that are not here: spills, the hot loop."""

import itertools
import re

import pytest
import torch
from matrix import forms
from test_fp4_aot import K, N, disassembly, hot_loop, target
from triton_aot import Launch, compile_launch

from vbcompile.kernels import fp4_linear_few, fp4_linear_hopper, fp4_linear_triton
from vbcompile.kernels.fp4_epilogue import out_features
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_linear_few import FewConfig
from vbcompile.kernels.fp4_linear_hopper import WideConfig
from vbcompile.kernels.triton_target import interpreted

pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter does not compile")
BF16, FP16, FP8 = torch.bfloat16, torch.float16, torch.float8_e4m3fn

SHAPES = [(28672, 4096), (4096, 14336), (4096, 4096), (6144, 4096), (1000, 2944)]


def shipped(architectures, rows, shapes):
    """Every ``(arch, m, n, k)`` of the first ``shapes`` weights."""
    return [(arch, m, *shape) for arch, m, shape in itertools.product(architectures, rows, SHAPES[:shapes])]


def few_launch(arch, m, config, dtype=BF16, format_name="nvfp4", epilogue="none"):
    from vbcompile.kernels.fp4_linear_decode import fp4_decode_kernel

    x, words, floats = torch.empty(16, dtype=dtype), torch.empty(16, dtype=torch.uint8), torch.empty(16)
    arguments = (x, words, words, floats, x, x, m, N, K // 64, K, K // 64)
    layout = fp4_linear_triton.preferred_layout(target(arch))
    options = fp4_linear_few.launch_options(target(arch), dtype, m, format_name, layout, config, epilogue)
    return Launch(fp4_decode_kernel, arguments, {"BIAS": True, **options})


@pytest.mark.parametrize(
    ("arch", "m", "n", "k"),
    forms(shipped(("sm_80", "sm_90", "sm_100", "sm_120"), (1, 16, 32), 2), lambda arch, m, n, k: n == 28672 or m == 16),
)
def test_few_rows_compile_without_spills(arch, m, n, k):
    """What is shipped, by table or formula."""
    config = fp4_linear_few.few_config(target(arch), m, n, k)
    assert compile_launch(few_launch(arch, m, config), arch).spills == 0


@pytest.mark.parametrize(("dtype", "format_name"), [(FP16, "nvfp4"), (BF16, "mxfp4")])
def test_few_rows_of_other_types_compile_without_spills(dtype, format_name):
    assert compile_launch(few_launch("sm_90", 4, FewConfig(2, 4, 2), dtype, format_name), "sm_90").spills == 0


@pytest.mark.parametrize("m", [1, 27])
def test_lanes_of_few_rows_stay_together(m):
    """A loop of its own for lanes without a row of x would let ``mma.sync`` wait for ever."""
    text = disassembly(compile_launch(few_launch("sm_90", m, FewConfig(1, 16 if m == 1 else 4, 1, 128)), "sm_90"))
    assert "HMMA" in text and "WARPSYNC" not in text


def test_few_rows_go_from_memory_to_registers():
    config = FewConfig(4, 4, 1)
    report = compile_launch(few_launch("sm_90", 1, config), "sm_90")
    loop = hot_loop(report)
    assert sum(bool(re.match(r"LDG\S*128", i)) for i in loop) == 4 and sum(i.startswith("HMMA") for i in loop) == 16
    assert not any(i.startswith(("LDS", "STS", "BAR")) for i in loop)
    assert len(loop) / (16 * config.strips * 64 * config.unroll / 32) <= 3.0  # instructions a weight


def diagonal_launch(m, config, dtype=BF16, format_name="nvfp4", epilogue="none"):
    from vbcompile.kernels.fp4_linear_diagonal import fp4_diagonal_kernel

    x, words, floats = torch.empty(16, dtype=dtype), torch.empty(16, dtype=torch.uint8), torch.empty(16)
    arguments = (x, words, words, floats, x, x, m, N, 4, K, K // 64)
    options = fp4_linear_few.diagonal_options(dtype, m, format_name, config, epilogue)
    return Launch(fp4_diagonal_kernel, arguments, {"BIAS": True, **options})


@pytest.mark.parametrize(
    ("arch", "m", "n", "k"),
    forms(shipped(("sm_90", "sm_100"), (1, 2, 4), 5), lambda arch, m, n, k: arch == "sm_90" or n == 28672),
)
def test_up_to_four_rows_compile_without_spills(arch, m, n, k):
    """What is shipped, by table or formula."""
    config = fp4_linear_few.diagonal_config(target(arch), m, n, k)
    assert k % (128 * config.warps * config.unroll) == 0
    assert compile_launch(diagonal_launch(m, config), arch).spills == 0


@pytest.mark.parametrize(("dtype", "format_name"), [(FP16, "nvfp4"), (BF16, "mxfp4")])
@pytest.mark.parametrize("m", [1, 4])
def test_up_to_four_rows_of_other_types_compile_without_spills(m, dtype, format_name):
    config = fp4_linear_few.diagonal_config(target("sm_90"), m, 28672, 4096)
    assert compile_launch(diagonal_launch(m, config, dtype, format_name), "sm_90").spills == 0


@pytest.mark.parametrize("epilogue", ["silu", "gated_silu", "gated_gelu"])
def test_epilogues_of_few_rows_compile_without_spills(epilogue):
    target_90 = target("sm_90")
    for m in (1, 2, 4):
        config = fp4_linear_few.diagonal_config(target_90, m, 28672, 4096)
        assert compile_launch(diagonal_launch(m, config, epilogue=epilogue), "sm_90").spills == 0
    config = fp4_linear_few.stream_config(target_90, 16, 28672, 4096)
    assert compile_launch(stream_launch(16, config, epilogue=epilogue), "sm_90").spills == 0


def test_up_to_four_rows_take_two_instructions_a_weight():
    config = FewConfig(2, 2, 2, 128)
    loop = hot_loop(compile_launch(diagonal_launch(1, config), "sm_90"))
    weights = 16 * config.strips * 128 * config.unroll / 32
    assert sum(bool(re.match(r"LDG\S*128", i)) for i in loop) == 8
    assert not any(i.startswith(("LDS", "STS", "BAR")) for i in loop)
    multiplied = sum(i.startswith("HMUL2") for i in loop) - 4  # on the way for large x alone
    assert multiplied == weights / 2 and (len(loop) - multiplied) / 2 <= 2.0 * weights


def stream_launch(m, config, dtype=BF16, format_name="nvfp4", epilogue="none"):
    from vbcompile.kernels.fp4_linear_stream import fp4_stream_kernel

    words, bytes_ = torch.empty(16, dtype=torch.int32), torch.empty(16, dtype=torch.uint8)
    out, floats = torch.empty(16, dtype=dtype), torch.empty(16)
    arguments = (words, bytes_, bytes_, floats, out, out, floats, words, m, N, K // 2, K // 128, K // 64, 999)
    options = fp4_linear_few.stream_options(dtype, m, format_name, config, epilogue)
    return Launch(fp4_stream_kernel, arguments, {"BIAS": True, **options})


@pytest.mark.parametrize(
    ("arch", "m", "n", "k"),
    forms(shipped(("sm_90", "sm_100"), (8, 16, 32), 4), lambda arch, m, n, k: arch == "sm_90" or n == 28672),
)
def test_rows_that_share_x_compile_without_spills(arch, m, n, k):
    """What is shipped, by table or formula."""
    config = fp4_linear_few.stream_config(target(arch), m, n, k)
    report = compile_launch(stream_launch(m, config), arch)
    assert report.spills == 0 and config.warps * 32 * config.blocks * report.registers <= 65536


@pytest.mark.parametrize(("dtype", "format_name"), [(FP16, "nvfp4"), (BF16, "mxfp4")])
def test_rows_that_share_x_compile_in_other_types_without_spills(dtype, format_name):
    config = fp4_linear_few.stream_config(target("sm_90"), 16, N, K)
    assert compile_launch(stream_launch(16, config, dtype, format_name), "sm_90").spills == 0


def wide_launch(config, kind, format_name="nvfp4", epilogue="none"):
    from vbcompile.kernels.fp4_linear_wide import fp4_wide_kernel

    m, n, k = 256, 512, 1024
    width = out_features(n, epilogue)
    x, out = torch.empty(m, k, dtype=kind), torch.empty(m, width, dtype=FP16 if kind == FP16 else BF16)
    codes = torch.empty(n // 64, k // 64, 2048, dtype=torch.uint8)
    scales = torch.empty(n // 64, k // 64, 4096 // fp4_format(format_name).block_size, dtype=torch.uint8)
    read = fp4_linear_hopper.descriptors(x, codes, scales, out, format_name, config, epilogue)
    floats, counters = torch.empty(n), torch.empty(16, dtype=torch.int32)
    arguments = (*read, floats, floats, floats, floats, counters, m, n, 1, k // 128, 4, 7, 0, 0)
    options = fp4_linear_hopper.launch_options(
        kind, config, config.splits != 1, 32 // fp4_format(format_name).block_size, epilogue
    )
    return Launch(fp4_wide_kernel, arguments, {"BIAS": True, **options})


@pytest.mark.parametrize(
    ("block_m", "tiles", "splits", "kind", "warpgroups"),
    [
        (32, 1, 1, BF16, 2), (64, 1, 1, BF16, 2), (64, 1, 4, FP16, 3), (64, 2, 2, BF16, 2), (128, 1, 0, BF16, 2),
        (128, 2, 1, BF16, 2), (256, 1, 1, BF16, 2), (256, 1, 0, FP16, 2), (256, 1, 0, FP8, 2), (128, 2, 1, FP8, 2),
        (64, 1, 4, FP8, 2), (16, 1, 4, BF16, 2),
    ],
)  # fmt: skip
def test_hopper_kernel_runs_asynchronously_without_spills(block_m, tiles, splits, kind, warpgroups):
    config = fp4_linear_hopper.wide_shape(block_m, tiles, splits, kind == FP8, warpgroups)
    report = compile_launch(wide_launch(config, kind, "mxfp4" if kind == FP16 else "nvfp4"), "sm_90")
    assert report.spills == 0 and report.shared <= 232448 // config.blocks
    loop = hot_loop(report, innermost=True)
    products = [i for i in loop if re.match("[HQ]GMMA", i)]
    assert len(products) == (4 if kind == FP8 else 8)
    assert all(re.search(r"GMMA\S* R\d+, R\d+, gdesc", i) for i in products)
    # the compiler's own are of 128 threads: at most one for each full buffer
    assert sum(bool(re.match(r"BAR\.SYNC\S* 0x\d, 0x80", i)) for i in loop) <= 3 - config.steps
    # serialised products carry one of these before and after each
    assert sum(i.startswith("WARPGROUP") for i in loop) == 4
    last_wait = max(at for at, i in enumerate(loop) if i.startswith("WARPGROUP.DEPBAR"))
    assert not any(i.startswith(("HMUL2", "PRMT")) for i in loop[last_wait:])  # decodes while the product runs
    weights = 2 * 64 * 64 / 128
    assert len(loop) / weights <= {BF16: 4.0, FP16: 5.1, FP8: 5.4}[kind], len(loop) / weights


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (4160, 4096), (28672, 4096), (4096, 14336), (70 * 8, 33 * 8)])
def test_blocks_share_all_of_the_work(n, k, fp8):
    """Whole tiles in turns, then equal shares: every pair of steps once, no two partial sums in one place."""
    for m, multiprocessors in itertools.product((64, 128, 256, 2048), (132, 78)):
        for config in fp4_linear_hopper.wide_candidates(m, fp8):
            plan = fp4_linear_hopper.plan(m, n, k, config, multiprocessors)
            assert 0 < plan.programs <= multiprocessors * config.blocks
            tiles = -(-n // (64 * config.parts)) * -(-m // config.block_m)
            assert plan.pairs == -(-k // 128) and plan.whole * plan.pairs + plan.left == tiles * plan.pairs
            assert plan.left == 0 or (plan.whole % plan.programs == 0 and plan.left >= plan.programs)
            shares = [plan.begin(p) for p in range(plan.programs + 1)]
            assert shares[0] == 0 and shares[-1] == plan.left
            for first, last in itertools.pairwise(shares):
                assert plan.left == 0 or first < last
                begun_before = [t for t in range(first // plan.pairs, -(-last // plan.pairs)) if t * plan.pairs > first]
                cut = [t for t in begun_before if (t + 1) * plan.pairs > last]
                assert len(cut) <= 1  # the place for tiles that begin within the share


def test_three_warpgroups_and_128_rows_of_x_keep_two_words_outside_of_the_loop():
    report = compile_launch(wide_launch(fp4_linear_hopper.wide_shape(128, 1, 2, False, 3), BF16), "sm_90")
    assert report.spills <= 8
    assert not any(i.startswith(("STL", "LDL")) for i in hot_loop(report, innermost=True))


def test_no_other_block_fits_beside_one_of_hoppers_kernel():
    """Two of different launches on one multiprocessor did not always end: the register file has no room for more."""
    from vbcompile.kernels.fp4_linear_wide import PRODUCER_REGISTERS

    for warpgroups, (own, at_first) in fp4_linear_hopper._REGISTERS.items():
        threads = 32 * (4 * warpgroups + 4)  # one of the last four warps is the producer
        assert threads * at_first <= 65536 < threads * at_first + 32 * 4 * 16
        assert 128 * (warpgroups * own + PRODUCER_REGISTERS.value) <= 65536


def test_named_barriers_of_the_kernel_for_many_rows_are_none_of_the_compilers():
    from vbcompile.kernels.fp4_linear_wide import FIRST_BARRIER

    for m, fp8 in itertools.product((32, 256), (False, True)):
        for config in fp4_linear_hopper.wide_candidates(m, fp8):
            assert FIRST_BARRIER.value + config.stages // config.steps <= 16
    ptx = compile_launch(wide_launch(fp4_linear_hopper.wide_shape(64, 1, 0, False, 3), BF16), "sm_90").assembly["ptx"]
    own = [int(number) for number in re.findall(r"\bbar(?:rier)?\.sync\s+(\d+)", ptx)]
    assert own and max(own) < FIRST_BARRIER.value
    assert re.search(r"bar\.arrive\s+%r\d+, 416;", ptx) and re.search(r"bar\.sync\s+%r\d+, 416;", ptx)


def test_the_last_share_of_a_tile_is_the_longer_one():
    plan = fp4_linear_hopper.plan(256, 4096, 4096, WideConfig(128, 1, 8, 2, lag=3), 132)
    assert (plan.programs, plan.splits, [plan.begin(p) for p in range(4)]) == (128, 2, [0, 14, 32, 46])
    assert fp4_linear_hopper.plan(256, 4096, 256, WideConfig(128, 1, 8, 2, lag=3), 132).lag == 0  # two pairs: one each
    assert fp4_linear_hopper.plan(256, 6144, 4096, WideConfig(128, 1, 8, 0, lag=3), 132).splits == 0


def test_weights_are_copied_before_the_kernel_ahead_has_ended():
    """The producer copies codes and scales (three axes), waits, copies x (two); the consumers wait before all else."""
    text = disassembly(compile_launch(wide_launch(WideConfig(64, 1, 6, 4, 2), BF16), "sm_90"))
    order = re.findall(r"UTMALDG\.[23]D|ACQBULK|HGMMA", text)
    assert order.count("ACQBULK") >= 3
    at = order.index("UTMALDG.3D")
    waits = [i for i, name in enumerate(order) if name == "ACQBULK"]
    assert any(
        at < wait and set(order[at:wait]) == {"UTMALDG.3D"} and order[wait + 1] == "UTMALDG.2D" for wait in waits
    )


@pytest.mark.parametrize("epilogue", ["silu", "gelu", "gated_silu", "gated_gelu_tanh"])
def test_epilogues_take_no_spills_and_leave_the_loop_alone(epilogue):
    plain, launch = (
        wide_launch(fp4_linear_hopper.wide_shape(256, 1, 1, False), BF16, epilogue=e) for e in ("none", epilogue)
    )
    with_it = compile_launch(launch, "sm_90")
    assert with_it.spills <= (160 if epilogue == "gelu" else 0)  # the error function of 128 values, once a tile
    plain_loop, loop = (hot_loop(report, innermost=True) for report in (compile_launch(plain, "sm_90"), with_it))
    assert len(loop) <= len(plain_loop) + 4 and not any(i.startswith(("STL", "LDL")) for i in loop)
    for m in (1, 32):
        config = fp4_linear_few.few_config(target("sm_90"), m, N, K)
        assert compile_launch(few_launch("sm_90", m, config, epilogue=epilogue), "sm_90").spills == 0


@pytest.mark.parametrize(("shape", "kind"), [((64, 1, 4), FP8), ((128, 2, 1), BF16), ((256, 1, 0), BF16)])
def test_gates_in_other_shapes_take_no_spills(shape, kind):
    config = fp4_linear_hopper.wide_shape(*shape, kind == FP8)
    assert compile_launch(wide_launch(config, kind, epilogue="gated_silu"), "sm_90").spills == 0
