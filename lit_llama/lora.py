"""LoRA on named linear layers (Hu et al. 2021, arXiv 2106.09685): y = W x + (alpha / r) B A x, and its variants.

`inject_lora` wraps the chosen linear layers of a model in place; the model itself knows nothing of it. Base weights are
frozen and never touched: merging is explicit (`merge_lora`), never a side effect of eval(). Only the embedding and the
head are trained as they are, where `modules_to_save` says so. Adapters are stored as PEFT stores them, so that
`peft.PeftModel.from_pretrained(base, adapter_dir)` opens one and a PEFT adapter opens here. The layer itself is in
`lora_linear.py`.
"""

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_llama.adapter_files import PEFT_PREFIX, fill_parameters, read_adapter_state, write_adapter
from lit_llama.errors import InputError
from lit_llama.files import read_json
from lit_llama.lora_linear import LoRALinear
from lit_llama.mlp_partition import ROUTED_LORA, route_as_recorded, routing_record
from lit_llama.prompt_tuning import load_prompt_tuning

LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a decoder layer, each a possible target."""

_TARGETS = (*LINEAR_NAMES, "lm_head")
_TIED = ("embed_tokens", "lm_head")
_SCORE = "score"
"""The head of a classifier, as PEFT calls it; here it stands in the place of lm_head (`classification.py`)."""
_MODULES_TO_SAVE = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head", _SCORE: "lm_head"}


@dataclass
class LoRAConfig:
    """What to adapt and how much."""

    r: int = 16
    """Rank: width of the bottleneck. Knowledge needs more than style; 16-64 is usual."""
    alpha: float = 32
    """The update is scaled by alpha / r, so alpha can stay while r varies."""
    dropout: float = 0.0
    """Probability of dropping an input element on the adapter's path while training; not on lm_head."""
    targets: list[str] = field(default_factory=lambda: list(LINEAR_NAMES))
    """Linear layers to adapt: any of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head."""
    layers_to_transform: list[int] | None = None
    """Decoder layers to adapt, counted from 0. None: all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another rank for some layers, {"down_proj": 32, "layers.3.self_attn.q_proj": 8}: regular expressions that match
    the end of a layer's name; the first that does counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Another alpha for some layers, in the same way."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732): keeps high ranks learning."""
    dora: bool = False
    """Learn the norm of each row of the weight apart from its direction (Liu et al. 2024, arXiv 2402.09353)."""
    init: str = "kaiming"
    """Where lora_A and lora_B start: kaiming (A random, B zero); pissa, the weight's principal components (Meng et al.
    2024, arXiv 2404.02948), by one exact decomposition a layer; or pissa_niter_4, the same by 4 rounds of subspace
    iteration, for large models. A PiSSA adapter is saved as an ordinary one of twice the rank."""
    plus_ratio: float = 1.0
    """LoRA+ (Hayou et al. 2024, arXiv 2402.12354): lora_B learns that many times as fast as the rest; 16 there."""
    modules_to_save: list[str] = field(default_factory=list)
    """Train these as a whole and save them with the adapter: embed_tokens, lm_head. On a base that ties the two they
    are one weight: either name trains it, once."""
    embedding_learning_rate: float = 0.1
    """Learning rate of modules_to_save, as a share of train.learning_rate."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.targets if name not in _TARGETS]
        if unknown:
            raise InputError(f"lora target {unknown[0]!r} is not a linear layer; choose from {', '.join(_TARGETS)}")
        if not self.targets:
            raise InputError("lora.targets is empty: nothing would be trained")
        unknown = [name for name in self.modules_to_save if name not in _MODULES_TO_SAVE]
        if unknown:
            raise InputError(f"lora.modules_to_save {unknown[0]!r} is none of {', '.join(_MODULES_TO_SAVE)}")
        if "lm_head" in self.targets and "lm_head" in self.modules_to_save:
            raise InputError("lm_head is in lora.targets and in lora.modules_to_save: name it in one of them")
        if "lm_head" in self.targets and (self.dora or self.init != "kaiming"):
            raise InputError("DoRA and PiSSA do not go with lm_head in lora.targets: leave lm_head or the variant out")
        if not re.fullmatch(r"kaiming|pissa(_niter_[1-9]\d*)?", self.init):
            raise InputError(f"lora.init {self.init!r} is not one of kaiming, pissa, pissa_niter_<number>")
        for pattern in [*self.rank_pattern, *self.alpha_pattern]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"lora pattern {pattern!r} is not a regular expression: {error}") from None
        if min([self.r, *self.rank_pattern.values()]) < 1:
            raise InputError("lora ranks must be at least 1")
        if not 0 <= self.dropout < 1:
            raise InputError(f"lora.dropout {self.dropout} is not in [0, 1)")
        if min(self.plus_ratio, self.embedding_learning_rate) <= 0:
            raise InputError("lora.plus_ratio and lora.embedding_learning_rate must be above 0")

    def adapts(self, name: str) -> bool:
        """Whether the module called `name` (from the model on) is to be adapted."""
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        wanted = self.layers_to_transform is None or layer is None or int(layer[1]) in self.layers_to_transform
        return wanted and name.rpartition(".")[2] in self.targets

    def rank(self, name: str) -> int:
        """Rank of the layer called `name`."""
        return self.rank_pattern.get(_matching(self.rank_pattern, name), self.r)

    def scaling(self, name: str) -> float:
        """Factor of the update of the layer called `name`."""
        alpha, rank = self.alpha_pattern.get(_matching(self.alpha_pattern, name), self.alpha), self.rank(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _matching(patterns: dict[str, Any], name: str) -> str | None:
    """The first pattern that matches the end of `name`, as PEFT's rank_pattern does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)), None)


