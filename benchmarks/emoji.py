"""Compares pairings on emoji: pairs of fields with products of three, and ten languages anchored to pictures or to each other.

    mmcontrast data build data_pipelines/emoji/emoji.yaml && mmcontrast data build data_pipelines/emoji/together.yaml
    python benchmarks/emoji.py together     # configs/emoji-together.yaml
    python benchmarks/emoji.py languages    # configs/emoji.yaml

together: the share of validation samples whose picture's emoji comes first among 50, by the text and the voice together. The
text names three emoji in three languages, the voice speaks the language that counts: the text alone finds one in three at best.
languages: recall at 1 of name → picture, the mean over ten languages, the least of them, and the mean rank variance over
languages (arXiv:2406.18254), on new pictures of trained emoji; and of a name → that in another language, the mean over ninety
pairs, by cosine and through the training pictures (docs/bridge.md), of trained and of new emoji.
"""

import json
from itertools import permutations
from pathlib import Path

import torch
from arms import Recalls, compare, parser_of, recall_at_1, table_of, train  # type: ignore[import-not-found]  # beside this file

from mmcontrast import load
from mmcontrast.evaluation.banks import read_bank

PAIRS = ["model.logit_scale=20", "model.max_logit_scale=100"]
TOGETHER = {
    "anchored to pictures": ["pairing={type: anchor, field: image}", *PAIRS],  # texts and voices are independent
    "products, multilinear": [],
}
LANGUAGES = {
    "anchored to pictures": ["pairing={type: anchor, field: image}"],
    "all pairs": [],
}


def together(folder: Path, arm: str, seed: int) -> Recalls:
    """Return the shares of pictures that text, voice, and both find."""
    table = table_of(train(folder, "configs/emoji-together.yaml", TOGETHER, arm, seed), "data/emoji-together/val-*.tar", "val")
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
    """Return recall over languages, and its variance, as the run's own evaluation has it; and between languages."""
    run = train(folder, "configs/emoji.yaml", LANGUAGES, arm, seed)
    results = json.loads((run / "results.json").read_text())["results"]
    prefix = "val_voices/languages/names"
    recalls = [results[f"{prefix}/{language}_to_image/recall_at_1"]["value"] for language in LANGUAGE_NAMES]
    variance = results[f"{prefix}/to_image/mean_rank_variance"]["value"]
    found = {"mean of ten": [sum(recalls) / len(recalls)], "least": [min(recalls)], "mean rank variance": [variance]}
    model, _ = load(str(run), device="cpu").model, table_of(run, "data/emoji/train-*.tar", "train")
    bank = read_bank(model, run / "train", "image", None, "cpu", {})
    pairs = list(permutations(LANGUAGE_NAMES, 2))
    for split, emoji in (("val_voices", "trained"), ("val", "new")):
        table = table_of(run, f"data/emoji/{split}-*.tar", split)
        for way, bridges in (
            ("cosine", [None] * len(pairs)),
            ("pictures", [bank.between(model, [query], [candidate]) for query, candidate in pairs]),
        ):
            between = [recall_at_1(table, *pair, bridge) for pair, bridge in zip(pairs, bridges, strict=True)]
            found[f"name → name, {emoji}, by {way}"] = [sum(between) / len(between)]
    return found


LANGUAGE_NAMES = ("en", "fr", "de", "es", "ru", "tr", "sw", "hi", "ar", "zh")
TASKS = {
    "together": (TOGETHER, together, ["text → picture", "voice → picture", "text and voice → picture"]),
    "languages": (
        LANGUAGES,
        languages,
        [
            "mean of ten",
            "least",
            "mean rank variance",
            *(f"name → name, {emoji}, by {way}" for emoji in ("trained", "new") for way in ("cosine", "pictures")),
        ],
    ),
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
