"""CoreInfer in JAX: generate with only the MLP neurons a prompt needs (arXiv 2410.18311)."""

from coreinfer_jax.checkpoint import convert, load
from coreinfer_jax.clustering import build_clusters, import_published, inspect_clusters, load_clusters
from coreinfer_jax.config import CoreConfig, ModelConfig, Rope
from coreinfer_jax.continuation import Scores, score_continuations
from coreinfer_jax.conversation import Conversation, converse
from coreinfer_jax.core.compact import compact
from coreinfer_jax.core.groups import Clusters, Groups, prepare_groups
from coreinfer_jax.core.neurons import CoreNeurons
from coreinfer_jax.core.predict import Choice
from coreinfer_jax.core.select import select_core_neurons
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.generation import generate, stream
from coreinfer_jax.params import Params
from coreinfer_jax.results import Chunk, Generation, Stats
from coreinfer_jax.scoring import forward
from coreinfer_jax.text.documents import Documents, read_documents

__all__ = [
    "Choice",
    "Chunk",
    "Clusters",
    "Conversation",
    "CoreConfig",
    "CoreInferError",
    "CoreNeurons",
    "Documents",
    "Generation",
    "Groups",
    "ModelConfig",
    "Params",
    "Rope",
    "Scores",
    "Stats",
    "build_clusters",
    "compact",
    "converse",
    "convert",
    "forward",
    "generate",
    "import_published",
    "inspect_clusters",
    "load",
    "load_clusters",
    "prepare_groups",
    "read_documents",
    "score_continuations",
    "select_core_neurons",
    "stream",
]
