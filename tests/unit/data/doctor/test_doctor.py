"""The doctor names what training would stumble over, counts what is there, and says whether a launch could start."""

from __future__ import annotations

import html.parser
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from base.config import UserError
from data.config import PackingConfig
from data.doctor.examine_set import Diagnosis, diagnose
from data.doctor.findings import histogram
from data.doctor.readiness import Launch, readiness, sample_lengths
from data.doctor.sample_checks import MAX_GROUPS, OTHERS, Tally, stored_values
from data.packs.packing import EditPacker, T2IPacker
from data.samples.latents import TORCH_DTYPES
from data.shards import LatentInfo, Sample, ShardDataset, shard_name, write_manifest, write_shard
from data.shards.quarantine import Quarantine, add_to_quarantine, read_quarantine
from report.doctor import page, write_page

SOURCE = "test"
CAPTIONS = {"captions": {"alt": "a red square", "llava": "a square of red, on a red ground"}}
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
LATENT = LatentInfo("bf16", (2, 4, 4), (1.0, -2.0), (0.5, 3.0), "autoencoder", "text")


def encoded(pixels: np.ndarray = PICTURE, suffix: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, suffix)
    return buffer.getvalue()


def pixel_sample(key: str, tree: object = CAPTIONS, **parts: bytes) -> Sample:
    images = {name.replace("_", "."): payload for name, payload in parts.items()} or {"png": encoded()}
    return Sample(key, {**images, "json": json.dumps(tree).encode()})


def latent_payload(number: int, latent: LatentInfo = LATENT) -> bytes:
    """Normal values with the mean and deviation that the manifest tells."""
    shape = (latent.num_views, 2 if latent.has_logvar else 1, *latent.shape)
    z = torch.from_numpy(np.random.default_rng(number).standard_normal(shape)).float()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (latent.mean, latent.std))
    stored = (z * std + mean).to(TORCH_DTYPES[latent.dtype])
    return stored.view(torch.uint8).numpy().tobytes()


def write(
    directory: Path,
    shards: Sequence[Sequence[Sample]],
    latent: LatentInfo | None = None,
    num_text_tokens: int = 5,
) -> Path:
    for number, samples in enumerate(shards):
        counts = [
            (16 * sum("latent" in part for part in sample.parts), num_text_tokens if latent else 0)
            for sample in samples
        ]
        write_shard(directory / shard_name(number), samples, counts, source=SOURCE)
    write_manifest(
        directory, [shard_name(number) for number in range(len(shards))], source=SOURCE, latent=latent
    )
    return directory


def in_tables(diagnosis: Diagnosis, title: str) -> dict[str, str]:
    """Rows of one table: first cell -> the others."""
    (table,) = [table for table in diagnosis.tables if table.title.startswith(title)]
    return {row[0]: " ".join(row[1:]) for row in table.rows}


def texts(diagnosis: Diagnosis) -> list[str]:
    return [problem.text for problem in diagnosis.problems]


def test_what_is_there_is_counted(tmp_path: Path) -> None:
    grey = np.repeat(PICTURE[..., :1], 3, axis=-1)
    samples = [
        [pixel_sample("a"), pixel_sample("b", {"caption": "Two words"}, jpg=encoded(suffix="JPEG"))],
        [pixel_sample("c", {"caption": "Two words"}, webp=encoded(grey[:, :16]))],
    ]
    diagnosis = diagnose(write(tmp_path, samples), launch=Launch(num_streams=1))
    assert diagnosis.problems == () and diagnosis.verdict == "no problems"
    assert in_tables(diagnosis, "Parts") == {"json + png": "1", "jpg + json": "1", "json + webp": "1"}
    assert in_tables(diagnosis, "Images") == {"images": "3", "without colour": "1 (33.33 %)"}
    assert in_tables(diagnosis, "Captions") == {
        "caption": "2",
        "captions.alt": "1",
        "captions.llava": "1",
        "repeat an earlier one exactly": "1 (25.00 %)",  # across shards
    }
    found = {one.title: one.summary for one in diagnosis.histograms}
    assert found["Short side of the images, px"] == "min 16, median 16, max 16"
    assert found["Long side of the images, px"] == "min 16, median 24, max 24"
    assert found["Words of a caption"] == "min 2, median 2, max 8"
    assert "samples of 3 different sets of parts" in diagnosis.notes


