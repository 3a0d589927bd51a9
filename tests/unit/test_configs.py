"""Every YAML in configs/ is one that an entry point reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.sources.emoji import EmojiConfig
from engine import config
from launch.quickstart import QuickstartRun
from launch.runs import EncodeRun, GeneratorRun, JudgeRun, StandInRun, TokenizerRun

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, type] = {
    "quickstart/data.yaml": EmojiConfig,
    "quickstart/run.yaml": QuickstartRun,
    "quickstart/standin.yaml": StandInRun,
    "quickstart/judge.yaml": JudgeRun,
    "quickstart/t2i.yaml": GeneratorRun,
    "quickstart/edit.yaml": GeneratorRun,
    "quickstart/latents.yaml": EncodeRun,
    **{f"quickstart/{stage}.yaml": TokenizerRun for stage in ("pivot", "bridge", "decoder")},
}
FOLDERS: dict[str, type] = {"tokenizer": TokenizerRun, "latents": EncodeRun, "generator": GeneratorRun}


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_config_is_read_strictly_and_written_back_equal(path: Path, tmp_path: Path) -> None:
    name = str(path.relative_to(CONFIGS))
    kind = KINDS[name] if name in KINDS else FOLDERS[path.parent.name]
    loaded = config.load(kind, path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump(loaded))
    assert config.load(kind, copy) == loaded


def test_global_batches_of_the_paper() -> None:
    """512 images a step for the tokenizer; 384 K to 400 K tokens for text-to-image, 192 K to 200 K for editing."""
    for stage in ("pivot", "bridge", "decoder"):
        run = config.load(TokenizerRun, CONFIGS / "tokenizer" / f"{stage}.yaml")
        assert run.pixels.images_per_pack * run.data.num_streams == 512
    for name, low, high in (("t2i_cc12m", 384_000, 400_000), ("edit_omniedit", 192_000, 200_000)):
        generator = config.load(GeneratorRun, CONFIGS / "generator" / f"{name}.yaml")
        assert low <= generator.packing.tokens_per_pack * generator.data.num_streams <= high


def test_encoding_further_sets_uses_the_first_ones_statistics() -> None:
    first, *others = config.load(EncodeRun, CONFIGS / "quickstart" / "latents.yaml").configs()
    assert first.statistics_from is None and len(others) == 3
    assert {other.statistics_from for other in others} == {first.out}
    assert len({other.out for other in (first, *others)}) == 4
