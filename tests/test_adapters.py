"""A bank of adapters against PEFT's own switching and mixed batches, and against one adapter at a time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_llama.adapters import AdapterBank, BankedLinear, load_directory
from lit_llama.checkpoint import load_model, save_checkpoint
from lit_llama.config import LlamaConfig
from lit_llama.errors import InputError
from lit_llama.generation import (
    SamplingConfig,
    answer_questions,
    generate,
    generate_stream,
    prepare_to_generate,
)
from lit_llama.kv_cache import KVCache
from lit_llama.lora import LoRAConfig, inject_lora, load_adapter, lora_layers, save_adapter
from lit_llama.lora_tree import LoRATreeConfig, inject_lora_tree
from lit_llama.model import Llama
from lit_llama.packed_linear import pack_linear_layers
from lit_llama.prompt_tuning import PrefixConfig, inject_prefix, save_prompt_tuning
from lit_llama.tokenizer import Tokenizer

CONFIGS = {
    "plain": LoRAConfig(r=4, alpha=8),
    "few": LoRAConfig(r=8, alpha=8, targets=["q_proj", "v_proj", "down_proj"]),
    "rslora": LoRAConfig(r=6, alpha=3, rslora=True, targets=["o_proj", "up_proj"]),
    "patterns": LoRAConfig(
        r=3, rank_pattern={"layers.1.self_attn.q_proj": 5}, alpha_pattern={"o_proj": 4}, layers_to_transform=[1]
    ),
    "pissa": LoRAConfig(r=2, alpha=2, init="pissa"),
    "high": LoRAConfig(r=40, alpha=20),
}
"""Different ranks, scalings, targets and layers."""

PEFT_ONLY = "peft"
"""An adapter that PEFT made and wrote."""

NAMES = [*CONFIGS, PEFT_ONLY]
BATCH = ["plain", None, "few", "peft", "patterns", "plain", "rslora", "pissa"]


def write_lora(checkpoint: Path, directory: Path, config: LoRAConfig, seed: int = 0) -> Path:
    model = load_model(checkpoint, torch.float32)
    torch.manual_seed(seed)
    inject_lora(model, config)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    save_adapter(model, directory)
    return directory


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 2 layers that does not only repeat the last token."""
    directory = tmp_path_factory.mktemp("checkpoint") / "lively"
    torch.manual_seed(0)
    model = Llama(LlamaConfig(64, 2, 4, 160, 320, num_key_value_heads=2, max_position_embeddings=512))
    model.initialize_(std=0.12)
    save_checkpoint(model, directory, tokenizer_from=tiny_checkpoint)
    return directory


@pytest.fixture(scope="module")
def library(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        write_lora(checkpoint, folder / name, config, seed)
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=["k_proj", "gate_proj"], init_lora_weights=False)
    torch.manual_seed(9)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config).save_pretrained(folder / "peft")
    return folder


@pytest.fixture
def bank(checkpoint: Path, library: Path) -> AdapterBank:
    return banked(checkpoint, library)


def banked(checkpoint: Path, library: Path, names: list[str] = NAMES, **options: object) -> AdapterBank:
    limit = options.pop("memory_limit", None)
    model = load_model(checkpoint, options.pop("dtype", torch.float32), **options)
    bank = AdapterBank(model, limit)
    for name in names:
        bank.load(name, library / name)
    return bank


def alone(checkpoint: Path, library: Path, name: str | None, **options: object) -> nn.Module:
    """The model with one adapter, put on as ever."""
    model = load_model(checkpoint, options.pop("dtype", torch.float32), **options)
    if name is not None:
        load_adapter(model, library / name)
    return model.eval()


def tokens(rows: int = len(BATCH), length: int = 20) -> Tensor:
    return torch.randint(0, 320, (rows, length), generator=torch.Generator().manual_seed(2))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def prompts() -> list[list[int]]:
    lengths = [3, 17, 9, 1, 12, 5, 30, 8]
    return [tokens(1, length)[0].tolist() for length in lengths]


