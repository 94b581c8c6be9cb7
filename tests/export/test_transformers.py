"""Exported folders in transformers of today, against what LLaVA's own code said (`making.py` wrote it down)."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from making import KINDS, LAYERS, PLAIN, PROMPT, QUESTION, ROUNDED, TOKENIZERS, WITH_BASE, pictures
from safetensors.torch import load_file, save_file

MADE = Path(os.environ.get("EXPORTED") or "nowhere") / "exported"
if not MADE.is_dir():
    pytest.skip("needs the folders of making.py in $EXPORTED; see scripts/test.sh export", allow_module_level=True)

CACHE = tempfile.TemporaryDirectory()  # where transformers copies a folder's code to
os.environ["HF_MODULES_CACHE"] = CACHE.name
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
)

TRUST = {"trust_remote_code": True}
FOR_ALL = ("deformable", "window", "tokens", "tower", "shut", "lora")  # also in older versions


def folders(*names):
    return [pytest.param(name, marks=() if name in FOR_ALL else pytest.mark.matrix) for name in names]


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, **{**TRUST, "dtype": torch.float32, **options}).eval()


def answers(folder):
    """What `making.ask_llava` asks."""
    model, processor = load(folder), AutoProcessor.from_pretrained(folder)
    image_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert image_id == model.config.image_token_index
    found = {}
    for number, picture in enumerate(pictures()):
        inputs = processor(images=picture, text=PROMPT, return_tensors="pt")
        ids = inputs["input_ids"]
        with torch.inference_mode():
            features = model.get_image_features(inputs["pixel_values"])
            features = getattr(features, "pooler_output", features)
            logits = model(**inputs).logits
            made = model.generate(**inputs, do_sample=False, max_new_tokens=32, min_new_tokens=32)
        place = int((ids[0] == image_id).nonzero()[0])
        count = int((ids == image_id).sum())
        assert (ids[0, place : place + count] == image_id).all()
        found["ids"] = torch.cat([ids[:, :place], torch.tensor([[-200]]), ids[:, place + count :]], dim=1)
        found[f"pixels {number}"] = inputs["pixel_values"]
        found[f"features {number}"] = torch.stack(list(features)).flatten(0, -3)
        found[f"logits {number}"] = logits[..., :image_id]
        found[f"tokens {number}"] = made[:, ids.shape[1] :]
        assert (logits[..., image_id:].amax(-1) < logits[..., :image_id].amax(-1)).all()  # rows that LLaVA has not
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize("name", folders(*KINDS, *WITH_BASE, "upgraded"))
def test_export_answers_as_llava(name):
    expected, found = np.load(MADE / f"{name}.npz"), answers(MADE / name)
    for key, value in expected.items():
        kind = key.split()[0]
        if name in ROUNDED and kind in ("logits", "tokens"):
            continue
        tolerance = {"features": 5e-4 if name in ROUNDED else 1e-5, "logits": 1e-3}.get(kind, 0)
        deviation = np.abs(found[key].astype("float64") - value).max() / max(np.abs(value).max(), 1)
        assert found[key].shape == value.shape and deviation <= tolerance, (key, deviation)
    assert not np.array_equal(expected["tokens 0"], expected["tokens 1"])


@pytest.mark.matrix
def test_references_differ_so_that_a_lost_fuser_would_show():
    with_fuser, shut = (np.load(MADE / f"{name}.npz")["tokens 0"] for name in ("deformable", "shut"))
    assert not np.array_equal(with_fuser, shut)


@pytest.fixture
def without_package():
    """transformers as it is where llava_mmfuser is not installed."""
    activation = pytest.importorskip("llava_mmfuser.activation", reason="llava_mmfuser is not installed")
    activation.deactivate()
    yield activation
    activation.activate()


@pytest.mark.parametrize("name", folders(*PLAIN))
def test_plain_folder_has_no_code(name):
    assert not list((MADE / name).glob("*.py")) and type(load(MADE / name)) is LlavaForConditionalGeneration


@pytest.mark.matrix
def test_upgraded_folder_answers_bit_for_bit_as_before():
    inputs = AutoProcessor.from_pretrained(MADE / "shut")(images=pictures()[0], text=PROMPT, return_tensors="pt")
    assert torch.equal(load(MADE / "upgraded")(**inputs).logits, load(MADE / "shut")(**inputs).logits)


def test_chat_template_writes_llavas_prompt():
    processor = AutoProcessor.from_pretrained(MADE / "deformable")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == PROMPT
    answered = [*chat, {"role": "assistant", "content": "Near."}, {"role": "user", "content": "Sure?"}]
    assert processor.apply_chat_template(answered) == f"{PROMPT} Near.</s>USER: Sure? "


def test_every_auto_class_finds_the_code():
    config = AutoConfig.from_pretrained(MADE / "deformable", **TRUST)
    assert type(config).__name__ == "LlavaMMFuserConfig" and config.vision_feature_layer == LAYERS
    for auto, name in ((AutoModel, "Model"), (AutoModelForCausalLM, "ForConditionalGeneration")):
        model = auto.from_pretrained(MADE / "deformable", dtype="auto", **TRUST)
        assert type(model).__name__ == f"LlavaMMFuser{name}" and model.dtype == torch.float16


def test_who_does_not_trust_or_know_the_fuser_fails_loudly(without_package):
    for load_it in (
        lambda: AutoModelForImageTextToText.from_pretrained(MADE / "deformable", trust_remote_code=False),
        lambda: LlavaForConditionalGeneration.from_pretrained(MADE / "deformable"),
    ):
        with pytest.raises((RuntimeError, ValueError), match="size mismatch|ignore_mismatched_sizes"):
            load_it()


@pytest.mark.parametrize("name", folders("deformable", "window", "deep", "tokens"))
def test_with_the_package_installed_the_stock_class_has_the_fuser(name, tmp_path, without_package):
    inputs = AutoProcessor.from_pretrained(MADE / name)(images=pictures()[0], text=PROMPT, return_tensors="pt")
    expected = load(MADE / name)(**inputs).logits
    without_package.activate()
    model = LlavaForConditionalGeneration.from_pretrained(MADE / name, dtype=torch.float32).eval()
    assert "transformers_modules" not in type(model.model.multi_modal_projector).__module__
    assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(tmp_path / "again")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(**inputs).logits, expected)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").eval()  # which asks for no code
    assert torch.equal(again(**inputs).logits, expected)
    assert torch.equal(load(MADE / name)(**inputs).logits, expected)  # by the folder's code, which goes before


def test_status_tells_of_this_host(without_package):
    from llava_mmfuser.installation import status
    from llava_mmfuser.patching import EXPORTED, HOOK_OFF

    assert status()["parts"][EXPORTED] == HOOK_OFF
    without_package.activate()
    found = status()
    assert found["parts"][EXPORTED] is None
    details = [detail for target, _, detail in found["targets"] if "modeling_llava:" in target]
    assert details == ["patched", "patched", "relied upon"]


def test_with_the_package_installed_plain_folders_are_loaded_as_without_it(without_package):
    inputs = AutoProcessor.from_pretrained(MADE / "channels")(images=pictures()[0], text=PROMPT, return_tensors="pt")
    models = [load(MADE / "channels")]
    without_package.activate()
    models.append(load(MADE / "channels"))
    assert torch.equal(*(model(**inputs).logits for model in models))
    assert len({type(model.model.multi_modal_projector) for model in models}) == 1
    config = AutoConfig.from_pretrained(MADE / "deformable", **TRUST)
    stock = LlavaForConditionalGeneration.from_pretrained(MADE / "shut", config=config, dtype=torch.float32)
    fuser = stock.model.multi_modal_projector.fuser  # whose weights the folder lacks
    assert fuser.is_identity() and all(p.isfinite().all() and p.abs().max() < 20 for p in fuser.parameters())


def test_saved_again_it_carries_its_code_and_loads(tmp_path):
    model = load(MADE / "deformable")
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    for source in (MADE / "deformable").glob("*.py"):
        assert (tmp_path / "again" / source.name).read_text() == source.read_text()
    before, saved = (
        AutoConfig.from_pretrained(at, **TRUST).auto_map for at in (MADE / "deformable", tmp_path / "again")
    )
    assert saved == before
    assert saved["AutoModelForImageTextToText"] == "modeling_llava_mmfuser.LlavaMMFuserForConditionalGeneration"


def test_weights_that_a_folder_lacks_start_as_the_identity(tmp_path):
    """From a folder of transformers' own LLaVA under a config with a fuser, as a start of training from there would."""
    names = pytest.importorskip("llava_mmfuser.export.names", reason="llava_mmfuser is not installed")
    plain = shutil.copytree(MADE / "shut", tmp_path / "plain")
    state = {names.from_released(name): value for name, value in load_file(plain / "model.safetensors").items()}
    save_file(state, plain / "model.safetensors", metadata={"format": "pt"})
    stock = LlavaForConditionalGeneration.from_pretrained(MADE / "shut", dtype=torch.float32)
    inputs = AutoProcessor.from_pretrained(MADE / "shut")(images=pictures()[0], text=PROMPT, return_tensors="pt")
    expected = stock(**inputs).logits
    for name in ("deformable", "dense", "window", "deep"):
        config = AutoConfig.from_pretrained(MADE / name, **TRUST)
        config.vision_feature_select_strategy, config.mm_fuser_projector = "default", "mlp2x_gelu"
        for _ in range(2):  # of which the second may get the first one's memory
            model = type(load(MADE / name)).from_pretrained(plain, config=config, dtype=torch.float32).eval()
            fuser = model.model.multi_modal_projector.fuser
            assert fuser.is_identity() and all(p.isfinite().all() and p.abs().max() < 20 for p in fuser.parameters())
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
            with torch.no_grad():
                for parameter in fuser.parameters():
                    parameter.fill_(torch.nan)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_of_all_kinds_make_the_ids_of_llavas(name):
    tokenizer = AutoTokenizer.from_pretrained(MADE / "tokenizers" / name)
    for text, expected in json.loads((MADE / "tokenizers" / f"{name}.json").read_text()):
        assert tokenizer(text).input_ids == expected, text


def test_export_in_this_environment_makes_the_same_folder(tmp_path):
    export = pytest.importorskip("llava_mmfuser.export.folder", reason="llava_mmfuser is not installed").export
    export(str(MADE.parent / "llava" / "deformable"), str(tmp_path / "deformable"))
    for path in (MADE / "deformable").iterdir():
        assert path.read_bytes() == (tmp_path / "deformable" / path.name).read_bytes(), path.name
    tokenizer = AutoProcessor.from_pretrained(MADE / "deformable").tokenizer
    assert {500, 501} <= set(tokenizer.all_special_ids)
