"""The JSON Schema of a spec file, with which an editor completes and explains it."""

from typing import Any

from .model import Spec


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a spec file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_tighten(Spec.model_json_schema())}


def _tighten(schema: Any) -> Any:
    """Return the schema made as strict as `load`: no keys that match no pattern, and no null for a key left out."""
    if isinstance(schema, list):
        return [_tighten(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {name: _tighten(part) for name, part in schema.items()}
    if "patternProperties" in schema:
        schema["additionalProperties"] = False
    if "anyOf" in schema and schema.get("default", ...) is None:
        (given,) = (part for part in schema.pop("anyOf") if part != {"type": "null"})
        del schema["default"]
        schema |= given
    return schema
