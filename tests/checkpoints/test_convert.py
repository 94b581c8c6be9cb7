"""Converting and upgrading checkpoints: real files, loaded by the real LLaVA."""

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import host
import pytest
import torch
from layouts import (
    BIN,
    DAMAGE,
    FULL,
    LAYERS,
    LAYOUTS,
    SAFE,
    SHARDED,
    THEIRS,
    change_config,
    config_of,
    edit_weights,
    fingerprint,
    read,
    same,
    save,
    without,
)
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from safetensors.torch import load_file, save_file
from tiny import IMAGES, model_with

from llava_mmfuser import MMFuserConfig
from llava_mmfuser.checkpoints import writing as module
from llava_mmfuser.checkpoints.convert import convert, upgrade

IDS = torch.tensor([[1, -200, 5, 6], [1, -200, 7, 8]])


def load(folder):
    model, info = LlavaLlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    model.get_vision_tower().load_model()
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert not [key for key in info["unexpected_keys"] if "vision_tower" not in key]
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS, images=IMAGES[:2]).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_theirs_becomes_ours_and_back_without_changing_a_byte(made, tmp_path, cli, layout):
    theirs, ours = made / f"theirs {layout}", made / f"ours {layout}"
    before = fingerprint(made)
    code, out, err = cli("convert", theirs, tmp_path / "out")
    assert (code, err) == (0, "") and "checkpoint-100/" in out
    assert same(read(tmp_path / "out"), read(ours))
    config = {key: value for key, value in config_of(ours).items() if key[-3:] != "_lr"}  # of training only
    assert config_of(tmp_path / "out") == config
    assert list(config_of(tmp_path / "out"))[: len(config_of(theirs))] == list(config_of(theirs))
    assert cli("convert", tmp_path / "out", tmp_path / "back", "--to", "authors")[0] == 0
    assert same(read(tmp_path / "back"), read(theirs))
    assert config_of(tmp_path / "back") == config_of(theirs)
    assert list(config_of(tmp_path / "back")) == list(config_of(theirs))
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in theirs.iterdir() if p.is_file()}
    for index in theirs.glob("*.index.json"):
        assert json.loads((tmp_path / "back" / index.name).read_text()) == json.loads(index.read_text())
    assert fingerprint(made) == before and sorted(p.name for p in tmp_path.iterdir()) == ["back", "out"]


@pytest.mark.parametrize("layout", ["single safetensors", "adapter"])
def test_layers_may_be_spelled_in_config_json_as_on_the_command_line(take, made, tmp_path, cli, layout):
    convert(str(made / f"theirs {layout}"), str(tmp_path / "listed"))
    change_config(tmp_path / "listed")
    for number, spelling in enumerate(("list-8/-6/-5/-3/-2", "-8,-6,-5,-3,-2", "[-8 -6 -5 -3 -2]")):
        source, out = take("theirs", layout, f"in-{number}"), tmp_path / f"out-{number}"
        change_config(source, mm_vision_select_layer=spelling)
        code, text, _ = cli("inspect", source)
        assert code == 1 and "layers: -8,-6,-5,-3,-2\n" in text and f"mmfuser convert {source}" in text
        with pytest.raises(ValueError, match=f"llava_mmfuser convert {source}"):
            if layout == "adapter":
                load_pretrained_model(str(source), "base", "llava")
            else:
                LlavaLlamaForCausalLM.from_pretrained(source)
        assert cli("convert", source, out)[0] == 0
        assert config_of(out) == config_of(tmp_path / "listed") and same(read(out), read(tmp_path / "listed"))
    change_config(source, mm_vision_select_layer="list-2/-3/-4/-5/-6", mm_vision_tower="/no")
    fails(cli, source, tmp_path / "out", ["convert"], "-2,-3,-4,-5,-6 is not in order; .* last: -6,-5,-4,-3,-2")


