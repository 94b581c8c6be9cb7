"""LLaVA-NeXT, through its own unmodified train.py, model and loader.

Its code is on no registry: name a checkout by LLAVA_NEXT_CHECKOUT, in an environment that has what it imports
(docs/compatibility.md) and no other LLaVA. Tiny models; CLIP with LLaMA, SigLIP of real width with Qwen2.
"""

import json
import os
import shutil
import sys

import host
import pytest
import torch
from safetensors.torch import load_file

from llava_mmfuser import MMFuser

CHECKOUT = os.environ.get("LLAVA_NEXT_CHECKOUT")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="LLAVA_NEXT_CHECKOUT names no checkout of LLaVA-NeXT"),
    pytest.mark.fp16_cpu,
]
SIGLIP = "google/siglip-tiny-patch14-384"
FUSER = {"fuser." + name for name, _ in MMFuser(64).named_parameters()}
MLP = {f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
ALL_PARTS = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
TRAINED = ("mm_mlp_adapter", "mm_vision_tower,mm_mlp_adapter", "mm_mlp_adapter,mm_language_model")


def make_qwen(folder):
    from tokenizers import ByteLevelBPETokenizer
    from toy.models import reading_texts
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(map(" ".join, reading_texts(200)), vocab_size=400, show_progress=False)
    folder.mkdir()
    tokenizer.save_model(str(folder))
    marks = ["<|im_start|>", "<|im_end|>"]
    files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    tokenizer = Qwen2Tokenizer(*files, additional_special_tokens=marks)
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=4096, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_siglip(home, name=SIGLIP):
    """Where the hub's library finds it by its name: NeXT takes every folder for a CLIP tower."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    snapshot = home / "hub" / f"models--{name.replace('/', '--')}" / "snapshots" / "0"
    sizes = dict(hidden_size=1152, intermediate_size=16, num_hidden_layers=4, num_attention_heads=16)
    SiglipVisionModel(SiglipVisionConfig(image_size=384, patch_size=14, **sizes)).save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0")


@pytest.fixture(scope="module")
def next_world(world, tmp_path_factory):
    """`world`, with the names that NeXT goes by, a Qwen2, a SigLIP tower, and pictures of several kinds."""
    folder = tmp_path_factory.mktemp("next")
    for name in ("data", "clip"):
        shutil.copytree(world / name, folder / name)
    shutil.copytree(world / "llama", folder / "vicuna")
    make_qwen(folder / "qwen")
    make_siglip(folder / "home")
    from PIL import Image

    records = json.loads((folder / "data" / "finetune.json").read_text())[:6]
    picture = Image.open(folder / "data" / records[0]["image"]).convert("RGB")
    for name, size in (("wide", (56, 25)), ("tall", (20, 50))):
        picture.resize(size).save(folder / "data" / "images" / f"{name}.png")
    video = folder / "data" / "shareVideoGPTV" / "clip"  # NeXT reads a folder of frames below a folder of this name
    video.mkdir(parents=True)
    for index in range(3):
        picture.rotate(30 * index).save(video / f"{index}.png")
    records[1]["image"] = "images/wide.png"
    records[2]["image"] = ["images/tall.png", "images/wide.png"]
    records[2]["conversations"][0]["value"] = "<image>\n<image>\nWhat is the number?"
    records[3] = {"id": "text", "conversations": [dict(turn) for turn in records[3]["conversations"]]}
    records[3]["conversations"][0]["value"] = "What is the number?"
    del records[4]["image"]
    records[4]["video"] = "shareVideoGPTV/clip"
    (folder / "data" / "mixed.json").write_text(json.dumps(records))
    return folder


def in_next(next_world, tmp_path, script, *arguments, check=True, **variables):
    file = tmp_path / "script.py"
    file.write_text(script)
    env = host.environment(HF_HOME=str(next_world / "home"), **variables)
    return host.run([sys.executable, host.HERE / "next_cpu.py", CHECKOUT, file, *arguments], env=env, check=check)


# One process for several runs: most of a run is NeXT's imports. Released models are in 16 bits.
TRAIN = """
import json, sys, torch
import llava.train.train as upstream
from safetensors.torch import load_file, save_file
for name, arguments in json.load(open(sys.argv[1])).items():
    torch.manual_seed(0)
    sys.argv = ["train.py", *arguments]
    print("== run", name, flush=True)
    try:
        upstream.train()
    except Exception as error:
        print("== failed", name, type(error).__name__, error, flush=True)
    if name.endswith("released"):
        file = arguments[arguments.index("--output_dir") + 1] + "/model.safetensors"
        state = {key: value.bfloat16() for key, value in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
"""


def flags(next_world, output, stage="finetune", **options):
    """As NeXT's scripts, tiny; `mixed` holds anyres tiles, two pictures in a sample, a video and text alone."""
    values = dict(
        model_name_or_path=next_world / "vicuna",
        version="plain" if stage == "pretrain" else "v1",
        data_path=next_world / "data" / ("pretrain.json" if stage == "pretrain" else "mixed.json"),
        video_folder=next_world / "data",
        frames_upbound=2,
        force_sample=True,
        mm_tunable_parts="mm_mlp_adapter" if stage == "pretrain" else ALL_PARTS,
        tune_mm_mlp_adapter=None,
        mm_patch_merge_type="flat" if stage == "pretrain" else "spatial_unpad",  # an adapter has no image_newline
        image_aspect_ratio="anyres",
        image_grid_pinpoints="[[28, 56], [56, 28], [56, 56]]",
        group_by_modality_length=None,
        attn_implementation="eager",
        gradient_checkpointing=False,
        max_steps=3,
        per_device_train_batch_size=2,
        model_max_length=1024,
    )
    return host.train_arguments(next_world, output, stage, **{**values, **options})


def train(next_world, tmp_path, runs, **variables):
    """What was printed by each run."""
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(runs))
    printed = in_next(next_world, tmp_path, TRAIN, file, **variables).stdout
    return {part.split("\n")[0]: part for part in printed.split("== run ")[1:]}


def projector(folder):
    """The projector's weights in a folder, by their names behind mm_projector."""
    for name in ("mm_projector.bin", "non_lora_trainables.bin"):
        if (folder / name).exists():
            state = torch.load(folder / name)
            break
    else:
        state = load_file(folder / "model.safetensors")
    return {name.split("mm_projector.")[1]: value for name, value in state.items() if "mm_projector." in name}


@pytest.fixture(scope="module")
def made(next_world, tmp_path_factory):
    """All runs with LLaMA and CLIP: folder, and what each printed."""
    folder = tmp_path_factory.mktemp("made")
    released, still = dict(mm_projector_type="mlp2x_gelu"), dict(learning_rate=0, max_steps=1)
    adapter = folder / "llava-vicuna-pretrain" / "mm_projector.bin"
    start = folder / "llava-vicuna-released"
    kinds = {
        "llava-vicuna-pretrain": flags(next_world, folder / "llava-vicuna-pretrain", "pretrain"),
        "llava-vicuna-finetune": flags(
            next_world, folder / "llava-vicuna-finetune", pretrain_mm_mlp_adapter=adapter, mm_vision_tower_lr=1e-2
        ),
        "llava-vicuna-released": flags(next_world, start, **released),
        "llava-vicuna-full": flags(
            next_world, folder / "llava-vicuna-full", model_name_or_path=start, mm_vision_tower_lr=0, **still
        ),
        "llava-vicuna-lora": flags(
            next_world,
            folder / "llava-vicuna-lora",
            model_name_or_path=start,
            lora_enable=True,
            lora_r=4,
            mm_tunable_parts=None,
            **still,
        ),
        "resumable": flags(next_world, folder / "resumable", "pretrain", save_strategy="steps", save_steps=2),
    }
    for parts in TRAINED:
        for rate in (0, 1e-2):
            name = f"{parts}:{rate}"
            kinds[name] = flags(next_world, folder / name, mm_tunable_parts=parts, learning_rate=rate, max_steps=2)
    for parts in ("mm_language_model", "mm_vision_tower"):
        kinds[parts] = flags(next_world, folder / parts, mm_tunable_parts=parts)
    kinds["token_concat"] = flags(
        next_world, folder / "token_concat", mm_fuser_fusion="token_concat", mm_patch_merge_type="flat"
    )
    return folder, train(next_world, folder, kinds)


def test_pretraining_saves_every_fuser_and_mlp_weight(made):
    folder, printed = made
    assert "fuser weights: fresh, starts as identity" in printed["llava-vicuna-pretrain"]
    state = projector(folder / "llava-vicuna-pretrain")
    assert set(state) == FUSER | MLP and state["fuser.cross_gate.scale"].abs().min() > 0


def test_finetuning_on_tiles_several_pictures_video_and_text_trains_the_tower_too(made, next_world):
    folder, printed = made
    assert "fuser weights: from" in printed["llava-vicuna-finetune"]
    assert "'mm_fuser_cross_gate'" in printed["llava-vicuna-finetune"]
    state = load_file(folder / "llava-vicuna-finetune" / "model.safetensors")
    before = load_file(next_world / "clip" / "model.safetensors")
    mark = "model.vision_tower.vision_tower."
    changed = {n for n, v in before.items() if not torch.equal(state[mark + n], v.to(state[mark + n].dtype))}
    assert {int(name.split("layers.")[1][0]) for name in changed if "layers." in name} == set(range(7))
    assert any("embeddings" in name for name in changed) and not any("layers.7." in name for name in changed)
    config = json.loads((folder / "llava-vicuna-finetune" / "config.json").read_text())
    assert config["mm_projector_type"] == "mmfuser" and config["mm_fuser_layers"] == [3, 4, 5, 6, 7]
    assert config["mm_tunable_parts"] == ALL_PARTS and config["mm_vision_select_layer"] == -2


@pytest.mark.parametrize("parts", TRAINED)
def test_tunable_parts_train_what_they_name_and_the_fuser_with_the_adapter(made, parts):
    folder, _ = made
    before, after = (folder / f"{parts}:{rate}" for rate in (0, 1e-2))
    if parts == "mm_mlp_adapter":
        before, after = (torch.load(path / "mm_projector.bin") for path in (before, after))
    else:
        before, after = (load_file(path / "model.safetensors") for path in (before, after))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    marks = ("vision_tower", "mm_projector")
    groups = {next((mark for mark in marks if mark in name), "rest") for name in changed}
    words = {"mm_vision_tower": "vision_tower", "mm_mlp_adapter": "mm_projector", "mm_language_model": "rest"}
    assert groups == {words[part] for part in parts.split(",")}
    assert any("fuser.cross_gate" in name for name in changed)


@pytest.mark.parametrize("parts", ["mm_language_model", "mm_vision_tower"])
def test_fresh_fuser_that_no_part_would_train_is_refused(made, parts):
    _, printed = made
    message = f"== failed {parts} ValueError mm_tunable_parts={parts}, but the fuser is still an identity"
    assert message in printed[parts]
    assert "Loaded" not in printed[parts]


def test_tokens_that_are_no_square_map_are_refused(made):
    _, printed = made
    message = "mm_spatial_pool_mode=bilinear together with mm_fuser_fusion=token_concat is not supported"
    assert message in printed["token_concat"]


def test_stage_1_in_tunable_parts_saves_what_resuming_needs(made):
    folder, _ = made
    saved = {path.name for path in (folder / "resumable" / "checkpoint-2").iterdir()}
    assert {"mm_projector.bin", "optimizer.pt", "trainer_state.json", "config.json"} <= saved


ANSWER = """
import json, sys, torch
from PIL import Image
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init
disable_torch_init()
folder, data, result, loads = sys.argv[1:]
found = {}
for name, (path, base) in json.loads(loads).items():
    print("== load", name, flush=True)
    tokenizer, model, processor, _ = load_pretrained_model(
        path, base, get_model_name_from_path(path), attn_implementation="eager", overwrite_config=None)
    pictures = [Image.open(f"{data}/images/{file}.png").convert("RGB") for file in ("wide", "tall")]
    images = [image.half() for image in process_images(pictures, processor, model.config)]
    ids = torch.tensor([[1, -200, 5, 6, -200, 7]])
    given = dict(images=images, image_sizes=[picture.size for picture in pictures], modalities=["image", "image"])
    with torch.inference_mode():
        found[name] = {
            "logits": model(ids, **given)[0],
            "answer": model.generate(ids, do_sample=False, max_new_tokens=3, **given),
            "projector": model.get_model().mm_projector.state_dict(),
        }
torch.save(found, result)
"""


@pytest.fixture(scope="module")
def answers(made, next_world, tmp_path_factory):
    folder, _ = made
    names = {name: (str(folder / f"llava-vicuna-{name}"), None) for name in ("finetune", "released", "full")}
    names["lora"] = (str(folder / "llava-vicuna-lora"), str(folder / "llava-vicuna-released"))
    # With a base model NeXT goes by other words in the name, reads a tokenizer beside the adapter, and leaves a tower
    # without weights unless it is told to load it late.
    llama = folder / "llava-llama-pretrain"
    shutil.copytree(folder / "llava-vicuna-pretrain", llama)
    for file in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(next_world / "vicuna" / file, llama)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "delay_load": True}))
    names["adapter"] = (str(llama), str(next_world / "vicuna"))
    result = folder / "answers.pt"
    data = next_world / "data"
    done = in_next(next_world, folder, ANSWER, folder, data, result, json.dumps(names), check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    return torch.load(result), {part.split("\n")[0]: part for part in done.stdout.split("== load ")[1:]}


def test_checkpoints_load_by_nexts_loader_and_answer(made, answers):
    folder, (found, printed) = made[0], answers
    for name, source in (("finetune", "finetune"), ("adapter", "pretrain")):
        assert found[name]["logits"].isfinite().all() and found[name]["answer"].numel() > 0
        for key, value in projector(folder / f"llava-vicuna-{source}").items():
            assert torch.equal(found[name]["projector"][key], value.half()), key
    assert f"fuser weights: from {folder / 'llava-vicuna-finetune'}" in printed["finetune"]
    assert "loaded 24 of 24 fuser tensors" in printed["adapter"]


@pytest.mark.parametrize("route", ["full", "lora"])
def test_released_checkpoint_answers_bit_for_bit_as_before_at_learning_rate_0(answers, route):
    found, _ = answers
    assert set(found[route]["projector"]) == FUSER | MLP
    assert torch.equal(found[route]["logits"], found["released"]["logits"])
    assert torch.equal(found[route]["answer"], found["released"]["answer"])


def test_plain_next_trains_bit_for_bit_as_without_the_package(made, next_world, tmp_path):
    folder, _ = made
    output = tmp_path / "released"
    arguments = flags(next_world, output, mm_projector_type="mlp2x_gelu")
    train(next_world, tmp_path, {"released": arguments}, LLAVA_MMFUSER_DISABLE="1")
    with_it, without = (load_file(path / "model.safetensors") for path in (folder / "llava-vicuna-released", output))
    assert with_it.keys() == without.keys() and all(
        torch.equal(value, without[name]) for name, value in with_it.items()
    )
    assert host.losses(folder / "llava-vicuna-released") == host.losses(output)
    configs = [json.loads((path / "config.json").read_text()) for path in (folder / "llava-vicuna-released", output)]
    assert configs[0] == configs[1]


def test_siglip_and_qwen2_train_load_and_answer(next_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    options = dict(
        model_name_or_path=next_world / "qwen",
        version="qwen_1_5",
        vision_tower=SIGLIP,
        image_aspect_ratio="pad",
        image_grid_pinpoints=None,
        per_device_train_batch_size=1,
        max_steps=2,
        mm_fuser_layers="1,3",
    )
    plain = dict(mm_projector_type="mlp2x_gelu", mm_fuser_layers=None)
    released, full = folder / "llava-qwen-released", folder / "llava-qwen-full"
    trained = folder / "llava-qwen-finetune"
    still = dict(learning_rate=0, mm_vision_tower_lr=0, max_steps=1, model_name_or_path=released)
    printed = train(
        next_world,
        folder,
        {
            "released": flags(next_world, released, **{**options, **plain}),
            "full": flags(next_world, full, **{**options, **still}),
            "finetune": flags(next_world, trained, **options),
            "deleted": flags(next_world, folder / "deleted", **{**options, "mm_fuser_layers": "1,-1"}),
            "cls": flags(next_world, folder / "cls", **{**options, "mm_vision_select_feature": "cls_patch"}),
        },
    )
    assert "fuser weights: fresh, starts as identity" in printed["full"], printed["full"][-3000:]
    assert "layer -1 is not computed, because LLaVA deletes the last 1 of this vision tower's 4" in printed["deleted"]
    assert "mm_vision_select_feature='cls_patch', but a SigLIP tower has no CLS" in printed["cls"]
    config = json.loads((trained / "config.json").read_text())
    assert config["mm_vision_tower"] == SIGLIP and config["mm_fuser_layers"] == [1, 3], printed["finetune"][-3000:]
    state = load_file(trained / "model.safetensors")
    assert state["model.mm_projector.fuser.cross_gate.scale"].abs().max() > 0
    names = {name: (str(folder / f"llava-qwen-{name}"), None) for name in ("released", "full", "finetune")}
    result, data = folder / "answers.pt", next_world / "data"
    done = in_next(next_world, folder, ANSWER, folder, data, result, json.dumps(names), check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    found = torch.load(result)
    assert torch.equal(found["full"]["logits"], found["released"]["logits"])
    assert torch.equal(found["full"]["answer"], found["released"]["answer"])
    assert found["finetune"]["logits"].isfinite().all() and found["finetune"]["answer"].numel() > 0


INPUTS = """
import sys, torch
import llava.train.train as upstream
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
model = LlavaLlamaForCausalLM(LlavaConfig(vocab_size=64, max_position_embeddings=1024, **sizes)).eval()

def initialize(kind):
    arguments = upstream.ModelArguments(vision_tower=sys.argv[1], mm_vision_select_layer=-2, mm_projector_type=kind)
    arguments.mm_patch_merge_type = "spatial_unpad"
    model.get_model().initialize_vision_modules(arguments)

one, two = [[1, -200, 5, 6]], [[1, -200, 5, -200, 6]]
def pictures(*tiles):
    return [torch.rand(*((count,) if count else ()), 3, 28, 28) for count in tiles]

inputs = {}  # name -> config, token ids, pictures, modalities
for merge in ("flat", "spatial", "spatial_unpad", "spatial_maxpool2x2", "spatial_nobase"):
    inputs["anyres, " + merge] = ({"mm_patch_merge_type": merge}, two, pictures(5, 3), "image image")
inputs["anyres_max"] = ({"image_aspect_ratio": "anyres_max_2"}, two, pictures(5, 3), "image image")
inputs["2 x 2"] = ({"image_aspect_ratio": "pad", "mm_patch_merge_type": "spatial"}, one, pictures(5), "image")
inputs["several pictures"] = ({}, two, pictures(0, 0), "image image")
inputs["text alone"] = ({}, [[1, 5, 6, 7]], pictures(1), "text")
inputs["video, a picture"] = ({}, two, pictures(4, 3), "video image")
for position in ("grid", "frame", "one_token", "no_token"):
    inputs["newline " + position] = ({"mm_newline_position": position}, one, pictures(4), "video")
for mode in ("average", "max", "bilinear"):
    given = {"mm_spatial_pool_mode": mode, "mm_patch_merge_type": "flat"}
    inputs["pooling " + mode] = (given, one, pictures(4), "video")
usual = dict(mm_patch_merge_type="spatial_unpad", mm_spatial_pool_mode="bilinear", mm_newline_position="one_token",
             mm_spatial_pool_stride=2, image_aspect_ratio="anyres", image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]])

def logits(name):
    given, ids, images, modalities = inputs[name]
    model.config.update({**usual, **given})
    call = dict(images=images, image_sizes=[(56, 50), (20, 50)], modalities=modalities.split())
    return model(torch.tensor(ids), **call)[0]

def multimodals():
    frames = inputs["video, a picture"][2]
    model.config.update(dict(usual, add_faster_video=True))
    slow, fast = model.encode_multimodals(torch.cat(frames), [0], [4, 3])
    model.config.add_faster_video = False  # NeXT's own forward uses a name of it that is not defined
    return [*slow, fast[0]]

with torch.no_grad():
    initialize("mlp2x_gelu")
    before, encoded = {name: logits(name) for name in inputs}, multimodals()
    initialize("mmfuser")
    for name in inputs:
        assert torch.equal(logits(name), before[name]), name
    assert all(map(torch.equal, multimodals(), encoded))
    for parameter in model.get_model().mm_projector.fuser.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
model.get_vision_tower().requires_grad_(True)
blocks = model.get_vision_tower().vision_tower.vision_model.encoder.layers
assert not any(torch.equal(*pair) for pair in zip(multimodals(), encoded))
for name in inputs:
    model.zero_grad()
    after = logits(name)
    assert after.isfinite().all() and torch.equal(after, before[name]) == (name == "text alone"), name
    after.square().sum().backward()
    reached = [block.mlp.fc1.weight.grad is not None and bool(block.mlp.fc1.weight.grad.any()) for block in blocks]
    assert reached == [name != "text alone"] * 7 + [False], (name, reached)
    print("== done", name)
"""


def test_every_input_is_as_without_a_fuser_and_reaches_all_layers(next_world, tmp_path):
    printed = in_next(next_world, tmp_path, INPUTS, next_world / "clip").stdout
    assert printed.count("== done") == 17


def test_source_patch_fits_and_needs_no_hook(next_world, tmp_path, monkeypatch):
    vendored = tmp_path / "vendored"
    for name in ("llava", "trl"):
        shutil.copytree(os.path.join(CHECKOUT, name), vendored / name)
    patch = next((host.ROOT / "patches").glob("*.patch"))
    host.run(["git", "apply", patch], cwd=vendored, env=dict(os.environ, GIT_CEILING_DIRECTORIES=str(tmp_path)))
    monkeypatch.setattr(sys.modules[__name__], "CHECKOUT", str(vendored))
    script = "import llava, llava_mmfuser\nprint(llava.__file__, llava_mmfuser.status()['active'])"
    printed = in_next(next_world, tmp_path, script, LLAVA_MMFUSER_DISABLE="1").stdout
    assert f"{vendored / 'llava' / '__init__.py'} True" in printed
