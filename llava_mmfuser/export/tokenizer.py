"""LLaVA's tokenizer and prompt as transformers' processors want them, with the same ids, and the way back."""

import base64
import json
import os
import re
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ..checkpoints import writing
from ..checkpoints.files import read_json
from ..checkpoints.writing import Step

IMAGE, PAD = "<image>", "<pad>"
_MARK = "\u2581"  # sentencepiece's sign for a space
_SENTENCES = (
    "Is the 7 near a caf\u00e9, or\n  not? It's 12,345.67 \u20ac!",
    "\u8fd9\u5f20\u56fe\u7247\u91cc\u6709\u4ec0\u4e48\uff1f\u3000\u732b\u3068\u72ac\u3002",
    "\u041a\u043e\u0442 \u0438 \u043f\u0451\u0441. \u03ba\u03b1\u03bb\u03b7\u03bc\u03ad\u03c1\u03b1, na\u00efve \ufb01",
    "\u0645\u0627 \u0647\u0630\u0627\u061f \u05de\u05d4 \u05d6\u05d4?",
    "\u0915\u094d\u092f\u093e \u0e19\u0e35\u0e48 \ud55c\uad6d\uc5b4",
    "e\u0301 \u00bd\u00b2 \U0001f9d1\u200d\U0001f680\U0001f600",
    "```python\n\tif x:\n\t\treturn  [1]\r\n```\n\n* a\n* b",
)

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


class LlavaTokenizer(NamedTuple):
    """The slow tokenizer that LLaVA makes of a folder, on top of sentencepiece alone, which every version agrees on."""

    model: Any  # SentencePieceProcessor
    proto: Any  # of the same
    added: Dict[int, Dict[str, Any]]  # id -> content, special and strips, as tokenizer.json spells them
    special: Sequence[str]  # transformers' all_special_tokens
    named: Dict[str, str]  # bos_token, eos_token and unk_token
    legacy: bool  # text behind an added token starts with a space, too
    ends: Tuple[List[int], List[int]]  # what stands before and behind every text

    def ids(self, text: str, image: int) -> List[int]:
        """What LLaVA's `tokenizer_image_token` makes of a text."""
        first, *others = [[*self.ends[0], *self._chunk(chunk), *self.ends[1]] for chunk in text.split(IMAGE)]
        return [*first, *(i for chunk in others for i in [image, *chunk[len(self.ends[0]) :]])]

    def _chunk(self, text: str) -> List[int]:
        ids = {token["content"]: i for i, token in self.added.items()}
        if text and not self.legacy:
            text = _MARK + text.replace(_MARK, " ")
        parts = re.split(f"({_any(ids)})", text)  # every other one is a token
        for place in range(1, len(parts), 2):
            token = self.added[ids[parts[place]]]
            if token["rstrip"]:
                parts[place + 1] = parts[place + 1].lstrip()
            if token["lstrip"]:
                parts[place - 1] = parts[place - 1].rstrip()
        if not self.legacy and parts[0] == _MARK and len(parts) > 1 and parts[1] in self.special:
            parts[0] = ""
        return [i for n, part in enumerate(parts) for i in ([ids[part]] if n % 2 else self._pieces(part))]

    def _pieces(self, text: str) -> List[int]:
        if self.legacy or not text.startswith((_MARK, " ")):
            return self.model.encode(text)
        return self.model.encode("<unk>" + text)[len(self.model.encode("<unk>")) :]


