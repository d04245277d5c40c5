"""Offloaded models: everything that can be done with a model works, on a device made of host memory."""

import copy
import gc
import io
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import vbcompile
from vbcompile.checkpoint_files import CheckpointError
from vbcompile.config_error import ConfigError
from vbcompile.handles import OffloadedTensor
from vbcompile.handles_model import offloaded_tensors
from vbcompile.runtime_disk import StorageError

SMALLEST = 1024


def make(width: int = 32, depth: int = 3) -> nn.Sequential:
    layers = [m for _ in range(depth) for m in (nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))]
    return nn.Sequential(*layers).eval()


def offloaded(model: nn.Module, budget: str = "60KiB", **keywords) -> nn.Module:
    return vbcompile.offload(
        model,
        "cpu",
        {0: budget, "cpu": "64MiB"} | keywords.pop("places", {}),
        smallest=SMALLEST,
        progress=False,
        **keywords,
    )


def test_eager_use_fetches():
    model, x = make(), torch.randn(4, 32)
    expected = model(x)
    assert offloaded(model) is model
    assert isinstance(model[0].weight, OffloadedTensor) and isinstance(model[0].weight, nn.Parameter)
    assert type(model[0].bias) is nn.Parameter  # small: an ordinary tensor
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight.t().sum(0), model[0].weight.cpu().t().sum(0))


def test_opcheck_of_the_fetch():
    weight = offloaded(make())[0].weight
    given = weight.key, weight.shape, weight.stride(), weight.dtype, weight.device
    torch.library.opcheck(torch.ops.vblackwell.fetch.default, given, test_utils=("test_schema", "test_faketensor"))


def test_gradients_reach_handles_in_eager():
    model, x = make(), torch.randn(4, 32)
    model(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    offloaded(model)
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name])


def test_writes_go_through():
    model = make()
    twin = copy.deepcopy(model)
    offloaded(model)
    with torch.no_grad():
        for each in (model, twin):
            each[0].weight.mul_(2).add_(1)
            each[2].weight.copy_(torch.ones(32, 64))
            each[3].weight[3] = 7.0
            each[3].weight.t()[1:3].zero_()
            each[3].weight.chunk(2)[1].mul_(3)
            each[3].weight[0].copy_(each[3].weight[5])
            torch.nn.init.zeros_(each[5].weight)
    assert torch.equal(model[0].weight.cpu(), twin[0].weight)
    assert torch.equal(model[2].weight.cpu(), twin[2].weight)
    assert torch.equal(model[3].weight.cpu(), twin[3].weight)
    assert torch.equal(model[5].weight.cpu(), twin[5].weight)


def test_optimizers_write_through():
    model, x = make(), torch.randn(4, 32)
    twin = copy.deepcopy(model)
    offloaded(model)
    for each in (model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value)


def test_state_dict_is_plain_and_loads():
    model = make()
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    offloaded(model)
    state = model.state_dict()
    assert state.keys() == saved.keys()
    assert all(type(value) is torch.Tensor for value in state.values())
    assert all(torch.equal(state[name], value) for name, value in saved.items())
    assert model[0].state_dict()["weight"].device.type == "cpu"
    other = {name: torch.randn_like(value) for name, value in saved.items()}
    model.load_state_dict(other)
    assert isinstance(model[0].weight, OffloadedTensor)
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("budget", ["48KiB", "62KiB"])
def test_writes_to_the_tensors_of_a_state_dict_reach_the_model(budget):
    """As for an ordinary model: averages of weights are often written that way."""
    model, twin, x = make(), make(), torch.randn(4, 32)
    twin.load_state_dict(model.state_dict())
    offloaded(model, budget)
    torch._dynamo.reset()
    run = torch.compile(model, backend="vblackwell", options={"mode": "memory", "downstream": "eager"})
    held = [each.state_dict() for each in (model, twin)]
    with torch.no_grad():
        for name in held[0]:
            run(x)
            for each, state in zip((model, twin), held, strict=True):
                state[name].mul_(1.5)  # held since before
                each.state_dict()[name].add_(0.1)
            torch.testing.assert_close(run(x), twin(x))
            torch.testing.assert_close(model(x), twin(x))
    (found,) = vbcompile.stats(model)
    assert found.resident_bytes > 0 and (found.planned_bytes > 0) == (budget == "48KiB")


