"""How a C compiler lays out the structs of csrc, read from the sources: a helper of the tests, not a test."""

import contextlib
import ctypes
import math
import re

from lowbit_attention.backends.cuda.arguments import Structure
from lowbit_attention.backends.cuda.instances import CSRC

# ---- C structs by the x86-64 ABI, which the device's compiler follows: every member at a multiple of its alignment

SIZES = {"u8": 1, "u16": 2, "i32": 4, "u32": 4, "float": 4, "i64": 8, "u64": 8, "Vec8": 8, "Vec16": 16}
CODES = {"u8": "B", "u16": "H", "i32": "i", "u32": "I", "float": "f", "i64": "q", "u64": "Q"}


NESTED = {
    "Strided": "tile/strided.cuh",
    "Schedule": "common/work.cuh",
    "Divisor": "common/work.cuh",
    "Stage": "mma/block.cuh",
    "Work": "common/work.cuh",
    "WorkTile": "hopper/block.cuh",
    "Promoted": "common/softmax.cuh",
    "MaskArgs": "common/masks.cuh",
    "SequenceArgs": "common/sequences.cuh",
}


def members(text):
    """``(name, type, pointer?, alignment asked for, array sizes)`` of every member of a struct's body, in order."""
    for declaration in filter(None, map(str.strip, text.split(";"))):
        form = r"(?:alignas\((\d+)\)\s+)?(?:const\s+)?(\w+)(.*)"
        asked, kind, names = re.fullmatch(form, declaration, flags=re.DOTALL).groups()
        for one in names.split(","):
            pointer, name, dims = re.fullmatch(r"\s*(\*?)\s*(\w+)((?:\[[^\]]*\])*)", one).groups()
            yield name, kind, bool(pointer), int(asked or 1), re.findall(r"\[([^\]]*)\]", dims)


def value(expression, constants):
    """A C expression of whole numbers."""
    while inner := re.search(r"\(([^()]*\?[^()]*)\)", expression):
        expression = expression[: inner.start()] + str(value(inner[1], constants)) + expression[inner.end() :]
    if match := re.fullmatch(r"(.*?)\?(.*?):(.*)", expression, flags=re.DOTALL):
        condition, yes, no = match.groups()
        return value(yes if value(condition, constants) else no, constants)
    plain = expression.strip().replace("/", "//").replace("&&", " and ").replace("||", " or ")
    return int(eval(re.sub(r"!(?!=)", " not ", plain), {"__builtins__": {}}, constants))


def constants_of(instance):
    """What an instance's source knows: its macros, and the numbers that its configuration writes before it."""
    constants = {"true": 1, "false": 0} | dict(instance.defines)
    read_text(instance.config, constants)
    return constants


def read(file, constants):
    """`read_text` of a source below `CSRC`."""
    return read_text((CSRC / file).read_text(), constants)


def read_text(text, constants):
    """A source without comments and, given macros, without what ``#if`` leaves out.

    The source's own macros and constants, as far as they are whole numbers, join ``constants``.
    """
    text = re.sub(r"//[^\n]*", "", text)
    if constants is None:
        return text
    lines, conditions = [], []  # of every #if around a line: [holds now, has held]
    for line in text.splitlines():
        word, _, rest = line.strip().partition(" ")
        outside = all(now for now, _ in conditions[:-1])
        if word in ("#if", "#elif", "#else"):
            if word == "#if":
                outside = outside and all(now for now, _ in conditions[-1:])
                conditions.append([False, False])
            held = conditions[-1][1]
            now = outside and not held and (word == "#else" or bool(value(rest, constants)))
            conditions[-1] = [now, held or now]
        elif word == "#endif":
            conditions.pop()
        elif all(now for now, _ in conditions):
            lines.append(line)
            match = re.match(r"#define (\w+) (.*)", line) or re.match(r"constexpr \w+ (k\w+) = ([^;]+);", line)
            if match:
                with contextlib.suppress(NameError, SyntaxError):  # (a function, or the size of a type)
                    constants[match[1]] = value(match[2], constants)
    return "\n".join(lines)


def layout(file, name, constants=None):
    """``(name, offset, `struct` code)`` of every member, structs opened (``q.data``); then size and alignment."""
    ((base, body),) = re.findall(rf"struct {name}(?: : (\w+))? \{{(.*?)\n\}};", read(file, constants), flags=re.DOTALL)
    body = re.split(r"\n\n?\s*(?:template|__device__)", body)[0]  # (functions come last)
    flat, end, widest = layout(NESTED[base], base, constants) if base else ([], 0, 1)
    for member, kind, pointer, asked, dims in members(body):
        if kind in NESTED:
            inner, size, alignment = layout(NESTED[kind], kind, constants)
            inner = [(f"{member}.{label}", offset, code) for label, offset, code in inner]
        else:
            size = alignment = 8 if pointer else SIZES[kind]
            inner = [(member, 0, "P" if pointer else CODES.get(kind))]
        size *= math.prod(value(dim, constants) for dim in dims)
        alignment = max(alignment, asked)
        end = -(-end // alignment) * alignment
        flat += [(label, end + offset, code) for label, offset, code in inner]
        end, widest = end + size, max(widest, alignment)
    return flat, -(-end // widest) * widest, widest


# ---- the host's

CTYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int32, "I": ctypes.c_uint32, "q": ctypes.c_int64, "f": ctypes.c_float}


def fields(structure, prefix="", start=0):
    """As `layout` of a host's structure: ``(name, offset, code)`` of every field, structures opened."""
    for name, kind in structure._fields_:
        offset = start + getattr(structure, name).offset
        if issubclass(kind, Structure):
            yield from fields(kind, f"{prefix}{name}.", offset)
        else:
            (code,) = (code for code, its in CTYPES.items() if its is kind)
            yield prefix + name, offset, code
