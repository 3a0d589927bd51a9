"""Images -> feature vectors, by which sets of images are compared."""
