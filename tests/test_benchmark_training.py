"""The training benchmark runs every contestant and says what ran where."""

import json
from pathlib import Path

from conftest import ROOT, run_script

SCRIPT = ROOT / "scripts/benchmark_training.py"


def test_contestants_in_turns(tiny_checkpoint: Path, tmp_path: Path) -> None:
    names = ["lit-llama", "transformers + peft", "lit-llama, least memory"]
    run_script(
        SCRIPT, "--checkpoint_dir", tiny_checkpoint, "--contestants", json.dumps(names), "--steps", 1, "--rounds", 1,
        "--batch_size", 2, "--sequence_length", 64, "--document_length", 20, "--threads", 1, "--device", "cpu",
        "--out", tmp_path / "result.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "result.json").read_text())
    assert list(report["results"]) == names
    assert all(result["tokens_per_second"] > 0 for result in report["results"].values())
    assert report["results"]["transformers + peft"]["speed_of_first_against_it"] > 0
    assert report["versions"]["peft"] and report["setting"]["document_length"] == 20 and report["matrix_tflops"] > 0
    assert 0 < report["results"]["lit-llama"]["share_of_matrix_rate"] < 1


def test_random_weights_of_a_named_architecture_need_no_checkpoint() -> None:
    result = run_script(SCRIPT, "--model", "no-such-model", "--contestant", "lit-llama", check=False)
    assert result.returncode == 2 and "no configuration is named" in result.stderr


def test_caps_are_for_a_gpu(tiny_checkpoint: Path) -> None:
    result = run_script(SCRIPT, "--checkpoint_dir", tiny_checkpoint, "--caps_gb", "[8]", "--device", "cpu", check=False)
    assert result.returncode == 2 and "--caps_gb needs a CUDA device" in result.stderr
