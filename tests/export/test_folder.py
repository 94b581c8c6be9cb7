"""Exporting itself, in LLaVA's environment. What the folders answer is the matter of `test_transformers.py`."""

import json
import shutil
import subprocess
import sys

import making
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

pytest.importorskip("llava", reason="makes checkpoints with LLaVA")
from llava_mmfuser.block.rivals import build_fusion  # noqa: E402
from llava_mmfuser.export import stock, tensors  # noqa: E402
from llava_mmfuser.export.folder import export  # noqa: E402
from llava_mmfuser.export.names import to_llava, to_native  # noqa: E402
from llava_mmfuser.export.native import export_to_llava  # noqa: E402


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "parts"
    making.make_parts(folder)
    return folder


@pytest.fixture(scope="session")
def made(parts, tmp_path_factory):
    """Checkpoints of three layouts, for reading only."""
    folder = tmp_path_factory.mktemp("llava")
    for layout in ("full", "adapter", "lora"):
        making.make_checkpoint(parts, folder, layout, layout=layout)
    return folder


@pytest.fixture
def take(made, tmp_path):
    """A copy of one of them, with changes to its config.json."""

    def copied(layout="full", **changes):
        folder = shutil.copytree(made / layout, tmp_path / "in")
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copied


def weights(folder):
    return {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}


def test_every_weight_arrives_bit_for_bit_and_the_input_stays(made, parts, tmp_path, cli):
    before = {path.name: path.read_bytes() for path in (made / "full").iterdir()}
    code, said, complaint = cli("export", made / "full", tmp_path / "out")
    assert (code, complaint) == (0, "") and "is complete" in said
    assert before == {path.name: path.read_bytes() for path in (made / "full").iterdir()}
    old, new = weights(made / "full"), weights(tmp_path / "out")
    tower = {name: value for name, value in weights(parts / "clip").items()}
    for name, value in new.items():
        there = to_llava(name)
        expected = tower[there.split("vision_tower.vision_tower.")[1]] if "vision_tower" in there else old[there]
        assert value.dtype == expected.dtype and torch.equal(value[: len(expected)], expected)
        if len(value) > len(expected):  # rows of <image>, <pad> and padding
            torch.testing.assert_close(value[500:], expected.mean(0).expand(12, -1), atol=1e-3, rtol=0)
    assert {to_native(name) for name in old if "vision_tower" not in name} < set(new)


