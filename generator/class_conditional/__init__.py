"""Class labels -> latents: LightningDiT and DiTDH on any latent shards."""
