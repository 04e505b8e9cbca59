"""Make an instruction store for finetuning out of files of questions and answers, or of conversations."""

import json
import shlex
import sys
from pathlib import Path
from typing import Literal

from prepare_corpus import gather

from lit_llama.command_line import run
from lit_llama.data.instructions import InstructionOptions, prepare_instructions, preview_instructions
from lit_llama.errors import InputError


def main(
    *,
    source: Path | list[Path],
    checkpoint_dir: Path,
    data_dir: Path | None = None,
    val_source: Path | list[Path] | None = None,
    val_fraction: float = 0.05,
    seed: int = 0,
    style: str | None = None,
    system: str | None = None,
    learn_prompts: bool = False,
    max_length: int | None = None,
    too_long: Literal["drop", "cut", "error"] = "drop",
    bad_rows: Literal["error", "skip"] = "error",
    columns: dict[str, str] | None = None,
    show: int = 0,
    overwrite: bool = False,
) -> None:
    """Read jsonl, json, csv, tsv and parquet files, render in a prompt style, mask prompts, split, tokenize, report.

    Rows are recognised by their keys: instruction, input and output (Alpaca); instruction, context and response
    (Dolly); prompt and completion; question and answer or answers; messages (OpenAI); conversations (ShareGPT).

    Args:
        source: Files; a row is one example.
        checkpoint_dir: Model to be trained; its tokenizer and chat template are used.
        data_dir: Instruction store to write. Without it nothing is written, see show.
        val_source: Files to hold out for evaluation; rows of the source with a prompt of theirs are left out. Without
            it, prompts of the source are held out.
        val_fraction: Share of prompts held out if there is no val_source, by a hash of the user's first turn; 0 for
            none.
        seed: Another seed holds out other prompts.
        style: Prompt style: plain, alpaca, llama2, llama3, mistral, mistral-v3, tinyllama, chatml, or template (the
            checkpoint's own chat template). By default what the checkpoint's template is; without one, plain if the
            first row is a prompt and its completion, else alpaca.
        system: System message for rows that have none.
        learn_prompts: Learn prompts too, not only answers.
        max_length: Most tokens of an example; by default the model's context. Windows of N tokens
            (--train.sequence_length N) hold examples of up to N + 1.
        too_long: Drop longer examples, cut off their end, or stop with an error. A cut answer does not teach the model
            to end there.
        bad_rows: Stop at the first unusable row with an error, or skip such rows and report them.
        columns: What the files call a key, as '{instruction: Frage, output: Antwort}'.
        show: Print that many examples to stderr, exactly as they are tokenized; what is learned is green, or within
            brackets where stderr is no terminal.
        overwrite: Replace an existing token store.
    """
    options = InstructionOptions(
        checkpoint_dir, style, system, learn_prompts, max_length, too_long, bad_rows, columns or {}
    )
    sources = source if isinstance(source, list) else [source]
    if show < 0 or (data_dir is None and not show):
        raise InputError("nothing to do: give --data_dir to write a store, or --show 3 to see the first examples")
    if data_dir is None:
        preview_instructions(sources, options, show)
        return
    report = prepare_instructions(
        sources,
        data_dir,
        options,
        val_sources=val_source if isinstance(val_source, list) or val_source is None else [val_source],
        val_fraction=val_fraction,
        seed=seed,
        show=show,
        overwrite=overwrite,
        command=shlex.join(sys.argv),
    )
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    run(main, gather(gather(sys.argv[1:], "--source"), "--val_source"))
