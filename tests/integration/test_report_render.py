"""The report as a browser shows it."""

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base import files
from data.image_set import Item, write_image, write_manifest
from evaluation.runner import evaluate
from evaluation.suites.reconstruction import ReconstructionSuite
from report import render_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WIDTH, HEIGHT = 1280, 1600
MAGENTA = (255, 0, 255)  # of the originals; nothing else on the page has this colour

pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")


def browse(page: Path, profile: Path, *flags: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", f"--window-size={WIDTH},{HEIGHT}", *flags]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained the tokenizer and scored its reconstructions, and nothing more."""
    root = tmp_path_factory.mktemp("run")
    images = root / "evaluation/images/reconstruction"
    original = torch.tensor(MAGENTA, dtype=torch.uint8)[:, None, None].expand(3, 64, 64)
    items = []
    for index in range(4):
        names = {role: f"{index}.{role}.png" for role in ("original", "result")}
        write_image(images / names["original"], original)
        write_image(images / names["result"], original - (original > 0).to(torch.uint8) * 20)
        items.append(Item(str(index), names, {}))
    write_manifest(images, items)
    evaluate(ReconstructionSuite(root / "store"), images, root / "evaluation/reconstruction")
    (root / "pivot").mkdir()
    rows = [{"step": step, "loss": math.exp(-step / 100)} for step in range(1, 300)]
    (root / "pivot/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files.write_json(root / "durations.json", [{"name": "pivot", "seconds": 61.0}])
    return render_report(root)


def test_the_page_shows_its_images_at_twice_their_size(report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(report, tmp_path / "profile", f"--screenshot={shot}")
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    # Colour management may move a level or two.
    shown = (np.abs(pixels - np.array(MAGENTA)).max(2) <= 2).sum()
    # Four originals of 64 px, doubled; the rounded corners take a few of each.
    assert 4 * 128 * 128 * 0.99 < shown <= 4 * 128 * 128
    paper = (pixels == pixels[0, 0]).all(2)
    assert paper[:40].all() and not paper[40:120].all()  # the margin above the title, and the title


def test_the_browser_understands_every_section(report: Path, tmp_path: Path) -> None:
    dom = browse(report, tmp_path / "profile", "--dump-dom")
    for title in ("Reconstructions", "Text-to-image", "Editing", "Training", "Time", "Environment"):
        assert f"<h2>{title}</h2>" in dom
    assert dom.count("<img") == 8 and dom.count("No images yet.") == 2
    assert "stroke: var(--accent)" in dom and "CC-BY 4.0" in dom
    assert "✓ reached" in dom and "not yet" in dom