@pytest.mark.parametrize("layout", ["sharded safetensors", "single bin", "sharded bin"])
def test_every_layout_makes_the_same_folder(made, take, tmp_path, layout):
    from llava.model import LlavaLlamaForCausalLM

    folder = take()
    (folder / "model.safetensors").unlink()
    shards = {"max_shard_size": "100KB"} if layout.startswith("sharded") else {}
    model = LlavaLlamaForCausalLM.from_pretrained(made / "full", torch_dtype=torch.float16)
    model.save_pretrained(folder, safe_serialization=not layout.endswith("bin"), **shards)
    assert len(list(folder.glob("*00001-of-000*"))) == bool(shards)
    export(str(folder), str(tmp_path / "out"))
    export(str(made / "full"), str(tmp_path / "expected"))
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "expected")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_large_models_are_written_in_shards(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD", 100_000)
    export(str(made / "full"), str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3 and sorted(set(index["weight_map"].values())) == [file.name for file in files]
    for file in files:
        held = load_file(file)
        assert {name for name, shard in index["weight_map"].items() if shard == file.name} == set(held)
        assert sum(value.nbytes for value in held.values()) <= 100_000 or len(held) == 1
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights(tmp_path / "out").values())


@pytest.mark.parametrize("fusion", stock.LINEAR)
@pytest.mark.parametrize("layers", [[1, 4], [0, 3, 5, 6, 7]])
def test_linear_fusions_fold_into_one_matrix(fusion, layers):
    fuser = build_fusion(fusion, 6, len(layers), 10).double()
    with torch.no_grad():
        for parameter in fuser.parameters():
            parameter.normal_()
    weight, features = torch.randn(10, 6).double(), torch.randn(2, 9, 6 * len(layers)).double()
    blocks = stock.first_layer(fusion, fuser, layers, weight)
    assert list(blocks) == layers
    expected = fuser.project(features, lambda fused: F.linear(fused, weight))
    torch.testing.assert_close(F.linear(features, torch.cat(list(blocks.values()), 1)), expected)


@pytest.mark.parametrize("fusion", ["mmfuser", "weighted_sum", "channel_concat", "dense_channel"])
def test_what_is_an_identity_folds_into_the_query_layer_alone(fusion):
    fuser = build_fusion(fusion, 16, 3, 10)
    weight = torch.randn(10, 16)
    blocks = stock.first_layer(fusion, fuser, [1, 2, 5], weight)
    assert list(blocks) == [5] and torch.equal(blocks[5].float(), weight)


BAD = [
    ({"model_type": "llava_mpt"}, "model_type='llava_mpt'"),
    ({"model_type": "llava_mistral"}, "model_type='llava_mistral'"),
    ({"s2": True}, "s2=True"),
    ({"mm_use_im_start_end": True}, "mm_use_im_start_end=True"),
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type='spatial_unpad'"),
    ({"mm_fuser_fusion": "dense_channel"}, "weights do not fit config.json"),
    ({"mm_vision_tower": "/nowhere"}, "mm_vision_tower='/nowhere'"),
    ({"mm_projector_type": "mlp2x_gelu"}, "upgrade"),
    ({"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": [-8, -6, -5, -3, -2]}, "convert"),
]


@pytest.mark.parametrize("changes,reason", BAD, ids=[next(iter(changes.values())) for changes, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(take, tmp_path, cli, changes, reason):
    code, said, complaint = cli("export", take(**changes), tmp_path / "out")
    assert (code, said) == (1, "") and reason in complaint and complaint.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bases_and_bad_targets_are_refused(take, made, parts, tmp_path, cli):
    (tmp_path / "other").mkdir()
    for arguments, reason in (
        ((made / "adapter", tmp_path / "out"), "--base"),
        ((made / "full", tmp_path / "out", "--base", parts / "llama"), "drop --base"),
        ((made / "adapter", tmp_path / "out", "--base", parts / "clip"), "num_hidden_layers"),
        ((made / "lora", tmp_path / "out", "--base", "nobody/nothing"), "--base='nobody/nothing'"),
        ((made / "full", tmp_path / "other"), "exists already"),
        ((made / "full", tmp_path / "out", "--stock"), "--stock"),
        ((tmp_path / "other", tmp_path / "out"), "no config.json"),
    ):
        code, said, complaint = cli("export", *arguments)
        assert (code, said) == (1, "") and reason in complaint and complaint.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_incomplete_and_quantised_weights_and_loras_that_only_peft_can_merge_are_refused(take, parts, tmp_path, cli):
    folder = take("lora")
    (folder / "adapter_config.json").write_text(json.dumps({"use_dora": True, "r": 4, "lora_alpha": 8}))
    code, _, complaint = cli("export", folder, tmp_path / "out", "--base", parts / "llama")
    assert code == 1 and "scripts/merge_lora_weights.py" in complaint
    shutil.rmtree(folder)
    folder = take()
    state = load_file(folder / "model.safetensors")
    for changed, reason in (
        ({name: value for name, value in state.items() if "fuser" not in name}, "no weights of its fuser"),
        ({name: value for name, value in state.items() if "mm_projector" not in name}, "no weights of a projector"),
        ({name: value for name, value in state.items() if name != "lm_head.weight"}, "no whole language model"),
        ({**state, "model.layers.0.mlp.up_proj.weight": torch.ones(4, dtype=torch.uint8)}, "up_proj.weight is U8"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        code, _, complaint = cli("export", folder, tmp_path / "out")
        assert code == 1 and reason in complaint and complaint.count("\n") == 1


def test_a_full_disk_leaves_nothing_under_the_final_name(made, tmp_path, cli, monkeypatch):
    class Full:
        free = 1000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Full)
    code, _, complaint = cli("export", made / "full", tmp_path / "out")
    assert code == 1 and "bytes" in complaint and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["deformable", "linear", "channels", "tower", "tokens"])
def test_the_way_back_leads_to_the_same_checkpoint(parts, tmp_path, name):
    settings, plain = making.KINDS[name]
    checkpoint = making.make_checkpoint(parts, tmp_path, name, **settings)
    export(str(checkpoint), str(tmp_path / "native"), plain=plain)
    notes = export_to_llava(str(tmp_path / "native"), str(tmp_path / "llava-back"))
    assert not any("note" in note for note in notes)
    old, new = weights(checkpoint), weights(tmp_path / "llava-back")
    kept = {key for key in old if name == "tower" or "vision_tower" not in key}
    assert set(new) == kept and all(torch.equal(new[key], old[key]) for key in kept)
    before, after = (json.loads((f / "config.json").read_text()) for f in (checkpoint, tmp_path / "llava-back"))
    own = {key for key in before if key.startswith("mm_")} - {"mm_fuser_lr", "mm_vision_select_layer"}
    for key in (*own, "vocab_size", "hidden_size", "rope_theta", "torch_dtype", "tokenizer_model_max_length"):
        assert after[key] == before[key], key
    first, second = making.ask_llava(checkpoint), making.ask_llava(tmp_path / "llava-back")
    assert all((first[key] == second[key]).all() for key in first)


def test_a_tower_that_was_trained_stays_with_the_checkpoint_on_the_way_back(made, tmp_path):
    export(str(made / "full"), str(tmp_path / "native"))
    state = load_file(tmp_path / "native" / "model.safetensors")
    state["model.vision_tower.vision_model.post_layernorm.bias"] += 1
    save_file(state, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    export_to_llava(str(tmp_path / "native"), str(tmp_path / "llava-back"))
    assert json.loads((tmp_path / "llava-back" / "config.json").read_text())["unfreeze_mm_vision_tower"]
    assert sum("vision_tower" in name for name in weights(tmp_path / "llava-back")) == 8 * 16 + 7


OLD = {  # spelling of today -> of llava-hf's folders, and of transformers 5 where the tower has another depth
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_model.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def test_upgrade_of_a_folder_in_transformers_format_adds_a_fuser_and_nothing_else(parts, tmp_path, cli):
    checkpoint = making.make_checkpoint(parts, tmp_path, "shut")
    export(str(checkpoint), str(tmp_path / "plain"), plain=True)
    state = {}
    for name, value in weights(tmp_path / "plain").items():
        new = next(new for new in OLD if name.startswith(new))
        state[OLD[new] + name[len(new) :]] = value
    save_file(state, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    flags = ("--mm_fuser_layers", "0,3,5,7", "--mm_fuser_num_heads", "4")
    code, said, complaint = cli("upgrade", tmp_path / "plain", tmp_path / "out", *flags)
    assert (code, complaint) == (0, "")
    new = weights(tmp_path / "out")
    assert all(torch.equal(new[name], value) for name, value in state.items())
    fuser = {name for name in new if name not in state}
    assert fuser and all(name.startswith("multi_modal_projector.fuser.") for name in fuser)
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("plain", "out"))
    assert after["vision_feature_layer"] == [0, 3, 5, 7] and before["vision_feature_layer"] == 7
    assert {name for name in after if after[name] != before.get(name)} == {
        *("architectures", "auto_map", "vision_feature_layer"),
        *(name for name in after if name.startswith("mm_fuser_")),
    }
    code, _, complaint = cli("upgrade", tmp_path / "out", tmp_path / "again")
    assert code == 1 and "several layers already" in complaint
    export_to_llava(str(tmp_path / "out"), str(tmp_path / "llava-back"))
    first, second = making.ask_llava(checkpoint), making.ask_llava(tmp_path / "llava-back")
    assert all((first[key] == second[key]).all() for key in first)


def test_other_folders_are_refused_on_the_way_back(made, tmp_path, cli):
    export(str(made / "full"), str(tmp_path / "native"))
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    for changes, arguments, reason in (
        ({}, (made / "full",), "nothing is to be done"),
        ({"llava_vision_tower": None}, (), "--vision-tower"),
        ({"text_config": {"model_type": "qwen2"}}, (), "model_type='qwen2'"),
        ({"mm_fuser_num_points": 2}, (), "weights do not fit config.json"),
    ):
        (tmp_path / "native" / "config.json").write_text(json.dumps({**config, **changes}))
        source = arguments or (tmp_path / "native",)
        code, said, complaint = cli("export", "--to", "llava", *source, tmp_path / "back")
        assert (code, said) == (1, "") and reason in complaint and complaint.count("\n") == 1
    (tmp_path / "native" / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "native" / "model.safetensors")
    for gone, reason in (("linear_", "no weights of a projector"), ("lm_head", "no lm_head.weight")):
        changed = {name: value for name, value in state.items() if gone not in name}
        save_file(changed, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
        code, _, complaint = cli("export", "--to", "llava", tmp_path / "native", tmp_path / "back")
        assert code == 1 and reason in complaint
    save_file(state, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "native" / "tokenizer.model").unlink()
    code, _, complaint = cli("export", "--to", "llava", tmp_path / "native", tmp_path / "back")
    assert code == 1 and "tokenizer.model" in complaint and not (tmp_path / "back").exists()
    for command in ("export", "convert"):
        code, _, complaint = cli(command, tmp_path / "native", tmp_path / "back")
        assert code == 1 and "export --to llava" in complaint
    code, said, _ = cli("inspect", tmp_path / "native")
    assert code == 1 and "export --to llava" in said


def test_the_transformers_that_llava_pins_are_left_alone():
    """They have no seam for a fuser; its rows are applied as a whole or not at all."""
    code = """
import transformers.models.llava.modeling_llava
from llava_mmfuser import llava_patch, patching
assert "LlavaModel" in patching.applied[llava_patch.NATIVE] and not patching._originals
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0 and "llava_mmfuser" not in done.stderr, done.stderr
