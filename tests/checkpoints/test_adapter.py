"""Adapters: names, kinds, shapes, and bad ones; nothing in a file is ever run."""

import json
import pickle

import pytest
import torch
from llava.model import LlavaMistralForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig
from tiny import IMAGES, arguments, model_with

from llava_mmfuser import MMFuserConfig, MMFuserProjector
from llava_mmfuser.checkpoints.adapter import read_adapter
from llava_mmfuser.checkpoints.files import save_tensors
from llava_mmfuser.names import describe, expected_shapes, from_published, to_published


def projector_of(model):
    return model.get_model().mm_projector


def written(folder, state, name="mm_projector.bin"):
    folder.mkdir(exist_ok=True)
    torch.save({"model.mm_projector." + key: value for key, value in state.items()}, folder / name)
    return folder / name


def randomised(model):
    with torch.no_grad():
        for parameter in projector_of(model).parameters():
            parameter.uniform_(-1, 1)
    return model


def test_names_translate_both_ways():
    for linear, names in ((False, ["0.weight", "0.bias", "2.weight", "4.bias"]), (True, ["weight", "bias"])):
        for name in [*names, "fuser.cross_gate.scale", "fuser.self_norm.bias", "fuser.cross_attn.value_proj.weight"]:
            assert from_published(to_published(name), linear) == name
    assert to_published("fuser.cross_gate.scale") == "0.gamma1" and to_published("2.bias") == "3.bias"


@pytest.mark.parametrize("inner", ["mlp2x_gelu", "linear", "mlp3x_gelu"])
@pytest.mark.parametrize("self_attention", [True, False])
def test_expected_shapes_are_those_of_a_real_projector(world, inner, self_attention):
    model = model_with(world, mm_fuser_projector=inner, mm_fuser_self_attention=self_attention)
    settings = MMFuserConfig.from_llava(model.config)
    assert expected_shapes(settings, 64, model.config.hidden_size) == projector_of(model).shapes()


