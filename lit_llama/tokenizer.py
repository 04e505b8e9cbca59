"""Tokenizers of checkpoint directories: `tokenizer.json`, SentencePiece and Llama 3's rank file, as one class.

Here: text to ids and back, streaming included, and the ids that have a role (beginning, end, stop, document).
Prompt formats live in `lit_llama.prompts`, token stores in `lit_llama.data`.

Text is only ever text: a special token written in it ("</s>", "<|eot_id|>") is encoded as the characters it is made of.
Special tokens enter a sequence as ids, and decoding leaves them out.

Ids are those of the reference implementations (`tokenizers`, `sentencepiece`, `tiktoken`) on the same file, with two
exceptions, where the references lose text: U+2581, which SentencePiece spells spaces with, is encoded as its bytes; and
a space that begins a text is kept where a Metaspace pre-tokenizer would drop it (SentencePiece itself keeps it). So
`decode(encode(text)) == text` for any Unicode text, unless the file asks for something that loses text: a normaliser
(NFC, NFKC, removal of extra whitespace), or has no tokens for some bytes (SmolLM2: six control characters, and
unassigned planes of Unicode).
"""

import base64
import binascii
import codecs
import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from lit_llama.errors import InputError
from lit_llama.files import read_json

COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""The files of a checkpoint directory that travel along when its tokenizer is copied; generation_config.json names the
ids that end an answer."""

END_OF_TURN_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")

# Pairs that surround a document in pretraining, best first. Chat models often name tokens of a chat turn as their BOS
# and EOS; those would open a turn before each document.
DOCUMENT_TOKENS = (("<|begin_of_text|>", "<|end_of_text|>"), ("<|endoftext|>", "<|endoftext|>"), ("<s>", "</s>"))

# Fine-tuned models often add their control tokens without marking them as special.
CONTROL_TOKEN = re.compile(r"<[|\uff5c].*[|\uff5c]>")

WORD_BOUNDARY = "\u2581"  # how SentencePiece spells a space inside a piece
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

# Splits text into words before merging (meta-llama/llama-models, models/llama3/tokenizer.py).
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_RANKS = 128_000
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)),
)


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Attributes:
        path: the file that defines the vocabulary.
        files: every file of the tokenizer, to be copied along with a checkpoint.
        sha256: hexadecimal digest of the bytes of `path`; names the tokenizer in token stores.
        vocab_size: largest id + 1, special tokens included. The model's embedding may have more rows than this.
        bos_id, eos_id: ids that the checkpoint gives these roles, or None.
        adds_bos: whether the tokenizer's own default puts `bos_id` before a plain text.
        stop_ids: all ids that end an answer.
        document_start_id, document_end_id: what surrounds a document in pretraining, or None.
        chat_template: the Jinja chat template that came with the checkpoint, or None.
        special_tokens: what the checkpoint names for templates, {"bos_token": "<s>", "pad_token": ...}.
        spaces_segments: text that follows a special token gets a leading space, as it does at the start.
    """

    def __init__(self, checkpoint_dir: Path | str) -> None:
        directory = Path(checkpoint_dir)
        self.path = _defining_file(directory)
        self.files = [directory / name for name in COMPANION_FILES if (directory / name).is_file()]
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})") from None
        self.sha256 = hashlib.sha256(data).hexdigest()
        model_config = _read_optional(directory / "config.json")
        generation_config = _read_optional(directory / "generation_config.json")
        settings = _read_optional(directory / "special_tokens_map.json")
        settings |= _read_optional(directory / "tokenizer_config.json")
        self.chat_template = read_chat_template(directory)

        self._backend: _TokenizersBackend | _SentencePieceBackend
        if self.path.name == "tokenizer.json":
            self._backend = _TokenizersBackend(data, self.path)
        elif re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data):
            self._backend = _TokenizersBackend(rank_file_to_json(data, self.path), self.path)
            settings = {
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|end_of_text|>",
                "add_bos_token": True,
            } | settings
        else:
            self._backend = _SentencePieceBackend(data, self.path, _added_tokens(directory, settings))
            self._backend.spaces_segments &= settings.get("legacy") is not False

        self.vocab_size = self._backend.vocab_size
        self.spaces_segments = self._backend.spaces_segments
        self.bos_id = self._role_id("bos_token", self._backend.bos_id, settings, model_config)
        self.eos_id = self._role_id("eos_token", self._backend.eos_id, settings, model_config)
        declared = settings.get("add_bos_token")
        self.adds_bos = self.bos_id is not None and (
            declared if isinstance(declared, bool) else self._backend.adds_bos(self.bos_id)
        )
        added = self._backend.added
        self._special_texts = {token_id: text for text, token_id in added.items()}
        self.special_tokens = _named_tokens(settings)
        for role, token_id in (("bos_token", self.bos_id), ("eos_token", self.eos_id)):
            if token_id in self._special_texts:
                self.special_tokens.setdefault(role, self._special_texts[token_id])
        self.stop_ids = frozenset(
            [
                *_id_list(generation_config.get("eos_token_id")),
                *_id_list(model_config.get("eos_token_id")),
                *_id_list(self.eos_id),
                *(added[text] for text in END_OF_TURN_TOKENS if text in added),
            ]
        )
        self.document_start_id, self.document_end_id = next(
            ((added[start], added[end]) for start, end in DOCUMENT_TOKENS if start in added and end in added),
            (self.bos_id, self.eos_id),
        )

    @classmethod
    def from_checkpoint(cls, checkpoint_dir: Path | str) -> "Tokenizer":
        """Read `tokenizer.json`, or else `tokenizer.model` (SentencePiece or Llama 3 ranks, told apart by content).

        Raises:
            InputError: neither file is there, or it is not what its name says.
        """
        return cls(checkpoint_dir)

    def encode(self, text: str, bos: bool = False, eos: bool = False, continuation: bool = False) -> list[int]:
        """Ids of `text`; every character of it is text, whatever special token it spells.

        Args:
            text: any Unicode text; a lone surrogate in it is an InputError.
            bos: put `bos_id` first; it never comes in any other way.
            eos: put `eos_id` last.
            continuation: the text continues a sequence, so a SentencePiece vocabulary puts no space before it.
        """
        return self._surround(self._encode_all([text], continuation), bos, eos)[0]

    def encode_batch(self, texts: list[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """`encode` of each text, in parallel threads outside of Python."""
        return self._surround(self._encode_all(texts, continuation=False), bos, eos)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` without special tokens; bytes that are not UTF-8 become U+FFFD.

        Raises:
            InputError: an id is outside of the vocabulary.
        """
        return self.stream().text_of(b"".join([self.bytes_of(token_id) for token_id in ids]), final=True)

    def stream(self, continuation: bool = False) -> "StreamDecoder":
        """A fresh decoder that takes one id at a time; what it returns adds up to `decode` of all ids.

        Args:
            continuation: the ids go on with a text, so that a space at their beginning is part of what they say.
        """
        return StreamDecoder(self, continuation)

    def bytes_of(self, token_id: int) -> bytes:
        """UTF-8 bytes that one id stands for, perhaps part of a character; none for a special token."""
        if not 0 <= token_id < self.vocab_size:
            raise InputError(f"{self.path}: no token {token_id}; ids go from 0 to {self.vocab_size - 1}")
        return self._token_bytes[token_id]

    def special_id(self, text: str) -> int:
        """Id of the special (or added) token that is written `text`; InputError when there is none."""
        if text not in self._backend.added:
            raise InputError(f"{self.path}: no special token {text!r}; is this the tokenizer of another model?")
        return self._backend.added[text]

    def has_special(self, text: str) -> bool:
        """Whether there is a special (or added) token that is written `text`."""
        return text in self._backend.added

    def special_text(self, token_id: int) -> str | None:
        """How a special (or added) token is written; None for an ordinary one."""
        return self._special_texts.get(token_id)

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches a special token that is written in a text."""
        longest_first = sorted(self._backend.added, key=len, reverse=True)
        texts = [text for text in longest_first if not self._token_bytes[self._backend.added[text]]]
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return self._backend.token_bytes()

    def _encode_all(self, texts: list[str], continuation: bool) -> list[list[int]]:
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"text has a lone surrogate ({text[error.start]!a} at character {error.start}), which no tokenizer "
                    "can encode; read its source with the right encoding"
                ) from None
        if not self._backend.boundary_ids or not any(WORD_BOUNDARY in text for text in texts):
            return self._backend.encode_batch(texts, continuation)
        sequences = []
        for text in texts:
            first, *rest = text.split(WORD_BOUNDARY)
            ids = self._backend.encode_batch([first], continuation)[0]
            for part in rest:
                ids = ids + self._backend.boundary_ids + self._backend.encode_batch([part], continuation=True)[0]
            sequences.append(ids)
        return sequences

    def _surround(self, sequences: list[list[int]], bos: bool, eos: bool) -> list[list[int]]:
        for wanted, token_id, name in ((bos, self.bos_id, "beginning"), (eos, self.eos_id, "end")):
            if wanted and token_id is None:
                raise InputError(f"{self.path}: the tokenizer has no {name}-of-sequence token")
        before, after = [self.bos_id] * bos, [self.eos_id] * eos
        return [before + ids + after for ids in sequences] if bos or eos else sequences

    def _role_id(self, role: str, backend_id: int | None, settings: dict, model_config: dict) -> int | None:
        """Where the files disagree, tokenizer_config.json wins over the vocabulary file, and that over config.json."""
        text = settings.get(role)
        text = text["content"] if isinstance(text, dict) else text
        if text is not None:
            token_id = self._backend.added.get(text, self._backend.token_to_id(text))
            if token_id is None:
                raise InputError(f"{self.path}: no token {text!r}, which tokenizer_config.json names as {role}")
            return token_id
        if backend_id is not None or role in settings:
            return backend_id
        return next(iter(_id_list(model_config.get(f"{role}_id"))), None)


class StreamDecoder:
    """Decodes one id at a time and holds bytes back until they make a whole character."""

    def __init__(self, tokenizer: Tokenizer, continuation: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = tokenizer._backend.prepends_space and not continuation

    def push(self, token_id: int) -> str:
        """The text that one more id completes; empty while a character is unfinished."""
        return self.text_of(self._tokenizer.bytes_of(token_id))

    def flush(self) -> str:
        """What is left at the end of the ids: U+FFFD for a character that was never finished, else nothing."""
        return self.text_of(b"", final=True)

    def text_of(self, data: bytes, final: bool = False) -> str:
        """Text of the next bytes, without the space that the tokenizer put before the first word."""
        text = self._decoder.decode(data, final)
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class _TokenizersBackend:
    """A `tokenizer.json` in the `tokenizers` library."""

    bos_id = eos_id = None

    def __init__(self, definition: bytes, path: Path) -> None:
        self._definition, self._path = definition, path
        self._model = _load_definition(definition, path)
        decoder = self._model.get_added_tokens_decoder()
        self.added = {token.content: token_id for token_id, token in decoder.items()}
        self._special_ids = {
            i for i, token in decoder.items() if token.special or CONTROL_TOKEN.fullmatch(token.content)
        }
        self.vocab_size = max([self._model.get_vocab_size(with_added_tokens=False) - 1, *decoder]) + 1
        decoders = {step["type"] for step in _steps(self._model.decoder)}
        if not decoders or decoders - {"ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
            raise InputError(
                f"{path}: decoder {' + '.join(sorted(decoders)) or 'null'} is not that of a Llama tokenizer"
            )
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = not self._byte_level and getattr(self._model.model, "byte_fallback", False)
        self.boundary_ids = (
            [self._model.token_to_id(f"<0x{byte:02X}>") for byte in WORD_BOUNDARY.encode()]
            if self._byte_fallback
            else []
        )
        steps = [*_steps(self._model.normalizer), *_steps(self._model.pre_tokenizer)]
        prepending = [step for step in steps if _prepends_space(step)]
        self.prepends_space = bool(prepending)
        self.spaces_segments = any(step.get("prepend_scheme") != "first" for step in prepending)
        self._swallows_space = any(step["type"] != "Prepend" for step in prepending)

    @cached_property
    def _continuation_model(self) -> Any:
        """The same tokenizer without the steps that put a space before a text."""
        definition = json.loads(self._definition)
        for part, children in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
            if definition.get(part) is not None:
                steps = definition[part].get(children, [definition[part]])
                kept = [step | _WITHOUT_SPACE.get(step["type"], {}) for step in steps if step["type"] != "Prepend"]
                definition[part] = {"type": "Sequence", children: kept}
        return _load_definition(json.dumps(definition).encode(), self._path)

    def adds_bos(self, bos_id: int) -> bool:
        return self._model.encode("", add_special_tokens=True).ids[:1] == [bos_id]

    def token_to_id(self, text: str) -> int | None:
        return self._model.token_to_id(text)

    def encode_batch(self, texts: list[str], continuation: bool) -> list[list[int]]:
        model = self._continuation_model if continuation and self.prepends_space else self._model
        if self._swallows_space and not continuation:
            texts = [" " + text if text.startswith(" ") else text for text in texts]
        if len(texts) == 1:
            return [model.encode(texts[0], add_special_tokens=False).ids]
        return [encoding.ids for encoding in model.encode_batch_fast(texts, add_special_tokens=False)]

    def token_bytes(self) -> list[bytes]:
        added = set(self.added.values())
        alphabet = {letter: byte for byte, letter in _byte_letters().items()}

        def spell(token_id: int) -> bytes:
            token = self._model.id_to_token(token_id)
            if token is None or token_id in self._special_ids:
                return b""
            if token_id in added:
                return token.encode()
            if self._byte_level:
                return (
                    bytes([alphabet[letter] for letter in token]) if alphabet.keys() >= set(token) else token.encode()
                )
            if self._byte_fallback and (match := BYTE_PIECE.fullmatch(token)):
                return bytes.fromhex(match[1])
            return token.replace(WORD_BOUNDARY, " ").encode()

        return [spell(token_id) for token_id in range(self.vocab_size)]


class _SentencePieceBackend:
    """A SentencePiece `tokenizer.model`, with the tokens that the JSON files beside it add."""

    def __init__(self, data: bytes, path: Path, added: dict[str, int]) -> None:
        self._data, self._path = data, path
        self._model = model = _load_sentencepiece(data, path)
        self._size = model.vocab_size()
        extra = {text: token_id for text, token_id in added.items() if token_id >= self._size}
        self.added = {model.id_to_piece(i): i for i in range(self._size) if model.is_control(i)} | extra
        self.vocab_size = max([self._size - 1, *extra.values()]) + 1
        self.bos_id = model.bos_id() if model.bos_id() >= 0 else None
        self.eos_id = model.eos_id() if model.eos_id() >= 0 else None
        boundary_ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in WORD_BOUNDARY.encode()]
        self.boundary_ids = boundary_ids if all(model.is_byte(i) for i in boundary_ids) else []
        self.prepends_space = self.spaces_segments = model.encode("a") != self._continuation_model.encode("a")

    @cached_property
    def _continuation_model(self) -> Any:
        """The same model with `normalizer_spec.add_dummy_prefix` off: the last value of a protobuf field wins."""
        return _load_sentencepiece(self._data + b"\x1a\x02\x18\x00", self._path)

    def adds_bos(self, bos_id: int) -> bool:
        return True

    def token_to_id(self, text: str) -> int | None:
        token_id = self._model.piece_to_id(text)
        return token_id if self._model.id_to_piece(token_id) == text else None

    def encode_batch(self, texts: list[str], continuation: bool) -> list[list[int]]:
        return (self._continuation_model if continuation else self._model).encode(texts)

    def token_bytes(self) -> list[bytes]:
        model, special_ids = self._model, set(self.added.values())

        def spell(token_id: int) -> bytes:
            if token_id in special_ids or token_id >= self._size:
                return b""
            if model.is_byte(token_id):
                return bytes.fromhex(BYTE_PIECE.fullmatch(model.id_to_piece(token_id))[1])
            if model.is_unknown(token_id):
                return model.decode([token_id]).encode()
            return model.id_to_piece(token_id).replace(WORD_BOUNDARY, " ").encode()

        return [spell(token_id) for token_id in range(self.vocab_size)]


def read_chat_template(checkpoint_dir: Path | str) -> str | None:
    """The Jinja chat template of a checkpoint (`chat_template.jinja`, or in tokenizer_config.json), or None."""
    directory = Path(checkpoint_dir)
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    template = _read_optional(directory / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name; transformers uses the one called default
        return next((entry["template"] for entry in template if entry["name"] == "default"), None)
    return template


def rank_file_to_json(data: bytes, path: Path) -> bytes:
    """The tokenizer.json that tokenizes as tiktoken does with a Llama 3 rank file.

    tiktoken merges any two neighbours whose join has a rank, lowest rank first: so each way to cut a token into two
    tokens is a merge, in the order of ranks.

    Args:
        data: lines of a base64 token and its rank.
        path: where they came from, for messages.

    Raises:
        InputError: a line is malformed, ranks are missing, or there are more of them than Llama 3 has.
    """
    spelling = _byte_letters()
    vocab = {token.decode("latin-1").translate(spelling): rank for token, rank in _read_ranks(data, path).items()}
    merges = []
    for word in sorted(vocab, key=vocab.__getitem__):
        pairs = [(word[:cut], word[cut:]) for cut in range(1, len(word)) if word[:cut] in vocab and word[cut:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])) if len(pairs) > 1 else pairs
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": LLAMA3_WORDS}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    definition = {
        "version": "1.0",
        "added_tokens": [
            {"id": len(vocab) + number, "content": text, **flags} for number, text in enumerate(LLAMA3_SPECIAL_TOKENS)
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level]},
        "decoder": byte_level,
        # As in tiktoken, a word that has a rank is one token, however it would be merged.
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    return json.dumps(definition).encode()


def _read_ranks(data: bytes, path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise InputError(f"{path}, line {number}: not a base64 token and its rank; download it again") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise InputError(f"{path}: ranks are not 0 to {len(ranks) - 1} with all 256 bytes; download it again")
    if len(ranks) > LLAMA3_RANKS:
        raise InputError(f"{path}: {len(ranks)} ranks; only the rank file of Llama 3 ({LLAMA3_RANKS}) is supported")
    return ranks


def _defining_file(directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory}: no tokenizer.json and no tokenizer.model; copy the tokenizer of the model there")


def _read_optional(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _added_tokens(directory: Path, settings: dict) -> dict[str, int]:
    listed = {entry["content"]: int(token_id) for token_id, entry in settings.get("added_tokens_decoder", {}).items()}
    return _read_optional(directory / "added_tokens.json") | listed


def _named_tokens(settings: dict) -> dict[str, str]:
    named = {role: text for role, text in settings.items() if role.endswith("_token")}
    named = {role: text["content"] if isinstance(text, dict) else text for role, text in named.items()}
    return {role: text for role, text in named.items() if isinstance(text, str)}


def _id_list(value: int | list[int] | None) -> list[int]:
    return [value] if isinstance(value, int) else list(value or [])


def _load_definition(definition: bytes, path: Path) -> Any:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as TokenizersTokenizer

    try:
        model = TokenizersTokenizer.from_buffer(definition)
    except Exception as error:  # the library raises bare Exception for anything that is wrong with a file
        raise InputError(f"{path}: not a tokenizer.json that the installed tokenizers reads ({error})") from None
    # A truncation length saved in the file would cut documents without a word.
    model.no_truncation()
    model.no_padding()
    model.encode_special_tokens = True
    contents = [token.content for token in model.get_added_tokens_decoder().values() if not token.special]
    model.add_special_tokens([AddedToken(text, special=True) for text in contents if CONTROL_TOKEN.fullmatch(text)])
    return model


def _load_sentencepiece(data: bytes, path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        if not data:  # which the library takes for a model to be loaded later
            raise RuntimeError
        return SentencePieceProcessor(model_proto=data)
    except RuntimeError:
        raise InputError(f"{path}: neither a SentencePiece model nor a Llama 3 rank file; download it again") from None


def _steps(component: Any) -> list[dict]:
    """The steps of a normaliser, pre-tokenizer or decoder, as the JSON objects of the file."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    if state["type"] != "Sequence":
        return [state]
    return next(value for value in state.values() if isinstance(value, list))


_WITHOUT_SPACE = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}


def _prepends_space(step: dict) -> bool:
    return (
        step["type"] == "Prepend"
        or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        or (step["type"] == "ByteLevel" and step["add_prefix_space"])
    )


def _byte_letters() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's encoder.py)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}
