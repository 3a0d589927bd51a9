"""The trained linear probe and its suite, and DINOv2's published head on a tiny model with random weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from base.config import ConfigError, UserError
from data.image_set import Item, write_image, write_manifest
from evaluation.features.representation import RepresentationFeatures, last_tokens
from evaluation.linear_head import HEADS, HeadClassifier, LinearHead, prepare
from evaluation.metrics.probe import LinearProbe, accuracy, fit
from evaluation.runner import evaluate
from evaluation.suites.linear_probe import LinearProbeSuite, ranked
from tokenizer.config import RepresentationConfig
from tokenizer.representation import Representation

SIZES: dict[str, int | float | bool | str] = {"depth": 2, "embed_dim": 24, "num_heads": 2}


class ProbeClassifier:
    """A probe of evaluation.metrics.probe on the features it was fitted to; implements Classifier."""

    def __init__(self, features: RepresentationFeatures, probe: LinearProbe) -> None:
        self._features, self._probe = features, probe
        self.num_classes = len(probe.bias)
        self.fingerprints = {"encoder": features.fingerprint, "head": probe.fingerprint}
        self.protocol: Mapping[str, Any] = {
            "features": dict(features.protocol),
            "head": f"multinomial logistic regression, standardised features, l2 {probe.l2}",
        }

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 [3, H, W] of one size -> int64 [B, R]."""
        return ranked(self._probe.logits(self._features(torch.stack(list(images)))))


