"""Every YAML in configs/ is one that an entry point reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TypeVar

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

RunT = TypeVar("RunT")
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
    "ablation": TokenizerRun,
    "latents": EncodeRun,
    "quickstart_class": ClassRun,
}
TOKENIZER, GENERATOR = CONFIGS / "tokenizer", CONFIGS / "generator"
CLASS = GENERATOR / "class"
PARTS = "parts"
"""Name of the folders whose files name no run and are merged into one."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A run as it is named on the command line."""

    files: tuple[Path, ...]
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join([*(str(path.relative_to(CONFIGS)) for path in self.files), *self.overrides])

    @property
    def name(self) -> str:
        """The stem of its first file."""
        return self.files[0].stem

    def load(self, kind: type[RunT]) -> RunT:
        return config.load(kind, self.files, self.overrides)


def files_of(folder: Path) -> list[Named]:
    """The runs that a file alone names."""
    return [Named((path,)) for path in sorted(folder.rglob("*.yaml")) if path.parent.name != PARTS]


def each(words: str, names: str) -> list[Named]:
    """The runs that the words of a command name: files in configs/ and overrides, with each of `names` for NAME."""
    runs = []
    for name in names.split():
        given = words.replace("NAME", name).split()
        files = tuple(CONFIGS / word for word in given if "=" not in word)
        runs.append(Named(files, tuple(word for word in given if "=" in word)))
    return runs


LATENTS = "rpiae32 rpiae128 rae va_vae sd_vae flux_vae"
CLASS_LATENTS = "rpiae32 rpiae64 rpiae128 rae_b rae_s va_vae"
STAGE_1_ROWS = (
    "table5b/cnn_frozen table5b/cnn_trained table5b/vit_frozen table5d/weight_025 table5d/weight_050"
)
STAGE_2_ROWS = "table5c/latent32 table5c/latent128"
STAGES = [
    *files_of(TOKENIZER),
    *each(
        "tokenizer/bridge.yaml run_dir=runs/ablations/NAME/bridge stage.init_from=runs/ablations/NAME/pivot/export",
        STAGE_1_ROWS,
    ),
    *each(
        "tokenizer/decoder.yaml run_dir=runs/ablations/NAME/decoder "
        "stage.init_from=runs/ablations/NAME/bridge/export",
        f"{STAGE_1_ROWS} {STAGE_2_ROWS}",
    ),
    *each(
        "tokenizer/pivot.yaml tokenizer/parts/NAME.yaml run_dir=runs/imagenet-packs-of-64/pivot",
        "packs_of_64",
    ),
    *each(
        "tokenizer/bridge.yaml tokenizer/parts/NAME.yaml run_dir=runs/imagenet-packs-of-64/bridge "
        "stage.init_from=runs/imagenet-packs-of-64/pivot/export",
        "packs_of_64",
    ),
    *each(
        "tokenizer/decoder.yaml tokenizer/parts/NAME.yaml run_dir=runs/imagenet-packs-of-64/decoder "
        "stage.init_from=runs/imagenet-packs-of-64/bridge/export",
        "packs_of_64",
    ),
]
GENERATORS = [
    *(named for named in files_of(GENERATOR) if CLASS not in named.files[0].parents),
    *each(
        "generator/latents/NAME.yaml generator/parts/ddt.yaml run_dir=runs/cc12m/t2i_NAME_ddt",
        LATENTS,
    ),
    *each(
        "generator/latents/NAME_edit.yaml generator/parts/ddt.yaml run_dir=runs/omniedit/edit_NAME_ddt "
        "flow.init_from=runs/cc12m/t2i_NAME_ddt/export",
        LATENTS,
    ),
]
EPOCHS = (
    "generator/class/NAME_80.yaml generator/class/parts/epochs_{0}.yaml run_dir=runs/imagenet/class/NAME_{0}"
)
SIZES = (
    "generator/class/rpiae64_80.yaml generator/class/parts/size_NAME.yaml "
    "run_dir=runs/imagenet/class/rpiae64_NAME_80"
)
CLASSES = [
    *files_of(CLASS),
    *each(EPOCHS.format(60), CLASS_LATENTS),
    *each(EPOCHS.format(800), CLASS_LATENTS),
    *each(SIZES, "s b l"),
]
PAPER: list[tuple[type, Named]] = [
    *((TokenizerRun, named) for named in STAGES),
    *((GeneratorRun, named) for named in GENERATORS),
    *((ClassRun, named) for named in CLASSES),
]
"""Every run of the paper and its class: the runs of a file, and those that docs/ put together of several."""


def kind_of(path: Path) -> type:
    parts = path.relative_to(CONFIGS).parts
    return KINDS.get("/".join(parts)) or FOLDERS[parts[0]]


OTHERS = [
    (kind_of(named.files[0]), named)
    for named in files_of(CONFIGS)
    if not {TOKENIZER, GENERATOR} & set(named.files[0].parents)
]
"""The runs of the miniature, and encodings."""


