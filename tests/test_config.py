"""Configurations against the published table of models and against transformers' reading of the same config.json."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import transformers

from lit_llama.config import NAMED_CONFIGS, LlamaConfig
from lit_llama.errors import InputError
from lit_llama.model import Llama

# layers, heads, kv heads, hidden, head_dim, MLP, vocabulary, context,
# rope_theta, rms_norm_eps, tied, factor of llama3 scaling, sliding window, parameters
TABLE = {
    "llama-7b": (32, 32, 32, 4096, 128, 11008, 32000, 2048, 1e4, 1e-6, False, None, None, 6_738_415_616),
    "llama-13b": (40, 40, 40, 5120, 128, 13824, 32000, 2048, 1e4, 1e-6, False, None, None, 13_015_864_320),
    "llama-30b": (60, 52, 52, 6656, 128, 17920, 32000, 2048, 1e4, 1e-6, False, None, None, 32_528_943_616),
    "llama-65b": (80, 64, 64, 8192, 128, 22016, 32000, 2048, 1e4, 1e-5, False, None, None, 65_285_660_672),
    "llama-2-7b": (32, 32, 32, 4096, 128, 11008, 32000, 4096, 1e4, 1e-5, False, None, None, 6_738_415_616),
    "llama-2-13b": (40, 40, 40, 5120, 128, 13824, 32000, 4096, 1e4, 1e-5, False, None, None, 13_015_864_320),
    "llama-2-70b": (80, 64, 8, 8192, 128, 28672, 32000, 4096, 1e4, 1e-5, False, None, None, 68_976_648_192),
    "llama-3-8b": (32, 32, 8, 4096, 128, 14336, 128256, 8192, 5e5, 1e-5, False, None, None, 8_030_261_248),
    "llama-3-70b": (80, 64, 8, 8192, 128, 28672, 128256, 8192, 5e5, 1e-5, False, None, None, 70_553_706_496),
    "llama-3.1-8b": (32, 32, 8, 4096, 128, 14336, 128256, 131072, 5e5, 1e-5, False, 8, None, 8_030_261_248),
    "llama-3.1-70b": (80, 64, 8, 8192, 128, 28672, 128256, 131072, 5e5, 1e-5, False, 8, None, 70_553_706_496),
    "llama-3.2-1b": (16, 32, 8, 2048, 64, 8192, 128256, 131072, 5e5, 1e-5, True, 32, None, 1_235_814_400),
    "llama-3.2-3b": (28, 24, 8, 3072, 128, 8192, 128256, 131072, 5e5, 1e-5, True, 32, None, 3_212_749_824),
    "llama-3.3-70b": (80, 64, 8, 8192, 128, 28672, 128256, 131072, 5e5, 1e-5, False, 8, None, 70_553_706_496),
    "tinyllama-1.1b": (22, 32, 4, 2048, 64, 5632, 32000, 2048, 1e4, 1e-5, False, None, None, 1_100_048_384),
    "mistral-7b-v0.1": (32, 32, 8, 4096, 128, 14336, 32000, 32768, 1e4, 1e-5, False, None, 4096, 7_241_732_096),
    "mistral-7b-v0.2": (32, 32, 8, 4096, 128, 14336, 32000, 32768, 1e6, 1e-5, False, None, None, 7_241_732_096),
    "mistral-7b-v0.3": (32, 32, 8, 4096, 128, 14336, 32768, 32768, 1e6, 1e-5, False, None, None, 7_248_023_552),
    "codellama-7b": (32, 32, 32, 4096, 128, 11008, 32016, 16384, 1e6, 1e-5, False, None, None, 6_738_546_688),
    "codellama-7b-python": (32, 32, 32, 4096, 128, 11008, 32000, 16384, 1e6, 1e-5, False, None, None, 6_738_415_616),
    "open-llama-3b": (26, 32, 32, 3200, 100, 8640, 32000, 2048, 1e4, 1e-6, False, None, None, 3_426_473_600),
    "open-llama-7b": (32, 32, 32, 4096, 128, 11008, 32000, 2048, 1e4, 1e-6, False, None, None, 6_738_415_616),
    "smollm2-135m": (30, 9, 3, 576, 64, 1536, 49152, 8192, 1e5, 1e-5, True, None, None, 134_515_008),
    "smollm2-360m": (32, 15, 5, 960, 64, 2560, 49152, 8192, 1e5, 1e-5, True, None, None, 361_821_120),
    "smollm2-1.7b": (24, 32, 32, 2048, 64, 8192, 49152, 8192, 1.3e5, 1e-5, True, None, None, 1_711_376_384),
}

HUB_NAMES = {
    "huggyllama/llama-7b": "llama-7b",
    "meta-llama/Llama-2-7b-hf": "llama-2-7b",
    "meta-llama/Llama-2-13b-chat-hf": "llama-2-13b",
    "meta-llama/Llama-2-70b-chat": "llama-2-70b",
    "meta-llama/Meta-Llama-3-8B": "llama-3-8b",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama-3-70b",
    "meta-llama/Meta-Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b",
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": "tinyllama-1.1b",
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": "tinyllama-1.1b",
    "TinyLlama/TinyLlama-1.1B-step-50K-105b": "tinyllama-1.1b",
    "TinyLlama/TinyLlama_v1.1": "tinyllama-1.1b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral-7b-v0.2",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral-7b-v0.3",
    "codellama/CodeLlama-7b-hf": "codellama-7b",
    "codellama/CodeLlama-7b-Instruct-hf": "codellama-7b",
    "codellama/CodeLlama-7b-Python-hf": "codellama-7b-python",
    "openlm-research/open_llama_3b": "open-llama-3b",
    "openlm-research/open_llama_7b_v2": "open-llama-7b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
    "SMOLLM2-1.7B": "smollm2-1.7b",
}

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

SMALL = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 160,
    "vocab_size": 320,
}


def read(tmp_path: Path, stated: object) -> LlamaConfig:
    (tmp_path / "config.json").write_text(json.dumps(stated))
    return LlamaConfig.from_json(tmp_path)


def test_table_is_complete() -> None:
    assert set(TABLE) == set(NAMED_CONFIGS)


@pytest.mark.parametrize("name", TABLE)
def test_named_configuration_and_parameter_count(name: str) -> None:
    *shape, factor, window, parameters = TABLE[name]
    config = LlamaConfig.from_name(name)
    assert shape == [
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size,
        config.max_position_embeddings,
        config.rope_theta,
        config.rms_norm_eps,
        config.tie_word_embeddings,
    ]
    assert config.rope_scaling == (factor and {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING})
    assert config.sliding_window == window
    assert config.model_type == ("mistral" if name.startswith("mistral") else "llama")
    assert config.num_parameters == parameters
    with torch.device("meta"):
        model = Llama(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("hub_name", HUB_NAMES)
def test_hub_names(hub_name: str) -> None:
    assert LlamaConfig.from_name(hub_name) == LlamaConfig.from_name(HUB_NAMES[hub_name])


@pytest.mark.parametrize("name", ["llama-2-8b", "tinyllama-1.1b-x", "gpt2", "", "Mistral-7B", "llama-3-8b-hf2"])
def test_unknown_name_lists_the_known(name: str) -> None:
    with pytest.raises(InputError, match=f"{name!r}; known: llama-7b, .*smollm2-1.7b"):
        LlamaConfig.from_name(name)


@pytest.mark.parametrize("name", TABLE)
def test_transformers_reads_what_we_write_and_we_read_what_it_writes(name: str, tmp_path: Path) -> None:
    ours = LlamaConfig.from_name(name)
    ours.token_ids = {"bos_token_id": 1, "eos_token_id": [2, 7]}
    (tmp_path / "config.json").write_text(json.dumps(ours.to_huggingface()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is (transformers.MistralConfig if ours.model_type == "mistral" else transformers.LlamaConfig)
    for field in asdict(ours):
        if field not in ("rope_theta", "rope_scaling", "token_ids", "sliding_window"):
            assert getattr(theirs, field) == getattr(ours, field), field
    assert getattr(theirs, "sliding_window", None) == ours.sliding_window
    assert theirs.rope_parameters == {
        "rope_theta": ours.rope_theta,
        "rope_type": "default",
        **(ours.rope_scaling or {}),
    }
    assert theirs.eos_token_id == [2, 7]
    assert LlamaConfig.from_json(tmp_path) == ours

    written = tmp_path / "transformers"
    theirs.save_pretrained(written)
    assert "rope_parameters" in json.loads((written / "config.json").read_text())
    assert LlamaConfig.from_json(written / "config.json") == ours


def test_transformers_may_write_into_what_it_is_given() -> None:
    ours = LlamaConfig.from_name("llama-3.2-1b")
    transformers.LlamaConfig(**ours.to_huggingface())
    assert ours == LlamaConfig.from_name("llama-3.2-1b")


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_silent_fields_mean_what_they_mean_to_transformers(model_type: str, tmp_path: Path) -> None:
    stated = SMALL | {"model_type": model_type, "num_attention_heads": 8}
    ours = read(tmp_path, stated)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    for name in ("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_null_counts_as_transformers_counts_it(tmp_path: Path) -> None:
    stated = {"model_type": "mistral", "num_key_value_heads": None, "head_dim": None, "sliding_window": None}
    ours = read(tmp_path, SMALL | stated | {"rope_scaling": None})
    assert (ours.num_key_value_heads, ours.head_dim, ours.sliding_window, ours.rope_scaling) == (4, 16, None, None)


def test_transformers_4_form_of_a_released_config(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 128000,
            "eos_token_id": [128001, 128008, 128009],
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "initializer_range": 0.02,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 32.0, "rope_type": "llama3", **LLAMA3_SCALING},
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_cache": True,
            "vocab_size": 128256,
        },
    )
    assert config.token_ids == {"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]}
    config.token_ids = {}
    assert config == LlamaConfig.from_name("llama-3.2-1b")


@pytest.mark.parametrize(
    "spelling", [{"type": "linear"}, {"rope_type": "linear"}, {"type": "linear", "rope_type": "linear"}]
)
def test_both_spellings_of_the_scaling_type(spelling: dict, tmp_path: Path) -> None:
    config = read(tmp_path, SMALL | {"rope_scaling": {"factor": 2.0, **spelling}})
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, **LLAMA3_SCALING}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = "),
        ({"sliding_window": 128}, "sliding_window = 128"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"needs exactly \['factor'\], found \[\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs exactly .*low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "factor = 'two' is not a positive number"),
        ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "found .*attention_factor"),
        ({"rope_scaling": "linear"}, "rope_scaling = 'linear' is not an object"),
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"model_type": None}, "model_type is None"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5 is not a field this project knows"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_size": "64"}, "hidden_size = '64' is not a positive whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small'"),
        ({"rope_theta": 0}, "rope_theta = 0"),
    ],
)
def test_unsupported_fields_are_refused_by_name(change: dict, message: str, tmp_path: Path) -> None:
    read(tmp_path, SMALL)
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, SMALL | change)
    assert str(tmp_path / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        LlamaConfig.from_json(tmp_path)
    with pytest.raises(InputError, match="expected a JSON object"):
        read(tmp_path, [SMALL])
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    with pytest.raises(InputError, match="not valid JSON"):
        LlamaConfig.from_json(tmp_path)
