"""Merge a LoRA adapter into its base: a plain Hugging Face directory that needs no adapter any more."""

from pathlib import Path
from typing import Literal

import torch

from lit_llama.checkpoint import load_model, save_checkpoint, stored_dtype
from lit_llama.command_line import progress, run
from lit_llama.files import refuse_overwrite
from lit_llama.lora import load_adapter, lora_layers, merge_lora


def main(
    *,
    checkpoint_dir: Path,
    adapter_dir: Path,
    out_dir: Path,
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    overwrite: bool = False,
) -> None:
    """Write base + adapter as one checkpoint.

    The update is added in fp32 and rounded once, when it is stored. An adapter that was trained on a quantized base is
    merged into the unquantized weights of the checkpoint. Embedding and head stay tied as long as they are equal.

    Args:
        checkpoint_dir: The base that the adapter was trained on.
        adapter_dir: An adapter directory of this project or of PEFT.
        out_dir: The directory to write.
        dtype: Of the stored weights; by default that of the base. float32 keeps the update exactly.
        overwrite: Replace what is in out_dir.
    """
    refuse_overwrite(out_dir, overwrite)
    base_dtype = stored_dtype(checkpoint_dir)
    out_dtype = getattr(torch, dtype) if dtype else base_dtype
    model = load_model(checkpoint_dir, torch.promote_types(base_dtype, out_dtype))
    tied = model.config.tie_word_embeddings
    load_adapter(model, adapter_dir)
    progress(f"merging {len(list(lora_layers(model)))} layers of {adapter_dir} into {checkpoint_dir}")
    if model.lora_config.modules_to_save:
        progress(f"replacing {' and '.join(model.lora_config.modules_to_save)} by what was trained")
    merge_lora(model)
    if tied and not model.config.tie_word_embeddings:
        progress("note: embedding and head differ now: untied, with tie_word_embeddings = false in config.json")
    save_checkpoint(model, out_dir, tokenizer_from=checkpoint_dir, overwrite=overwrite, dtype=out_dtype)
    print(out_dir)


if __name__ == "__main__":
    run(main)
