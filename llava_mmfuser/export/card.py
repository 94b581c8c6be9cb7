"""The model card of an exported folder."""

import os
from typing import Any, Dict, Mapping

from ..block.fusion import Fusion
from ..config import FLAG_PREFIX, MMFuserConfig
from ..layers import spell

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, mmfuser]
---

# {name}

LLaVA with {what}. Exported from a LLaVA checkpoint by
[llava-mmfuser](https://arxiv.org/abs/2410.11829); pictures, token ids and answers are those of LLaVA's own code.

| setting | value |
|---|---|
{settings}

The weights are under the licences of what they were made from: language model, vision tower and training data.{code}

## Load

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "{name}"
model = AutoModelForImageTextToText.from_pretrained(folder{trust}, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(folder, backend="pil")  # as LLaVA resizes pictures
chat = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]}}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
picture = Image.open("picture.jpg").convert("RGB")
inputs = processor(images=picture, text=prompt, return_tensors="pt").to(model.device, model.dtype)
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```

## Serve

```bash
vllm serve {name}{flag} --mm-processor-kwargs '{{"backend": "pil"}}'
```

## Cite

```bibtex
@article{{cao2024mmfuser,
  title   = {{MMFuser: Multimodal Multi-Layer Feature Fuser for Fine-Grained Vision-Language Understanding}},
  author  = {{Cao, Yue and others}},
  journal = {{arXiv preprint arXiv:2410.11829}},
  year    = {{2024}}
}}
@inproceedings{{liu2023llava,
  title     = {{Visual Instruction Tuning}},
  author    = {{Liu, Haotian and Li, Chunyuan and Wu, Qingyang and Lee, Yong Jae}},
  booktitle = {{NeurIPS}},
  year      = {{2023}}
}}
```
"""


def model_card(
    out: str, base: str, config: Mapping[str, Any], settings: MMFuserConfig, fuser: Fusion, plain: bool
) -> str:
    """README.md of a folder `out`, from a LLaVA with this config.json, trained from the language model `base`.

    The settings have their layers resolved; `plain`: the fuser is folded into transformers' own LLaVA.
    """
    rows: Dict[str, Any] = settings.to_llava()
    for name in settings.without_effect:
        del rows[FLAG_PREFIX + name]
    for name, parameter in fuser.named_parameters():
        if name.endswith("scale"):
            size = parameter.detach().abs()
            rows[f"{name}: mean, max of its absolute value"] = f"{size.mean():.4g}, {size.max():.4g}"
    rows["vision tower"] = _harmless(str(config["mm_vision_tower"]))
    rows["language model"] = _harmless(base)
    folded = f"the fusion {settings.fusion} of several layers of its vision tower, folded into its projector"
    return _CARD.format(
        name=_harmless(os.path.basename(os.path.abspath(out))),
        what=folded if plain else "an MMFuser in front of its projector",
        settings="\n".join(f"| {name} | `{spell(value)}` |" for name, value in rows.items()),
        code="" if plain else " The code in this folder is under Apache-2.0.",
        trust="" if plain else ", trust_remote_code=True",
        flag="" if plain else " --trust-remote-code",
    )


def _harmless(name: str) -> str:
    """A name without what Markdown, HTML, Python or a shell would read as more than a name."""
    return "".join(sign if sign.isprintable() and sign not in "<>|`&\"'\\$;" else "_" for sign in name)
