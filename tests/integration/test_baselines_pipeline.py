"""A convolutional VAE where an RPiAE is: encoded to shards, decoded from them; folders reconstructed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from base.team import Team
from data.image_set import ImageSet
from data.samples.text import train_text_tokenizer
from data.shards import Sample, ShardDataset, ShardWriter
from evaluation import reconstruct as reconstruct_module
from evaluation.reconstruct import ReconstructConfig
from evaluation.reconstruct import reconstruct as reconstruct_folder
from evaluation.runner import evaluate
from evaluation.suites.reconstruction import ReconstructionSuite
from helpers.commands import in_process
from launch import reconstruct as command_line
from tokenizer.autoencoders import load_autoencoder
from tokenizer.config import EncodeConfig
from tokenizer.encode import encode_shards
from tokenizer.export import fingerprint
from tokenizer.kl import KlAutoencoder, KlConfig

ROOT = Path(__file__).parents[2]


def picture(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.Generator(np.random.Philox(seed))
    return Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("baselines")
    with torch.random.fork_rng():
        for seed, name in enumerate(("vae", "another")):
            torch.manual_seed(seed)
            KlAutoencoder(KlConfig(32, 4, (32, 32, 64), blocks_per_level=1)).save(root / name)
    return root


@pytest.fixture
def reconstruct(
    exports: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs launch/reconstruct.py in this process; returns the exit status and everything printed."""

    def run(images: Path, out: Path, *extra: str, autoencoder: str = "vae") -> tuple[int, str]:
        paths = ("--autoencoder", exports / autoencoder, "--images", images, "--out", out)
        words = (*paths, "--batch-size", "2", *extra)
        status, printed, errors = in_process(monkeypatch, capsys, *words, main=command_line.main)
        return status, printed + errors

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    (root / "deeper").mkdir(parents=True)
    picture(0).save(root / "a.png")
    picture(1, (90, 50)).save(root / "deeper" / "b.webp", lossless=True)
    picture(2, (40, 64)).save(root / "deeper" / "c.jpg")
    return root


def test_shards_of_a_vae_hold_its_means_and_decode_back(exports: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "pixels", max_samples_per_shard=3, source="test") as writer:
        for number in range(5):
            file = io.BytesIO()
            picture(number).save(file, "png")
            parts = {"png": file.getvalue(), "json": json.dumps({"caption": "a cat"}).encode()}
            writer.write(Sample(f"image-{number}", parts))
    train_text_tokenizer(["a cat", "two dogs beside a small green house"], tmp_path / "text", 400)
    config = EncodeConfig(
        str(exports / "vae"),
        str(tmp_path / "pixels"),
        str(tmp_path / "latents"),
        str(tmp_path / "text"),
        dtype="fp32",
    )
    encode_shards(config, rank=0, world=1, barrier=lambda: None)
    dataset = ShardDataset.open(tmp_path / "latents")
    latent = dataset.manifest.latent
    assert latent is not None and latent.shape == (4, 8, 8)
    assert latent.tokenizer_fingerprint == fingerprint(exports / "vae")
    assert dataset.num_image_tokens.tolist() == [64] * 5
    model = load_autoencoder(exports / "vae")
    stored = [
        torch.frombuffer(bytearray(s.parts["latent"]), dtype=torch.float32) for s in dataset.read(range(5))
    ]
    z = torch.stack(stored).view(5, 4, 8, 8)
    originals = torch.stack([torch.from_numpy(np.array(picture(n))).permute(2, 0, 1) for n in range(5)])
    with torch.no_grad():
        # fp32; only the size of the batches differs.
        torch.testing.assert_close(z, model.encode(originals.float() / 255), atol=1e-5, rtol=1e-5)
        assert model.decode(z).shape == originals.shape


