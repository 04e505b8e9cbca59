"""`lit_llama.prompts` against transformers' apply_chat_template with the chat templates of the published models."""

import json
from pathlib import Path

import pytest
from tokenizer_files import write_llama_json, write_rank_file, write_sentencepiece

from lit_llama.errors import InputError
from lit_llama.prompts import STYLES, detect_style, encode_chat, encode_prompt, stop_strings
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
    directories["tinyllama-first"] = write_llama_json(llama, root / "tinyllama-first", "first")
    for style, directory in directories.items():
        (directory / "chat_template.jinja").write_text(TEMPLATES[style.removesuffix("-first")])
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
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": TINYLLAMA}]}))
    assert detect_style(tmp_path) == "tinyllama"
    config.write_text(json.dumps({"chat_template": "{{ messages[0].content }}###User"}))
    with pytest.raises(InputError, match="unknown chat template; name the prompt style, one of plain, alpaca"):
        detect_style(tmp_path)


@pytest.mark.parametrize(
    ("style", "messages", "message"),
    [
        ("vicuna", [USER], "unknown prompt style 'vicuna'; choose one of plain, alpaca, llama2"),
        ("plain", [], "at least one message"),
        ("plain", [{"role": "robot", "content": "x"}], "message 0: expected a role"),
        ("plain", [{"role": "user", "content": 3}], "message 0: expected a role"),
        ("plain", [USER, SYSTEM], "message 1: a system message can only be the first"),
        ("plain", [USER | {"input": "x"}], "prompt style plain has no place for an input"),
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
