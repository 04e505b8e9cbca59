"""The CPU's decoder against transformers and PEFT, and itself: alone and beside others, by one thread and by more."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from lit_llama import cpu_decode
from lit_llama.adapters import load_directory
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.cpu_decode import cpu_decoder
from lit_llama.generation import generate, prepare_to_generate
from lit_llama.kv_cache import KVCache
from lit_llama.lora import LoRAConfig, inject_lora, lora_layers, save_adapter
from lit_llama.lora_tree import LoRATreeConfig, inject_lora_tree
from lit_llama.model import Llama
from lit_llama.prompt_tuning import PrefixConfig, inject_prefix
from lit_llama.quantization import QuantizedLinear


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(**changes: object) -> Llama:
    shape = dict(hidden_size=72, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=12)
    config = LlamaConfig(**shape | dict(intermediate_size=104, vocab_size=320, max_position_embeddings=256) | changes)
    torch.manual_seed(0)
    model = Llama(config)
    model.initialize_(std=0.15)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval().requires_grad_(False)


FOUR_BITS = ["int4", "nf4", "nf4-dq"]
WHOLE_GROUPS = dict(hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=192)
WEIGHTS = pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", *FOUR_BITS])


def model_of(weights: str, **changes: object) -> Llama:
    """A random model with its linear weights in fp32, bf16, 8 or 4 bits."""
    model = random_model(**(WHOLE_GROUPS if weights in FOUR_BITS else {}) | changes)
    if weights == "bf16":
        return model.bfloat16()
    if weights != "fp32":
        for name, layer in list(model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.set_submodule(name, QuantizedLinear.from_weight(layer.weight, weights))
    return model


def random_adapter(model: Llama, seed: int = 0, **options: object) -> None:
    inject_lora(model, LoRAConfig(r=5, **options))
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    model.eval()


def token_ids(rows: int, length: int) -> Tensor:
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def decoded(
    model: Llama, ids: Tensor, read: int, padding: Tensor | None = None, threads: int = 1, a_step: int = 1
) -> Tensor:
    """Logits (rows, length - read, vocab) of `ids`, of which some are read as a prompt, in two pieces."""
    torch.set_num_threads(threads)
    decoder = cpu_decoder(model)
    torch.set_num_threads(1)
    assert decoder is not None
    cache = KVCache(model.config, len(ids), ids.shape[1], model.model.norm.weight.dtype, padding=padding)
    for piece in ids[:, :read].split(-(-read // 2), dim=1):
        decoder.read(piece, cache)
    return torch.cat([decoder(tokens.contiguous(), cache) for tokens in ids[:, read:].split(a_step, dim=1)], dim=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "num_key_value_heads": 6},
        {"sliding_window": 9, "model_type": "mistral"},
        {
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
    ids=["plain", "tied", "sliding window", "llama3 rope"],
)  # fmt: skip
def test_logits_are_those_of_transformers(tiny_checkpoint: Path, tmp_path: Path, changes: dict) -> None:
    save_checkpoint(random_model(**changes), tmp_path / "base", tokenizer_from=tiny_checkpoint)
    model = load_model(tmp_path / "base", dtype=torch.float32).eval()
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    ids = token_ids(3, 60)
    with torch.inference_mode():
        expected = peer(ids).logits[:, 20:]
    torch.testing.assert_close(decoded(model, ids, 20), expected, rtol=1e-4, atol=1e-4)


@WEIGHTS
def test_rows_are_computed_as_each_would_be_alone(weights: str) -> None:
    model, ids = model_of(weights), token_ids(3, 30)
    together = decoded(model, ids, 10)
    assert all(torch.equal(together[row], decoded(model, ids[[row, row]], 10)[0]) for row in range(3))
    # Left-padded: the first tokens of a row are nothing.
    padding = torch.tensor([0, 3, 7])
    padded = decoded(model, ids, 10, padding)
    for row, nothing in enumerate(padding.tolist()):
        alone = decoded(model, ids[[row, row], nothing:], 10 - nothing)[0]
        if weights != "bf16":  # whose prompts are products of PyTorch's, by as many rows as there are
            torch.testing.assert_close(padded[row], alone, rtol=1e-5, atol=1e-5)


@WEIGHTS
def test_several_tokens_a_step_are_computed_as_one_by_one(weights: str) -> None:
    model = model_of(weights, sliding_window=9, model_type="mistral")
    ids, padding = token_ids(3, 31), torch.tensor([0, 3, 7])
    one_by_one = decoded(model, ids, 10, padding)
    assert torch.equal(decoded(model, ids, 10, padding, a_step=4), one_by_one)
    assert torch.equal(decoded(model, ids, 10, padding, threads=3, a_step=21), one_by_one)


@WEIGHTS
def test_threads_share_the_work_and_change_nothing(weights: str) -> None:
    model = model_of(weights, hidden_size=320, intermediate_size=704)  # several pieces a product
    ids = token_ids(4, 24)
    assert torch.equal(decoded(model, ids, 4, threads=3), decoded(model, ids, 4))


def test_bf16_is_no_further_from_the_truth_than_the_model_itself() -> None:
    model, ids = random_model().bfloat16(), token_ids(2, 40)
    truth = random_model()
    truth.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    with torch.inference_mode():
        expected, own = truth(ids)[:, 20:], model(ids)[:, 20:].float()
    found = decoded(model, ids, 20)
    assert 0 < (found - expected).abs().max() <= (own - expected).abs().max()


@pytest.mark.parametrize("quantize", ["int8", *FOUR_BITS])
def test_quantized_weights_are_used_as_stored(tiny_checkpoint: Path, tmp_path: Path, quantize: str) -> None:
    base, shape = tmp_path / "base", WHOLE_GROUPS | {"tie_word_embeddings": True}
    save_checkpoint(random_model(**shape), base, tokenizer_from=tiny_checkpoint)
    model = load_model(base, torch.float32, quantize=quantize, embeddings="int8").eval()
    dense = load_model(base, torch.float32).eval()
    for name in [name for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)]:
        weight, target = model.get_submodule(name).dequantize(torch.float32), name.replace(".table", "")
        dense.get_submodule(target).weight = torch.nn.Parameter(weight)
    dense.lm_head.weight = dense.model.embed_tokens.weight
    ids = token_ids(2, 40)
    with torch.inference_mode():
        expected = dense(ids)[:, 20:]
    torch.testing.assert_close(decoded(model, ids, 20), expected, rtol=1e-4, atol=1e-4)


def made_dense(model: Llama) -> list[Tensor]:
    """The weights of the quantized layers, in both dtypes; the head's in pieces where it is so."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    dense = [layer.dequantize(dtype) for layer in layers for dtype in (torch.float32, torch.bfloat16)]
    if model.lm_head.mode == "int8":
        dense += [piece for _, piece in model.lm_head.dense_pieces(torch.bfloat16)]
    return dense


