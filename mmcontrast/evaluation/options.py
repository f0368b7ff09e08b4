"""The options of evaluation: `evaluation` of a config."""

from typing import Annotated

from pydantic import Field

from mmcontrast.options import Options, Patterns, Positive


class ZeroShotOptions(Options):
    """Classification of one field by prompts in another.

    Attributes:
        label: the entry of a sample's json that holds its class.
        field, prompt_field: what is classified, and the text field that reads the prompts.
        templates: prompts, `{}` being a phrase.
        classes: per label, the phrases it goes by, or the kinds it is made of: the nearest counts. Samples of other
            labels are left out.
    """

    label: str
    field: str = "image"
    prompt_field: str = "text"
    templates: Annotated[list[str], Field(min_length=1)] = ["{}"]
    classes: Annotated[dict[str, Annotated[list[str], Field(min_length=1)]], Field(min_length=2)]


class EvaluationOptions(Options):
    """What is evaluated, at the end of a run and every `train.evaluate_every` steps.

    Attributes:
        splits: shards by the split's name.
        zero_shot: tasks by name, written out or as the path of a YAML file.
        retrieval_at: the k of recall at k.
        best: the result by which the best checkpoint is chosen.
        report_split: whose samples the page shows; default: the first.
        batch_size, num_workers: of embedding.
    """

    splits: dict[str, Patterns] = {}
    zero_shot: dict[str, ZeroShotOptions] = {}
    retrieval_at: list[Positive] = [1, 5, 10]
    best: str | None = None
    report_split: str | None = None
    batch_size: Positive = 256
    num_workers: Annotated[int, Field(ge=0)] = 0
