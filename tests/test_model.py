"""The model against transformers' Llama and Mistral on random weights, and its parts against fp64 formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
import transformers

from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.functional import AttentionFunction, CausalMask, RMSNormFunction, SwiGLUFunction
from lit_llama.kv_cache import KVCache
from lit_llama.model import Llama, RMSNorm, rotary_inverse_frequencies

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# What sets each model of the table apart, at a size that fits a test: (fields, sequence length). The context that a
# "llama3" scaling starts from is small here, so that short sequences feel it.
CONFIGS = {
    "llama-1: MHA, eps 1e-6": ({"rms_norm_eps": 1e-6}, 50),
    "llama-2: a whole block of queries": ({"num_hidden_layers": 3}, 128),
    "llama-2-70b: GQA 8 to 1": ({"num_attention_heads": 8, "num_key_value_heads": 1}, 129),
    "llama-3: rope_theta": ({"num_key_value_heads": 2, "rope_theta": 500000.0}, 200),
    "llama-3.1: scaling by 8": (
        {"num_key_value_heads": 2, "rope_theta": 500000.0, "head_dim": 32}
        | {"rope_scaling": LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 64}},
        200,
    ),
    "llama-3.2: scaling by 32, tied": (
        {"num_key_value_heads": 1, "rope_theta": 500000.0, "tie_word_embeddings": True}
        | {"rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 32}},
        150,
    ),
    "codellama: odd vocabulary": ({"vocab_size": 331, "rope_theta": 1000000.0}, 60),
    "linear scaling": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 200),
    "open-llama-3b: head_dim no power of two": (
        {"hidden_size": 60, "num_attention_heads": 3, "rms_norm_eps": 1e-6},
        70,
    ),
    "head_dim wider than hidden / heads": ({"head_dim": 40, "num_key_value_heads": 2}, 90),
    "head_dim narrower than hidden / heads": ({"head_dim": 8}, 1),
    "smollm2: 9 heads over 3, tied": (
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
        | {"rope_theta": 100000.0},
        300,
    ),
    "mistral-v0.1: window shorter than the sequence": (
        {"model_type": "mistral", "sliding_window": 16, "num_key_value_heads": 2},
        200,
    ),
    "mistral-v0.1: window across blocks of queries": (
        {"model_type": "mistral", "sliding_window": 140, "num_key_value_heads": 2},
        300,
    ),
    "mistral-v0.1: window longer than the sequence": ({"model_type": "mistral", "sliding_window": 64}, 64),
    "mistral-v0.3: no window": ({"model_type": "mistral", "num_key_value_heads": 2, "rope_theta": 1000000.0}, 140),
}


def tiny(**fields: object) -> LlamaConfig:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 112}
    return LlamaConfig(**({**sizes, "vocab_size": 320, "max_position_embeddings": 512} | fields))


def theirs_and_ours(config: LlamaConfig) -> tuple[torch.nn.Module, Llama]:
    """transformers' model and ours with the same random weights, large enough for attention not to be uniform."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config.to_huggingface()), attn_implementation="eager"
    )
    expected = transformers.MistralForCausalLM if config.model_type == "mistral" else transformers.LlamaForCausalLM
    assert type(theirs) is expected
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else torch.nn.init.uniform_(parameter, 0.5, 2)
    ours = Llama(config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def model_of(config: LlamaConfig) -> Llama:
    torch.manual_seed(0)
    model = Llama(config)
    model.initialize_(std=0.15)
    return model.requires_grad_(False)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    fields, length = CONFIGS[name]
    config = tiny(**fields)
    theirs, ours = theirs_and_ours(config)
    input_ids = torch.randint(config.vocab_size, (2, length))
    labels = torch.randint(config.vocab_size, (2 * length,))
    expected, actual = theirs(input_ids).logits, ours(input_ids)
    assert actual.shape == (2, length, config.vocab_size)
    assert relative_error(actual, expected) <= 1e-5

    F.cross_entropy(expected.flatten(0, 1), labels).backward()
    F.cross_entropy(actual.flatten(0, 1), labels).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(gradients) == {name for name, _ in ours.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        if length == 1 and parameter_name.endswith(("q_proj.weight", "k_proj.weight")):
            assert not parameter.grad.any()  # one key: its weight is 1 whatever the query
        else:
            assert relative_error(parameter.grad, gradients[parameter_name]) <= 3e-5, parameter_name


@pytest.mark.parametrize("name", ["llama-3.1: scaling by 8", "smollm2: 9 heads over 3, tied", "linear scaling"])
def test_bf16_errs_no_more_than_transformers(name: str) -> None:
    fields, length = CONFIGS[name]
    config = tiny(**fields, num_hidden_layers=4)
    theirs, ours = (model.to(torch.bfloat16) for model in theirs_and_ours(config))
    input_ids = torch.randint(config.vocab_size, (4, length))
    with torch.no_grad():
        expected, actual = theirs(input_ids).logits, ours(input_ids)
        exact = ours.float()(input_ids)
    assert actual.dtype == torch.bfloat16
    assert (actual - exact).square().mean() <= 1.5**2 * (expected - exact).square().mean()
    assert relative_error(actual, exact) <= 1.5 * relative_error(expected, exact)


CACHED = ["llama-2-70b: GQA 8 to 1", "llama-3.1: scaling by 8", "mistral-v0.1: window shorter than the sequence"]


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(
    "chunks", [[60], [1] * 60, [23, 1, 1, 17, 18], [59, 1]], ids=lambda chunks: f"{len(chunks)} chunks"
)
@torch.no_grad()
def test_cache_gives_the_logits_of_the_whole_sequence(name: str, chunks: list[int]) -> None:
    config = tiny(**CONFIGS[name][0])
    model = model_of(config)
    input_ids = torch.randint(config.vocab_size, (2, 60))
    cache = KVCache(config, batch_size=2, max_length=60, dtype=torch.float32)
    logits = torch.cat([model(chunk, cache=cache) for chunk in input_ids.split(chunks, dim=1)], dim=1)
    assert cache.length == 60
    assert relative_error(logits, model(input_ids)) <= 1e-5


@pytest.mark.parametrize("name", CACHED)
@torch.no_grad()
def test_left_padded_rows_equal_single_rows(name: str) -> None:
    config = tiny(**CONFIGS[name][0])
    model = model_of(config)
    prompts = [torch.randint(config.vocab_size, (length,)) for length in (40, 3, 25, 1)]
    new = torch.randint(config.vocab_size, (4, 5))
    padding = torch.tensor([40 - len(prompt) for prompt in prompts])
    padded = torch.stack([F.pad(prompt, (40 - len(prompt), 0)) for prompt in prompts])
    cache = KVCache(config, batch_size=4, max_length=45, dtype=torch.float32, padding=padding)
    logits = [model(padded, cache=cache)]
    logits += [model(new[:, i : i + 1], cache=cache) for i in range(5)]
    logits = torch.cat(logits, dim=1)
    assert torch.isfinite(logits).all()
    for row, prompt in enumerate(prompts):
        alone = model(torch.cat([prompt, new[row]])[None])[0]
        assert relative_error(logits[row, padding[row] :], alone) <= 1e-5


def test_cache_refuses_what_does_not_fit() -> None:
    config = tiny()
    model = model_of(config)
    with pytest.raises(InputError, match="513 tokens is longer than the model's context of 512"):
        KVCache(config, 1, 513, torch.float32)
    cache = KVCache(config, 1, 8, torch.float32)
    model(torch.zeros(1, 6, dtype=torch.int64), cache=cache)
    with pytest.raises(InputError, match="the cache holds 8 tokens; 9 are needed"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache=cache)
    with pytest.raises(InputError, match="document_ids"):
        model(torch.zeros(1, 1, dtype=torch.int64), document_ids=torch.zeros(1, 1, dtype=torch.int64), cache=cache)


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """position_ids and document_ids (1, sum(lengths)) of documents that follow each other."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    documents = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    return positions[None], documents[None]


@pytest.mark.parametrize("window", [None, 24])
def test_packed_documents_do_not_see_each_other(window: int | None) -> None:
    model = model_of(tiny(num_key_value_heads=2, model_type="mistral", sliding_window=window))
    lengths = [130, 1, 40, 120]
    documents = [torch.randint(320, (length,)) for length in lengths]
    position_ids, document_ids = packed(lengths)
    logits = model(torch.cat(documents)[None], position_ids, document_ids)[0].split(lengths)
    for document, its_logits in zip(documents, logits, strict=True):
        assert relative_error(its_logits, model(document[None])[0]) <= 1e-5

    documents[0], documents[2] = (319 - document for document in (documents[0], documents[2]))
    changed = model(torch.cat(documents)[None], position_ids, document_ids)[0].split(lengths)
    assert not torch.equal(changed[0], logits[0])
    assert not torch.equal(changed[2], logits[2])
    assert torch.equal(changed[1], logits[1])
    assert torch.equal(changed[3], logits[3])


def test_packed_loss_and_gradients_equal_unpacked() -> None:
    model = model_of(tiny(num_key_value_heads=2)).requires_grad_(True)
    lengths = [70, 2, 100, 33]
    documents = [torch.randint(320, (length,)) for length in lengths]

    losses = [F.cross_entropy(model(d[None])[0, :-1], d[1:], reduction="sum") for d in documents]
    sum(losses).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    # Two rows of a batch, each with another layout of the same documents, plus padding.
    rows, labels, positions, ids = [], [], [], []
    for order in ([0, 1, 2, 3], [2, 3, 1, 0]):
        chosen = [documents[i] for i in order]
        position_ids, document_ids = packed([len(document) for document in chosen])
        rows.append(F.pad(torch.cat(chosen), (0, 10)))
        labels.append(F.pad(torch.cat([F.pad(d[1:], (0, 1), value=-100) for d in chosen]), (0, 10), value=-100))
        positions.append(F.pad(position_ids[0], (0, 10)))
        ids.append(F.pad(document_ids[0], (0, 10), value=-1))
    logits = model(torch.stack(rows), torch.stack(positions), torch.stack(ids))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.stack(labels).flatten(), reduction="sum")
    assert loss.item() == pytest.approx(2 * sum(losses).item(), rel=1e-6)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, 2 * expected[name]) <= 1e-5, name


@pytest.mark.parametrize(("length", "window", "with_documents"), [(7, None, True), (300, 9, True), (300, 150, False)])
def test_mask_against_its_definition(length: int, window: int | None, with_documents: bool) -> None:
    torch.manual_seed(1)
    starts = torch.rand(2, length) < 0.02
    document_ids = starts.long().cumsum(1) if with_documents else None
    mask = CausalMask(length, document_ids, window, torch.device("cpu"))
    for row in range(2):
        visible = torch.tensor(
            [
                [
                    j <= i
                    and (window is None or j > i - window)
                    and (document_ids is None or bool(document_ids[row, j] == document_ids[row, i]))
                    for j in range(length)
                ]
                for i in range(length)
            ]
        )
        assert torch.equal(mask.dense[row if with_documents else 0, 0], visible)
        covered = torch.zeros(length, length, dtype=torch.bool)
        for first_key, start, end in mask.query_blocks:
            covered[start:end, first_key:end] = True
        assert not (visible & ~covered).any()


@pytest.mark.parametrize(("window", "with_documents"), [(None, True), (150, True), (150, False)])
def test_mask_of_flex_attention(window: int | None, with_documents: bool) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    torch.manual_seed(1)
    length = 900
    document_ids = (torch.rand(2, length) < 0.02).long().cumsum(1) if with_documents else None
    mask = CausalMask(length, document_ids, window, torch.device("cpu"))
    query, key, value = torch.randn(2, 4, length, 16), torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.dense, enable_gqa=True)
    mixed = flex_attention(query, key, value, block_mask=mask.sparse, enable_gqa=True)
    torch.testing.assert_close(mixed, expected)
    assert mask.sparse.sparsity() > 40  # per cent of blocks never computed


def test_rms_norm_against_fp64() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 64, dtype=torch.float64) * 10.0 ** torch.arange(-3, 2)[:, None]
    norm = RMSNorm(64, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    weight = norm.weight.double()
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert (x.mean(-1).abs() > 0).all()
    assert relative_error(norm(x.float()), expected) <= 1e-6
    # In bf16 only the rounding of the normalised value and of the product are lost: 2 x 2^-8 of each element.
    norm.bfloat16()
    x16 = x.bfloat16().double()
    expected = x16 / (x16.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert ((norm(x.bfloat16()) - expected).abs() <= 2.01 * 2**-8 * expected.abs()).all()


@pytest.mark.parametrize(("factor", "theta", "head_dim"), [(8.0, 500000.0, 128), (32.0, 500000.0, 64)])
def test_llama3_rotary_frequencies_against_the_formula(factor: float, theta: float, head_dim: int) -> None:
    scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
    config = tiny(rope_theta=theta, head_dim=head_dim, rope_scaling=scaling, max_position_embeddings=131072)
    expected = []
    for i in range(head_dim // 2):
        frequency = theta ** (-2 * i / head_dim)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192 / 1:
            expected.append(frequency / factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    expected = torch.tensor(expected, dtype=torch.float64)
    assert any(plain != scaled for plain, scaled in zip(expected, expected / factor, strict=True))
    torch.testing.assert_close(rotary_inverse_frequencies(config).double(), expected, rtol=1e-6, atol=0)

    cos, sin = Llama(config).model.rotary_tables(torch.tensor([[0, 1, 77, 8191]]), torch.float32)
    angles = torch.tensor([0.0, 1, 77, 8191], dtype=torch.float64)[:, None] * expected
    assert cos.shape == sin.shape == (1, 1, 4, head_dim)
    # fp32 angles of position 8191 are off by up to 8191 * 1.2e-7 radians.
    torch.testing.assert_close(cos[0, 0].double(), torch.cat((angles.cos(), angles.cos()), -1), rtol=0, atol=2e-3)
    torch.testing.assert_close(cos[0, 0, :3].double(), torch.cat((angles.cos(),) * 2, -1)[:3], rtol=0, atol=2e-5)
    torch.testing.assert_close(
        sin[0, 0, :3].double(), torch.cat((-angles.sin(), angles.sin()), -1)[:3], rtol=0, atol=2e-5
    )


def test_rotary_tables_stay_fp32_in_a_bf16_model() -> None:
    model = model_of(tiny(rope_theta=500000.0))
    expected, _ = model.model.rotary_tables(torch.tensor([[8000]]), torch.float32)
    actual, _ = model.bfloat16().model.rotary_tables(torch.tensor([[8000]]), torch.float32)
    assert torch.equal(actual, expected)


def fp64(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_of_rms_norm_and_swiglu_by_finite_differences() -> None:
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(lambda x, w: RMSNormFunction.apply(x, w, 1e-5), (fp64(2, 3, 8), fp64(8)))
    frozen = torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: RMSNormFunction.apply(x, frozen, 1e-2), (fp64(4, 8),))
    assert torch.autograd.gradcheck(SwiGLUFunction.apply, (fp64(2, 3, 8), fp64(2, 3, 8)))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("with_documents", [False, True])
def test_gradients_of_attention_by_finite_differences(
    window: int | None, with_documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_llama.functional.QUERY_BLOCK", 3)  # three blocks in a sequence short enough for this
    torch.manual_seed(0)
    document_ids = torch.tensor([[0] * 5 + [1] * 3, [0] * 2 + [1] * 2 + [2] * 4]) if with_documents else None
    mask = CausalMask(8, document_ids, window, torch.device("cpu"))
    assert len(mask.query_blocks) == 3
    inputs = fp64(2, 2, 8, 2), fp64(2, 1, 8, 2), fp64(2, 1, 8, 2)
    assert torch.autograd.gradcheck(lambda q, k, v: AttentionFunction.apply(q, k, v, mask), inputs)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=mask.dense, enable_gqa=True)
    torch.testing.assert_close(AttentionFunction.apply(*inputs, mask), expected)


def test_tied_embeddings_are_one_parameter() -> None:
    model = Llama(tiny(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == model.config.num_parameters
    model.to(torch.bfloat16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
