"""What is refused before weights are read: checkpoints that were edited, misplaced or mixed, from every route."""

import json
import logging
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from llava.model import LlavaLlamaForCausalLM, builder
from safetensors.torch import load_file, save_file
from tiny import arguments, model_with, parse
from transformers import modeling_utils

from llava_mmfuser.__main__ import main
from llava_mmfuser.checkpoints.folder import name_from_path
from llava_mmfuser.checkpoints.report import inspect
from llava_mmfuser.hooks import loading
from llava_mmfuser.hooks.loading import _files, _loaded_keys

LAYOUTS = {
    "single": {},
    "shards": {"max_shard_size": "300KB"},
    "bin": {"safe_serialization": False},
    "bin shards": {"max_shard_size": "300KB", "safe_serialization": False},
}


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """Folders named as `LAYOUTS` of one checkpoint with fuser, and ``plain`` of one without; for reading only."""
    folder = tmp_path_factory.mktemp("loading")
    model = model_with(world)
    for layout, options in LAYOUTS.items():
        model.save_pretrained(folder / layout, **options)
    model_with(world, mm_projector_type="mlp2x_gelu").save_pretrained(folder / "plain")
    return folder


@pytest.fixture
def take(made, tmp_path):
    """A copy of one of them, with settings of its config.json changed; None removes one."""

    def copied(layout="single", name="llava-in", **changes):
        folder = shutil.copytree(made / layout, tmp_path / name)
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return folder

    return copied


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_weights_are_found_where_transformers_hands_over_files_alone(made, layout):
    """As since 4.50; this environment's names them itself."""
    files = sorted(str(path) for path in (made / layout).iterdir() if path.suffix in (".safetensors", ".bin"))
    names = set(load_file(made / "single" / "model.safetensors"))
    given = dict(model=SimpleNamespace(get_vision_tower=None), state_dict=None, checkpoint_files=files)
    assert set(_loaded_keys(given)) == names and _files(given) == files
    assert _loaded_keys({**given, "sharded_metadata": {"all_checkpoint_keys": ["by", "index"]}}) == ["by", "index"]
    assert _loaded_keys({**given, "state_dict": {"given": None}}) == ["given"]
    assert _loaded_keys({**given, "model": SimpleNamespace()}) == [], "another model's are not looked at"


@pytest.fixture
def unread(monkeypatch):
    """Weights must not reach a model."""
    for name in ("_load_state_dict_into_model", "_load_state_dict_into_meta_model"):
        monkeypatch.setattr(modeling_utils, name, lambda *a, **k: pytest.fail("weights were read"))


@pytest.fixture
def said(caplog):
    logger = logging.getLogger("llava_mmfuser")
    logger.addHandler(caplog.handler)
    yield lambda: [r.getMessage() for r in caplog.records if r.name == "llava_mmfuser" and r.levelname == "WARNING"]
    logger.removeHandler(caplog.handler)


