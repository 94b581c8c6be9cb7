"""The study of read-outs: its pictures, and its arms on random maps."""

import json

import numpy as np
import pytest
import readouts
import torch
from toy import scenes

from llava_mmfuser.hooks.optimizer import opening_rate


def test_pictures_follow_their_seed_and_answers_are_of_their_kind():
    pictures, kinds, answers = scenes.make_scenes("train", 6, seed=1)
    again, other = scenes.make_scenes("train", 6, seed=1), scenes.make_scenes("heldout", 6, seed=1)
    assert all(np.array_equal(one, two) for one, two in zip(pictures, again[0])) and torch.equal(answers, again[2])
    assert not torch.equal(answers, other[2])
    assert kinds.shape == answers.shape == (6, scenes.QUESTIONS)
    sizes = torch.tensor(list(scenes.KINDS.values()))
    assert (answers >= 0).all() and (answers < sizes[kinds]).all()
    assert kinds[:, -2:].tolist() == [[4, 5]] * 6 and (kinds[:, :-2] < 4).all()
    assert pictures[0].size == (112, 112)


def test_items_stand_in_the_cells_that_are_asked_for():
    """Without its items a picture differs from itself there and nowhere else, but for two pixels of jitter."""
    (picture,), kinds, _ = scenes.make_scenes("train", 1, seed=3)
    random = np.random.RandomState(0)
    plain = np.asarray(picture)
    for row, column in scenes.PLACES:
        corner = np.array([column, row]) * scenes.PATCH
        changed = np.asarray(scenes._drawn(picture.copy(), "letter", 0, corner, random)) != plain
        rows, columns = changed.any(-1).nonzero()
        assert set(rows // scenes.PATCH) == {row} and set(columns // scenes.PATCH) == {column}


def test_dots_are_as_many_as_the_answer_says():
    from PIL import Image
    from scipy import ndimage

    for answer in range(scenes.ITEMS["dots"]):
        black = Image.new("RGB", (scenes.SIDE, scenes.SIDE))
        drawn = scenes._drawn(black, "dots", answer, np.array([14, 14]), np.random.RandomState(answer))
        assert ndimage.label(np.asarray(drawn)[..., 0] > 200)[1] == answer + 1


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Random maps of few pictures in which the deep layer lacks what the shallow ones have."""
    monkeypatch.setattr(readouts, "COUNTS", {"train": 24, "heldout": 12})
    monkeypatch.setattr(readouts, "STEPS", 4)
    (tmp_path / "runs").mkdir()
    for split, count in readouts.COUNTS.items():
        _, kinds, answers = scenes.make_scenes(split, count, seed=0)
        maps = torch.randn(count, readouts.SIDE**2, len(readouts.LAYERS) * readouts.WIDTH).bfloat16()
        torch.save(dict(maps=maps, kinds=kinds, answers=answers), tmp_path / f"{split}.pt")
    return tmp_path


def test_every_arm_trains_and_the_report_has_a_row_for_it(folder):
    for name in readouts.ARMS:
        for seed in (1, 2):
            readouts.train(folder, name, seed)
    made = {file: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    assert len(made) == 2 * len(readouts.ARMS)
    readouts.train(folder, readouts.BASELINE, 1)
    assert made == {file: file.stat().st_mtime_ns for file in made}, "what is done is not done again"
    lines = readouts.report(folder, (1, 2)).splitlines()
    assert [line.split("|")[1].strip() for line in lines[-len(readouts.ARMS) :]] == list(readouts.ARMS)
    assert "nan" not in "\n".join(lines)
    widths = {line.count("|") for line in lines if "channel_concat" in line}
    assert len(widths) == 1


def test_arms_have_the_rates_that_their_names_say(folder):
    rates = {}
    for index, name in enumerate(readouts.ARMS):
        readouts.train(folder, name, 1)
        rates[name] = json.loads((folder / "runs" / f"{index:02d}-seed1.json").read_text())["rates"]
    assert rates["mmfuser as published, 1e-3"] == [1e-3, 2e-3] == rates["open start"]
    assert rates["mmfuser as published, 1e-2"] == [1e-3, 2e-3, 1e-2]
    assert rates["mmfuser, gates at 4e-2"] == [1e-3, 2e-3, 4e-2]
    own = opening_rate(1e-3, sum(map(readouts.part_of_rate, range(readouts.STEPS))))
    for name in ("columns at their own rate", "mmfuser, gates at their own rate"):
        assert rates[name] == pytest.approx([1e-3, 2e-3, own])


def test_reader_starts_at_the_cell_that_is_asked_for():
    torch.manual_seed(0)
    reader = readouts.Reader()
    tokens, kinds = torch.randn(4, 64, readouts.OUT), torch.zeros(4, scenes.QUESTIONS, dtype=torch.long)
    seen = {}

    def keep(module, inputs, kwargs, output):
        seen["weights"] = torch.nn.MultiheadAttention.forward(module, *inputs, need_weights=True)[1]

    reader.attention[0].register_forward_hook(keep, with_kwargs=True)
    logits = reader(tokens, kinds)
    own = seen["weights"][:, range(len(scenes.PLACES)), reader.cells]
    assert own.mean() > 0.5
    assert logits[..., 10:].max() < -1e3 < logits[..., :10].min(), "a digit is asked for"
