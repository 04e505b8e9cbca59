"""scripts/export_gguf.py: what is written, by the gguf package, by PEFT and transformers, and by llama.cpp itself."""

import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from tokenizer_files import hard_texts, write_llama_json, write_rank_file, write_sentencepiece

from benchmarks.export.llama_cpp import LlamaCpp, answer, compare
from lit_llama import gguf_tokenizer, gguf_writing
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError, RunError
from lit_llama.gguf import half_split_rows, model_config, read_gguf, write_tokenizer
from lit_llama.gguf_tokenizer import tokenizer_metadata
from lit_llama.gguf_writing import STORAGES, TEXTS, export_adapter, export_model, interleaved_rows
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lit_llama.model import Llama
from lit_llama.prompts import encode_prompt
from lit_llama.tokenizer import Tokenizer

SCRIPT = "scripts/export_gguf.py"
QUESTION = "What is the capital of Norway?"
IDS = torch.tensor([[1, 5, 300, 17, 42, 9, 250]])


def write_model(checkpoint_dir: Path, out: Path, **changes: object) -> Path:
    """A random model with the tokenizer of `checkpoint_dir`."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=352, **changes)
    torch.manual_seed(1)
    model = Llama(config)
    model.initialize_(0.1)
    save_checkpoint(model, out, tokenizer_from=checkpoint_dir)
    return out


def write_lora(checkpoint_dir: Path, out: Path, **settings: object) -> Path:
    """An adapter that changes the logits a lot."""
    model = load_model(checkpoint_dir, torch.float32)
    torch.manual_seed(7)
    inject_lora(model, LoRAConfig(**{"r": 4, "alpha": 16} | settings))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    save_adapter(model, out, base_model=str(checkpoint_dir))
    return out


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every reason for a scaling other than alpha / r that one file can have."""
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"k_proj": 5.0}, "rslora": True}
    return write_lora(tiny_checkpoint, tmp_path_factory.mktemp("adapter"), **patterns)


def adapted(checkpoint_dir: Path, adapter_dir: Path) -> Llama:
    model = load_model(checkpoint_dir, torch.float32)
    load_adapter(model, adapter_dir)
    return model


# --- The container, by the gguf package


@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16", "F32"])
def test_numbers_are_stored_as_ggml_stores_them(kind: str) -> None:
    generator = np.random.default_rng(0)
    rows = (generator.standard_normal((300, 64)) * 10.0 ** generator.integers(-9, 3, (300, 1))).astype(np.float32)
    rows[0], rows[1, 32:] = 0, 0
    rows[2] = np.arange(64) + 0.5  # with 127 in a block, halves are rounded
    rows[2, [0, 32]] = 127
    ours = gguf_writing._encoded_weights(torch.from_numpy(rows), kind).contiguous().view(torch.uint8).numpy()
    expected = gguf.quantize(rows, gguf.GGMLQuantizationType[kind])
    assert ours.tobytes() == expected.tobytes()


def test_interleaved_rows_is_the_inverse_of_half_split_rows() -> None:
    rows = torch.arange(12).view(12, 1)
    assert interleaved_rows(rows, 6).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(half_split_rows(interleaved_rows(rows, 6), 6), rows)


def fields(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    read = gguf.GGUFReader(path).tensors
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in read}


@pytest.mark.parametrize("dtype", STORAGES)
def test_a_model(tiny_checkpoint: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    parity = export_model(tiny_checkpoint, adapter, tmp_path / "expert.gguf", dtype)
    stated, found = fields(tmp_path / "expert.gguf"), tensors(tmp_path / "expert.gguf")
    expected = {
        "general.architecture": "llama", "general.type": "model", "llama.block_count": 2, "llama.context_length": 512,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.vocab_size": 320,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 2,
    }  # fmt: skip
    assert {name: stated[name] for name in expected} == expected
    assert gguf.LlamaFileType(stated["general.file_type"]).name.endswith(dtype.upper())
    assert stated["tokenizer.chat_template"] == Tokenizer.from_checkpoint(tiny_checkpoint).chat_template
    assert "output.weight" not in found and len(found) == 2 + 2 * 9
    merged = dict(lora_layers(adapted(tiny_checkpoint, adapter)))
    for name, ours in (("attn_k", "self_attn.k_proj"), ("ffn_down", "mlp.down_proj")):
        weight = merged[f"model.layers.1.{ours}"].merged_weight()
        if name == "attn_k":
            # As llama.cpp's converter: heads, halves, pairs -> heads, pairs, halves.
            weight = weight.reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64)
        tolerance = {"f32": 0, "f16": 1e-3, "bf16": 8e-3, "q8_0": 8e-3}[dtype]
        assert (found[f"blk.1.{name}.weight"] - weight).abs().max() <= tolerance * weight.abs().max()
    assert parity.relative < parity.limit < 0.1 and parity.mean_difference < parity.max_difference


