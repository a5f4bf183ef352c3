"""The algorithm, as pure functions: activations -> votes -> core neurons -> narrowed weights."""
