"""benchmarks/experts/: a run of the comparison of adapter trees, on a tiny model and invented domains."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import run_script

from benchmarks.experts.tree_run import domain_of_pieces
from lit_llama.tokenizer import Tokenizer

WORDS = {
    "addresses": "congress union nation people treasury peace war states citizens law",
    "factbook": "coast border river mountain capital population area climate export rail",
    "weaknesses": "buffer pointer overflow input query token session memory lock thread",
    "python": "class object method module import return yield lambda tuple slice",
}


def pieces(domain: str, count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS[domain].split(), k=30)) for _ in range(count)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    domains = {domain: {"train": pieces(domain, 6, 0), "val": pieces(domain, 3, 1)} for domain in WORDS}
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(domains))
    return path


@pytest.mark.parametrize("arm", ["base", "tree", "oracle"])
def test_an_arm_is_trained_and_measured(arm: str, tmp_path: Path, tiny_checkpoint: Path, texts: Path) -> None:
    out = tmp_path / "run"
    options = ["--checkpoint_dir", tiny_checkpoint, "--texts_file", texts, "--out_dir", out, "--generated", "[1]"]
    run_script("benchmarks/experts/tree_run.py", *options, "--sequence_length", "64", "--arm", arm)
    measured = json.loads((out / "measured.json").read_text())
    assert measured["loss"].keys() == WORDS.keys() and measured["decode_tokens_per_second"].keys() == {"1"}
    low, high = min(measured["loss"].values()), max(measured["loss"].values())
    assert low <= measured["pooled_loss"] <= high
    assert ("soft_pooled_loss" in measured) == (arm == "tree") and bool(measured["report"]) == (arm != "base")
    if arm == "tree":
        assert 0 <= measured["leaf_domain_information"] <= 1.39  # at most log 4
    process = run_script("benchmarks/experts/tree_run.py", *options, "--arm", "forest", check=False)
    assert process.returncode == 2 and "none of base" in process.stderr


def test_the_oracle_knows_each_piece_wherever_a_window_cuts_it(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_checkpoint(tiny_checkpoint)
    own = [pieces(domain, 4, 0) for domain in WORDS]
    first, second = (tokenizer.encode(own[number][1]) for number in (2, 3))
    start = [tokenizer.document_start_id] if tokenizer.document_start_id is not None else []
    ids = torch.tensor([first[5:] + start + second])
    documents = torch.tensor([[0] * len(first[5:]) + [1] * (len(start) + len(second))])
    expected = [[2] * len(first[5:]) + [3] * (len(start) + len(second))]
    assert domain_of_pieces(own, tokenizer)(ids, documents).tolist() == expected