def test_shapes_and_scalings(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_gguf import llama3_divisors

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    shapes: dict[str, dict] = {
        "llama3": {
            "rope_theta": 500000.0,
            "rope_scaling": scaling | {"original_max_position_embeddings": 8192},
            "tie_word_embeddings": True,
        },
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 32},
        "mistral": {"sliding_window": 16, "model_type": "mistral", "rms_norm_eps": 1e-6},
    }
    for name, changes in shapes.items():
        source = write_model(tiny_checkpoint, tmp_path / name, **changes)
        export_model(source, None, tmp_path / f"{name}.gguf", "f16")
        config, expected = model_config(read_gguf(tmp_path / f"{name}.gguf")), LlamaConfig.from_json(source)
        config.token_ids = expected.token_ids = {}
        assert config == expected
        assert ("more than 16 tokens" in capsys.readouterr().err) == (name == "mistral")
    found = tensors(tmp_path / "llama3.gguf")
    assert torch.allclose(found["rope_freqs.weight"], torch.from_numpy(llama3_divisors(16, 500000.0, 8.0)), rtol=1e-5)
    assert "output.weight" in tensors(tmp_path / "linear.gguf")


def test_the_script_and_the_way_back(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    """Exported and converted back, transformers computes with it what PEFT computes with base and adapter."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    options = ("--checkpoint_dir", tiny_checkpoint, "--adapter_dir", adapter, "--out", tmp_path / "expert.gguf")
    process = run_script(SCRIPT, *options, "--dtype", "f32")
    assert process.stdout.strip() == str(tmp_path / "expert.gguf")
    assert "logits differ by" in process.stderr
    convert = runpy.run_path(str(ROOT / "scripts/convert_checkpoint.py"))["main"]
    convert(source=tmp_path / "expert.gguf", out_dir=tmp_path / "back", dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.no_grad():
        found, plain = back(IDS).logits, base(IDS).logits
        expected = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
    assert (plain - expected).abs().max() > 0.1
    assert torch.allclose(found, expected, atol=1e-5)

    process = run_script(SCRIPT, *options, check=False)
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "expert.gguf exists already" in process.stderr
    export = runpy.run_path(str(ROOT / SCRIPT))["main"]
    with pytest.raises(InputError, match="--adapter_only true needs --adapter_dir"):
        export(checkpoint_dir=tiny_checkpoint, out=tmp_path / "adapter.gguf", adapter_only=True)
    with pytest.raises(InputError, match="is a directory: name a file"):
        export(checkpoint_dir=tiny_checkpoint, out=tmp_path, overwrite=True)
    export(checkpoint_dir=tiny_checkpoint, adapter_dir=adapter, out=tmp_path / "adapter.gguf", adapter_only=True)
    assert fields(tmp_path / "adapter.gguf")["general.type"] == "adapter"


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_an_adapter(tiny_checkpoint: Path, adapter: Path, tmp_path: Path, dtype: str) -> None:
    """alpha / rank * B A of the file, with llama.cpp's own ranks, is PEFT's delta weight."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    export_adapter(tiny_checkpoint, adapter, tmp_path / "adapter.gguf", dtype)
    stated, found = fields(tmp_path / "adapter.gguf"), tensors(tmp_path / "adapter.gguf")
    assert (stated["general.type"], stated["adapter.type"], stated["adapter.lora.alpha"]) == ("adapter", "lora", 16.0)
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, adapter).base_model.model.model.layers[1]
    for name, module in {
        "attn_k": peft.self_attn.k_proj,
        "attn_v": peft.self_attn.v_proj,
        "ffn_down": peft.mlp.down_proj,
    }.items():
        lora_a, lora_b = (found[f"blk.1.{name}.weight.lora_{side}"] for side in "ab")
        assert lora_a.shape[0] == lora_b.shape[1] == (2 if name == "ffn_down" else 4)
        delta = stated["adapter.lora.alpha"] / len(lora_a) * lora_b @ lora_a
        expected = module.get_delta_weight("default").detach()
        if name == "attn_k":
            expected = expected.reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64)
        tolerance = {"f32": 1e-6, "f16": 2e-3, "bf16": 2e-2}[dtype]
        assert (delta - expected).abs().max() <= tolerance * expected.abs().max()
    assert len(found) == 2 * 7 * 2


