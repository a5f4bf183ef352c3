"""Measurements: scripts that write JSON lines under `results/`, and the report that turns them into README tables."""