@pytest.mark.parametrize(
    ("kind", "named"), [*PAPER, *OTHERS], ids=[str(named) for _, named in (*PAPER, *OTHERS)]
)
def test_config_is_read_strictly_and_written_back_equal(kind: type, named: Named, tmp_path: Path) -> None:
    loaded = named.load(kind)
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.dump(loaded))
    assert config.load(kind, copy) == loaded


def test_parts_name_no_run_and_extend_nothing() -> None:
    """A part that named a task, a folder or parents would overwrite what the files before it say."""
    parts = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name == PARTS]
    assert len(parts) == 7
    for path in parts:
        text = path.read_text()
        assert text.startswith("# A part, for any ") and "extends" not in text
        assert not {"task", "run_dir"} & config.resolve(path).keys()


def test_global_batches_of_the_paper() -> None:
    """512 images a step for the tokenizer; 384 K to 400 K tokens for text-to-image, 192 K to 200 K for editing."""
    for stage in STAGES:
        run = stage.load(TokenizerRun)
        images = 256 if stage.files[0].parent.name == "release" else 512
        assert run.pixels.images_per_pack * run.data.num_streams == images
    for named in GENERATORS:
        generator = named.load(GeneratorRun)
        is_edit = generator.task == "edit"
        steps, low, high = (50_000, 192_000, 200_000) if is_edit else (200_000, 384_000, 400_000)
        tokens = generator.packing.tokens_per_pack * generator.data.num_streams
        if named.name == "edit_256":  # as its file says: as many tokens in larger, fewer steps
            assert tokens * generator.engine.steps == pytest.approx(32 * 6144 * 50_000, rel=1e-4)
        else:
            assert low <= tokens <= high and generator.engine.steps == steps, named
        assert is_edit == ("edit" in named.name)


def test_generators_have_folders_of_their_own_and_edits_start_from_text_to_image() -> None:
    """Over all latents: an edit has the autoencoder, shape and statistics of what it starts from."""
    runs = [
        named.load(GeneratorRun)
        for named in GENERATORS
        if named.files[0].parent.name != "gpus"  # the main run for other machines, in its folder
    ]
    folders = [run.run_dir for run in runs]
    assert len(set(folders)) == len(folders) == 28  # 7 latents, with and without a head, both tasks
    made = {f"{run.run_dir}/export": run for run in runs}
    sets: dict[str, set[str]] = {}
    for run in runs:
        assert run.autoencoder is not None
        sets.setdefault(run.autoencoder, set()).add(run.data.shards or "")
        if run.task == "edit":
            assert run.flow.init_from is not None
            before = made[run.flow.init_from]
            assert (before.autoencoder, before.generator) == (run.autoencoder, run.generator)
        else:
            assert run.flow.init_from is None
    assert all(len(shards) == 2 for shards in sets.values()), "other latents need other shards"


def test_latents_of_a_config_are_those_of_its_autoencoder() -> None:
    """RPiAE's from the stage that trains its bridge; the sizes of the others: test_parameter_counts.py."""
    written = {f"{run.run_dir}/export": run.stage for run in (named.load(TokenizerRun) for named in STAGES)}
    for folder in (path for path in LATENT_SHAPES if path.endswith("decoder/export")):
        decoder = written[folder]
        assert decoder.stage == "decoder" and decoder.init_from is not None
        bridge = written[decoder.init_from].bridge
        assert bridge is not None and (bridge.latent_channels, 16, 16) == LATENT_SHAPES[folder]
    used = {named.load(GeneratorRun).autoencoder for named in GENERATORS}
    used |= {named.load(ClassRun).autoencoder for named in CLASSES}
    assert used == LATENT_SHAPES.keys()


def test_class_conditional_runs_are_the_papers() -> None:
    """1,024 images a step; 60, 80 and 800 epochs of 1,251 steps; the rate constant until epoch 40, down until 800."""
    folders, epoch = [], 1251
    for named in CLASSES:
        run = named.load(ClassRun)
        folders.append(run.run_dir)
        assert run.packing.images_per_pack * run.data.num_streams == 1024
        number = Path(run.run_dir).name.rpartition("_")[2]
        epochs = int(number) if number.isdigit() else 80
        optimizer, steps = run.engine.optimizer, run.engine.steps
        assert steps == epochs * epoch and run.engine.export_at_steps == (20 * epoch,)
        rates = [learning_rate(optimizer, at * epoch, steps) for at in (0, 40, 420, 800)]
        assert rates == pytest.approx([2e-4, 2e-4, 1.1e-4, 2e-5])
        assert (run.engine.ema_decay, optimizer.grad_clip) == (0.9995, 1.0)
        assert ("ditdh" in named.name) == (run.generator.head is not None)
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
    """Over all stages: what an init_from names is what another stage writes."""
    runs = [named.load(TokenizerRun) for named in STAGES]
    folders = [run.run_dir for run in runs]
    assert len(set(folders)) == len(folders) == 32, "two configs write to one folder"
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
