"""A file of settings as people write it, in YAML or in JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from train_lora import ErrorCode, Record, TrainError, parse_config, read_config, show


def read_file(path: Path) -> Record:
    """Read the file, in YAML or in JSON by its name."""
    text = read_config(path)
    if path.suffix.lower() not in (".yaml", ".yml"):
        return parse_config(text)
    try:
        document = json.loads(json.dumps(load_yaml(text), allow_nan=False))
    except ImportError as error:
        hint = "Run: pip install -r tools/requirements.txt, or write JSON"
        code, expected = ErrorCode.PACKAGE_MISSING, "the package pyyaml"
        raise TrainError.at(code, path, expected, "none", hint) from error
    except Exception as error:  # the library raises more than its own
        said = " ".join(str(error).split())
        raise TrainError.at(ErrorCode.CONFIG_NOT_JSON, path, "plain YAML", said) from error
    if not isinstance(document, dict):
        raise TrainError.at(ErrorCode.CONFIG_NOT_JSON, path, "sections", show(document))
    return document


def load_yaml(text: str) -> Any:
    """Read YAML as people write it: 1e-4 is a number, a key stands once, nothing is repeated."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # the library has no types
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # a few lines of them could fill any memory
                raise yaml.YAMLError("aliases (*name) are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value]
            if twice := {str(name) for name in names if names.count(name) > 1}:
                raise yaml.YAMLError(f"{twice.pop()} stands twice")
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml.load(text, Loader)
