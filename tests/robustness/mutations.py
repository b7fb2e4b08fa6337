"""Mutations of the files that strangers write, as strategies of hypothesis.

A mutation is drawn as text or bytes that differ from a sound file: in one value, in one key, in a
few bytes, or cut off. What is drawn often is what parsers disagree about.
"""

import json
from typing import Any

import yaml
from hypothesis import strategies as st

RAW_NUMBERS = (
    *("-0", "0.0", "1e2", "1.0", "1E400", "-1", "00", "01", "+1", ".5", "5.", "0x10", "1_000"),
    *("NaN", "Infinity", "-Infinity", "18446744073709551615", "18446744073709551616"),
    *("9223372036854775808", "4294967296", "9" * 30, "9" * 5000, "1e-400"),
)
"""Spellings of numbers, not all of which are JSON."""

RAW_TEXTS = (
    *('""', '"\\ud800"', '"\\udc00\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"a\\/b"', '"\t"'),
    *('"\\x41"', "'a'", '"\\uD8"', '"é"', '"a\\nb"', '"' + "x" * 5000 + '"', '"../../etc/passwd"'),
)
"""Spellings of strings, not all of which are JSON."""

RAW_OTHERS = (
    *("null", "true", "True", "None", "[]", "{}", "[[]]", '{"a": 1, "a": 2}', "[1,]", "{,}", ""),
    *("[" * 200 + "]" * 200, "[" * 3000, '{"a":' * 200 + "1" + "}" * 200, "/**/1", "[1 2]"),
)

raw_values = st.sampled_from((*RAW_NUMBERS, *RAW_TEXTS, *RAW_OTHERS))

values = st.one_of(
    st.sampled_from([None, True, False, 0, 1, -1, 2, 7, 0.5, 1e300, -(2**63), 2**64, 10**7]),
    st.sampled_from(["", "a", "nvfp4", "bf16", "../x", "\n", "\u202e", "x" * 3000]),
    st.sampled_from([[], [1], ["a"], [[]], {}, {"a": 1}, [None], [{"id": 0}]]),
    st.integers(-(10**6), 10**6),
    st.floats(allow_nan=False),
    st.text(max_size=6),
)
"""JSON values of every type."""


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Keys down to every value, the whole's first."""
    found = [path]
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value[:8])
    else:
        return found
    for key, below in pairs:
        found += places(below, (*path, key))
    return found


def replaced(value: Any, path: tuple, new: Any) -> Any:
    """`value` with `new` at a place."""
    if not path:
        return new
    key, *rest = path
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = replaced(copy[key], tuple(rest), new)
    return copy


def without(value: Any, path: tuple) -> Any:
    """`value` without what is at a place."""
    *outer, key = path
    part = value
    for step in outer:
        part = part[step]
    if isinstance(part, dict):
        less = {name: below for name, below in part.items() if name != key}
    else:
        less = [below for number, below in enumerate(part) if number != key]
    return replaced(value, tuple(outer), less)


