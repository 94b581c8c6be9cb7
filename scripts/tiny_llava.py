"""A LLaVA small enough for two CPU cores: tokenizer, language model, CLIP tower and pictures, all made offline.

Used by scripts/demo.py and by the tests. A given seed always makes the same things. The pictures are photographs that
ship inside the scikit-image and scikit-learn wheels with a real handwritten digit (scikit-learn's `load_digits`).
"""

import io
import json
from pathlib import Path
from typing import Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

PHOTOGRAPHS = (
    "skimage:astronaut.png",
    "skimage:camera.png",
    "skimage:chelsea.png",
    "skimage:coffee.png",
    "skimage:grass.png",
    "skimage:gravel.png",
    "skimage:motorcycle_left.png",
    "skimage:rocket.jpg",
    "skimage:brick.png",
    "skimage:coins.png",
    "sklearn:china.jpg",
    "sklearn:flower.jpg",
)
PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))
SURFACES = ("sky", "sand", "grass", "stone", "leaf", "wood", "wall", "water", "cloud", "hair", "skin", "road")
QUESTIONS = {"number": "What is the number?", "place": "Where is the number?"}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PathLike = Union[str, Path]


def caption(number: int, place: str) -> str:
    """The single-turn description that pretraining asks for."""
    return f"a photo with the number {number} at the {place}"


def reading_texts(count: int = 4000, scene: int = 40, seed: int = 0) -> List[Tuple[str, str]]:
    """Scenes in words, each with what LLaVA asks of a picture: (text to read, text to learn).

    A scene is `scene` random words for surfaces, some of them replaced by a number and its place, as a picture is
    patches of which some show a digit. What follows is a caption (pretraining) or both questions in LLaVA's v1 format
    (finetuning).
    """
    random = np.random.RandomState(seed)
    texts = []
    for _ in range(count):
        number, place = random.randint(10), PLACES[random.randint(len(PLACES))]
        words = list(random.choice(SURFACES, scene))
        for position in random.choice(scene, random.randint(3, 10), replace=False):
            words[position] = f"{number} {place}"
        turns = [(QUESTIONS["number"], str(number)), (QUESTIONS["place"], place)]
        first, second = turns if random.randint(2) else turns[::-1]
        if random.randint(3) == 0:
            texts.append((" ".join(words), f"{caption(number, place)}\n"))
        else:
            texts.append(
                (
                    f"{SYSTEM} USER: {' '.join(words)}\n{first[0]} ASSISTANT:",
                    f"{first[1]}</s>USER: {second[0]} ASSISTANT: {second[1]}</s>",
                )
            )
    return texts


def make_tokenizer(folder: PathLike, corpus: Optional[Sequence[Tuple[str, str]]] = None, vocab_size: int = 300):
    """Train a sentencepiece model on `corpus` (default: `reading_texts()`) and save it as a slow LlamaTokenizer.

    unk, bos and eos are 0, 1 and 2 as in Llama. `vocab_size` is an upper limit; a small corpus gives fewer pieces.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sentences = "\n".join(map(" ".join, corpus or reading_texts())).replace("</s>", "\n").split("\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=filter(None, sentences),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        byte_fallback=False,
        split_digits=True,
        num_threads=1,
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), legacy=True, model_max_length=512)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_llama(
    folder: PathLike,
    corpus: Optional[Sequence[Tuple[str, str]]] = None,
    hidden_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    steps: int = 0,
    seed: int = 0,
) -> Path:
    """Save a LlamaForCausalLM and its tokenizer where LLaVA's `--model_name_or_path` can load them.

    With `steps` it first learns `corpus` (default: `reading_texts()`), as LLaVA starts from a language model that can
    read. It sees text only, never a picture or an answer that belongs to one.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    corpus = list(corpus or reading_texts())
    tokenizer = make_tokenizer(folder, corpus[:500])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 3,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=1024,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    if steps:
        _train_llama(model, tokenizer, corpus, steps, seed)
    model.save_pretrained(folder)
    return folder


