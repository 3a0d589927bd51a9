"""Preparation: only readable images of a useful size and captions of a useful length pass, fitted to a square."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import ExifTags, Image

from base.config import UserError
from data.samples.images import MAX_PIXELS, decode_image, fit_square
from data.shards import Sample
from data.sources.base import BadItemError
from data.sources.prepare import Preparation


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth, with a different corner each."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([255 * x / width, 255 * y / height, 255 - 255 * x / width], axis=2)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def make(image: Image.Image | bytes, part: str = "png", **meta: Any) -> Sample:
    payload = image if isinstance(image, bytes) else encoded(image, {"jpg": "jpeg"}.get(part, part))
    return Sample("a", {part: payload, "json": json.dumps(meta, sort_keys=True).encode()})


def reason(preparation: Preparation, sample: Sample) -> str:
    with pytest.raises(BadItemError) as error:
        preparation(sample)
    assert error.value.key == sample.key
    return error.value.reason


MODES = {"png": ("RGB", "L", "RGBA", "P"), "jpg": ("RGB", "L", "CMYK"), "webp": ("RGB", "RGBA")}


@pytest.mark.parametrize("part, mode", [(part, mode) for part, modes in MODES.items() for mode in modes])
def test_image_of_the_asked_size_keeps_its_own_bytes(part: str, mode: str) -> None:
    sample = make(picture(32, 32, mode), part, caption="a cat")
    for preparation in (Preparation(), Preparation(resolution=32)):
        assert preparation(sample).parts == sample.parts


@pytest.mark.parametrize("encoding, suffix", [("png", "png"), ("webp", "webp"), ("jpeg", "jpg")])
def test_other_sizes_are_fitted_as_training_would(encoding: Any, suffix: str) -> None:
    image = picture(100, 70)
    fitted = Preparation(resolution=32, encoding=encoding)(make(image, caption="a", width=1))
    assert sorted(fitted.parts) == sorted(["json", suffix])
    assert json.loads(fitted.parts["json"]) == {"caption": "a", "width": 100, "height": 70}
    expected = np.asarray(fit_square(image, 32)).astype(int)
    error = np.abs(np.asarray(decode_image(fitted, suffix)).astype(int) - expected)
    assert error.max() <= (8 if encoding == "jpeg" else 0)  # JPEG 95 of a smooth image
    if encoding == "jpeg":
        assert Image.open(io.BytesIO(fitted.parts["jpg"])).layer[0][1:3] == (1, 1)  # 4:4:4


def test_preparing_twice_changes_nothing_more() -> None:
    preparation = Preparation(resolution=32)
    once = preparation(make(picture(100, 70), caption="a"))
    assert preparation(once).parts == once.parts


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_taken_sideways_are_turned_upright(orientation: int) -> None:
    upright = picture(48, 32)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # Pillow's number of the inverse turn
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    sample = make(encoded(stored, "png", exif=exif), caption="a")
    turned = Preparation(encoding="png")(sample)
    assert np.array_equal(decode_image(turned, "png"), upright)
    assert (turned.parts == sample.parts) == (orientation == 1)
    assert not Image.open(io.BytesIO(turned.parts["png"])).getexif() or orientation == 1
    fitted = Preparation(resolution=16, encoding="png")(sample)
    assert np.array_equal(decode_image(fitted, "png"), fit_square(upright, 16))
    assert json.loads(fitted.parts["json"])["width"] == 48


def test_damaged_camera_notes_do_not_reject_a_sound_photograph() -> None:
    sample = make(encoded(picture(32, 32), "jpeg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(9)), "jpg")
    assert Preparation()(sample).parts["jpg"] == sample.parts["jpg"]


def test_grey_of_sixteen_bits_keeps_its_shades() -> None:
    ramp = np.linspace(0, 65535, 40 * 40).astype(np.uint16).reshape(40, 40)
    sample = make(encoded(Image.fromarray(ramp)), caption="a")
    expected = np.rint(ramp / 257).astype(int)
    assert np.array_equal(np.asarray(decode_image(sample, "png"))[..., 0], expected)
    fitted = Preparation(resolution=20, encoding="png")(sample)
    assert np.array_equal(
        decode_image(fitted, "png"), fit_square(Image.fromarray(expected.astype(np.uint8)).convert("RGB"), 20)
    )


def test_parts_are_named_by_what_the_file_is() -> None:
    """ImageNet has a PNG named .JPEG."""
    payload = encoded(picture(32, 32))
    assert Preparation()(make(payload, "jpg", label=3)).parts["png"] == payload


def test_unreadable_images_are_rejected() -> None:
    whole = encoded(picture(64, 64), "jpeg")
    gif = encoded(picture(64, 64), "gif")
    for payload in (whole[: len(whole) // 2], whole[:20], b"", b"<html>", gif):
        assert reason(Preparation(), make(payload, "jpg")).startswith("unreadable image: 'jpg': ")
    assert reason(Preparation(), make(gif, "jpg")) == reason(Preparation(), make(gif, "jpg"))
    assert "0x" not in reason(Preparation(), make(b"<html>", "jpg")), (
        "an address makes every run's bytes differ"
    )


def test_decompression_bombs_are_rejected_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(Image.new("1", (MAX_PIXELS // 8192, 8193)))
    assert len(bomb) < 100_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    assert "over the limit" in reason(Preparation(), make(bomb))


def test_long_thin_image_is_rejected_before_it_takes_all_memory() -> None:
    bomb = make(Image.new("L", (60_000, 2)), caption="a")
    assert reason(Preparation(resolution=256, min_px=1), bomb).startswith(
        "aspect: 'png': 60000x2 px would be"
    )
    assert Preparation()(bomb).parts == bomb.parts


@pytest.mark.parametrize(
    "preparation, size, kind",
    [
        (Preparation(min_px=33), (32, 90), "too small: 'png' has 32x90 px, the shorter side must have 33"),
        (
            Preparation(resolution=33),
            (90, 32),
            "too small: 'png' has 90x32 px, the shorter side must have 33",
        ),
        (
            Preparation(max_aspect=2),
            (32, 65),
            "aspect: 'png' has 32x65 px, sides may differ by a factor of 2",
        ),
    ],
)
def test_images_of_no_use_are_rejected(preparation: Preparation, size: tuple[int, int], kind: str) -> None:
    assert reason(preparation, make(picture(*size), caption="a")) == kind


def test_limits_are_included_and_enlarging_can_be_allowed() -> None:
    assert Preparation(min_px=32, max_aspect=2)(make(picture(32, 64))).parts
    enlarged = Preparation(resolution=64, min_px=1)(make(picture(32, 40)))
    assert decode_image(enlarged, "jpg").size == (64, 64)


@pytest.mark.parametrize(
    "meta, kept",
    [
        ({"caption": " one two "}, {"caption": "one two"}),
        ({"captions": ["one", "one two", "one two three four"]}, {"captions": ["one two"]}),
        ({"captions": {"alt": "one", "llava": "one two"}}, {"captions": {"llava": "one two"}}),
        (
            {"instructions": ["one", "one two"], "task": "style"},
            {"instructions": ["one two"], "task": "style"},
        ),
        ({"label": 3}, {"label": 3}),
        ({"label": 3, "caption": None}, {"label": 3}),
        ({"caption": "smile \ud83d", "aesthetic": float("nan")}, {"caption": "smile ?", "aesthetic": None}),
        ({"captions": {"alt": "one", "llava": "smile \ud83d"}}, {"captions": {"llava": "smile ?"}}),
        ({"captions": [["one two"], 3, "one two"]}, {"captions": ["one two"]}),
    ],
)
def test_captions_of_other_lengths_are_dropped_while_one_is_left(
    meta: dict[str, Any], kept: dict[str, Any]
) -> None:
    preparation = Preparation(min_words=2, max_words=3, max_letters=20)
    assert json.loads(preparation(make(picture(8, 8), **meta)).parts["json"]) == kept


@pytest.mark.parametrize(
    "meta",
    [
        {"caption": "one"},
        {"caption": None},
        {"captions": []},
        {"captions": {"alt": "a b c d"}},
        {"caption": 5},
    ],
)
def test_sample_without_a_caption_of_good_length_is_rejected(meta: dict[str, Any]) -> None:
    preparation = Preparation(min_words=2, max_words=3)
    assert reason(preparation, make(picture(8, 8), **meta)).startswith("caption length: ")
    assert reason(Preparation(min_letters=4), make(picture(8, 8), caption="one")).startswith("caption length")


def edit(source: Image.Image, target: Image.Image) -> Sample:
    parts = {"source.png": encoded(source), "target.png": encoded(target)}
    return Sample("a", {**parts, "json": b'{"instructions": ["turn it"]}'})


def test_edits_stay_aligned_and_are_refused_where_they_cannot() -> None:
    source = picture(100, 70)
    target = source.resize((200, 141))  # within 1 %
    fitted = Preparation(resolution=32, encoding="png")(edit(source, target))
    images = [np.asarray(decode_image(fitted, f"{role}.png")).astype(int) for role in ("source", "target")]
    assert np.abs(images[0] - images[1]).mean() < 2  # of 255; one pixel off would be 8 at this slope
    assert json.loads(fitted.parts["json"])["width"] == 200
    assert reason(Preparation(), edit(source, picture(100, 75))) == "sizes differ: 100x70 and 100x75 px"


def test_only_images_that_show_the_same_must_have_one_shape() -> None:
    wide, square = encoded(picture(100, 70)), encoded(picture(80, 80))
    instruction = b'{"instructions": ["put them together"]}'

    def sample(*roles: str) -> Sample:
        parts = {f"{role}.png": square if role.endswith("1") else wide for role in roles}
        return Sample("a", {**parts, "json": instruction})

    preparation = Preparation(resolution=32, encoding="png")
    for roles in (("source0", "source1", "target"), ("image0", "image1")):
        fitted = preparation(sample(*roles))
        assert all(decode_image(fitted, f"{role}.png").size == (32, 32) for role in roles)
    assert reason(preparation, sample("source", "target0", "target1")).startswith("sizes differ: ")


@pytest.mark.parametrize(
    "parts, kind",
    [
        ({"json": b"{}"}, "no image: "),
        ({"png": encoded(picture(8, 8)), "jpg": encoded(picture(8, 8), "jpeg")}, "unclear images: "),
        ({"png": encoded(picture(8, 8)), "json": b"{"}, "bad json: "),
        ({"png": encoded(picture(8, 8)), "json": b"[]"}, "bad json: "),
        ({"png": encoded(picture(8, 8)), "json": b'{"a": ' * 100_000}, "bad json: "),
        (
            {"png": encoded(picture(8, 8)), "json": b'{"caption": ' + b"[" * 600 + b"]" * 600 + b"}"},
            "caption length: ",
        ),
    ],
)
def test_samples_that_say_nothing_clear_are_rejected(parts: dict[str, bytes], kind: str) -> None:
    assert reason(Preparation(resolution=4), Sample("a", parts)).startswith(kind)


@pytest.mark.parametrize(
    "settings",
    [
        {"resolution": 0},
        {"min_px": -1},
        {"max_aspect": 0.5},
        {"max_aspect": float("nan")},
        {"min_words": 5, "max_words": 4},
        {"encoding": "gif"},
    ],
)
def test_settings_that_nothing_passes_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(reversed(settings))):
        Preparation(**settings)


def test_fitted_bytes_belong_to_the_version_that_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted, kept = Preparation(resolution=256).description, Preparation(min_px=256).description
    assert f"Pillow {PIL.__version__}" in fitted
    monkeypatch.setattr(PIL, "__version__", "99.0")
    assert Preparation(resolution=256).description != fitted
    assert Preparation(min_px=256).description == kept


def test_description_tells_settings_apart() -> None:
    settings: list[dict[str, Any]] = [
        {},
        {"resolution": 256},
        {"min_px": 256},
        {"max_aspect": 2},
        {"min_words": 3},
        {"max_words": 3},
        {"min_letters": 3},
        {"max_letters": 3},
        {"resolution": 256, "encoding": "png"},
    ]
    assert len({Preparation(**setting).description for setting in settings}) == len(settings)
