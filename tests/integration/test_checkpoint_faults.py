"""What a training does when a checkpoint is damaged, the disk is full, a signal comes, or several averages are kept."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch


@pytest.fixture
def toy(start_ranks):
    """toy(run, *arguments, ranks=1): exit codes and what was printed."""

    def finish(run, *arguments, ranks=1):
        processes, output = begin(run, *arguments, ranks=ranks)
        for process in processes:
            process.join(200)
        return {process.exitcode for process in processes}, output.read_text()

    def begin(run, *arguments, ranks=1):
        output = run.with_suffix(f".{len(list(run.parent.glob('*.log')))}.log")
        return start_ranks("toy_train.py", ["--run", run, *arguments], ranks, output), output

    finish.begin = begin
    return finish


def weights(folder):
    return torch.load(folder / "model.pt", weights_only=True)


def assert_equal(expected, actual):
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


def test_a_damaged_checkpoint_is_passed_over_and_nothing_else_changes(toy, tmp_path):
    assert toy(tmp_path / "whole", ranks=2)[0] == {0}
    run = tmp_path / "run"
    assert toy(run, "--kill-after", 7, ranks=2)[0] == {-signal.SIGKILL}
    path = run / "checkpoints" / "step_00000006" / "rank_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    codes, text = toy(run, ranks=2)
    assert codes == {0}, text
    assert text.count("is damaged: rank_00001.safetensors has a wrong checksum; taking the one before") == 1
    assert "resumed at step 3/8" in text
    assert_equal(weights(tmp_path / "whole" / "export"), weights(run / "export"))


def test_a_checkpoint_from_before_the_first_taken_step_has_no_moments_and_is_good(toy, tmp_path):
    arguments = ("--poison-step", 0, "--checkpoint-every", 1)
    assert toy(tmp_path / "whole", *arguments)[0] == {0}
    run = tmp_path / "run"
    assert toy(run, *arguments, "--kill-after", 1)[0] == {-signal.SIGKILL}
    codes, text = toy(run, *arguments)
    assert codes == {0} and "resumed at step 1/8" in text
    assert_equal(weights(tmp_path / "whole" / "export"), weights(run / "export"))


def test_writing_in_the_background_changes_no_bit(toy, tmp_path):
    for name, arguments in (("waits", ()), ("goes_on", ("--async-checkpoint",))):
        assert toy(tmp_path / name, "--checkpoint-every", 2, *arguments, ranks=2)[0] == {0}
    assert_equal(weights(tmp_path / "waits" / "export"), weights(tmp_path / "goes_on" / "export"))
    folders = [sorted((tmp_path / name / "checkpoints").glob("step_*")) for name in ("waits", "goes_on")]
    last = [folder[-1] for folder in folders]
    assert [path.name for path in last] == ["step_00000008"] * 2
    for rank in range(2):
        name = f"rank_{rank:05d}.safetensors"
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_the_step_under_way_on_all(toy, tmp_path, number):
    run = tmp_path / "run"
    arguments = ("--steps", 100_000, "--checkpoint-every", 50_000, "--async-checkpoint")
    processes, output = toy.begin(run, *arguments, ranks=2)
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size == 0:
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes)
        time.sleep(0.01)
    os.kill(processes[1].pid, number)
    for process in processes:
        process.join(100)
    text = output.read_text()
    assert [process.exitcode for process in processes] == [2, 2], text[-3000:]
    (folder,) = (run / "checkpoints").glob("step_*")
    step = int(folder.name.removeprefix("step_"))
    assert f"stopped by a signal at step {step}, saved" in text
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == step, "one step at most lies between the signal and the save"


@pytest.mark.parametrize(("zero", "ranks"), [(1, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_every_average_is_the_one_that_a_run_of_its_own_would_keep(toy, tmp_path, zero, ranks):
    arguments = ("--zero", zero, "--no-adversary")
    assert toy(tmp_path / "both", *arguments, "--ema", 0.9, 0.2, ranks=ranks)[0] == {0}
    for decay, folder in ((0.9, "export"), (0.2, "export_ema_0.2")):
        alone = tmp_path / str(decay)
        assert toy(alone, *arguments, "--ema", decay, ranks=ranks)[0] == {0}
        assert_equal(weights(alone / "export"), weights(tmp_path / "both" / folder))
    first, second = (weights(tmp_path / "both" / name) for name in ("export", "export_ema_0.2"))
    assert not torch.equal(first["0.weight"], second["0.weight"])


@pytest.mark.slow
def test_an_export_under_zero_3_has_the_weights_of_one_under_zero_1(toy, tmp_path):
    """20,000 hidden units: DeepSpeed keeps parameters of less than 100,000 values whole on every rank."""
    arguments = ("--no-adversary", "--hidden", 20_000, "--steps", 4, "--checkpoint-every", 1)
    assert toy(tmp_path / "one", *arguments, "--zero", 1, ranks=2)[0] == {0}
    run = tmp_path / "three"
    assert toy(run, *arguments, "--zero", 3, "--kill-after", 2, ranks=2)[0] == {-signal.SIGKILL}
    codes, text = toy(run, *arguments, "--zero", 3, ranks=2)
    assert codes == {0} and "resumed at step 2/4" in text
    expected, actual = weights(tmp_path / "one" / "export"), weights(run / "export")
    for name, value in expected.items():
        assert actual[name].shape == value.shape
        # AdamW's first steps divide by moments near zero, so that a rounding of the gradient's sums shows.
        assert torch.allclose(actual[name], value, rtol=1e-3, atol=1e-4), (actual[name] - value).abs().max()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB; needs the right to mount one."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_loses_no_checkpoint_and_the_run_goes_on_when_there_is_room(toy, tmp_path, small_disk):
    run = tmp_path / "run"
    assert toy(run, "--kill-after", 4)[0] == {-signal.SIGKILL}
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2 << 20))
    codes, text = toy(run)
    assert codes == {2}, text
    assert text.count("WARNING: the checkpoint of step 6 could not be saved") == 1
    assert "error: the checkpoint of step 8 could not be saved" in text and "0.00 GiB are free there" in text
    assert [path.name for path in small_disk.glob("step_*")] == ["step_00000003"]
    filler.unlink()
    codes, text = toy(run)
    assert codes == {0} and "resumed at step 3/8" in text
    assert toy(tmp_path / "whole")[0] == {0}
    assert_equal(weights(tmp_path / "whole" / "export"), weights(run / "export"))
