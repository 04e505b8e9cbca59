"""Partition the MLPs of a checkpoint into experts: another checkpoint directory, for finetune/* --partition.top_k.

python scripts/partition_mlp.py --checkpoint_dir checkpoints/smollm2-135m-instruct --out_dir checkpoints/partitioned
--data_dir data/general/tokens --top_k '[32, 16, 8]'
"""

import json
import shutil
import statistics
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.checkpoint import load_model, save_checkpoint, stored_dtype
from lit_llama.command_line import run
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError
from lit_llama.evaluation.perplexity import score_texts
from lit_llama.files import atomic_path, refuse_overwrite
from lit_llama.functional import swiglu
from lit_llama.hardware import pick_device
from lit_llama.mlp_partition import MLPPartitionConfig, MLPRoutingConfig, partition_mlp, partitioned_mlps, route_mlp
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer


def main(
    *,
    checkpoint_dir: Path,
    out_dir: Path,
    n_experts: int = 32,
    layers: list[int] | None = None,
    clusters: Literal["kmeans", "random"] = "kmeans",
    seed: int = 0,
    data_dir: Path | None = None,
    top_k: list[int] | None = None,
    sequence_length: int = 512,
    max_windows: int = 64,
    batch_size: int = 4,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint with the neurons of each MLP in the order of N equal clusters of what they respond to.

    It is the same model to every tool, config.json unchanged; mlp_partition.json beside it says which neuron went
    where. On stdout, as JSON: how much tighter than random the clusters are, the error of the reordering, and, with
    data_dir, the perplexity when each token goes through only k experts, before any training for that.

    Args:
        checkpoint_dir: Dense model, a Hugging Face directory.
        out_dir: Checkpoint directory to write.
        n_experts: N, clusters of an MLP; must divide its width.
        layers: Decoder layers to partition, counted from 0. null: all.
        clusters: kmeans, or random for comparison.
        seed: Of the clustering.
        data_dir: Token store whose held-out part is scored.
        top_k: The k to score, '[32, 16, 8]'; by default N, half and a quarter of it.
        sequence_length: Tokens a window that is scored.
        max_windows: Score only so many, spread over the store.
        batch_size: Windows at a time.
        device: Where to score: cpu, cuda, mps, or auto for the best there is.
        overwrite: Replace what is in out_dir.
    """
    refuse_overwrite(out_dir, overwrite)
    config = MLPPartitionConfig(n_experts=n_experts, layers=layers, clusters=clusters, seed=seed)
    if top_k is not None and data_dir is None:
        raise InputError("--top_k needs --data_dir, the text to score")
    top_k = top_k or sorted({n_experts, max(1, n_experts // 2), max(1, n_experts // 4)}, reverse=True)
    if wrong := [k for k in top_k if not 1 <= k <= n_experts]:
        raise InputError(f"--top_k {wrong[0]} is not from 1 to {n_experts}, the experts that there are")
    text = {}
    if data_dir is not None:
        store = TokenStore.open(data_dir, "val", Tokenizer.from_checkpoint(checkpoint_dir).sha256)
        text = {"held-out text": TrainingWindows(store, sequence_length, seed=0, shuffle=False)}
    model = load_model(checkpoint_dir, stored_dtype(checkpoint_dir))
    x = torch.randn(64, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    dense = mlp_outputs(model, x)
    partition = partition_mlp(model, config)
    errors = [float((y - y0).norm() / y0.norm()) for y, y0 in zip(mlp_outputs(model, x), dense, strict=True)]
    save_checkpoint(model, out_dir, tokenizer_from=checkpoint_dir, overwrite=overwrite)
    with atomic_path(out_dir / "config.json") as path:
        shutil.copyfile(checkpoint_dir / "config.json", path)
    result: dict[str, Any] = {
        "out_dir": str(out_dir),
        "n_experts": n_experts,
        "neurons_per_expert": sorted(
            {count for layer in partition.layers.values() for count in torch.tensor(layer.labels).bincount().tolist()}
        ),
        "layers": len(partition.layers),
        "clusters": clusters,
        "seed": seed,
        "distance": statistics.fmean(layer.distance for layer in partition.layers.values()),
        "random_distance": statistics.fmean(layer.random_distance for layer in partition.layers.values()),
        "reordering_error": max(errors),
    }
    if text:
        model.to(pick_device(device))
        result["dense"] = score_texts(model, text, batch_size, max_windows)["held-out text"]
        route_mlp(model, MLPRoutingConfig(top_k=n_experts))
        result["top_k"] = {str(k): scored_with(model, k, text, batch_size, max_windows) for k in top_k}
    print(json.dumps(result, indent=2))


def mlp_outputs(model: Llama, x: Tensor) -> list[Tensor]:
    """What the MLP of each layer makes of x (tokens, hidden), in fp32."""
    outputs = []
    for layer in model.model.layers:
        gate, up, down = (projection.weight.float() for projection in layer.mlp.children())
        outputs.append(F.linear(swiglu(F.linear(x, gate), F.linear(x, up)), down))
    return outputs


def scored_with(model: Llama, k: int, text: dict, batch_size: int, max_windows: int) -> dict[str, float]:
    """Loss and perplexity with k experts a token, and the share of tokens of the least and the most used expert."""
    used = {}
    for mlp in partitioned_mlps(model):
        mlp.top_k = k
        used[mlp] = torch.zeros(mlp.n_experts, dtype=torch.int64, device=mlp.gate_means.device)

    def count(mlp: torch.nn.Module, arguments: tuple) -> None:
        used[mlp] += mlp.select(arguments[0]).flatten().bincount(minlength=mlp.n_experts)

    hooks = [mlp.register_forward_pre_hook(count) for mlp in used]
    scores = score_texts(model, text, batch_size, max_windows)["held-out text"]
    for hook in hooks:
        hook.remove()
    shares = torch.stack([counts * k / counts.sum() for counts in used.values()])
    return {
        "loss": scores["loss"],
        "perplexity": scores["perplexity"],
        "least_used_expert": float(shares.min()),
        "most_used_expert": float(shares.max()),
    }


if __name__ == "__main__":
    run(main)
