"""Asking a model questions without showing it the documents, and scoring what it says.

Closed-book: greedy answers, scored as SQuAD scores them (Rajpurkar et al. 2016, arXiv 1606.05250), plus whether a gold
answer occurs in a longer one, and ROUGE-L for answers of many words (Lin 2004, aclanthology.org/W04-1013). Multiple
choice: the choice that the model holds most likely. Producing the answers is `generation`'s; comparing two models is
`scripts/compare_evaluations.py`'s.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_llama.errors import InputError
from lit_llama.evaluation.likelihood import continuation_likelihoods
from lit_llama.files import read_jsonl
from lit_llama.generation import answer_questions, encode_question
from lit_llama.model import Llama
from lit_llama.prompts import Message
from lit_llama.tokenizer import Tokenizer

METRICS = ("exact_match", "f1", "contains", "rouge_l")
LIKELIHOODS = ("log_likelihood", "per_token", "per_byte")
"""How a choice's log-likelihood is weighed: as it is, divided by its tokens, divided by its UTF-8 bytes."""

_Z_95 = 1.959963984540054  # the 97.5 % point of the normal distribution


def read_questions(path: Path | str, need_answers: bool = True) -> list[dict[str, Any]]:
    """Rows of a question file: JSONL of {"id", "question", "answers", "messages"?, "choices"?, "field"?, "split"?}.

    A row without "id" gets one by its number. Without `need_answers` a row may lack "answers": it is asked, not scored.
    "messages" is the conversation up to the answer, where that is more than the question: `prompt_of` asks it instead.

    Raises:
        InputError: no question at all, a row without question or answers, an id twice, messages that do not end with
            the user's, or choices that hold none of the answers; names the file and the question's number.
    """
    rows = read_jsonl(path)
    seen: set[str | int] = set()
    for number, row in enumerate(rows, start=1):
        problem = None
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            problem = '"question" must be a text'
        elif not _is_text_list(row.get("answers")) and (need_answers or "answers" in row):
            problem = '"answers" must be a list of one text or more'
        elif "messages" in row and not _is_conversation(row["messages"]):
            problem = '"messages" must be a list of {"role", "content"}, roles system, user, assistant, the user last'
        elif row.get("choices") is not None and not (_is_text_list(row["choices"]) and len(row["choices"]) > 1):
            problem = '"choices" must be a list of two texts or more'
        elif row.get("choices") and not right_choices(row):
            problem = f"none of the choices is among the answers {row['answers']}"
        elif not isinstance(row.setdefault("id", f"question-{number}"), str | int):
            problem = '"id" must be a text or a number'
        elif row["id"] in seen:
            problem = f"the id {row['id']!r} is taken by an earlier one"
        if problem:
            raise InputError(f"{path}, question {number}: {problem}")
        seen.add(row["id"])
    if not rows:
        raise InputError(f"{path} holds no question")
    return rows


