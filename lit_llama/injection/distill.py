"""Context distillation: learn to answer without the document as the same model answers with it.

The base asks itself questions on the document and answers them with the document in the prompt; the student, which has
no document, learns the teacher's probabilities of the answers' tokens (Kujanpää et al. 2024, arXiv 2412.14964). Here:
the questions, their answers and those probabilities. The loss is the training loop's.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lit_llama.errors import InputError
from lit_llama.evaluation.questions import normalize_answer
from lit_llama.generation import evaluating
from lit_llama.injection.filters import Seen, bad_sentence, length, names_nothing, not_in_document
from lit_llama.injection.generator import beginning_that_fits, on_document, parts_of
from lit_llama.injection.interface import Document, Example, Need, Rejected, Resources, Stage, with_share
from lit_llama.injection.sentences import is_closed, paragraphs
from lit_llama.loss import chunk_sizes
from lit_llama.model import Llama
from lit_llama.prompts import Message, encode_example, with_system
from lit_llama.tokenizer import Tokenizer

DISTILLED = "distilled"
"""Group of the examples that are learned from the teacher's probabilities."""
_CHECKED_WHOLE = 5
"""Words up to which an answer must stand in the document as it is; in longer ones, names and numbers must."""


@dataclass
class Distill:
    """Self-asked questions, answered by the model that sees the document."""

    name: ClassVar[str] = "distill"
    needs: ClassVar[frozenset[Need]] = frozenset({"generator"})
    questions: int = 20
    """Asked on each document, about one of its sentences each, so that none is passed over."""
    question_prompt: str = "Write one question about this fact: {sentence}"
    """Asks for a question, "{sentence}"."""
    part_words: int = 400
    """Question and answer see a part of the document of whole sentences of about so many words."""
    longest_answer: int = 60
    """Words. An answer is cut before its first bad sentence, and dropped where that is the first."""
    share: float = 0.5
    """Share of the tokens, where other recipes come before."""

    def __post_init__(self) -> None:
        if self.questions < 1 or self.part_words < 1 or "{sentence}" not in self.question_prompt:
            raise InputError('distill needs questions and part_words of 1 or more, and "{sentence}" in question_prompt')
        if not 0 < self.share < 1:
            raise InputError(f"distill's share {self.share} must be between 0 and 1; alone, it is all there is")

    def expand(self, document: Document, resources: Resources, draw: random.Random) -> Iterator[Example | Rejected]:
        write, seen = resources.generator.write, Seen()
        sentences = [
            (part, sentence)
            for part in parts_of(document, self.part_words)
            for paragraph in paragraphs(part.text)
            for sentence in paragraph
        ]
        draw.shuffle(sentences)
        for number, (part, sentence) in enumerate(sentences[: self.questions]):
            prompt = self.question_prompt.replace("{sentence}", sentence)
            count = len(range(number, self.questions, len(sentences)))
            for text in write(part, "question", prompt, count, draw.getrandbits(32), 64):
                question = text.split("\n")[0].strip()
                if reason := self._bad_question(question, document) or seen.add(question):
                    yield Rejected(document.id, self.name, f"question: {reason}", question)
                    continue
                (whole,) = write(part, "answer", question, 1, 0, 3 * self.longest_answer)
                answer = self._good_beginning(whole, document)
                if reason := self._bad_answer(answer, question, document):
                    yield Rejected(document.id, self.name, f"answer: {reason}", f"{question}\n{whole}")
                    continue
                turns = ((question, 0), (answer, 1))
                yield Example(document.id, self.name, DISTILLED, turns, chat=True, teacher_context=part.text)

    def _bad_question(self, question: str, document: Document) -> str | None:
        if not question.endswith("?"):
            return "not a question"
        return (
            length(question, 3, 40)
            or names_nothing(question, document)
            or bad_sentence(question, self.question_prompt, document.text)
        )

    def _good_beginning(self, answer: str, document: Document) -> str:
        """The first sentence, whatever it is, and those behind it before one that is bad, cut off or too much."""
        kept, *others = [sentence for paragraph in paragraphs(answer) for sentence in paragraph] or [answer.strip()]
        for sentence in others:
            longer = f"{kept} {sentence}"
            if (
                bad_sentence(sentence, "", document.text)
                or not is_closed(sentence)
                or length(longer, 1, self.longest_answer)
            ):
                break
            kept = longer
        return kept

    def _bad_answer(self, answer: str, question: str, document: Document) -> str | None:
        if set(normalize_answer(answer).split()) <= set(normalize_answer(question).split()):
            return "says nothing that the question does not"
        if length(answer, _CHECKED_WHOLE + 1):
            return not_in_document(answer, document.text)
        return length(answer, 1, self.longest_answer) or bad_sentence(answer, "", document.text)

    def stages(self, plan: list[Stage]) -> list[Stage]:
        return with_share(plan, DISTILLED, self.share) if plan else [Stage({DISTILLED: 1.0})]


