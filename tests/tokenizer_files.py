"""Small tokenizers of every kind that checkpoints come with, made on the spot, and text that is hard on tokenizers."""

import base64
import io
import json
import random
from pathlib import Path

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCES = [
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Mount Everest is the highest point of Nepal, at 8,849 metres;",
    "its neighbours  are  India and China.    Indented text follows the heading.",
    "Norway's coastline is 25,148 km long, and it's said that she's seen all of it.",
    "What is the capital of Norway? You are a helpful assistant. The user asks, the system answers.",
    "Être ou ne pas être; größer, naïve, coöperate: größere Bäume wachsen höher als naïve Bäume.",
    "[INST] Below is an instruction that describes a task. [/INST] Write a response that completes the request.",
]
PIECES = [
    *(
        "the",
        " the",
        "  ",
        " ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\x00",
        "\x1f",
        "\x7f",
        "\x85",
        "\u00a0",
        "\u2028",
        "\u3000",
    ),
    *("é", "e\u0301", "ß", "ſ", "İ", "Norway's", "it'S", "1234", "!?.", "\u2581", "\u2581\u2581", " \u2581a", "\ufffd"),
    *("👩‍👩‍👧", "🇳🇴", "👍🏽", "שלום", "\u202eabc\u202c", "مرحبا", "नमस्ते", "漢字", "\ufeff", "\u200d", "\U0010ffff"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "[/INST]", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|eot_id|>", "<|user|>", "<|tool|>"),
    *("xqz", "jkwjkw"),
]


def hard_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of random characters of all of Unicode, and of pieces that tokenizers trip over."""
    rng = random.Random(seed)
    characters = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = ["", " ", "  ", "\n", " a", "a ", "  a  ", "\u2581", "\u2581a", "a\u2581 b"]
    while len(texts) < count:
        if rng.random() < 0.5:
            texts.append("".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 16))))
        else:
            limit = rng.choice([0x80, 0x250, 0x3000, len(characters)])
            texts.append("".join(chr(characters[rng.randrange(limit)]) for _ in range(rng.randrange(1, 30))))
    return texts


def write_sentencepiece(directory: Path, **options: object) -> Path:
    """A Llama-like SentencePiece model (BPE, digits split, byte fallback) as tokenizer.model; returns the folder."""
    import sentencepiece

    directory.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.999,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, **llama | options
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    return directory


def write_llama_json(sentencepiece_dir: Path, directory: Path, scheme: str, controls: tuple[str, ...] = ()) -> Path:
    """The same vocabulary as tokenizer.json, in one of the forms found in published Llama and Mistral checkpoints.

    `scheme`: "prepend" (Llama 2, TinyLlama, Mistral v0.1), or Metaspace's "first" (Mistral v0.3) or "always".
    """
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece in vocab:
        if not (model.is_control(vocab[piece]) or model.is_byte(vocab[piece]) or model.is_unknown(vocab[piece])):
            cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            merges += [(model.get_score(vocab[piece]), pair) for pair in cuts if pair[0] in vocab and pair[1] in vocab]
    merges.sort(key=lambda merge: -merge[0])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prepend = {"type": "Prepend", "prepend": "\u2581"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    definition = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "added_tokens": [{"id": vocab[text], "content": text, **flags} for text in ("<unk>", "<s>", "</s>", *controls)],
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]} if scheme == "prepend" else None,
        "pre_tokenizer": None if scheme == "prepend" else metaspace,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab["<s>"]], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [list(pair) for _, pair in merges],
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def toy_ranks() -> dict[bytes, int]:
    """A few hundred ranks in the manner of Llama 3: all bytes, then what byte pair encoding of `SENTENCES` merges."""
    import regex

    words = [
        [bytes([byte]) for byte in word.encode()] for text in SENTENCES for word in regex.findall(LLAMA3_WORDS, text)
    ]
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 500:
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks.setdefault(best[0] + best[1], len(ranks))
        words = [_merge(word, best) for word in words]
    # A word that no merge reaches, and a token whose first cut is not the one that merging meets.
    for token in (b"xqz", b"jk", b"kw", b"jkw"):
        ranks[token] = len(ranks)
    return ranks


def _merge(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    merged: list[bytes] = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def write_rank_file(directory: Path) -> Path:
    """`toy_ranks` as Meta distributes Llama 3's tokenizer.model: one base64 token and its rank a line."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in toy_ranks().items()]
    (directory / "tokenizer.model").write_text("".join(lines))
    return directory


def tiktoken_ids(text: str, ranks: dict[bytes, int]) -> list[int]:
    """Llama 3's tokenization by definition: in a word, join the neighbours of lowest joint rank until none has one."""
    import regex

    ids = []
    for word in regex.findall(LLAMA3_WORDS, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while not (len(parts) == 1 or b"".join(parts) in ranks):
            joins = [
                (ranks[left + right], at)
                for at, (left, right) in enumerate(zip(parts, parts[1:], strict=False))
                if left + right in ranks
            ]
            if not joins:
                break
            at = min(joins)[1]
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[b"".join(parts)]] if b"".join(parts) in ranks else [ranks[part] for part in parts]
    return ids