def test_peft_switches_and_mixes_to_the_same_logits(checkpoint: Path, library: Path, bank: AdapterBank) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, library / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        theirs.load_adapter(library / name, adapter_name=name)
    theirs.eval()
    ids = tokens()
    for name in NAMES:
        theirs.set_adapter(name)
        bank.select(name)
        with torch.no_grad():
            assert relative(logits(bank.model, ids), theirs(ids).logits) <= 1e-5, name
    bank.select(BATCH)
    with torch.no_grad():
        expected = theirs(ids, adapter_names=[name or "__base__" for name in BATCH]).logits
    ours = logits(bank.model, ids)
    for row, name in enumerate(BATCH):
        assert relative(ours[row], expected[row]) <= 1e-5, name
        assert all(relative(ours[row], ours[other]) > 1e-2 for other in range(row) if BATCH[other] != name)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_adapter_gives_the_bits_of_a_fresh_model(
    quantize: str | None, dtype: torch.dtype, checkpoint: Path, library: Path
) -> None:
    bank = banked(checkpoint, library, dtype=dtype, quantize=quantize)
    expected = {
        name: logits(alone(checkpoint, library, name, dtype=dtype, quantize=quantize), tokens())
        for name in [*NAMES, None]
    }
    for name in [*NAMES, None, *reversed(NAMES)]:  # each is come back to after all the others
        bank.select(name)
        assert torch.equal(logits(bank.model, tokens()), expected[name]), name
    bank.select(BATCH)
    mixed = logits(bank.model, tokens())
    for row, name in enumerate(BATCH):
        if name is None:
            assert torch.equal(mixed[row], expected[None][row])
        assert relative(mixed[row], expected[name][row]) <= (1e-5 if dtype == torch.float32 else 5e-2), name
    bank.select("plain")
    assert torch.equal(logits(bank.model, tokens()), expected["plain"])


@pytest.mark.parametrize("batch", [BATCH, ["high", None, "rslora", "plain", "few", "pissa", "peft", "patterns"]])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_mixed_generation_is_that_of_each_row_alone(
    batch: list[str | None], quantize: str | None, checkpoint: Path, library: Path, bank: AdapterBank
) -> None:
    if quantize:
        bank = banked(checkpoint, library, quantize=quantize)
    bank.select(batch)
    together = generate(bank.model, prompts(), 16)
    for name, prompt, row in zip(batch, prompts(), together, strict=True):
        assert generate(alone(checkpoint, library, name, quantize=quantize), prompt, 16) == [row]
        with bank.using(name):
            assert generate(bank.model, prompt, 16) == [row]
    assert len({tuple(row) for row in together}) > 4
    # Rows that stop early are dropped, and those that are left keep their adapters.
    stop_ids = {row[index] for index, row in enumerate(together[:5])}
    stopped = generate(bank.model, prompts(), 16, stop_ids=stop_ids)
    lengths = [next((i for i, token in enumerate(row) if token in stop_ids), 16) for row in together]
    assert stopped == [row[:length] for row, length in zip(together, lengths, strict=True)]
    assert len(set(lengths)) > 3


def test_samples_of_a_prompt_take_its_adapter(bank: AdapterBank) -> None:
    bank.select(["few", None, "rslora"])
    sampled = generate(bank.model, prompts()[:3], 12, SamplingConfig(temperature=1e-6, num_samples=3))
    greedy = generate(bank.model, prompts()[:3], 12)
    assert sampled == [row for row in greedy for _ in range(3)]


def test_generations_under_way_keep_their_adapters(bank: AdapterBank) -> None:
    expected = {}
    for name in ("plain", "few"):
        bank.select(name)
        expected[name] = generate(bank.model, prompts()[0], 10)[0]
    assert expected["plain"] != expected["few"]
    bank.select("plain")
    stream = generate_stream(bank.model, prompts()[0], 10)
    first = next(stream)
    bank.select("few")
    other = generate_stream(bank.model, prompts()[0], 10)
    steps = [(next(other), token) for token in [first, *stream]]
    assert [token for _, (_, token) in steps] == expected["plain"]
    assert [token for (_, token), _ in steps] == expected["few"]

    stream = generate_stream(bank.model, prompts()[0], 10)
    next(stream)
    bank.select(None)
    bank.remove("few")
    with pytest.raises(InputError, match="an adapter of the generation under way was removed"):
        list(stream)