def clusters(num: int, num_classes: int, seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Gaussian clusters in 8 dimensions of very different scale; features [N, 8], labels [N]."""
    centres = 4 * torch.randn(num_classes, 8, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    noise = spread * torch.randn(num, 8, generator=generator)
    return (centres[labels] + noise) * torch.logspace(-3, 3, 8) + 5.0, labels


def tiny_model(input_px: int = 224, name: str = "vit_tiny_patch16_224") -> Representation:
    torch.manual_seed(0)
    sizes = {**SIZES, "img_size": input_px, "patch_size": input_px // 4}
    return Representation(
        RepresentationConfig(name=name, input_px=input_px, weights="random", overrides=sizes)
    )


def test_separable_classes_are_told_apart_on_images_never_seen() -> None:
    probe = fit(*clusters(300, 5, seed=0, spread=0.3), num_classes=5)
    estimate = accuracy(probe, *clusters(200, 5, seed=1, spread=0.3))
    assert estimate.mean == 1.0 and estimate.n == 200 and 0.95 < estimate.low < 1.0


def test_features_without_information_give_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2000, 4, generator=generator)
    labels = torch.randint(2, (2000,), generator=generator)
    estimate = accuracy(fit(features[:1000], labels[:1000], 2), features[1000:], labels[1000:])
    assert abs(estimate.mean - 0.5) < 0.08  # five standard deviations of 1000 coins


def test_the_scale_of_a_feature_does_not_matter() -> None:
    features, labels = clusters(200, 4, seed=2, spread=2.0)
    plain = fit(features, labels, 4)
    scaled = fit(features * torch.logspace(2, -2, 8) - 7.0, labels, 4)
    # fp32 features, scaled and shifted, are not exactly the same numbers.
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=1e-3, atol=1e-3)


def test_the_probe_is_a_function_of_its_data() -> None:
    features, labels = clusters(100, 3, seed=3, spread=2.0)
    first = fit(features, labels, 3)
    torch.rand(5)  # the global generator moves on
    assert fit(features, labels, 3).fingerprint == first.fingerprint
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = fit(features[order], labels[order], 3)
    # Gradients below 1e-7 and a curvature of at least l2 = 1e-3 leave 1e-4 in W.
    torch.testing.assert_close(shuffled.weight, first.weight, rtol=0, atol=1e-4)


def test_a_feature_that_is_constant_does_no_harm() -> None:
    features, labels = clusters(100, 3, seed=4, spread=0.3)
    features[:, 2] = 1.0
    probe = fit(features, labels, 3)
    assert accuracy(probe, features, labels).mean == 1.0
    assert bool(probe.weight.isfinite().all()) and float(probe.weight[:, 2].abs().max()) < 1e-6


def test_bad_labels_and_features_are_one_clear_line() -> None:
    features, labels = clusters(10, 3, seed=0, spread=1.0)
    with pytest.raises(UserError, match="labels run from 0 to 3; expected 0 to 1"):
        fit(features, torch.tensor([0, 3] * 5), num_classes=2)
    features[0, 0] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        fit(features, labels, 3)


def image_set(directory: Path, levels: list[int], labels: list[object]) -> Path:
    items = []
    for index, (level, label) in enumerate(zip(levels, labels, strict=True)):
        write_image(directory / f"{index}.png", torch.full((3, 32, 32), level, dtype=torch.uint8))
        items.append(Item(str(index), {"original": f"{index}.png"}, {"label": label}))
    write_manifest(directory, items)
    return directory


def test_probe_suite_scores_an_encoder_with_wilsons_interval(tmp_path: Path) -> None:
    features = RepresentationFeatures("tiny", tiny_model(32))
    levels = torch.arange(0, 250, 10, dtype=torch.uint8)
    vectors = features(levels[:, None, None, None].expand(-1, 3, 32, 32))
    probe = fit(vectors, (levels > 120).long(), num_classes=2, l2=1e-6)
    images = image_set(tmp_path / "images", [5, 15, 235, 245], [0, 0, 1, 0])
    scores = evaluate(
        LinearProbeSuite(ProbeClassifier(features, probe), tmp_path / "store"), images, tmp_path / "out"
    )
    assert scores["scores"]["top1"]["mean"] == 0.75 and scores["scores"]["top1"]["low"] < 0.5
    assert scores["scores"]["top5"]["mean"] == 1  # there are but two classes
    assert scores["fingerprints"] == {"encoder": features.fingerprint, "head": probe.fingerprint}
    lines = [json.loads(line) for line in (tmp_path / "out/per_item.jsonl").read_text().splitlines()]
    assert [line["detail"]["predicted"] for line in lines] == [0, 0, 1, 1]


def test_top_five_are_the_largest_logits_in_order() -> None:
    assert ranked(torch.tensor([[0.0, 3.0, 1.0, 2.0, 6.0, 5.0, 4.0]])).tolist() == [[4, 5, 6, 1, 3]]


def test_a_label_that_is_no_integer_is_named(tmp_path: Path) -> None:
    features = RepresentationFeatures("tiny", tiny_model(32))
    probe = fit(torch.randn(4, 24), torch.tensor([0, 1, 0, 1]), 2)
    images = image_set(tmp_path / "images", [5], ["dog"])
    with pytest.raises(UserError, match=r"item '0': meta\.label must be an integer, not 'dog'"):
        evaluate(
            LinearProbeSuite(ProbeClassifier(features, probe), tmp_path / "store"), images, tmp_path / "out"
        )


def published(tmp_path: Path, width: int) -> tuple[Path, Path]:
    """Files as they are published: the head's .pth, the pretrained model's safetensors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    torch.save({"weight": normal(1000, 2 * width), "bias": normal(1000)}, tmp_path / "head.pth")
    save_file(
        {"norm.weight": normal(width), "norm.bias": normal(width), "cls_token": normal(1)},
        tmp_path / "model.safetensors",
    )
    return tmp_path / "head.pth", tmp_path / "model.safetensors"


def test_the_head_reads_class_and_mean_patch_token_after_the_restored_norm(tmp_path: Path) -> None:
    head_path, model_path = published(tmp_path, 24)
    head = LinearHead.load("dinov2_vitb14_reg4", str(head_path), str(model_path))
    model = tiny_model(name="vit_base_patch14_reg4_dinov2").eval()
    affine = torch.nn.LayerNorm(24, eps=1e-6)  # the model as published: with its affine
    affine.load_state_dict({"weight": head.norm_weight, "bias": head.norm_bias})
    image = torch.randint(256, (3, 260, 300), dtype=torch.uint8)
    with torch.no_grad():
        pixels_01 = prepare(image)[None].float() / 255
        # Tokens of the last block, from timm itself; the parity test of the model covers what is before.
        blocks_out = {}
        model.vit.norm.register_forward_hook(lambda _, inputs, __: blocks_out.update(x=inputs[0]))
        model(pixels_01)
        tokens = affine(blocks_out["x"])
        linear_in = torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=1)  # 4 registers
        expected = linear_in @ head.weight.T + head.bias
        logits = head(*last_tokens(model, pixels_01))
    # fp32; logits of about 10 from sums over 48 features.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert HeadClassifier(model, head)([image]).tolist() == expected.topk(5, dim=1).indices.tolist()


