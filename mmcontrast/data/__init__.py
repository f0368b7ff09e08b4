"""Shards of samples: indexed, read in an exact order, decoded into batches; and written."""

from mmcontrast.data.clusters import ClusterOrder, clusters_of
from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.files import expand_shards
from mmcontrast.data.index import index_shard, open_shards
from mmcontrast.data.loading import TrainingDataset, TrainingOrder, all_batches, training_batches
from mmcontrast.data.mixture import MixtureDataset, MixtureOrder
from mmcontrast.data.neighbours import NeighbourOrder, open_neighbours
from mmcontrast.data.opening import ShardOptions, Shards, open_dataset, read_keys
from mmcontrast.data.order import SampleOrder
from mmcontrast.data.shard import ShardIndex
from mmcontrast.data.stream import StreamDataset, StreamOrder
from mmcontrast.data.views import StoredEmbeddings, TeacherView
from mmcontrast.data.writer import write_corpus, write_shard

__all__ = [
    "ClusterOrder",
    "MixtureDataset",
    "MixtureOrder",
    "NeighbourOrder",
    "SampleOrder",
    "ShardDataset",
    "ShardIndex",
    "ShardOptions",
    "Shards",
    "StoredEmbeddings",
    "StreamDataset",
    "StreamOrder",
    "TeacherView",
    "TrainingDataset",
    "TrainingOrder",
    "all_batches",
    "clusters_of",
    "expand_shards",
    "index_shard",
    "open_dataset",
    "open_neighbours",
    "open_shards",
    "read_keys",
    "training_batches",
    "write_corpus",
    "write_shard",
]
