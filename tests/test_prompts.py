"""`lit_llama.prompts` against transformers' apply_chat_template with the chat templates of the published models."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizer_files import write_llama_json, write_rank_file, write_sentencepiece

from lit_llama.chat_templates import render_template
from lit_llama.errors import InputError
from lit_llama.prompts import (
    BOS,
    EOS,
    STYLES,
    Control,
    chat_template,
    detect_style,
    encode_chat,
    encode_example,
    encode_prompt,
    render,
    stop_strings,
    with_system,
    write_chat_template,
)
from lit_llama.tokenizer import Tokenizer, rank_file_to_json

# meta-llama/Meta-Llama-3-8B-Instruct
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# meta-llama/Llama-2-7b-chat-hf, without the check of alternating roles
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\n' + system_message + "
    "'\n<</SYS>>\n\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# TinyLlama/TinyLlama-1.1B-Chat-v1.0
TINYLLAMA = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# HuggingFaceTB/SmolLM2-135M-Instruct
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# mistralai/Mistral-7B-Instruct-v0.1, where a system message goes into the first user turn
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.first and system_message is defined %}{{- '[INST] ' + system_message + '\n\n' + message['content'] + "
    "' [/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}"
)
# mistralai/Mistral-7B-Instruct-v0.3, its branches for tools left out
MISTRAL_V3 = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}"
    "{%- for message in loop_messages %}{%- if message['role'] == 'user' %}"
    "{%- if loop.last and system_message is defined %}{{- '[INST] ' + system_message + '\n\n' + message['content'] + "
    "'[/INST]' }}{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
    "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}"
)
TEMPLATES = {
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral-v3": MISTRAL_V3,
    "tinyllama": TINYLLAMA,
    "chatml": SMOLLM2,
}

# Templates that are none of the named styles, of the kind that checkpoints bring along.
QWEN = (
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {{- '# Tools\\n' }}\n    {%- for tool in tools %}\n"
    "        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '<|im_end|>\\n' }}\n{%- else %}\n"
    "    {%- if messages[0]['role'] == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n    {%- else %}\n"
    "        {{- '<|im_start|>system\\nYou\\'re Qwen.<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
    "{%- for message in messages %}\n    {%- if loop.first and message.role == 'system' %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{- message.content + '<|im_end|>' }}"
    "{% endgeneration %}{{- '\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n"
)
LLAMA31 = (
    "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- set date_string = strftime_now('%b %Y') %}\n"
    "{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
    "{{- system_message }}\n{{- '<|eot_id|>' }}\n{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
    "'<|eot_id|>' }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
)
MISTRAL_OLD = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
VICUNA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set turns = messages[1:] %}{% else %}"
    "{% set turns = messages %}{% endif %}{% for message in turns %}{% if message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
OWN_TEMPLATES = {
    "qwen": ("chatml", QWEN),
    "llama-3.1": ("llama3", LLAMA31),
    "mistral-old": ("mistral", MISTRAL_OLD),
    "gemma": ("gemma", GEMMA),
    "vicuna": ("tinyllama", VICUNA),
}
"""By name: the style whose tokenizer it goes with, and the template."""

USER = {"role": "user", "content": "What is the capital of Norway?"}
ASSISTANT = {"role": "assistant", "content": "Oslo,\n  naïvely. 👍"}
AGAIN = {"role": "user", "content": "The river  bank\n\nof größere Bäume?"}
SYSTEM = {"role": "system", "content": "Answer as helpfully as possible."}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ASSISTANT, AGAIN], [SYSTEM, USER, ASSISTANT, AGAIN, ASSISTANT, USER]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Path]:
    """For each style a directory with a tokenizer of the kind that its models have, and the chat template."""
    root = tmp_path_factory.mktemp("styles")
    llama = write_sentencepiece(root / "sentencepiece")
    controls = ("[INST]", "[/INST]")
    mistral = write_sentencepiece(root / "sentencepiece-v3", control_symbols=list(controls))
    ranks = write_rank_file(root / "ranks") / "tokenizer.model"
    directories = {style: root / style for style in TEMPLATES}
    for style in ("llama2", "mistral", "tinyllama"):
        write_llama_json(llama, directories[style], "prepend")
    write_llama_json(mistral, directories["mistral-v3"], "first", controls)
    for style, definition, bos, eos in (
        ("llama3", rank_file_to_json(ranks.read_bytes(), ranks), "<|begin_of_text|>", "<|eot_id|>"),
        ("chatml", (tiny_checkpoint / "tokenizer.json").read_bytes(), "<|im_start|>", "<|im_end|>"),
    ):
        directories[style].mkdir()
        (directories[style] / "tokenizer.json").write_bytes(definition)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
        (directories[style] / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = ("<start_of_turn>", "<end_of_turn>")
    gemma = write_sentencepiece(root / "sentencepiece-gemma", control_symbols=list(turns))
    directories["gemma"] = write_llama_json(gemma, root / "gemma", "prepend", turns)
    for name, (base, _) in OWN_TEMPLATES.items():
        if base != name:
            directories[name] = Path(shutil.copytree(directories[base], root / name))
    directories["tinyllama-first"] = write_llama_json(llama, root / "tinyllama-first", "first")
    for style, directory in directories.items():
        (directory / "chat_template.jinja").write_text(
            OWN_TEMPLATES[style][1] if style in OWN_TEMPLATES else TEMPLATES[style.removesuffix("-first")]
        )
    return directories | {"sentencepiece": llama, "sentencepiece-v3": mistral}


@pytest.mark.parametrize("name", [*TEMPLATES, "tinyllama-first"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_ids_equal_apply_chat_template(name: str, messages: list[dict], checkpoints: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(checkpoints[name])
    tokenizer, style = Tokenizer.from_checkpoint(checkpoints[name]), name.removesuffix("-first")
    for add_generation_prompt in (True, False):
        expected = reference.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, return_dict=False
        )
        assert encode_chat(tokenizer, style, messages, add_generation_prompt) == expected


@pytest.mark.parametrize("style", TEMPLATES)
def test_one_prompt_is_one_user_turn_and_the_opening_of_the_answer(style: str, checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints[style])
    assert encode_prompt(tokenizer, style, USER["content"]) == encode_chat(tokenizer, style, [USER])
    with_system = encode_prompt(tokenizer, style, USER["content"], system=SYSTEM["content"])
    assert with_system == encode_chat(tokenizer, style, [SYSTEM, USER])
    assert with_system != encode_prompt(tokenizer, style, USER["content"])


@pytest.mark.parametrize("style", [*TEMPLATES, "alpaca"])
def test_a_prompt_is_the_beginning_of_its_conversation(style: str, checkpoints: dict[str, Path]) -> None:
    """What a model is asked with is what stands before the answer it learns from."""
    tokenizer = Tokenizer.from_checkpoint(checkpoints.get(style, checkpoints["llama2"]))
    prompt = encode_chat(tokenizer, style, [SYSTEM, USER])
    conversation = encode_chat(tokenizer, style, [SYSTEM, USER, ASSISTANT], add_generation_prompt=False)
    assert conversation[: len(prompt)] == prompt
    assert tokenizer.decode(conversation[len(prompt) :]).strip() == ASSISTANT["content"]
    assert tokenizer.stop_ids & set(conversation[len(prompt) :])


@pytest.mark.parametrize("style", TEMPLATES)
def test_text_never_becomes_a_control_token(style: str, checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints[style])
    names = ("<s>", "</s>", "[INST]", "[/INST]", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>")
    controls = {tokenizer.special_id(name) for name in names if tokenizer.has_special(name)}

    def used(text: str) -> list[int]:
        messages = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        return [token_id for token_id in encode_chat(tokenizer, style, messages) if token_id in controls]

    assert used("harmless") and used("".join(names)) == used("harmless")


def test_mistral_and_llama2_pieces_are_texts_of_their_own(checkpoints: dict[str, Path]) -> None:
    """As mistral-common and Meta encode them, whatever tokenizer.json makes of text behind a special token."""
    text = Tokenizer.from_checkpoint(checkpoints["sentencepiece"])
    assert encode_chat(text, "mistral", [USER, ASSISTANT, AGAIN]) == [
        1,
        *text.encode(f"[INST] {USER['content']} [/INST]"),
        *text.encode(ASSISTANT["content"]),
        2,
        *text.encode(f"[INST] {AGAIN['content']} [/INST]"),
    ]
    assert encode_chat(text, "llama2", [SYSTEM, USER, ASSISTANT, AGAIN]) == [
        1,
        *text.encode(
            f"[INST] <<SYS>>\n{SYSTEM['content']}\n<</SYS>>\n\n{USER['content']} [/INST] {ASSISTANT['content']} "
        ),
        2,
        1,
        *text.encode(f"[INST] {AGAIN['content']} [/INST]"),
    ]
    for name in ("sentencepiece-v3", "mistral-v3"):
        control = Tokenizer.from_checkpoint(checkpoints[name])
        begin, end = control.special_id("[INST]"), control.special_id("[/INST]")
        assert encode_chat(control, "mistral-v3", [SYSTEM, USER, ASSISTANT, AGAIN]) == [
            *(1, begin, *control.encode(USER["content"]), end, *control.encode(ASSISTANT["content"]), 2),
            *(begin, *control.encode(f"{SYSTEM['content']}\n\n{AGAIN['content']}"), end),
        ]


def test_llama3_golden_layout(checkpoints: dict[str, Path]) -> None:
    """The ids that Meta's tests of Llama 3 name, counted from the number of ranks."""
    tokenizer = Tokenizer.from_checkpoint(checkpoints["llama3"])
    ranks = tokenizer.vocab_size - 256
    text, turn = tokenizer.encode("This is a test sentence."), tokenizer.encode("\n\n")
    assert [
        i - ranks if i >= ranks else i for i in encode_prompt(tokenizer, "llama3", " This is a test sentence.\n")
    ] == [
        *(0, 6, *tokenizer.encode("user"), 7, *turn, *text, 9),
        *(6, *tokenizer.encode("assistant"), 7, *turn),
    ]


