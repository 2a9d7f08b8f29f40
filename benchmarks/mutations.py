"""Search spaces and `--set` arguments as an attacker or a tired person would give them; each follows from its seed."""

# ruff: noqa: E501 - tables of mistakes, one kind a line

import random
import re
from collections.abc import Callable, Sequence

VALUES = (
    *("", "~", "null", "true", "no", "0", "-1", "1", "2.5", "1e-3", "1e400", "-1e400", "1e-400", ".nan", ".inf", "-.inf"),
    *("9" * 19, "9" * 30, "9" * 400, "9" * 5000, "-" + "9" * 25, "0x1f", "0o17", "1_000", "1:30", "5e-324"),
    *("[]", "{}", "[[]]", "[null]", "[1, 1]", "[a, [b, [c]]]", "[" * 30 + "]" * 30, "{a: " * 30 + "1" + "}" * 30),
    *("[" * 3000, "{a: {b: {c: 1}}}", "{low: 5, high: 1}", "{low: 0, high: 1e308, step: 1e-308}", "{low: 1, high: 9}"),
    *("{low: 1, high: 9e15}", "{low: 1, high: 900000000}", "{low: 0.1, high: 0.5, step: .inf}", "{low: -.inf, high: .inf}"),
    *("{low: .nan, high: 1, log: true}", "{low: 1e-5, high: 1e-2, log: yes}", "{low: 1, high: 8, step: 0}", "{value: }"),
    *("{choices: []}", "{choices: {a: 1}}", "{value: 1, choices: [1]}", "{value: 1, when: }", "{value: 1, when: [[]]}"),
    *("{value: 1, when: [{if: {}, value: 2}]}", "{value: 1, when: [{if: {epochs: []}, value: 2}]}", "{when: []}"),
    *("{value: 1, when: [{if: {backbone: [1, {}]}, low: 3}]}", "{value: 1, when: [{if: {zzz: 1}, value: 2}]}"),
    *("2024-01-01", "2024-01-01T12:00:00Z", "!!binary aGk=", "!!set {a, b}", "!!timestamp 2001-01-01", "!!float x", "!!int []"),
    *("!!python/object/apply:os.system [exit]", "!!python/name:os.system", "!!python/object/new:type [x]", "!x y", "!!str 5"),
    *("&a [1]", "*a", "&a {b: *a}", "<<: 1", "'", '"', "'unfinished", '"\\x"', '"\\UFFFFFFFF"', '"\\ud800"', '"\\0"', '"\\e[2J"'),
    *("|", ">", "| x", "%", "@", "`", "? a", "- 1", "a: b", "#", "---", "...", "\t1", "x" * 300, "x" * 20_000, "é" * 500),
    *("a/../../b", "/", ".", "..", "/dev/zero", "/proc/self/mem", "~nobody-such/x", "a/" * 3000, "file:///etc/passwd", "http://["),
    *("'('", "'(?P<a>x'", "'a{99999999999999999999}'", "'" + "(" * 4000 + ")" * 4000 + "'", "'[a-'", "'*'", "'(?i)x(?i)'"),
    *("first:0", "first:99999999999999999999", "fraction:2", "all>none", ">".join(["all"] * 3000), "stages:-1", "convs:"),
)  # fmt: skip
PLAUSIBLE = (
    *("0.1", "0.5", "1", "2", "3", "4", "8", "16", "96", "224", "1e-3", "all", "none", "stages:1", "first:5", "convs:2", "adam", "sgd"),
    *("max", "average", "flatten", "light", "balanced", "true", "[1, 2]", "[all, none]", "{low: 1, high: 9}", "{low: 0.1, high: 0.5}"),
    *("{low: 1e-5, high: 1e-2, log: true}", "[96, 224]", "[0.1, 0.2]", "vanilla_cnn", "[vanilla_cnn, resnet50]", "bundled", "grid"),
    *("{value: 3, when: [{if: {freeze: all}, value: 4}]}", "{choices: [1, 2], when: []}", "phantom", "loss", "accuracy", "random", "dataset"),
)  # fmt: skip
PATHS = ("search.trials", "search.fixed", "search.halving.grace_epochs", "search.algorithm", "data.source", "data.split.train", "data.patient", "data.classes", "data.sources", "data.folds", "objective.mode", "resources.cpus_per_trial", "name", "final.seeds", "tracking.uri", "reference.results", "search", "space", "data")  # fmt: skip
NAMES = (
    "",
    "x",
    "Name",
    "spaces",
    "backbone",
    "if",
    "when",
    "low",
    "<<",
    "'\\x00'",
    '"\\ud800"',
    '"\\e[2J"',
    "?",
    "k" * 2000,
)
RAW = (
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xef\xbb\xbf",
    b"\r",
    b"\t",
    b"\x1b[2J",
    b"\x85",
    b"\xe2\x80\xa8",
    b"\xc0\x80",
    b"\x7f",
)
SEPARATORS = (b"\r\n", b"\r", b"\n\n", b"\n\t", b"\xe2\x80\xa8")
HEADS = (
    "%YAML 9.9\n---\n",
    "%YAML 1." + "9" * 5000 + "\n---\n",
    "%TAG ! x\n---\n",
    "---\n",
    "...\n",
    "\ufeff\ufeff",
    "? ",
)
TAILS = (
    "\n---\na: 1\n",
    "\n...\n%",
    "\n*x",
    "\n]",
    "\n\t",
    "\nname: again\n",
    "\n- 1\n",
    "\n: : :\n",
    "\n!!python/tuple []\n",
)
BOMB = "a: &a [x, x, x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)}, ' * 9}]\n" for i in range(9))

