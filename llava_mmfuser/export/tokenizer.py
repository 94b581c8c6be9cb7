"""LLaVA's tokenizer and prompt as transformers' processors want them, with the same ids."""

import json
import os
from typing import Any, List, Mapping, Tuple

from ..checkpoints import writing
from ..checkpoints.writing import Step

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions."
)
CHAT_TEMPLATE = "".join(  # LLaVA's conv_vicuna_v1; pictures come first, as LLaVA's training puts them
    [
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ '{SYSTEM} ' }}}}{{% endif %}}",
        "{% for message in messages %}",
        "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}",
        "{% set seen = namespace(pictures=0, texts=[]) %}",
        "{% for part in message['content'] %}",  # a loop, by which vLLM knows that it may hand parts over
        "{% if part['type'] == 'image' %}{% set seen.pictures = seen.pictures + 1 %}",
        "{% elif part['type'] == 'text' %}{% set seen.texts = seen.texts + [part['text']] %}{% endif %}{% endfor %}",
        "{% set text = '<image>\\n' * seen.pictures + seen.texts | join('\\n') %}{% endif %}",
        "{% if message['role'] == 'system' %}{{ text + ' ' }}",
        "{% elif message['role'] == 'user' %}{{ 'USER: ' + text + ' ' }}",
        "{% else %}{{ 'ASSISTANT: ' + text + '</s>' }}{% endif %}",
        "{% endfor %}",
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    ]
)


def read(folder: str, config: Mapping[str, Any]) -> Tuple[int, List[Step]]:
    """The tokenizer of a LLaVA checkpoint or of a LLaMA, with ``<image>`` and ``<pad>`` added.

    Returns:
        How many tokens it had, which is the id of ``<image>``; and the files to write.

    Raises:
        ValueError: the folder has no sentencepiece model.
        ImportError: protobuf or sentencepiece is not installed.
    """
    from transformers import AddedToken, LlamaTokenizerFast

    if not os.path.isfile(os.path.join(folder, "tokenizer.model")):
        raise ValueError(f"{folder} has no tokenizer.model; only LLaMA's and Vicuna's tokenizer is supported")
    try:
        fast = LlamaTokenizerFast.from_pretrained(folder, legacy=True, from_slow=True)  # from the sentencepiece model
    except ImportError as error:
        raise ImportError("reading tokenizer.model needs protobuf and sentencepiece; pip install them") from error
    own = len(fast)
    new = [AddedToken(token, special=True, normalized=False) for token in ("<image>", "<pad>")]
    fast.add_tokens(new, special_tokens=True)
    content = json.loads(fast.backend_tokenizer.to_str())
    # As LLaVA's slow one (legacy) has it: a space in front, also of what follows a special token. transformers 5 would
    # make another.
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, replace]}
    content["pre_tokenizer"], content["model"]["unk_token"] = None, str(fast.unk_token)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "processor_class": "LlavaProcessor",
        **{name: str(getattr(fast, name)) for name in ("bos_token", "eos_token", "unk_token")},
        "pad_token": "<pad>",
        "extra_special_tokens": {"image_token": "<image>"},
        "model_input_names": ["input_ids", "attention_mask"],  # and no token_type_ids, which LLaMA does not know
        "padding_side": "left",
        "model_max_length": config.get("tokenizer_model_max_length") or config.get("max_position_embeddings"),
        "clean_up_tokenization_spaces": False,
    }
    return own, [
        writing.text("tokenizer.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n"),
        writing.text("tokenizer_config.json", json.dumps(settings, indent=2) + "\n"),
        writing.unchanged(os.path.join(folder, "tokenizer.model"), "tokenizer.model", link=False),
    ]
