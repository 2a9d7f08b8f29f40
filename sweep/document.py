"""A YAML file as plain values that know their line, and everything that is wrong with it."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import ReaderError

from sweep.addresses import without_password

Where = tuple[str | int, ...]
"""Keys and list indices from the top of the file to a value."""

Origin = int | str | None
"""The line a value stands on, the `--set` argument it came from, or None for what is missing."""

MAX_BYTES = 100_000  # three seconds of reading, and a dozen times the longest shipped file
MAX_DEPTH = 20
SHOWN_CHARACTERS = 80
SHOWN_PROBLEMS = 50
LONGEST_PROBLEM = 2_000  # characters

_TAG = "tag:yaml.org,2002:"
_SCALARS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}


class SpecError(ValueError):
    """A file or `--set` argument that cannot be used, with all that is wrong with it.

    Attributes:
        source: the file's path as the user wrote it.
        problems: each in words that a terminal can show.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = printable(source)
        self.problems = tuple(printable(_cut(problem)) for problem in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [f"  - {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        more = [f"  and {len(problems) - SHOWN_PROBLEMS:,} more"] if len(problems) > SHOWN_PROBLEMS else []
        super().__init__("\n".join([f"{self.source} has {count}:", *lines, *more]))


class _Loader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does: `3e-3` is a number, `on` and `no` are text.

    Aliases are refused: nothing here needs them, and a few lines of them expand without bound.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own attribute
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "aliases (*name) are not supported; write the value out", mark)
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(None, None, f"nested more than {MAX_DEPTH} levels deep", mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


for _name, (_pattern, _) in _SCALARS.items():
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), None)


class Document:
    """The values of one file and the problems found in them so far.

    Attributes:
        source: the file's path as the user wrote it.
        values: the top mapping.
    """

    def __init__(self, source: str, text: str) -> None:
        self.source = source
        self.values: dict[str, Any] = {}
        self._origins: dict[Where, Origin] = {}
        self._problems: list[tuple[Origin, str]] = []
        self._read(text)

    def add(self, where: Where, message: str, origin: Origin = None) -> None:
        """Note a problem with the value at `where`."""
        origin = origin if origin is not None else self._origin(where)
        place = _path_text(where)
        prefix = ", ".join(
            filter(None, [f"line {origin}" if isinstance(origin, int) else _shortened(origin or ""), place])
        )
        self._problems.append((origin, f"{prefix}: {message}" if prefix else message))

    def check(self) -> None:
        """Raise what was found, by line, if anything was.

        Raises:
            SpecError: at least one problem was added.
        """
        if self._problems:
            ordered = sorted(self._problems, key=lambda problem: _order(problem[0]))
            raise SpecError(self.source, list(dict.fromkeys(text for _, text in ordered)))

    def section(self, name: str, required: bool = True) -> dict[str, Any] | None:
        """The mapping under a top key; None, with a problem noted, where there is none."""
        value = self.values.get(name)
        if isinstance(value, dict):
            return dict(value)
        if value is None and not required:
            return {}
        self.add((name,), "missing" if value is None else f"expected a section with keys, got {shown(value)}")
        return None

    def check_keys(self, where: Where, keys: Iterable[str], allowed: Sequence[str]) -> None:
        """Note every key that is not allowed, with the nearest that is."""
        for key in keys:
            if key not in allowed:
                near = _nearest(key, allowed)
                hint = f"did you mean {near!r}?" if near else f"allowed: {', '.join(allowed)}"
                self.add((*where, key), f"unknown key; {hint}")

    def set(self, where: Where, value: Any, origin: str) -> None:
        """Put a value in, making the sections on the way to it; a section that is `none` counts as absent."""
        section = self.values
        for depth, key in enumerate(where[:-1], start=1):
            inner = section.get(str(key))
            if inner is None or inner == "none":
                inner = section[str(key)] = {}
            if not isinstance(inner, dict):
                self.add(where[:depth], f"is {shown(inner)}, which has no key {where[depth]!r} to set", origin)
                return
            section = inner
        section[str(where[-1])] = value
        self._origins = {known: line for known, line in self._origins.items() if known[: len(where)] != where}
        self._origins[where] = origin

    def move(self, where: Where, inside: str) -> None:
        """Replace a value by a section that holds it under the key `inside`, for short forms."""
        section = self.values
        for key in where[:-1]:
            section = section[str(key)]
        section[str(where[-1])] = {inside: section[str(where[-1])]}
        self._origins[(*where, inside)] = self._origin(where)

    def overridden(self, where: Where) -> bool:
        """Whether a `--set` argument gave the value, a part of it, or a section around it."""
        parts = (origin for path, origin in self._origins.items() if path[: len(where)] == where)
        return any(isinstance(origin, str) for origin in (self._origin(where), *parts))

    def _origin(self, where: Where) -> Origin:
        """Of the value, or of the innermost section around it that is there."""
        paths = (where[:end] for end in range(len(where), 0, -1))
        return next((self._origins[path] for path in paths if path in self._origins), None)

    def _read(self, text: str) -> None:
        loader = self._loader(text)
        try:
            node = loader.get_single_node()
        except (ValueError, OverflowError) as error:  # PyYAML makes numbers of escapes and directives unchecked
            raise SpecError(self.source, [f"line {loader.line + 1}: no YAML: {error}"]) from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(filter(None, [error.problem, error.context]))
            if mark is None:
                raise SpecError(self.source, [what]) from error
            raise SpecError(self.source, [f"line {mark.line + 1}: {what}{_pointer(text, mark)}"]) from error
        if node is None:
            raise SpecError(self.source, ["the file is empty"])
        values = self._plain(node, ())
        if not isinstance(values, dict):
            raise SpecError(self.source, [f"expected keys such as `name:` and `space:`, got {shown(values)}"])
        self.values = values

    def _loader(self, text: str) -> _Loader:
        try:
            return _Loader(text)
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            what = f"the character U+{error.character:04X} is not allowed in YAML"
            raise SpecError(self.source, [f"line {line}: {what}"]) from error

    def _plain(self, node: yaml.Node, where: Where) -> Any:
        if where:
            self._origins.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._plain(item, (*where, index)) for index, item in enumerate(node.value)]
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.ScalarNode) and kind == "str":
            return node.value
        if isinstance(node, yaml.ScalarNode) and kind in _SCALARS and re.fullmatch(_SCALARS[kind][0], node.value):
            return self._scalar(node, kind, where)
        self.add(where, f"the tag {node.tag} is not supported", node.start_mark.line + 1)
        return None

    def _scalar(self, node: yaml.ScalarNode, kind: str, where: Where) -> Any:
        try:
            return _SCALARS[kind][1](node.value)
        except ValueError:  # Python refuses to read an integer of thousands of digits
            self.add(where, f"expected a number, got {shown(node.value)}")
            return None

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.add(where, "expected a name in front of the colon", line)
                continue
            key = key_node.value
            if key in mapping:
                self.add((*where, key), f"given twice, first in line {self._origins[(*where, key)]}", line)
                continue
            self._origins[(*where, key)] = line
            mapping[key] = self._plain(value_node, (*where, key))
        return mapping


