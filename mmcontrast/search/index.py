"""Build the indexes of an embedding table: one faiss index a field, with its measured recall, written atomically."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from rich.progress import Progress
from safetensors.torch import save_file

from mmcontrast.components import suggestion
from mmcontrast.errors import UserError
from mmcontrast.evaluation.banks import Bank, check_made_by, read_bank, scale_between
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.search.index_selection import IndexPlan, plan_index
from mmcontrast.search.query import BRIDGE, FORMAT, INDEX, TEXTS, faiss_module, nearest_rows, sha256_of
from mmcontrast.search.searcher import model_of
from mmcontrast.search.table import StoredTable
from mmcontrast.training.log import make_progress
from mmcontrast.whole_files import write_json

QUERIES, AT = 1000, 10  # of the measured recall
ENOUGH = 0.95  # of the recall: below, a search in a graph or in codes is made more thorough
SAME = 1e-6  # scores that differ by less are equal: a duplicate of the right row is right
# of the table's manifest
MODEL_AND_DATA = ("model", "checkpoint", "weights", "pretrained", "precision", "width", "shards", "data")


def build_index(
    table: Path,
    out: Path | None = None,
    fields: Sequence[str] | None = None,
    kind: str = "auto",
    memory: int | None = None,
    device: str | None = None,
    progress: bool = True,
    bridge: Path | None = None,
    through: str | None = None,
    scale: float | None = None,
    trust_code: bool = False,
) -> dict[str, Any]:
    """Index an embedding table: write `out/<field>.faiss` and `out/index.json`, and return the contents of the latter.

    Args:
        table: a folder that `mmcontrast embed` wrote. Its parts are read one at a time.
        out: a new folder; default: `table/index`.
        fields: default: all that some row has.
        kind: "auto", "flat", "hnsw" or "ivf_pq"; see `plan_index`.
        memory: bytes that each index may take; default: half of the machine's.
        device: "cpu": do not use GPUs, which otherwise learn the lists of ivf_pq, if this faiss can use them.
        bridge: compare rows through a bank, a text file, shards or an embedding table of the same model: the index holds
            expected entries, see `mmcontrast.evaluation.bridge`. The table's model is opened to read the texts.
        through: the bank's field. scale: its κ; default: the model's logit scale.
        trust_code: of the model, as `mmcontrast.load`.

    Raises:
        UserError: if faiss is missing; for an incomplete or damaged table, a field that it lacks, an `out` that exists.
    """
    faiss_module()
    stored, folder = StoredTable(table), out or table / "index"
    if folder.exists():
        raise UserError(f"{folder} exists: remove it, or choose another folder")
    for field in fields or ():
        if field not in stored.fields:
            raise UserError(f"--field {field}: {table} has none of this name; {suggestion(field, stored.fields)}")
    selected = list(dict.fromkeys(fields)) if fields else [field for field in stored.fields if len(stored.present(field))]
    empty = next((field for field in selected if not len(stored.present(field))), None)
    if empty or not selected:
        raise UserError(f"{table}: no row has {f'the field {empty!r}' if empty else 'any field'}: there is nothing to index")
    bank = None if bridge is None else _read_table_bank(stored, bridge, through, scale, device, trust_code)
    partial = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        bridge_entry = {} if bank is None or bridge is None else {"bridge": _write_bridge(stored, bank, bridge, partial)}
        with make_progress(progress) as bar:
            exact = stored.distances is not None
            plans = {  # all before the first is built: an impossible one is refused at once
                field: plan_index(len(stored.present(field)), stored.product_dim, kind, memory, exact) for field in selected
            }
            entries = {
                field: _build_field_index(stored, field, selected, partial, plan, device, bar) for field, plan in plans.items()
            }
        inside = table.resolve() in folder.resolve().parents
        header: dict[str, Any] = {"format": FORMAT, "table": os.path.relpath(table, folder) if inside else str(table.resolve())}
        header |= {"table_digest": stored.digest, "rows": len(stored), "dim": stored.dim}
        header |= {name: stored.manifest[name] for name in MODEL_AND_DATA if name in stored.manifest}
        description = header | bridge_entry | {"fields": entries}
        write_json(partial / INDEX, description)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description


def _read_table_bank(
    table: StoredTable, source: Path, through: str | None, scale: float | None, device: str | None, trust_code: bool
) -> Bank:
    if table.distances is not None:
        raise UserError(f"--bridge {source}: the table's scores are hyperbolic, and a bank is compared by cosines")
    check_made_by(source, table.manifest)
    embedder = model_of(table.manifest, table.folder, device, trust_code)
    with embedder.autocast():
        bank = read_bank(embedder.model, source, through, scale, embedder.device, embedder.keys)
    other_fields = [field for field in table.fields if field != bank.field]
    return replace(bank, scale=scale or scale_between(embedder.model, other_fields, bank.field))


def _write_bridge(table: StoredTable, bank: Bank, source: Path, folder: Path) -> dict[str, Any]:
    """Set and write the bridge through which the table's rows are compared; return its entry in `index.json`."""
    assert bank.scale is not None
    table.bridge = Bridge(bank.rows, bank.rows, bank.scale, bank.scale)
    save_file({"bank": bank.rows.contiguous()}, folder / BRIDGE)
    if bank.texts:  # for other models to read
        (folder / TEXTS).write_text("\n".join(bank.texts) + "\n", encoding="utf-8")
    entry = {"bank": str(source), "field": bank.field, "scale": bank.scale, "entries": len(bank.rows)}
    return entry | {"sha256": sha256_of(folder / BRIDGE)}


