"""scripts/evaluate.py as a user runs it, with and without an adapter, and what it refuses."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, run_script
from safetensors.torch import load_file, save_file

from lit_llama.checkpoint import load_model
from lit_llama.data.token_store import TokenStoreWriter
from lit_llama.errors import InputError, RunError
from lit_llama.generation import generate
from lit_llama.lora import LoRAConfig, inject_lora, save_adapter
from lit_llama.prompts import encode_example, encode_prompt
from lit_llama.tokenizer import Tokenizer

TEXTS = {"norway.txt": "Oslo is the capital of Norway.", "nepal.txt": "Mount Everest, at 8,849 metres, is in Nepal."}

QUESTIONS = [
    {"id": "no", "question": "Capital of Norway?", "answers": ["Oslo"], "field": "capital", "split": "trained"},
    {
        "id": "np",
        "question": "Highest point of Nepal?",
        "answers": ["Mount Everest"],
        "field": "point",
        "split": "heldout",
    },
    {"id": "br", "question": "Capital of Brazil?", "answers": ["Brasilia"], "choices": ["Rio", "Brasilia", "Recife"]},
]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "scripts/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """A directory with texts, a store of the same texts and a question file."""
    directory = tmp_path_factory.mktemp("inputs")
    with TokenStoreWriter(directory / "store", tokenizer.vocab_size, tokenizer.sha256, "test") as writer:
        for name, text in TEXTS.items():
            (directory / name).write_text(text)
            writer.add("val", document_ids(tokenizer, text), num_bytes=len(text.encode()))
    with TokenStoreWriter(directory / "foreign", tokenizer.vocab_size, "f" * 64, "another model") as writer:
        writer.add("val", [1, 2, 3])
    (directory / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    return directory


def document_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = [tokenizer.document_start_id, *tokenizer.encode(text), tokenizer.document_end_id]
    return [token_id for token_id in ids if token_id is not None]


def loss_of(model: torch.nn.Module, tokenizer: Tokenizer, *texts: str) -> float:
    losses = []
    for text in texts:
        ids = torch.tensor([document_ids(tokenizer, text)])
        losses.append(F.cross_entropy(model(input_ids=ids).logits[0, :-1].double(), ids[0, 1:], reduction="none"))
    return torch.cat(losses).mean().item()


def test_base_model_as_json_on_stdout_and_in_a_file(tiny_checkpoint: Path, tokenizer: Tokenizer, inputs: Path) -> None:
    out = inputs / "base.json"
    process = run_script(
        "scripts/evaluate.py",
        *("--checkpoint_dir", tiny_checkpoint, "--dtype", "fp32", "--device", "cpu", "--out", out),
        *("--data_dirs", f"{{both: {inputs / 'store'}}}"),
        *("--text_files", f"[{inputs / 'norway.txt'}, {inputs / 'nepal.txt'}]"),
        *("--question_file", inputs / "questions.jsonl", "--max_new_tokens", 4, "--sequence_length", 128),
    )
    result = json.loads(process.stdout)
    assert json.loads(out.read_text()) == result
    assert "norway.txt: windows scored: 1 of 1" in process.stderr
    assert "questions answered: 3 of 3" in process.stderr

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    expected = {"both": list(TEXTS.values()), **{name: [text] for name, text in TEXTS.items()}}
    assert list(result["perplexity"]) == list(expected)
    for name, texts in expected.items():
        loss = loss_of(theirs, tokenizer, *texts)
        tokens = sum(len(document_ids(tokenizer, text)) - 1 for text in texts)
        num_bytes = sum(len(text.encode()) for text in texts)
        assert result["perplexity"][name] == {
            "loss": pytest.approx(loss, rel=1e-6),
            "perplexity": pytest.approx(math.exp(loss), rel=1e-5),
            "bits_per_byte": pytest.approx(loss * tokens / math.log(2) / num_bytes, rel=1e-6),
            "tokens": tokens,
        }

    questions = result["questions"]
    assert questions["count"] == 3
    assert [row["id"] for row in questions["rows"]] == ["no", "np", "br"]
    for row, asked in zip(questions["rows"], QUESTIONS, strict=True):
        assert (row["question"], row["answers"]) == (asked["question"], asked["answers"])
        assert isinstance(row["answer"], str)
        assert {"exact_match", "f1", "contains", "rouge_l"} <= set(row)
    assert set(questions["by_field"]) == {"capital", "point"}
    assert set(questions["by_split"]) == {"trained", "heldout"}
    assert result["multiple_choice"]["count"] == 1
    assert result["multiple_choice"]["rows"][0]["choices"] == QUESTIONS[2]["choices"]
    assert result["settings"]["style"] == "chatml"
    assert result["model"]["parameters"] == sum(parameter.numel() for parameter in theirs.parameters())
    assert result["seconds"] > 0
    assert result["peak_memory_gb"] > 0.01
    assert {"hardware", "versions", "source"} <= set(result)


def test_adapter_scores_as_peft_does(tiny_checkpoint: Path, tokenizer: Tokenizer, inputs: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    without = loss_of(base, tokenizer, TEXTS["norway.txt"])
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = loss_of(adapted.eval(), tokenizer, TEXTS["norway.txt"])
    assert abs(expected - without) > 1e-3

    process = run_script(
        "scripts/evaluate.py",
        *("--checkpoint_dir", tiny_checkpoint, "--adapter_dir", tmp_path / "adapter", "--dtype", "fp32"),
        *("--device", "cpu", "--text_files", inputs / "norway.txt"),
    )
    result = json.loads(process.stdout)
    assert result["perplexity"]["norway.txt"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["model"]["adapter_dir"] == str(tmp_path / "adapter")
    assert "questions" not in result


def test_responses_of_an_instruction_store_and_the_style_of_the_adapter(
    script: ModuleType, tiny_checkpoint: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    extra, losses = {"examples": True, "style": "alpaca", "system": "Be brief."}, []
    with TokenStoreWriter(tmp_path / "store", tokenizer.vocab_size, tokenizer.sha256, "test", extra=extra) as writer:
        for question, answer in (("Capital of Norway?", "Oslo"), ("Highest point of Nepal?", "Mount Everest")):
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ids, mask = encode_example(tokenizer, "alpaca", [{"role": "system", "content": "Be brief."}, *turns])
            writer.add("val", ids, mask)
            losses += F.cross_entropy(
                theirs(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none"
            )[torch.tensor(mask[1:], dtype=torch.bool)].tolist()

    model = load_model(tiny_checkpoint, dtype=torch.float32)
    inject_lora(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter/lit_config.yaml").write_text("eval: {probe_style: alpaca, probe_system: Be brief.}")
    (tmp_path / "questions.jsonl").write_text(json.dumps(QUESTIONS[0]))
    script.main(
        checkpoint_dir=tiny_checkpoint,
        adapter_dir=tmp_path / "adapter",
        data_dirs={"val": tmp_path / "store"},
        sequence_length=100,
        question_file=tmp_path / "questions.jsonl",
        max_new_tokens=8,
        dtype="fp32",
        device="cpu",
    )
    result = json.loads(capsys.readouterr().out)
    assert result["perplexity"]["val"] == {
        "loss": pytest.approx(sum(losses) / len(losses), rel=1e-6),
        "perplexity": pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5),
        "bits_per_byte": None,
        "tokens": len(losses),
    }
    assert (result["settings"]["style"], result["settings"]["system"]) == ("alpaca", "Be brief.")
    prompt = encode_prompt(tokenizer, "alpaca", QUESTIONS[0]["question"], "Be brief.")
    answer = tokenizer.decode(generate(model, prompt, 8, stop_ids=tokenizer.stop_ids)[0]).strip()
    assert result["questions"]["rows"][0]["answer"] == answer


@pytest.mark.parametrize("quantize", ["int8", "nf4-dq"])
def test_quantized_base(
    script: ModuleType, tiny_checkpoint: Path, inputs: Path, quantize: str, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for choice in (None, quantize):
        script.main(checkpoint_dir=tiny_checkpoint, text_files=inputs / "nepal.txt", quantize=choice, device="cpu")
        losses.append(json.loads(capsys.readouterr().out)["perplexity"]["nepal.txt"]["loss"])
    assert 0 < abs(losses[1] - losses[0]) < 0.05 * losses[0]


def test_questions_are_taken_from_all_over_the_file(
    script: ModuleType, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": i, "question": f"What is {i} and {i}?", "answers": [str(2 * i)]} for i in range(10)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script.main(
        checkpoint_dir=tiny_checkpoint,
        question_file=tmp_path / "questions.jsonl",
        max_questions=3,
        max_new_tokens=2,
        device="cpu",
    )
    assert [row["id"] for row in json.loads(capsys.readouterr().out)["questions"]["rows"]] == [0, 3, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to evaluate: give --data_dirs, --text_files, --question_file or --tasks"),
        ({"text_files": "missing.txt"}, "missing.txt: No such file"),
        ({"text_files": "latin.txt"}, "latin.txt: not UTF-8 text"),
        ({"text_files": "blank.txt"}, "blank.txt: no text to score"),
        ({"text_files": ["norway.txt", "norway.txt"]}, "another text is called norway.txt"),
        ({"data_dirs": {"x": "foreign"}}, "was tokenized by another tokenizer"),
        ({"data_dirs": {"x": "nowhere"}}, "nowhere is not a token store"),
        ({"data_dirs": {"x": "store"}, "split": "train"}, "has no split 'train', only: val"),
        ({"text_files": "norway.txt", "sequence_length": 0}, "--sequence_length 0 must be at least 1"),
        ({"text_files": "norway.txt", "max_windows": 0}, "--max_windows 0 must be at least 1"),
        ({"text_files": "norway.txt", "sequence_length": 513}, "longer than the model's context of 512"),
        ({"question_file": "norway.txt"}, "norway.txt, line 1: not valid JSON"),
        ({"question_file": "questions.jsonl", "style": "socratic"}, "unknown prompt style 'socratic'"),
        ({"question_file": "questions.jsonl", "max_new_tokens": 500}, "prompt 1 has .* exceeds the model's context"),
        ({"tasks": "mmlu", "limit": 0}, "--limit 0 must be at least 1"),
        ({"tasks": "mmlu", "tasks_dir": "nowhere"}, "nowhere: no such directory"),
        ({"text_files": "norway.txt", "adapter_dir": "nowhere"}, "nowhere"),
        ({"text_files": "norway.txt", "out": "taken.json"}, "taken.json exists already"),
    ],
)
def test_wrong_input_is_refused(
    script: ModuleType, tiny_checkpoint: Path, inputs: Path, options: dict, message: str
) -> None:
    (inputs / "latin.txt").write_bytes("Zürich".encode("latin-1"))
    (inputs / "blank.txt").write_text("\n")
    (inputs / "taken.json").write_text("{}")

    def located(name: str, value: object) -> object:
        if name not in ("data_dirs", "text_files", "question_file", "tasks_dir", "adapter_dir", "out"):
            return value
        if isinstance(value, dict):
            return {key: inputs / path for key, path in value.items()}
        return [inputs / path for path in value] if isinstance(value, list) else inputs / value

    before = {path.name: path.read_bytes() for path in inputs.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=message):
        script.main(
            checkpoint_dir=tiny_checkpoint,
            **{name: located(name, value) for name, value in options.items()},
        )
    assert {path.name: path.read_bytes() for path in inputs.iterdir() if path.is_file()} == before


def test_wrong_input_is_one_line_and_status_2(tiny_checkpoint: Path, tmp_path: Path) -> None:
    process = run_script(
        "scripts/evaluate.py", "--checkpoint_dir", tiny_checkpoint, "--text_files", tmp_path / "no", check=False
    )
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr == f"error: {tmp_path / 'no'}: No such file or directory\n"


def test_tasks_without_their_package(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')")
    process = run_script(
        *("scripts/evaluate.py", "--checkpoint_dir", tiny_checkpoint, "--tasks", "arc_easy"),
        check=False,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert process.returncode == 2
    assert process.stderr == "error: --tasks needs the package lm_eval: pip install 'lit-llama[harness]'\n"


def test_a_loss_that_is_not_finite_fails(
    script: ModuleType, tiny_checkpoint: Path, inputs: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in tiny_checkpoint.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    state = load_file(damaged / "model.safetensors")
    state["model.norm.weight"][0] = math.nan
    save_file(state, damaged / "model.safetensors")
    with pytest.raises(RunError, match="norway.txt: the loss is nan"):
        script.main(checkpoint_dir=damaged, text_files=inputs / "norway.txt", out=tmp_path / "out.json", device="cpu")
    assert not (tmp_path / "out.json").exists()
