"""Intervals, corrections and verdicts against scipy, published and hand-computed cases, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from lit_llama.errors import InputError
from lit_llama.evaluation.statistics import Estimate, bootstrap_mean, holm, paired_difference, spearman, verdict


def test_one_seed_and_one_question_an_entity_is_the_ordinary_bootstrap() -> None:
    scores = np.random.default_rng(0).random(60)
    ours = bootstrap_mean(scores, range(60), draws=20_000)
    theirs = stats.bootstrap((scores,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
    assert ours.value == pytest.approx(scores.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_questions_of_an_entity_stand_and_fall_together() -> None:
    by_entity = np.random.default_rng(1).integers(0, 2, 50).astype(float)
    repeated = bootstrap_mean(np.repeat(by_entity, 10), np.repeat(np.arange(50), 10))
    # Ten times the same answer says no more than once. Entities are told apart by name, not by place.
    assert repeated == bootstrap_mean(by_entity, range(50))
    mixed = np.random.default_rng(2).permutation(500)
    assert repeated == bootstrap_mean(np.repeat(by_entity, 10)[mixed], np.repeat(np.arange(50), 10)[mixed])


def test_variance_is_that_of_seeds_plus_that_of_entities() -> None:
    # Additive effects: of a crossed bootstrap's variance, each side's share is its population variance / its number.
    seeds, entities = np.array([0.1, 0.3, 0.35, 0.7]), np.random.default_rng(3).random(30)
    estimate = bootstrap_mean(seeds[:, None] + entities, range(30), draws=20_000)
    deviation = math.sqrt(seeds.var() / 4 + entities.var() / 30)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * deviation, rel=0.04)


def test_entities_with_more_questions_weigh_more() -> None:
    # Two entities of 1 and 3 questions: draws of (1, 1), (1, 3), (3, 3) give 0, 3 / 4 and 1.
    estimate = bootstrap_mean([0, 1, 1, 1], ["a", "b", "b", "b"])
    assert estimate[:3] == (0.75, 0, 1)
    assert estimate.p == pytest.approx(2 / 4, abs=0.02)  # a quarter of the draws has the first entity only


def test_no_variance() -> None:
    assert bootstrap_mean(np.full((3, 4), 0.5), "aabb", draws=99) == Estimate(0.5, 0.5, 0.5, 2 / 100)
    assert bootstrap_mean(np.zeros((3, 4)), "aabb", draws=99) == Estimate(0, 0, 0, 1)


def test_pairing_removes_what_two_methods_share() -> None:
    random = np.random.default_rng(4)
    shared = random.normal(size=(3, 1)) + random.normal(size=40)
    gain = 0.1 + 0.01 * random.normal(size=(3, 40))
    difference = paired_difference(shared + gain, shared, range(40))
    assert difference.value == pytest.approx(gain.mean())
    assert difference.high - difference.low < 0.02
    assert difference.p < 0.001
    mirrored = paired_difference(shared, shared + gain, range(40))
    assert (mirrored.low, mirrored.high) == pytest.approx((-difference.high, -difference.low))


def test_a_control_of_one_run_is_paired_with_every_seed() -> None:
    scores, control = np.random.default_rng(5).random((3, 20)), np.random.default_rng(6).random(20)
    assert paired_difference(scores, control, range(20)) == bootstrap_mean(scores - control, range(20))


def test_the_interval_covers_the_truth() -> None:
    random, covered, covered_as_if_independent = np.random.default_rng(7), 0, 0
    for trial in range(200):
        effects = 0.1 * random.normal(size=(10, 1, 1)) + 0.3 * random.normal(size=(1, 40, 1))
        scores = 0.2 + effects + 0.3 * random.normal(size=(1, 40, 4)) + 0.2 * random.normal(size=(10, 40, 4))
        estimate = bootstrap_mean(scores.reshape(10, -1), np.repeat(np.arange(40), 4), draws=500, seed=trial)
        covered += estimate.low <= 0.2 <= estimate.high
        half = 1.96 * scores.std() / math.sqrt(scores.size)
        covered_as_if_independent += abs(scores.mean() - 0.2) <= half
    assert 0.90 < covered / 200 < 0.98
    assert covered_as_if_independent / 200 < 0.5


@pytest.mark.parametrize("scores, entities", [([[0, 1]], "abc"), ([], ""), (np.zeros((2, 2, 2)), "ab")])
def test_scores_that_do_not_fit(scores: object, entities: str) -> None:
    with pytest.raises(InputError, match="scores of shape"):
        bootstrap_mean(scores, list(entities))


def test_methods_that_do_not_pair() -> None:
    with pytest.raises(InputError, match="same seeds and questions"):
        paired_difference(np.zeros((2, 5)), np.zeros((3, 5)), range(5))


@pytest.mark.parametrize(
    "p_values, corrected",  # as multipletests(method="holm") of statsmodels 0.15 gives them
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.9, 0.0001, 0.02, 0.02], [1.0, 1.0, 0.0005, 0.08, 0.08]),
        ([0.04], [0.04]),
        ([], []),
    ],
)
def test_holm(p_values: list[float], corrected: list[float]) -> None:
    assert holm(p_values) == pytest.approx(corrected)


def test_spearman_equals_scipy_with_ties() -> None:
    random = np.random.default_rng(8)
    for _ in range(20):
        first = random.integers(0, 6, 25)
        second = random.integers(0, 6, 25) + first
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert spearman([1, 2, 5, 20], [0.1, 0.2, 0.9, 1.0]) == 1
    assert math.isnan(spearman([1, 2, 3], [4, 4, 4]))


@pytest.mark.parametrize(
    "value, low, high, minimum, expected",
    [
        (25, 11, 40, 20, "PASS"),
        (25, 10, 40, 20, "INCONCLUSIVE"),  # the bound must be past half of the effect
        (19, 15, 23, 20, "INCONCLUSIVE"),  # surely above half of it, but not as large as claimed
        (5, -3, 19, 20, "FAIL"),
        (-25, -40, -11, -20, "PASS"),
        (-5, -19, 3, -20, "FAIL"),
        (25, 11, 40, -20, "FAIL"),
        (3, 1, 5, 0, "PASS"),
        (-3, -5, -1, 0, "FAIL"),
    ],
)
def test_verdict(value: float, low: float, high: float, minimum: float, expected: str) -> None:
    assert verdict(Estimate(value, low, high, 0.5), minimum) == expected
