"""Pack a model's linear layers to FP4 with the help of calibration inputs, and save the result.

One forward over all inputs suffices: every layer is packed when it is first reached, for the inputs that the already
packed layers before it give (GPTQ, arXiv 2210.17323, in the order of execution), and goes on with its FP4 values. Per
layer the best of GPTQ, searched scales and round-to-nearest is kept, judged by the error of the layer's output.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbcompile.checkpoint import save_checkpoint
from vbcompile.kernels.fp4 import PackedWeight, dequantize
from vbcompile.kernels.fp4_formats import fp4_format
from vbcompile.kernels.fp4_gptq import quantize_with_inputs
from vbcompile.kernels.fp4_quantize import quantize, refuse_weight
from vbcompile.passes.fp4_refusals import SMALLEST
from vbcompile.passes.fp4_sites import HEAD_NAMES
from vbcompile.passes.fp4_weights import adopt


@dataclass(frozen=True)
class LayerResult:
    """How one layer was packed.

    Attributes:
        method: ``gptq``, ``mse`` or ``nearest``, the one with the least output error.
        error: relative error of the layer's output on the calibration inputs.
        nearest_error: that of round-to-nearest.
    """

    name: str
    shape: tuple[int, int]
    method: str
    error: float
    nearest_error: float


@dataclass(frozen=True)
class Calibration:
    """A calibrated model.

    Attributes:
        entries: parameters and buffers by name, packed where they were packed; for ``checkpoint.save_checkpoint``.
        layers: the packed layers in the order of execution.
        left: ``(layer, reason)`` of linear layers that stay as they are.
    """

    entries: dict[str, PackedWeight | Tensor]
    layers: list[LayerResult]
    left: list[tuple[str, str]]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that ``checkpoint.read_checkpoint`` and ``load_packed`` read."""
        save_checkpoint(path, self.entries)


def calibrate(
    model: nn.Module,
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    format_name: str = "nvfp4",
    lm_head: bool = False,
    damping: float = 0.01,
    done: Callable[[LayerResult], None] | None = None,
) -> Calibration:
    """Pack the ``nn.Linear`` layers that ``model(*inputs)`` or ``model(**inputs)`` runs.

    Afterwards the layers hold their FP4 values, and a compile with the option ``fp4`` uses exactly these codes.

    Args:
        model: in evaluation mode, on the device that is to do the work.
        inputs: all calibration inputs in one batch (by position, by name, or the one tensor); a few thousand tokens
            suffice.
        format_name: ``nvfp4`` or ``mxfp4``.
        lm_head: also the projection onto the vocabulary.
        damping: see :func:`vbcompile.kernels.fp4_gptq.quantize_with_inputs`.
        done: called with each layer's result.

    Raises:
        ValueError: unknown format, or a weight or its inputs hold NaN or infinity; the model is then as it was.
    """
    fp4_format(format_name)
    model = getattr(model, "_orig_mod", model)  # of a compiled model: its own names
    run = _Calibrator(model, format_name, damping, done)
    run.choose_layers(lm_head)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # of a compiled model Dynamo would trace GPTQ
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*((inputs,) if isinstance(inputs, Tensor) else inputs))
    except BaseException:
        run.restore()
        raise
    finally:
        run.close()
    return run.result()


