"""Whatever strangers send, nearly right or quite wrong: a result or a UserError, within 2 GB and 20 s, nothing else.

Every reader gets a tiny valid input, changed by what knows its format (scripts/mutate.py). A failure names case and
seed, and the folder with the input stays. It is repeated by `run_one(CASES[NAME], SEED, FOLDER, VALID)`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from base.config import UserError
from integration.scripts import fuzz_data, fuzz_models, fuzz_scores, mutate

NUM_DEFAULT, NUM_SLOW = 2, 75  # of each case
MAX_BYTES = 2 << 30
MAX_S = 20
ROOT = Path(__file__).parents[2]


CASES: dict[str, Any] = {**fuzz_models.CASES, **fuzz_data.CASES, **fuzz_scores.CASES}


class TooLongError(BaseException):
    """A reader that does not come back."""


def run_one(case: Any, seed: int, folder: Path, valid: Path) -> str:
    """What went wrong, empty if nothing: the input is left in `folder`."""
    shutil.copytree(valid, folder)
    rng = np.random.default_rng(seed)
    target = mutate.pick(rng, sorted(path for path in folder.glob(f"**/{case.pattern}") if path.is_file()))
    done = mutate.mutate(rng, target)
    if case.sign is not None and rng.random() < 0.7:
        with contextlib.suppress(Exception):
            case.sign(folder)
    changed = {path: path.read_bytes() for path in (target,)}
    try:
        case.read(folder)
    except UserError as error:
        text = str(error)
        if "\n" in text or len(text) > 4000:
            return (
                f"{done}: a message of {len(text)} characters, {text.count(chr(10)) + 1} lines: {text[:300]}"
            )
        if "allocate" in text:
            return f"{done}: asked for more than {MAX_BYTES} bytes: {text[:300]}"
    except BaseException as error:
        target.write_bytes(changed[target])
        place = traceback.extract_tb(error.__traceback__)
        ours = next(
            (f for f in reversed(place) if str(ROOT) in f.filename and "tests" not in f.filename), place[-1]
        )
        where = f"{ours.filename.removeprefix(f'{ROOT}/')}:{ours.lineno}"
        return f"{done}: {where}: {type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def run(case: Any, seeds: Sequence[int], folder: Path) -> list[str]:
    """In a forked process, whose memory has a limit: its failures, and the seed where it died."""
    valid = folder / "valid"
    valid.mkdir()
    case.make(valid)
    case.read(shutil.copytree(valid, folder / "unchanged"))  # or nothing would be shown
    report = folder / "report.jsonl"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _limit()
            with report.open("a", buffering=1) as out, Path(os.devnull).open("w") as nowhere:
                for seed in seeds:
                    out.write(json.dumps([seed, "died"]) + "\n")
                    signal.alarm(MAX_S)
                    # A reader that hangs in a library's own code never lets Python's handler run.
                    faulthandler.dump_traceback_later(MAX_S + 10, exit=True, file=nowhere)
                    problem = run_one(case, seed, folder / str(seed), valid)
                    signal.alarm(0)
                    out.write(json.dumps([seed, problem]) + "\n")
                    if not problem:
                        shutil.rmtree(folder / str(seed))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    told = dict(json.loads(line) for line in report.read_text().splitlines())
    failures = [f"seed {seed}: {problem} ({folder / str(seed)})" for seed, problem in told.items() if problem]
    assert failures or (status == 0 and len(told) == len(seeds)), f"ended with {status}"
    return failures


def _limit() -> None:
    """More memory than MAX_BYTES is refused; a reader that hangs is stopped, and killed where that is not enough."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(5)
        raise TooLongError(f"{MAX_S} s")

    signal.signal(signal.SIGALRM, stop)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MAX_BYTES, taken + MAX_BYTES))


@pytest.mark.parametrize("name", CASES)
def test_nearly_right_inputs_are_read_or_refused_in_one_line(name: str, tmp_path: Path) -> None:
    assert run(CASES[name], range(NUM_DEFAULT), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_three_thousand_nearly_right_inputs_are_read_or_refused_in_one_line(
    name: str, tmp_path: Path
) -> None:
    assert len(CASES) * NUM_SLOW >= 3000
    assert run(CASES[name], range(NUM_DEFAULT, NUM_DEFAULT + NUM_SLOW), tmp_path) == []
