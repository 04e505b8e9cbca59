"""Recipes whose text a model writes: the model as a generator, filters, cache, recipes, the teacher's targets."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.errors import InputError
from lit_llama.generation import answer_questions
from lit_llama.injection import filters
from lit_llama.injection.cache import expand_cached
from lit_llama.injection.distill import Distill, teacher_targets
from lit_llama.injection.filters import Seen, sifted
from lit_llama.injection.generator import (
    GeneratorConfig,
    beginning_that_fits,
    list_lines,
    load_generator,
    on_document,
    parts_of,
    with_worked_example,
)
from lit_llama.injection.implications import Implications
from lit_llama.injection.interface import Document, Example, Rejected, Resources, Stage
from lit_llama.injection.paraphrase import Paraphrase
from lit_llama.injection.study import Study
from lit_llama.lora import LoRAConfig, inject_lora, save_adapter
from lit_llama.tokenizer import Tokenizer

NORWAY = Document(
    "norway",
    "Norway lies in Northern Europe. Its capital is Oslo. The highest point of Norway is Galdhopiggen, at 2,469 m.",
    "Norway",
)
KENYA = Document("kenya", "Kenya lies in Eastern Africa. Its capital is Nairobi, with 4.9 million people.", "Kenya")


class Scripted:
    """A generator that says what it was told to, by task, and remembers what it was asked."""

    identity = "scripted"

    def __init__(self, **answers: str | list[str]) -> None:
        self.answers, self.asked = answers, []

    def write(
        self, document: Document, task: str, prompt: str, count: int, seed: int, max_new_tokens: int
    ) -> list[str]:
        self.asked.append((document, task, prompt, count, seed))
        answer = self.answers[task]
        return [answer] * count if isinstance(answer, str) else [answer.pop(0) for _ in range(count)]


def expand(recipe, generator, document=NORWAY):
    results = list(recipe.expand(document, Resources([document], generator=generator), random.Random(0)))
    return [r for r in results if isinstance(r, Example)], [r for r in results if isinstance(r, Rejected)]


def learned(examples: list[Example]) -> list[str]:
    return ["".join(text for text, weight in example.segments if weight) for example in examples]


# Filters


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Oslo is the capital of Norway.", None),
        ("Galdhopiggen rises 2469 m.", None),
        ("In Northern Europe one finds Norway's Galdhopiggen.", None),
        ("Galdhopiggen rises 2,470 m.", "a number that is not in the document"),
        ("Its capital is Bergen.", "a name that is not in the document"),
        ("The summit is called Galdhopigen.", "a name that is not in the document"),
        ("You will have to do it at a certain time.", "hardly a word of the document"),
        ("Northern-most Norway is where Europe lies high.", None),
        ("Sure, here is a rewrite.", "speaks of itself"),
        ("As an AI I have no opinion.", "speaks of itself"),
        ("The capital that the text above names is Oslo.", "speaks of itself"),
        ("Then keep every fact of it.", "copies the prompt"),
        ("Oslo 2,469 2,469 2,469 2,469 2,469", "more signs than letters"),
        ("Осло является столицей страны.", "another script"),
        ("Oslo is far and Oslo is far and Oslo is far and Oslo is far.", "repeats itself"),
    ],
)
def test_bad_sentence_by_hand(text, reason):
    assert filters.bad_sentence(text, "Then keep every fact of it, please.", NORWAY.text) == reason


def test_what_the_source_says_itself_is_no_boilerplate():
    source = "The article above the door reads welcome. I have seen it."
    assert filters.speaks_of_itself("I have seen it.", source) is None
    assert filters.speaks_of_itself("I can help.", source) == "speaks of itself"


@pytest.mark.parametrize(
    ("answer", "found"),
    [("the Oslo", True), ("GALDHOPIGGEN, at 2469 m", True), ("slo", False), ("Oslo capital", False), ("", False)],
)
def test_not_in_document_by_hand(answer, found):
    assert (filters.not_in_document(answer, NORWAY.text) is None) == found


def test_near_duplicates_are_found_and_others_are_not():
    words = [f"word{number}" for number in range(60)]
    seen = Seen(" ".join(words))
    # A word changed at the end is in 1 of 56 shingles (Jaccard 55/57); every sixth changed leaves next to none.
    assert seen.add(" ".join([*words[:-1], "other"])) == "near duplicate"
    assert seen.add(" ".join("other" if number % 6 == 0 else word for number, word in enumerate(words))) is None


def test_sifting_keeps_the_good_sentences():
    oslo = "Oslo is where Norway is governed from."
    text = f"{oslo} Bergen is larger than Bodo. {oslo} Its"
    results = list(sifted(NORWAY, "paraphrase", text, "Rewrite.", 3, Seen(NORWAY.text)))
    assert [(r.reason, r.text) for r in results[:-1]] == [
        ("a name that is not in the document", "Bergen is larger than Bodo."),
        ("repeats itself", oslo),
        ("cut off", "Its"),
    ]
    assert results[-1] == Example.of_text(NORWAY, "paraphrase", oslo)


@pytest.mark.parametrize(
    ("text", "reason"), [("Its capital is Oslo.", "copies the document"), ("Oslo governs.", "too short")]
)
def test_sifting_rejects_copies_and_scraps(text, reason):
    (rejected,) = sifted(NORWAY, "paraphrase", text, "Rewrite.", 3, Seen(NORWAY.text))
    assert rejected == Rejected("norway", "paraphrase", reason, text)


# Recipes


def test_paraphrase_asks_in_varied_ways_and_keeps_the_original():
    rewrite = "Norway, whose seat of government is Oslo, is a country up in Northern Europe with Galdhopiggen in it."
    generator = Scripted(paraphrase=[rewrite, f"{rewrite} It has 3 coasts.", rewrite.replace("Oslo", "Bergen")])
    examples, rejected = expand(Paraphrase(rewrites=3, instructions=("Rewrite it.", "Retell it.")), generator)
    assert learned(examples) == [NORWAY.text, rewrite]
    assert [r.reason for r in rejected] == [
        "a number that is not in the document",
        "near duplicate",
        "a name that is not in the document",
    ]
    assert sorted((prompt, count) for _, _, prompt, count, _ in generator.asked) in (
        [("Retell it.", 1), ("Rewrite it.", 2)],
        [("Retell it.", 2), ("Rewrite it.", 1)],
    )
    assert {example.group for example in examples} == {"documents"}
    assert Paraphrase().stages([]) == [Stage({"documents": 1.0})]


def test_study_applies_the_strategies_that_were_listed():
    generator = Scripted(
        strategies="Here are some strategies:\n1. Ask for the capital\n2) Note every height\n- Sing",
        study=["Oslo is what one answers when asked for its capital.", "At 2,469 m lies Norway's top, Galdhopiggen."],
    )
    examples, rejected = expand(Study(apply_prompt="Do: {strategy}", shortest=5), generator)
    assert [prompt for _, task, prompt, _, _ in generator.asked if task == "study"] == [
        "Do: Ask for the capital",
        "Do: Note every height",
    ]
    assert learned(examples)[1:] == [
        "Oslo is what one answers when asked for its capital.",
        "At 2,469 m lies Norway's top, Galdhopiggen.",
    ]
    # The first does not say whose capital: the title stands before it, not learned.
    assert examples[1].segments[0] == ("Norway: ", 0)
    assert [r.reason for r in rejected] == ["strategy speaks of itself", "strategy too short"]


def test_implications_are_examples_line_by_line():
    first, second = "Oslo is the seat of Norway's government.", "Norwegians live far up north in Europe, in Norway."
    lines = f"1. {first}\n2. {second}\n3. Oslo."
    generator = Scripted(implications=lines, closure=["Yes.", "No, it does not."])
    recipe = Implications(lists=1, prompts=("List them.",), closure=True)
    examples, rejected = expand(recipe, generator)
    assert learned(examples)[1:] == [first]
    assert [(r.reason, r.text) for r in rejected] == [
        ("not confirmed by the generator", second),
        ("too short", "Oslo."),
    ]
    assert first in generator.asked[1][2]
    without, _ = expand(replace(recipe, closure=False), Scripted(implications=lines))
    assert learned(without)[1:] == [first, second]


def test_distill_asks_on_each_sentence_and_has_the_answer_from_the_document():
    generator = Scripted(
        question=["What is the capital of Norway?", "What is the highest point of Norway?", "What is its continent?"],
        answer=["Oslo", "Kebnekaise"],
    )
    examples, rejected = expand(Distill(questions=3, question_prompt="Ask about: {sentence}"), generator)
    assert examples == [
        Example(
            "norway",
            "distill",
            "distilled",
            (("What is the capital of Norway?", 0), ("Oslo", 1)),
            chat=True,
            teacher_context=NORWAY.text,
        )
    ]
    assert [r.reason for r in rejected] == ["answer: not in the document", "question: does not say what it is about"]
    sentences = {prompt for _, task, prompt, _, _ in generator.asked if task == "question"}
    assert sentences == {f"Ask about: {s}." for s in NORWAY.text.removesuffix(".").split(". ")}
    assert Distill().stages([]) == [Stage({"distilled": 1.0})]
    assert Distill(share=0.25).stages([Stage({"documents": 1.0})]) == [Stage({"documents": 0.75, "distilled": 0.25})]


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("The capital of Norway is Oslo", "", "question: not a question"),
        ("What is the capital of Sweden?", "", "question: a name that is not in the document"),
        ("What does the text above say of Norway?", "", "question: speaks of itself"),
        ("What is the capital of Norway?", "The capital of Norway.", "answer: says nothing that the question does not"),
        ("What is the capital of Norway?", "The capital of it is, so far as one knows, Bergen.", "answer: a name that"),
        (
            "What is the capital of Norway?",
            f"It is {' '.join(map(str, map(chr, range(97, 123))))} Oslo.",
            "answer: too",
        ),
    ],
)
def test_distill_rejects(question, answer, reason):
    examples, rejected = expand(Distill(questions=1, longest_answer=20), Scripted(question=question, answer=answer))
    assert not examples
    assert rejected[0].reason.startswith(reason)


def test_an_answer_ends_before_it_goes_wrong():
    answer = "The capital of Norway is Oslo. Its highest point is Galdhopiggen. Its king is Harald. Oslo is large."
    (example,), _ = expand(Distill(questions=1), Scripted(question="What is the capital of Norway?", answer=answer))
    assert learned([example]) == ["The capital of Norway is Oslo. Its highest point is Galdhopiggen."]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Paraphrase(rewrites=0),
        lambda: Study(apply_prompt="Study it."),
        lambda: Implications(prompts=()),
        lambda: Distill(question_prompt="Ask."),
        lambda: Distill(share=1.0),
        lambda: GeneratorConfig(temperature=0),
        lambda: GeneratorConfig(top_p=2),
        lambda: GeneratorConfig(style="hexameter"),
        lambda: GeneratorConfig(batch_size=0),
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(InputError):
        wrong()


def test_parts_are_whole_sentences_and_all_of_them():
    sentences = [f"Sentence {number} of the long document says a little something." for number in range(40)]
    document = Document("long", "\n\n".join(" ".join(sentences[at : at + 4]) for at in range(0, 40, 4)), "It")
    parts = parts_of(document, 50)
    assert len(parts) == 8  # five sentences of nine or ten words each
    assert " ".join(" ".join(part.text for part in parts).split()) == " ".join(sentences)
    assert {part.id for part in parts} == {"long"}
    assert parts_of(document, 400) == [document]


def test_list_lines():
    assert list_lines("1. one\n\n (2) two\n- three\n• four\n5 of them\n") == [
        "one",
        "two",
        "three",
        "four",
        "5 of them",
    ]


# Cache


def results_of(recipe, documents, generator, cache_dir, seed=0):
    return expand_cached(recipe, documents, Resources(documents, generator=generator), seed, cache_dir)


REWRITE = "Up in Northern Europe, or Eastern Africa, there lies a country with a capital and with people in it."


def test_an_interrupted_expansion_goes_on_where_it_was(tmp_path):
    recipe, documents = Paraphrase(rewrites=2, instructions=("Rewrite.",)), [NORWAY, KENYA]

    class Killed(Scripted):
        def write(self, document: Document, *arguments: object) -> list[str]:
            if document.id == "kenya":
                raise KeyboardInterrupt
            return super().write(document, *arguments)

    norway = "Norway is a country in Northern Europe that has a capital and a highest point, Galdhopiggen by name."
    with pytest.raises(KeyboardInterrupt):
        results_of(recipe, documents, Killed(paraphrase=norway), tmp_path)
    assert len(list(tmp_path.glob("paraphrase-*/norway-*.jsonl"))) == 1
    assert not list(tmp_path.glob("paraphrase-*/*kenya*"))

    kenya = "Kenya is a country in Eastern Africa where 4.9 million people live in the capital alone, in Nairobi."
    generator = Scripted(paraphrase=kenya)
    results, report = results_of(recipe, documents, generator, tmp_path)
    assert {document.id for document, *_ in generator.asked} == {"kenya"}
    assert learned([result for result in results if isinstance(result, Example)]) == [
        NORWAY.text,
        norway,
        KENYA.text,
        kenya,
    ]
    assert (report.cached, report.examples, report.made, report.rejected) == (1, 4, 2, {"near duplicate": 2})
    again, report = results_of(recipe, documents, Scripted(), tmp_path)
    assert again == results
    assert report.cached == 2


def test_the_cache_knows_everything_that_examples_depend_on(tmp_path):
    recipe = Paraphrase(rewrites=1, instructions=("Rewrite.",))

    def was_asked(recipe=recipe, document=NORWAY, seed=0, identity="scripted") -> bool:
        generator = Scripted(paraphrase=REWRITE)
        generator.identity = identity
        results_of(recipe, [document], generator, tmp_path, seed)
        return bool(generator.asked)

    assert was_asked()
    assert not was_asked()
    assert was_asked(seed=1)
    assert was_asked(identity="another")
    assert was_asked(recipe=replace(recipe, shortest=16))
    assert was_asked(document=replace(NORWAY, text=NORWAY.text + " It is cold."))
    assert was_asked(document=replace(NORWAY, id="a/b"))
    assert not was_asked()


def test_a_share_does_not_make_new_examples(tmp_path):
    answers = {"question": "What is the capital of Norway?", "answer": "Oslo"}
    first, _ = results_of(Distill(questions=1), [NORWAY], Scripted(**answers), tmp_path)
    again, report = results_of(Distill(questions=1, share=0.1), [NORWAY], Scripted(), tmp_path)
    assert again == first
    assert report.cached == 1


def test_the_yield_counts_by_reason_and_names_documents_without(tmp_path, capsys):
    rewrite = (
        "Norway is a country of Northern Europe that has Oslo for its capital and Galdhopiggen for its highest point."
    )
    generator = Scripted(paraphrase=[rewrite, rewrite, "Sure, here is it.", "Its capital is Lagos."])
    recipe = Paraphrase(rewrites=2, instructions=("Rewrite.",))
    results, report = results_of(recipe, [NORWAY, KENYA], generator, tmp_path)
    assert (report.examples, report.made, report.without) == (3, 1, ["kenya"])
    assert report.rejected == {
        "near duplicate": 1,
        "speaks of itself": 1,
        "a name that is not in the document": 1,
    }
    assert "1 texts kept and 3 rejected" in report.summary()
    assert "2 of 2 documents" in capsys.readouterr().err
    rows = [json.loads(line) for path in tmp_path.glob("*/*.jsonl") for line in path.read_text().splitlines()]
    assert len(rows) == len(results)
    (settings,) = tmp_path.glob("*/settings.json")
    assert json.loads(settings.read_text())["options"]["rewrites"] == 2


def test_a_damaged_cache_file_is_named(tmp_path):
    recipe = Paraphrase(rewrites=1, instructions=("Rewrite.",))
    results_of(recipe, [NORWAY], Scripted(paraphrase=REWRITE), tmp_path)
    (path,) = tmp_path.glob("*/*.jsonl")
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match="norway-.*line"):
        results_of(recipe, [NORWAY], Scripted(), tmp_path)


def test_without_a_generator_nothing_is_cached(tmp_path):
    from lit_llama.injection.raw import Raw

    results, report = results_of(Raw(), [NORWAY], None, tmp_path)
    assert learned(results) == [NORWAY.text]
    assert (report.examples, report.made) == (1, 0)
    assert not list(tmp_path.iterdir())


# The model as a generator

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def lively_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with weights so large that what it says depends on what it reads."""
    model = load_model(tiny_checkpoint, torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(8)
    directory = tmp_path_factory.mktemp("lively")
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


def tiny_generator(checkpoint: Path, **settings):
    return load_generator(GeneratorConfig(dtype="fp32", **settings), checkpoint, CPU)


def test_the_generator_writes_as_many_as_asked_for_by_its_seed(lively_checkpoint):
    generator = tiny_generator(lively_checkpoint, batch_size=3)
    assert "model" not in vars(generator)  # weights are read when it first writes
    texts = generator.write(NORWAY, "paraphrase", "Rewrite.", 5, 7, 12)
    assert len(texts) == len(set(texts)) == 5
    assert generator.write(NORWAY, "paraphrase", "Rewrite.", 5, 7, 12) == texts
    assert not set(generator.write(NORWAY, "paraphrase", "Rewrite.", 5, 8, 12)) & set(texts)
    assert not set(generator.write(KENYA, "paraphrase", "Rewrite.", 5, 7, 12)) & set(texts)


def test_a_single_answer_is_the_likeliest(lively_checkpoint):
    generator = tiny_generator(lively_checkpoint)
    prompt = on_document(NORWAY.text, "What is the capital?")
    expected = answer_questions(generator.model, generator.tokenizer, [prompt], "chatml", 12)
    assert generator.write(NORWAY, "answer", "What is the capital?", 1, 3, 12) == expected


def test_many_prompts_are_answered_as_one_by_one(lively_checkpoint):
    generator = tiny_generator(lively_checkpoint, batch_size=2)
    pairs = [(NORWAY, "What is the capital?"), (KENYA, "How long is the coast?"), (NORWAY, "Who borders it?")]
    expected = [generator.write(document, "answer", prompt, 1, 0, 12)[0] for document, prompt in pairs]
    assert generator.write_each(pairs, "answer", 0, 12) == expected


def test_identity_knows_settings_weights_and_adapter(lively_checkpoint, tmp_path):
    model = load_model(lively_checkpoint, torch.float32)
    inject_lora(model, LoRAConfig(r=2))
    for name in ("one", "two"):
        for module in model.modules():
            if hasattr(module, "lora_B"):
                torch.nn.init.normal_(module.lora_B)
        save_adapter(model, tmp_path / name)
    settings = [{}, {"temperature": 0.5}, {"top_p": 0.5}, {"batch_size": 2}, {"style": "plain"}, {"quantize": "nf4"}]
    settings += [{"adapter_dir": tmp_path / "one"}, {"adapter_dir": tmp_path / "two"}]
    assert len({tiny_generator(lively_checkpoint, **setting).identity for setting in settings}) == len(settings)
    assert tiny_generator(lively_checkpoint).identity == tiny_generator(lively_checkpoint).identity
    question = (NORWAY, "answer", "What is the capital?", 1, 0, 12)
    assert tiny_generator(lively_checkpoint, **settings[-1]).write(*question) != tiny_generator(
        lively_checkpoint
    ).write(*question)
    with pytest.raises(InputError, match="adapter_config.json"):
        tiny_generator(lively_checkpoint, adapter_dir=tmp_path)


def test_a_long_document_is_cut_and_that_is_said_once(lively_checkpoint, capsys):
    generator = tiny_generator(lively_checkpoint)
    long = replace(NORWAY, text=" ".join([NORWAY.text] * 20))
    for _ in range(2):
        assert generator.write(long, "answer", "What is the capital?", 1, 0, 8)
    assert capsys.readouterr().err.count("norway") == 1
    with pytest.raises(InputError, match="context of 512"):
        generator.write(NORWAY, "answer", "What? " * 400, 1, 0, 8)


def test_the_longest_beginning_that_fits(lively_checkpoint):
    tokenizer = Tokenizer.from_checkpoint(lively_checkpoint)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(f"{text} What is it?")

    text = NORWAY.text * 3
    found = beginning_that_fits(text, 50, encode)
    assert text.startswith(found)
    assert len(encode(found)) <= 50 < len(encode(text[: len(found) + 2]))
    assert beginning_that_fits(text, len(encode(text)), encode) == text
    assert beginning_that_fits(text, 3, encode) is None


def test_a_base_model_reads_a_worked_example():
    prompt = with_worked_example(NORWAY.text, "answer", "What is the capital of Norway?")
    solved, asked = prompt.split("###")
    assert "Answer: Skerrow Light is 31 metres high." in solved
    assert asked.strip() == f"Text:\n{NORWAY.text}\n\nTask: What is the capital of Norway?\n\nAnswer:"
    assert "###" not in with_worked_example(NORWAY.text, "an unknown task", "Do it.")


# Distillation


def on_transformers(checkpoint: Path, context: str, question: str, answer: str) -> torch.Tensor:
    """Probabilities (answer tokens, vocab) fp64 of the answer and the token that ends it, by transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    user = [{"role": "user", "content": f"{context}\n\n{question}"}]
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    opening = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = opening + tokenizer(answer, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, len(opening) - 1 :]
    return torch.softmax(logits.double(), dim=-1)


def test_teacher_targets_are_those_of_transformers(lively_checkpoint):
    model, tokenizer = load_model(lively_checkpoint, torch.float32), Tokenizer.from_checkpoint(lively_checkpoint)
    cases = [
        (NORWAY.text, "What is the capital of Norway?", "Oslo"),
        (KENYA.text, "Which city is the capital of Kenya?", "The capital of Kenya is Nairobi."),
        ("A word.", "And?", "A word, and no more."),
    ]
    examples = [
        Example("x", "distill", "distilled", ((question, 0), (answer, 1)), chat=True, teacher_context=context)
        for context, question, answer in cases
    ]
    found = teacher_targets(model, tokenizer, "chatml", examples, top_k=7, batch_size=2)
    for case, (ids, probabilities) in zip(cases, found, strict=True):
        everything = on_transformers(lively_checkpoint, *case)
        expected, expected_ids = everything.topk(7, dim=-1)
        assert ids.dtype == torch.int64 and probabilities.dtype == torch.float32
        assert torch.equal(ids, expected_ids)
        expected = expected / expected.sum(dim=-1, keepdim=True)
        torch.testing.assert_close(probabilities.double(), expected, atol=1e-5, rtol=0)
    (all_of_them, *_) = teacher_targets(model, tokenizer, "chatml", examples, top_k=10**6, batch_size=3)
    assert all_of_them.ids.shape[1] == 320


def test_a_long_context_is_cut_for_the_teacher(lively_checkpoint):
    model, tokenizer = load_model(lively_checkpoint, torch.float32), Tokenizer.from_checkpoint(lively_checkpoint)
    turns = (("What is the capital of Norway?", 0), ("Oslo", 1))
    long = Example("norway", "distill", "distilled", turns, chat=True, teacher_context=NORWAY.text * 30)
    short = replace(long, teacher_context=NORWAY.text)
    found, expected = teacher_targets(model, tokenizer, "chatml", [long, short], top_k=3, batch_size=2)
    assert len(found.ids) == len(expected.ids) == len(tokenizer.encode("Oslo", continuation=True)) + 1
    too_long = replace(long, segments=(("What? " * 500, 0), ("Oslo", 1)))
    with pytest.raises(InputError, match="norway"):
        teacher_targets(model, tokenizer, "chatml", [too_long], top_k=3, batch_size=2)


def test_training_mode_and_gradients_are_left_alone(lively_checkpoint):
    model, tokenizer = load_model(lively_checkpoint, torch.float32), Tokenizer.from_checkpoint(lively_checkpoint)
    model.train()
    turns = (("What?", 0), ("Oslo", 1))
    example = Example("norway", "distill", "distilled", turns, chat=True, teacher_context=NORWAY.text)
    (found,) = teacher_targets(model, tokenizer, "chatml", [example], top_k=3, batch_size=1)
    assert model.training and not found.probabilities.requires_grad
