"""Ways to damage a file: bytes, text, JSON, headers, archives. All of them follow from a `random.Random`."""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

# JSON that Python cannot be made to write: put in for the string of the same name.
RAW = {
    "@digits@": "1" + "0" * 5000,
    "@deep list@": "[" * 100_000 + "]" * 100_000,
    "@deep object@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@cut@": '"never closed',
    "@bad escape@": '"\\x"',
}

ODD: list[Any] = [
    *(0, -1, 1, 2, 3, 7, 255, 65536, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**12, 10**400, -(10**18)),
    *(0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), -float("inf")),
    *(True, False, None, "", "1", "\n", "two\nlines", "\0", "\ud800", "a" * 100_000, "\N{GRINNING FACE}", "../../etc"),
    *([], {}, [[]], [None], [0] * 10_000, [[[[[[1]]]]]], {"a": {"b": {}}}, ["opt"], {"": ""}),
    *RAW,
]


def damage_bytes(random: Random, content: bytes) -> bytes:
    """`content` with bits flipped, a stretch cut out, doubled, overwritten or made up, or without its end."""
    damaged = bytearray(content)
    at = random.randrange(len(damaged) + 1)
    size = random.choice((1, 2, 4, 8, 64, 1000))
    kind = random.choice(("flip", "flip", "flip", "cut", "double", "overwrite", "insert", "truncate", "truncate"))
    if kind == "flip":
        for _ in range(random.choice((1, 1, 2, 8, 50)) if damaged else 0):
            damaged[random.randrange(len(damaged))] ^= 1 << random.randrange(8)
    elif kind == "cut":
        del damaged[at : at + size]
    elif kind == "double":
        damaged[at:at] = damaged[at : at + size]
    elif kind == "overwrite":
        damaged[at : at + size] = random.randbytes(size)
    elif kind == "insert":
        damaged[at:at] = random.choice((random.randbytes(size), b"\0" * size, b"\xff" * size, b'"', b"}", b"{", b"["))
    else:
        del damaged[at:]
    return bytes(damaged)


def damage_json(random: Random, content: bytes) -> bytes:
    """The JSON `content` with one to three values dropped, doubled, swapped, wrapped or replaced by odd ones."""
    value = json.loads(content)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        value = _damage_value(random, value)
    text = json.dumps(value)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    if random.random() < 0.05:  # a key that comes twice
        key, odd = random.choice(_keys(value) or [""]), json.dumps(random.choice(ODD[:40]))
        text = "{" + f"{json.dumps(key)}: {odd}, " + text[1:]
    return text.encode("utf-8", "surrogatepass")


