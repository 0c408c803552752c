"""The probe is a helper of the tests, not a test: it needs the run-time compiler as soon as it is imported."""

collect_ignore = ["accumulator_probe.py"]
