"""What a GPU has to show, in eight minutes: `bash benchmarks/gpu.sh OUT`."""
