"""Text <-> token ids: one interface for a small sentencepiece model and Qwen2.5's tokenizer.

Captions are data: "<|im_end|>" in a caption becomes ordinary tokens, never the special token.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import sentencepiece

from base import files, hub, limits
from base.config import UserError
from data.samples.captions import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_NAME = "text_tokenizer.model"
CONFIG_NAME = "config.json"
KIND = "sentencepiece"
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
AGAIN = "train the text tokenizer again"
MIN_VOCAB_SIZE = 320  # 256 bytes, <unk>, 4 special tokens, and room for some letters


class TextTokenizer(Protocol):
    """The project's interface of a text tokenizer. All ids are below `vocab_size`."""

    vocab_size: int
    im_start_id: int
    im_end_id: int
    vision_start_id: int
    vision_end_id: int
    fingerprint: str  # equal fingerprints mean equal ids for every text

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens. Unknown letters become bytes.

        Raises UserError: `text` holds a lone surrogate.
        """

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without special tokens."""


class SentencePieceTextTokenizer:
    """Byte-pair encoding with byte fallback, from `train_text_tokenizer`. Text is NFKC-normalised and case-folded."""

    def __init__(self, model: bytes) -> None:
        """`model`: the bytes of a sentencepiece model. Raises ValueError: they are not such a model."""
        try:
            self._pieces = sentencepiece.SentencePieceProcessor()
            self._pieces.LoadFromSerializedProto(model)
            self.vocab_size: int = self._pieces.get_piece_size()
            self._pieces.id_to_piece(
                list(range(self.vocab_size))
            )  # a damaged model would fail in training only
        except RuntimeError as error:
            raise ValueError(str(error).rpartition("] ")[2] or "no sentencepiece model") from None
        ids = [self._pieces.piece_to_id(token) for token in SPECIAL_TOKENS]
        if len({*ids, self._pieces.unk_id()}) <= len(ids):
            raise ValueError(f"not all of {', '.join(SPECIAL_TOKENS)} in it")
        self.im_start_id, self.im_end_id, self.vision_start_id, self.vision_end_id = ids
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """See TextTokenizer."""
        ids: list[int] = self._pieces.encode(check_whole(text, "text"))
        return ids

    def decode(self, ids: list[int]) -> str:
        """See TextTokenizer."""
        text: str = self._pieces.decode(list(ids))
        return text


class QwenTextTokenizer:
    """A fast tokenizer of transformers. Qwen2.5's has all special tokens; those that another one lacks are added."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_vocab()]
        if missing:
            tokenizer.add_special_tokens({"additional_special_tokens": missing})
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        ids = [int(tokenizer.convert_tokens_to_ids(token)) for token in SPECIAL_TOKENS]
        self.im_start_id, self.im_end_id, self.vision_start_id, self.vision_end_id = ids
        self.fingerprint = files.digest(["transformers", tokenizer.backend_tokenizer.to_str()])

    def encode(self, text: str) -> list[int]:
        """See TextTokenizer."""
        ids: list[int] = self._tokenizer.encode(
            check_whole(text, "text"), add_special_tokens=False, split_special_tokens=True
        )
        return ids

    def decode(self, ids: list[int]) -> str:
        """See TextTokenizer."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def load_text_tokenizer(name_or_directory: str) -> TextTokenizer:
    """Loads a folder of `train_text_tokenizer`, or a tokenizer that transformers finds by this name or in this folder.

    Raises UserError: there is no tokenizer, or the model is damaged.
    """
    directory = Path(name_or_directory)
    path = directory / MODEL_NAME
    if path.is_file():
        try:
            model = limits.read_bytes(path, limits.VOCABULARY_BYTES)
            known = limits.read_json(
                directory / CONFIG_NAME, "a text tokenizer's config", limits.CONFIG_BYTES
            )
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror}); {AGAIN}") from None
        if known != _config(model):
            raise UserError(f"{path}: does not fit {CONFIG_NAME} beside it; {AGAIN}")
        try:
            return SentencePieceTextTokenizer(model)
        except ValueError as error:
            raise UserError(f"{path}: no sentencepiece model of ours ({error}); {AGAIN}") from None
    from transformers import AutoTokenizer  # imported here because it takes seconds

    try:
        return QwenTextTokenizer(hub.from_pretrained(AutoTokenizer, name_or_directory))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"text tokenizer '{name_or_directory}': no {MODEL_NAME} there, and transformers has none "
            f"({reason}); train it first or give a name such as Qwen/Qwen2.5-0.5B"
        ) from None


def train_text_tokenizer(captions: Iterable[str], directory: Path, vocab_size: int) -> TextTokenizer:
    """Trains on the distinct captions and writes text_tokenizer.model and config.json, whole or not at all.

    Equal sets of captions give equal bytes, in any order. `vocab_size` includes 256 byte tokens and the special tokens;
    few captions may give fewer tokens. Raises UserError: too small a vocabulary, no captions, or a folder that holds
    something else.
    """
    check_folder(directory)
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"text tokenizer: vocab_size {vocab_size} is below {MIN_VOCAB_SIZE}; raise it")
    sentences = sorted({caption.strip() for caption in captions} - {""})
    if not sentences:
        raise UserError("text tokenizer: no captions to train on; make the shards first")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc_cf",
        # sentencepiece finds user-defined symbols in text, control symbols never.
        control_symbols=list(SPECIAL_TOKENS),
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        unk_id=0,
        num_threads=1,  # several threads would sum scores in varying order
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    with files.directory(directory, _is_text_tokenizer) as temporary:
        files.write_bytes(temporary / MODEL_NAME, model.getvalue())
        files.write_json(temporary / CONFIG_NAME, _config(model.getvalue()))
    return load_text_tokenizer(str(directory))


def check_folder(directory: Path) -> None:
    """Raises UserError: `train_text_tokenizer` would replace files that are not its own."""
    files.check_new(directory, _is_text_tokenizer)


def _is_text_tokenizer(directory: Path) -> bool:
    """Whether the folder holds only a text tokenizer of `train_text_tokenizer`, possibly damaged."""
    try:
        kind = files.read_json(directory / CONFIG_NAME)["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return kind == KIND and {path.name for path in directory.iterdir()} <= {MODEL_NAME, CONFIG_NAME}


def _config(model: bytes) -> dict[str, str]:
    return {"kind": KIND, "sha256": hashlib.sha256(model).hexdigest()}
