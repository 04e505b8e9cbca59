"""What training left in a model beside answers: the values of facts in the documents it read, and its former self.

Low perplexity on documents is not knowledge that questions reach (Allen-Zhu and Li 2023, arXiv 2309.14316), so recall
is reported beside the answers and never instead of them. It rises with the documents' style too: compare with that of
documents that were never trained on. The divergence from the base on text of other subjects tells how much of the
base's behaviour is gone, before any question shows it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.errors import InputError
from lit_llama.evaluation.likelihood import score_tokens
from lit_llama.generation import evaluating
from lit_llama.injection.interface import Document
from lit_llama.lora import lora_layers
from lit_llama.loss import chunk_sizes
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer


@torch.no_grad()
def value_recall(
    model: Llama,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    values: Mapping[str, Sequence[str]],
    window: int = 512,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """How well the model predicts documents, and in them the tokens of given values, each from the text before it.

    Documents begin and end as in pretraining. Of one that is longer than the window, each token but the first ones is
    predicted from half a window or more.

    Args:
        values: by document id, texts to recall; each is looked for, as whole words, wherever it stands.
        window: tokens that the model sees at most.
        batch_size: windows a forward pass.
        progress: called with (windows done, in all) after every batch.

    Returns:
        {"documents", "value_tokens", "accuracy": share of these that the model holds likeliest, None where there are
        none, "values": how many were looked for, "values_missing": of these stand in no place, "tokens": of the
        documents, "loss": nats a token, "perplexity", "bits_per_byte"}.

    Raises:
        InputError: a window below 2.
    """
    if window < 2:
        raise InputError(f"windows of {window} tokens leave nothing to predict from; take at least 2")
    windows = []  # (ids, number of the first target, which ids are of a value)
    missing = looked_for = 0
    for document in documents:
        wanted = list(values.get(document.id, ()))
        ids, of_value, found = _encoded(tokenizer, document.text, wanted)
        looked_for, missing = looked_for + len(wanted), missing + len(wanted) - found
        first = 1
        for start in range(0, max(1, len(ids) - 1 - window + window // 2), window // 2) if len(ids) > 1 else ():
            piece = slice(start, start + window + 1)
            windows.append((ids[piece], first, of_value[piece]))
            first = window - window // 2 + 1
    windows.sort(key=lambda item: len(item[0]))

    total = tokens = value_tokens = right = 0
    with evaluating(model):
        for at in range(0, len(windows), batch_size):
            batch = windows[at : at + batch_size]
            length = max(len(ids) for ids, _, _ in batch)
            # Padding on the right: no token looks that far.
            padded = torch.tensor([ids + [0] * (length - len(ids)) for ids, _, _ in batch])
            scored = torch.tensor([[first <= i < len(ids) for i in range(1, length)] for ids, first, _ in batch])
            valued = torch.from_numpy(np.stack([np.pad(mask, (0, length - len(mask))) for _, _, mask in batch]))
            padded = padded.to(model.model.norm.weight.device)
            hidden = model.model(padded[:, :-1])
            scores = score_tokens(model, hidden[scored], padded[:, 1:][scored])
            of_values = valued[:, 1:][scored]
            total -= scores.log_likelihood.sum().item()
            tokens += len(of_values)
            value_tokens += int(of_values.sum())
            right += int(scores.greedy[of_values].sum())
            if progress is not None:
                progress(min(at + batch_size, len(windows)), len(windows))
    loss = total / max(1, tokens)
    return {
        "documents": len(documents),
        "value_tokens": value_tokens,
        "accuracy": right / value_tokens if value_tokens else None,
        "values": looked_for,
        "values_missing": missing,
        "tokens": tokens,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": total / math.log(2) / max(1, sum(len(document.text.encode()) for document in documents)),
    }


def _encoded(tokenizer: Tokenizer, text: str, values: Sequence[str]) -> tuple[list[int], np.ndarray, int]:
    """Ids of a document, which of them have a byte of one of the values in them, and how many of the values occur."""
    before, after = ([] if i is None else [i] for i in (tokenizer.document_start_id, tokenizer.document_end_id))
    ids = before + tokenizer.encode(text) + after
    spelled = [tokenizer.bytes_of(token_id) for token_id in ids]
    # What the ids say, not the text itself: a tokenizer may put a space in front or fold letters.
    said = b"".join(spelled).decode(errors="replace")
    ends = np.cumsum([len(piece) for piece in spelled])
    starts = ends - [len(piece) for piece in spelled]
    of_value, found = np.zeros(len(ids), dtype=bool), 0
    for value in values:
        places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(value)}(?!\w)", said)]
        found += bool(places)
        for place in places:
            start, end = (len(said[:at].encode()) for at in place)
            of_value |= (starts < end) & (ends > start)
    return ids, of_value, found


@contextmanager
def without_adapter(model: Llama) -> Iterator[None]:
    """The model as it was before its LoRA, for a while: every wrapped layer gives place to its base.

    Raises:
        InputError: the adapter is more than LoRA layers (modules trained as a whole, prompt tuning): its base cannot be
            had from it.
    """
    if not is_switchable(model):
        raise InputError("this adapter cannot be switched off: it replaced weights of the base; load the base beside")
    layers = list(lora_layers(model))
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in layers]
    for (parent, child), (_, layer) in zip(places, layers, strict=True):
        setattr(parent, child, layer.linear)
    try:
        yield
    finally:
        for (parent, child), (_, layer) in zip(places, layers, strict=True):
            setattr(parent, child, layer)


def is_switchable(model: Llama) -> bool:
    """Whether what the model has on top of its base is LoRA layers only."""
    config = getattr(model, "lora_config", None)
    return config is not None and not config.modules_to_save


@torch.no_grad()
def kl_to_base(
    model: Llama,
    windows: TrainingWindows,
    base: Llama | None = None,
    batch_size: int = 8,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """KL(base || model) of the next token's distribution, in nats, averaged over the target tokens of the windows.

    Args:
        windows: made with `shuffle=False`.
        base: None: the model itself without its adapter.
        batch_size: windows a forward pass.
        max_windows: only so many, spread evenly over the store.
        progress: called with (windows done, in all) after every batch.

    Raises:
        InputError: no base is given and the adapter cannot be switched off, or the windows hold no target.
    """
    count = min(windows.windows_per_epoch, max_windows or windows.windows_per_epoch)
    chosen = [i * windows.windows_per_epoch // count for i in range(count)]
    device = model.model.norm.weight.device
    size, _ = chunk_sizes(device.type, model.config.vocab_size)
    former, as_base = (model, lambda: without_adapter(model)) if base is None else (base, nullcontext)
    total, tokens = 0.0, 0
    with evaluating(model), evaluating(former):
        for start in range(0, count, batch_size):
            batch = collate([windows[i] for i in chosen[start : start + batch_size]])
            window = [field.to(device) for field in (batch.input_ids, batch.position_ids, batch.document_ids)]
            targets = batch.targets.to(device)
            hidden = model.model(*window).flatten(0, 1)[targets]
            with as_base():
                base_hidden = former.model(*window).flatten(0, 1)[targets]
            for ours, theirs in zip(hidden.split(size), base_hidden.split(size), strict=True):
                logs = torch.log_softmax(model.lm_head(ours).float(), dim=-1)
                with as_base():
                    base_logs = torch.log_softmax(former.lm_head(theirs).float(), dim=-1)
                total += F.kl_div(logs, base_logs, reduction="none", log_target=True).sum(dim=-1).double().sum().item()
            tokens += len(targets)
            if progress is not None:
                progress(min(start + batch_size, count), count)
    if not tokens:
        raise InputError(f"{windows.name}: no target token in the windows to compare on")
    return total / tokens
