"""One training, killed again and again at random moments of data, steps, saves and renames, ends as if undisturbed."""

import json
import os
import random
import signal
import time
from collections import Counter

import pytest
import torch

STEPS_PER_KILL = 6
SAVING, RENAMING = "saving", "renaming"
MOMENTS = ["data", "forward", "backward", SAVING, RENAMING]


class Training:
    """The toy training on two ranks, in processes of their own, with checkpoints every 3 steps in the background."""

    def __init__(self, start_ranks, run, num_steps):
        self.output = run.with_suffix(".log")
        self.phases = run.with_suffix(".phases")
        self.phases.mkdir(exist_ok=True)
        arguments = ["--run", run, "--steps", num_steps, "--phases", self.phases]
        arguments += ["--hidden", 8000, "--async-checkpoint"]
        self.ranks = start_ranks("toy_train.py", arguments, 2, self.output)

    def phase(self, rank):
        """What a rank is doing, or was doing when it died."""
        path = self.phases / str(rank)
        return path.read_text().strip() if path.exists() else ""

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


def kill_at_random(start_ranks, run, number, num_steps, draws):
    """One start and one kill, after STEPS_PER_KILL more steps than the kill before; what the killed rank was doing."""
    training = Training(start_ranks, run, num_steps)
    assert training.wait_until(lambda: steps_done(run) >= number * STEPS_PER_KILL)
    moment = MOMENTS[number % len(MOMENTS)]
    rank = 0 if moment == RENAMING else draws.randrange(2)  # the first one renames
    conditions = {SAVING: lambda: temporary(run) is not None, RENAMING: lambda: is_renaming(run)}
    time.sleep(draws.uniform(0, 0.05))
    assert training.wait_until(conditions.get(moment, lambda: training.phase(rank) == moment))
    time.sleep(draws.uniform(0, 0.003))
    training.kill(rank)
    met = [training.phase(rank)]
    if is_renaming(run):
        return [*met, RENAMING]
    return [*met, SAVING] if temporary(run) is not None else met


def weights(run):
    return torch.load(run / "export" / "model.pt", weights_only=True)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_kills", [5, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_moments_change_nothing(start_ranks, tmp_path, num_kills):
    draws = random.Random(num_kills)
    num_steps = (num_kills + 2) * STEPS_PER_KILL
    Training(start_ranks, tmp_path / "undisturbed", num_steps).finish()
    run = tmp_path / "killed"
    met = Counter()
    for number in range(1, num_kills + 1):
        met.update(kill_at_random(start_ranks, run, number, num_steps, draws))
    print(f"{num_kills} kills met {dict(met)}")
    assert met[SAVING] + met[RENAMING] > 0
    if num_kills > len(MOMENTS):
        assert all(met[moment] > 0 for moment in MOMENTS), met
    Training(start_ranks, run, num_steps).finish()
    expected, actual = weights(tmp_path / "undisturbed"), weights(run)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    assert losses(run) == losses(tmp_path / "undisturbed"), "every step stands there once, with the same loss"
