"""On import: transformers 4.37 quantises LLaVA on a CPU, with bitsandbytes >= 0.46. As a script: LLaVA's train()."""

from unittest import mock

import bitsandbytes.nn.modules  # before a GPU is pretended: its import would look for CUDA's symbols
import transformers.modeling_utils
from bitsandbytes.autograd._functions import MatmulLtState
from llava.model import LlavaLlamaForCausalLM

_load = LlavaLlamaForCausalLM.from_pretrained.__func__


def _from_pretrained(cls, *args, **kwargs):
    with mock.patch("torch.cuda.is_available", lambda: True):  # transformers: "No GPU found"
        model = _load(cls, *args, **kwargs)
    model.hf_device_map = {}  # accelerate takes {"": device("cpu")} for offloading and refuses to train
    return model


LlavaLlamaForCausalLM.from_pretrained = classmethod(_from_pretrained)
transformers.modeling_utils.is_bitsandbytes_available = lambda: True  # the trainer counts 4-bit parameters
MatmulLtState.memory_efficient_backward = False  # peft 0.11 passes on this flag, which bitsandbytes has dropped
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # else weights are repacked on some CPUs and not on others

if __name__ == "__main__":
    from llava.train.train import train

    train()
