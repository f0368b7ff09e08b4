"""Cache embedding tables by (model, data), so that a suite that is run again does not embed again."""

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
from mmcontrast.data.folder import FolderIndex
from mmcontrast.data.keys import member_name
from mmcontrast.data.parts import ShardPart
from mmcontrast.data.range_cache import cache_root
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.tables import table_behind
from mmcontrast.evaluation.embed import EmbeddingTable
from mmcontrast.models import ContrastiveModel

PLAIN = str | bytes | int | float | complex | None | Enum | re.Pattern | torch.dtype | Path  # types whose `repr` is complete
NO_PART = {"origin", "cache", "tokenizer_cache", "training", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks"}


def fingerprint(model: ContrastiveModel) -> str:
    """Return a hash of a model's weights, its parts' settings, and how its fields are read: equal for equal embeddings."""
    digest = hashlib.blake2b(digest_size=16)
    update_hash(digest, model)
    return digest.hexdigest()


def update_hash(digest: "hashlib.blake2b", value: Any, inside: tuple[int, ...] = ()) -> None:
    """Hash anything a model is made of, equally in every process: tensors by their bytes, objects by their class and
    attributes, but not what they only keep for speed, like a tokenizer's `cache`."""
    if id(value) in inside:
        return
    inside = (*inside, id(value))
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        if set(map(type, value.values())) <= {str, int}:  # a vocabulary: at once
            digest.update(repr(sorted((str(key), item) for key, item in value.items() if key not in NO_PART)).encode())
            return
        for key in sorted(value, key=str):
            if key not in NO_PART:
                digest.update(f"{key}=".encode())
                update_hash(digest, value[key], inside)
    elif isinstance(value, list | tuple):
        for item in value:
            update_hash(digest, item, inside)
    elif isinstance(value, partial):
        update_hash(digest, [value.func, value.args, value.keywords], inside)
    elif isinstance(value, PLAIN):
        digest.update(repr(value).encode())
    elif isinstance(value, set | frozenset):
        digest.update(repr(sorted(map(repr, value))).encode())
    else:
        digest.update(f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}".encode())
        if hasattr(value, "to_str"):  # a tokenizer in Rust
            digest.update(value.to_str().encode())
        elif not callable(value) or isinstance(value, torch.nn.Module) or not hasattr(value, "__qualname__"):
            with suppress(TypeError):  # objects that cannot be pickled have no state
                update_hash(digest, value.__getstate__(), inside)


def table_folder(model: str, dataset: ShardDataset, root: Path | None = None) -> Path:
    """Return the folder of the table of a data set by the model with that fingerprint: $MMCONTRAST_CACHE/embeddings/…. It
    changes with the files of the data, those that a table names too."""
    digest = hashlib.blake2b(f"{model} {dataset.digest} {dataset.keys}".encode(), digest_size=16)
    for shard in dataset.shards:
        digest.update(f"{shard.name}{times_of(shard)}".encode())
    digest.update(files_digest(dataset).encode())
    update_hash(digest, dataset.modalities)
    if dataset.templates:
        update_hash(digest, dataset.templates)
    return (root or cache_root() / "embeddings") / digest.hexdigest()


def times_of(shard: ShardIndex) -> str:
    """Return when a shard's file was written last, of a folder all of its files; "" of a remote one."""
    behind = shard.shard if isinstance(shard, ShardPart) else shard
    if isinstance(behind, FolderIndex):
        return behind.changed
    return str(os.stat(shard.name).st_mtime_ns) if os.path.exists(shard.name) else ""


def files_digest(dataset: ShardDataset) -> str:
    """Return a digest of the sizes and times of the files that tables name, "" where no table names one."""
    extensions = {member_name(key) for keys in dataset.keys.values() for key in keys}
    digest, any_file = hashlib.blake2b(digest_size=16), False
    for shard in dataset.shards:
        if (table := table_behind(shard)) is not None:
            for state in table.states_of_files(extensions):
                digest.update(f"{state},".encode())
                any_file = True
    return digest.hexdigest() if any_file else ""


def keep(table: EmbeddingTable, folder: Path, description: Mapping[str, str]) -> None:
    """Write a table atomically, if possible: without it nothing is lost. Another process may have been first."""
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
    try:
        table.write(temporary, dict(description))
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.exists():
            logging.getLogger(__name__).warning("embeddings are not kept in %s: %s", folder.parent, error)
