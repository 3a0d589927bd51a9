"""Every YAML in configs/ is one that an entry point reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from base import config
from engine.schedule import learning_rate
from launch.recipes import table
from launch.runs.configs import ClassRun, EncodeRun, GeneratorRun, TokenizerRun
from launch.sizing.estimate import LATENT_SHAPES
from quickstart.ablation import VARIANTS, AblationRun
from quickstart.chain import QuickstartRun
from quickstart.class_chain import QuickstartClassRun
from quickstart.pictures.config import EmojiConfig
from quickstart.train_judge import JudgeRun
from quickstart.train_standin import StandInRun

CONFIGS = Path(__file__).parents[3] / "configs"
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
    "quickstart_class/run.yaml": QuickstartClassRun,
    "quickstart_class/data.yaml": EmojiConfig,
    **{f"quickstart_class/{name}_tokenizer.yaml": TokenizerRun for name in ("rae", "vae")},
    **{f"quickstart_class/latents_{name}.yaml": EncodeRun for name in ("rpiae", "rae", "vae")},
    **{f"quickstart/{stage}.yaml": TokenizerRun for stage in ("pivot", "bridge", "decoder")},
}
FOLDERS: dict[str, type] = {
    "tokenizer": TokenizerRun,
    "ablation": TokenizerRun,
    "latents": EncodeRun,
    "generator": GeneratorRun,
    "quickstart_class": ClassRun,
}
CLASS = CONFIGS / "generator" / "class"


def kind_of(path: Path) -> type:
    parts = path.relative_to(CONFIGS).parts
    if CLASS in path.parents:
        return ClassRun
    return KINDS.get("/".join(parts)) or FOLDERS[parts[0]]


def generator_configs() -> list[Path]:
    """Of text-to-image and editing."""
    return [path for path in (CONFIGS / "generator").rglob("*.yaml") if kind_of(path) is GeneratorRun]


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS))
)
def test_config_is_read_strictly_and_written_back_equal(path: Path, tmp_path: Path) -> None:
    kind = kind_of(path)
    loaded = config.load(kind, path)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump(loaded))
    assert config.load(kind, copy) == loaded


def test_global_batches_of_the_paper() -> None:
    """512 images a step for the tokenizer; 384 K to 400 K tokens for text-to-image, 192 K to 200 K for editing."""
    tokenizer = CONFIGS / "tokenizer"
    mains = [*tokenizer.glob("*.yaml"), *tokenizer.glob("gpus/*.yaml")]
    for path in [*mains, *tokenizer.glob("ablations/**/*.yaml")]:
        run = config.load(TokenizerRun, path)
        assert run.pixels.images_per_pack * run.data.num_streams == 512
    for path in tokenizer.glob("release/*.yaml"):
        run = config.load(TokenizerRun, path)
        assert run.pixels.images_per_pack * run.data.num_streams == 256
    for path in generator_configs():
        generator = config.load(GeneratorRun, path)
        steps, low, high = (50_000, 192_000, 200_000) if is_edit(path) else (200_000, 384_000, 400_000)
        tokens = generator.packing.tokens_per_pack * generator.data.num_streams
        if path.stem == "edit_256":  # as its file says: as many tokens in larger, fewer steps
            assert tokens * generator.engine.steps == pytest.approx(32 * 6144 * 50_000, rel=1e-4)
        else:
            assert low <= tokens <= high and generator.engine.steps == steps, path


def is_edit(path: Path) -> bool:
    return "edit" in path.stem


def test_generators_have_folders_of_their_own_and_edits_start_from_text_to_image() -> None:
    """Over all latents: an edit has the autoencoder, shape and statistics of what it starts from."""
    runs = {
        path: config.load(GeneratorRun, path)
        for path in generator_configs()
        if path.parent.name != "gpus"  # the main run for other machines, in its folder
    }
    folders = [run.run_dir for run in runs.values()]
    assert len(set(folders)) == len(folders) == 28  # 7 latents, with and without a head, both tasks
    made = {f"{run.run_dir}/export": run for run in runs.values()}
    sets: dict[str, set[str]] = {}
    for path, run in runs.items():
        assert run.autoencoder is not None
        sets.setdefault(run.autoencoder, set()).add(run.data.shards or "")
        if is_edit(path):
            assert run.flow.init_from is not None
            before = made[run.flow.init_from]
            assert (before.autoencoder, before.generator) == (run.autoencoder, run.generator)
        else:
            assert run.flow.init_from is None
    assert all(len(shards) == 2 for shards in sets.values()), "other latents need other shards"


def test_latents_of_a_config_are_those_of_its_autoencoder() -> None:
    """RPiAE's from the stage that trains its bridge; the sizes of the others: test_parameter_counts.py."""
    written = {
        f"{run.run_dir}/export": path
        for path in (CONFIGS / "tokenizer").rglob("*.yaml")
        if path.parent.name != "gpus"  # the main runs for other machines
        and (run := config.load(TokenizerRun, path)).stage.stage == "decoder"
    }
    for folder in (path for path in LATENT_SHAPES if path.endswith("decoder/export")):
        bridge = config.load(TokenizerRun, written[folder].with_name("bridge.yaml")).stage.bridge
        assert bridge is not None and (bridge.latent_channels, 16, 16) == LATENT_SHAPES[folder]
    used = {config.load(GeneratorRun, path).autoencoder for path in generator_configs()}
    used |= {config.load(ClassRun, path).autoencoder for path in CLASS.rglob("*.yaml")}
    assert used == LATENT_SHAPES.keys()


def test_class_conditional_runs_are_the_papers() -> None:
    """1,024 images a step; 60, 80 and 800 epochs of 1,251 steps; the rate constant until epoch 40, down until 800."""
    folders, epoch = [], 1251
    for path in CLASS.rglob("*.yaml"):
        run = config.load(ClassRun, path)
        folders.append(run.run_dir)
        assert run.packing.images_per_pack * run.data.num_streams == 1024
        epochs = int(path.stem.rpartition("_")[2]) if path.stem[-1] == "0" else 80
        optimizer, steps = run.engine.optimizer, run.engine.steps
        assert steps == epochs * epoch and run.engine.export_at_steps == (20 * epoch,)
        rates = [learning_rate(optimizer, at * epoch, steps) for at in (0, 40, 420, 800)]
        assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5])
        assert (run.engine.ema_decay, optimizer.grad_clip) == (0.9995, 1.0)
        assert ("ditdh" in path.stem) == (run.generator.head is not None)
    assert len(set(folders)) == len(folders) == 6 * 3 + 3 + 3


def test_the_recipes_page_shows_what_the_command_prints() -> None:
    page = (CONFIGS.parent / "docs" / "recipes.md").read_text()
    assert table(CONFIGS / "generator") in page, "run python -m launch.recipes configs/generator"


@pytest.mark.parametrize(("folder", "epoch"), [("tokenizer", 2502), ("tokenizer/release", 5004)])
def test_schedules_of_the_paper_in_epochs(folder: str, epoch: int) -> None:
    """ImageNet's 1,281,167 images; epochs of each stage as in docs/method.md."""
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


@pytest.mark.parametrize(
    ("kind", "path"), [(GeneratorRun, "t2i_cc12m.yaml"), (ClassRun, "class/rpiae64_80.yaml")]
)
def test_the_papers_runs_compile_but_not_under_zero_3(kind: type, path: str) -> None:
    run = config.load(kind, CONFIGS / "generator" / path)
    assert run.flow.compile
    with pytest.raises(config.ConfigError, match=r"set flow\.compile to false"):
        dataclasses.replace(run, engine=dataclasses.replace(run.engine, zero_stage=3))
