"""The options of evaluation: `evaluation` of a config, or a suite of its own, as in eval/."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mmcontrast.components import suggestion
from mmcontrast.data import Shards
from mmcontrast.data.class_texts import check_template
from mmcontrast.evaluation.labels import label_text
from mmcontrast.evaluation.prompts import CLASSES, TEMPLATES
from mmcontrast.options import Options, Positive

Fields = str | Annotated[list[str], Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]


class ZeroShotOptions(Options):
    """Classification of one field by prompts in another.

    Attributes:
        label: the entry of a sample's json that holds its class, or "cls" for its member of that name.
        field: the field that is classified; default: the first field of pictures.
        prompt_field: the text field that reads the prompts; default: the first field of texts.
        templates: prompts with `{}` or `{c}` for the phrase; or the name of a list of open_clip's: openai_imagenet,
            simple_imagenet.
        classes: for each label its phrases, of which the nearest counts. Samples with other labels are left out, and
            counted. A list: the phrases of the labels 0, 1, …, all that occur; or the name of a list of open_clip's:
            imagenet. Labels are compared as texts, but 1.0 is 1 and true is True.
        splits: those that have the label; default: all.
    """

    label: str
    field: str | None = None
    prompt_field: str | None = None
    templates: Annotated[list[str], Field(min_length=1)] | str = ["{}"]
    classes: dict[str, Annotated[list[str], Field(min_length=1)]] | list[str] | str
    splits: list[str] = []

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, templates: list[str] | str) -> list[str] | str:
        if isinstance(templates, str) and templates not in TEMPLATES:
            raise ValueError(
                f"no templates of the name {templates!r}; {suggestion(templates, TEMPLATES)}; a template alone is a list of one"
            )
        for template in [] if isinstance(templates, str) else templates:
            check_template(template)
        return templates

    @field_validator("classes", mode="before")
    @classmethod
    def _text_labels(cls, classes: Any) -> Any:
        """Return classes with labels as texts: YAML reads the labels 1 and true as a number and a boolean."""
        if not isinstance(classes, dict):
            return classes
        texts = [label if isinstance(label, str) else label_text(label) for label in classes]
        label, number = Counter(texts).most_common(1)[0] if texts else ("", 0)
        if number > 1 or None in texts:
            raise ValueError("a class has no label" if None in texts else f"{number} classes have the label {label!r}")
        return dict(zip(texts, classes.values(), strict=True))

    @field_validator("classes")
    @classmethod
    def _check_classes(cls, classes: dict[str, list[str]] | list[str] | str) -> dict[str, list[str]] | list[str] | str:
        if isinstance(classes, str) and classes not in CLASSES:
            raise ValueError(f"no classes of the name {classes!r}; {suggestion(classes, CLASSES)}")
        if isinstance(classes, str):
            return classes
        named = classes if isinstance(classes, dict) else {str(label): [phrase] for label, phrase in enumerate(classes)}
        if len(named) < 2:
            raise ValueError(f"two classes at least can be told apart, here are {len(named)}")
        for label, phrases in named.items():
            if not label.strip() or not all(phrase.strip() for phrase in phrases):
                raise ValueError(f"the class {label!r} has an empty name")
        text, number = Counter(map(label_text, named)).most_common(1)[0]
        if number > 1:
            raise ValueError(f"the label {text!r} is that of {number} classes, but for spaces")
        return classes


class RetrievalOptions(Options):
    """Retrieval of one field, or of several together, by another.

    Attributes:
        query, candidate: fields; several are one unit vector, that of the sum of their embeddings. Samples that lack one are
            left out. Where both are the same, a sample is no candidate for itself.
        by: the entry of a sample's json whose equal values are relevant to each other; default: the group id.
        relevance: a file of graded relevance as trec_eval reads it, a line of "query-key 0 candidate-key gain" each, where keys
            are those of the samples; a gain of 0 or less is not relevant.
        once: candidates of the same group count once; default: texts do, unless `by`, `relevance` or `captions` is set.
        splits: default: all.
    """

    query: Fields
    candidate: Fields
    by: str | None = None
    relevance: str | None = None
    once: bool | None = None
    splits: list[str] = []

    @property
    def within(self) -> bool:
        """Return whether query and candidate are the same fields, however they are written."""
        query, candidate = ({side} if isinstance(side, str) else {*side} for side in (self.query, self.candidate))
        return query == candidate


class LanguageOptions(Options):
    """Consistency of retrieval over languages: recall in each language, and the variance of ranks over them.

    Attributes:
        fields: a text field for each language.
        candidate: the field that they retrieve.
    """

    fields: Annotated[list[str], Field(min_length=2)]
    candidate: str


class ProbeOptions(Options):
    """Probes: classifiers trained on a field's embeddings, with the towers frozen.

    Attributes:
        train: shards of training samples, as a split's.
        label: the entry of a sample's json that holds its class, or "cls".
        field: default: the first field of pictures.
        kinds: linear: logistic regression, its L2 strength chosen on a part of `train`; knn: the vote of the nearest, weighted
            by exp(cosine / 0.07); few_shot: logistic regression on a few samples of each class.
        neighbours: of knn.
        shots, seeds: of few_shot: samples of a class, and random draws; shots that a class does not have are left out.
        splits: those to evaluate on; default: all.
    """

    train: Shards
    label: str
    field: str | None = None
    kinds: list[Literal["linear", "knn", "few_shot"]] = ["linear", "knn", "few_shot"]
    neighbours: Positive = 20
    shots: list[Positive] = [1, 2, 4, 8, 16]
    seeds: Positive = 5
    splits: list[str] = []


class BridgeOptions(Options):
    """Scores of two fields through a bank of entries that both know: `mmcontrast.evaluation.bridge`. Pairs with the bank's own
    field keep their cosines.

    Attributes:
        type: "bridge".
        bank: a text file, one entry a line; shards, one entry a distinct text; or an embedding table of this model (mmcontrast
            embed), one entry a group.
        field: the field that reads the texts, or whose rows of the table are the entries; default: the first text field.
        scale: κ of p(entry|row) = softmax(κ row·entry); default: the model's logit scale.
        rows: "exact": Σ √p √p; "expected": cosines of expected entries, as in an index.
    """

    type: Literal["bridge"]
    bank: str
    field: str | None = None
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    rows: Literal["exact", "expected"] = "exact"


class EvaluationOptions(Options):
    """The evaluation at the end of a run and every `train.evaluate_every` steps, or as a suite for any model.

    Attributes:
        splits: by the split's name: shards; or a mapping of `shards`, `keys` and `files`, as a source of `data.train`; or a
            folder in CLIP_benchmark's layout, which defines its own task; in a config also `held_out`, the samples that
            `data.held_out` holds out.
        pairs: retrieve every field by every other.
        retrieval: further tasks by name.
        languages: tasks of consistency over languages by name.
        zero_shot: tasks by name, written out or as the path of a YAML file. One with the name of a split in CLIP_benchmark's
            layout replaces the split's own.
        probes: tasks by name.
        captions: text fields of which every line is a caption of its own: of all splits, or by the split's name.
        retrieval_at: the k of recall and nDCG at k.
        whiten: retrieval: each field's embeddings of a split are centred and whitened first.
        scoring: retrieval: a correction of cosines for hubs: csls, inverted_softmax, margin; or scores through a bank:
            {type: bridge, bank: words.txt}.
        widths: run retrieval and zero-shot tasks also on the first so many numbers of each embedding, "…/recall_at_1@64";
            default: of a run with `train.matryoshka` its widths.
        geometry: alignment, uniformity, modality gap, hubness, effective rank; of hyperbolic models the last two and
            the mean distance from the origin, `radius`.
        resamples: of the bootstrap behind each interval; 0: no intervals.
        best: the result by which the best checkpoint is chosen, and `train.patience` counts; default: the mean recall at the
            first k of the first split.
        report_split: the split whose samples the page shows; default: the first.
        batch_size, num_workers: of embedding.
    """

    splits: dict[str, Shards] = {}
    pairs: bool = True
    retrieval: dict[str, RetrievalOptions] = {}
    languages: dict[str, LanguageOptions] = {}
    zero_shot: dict[str, ZeroShotOptions] = {}
    probes: dict[str, ProbeOptions] = {}
    captions: list[str] | dict[str, list[str]] = []
    retrieval_at: list[Positive] = [1, 5, 10]
    whiten: bool = False
    scoring: Literal["csls", "inverted_softmax", "margin"] | BridgeOptions | None = None
    widths: list[Positive] | None = None
    geometry: bool = True
    resamples: Count = 1000
    best: str | None = None
    report_split: str | None = None
    batch_size: Positive = 256
    num_workers: Count = 0
