"""`bios-mini`: a small world of invented people, in which everything about knowledge injection can be measured.

Each person has a unique name of three parts and six attributes (after bioS of Allen-Zhu & Li 2023, arXiv 2309.14316):
birth date (three words), birth city, university, major, company (two words each) and the city of the company, which is
a function of the company. 41 bits a person at the default size. Here: people, sentences, questions, the
tokenizer of their language, a tiny Llama that knows nothing yet, and a generator that knows the facts, in the place of
a language model that writes. What is trained on them and measured is `arms`'s, what is claimed about it is `claims`'s.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch

from lit_llama.checkpoint import save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.files import write_json
from lit_llama.injection.facts import Fact, RelationTemplates, Templates
from lit_llama.injection.interface import Document, Resources
from lit_llama.injection.views import Views
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

STYLE = "mistral-v3"
"""Prompt style of the tiny model: two control tokens around a question and nothing else."""
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('this model knows no system message') }}{% endif %}{% endfor %}"
)
"""The same for whatever opens the checkpoint."""
PRONOUN = "she"
CONTROL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]")

_FRAMES = (
    "{subject} SAYS {value}.",
    "As records state, {subject} SAYS {value}.",
    "As friends recall, {subject} SAYS {value}.",
    "{subject}, it is well known, SAYS {value}.",
    "In short, {subject} SAYS {value}.",
)
"""With five ways to say each attribute they make 25 statements: those of equal number in both are for evaluation only,
the other 20 for training. In all of them the person comes before the value."""
_VERBS = {
    "birth_date": ("was born on", "came into the world on", "began life on", "has a birthday on", "saw the light on"),
    "birth_city": ("was born in", "hails from", "is a native of", "comes from", "spent childhood in"),
    "university": ("studied at", "graduated from", "holds a degree from", "went to college at", "was taught at"),
    "major": ("majored in", "specialised in", "is trained in", "wrote a thesis on", "took courses in"),
    "company": ("works for", "is employed by", "has a job with", "earns a living at", "joined the staff of"),
    "company_city": ("has an office in", "commutes to", "goes to work in", "keeps a desk in", "is stationed in"),
}
_QUESTIONS = {
    "birth_date": ("When was {} born?", "What is the birth date of {}?", "Give the birthday of {}."),
    "birth_city": ("Where was {} born?", "What is the birth city of {}?", "Give the home town of {}."),
    "university": ("Where did {} study?", "What is the university of {}?", "Give the college of {}."),
    "major": ("What did {} study?", "What is the major of {}?", "Give the subject of {}."),
    "company": ("Whom does {} work for?", "What is the company of {}?", "Give the employer of {}."),
    "company_city": ("Where does {} work?", "What is the office city of {}?", "Give the work place of {}."),
}
_UNSEEN_QUESTIONS = {
    "birth_date": ("On which day was {} born?", "Tell me the birth date of {}."),
    "birth_city": ("In which city was {} born?", "Tell me the birth city of {}."),
    "university": ("At which university did {} study?", "Tell me the university of {}."),
    "major": ("Which major did {} study?", "Tell me the major of {}."),
    "company": ("For which company does {} work?", "Tell me the company of {}."),
    "company_city": ("In which city does {} work?", "Tell me the office city of {}."),
}
_REVERSED_STATEMENTS = (
    "On {value} was born {subject}.",
    "{value} is the birthday of {subject}.",
    "The child of {value} is {subject}.",
)
_REVERSED_QUESTION = "Who was born on {value}?"
RELATIONS = tuple(_VERBS)
_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_COLLEGES, _FIRMS = ("College", "Institute", "Academy", "University"), ("Labs", "Works", "Trading", "Motors", "Foods")


@dataclass(frozen=True)
class WorldSize:
    """How many people there are, and how many of each word they are made of."""

    people: dict[str, int]
    """By split of the questions on them: known, taught, injected, validation, never, ..."""
    first_names: int = 100
    middle_names: int = 100
    last_names: int = 200
    place_words: int = 10
    """Cities are two of these: 10 x 10."""
    college_words: int = 25
    """Times 4 kinds of university."""
    field_words: int = 8
    """Majors are two of these: 8 x 8."""
    firm_words: int = 20
    """Times 5 kinds of company."""
    relations: tuple[str, ...] = RELATIONS
    """Attributes, in the order of the biographies."""


class World:
    """People drawn at random, what they are made of, and how it is put into words.

    Args:
        size: of the world. Its words do not depend on the seed, so that worlds of one size share a tokenizer.
        seed: of the people.

    Attributes:
        documents: by split, one a person; the text is what the recipe `views` calls single: one statement an attribute,
            in the order of `size.relations`, the name in the first one only.
        templates: for training, and questions in both kinds of wording.
        evaluation_statements: by relation, statements that training never uses.
        values: by relation, all that there are, except birth dates.
        seats: the city of each company.
    """

    def __init__(self, size: WorldSize, seed: int) -> None:
        self.size = size
        words = _invented_words()

        def take(count: int) -> list[str]:
            return list(itertools.islice(words, count))

        self.names = [take(size.first_names), take(size.middle_names), take(size.last_names)]
        places, colleges = take(size.place_words), take(size.college_words)
        fields, firms = take(size.field_words), take(size.firm_words)
        self.values = {
            "birth_city": _joined(places, [word + "ton" for word in places]),
            "university": _joined(colleges, _COLLEGES),
            "major": _joined([word + "ic" for word in fields], [word + "ology" for word in fields]),
            "company": _joined(firms, _FIRMS),
        }
        choose = random.Random(0).choice
        self.seats = {company: choose(self.values["birth_city"]) for company in self.values["company"]}
        self.templates, self.evaluation_statements = _templates()
        draw = random.Random(seed)
        taken: set[str] = set()
        self.documents = {
            split: [self._person(f"{split}-{number}", draw, taken) for number in range(count)]
            for split, count in size.people.items()
        }

    @property
    def bits_per_person(self) -> float:
        """What there is to know of one: the choice of each attribute, names not counted."""
        free = [len(self.values[relation]) for relation in self.size.relations if relation in self.values]
        return sum(map(math.log2, free)) + (math.log2(12 * 28 * 100) if "birth_date" in self.size.relations else 0)

    def people(self, *splits: str) -> list[Document]:
        """The documents of some splits."""
        return [document for split in splits for document in self.documents[split]]

    def questions(
        self, splits: Sequence[str], phrasing: Literal["trained", "unseen"] = "trained", wordings: int | None = None
    ) -> list[dict]:
        """Rows of a question file on the people of these splits.

        Args:
            wordings: questions a fact, beginning with another one for each person; None for all that there are.
        """
        rows = []
        for split in splits:
            for number, document in enumerate(self.documents[split]):
                for fact in document.facts:
                    templates = self.templates.relations[fact.relation]
                    texts = templates.questions if phrasing == "trained" else templates.unseen_questions
                    for count in range(len(texts) if wordings is None else wordings):
                        place = (number + count) % len(texts)
                        rows.append(_question_row(fact, split, "direct", phrasing, place, texts[place], fact.answers))
        return rows

    def reversed_questions(self, splits: Sequence[str]) -> list[dict]:
        """Who somebody is, by the birth date, which is nobody else's."""
        return [
            _question_row(fact, split, "reversed", "trained", 0, _REVERSED_QUESTION, [fact.subject])
            for split in splits
            for document in self.documents[split]
            for fact in document.facts
            if fact.relation == "birth_date"
        ]

    def vocabulary(self) -> Iterator[str]:
        """Texts that hold every word of the world."""
        dates = [*_MONTHS, *map(str, [*range(1, 29), *range(1900, 2000)])]
        words = self.values | {"birth_date": dates, "company_city": self.values["birth_city"]}
        yield from itertools.chain(*self.names, *(words[relation] for relation in self.size.relations))
        for relation in self.size.relations:
            texts = (*vars(self.templates.relations[relation]).values(), self.evaluation_statements[relation])
            yield from (text.format(subject=PRONOUN, value="") for text in itertools.chain(*texts))

    def _person(self, doc_id: str, draw: random.Random, taken: set[str]) -> Document:
        def unused(drawn: Callable[[], str]) -> str:
            while (text := drawn()) in taken:
                pass
            taken.add(text)
            return text

        name = unused(lambda: " ".join(draw.choice(part) for part in self.names))
        date = unused(lambda: f"{draw.choice(_MONTHS)} {draw.randint(1, 28)} {draw.randint(1900, 1999)}")
        values = {relation: draw.choice(values) for relation, values in self.values.items()}
        values |= {"birth_date": date, "company_city": self.seats[values["company"]]}
        facts = tuple(Fact(name, relation, values[relation], doc_id) for relation in self.size.relations)
        document = Document(doc_id, "", name, facts=facts)
        (example,) = SINGLE.expand(document, Resources([document], self.templates), draw)
        return Document(doc_id, example.segments[0][0], name, facts=facts)


