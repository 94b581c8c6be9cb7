"""Answers the questions of a suite that LLaVA has no entry point for, with the arguments LLaVA's own entry points take.

    python answering.py SUITE --data DIR --model-path CKPT --answers-file FILE [--num-chunks N --chunk-idx K]

Greedy, one question at a time, in fp16, as llava.eval.model_vqa; it writes the same records.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init
from progress import chunk
from suites import SUITES
from tqdm import tqdm


def main(argv) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model-path", required=True)
    parser.add_argument("--model-base")
    parser.add_argument("--answers-file", type=Path, required=True)
    parser.add_argument("--conv-mode", default="vicuna_v1")
    parser.add_argument("--num-chunks", type=int, default=1)
    parser.add_argument("--chunk-idx", type=int, default=0)
    options = parser.parse_args(argv)

    suite = SUITES[options.suite]
    questions = chunk(suite.questions_of(options.data), options.num_chunks, options.chunk_idx)
    disable_torch_init()
    name = get_model_name_from_path(options.model_path)
    tokenizer, model, processor, _ = load_pretrained_model(options.model_path, options.model_base, name)
    mark = DEFAULT_IMAGE_TOKEN
    if getattr(model.config, "mm_use_im_start_end", False):
        mark = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
    with open(options.answers_file, "w", encoding="utf-8") as answers:
        for question in tqdm(questions):
            picture = suite.image(question)
            conversation = conv_templates[options.conv_mode].copy()
            conversation.append_message(conversation.roles[0], f"{mark}\n{question['text']}")
            conversation.append_message(conversation.roles[1], None)
            prompt = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(
                    prompt.unsqueeze(0).cuda(),  # [1, T]
                    images=process_images([picture], processor, model.config)[0].unsqueeze(0).half().cuda(),
                    image_sizes=[picture.size],
                    do_sample=False,
                    temperature=0,
                    top_p=None,
                    num_beams=1,
                    max_new_tokens=suite.max_new_tokens,
                    use_cache=True,
                )
            record = {key: question[key] for key in ("question_id", "metadata")}
            record.update(
                prompt=question["text"],
                text=tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip(),
                model_id=name,
            )
            answers.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