def _keys(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else []


def _damage_value(random: Random, root: Any) -> Any:
    """`root` with one value changed, somewhere within."""
    if not isinstance(root, dict | list) or not root or random.random() < 0.01:
        return _odd(random)
    parent = root
    while True:
        key = random.choice(list(parent)) if isinstance(parent, dict) else random.randrange(len(parent))
        inner = parent[key]
        if not isinstance(inner, dict | list) or not inner or random.random() < 0.3:
            break
        parent = inner
    change: Callable[[], None] = random.choice((_drop, _replace, _replace, _replace, _nudge, _rename, _wrap, _swap))
    change(random, parent, key)
    return root


def _odd(random: Random) -> Any:
    """One of `ODD`, a copy because the next change may go into it."""
    return deepcopy(random.choice(ODD))


def _drop(random: Random, parent: Any, key: Any) -> None:
    del parent[key]


def _replace(random: Random, parent: Any, key: Any) -> None:
    parent[key] = _odd(random)


def _nudge(random: Random, parent: Any, key: Any) -> None:
    """A number becomes another plausible one, a string loses or doubles its end."""
    value = parent[key]
    if isinstance(value, bool) or value is None:
        parent[key] = not value
    elif isinstance(value, int | float):
        real = float(value) if abs(value) < 1e300 else 0.5
        parent[key] = random.choice((value + 1, value - 1, value * 2, value // 2, -value, value * 10**6, real))
    elif isinstance(value, str):
        parent[key] = random.choice((value[:-1], value + value[-1:], value.upper(), value[::-1]))
    else:
        parent[key] = [value, value]


def _rename(random: Random, parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[random.choice((f"{key}x", "", "two\nlines", key[:-1], "n" * 300))] = parent.pop(key)
    else:
        parent.insert(key, _odd(random))


def _wrap(random: Random, parent: Any, key: Any) -> None:
    parent[key] = random.choice(([parent[key]], {"value": parent[key]}, str(parent[key]), json.dumps(parent[key])))


def _swap(random: Random, parent: Any, key: Any) -> None:
    other = random.choice(list(parent)) if isinstance(parent, dict) else random.randrange(len(parent))
    parent[key], parent[other] = parent[other], parent[key]


def damage_text(random: Random, content: bytes) -> bytes:
    """Lines dropped, doubled, swapped, joined or replaced."""
    lines = content.split(b"\n")
    for _ in range(random.choice((1, 1, 3, 20))):
        i, j = random.randrange(len(lines)), random.randrange(len(lines))
        kind = random.choice(("drop", "double", "swap", "join", "odd", "odd"))
        if kind == "drop" and len(lines) > 1:
            del lines[i]
        elif kind == "double":
            lines.insert(i, lines[j])
        elif kind == "swap":
            lines[i], lines[j] = lines[j], lines[i]
        elif kind == "join":
            lines[i] += lines[j]
        else:
            lines[i] = random.choice((b"", b" ", b"a", b"a b c", b"\xff\xfe", b"\0", b"zz qq", b"a" * 100_000))
    return b"\n".join(lines)


def damage_safetensors(random: Random, content: bytes) -> bytes:
    """A safetensors file with its header, its length, its end or its entries damaged."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = random.choice(("length", "header bytes", "header bytes", "JSON", "JSON", "entry", "entry", "entry", "end"))
    if kind == "length":
        lengths = (0, 1, 2, 8, size - 1, size + 1, size * 2, len(content), 10**8, 2**31, 2**63, 2**64 - 1)
        return random.choice(lengths).to_bytes(8, "little") + content[8:]
    if kind == "end":
        return random.choice((content[: random.randrange(len(content))], content + b"\0" * 8, content + header))
    if kind == "header bytes":
        return _with_header(random, damage_bytes(random, header), data)
    if kind == "JSON":
        return _with_header(random, damage_json(random, header), data)
    return _with_header(random, _damage_entry(random, json.loads(header)), data)


def _damage_entry(random: Random, entries: dict[str, Any]) -> bytes:
    name, other = (random.choice([name for name in entries if name != "__metadata__"]) for _ in range(2))
    entry, number = entries[name], random.choice((0, 1, -1, 2**31, 2**40, 2**62, 2**63, 2**64 - 1, 2**64, 1.0, "1"))
    kind = random.choice(("dtype", "dtype", "shape", "shape", "size", "offsets", "offsets", "other", "name"))
    if kind == "dtype":
        entry["dtype"] = random.choice(
            ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "I8", "U8", "BOOL", "C64", "X", 3)
        )
    elif kind == "shape":
        entry["shape"] = random.choice(
            ([], [0], [1], [*entry["shape"], 1], entry["shape"][::-1], [number], [number, 0], [2**32, 2**32], number)
        )
    elif kind == "size" and entry["shape"]:
        entry["shape"][random.randrange(len(entry["shape"]))] = number
    elif kind == "offsets":
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = random.choice(
            ([end, begin], [begin, number], [number, end], [begin, end + 4], [begin - 4, end], [begin], [], number)
        )
    elif kind == "other":
        entries[name] = random.choice((entries[other], None, [], {}, {"dtype": "F32"}, entry | {"shape": [2, 2]}))
    else:
        entries[random.choice((other, "two\nlines", "", "n" * 10_000, f"model.{name}", name[6:], "\0"))] = entries.pop(
            name
        )
    return json.dumps(entries).encode()


def _with_header(random: Random, header: bytes, data: bytes) -> bytes:
    """A file of `header` and `data`; now and then the header is padded, or its length is wrong."""
    if random.random() < 0.2:
        header += b" " * (-len(header) % 8)
    length = len(header) + (random.choice((-1, 1, 8)) if random.random() < 0.05 else 0)
    return max(length, 0).to_bytes(8, "little") + header + data


def damage_gguf(random: Random, content: bytes) -> bytes:
    """A GGUF file with a number of its header replaced by an odd one, a name by another, a bit flipped, or an end."""
    header = content.rfind(b".weight") + 100  # behind the last tensor's name come its shape, type and place
    kind = random.choice(("count", "number", "number", "number", "name", "bytes", "bytes", "end"))
    if kind == "count":
        return _overwritten(content, random.choice((4, 8, 16)), _odd_number(random, random.choice((4, 8))))
    if kind == "number":
        size = random.choice((4, 8))
        return _overwritten(content, random.randrange(header), _odd_number(random, size))
    if kind == "name":
        old, new = random.sample((b"blk.0.", b"blk.1.", b"llama.", b"attn_", b"ffn_u", b"ffn_g", b"general."), 2)
        return content.replace(old, new[: len(old)].ljust(len(old), b"x"), random.choice((1, 2, -1)))
    if kind == "end":
        return content[: random.randrange(len(content))]
    return damage_bytes(random, content[:header]) + content[header:]


def _odd_number(random: Random, size: int) -> bytes:
    odd = (0, 1, 2, 3, 4, 8, 9, 10, 31, 255, 2**16, 2**22, 2**24, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)
    return random.choice([number for number in odd if number < 256**size]).to_bytes(size, "little")


def _overwritten(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def damage_metadata(random: Random, content: bytes) -> bytes:
    """A safetensors file in whose metadata a text, or the JSON that it is, has been damaged."""
    size = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + size])
    metadata = entries["__metadata__"]
    name = random.choice(sorted(metadata))
    try:
        json.loads(metadata[name])
        damaged = damage_json(random, metadata[name].encode())
    except ValueError:
        damaged = damage_bytes(random, metadata[name].encode())
    metadata[name] = damaged.decode(errors="replace")
    return _with_header(random, json.dumps(entries).encode(), content[8 + size :])


def damage_json_lines(random: Random, content: bytes) -> bytes:
    """Lines of JSON, one of them damaged."""
    lines = content.split(b"\n")
    number = random.randrange(len(lines) - 1)
    lines[number] = damage_json(random, lines[number])
    return b"\n".join(lines)


def damage_archive(random: Random, content: bytes) -> bytes:
    """A zip archive of NumPy's lists, or of PyTorch, with one of its members damaged, renamed, doubled or left out."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [[member.filename, archive.read(member)] for member in archive.infolist()]
    number = random.randrange(len(members))
    kind = random.choice(("bytes", "bytes", "header", "header", "header", "name", "double", "drop", "other"))
    if kind == "bytes":
        members[number][1] = damage_bytes(random, members[number][1])
    elif kind == "header":
        members[number][1] = _damage_list(random, members[number][1])
    elif kind == "name":
        name = members[number][0]
        members[number][0] = random.choice(
            (name[1:], name * 100, "../" + name, "two\nlines.npy", name.lower(), "L0_C999.npy")
        )
    elif kind == "double":
        members.append([random.choice((members[number][0], "L0_C3.npy", "L9_C0.npy")), members[number][1]])
    elif kind == "drop":
        del members[number]
    else:
        members[number][1] = random.choice((b"", b"a", b"\0" * 10**6, members[0][1] * 2, members[-1][1]))
    written = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(written, "w", random.choice((0, 8))) as archive:
        warnings.simplefilter("ignore")  # that a name comes twice
        for name, member in members:
            archive.writestr(name, member)
    return written.getvalue()


def _damage_list(random: Random, member: bytes) -> bytes:
    """A `.npy` file, or another, that promises something else than it holds."""
    ways = {
        b"'shape': (": (
            b"'shape': (1000000000000,",
            b"'shape': (-1,",
            b"'shape': (1,",
            b"'shape': ((",
            b"'shape': (0,",
        ),
        b"'<i8'": (b"'|O'", b"'<f8'", b"'<U9'", b"'<i4'", b"'>i8'", b"'<M8'", b"[]", b"'" + b"i" * 1000 + b"'"),
        b"False": (b"True", b"None", b"(" * 50, b"9" * 5000),
    }
    found = [old for old in ways if old in member]
    if not found:
        return damage_bytes(random, member)
    old = random.choice(found)
    return member.replace(old, random.choice(ways[old]), 1)


_SNIPPETS = (
    *(
        "{{",
        "}}",
        "{%",
        "%}",
        "{% endfor %}",
        "{% if x %}",
        "{# ",
        "{{ x.y.z }}",
        "{{ messages | tojson }}",
        "{{ 1 / 0 }}",
    ),
    *(
        "{% for m in messages %}{{ m }}{% endfor %}",
        "{% set x = x ~ x %}",
        "{{ messages[5].content }}",
        "{{ ''.__class__ }}",
    ),
    *(
        "{% for i in range(99999) %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ '%9999999d' % 1 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ),
    *(
        "{% include 'x' %}",
        "{% import '/etc/passwd' as p %}",
        "{{ raise_exception('a\nb' ~ messages) }}",
        "\ud800",
        "\0",
    ),
)


def damage_template(random: Random, content: bytes) -> bytes:
    """A chat template with a snippet put in, a word exchanged for another, or its bytes damaged."""
    text = content.decode()
    kind = random.choice(("snippet", "snippet", "words", "bytes"))
    if kind == "bytes":
        return damage_bytes(random, content)
    if kind == "snippet":
        places = [match.end() for match in re.finditer(r"[}%]}", text)]
        place = random.choice(places)
        return (text[:place] + random.choice(_SNIPPETS) + text[place:]).encode("utf-8", "surrogatepass")
    words = re.findall(r"\w+", text)
    old, new = random.choice(words), random.choice(words)
    return re.sub(rf"\b{old}\b", new, text, count=random.choice((0, 1))).encode()


_ATOMS = (
    "a",
    "b",
    " ",
    r"\s",
    r"\p{L}",
    "[^a]",
    "[ab]",
    "(?:a|b)",
    "(a|a)",
    "(?:a*b)",
    "(?=a)",
    "(?!a)",
    ".",
    "$",
    r"[^\s]",
)
_QUANTIFIERS = ("", "", "?", "*", "+", "*", "+", "{1,3}", "{2,}", "++", "*?")


def pattern(random: Random) -> str:
    """A regular expression, which may try without end."""

    def sequence() -> str:
        return "".join(random.choice(_ATOMS) + random.choice(_QUANTIFIERS) for _ in range(random.randint(1, 3)))

    return "|".join(sequence() for _ in range(random.randint(1, 3)))


def damage_pipeline(random: Random, content: bytes) -> bytes:
    """A tokenizer.json with a step that cuts or replaces by some pattern, or makes texts larger, once or many times."""
    fields = json.loads(content)
    by = {random.choice(("Regex", "Regex", "String")): pattern(random)}
    replace = {"type": "Replace", "pattern": by, "content": random.choice(("", "a", "aa", "a" * 100))}
    cut = {"type": "Split", "pattern": by, "behavior": random.choice(("Isolated", "Removed")), "invert": False}
    times = random.choice((1, 1, 2, 40))
    kind = random.choice(("normalizer", "pre_tokenizer", "pre_tokenizer", "decoder", "pad"))
    if kind == "pad":
        fields["padding"] = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
        fields["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
        return json.dumps(fields).encode()
    name = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[kind]
    step = cut if kind == "pre_tokenizer" else replace
    rest = [] if fields.get(kind) is None else [fields[kind]]
    fields[kind] = {"type": "Sequence", name: times * [step] + rest}
    return json.dumps(fields).encode()
