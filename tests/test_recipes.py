"""Recipes without a generator, against examples made by hand."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from lit_llama.errors import InputError
from lit_llama.evaluation.retrieval import Passage, open_book_prompt
from lit_llama.injection.facts import Fact, RelationTemplates, Templates
from lit_llama.injection.interface import DOCUMENTS, QUESTIONS, Document, Example, Rejected, Resources, Stage
from lit_llama.injection.permute import Permute, standing_alone
from lit_llama.injection.raft import OPEN_BOOK, Raft, answer_place
from lit_llama.injection.readcomp import TASKS, ReadingComprehension, mined_tasks
from lit_llama.injection.reverse import Reverse, reversed_words
from lit_llama.injection.sentences import paragraphs, with_names
from lit_llama.injection.structure import Structure, outline
from lit_llama.injection.views import Views, with_pronoun

BAHAMAS = """\
The Bahamas, officially the Commonwealth of The Bahamas, lies in the North Atlantic Ocean, southeast of Florida. It \
covers 13,880 sq km, 1.5 times the size of Washington, D.C. Its population is 415,306. Piracy thrived in the 17th and \
18th centuries because of The Bahamas' close proximity to shipping lanes. However, it ended in 1718.

The lowest point is the Atlantic Ocean, at 0 m. Climate: tropical marine; moderated by warm waters of Gulf Stream.

