"""A tiny random LLaVA in this process, and what it answers in another."""

import sys
from types import SimpleNamespace

import host
import torch
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


def arguments(world, **settings):
    """`ModelArguments` as train.py would hand them over."""
    values = dict(
        vision_tower=str(world / "clip"),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        mm_projector_type="mmfuser",
        pretrain_mm_mlp_adapter=None,
        mm_patch_merge_type="flat",
    )
    return SimpleNamespace(**{**values, **settings})


def tower(world, **settings):
    return CLIPVisionTower(str(world / "clip"), arguments(world, **settings))


def projector_config(**settings):
    values = dict(mm_projector_type="mmfuser", mm_hidden_size=32, hidden_size=48, mm_vision_select_layer=-2)
    return SimpleNamespace(**{**values, **settings})


def small_config(**settings):
    return LlavaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, **settings
    )


def model_with(world, **settings):
    """A LLaVA from a bare language model, as pretraining makes it."""
    model = LlavaLlamaForCausalLM(small_config())
    model.get_model().initialize_vision_modules(arguments(world, **settings))
    return model


def parse(world, output, stage="finetune", **options):
    """As train.py reads its flags."""
    import transformers
    from llava.train import train

    parser = transformers.HfArgumentParser((train.ModelArguments, train.DataArguments, train.TrainingArguments))
    return parser.parse_args_into_dataclasses(list(map(str, host.train_arguments(world, output, stage, **options))))


IMAGES = torch.rand(3, 3, 28, 28)
# Answers a held-out question through LLaVA's own loader, as llava/eval/model_vqa.py does.
ANSWER = """
import json, sys, torch
from PIL import Image
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init
path, base, data, result = sys.argv[1:]
disable_torch_init()
tokenizer, model, processor, _ = load_pretrained_model(path, base or None, get_model_name_from_path(path), device="cpu")
record = json.load(open(data + "/heldout.json"))[0]
images = process_images([Image.open(data + "/" + record["image"])], processor, model.config).to(torch.float16)
ids = tokenizer_image_token("USER: <image>\\nWhat is the number? ASSISTANT:", tokenizer, IMAGE_TOKEN_INDEX,
                            return_tensors="pt")[None]
with torch.inference_mode():
    torch.save({"answer": model.generate(ids, images=images, do_sample=False, max_new_tokens=4),
                "logits": model(ids, images=images).logits,
                "projector": model.get_model().mm_projector.state_dict()}, result)
"""


def answer(world, path, result, base=""):
    done = host.run([sys.executable, "-c", ANSWER, path, base, world / "data", result])
    return torch.load(result), done.stdout


# Upstream draws the projector's initial weights unseeded.
SEEDED = """
import runpy, sys, torch
torch.manual_seed(0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
