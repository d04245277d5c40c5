"""One trial: a case of the corpus under a backend, counted and compared with eager."""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from attention_cases.case import DISTINCT, INFERENCE, LONGER, TRAINING, Case, Sizes
from attention_oracle import Outcome, differences, double_precision, fresh, run
from torch import Tensor, nn
from torch._dynamo.utils import counters

FUSED: Final = "fused"
LEFT: Final = "left"
MISSED: Final = "missed"
PARTIAL: Final = "partial"
WRONGLY_FUSED: Final = "wrongly fused"
REFUSED_BY_PYTORCH: Final = "PyTorch refuses"


def _vblackwell_sites() -> int:
    return counters["vblackwell"]["fuse_attention"]


def _inductor_sites() -> int:
    # exact only with TORCHINDUCTOR_PATTERN_MATCH_DEBUG set; the plain counter counts twice in training
    per_pattern = counters["inductor_pattern_matcher_per_pattern"]
    return sum(n for name, n in per_pattern.items() if "_sfdp_pattern" in name)


@dataclass(frozen=True)
class Backend:
    """A backend under test.

    Attributes:
        name: as in reports.
        backend: what ``torch.compile`` takes.
        options: its options.
        sites: reads how many sites were fused since the counters were cleared.
        same_random_numbers: whether random operators draw what eager draws.
    """

    name: str
    backend: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    sites: Callable[[], int] = _vblackwell_sites
    same_random_numbers: bool = True

    def compile(self, function: Callable[..., Any], *, dynamic: bool, fullgraph: bool) -> Callable[..., Any]:
        options = dict(self.options) or None
        return torch.compile(function, backend=self.backend, options=options, dynamic=dynamic, fullgraph=fullgraph)


def vblackwell(downstream: str = "eager") -> Backend:
    """Our backend; a pass that fails raises instead of leaving the graph as it was."""
    from vbcompile.backend import vblackwell as backend

    options = {"downstream": downstream, "strict": True}
    return Backend(f"vblackwell ({downstream})", backend, options, same_random_numbers=downstream == "eager")


def inductor() -> Backend:
    return Backend("inductor", "inductor", sites=_inductor_sites, same_random_numbers=False)


def inductor_patterns() -> Backend:
    """Inductor's graph rewrites without its code generation: the same hits, at a fraction of the time."""
    return Backend("inductor (patterns)", _patterns_alone, sites=_inductor_sites, same_random_numbers=False)


def _patterns_alone(gm: Any, example_inputs: Any) -> Any:
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, example_inputs, inner_compile=lambda graph, inputs, **_: make_boxed_func(graph.forward))


@dataclass
class Result:
    """What a trial gave.

    Attributes:
        verdict: ``fused``, ``left``, ``missed``, ``partial``, ``wrongly fused``, or ``PyTorch refuses`` where Dynamo
            fails with any backend.
        problems: results that are worse than eager's; an exception of the backend.
    """

    case: str
    family: str
    backend: str
    mode: str
    dtype: str
    dynamic: bool
    sites: int
    expected: tuple[int, ...]
    verdict: str
    problems: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        return self.verdict in (FUSED, LEFT, REFUSED_BY_PYTORCH) and not self.problems


def clear() -> None:
    torch._dynamo.reset()
    counters.clear()


def attempt(
    case: Case,
    backend: Backend,
    *,
    mode: str = INFERENCE,
    dtype: torch.dtype = torch.float32,
    dynamic: bool = False,
    sizes: Sizes = DISTINCT,
    device: str = "cpu",
    seed: int = 0,
) -> Result:
    """Compile and run one case, count its fused sites, and compare every result with eager's.

    With ``dynamic`` it runs at two sizes; the sites are those of the first compilation.
    """
    clear()
    start = time.perf_counter()
    sites, problems, verdict = 0, [], ""
    try:
        function = prepared(case, mode, dtype, device, sizes)
        compiled = backend.compile(function, dynamic=dynamic, fullgraph=case.fullgraph)
        for i, size in enumerate((sizes, LONGER) if dynamic else (sizes,)):
            inputs = case.make_inputs(dtype, device, seed + i, size)
            ours = _seeded(compiled, fresh(inputs), mode, _module(function))
            sites = backend.sites() if i == 0 else sites
            if case.dropout and mode == TRAINING:
                problems += dropout_problems(case, function, compiled, inputs)
            elif not case.random or backend.same_random_numbers:
                problems += [f"size {i}: {p}" for p in differences(ours, *_references(function, inputs, mode, case))]
    except Exception as error:  # noqa: BLE001  # whatever a backend raises is its result
        if _is_refused_by_pytorch(case, mode, dtype, dynamic, (sizes, LONGER), device, seed):
            verdict = REFUSED_BY_PYTORCH
        else:
            problems.append(f"{type(error).__name__}: {str(error).strip()[:600]}")
    seconds = time.perf_counter() - start
    name = str(dtype).removeprefix("torch.")
    verdict = verdict or judge(sites, case.sites)
    return Result(
        case.name, case.family, backend.name, mode, name, dynamic, sites, case.sites, verdict, problems, seconds
    )


