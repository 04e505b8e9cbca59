"""The table of claims: which runs it asks for, how it decides on figures made by hand, and the smoke tier itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import run_script

from lit_llama.errors import InputError
from lit_llama.files import write_json
from lit_llama.injection.arms import SOURCES, TIERS, carry_out, examples_of, runs_of, settings_of
from lit_llama.injection.claims import (
    CLAIMS,
    FULL_RATES,
    LORA_RATES,
    Decision,
    Results,
    claims_of,
    corrected,
    needed_runs,
)
from lit_llama.injection.world import RELATIONS, World, WorldSize

PEOPLE = 100
SPLITS = ("known", "injected", "validation", "never")


def made_up(shares: dict[str, list[dict[str, float]]], seeds: int = 3) -> Results:
    """Results in which, at each evaluation of a run, that share of each split's people is answered for rightly.

    A split may be told apart by phrasing, form or relation: "injected/unseen", "injected/reversed".
    """
    questions = [
        {"split": split, "form": "direct", "phrasing": phrasing, "relation": relation, "doc_id": f"{split}-{person}"}
        for split, phrasing in [*((split, "trained") for split in SPLITS), ("injected", "unseen")]
        for person in range(PEOPLE)
        for relation in RELATIONS
    ]
    reversed_ones = {"split": "injected", "form": "reversed", "phrasing": "trained", "relation": "birth_date"}
    questions += [{**reversed_ones, "doc_id": f"injected-{person}"} for person in range(PEOPLE)]

    def evaluation(share: dict[str, float]) -> dict:
        right = []
        for row in questions:
            names = (*(f"{row['split']}/{row[key]}" for key in ("phrasing", "form", "relation")), row["split"])
            wanted = next((share[name] for name in names if name in share), 0.0)
            right.append(int(int(row["doc_id"].split("-")[1]) < wanted * PEOPLE))
        return {"exact_match": right, "max_probability": [share.get("sure", 0.5)] * len(questions)}

    return Results(
        {
            run: [{"questions": questions, "recall": 0.97, "evaluations": list(map(evaluation, shares_of_run))}] * seeds
            for run, shares_of_run in shares.items()
        }
    )


def tuned(name: str, **share: float) -> dict[str, list[dict[str, float]]]:
    """Both learning rates of a tuned model: the first never learns, the second is best in its middle evaluation."""
    nothing, past_it = {"validation": 0.0}, {"validation": 0.01}
    return {
        f"A {name}, tuned 0.0003": [nothing] * 3,
        f"A {name}, tuned 0.001": [nothing, {"validation": 0.5, **share}, past_it],
    }


def decision(claim_id: str, shares: dict[str, list[dict[str, float]]], tier: str = "cpu") -> Decision:
    claim = next(claim for claim in CLAIMS if claim.id == claim_id)
    return claim.decide(made_up(shares), tier)


def decide(claim_id: str, shares: dict[str, list[dict[str, float]]], tier: str = "cpu") -> str:
    return decision(claim_id, shares, tier).verdict


def test_there_are_nineteen_claims_and_every_tier_says_what_it_runs() -> None:
    assert [claim.id for claim in CLAIMS] == [f"C{number}" for number in range(1, 20)]
    assert [claim.id for claim in claims_of("smoke")] == ["C2", "C14"]
    assert {claim.id for claim in CLAIMS} - {claim.id for claim in claims_of("cpu")} == {"C15", "C18"}
    assert len(claims_of("gpu")) == 19


@pytest.mark.parametrize("tier", TIERS)
def test_every_run_that_a_claim_needs_exists_and_comes_after_its_start(tier: str) -> None:
    runs = runs_of(TIERS[tier])
    order = [run.name for run in needed_runs(claims_of(tier), runs)]
    assert len(set(order)) == len(order)
    for name in order:
        start = runs[name].start
        assert start is None or order.index(start) < order.index(name)
        assert sum(stage.share for stage in runs[name].stages) == pytest.approx(1)
        for stage in runs[name].stages:
            assert set(stage.mix) <= set(SOURCES) and sum(stage.mix.values()) == pytest.approx(1)


def test_no_run_trains_on_questions_about_people_under_test() -> None:
    for source in SOURCES.values():
        if source.recipe is None:
            assert set(source.splits) <= {"taught", "known"}
        assert "never" not in source.splits


def test_questions_first_and_last_read_the_same() -> None:
    runs = runs_of(TIERS["cpu"])

    def read(name: str) -> dict[str, float]:
        parts: dict[str, float] = {}
        for stage in runs[name].stages:
            for source, part in stage.mix.items():
                parts[source] = parts.get(source, 0) + stage.share * part
        return parts

    assert runs["B questions first"].tokens == runs["B questions last"].tokens
    assert read("B questions first") == pytest.approx(read("B questions last"))


def test_smoke_needs_four_runs() -> None:
    names = [run.name for run in needed_runs(claims_of("smoke"), runs_of(TIERS["smoke"]))]
    assert len(names) == 4 and names[0] == "B base"


def test_a_result_of_other_settings_is_not_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = TIERS["smoke"]
    run, base = runs_of(tier)["B views"], runs_of(tier)["B base"]
    settings = settings_of(run, tier)
    assert settings == settings_of(runs_of(tier)["B views"], tier) != settings_of(base, tier)
    # What a run starts from counts too.
    longer = replace(tier, base_tokens=tier.base_tokens + 1)
    assert settings_of(runs_of(longer)["B views"], longer) != settings
    monkeypatch.setattr("lit_llama.injection.arms.WORLD_SEED", 99)
    assert settings_of(run, tier) != settings
    write_json(tmp_path / "seed-0/B-views/result.json", {"settings": settings})
    with pytest.raises(InputError, match="of another world, size or plan"):
        carry_out(run, tier, 0, tmp_path)


def test_views_of_a_source_are_the_same_for_a_seed_and_others_for_another() -> None:
    world = World(WorldSize({"known": 4, "taught": 2, "injected": 2, "validation": 2, "never": 2}), 0)
    views = examples_of(SOURCES["views"], world, 0)
    assert len(views) == 6 * 5
    assert views == examples_of(SOURCES["views"], world, 0) != examples_of(SOURCES["views"], world, 1)
    tagged = examples_of(SOURCES["views, tagged"], world, 0)
    assert [example.segments[1:] for example in tagged] == [example.segments for example in views]
    assert all(example.segments[0][1] == 0 for example in tagged)


def test_the_moment_to_stop_is_chosen_on_validation_people() -> None:
    # What the people under test would choose is the last evaluation.
    curve = [{}, {"validation": 0.5, "injected": 0.2}, {"validation": 0.3, "injected": 0.9}]
    results = made_up({"one": curve, "other": [{}, {"validation": 0.1, "injected": 1.0}]})
    assert results.best(["one", "other"]) == ("one", [1, 1, 1])
    assert results.scores("one", when=[1, 1, 1]).mean() == pytest.approx(20)


def test_c2_asks_for_the_least_effect() -> None:
    low, high = tuned("single", injected=0.1), tuned("views", injected=0.6)
    assert decide("C2", low | high) == "PASS"
    assert decide("C2", low | tuned("views", injected=0.1)) == "FAIL"
    assert decide("C2", low | tuned("views", injected=0.25)) == "INCONCLUSIVE"
    assert decide("C2", low | high, tier="gpu") == "FAIL"


def test_c2_shows_unseen_wordings_and_does_not_decide_by_them() -> None:
    low = tuned("single", **{"injected/unseen": 0.05, "injected": 0.1})
    c2 = decision("C2", low | tuned("views", **{"injected/unseen": 0.02, "injected": 0.6}))
    assert c2.verdict == "PASS" and c2.figures.endswith("in unseen wordings 5.0 -> 2.0")


def test_p_values_are_corrected_for_the_claims_of_the_table() -> None:
    alone = {
        "C2": Decision("PASS", "", 0.02),
        "C9": Decision("PASS", "", 0.03),
        "C4": Decision("FAIL", "", 0.5),
        "C1": Decision("PASS", ""),
    }
    together = corrected(alone)
    # Holm by hand: 3 x 0.02, then 2 x 0.03 (equal), then 0.5; C1 has no difference to test.
    assert [together[name].p for name in alone] == [pytest.approx(0.06), pytest.approx(0.06), pytest.approx(0.5), None]
    assert [together[name].verdict for name in alone] == ["INCONCLUSIVE", "INCONCLUSIVE", "FAIL", "PASS"]
    assert corrected({"C9": alone["C9"]})["C9"].verdict == "PASS"


def test_c1_passes_only_where_answers_stay_low() -> None:
    assert decide("C1", tuned("single", injected=0.0)) == "PASS"
    assert decide("C1", tuned("single", injected=0.5)) == "FAIL"


def test_c6_compares_the_first_attribute_with_the_others() -> None:
    assert decide("C6", tuned("multi5", **{"injected/birth_date": 0.6, "injected": 0.1})) == "PASS"
    assert decide("C6", tuned("multi5", **{"injected/birth_date": 0.1, "injected": 0.6})) == "FAIL"


def test_c7_needs_both_failure_and_remedy() -> None:
    forward = tuned("forward", **{"injected/reversed": 0.0})
    mended = tuned("reverse", **{"injected/reversed": 0.8})
    assert decide("C7", forward | mended) == "PASS"
    assert decide("C7", forward | tuned("reverse", **{"injected/reversed": 0.0})) == "FAIL"
    # Of 100 people chance names one: two right are twice that, with too wide an interval; nobody right is enough.
    assert decide("C7", tuned("forward", **{"injected/reversed": 0.02}) | mended) == "INCONCLUSIVE"
    unfailing = tuned("forward", **{"injected/reversed": 0.5})
    assert decide("C7", unfailing | tuned("reverse", **{"injected/reversed": 0.9})) == "FAIL"


def test_c11_follows_the_order_of_the_means() -> None:
    def runs(*means: float) -> dict[str, list[dict[str, float]]]:
        names = ("1 view", "2 views", "views", "20 views")
        return {f"B {name}, replay 25": [{"injected": mean}] for name, mean in zip(names, means, strict=True)}

    assert decide("C11", runs(0.1, 0.3, 0.5, 0.8)) == "PASS"
    assert decide("C11", runs(0.8, 0.5, 0.3, 0.1)) == "FAIL"
    assert decide("C11", runs(0.1, 0.8, 0.5, 0.3)) == "FAIL"  # a rank correlation of 0.4


def test_c12_and_c13_look_at_each_learner_at_its_best_rate() -> None:
    def sweep(rates: tuple[float, ...], learner: str, best: int, known: float) -> dict[str, list[dict[str, float]]]:
        return {
            f"B {learner} {rate:g}": [{}, {"validation": 0.5 if i == best else 0.1, "injected": 0.4, "known": known}]
            for i, rate in enumerate(rates)
        }

    base = {"B base": [{"known": 1.0}]}
    kept = sweep(LORA_RATES, "lora", 1, known=0.9)
    assert decide("C12", base | kept | sweep(FULL_RATES, "full", 1, known=0.3)) == "PASS"
    assert decide("C12", base | sweep(LORA_RATES, "lora", 1, known=0.2) | sweep(FULL_RATES, "full", 1, 0.6)) == "FAIL"
    assert decide("C13", base | kept | sweep(FULL_RATES, "full", 1, known=0.85)) == "PASS"
    assert decide("C13", base | kept | sweep(FULL_RATES, "full", 1, known=0.3)) == "FAIL"

    attention = {
        run: [{}, {**share, "injected": 0.1}] for run, (_, share) in sweep(LORA_RATES, "attention", 1, 0.5).items()
    }
    assert decide("C16", base | kept | attention | sweep(FULL_RATES, "full", 1, 0.5)) == "PASS"  # 3e-3 against 2e-4
    assert decide("C16", base | kept | attention | sweep(FULL_RATES, "full", 2, 0.5)) == "PASS"  # against 5e-4
    assert decide("C16", base | kept | attention | sweep(FULL_RATES, "full", 3, 0.5)) == "INCONCLUSIVE"  # at the edge


def test_c14_weighs_what_replay_keeps_against_what_it_costs() -> None:
    base = {"B base": [{"known": 1.0}], "B views": [{"known": 0.2, "injected": 0.5}]}
    half = {"B views, replay 50": [{"known": 1.0, "injected": 0.3}]}
    assert decide("C14", base | half | {"B views, replay 10": [{"known": 0.9, "injected": 0.5}]}) == "PASS"
    assert decide("C14", base | half | {"B views, replay 10": [{"known": 0.3, "injected": 0.5}]}) == "FAIL"
    costly = {"known": 0.9, "injected": 0.1}
    assert decide("C14", base | half | {"B views, replay 10": [costly]}) == "FAIL"
    # The smoke tier shows the cost and leaves it out of the verdict, as its text says.
    smoke = decision("C14", base | {"B views, replay 25": [costly]}, tier="smoke")
    assert smoke.verdict == "PASS" and "new costs 40.0" in smoke.figures


def test_c5_wants_answers_to_differ_where_recall_does_not() -> None:
    low, middle = tuned("single", injected=0.1), tuned("multi5", injected=0.2)
    read = {f"A {name}": [{}] for name in ("single", "multi5", "views")}
    assert decide("C5", read | low | middle | tuned("views", injected=0.6)) == "PASS"
    assert decide("C5", read | low | middle | tuned("views", injected=0.1)) == "FAIL"


def test_c17_looks_at_a_moment_fixed_beforehand() -> None:
    def runs(*known: float) -> dict[str, list[dict[str, float]]]:
        return {
            "B base": [{"known": 1.0}],
            "B views": [{"known": share} for share in (1.0, 0.5, 0.3, 0.2)],
            "B views, replay 10": [{"known": share} for share in known],
        }

    assert decide("C17", runs(1.0, 0.6, 0.5, 0.9)) == "PASS"
    # Lower still after that moment and then back where it was: nothing is mended.
    assert decide("C17", runs(1.0, 0.6, 0.5, 0.2, 0.5)) == "INCONCLUSIVE"


def test_c19_wants_confidence_without_knowledge() -> None:
    before = {"B base": [{"sure": 0.4}]}
    assert decide("C19", before | {"B views": [{"sure": 0.7, "never": 0.0}]}) == "PASS"
    assert decide("C19", before | {"B views": [{"sure": 0.3, "never": 0.0}]}) == "FAIL"
    assert decide("C19", before | {"B views": [{"sure": 0.7, "never": 0.5}]}) == "FAIL"


def test_claims_that_there_are_not_are_refused(tmp_path: Path) -> None:
    arguments = ("--tier", "smoke", "--out_dir", tmp_path)
    unknown = run_script("scripts/reproduce_claims.py", *arguments, "--claims", "C2,C99", check=False)
    assert unknown.returncode == 2 and "'C99' is not one of C1, C2" in unknown.stderr
    elsewhere = run_script("scripts/reproduce_claims.py", *arguments, "--claims", "C15", check=False)
    assert elsewhere.returncode == 2 and "the tier smoke runs none of them" in elsewhere.stderr
    no_workers = run_script("scripts/reproduce_claims.py", *arguments, "--workers", 0, check=False)
    assert no_workers.returncode == 2 and "--workers 0 must be at least 1" in no_workers.stderr
    assert not list(tmp_path.iterdir())


def test_the_smoke_tier(tmp_path: Path) -> None:
    """Both of its claims hold; resuming repeats no run."""
    arguments = ("--tier", "smoke", "--out_dir", tmp_path, "--workers", 2)
    first = run_script("scripts/reproduce_claims.py", *arguments)
    claims = json.loads((tmp_path / "smoke/claims.json").read_text())["claims"]
    assert {name: claim["verdict"] for name, claim in claims.items()} == {"C2": "PASS", "C14": "PASS"}, first.stdout
    assert "| C15: a low rank is full when facts are many |" in first.stdout
    assert first.stdout.count("not run at this tier") == 17
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(before) == 12
    again = run_script("scripts/reproduce_claims.py", *arguments)
    assert again.stdout == first.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before
    assert not list(tmp_path.rglob("*.bin"))  # token stores and states of finished runs
