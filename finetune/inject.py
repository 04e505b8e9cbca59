"""Inject the knowledge of documents into a model, by a recipe: documents in, an adapter (or a model) out.

python finetune/inject.py --checkpoint_dir checkpoints/smollm2-135m-instruct --documents my_documents --recipe
permute+replay --replay.data_dir data/general/tokens --out_dir out/my_expert
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_llama.command_line import progress, run
from lit_llama.data.packing import TrainingWindows
from lit_llama.data.token_store import TokenStore
from lit_llama.errors import InputError
from lit_llama.evaluation.perplexity import store_of_texts
from lit_llama.evaluation.questions import read_questions
from lit_llama.files import refuse_overwrite
from lit_llama.injection.generator import GeneratorConfig, load_generator
from lit_llama.injection.preparation import open_course, prepare_examples, read_documents, read_resources, texts_of
from lit_llama.injection.recipes import RecipeOptions, chosen_recipes, plan_of
from lit_llama.learners import LoRARunArguments, full_learner, lora_learner, lora_tree_learner
from lit_llama.lora_tree import LoRATreeConfig
from lit_llama.prompts import detect_style
from lit_llama.tokenizer import Tokenizer
from lit_llama.training import Corpus, TrainConfig, start_fabric, train


@dataclass
class ReplayText:
    """Text of other subjects, for the recipe replay."""

    data_dir: Path | None = None
    """A token store; its held-out part is scored at every evaluation as general_loss."""


@dataclass(kw_only=True)
class Arguments(LoRARunArguments):
    """Inject the knowledge of documents; out_dir becomes a PEFT adapter directory, or holds checkpoint/.

    Recipes are joined by "+", and each has options: --recipe permute+qa+replay --recipes.permute.views 10.
    """

    documents: Path | list[Path]
    """Documents, or folders of them: txt, md, html, pdf, jsonl, parquet."""
    recipe: str = "permute"
    """raw, views, permute, paraphrase, study, readcomp, implications, reverse, structure, qa, qa-only, pit, distill,
    raft, rehearse, replay, or some of them joined by "+"."""
    recipes: RecipeOptions = field(default_factory=RecipeOptions)
    learner: Literal["lora", "lora_tree", "full"] = "lora"
    """What is trained: a LoRA adapter (QLoRA with --quantize), a tree of them, or all weights."""
    lora_tree: LoRATreeConfig = field(default_factory=LoRATreeConfig)
    """For learner lora_tree."""
    facts_file: Path | None = None
    """What the documents say, as data: JSONL or CSV of subject, relation, value, doc_id."""
    templates_file: Path | None = None
    """Sentences and questions for the facts' relations (YAML)."""
    question_file: Path | None = None
    """Training questions (JSONL), each with the doc_id of its document; scripts/prepare_questions.py makes them."""
    replay: ReplayText = field(default_factory=ReplayText)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """The model that writes for recipes such as paraphrase; by default the base itself."""
    tokens: int | None = None
    """Tokens to train on in all; by default enough for `passes`."""
    passes: float = 5.0
    """How often examples are trained on, on average."""
    seed: int = 0
    """Of what recipes draw; train.seed is that of the order and of the adapter's first values."""
    data_dir: Path | None = None
    """Where the examples are kept, as text and as tokens; by default beside out_dir, under its name with -examples."""
    cache_dir: Path = Path("data/generated")
    """Where generated texts are kept for the next time."""
    val_source: Path | list[Path] | None = None
    """Documents of the domain that are not injected, for the held-out loss; by default it is that of the documents."""
    probe_file: Path | None = None
    """Questions (JSONL) to ask before, during and after training."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-4, sequence_length=256))


def main(arguments: Arguments) -> None:
    train_config, replay_dir = arguments.train, arguments.replay.data_dir
    if not arguments.resume:
        refuse_overwrite(arguments.out_dir, arguments.overwrite)
    if arguments.tokens is not None and arguments.tokens < 1 or arguments.passes <= 0:
        raise InputError(f"--tokens {arguments.tokens} and --passes {arguments.passes} must be above 0")
    recipes = chosen_recipes(arguments.recipe, arguments.recipes)
    fabric = start_fabric(arguments)
    tokenizer = Tokenizer.from_checkpoint(arguments.checkpoint_dir)
    arguments.eval.probe_style = arguments.eval.probe_style or detect_style(arguments.checkpoint_dir)
    data_dir = arguments.data_dir or arguments.out_dir.with_name(f"{arguments.out_dir.name}-examples")
    documents = read_documents(as_list(arguments.documents))
    replay = None if replay_dir is None else TokenStore.open(replay_dir, "train", tokenizer.sha256)
    if fabric.is_global_zero:
        generator = None
        if any("generator" in recipe.needs for recipe in recipes):
            generator = load_generator(arguments.generator, arguments.checkpoint_dir, fabric.device)
        resources = read_resources(
            documents,
            arguments.facts_file,
            arguments.templates_file,
            arguments.question_file,
            generator,
            [] if replay is None else texts_of(replay, tokenizer),
        )
        prepare_examples(
            recipes,
            resources,
            data_dir,
            arguments.checkpoint_dir,
            style=arguments.eval.probe_style,
            system=arguments.eval.probe_system,
            length=train_config.sequence_length,
            seed=arguments.seed,
            cache_dir=arguments.cache_dir,
            device=fabric.device,
            overwrite=arguments.overwrite,
        )
        del generator, resources
    fabric.barrier()

    def held_out(store: TokenStore) -> TrainingWindows:
        return TrainingWindows(store, train_config.sequence_length, seed=0, shuffle=False)

    plan = plan_of(recipes)
    windows = open_course(
        data_dir,
        plan,
        replay,
        train_config.sequence_length,
        train_config.seed,
        arguments.tokens,
        arguments.passes,
    )
    val_documents = documents if arguments.val_source is None else read_documents(as_list(arguments.val_source))
    val_store = store_of_texts([document.text for document in val_documents], tokenizer, "held-out documents")
    general = None if replay_dir is None else held_out(TokenStore.open(replay_dir, "val", tokenizer.sha256))
    probes = read_questions(arguments.probe_file, need_answers=False) if arguments.probe_file else []
    if fabric.is_global_zero:
        parts = ", ".join(f"{count} of {name}" for name, count in windows.windows_by_source.items())
        progress(f"{len(documents)} documents by {arguments.recipe}: {windows.windows_per_epoch} windows, {parts}")
    learner = {"lora": lora_learner, "lora_tree": lora_tree_learner, "full": full_learner}[arguments.learner]
    model, save = learner(fabric, arguments)
    train(fabric, model, tokenizer, Corpus(windows, held_out(val_store), general, probes), arguments, save)


def as_list(paths: Path | list[Path]) -> list[Path]:
    return paths if isinstance(paths, list) else [paths]


if __name__ == "__main__":
    run(main)
