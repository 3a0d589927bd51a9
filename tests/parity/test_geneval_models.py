"""Mask2Former and CLIP of transformers, tiny and random, through the code that scores GenEval."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F

from base.config import UserError
from data.image_set import Item, write_image, write_manifest
from evaluation.judges.colour import COLOURS, TEMPLATES, ClipColours, masked_crop
from evaluation.judges.detector import (
    NAMES,
    FoundObject,
    Mask2FormerDetector,
    post_process,
    prepare,
)
from evaluation.runner import evaluate
from evaluation.suites.geneval import GenEvalSuite


def tiny_mask2former(num_labels: int = 80) -> Any:
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=12,
        num_labels=num_labels,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def word_tokenizer() -> Any:
    words = sorted(
        {
            word
            for t in TEMPLATES
            for n in NAMES
            for c in COLOURS
            for word in t.format(colour=c, name=n).split()
        }
    )
    words = ["<s>", "<pad>", "<unk>", *words, "</s>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<s>", 0), ("</s>", vocabulary["</s>"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_clip(activation: str = "quick_gelu") -> Any:
    torch.manual_seed(1)
    tokenizer = word_tokenizer()
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "hidden_act": activation,
    }
    vision = {**shared, "image_size": 32, "patch_size": 16, "hidden_act": activation}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return transformers.CLIPModel(config).eval()


@pytest.mark.parametrize(("height", "width"), [(256, 256), (100, 300), (50, 40)])
def test_input_is_resized_padded_and_normalised(height: int, width: int) -> None:
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    x, inside = prepare(image)
    assert x.shape[2] % 32 == x.shape[3] % 32 == 0 and x.shape[2] - inside[0] < 32
    assert min(inside) == 800 or max(inside) == 1333
    assert inside[0] / inside[1] == pytest.approx(height / width, rel=2e-3)  # whole pixels
    assert (x[:, :, inside[0] :] == 0).all() and (x[:, :, :, inside[1] :] == 0).all()
    expected = (image[0, 0, 0] - 123.675) / 58.395
    assert x[0, 0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-5)


def test_post_processing_is_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    classes = torch.randn(3, 81, generator=generator) * 3
    masks = torch.randn(3, 16, 16, generator=generator)
    found = post_process(classes, masks, padded=(64, 64), inside=(48, 64), original=(24, 32))
    assert len(found) == 100
    probabilities = classes.softmax(-1)[:, :80].flatten().numpy()
    for rank in (0, 7, 99):  # in the order of class probability
        place = np.argsort(-probabilities)[rank]
        one = found[rank]
        assert one.name == NAMES[place % 80]
        large = F.interpolate(masks[None, None, place // 80], (64, 64), mode="bilinear")[:, :, :48, :64]
        logits = F.interpolate(large, (24, 32), mode="bilinear")[0, 0]
        inside = logits > 0
        assert torch.equal(one.mask, inside)
        sureness = logits.sigmoid()[inside].mean().item()
        assert one.score == pytest.approx(probabilities[place] * sureness, rel=1e-5)
        rows, columns = np.nonzero(inside.numpy())
        assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def test_a_mask_that_is_nowhere_has_no_score() -> None:
    found = post_process(
        torch.zeros(1, 81), -torch.ones(1, 8, 8), padded=(32, 32), inside=(32, 32), original=(16, 16)
    )
    assert {one.score for one in found} == {0.0} and found[0].box == (0, 0, 0, 0)


def test_detector_reads_raw_logits_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.judges.detector.SHORT_PX", 64)
    model = tiny_mask2former()
    detector = Mask2FormerDetector(model)
    image = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
    found = detector(image)
    x, inside = prepare(image)
    with torch.no_grad():
        output = model(pixel_values=x)
    raw = output.class_queries_logits[0], output.masks_queries_logits[0]
    expected = post_process(*raw, padded=tuple(x.shape[2:]), inside=inside, original=(40, 50))
    assert [(one.name, one.score, one.box) for one in found] == [(o.name, o.score, o.box) for o in expected]
    assert found[0].mask.shape == (40, 50)
    with pytest.raises(UserError, match="a detector of 5 classes"):
        Mask2FormerDetector(tiny_mask2former(5))


def test_the_crop_is_grey_outside_the_mask() -> None:
    image = torch.full((3, 10, 12), 200, dtype=torch.uint8)
    mask = torch.zeros(10, 12, dtype=torch.bool)
    mask[2:5, 3:9] = True
    mask[2, 3] = False
    crop = np.array(masked_crop(image, FoundObject("dog", 0.9, (3.0, 2.0, 9.0, 5.0), mask)))
    assert crop.shape == (3, 6, 3)
    assert (crop[0, 0] == 0x99).all() and (crop[1:] == 200).all()
    blank = Image.new("RGB", (1, 1), "#999")
    assert tuple(crop[0, 0]) == blank.getpixel((0, 0))


def test_colours_are_those_of_clips_own_features() -> None:
    model, tokenizer = tiny_clip(), word_tokenizer()
    namer = ClipColours(model, tokenizer)
    image = torch.randint(256, (3, 32, 32), dtype=torch.uint8)
    whole = FoundObject("dog", 0.9, (0.0, 0.0, 32.0, 32.0), torch.ones(32, 32, dtype=torch.bool))
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    pixels = ((image.float() / 255 - mean) / std)[None]
    scores = []
    with torch.no_grad():
        for colour in COLOURS:
            ids = tokenizer(
                [t.format(colour=colour, name="dog") for t in TEMPLATES], padding=True, return_tensors="pt"
            )
            output = model(
                input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=pixels
            )
            direction = F.normalize(output.text_embeds, dim=1).mean(0)
            scores.append((F.normalize(direction, dim=0) @ F.normalize(output.image_embeds[0], dim=0)).item())
    assert namer(image, [whole]) == [COLOURS[int(np.argmax(scores))]]
    assert namer(image, []) == []


def test_a_clip_without_quick_gelu_is_refused() -> None:
    with pytest.raises(UserError, match="its activation is gelu"):
        ClipColours(tiny_clip("gelu"), word_tokenizer())


def test_models_come_from_folders_and_score_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.judges.detector.SHORT_PX", 64)
    tiny_mask2former().save_pretrained(tmp_path / "detector")
    tiny_clip().save_pretrained(tmp_path / "clip")
    word_tokenizer().save_pretrained(tmp_path / "clip")
    metadata: Mapping[str, Any] = {
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
        "prompt": "a photo of a red dog",
    }
    write_image(tmp_path / "set/0.png", torch.randint(256, (3, 40, 40), dtype=torch.uint8))
    write_manifest(tmp_path / "set", [Item("0", {"result": "0.png"}, metadata)])
    detector = Mask2FormerDetector.load(str(tmp_path / "detector"))
    assert detector.fingerprint != Mask2FormerDetector(tiny_mask2former(), source="x").fingerprint
    suite = GenEvalSuite(detector, ClipColours.load(str(tmp_path / "clip")), tmp_path / "store")
    scores = evaluate(suite, tmp_path / "set", tmp_path / "out")
    assert scores["scores"]["geneval"]["mean"] in (0.0, 1.0)
    with pytest.raises(UserError, match="cannot be had"):
        Mask2FormerDetector.load(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="cannot be had"):
        ClipColours.load(str(tmp_path / "absent"))
