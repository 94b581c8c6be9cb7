"""Kinds of towers without a LLaVA: their rows, by transformers' own models and small towers that are as LLaVA's."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llava_mmfuser import MMFuserConfig, MMFuserProjector
from llava_mmfuser.checkpoints.verdict import check_tower
from llava_mmfuser.hidden_states import capture_layers, return_layers
from llava_mmfuser.layers import Layers
from llava_mmfuser.towers import (
    TOWERS,
    TowerConfig,
    check_features,
    check_tower_is_there,
    kind_of,
    tower_config,
)

SIZES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2)
MODELS = {"CLIP": (CLIPVisionModel, CLIPVisionConfig), "SigLIP": (SiglipVisionModel, SiglipVisionConfig)}


def model_of(kind, **sizes):
    model, config = MODELS[kind]
    return model(config(image_size=56, patch_size=14, **{**SIZES, **sizes}))


class SigLipVisionTower(nn.Module):
    """As LLaVA-NeXT's: without the last block, and always the last of the hidden states."""

    def __init__(self, model):
        super().__init__()
        self.vision_tower = model
        vision = getattr(model, "vision_model", model)  # the same since transformers 5
        del vision.encoder.layers[-1:]
        vision.head = nn.Identity()

    def forward(self, images):
        dtype = next(self.vision_tower.parameters()).dtype
        states = self.vision_tower(images.to(dtype=dtype), output_hidden_states=True).hidden_states
        features = states[-1].to(images.dtype)
        assert features.shape[-2] == 16
        return features


@pytest.fixture
def images():
    return torch.rand(2, 3, 56, 56)


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("layers", [[0, 2, 5], [6]])
def test_layers_are_the_models_own_bit_for_bit(kind, layers, images):
    model = model_of(kind).eval()
    for row_type in TOWERS[kind].model_types[1:]:
        assert kind_of(row_type) == kind == kind_of(model.config.model_type)
    states = model(images, output_hidden_states=True).hidden_states
    first = int(TOWERS[kind].has_cls)
    assert torch.equal(
        capture_layers(model, images, layers, "patch"), torch.cat([states[i][:, first:] for i in layers], -1)
    )


def test_siglip_returns_its_layers_in_llavas_meaning(images):
    """-2 of the whole model is what a tower without its last block returns."""
    whole = model_of("SigLIP").eval()
    states = whole(images, output_hidden_states=True).hidden_states
    tower = SigLipVisionTower(whole).eval()
    plain = tower(images)
    assert torch.equal(plain, states[-2])
    layers = MMFuserConfig(num_heads=2).resolve(TowerConfig("SigLIP", 32, 6, 1)).layers
    assert layers == (1, 2, 3, 4, 5)
    return_layers(tower, layers)
    assert type(tower).__name__ == "SigLipVisionTower" and isinstance(tower, SigLipVisionTower)
    out = tower(images)
    assert torch.equal(out, torch.cat([states[i] for i in layers], -1)) and torch.equal(out[..., -32:], plain)
    assert tower(images.bfloat16()).dtype == torch.bfloat16
    tower.bfloat16()
    projector = MMFuserProjector.build(MMFuserConfig(num_heads=2), 32, nn.Sequential(nn.Linear(32, 64))).bfloat16()
    for trained in (False, True):  # products of another layout in memory may differ in the last bits
        tower.requires_grad_(trained)
        tower.select_layer = list(layers)
        fused = projector(tower(images.bfloat16()))
        tower.select_layer = None
        plain = tower(images.bfloat16())
        assert torch.equal(fused, projector[0](plain)), "a fresh fuser is the identity"
    assert not torch.equal(fused, projector[0](plain.contiguous())), "else this shows nothing"


