"""What is claimed about knowledge injection, C1 to C19, and how the runs of `arms` decide it on `bios-mini`.

A claim states a direction and the least effect that counts, for each tier that can show it. It passes where the
difference reaches that and its interval, over seeds and people, is past half of it; it fails where the whole interval
falls short (`statistics.verdict`). The differences of one table are corrected for their number (`corrected`). Learning
rates and moments to stop are chosen on the people of split "validation"; only those of split "injected" decide, in
wordings that training used. One that fails stays in the table.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from lit_llama.evaluation.questions import wilson_interval
from lit_llama.evaluation.statistics import Estimate, bootstrap_mean, holm, paired_difference, spearman, verdict
from lit_llama.injection.arms import FULL_RATES, LORA_RATES, TUNING_RATES, Run

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Decision(NamedTuple):
    """On a claim: the verdict and the figures that it rests on."""

    verdict: Verdict
    figures: str
    p: float | None = None
    """Of no difference at all, the largest where several decide together; None where none decides."""


@dataclass(frozen=True)
class Claim:
    """One of the table.

    Attributes:
        published: the figure, and whose.
        accept: by tier, what the claim asks for; a tier that is missing does not run it.
        runs: names of those that decide it, without those that they start from.
        decide: by these runs and the tier.
    """

    id: str
    text: str
    published: str
    accept: dict[str, str]
    runs: tuple[str, ...]
    decide: Callable[["Results", str], Decision]


class Results:
    """Of the runs of a tier, by name and seed.

    Args:
        results: {run: [what `arms.carry_out` returned, one a seed]}; all were asked the same questions.
    """

    def __init__(self, results: dict[str, list[dict[str, Any]]]) -> None:
        self._results = results
        self._questions = next(iter(results.values()))[0]["questions"]

    def scores(
        self,
        run: str,
        split: str = "injected",
        form: str = "direct",
        relation: str | None = None,
        phrasing: str = "trained",
        when: int | Sequence[int] = -1,
        measure: str = "exact_match",
    ) -> np.ndarray:
        """(seeds, questions), in percent, of an evaluation, the same of all seeds or each seed's own."""
        chosen = self._chosen(split, form, relation, phrasing)
        of_seeds = self._results[run]
        whens = [when] * len(of_seeds) if isinstance(when, int) else when
        rows = [np.array(one["evaluations"][at][measure])[chosen] for one, at in zip(of_seeds, whens, strict=True)]
        return 100.0 * np.stack(rows)

    def people(self, split: str = "injected", form: str = "direct", relation: str | None = None) -> list[str]:
        """(questions,) whom they are on."""
        return [self._questions[number]["doc_id"] for number in self._chosen(split, form, relation)]

    def rate(self, scores: np.ndarray, split: str = "injected", form: str = "direct") -> Estimate:
        """Mean score on a split; where all are alike, which no resampling varies, with Wilson's interval on people."""
        people = self.people(split, form)
        estimate = bootstrap_mean(scores, people)
        if estimate.low < estimate.high:
            return estimate
        count = len(set(people))
        low, high = wilson_interval(estimate.value / 100 * count, count)
        return estimate._replace(low=100 * low, high=100 * high)

    def difference(
        self, first: np.ndarray, second: np.ndarray, split: str = "injected", form: str = "direct"
    ) -> Estimate:
        """Of scores on a split."""
        return paired_difference(first, second, self.people(split, form))

    def curve(self, run: str, split: str) -> np.ndarray:
        """(seeds, evaluations) mean scores."""
        count = min(len(one["evaluations"]) for one in self._results[run])
        return np.stack([self.scores(run, split, when=at).mean(axis=1) for at in range(count)], axis=1)

    def recall(self, run: str) -> float:
        """In percent, over seeds."""
        return 100 * float(np.mean([one["recall"] for one in self._results[run]]))

    def best(self, runs: Iterable[str]) -> tuple[str, list[int]]:
        """The run of the highest score on validation people over seeds, and each seed's best moment by the same."""
        best = max(runs, key=lambda run: self.curve(run, "validation")[:, 1:].max(axis=1).mean())
        return best, (1 + self.curve(best, "validation")[:, 1:].argmax(axis=1)).tolist()

    def tuned(self, name: str, **kind: Any) -> np.ndarray:
        """Scores of a model of track A after questions, stopped on validation people; `kind` as in `scores`."""
        run, when = self.best(tuned_runs(name))
        return self.scores(run, when=when, **kind)

    def _chosen(self, split: str, form: str, relation: str | None, phrasing: str = "trained") -> list[int]:
        wanted = (split, form, phrasing)
        return [
            number
            for number, row in enumerate(self._questions)
            if (row["split"], row["form"], row["phrasing"]) == wanted and relation in (None, row["relation"])
        ]


