"""The simple fusions: against their formulas, in front of a projector, and through LLaVA's own scripts."""

import json
from types import SimpleNamespace

import host
import pytest
import torch
from safetensors.torch import load_file
from test_training import answer
from transformers import CLIPVisionConfig

from llava_mmfuser.block.kinds import FUSIONS
from llava_mmfuser.checkpoints.adapter import match_adapter, read_adapter
from llava_mmfuser.config import MMFuserConfig
from llava_mmfuser.names import expected_shapes
from llava_mmfuser.projector import MMFuserProjector

SIMPLE = [name for name in FUSIONS if name != "mmfuser"]


def projector(kind="mlp2x_gelu", width=8, out=12):
    if kind == "linear":
        return torch.nn.Linear(width, out)
    return torch.nn.Sequential(torch.nn.Linear(width, out), torch.nn.GELU(), torch.nn.Linear(out, out))


def fused_projector(fusion, num_layers=5, kind="mlp2x_gelu", inner=None):
    settings = MMFuserConfig(layers=tuple(range(num_layers)), fusion=fusion, projector=kind)
    return MMFuserProjector.build(settings, 8, inner or projector(kind))


def test_formulas():
    layers = [torch.randn(2, 9, 8) for _ in range(5)]
    stacked = torch.stack(layers)
    features = torch.cat(layers, -1)
    inner = projector()
    for fusion, expected in {
        "mean": inner(stacked.mean(0)),
        "sum": inner(stacked.sum(0)),
        "token_concat": inner(torch.cat(layers, 1)),
    }.items():
        torch.testing.assert_close(fused_projector(fusion, inner=inner)(features), expected)

    weighted = fused_projector("weighted_sum", inner=inner)
    with torch.no_grad():
        weighted.fuser.scale.copy_(torch.tensor([0.5, -1, 2, 0, 3]))
    expected = inner(0.5 * layers[0] - layers[1] + 2 * layers[2] + 3 * layers[4])
    torch.testing.assert_close(weighted(features), expected)


@pytest.mark.parametrize("fusion,num_layers", [("channel_concat", 5), ("dense_channel", 5), ("dense_channel", 4)])
@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_wide_fusions_are_one_first_layer_over_all_channels(fusion, num_layers, kind):
    """The two stored parts equal a single Linear on the concatenated channels, as the published fusions have it."""
    layers = [torch.randn(2, 9, 8) for _ in range(num_layers)]
    found = fused_projector(fusion, num_layers, kind)
    torch.nn.init.normal_(found.fuser.extra.weight)
    if fusion == "channel_concat":
        others = layers[:-1]
    else:
        half = num_layers // 2
        others = [torch.stack(layers[:half]).mean(0), torch.stack(layers[half:]).mean(0)]
    first = found if kind == "linear" else getattr(found, "0")
    weight = torch.cat([first.weight, found.fuser.extra.weight], 1)
    expected = torch.nn.functional.linear(torch.cat([layers[-1], *others], -1), weight, first.bias)
    if kind != "linear":
        expected = getattr(found, "2")(torch.nn.functional.gelu(expected))
    torch.testing.assert_close(found(torch.cat(layers, -1)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_exactly_those_start_as_identity_that_say_so(fusion, dtype):
    inner = projector().to(dtype)
    settings = MMFuserConfig(layers=(1, 2, 3), fusion=fusion, num_heads=2)
    fused = MMFuserProjector.build(settings, 8, inner).to(dtype)
    layers = [torch.randn(2, 9, 8, dtype=dtype) for _ in range(3)]
    out, expected = fused(torch.cat(layers, -1)), inner(layers[-1])
    assert out.dtype == dtype
    assert (out.shape == expected.shape and torch.equal(out, expected)) == FUSIONS[fusion].starts_as_identity


@pytest.mark.parametrize("fusion", SIMPLE)
def test_querys_cls_token_passes_unfused(fusion):
    fused = fused_projector(fusion, 3)
    for parameter in fused.fuser.parameters():
        torch.nn.init.normal_(parameter)
    layers = [torch.randn(2, 10, 8) for _ in range(3)]
    out, inner = fused(torch.cat(layers, -1)), torch.nn.Sequential(*(getattr(fused, name) for name in "012"))
    torch.testing.assert_close(out[:, 0], inner(layers[-1][:, 0]))
    torch.testing.assert_close(out[:, 1:], fused(torch.cat([layer[:, 1:] for layer in layers], -1)))


@pytest.mark.parametrize("fusion", SIMPLE)
def test_every_weight_gets_a_gradient(fusion):
    fused = fused_projector(fusion)
    fused(torch.randn(1, 9, 40)).square().sum().backward()
    for name, parameter in fused.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


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


@pytest.mark.fp16_cpu
@pytest.mark.parametrize("flags", ROUTES, ids=["-".join(map(str, flags.values())) for flags in ROUTES])
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
        vision_config = CLIPVisionConfig.from_pretrained(world / "clip")
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