def test_such_writes_between_forward_and_backward_are_an_error():
    model = make().train()
    state = offloaded(model, "90KiB").state_dict()
    torch._dynamo.reset()
    run = torch.compile(model, backend="vblackwell", options={"mode": "memory", "downstream": "eager"})
    out = run(torch.randn(4, 32, requires_grad=True))
    state["2.weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="written to between the forward and the backward"):
        out.sum().backward()


def test_files_hold_ordinary_tensors(tmp_path):
    model, x = make(), torch.randn(2, 32)
    expected = model(x)
    offloaded(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(buffer))
    assert torch.equal(fresh(x), expected)
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # no two tensors seem to share memory
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(x), expected) and not offloaded_tensors(loaded)


def test_deep_copies_are_independent():
    model, x = make(), torch.randn(2, 32)
    offloaded(model)
    twin = copy.deepcopy(model)
    expected = model(x)
    assert isinstance(twin[0].weight, OffloadedTensor)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)
    assert vbcompile.stats(model)[0].masters == vbcompile.stats(twin)[0].masters


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model, ids = Tied(), torch.arange(5)
    expected = model(ids)
    offloaded(model)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(ids), expected)
    state = model.state_dict()
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.embed.weight
    vbcompile.materialize(model)
    assert model.head.weight is model.embed.weight and type(model.head.weight) is nn.Parameter


def test_materialize_undoes():
    model, x = make(), torch.randn(2, 32)
    expected = model(x)
    offloaded(model)
    assert vbcompile.materialize(model) is model
    assert not offloaded_tensors(model) and torch.equal(model(x), expected)
    assert type(model[0].weight) is nn.Parameter and model[0].weight.requires_grad
    offloaded(model)  # and again
    assert torch.equal(model(x), expected)


def test_other_dtypes_and_devices():
    model = make()
    offloaded(model)
    half = model[0].weight.to(torch.bfloat16)
    assert isinstance(half, OffloadedTensor) and half.dtype == torch.bfloat16
    assert torch.equal(half.cpu(), model[0].weight.cpu().bfloat16())


def test_refusals_say_what_to_do():
    hooked = make()
    hooked[0]._hf_hook = object()
    with pytest.raises(ValueError, match="remove_hook_from_module"):
        offloaded(hooked)
    with torch.device("meta"):
        empty = make()
    with pytest.raises(ValueError, match="checkpoint="):
        offloaded(empty)
    with pytest.raises(ValueError, match="materialize"):
        offloaded(offloaded(make()))
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        offloaded(torch.compile(make()))
    with pytest.raises(ConfigError, match=r"max_memory=\{0"):
        vbcompile.offload(make(), "cpu")
    with pytest.raises(ConfigError, match="room"):
        vbcompile.offload(make(), "cpu", {0: "60KiB", "cpu": "4KiB"}, smallest=SMALLEST, progress=False)
    with pytest.raises(ValueError, match="offload"):
        vbcompile.stats(make())


def test_a_checkpoint_is_read_once_or_streamed(tmp_path):
    model, x = make(), torch.randn(2, 32)
    expected = model(x)
    file = tmp_path / "model.safetensors"
    save_file(model.state_dict(), file)
    for host in ("64MiB", "20KiB"):  # all in host memory; most of it stays in the file
        with torch.device("meta"):
            empty = make()
        offloaded(empty, checkpoint=file, places={"cpu": host, "disk": str(tmp_path)})
        assert torch.equal(empty(x), expected)
        assert ("ssd" in vbcompile.stats(empty)[0].masters) == (host == "20KiB")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]  # nothing was written
    on_disk = next(h for h in offloaded_tensors(empty).values() if h.payload.place == "ssd")
    with torch.no_grad(), pytest.raises(RuntimeError, match="cannot be written to"):
        on_disk.add_(1)


