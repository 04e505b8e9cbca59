"""From documents and recipes to token stores: examples, readable as JSON lines, and the same as tokens, by group.

    data_dir/examples.jsonl       what the recipes made of the documents, with what was rejected and why
             report.json          of each recipe, how many, and why others were rejected
             settings.json        what all this is a function of; where it is the same, nothing is made again
             tokens/<group>/      a token store of each group of examples

Views of one document are one group of its store, so that no window holds two of them. What is mixed with what, and in
which order, is the plan's (`recipes`), and laying windows `data.mixing`'s.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import fingerprint, load_model
from lit_llama.command_line import progress
from lit_llama.data import documents as files
from lit_llama.data.mixing import MixedWindows
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore, TokenStoreWriter
from lit_llama.errors import InputError
from lit_llama.evaluation.questions import read_questions
from lit_llama.files import atomic_directory, atomic_file, atomic_path, holds_something, read_json, write_json
from lit_llama.injection.cache import expand_cached
from lit_llama.injection.distill import TeacherTargets, conversation, teacher_targets
from lit_llama.injection.facts import Fact, check_templates, read_facts, read_templates
from lit_llama.injection.interface import (
    ASKED,
    DOCUMENTS,
    REPLAY,
    UNASKED,
    Document,
    Example,
    Generator,
    Recipe,
    Rejected,
    Resources,
    Stage,
    example_rows,
)
from lit_llama.injection.recipes import check_needs, plan_of
from lit_llama.prompts import encode_example, with_system
from lit_llama.tokenizer import Tokenizer

TEACHER_TOP_K = 20
"""Likeliest tokens whose probabilities a student learns: what is left of the teacher's is below a hundredth."""


def read_documents(sources: Sequence[Path]) -> list[Document]:
    """The documents of files and folders, in a fixed order.

    A document's id is its file's name without suffix, or file#row; its title the Markdown heading that it begins with,
    else the id in words; its headings the folders that it lies in below the source, and its first heading.

    Raises:
        InputError: no such source, no document in them, or two of one id.
    """
    found: dict[str, Document] = {}
    for source in map(Path, sources):
        for chunk in files.chunks([source], "text", "title"):
            pieces = [chunk] if isinstance(chunk, files.Skipped) else files.read(chunk, "text", "title")
            for piece in pieces:
                if isinstance(piece, files.Skipped):
                    progress(
                        f"left out {piece.file}{'' if piece.row is None else f', row {piece.row}'}: {piece.reason}"
                    )
                    continue
                document = _document(source, piece)
                if document.id in found:
                    raise InputError(f"{piece.name}: another document is called {document.id!r} already; rename one")
                found[document.id] = document
    if not found:
        raise InputError(f"no document in {', '.join(map(str, sources))}")
    return list(found.values())


def _document(source: Path, piece: files.Document) -> Document:
    path = Path(piece.file)
    name = path.name.split(".")[0] if piece.row is None else f"{path.name.split('.')[0]}#{piece.row}"
    heading = re.match(r"#+ +(.+?) *#*\n", f"{piece.text}\n")
    words = re.split(r"[_\W]+", name)
    # Spelled as in the text, where it stands there: "Bosnia and Herzegovina", not "Bosnia And Herzegovina".
    spelled = re.search(r"\b" + r"\W+".join(map(re.escape, filter(None, words))) + r"\b", piece.text, re.IGNORECASE)
    title = heading[1] if heading else spelled[0] if spelled else " ".join(words).title()
    folders = path.relative_to(source).parts[:-1] if source.is_dir() else ()
    return Document(name, piece.text, title, (*folders, heading[1]) if heading else folders)


