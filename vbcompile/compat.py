"""Every private part of PyTorch that we touch, in one place; each is tested on each supported release (2.11 on)."""

import contextlib
import functools
import hashlib
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx as fx
from torch._inductor.custom_graph_pass import CustomGraphPass, CustomPartitionerFn

_FUSE_ATTENTION = "torch._inductor.fx_passes.fuse_attention"
_FEW_BYTES = 4 * 2**20  # a card reads them in about a microsecond


def compile_with_inductor(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: dict[str, Any],
    key: str,
    rewrite: Callable[[fx.Graph, Mapping[Any, Callable[..., Any]]], Any] | None = None,
) -> Any:
    """Compile with Inductor, its own attention pass switched off for this graph.

    That pass compares neither softmax axes nor permutations (pytorch issues 196468 and 195320): what our pass refused
    must not reach it. ``key`` enters the compile cache's key, so that a cached artifact is never shared with a compile
    made under other passes. ``rewrite`` gets AOTAutograd's graph and Inductor's decompositions.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    hook = InductorAttentionOff(key, options.get("joint_custom_pre_pass", config.joint_custom_pre_pass), rewrite)
    with hook.restored_afterwards():
        # config_patches, not config.patch: the backward is compiled later, outside of this call
        return compile_fx(gm, example_inputs, config_patches={**options, "joint_custom_pre_pass": hook})


class InductorAttentionOff(CustomGraphPass):
    """Runs before Inductor's pattern passes and hides the attention patterns from them until the compile is over."""

    def __init__(self, key: str, user_pass: Any, rewrite: Callable[..., Any] | None = None) -> None:
        self._key, self._rewrite = key, rewrite
        self._user_passes = (
            list(user_pass) if isinstance(user_pass, (list, tuple)) else [user_pass] if user_pass else []
        )
        self._saved: list[tuple[Any, Any]] = []

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.fx_passes import joint_graph

        if self._rewrite is not None:
            self._rewrite(graph, select_decomp_table())
        for matcher in {id(m): m for m in [joint_graph.patterns, *joint_graph.pass_patterns]}.values():
            if any(_is_attention_pattern(e) for entries in matcher.patterns.values() for e in entries):
                self._saved.append((matcher, matcher.patterns))
                matcher.patterns = _without_attention(matcher.patterns)
        for user_pass in self._user_passes:
            user_pass(graph)

    def uuid(self) -> Any:
        users = [p.uuid() for p in self._user_passes]
        return None if None in users else f"vblackwell:{self._key}:{users}"

    @contextmanager
    def restored_afterwards(self) -> Iterator[None]:
        try:
            yield
        finally:
            for matcher, patterns in reversed(self._saved):
                matcher.patterns = patterns
            self._saved.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_saved": []}


def _is_attention_pattern(entry: Any) -> bool:
    check: Callable[..., Any] | None = getattr(entry, "extra_check", None)
    if not inspect.isfunction(check) or not check.__closure__:
        return False
    search = inspect.getclosurevars(check).nonlocals.get("search_fn")
    return getattr(search, "__module__", None) == _FUSE_ATTENTION


def _without_attention(patterns: Any) -> Any:
    kept = type(patterns)(patterns.default_factory)
    for key, entries in patterns.items():
        kept[key] = [e for e in entries if not _is_attention_pattern(e)]
    return kept


def inductor_mode_options(mode: str) -> dict[str, Any]:
    """Inductor's options for one of ``torch.compile``'s modes."""
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def uses_cudagraphs(mode: str, options: Mapping[str, Any]) -> bool:
    """Whether Inductor captures CUDA graphs in this mode with these of its options."""
    from torch._inductor import config

    asked = {**inductor_mode_options(mode), **options}
    return bool(asked.get("triton.cudagraphs", config.triton.cudagraphs))


