"""Search an index by a text, a picture, a sound, a row, or several at once, embedded as one query vector."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.data import ShardDataset
from mmcontrast.embedder import Embedder, identity, kind_of, load
from mmcontrast.errors import UserError
from mmcontrast.evaluation.banks import read_texts
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.modalities import DecodeError
from mmcontrast.search.query import TEXTS, Hit, SearchIndex

SHOWN_CHARACTERS = 300  # of a caption
NAMES = {"images": "the picture", "texts": "the text", "audio": "the sound"}
Row = tuple[int, str]  # (row, its field that is the query)


def model_of(description: Mapping[str, Any], folder: Path, device: str | None, trust_code: bool = False) -> Embedder:
    """Open the model that made an index or an embedding table, by its description.

    Raises:
        UserError: if it does not name the model, or that has other weights by now; as `mmcontrast.load`.
    """
    for name in ("model", "checkpoint", "pretrained", "precision"):
        if not isinstance(value := description.get(name), str | None):
            raise UserError(f"{folder}: its {name} is {str(value)[:60]!r}: index again")
    if not isinstance(width := description.get("width"), int | None):
        raise UserError(f"{folder}: its width is {str(width)[:60]!r}: index again")
    if not description.get("model"):
        raise UserError(
            f"{folder}: its table does not say which model made it: embed again with mmcontrast embed, or name it with"
            " mmcontrast data table --model"
        )
    checkpoint_options: dict[str, Any] = {name: description.get(name) for name in ("checkpoint", "pretrained")}
    options: dict[str, Any] = {"precision": description.get("precision", "fp32"), "trust_code": trust_code, "width": width}
    weights, step = description.get("weights"), checkpoint_options["checkpoint"]
    if weights and identity(description["model"], **checkpoint_options).get("weights", weights) != weights:
        model = " ".join(str(part) for part in (description["model"], description.get("pretrained"), step) if part)
        raise UserError(f"{folder}: {model} has other weights now than those that made the table: embed again")
    return load(description["model"], device=device, **options, **checkpoint_options)


def bridge_from(query_embedder: Embedder, index: SearchIndex) -> Bridge:
    """Return the bridge of an index with its entries embedded by another model for queries.

    Raises:
        UserError: if the index has none, or not of texts; as `Embedder.embed`.
    """
    bridge, texts = index.table.bridge, index.folder / TEXTS
    if bridge is None or not texts.is_file():
        raise UserError(
            f"{index.folder} has no bridge of texts, through which {query_embedder.name} could ask: make one with"
            " mmcontrast index TABLE OUT --bridge words.txt"
        )
    return replace(bridge, queries=query_embedder.embed(texts=read_texts(texts)), query_scale=query_embedder.scale_of_texts())


class Searcher:
    """An index with the model that made its table, and the shards of its samples.

    Args:
        asking: another model that embeds the queries, for an index with a bridge of texts, which both models read.

    Attributes:
        kinds: per field of the table, "images", "texts", "audio" or "vectors".
        default_field: the field to search: the first with pictures, else the first.

    Raises:
        UserError: if the model's embeddings are of another width; for another model without a bridge.
    """

    def __init__(self, index: SearchIndex, embedder: Embedder, asking: Embedder | None = None) -> None:
        self.index, self.embedder, self.asking = index, embedder, asking or embedder
        self._turn = {"texts": Lock(), "audio": Lock()}  # tokenizers and extractors of libraries take one caller at a time
        if embedder.model.embed_dim != index.table.dim:
            raise UserError(f"{embedder.name} makes {embedder.model.embed_dim} numbers, the index holds {index.table.dim}")
        if (embedder.model.hyperbolic is None) != (index.table.distances is None):
            raise UserError(f"{embedder.name} and the index differ: one is of cosines, one of hyperbolic scores: embed again")
        self.kinds = {
            field: kind_of(embedder.model.modality(field)) for field in embedder.fields if field in index.table.fields
        }
        if asking is not None:
            index.table.bridge = bridge_from(asking, index)
        self.default_field = next((field for field in index.fields if self.kinds.get(field) == "images"), index.fields[0])

    @classmethod
    def open(
        cls, folder: str | Path, device: str | None = None, trust_code: bool = False, model: str | None = None
    ) -> "Searcher":
        """Open an index and the model that it names.

        Args:
            device, trust_code: of the model, as `mmcontrast.load`.
            model: another model that embeds the queries, as `mmcontrast.load`.

        Raises:
            UserError: as `SearchIndex` and `mmcontrast.load`.
        """
        index = SearchIndex.open(folder)
        embedder = model_of(index.about, index.folder, device, trust_code)
        return cls(index, embedder, None if model is None else load(model, device=device, trust_code=trust_code))

    def vector(
        self,
        *,
        text: str | None = None,
        image: str | Path | bytes | None = None,
        audio: str | Path | bytes | None = None,
        like: Row | None = None,
        words: float = 0.5,
    ) -> Tensor:
        """Embed a query as a vector [D]: the weighted sum of the embeddings of its parts, normalised if they are unit vectors
        (embedding-space arithmetic, ImageBind, arXiv:2305.05665).

        Args:
            image, audio: a file that is opened, or its bytes.
            like: a row of the table.
            words: the text's weight in [0, 1]; the other parts share the rest.

        Raises:
            UserError: if no part is given, or one cannot be read; if the model has no field for it.
        """
        if like and self.asking is not self.embedder:
            raise UserError(f"a stored row was embedded by {self.embedder.name}, not by {self.asking.name}: ask with its file")
        parts = [self._embed(kind, value) for kind, value in (("images", image), ("audio", audio)) if value is not None]
        parts += [self.index.vector(*like)] if like else []
        text_embedding = None if text is None or not text.strip() else self._embed("texts", text.strip())
        if not 0 <= words <= 1:
            raise UserError(f"the weight of the words is {words}: it is from 0 to 1")
        if text_embedding is None and not parts:
            raise UserError("nothing to search for: give a text, a picture or a sound")
        if not parts:
            assert text_embedding is not None
            return text_embedding
        other = torch.stack(parts).mean(0)
        combined = other if text_embedding is None else words * text_embedding + (1 - words) * other
        return F.normalize(combined, dim=0) if self.index.table.distances is None else combined

    def _embed(self, kind: str, value: Any) -> Tensor:
        query: dict[str, Any] = {kind: [value]}
        try:
            with self._turn.get(kind, nullcontext()):
                return self.asking.embed(**query)[0]
        except UserError as error:
            raise UserError(str(error).replace(f"{kind}[0]", NAMES[kind], 1)) from error

    def search(self, field: str | None = None, k: int = 10, like: Row | None = None, **query: Any) -> list[Hit]:
        """Return the best rows for a query, with the arguments of `vector`; the row `like` is left out.

        Raises:
            UserError: as `vector` and `SearchIndex.search`.
        """
        field = field or self.default_field
        self.index.check_field(field)
        return self.index.search(self.vector(like=like, **query), field, k, without=[like[0]] if like else [])

    @cached_property
    def dataset(self) -> ShardDataset:
        """Return the samples, by row.

        Raises:
            UserError: if the shards are missing, or have changed since they were embedded.
        """
        description = self.index.about
        if "shards" not in description:
            raise UserError("the index's table does not say of which shards it is: embed again with mmcontrast embed")
        dataset = self.embedder.dataset(description["shards"])
        if len(dataset) != len(self.index) or description.get("data", dataset.digest) != dataset.digest:
            raise UserError(f"{description['shards']}: these samples are not those of the index: embed and index them again")
        return dataset

    def media(self, row: int, field: str) -> bytes | None:
        """Return the member that a row's field was read from; None if it has none.

        Raises:
            UserError: if there is no such row or field, or it cannot be read.
        """
        self.index.check_row(row)
        if field not in self.dataset.keys:
            raise UserError(f"no field {field!r}; there is: {', '.join(self.dataset.keys)}")
        extensions = self.dataset.keys[field]
        try:
            members = self.dataset.members(row, extensions)
        except DecodeError as error:
            raise UserError(f"row {row}: {error}") from error
        self.index.check_unchanged()
        return next((members[extension] for extension in extensions if extension in members), None)

    def caption(self, hit: Hit, field: str | None = None) -> str:
        """Return a row's caption: its text, of `field` if that holds texts; else a text of its json, or its key.

        Raises:
            UserError: as `dataset`.
        """
        for name in sorted(self.kinds, key=lambda name: name != field):  # the searched field first
            if self.kinds[name] == "texts" and self.index.table.has(hit.row, name) and (data := self.media(hit.row, name)):
                return data.decode("utf-8", "replace").strip()[:SHOWN_CHARACTERS]
        texts = (hit.metadata[name] for name in ("caption", "text", "title", "name") if hit.metadata.get(name))
        return str(next(texts, hit.key))[:SHOWN_CHARACTERS]

    def examples(self, number: int = 6) -> list[str]:
        """Return captions of rows spread over the table, as examples of queries."""
        step, examples = max(1, len(self.index) // (4 * number)), []
        for row in range(0, len(self.index), step):
            caption = self.caption(self.index.hit(row, 0.0)).splitlines()[0]
            if 3 <= len(caption) <= 40 and caption not in examples:
                examples.append(caption)
            if len(examples) == number:
                break
        return examples