def test_projector_in_several_shards_was_really_tested(made):
    weight_map = json.loads((made / "theirs sharded safetensors" / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    assert len({file for name, file in weight_map.items() if "mm_projector" in name}) > 1
    assert any(
        "mm_projector" not in "".join(n for n, f in weight_map.items() if f == file) for file in weight_map.values()
    )


@pytest.mark.parametrize("layout", FULL)
def test_converted_checkpoint_answers_as_the_projector_it_was_made_from(made, tmp_path, layout):
    convert(str(made / f"theirs {layout}"), str(tmp_path / "out"))
    model, source = load(tmp_path / "out"), load(made / "ours single safetensors")
    for name, value in source.get_model().mm_projector.state_dict().items():
        assert torch.equal(value, model.get_model().mm_projector.state_dict()[name]), name
    assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("inner", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_other_inner_projectors(world, tmp_path, inner):
    model = model_with(world, mm_vision_select_layer=tuple(LAYERS), mm_fuser_projector=inner)
    save(model, tmp_path / "ours", "single safetensors")
    convert(str(tmp_path / "ours"), str(tmp_path / "theirs"), to_authors=True)
    names = {name.split("mm_projector.")[1] for _, name in read(tmp_path / "theirs") if "mm_projector." in name}
    linears = {"linear": 1, "mlp1x_gelu": 1, "mlp3x_gelu": 3}[inner]
    expected = {f"{2 * i + 1}.{kind}" for i in range(linears) for kind in ("weight", "bias")}
    assert {name for name in names if not name.startswith("0.")} == expected and "0.gamma1" in names
    assert config_of(tmp_path / "theirs")["mm_projector_type"] == inner
    convert(str(tmp_path / "theirs"), str(tmp_path / "back"))
    assert same(read(tmp_path / "back"), read(tmp_path / "ours"))


def test_rewritten_header_keeps_metadata_and_alignment(take, tmp_path):
    source = take("theirs", "single safetensors")
    state = load_file(source / "model.safetensors")
    save_file(state, source / "model.safetensors", metadata={"format": "pt", "note": "ä"})
    convert(str(source), str(tmp_path / "out"))
    header, start = module.read_header(str(tmp_path / "out" / "model.safetensors"))
    assert header["__metadata__"] == {"format": "pt", "note": "ä"} and start % 8 == 0


@pytest.mark.parametrize("copying", ["copy_file_range", "refused", "absent", "ends early"])
def test_every_way_of_copying_gives_the_same_bytes(made, tmp_path, monkeypatch, copying):
    def refused(*_):
        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr(module, "_CHUNK", 1000)
    if copying == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    elif copying != "copy_file_range":
        monkeypatch.setattr(os, "copy_file_range", refused if copying == "refused" else lambda *_: 0)
    convert(str(made / "theirs single safetensors"), str(tmp_path / "out"))
    assert same(read(tmp_path / "out"), read(made / "ours single safetensors"))


def test_link_shares_only_weight_files_without_projector(made, tmp_path):
    source, out = made / "theirs sharded safetensors", tmp_path / "out"
    convert(str(source), str(out), link=True)
    assert same(read(out), read(made / "ours sharded safetensors"))
    weight_map = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    rewritten = {file for name, file in weight_map.items() if "mm_projector" in name}
    for path in out.iterdir():
        linked = os.path.samefile(path, source / path.name)
        assert linked == (path.suffix == ".safetensors" and path.name not in rewritten), path.name


def test_link_falls_back_to_a_copy(made, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refused)
    convert(str(made / "theirs sharded bin"), str(tmp_path / "out"), link=True)
    assert same(read(tmp_path / "out"), read(made / "ours sharded bin"))


def test_safetensors_win_over_bin_as_in_transformers(take, tmp_path, cli):
    source = take("theirs", "single safetensors")
    torch.save({"other": torch.ones(1)}, source / "pytorch_model.bin")
    torch.save({}, source / "optimizer.pt")
    code, out, _ = cli("convert", source, tmp_path / "out")
    assert code == 0 and "left out" in out and "optimizer.pt, pytorch_model.bin" in out
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    load(tmp_path / "out")


@pytest.mark.parametrize(
    "layout,link", [(layout, False) for layout in FULL] + [("single bin", True), ("sharded safetensors", True)]
)
def test_upgraded_checkpoint_answers_bit_for_bit_as_before(made, tmp_path, cli, layout, link):
    source, out = made / f"plain {layout}", tmp_path / "out"
    code, _, err = cli("upgrade", source, out, *["--link"] * link)
    assert (code, err) == (0, "")
    assert torch.equal(logits(load(source)), logits(load(out)))
    config = config_of(out)
    assert config["mm_projector_type"] == "mmfuser" and config["mm_fuser_layers"] == [3, 4, 5, 6, 7]
    assert config["mm_fuser_projector"] == "mlp2x_gelu" and config["mm_vision_select_layer"] == -2
    assert {key for key in config if key.startswith("mm_fuser_")} == {
        "mm_fuser_" + field.name for field in dataclasses.fields(MMFuserConfig)
    }
    kept = {name: value for (_, name), value in read(out).items() if ".fuser." not in name}
    assert same(kept, {name: value for (_, name), value in read(source).items()})
    shards = sorted(path.name for path in out.iterdir() if re.fullmatch(r".*-\d{5}-of-\d{5}\..*", path.name))
    weights = sorted(
        path for path in source.iterdir() if re.fullmatch(r"(pytorch_)?model.*(bin|safetensors)", path.name)
    )
    assert len(shards) == len(weights) + 1
    assert all(os.path.samefile(out / new, old) == link for new, old in zip(shards, weights))
    index = json.loads(next(out.glob("*.index.json")).read_text())
    total = sum(value.nbytes for value in read(out).values())
    assert abs(index["metadata"]["total_size"] - total) < (2 if layout.startswith("sharded") else 100_000)


@pytest.mark.parametrize("layout,file", [("adapter", "mm_projector.bin"), ("lora", "non_lora_trainables.bin")])
def test_upgraded_adapter_holds_a_closed_fuser_in_the_dtype_of_the_projector(made, tmp_path, layout, file):
    upgrade(str(made / f"plain {layout}"), str(tmp_path / "out"))
    state, before = (
        {name: value for (_, name), value in read(f).items()} for f in (tmp_path / "out", made / f"plain {layout}")
    )
    added = {name: value for name, value in state.items() if name not in before}
    prefix = ("base_model.model." if layout == "lora" else "") + "model.mm_projector."
    assert set(added) == {prefix + name for name in THEIRS if name.startswith("fuser.")}
    assert {value.dtype for value in added.values()} == {torch.bfloat16}
    assert all(not added[f"{prefix}fuser.{side}_gate.scale"].any() for side in ("cross", "self"))
    assert same(before, {name: state[name] for name in before})


def test_upgrade_settings(made, world, tmp_path, cli):
    flags = [
        "--mm_fuser_layers==1,4,-2",
        "--mm_fuser_num_heads",
        4,
        "--mm_fuser_num_points=2",
        "--mm_fuser_self_attention=False",
    ]
    code, _, err = cli("upgrade", made / "plain single bin", tmp_path / "out", *flags, "--vision-tower", world / "clip")
    assert (code, err) == (0, "")
    config = config_of(tmp_path / "out")
    assert config["mm_fuser_layers"] == [1, 4, 7] and config["mm_fuser_self_attention"] is False
    assert (config["mm_fuser_num_heads"], config["mm_fuser_num_points"]) == (4, 2)
    assert config["mm_vision_tower"] == config_of(made / "plain single bin")["mm_vision_tower"]
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(made / "plain single bin")))


@pytest.mark.parametrize("fusion", ["weighted_sum", "channel_concat"])
def test_upgrade_to_other_fusions_that_are_an_identity(made, world, tmp_path, cli, fusion):
    flags = ["--mm_fuser_fusion", fusion, "--mm_fuser_layers", "shallow", "--vision-tower", world / "clip"]
    code, _, err = cli("upgrade", made / "plain single safetensors", tmp_path / "out", *flags)
    assert (code, err) == (0, "")
    assert config_of(tmp_path / "out")["mm_fuser_layers"] == [1, 2, 3, 4, 7]
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(made / "plain single safetensors")))


