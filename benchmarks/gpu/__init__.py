"""The contents of `make gpu`: tests/gpu, then every measurement of the page benchmarks/results/gpu_DEVICE.md."""
