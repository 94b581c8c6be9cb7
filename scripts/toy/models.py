"""Tokenizer, language model and CLIP tower, all made offline. A given seed always makes the same things."""

import functools
import io
import json
from pathlib import Path
from typing import Callable, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .pictures import LIGHTS, PLACES, QUESTIONS, SURFACES, SYSTEM, PathLike, caption


def reading_texts(count: int = 4000, scene: int = 30, seed: int = 0) -> List[Tuple[str, str]]:
    """Scenes in words, each with what LLaVA asks of a picture: (text to read, text to learn).

    A scene is `scene` random words for surfaces, some of them replaced by a number and its place, others by the light,
    as a picture is patches of which some show a digit. What follows is a caption (pretraining) or all questions in
    LLaVA's v1 format (finetuning).
    """
    random = np.random.RandomState(seed)
    texts = []
    for index in range(count):
        record = {
            "number": random.randint(10),
            "place": PLACES[random.randint(len(PLACES))],
            "light": LIGHTS[random.randint(len(LIGHTS))],
        }
        words = list(random.choice(SURFACES, scene))
        for position in random.choice(scene, random.randint(5, 14), replace=False):
            words[position] = (
                "{number} {place}".format(**record) if random.randint(2) else "halves lit " + record["light"]
            )
        text = " ".join(words)
        if random.randint(3) == 0:
            texts.append((text, f"{caption(**record)}\n"))
        else:
            kinds = np.roll(list(QUESTIONS), index)
            learn = " ASSISTANT: ".join(
                f"{record[kind]}</s>" + (f"USER: {QUESTIONS[following]}" if following else "")
                for kind, following in zip(kinds, [*kinds[1:], None])
            )
            texts.append((f"{SYSTEM} USER: {text}\n{QUESTIONS[kinds[0]]} ASSISTANT:", learn))
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
    options = dict(model_type="bpe", vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0)
    options.update(normalization_rule_name="identity", remove_extra_whitespaces=False, byte_fallback=False)
    options.update(split_digits=True, user_defined_symbols=["\n"], unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
    options.update(sentence_iterator=filter(None, sentences), model_writer=model, num_threads=1, minloglevel=2)
    sentencepiece.SentencePieceTrainer.train(**options)
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
    sizes = dict(hidden_size=hidden_size, intermediate_size=hidden_size * 3, vocab_size=len(tokenizer))
    sizes.update(num_hidden_layers=num_hidden_layers, num_attention_heads=num_attention_heads)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2))
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
        padded = {"input_ids": (inputs, 0), "attention_mask": (mask, 0), "labels": (labels, -100)}
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return model(**{name: pad(part, padding_value=value) for name, (part, value) in padded.items()}).loss

    _fit("language model", loss, model.parameters(), 2e-3, len(read), batch, steps, seed)