def corrected(decisions: dict[str, Decision]) -> dict[str, Decision]:
    """One table's decisions, by claim, with p-values corrected for their number (Holm 1979).

    What passes alone but not among so many (p above 0.05) is INCONCLUSIVE.
    """
    tested = [name for name, decision in decisions.items() if decision.p is not None]
    p_values = dict(zip(tested, holm([decisions[name].p for name in tested]), strict=True))
    result = {}
    for name, decision in decisions.items():
        p = p_values.get(name)
        too_many = p is not None and p > 0.05 and decision.verdict == "PASS"
        result[name] = decision._replace(p=p, verdict="INCONCLUSIVE" if too_many else decision.verdict)
    return result


def tuned_runs(*names: str) -> tuple[str, ...]:
    """Runs that tune models of track A, at every learning rate."""
    return tuple(f"A {name}, tuned {rate:g}" for name in names for rate in TUNING_RATES)


def needed_runs(claims: Iterable[Claim], runs: dict[str, Run]) -> list[Run]:
    """The runs of some claims and those that these start from, before them."""
    needed: dict[str, Run] = {}

    def need(name: str) -> None:
        if runs[name].start is not None:
            need(runs[name].start)
        needed.setdefault(name, runs[name])

    for claim in claims:
        for name in claim.runs:
            need(name)
    return list(needed.values())


def _worst(*verdicts: Verdict) -> Verdict:
    return max(verdicts, key=("PASS", "INCONCLUSIVE", "FAIL").index)


def _below(estimate: Estimate, limit: float) -> Verdict:
    """Whether a figure is at most so large: with its whole interval, or not even with its lower bound."""
    if estimate.high <= limit:
        return "PASS"
    return "FAIL" if estimate.low > limit else "INCONCLUSIVE"


def _is(holds: bool) -> Verdict:
    return "PASS" if holds else "FAIL"


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}]"


def _c1(results: Results, tier: str) -> Decision:
    single = results.rate(results.tuned("single"))
    return Decision(_below(single, {"cpu": 10, "gpu": 15}[tier]), f"EM {_text(single)}")


def _c2(results: Results, tier: str) -> Decision:
    least = {"smoke": 5, "cpu": 20, "gpu": 65}[tier]

    def scores(name: str, phrasing: str) -> np.ndarray:
        if tier == "smoke":
            return results.scores(f"B {name}, replay 25", phrasing=phrasing)
        return results.tuned(name, phrasing=phrasing)

    single, views = scores("single", "trained"), scores("views", "trained")
    gain = results.difference(views, single)
    unseen = [scores(name, "unseen").mean() for name in ("single", "views")]
    figures = f"EM {single.mean():.1f} -> {views.mean():.1f}, gain {_text(gain)}"
    return Decision(verdict(gain, least), f"{figures}; in unseen wordings {unseen[0]:.1f} -> {unseen[1]:.1f}", gain.p)


def _c3(results: Results, tier: str) -> Decision:
    single, multi, views = (results.tuned(name) for name in ("single", "multi5", "views"))
    lower, upper = results.difference(multi, single), results.difference(views, multi)
    figures = f"EM {single.mean():.1f} < {multi.mean():.1f} < {views.mean():.1f}; {_text(lower)}, {_text(upper)}"
    return Decision(_worst(verdict(lower, 0), verdict(upper, 0)), figures, max(lower.p, upper.p))


