"""EleutherAI's lm-evaluation-harness over our model: its tasks and metrics, our weights with adapter and quantization.

The package lm_eval makes requests out of a task's documents and metrics out of the answers. Here is what lies in
between, done as its own Hugging Face backend does it, so that figures compare with published ones: text becomes ids
with special tokens read as such, contexts that are too long lose their beginning, and long texts are scored in windows
that do not overlap.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lit_llama.chat_templates import render_template
from lit_llama.errors import InputError
from lit_llama.evaluation.likelihood import continuation_likelihoods
from lit_llama.generation import SamplingConfig, evaluating, stream_text
from lit_llama.model import Llama
from lit_llama.prompts import chat_template, with_system
from lit_llama.tokenizer import Tokenizer

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    raise InputError("--tasks needs the package lm_eval: pip install 'lit-llama[harness]'") from None

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def evaluate_tasks(
    model: Llama,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    manager: "Tasks",
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    style: str | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Run tasks as lm_eval's own command does.

    Args:
        tasks: names of tasks, groups or tags, or patterns of them.
        manager: where they are found, see `find_tasks`.
        num_fewshot: examples in front of each question; None: what the task says.
        limit: only the first so many documents of each task.
        batch_size: contexts, windows or prompts at a time.
        style: prompt style of a chat, one of `prompts.STYLES`; None: the task's text goes to the model as it stands.
        system: system message of the chat, as in `prompts.with_system`.

    Returns:
        {"results", "groups"?, "versions", "n-shot", "n-samples"} as lm_eval gives them, and "lm_eval", its version.

    Raises:
        InputError: a task cannot be loaded, or asks for something that there is not.
    """
    with evaluating(model):
        results = simple_evaluate(
            HarnessModel(model, tokenizer, batch_size, style, system),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            apply_chat_template=style is not None,
            system_instruction=system,
            task_manager=manager,
        )
    kept = ("results", "groups", "versions", "n-shot", "n-samples")
    return {name: _as_json(results[name]) for name in kept if name in results} | {"lm_eval": version("lm_eval")}


