"""Instructions to the judges of edits: the benchmarks' own sentences, read from the benchmarks' own files.

Another wording gives other scores, so the files are downloaded with their hashes, or given; none is part of this
project. EditScore keeps its sentences in a Python file (Apache-2.0), which is parsed, never run. ImgEdit-Bench keeps
one text for each kind of edit in a JSON file.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path

from base import files
from base.config import UserError
from data.samples.captions import check_whole
from data.sources.text_files import read_text

SCALE = 25  # EditScore's scale: its sentences, written for 10, say 25 to the judge
INSTRUCTION, EDIT_PROMPT = "<instruction>", "<edit_prompt>"
CONTEXT, EDIT_RULE, EDIT_SCORES, PICTURE_SCORES = (
    "_context_no_delimit_reasoning_first",
    "_prompts_0shot_two_image_edit_rule",
    "_prompts_0shot_tie_rule_SC",
    "_prompts_0shot_rule_PQ",
)


@dataclass(frozen=True)
class VieInstructions:
    """EditScore's two questions."""

    edit: str  # about source and result; holds INSTRUCTION
    picture: str  # about the result alone
    sha256: str  # hash of the file

    @classmethod
    def read(cls, path: Path, scale: int = SCALE) -> VieInstructions:
        """Reads EditScore's vie_prompts.py. Raises UserError: no such file, another content."""
        texts = _constants(path)
        absent = [name for name in (CONTEXT, EDIT_RULE, EDIT_SCORES, PICTURE_SCORES) if name not in texts]
        if absent or INSTRUCTION not in texts[EDIT_SCORES]:
            raise UserError(
                f"{path}: has no {', '.join(absent) or INSTRUCTION}; give EditScore's vie_prompts.py"
            )
        edit, picture = (texts[name].replace("10", str(scale)) for name in (EDIT_SCORES, PICTURE_SCORES))
        return cls(
            "\n".join([texts[CONTEXT], texts[EDIT_RULE], edit]),
            "\n".join([texts[CONTEXT], picture]),
            files.sha256(path),
        )


@dataclass(frozen=True)
class ImgEditInstructions:
    """ImgEdit-Bench's question for each kind of edit; each holds EDIT_PROMPT."""

    texts: dict[str, str]
    sha256: str

    @classmethod
    def read(cls, path: Path) -> ImgEditInstructions:
        """Reads ImgEdit-Bench's prompts.json. Raises UserError: no such file, another content."""
        try:
            tree = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}: cannot be read as JSON ({type(error).__name__}); give prompts.json"
            ) from None
        if not isinstance(tree, dict) or not all(
            isinstance(v, str) and EDIT_PROMPT in v for v in tree.values()
        ):
            raise UserError(
                f"{path}: is not ImgEdit-Bench's prompts.json (kind of edit -> text with {EDIT_PROMPT})"
            )
        for kind, text in tree.items():
            check_whole(text, f"{path}: '{kind}'")
        return cls(tree, files.sha256(path))


def _constants(path: Path) -> dict[str, str]:
    """String constants at the top level of a Python file, by name."""
    try:
        tree = ast.parse(read_text(path))
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: cannot be read as Python ({type(error).__name__}); give vie_prompts.py"
        ) from None
    return {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    }
