"""Feature-map pictures: the numbers behind them, where things land, what is drawn, and bad input."""

import http.server
import json
import os
import shutil
import sys
import threading

import host
import numpy as np
import pytest
import torch
from llava.mm_utils import process_images
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import model_with
from transformers import CLIPImageProcessor, CLIPVisionModel

from llava_mmfuser import __main__ as command_line
from llava_mmfuser.visualize.drawing import colours, draw
from llava_mmfuser.visualize.maps import feature_maps, preprocess
from llava_mmfuser.visualize.pictures import output_names
from llava_mmfuser.visualize.reading import read_model

LAYERS = [3, 4, 5, 6, 7]  # of a tower with 8 blocks and 4 x 4 patches of 7 pixels


def photograph(width, height):
    """A picture with gradients, so that no two places are alike."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x * 7 + y * 11) % 256], -1)
    return Image.fromarray(rgb.astype(np.uint8))


@pytest.fixture(scope="session")
def models(world, tmp_path_factory):
    """Folders `clip`, `fused` (a full checkpoint with an open fuser), `plain` (released) and `adapter`."""
    folder = tmp_path_factory.mktemp("models")
    tower = CLIPVisionModel.from_pretrained(world / "clip").half().float()  # LLaVA loads it in half precision
    tower.save_pretrained(folder / "clip")
    shutil.copy(world / "clip" / "preprocessor_config.json", folder / "clip")
    torch.manual_seed(3)
    for kind, settings in (("fused", {}), ("plain", {"mm_projector_type": "mlp2x_gelu"})):
        model = model_with(world, **settings)
        with torch.no_grad():
            for parameter in model.get_model().mm_projector.parameters():
                parameter.copy_((torch.rand_like(parameter) * 0.6 - 0.3).half())
        model.config.mm_vision_tower, model.config.image_aspect_ratio = str(folder / "clip"), "pad"
        model.save_pretrained(folder / f"llava-{kind}")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(world / "llama" / name, folder / "llava-fused")
    (folder / "adapter").mkdir()
    state = load_file(folder / "llava-fused" / "model.safetensors")
    torch.save({k: v for k, v in state.items() if "mm_projector" in k}, folder / "adapter" / "mm_projector.bin")
    shutil.copy(folder / "llava-fused" / "config.json", folder / "adapter")
    return folder


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run `visualize` in this process: exit code, lines of stdout, lines of stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["llava_mmfuser", "visualize", *map(str, arguments)])
        capsys.readouterr()
        code = command_line.main()
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


@pytest.fixture
def picture(tmp_path):
    """File of a wide picture: 40 x 20 pixels."""
    photograph(40, 20).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


def change_config(source, target, **changes):
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize("loader", ["transformers", pytest.param("LLaVA", marks=pytest.mark.fp16_cpu)])
def test_arrays_are_what_the_loaded_llava_computes(models, picture, cli, tmp_path, loader):
    code, out, err = cli(
        "--model-path", models / "llava-fused", "--image", picture, "--output", tmp_path / "out", "--npz"
    )
    assert (code, err) == (0, []) and out[-1] == str(tmp_path / "out" / "wide.maps.png")
    found = np.load(tmp_path / "out" / "wide.maps.npz")
    if loader == "LLaVA":
        model = load_pretrained_model(str(models / "llava-fused"), None, "llava-fused", device="cpu")[1].float()
    else:
        model = LlavaLlamaForCausalLM.from_pretrained(models / "llava-fused")
        model.get_vision_tower().load_model()
    tower = model.get_vision_tower()
    pixels = process_images([Image.open(picture).convert("RGB")], tower.image_processor, model.config)
    states = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = [states[index][:, 1:] for index in LAYERS]
    assert found["indices"].tolist() == LAYERS and found["layers"].dtype == np.float32
    for layer, expected in zip(found["layers"], layers):
        assert torch.equal(torch.from_numpy(layer).flatten(0, 1), expected[0])
    fused = model.get_model().mm_projector.fuser(layers)[0]
    torch.testing.assert_close(torch.from_numpy(found["fused"]).flatten(0, 1), fused, rtol=0, atol=1e-5)
    assert (fused - layers[-1][0]).abs().mean() > 0.01
    assert np.array_equal(found["difference"], found["fused"] - found["layers"][-1])


@pytest.mark.parametrize("kind", ["adapter", "authors' names", "wrapped by PEFT", "several shards"])
def test_every_layout_gives_the_same_fuser(models, tmp_path, kind):
    folder = models / "adapter"
    if kind == "authors' names":
        from llava_mmfuser.names import to_published

        folder = change_config(folder, tmp_path / "in", mm_projector_type="mlp2x_gelu", mm_vision_select_layer=LAYERS)
        state = torch.load(folder / "mm_projector.bin", weights_only=True)
        names = {name: name.split("mm_projector.")[1] for name in state}
        state = {name.replace(names[name], to_published(names[name])): value for name, value in state.items()}
        torch.save(state, folder / "mm_projector.bin")
    elif kind == "wrapped by PEFT":
        folder = change_config(folder, tmp_path / "in")
        state = torch.load(folder / "mm_projector.bin", weights_only=True)
        wrap = "mm_projector.modules_to_save.default."
        torch.save({n.replace("mm_projector.", wrap): v for n, v in state.items()}, folder / "mm_projector.bin")
    elif kind == "several shards":
        folder = tmp_path / "in"
        full = load_file(models / "llava-fused" / "model.safetensors")
        files = {name: f"model-{1 + index % 2:05d}-of-00002.safetensors" for index, name in enumerate(sorted(full))}
        folder.mkdir()
        shutil.copy(models / "llava-fused" / "config.json", folder)
        for file in set(files.values()):
            save_file({n: v for n, v in full.items() if files[n] == file}, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    expected = load_file(models / "llava-fused" / "model.safetensors")
    model = read_model(str(folder))
    for name, value in model.fuser.state_dict().items():
        assert torch.equal(value, expected[f"model.mm_projector.fuser.{name}"]), name
    assert model.notes == [f"fuser: {len(model.fuser.state_dict())} tensors from {folder}"]
    assert model.settings.layers == tuple(LAYERS)


def test_weights_that_a_lora_folder_lacks_come_from_its_base(models, tmp_path):
    folder = change_config(models / "adapter", tmp_path / "lora")
    (folder / "mm_projector.bin").unlink()
    torch.save({"base_model.model.model.embed_tokens.weight": torch.ones(1)}, folder / "non_lora_trainables.bin")
    assert "no weights" in read_model(str(folder)).notes[0]
    model = read_model(str(folder), base=str(models / "llava-fused"))
    assert model.notes[0].endswith(f"tensors from {models / 'llava-fused'}")
    assert model.fuser.cross_gate.scale.any()


@pytest.mark.parametrize("tuned", [True, False])
def test_tuned_tower_is_used_where_llava_uses_it(models, tmp_path, tuned):
    folder = change_config(models / "llava-fused", tmp_path / "llava", unfreeze_mm_vision_tower=tuned)
    state = load_file(folder / "model.safetensors")
    key = "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.bias"
    for name, value in CLIPVisionModel.from_pretrained(models / "clip").state_dict().items():
        state["model.vision_tower.vision_tower." + name] = value.clone()
    state[key] += 1
    state["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)  # older files' own
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    bias = read_model(str(folder)).tower.vision_model.encoder.layers[0].mlp.fc1.bias
    stored = CLIPVisionModel.from_pretrained(models / "clip").vision_model.encoder.layers[0].mlp.fc1.bias
    assert torch.equal(bias, stored + 1 if tuned else stored)


@pytest.mark.parametrize("name,layers", [("llava-plain", None), ("clip", None), ("clip", "0,-3"), ("clip", "shallow")])
def test_without_a_fuser_nothing_changes(models, picture, cli, tmp_path, name, layers):
    flags = ["--layers", layers] * (layers is not None)
    code, out, err = cli(
        "--model-path", models / name, "--image", picture, "--output", tmp_path / "out", "--npz", *flags
    )
    assert (code, err) == (0, []) and "a fresh one is shown, which is the identity" in out[0] and len(out) == 2
    found = np.load(tmp_path / "out" / "wide.maps.npz")
    assert not found["difference"].any() and np.array_equal(found["fused"], found["layers"][-1])
    assert found["indices"].tolist() == {None: LAYERS, "0,-3": [0, 6], "shallow": [1, 2, 3, 4, 7]}[layers]


def test_samples_are_where_the_offsets_say(models):
    model = read_model(str(models / "llava-fused"))
    offsets, logits = model.fuser.cross_attn.sampling_offsets, model.fuser.cross_attn.attention_weights
    with torch.no_grad():
        for part in (offsets, logits):
            part.weight.zero_()
            part.bias.zero_()
        bias, weight = offsets.bias.view(16, 4, 4, 2), logits.bias.view(16, 4, 4)  # head, level, point
        bias[5, 2, 1] = torch.tensor([1.5, -0.5])
        weight[5, 2, 1] = np.log(17)  # against 15 others of e^0: 17 / 32
    maps = feature_maps(model, photograph(40, 20), (39, 10))
    # 40 x 20 is padded by 10 rows above and below, so a cell covers 10 x 10 pixels: row (10 + 10) / 10, column 39 / 10
    assert maps.cell == (2, 3) and maps.samples.shape == (16, 4, 4, 2)
    centre = (3.5 * 10, 2.5 * 10 - 10)
    np.testing.assert_allclose(maps.samples[0, 0, 0], centre, atol=1e-5)
    np.testing.assert_allclose(maps.samples[5, 2, 1], (centre[0] + 15, centre[1] - 5), atol=1e-5)
    np.testing.assert_allclose(maps.weights.sum((1, 2)), 1, atol=1e-6)
    np.testing.assert_allclose(maps.weights[5, 2, 1], 17 / 32, atol=1e-6)
    np.testing.assert_allclose(maps.weights[5, 0, 0], 1 / 32, atol=1e-6)


def test_samples_are_those_that_the_attention_reads(models):
    """A value map that is zero but in one cell: only samples near that cell bring something."""
    model = read_model(str(models / "llava-fused"))
    attention = model.fuser.cross_attn
    with torch.no_grad():
        attention.value_proj.weight.copy_(torch.eye(64))
        attention.output_proj.weight.copy_(torch.eye(64))
        attention.value_proj.bias.zero_()
        attention.output_proj.bias.zero_()
    maps = feature_maps(model, photograph(28, 28), (10, 17))
    layers = torch.from_numpy(maps.layers).flatten(1, 2).unsqueeze(1)  # [L, 1, N, C]
    query = model.fuser.query_norm(layers[-1])
    row, column = maps.cell
    for cell in ((1, 1), (2, 0), (3, 2)):
        value = torch.zeros(1, 4 * 16, 64)
        value[0, 16 + cell[0] * 4 + cell[1]] = 1  # in level 1
        got = attention(query, value, (4, 4))[0, row * 4 + column].view(16, 4)[:, 0].detach().numpy()
        place = (maps.samples[:, 1] / 7) - 0.5  # in cells, from the centre of the first
        near = np.clip(1 - np.abs(place - (cell[1], cell[0])), 0, None).prod(-1)
        np.testing.assert_allclose(got, (near * maps.weights[:, 1]).sum(-1), atol=1e-5)


@pytest.mark.parametrize(
    "size,ratio,box",
    [
        ((40, 20), "pad", (0, -10, 40, 30)),
        ((20, 41), "pad", (-10, 0, 31, 41)),
        ((30, 30), "pad", (0, 0, 30, 30)),
        ((40, 20), None, (10, 0, 30, 20)),  # resized to 56 x 28, of which columns 14 to 42 remain
        ((40, 20), "anyres", (0, 0, 40, 20)),
    ],
)
def test_box_is_the_part_of_the_picture_that_the_tower_sees(world, size, ratio, box):
    processor = CLIPImageProcessor.from_pretrained(world / "clip")
    pixels, found = preprocess(photograph(*size), processor, ratio)
    assert tuple(pixels.shape) == (1, 3, 28, 28)
    np.testing.assert_allclose(found, box, atol=1e-9)


@pytest.mark.parametrize("size", [(40, 20), (20, 41), (28, 28), (100, 37)])
@pytest.mark.parametrize("ratio", ["pad", "anyres", None])
def test_pixels_are_llavas(world, size, ratio):
    processor = CLIPImageProcessor.from_pretrained(world / "clip")
    config = type("Config", (), {"image_aspect_ratio": ratio, "image_grid_pinpoints": [[28, 56]]})
    expected = torch.as_tensor(np.stack(process_images([photograph(*size)], processor, config)))
    pixels, _ = preprocess(photograph(*size), processor, ratio)
    # of anyres the first of the tiles is the overview
    assert torch.equal(pixels, expected[:, 0] if ratio == "anyres" else expected)


def test_crop_of_a_small_picture_gets_a_border(world):
    processor = CLIPImageProcessor.from_pretrained(world / "clip", size={"height": 14, "width": 22})
    _, box = preprocess(photograph(44, 28), processor, None)
    np.testing.assert_allclose(box, (-6, -14, 50, 42))  # 22 x 14 of 28 x 28, from column 3 and row 7, 2 pixels each


def test_padding_and_crop_are_told_from_the_picture(models, tmp_path):
    model = read_model(str(models / "llava-fused"))
    assert feature_maps(model, photograph(40, 20)).real.tolist() == [[False] * 4, [True] * 4, [True] * 4, [False] * 4]
    # 40 x 10: 15 rows of padding, cells of 10, so half of the second and of the third row
    assert feature_maps(model, photograph(40, 10)).real.sum(1).tolist() == [0, 4, 4, 0]
    assert feature_maps(model, photograph(4, 40)).real.sum(0).tolist() == [0, 4, 4, 0]
    cropping = model._replace(aspect_ratio=None)
    assert feature_maps(cropping, photograph(40, 20)).real.all()
    assert feature_maps(cropping, photograph(40, 20), (10.1, 19.9)).cell == (3, 0)
    with pytest.raises(ValueError, match="--at 9,5 is cut off .* x from 10 to 30 and y from 0 to 20"):
        feature_maps(cropping, photograph(40, 20), (9, 5))


def test_colours_ignore_padding_and_show_equal_maps_equally(models):
    maps = feature_maps(read_model(str(models / "llava-plain")), photograph(40, 20))
    shown = colours(maps)
    assert len(shown) == 6 and all(rgb.shape == (4, 4, 3) for rgb in shown)
    assert np.array_equal(shown[-1], shown[-2]) and 0.1 < shown[-1][maps.real].std() < 0.5
    layers = maps.layers.copy()
    layers[:, ~maps.real] = 100 * np.random.RandomState(0).randn(5, 8, 64)
    for before, after in zip(shown, colours(maps._replace(layers=layers))):
        np.testing.assert_allclose(before[maps.real], after[maps.real], atol=1e-9)
    turned = maps._replace(layers=np.stack([-maps.layers[-1]] * 4 + [maps.layers[-1]]))
    for rgb in colours(turned):  # the same patches up to a turn of the colours
        np.testing.assert_allclose(rgb, shown[-1], atol=1e-6)


def test_colours_of_a_map_without_contrast_are_grey(models):
    maps = feature_maps(read_model(str(models / "clip")), photograph(28, 28))
    maps = maps._replace(layers=np.ones_like(maps.layers), fused=np.ones_like(maps.fused))
    assert all((rgb == 0.5).all() for rgb in colours(maps))


def test_panels_share_their_scales_and_lie_over_the_picture(models):
    maps = feature_maps(read_model(str(models / "llava-fused")), photograph(40, 20), (35, 15))
    figure = draw(maps, "wide.png")
    FigureCanvasAgg(figure).draw()
    panels = {}
    for axes in figure.axes:
        panels.setdefault(axes.get_title().split(",")[0], []).append(axes)
    names = [f"layer {index}" for index in LAYERS[:-1]] + ["layer 7 = query", "fused", "picture", "difference"]
    assert all(len(panels[name]) == 1 for name in names)
    assert len(panels["norm"]) == 6 and len(panels["samples"]) == 4
    norms = [axes.images[-1] for axes in panels["norm"]]
    expected = [*np.linalg.norm(maps.layers, axis=-1), np.linalg.norm(maps.fused, axis=-1)]
    assert all(np.allclose(image.get_array(), norm) for image, norm in zip(norms, expected))
    limits = np.percentile(np.stack(expected)[:, maps.real], (2, 98))
    assert all(np.allclose(image.get_clim(), limits) for image in norms)
    for name in names[:6] + ["difference"]:
        axes = panels[name][0]
        assert axes.images[-1].get_extent() == [0, 40, 30, -10]  # the padded square
        assert (axes.get_xlim(), axes.get_ylim()) == ((0, 40), (20, 0))  # the picture
    share = (np.linalg.norm(maps.difference, axis=-1) / np.linalg.norm(maps.layers[-1], axis=-1))[maps.real].mean()
    assert panels["difference"][0].get_title() == f"difference, {share:.1%}"
    for level, axes in enumerate(panels["samples"]):
        dots, weights = axes.collections[0], maps.weights[:, level].ravel()
        assert np.allclose(dots.get_offsets(), maps.samples[:, level].reshape(-1, 2))
        assert np.allclose(dots.get_sizes() / dots.get_sizes().sum(), weights / weights.sum())
        assert axes.get_title() == f"samples, weight {weights.sum() / 16:.0%}"
        left, right, bottom, top = (*axes.get_xlim(), *axes.get_ylim())
        assert ((left + right) / 2, (top + bottom) / 2) == (35, 15)  # the middle of the cell
        shown = (np.abs(maps.samples - (35, 15)) <= (right - left) / 2).all(-1)
        assert 0.95 <= maps.weights[shown].sum() / 16 <= 1 and np.isclose(right - left, bottom - top)
    boxes = [axes.get_position() for axes in figure.axes]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    "settings,absent,note",
    [
        (dict(mm_fuser_attention="dense"), {"samples"}, "without samples"),
        (dict(mm_fuser_attention="window"), {"samples"}, "without samples"),
        (dict(mm_fuser_fusion="weighted_sum"), {"samples"}, "without samples"),
        (dict(mm_fuser_fusion="mean"), {"samples"}, "mean, which has no weights"),
        (dict(mm_fuser_fusion="channel_concat"), {"samples"}, "channel_concat acts in the projector's first layer"),
        (dict(mm_fuser_fusion="token_concat"), {"samples", "fused", "difference"}, "without the fused map"),
    ],
    ids=lambda value: next(iter(value.values())) if isinstance(value, dict) else "",
)
def test_every_kind_and_fusion_is_drawn_with_what_it_has(world, models, cli, picture, tmp_path, settings, absent, note):
    model = model_with(world, **settings)
    for parameter in model.get_model().mm_projector.fuser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.config.mm_vision_tower, model.config.image_aspect_ratio = str(models / "clip"), "pad"
    model.save_pretrained(tmp_path / "llava-other")
    flags = ["--image", picture, "--output", tmp_path / "out", "--at", "5,5", "--npz"]
    code, out, err = cli("--model-path", tmp_path / "llava-other", *flags)
    assert (code, err) == (0, []) and note in " ".join(out)
    found = np.load(tmp_path / "out" / "wide.maps.npz")
    assert {"samples", "fused", "difference"} - set(found) == absent
    if "fused" not in absent:
        layers = [torch.from_numpy(layer).flatten(0, 1)[None] for layer in found["layers"]]
        expected = model.get_model().mm_projector.fuser(layers)[0]
        torch.testing.assert_close(torch.from_numpy(found["fused"]).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_files_folders_and_urls_become_pictures_of_their_own(models, tmp_path, cli):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "A.jpg", "b.webp"):
        photograph(30, 30).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    (folder / "._a.png").write_bytes(b"no picture")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        images = ["--image", folder, "--image", f"{url}/a.png?size=3", f"{url}/absent.png"]
        code, out, err = cli("--model-path", models / "clip", "--output", tmp_path / "out", *images)
        server.shutdown()
    assert code == 1 and len(err) == 1 and "absent.png: it cannot be fetched: 404" in err[0]
    assert [line.split("/")[-1] for line in out[1:]] == ["A.maps.png", "a-2.maps.png", "b.maps.png", "a-3.maps.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "A.maps.png",
        "a-2.maps.png",
        "a-3.maps.png",
        "b.maps.png",
    ]
    for path in (tmp_path / "out").iterdir():
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width > 1500 and image.width > image.height > 500


def test_output_names_differ():
    assert output_names(["x/a.png", "y/A.png", "a-2.png", "http://h/%C3%A4 b.jpg?q", "https://h", "/"]) == [
        "a",
        "A-2",
        "a-2-2",
        "ä_b",
        "picture",
        "picture-2",
    ]


def test_what_fails_is_one_line_and_the_others_are_done(models, picture, cli, tmp_path):
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:100])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    photograph(10, 10).save(tmp_path / "small.png")
    closed = f"http://127.0.0.1:{host.free_port()}/x.png"
    names = ["broken.png", "text.jpg", "empty", "absent.png", "small.png"]
    images = [tmp_path / name for name in names] + [closed, picture]
    flags = ["--output", tmp_path / "out", "--at", "15,5"]
    code, out, err = cli("--model-path", models / "clip", "--image", *images, *flags)
    assert code == 1 and out[1:] == [str(tmp_path / "out" / "wide.maps.png")]
    assert all(line.startswith("python -m llava_mmfuser visualize: error: ") for line in err)
    reasons = {
        "empty": "has no pictures",
        "broken.png": "cannot be read as a picture",
        "text.jpg": "no format that Pillow knows",
        "absent.png": "no such file",
        "small.png": "--at 15,5 lies outside the picture of 10 x 10 pixels",
        closed: "cannot be fetched",
    }
    assert len(err) == len(reasons)
    assert all(any(name in line and reason in line for line in err) for name, reason in reasons.items())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["wide.maps.png"]


def test_no_picture_is_overwritten_and_maps_of_an_earlier_run_are_no_pictures(models, picture, cli):
    folder = picture.parent / "pictures"
    folder.mkdir()
    for name in ("a.png", "a.jpg"):
        photograph(40, 20).save(folder / name)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for _ in range(2):
        code, out, err = cli("--model-path", models / "clip", "--image", folder, "--output", folder)
        assert (code, err) == (0, [])
        assert [os.path.basename(line) for line in out[1:]] == ["a.maps.png", "a-2.maps.png"]
    assert {name: (folder / name).read_bytes() for name in before} == before

    (folder / "b.maps.png").write_bytes(before["a.png"])
    (folder / "b.png").write_bytes(before["a.png"])
    flags = ["--image", folder / "b.maps.png", "--image", folder / "b.png", "--output", folder]
    code, _, err = cli("--model-path", models / "clip", *flags)
    assert code == 1 and "its feature maps would overwrite" in err[0]
    assert (folder / "b.maps.png").read_bytes() == before["a.png"]


def test_names_that_are_no_text_are_escaped(models, picture, cli, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    shutil.copy(picture, os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    (folder / "two\nlines.png").write_text("no picture")
    shutil.copy(picture, folder / "z.png")
    code, out, err = cli("--model-path", models / "clip", "--image", folder, "--output", tmp_path / "out")
    assert code == 1 and [os.path.basename(line) for line in out[1:]] == ["caf_.maps.png", "z.maps.png"]
    assert len(err) == 1 and "two lines.png: it cannot be read" in err[0]


def test_unfinished_files_are_not_left_behind(models, picture, cli, tmp_path, monkeypatch):
    def full(stream, **arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_mmfuser.visualize.command.np.savez", full)
    code, _, err = cli("--model-path", models / "clip", "--image", picture, "--output", tmp_path / "out", "--npz")
    assert (
        code == 1 and "No space left" in err[0] and [p.name for p in (tmp_path / "out").iterdir()] == ["wide.maps.png"]
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--at", "5"], "--at 5 is not allowed; use x,y"),
        (["--layers", "9,99"], "has a fuser, which knows its layers; drop the flag"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--vision-tower", "/no/such/tower"], "by --vision-tower PATH"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_done(models, picture, cli, tmp_path, flags, message):
    code, out, err = cli(
        "--model-path", models / "llava-fused", "--image", picture, "--output", tmp_path / "out", *flags
    )
    assert code == 1 and out == [] and len(err) == 1 and message in err[0]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"mm_fuser_layers": [3, 4, 5, 6, 99]}, "layer 99 does not exist"),
        ({"mm_fuser_num_points": 2}, "weights do not fit its config.json: .*sampling_offsets"),
        ({"mm_vision_tower": None}, "has no mm_vision_tower; give --vision-tower"),
        ({"s2": True}, "s2=True together with mm_projector_type=mmfuser is not supported"),
        ({"mm_vision_tower": None, "mm_projector_type": None}, "no mm_vision_tower"),
    ],
)
def test_wrong_checkpoints_say_what_is_wrong(models, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_model(str(change_config(models / "adapter", tmp_path / "in", **changes)))


def test_other_models_are_refused(world, models, tmp_path):
    with pytest.raises(ValueError, match="'llama' and neither mm_vision_tower nor"):
        read_model(str(world / "llama"))
    with pytest.raises(ValueError, match="is a file; name the folder"):
        read_model(str(models / "adapter" / "mm_projector.bin"))
    with pytest.raises(ValueError, match="no config.json"):
        read_model(str(tmp_path))
    folder = shutil.copytree(models / "clip", tmp_path / "clip")
    state = load_file(folder / "model.safetensors")
    state.pop("vision_model.encoder.layers.0.mlp.fc1.bias")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights: .*fc1.bias"):
        read_model(str(folder))


def test_missing_matplotlib_is_said(models, picture, cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("--model-path", models / "clip", "--image", picture, "--output", tmp_path / "out")
    assert code == 1 and len(err) == 1 and "pip install matplotlib" in err[0] and not (tmp_path / "out").exists()


def test_command_runs_on_its_own_and_offline(models, picture, tmp_path):
    command = [sys.executable, "-m", "llava_mmfuser", "visualize", "--image", picture, "--output", tmp_path / "out"]
    done = host.run([*command, "--model-path", models / "llava-fused", "--at", "20,10"])
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out" / "wide.maps.png")
    done = host.run([*command, "--model-path", "someone/llava-of-no-one"], check=False)
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1
    assert "someone/llava-of-no-one is no folder on this machine, and cannot be downloaded" in done.stdout


def test_a_bare_siglip_tower_is_shown(tmp_path):
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=7, num_attention_heads=2)
    tower = SiglipVisionModel(SiglipVisionConfig(image_size=56, patch_size=14, **sizes)).eval()
    tower.save_pretrained(tmp_path)
    processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    processor.save_pretrained(tmp_path)
    picture = photograph(60, 60)
    maps = feature_maps(read_model(str(tmp_path)), picture)
    states = tower(processor(picture, return_tensors="pt").pixel_values, output_hidden_states=True).hidden_states
    assert maps.indices == (2, 3, 4, 5, 6) and maps.box == (0, 0, 60, 60)
    for index, found in zip(maps.indices, maps.layers):
        torch.testing.assert_close(torch.from_numpy(found).flatten(0, 1), states[index][0])
    assert not maps.difference.any()
