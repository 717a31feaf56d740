"""Measurements, no tests: how fast the package is beside the bare app and beside its peers."""