def _c4(results: Results, tier: str) -> Decision:
    run, when = results.best(["A mixed"])
    mixed, single = results.scores(run, when=when), results.tuned("single")
    gain = results.difference(mixed, single)
    least = {"cpu": 0, "gpu": 50}[tier]
    return Decision(verdict(gain, least), f"EM {single.mean():.1f} -> {mixed.mean():.1f}, gain {_text(gain)}", gain.p)


def _c5(results: Results, tier: str) -> Decision:
    names = ("single", "multi5", "views")
    recalls = [results.recall(f"A {name}") for name in names]
    answers = [results.tuned(name) for name in names]
    gain = results.difference(answers[-1], answers[0])
    listed = ", ".join(f"{recall:.1f} / {answer.mean():.1f}" for recall, answer in zip(recalls, answers, strict=True))
    figures = f"recall / EM {listed}; EM differs by {_text(gain)}"
    return Decision(_worst(_is(min(recalls) >= 95), verdict(gain, 10)), figures, gain.p)


def _c6(results: Results, tier: str) -> Decision:
    first = results.tuned("multi5", relation="birth_date")
    others = results.tuned("multi5").reshape(len(first), first.shape[1], -1)[:, :, 1:].mean(axis=2)
    factor = {"cpu": 1, "gpu": 2}[tier]
    gain = paired_difference(first, factor * others, results.people(relation="birth_date"))
    figures = f"birth date {first.mean():.1f}, others {others.mean():.1f}; {_text(gain)}"
    return Decision(verdict(gain, 0), figures, gain.p)


def _c7(results: Results, tier: str) -> Decision:
    forward, mended = results.tuned("forward", form="reversed"), results.tuned("reverse", form="reversed")
    gain = results.difference(mended, forward, form="reversed")
    # Chance is to name any of the people under test. Nobody right of n leaves Wilson's bound at just below 4 / n, so
    # that an interval cannot end at twice chance; as for least effects, the figure is to reach it and the interval
    # to leave room for no more than a factor of two.
    chance = 100 / len(set(results.people(form="reversed")))
    failing = results.rate(forward, form="reversed")
    if failing.low > 2 * chance:
        by_chance = "FAIL"
    else:
        by_chance = "PASS" if failing.value <= 2 * chance and failing.high <= 4 * chance else "INCONCLUSIVE"
    least = {"cpu": 30, "gpu": 60}[tier]
    figures = f"chance {chance:.1f}, reversed EM {_text(failing)} -> {mended.mean():.1f}, gain {_text(gain)}"
    return Decision(_worst(by_chance, verdict(gain, least)), figures, gain.p)


def _c8(results: Results, tier: str) -> Decision:
    views, adjacent = results.tuned("views"), results.tuned("adjacent")
    # Cpu: half of it is lost.
    bar = views / 2 if tier == "cpu" else views
    drop = results.difference(bar, adjacent)
    least = {"cpu": 0, "gpu": 50}[tier]
    figures = f"EM {views.mean():.1f} -> {adjacent.mean():.1f}, below {bar.mean():.1f} by {_text(drop)}"
    return Decision(verdict(drop, least), figures, drop.p)


def _c9(results: Results, tier: str) -> Decision:
    gain = results.difference(results.scores("B questions first"), results.scores("B questions last"))
    return Decision(verdict(gain, {"cpu": 3, "gpu": 8}[tier]), f"EM first less last {_text(gain)}", gain.p)


def _c10(results: Results, tier: str) -> Decision:
    single, with_others = results.tuned("single"), results.tuned("celebrities")
    gain = results.difference(with_others, single)
    least = {"cpu": 0, "gpu": 40}[tier]
    figures = f"EM {single.mean():.1f} -> {with_others.mean():.1f}, gain {_text(gain)}"
    return Decision(verdict(gain, least), figures, gain.p)


_VIEWS = {
    count: f"B {name}, replay 25" for count, name in {1: "1 view", 2: "2 views", 5: "views", 20: "20 views"}.items()
}
"""With replay: without it a small model forgets how to answer, whatever it has read."""


