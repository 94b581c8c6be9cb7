"""Questions about pictures, asked as llava/eval/model_vqa.py does, in batches."""

from pathlib import Path
from typing import Dict, List, Sequence

from .pictures import QUESTIONS

BATCH = 50
Answers = Dict[str, List[str]]  # kind of question -> one answer per picture


def answer(
    folder: Path, data: Path, records: Sequence[dict], device: str = "cpu", shut: bool = False
) -> Dict[str, object]:
    """Load a model through LLaVA and ask every kind of question about every record.

    Args:
        folder: what train.py wrote in stage 2.
        data: the folder that the records' pictures are in.
        records: of `pictures.make_dataset`.
        device: for the model.
        shut: ask again with the fuser's gates set to zero.

    Returns:
        `answers` and, if asked for, `shut`; `parameters` of the projector.
    """
    import transformers
    from llava.mm_utils import get_model_name_from_path
    from llava.model.builder import load_pretrained_model

    transformers.logging.set_verbosity_error()  # else it lists the tower's weights, and the pad token at every question
    tokenizer, model, processor, _ = load_pretrained_model(
        str(folder), None, get_model_name_from_path(str(folder)), device_map=device, device=device
    )
    projector = model.get_model().mm_projector
    found = {
        "answers": _ask(tokenizer, model, processor, data, records, device),
        "parameters": sum(parameter.numel() for parameter in projector.parameters()),
    }
    if shut:
        projector.fuser.cross_gate.reset_parameters()
        found["shut"] = _ask(tokenizer, model, processor, data, records, device)
    return found


def _ask(tokenizer, model, processor, data: Path, records: Sequence[dict], device: str) -> Answers:
    import torch
    from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image
    from tqdm import tqdm

    answers: Answers = {kind: [] for kind in QUESTIONS}
    for start in tqdm(range(0, len(records), BATCH), desc=f"{BATCH} pictures each"):
        images = [Image.open(data / record["image"]).convert("RGB") for record in records[start : start + BATCH]]
        pixels = process_images(images, processor, model.config).half().to(device)
        for kind, question in QUESTIONS.items():
            conversation = conv_templates["v1"].copy()
            conversation.append_message(conversation.roles[0], DEFAULT_IMAGE_TOKEN + "\n" + question)
            conversation.append_message(conversation.roles[1], None)
            ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
            with torch.inference_mode():
                output = model.generate(
                    ids.repeat(len(images), 1).to(device),
                    images=pixels,
                    image_sizes=[image.size for image in images],
                    do_sample=False,
                    max_new_tokens=16,
                    use_cache=True,
                )
            answers[kind] += [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]
    return answers


def right(answers: Answers, records: Sequence[dict]) -> Dict[str, List[int]]:
    """For each kind of question and each picture: 1 if the answer is exactly right, else 0."""
    wanted = {kind: [str(record[kind]) for record in records] for kind in answers}
    return {kind: [int(text == right) for text, right in zip(answers[kind], wanted[kind])] for kind in answers}


def accuracy(answers: Answers, records: Sequence[dict]) -> Dict[str, float]:
    """The fraction of exactly right answers to each kind of question."""
    return {kind: sum(values) / len(values) for kind, values in right(answers, records).items()}
