"""Shared: writers killed again and again, ranks that start quickly, the smallest training."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import random
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.shards import ShardWriter
from engine.distributed import free_port
from helpers.trees import tree
from quickstart.pictures.config import EmojiConfig
from quickstart.pictures.source import EmojiSource
from tokenizer.config import AutoencoderConfig, BridgeConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.rpiae import Autoencoder

NUM_KILLS = 20
END_S, GRACE_S = 300.0, 20.0
MAX_RUNS = 100
Write = Callable[[Path], None]
SCRIPTS = Path(__file__).parent / "scripts"
PRELOADED = [  # with torch's compiler, which DeepSpeed's Muon wants: ten seconds of imports
    "engine.loop",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.bf16_optimizer",
    "torch._inductor.compile_fx",
    "safetensors.torch",
]


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., list[multiprocessing.process.BaseProcess]]:
    """Starts a script of tests/integration/scripts on some ranks, forked from a process that imported everything.

    start_ranks(script name, arguments, number of ranks, file for stdout and stderr) -> their processes, rank order.
    Scripts elsewhere by their whole path.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def start(script: str, arguments: list[str], world: int, output: Path) -> list[Any]:
        port = free_port()
        common = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(SCRIPTS)  # a forked process imports `forked` from there
            forked = importlib.import_module("forked")
            processes = []
            for rank in range(world):
                environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
                target = (str(SCRIPTS / script), list(map(str, arguments)), environment, str(output))
                processes.append(context.Process(target=forked.main, args=target))
                processes[-1].start()
        return processes

    return start


@pytest.fixture(scope="session")
def toy(start_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SimpleNamespace]:
    """toy(run folder, *arguments, ranks=1): runs the toy training to its end; its `returncode` and its `output`.

    As a launcher does: where one rank has failed, the others are given a while and then ended.
    """
    logs = tmp_path_factory.mktemp("logs")

    def launch(run: Path, *arguments: object, ranks: int = 1) -> SimpleNamespace:
        output = logs / f"{len(list(logs.iterdir()))}.log"
        processes = start_ranks("toy_train.py", ["--run", run, *arguments], ranks, output)
        deadline_s = time.monotonic() + END_S
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline_s:
            if any(process.exitcode for process in processes):
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
            time.sleep(0.05)
        for process in processes:
            process.kill()
            process.join()
        status = next((process.exitcode for process in processes if process.exitcode), 0)
        return SimpleNamespace(returncode=status, output=output.read_text())

    return launch


@pytest.fixture
def assert_kills_change_nothing(tmp_path: Path) -> Callable[[Write], None]:
    """Compares folders that a writer left after kills -9 at random moments with one that it wrote undisturbed."""

    def check(write: Write) -> None:
        draws = random.Random(0)
        start_s = time.monotonic()
        assert run(write, tmp_path / "whole", None), "the undisturbed run failed, see its output"
        whole, duration_s = tree(tmp_path / "whole"), time.monotonic() - start_s
        assert "manifest.json" in whole
        num_kills = num_half_done = folder = 0
        for number in range(MAX_RUNS):
            out = tmp_path / f"killed-{folder}"
            if run(write, out, draws.uniform(0, duration_s), whole_group=number % 2 == 0):
                assert tree(out) == whole
                folder += 1
                if num_kills >= NUM_KILLS:
                    break
            else:
                num_kills += 1
                has_shards = any(out.glob("shard-*.json"))
                num_half_done += has_shards and not (out / "manifest.json").exists()
        assert num_kills >= NUM_KILLS, f"{MAX_RUNS} runs, {folder} folders finished"
        assert num_half_done >= NUM_KILLS // 4, "kills with something done and something left to do"

    return check


def run(write: Write, out: Path, kill_after_s: float | None, *, whole_group: bool = True) -> bool:
    """Whether write(out), in a process of its own, ended before it was killed; waits for its children, too."""
    alive, held_open = os.pipe()  # ends when the last process that inherited `held_open` is gone

    def child() -> None:
        os.setpgid(0, 0)
        write(out)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    os.close(held_open)
    process.join(kill_after_s)
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        if whole_group:
            with contextlib.suppress(ProcessLookupError):  # killed before it had a group of its own
                os.killpg(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), "the writer failed, see its output"
    assert select.select([alive], [], [], 30)[0], "a worker outlived its killed parent"
    os.close(alive)
    return process.exitcode == 0


@pytest.fixture(scope="session")
def emoji_shards() -> Callable[..., None]:
    """`emoji_shards(folder, set, number, per_shard)`: the first samples of an emoji set; by default in one shard."""

    def write(folder: Path, name: str, number: int, per_shard: int | None = None) -> None:
        source = EmojiSource(EmojiConfig(), name, number)
        with ShardWriter(folder, max_samples_per_shard=per_shard or number, source="test") as writer:
            for index in range(len(source)):
                writer.write(source.sample(index))

    return write


@pytest.fixture(scope="session")
def tiny_autoencoder() -> Callable[..., Autoencoder]:
    """`tiny_autoencoder(folder, image_px=32)`: untrained, 6 channels on 4 x 4, exported there; always the same."""

    def write(folder: Path, image_px: int = 32) -> Autoencoder:
        patch_px = image_px // 4
        shape = {"img_size": image_px, "patch_size": patch_px, "embed_dim": 48, "depth": 2, "num_heads": 3}
        config = AutoencoderConfig(
            representation=RepresentationConfig(
                name="vit_tiny_patch16_224", input_px=image_px, weights="random", overrides=shape
            ),
            decoder=PixelDecoderConfig(width=32, layers=1, heads=4, mlp_width=64, patch_px=patch_px),
            image_px=image_px,
            bridge=BridgeConfig(latent_channels=6, decoder_layers=1, num_heads=4),
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            autoencoder = Autoencoder(config)
        autoencoder.save(folder)
        return autoencoder

    return write


@pytest.fixture(scope="session")
def tiny_judge(
    emoji_shards: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """`tiny_judge(run_dir, *overrides)`: script and arguments of the quickstart's smallest training, on 40 scenes."""
    shards = tmp_path_factory.mktemp("judge") / "pixels"
    emoji_shards(shards, "scenes-train", 40, 20)

    def arguments(run_dir: Path, *overrides: str) -> list[str]:
        start = ["quickstart/train_judge.py", "--config", "configs/quickstart/judge.yaml"]
        fields = [f"run_dir={run_dir}", f"data.shards={shards}", "pixels.images_per_pack=4"]
        rhythm = ["engine.log_every_steps=1", "engine.checkpoint_every_steps=2", "engine.wandb=disabled"]
        return [*start, *fields, *rhythm, *overrides]

    return arguments