def test_a_folder_becomes_a_set_that_suites_score(
    images: Path, tmp_path: Path, exports: Path, reconstruct: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "out"
    status, printed = reconstruct(images, out, "--save-latents")
    assert status == 0
    items = ImageSet.open(out).items
    assert [item.key for item in items] == ["a", "deeper/b", "deeper/c"]
    assert items[1].images == {"original": "original/deeper/b.png", "result": "result/deeper/b.png"}
    assert items[1].meta == {"file": "deeper/b.webp"}
    model = load_autoencoder(exports / "vae")
    original = ImageSet.open(out).read(items[0], "original")
    assert torch.equal(original, torch.from_numpy(np.array(picture(0))).permute(2, 0, 1))
    latent = torch.from_numpy(np.load(out / "latents" / "a.npy"))
    with torch.no_grad():
        torch.testing.assert_close(
            latent, model.encode(original[None].float() / 255)[0], atol=1e-5, rtol=1e-5
        )
        expected = (model.decode(latent[None]).clamp(0, 1) * 255).to(torch.uint8)[0]
    result = ImageSet.open(out).read(items[0], "result")
    assert int((result.int() - expected.int()).abs().max()) <= 1  # truncation at a level's edge
    scores = evaluate(ReconstructionSuite(tmp_path / "store"), out, tmp_path / "scores", seed=0)["scores"]
    assert f"3 images, PSNR {scores['psnr_db']['mean']:.2f} dB" in printed


def test_a_second_run_writes_only_what_is_missing(
    images: Path, tmp_path: Path, reconstruct: Callable[..., tuple[int, str]]
) -> None:
    out = tmp_path / "out"
    summary = reconstruct(images, out)[1].splitlines()[0]
    kept, lost = out / "result" / "a.png", out / "result" / "deeper" / "c.png"
    written_at, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    status, printed = reconstruct(images, out)
    assert status == 0 and printed.splitlines()[0] == summary  # the mean counts kept images too
    assert kept.stat().st_mtime_ns == written_at and lost.read_bytes() == content
    status, printed = reconstruct(images, out, autoencoder="another")
    assert status == 2 and "by another autoencoder" in printed


def test_unreadable_images_are_named_and_the_others_written(
    images: Path, tmp_path: Path, reconstruct: Callable[..., tuple[int, str]]
) -> None:
    (images / "broken.png").write_bytes(b"no image")
    status, printed = reconstruct(images, tmp_path / "out")
    assert status == 1
    assert f"{images / 'broken.png'}: no readable image" in printed and "1 files could not be read" in printed
    assert len(ImageSet.open(tmp_path / "out").items) == 3


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def teams(world: int) -> list[Team]:
    """Ranks in threads."""
    barrier, values = threading.Barrier(world), [None] * world

    def wait() -> None:
        barrier.wait(timeout=60)

    def gather(rank: int, value: Any) -> list[Any]:
        values[rank] = value
        wait()
        return list(values)

    return [Team(rank, world, wait, partial(gather, rank)) for rank in range(world)]


@pytest.fixture
def many(images: Path) -> Path:
    """Blocks of four: a, b, c, 0; 1, 2, one that cannot be read, 3; 4, 5."""
    for number in range(6):
        picture(10 + number).save(images / f"more{number}.png")
    (images / "more2x.png").write_bytes(b"no image")
    return images


@pytest.mark.parametrize(("world", "shares"), [(2, [6, 4]), (3, [4, 4, 2]), (9, [4, 4, 2])])
def test_ranks_share_a_folder_and_change_no_byte(
    many: Path,
    tmp_path: Path,
    exports: Path,
    world: int,
    shares: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ReconstructConfig(exports / "vae", many, tmp_path / "one", save_latents=True, batch_images=4)
    alone = reconstruct_folder(config)
    capsys.readouterr()
    shared = dataclasses.replace(config, out=tmp_path / "shared")
    with ThreadPoolExecutor(world) as ranks:
        found = list(ranks.map(partial(reconstruct_folder, shared), teams(world)))
    assert tree(tmp_path / "shared") == tree(tmp_path / "one")
    assert found == [alone] * world  # the mean to the last digit
    assert alone.num_images == 9 and len(alone.unreadable) == 1
    printed = capsys.readouterr().err
    assert printed.count("more2x.png: no readable image") == 1  # named by the rank that met it
    assert all(f"rank {rank}: {share} to reconstruct" in printed for rank, share in enumerate(shares))


def test_a_killed_reconstruction_goes_on_to_the_same_bytes(
    many: Path, tmp_path: Path, exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ReconstructConfig(exports / "vae", many, tmp_path / "one", batch_images=4)
    whole = reconstruct_folder(config)
    killed = dataclasses.replace(config, out=tmp_path / "killed")
    seen: list[int] = []
    encode, write_image = KlAutoencoder.encode, reconstruct_module.write_image

    def count(self: KlAutoencoder, pixels_01: torch.Tensor) -> torch.Tensor:
        seen.append(len(pixels_01))
        return encode(self, pixels_01)

    def die(path: Path, pixels: torch.Tensor) -> None:
        if len(tree(tmp_path / "killed")) == 12:  # of the second block, one pair and one original
            raise KeyboardInterrupt
        write_image(path, pixels)

    monkeypatch.setattr(KlAutoencoder, "encode", count)
    monkeypatch.setattr(reconstruct_module, "write_image", die)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_folder(killed)
    monkeypatch.setattr(reconstruct_module, "write_image", write_image)
    assert not (tmp_path / "killed/manifest.jsonl").exists()
    seen.clear()
    assert reconstruct_folder(killed) == whole
    # The torn block goes through as a whole: an image in other company may round differently.
    assert seen == [3, 2] and tree(tmp_path / "killed") == tree(tmp_path / "one")
    seen.clear()
    assert reconstruct_folder(killed) == whole and seen == []  # nothing for the unreadable one's sake


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: picture(4).save(root / "a.jpg"), r"both would become a.png"),
        (lambda root: [path.unlink() for path in root.rglob("*.*")], "holds no image"),
    ],
)
def test_folders_that_cannot_be_reconstructed_are_one_clear_line(
    images: Path,
    tmp_path: Path,
    reconstruct: Callable[..., tuple[int, str]],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(images)
    status, printed = reconstruct(images, tmp_path / "out")
    assert status == 2 and message in printed and len(printed.splitlines()) == 1


@pytest.mark.slow
def test_two_ranks_of_the_launcher_reconstruct_and_score_to_the_bytes_of_one(
    many: Path, tmp_path: Path, exports: Path
) -> None:
    def run(launcher: list[str], script: str, *options: object) -> tuple[int, str]:
        command = [*launcher, str(ROOT / "launch" / script), *map(str, options)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, timeout=300, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    for name in ("one", "two"):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        deepspeed = str(Path(sys.executable).parent / "deepspeed")
        launcher = {"one": [sys.executable], "two": [deepspeed, "--num_gpus", "2", "--master_port", port]}[
            name
        ]
        out = tmp_path / name
        options = [
            "--autoencoder",
            exports / "vae",
            "--images",
            many,
            "--out",
            out / "set",
            "--batch-size",
            4,
        ]
        status, printed = run(launcher, "reconstruct.py", *options)
        assert status == 1 and "1 files could not be read" in printed, printed
        assert printed.count("9 images, PSNR") == 1 and printed.count("no readable image") == 1, printed
        networks = ["--inception", "none", "--vgg16", "none"]
        options = ["--images", out / "set", "--out", out / "scores", *networks]
        status, printed = run(launcher, "evaluate.py", "reconstruction", *options)
        assert status == 0 and printed.count("psnr_db: ") == 1, printed
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
