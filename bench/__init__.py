"""Benchmarks: `make bench` runs them all, `make bench K=resnet18` a subset by keyword."""
