"""One run of the comparison of adapter trees (`benchmarks/experts/tree.py`): train an arm, then measure it.

python benchmarks/experts/tree_run.py --checkpoint_dir checkpoints/smollm2-135m-instruct --texts_file texts.json --arm
tree --out_dir out/tree
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.checkpoint import load_model
from lit_llama.command_line import run
from lit_llama.data.packing import TrainingWindows
from lit_llama.errors import InputError
from lit_llama.evaluation.perplexity import evaluate_loss, store_of_texts
from lit_llama.files import read_json, write_json
from lit_llama.generation import generate
from lit_llama.learners import LoRATreeArguments, lora_tree_learner
from lit_llama.lora import LINEAR_NAMES
from lit_llama.lora_tree import LoRATreeConfig, leaf_counts, mutual_information, routing_figures, soft_routing
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, EvalConfig, TrainConfig, start_fabric, train

ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "LoRA, one leaf's rank": {"depth": 0},
    "LoRA, all leaves' rank": {"depth": 0, "ranks": 4},
    "tree": {"depth": 2},
    "tree, by sequence": {"depth": 2, "route_by": "sequence"},
    "mixture, top 1": {"depth": 2, "router": "softmax", "top_k": 1},
    "mixture, top 2": {"depth": 2, "router": "softmax", "top_k": 2},
    "random tree": {"depth": 2, "router": "frozen"},
    "oracle": {"depth": 2, "router": "given"},
}
"""Options of the tree; ranks: so many times a leaf's."""
KEY = 8
"""Tokens by which the oracle knows the domain of a piece."""


@dataclass(kw_only=True)
class Arguments:
    """Train and measure."""

    checkpoint_dir: Path
    texts_file: Path
    """{domain: {"train": [...], "val": [...]}}; JSON."""
    arm: str
    out_dir: Path
    r: int = 4
    """Of a leaf; alpha is twice that, whatever the arm's rank."""
    targets: list[str] = field(default_factory=lambda: list(LINEAR_NAMES))
    """Linear layers that are adapted."""
    domains: list[str] | None = None
    """Train on these only; all are measured."""
    measured_split: str = "val"
    """val: what is predicted of new text; train: what was absorbed."""
    epochs: float = 1.0
    seed: int = 0
    learning_rate: float = 1e-3
    sequence_length: int = 256
    resume: bool = False
    """Go on with an interrupted run."""
    generated: list[int] = field(default_factory=lambda: [1, 8])
    """Batches that decoding is timed at."""


def main(arguments: Arguments) -> None:
    if arguments.arm not in ARMS:
        raise InputError(f"--arm {arguments.arm!r} is none of {', '.join(ARMS)}")
    texts = read_json(arguments.texts_file)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    measured = {domain: texts[domain][arguments.measured_split] for domain in texts}
    oracle = domain_of_pieces([split for parts in texts.values() for split in [sum(parts.values(), [])]], tokenizer)
    if arguments.arm == "base":
        model, report = load_model(arguments.checkpoint_dir), {}
    else:
        model, report = trained(arguments, texts, tokenizer, oracle)
    write_json(arguments.out_dir / "measured.json", measure(model, measured, tokenizer, arguments) | {"report": report})


def trained(
    arguments: Arguments, texts: dict, tokenizer: Tokenizer, oracle: Callable[[Tensor, Tensor | None], Tensor]
) -> tuple[Llama, dict[str, Any]]:
    """The model with the arm on it, and the report of its training."""
    options = dict(ARMS[arguments.arm])
    rank = arguments.r * options.pop("ranks", 1)
    batch = TrainConfig(
        epochs=arguments.epochs, learning_rate=arguments.learning_rate, sequence_length=arguments.sequence_length,
        micro_batch_size=2, global_batch_size=2, seed=arguments.seed,
    )  # fmt: skip
    run_arguments = LoRATreeArguments(
        checkpoint_dir=arguments.checkpoint_dir, out_dir=arguments.out_dir, data_dir=str(arguments.texts_file),
        lora_tree=LoRATreeConfig(r=rank, alpha=2 * arguments.r, targets=arguments.targets, **options), train=batch,
        eval=EvalConfig(interval=10**6, max_windows=4), resume=arguments.resume,
    )  # fmt: skip
    fabric = start_fabric(run_arguments)
    learned = [piece for domain in arguments.domains or texts for piece in texts[domain]["train"]]
    windows = TrainingWindows(store_of_texts(learned, tokenizer, "train"), batch.sequence_length, arguments.seed)
    unseen = store_of_texts([piece for parts in texts.values() for piece in parts["val"]], tokenizer, "val")
    held_out = TrainingWindows(unseen, batch.sequence_length, 0, shuffle=False)
    model, save = lora_tree_learner(fabric, run_arguments)
    if options.get("router") == "given":
        model.lora_tree.oracle = oracle
    report = train(fabric, model, tokenizer, Corpus(windows, held_out, None, []), run_arguments, save)
    return model, report


