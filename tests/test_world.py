"""The invented world: what it is made of, that every part of the library takes it, and that its oracle errs as told."""

import itertools
import math
import random
import re
from pathlib import Path

import pytest
from conftest import run_script

from lit_llama.evaluation.questions import read_questions
from lit_llama.injection.interface import Resources
from lit_llama.injection.paraphrase import Paraphrase
from lit_llama.injection.question_building import parse_pairs
from lit_llama.injection.reverse import Reverse
from lit_llama.injection.views import Views
from lit_llama.injection.world import RELATIONS, SINGLE, STYLE, Oracle, World, WorldSize, write_tiny_llama
from lit_llama.prompts import detect_style, encode_example
from lit_llama.tokenizer import Tokenizer

SIZE = WorldSize({"known": 30, "taught": 10, "injected": 10, "validation": 5, "never": 5})


@pytest.fixture(scope="module")
def world() -> World:
    return World(SIZE, seed=0)


@pytest.fixture(scope="module")
def checkpoint(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world") / "tiny"
    write_tiny_llama(world, directory, hidden_size=32, layers=1, seed=0)
    return directory


def test_people_are_told_apart_by_name_and_by_birth_date(world: World) -> None:
    people = world.people(*SIZE.people)
    assert len(people) == 60
    assert len({person.title for person in people}) == len({person.facts[0].value for person in people}) == 60
    assert all(len(person.title.split()) == 3 for person in people)
    assert all(len(person.facts[0].value.split()) == 3 for person in people)


def test_bits_are_those_of_the_choices(world: World) -> None:
    assert world.bits_per_person == pytest.approx(math.log2(12 * 28 * 100 * 100 * 100 * 64 * 100))
    assert 40 < world.bits_per_person < 42  # the published figure for a world of this shape is 41


def test_the_office_city_follows_from_the_company(world: World) -> None:
    for person in world.people(*SIZE.people):
        values = {fact.relation: fact.value for fact in person.facts}
        assert tuple(values) == RELATIONS
        assert world.seats[values["company"]] == values["company_city"]


def test_a_biography_names_its_person_once_and_states_every_value(world: World) -> None:
    for person in world.people("known"):
        assert person.text.count(person.title) == 1
        assert person.text.index(person.title) < person.text.index(person.facts[0].value)
        assert all(fact.value in person.text for fact in person.facts)
        assert person.text.count(".") == len(RELATIONS)


def test_statements_for_evaluation_are_never_trained_on(world: World) -> None:
    for relation, templates in world.templates.relations.items():
        assert (len(templates.statements), len(world.evaluation_statements[relation])) == (20, 5)
        assert not set(templates.statements) & set(world.evaluation_statements[relation])
        assert not set(templates.questions) & set(templates.unseen_questions)
        # From the person to the value only: the other direction is the recipe reverse's.
        assert all(text.index("{subject}") < text.index("{value}") for text in templates.statements)


def test_the_seed_changes_people_and_not_the_words(world: World) -> None:
    same, other = World(SIZE, seed=0), World(SIZE, seed=1)
    assert same.documents == world.documents
    assert other.documents != world.documents
    assert list(other.vocabulary()) == list(world.vocabulary())


def test_the_vocabulary_is_that_of_the_attributes_there_are() -> None:
    small = World(WorldSize({"known": 20}, relations=("birth_city", "company")), seed=0)
    words = {word.lower() for text in small.vocabulary() for word in re.findall(r"\w+", text)}
    assert not words & {"january", "1950", "college", "studied"}
    texts = [person.text for person in small.people("known")]
    texts += [row["question"] for row in small.questions(("known",)) + small.questions(("known",), "unseen")]
    assert {word.lower() for text in texts for word in re.findall(r"\w+", text)} <= words


def test_words_are_tokens_and_values_are_several(world: World, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    assert 1000 < tokenizer.vocab_size < 2100
    words = [word for name in world.names for word in name]
    assert sum(len(tokenizer.encode(word)) == 1 for word in words) > 0.95 * len(words)
    for fact in itertools.chain.from_iterable(person.facts for person in world.people("known")):
        assert len(tokenizer.encode(fact.value)) >= 2
    text = "Überall: 5 Äpfel\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_checkpoint_says_in_which_style_it_is_asked(world: World, checkpoint: Path) -> None:
    assert detect_style(checkpoint) == STYLE
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    fact = world.people("known")[0].facts[1]
    turns = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": fact.value}]
    ids, mask = encode_example(tokenizer, STYLE, turns)
    learned = [token_id for token_id, learns in zip(ids, mask, strict=True) if learns]
    # The answer is made of the tokens that the documents have.
    assert learned == [*tokenizer.encode(f"in {fact.value}")[1:], tokenizer.eos_id]


def test_recipes_take_its_people_as_they_are(world: World) -> None:
    person = world.people("taught")[0]
    resources = Resources(world.people("taught"), world.templates, world.questions(("taught",)))
    texts = [example.segments[-1][0] for example in Views(views=5).expand(person, resources, random.Random(0))]
    assert len(set(texts)) == 5
    assert all(text.count(person.title) == len(RELATIONS) for text in texts)
    (single,) = SINGLE.expand(person, resources, random.Random(0))
    assert single.segments[0][0].count(person.title) == 1 and " she " in single.segments[0][0]
    back = list(Reverse().expand(person, resources, random.Random(0)))
    assert [example.segments[1][0] for example in back if example.chat] == [person.title]
    assert all(text.index(person.facts[0].value) < text.index(person.title) for text in (back[0].segments[0][0],))


def test_questions_are_a_question_file(world: World, tmp_path: Path) -> None:
    import json

    rows = world.questions(("taught", "injected")) + world.questions(("injected",), "unseen", wordings=1)
    rows += world.reversed_questions(("injected",))
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_questions(path)
    assert len(read) == 20 * 6 * 3 + 10 * 6 + 10
    wordings = {row["question"].replace(row["subject"], "X") for row in read if row["relation"] == "major"}
    assert len(wordings) == 5
    assert all(row["answers"] == [row["subject"]] for row in read if row["form"] == "reversed")


def test_scripts_open_the_checkpoint(checkpoint: Path) -> None:
    answer = run_script("generate/base.py", "--checkpoint_dir", checkpoint, "--prompt", "Who?", "--max_new_tokens", 3)
    assert "tokens/s" in answer.stderr


def test_the_oracle_states_all_facts_without_error(world: World) -> None:
    person = world.people("injected")[0]
    oracle = Oracle(world)
    texts = oracle.write(person, "paraphrase", "Rewrite.", 3, seed=0, max_new_tokens=9)
    assert len(set(texts)) == 3
    assert all(fact.value in text for text in texts for fact in person.facts)
    assert oracle.write(person, "paraphrase", "Rewrite.", 3, seed=0, max_new_tokens=9) == texts
    pairs = parse_pairs(oracle.write(person, "questions", "Ask.", 1, 0, 9)[0])
    assert sorted(answer for _, answer in pairs) == sorted(fact.value for fact in person.facts)


@pytest.mark.parametrize("error", [0.2, 0.5])
def test_the_oracle_errs_in_as_many_lines_as_it_is_told(world: World, error: float) -> None:
    people = world.people("known", "taught")
    lines = {
        kind: [
            (person, line)
            for person in people
            for line in Oracle(world, error, kind).write(person, "implications", "List.", 1, 0, 9)[0].splitlines()
        ]
        for kind in ("drop", "swap")
    }
    whole = len(people) * len(RELATIONS)
    assert len(lines["swap"]) == whole
    assert len(lines["drop"]) == pytest.approx((1 - error) * whole, rel=0.15)
    right = [any(fact.value in line for fact in person.facts) for person, line in lines["swap"]]
    assert sum(right) == pytest.approx((1 - error) * whole, rel=0.15)
    assert all(any(fact.value in line for fact in person.facts) for person, line in lines["drop"])


def test_the_oracle_asks_and_answers_about_one_sentence_or_drops_it(world: World) -> None:
    person = world.people("injected")[0]
    fact = person.facts[1]
    for task, right in (("question", f"Where was {person.title} born?"), ("answer", fact.value)):
        prompt = f"Of this sentence: {fact.fill('{subject} is from {value}.')}"
        assert Oracle(world).write(person, task, prompt, 2, 0, 9) == [right, right]
        assert Oracle(world, 1.0, "drop").write(person, task, prompt, 2, 0, 9) == ["", ""]
    swapped = Oracle(world, 1.0, "swap").write(person, "answer", f"Where was {person.title} born?", 1, 0, 9)[0]
    assert swapped != fact.value and swapped in world.values["birth_city"]


def test_a_generating_recipe_runs_on_the_oracle(world: World) -> None:
    person = world.people("injected")[0]
    resources = Resources([person], world.templates, generator=Oracle(world))
    examples = list(Paraphrase(rewrites=3).expand(person, resources, random.Random(0)))
    assert len(examples) == 4
    assert all(fact.value in example.segments[-1][0] for example in examples for fact in person.facts)