def test_upgrade_to_a_fusion_that_is_no_identity_is_refused(made, world, tmp_path, cli):
    flags = ["--mm_fuser_fusion", "mean", "--vision-tower", world / "clip"]
    code, _, err = cli("upgrade", made / "plain single safetensors", tmp_path / "out", *flags)
    assert code == 1 and "mm_fuser_fusion=mean does not start as an identity" in err
    assert "use mmfuser or weighted_sum or channel_concat or dense_channel" in err and not (tmp_path / "out").exists()


FORMATS = {
    "convert": ("theirs", ["convert"]),
    "to authors": ("ours", ["convert", "--to", "authors"]),
    "upgrade": ("plain", ["upgrade"]),
}
REFUSED = [
    ("theirs", ["upgrade"], {}, "format of the authors' MMFuser fork.* python -m llava_mmfuser convert"),
    ("theirs", ["convert", "--to", "authors"], {}, "in the authors' format already"),
    ("ours", ["convert"], {}, "in the format of llava_mmfuser already.*--to authors"),
    ("ours", ["upgrade"], {}, "in the format of llava_mmfuser already"),
    ("plain", ["convert"], {}, r"plain LLaVA \(mm_projector_type='mlp2x_gelu'\).* upgrade"),
    ("plain", ["convert", "--to", "authors"], {}, "plain LLaVA.* upgrade"),
    ("theirs", ["convert"], dict(mm_vision_select_layer=[-5, -3, -2]), "-5,-3,-2 .*exactly five"),
    ("theirs", ["convert"], dict(mm_vision_select_layer=[-2, -3, -4, -5, -6]), "is not in order"),
    (
        "theirs",
        ["convert"],
        dict(mm_vision_select_layer=[-2, -3, -4, -5, -6], mm_vision_tower="/no"),
        "is not in order",
    ),
    ("theirs", ["convert"], dict(mm_vision_select_layer=[-22, -17, -12, -7, -2]), "layer -22 does not exist"),
    ("theirs", ["convert"], dict(mm_vision_select_layer=-2), "write the five layers"),
    ("theirs", ["convert"], dict(mm_projector_type="identity"), "'identity' is not allowed"),
    ("ours", ["convert", "--to", "authors"], dict(mm_fuser_fusion="sum"), "mm_fuser_fusion=sum .* mmfuser only"),
    ("ours", ["convert", "--to", "authors"], dict(mm_fuser_num_points=2), "mm_fuser_num_points=2 .* 4 only"),
    ("ours", ["convert", "--to", "authors"], dict(mm_fuser_num_heads=8), "mm_fuser_num_heads=8 .*16 only"),
    ("ours", ["convert", "--to", "authors"], dict(mm_fuser_self_attention=False), "mm_fuser_self_attention=False"),
    ("ours", ["convert", "--to", "authors"], dict(mm_fuser_attention="dense!"), "mm_fuser_attention='dense!'"),
    ("ours", ["convert", "--to", "authors"], dict(mm_fuser_layers=None), "exactly five listed"),
    ("plain", ["upgrade", "--mm_fuser_projector", "linear"], {}, "projector is 'mlp2x_gelu'; drop the flag"),
    ("plain", ["upgrade", "--mm_fuser_layers", "3,9"], {}, "mm_fuser_layers=3,9: layer 9 does not exist"),
    ("plain", ["upgrade", "--mm_fuser_layers", "3,6"], {}, "ends at layer 6.* end the list with 7"),
    (
        "plain",
        ["upgrade", "--mm_fuser_fusion", "weighted_sum", "--mm_fuser_num_heads", "8"],
        {},
        "mm_fuser_num_heads=8 has no effect with mm_fuser_fusion=weighted_sum",
    ),
    ("plain", ["upgrade", "--mm_fuser_num_heads", "5"], {}, "mm_fuser_num_heads=5 does not divide"),
    ("plain", ["upgrade", "--vision-tower", "/no/tower"], {}, "'/no/tower' cannot be read.*--vision-tower"),
    ("plain", ["upgrade"], dict(mm_vision_tower=None), "no mm_vision_tower; give --vision-tower"),
    ("plain", ["upgrade"], dict(s2=True), "s2=True"),
    ("plain", ["upgrade"], dict(mm_hidden_size=32), "mm_hidden_size=32"),
]


