"""Every YAML in configs/ is one that an entry point reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.sources.emoji import EmojiConfig
from engine import config
from launch.ablation import VARIANTS, AblationRun
from launch.quickstart import QuickstartRun
from launch.runs import EncodeRun, GeneratorRun, JudgeRun, StandInRun, TokenizerRun

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, type] = {
    "quickstart/data.yaml": EmojiConfig,
    "quickstart/run.yaml": QuickstartRun,
    "quickstart/standin.yaml": StandInRun,
    "ablation/run.yaml": AblationRun,
    "ablation/features.yaml": StandInRun,
    "quickstart/judge.yaml": JudgeRun,
    "quickstart/t2i.yaml": GeneratorRun,
    "quickstart/edit.yaml": GeneratorRun,
    "quickstart/latents.yaml": EncodeRun,
    **{f"quickstart/{stage}.yaml": TokenizerRun for stage in ("pivot", "bridge", "decoder")},
}
FOLDERS: dict[str, type] = {
    "tokenizer": TokenizerRun,
    "ablation": TokenizerRun,
    "latents": EncodeRun,
    "generator": GeneratorRun,
}


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_config_is_read_strictly_and_written_back_equal(path: Path, tmp_path: Path) -> None:
    name = str(path.relative_to(CONFIGS))
    kind = KINDS[name] if name in KINDS else FOLDERS[path.relative_to(CONFIGS).parts[0]]
    loaded = config.load(kind, path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump(loaded))
    assert config.load(kind, copy) == loaded


def test_global_batches_of_the_paper() -> None:
    """512 images a step for the tokenizer; 384 K to 400 K tokens for text-to-image, 192 K to 200 K for editing."""
    tokenizer = CONFIGS / "tokenizer"
    for path in [*tokenizer.glob("*.yaml"), *tokenizer.glob("ablations/**/*.yaml")]:
        run = config.load(TokenizerRun, path)
        assert run.pixels.images_per_pack * run.data.num_streams == 512
    for path in tokenizer.glob("release/*.yaml"):
        run = config.load(TokenizerRun, path)
        assert run.pixels.images_per_pack * run.data.num_streams == 256
    for name, low, high in (("t2i_cc12m", 384_000, 400_000), ("edit_omniedit", 192_000, 200_000)):
        generator = config.load(GeneratorRun, CONFIGS / "generator" / f"{name}.yaml")
        assert low <= generator.packing.tokens_per_pack * generator.data.num_streams <= high


@pytest.mark.parametrize(("folder", "epoch"), [("tokenizer", 2502), ("tokenizer/release", 5004)])
def test_schedules_of_the_paper_in_epochs(folder: str, epoch: int) -> None:
    """ImageNet's 1,281,167 images; epochs of each stage as in spec.md."""
    images = 1_281_167
    for stage, epochs in (("pivot", 16), ("bridge", 32), ("decoder", 16)):
        run = config.load(TokenizerRun, CONFIGS / folder / f"{stage}.yaml")
        assert images // (run.pixels.images_per_pack * run.data.num_streams) == epoch
        assert run.engine.steps == epochs * epoch
        assert run.engine.optimizer.warmup_steps == epoch
        if stage == "bridge":
            assert run.engine.optimizer.decay_end_step == 16 * epoch
        else:
            assert run.stage.gan_update_start_step == 6 * epoch
            assert run.stage.gan_loss_start_step == 8 * epoch


def test_every_stage_starts_from_the_export_of_the_stage_before_it() -> None:
    """Over the whole folder: what an init_from names is what another config writes."""
    runs = [config.load(TokenizerRun, path) for path in (CONFIGS / "tokenizer").rglob("*.yaml")]
    folders = [run.run_dir for run in runs]
    assert len(set(folders)) == len(folders), "two configs write to one folder"
    stage_of = {f"{run.run_dir}/export": run.stage.stage for run in runs}
    before = {"bridge": "pivot", "decoder": "bridge"}
    for run in runs:
        if run.stage.init_from is not None:
            assert stage_of[run.stage.init_from] == before[run.stage.stage]


def test_every_variant_of_the_ablation_differs_from_the_quickstarts_stage_in_what_it_is_named_after() -> None:
    base = config.load(TokenizerRun, CONFIGS / "quickstart" / "pivot.yaml").stage
    changed = {
        "frozen": {"train_encoder"},
        "no_pivot": {"w_pivot"},
        "weight_100": {"w_pivot"},
        "normalised": {"pivot_loss"},
        "fixed_weight": {"adaptive_pivot"},
        "joint": {"stage", "autoencoder", "gan_update_start_step", "gan_loss_start_step"},
    }
    assert changed.keys() == VARIANTS.keys()
    for name, fields in changed.items():
        stage = config.load(TokenizerRun, CONFIGS / "ablation" / f"{name}.yaml").stage
        found = {key for key, value in vars(stage).items() if value != getattr(base, key)}
        assert found == fields, name


def test_encoding_further_sets_uses_the_first_ones_statistics() -> None:
    first, *others = config.load(EncodeRun, CONFIGS / "quickstart" / "latents.yaml").configs()
    assert first.statistics_from is None and len(others) == 3
    assert {other.statistics_from for other in others} == {first.out}
    assert len({other.out for other in (first, *others)}) == 4
