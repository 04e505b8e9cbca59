"""What llama.cpp makes of exported GGUF files: the same answers and logits as this project's, or not.

python -m benchmarks.export.llama_cpp --checkpoint_dir checkpoints/smollm2-135m-instruct --adapter_dir RUN
--questions data/factbook/questions.jsonl --out benchmarks/export_llama_cpp.json

Exports base + adapter in every type, and bases on which llama.cpp puts the adapter, exported alone, as it runs. Asks
llama.cpp (`pip install xllamacpp`, whose wheel brings it compiled) and this project in fp32 the first questions of a
file, greedily and by the chat template in the GGUF, and compares answers and log-probabilities. llama.cpp rounds
activations to the type of the weights before it multiplies; only in F32 do both compute the same.
"""

import json
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lit_llama.checkpoint import load_model
from lit_llama.command_line import progress, run
from lit_llama.errors import InputError
from lit_llama.files import read_jsonl, write_json
from lit_llama.generation import stream_text
from lit_llama.gguf_writing import STORAGES, TEXTS, export_adapter, export_model
from lit_llama.hardware import run_environment
from lit_llama.lora import load_adapter
from lit_llama.model import Llama
from lit_llama.prompts import encode_prompt
from lit_llama.tokenizer import Tokenizer


class LlamaCpp:
    """A GGUF model in llama.cpp on one CPU thread, keys and values in fp32; perhaps with an adapter put on it.

    It is llama.cpp's server in this process, which listens on this machine alone as long as the object lives.
    """

    def __init__(self, path: Path, adapter: Path | None = None) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise InputError("llama.cpp is missing: pip install xllamacpp") from None
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = settings.n_batch = 256
        settings.n_parallel = settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        # Flash attention would round keys and values to F16.
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.warmup, settings.verbosity = False, 0
        if adapter is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self._server = xllamacpp.Server(settings)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a special token."""
        return self._post("tokenize", content=text, add_special=False, parse_special=False)["tokens"]

    def _post(self, action: str, **content: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        data = json.dumps(content).encode()
        request = urllib.request.Request(f"{self._server.listening_address}/{action}", data, headers)
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    def answer(self, question: str, max_new_tokens: int) -> str:
        """The greedy answer to one user turn, by the chat template in the file."""
        messages = [{"role": "user", "content": question}]
        options = {"temperature": 0, "max_tokens": max_new_tokens, "cache_prompt": False}
        answer = self._server.handle_chat_completions({"messages": messages} | options)
        return answer["choices"][0]["message"]["content"]

    def greedy(self, ids: list[int], count: int, vocab_size: int) -> tuple[list[int], Tensor]:
        """The first greedy tokens after a prompt, and the log-probabilities before each, fp32 (tokens, vocab)."""
        options = {"temperature": 0, "n_predict": count, "n_probs": vocab_size, "cache_prompt": False}
        answer = self._server.handle_completions({"prompt": ids} | options)
        tokens = answer["choices"][0]["logprobs"]["content"]
        log_probabilities = torch.full((len(tokens), vocab_size), float("nan"))
        for row, token in zip(log_probabilities, tokens, strict=True):
            row[[top["id"] for top in token["top_logprobs"]]] = torch.tensor(
                [top["logprob"] for top in token["top_logprobs"]]
            )
        return [token["id"] for token in tokens], log_probabilities


def main(
    *,
    checkpoint_dir: Path,
    adapter_dir: Path,
    questions: Path,
    out: Path,
    num_questions: int = 3,
    max_new_tokens: int = 24,
    compared_tokens: int = 4,
) -> None:
    """Export, ask both, compare.

    Args:
        checkpoint_dir: Base model.
        adapter_dir: A LoRA adapter on it.
        questions: A question file; its first questions are asked.
        out: The JSON file to write.
        num_questions: How many.
        max_new_tokens: Longest answer.
        compared_tokens: At so many tokens of each answer the log-probabilities of the whole vocabulary are compared.
    """
    asked = [row["question"] for row in read_jsonl(questions)[:num_questions]]
    model, tokenizer = load_model(checkpoint_dir, torch.float32), Tokenizer.from_checkpoint(checkpoint_dir)
    load_adapter(model, adapter_dir)
    prompts = [encode_prompt(tokenizer, "template", question) for question in asked]
    answers = [answer(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]
    results: dict[str, Any] = {}
    with TemporaryDirectory() as directory:
        adapter, merged, base = (Path(directory) / f"{name}.gguf" for name in ("adapter", "merged", "base"))
        export_adapter(checkpoint_dir, adapter_dir, adapter)
        for dtype in STORAGES:
            parity = export_model(checkpoint_dir, adapter_dir, merged, dtype, overwrite=True)
            export_model(checkpoint_dir, None, base, dtype, overwrite=True)
            size = merged.stat().st_size / 1e6
            results[f"merged {dtype}"] = {"megabytes": size, "read back by lit-llama": vars(parity)}
            for name, file, added in (
                (f"merged {dtype}", merged, None),
                (f"{dtype} base + f32 adapter", base, adapter),
            ):
                llama_cpp = LlamaCpp(file, added)
                found = [llama_cpp.answer(question, max_new_tokens) for question in asked]
                result = results.setdefault(name, {})
                result |= {"answers": found, "same_answers": sum(map(str.__eq__, found, answers))}
                result["texts_encoded_alike"] = sum(
                    llama_cpp.tokenize(text) == tokenizer.encode(text) for text in TEXTS
                )
                result |= compare(llama_cpp, model, prompts, compared_tokens)
                progress(f"{name}: {result}")
                del llama_cpp
    setting = {"questions": asked, "max_new_tokens": max_new_tokens, "compared_tokens": compared_tokens}
    setting |= {"checkpoint": checkpoint_dir.name, "texts": len(TEXTS)}
    results = {"setting": setting, "lit-llama, fp32": {"answers": answers}, "llama.cpp": results}
    write_json(out, results | run_environment(["xllamacpp"]))
    print(out)


def answer(model: Llama, tokenizer: Tokenizer, prompt: list[int], max_new_tokens: int) -> str:
    """This project's greedy answer."""
    return "".join(text for _, text in stream_text(model, tokenizer, [prompt], max_new_tokens))


def compare(llama_cpp: LlamaCpp, model: Llama, prompts: list[list[int]], count: int) -> dict[str, Any]:
    """Differences of log-probabilities over the whole vocabulary, at the first tokens of llama.cpp's answers."""
    differences, spreads, agree = [], [], []
    for prompt in prompts:
        new, found = llama_cpp.greedy(prompt, count, model.config.vocab_size)
        with torch.no_grad():
            expected = model(torch.tensor([prompt + new[:-1]]))[0, len(prompt) - 1 :].log_softmax(-1)
        differences.append((found - expected).abs())
        spreads.append(expected - expected.mean(-1, keepdim=True))
        agree.append(expected.argmax(-1) == torch.tensor(new))
    difference, spread = torch.cat(differences), torch.cat(spreads)
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "relative": float((difference.square().mean() / spread.square().mean()).sqrt()),
        "same_first_choice": float(torch.cat(agree).float().mean()),
    }


if __name__ == "__main__":
    run(main)
