"""The hook inside a real LLaVA, in this process: tower, projector, initialisation, existing projectors, bad input."""

import copy
import importlib
import inspect
import json
import logging
import pickle
import shutil
import typing
from types import SimpleNamespace

import pytest
import torch
from llava.model import LlavaLlamaForCausalLM, llava_arch
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from tiny import IMAGES, arguments, model_with, projector_config, tower
from torch.utils.checkpoint import checkpoint

from llava_mmfuser import MMFuser, MMFuserProjector, patching
from llava_mmfuser.block.kinds import ATTENTION_KINDS, FUSIONS
from llava_mmfuser.hooks import run
from llava_mmfuser.llava_patch import PATCHES


@pytest.mark.parametrize(
    "select_layer,layers",
    [(-2, [3, 4, 5, 6, 7]), ((1, 4, 8), [1, 4, 8]), ("list-8/-2", [1, 7]), ("0 3", [0, 3]), ([0, -1], [0, 8])],
)
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_tower_returns_the_layers_side_by_side(world, select_layer, layers, feature):
    vision = tower(world, mm_vision_select_layer=select_layer, mm_vision_select_feature=feature)
    assert vision.select_layer == layers and vision.hidden_size == 64
    states = vision.vision_tower(IMAGES, output_hidden_states=True).hidden_states
    expected = torch.cat([states[i] if feature == "cls_patch" else states[i][:, 1:] for i in layers], -1)
    assert torch.equal(vision(IMAGES), expected)
    assert torch.equal(vision.feature_select(SimpleNamespace(hidden_states=states)), expected)
    each = vision(list(IMAGES))
    assert [tuple(e.shape) for e in each] == [(1, *expected.shape[1:])] * 3
    torch.testing.assert_close(torch.cat(each), expected)


def test_tower_stops_after_the_deepest_requested_block(world):
    vision = tower(world, mm_vision_select_layer="1,5")
    ran = []
    for index, block in enumerate(vision.vision_tower.vision_model.encoder.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index + 1))
    vision(IMAGES)
    assert ran == [1, 2, 3, 4, 5]


def test_tower_returns_the_dtype_of_the_images(world):
    vision = tower(world).to(torch.bfloat16)
    assert vision(IMAGES).dtype == torch.float32 and vision(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_tower_loads_late_as_upstream(world):
    vision = CLIPVisionTower(str(world / "clip"), arguments(world), delay_load=True)
    assert not vision.is_loaded and vision.hidden_size == 64
    vision.load_model()
    assert vision(IMAGES).shape == (3, 16, 5 * 64)


@pytest.mark.parametrize(
    "inner,names",
    [
        ("mlp2x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias"]),
        ("linear", ["weight", "bias"]),
        ("mlp1x_gelu", ["0.weight", "0.bias"]),
        ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
    ],
)
def test_projector_keeps_upstreams_names_and_starts_as_upstream(inner, names):
    torch.manual_seed(1)
    plain = build_vision_projector(projector_config(mm_projector_type=inner))
    torch.manual_seed(1)
    fused = build_vision_projector(projector_config(mm_fuser_projector=inner))
    assert isinstance(fused, MMFuserProjector) and isinstance(fused.fuser, MMFuser)
    found = [name for name, _ in fused.named_parameters()]
    assert [name for name in found if not name.startswith("fuser.")] == names
    features = torch.randn(2, 9, 5 * 32)
    assert torch.equal(fused(features), plain(features[..., -32:]))
    fused.load_state_dict({**fused.state_dict(), **plain.state_dict()})


def test_cls_passes_the_fuser_unchanged():
    fused = build_vision_projector(projector_config())
    torch.nn.init.normal_(fused.fuser.cross_gate.scale)
    features = torch.randn(2, 10, 5 * 32)
    out, patches = fused(features), fused(features[:, 1:])
    torch.testing.assert_close(out[:, 1:], patches)
    query_cls = features[:, :1, -32:]
    torch.testing.assert_close(out[:, :1], fused._modules["2"](fused._modules["1"](fused._modules["0"](query_cls))))


