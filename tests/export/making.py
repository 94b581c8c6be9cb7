"""What LLaVA's own code makes of tiny fuser checkpoints, written down for environments without it.

    python making.py FOLDER        in an environment with LLaVA

makes checkpoints (``FOLDER/llava/NAME``), exports them (``FOLDER/exported/NAME``), and asks LLaVA about two pictures
(``FOLDER/exported/NAME.npz``). Everything is random and small, in numbers that half precision has.
"""

import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

QUESTION = "Is the 7 near a caf\u00e9, or\n  not?"
PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    f"and polite answers to the user's questions. USER: <image>\n{QUESTION} ASSISTANT:"
)
LAYERS = [0, 3, 5, 7]
# checkpoint -> its settings, and whether the export is plain LLaVA
KINDS = {
    "deformable": ({}, None),
    "dense": ({"mm_fuser_attention": "dense", "mm_fuser_self_attention": False}, None),
    "window": ({"mm_fuser_attention": "window", "mm_vision_select_feature": "cls_patch"}, None),
    "linear": ({"mm_fuser_projector": "linear"}, None),
    "detail": ({"mm_fuser_output": "columns"}, None),
    "deep": ({"mm_fuser_projector": "mlp3x_gelu", "mm_fuser_fusion": "channel_concat"}, None),
    "tokens": ({"mm_fuser_fusion": "token_concat", "image_aspect_ratio": "square"}, None),
    "mean": ({"mm_fuser_fusion": "mean"}, True),
    "sum": ({"mm_fuser_fusion": "sum"}, None),
    "weighted": ({"mm_fuser_fusion": "weighted_sum"}, True),
    "channels": ({"mm_fuser_fusion": "channel_concat"}, None),
    "connector": ({"mm_fuser_fusion": "dense_channel"}, True),
    "shut": ({}, True),
    "tower": ({"unfreeze_mm_vision_tower": True}, None),  # trained, so that its weights are in the checkpoint
}
WITH_BASE = ("adapter", "lora")
PLAIN = ("mean", "sum", "weighted", "channels", "connector", "shut")
ROUNDED = ("weighted", "connector")  # folded into half precision


# tokenizer -> whether text behind an added token starts with a space, and what else sentencepiece is told
TOKENIZERS = {
    "legacy": (True, {}),
    "new": (False, {}),
    "normalising": (True, {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}),
    "no space": (True, {"add_dummy_prefix": False}),
    "unigram": (True, {"model_type": "unigram", "byte_fallback": False}),
    "line": (True, {"user_defined_symbols": ["\n"], "byte_fallback": False}),
}
PLAIN_TOKENS, SPECIAL_TOKENS = ["<plain>", "two words"], ["<special>"]


def make_tokenizer(folder, legacy=True, plain=(), special=(), **options):
    """One like Vicuna's, which falls back to bytes."""
    import sentencepiece
    from toy.models import reading_texts
    from transformers import AddedToken, LlamaTokenizer

    folder.mkdir(parents=True)
    model = io.BytesIO()
    options = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(text) for text in reading_texts(200)),
        model_writer=model,
        vocab_size=500,
        hard_vocab_limit=False,
        num_threads=1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=legacy, model_max_length=512)
    tokenizer.add_tokens(list(plain))
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_parts(folder):
    """A LLaMA with its tokenizer, and a CLIP tower."""
    from toy.models import make_clip
    from transformers import CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(folder / "llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,  # a multiple of what bitsandbytes takes together
        num_hidden_layers=2,
        num_attention_heads=2,  # of 32 channels, which vLLM has kernels for on a CPU
        max_position_embeddings=1024,
        initializer_range=0.3,  # so that the answer depends on what was seen
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder / "llama")
    make_clip(folder / "clip")
    tower = CLIPVisionModel.from_pretrained(folder / "clip")
    tower.half().float().save_pretrained(folder / "clip")


def make_checkpoint(parts, folder, name, layout="full", **settings):
    """Save a LLaVA with random fuser and projector as LLaVA saves it: full, adapter or lora."""
    from llava.model import LlavaLlamaForCausalLM
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    torch.manual_seed(2)
    model = LlavaLlamaForCausalLM.from_pretrained(parts / "llama", torch_dtype=torch.float32)
    given = dict(
        vision_tower=str(parts / "clip"),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None,
        mm_projector_type="mmfuser",
        mm_fuser_layers=LAYERS,
        mm_patch_merge_type="flat",
        mm_use_im_start_end=False,
        mm_use_im_patch_token=False,
    )
    if "mm_fuser_fusion" not in settings:
        given["mm_fuser_num_heads"] = 4
    model.get_model().initialize_vision_modules(SimpleNamespace(**{**given, **settings}))
    with torch.no_grad():
        for parameter in model.get_model().mm_projector.parameters():
            parameter.copy_((parameter + torch.randn_like(parameter) * 0.2).half())
        if name == "shut":
            model.get_model().mm_projector.fuser.cross_gate.scale.zero_()
        if name == "tower":
            for parameter in model.get_vision_tower().parameters():
                parameter.mul_(1.5)
        model.config.unfreeze_mm_vision_tower = name == "tower"
    model.config.image_aspect_ratio = settings.get("image_aspect_ratio", "pad")
    model.config.mm_use_im_start_end = model.config.mm_use_im_patch_token = False
    model.config.tokenizer_model_max_length = 512
    model.config.use_cache = True
    target = folder / name
    projector = {f"model.mm_projector.{n}": v.half() for n, v in model.get_model().mm_projector.state_dict().items()}
    if layout == "full":
        model.half().save_pretrained(target)
        AutoTokenizer.from_pretrained(parts / "llama", use_fast=False).save_pretrained(target)
        return target
    target.mkdir(parents=True)
    if layout == "adapter":
        torch.save(projector, target / "mm_projector.bin")
    else:
        torch.save({f"base_model.model.{n}": v for n, v in projector.items()}, target / "non_lora_trainables.bin")
        targets = r"model\.layers\..*(q_proj|down_proj)"
        wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for n, parameter in wrapped.named_parameters():
                if "lora_" in n:
                    parameter.copy_((torch.randn_like(parameter) * 0.2).half())
        wrapped.save_pretrained(target)
    model.config.save_pretrained(target)
    return target