def fails(cli, source, out, arguments, message):
    """A command ends in one clear line and leaves nothing behind and the input as it was."""
    before = fingerprint(source)
    beside = sorted(source.parent.iterdir())
    code, _, err = cli(arguments[0], source, out, *arguments[1:])
    assert code == 1 and err.startswith(f"python -m llava_mmfuser {arguments[0]}: error: ") and err.count("\n") == 1, (
        err
    )
    assert re.search(message, err), err
    assert fingerprint(source) == before and sorted(source.parent.iterdir()) == beside


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("layout,damage,message", [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_damaged_input_is_refused_before_anything_is_written(
    take, tmp_path, cli, monkeypatch, how, layout, damage, message
):
    (tmp_path.parent / "cwd").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path.parent / "cwd")
    kind, arguments = FORMATS[how]
    source = take(kind, layout)
    damage(source)
    if "no LLaVA" not in message:
        fails(cli, source, tmp_path / "out", arguments, message)
    else:
        fails(cli, source, tmp_path / "out", arguments, message if how == "convert" else "neither mm_vision_tower")
    assert not os.path.exists("llava-mmfuser-test-was-run"), "code in the file was run"


@pytest.mark.parametrize("kind,arguments,changes,message", REFUSED)
def test_input_that_does_not_fit_the_command_is_refused(take, tmp_path, cli, kind, arguments, changes, message):
    source = take(kind, SAFE)
    change_config(source, **changes)
    fails(cli, source, tmp_path / "out", arguments, message)


@pytest.mark.parametrize("missing", ["gamma1", "0.cross_attn.value_proj.bias", "mm_projector.0."])
def test_incomplete_fuser_of_the_authors_is_refused(take, tmp_path, cli, missing):
    source = take("theirs", BIN)
    edit_weights(source / "pytorch_model.bin", without(missing))
    fails(cli, source, tmp_path / "out", ["convert"], "missing 0.")


def test_our_checkpoint_without_fuser_weights_has_nothing_to_convert(take, tmp_path, cli):
    source = take("ours", BIN)
    edit_weights(source / "pytorch_model.bin", without(".fuser."))
    fails(cli, source, tmp_path / "out", ["convert", "--to", "authors"], "no weights of its fuser")


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("layout,file", [(SAFE, "model.safetensors"), ("adapter", "mm_projector.bin")])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_not_written(take, tmp_path, cli, how, layout, file, value):
    kind, arguments = FORMATS[how]
    source = take(kind, layout)
    bias = "model.mm_projector." + ("3.bias" if kind == "theirs" else "2.bias")
    edit_weights(source / file, lambda state: state[bias].__setitem__(5, value))
    fails(cli, source, tmp_path / "out", arguments, f"{file}: {bias} holds NaN or Inf; .* take an earlier checkpoint")
    if kind != "theirs":
        code, out, _ = cli("inspect", source)
        assert code == 0 and f"note: {file}: {bias} holds NaN or Inf" in out


@pytest.mark.parametrize("how", FORMATS)
def test_no_code_and_no_pointer_to_code_of_others_is_carried_along(take, tmp_path, cli, how):
    kind, arguments = FORMATS[how]
    source, pointer = take(kind, SAFE), {"AutoConfig": "evil.Config", "AutoTokenizer": ["evil.Tokenizer", None]}
    for name in ("evil.py", "modeling_llava_mmfuser.py", "evil.so"):
        (source / name).write_text("open('was-run', 'w')")
    change_config(source, auto_map=pointer, custom_pipelines={"x": {"impl": "evil.Pipeline"}})
    processor = {"size": 14, "image_processor": {"auto_map": pointer, "do_pad": True}}
    (source / "processor_config.json").write_text(json.dumps(processor))
    (source / "tokenizer.json").write_text(json.dumps({"vocab": {"auto_map": 7}}))
    code, out, _ = cli(arguments[0], source, tmp_path / "out", *arguments[1:])
    assert code == 0 and {"evil.py", "evil.so"} <= set(re.findall(r"[\w.]+", out.splitlines()[0])), out
    assert not list((tmp_path / "out").glob("*evil*")) and not list((tmp_path / "out").glob("*.py"))
    for path in (tmp_path / "out").glob("*.json"):
        assert "evil" not in path.read_text() and path.name in ("tokenizer.json",) or "auto_map" not in path.read_text()
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"] == {"do_pad": True}
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text()) == {"vocab": {"auto_map": 7}}


