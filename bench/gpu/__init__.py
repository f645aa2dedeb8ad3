"""Correctness, speed and memory on an NVIDIA GPU: `python -m bench.gpu`."""
