"""One training, killed again and again at random moments of data, steps, saves and renames, ends as if undisturbed."""

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parent / "scripts"
STEPS_PER_KILL = 6
SAVING, RENAMING = "saving", "renaming"


class Training:
    """The toy training on two ranks, in processes of their own, with checkpoints every 3 steps in the background."""

    def __init__(self, run, num_steps):
        sys.path.insert(0, str(SCRIPTS))
        import forked

        sys.path.remove(str(SCRIPTS))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["deepspeed", "engine.loop", "safetensors.torch"])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.run, self.output = run, run.with_suffix(".log")
        arguments = ["--run", str(run), "--steps", str(num_steps), "--hidden", "40000", "--async-checkpoint"]
        common = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        self.ranks = []
        for rank in range(2):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            target = (str(SCRIPTS / "toy_train.py"), arguments, environment, str(self.output))
            self.ranks.append(context.Process(target=forked.main, args=target))
        sys.path.insert(0, str(SCRIPTS))  # a forked process imports `forked` from here
        for process in self.ranks:
            process.start()
        sys.path.remove(str(SCRIPTS))

    def wait_until(self, condition):
        """False if the training ended first."""
        deadline = time.monotonic() + 120
        while not condition():
            if not all(process.is_alive() for process in self.ranks):
                return False
            assert time.monotonic() < deadline, self.output.read_text()[-4000:]
            time.sleep(0.0005)
        return True

    def kill(self, rank):
        """kill -9 of one; the other one notices by itself."""
        os.kill(self.ranks[rank].pid, signal.SIGKILL)
        for process in self.ranks:
            process.join(60)
            assert not process.is_alive(), "a rank outlived the other one"

    def finish(self):
        for process in self.ranks:
            process.join(120)
        assert [process.exitcode for process in self.ranks] == [0, 0], self.output.read_text()[-4000:]


def steps_done(run):
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def temporary(run):
    return next(run.glob("checkpoints/.step_*.tmp"), None)


def is_renaming(run):
    folder = temporary(run)
    return folder is not None and (folder / "state.json").exists()


def kill_at_random(run, number, num_steps, draws):
    """One start and one kill, after STEPS_PER_KILL more steps than the kill before; what it met."""
    training = Training(run, num_steps)
    assert training.wait_until(lambda: steps_done(run) >= number * STEPS_PER_KILL)
    moment = draws.choice(["any", SAVING, RENAMING])
    if moment == SAVING:
        assert training.wait_until(lambda: temporary(run) is not None)
        time.sleep(draws.uniform(0, 0.01))
    elif moment == RENAMING:
        assert training.wait_until(lambda: is_renaming(run))
    else:
        time.sleep(draws.uniform(0, 0.1))
    training.kill(0 if moment == RENAMING else draws.randrange(2))
    if is_renaming(run):
        return RENAMING
    return SAVING if temporary(run) is not None else "step"


def weights(run):
    return torch.load(run / "export" / "model.pt", weights_only=True)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("num_kills", "num_saving"), [(4, 1), pytest.param(30, 8, marks=pytest.mark.slow)], ids=["4", "30"]
)
def test_kills_at_random_moments_change_nothing(tmp_path, num_kills, num_saving):
    draws = random.Random(num_kills)
    num_steps = (num_kills + 2) * STEPS_PER_KILL
    Training(tmp_path / "undisturbed", num_steps).finish()
    run = tmp_path / "killed"
    met = [kill_at_random(run, number, num_steps, draws) for number in range(1, num_kills + 1)]
    print(f"kills met: { {name: met.count(name) for name in sorted(set(met))} }")
    assert met.count(SAVING) + met.count(RENAMING) >= num_saving, met
    Training(run, num_steps).finish()
    expected, actual = weights(tmp_path / "undisturbed"), weights(run)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert losses(run) == losses(tmp_path / "undisturbed"), "every step stands there once, with the same loss"