def _train_llama(model, tokenizer, corpus: Sequence[Tuple[str, str]], steps: int, seed: int, batch: int = 16) -> None:
    read = [tokenizer(text).input_ids for text, _ in corpus]
    learn = [tokenizer(text, add_special_tokens=False).input_ids for _, text in corpus]

    def loss(rows: List[int]) -> torch.Tensor:
        inputs = [torch.tensor(read[row] + learn[row]) for row in rows]
        labels = [torch.tensor([-100] * len(read[row]) + learn[row]) for row in rows]
        mask = [torch.ones_like(row) for row in inputs]
        inputs, labels, mask = (
            torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=value)
            for part, value in ((inputs, 0), (labels, -100), (mask, 0))
        )
        return model(input_ids=inputs, attention_mask=mask, labels=labels).loss

    _fit("language model", loss, model.parameters(), 2e-3, len(read), batch, steps, seed)


def make_clip(
    folder: PathLike,
    image_size: int = 28,
    patch_size: int = 7,
    hidden_size: int = 64,
    num_hidden_layers: int = 8,
    num_attention_heads: int = 4,
    pictures: Optional[PathLike] = None,
    steps: int = 0,
    batch: int = 32,
    seed: int = 0,
) -> Path:
    """Save a CLIPVisionModel and its CLIPImageProcessor where LLaVA's `--vision_tower` can load them.

    With `steps` it is first trained on the `pretrain.json` of the `make_dataset` folder `pictures`: the last hidden
    state of each patch says whether a digit covers it, which one, and in which place. No held-out picture is used.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = Path(folder)
    torch.manual_seed(seed)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 2,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=hidden_size,
        )
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    if steps:
        if pictures is None:
            raise ValueError("make_clip(steps=...) needs pictures=, a folder written by make_dataset")
        _train_clip(model, processor, Path(pictures), steps, batch, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _train_clip(model, processor, pictures: Path, steps: int, batch: int, seed: int) -> None:
    records = json.loads((pictures / "pretrain.json").read_text())
    pixels = processor([Image.open(pictures / record["image"]) for record in records], return_tensors="pt").pixel_values
    patch = model.config.patch_size
    side = model.config.image_size // patch
    labels = torch.zeros(len(records), side, side, dtype=torch.long)  # 0: no digit, 1 to 10: digit 0 to 9
    for record, label in zip(records, labels):
        left, top, right, bottom = (value / patch for value in record["box"])
        label[round(top) : round(bottom), round(left) : round(right)] = record["number"] + 1
    places = torch.tensor([PLACES.index(record["place"]) for record in records]).view(-1, 1, 1).expand_as(labels)
    places = places.masked_fill(labels.eq(0), -100)
    head = torch.nn.Linear(model.config.hidden_size, 11 + len(PLACES))
    weight = torch.tensor([0.2] + [1.0] * 10)

    def loss(rows: List[int]) -> torch.Tensor:
        logits = head(model(pixels[rows]).last_hidden_state[:, 1:]).flatten(0, 1)  # [B * N, 11 + 9]
        number = torch.nn.functional.cross_entropy(logits[:, :11], labels[rows].flatten(), weight=weight)
        place = torch.nn.functional.cross_entropy(logits[:, 11:], places[rows].flatten())
        return number + 0.1 * place  # the place is far easier: at full weight the number is hardly learned

    _fit("vision tower", loss, [*model.parameters(), *head.parameters()], 2e-3, len(records), batch, steps, seed)


def _fit(
    name: str,
    loss: Callable[[List[int]], torch.Tensor],
    parameters: Iterable[torch.nn.Parameter],
    rate: float,
    count: int,
    batch: int,
    steps: int,
    seed: int,
) -> None:
    """Minimise `loss(rows)` for `steps` batches of row numbers below `count`, reshuffled every epoch."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    random = np.random.RandomState(seed)
    order: List[int] = []
    for _ in tqdm(range(steps), desc=name, mininterval=1):
        if len(order) < batch:
            order = order + random.permutation(count).tolist()
        rows, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        loss(rows).backward()
        optimizer.step()
        scheduler.step()


