"""Nothing from outside is executed, nothing secret is written: the source as it stands, and what hostile input does."""

import ast
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from base import config, sources
from base.config import UserError, dump
from base.redaction import MASK, is_secret, redact, redacted
from engine.logs import RunLog
from launch import import_release
from launch.runs import entry
from launch.runs.configs import GeneratorRun, TokenizerRun
from quickstart.steps import Step, python, run_steps
from tokenizer.weights import read_tensors

ROOT = Path(__file__).parents[3]
FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "marshal.load", "marshal.loads", "shelve.open", "dill.load", "joblib.load", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "subprocess.getoutput", "subprocess.getstatusoutput",
    "tempfile.mktemp",
}  # fmt: skip
RUN = {"run", "Popen", "call", "check_call", "check_output"}  # of subprocess
TORCH_SAVE = {"engine/guard.py", "benchmarks/adaptive_weights.py"}
"""Batches of a step that was not taken, for a person to look at; a benchmark's own file."""


def problems(tree: ast.AST, path: str) -> Iterator[str]:
    """`file:line: what` for every forbidden call."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = {word.arg: word.value for word in node.keywords if word.arg}
        where = f"{path}:{node.lineno}: {name}"
        if name in FORBIDDEN:
            yield where
        if name == "torch.load" and not is_constant(words.get("weights_only"), True):
            yield f"{where} without weights_only=True"
        if name == "torch.save" and path not in TORCH_SAVE:
            yield f"{where}: write safetensors"
        if is_constant(words.get("allow_pickle"), True) or is_constant(words.get("trust_remote_code"), True):
            yield f"{where} runs what a file says"
        if "shell" in words and not is_constant(words["shell"], False):
            yield f"{where} with a shell"
        if name.startswith("subprocess.") and name.partition(".")[2] in RUN and is_text(node.args[0]):
            yield f"{where} of a text: give a list"
        if name.endswith((".extractall", ".extract")) and "filter" not in words:
            yield f"{where} without a filter"


def is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr | ast.BinOp) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def test_no_source_file_runs_what_comes_from_outside() -> None:
    paths = [
        ROOT / "setup.py",
        *sources(ROOT, "benchmarks"),
    ]
    assert len(paths) > 150
    found = [
        problem
        for path in paths
        for problem in problems(ast.parse(path.read_text()), path.relative_to(ROOT).as_posix())
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(model, path)",
        "pickle.loads(data)",
        "yaml.load(text, Loader=yaml.Loader)",
        "eval(text)",
        "os.system('rm ' + name)",
        "subprocess.run(f'ls {name}', shell=True)",
        "subprocess.run(f'ls {name}')",
        "subprocess.check_output('ls ' + name)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "tar.extractall(folder)",
    ],
)
def test_the_search_finds_each_kind(line: str) -> None:
    assert next(problems(ast.parse(line), "x.py")).startswith("x.py:1: ")


def test_the_search_lets_harmless_calls_pass() -> None:
    lines = (
        "torch.load(path, weights_only=True)",
        "subprocess.run(['ls', name], check=True)",
        "subprocess.Popen(command, shell=False)",
        "model.eval()",
        "torch.compile(model)",
        "tar.extractall(folder, filter='data')",
        "yaml.safe_load(text)",
    )
    assert list(problems(ast.parse("\n".join(lines)), "x.py")) == []


class Planted:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickle_named_safetensors_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Planted(tmp_path / "ran")))
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        read_tensors(path)
    torch.save({"weight": Planted(tmp_path / "ran")}, path)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        read_tensors(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["rpiae", "rae", "va-vae"])
def test_a_release_that_would_run_code_is_not_imported(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"weight": Planted(tmp_path / "ran")}}, tmp_path / "model.pt")
    arguments = [command, "--source", str(tmp_path / "model.pt"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["import_release", *arguments])
    assert entry.run(import_release.main) == 2
    assert "reading it would run code of its authors" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


def test_a_config_cannot_name_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: !!python/object/apply:os.system ['touch {tmp_path / 'ran'}']\n")
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(TokenizerRun, path)
    with pytest.raises(UserError, match="not valid YAML"):
        config.load(TokenizerRun, ROOT / "configs/quickstart/pivot.yaml", ["run_dir=!!python/name:os.system"])
    assert not (tmp_path / "ran").exists()


HOSTILE = "a b; touch ran & $(touch ran) `touch ran` | touch ran > ran ' \" \\ *"


def test_names_full_of_shell_characters_stay_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step's command gets them as one argument, and a run folder of that name works."""
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / HOSTILE
    write = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir(); print(sys.argv[1])"
    run_steps(tmp_path / "chain", [Step("one", "makes a folder", [*python("-c"), write, HOSTILE])])
    log = RunLog(run_dir, "toy", {"run_dir": str(run_dir)}, 0, "disabled")
    log.event("start", 0, HOSTILE)
    log.close()
    assert {path.name for path in tmp_path.iterdir()} == {"chain", HOSTILE}
    assert json.loads((run_dir / "events.jsonl").read_text())["text"] == HOSTILE


def test_secrets_are_masked_by_name_and_in_urls() -> None:
    tree = {
        "storage": {"account_key": "abcd", "Password": "efgh", "aws_secret_access_key": "ijkl", "token": ""},
        "shards": ["s3://me:pass@bucket/a", "https://host/x.tar?sig=mnop"],
        "text_tokenizer": "Qwen/Qwen2.5-0.5B",
        "tokens_per_pack": 160,
    }
    assert redacted(tree) == {
        "storage": {"account_key": MASK, "Password": MASK, "aws_secret_access_key": MASK, "token": ""},
        "shards": ["s3://bucket/a", "https://host/x.tar"],
        "text_tokenizer": "Qwen/Qwen2.5-0.5B",
        "tokens_per_pack": 160,
    }
    assert all(
        map(
            is_secret,
            ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AZURE_STORAGE_CONNECTION_STRING"),
        )
    )


