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
from llava_mmfuser.checkpoints import writing  # noqa: E402
from llava_mmfuser.export import folder, stock  # noqa: E402
from llava_mmfuser.export.folder import export  # noqa: E402
from llava_mmfuser.export.names import from_released, to_llava, to_native  # noqa: E402
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
    monkeypatch.setattr(writing, "SHARD", 100_000)
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
    own = {key for key in before if key.startswith("mm_")} - {
        "mm_fuser_lr",
        "mm_fuser_gate_lr",
        "mm_vision_select_layer",
    }
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


def stock_folder(parts, tmp_path):
    """In transformers' own format, without a fuser."""
    checkpoint = making.make_checkpoint(parts, tmp_path, "shut")
    export(str(checkpoint), str(tmp_path / "stock"), plain=True)
    return tmp_path / "stock"


def with_foreign_code(folder):
    """Code of others in a folder and pointers to it, in every place where transformers looks."""
    for name in ("modeling_llava_mmfuser.py", "fusion.py", "Tokenization.PY", "helper.so"):
        (folder / name).write_text("raise SystemExit('code of others')")
    pointer = {"auto_map": {"AutoConfig": "fusion.Config", "AutoTokenizer": ["fusion.Slow", None]}}
    for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config", "generation_config"):
        path = folder / f"{name}.json"
        content = json.loads(path.read_text()) if path.is_file() else {}
        nested = {"image_processor": pointer, "custom_pipelines": {"mine": {"impl": "fusion.Pipe"}}}
        path.write_text(json.dumps({**content, **pointer, **nested}))
    (folder / "vocab.json").write_text(json.dumps({"auto_map": 7}))
    return folder


def pointers(folder):
    """Every auto_map and custom_pipelines in the JSON of a folder."""
    found = []

    def look(content):
        if isinstance(content, dict):
            found.extend(value for name, value in content.items() if name in ("auto_map", "custom_pipelines"))
        for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
            look(value)

    for path in folder.glob("*.json"):
        look(json.loads(path.read_text()))
    return found


@pytest.mark.parametrize("command", ["upgrade native", "upgrade", "convert", "export", "export --to llava"])
def test_no_command_writes_code_of_others_nor_what_points_to_some(parts, made, tmp_path, cli, command):
    if command.startswith("upgrade"):
        if command == "upgrade native":
            source = stock_folder(parts, tmp_path)
        else:
            source = shutil.copytree(made / "full", tmp_path / "released")
            state = {name: value for name, value in weights(source).items() if "fuser" not in name}
            save_file(state, source / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((source / "config.json").read_text())
            config = {name: value for name, value in config.items() if not name.startswith("mm_fuser")}
            (source / "config.json").write_text(json.dumps({**config, "mm_projector_type": "mlp2x_gelu"}))
        arguments = ("--mm_fuser_layers", "0,3,5,7", "--mm_fuser_num_heads", "4")
    elif command == "convert":
        settings = {"mm_vision_select_layer": -2, "mm_fuser_layers": [0, 2, 3, 5, 7], "mm_fuser_num_heads": 16}
        source = making.make_checkpoint(parts, tmp_path, "five", **settings)
        arguments = ("--to", "authors")
    else:
        source = shutil.copytree(made / "full", tmp_path / "in")
        arguments = ()
        if command == "export --to llava":
            export(str(source), str(tmp_path / "native"))
            source, arguments = tmp_path / "native", ("--to", "llava")
    if command == "export":
        tower = with_foreign_code(shutil.copytree(parts / "clip", tmp_path / "clip"))
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(tower)}))
    with_foreign_code(source)
    code, said, complaint = cli(command.split()[0], source, tmp_path / "out", *arguments)
    assert (code, complaint) == (0, ""), complaint
    ours = folder.AUTO_MAP if command in ("upgrade native", "export") else None
    found = pointers(tmp_path / "out")
    assert (ours in found) == bool(ours) and [value for value in found if value != ours] == [7] * (
        "export" not in command
    )
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix.lower() == ".py"}
    assert bool(written) == bool(ours) and not any("code of others" in text for text in written.values())
    assert not (tmp_path / "out" / "helper.so").exists()
    if command == "export":
        assert "auto_map in config.json" in said and "clip/preprocessor_config.json" in said
    if "export" not in command:
        assert "helper.so" in said and "fusion.py" in said and "auto_map in tokenizer_config.json" in said


