"""What a run writes down: numbers, events, the console, wandb; and what its machine tells."""

import errno
import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import pynvml
import pytest
import torch
import wandb

from base.config import UserError
from engine import system
from engine.log_files import JsonLines
from engine.logs import WANDB_KEYS, Console, RunLog, check_wandb
from engine.system import SystemMeter, combine

VALUES = {"loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "samples": 8.0, "samples_per_s": 4.0}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(log: RunLog, *steps: int, loss: float = 0.5) -> None:
    for step in steps:
        log.metrics({**VALUES, "step": step, "loss": loss}, 10, 60.0)


def test_a_line_has_its_time_and_the_length_of_the_run(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "toy", {}, 0, "disabled")
    write(log, 1)
    write(log, 2, loss=math.nan)
    log.close()
    first, second = rows(tmp_path / "metrics.jsonl")
    assert first["num_steps"] == 10 and first["loss"] == 0.5 and second["loss"] is None
    assert 1.6e9 < first["time_s"] <= second["time_s"]


def test_steps_that_are_done_again_stand_once_and_events_all_stay(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "toy", {}, 0, "disabled")
    log.event("start", 0, "10 steps")
    write(log, 1, 2, 3)
    log.event("alarm", 3, "the loss exploded")
    for step in (2, 3):
        log.scores(step, {"generation/fid": 10.0 - step, "generation/kid": math.nan})
    log.rewind(2)
    write(log, 3)
    log.close()
    for name in ("metrics.jsonl", "scores.jsonl", "events.jsonl"):  # killed while it wrote
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 4, "ti')
    log = RunLog(tmp_path, "toy", {}, 2, "disabled")
    log.event("resume", 2, "resumed")
    write(log, 3, 4)
    log.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["kind"] for row in rows(tmp_path / "events.jsonl")] == ["start", "alarm", "resume"]
    (scores,) = rows(tmp_path / "scores.jsonl")
    assert (scores["step"], scores["generation/fid"], scores["generation/kid"]) == (2, 8.0, None)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UserError("stopped by a signal"), "stop", "stopped by a signal"),
        (KeyError("x"), "error", "KeyError: 'x'"),
    ],
)
def test_the_end_of_a_run_is_written_down(tmp_path: Path, error: Exception, kind: str, text: str) -> None:
    log = RunLog(tmp_path, "toy", {}, 0, "disabled")
    log.ended_by(error, 7)
    log.close()
    (event,) = rows(tmp_path / "events.jsonl")
    assert (event["kind"], event["step"], event["text"]) == (kind, 7, text)


def test_a_full_disk_does_not_hide_why_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = RunLog(tmp_path, "toy", {}, 0, "disabled")
    monkeypatch.setattr(log, "event", full)
    log.ended_by(UserError("the disk is full"), 7)
    log.close()


def test_console_lines_stand_in_columns() -> None:
    console = Console()
    lines = [
        console.text(
            {**VALUES, "step": step, "loss": loss, "grad_norm": norm, "samples_per_s": rate}, 5000, eta_s
        )
        for step, loss, norm, rate, eta_s in (
            (10, 12.5, 1.0, 8.25, 4000.0),
            (4990, 0.25, 250.0, 12_345.0, 5.0),
        )
    ]
    assert len({tuple(k for k, sign in enumerate(line) if sign == "|") for line in lines}) == 1
    assert "loss 12.5000" in lines[0] and "    8.25 samples/s" in lines[0] and "step   10/5000" in lines[0]
    assert "loss  0.2500" in lines[1] and "12,345 samples/s" in lines[1] and "ETA     5s" in lines[1]


def test_wandb_resumes_the_same_run_offline_and_stores_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("WANDB_MODE", "online")  # the config decides, not the shell
    monkeypatch.setattr("sys.argv", ["train", f"data.token={secret}"])
    identities = []
    for start in (0, 2):
        log = RunLog(tmp_path, "toy", {"key": secret, "note": f"a {secret}"}, start, "offline")
        write(log, start + 1, start + 2)
        log.rewind(start)
        write(log, start + 1, start + 2)
        assert log._wandb.settings._offline
        identities.append(log._wandb.id)
        log.close()
    assert identities[0] == identities[1]
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    stored = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.suffix == ".wandb" for path in stored)
    assert all(secret.encode() not in path.read_bytes() for path in stored)


