"""Shards opened as options name them: patterns, or a mapping with columns and files of its own."""

from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from mmcontrast.components import suggestion
from mmcontrast.data.class_texts import check_template
from mmcontrast.data.dataset import ShardDataset
from mmcontrast.data.held_out import Part
from mmcontrast.data.index import open_shards
from mmcontrast.data.keys import FieldKeys, names_of
from mmcontrast.data.views import TeacherView
from mmcontrast.errors import UserError
from mmcontrast.libraries import tell
from mmcontrast.modalities import Modality, TextModality
from mmcontrast.options import Keys, Options, Patterns, Texts


def _check_templates(templates: dict[str, list[str]]) -> dict[str, list[str]]:
    for template in (template for field_templates in templates.values() for template in field_templates):
        check_template(template)
    return templates


Templates = Annotated[dict[str, Texts], AfterValidator(_check_templates)]  # per text field that holds names of classes


class ShardOptions(Options):
    """Shards whose columns or extensions, or whose files, are not where a model would look for them.

    Attributes:
        shards: tars, also by URL, folders, tables.
        files: of tables whose columns name files, the folder in which these are, absolute paths too; default: the table's own.
        keys: of fields, the extensions or columns of their member, tried in turn: {text: [caption]}.
        templates: of text fields that hold names of classes, the prompts made of them: {text: ["a photo of a {}."]}.
        held_out: the part of them alone that a run with `data.held_out` of this share does not train on.
        select: the folder or file of a selection: the samples that it keeps alone.
    """

    shards: Patterns
    files: str | None = None
    keys: dict[str, Keys] = {}
    templates: Templates = {}
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    select: str | None = None

    @classmethod
    def of(cls, shards: "Shards | dict[str, Any]") -> "ShardOptions":
        """Return patterns, or a mapping as JSON has it, as options."""
        if isinstance(shards, dict):
            return cls.model_validate(shards)
        return shards if isinstance(shards, ShardOptions) else cls(shards=shards)

    def shown(self) -> Any:
        """Return the options as JSON: patterns alone where there is nothing else."""
        dumped = self.model_dump(mode="json", exclude_defaults=True)
        return dumped if len(dumped) > 1 else self.shards


Shards = str | list[str] | ShardOptions


def read_keys(options: Sequence[str]) -> dict[str, Keys]:
    """Return the keys of fields that a command line gives: "text=caption", "image=jpg,png".

    Raises:
        UserError: for one of another form.
    """
    keys: dict[str, Keys] = {}
    for option in options:
        field, equals, names = option.partition("=")
        if not (field and equals and all(names.split(","))):
            raise UserError(f"--keys {option!r} is not of the form FIELD=COLUMN, as text=caption or image=jpg,png")
        keys.setdefault(field, []).extend(names.split(","))
    return keys


def open_dataset(
    shards: Shards | dict[str, Any],
    modalities: Mapping[str, Modality],
    keys: Mapping[str, Sequence[Any]],
    *,
    seed: int = 0,
    training: bool = False,
    partial: bool = False,
    without: float | None = None,
    views: Sequence[TeacherView] = (),
) -> ShardDataset:
    """Open shards, whose own `keys` go before those of the model. Where a field has neither, other than in training, its
    modality's usual extensions are its keys: a model that was trained on a table's own columns reads other shards too.

    Args:
        shards: patterns; or a mapping of `shards`, `keys` and `files`.
        keys: the model's, of fields.
        modalities, seed, training, partial, views: as `ShardDataset`.
        without: a share that is held out: the samples that are not alone.

    Raises:
        UserError: for shards that are not there; for keys of no field, or that no sample has.
    """
    options = ShardOptions.of(shards)
    for field in options.keys:
        if field not in modalities:
            raise UserError(f"{options.shards}: keys of a field {field!r}; {suggestion(field, modalities)}")
    check_templates(options.templates, modalities, str(options.shards))
    field_keys = {
        field: list(options.keys.get(field) or keys.get(field) or modalities[field].extensions) for field in modalities
    }
    if not training and any(keys.get(field) for field in modalities):
        field_keys = with_fallbacks(field_keys, modalities, options)
    part = Part(options.held_out, True) if options.held_out else Part(without, False) if without else None
    dataset = ShardDataset(
        options.shards,
        modalities,
        field_keys,
        seed,
        training,
        partial,
        options.files,
        part,
        options.templates,
        views,
        options.select,
    )
    for field in options.keys:
        if field not in dataset.keys:
            raise UserError(
                f"{options.shards}: keys of the field {field!r}: no sample has {' or '.join(names_of(options.keys[field]))}"
            )
    _tell_of_same_texts(dataset, {*options.keys, *(field for field in keys if keys[field])})
    return dataset


def _tell_of_same_texts(dataset: ShardDataset, with_keys: Collection[str]) -> None:
    """Warn of several text fields that are read from the same members, as none has keys of its own."""
    fields = [field for field in dataset.keys if isinstance(dataset.modalities[field], TextModality)]
    usual = [field for field in fields if field not in with_keys]
    if len(usual) > 1:
        read = " or ".join(f".{key}" for key in dataset.keys[usual[0]])
        tell(f"the fields {' and '.join(usual)} are all read from {read}, and hold the same texts: set their keys")


def check_templates(templates: Mapping[str, Sequence[str]], modalities: Mapping[str, Modality], place: str) -> None:
    """Check that templates are those of text fields.

    Raises:
        UserError: for templates of any other field.
    """
    for field in templates:
        if not isinstance(modalities.get(field), TextModality):
            texts = [name for name, modality in modalities.items() if isinstance(modality, TextModality)]
            raise UserError(f"{place}: templates of {field!r}, which is no field of texts; {suggestion(field, texts)}")


def with_fallbacks(
    field_keys: Mapping[str, list[Any]], modalities: Mapping[str, Modality], options: ShardOptions
) -> dict[str, list[Any]]:
    """Return the keys of fields: those of `field_keys`, or, of a field of whose keys no sample has any, the usual extensions of
    its modality that no other field could mean."""
    members = {extension for shard in open_shards(options.shards, files=options.files) for extension in shard.extensions}
    lacking = {field for field in field_keys if field not in options.keys and not members & members_of(field_keys[field])}
    result = dict(field_keys)
    for field in lacking:
        taken: set[str] = set()
        for other, other_keys in field_keys.items():
            if other != field and other_keys != field_keys[field]:
                taken |= set(modalities[other].extensions) if other in lacking else members_of(other_keys)
        usual = [extension for extension in modalities[field].extensions if extension in members - taken]
        result[field] = usual or result[field]
    return result


def members_of(keys: FieldKeys) -> set[str]:
    """Return the members that keys are read from; "json:caption" is read from the json."""
    return {name.partition(":")[0] for name in names_of(keys)}
