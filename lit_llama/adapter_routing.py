"""Which of the adapters in a bank answers: one for a question, or a mixture of them token by token.

    embedding   one for a question: whose documents are most like it (routing.safetensors, by `write_embedding`)
    arrow       each token in each layer: whose update acts on it most (no file: it is read off the factors)
    gates       each token in each layer: whose gates open for it (gates.safetensors, by scripts/train_gates.py)

What a question is answered by, and what is known of a method's hits, is `benchmarks/experts/routing.py`'s. A mixture is
a tree of adapters without the tree (`lora_tree_linear.py`): the experts are its leaves, `TokenRouter` weighs them.
Loading and selecting adapters is `adapters.py`'s, training gates `training.py`'s.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.adapter_files import read_tensors, write_tensors
from lit_llama.adapters import AdapterBank, load_directory
from lit_llama.command_line import progress
from lit_llama.errors import InputError
from lit_llama.evaluation.questions import spread
from lit_llama.evaluation.retrieval import cut_passages
from lit_llama.generation_arguments import RouteMethod
from lit_llama.injection.interface import Document
from lit_llama.lora_tree import tree_layers
from lit_llama.lora_tree_linear import LoRATreeLinear
from lit_llama.lora_tree_routing import top_k_weights
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

TOP_K = {"arrow": 3, "gates": 2}
"""Adapters that a token mixes: as in PEFT, and as in the paper."""

EMBEDDING_FILE, GATES_FILE = "routing.safetensors", "gates.safetensors"
"""In an adapter directory, beside PEFT's two files."""

_EMBEDDING_PROMPT = ('This sentence: "', '" means in one word: "')
_ROUTED_TOKENS = 256
"""Of a text; what comes behind them is not looked at."""
_PASSAGE_WORDS = 30
"""About the length of a question, which passages are compared with."""

LowRank = dict[str, tuple[Tensor, Tensor]]
"""As `AdapterBank.low_rank`: lora_A (r, in) and scaling * lora_B (out, r) by the name of a linear layer."""


class Router:
    """Chooses among the adapters of a bank, and lets what it chose answer.

    Args:
        bank: its adapters are the subfolders of `adapters_dir` of the same names.
        method: how it chooses. An embedding is of the whole question; arrow and gates answer with a mixture, of which
            the choice is the adapter with the largest share.
        top_k: adapters that a token mixes at most; by default `TOP_K`. The weights are a softmax over them.

    Raises:
        InputError: an adapter lacks the file that the method needs; it is named.
    """

    def __init__(
        self, bank: AdapterBank, tokenizer: Tokenizer, adapters_dir: Path, method: RouteMethod, top_k: int | None = None
    ) -> None:
        self.bank, self.tokenizer, self.method = bank, tokenizer, method
        self.mixes = method != "embedding"
        """Whether a mixture answers, that each token chooses afresh, and not one adapter of the bank."""
        directories = {name: Path(adapters_dir) / name for name in bank.names}
        fingerprint = bank.model.fingerprint
        if method == "embedding":
            stored = [read_embedding(directory, fingerprint) for directory in directories.values()]
            self._means, self._variances = (torch.stack(parts) for parts in zip(*stored, strict=True))
            return
        factors = {name: bank.low_rank(name) for name in bank.names}
        if method == "arrow":
            vectors = {name: arrow_prototypes(low_rank) for name, low_rank in factors.items()}
        else:
            vectors = {name: read_gates(path, factors[name], fingerprint) for name, path in directories.items()}
        self._mixture = mixture_layers(bank.model, factors, vectors, method, top_k or TOP_K[method])

    @torch.inference_mode()
    def scores(self, question: str) -> dict[str, float]:
        """By the adapter's name: cosine of the embeddings, or its share of the mixture over all layers and tokens."""
        if not question.strip():
            raise InputError("the prompt is empty: there is nothing to choose an adapter by")
        model = self.bank.model
        with self.bank.using(None):
            if self.method == "embedding":
                query = embed_texts(model, self.tokenizer, [question])[0]
                found = embedding_scores(query, self._means, self._variances)
            else:
                ids = self.tokenizer.encode(question, bos=self.tokenizer.adds_bos)[:_ROUTED_TOKENS]
                with _in_place(model, self._mixture):
                    model.model(torch.tensor([ids], device=model.model.norm.weight.device))
                weights = [layer.lora_router.routing.mean(0) for layer in self._mixture.values()]
                found = torch.stack(weights).mean(0)
        return dict(zip(self.bank.names, found.tolist(), strict=True))

    def choose(self, questions: Sequence[str]) -> list[str]:
        """The name of the adapter for each question; says so on stderr, with the scores of all."""
        chosen = []
        for question in questions:
            ranked = sorted(self.scores(question).items(), key=lambda item: -item[1])
            chosen.append(ranked[0][0])
            scores = ", ".join(f"{name} {score:.2f}" for name, score in ranked)
            progress(f"route: {ranked[0][0]} by {self.method} ({scores}): {' '.join(question.split())[:80]}")
        return chosen

    @contextmanager
    def answering(self, chosen: Sequence[str]) -> Iterator[None]:
        """For a while, the rows of a batch are answered by what was chosen for them; by arrow and gates, by a mixture
        that each token chooses afresh."""
        if self.method == "embedding":
            with self.bank.using(chosen):
                yield
        else:
            with self.bank.using(None), _in_place(self.bank.model, self._mixture):
                yield