GONE = dict.fromkeys(
    ("mm_projector_type", "mm_fuser_layers", "mm_fuser_self_attention", "mm_fuser_num_heads", "mm_fuser_attention")
)
EDITS = [
    (GONE, "mm_projector_type='linear' in config.json, but the weights hold a fuser; write .*: mmfuser"),
    (dict(mm_projector_type="mlp2x_gelu"), "mm_projector_type='mlp2x_gelu' in config.json, but the weights hold a"),
    (dict(mm_projector_type="linear", mm_fuser_num_points=2), "mm_projector_type='linear' in config.json, but the w"),
    (dict(mm_fuser_self_attention=False), "unexpected .*fuser.self_gate.scale.*; undo what was changed in config.json"),
    (dict(mm_fuser_attention="dense"), "missing fuser.cross_attn.query_proj.*; undo what was changed in config.json"),
    (dict(mm_fuser_attention="window", mm_fuser_self_attention=False), "missing fuser.cross_attn.*; undo what was"),
    (dict(mm_fuser_num_heads=8), r"bias is \[256\] instead of .*; undo what was changed in config.json"),
    (dict(mm_fuser_num_points=2), r"attention_weights.weight is \[256, 64\] instead of \[128, 64\].*; undo what was"),
    (dict(mm_fuser_layers=[1, 4, 7]), r"sampling_offsets.bias is \[512\] instead of \[256\]"),
    (dict(mm_fuser_fusion="weighted_sum"), "missing fuser.scale; unexpected .*; undo what was changed in config.json"),
    (dict(mm_fuser_fusion="mean"), "unexpected fuser.cross_attn.*; undo what was changed in config.json"),
    (dict(mm_fuser_projector="linear"), "missing weight, bias; .*; undo what was changed in config.json"),
    (dict(mm_vision_tower=None), "config.json has no mm_vision_tower; write there which"),
    (dict(mm_hidden_size=32), "mm_hidden_size=32, but mm_vision_tower=.* has width 64"),
    (dict(mm_vision_select_layer=-1), "mm_fuser_layers=3,4,5,6,7 and mm_vision_select_layer=-1 do not end at the same"),
    (dict(mm_vision_select_layer=None), "config.json has no mm_vision_select_layer, which LLaVA asks for"),
    (dict(mm_vision_select_feature="cls"), "mm_vision_select_feature='cls' is not allowed; use patch or cls_patch"),
    (dict(s2=True), "s2=True together with mm_projector_type=mmfuser is not supported"),
    (dict(mm_fuser_layers=[2, 3, 4, 5, 6]), "2,3,4,5,6 and mm_vision_select_layer=-2 do not end at the same"),
]


@pytest.mark.parametrize("changes,message", EDITS, ids=lambda value: ",".join(value) if isinstance(value, dict) else "")
def test_edited_config_is_refused_and_inspect_says_the_same(take, unread, changes, message):
    folder = take(**changes)
    with pytest.raises(ValueError, match=message):
        LlavaLlamaForCausalLM.from_pretrained(folder)
    _, reason = inspect(str(folder))
    assert reason is not None
    assert re.search(message, reason), reason


ROUTES = {
    "default": lambda folder: LlavaLlamaForCausalLM.from_pretrained(folder),
    "low_cpu": lambda folder: LlavaLlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True),
    "device_map": lambda folder: LlavaLlamaForCausalLM.from_pretrained(folder, device_map={"": "cpu"}),
    "mismatched": lambda folder: LlavaLlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True),
    "state_dict": lambda folder: LlavaLlamaForCausalLM.from_pretrained(
        folder, state_dict=load_file(folder.parent / "state.safetensors")
    ),
    "load_pretrained_model": lambda folder: builder.load_pretrained_model(
        str(folder), None, "llava-in", device="cpu", torch_dtype=torch.float32
    ),
}


@pytest.mark.parametrize(
    "layout,route",
    [(layout, route) for layout in LAYOUTS for route in ("default", "low_cpu", "device_map")]
    + [("shards", "mismatched"), ("single", "state_dict"), ("single", "load_pretrained_model")],
)
def test_every_route_asks_before_weights_are_read(take, made, world, unread, monkeypatch, layout, route):
    monkeypatch.setattr(builder.AutoTokenizer, "from_pretrained", lambda *a, **k: None)
    for changes, message in (
        (dict(mm_projector_type="mlp2x_gelu"), "the weights hold a fuser"),
        (dict(mm_fuser_num_points=2), r"attention_weights.weight is \[256, 64\] instead of \[128, 64\]"),
    ):
        folder = take(layout, **changes)
        shutil.copy(made / "single" / "model.safetensors", folder.parent / "state.safetensors")
        with pytest.raises(ValueError, match=message):
            ROUTES[route](folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["cross_gate.scale", "query_norm.bias", "cross_attn.value_proj.bias"])
