"""Prompt styles: how a conversation becomes ids, exact to the token of what each family of models was trained on.

A style renders messages into segments: text, and control tokens. Control tokens enter the sequence as ids; text is
encoded as text, so that nothing a user writes can open or close a turn. (Where a family spells its markers in plain
text, as `[INST]` of Llama 2 or `<|user|>` of TinyLlama, the model itself cannot tell them from a user's.)

Here: the styles and how to recognise them. How text becomes ids is in `lit_llama.tokenizer`; sampling is elsewhere.

Sources: the chat templates published with TinyLlama-1.1B-Chat-v1.0, SmolLM2-Instruct, Meta-Llama-3-8B-Instruct and
Llama-2-7b-chat-hf; mistral-common's instruct tokenizers V1 and V3; tatsu-lab/stanford_alpaca.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_llama.errors import InputError
from lit_llama.tokenizer import Tokenizer, read_chat_template

Message = Mapping[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}; a user turn of alpaca may have an "input"."""


@dataclass(frozen=True)
class Control:
    """A control token in a rendered conversation: as it is written, or BOS or EOS whatever the tokenizer calls them."""

    text: str


Segment = str | Control

BOS = Control("bos_token")
EOS = Control("eos_token")

ALPACA_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_HEADER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def encode_prompt(tokenizer: Tokenizer, style: str, prompt: str, system: str | None = None) -> list[int]:
    """Ids of one user turn and of what opens the answer.

    Args:
        tokenizer: of the checkpoint.
        style: one of `STYLES`.
        prompt: what the user says.
        system: the system message; None for the style's own default, which only ChatML models may have.
    """
    messages = [{"role": "user", "content": prompt}]
    return encode_chat(
        tokenizer, style, messages if system is None else [{"role": "system", "content": system}, *messages]
    )


