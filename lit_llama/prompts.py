"""Prompt styles: how a conversation becomes ids, exact to the token of what each family of models was trained on.

A style renders messages into segments: text, answers, and control tokens. Control tokens enter the sequence as ids;
text is encoded as text, so that nothing a user writes can open or close a turn. (Where a family spells its markers in
plain text, as `[INST]` of Llama 2 or `<|user|>` of TinyLlama, the model itself cannot tell them from a user's.) An
answer and the control token that directly follows it are what finetuning learns. Style "template" renders by the Jinja
chat template that came with the checkpoint.

Here: the styles, how to recognise them, and writing one into a checkpoint. Jinja itself is in
`lit_llama.chat_templates`; how text becomes ids is in `lit_llama.tokenizer`.

Sources: the chat templates published with TinyLlama-1.1B-Chat-v1.0, SmolLM2-Instruct, Meta-Llama-3-8B-Instruct and
Llama-2-7b-chat-hf; mistral-common's instruct tokenizers V1 and V3; tatsu-lab/stanford_alpaca.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lit_llama.chat_templates import (
    ALPACA_HEADER,
    ALPACA_HEADER_WITH_INPUT,
    TEMPLATES,
    render_template,
    with_default_system,
)
from lit_llama.errors import InputError
from lit_llama.files import atomic_file, read_json, write_json
from lit_llama.tokenizer import Tokenizer, read_chat_template

Message = Mapping[str, str]
"""One turn: {"role": "system" | "user" | "assistant", "content": text}; a user turn may have an "input", which alpaca
has a place for and other styles put below the content."""


@dataclass(frozen=True)
class Control:
    """A control token in a rendered conversation: as it is written, or BOS or EOS whatever the tokenizer calls them."""

    text: str


class Answer(str):
    """What the assistant says: learned, together with a control token that directly follows it."""


Segment = str | Answer | Control

BOS = Control("bos_token")
EOS = Control("eos_token")

_PROBE = ({"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"})
_PRIVATE_USE = range(0xE000, 0xF900)


def encode_prompt(tokenizer: Tokenizer, style: str, prompt: str, system: str | None = None) -> list[int]:
    """Ids of one user turn and of what opens the answer.

    Args:
        tokenizer: of the checkpoint.
        style: one of `STYLES`.
        prompt: what the user says.
        system: as in `with_system`.
    """
    return encode_chat(tokenizer, style, with_system(tokenizer, style, [{"role": "user", "content": prompt}], system))


def with_system(tokenizer: Tokenizer, style: str, messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """The conversation with a system message in front, unless it has one.

    Args:
        system: None for the style's own default, which only ChatML models may have; "" for none at all.
    """
    if system is None or messages[0].get("role") == "system":
        return messages
    replaces_default = style in ("chatml", "template") and _default_system_message(tokenizer.chat_template) is not None
    return [{"role": "system", "content": system}, *messages] if system or replaces_default else messages


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
        InputError: unknown style, malformed messages, a tokenizer without the style's control tokens, or messages that
            the style or the checkpoint's template has no form for.
    """
    return _encode(tokenizer, style, render(tokenizer, style, messages, add_generation_prompt))[0]


