"""Merge a LoRA adapter into its base: a plain Hugging Face directory that needs no adapter any more."""

from pathlib import Path
from typing import Literal

import torch

from lit_llama.command_line import run
from lit_llama.merging import write_merged_checkpoint


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
    merged into the unquantized weights of the checkpoint. Embedding and head stay tied as long as they are equal. The
    chat template becomes that of the prompt style the adapter was trained with.

    Args:
        checkpoint_dir: The base that the adapter was trained on.
        adapter_dir: An adapter directory of this project or of PEFT.
        out_dir: The directory to write.
        dtype: Of the stored weights; by default that of the base. float32 keeps the update exactly.
        overwrite: Replace what is in out_dir.
    """
    out_dtype = getattr(torch, dtype) if dtype else None
    write_merged_checkpoint(checkpoint_dir, adapter_dir, out_dir, out_dtype, overwrite)
    print(out_dir)


if __name__ == "__main__":
    run(main)