def test_an_adapted_head(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Tied: merging unties, and an adapter alone is refused. Untied: it is output.weight's."""
    targets = {"targets": ["v_proj", "lm_head"]}
    tied = write_lora(tiny_checkpoint, tmp_path / "tied", **targets)
    export_model(tiny_checkpoint, tied, tmp_path / "tied.gguf", "f32")
    assert not torch.equal(*(tensors(tmp_path / "tied.gguf")[name] for name in ("output.weight", "token_embd.weight")))
    with pytest.raises(InputError, match="adapts the head of a tied model.*without --adapter_only"):
        export_adapter(tiny_checkpoint, tied, tmp_path / "adapter.gguf")
    untied = write_model(tiny_checkpoint, tmp_path / "untied")
    export_adapter(untied, write_lora(untied, tmp_path / "lora", **targets), tmp_path / "adapter.gguf")
    assert "output.weight.lora_b" in tensors(tmp_path / "adapter.gguf")


def test_the_template_an_adapter_was_trained_with(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    (tmp_path / "adapter" / "lit_config.yaml").write_text("eval: {probe_style: alpaca}\n")
    export_model(tiny_checkpoint, tmp_path / "adapter", tmp_path / "expert.gguf")
    assert "### Instruction:" in fields(tmp_path / "expert.gguf")["tokenizer.chat_template"]


# --- Tokenizers


def byte_level(directory: Path, tiny_checkpoint: Path, *before: dict, **model: object) -> Path:
    """The tiny tokenizer with other steps before its bytes."""
    shutil.copytree(tiny_checkpoint, directory)
    definition = json.loads((directory / "tokenizer.json").read_text())
    steps = [*before, definition["pre_tokenizer"] | {"use_regex": not before or before[0]["type"] == "Digits"}]
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    definition["model"] |= model
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    return directory


DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.fixture(
    scope="module", params=["gpt-2", "smollm", "rank file", "sentencepiece", "no space", "prepend", "always", "first"]
)
def tokenizer_dir(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    kind, directory = request.param, tmp_path_factory.mktemp("tokenizer")
    if kind == "gpt-2":
        yield kind, tiny_checkpoint
    elif kind == "smollm":
        yield kind, byte_level(directory / "smollm", tiny_checkpoint, DIGITS)
    elif kind == "rank file":
        yield "llama-bpe", write_rank_file(directory)
    elif kind in ("sentencepiece", "no space"):
        options = {"user_defined_symbols": ["<|user|>"], "add_dummy_prefix": kind == "sentencepiece"}
        yield "llama", write_sentencepiece(directory, **options)
    else:
        yield "llama", write_llama_json(write_sentencepiece(directory / "spm"), directory / kind, kind)


def test_tokenizers_survive(tokenizer_dir: tuple[str, Path], tmp_path: Path) -> None:
    kind, directory = tokenizer_dir
    tokenizer = Tokenizer.from_checkpoint(directory)
    metadata = tokenizer_metadata(tokenizer, tokenizer.vocab_size + 3)
    assert kind in (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre"))
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{tokenizer.vocab_size + 2}]"
    gguf_writing.write_gguf(tmp_path / "tokenizer.gguf", metadata, {}, "f32")
    for name, value in fields(tmp_path / "tokenizer.gguf").items():
        if name in metadata:
            assert value == metadata[name] or np.allclose(value, metadata[name])
    (tmp_path / "found").mkdir()
    write_tokenizer(read_gguf(tmp_path / "tokenizer.gguf"), tmp_path / "found")
    found = Tokenizer.from_checkpoint(tmp_path / "found")
    for text in (*TEXTS, *hard_texts(300)):
        assert found.encode(text) == tokenizer.encode(text), repr(text)
        assert found.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert (found.bos_id, found.eos_id, found.adds_bos) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos)
    assert found.stop_ids == tokenizer.stop_ids


@pytest.mark.parametrize(
    ("steps", "model", "message"),
    [
        (
            [{"type": "Split", "pattern": {"Regex": r"\d{2}"}, "behavior": "Isolated", "invert": False}],
            {},
            r"no pre-tokenizer known here \(smollm, llama-bpe, gpt-2\) that does .*d\{2\}.*ByteLevel",
        ),
        ([DIGITS], {"ignore_merges": True}, "and ignores merges"),
        ([], {"type": "WordLevel", "merges": [], "unk_token": "!"}, "a model of type WordLevel"),
    ],
)
def test_other_tokenizers_are_named(
    tiny_checkpoint: Path, tmp_path: Path, steps: list[dict], model: dict, message: str
) -> None:
    directory = byte_level(tmp_path / "other", tiny_checkpoint, *steps, **model)
    with pytest.raises(InputError, match=message) as caught:
        export_model(directory, None, tmp_path / "expert.gguf")
    assert "tokenizer.json: " in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("*.gguf*"))


def test_other_sentencepiece_models_are_named(tmp_path: Path) -> None:
    for options, message in (
        ({"model_type": "unigram", "hard_vocab_limit": False}, "not of type BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text .nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
    ):
        tokenizer = Tokenizer.from_checkpoint(write_sentencepiece(tmp_path, **options))
        with pytest.raises(InputError, match=message):
            tokenizer_metadata(tokenizer, 1000)
    with pytest.raises(InputError, match="600 tokens, but the model's embedding has 500"):
        tokenizer_metadata(Tokenizer.from_checkpoint(write_sentencepiece(tmp_path)), 500)


# --- What is refused, and what must not pass unseen


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dora": True}, "DoRA is more than"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens and lm_head trained"),
    ],
)
def test_what_can_only_be_merged(tiny_checkpoint: Path, tmp_path: Path, settings: dict, message: str) -> None:
    adapter_dir = write_lora(tiny_checkpoint, tmp_path / "adapter", **settings)
    with pytest.raises(InputError, match=f"{message}.*without --adapter_only"):
        export_adapter(tiny_checkpoint, adapter_dir, tmp_path / "adapter.gguf")
    export_model(tiny_checkpoint, adapter_dir, tmp_path / "expert.gguf", "f16")


