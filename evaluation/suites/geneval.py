"""GenEval: do images show the objects, numbers, colours and places that their prompts name?

Items carry GenEval's metadata in their meta (`tag`, `include`, `exclude`, `prompt`), as launch/sample.py passes it on
from GenEval's prompt file. Detections and colours, the expensive part, go to a store; the rules then run in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base import files
from data.image_set import ImageSet, Item
from evaluation.judges.colour import ColourNamer
from evaluation.judges.detector import Detector, FoundObject
from evaluation.metrics.geneval import (
    COUNTING_THRESHOLD,
    IMAGES_PER_PROMPT,
    NUM_PROMPTS,
    TAGS,
    THRESHOLD,
    Detection,
    check_metadata,
    coloured,
    verdict,
)
from evaluation.metrics.interval import mean_of_means
from evaluation.runner import Measurement, SetScore
from evaluation.store import Question, RecordStore, config_hash, share

PLAIN_START = "a photo of "
LEAST_STORED = 0.05  # detections below are not stored; the rules need more than 0.3


class GenEvalSuite:
    """Implements Suite, SetSuite and CollectingSuite of evaluation.runner.

    `correct` is a rate over images, grouped by task. `geneval` (with rewritten prompts: `geneval_rewritten`) is
    the mean of the six tasks' rates. Its interval is over prompts, because a prompt's images are not independent.
    """

    name = "geneval"
    roles = ("result",)

    def __init__(self, detector: Detector, colours: ColourNamer, store: Path) -> None:
        self._detector, self._colours, self._store = detector, colours, store
        self.protocol: Mapping[str, Any] = {
            "threshold": f"score > {THRESHOLD}, counting {COUNTING_THRESHOLD}",
            "overall": "mean of the six tasks' rates",
            "detector": dict(detector.protocol),
            "colours": dict(colours.protocol),
        }
        self.fingerprints: Mapping[str, str] = {
            "detector": detector.fingerprint,
            "colours": colours.fingerprint,
        }

    def collect(self, images: ImageSet, items: Sequence[Item], rank: int, world: int) -> None:
        """Computes detections and colours of this rank's images."""
        questions = [self._question(images, item) for item in share(items, rank, world)]
        RecordStore(self._store, rank).answer(questions, f"rank {rank}: detection")

    def measure(self, images: ImageSet, items: Sequence[Item]) -> list[Measurement]:
        """`correct` of every image, with its task as group and the reasons in detail."""
        store = RecordStore(self._store)
        found = []
        for item in items:
            question = self._question(images, item)
            detections = [
                Detection(name, score, tuple(box), colour)
                for name, score, box, colour in store.find(*question.key)
            ]
            correct, reasons = verdict(item.meta, detections)
            seen = [
                f"{one.colour or ''} {one.name} {one.score:.2f}".strip()
                for one in detections
                if one.score > THRESHOLD
            ]
            detail = {"reasons": reasons, "seen": seen}
            found.append(Measurement({"correct": correct}, (item.field("tag"),), detail))
        return found

    def measure_set(self, images: ImageSet, items: Sequence[Item]) -> dict[str, SetScore]:
        """The mean of the tasks, and the share of prompts with a right image."""
        by_prompt: dict[tuple[str, str], list[bool]] = {}
        for item, measured in zip(items, self.measure(images, items), strict=True):
            key = item.field("tag"), files.digest(_metadata(item))
            by_prompt.setdefault(key, []).append(bool(measured.values["correct"]))
        rates = {tag: [sum(r) / len(r) for (t, _), r in by_prompt.items() if t == tag] for tag in TAGS}
        plain = all(str(item.field("prompt")).startswith(PLAIN_START) for item in items)
        overall = mean_of_means([values for values in rates.values() if values])
        absent = [tag for tag, values in rates.items() if not values]
        notes = [f"without {', '.join(absent)}"] if absent else []
        counts = {len(results) for results in by_prompt.values()}
        if len(by_prompt) != NUM_PROMPTS or counts != {IMAGES_PER_PROMPT}:
            images_each = " or ".join(map(str, sorted(counts)))
            notes.append(
                f"{len(by_prompt)} prompts with {images_each} images; GenEval has {NUM_PROMPTS} with 4"
            )
        any_right = [float(any(results)) for results in by_prompt.values()]
        return {
            "geneval" if plain else "geneval_rewritten": SetScore.of(overall, "; ".join(notes)),
            "prompts_with_a_right_image": SetScore(sum(any_right) / len(any_right), len(any_right)),
        }

    def _question(self, images: ImageSet, item: Item) -> Question:
        item.field("tag")
        check_metadata(item.meta, f"item '{item.key}'")  # found before hours of detection
        metadata = {name: item.meta.get(name) for name in ("tag", "include", "exclude")}
        config = config_hash(dict(self.fingerprints), metadata, files.sha256(images.path(item, "result")))
        return Question(item.key, 0, config, lambda: self._detect(images, item))

    def _detect(self, images: ImageSet, item: Item) -> list[list[Any]]:
        """[name, score, box, colour or None] of every object above LEAST_STORED."""
        image = images.read(item, "result")
        objects = [one for one in self._detector(image) if one.score > LEAST_STORED]
        detections = [Detection(one.name, one.score, one.box) for one in objects]
        wanted = {id(one) for one in coloured(item.meta, detections)}
        by_name: dict[str, list[FoundObject]] = {}
        for one, detection in zip(objects, detections, strict=True):
            if id(detection) in wanted:
                by_name.setdefault(one.name, []).append(one)
        colours = {
            id(one): colour
            for group in by_name.values()
            for one, colour in zip(group, self._colours(image, group), strict=True)
        }
        return [[one.name, one.score, list(one.box), colours.get(id(one))] for one in objects]


def _metadata(item: Item) -> dict[str, Any]:
    """The metadata that distinguishes prompts."""
    return {name: item.meta.get(name) for name in ("tag", "include", "exclude", "prompt")}