_LINE = re.compile(r"^(?P<indent>[ ]*(?:- )?)(?P<key>[A-Za-z_]+):(?P<value>.*)$")
_INNER = re.compile(r"(?P<key>[A-Za-z_]+): (?P<value>[^,{}\[\]\n]+)")
Mutation = Callable[[random.Random, str], str]


RICH = """\
name: rich
data: {source: phantom, patient: none, classes: {Covid-19: covid, Pneumonia: null}, split: {train: 0.7, val: 0.2, test: 0.1}, folds: 3, allow: [duplicate_on_two_sides]}
objective: {metric: macro_f1, mode: max}
search:
  algorithm: random
  trials: 6
  halving: {grace_epochs: 1, reduction_factor: 3, least_survivors: 1}
  fixed:
    - {backbone: mobilenet_v2_0.35, freeze: all, learning_rate: 1e-3}
    - {backbone: vanilla_cnn}
space:
  backbone: [mobilenet_v2_0.35, vanilla_cnn]
  weights: none
  image_side: 96
  freeze: {choices: [all, "stages:1", "all>none"], when: [{if: {backbone: vanilla_cnn}, value: none}]}
  learning_rate:
    low: 1e-5
    high: 1e-2
    log: true
    when:
      - {if: {freeze: none}, low: 1e-5, high: 1e-3, log: true}
  dropout: {low: 0, high: 0.5, step: 0.1}
  batch_size: [16, 32]
  epochs: {low: 3, high: 9, step: 3}
  hidden_units: [[], 128, [64, 32]]
  optimizer: [adam, sgd]
  augmentation: light
final: {seeds: 2}
resources: {cpus_per_trial: 1, concurrency: 1}
tracking: {experiment: e}
reference: {source: a paper, classes: [a, b], results: [{label: m, freeze: all, accuracy: {test: 0.91}}]}
"""
SMALL = "name: small\ndata: phantom\nobjective: accuracy\nsearch: {trials: 2}\nspace:\n  backbone: vanilla_cnn\n  image_side: 96\n"


def mutated_space(chance: random.Random, spaces: Sequence[str]) -> tuple[bytes, str]:
    """One of the texts with one to three mistakes in it, and the names of these."""
    text = chance.choice(spaces)
    kinds = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        kind, mutate = chance.choice(list(_IN_TEXT.items()))
        kinds.append(kind)
        text = mutate(chance, text)
    found = text.encode("utf-8", "surrogatepass")
    if chance.random() < 0.2:
        kind, mutate_bytes = chance.choice(list(_IN_BYTES.items()))
        kinds.append(kind)
        found = mutate_bytes(chance, found)
    return found, "+".join(kinds)


def mutated_setting(chance: random.Random, axes: Sequence[str]) -> str:
    """A `--set` argument."""
    key = chance.choice((*axes, *PATHS, f"{chance.choice(axes)}.low", f"space.{chance.choice(axes)}"))
    value = chance.choice(VALUES if chance.random() < 0.6 else PLAUSIBLE)
    form = chance.randrange(12)
    if form == 0:
        return chance.choice(
            ("", "=", "==", ".", "=1", ".=1", "space.=1", "space..x=1", "a" * 5000, key, f"{key}.x.y=1")
        )
    if form == 1:
        return f"{_misspelt(chance, key)}={value}"
    if form == 2:
        return f"{key}={value}={value}"
    if form == 3:
        return f"{key}={_bytes_inserted(chance, value.encode()).decode(errors='surrogateescape')}"
    return f"{key}={value}"


def _line(chance: random.Random, text: str, change: Callable[[list[str], int], None]) -> str:
    lines = text.split("\n")
    change(lines, chance.randrange(len(lines)))
    return "\n".join(lines)


def _keyed(chance: random.Random, text: str, change: Callable[[re.Match[str]], str]) -> str:
    """Change one `key: value`, of a line or inside braces."""
    lines = text.split("\n")
    places = [(index, found) for index, line in enumerate(lines) if (found := _LINE.match(line))]
    inner = [(index, found) for index, line in enumerate(lines) for found in _INNER.finditer(line) if "{" in line]
    if inner and chance.random() < 0.4:
        index, found = chance.choice(inner)
        lines[index] = lines[index][: found.start()] + change(found) + lines[index][found.end() :]
    elif places:
        index, found = chance.choice(places)
        lines[index] = found["indent"] + change(found)
    return "\n".join(lines)


