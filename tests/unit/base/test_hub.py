"""Nothing waits for a hub that cannot be reached, and nothing that lies there or in a folder is run."""

import ast
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from huggingface_hub import constants

from base import hub, sources
from base.config import UserError
from data.samples.text import load_text_tokenizer
from evaluation.features.vision_transformers import VisionFeatures
from evaluation.judges.colour import ClipColours
from evaluation.judges.detector import Mask2FormerDetector
from evaluation.judges.vision_language import TransformersJudge
from launch.runs import export_folder
from tokenizer.config import RepresentationConfig
from tokenizer.representation import Representation

ROOT = Path(__file__).parents[3]
DOWNLOADS = {"from_pretrained", "from_config", "hf_hub_download", "snapshot_download", "create_model"}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.offline_if_unreachable.cache_clear()
    yield
    hub.offline_if_unreachable.cache_clear()


def no_names(*_: Any) -> None:
    raise socket.gaierror("Name or service not known")


def test_a_name_that_does_not_resolve_means_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    hub.offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE


def test_a_name_that_resolves_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    hub.offline_if_unreachable()
    assert not constants.HF_HUB_OFFLINE


def test_behind_a_proxy_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    hub.offline_if_unreachable()
    assert not constants.HF_HUB_OFFLINE


def calls(path: Path) -> Iterator[tuple[str, str]]:
    """Name of the innermost function around each call ("" outside), and what is called."""

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield function, ast.unparse(child.func)
            yield from walk(child, child.name if isinstance(child, ast.FunctionDef) else function)

    yield from walk(ast.parse(path.read_text()), "")


def test_every_download_goes_through_the_hub_module() -> None:
    """Found in the sources: calls of the libraries' loading functions, under whatever name they were imported."""
    met = 0
    for path in sources(ROOT):
        inside = path == ROOT / "base" / "hub.py"
        for function, name in calls(path):
            met += name.startswith("hub.") and name != "hub.offline_if_unreachable"
            if name.rpartition(".")[2] in DOWNLOADS and not name.startswith("hub."):
                assert inside, f"{path}:{function} calls {name}: let base/hub.py do it"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and not inside:
                taken = {alias.name for alias in node.names} & DOWNLOADS
                assert not taken, f"{path} imports {taken}: let base/hub.py do it"
    assert met >= 12


def test_every_function_of_the_hub_module_asks_first_and_forbids_code() -> None:
    met = []
    for function in ast.parse((ROOT / "base" / "hub.py").read_text()).body:
        found = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
        names = {ast.unparse(node.func) for node in found}
        if (
            not isinstance(function, ast.FunctionDef)
            or not {name.rpartition(".")[2] for name in names} & DOWNLOADS
        ):
            continue
        met.append(function.name)
        if function.name != "from_config":  # of a config that is here already
            assert "offline_if_unreachable" in names, function.name
        for node in found:
            if ast.unparse(node.func).startswith("cls."):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert given["trust_remote_code"] == "False", function.name
    assert met == ["from_pretrained", "from_config", "create_timm", "folder", "file"]


LOADERS: dict[str, Callable[[str], object]] = {
    "text tokenizer": load_text_tokenizer,
    "representation": lambda folder: Representation(RepresentationConfig(folder, 32, library="transformers")),
    "judge": TransformersJudge.load,
    "colours": ClipColours.load,
    "detector": Mask2FormerDetector.load,
    "DINOv2 features": lambda folder: VisionFeatures.load("dinov2", folder),
    "CLIP features": lambda folder: VisionFeatures.load("clip", folder),
    "export of a tokenizer": lambda folder: export_folder.copy_text_tokenizer(folder, Path(folder) / "copy"),
}


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("model_type", ["stranger", "dinov2"])
def test_a_folder_that_brings_code_is_refused_without_asking(
    loader: Callable[[str], object], model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether transformers knows the model or not; the old calls asked, and a "y" ran the module."""
    classes = (
        "AutoConfig",
        "AutoModel",
        "AutoModelForImageTextToText",
        "AutoProcessor",
        "AutoImageProcessor",
    )
    auto_map: dict[str, Any] = dict.fromkeys(classes, "strange.Strange")
    auto_map["AutoTokenizer"] = ["strange.Strange", "strange.Strange"]
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Strange: ...\n")
    for name in ("config", "tokenizer_config", "processor_config", "preprocessor_config"):
        text = json.dumps({"model_type": model_type, "auto_map": auto_map, "tokenizer_class": "Strange"})
        (tmp_path / f"{name}.json").write_text(text)
    asked: list[object] = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as error:
        loader(str(tmp_path))
    assert "\n" not in str(error.value)
    assert not asked and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_config_nested_without_end_is_one_line(
    loader: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("config", "tokenizer_config"):
        (tmp_path / f"{name}.json").write_text('{"a": ' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(UserError, match="RecursionError") as error:
        loader(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_tokenizer_whose_library_panics_is_one_line(tmp_path: Path) -> None:
    """What a library in Rust raises then is no Exception: merges shorter than the prefix that each shall have."""
    vocabulary = {piece: number for number, piece in enumerate(("a", "b", "ab"))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tree = json.loads(tokenizer.to_str())
    tree["model"]["continuing_subword_prefix"] = "##longer##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="PanicException") as error:
        load_text_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)
