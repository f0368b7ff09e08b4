"""Embedding tables that were made before, by (model, data): a suite that is run again does not embed again."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError

from mmcontrast.data import ShardDataset
from mmcontrast.data.range_cache import cache_root
from mmcontrast.evaluation.embed import EmbeddingTable
from mmcontrast.models import ContrastiveModel

PLAIN = str | bytes | int | float | complex | None | Enum | re.Pattern | torch.dtype | Path  # whose `repr` says all
NO_PART = {"origin", "cache", "tokenizer_cache", "training", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks"}


def fingerprint(model: ContrastiveModel) -> str:
    """Of its weights, of what else its parts are made with, and of how its fields are read: equal for equal embeddings."""
    found = hashlib.blake2b(digest_size=16)
    add_to(found, model)
    return found.hexdigest()


def add_to(found: "hashlib.blake2b", value: Any, inside: tuple[int, ...] = ()) -> None:
    """Anything a model is made of, the same in every process: tensors by their bytes, objects by their class and what they
    hold, by name; not what they keep to be faster, like a tokenizer's `cache`."""
    if id(value) in inside:
        return
    inside = (*inside, id(value))
    if isinstance(value, torch.Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        if set(map(type, value.values())) <= {str, int}:  # a vocabulary: at once
            found.update(repr(sorted((str(key), each) for key, each in value.items() if key not in NO_PART)).encode())
            return
        for key in sorted(value, key=str):
            if key not in NO_PART:
                found.update(f"{key}=".encode())
                add_to(found, value[key], inside)
    elif isinstance(value, list | tuple):
        for item in value:
            add_to(found, item, inside)
    elif isinstance(value, partial):
        add_to(found, [value.func, value.args, value.keywords], inside)
    elif isinstance(value, PLAIN):
        found.update(repr(value).encode())
    elif isinstance(value, set | frozenset):
        found.update(repr(sorted(map(repr, value))).encode())
    else:
        found.update(f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}".encode())
        if hasattr(value, "to_str"):  # of a tokenizer that is not made of Python's objects
            found.update(value.to_str().encode())
        elif not callable(value) or isinstance(value, torch.nn.Module) or not hasattr(value, "__qualname__"):
            with suppress(TypeError):  # what no process can be given has no state
                add_to(found, value.__getstate__(), inside)


def table_folder(model: str, dataset: ShardDataset, root: Path | None = None) -> Path:
    """Where the table of a data set by the model of that fingerprint is kept: $MMCONTRAST_CACHE/embeddings/…. A file that has
    changed since makes another."""
    found = hashlib.blake2b(f"{model} {dataset.digest} {dataset.keys}".encode(), digest_size=16)
    for shard in dataset.shards:
        found.update(shard.name.encode())
        if os.path.exists(shard.name):
            found.update(str(os.stat(shard.name).st_mtime_ns).encode())
    add_to(found, dataset.modalities)
    if dataset.templates:
        add_to(found, dataset.templates)
    return (root or cache_root() / "embeddings") / found.hexdigest()


def keep(table: EmbeddingTable, folder: Path, about: Mapping[str, str]) -> None:
    """Writes a table, which appears when it is whole, if it can be: without it nothing is lost. Another process may have been
    first."""
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
    try:
        table.write(partial, dict(about))
        os.replace(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():
            logging.getLogger(__name__).warning("embeddings are not kept in %s: %s", folder.parent, error)
