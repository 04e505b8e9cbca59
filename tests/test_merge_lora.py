"""scripts/merge_lora.py: the merged directory gives the logits of base + adapter, here, in transformers and in PEFT."""

import json
import os
import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from torch import Tensor

from lit_llama.checkpoint import load_model
from lit_llama.errors import InputError
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lit_llama.tokenizer import Tokenizer

SCRIPT = "scripts/merge_lora.py"
merge = runpy.run_path(str(ROOT / SCRIPT))["main"]
INPUT_IDS = torch.tensor([[1, 5, 300, 17, 42, 2, 9, 250]])


@pytest.fixture
def adapter(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """An adapter that changes the logits a lot, with a rank of its own for one target."""
    model = load_model(tiny_checkpoint, torch.float32)
    torch.manual_seed(7)
    inject_lora(model, LoRAConfig(r=4, alpha=16, rank_pattern={"down_proj": 2}))
    for _, layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, tmp_path / "adapter", base_model=str(tiny_checkpoint))
    return tmp_path / "adapter"


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(INPUT_IDS)
    return output if isinstance(output, Tensor) else output.logits


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def test_same_logits_everywhere(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    merged_dir = tmp_path / "merged"
    process = run_script(SCRIPT, "--checkpoint_dir", tiny_checkpoint, "--adapter_dir", adapter, "--out_dir", merged_dir)
    assert process.stdout.strip() == str(merged_dir)

    base = load_model(tiny_checkpoint, torch.float32)
    base_logits = logits(base)
    load_adapter(base, adapter)
    adapted = logits(base)
    assert relative(base_logits, adapted) > 0.1
    assert relative(logits(load_model(merged_dir, torch.float32)), adapted) <= 1e-5
    opened = AutoModelForCausalLM.from_pretrained(merged_dir, dtype=torch.float32).eval()
    assert relative(logits(opened), adapted) <= 1e-5
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32), adapter
    )
    assert relative(logits(peft.eval()), adapted) <= 1e-5
    assert Tokenizer.from_checkpoint(merged_dir).sha256 == Tokenizer.from_checkpoint(tiny_checkpoint).sha256
    assert json.loads((merged_dir / "config.json").read_text())["dtype"] == "float32"


def test_rounds_once(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    merge(checkpoint_dir=tiny_checkpoint, adapter_dir=adapter, out_dir=tmp_path / "merged")
    exact = load_file(tmp_path / "merged" / "model.safetensors")
    merge(checkpoint_dir=tiny_checkpoint, adapter_dir=adapter, out_dir=tmp_path / "half", dtype="bfloat16")
    for name, tensor in load_file(tmp_path / "half" / "model.safetensors").items():
        assert torch.equal(tensor, exact[name].bfloat16()), name


def test_adapter_of_a_quantized_base_goes_into_the_dense_weights(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, torch.float32, quantize="int8")
    inject_lora(model, LoRAConfig(r=2, targets=["q_proj"]))
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B)
    save_adapter(model, tmp_path / "adapter")
    merge(checkpoint_dir=tiny_checkpoint, adapter_dir=tmp_path / "adapter", out_dir=tmp_path / "merged")
    update = model.model.layers[0].self_attn.q_proj.delta_weight()
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = load_file(tiny_checkpoint / "model.safetensors")
    expected[name] = expected[name] + update
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_refusals_write_nothing(tiny_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = {"checkpoint_dir": tiny_checkpoint, "adapter_dir": adapter, "out_dir": tmp_path / "merged"}
    with pytest.raises(InputError, match="adapter_config.json: no such file"):
        merge(**arguments | {"adapter_dir": tmp_path})
    other = load_model(tiny_checkpoint, torch.float32)
    other.fingerprint = "0" * 64
    inject_lora(other, LoRAConfig())
    save_adapter(other, tmp_path / "other")
    with pytest.raises(InputError, match="trained on another base"):
        merge(**arguments | {"adapter_dir": tmp_path / "other"})
    assert sorted(os.listdir(tmp_path)) == ["adapter", "other"]
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "precious").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        merge(**arguments)
    merge(**arguments, overwrite=True)
    assert not (tmp_path / "merged" / "precious").exists()
