"""What a model knows of documents it does not see: questions answered, chosen and scored, sorted by what was trained.

Rows of question files state the split of their document ("taught", "injected", "validation", "never", "known"), the
form of the question ("direct", "reversed", "two_hop") and whether its wording is one that training used ("trained",
"unseen"); each combination is a cell of the result. Recall of the documents and divergence from the base are
`recall`'s, passages in the prompt `retrieval`'s, and what a difference between two models is worth, `statistics`'s.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lit_llama.errors import InputError
from lit_llama.evaluation.likelihood import Likelihood, continuation_likelihoods
from lit_llama.evaluation.questions import (
    encode_choice,
    normalize_answer,
    right_choices,
    score_answer,
    wilson_interval,
)
from lit_llama.generation import encode_question, evaluating, stream_text
from lit_llama.model import Llama
from lit_llama.prompts import stop_strings
from lit_llama.tokenizer import Tokenizer

MEASURES = ("exact_match", "f1", "contains")
CHOICES = ("log_likelihood", "per_token", "pmi")
"""How a choice's log-likelihood is weighed: as it is, divided by its tokens, or less that of the choice behind a prompt
without a question (pointwise mutual information; Holtzman et al. 2021, arXiv 2104.08315)."""
NEUTRAL_QUESTION = "Answer:"
SPARE_TOKENS = 8
"""Of an answer beyond the longest right one."""

Progress = Callable[[int, int], None]


def check_knowledge_questions(questions: Iterable[dict[str, Any]], place: object) -> None:
    """Raise InputError where a row lacks what sorts it, or a document is of two splits; names the row.

    Args:
        place: the file, for messages.
    """
    splits: dict[str, str] = {}
    for question in questions:
        for key in ("split", "form", "phrasing", "relation"):
            if not isinstance(question.get(key), str):
                raise InputError(
                    f'{place}, question {question["id"]!r}: no "{key}"; scripts/prepare_questions.py writes it, and'
                    " scripts/evaluate.py asks questions without"
                )
        document = question.get("doc_id", question["id"])
        if splits.setdefault(document, question["split"]) != question["split"]:
            raise InputError(
                f"{place}, question {question['id']!r}: document {document!r} is of the splits {splits[document]!r} and"
                f" {question['split']!r}; splits are by document"
            )


def answer_limits(tokenizer: Tokenizer, style: str, questions: Sequence[dict[str, Any]]) -> list[int]:
    """Tokens that the answer of each question may have: `SPARE_TOKENS` more than the longest right answer to a question
    of the same relation and form, so that neither what is right here nor where it is long can be told from it."""
    lengths = {gold: len(encode_choice(tokenizer, style, gold)) for row in questions for gold in row["answers"]}
    longest: dict[tuple[str, str], int] = defaultdict(int)
    for row in questions:
        kind = row["relation"], row["form"]
        longest[kind] = max(longest[kind], *(lengths[gold] for gold in row["answers"]))
    return [longest[row["relation"], row["form"]] + SPARE_TOKENS for row in questions]


def answer_briefly(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    limits: Sequence[int],
    style: str,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[str]:
    """Greedy answers of one line, in the order of the prompts.

    Args:
        prompts: ids of each, with what opens the answer.
        limits: most tokens of each answer.
        batch_size: prompts answered at a time; those of one limit and like length go together.
        progress: called with (answered, in all) after every batch.
    """
    answers: dict[int, str] = {}
    for batch in _batches(prompts, limits, batch_size):
        said = _answer_batch(model, tokenizer, [prompts[number] for number in batch], limits[batch[0]], style)
        answers |= zip(batch, said, strict=True)
        if progress is not None:
            progress(len(answers), len(prompts))
    return [answers[number] for number in range(len(prompts))]


def _answer_batch(
    model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, style: str
) -> list[str]:
    answers = [""] * len(prompts)
    with evaluating(model):
        for row, text in stream_text(model, tokenizer, prompts, max_new_tokens, stop=[*stop_strings(style), "\n"]):
            answers[row] += text
    return [answer.strip() for answer in answers]


def evaluate_knowledge(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[dict[str, Any]],
    prompts: Sequence[list[int]],
    style: str,
    system: str | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Ask every question, score its answer, and let the model choose where there are choices.

    Args:
        questions: rows of a question file, checked by `check_knowledge_questions`.
        prompts: ids of each question as it is put to the model, with or without passages to read.
        style: prompt style, one of `prompts.STYLES`.
        system: system message, for the prompt that has no question.
        batch_size: questions at a time.
        progress: called with (answered, in all) after every batch.

    Returns:
        The rows with "answer", each of `MEASURES`, "max_probability" (of the likeliest token) and "entropy" (nats) of
        the next-token distributions that the answer was said from, averaged over its tokens, and "choice" {each of
        `CHOICES`: whether its choice is right}.
    """
    limits = answer_limits(tokenizer, style, questions)
    unprompted = _unprompted_likelihoods(model, tokenizer, questions, style, system, batch_size)
    rows: dict[int, dict[str, Any]] = {}
    for batch in _batches(prompts, limits, batch_size):
        ids, asked = [prompts[number] for number in batch], [questions[number] for number in batch]
        answers = _answer_batch(model, tokenizer, ids, limits[batch[0]], style)
        # Each answer is scored behind the same run of its prompt as the choices. Of an empty one, what counts is the
        # distribution that its end was drawn from, whichever token one scores there.
        texts = [[answer, *(question.get("choices") or ())] for answer, question in zip(answers, asked, strict=True)]
        endings = [[encode_choice(tokenizer, style, text) if text else [0] for text in row] for row in texts]
        with evaluating(model):
            likelihoods = continuation_likelihoods(model, ids, endings)
        for number, question, answer, (said, *choices) in zip(batch, asked, answers, likelihoods, strict=True):
            scores = score_answer(answer, question["answers"])
            rows[number] = {
                **question,
                "answer": answer,
                **{measure: scores[measure] for measure in MEASURES},
                "max_probability": said.max_probability,
                "entropy": said.entropy,
            }
            if choices:
                rows[number]["choice"] = _chosen(question, choices, unprompted)
        if progress is not None:
            progress(len(rows), len(questions))
    return [rows[number] for number in range(len(questions))]


