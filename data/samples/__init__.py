"""What is in a sample: captions, images, latents, the order of its parts, text."""
