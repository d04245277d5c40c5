"""One typed configuration, resolved from options, environment and defaults.

Precedence, highest first: ``torch.compile(options=...)`` or ``mode=``, then the environment (``VB_MODE``,
``VB_STRICT``, ``VB_HBM_BUDGET``), then what the mode says, then the default. Options that are not ours are Inductor's
and pass through.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, get_origin

from vbcompile.config_error import ConfigError
from vbcompile.vgpu_size import parse_size

MODES: Final[dict[str, dict[str, bool]]] = {
    "balanced": {"fp4": False, "recompute": False, "offload": False},
    "memory": {"fp4": False, "recompute": True, "offload": True},
    "speed": {"fp4": True, "recompute": False, "offload": False},
    "full": {"fp4": True, "recompute": True, "offload": True},
}
INDUCTOR_MODES: Final = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DOWNSTREAM: Final = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class Config:
    """What a compile does. Every field is an option of the same name.

    Attributes:
        mode: ``balanced``, ``memory``, ``speed`` or ``full``; chooses the defaults of the fields marked (mode).
        attention: rewrite attention to the fused operator.
        mixed_precision: run matrix products in bfloat16, weights untouched. None: on for accelerators when a mode was
            named, off otherwise; never where the model already uses a low precision or autocast.
        fp4: FP4 weights (mode).
        fp4_format: ``nvfp4`` (4.5 bits a weight, the smaller error) or ``mxfp4`` (4.25 bits).
        fp4_activations: ``same`` multiplies activations as they are; ``fp8`` also allows rounding them, and the weight,
            to FP8 where that is faster (many rows, sm_89 or later): 21.3 dB for Gaussian layers instead of 21.7;
            ``fp4`` rounding them to the weight's format on devices that multiply FP4 by FP4 (sm_100, sm_120; gfx950 and
            Ascend 950 in MXFP4): 18.0 dB, for any number of rows.
        fp4_lm_head: also the projection onto the vocabulary; off, because its errors go straight to the logits.
        fp4_max_error: largest relative error ``|W - Q| / |W|`` of a weight that is quantized; those above stay as they
            are and are reported. Gaussian weights have 0.081 in NVFP4 and 0.112 in MXFP4.
        fp4_fuse: one product for layers that share their input (query, key and value; gate and up).
        fp4_qat: train quantisation-aware: weights that require gradients are rounded to their FP4 values in the forward
            of training graphs, and the gradient goes to the weight as if they were not. Off: they stay as they are.
        fp4_master: what becomes of the high-precision weights after the first call: ``keep`` them; ``host``: move them
            to host memory, from where ``vbcompile.restore_weights`` fetches them; ``drop`` them. With the last two the
            parameters read as NaN, take no device memory, and the first graph is compiled once more.
        fp4_watch: how writes to packed weights are noticed beyond versions, addresses and optimizer steps: ``samples``
            of the values on CPUs; ``contents``: a checksum of every weight at every call, on any device, for code that
            writes through ``weight.data``.
        recompute: recompute activations in the backward (mode).
        offload: move weights and activations between memory tiers (mode; in ``balanced`` where a ``budget`` is given).
        budget: device memory that a training step may take, in bytes or as ``"20GiB"``: parameters, gradients and all
            that is alive between them. None: as little as ``slowdown`` allows.
        slowdown: share of a training step's time that less memory may cost where no budget is given.
        strict: raise where a pass fails, instead of running the unrewritten graph.
        downstream: compiler of the rewritten graph: ``inductor``, ``aot_eager`` or ``eager``.
        implementations: which implementation runs an operator, whatever it costs: ``{"attention": "triton"}``; names
            are those of ``vbcompile doctor --kernels``. One that cannot run a case is an error with its reason.
        inductor_mode: one of ``torch.compile``'s own modes, ``default``, ``reduce-overhead``, ``max-autotune``,
            ``max-autotune-no-cudagraphs``.
        inductor_options: options for Inductor itself.
        sources: for each field, where its value came from.
    """

    mode: str = "balanced"
    attention: bool = True
    mixed_precision: bool | None = None
    fp4: bool = False
    fp4_format: str = "nvfp4"
    fp4_activations: str = "same"
    fp4_lm_head: bool = False
    fp4_max_error: float = 0.15
    fp4_fuse: bool = True
    fp4_qat: bool = False
    fp4_master: str = "keep"
    fp4_watch: str = "samples"
    recompute: bool = False
    offload: bool = False
    budget: int | None = None
    slowdown: float = 0.1
    strict: bool = False
    downstream: str = "inductor"
    implementations: Mapping[str, str] = field(default_factory=dict)
    inductor_mode: str = "default"
    inductor_options: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def mode_named(self) -> bool:
        """Whether the user named a mode, by argument or environment."""
        return self.sources.get("mode", "default") != "default"

    def wants_mixed_precision(self, device_type: str = "") -> bool:
        """Whether matrix products of float32 models run in bfloat16 on a kind of device; without one: on any."""
        return self.mode_named and device_type != "cpu" if self.mixed_precision is None else self.mixed_precision

    def without_effect(self) -> list[str]:
        """A sentence for each kind of option that was given and that nothing reads in this configuration."""
        given = {name for name, source in self.sources.items() if source == "options"}
        sentences = []
        fp4 = sorted(name for name in given if name.startswith("fp4_"))
        if fp4 and not self.fp4 and "fp4" not in given:
            sentences.append(f"{', '.join(fp4)}: no effect, FP4 is off in mode {self.mode}; fp4=True turns it on")
        if "slowdown" in given and not (self.recompute or self.offload or {"recompute", "offload"} & given):
            sentences.append(f"slowdown: no effect, recompute and offload are off in mode {self.mode}")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        """Values by field name, each with its source: ``{"mode": {"value": ..., "source": ...}}``."""
        return {
            f.name: {"value": getattr(self, f.name), "source": self.sources.get(f.name, "default")}
            for f in fields(self)
            if f.name not in ("sources", "inductor_options")
        } | {"inductor_options": {"value": dict(self.inductor_options), "source": "options"}}


FP4_FORMATS: Final = ("nvfp4", "mxfp4")
FP4_ACTIVATIONS: Final = ("same", "fp8", "fp4")
FP4_MASTERS: Final = ("keep", "host", "drop")
FP4_WATCHES: Final = ("samples", "contents")
_FLAGS = ("attention", "mixed_precision", "fp4", "fp4_lm_head", "fp4_fuse", "fp4_qat", "recompute", "offload", "strict")
OPTIONS: Final = (
    "mode", *_FLAGS, "fp4_format", "fp4_activations", "fp4_max_error", "fp4_master", "fp4_watch",
    "budget", "slowdown", "downstream", "implementations", "inductor_mode",
)  # fmt: skip
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def resolve_config(
    mode: str | None = None, options: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ
) -> Config:
    """Resolve what ``torch.compile`` passes on, and the environment, into a :class:`Config`.

    Args:
        mode: one of our modes or one of Inductor's.
        options: our options by field name; all other keys must be Inductor's.

    Raises:
        ConfigError: unknown mode, option or value; the message lists the valid ones and the nearest.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}

    def put(name: str, value: Any, source: str) -> None:
        values[name], sources[name] = value, source

    if environ.get("VB_MODE"):
        put("mode", environ["VB_MODE"], "environment VB_MODE")
    if environ.get("VB_STRICT"):
        put("strict", parse_flag("VB_STRICT", environ["VB_STRICT"]), "environment VB_STRICT")
    if environ.get("VB_HBM_BUDGET"):
        put("budget", environ["VB_HBM_BUDGET"], "environment VB_HBM_BUDGET")
    ours, inductor = split_options(options or {})
    for name, value in ours.items():
        put(name, value, "options")
    if mode is not None:
        put("mode", mode, "mode=")
    if values.get("mode") in INDUCTOR_MODES:  # torch.compile has one argument for both
        put("inductor_mode", values.pop("mode"), sources.pop("mode"))
        if environ.get("VB_MODE") not in (None, "", *INDUCTOR_MODES):
            put("mode", environ["VB_MODE"], "environment VB_MODE")
    _validate(values, sources)
    if values.get("budget") is not None:
        what = "VB_HBM_BUDGET" if sources["budget"].startswith("environment") else "option 'budget'"
        values["budget"] = parse_size(what, values["budget"])
    named = values.get("mode", "balanced")
    if named == "balanced" and values.get("budget") is not None and "offload" not in values:
        put("offload", True, "mode balanced with a budget")  # only where the step would not fit
    for name, value in MODES[named].items():
        if name not in values:
            put(name, value, f"mode {named}")
    return Config(**values, inductor_options=inductor, sources=sources)


