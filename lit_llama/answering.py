"""What the scripts of generate/ share: how a model and its experts are loaded, where prompts come from, how answers are
printed, what is measured.

Only answers go to stdout. How tokens come about is `batching.py` and `generation.py`; how a prompt is dressed is
`prompts.py`; which of several adapters answers is `adapter_routing.py`.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lit_llama.adapter_routing import FixedRoute, Router, open_route
from lit_llama.adapters import AdapterBank, load_directory
from lit_llama.batching import Engine, Piece, Request, TokenLogprob
from lit_llama.checkpoint import existing_directory, load_model
from lit_llama.choices import ChoiceTree
from lit_llama.command_line import progress
from lit_llama.drafting import Drafter, DraftModel, check_vocabulary, look_up
from lit_llama.errors import InputError
from lit_llama.files import read_jsonl
from lit_llama.generation import Speed, checked_length, prepare_to_generate
from lit_llama.generation_arguments import AnswerArguments, ModelArguments, RouteMethod
from lit_llama.hardware import peak_memory_gb, pick_device, pick_dtype
from lit_llama.lora import load_adapter
from lit_llama.model import Llama
from lit_llama.prompts import STYLES, detect_style, encode_prompt, stop_strings
from lit_llama.tokenizer import Tokenizer

BASE = "base"
"""What the model without an adapter is called, where there are several to talk with."""


def load_for_generation(
    arguments: ModelArguments, put_on: Callable[[Llama, Tokenizer], None]
) -> tuple[Llama, Tokenizer]:
    """The base as the arguments say, ready to generate with what `put_on` puts on it, and its tokenizer.

    Raises:
        InputError: see `load_model`; or `--draft` is neither "lookup" nor a checkpoint with the same vocabulary.
    """
    tokenizer = Tokenizer.from_checkpoint(existing_directory(arguments.checkpoint_dir))
    if arguments.draft not in (None, "lookup"):
        check_vocabulary(tokenizer, Tokenizer.from_checkpoint(existing_directory(Path(arguments.draft))))
    device = pick_device(arguments.device)
    dtype = pick_dtype(arguments.dtype, device)
    model = load_model(arguments.checkpoint_dir, dtype, device, arguments.quantize, arguments.embeddings).eval()
    put_on(model, tokenizer)
    prepare_to_generate(model.eval(), arguments.compile)
    return model, tokenizer


def load_experts(model: Llama, adapter_dir: Path | None, adapters_dir: Path | None) -> dict[str, Path]:
    """Put one adapter, or all in the subfolders of a folder, into a bank on the model; their directories by name.

    Raises:
        InputError: see `adapters.load_directory`; or one has the name of the base.
    """
    experts: dict[str, Path] = {}
    if adapters_dir is not None:
        bank, errors = load_directory(model, adapters_dir)
        for name, error in errors.items():
            progress(f"without {name}: {error}")
        experts = {name: adapters_dir / name for name in bank.names}
    elif adapter_dir is not None:
        experts = {adapter_dir.resolve().name: adapter_dir}
        AdapterBank(model).load(*experts, adapter_dir)
    if BASE in experts:
        raise InputError(f"an adapter's folder is called {BASE!r}, as the model without one is here: rename it")
    return experts


class Asked(NamedTuple):
    """A prompt as it is put to the model."""

    prompt: str
    ids: list[int]
    stop: list[str]
    """Strings that end the answer."""
    continuation: bool
    """The answer goes on with the prompt's text."""
    expert: str | None
    """Adapter that a router chose."""


@dataclass
class Asker:
    """Puts prompts to the model in the style of the adapter that answers them, and lets this one answer."""

    tokenizer: Tokenizer
    arguments: AnswerArguments
    adapter_dir: Path | None
    """Of the one adapter that there is, or the folder of those that the router chooses from."""
    router: Router | FixedRoute | None = None

    def ask(self, prompts: list[str]) -> list[Asked]:
        experts = [None] * len(prompts) if self.router is None else self.router.choose(prompts)
        forms = {expert: self._form(expert) for expert in dict.fromkeys(experts)}
        asked = []
        for prompt, expert in zip(prompts, experts, strict=True):
            style, system, stop = forms[expert]
            ids = encode_prompt(self.tokenizer, style, prompt, system)
            asked.append(Asked(prompt, ids, stop, style == "plain", expert))
        return asked

    def _form(self, expert: str | None) -> tuple[str, str | None, list[str]]:
        """Style, system message and stop strings of prompts that an adapter answers."""
        style, system = style_and_system(
            self.arguments, self.adapter_dir if expert is None else self.adapter_dir / expert
        )
        stop = self.arguments.stop
        return style, system, stop_strings(style) + ([stop] if isinstance(stop, str) else stop)

    def answers(self, engine: Engine, asked: list[Asked]) -> Iterator[tuple[int, Piece]]:
        """Pieces of all answers as they come, with their numbers: prompt * num_samples + sample."""
        arguments, router = self.arguments, self.router
        mixed = router is not None and router.mixes
        choices = None if arguments.choices is None else ChoiceTree(self.tokenizer, arguments.choices)
        requests = [
            Request(
                prompt=one.ids,
                max_new_tokens=arguments.max_new_tokens,
                sampling=replace(arguments, num_samples=1, seed=arguments.seed + sample),
                stop=one.stop,
                adapter=None if mixed else one.expert,
                choices=choices,
                continuation=one.continuation,
                logprobs=arguments.logprobs,
            )
            for one in asked
            for sample in range(arguments.num_samples)
        ]
        with router.answering([]) if mixed else nullcontext():
            yield from engine.answer(requests)