def reset_cudagraphs() -> None:
    """Free Inductor's CUDA graphs, as ``torch._dynamo.reset`` does for Inductor itself."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def compile_with_aot_eager(gm: fx.GraphModule, example_inputs: Sequence[Any], partitioner: Any = None) -> Any:
    """AOTAutograd without code generation: every operator of the traced graph runs eagerly."""
    from torch._dynamo.backends.debugging import aot_eager

    if partitioner is None:
        return aot_eager(gm, list(example_inputs))
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def split(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        return partitioner(joint, inputs, **options)  # a function: AOTAutograd looks at its name

    return aot_autograd(fw_compiler=boxed_nop, partition_fn=split, keep_inference_input_mutations=True)(
        gm, list(example_inputs)
    )


def partitioner_options(partitioner: Callable[..., Any], key: str) -> dict[str, Any]:
    """Inductor's options that put ``partitioner`` in the place of its own; ``key`` enters the compile cache's key.

    Inductor then keeps the order of the graph that it gets: its search for less memory knows nothing of memory that
    leaves the device, and would move the waits. It gives memory back at once: kept for a later tensor of the same size,
    it would be missing to what returns meanwhile. It puts kernels together for the sake of a few common reads no more:
    what one of them makes for a later layer would live too long.
    """
    return {
        "custom_partitioner_fn": Partitioner(partitioner, key),
        "reorder_for_peak_memory": False,
        "allow_buffer_reuse": False,
        "score_fusion_memory_threshold": _FEW_BYTES,
    }


class Partitioner(CustomPartitionerFn):
    """What Inductor asks a partitioner to be."""

    def __init__(self, partitioner: Callable[..., Any], key: str) -> None:
        self._partitioner, self._key = partitioner, key

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        return self._partitioner(gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        return self._key

    def __reduce__(self) -> Any:  # the cache pickles options; only the key counts there
        return Partitioner, (None, self._key)


def inside_compiled_code() -> bool:
    """Whether a ``torch.compile`` call is under way in this thread and Dynamo looks at the frames that run now.

    False in what ``torch.compiler.disable`` marks.
    """
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    return get_eval_frame_callback() not in (None, False)


@functools.cache
def is_skipped_by_dynamo(function: Callable[..., Any]) -> bool:
    """Whether Dynamo does not start at this function because it is PyTorch's own."""
    from torch._dynamo import trace_rules

    return bool(trace_rules.check(function))


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` or ``torch.fx`` is recording."""
    return torch._C._get_tracing_state() is not None or torch.fx._symbolic_trace._is_fx_tracing_flag


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` was given to make ``function``; the function itself where it is not compiled."""
    return torch._dynamo.eval_frame.innermost_fn(function)


def is_compiled_module(module: torch.nn.Module) -> bool:
    """Whether this is what ``torch.compile(module)`` returned."""
    return isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def wants_another_capture(error: Exception) -> bool:
    """Whether AOTAutograd asks Dynamo to capture the graph anew: no failure of a compile."""
    from torch._dynamo.exc import RestartAnalysis

    return isinstance(error, RestartAnalysis)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy that can stand in for a graph of Dynamo's; metadata is shared, not copied deeply."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result = copy.graph_copy(graph, nodes)
    output = graph.output_node()
    copy.output(result).meta.update(output.meta)
    for node, twin in nodes.items():
        if hasattr(node, "_dynamo_source"):  # AOTAutograd knows parameters by it
            twin._dynamo_source = node._dynamo_source  # type: ignore[attr-defined]
    copy.set_codegen(graph._codegen)
    return copy


def is_registered_backend(name: str) -> bool:
    """Whether ``torch.compile(backend=name)`` would find a backend, without loading it."""
    from torch._dynamo.backends.registry import list_backends

    return name in list_backends(exclude_tags=())


def registered_backend(name: str) -> Callable[..., Any]:
    """The backend that ``torch.compile(backend=name)`` would use."""
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


def has_kernel(operator: str, key: str) -> bool:
    """Whether an operator has a kernel of its own for a dispatch key (``aten::mm``, ``XPU``)."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator, key)


