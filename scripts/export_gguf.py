"""Write a model, or an adapter alone, as one GGUF file for llama.cpp, Ollama, LM Studio and their like.

python scripts/export_gguf.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/my_domain --out
expert.gguf
"""

from pathlib import Path
from typing import Literal

from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.gguf_writing import export_adapter, export_model


def main(
    *,
    checkpoint_dir: Path,
    out: Path,
    adapter_dir: Path | None = None,
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None,
    adapter_only: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a GGUF file, and read it back before it counts as written: weights, logits and tokenizer must be the same.

    Args:
        checkpoint_dir: The base model, a Hugging Face directory. A base that is trained or served in 4 or 8 bits is
            exported from its unquantized checkpoint.
        out: The file to write, such as expert.gguf.
        adapter_dir: A LoRA adapter, of this project or of PEFT, to merge into the base.
        dtype: How matrices are stored; by default bf16 for a model, f32 for an adapter.
        adapter_only: Write the adapter alone, to be put on a GGUF of its base (llama-cli --lora).
        overwrite: Replace what is at out.
    """
    if adapter_only and adapter_dir is None:
        raise InputError("--adapter_only true needs --adapter_dir, the adapter to write")
    if out.is_dir():
        raise InputError(f"--out {out} is a directory: name a file, such as {out / 'expert.gguf'}")
    if adapter_only:
        parity = export_adapter(checkpoint_dir, adapter_dir, out, dtype or "f32", overwrite)
    else:
        parity = export_model(checkpoint_dir, adapter_dir, out, dtype or "bf16", overwrite)
    progress(f"{out.stat().st_size / 1e6:,.1f} MB; {parity}")
    print(out)


if __name__ == "__main__":
    run(main)