JPEG = encoded(np.zeros((256, 256, 3), np.uint8) + PICTURE[:1, :1], "JPEG")
BAD_PIXELS = {
    "unreadable image: 'jpg' is no readable image": pixel_sample("bad", jpg=JPEG[: len(JPEG) // 2]),
    "unreadable image: 'png' is no readable image": pixel_sample("bad", png=b"no image"),
    "no image: expected one, or source and target; found none": Sample("bad", {"json": b'{"caption": "a"}'}),
    "no image: expected one, or source and target; found source": pixel_sample("bad", source_png=encoded()),
    "several images: jpg, json, png": pixel_sample("bad", png=encoded(), jpg=encoded(suffix="JPEG")),
    "unequal sizes: source and target have 24x16 px and 16x16 px": pixel_sample(
        "bad", source_png=encoded(), target_png=encoded(PICTURE[:, :16])
    ),
    "no caption: json has no caption, captions, instruction, instructions and no label": pixel_sample(
        "bad", {}
    ),
    "no caption: json has no caption, captions": pixel_sample("bad", {"captions": []}),
    "empty caption: captions.alt": pixel_sample("bad", {"captions": {"alt": " ", "llava": "b"}}),
    "bad caption: caption holds int, not text": pixel_sample("bad", {"caption": 3}),
    "bad caption: caption holds half of a letter": pixel_sample("bad", {"caption": "a \ud83d b"}),
    "empty caption: captions.a?b": pixel_sample("bad", {"captions": {"a\x1bb": ""}}),
    "bad label: 'cat' is no number from 0": pixel_sample("bad", {"label": "cat"}),
    "bad label: -1 is no number from 0": pixel_sample("bad", {"label": -1}),
    "part 'json' is not JSON": Sample("bad", {"png": encoded(), "json": b'{"caption": '}),
    "part 'json' is not": Sample("bad", {"png": encoded(), "json": b"[" * 100_000}),
    "part 'json' is no object": pixel_sample("bad", ["a"]),
}


@pytest.mark.parametrize("reason", BAD_PIXELS, ids=range(len(BAD_PIXELS)))
def test_a_bad_sample_is_named_shown_and_quarantined(tmp_path: Path, reason: str) -> None:
    directory = write(tmp_path, [[pixel_sample("a")], [pixel_sample("b"), BAD_PIXELS[reason]]])
    diagnosis = diagnose(directory)
    (text,) = texts(diagnosis)
    assert text.startswith(f"shard-000001.tar: sample 'bad': {reason}") and "\n" not in text
    keys, shards = diagnosis.lost()
    assert (list(keys), list(shards)) == (["bad"], [])
    assert diagnosis.shown[0].sample.key == "bad"
    assert diagnosis.shown[0].problems == (text,)
    assert {shown.sample.key for shown in diagnosis.shown[1:]} == {"a", "b"}
    write_page(diagnosis, tmp_path / "page.html")
    assert "Samples with problems" in (tmp_path / "page.html").read_text()
    assert text in diagnosis.text()


def test_edits_that_change_nothing_are_counted(tmp_path: Path) -> None:
    other = encoded(255 - PICTURE)
    edits = [
        pixel_sample("a", {"instructions": ["b"], "task": "swap"}, source_png=encoded(), target_png=other),
        pixel_sample("c", {"instructions": ["b"], "task": "env"}, source_png=other, target_png=other),
    ]
    diagnosis = diagnose(write(tmp_path, [edits]))
    assert texts(diagnosis) == []
    assert "1 edits change nothing: source and target are equal" in diagnosis.notes
    assert in_tables(diagnosis, "Tasks") == {"task: env": "1", "task: swap": "1"}


def test_class_balance_and_what_is_wrong_with_it(tmp_path: Path) -> None:
    labels = [(0, "cat"), (0, "cat"), (0, "cat"), (1, "dog"), (4, "emu")]
    sound = [pixel_sample(f"s{i}", {"label": label, "class": name}) for i, (label, name) in enumerate(labels)]
    diagnosis = diagnose(write(tmp_path / "sound", [sound[:2], sound[2:]]))
    assert texts(diagnosis) == []
    assert in_tables(diagnosis, "Classes") == {
        "classes": "3",
        "samples of a class": "1 to 3, median 1",
        "most": "0 cat (3), 1 dog (1), 4 emu (1)",
        "fewest": "4 emu (1), 1 dog (1), 0 cat (3)",
    }
    assert "2 of the labels 0 to 4 have no sample: 2, 3" in diagnosis.notes
    wrong = [pixel_sample("x", {"label": 1, "class": "cow"}), pixel_sample("y", {"label": 5, "class": "cat"})]
    assert texts(diagnose(write(tmp_path / "wrong", [sound, wrong]))) == [
        "labels: 1 stands for several classes: cow, dog",
        "labels: class 'cat' has several: 0, 5",
    ]


# Latents ------------------------------------------------------------------------------------------


def latent_sample(number: int, like: LatentInfo = LATENT, **parts: bytes) -> Sample:
    images = {name.replace("_", "."): payload for name, payload in parts.items()}
    images = images or {"latent": latent_payload(number, like)}
    return Sample(f"s{number:04d}", {**images, "json": json.dumps(CAPTIONS).encode()})


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("num_views", "has_logvar"), [(1, False), (3, True)])
def test_sound_latents_have_no_problems(tmp_path: Path, dtype: str, num_views: int, has_logvar: bool) -> None:
    latent = replace(LATENT, dtype=dtype, num_views=num_views, has_logvar=has_logvar)
    samples = [latent_sample(number, latent) for number in range(60)]
    diagnosis = diagnose(write(tmp_path, [samples[:30], samples[30:]], latent))
    assert texts(diagnosis) == []
    rows = in_tables(diagnosis, "Latents of 60 samples, normalised")
    # 60 * 16 values of unit deviation or more: chance moves the mean by 0.03.
    for row in rows.values():
        mean, deviation = map(float, row.split())
        assert abs(mean) < 0.15 and abs(deviation - 1) < 0.15
    expected = torch.frombuffer(bytearray(samples[0].parts["latent"]), dtype=TORCH_DTYPES[dtype])
    assert (stored_values(samples[0].parts["latent"], latent).reshape(-1) == expected.float().numpy()).all()


def with_value(payload: bytes, value: int) -> bytes:
    """`value`: bits of a bfloat16, put into the last place, which is a log variance where there are any."""
    return payload[:-2] + value.to_bytes(2, "little")


LOGVAR = replace(LATENT, num_views=2, has_logvar=True)
BAD_LATENTS: dict[str, Callable[[], Sample]] = {
    "bad latent: 'latent' has 254 bytes, not 256": lambda: latent_sample(3, latent=latent_payload(3, LOGVAR)[:-2]),
    "bad latent: 'latent' has 1 values that are not finite": lambda: latent_sample(
        3, latent=with_value(latent_payload(3, LOGVAR), 0x7FC0)
    ),
    "bad latent: 'latent' holds one value everywhere": lambda: latent_sample(3, latent=bytes(256)),
    "no latent: expected one, or source and target; found none": lambda: latent_sample(3, png=encoded()),
    "bad index: 16 image tokens, its latents have 32": lambda: latent_sample(
        3, source_latent=latent_payload(3, LOGVAR), target_latent=latent_payload(4, LOGVAR)
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD_LATENTS, ids=range(len(BAD_LATENTS)))
def test_a_bad_latent_is_named(tmp_path: Path, reason: str) -> None:
    samples = [*(latent_sample(number, LOGVAR) for number in range(3)), BAD_LATENTS[reason]()]
    tokens = [(0 if "png" in sample.parts else 16, 5) for sample in samples]
    write_shard(tmp_path / shard_name(0), samples, tokens, source=SOURCE)
    write_manifest(tmp_path, [shard_name(0)], source=SOURCE, latent=LOGVAR)
    diagnosis = diagnose(tmp_path)
    assert texts(diagnosis) == [f"shard-000000.tar: sample 's0003': {reason}"]
    assert "cannot be shown" in page(diagnosis) or "bytes" not in reason


def test_a_channel_off_the_manifests_statistics_is_named(tmp_path: Path) -> None:
    samples = [latent_sample(number) for number in range(40)]
    told = replace(LATENT, mean=(1.0, 2.0), std=(0.5, 3.0))  # truly -2: more than the deviation
    (text,) = texts(diagnose(write(tmp_path / "mean", [samples], told)))
    assert text.startswith("latent statistics: channel 1 has mean -2") and "2 and 3" in text
    told = replace(LATENT, std=(0.2, 3.0))
    (text,) = texts(diagnose(write(tmp_path / "std", [samples], told)))
    assert text.startswith("latent statistics: channel 0 has mean")


def test_values_that_were_not_measured_are_allowed_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.doctor.sample_checks.MEASURED_LATENTS", 2)
    samples = [latent_sample(number) for number in range(40)]
    told = replace(LATENT, mean=(1.0, -1.0))
    diagnosis = diagnose(write(tmp_path, [samples], told))
    assert in_tables(diagnosis, "Latents of 2 samples")
    assert texts(diagnosis) == []


# All of it ----------------------------------------------------------------------------------------


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    shards = [[latent_sample(10 * shard + i) for i in range(10)] for shard in range(5)]
    shards[3][2] = replace(shards[3][2], parts={**shards[3][2].parts, "latent": bytes(64)})
    directory = write(tmp_path, shards, LATENT)
    alone = diagnose(directory, num_shown=8)
    assert len(texts(alone)) == 1 and alone.shown[0].sample.key == "s0032"
    assert diagnose(directory, num_shown=8, num_processes=3) == alone


def test_the_shown_samples_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    samples = [pixel_sample(f"s{i}") for i in range(30)]
    one = diagnose(write(tmp_path / "one", [samples]), num_shown=5)
    many = diagnose(write(tmp_path / "many", [samples[20:], samples[:7], samples[7:20]]), num_shown=5)
    assert [shown.sample for shown in one.shown] == [shown.sample for shown in many.shown]
    assert len(one.shown) == 5 and [shown.sample for shown in one.shown] != samples[:5]


def test_a_shard_that_is_gone_does_not_hide_the_others(tmp_path: Path) -> None:
    samples = [pixel_sample(f"s{i}") for i in range(6)]
    directory = write(tmp_path / "set", [samples[:3], samples[3:5], [*samples[5:], pixel_sample("bad", {})]])
    (directory / shard_name(1)).unlink()
    diagnosis = diagnose(directory, launch=Launch(num_streams=2))
    assert len(texts(diagnosis)) == 2
    keys, shards = diagnosis.lost()
    assert (list(keys), list(shards)) == (["bad"], [shard_name(1)])
    assert in_tables(diagnosis, "Parts") == {"json + png": "5"}
    assert any(note.startswith("launch not looked at: ") for note in diagnosis.notes)


def test_systematic_problems_do_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.doctor.examine_set.MAX_NAMED", 5)
    samples = [pixel_sample(f"s{i}", {}) for i in range(8)]
    diagnosis = diagnose(write(tmp_path, [samples[:3], samples[3:7], samples[7:]]))
    assert diagnosis.num_unnamed == 3 and len(texts(diagnosis)) == 5
    assert "3 more not listed" in diagnosis.text()
    with pytest.raises(UserError, match="too many for a quarantine"):
        diagnosis.lost()


def test_free_text_as_a_kind_is_counted_together() -> None:
    tally, other = Tally(), Tally()
    other.groups.update(f"kind: {i}" for i in range(MAX_GROUPS + 500))
    tally.merge(other, 1)
    assert len(tally.groups) <= MAX_GROUPS + 1
    assert tally.groups[OTHERS] == 500


def test_histograms_count_every_value() -> None:
    counts = {value: 10 + value % 3 for value in range(0, 500, 7)} | {100_000: 1}
    found = histogram("x", counts)
    assert sum(count for _, count in found.bars) == sum(counts.values())
    assert found.summary == "min 0, median 252, max 100,000"
    assert len(found.bars) == 12 and found.bars[-1][0].startswith("from ")
    assert histogram("x", {3: 4}).bars == (("3", 4),)


# Launch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edits", [False, True])
def test_lengths_are_the_packers(tmp_path: Path, edits: bool) -> None:
    parts = {"source_latent": latent_payload(1), "target_latent": latent_payload(2)} if edits else {}
    dataset = ShardDataset.open(write(tmp_path, [[latent_sample(i, **parts) for i in range(3)]], LATENT))
    packer_class = EditPacker if edits else T2IPacker
    packer = packer_class(PackingConfig(100), LATENT, SimpleNamespace(fingerprint="text"))
    assert sample_lengths(dataset).tolist() == packer.lengths(dataset).tolist()


def test_a_launch_that_cannot_work_is_named(tmp_path: Path) -> None:
    dataset = ShardDataset.open(write(tmp_path, [[latent_sample(i) for i in range(6)]], LATENT))
    launch = Launch(num_ranks=5, num_streams=4, tokens_per_pack=20, max_side=2)
    ranks, side, budget = readiness(dataset, launch).problems
    assert ranks.startswith("5 ranks, but 4 streams")
    assert side.startswith("latents of 4x4 do not fit max_side 2")
    assert budget.startswith("6 samples are longer than a pack of 20 tokens, the first is 's0000' with 25")
    (streams,) = readiness(dataset, Launch(num_streams=8)).problems
    assert streams.startswith("6 samples cannot feed 8 streams")
    (note,) = readiness(dataset, Launch(num_ranks=2, num_streams=3)).notes
    assert note.startswith("3 streams on 2 ranks")
    diagnosis = diagnose(tmp_path, launch=launch)
    assert diagnosis.num_problems == 3 and diagnosis.lost() == ({}, {})


def test_an_epoch_is_told_in_steps(tmp_path: Path) -> None:
    """Without remainders the estimate is exact: 4 streams of 10 samples of 25 tokens, 2 to a pack."""
    dataset = ShardDataset.open(write(tmp_path, [[latent_sample(i) for i in range(40)]], LATENT))
    facts = dict(readiness(dataset, Launch(num_streams=4, tokens_per_pack=50)).facts)
    assert facts["length of a sample"] == "25 tokens, mean 25.0"
    assert facts["samples of a stream"] == "10"
    assert facts["packs of a stream in an epoch, about"] == "5"
    assert facts["steps of an epoch, about"] == "5"
    assert facts["samples of a step, about"] == "8.0"


def test_pixels_are_counted_in_images(tmp_path: Path) -> None:
    directory = write(tmp_path, [[pixel_sample(f"s{i}") for i in range(8)]])
    rows = in_tables(diagnose(directory, launch=Launch(num_streams=2, images_per_pack=2)), "Launch")
    assert rows["steps of an epoch, about"] == "2"
    with pytest.raises(UserError, match="hold pixels; give the budget as --images-per-pack"):
        diagnose(directory, launch=Launch(tokens_per_pack=5))
    with pytest.raises(UserError, match="num_streams is 0"):
        Launch(num_streams=0)


# Page ---------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Every tag of a page with its attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)>"\' onload=x'


def test_hostile_captions_are_text_on_the_page(tmp_path: Path) -> None:
    trees = [
        {"captions": {HOSTILE: HOSTILE}},
        {"caption": HOSTILE, "task": HOSTILE},
        {"label": 1, "class": HOSTILE},
        {"label": HOSTILE},
    ]
    directory = write(tmp_path / "set", [[pixel_sample(f"s{i}", tree) for i, tree in enumerate(trees)]])
    write_page(diagnose(directory), tmp_path / "page.html")
    parsed = Tags((tmp_path / "page.html").read_text())
    assert parsed.words.count(HOSTILE) >= 5
    assert "script" not in {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert (attributes["src"] or "").startswith("data:image/")
        assert not {"href", "src"} & set(attributes) or tag == "img"


def test_the_page_shows_pixels_and_latents(tmp_path: Path) -> None:
    pixels = Tags(
        page(diagnose(write(tmp_path / "pixels", [[pixel_sample(f"s{i}") for i in range(9)]]), num_shown=4))
    )
    assert sum(tag == "img" for tag, _ in pixels.tags) == 4
    assert "no problems" in pixels.words and "a square of red, on a red ground" in pixels.words
    latents = Tags(
        page(diagnose(write(tmp_path / "latents", [[latent_sample(i) for i in range(9)]], LATENT)))
    )
    assert sum(tag == "img" for tag, _ in latents.tags) == 9


def test_a_long_list_of_captions_is_cut(tmp_path: Path) -> None:
    directory = write(tmp_path, [[pixel_sample("a", {"captions": ["word " * 200] * 9})]])
    words = Tags(page(diagnose(directory))).words
    assert words.count("word") < 4 * 100 and "and 5 more" in words


# Quarantine ---------------------------------------------------------------------------------------


def test_quarantine_is_merged_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    add_to_quarantine(path, {"a": "no caption"}, {shard_name(3): "lost"})
    first = path.read_text()
    assert add_to_quarantine(path, {"a": "another reason"}, {}) == read_quarantine(path)
    assert path.read_text() == first
    add_to_quarantine(path, {"b": "damaged"}, {})
    assert read_quarantine(path) == Quarantine(frozenset({"a", "b"}), frozenset({shard_name(3)}))
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"shard": shard_name(3), "reason": "lost"},
        {"key": "a", "reason": "no caption"},
        {"key": "b", "reason": "damaged"},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "line",
    [
        "key",
        "[]",
        "3",
        '{"key": "a"}',
        '{"reason": "x"}',
        '{"key": "a", "shard": "shard-000000.tar", "reason": "x"}',
        '{"key": "a.b", "reason": "x"}',
        '{"key": 3, "reason": "x"}',
        '{"key": "a", "reason": 3}',
        '{"shard": "../other.tar", "reason": "x"}',
        '{"sample": "a", "reason": "x"}',
    ],
)
def test_a_bad_line_of_a_quarantine_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"key": "a", "reason": "x"}\n\n' + line + "\n")
    for use in (read_quarantine, lambda path: add_to_quarantine(path, {"b": "x"}, {})):
        with pytest.raises(UserError, match=r"quarantine\.jsonl: line 3: expected") as error:
            use(path)
        assert "\n" not in str(error.value)


def test_a_missing_quarantine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no readable quarantine file"):
        read_quarantine(tmp_path / "none.jsonl")