def encode_chat(
    tokenizer: Tokenizer, style: str, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation.

    Args:
        tokenizer: of the checkpoint.
        style: one of `STYLES`.
        messages: turns in order; a system message can only be the first.
        add_generation_prompt: end with what opens the assistant's answer, in styles that have such an opening.

    Raises:
        InputError: unknown style, malformed messages, or a tokenizer without the style's control tokens.
    """
    ids: list[int] = []
    previous: Segment | None = None
    for segment in render(tokenizer, style, messages, add_generation_prompt):
        if isinstance(segment, Control):
            ids.append(_control_id(tokenizer, style, segment))
        else:
            # Llama 2 and Mistral encoded each piece as a text of its own; elsewhere the tokenizer's file decides
            # whether SentencePiece's leading space comes after a control token too.
            spaced = style in ("llama2", "mistral", "mistral-v3") or tokenizer.spaces_segments
            continues = isinstance(previous, str) or (previous is not None and not spaced)
            ids += tokenizer.encode(segment, continuation=continues)
        previous = segment
    return ids


def render(
    tokenizer: Tokenizer, style: str, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[Segment]:
    """The conversation as text and control tokens; arguments and errors as `encode_chat`."""
    if style not in _RENDERERS:
        raise InputError(f"unknown prompt style {style!r}; choose one of {', '.join(STYLES)}")
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise InputError(
                f"message {number}: expected a role (system, user, assistant) and a content, got {message}"
            )
        if role == "system" and number > 0:
            raise InputError(f"message {number}: a system message can only be the first")
        if "input" in message and style != "alpaca":
            raise InputError(f"message {number}: prompt style {style} has no place for an input; put it in the content")
    if not messages:
        raise InputError("a conversation needs at least one message")
    return list(_RENDERERS[style](tokenizer, messages, add_generation_prompt))


def detect_style(checkpoint_dir: Path | str) -> str:
    """The style of the checkpoint's chat template, "plain" when it has none.

    Raises:
        InputError: there is a template, and it is none of the known ones.
    """
    template = read_chat_template(checkpoint_dir)
    if template is None:
        return "plain"
    if "<|start_header_id|>" in template:
        return "llama3"
    if "<|im_start|>" in template:
        return "chatml"
    if "[INST]" in template:
        if "<<SYS>>" in template:
            return "llama2"
        return "mistral-v3" if Tokenizer.from_checkpoint(checkpoint_dir).has_special("[INST]") else "mistral"
    if "<|assistant|>" in template and "eos_token" in template:
        return "tinyllama"
    if "### Instruction" in template:
        return "alpaca"
    raise InputError(f"{checkpoint_dir}: unknown chat template; name the prompt style, one of {', '.join(STYLES)}")


def stop_strings(style: str) -> list[str]:
    """Text that ends an answer besides `Tokenizer.stop_ids`: the start of the next turn where it is plain text."""
    if style not in _RENDERERS:
        raise InputError(f"unknown prompt style {style!r}; choose one of {', '.join(STYLES)}")
    return list(_STOP_STRINGS.get(style, ()))


def _plain(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    if tokenizer.adds_bos:
        yield BOS
    yield "\n\n".join(message["content"] for message in messages)


def _alpaca(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    system, turns = _split_system(messages)
    _require_alternation("alpaca", turns)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield turn["content"]
            yield EOS
            continue
        if number == 0:
            if tokenizer.adds_bos:
                yield BOS
            header = system or (ALPACA_HEADER_WITH_INPUT if turn.get("input") else ALPACA_HEADER)
            yield header
        given = f"\n\n### Input:\n{turn['input']}" if turn.get("input") else ""
        yield f"\n\n### Instruction:\n{turn['content']}{given}\n\n### Response:"


def _llama2(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    system, turns = _split_system(messages)
    _require_alternation("llama2", turns)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield f" {turn['content'].strip()} "
            yield EOS
            continue
        before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if number == 0 and system is not None else ""
        yield BOS
        yield f"[INST] {(before + turn['content']).strip()} [/INST]"


def _llama3(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    yield BOS
    for message in messages:
        yield from _llama3_header(message["role"])
        yield message["content"].strip()
        yield Control("<|eot_id|>")
    if add_generation_prompt:
        yield from _llama3_header("assistant")


def _llama3_header(role: str) -> list[Segment]:
    return [Control("<|start_header_id|>"), role, Control("<|end_header_id|>"), "\n\n"]


def _mistral(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    """Mistral 7B Instruct v0.1: a system message goes before the first user turn."""
    system, turns = _split_system(messages)
    _require_alternation("mistral", turns)
    yield BOS
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield f" {turn['content']}"
            yield EOS
        else:
            before = f"{system}\n\n" if number == 0 and system else ""
            yield f"[INST] {before}{turn['content']} [/INST]"


def _mistral_v3(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    """Mistral 7B Instruct v0.3: brackets are control tokens, a system message goes before the last user turn."""
    system, turns = _split_system(messages)
    _require_alternation("mistral-v3", turns)
    last_user = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
    yield BOS
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield turn["content"]
            yield EOS
        else:
            before = f"{system}\n\n" if number == last_user and system else ""
            yield Control("[INST]")
            yield before + turn["content"]
            yield Control("[/INST]")


def _tinyllama(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    """TinyLlama-1.1B-Chat (Zephyr): its template has no BOS."""
    for message in messages:
        yield from _header_and_content(f"<|{message['role']}|>\n", message)
        yield EOS
        yield "\n"
    if add_generation_prompt:
        yield "<|assistant|>\n"


def _chatml(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    default = _default_system_message(tokenizer.chat_template)
    if default is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": default}, *messages]
    for message in messages:
        yield Control("<|im_start|>")
        yield from _header_and_content(f"{message['role']}\n", message)
        yield Control("<|im_end|>")
        yield "\n"
    if add_generation_prompt:
        yield Control("<|im_start|>")
        yield "assistant\n"


def _header_and_content(header: str, message: Message) -> list[Segment]:
    """An answer is a segment of its own, as in generation, where the header is the prompt and the answer follows it."""
    return [header, message["content"]] if message["role"] == "assistant" else [header + message["content"]]


def _default_system_message(template: str | None) -> str | None:
    """What a ChatML template says where a conversation has no system message (SmolLM2, Qwen), or None."""
    literal = re.search(r"<\|im_start\|>system(?:\n|\\n)([^<{}'\"]+)<\|im_end\|>", template or "")
    return literal[1] if literal else None


def _split_system(messages: Sequence[Message]) -> tuple[str | None, Sequence[Message]]:
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else (None, messages)


def _require_alternation(style: str, turns: Sequence[Message]) -> None:
    for number, turn in enumerate(turns):
        if turn["role"] != ("user", "assistant")[number % 2]:
            raise InputError(f"turn {number}: in prompt style {style} user and assistant alternate, the user first")
    if not turns:
        raise InputError(f"prompt style {style} needs a user's turn")


def _control_id(tokenizer: Tokenizer, style: str, control: Control) -> int:
    roles = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    if control not in roles and tokenizer.has_special(control.text):
        return tokenizer.special_id(control.text)
    token_id = roles.get(control)
    if token_id is None:
        raise InputError(
            f"{tokenizer.path}: no token {control.text}, which prompt style {style} needs; choose another style"
        )
    return token_id


_RENDERERS: dict[str, Callable[[Tokenizer, Sequence[Message], bool], Iterator[Segment]]] = {
    "plain": _plain,
    "alpaca": _alpaca,
    "llama2": _llama2,
    "llama3": _llama3,
    "mistral": _mistral,
    "mistral-v3": _mistral_v3,
    "tinyllama": _tinyllama,
    "chatml": _chatml,
}
STYLES = tuple(_RENDERERS)
_STOP_STRINGS = {
    "alpaca": ["### Instruction:"],
    "llama2": ["[INST]"],
    "mistral": ["[INST]"],
    "tinyllama": ["<|user|>", "<|system|>", "<|assistant|>"],
}
