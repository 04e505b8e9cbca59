"""Reading GGUF: dequantization bit for bit, metadata, tokenizers; against gguf, sentencepiece and tokenizers."""

import io
import json
import math
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import TEXT

from lit_llama.errors import InputError
from lit_llama.gguf import (
    BLOCK_TYPES,
    OTHER_TYPES,
    half_split_rows,
    model_config,
    read_gguf,
    tensor_sources,
    write_tokenizer,
)
from lit_llama.tokenizer import Tokenizer

TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  Two spaces,\ttabs\n\n\nand lines \r\n ",
    "Zażółć gęślą jaźń — 日本語 🙂👩‍👩‍👧 नमस्ते",
    "1969, 12345.678 and 2^10=1024; don't, WE'LL, ½ Ⅷ ٣٤",
    "</s><|endoftext|><s>",
    "",
)


@pytest.mark.parametrize("type_id", BLOCK_TYPES)
def test_dequantizes_bit_for_bit(type_id: int) -> None:
    kind = BLOCK_TYPES[type_id]
    assert gguf.GGMLQuantizationType(type_id).name == kind.name
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id)] == (kind.block_size, kind.layout.itemsize)
    generator = np.random.default_rng(type_id)
    blocks = generator.integers(0, 256, (999, kind.layout.itemsize), dtype=np.uint8).view(kind.layout).reshape(-1)
    if kind.layout.names is None:
        values = generator.standard_normal(999).astype(np.float32)
        blocks = (values.view(np.uint32) >> 16).astype("<u2") if kind.name == "BF16" else values.astype(kind.layout)
    for name in {"d", "m", "dmin"} & set(kind.layout.names or ()):  # finite scales, subnormal ones among them
        blocks[name] = generator.standard_normal(999) * 10.0 ** generator.integers(-7, 2, 999)
    data = blocks.view(np.uint8).reshape(1, -1)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType(type_id)).reshape(-1)
    ours = kind.decode(blocks).reshape(-1)
    assert ours.dtype == np.float32
    assert np.isfinite(ours).all() and ours.any()
    assert np.array_equal(ours.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("type_id", OTHER_TYPES)
def test_names_of_types_that_are_refused(type_id: int) -> None:
    assert gguf.GGMLQuantizationType(type_id).name == OTHER_TYPES[type_id]


def test_half_split_rows_makes_the_two_rotations_agree() -> None:
    """Rotating interleaved pairs and rotating half-split pairs of the reordered rows give the same scores."""
    torch.manual_seed(0)
    heads, head_dim, hidden = 3, 8, 5
    weight = torch.randn(heads * head_dim, hidden, dtype=torch.float64)
    x = torch.randn(hidden, dtype=torch.float64)
    angles = torch.rand(head_dim // 2, dtype=torch.float64)
    interleaved = torch.view_as_complex((weight @ x).view(heads, head_dim // 2, 2)) * torch.polar(
        torch.ones_like(angles), angles
    )
    first, second = (half_split_rows(weight, head_dim) @ x).view(heads, 2, head_dim // 2).unbind(1)
    assert torch.allclose(first * angles.cos() - second * angles.sin(), interleaved.real)
    assert torch.allclose(first * angles.sin() + second * angles.cos(), interleaved.imag)


def writer(path: Path, architecture: str = "llama", **metadata: object) -> gguf.GGUFWriter:
    """A GGUF of one layer without tensors, to be completed."""
    file = gguf.GGUFWriter(path, architecture)
    stated = {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    } | metadata
    file.add_layer_norm_rms_eps(1e-5)
    for key, value in stated.items():
        key = f"{architecture}.{key}"
        if isinstance(value, list):
            file.add_array(key, value)
        elif isinstance(value, str):
            file.add_string(key, value)
        elif isinstance(value, float):
            file.add_float32(key, value)
        else:
            file.add_uint32(key, value)
    return file


def finish(file: gguf.GGUFWriter) -> Path:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return Path(file.path)


def add_embedding(file: gguf.GGUFWriter, rows: int = 320, kind: str = "F32") -> None:
    values = np.random.default_rng(0).standard_normal((rows, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kind]
    file.add_tensor("token_embd.weight", gguf.quantize(values, kind), raw_dtype=kind)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    file = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    values = {
        "add_uint8": 200, "add_int8": -100, "add_uint16": 60000, "add_int16": -30000, "add_uint32": 4_000_000_000,
        "add_int32": -2_000_000_000, "add_float32": 0.5, "add_uint64": 2**63, "add_int64": -(2**62), "add_float64": 0.1,
        "add_bool": True, "add_string": "Zażółć 🙂",
    }  # fmt: skip
    for method, value in values.items():
        getattr(file, method)(f"test.{method}", value)
    file.add_array("test.integers", [1, 2, 3])
    file.add_array("test.strings", ["a", "", "ż"])
    add_embedding(file, kind="Q8_0")
    file.add_tensor("vector", np.arange(7, dtype=np.float32))
    contents = read_gguf(finish(file))
    for method, value in values.items():
        assert contents.metadata[f"test.{method}"] == value
    assert contents.metadata["test.integers"] == [1, 2, 3]
    assert contents.metadata["test.strings"] == ["a", "", "ż"]
    assert contents.tensors["token_embd.weight"].shape == (320, 64)
    assert np.array_equal(contents.rows("vector", 0, 1), [np.arange(7)])
    reference = gguf.GGUFReader(contents.path).tensors[0]
    expected = gguf.dequantize(reference.data, reference.tensor_type)
    assert np.array_equal(contents.rows("token_embd.weight", 17, 99), expected[17:99])


def test_configuration(tmp_path: Path) -> None:
    metadata = {
        "rope.freq_base": 500000.0,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 32,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 4.0,
    }
    file = writer(tmp_path / "model.gguf", **metadata)
    file.add_token_list(["<unk>", "<s>", "</s>"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_pad_token_id(2**32 - 1)  # as some writers say that there is none
    add_embedding(file)
    config = model_config(read_gguf(finish(file)))
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.vocab_size) == (
        64,
        1,
        96,
        320,
    )
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 32)
    assert (config.max_position_embeddings, config.rope_theta, config.rms_norm_eps) == (512, 500000.0, 1e-5)
    assert config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    assert config.tie_word_embeddings and config.model_type == "llama" and config.sliding_window is None
    assert config.token_ids == {"bos_token_id": 1, "eos_token_id": 2}


def test_sliding_window_makes_it_a_mistral(tmp_path: Path) -> None:
    file = writer(tmp_path / "model.gguf", **{"attention.sliding_window": 128})
    add_embedding(file)
    config = model_config(read_gguf(finish(file)))
    assert (config.model_type, config.sliding_window) == ("mistral", 128)


def llama3_divisors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """What Llama 3.1 divides the frequencies by, from transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=scaling)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    return (theta ** -(torch.arange(0, head_dim, 2) / head_dim) / scaled).numpy()


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_tensor(tmp_path: Path, factor: float) -> None:
    file = writer(tmp_path / "model.gguf", **{"rope.freq_base": 500000.0, "attention.key_length": 64})
    add_embedding(file)
    divisors = llama3_divisors(64, 500000.0, factor)
    assert math.isclose(divisors[-1], factor, rel_tol=1e-6) and math.isclose(divisors[0], 1, rel_tol=1e-6)
    file.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    assert model_config(read_gguf(finish(file))).rope_scaling == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_frequency_tensors_are_refused(tmp_path: Path) -> None:
    file = writer(tmp_path / "model.gguf")
    add_embedding(file)
    file.add_tensor("rope_freqs.weight", np.linspace(1, 8, 8, dtype=np.float32))
    with pytest.raises(InputError, match="rope_freqs.weight is not the scaling"):
        model_config(read_gguf(finish(file)))


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("qwen2", {}, "general.architecture is 'qwen2'"),
        ("llama", {"expert_count": 8}, "mixture of 8 experts"),
        ("llama", {"rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn'"),
        ("llama", {"rope.dimension_count": 8}, "llama.rope.dimension_count = 8 differs from the head size 16"),
        ("llama", {"attention.head_count": [4, 8]}, "llama.attention.head_count = "),
        ("llama", {"attention.head_count_kv": 3}, "not a multiple of num_key_value_heads 3"),
    ],
)
def test_what_a_llama_does_not_compute_is_refused(
    tmp_path: Path, architecture: str, metadata: dict[str, object], message: str
) -> None:
    file = writer(tmp_path / "model.gguf", architecture, **metadata)
    add_embedding(file)
    with pytest.raises(InputError, match=message) as caught:
        model_config(read_gguf(finish(file)))
    assert "model.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_biases_are_refused(tmp_path: Path) -> None:
    file = writer(tmp_path / "model.gguf")
    add_embedding(file)
    file.add_tensor("blk.0.attn_q.bias", np.zeros(64, dtype=np.float32))
    contents = read_gguf(finish(file))
    with pytest.raises(InputError, match="blk.0.attn_q.bias has no place"):
        tensor_sources(contents, model_config(contents), torch.float32)


def test_unsupported_quantization_is_refused_by_name(tmp_path: Path) -> None:
    file = writer(tmp_path / "model.gguf")
    file.add_tensor("token_embd.weight", np.zeros((320, 36), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)
    with pytest.raises(InputError, match="token_embd.weight is stored as IQ4_NL, which is not supported"):
        read_gguf(finish(file))


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.5, 0.999])
def test_truncation_is_named(tmp_path: Path, fraction: float) -> None:
    file = writer(tmp_path / "model.gguf")
    add_embedding(file)
    path = finish(file)
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(InputError, match="model.gguf: truncated"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(100), "not a GGUF file"),
        (b"", "not a GGUF file"),
        (b"GGUF\x01\0\0\0" + bytes(100), "GGUF version 1"),
        (b"GGUF\0\0\0\x03" + bytes(100), r"GGUF version 50331648 \(or big-endian\)"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_gguf(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """A SentencePiece BPE of 400 pieces with Llama's settings and one user-defined piece."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=["<|user|>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_tokenizer(tmp_path: Path, sentencepiece_model: bytes, add_space: bool) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    original = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    # Protocol buffers merge a field that comes again: normalizer_spec.add_dummy_prefix = false.
    reference = sentencepiece.SentencePieceProcessor(
        model_proto=sentencepiece_model + (b"" if add_space else b"\x1a\x02\x18\x00")
    )
    ids = range(original.vocab_size())
    kinds = [
        2 if original.is_unknown(i) else 3 if original.is_control(i) else 6 if original.is_byte(i) else 1 for i in ids
    ]
    kinds[original.piece_to_id("<|user|>")] = 4
    file = writer(tmp_path / "model.gguf")
    file.add_tokenizer_model("llama")
    file.add_token_list([original.id_to_piece(i) for i in ids])
    file.add_token_scores([original.get_score(i) for i in ids])
    file.add_token_types(kinds)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_add_space_prefix(add_space)
    add_embedding(file)
    contents = read_gguf(finish(file))
    write_tokenizer(contents, tmp_path)

    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert (ours.unk_id(), ours.bos_id(), ours.eos_id(), ours.pad_id()) == (0, 1, 2, -1)
    for text in (*TEXTS, "<|user|>Hello"):
        assert ours.encode(text) == reference.encode(text)
        assert ours.decode(ours.encode(text)) == reference.decode(reference.encode(text))
    assert [ours.is_control(i) for i in ids] == [original.is_control(i) for i in ids]
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode(TEXTS[2]) == reference.encode(TEXTS[2])
    if add_space:
        assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS[0]).input_ids == [1, *reference.encode(TEXTS[0])]


def byte_level_tokenizer(words: str) -> "object":
    """A trained byte-level BPE with the word boundaries of a published family, made by the tokenizers library."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as TokenizersTokenizer

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words != "llama-bpe")
    before = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
        "llama-bpe": [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                behavior="isolated",
            )
        ],
    }[words]
    tokenizer = TokenizersTokenizer(models.BPE(ignore_merges=words == "llama-bpe"))
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(text, special=True, normalized=False) for text in ("<|endoftext|>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=specials, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    # Merges are learned across all word boundaries, so that the boundaries alone decide about every one of them.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.train_from_iterator([TEXT, *TEXTS] * 2, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level])
    # A word that no merges lead to: Llama 3 takes it whole all the same.
    definition = json.loads(tokenizer.to_str())
    definition["model"]["vocab"]["\u0120fox"] = len(definition["model"]["vocab"])
    definition["model"]["merges"] = [merge for merge in definition["model"]["merges"] if "".join(merge) != "\u0120fox"]
    return TokenizersTokenizer.from_str(json.dumps(definition))


def write_byte_level_gguf(path: Path, words: str, reference: "object", **metadata: object) -> Path:
    model = json.loads(reference.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    file = writer(path)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(words)
    file.add_token_list(tokens)
    file.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    file.add_token_merges([" ".join(merge) for merge in model["merges"]])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_eot_token_id(0)
    file.add_chat_template("{{ messages[0]['content'] }}")
    for key, value in metadata.items():
        file.add_bool(f"tokenizer.ggml.{key}", value)
    add_embedding(file, rows=len(tokens))
    return finish(file)


@pytest.mark.parametrize("words", ["smollm", "gpt-2", "llama-bpe"])
def test_byte_level_tokenizer(tmp_path: Path, words: str) -> None:
    from transformers import AutoTokenizer

    reference = byte_level_tokenizer(words)
    contents = read_gguf(write_byte_level_gguf(tmp_path / "model.gguf", words, reference))
    write_tokenizer(contents, tmp_path)
    tokenizer = Tokenizer.from_checkpoint(tmp_path)
    hugging_face = AutoTokenizer.from_pretrained(tmp_path)
    bos = [1] if words == "llama-bpe" else []  # what llama.cpp takes for granted when the file does not say
    for text in TEXTS:
        expected = reference.encode(text).ids
        assert hugging_face(text).input_ids == [*bos, *expected]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        if not text.startswith("</s>"):  # text stays text in ours
            assert tokenizer.encode(text) == expected
    assert tokenizer.adds_bos == bool(bos)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert {0, 2} <= tokenizer.stop_ids
    assert tokenizer.decode([1, *tokenizer.encode("text"), 2]) == "text"
    assert hugging_face.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_add_bos_token_is_respected(tmp_path: Path) -> None:
    reference = byte_level_tokenizer("gpt-2")
    path = write_byte_level_gguf(tmp_path / "model.gguf", "gpt-2", reference, add_bos_token=True)
    write_tokenizer(read_gguf(path), tmp_path)
    assert Tokenizer.from_checkpoint(tmp_path).adds_bos


def test_unknown_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    path = write_byte_level_gguf(tmp_path / "model.gguf", "tekken", byte_level_tokenizer("gpt-2"))
    with pytest.raises(InputError, match="tokenizer.ggml.pre = 'tekken' is not supported.*--tokenizer_from"):
        write_tokenizer(read_gguf(path), tmp_path)
    file = writer(tmp_path / "bert.gguf")
    file.add_tokenizer_model("bert")
    add_embedding(file)
    with pytest.raises(InputError, match="tokenizer.ggml.model = 'bert' is not supported"):
        write_tokenizer(read_gguf(finish(file)), tmp_path)