def domain_of_pieces(pieces: list[list[str]], tokenizer: Tokenizer) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Says the number of the domain that each token is of, by the first tokens of its document in the window."""
    known: dict[tuple[int, ...], int] = {}
    for number, own in enumerate(pieces):
        for piece in own:
            ids = tokenizer.encode(piece)
            # Of every place: a window may begin within a piece.
            known |= {tuple(ids[place : place + KEY]): number for place in range(len(ids))}

    def domain(input_ids: Tensor, document_ids: Tensor | None) -> Tensor:
        documents = torch.zeros_like(input_ids) if document_ids is None else document_ids
        found = []
        for ids, own in zip(input_ids.tolist(), documents.tolist(), strict=True):
            row, start = [], 0
            for place, document in enumerate(own):
                if place == 0 or document != own[place - 1]:
                    start = place + (ids[place] == tokenizer.document_start_id)
                    current = known.get(tuple(ids[start : start + KEY]), 0)
                row.append(current)
            found.append(row)
        return torch.tensor(found, device=input_ids.device)

    return domain


def measure(model: Llama, texts: dict[str, list[str]], tokenizer: Tokenizer, arguments: Arguments) -> dict[str, Any]:
    """Losses by domain, by one leaf a token and by the mixture, use of the leaves, and speed."""
    windows = {
        domain: TrainingWindows(store_of_texts(pieces, tokenizer, domain), arguments.sequence_length, 0, shuffle=False)
        for domain, pieces in texts.items()
    }
    model.eval()
    start = time.perf_counter()
    scores = {domain: evaluate_loss(model, own) for domain, own in windows.items()}
    seconds, tokens = time.perf_counter() - start, sum(score.tokens for score in scores.values())
    result: dict[str, Any] = {
        "loss": {domain: score.loss for domain, score in scores.items()},
        "pooled_loss": sum(score.loss * score.tokens for score in scores.values()) / tokens,
        "prefill_tokens_per_second": tokens / seconds,
        "decode_tokens_per_second": {str(batch): decoding_speed(model, batch) for batch in arguments.generated},
    }
    tree = getattr(model, "lora_tree", None)
    if tree is not None and tree.config.router == "tree":
        with soft_routing(model):
            soft = {domain: evaluate_loss(model, own) for domain, own in windows.items()}
        result["soft_pooled_loss"] = sum(score.loss * score.tokens for score in soft.values()) / tokens
    if tree is not None and tree.config.router != "given":
        counts = torch.stack([leaf_counts(model, own) for own in windows.values()])
        everything = store_of_texts([piece for own in texts.values() for piece in own], tokenizer, "all")
        pooled = TrainingWindows(everything, arguments.sequence_length, 0, shuffle=False)
        result["routing"] = routing_figures(model, pooled, max_windows=32)
        result["leaf_domain_information"] = mutual_information(counts)
    return result


def decoding_speed(model: Llama, batch: int, new_tokens: int = 24) -> float:
    """Tokens a second of greedy decoding from a short prompt."""
    prompt = torch.arange(100, 116).expand(batch, -1)
    generate(model, prompt, 4)
    start = time.perf_counter()
    generate(model, prompt, new_tokens)
    return batch * new_tokens / (time.perf_counter() - start)


if __name__ == "__main__":
    run(main)
