"""Training an exported folder where people train today, from shut gates: an upgraded folder of `making.py`."""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from making import PROMPT, QUESTION, pictures

MADE = Path(os.environ.get("EXPORTED") or "nowhere") / "exported"
if not MADE.is_dir():
    pytest.skip("needs the folders of making.py in $EXPORTED; see scripts/test.sh export", allow_module_level=True)

pytest.importorskip("trl", reason="trl is not installed")
CACHE = tempfile.TemporaryDirectory()  # where transformers copies a folder's code to
os.environ.setdefault("HF_MODULES_CACHE", CACHE.name)
from datasets import Dataset, Features, Image, Value  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from llava_mmfuser.export.folder import export  # noqa: E402
from llava_mmfuser.export.native import export_to_llava  # noqa: E402


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(
        folder, **{"trust_remote_code": True, "dtype": torch.float32, **options}
    )


def fuser_of(model):
    return next(m for n, m in model.named_modules() if type(m).__name__ == "MMFuser" and "original" not in n)


def trained(model, output, **options):
    """A few steps by TRL on two pictures, and the losses."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "Near"}]
    message = {"role": Value("string"), "content": Value("string")}
    data = Dataset.from_dict(
        {"messages": [turns] * 2, "images": [[picture] for picture in pictures()]},
        features=Features({"messages": [message], "images": [Image()]}),
    )
    settings = SFTConfig(
        output_dir=str(output),
        max_steps=6,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,  # or the losses and logits that are compared would be rounded
        save_strategy="no",
        gradient_checkpointing=True,
    )
    processor = AutoProcessor.from_pretrained(MADE / "upgraded")
    trainer = SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=processor, **options)
    trainer.train()
    trainer.save_model(str(output))
    return trainer.model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model):
    inputs = AutoProcessor.from_pretrained(MADE / "upgraded")(images=pictures()[0], text=PROMPT, return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(**inputs).logits


def test_trl_opens_the_gates_and_what_it_saves_loads(tmp_path):
    model = load(MADE / "upgraded")
    assert fuser_of(model).is_identity()
    model, losses = trained(model, tmp_path / "out")
    assert losses[-1] < losses[0] and not fuser_of(model).is_identity()
    for code in (MADE / "upgraded").glob("*.py"):
        assert (tmp_path / "out" / code.name).read_text() == code.read_text()
    again = load(tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)

    back_and_forth(tmp_path / "out", tmp_path, model)


def back_and_forth(folder, tmp_path, model):
    """What was trained here is a checkpoint of LLaVA's again, and that is exported as any."""
    export_to_llava(str(folder), str(tmp_path / "llava"), base=str(MADE / "upgraded"))
    export(str(tmp_path / "llava"), str(tmp_path / "again"))
    found, expected = (logits(model)[..., :500] for model in (load(tmp_path / "again"), model))  # LLaVA's own tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    before, after = (json.loads((f / "config.json").read_text()) for f in (MADE / "upgraded", tmp_path / "again"))
    rope = "rope_theta", "rope_scaling"
    assert {name: after["text_config"].get(name) for name in rope} == {"rope_theta": 10000.0, "rope_scaling": None}
    for name in ("vision_config", "vision_feature_layer", "image_token_index", *filter(is_ours, before)):
        assert after[name] == before[name], name


def is_ours(name):
    return name.startswith(("mm_", "llava_"))


def test_peft_trains_fuser_and_projector_beside_a_lora(tmp_path):
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["multi_modal_projector"])
    model, losses = trained(load(MADE / "upgraded"), tmp_path / "out", peft_config=lora)
    assert losses[-1] < losses[0] and not fuser_of(model).is_identity()
    assert not any("lora" in name for name, _ in fuser_of(model).named_parameters())
    again = PeftModel.from_pretrained(load(MADE / "upgraded"), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(model), rtol=0, atol=1e-4)
    back_and_forth(tmp_path / "merged", tmp_path, merged)


def test_four_bits_leave_the_fuser_alone():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantised = load(MADE / "deformable", quantization_config=BitsAndBytesConfig(load_in_4bit=True), device_map="cpu")
    whole = load(MADE / "deformable")
    layers = {type(module).__name__ for module in quantised.model.language_model.layers.modules()}
    assert "Linear4bit" in layers
    for (name, found), (_, expected) in zip(fuser_of(quantised).named_parameters(), fuser_of(whole).named_parameters()):
        assert found.is_floating_point() and torch.equal(found.float(), expected), name
    assert logits(quantised).isfinite().all()


@pytest.mark.parametrize("name", ["deformable", "dense", "window"])
def test_projector_is_one_graph(name):
    projector = load(MADE / name).model.multi_modal_projector.eval()
    tokens = 17 if name == "window" else 16
    features = torch.randn(2, tokens, 4 * 64)
    expected = projector(features)
    torch._dynamo.reset()  # else the number of tokens is another than of the model before, and no constant
    torch.testing.assert_close(torch.compile(projector, fullgraph=True, backend="aot_eager")(features), expected)
    sizes = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(projector, (features,), dynamic_shapes=sizes).module()
    torch.testing.assert_close(graph(features), expected, rtol=1e-4, atol=1e-4)
    three = torch.randn(3, tokens, 4 * 64)
    torch.testing.assert_close(graph(three), projector(three), rtol=1e-4, atol=1e-4)