def test_links_out_of_the_folder_are_not_followed_but_those_of_the_hubs_cache_are(take, tmp_path, cli):
    source = take("theirs", "adapter", "models--a--b/snapshots/1")
    (tmp_path / "secret").write_text("secret")
    os.symlink(tmp_path / "secret", source / "notes.txt")
    message = f"notes.txt is a link to {tmp_path}/secret, outside the folder; copy that file here, or delete the link"
    fails(cli, source, tmp_path / "out", ["convert"], message)
    blob = tmp_path / "models--a--b" / "blobs" / "f00"
    blob.parent.mkdir()
    shutil.move(tmp_path / "secret", blob)
    (source / "notes.txt").unlink()
    os.symlink("../../blobs/f00", source / "notes.txt")
    assert cli("convert", source, tmp_path / "out")[0] == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "secret" and not (
        tmp_path / "out" / "notes.txt"
    ).is_symlink()


def test_files_keep_their_permissions(take, tmp_path):
    source = take("theirs", SAFE)
    for name in ("tokenizer_config.json", "model.safetensors"):
        (source / name).chmod(0o600)
    convert(str(source), str(tmp_path / "out"))
    for name in ("tokenizer_config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).stat().st_mode & 0o777 == 0o600


def test_an_index_without_a_size_in_bytes_gets_one(take, tmp_path):
    source = take("plain", SHARDED)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["metadata"]["total_size"] = "many"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    upgrade(str(source), str(tmp_path / "out"))
    size = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert abs(size - sum(value.nbytes for value in read(tmp_path / "out").values())) < 100_000


def test_bad_places_are_refused(take, tmp_path, cli, monkeypatch):
    source = take("theirs", SAFE)
    (tmp_path / "there").mkdir()
    os.symlink(source, tmp_path / "alias")
    fails(cli, source, tmp_path / "there", ["convert"], "exists already; choose another name or delete it")
    fails(cli, source, source, ["convert"], "exists already")
    fails(cli, source, "", ["convert"], "exists already")
    fails(cli, source, source / "out", ["convert"], "inside the input")
    fails(cli, source, tmp_path / "alias" / "out", ["convert"], "inside the input")
    fails(cli, source, tmp_path / "no" / "out", ["convert"], "is not a folder; make it first")
    code, _, err = cli("convert", tmp_path / "nothing", tmp_path / "out")
    assert code == 1 and "is not a folder" in err
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=12345))
    fails(cli, source, tmp_path / "out", ["convert"], r"needs \d{6,} bytes .*only 12345 bytes")