def spread(rows: Sequence[Any], most: int | None) -> list[Any]:
    """At most so many rows, taken evenly from all over."""
    count = min(len(rows), most or len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def _is_conversation(value: Any) -> bool:
    roles = ("system", "user", "assistant")
    return (
        isinstance(value, list)
        and all(isinstance(turn, dict) and turn.get("role") in roles for turn in value)
        and all(isinstance(text, str) for turn in value for text in (turn.get("content"), turn.get("input", "")))
        and [turn["role"] for turn in value[-1:]] == ["user"]
    )


def prompt_of(question: dict[str, Any]) -> str | list[Message]:
    """What to ask for a row of a question file: its conversation where it holds one, else its question."""
    return question.get("messages", question["question"])


def encode_questions(
    tokenizer: Tokenizer, questions: Sequence[dict[str, Any]], style: str, system: str | None = None
) -> list[list[int]]:
    """Ids of each row's question, or conversation, and of what opens the answer.

    Args:
        style: prompt style, one of `prompts.STYLES`.
        system: system message of those whose conversation has none.

    Raises:
        InputError: a conversation that the style has no form for; names the question's id.
    """
    prompts = []
    for question in questions:
        try:
            prompts.append(encode_question(tokenizer, style, prompt_of(question), system))
        except InputError as error:
            raise InputError(f"question {question['id']!r}: {error}") from None
    return prompts


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles (a, an, the), single spaces."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_answer(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """Compare an answer with the accepted ones; the best counts.

    Returns:
        {"exact_match": 0 or 1, "f1": harmonic mean of precision and recall of words, "contains": 1 where the words of
        a gold answer occur in the answer one after the other}, all after `normalize_answer`, and {"rouge_l": see
        `_rouge_l`}.
    """
    words, tokens = normalize_answer(answer).split(), _rouge_tokens(answer)
    scores = [
        {**_score_words(words, normalize_answer(gold).split()), "rouge_l": _rouge_l(tokens, _rouge_tokens(gold))}
        for gold in golds
    ]
    return {metric: max(score[metric] for score in scores) for metric in METRICS}


def _score_words(answer: list[str], gold: list[str]) -> dict[str, float]:
    common = sum((Counter(answer) & Counter(gold)).values())
    # Where nothing is left of one side after normalisation, equality is all there is to compare (SQuAD 2.0).
    f1 = 2 * common / (len(answer) + len(gold)) if answer and gold else float(answer == gold)
    places = range(len(answer) - len(gold) + 1) if gold else ()
    return {
        "exact_match": float(answer == gold),
        "f1": f1,
        "contains": float(any(answer[i : i + len(gold)] == gold for i in places)),
    }


def _rouge_l(answer: Sequence[str], gold: Sequence[str]) -> float:
    """ROUGE-L of two texts as tokens: F1 of precision and recall of their longest common subsequence (Lin 2004).

    Its length comes from bit operations on integers as wide as the gold text is long, a handful for each token of the
    answer (Hyyrö 2004, "Bit-parallel LCS-length computation revisited").
    """
    if not answer or not gold:
        return 0.0
    places: dict[str, int] = {}
    for place, token in enumerate(gold):
        places[token] = places.get(token, 0) | 1 << place
    everywhere = unmatched = (1 << len(gold)) - 1
    for token in answer:
        matched = unmatched & places.get(token, 0)
        unmatched = (unmatched + matched | unmatched - matched) & everywhere
    return 2 * (len(gold) - unmatched.bit_count()) / (len(answer) + len(gold))


def _rouge_tokens(text: str) -> list[str]:
    """Tokens as Google's rouge_score makes them without stemming: runs of lower-case ASCII letters and digits."""
    return re.findall(r"[a-z0-9]+", text.lower())


def wilson_interval(successes: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927), sensible at 0 and 1 and for few observations."""
    share = successes / count
    spread = _Z_95 * math.sqrt(share * (1 - share) / count + _Z_95**2 / (4 * count**2))
    scale = 1 + _Z_95**2 / count
    middle = share + _Z_95**2 / (2 * count)
    # At the ends one bound is 0 or 1 exactly, which rounding would miss.
    low = (middle - spread) / scale if successes else 0.0
    high = (middle + spread) / scale if successes < count else 1.0
    return low, high


def evaluate_answers(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[dict[str, Any]],
    style: str,
    max_new_tokens: int = 32,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Ask every question and score the greedy answers.

    Args:
        questions: rows as `read_questions` gives them.
        style: prompt style, one of `prompts.STYLES`.
        progress: called with (answered, in all) after every batch.
        system: system message of questions whose conversation has none.

    Returns:
        {"count", each of `METRICS`, "interval": {"exact_match": (low, high), "contains": (low, high)}, "by_field",
        "by_split": the same of each group of rows that state one, "rows": [{"id", "question", "answers", "answer", each
        of `METRICS`, "field"?, "split"?, "doc_id"?}]}.
    """
    rows = []
    for start in range(0, len(questions), batch_size):
        asked = questions[start : start + batch_size]
        prompts = [prompt_of(question) for question in asked]
        answers = answer_questions(model, tokenizer, prompts, style, max_new_tokens, batch_size, system)
        for question, answer in zip(asked, answers, strict=True):
            scores = score_answer(answer, question["answers"])
            rows.append({**_kept(question), "answers": question["answers"], "answer": answer, **scores})
        if progress is not None:
            progress(len(rows), len(questions))
    return _with_groups(rows, METRICS, ("exact_match", "contains"))


def evaluate_choices(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[dict[str, Any]],
    style: str,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Let the model choose: the choice of the highest log-likelihood behind the question's prompt.

    Args:
        questions: rows with "choices".
        progress: called with (questions done, in all) after every batch.
        system: system message of questions whose conversation has none.

    Returns:
        Like `evaluate_answers`, with accuracies by `LIKELIHOODS` in place of the metrics; a row holds "choices",
        "right" (their indices), "scores" {likelihood: one a choice} and, under each likelihood's name, whether its
        choice is right.
    """
    rows = []
    for start in range(0, len(questions), batch_size):
        asked = questions[start : start + batch_size]
        prompts = encode_questions(tokenizer, asked, style, system)
        endings = [[encode_choice(tokenizer, style, text) for text in question["choices"]] for question in asked]
        likelihoods = continuation_likelihoods(model, prompts, endings)
        for question, choices in zip(asked, likelihoods, strict=True):
            right = right_choices(question)
            scores: dict[str, list[float]] = {
                "log_likelihood": [choice.log_likelihood for choice in choices],
                "per_token": [choice.log_likelihood / choice.tokens for choice in choices],
                "per_byte": [
                    choice.log_likelihood / len(text.encode())
                    for choice, text in zip(choices, question["choices"], strict=True)
                ],
            }
            chosen = {name: max(range(len(values)), key=values.__getitem__) for name, values in scores.items()}
            correct = {name: float(index in right) for name, index in chosen.items()}
            rows.append(
                {**_kept(question), "choices": question["choices"], "right": right, "scores": scores, **correct}
            )
        if progress is not None:
            progress(len(rows), len(questions))
    return _with_groups(rows, LIKELIHOODS, LIKELIHOODS)


def encode_choice(tokenizer: Tokenizer, style: str, text: str) -> list[int]:
    """Ids of an answer as they follow a prompt of the style: see the assistant's turns in `prompts`."""
    spaced = style in ("plain", "llama2", "mistral")
    return tokenizer.encode(f" {text}" if spaced else text, continuation=style != "mistral-v3")


def right_choices(question: dict[str, Any]) -> list[int]:
    """Indices of the choices that are right answers."""
    golds = {answer.strip() for answer in question["answers"]}
    return [index for index, text in enumerate(question["choices"]) if text.strip() in golds]


def _kept(question: dict[str, Any]) -> dict[str, Any]:
    return {name: question[name] for name in ("id", "question", "field", "split", "doc_id") if name in question}


def _with_groups(rows: list[dict[str, Any]], metrics: Sequence[str], proportions: Sequence[str]) -> dict[str, Any]:
    result = _summary(rows, metrics, proportions)
    for key in ("field", "split"):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if key in row:
                groups.setdefault(str(row[key]), []).append(row)
        result[f"by_{key}"] = {name: _summary(group, metrics, proportions) for name, group in sorted(groups.items())}
    result["rows"] = rows
    return result


def _summary(rows: list[dict[str, Any]], metrics: Sequence[str], proportions: Sequence[str]) -> dict[str, Any]:
    totals = {metric: sum(row[metric] for row in rows) for metric in metrics}
    return {
        "count": len(rows),
        **{metric: total / len(rows) for metric, total in totals.items()},
        "interval": {metric: wilson_interval(totals[metric], len(rows)) for metric in proportions},
    }
