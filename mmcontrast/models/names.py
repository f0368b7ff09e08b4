"""Open models of other libraries by name, with their weights, tokenizer, preprocessing, logit scale and bias."""

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from mmcontrast.errors import UserError
from mmcontrast.libraries import opening, refuse_adapter
from mmcontrast.models.contrastive import ContrastiveModel
from mmcontrast.models.sizes import OWN_SIZES, Sizes

OPEN_CLIP_CONFIG, BARE_CONFIG = "open_clip_config.json", "mmcontrast_model.json"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz"}  # suffixes of files of weights
LIBRARIES = ("open_clip", "transformers", "timm")
EXPORT_FIRST = "export it to open_clip or huggingface, and begin with that folder"


def open_model(
    name: str,
    pretrained: str | None = None,
    pooling: str | None = None,
    weights: bool = True,
    trust_code: bool = False,
    sizes: Sizes = OWN_SIZES,
) -> ContrastiveModel:
    """Open a model on the CPU, in fp32, in evaluation mode.

    A name is read, in this order, as: a folder, by the config in it; "open_clip:…", "timm:…", "transformers:…";
    "hf-hub:org/name", for timm if "timm/" is followed by one of its architectures, else for open_clip; an architecture of
    open_clip, also with a tag ("ViT-B-32/laion2b_s34b_b79k"); an architecture of timm; a name on the hub, "timm/…" for timm,
    any other for transformers.

    Args:
        pretrained: of an architecture: an open_clip tag, or a checkpoint's file.
        pooling: of a plain transformers encoder: "mean", "first" or "last".
        weights: False: random ones.
        trust_code: import the code that a folder of our own names by import path.
        sizes: other sizes than the model's own.

    Raises:
        UserError: in one line, for an unknown name, and for missing or wrong files.
    """
    with opening(f"{name}: pretrained={pretrained!r}" if Path(pretrained or "").is_file() else name):
        library, name = resolved(name)
        if library == "mmcontrast":
            return _open_bare(name, pretrained, pooling, weights, trust_code, sizes)
        if pooling and library != "transformers":
            raise UserError(f"{name}: pooling={pooling!r} is for encoders of transformers; {library} has its own")
        if library == "open_clip":
            from mmcontrast.models.open_clip import open_open_clip

            return open_open_clip(name, pretrained, weights, sizes)
        if library == "timm":
            from mmcontrast.models.timm import open_timm

            if pretrained and ":" not in name and not Path(pretrained).is_file():
                raise FileNotFoundError(f"pretrained={pretrained!r}: no such file; leave it out for timm's weights")
            return open_timm(name, pretrained, weights, sizes)
        if pretrained:
            raise UserError(f"{name} has its own weights: leave out pretrained={pretrained!r}")
        from mmcontrast.models.transformers import open_transformers

        return open_transformers(name, pooling, weights, sizes)


def _open_bare(
    name: str, pretrained: str | None, pooling: str | None, weights: bool, trust_code: bool, sizes: Sizes
) -> ContrastiveModel:
    """Open a folder of our own: the model that it describes, or one of another library in it."""
    from mmcontrast.models.bare import compose_bare, read_bare

    if pretrained or pooling:
        raise UserError(f"{name} is whole: it takes neither pretrained nor pooling")
    description = read_bare(Path(name))
    if "library" not in description:
        for option in sizes.given:
            sizes.refuse(name, option, "a composed model has the sizes of its towers: " + EXPORT_FIRST)
        return compose_bare(Path(name), description, trust_code, weights)
    inner = Path(name) / Path(description["library"]["folder"]).name
    if library_of(inner) in (None, "mmcontrast"):
        raise UserError(f"{inner} holds no model of another library")
    return open_model(str(inner), None, description["library"]["pooling"], weights, sizes=sizes)


def resolved(name: str) -> tuple[str, str]:
    """Return the library of a name, and the name as the library takes it, in the order of `open_model`.

    Raises:
        UserError: for an unknown name.
    """
    from mmcontrast.models.open_clip import is_architecture
    from mmcontrast.models.timm import is_timm

    prefix, colon, rest = name.partition(":")
    prefixed = prefix if colon and prefix in LIBRARIES else None
    if prefixed or prefix == "local-dir":
        name = rest
    refuse_adapter(name)
    if Path(name).is_dir() and (library := library_of(Path(name))):
        if prefixed not in (None, library):
            raise UserError(f"{name} is a folder of {library}, not of {prefixed}")
        check_weight_files(Path(name))
        return library, name if library in ("transformers", "mmcontrast") else f"local-dir:{name}"
    if Path(name).is_dir() and not is_architecture(name) and not is_timm(name):
        raise UserError(
            f"{name} holds no model: neither config.yaml (a run), {BARE_CONFIG}, {OPEN_CLIP_CONFIG}, nor config.json"
            " (transformers, timm)"
        )
    if prefixed:
        hub = prefixed != "transformers" and "/" in name and not (prefixed == "open_clip" and is_architecture(name))
        return prefixed, f"hf-hub:{name}" if hub and ":" not in name else name
    if prefix == "hf-hub":
        return "timm" if _is_of_timm(rest) else "open_clip", name
    if is_architecture(name):
        return "open_clip", name
    if is_timm(name):
        return "timm", name
    if name.count("/") == 1 and all(name.split("/")) and not Path(name).is_file():
        return ("timm", f"hf-hub:{name}") if _is_of_timm(name) else ("transformers", name)
    if Path(name).is_file():
        raise UserError(f"{name} is a file: name the architecture that it holds, with pretrained={name!r}")
    close = difflib.get_close_matches(name, list(_architectures()), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "open_clip.list_models(), timm.list_models()"
    raise UserError(f"no model {name!r}: no folder, no architecture of open_clip or timm ({hint}), no org/name of the hub")


def _is_of_timm(name: str) -> bool:
    """Return whether a name on the hub is an architecture of timm."""
    from mmcontrast.models.timm import is_timm

    owner, _, architecture = name.partition("/")
    return owner == "timm" and is_timm(architecture)


def check_weight_files(folder: Path) -> None:
    """Check that an index of weights in several files names only files of the folder.

    Raises:
        UserError: if it names another path.
    """
    for file in sorted(folder.glob("*.index.json")):
        index = json.loads(file.read_text(encoding="utf-8"))
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        for name in weight_map.values() if isinstance(weight_map, dict) else ():
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{file} names {str(name)[:200]!r}: the parts of a model's weights lie beside it")


def weights_digest(path: Path) -> str | None:
    """Return a digest of a local model's weights: of a checkpoint's file, or of the weight files in a folder; None if it has
    none."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in WEIGHTS)
    sums = []
    for file in files:
        with file.open("rb") as stream:
            sums.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16] if sums else None


def library_of(folder: Path) -> str | None:
    """Return the library of a folder's model, by the config in it; None if there is none."""
    if (folder / BARE_CONFIG).is_file():
        return "mmcontrast"
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return "open_clip"
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    if not isinstance(config, dict):
        return None
    return "timm" if "architecture" in config else "transformers"


def _architectures() -> Iterator[str]:
    """Yield the architectures of open_clip and timm."""
    import open_clip
    import timm

    yield from open_clip.list_models()
    yield from timm.list_models()
