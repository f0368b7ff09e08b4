"""Search embedding tables: indexes of their fields, queries by text, picture and sound, and a page to search with.

Names are imported at their first use: the commands' file needs neither torch nor faiss.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcontrast.search.index import build_index
    from mmcontrast.search.query import Hit, SearchIndex
    from mmcontrast.search.searcher import Searcher

_HOMES = {"build_index": "index", "Hit": "query", "SearchIndex": "query", "Searcher": "searcher"}
__all__ = ["Hit", "SearchIndex", "Searcher", "build_index"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mmcontrast.search' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmcontrast.search.{_HOMES[name]}"), name)