def _c11(results: Results, tier: str) -> Decision:
    means = {count: results.scores(run).mean() for count, run in _VIEWS.items()}
    order = spearman(list(means), list(means.values()))
    gain = results.difference(results.scores(_VIEWS[20]), results.scores(_VIEWS[1]))
    figures = ", ".join(f"K={count}: {mean:.1f}" for count, mean in means.items())
    figures += f"; rank correlation {order:.2f}, 20 against 1 {_text(gain)}"
    return Decision(_worst(verdict(gain, 0), _is(order > 0.8)), figures, gain.p)


_FULL = tuple(f"B full {rate:g}" for rate in FULL_RATES)
_LORA = tuple(f"B lora {rate:g}" for rate in LORA_RATES)
_ATTENTION = tuple(f"B attention {rate:g}" for rate in LORA_RATES)


def _c12(results: Results, tier: str) -> Decision:
    full, lora = results.best(_FULL)[0], results.best(_LORA)[0]
    before = results.scores("B base", "known")
    kept_full, kept_lora = results.scores(full, "known"), results.scores(lora, "known")
    # Gpu: LoRA loses at most 0.7 of what full training loses.
    bar = kept_full if tier == "cpu" else before - 0.7 * (before - kept_full)
    gain = results.difference(kept_lora, bar, "known")
    figures = (
        f"{full}: new {results.scores(full).mean():.1f}, known {kept_full.mean():.1f}; {lora}: new"
        f" {results.scores(lora).mean():.1f}, known {kept_lora.mean():.1f}; {_text(gain)}"
    )
    return Decision(verdict(gain, 0), figures, gain.p)


def _c13(results: Results, tier: str) -> Decision:
    full, lora = results.best(_FULL)[0], results.best(_LORA)[0]
    gaps = []
    curves = (results.curve(run, split) for run in (full, lora) for split in ("injected", "known"))
    for new_full, known_full, new_lora, known_lora in zip(*curves, strict=True):
        # Known people at the most new knowledge that both have reached.
        level = min(new_full.max(), new_lora.max())
        at = [int((new >= level).argmax()) for new in (new_full, new_lora)]
        gaps.append(abs(known_lora[at[1]] - known_full[at[0]]))
    gap = bootstrap_mean(gaps, range(len(gaps)))
    return Decision(_below(gap, 10), f"known people at equal new knowledge: gap {_text(gap)}")


def _c14(results: Results, tier: str) -> Decision:
    replayed = "B views, replay 25" if tier == "smoke" else "B views, replay 10"
    base, none, some = (results.scores(run, "known") for run in ("B base", "B views", replayed))
    undone = results.difference(some, (base + none) / 2, "known")
    cost = results.difference(results.scores("B views"), results.scores(replayed))
    figures = (
        f"known {base.mean():.1f} -> {none.mean():.1f}, with replay {some.mean():.1f}, {_text(undone)} above half way;"
        f" new costs {_text(cost)}"
    )
    if tier == "smoke":
        return Decision(verdict(undone, 0), figures, undone.p)
    more = results.difference(results.scores(replayed), results.scores("B views, replay 50"))
    result = _worst(verdict(undone, 0), _below(cost, 5), verdict(more, 0))
    return Decision(result, f"{figures}; 50 % costs {_text(more)} more", max(undone.p, more.p))


def _c15(results: Results, tier: str) -> Decision:
    means = [results.scores(f"B rank {rank}") for rank in (1, 8, 64)]
    steps = [results.difference(more, less) for less, more in zip(means, means[1:], strict=False)]
    figures = " < ".join(f"{mean.mean():.1f}" for mean in means)
    return Decision(_worst(*(verdict(step, 0) for step in steps)), figures, max(step.p for step in steps))


def _c16(results: Results, tier: str) -> Decision:
    chosen = [results.best(runs)[0] for runs in (_FULL, _LORA, _ATTENTION)]
    ratio = float(chosen[1].split()[-1]) / float(chosen[0].split()[-1])
    in_range = ratio >= 3 if tier == "cpu" else 5 <= ratio <= 15
    targets = results.difference(results.scores(chosen[1]), results.scores(chosen[2]))
    at_edge = [run for run in chosen[:2] if run in (_FULL[0], _FULL[-1], _LORA[0], _LORA[-1])]
    figures = f"{chosen[1]} against {chosen[0]}: ratio {ratio:.1f}; all targets less attention alone {_text(targets)}"
    if at_edge:  # the best may lie beyond the grid
        return Decision("INCONCLUSIVE", f"{figures}; {at_edge[0]} is the last of its grid", targets.p)
    return Decision(_worst(_is(in_range), verdict(targets, 0)), figures, targets.p)


