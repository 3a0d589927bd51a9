"""The rows of the paper's tables that a run can be compared with (RPiAE, Tables 3, 4, 5, 8 and 9).

Every column says where its number stands in a scores.json. A table that repeats another table's columns names it.
"""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class Column:
    """One number of a table's row."""

    label: str
    suite: str
    metric: str
    """Name in scores.json; a name that ends with _ is the part before a judge's name."""
    group: str | None = None
    scale: float = 1.0
    """The table's number = scale times the score."""
    less_is_better: bool = False
    digits: int = 2
    """Digits after the point, as the paper prints them."""
    beside: str = ""
    """A metric that must be in the same scores, if the suite's name alone is ambiguous."""


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or the part of it with these columns."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""


RFID = Column("rFID", "reconstruction", "rfid", less_is_better=True)
RECONSTRUCTION = (
    RFID,
    Column("PSNR", "reconstruction", "psnr_db", digits=1),
    Column("LPIPS", "reconstruction", "lpips", less_is_better=True, digits=3),
    Column("SSIM", "reconstruction", "ssim", digits=3),
)
GENERATION = (
    Column("gFID", "generation", "fid", less_is_better=True),
    Column("IS", "generation", "inception_score", digits=1),
    Column("Prec.", "generation", "precision"),
    Column("Rec.", "generation", "recall"),
)
GENEVAL = Column("GenEval", "geneval", "geneval_rewritten")
TASKS = (
    ("Sin.Obj.", "single_object"),
    ("Two.Obj.", "two_object"),
    ("Counting", "counting"),
    ("Colors", "colors"),
    ("Pos", "position"),
    ("Color.Attr.", "color_attr"),
)
G_SC = Column("G_SC", "gedit", "g_sc_")
G_PQ = Column("G_PQ", "gedit", "g_pq_")

