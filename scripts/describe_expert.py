"""Store what the documents of an adapter are about, so that generate/lora.py --route_by embedding can choose it.

python scripts/describe_expert.py --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir out/experts/law
--documents data/law/documents
"""

from pathlib import Path
from typing import Literal

from lit_llama.adapter_routing import EMBEDDING_FILE, write_embedding
from lit_llama.checkpoint import load_model
from lit_llama.command_line import progress, run
from lit_llama.config import Quantization
from lit_llama.errors import InputError
from lit_llama.files import refuse_overwrite
from lit_llama.hardware import pick_device, pick_dtype
from lit_llama.injection.preparation import read_documents
from lit_llama.tokenizer import Tokenizer


def main(
    *,
    checkpoint_dir: Path,
    adapter_dir: Path,
    documents: Path,
    max_passages: int = 256,
    quantize: Quantization | None = None,
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Write routing.safetensors into an adapter directory: mean and variance of the embeddings of its documents.

    Args:
        checkpoint_dir: Base model, a Hugging Face directory.
        adapter_dir: The adapter's directory.
        documents: Folder or file of the documents that it was trained on.
        max_passages: Passages that are embedded at most, spread over the documents.
        quantize: Store the base weights in 4 or 8 bits.
        dtype: Precision of weights and computation; auto: bf16 where the machine computes with it, else fp32.
        device: cpu, cuda, mps, or auto for the best there is.
        overwrite: Replace an older routing.safetensors.
    """
    if max_passages < 1:
        raise InputError(f"--max_passages {max_passages} must be at least 1")
    if not (adapter_dir / "adapter_config.json").is_file():
        raise InputError(f"{adapter_dir}: no adapter there (no adapter_config.json)")
    refuse_overwrite(adapter_dir / EMBEDDING_FILE, overwrite)
    texts = read_documents([documents])
    place = pick_device(device)
    model = load_model(checkpoint_dir, pick_dtype(dtype, place), place, quantize)
    count = write_embedding(model, Tokenizer.from_checkpoint(checkpoint_dir), texts, adapter_dir, max_passages)
    progress(f"{adapter_dir / EMBEDDING_FILE}: {count} passages of {len(texts)} documents")


if __name__ == "__main__":
    run(main)