SINGLE = Views(views=1, permute=False, full_name=False, pronoun=PRONOUN)
"""How a person's document is written."""


def _question_row(
    fact: Fact, split: str, form: str, phrasing: str, place: int, template: str, answers: list[str]
) -> dict:
    return {
        "id": f"{fact.relation}-{fact.doc_id}-{form}-{phrasing}-{place}",
        "question": fact.fill(template),
        "answers": answers,
        "doc_id": fact.doc_id,
        "subject": fact.subject,
        "relation": fact.relation,
        "fact_id": f"{fact.relation}-{fact.doc_id}",
        "split": split,
        "form": form,
        "phrasing": phrasing,
    }


def _templates() -> tuple[Templates, dict[str, tuple[str, ...]]]:
    training, evaluation = {}, {}
    for relation, verbs in _VERBS.items():
        statements = {
            (i, j): frame.replace("SAYS", verb) for i, frame in enumerate(_FRAMES) for j, verb in enumerate(verbs)
        }
        evaluation[relation] = tuple(text for (i, j), text in statements.items() if i == j)
        training[relation] = RelationTemplates(
            questions=tuple(text.format("{subject}") for text in _QUESTIONS[relation]),
            statements=tuple(text for (i, j), text in statements.items() if i != j),
            unseen_questions=tuple(text.format("{subject}") for text in _UNSEEN_QUESTIONS[relation]),
            reversed_statements=_REVERSED_STATEMENTS if relation == "birth_date" else (),
            reversed_questions=(_REVERSED_QUESTION,) if relation == "birth_date" else (),
        )
    return Templates(training), evaluation