class _Calibrator:
    def __init__(
        self, model: nn.Module, format_name: str, damping: float, done: Callable[[LayerResult], None] | None
    ) -> None:
        self.model, self.format_name, self.damping, self.done = model, format_name, damping, done
        self.packed: dict[int, PackedWeight] = {}
        self.originals: list[tuple[nn.Linear, Tensor]] = []
        self.layers: list[LayerResult] = []
        self.left: list[tuple[str, str]] = []
        self.waiting: dict[nn.Linear, str] = {}
        self.hooks: list[Any] = []
        self.last: tuple[Any, Tensor] | None = None

    def choose_layers(self, lm_head: bool) -> None:
        embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, nn.Embedding)}
        for name, layer in self.model.named_modules():
            if not isinstance(layer, nn.Linear):
                continue
            is_head = id(layer.weight) in embeddings or name.rpartition(".")[2] in HEAD_NAMES
            reason = refuse_weight(layer.weight, fp4_format(self.format_name))
            if is_head and not lm_head:
                reason = "projection onto the vocabulary"
            elif layer.weight.numel() < SMALLEST:
                reason = f"{layer.weight.numel()} elements: too small to gain"
            if reason:
                self.left.append((name, reason))
                continue
            self.waiting[layer] = name
            self.hooks.append(layer.register_forward_pre_hook(self._reached, with_kwargs=True))

    def _reached(self, layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert isinstance(layer, nn.Linear)
        x = args[0] if args else keywords.get("input")
        if not isinstance(x, Tensor) or x.dim() == 0 or x.shape[-1] != layer.in_features:
            return  # the layer's own error says more
        name = self.waiting.pop(layer, None)
        if name is None or id(layer.weight) in self.packed:
            return
        weight, moment = layer.weight, self._second_moment(x)
        if not bool(torch.isfinite(moment).all()):
            raise ValueError(f"{name}: the calibration inputs that reach this layer hold NaN or infinity, or overflow")
        choices = {
            "gptq": quantize_with_inputs(weight, moment, self.format_name, damping=self.damping, name=f"{name}.weight"),
            "mse": quantize(weight, self.format_name),
            "nearest": quantize(weight, self.format_name, method="nearest"),
        }
        errors = {method: _output_error(weight, packed, moment) for method, packed in choices.items()}
        method = min(errors, key=lambda m: errors[m])
        self.originals.append((layer, weight.detach().to("cpu", copy=True)))
        weight.copy_(dequantize(choices[method]))
        self.packed[id(weight)] = choices[method]
        shape = (layer.out_features, layer.in_features)
        self.layers.append(LayerResult(name, shape, method, errors[method], errors["nearest"]))
        if self.done is not None:
            self.done(self.layers[-1])

    def _second_moment(self, x: Tensor) -> Tensor:
        """``X^T X / rows`` of the layer's input, float32; layers that share an input share it."""
        if self.last is None or self.last[0] is not x:
            rows = x.detach().reshape(-1, x.shape[-1])
            moment = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            for part in rows.split(8192):
                moment.addmm_(part.float().t(), part.float(), alpha=1 / max(1, len(rows)))
            self.last = (x, moment)
        return self.last[1]

    def restore(self) -> None:
        """Undo everything."""
        with torch.no_grad():
            for layer, original in self.originals:
                layer.weight.copy_(original)

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.last = None

    def result(self) -> Calibration:
        for layer, _ in self.originals:
            adopt(layer.weight, self.packed[id(layer.weight)])
        self.left += [(name, "not reached by the calibration inputs") for name in self.waiting.values()]
        state = self.model.state_dict(keep_vars=True)
        entries = {name: self.packed.get(id(tensor), tensor.detach()) for name, tensor in state.items()}
        return Calibration(entries, self.layers, self.left)


def _output_error(weight: Tensor, packed: PackedWeight, moment: Tensor) -> float:
    """Relative error of the layer's output: ``sqrt(tr(D M D^T) / tr(W M W^T))`` with ``D = W - Q``."""
    exact = weight.detach().float()
    difference = exact - dequantize(packed)
    error, norm = (float(((m @ moment) * m).sum()) for m in (difference, exact))
    return (max(error, 0.0) / norm) ** 0.5 if norm > 0 else 0.0


def calibrate_folder(
    folder: str, out: str, format_name: str, lm_head: bool, *, text: str | None, tokens: int, length: int
) -> int:
    """Calibrate the Transformers language model in ``folder`` on a text; returns the exit status."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vbcompile.device import get_device

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval().to(get_device())
    ids = calibration_tokens(AutoTokenizer.from_pretrained(folder, local_files_only=True), text, tokens, length)
    inputs = {"input_ids": ids.to(get_device()), "use_cache": False}
    return calibrate_to_file(model, inputs, out, format_name, lm_head)


def calibration_tokens(tokenizer: Any, text: str | None, tokens: int, length: int) -> Tensor:
    """Token ids ``[sequences, length]`` of a text file, or of Python's own documentation.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    from vbcompile.demo_models import english_paragraphs

    content = Path(text).read_text(encoding="utf-8") if text else "\n\n".join(english_paragraphs()[0::2])
    ids = torch.tensor(tokenizer(content)["input_ids"][:tokens])
    if len(ids) < length:
        raise ValueError(f"{text}: {len(ids)} tokens are not one sequence of {length}; give more text or --length")
    return ids[: len(ids) // length * length].view(-1, length)


def calibrate_to_file(
    model: nn.Module, inputs: Sequence[Any] | Mapping[str, Any], out: str, format_name: str, lm_head: bool
) -> int:
    """Calibrate, save, and say on standard output what was gained; returns the exit status."""
    result = calibrate(model, inputs, format_name=format_name, lm_head=lm_head, done=_say)
    result.save(out)
    for name, reason in result.left:
        print(f"{name or 'the model itself'}: left, {reason}")
    if not result.layers:
        print(f"no layer packed; the weights are in {out} as they are")
        return 1
    mean = sum(layer.error / layer.nearest_error for layer in result.layers if layer.nearest_error)
    share = mean / len(result.layers)
    print(f"{len(result.layers)} layers packed to {out}; output error {share:.2f} of round-to-nearest's")
    return 0


def _say(layer: LayerResult) -> None:
    shape = "x".join(map(str, layer.shape))
    print(f"{layer.name} [{shape}]: {layer.method}, output error {layer.error:.4f} (nearest {layer.nearest_error:.4f})")
