"""How mmfuser's detail enters and how a fresh one starts: through LLaVA, its checkpoints and the export."""

import copy
import json

import host
import pytest
import torch
from safetensors.torch import load_file
from tiny import IMAGES, answer, arguments, model_with

from llava_mmfuser.checkpoints.convert import convert, upgrade
from llava_mmfuser.hooks.wrappers import find_projector

COLUMNS = dict(mm_fuser_output="columns")


@pytest.mark.parametrize("kind", ["deformable", "dense", "window"])
def test_released_llava_answers_identically_with_fresh_columns(world, kind):
    torch.manual_seed(3)
    released = model_with(world, mm_projector_type="mlp2x_gelu").eval()
    switched = copy.deepcopy(released)
    switched.get_model().initialize_vision_modules(arguments(world, mm_fuser_output="columns", mm_fuser_attention=kind))
    ids = torch.tensor([[1, -200, 5, 6], [1, -200, 7, 8]])
    for dtype in (torch.float32, torch.bfloat16):
        released, switched = released.to(dtype), switched.to(dtype)
        images = IMAGES[:2].to(dtype)
        with torch.no_grad():
            assert torch.equal(released(ids, images=images).logits, switched(ids, images=images).logits)
    torch.nn.init.normal_(find_projector(switched).fuser.columns.weight)
    assert not torch.equal(released(ids, images=images).logits, switched(ids, images=images).logits)


def test_open_start_is_refused_in_front_of_a_trained_projector(world, tmp_path):
    released = model_with(world, mm_projector_type="mlp2x_gelu")
    message = "mm_fuser_start=open is not allowed in front of a trained projector .%s., .* drop the flag, or train"
    with pytest.raises(ValueError, match=message % "the checkpoint's"):
        released.get_model().initialize_vision_modules(arguments(world, mm_fuser_start="open"))
    adapter = tmp_path / "mm_projector.bin"
    weights = released.get_model().mm_projector.state_dict()
    torch.save({f"model.mm_projector.{name}": value for name, value in weights.items()}, adapter)
    with pytest.raises(ValueError, match=message % adapter):
        model_with(world, mm_fuser_start="open", pretrain_mm_mlp_adapter=str(adapter))
    released.save_pretrained(tmp_path / "llava")
    with pytest.raises(ValueError, match=message % "the checkpoint's"):
        upgrade(str(tmp_path / "llava"), str(tmp_path / "out"), settings={"start": "open"})
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finetuned(world, tmp_path_factory):
    """Both stages through LLaVA's train.py with columns that start open: the folders of both and what was printed."""
    folder = tmp_path_factory.mktemp("columns")
    flags = {**COLUMNS, "mm_fuser_start": "open"}
    first = host.train(world, folder / "llava-pretrain", **flags)
    adapter = folder / "llava-pretrain" / "mm_projector.bin"
    second = host.train(world, folder / "llava-finetune", "finetune", pretrain_mm_mlp_adapter=adapter, **flags)
    return folder, first.stdout, second.stdout


@pytest.mark.fp16_cpu
def test_columns_train_save_reload_and_answer_through_upstreams_scripts(world, tmp_path, finetuned):
    folder, first, second = finetuned
    assert "num_points 4, output columns, start open" in first and "fuser weights: fresh\n" in first
    assert f"fuser weights: from {folder / 'llava-pretrain' / 'mm_projector.bin'}" in second
    config = json.loads((folder / "llava-finetune" / "config.json").read_text())
    assert (config["mm_fuser_output"], config["mm_fuser_start"]) == ("columns", "open")
    trained, _ = answer(world, folder / "llava-finetune", tmp_path / "full.pt")
    saved = load_file(folder / "llava-finetune" / "model.safetensors")
    saved = {name.split("mm_projector.")[1]: value for name, value in saved.items() if "mm_projector." in name}
    assert saved.keys() == trained["projector"].keys() and "fuser.columns.weight" in saved
    assert all(torch.equal(value.half(), trained["projector"][name]) for name, value in saved.items())
    before = torch.load(folder / "llava-pretrain" / "mm_projector.bin")["model.mm_projector.fuser.columns.weight"]
    assert not torch.equal(before.float(), saved["fuser.columns.weight"].float())
    adapted, _ = answer(world, folder / "llava-pretrain", tmp_path / "adapter.pt", world / "llama")
    assert adapted["logits"].isfinite().all() and trained["answer"].numel() > 0


def test_another_output_or_start_than_the_checkpoints_is_refused(world, tmp_path, finetuned):
    folder = finetuned[0]
    adapter = folder / "llava-pretrain" / "mm_projector.bin"
    for flags, message in (
        (COLUMNS, "was trained with mm_fuser_start=open, but this run has identity; add --mm_fuser_start open"),
        (dict(mm_fuser_start="open"), "missing fuser.cross_gate.scale; unexpected .*columns"),
    ):
        with pytest.raises(ValueError, match=message):
            model_with(world, pretrain_mm_mlp_adapter=str(adapter), **flags)
    flags = dict(model_name_or_path=folder / "llava-finetune", mm_fuser_start="identity", max_steps=1, check=False)
    done = host.train(world, tmp_path / "llava-again", "finetune", **flags)
    assert done.returncode and "mm_fuser_start=identity, but the checkpoint was trained with open; drop" in done.stdout


def test_authors_format_has_no_columns(tmp_path, finetuned):
    with pytest.raises(ValueError, match="mm_fuser_output=columns in .* cannot be expressed in the authors' format"):
        convert(str(finetuned[0] / "llava-finetune"), str(tmp_path / "out"), to_authors=True)


def test_inspect_knows_the_shape_of_the_columns(cli, finetuned):
    code, out, err = cli("inspect", finetuned[0] / "llava-finetune")
    assert code == 0 and "mm_fuser_output: columns" in out and "mm_fuser_start: open" in out, err