def answer_prompts(
    arguments: AnswerArguments,
    adapter_dir: Path | None = None,
    adapters_dir: Path | None = None,
    route: str = "auto",
    route_by: RouteMethod = "embedding",
) -> None:
    """Load the model and answer what was asked, as the arguments say.

    Args:
        adapter_dir: of the adapter to put on the base.
        adapters_dir: or a folder of several, of which `adapter_routing.open_route` takes one for each prompt.
        route, route_by: see there.

    Raises:
        InputError: no prompt or several kinds of it, an unusable file, checkpoint or adapter, a prompt too long.
    """
    if arguments.batch_size < 1:
        raise InputError(f"--batch_size {arguments.batch_size} must be at least 1")
    prompts = None if arguments.interactive else read_prompts(arguments.prompt, arguments.prompts_file)
    if arguments.logprobs is not None and (not arguments.json or arguments.logprobs < 0):
        raise InputError(f"--logprobs {arguments.logprobs} must be at least 0, and is printed with --json true")
    if arguments.interactive and (arguments.prompt is not None or arguments.prompts_file is not None):
        raise InputError("--interactive asks for prompts itself; leave out --prompt and --prompts_file")
    style_and_system(arguments, adapter_dir)  # what is wrong with them shall be said before the model is loaded
    router, weight_bytes = None, 0

    def put_on(model: Llama, tokenizer: Tokenizer) -> None:
        nonlocal router, weight_bytes
        if adapter_dir is not None:
            load_adapter(model, adapter_dir)
        if adapters_dir is not None:
            router = open_route(model, tokenizer, adapters_dir, route, route_by)
        weight_bytes = bytes_per_step(model)

    model, tokenizer = load_for_generation(arguments, put_on)
    asker = Asker(tokenizer, arguments, adapter_dir or adapters_dir, router)
    engine = open_engine(arguments, model, tokenizer, arguments.batch_size)
    try:
        if prompts is None:
            _converse(engine, asker)
        elif len(prompts) == 1 and arguments.num_samples == 1 and not arguments.json:
            _answer_one(engine, asker, prompts[0])
        else:
            _answer_all(engine, asker, prompts)
    finally:
        if engine.speed.prompt_tokens:
            progress(summary(engine.speed, weight_bytes, model.model.norm.weight.device))
            if engine.guessed:
                progress(f"{engine.guessed_right:,} of {engine.guessed:,} guessed tokens were right")


def open_engine(
    arguments: ModelArguments,
    model: Llama,
    tokenizer: Tokenizer,
    slots: int,
    max_length: int | None = None,
    max_waiting: int | None = None,
) -> Engine:
    """What answers requests with a model of `load_for_generation`, as the arguments say; the rest as in `Engine`."""
    make_drafter = None if arguments.draft is None else _drafter_maker(arguments)
    return Engine(model, tokenizer, slots, max_length, max_waiting, make_drafter, arguments.quantize_cache)


def _drafter_maker(arguments: ModelArguments) -> Callable[[], Drafter]:
    if arguments.draft == "lookup":
        return lambda: look_up
    device = pick_device(arguments.device)
    model = load_model(Path(arguments.draft), pick_dtype(arguments.dtype, device), device).eval()
    prepare_to_generate(model, arguments.compile)
    return lambda: DraftModel(model)


def read_prompts(prompt: str | None, prompts_file: Path | None) -> list[str]:
    """The prompts from the one source that was given; from standard input if it is not a terminal.

    Raises:
        InputError: no source or two, or one that holds no prompt.
    """
    if prompt is not None and prompts_file is not None:
        raise InputError("--prompt and --prompts_file are both given; choose one")
    if prompt is not None:
        return [prompt]
    if prompts_file is not None:
        prompts = _prompts_of(prompts_file)
        if not prompts:
            raise InputError(f"{prompts_file}: no prompt in it")
        return prompts
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError("nothing to answer: give --prompt, --prompts_file or --interactive true, or pipe a prompt in")
    text = sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise InputError("nothing to answer: standard input is empty; give --prompt, --prompts_file or text to stdin")
    return [text]


