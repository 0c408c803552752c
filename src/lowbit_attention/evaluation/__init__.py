"""Recipes measured: metrics, inputs, errors by family and length. For the command line, benchmarks and calibration."""