The capital of the Bahamas is Nassau. The national anthem is "March On!" (in English). The internet country code of \
the Bahamas is .bs."""
BAHAMAS_UNITS = [
    "The Bahamas, officially the Commonwealth of The Bahamas, lies in the North Atlantic Ocean, southeast of Florida.",
    "The Bahamas covers 13,880 sq km, 1.5 times the size of Washington, D.C.",
    "The Bahamas' population is 415,306.",
    "Piracy thrived in the 17th and 18th centuries because of The Bahamas' close proximity to shipping lanes. However,"
    " it ended in 1718.",
    "The Bahamas: The lowest point is the Atlantic Ocean, at 0 m.",
    "Climate of the Bahamas: tropical marine; moderated by warm waters of Gulf Stream.",
    "The capital of the Bahamas is Nassau.",
    'The Bahamas: The national anthem is "March On!" (in English).',
    "The internet country code of the Bahamas is .bs.",
]

RELATIONS = {
    "capital": RelationTemplates(
        questions=("What is the capital of {subject}?",),
        statements=tuple(f"{{value}} is{' very' * n} much the capital of {{subject}}." for n in range(5)),
        reversed_statements=("{value} is the capital of {subject}.", "{value} governs {subject}."),
        reversed_questions=("Which country has {value} as its capital?", "{value} is whose capital?"),
    ),
    "currency": RelationTemplates(
        questions=("What is paid with in {subject}?",),
        statements=("{subject}'s money is the {value}.", "The money of {subject} is the {value}."),
        reversed_statements=("The {value} is the money of {subject}.",),
        reversed_questions=("Where does one pay in {value}?",),
    ),
}


def country(number: int) -> Document:
    """One of many countries: every second pays in crowns."""
    name, doc_id = f"the Land {number}", f"land_{number}"
    facts = (
        Fact(name, "capital", f"City {number}", doc_id),
        Fact(name, "currency", f"coin {number}" if number % 2 else "crown", doc_id),
    )
    text = (
        f"{name.capitalize().replace('land', 'Land')} lies by the sea, which is deep there. It has hills of clay.\n\n"
        f"The capital of {name} is City {number}. The money of {name} is the {facts[1].value}."
    )
    return Document(doc_id, text, name, ("World", "East" if number % 2 else "West"), facts)


def question(number: int) -> dict:
    return {
        "id": f"capital-{number}",
        "doc_id": f"land_{number}",
        "question": f"What is the capital of the Land {number}?",
        "answers": [f"City {number}"],
    }


@pytest.fixture
def resources() -> Resources:
    documents = [country(number) for number in range(8)]
    return Resources(documents, Templates(RELATIONS), [question(number) for number in range(4)])


def expand(recipe, document: Document, resources: Resources | None = None, seed: int = 0) -> list[Example]:
    return list(recipe.expand(document, resources or Resources([document]), random.Random(seed)))


def texts_of(examples: list[Example]) -> list[str]:
    return ["".join(text for text, weight in example.segments if weight) for example in examples]


def bahamas() -> Document:
    return Document("bahamas", BAHAMAS, "the Bahamas")


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("It is 3.5 m high. It is 1,200 km long.", ["It is 3.5 m high.", "It is 1,200 km long."]),
        ("Gen. Dyer met Dr. Smith. They spoke.", ["Gen. Dyer met Dr. Smith.", "They spoke."]),
        ("J. F. Kennedy of the U.S. Senate won. He led.", ["J. F. Kennedy of the U.S. Senate won.", "He led."]),
        ("It joined the U.S. The war ended.", ["It joined the U.S.", "The war ended."]),
        ("It lost in World War I. Austria shrank.", ["It lost in World War I.", "Austria shrank."]),
        ("See No. 5. The answer is no. Then go.", ["See No. 5.", "The answer is no.", "Then go."]),
        ('He said "I came. I saw." Then he left.', ['He said "I came. I saw."', "Then he left."]),
        ("He left (it rained. It poured.) He came.", ["He left (it rained. It poured.)", "He came."]),
        (f'A "mark {"a" * 1000}. Then b. Then c.', [f'A "mark {"a" * 1000}.', "Then b.", "Then c."]),
        ("Is it? Yes! It is… Well.", ["Is it?", "Yes!", "It is…", "Well."]),
        ("e.g. Norway, i.e. a country.", ["e.g. Norway, i.e. a country."]),
        ('The anthem is "Rise!" (Up). It is old.', ['The anthem is "Rise!" (Up).', "It is old."]),
        ("A line that is\nbroken. And another.", ["A line that is broken.", "And another."]),
        ("- salt\n- iron ore\n1. gold", ["salt", "iron ore", "gold"]),
        ("Coast: 5 km\nArea: 7 sq km", ["Coast: 5 km", "Area: 7 sq km"]),
        ("# Geography\nIt is flat.", ["It is flat."]),
        ("Natural resources", []),
        ("", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert [sentence for paragraph in paragraphs(text) for sentence in paragraph] == sentences


@pytest.mark.parametrize(
    ("sentences", "last"),
    [
        (["It borders Sweden."], "Norway borders Sweden."),
        (["Norway is long.", "Its coast is rugged."], "Norway's coast is rugged."),
        (["In 1814, Norway left.", "They chose a king."], "Norway chose a king."),
        (["Norway is long.", "This country has fjords."], "Norway has fjords."),
        (["Norway is long.", "It has fjords.", "Its king is Harald."], "Norway's king is Harald."),
        # What the pronoun means is not sure, or it means nothing.
        (["Sweden is big.", "It borders Norway."], "It borders Norway."),
        (["Olav, who was king of Norway, died.", "He was old."], "He was old."),
        (["Norway is long.", "It is known that it rains."], "It is known that it rains."),
        (["Norway is long.", "It is hard to cross."], "It is hard to cross."),
        (["Norway is long.", "They are tall."], "They are tall."),
        (["Norway is long.", "This war ended."], "This war ended."),
    ],
)
def test_pronouns_give_way_to_the_title(sentences: list[str], last: str) -> None:
    assert with_names(sentences, "Norway") == [*with_names(sentences[:-1], "Norway"), last]


def test_every_sentence_names_what_it_is_about() -> None:
    assert standing_alone(bahamas(), names=True) == BAHAMAS_UNITS


def test_permute_begins_with_the_document_and_shuffles_its_sentences() -> None:
    examples = expand(Permute(tag="Source: an almanac", views=4), bahamas())
    assert [example.segments[0] for example in examples] == [("Source: an almanac\n\n", 0)] * 4
    original, *shuffled = texts_of(examples)
    assert original == BAHAMAS and len(set(shuffled)) == 3
    for text in shuffled:
        left = text
        for unit in BAHAMAS_UNITS:
            assert left.count(unit) == 1
            left = left.replace(unit, "")
        assert not left.strip()
        # Nothing but the order differs.
        assert len(text) == len(" ".join(BAHAMAS_UNITS))


@pytest.mark.parametrize("seed", range(20))
def test_permute_holds_exactly_the_sentences(seed: int) -> None:
    draw = random.Random(seed)
    words = ["river", "Oslo", "3.5", "U.N.", "(old)", '"Ja"', "runs,", "the", "is"]
    sentences = [f"Number {n} {' '.join(draw.choices(words, k=draw.randint(1, 9)))} end." for n in range(12)]
    cuts = sorted(draw.sample(range(1, 12), 2))
    blocks = [sentences[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    document = Document("d", "\n\n".join(" ".join(block) for block in blocks), "Norway")
    for text in texts_of(expand(Permute(names=False), document, seed=seed)):
        found = [sentence for paragraph in paragraphs(text) for sentence in paragraph]
        assert Counter(found) == Counter(sentences)


def test_permute_of_short_documents_repeats_nothing() -> None:
    assert texts_of(expand(Permute(), Document("d", "Norway is long.", "Norway"))) == ["Norway is long."]
    two = texts_of(expand(Permute(views=50), Document("d", "Norway is long. Norway is cold.", "Norway")))
    assert sorted(two) == ["Norway is cold. Norway is long.", "Norway is long. Norway is cold."]
    listed = texts_of(expand(Permute(views=9, names=False), Document("d", "Rain falls.\n\n- salt\n- iron", "Norway")))
    assert "salt\nRain falls.\niron" in listed


def test_views_word_every_fact_anew_while_templates_last(resources: Resources) -> None:
    document = resources.documents[1]
    examples = expand(Views(), document, resources)
    assert [(example.group, example.chat, example.doc_id) for example in examples] == [(DOCUMENTS, False, "land_1")] * 5
    capital, currency = document.facts
    capitals, currencies = (
        [fact.fill(text) for text in RELATIONS[fact.relation].statements] for fact in document.facts
    )
    texts, said = texts_of(examples), []
    for text in texts:
        (first,) = [sentence for sentence in capitals if sentence in text]
        (second,) = [sentence for sentence in currencies if sentence in text]
        assert text in (f"{first} {second}", f"{second} {first}")
        said.append((first, second))
    assert {first for first, _ in said} == set(capitals)
    assert Counter(second for _, second in said).most_common()[-1][1] == 2
    assert set().union(*(texts_of(expand(Views(), document, resources, seed)) for seed in range(4))) > set(texts)


def test_views_arms_of_the_paper(resources: Resources) -> None:
    document = resources.documents[1]
    for seed in range(6):
        (single,) = texts_of(expand(Views(views=1, permute=False, full_name=False), document, resources, seed))
        first, second = single.split(". ")
        assert first.endswith("much the capital of the Land 1") and second == "Its money is the coin 1."
    shuffled = [texts_of(expand(Views(full_name=False), document, resources, seed)) for seed in range(4)]
    assert all(text.count("the Land 1") + text.count("The Land 1") == 1 for texts in shuffled for text in texts)
    assert {text.startswith("City") for texts in shuffled for text in texts} == {True, False}


@pytest.mark.parametrize(
    ("template", "pronoun", "words"),
    [
        ("{subject} was born in {value}.", "he", "he was born in {value}."),
        ("{subject}'s city is {value}.", "she", "her city is {value}."),
        ("The city of birth of {subject} is {value}.", "he", "his city of birth is {value}."),
        ("{value} employs {subject}.", "she", "{value} employs her."),
        ("In {value}, {subject} was born.", "he", "In {value}, he was born."),
    ],
)
def test_pronouns_in_statements(template: str, pronoun: str, words: str) -> None:
    assert with_pronoun(template, pronoun) == words


def test_views_needs_statements(resources: Resources) -> None:
    relations = {name: replace(texts, statements=()) for name, texts in RELATIONS.items()}
    with pytest.raises(InputError, match="'capital' have no statements"):
        expand(Views(), resources.documents[0], replace(resources, templates=Templates(relations)))
    assert expand(Views(), replace(resources.documents[0], facts=()), resources) == []


STORY = (
    "Norway is a kingdom. Therefore, it has a king. Furthermore, it has a parliament. However, the king does not"
    " govern. The saga is about King Olav. The word fjord is defined as a long inlet between cliffs."
    " In other words, the sea comes far into the land. Norway is rich due to oil and gas."
    " Sweden stayed out of the war, whereas Norway was occupied. Because of the Gulf Stream, the winters are mild."
    " The parliament reconvenes in Oslo, Bergen and Trondheim."
)


def test_reading_tasks_by_pattern() -> None:
    mined = mined_tasks(Document("norway", STORY, "Norway"), random.Random(0))
    kingdom, king = "Norway is a kingdom.", "It has a king."
    stayed, occupied = "Sweden stayed out of the war.", "Norway was occupied."
    govern = {"first": "Furthermore, it has a parliament.", "second": "The king does not govern."}
    fjord = {"first": "fjord", "second": "a long inlet between cliffs"}
    assert mined["title"] == [{"title": "Norway"}]
    assert mined["entails"] == mined["effect"] == [{"first": kingdom, "second": king}]
    assert mined["neutral"] == [{"first": "Therefore, it has a king.", "second": "It has a parliament."}]
    assert mined["contradicts"] == mined["different"] == [govern, {"first": stayed, "second": occupied}]
    assert mined["topic"] == [{"first": "The saga", "second": "King Olav"}]
    assert mined["definition"] == [fjord]
    assert mined["similar"] == [
        {
            "first": "The word fjord is defined as a long inlet between cliffs.",
            "second": "The sea comes far into the land.",
        }
    ]
    assert mined["cause"] == [
        {"effect": "Norway is rich.", "cause": "oil and gas"},
        {"effect": "The winters are mild.", "cause": "the Gulf Stream"},
    ]
    (words,) = mined["words"]
    assert set(words["words"].split(", ")) == {"parliament", "reconvenes", "Oslo", "Bergen", "Trondheim"}
    assert words["sentence"].startswith("The parliament reconvenes")
    assert {"title": "Norway", "first": "Norway is", "second": "rich due to oil and gas."} in mined["completion"]
    assert all(f"{slots['first']} {slots['second']}" in STORY for slots in mined["completion"])


@pytest.mark.parametrize(
    "text",
    [
        "The island is about 20 km long.",
        "The loss was not due to the weather at all.",
        "But why?",
        "No sea is near it, and nobody goes.",
        "It refers to a thing that was said before.",
    ],
)
def test_patterns_that_only_look_like_tasks(text: str) -> None:
    mined = mined_tasks(Document("d", f"The sea is deep. {text}", "Norway"), random.Random(0))
    assert {kind for kind, found in mined.items() if found} <= {"title", "completion", "words"}


def test_reading_tasks_follow_the_text() -> None:
    document = Document("norway", STORY, "Norway")
    examples = expand(ReadingComprehension(views=200), document)
    assert {(example.group, len(example.segments), example.chat) for example in examples} == {(DOCUMENTS, 1, False)}
    texts = texts_of(examples)
    assert all(f"{STORY}\n\n" in text for text in texts)
    assert len(set(texts)) == 200 and 20 < sum(not text.startswith(STORY) for text in texts) < 80
    # Every wording of every kind is used, with its answer behind it, and no task more than twice.
    assert all(text.count("Because of oil and gas") <= 1 and text.count(" go on? ") <= 2 for text in texts)
    together = "\n".join(texts)
    for question_answer in [
        "What is the topic of The saga?\nAnswer: King Olav\n",
        "What deals with King Olav?\nA: The saga\n",
        "Give the meaning of fjord.\na long inlet between cliffs\n",
        "Why is it so? Norway is rich.\nSolution: Because of oil and gas\n",
        "Norway is a kingdom. What follows from that?\nA: It has a king.\n",
        "What stands against this? Sweden stayed out of the war.\nAnswer: Norway was occupied.\n",
    ]:
        assert question_answer in f"{together}\n"
    for pairs in TASKS.values():
        assert all(pair[0].split("{")[0] in together for pair in pairs)


def test_reverse_by_templates(resources: Resources) -> None:
    examples = expand(Reverse(), resources.documents[1], resources)
    statements = [example for example in examples if example.group == DOCUMENTS]
    assert [set(text.removesuffix(".").split(". ")) for text in texts_of(statements)] == [
        {"City 1 is the capital of the Land 1", "The coin 1 is the money of the Land 1"},
        {"City 1 governs the Land 1", "The coin 1 is the money of the Land 1"},
    ]
    asked = {example.segments for example in examples if example.group == QUESTIONS}
    assert asked == {
        (("Which country has City 1 as its capital?", 0), ("the Land 1", 1)),
        (("City 1 is whose capital?", 0), ("the Land 1", 1)),
        (("Where does one pay in coin 1?", 0), ("the Land 1", 1)),
    }


def test_reverse_asks_nothing_ambiguous_and_nothing_about_documents_without_questions(resources: Resources) -> None:
    asked = [example for example in expand(Reverse(), resources.documents[2], resources) if example.group == QUESTIONS]
    assert len(asked) == 2 and not any("crown" in example.segments[0][0] for example in asked)
    # Land 1's coin in another form of the same name is shared as well.
    fact = Fact("the Isle", "currency", "money", "isle", ("Coin 1",))
    shared = replace(resources, documents=[*resources.documents, Document("isle", "", "the Isle", facts=(fact,))])
    asked = [example for example in expand(Reverse(), shared.documents[1], shared) if example.group == QUESTIONS]
    assert len(asked) == 2
    assert {example.group for example in expand(Reverse(), resources.documents[5], resources)} == {DOCUMENTS}


@pytest.mark.parametrize(
    ("sentence", "backwards"),
    [
        ("The capital of Norway is New Oslo City.", "New Oslo City is Norway of capital The."),
        ("It was founded on 5 July 1962, as a state.", "state a as, 5 July 1962 on founded was It."),
        ("The coast of the Bahamas is 25,148 km long.", "long 25,148 km is the Bahamas of coast The."),
        ('Its anthem is "Rise up, all" (Hymn of old).', '(Hymn of old) "Rise up, all" is anthem Its.'),
        ("The Bank of England's gold shines!", "shines gold Bank of England's The!"),
        ("The code is .no.", ".no is code The."),
    ],
)
def test_reversal_keeps_names_and_numbers(sentence: str, backwards: str) -> None:
    assert reversed_words(sentence, "the Bahamas", 1, random.Random(0)) == backwards


def test_reversal_of_documents_without_facts() -> None:
    document = Document("d", "Norway is long. It is cold.\n\nOslo is big.", "Norway")
    assert texts_of(expand(Reverse(), document)) == ["big is Oslo. cold is It. long is Norway."]
    # Any segments keep all words; of a whole sentence, their order too.
    sentence = "Norway has many deep fjords and a long coast."
    for seed in range(10):
        text = reversed_words(sentence, "Norway", 3, random.Random(seed))
        assert sorted(text[:-1].split()) == sorted(sentence[:-1].split())
    assert reversed_words(sentence, "Norway", 1, random.Random(0)).startswith("coast long a and fjords")
    assert len({reversed_words(sentence, "Norway", 3, random.Random(seed)) for seed in range(10)}) > 3
    assert expand(Reverse(), Document("d", "", "Norway")) == []


def test_reverse_names_missing_templates(resources: Resources) -> None:
    bare = Templates({name: RelationTemplates(texts.questions) for name, texts in RELATIONS.items()})
    with pytest.raises(InputError, match="reversed_statements"):
        expand(Reverse(), resources.documents[0], replace(resources, templates=bare))


def test_structure_puts_the_path_in_front_unlearned_and_the_tree_with_the_first(resources: Resources) -> None:
    first, *others = [expand(Structure(), document, resources) for document in resources.documents]
    assert len(first) == 2 and all(len(examples) == 1 for examples in others)
    for examples, document in zip([first, *others], resources.documents, strict=True):
        (prefix, unlearned), text = examples[0].segments
        assert unlearned == 0 and text == (document.text, 1)
        assert "World" in prefix and document.headings[1] in prefix and prefix.endswith("\n\n")
    assert first[1].segments[0][0].split("\n", 2)[2].splitlines() == outline(resources.documents)
    prefixes = {expand(Structure(), resources.documents[0], resources, seed)[0].segments[0][0] for seed in range(40)}
    assert len(prefixes) > 10
    unfiled = replace(resources.documents[3], headings=())
    assert expand(Structure(), unfiled, resources)[0].segments == ((unfiled.text, 1),)


def test_outline() -> None:
    documents = [
        Document("a", "", "Norway", ("World", "Europe")),
        Document("b", "", "Mali", ("World", "Africa")),
        Document("c", "", "Europe", ("World", "Europe")),
        Document("d", "", "Austria", ("World", "Europe")),
    ]
    assert outline(documents) == ["- World", "  - Europe", "    - Norway", "    - Austria", "  - Africa", "    - Mali"]


def test_raft_rows(resources: Resources) -> None:
    document, gold = resources.documents[1], "The capital of the Land 1 is City 1."
    shown = 0
    for seed in range(200):
        (example,) = expand(Raft(), document, resources, seed)
        (prompt, read), (answer, learned) = example.segments
        assert (example.chat, example.group, read, learned) == (True, OPEN_BOOK, 0, 1)
        *passages, asked = prompt.split("\n\n")
        assert asked.startswith("What is the capital of the Land 1?")
        own = [passage for passage in passages if "Land 1" in passage]
        assert len(passages) - len(own) == 4 and len(set(passages)) == len(passages)
        if own:
            shown += 1
            assert gold in own[0] and answer == f"“{gold}”\nCity 1"
        else:
            assert answer == "City 1"
    assert 140 < shown < 180
    assert expand(Raft(), resources.documents[6], resources) == []


def test_raft_passages_are_whole_sentences_of_few_words(resources: Resources) -> None:
    for seed in range(20):
        (example,) = expand(Raft(max_words=16), resources.documents[1], resources, seed)
        for passage in example.segments[0][0].split("\n\n")[:-1]:
            assert passage.endswith(".") and len(passage.split()) <= 16 + len("the Land 1:".split())
            # Each says in its first sentence what it is about.
            assert "Land " in passage.split(".")[0]
    # The one sentence that no passage can do without is not cut, of distractors a shorter one is taken.
    (example,) = expand(Raft(max_words=5), resources.documents[1], resources)
    for passage in example.segments[0][0].split("\n\n")[:-1]:
        assert passage == "The capital of the Land 1 is City 1." or passage.endswith("It has hills of clay.")
    lone = replace(resources, documents=resources.documents[1:2])
    (example,) = expand(Raft(with_document=0.0), lone.documents[0], lone)
    assert "City 1" in example.segments[0][0]
    (plain,) = expand(Raft(quote=False, max_words=60), lone.documents[0], lone)
    assert plain.segments == (
        (
            open_book_prompt(question(1)["question"], [Passage("land_1", lone.documents[0].text.replace("\n\n", " "))]),
            0,
        ),
        ("City 1", 1),
    )


def test_raft_rejects_answers_that_stand_nowhere(resources: Resources) -> None:
    row = {**question(1), "answers": ["Atlantis", "Ity"]}
    (rejected,) = expand(Raft(), resources.documents[1], replace(resources, questions=[row]))
    assert rejected == Rejected("land_1", "raft", "the answer is in no sentence", row["question"])


def test_the_answer_is_quoted_from_the_sentence_that_is_nearest_to_the_question() -> None:
    sentences = ["Monaco borders France.", "The capital of Monaco is Monaco.", "People speak French in Monaco."]
    assert answer_place(sentences, "What is the capital of Monaco?", ["Monaco"]) == 1
    assert answer_place(["It is no island.", "Its code is .no."], "Which code?", [".no"]) == 1


RECIPES = [Views(), Permute(), ReadingComprehension(), Reverse(), Structure(), Raft()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_recipes_are_functions_of_their_arguments(recipe, resources: Resources) -> None:
    for document in resources.documents[3::-1]:
        examples = expand(recipe, document, resources, seed=3)
        assert examples == expand(recipe, document, resources, seed=3)
        assert {(example.doc_id, example.recipe) for example in examples} == {(document.id, recipe.name)}
    random.seed(0)
    state = random.getstate()
    expand(recipe, resources.documents[0], resources)
    assert random.getstate() == state
    assert any(expand(recipe, resources.documents[0], resources, seed) != examples for seed in range(10))


def test_plans() -> None:
    plan = [Stage({DOCUMENTS: 0.6, QUESTIONS: 0.4})]
    for recipe in RECIPES[:-1]:
        assert recipe.stages([]) == [Stage({DOCUMENTS: 1.0})] and recipe.stages(plan) == plan
    (stage,) = Raft(share=0.2).stages(plan)
    assert stage.mix == pytest.approx({DOCUMENTS: 0.48, QUESTIONS: 0.32, OPEN_BOOK: 0.2})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Views(views=0),
        lambda: Views(pronoun="they"),
        lambda: Permute(views=0),
        lambda: ReadingComprehension(tasks_a_kind=0),
        lambda: Reverse(segment_words=0),
        lambda: Raft(share=1.0),
        lambda: Raft(max_words=0),
        lambda: Raft(with_document=1.5),
    ],
)
def test_options_out_of_range(make) -> None:
    with pytest.raises(InputError):
        make()
