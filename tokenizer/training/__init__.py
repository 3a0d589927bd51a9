"""The training stages of the tokenizer: objectives, losses, adaptive weights, the discriminator."""