def _is_refused_by_pytorch(
    case: Case, mode: str, dtype: torch.dtype, dynamic: bool, sizes: tuple[Sizes, Sizes], device: str, seed: int
) -> bool:
    """Whether Dynamo fails with a backend that leaves the graph as it is."""
    torch._dynamo.reset()
    function = prepared(case, mode, dtype, device, sizes[0])
    compiled = torch.compile(function, backend="eager", dynamic=dynamic, fullgraph=case.fullgraph)
    try:
        for i, size in enumerate(sizes if dynamic else sizes[:1]):
            _seeded(compiled, case.make_inputs(dtype, device, seed + i, size), mode, _module(function))
    except Exception:  # noqa: BLE001  # any failure is PyTorch's own here
        return True
    return False


def judge(sites: int, accepted: tuple[int, ...]) -> str:
    """Whether that many fused sites are what a case expects."""
    if sites in accepted:
        return FUSED if sites else LEFT
    if accepted == (0,) or sites > max(accepted):
        return WRONGLY_FUSED
    return PARTIAL if sites else MISSED


def prepared(case: Case, mode: str, dtype: torch.dtype, device: str, sizes: Sizes) -> Callable[..., Any]:
    """The callable under test, modules in the mode's training state."""
    function = case.build(sizes, dtype, device)
    return function.train(mode == TRAINING) if isinstance(function, nn.Module) else function


def _module(function: Callable[..., Any]) -> nn.Module | None:
    return function if isinstance(function, nn.Module) else None


def _seeded(function: Callable[..., Any], inputs: tuple[Any, ...], mode: str, module: nn.Module | None) -> Outcome:
    torch.manual_seed(0)
    return run(function, inputs, training=mode == TRAINING, parameters=module)


def _references(
    function: Callable[..., Any], inputs: tuple[Any, ...], mode: str, case: Case
) -> tuple[Outcome, Outcome]:
    """Eager in the run's dtype, and the truth."""
    eager = _seeded(function, fresh(inputs), mode, _module(function))
    if case.random:  # float64 draws other numbers
        return eager, eager
    wide = copy.deepcopy(function).double() if isinstance(function, nn.Module) else function
    with double_precision():
        truth = _seeded(wide, fresh(inputs, torch.float64), mode, _module(wide))
    return eager, truth


# ------------------------------------------------------------------------------------------ dropout
def dropout_problems(
    case: Case, module: Any, compiled: Callable[..., Any], inputs: tuple[Tensor, ...], draws: int = 24
) -> list[str]:
    """What is wrong with active dropout; empty if nothing is.

    With the identity as values, the output is the dropped weights: each must be 0 or ``p / (1 - rate)``, zeros must
    have the right share, and differ from draw to draw. Given the mask read from it, dropout is a product with
    constants, so that every gradient can be compared with eager's.
    """
    inputs = identity_values(inputs)
    weights = _evaluated(module, inputs)
    problems, zeros, kept = [], 0, 0
    visible = weights > 1e-6
    previous = None
    for draw in range(draws):
        torch.manual_seed(draw)
        dropped = compiled(*fresh(inputs)).detach().float()
        gone = visible & (dropped == 0)
        zeros, kept = zeros + int(gone.sum()), kept + int((visible & ~gone).sum())
        expected = torch.where(gone, 0.0, weights / (1 - case.dropout))
        if not torch.allclose(dropped, expected, rtol=0.03, atol=1e-5):
            problems.append(f"draw {draw}: weights are neither 0 nor p / (1 - rate)")
        if previous is not None and torch.equal(gone, previous):
            problems.append(f"draw {draw}: the same weights are dropped as before")
        previous = gone
    share, spread = zeros / (zeros + kept), (case.dropout * (1 - case.dropout) / (zeros + kept)) ** 0.5
    if abs(share - case.dropout) > 5 * spread:
        problems.append(f"{share:.4f} of the weights dropped, not {case.dropout}")
    return problems[:3] + dropout_gradient_problems(case, module, compiled, inputs)


def identity_values(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs with ``v`` (the third) replaced by identity matrices ``[..., K, K]``."""
    v = inputs[2]
    eye = torch.eye(v.shape[-2], dtype=v.dtype, device=v.device).expand(*v.shape[:-2], -1, -1)
    return (*inputs[:2], eye.contiguous().requires_grad_(v.requires_grad), *inputs[3:])


def _evaluated(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    module.eval()
    try:
        with torch.no_grad():
            return module(*fresh(inputs)).float()
    finally:
        module.train()


def dropout_gradient_problems(
    case: Case, module: nn.Module, compiled: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> list[str]:
    """Gradients of one dropped run against eager's with the same mask as a constant factor."""
    ours_in, eager_in = fresh(inputs), fresh(inputs)
    dropped = compiled(*ours_in)
    gradient = torch.randn(dropped.shape, generator=torch.Generator().manual_seed(1)).to(dropped)
    scale = torch.where(dropped.detach() == 0, 0.0, 1 / (1 - case.dropout)).to(dropped.dtype)
    module.eval()
    try:
        queries = (*eager_in[:2], eager_in[2].detach(), *eager_in[3:])
        reference = module(*queries) * scale  # values are the identity, so this is the dropped weights
    finally:
        module.train()
    reference = reference @ _values_per_head(eager_in[2], reference)
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad]
    ours = torch.autograd.grad(dropped, [ours_in[i] for i in wanted], gradient)
    truth = torch.autograd.grad(reference, [eager_in[i] for i in wanted], gradient)
    tolerance = 0.06 if dropped.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return [
        f"gradient of input {i} with dropout: error {float((a - b).abs().max()):.2e}"
        for i, a, b in zip(wanted, ours, truth, strict=True)
        if not torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.abs().max()))
    ]


def _values_per_head(v: Tensor, weights: Tensor) -> Tensor:
    return v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
