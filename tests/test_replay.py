"""Remembered calls give what calls give: on a GPU, or in Triton's interpreter (``TRITON_INTERPRET=1``) on the CPU."""

import ast
import threading
from pathlib import Path

import pytest
import torch
from attention_compare import DEVICE, compare
from attention_forms import make_forms

from vbcompile.kernels import replay
from vbcompile.kernels.attention import attention, attention_backward, attention_reference
from vbcompile.kernels.attention_problem import TileConfig
from vbcompile.kernels.attention_tuning import forced_tiles
from vbcompile.kernels.registry import Implementation, force, operator
from vbcompile.kernels.score_function import ScoreFunction
from vbcompile.kernels.triton_target import interpreted

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="needs an accelerator or TRITON_INTERPRET=1"
)
FORMS = make_forms(21, 39, 16, 16)
FEW_QUERIES = make_forms(6, 71, 16, 24)
PLAIN = ScoreFunction().dumps()


@pytest.fixture(autouse=True)
def repeated(monkeypatch):
    """Calls on the CPU are remembered too; gives the recordings that were run."""
    found = []
    run = replay.Recording.run
    monkeypatch.setattr(replay, "takes", lambda device: True)
    monkeypatch.setattr(replay.Recording, "run", lambda self, *given: found.append(self) or run(self, *given))
    for name in ("attention", "attention_backward"):
        operator(name).load()
    replay.forget()
    with force(attention="triton", attention_backward="triton"):
        yield found
    replay.forget()


def forward(*call):
    with torch.no_grad():
        return attention(*call)


def backward(*call):
    *_, needs = call
    return [g if need else None for g, need in zip(attention_backward(*call), needs, strict=True)]


@pytest.mark.parametrize(
    ("forms", "name"),
    [
        (FORMS, "bias"),
        (FORMS, "sink"),
        (FORMS, "dropout"),
        (FORMS, "rows_first"),
        (FEW_QUERIES, "grouped"),
        (FEW_QUERIES, "document_causal"),
    ],
)
def test_other_data_in_the_same_form(repeated, forms, name):
    form = forms[name]
    wrong = [row for row in compare(form, torch.float32, (0, 1, 2, 3), (forward, backward)) if not row[1] <= row[2]]
    assert not wrong, f"(name, error, allowed): {wrong}"
    assert len(repeated) == 4  # the third and fourth forward and backward


