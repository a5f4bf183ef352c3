"""Prompts in, tokens out: rows of a running state, the compiled programs over them, and thin loops."""