def test_half_a_fuser_is_refused_by_name(take, unread, name):
    folder = take()
    state = load_file(folder / "model.safetensors")
    del state["model.mm_projector.fuser." + name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{folder}: weights do not fit config.json: missing fuser.{name}"):
        LlavaLlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)


@pytest.mark.parametrize("change", ["index lists more", "index lists less"])
def test_stale_index_is_refused(take, unread, change):
    """transformers takes what the index lists for loaded, and the fuser stays as it was made."""
    folder = take("shards")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    name = next(name for name in index["weight_map"] if "cross_gate" in name)
    if change == "index lists more":
        shard = folder / index["weight_map"][name]
        state = {key: value for key, value in load_file(shard).items() if key != name}
        save_file(state, shard, metadata={"format": "pt"})
    else:
        del index["weight_map"][name]
        file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"index of the shards and the shards disagree about {name}"):
        LlavaLlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)


def test_authors_weights_under_an_edited_config_are_refused(take, unread):
    folder = take(**{**GONE, "mm_projector_type": "mlp2x_gelu"})
    state = {
        name.replace("fuser.cross_gate.scale", "0.gamma1"): value
        for name, value in load_file(folder / "model.safetensors").items()
        if "fuser." not in name or "cross_gate" in name
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="in the format of the authors' MMFuser fork, .* convert it with"):
        LlavaLlamaForCausalLM.from_pretrained(folder)


def test_plain_llava_is_not_looked_at(take, monkeypatch):
    monkeypatch.setattr(loading, "read_weights", lambda *a: pytest.fail("weights of a plain LLaVA were looked at"))
    LlavaLlamaForCausalLM.from_pretrained(take("plain"))


def load(folder, base=None, name=None):
    return builder.load_pretrained_model(
        str(folder), base, name_from_path(str(folder)) if name is None else name, device="cpu"
    )


class Reached(Exception):
    pass


@pytest.fixture
def stops(monkeypatch):
    """Upstream's loader goes no further than its tokenizer."""

    def reached(*args, **kwargs):
        raise Reached

    monkeypatch.setattr(builder.AutoTokenizer, "from_pretrained", reached)


