"""The runs behind the claims on `bios-mini`: what each trains on, from where, for how long, and what is measured.

Two tracks share one world. In track A (Allen-Zhu & Li 2023, arXiv 2309.14316) a model reads biographies from its first
step on and is then tuned to answer questions on half of the people ("taught"); asked about the other half ("injected").
In track B, the project's case, a base that knows some people ("known") and answers questions about them reads about new
ones. In both, options and the moment to stop are chosen on people of their own ("validation"). Everything is measured
while a run trains, so that there is a curve of each. What the figures mean is `claims`'s.
"""

import hashlib
import random
import shutil
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lit_llama.data.mixing import MixedWindows
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.evaluation.knowledge import evaluate_knowledge
from lit_llama.evaluation.questions import encode_questions
from lit_llama.evaluation.recall import value_recall
from lit_llama.files import read_json, write_json
from lit_llama.injection.interface import Document, Example, Recipe, Resources, Stage
from lit_llama.injection.reverse import Reverse
from lit_llama.injection.views import Views
from lit_llama.injection.world import PRONOUN, SINGLE, STYLE, World, WorldSize, write_tiny_llama
from lit_llama.learners import LoRAArguments, full_learner, lora_learner
from lit_llama.lora import LoRAConfig
from lit_llama.model import Llama
from lit_llama.prompts import encode_example
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, EvalConfig, TrainConfig, start_fabric, train

OTHERS = ("injected", "validation")
"""People that a model reads about and is never trained to answer for."""
NEW = ("taught", *OTHERS)
WORLD_SEED = 1
"""The people are the same in all runs of a tier; a run's seed is that of its weights, wordings and order. Sizes and
rates were chosen on the people of other worlds: 0, and 10 to 14."""
TAG = "From a good source:"


@dataclass(frozen=True)
class Tier:
    """A size of the whole experiment. Token counts are those of training, padding not counted."""

    size: WorldSize
    hidden_size: int
    layers: int
    reading_tokens: int
    """Of reading in track A."""
    tuning_tokens: int
    """Of the questions after it."""
    base_tokens: int
    """Of the base of track B."""
    injection_tokens: int
    sequence_length: int = 256
    batch_size: int = 4
    seeds: tuple[int, ...] = (0, 1, 2)
    reading_rate: float = 2e-3
    """Learning rates: of what starts from random weights, and of injection."""
    injection_rate: float = 5e-4
    asked: int = 60
    """People asked about, of each split that is not under test."""
    evaluations: int = 8
    """Of a run, besides that before training."""


TIERS = {
    "smoke": Tier(
        size=WorldSize(
            {"known": 80, "taught": 0, "injected": 64, "validation": 16, "never": 16},
            first_names=40,
            middle_names=40,
            last_names=80,
            place_words=6,
            college_words=8,
            firm_words=8,
            relations=("birth_city", "university", "company"),
        ),
        hidden_size=96,
        layers=3,
        reading_tokens=0,
        tuning_tokens=0,
        base_tokens=340_000,
        injection_tokens=110_000,
        sequence_length=128,
        batch_size=8,
        reading_rate=3e-3,
        injection_rate=1e-3,
        asked=64,
        evaluations=1,
    ),
    "cpu": Tier(
        size=WorldSize({"known": 200, "taught": 100, "injected": 100, "validation": 40, "never": 80}),
        hidden_size=128,
        layers=4,
        reading_tokens=1_000_000,
        tuning_tokens=150_000,
        base_tokens=1_500_000,
        injection_tokens=300_000,
        injection_rate=1e-3,
        asked=80,
    ),
    "gpu": Tier(
        size=WorldSize(
            {"known": 4000, "taught": 1500, "injected": 1500, "validation": 300, "never": 300, "junk": 21_000},
            first_names=400,
            middle_names=400,
            last_names=1000,
        ),
        hidden_size=384,
        layers=8,
        reading_tokens=60_000_000,
        tuning_tokens=6_000_000,
        base_tokens=80_000_000,
        injection_tokens=25_000_000,
        sequence_length=512,
        batch_size=32,
        reading_rate=1e-3,
        injection_rate=3e-4,
        asked=300,
    ),
}


@dataclass(frozen=True)
class Source:
    """Text on the people of some splits.

    Attributes:
        recipe: makes the texts; None: questions with their answers instead.
        adjacent: the views of a person follow each other as one document, in which each sees those before it.
        prefix: in front of every text, read but not learned.
        reversed: questions go from the birth date to the person.
    """

    splits: tuple[str, ...]
    recipe: Recipe | None = None
    adjacent: bool = False
    prefix: str = ""
    reversed: bool = False


