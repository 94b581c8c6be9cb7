"""The block inside PyTorch's own machinery: torch.compile, activation checkpointing, FSDP2."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from versions import TORCH

from llava_mmfuser import MMFuser
from llava_mmfuser.block import registration, sampling_embedding_bag
from llava_mmfuser.block.sampling import deformable_sampling

compiles = pytest.mark.skipif(
    not registration.SUPPORTED, reason="torch before 2.7 cannot tell torch.compile from export"
)


def fuser_and_layers(width=32, side=4, count=3, batch=2):
    fuser = MMFuser(width, num_layers=count, num_heads=4)
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return fuser, [torch.randn(batch, side * side, width, requires_grad=True) for _ in range(count)]


def results(call, fuser, layers):
    out = call(layers)
    return [out.detach(), *torch.autograd.grad(out.square().mean(), [*fuser.parameters(), *layers])]


class Graphs(list):
    """A backend that runs what it is given and keeps it."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph

    def targets(self):
        return [str(node.target) for graph in self for node in graph.graph.nodes]


@compiles
@pytest.mark.parametrize("chosen,part", [(None, "::embedding_bag"), ("reference", "grid_sample")])
def test_compiled_graph_holds_what_runs_without_compiling(chosen, part, monkeypatch):
    if chosen:
        monkeypatch.setenv("LLAVA_MMFUSER_SAMPLING", chosen)
    fuser, layers = fuser_and_layers()
    graphs = Graphs()
    torch._dynamo.reset()
    torch.compile(fuser, fullgraph=True, backend=graphs)(layers)
    assert len(graphs) == 1
    found = [name for name in graphs.targets() if part in name.replace(".", "::")]
    assert len(found) == (2 if chosen is None else 3), graphs.targets()  # cross (two levels) and self


@compiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_the_same(dtype):
    fuser, layers = fuser_and_layers()
    fuser, layers = fuser.to(dtype), [layer.detach().to(dtype).requires_grad_() for layer in layers]
    torch._dynamo.reset()
    compiled = torch.compile(fuser, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, fuser, layers), results(fuser, fuser, layers))
    with torch.no_grad():
        torch.testing.assert_close(compiled(layers), fuser(layers))


@compiles
@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (True, True, True)], ids=str)
def test_operator_keeps_pytorchs_contract(needed):
    value = torch.randn(2, 2 * 12, 2, 8)
    offsets, logits = torch.randn(2, 12, 2, 2, 3, 2), torch.randn(2, 12, 2, 2, 3)
    inputs = [tensor.requires_grad_(need) for tensor, need in zip((value, offsets, logits), needed)]
    torch.library.opcheck(sampling_embedding_bag._OPERATOR, (*inputs, 3, 4))
    torch._dynamo.reset()
    found = torch.compile(deformable_sampling, fullgraph=True, backend="aot_eager")(*inputs, (3, 4))
    expected = deformable_sampling(*inputs, (3, 4))
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found, expected = ([out, *torch.autograd.grad(out.square().sum(), wanted)] for out in (found, expected))
    torch.testing.assert_close(found, expected)


@compiles
def test_gradients_of_gradients_are_refused_in_a_compiled_graph_too():
    tensors = torch.randn(1, 4, 1, 4), torch.randn(1, 4, 1, 1, 2, 2), torch.randn(1, 4, 1, 1, 2)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    out = sampling_embedding_bag._OPERATOR(*tensors, 2, 2)
    (grad,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        torch.autograd.grad(grad.sum(), tensors[1])


@compiles
@pytest.mark.slow
def test_inductor_compiles_forward_and_backward():
    fuser, layers = fuser_and_layers()
    torch._dynamo.reset()
    compiled = torch.compile(fuser, fullgraph=True)
    torch.testing.assert_close(results(compiled, fuser, layers), results(fuser, fuser, layers), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant):
    fuser, layers = fuser_and_layers()

    def recomputed(layers):
        return checkpoint(lambda *layers: fuser(layers), *layers, use_reentrant=reentrant)

    outs = [call(layers) for call in (recomputed, fuser)]
    gradients = []
    for out in outs:
        for leaf in (*fuser.parameters(), *layers):
            leaf.grad = None
        out.square().mean().backward()
        gradients.append([leaf.grad for leaf in (*fuser.parameters(), *layers)])
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*gradients)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(TORCH < (2, 6), reason="fully_shard is public from torch 2.6 on")
@pytest.mark.parametrize("of_each_leaf", [False, True], ids=["whole", "leaf by leaf"])
def test_fully_sharded_fuser_gives_the_same(one_rank, of_each_leaf):
    from torch.distributed.fsdp import fully_shard

    fuser, layers = fuser_and_layers()
    plain, mesh = copy.deepcopy(fuser), torch.distributed.init_device_mesh("cpu", (1,))
    if of_each_leaf:
        for leaf in [module for module in fuser.modules() if module is not fuser and not list(module.children())]:
            fully_shard(leaf, mesh=mesh)
    fully_shard(fuser, mesh=mesh)
    outs = [call(layers) for call in (fuser, plain)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().mean().backward()
    for found, expected in zip(fuser.parameters(), plain.parameters()):
        torch.testing.assert_close(found.grad.to_local(), expected.grad)
