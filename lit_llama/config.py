"""The shape of a Llama: one dataclass with the field names of Hugging Face's config.json, and a table of known models.

Nothing is computed that a checkpoint states (MLP width, rotary base, norm epsilon), and nothing a checkpoint states is
ignored: a field that would change the computation in a way this project does not implement is refused by its name.
"""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from lit_llama.errors import InputError
from lit_llama.files import read_json

Quantization = Literal["nf4", "nf4-dq", "int4", "int8"]
"""Ways to store the base weights."""

CacheQuantization = Literal["int8"]
"""Ways to store keys and values of what was read, instead of as the model computes them."""

Embeddings = Literal["int8", "cpu"]
"""Other places for the embedding: 8 bits (then the head too), or the host's memory while the rest is on a GPU."""


@dataclass
class LlamaConfig:
    """Architecture of a Llama or Mistral model; defaults of `head_dim` and `num_key_value_heads` as Hugging Face's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    num_key_value_heads: int | None = None
    """Heads of keys and values; fewer than attention heads is grouped-query attention. Default: num_attention_heads."""
    head_dim: int | None = None
    """Width of one head; need not be hidden_size / num_attention_heads, which is the default."""
    max_position_embeddings: int = 2048
    """Context length in tokens."""
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    """None, or {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor", "low_freq_factor",
    "high_freq_factor", "original_max_position_embeddings"}."""
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    """A query sees this many keys, itself included (Mistral 7B v0.1: 4096). None: all of them."""
    tie_word_embeddings: bool = False
    model_type: str = "llama"
    """"llama" or "mistral": the name under which transformers opens a checkpoint written from this configuration."""
    token_ids: dict[str, Any] = field(default_factory=dict)
    """bos_token_id, eos_token_id, pad_token_id as the checkpoint states them; handed through, not part of the model."""

    def __post_init__(self) -> None:
        _require_positive_integers(self, *_SIZES)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise InputError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads"
                    f" {self.num_attention_heads} and head_dim is not given"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        _require_positive_integers(self, "num_key_value_heads", "head_dim", "max_position_embeddings")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd: rotary embeddings rotate pairs")
        if self.sliding_window is not None:
            _require_positive_integers(self, "sliding_window")
            if self.model_type != "mistral":
                raise InputError(f"sliding_window = {self.sliding_window} with model_type 'llama' is not supported")
        for name in ("rope_theta", "rms_norm_eps"):
            if not _is_positive_number(getattr(self, name)):
                raise InputError(f"{name} = {getattr(self, name)!r} is not a positive number")
        self.rope_scaling = _checked_rope_scaling(self.rope_scaling)

    @classmethod
    def from_name(cls, name: str) -> "LlamaConfig":
        """A configuration of the table below, by its name there or on the hub; chat variants share their base's.

        Raises:
            InputError: the name is not in the table; the message lists the names.
        """
        key = name.lower().split("/")[-1].replace("_", "-").removeprefix("meta-")
        key = re.sub(r"-(hf|chat|instruct)(?=-|$)", "", key)
        key = re.sub(r"^tinyllama(-1\.1b)?(-v[\d.]+|(-intermediate)?-step-.+)$", "tinyllama-1.1b", key)
        if key.startswith("open-llama"):
            key = key.removesuffix("-v2")
        if key not in NAMED_CONFIGS:
            raise InputError(f"no configuration is named {name!r}; known: {', '.join(NAMED_CONFIGS)}")
        return cls(**NAMED_CONFIGS[key])

    @classmethod
    def from_json(cls, path: Path | str) -> "LlamaConfig":
        """Read a Hugging Face config.json (or the directory that holds it), of transformers 4 or 5.

        Raises:
            InputError: another architecture, a missing field, or a field whose value this project does not implement.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        stated = read_json(path)
        if not isinstance(stated, dict):
            raise InputError(f"{path}: expected a JSON object")
        try:
            return cls(**_fields_from_huggingface(stated))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_huggingface(self) -> dict[str, Any]:
        """The config.json of this model, in the transformers 4 form, which transformers 4 and 5 both open."""
        stated = {
            "architectures": ["MistralForCausalLM" if self.model_type == "mistral" else "LlamaForCausalLM"],
            "model_type": self.model_type,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            **{f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("token_ids", "model_type")},
            **self.token_ids,
        }
        if self.rope_scaling:
            stated["rope_scaling"] = dict(self.rope_scaling)  # transformers writes into the dictionary it is given
        if self.model_type == "llama":
            del stated["sliding_window"]
        else:
            del stated["attention_bias"], stated["mlp_bias"]
        return stated

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied embedding counts once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * (attention + mlp + 2 * self.hidden_size) + self.hidden_size


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")