def as_adapter(folder, lora):
    state = {name: value for name, value in load_file(folder / "model.safetensors").items() if "mm_projector" in name}
    torch.save(state, folder / ("non_lora_trainables.bin" if lora else "mm_projector.bin"))
    (folder / "model.safetensors").unlink()
    if lora:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
        save_file({"x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    return folder


def test_name_without_llava_is_told_by_the_loader_and_by_inspect(take, stops, said, monkeypatch, capsys):
    folder, rule = take(name="mmfuser-7b"), "model_name='mmfuser-7b' must contain 'llava' for a full checkpoint"
    with pytest.raises(Reached):
        load(folder)
    (line,) = said()
    assert rule in line and "pass such a model_name to load_pretrained_model" in line
    assert "else LLaVA loads no vision tower and returns no image_processor" in line
    monkeypatch.setattr(sys, "argv", ["llava_mmfuser", "inspect", str(folder)])
    assert main() == 0
    *_, note, verdict = capsys.readouterr().out.splitlines()
    assert note.startswith("note: ") and rule in note and verdict == "loads: yes, under such a name"
    with pytest.raises(Reached):
        load(folder, name="llava-mmfuser-7b")
    assert len(said()) == 1
    assert name_from_path("a/llava-x/checkpoint-3/") == "llava-x_checkpoint-3"


@pytest.mark.parametrize(
    "kind,name,base,message",
    [
        ("full", "llava-prompted", None, "must not contain 'mpt' for a full checkpoint .model_type='llava_llama'"),
        ("full", "llava-7b", "base", "is a full checkpoint, but model_base='base' was given"),
        ("LoRA", "llava-lora", None, "is a LoRA folder, without model_base its fuser is not read"),
        ("LoRA", "llava-7b", "base", "must contain 'lora' for a LoRA folder"),
        ("LoRA", "vicuna-lora", "base", "must contain 'llava' for a LoRA folder"),
        ("adapter", "llava-pretrain", None, "is an adapter folder, without model_base"),
        ("adapter", "llava-pretrain", "base", None),
        ("adapter", "llava-explorative", "base", "must not contain 'lora' for an adapter folder"),
        ("adapter", "pretrain", "base", "must contain 'llava' for an adapter folder"),
        ("mixed", "llava-7b", None, "LoRA folder with a full checkpoint in it.* move adapter_config.json away"),
    ],
)
def test_folder_of_which_llava_would_not_read_the_fuser_is_refused(take, stops, kind, name, base, message):
    folder = take(name=name)
    if kind in ("LoRA", "adapter"):
        as_adapter(folder, kind == "LoRA")
    if kind == "mixed":
        (folder / "adapter_config.json").write_text("{}")
        save_file({"x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
        assert "move one of them away" in inspect(str(folder))[1]
    with pytest.raises(Reached if message is None else ValueError, match=message):
        load(folder, base)


def test_adapter_with_a_fuser_beside_a_plain_config_is_refused(take, stops):
    for lora in (False, True):
        folder = as_adapter(take(name=f"llava-{'lora' if lora else 'adapter'}", mm_projector_type="mlp2x_gelu"), lora)
        with pytest.raises(ValueError, match="mm_projector_type='mlp2x_gelu' in config.json, but the weights hold a f"):
            load(folder, "base")


@pytest.mark.parametrize("tower", ["/nowhere/clip", "checkpoints/clip", "somebody/clip-vit"])
@pytest.mark.parametrize("layout", ["single", "plain"])
def test_inspect_says_that_the_tower_is_absent(take, layout, tower):
    _, reason = inspect(str(take(layout, mm_vision_tower=tower)))
    assert f"mm_vision_tower={tower!r} in config.json is no folder on this machine" in reason
    assert ("seen from" in reason) == (not os.path.isabs(tower))


def test_exchanged_tower_is_refused(take, world, tmp_path, unread):
    from toy import models

    models.make_clip(tmp_path / "deeper", num_hidden_layers=12)
    folder = take(mm_vision_tower=str(tmp_path / "deeper"))
    message = "mm_vision_select_layer=-2 do not end at the same layer of mm_vision_tower=.*deeper', which has 12 blocks"
    with pytest.raises(ValueError, match=message):
        LlavaLlamaForCausalLM.from_pretrained(folder)
    assert re.search(message, inspect(str(folder))[1])


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(mm_projector_type="mlp2x_gelu"), "but the checkpoint has a fuser .* write --mm_projector_type mmfuser"),
        (dict(mm_projector_type=None), "mm_projector_type='linear', but the checkpoint has a fuser"),
        (dict(vision_tower=None), "without --vision_tower train.py leaves it and the MLP out; add --vision_tower"),
        (dict(mm_fuser_num_points=2), "mm_fuser_num_points=2, but the checkpoint was trained with 4"),
        (dict(mm_fuser_layers="1,7"), "but the checkpoint was trained with"),
        (dict(), None),
    ],
)
def test_start_that_contradicts_the_flags_is_refused_before_the_model_is_read(made, world, tmp_path, options, message):
    if message is None:
        parse(world, tmp_path / "out", model_name_or_path=made / "single", **options)
        return
    with pytest.raises(ValueError, match=message):
        parse(world, tmp_path / "out", model_name_or_path=made / "single", **options)


def test_training_does_not_start_from_a_lora_folder(take, world, tmp_path):
    with pytest.raises(
        ValueError, match="is a LoRA folder, and train.py reads no fuser from it; LoRA has to be merged"
    ):
        parse(world, tmp_path / "out", model_name_or_path=as_adapter(take(), lora=True))


FUSED = dict(mm_projector_type="mmfuser", mm_fuser_layers=[3, 4, 5, 6, 7], tune_mm_mlp_adapter=False)
MLP = dict(mm_projector_type="mlp2x_gelu", tune_mm_mlp_adapter=False)


@pytest.mark.parametrize(
    "config,lora,options,message",
    [
        (MLP, False, {}, "mm_projector_type=mlp2x_gelu, but this run has mmfuser"),
        (FUSED, False, dict(mm_projector_type="mlp2x_gelu"), "mm_projector_type=mmfuser, but this run has mlp2x_gelu"),
        (None, True, dict(lora_enable=True), "mm_projector_type=one without a fuser, but this run has mmfuser"),
        (FUSED, True, dict(lora_enable=True, mm_projector_type="linear"), "=mmfuser, but this run has linear"),
        (dict(MLP, tune_mm_mlp_adapter=True), False, dict(stage="pretrain"), "mlp2x_gelu, but this run has mmfuser"),
        (dict(FUSED, tune_mm_mlp_adapter=True), False, {}, "tune_mm_mlp_adapter=True, but this run has False"),
        (FUSED, False, dict(lora_enable=True), "lora_enable=False, but this run has True"),
        (FUSED, False, dict(mm_fuser_layers="1,7"), "mm_fuser_layers=3,4,5,6,7, but this run has 1,7"),
        (FUSED, False, dict(mm_fuser_num_points=2), "mm_fuser_num_points=4, but this run has 2"),
        (FUSED, False, {}, None),
        (dict(FUSED, tune_mm_mlp_adapter=None), False, {}, None),
        (FUSED, True, {}, None),  # LoRA by a script of one's own
        (dict(FUSED, mm_fuser_layers="list-6/-5/-4/-3/-2"), False, {}, None),
        (MLP, False, dict(mm_projector_type="linear"), None),  # upstream's own affair
        (None, True, dict(lora_enable=True, mm_projector_type="mlp2x_gelu"), None),
        (None, False, {}, None),
    ],
)
def test_stale_output_dir_is_named_before_the_model_is_read(world, tmp_path, config, lora, options, message):
    older, last = tmp_path / "out" / "checkpoint-9", tmp_path / "out" / "checkpoint-10"
    older.mkdir(parents=True)
    (older / "config.json").write_text("{}")
    last.mkdir()
    if config is not None:
        (last / "config.json").write_text(json.dumps(config))
    if lora:
        (last / "adapter_config.json").write_text("{}")
    if message is None:
        parse(world, tmp_path / "out", **options)
        return
    with pytest.raises(ValueError, match=f"output_dir={tmp_path}/out: {last}, from which .*{message}; choose another"):
        parse(world, tmp_path / "out", **options)


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b'{"a": ' + b"[" * 200000 + b"]" * 200000 + b"}", b"", b"3"]
)
def test_config_that_transformers_cannot_read_is_named(take, content):
    folder = take()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="config.json is not (JSON in UTF-8|a JSON object)"):
        load(folder)
    assert "config.json is not" in inspect(str(folder))[1]


def test_sets_and_spellings_of_the_command_line_are_taken_in_config_json(take):
    expected = LlavaLlamaForCausalLM.from_pretrained(take()).get_vision_tower().select_layer
    for spelling in ("list-6/-5/-4/-3/-2", "3,4,5,6,7", "uniform", "deep", "[3,4,5,6,7]"):
        model = LlavaLlamaForCausalLM.from_pretrained(
            take(name=f"llava-{len(spelling)}{spelling[0]}", mm_fuser_layers=spelling)
        )
        assert model.get_vision_tower().select_layer == expected, spelling


def test_a_model_made_from_arguments_alone_is_left_alone(world):
    """The tower of a run is checked by its flags; only a checkpoint describes itself."""
    model_with(world, **vars(arguments(world, mm_vision_select_layer=-1, mm_fuser_layers="1,7")))
