"""YAML as people mean it: `1e-3` is a number, and a key that stands twice is a mistake."""

import re
from pathlib import Path
from typing import Any

import yaml

from mmcontrast.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML 1.1, with duplicate keys refused and `1e-3` read as the number that everyone means."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            seen: set[Any] = set()
            for key_node, _ in node.value:
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key_node.value!r} twice", key_node.start_mark)
                seen.add(key_node.value)
            raise yaml.constructor.ConstructorError(None, None, "two keys are equal, like 1 and true", node.start_mark)
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def parse_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def read_yaml(path: str | Path) -> Any:
    """
    Raises:
        UserError: if the file cannot be read or is not YAML.
    """
    try:
        return parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