def compile_id() -> str:
    """Dynamo's name of the compile in progress, e.g. ``0/1``; empty outside of one."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return "" if current is None else str(current)


def graph_break_reason(gm: fx.GraphModule) -> str:
    """Why Dynamo ended this graph where it did; empty where the function returned."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return ""
    place = f" at {reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else ""
    return reason.reason.strip().splitlines()[0] + place


def source_hash(*modules: Any) -> str:
    """Short hash of the modules' source text: changes when a pass changes, so that cached artifacts go stale."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]


def static_fake(tensor: torch.Tensor) -> torch.Tensor:
    """A fake of ``tensor`` in the mode of the compile in progress, its sizes constant; ``tensor`` outside of one."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        return tensor
    return context.fake_mode.from_tensor(tensor, static_shapes=True)


def mark_as_static_input(node: fx.Node) -> None:
    """Make a placeholder that a pass added acceptable to AOTAutograd, and one that CUDA graphs need not copy."""
    from torch._dynamo.source import SyntheticLocalSource

    node._dynamo_source = SyntheticLocalSource(node.name)  # type: ignore[attr-defined]
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def is_module_state(placeholder: fx.Node) -> bool:
    """Whether Dynamo took an input that stays where it is from a module's parameters or buffers.

    Attributes of modules and tensors marked with ``mark_static_address``, such as caches, are static as well. True
    where Dynamo does not say.
    """
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return True
    while source is not None:
        if type(source).__name__ == "UnspecializedParamBufferSource" or "_buffers" in getattr(source, "member", ""):
            return True
        source = getattr(source, "base", None)
    return False


def declare_static_inputs(module: fx.GraphModule, static: Iterable[fx.Node]) -> None:
    """Say of a part that is compiled as a graph of its own which placeholders CUDA graphs need not copy.

    AOTAutograd takes that from Dynamo's graphs alone, so the part is dressed as one. A module with parameters of its
    own is left as it is: Dynamo would name their sources.
    """
    from torch._dynamo.source import SyntheticLocalSource
    from torch._guards import CompileContext

    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return
    module.meta["dynamo_compile_id"] = CompileContext.current_compile_id()
    module._param_name_to_source = {}  # type: ignore[assignment]
    for node in module.graph.find_nodes(op="placeholder"):
        node._dynamo_source = SyntheticLocalSource(node.name)  # type: ignore[attr-defined]
    for node in static:
        mark_as_static_input(node)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie without holes and overlaps, in any order of axes; False where sizes leave it open."""
    from torch._prims_common import is_non_overlapping_and_dense_or_false

    return is_non_overlapping_and_dense_or_false(tensor)


def register_host_memory(device: torch.device, address: int, nbytes: int) -> str:
    """Pin whole pages for copies from and to ``device``; empty if done, else why not."""
    if device.type != "cuda":
        return f"PyTorch has no way to pin existing memory for {device.type} devices"
    from torch.cuda._pin_memory_utils import pin_memory

    try:
        with torch.cuda.device(device):
            pin_memory(address, nbytes)
    except RuntimeError as error:
        _forget_cuda_error()
        return str(error).splitlines()[0]
    return ""


def unregister_host_memory(address: int) -> None:
    """Undo :func:`register_host_memory`."""
    from torch.cuda._pin_memory_utils import unpin_memory

    unpin_memory(address)


class OperatorKinds:
    """What PyTorch's partitioner knows about operators of a traced graph, and the marks of activation checkpointing."""

    def __init__(self) -> None:
        from torch._functorch.partitioners import get_default_op_list

        self._lists = get_default_op_list()

    def is_view(self, node: fx.Node) -> bool:
        """Whether the result, or what is selected of several, shares memory with the argument."""
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            return self.is_view(node.args[0])
        return self._lists.is_view(node) or _shares_memory(node.target)

    def is_cheap(self, node: fx.Node) -> bool:
        """Pointwise operators, reductions, gathers, and random numbers that are a function of a saved seed."""
        if self.is_random(node) or self._lists.is_compute_intensive(node):
            return False
        return self._lists.is_recomputable(node) or _packet(node) in _more_cheap()

    def is_random(self, node: fx.Node) -> bool:
        """Whether the result depends on the state of a generator."""
        tags = getattr(node.target, "tags", ())
        return self._lists.is_random(node) or torch.Tag.nondeterministic_seeded in tags

    def is_matrix_product(self, node: fx.Node) -> bool:
        """Matrix products and convolutions."""
        aten = torch.ops.aten
        return _packet(node) in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)

    def is_saved_by_user(self, node: fx.Node) -> bool:
        """Whether activation checkpointing says that this is to be saved."""
        from torch.utils.checkpoint import CheckpointPolicy

        return node.meta.get("recompute") in (CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)

    def is_recomputed_by_user(self, node: fx.Node) -> bool:
        """Whether activation checkpointing says that this is to be made again."""
        from torch.utils.checkpoint import CheckpointPolicy

        return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


