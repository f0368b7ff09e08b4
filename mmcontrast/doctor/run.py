"""Checks a config on this machine: its shards open, its samples decode, its checkpoints fit."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mmcontrast.config import RunConfig, load_config
from mmcontrast.data import ShardDataset, ShardOptions, StreamDataset, expand_shards, index_shard
from mmcontrast.data.decoding import Sample
from mmcontrast.data.files import is_remote, open_file
from mmcontrast.data.loading import batches_ahead, free_memory
from mmcontrast.doctor.check import BAD, WARNING, Check, one_line, size
from mmcontrast.doctor.host import cache_disk, cores, disk, open_files, processes, shared_memory
from mmcontrast.errors import UserError
from mmcontrast.models import ContrastiveModel
from mmcontrast.run_checks import check_components, check_components_ahead
from mmcontrast.runs import completed, modalities_of, model_of, without_pretrained
from mmcontrast.training.data import make_dataset, make_source, training_modalities
from mmcontrast.training.data_options import SourceOptions
from mmcontrast.training.optim import freeze

SAMPLES, SECONDS, AT_A_TIME = 200, 5.0, 8  # that are decoded, at most


def run_checks(path: Path, overrides: Sequence[str], rate: float | None) -> Iterator[Check]:
    """Yield the checks of a config: of the machine for its run, its checkpoints, its shards and its samples."""
    try:
        config = load_config(path, overrides)
        check_components_ahead(config)
        if config.model.starts:  # its fields are the model's
            config = completed(config, model_of(config, tokenizers=False, weights=False))
            check_components(config)
    except UserError as error:
        yield Check("config", one_line(error), BAD, "correct it: the rest of it is not looked at")
        return
    workers, fields = config.data.num_workers, len(config.fields)
    towers = len({field.tower for field in config.fields.values()})
    yield Check("config", f"{path}: {fields} fields, {towers} towers, {length_of(config)}")
    yield cores(workers, config.train.threads)
    yield open_files(workers, fields)
    yield checkpoints(config)
    yield cache_disk()
    yield from shards(config)
    bytes_each = []
    for name, source in sources(config).items():
        check = samples(name, source, config, rate)
        bytes_each += [check.numbers["bytes_each"]] if check.numbers else []
        yield check
    if workers and bytes_each:
        yield _check_prefetch(max(bytes_each), config)


def _check_prefetch(bytes_each: float, config: RunConfig) -> Check:
    """Check whether the batches that workers have ready fit into shared memory, by a sample's bytes."""
    workers, ranks, share = config.data.num_workers, processes(), config.train.batch_size // processes()
    if config.data.prefetch:
        ahead = max(1, config.data.prefetch // (workers * max(1, share)))
    else:
        ahead = batches_ahead(bytes_each * share, workers * ranks, free_memory())
    needed, samples = int(bytes_each * share * workers * ranks * ahead), share * workers * ahead
    batches = f"{ahead} batch{'es' if ahead > 1 else ''} each"
    return shared_memory(
        needed, f"; {workers} workers keep up to {batches}, {samples} samples a process: {size(needed)} in all"
    )


def checkpoints(config: RunConfig) -> Check:
    """Check the free space for the checkpoints that are kept, and one that is being written."""
    name, remedy = "disk of the run", "make room, lower train.keep_checkpoints, or set run.dir to another disk"
    try:
        checkpoint_size = checkpoint_bytes(config)
    except UserError as error:
        return Check(name, f"the model cannot be built: {one_line(error)}", BAD, "correct the config")
    kept = config.train.keep_checkpoints + 2  # the best, and the one that is being written
    if config.train.keep_every and config.train.steps:
        kept += config.train.steps // config.train.keep_every
    reason = f"; {kept} checkpoints of {size(checkpoint_size)} at most"
    if config.train.keep_every and not config.train.steps:
        reason += ", and those of every keep_every-th step: how many steps its epochs have, the data tell in training"
    check = disk(name, config.folder, kept * checkpoint_size, remedy, why=reason)
    return Check(check.name, check.found, check.state, check.remedy, {**check.numbers, "checkpoint_bytes": checkpoint_size})


def length_of(config: RunConfig) -> str:
    """Return how long a run is, in words: how many steps epochs have is known once the data are open."""
    return f"{config.train.steps} steps" if config.train.epochs is None else f"{config.train.epochs:g} epochs"


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of a checkpoint: weights, averages, a queue's encoder and embeddings, and two moments for each trainable
    weight (AdamW's). The model takes no memory where its towers allow that, and pretrained weights are not loaded.

    Raises:
        UserError: for towers or patterns that do not fit.
    """
    make_model = partial(model_of, without_pretrained(config), weights=False)
    try:
        with torch.device("meta"):
            model = make_model()
    except RuntimeError:  # a tower that computes when it is built
        model = make_model()
    freeze(model, config.train.freeze)
    weights = sum(p.nbytes for p in model.state_dict().values())
    trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    queue = config.train.queue_size * len(model.modalities) * (4 * model.embed_dim + 8)
    copies = 1 + bool(config.train.ema_decay) + bool(config.train.queue_size)
    return copies * weights + 2 * trainable + queue


def sources(config: RunConfig) -> Mapping[str, SourceOptions]:
    """Return the sources of the training data, by name."""
    train = config.data.train
    return train if isinstance(train, dict) else {"train": SourceOptions(shards=train)}


def shards(config: RunConfig) -> Iterator[Check]:
    """Check that every pattern matches, and that the first and the last shard of each set open."""
    sets = {f"data.{name}": source.shards for name, source in sources(config).items()}
    for name, split in config.evaluation.splits.items():
        sets[f"evaluation.splits.{name}"] = ShardOptions.of(split).shards
    for name, patterns in sets.items():
        try:
            names = expand_shards(patterns)
            for shard in dict.fromkeys((names[0], names[-1])):
                _open(shard, config.data.sequential)
        except UserError as error:
            yield Check(f"shards of {name}", one_line(error), BAD, "correct the path, or build, copy or repair the shard")
        else:
            yield Check(f"shards of {name}", f"{len(names)}; the first and the last open")


def _open(shard: str, sequential: bool) -> None:
    """Index a shard where that costs little, else read its first byte."""
    if is_remote(shard) or sequential:
        file = open_file(shard)
        file.read(0, min(1, file.size))
    else:
        index_shard(shard)


def samples(name: str, source: SourceOptions, config: RunConfig, rate: float | None) -> Check:
    """Decode and transform some samples, from the first and the last shard, on one thread as a worker does."""
    title = f"samples of data.{name}"
    keys = {field: options.keys for field, options in config.fields.items() if options.keys}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = expand_shards(source.shards)
        ends = source.model_copy(update={"shards": list(dict.fromkeys((names[0], names[-1])))})
        modalities = ContrastiveModel(modalities_of(config), {}, {}, 1)
        dataset: ShardDataset | StreamDataset
        if config.data.sequential:
            field_modalities = training_modalities(config.fields, modalities)
            dataset = StreamDataset(source.shards, field_modalities, keys, config.train.seed)
        elif isinstance(config.data.train, dict):
            dataset = make_source(name, ends, config.fields, modalities, config.train.seed)
        else:
            dataset = make_dataset(ends.shards, config.fields, modalities, seed=config.train.seed, training=True)
        seen, seconds = _time_batches(_sample_batches(dataset))
        if isinstance(problem := dataset.collate(seen), str):
            return Check(title, problem, BAD, "repair it, or correct `fields`")
    except UserError as error:
        return Check(title, one_line(error), BAD, "correct the path or `fields`, or repair the shard")
    finally:
        torch.set_num_threads(threads)
    return _judge_samples(title, seen, seconds, config, rate)


def _judge_samples(title: str, seen: Sequence[Sample], seconds: float, config: RunConfig, rate: float | None) -> Check:
    rate_of_worker, bad = len(seen) / seconds, sum(len(sample.replaces) for sample in seen)
    numbers = {"per_second_and_worker": rate_of_worker, "samples": len(seen), "bad": bad}
    numbers["bytes_each"] = sum(value.nbytes for sample in seen for value in sample.values.values()) / len(seen)
    found, workers, ranks = f"{rate_of_worker:.0f}/s with one worker, of {len(seen)}", config.data.num_workers, processes()
    if bad:
        first = next(sample.replaces[0]["error"] for sample in seen if sample.replaces)
        state = BAD if bad > config.data.max_bad_share * (len(seen) + bad) else WARNING
        found = f"{bad} of {len(seen) + bad} are bad: {first}"
        return Check(title, found, state, "`mmcontrast data verify` lists all", numbers)
    if rate:
        needed = math.ceil(rate / (rate_of_worker * ranks))
        found += f"; {rate:g}/s over {ranks} processes take {needed} workers each, there are {workers}"
        if needed > max(1, workers):
            return Check(title, found, WARNING, f"set data.num_workers to {needed}", numbers)
    return Check(title, found, numbers=numbers)


def _sample_batches(dataset: ShardDataset | StreamDataset) -> Iterator[list[Sample]]:
    if isinstance(dataset, StreamDataset):
        stream = iter(dataset.starting(0, 0))
        yield from iter(lambda: list(islice(stream, AT_A_TIME)), [])
        return
    places = np.unique(np.linspace(0, len(dataset) - 1, min(SAMPLES, len(dataset))).astype(np.int64))
    for start in range(0, len(places), AT_A_TIME):
        yield dataset.__getitems__([int(place) for place in places[start : start + AT_A_TIME]])


def _time_batches(batches: Iterator[list[Sample]]) -> tuple[list[Sample], float]:
    """Return up to `SAMPLES` samples, within `SECONDS`, and the seconds that they took. The first batch, which may load a
    tokenizer, does not count if there are others."""
    start = time.perf_counter()
    seen: list[Sample] = []
    warm_up = 0
    for batch in batches:
        seen += batch
        now = time.perf_counter()
        if not warm_up:
            warm_up, start, first = len(batch), now, now - start
        if len(seen) >= SAMPLES or now - start > SECONDS:
            break
    if not seen:
        raise UserError("there is no sample in the shards")
    return seen, (now - start) * len(seen) / (len(seen) - warm_up) if len(seen) > warm_up else first
