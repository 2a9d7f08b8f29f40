"""One section of a spec: a frozen model that refuses unknown keys, and its problems in the words of all messages."""

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sweep.document import Document, Where, shown, unknown


class Section(BaseModel):
    """What every section of the file is made of."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


_S = TypeVar("_S", bound=Section)


def validated(model: type[_S], document: Document, where: Where, values: Any) -> _S | None:
    """The section, or None with every problem noted in the document."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            if detail["type"] == "extra_forbidden":
                document.check_keys(where, [str(detail["loc"][-1])], tuple(model.model_fields))
            else:
                document.add((*where, *detail["loc"]), _message(detail))
        return None


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le:g}",
    "model_type": "a section with keys",
    "dict_type": "a section with keys",
    "mapping_type": "a section with keys",
    "tuple_type": "a list",
    "too_short": "at least {min_length}",
}


def _message(detail: Any) -> str:
    """Pydantic's finding in the words of the other messages."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return "missing"
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        return unknown(detail["input"], re.findall(r"'([^']*)'", context["expected"]))
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else detail["msg"]
    return f"expected {expected}, got {shown(detail['input'])}"
