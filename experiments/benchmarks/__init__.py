"""Speed as ratios measured in one run: `python -m experiments.benchmarks.NAME`."""