def _batches(prompts: Sequence[list[int]], limits: Sequence[int], batch_size: int) -> list[list[int]]:
    """Numbers of prompts that go together: of one limit, and of like length."""
    groups: dict[int, list[int]] = defaultdict(list)
    for number in sorted(range(len(prompts)), key=lambda number: len(prompts[number])):
        groups[limits[number]].append(number)
    return [
        numbers[start : start + batch_size]
        for _, numbers in sorted(groups.items())
        for start in range(0, len(numbers), batch_size)
    ]


def _unprompted_likelihoods(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[dict[str, Any]],
    style: str,
    system: str | None,
    batch_size: int,
) -> dict[str, float]:
    """Log-likelihood of every choice there is behind `NEUTRAL_QUESTION`."""
    neutral = encode_question(tokenizer, style, NEUTRAL_QUESTION, system)
    endings = {text: encode_choice(tokenizer, style, text) for row in questions for text in row.get("choices") or ()}
    texts = sorted(endings, key=lambda text: len(endings[text]))
    found: dict[str, float] = {}
    with evaluating(model):
        for start in range(0, len(texts), batch_size):
            batch = texts[start : start + batch_size]
            likelihoods = continuation_likelihoods(model, [neutral] * len(batch), [[endings[text]] for text in batch])
            found |= {text: one.log_likelihood for text, (one,) in zip(batch, likelihoods, strict=True)}
    return found


def _chosen(question: dict[str, Any], likelihoods: list[Likelihood], unprompted: dict[str, float]) -> dict[str, float]:
    scores = {
        "log_likelihood": [choice.log_likelihood for choice in likelihoods],
        "per_token": [choice.log_likelihood / choice.tokens for choice in likelihoods],
        "pmi": [
            choice.log_likelihood - unprompted[text]
            for choice, text in zip(likelihoods, question["choices"], strict=True)
        ],
    }
    right = right_choices(question)
    return {name: float(max(range(len(of)), key=of.__getitem__) in right) for name, of in scores.items()}


def cells(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Means by split and "form/phrasing".

    Returns:
        {split: {"form/phrasing": {"count", "entities", each of `MEASURES`, "interval": {"exact_match" and "contains":
        Wilson's (low, high) as if each entity were one observation, since its questions are not independent},
        "max_probability", "entropy", "choice"?: {each of `CHOICES`}, "in_context"?: share of questions with a right
        answer in the passages they were asked with, and, where facts are asked in several wordings, "worst_wording":
        {measure: mean over facts of its lowest score} and "paraphrase_gap": {measure: mean over facts of its mean score
        less the lowest}}}}.
    """
    groups: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["split"]][f"{row['form']}/{row['phrasing']}"].append(row)
    return {
        split: {name: _cell(group) for name, group in sorted(of_split.items())}
        for split, of_split in sorted(groups.items())
    }


def _cell(rows: list[dict[str, Any]]) -> dict[str, Any]:
    entities = len({row.get("doc_id", row["id"]) for row in rows})
    cell: dict[str, Any] = {"count": len(rows), "entities": entities}
    cell |= {name: _mean(row[name] for row in rows) for name in (*MEASURES, "max_probability", "entropy")}
    cell["interval"] = {name: wilson_interval(cell[name] * entities, entities) for name in ("exact_match", "contains")}
    with_choices = [row["choice"] for row in rows if "choice" in row]
    if with_choices:
        cell["choice"] = {name: _mean(row[name] for row in with_choices) for name in CHOICES}
    if any("in_context" in row for row in rows):
        cell["in_context"] = _mean(row["in_context"] for row in rows if "in_context" in row)
    facts: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        facts[row.get("fact_id", row["id"])].append(row)
    if len(facts) < len(rows):
        scores = {name: [[row[name] for row in wordings] for wordings in facts.values()] for name in MEASURES}
        cell["worst_wording"] = {name: _mean(map(min, of_facts)) for name, of_facts in scores.items()}
        cell["paraphrase_gap"] = {
            name: _mean(_mean(fact) - min(fact) for fact in of_facts) for name, of_facts in scores.items()
        }
    return cell


def answer_entropy(rows: Iterable[dict[str, Any]], answer: Callable[[dict[str, Any]], str]) -> dict[str, float]:
    """How varied the answers within a relation are, in bits, by split: 0 where all questions get the same one.

    The entropy of the normalised answers to each relation's questions of one form, averaged over questions. Compare it
    with that of the right answers: less is mode collapse.

    Args:
        answer: of a row: what was said, or what would have been right.
    """
    groups: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row["split"]][row["relation"], row["form"]].append(normalize_answer(answer(row)))
    result = {}
    for split, relations in sorted(groups.items()):
        shares = [(times / len(said), times) for said in relations.values() for times in Counter(said).values()]
        result[split] = sum(-math.log2(share) * times for share, times in shares) / sum(map(len, relations.values()))
    return result


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)
