"""What scores of questions allow to claim: intervals and differences over seeds and entities, corrections, verdicts.

Questions about one entity stand or fall together, and so do those of one training run, so neither counts as independent
observations: both are resampled. Intervals of proportions near 0 and 1 are `questions.wilson_interval`'s.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lit_llama.errors import InputError

_DRAWS_AT_ONCE = 1000


class Estimate(NamedTuple):
    """A mean, or a difference of means."""

    value: float
    low: float
    high: float
    """Bounds of the 95 % interval."""
    p: float
    """Two-sided, of the hypothesis that the true value is 0; never below 2 / (draws + 1)."""


def bootstrap_mean(scores: ArrayLike, entities: Sequence, draws: int = 10_000, seed: int = 0) -> Estimate:
    """The mean score, with a percentile interval from resampling seeds and entities.

    The two are crossed, as every seed is asked about the same entities: each draw takes as many seeds as there are and,
    for all of them, as many entities, both with replacement (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111). All
    questions of an entity come with it. With one seed this is the ordinary bootstrap over entities. Few seeds vary too
    little: where seeds matter as much as entities, intervals of 3, 6 and 10 seeds hold the truth in about 88, 92 and
    95 % of cases (simulated as in the tests).

    Args:
        scores: (seeds, questions) or, for one seed, (questions,).
        entities: (questions,), what each question is about; anything hashable and of one type.
        draws: resamplings.
        seed: of the draws.

    Raises:
        InputError: no score, or not one entity a question.
    """
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    labels, entity_of = np.unique(list(entities), return_inverse=True)
    if scores.ndim != 2 or not scores.size or scores.shape[1] != len(entity_of):
        raise InputError(f"scores of shape {scores.shape} for {len(entity_of)} questions: expected (seeds, questions)")
    sums = np.stack([np.bincount(entity_of, weights=row, minlength=len(labels)) for row in scores])  # (seeds, entities)
    counts = np.bincount(entity_of)
    random = np.random.default_rng(seed)
    means = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        seed_times = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size)  # (size, seeds)
        entity_times = random.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size)
        totals = (seed_times @ sums * entity_times).sum(axis=1)
        means.append(totals / (len(sums) * (entity_times @ counts)))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, (0.025, 0.975))
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return Estimate(float(scores.mean()), float(low), float(high), float(min(1.0, 2 * (tail + 1) / (draws + 1))))


def paired_difference(
    first: ArrayLike, second: ArrayLike, entities: Sequence, draws: int = 10_000, seed: int = 0
) -> Estimate:
    """Mean of `first` minus that of `second`, two methods with the same seeds and questions, as `bootstrap_mean`.

    Args:
        first, second: (seeds, questions), in the same order. Of a control that no seed changes one row will do.
    """
    pair = [np.atleast_2d(np.asarray(scores, dtype=np.float64)) for scores in (first, second)]
    rows = {len(scores) for scores in pair} - {1}
    if len(rows) > 1 or pair[0].shape[1] != pair[1].shape[1]:
        raise InputError(
            f"scores of shapes {pair[0].shape} and {pair[1].shape} are not of the same seeds and questions"
        )
    return bootstrap_mean(pair[0] - pair[1], entities, draws, seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of the claims of one table, corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return corrected.tolist()


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Rank correlation, ties at their mean rank; NaN where one side is constant."""
    ranks = [_ranks(values) - (len(values) + 1) / 2 for values in (first, second)]
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / scale) if scale else float("nan")


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def verdict(difference: Estimate, minimum_effect: float) -> Literal["PASS", "FAIL", "INCONCLUSIVE"]:
    """Whether the data bear out the claim that a difference is at least so large, in the direction of its sign.

    PASS: the difference reaches the minimum effect, and the interval's bound towards 0 is past half of it. FAIL: the
    whole interval lies short of the minimum effect. INCONCLUSIVE: anything else.
    """
    sign = -1 if minimum_effect < 0 else 1
    least = sign * minimum_effect
    near, far = sorted((sign * difference.low, sign * difference.high))
    if sign * difference.value >= least and near > least / 2:
        return "PASS"
    return "FAIL" if far < least else "INCONCLUSIVE"