def test_alpaca_text(checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints["llama2"])
    assert encode_prompt(tokenizer, "alpaca", "Name a river.") == tokenizer.encode(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a river.\n\n### Response:",
        bos=True,
    )
    with_input = [{"role": "user", "content": "Name its capital.", "input": "Norway"}]
    assert tokenizer.decode(encode_chat(tokenizer, "alpaca", with_input)) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write "
        "a response that appropriately completes the request.\n\n### Instruction:\nName its capital.\n\n### Input:\n"
        "Norway\n\n### Response:"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, "alpaca", "Hi", system="Be kind.")).startswith("Be kind.\n\n###")


def test_plain_is_the_text_with_the_tokenizers_own_bos(checkpoints: dict[str, Path]) -> None:
    adding = Tokenizer.from_checkpoint(checkpoints["llama2"])
    assert encode_prompt(adding, "plain", " The <s>") == adding.encode(" The <s>", bos=True)
    bare = Tokenizer.from_checkpoint(checkpoints["chatml"])
    assert encode_prompt(bare, "plain", "The river") == bare.encode("The river")
    assert bare.decode(encode_prompt(bare, "plain", "The river", system="Read.")) == "Read.\n\nThe river"


def test_default_system_message_is_the_templates(checkpoints: dict[str, Path], tiny_checkpoint: Path) -> None:
    smollm = Tokenizer.from_checkpoint(checkpoints["chatml"])
    default = "system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\n"
    assert smollm.decode(encode_prompt(smollm, "chatml", "Hi")) == f"{default}user\nHi\nassistant\n"
    assert smollm.decode(encode_prompt(smollm, "chatml", "Hi", system="")) == "system\n\nuser\nHi\nassistant\n"
    other = Tokenizer.from_checkpoint(tiny_checkpoint)
    assert other.decode(encode_prompt(other, "chatml", "Hi")) == "user\nHi\nassistant\n"


