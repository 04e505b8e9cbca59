"""Turn a token store into a stream: windows in chunks that training reads from a disk or an object storage.

python scripts/stream_corpus.py --data_dir data/my_domain --stream_dir data/my_domain_stream --sequence_length 512
"""

import json
from pathlib import Path

from lit_llama.command_line import progress, run
from lit_llama.data.streaming import write_stream


def main(
    *,
    data_dir: Path,
    stream_dir: Path,
    sequence_length: int = 512,
    seed: int | None = 0,
    chunk_megabytes: float = 16,
    overwrite: bool = False,
) -> None:
    """Turn a token store into a stream: windows in chunks that training reads from a disk or an object storage.

    Args:
        data_dir: Token store, made by scripts/prepare_corpus.py.
        stream_dir: Where the stream is written; copy it as it is to an object storage.
        sequence_length: Tokens a window; training must use the same.
        seed: Of the order in which training documents follow one another. null: the store's order.
        chunk_megabytes: Size of a chunk. A process that trains holds the windows of four in memory.
        overwrite: Replace what is in stream_dir.
    """
    counts = write_stream(data_dir, stream_dir, sequence_length, seed, int(chunk_megabytes * 1e6), overwrite)
    for split, facts in counts.items():
        chunks = -(-facts["windows"] // facts["chunk_windows"])
        progress(f"{split}: {facts['windows']:,} windows of {sequence_length} tokens in {chunks:,} chunks")
    print(json.dumps(counts))


if __name__ == "__main__":
    run(main)