@pytest.mark.parametrize(
    "names,kind",
    [
        (["model.mm_projector.fuser.cross_gate.scale", "model.mm_projector.0.weight"], "an adapter of llava_mmfuser"),
        (["0.gamma1", "1.weight"], "an adapter of the authors' MMFuser fork"),
        (["weight", "bias"], "an adapter of LLaVA with a linear projector"),
        (["0.weight", "0.bias", "2.weight", "2.bias"], "an adapter of LLaVA with an mlp2x_gelu projector"),
        (["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], "LoRA weights of a language model"),
        (["model.layers.0.mlp.up_proj.weight"], "weights of a whole model, without a projector"),
        (["model.layers.0.mlp.up_proj.weight", "model.mm_projector.0.weight"], "weights of a whole model"),
        (["foo"], "unknown"),
        ([], "empty"),
    ],
)
def test_kinds_of_files(names, kind):
    assert describe(names) == kind


@pytest.mark.parametrize("inner", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("form", ["ours", "LLaVA's", "authors'"])
def test_adapters_load_through_the_flag(world, tmp_path, inner, form):
    source = projector_of(randomised(model_with(world, mm_fuser_projector=inner))).state_dict()
    state = {
        "ours": source,
        "LLaVA's": {name: value for name, value in source.items() if not name.startswith("fuser.")},
        "authors'": {to_published(name): value for name, value in source.items()},
    }[form]
    adapter = written(tmp_path / "a", state)
    model = model_with(world, mm_fuser_projector=inner, pretrain_mm_mlp_adapter=str(adapter))
    for name, value in projector_of(model).state_dict().items():
        if form == "LLaVA's" and name.startswith("fuser."):
            assert "gate" not in name or not value.any()
        else:
            assert torch.equal(value, source[name]), name


class Malicious:
    def __reduce__(self):
        return print, ("code of the file was run",)


def bad_file(kind, path):
    if kind == "truncated":
        written(path.parent, {"0.weight": torch.zeros(100, 100)}, path.name)
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif kind == "code":
        path.write_bytes(pickle.dumps({"model.mm_projector.0.weight": Malicious()}))
    elif kind == "no state dict":
        torch.save([torch.zeros(2)], path)
    elif kind == "numbers":
        torch.save({"model.mm_projector.0.weight": 3}, path)
    elif kind == "no projector":
        torch.save({"model.layers.0.mlp.up_proj.weight": torch.zeros(2)}, path)
    elif kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    "kind,message",
    [
        ("missing", "no such file"),
        ("folder", "a folder; name the file in it, such as mm_projector.bin"),
        ("truncated", r"bytes\) cannot be read as tensors saved by torch.save .*truncated"),
        ("empty", r"\(0 bytes\) cannot be read"),
        ("text", "cannot be read as tensors .* holds other Python objects"),
        ("code", "cannot be read as tensors .* could run code"),
        ("no state dict", "holds a list, not a state dict"),
        ("numbers", "holds a dict of int, not a state dict"),
        ("no projector", "no weights of a projector .*looks like weights of a whole model, without a projector"),
    ],
)
def test_unreadable_adapters_are_refused_before_any_weight_is_read(world, tmp_path, capfd, kind, message):
    import host

    path = tmp_path / "mm_projector.bin"
    bad_file(kind, path)
    with pytest.raises(ValueError, match=message):
        read_adapter(str(path))
    if kind in ("missing", "code"):
        options = dict(model_name_or_path=tmp_path / "no-such-model", pretrain_mm_mlp_adapter=path)
        done = host.train(world, tmp_path / "out", "finetune", check=False, **options)
        last = done.stdout.splitlines()[-1]
        assert done.returncode and last.startswith(f"ValueError: pretrain_mm_mlp_adapter={path}"), done.stdout[-2000:]
        assert not (tmp_path / "out").exists() and "was run" not in done.stdout
    assert "was run" not in capfd.readouterr().out


def test_misfitting_adapters_are_refused_with_every_name(world, tmp_path):
    state = projector_of(model_with(world)).state_dict()
    wrong = {
        "missing 2.bias, fuser.feat_norm.weight": {
            k: v for k, v in state.items() if k not in ("2.bias", "fuser.feat_norm.weight")
        },
        "unexpected 4.weight": {**state, "4.weight": torch.zeros(2)},
        "0.weight is \\[64, 32\\] instead of \\[64, 64\\]": {**state, "0.weight": torch.zeros(64, 32)},
    }
    for message, weights in wrong.items():
        path = written(tmp_path, weights)
        before = path.read_bytes()
        with pytest.raises(
            ValueError, match=f"does not fit this model's projector: .*{message}.*looks like an adapter"
        ):
            model_with(world, pretrain_mm_mlp_adapter=str(path))
        assert path.read_bytes() == before
    linear = projector_of(model_with(world, mm_projector_type="linear")).state_dict()
    with pytest.raises(
        ValueError,
        match="missing 0.weight, .* unexpected weight, bias. It looks like an adapter of LLaVA with a linear",
    ):
        model_with(world, pretrain_mm_mlp_adapter=str(written(tmp_path, linear)))


@pytest.mark.parametrize(
    "trained,message",
    [
        (
            dict(mm_vision_select_layer=(1, 2, 3, 5, 7)),
            "mm_fuser_layers=1,2,3,5,7, but this run has 3,4,5,6,7; add --mm_fuser_layers 1,2,3,5,7",
        ),
        (dict(mm_fuser_num_heads=8, mm_fuser_num_points=8), "mm_fuser_num_heads=8, but this run has 16"),
    ],
)
def test_adapter_of_other_settings_is_refused(world, tmp_path, trained, message):
    """The first has weights of the same shapes: only the config.json beside it can tell."""
    model = model_with(world, **trained)
    path = written(tmp_path, projector_of(model).state_dict())
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        model_with(world, pretrain_mm_mlp_adapter=str(path))
    fits = model_with(world, pretrain_mm_mlp_adapter=str(path), **trained)
    assert fits.config.mm_fuser_layers == model.config.mm_fuser_layers


def test_authors_adapter_with_other_layers_is_refused(world, tmp_path):
    state = projector_of(model_with(world)).state_dict()
    path = written(tmp_path, {to_published(name): value for name, value in state.items()})
    (tmp_path / "config.json").write_text(
        json.dumps({"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": [-8, -7, -6, -4, -2]})
    )
    with pytest.raises(ValueError, match="mm_fuser_layers=1,2,3,5,7, but this run has 3,4,5,6,7"):
        model_with(world, pretrain_mm_mlp_adapter=str(path))
    model_with(world, pretrain_mm_mlp_adapter=str(path), mm_vision_select_layer="list-8/-7/-6/-4/-2")


def test_model_base_with_a_misfitting_adapter_is_refused_before_the_language_model_is_read(
    world, tmp_path, monkeypatch
):
    from llava.model import builder

    model = model_with(world)
    model.config.save_pretrained(tmp_path)
    state = projector_of(model).state_dict()
    written(tmp_path, {name: value for name, value in state.items() if name != "fuser.cross_gate.scale"})
    monkeypatch.setattr(builder.AutoTokenizer, "from_pretrained", lambda *a, **k: pytest.fail("the base was read"))
    with pytest.raises(ValueError, match="mm_projector.bin: weights do not fit config.json: missing fuser.cross_g"):
        builder.load_pretrained_model(str(tmp_path), str(world / "llama"), "llava", device="cpu")
    written(tmp_path, {name: value for name, value in state.items() if name != "0.bias"}, "non_lora_trainables.bin")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="missing 0.bias"):
        builder.load_pretrained_model(str(tmp_path), str(world / "llama"), "llava-lora", device="cpu")


def test_half_an_adapter_that_is_loaded_by_hand_is_not_silent(world, caplog):
    import logging

    model = model_with(world)
    state = {"model.mm_projector." + name: value for name, value in projector_of(model).state_dict().items()}
    del state["model.mm_projector.2.weight"]
    state["model.mm_projector.3.weight"] = torch.zeros(2)
    logging.getLogger("llava_mmfuser").addHandler(caplog.handler)
    model.load_state_dict(state, strict=False)
    assert "does not fit the projector: missing 2.weight; unexpected 3.weight" in caplog.text
    caplog.clear()
    shard = {name: value for name, value in model.state_dict().items() if "fuser." not in name}
    model.load_state_dict(shard, strict=False)  # as transformers resumes from shards
    logging.getLogger("llava_mmfuser").removeHandler(caplog.handler)
    assert "does not fit" not in caplog.text


def test_saving_leaves_no_half_written_file(tmp_path, monkeypatch):
    save_tensors({"a": torch.ones(2)}, str(tmp_path / "file.bin"))
    real = torch.save

    def fails(state, path):
        real(state, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"a": torch.zeros(2)}, str(tmp_path / "file.bin"))
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]
    assert torch.equal(torch.load(tmp_path / "file.bin")["a"], torch.ones(2))