@pytest.mark.parametrize(
    "features,message",
    [
        (torch.zeros(1, 9, 4 * 32), r"must be \[B, N, 5 \* 32\]"),
        (torch.zeros(1, 6, 5 * 32), "6 tokens are neither a square map nor one with CLS"),
        (torch.zeros(9, 5 * 32), "must be"),
    ],
)
def test_features_that_do_not_fit_the_projector_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        build_vision_projector(projector_config())(features)


def test_other_projector_types_are_upstreams_own_objects():
    for kind, expected in (("linear", torch.nn.Linear), ("mlp2x_gelu", torch.nn.Sequential)):
        assert type(build_vision_projector(projector_config(mm_projector_type=kind))) is expected
    with pytest.raises(ValueError, match="Unknown projector type: resampler"):
        build_vision_projector(projector_config(mm_projector_type="resampler"))


def test_pretraining_start_writes_a_config_that_describes_the_checkpoint(world):
    config = model_with(world, mm_fuser_num_heads=4).config
    assert {key: getattr(config, key) for key in vars(config) if key.startswith("mm_fuser")} == dict(
        mm_fuser_layers=[3, 4, 5, 6, 7],
        mm_fuser_projector="mlp2x_gelu",
        mm_fuser_fusion="mmfuser",
        mm_fuser_attention="deformable",
        mm_fuser_self_attention=True,
        mm_fuser_num_heads=4,
        mm_fuser_num_points=4,
        mm_fuser_window_size=3,
        mm_fuser_output="add",
        mm_fuser_start="identity",
        mm_fuser_lr=None,
        mm_fuser_gate_lr=None,
    )
    assert config.mm_projector_type == "mmfuser" and config.mm_vision_select_layer == -2


@pytest.mark.parametrize("given,query", [("list-8/-2", 7), (-3, -3), ((0, 5), 5)])
def test_select_layer_in_the_config_is_always_an_int(world, given, query):
    from llava_mmfuser.layers import Layers

    assert (
        model_with(world, mm_vision_select_layer=Layers.parse(given).select_layer).config.mm_vision_select_layer
        == query
    )