def encode_example(tokenizer: Tokenizer, style: str, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids of a conversation to learn from, and which of them are learned.

    Before each learned answer stands exactly what `encode_chat` gives for the messages before it. Where the style
    renders an earlier turn differently once others follow (mistral-v3 moves the system message to the last user turn),
    the answers before that place are context and not learned.

    Returns:
        ids and mask, of one length; 1 in the mask for answers and the control tokens that end them.

    Raises:
        InputError: as `encode_chat`; a conversation without an answer, or one that the assistant begins; a chat
            template whose generation prompt is not what it puts before an answer.
    """
    turns = [message["role"] for message in messages if message.get("role") != "system"]
    if "assistant" not in turns:
        raise InputError("no turn of the assistant: nothing to learn")
    if turns[0] == "assistant":
        raise InputError("the conversation starts with the assistant; a user's turn must come first")
    ids, mask = _encode(tokenizer, style, render(tokenizer, style, messages, add_generation_prompt=False))
    if not any(mask):
        raise InputError(
            "the checkpoint's chat template does not put its generation prompt before an answer, so that what is to be"
            " learned cannot be told; name another prompt style"
        )
    return ids, mask


def _encode(tokenizer: Tokenizer, style: str, segments: Sequence[Segment]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    previous: Segment | None = None
    for segment in segments:
        if isinstance(segment, Control):
            new = [_control_id(tokenizer, style, segment)]
        else:
            # Llama 2 and Mistral encoded each piece as a text of its own; elsewhere the tokenizer's file decides
            # whether SentencePiece's leading space comes after a control token too.
            spaced = style in ("llama2", "mistral", "mistral-v3") or tokenizer.spaces_segments
            continues = isinstance(previous, str) or (previous is not None and not spaced)
            new = tokenizer.encode(segment, continuation=continues)
        ends_answer = isinstance(segment, Control) and isinstance(previous, Answer)
        ids += new
        mask += [int(isinstance(segment, Answer) or ends_answer)] * len(new)
        previous = segment
    return ids, mask


def render(
    tokenizer: Tokenizer, style: str, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[Segment]:
    """The conversation as text, answers and control tokens; arguments and errors as `encode_chat`."""
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
    if not messages:
        raise InputError("a conversation needs at least one message")
    if style != "alpaca":
        messages = [{"role": message["role"], "content": content_with_input(message)} for message in messages]
    return list(_RENDERERS[style](tokenizer, messages, add_generation_prompt))


def content_with_input(message: Message) -> str:
    """What a turn says, with its input below."""
    return "\n\n".join(text for text in (message["content"], message.get("input")) if text)


def detect_style(checkpoint_dir: Path | str) -> str:
    """The style that encodes as the checkpoint's chat template does; "template" if none, "plain" if there is none.

    Raises:
        InputError: there is a template and no tokenizer, or the template fails on the simplest conversation.
    """
    if read_chat_template(checkpoint_dir) is None:
        return "plain"
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    system = {"role": "system", "content": "Be kind."}
    probes: list[list[Message]] = [[_PROBE[0]], [*_PROBE, _PROBE[0]], [system, *_PROBE, _PROBE[0]]]
    expected = [_encoded_or_none(tokenizer, "template", probe) for probe in probes]
    if expected[0] is None:
        encode_chat(tokenizer, "template", probes[0])
    for style in TEMPLATES:
        found = [_encoded_or_none(tokenizer, style, probe) for probe in probes]
        # Some templates refuse system messages, or more turns than one, that the style has a form for.
        if all(ids in (other, None) for ids, other in zip(expected, found, strict=True)):
            return style
    return "template"


def _encoded_or_none(tokenizer: Tokenizer, style: str, messages: Sequence[Message]) -> list[int] | None:
    try:
        return encode_chat(tokenizer, style, messages)
    except InputError:
        return None


def chat_template(tokenizer: Tokenizer, style: str, system: str | None = None) -> str:
    """A Jinja chat template that renders as the style does, for transformers, vLLM and others.

    Args:
        tokenizer: of the checkpoint; whether it adds a BOS to text, and a ChatML model's default system message,
            are its own.
        style: one of `STYLES`.
        system: the system message of conversations that have none; None: the style's own default.

    Raises:
        InputError: unknown style, or "template" where the checkpoint has none.
    """
    if style not in STYLES or (style == "template" and tokenizer.chat_template is None):
        raise InputError(f"no chat template for prompt style {style!r}; choose one of {', '.join(TEMPLATES)}")
    template = tokenizer.chat_template if style == "template" else TEMPLATES[style]
    if style in ("plain", "alpaca") and not tokenizer.adds_bos:
        template = template.replace("{{ bos_token }}", "")
    if system:
        return with_default_system(template, system)
    default = _default_system_message(tokenizer.chat_template)
    if style == "chatml" and default is not None:
        message = f"{{{{ '<|im_start|>system\\n{default}<|im_end|>\\n' }}}}"
        template = f"{{% if messages[0]['role'] != 'system' %}}{message}{{% endif %}}{template}"
    return template


def write_chat_template(checkpoint_dir: Path | str, style: str, system: str | None = None) -> None:
    """Make a style the checkpoint's own, for whatever opens it: its chat template, and the token that ends an answer.

    Writes chat_template.jinja, takes a template out of tokenizer_config.json, and adds the token to those that end
    generation by generation_config.json. Arguments and errors as `chat_template`.
    """
    directory = Path(checkpoint_dir)
    tokenizer = Tokenizer.from_checkpoint(directory)
    ids, mask = encode_example(tokenizer, style, _PROBE)
    end_id = next(token_id for token_id, learned in zip(reversed(ids), reversed(mask), strict=True) if learned)
    with atomic_file(directory / "chat_template.jinja") as file:
        file.write(chat_template(tokenizer, style, system))
    settings_file, generation_file = directory / "tokenizer_config.json", directory / "generation_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if settings.pop("chat_template", None) is not None:
        write_json(settings_file, settings)
    generation = read_json(generation_file) if generation_file.is_file() else {}
    known = generation.get("eos_token_id")
    if tokenizer.special_text(end_id) and end_id not in (known if isinstance(known, list) else [known]):
        write_json(generation_file, generation | {"eos_token_id": sorted({*tokenizer.stop_ids, end_id})})


def stop_strings(style: str) -> list[str]:
    """Text that ends an answer besides `Tokenizer.stop_ids`: the start of the next turn where it is plain text."""
    if style not in _RENDERERS:
        raise InputError(f"unknown prompt style {style!r}; choose one of {', '.join(STYLES)}")
    return list(_STOP_STRINGS.get(style, ()))


def _plain(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    """Nothing is put around the texts: an answer follows its prompt as it stands."""
    if tokenizer.adds_bos:
        yield BOS
    before = None
    for message in messages:
        if message["role"] == "assistant":
            yield Answer(message["content"])
            yield EOS
        else:
            yield message["content"] if before in (None, "assistant") else f"\n\n{message['content']}"
        before = message["role"]


def _alpaca(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    system, turns = _split_system(messages)
    _require_alternation("alpaca", turns)
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield Answer(turn["content"])
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
            yield Answer(f" {turn['content'].strip()} ")
            yield EOS
            continue
        before = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if number == 0 and system is not None else ""
        yield BOS
        yield f"[INST] {(before + turn['content']).strip()} [/INST]"


def _llama3(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    yield BOS
    for message in messages:
        yield from _llama3_header(message["role"])
        text = message["content"].strip()
        yield Answer(text) if message["role"] == "assistant" else text
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
            yield Answer(f" {turn['content']}")
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
            # Before an earlier answer there would be a system message when it is asked for.
            yield Answer(turn["content"]) if number > last_user or not system else turn["content"]
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
    if message["role"] == "assistant":
        return [header, Answer(message["content"])]
    return [header + message["content"]]


def _template(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[Segment]:
    """By the checkpoint's own template. An answer is what a turn adds to the generation prompt."""
    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.path.parent}: the checkpoint has no chat template; name another prompt style")
    # A special token that somebody writes is marked by a character that nobody uses, and so told from a template's.
    written = "".join(message["content"] for message in messages)
    mark = next(chr(code) for code in _PRIVATE_USE if chr(code) not in written)
    marked = [
        {**message, "content": tokenizer.special_pattern.sub(mark + r"\g<0>", message["content"])}
        for message in messages
    ]

    def rendered(count: int, opening: bool) -> str:
        return render_template(tokenizer.chat_template, marked[:count], tokenizer.special_tokens, opening)

    whole = rendered(len(messages), add_generation_prompt)
    place = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number == 0:
            continue
        prompt, answered = rendered(number, True), rendered(number + 1, False)
        bare = answered.rstrip()
        if any(match.end() == len(bare) for match in tokenizer.special_pattern.finditer(bare)):
            answered = bare  # white space after the token that ends a turn is nothing that the model says
        if answered.startswith(prompt) and whole.startswith(answered) and place <= len(prompt):
            yield from _split_at_special(tokenizer, whole[place : len(prompt)], mark, str)
            yield from _split_at_special(tokenizer, whole[len(prompt) : len(answered)], mark, Answer)
            place = len(answered)
    yield from _split_at_special(tokenizer, whole[place:], mark, str)


def _split_at_special(tokenizer: Tokenizer, text: str, mark: str, kind: type[str]) -> Iterator[Segment]:
    """`text` as pieces of a kind and control tokens, without the marks of special tokens that are text."""
    roles = {tokenizer.special_tokens.get("eos_token"): EOS, tokenizer.special_tokens.get("bos_token"): BOS}
    place = 0
    for match in tokenizer.special_pattern.finditer(text):
        if match.start() and text[match.start() - 1] == mark:
            continue
        # An answer that is empty is one still, and the token after it is learned.
        if kind is Answer or match.start() > place:
            yield kind(text[place : match.start()].replace(mark, ""))
        yield roles.get(match[0], Control(match[0]))
        place = match.end()
    if place < len(text):
        yield kind(text[place:].replace(mark, ""))


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
    "template": _template,
}
STYLES = tuple(_RENDERERS)
_STOP_STRINGS = {
    "alpaca": ["### Instruction:"],
    "llama2": ["[INST]"],
    "mistral": ["[INST]"],
    "tinyllama": ["<|user|>", "<|system|>", "<|assistant|>"],
}