# Fields of config.json that do not change what the model computes.
_WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "auto_map", "dtype", "id2label", "initializer_range", "is_llama_config",
    "label2id", "max_sequence_length", "name", "output_attentions", "output_hidden_states", "return_dict",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_cache",
    # A way of splitting matrix products over devices; the result is the same.
    "pretraining_tp",
    # Metadata of generation that old checkpoints kept here.
    "do_sample", "max_length", "max_new_tokens", "temperature", "top_p", "top_k",
}  # fmt: skip

# Fields with the one value, or the few values, that mean what this project computes.
_REQUIRED_VALUES: dict[str, tuple] = {
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "attn_implementation": ("eager", "sdpa", "flash_attention_2", None),
    "chunk_size_feed_forward": (0, None),
    "hidden_act": ("silu", "swish"),
    "hidden_dropout": (0, 0.0, None),
    "is_encoder_decoder": (False,),
    "layer_types": (None,),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "use_sliding_window": (True, None),
}

_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _fields_from_huggingface(stated: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `LlamaConfig` out of a config.json; every key must be understood."""
    model_type = stated.get("model_type")
    if model_type not in ("llama", "mistral"):
        raise InputError(f"model_type is {model_type!r}; only 'llama' and 'mistral' are supported")

    missing = [name for name in _SIZES if stated.get(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing")

    own = {f.name for f in fields(LlamaConfig)} - {"token_ids"}
    # transformers' defaults where a config.json is silent
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-6}
    if model_type == "mistral":
        defaults |= {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
    result = {name: value for name, value in defaults.items() if name not in stated}
    for name, value in stated.items():
        if name in own:
            if value is not None:
                result[name] = value
        elif name in _TOKEN_IDS:
            if value is not None:
                result.setdefault("token_ids", {})[name] = value
        elif name in _REQUIRED_VALUES:
            if value not in _REQUIRED_VALUES[name]:
                raise InputError(f"{name} = {value!r} is not supported")
        elif name != "rope_parameters" and name not in _WITHOUT_EFFECT:
            raise InputError(
                f"{name} = {value!r} is not a field this project knows;"
                " remove it from config.json if it does not change what the model computes"
            )

    # transformers 5 keeps the rotary base and its scaling in one dictionary.
    if isinstance(stated.get("rope_parameters"), dict):
        parameters = dict(stated["rope_parameters"])
        if "rope_theta" in parameters:
            result["rope_theta"] = parameters.pop("rope_theta")
        if parameters.get("partial_rotary_factor", 1) != 1:
            raise InputError(f"partial_rotary_factor = {parameters['partial_rotary_factor']!r} is not supported")
        parameters.pop("partial_rotary_factor", None)
        result["rope_scaling"] = parameters
    return result


def _checked_rope_scaling(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """Validate `rope_scaling` and spell its type `rope_type`; the type "default" means none."""
    if not scaling:
        return None
    if not isinstance(scaling, dict):
        raise InputError(f"rope_scaling = {scaling!r} is not an object")
    scaling = dict(scaling)
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None)
    scaling.pop("type", None)
    if rope_type in (None, "default"):
        if set(scaling) - {"factor"}:
            raise InputError(f"rope_scaling {scaling} has no rope_type")
        return None
    keys = {
        "linear": {"factor"},
        "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    }.get(rope_type)
    if keys is None:
        raise InputError(f"rope_scaling of type {rope_type!r} is not supported (supported: linear, llama3)")
    if set(scaling) != keys:
        raise InputError(f"rope_scaling of type {rope_type!r} needs exactly {sorted(keys)}, found {sorted(scaling)}")
    for name, value in scaling.items():
        if not _is_positive_number(value):
            raise InputError(f"rope_scaling: {name} = {value!r} is not a positive number")
    return {"rope_type": rope_type, **scaling}


def _require_positive_integers(config: LlamaConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise InputError(f"{name} = {value!r} is not a positive whole number")


def _is_positive_number(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_LLAMA_2 = {"vocab_size": 32000, "max_position_embeddings": 4096}
_LLAMA_3 = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0}
_LLAMA_3_1 = _LLAMA_3 | {"max_position_embeddings": 131072, "rope_scaling": _llama3_scaling(8.0)}
_LLAMA_3_2 = _LLAMA_3_1 | {"rope_scaling": _llama3_scaling(32.0), "tie_word_embeddings": True}
_SMOLLM2 = {"vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 100000.0, "tie_word_embeddings": True}


def _shape(hidden: int, layers: int, heads: int, mlp: int, kv_heads: int | None = None, **other: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "num_key_value_heads": kv_heads,
        **other,
    }


_7B = _shape(4096, 32, 32, 11008)
_13B = _shape(5120, 40, 40, 13824)
_70B = _shape(8192, 80, 64, 28672, 8)
_8B = _shape(4096, 32, 32, 14336, 8)

# Sources: the config.json or params.json of each release. LLaMA-1 7B, 13B and 30B use epsilon 1e-6, 65B 1e-5.
NAMED_CONFIGS: dict[str, dict[str, Any]] = {
    "llama-7b": _7B | {"vocab_size": 32000, "rms_norm_eps": 1e-6},
    "llama-13b": _13B | {"vocab_size": 32000, "rms_norm_eps": 1e-6},
    "llama-30b": _shape(6656, 60, 52, 17920) | {"vocab_size": 32000, "rms_norm_eps": 1e-6},
    "llama-65b": _shape(8192, 80, 64, 22016) | {"vocab_size": 32000},
    "llama-2-7b": _7B | _LLAMA_2,
    "llama-2-13b": _13B | _LLAMA_2,
    "llama-2-70b": _70B | _LLAMA_2,
    "llama-3-8b": _8B | _LLAMA_3,
    "llama-3-70b": _70B | _LLAMA_3,
    "llama-3.1-8b": _8B | _LLAMA_3_1,
    "llama-3.1-70b": _70B | _LLAMA_3_1,
    "llama-3.2-1b": _shape(2048, 16, 32, 8192, 8, head_dim=64) | _LLAMA_3_2,
    "llama-3.2-3b": _shape(3072, 28, 24, 8192, 8, head_dim=128) | _LLAMA_3_2,
    "llama-3.3-70b": _70B | _LLAMA_3_1,
    "codellama-7b": _7B | {"vocab_size": 32016, "max_position_embeddings": 16384, "rope_theta": 1000000.0},
    "codellama-7b-python": _7B | {"vocab_size": 32000, "max_position_embeddings": 16384, "rope_theta": 1000000.0},
    "open-llama-3b": _shape(3200, 26, 32, 8640) | {"vocab_size": 32000, "rms_norm_eps": 1e-6},
    "open-llama-7b": _7B | {"vocab_size": 32000, "rms_norm_eps": 1e-6},
    "tinyllama-1.1b": _shape(2048, 22, 32, 5632, 4) | {"vocab_size": 32000},
    "mistral-7b-v0.1": _8B
    | {"vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096, "model_type": "mistral"},
    "mistral-7b-v0.2": _8B
    | {"vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "model_type": "mistral"},
    "mistral-7b-v0.3": _8B
    | {"vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "model_type": "mistral"},
    "smollm2-135m": _shape(576, 30, 9, 1536, 3) | _SMOLLM2,
    "smollm2-360m": _shape(960, 32, 15, 2560, 5) | _SMOLLM2,
    "smollm2-1.7b": _shape(2048, 24, 32, 8192) | _SMOLLM2 | {"rope_theta": 130000.0},
}