@functools.cache
def _shares_memory(target: Any) -> bool:
    """Whether an ATen operator returns its first argument's memory, by what its schema says."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    read, made = (of[0].alias_info if of else None for of in (target._schema.arguments, target._schema.returns))
    shared = read is not None and not read.is_write and made is not None
    return shared or target is torch.ops.aten._unsafe_view.default


@functools.cache
def _more_cheap() -> frozenset[Any]:
    from torch._inductor import inductor_prims  # noqa: F401  (registers them)

    aten, prims = torch.ops.aten, torch.ops.prims
    seeded = (prims.inductor_lookup_seed, prims.inductor_random, prims.inductor_randint)
    return frozenset((aten.embedding, aten.mean, aten._softmax, aten._log_softmax, aten.logsumexp, aten.cat, *seeded))


def mark_saved(node: fx.Node) -> None:
    """Tell PyTorch's partitioner to save a node's result if the backward needs it."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def mark_recomputed(node: fx.Node) -> None:
    """Tell PyTorch's partitioner to run this node again in the backward if that needs its result."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def frees_result_gradients() -> bool:
    """Whether a compiled backward gives up the gradients of the forward's results as it has used them.

    Before PyTorch had ``boxed_grads_call``, whoever calls a compiled backward holds them until it returns.
    """
    return hasattr(torch.autograd.Function, "boxed_grads_call")


def partition(joint: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """PyTorch's own partition of a joint graph into forward and backward; heeds the marks above."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    return min_cut_rematerialization_partition(joint, inputs, **options)


def _forget_cuda_error() -> None:
    """The driver remembers a refusal and reports it at the next, unrelated launch: so launch something."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def fake_mode_of_compile(*values: Any) -> Any:
    """The fake tensor mode of the compile in progress, or of fake tensors among ``values``; else a new one."""
    from torch._dynamo.utils import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensorMode

    return detect_fake_mode(list(values)) or FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def own_tracing_context(fake_mode: Any) -> Iterator[None]:
    """A part of a graph is compiled as if it were a graph of its own; symbolic sizes stay those of the whole graph."""
    from torch._guards import TracingContext, tracing

    with tracing(TracingContext(fake_mode)):
        yield


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no data because a graph is being captured."""
    from torch._subclasses import fake_tensor

    return bool(fake_tensor.is_fake(tensor))


def promoted_type(a: Any, b: Any) -> torch.dtype:
    """The dtype in which PyTorch combines two tensors or numbers, fake ones too."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.result_type(a, b)


def refuse_while_lowering(reason: str) -> None:
    """Raise RuntimeError(reason) while AOTAutograd lowers a graph; nothing while Dynamo captures one."""
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None and detect_fake_mode() is not None:
        raise RuntimeError(reason)
