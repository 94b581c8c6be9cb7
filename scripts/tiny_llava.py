"""A LLaVA small enough for two CPU cores: tokenizer, language model, CLIP tower and pictures, all made offline.

Used by scripts/demo.py and by the tests. Everything is deterministic for a given seed. The pictures are photographs that
ship inside the scikit-image and scikit-learn wheels with a real handwritten digit (scikit-learn's `load_digits`) pasted in.
"""
import io
import itertools
import json
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image

PHOTOGRAPHS = (
    "skimage:astronaut.png", "skimage:camera.png", "skimage:chelsea.png", "skimage:coffee.png", "skimage:grass.png",
    "skimage:gravel.png", "skimage:motorcycle_left.png", "skimage:rocket.jpg", "skimage:brick.png", "skimage:coins.png",
    "sklearn:china.jpg", "sklearn:flower.jpg",
)
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
QUESTIONS = {"number": "What is the number?", "place": "Where is the number?"}
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
PathLike = Union[str, Path]


def caption(number: int, place: str) -> str:
    """The single-turn description that pretraining asks for."""
    return f"a photo with the number {number} at the {place}"


def reading_texts() -> List[str]:
    """Every caption followed by both questions in LLaVA's v1 format: a text the language model can learn to read from."""
    texts = []
    for number, place in itertools.product(range(10), PLACES):
        answers = [(QUESTIONS["number"], str(number)), (QUESTIONS["place"], place)]
        for first, second in (answers, answers[::-1]):
            texts.append(f"{SYSTEM} USER: {caption(number, place)}\n{first[0]} ASSISTANT: {first[1]}</s>"
                         f"USER: {second[0]} ASSISTANT: {second[1]}</s>")
    return texts


def make_tokenizer(folder: PathLike, corpus: Optional[Sequence[str]] = None, vocab_size: int = 160):
    """Train a sentencepiece model on `corpus` (default: `reading_texts()`) and save it as a slow LlamaTokenizer.

    unk, bos and eos are 0, 1 and 2 as in Llama. `vocab_size` is an upper limit; a small corpus gives fewer pieces.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentences = [line for text in (corpus or reading_texts()) for line in text.replace("</s>", "\n").split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size, model_type="bpe",
        hard_vocab_limit=False, character_coverage=1.0, byte_fallback=False, split_digits=True, num_threads=1,
        user_defined_symbols=["\n"], unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    file = folder / "tokenizer.model"
    file.write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer(str(file), legacy=True, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llama(folder: PathLike, corpus: Optional[Sequence[str]] = None, hidden_size: int = 128,
               num_hidden_layers: int = 2, num_attention_heads: int = 4, steps: int = 0, seed: int = 0) -> Path:
    """Save a LlamaForCausalLM and its tokenizer where LLaVA's `--model_name_or_path` can load them.

    With `steps` it first learns `corpus` (default: `reading_texts()`), as a released LLaVA starts from a language model that
    already reads. It sees text only, never a picture or an answer that belongs to one.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    corpus = list(corpus or reading_texts())
    tokenizer = make_tokenizer(folder, corpus)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=hidden_size * 3,
        num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads, max_position_embeddings=1024,
        bos_token_id=1, eos_token_id=2))
    if steps:
        _train_llama(model, tokenizer, corpus, steps, seed)
    model.save_pretrained(folder)
    return folder


def _train_llama(model, tokenizer, corpus: Sequence[str], steps: int, seed: int, batch: int = 16) -> None:
    ids = [torch.tensor(tokenizer(text).input_ids) for text in corpus]
    optimizer, scheduler = _optimizer(model.parameters(), 2e-3, steps)
    for rows in _batches(len(ids), batch, steps, seed):
        inputs = torch.nn.utils.rnn.pad_sequence([ids[row] for row in rows], batch_first=True, padding_value=0)
        labels = torch.nn.utils.rnn.pad_sequence([ids[row] for row in rows], batch_first=True, padding_value=-100)
        _step(model(input_ids=inputs, attention_mask=labels.ge(0).long(), labels=labels).loss, optimizer, scheduler)