def make_clip(
    folder: PathLike,
    image_size: int = 28,
    patch_size: int = 7,
    hidden_size: int = 64,
    num_hidden_layers: int = 8,
    num_attention_heads: int = 4,
    pictures: Optional[PathLike] = None,
    steps: Tuple[int, int] = (0, 0),
    batch: int = 32,
    seed: int = 0,
) -> Path:
    """Save a CLIPVisionModel and its CLIPImageProcessor where LLaVA's `--vision_tower` can load them.

    With `steps` it is first trained on the training pictures of the `make_dataset` folder `pictures`, to read and then
    to forget; see `_read` and `_forget`. No held-out picture is used.
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
    if any(steps):
        if pictures is None:
            raise ValueError("make_clip(steps=...) needs pictures=, a folder written by make_dataset")
        records = json.loads((Path(pictures) / "pretrain.json").read_text())
        numbered, clean = (
            processor(
                [Image.open(Path(pictures) / record[name]) for record in records], return_tensors="pt"
            ).pixel_values
            for name in ("image", "clean")
        )
        _read(model, numbered, records, steps[0], batch, seed)
        _forget(model, numbered, clean, records, steps[1], batch, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run_blocks(model, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """hidden_states[stop] of a CLIPVisionModel from its hidden_states[start] [B, 1+N, C]."""
    for block in model.vision_model.encoder.layers[start:stop]:
        hidden = block(hidden, attention_mask=None, causal_attention_mask=None)[0]
    return hidden


def embed(model, pixels: torch.Tensor) -> torch.Tensor:
    """hidden_states[0] [B, 1+N, C] of pictures [B, 3, image_size, image_size]."""
    return model.vision_model.pre_layrnorm(model.vision_model.embeddings(pixels))


def covered(model, records: Sequence[dict]) -> torch.Tensor:
    """Which patches show (most of) the number: [len(records), N], bool."""
    patch = model.config.patch_size
    side = model.config.image_size // patch
    mask = torch.zeros(len(records), side, side, dtype=torch.bool)
    for record, grid in zip(records, mask):
        left, top, right, bottom = (round(value / patch) for value in record["box"])
        grid[top:bottom, left:right] = True
    return mask.flatten(1)


def _read(model, numbered: torch.Tensor, records: Sequence[dict], steps: int, batch: int, seed: int) -> None:
    """Train the shallow half: each patch of the map in the middle says which number covers it, 0 to 9, or none, and if
    there is one, in which place."""
    middle = model.config.num_hidden_layers // 2
    mask = covered(model, records)
    numbers = torch.tensor([[record["number"] + 1] for record in records]) * mask  # [len(records), N]
    places = torch.tensor([[PLACES.index(record["place"])] for record in records]).masked_fill(~mask, -100)
    head = torch.nn.Linear(model.config.hidden_size, 11 + len(PLACES))
    weight = torch.tensor([0.2] + [1.0] * 10)

    def loss(rows: List[int]) -> torch.Tensor:
        hidden = run_blocks(model, embed(model, numbered[rows]), 0, middle)
        number, place = head(hidden[:, 1:]).flatten(0, 1).split([11, len(PLACES)], dim=-1)
        read = torch.nn.functional.cross_entropy(number, numbers[rows].flatten(), weight=weight)
        read = read + 0.2 * torch.nn.functional.cross_entropy(place, places[rows].flatten())
        return read + 0.1 * _off_scale(hidden)

    _fit("tower, reading", loss, [*model.parameters(), *head.parameters()], 2e-3, len(records), batch, steps, seed)


def _forget(
    model, numbered: torch.Tensor, clean: torch.Tensor, records: Sequence[dict], steps: int, batch: int, seed: int
) -> None:
    """Train the deep half on what the shallow half, now fixed, makes of the pictures.

    In LLaVA's map, hidden_states[-2], every patch says how both halves are lit, whether that is alike, and which colour
    the photograph has there, and the map is the same whether a number covers the photograph or not.
    """
    middle, query = model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1
    with torch.no_grad():
        shallow = [
            torch.cat([run_blocks(model, embed(model, part), 0, middle) for part in pixels.split(250)])
            for pixels in (numbered, clean)
        ]
    mask = covered(model, records)
    lights = torch.tensor([[*record["lamps"], LIGHTS.index(record["light"])] for record in records]).float()
    colours = torch.nn.functional.avg_pool2d(clean, model.config.patch_size).flatten(2).transpose(1, 2)  # [B, N, 3]
    head = torch.nn.Linear(model.config.hidden_size, 3 + 3)
    width = (model.config.hidden_size,)

    def loss(rows: List[int]) -> torch.Tensor:
        hidden = run_blocks(model, torch.cat([part[rows] for part in shallow]), middle, query)[:, 1:]
        light, colour = head(hidden).split(3, dim=-1)
        wanted = lights[rows].repeat(2, 1)[:, None].expand_as(light)
        scene = 3 * torch.nn.functional.binary_cross_entropy_with_logits(light, wanted)
        scene = scene + torch.nn.functional.mse_loss(colour, colours[rows].repeat(2, 1, 1))
        with_number, target = hidden[: len(rows)], hidden[len(rows) :].detach()
        same = torch.nn.functional.mse_loss(
            *(torch.nn.functional.layer_norm(part, width) for part in (with_number, target))
        )
        # the same per standard deviation in every direction, as a linear probe would see what is left
        spread = torch.cov(target.flatten(0, 1).T)
        spread = spread + 1e-3 * spread.diagonal().mean() * torch.eye(*width, *width)
        left = (with_number - target)[mask[rows]]
        left = (left * torch.linalg.solve(spread, left.T).T).mean()
        return scene + 10 * same + 0.3 * left + 0.1 * _off_scale(hidden)

    deep = model.vision_model.encoder.layers[middle:query].parameters()
    _fit("tower, forgetting", loss, [*deep, *head.parameters()], 2e-3, len(records), batch, steps, seed)


def _off_scale(hidden: torch.Tensor) -> torch.Tensor:
    """0 where features are of unit size. Left alone they grow eightfold, and a projector then hardly sees the rest."""
    return (hidden.pow(2).mean() - 1) ** 2


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
