"""Networks that turn images into feature vectors, by which sets of images are compared."""
