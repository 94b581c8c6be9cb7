"""Two checkpoints on the same questions: the mean difference, and what may be said about it."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from scipy import stats

RESAMPLES, SEED = 10000, 0
Answers = Dict[Any, Tuple[Any, str]]  # question -> what lmms-eval logged for one metric, and the picture


class Difference(NamedTuple):
    """`low` and `high` are a 95 % interval for other pictures; one with 0 in it does not show a difference.

    `seen` is the smallest difference that such a run sees with a power of 80 %. `p` is McNemar's exact test, where
    answers are right or wrong; it takes questions as independent. `additive`: the questions average to the metric.
    """

    mean: float
    low: float
    high: float
    seen: float
    p: Optional[float]
    questions: int
    pictures: int
    additive: bool


def question_score(logged: Any) -> Optional[float]:
    """What one question adds, read off what lmms-eval logs for a metric; None where it logs no such thing.

    Numbers count as they are. Of the records that tasks keep for their own aggregation the score or the verdict counts,
    else whether the prediction equals the answer, for boxes whether they overlap by half.
    """
    if isinstance(logged, (bool, int, float)):
        return float(logged)
    if not isinstance(logged, dict):
        return None
    for key in ("score", "is_correct"):
        if isinstance(logged.get(key), (bool, int, float)):
            return float(logged[key])
    if "bbox" in logged and "pred" in logged:
        return float(_overlap(logged["bbox"], logged["pred"]) >= 0.5)
    answer, prediction = logged.get("answer"), logged.get("pred", logged.get("prediction"))
    if isinstance(answer, str) and isinstance(prediction, str):
        return float(answer.strip().lower() == prediction.strip().lower())
    return None


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    def area(box):
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    shared = area([*map(max, one[:2], other[:2]), *map(min, one[2:], other[2:])])
    return shared / max(area(one) + area(other) - shared, 1e-12)


def difference(
    ours: List[Answers], theirs: List[Answers], scores: Sequence[List[float]], scale: float
) -> Optional[Difference]:
    """First checkpoint less second, as the mean over tasks, in units of the table.

    Args:
        ours, theirs: one entry per task.
        scores: what lmms-eval itself says, per checkpoint and task. Where the questions do not average to it (MME, F1),
            the difference is that of the questions' scores, times 100.
        scale: from lmms-eval's numbers to the table's.

    Returns:
        None where a question has no score of its own, or all show one picture.

    Raises:
        ValueError: the two did not answer the same questions.
    """
    values, pictures, additive = [], [], True
    for index, (first, second) in enumerate(zip(ours, theirs)):
        if first.keys() != second.keys():
            raise ValueError(f"{len(first.keys() ^ second.keys())} questions were asked of one checkpoint only")
        pair = [[question_score(part[question][0]) for question in first] for part in (first, second)]
        if not first or any(value is None for row in pair for value in row):
            return None
        values.append(np.array(pair, dtype=float))  # [2, questions]
        pictures.append([picture for _, picture in first.values()])
        additive &= bool(np.allclose(values[-1].mean(1), [said[index] for said in scores], atol=1e-4))
    number = {picture: row for row, picture in enumerate(dict.fromkeys(sum(pictures, [])))}
    if len(number) < 2:
        return None
    rows = [[number[picture] for picture in shown] for shown in pictures]
    # Several questions share a picture and its difficulty, so that pictures are drawn, not questions. [tasks, pictures]
    sums = [np.bincount(row, pair[0] - pair[1], len(number)) for row, pair in zip(rows, values)]
    counts = [np.bincount(row, minlength=len(number)) for row in rows]
    mean, low, high, error = interval(np.array(sums), np.array(counts))
    unit = scale if additive else 100.0
    flat = np.concatenate(values, 1)
    p = None
    if set(flat.flat) <= {0.0, 1.0}:
        better, worse = int((flat[0] > flat[1]).sum()), int((flat[0] < flat[1]).sum())
        p = float(stats.binomtest(better, better + worse).pvalue) if better + worse else 1.0
    seen = float(stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) * error
    return Difference(mean * unit, low * unit, high * unit, seen * unit, p, flat.shape[1], len(number), additive)


def interval(sums: np.ndarray, counts: np.ndarray) -> Tuple[float, float, float, float]:
    """Mean over tasks of all questions' mean, its 95 % interval and standard error, for other pictures.

    Args:
        sums, counts: of the differences of a picture's questions, [tasks, pictures].
    """

    def statistic(*parts: np.ndarray, axis: int) -> np.ndarray:
        asked = [np.maximum(part.sum(axis), 1) for part in parts[len(sums) :]]
        return np.mean([part.sum(axis) / count for part, count in zip(parts, asked)], 0)

    found = stats.bootstrap(
        (*sums, *counts),
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // sums.shape[1]),
        method="percentile",
        random_state=np.random.default_rng(SEED),
    )
    low, high = map(float, found.confidence_interval)
    return float(statistic(*sums, *counts, axis=-1)), low, high, float(found.standard_error)
