"""Commands of search: index a table, search it, and serve a page to search with."""

import socket
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from mmcontrast.arguments import Device, TrustCode
from mmcontrast.errors import UserError
from mmcontrast.strict_json import dumps

console = Console(stderr=True, soft_wrap=True)
LOOPBACK = "127.0.0.1"
IndexFolder = Annotated[Path, typer.Argument(help="what mmcontrast index made: TABLE/index", metavar="INDEX")]


def index(
    table: Annotated[Path, typer.Argument(help="an embedding table: the OUT of mmcontrast embed", metavar="TABLE")],
    out: Annotated[Path | None, typer.Argument(help="a new folder; default: TABLE/index", metavar="[OUT]")] = None,
    field: Annotated[list[str] | None, typer.Option(help="index this field alone; may be repeated; default: all")] = None,
    kind: Annotated[str, typer.Option(help="auto, flat (exact), hnsw (a graph), ivf_pq (codes)")] = "auto",
    memory: Annotated[
        float | None, typer.Option(min=0.001, help="GiB that an index may take; default: half of this machine's")
    ] = None,
    bridge: Annotated[
        Path | None,
        typer.Option(help="compare fields that were never paired through a bank: a text file, shards, or an embedding table"),
    ] = None,
    through: Annotated[str | None, typer.Option(help="the bank's field; default: the first of texts", metavar="FIELD")] = None,
    scale: Annotated[
        float | None, typer.Option(min=0.001, help="of the softmax over the bank; default: the model's logit scale")
    ] = None,
    device: Device = None,
    trust_code: TrustCode = False,
) -> None:
    """Build indexes of an embedding table, a faiss index a field, to search in millions of rows.

    Up to 50,000 rows are searched exactly; more of them by a graph (HNSW) if it fits in the memory, else by codes (IVF-PQ).
    The recall against an exact search is measured, printed and kept in index.json.

    mmcontrast embed runs/quickstart 'data/glyphs/val-*.tar' table && mmcontrast index table

    mmcontrast index table table/bridged --bridge words.txt
    """
    from mmcontrast.search.index import build_index

    bridge_options: dict[str, Any] = {"bridge": bridge, "through": through, "scale": scale, "trust_code": trust_code}
    description = build_index(table, out, field, kind, round(memory * 2**30) if memory else None, device, **bridge_options)
    results = Table("field", "kind", "rows", "MiB", "seconds", "recall", box=None)
    for name, entry in description["fields"].items():
        recall = entry["recall"]
        measured = f"{recall['value']:.3f} at {recall['at']} ({recall['number']:,} of {recall['queries']})"
        size, seconds = f"{entry['bytes'] / 2**20:.1f}", f"{entry['seconds']:.1f}"
        results.add_row(name, entry["factory"], f"{entry['rows']:,}", size, seconds, measured)
    console.print(results, highlight=False)
    for reason in dict.fromkeys((entry["kind"], entry["reason"]) for entry in description["fields"].values()):
        console.print(": ".join(reason), highlight=False)
    folder = out or table / "index"
    console.print(f"search it: mmcontrast search {folder} --text '…'      mmcontrast serve {folder}", highlight=False)


def search(
    index: IndexFolder,
    text: Annotated[str | None, typer.Option(help="a text query")] = None,
    image: Annotated[Path | None, typer.Option(help="a picture's file")] = None,
    audio: Annotated[Path | None, typer.Option(help="a sound's file")] = None,
    field: Annotated[str | None, typer.Option("--in", metavar="FIELD", help="default: pictures, if there are any")] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="how many")] = 10,
    words: Annotated[float, typer.Option(min=0, max=1, help="weight of --text beside a picture or a sound")] = 0.5,
    model: Annotated[
        str | None, typer.Option(help="embed the query with another model; needs an index made with --bridge")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print rows, scores, keys, captions, metadata as JSON")] = False,
    device: Device = None,
    trust_code: TrustCode = False,
) -> None:
    """Find the samples nearest to a text, a picture, a sound, or several of them together.

    mmcontrast search table/index --text "a black diamond suit" --k 5

    mmcontrast search table/index --image photo.jpg --text "at night" --words 0.3 --in caption

    mmcontrast search sounds/bridged --image photo.jpg --in audio --model ViT-B-32/laion2b_s34b_b79k
    """
    from mmcontrast.search.searcher import Searcher

    searcher = Searcher.open(index, device, trust_code, model)
    hits = searcher.search(field, k, text=text, image=image, audio=audio, words=words)
    captions = _captions(searcher, hits, field)
    if as_json:
        rows = [vars(hit) | {"caption": caption} for hit, caption in zip(hits, captions, strict=True)]
        print(dumps(rows, ensure_ascii=False, indent=1))
        return
    title = f"in {field or searcher.default_field}"
    results = Table("", "score", "key", "caption", title=title, title_justify="left", box=None)
    for rank, (hit, caption) in enumerate(zip(hits, captions, strict=True), 1):
        cells = (str(rank), f"{hit.score:.3f}", hit.key, " ".join(caption.split()))
        results.add_row(*(_plain(cell) for cell in cells))
    Console(soft_wrap=True).print(results, highlight=False)


def _captions(searcher: Any, hits: list[Any], field: str | None) -> list[str]:
    try:
        return [searcher.caption(hit, field) for hit in hits]
    except UserError as error:
        console.print(f"captions are left out: {_plain(str(error))}", highlight=False)
        return [""] * len(hits)


def _plain(text: str) -> str:
    """Return a text without markup and control characters."""
    from rich.markup import escape

    return escape("".join(letter if letter.isprintable() else "�" for letter in text))


def serve(
    index: IndexFolder,
    port: Annotated[int, typer.Option(min=1, max=65535, help="to listen at")] = 8321,
    host: Annotated[str, typer.Option(help="an address to listen at; others than the loopback let others in")] = LOOPBACK,
    device: Device = None,
    trust_code: TrustCode = False,
) -> None:
    """Serve a page to search with: type, drop a picture or a sound, look, listen, go on from what is found.

    It listens on this machine alone unless --host says otherwise. Ctrl-C ends it.
    """
    try:
        from mmcontrast.search.serve import listen, run_server
    except ImportError as error:
        raise UserError(f"the page's server is not installed ({error}): pip install 'mmcontrast[serve]'") from error
    from mmcontrast.search.searcher import Searcher

    with listen(host, port) as sock:  # before the model is read: a port in use fails at once
        searcher = Searcher.open(index, device, trust_code)
        if host not in (LOOPBACK, "localhost", "::1"):
            console.print(f"[bold red]anybody who reaches {host} can search here[/], and see and hear all samples: no password")
        shown_host = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        console.print(f"open http://{shown_host}:{port}   ({len(searcher.index):,} samples; Ctrl-C ends)", highlight=False)
        run_server(searcher, sock, host)
    console.print("stopped", highlight=False)