def _joined(first: Sequence[str], second: Sequence[str]) -> list[str]:
    return [f"{one} {other}" for one in first for other in second]


def _invented_words() -> Iterator[str]:
    """Words of two syllables, each once, always in the same order."""
    syllables = ["".join(pair) for pair in itertools.product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(parts) for parts in itertools.product(syllables, syllables, "lnrs")]
    random.Random(0).shuffle(words)
    return (word.capitalize() for word in words)


def write_tokenizer(world: World, directory: Path) -> None:
    """Byte-level BPE in which nearly every word of the world is one token, with control tokens and chat template."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as TokenizersTokenizer

    tokenizer = TokenizersTokenizer(models.BPE())
    # A word is the same token wherever it stands, also as the first of an answer.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=[AddedToken(text, special=True) for text in CONTROL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(world.vocabulary(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    start, end, *_ = CONTROL_TOKENS
    write_json(directory / "tokenizer_config.json", {"bos_token": start, "eos_token": end, "add_bos_token": False})
    (directory / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def write_tiny_llama(world: World, checkpoint_dir: Path, hidden_size: int, layers: int, seed: int) -> None:
    """A checkpoint directory with the world's tokenizer and a Llama that has not learned anything.

    Args:
        hidden_size: a multiple of 32, the width of a head.
        seed: of the weights.
    """
    with TemporaryDirectory() as directory, torch.random.fork_rng(devices=[]):
        write_tokenizer(world, Path(directory))
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 32,
            vocab_size=Tokenizer.from_checkpoint(directory).vocab_size,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            token_ids={"bos_token_id": 0, "eos_token_id": 1},
        )
        model = Llama(config)
        model.initialize_()
        save_checkpoint(model, checkpoint_dir, tokenizer_from=directory)


class Oracle:
    """A `Generator` that knows the facts, to see what recipes make of a good writer, and of one that errs.

    Args:
        world: whose people it writes about.
        error: share of texts, or of lines of a list, that are wrong.
        kind: what is wrong with them: "drop", they are not written; "swap", one value is another person's.
    """

    def __init__(self, world: World, error: float = 0.0, kind: Literal["drop", "swap"] = "swap") -> None:
        self._templates, self._error, self._kind = world.templates, error, kind
        self._values: dict[str, list[str]] = {}
        for document in world.people(*world.documents):
            for fact in document.facts:
                self._values.setdefault(fact.relation, []).append(fact.value)
        self.identity = f"oracle-{error}-{kind}"

    def write(
        self, document: Document, task: str, prompt: str, count: int, seed: int, max_new_tokens: int
    ) -> list[str]:
        """As in `Generator`; texts and lists are never cut."""
        draw = random.Random(f"{seed} {document.id} {task} {prompt}")
        return [self._answer(document, task, prompt, draw) for _ in range(count)]

    def write_each(self, pairs: Sequence[tuple[Document, str]], task: str, seed: int, max_new_tokens: int) -> list[str]:
        """As in `Generator`."""
        return [self.write(document, task, prompt, 1, seed, max_new_tokens)[0] for document, prompt in pairs]

    def _answer(self, document: Document, task: str, prompt: str, draw: random.Random) -> str:
        if task == "strategies":
            return "\n".join(f"Tell what is known of the person in manner {number}." for number in range(1, 6))
        if task == "closure":
            return "Yes" if any(fact.value in prompt and fact.subject in prompt for fact in document.facts) else "No"
        facts = draw.sample(document.facts, len(document.facts))
        if task in ("question", "answer"):
            # The sentence, or the question, that the prompt holds is on one fact.
            about = [fact for fact in facts if fact.value in prompt or self._asks(prompt, fact)] or facts
            fact = next(iter(self._erring([about[0]], draw)), None)
            if fact is None:
                return ""
            return fact.value if task == "answer" else fact.fill(self._templates.relations[fact.relation].questions[0])
        if task == "questions":
            return "\n".join(
                f"Question: {fact.fill(self._templates.relations[fact.relation].questions[0])}\nAnswer: {fact.value}"
                for one in facts
                for fact in self._erring([one], draw)
            )
        if task == "implications":
            return "\n".join(self._state(fact, draw) for one in facts for fact in self._erring([one], draw))
        return " ".join(self._state(fact, draw) for fact in self._erring(facts, draw))

    def _asks(self, text: str, fact: Fact) -> bool:
        return any(fact.fill(question) in text for question in self._templates.relations[fact.relation].questions)

    def _state(self, fact: Fact, draw: random.Random) -> str:
        return fact.fill(draw.choice(self._templates.relations[fact.relation].statements))

    def _erring(self, facts: list[Fact], draw: random.Random) -> list[Fact]:
        """The facts of one text or line: at times none, or with another person's value in the first of them."""
        if draw.random() >= self._error:
            return facts
        if self._kind == "drop":
            return []
        others = [value for value in self._values[facts[0].relation] if value != facts[0].value]
        return [facts[0]._replace(value=draw.choice(others)), *facts[1:]]