def read_resources(
    documents: list[Document],
    facts_file: Path | None,
    templates_file: Path | None,
    question_file: Path | None,
    generator: Generator | None,
    replay_texts: Sequence[str] = (),
) -> Resources:
    """What recipes may use, with each document's facts put to it; facts and questions on other documents are not used.

    Raises:
        InputError: a file that cannot be used, facts without templates, or none of a file's rows on a document.
    """
    templates = None if templates_file is None else read_templates(templates_file)
    if facts_file is not None:
        if templates is None:
            raise InputError("--facts_file needs --templates_file, which puts facts into words")
        facts = read_facts(facts_file)
        check_templates(facts, templates)
        documents = with_facts(documents, facts)
        if not any(document.facts for document in documents):
            raise InputError(
                f"{facts_file}: no fact is on one of the documents; its doc_id {facts[0].doc_id!r} should be like"
                f" {documents[0].id!r}"
            )
    questions = []
    if question_file is not None:
        ids = {document.id for document in documents}
        rows = read_questions(question_file)
        questions = [row for row in rows if row.get("doc_id") in ids]
        if not questions:
            raise InputError(
                f'{question_file}: no question has the "doc_id" of a document; the ids are like {documents[0].id!r}'
            )
        if len(questions) < len(rows):
            progress(f"{question_file}: {len(rows) - len(questions)} questions on other documents are not used")
    return Resources(documents, templates, questions, generator, replay_texts)


def with_facts(documents: Sequence[Document], facts: Sequence[Fact]) -> list[Document]:
    """The documents with their facts; one whose facts have a single subject gets it as its title."""
    of_document: dict[str, list[Fact]] = {}
    for fact in facts:
        of_document.setdefault(fact.doc_id, []).append(fact)
    result = []
    for document in documents:
        own = tuple(of_document.get(document.id, ()))
        subjects = {fact.subject for fact in own}
        title = subjects.pop() if len(subjects) == 1 else document.title
        result.append(replace(document, facts=own, title=title))
    return result