@pytest.mark.parametrize(
    "name",
    [
        "apikey",
        "apiKey",
        "pass",
        "DB_PASS",
        "pwd",
        "authorization",
        "Authorization",
        "bearer",
        "storage.auth",
        "clientSecret",
    ],
)
def test_whatever_stands_under_a_secret_name_is_masked(name: str) -> None:
    tree = {name: {"a": 12345, "b": ["geheim", 1.5]}, "n": {name: 12345}, "list": [{name: ["geheim", 7]}]}
    masked = {name: {"a": MASK, "b": [MASK, MASK]}, "n": {name: MASK}, "list": [{name: [MASK, MASK]}]}
    assert redacted(tree) == masked
    assert redacted({name: None}) == {name: None} and redacted({name: True}) == {name: True}
    for text in (f"{name}=geheim, x", f"{{'{name}': 'geheim'}}", f'{{"{name}": 12345}}'):
        assert "geheim" not in redact(text) and "12345" not in redact(text) and MASK in redact(text)


SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="'\"\\"), min_size=8)
"""What may stand in a url or a command without quotes, and is no part of ordinary text by chance."""


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    secret=SECRETS.filter(lambda secret: "://" not in secret and secret.strip(":;,.)") == secret),
    data=st.data(),
)
def test_no_secret_stays_wherever_it_stands(secret: str, data: st.DataObject) -> None:
    texts = said_with(secret)
    ordinary = " ".join(said_with(""))
    assume(secret[:8] not in ordinary and secret[-8:] not in ordinary)
    text = data.draw(st.sampled_from(texts))
    shown = redact(text)
    assert secret not in shown and secret[:8] not in shown and secret[-8:] not in shown, text
    assert secret not in str(redacted({"a": [text], "b": {"pwd": secret, "list": [{"secrets": [secret]}]}}))


def said_with(secret: str) -> list[str]:
    return [
        f"s3://KEY:{secret}@bucket/shards",
        f"'http://me:{secret}@host:8000/v1': no answer",
        f"https://host/a.tar?sig={secret}&b=1 was refused",
        f"https://host/a.tar?b=1&sig='{secret} {secret}'&c=2 was refused",
        f'https://host/a.tar?sig="{secret} {secret}": refused',
        f"https://host/a#access_token={secret}",
        f"Authorization: Bearer {secret}",
        f"{{'Authorization': 'Bearer {secret}', 'n': 1}}",
        f"{{'apikey': '{secret}'}}",
        f"storage.password='{secret}' was given",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/me/pictures@main/a.parquet: no such file",
        "http://localhost:8000/v1 answers",
        "https://host/a.tar#readme",
        "mail me@host, it is a bearer of news; key 'a', tokens_per_pack=160, author=me",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


def test_a_bug_shows_no_password_in_its_traceback() -> None:
    """One process, no rank: Python itself would print the error as it is."""
    program = (
        "import sys\nfrom launch.runs import entry\n"
        "def fail(): raise RuntimeError('http://me:' + 'GEHEIM' + '@host/v1: bad')\n"
        "sys.exit(entry.run(fail, has_ranks=False))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "RuntimeError: http://host/v1: bad" in done.stderr
    assert "me:GEHEIM" not in done.stderr


def test_secrets_of_the_environment_are_masked_wherever_they_turn_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("MY_KEY", "short")
    assert redact("401 for hf_abcdefghij, a short one") == f"401 for {MASK}, a short one"


def test_the_current_folder_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PWD", "/home/someone/rpiae")
    monkeypatch.setenv("OLDPWD", "/home/someone/others")
    monkeypatch.setenv("DB_PWD", "abcdefgh1234")
    said = redact("/home/someone/rpiae/a.yaml, /home/someone/others/b: abcdefgh1234")
    assert said == f"/home/someone/rpiae/a.yaml, /home/someone/others/b: {MASK}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "generator").glob("*.yaml")), ids=lambda path: path.stem
)
def test_no_setting_of_ours_is_taken_for_a_secret(path: Path) -> None:
    run = config.load(GeneratorRun, path)
    assert redacted(config.to_dict(run)) == config.to_dict(run)


def test_a_dry_run_and_an_error_show_no_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.shards=s3://me:pass@bucket/a?sig=abcd"]
    run = config.load(GeneratorRun, ROOT / "configs/quickstart/t2i.yaml", overrides)
    assert "shards: s3://bucket/a\n" in dump(run) and "pass@" not in dump(run)

    def fail() -> None:
        raise UserError("https://me:pass@host/a?sig=abcd: no such file")

    assert entry.run(fail) == 2
    assert capsys.readouterr().err == "error: https://host/a: no such file\n"


def test_every_test_that_the_page_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text()))
    there = {
        found
        for path in (ROOT / "tests").rglob("test_*.py")
        for found in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 15 and named <= there, named - there


def test_every_exception_from_the_security_rules_says_why() -> None:
    lines = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sources(ROOT, "tests")
        for line in path.read_text().splitlines()
        if re.search(r"# noqa: [A-Z0-9, ]*S\d{3}", line)
    ]
    assert len(lines) > 10
    assert [line for line in lines if not re.search(r"# noqa: [A-Z0-9, ]+ +# \w", line)] == []
