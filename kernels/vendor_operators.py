"""Operators that vendors' packages add to PyTorch: whether this installation has them, and with which arguments."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vbcompile.device_vendors import package_version, platform_of, probe

FALLBACK = "plain PyTorch runs instead"


@dataclass(frozen=True)
class VendorOperator:
    """An operator of a vendor's package.

    Attributes:
        name: with its namespace, ``npu::npu_fusion_attention``.
        device_type: of the vendor's tensors.
        since: first release of the package that is known to have it.
    """

    name: str
    device_type: str
    since: str

    def overload(self) -> Any:
        """The operator as PyTorch knows it, or None where nothing registered it."""
        namespace, _, name = self.name.partition("::")
        return getattr(getattr(getattr(torch.ops, namespace), name, None), "default", None)

    def argument_names(self) -> tuple[str, ...]:
        """Names of its arguments in order; empty where it is missing."""
        overload = self.overload()
        return () if overload is None else tuple(a.name for a in overload._schema.arguments)

    def takes(self, argument: str) -> bool:
        return argument in self.argument_names()

    def refuses(self, argument: str = "", since: str = "") -> str | None:
        """Why the installed package does not have the operator (or one of its arguments): package, release found,
        release needed, what runs instead.

        None on a machine without the vendor's device: another machine is assumed to have the newest release.
        """
        if not is_present(self.device_type):
            return None
        if self.overload() is not None and (not argument or self.takes(argument)):
            return None
        wanted = f"{self.name} with {argument!r}" if argument else self.name
        needed = since or self.since
        return f"{wanted} needs {needed} or later of {package_found(self.device_type)}; {FALLBACK}"

    def refuses_unknown(self, known: Collection[str]) -> str | None:
        """Why a release cannot be called in order: it wants an argument that is not ``known`` and has no default."""
        overload = self.overload() if is_present(self.device_type) else None
        if overload is None:
            return None
        new = [a.name for a in overload._schema.arguments if a.name not in known and not a.has_default_value()]
        if not new:
            return None
        return f"{self.name} of {package_found(self.device_type)} wants {new[0]!r}, which is not known here; {FALLBACK}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        overload = self.overload()
        if overload is None:
            raise RuntimeError(self.refuses() or f"{self.name}: no device of type {self.device_type} is in use here")
        return overload(*args, **kwargs)

    def call_in_order(self, values: Mapping[str, Any]) -> Any:
        """Call an operator whose arguments differ from release to release: each that this release has, in its place.

        Args:
            values: by argument name; see :meth:`refuses_unknown`.
        """
        overload = self.overload()
        positional = []
        for argument in overload._schema.arguments:
            if argument.name not in values and argument.has_default_value():
                break  # releases append: nothing after the first default is ours
            positional.append(values[argument.name])
        return overload(*positional)


def is_present(device_type: str) -> bool:
    """Whether the vendor's device can be used in this process, so that its operators are registered if they exist."""
    return probe(device_type).ready


def package_found(device_type: str) -> str:
    """``torch-npu (found 2.5.1)``."""
    return f"{platform_of(device_type).distribution} (found {package_version(device_type) or 'no version known'})"
