"""Fixtures: a tiny Llama checkpoint written by transformers, and a way to run the project's scripts as a user does."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

torch.set_num_threads(1)  # tiny models gain nothing from a second thread, and lose much on a busy machine

TEXT = """\
The quick brown fox jumps over the lazy dog. Mount Everest is the highest point of Nepal, at 8,849 metres.
Norway's coastline is 25,148 km long; its internet country code is .no and its capital is Oslo.
Brazil borders ten countries. The Amazon carries more water than any other river of the world.
"""


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers with grouped-query attention and a byte-level tokenizer, as a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-llama")
    write_tiny_tokenizer(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory


def write_tiny_tokenizer(directory: Path) -> None:
    """Byte-level BPE of 320 tokens with the special tokens and the ChatML template of SmolLM2-Instruct."""
    import json

    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[AddedToken(text, special=True) for text in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    config = {
        "add_bos_token": False,
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@cache
def warm_python() -> Path:
    """A `python` whose processes begin with torch imported, see `warm_python.py`; it is there until the tests end."""
    directory = Path(tempfile.mkdtemp(prefix="warm-python-"))
    program, address = Path(__file__).with_name("warm_python.py"), directory / "socket"
    command = [sys.executable, program, "serve", address]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    atexit.register(lambda: (server.kill(), shutil.rmtree(directory)))
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"{program} did not start")
    client = f'WARM_PYTHON="{address}" exec "{sys.executable}" -S -E -s "{program}" "$@"'
    (directory / "python").write_text(f"#!/bin/sh\n{client}\n")
    (directory / "python").chmod(0o755)
    return directory / "python"


def run_script(script: str, *arguments: object, check: bool = True, **options: object) -> subprocess.CompletedProcess:
    """Run `python script --name value ...` from the project's root and return the finished process, output as text."""
    env = options.pop("env", {})
    process = subprocess.run(
        # What the interpreter or a library reads when it starts needs one that starts.
        [
            sys.executable if env.keys() - {"OMP_NUM_THREADS"} else warm_python(),
            str(ROOT / script),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        cwd=options.pop("cwd", ROOT),
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        **options,
    )
    if check and process.returncode:
        raise AssertionError(f"{script} left with {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process


def write_adapters(checkpoint: Path, folder: Path, *names: str) -> Path:
    """LoRA adapters that change what the model says, one a subfolder of `folder`."""
    from lit_llama.checkpoint import load_model
    from lit_llama.lora import LoRAConfig, inject_lora, lora_layers, save_adapter

    for seed, name in enumerate(names):
        model = load_model(checkpoint, torch.float32)
        inject_lora(model, LoRAConfig(r=4))
        torch.manual_seed(seed)
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.3)
        save_adapter(model, folder / name, base_model=str(checkpoint))
    return folder
