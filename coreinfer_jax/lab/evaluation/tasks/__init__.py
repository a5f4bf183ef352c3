"""Tasks of lm-evaluation-harness, run dense and on core neurons; some that read local files are described here."""