def test_detect_style(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    assert {style: detect_style(checkpoints[style]) for style in TEMPLATES} == {style: style for style in TEMPLATES}
    assert detect_style(checkpoints["sentencepiece"]) == "plain"
    assert {detect_style(checkpoints[name]) for name in OWN_TEMPLATES} == {"template"}
    shutil.copy(checkpoints["tinyllama"] / "tokenizer.json", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    config.write_text(json.dumps(settings | {"chat_template": [{"name": "default", "template": TINYLLAMA}]}))
    assert detect_style(tmp_path) == "tinyllama"
    config.write_text(json.dumps(settings | {"chat_template": TINYLLAMA.replace("<|user|>", "<|human|>")}))
    assert detect_style(tmp_path) == "template"
    for broken, message in (("{% if %}", "conversation .Expected an"), ("{{ messages.x.y }}", "has no attribute")):
        config.write_text(json.dumps(settings | {"chat_template": broken}))
        with pytest.raises(InputError, match=message):
            detect_style(tmp_path)


# --- what is learned


def learned(tokenizer: Tokenizer, style: str, messages: list[dict]) -> list[tuple[list[int], str, list[str]]]:
    """Of each learned stretch: the ids before it, its text, and its control tokens."""
    ids, mask = encode_example(tokenizer, style, messages)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    starts = [at for at in range(len(ids)) if mask[at] and not (at and mask[at - 1])]
    found = []
    for start in starts:
        end = next((at for at in range(start, len(ids)) if not mask[at]), len(ids))
        controls = [text for token_id in ids[start:end] if (text := tokenizer.special_text(token_id))]
        found.append((ids[:start], tokenizer.decode(ids[start:end]), controls))
    return found


ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen": "<|im_end|>", "llama-3.1": "<|eot_id|>"}
ENDS |= {"gemma": "<end_of_turn>"}


@pytest.mark.parametrize("name", [*TEMPLATES, "tinyllama-first", "alpaca", "plain", *OWN_TEMPLATES])
@pytest.mark.parametrize("with_system", [False, True])
def test_before_each_answer_stands_what_generation_is_asked_with(
    name: str, with_system: bool, checkpoints: dict[str, Path]
) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints.get(name, checkpoints["llama2"]))
    style = "template" if name in OWN_TEMPLATES else name.removesuffix("-first")
    later = {"role": "assistant", "content": "Yes, </s> and <|im_end|>, [INST]."}
    messages = [*([SYSTEM] if with_system else []), USER, ASSISTANT, AGAIN, later]
    if with_system and name in ("gemma", "mistral-old"):
        with pytest.raises(InputError, match="chat template refuses this conversation .(System|Conversation) role"):
            encode_example(tokenizer, style, messages)
        return
    stretches = learned(tokenizer, style, messages)
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if name == "mistral-v3" and with_system:  # moves the system message to the last user turn
        answers = answers[1:]
    assert len(stretches) == len(answers)
    for (before, text, controls), number in zip(stretches, answers, strict=True):
        assert before == encode_chat(tokenizer, style, messages[:number])
        assert text.strip() == messages[number]["content"]
        assert controls == [ENDS.get(name, "</s>")]


def test_plain_is_a_prompt_and_its_completion(checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints["llama2"])
    prompt, completion = "Once upon a ", "time, the end."
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    ids, mask = encode_example(tokenizer, "plain", messages)
    answer = tokenizer.encode(completion, continuation=True)
    assert ids == [*tokenizer.encode(prompt, bos=True), *answer, tokenizer.eos_id]
    assert mask == [0] * (len(ids) - len(answer) - 1) + [1] * (len(answer) + 1)


def test_what_cannot_be_learned_is_named(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints["tinyllama"])
    for style in ("plain", "tinyllama", "llama2", "template"):
        with pytest.raises(InputError, match="nothing to learn"):
            encode_example(tokenizer, style, [USER])
        with pytest.raises(InputError, match="starts with the assistant"):
            encode_example(tokenizer, style, [SYSTEM, ASSISTANT, USER])
    thinking = Path(shutil.copytree(checkpoints["chatml"], tmp_path / "thinking"))
    prompt = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    (thinking / "chat_template.jinja").write_text(TINYLLAMA + prompt)
    with pytest.raises(InputError, match="does not put its generation prompt before an answer"):
        encode_example(Tokenizer.from_checkpoint(thinking), "template", [USER, ASSISTANT])
    with pytest.raises(InputError, match="has no chat template; name another"):
        encode_prompt(Tokenizer.from_checkpoint(checkpoints["sentencepiece"]), "template", "Hi")


def test_the_input_of_a_turn_goes_below_its_content(checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints["llama3"])
    given = {"role": "user", "content": "Name its capital.", "input": "Norway"}
    for style in ("llama3", "template", "plain"):
        joined = [{"role": "user", "content": "Name its capital.\n\nNorway"}]
        assert encode_chat(tokenizer, style, [given]) == encode_chat(tokenizer, style, joined)


def test_an_empty_system_message_is_none_but_where_it_replaces_a_default(checkpoints: dict[str, Path]) -> None:
    smollm, llama = (Tokenizer.from_checkpoint(checkpoints[name]) for name in ("chatml", "llama2"))
    assert encode_prompt(llama, "llama2", "Hi", system="") == encode_prompt(llama, "llama2", "Hi")
    assert with_system(smollm, "chatml", [USER], "") == [{"role": "system", "content": ""}, USER]
    assert with_system(smollm, "chatml", [SYSTEM, USER], "Other") == [SYSTEM, USER]


# --- a checkpoint's own template


@pytest.mark.parametrize("name", [*OWN_TEMPLATES, *TEMPLATES])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_own_template_equals_apply_chat_template(name: str, messages: list[dict], checkpoints: dict[str, Path]) -> None:
    import jinja2
    from transformers import AutoTokenizer

    reference, tokenizer = (
        AutoTokenizer.from_pretrained(checkpoints[name]),
        Tokenizer.from_checkpoint(checkpoints[name]),
    )
    for add_generation_prompt in (True, False):
        options = {"add_generation_prompt": add_generation_prompt, "return_dict": False}
        try:
            expected = reference.apply_chat_template(messages, **options)
        except jinja2.TemplateError as error:
            with pytest.raises(InputError, match=str(error).split("/")[0]):
                encode_chat(tokenizer, "template", messages, add_generation_prompt)
            continue
        assert encode_chat(tokenizer, "template", messages, add_generation_prompt) == expected


@pytest.mark.parametrize("name", ["qwen", "llama-3.1", "gemma", "mistral-old"])
def test_special_strings_of_a_user_stay_text_in_an_own_template(name: str, checkpoints: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    reference, tokenizer = (
        AutoTokenizer.from_pretrained(checkpoints[name]),
        Tokenizer.from_checkpoint(checkpoints[name]),
    )
    content = "a<|im_end|>\n<|im_start|>b </s><s> <|eot_id|> \ue000<end_of_turn>\ue001"
    messages = [{"role": role, "content": content} for role in ("user", "assistant", "user")]
    ids = encode_chat(tokenizer, "template", messages)
    harmless = [{"role": role, "content": "b"} for role in ("user", "assistant", "user")]
    control_ids = [token_id for token_id in ids if tokenizer.special_text(token_id)]
    assert control_ids == [i for i in encode_chat(tokenizer, "template", harmless) if tokenizer.special_text(i)]
    assert tokenizer.decode(ids).count(content) == 3
    if tokenizer.spaces_segments:
        return  # there transformers encodes a text in several pieces, and so with other boundaries
    unmarked = [{**message, "content": content.replace("\ue000", "").replace("\ue001", "")} for message in messages]
    expected = reference.apply_chat_template(
        unmarked, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    assert reference.decode(encode_chat(tokenizer, "template", unmarked)) == reference.decode(expected)


# --- a template for each style


def spelled(tokenizer: Tokenizer, style: str, messages: list[dict], add_generation_prompt: bool) -> str:
    texts = {BOS: tokenizer.special_tokens.get("bos_token"), EOS: tokenizer.special_tokens.get("eos_token")}
    segments = render(tokenizer, style, messages, add_generation_prompt)
    return "".join(texts.get(part, part.text) if isinstance(part, Control) else part for part in segments)


@pytest.mark.parametrize("style", [style for style in STYLES if style != "template"])
@pytest.mark.parametrize("base", [None, "chatml"])
def test_the_template_of_each_style_renders_as_the_style(
    style: str, base: str | None, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Written into a checkpoint that had none, or another one; read by transformers."""
    from transformers import AutoTokenizer

    if base and style in ("llama3", "mistral-v3"):
        with pytest.raises(InputError, match="which prompt style .* needs"):
            write_chat_template(checkpoints[base], style)
        return
    directory = Path(
        shutil.copytree(checkpoints[base or style if style in TEMPLATES else base or "llama2"], tmp_path / "it")
    )
    if base is None:
        (directory / "chat_template.jinja").unlink()
    settings_file = directory / "tokenizer_config.json"
    settings_file.write_text(json.dumps(json.loads(settings_file.read_text()) | {"chat_template": "{{ 'old' }}"}))
    if base:
        shutil.copy(checkpoints[base] / "chat_template.jinja", directory)
    write_chat_template(directory, style)
    assert "chat_template" not in json.loads(settings_file.read_text())
    assert detect_style(directory) == style
    tokenizer, reference = Tokenizer.from_checkpoint(directory), AutoTokenizer.from_pretrained(directory)
    for messages in [*CONVERSATIONS, [USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, AGAIN, ASSISTANT]]:
        for opening in (True, False):
            options = {"add_generation_prompt": opening, "return_dict": False}
            text = reference.apply_chat_template(messages, tokenize=False, **options)
            if style == "mistral-v3":  # where it is the tokenizer that puts these spaces
                text = text.replace("[INST] ", "[INST]").replace("[/INST] ", "[/INST]")
            assert text == spelled(tokenizer, style, messages, opening)
            if len(messages) < 3 and opening and messages[-1] == USER:
                ids = reference.apply_chat_template(messages, **options)
                assert ids == encode_chat(tokenizer, style, messages)
                assert ids == encode_chat(tokenizer, "template", messages)


def test_alpaca_template_has_a_place_for_an_input(checkpoints: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints["llama2"])
    given = [{"role": "user", "content": "Name its capital.", "input": "Norway"}]
    rendered = render_template(chat_template(tokenizer, "alpaca"), given, {"bos_token": "<s>"}, True)
    assert rendered == spelled(tokenizer, "alpaca", given, True)


@pytest.mark.parametrize("style", ["llama3", "llama2", "chatml", "template"])
def test_a_templates_default_system_message(style: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    name = "llama-3.1" if style == "template" else style
    before = Tokenizer.from_checkpoint(checkpoints[name])
    directory = Path(shutil.copytree(checkpoints[name], tmp_path / "it"))
    system = 'Be "kind",\n{{ 1 }} and \\ naïve 👍.'
    write_chat_template(directory, style, system)
    ids = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        [USER], add_generation_prompt=True, return_dict=False
    )
    assert ids == encode_prompt(before, style, USER["content"], system=system)
    assert ids == encode_prompt(Tokenizer.from_checkpoint(directory), "template", USER["content"])


def test_the_token_that_ends_an_answer_ends_generation(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    directory = Path(shutil.copytree(checkpoints["llama3"], tmp_path / "it"))
    settings = json.loads((directory / "tokenizer_config.json").read_text()) | {"eos_token": "<|end_of_text|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    end, turn = (Tokenizer.from_checkpoint(directory).special_id(text) for text in ("<|end_of_text|>", "<|eot_id|>"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "top_p": 0.9}))
    write_chat_template(directory, "alpaca")
    assert json.loads((directory / "generation_config.json").read_text()) == {"eos_token_id": end, "top_p": 0.9}
    write_chat_template(directory, "llama3")
    written = json.loads((directory / "generation_config.json").read_text())
    assert turn in written["eos_token_id"] and end in written["eos_token_id"] and written["top_p"] == 0.9


@pytest.mark.parametrize(
    ("style", "messages", "message"),
    [
        ("vicuna", [USER], "unknown prompt style 'vicuna'; choose one of plain, alpaca, llama2"),
        ("plain", [], "at least one message"),
        ("plain", [{"role": "robot", "content": "x"}], "message 0: expected a role"),
        ("plain", [{"role": "user", "content": 3}], "message 0: expected a role"),
        ("plain", [USER, SYSTEM], "message 1: a system message can only be the first"),
        ("llama2", [USER, USER], "turn 1: in prompt style llama2 user and assistant alternate"),
        ("mistral", [SYSTEM], "prompt style mistral needs a user's turn"),
        ("chatml", [USER], r"no token <\|im_start\|>, which prompt style chatml needs"),
    ],
)
def test_what_cannot_be_rendered_is_named(
    style: str, messages: list[dict], message: str, checkpoints: dict[str, Path]
) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoints["llama2"])
    with pytest.raises(InputError, match=message):
        encode_chat(tokenizer, style, messages)


def test_stop_strings() -> None:
    assert all(isinstance(text, str) for style in STYLES for text in stop_strings(style))
    assert stop_strings("tinyllama")[0] == "<|user|>" and stop_strings("chatml") == stop_strings("plain") == []
    with pytest.raises(InputError, match="unknown prompt style"):
        stop_strings("vicuna")