_MULTI = Views(views=5, permute=False, full_name=False, pronoun=PRONOUN)
_VIEWS = Views(views=5)
SOURCES = {
    "single": Source(NEW, SINGLE),
    "single of the others": Source(OTHERS, SINGLE),
    "multi5": Source(NEW, _MULTI),
    "views": Source(NEW, _VIEWS),
    "views, adjacent": Source(NEW, _VIEWS, adjacent=True),
    "views, tagged": Source(NEW, _VIEWS, prefix=TAG),
    "reversed statements": Source(NEW, Reverse()),
    "views of the taught": Source(("taught",), _VIEWS),
    "views of the others": Source(OTHERS, _VIEWS),
    "1 view of the others": Source(OTHERS, replace(_VIEWS, views=1)),
    "2 views of the others": Source(OTHERS, replace(_VIEWS, views=2)),
    "20 views of the others": Source(OTHERS, replace(_VIEWS, views=20)),
    "questions": Source(("taught",)),
    "reversed questions": Source(("taught",), reversed=True),
    "known": Source(("known",), replace(_VIEWS, views=20)),
    "known questions": Source(("known",)),
    "junk": Source(("junk",), SINGLE),
}
KNOWN = {"known": 0.6, "known questions": 0.4}
"""What the base of track B is made of, and replay."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        stages: mixes of `SOURCES`.
        start: name of the run whose model it goes on with; None: random weights.
    """

    name: str
    stages: tuple[Stage, ...]
    tokens: int
    learning_rate: float
    start: str | None = None
    lora: LoRAConfig | None = None
    evaluations: int | None = None
    """Of the run; by default as many as the tier has."""