AS_NOBODY = """
import os, sys
import torch, tqdm, llava_mmfuser.checkpoints.convert  # while that is still allowed
os.setgroups([]); os.setgid(65534); os.setuid(65534)
from llava_mmfuser.checkpoints.convert import convert
try:
    convert(sys.argv[1], sys.argv[2])
except (ValueError, OSError) as error:
    print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become nobody, whom all folders can be opened to")
def test_place_or_input_without_permission_is_refused(take):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        tmp_path = Path(folder)
        tmp_path.chmod(0o755)
        source = shutil.copytree(take("theirs", SAFE), tmp_path / "in")
        _refused_as_nobody(source, tmp_path)


def _refused_as_nobody(source, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        env=host.environment(),
    )
    assert f"{tmp_path} is not writable; choose another place" in done.stdout, done.stdout + done.stderr
    tmp_path.chmod(0o777)
    (source / "model.safetensors").chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", AS_NOBODY, source, tmp_path / "out"],
        capture_output=True,
        text=True,
        env=host.environment(),
    )
    assert "model.safetensors cannot be read; check its permissions" in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


KILLED = """
import os, signal, sys
from llava_mmfuser import __main__
from llava_mmfuser.checkpoints import writing
real, calls = writing._flush, []
def killing(path):
    calls.append(path)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path)
