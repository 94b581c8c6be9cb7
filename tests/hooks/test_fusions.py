"""Other fusions and attention kinds through LLaVA's own scripts."""

import json
from types import SimpleNamespace

import host
import pytest
import torch
from blocks import SIMPLE, fused_projector
from safetensors.torch import load_file
from tiny import answer

from llava_mmfuser.block.kinds import FUSIONS
from llava_mmfuser.checkpoints.adapter import match_adapter, read_adapter
from llava_mmfuser.config import MMFuserConfig
from llava_mmfuser.names import expected_shapes
from llava_mmfuser.towers import tower_config


def test_more_tokens_than_a_sequence_may_have_are_refused_before_training():
    from llava_mmfuser.hooks.optimizer import check_token_budget

    model = torch.nn.Module()
    model.tower = torch.nn.Module()
    model.tower.select_layer, model.tower.num_patches = [1, 2, 3], 576
    model.mm_projector = fused_projector("token_concat", 3)
    model.config = SimpleNamespace(tokenizer_model_max_length=2048)
    check_token_budget(model, model.mm_projector)
    model.config.tokenizer_model_max_length = 1728
    with pytest.raises(ValueError, match="model_max_length=1728, .* makes 1728 tokens of one image .3 layers of 576"):
        check_token_budget(model, model.mm_projector)
    check_token_budget(model, fused_projector("mean", 3))


ROUTES = [dict(mm_fuser_fusion=fusion) for fusion in SIMPLE] + [
    dict(mm_fuser_attention=kind, mm_fuser_num_heads=4) for kind in ("dense", "window")
]
FOR_ALL = ("weighted_sum", "window")  # one that folds, and one that attends


def route(flags):
    name = "-".join(map(str, flags.values()))
    chosen = any(kind in name for kind in FOR_ALL)
    return pytest.param(flags, id=name, marks=() if chosen else (pytest.mark.matrix, pytest.mark.slow))


@pytest.mark.fp16_cpu
@pytest.mark.parametrize("flags", [route(flags) for flags in ROUTES])
def test_trains_saves_reloads_and_answers_through_upstreams_scripts(world, tmp_path, flags):
    pretrained, finetuned = tmp_path / "llava-pretrain", tmp_path / "llava-finetune"
    flags = {**flags, "mm_fuser_layers": "shallow"}
    done = host.train(world, pretrained, **flags)
    is_identity = FUSIONS[flags.get("mm_fuser_fusion", "mmfuser")].starts_as_identity
    assert ("does not start as an identity" in done.stdout) != is_identity
    adapter = pretrained / "mm_projector.bin"
    done = host.train(world, finetuned, "finetune", pretrain_mm_mlp_adapter=adapter, **flags)
    has_weights = any("fuser." in name for name in torch.load(adapter, map_location="cpu"))
    assert f"fuser weights: {f'from {adapter}' if has_weights else 'it has none'}" in done.stdout
    assert "does not start as an identity" not in done.stdout, "it was trained by now"
    config = json.loads((finetuned / "config.json").read_text())
    assert config["mm_fuser_layers"] == [1, 2, 3, 4, 7] and config["mm_vision_select_layer"] == -2
    for name, value in flags.items():
        assert name == "mm_fuser_layers" or config[name] == value

    trained, log = answer(world, finetuned, tmp_path / "full.pt")
    assert trained["answer"].numel() > 0 and trained["logits"].isfinite().all()
    saved = {
        name.split("mm_projector.")[1]: value
        for name, value in load_file(finetuned / "model.safetensors").items()
        if "mm_projector." in name
    }
    assert set(saved) == set(trained["projector"])
    assert all(torch.equal(value.half(), trained["projector"][name]) for name, value in saved.items())
    if has_weights:
        start = torch.load(adapter, map_location="cpu")
        assert any(
            not torch.equal(start["model.mm_projector." + name].float(), value.float())
            for name, value in saved.items()
            if name.startswith("fuser.")
        ), "finetuning moved the fusion's own weights"
    adapted, _ = answer(world, pretrained, tmp_path / "adapter.pt", world / "llama")
    assert adapted["logits"].isfinite().all()


def test_adapter_of_another_fusion_without_weights_is_refused(world, tmp_path):
    """mean and sum have the same weights, none; the config.json beside the adapter tells them apart."""
    host.train(world, tmp_path / "llava-mean", mm_fuser_fusion="mean", max_steps=1)
    done = host.train(
        world,
        tmp_path / "llava-sum",
        "finetune",
        check=False,
        mm_fuser_fusion="sum",
        pretrain_mm_mlp_adapter=tmp_path / "llava-mean" / "mm_projector.bin",
    )
    assert done.returncode and "was trained with mm_fuser_fusion=mean, but this run has sum" in done.stdout
    for fusion in ("mmfuser", "weighted_sum"):
        settings = MMFuserConfig(layers=(3, 4, 5, 6, 7), fusion=fusion)
        vision_config = tower_config(str(world / "clip"))
        with pytest.raises(ValueError, match=f"mm_fuser_fusion=mean, but this run has {fusion}"):
            path = str(tmp_path / "llava-mean" / "mm_projector.bin")
            shapes = expected_shapes(settings, vision_config.hidden_size, 64)
            match_adapter(path, read_adapter(path), settings, shapes, vision_config)


@pytest.mark.slow
@pytest.mark.deepspeed_cpu
@pytest.mark.parametrize(
    "flags",
    [
        dict(mm_fuser_fusion="weighted_sum"),
        dict(mm_fuser_fusion="channel_concat"),
        dict(mm_fuser_attention="window", mm_fuser_num_heads=4),
    ],
    ids=["weighted_sum", "channel_concat", "window"],
)
def test_trains_under_zero_3_on_two_ranks(world, tmp_path, flags):
    done = host.deepspeed(world, tmp_path / "llava-zero3", host.zero(tmp_path, 3), **flags)
    state = torch.load(tmp_path / "llava-zero3" / "mm_projector.bin", map_location="cpu")
    fuser = {name.split("fuser.")[1]: value.float() for name, value in state.items() if "fuser." in name}
    assert fuser and all(value.isfinite().all() for value in fuser.values()), done.stdout[-2000:]
    if "scale" in fuser:
        assert not torch.equal(fuser["scale"], torch.tensor([0.0, 0, 0, 0, 1])) and 0.5 < fuser["scale"][-1] < 1.5
    else:
        assert fuser.get("extra.weight", fuser.get("cross_gate.scale")).abs().sum() > 0