def test_only_what_is_written_needs_room_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, other, x, file = make(), make(), torch.randn(2, 32), tmp_path / "model.safetensors"
    expected = model(x), other(x)
    save_file(model.state_dict(), file)
    with torch.device("meta"):
        empty = make()
    assert torch.equal(offloaded(empty, checkpoint=file, places={"cpu": "20KiB", "disk": "4KiB"})(x), expected[0])
    with pytest.raises(ConfigError, match=r"has room for 4\.00 KiB"):
        offloaded(model, places={"cpu": "20KiB", "disk": "4KiB"})
    # weights that a model has are its own, whatever the checkpoint says
    assert torch.equal(offloaded(other, checkpoint=file, places={"cpu": "20KiB", "disk": "64MiB"})(x), expected[1])


def test_checkpoint_errors(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"0.weight": torch.zeros(64, 32)}, file)
    with torch.device("meta"):
        empty = make()
    with pytest.raises(CheckpointError, match="missing"):
        offloaded(empty, checkpoint=file)
    save_file({name: torch.zeros(3) for name in empty.state_dict()}, file)
    with pytest.raises(CheckpointError, match="in the model"):
        offloaded(empty, checkpoint=file)


def test_folders_are_those_of_the_call_wherever_the_process_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    model, empty, x = make(), make().to("meta"), torch.randn(2, 32)
    save_file(model.state_dict(), "model.safetensors")
    expected = model(x)
    places = {"cpu": "20KiB", "disk": "here"}
    offloaded(model, places=places)
    offloaded(empty, checkpoint="model.safetensors", places=places | {"disk": "~/there"})
    unsaved = offloaded(make(), places=places | {"disk": "~/there"})
    monkeypatch.chdir("/")
    assert torch.equal(model(x), expected) and torch.equal(empty(x), expected)
    assert list((tmp_path / "home" / "there").iterdir()) and list((tmp_path / "here").iterdir())
    del unsaved, model
    gc.collect()
    assert not list((tmp_path / "home" / "there").iterdir()) and not list((tmp_path / "here").iterdir())


def test_what_host_memory_has_no_room_for_goes_to_disk(tmp_path):
    model, x = make(), torch.randn(2, 32)
    expected = model(x)
    offloaded(model, places={"cpu": "20KiB", "disk": str(tmp_path)})
    assert torch.equal(model(x), expected)
    masters = vbcompile.stats(model)[0].masters
    assert masters["ssd"] > masters["cpu"] > 0
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError):
        model(x)
    vbcompile_stats = vbcompile.stats(model)
    assert vbcompile_stats[0].planned is False


def test_a_disk_that_cannot_be_used(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises((StorageError, ConfigError), match="file"):
        offloaded(make(), places={"cpu": "20KiB", "disk": str(blocked / "below")})


def test_memory_goes_with_the_model():
    model = offloaded(make(), "40KiB")
    payload = weakref.ref(model[0].weight.payload)
    run = torch.compile(model, backend="vblackwell", options={"mode": "memory", "downstream": "eager"})
    with torch.no_grad():
        run(torch.randn(2, 32))
    streamer = weakref.ref(model[0].weight.payload.residence._streamer)
    assert streamer() is not None
    del model, run
    torch._dynamo.reset()
    gc.collect()
    assert payload() is None and streamer() is None


def test_a_model_that_fits_just_moves():
    model = make()
    assert offloaded(model, "1MiB") is model and not offloaded_tensors(model)
    (found,) = vbcompile.stats(model)
    assert "fits" in found.declined and str(found) == found.declined and found.masters == {}
    offloaded(make().train(), "80KiB")  # gradients and moments do not fit
    assert vbcompile.stats(offloaded(make().train(), "80KiB"))[0].masters["cpu"] > 0


def test_a_model_of_small_tensors_says_why_nothing_left_the_device():
    model = vbcompile.offload(make(), "cpu", {0: "60KiB", "cpu": "64MiB"})
    assert not offloaded_tensors(model)
    (found,) = vbcompile.stats(model)
    assert "smallest=" in found.declined
