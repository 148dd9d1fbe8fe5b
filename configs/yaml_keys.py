"""Keys that stand twice in a YAML file: YAML loaders keep the last one silently."""

import yaml


def repeated_key(text: str) -> str | None:
    """Line and name of the first key that is used twice in one section; None if there is none.

    Text that is not YAML has none; its loader reports the error.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return None if root is None else _repeated_in(root)


def _repeated_in(node: yaml.Node) -> str | None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    seen = set()
    for key, value in pairs:
        if key.value in seen:
            return f"line {key.start_mark.line + 1}: key {key.value!r} is used twice; expected each key once"
        if isinstance(key, yaml.ScalarNode):
            seen.add(key.value)
        if found := _repeated_in(value):
            return found
    return None
