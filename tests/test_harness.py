"""lm_eval's tasks over our model against lm_eval's own Hugging Face backend, on local tasks and the same weights."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import TEXT, run_script
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import load_model
from lit_llama.errors import InputError
from lit_llama.evaluation.harness import HarnessModel, Tasks, find_tasks
from lit_llama.generation import generate
from lit_llama.lora import load_adapter
from lit_llama.model import Llama
from lit_llama.tokenizer import Tokenizer

CAPITALS = [
    ("Norway", ["Oslo", "Bergen", "the city of Tromsø"]),
    ("Brazil", ["Rio de Janeiro", "Brasilia", "O"]),
    ("Nepal", ["Pokhara ", "Lalitpur, of course", "Kathmandu"]),
    ("the longest of them, " * 60 + "Chile", ["Santiago", "a town so remote that " * 15 + "none knows it", "S"]),
]
DOCUMENTS = {
    "choices": [
        {"question": f"What is the capital of {name}?", "choices": choices, "answer": number % 3}
        for number, (name, choices) in enumerate(CAPITALS)
    ],
    "answers": [
        {"question": f"Question: {line}\nAnswer: ", "answer": line} for line in TEXT.splitlines() for _ in "ab"
    ],
    "texts": [{"text": text} for text in ("Oslo", TEXT, TEXT * 4, "Grüße 😀 <|im_end|> aus Zürich")],
}
TASKS = {
    "choices": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "answers": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["kk", "\\n\\n"], max_gen_toks: 40, do_sample: false}
metric_list:
  - metric: exact_match
""",
    "texts": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
}


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    for name, rows in DOCUMENTS.items():
        data = directory / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {directory / 'cache'}}}"
        head = f"task: local_{name}\ndataset_path: json\n{source}\ntest_split: test\nfewshot_split: test\n"
        (directory / f"{name}.yaml").write_text(head + TASKS[name])
    return directory


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with weights that make it sure of itself."""
    directory = tmp_path_factory.mktemp("sure")
    for path in tiny_checkpoint.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    state = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor * (6 if tensor.ndim == 2 else 1) for name, tensor in state.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return directory


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(directory)
    return directory


def our_model(checkpoint: Path, adapter: Path | None = None) -> Llama:
    model = load_model(checkpoint, dtype=torch.float32)
    if adapter is not None:
        load_adapter(model, adapter)
    return model.eval()


@pytest.mark.parametrize(("adapted", "chat", "num_fewshot"), [(False, False, 2), (True, True, 0)])
def test_figures_equal_the_hugging_face_backend(
    checkpoint: Path, adapter: Path, tasks_dir: Path, adapted: bool, chat: bool, num_fewshot: int
) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    ours = HarnessModel(our_model(checkpoint, adapter if adapted else None), tokenizer, 3, "chatml" if chat else None)
    theirs = HFLM(str(checkpoint), dtype="float32", device="cpu", batch_size=2, peft=str(adapter) if adapted else None)
    names = [f"local_{name}" for name in TASKS if not (chat and name == "texts")]
    results = [
        simple_evaluate(
            lm,
            tasks=names,
            task_manager=Tasks(include_path=str(tasks_dir), include_defaults=False),
            num_fewshot=num_fewshot,
            apply_chat_template=chat,
            system_instruction="Answer." if chat else None,
            bootstrap_iters=0,
        )
        for lm in (ours, theirs)
    ]
    assert results[0]["results"].keys() == set(names)
    for name, expected in results[1]["results"].items():
        assert figures(results[0]["results"][name]) == pytest.approx(figures(expected), rel=1e-5)
        for sample, other in zip(results[0]["samples"][name], results[1]["samples"][name], strict=True):
            assert sample["arguments"] == other["arguments"]
            for [response], [their_response] in zip(sample["resps"], other["resps"], strict=True):
                exactly = isinstance(their_response, str)
                assert response == (their_response if exactly else pytest.approx(their_response, rel=1e-6, abs=1e-4))
    answers = [sample["resps"][0][0] for sample in results[0]["samples"]["local_answers"]]
    assert len(set(answers)) > 1 and any(answers)


def test_only_a_greedy_continuation_is_called_so(checkpoint: Path) -> None:
    model, tokenizer = our_model(checkpoint), Tokenizer.from_checkpoint(checkpoint)
    context = tokenizer.encode("The capital of Norway")
    [said] = generate(model, context, 8)
    other = [*said[:-1], (said[-1] + 1) % 300]
    scores = HarnessModel(model, tokenizer)._loglikelihood_tokens(
        [(None, context, said), (None, context, other), (None, context, said[:1])], disable_tqdm=True
    )
    assert [greedy for _, greedy in scores] == [True, False, True]


def figures(results: dict) -> dict[str, float]:
    return {name: value for name, value in results.items() if isinstance(value, int | float)}


def request(*arguments: object) -> Instance:
    return Instance(request_type="generate_until", doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": [], "max_gen_toks": 512}, "wants to generate 512 tokens, the model's context has 512"),
        ({"until": [], "num_beams": 4}, "wants to generate with 'num_beams'"),
    ],
)
def test_generation_that_there_is_not(checkpoint: Path, options: dict, message: str) -> None:
    lm = HarnessModel(our_model(checkpoint), Tokenizer.from_checkpoint(checkpoint))
    with pytest.raises(InputError, match=message):
        lm.generate_until([request("Oslo", options)])


def test_tasks_that_there_are_not(tasks_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such directory"):
        find_tasks(["local_choices"], tmp_path / "nowhere")
    (tmp_path / "broken.yaml").write_text(f"task: broken\ndataset_path: {tmp_path / 'none'}\ntest_split: test\n")
    with pytest.raises(InputError, match="--tasks .'broken'.: cannot be loaded"):
        find_tasks(["broken"], tmp_path).load(["broken"])


def test_the_script_reports_tasks(checkpoint: Path, adapter: Path, tasks_dir: Path) -> None:
    process = run_script(
        "scripts/evaluate.py",
        *("--checkpoint_dir", checkpoint, "--adapter_dir", adapter, "--dtype", "fp32", "--device", "cpu"),
        *("--tasks", "local_choices,local_texts", "--tasks_dir", tasks_dir, "--limit", 3),
    )
    result = json.loads(process.stdout)
    assert result["settings"]["limit"] == 3
    tasks = result["tasks"]
    assert tasks["results"].keys() == {"local_choices", "local_texts"}
    assert tasks["n-samples"]["local_choices"]["effective"] == 3
    manager = Tasks(include_path=str(tasks_dir), include_defaults=False)
    lm = HarnessModel(our_model(checkpoint, adapter), Tokenizer.from_checkpoint(checkpoint))
    expected = simple_evaluate(lm, tasks=["local_texts"], task_manager=manager, limit=3, bootstrap_iters=0)["results"]
    figure = tasks["results"]["local_texts"]["word_perplexity,none"]
    assert figure == pytest.approx(expected["local_texts"]["word_perplexity,none"], rel=1e-5)
