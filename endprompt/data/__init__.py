"""What a run trains on: documents, shards of their tokens, rows with positions and weights."""

from endprompt.data.documents import Document, Documents, encoder, read_documents
from endprompt.data.mixture import Mixture
from endprompt.data.rows import Batch, Rows, RowSpec, row_spec
from endprompt.data.shards import load_documents, prepare, read_shard

__all__ = [
    "Batch",
    "Document",
    "Documents",
    "Mixture",
    "RowSpec",
    "Rows",
    "encoder",
    "load_documents",
    "prepare",
    "read_documents",
    "read_shard",
    "row_spec",
]
