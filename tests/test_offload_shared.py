"""Compiled graphs that several models, layers or threads share, and what happens between their steps."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from test_offload_pass import blocks, compiled, offload
from torch import nn

import vbcompile
from vbcompile.runtime_disk import OpenFiles, StorageError


def shuffled(model: nn.Module) -> nn.Module:
    """The same model with other weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.copy_(weight.flatten().flip(0).view_as(weight))
    return other


@pytest.mark.parametrize("downstream", ["eager", "inductor"])
def test_models_with_one_code_keep_their_own_weights(downstream):
    first, x = blocks(), torch.randn(3, 32)
    second = shuffled(first)
    expected = first(x), second(x)
    run = compiled(offload(first), downstream)
    torch.testing.assert_close(run(x), expected[0])
    again = torch.compile(offload(second), backend="vblackwell", options={"mode": "memory", "downstream": downstream})
    for _ in range(2):
        torch.testing.assert_close(again(x), expected[1])
        torch.testing.assert_close(run(x), expected[0])


class Broken(nn.Module):
    """Its layers are compiled one by one: the loop holds a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = blocks(depth=5)

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number == 2:
                torch._dynamo.graph_break()
        return x


def test_layers_with_one_code_keep_their_own_weights():
    model, x = Broken().eval(), torch.randn(3, 32)
    for layer in model.layers:
        layer.load_state_dict(shuffled(layer).state_dict())
    expected = model(x)
    run = compiled(offload(model))
    for _ in range(3):
        torch.testing.assert_close(run(x), expected)


def test_layers_with_one_code_are_trained():
    model = Broken().requires_grad_(True)
    plain, x = copy.deepcopy(model), torch.randn(3, 32)
    run = compiled(offload(model, "160KiB"))
    for _ in range(2):
        run(x).square().mean().backward()
        plain(x).square().mean().backward()
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(weight.grad.cpu(), other.grad, msg=name)


def test_what_a_model_that_is_gone_was_compiled_to_goes_with_the_next():
    first, x = blocks(), torch.randn(3, 32)
    run = compiled(offload(first))
    run(x)
    gone = None
    for _ in range(3):
        model = offload(shuffled(blocks()))
        store = weakref.ref(model[0].up.weight.payload.residence)
        torch.compile(model, backend="vblackwell", options={"mode": "memory", "downstream": "eager", "strict": True})(x)
        del model
        gc.collect()
        assert gone is None or gone() is None
        gone = store


def test_one_graph_for_weights_of_two_models_runs_uncompiled(caplog):
    first, second = blocks(depth=2), shuffled(blocks(depth=2))
    x = torch.randn(3, 32)
    expected = second[1](first[0](x))
    offload(first)
    offload(second)
    run = compiled(lambda one, other, x: other(one(x)))
    run(first[0], first[1], x)
    torch.testing.assert_close(run(first[0], second[1], x), expected)
    assert "offload them together" in caplog.text


def test_threads_take_turns():
    model = blocks()
    inputs = [torch.randn(3, 32) for _ in range(3)]
    expected = [model(x) for x in inputs]
    run = compiled(offload(model))
    run(inputs[0])
    wrong: list[object] = []

    def work(number: int) -> None:
        try:
            for _ in range(20):
                torch.testing.assert_close(run(inputs[number]), expected[number])
        except BaseException as problem:  # noqa: BLE001 -- shown by the assertion below
            wrong.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_eager_reads_and_writes_find_room_beside_a_step():
    model, x = blocks(), torch.randn(3, 32)
    plain = copy.deepcopy(model)
    run = compiled(offload(model, "50KiB"))
    with torch.no_grad():
        run(x)
        torch.testing.assert_close(model(x), plain(x))
        run(x)
        for each in (model, plain):
            each[1].up.weight[3].zero_()
        torch.testing.assert_close(run(x), plain(x))


def test_data_is_written_through():
    model, x = blocks(), torch.randn(3, 32)
    plain = copy.deepcopy(model)
    run = compiled(offload(model))
    run(x)
    for each in (model, plain):
        each[1].up.weight.data = torch.ones_like(plain[1].up.weight)
    torch.testing.assert_close(run(x), plain(x))
    assert torch.equal(model.state_dict()["1.up.weight"], plain[1].up.weight)
    with pytest.raises(RuntimeError, match="put a new"):
        model[1].up.weight.data = torch.ones(2, 2)
    vbcompile.materialize(model)
    torch.testing.assert_close(model(x), plain(x))


def test_a_read_that_fails_in_a_step_is_forgotten(tmp_path, monkeypatch):
    """The place in the ring that it was for may still be read by what was queued before it."""
    model, x = blocks(), torch.randn(3, 32)
    expected = model(x)
    run = compiled(offload(model, cpu="40KiB", disk=str(tmp_path)))
    torch.testing.assert_close(run(x), expected)
    read, broken = OpenFiles.read, [False]

    def sometimes(self, source, *rest):
        if broken[0]:
            raise StorageError(source.file, source.offset, source.nbytes, 0, "not now")
        return read(self, source, *rest)

    monkeypatch.setattr(OpenFiles, "read", sometimes)
    for _ in range(4):
        broken[0] = True
        with pytest.raises(StorageError, match="not now"):
            for _ in range(3):  # what was read ahead serves the first
                run(x)
        broken[0] = False
        torch.testing.assert_close(run(x), expected)
