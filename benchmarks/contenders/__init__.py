"""What is measured side by side. Each contender runs in a process of its own: see `benchmarks.worker`."""
