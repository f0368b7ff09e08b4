"""Says what an Arrow column holds: texts, bytes, lists, or what JSON can hold."""

import pyarrow as pa
import pyarrow.compute as pc

LONG_LIST = 64  # numbers: a longer list is a vector, not metadata
Types = pa.types


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type that holds the same values plainly: no dictionary, no view."""
    if Types.is_dictionary(kind) or Types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if Types.is_string_view(kind):
        return pa.large_string()
    if Types.is_binary_view(kind):
        return pa.large_binary()
    if Types.is_struct(kind):
        return pa.struct([inner.with_type(plain_type(inner.type)) for inner in kind])
    if Types.is_list_view(kind) or Types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(plain_type(kind.value_type)))
    if Types.is_list(kind) or Types.is_large_list(kind):
        make = pa.list_ if Types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(plain_type(kind.value_type)))
    return kind


def is_text(kind: pa.DataType) -> bool:
    return Types.is_string(kind) or Types.is_large_string(kind)


def is_binary(kind: pa.DataType) -> bool:
    return Types.is_binary(kind) or Types.is_large_binary(kind)


def is_list(kind: pa.DataType) -> bool:
    return Types.is_list(kind) or Types.is_large_list(kind) or Types.is_fixed_size_list(kind)


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether values of a type are bytes, or hold bytes within."""
    kind = plain_type(kind)
    fields = list(kind) if Types.is_struct(kind) else [kind.value_field] if is_list(kind) else []
    return is_binary(kind) or Types.is_fixed_size_binary(kind) or any(holds_bytes(field.type) for field in fields)


def is_metadata(column: pa.ChunkedArray) -> bool:
    """Return whether a column is metadata: no bytes, and no long lists of numbers."""
    if holds_bytes(column.type) or Types.is_null(column.type):
        return False
    kind = plain_type(column.type)
    if not is_list(kind) or is_text(kind.value_type) or not len(column):
        return True
    return (pc.max(pc.list_value_length(column.cast(kind))).as_py() or 0) <= LONG_LIST
