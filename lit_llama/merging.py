"""Base + LoRA adapter -> one plain checkpoint, on disk."""

from pathlib import Path

import torch

from lit_llama.answering import adapter_style, adapter_system
from lit_llama.checkpoint import load_model, save_checkpoint, stored_dtype
from lit_llama.command_line import progress
from lit_llama.errors import InputError
from lit_llama.files import refuse_overwrite
from lit_llama.lora import load_adapter, lora_layers, merge_lora
from lit_llama.lora_tree import refuse_merging
from lit_llama.prompts import detect_style, write_chat_template


def write_merged_checkpoint(
    checkpoint_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write base + adapter as a Hugging Face directory that needs no adapter any more.

    The update is added in fp32 and rounded once, when it is stored. An adapter that was trained with a prompt style
    other than the base's, or with a system message, leaves its chat template in the directory.

    Args:
        dtype: of the stored weights; None: the base's.
        overwrite: replace what is in `out_dir`.

    Raises:
        InputError: not a LoRA adapter, one that does not fit the base, or something in `out_dir`.
    """
    refuse_overwrite(out_dir, overwrite)
    base_dtype = stored_dtype(checkpoint_dir)
    out_dtype = dtype or base_dtype
    model = load_model(checkpoint_dir, torch.promote_types(base_dtype, out_dtype))
    tied = model.config.tie_word_embeddings
    load_adapter(model, adapter_dir)
    if getattr(model, "lora_tree", None) is not None:
        refuse_merging(model)
        raise InputError(
            f"{adapter_dir} is a tree of adapters, of which each prompt takes another leaf: keep it as it is"
        )
    layers = list(lora_layers(model))
    if not layers:
        raise InputError(f"{adapter_dir} is not a LoRA adapter: what it computes is no change of the base's weights")
    progress(f"merging {len(layers)} layers of {adapter_dir} into {checkpoint_dir}")
    if model.lora_config.modules_to_save:
        progress(f"replacing {' and '.join(model.lora_config.modules_to_save)} by what was trained")
    merge_lora(model)
    if tied and not model.config.tie_word_embeddings:
        progress("note: embedding and head differ now: untied, with tie_word_embeddings = false in config.json")
    save_checkpoint(model, out_dir, tokenizer_from=checkpoint_dir, overwrite=overwrite, dtype=out_dtype)
    style, system = adapter_style(adapter_dir), adapter_system(adapter_dir)
    if style is not None and (system is not None or style != detect_style(checkpoint_dir)):
        write_chat_template(out_dir, style, system)
