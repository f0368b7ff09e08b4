"""Webdataset shards: indexed, read in an exact order, decoded into batches; and written."""

from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.index import ShardIndex, expand_shards, index_shard
from mmcontrast.data.loading import all_batches, training_batches
from mmcontrast.data.mixture import MixtureDataset, MixtureOrder
from mmcontrast.data.order import SampleOrder
from mmcontrast.data.writer import write_corpus, write_shard

__all__ = [
    "MixtureDataset",
    "MixtureOrder",
    "SampleOrder",
    "ShardDataset",
    "ShardIndex",
    "all_batches",
    "expand_shards",
    "index_shard",
    "training_batches",
    "write_corpus",
    "write_shard",
]