def _build_field_index(
    table: StoredTable, field: str, fields: Sequence[str], folder: Path, plan: IndexPlan, device: str | None, bar: Progress
) -> dict[str, Any]:
    """Build, measure and write a field's index; return its entry in `index.json`."""
    faiss, start = faiss_module(), time.perf_counter()
    rows = table.present(field)
    index = faiss.index_factory(table.product_dim, plan.factory, faiss.METRIC_INNER_PRODUCT)
    if plan.train_rows:
        if device != "cpu" and faiss.get_num_gpus():  # not tested: no faiss for GPUs was at hand
            trainer = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(table.dim))  # faiss keeps no reference to it
            faiss.extract_index_ivf(index).clustering_index = trainer
        task = bar.add_task(f"{field}: learning {plan.factory}", total=None, note="")
        sample = table.vectors(field, _spread_sample(rows, plan.train_rows))
        index.train(sample if table.bridge is None else table.compared(sample, columns=True))
        faiss.extract_index_ivf(index).clustering_index = None
        bar.remove_task(task)
    task = bar.add_task(f"{field}: {plan.kind}", total=len(rows), note="")
    for numbers, vectors in table.blocks(field):
        index.add_with_ids(table.compared(vectors, columns=True).astype(np.float32), numbers)
        bar.advance(task, len(numbers))
    query_field = next((name for name in [*fields, *table.fields] if name != field and len(table.present(name))), field)
    task = bar.add_task(f"{field}: measuring the recall", total=None, note="")
    recall = Recall(table, field, query_field)
    for search in plan.search:
        faiss.ParameterSpace().set_index_parameters(index, search)
        value = recall.measure(index, plan.kind)
        if value >= ENOUGH:
            break
    bar.remove_task(task)
    path = folder / f"{field}.faiss"
    faiss.write_index(index, str(path))
    return {
        "kind": plan.kind,
        "factory": plan.factory,
        "search": search,
        "reason": plan.reason,
        "rows": len(rows),
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "seconds": round(time.perf_counter() - start, 3),
        "recall": {"value": round(value, 4), **recall.description},
    }


class Recall:
    """The recall of an index: the share of the k best rows of an exact search that it finds; k = 10, or all if there are fewer.

    Up to 1,000 stored vectors of the field `query_field`, evenly spread, are the queries: of another field if there is one, as
    in use; else of the field itself, and then a row does not count as its own neighbour. A row is right if its exact score is
    no less than that of the k-th best, so that equal rows stand for each other.

    Attributes:
        description: `at`: k; `queries`: the field; `number` of them; `self_excluded`.
    """

    def __init__(self, table: StoredTable, field: str, query_field: str) -> None:
        self.table, self.field, self.same_field = table, field, query_field == field
        self.rows = _spread_sample(table.present(query_field), QUERIES)
        self.vectors, self.k = table.vectors(query_field, self.rows), min(AT, len(table.present(field)) - self.same_field)
        self.queries = table.compared(self.vectors)
        self.description = {"at": self.k, "queries": query_field, "number": len(self.rows), "self_excluded": self.same_field}
        best = np.full((len(self.rows), 0), 0, dtype=np.float32)
        for numbers, block in table.blocks(field) if self.k else ():
            scores = self.queries @ table.compared(block, columns=True).T
            if self.same_field:
                scores[numbers == self.rows[:, None]] = -np.inf
            merged = np.concatenate([best, scores], 1)
            best = np.partition(merged, -self.k, 1)[:, -self.k :] if merged.shape[1] > self.k else merged
        self.kth = best.min(1) if self.k else np.empty(0)

    def measure(self, index: Any, kind: str) -> float:
        """Return the recall of an index."""
        if not self.k:
            return 1.0
        shares = np.zeros(len(self.rows))
        neighbours = nearest_rows(index, self.table, self.field, kind, self.vectors, self.k + self.same_field)[1]
        for number, rows in enumerate(neighbours):
            rows = rows[(rows >= 0) & ~(self.same_field & (rows == self.rows[number]))][: self.k]
            candidates = self.table.compared(self.table.vectors(self.field, rows), columns=True)
            shares[number] = (candidates @ self.queries[number] >= self.kth[number] - SAME).sum() / self.k
        return float(shares.mean())


def _spread_sample(rows: np.ndarray, number: int) -> np.ndarray:
    """Return `number` of the rows, or all, evenly spread."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(np.int64))]
