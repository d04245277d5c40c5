"""Releases of vendors' packages as far as their operators go: true schemas, kernels for CPU tensors by us.

The dispatcher checks every call against the schema (names, order, types, defaults), so a call that runs here has
arguments that this release accepts. What the operators compute is written down from the vendors' documentation.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SCHEMAS = json.loads((Path(__file__).parent / "schemas.json").read_text())
NPU_RELEASES = tuple(SCHEMAS["torch-npu"]["releases"])
HPU_RELEASES = tuple(SCHEMAS["habana-torch-plugin"]["releases"])
XPU_RELEASES = tuple(SCHEMAS["torch"]["releases"])


class Release:
    """One release's operators, registered while the object is open.

    Attributes:
        calls: names of the operators that were called, in order.
        namespace: where they are registered instead of their own, which PyTorch has taken; empty: in their own.
    """

    def __init__(
        self, distribution: str, version: str, kernels: Mapping[str, Callable[..., Any]], key: str, namespace: str = ""
    ) -> None:
        self.calls: list[str] = []
        self.namespace = namespace
        self._libraries: dict[str, torch.library.Library] = {}
        self._names: list[tuple[str, str]] = []
        for schema in SCHEMAS[distribution]["releases"][version]:
            self._define(schema, kernels, key)

    def add_shapes(self, shapes: Mapping[str, Callable[..., Any]]) -> None:
        """Let fake tensors pass through operators, as the vendor's meta kernels do."""
        for namespace, name in self._names:
            if name in shapes:
                self._libraries[namespace].impl(name, shapes[name], "Meta")

    def _define(self, schema: str, kernels: Mapping[str, Callable[..., Any]], key: str) -> None:
        own, _, rest = schema.partition("::")
        namespace = self.namespace or own
        name = rest.partition("(")[0]
        library = self._libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        library.define(rest)
        self._names.append((namespace, name))
        if name in kernels:
            library.impl(name, self._counted(name, kernels[name]), key)

    def _counted(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return kernel(*args, **kwargs)

        return run

    def close(self) -> None:
        """Forget the operators."""
        for library in self._libraries.values():
            library._destroy()
        self._libraries.clear()
        for namespace, name in self._names:
            packets = getattr(torch.ops, namespace)
            if name in packets.__dict__:
                delattr(packets, name)


@contextmanager
def release(
    distribution: str, version: str, kernels: Mapping[str, Callable[..., Any]], key: str = "CPU", namespace: str = ""
) -> Iterator[Release]:
    """The operators of a release, for tensors of a dispatch key, until the block ends."""
    opened = Release(distribution, version, kernels, key, namespace)
    try:
        yield opened
    finally:
        opened.close()
