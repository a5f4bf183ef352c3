"""Groups of texts whose core neurons serve prompts like them (paper, section 3.3): made, stored, looked at."""

from coreinfer_jax.lab.clustering.build import build_clusters
from coreinfer_jax.lab.clustering.inspection import inspect_clusters
from coreinfer_jax.lab.clustering.published import import_published
from coreinfer_jax.lab.clustering.storage import load_clusters

__all__ = ["build_clusters", "import_published", "inspect_clusters", "load_clusters"]
