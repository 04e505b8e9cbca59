"""Does the right expert answer? Accuracy of routing among adapters on questions of their domains, and of the answers.

python -m benchmarks.experts.routing --checkpoint_dir checkpoints/smollm2-135m-instruct --domains '{countries:
{adapter_dir: out/countries, documents: data/countries/documents, question_file: data/countries/questions.jsonl,
data_dir: data/countries/tokens}, weaknesses: {...}}'

Each question is asked of the base and of every adapter, in turn; what a router's choice, the right adapter or a wrong
one would have answered is looked up there. The mixtures of arrow and gates, which no single adapter answers, are asked
apart.
"""

import filecmp
import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.finetune.runs import Run, complete
from lit_llama.adapter_routing import EMBEDDING_FILE, GATES_FILE, Router, write_embedding
from lit_llama.adapters import AdapterBank
from lit_llama.answering import adapter_style, adapter_system
from lit_llama.checkpoint import load_model
from lit_llama.command_line import counted, progress, run
from lit_llama.errors import InputError
from lit_llama.evaluation.questions import evaluate_answers, read_questions, spread, wilson_interval
from lit_llama.files import write_json
from lit_llama.generation_arguments import RouteMethod
from lit_llama.hardware import pick_device, pick_dtype, run_environment
from lit_llama.injection.preparation import read_documents
from lit_llama.prompts import detect_style
from lit_llama.tokenizer import Tokenizer


@dataclass(frozen=True)
class Domain:
    """A domain and the adapter that was trained on it."""

    adapter_dir: Path
    """The adapter."""
    documents: Path
    """What it was trained on."""
    question_file: Path
    """Questions about that."""
    data_dir: Path | None = None
    """Token store of it, which its gates are trained on."""


def main(
    *,
    checkpoint_dir: Path,
    domains: dict[str, Domain],
    methods: list[RouteMethod] | None = None,
    work_dir: Path = Path("out/benchmark-routing"),
    out: Path | None = None,
    without_splits: list[str] | None = None,
    max_questions: int | None = None,
    max_passages: int = 256,
    gate_steps: int = 100,
    sequence_length: int = 128,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    threads: int = 1,
) -> None:
    """Measure; embeddings and gates that an earlier call made are used again.

    Args:
        checkpoint_dir: Base model.
        domains: By name, {adapter_dir, documents, question_file, data_dir}; data_dir is for gates only.
        methods: Ways of routing; by default embedding and arrow, and gates where every domain has a data_dir.
        work_dir: Where copies of the adapters get what routing needs.
        out: Write the results to this file too.
        without_splits: Leave out questions of these splits; by default those of the split "known", which are about
            general knowledge and belong to no domain.
        max_questions: Of each domain, spread over its file.
        max_passages: Of each domain's documents, for the embeddings.
        gate_steps: Training steps of gates.
        sequence_length: Tokens a window in it.
        max_new_tokens: Longest answer.
        batch_size: Questions answered at a time.
        threads: CPU threads of training gates.
    """
    if len(domains) < 2:
        raise InputError("--domains names fewer than two: there is nothing to choose between")
    methods = methods or ["embedding", "arrow"] + ["gates"] * all(domain.data_dir for domain in domains.values())
    tokenizer, device = Tokenizer.from_checkpoint(checkpoint_dir), pick_device("auto")
    left_out = without_splits if without_splits is not None else ["known"]
    questions = {}
    for name, domain in domains.items():
        rows = [row for row in read_questions(domain.question_file) if row.get("split") not in left_out]
        if not rows:
            raise InputError(f"{domain.question_file}: all questions are of splits that are left out, {left_out}")
        questions[name] = spread(rows, max_questions)
    library = work_dir / "experts"
    for name, domain in domains.items():
        copy_adapter(domain.adapter_dir, library / name)
    if "gates" in methods:
        train_gates(checkpoint_dir, domains, work_dir, gate_steps, sequence_length, threads)

    model = load_model(checkpoint_dir, pick_dtype("auto", device), device)
    for name, domain in domains.items():
        if "embedding" in methods and not (library / name / EMBEDDING_FILE).is_file():
            progress(f"embedding the documents of {name}")
            write_embedding(model, tokenizer, read_documents([domain.documents]), library / name, max_passages)
    bank = AdapterBank(model)
    for name in domains:
        bank.load(name, library / name)

    def ask(rows: list[dict[str, Any]], form_of: str, what: str) -> list[float]:
        """Whether each of some questions, asked in the form of an adapter's training, is answered rightly."""
        style = adapter_style(library / form_of) or detect_style(checkpoint_dir)
        system = adapter_system(library / form_of)
        with counted(what) as show:
            found = evaluate_answers(model, tokenizer, rows, style, max_new_tokens, batch_size, show, system)
        return [row["contains"] for row in found["rows"]]

    answers: dict[str, dict[str | None, list[float]]] = {name: {} for name in domains}
    for name in domains:
        for expert in (None, *domains):
            with bank.using(expert):
                answers[name][expert] = ask(questions[name], expert or name, f"{name} by {expert or 'the base'}")
    results: dict[str, Any] = {
        "setting": {"model": checkpoint_dir.name, "questions": {name: len(rows) for name, rows in questions.items()}},
        "base": by_domain({name: answers[name][None] for name in domains}),
        "right_adapter": by_domain({name: answers[name][name] for name in domains}),
        "wrong_adapter": by_domain(
            {
                name: [
                    statistics.fmean(correct)
                    for correct in zip(*(answers[name][other] for other in domains if other != name), strict=True)
                ]
                for name in domains
            }
        ),
        "methods": {},
    }
    for method in methods:
        router = Router(bank, tokenizer, library, method)
        chosen: dict[str, list[str]] = {}
        for name, rows in questions.items():
            with counted(f"{name}: routed by {method}") as show:
                chosen[name] = []
                for row in rows:
                    scores = router.scores(row["question"])
                    chosen[name].append(max(scores, key=scores.__getitem__))
                    show(len(chosen[name]), len(rows))
        found = {
            "accuracy": by_domain({name: [float(one == name) for one in own] for name, own in chosen.items()}),
            "chosen": {name: {expert: own.count(expert) for expert in domains} for name, own in chosen.items()},
            "answers": by_domain(
                {
                    name: [answers[name][expert][number] for number, expert in enumerate(own)]
                    for name, own in chosen.items()
                }
            ),
        }
        if method != "embedding":
            with router.answering(list(domains)):
                mixed = {name: ask(rows, name, f"{name} by a mixture, {method}") for name, rows in questions.items()}
            found["answers_of_mixture"] = by_domain(mixed)
        results["methods"][method] = found
    results |= run_environment()
    if out is not None:
        write_json(out, results)
    print(json.dumps(results, indent=2))