def test_links_that_lead_out_of_a_folder_are_refused_and_private_files_stay_private(parts, tmp_path, cli):
    source = stock_folder(parts, tmp_path)
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    arguments = ("upgrade", source, tmp_path / "out", "--mm_fuser_layers", "0,3,5,7", "--mm_fuser_num_heads", "4")
    code, _, complaint = cli(*arguments)
    assert code == 1 and "notes.txt is a link to" in complaint and not (tmp_path / "out").exists()
    (source / "notes.txt").unlink()
    (source / "notes.txt").write_text("mine")
    (source / "notes.txt").chmod(0o600)
    source.chmod(0o750)
    assert cli(*arguments)[0] == 0
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["notes.txt"] == modes["fusion.py"] == 0o600  # what is new is as private as the most private input
    assert modes["tokenizer.model"] == (source / "tokenizer.model").stat().st_mode & 0o777


@pytest.mark.parametrize("legacy", [True, False])
def test_tokens_behind_image_keep_their_rows_on_the_way_back(parts, tmp_path, legacy):
    from transformers import AddedToken, AutoTokenizer

    checkpoint = making.make_checkpoint(parts, tmp_path, "deformable")
    (checkpoint / "tokenizer.model").unlink()
    for path in checkpoint.glob("*token*"):
        path.unlink()
    making.make_tokenizer(tmp_path / "words", legacy)
    shutil.copytree(tmp_path / "words", checkpoint, dirs_exist_ok=True)
    export(str(checkpoint), str(tmp_path / "native"))
    fast = AutoTokenizer.from_pretrained(tmp_path / "native")
    fast.add_tokens([AddedToken("<box>", normalized=False)])
    fast.add_tokens([AddedToken("<end>", normalized=False, special=True)], special_tokens=True)
    assert fast.convert_tokens_to_ids(["<image>", "<pad>", "<box>", "<end>"]) == [500, 501, 502, 503]
    fast.save_pretrained(tmp_path / "native")
    state = load_file(tmp_path / "native" / "model.safetensors")
    for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
        state[name][502:504] = torch.tensor([[5.0], [6.0]])
    save_file(state, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    notes = export_to_llava(str(tmp_path / "native"), str(tmp_path / "llava-back"))
    assert any("<box> 502 -> 500, <end> 503 -> 501" in note for note in notes)
    slow = AutoTokenizer.from_pretrained(tmp_path / "llava-back", use_fast=False)
    assert slow.legacy is legacy and slow.convert_tokens_to_ids(["<box>", "<end>"]) == [500, 501]
    assert "<end>" in slow.all_special_tokens and "<box>" not in slow.all_special_tokens
    new = weights(tmp_path / "llava-back")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert new[name].shape[0] == 502 and new[name][500:].unique().tolist() == [5, 6]
    # transformers puts a space behind a token that it adds, whatever the folder does elsewhere.
    assert any("makes other ids than this folder's: 'a<box>b' is" in note for note in notes) is not legacy
    ids = {-200: 500, 500: 502, 501: 503}
    for text in [text.replace("<special>", "<end>") for text in making.texts() if legacy]:
        assert [ids.get(token, token) for token in making.llava_ids(text, slow, -200)] == fast(text).input_ids, text
    state["lm_head.weight"] = state["lm_head.weight"][:503]
    save_file(state, tmp_path / "native" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="a token 503, but lm_head.weight only 503 rows"):
        export_to_llava(str(tmp_path / "native"), str(tmp_path / "again"))


def test_a_tokenizer_that_would_give_other_ids_is_refused_with_the_text(made, parts, tmp_path, cli):
    source = shutil.copytree(made / "full", tmp_path / "in")
    making.make_tokenizer(tmp_path / "words", model_type="unigram", byte_fallback=True)
    shutil.copy(tmp_path / "words" / "tokenizer.model", source)
    code, _, complaint = cli("export", source, tmp_path / "out")
    assert code == 1 and "'<0x00><image><0x00>' is [1, " in complaint and not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["fuser.cross_gate.scale", "linear_2.bias"])
def test_weights_that_are_no_numbers_are_refused(parts, made, tmp_path, cli, value, weight):
    export(str(made / "full"), str(tmp_path / "native"))
    for source, to, arguments in (
        (shutil.copytree(made / "full", tmp_path / "in"), to_llava, ()),
        (tmp_path / "native", str, ("--to", "llava")),
        (stock_folder(parts, tmp_path), str, None),
    ):
        state = load_file(source / "model.safetensors")
        name = to("model.multi_modal_projector." + weight)
        name = name if name in state else name[len("model.") :]  # of a stock folder, which has no fuser
        if name in state:
            state[name].view(-1)[-1] = value
            save_file(state, source / "model.safetensors", metadata={"format": "pt"})
            flags = ("--mm_fuser_layers", "0,3,5,7", "--mm_fuser_num_heads", "4")
            command = ("export", *arguments) if arguments is not None else ("upgrade", *flags)
            code, _, complaint = cli(*command, source, tmp_path / "out")
            assert code == 1 and "holds NaN or Inf; " in complaint and complaint.count("\n") == 1
            assert not (tmp_path / "out").exists()