FULL_RATES, LORA_RATES = (1e-4, 2e-4, 5e-4, 1e-3), (1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates that the two learners are compared over."""
TUNING_RATES = (3e-4, 1e-3)
TUNED = ("single", "multi5", "views", "adjacent", "celebrities", "reverse")
"""Models of track A that are tuned on questions."""


def runs_of(tier: Tier) -> dict[str, Run]:
    """All runs that a tier could have, by name."""
    runs: list[Run] = []

    def add(name: str, *stages: dict[str, float], **options: Any) -> None:
        runs.append(Run(name, tuple(Stage(mix, 1 / len(stages)) for mix in stages), **options))

    reading = {"tokens": tier.reading_tokens, "learning_rate": tier.reading_rate, "evaluations": 1}
    tuning = {"tokens": tier.tuning_tokens, "evaluations": 4}
    add("A single", {"single": 1}, **reading)
    add("A multi5", {"multi5": 1}, **reading)
    add("A views", {"views": 1}, **reading)
    add("A adjacent", {"views, adjacent": 1}, **reading)
    add("A celebrities", {"single": 0.5, "known": 0.5}, **reading | {"tokens": 2 * tier.reading_tokens})
    add("A reverse", {"views": 0.7, "reversed statements": 0.3}, **reading)
    add(
        "A mixed",
        {"single": 0.6, "questions": 0.4},
        **reading | {"evaluations": None, "tokens": tier.reading_tokens / 0.6},
    )
    add("A junk", {"views": 0.125, "junk": 0.875}, **reading | {"tokens": 8 * tier.reading_tokens})
    add("A junk, tagged", {"views, tagged": 0.125, "junk": 0.875}, **reading | {"tokens": 8 * tier.reading_tokens})
    for rate in TUNING_RATES:
        for name in (*TUNED, "junk", "junk, tagged"):
            mix = {"questions": 0.8, "reversed questions": 0.2} if name == "reverse" else {"questions": 1}
            add(f"A {name}, tuned {rate:g}", mix, start=f"A {name}", learning_rate=rate, **tuning)
        mix = {"questions": 0.8, "reversed questions": 0.2}
        add(f"A forward, tuned {rate:g}", mix, start="A views", learning_rate=rate, **tuning)

    from_nothing = {"tokens": tier.base_tokens, "learning_rate": tier.reading_rate, "evaluations": 1}
    add("B base", KNOWN, **from_nothing)
    add("B documents", {"known": 1}, **from_nothing)
    injection = {"tokens": tier.injection_tokens, "learning_rate": tier.injection_rate, "start": "B base"}
    at_the_end = injection | {"evaluations": 1}
    single, views = {"single of the others": 1}, {"views of the others": 1}
    add("B views", views, **injection)
    add("B single, replay 25", _with_replay(single, 25), **at_the_end)
    for name in ("1 view", "2 views", "views", "20 views"):
        add(f"B {name}, replay 25", _with_replay({f"{name} of the others": 1}, 25), **at_the_end)
    add("B views, replay 10", _with_replay(views, 10), **injection)
    add("B views, replay 50", _with_replay(views, 50), **at_the_end)
    sweep = injection | {"evaluations": 4}
    for rate in FULL_RATES:
        add(f"B full {rate:g}", views, **sweep | {"learning_rate": rate})
    # One attention layer and one MLP of this shape have 8 and 11 hidden sizes of adapter a rank: 8 of all are 19 here.
    attention = LoRAConfig(r=19, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    for rate in LORA_RATES:
        add(f"B lora {rate:g}", views, **sweep | {"learning_rate": rate}, lora=LoRAConfig(r=8))
        add(f"B attention {rate:g}", views, **sweep | {"learning_rate": rate}, lora=attention)
    for rank in (1, 8, 64):
        add(f"B rank {rank}", views, **at_the_end | {"learning_rate": 3e-3}, lora=LoRAConfig(r=rank))
    # As much of everything in both, and twice the tokens, as questions are half of them.
    ordered = at_the_end | {"start": "B documents", "tokens": 2 * tier.injection_tokens}
    half = {"questions": 0.5, "views of the taught": 0.5}
    add("B questions first", {"questions": 1}, half, views, **ordered)
    add("B questions last", {"views of the taught": 1 / 3, "views of the others": 2 / 3}, {"questions": 1}, **ordered)
    return {run.name: run for run in runs}


def _with_replay(mix: dict[str, float], percent: float) -> dict[str, float]:
    return _share(mix, 1 - percent / 100) | _share(KNOWN, percent / 100)


def _share(mix: dict[str, float], share: float) -> dict[str, float]:
    return {name: part * share for name, part in mix.items()}


def carry_out(run: Run, tier: Tier, seed: int, out_dir: Path) -> dict[str, Any]:
    """Train and measure one run on one thread, unless that has been done; what is left of it is `result.json`.

    Args:
        out_dir: of the tier; the run that this one starts from is there already.

    Returns:
        {"questions": [{"split", "form", "phrasing", "relation", "doc_id"}], "evaluations": [{"step", "exact_match":
        [one a question, 0 or 1], "max_probability": [...]}], the first before training, "recall": share of the value
        tokens of what was read, "tokens", "seconds"}.
    """
    directory = out_dir / f"seed-{seed}" / run.name.replace(" ", "-").replace(",", "")
    result_file = directory / "result.json"
    settings = settings_of(run, tier)
    if result_file.is_file():
        result = read_json(result_file)
        if result.get("settings") != settings:
            raise InputError(f"{result_file}: of another world, size or plan than now; name another --out_dir")
        return result
    torch.set_num_threads(1)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    world = World(tier.size, seed=WORLD_SEED)
    if run.start is None:
        base = directory / "start"
        write_tiny_llama(world, base, tier.hidden_size, tier.layers, seed)
    else:
        base = out_dir / f"seed-{seed}" / run.start.replace(" ", "-").replace(",", "") / "checkpoint"
    with open(directory / "log.txt", "w", encoding="utf-8") as log, redirect_stderr(log):
        result = _train_and_measure(run, tier, world, seed, base, directory)
    for name in ("start", "stores", "state", "best"):
        shutil.rmtree(directory / name, ignore_errors=True)
    result["settings"] = settings
    write_json(result_file, result)
    return result


def settings_of(run: Run, tier: Tier) -> str:
    """Digest of all that a run's result is a function of, but for its seed and the code.

    A result of other settings must not be taken up again: a base that knows the people of another world would be
    injected and tested on people that it never read about, and nothing in the figures would say so.
    """
    chain = [run]
    while chain[-1].start is not None:
        chain.append(runs_of(tier)[chain[-1].start])
    used = sorted({name for one in chain for stage in one.stages for name in stage.mix})
    parts = [repr(chain), repr(tier), repr([SOURCES[name] for name in used]), str(WORLD_SEED)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _train_and_measure(run: Run, tier: Tier, world: World, seed: int, base: Path, directory: Path) -> dict[str, Any]:
    tokenizer = Tokenizer.from_checkpoint(base)
    names = sorted({name for stage in run.stages for name in stage.mix})
    examples = {name: examples_of(SOURCES[name], world, seed) for name in names}
    windows = {}
    for name in names:
        store = _write_store(directory / "stores" / name, tokenizer, SOURCES[name], examples[name])
        windows[name] = TrainingWindows(store, tier.sequence_length, seed)
    course = MixedWindows(windows, [(run.tokens * stage.share, stage.mix) for stage in run.stages], seed)
    steps = -(-course.windows_per_epoch // tier.batch_size)
    interval = -(-steps // (run.evaluations or tier.evaluations))

    questions = asked(world, tier)
    prompts = encode_questions(tokenizer, questions, STYLE)
    evaluations: list[dict[str, Any]] = []

    def measure(model: Llama) -> dict[str, float]:
        rows = evaluate_knowledge(model, tokenizer, questions, prompts, STYLE, batch_size=256)
        evaluations.append(
            {
                "step": min(len(evaluations) * interval, steps),
                "exact_match": [int(row["exact_match"]) for row in rows],
                "max_probability": [round(row["max_probability"], 4) for row in rows],
            }
        )
        return {}

    arguments = LoRAArguments(
        checkpoint_dir=base,
        out_dir=directory,
        data_dir=str(directory / "stores" / names[0]),
        train=TrainConfig(
            learning_rate=run.learning_rate,
            warmup_steps=min(50, steps // 10),
            weight_decay=0.1,
            sequence_length=tier.sequence_length,
            micro_batch_size=tier.batch_size,
            global_batch_size=tier.batch_size,
            seed=seed,
        ),
        eval=EvalConfig(interval=interval, max_windows=4, probe_style=STYLE),
        precision="fp32",
        overwrite=True,
        lora=run.lora or LoRAConfig(),
    )
    fabric = start_fabric(arguments)
    model, save = (lora_learner if run.lora else full_learner)(fabric, arguments)
    held_out = TrainingWindows(windows[names[0]].store, tier.sequence_length, seed=0, shuffle=False)
    report = train(fabric, model, tokenizer, Corpus(course, held_out, None, [], measure), arguments, save)
    kept = ("split", "form", "phrasing", "relation", "doc_id")
    return {
        "run": run.name,
        "seed": seed,
        "questions": [{key: row[key] for key in kept} for row in questions],
        "evaluations": evaluations,
        "recall": _recall(model, tokenizer, world, examples),
        **{key: report[key] for key in ("tokens", "seconds", "trainable_parameters", "total_parameters")},
    }


def asked(world: World, tier: Tier) -> list[dict]:
    """The questions that every run of a tier is asked: one a fact in a wording of training; those under test, in an
    unseen one too, and reversed."""
    rows = world.questions(("known", "injected", "validation", "never"), wordings=1)
    rows += world.questions(("injected",), "unseen", wordings=1)
    rows += world.reversed_questions(("injected",))
    return [row for row in rows if row["split"] == "injected" or int(row["doc_id"].split("-")[1]) < tier.asked]


def examples_of(source: Source, world: World, seed: int) -> list[Example]:
    """What a source says of its people; views in one order, which laying windows changes."""
    people = world.people(*source.splits)
    if source.recipe is None:
        rows = world.reversed_questions(source.splits) if source.reversed else world.questions(source.splits)
        return [Example.of_question(row["doc_id"], "questions", row["question"], row["answers"][0]) for row in rows]
    resources = Resources(people, world.templates)
    examples = []
    for person in people:
        draw = random.Random(f"{seed} {person.id} {source.recipe.name}")
        for example in source.recipe.expand(person, resources, draw):
            prefixed = ((source.prefix, 0), *example.segments) if source.prefix else example.segments
            examples.append(replace(example, segments=prefixed))
    return examples


def _write_store(directory: Path, tokenizer: Tokenizer, source: Source, examples: list[Example]) -> TokenStore:
    numbers: dict[str, int] = {}
    extra = {"examples": True} if examples[0].chat else {}
    with TokenStoreWriter(directory, tokenizer.vocab_size, tokenizer.sha256, "bios-mini", extra=extra) as writer:
        joined: dict[str, tuple[list[int], list[int]]] = {}
        for example in examples:
            ids, mask = _encode(tokenizer, example)
            number = numbers.setdefault(example.doc_id, len(numbers))
            if source.adjacent:
                before = joined.setdefault(example.doc_id, ([], []))
                joined[example.doc_id] = (before[0] + ids, before[1] + mask)
            else:
                writer.add("train", ids, mask, group=number)
        for ids, mask in joined.values():
            writer.add("train", ids, mask)
    return TokenStore.open(directory, "train")


def _encode(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    if example.chat:
        (question, _), (answer, _) = example.segments
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return encode_example(tokenizer, STYLE, turns)
    ids, mask = [tokenizer.document_start_id], [1]
    for text, weight in example.segments:
        new = tokenizer.encode(text)
        ids, mask = ids + new, mask + [weight] * len(new)
    return [*ids, tokenizer.document_end_id], [*mask, 1]


def _recall(model: Llama, tokenizer: Tokenizer, world: World, examples: dict[str, list[Example]]) -> float | None:
    """Of the first text on each person under test that was read."""
    values = {person.id: [fact.value for fact in person.facts] for person in world.people("injected")}
    texts: dict[str, str] = {}
    for of_source in examples.values():
        for example in of_source:
            if example.doc_id in values and not example.chat:
                texts.setdefault(example.doc_id, example.segments[-1][0])
    read = [Document(doc_id, text, doc_id) for doc_id, text in texts.items()]
    return value_recall(model, tokenizer, read, values, batch_size=64)["accuracy"] if read else None