def test_an_adapter_that_is_removed_leaves_the_others_their_own(bank: AdapterBank) -> None:
    bank.select("few")
    (expected,) = generate(bank.model, prompts()[:1], 10)
    prepare_to_generate(bank.model)
    assert bank.model.decoder is not None
    assert generate(bank.model, prompts()[:1], 10) == [expected]
    stream = generate_stream(bank.model, prompts()[0], 10)
    next(stream)
    bank.select("rslora")
    bank.remove("plain")  # the decoder had numbered them with it
    assert [token for _, token in stream] == expected[1:]
    prepare_to_generate(bank.model)
    bank.select("few")
    assert generate(bank.model, prompts()[:1], 10) == [expected]


def test_questions_are_answered_by_the_selected_adapter(checkpoint: Path, library: Path, bank: AdapterBank) -> None:
    tokenizer = Tokenizer.from_checkpoint(checkpoint)
    questions = ["Which river?", "Oslo", "What is the capital of Norway, then?"]
    answers = {}
    for name in ("plain", "peft", None):
        bank.select(name)
        answers[name] = answer_questions(bank.model, tokenizer, questions, "chatml", 8)
        expected = answer_questions(alone(checkpoint, library, name), tokenizer, questions, "chatml", 8)
        assert answers[name] == expected
    assert answers["plain"] != answers["peft"] != answers[None]
    several = ["peft", None, "plain"]
    mixed = answer_questions(bank.model, tokenizer, questions, "chatml", 8, adapters=several)
    assert mixed == [answers[name][number] for number, name in enumerate(several)]


def test_chunks_and_steps_of_a_cache_are_the_whole(bank: AdapterBank) -> None:
    bank.select(BATCH)
    ids = tokens()
    whole = logits(bank.model, ids)
    cache = KVCache(bank.model.config, len(ids), ids.shape[1], torch.float32)
    with torch.no_grad():
        parts = [
            bank.model(ids[:, :7], cache=cache),
            *(bank.model(ids[:, i : i + 1], cache=cache) for i in range(7, 20)),
        ]
    assert relative(torch.cat(parts, dim=1), whole) <= 1e-5


def test_packed_layers_for_generation(checkpoint: Path, library: Path) -> None:
    bank = banked(checkpoint, library, NAMES[:3], dtype=torch.bfloat16)
    bank.select(BATCH[:3])
    ids = tokens(3)
    expected = logits(bank.model, ids)
    pack_linear_layers(bank.model)
    assert relative(logits(bank.model, ids), expected) <= 5e-2
    bank.model.decoder = lambda tokens, cache: pytest.fail("the base's own decoder was asked")
    bank.load("peft", library / "peft")  # on layers that are packed already
    bank.select("peft")
    assert len(generate(bank.model, prompts()[1], 3)[0]) == 3
    fresh = logits(alone(checkpoint, library, "peft", dtype=torch.bfloat16), ids)
    assert relative(logits(bank.model, ids), fresh) <= 5e-2


def test_a_batch_must_have_the_rows_that_were_selected(bank: AdapterBank) -> None:
    bank.select(["plain", None])
    with pytest.raises(InputError, match="2 adapters are selected, one a row, and the batch has 3 rows"):
        generate(bank.model, prompts()[:3], 2)
    bank.select(["few"])  # one for all
    assert len(generate(bank.model, prompts()[:3], 2)) == 3


def test_names_and_selections(library: Path, bank: AdapterBank) -> None:
    assert bank.names == NAMES
    base = logits(bank.model, tokens())
    with pytest.raises(InputError, match="called 'plain' is in the bank already"):
        bank.load("plain", library / "few")
    bank.select("few")
    few = logits(bank.model, tokens())
    for wrong in ("nothing", ["few", "nothing"], []):
        with pytest.raises(InputError, match="no adapter is called 'nothing'; the bank holds plain|an empty list"):
            bank.select(wrong)
    with pytest.raises(InputError, match="'few' is selected"):
        bank.remove("few")
    with bank.using(["rslora", "few"]):
        with pytest.raises(InputError, match="'few' is selected"):
            bank.remove("few")
    assert torch.equal(logits(bank.model, tokens()), few)
    with pytest.raises(ZeroDivisionError), bank.using(None):
        assert torch.equal(logits(bank.model, tokens()), base)
        bank.remove("rslora")
        raise ZeroDivisionError
    assert torch.equal(logits(bank.model, tokens()), few)
    assert bank.names == [name for name in NAMES if name != "rslora"]
    bank.load("rslora", library / "patterns")
    assert bank.names[-1] == "rslora"