class FixedRoute:
    """Takes one adapter for all questions, as a `Router` would."""

    mixes = False

    def __init__(self, bank: AdapterBank, name: str) -> None:
        self.bank, self.name = bank, name

    def choose(self, questions: Sequence[str]) -> list[str]:
        return [self.name] * len(questions)

    @contextmanager
    def answering(self, chosen: Sequence[str]) -> Iterator[None]:
        with self.bank.using(self.name):
            yield


def open_route(
    model: Llama, tokenizer: Tokenizer, adapters_dir: Path, route: str, method: RouteMethod
) -> Router | FixedRoute:
    """A router over all adapters in the subfolders of a folder (route "auto"), or the one that is named.

    Of adapters that cannot be loaded "auto" says on stderr why, and leaves them out.

    Raises:
        InputError: no such folder, no adapter of that name, none that can be loaded; or see `Router`.
    """
    if route == "auto":
        bank, errors = load_directory(model, adapters_dir)
        for name, error in errors.items():
            progress(f"route: {name} is left out: {error}")
        return Router(bank, tokenizer, adapters_dir, method)
    if not adapters_dir.is_dir():
        raise InputError(f"{adapters_dir}: no such folder of adapters")
    names = sorted(path.parent.name for path in adapters_dir.glob("*/adapter_config.json"))
    if route not in names:
        raise InputError(f"--route {route!r} is neither auto nor an adapter in {adapters_dir}: {', '.join(names)}")
    bank = AdapterBank(model)
    bank.load(route, adapters_dir / route)
    progress(f"route: {route}")
    return FixedRoute(bank, route)


# --- by the embedding of the question


@torch.inference_mode()
def embed_texts(model: Llama, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 16) -> Tensor:
    """Embeddings of texts by a language model itself, fp32 (texts, hidden) on the CPU.

    The last hidden state of the model when it is about to say what the text means in one word (PromptEOL, Jiang et al.
    2023, arXiv 2307.16645): unlike a mean over the text's tokens, which a base that was never trained to embed gives
    nearly the same for any two texts, it is of what the text is about.
    """
    opening, closing = _EMBEDDING_PROMPT
    ending = tokenizer.encode(closing, continuation=True)
    embedded = []
    for start in range(0, len(texts), batch_size):
        rows = [
            tokenizer.encode(opening + text, bos=tokenizer.adds_bos)[:_ROUTED_TOKENS] + ending
            for text in texts[start : start + batch_size]
        ]
        length = max(map(len, rows))
        # Padding on the right: no token looks that far.
        padded = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=model.model.norm.weight.device)
        last = torch.tensor([len(row) - 1 for row in rows])
        embedded.append(model.model(padded)[torch.arange(len(rows)), last].float().cpu())
    return torch.cat(embedded)


