"""What a wrong recipe says to a person: the key, the value, the limit, and the key that was probably meant."""

from __future__ import annotations

import difflib
import re

from pydantic import BaseModel, ValidationError

_SHOWN = 200


def explain(error: ValidationError, source: str, schema: type[BaseModel]) -> str:
    """One line about the first mistake that `error` holds; `source` is where the values came from."""
    first = error.errors()[0]
    # Branches of a union are pydantic's business, not the user's; a key may be called so as well.
    parts = [part for part in first["loc"] if "[" not in str(part)] or first["loc"][-1:]
    location = [_shown(str(part)) for part in parts]
    dotted = ".".join(location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{source}: unknown key {dotted}{_did_you_mean(location, schema)}{more}"
    if first["type"] == "missing":
        return f"{source}: {dotted} is missing; add it to the recipe or give {dotted}=VALUE{more}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        choices = re.findall("'([^']*)'", message)
        message += "".join(
            f"; did you mean {near}?" for near in difflib.get_close_matches(str(first["input"])[:_SHOWN], choices, 1)
        )
    if isinstance(first["input"], dict):  # a rule about a whole section names its values itself
        return f"{source}: {dotted}: {message}{more}" if dotted else f"{source}: {message}{more}"
    return f"{source}: {dotted} = {_shown(repr(first['input']))}: {message}{more}"


def _shown(text: str) -> str:
    """`text`, cut where it is longer than a person reads; comparing long ones with known keys would take long too."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def leaf_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all settings below `section`, for example ``train.steps``."""
    keys: list[str] = []
    for name, field in section.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys += leaf_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _did_you_mean(location: list[str], schema: type[BaseModel]) -> str:
    known = leaf_keys(schema) + list(schema.model_fields)
    close = difflib.get_close_matches(".".join(location), known, n=1, cutoff=0.6)
    if not close:  # the right name in the wrong section
        close = [key for key in known if key.rsplit(".", 1)[-1] == location[-1]][:1]
    if not close:
        by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
        near = difflib.get_close_matches(location[-1], by_leaf, n=1, cutoff=0.6)
        close = [by_leaf[near[0]]] if near else []
    return f"; did you mean {close[0]}?" if close else "; see recipes/ for the keys there are"
