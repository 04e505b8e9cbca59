"""A language model as a `Generator`: the student's own base, or a larger local one.

Here is what stands around a task: the document before it and, for a model that was never taught to follow instructions,
a worked example. What is asked for is each recipe's, whether an answer is good `filters`'s, sampling `generation`'s.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from lit_llama.checkpoint import existing_directory, fingerprint, load_model
from lit_llama.command_line import progress
from lit_llama.config import Quantization
from lit_llama.errors import InputError
from lit_llama.generation import SamplingConfig, stream_text
from lit_llama.hardware import pick_dtype
from lit_llama.injection.interface import Document
from lit_llama.injection.sentences import paragraphs
from lit_llama.lora import load_adapter
from lit_llama.model import Llama
from lit_llama.packed_linear import pack_linear_layers
from lit_llama.prompts import STYLES, detect_style, encode_prompt, stop_strings
from lit_llama.tokenizer import Tokenizer

GREEDY_TASKS = ("question", "answer", "closure")
"""Tasks of which a single answer shall be the likeliest: there variety is error."""


@dataclass
class GeneratorConfig:
    """Which model writes, and how."""

    checkpoint_dir: Path | None = None
    """A larger local model; by default the base that is trained, without any adapter."""
    adapter_dir: Path | None = None
    """An adapter of that model."""
    quantize: Quantization | None = None
    """Store its weights in 4 or 8 bits."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision; auto: bf16 where the machine computes with it, else fp32."""
    style: str | None = None
    """Prompt style; by default what its chat template is. With "plain", that of models without one, each task comes
    behind a worked example."""
    temperature: float = 0.8
    """Of the sampling. SEAL takes 1.0 with 7B (Zweiger et al. 2025, arXiv 2506.10943), at which small models ramble."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together reach this probability."""
    batch_size: int = 8
    """Answers to a prompt that are written at a time."""

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise InputError(f"generator.temperature {self.temperature} must be positive: answers shall differ")
        if self.batch_size < 1:
            raise InputError(f"generator.batch_size {self.batch_size} must be at least 1")
        if self.style is not None and self.style not in STYLES:
            raise InputError(f"generator.style {self.style!r} is not one of {', '.join(STYLES)}")
        SamplingConfig(temperature=self.temperature, top_p=self.top_p)


def load_generator(config: GeneratorConfig, base_checkpoint_dir: Path, device: torch.device) -> "ModelGenerator":
    """The generator of a configuration; its weights are read when it first writes, so never where all is cached.

    Args:
        base_checkpoint_dir: the model that is trained.

    Raises:
        InputError: no such checkpoint or adapter; that the adapter fits shows when the weights are read.
    """
    return ModelGenerator(replace(config, checkpoint_dir=config.checkpoint_dir or base_checkpoint_dir), device)