def embedding_scores(query: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """Cosines (experts,) of a question's embedding with those of the experts' documents.

    Both count from the middle of the experts, and each element in standard deviations of the passages of an expert:
    what all texts share, and what varies within a subject, says nothing about the subject.

    Args:
        query: (hidden,).
        means, variances: over an expert's passages, (experts, hidden).
    """
    middle, deviation = means.mean(0), variances.mean(0).sqrt().clamp(min=1e-6)
    return F.cosine_similarity((means - middle) / deviation, ((query - middle) / deviation)[None])


def write_embedding(
    model: Llama, tokenizer: Tokenizer, documents: Sequence[Document], adapter_dir: Path, max_passages: int = 256
) -> int:
    """Store what an expert's documents are about as routing.safetensors in its directory; how many passages that took.

    Args:
        model: the base.
        max_passages: embedded at most, spread over the documents.
    """
    passages = spread([one.text for text in documents for one in cut_passages(text, _PASSAGE_WORDS)], max_passages)
    embedded = embed_texts(model, tokenizer, passages)
    summary = {"mean": embedded.mean(0).float(), "variance": embedded.var(0, correction=0).float()}
    write_tensors(adapter_dir / EMBEDDING_FILE, summary, model.fingerprint)
    return len(passages)


def read_embedding(adapter_dir: Path, fingerprint: str | None) -> tuple[Tensor, Tensor]:
    """Mean and variance of the embeddings of an expert's passages, fp32 (hidden,) each."""
    path = adapter_dir / EMBEDDING_FILE
    stored = _read_tensors(path, fingerprint, "describe the expert's documents with scripts/describe_expert.py")
    if stored.keys() != {"mean", "variance"}:
        raise InputError(f"{path}: not what scripts/describe_expert.py writes; run it again")
    return stored["mean"], stored["variance"]


# --- by the input of each layer, token by token


class TokenRouter(nn.Module):
    """How much of each expert a linear layer takes for each token, as `LoRATreeLinear` asks for it.

    arrow   |v_e . x|, v_e the direction in which expert e's update acts most (Ostapenko et al. 2024, arXiv 2405.11157)
    gates   v_e . x / sqrt(in), both brought to mean 0 and variance 1 (PHATGOOSE, Muqeeth et al. 2024, arXiv 2402.05859)

    Args:
        vectors: (experts, in); NaN for an expert that does not adapt this layer and is never taken.
    """

    def __init__(self, vectors: Tensor, method: RouteMethod, top_k: int) -> None:
        super().__init__()
        self.method, self.top_k = method, min(top_k, len(vectors))
        self.absent = vectors.isnan().any(1)
        vectors = vectors.nan_to_num()
        if method == "gates":
            vectors = F.layer_norm(vectors, vectors.shape[1:]) / vectors.shape[1] ** 0.5
        self.vectors = vectors
        self.routing: Tensor | None = None
        """Of the pass under way: weights (tokens, experts), fp32."""

    def forward(self, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        if self.method == "gates":
            scores = F.layer_norm(rows, rows.shape[1:]) @ self.vectors.T
        else:
            scores = (rows @ self.vectors.T).abs()
        self.routing = top_k_weights(scores.masked_fill(self.absent, float("-inf")), self.top_k)


def mixture_layers(
    model: Llama,
    factors: Mapping[str, LowRank],
    vectors: Mapping[str, Mapping[str, Tensor]],
    method: RouteMethod,
    top_k: int,
) -> dict[str, LoRATreeLinear]:
    """By the name of each linear layer that some expert adapts: what computes it and each token's mixture of experts.

    Args:
        factors, vectors: by the expert's name, and by the layer's.
    """
    layers = {}
    for name in dict.fromkeys(name for own in factors.values() for name in own):
        linear, members = model.get_submodule(name), [own.get(name) for own in factors.values()]
        absent = torch.full((linear.in_features,), float("nan"))
        rows = torch.stack([own.get(name, absent) for own in vectors.values()])
        router = TokenRouter(rows.to(model.model.norm.weight.device), method, top_k)
        layers[name] = _mixing_layer(linear, members, router).eval()
    return layers


def _mixing_layer(
    linear: nn.Module, members: Sequence[tuple[Tensor, Tensor] | None], router: nn.Module
) -> LoRATreeLinear:
    """A frozen layer whose leaves are low-rank updates, filled up with zeros to a common rank; None is none at all."""
    rank = max(len(member[0]) for member in members if member is not None)
    layer = LoRATreeLinear(linear, len(members), rank, 1.0, 0.0, router, owned=True).requires_grad_(False)
    A, B = layer.lora_A.zero_().unflatten(0, (-1, rank)), layer.lora_B.zero_().unflatten(1, (-1, rank))
    for leaf, member in enumerate(members):
        if member is not None:
            A[leaf, : len(member[0])], B[:, leaf, : len(member[0])] = member
    return layer


@contextmanager
def _in_place(model: Llama, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with these layers in the places of those of the same names, for a while."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in layers]
    before = [getattr(parent, child) for parent, child in places]
    decoder, model.decoder = model.decoder, None  # it was made of the layers before
    try:
        for (parent, child), layer in zip(places, layers.values(), strict=True):
            setattr(parent, child, layer)
        yield
    finally:
        model.decoder = decoder
        for (parent, child), layer in zip(places, before, strict=True):
            setattr(parent, child, layer)


def arrow_prototypes(low_rank: LowRank) -> dict[str, Tensor]:
    """The first right singular vector (in,) of each layer's update B A, up to its sign, fp32.

    By the singular values of an (r, r) core, without making the (out, in) matrix: with A^T = Q R and B = P S the update
    is P (S R^T) Q^T.
    """
    prototypes = {}
    for name, (A, B) in low_rank.items():
        Q, R = torch.linalg.qr(A.T)
        _, _, right = torch.linalg.svd(torch.linalg.qr(B).R @ R.T)
        prototypes[name] = Q @ right[0]
    return prototypes


# --- gates, trained one adapter at a time


class SigmoidGate(nn.Module):
    """How open one adapter is for each token, sigmoid(v . x), while v is trained; it begins half open."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, in_features, device=device))
        self.routing: Tensor | None = None
        """Of the pass under way, (tokens, 1) fp32."""

    def forward(self, x: Tensor) -> None:
        self.routing = torch.sigmoid(F.linear(x.flatten(0, -2), self.weight.to(x.dtype)).float())


def inject_gates(model: Llama, adapter_dir: Path) -> None:
    """Put an adapter on a base, in place, each layer of it behind a gate; only the gates require a gradient.

    y = W x + sigmoid(v . x) B A x (PHATGOOSE; see `TokenRouter`): the adapter was trained before and stays as it is.

    Raises:
        InputError: an adapter that no bank holds, see `AdapterBank.load`.
    """
    bank = AdapterBank(model)
    bank.load("expert", adapter_dir)
    factors = bank.low_rank("expert")
    model.requires_grad_(False)
    for name, member in factors.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name).base_layer
        gate = SigmoidGate(linear.in_features, model.model.norm.weight.device)
        layer = _mixing_layer(linear, [member], gate).train(model.training)
        gate.requires_grad_(True)
        setattr(model.get_submodule(parent), child, layer)
    bank.remove("expert")


def write_gates(model: Llama, directory: Path) -> None:
    """Write the gates of `inject_gates` as gates.safetensors: by the name of a linear layer, its vector (in,) fp32."""
    vectors = {name: layer.lora_router.weight[0].float() for name, layer in tree_layers(model)}
    write_tensors(directory / GATES_FILE, vectors, model.fingerprint)


def read_gates(adapter_dir: Path, low_rank: LowRank, fingerprint: str | None) -> dict[str, Tensor]:
    """The gates of an adapter that adapts the layers of `low_rank`, by their names."""
    path = adapter_dir / GATES_FILE
    vectors = _read_tensors(path, fingerprint, "train the adapter's gates with scripts/train_gates.py")
    shapes = {name: (A.shape[1],) for name, (A, _) in low_rank.items()}
    if {name: tuple(vector.shape) for name, vector in vectors.items()} != shapes:
        raise InputError(f"{path}: not of this adapter's layers; train its gates again with scripts/train_gates.py")
    return vectors


def _read_tensors(path: Path, fingerprint: str | None, remedy: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: {remedy}, or route by another method")
    tensors, made_for = read_tensors(path, f": {remedy}")
    if made_for and fingerprint and made_for != fingerprint:
        raise InputError(f"{path}: made with another base than the one loaded: {remedy}")
    return tensors
