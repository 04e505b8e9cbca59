"""Asking a model questions without showing it the documents, and scoring what it says.

Closed-book: greedy answers, scored as SQuAD scores them (Rajpurkar et al. 2016, arXiv 1606.05250), plus whether a gold
answer occurs in a longer one. Multiple choice: the choice that the model holds most likely. Producing the answers is
`generation`'s; comparing two models is `scripts/compare_evaluations.py`'s.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.errors import InputError
from lit_llama.files import read_jsonl
from lit_llama.generation import answer_questions
from lit_llama.model import KVCache, Llama
from lit_llama.prompts import encode_prompt
from lit_llama.tokenizer import Tokenizer

METRICS = ("exact_match", "f1", "contains")
LIKELIHOODS = ("log_likelihood", "per_token", "per_byte")
"""How a choice's log-likelihood is weighed: as it is, divided by its tokens, divided by its UTF-8 bytes."""

_Z_95 = 1.959963984540054  # the 97.5 % point of the normal distribution


def read_questions(path: Path | str, need_answers: bool = True) -> list[dict[str, Any]]:
    """Rows of a question file: JSONL of {"id", "question", "answers", "choices"?, "field"?, "split"?, ...}.

    A row without "id" gets one by its number. Without `need_answers` a row may lack "answers": it is asked, not scored.

    Raises:
        InputError: no question at all, a row without question or answers, an id twice, or choices that hold none of
            the answers; names the file and the question's number.
    """
    rows = read_jsonl(path)
    seen: set[str | int] = set()
    for number, row in enumerate(rows, start=1):
        problem = None
        if not isinstance(row.get("question"), str) or not row["question"].strip():
            problem = '"question" must be a text'
        elif not _is_text_list(row.get("answers")) and (need_answers or "answers" in row):
            problem = '"answers" must be a list of one text or more'
        elif row.get("choices") is not None and not (_is_text_list(row["choices"]) and len(row["choices"]) > 1):
            problem = '"choices" must be a list of two texts or more'
        elif row.get("choices") and not _right_choices(row):
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


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, no ASCII punctuation, no articles (a, an, the), single spaces."""
    text = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score_answer(answer: str, golds: Sequence[str]) -> dict[str, float]:
    """Compare an answer with the accepted ones; the best counts.

    Returns:
        {"exact_match": 0 or 1, "f1": harmonic mean of precision and recall of words, "contains": 1 where the words of
        a gold answer occur in the answer one after the other}, all after `normalize_answer`.
    """
    words = normalize_answer(answer).split()
    scores = [_score_words(words, normalize_answer(gold).split()) for gold in golds]
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
) -> dict[str, Any]:
    """Ask every question and score the greedy answers.

    Args:
        questions: rows as `read_questions` gives them.
        style: prompt style, one of `prompts.STYLES`.
        progress: called with (answered, in all) after every batch.

    Returns:
        {"count", "exact_match", "f1", "contains", "interval": {"exact_match": (low, high), "contains": (low, high)},
        "by_field", "by_split": the same of each group of rows that state one, "rows": [{"id", "question", "answers",
        "answer", "exact_match", "f1", "contains", "field"?, "split"?, "doc_id"?}]}.
    """
    rows = []
    for start in range(0, len(questions), batch_size):
        asked = questions[start : start + batch_size]
        texts = [question["question"] for question in asked]
        answers = answer_questions(model, tokenizer, texts, style, max_new_tokens, batch_size)
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
) -> dict[str, Any]:
    """Let the model choose: the choice of the highest log-likelihood behind the question's prompt.

    Args:
        questions: rows with "choices".
        progress: called with (questions done, in all) after every batch.

    Returns:
        Like `evaluate_answers`, with accuracies by `LIKELIHOODS` in place of the metrics; a row holds "choices",
        "right" (their indices), "scores" {likelihood: one a choice} and, under each likelihood's name, whether its
        choice is right.
    """
    rows = []
    for start in range(0, len(questions), batch_size):
        asked = questions[start : start + batch_size]
        likelihoods = choice_log_likelihoods(model, tokenizer, asked, style)
        for question, choices in zip(asked, likelihoods, strict=True):
            right = _right_choices(question)
            scores: dict[str, list[float]] = {
                "log_likelihood": [total for total, _ in choices],
                "per_token": [total / tokens for total, tokens in choices],
                "per_byte": [
                    total / len(text.encode()) for (total, _), text in zip(choices, question["choices"], strict=True)
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


@torch.no_grad()
def choice_log_likelihoods(
    model: Llama, tokenizer: Tokenizer, questions: Sequence[dict[str, Any]], style: str
) -> list[list[tuple[float, int]]]:
    """Of each question's choices: (summed log-likelihood in nats behind the prompt, tokens).

    The prompts are run once, padded on the left; every choice then goes on from their cache, which is wound back.
    """
    prompts = [encode_prompt(tokenizer, style, question["question"]) for question in questions]
    choices = [[encode_choice(tokenizer, style, text) for text in question["choices"]] for question in questions]
    device, dtype = model.model.norm.weight.device, model.model.norm.weight.dtype
    width = max(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    longest = max(len(ids) for of_question in choices for ids in of_question)
    cache = KVCache(model.config, len(prompts), width + longest, dtype, device, padding)
    prompt_ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    last_hidden = model.model(prompt_ids, cache=cache)[:, -1:]

    results: list[list[tuple[float, int]]] = [[] for _ in questions]
    for number in range(max(map(len, choices))):
        rows = [of_question[number] if number < len(of_question) else [] for of_question in choices]
        length = max(map(len, rows))
        targets = torch.tensor([ids + [0] * (length - len(ids)) for ids in rows], device=device)
        hidden = last_hidden
        if length > 1:
            hidden = torch.cat((last_hidden, model.model(targets[:, :-1], cache=cache)), dim=1)
            cache.length = width
        likelihoods = _log_likelihoods(model, hidden, targets)  # (questions, length)
        for result, ids, row in zip(results, rows, likelihoods, strict=True):
            if ids:
                result.append((row[: len(ids)].double().sum().item(), len(ids)))
    return results


def encode_choice(tokenizer: Tokenizer, style: str, text: str) -> list[int]:
    """Ids of an answer as they follow a prompt of the style: see the assistant's turns in `prompts`."""
    spaced = style in ("plain", "llama2", "mistral")
    return tokenizer.encode(f" {text}" if spaced else text, continuation=style != "mistral-v3")


def _log_likelihoods(model: Llama, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = model.lm_head(hidden).float()  # (questions, length, vocab)
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]


def _right_choices(question: dict[str, Any]) -> list[int]:
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