def read_document(path: Path, most_bytes: int | None = MAX_BYTES) -> Document:
    """Read a file.

    Args:
        path: of the file.
        most_bytes: that it may have; None for a file that we wrote.

    Raises:
        SpecError: the file is missing, a folder, too large, not text or not YAML, or cannot be opened.
    """
    try:
        return _read_file(path, most_bytes)
    except OSError as error:
        raise SpecError(str(path), [f"expected a YAML file, got {error.strerror or error}"]) from error


def _read_file(path: Path, most_bytes: int | None) -> Document:
    if path.is_dir():
        raise SpecError(str(path), ["is a folder; name a YAML file in it" + _offers(path, [path])])
    if not path.is_file():
        raise SpecError(
            str(path), [f"does not exist: {path.absolute()}" + _offers(path, [path.parent, Path("search_spaces")])]
        )
    if most_bytes is not None and (size := path.stat().st_size) > most_bytes:
        raise SpecError(str(path), [f"expected at most {most_bytes:,} bytes, got {size:,}"])
    try:
        return Document(str(path), path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SpecError(str(path), [f"expected UTF-8 text, got other bytes at byte {error.start}"]) from error


def parse_value(text: str) -> Any:
    """Read the value of a `--set` argument; what is not YAML is text."""
    try:
        document = Document("", f"value: {text}")
        document.check()
    except SpecError:
        return text
    return document.values["value"] if document.values.keys() == {"value"} else text


def read_plain(text: str) -> dict[str, Any]:
    """The values of a YAML text as they stand.

    Raises:
        SpecError: it is no mapping, or has problems.
    """
    document = Document("the text", text)
    document.check()
    return dict(document.values)


def write_yaml(values: Mapping[str, Any]) -> str:
    """As YAML text, in the order of the keys."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def shown(value: Any) -> str:
    """A value as messages quote it."""
    return _shortened(repr(value))


def unknown(name: object, known: Iterable[str]) -> str:
    """The message for a name that does not exist."""
    names = list(known)
    near = _nearest(str(name), names)
    return f"unknown {shown(name)}; " + (f"did you mean {near!r}? " if near else "") + f"known: {', '.join(names)}"


def printable(text: str) -> str:
    """Text without characters that a terminal would obey or could not show: these are written as escapes."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _cut(problem: str) -> str:
    return problem if len(problem) <= LONGEST_PROBLEM else problem[: LONGEST_PROBLEM - 3] + "..."


def _nearest(name: str, known: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _shortened(text: str) -> str:
    text = without_password(text)  # first, since half a password could not be told from other text
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _path_text(where: Where) -> str:
    """`search.fixed[0].freeze`; an index at the end is left out, the message shows the value."""
    while where and isinstance(where[-1], int):
        where = where[:-1]
    parts = (f"[{key}]" if isinstance(key, int) else f".{_shortened(key)}" for key in where)
    return "".join(parts).removeprefix(".")


def _order(origin: Origin) -> tuple[int, int]:
    if isinstance(origin, int):
        return 0, origin
    return (1, 0) if origin is not None else (2, 0)


def _pointer(text: str, mark: yaml.Mark) -> str:
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if not line.strip() or without_password(line) != line:
        return ""
    line = "".join(letter if letter.isprintable() else " " for letter in line)  # one place each, as the mark counts
    start = max(0, mark.column - SHOWN_CHARACTERS)
    return f"\n      {line[start : start + 2 * SHOWN_CHARACTERS]}\n      {' ' * (mark.column - start)}^"


def _offers(path: Path, folders: Sequence[Path]) -> str:
    files = {file.name: str(file) for folder in folders for file in sorted(folder.glob("*.y*ml"))}
    near = _nearest(f"{path.stem}.yaml", list(files))
    if near:
        return f"; did you mean {files[near]}?"
    return f"; there are: {', '.join(files.values())}" if files else ""