@pytest.mark.parametrize("fails", ["init", "log"])
def test_wandb_that_fails_is_a_warning_and_the_run_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: str
) -> None:
    """A server that cannot be reached at the start, or is lost on the way; online in all but the connection."""
    start, modes = wandb.init, []

    def init(*, mode: str, **options: Any) -> Any:
        modes.append(mode)
        if mode == "online" and fails == "init":
            raise wandb.errors.CommError("no route to https://user:secret@host")
        run = start(mode="offline", **options)
        if mode == "online":
            monkeypatch.setattr(type(run), "log", broken)
        return run

    def broken(self: Any, *_: object, **__: object) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(wandb, "init", init)
        raise ConnectionResetError("the service is gone")

    monkeypatch.setattr(wandb, "init", init)
    log = RunLog(tmp_path, "toy", {}, 0, "online")
    write(log, 1, 2)
    assert log._wandb.settings._offline and modes == ["online", "offline"]
    log.close()
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
    (warning,) = [row["text"] for row in rows(tmp_path / "events.jsonl") if row["kind"] == "warning"]
    assert "wandb failed" in warning and "engine.wandb=offline" in warning and "secret" not in warning
    assert warning in capsys.readouterr().out


def test_wandb_that_cannot_even_write_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(wandb, "init", init)
    log = RunLog(tmp_path, "toy", {}, 0, "online")
    write(log, 1, 2)
    log.close()
    texts = [row["text"] for row in rows(tmp_path / "events.jsonl")]
    assert [text.rpartition("=")[2] for text in texts] == ["offline", "disabled"]


def test_wandb_online_without_a_key_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*WANDB_KEYS, "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    check_wandb("offline")
    with pytest.raises(UserError, match=r"engine.wandb=online: no key .* `wandb login`"):
        check_wandb("online")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n login user\n password 0123\n")
    (tmp_path / ".netrc").chmod(0o600)
    check_wandb("online")
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123")
    check_wandb("online")


def test_the_meter_reads_process_and_disk(tmp_path: Path) -> None:
    meter = SystemMeter(torch.device("cpu"), tmp_path)
    sum(k * k for k in range(200_000))  # some work
    values = meter.read()
    assert "system/disk_free_gib" not in SystemMeter(torch.device("cpu"), None).read()
    assert values.keys() == {"system/cpu_cores", "system/resident_gib", "system/disk_free_gib"}
    assert values["system/cpu_cores"] > 0 and 0.05 < values["system/resident_gib"] < 1000


def test_of_ranks_the_fullest_counts_and_rates_are_averaged() -> None:
    one = {"system/cpu_cores": 1.0, "system/resident_gib": 4.0, "system/disk_free_gib": 9.0}
    two = {"system/cpu_cores": 3.0, "system/resident_gib": 2.0, "system/gpu_temperature_c": 50.0}
    assert combine([one, two]) == {
        "system/cpu_cores": 2.0,
        "system/resident_gib": 4.0,
        "system/disk_free_gib": 9.0,
        "system/gpu_temperature_c": 50.0,
    }


def test_what_a_gpu_does_not_tell_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of NVIDIA in numbers of NVML's units, without a power sensor."""

    def unsupported(_device: torch.device) -> int:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 93)
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 61)
    monkeypatch.setattr(torch.cuda, "power_draw", unsupported)
    found = system._gpu(torch.device("cuda", 0))
    assert found == {
        "system/gpu_memory_gib": 60.0,
        "system/gpu_utilization": 0.93,
        "system/gpu_temperature_c": 61.0,
    }
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 412_000)
    assert system._gpu(torch.device("cuda", 0))["system/gpu_power_w"] == 412.0


def test_a_line_that_does_not_fit_leaves_no_part_of_it(tmp_path: Path) -> None:
    """The kernel takes ten bytes of it, then nothing; later there is room again, or the folder is another one."""
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    lines = JsonLines(path)
    lines.append({"step": 1})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, unlimited[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            lines.append({"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    lines.append({"step": 3})
    assert rows(path) == [{"step": 1}, {"step": 3}]
    shutil.rmtree(path.parent)
    with pytest.raises(FileNotFoundError):
        lines.append({"step": 4})
    path.parent.mkdir()
    lines.append({"step": 5})
    lines.close()
    assert rows(path) == [{"step": 5}]
