"""Whose image it is: from a table, from the file's name or folders, or from the file itself."""

import re
import warnings
from collections.abc import Mapping
from typing import NamedTuple

from cxr_models.listing import ListedImage, data_error

# How published data sets name their files; group 1 is the patient. Tight enough to be tried on any data set.
PATIENT_PATTERNS: Mapping[str, str] = {
    "nih": r"^(\d{8})_\d{3}\.\w+$",
    # Numbers start anew for bacteria and for virus, and IM-0282 and NORMAL2-IM-0282 are different series.
    "kermany": r"^(person\d+_(?:bacteria|virus)(?=_\d+\.\w+$)|(?:NORMAL2-)?IM-\d+(?=-\d+(?:-\d+)?\.\w+$))",
    # patient00001/study1/view1_frontal.jpg: the name alone is that of thousands. Joined by _ where folders were undone.
    "chexpert": r"^(patient\d{5})(?:/|_)study\d+(?:/|_)view\d+_(?:frontal|lateral)\.\w+$",
    # The last digit says whether there is tuberculosis; the letters part the two sets, which are often put together.
    "montgomery": r"^(MCUCXR_\d{4})_[01]\.\w+$",
    "shenzhen": r"^(CHNCXR_\d{4})_[01]\.\w+$",
}
BY_TABLE, BY_TAG = "the CSV file", "DICOM's PatientID"
LONGEST_EXPRESSION = 1_000  # characters
EACH_ITS_OWN = "none"  # in place of a pattern: each image is its own patient unless a table says otherwise
_CHARACTER_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")


class PatientRule:
    """How the patient of an image is found.

    A pattern is matched at the start of the file name. One that has a slash in it, outside square brackets, is about
    folders too: where the name does not match, it is matched at the start of the path below the data set, and then of
    what is left of it from each further folder on.

    Args:
        text: a name in `PATIENT_PATTERNS`, a regular expression, `none`, or "" to try the built-in patterns.

    Raises:
        DataError: `text` is no regular expression.
    """

    def __init__(self, text: str) -> None:
        self._by_tag = text != EACH_ITS_OWN
        given = {f"the given pattern {text!r}": PATIENT_PATTERNS.get(text, text)} if text and self._by_tag else {}
        built_in = {} if text else {f"the built-in pattern {name}": own for name, own in PATIENT_PATTERNS.items()}
        self._given, self._built_in = _compiled(given), _compiled(built_in)

    def patient(self, image: ListedImage, tag: str) -> tuple[str, str]:
        """The patient, and what tells it in words: a table, else the user's pattern, the file's own tag, a built-in
        pattern. Where nothing does, the patient is the path, and the words are "".

        Args:
            image: its `patient` is that of the table.
            tag: DICOM's PatientID, "" for none. The user's pattern goes before it, since files made anonymous may
                all have the same one.
        """
        found = (
            (image.patient, BY_TABLE),
            *((_group(pattern.match(image.path)), words) for words, pattern in self._given.items()),
            (tag if self._by_tag else "", BY_TAG),
            *((_group(pattern.match(image.path)), words) for words, pattern in self._built_in.items()),
        )
        return next(((patient, words) for patient, words in found if patient), (image.path, ""))


class _Pattern(NamedTuple):
    """A pattern, and whether it is about folders too."""

    expression: re.Pattern[str]
    with_folders: bool

    def match(self, path: str) -> re.Match[str] | None:
        """Of the file name, else of the path and of what is left of it from each further folder on."""
        *folders, name = path.split("/")
        found = self.expression.match(name)
        for first in range(len(folders) if self.with_folders else 0):
            found = found or self.expression.match("/".join((*folders[first:], name)))
        return found


def _group(match: re.Match[str] | None) -> str:
    if match is None:
        return ""
    named = match.groupdict(default="")
    return "_".join(filter(None, named.values())) if named else match[1 if match.re.groups else 0] or ""


def expression_problem(text: str) -> str:
    """Why a text is no regular expression that can be used, or an empty string."""
    if len(text) > LONGEST_EXPRESSION:
        return f"more than {LONGEST_EXPRESSION:,} characters"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what a later Python may read in another way
            re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return ""


def _compiled(patterns: Mapping[str, str]) -> dict[str, _Pattern]:
    for text in patterns.values():
        if problem := expression_problem(text):
            raise data_error(
                f"as patient one of {', '.join((*PATIENT_PATTERNS, EACH_ITS_OWN))} or a regular expression",
                f"{text[:LONGEST_EXPRESSION]!r}: {problem}",
                r"correct it; '^(\d+)_' for example takes the digits in front of the first underscore, and "
                r"'([^/]+)/[^/]+$' the folder that an image lies in",
            )
    return {
        words: _Pattern(re.compile(text), "/" in _CHARACTER_CLASS.sub("", text)) for words, text in patterns.items()
    }