def texts_of(store: TokenStore, tokenizer: Tokenizer, most: int = 1000) -> list[str]:
    """The text of the documents of a store, spread over it."""
    numbers = range(0, store.num_documents, -(-store.num_documents // most))
    return [tokenizer.decode(store.document(number)[0].tolist()).strip() for number in numbers]


def prepare_examples(
    recipes: list[Recipe],
    resources: Resources,
    data_dir: Path,
    checkpoint_dir: Path,
    *,
    style: str,
    system: str | None,
    length: int,
    seed: int,
    cache_dir: Path | None,
    device: torch.device,
    overwrite: bool,
) -> None:
    """Write what the recipes make of the documents; nothing is done where `data_dir` holds it already.

    Args:
        checkpoint_dir: the model to be trained; it is the teacher of examples that have a teacher's context.
        style, system: of the questions.
        length: tokens of a window. Longer texts are cut, longer questions with their answers left out and counted.
        seed: of the recipes' draws.
        cache_dir: where generated texts and teachers' probabilities are kept; None: nowhere.
        device: where the teacher computes.
        overwrite: replace examples that were made in another way.

    Raises:
        InputError: a recipe lacks what it needs, other examples lie in `data_dir`, or nothing is left to train on.
    """
    check_needs(recipes, resources)
    tokenizer = Tokenizer.from_checkpoint(checkpoint_dir)
    settings = {
        "recipes": {recipe.name: asdict(recipe) for recipe in recipes},
        "content": _digest([asdict(document) for document in resources.documents], list(resources.questions),
                           None if resources.templates is None else asdict(resources.templates)),
        "generator": None if resources.generator is None else resources.generator.identity,
        "replay": _digest(list(resources.replay_texts)),
        "tokenizer": tokenizer.sha256,
        "base": fingerprint(checkpoint_dir),
        "style": style,
        "system": system,
        "length": length,
        "seed": seed,
    }  # fmt: skip
    if (data_dir / "settings.json").is_file():
        if read_json(data_dir / "settings.json") == settings:
            progress(f"examples are there already: {data_dir}")
            return
        if not overwrite:
            raise InputError(
                f"{data_dir} holds examples of other documents, recipes or options; pass --overwrite true to replace"
                " them, or name another --data_dir"
            )
    elif holds_something(data_dir):
        raise InputError(f"{data_dir} holds something that is not examples; name another --data_dir")

    results: list[Example | Rejected] = []
    yields = []
    for recipe in recipes:
        found, counts = expand_cached(recipe, resources.documents, resources, seed, cache_dir)
        results += found
        if counts.examples or counts.rejected:
            yields.append(asdict(counts))
            progress(counts.summary())
    examples = [result for result in results if isinstance(result, Example)]
    plan = plan_of(recipes)
    stages_of = {name for stage in plan for name, share in stage.mix.items() if share > 0}
    examples = _grouped(examples, stages_of, resources)
    missing = stages_of - {REPLAY} - {example.group for example in examples}
    if missing:
        raise InputError(f"the recipes {'+'.join(settings['recipes'])} made no examples of {min(missing)!r}")
    targets = _teacher_targets(examples, checkpoint_dir, tokenizer, style, system, cache_dir, device)
    with atomic_directory(data_dir, overwrite=True) as directory:
        with atomic_file(directory / "examples.jsonl") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in example_rows(results))
        numbers = {document.id: number for number, document in enumerate(resources.documents)}
        groups = {}
        for group in sorted({example.group for example in examples}):
            chosen = [number for number, example in enumerate(examples) if example.group == group]
            groups[group] = _write_store(
                directory / "tokens" / group,
                tokenizer,
                [(examples[number], targets.get(number)) for number in chosen],
                numbers,
                style,
                system,
                length,
                str(checkpoint_dir),
            )
        write_json(directory / "report.json", {"recipes": yields, "groups": groups})
        write_json(directory / "settings.json", settings)


def open_course(
    data_dir: Path, plan: Sequence[Stage], replay: TokenStore | None, length: int, seed: int, tokens: int | None,
    passes: float,
) -> MixedWindows:  # fmt: skip
    """The windows to train on, in the order of the plan.

    Args:
        replay: store of the group `REPLAY`.
        length: tokens a window.
        seed: of the order.
        tokens: of the whole course; None: enough for `passes`.
        passes: how often examples are trained on, on average over all but replay's.
    """
    stores = {path.name: TokenStore.open(path, "train") for path in sorted((data_dir / "tokens").iterdir())}
    if replay is not None:
        stores[REPLAY] = replay
    used = {name for stage in plan for name in stage.mix}
    sources = {name: TrainingWindows(store, length, seed) for name, store in stores.items() if name in used}
    if tokens is None:
        once = sum(
            source.domain_windows * source.tokens_per_window for name, source in sources.items() if name != REPLAY
        )
        own_share = sum(stage.share * (1 - stage.mix.get(REPLAY, 0.0)) for stage in plan)
        tokens = round(passes * once / own_share)
    return MixedWindows(sources, [(tokens * stage.share, stage.mix) for stage in plan], seed)


def _grouped(examples: Sequence[Example], groups: set[str], resources: Resources) -> list[Example]:
    """The examples of the plan's groups, documents told apart by questions on them where the plan does."""
    result = []
    for example in examples:
        if example.group == DOCUMENTS and groups & {ASKED, UNASKED}:
            asked = example.doc_id in resources.questions_of
            example = replace(example, group=ASKED if asked else UNASKED)
        if example.group in groups:
            result.append(example)
    return result


def _write_store(
    data_dir: Path,
    tokenizer: Tokenizer,
    examples: Sequence[tuple[Example, TeacherTargets | None]],
    numbers: Mapping[str, int],
    style: str,
    system: str | None,
    length: int,
    source: str,
) -> dict[str, int]:
    """The token store of one group, with texts cut to at most a window; returns its counts.

    Its documents are examples, which windows hold whole: so views of one document need not meet, however few there are.
    """
    chat = examples[0][0].chat
    top_k = max((targets.ids.shape[1] for _, targets in examples if targets is not None), default=0)
    extra = {"examples": True} | ({"style": style, "system": system} if chat else {})
    too_long = 0
    with TokenStoreWriter(
        data_dir, tokenizer.vocab_size, tokenizer.sha256, source, extra=extra, teacher_top_k=top_k
    ) as writer:
        for example, targets in examples:
            if example.chat:
                ids, mask = encode_example(
                    tokenizer, style, with_system(tokenizer, style, conversation(example), system)
                )
            else:
                ids, mask = _encode_text(tokenizer, example)
            if chat and len(ids) > length + 1:
                too_long += 1
                continue
            teacher = None if targets is None else _spread(targets, mask, top_k)
            # A piece begins with the token that the one before it ends with, so that each token is a target once.
            for start in range(0, max(1, len(ids) - 1), length):
                piece = slice(start, start + length + 1)
                writer.add("train", ids[piece], mask[piece], group=numbers[example.doc_id], teacher=teacher)
        if too_long:
            progress(f"{data_dir.name}: {too_long} examples of more than {length} tokens are left out")
        counts = writer.counts().get("train")
        if counts is None:
            raise InputError(f"no example of {data_dir.name!r} fits in {length} tokens: raise --train.sequence_length")
    return {"examples": counts["documents"], "tokens": counts["tokens"], "too_long": too_long}


def _encode_text(tokenizer: Tokenizer, example: Example) -> tuple[list[int], list[int]]:
    """Ids of a text between the tokens that begin and end a document, and which of them are learned."""
    ids = [] if tokenizer.document_start_id is None else [tokenizer.document_start_id]
    mask = [example.segments[0][1]] * len(ids)
    for number, (text, weight) in enumerate(example.segments):
        new = tokenizer.encode(text, continuation=number > 0)
        ids += new
        mask += [weight] * len(new)
    if tokenizer.document_end_id is not None:
        ids.append(tokenizer.document_end_id)
        mask.append(example.segments[-1][1])
    return ids, mask


def _spread(targets: TeacherTargets, mask: Sequence[int], top_k: int) -> tuple[Any, Any]:
    """The teacher's ids and probabilities (length, k), at the learned tokens' places."""
    places = torch.tensor(mask).nonzero().squeeze(1)
    ids = torch.zeros(len(mask), top_k, dtype=torch.int64)
    probabilities = torch.zeros(len(mask), top_k)
    ids[places], probabilities[places] = targets.ids, targets.probabilities
    return ids.numpy(), probabilities.numpy()


def _teacher_targets(
    examples: Sequence[Example],
    checkpoint_dir: Path,
    tokenizer: Tokenizer,
    style: str,
    system: str | None,
    cache_dir: Path | None,
    device: torch.device,
) -> dict[int, TeacherTargets]:
    """The teacher's probabilities of those examples that have a teacher's context, by their number; cached as one."""
    chosen = {number: example for number, example in enumerate(examples) if example.teacher_context is not None}
    if not chosen:
        return {}
    key = _digest(example_rows(list(chosen.values())), fingerprint(checkpoint_dir), style, system, TEACHER_TOP_K)
    path = None if cache_dir is None else cache_dir / f"teacher-{key}.safetensors"
    if path is not None and path.is_file():
        tensors = load_file(path)
    else:
        progress(f"the teacher reads {len(chosen)} questions with their documents")
        dtype = torch.bfloat16 if device.type != "mps" else torch.float32
        teacher = load_model(checkpoint_dir, dtype, device).eval()
        targets = teacher_targets(teacher, tokenizer, style, list(chosen.values()), TEACHER_TOP_K, 8, system)
        tensors = {
            "ids": torch.cat([of_example.ids for of_example in targets]),
            "probabilities": torch.cat([of_example.probabilities for of_example in targets]),
            "lengths": torch.tensor([len(of_example.ids) for of_example in targets]),
        }
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file(tensors, temporary)
    lengths = tensors["lengths"].tolist()
    pairs = zip(tensors["ids"].split(lengths), tensors["probabilities"].split(lengths), strict=True)
    return {number: TeacherTargets(*pair) for number, pair in zip(chosen, pairs, strict=True)}


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
