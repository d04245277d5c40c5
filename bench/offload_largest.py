"""The largest Llama that decodes on a card: Llama-3.1-405B's shape in FP4, with what does not fit in host memory.

    python bench/offload_largest.py [--layers 126] [--budget 80GB]
    python bench/offload_largest.py --shape tiny --layers 6 --budget 8MB --device cpu     # simulated, to try it

No machine at hand holds 810 GB of bfloat16. Only the first layer has weights of its own in bfloat16; the backend packs
these, and each other layer has a copy of the packed bytes in pinned memory of its own. So every byte that a step of the
whole model streams is streamed, from where it would be, and all else is what ``vbcompile.offload`` does.

Logits are compared with the same decoded weights in float64, layer by layer without offload: the error must not exceed
twice that of plain PyTorch in bfloat16 (exit status 1 otherwise). The roofline is that of ``offload_model.py``.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import offload_model
import record
import torch
from offload_model import GIB, SHAPES, link_rate, measure, offloaded_tensors, prepare, store_of
from torch import Tensor, nn

import vbcompile
from vbcompile import runtime_host
from vbcompile.handles_payload import Payload
from vbcompile.handles_store import WeightStore
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_quantize import quantize, relative_error
from vbcompile.passes.offload_fp4 import Packer
from vbcompile.runtime_host import HostMemory
from vbcompile.vgpu_plan import padded
from vbcompile.vgpu_size import parse_size

_FORMAT = "nvfp4"
_ARENA = 2 * GIB
_SPARE = 6 * GIB  # of host memory, for the process and the system
_PATIENCE = 0.5  # seconds: a virtual machine's memory may grow only as it is used
_BITS = 4.5
Packed = dict[str, tuple[PackedWeight, float]]  # by the parameter's name, with its relative error


class Clock:
    """Seconds of each phase, printed as they pass."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def phase(self, name: str) -> None:
        """What ended just now."""
        now = time.perf_counter()
        self.seconds[name], self._begun = round(now - self._begun, 2), now
        print(f"{name}: {self.seconds[name]} s", flush=True)


class Arenas(HostMemory):
    """Pinned memory that several threads register ahead of its use: pages are taken at the pace of all cores.

    Args:
        nbytes: How much will be asked for.
    """

    def __init__(self, device: torch.device, nbytes: int, threads: int) -> None:
        super().__init__(device)
        whole, rest = divmod(nbytes, _ARENA)
        sizes = [_ARENA] * whole + [padded(rest, 1 << 21)] * bool(rest)
        pool = ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 2))
        self._begun, self.seconds = time.perf_counter(), 0.0
        self._coming: list[Future[Tensor]] = [pool.submit(self._take, size) for size in sizes]
        self._open: list[Tensor] = []

    def _take(self, nbytes: int) -> Tensor:
        end = time.monotonic() + _PATIENCE
        while runtime_host.available_memory() < 2 * nbytes and time.monotonic() < end:
            time.sleep(0.05)
        on_card = self._device.type != "cpu"
        found = runtime_host.registered_memory(nbytes, self._device) if on_card else runtime_host.mapped_memory(nbytes)
        self.seconds = time.perf_counter() - self._begun
        return found

    def allocate(self, sizes: Sequence[int], *, alignment: int = 256) -> list[Tensor]:
        cut = [self._cut(size, alignment) for size in sizes]
        late = iter(super().allocate([size for size, memory in zip(sizes, cut, strict=True) if memory is None]))
        return [memory if memory is not None else next(late) for memory in cut]

    def _cut(self, size: int, alignment: int) -> Tensor | None:
        """From the first arena with room; None where none has."""
        step = padded(size, alignment)
        while True:
            for number, arena in enumerate(self._open):
                if arena.numel() >= step:
                    self._open[number] = arena[step:]
                    self.use.payload += size
                    return arena[:size]
            if not self._coming:
                return None
            self._open.append(self._coming.pop(0).result())
            self.use.pinned += self._open[-1].numel()


def grow(model: Any, store: WeightStore, layers: int) -> None:
    """Append layers whose weights share the first layer's masters in high precision, which only packing reads."""
    first = model.model.layers[0]
    for number in range(1, layers):
        with torch.device("meta"):
            layer = type(first)(model.config, number).to(torch.bfloat16).eval()
        for name, value in first.named_parameters():
            owner, _, last = name.rpartition(".")
            if isinstance(value, vbcompile.OffloadedTensor):
                like = layer.get_parameter(name)
                payload = Payload(f"model.layers.{number}.{name}", like, store.device, value.payload.source)
                store.add(payload)
                new: Tensor = vbcompile.OffloadedTensor.of(payload)
            else:
                new = value.detach().clone()
            setattr(layer.get_submodule(owner), last, nn.Parameter(new, requires_grad=False))
        model.model.layers.append(layer)
    model.config.num_hidden_layers = layers


def pack_layer(model: nn.Module) -> Packed:
    """The first layer's weights as the backend packs them, on the device."""
    found = {}
    with torch.no_grad():
        for name, value in offloaded_tensors(model).items():
            if ".layers.0." in name:
                weight = value.payload.fetch()
                packed = quantize(weight, _FORMAT, name=name)
                found[name] = packed, float(relative_error(weight, packed))
    return found


