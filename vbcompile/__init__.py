"""Virtual Blackwell: the ``torch.compile`` backend ``vblackwell`` and its tools.

Public names load on first use, so that importing the package costs nothing and never imports torch:
``torch`` itself may import this package half-way through its own start-up (for ``TORCH_LOGS=+vbcompile``).
"""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():  # a checkout without symbolic links (Windows): both folders lie beside this one
    __path__.append(str(_here.parent))

_HOME = {
    "backend": ("vblackwell",),
    "config": ("Config", "resolve_config"),
    "config_error": ("ConfigError",),
    "data_parallel": ("DataParallel",),
    "device": (
        "DeviceBackend",
        "DeviceError",
        "Target",
        "UnifiedDeviceManager",
        "get_accelerator_type",
        "get_device",
        "get_device_info",
        "get_device_manager",
        "get_memory_info",
        "get_target",
        "get_unified_backend",
        "is_cuda_available",
        "is_hpu_available",
        "is_npu_available",
        "is_xpu_available",
        "memory_cleanup",
        "set_seed",
    ),
    "handles": ("OffloadedTensor",),
    "handles_model": ("materialize", "offload"),
    "handles_optimizer": ("optimizer",),
    "handles_statistics": ("stats",),
    "handles_timeline": ("write_timeline",),
    "global_switch": (
        "disable",
        "enable",
        "enable_balanced_mode",
        "enable_full_optimization",
        "enable_memory_mode",
        "enable_speed_mode",
        "is_enabled",
        "print_stats",
    ),
    "doctor": ("diagnose",),
    "estimator": ("PlanError", "estimate"),
    "explainer": ("explain",),
    "fp4_calibration": ("calibrate",),
    "fp4_loading": ("load_packed",),
    "passes.fp4_weights": ("requantize", "restore_weights"),
    "troubleshooting": ("check_model_device", "out_of_memory_advice"),
    "vgpu": ("VGPUStack", "create_vgpu_stack"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