def inject_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze the model, wrap every linear layer that `config` adapts, in place, and free what it trains as a whole.

    Afterwards the adapter's parameters (fp32) and the weights of `config.modules_to_save` (in the model's dtype) are
    the only ones that require a gradient.

    Raises:
        InputError: the model has an adapter already, no layer of that name, or a weight to be both trained and adapted.
    """
    others = (getattr(model, name, None) for name in ("prompt_tuning_config", "lora_tree", "adapter_bank"))
    if any(True for _ in lora_layers(model)) or any(other is not None for other in others):
        raise InputError("the model carries an adapter already: merge it first")
    if config.modules_to_save and model.config.tie_word_embeddings and "lm_head" in config.targets:
        raise InputError(
            "this base ties lm_head to embed_tokens: train that weight (lora.modules_to_save) or adapt it (lm_head in"
            " lora.targets), not both"
        )
    if _SCORE in config.modules_to_save and model.labels is None:
        raise InputError("score is the head of a classifier, and this model has none: use generate/classify.py")
    missing = set(config.layers_to_transform or ()) - set(range(model.config.num_hidden_layers))
    if missing:
        raise InputError(
            f"lora.layers_to_transform names layer {min(missing)}; the model has {model.config.num_hidden_layers}"
        )
    names = [name for target in config.targets for name, _ in model.named_modules() if name.endswith(target)]
    names = [name for name in names if config.adapts(name)]
    for target in config.targets:
        if not any(name.endswith(target) for name in names):
            raise InputError(f"the model has no linear layer called {target!r}")
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for pattern in patterns:
            if not any(_matching({pattern: None}, name) for name in names):
                raise InputError(f"lora pattern {pattern!r} matches no adapted layer; they are called like {names[0]}")
    whole_weights = [_whole_weight(model, name) for name in config.modules_to_save]
    model.requires_grad_(False)
    for name in names:
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        wrapped = LoRALinear(
            linear,
            config.rank(name),
            config.scaling(name),
            dropout=config.dropout if name != "lm_head" else 0.0,  # the loss through a head never makes its output
            dora=config.dora,
            init=config.init,
        )
        setattr(model.get_submodule(parent), child, wrapped.train(linear.training))
    for weight in whole_weights:
        weight.requires_grad_(True)
    model.lora_config = config


def _whole_weight(model: nn.Module, name: str) -> nn.Parameter:
    """The weight of a module to be trained as a whole."""
    weight = getattr(model.get_submodule(_MODULES_TO_SAVE[name]), "weight", None)
    if not isinstance(weight, nn.Parameter):
        raise InputError(
            f"{name} is in int8 or in the host's memory and cannot be trained: load it without that, or leave it out"
            " of lora.modules_to_save"
        )
    return weight


def stack_lora(model: nn.Module, config: LoRAConfig, adapter_dir: Path | str) -> None:
    """Inject a new adapter on top of a stored one, which stays frozen; the two are saved as one, of the sum of ranks.

    Raises:
        InputError: the stored adapter adapts a layer that the new one does not, or is more than plain low-rank updates
            (DoRA, modules trained as a whole); it can be merged or trained further, then.
    """
    below = read_adapter_config(adapter_dir)
    instead = "merge it first (start_mode merge) or train it further (start_mode continue)"
    if below.dora or below.modules_to_save or config.dora:
        raise InputError(f"{adapter_dir}: DoRA and modules_to_save cannot be stacked: {instead}")
    state = read_adapter_state(adapter_dir, model.fingerprint)
    route_as_recorded(model, adapter_dir)
    inject_lora(model, config)
    layers = dict(lora_layers(model))
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        name = key.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        if name not in layers:
            raise InputError(f"{adapter_dir} adapts {name}, which the new adapter does not: add it, or {instead}")
        layer, other = layers[name], f"{PEFT_PREFIX}{name}.lora_B.weight"
        lora_A, lora_B = state[key].float(), state[other].float()
        if lora_A.shape[1] != layer.lora_A.shape[1] or lora_B.shape[0] != layer.lora_B.shape[0]:
            raise InputError(f"{adapter_dir}: {name} has another shape in this base: it was made for another one")
        device = layer.lora_A.device
        layer.stack_on(lora_A.to(device), lora_B.to(device) * (below.scaling(name) / layer.scaling))


def merge_lora(model: nn.Module) -> None:
    """Add the adapter's update to the base weights, in fp32, and unwrap the layers, in place.

    What was trained as a whole stays as it is. A head under LoRA that shared its weight with the embedding gets a
    weight of its own: the update belongs to the head alone, and `model.config.tie_word_embeddings` becomes false.

    Raises:
        InputError: the base is quantized. Merging into quantized weights and quantizing again loses part of the update;
            merge into the unquantized checkpoint instead. Or its MLPs route, which no merged weight can do, or it
            is a tree of adapters, which chooses token by token.
    """
    if getattr(model, "lora_tree", None) is not None:
        from lit_llama.lora_tree import refuse_merging  # builds on this module

        refuse_merging(model)
    layers = list(lora_layers(model))
    if getattr(model, "mlp_routing", None) is not None:
        raise InputError("the adapter was trained with routed MLPs, which a merged checkpoint would not route: keep it")
    for name, layer in layers:
        if not isinstance(layer.linear, nn.Linear):
            raise InputError(f"{name} is quantized: merge the adapter into the unquantized base instead")
    for name, layer in layers:
        if name == "lm_head" and model.config.tie_word_embeddings:
            _untie_head(model)
        weight = layer.linear.weight
        with torch.no_grad():
            weight.copy_(layer.merged_weight())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.linear)
    model.requires_grad_(False)
    model.lora_config = None


def _untie_head(model: nn.Module) -> None:
    """Give the head a weight of its own, equal to the embedding's."""
    head = getattr(model.lm_head, "linear", model.lm_head)
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config = model.model.config = replace(model.config, tie_word_embeddings=False)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """(name, layer) of the wrapped linear layers."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def trained_summary(model: nn.Module) -> str:
    """One line for the user: what the adapter changes, and what is trained as a whole."""
    layers = list(lora_layers(model))
    ranks = sorted({len(layer.lora_A) for _, layer in layers})
    summary = f"adapting {len(layers)} layers with rank{'' if len(ranks) == 1 else 's'} {ranks[0]}"
    if len(ranks) > 1:
        summary += f" to {ranks[-1]}"
    if names := _saved_modules(model):
        together = " as one" if model.config.tie_word_embeddings else ""
        size = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name)
        summary += f"; training {' and '.join(names)}{together}, {size:,} parameters"
    return summary


def learning_rate_factors(model: nn.Module) -> dict[str, float]:
    """Share of the learning rate at which parameters learn, by name; those not named learn at the whole of it."""
    if (tree := getattr(model, "lora_tree", None)) is not None:
        routers = [name for name, _ in model.named_parameters() if ".lora_router." in name]
        return dict.fromkeys(routers, tree.config.router_learning_rate)
    config: LoRAConfig | None = getattr(model, "lora_config", None)
    if config is None:
        return {}
    factors = {name: config.plus_ratio for name, _ in model.named_parameters() if name.endswith(".lora_B")}
    whole = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    return factors | dict.fromkeys(sorted(whole), config.embedding_learning_rate)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What was trained, under PEFT's names; a weight that embedding and head share is under both of theirs."""
    names = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_magnitude_vector": "lora_magnitude_vector"}
    parameters = {
        f"{PEFT_PREFIX}{name}.{saved}": getattr(layer, own)
        for name, layer in lora_layers(model)
        for own, saved in names.items()
        if getattr(layer, own) is not None
    }
    for name in _saved_modules(model):
        parameters[_saved_name(name)] = _whole_weight(model, name)
    return parameters


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors as they are stored: under PEFT's names, PiSSA as LoRA of twice the rank."""
    state = {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}
    for name, layer in lora_layers(model):
        for side, factor in zip("AB", layer.factors(), strict=True):
            state[f"{PEFT_PREFIX}{name}.lora_{side}.weight"] = factor.detach()
    return state


