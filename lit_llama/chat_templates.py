"""Jinja chat templates: rendering one that came with a checkpoint, and one for each prompt style of ours.

Here: strings only. What becomes a control token, and what of a conversation is learned, is in `lit_llama.prompts`.
A template is code of whoever published the checkpoint: it runs in Jinja's sandbox, and sees texts only.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from lit_llama.errors import InputError

ALPACA_HEADER = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_HEADER_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)

_SPLIT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = none %}{% set turns = messages %}{% endif %}"
)
_EACH_TURN = (
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate, the user first') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
)
_SYSTEM_ABOVE = r"(system + '\n\n' if system and %s else '') + message['content']"
_ANSWER_AND_END = "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"

TEMPLATES = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token }}{% else %}"
        r"{{ ('\n\n' if loop.index0 and loop.previtem['role'] != 'assistant' else '') + message['content'] }}"
        "{% endif %}{% endfor %}"
    ),
    "alpaca": (
        f"{_SPLIT_SYSTEM}{{{{ bos_token }}}}{{% if system %}}{{{{ system }}}}{{% elif turns[0]['input'] %}}"
        f"{{{{ '{ALPACA_HEADER_WITH_INPUT}' }}}}{{% else %}}{{{{ '{ALPACA_HEADER}' }}}}{{% endif %}}{_EACH_TURN}"
        r"{{ '\n\n### Instruction:\n' + message['content'] }}"
        r"{% if message['input'] %}{{ '\n\n### Input:\n' + message['input'] }}{% endif %}"
        rf"{{{{ '\n\n### Response:' }}}}{_ANSWER_AND_END}"
    ),
    "llama2": (
        _SPLIT_SYSTEM + _EACH_TURN + r"{{ bos_token + '[INST] ' + "
        r"(('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is not none else '') + message['content'])"
        ".strip() + ' [/INST]' }}{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}"
        "{% endif %}{% endfor %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>'"
        r" + '\n\n' + message['content'].strip() + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        f"{_SPLIT_SYSTEM}{{{{ bos_token }}}}{_EACH_TURN}"
        f"{{{{ '[INST] ' + {_SYSTEM_ABOVE % 'loop.first'} + ' [/INST]' }}}}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "mistral-v3": (
        f"{_SPLIT_SYSTEM}{{{{ bos_token }}}}{_EACH_TURN}"
        f"{{{{ '[INST] ' + {_SYSTEM_ABOVE % 'loop.revindex <= 2'} + '[/INST]' }}}}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "tinyllama": (
        r"{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "chatml": (
        r"{% for message in messages %}"
        r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
"""By style. A template that a checkpoint brings along itself is style "template" and not here."""


def with_default_system(template: str, system: str) -> str:
    """The template, with a system message for conversations that have none."""
    message = f"{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}"
    condition = "{% if messages[0]['role'] != 'system' %}"
    return f"{condition}{{% set messages = [{message}] + messages %}}{{% endif %}}{template}"


def render_template(
    template: str, messages: Sequence[Mapping[str, str]], special_tokens: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """What a chat template makes of a conversation, as the apply_chat_template of transformers renders it.

    Args:
        special_tokens: what the template may write, {"bos_token": "<s>", ...}.

    Raises:
        InputError: the template is no valid Jinja, or refuses the conversation.
    """
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except InputError:
        raise
    except Exception as error:  # a template can raise what it likes
        reason = " ".join(str(error).split())
        raise InputError(
            f"the checkpoint's chat template refuses this conversation ({reason}); name another prompt style"
        ) from None


@lru_cache
def _compiled(template: str) -> Any:
    try:
        from jinja2 import TemplateError, ext, nodes
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("a checkpoint's chat template needs Jinja; pip install jinja2") from None

    class Generation(ext.Extension):
        """{% generation %} marks what a model says, for trainers that ask; it shows nothing of its own."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment.from_string(template)