@pytest.mark.parametrize("export", [export_model, export_adapter])
def test_other_kinds_of_adapters_are_named(tiny_checkpoint: Path, tmp_path: Path, export: object) -> None:
    for kind in ("PREFIX_TUNING", "ADAPTION_PROMPT", "LORA_TREE"):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
        with pytest.raises(InputError, match=f"adapter_config.json: peft_type is '{kind}'; only 'LORA' is supported"):
            export(tiny_checkpoint, tmp_path, tmp_path / "expert.gguf")


def test_a_quantized_base_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "nf4")
    stated = json.loads((tmp_path / "nf4" / "config.json").read_text())
    stated["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(stated))
    with pytest.raises(InputError, match="config.json: quantization_config = .* is not supported"):
        export_model(tmp_path / "nf4", None, tmp_path / "expert.gguf")


def test_what_a_type_cannot_hold_is_named(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = 7e4
    save_checkpoint(model, tmp_path / "large", tokenizer_from=tiny_checkpoint)
    with pytest.raises(InputError, match="blk.1.ffn_up.weight has numbers that are not finite as f16"):
        export_model(tmp_path / "large", None, tmp_path / "expert.gguf", "f16")
    with pytest.raises(InputError, match="lora_b has rows of 4 weights, which Q8_0 cannot store in blocks of 32"):
        export_adapter(tiny_checkpoint, adapter, tmp_path / "expert.gguf", "q8_0")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("broken", "replacement", "message"),
    [
        ("interleaved_rows", lambda rows, head_dim: rows, "does not compute what the source does: logits differ by"),
        ("_encoded_weights", lambda rows, kind: rows * 1.01, "was not written as it is: off by more than f32 rounds"),
        ("_pre_tokenizer_name", lambda *_: "smollm", "tokenizer.json: written as GGUF, it encodes .The quick"),
    ],
)
def test_a_wrong_file_is_not_left(
    tiny_checkpoint: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: str,
    replacement: object,
    message: str,
) -> None:
    """Were the writing wrong in one place, no file would appear."""
    monkeypatch.setattr(gguf_tokenizer if broken == "_pre_tokenizer_name" else gguf_writing, broken, replacement)
    with pytest.raises(RunError, match=message):
        export_model(tiny_checkpoint, adapter, tmp_path / "expert.gguf", "f32")
    if broken != "_pre_tokenizer_name":
        with pytest.raises(RunError, match=message):
            export_adapter(tiny_checkpoint, adapter, tmp_path / "expert.gguf")
    assert not list(tmp_path.iterdir())


# --- llama.cpp


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 5e-2)]
)  # llama.cpp rounds activations to the type of the weights
def test_llama_cpp_answers_the_same(
    tiny_checkpoint: Path, adapter: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    pytest.importorskip("xllamacpp")
    model, tokenizer = adapted(tiny_checkpoint, adapter), Tokenizer.from_checkpoint(tiny_checkpoint)
    prompt = encode_prompt(tokenizer, "template", QUESTION)
    export_model(tiny_checkpoint, adapter, tmp_path / "expert.gguf", dtype)
    export_model(tiny_checkpoint, None, tmp_path / "base.gguf", dtype)
    export_adapter(tiny_checkpoint, adapter, tmp_path / "adapter.gguf")
    for file, added in (("expert", None), ("base", tmp_path / "adapter.gguf")):
        llama_cpp = LlamaCpp(tmp_path / f"{file}.gguf", added)
        parity = compare(llama_cpp, model, [prompt, IDS[0].tolist()], 8)
        assert parity["relative"] <= tolerance
        if dtype == "f32":
            assert parity["same_first_choice"] == 1
            assert llama_cpp.answer(QUESTION, 12) == answer(model, tokenizer, prompt, 12)


@pytest.mark.parametrize("name", ["llama3", "linear"])
def test_llama_cpp_scales_positions_the_same(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    pytest.importorskip("xllamacpp")
    scaling = {"rope_type": name, "factor": 8.0}
    if name == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    source = write_model(tiny_checkpoint, tmp_path / name, rope_scaling=scaling, head_dim=32)
    export_model(source, None, tmp_path / "model.gguf", "f32")
    parity = compare(LlamaCpp(tmp_path / "model.gguf"), load_model(source, torch.float32), [list(range(3, 99))], 4)
    assert parity["relative"] <= 1e-5


def test_llama_cpp_encodes_the_same(tokenizer_dir: tuple[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    kind, directory = tokenizer_dir
    tokenizer = Tokenizer.from_checkpoint(directory)
    config = LlamaConfig(32, 1, 1, 32, tokenizer.vocab_size, token_ids={"eos_token_id": tokenizer.eos_id})
    model = Llama(config)
    model.initialize_()
    save_checkpoint(model, tmp_path / "model", tokenizer_from=directory)
    export_model(tmp_path / "model", None, tmp_path / "model.gguf")
    llama_cpp = LlamaCpp(tmp_path / "model.gguf")
    # Ours spells U+2581 by its bytes; llama.cpp puts a space after user-defined tokens.
    for text in (text for text in (*TEXTS, *hard_texts(150)) if "\u2581" not in text and "<|user|>" not in text):
        assert llama_cpp.tokenize(text) == tokenizer.encode(text), repr(text)