def _saved_modules(model: nn.Module) -> list[str]:
    """Names of the modules trained as a whole; of embedding and head that share a weight, both."""
    named = model.lora_config.modules_to_save
    return list(_TIED) if named and model.config.tie_word_embeddings else sorted(named)


def _saved_name(name: str) -> str:
    """Under which name the weight of a module that is trained as a whole is stored."""
    return f"{PEFT_PREFIX}{name if name == _SCORE else _MODULES_TO_SAVE[name]}.weight"


def saved_config(model: nn.Module) -> LoRAConfig:
    """The adapter as it is stored: an ordinary one, of a higher rank where a layer has frozen factors too."""
    config: LoRAConfig = model.lora_config
    layers = dict(lora_layers(model))
    if all(layer.lora_A_frozen is None for layer in layers.values()):
        return config
    ranks = {name: len(layer.factors()[0]) for name, layer in layers.items()}
    alphas = {name: layers[name].scaling * (rank**0.5 if config.rslora else rank) for name, rank in ranks.items()}
    r, alpha = statistics.mode(ranks.values()), statistics.mode(alphas.values())
    return replace(
        config,
        init="kaiming",
        r=r,
        alpha=alpha,
        rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},
    )


def save_adapter(model: nn.Module, adapter_dir: Path | str, base_model: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors in PEFT's layout; each file is replaced as a whole.

    Args:
        base_model: path or name of the base, for PEFT's record. The base's fingerprint is kept beside the tensors, so
            that the adapter is not put on another base by mistake.
    """
    if getattr(model, "lora_tree", None) is not None:
        from lit_llama.lora_tree import save_lora_tree  # builds on this module

        save_lora_tree(model, adapter_dir, base_model)
        return
    config = saved_config(model)
    saved_modules = _saved_modules(model)
    description = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if _SCORE in saved_modules else "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(config.targets),
        "layers_to_transform": config.layers_to_transform,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": saved_modules or None,
        "ensure_weight_tying": bool(saved_modules) and model.config.tie_word_embeddings,
    }
    write_adapter(adapter_dir, description | routing_record(model), adapter_state(model), model.fingerprint)


def read_adapter_config(adapter_dir: Path | str) -> LoRAConfig:
    """The LoRAConfig of an adapter directory; PEFT options that this project does not implement are refused by name."""
    path = Path(adapter_dir) / "adapter_config.json"
    stated = read_json(path)
    if stated.get("peft_type") not in ("LORA", ROUTED_LORA):
        raise InputError(f"{path}: peft_type is {stated.get('peft_type')!r}; only 'LORA' is supported")
    plain_values: dict[str, tuple] = {
        "alora_invocation_tokens": (None,),
        "arrow_config": (None,),
        "bias": ("none", None),
        "exclude_modules": (None,),
        "fan_in_fan_out": (False, None),
        "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "pissa"),
        "kasa_config": (None,),
        "layer_replication": (None,),
        "layers_pattern": (None, [], ""),
        "lora_bias": (False, None),
        "monteclora_config": (None,),
        "target_parameters": (None, []),
        "trainable_token_indices": (None,),
        "use_bdlora": (None, False),
        "use_qalora": (False, None),
        "velora_config": (None,),
    }
    for name, allowed in plain_values.items():
        if stated.get(name, allowed[0]) not in allowed:
            raise InputError(f"{path}: {name} = {stated[name]!r} is not supported")
    targets = stated["target_modules"]
    if not isinstance(targets, list):
        raise InputError(f"{path}: target_modules = {targets!r} is not a list of names")
    layers = stated.get("layers_to_transform")
    try:
        return LoRAConfig(
            r=stated["r"],
            alpha=stated["lora_alpha"],
            dropout=stated.get("lora_dropout", 0.0),
            targets=sorted(targets, key=lambda name: _TARGETS.index(name) if name in _TARGETS else -1),
            layers_to_transform=[layers] if isinstance(layers, int) else layers or None,
            rank_pattern=stated.get("rank_pattern") or {},
            alpha_pattern=stated.get("alpha_pattern") or {},
            rslora=stated.get("use_rslora", False),
            dora=stated.get("use_dora") or False,
            init="pissa" if stated.get("init_lora_weights") == "pissa" else "kaiming",
            # PEFT takes any end of a module's name, and may state one module twice.
            modules_to_save=sorted({name.removeprefix("model.") for name in stated.get("modules_to_save") or []}),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def load_adapter(model: nn.Module, adapter_dir: Path | str) -> None:
    """Inject the adapter of a PEFT directory, of any kind, into the model and load its weights.

    An embedding or a head that the adapter brings replaces the model's. If the base ties the two and the adapter has
    only one of them, or both and different, they are untied: `model.config.tie_word_embeddings` becomes false.

    Raises:
        InputError: no such adapter, an unsupported kind, tensors that do not fit the model, or a base other than the
            one it was trained on.
    """
    peft_type = read_json(Path(adapter_dir) / "adapter_config.json").get("peft_type")
    if peft_type == "LORA_TREE":
        from lit_llama.lora_tree import load_lora_tree  # builds on this module

        load_lora_tree(model, adapter_dir)
        return
    if peft_type not in ("LORA", ROUTED_LORA):
        load_prompt_tuning(model, adapter_dir)
        return
    config = read_adapter_config(adapter_dir)
    state = read_adapter_state(adapter_dir, model.fingerprint)
    frozen = state.pop(f"{PEFT_PREFIX}lm_head.base_layer.weight", None)  # PEFT adds it when the head is adapted
    if frozen is not None and isinstance(model.lm_head, nn.Linear):
        weight = model.lm_head.weight.detach().cpu()
        if frozen.shape != weight.shape or not torch.allclose(frozen.float(), weight.float(), rtol=2**-7, atol=1e-6):
            raise InputError(
                f"{adapter_dir}: its lm_head.base_layer is not the head of this base: it was made for another one"
            )
    brought = [state.get(_saved_name(name)) for name in _TIED]
    if config.modules_to_save and model.config.tie_word_embeddings:
        for name in config.modules_to_save:
            _whole_weight(model, name)
        if any(tensor is None for tensor in brought) or not torch.equal(*brought):
            _untie_head(model)
        else:
            config.modules_to_save = list(_TIED)
    route_as_recorded(model, adapter_dir)
    inject_lora(model, config)
    fill_parameters(adapter_parameters(model), state, adapter_dir)
