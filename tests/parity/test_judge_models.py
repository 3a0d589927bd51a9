"""Qwen3-VL of transformers, tiny and random, as a judge; adapters against peft's rule."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers.models.qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl import Qwen3VLProcessor, Qwen3VLVideoProcessor

from base.config import UserError
from evaluation.judges.interface import YES_NO, Decoding
from evaluation.judges.vision_language import TransformersJudge, merge_adapter

SPECIAL = [
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)


def tiny_processor() -> Any:
    vocabulary = {
        token: index for index, token in enumerate([*SPECIAL, "<unk>", *"abcdefghijklmnopqrstuvwxyz?"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[1:],
    )
    images = Qwen2VLImageProcessor(
        patch_size=8, merge_size=2, min_pixels=256, max_pixels=1024, temporal_patch_size=2
    )
    video = Qwen3VLVideoProcessor(patch_size=8, merge_size=2)
    return Qwen3VLProcessor(
        image_processor=images, tokenizer=fast, video_processor=video, chat_template=TEMPLATE
    )


def tiny_model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        image_token_id=1,
        video_token_id=2,
        vision_start_token_id=3,
        vision_end_token_id=4,
    )
    return transformers.Qwen3VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "Tiny-VL"
    tiny_model().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


def picture(seed: int) -> torch.Tensor:
    return torch.randint(256, (3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_answers_depend_on_images_words_and_seed_alone(folder: Path) -> None:
    judge = TransformersJudge.load(
        str(folder), decoding=Decoding(temperature=1.0, top_p=1.0, max_new_tokens=12)
    )
    assert judge.name == "tiny_vl"
    first = judge([picture(0), picture(1)], "what is it?", 42)
    torch.rand(5)  # the global generator moves on
    state = torch.get_rng_state()
    assert judge([picture(0), picture(1)], "what is it?", 42) == first
    assert torch.equal(torch.get_rng_state(), state)
    others = {
        judge([picture(0), picture(1)], "what is it?", 43),
        judge([picture(0)], "what is it?", 42),
        judge([picture(0), picture(1)], "what is it?", 42, text_first=True),
    }
    assert others != {first}


def test_yes_and_no_are_asked_without_chance(folder: Path) -> None:
    judge = TransformersJudge.load(str(folder), name="mine", decoding=YES_NO)
    assert judge.name == "mine"
    assert judge([picture(0)], "is it?", 0) == judge([picture(0)], "is it?", 1)
    model, processor = tiny_model(), tiny_processor()
    content = [
        {"type": "image", "image": picture(0).permute(1, 2, 0).numpy()},
        {"type": "text", "text": "is it?"},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    expected = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert judge([picture(0)], "is it?", 0) == expected


def write_adapter(
    path: Path, target: str, shape: tuple[int, int], **config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    path.mkdir()
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(4, shape[1], generator=generator), torch.randn(shape[0], 4, generator=generator)
    save_file(
        {f"{target}.lora_A.weight": a, f"{target}.lora_B.weight": b}, path / "adapter_model.safetensors"
    )
    (path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "bias": "none", **config}))
    return a, b


def test_an_adapter_adds_its_product_to_its_weights_and_to_no_other(folder: Path, tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.up_proj"
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    a, b = write_adapter(tmp_path / "adapter", f"base_model.model.{name}", (48, 32))
    merge_adapter(model, tmp_path / "adapter")
    for key, value in model.state_dict().items():
        expected = before[key] + 2.0 * (b @ a) if key == f"{name}.weight" else before[key]
        assert torch.equal(value, expected), key
    plain = TransformersJudge.load(str(folder))
    adapted = TransformersJudge.load(str(folder), adapter=tmp_path / "adapter")
    assert adapted.name == "adapter" and adapted.fingerprint != plain.fingerprint


def test_adapters_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    write_adapter(tmp_path / "other", "base_model.model.model.layers.9.up_proj", (48, 32))
    with pytest.raises(UserError, match=r"'base_model\.model\.model\.layers\.9\.up_proj' has no place"):
        merge_adapter(tiny_model(), tmp_path / "other")
    write_adapter(tmp_path / "dora", "base_model.model.x", (48, 32), use_dora=True)
    with pytest.raises(UserError, match="more than a plain LoRA"):
        merge_adapter(tiny_model(), tmp_path / "dora")
    with pytest.raises(UserError, match="no such file"):
        merge_adapter(tiny_model(), tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be had"):
        TransformersJudge.load(str(tmp_path / "absent"))
