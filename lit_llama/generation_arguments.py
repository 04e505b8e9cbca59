"""What the scripts of generate/ can be told: how tokens are chosen, what model it is, what is asked.

Nothing here needs torch, so that `--help` need not wait for it.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_llama.config import CacheQuantization, Embeddings, Quantization
from lit_llama.errors import InputError

RouteMethod = Literal["embedding", "arrow", "gates"]
"""Ways to choose an expert, see `adapter_routing.py`."""


@dataclass
class SamplingConfig:
    """How the next token is chosen; the filters are those of transformers, applied in this order."""

    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen so far, prompt included (Keskar et al. 2019, arXiv
    1909.05858); 1 is off, 1.1 is mild."""
    temperature: float = 0.0
    """0 is greedy: the likeliest token, always. Otherwise logits are divided by it."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float | None = None
    """Keep the likeliest tokens that together reach this probability (Holtzman et al. 2019, arXiv 1904.09751)."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    num_samples: int = 1
    """Answers a prompt; it is processed once."""
    seed: int = 0
    """Of the random draws: the same seed, prompts and machine give the same text."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} is negative; 0 is greedy")
        if self.repetition_penalty <= 0:
            raise InputError(f"repetition_penalty {self.repetition_penalty} must be positive; 1 is off")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p} is not in [0, 1]")
        if self.num_samples < 1:
            raise InputError(f"num_samples {self.num_samples} must be at least 1")
        if self.num_samples > 1 and self.temperature == 0:
            raise InputError(
                f"num_samples {self.num_samples} with temperature 0 would repeat one answer; raise temperature"
            )


@dataclass(kw_only=True)
class ModelArguments(SamplingConfig):
    """A base model, how it is held, and how it answers."""

    checkpoint_dir: Path
    """Base model, a Hugging Face directory."""
    style: str | None = None
    """Prompt style: plain (go on with the text), alpaca, llama2, llama3, mistral, mistral-v3, tinyllama, chatml, or
    template (the checkpoint's own chat template). By default the one that the adapter was trained with, else what the
    checkpoint's chat template is."""
    system: str | None = None
    """System message; by default the one that the adapter was trained with. "" for none."""
    max_new_tokens: int | None = None
    """Longest answer; by default whatever the context leaves."""
    quantize: Quantization | None = None
    """Store the base weights in 4 or 8 bits."""
    embeddings: Embeddings | None = None
    """Embedding and head in 8 bits (int8), or the embedding in the host's memory (cpu)."""
    draft: str | None = None
    """Guess the next tokens and check several at once, which changes only how long an answer takes: "lookup" looks up
    what followed the last words before, for text that repeats its prompt; or the directory of a much smaller model with
    the same vocabulary. Used while up to 4 answers are under way."""
    quantize_cache: CacheQuantization | None = None
    """Keep what was read in 8 bits: about half of the memory of each token."""
    compile: bool = False
    """Compile the steps (torch.compile), and on CUDA replay them as a graph: faster after a minute or more, the first
    time. Not for experts that several requests choose from, nor of use on a CPU but for DoRA."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Precision of weights and computation; auto: bf16 where the machine computes with it, else fp32."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""


@dataclass(kw_only=True)
class AnswerArguments(ModelArguments):
    """Let a base model answer: one prompt, many out of a file, standard input, or whatever you type at the terminal."""

    prompt: str | None = None
    """The prompt."""
    prompts_file: Path | None = None
    """Many prompts: one a line, or JSONL with "prompt" or "question"."""
    interactive: bool = False
    """Ask for prompts until Ctrl-D; each stands for itself."""
    stop: str | list[str] = field(default_factory=list)
    """A string, or a list of them, that ends an answer and is not part of it."""
    choices: list[str] | None = None
    """The only answers that can be given: '["yes", "no"]'."""
    batch_size: int = 8
    """Prompts answered at a time."""
    json: bool = False
    """Print JSONL, {"prompt", "answer"} a line, instead of plain answers."""
    logprobs: int | None = None
    """With json also "logprobs": of each token its text, ln of its probability, and these of so many likeliest."""


@dataclass(kw_only=True)
class ExpertArguments(AnswerArguments):
    """Let a base model with a LoRA adapter answer: one prompt, many out of a file, standard input, or what you type."""

    adapter_dir: Path | None = None
    """Adapter to put on the base, as pretrain/lora.py or PEFT writes it."""
    adapters_dir: Path | None = None
    """Instead of it a folder with several, one a subfolder: an expert for each prompt."""
    route: str = "auto"
    """Which of them answers: the one of this name, or, for each prompt, the one that route_by says."""
    route_by: RouteMethod = "embedding"
    """embedding: whose documents are nearest to the prompt (scripts/describe_expert.py). arrow: each token mixes those
    whose updates act on it most; nothing to prepare. gates: each token mixes those whose gates open
    (scripts/train_gates.py)."""


@dataclass(kw_only=True)
class TalkArguments(ModelArguments):
    """A base model and its experts, all at hand at once."""

    adapter_dir: Path | None = None
    """Expert, a LoRA adapter of the base."""
    adapters_dir: Path | None = None
    """Instead of one a folder with several, one a subfolder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adapter_dir is not None and self.adapters_dir is not None:
            raise InputError("--adapter_dir and --adapters_dir are both given: choose one")


@dataclass(kw_only=True)
class ChatArguments(TalkArguments):
    """Talk with a base model and its experts in the terminal, of several with the first until you choose another; /help
    there tells what else can be done."""

    max_new_tokens: int = 512
    """Longest answer."""


@dataclass(kw_only=True)
class ServeArguments(TalkArguments):
    """Serve a base model and its experts over HTTP, as OpenAI's API; sampling options are what requests leave open."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of this machine."""
    port: int = 8000
    """0 for any that is free."""
    api_key: str | None = None
    """Token that clients must send; by default what the environment variable LIT_LLAMA_API_KEY says, else none."""
    max_new_tokens: int = 1024
    """Longest answer; a request may ask for less."""
    max_length: int | None = None
    """Longest prompt and answer together, in tokens; by default the model's context."""
    slots: int = 16
    """Answers at a time."""
    max_waiting: int = 256
    """Answers that wait for a slot; a request beyond them gets status 429."""
    max_body_bytes: int = 1_000_000
    """Longest body of a request."""
    timeout: float = 300
    """Seconds that a request may take, waiting included."""
    grace: float = 30
    """Seconds that requests under way get to finish when the server is told to end."""