@st.composite
def mutated_json(draw: st.DrawFn, value: Any) -> str:
    """JSON text of `value` with one value replaced, taken out or spelled otherwise, or two."""
    marker = "\x01here\x01"
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.sampled_from(places(value)))
        how = draw(st.sampled_from(("value", "value", "gone", "renamed")))
        if how == "gone" and place:
            value = without(value, place)
        elif how == "renamed" and place and isinstance(place[-1], str):
            *outer, key = place
            part = value
            for step in outer:
                part = part[step]
            others = {name: below for name, below in part.items() if name != key}
            other_name = draw(st.sampled_from([key + "x", key.upper(), "", "dtype", "\n"]))
            value = replaced(value, tuple(outer), {other_name: part[key], **others})
        else:
            value = replaced(value, place, draw(values))
    if draw(st.booleans()):
        return json.dumps(value)
    text = json.dumps(replaced(value, draw(st.sampled_from(places(value))), marker))
    return text.replace(json.dumps(marker), draw(raw_values), 1)


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` cut off, with bytes replaced, put in or taken out, or with another beginning."""
    how = draw(st.sampled_from(("cut", "bytes", "bytes", "insert", "remove", "begin", "twice")))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if how == "cut":
        return content[:at]
    if how == "begin":
        start = draw(st.sampled_from((b"\xef\xbb\xbf", b"\xff\xfe", b" ", b"\n", b"\x00", b"[")))
        return start + content
    if how == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at:]
    if how == "remove":
        return content[:at] + content[at + draw(st.integers(1, 16)) :]
    if how == "twice":
        return content + content
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


def mutated_file(content: bytes) -> st.SearchStrategy[bytes]:
    """A JSON file of other content, half the time by its values and half by its bytes."""
    by_value = mutated_json(json.loads(content)).map(lambda text: text.encode(errors="replace"))
    return st.one_of(by_value, mutated_bytes(content))


@st.composite
def mutated_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file with another header, another length of it, or other bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated_bytes(content))
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    text = draw(mutated_file(header))
    text += b" " * draw(st.integers(0, 2))
    more = draw(st.sampled_from((0, 0, 0, 0, 1, -1, 2**40)))
    return max(0, len(text) + more).to_bytes(8, "little") + text + data


YAML_LINES = (
    *(
        "a: &a [*a]",
        "b: 2024-99-99",
        "c: !!float x",
        "d: !!python/object:os.system x",
        "? [a]\n: b",
    ),
    *("e: 0o99", "f: 1_0", "g: .inf", "h: .nan", "i: ~", "- j", "\tk: 1", "l: 1: 2", "m: |\n  n"),
    *(
        'o: "\\ud800"',
        "p: \x07",
        "<<: {q: 1}",
        "--- \nr: 1",
        "s: &s {x: 1}\nt: {<<: *s}",
        "%YAML 9.9",
    ),
    "u: &u [1,1,1,1,1,1,1,1]\n" + "".join(f"u{n}: &u{n} [{'*u,' * 8}]\n" for n in range(3)),
    "".join(f"v{n}: &v{n} [{f'*v{n - 1},' * 9 if n else 1}]\n" for n in range(9)),
)


@st.composite
def mutated_yaml(draw: st.DrawFn, content: bytes) -> bytes:
    """A YAML file of other values, other lines or other bytes."""
    how = draw(st.sampled_from(("value", "value", "line", "raw", "bytes")))
    if how == "bytes":
        return draw(mutated_bytes(content))
    if how == "value":
        return draw(mutated_json(yaml.safe_load(content))).encode(errors="replace")
    lines = content.decode().splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    if how == "line":
        lines.insert(at, draw(st.sampled_from(YAML_LINES)))
    else:
        key, colon, _ = lines[at].partition(":")
        lines[at] = f"{key}{colon or ':'} {draw(raw_values)}"
    return "\n".join(lines).encode(errors="surrogatepass")


@st.composite
def mutated_lines(draw: st.DrawFn, content: bytes) -> bytes:
    """A file of JSON lines with one of them mutated, gone, twice or out of order."""
    lines = content.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    how = draw(st.sampled_from(("line", "line", "line", "gone", "twice", "swapped", "bytes")))
    if how == "bytes":
        return draw(mutated_bytes(content))
    if how == "line":
        lines[at] = draw(mutated_file(lines[at]))
    elif how == "gone":
        del lines[at]
    elif how == "twice":
        lines.insert(at, lines[at])
    else:
        lines[0], lines[at] = lines[at], lines[0]
    return b"".join(line + b"\n" for line in lines)


STATEMENTS = (
    *(
        "{{ 1 // 0 }}",
        "{{ x.y.z }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
    ),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ raise_exception('no') }}", "{% if %}"),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{{ messages | tojson }}",
        "{{ strftime_now('%Y') }}",
        "{{ [] }}",
    ),
    *("{% generation %}a{% endgeneration %}", "{% break %}", "{{ range(10**7) | list | length }}"),
    *(
        "{% set ns = namespace(a=1) %}{{ ns.a }}",
        "{{ '%s' % messages }}",
        "{{ messages.append(1) }}",
    ),
    *("{% include 'a' %}", "{{ cycler }}", "{{ lipsum(n=10**6) }}", "{{ '\ud800' }}", "{#", "{%"),
    "{% if true %}" * 300,
)


@st.composite
def mutated_text(draw: st.DrawFn, content: bytes) -> bytes:
    """A template with a statement put in, or other bytes."""
    if draw(st.booleans()):
        return draw(mutated_bytes(content))
    at = draw(st.integers(0, len(content)))
    statement = draw(st.sampled_from(STATEMENTS)).encode(errors="surrogatepass")
    return content[:at] + statement + content[at:]