writing._flush = killing
sys.argv = ["llava_mmfuser"] + sys.argv[1:]
__main__.main()
"""


def test_killed_run_leaves_nothing_under_the_final_name_and_says_what_is_there(made, tmp_path, cli):
    source, out, work = made / "theirs sharded safetensors", tmp_path / "out", tmp_path / "out.incomplete"
    done = subprocess.run([sys.executable, "-c", KILLED, "convert", source, out], env=host.environment())
    assert done.returncode == -9
    left = fingerprint(work)
    assert left and not out.exists() and not (work / "config.json").exists()
    fails(cli, source, out, ["convert"], "out.incomplete exists: a run that was killed left it, .*delete it")
    assert fingerprint(work) == left  # it may be another's
    shutil.rmtree(work)
    assert cli("convert", source, out)[0] == 0
    assert same(read(out), read(made / "ours sharded safetensors"))


def test_full_disk_is_one_line_and_leaves_nothing(made, tmp_path, monkeypatch, cli):
    source, out = made / "theirs sharded bin", tmp_path / "out"

    def failing(descriptor, calls=[]):  # noqa: B006  (counts)
        calls.append(1)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    real = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        code, _, err = cli("convert", source, out)
    assert code == 1 and err.count("\n") == 1, err
    assert "No space left on device while writing" in err and "run the same command again" in err
    assert not list(tmp_path.iterdir())
    assert cli("convert", source, out)[0] == 0
    assert same(read(out), read(made / "ours sharded bin"))


def test_keyboard_interrupt_is_one_line_and_leaves_nothing(made, tmp_path, monkeypatch, cli):
    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_copy", stopped)
        code, _, err = cli("convert", made / "theirs lora", tmp_path / "out")
    assert code == 130 and err.count("\n") == 1 and "interrupted" in err and not list(tmp_path.iterdir())
    assert cli("convert", made / "theirs lora", tmp_path / "out")[0] == 0
    assert same(read(tmp_path / "out"), read(made / "ours lora"))


@pytest.mark.parametrize("layout", ["single safetensors", "single bin"])
def test_limit_of_the_system_on_file_size_is_one_line(made, tmp_path, cli, layout):
    source, out = made / f"theirs {layout}", tmp_path / "out"
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000)); from llava_mmfuser import __main__; "
    code += "sys.argv = ['llava_mmfuser'] + sys.argv[1:]; sys.exit(__main__.main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", source, out],
        capture_output=True,
        text=True,
        env=host.environment(PYTHONDONTWRITEBYTECODE="1"),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "File too large while writing" in done.stderr, (
        done.stderr
    )
    assert not list(tmp_path.iterdir())
    assert cli("convert", source, out)[0] == 0
    assert same(read(out), read(made / f"ours {layout}"))


def test_input_that_changes_meanwhile_is_noticed(take, tmp_path, monkeypatch, cli):
    source, real = take("theirs", "adapter"), module._write_bin

    def changing(*arguments):
        (source / "new.json").write_text("{}")
        return real(*arguments)

    monkeypatch.setattr(module, "_write_bin", changing)
    code, _, err = cli("convert", source, tmp_path / "out")
    assert code == 1 and "was changed in the meantime" in err and not list(tmp_path.glob("out*"))


def peak_memory(*arguments):
    """Largest resident memory of a command, in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llava_mmfuser", *map(str, arguments)], env=host.environment(), stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return usage.ru_maxrss * 1024


@pytest.mark.parametrize("kernel", [True, False], ids=["in the kernel", "read and write"])
def test_memory_does_not_grow_with_the_file(take, tmp_path, kernel, monkeypatch):
    source = take("theirs", SAFE)
    path = source / "model.safetensors"
    header, start = module.read_header(str(path))
    with open(path, "rb") as stream:
        data = stream.read()[start:]
    size = 300 << 20
    header["model.big"] = {"dtype": "U8", "shape": [size], "data_offsets": [len(data), len(data) + size]}
    big = shutil.copytree(source, tmp_path / "big")
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(big / "model.safetensors", "wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded + data)
        stream.truncate(8 + len(encoded) + len(data) + size)
    if kernel:
        small, large = (peak_memory("convert", f, f"{f}-out") for f in (source, big))
    else:
        code = "import os, resource, sys; del os.copy_file_range; "
        code += "from llava_mmfuser.checkpoints.convert import convert; "
        code += "convert(sys.argv[1], sys.argv[2]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
        small, large = (
            int(host.run([sys.executable, "-c", code, f, f"{f}-out"]).stdout.split()[-1]) for f in (source, big)
        )
    assert (tmp_path / "big-out" / "model.safetensors").stat().st_size > size
    assert large - small < 100e6
    shutil.rmtree(tmp_path / "big-out")


def test_commands_work_from_a_shell_and_help_explains_copying(made, tmp_path):
    python = [sys.executable, "-m", "llava_mmfuser"]
    host.run([*python, "convert", made / "theirs adapter", tmp_path / "out"])
    assert "loads: yes" in host.run([*python, "inspect", tmp_path / "out"]).stdout
    assert "overwrites files in place" in " ".join(host.run([*python, "convert", "--help"]).stdout.split())
