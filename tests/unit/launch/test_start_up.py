"""What a command loads before it begins its work: --help, a mistyped key and a missing file need no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "quickstart")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]
HEAVY = {
    *("torch", "torchvision", "transformers", "diffusers", "timm", "deepspeed"),
    *("pyarrow", "scipy", "webdataset", "wandb", "lpips", "matplotlib"),
}
"""Packages that take a tenth of a second or more to load."""
TRAININGS = ["launch/train_class.py", "launch/train_edit.py", "launch/train_t2i.py"]
CLASS_CONFIG = "configs/generator/class/rpiae64_80.yaml"
MISTAKES: Mapping[str, tuple[list[str], str]] = {
    **{script: (["engine.stepz=3"], "engine.stepz") for script in TRAININGS},
    "launch/train_tokenizer.py": (["stage.stages=pivot"], "stage.stages"),
    "launch/encode_latents.py": (["batch_imagez=3"], "batch_imagez"),
    "launch/preflight.py": ([CLASS_CONFIG, "engine.stepz=3"], "engine.stepz"),
    "quickstart/train_judge.py": (["judge.channel=3"], "judge.channel"),
    "quickstart/train_standin.py": (["standin.classes=3"], "standin.classes"),
    "quickstart/chain.py": (["num_rank=3"], "num_rank"),
    "quickstart/ablation.py": (["scores.images=3"], "scores.images"),
    "quickstart/class_chain.py": (["scores.sampling.steps=3"], "scores.sampling.steps"),
}
"""Words with a mistyped key, and the key as the command must name it."""
MISSING: Mapping[str, list[str]] = {
    **{script: ["--config", "nowhere.yaml"] for script in MISTAKES if script != "launch/preflight.py"},
    "launch/preflight.py": ["nowhere.yaml"],
    "launch/check_nodes.py": ["--config", "nowhere.yaml"],
    "launch/export.py": ["--run", "nowhere", "--out", "nowhere-either"],
    "launch/import_release.py": ["rae", "--source", "nowhere.pt", "--verify", "--config", "nowhere.yaml"],
    "launch/sample.py": ["--run", "nowhere", "--prompt", "a tree", "--out", "nowhere-either.png"],
    "launch/sample_class.py": ["--run", "nowhere", "--images", "3", "--out", "nowhere-either"],
}
"""Words that name a file or run that does not exist."""
OF_CONFIGS = {"evaluation", "evaluation.config"}
"""Modules of evaluation that a run's config needs: its section `evaluation` names suites and their options."""
RUN_COMMANDS = """
import contextlib, io, json, runpy, sys
refused, wanted = set(sys.argv[1:]), set()
class Gate:
    def find_spec(self, name, path=None, target=None):
        if name in refused:
            wanted.add(name)
            raise ImportError(f"{name} is refused")
sys.meta_path.insert(0, Gate())
for line in sys.stdin:
    sys.argv = json.loads(line)
    wanted.clear()
    said, status = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            status = end.code
        except ImportError as error:
            status = str(error)
    found = {"status": status, "said": said.getvalue(), "wanted": sorted(wanted), "loaded": sorted(sys.modules)}
    print(json.dumps(found))
"""
"""Runs the command lines of stdin, one after the other. The packages that the arguments name are noted and refused: so
one command cannot load them for the next, and what each wants is known."""
IMPORT_ALL_OF = """
import ast, importlib, json, sys
for path in sys.argv[1:]:
    for node in ast.walk(ast.parse(open(path).read())):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
print(json.dumps(sorted(sys.modules)))
"""
"""Imports whatever the files import, inside functions too."""

Result = Mapping[str, Any]


def python(program: str, *arguments: str, lines: str = "") -> list[Any]:
    """The JSON lines that `program` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], input=lines, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def run(commands: Sequence[Sequence[str]], *refused: str) -> list[Result]:
    """How each command line ended, what it said, which of the `refused` packages it wanted, and what is loaded then."""
    return python(RUN_COMMANDS, *refused, lines="".join(json.dumps(words) + "\n" for words in commands))


def within(modules: Sequence[str], *packages: str) -> set[str]:
    """Those of the modules that are one of `packages` or belong to one."""
    return {
        name for name in modules if name in packages or name.startswith(tuple(f"{one}." for one in packages))
    }


@pytest.fixture(scope="module")
def results() -> Mapping[tuple[str, ...], Result]:
    """The command lines of the tests below, all run in one process."""
    commands = [
        *((script, "--help") for script in SCRIPTS),
        *((script, "--surely-no-option") for script in SCRIPTS),
        *((script, *words) for script, (words, _) in MISTAKES.items()),
        *((script, *words) for script, words in MISSING.items()),
    ]
    return dict(zip(commands, run(commands, *HEAVY), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_an_unknown_option_load_no_heavy_package(
    script: str, results: Mapping[tuple[str, ...], Result]
) -> None:
    helped, refused = results[script, "--help"], results[script, "--surely-no-option"]
    assert helped["wanted"] == refused["wanted"] == []
    assert helped["status"] == 0 and "usage:" in helped["said"]
    assert refused["status"] == 2 and "error:" in refused["said"]


@pytest.mark.parametrize("script", MISTAKES)
def test_a_mistyped_key_loads_no_heavy_package(
    script: str, results: Mapping[tuple[str, ...], Result]
) -> None:
    words, key = MISTAKES[script]
    result = results[(script, *words)]
    assert result["wanted"] == []
    assert result["status"] == 2 and key in result["said"]


@pytest.mark.parametrize("script", MISSING)
def test_a_missing_file_loads_no_heavy_package(
    script: str, results: Mapping[tuple[str, ...], Result]
) -> None:
    result = results[(script, *MISSING[script])]
    assert result["wanted"] == []
    assert result["status"] == 2 and "nowhere" in result["said"]


def test_drawing_needs_neither_a_training_nor_an_evaluation() -> None:
    scripts = ["launch/sample.py", "launch/sample_class.py"]
    helped = run([[script, "--help"] for script in scripts])
    (imported,) = python(IMPORT_ALL_OF, *scripts)
    assert {"generator.pipeline", "torch"} <= {*imported}
    for modules in (*(result["loaded"] for result in helped), imported):
        unwanted = ("evaluation", "report", "deepspeed", "engine.loop", "launch.runs.training")
        assert within(modules, *unwanted) <= OF_CONFIGS


def test_a_dry_run_of_a_generator_loads_neither_deepspeed_nor_the_compiler() -> None:
    """The compiler takes as long to load as all of the rest; a draw of initial weights would load it."""
    for result in run([[script, "--dry-run"] for script in TRAININGS]):
        assert result["status"] == 0 and "parameters:" in result["said"]
        unwanted = ("deepspeed", "transformers", "timm", "torch._dynamo", "torch._inductor", "evaluation")
        assert within(result["loaded"], *unwanted) <= OF_CONFIGS
