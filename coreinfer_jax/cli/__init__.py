"""The `coreinfer` command: one module per subcommand."""

from coreinfer_jax.cli.main import main

__all__ = ["main"]