ODD = [
    {"vision_config": "clip"},
    {"text_config": []},
    {"image_token_index": "word"},
    {"image_token_index": 10**12},
    {"vision_feature_select_strategy": "cls"},
    {"vision_feature_select_strategy": ["default"]},
    {"vision_feature_layer": []},
    {"vision_feature_layer": "-2"},
    {"vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": "many"}},
]


@pytest.mark.parametrize("changes", ODD, ids=str)
@pytest.mark.parametrize("command", [("upgrade",), ("export", "--to", "llava")], ids=" ".join)
def test_odd_values_in_a_config_are_one_line(parts, tmp_path, cli, command, changes):
    source = stock_folder(parts, tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **changes}))
    code, said, complaint = cli(*command, source, tmp_path / "out")
    assert (code, said) == (1, "") and next(iter(changes)) in complaint and complaint.count("\n") == 1, complaint
    assert not (tmp_path / "out").exists()


def test_a_name_reaches_the_card_as_a_name(made, tmp_path):
    source = shutil.copytree(made / "full", tmp_path / "in")
    config = json.loads((source / "config.json").read_text())
    config["_name_or_path"] = "<script>x</script>\n# `base` | \u202e"
    (source / "config.json").write_text(json.dumps(config))
    export(str(source), str(tmp_path / 'a";print(1)#'))
    card = (tmp_path / 'a";print(1)#' / "README.md").read_text()
    assert "<script" not in card and "\n# _" not in card and "\u202e" not in card
    assert 'folder = "a__print(1)#"' in card


def test_biases_that_peft_saves_with_lora_bias_all_are_no_hindrance(made, parts, tmp_path):
    source = shutil.copytree(made / "lora", tmp_path / "in")
    state = load_file(source / "adapter_model.safetensors")
    before = "base_model.model.model."
    state[before + "vision_tower.vision_tower.vision_model.post_layernorm.bias"] = torch.ones(64)
    for name, value in torch.load(source / "non_lora_trainables.bin").items():
        state.update({name: value.clone()} if name.endswith("bias") else {})
    save_file(state, source / "adapter_model.safetensors", metadata={"format": "pt"})
    for folder_, out in ((source, "out"), (made / "lora", "expected")):
        export(str(folder_), str(tmp_path / out), base=str(parts / "llama"))
    found, expected = weights(tmp_path / "out"), weights(tmp_path / "expected")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_writing_holds_about_a_tensor_in_memory(tmp_path, ending):
    """Of 40 tensors of 16 MB."""
    code = f"""
import torch
from llava_mmfuser.checkpoints.files import Weight
from llava_mmfuser.checkpoints.writing import shards

state = {{str(n): torch.full((1 << 22,), float(n)) for n in range(40)}} if {ending == "bin"} else None
if state:
    torch.save(state, "model.bin")
else:
    made = (Weight("", str(n), "float32", (1 << 22,), lambda n=n: torch.full((1 << 22,), float(n))) for n in range(40))
    step, = shards({{weight.name: weight for weight in made}})
    step.write("model.safetensors", lambda count: None)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    code = f"""
import resource
from llava_mmfuser.checkpoints import files, writing

files._MAPPED = 64 << 20
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step, = writing.shards(files.float_weights(".", ["model.{ending}"]))
step.write("out.safetensors", lambda count: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, text=True, capture_output=True)
    assert int(done.stdout) < 200 << 10, done.stdout  # kB
    written = load_file(tmp_path / "out.safetensors")
    assert all(written[str(n)].unique().tolist() == [n] for n in range(40))


OTHER = {  # spelling of llava-hf's folders -> of today, and of transformers 5 where the tower has another depth
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}


@pytest.mark.parametrize("spelling", ["llava-hf's", "today's"])
def test_upgrade_of_a_folder_in_transformers_format_adds_a_fuser_and_nothing_else(parts, tmp_path, cli, spelling):
    checkpoint = making.make_checkpoint(parts, tmp_path, "shut")
    export(str(checkpoint), str(tmp_path / "plain"), plain=True)
    state = {}
    for name, value in weights(tmp_path / "plain").items():
        old = next(old for old in OTHER if name.startswith(old))
        state[name if spelling == "llava-hf's" else OTHER[old] + name[len(old) :]] = value
    save_file(state, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    flags = ("--mm_fuser_layers", "0,3,5,7", "--mm_fuser_num_heads", "4")
    code, said, complaint = cli("upgrade", tmp_path / "plain", tmp_path / "out", *flags)
    assert (code, complaint) == (0, "")
    new = weights(tmp_path / "out")
    state = {from_released(name): value for name, value in state.items()}
    assert all(torch.equal(new[name], value) for name, value in state.items())
    fuser = {name for name in new if name not in state}
    assert fuser and all(name.startswith("model.multi_modal_projector.fuser.") for name in fuser)
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