def split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options, and Inductor's. Raises ConfigError for a key that is neither's, or a value of another type."""
    ours = {k: v for k, v in options.items() if k in OPTIONS}
    rest = {k.replace("-", "_"): v for k, v in options.items() if k not in OPTIONS}
    if rest:
        from torch._inductor import config as inductor_config

        known = inductor_config.get_config_copy()
        for key, value in rest.items():
            if key not in known:
                raise ConfigError(_unknown("option", key, OPTIONS, also="any option of Inductor", near=[*known]))
            kind = inductor_config.get_type(key)  # type: ignore[attr-defined]
            if get_origin(kind) is None and not isinstance(value, kind):
                raise ConfigError(f"option {key!r} of Inductor must be {kind.__name__}, not {value!r}")
    return ours, rest


def _validate(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    for name, valid in (
        ("mode", (*MODES, *INDUCTOR_MODES)),
        ("inductor_mode", INDUCTOR_MODES),
        ("downstream", DOWNSTREAM),
        ("fp4_format", FP4_FORMATS),
        ("fp4_activations", FP4_ACTIVATIONS),
        ("fp4_master", FP4_MASTERS),
        ("fp4_watch", FP4_WATCHES),
    ):
        if name in values and values[name] not in valid:
            where = "environment variable VB_MODE: " if sources[name] == "environment VB_MODE" else ""
            raise ConfigError(where + _unknown(name, values[name], valid))
    for name in _FLAGS:
        value = values.get(name, False)
        if not isinstance(value, bool) and not (value is None and name == "mixed_precision"):
            raise ConfigError(f"option {name!r} must be True or False, not {value!r}")
    named = values.get("implementations", {})
    if not isinstance(named, Mapping) or not all(isinstance(word, str) for pair in named.items() for word in pair):
        raise ConfigError(
            "option 'implementations' must map operators to implementations, as {'attention': 'triton'}, "
            f"not {named!r}"
        )
    for name in ("fp4_max_error", "slowdown"):
        share = values.get(name, 0.0)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ConfigError(f"option {name!r} must be a number from 0 to 1, not {share!r}")


def parse_flag(name: str, text: str) -> bool:
    """The truth value of an environment variable. Raises ConfigError listing the valid spellings."""
    if text.lower() not in _TRUTH:
        raise ConfigError(f"environment variable {name}={text!r}: valid values are {', '.join(_TRUTH)}")
    return _TRUTH[text.lower()]


def _unknown(kind: str, value: Any, valid: tuple[str, ...], also: str = "", near: list[str] | None = None) -> str:
    close = difflib.get_close_matches(str(value).lower(), [*valid, *(near or [])], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {value!r}; valid: {', '.join(valid)}{', ' + also if also else ''}{hint}"
