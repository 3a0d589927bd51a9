"""The three training stages: objectives, losses, adaptive weights, the discriminator."""
