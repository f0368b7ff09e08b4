"""Compares pairings on emoji: pairs of fields with products of three, and ten languages anchored to pictures or to each other.

    mmcontrast data build data_pipelines/emoji/emoji.yaml && mmcontrast data build data_pipelines/emoji/together.yaml
    python benchmarks/emoji.py together     # configs/emoji-together.yaml
    python benchmarks/emoji.py languages    # configs/emoji.yaml

together: the share of validation samples whose picture's emoji comes first among 50, by the text and the voice together. The
text names three emoji in three languages, the voice speaks the language that counts: the text alone finds one in three at best.
languages: recall at 1 of name → picture, the mean over ten languages, the least of them, and the mean rank variance over
languages (arXiv:2406.18254), on new pictures of trained emoji.
"""

import json
from pathlib import Path

import torch
from arms import Recalls, compare, mmcontrast, parser_of  # type: ignore[import-not-found]  # beside this file

from mmcontrast.evaluation import EmbeddingTable

PAIRS = ["model.logit_scale=20", "model.max_logit_scale=100"]
TOGETHER = {
    "anchored to pictures": ["pairing={type: anchor, field: image}", *PAIRS],  # texts and voices are independent
    "products, multilinear": [],
}
LANGUAGES = {
    "anchored to pictures": ["pairing={type: anchor, field: image}"],
    "all pairs": [],
}


def train(folder: Path, config: str, arms: dict[str, list[str]], arm: str, seed: int) -> Path:
    """Train the run of an arm and a seed, unless it is there."""
    run = folder / f"{list(arms).index(arm):02d}-{seed}"
    if not (run / "done").exists():
        options = [f"run.dir={run.parent}", f"run.name={run.name}", f"train.seed={seed}", *arms[arm]]
        mmcontrast("train", config, "--overwrite", *options)
        (run / "done").touch()
    return run


def together(folder: Path, arm: str, seed: int) -> Recalls:
    """Return the shares of pictures that text, voice, and both find."""
    run = train(folder, "configs/emoji-together.yaml", TOGETHER, arm, seed)
    if not (run / "val" / "manifest.json").exists():
        mmcontrast("embed", run, "data/emoji-together/val-*.tar", run / "val")
    table = EmbeddingTable.read(run / "val")
    shown = [metadata["shown"] for metadata in table.metadata]
    first = {emoji: row for row, emoji in reversed(list(enumerate(shown)))}  # of each emoji a picture
    queries = [row for row in range(len(shown)) if row not in first.values()]
    candidates = table.fields["image"][list(first.values())]
    right = torch.tensor([list(first).index(shown[row]) for row in queries])
    text, audio = table.fields["text"][queries], table.fields["audio"][queries]
    both = text * audio if "products" in arm else text + audio

    def share(query: torch.Tensor) -> list[float]:
        return [((query @ candidates.T).argmax(1) == right).double().mean().item()]

    return {"text → picture": share(text), "voice → picture": share(audio), "text and voice → picture": share(both)}


def languages(folder: Path, arm: str, seed: int) -> Recalls:
    """Return recall over languages, and its variance, as the run's own evaluation has it."""
    run = train(folder, "configs/emoji.yaml", LANGUAGES, arm, seed)
    results = json.loads((run / "results.json").read_text())["results"]
    prefix = "val_voices/languages/names"
    recalls = [results[f"{prefix}/{language}_to_image/recall_at_1"]["value"] for language in LANGUAGE_NAMES]
    variance = results[f"{prefix}/to_image/mean_rank_variance"]["value"]
    return {"mean of ten": [sum(recalls) / len(recalls)], "least": [min(recalls)], "mean rank variance": [variance]}


LANGUAGE_NAMES = ("en", "fr", "de", "es", "ru", "tr", "sw", "hi", "ar", "zh")
TASKS = {
    "together": (TOGETHER, together, ["text → picture", "voice → picture", "text and voice → picture"]),
    "languages": (LANGUAGES, languages, ["mean of ten", "least", "mean rank variance"]),
}


def main() -> None:
    parser = parser_of(__doc__, {*TOGETHER, *LANGUAGES}, "runs/emoji")
    parser.add_argument("task", choices=list(TASKS))
    options = parser.parse_args()
    arms, run, columns = TASKS[options.task]
    options.arms = [arm for arm in arms if arm in options.arms]
    options.folder = folder = options.folder / options.task
    compare(options, lambda arm, seed: run(folder, arm, seed), columns, [("#2166ac", "all")])


if __name__ == "__main__":
    main()
