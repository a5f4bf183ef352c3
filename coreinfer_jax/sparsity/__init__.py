"""The algorithm, as pure functions: activations -> sums -> core neurons -> narrowed weights."""
