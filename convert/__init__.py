"""Where every weight comes from: one table per model family, from Hugging Face names to this package's.

`python -m convert SRC DST` and `coreinfer convert` run the engine, `coreinfer_jax.io`, over these tables.
"""

from convert import llama, opt
from convert.table import Table

TABLES: dict[str, Table] = {"opt": opt.TABLE, "llama": llama.TABLE}

__all__ = ["TABLES", "Table"]
