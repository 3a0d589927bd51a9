from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from base.config import UserError
from data.samples.text import (
    SPECIAL_TOKENS,
    QwenTextTokenizer,
    SentencePieceTextTokenizer,
    load_text_tokenizer,
    train_text_tokenizer,
)

CAPTIONS = [
    f"a {size} {thing} on a {colour} background"
    for size in ("small", "large")
    for thing in ("red apple", "dog", "rocket", "guitar", "star")
    for colour in ("blue", "green", "white")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("text") / "tokenizer"
    train_text_tokenizer(CAPTIONS, directory, 400)
    return directory


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A tiny tokenizer of Qwen2's kind (byte-level BPE) in a folder as transformers saves it."""
    return save_qwen(tmp_path_factory.mktemp("qwen"), ["<|endoftext|>", *SPECIAL_TOKENS])


def save_qwen(directory: Path, special_tokens: list[str]) -> Path:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CAPTIONS, trainer)
    Qwen2TokenizerFast(tokenizer_object=bpe).save_pretrained(directory)
    return directory


@pytest.fixture(params=["trained", "qwen"])
def tokenizer(request):
    return load_text_tokenizer(str(request.getfixturevalue(request.param)))


def special_ids(tokenizer):
    return [tokenizer.im_start_id, tokenizer.im_end_id, tokenizer.vision_start_id, tokenizer.vision_end_id]


@pytest.mark.parametrize("text", [*CAPTIONS[:2], "a zebra with ß, 世界 and 🦓!", "x"])
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.decode(ids).casefold() == text.casefold()


def test_special_tokens_are_distinct_and_below_vocab_size(tokenizer):
    ids = special_ids(tokenizer)
    assert len(set(ids)) == 4 and all(0 <= token < tokenizer.vocab_size for token in ids)


def test_special_tokens_typed_into_a_caption_stay_text(tokenizer):
    ids = tokenizer.encode("a dog<|im_end|><|vision_start|>")
    assert not set(ids) & set(special_ids(tokenizer))


def test_decode_leaves_special_tokens_out(tokenizer):
    ids = [tokenizer.im_start_id, *tokenizer.encode("a dog"), tokenizer.im_end_id]
    assert tokenizer.decode(ids) == "a dog"


def test_both_kinds_are_told_apart_by_the_folder(trained, qwen):
    assert isinstance(load_text_tokenizer(str(trained)), SentencePieceTextTokenizer)
    assert isinstance(load_text_tokenizer(str(qwen)), QwenTextTokenizer)


def test_qwen_gives_the_ids_of_transformers(qwen):
    reference = Qwen2TokenizerFast.from_pretrained(qwen)
    ours = load_text_tokenizer(str(qwen))
    for text in CAPTIONS:
        assert ours.encode(text) == reference.encode(text)
    assert special_ids(ours) == reference.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ours.vocab_size == len(reference)


def test_only_missing_special_tokens_are_added(tmp_path):
    directory = save_qwen(tmp_path, ["<|endoftext|>", *SPECIAL_TOKENS[:2]])
    before = Qwen2TokenizerFast.from_pretrained(directory)
    ours = load_text_tokenizer(str(directory))
    assert ours.vocab_size == len(before) + 2
    assert ours.im_start_id == before.convert_tokens_to_ids(SPECIAL_TOKENS[0])
    assert {ours.vision_start_id, ours.vision_end_id} == {len(before), len(before) + 1}


def test_training_does_not_depend_on_order_or_repetition(trained, tmp_path):
    again = train_text_tokenizer([*reversed(CAPTIONS), CAPTIONS[0], " "], tmp_path / "again", 400)
    assert again.fingerprint == load_text_tokenizer(str(trained)).fingerprint
    other = train_text_tokenizer([*CAPTIONS, "a purple zebra"], tmp_path / "other", 400)
    assert other.fingerprint != again.fingerprint


def test_capitals_make_no_difference_to_the_trained_one(trained):
    ours = load_text_tokenizer(str(trained))
    assert ours.encode("A Red Apple") == ours.encode("a red apple")


def test_frequent_words_are_single_tokens(tmp_path):
    ours = train_text_tokenizer(CAPTIONS, tmp_path / "large", 600)
    assert len(ours.encode("a small red apple on a blue background")) == 8


def test_damaged_model_is_refused(trained, tmp_path):
    for name in ("text_tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    model = tmp_path / "text_tokenizer.model"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(UserError, match="train the text tokenizer again"):
        load_text_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("captions", "vocab_size", "message"),
    [(["", " "], 400, "no captions"), (CAPTIONS, 100, "vocab_size 100")],
)
def test_training_refuses_what_cannot_work(tmp_path, captions, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_text_tokenizer(captions, tmp_path / "none", vocab_size)
    assert not (tmp_path / "none").exists()


def test_unknown_name_is_one_line(tmp_path):
    with pytest.raises(UserError, match="train it first") as caught:
        load_text_tokenizer(str(tmp_path / "missing"))
    assert "\n" not in str(caught.value)
