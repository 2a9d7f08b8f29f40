"""Whose image it is: from a table, from the file name, or from the file itself."""

import re
from collections.abc import Mapping, Sequence

from cxr_models.listing import ListedImage, data_error

# How published data sets name their files; group 1 is the patient. Tight enough to be tried on any data set.
PATIENT_PATTERNS: Mapping[str, str] = {
    "nih": r"^(\d{8})_\d{3}\.\w+$",
    # Numbers start anew for bacteria and for virus, and IM-0282 and NORMAL2-IM-0282 are different series.
    "kermany": r"^(person\d+_(?:bacteria|virus)(?=_\d+\.\w+$)|(?:NORMAL2-)?IM-\d+(?=-\d+(?:-\d+)?\.\w+$))",
}
EACH_ITS_OWN = "none"  # in place of a pattern: each image is its own patient unless a table says otherwise


class PatientRule:
    """How the patient of an image is found.

    Args:
        text: a name in `PATIENT_PATTERNS`, a regular expression, `none`, or "" to try the built-in patterns.

    Raises:
        DataError: `text` is no regular expression.
    """

    def __init__(self, text: str) -> None:
        self._by_tag = text != EACH_ITS_OWN
        self._wanted = _compiled((PATIENT_PATTERNS.get(text, text),)) if text and self._by_tag else ()
        self._built_in = () if text else _compiled(tuple(PATIENT_PATTERNS.values()))

    def patient(self, image: ListedImage, tag: str) -> str:
        """The patient: what a table says, else the user's pattern, the file's own tag, a built-in pattern, the path.

        Args:
            image: its `patient` is that of the table.
            tag: DICOM's PatientID, "" for none. The user's pattern goes before it, since files made anonymous may
                all have the same one.
        """
        name = image.path.rsplit("/", 1)[-1]
        own_tag = tag if self._by_tag else ""
        return image.patient or _found(name, self._wanted) or own_tag or _found(name, self._built_in) or image.path


def _found(name: str, patterns: Sequence[re.Pattern[str]]) -> str:
    match = next(filter(None, (pattern.match(name) for pattern in patterns)), None)
    if match is None:
        return ""
    named = match.groupdict(default="")
    return "_".join(filter(None, named.values())) if named else match[1 if match.re.groups else 0] or ""


def _compiled(texts: Sequence[str]) -> tuple[re.Pattern[str], ...]:
    try:
        return tuple(map(re.compile, texts))
    except re.error as error:
        raise data_error(
            f"as patient one of {', '.join((*PATIENT_PATTERNS, EACH_ITS_OWN))} or a regular expression",
            f"{texts[0]!r}: {error}",
            r"correct it; '^(\d+)_' for example takes the digits in front of the first underscore",
        ) from error
