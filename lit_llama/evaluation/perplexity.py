"""Loss, perplexity and bits per byte of a model on text: what training reports while it runs and evaluation afterwards.

Text is scored as it is trained on: packed windows of one length, documents that do not see each other, the loss
averaged over target tokens. A document cut by a window's end goes on in the next window without its context, so a
longer window means a lower loss: compare figures of one window length only. The examples of an instruction store lie
whole in windows, and only what the assistant says is scored.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lit_llama.command_line import counted
from lit_llama.data.packing import TrainingWindows, collate
from lit_llama.data.streaming import StreamedWindows
from lit_llama.data.token_store import TokenStore, token_dtype
from lit_llama.errors import InputError, RunError
from lit_llama.generation import evaluating
from lit_llama.loss import head_loss
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

if TYPE_CHECKING:
    from lightning.fabric import Fabric


@dataclass(frozen=True)
class LossResult:
    """How well a model predicts a text."""

    loss: float
    """Cross-entropy in nats, averaged over target tokens."""
    perplexity: float
    """exp(loss); comparable between models of one tokenizer."""
    bits_per_byte: float | None
    """Bits for a byte of UTF-8 text, comparable between tokenizers. None where some tokens are masked from the loss."""
    tokens: int
    """Target tokens scored."""


@torch.no_grad()
def evaluate_loss(
    model: Llama,
    windows: TrainingWindows | StreamedWindows,
    batch_size: int = 8,
    max_windows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    fabric: "Fabric | None" = None,
) -> LossResult:
    """Score one epoch of windows, in eval mode; every module's mode is put back.

    Args:
        windows: made with `shuffle=False`, so that every evaluation scores the same windows.
        batch_size: windows a forward pass.
        max_windows: score only so many, spread evenly over the store; bits per byte are then an estimate with the whole
            store's bytes a token. None: all.
        progress: called with (windows done, windows in all) after every batch.
        fabric: its processes share the batches, and all get the figure that one process would.
    """
    available = windows.windows_per_epoch
    count = min(available, max_windows or available)
    chosen = [i * available // count for i in range(count)]
    rank, world_size = (fabric.global_rank, fabric.world_size) if fabric is not None else (0, 1)
    device = model.model.norm.weight.device
    total, tokens = 0.0, 0
    with evaluating(model):
        for start in range(0, count, batch_size * world_size):
            own = start + rank * batch_size
            batch = collate([windows[i] for i in chosen[own : own + batch_size] or chosen[:1]])
            if own >= count:  # takes part in what the processes do together, and adds nothing
                batch = batch._replace(targets=batch.targets[:0])
            tokens += len(batch.targets)
            input_ids, labels, position_ids, document_ids, targets = (field.to(device) for field in batch[:5])
            hidden = model.model(input_ids, position_ids, document_ids)
            total += head_loss(model.lm_head, hidden, labels, reduction="sum", targets=targets).item()
            if progress is not None:
                progress(min(start + batch_size * world_size, count), count)
    if world_size > 1:
        sums = torch.tensor([total, tokens], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums)
        total, tokens = sums.tolist()
    if not tokens:
        raise InputError(f"{windows.name}: no target token in the windows to score")
    loss = total / tokens
    bits_per_byte = None if windows.bytes_per_target is None else loss / math.log(2) / windows.bytes_per_target
    return LossResult(loss, math.exp(min(loss, 700)), bits_per_byte, int(tokens))


def score_texts(
    model: Llama, windows: Mapping[str, TrainingWindows], batch_size: int, max_windows: int | None
) -> dict[str, dict[str, Any]]:
    """`evaluate_loss` of each text, as JSON; shows how far it is.

    Raises:
        RunError: a loss that is not finite; names the text.
    """
    results = {}
    for name, text in windows.items():
        with counted(f"{name}: windows scored") as show:
            scores = evaluate_loss(model, text, batch_size, max_windows, show)
        if not math.isfinite(scores.loss):
            dtype = model.model.norm.weight.dtype
            raise RunError(f"{name}: the loss is {scores.loss}; the weights are damaged or overflow in {dtype}")
        results[name] = asdict(scores)
    return results


def store_of_texts(texts: Sequence[str], tokenizer: Tokenizer, name: str) -> TokenStore:
    """A token store in memory, of texts encoded as pretraining documents are.

    Args:
        name: stands for the store's directory in messages.

    Raises:
        InputError: there is nothing but white space in the texts.
    """
    start, end = ([] if i is None else [i] for i in (tokenizer.document_start_id, tokenizer.document_end_id))
    documents = [start + ids + end for ids in tokenizer.encode_batch(list(texts))]
    if not any(text.strip() for text in texts):
        raise InputError(f"{name}: no text to score")
    tokens = np.concatenate([np.array(ids, dtype=token_dtype(tokenizer.vocab_size)) for ids in documents])
    counts = {"words": sum(len(t.split()) for t in texts), "bytes": sum(len(t.encode()) for t in texts)}
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": {"sha256": tokenizer.sha256},
        "splits": {"text": counts},
    }
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    return TokenStore(Path(name), "text", tokens, None, offsets, groups=None, meta=meta)


def open_texts(
    tokenizer: Tokenizer, data_dirs: dict[str, Path], split: str, text_files: Path | list[Path] | None
) -> dict[str, TokenStore]:
    """What is to be scored, by name: token stores by the names they are given, texts by those of their files.

    Raises:
        InputError: a store that cannot be opened or is of another tokenizer, a file without UTF-8 text, a name twice.
    """
    stores = {name: TokenStore.open(path, split, tokenizer.sha256) for name, path in data_dirs.items()}
    for path in text_files if isinstance(text_files, list) else [text_files] if text_files else []:
        if path.name in stores:
            raise InputError(f"{path}: another text is called {path.name} already; rename one")
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        stores[path.name] = store_of_texts([text], tokenizer, str(path))
    return stores
