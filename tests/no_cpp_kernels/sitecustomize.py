"""Where this folder is on ``PYTHONPATH``, Inductor runs ATen's kernels and writes none in C++ (``quick_pytorch.py``).

For programs that import PyTorch themselves.
"""

import importlib.util
import sys


class _Finder:
    """Changes one setting of Inductor as soon as it is there."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torch._inductor.config":
            return None
        sys.meta_path.remove(_Finder)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            module.fallback_by_default = True

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
