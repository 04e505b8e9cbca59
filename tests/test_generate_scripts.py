"""generate/base.py, generate/lora.py and scripts/benchmark_generation.py as a user runs them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script

from lit_llama.answering import AnswerArguments, adapter_style, answer_prompts, read_prompts
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.generation import generate
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, save_adapter
from lit_llama.model import Llama
from lit_llama.prompts import encode_prompt
from lit_llama.tokenizer import Tokenizer

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
PROMPTS = ["What is the highest point of Norway?", "Capital?", "Which river is the longest of all?"]


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with larger, untied weights, so that it says different things to different prompts."""
    config = LlamaConfig.from_json(tiny_checkpoint)
    config.tie_word_embeddings = False
    model = Llama(config)
    torch.manual_seed(0)
    model.initialize_(std=0.15)
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the model says."""
    model = load_model(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    inject_lora(model, LoRAConfig(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    directory = tmp_path_factory.mktemp("adapter") / "adapter"
    save_adapter(model, directory)
    return directory


def expected(checkpoint: Path, prompts: list[str], style: str, count: int, adapter: Path | None = None) -> list[str]:
    """What the library says to each prompt, asked one at a time in fp32."""
    model, tokenizer = load_model(checkpoint, dtype=torch.float32), Tokenizer.from_checkpoint(checkpoint)
    if adapter is not None:
        load_adapter(model, adapter)
    ids = [encode_prompt(tokenizer, style, prompt) for prompt in prompts]
    return [tokenizer.decode(generate(model, row, count, stop_ids=tokenizer.stop_ids)[0]) for row in ids]


def generate_base(checkpoint: Path, *arguments: object, **options: object):
    arguments = ("--checkpoint_dir", checkpoint, "--dtype", "fp32", "--max_new_tokens", 12, *arguments)
    return run_script("generate/base.py", *arguments, env=ONE_THREAD, **options)


def answer(checkpoint: Path, capsys: pytest.CaptureFixture, adapter_dir: Path | None = None, **options: object) -> str:
    """What is printed to stdout, without the cost of a process."""
    options = {"dtype": "fp32", "max_new_tokens": 12, "checkpoint_dir": checkpoint} | options
    answer_prompts(AnswerArguments(**options), adapter_dir)
    return capsys.readouterr().out


def test_one_prompt_only_the_answer_on_stdout(checkpoint: Path) -> None:
    process = generate_base(checkpoint, "--prompt", PROMPTS[0])
    assert process.stdout == expected(checkpoint, PROMPTS[:1], "chatml", 12)[0] + "\n"
    for part in ("prefill", "decode", "tokens/s", "GB/s of weights", "peak memory"):
        assert part in process.stderr


def test_adapter_and_prompts_file_to_json(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": prompt, "answers": ["?"]}) + "\n\n" for prompt in PROMPTS))
    process = run_script(
        "generate/lora.py", "--checkpoint_dir", checkpoint, "--adapter_dir", adapter, "--dtype", "fp32",
        "--max_new_tokens", 12, "--prompts_file", path, "--json", "true", env=ONE_THREAD,
    )  # fmt: skip
    answers = expected(checkpoint, PROMPTS, "chatml", 12, adapter)
    assert [json.loads(line) for line in process.stdout.splitlines()] == [
        {"prompt": prompt, "answer": text} for prompt, text in zip(PROMPTS, answers, strict=True)
    ]
    assert answers != expected(checkpoint, PROMPTS, "chatml", 12)
    assert len(set(answers)) == 3


def test_standard_input_is_a_prompt(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Norway\nborders Sweden\n"))
    printed = answer(checkpoint, capsys, style="plain")
    assert printed == expected(checkpoint, ["Norway\nborders Sweden"], "plain", 12)[0] + "\n"


def test_interactive_answers_each_line_and_outlives_a_wrong_one(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([PROMPTS[0], "", "x" * 2000, PROMPTS[1]])))
    answer_prompts(AnswerArguments(checkpoint_dir=checkpoint, dtype="fp32", max_new_tokens=12, interactive=True))
    printed = capsys.readouterr()
    answers = expected(checkpoint, PROMPTS[:2], "chatml", 12)
    assert printed.out == "".join(f"{text}\n" for text in answers)
    assert printed.err.count("> ") == 5 and "context of 512" in printed.err


def test_wrong_use_is_one_line_and_status_2(checkpoint: Path) -> None:
    process = generate_base(checkpoint, "--prompt", "x" * 700, check=False)
    assert (process.returncode, process.stdout) == (2, "")
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: the prompt has ") and "context of 512" in line


def test_prompts_of_a_text_file_are_answered_in_order(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]))
    answers = expected(checkpoint, PROMPTS, "chatml", 12)
    for batch_size in (1, 2, 8):
        printed = answer(checkpoint, capsys, prompts_file=path, batch_size=batch_size)
        assert printed == "".join(f"{text}\n" for text in answers)


def test_one_prompt_too_long_and_nothing_is_printed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*PROMPTS, "x" * 2000]))
    with pytest.raises(InputError, match="prompt 4 has 2[0-9]{3} tokens .* context of 512"):
        answer(checkpoint, capsys, prompts_file=path, batch_size=1)
    assert capsys.readouterr().out == ""


def test_samples_follow_each_other_and_the_seed_repeats_them(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    options = {"prompt": PROMPTS[0], "num_samples": 3, "temperature": 1.0, "top_p": 0.9, "json": True}
    first, again, other = (answer(checkpoint, capsys, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    rows = [json.loads(line) for line in first.splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS[:1] * 3
    assert len({row["answer"] for row in rows}) == 3


def test_stop_strings_and_system_message(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    free = answer(checkpoint, capsys, prompt=PROMPTS[0]).removesuffix("\n")
    stop = free[4:6]
    for given in (stop, ["never said", stop]):
        assert answer(checkpoint, capsys, prompt=PROMPTS[0], stop=given) == free.split(stop)[0] + "\n"
    assert answer(checkpoint, capsys, prompt=PROMPTS[0], system="Be brief.") != free + "\n"


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4", "nf4-dq"])
def test_quantized_base_answers_as_the_library_does(
    checkpoint: Path, adapter: Path, quantize: str, capsys: pytest.CaptureFixture
) -> None:
    model, tokenizer = load_model(checkpoint, torch.float32, quantize=quantize), Tokenizer(checkpoint)
    load_adapter(model, adapter)
    ids = encode_prompt(tokenizer, "chatml", PROMPTS[0])
    text = tokenizer.decode(generate(model, ids, 12, stop_ids=tokenizer.stop_ids)[0])
    assert answer(checkpoint, capsys, adapter, prompt=PROMPTS[0], quantize=quantize) == f"{text}\n"


def test_quantized_cache_answers_as_the_library_does(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    model, tokenizer = load_model(checkpoint, torch.float32), Tokenizer(checkpoint)
    ids = encode_prompt(tokenizer, "chatml", PROMPTS[0])
    rows = generate(model, ids, 12, stop_ids=tokenizer.stop_ids, quantize_cache="int8")
    assert answer(checkpoint, capsys, prompt=PROMPTS[0], quantize_cache="int8") == f"{tokenizer.decode(rows[0])}\n"


def test_choices_logprobs_and_guesses(
    checkpoint: Path, adapter: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (text,) = expected(checkpoint, PROMPTS[:1], "chatml", 12)
    for draft in ("lookup", str(checkpoint)):
        answer_prompts(AnswerArguments(
            checkpoint_dir=checkpoint, dtype="fp32", max_new_tokens=12, prompt=PROMPTS[0], json=True, logprobs=1,
            draft=draft,
        ))  # fmt: skip
        printed = capsys.readouterr()
        row = json.loads(printed.out)
        assert (row["prompt"], row["answer"]) == (PROMPTS[0], text)
        assert all(one["logprob"] == one["top"][0]["logprob"] < 0 for one in row["logprobs"])  # greedy
    assert "guessed tokens were right" in printed.err
    options = {"prompt": PROMPTS[0], "choices": ["a mountain", "a river"], "max_new_tokens": 20}
    assert answer(checkpoint, capsys, adapter, **options).removesuffix("\n") in options["choices"]


@pytest.mark.parametrize("script", ["base", "lora", "chat", "serve"])
def test_help_does_not_wait_for_torch(script: str) -> None:
    command = [sys.executable, "-X", "importtime", ROOT / "generate" / f"{script}.py", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--checkpoint_dir" in process.stdout and "Base model, a Hugging Face directory." in process.stdout
    imported = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert "jsonargparse" in imported and "torch" not in imported


def test_style_of_the_adapters_run(tmp_path: Path) -> None:
    assert adapter_style(None) is adapter_style(tmp_path) is None
    path = tmp_path / "lit_config.yaml"
    path.write_text("eval:\n  probe_style: null\n")
    assert adapter_style(tmp_path) is None
    path.write_text("eval:\n  probe_style: alpaca\n")
    assert adapter_style(tmp_path) == "alpaca"
    path.write_text("style: plain\neval:\n  probe_style: alpaca\n")
    assert adapter_style(tmp_path) == "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a", "prompts_file": Path("b")}, "choose one"),
        ({"prompt": "a", "interactive": True}, "--interactive"),
        ({"prompt": "a", "style": "vicuna"}, "'vicuna' is not one of plain, "),
        ({"prompt": "a", "batch_size": 0}, "--batch_size 0"),
        ({"prompt": "a", "logprobs": 2}, "--logprobs 2 .* --json true"),
        ({"prompt": "a", "draft": "nowhere"}, "nowhere: no such directory"),
        ({"prompt": "a", "checkpoint_dir": Path("nowhere")}, "nowhere: no such directory"),
        ({"prompt": "a", "device": "cuda:99"}, "--device cuda:99"),
        ({"prompt": "a", "device": "abacus"}, "--device abacus"),
        ({"prompts_file": Path("missing.txt")}, "missing.txt: No such file"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        answer_prompts(AnswerArguments(**{"checkpoint_dir": checkpoint} | options))


def test_sources_without_a_prompt_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    with pytest.raises(InputError, match="standard input is empty"):
        read_prompts(None, None)
    path = tmp_path / "prompts.jsonl"
    for content, message in (("\n", "no prompt in it"), ('{"text": "a"}\n', "object 1: neither")):
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            read_prompts(None, path)
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"caf\xe9\n")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(None, path)


def test_benchmark_measures_both(checkpoint: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "report.json", tmp_path / "text.txt"
    text.write_text("".join(f"The house of number {number} stands at the lake. " for number in range(100)))
    arguments = [
        "scripts/benchmark_generation.py", "--checkpoint_dir", checkpoint, "--out", out, "--dtype", "fp32",
        "--new_tokens", 8, "--prefill_tokens", 64, "--rounds", 1, "--threads", 1, "--device", "cpu",
        "--text", text, "--contestants", '["lit-llama", "lit-llama int8, int8 cache", "transformers"]',
    ]  # fmt: skip
    report = json.loads(run_script(*arguments, env=ONE_THREAD).stdout)
    assert json.loads(out.read_text()) == report
    own, peer = report["results"]["lit-llama"], report["results"]["transformers"]
    assert len(own["seconds"]["generate"]) == len(peer["seconds"]["prefill"]) == 3
    ratio = own["generate_tokens_per_second"] / peer["generate_tokens_per_second"]
    assert report["generate_speed_ratio"]["lit-llama"] == pytest.approx(ratio)
    assert report["leading_tokens_alike"]["lit-llama"] == [8]
    assert own["perplexity"] == pytest.approx(peer["perplexity"], rel=1e-5)
    assert 0 < abs(report["results"]["lit-llama int8, int8 cache"]["perplexity"] / peer["perplexity"] - 1) < 0.03
    assert own["share_of_copy_bandwidth"] == own["gb_per_second"] / report["copy_gb_per_second"]
