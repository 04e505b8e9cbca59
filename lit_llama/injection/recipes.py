"""The table of recipes, and recipes put together: `permute+qa+replay`."""

from dataclasses import dataclass, field
from functools import reduce

from lit_llama.errors import InputError
from lit_llama.injection.distill import Distill
from lit_llama.injection.implications import Implications
from lit_llama.injection.interface import Recipe, Resources, Stage
from lit_llama.injection.paraphrase import Paraphrase
from lit_llama.injection.permute import Permute
from lit_llama.injection.qa import PreInstruction, Qa, QuestionsOnly
from lit_llama.injection.raft import Raft
from lit_llama.injection.raw import Raw
from lit_llama.injection.readcomp import ReadingComprehension
from lit_llama.injection.rehearse import Rehearse
from lit_llama.injection.replay import Replay
from lit_llama.injection.reverse import Reverse
from lit_llama.injection.structure import Structure
from lit_llama.injection.study import Study
from lit_llama.injection.views import Views


@dataclass
class RecipeOptions:
    """The recipes that have options, under their names; only those that `--recipe` names are used."""

    views: Views = field(default_factory=Views)
    permute: Permute = field(default_factory=Permute)
    paraphrase: Paraphrase = field(default_factory=Paraphrase)
    study: Study = field(default_factory=Study)
    readcomp: ReadingComprehension = field(default_factory=ReadingComprehension)
    implications: Implications = field(default_factory=Implications)
    reverse: Reverse = field(default_factory=Reverse)
    qa: Qa = field(default_factory=Qa)
    pit: PreInstruction = field(default_factory=PreInstruction)
    distill: Distill = field(default_factory=Distill)
    raft: Raft = field(default_factory=Raft)
    rehearse: Rehearse = field(default_factory=Rehearse)
    replay: Replay = field(default_factory=Replay)


def chosen_recipes(names: str, options: RecipeOptions) -> list[Recipe]:
    """The recipes of `names`, joined by "+", in that order.

    Raises:
        InputError: an unknown name, or one twice.
    """
    known = {recipe.name: recipe for recipe in (Raw(), Structure(), QuestionsOnly(), *vars(options).values())}
    chosen = []
    for name in names.split("+"):
        recipe = known.get(name.strip())
        if recipe is None:
            raise InputError(f"--recipe {names}: {name.strip()!r} is not one of {', '.join(known)}")
        if recipe in chosen:
            raise InputError(f"--recipe {names}: {recipe.name} is named twice")
        chosen.append(recipe)
    return chosen


MISSING = {
    "facts": "facts (--facts_file and --templates_file)",
    "questions": "training questions on the documents (--question_file)",
    "headings": "documents in folders or under Markdown headings",
    "generator": "a model that writes (--generator.checkpoint_dir)",
    "replay": "text of other subjects (--replay.data_dir)",
}


def check_needs(recipes: list[Recipe], resources: Resources) -> None:
    """Raise InputError where a recipe lacks what it cannot do without; names both."""
    there = {
        "facts": resources.templates is not None and any(document.facts for document in resources.documents),
        "questions": any(document.id in resources.questions_of for document in resources.documents),
        "headings": any(document.headings for document in resources.documents),
        "generator": resources.generator is not None,
        "replay": bool(resources.replay_texts),
    }
    for recipe in recipes:
        for need in sorted(recipe.needs):
            if not there[need]:
                raise InputError(f"the recipe {recipe.name} needs {MISSING[need]}")


def plan_of(recipes: list[Recipe]) -> list[Stage]:
    """The stages of training that the recipes make together."""
    return reduce(lambda plan, recipe: recipe.stages(plan), recipes, [])