def without_fuser(folder):
    """Remove the fuser's tensors from a saved checkpoint."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    state = {key: value for key, value in load_file(file).items() if ".fuser." not in key}
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "loading",
    [
        dict(),
        dict(low_cpu_mem_usage=True),
        dict(low_cpu_mem_usage=True, device_map={"": "cpu"}),
        dict(low_cpu_mem_usage=True, device_map="auto", torch_dtype=torch.float16),
    ],
    ids=["default", "low_cpu", "device_map cpu", "device_map auto fp16"],
)
@pytest.mark.parametrize("missing", [True, False], ids=["fuser missing", "fuser there"])
def test_loading_restores_or_initialises_the_fuser(world, tmp_path, monkeypatch, caplog, loading, missing):
    model = model_with(world)
    with torch.no_grad():
        for parameter in model.get_model().mm_projector.parameters():
            parameter.uniform_(-1, 1)
    model.save_pretrained(tmp_path)
    if missing:
        without_fuser(tmp_path)

    from llava.utils import disable_torch_init

    saved_resets = torch.nn.Linear.reset_parameters, torch.nn.LayerNorm.reset_parameters
    with torch.device("meta"):  # it remembers which functions make tensors, and must not see the next one
        torch.empty(0)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    try:
        disable_torch_init()
        loaded = LlavaLlamaForCausalLM.from_pretrained(tmp_path, **loading)
    finally:
        torch.nn.Linear.reset_parameters, torch.nn.LayerNorm.reset_parameters = saved_resets
        monkeypatch.undo()
    projector = loaded.get_model().mm_projector
    for name, value in projector.state_dict().items():
        assert value.isfinite().all(), name
        if not (missing and name.startswith("fuser.")):
            torch.testing.assert_close(value, model.get_model().mm_projector.state_dict()[name].to(value.dtype))
    if missing:
        torch.manual_seed(0)
        fresh = MMFuser(64).state_dict()
        for name, value in projector.fuser.state_dict().items():
            if "_proj.weight" in name:
                assert 0 < value.abs().max() <= fresh[name].abs().max() * 1.02, name
            else:
                torch.testing.assert_close(value, fresh[name].to(value.dtype), msg=name)
        projector = projector.float()
        features = torch.randn(1, 16, 5 * 64)
        assert torch.equal(projector.fuser(features.unflatten(-1, (5, 64)).unbind(-2)), features[..., -64:])


def poison(tensor):
    return tensor.fill_(float("nan")) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor


def test_llavas_own_adapter_loads_and_the_fuser_stays_identity(caplog):
    plain = build_vision_projector(projector_config(mm_projector_type="mlp2x_gelu"))
    fused = build_vision_projector(projector_config())
    logging.getLogger("llava_mmfuser").addHandler(caplog.handler)
    fused.load_state_dict(plain.state_dict())
    logging.getLogger("llava_mmfuser").removeHandler(caplog.handler)
    assert "none of 24 fuser tensors is in this state dict" in caplog.text
    features = torch.randn(2, 9, 5 * 32)
    assert torch.equal(fused(features), plain(features[..., -32:]))
    with pytest.raises(RuntimeError, match="Missing key.*2.bias"):
        fused.load_state_dict({key: value for key, value in plain.state_dict().items() if key != "2.bias"})
    partial = {key: value for key, value in fused.state_dict().items() if key != "fuser.cross_gate.scale"}
    with pytest.raises(RuntimeError, match="Missing key.*fuser.cross_gate.scale"):
        fused.load_state_dict(partial)


def test_start_line_does_not_credit_an_adapter_that_has_no_fuser(world, tmp_path, caplog):
    logging.getLogger("llava_mmfuser").addHandler(caplog.handler)
    for kind, expected in (
        ("mlp2x_gelu", "fuser weights: fresh, starts as identity"),
        ("mmfuser", "fuser weights: from "),
    ):
        adapter = model_with(world, mm_projector_type=kind).get_model().mm_projector.state_dict()
        torch.save({"model.mm_projector." + name: value for name, value in adapter.items()}, tmp_path / "adapter.bin")
        caplog.clear()
        model_with(world, pretrain_mm_mlp_adapter=str(tmp_path / "adapter.bin"))
        assert expected in caplog.messages[-1]
    logging.getLogger("llava_mmfuser").removeHandler(caplog.handler)


def test_published_adapter_loads():
    source = build_vision_projector(projector_config())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.uniform_(-1, 1)
    theirs = {"cross_gate.scale": "gamma1", "self_gate.scale": "gamma2", "self_norm.weight": "norm1.weight"}
    theirs["self_norm.bias"] = "norm1.bias"
    published = {"0." + theirs.get(name, name): value for name, value in source.fuser.state_dict().items()}
    for ours, their in (("0", "1"), ("2", "3")):
        published.update({f"{their}.{kind}": source.state_dict()[f"{ours}.{kind}"] for kind in ("weight", "bias")})
    fused = build_vision_projector(projector_config())
    fused.load_state_dict(published)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in fused.state_dict().items())


@pytest.mark.parametrize(
    "settings",
    [dict(mm_fuser_attention=kind) for kind in ATTENTION_KINDS]
    + [dict(mm_fuser_fusion=name) for name, row in FUSIONS.items() if row.starts_as_identity and name != "mmfuser"],
    ids=lambda settings: next(iter(settings.values())),
)
def test_released_checkpoint_answers_identically_after_the_switch(world, settings):
    torch.manual_seed(3)
    released = model_with(world, mm_projector_type="mlp2x_gelu").eval()
    switched = copy.deepcopy(released)
    inner = switched.get_model().mm_projector
    switched.get_model().initialize_vision_modules(arguments(world, **settings))
    projector = switched.get_model().mm_projector
    assert isinstance(projector, MMFuserProjector) and projector._modules["0"] is inner[0]
    assert all(parameter.requires_grad for parameter in projector.parameters())
    assert switched.config.mm_projector_type == "mmfuser" and switched.config.mm_fuser_projector == "mlp2x_gelu"
    ids = torch.tensor([[1, -200, 5, 6], [1, -200, 7, 8]])
    with torch.no_grad():
        assert torch.equal(released(ids, images=IMAGES[:2]).logits, switched(ids, images=IMAGES[:2]).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.fp16_cpu)])
@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_projector_gets_the_query_in_the_layout_that_llavas_own_has(world, dtype, feature):
    """Of several pictures the map is a view behind CLS, and products of a view may differ in the last bits."""
    model = model_with(world, mm_projector_type="mlp2x_gelu", mm_vision_select_feature=feature).to(dtype)
    plain, whole = model.encode_images(IMAGES.to(dtype)), model.get_vision_tower()(IMAGES.to(dtype)).contiguous()
    if feature == "patch":
        assert not torch.equal(model.get_model().mm_projector(whole), plain), "else this shows nothing"
    model.get_model().initialize_vision_modules(arguments(world, mm_vision_select_feature=feature))
    for trained in (False, True):
        model.get_vision_tower().requires_grad_(trained)
        assert torch.equal(model.encode_images(IMAGES.to(dtype)), plain)


@pytest.mark.parametrize("fusion", [fusion for fusion, row in FUSIONS.items() if not row.starts_as_identity])
def test_fusions_that_are_no_identity_say_so_in_front_of_a_released_checkpoint(world, caplog, fusion):
    logging.getLogger("llava_mmfuser").addHandler(caplog.handler)
    model = model_with(world, mm_projector_type="mlp2x_gelu")
    model.get_model().initialize_vision_modules(arguments(world, mm_fuser_fusion=fusion))
    logging.getLogger("llava_mmfuser").removeHandler(caplog.handler)
    assert any(f"mm_fuser_fusion={fusion} does not start as an identity" in line for line in caplog.messages)
    assert model(torch.tensor([[1, -200, 5]]), images=IMAGES[:1]).logits.isfinite().all()


def test_tokens_of_several_layers_and_tiles_do_not_go_together(world):
    with pytest.raises(ValueError, match="mm_patch_merge_type=spatial_unpad together with .*token_concat"):
        model_with(world, mm_fuser_fusion="token_concat", mm_patch_merge_type="spatial_unpad")


def test_second_finetune_judges_flags_by_the_checkpoints_kind(world):
    model = model_with(world, mm_fuser_attention="window")
    model.get_model().initialize_vision_modules(arguments(world, mm_fuser_window_size=3))
    with pytest.raises(ValueError, match="mm_fuser_num_points=4 has no effect with mm_fuser_attention=window"):
        model.get_model().initialize_vision_modules(arguments(world, mm_fuser_num_points=4))
    model = model_with(world, mm_fuser_fusion="token_concat")
    with pytest.raises(ValueError, match="mm_patch_merge_type=spatial_unpad together with .*token_concat"):
        model.get_model().initialize_vision_modules(arguments(world, mm_patch_merge_type="spatial_unpad"))
    import llava.train.llava_trainer  # noqa: F401  (mm_fuser_lr asks for it)

    model = model_with(world, mm_fuser_fusion="mean")
    with pytest.raises(ValueError, match="mm_fuser_lr=0.0001 has no effect with mm_fuser_fusion=mean"):
        model.get_model().initialize_vision_modules(arguments(world, mm_fuser_lr=1e-4))


def test_second_finetune_may_repeat_a_set_by_name_but_not_name_another(world):
    model = model_with(world, mm_fuser_layers="shallow", mm_vision_select_layer=-2)
    again = arguments(world, mm_fuser_layers="shallow", mm_vision_select_layer=-2)
    model.get_model().initialize_vision_modules(again)
    assert model.config.mm_fuser_layers == [1, 2, 3, 4, 7]
    with pytest.raises(ValueError, match="but the checkpoint was trained with"):
        model.get_model().initialize_vision_modules(
            arguments(world, mm_fuser_layers="uniform", mm_vision_select_layer=-2)
        )


def test_second_finetune_keeps_layers_and_weights(world):
    model = model_with(world, mm_vision_select_layer=(1, 4, 7))
    fuser = model.get_model().mm_projector.fuser
    model.get_model().initialize_vision_modules(arguments(world, mm_vision_select_layer=-2))
    assert model.get_model().mm_projector.fuser is fuser
    assert model.config.mm_fuser_layers == [1, 4, 7] and model.get_vision_tower().select_layer == [1, 4, 7]


def test_second_finetune_of_a_config_without_resolved_layers(world):
    model = model_with(world, mm_vision_select_layer=(1, 4, 7))
    model.config.mm_fuser_layers = [-8, -5, -2]
    model.get_model().initialize_vision_modules(arguments(world, mm_vision_select_layer=(1, 4, 7)))
    assert model.config.mm_fuser_layers == [1, 4, 7]


def test_layers_of_an_existing_model_are_those_of_its_own_tower(world, tmp_path):
    from toy import models

    models.make_clip(tmp_path / "deeper", num_hidden_layers=12)
    model = model_with(world, mm_projector_type="mlp2x_gelu")
    model.get_model().initialize_vision_modules(arguments(world, vision_tower=str(tmp_path / "deeper")))
    assert model.config.mm_fuser_layers == [3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(mm_projector_type="mlp2x_gelu"), "checkpoint has a fuser .* write --mm_projector_type mmfuser"),
        (dict(mm_fuser_num_points=2), "mm_fuser_num_points=2, but the checkpoint was trained with 4"),
        (dict(mm_vision_select_layer=(1, 7)), "mm_fuser_layers=1,7, but the checkpoint was trained with 3,4,5,6,7"),
    ],
)
def test_script_that_contradicts_a_fuser_checkpoint_is_refused(world, settings, message):
    model = model_with(world)
    with pytest.raises(ValueError, match=message):
        model.get_model().initialize_vision_modules(arguments(world, **settings))


def test_projector_flag_that_contradicts_a_released_checkpoint_is_refused(world):
    model = model_with(world, mm_projector_type="mlp2x_gelu")
    with pytest.raises(ValueError, match="mm_fuser_projector='linear', but the checkpoint's projector is 'mlp2x_gelu'"):
        model.get_model().initialize_vision_modules(arguments(world, mm_fuser_projector="linear"))


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(mm_vision_select_layer=(3, 9)), "layer 9 does not exist; this vision tower has 8 blocks"),
        (dict(mm_fuser_num_heads=5), "mm_fuser_num_heads=5 does not divide the feature width 64"),
        (dict(s2=True), "s2=True together with mm_projector_type=mmfuser"),
        (dict(mm_vision_select_feature="cls"), "select feature|mm_vision_select_feature='cls'"),
    ],
)
def test_tower_refuses_settings_before_it_reads_weights(world, settings, message, monkeypatch):
    if "mm_vision_select_feature" not in settings:
        monkeypatch.setattr(CLIPVisionTower, "load_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=message):
        tower(world, **settings)(IMAGES)


@pytest.mark.parametrize(
    "model_type,message",
    [
        ("dinov2", "model_type='dinov2', but mm_projector_type=mmfuser needs a CLIP or SigLIP tower"),
        ("siglip_vision_model", "is a folder with a SigLIP tower, but LLaVA takes every folder for a CLIP tower"),
    ],
)
def test_tower_that_this_llava_cannot_read_is_refused(world, tmp_path, model_type, message):
    shutil.copytree(world / "clip", tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    for read in (lambda path: CLIPVisionTower(path, arguments(world)), lambda path: run._host_tower(path)):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path / "tower"))


def test_replaced_functions_answer_as_the_originals():
    """Whoever looks at them: introspection, pickling, code that goes through `__wrapped__`."""
    for module in PATCHES:
        importlib.import_module(module)
    for row in [row for row in sum(PATCHES.values(), ()) if row.replacement is not None]:
        if patching.check_row(row)[0] != "ok" or row.target not in patching._originals:  # of another host
            assert row.host or "transformers.models.llava" in row.target
            continue
        owner, name = patching._owner(row.target)
        found, original = inspect.getattr_static(owner, name), patching._originals[row.target]
        assert found is not original and type(found) is type(original), row.target
        public = getattr(owner, name)
        assert pickle.loads(pickle.dumps(public)) == public
        found, original = (getattr(function, "__func__", function) for function in (found, original))
        for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__", "__wrapped__"):
            assert getattr(found, attribute, None) is getattr(original, attribute, None) or (
                getattr(found, attribute) == getattr(original, attribute)
            ), (row.target, attribute)
        for look in (inspect.signature, inspect.getfullargspec, inspect.getsource, inspect.getsourcefile):
            assert look(found) == look(original), (row.target, look)
        assert typing.get_type_hints(found) == typing.get_type_hints(original)
    assert llava_arch.build_vision_projector is build_vision_projector  # as without the package


def test_a_plain_tower_is_upstreams_own(world):
    plain, fused = tower(world, mm_projector_type="mlp2x_gelu"), tower(world)
    assert type(plain) is CLIPVisionTower and isinstance(fused, CLIPVisionTower) and repr(fused) == repr(plain)
    assert not any("CLIPVisionTower" in target and "__init__" not in target for target in patching._originals)
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    assert inspect.getsource(fused.forward) == inspect.getsource(plain.forward)
    plain.requires_grad_(True)
    assert plain.forward.__wrapped__(plain, IMAGES).requires_grad and not plain(IMAGES).requires_grad


@pytest.mark.parametrize("recompute", [False, True], ids=["", "gradient checkpointing"])
@pytest.mark.parametrize("host", ["no_grad", "trains", "__wrapped__"])
def test_the_host_decides_whether_the_tower_is_trained(world, monkeypatch, host, recompute):
    model, images = model_with(world, mm_fuser_attention="window").double().train(), IMAGES.double()
    vision, projector = model.get_vision_tower(), model.get_model().mm_projector
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    vision.requires_grad_(True)
    states = vision.vision_tower(images, output_hidden_states=True).hidden_states
    projector(torch.cat([states[index][:, 1:] for index in vision.select_layer], -1)).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in vision.named_parameters() if parameter.grad is not None}
    above = {name for name, _ in vision.named_parameters()} - set(expected)
    assert above and all("layers.7." in name or "post_layernorm" in name for name in above)

    if host == "trains":  # as people edit their checkout, and as LLaVA-NeXT is
        monkeypatch.setattr(CLIPVisionTower, "forward", CLIPVisionTower.forward.__wrapped__)
    elif host == "__wrapped__":  # as public saliency code calls it
        monkeypatch.setattr(vision, "forward", lambda images: type(vision).forward.__wrapped__(vision, images))
    if recompute:
        model.gradient_checkpointing_enable()
    model.zero_grad()
    ran = []
    vision.vision_tower.vision_model.encoder.layers[0].register_forward_hook(lambda *_: ran.append(1))
    model.encode_images(images).square().sum().backward()
    if host == "no_grad":
        assert all(parameter.grad is None for parameter in vision.parameters()) and len(ran) == 1
        return
    assert len(ran) == 1 + recompute
    found = {name: parameter.grad for name, parameter in vision.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(found, expected)


def test_a_tower_with_a_fuser_can_be_copied_pickled_and_derived_from(world):
    class Derived(CLIPVisionTower):
        def forward(self, images):
            self.seen = images.shape
            return 2 * super().forward(images)

    vision = tower(world)
    expected = vision(IMAGES)
    copies = [copy.copy(vision), copy.deepcopy(vision), vision._replicate_for_data_parallel()]
    copies += [pickle.loads(pickle.dumps(vision, protocol)) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)]
    for other in copies:
        assert type(other) is type(vision) and torch.equal(other(IMAGES), expected)
    derived = Derived(str(world / "clip"), arguments(world))
    assert torch.equal(derived(IMAGES), 2 * expected) and derived.seen == IMAGES.shape
    vision.select_layer = -2
    assert torch.equal(vision(IMAGES), expected[..., -64:])


def test_a_tower_of_several_scales_is_refused(world):
    class CLIPVisionTowerS2(CLIPVisionTower):
        """Of LLaVA's main, in so far as it matters."""

        def forward_feature(self, images):
            return super().forward(images)

    with pytest.raises(ValueError, match="s2=True together with mm_projector_type=mmfuser"):
        CLIPVisionTowerS2(str(world / "clip"), arguments(world))
    model = model_with(world, mm_projector_type="mlp2x_gelu")
    model.get_model().vision_tower = CLIPVisionTowerS2(
        str(world / "clip"), arguments(world, mm_projector_type="mlp2x_gelu")
    )
    with pytest.raises(ValueError, match="s2=True together with mm_projector_type=mmfuser"):
        model.get_model().initialize_vision_modules(arguments(world))