def _c17(results: Results, tier: str) -> Decision:
    early = 2  # of eight evaluations: fixed beforehand, as the lowest of a curve would recover by chance
    base = results.scores("B base", "known")
    dip = results.difference(base, results.scores("B views", "known", when=early), "known")
    replayed = "B views, replay 10"
    recovered = results.difference(
        results.scores(replayed, "known"), results.scores(replayed, "known", when=early), "known"
    )
    curve = " ".join(f"{value:.0f}" for value in results.curve(replayed, "known").mean(axis=0))
    figures = f"dip at a quarter {_text(dip)}; with replay {curve}, from a quarter to the end {_text(recovered)}"
    return Decision(_worst(verdict(dip, 5), verdict(recovered, 0)), figures, max(dip.p, recovered.p))


def _c18(results: Results, tier: str) -> Decision:
    plain, tagged = results.tuned("junk"), results.tuned("junk, tagged")
    gain = results.difference(tagged, 2 * plain)
    figures = f"EM {plain.mean():.1f} -> {tagged.mean():.1f}, above twice {_text(gain)}"
    return Decision(verdict(gain, 0), figures, gain.p)


def _c19(results: Results, tier: str) -> Decision:
    before, after = (results.scores(run, "never", measure="max_probability") for run in ("B base", "B views"))
    surer = results.difference(after, before, "never")
    right = results.rate(results.scores("B views", "never"), "never")
    figures = f"max-probability {before.mean():.1f} -> {after.mean():.1f}, {_text(surer)}; EM {_text(right)}"
    return Decision(_worst(verdict(surer, 0), _below(right, 5)), figures, surer.p)


def _tiers(cpu: str, gpu: str, **smoke: str) -> dict[str, str]:
    return {"cpu": cpu, "gpu": gpu, **smoke}


def _alike(asked: str) -> dict[str, str]:
    return _tiers(asked, asked)


