"""Passages, BM25 and prompts with something to read, against the formula, the package bm25s and examples by hand."""

import math

import numpy as np
import pytest

from lit_llama.evaluation.retrieval import Passage, PassageIndex, cut_passages, open_book_prompt, with_passages
from lit_llama.injection.interface import Document

TEXTS = [
    "Norway: Oslo is the capital of Norway. Norway has fjords.",
    "Nepal: Mount Everest, at 8,849 metres, is in Nepal.",
    "Brazil: The capital of Brazil is Brasilia. The Amazon is a river of Brazil.",
    "Oslo, the city: Oslo lies on a fjord.",
]


@pytest.fixture(scope="module")
def index() -> PassageIndex:
    return PassageIndex([Passage(str(number), text) for number, text in enumerate(TEXTS)])


@pytest.mark.parametrize(
    "query, scores",  # of bm25s 0.3.16: BM25(method="lucene", k1=1.2, b=0.75, dtype="float64") over the same words
    [
        ("What is the capital of Norway?", (1.8421913697287629, 0.16534600050139914, 1.080971482759641, 0.1796204753)),
        ("Oslo Oslo fjord", (0.642653015088691, 0.0, 0.0, 1.5349354719177142)),
        ("the river", (0.16534600050139914, 0.0, 0.6854033754096501, 0.17962047536482925)),
    ],
)
def test_scores_equal_bm25s(index: PassageIndex, query: str, scores: tuple[float, ...]) -> None:
    assert index.scores(query) == pytest.approx(scores)


def test_scores_equal_the_formula() -> None:
    random = np.random.default_rng(0)
    words = [f"w{number}" for number in range(30)]
    texts = [list(random.choice(words, random.integers(1, 40))) for _ in range(25)]
    index = PassageIndex([Passage("d", " ".join(text).upper()) for text in texts], k1=0.9, b=0.4)
    mean = sum(map(len, texts)) / len(texts)
    query = ["w3", "w7", "w7", "unheard"]
    expected = []
    for text in texts:
        score = 0.0
        for word in query:
            df, tf = sum(word in other for other in texts), text.count(word)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + 0.9 * (1 - 0.4 + 0.4 * len(text) / mean))
        expected.append(score)
    assert index.scores(" ".join(query)) == pytest.approx(expected)


def test_the_best_passages(index: PassageIndex) -> None:
    assert [passage.doc_id for passage in index.best("the capital of Norway", 2)] == ["0", "2"]
    assert [passage.doc_id for passage in index.best("Oslo's fjord?", 3)] == ["3", "0"]  # the others share no word
    assert index.best("zebra", 3) == []
    assert PassageIndex([]).best("Oslo", 3) == []


def test_passages_are_whole_sentences_under_their_title() -> None:
    document = Document(
        "no", "Norway is in Europe. Its capital is Oslo.\n\nOne two three four five six seven.", "Norway"
    )
    assert [passage.text for passage in cut_passages(document, 8)] == [
        "Norway is in Europe. Its capital is Oslo.",
        "Norway: One two three four five six seven.",
    ]
    # What is longer than a passage is cut, and nothing is lost.
    assert [passage.text for passage in cut_passages(document, 3)] == [
        "Norway is in",
        "Norway: Europe.",
        "Norway: Its capital is",
        "Norway: Oslo.",
        "Norway: One two three",
        "Norway: four five six",
        "Norway: seven.",
    ]
    assert cut_passages(Document("empty", "", "Empty"), 8) == []


def test_questions_with_something_to_read() -> None:
    norway = Document("no", "Oslo is the capital. " + "Filler is here. " * 20 + "Fjords are deep.", "Norway")
    documents = [norway, Document("np", "Mount Everest is the highest point.", "Nepal")]
    questions = [
        {"id": 1, "question": "What is the capital of Norway?", "answers": ["oslo"], "doc_id": "no"},
        {"id": 2, "question": "Deep what, and a capital?", "answers": ["Fjords"], "doc_id": "no"},
        {"id": 3, "question": "Capital of Peru?", "answers": ["Lima"], "doc_id": "pe"},
    ]
    asked, rows = with_passages(questions, documents, "oracle", top_k=2, passage_words=6)
    assert "Norway: Oslo is the capital." in asked[0]["question"]
    assert asked[0]["question"].endswith("\n\nQuestion: What is the capital of Norway?")
    # The best passages of the document, in its order.
    assert 0 < asked[1]["question"].index("Oslo") < asked[1]["question"].index("Fjords are deep")
    assert asked[2] == questions[2]
    assert [row["passages"] for row in rows] == [["no", "no"], ["no", "no"], []]
    assert [row["in_context"] for row in rows] == [1, 1, 0]
    assert rows[0]["question"] == questions[0]["question"]

    _, rows = with_passages([{**questions[0], "question": "The highest point?"}], documents, "bm25", top_k=1)
    assert (rows[0]["passages"], rows[0]["in_context"]) == (["np"], 0)


def test_without_passages_a_question_stays_as_it_is() -> None:
    assert open_book_prompt("Why?", []) == "Why?"