@pytest.mark.parametrize("weights", ["int8", *FOUR_BITS])
def test_quantized_weights_are_made_dense_to_the_same_bits(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llama.quantization._ROWS", 128)
    model = model_of(weights)
    expected, decoder = made_dense(model), cpu_decoder(model)
    assert decoder is not None and model.lm_head.unpack is not None
    assert all(map(torch.equal, made_dense(model), expected))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("without", [["-mno-avx512f"], ["-mno-avx512f", "-mno-avx2", "-mno-fma"]])
def test_older_processors_compute_the_same(without: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, ids = [model_of(weights) for weights in ("int8", "int4", "nf4", "fp32")], token_ids(2, 20)
    dense = [made_dense(model) for model in models[:-1]]
    expected = [decoded(model, ids, 10) for model in models]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_decode, "_FLAGS", (*cpu_decode._FLAGS, *without))
    cpu_decode._library.cache_clear()
    try:
        for model, logits in zip(models, expected, strict=True):
            torch.testing.assert_close(decoded(model, ids, 10), logits, rtol=1e-4, atol=1e-4)
    finally:
        cpu_decode._library.cache_clear()
    for model, weights in zip(models, dense, strict=False):
        assert all(map(torch.equal, made_dense(model), weights))


@pytest.mark.parametrize("options", [{}, {"rslora": True, "targets": ["v_proj", "down_proj"]}, {"init": "pissa"}])
def test_adapters_act_as_in_peft(tiny_checkpoint: Path, tmp_path: Path, options: dict) -> None:
    from peft import PeftModel

    model = load_model(tiny_checkpoint, torch.float32)
    random_adapter(model, **options)
    save_adapter(model, tmp_path / "adapter", base_model=str(tiny_checkpoint))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    peer = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ids = token_ids(2, 40)
    with torch.inference_mode():
        expected = peer(ids).logits[:, 20:]
    torch.testing.assert_close(decoded(model, ids, 20), expected, rtol=1e-4, atol=1e-4)


def test_each_row_takes_its_adapter_of_a_bank(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for seed, options in enumerate(({}, {"targets": ["q_proj", "down_proj"]}, {"layers_to_transform": [1]})):
        model = load_model(tiny_checkpoint, torch.float32)
        random_adapter(model, seed, **options)
        save_adapter(model, tmp_path / f"adapter {seed}", base_model=str(tiny_checkpoint))
    model = load_model(tiny_checkpoint, torch.float32).eval()
    bank, _ = load_directory(model, tmp_path)
    prompts = [token_ids(1, length)[0].tolist() for length in (9, 30, 7, 12)]
    for chosen in (["adapter 2", None, "adapter 0", "adapter 1"], "adapter 1", None):
        bank.select(chosen)
        model.decoder = None
        expected = generate(model, prompts, 20)
        prepare_to_generate(model)
        assert model.decoder is not None
        assert generate(model, prompts, 20) == expected
    bank.memory_limit = 10**9
    assert cpu_decoder(model) is None


def test_greedy_text_is_the_same(tiny_checkpoint: Path) -> None:
    prompts = [token_ids(1, length)[0].tolist() for length in (1, 30, 7)]
    for changes in ({}, {"sliding_window": 9, "model_type": "mistral"}):
        model = random_model(**changes)
        expected = generate(model, prompts, 40)
        prepare_to_generate(model)
        assert model.decoder is not None
        assert generate(model, prompts, 40) == expected
        assert [generate(model, [prompt], 40)[0] for prompt in prompts] == expected


def test_in_bf16_a_prompt_beside_longer_ones_is_answered_as_alone() -> None:
    model = random_model(max_position_embeddings=512).bfloat16()
    prepare_to_generate(model)
    prompts = [token_ids(1, length)[0].tolist() for length in (1, 200, 37, 130)]
    assert generate(model, prompts, 20) == [generate(model, [prompt], 20)[0] for prompt in prompts]


def test_models_that_it_does_not_know_go_without(tiny_checkpoint: Path) -> None:
    assert cpu_decoder(random_model().to(torch.float16)) is None
    model = random_model(**WHOLE_GROUPS | {"intermediate_size": 96})
    mlp = model.model.layers[0].mlp
    for name in ("gate_proj", "up_proj"):  # the layers are of two kinds
        setattr(mlp, name, QuantizedLinear.from_weight(getattr(mlp, name).weight, "nf4"))
    assert cpu_decoder(model) is None
    mlp.down_proj = QuantizedLinear.from_weight(mlp.down_proj.weight, "nf4")  # a row is one and a half blocks
    assert mlp.down_proj.four_bits() is None and cpu_decoder(model) is None
    model = random_model()
    random_adapter(model, dora=True)
    assert cpu_decoder(model) is None
    model = random_model()
    random_adapter(model, targets=["q_proj", "lm_head"])
    assert cpu_decoder(model) is None
    model = random_model()
    inject_prefix(model, PrefixConfig(init="random"))
    assert cpu_decoder(model) is None
    model = random_model()
    inject_lora_tree(model, LoRATreeConfig(depth=1, r=4))
    assert cpu_decoder(model) is None
    expected = generate(model, [[5, 6, 7]], 8)
    prepare_to_generate(model)
    assert model.decoder is None
    assert generate(model, [[5, 6, 7]], 8) == expected


@pytest.mark.parametrize("compiler", ["none", "one that fails"])
def test_without_a_compiler_it_says_so(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if compiler != "none":
        (tmp_path / "c++").write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
        (tmp_path / "c++").chmod(0o755)
    cpu_decode._library.cache_clear()
    try:
        assert cpu_decoder(random_model()) is None
    finally:
        cpu_decode._library.cache_clear()
    message = capfd.readouterr().err
    assert ("no C++ compiler found" if compiler == "none" else "(broken)") in message and message.count("\n") == 1
    assert not list((tmp_path / "cache").rglob("*.so*"))


def test_a_cache_that_cannot_be_written_is_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cpu_decode._library.cache_clear()
    try:
        assert cpu_decoder(random_model()) is None
    finally:
        cpu_decode._library.cache_clear()
    assert "set XDG_CACHE_HOME" in capfd.readouterr().err
