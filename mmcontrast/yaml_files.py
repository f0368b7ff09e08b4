"""Reads YAML as people mean it: `1e-3` is a number, a repeated key is a mistake, and a file cannot expand without limit; and
writes what it reads."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from mmcontrast.errors import UserError

DEEPEST = 64  # levels of mappings and lists in each other
MOST_VALUES = 1_000_000  # of a file, where an anchor's values count each time that it is named
MERGE = "tag:yaml.org,2002:merge"  # the key <<
# exceptions of PyYAML's constructors for invalid values, such as a day 99, or digits beyond Python's limit
WRONG = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML 1.1, with duplicate keys refused and `1e-3` read as the number that everyone means."""

    depth = 0

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.checked: set[yaml.MappingNode] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {DEEPEST} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Check a mapping's own keys, then write out what it merges: an own key goes before that of a `<<`."""
        if node not in self.checked:
            self.checked.add(node)
            self._check_keys(node)
            super().flatten_mapping(node)

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: dict[Any, str] = {}
        for key_node, _ in node.value:
            key = key_node.value if key_node.tag == MERGE else self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # which PyYAML refuses
            if (other := seen.get(key)) == key_node.value:
                raise yaml.constructor.ConstructorError(None, None, f"key {key_node.value!r} twice", key_node.start_mark)
            if other is not None:
                raise yaml.constructor.ConstructorError(None, None, "two keys are equal, like 1 and true", node.start_mark)
            seen[key] = key_node.value


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would read as a number, such as "12e4567"."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Quote and escape what YAML takes for line breaks, which it would read as spaces."""
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
    )


def dump_yaml(value: Any) -> str:
    """Return the YAML of a value, which `parse_yaml` reads as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse_yaml(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        yaml.YAMLError: for any mistake in it.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return _unshare(loader.construct_document(node))
    except yaml.YAMLError:
        raise
    except WRONG as error:
        raise yaml.YAMLError(f"a value that is none ({str(error).split(chr(10))[0][:100] or type(error).__name__})") from error
    finally:
        loader.dispose()


def _unshare(value: Any) -> Any:
    """Return a copy in which nothing is shared, so that a value that an anchor names twice can be changed in one place."""
    if isinstance(value, dict):
        return {key: _unshare(entry) for key, entry in value.items()}
    return [_unshare(entry) for entry in value] if isinstance(value, list) else value


def _count(node: yaml.Node, counted: dict[yaml.Node, int], inside: set[yaml.Node]) -> int:
    """Count the values of a node, written out without anchors.

    Raises:
        yaml.YAMLError: if they are too many, or if it holds itself.
    """
    if node in inside:
        raise yaml.composer.ComposerError(None, None, "an anchor within itself", node.start_mark)
    if node not in counted:
        inside.add(node)
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.ScalarNode):
            node.value.encode("utf-8")  # refuses halves of surrogate pairs, which no file or terminal takes
        inner = (part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,)))
        counted[node] = 1 + sum(_count(part, counted, inside) for part in inner)
        inside.remove(node)
        if counted[node] > MOST_VALUES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_VALUES} values", node.start_mark)
    return counted[node]


def read_yaml(path: str | Path) -> Any:
    """Parse a YAML file.

    Raises:
        UserError: if it cannot be read or is not YAML.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