@pytest.mark.parametrize("recompute", [False, True], ids=["", "gradient checkpointing"])
def test_siglip_that_is_trained_gets_gradients_through_every_layer(images, recompute):
    tower = SigLipVisionTower(model_of("SigLIP")).double().train()
    states = tower.vision_tower(images.double(), output_hidden_states=True).hidden_states
    torch.cat([states[index] for index in (0, 2, 4)], -1).sin().sum().backward()
    expected = {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}
    reached = {name.split("layers.")[1][0] for name in expected if "layers." in name}
    assert reached == set("0123") and any("embeddings" in name for name in expected)
    tower.zero_grad()
    return_layers(tower, [0, 2, 4])
    if recompute:
        tower.vision_tower.gradient_checkpointing_enable()
    ran = []
    blocks = getattr(tower.vision_tower, "vision_model", tower.vision_tower).encoder.layers
    blocks[0].self_attn.register_forward_pre_hook(lambda *_: ran.append(1))  # some blocks recompute within
    tower(images.double()).sin().sum().backward()
    assert len(ran) == 1 + recompute
    found = {name: parameter.grad for name, parameter in tower.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(found, expected)


def test_so400m_has_27_x_27_cells_and_heads_of_72_channels():
    """Its real width and map, two blocks deep."""
    sizes = dict(hidden_size=1152, intermediate_size=16, num_hidden_layers=3, num_attention_heads=16)
    model = SiglipVisionModel(SiglipVisionConfig(image_size=384, patch_size=14, **sizes)).eval()
    with torch.no_grad():
        pixels = torch.rand(1, 3, 384, 384)
        features = capture_layers(model, pixels, [1, 2], "patch")
        own = model(pixels, output_hidden_states=True).hidden_states[2]
    assert features.shape == (1, 27 * 27, 2 * 1152)
    settings = MMFuserConfig(layers="1,2").resolve(TowerConfig("SigLIP", 1152, 3, 1))
    projector = MMFuserProjector.build(settings, 1152, nn.Sequential(nn.Linear(1152, 8)))
    assert projector.fuser.cross_attn.value_proj.out_features // settings.num_heads == 72
    with torch.no_grad():
        assert torch.equal(projector(features), projector[0](own))
        projector.fuser.cross_gate.scale.fill_(0.5)
        assert projector(features).isfinite().all()


@pytest.mark.parametrize("layers", ["-1", "2,27", "3,-1"])
def test_layers_behind_a_deleted_block_are_refused(layers):
    siglip = TowerConfig("SigLIP", 1152, 27, 1)
    message = (
        "is not computed, because LLaVA deletes the last 1 of this vision tower's 27 blocks; its own layer is -2, "
    )
    with pytest.raises(ValueError, match=message):
        MMFuserConfig(layers=layers if layers != "-1" else Layers.parse(-1)).resolve(siglip)
    assert MMFuserConfig.from_llava(SimpleNamespace(mm_vision_select_layer=-2)).resolve(siglip).layers == (
        6,
        11,
        16,
        21,
        26,
    )


def folder(path, kind, **changes):
    model_of(kind).config.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return str(path)


def test_config_of_each_kind_is_read(tmp_path):
    for kind in TOWERS:
        found = tower_config(folder(tmp_path / kind, kind))
        assert found == TowerConfig(kind, 32, 6, int(kind == "SigLIP"))
    check_tower(dict(mm_hidden_size=32, mm_vision_select_layer=-2, mm_fuser_layers=[1, 5]), found)
    with pytest.raises(ValueError, match="mm_hidden_size=1152, but .* has width 32"):
        check_tower(dict(mm_hidden_size=1152, mm_vision_select_layer=-2), found)


@pytest.mark.parametrize("model_type", ["open_clip", "eva_clip", "dinov2", None])
def test_kind_without_a_row_is_refused_by_name(tmp_path, model_type):
    path = folder(tmp_path / "tower", "CLIP", model_type=model_type)
    with pytest.raises(ValueError, match=f"model_type={model_type!r}, but .* needs a CLIP or SigLIP tower"):
        tower_config(path)


def test_tokens_that_a_tower_lacks_are_refused():
    check_features(dict(mm_vision_select_feature="cls_patch"), "CLIP")
    with pytest.raises(ValueError, match="mm_vision_select_feature='cls_patch', but a SigLIP tower has no CLS"):
        check_features(dict(mm_vision_select_feature="cls_patch"), "SigLIP")


def test_resampler_is_refused():
    check_features(dict(mm_resampler_type=None))
    with pytest.raises(ValueError, match="mm_resampler_type='spatial_pool' together with mm_projector_type=mmfuser"):
        check_features(dict(mm_resampler_type="spatial_pool"))


def test_places_where_llava_finds_a_tower(tmp_path):
    for name in ("openai/clip-vit-large-patch14-336", "google/siglip-so400m-patch14-384", "Lin-Chen/ShareGPT4V-13B"):
        check_tower_is_there(dict(mm_vision_tower=name))
    for name in ("facebook/dinov2-large", "models/openai/clip"):
        with pytest.raises(
            ValueError, match="is no folder on this machine .* and LLaVA does not look for it on the hub"
        ):
            check_tower_is_there(dict(mm_vision_tower=name))
    with pytest.raises(
        ValueError, match="is a folder with a SigLIP tower, but LLaVA takes every folder for a CLIP tower"
    ):
        check_tower_is_there(dict(mm_vision_tower=folder(tmp_path / "siglip", "SigLIP")))