def _value_replaced(chance: random.Random, text: str) -> str:
    value = chance.choice(VALUES)
    return _keyed(chance, text, lambda found: f"{found['key']}: {value}")


def _plausible_value(chance: random.Random, text: str) -> str:
    """One that is right somewhere, so that what follows the reading of the file is tried too."""
    value = chance.choice(PLAUSIBLE)
    return _keyed(chance, text, lambda found: f"{found['key']}: {value}")


def _key_misspelt(chance: random.Random, text: str) -> str:
    return _keyed(chance, text, lambda found: f"{_misspelt(chance, found['key'])}: {found['value'].strip()}")


def _key_replaced(chance: random.Random, text: str) -> str:
    name = chance.choice(NAMES)
    return _keyed(chance, text, lambda found: f"{name}: {found['value'].strip()}")


def _misspelt(chance: random.Random, name: str) -> str:
    place = chance.randrange(len(name) + 1)
    return chance.choice(
        (name[:place] + name[place + 1 :], name[:place] + "x" + name[place:], name.upper(), name + name)
    )


def _line_deleted(chance: random.Random, text: str) -> str:
    return _line(chance, text, lambda lines, index: lines.__delitem__(index))


def _line_doubled(chance: random.Random, text: str) -> str:
    return _line(chance, text, lambda lines, index: lines.insert(chance.randrange(len(lines) + 1), lines[index]))


def _lines_swapped(chance: random.Random, text: str) -> str:
    def swap(lines: list[str], index: int) -> None:
        other = chance.randrange(len(lines))
        lines[index], lines[other] = lines[other], lines[index]

    return _line(chance, text, swap)


def _indented(chance: random.Random, text: str) -> str:
    def indent(lines: list[str], index: int) -> None:
        lines[index] = (
            chance.choice((" ", "  ", "\t", "    ")) + lines[index] if chance.random() < 0.6 else lines[index][1:]
        )

    return _line(chance, text, indent)


def _ends_swapped(chance: random.Random, text: str) -> str:
    """Ranges turned round."""
    return text.replace("low:", "LOW:").replace("high:", "low:").replace("LOW:", "high:")


def _when_mangled(chance: random.Random, text: str) -> str:
    old = chance.choice(("when:", "if:", "value:", "choices:", "- {", "}", "[", "]"))
    parts = text.split(old)
    if len(parts) == 1:
        return text
    place = chance.randrange(1, len(parts))
    new = chance.choice(("", "when: 3", "if: {", "if: [", "value: {", ": ", "[", "]]", "}", "{{", ","))
    return old.join(parts[:place]) + new + old.join(parts[place:])


def _characters_deleted(chance: random.Random, text: str) -> str:
    start = chance.randrange(max(1, len(text)))
    return text[:start] + text[start + chance.choice((1, 2, 10, 200)) :]


def _repeated(chance: random.Random, text: str) -> str:
    """A line many times over."""
    times = chance.choice((20, 500, 3000))
    return _line(chance, text, lambda lines, index: lines.insert(index, "\n".join([lines[index]] * times)))


def _keys_added(chance: random.Random, text: str) -> str:
    count = chance.choice((20, 500, 3000))
    return text + "\n" + "\n".join(f"{chance.choice(('k', 'spac', '  ax'))}{index}: {index}" for index in range(count))


_IN_TEXT: dict[str, Mutation] = {
    "value": _value_replaced,
    "value again": _value_replaced,
    "plausible value": _plausible_value,
    "another": _plausible_value,
    "one more": _plausible_value,
    "key misspelt": _key_misspelt,
    "key": _key_replaced,
    "line deleted": _line_deleted,
    "line doubled": _line_doubled,
    "lines swapped": _lines_swapped,
    "indented": _indented,
    "ends swapped": _ends_swapped,
    "when": _when_mangled,
    "characters deleted": _characters_deleted,
    "repeated": _repeated,
    "keys added": _keys_added,
    "head": lambda chance, text: chance.choice(HEADS) + text,
    "tail": lambda chance, text: text + chance.choice(TAILS),
    "alias bomb": lambda chance, text: BOMB + text,
}


def _bytes_inserted(chance: random.Random, data: bytes) -> bytes:
    place = chance.randrange(len(data) + 1)
    return data[:place] + chance.choice(RAW) * chance.choice((1, 1, 50)) + data[place:]


def _bytes_flipped(chance: random.Random, data: bytes) -> bytes:
    changed = bytearray(data or b"a")
    for _ in range(chance.choice((1, 3, 30))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


_IN_BYTES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bytes inserted": _bytes_inserted,
    "bytes flipped": _bytes_flipped,
    "cut": lambda chance, data: data[: chance.randrange(len(data) + 1)],
    "line ends": lambda chance, data: data.replace(b"\n", chance.choice(SEPARATORS)),
    "byte order mark": lambda chance, data: b"\xef\xbb\xbf" + data,
    "utf-16": lambda chance, data: data.decode(errors="replace").encode("utf-16"),
    "latin-1": lambda chance, data: data.replace(b"e", b"\xe9", 1),
}
