"""CoreInfer in JAX: generate with only the MLP neurons a prompt needs (arXiv 2410.18311)."""

from coreinfer_jax.engine.batching import Finished, Prompt, generate_many
from coreinfer_jax.engine.conversation import Conversation, converse
from coreinfer_jax.engine.forward import forward
from coreinfer_jax.engine.generation import generate, stream
from coreinfer_jax.engine.options import GenerateOptions
from coreinfer_jax.engine.results import Chunk, Drafting, Generation, Stats
from coreinfer_jax.engine.scoring import Scores, score_continuations
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.io import convert, load
from coreinfer_jax.lab.clustering import build_clusters, import_published, inspect_clusters, load_clusters
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.shards import make_mesh
from coreinfer_jax.model.spread import spread
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity import rules
from coreinfer_jax.sparsity.choice import Choice
from coreinfer_jax.sparsity.groups import Clusters, Groups, TextVectors
from coreinfer_jax.sparsity.moving import DeviceRows
from coreinfer_jax.sparsity.narrow import compact
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.sparsity.similarity import Auto, Fused, Similarity, prepare_groups
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.sparsity.votes import select_core_neurons
from coreinfer_jax.text.documents import Documents, read_documents

__all__ = [
    "Auto",
    "Choice",
    "Chunk",
    "Clusters",
    "Conversation",
    "CoreConfig",
    "CoreInferError",
    "CoreNeurons",
    "DeviceRows",
    "Documents",
    "Drafting",
    "Finished",
    "Fused",
    "GenerateOptions",
    "Generation",
    "Groups",
    "ModelConfig",
    "Params",
    "Prompt",
    "Rope",
    "Scores",
    "Similarity",
    "Stats",
    "TextVectors",
    "build_clusters",
    "compact",
    "converse",
    "convert",
    "forward",
    "generate",
    "generate_many",
    "import_published",
    "inspect_clusters",
    "load",
    "load_clusters",
    "make_mesh",
    "prepare_groups",
    "read_documents",
    "rules",
    "score_continuations",
    "select_core_neurons",
    "spread",
    "stream",
]
