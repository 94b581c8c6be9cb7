"""`inspect`: what it tells of every format and layout, and why a checkpoint does not load."""

import re

import pytest
import torch
from layouts import DAMAGE, LAYOUTS, SAFE, change_config, edit_weights, fingerprint, read, truncate, without
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["ours", "plain", "theirs"])
def test_inspect_tells_what_is_there(made, cli, kind, layout):
    folder = made / f"{kind} {layout}"
    before = fingerprint(folder)
    code, out, err = cli("inspect", folder)
    *lines, verdict = out.splitlines()
    assert err == "" and fingerprint(folder) == before
    if kind == "theirs":
        assert (
            code == 1 and f"python -m llava_mmfuser convert {folder}" in verdict and verdict.startswith("loads: no, ")
        )
    else:
        assert code == 0 and verdict == "loads: yes, under such a name", verdict
    assert any(
        line.startswith("type: ") and {"adapter": "adapter", "lora": "LoRA"}.get(layout, "full") in line
        for line in lines
    )
    assert len([line for line in lines if "MLP, 4 tensors" in line]) == 1 or layout.startswith("sharded")
    if kind == "plain":
        assert "gate" not in out and "layers:" not in out.replace("num_", "")
        return
    assert (
        "layers: -8,-6,-5,-3,-2" in lines
        and "mm_fuser_num_heads: 16" in lines
        and "mm_fuser_self_attention: True" in lines
    )
    tensors = sum(int(re.search(r"fuser, (\d+) tensors", line).group(1)) for line in lines if "fuser, " in line)
    assert tensors == 24 and (("bfloat16" in out) == (layout in ("adapter", "lora")))
    gate = next(v for (_, n), v in read(folder).items() if n.endswith(("cross_gate.scale", "0.gamma1"))).float().abs()
    assert f"cross gate: mean |g| {gate.mean():.4g}, max |g| {gate.max():.4g}" in lines


@pytest.mark.parametrize("layout,damage,message", [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_inspect_says_why_a_checkpoint_does_not_load(take, cli, layout, damage, message):
    folder = take("ours", layout)
    damage(folder)
    code, out, err = cli("inspect", folder)
    assert (
        code == 1
        and err == ""
        and re.search("loads: no, .*(" + message + "|are no weights of a projector)", out.splitlines()[-1])
    ), out


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda f: change_config(f, mm_fuser_layers=[3, 9]), "layer 9 does not exist"),
        (lambda f: change_config(f, mm_fuser_layers=[3, 7]), "sampling_offsets.weight is"),
        (lambda f: change_config(f, mm_fuser_num_heads=5), "mm_fuser_num_heads=5 does not divide"),
        (lambda f: change_config(f, mm_projector_type="mlp2x_gelu"), "but the weights hold a fuser"),
        (lambda f: edit_weights(f / "model.safetensors", without("cross_gate")), "missing fuser.cross_gate.scale"),
        (
            lambda f: save_file(load_file(f / "model.safetensors"), f / "model.safetensors"),
            "no 'format' in its metadata",
        ),
    ],
)
def test_inspect_finds_what_does_not_fit(take, cli, change, message):
    folder = take("ours", SAFE)
    change(folder)
    code, out, _ = cli("inspect", folder)
    assert code == 1 and re.search("loads: no, .*" + message, out.splitlines()[-1]), out


def test_inspect_warns_about_a_fuser_that_starts_as_identity(take, cli):
    folder = take("ours", SAFE)
    edit_weights(folder / "model.safetensors", without(".fuser."))
    code, out, _ = cli("inspect", folder)
    assert code == 0 and "note: the model has no weights of its fuser, which starts as the identity" in out


def test_inspect_does_not_look_for_the_tower_on_the_net(take, cli, monkeypatch):
    import huggingface_hub

    folder = take("ours", SAFE)
    change_config(folder, mm_vision_tower="openai/clip-not-here")
    monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", lambda *a, **k: pytest.fail("download"))
    code, out, _ = cli("inspect", folder)
    assert code == 0 and "layers not compared" in out


def test_inspect_reads_a_file_whose_names_are_numbers(tmp_path, cli):
    torch.save({3: torch.ones(2)}, tmp_path / "mm_projector.bin")
    code, out, err = cli("inspect", tmp_path / "mm_projector.bin")
    assert code == 1 and "has no weights of a projector" in out and "a fault of llava_mmfuser" not in out + err


@pytest.mark.parametrize("kind", ["ours", "plain", "theirs"])
def test_inspect_reads_a_lone_adapter_file(take, cli, kind):
    file = take(kind, "adapter") / "mm_projector.bin"
    assert cli("inspect", file)[0] == 0
    (file.parent / "config.json").unlink()
    code, out, _ = cli("inspect", file)
    assert code == 0 and "no config.json beside it" in out and ("authors' names" in out) == (kind == "theirs")
    truncate(file)
    code, out, _ = cli("inspect", file)
    assert code == 1 and "loads: no, " in out
    code, _, err = cli("inspect", file.parent / "nothing.bin")
    assert code == 1 and "neither a file nor a folder" in err
