"""Tower and projector as one graph, as public exports of LLaVA's `encode_images` make it: results equal, any batch."""

import warnings

import pytest
import torch
from tiny import projector_config, tower
from versions import TORCH

from llava_mmfuser.block.kinds import ATTENTION_KINDS, FUSIONS

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
LAYERS = (1, 3)
KINDS = [dict(mm_fuser_attention=kind) for kind in ATTENTION_KINDS] + [dict(mm_fuser_fusion=kind) for kind in FUSIONS]
IMAGES = torch.rand(3, 3, 28, 28), torch.rand(5, 3, 28, 28)


class Encoder(torch.nn.Module):
    def __init__(self, world, **settings):
        super().__init__()
        from llava.model.multimodal_projector.builder import build_vision_projector

        self.tower = tower(world, mm_vision_select_layer=LAYERS, **settings)
        self.projector = build_vision_projector(
            projector_config(mm_hidden_size=64, mm_vision_select_layer=LAYERS, **settings)
        )
        with torch.no_grad():
            for parameter in self.projector.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, images):
        return self.projector(self.tower(images))


def assert_equal(graph, encoder):
    for images in IMAGES:
        torch.testing.assert_close(graph(images), encoder(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: next(iter(settings.values())))
def test_every_kind_can_be_traced(world, settings):
    encoder = Encoder(world, mm_vision_select_feature="cls_patch", **settings).eval()
    assert_equal(torch.jit.trace(encoder, IMAGES[0]), encoder)


@pytest.mark.parametrize("inner", [pytest.param("mlp2x_gelu", marks=pytest.mark.slow), "linear"])
@pytest.mark.skipif(TORCH < (2, 2), reason="torch.compile of 2.1 makes no objects in a full graph")
def test_one_graph_under_torch_compile_and_its_gradients(world, inner):
    encoder = Encoder(world, mm_fuser_projector=inner)
    results = []
    for call in (torch.compile(encoder, fullgraph=True, backend="aot_eager"), encoder):
        features = call(IMAGES[0])
        results.append([features, *torch.autograd.grad(features.square().mean(), encoder.projector.parameters())])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def onnx(graph, encoder, file, **options):
    """Export as a user would, and compare with onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(graph, IMAGES[:1], file, input_names=["images"], output_names=["features"], **options)
    session = onnxruntime.InferenceSession(file)
    assert_equal(lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), encoder)


def test_onnx_by_torchscript_with_any_batch(world, tmp_path):
    encoder = Encoder(world).eval()
    options = {"opset_version": 17, "dynamic_axes": {"images": {0: "batch"}}, "dynamo": False}
    onnx(encoder, encoder, str(tmp_path / "encoder.onnx"), **options)


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (2, 5), reason="torch.export of this version has another interface")
def test_torch_export_with_any_batch_and_onnx_of_it(world, tmp_path):
    encoder = Encoder(world).eval()
    sizes = {"images": {0: torch.export.Dim("batch")}}
    program = torch.export.export(encoder, IMAGES[:1], dynamic_shapes=sizes, strict=False)
    assert_equal(program.module(), encoder)
    onnx(program, encoder, str(tmp_path / "encoder.onnx"), dynamo=True, verbose=False)