@contextmanager
def packed_once(packed: Packed) -> Iterator[None]:
    """Within, the backend takes ``packed`` for every layer; its layout for the kernels is made once, too."""
    laid: dict[Any, Any] = {}
    run, arrange, quantized = Packer.run, Packer._packed, Packer._quantized

    def run_once(self: Packer) -> Any:
        found = run(self)
        laid.clear()
        packed.clear()
        return found

    def quantized_once(self: Packer, member: Any, key: Any) -> Any:
        return packed.get(_first(member.payload.name)) or quantized(self, member, key)

    def arrange_once(self: Packer, members: Any, key: Any, fresh: Any) -> Any:
        place = tuple(_first(member.payload.name) for member in members), key
        if place not in laid:
            laid[place] = arrange(self, members, key, fresh)
        return laid[place]

    Packer.run, Packer._packed, Packer._quantized = run_once, arrange_once, quantized_once  # type: ignore[method-assign]
    try:
        yield
    finally:
        Packer.run, Packer._packed, Packer._quantized = run, arrange, quantized  # type: ignore[method-assign]


def _first(name: str) -> str:
    """The same parameter of the first layer."""
    head, found, tail = name.partition(".layers.")
    return f"{head}{found}0.{tail.partition('.')[2]}" if found else name


def reference(model: Any, packed: Packed, tokens: Tensor, layers: int, dtype: torch.dtype) -> Tensor:
    """Logits of the first layer applied ``layers`` times, all of it on the device, without a compiler."""
    from transformers import LlamaModel

    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        plain = LlamaModel(config).eval()
    plain.layers = nn.ModuleList([plain.layers[0]] * layers)
    plain.rotary_emb = model.model.rotary_emb
    with torch.no_grad():
        for name, held in [
            *model.model.layers[0].named_parameters(prefix="layers.0"),
            ("norm.weight", model.model.norm.weight),
        ]:
            full = f"model.{name}"
            value = dequantize(packed[full][0], dtype) if full in packed else held.detach().to(dtype)
            owner, _, last = name.rpartition(".")
            setattr(plain.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
        rows = model.model.embed_tokens.weight.payload.on_host()[tokens.cpu()].to(tokens.device, dtype)
        found = plain(inputs_embeds=rows).last_hidden_state
        head = model.lm_head.weight.payload.fetch()
        return torch.cat([found @ part.to(dtype).T for part in head.split(1 << 14)], -1).double()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="405b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--budget", default="80GB")
    parser.add_argument("--steps", type=int, default=2, help="in a row, twice")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--threads", type=int, default=6, help="that register pinned memory")
    options = parser.parse_args()
    torch.manual_seed(0)
    clock = Clock()
    smallest = "64KiB" if options.shape == "tiny" else "1MiB"
    model, _ = prepare(options.shape, 1, options.budget, options.device, smallest)
    store = store_of(model)
    large = [value for name, value in offloaded_tensors(model).items() if ".layers." in name]
    layer_bytes = sum(value.numel() for value in large) * 2
    clock.phase("first layer made")
    packed_bytes = int(layer_bytes / 16 * _BITS * 1.005)
    room = int((runtime_host.available_memory() - _SPARE) // packed_bytes)
    if room < options.layers:
        print(f"host memory has room for the packed weights of {room} of {options.layers} layers", flush=True)
    layers = min(options.layers, room)
    store.host = arenas = Arenas(store.device, layers * packed_bytes + GIB // 8, options.threads)
    packed = pack_layer(model)
    clock.phase("first layer packed")
    tokens = torch.randint(0, 1000, (1, 1), device=options.device)
    exact = reference(model, packed, tokens, layers, torch.float64)
    allowed = 2 * error(reference(model, packed, tokens, layers, torch.bfloat16), exact)
    clock.phase("reference")
    grow(model, store, layers)
    link = link_rate(options.device)
    clock.phase("layers added, link measured")
    how = {"mode": "full", "strict": True, "budget": options.budget, "fp4_format": _FORMAT}
    compiled = torch.compile(model, backend="vblackwell", options=how, dynamic=False)
    with torch.no_grad(), packed_once(packed):
        logits = compiled(tokens).logits.clone()
        offload_model.synchronize()
    clock.phase("compiled, copies made, first step")
    print(f"pinned memory was complete {arenas.seconds:.1f} s after it was asked for", flush=True)
    print(f"host memory left: {runtime_host.available_memory() / 1e9:.1f} GB", flush=True)
    found = measure(partial(compiled, tokens), store, options.steps, link)
    clock.phase("measured")
    with torch.no_grad():
        last = compiled(tokens).logits
    whole = sum(value.numel() for value in model.parameters()) * 2
    row = {"what": f"{options.shape}, {layers} layers, {options.budget}, full", "layers": layers}
    row |= {"bf16_bytes": whole, "times_the_budget": whole / parse_size("budget", options.budget)}
    row |= {"tokens_per_s": 1e3 / found["ms"], "roofline_tokens_per_s": 1e3 / found["roofline_ms"]}
    row |= found | {"link_gbps": link / 1e9, "pinned_bytes": store.host.use.pinned}
    row |= {"error": error(logits, exact), "allowed": allowed, "repeats": torch.equal(last, logits)}
    row |= {"layers_are_copies_of_one": True, "seconds": clock.seconds}
    right = row["error"] <= allowed and row["repeats"]
    for key, value in row.items():
        print(f"{key:24} {value}", flush=True)
    record.write("offload_largest" if options.device == "cuda" else "offload_largest_simulated", [row])
    return int(not right)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the driver takes long to give back hundreds of pinned gigabytes one by one
