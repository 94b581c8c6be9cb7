"""Two checkpoints on the same questions: the mean difference and its bootstrap interval."""

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import numpy as np

RESAMPLES, SEED = 10000, 0
Answers = Dict[Any, Any]  # question -> what lmms-eval logged for one metric


class Difference(NamedTuple):
    """Mean per-question difference, a 95 % interval, the questions, and whether they average to the metric itself."""

    mean: float
    low: float
    high: float
    questions: int
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

    Raises ValueError where the two did not answer the same questions.
    """
    pairs, additive = [], True
    for index, (first, second) in enumerate(zip(ours, theirs)):
        if first.keys() != second.keys():
            raise ValueError(f"{len(first.keys() ^ second.keys())} questions were asked of one checkpoint only")
        values = [[question_score(part[question]) for question in first] for part in (first, second)]
        if not first or any(value is None for row in values for value in row):
            return None
        pairs.append(np.array(values, dtype=float))  # [2, questions]
        said = [checkpoint[index] for checkpoint in scores]
        additive &= bool(np.allclose(pairs[-1].mean(1), said, atol=1e-4))
    unit = scale if additive else 100.0
    random = np.random.default_rng(SEED)
    means = np.mean([_resampled(pair[0] - pair[1], random) for pair in pairs], 0)  # [RESAMPLES]
    low, high = np.percentile(means, (2.5, 97.5)) * unit
    mean = float(np.mean([(pair[0] - pair[1]).mean() for pair in pairs])) * unit
    return Difference(mean, float(low), float(high), sum(pair.shape[1] for pair in pairs), additive)


def _resampled(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Means of RESAMPLES samples drawn with replacement; equal values are drawn together, so that many cost little."""
    kinds, counts = np.unique(values, return_counts=True)
    means = [
        random.multinomial(len(values), counts / len(values), size=RESAMPLES // 20) @ kinds / len(values)
        for _ in range(20)
    ]
    return np.concatenate(means)