def test_the_head_scores_images_of_any_sizes(tmp_path: Path) -> None:
    head = LinearHead.load("dinov2_vitb14_reg4", *map(str, published(tmp_path, 24)))
    classifier = HeadClassifier(tiny_model(name="vit_base_patch14_reg4_dinov2"), head)
    pictures = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((40, 60), (300, 230))]
    items = []
    for index, (picture, best) in enumerate(zip(pictures, classifier(pictures).tolist(), strict=True)):
        write_image(tmp_path / "images" / f"{index}.png", picture)
        items.append(Item(str(index), {"original": f"{index}.png"}, {"label": best[4 * index]}))
    write_manifest(tmp_path / "images", items)
    scores = evaluate(LinearProbeSuite(classifier, tmp_path / "store"), tmp_path / "images", tmp_path / "out")
    # The first label is the best class, the second the fifth.
    assert scores["scores"]["top1"]["mean"] == 0.5 and scores["scores"]["top5"]["mean"] == 1
    assert len(scores["protocol"]["input mean"]) == 3  # decides what is seen, and is no weight


def test_the_heads_transform_is_resize_256_and_centre_crop_224() -> None:
    # 512 x 1024: halved to 256 x 512, of which the middle 224 are columns 288..735 of the original.
    image = torch.zeros(3, 512, 1024, dtype=torch.uint8)
    image[:, :, :280] = 255
    image[:, :, 744:] = 255
    assert prepare(image).shape == (3, 224, 224)
    assert int(prepare(image).max()) == 0  # 4 px of bicubic at most reach beyond an edge
    image[:, :, :296] = 255
    assert int(prepare(image)[:, :, 0].min()) > 200


def test_a_head_that_does_not_fit_is_one_clear_line(tmp_path: Path) -> None:
    head_path, model_path = published(tmp_path, 24)
    with pytest.raises(ConfigError, match="no published linear head 'dinov2'; there are dinov2_vits14"):
        LinearHead.load("dinov2")
    with pytest.raises(UserError, match="no linear head"):
        torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
        LinearHead.load("dinov2_vitb14", str(tmp_path / "other.pth"), str(model_path))
    save_file({"cls_token": torch.zeros(1)}, tmp_path / "no_norm.safetensors")
    with pytest.raises(UserError, match=r"no norm\.weight"):
        LinearHead.load("dinov2_vitb14", str(head_path), str(tmp_path / "no_norm.safetensors"))
    wide = LinearHead(torch.ones(32), torch.zeros(32), torch.zeros(1000, 64), torch.zeros(1000))
    with pytest.raises(ConfigError, match="for width 32, the encoder has 24"):
        HeadClassifier(tiny_model(), wide)
    with pytest.raises(ConfigError, match="protocol is 224 px"):
        HeadClassifier(tiny_model(32), LinearHead.load("dinov2_vits14", str(head_path), str(model_path)))
    with pytest.raises(UserError, match="linear head: weight"):
        LinearHead(torch.ones(24), torch.zeros(24), torch.zeros(1000, 5 * 24), torch.zeros(1000))


def test_every_head_has_its_own_address_and_model() -> None:
    assert len(HEADS) == 8 and len({url for url, _ in HEADS.values()}) == 8
    url, model = HEADS["dinov2_vitb14_reg4"]
    assert url.endswith("/dinov2_vitb14/dinov2_vitb14_reg4_linear_head.pth")
    assert model == "vit_base_patch14_reg4_dinov2.lvd142m"
