"""scripts/prepare_instructions.py as a user runs it, and generate/lora.py with an adapter of such a store."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_script

from lit_llama.answering import AnswerArguments, adapter_style, adapter_system, answer_prompts
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.data.token_store import TokenStore
from lit_llama.generation import generate
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_llama.model import Llama
from lit_llama.prompts import detect_style, encode_chat, encode_prompt
from lit_llama.tokenizer import Tokenizer

SCRIPT = "scripts/prepare_instructions.py"
OWN_TEMPLATE = (
    "{% for message in messages %}{{ {'user': 'Q: ', 'system': 'Note: ', 'assistant': 'A:'}[message.role] }}"
    "{{ message.content + ('<|im_end|>' if message.role == 'assistant' else '\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("sources")
    rows = [{"Frage": f"What is {n} plus one?", "Antwort": f"It is {n + 1}."} for n in range(30)]
    (directory / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "b.csv").write_text("prompt,completion\n" + "".join(f"Say {n},{n}\n" for n in range(10)))
    return [directory / "a.jsonl", directory / "b.csv"]


def test_from_files_to_a_store(sources: list[Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = [
        "--source",
        *sources,
        "--checkpoint_dir",
        tiny_checkpoint,
        "--columns",
        "{instruction: Frage, output: Antwort}",
    ]
    store = tmp_path / "store"
    process = run_script(
        SCRIPT, *arguments, "--data_dir", store, "--show", 1, "--system", "Be brief.", "--val_fraction", 0.2
    )
    report = json.loads(process.stdout)
    assert report == json.loads((store / "report.json").read_text())
    assert sum(split["examples"] for split in report["splits"].values()) == 40 and report["system"] == "Be brief."
    assert f"{sources[0]}: 30 alpaca" in process.stderr and "10 prompt/completion" in process.stderr
    assert "user\nWhat is 0 plus one?<|im_end|>\n<|im_start|>assistant\n⟦It is 1.<|im_end|>⟧" in process.stderr
    assert TokenStore.open(store, "val").meta["command"].endswith("--val_fraction 0.2")
    again = run_script(SCRIPT, *arguments, "--data_dir", store, check=False)
    assert again.returncode == 2 and "--overwrite true" in again.stderr and len(again.stderr.splitlines()) == 1

    preview = run_script(SCRIPT, *arguments, "--show", 2)
    assert preview.stdout == "" and preview.stderr.count("--- a.jsonl#") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_wrong_use_is_one_line_and_status_2(sources: list[Path], tiny_checkpoint: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([], "give --data_dir"),
        (["--data_dir", tmp_path / "store"], "a.jsonl, line 1: no keys of a known form"),
    ):
        process = run_script(
            SCRIPT, "--source", sources[0], "--checkpoint_dir", tiny_checkpoint, *arguments, check=False
        )
        assert (process.returncode, process.stdout) == (2, "")
        assert message in process.stderr.splitlines()[-1] and "Traceback" not in process.stderr
    assert list(tmp_path.iterdir()) == []


# --- the style and the system message of an adapter


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says different things to different prompts, with a chat template of its own."""
    config = LlamaConfig.from_json(tiny_checkpoint)
    config.tie_word_embeddings = False
    model = Llama(config)
    torch.manual_seed(0)
    model.initialize_(std=0.15)
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    (directory / "chat_template.jinja").write_text(OWN_TEMPLATE)
    return directory


@pytest.fixture
def adapter(checkpoint: Path, tmp_path: Path) -> Path:
    model = load_model(checkpoint, dtype=torch.float32)
    inject_lora(model, LoRAConfig(r=4))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def said(checkpoint: Path, adapter: Path, ids: list[int]) -> str:
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), Tokenizer.from_checkpoint(checkpoint)
    load_adapter(model, adapter)
    return tokenizer.decode(generate(model, ids, 12, stop_ids=tokenizer.stop_ids)[0]) + "\n"


def test_generate_uses_style_and_system_of_the_adapter_unasked(checkpoint: Path, adapter: Path) -> None:
    assert detect_style(checkpoint) == "template"
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    settings = {"eval": {"probe_style": "template", "probe_system": "Be brief."}}
    (adapter / "lit_config.yaml").write_text(yaml.safe_dump(settings))
    assert (adapter_style(adapter), adapter_system(adapter), adapter_system(None)) == ("template", "Be brief.", None)
    common = ["--checkpoint_dir", checkpoint, "--adapter_dir", adapter, "--dtype", "fp32", "--max_new_tokens", 12]
    process = run_script("generate/lora.py", *common, "--prompt", "Capital?")
    ids = tokenizer.encode("Note: Be brief.\nQ: Capital?\nA:")
    assert encode_prompt(tokenizer, "template", "Capital?", "Be brief.") == ids
    assert process.stdout == said(checkpoint, adapter, ids)


def test_an_adapters_system_message_can_be_switched_off(
    checkpoint: Path, adapter: Path, capsys: pytest.CaptureFixture
) -> None:
    (adapter / "lit_config.yaml").write_text(
        yaml.safe_dump({"eval": {"probe_style": "chatml", "probe_system": "Be brief."}})
    )
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    answers = {}
    for given in (None, "", "Other."):
        arguments = AnswerArguments(
            checkpoint_dir=checkpoint, prompt="Capital?", system=given, dtype="fp32", max_new_tokens=12
        )
        answer_prompts(arguments, adapter)
        answers[given] = capsys.readouterr().out
        used = "Be brief." if given is None else given
        messages = [*([{"role": "system", "content": used}] if used else []), {"role": "user", "content": "Capital?"}]
        assert answers[given] == said(checkpoint, adapter, encode_chat(tokenizer, "chatml", messages))
    assert len(set(answers.values())) == 3