TABLES = (
    PaperTable(
        "Table 3, reconstruction (ImageNet validation, 256 px)",
        RECONSTRUCTION,
        (
            ("SD-VAE", (0.61, 26.9, 0.130, 0.736)),
            ("VA-VAE", (0.27, 27.7, 0.097, 0.779)),
            ("RAE-S", (0.64, 18.9, 0.252, 0.489)),
            ("RAE-B", (0.57, 18.8, 0.256, 0.483)),
            ("RPiAE", (0.50, 21.3, 0.216, 0.525)),
        ),
    ),
    PaperTable(
        "Table 3, class-conditional generation without guidance",
        GENERATION,
        (
            ("REPA-XL, SD-VAE, 80 epochs", (7.90, None, None, None)),
            ("LightningDiT, VA-VAE, 64 epochs", (5.14, 130.2, 0.76, 0.62)),
            ("SVG-XL, 80 epochs", (6.57, 137.9, None, None)),
            ("LightningDiT, RAE-S, 80 epochs", (3.05, 166.1, 0.79, 0.60)),
            ("LightningDiT, RAE-B, 80 epochs", (3.33, 189.9, 0.82, 0.55)),
            ("DiT-XL, RAE-B, 80 epochs", (2.16, 214.8, 0.82, 0.59)),
            ("LightningDiT, FAE-d32, 80 epochs", (2.08, 207.6, 0.82, 0.59)),
            ("LightningDiT, RPiAE, 60 epochs", (2.46, 201.1, 0.80, 0.59)),
            ("LightningDiT, RPiAE, 80 epochs", (2.25, 208.7, 0.81, 0.60)),
        ),
    ),
    PaperTable(
        "Table 3, class-conditional generation with guidance",
        GENERATION,
        (
            ("DiT-XL, RAE-B, 80 epochs", (1.74, 235.0, 0.81, 0.60)),
            ("LightningDiT, FAE-d32, 80 epochs", (1.70, 243.8, 0.82, 0.61)),
            ("LightningDiT, RPiAE, 60 epochs", (2.06, 208.5, 0.80, 0.61)),
            ("LightningDiT, RPiAE, 80 epochs", (1.51, 225.9, 0.79, 0.65)),
        ),
    ),
    PaperTable(
        "Table 4, GenEval with Bagel's rewritten prompts",
        (
            *(Column(label, "geneval", "correct", task, beside="geneval_rewritten") for label, task in TASKS),
            Column("Overall", "geneval", "geneval_rewritten"),
        ),
        (
            ("Flux-VAE", (0.93, 0.68, 0.48, 0.76, 0.51, 0.44, 0.63)),
            ("RAE-DINOv2-S", (0.97, 0.78, 0.52, 0.81, 0.60, 0.52, 0.70)),
            ("RAE-DINOv2-B", (0.93, 0.65, 0.46, 0.73, 0.47, 0.37, 0.60)),
            ("RAE-DINOv2-B + DDT head", (0.96, 0.81, 0.51, 0.82, 0.59, 0.44, 0.69)),
            ("VA-VAE", (0.96, 0.73, 0.44, 0.83, 0.49, 0.53, 0.66)),
            ("VA-VAE + DDT head", (0.94, 0.74, 0.38, 0.83, 0.47, 0.53, 0.65)),
            ("RPiAE", (0.96, 0.86, 0.64, 0.82, 0.63, 0.58, 0.75)),
            ("RPiAE + DDT head", (0.97, 0.86, 0.62, 0.89, 0.66, 0.56, 0.76)),
        ),
    ),
    PaperTable(
        "Table 4, DPG-Bench and GEdit-Bench-EN",
        (Column("DPG", "dpg", "dpg_"), G_SC, G_PQ, Column("G_O", "gedit", "g_o_")),
        (
            ("Flux-VAE", (77.44, 3.71, 8.42, 3.86)),
            ("RAE-DINOv2-S", (80.81, 2.86, 7.04, 3.09)),
            ("RAE-DINOv2-B", (78.58, 2.71, 8.03, 3.12)),
            ("RAE-DINOv2-B + DDT head", (80.82, 3.25, 7.76, 3.51)),
            ("VA-VAE", (78.69, 2.09, 7.69, 2.26)),
            ("VA-VAE + DDT head", (80.32, 2.04, 7.89, 2.27)),
            ("RPiAE", (82.59, 5.23, 8.34, 5.25)),
            ("RPiAE + DDT head", (83.34, 5.05, 7.86, 5.09)),
        ),
        "The paper's DPG judge is the benchmark's, its GEdit judge EditScore on Qwen3-VL-8B: compare with those alone.",
    ),
    PaperTable(
        "Table 5, ablations",
        (RFID, GENEVAL, G_SC, G_PQ),
        (
            ("stage I", (0.47, 0.58, 2.79, 8.33)),
            ("stages I + II", (1.57, 0.74, 4.72, 7.87)),
            ("stages I + II + III", (0.50, 0.75, 5.23, 8.34)),
            ("single stage", (0.64, 0.73, 4.84, 8.16)),
            ("SD decoder, encoder frozen", (1.35, 0.71, 4.68, 7.68)),
            ("SD decoder, encoder trained", (0.65, 0.71, 4.49, 8.01)),
            ("ViT-XL, encoder frozen", (0.62, 0.76, 5.04, 8.03)),
            ("32 channels", (0.58, 0.73, 5.34, 8.01)),
            ("128 channels", (0.47, 0.70, 5.15, 8.28)),
            ("w_piv 0.5", (0.33, 0.69, 5.04, 8.49)),
            ("w_piv 0.25", (0.22, 0.65, 4.66, 8.77)),
        ),
    ),
    PaperTable(
        "Table 8, 800 epochs, without guidance",
        GENERATION,
        (
            ("DiT-XL, SD-VAE, 1400 epochs", (9.62, 121.5, 0.67, 0.67)),
            ("LightningDiT, VA-VAE", (2.17, 205.6, 0.77, 0.65)),
            ("LightningDiT, RAE-B", (1.87, 209.7, 0.80, 0.63)),
            ("DiT-XL, RAE-B", (1.51, 242.9, 0.79, 0.63)),
            ("LightningDiT, FAE-d32", (1.48, 239.8, 0.81, 0.63)),
            ("LightningDiT, RPiAE", (1.68, 254.7, 0.79, 0.63)),
        ),
    ),
    PaperTable(
        "Table 8, 800 epochs, with guidance",
        GENERATION,
        (
            ("DiT-XL, SD-VAE, 1400 epochs", (2.27, 278.2, 0.83, 0.57)),
            ("LightningDiT, VA-VAE", (1.35, 295.3, 0.79, 0.65)),
            ("LightningDiT, RAE-B", (1.41, 309.4, 0.80, 0.63)),
            ("DiT-XL, RAE-B", (1.13, 262.6, 0.78, 0.67)),
            ("LightningDiT, FAE-d32", (1.29, 268.0, 0.80, 0.64)),
            ("LightningDiT, RPiAE", (1.09, 272.1, 0.75, 0.70)),
        ),
    ),
    PaperTable(
        "Table 9, linear probe on ImageNet (DINOv2's published head)",
        (
            Column("Top-1", "linear_probe", "top1", scale=100),
            Column("Top-5", "linear_probe", "top5", scale=100),
        ),
        (("DINOv2-B", (84.56, 97.04)), ("RPiAE", (84.18, 96.91))),
    ),
)