class ModelGenerator:
    """A `Generator` over a Llama; see `load_generator`.

    Attributes:
        identity: of weights, tokenizer, adapter and every setting that changes what is written.
        tokenizer, style, model: of the checkpoint.
    """

    def __init__(self, config: GeneratorConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        directory = existing_directory(config.checkpoint_dir)
        self.tokenizer = Tokenizer.from_checkpoint(directory)
        self.style = config.style or detect_style(directory)
        self._dtype = pick_dtype(config.dtype, device)
        self._cut_was_said = False
        settings = [config.quantize, str(self._dtype), self.style, config.temperature, config.top_p, config.batch_size]
        parts = [fingerprint(directory), self.tokenizer.sha256, settings, _PASSAGE, WORKED_EXAMPLES]
        digest = hashlib.sha256(json.dumps(parts).encode())
        if config.adapter_dir is not None:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                path = config.adapter_dir / name
                if not path.is_file():
                    raise InputError(f"{path}: no such file")
                digest.update(path.read_bytes())
        self.identity = digest.hexdigest()

    @cached_property
    def model(self) -> Llama:
        """Read when first asked for."""
        config = self._config
        model = load_model(config.checkpoint_dir, self._dtype, self._device, config.quantize)
        if config.adapter_dir is not None:
            load_adapter(model, config.adapter_dir)
        model.eval()
        pack_linear_layers(model)
        return model

    def write(
        self, document: Document, task: str, prompt: str, count: int, seed: int, max_new_tokens: int
    ) -> list[str]:
        """`count` answers to a prompt on the document, which is put before it, cut to what the context leaves.

        Half of the context at most is for the answer. Other arguments as in `Generator`.
        """
        texts = []
        for start in range(0, count, self._config.batch_size):
            samples = min(self._config.batch_size, count - start)
            texts += self._answers([(document, prompt)], task, samples, seed + start, max_new_tokens)
        return texts

    def write_each(self, pairs: Sequence[tuple[Document, str]], task: str, seed: int, max_new_tokens: int) -> list[str]:
        """One answer to each prompt on its document, `batch_size` of them at a time."""
        texts = []
        for start in range(0, len(pairs), self._config.batch_size):
            batch = pairs[start : start + self._config.batch_size]
            texts += self._answers(batch, task, 1, seed + start, max_new_tokens)
        return texts

    def _answers(
        self, pairs: Sequence[tuple[Document, str]], task: str, samples: int, seed: int, max_new_tokens: int
    ) -> list[str]:
        """So many samples for each pair, those of one together."""
        max_new_tokens = min(max_new_tokens, self.model.config.max_position_embeddings // 2)
        prompts = [self._encode(document, task, prompt, max_new_tokens) for document, prompt in pairs]
        stop = [_NEXT] if self.style == "plain" else stop_strings(self.style)
        temperature = 0.0 if samples == 1 and task in GREEDY_TASKS else self._config.temperature
        sampling = SamplingConfig(temperature=temperature, top_p=self._config.top_p, num_samples=samples, seed=seed)
        answers = [""] * (len(pairs) * samples)
        for row, text in stream_text(self.model, self.tokenizer, prompts, max_new_tokens, sampling, stop):
            answers[row] += text
        return [answer.strip() for answer in answers]

    def _encode(self, document: Document, task: str, prompt: str, max_new_tokens: int) -> list[int]:
        context = self.model.config.max_position_embeddings

        def encode(text: str) -> list[int]:
            asked = with_worked_example(text, task, prompt) if self.style == "plain" else on_document(text, prompt)
            return encode_prompt(self.tokenizer, self.style, asked)

        text = beginning_that_fits(document.text, context - max_new_tokens, encode)
        if text is None:
            raise InputError(
                f"the generator's context of {context} tokens is too short for the task {task!r} alone; use another"
                " model"
            )
        if text != document.text and not self._cut_was_said:
            self._cut_was_said = True
            progress(
                f"the document {document.id} is longer than the generator's context leaves room for; of this one and"
                " such others it reads only the beginning"
            )
        return encode(text)


def parts_of(document: Document, words: int) -> list[Document]:
    """The document in parts of whole sentences, none of many more words than asked for; small models do better on
    little text, and a long document would not fit their context."""
    if len(document.text.split()) <= 1.25 * words:  # no crumb for a last part
        return [document]
    parts: list[list[str]] = [[]]
    for paragraph in paragraphs(document.text):
        for number, sentence in enumerate(paragraph):
            if parts[-1] and len(" ".join([*parts[-1], sentence]).split()) > words:
                parts.append([])
            parts[-1].append(("\n\n" if number == 0 else " ") + sentence)
    return [replace(document, text="".join(part).strip()) for part in parts]


def list_lines(text: str) -> list[str]:
    """The lines of a list that was written, without the numbers or signs before them."""
    lines = (_LIST_MARK.sub("", line, count=1).strip() for line in text.splitlines())
    return [line for line in lines if line]


def on_document(text: str, prompt: str) -> str:
    """What the user says of a document: its text, if there is any, then the prompt."""
    return f"{text.strip()}\n\n{prompt}".lstrip()


def beginning_that_fits(text: str, room: int, encode: Callable[[str], list[int]]) -> str | None:
    """As much of a text as leaves what it is encoded to at most `room` tokens long; None where "" does not."""
    if len(encode(text)) <= room:
        return text
    sizes = range(len(text))
    fitting = bisect_right(sizes, room, key=lambda size: len(encode(text[:size])))
    return text[: fitting - 1] if fitting else None


def with_worked_example(text: str, task: str, prompt: str) -> str:
    """A task on a text for a model that goes on with what it reads, behind a solved one of the same kind."""
    frame = "Text:\n{}\n\nTask: {}\n\nAnswer:"
    solved = ""
    if task in WORKED_EXAMPLES:
        example_prompt, answer = WORKED_EXAMPLES[task]
        solved = f"{frame.format(_PASSAGE, example_prompt)} {answer}\n\n{_NEXT}\n\n"
    return solved + frame.format(text.strip(), prompt)


_LIST_MARK = re.compile(r"\s*(?:[-*•+]|\(?\d{1,3}[.):])\s+")
_NEXT = "###"
_PASSAGE = (
    "Skerrow Light is a lighthouse on the island of Skerrow. It was built in 1887 by Ada Finch and is 31 metres high. "
    "Its lamp, which burned oil at first, has been electric since 1926."
)
WORKED_EXAMPLES = {
    "paraphrase": (
        "Rewrite the text in other words. Keep every fact.",
        "On the island of Skerrow stands a lighthouse, Skerrow Light, which Ada Finch built in 1887. It rises 31"
        " metres. Until 1926, when Skerrow Light got an electric lamp, its lamp was lit with oil.",
    ),
    "strategies": (
        "List ways to study the text, one a line.",
        "Write down each year and what happened in it.\nAsk and answer a question on each fact.\nExplain the text to a"
        " friend who has never heard of the subject.",
    ),
    "study": (
        "Study the text in this way: Write down each year and what happened in it.",
        "In 1887, Skerrow Light was built by Ada Finch. In 1926, the lamp of Skerrow Light became electric.",
    ),
    "implications": (
        "List statements that follow from the text, one a line.",
        "Ada Finch built Skerrow Light.\nThe lamp of Skerrow Light has not burned oil since 1926.\nThere is a"
        " lighthouse on the island of Skerrow.",
    ),
    "question": (
        "Write one question about this fact: It was built in 1887 by Ada Finch and is 31 metres high.",
        "Who built Skerrow Light?",
    ),
    "questions": (
        "Write 2 questions that the text answers, each with its answer.\nQ: question\nA: answer",
        "\nQ: Who built Skerrow Light?\nA: Ada Finch\nQ: How high is Skerrow Light?\nA: 31 metres",
    ),
    "answer": ("How high is Skerrow Light?", "Skerrow Light is 31 metres high."),
    "closure": ("Does the text say or imply this: Skerrow Light was built by Ada Finch? Answer yes or no.", "Yes"),
}
"""A prompt and its answer on `_PASSAGE`, by task."""