def copy_adapter(source: Path, target: Path) -> None:
    """Copy an adapter to where it is, or will be, prepared for routing."""
    target.mkdir(parents=True, exist_ok=True)
    for file in ("adapter_config.json", "adapter_model.safetensors", "lit_config.yaml"):
        if not (source / file).is_file():
            continue
        if (target / file).is_file() and not filecmp.cmp(source / file, target / file, shallow=False):
            raise InputError(f"{target} holds another adapter than {source}: remove it, or choose another --work_dir")
        shutil.copyfile(source / file, target / file)


def train_gates(
    checkpoint_dir: Path, domains: dict[str, Domain], work_dir: Path, steps: int, sequence_length: int, threads: int
) -> None:
    """Gates of every adapter, by its script."""
    for name, domain in domains.items():
        if domain.data_dir is None:
            raise InputError(f"--domains: {name} has no data_dir, which gates are trained on")
    adapters = {name: work_dir / "experts" / name for name in domains}
    runs = [
        Run(
            "scripts/train_gates.py",
            work_dir / "gates" / name,
            ("--checkpoint_dir", str(checkpoint_dir), "--adapter_dir", str(adapters[name]))
            + ("--data_dir", str(domain.data_dir), "--train.max_steps", str(steps), "--eval.interval", str(steps))
            + ("--train.sequence_length", str(sequence_length), "--eval.max_windows", "8"),
        )
        for name, domain in domains.items()
        if not (adapters[name] / GATES_FILE).is_file()
    ]
    complete(runs, 1, threads)


def by_domain(values: dict[str, list[float]]) -> dict[str, Any]:
    """Shares of each domain with their 95 % intervals, and their mean, in which every domain counts the same."""
    shares = {
        name: {"share": statistics.fmean(own), "interval": wilson_interval(sum(own), len(own)), "count": len(own)}
        for name, own in values.items()
    }
    return {"mean": statistics.fmean(own["share"] for own in shares.values()), "domains": shares}


if __name__ == "__main__":
    run(main)