class Tasks(TaskManager):
    """lm_eval's tasks, whose failure to load is one line: they run code and fetch data that others wrote."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"--tasks {task_list}: cannot be loaded ({reason})") from error


def find_tasks(tasks: Sequence[str], tasks_dir: Path | None = None) -> Tasks:
    """lm_eval's index of tasks, checked to have these.

    Args:
        tasks_dir: a directory of further task definitions (YAML).

    Raises:
        InputError: no such directory or task.
    """
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise InputError(f"--tasks_dir {tasks_dir}: no such directory")
    for with_defaults in (False, True) if tasks_dir is not None else (True,):  # indexing all of theirs takes seconds
        manager = Tasks(include_path=None if tasks_dir is None else str(tasks_dir), include_defaults=with_defaults)
        missing = [task for task in tasks if not manager.match_tasks([task])]
        if not missing:
            return manager
    place = "" if tasks_dir is None else f" and none in {tasks_dir}"
    raise InputError(
        f"--tasks {missing[0]}: lm_eval {version('lm_eval')} has no such task{place}; see lm_eval ls tasks"
    )


class HarnessModel(TemplateLM):
    """What lm_eval asks of a model.

    Args:
        model: in eval mode, with whatever wraps its layers.
        batch_size: contexts, windows or prompts at a time; those of like length go together.
        style: prompt style of chats, one of `prompts.STYLES`.
        system: system message of chats that have none, as in `prompts.with_system`.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        style: str | None = None,
        system: str | None = None,
    ) -> None:
        super().__init__()
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._style, self._system = style, system
        self._bos = tokenizer.special_text(tokenizer.bos_id) if tokenizer.adds_bos else None
        self.max_length = model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        token_id = self._tokenizer.eos_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id
        if token_id is None:
            raise InputError(f"{self._tokenizer.path}: no BOS and no EOS to begin a text with")
        return token_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self._tokenizer.sha256}-{self._style}"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt` its last message is left open, to be gone on with."""
        template = chat_template(self._tokenizer, self._style)
        chat_history = with_system(self._tokenizer, self._style, chat_history, self._system)
        text = render_template(template, chat_history, self._tokenizer.special_tokens, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        place = text.rindex(last.strip()) - (len(last) - len(last.lstrip()))
        return text[: place + len(last)] if text.startswith(last, place) else text[: place + len(last.rstrip())]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text in which special tokens are spelled out.

        Args:
            add_special_tokens: False leaves out the BOS that the tokenizer puts before a text; it is never doubled.
        """
        ids: list[int] = []
        if self._bos is not None and add_special_tokens is not False and not string.startswith(self._bos):
            ids.append(self._tokenizer.bos_id)
        place = 0
        for match in self._tokenizer.special_pattern.finditer(string):
            ids += self._encode_piece(string, place, match.start())
            ids.append(self._tokenizer.special_id(match[0]))
            place = match.end()
        return ids + self._encode_piece(string, place, len(string))

    def _encode_piece(self, string: str, start: int, end: int) -> list[int]:
        if start == end:
            return []
        continuation = start > 0 and not self._tokenizer.spaces_segments
        return self._tokenizer.encode(string[start:end], continuation=continuation)

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of each (text, context ids, continuation ids)."""
        continuations = []
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, (text, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if not continuation or room < 1:
                raise InputError(
                    f"a task's continuation has {len(continuation)} tokens, the model's context has room for 1 to"
                    f" {self.max_length}: {text!r:.200}"
                )
            continuations.append(continuation)
            context = tuple(context[-room:])
            # A context is run once for all of its continuations; one token is not worth it.
            groups.setdefault((context, number if len(context) == 1 else None), []).append(number)
        results: list[tuple[float, bool]] = [(math.nan, False)] * len(continuations)
        with tqdm(total=len(continuations), desc="likelihoods", disable=disable_tqdm) as bar:
            for contexts, numbers in self._batches(groups, continuations):
                of_contexts = [[continuations[number] for number in of_context] for of_context in numbers]
                likelihoods = continuation_likelihoods(self._model, contexts, of_contexts)
                for of_context, found in zip(numbers, likelihoods, strict=True):
                    for number, likelihood in zip(of_context, found, strict=True):
                        results[number] = (likelihood.log_likelihood, likelihood.greedy)
                    bar.update(len(of_context))
        return results

    def _batches(
        self, groups: dict[tuple[Any, ...], list[int]], continuations: list[list[int]]
    ) -> Iterator[tuple[list[list[int]], list[list[int]]]]:
        """(contexts, numbers of each one's continuations), long ones first, each batch fitting the model's context."""
        longest = {key: max(len(continuations[number]) for number in numbers) for key, numbers in groups.items()}
        batch: list[tuple[Any, ...]] = []
        room = 0
        for key in sorted(groups, key=lambda key: (len(key[0]), longest[key]), reverse=True):
            if batch and (len(batch) == self._batch_size or longest[key] > room):
                yield [list(key[0]) for key in batch], [groups[key] for key in batch]
                batch = []
            if not batch:
                room = self.max_length + 1 - len(key[0])
            batch.append(key)
        if batch:
            yield [list(key[0]) for key in batch], [groups[key] for key in batch]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in nats; one longer than the context in windows side by side."""
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((number, *make_disjoint_window(window)))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for (number, _, _), (log_likelihood, _) in zip(windows, scores, strict=True):
            totals[number] += log_likelihood
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model says to each prompt, up to a stop string, which is not part of it."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="answers", disable=disable_tqdm) as bar:
            for options, numbers in groups.items():
                max_new_tokens, sampling, stop = self._generation_options(json.loads(options))
                room = self.max_length - max_new_tokens
                prompts = {n: self.tok_encode(requests[n].args[0])[-room:] or [self.prefix_token_id] for n in numbers}
                numbers.sort(key=lambda n: len(prompts[n]), reverse=True)
                for start in range(0, len(numbers), self._batch_size):
                    batch = numbers[start : start + self._batch_size]
                    ids = [prompts[n] for n in batch]
                    for row, text in stream_text(self._model, self._tokenizer, ids, max_new_tokens, sampling, stop):
                        answers[batch[row]] += text
                    bar.update(len(batch))
        return answers

    def _generation_options(self, options: dict[str, Any]) -> tuple[int, SamplingConfig, list[str]]:
        """(longest answer in tokens, sampling, stop strings) of what a task asks for."""
        options = normalize_gen_kwargs(options, default_max_gen_toks=256)
        max_new_tokens, do_sample = options.pop("max_gen_toks"), options.pop("do_sample", False)
        stop = [text for text in options.pop("until") if text]
        unknown = sorted(options.keys() - set(_SAMPLING))
        if unknown:
            raise InputError(f"a task wants to generate with {unknown[0]!r}, which is none of {', '.join(_SAMPLING)}")
        if max_new_tokens >= self.max_length:
            raise InputError(
                f"a task wants to generate {max_new_tokens} tokens, the model's context has {self.max_length}"
            )
        return max_new_tokens, SamplingConfig(**options) if do_sample else SamplingConfig(), stop


def _as_json(value: Any) -> Any:
    """lm_eval's results as JSON's types; a figure that is no number, such as the spread of a single one, as null."""
    if isinstance(value, dict):
        return {str(name): _as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    if isinstance(value, str | bool | int | None):
        return value
    return float(value) if math.isfinite(value) else None
