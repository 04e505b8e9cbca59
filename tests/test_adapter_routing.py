"""Routing among adapters: against PEFT's Arrow, against formulas in float64, and as a user runs it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.experts.routing import Domain
from benchmarks.experts.routing import main as routing_benchmark
from generate.lora import main as generate_lora
from lit_llama.adapter_routing import (
    Router,
    TokenRouter,
    arrow_prototypes,
    embed_texts,
    embedding_scores,
    inject_gates,
    mixture_layers,
    open_route,
    write_embedding,
    write_gates,
)
from lit_llama.adapters import AdapterBank, load_directory
from lit_llama.answering import AnswerArguments, answer_prompts
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.data.token_store import TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.generation import generate, prepare_to_generate
from lit_llama.generation_arguments import ExpertArguments
from lit_llama.injection.interface import Document
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lit_llama.lora_tree import tree_layers
from lit_llama.model import Llama
from lit_llama.prompts import encode_prompt
from lit_llama.tokenizer import Tokenizer
from scripts.describe_expert import main as describe_expert
from scripts.train_gates import Arguments as GatesArguments
from scripts.train_gates import main as train_gates

NAMES = ("coast", "law", "tax")
IDS = torch.tensor([[5, 17, 40, 81, 300, 12, 9, 33], [200, 201, 7, 7, 90, 3, 250, 11]])
TEXTS = {
    "coast": "The coast and the river of the country are long. Its harbour lies by the sea.",
    "law": "The court and the judge rule by the statute. A lawyer pleads before the jury.",
    "tax": "A 19 % VAT of 2,400 EUR is due 31/03. Form 1040 line 12 adds 7 % to 8,849.",
}


def write_adapter(checkpoint: Path, directory: Path, seed: int, config: LoRAConfig) -> None:
    """A random adapter whose updates have one direction that is much larger than the others: PEFT finds it by fifteen
    rounds of power iteration."""
    model = load_model(checkpoint, torch.float32)
    torch.manual_seed(seed)
    inject_lora(model, config)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
        layer.lora_A.data[0] *= 12
        layer.lora_B.data[:, 0] *= 3
    save_adapter(model, directory)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with larger weights, so that it says different things to different prompts."""
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    torch.manual_seed(0)
    model = Llama(LlamaConfig.from_json(tiny_checkpoint))
    model.initialize_(std=0.12)
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


