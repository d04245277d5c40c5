"""A kernel of two lines, to see whether Triton can compile for a card. Imports Triton: import it only when asked."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vbcompile.device import Target


def _double(x, n, BLOCK: tl.constexpr):
    """x: float32[n], doubled in place; one program per BLOCK elements."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, 2.0 * tl.load(x + at, mask=at < n), mask=at < n)


def compile_trial(target: Target) -> int:
    """Compile for the target and return the size of the binary in bytes. Raises what Triton raises."""
    kernel = JITFunction(_double)  # not @triton.jit, which TRITON_INTERPRET would turn into an interpreter
    source = ASTSource(kernel, {"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 256})
    compiled = triton.compile(source, target=_gpu_target(target))
    return len(compiled.kernel)


def current_target() -> GPUTarget:
    """What Triton itself takes the current card for; builds Triton's launcher. Raises what Triton raises."""
    return triton.runtime.driver.active.get_current_target()


def _gpu_target(target: Target) -> GPUTarget:
    if target.compute_capability is not None:
        major, minor = target.compute_capability
        return GPUTarget("cuda", 10 * major + minor, 32)
    if target.vendor == "amd":
        return GPUTarget("hip", target.arch, 64 if target.arch.startswith("gfx9") else 32)
    return current_target()
