"""One config for the three tokenizer stages and the single-stage baseline (paper 3.3; docs/method.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from base.bounds import Amount, Count, Seed, Step, Weight
from base.config import ConfigError
from tokenizer.config import AutoencoderConfig, BridgeConfig, RepresentationConfig
from tokenizer.training.health import HealthConfig

StageName = Literal["pivot", "bridge", "decoder", "joint"]
PivotLoss = Literal["raw", "normalised"]
NoiseLaw = Literal["gaussian", "uniform"]
PAPER_TAU = 0.8


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator's frozen features and trainable heads."""

    representation: RepresentationConfig
    """The frozen model whose features the heads see (paper: DINOv2-S; release: DINO ViT-S/8)."""
    depths: tuple[Amount, ...] = (2, 5, 8, 11)
    """Blocks (0-based) whose outputs get a head each, increasing."""
    kernel_size: Count = 9
    """Tokens that a head's convolution spans, along the row-major token sequence; odd."""

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0 or self.kernel_size < 1:
            raise ConfigError(f"discriminator.kernel_size {self.kernel_size} must be odd")


@dataclass(frozen=True)
class PerceptualConfig:
    """The kind of perceptual distance, and the networks that it needs."""

    kind: Literal["lpips_vgg16", "representation", "none"] = "lpips_vgg16"
    """LPIPS (paper), distance of a frozen representation model's patch features, or no perceptual loss."""
    vgg16_weights: str = "download"
    """For lpips_vgg16: `download` (torchvision's ImageNet weights), the path of that .pth file, or `random`
    (to measure memory and time only)."""
    representation: RepresentationConfig | None = None
    """For representation: the frozen model."""
    depths: tuple[Amount, ...] = ()
    """For representation: blocks (0-based, increasing) whose patch features are compared."""


@dataclass(frozen=True)
class GanConfig:
    """The adversarial loss: its networks, start steps and weight."""

    discriminator: DiscriminatorConfig
    """The discriminator's features and heads."""
    update_start_step: int
    """Global step from which the discriminator is trained (paper: epoch 6)."""
    loss_start_step: int
    """Global step from which its loss reaches the decoder (paper: epoch 8)."""
    weight: float = 0.75
    """w_G, multiplied by the adaptive lambda_gan."""


@dataclass(frozen=True)
class StageConfig:
    """What a stage starts from and what it minimises. Keys of other stages' losses have no effect."""

    stage: StageName
    """pivot: E and D; bridge: VB; decoder: D on frozen latents; joint: all at once (the baseline)."""
    autoencoder: AutoencoderConfig | None = None
    """A new autoencoder to train (pivot: without a bridge; joint: with one). Exclusive with init_from."""
    init_from: str | None = None
    """Directory of an exported autoencoder to start from. Exclusive with autoencoder."""
    bridge: BridgeConfig | None = None
    """The new bridge that the bridge stage trains, if init_from has none."""
    seed: Seed = 0
    """Seed of the initial weights that are not loaded."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """The perceptual distance of the pivot, decoder and joint stages."""
    w_lpips: Weight = 1.0
    """w_L: weight of the perceptual distance; 0 builds none."""
    train_encoder: bool = True
    """Pivot stage: whether E is trained; off: D alone learns, on the frozen f with noise (RAE; ablation 5b)."""
    pivot_loss: PivotLoss = "raw"
    """raw: mean squared difference; normalised: after scaling every token to length 1 (ablation Norm-L2)."""
    w_pivot: Weight = 1.0
    """w_piv: weight of the pivot loss, times lambda_piv (paper 1.0, release 0.75)."""
    adaptive_pivot: bool = True
    """Whether lambda_piv balances the pivot loss against the reconstruction; off: lambda_piv = 1."""
    adaptive_pivot_start_step: Step = 1000
    """Global step before which lambda_piv is 1 (encoder and replica are still equal)."""
    discriminator: DiscriminatorConfig | None = None
    """Features and heads of the adversarial loss; None: no adversarial loss."""
    w_gan: Weight = 0.75
    """w_G: weight of the adversarial loss, times lambda_gan."""
    gan_update_start_step: Step = 0
    """Global step from which the discriminator is trained (paper: epoch 6)."""
    gan_loss_start_step: Step = 0
    """Global step from which the adversarial loss reaches the decoder (paper: epoch 8)."""
    noise_tau: Weight | None = None
    """Scale of the Gaussian noise on what D reads (pivot, joint) or VB_e reads (bridge; release 0.8);
    training only. None: the paper's, 0.8 for pivot and joint, 0 for bridge. The decoder stage has no
    noise."""
    noise_law: NoiseLaw = "gaussian"
    """Sigma of a sample: gaussian |N(0, tau^2)| (paper) or uniform tau U(0, 1) (release)."""
    kl_weight: Weight = 1e-3
    """beta: weight of the KL term (bridge, joint)."""
    rec_weight: Weight = 0.05
    """w_rec: weight of L1 in pixels in the bridge stage; 0 leaves the pixel decoder out."""
    sample_latent: bool = True
    """Whether the bridge and joint stages draw z from the posterior; off: z = mu."""
    activation_checkpointing: bool = False
    """Whether backward passes recompute each layer, so that memory holds the activations of one layer instead of all.
    Once L_GAN is in the loss, the adaptive weights pass backward through D twice: more time than the usual third."""
    compile: bool = False
    """Whether torch.compile compiles the blocks of encoder, bridge, decoder and frozen networks. Once L_GAN is in the
    loss, lambda_piv's own pass through D then computes D's gradients too: a quarter more work in D."""
    health: HealthConfig = field(default_factory=HealthConfig)
    """When the training raises an alarm."""

    def __post_init__(self) -> None:
        if (self.autoencoder is None) == (self.init_from is None):
            raise ConfigError(
                "give exactly one of autoencoder (start anew) and init_from (an exported autoencoder)"
            )
        if self.bridge is not None and self.stage != "bridge":
            raise ConfigError(f"'bridge' belongs to the bridge stage, not to '{self.stage}'")
        if self.stage in ("bridge", "decoder") and self.init_from is None:
            raise ConfigError(f"the {self.stage} stage needs init_from: the export of the stage before it")
        if not self.train_encoder and self.stage != "pivot":
            raise ConfigError(f"train_encoder=false belongs to the pivot stage, not to '{self.stage}'")
        if self.stage == "decoder" and self.noise_tau:
            raise ConfigError("the decoder stage has no noise (z = mu); remove noise_tau")
        if self.gan is not None and self.gan_loss_start_step < self.gan_update_start_step:
            raise ConfigError(
                f"gan_loss_start_step {self.gan_loss_start_step} comes before gan_update_start_step "
                f"{self.gan_update_start_step}: D would follow a discriminator that has learned nothing; raise it"
            )

    @property
    def tau(self) -> float:
        """The noise scale in force."""
        if self.noise_tau is None:
            return PAPER_TAU if self.stage in ("pivot", "joint") else 0.0
        return self.noise_tau

    @property
    def weighs_pivot(self) -> bool:
        """Whether the forward pass computes lambda_piv from gradients; ZeRO-3 has no weights at hand there."""
        return self.adaptive_pivot and self.stage in ("pivot", "joint")

    @property
    def gan(self) -> GanConfig | None:
        """The adversarial loss in force; the bridge stage has none."""
        if self.discriminator is None or self.stage == "bridge":
            return None
        return GanConfig(self.discriminator, self.gan_update_start_step, self.gan_loss_start_step, self.w_gan)