@pytest.fixture(scope="module")
def library(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of one form, each described by documents and with (random) gates."""
    directory = tmp_path_factory.mktemp("library")
    model, tokenizer = load_model(checkpoint, torch.float32), Tokenizer.from_checkpoint(checkpoint)
    for seed, name in enumerate(NAMES):
        write_adapter(checkpoint, directory / name, seed, LoRAConfig(r=4, alpha=2 + 2 * seed))
        write_embedding(model, tokenizer, [Document(id=name, text=TEXTS[name], title="")], directory / name)
        gated = load_model(checkpoint, torch.float32)
        inject_gates(gated, directory / name)
        for _, layer in tree_layers(gated):
            nn.init.normal_(layer.lora_router.weight)
        write_gates(gated, directory / name)
    return directory


def router_of(checkpoint: Path, library: Path, method: str, top_k: int | None = None) -> Router:
    bank, errors = load_directory(load_model(checkpoint, torch.float32), library)
    assert not errors
    return Router(bank, Tokenizer.from_checkpoint(checkpoint), library, method, top_k)


# --- token by token


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_gives_the_logits_of_peft(top_k: int, checkpoint: Path, library: Path) -> None:
    from peft import ArrowConfig
    from peft.tuners.lora.arrow import create_arrow_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    paths, config = [str(library / name) for name in NAMES], ArrowConfig(top_k=top_k, rng_seed=0)
    peft = create_arrow_model(base, paths, config).eval()
    router = router_of(checkpoint, library, "arrow", top_k)
    with torch.no_grad():
        expected = peft(IDS).logits
        plain = router.bank.model(IDS)
        with router.answering(NAMES[:2]):
            mixed = router.bank.model(IDS)
        after = router.bank.model(IDS)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    assert (mixed - plain).abs().max() > 0.1 and torch.equal(plain, after)


def test_a_prototype_is_the_first_right_singular_vector_of_the_update() -> None:
    generator = torch.Generator().manual_seed(0)
    low_rank = {
        str(rank): (torch.randn(rank, 20, generator=generator), torch.randn(30, rank, generator=generator))
        for rank in (1, 3, 7)
    }
    for name, prototype in arrow_prototypes(low_rank).items():
        A, B = (factor.double().numpy() for factor in low_rank[name])
        expected = np.linalg.svd(B @ A)[2][0]
        assert abs(expected @ prototype.numpy()) == pytest.approx(1, abs=1e-5)


def test_gates_weigh_experts_as_published() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 12, generator=generator) * torch.tensor([[1.0], [50.0], [0.01], [3.0]]) + 2
    x = torch.randn(2, 3, 12, generator=generator)
    router = TokenRouter(vectors, "gates", top_k=2)
    router(x)

    def standardised(rows: np.ndarray) -> np.ndarray:
        return (rows - rows.mean(1, keepdims=True)) / np.sqrt(rows.var(1, keepdims=True) + 1e-5)

    rows = standardised(x.double().flatten(0, 1).numpy())
    affinity = rows @ standardised(vectors.double().numpy()).T / np.sqrt(12)
    for weights, scores in zip(router.routing.numpy(), affinity, strict=True):
        first, second = np.argsort(-scores)[:2]
        expected = np.zeros(4)
        share = 1 / (1 + np.exp(scores[second] - scores[first]))
        expected[[first, second]] = share, 1 - share
        np.testing.assert_allclose(weights, expected, atol=1e-5)


def test_a_mixture_of_different_ranks_and_targets_is_the_weighted_sum_of_updates(checkpoint: Path) -> None:
    model, generator = load_model(checkpoint, torch.float32), torch.Generator().manual_seed(0)
    q, v = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"

    def member(rank: int, out: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(rank, 64, generator=generator), torch.randn(out, rank, generator=generator)

    factors = {"one": {q: member(2, 64)}, "two": {q: member(5, 64), v: member(3, 32)}}
    vectors = {name: arrow_prototypes(own) for name, own in factors.items()}
    layers = mixture_layers(model, factors, vectors, "arrow", 2)
    assert list(layers) == [q, v]
    x = torch.randn(3, 64, generator=generator)
    with torch.no_grad():
        mixed, only = layers[q](x), layers[v](x)
    scores = torch.stack([(x @ vectors[name][q]).abs() for name in factors], dim=1).double()
    weights = scores.exp() / scores.exp().sum(1, keepdim=True)
    expected = model.get_submodule(q)(x).detach().double()
    for weight, own in zip(weights.T, factors.values(), strict=True):
        A, B = (factor.double() for factor in own[q])
        expected += weight[:, None] * (x.double() @ A.T @ B.T)
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-4, atol=1e-4)
    assert layers[v].lora_router.routing.tolist() == [[0, 1]] * 3  # the one that does not adapt it has no share
    A, B = factors["two"][v]
    torch.testing.assert_close(only, model.get_submodule(v)(x).detach() + x @ A.T @ B.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["arrow", "gates"])
def test_a_mixture_generates_what_it_computes_at_once(method: str, checkpoint: Path, library: Path) -> None:
    router = router_of(checkpoint, library, method)
    prepare_to_generate(router.bank.model)  # what it makes does not know the mixture
    prompts = [IDS[0].tolist(), IDS[1, :5].tolist()]
    with router.answering(NAMES[:2]):
        rows = generate(router.bank.model, prompts, 6)
        for prompt, new in zip(prompts, rows, strict=True):
            with torch.no_grad():
                logits = router.bank.model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == new
    shares = router.scores("the coast")
    assert list(shares) == list(NAMES) and sum(shares.values()) == pytest.approx(1, abs=1e-5)


# --- gates


def test_a_gate_scales_the_update_of_its_layer_and_alone_has_a_gradient(checkpoint: Path, library: Path) -> None:
    gated, plain = load_model(checkpoint, torch.float32), load_model(checkpoint, torch.float32)
    inject_gates(gated, library / "law")
    load_adapter(plain, library / "law")
    for _, layer in lora_layers(plain):
        layer.scaling /= 2  # sigmoid(0)
    torch.testing.assert_close(gated(IDS), plain(IDS), rtol=1e-4, atol=1e-4)
    learned = {name for name, parameter in gated.named_parameters() if parameter.requires_grad}
    assert len(learned) == 14 and all(name.endswith("lora_router.weight") for name in learned)

    name, layer = next(tree_layers(gated))
    other = dict(lora_layers(plain))[name]
    x, weight = torch.randn(4, 64), torch.randn(1, 64, requires_grad=True)
    layer.lora_router.weight.data.copy_(weight.detach())
    gated.train()
    layer(x).square().sum().backward()
    update = 2 * torch.nn.functional.linear(x, other.delta_weight())
    (
        torch.nn.functional.linear(x, other.linear.weight) + torch.sigmoid(x @ weight.T) * update
    ).square().sum().backward()
    torch.testing.assert_close(layer.lora_router.weight.grad, weight.grad, rtol=1e-3, atol=1e-3)


def test_gates_are_trained_by_the_script_and_kept_with_the_adapter(
    checkpoint: Path, library: Path, tmp_path: Path
) -> None:
    data_dir, adapter = tmp_path / "tokens", tmp_path / "library/law"
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    with TokenStoreWriter(data_dir, tokenizer.vocab_size, tokenizer.sha256, str(checkpoint)) as writer:
        for split in ("train", "train", "val"):
            writer.add(split, np.array(tokenizer.encode(TEXTS["law"])), num_words=15, num_bytes=len(TEXTS["law"]))
    adapter.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(library / "law" / file, adapter / file)
    before = (adapter / "adapter_model.safetensors").read_bytes()
    command = ("--checkpoint_dir", checkpoint, "--adapter_dir", adapter, "--data_dir", data_dir)
    steps = ("--train.max_steps", 3, "--train.sequence_length", 32, "--precision", "fp32")
    run_script("scripts/train_gates.py", *command, *steps)
    gates = load_file(adapter / "gates.safetensors")
    assert len(gates) == 14 and all(vector.abs().max() > 0 for vector in gates.values())
    assert gates["model.layers.1.mlp.down_proj"].shape == (160,)
    assert (adapter / "adapter_model.safetensors").read_bytes() == before
    report = json.loads((adapter / "gates/report.json").read_text())
    assert report["after"]["val_loss"] < report["before"]["val_loss"]
    with pytest.raises(InputError, match="gates.safetensors exists already"):
        train_gates(GatesArguments(checkpoint_dir=checkpoint, adapter_dir=adapter, data_dir=str(data_dir)))


# --- by embedding


def test_a_text_is_embedded_at_the_end_of_its_prompt_whatever_its_neighbours(checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint, torch.float32), Tokenizer.from_checkpoint(checkpoint)
    embedded = embed_texts(model, tokenizer, list(TEXTS.values()), batch_size=2)
    ids = tokenizer.encode(f'This sentence: "{TEXTS["tax"]}" means in one word: "')
    with torch.no_grad():
        expected = model.model(torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(embedded[2], expected, rtol=1e-4, atol=1e-4)
    alone = embed_texts(model, tokenizer, [TEXTS["coast"]])
    torch.testing.assert_close(embedded[:1], alone, rtol=1e-4, atol=1e-4)


def test_scores_are_cosines_from_the_middle_in_standard_deviations() -> None:
    means = torch.tensor([[1.0, 100.0], [3.0, 100.0], [2.0, 130.0]])
    variances = torch.tensor([[0.25, 300.0], [0.25, 300.0], [0.25, 300.0]])
    # Middle (2, 110), deviations (0.5, sqrt 300): the query lies at (1, 5 / sqrt 300), the experts at
    # (-2, -10 / sqrt 300), (2, -10 / sqrt 300) and (0, 20 / sqrt 300).
    query, e = torch.tensor([2.5, 115.0]), 300**-0.5
    found = embedding_scores(query, means, variances)
    points = [(-2, -10 * e), (2, -10 * e), (0, 20 * e)]
    expected = [(x + 5 * e * y) / ((1 + 25 * e * e) * (x * x + y * y)) ** 0.5 for x, y in points]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert embedding_scores(query, means[:1], variances[:1]).tolist() == [0]


# --- generate/lora.py


def test_each_prompt_of_a_batch_is_answered_by_its_expert(
    checkpoint: Path, library: Path, capsys: pytest.CaptureFixture
) -> None:
    # A random model does not embed what is alike near each other; what was described it knows again.
    chosen = ["law", "coast", "tax", "law"]
    prompts = [TEXTS[name] for name in chosen]
    router = router_of(checkpoint, library, "embedding")
    assert router.choose(prompts) == chosen
    said = capsys.readouterr().err
    assert "route: coast by embedding (coast 1.00, " in said and said.count("\n") == 4 and prompts[1][:70] in said
    file = library.parent / "prompts.txt"
    file.write_text("\n".join(prompts))
    arguments = AnswerArguments(
        checkpoint_dir=checkpoint, prompts_file=file, dtype="fp32", max_new_tokens=8, style="plain"
    )
    answer_prompts(arguments, adapters_dir=library)
    answers = capsys.readouterr().out
    expected = ""
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    for prompt, name in zip(prompts, chosen, strict=True):
        model = load_model(checkpoint, torch.float32)
        load_adapter(model, library / name)
        ids = encode_prompt(tokenizer, "plain", prompt)
        expected += tokenizer.decode(generate(model, ids, 8, stop_ids=tokenizer.stop_ids)[0]) + "\n"
    assert answers == expected


def test_an_expert_is_asked_in_its_own_style(
    checkpoint: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(library, tmp_path / "library")
    (tmp_path / "library/law/lit_config.yaml").write_text("eval: {probe_style: alpaca, probe_system: null}\n")

    def answers(**options: object) -> str:
        arguments = AnswerArguments(checkpoint_dir=checkpoint, dtype="fp32", max_new_tokens=6, prompt="The judge?")
        answer_prompts(arguments, **options)
        return capsys.readouterr().out

    own = answers(adapter_dir=tmp_path / "library/law")
    assert answers(adapters_dir=tmp_path / "library", route="law") == own != answers(adapter_dir=library / "law")


def test_a_broken_adapter_is_told_of_and_the_others_answer(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    shutil.copytree(library, tmp_path / "library")
    (tmp_path / "library/law/adapter_model.safetensors").write_bytes(b"short")
    options = ("--checkpoint_dir", checkpoint, "--dtype", "fp32", "--max_new_tokens", 4, "--prompt", "The judge?")
    process = run_script("generate/lora.py", *options, "--adapters_dir", tmp_path / "library", "--route_by", "arrow")
    lines = process.stderr.splitlines()
    assert lines[0].startswith("route: law is left out: ") and "adapter_model.safetensors" in lines[0]
    assert "by arrow (" in lines[1] and "law" not in lines[1].split("(")[1]
    assert process.stdout.strip()


@pytest.mark.parametrize(
    ("route", "method", "missing", "message"),
    [
        ("history", "embedding", None, "'history' is neither auto nor an adapter in .*: coast, law, tax"),
        ("auto", "embedding", "law/routing.safetensors", "law/routing.safetensors: no such file: describe the expert"),
        ("auto", "gates", "tax/gates.safetensors", "tax/gates.safetensors: no such file: train the adapter's gates"),
    ],
)
def test_what_a_route_lacks_is_named(
    route: str, method: str, missing: str | None, message: str, checkpoint: Path, library: Path, tmp_path: Path
) -> None:
    shutil.copytree(library, tmp_path / "library")
    if missing:
        (tmp_path / "library" / missing).unlink()
    model, tokenizer = load_model(checkpoint, torch.float32), Tokenizer.from_checkpoint(checkpoint)
    with pytest.raises(InputError, match=message):
        open_route(model, tokenizer, tmp_path / "library", route, method)


def test_files_of_another_base_or_another_adapter_are_refused(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    shutil.copytree(library, tmp_path / "library")
    model, tokenizer = load_model(checkpoint, torch.float32), Tokenizer.from_checkpoint(checkpoint)
    bank = AdapterBank(model)
    bank.load("law", tmp_path / "library/law")
    path = tmp_path / "library/law/gates.safetensors"
    gates = load_file(path)
    save_file({"model.layers.0.self_attn.q_proj": gates["model.layers.0.self_attn.q_proj"]}, path)
    with pytest.raises(InputError, match="not of this adapter's layers"):
        Router(bank, tokenizer, tmp_path / "library", "gates")
    save_file(gates, path, metadata={"base_fingerprint": "another"})
    with pytest.raises(InputError, match="made with another base"):
        Router(bank, tokenizer, tmp_path / "library", "gates")
    path.write_bytes(b"{}")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        Router(bank, tokenizer, tmp_path / "library", "gates")


def test_one_adapter_or_a_folder_of_them_but_not_both(checkpoint: Path, library: Path) -> None:
    for given in ({}, {"adapter_dir": library / "law", "adapters_dir": library}):
        with pytest.raises(InputError, match="give --adapter_dir, one adapter, or --adapters_dir"):
            generate_lora(ExpertArguments(checkpoint_dir=checkpoint, prompt="x", **given))


# --- scripts


def test_an_expert_is_described_by_the_script(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    shutil.copytree(library / "tax", tmp_path / "tax")
    stored = load_file(tmp_path / "tax/routing.safetensors")
    (tmp_path / "tax/routing.safetensors").unlink()
    document = tmp_path / "tax.txt"
    document.write_text(TEXTS["tax"])
    options = ("--checkpoint_dir", checkpoint, "--documents", document, "--dtype", "fp32")
    process = run_script("scripts/describe_expert.py", *options, "--adapter_dir", tmp_path / "tax")
    assert "1 passages of 1 documents" in process.stderr
    written = load_file(tmp_path / "tax/routing.safetensors")
    assert written.keys() == stored.keys() and written["mean"].shape == (64,)
    with pytest.raises(InputError, match="routing.safetensors exists already"):
        describe_expert(checkpoint_dir=checkpoint, adapter_dir=tmp_path / "tax", documents=document)
    with pytest.raises(InputError, match="no adapter there"):
        describe_expert(checkpoint_dir=checkpoint, adapter_dir=tmp_path, documents=document)


def test_the_benchmark_measures_choices_and_answers(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    domains = {}
    for name in ("law", "tax"):
        documents, questions = tmp_path / f"{name}.txt", tmp_path / f"{name}.jsonl"
        documents.write_text(TEXTS[name])
        rows = [
            {"question": TEXTS[name], "answers": ["the"]},
            {"question": "What?", "answers": ["x"], "split": "known"},
        ]
        questions.write_text("\n".join(map(json.dumps, rows)))
        shutil.copytree(library / name, tmp_path / "work/experts" / name)  # with what an earlier call prepared
        places = {"adapter_dir": library / name, "documents": documents, "question_file": questions}
        domains[name] = {key: str(path) for key, path in places.items()} | {"data_dir": str(tmp_path)}
    options = ("--checkpoint_dir", checkpoint, "--work_dir", tmp_path / "work", "--max_new_tokens", 4)
    options = (*options, "--domains", json.dumps(domains))
    process = run_script("benchmarks/experts/routing.py", *options, env={"PYTHONPATH": str(ROOT)})
    results = json.loads(process.stdout)
    assert results["setting"]["questions"] == {"law": 1, "tax": 1} and "hardware" in results
    assert results["methods"].keys() == {"embedding", "arrow", "gates"}
    by_embedding = results["methods"]["embedding"]
    assert by_embedding["accuracy"]["mean"] == 1
    assert by_embedding["chosen"] == {"law": {"law": 1, "tax": 0}, "tax": {"law": 0, "tax": 1}}
    assert by_embedding["answers"] == results["right_adapter"]
    for method in ("arrow", "gates"):
        own = results["methods"][method]
        assert sum(sum(row.values()) for row in own["chosen"].values()) == 2
        assert 0 <= own["answers_of_mixture"]["mean"] <= 1
    law = Domain(library / "tax", tmp_path / "law.txt", tmp_path / "law.jsonl")
    with pytest.raises(InputError, match="nothing to choose between"):
        routing_benchmark(checkpoint_dir=checkpoint, domains={"law": law})
    with pytest.raises(InputError, match="holds another adapter than"):
        routing_benchmark(checkpoint_dir=checkpoint, domains={"law": law, "tax": law}, work_dir=tmp_path / "work")
