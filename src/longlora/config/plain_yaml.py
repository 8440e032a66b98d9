"""Reading YAML that a stranger may have written: plain values only, bounded in size, depth and what aliases unfold to.

In: text. Out: what ``yaml.safe_load`` gives, or `yaml.YAMLError`. A few lines with aliases of aliases stand for more
values than any memory holds; whoever prints or copies them later would not end.
"""

from __future__ import annotations

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

MAX_CHARACTERS = 2**20
_MAX_DEPTH = 50
_MAX_VALUES = 100_000


class _BoundedLoader(yaml.SafeLoader):
    """Stops where text is nested too deep, not at its end: the scanner's time grows with the square of the depth."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH + 1:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep")
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


def read_yaml(text: str) -> object:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: it is no YAML, holds other than plain values, or is too long, too deep or unfolds too far.
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"it has {len(text):,} characters, the limit is {MAX_CHARACTERS:,}")
    loader = _BoundedLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _unfolded(node, {}, 0)
        return loader.construct_document(node)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError) as error:
        # PyYAML's own constructors raise these for such as 2001-99-99, `!!bool x` or `!!int ""`.
        raise yaml.YAMLError(f"a value cannot be read ({type(error).__name__}: {error})") from None
    finally:
        loader.dispose()


def _unfolded(node: Node, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """How many values `node` stands for, aliases unfolded, and how deep; each node is looked at once."""
    size, height = known.get(id(node), (1, 0))
    if id(node) not in known and depth <= _MAX_DEPTH:
        parts: list[Node] = []
        if isinstance(node, SequenceNode):
            parts = node.value
        elif isinstance(node, MappingNode):
            parts = [part for pair in node.value for part in pair]
        for part in parts:
            more, deeper = _unfolded(part, known, depth + 1)
            size, height = size + more, max(height, deeper + 1)
    if depth + height > _MAX_DEPTH:
        raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep, or holds itself")
    if size > _MAX_VALUES:
        raise yaml.YAMLError(f"its aliases unfold to more than {_MAX_VALUES:,} values")
    known[id(node)] = size, height
    return size, height
