"""lmms-eval's LLaVA as a model plugin, which also takes a base model and writes down which picture a question shows.

lmms-eval finds it by the entry point beside this file, once this folder is on PYTHONPATH: `--model llava_and_pictures`.
"""

import hashlib
import json
import os

import llava.model.builder  # its own error, where lmms-eval would go on without
import lmms_eval.models.simple.llava as host
from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("llava_and_pictures", simple_class_path="llava_and_pictures.LlavaAndPictures")


class LlavaAndPictures(host.Llava):
    """`base` is LLaVA's --model-base. $EVALUATE_PICTURES is a folder for [task, number of the question, picture]."""

    def __init__(self, base=None, **options):
        def load(path, _, *names, **others):
            return llava.model.builder.load_pretrained_model(path, base, *names, **others)

        host.load_pretrained_model = load
        super().__init__(**options)

    def generate_until(self, requests):
        with open(os.path.join(os.environ["EVALUATE_PICTURES"], f"pictures_{self.rank}.jsonl"), "a") as file:
            for _, _, visual, number, task, split in (request.args for request in requests):
                digest = hashlib.sha1()
                for picture in visual(self.task_dict[task][split][number]) or [number]:
                    digest.update(picture.tobytes() if hasattr(picture, "tobytes") else repr(picture).encode())
                print(json.dumps([task, number, digest.hexdigest()]), file=file)
        return super().generate_until(requests)