def make_clip(folder: PathLike, image_size: int = 28, patch_size: int = 7, hidden_size: int = 64,
              num_hidden_layers: int = 8, num_attention_heads: int = 4, pictures: Optional[PathLike] = None,
              steps: int = 0, batch: int = 32, seed: int = 0) -> Path:
    """Save a CLIPVisionModel and its CLIPImageProcessor where LLaVA's `--vision_tower` can load them.

    With `steps` it is first trained on the `pretrain.json` of the `make_dataset` folder `pictures`: the last hidden state of
    each patch says whether a digit covers it and which one. The labels come from that split only.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = Path(folder)
    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=hidden_size, intermediate_size=hidden_size * 2, num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads, image_size=image_size, patch_size=patch_size,
        projection_dim=hidden_size))
    processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size})
    if steps:
        if pictures is None:
            raise ValueError("make_clip(steps=...) needs pictures=, a folder written by make_dataset")
        _train_clip(model, processor, Path(pictures), steps, batch, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _train_clip(model, processor, pictures: Path, steps: int, batch: int, seed: int) -> None:
    records = json.loads((pictures / "pretrain.json").read_text())
    images = [Image.open(pictures / record["image"]) for record in records]
    pixels = processor(images, return_tensors="pt")["pixel_values"]  # [S, 3, H, W]
    patch = model.config.patch_size
    side = model.config.image_size // patch
    labels = torch.zeros(len(records), side, side, dtype=torch.long)  # 0: no digit, 1 to 10: digit 0 to 9
    for record, label in zip(records, labels):
        left, top, right, bottom = (value / patch for value in record["box"])
        label[round(top):round(bottom), round(left):round(right)] = record["number"] + 1
    head = torch.nn.Linear(model.config.hidden_size, 11)
    weight = torch.tensor([0.2] + [1.0] * 10)
    optimizer, scheduler = _optimizer(itertools.chain(model.parameters(), head.parameters()), 2e-3, steps)
    for rows in _batches(len(records), batch, steps, seed):
        logits = head(model(pixels[rows]).last_hidden_state[:, 1:])  # [B, N, 11]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), weight=weight)
        _step(loss, optimizer, scheduler)


def _optimizer(parameters, rate: float, steps: int):
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)


def _step(loss: torch.Tensor, optimizer, scheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()


def _batches(count: int, batch: int, steps: int, seed: int):
    """Yield `steps` lists of indices, reshuffled every epoch."""
    random = np.random.RandomState(seed)
    order: List[int] = []
    for _ in range(steps):
        if len(order) < batch:
            order = order + random.permutation(count).tolist()
        yield order[:batch]
        order = order[batch:]


def make_dataset(folder: PathLike, train: int = 16, heldout: int = 4, image_size: int = 28, digit_size: int = 12,
                 seed: int = 0) -> Path:
    """Write pictures and LLaVA's json: pretrain.json, finetune.json (the same `train` pictures) and heldout.json.

    Digits and backgrounds of the two splits never meet: the last fifth of `load_digits` and the right 30% of every photograph
    belong to heldout. Records carry `number`, `place` and `box` (left, top, right, bottom in pixels) besides LLaVA's keys.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    digits, numbers = _digits()
    limit = int(len(numbers) * 0.8)
    random = np.random.RandomState(seed)
    for name, count, pool, span in (("train", train, np.arange(limit), (0.0, 0.7)),
                                    ("heldout", heldout, np.arange(limit, len(numbers)), (0.7, 1.0))):
        photographs = [_strip(photograph, *span) for photograph in _photographs()]
        records = []
        for index in range(count):
            place = int(random.randint(len(PLACES)))
            row = int(random.choice(pool))
            picture, box = _picture(photographs[random.randint(len(photographs))], digits[row], place, image_size,
                                    digit_size, random)
            file = f"images/{name}_{index:05d}.png"
            picture.save(folder / file)
            records.append({"id": f"{name}_{index:05d}", "image": file, "number": int(numbers[row]),
                            "place": PLACES[place], "box": box})
        if name == "train":
            splits = {"pretrain": [dict(record, conversations=_caption_turns(record)) for record in records],
                      "finetune": [dict(record, conversations=_question_turns(record, index))
                                   for index, record in enumerate(records)]}
        else:
            splits = {"heldout": records}
        for split, rows in splits.items():
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))
    return folder


def _caption_turns(record: Dict) -> List[Dict]:
    return [{"from": "human", "value": "<image>\nDescribe the picture."},
            {"from": "gpt", "value": caption(record["number"], record["place"])}]


def _question_turns(record: Dict, index: int) -> List[Dict]:
    kinds = ("number", "place") if index % 2 == 0 else ("place", "number")
    turns = []
    for position, kind in enumerate(kinds):
        turns.append({"from": "human", "value": ("<image>\n" if position == 0 else "") + QUESTIONS[kind]})
        turns.append({"from": "gpt", "value": str(record[kind])})
    return turns


def _digits() -> Tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target  # [1797, 8, 8] in 0..1, [1797]


def _photographs() -> List[Image.Image]:
    import skimage
    import sklearn

    folders = {"skimage": Path(skimage.__file__).parent / "data",
               "sklearn": Path(sklearn.__file__).parent / "datasets" / "images"}
    names = (name.split(":") for name in PHOTOGRAPHS)
    return [Image.open(folders[library] / file).convert("RGB") for library, file in names]


def _strip(photograph: Image.Image, start: float, stop: float) -> Image.Image:
    width, height = photograph.size
    return photograph.crop((int(width * start), 0, int(width * stop), height))


def _picture(photograph: Image.Image, digit: np.ndarray, place: int, image_size: int, digit_size: int,
             random: np.random.RandomState) -> Tuple[Image.Image, List[int]]:
    """A random square of `photograph` with `digit` in the cell `place` of a 3x3 grid, white on a dark card."""
    side = random.randint(min(photograph.size) // 2, min(photograph.size) + 1)
    left, top = (random.randint(length - side + 1) for length in photograph.size)
    picture = photograph.crop((left, top, left + side, top + side)).resize((image_size, image_size), Image.BICUBIC)
    row, column = divmod(place, 3)
    x, y = (_offset(cell, image_size, digit_size, random) for cell in (column, row))
    card = Image.fromarray((digit * 255).astype(np.uint8)).resize((digit_size, digit_size), Image.BICUBIC)
    picture.paste(card.convert("RGB"), (x, y))
    return picture, [x, y, x + digit_size, y + digit_size]


def _offset(cell: int, image_size: int, digit_size: int, random: np.random.RandomState) -> int:
    """A random start, on a grid of 4 pixels, such that the digit's centre lies in third number `cell` of the picture."""
    starts = [start for start in range(0, image_size - digit_size + 1, 4)
              if (start + digit_size / 2) * 3 // image_size == cell]
    return int(random.choice(starts))
