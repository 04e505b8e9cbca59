"""scripts/convert_checkpoint.py: a tiny model of transformers, written as GGUF, Meta and .bin, keeps its logits."""

import base64
import io
import json
import os
import runpy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, run_script, write_tiny_tokenizer
from torch import Tensor

from lit_llama.checkpoint import load_model
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.tokenizer import Tokenizer

SCRIPT = "scripts/convert_checkpoint.py"
convert = runpy.run_path(str(ROOT / SCRIPT))["main"]
INPUT_IDS = torch.tensor([[1, 5, 300, 17, 42, 2, 9, 250]])
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def reference_model(tied: bool = True, **fields: object) -> "object":
    """A random Llama of transformers with grouped-query attention."""
    import transformers

    torch.manual_seed(3)
    stated = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
    } | fields
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**stated)).float().eval()


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(INPUT_IDS)
    return output if isinstance(output, Tensor) else output.logits


def assert_same_logits(out_dir: Path, reference: torch.nn.Module) -> None:
    """The directory gives the reference's logits, in this project and in transformers."""
    from transformers import AutoModelForCausalLM

    expected = logits(reference)
    assert (logits(load_model(out_dir, torch.float32)) - expected).abs().max() <= 1e-5 * expected.abs().max()
    opened = AutoModelForCausalLM.from_pretrained(out_dir, dtype=torch.float32).eval()
    assert (logits(opened) - expected).abs().max() <= 1e-6 * expected.abs().max()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection from half-split to interleaved rotary pairs."""
    head_dim = weight.shape[0] // heads
    rows = [head * head_dim + half * (head_dim // 2) + pair
            for head in range(heads) for pair in range(head_dim // 2) for half in range(2)]  # fmt: skip
    return weight[rows]


# --- GGUF ------------------------------------------------------------------------------------------------------------

GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(chr(0x4E00 + n) for n in range(61))]


def write_gguf(path: Path, model: "object", kinds: dict[str, str] | None = None, scaling: dict | None = None) -> None:
    """Write a model of transformers as llama.cpp's converter does; `kinds` maps parts of names to types, F32 else."""
    config = model.config
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_block_count(config.num_hidden_layers)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_key_length(config.head_dim)
    file.add_value_length(config.head_dim)
    file.add_rope_dimension_count(config.head_dim)
    file.add_rope_freq_base(config.rope_parameters["rope_theta"])
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_vocab_size(config.vocab_size)
    file.add_tokenizer_model("llama")
    file.add_token_list(TOKENS)
    file.add_token_scores([0.0] * len(TOKENS))
    file.add_token_types([2, 3, 3, *[6] * 256, *[1] * 61])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    if config.rope_parameters["rope_type"] == "llama3":
        head_dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
        plain = theta ** -(torch.arange(0, head_dim, 2) / head_dim)
        file.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    generator = np.random.default_rng(5)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name:
            weight = interleave(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = interleave(weight, config.num_key_value_heads)
        new_name = name.replace("model.layers", "blk")
        for theirs, ggufs in GGUF_NAMES.items():
            new_name = new_name.replace(theirs, ggufs)
        kind = next((kind for part, kind in (kinds or {}).items() if part in name), "F32")
        type_id = gguf.GGMLQuantizationType[kind]
        if kind.endswith("_K"):  # the gguf package cannot quantize to these: any bytes do
            block, size = gguf.GGML_QUANT_SIZES[type_id]
            data = generator.integers(0, 256, (weight.shape[0], weight.shape[1] // block, size), dtype=np.uint8)
            for start in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:  # the scales, to be small numbers
                data[..., start : start + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
            data = data.reshape(weight.shape[0], -1)
        else:
            data = gguf.quantize(weight.numpy(), type_id)
        file.add_tensor(new_name, data, raw_dtype=type_id)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


LLAMA3_ROPE = {"max_position_embeddings": 131072, "rope_parameters": LLAMA3_SCALING | {"rope_theta": 500000.0}}


@pytest.mark.parametrize("fields", [{"tied": True}, {"tied": False, "head_dim": 16} | LLAMA3_ROPE])
def test_gguf(tmp_path: Path, fields: dict[str, object]) -> None:
    reference = reference_model(**fields)
    write_gguf(tmp_path / "model.gguf", reference)
    out_dir = tmp_path / "out"
    convert(source=tmp_path / "model.gguf", out_dir=out_dir, dtype="float32")
    assert_same_logits(out_dir, reference)
    assert LlamaConfig.from_json(out_dir).tie_word_embeddings == fields["tied"]
    assert Tokenizer.from_checkpoint(out_dir).decode([1, 3 + ord("H"), 3 + ord("i"), 2]) == "Hi"
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"
    ]  # fmt: skip


def test_quantized_gguf_against_the_loader_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    kinds = {
        "embed_tokens": "Q8_0", "q_proj": "Q4_0", "k_proj": "Q4_1", "v_proj": "Q6_K", "o_proj": "Q4_K",
        "gate_proj": "Q5_0", "up_proj": "Q5_1", "down_proj": "Q5_K", "lm_head": "F16", "input_layernorm": "BF16",
    }  # fmt: skip
    write_gguf(tmp_path / "model.gguf", reference_model(tied=False, hidden_size=256, intermediate_size=256), kinds)
    convert(source=tmp_path / "model.gguf", out_dir=tmp_path / "out", dtype="float32")
    ours = load_model(tmp_path / "out", torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_refuses_to_overwrite_and_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    source, out_dir = tmp_path / "model.gguf", tmp_path / "out"
    write_gguf(source, reference_model())
    out_dir.mkdir()
    (out_dir / "precious").write_text("")
    with pytest.raises(InputError, match="--overwrite"):
        convert(source=source, out_dir=out_dir)
    assert os.listdir(out_dir) == ["precious"]

    os.truncate(source, source.stat().st_size - 100)
    process = run_script(SCRIPT, "--source", source, "--out_dir", tmp_path / "other", check=False)
    assert process.returncode == 2
    assert process.stderr.startswith("error:") and process.stderr.count("\n") == 1 and "truncated" in process.stderr

    with pytest.raises(InputError, match="neither a .gguf file"):
        convert(source=tmp_path, out_dir=tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "out"]


# --- Meta ------------------------------------------------------------------------------------------------------------


def write_meta(
    directory: Path, model: "object", num_shards: int, embedding_dim: int = 1, **params: object
) -> list[dict[str, Tensor]]:
    """Write a model of transformers as Meta does: renamed, permuted, split over model-parallel ranks."""
    config = model.config
    names = {
        "self_attn.q_proj": ("attention.wq", 0),
        "self_attn.k_proj": ("attention.wk", 0),
        "self_attn.v_proj": ("attention.wv", 0),
        "self_attn.o_proj": ("attention.wo", 1),
        "mlp.gate_proj": ("feed_forward.w1", 0),
        "mlp.down_proj": ("feed_forward.w2", 1),
        "mlp.up_proj": ("feed_forward.w3", 0),
        "input_layernorm": ("attention_norm", None),
        "post_attention_layernorm": ("ffn_norm", None),
        "model.embed_tokens": ("tok_embeddings", embedding_dim),
        "model.norm": ("norm", None),
        "lm_head": ("output", 0),
    }
    shards: list[dict[str, Tensor]] = [{} for _ in range(num_shards)]
    for name, weight in model.state_dict().items():
        if "q_proj" in name:
            weight = interleave(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = interleave(weight, config.num_key_value_heads)
        theirs, (metas, dim) = next(item for item in names.items() if item[0] in name)
        for rank, shard in enumerate(shards):
            part = weight if dim is None else weight.chunk(num_shards, dim)[rank]
            shard[name.replace("model.layers", "layers").replace(theirs, metas)] = part.clone()
    shards[0]["rope.freqs"] = torch.ones(4)
    directory.mkdir()
    for rank, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": -1,
        "multiple_of": 256,
        "norm_eps": config.rms_norm_eps,
    } | params
    (directory / "params.json").write_text(json.dumps(params))
    return shards


def write_sentencepiece(path: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def write_ranks(path: Path) -> None:
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    path.write_bytes(b"".join(lines))


@pytest.mark.parametrize("num_shards", [1, 2])
def test_meta_llama_2(tmp_path: Path, num_shards: int) -> None:
    source, out_dir = tmp_path / "llama-2-7b", tmp_path / "out"
    reference = reference_model(tied=False)
    write_meta(source, reference, num_shards, embedding_dim=1)
    write_sentencepiece(tmp_path / "tokenizer.model")  # beside the folder, as in the download of Llama 1 and 2
    with pytest.raises(InputError, match="pass --max_position_embeddings 2048 or 4096"):
        convert(source=source, out_dir=out_dir)
    assert not out_dir.exists()
    convert(source=source, out_dir=out_dir, dtype="float32", max_position_embeddings=4096)
    assert_same_logits(out_dir, reference)
    config = LlamaConfig.from_json(out_dir)
    assert config.max_position_embeddings == 4096 and config.intermediate_size == 160 and config.vocab_size == 320
    assert Tokenizer.from_checkpoint(out_dir).eos_id == 2
    assert json.loads((out_dir / "generation_config.json").read_text())["bos_token_id"] == 1


@pytest.mark.parametrize(("tied", "num_shards", "factor"), [(True, 1, 32.0), (False, 2, 8.0)])
def test_meta_llama_3(tmp_path: Path, tied: bool, num_shards: int, factor: float) -> None:
    source, out_dir = tmp_path / "meta", tmp_path / "out"
    scaling = LLAMA3_SCALING | {"factor": factor}
    reference = reference_model(tied, vocab_size=512, rope_parameters=scaling | {"rope_theta": 500000.0})
    params = {"rope_theta": 500000.0, "use_scaled_rope": True, "ffn_dim_multiplier": 1.3, "vocab_size": 512}
    write_meta(source, reference, num_shards, embedding_dim=0, **params)
    write_ranks(source / "tokenizer.model")
    convert(source=source, out_dir=out_dir, dtype="float32")
    assert_same_logits(out_dir, reference)
    config = LlamaConfig.from_json(out_dir)
    assert config.rope_scaling == scaling and config.max_position_embeddings == 131072
    assert config.tie_word_embeddings == tied
    assert Tokenizer.from_checkpoint(out_dir).bos_id == 256


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


def spoil_params(source: Path) -> None:
    params = json.loads((source / "params.json").read_text())
    (source / "params.json").write_text(json.dumps(params | {"moe": {"num_experts": 8}}))


def remove_width(source: Path) -> None:
    params = json.loads((source / "params.json").read_text())
    del params["dim"]
    (source / "params.json").write_text(json.dumps(params))


def spoil_shard(source: Path) -> None:
    shard = torch.load(source / "consolidated.01.pth", weights_only=True)
    del shard["layers.1.feed_forward.w2.weight"]
    torch.save(shard, source / "consolidated.01.pth")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_params, "params.json: moe = {'num_experts': 8} is not supported"),
        (remove_width, "params.json: dim is missing"),
        (spoil_shard, "consolidated.01.pth: the tensor layers.1.feed_forward.w2.weight is missing"),
        (lambda source: (source / "consolidated.01.pth").unlink(), "has shape"),
        (lambda source: torch.save(Malicious(), source / "consolidated.00.pth"), "not a readable file of weights"),
        (lambda source: os.truncate(source / "consolidated.00.pth", 5000), "not a readable file of weights"),
        (lambda source: (source / "tokenizer.model").unlink(), "no tokenizer.model in it or beside it"),
    ],
)
def test_bad_meta_folders(tmp_path: Path, spoil: "object", message: str) -> None:
    source, out_dir = tmp_path / "meta", tmp_path / "out"
    write_meta(source, reference_model(tied=False), 2, rope_theta=500000.0)
    write_ranks(source / "tokenizer.model")
    spoil(source)
    with pytest.raises(InputError, match=message) as caught:
        convert(source=source, out_dir=out_dir)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["meta"] and not Path("executed").exists()


# --- .bin ------------------------------------------------------------------------------------------------------------


def test_bin_folder(tmp_path: Path) -> None:
    source, out_dir = tmp_path / "source", tmp_path / "out"
    reference = reference_model(tied=False)
    reference.save_pretrained(source)
    (source / "model.safetensors").unlink()
    write_tiny_tokenizer(source)
    state = reference.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = sorted(state)
    torch.save({name: state[name] for name in names[:9]}, source / "pytorch_model-00001-of-00002.bin")
    torch.save({name: state[name] for name in names[9:]}, source / "pytorch_model-00002-of-00002.bin")
    convert(source=source, out_dir=out_dir, dtype="float32")
    assert_same_logits(out_dir, reference)
    assert (out_dir / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_as_a_command(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", reference_model(), {"proj": "Q8_0"})
    process = run_script(SCRIPT, "--source", tmp_path / "model.gguf", "--out_dir", tmp_path / "out")
    assert process.stdout.strip() == str(tmp_path / "out")
    assert load_model(tmp_path / "out").lm_head.weight.dtype == torch.bfloat16


def test_tokenizer_from_elsewhere(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", reference_model())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_tiny_tokenizer(elsewhere)
    convert(source=tmp_path / "model.gguf", out_dir=tmp_path / "out", tokenizer_from=elsewhere)
    assert Tokenizer.from_checkpoint(tmp_path / "out").sha256 == Tokenizer.from_checkpoint(elsewhere).sha256
    assert load_model(tmp_path / "out").model.norm.weight.dtype == torch.bfloat16