def test_low_rank_factors_are_the_weights_update(checkpoint: Path, library: Path) -> None:
    bank = banked(checkpoint, library, ["patterns", "rslora"], dtype=torch.bfloat16)
    for name in bank.names:
        model = alone(checkpoint, library, name)
        expected = {layer_name: layer.delta_weight() for layer_name, layer in lora_layers(model)}
        factors = bank.low_rank(name)
        assert factors.keys() == expected.keys()
        for linear, (A, B) in factors.items():
            assert A.dtype == B.dtype == torch.float32
            torch.testing.assert_close(B @ A, expected[linear])


def test_saved_as_it_was_loaded(library: Path, bank: AdapterBank, tmp_path: Path) -> None:
    bank.save("peft", tmp_path / "copy")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / file).read_bytes() == (library / "peft" / file).read_bytes()
    with pytest.raises(InputError, match="exists already"):
        bank.save("plain", tmp_path / "copy")
    bank.save("plain", tmp_path / "copy", overwrite=True)
    bank.load("again", tmp_path / "copy")
    bank.save("few", tmp_path / "copy", overwrite=True)
    with pytest.raises(InputError, match="copy has changed since it was loaded"):
        bank.low_rank("again")


def resident(bank: AdapterBank) -> list[str]:
    return [name for name, number in bank._numbers.items() if bank._adapters[number].on_device]


def held_bytes(bank: AdapterBank) -> int:
    """Bytes of all factors on the device, counted by themselves."""
    held = [adapter.factors for adapter in bank._adapters.values() if adapter.factors is not None]
    held += [bank._stack.factors] if bank._stack is not None else []
    return sum(A.nbytes + B.nbytes for factors in held for A, B, _ in factors.values())