def _any(tokens: Iterable[str]) -> str:
    """A pattern for any of these, the longest first."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def read(folder: str, config: Mapping[str, Any]) -> Tuple[int, int, List[Step]]:
    """The tokenizer of a LLaVA checkpoint or of a LLaMA, with ``<image>`` and ``<pad>`` added.

    Returns the id of ``<image>``, which is how many tokens there were; the id of ``<pad>``; and the files to write.
    Refuses a folder whose new tokenizer would give other ids than LLaVA's.
    """
    old = _load(folder)
    known = {token["content"]: index for index, token in old.added.items()}
    if IMAGE in known:
        raise ValueError(f"{folder}: the tokenizer has a token {IMAGE}, which LLaVA's code never reads; remove it")
    image = max(len(old.model), *(index + 1 for index in old.added))
    pad = known.get(PAD, image + 1)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = {**old.added, **{index: {"id": index, "content": c, **flags} for index, c in ((image, IMAGE), (pad, PAD))}}
    content = _content(old, [{**added[index], "normalized": not old.legacy} for index in sorted(added)])
    problem = _difference(old, content, image)
    if problem:
        raise ValueError(f"{folder}: transformers' tokenizer cannot do what LLaVA's does: {problem}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        "processor_class": "LlavaProcessor",
        "legacy": old.legacy,  # for the way back
        **old.named,
        "pad_token": PAD,
        "extra_special_tokens": {"image_token": IMAGE},
        "model_input_names": ["input_ids", "attention_mask"],  # and no token_type_ids, which LLaMA does not know
        "padding_side": "left",
        "model_max_length": config.get("tokenizer_model_max_length") or config.get("max_position_embeddings"),
        "clean_up_tokenization_spaces": False,
    }
    files = [
        writing.as_json("tokenizer.json", content),
        writing.as_json("tokenizer_config.json", settings),
        writing.unchanged(os.path.join(folder, "tokenizer.model"), "tokenizer.model", link=False),
    ]
    return image, pad, files


def back(folder: str, words: str, image: int) -> Tuple[List[int], List[Step], List[str]]:
    """The tokenizer of a folder in transformers' format as LLaVA's, which has neither ``<image>`` (id `image`) nor its
    ``<pad>``, on top of the ``tokenizer.model`` in the folder `words`.

    Returns the rows of the embedding that LLaVA has, in the order of its ids; the files to write; notes.
    """
    content, settings = _json(folder, "tokenizer.json"), _json(folder, "tokenizer_config.json")
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    added = {i: t for i, t in added.items() if i != image and (i < image or t["content"] != PAD)}
    special = [token["content"] for token in added.values() if token["special"]]
    problems = {}
    for legacy in (True, False) if content else ():
        old = LlavaTokenizer(*_sentencepiece(words, legacy), added, special, {}, legacy, ([1], []))
        problems[legacy] = _difference(old, content, image)
    legacy = next((legacy for legacy, problem in problems.items() if not problem), settings.get("legacy") is not False)
    behind = sorted(index for index in added if index > image)
    rows = [*range(image), *behind]
    flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    decoder = {rows.index(index): {name: added[index][name] for name in flags} for index in sorted(added)}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "model_max_length": settings.get("model_max_length"),
        **named,
        "pad_token": "<unk>",
        "additional_special_tokens": [token for token in special if token not in named.values()],
        "padding_side": "right",
        **({"added_tokens_decoder": decoder} if decoder else {}),
    }
    files = [
        writing.unchanged(os.path.join(words, "tokenizer.model"), "tokenizer.model", link=False),
        writing.as_json("tokenizer_config.json", config),
    ]
    problem = problems.get(legacy)
    notes = [f"LLaVA's tokenizer makes other ids than this folder's: {problem}"] if problem else []
    if behind:
        names = ", ".join(f"{added[index]['content']} {index} -> {rows.index(index)}" for index in behind)
        notes.append(f"tokens behind {IMAGE} get other ids, because LLaVA has no {IMAGE}: {names}")
    return rows, files, notes


def _load(folder: str) -> LlavaTokenizer:
    """The tokenizer of a LLaVA checkpoint or of a LLaMA."""
    if not os.path.isfile(os.path.join(folder, "tokenizer.model")):
        raise ValueError(f"{folder} has no tokenizer.model; only LLaMA's and Vicuna's tokenizer is supported")
    settings = _json(folder, "tokenizer_config.json")
    legacy = settings.get("legacy") is not False
    model, proto = _sentencepiece(folder, legacy)
    from transformers import LlamaTokenizer

    its = LlamaTokenizer.from_pretrained(folder, legacy=True)
    named = {name: str(getattr(its, name)) for name in ("bos_token", "eos_token", "unk_token")}
    listed = {int(index) for index in settings.get("added_tokens_decoder") or {}}
    listed |= set(its.convert_tokens_to_ids(list(named.values())))
    added = {}
    for index, token in sorted(its.added_tokens_decoder.items()):
        if index in listed or index >= len(model):  # transformers 5 adds control pieces, too
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "special")}
            added[index] = {"id": index, "content": token.content, "normalized": False, **flags}
    special = [token["content"] for token in added.values() if token["content"] in its.all_special_tokens]
    before = [its.bos_token_id] * bool(settings.get("add_bos_token", True))
    behind = [its.eos_token_id] * bool(settings.get("add_eos_token", False))
    return LlavaTokenizer(model, proto, added, special, named, legacy, (before, behind))


def _sentencepiece(folder: str, legacy: bool = True) -> Tuple[Any, Any]:
    try:
        from sentencepiece import SentencePieceProcessor
        from transformers.convert_slow_tokenizer import import_protobuf

        model = import_protobuf().ModelProto()
    except ImportError as error:
        raise ImportError("reading tokenizer.model needs protobuf and sentencepiece; pip install them") from error
    with open(os.path.join(folder, "tokenizer.model"), "rb") as stream:
        model.ParseFromString(stream.read())
    if not legacy:  # `LlavaTokenizer` writes the space in front itself
        model.normalizer_spec.add_dummy_prefix = False
    return SentencePieceProcessor(model_proto=model.SerializeToString()), model


def _json(folder: str, name: str) -> Dict[str, Any]:
    path = os.path.join(folder, name)
    return read_json(path) if os.path.isfile(path) else {}


def _content(old: LlavaTokenizer, added: List[Dict[str, Any]]) -> Dict[str, Any]:
    """A tokenizer.json for a sentencepiece model, with these added tokens.

    Written by hand: transformers' own converters differ between its versions, in the order of merges, too.
    """
    pieces, unknown = old.proto.pieces, old.named["unk_token"]
    if old.proto.trainer_spec.model_type == old.proto.trainer_spec.BPE:
        vocab = {piece.piece: index for index, piece in enumerate(pieces)}
        merges: List[Any] = []
        for piece in pieces:
            if piece.type in (piece.NORMAL, piece.USER_DEFINED):
                cuts = [(piece.piece[:cut], piece.piece[cut:]) for cut in range(1, len(piece.piece))]
                halves = sorted((vocab[a], vocab[b], f"{a} {b}") for a, b in cuts if a in vocab and b in vocab)
                merges += [(-piece.score, merge) for _, _, merge in halves]
        merges = [merge for _, merge in sorted(merges, key=lambda merge: merge[0])]
        model: Dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": unknown, "fuse_unk": True}
        model.update(continuing_subword_prefix=None, end_of_word_suffix=None)
        model.update(byte_fallback=old.proto.trainer_spec.byte_fallback, vocab=vocab, merges=merges)
    else:
        model = {"type": "Unigram", "unk_id": 0, "vocab": [[piece.piece, piece.score] for piece in pieces]}
        model["byte_fallback"] = old.proto.trainer_spec.byte_fallback
    own, alone = [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED], None
    if own:  # which sentencepiece keeps apart from what stands beside them
        alone = {"type": "Split", "pattern": {"Regex": _any(own)}, "behavior": "Isolated", "invert": False}
    bos = old.named["bos_token"]
    single: List[Any] = [{"SpecialToken": {"id": bos, "type_id": 0}}] * len(old.ends[0])
    single.append({"Sequence": {"id": "A", "type_id": 0}})
    template: Dict[str, Any] = {"type": "TemplateProcessing", "single": single}
    template["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    template["special_tokens"] = {bos: {"id": bos, "ids": old.ends[0], "tokens": [bos]}} if old.ends[0] else {}
    steps = [_replace({"String": _MARK}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": _normalizer(old),
        "pre_tokenizer": alone,
        "post_processor": template,
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }


def _normalizer(old: LlavaTokenizer) -> Dict[str, Any]:
    """What sentencepiece does to a text before it looks for pieces, in the words of a tokenizer.json."""
    spec = old.proto.normalizer_spec
    steps: List[Dict[str, Any]] = []
    if spec.precompiled_charsmap:
        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if spec.remove_extra_whitespaces:
        steps += [_replace({"Regex": " {2,}"}, " "), {"type": "Strip", "strip_left": True, "strip_right": True}]
    if not old.legacy:  # a space in front of the text and behind <image>, where LLaVA splits it
        special = _any([*old.special, IMAGE])
        # The tokens themselves are normalised, too, and must stay as they are.
        alone = "".join(rf"(?!{re.escape(token['content'])}\z)" for token in old.added.values())
        steps.append(_replace({"Regex": rf"(?:\A{alone}|(?<={IMAGE}))(?!{special}|\z)"}, _MARK))
    elif spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _MARK})
    return {"type": "Sequence", "normalizers": [*steps, _replace({"String": " "}, _MARK)]}


def _replace(pattern: Dict[str, str], content: str) -> Dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _difference(old: LlavaTokenizer, content: Dict[str, Any], image: int) -> Optional[str]:
    """The first of many texts of which a tokenizer.json makes other ids than LLaVA's tokenizer, or None."""
    from tokenizers import Tokenizer

    texts = [text for s in _SENTENCES for text in (s, f" {s} ", f"\n{s}\n\n", f"{s}{IMAGE}{s}", f"{IMAGE}\n{s}{IMAGE}")]
    texts.append("".join(f"{SYSTEM} USER: {IMAGE}\n{s} ASSISTANT: {s}</s>USER: {s} ASSISTANT:" for s in _SENTENCES))
    for token in (token["content"] for token in old.added.values()):
        wide = "".join(chr(ord(sign) + 0xFEE0) if "!" <= sign <= "~" else sign for sign in token)  # no token
        texts += [f"a{token}b", f"a {token} b", f"{token}{token}\nb", f"a\n{token}{IMAGE}{token} b", f"a {wide} b"]
    pieces = (piece.piece.replace(_MARK, " ") for piece in old.proto.pieces)
    texts += [f"{piece}{IMAGE}{piece}" for piece in pieces if piece not in (IMAGE, PAD)]
    for text, found in zip(texts, Tokenizer.from_str(json.dumps(content)).encode_batch(texts)):
        expected = old.ids(text, image)
        if found.ids != expected:
            return f"{text!r} is {expected} for LLaVA, but {found.ids} for transformers"
    return None