_PHYSICS = "Allen-Zhu & Li, arXiv 2309.14316"
_SWEEPS = _FULL + _LORA
CLAIMS = (
    Claim(
        "C1", "one biography each, then questions on half: the others' answers stay low", f"9.7 ({_PHYSICS})",
        _tiers("EM <= 10", "EM <= 15"), tuned_runs("single"), _c1,
    ),
    Claim(
        "C2", "five permuted views with full names beat a single biography", f"96.6 against 9.7 ({_PHYSICS})",
        _tiers("gain >= 20", "gain >= 65", smoke="gain >= 5, track B, both with 25 % replay"),
        tuned_runs("single", "views"), _c2,
    ),
    Claim(
        "C3", "five wordings without permutation lie between", f"41.0 ({_PHYSICS})",
        _alike("single < multi5 < views"), tuned_runs("single", "multi5", "views"), _c3,
    ),
    Claim(
        "C4", "questions on half mixed into reading help single biographies", f"86.6 against 9.7 ({_PHYSICS})",
        _tiers("gain > 0", "gain >= 50"), ("A mixed", *tuned_runs("single")), _c4,
    ),
    Claim(
        "C5", "recall of the values says nothing about answers", f"above 99 at EM 9.7 ({_PHYSICS})",
        _alike("recall >= 95 (no interval), EM differs by 10"), tuned_runs("single", "multi5", "views"), _c5,
    ),
    Claim(
        "C6", "without permutation the first attribute is the one that can be asked", f"33.5 ({_PHYSICS})",
        _tiers("birth date > others", "birth date >= 2 x others"), tuned_runs("multi5"), _c6,
    ),
    Claim(
        "C7", "reversed questions fail whatever the views, and reversed text mends it",
        "about 0 (Berglund et al., arXiv 2309.12288)",
        _tiers("forward <= 2 x chance, gain >= 30", "forward <= 2 x chance, gain >= 60"),
        tuned_runs("forward", "reverse"), _c7,
    ),
    Claim(
        "C8", "views of one person next to each other in a window undo C2", "97 -> 7 (ykrmm/PhysicsLLM_3.1)",
        _tiers("drop >= half", "drop >= 50"), tuned_runs("views", "adjacent"), _c8,
    ),
    Claim(
        "C9", "questions before documents beat questions after them, at equal tokens",
        "48.1 against 30.3 (Jiang et al., arXiv 2402.12847)",
        _tiers("gain >= 3", "gain >= 8"), ("B questions first", "B questions last"), _c9,
    ),
    Claim(
        "C10", "views of other people make single biographies answerable", f"4.4 -> 86.8 ({_PHYSICS})",
        _tiers("gain > 0", "gain >= 40"), tuned_runs("single", "celebrities"), _c10,
    ),
    Claim(
        "C11", "answers rise with the number of views, 1, 2, 5, 20, at equal tokens",
        "+8 to +17 points with 10 (Ovadia et al., arXiv 2312.05934)",
        _alike("25 % replay; 20 > 1, rank correlation > 0.8 (no interval)"), tuple(_VIEWS.values()), _c11,
    ),
    Claim(
        "C12", "LoRA forgets less than full training at equal steps",
        "0.635 against 0.545 (Biderman et al., arXiv 2405.09673)",
        _tiers("less, each at its best rate", "<= 0.7 x, each at its best rate"), _SWEEPS, _c12,
    ),
    Claim(
        "C13", "at equal new knowledge the two forget the same", "one frontier (Biderman et al., arXiv 2405.09673)",
        _alike("gap < 10"), _SWEEPS, _c13,
    ),
    Claim(
        "C14", "10 % replay undoes half of the forgetting or more, for less than 5 points of the new",
        "1 % helps, 50 % costs (Ibrahim et al., arXiv 2403.08763)",
        _alike("and 50 % costs more") | {"smoke": "25 % undoes half; the cost is shown and does not decide"},
        ("B views", "B views, replay 10", "B views, replay 50"), _c14,
    ),
    Claim(
        "C15", "a low rank is full when facts are many", "capacity grows with rank (arXiv 2603.01097)",
        {"gpu": "r=1 < r=8 < r=64"}, ("B rank 1", "B rank 8", "B rank 64"), _c15,
    ),
    Claim(
        "C16", "LoRA's best learning rate is many times that of full training; all targets beat attention alone",
        "9.8 x (Schulman et al. 2025)",
        _tiers("ratio >= 3 (of a grid, no interval)", "ratio 5 to 15 (of a grid, no interval)"),
        _SWEEPS + _ATTENTION, _c16,
    ),
    Claim(
        "C17", "known people are forgotten early; replay mends the end, not the dip",
        "within hundreds of steps (Zucchet et al., arXiv 2503.21676)",
        _alike("dip >= 5"), ("B views", "B views, replay 10"), _c17,
    ),
    Claim(
        "C18", "a source tag rescues useful facts among seven times as much junk",
        "20 x -> 2 x (Allen-Zhu & Li, arXiv 2404.05405)",
        {"gpu": "EM >= 2 x"}, tuned_runs("junk", "junk, tagged"), _c18,
    ),
    Claim(
        "C19", "of people never read about the model becomes surer, and stays wrong",
        "overconfidence (Zucchet et al., arXiv 2503.21676)",
        _alike("surer, EM <= 5"), ("B views",), _c19,
    ),
)  # fmt: skip
_SMOKE_RUNS = {"C2": ("B views, replay 25", "B single, replay 25"), "C14": ("B views", "B views, replay 25")}


def claims_of(tier: str) -> list[Claim]:
    """Those that a tier can run, with the runs that decide them there."""
    claims = [claim for claim in CLAIMS if tier in claim.accept]
    return [replace(claim, runs=_SMOKE_RUNS[claim.id]) if tier == "smoke" else claim for claim in claims]