def make_dataset(
    folder: PathLike, train: int = 16, heldout: int = 4, image_size: int = 28, digit_size: int = 12, seed: int = 0
) -> Path:
    """Write pictures and LLaVA's json: pretrain.json, finetune.json (the same `train` pictures) and heldout.json.

    Digits and backgrounds of the two splits never meet: the last fifth of `load_digits` and the right 30% of every
    photograph belong to heldout. Besides LLaVA's keys records carry `number`, `place` and `box` (its pixels).
    """
    from sklearn.datasets import load_digits

    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    data = load_digits()
    digits, numbers = data.images / 16.0, data.target  # [1797, 8, 8] in 0..1, [1797]
    limit = int(len(numbers) * 0.8)
    random = np.random.RandomState(seed)
    for name, count, pool, span in (
        ("train", train, np.arange(limit), (0.0, 0.7)),
        ("heldout", heldout, np.arange(limit, len(numbers)), (0.7, 1.0)),
    ):
        photographs = _photographs(*span)
        records = []
        for index in range(count):
            place = int(random.randint(len(PLACES)))
            row = int(random.choice(pool))
            picture, box = _picture(
                photographs[random.randint(len(photographs))], digits[row], place, image_size, digit_size, random
            )
            file = f"images/{name}_{index:05d}.png"
            picture.save(folder / file)
            records.append(
                {
                    "id": f"{name}_{index:05d}",
                    "image": file,
                    "number": int(numbers[row]),
                    "place": PLACES[place],
                    "box": box,
                }
            )
        if name == "train":
            splits = {
                "pretrain": [dict(record, conversations=_caption_turns(record)) for record in records],
                "finetune": [
                    dict(record, conversations=_question_turns(record, index)) for index, record in enumerate(records)
                ],
            }
        else:
            splits = {"heldout": records}
        for split, rows in splits.items():
            (folder / f"{split}.json").write_text(json.dumps(rows, indent=1))
    return folder


def _caption_turns(record: Dict) -> List[Dict]:
    return [
        {"from": "human", "value": "<image>\nDescribe the picture."},
        {"from": "gpt", "value": caption(record["number"], record["place"])},
    ]


def _question_turns(record: Dict, index: int) -> List[Dict]:
    kinds = ("number", "place") if index % 2 == 0 else ("place", "number")
    turns = []
    for kind in kinds:
        turns += [{"from": "human", "value": QUESTIONS[kind]}, {"from": "gpt", "value": str(record[kind])}]
    turns[0]["value"] = "<image>\n" + turns[0]["value"]
    return turns


def _photographs(start: float, stop: float) -> List[Image.Image]:
    """Every photograph, cut to the columns between the fractions `start` and `stop` of its width."""
    import skimage
    import sklearn

    folders = {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.__file__).parent / "datasets" / "images",
    }
    names = (name.split(":") for name in PHOTOGRAPHS)
    photographs = [Image.open(folders[library] / file).convert("RGB") for library, file in names]
    return [
        photograph.crop((int(photograph.width * start), 0, int(photograph.width * stop), photograph.height))
        for photograph in photographs
    ]


def _picture(
    photograph: Image.Image,
    digit: np.ndarray,
    place: int,
    image_size: int,
    digit_size: int,
    random: np.random.RandomState,
) -> Tuple[Image.Image, List[int]]:
    """A random square of `photograph` with `digit` in the cell `place` of a 3x3 grid, white on a dark card."""
    side = random.randint(min(photograph.size) // 2, min(photograph.size) + 1)
    left, top = (random.randint(length - side + 1) for length in photograph.size)
    picture = photograph.crop((left, top, left + side, top + side)).resize((image_size, image_size), Image.BICUBIC)
    y, x = (_offset(cell, image_size, digit_size, random) for cell in divmod(place, 3))
    card = Image.fromarray((digit * 255).astype(np.uint8)).resize((digit_size, digit_size), Image.BICUBIC)
    picture.paste(card.convert("RGB"), (x, y))
    return picture, [x, y, x + digit_size, y + digit_size]


def _offset(cell: int, image_size: int, digit_size: int, random: np.random.RandomState) -> int:
    """A random start, a multiple of 4 pixels, that puts the digit's centre in third number `cell` of the picture."""
    starts = [
        start
        for start in range(0, image_size - digit_size + 1, 4)
        if (start + digit_size / 2) * 3 // image_size == cell
    ]
    return int(random.choice(starts))
