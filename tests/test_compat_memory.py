"""The private parts of PyTorch behind the memory passes, on each supported release."""

import contextlib
import operator
import pickle

import pytest
import torch
import torch.fx as fx

from vbcompile import compat

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def nodes_of(*calls):
    """One node for each ``(operator, arguments)`` on a 4 x 4 input."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    return [graph.call_function(op, (x, *rest)) for op, *rest in calls]


def test_operator_kinds():
    aten, prims = torch.ops.aten, torch.ops.prims
    kinds = compat.OperatorKinds()
    product, view, sine, gather = nodes_of(
        (aten.mm.default,), (aten.view.default, [16]), (aten.sin.default,), (aten.embedding.default,)
    )
    noise, seeded = nodes_of((aten.rand_like.default,), (prims.inductor_lookup_seed.default, 0))
    assert kinds.is_matrix_product(product) and not kinds.is_cheap(product)
    (parts,) = nodes_of((aten.split_with_sizes.default, [1, 3]))
    assert kinds.is_view(view) and kinds.is_view(parts) and not kinds.is_view(sine)
    assert kinds.is_cheap(sine) and kinds.is_cheap(gather) and kinds.is_cheap(seeded)
    assert kinds.is_random(noise) and not kinds.is_cheap(noise) and not kinds.is_random(seeded)


def test_views_are_told_by_what_an_operator_says_of_its_memory():
    aten, kinds = torch.ops.aten, compat.OperatorKinds()
    views = (aten.split_with_sizes.default, [1, 3]), (aten.view_as_real.default,), (aten.unfold.default, 0, 2, 1)
    (parts, *others), (sine, written) = nodes_of(*views), nodes_of((aten.sin.default,), (aten.sin_.default,))
    part = parts.graph.call_function(operator.getitem, (parts, 1))
    assert all(map(kinds.is_view, (parts, part, *others)))
    assert not kinds.is_view(written) and not kinds.is_view(sine.graph.call_function(operator.getitem, (sine, 0)))


def test_marks():
    kinds = compat.OperatorKinds()
    saved, again, plain = nodes_of(*[(torch.ops.aten.sin.default,)] * 3)
    compat.mark_saved(saved)
    compat.mark_recomputed(again)
    assert kinds.is_saved_by_user(saved) and kinds.is_recomputed_by_user(again)
    assert not kinds.is_saved_by_user(plain) and not kinds.is_recomputed_by_user(plain)


def test_inductor_uses_the_partitioner_and_puts_its_key_into_the_cache_key():
    calls = []

    def split(joint, inputs, **options):
        calls.append(options["num_fwd_outputs"])
        return compat.partition(joint, inputs, **options)

    options = compat.partitioner_options(split, "key 1")
    assert not options["reorder_for_peak_memory"] and not options["allow_buffer_reuse"]

    def backend(gm, example_inputs):
        return compat.compile_with_inductor(gm, example_inputs, {**options, "fx_graph_cache": False}, "key 1")

    x = torch.randn(8, requires_grad=True)
    torch.compile(lambda v: v.sin().cos().sum(), backend=backend)(x).backward()
    torch.testing.assert_close(x.grad, -(x.sin().sin()) * x.cos())
    assert calls == [1]
    partitioner = options["custom_partitioner_fn"]
    assert partitioner.uuid() == "key 1"
    assert pickle.loads(pickle.dumps(partitioner)).uuid() == "key 1"


def test_aot_eager_uses_the_partitioner():
    calls = []

    def split(joint, inputs, **options):
        calls.append(options["num_fwd_outputs"])
        return compat.partition(joint, inputs, **options)

    def backend(gm, example_inputs):
        return compat.compile_with_aot_eager(gm, example_inputs, split)

    x = torch.randn(8, requires_grad=True)
    torch.compile(lambda v: v.sin().sum(), backend=backend)(x).backward()
    assert calls == [1] and torch.allclose(x.grad, x.cos())


def test_is_dense():
    x = torch.empty(3, 4, 5)
    assert compat.is_dense(x) and compat.is_dense(x.transpose(0, 2)) and compat.is_dense(torch.empty(()))
    assert not compat.is_dense(x[:, ::2]) and not compat.is_dense(x[:1].expand(3, 4, 5))


def test_host_memory_is_registered_where_the_driver_can(monkeypatch):
    from torch.cuda import _pin_memory_utils as utils

    assert "no way to pin" in compat.register_host_memory(torch.device("xpu", 0), 0, 4096)
    calls = []
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(utils, "pin_memory", lambda *given: calls.append(given))
    monkeypatch.setattr(utils, "unpin_memory", lambda *given: calls.append(given))
    assert compat.register_host_memory(torch.device("cuda", 0), 4096, 8192) == ""
    compat.unregister_host_memory(4096)
    assert calls == [(4096, 8192), (4096,)]

    def refuses(*_):
        raise RuntimeError("Registering memory failed with cudaError: 2. More\nlines")

    monkeypatch.setattr(utils, "pin_memory", refuses)
    monkeypatch.setattr(compat, "_forget_cuda_error", lambda: None)
    assert compat.register_host_memory(torch.device("cuda", 0), 4096, 8192).startswith("Registering memory failed")


def test_whether_a_compiled_backward_gives_up_the_gradients_of_results():
    from functorch.compile import aot_function, make_boxed_func
    from torch.multiprocessing.reductions import StorageWeakRef

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            made = gradient * 2
            seen.append(StorageWeakRef(made.untyped_storage()))
            return made

    def backward(gm, _):
        def run(args):
            results = gm(*args)
            args.clear()
            freed.append(seen[0].expired())
            return results

        run._boxed_call = True
        return run

    seen, freed = [], []
    x = torch.randn(4, requires_grad=True)
    compiled = aot_function(torch.sin, fw_compiler=lambda gm, _: make_boxed_func(gm.forward), bw_compiler=backward)
    Spy.apply(compiled(x)).sum().backward()
    assert freed == [compat.frees_result_gradients()]