def test_mistral_based_llava_takes_the_fuser_and_answers_bit_for_bit_as_before(world, tmp_path):
    config = LlavaMistralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlavaMistralForCausalLM(config).eval()
    options = dict(mm_projector_type="mlp2x_gelu", mm_patch_merge_type="spatial_unpad")
    model.get_model().initialize_vision_modules(arguments(world, **options))
    newline = model.get_model().image_newline
    ids = torch.tensor([[1, -200, 5, 6], [1, -200, 7, 8]])
    with torch.no_grad():
        before = model(ids, images=IMAGES[:2]).logits
        options["mm_projector_type"] = "mmfuser"
        model.get_model().initialize_vision_modules(arguments(world, **options))
        assert isinstance(projector_of(model), MMFuserProjector)
        assert torch.equal(model(ids, images=IMAGES[:2]).logits, before)
        assert model.get_model().image_newline is newline
        randomised(model).save_pretrained(tmp_path)
        after = model(ids, images=IMAGES[:2]).logits
        again = LlavaMistralForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=True, device_map={"": "cpu"}).eval()
        again.get_vision_tower().load_model()
        assert torch.equal(again.get_model().image_newline, newline)
        torch.testing.assert_close(again(ids, images=IMAGES[:2]).logits, after)
    assert not torch.equal(before, after)
