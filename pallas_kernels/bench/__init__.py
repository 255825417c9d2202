"""How close kernels come to the speed of memory: `python -m pallas_kernels.bench`."""