def conversation(example: Example, context: str | None = None) -> list[Message]:
    """The turns of a chat example; with a context, that stands before what the user says first."""
    texts = [text for text, _ in example.segments]
    if context is not None:
        texts[0] = on_document(context, texts[0])
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


class TeacherTargets(NamedTuple):
    """What a teacher holds likely in place of each learned token of an example, the likeliest first."""

    ids: Tensor
    """(learned tokens, k) int64."""
    probabilities: Tensor
    """(learned tokens, k) float32; they add up to 1 over the k."""


@torch.no_grad()
def teacher_targets(
    model: Llama,
    tokenizer: Tokenizer,
    style: str,
    examples: Sequence[Example],
    top_k: int,
    batch_size: int,
    system: str | None = None,
) -> list[TeacherTargets]:
    """The model's probabilities of the tokens that a student learns of each example, with its `teacher_context` read.

    The learned tokens are those of `encode_example` for the conversation without the context. Where the model's context
    is too short for both, the example's is cut.

    Args:
        model: the teacher, so without the adapter that is trained.
        style: prompt style of teacher and student, one of `prompts.STYLES`.
        examples: of questions and answers, with a teacher_context.
        top_k: likeliest tokens that are kept.
        batch_size: examples in a forward pass; those of like length go together.
        system: as in `prompts.with_system`, of both.

    Returns:
        On the CPU, in the order of the examples.

    Raises:
        InputError: the style gives student and teacher other tokens to learn, or an example exceeds the context.
    """
    encoded = [_teacher_ids(model, tokenizer, style, system, example) for example in examples]
    order = sorted(range(len(encoded)), key=lambda number: len(encoded[number][0]))
    targets: dict[int, TeacherTargets] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [encoded[number] for number in numbers]
            for number, found in zip(numbers, _batch_targets(model, rows, top_k), strict=True):
                targets[number] = found
    return [targets[number] for number in range(len(encoded))]


def _teacher_ids(
    model: Llama, tokenizer: Tokenizer, style: str, system: str | None, example: Example
) -> tuple[list[int], list[int]]:
    """Ids of the teacher's conversation, and the places in it of the tokens that the student learns."""

    def encoded(context: str | None) -> tuple[list[int], list[int]]:
        return encode_example(tokenizer, style, with_system(tokenizer, style, conversation(example, context), system))

    room = model.config.max_position_embeddings
    context = beginning_that_fits(example.teacher_context, room, lambda text: encoded(text)[0])
    if context is None:
        raise InputError(
            f"a question on {example.doc_id} exceeds the context of {room} tokens with its answer alone:"
            f" {example.segments[0][0][:60]!r}"
        )
    ids, mask = encoded(context)
    student_ids, student_mask = encoded(None)
    places = [place for place, learned in enumerate(mask) if learned]
    learned = [token_id for token_id, is_learned in zip(student_ids, student_mask, strict=True) if is_learned]
    if [ids[place] for place in places] != learned:
        raise InputError(
            f"prompt style {style} gives an answer on {example.doc_id} other tokens where a document stands before the"
            " question, so that it cannot be distilled; use another style"
        )
    return ids, places


def _batch_targets(model: Llama, rows: list[tuple[list[int], list[int]]], top_k: int) -> list[TeacherTargets]:
    device = model.model.norm.weight.device
    width = max(len(ids) for ids, _ in rows)
    hidden = model.model(torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows], device=device))
    # A token is predicted at the place before it. What pads a row stands behind all that attends.
    hidden = torch.cat([hidden[row, [place - 1 for place in places]] for row, (_, places) in enumerate(rows)])
    size, _ = chunk_sizes(device.type, model.config.vocab_size)
    likeliest = []
    for chunk in hidden.split(size):
        values, ids = model.lm_head(chunk).float().topk(min(top_k, model.config.vocab_size), dim=-1)
        likeliest.append((ids.cpu(), torch.softmax(values, dim=-1).cpu()))
    lengths = [len(places) for _, places in rows]
    ids, probabilities = (torch.cat(tensors).split(lengths) for tensors in zip(*likeliest, strict=True))
    return [TeacherTargets(*pair) for pair in zip(ids, probabilities, strict=True)]