def _prompts_of(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        prompts = [row.get("prompt", row.get("question")) for row in read_jsonl(path)]
        for number, prompt in enumerate(prompts, start=1):
            if not isinstance(prompt, str):
                raise InputError(f'{path}, object {number}: neither "prompt" nor "question" is a string')
        return prompts
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def style_and_system(arguments: AnswerArguments, adapter_dir: Path | None) -> tuple[str, str | None]:
    """Prompt style and system message: what the arguments say, else those of the adapter's run, else the base's.

    Raises:
        InputError: no such style.
    """
    style = arguments.style or adapter_style(adapter_dir) or detect_style(arguments.checkpoint_dir)
    if style not in STYLES:
        raise InputError(f"--style {style!r} is not one of {', '.join(STYLES)}")
    return style, adapter_system(adapter_dir) if arguments.system is None else arguments.system


def adapter_style(adapter_dir: Path | None) -> str | None:
    """The prompt style that an adapter's run was configured with, if it was; see `lit_config.yaml` in its directory."""
    settings = _run_settings(adapter_dir)
    return settings.get("style") or (settings.get("eval") or {}).get("probe_style")


def adapter_system(adapter_dir: Path | None) -> str | None:
    """The system message that an adapter's run was configured with, if it was."""
    return (_run_settings(adapter_dir).get("eval") or {}).get("probe_system")


def _run_settings(adapter_dir: Path | None) -> dict[str, Any]:
    path = None if adapter_dir is None else Path(adapter_dir) / "lit_config.yaml"
    if path is None or not path.is_file():
        return {}
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError:
        raise InputError(f"{path}: not valid YAML; name the prompt style with --style") from None


def bytes_per_step(model: Llama) -> int:
    """Bytes of weights that one forward pass of a token reads: all of them, but only a row of an untied embedding."""
    tensors = [*model.parameters(), *model.buffers()]
    embedding = model.model.embed_tokens
    unread = () if model.config.tie_word_embeddings else (*embedding.parameters(), *embedding.buffers())
    return sum(t.numel() * t.itemsize for t in tensors) - sum(t.numel() * t.itemsize for t in unread)


def summary(speed: Speed, weight_bytes: int, device: torch.device) -> str:
    """One line of what generating took."""
    text = f"prefill {speed.prefill_rate:,.1f} tokens/s ({speed.prompt_tokens:,} in {speed.prefill_seconds:.2f} s)"
    if speed.new_tokens:
        bandwidth = weight_bytes * speed.steps / speed.decode_seconds / 1e9
        text += f", decode {speed.decode_rate:,.1f} tokens/s ({speed.new_tokens:,} in {speed.decode_seconds:.2f} s),"
        text += f" {bandwidth:.1f} GB/s of weights"
    return f"{text}, peak memory {peak_memory_gb(device):.2f} GB"


def _answer_one(engine: Engine, asker: Asker, prompt: str) -> None:
    """Print one answer while it comes."""
    for _, piece in asker.answers(engine, asker.ask([prompt])):
        print(piece.text, end="", flush=True)
    print(flush=True)


def _answer_all(engine: Engine, asker: Asker, prompts: list[str]) -> None:
    """Print every answer, in the order of the prompts, once it is whole; samples of a prompt follow each other."""
    arguments, asked, printed = asker.arguments, asker.ask(prompts), 0
    # All of them, before the first answer is printed, and with their numbers.
    checked_length(engine.model, [one.ids for one in asked], arguments.max_new_tokens)
    answers: list[list[Piece]] = [[] for _ in range(len(prompts) * arguments.num_samples)]
    for number, piece in asker.answers(engine, asked):
        answers[number].append(piece)
        while printed < len(answers) and answers[printed] and answers[printed][-1].finish_reason is not None:
            text = "".join(piece.text for piece in answers[printed])
            row = {"prompt": asked[printed // arguments.num_samples].prompt, "answer": text}
            if arguments.logprobs is not None:
                row["logprobs"] = [_named(one) for piece in answers[printed] for one in piece.logprobs]
            print(json.dumps(row, ensure_ascii=False) if arguments.json else text, flush=True)
            answers[printed], printed = [], printed + 1


def _named(token: TokenLogprob) -> dict[str, Any]:
    likeliest = [{"text": one.text, "logprob": round(one.logprob, 4)} for one in token.top]
    return {"text": token.text, "logprob": round(token.logprob, 4)} | ({"top": likeliest} if likeliest else {})


def _converse(engine: Engine, asker: Asker) -> None:
    """Ask for a prompt and answer it, again and again; Ctrl-C leaves an answer, Ctrl-D or Ctrl-C at the prompt ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  importing it gives the prompt arrow keys and a history
    turn = 0
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            prompt = input()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not prompt.strip():
            continue
        # Asking again draws again, and the same session gives the same answers.
        seeded = replace(asker, arguments=replace(asker.arguments, seed=asker.arguments.seed + turn))
        turn += asker.arguments.num_samples
        try:
            if asker.arguments.num_samples == 1 and not asker.arguments.json:
                _answer_one(engine, seeded, prompt)
            else:
                _answer_all(engine, seeded, [prompt])
        except KeyboardInterrupt:
            print(flush=True)
        except InputError as error:
            progress(f"error: {error}")