def texts():
    """Turns, line breaks, spaces, added tokens and languages in any order."""
    bits = ["near", "a 7", " ", "  ", "\n", "<image>", "<image>\n", "</s>", "<s>", "USER: ", " ASSISTANT:", ".", "\t"]
    bits += [*PLAIN_TOKENS, *SPECIAL_TOKENS, "caf\u00e9", "\u4e2d\u6587", "\uff17", "\u05d0\u05d1", "\U0001f600"]
    random = np.random.RandomState(5)
    return [PROMPT, *("x" + "".join(random.choice(bits, random.randint(1, 10))) for _ in range(500))]


def pictures():
    """Two pictures, one wide and one high."""
    random = np.random.RandomState(3)
    return [Image.fromarray(random.randint(0, 256, (*size, 3), dtype=np.uint8)) for size in ((40, 61), (70, 33))]


def ask_llava(folder, base=None):
    """What LLaVA makes of the prompt and both pictures, in float32: arrays by name."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from llava.model.builder import load_pretrained_model

    name = "llava-lora" if (folder / "adapter_config.json").is_file() else "llava"
    tokenizer, model, processor, _ = load_pretrained_model(str(folder), base and str(base), name, device="cpu")
    model = model.float()
    model.get_vision_tower().float()
    for module in model.modules():  # whose cosines half precision has rounded
        if hasattr(module, "_set_cos_sin_cache"):
            module._set_cos_sin_cache(module.max_seq_len_cached, "cpu", torch.float32)
    ids = tokenizer_image_token(PROMPT, tokenizer, -200, return_tensors="pt")[None]
    found = {"ids": ids.numpy()}
    for number, picture in enumerate(pictures()):
        pixels = process_images([picture], processor, model.config)
        with torch.inference_mode():
            found[f"pixels {number}"] = pixels
            found[f"features {number}"] = model.encode_images(pixels)
            found[f"logits {number}"] = model(ids, images=pixels).logits
            found[f"tokens {number}"] = model.generate(
                ids, images=pixels, do_sample=False, max_new_tokens=32, min_new_tokens=32
            )[:, 1:]  # without the start that stands for the prompt
    return {name: np.asarray(value) for name, value in found.items()}


def llava_ids(text, tokenizer, image):
    """What LLaVA makes of a text."""
    from llava.mm_utils import tokenizer_image_token

    return tokenizer_image_token(text, tokenizer, image)


def make_exported_tokenizer(folder, out, legacy, options):
    """A tokenizer in transformers' format, and beside it what LLaVA makes of some texts."""
    from transformers import AutoTokenizer

    from llava_mmfuser.export import tokenizer

    make_tokenizer(folder, legacy, PLAIN_TOKENS, SPECIAL_TOKENS, **options)
    image, _, files = tokenizer.read(str(folder), {"tokenizer_model_max_length": 512})
    out.mkdir(parents=True)
    for step in files:
        step.write(str(out / step.name), lambda count: None)
    slow = AutoTokenizer.from_pretrained(folder, use_fast=False)
    pairs = [(text, llava_ids(text, slow, image)) for text in texts()]
    out.with_suffix(".json").write_text(json.dumps(pairs))


def make(folder):
    """All of it."""
    from llava_mmfuser.export.folder import export
    from llava_mmfuser.export.native import upgrade

    folder = Path(folder)
    make_parts(folder / "parts")
    (folder / "exported").mkdir()
    for name, (settings, plain) in KINDS.items():
        checkpoint = make_checkpoint(folder / "parts", folder / "llava", name, **settings)
        export(str(checkpoint), str(folder / "exported" / name), plain=plain)
        np.savez(folder / "exported" / f"{name}.npz", **ask_llava(checkpoint))
    for name in WITH_BASE:
        checkpoint = make_checkpoint(folder / "parts", folder / "llava", name, layout=name)
        export(str(checkpoint), str(folder / "exported" / name), base=str(folder / "parts" / "llama"))
        np.savez(folder / "exported" / f"{name}.npz", **ask_llava(checkpoint, folder / "parts" / "llama"))
    for name, (legacy, options) in TOKENIZERS.items():
        make_exported_tokenizer(folder / "parts" / name, folder / "exported" / "tokenizers" / name, legacy, options)
    settings = {"layers": LAYERS, "num_heads": 4}
    upgrade(str(folder / "exported" / "shut"), str(folder / "exported" / "upgraded"), settings=settings)
    shutil.copy(folder / "exported" / "shut.npz", folder / "exported" / "upgraded.npz")


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "scripts")]
    make(sys.argv[1])
