"""Tests marked ``gpu`` need an accelerator that runs Triton, elsewhere they are skipped; fixtures of several files."""

import pytest
import torch
import torch._dynamo.config
import torch._inductor.config
from quick_pytorch import forget_imports, leave_out
from torch._dynamo.utils import counters
from warm_python import WarmPython

# Files that take longest begin first, so that no process is left with one at the end.
LONGEST = (
    "test_docs.py",
    "test_model_families.py",
    "test_attention_corpus.py",
    "test_fp4_gluon_aot.py",
    "test_attention_property.py",
    "test_attention_hopper_compiled.py",
    "test_attention_aot.py",
    "test_demo.py",
    "test_backend.py",
    "test_fp4_aot.py",
    "test_attention_interpreted.py",
    "test_bench_scripts.py",
    "test_global_switch.py",
    "test_packaging.py",
    "test_offload_pass.py",
    "test_vendor_attention.py",
    "test_fp4_linear.py",
    "test_recompute.py",
    "test_launches.py",
    "test_fp4_quantize.py",
    "test_fp4_native.py",
)


def pytest_configure(config: pytest.Config) -> None:
    leave_out(cpp_kernels=config.getoption("--matrix"))


def pytest_collection_finish(session: pytest.Session) -> None:
    forget_imports()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="also the tests marked matrix: every form of each kernel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skipped = {}
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        skipped["gpu"] = pytest.mark.skip(reason="needs a GPU")
    if not config.getoption("--matrix"):
        skipped["matrix"] = pytest.mark.skip(reason="one form of many: make test-all")
    for item in items:
        for name, mark in skipped.items():
            if name in item.keywords:
                item.add_marker(mark)
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cpp_kernels():
    """Inductor compiles C++ kernels in this test, as it does for users; otherwise only ``--matrix`` lets it."""
    with torch._inductor.config.patch(fallback_by_default=False):
        yield


@pytest.fixture(scope="module")
def no_fake_tensor_cache():
    """Little is met again in graphs of a few nodes: a tenth of the time, a third with symbolic sizes."""
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        yield


@pytest.fixture(scope="session")
def warm_python(pytestconfig):
    """Runs programs in processes of their own without the time of importing PyTorch."""
    with WarmPython(pytestconfig.getoption("--matrix")) as python:
        yield python


@pytest.fixture(scope="session")
def interpreting_python(pytestconfig):
    """As ``warm_python``, with Triton's interpreter on: Triton decides at import whether it interprets."""
    with WarmPython(pytestconfig.getoption("--matrix"), TRITON_INTERPRET="1", OMP_NUM_THREADS="1") as python:
        yield python


@pytest.fixture
def reports():
    """The reports of the graphs that the test compiles."""
    from vbcompile.backend import collected_reports

    with collected_reports() as found:
        yield found


@pytest.fixture
def fresh_dynamo():
    """Nothing compiled or counted by an earlier test; the same random numbers in every run."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


@pytest.fixture
def bare_machine(monkeypatch):
    """No card, whatever this machine has."""
    from fake_devices import make_bare

    from vbcompile.device import forget_devices

    make_bare(monkeypatch)
    yield
    forget_devices()


@pytest.fixture
def fresh_weights(fresh_dynamo):
    """Nothing compiled or packed by an earlier test; the same random numbers in every run."""
    from vbcompile.passes import fp4_weights

    fp4_weights.forget()


@pytest.fixture
def hopper_gpu():
    """Skips where the Hopper attention kernels cannot run."""
    from vbcompile.kernels import attention_hopper

    if torch.cuda.get_device_capability() != (9, 0) or attention_hopper.refuses_triton():
        pytest.skip("needs a Hopper GPU and a verified Triton")


@pytest.fixture(params=["simulated", pytest.param("card", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest):
    """What the offload runtime streams to."""
    from vbcompile.runtime_device import AcceleratorDevice
    from vbcompile.runtime_simulated import LinkRate, SimulatedDevice

    if request.param == "card":
        yield AcceleratorDevice(torch.accelerator.current_accelerator())
    else:
        found = SimulatedDevice(None, {"h2d": LinkRate(20e9, 2e-5), "disk": LinkRate(20e9)})
        yield found
        found.close()


@pytest.fixture
def unit(device) -> int:
    """Bytes that weights of a streamed model are made of: more on a card."""
    return 16 * 1024 if device.device.type == "cpu" else 2**20