def test_a_tower_of_a_class_that_is_not_hooked_is_refused(world, monkeypatch):
    class MLCDVisionTower(torch.nn.Module):
        """Of LLaVA-NeXT, in so far as it matters."""

        hidden_size, select_layer, is_loaded = 64, -2, True
        vision_tower_name = config = None

    monkeypatch.setattr(llava_arch, "build_vision_tower", lambda *_, **__: MLCDVisionTower())
    with pytest.raises(
        ValueError, match="MLCDVisionTower returns one layer; with mm_projector_type=mmfuser use a tower"
    ):
        model_with(world)


def test_projector_answers_as_llavas_own():
    plain = build_vision_projector(projector_config(mm_projector_type="mlp2x_gelu"))
    fused = build_vision_projector(projector_config())
    assert len(fused) == len(plain) and repr(fused[:2]) == repr(plain[:2]) and repr(list(fused)) == repr(list(plain))
    assert fused[0] is fused[-3] and fused[-1].out_features == 48 and fused[0].in_features == 32 and fused[2] in fused
    fused[0].weight.data.zero_()
    assert not fused.state_dict()["0.weight"].any()
    for index in (3, -4):
        with pytest.raises(IndexError):
            fused[index]
    assert not hasattr(fused, "weight") and not hasattr(fused, "in_features")

    plain = build_vision_projector(projector_config(mm_projector_type="linear"))
    fused = build_vision_projector(projector_config(mm_fuser_projector="linear"))
    assert fused and (fused.in_features, fused.out_features) == (plain.in_features, plain.out_features) == (32, 48)
    assert fused.weight.shape == plain.weight.shape and fused.bias.shape == plain.bias.shape
    for ask in (len, iter, lambda projector: projector[0]):
        with pytest.raises(TypeError):
            ask(plain)
        with pytest.raises(TypeError, match="has no items"):
            ask(fused)


@pytest.mark.parametrize(
    "settings",
    [dict(mm_fuser_attention=kind) for kind in ATTENTION_KINDS] + [dict(mm_fuser_fusion=kind) for kind in FUSIONS],
    ids=lambda settings: next(iter(settings.values())),
)
def test_projector_under_activation_checkpointing_and_saved_tensor_hooks(settings):
    projector = build_vision_projector(projector_config(mm_fuser_num_heads=4, **settings))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)

    def gradients(call, trained):
        features = torch.arange(2 * 9 * 160).view(2, 9, 160).sin().requires_grad_(trained)
        projector.zero_grad()
        call(features).square().sum().backward()
        return [features.grad] * trained + [parameter.grad for parameter in projector.parameters()]

    def on_cpu(features):
        with torch.autograd.graph.save_on_cpu():
            return projector(features)

    for trained in (True, False):
        expected = gradients(projector, trained)
        calls = [lambda features: checkpoint(projector, features, use_reentrant=False), on_cpu]
        calls += [lambda features: checkpoint(projector, features, use_reentrant=True)] * trained
        for call in calls:
            torch.testing.assert_close(gradients(call, trained), expected)