def test_least_recently_used_adapters_give_way(
    checkpoint: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free = banked(checkpoint, library)
    sizes = {name: free._adapters[number].num_bytes for name, number in free._numbers.items()}
    assert sum(sizes.values()) == held_bytes(free)
    limit = sizes["plain"] + sizes["few"] + sizes["pissa"]
    names = ["plain", "few", "pissa"]
    bank = banked(checkpoint, library, names, memory_limit=limit)
    assert resident(bank) == names and not capsys.readouterr().err
    bank.select("plain")
    bank.load("rslora", library / "rslora")  # few was not used for longest
    assert resident(bank) == ["plain", "pissa", "rslora"]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "wait in their directories" in told
    for name in ("few", "plain", "pissa", "rslora", "few", None, "rslora"):
        bank.select(name)
        free.select(name)
        assert torch.equal(logits(bank.model, tokens()), logits(free.model, tokens())), name
        assert held_bytes(bank) <= limit and (name is None or name in resident(bank))
    for pair in (["rslora", None], ["plain", "rslora"], "pissa", ["few", None]):
        bank.memory_limit = 3 * limit
        free.select(pair)
        bank.select(pair)
        assert torch.equal(logits(bank.model, tokens(2)), logits(free.model, tokens(2)))
        assert held_bytes(bank) <= 3 * limit
    bank.memory_limit = limit
    bank.select("plain")
    assert held_bytes(bank) <= limit and bank._stack is None
    before = logits(bank.model, tokens())
    with pytest.raises(
        InputError, match=r"plain, few, pissa: [\d,]+ bytes on the device, with their layout for a batch"
    ):
        bank.select(names)
    assert torch.equal(logits(bank.model, tokens()), before)
    with pytest.raises(InputError, match="high: .* above the memory limit"):
        bank.load("high", library / "high")
    assert bank.names == [*names, "rslora"] and not capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_adapters_wait_in_the_hosts_memory(
    checkpoint: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("plain", "few"):
        shutil.copytree(library / name, tmp_path / name)
    size = (tmp_path / "plain" / "adapter_model.safetensors").stat().st_size
    bank = banked(checkpoint, tmp_path, ["plain", "few"], memory_limit=size, device="cuda")
    assert "wait in the host's memory" in capsys.readouterr().err
    expected = {
        name: logits(alone(checkpoint, library, name, device="cuda"), tokens().cuda()) for name in ("plain", "few")
    }
    for name in ("plain", "few"):
        shutil.rmtree(tmp_path / name)
    for name in ("plain", "few", "plain"):
        bank.select(name)
        assert resident(bank) == [name]
        assert torch.equal(logits(bank.model, tokens().cuda()), expected[name])
    bank.memory_limit = None
    bank.select(["few", "plain", None])
    mixed = logits(bank.model, tokens(3).cuda())
    assert relative(mixed[1], expected["plain"][1]) <= 1e-4 and relative(mixed[0], expected["few"][0]) <= 1e-4


def test_a_generation_outlives_eviction(checkpoint: Path, library: Path) -> None:
    free = banked(checkpoint, library, ["plain", "few"])
    free.select("plain")
    expected = generate(free.model, prompts()[0], 8)[0]
    size = max(adapter.num_bytes for adapter in free._adapters.values())
    bank = banked(checkpoint, library, ["plain", "few"], memory_limit=size)
    bank.select("plain")
    stream = generate_stream(bank.model, prompts()[0], 8)
    rows = [next(stream)[1]]
    bank.select("few")
    assert resident(bank) == ["few"]
    assert rows + [token for _, token in stream] == expected
    assert resident(bank) == ["plain"]


def test_an_evicted_adapter_that_changed_is_not_served(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    for name in ("plain", "few"):
        shutil.copytree(library / name, tmp_path / name)
    size = (tmp_path / "plain" / "adapter_model.safetensors").stat().st_size
    bank = banked(checkpoint, tmp_path, ["plain", "few"], memory_limit=size)
    bank.select("few")
    assert resident(bank) == ["few"]
    write_lora(checkpoint, tmp_path / "plain", CONFIGS["plain"], seed=5)
    with pytest.raises(InputError, match="plain has changed since it was loaded"):
        bank.select("plain")
    shutil.rmtree(tmp_path / "plain")
    with pytest.raises(InputError, match="adapter_config.json: No such file"):
        bank.select("plain")
    bank.select("few")
    assert logits(bank.model, tokens()).isfinite().all()


def test_kinds_that_no_bank_holds(checkpoint: Path, library: Path, tmp_path: Path, bank: AdapterBank) -> None:
    tree = load_model(checkpoint, torch.float32)
    inject_lora_tree(tree, LoRATreeConfig(depth=1, r=2))
    save_adapter(tree, tmp_path / "tree")
    prefixed = load_model(checkpoint, torch.float32)
    inject_prefix(prefixed, PrefixConfig(2), [5])
    save_prompt_tuning(prefixed, tmp_path / "prefix")
    write_lora(checkpoint, tmp_path / "dora", LoRAConfig(r=2, dora=True))
    write_lora(checkpoint, tmp_path / "embedding", LoRAConfig(r=2, modules_to_save=["embed_tokens"]))
    write_lora(checkpoint, tmp_path / "head", LoRAConfig(r=2, targets=["q_proj", "lm_head"]))
    foreign = load_model(checkpoint, torch.float32)
    foreign.fingerprint = "0" * 64
    inject_lora(foreign, LoRAConfig(r=2))
    save_adapter(foreign, tmp_path / "foreign")
    shutil.copytree(library / "peft", tmp_path / "raw pissa")
    stated = json.loads((tmp_path / "raw pissa" / "adapter_config.json").read_text())
    (tmp_path / "raw pissa" / "adapter_config.json").write_text(json.dumps(stated | {"init_lora_weights": "pissa"}))
    reasons = {
        "tree": "its peft_type is 'LORA_TREE', not LORA",
        "prefix": "its peft_type is 'PREFIX_TUNING', not LORA",
        "dora": "cannot be in a bank: DoRA also scales",
        "embedding": "it brings weights of its own for embed_tokens",
        "head": "it adapts lm_head",
        "foreign": "was trained on another base",
        "raw pissa": "PiSSA is not converted",
        "absent": "adapter_config.json: no such file",
    }
    before = logits(bank.model, tokens())
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason):
            bank.load(name, tmp_path / name)
    assert bank.names == NAMES and torch.equal(logits(bank.model, tokens()), before)
    with pytest.raises(InputError, match="without an adapter, another bank"):
        AdapterBank(bank.model)
    with pytest.raises(InputError, match="without an adapter"):
        AdapterBank(alone(checkpoint, library, "plain"))
    with pytest.raises(InputError, match="carries an adapter already"):
        load_adapter(bank.model, library / "plain")


def test_good_adapters_work_beside_broken_ones(checkpoint: Path, library: Path, tmp_path: Path) -> None:
    for name in ("plain", "few", "peft"):
        shutil.copytree(library / name, tmp_path / name)
    for name in ("cut", "no tensors", "list", "no rank", "rank", "layer", "text"):
        shutil.copytree(library / "plain", tmp_path / name)
    (tmp_path / "a file").write_text("")
    (tmp_path / ".hidden").mkdir()
    tensors = tmp_path / "cut" / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    (tmp_path / "no tensors" / "adapter_model.safetensors").unlink()
    (tmp_path / "list" / "adapter_config.json").write_text("[]")
    (tmp_path / "text" / "adapter_config.json").write_text("{")
    for name, change in (("no rank", {"r": None}), ("rank", {"r": 3})):
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    state = load_file(tmp_path / "layer" / "adapter_model.safetensors")
    save_file(dict(list(state.items())[:-1]), tmp_path / "layer" / "adapter_model.safetensors")

    model = load_model(checkpoint, torch.float32)
    bank, errors = load_directory(model, tmp_path)
    assert bank.names == ["few", "peft", "plain"]
    reasons = {
        "cut": "not a readable safetensors file",
        "layer": "is only in one of them",
        "list": "not the description of a LoRA adapter",
        "no rank": "not the description of a LoRA adapter",
        "no tensors": "No such file",
        "rank": "this base needs (3, 64)",
        "text": "not valid JSON",
    }
    assert errors.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in errors[name] and str(tmp_path / name) in errors[name] and "\n" not in errors[name]
    bank.select("peft")
    assert torch.equal(logits(model, tokens()), logits(alone(checkpoint, library, "peft"), tokens()))
    untouched = [module for module in model.modules() if isinstance(module, BankedLinear)]
    assert len(untouched) == 14

    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_directory(load_model(checkpoint, torch.float32), tmp_path / "nowhere")
    for name in bank.names:
        shutil.rmtree(tmp_path / name)
    with pytest.raises(InputError, match="no adapter could be loaded from it: .*cut"):
        load_directory(load_model(checkpoint, torch.float32), tmp_path)


def test_the_benchmark_measures_what_it_says(tiny_checkpoint: Path, tmp_path: Path) -> None:
    script, options = "scripts/benchmark_adapters.py", ("--rounds", 1, "--threads", 1, "--device", "cpu")
    options = ("--r", 2, "--batch_size", 3, "--prompt_tokens", 4, "--new_tokens", 3, *options)
    process = run_script(
        script, "--checkpoint_dir", tiny_checkpoint, "--quantize", "nf4", "--out", tmp_path / "result.json", *options
    )
    report = json.loads((tmp_path / "result.json").read_text())
    assert report == json.loads(process.stdout)
    assert list(report["results"]) == ["base", "one adapter", "mixed", "mixed with base"]
    assert all(result["step_seconds"] > 0 for result in report["results"].values())
    steps = [report["results"][name]["step_seconds"] for name in ("mixed", "one adapter")]
    assert report["step_of_mixed_against_one_adapter"] == steps[0] / steps[1]
    assert min(report["switch_milliseconds"].values()) > 0 and report["load_milliseconds"] > 0
    assert report["versions"]["torch"] and report["setting"]["quantize"] == "nf4"
    process = run_script(script, "--model", "none", *options, check=False)
    assert process.returncode == 2 and "no configuration is named" in process.stderr
