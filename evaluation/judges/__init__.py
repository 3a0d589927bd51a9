"""Models that judge images: detectors, colour namers, vision-language models."""
