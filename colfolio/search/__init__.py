"""An index of documents on disk, exact search over it, and pictures of what answered."""

from colfolio.search.heatmap import heat_map, hit_image
from colfolio.search.index import Encoder, IndexSettings, Progress, build_index
from colfolio.search.searcher import Hit, Searcher, load_encoder
from colfolio.search.sources import SourcePage, corpus_pages
from colfolio.search.store import VectorStore

__all__ = [
    "Encoder",
    "Hit",
    "IndexSettings",
    "Progress",
    "Searcher",
    "SourcePage",
    "VectorStore",
    "build_index",
    "corpus_pages",
    "heat_map",
    "hit_image",
    "load_encoder",
]