HOPPER = make_forms(300, 432, 64, 64)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="Hopper's kernels")
@pytest.mark.parametrize("name", ["causal", "bias", "softcap", "bool_mask", "document_causal", "sink"])
def test_other_data_with_hoppers_kernels(repeated, name):
    with force(attention="hopper", attention_backward="hopper"):
        rows = compare(HOPPER[name], torch.bfloat16, (0, 1, 2, 3), (forward, backward), name == "bias")
    assert not [row for row in rows if not row[1] <= row[2]]
    assert len(repeated) == 4


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs")
def test_cuda_graphs_capture_repeated_calls(repeated):
    tensors = inputs()
    for _ in range(3):
        expect(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = forward(*tensors, [], 0.3, 0.0, None, PLAIN)
    assert len(repeated) == 2
    for _ in range(2):
        for t in tensors:
            t.normal_()
        graph.replay()
        right, _ = attention_reference(*(t.double() for t in tensors), [], 0.3, 0.0, None, PLAIN)
        torch.testing.assert_close(out.double(), right, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="streams")
def test_a_call_runs_on_the_current_stream(repeated):
    tensors = [t.repeat(1, 1, 200, 1) for t in inputs()]
    for _ in range(3):
        expect(*tensors)
    right = attention_reference(*(t.double() * 2 for t in tensors), [], 0.3, 0.0, None, PLAIN)[0]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        doubled = [t * 2 for t in tensors]
        out, _ = forward(*doubled, [], 0.3, 0.0, None, PLAIN)
    stream.synchronize()
    torch.testing.assert_close(out.double(), right, atol=2e-3, rtol=2e-3)


def inputs(q_length=8, k_length=40, heads=2):
    def tensor(length):
        return torch.randn(1, heads, length, 16, device=DEVICE)

    return tensor(q_length), tensor(k_length), tensor(k_length)


def expect(q, k, v, scale=0.3):
    """The call is right."""
    out, lse = forward(q, k, v, [], scale, 0.0, None, PLAIN)
    right = attention_reference(q.double(), k.double(), v.double(), [], scale, 0.0, None, PLAIN)
    torch.testing.assert_close((out.double(), lse.double()), right, atol=2e-3, rtol=2e-3)
    return out


def test_each_call_has_results_of_its_own(repeated):
    given = [inputs() for _ in range(5)]
    found = [expect(*tensors) for tensors in given]
    kept = [out.clone() for out in found]
    assert len(repeated) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    assert len({out.data_ptr() for out in found}) == 5


def test_other_strides_and_alignments_are_other_calls(repeated):
    for _ in range(4):
        expect(*inputs())
    assert len(repeated) == 2
    q, k, v = inputs()
    for other in (
        k.transpose(1, 2).contiguous().transpose(1, 2),
        torch.randn(k.numel() + 1, device=DEVICE)[1:].view_as(k),
    ):
        for _ in range(2):
            expect(q, other, v)
    assert len(repeated) == 2
    for _ in range(3):
        expect(q, other, v)
    assert len(repeated) == 5


def test_views_into_one_tensor(repeated):
    for _ in range(4):
        packed = torch.randn(1, 40, 3, 2, 16, device=DEVICE)
        expect(*(packed[:, :, n].transpose(1, 2) for n in range(3)))
    assert len(repeated) == 2


def test_one_tensor_given_twice_is_another_call(repeated):
    for _ in range(4):
        q, k, _ = inputs()
        expect(q, k, k)
    assert len(repeated) == 2
    expect(*inputs())
    assert len(repeated) == 2


def test_growing_keys(repeated):
    for k_length in range(20, 30):
        for _ in range(3):
            expect(*inputs(1, k_length))
    assert len(repeated) == 10


def test_scale_and_settings_are_part_of_the_key(repeated):
    tensors = inputs()
    for _ in range(3):
        expect(*tensors, scale=0.3)
    expect(*tensors, scale=0.4)
    torch.use_deterministic_algorithms(True)
    try:
        expect(*tensors, scale=0.3)
    finally:
        torch.use_deterministic_algorithms(False)
    with force(attention="reference"):
        for _ in range(4):
            expect(*tensors, scale=0.3)
    assert len(repeated) == 1
    expect(*tensors, scale=0.3)
    assert len(repeated) == 2


def test_forced_tiles_and_new_implementations_drop_what_is_known(repeated):
    tensors = inputs()
    for _ in range(3):
        expect(*tensors)
    with forced_tiles(decode=TileConfig(16, 16, 4, 1)):
        for _ in range(3):
            expect(*tensors)
    assert repeated[0] is not repeated[1]
    expect(*tensors)
    assert len(repeated) == 2


def test_the_number_of_recordings_is_bounded(repeated, monkeypatch):
    monkeypatch.setattr(replay, "_MOST", 4)
    for k_length in range(20, 30):
        expect(*inputs(1, k_length))
        assert len(replay._known) <= 4


@pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter runs one kernel at a time")
def test_threads(repeated):
    failed = []

    def work(seed):
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(6):
                expect(*(torch.randn(1, 2, n, 16, generator=generator).to(DEVICE) for n in (8, 40, 40)))
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and repeated


def test_no_tensor_is_kept(repeated):
    for _ in range(3):
        expect(*inputs())
    (recording,) = [r for r in replay._known.values() if isinstance(r, replay.Recording)]
    found, todo = set(), [recording]
    while todo:
        thing = todo.pop()
        assert not isinstance(thing, torch.Tensor)
        if id(thing) in found or (callable(thing) and not isinstance(thing, replay.Recording)):
            continue
        found.add(id(thing))
        todo += [*thing.values()] if isinstance(thing, dict) else []
        todo += [*thing] if isinstance(thing, (tuple, list)) else []
        todo += (
            [*vars(thing).values()]
            if type(thing).__module__.startswith("vbcompile") and hasattr(thing, "__dict__")
            else []
        )


# -------------------------------------------------------------------------------------------- what is recorded
def called(run, *tensors, times=4):
    """The results of calls with fresh copies of the tensors."""
    return [replay.remembered("test", None, given, lambda given=given: run(*given)) for given in
            ([t.clone() for t in tensors] for _ in range(times))]  # fmt: skip


def test_operators_between_launches_are_done_again(repeated):
    x = torch.randn(4, 6, device=DEVICE)

    def run(t):
        total = t.new_zeros(6)
        total += t.mT.contiguous().sum(1)
        return total.view(2, 3), (t * 2)[1:]

    for total, doubled in called(run, x):
        torch.testing.assert_close(total, x.sum(0).view(2, 3))
        torch.testing.assert_close(doubled, x[1:] * 2)
    assert len(repeated) == 2


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda t: t * t.sum().item(), id="reads a value"),
        pytest.param(lambda t: t[t > 0].sum(), id="has a shape that depends on values"),
        pytest.param(lambda t: t.as_strided((2,), (1,), 1) + 1, id="an absolute offset"),
        pytest.param(lambda t: t + _BESIDE.to(t.device), id="a tensor from elsewhere"),
        pytest.param(lambda t: replay.refuse() or t + 1, id="refused"),
    ],
)
def test_what_is_not_recorded(repeated, run):
    x = torch.randn(4, device=DEVICE)
    for result in called(run, x):
        torch.testing.assert_close(result, run(x))
    assert not repeated


_BESIDE = torch.ones(4)


def test_a_call_that_cannot_be_noted_is_right_and_reported(repeated, monkeypatch, caplog):
    def broken(*given):
        raise ValueError("no such step")

    monkeypatch.setattr(replay, "Call", broken)
    x = torch.randn(4, device=DEVICE)
    for result in called(lambda t: t + 1, x):
        torch.testing.assert_close(result, x + 1)
    assert not repeated and caplog.text.count("not remembered: ValueError: no such step") == 1


def test_an_implementation_that_does_not_say_so_is_not_recorded(repeated):
    runs = []

    def mine(q, k, v, *rest):
        runs.append(1)
        return attention_reference(q, k, v, *rest)

    attention_operator = operator("attention")
    attention_operator.register(Implementation("mine", mine, lambda *case: None, lambda *case: 1.0))
    try:
        with force(attention="mine"):
            for _ in range(4):
                expect(*inputs())
    finally:
        attention_operator.implementations.pop()
        replay.forget()
    assert len(runs) == 4 and not repeated


def test_results_that_are_arguments_are_refused():
    x = torch.randn(4, device=DEVICE)
    with pytest.raises(RuntimeError, match="in memory of its own"):
        replay.remembered("test", None, [x], lambda: x[1:])


@pytest.mark.parametrize("path", sorted(Path(replay.__file__).parent.glob("attention*.py")), ids=lambda p: p.stem)
def test_every_launch_of_attention_is_seen(path):
    """What is launched past ``launch`` would not be done again."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
    assert not [ast.unparse(n) for n in calls if isinstance(n.func, ast.Subscript)]
