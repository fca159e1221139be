"""Beneath a Steel Sky (Debian: beneath-a-steel-sky): the speech and texts of the talking version 0.0372.

`sky.dnr` lists the entries of `sky.dsk` by number: speech from 50000 on, the English texts in eight
sections from 60600 on. An entry may be packed by Rob Northen's method 1 (RNC1). Texts are Huffman-coded,
and the code's tree is not in the data but in the interpreter, as an array of nodes of three bytes; it
is looked up there by its form, and by the English that the texts become with it: interpreters have the
trees of several versions, some of which differ in a few rare letters only.
"""

import functools
import os
import re
import struct
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distill_jax.errors import UserError
from experiments.speech.corpus.recordings import Audio, Recording

SPEECH_RATE = 11025  # Hz, of unsigned 8-bit samples

_FIRST_SPEECH, _FIRST_TEXTS = 50000, 60600
# Speech of text `4096 * section + i` is entry `_FIRST_SPEECH + _SECTION_STARTS[section] + i`; what
# follows the last start is section 7, the introduction, whose speech is laid out in another way.
_SECTION_STARTS = (0, 600, 1100, 2430, 3380, 4530, 5080, 5230)
_SECTIONS = len(_SECTION_STARTS) - 1
_SCENE = 16  # texts of a dialogue lie beside each other
_HEADER = 22  # bytes in front of a packed entry
_LONGEST_TEXT = 1000

_SMALLEST_TREE = 64  # nodes: more than the letters of an alphabet
# These are some 30 % of the words of the game's texts.
_COMMON_WORDS = re.compile(
    r"\b(the|you|to|a|i|it|of|and|that|is|in|what|me|have|for|this|be|my|your|on|not|do|with|no|we)\b"
)
_ENGLISH = 0.15  # the least share of common words in English text
_PLAIN_TEXT = re.compile(r"[A-Za-z0-9 .,:;!?'`\"()-]+")

Tree = Sequence[tuple[int, int, int]]
"""Nodes (left child, right child, character); a leaf has no children: 0 and 0. The first is the root."""


class _Entry(NamedTuple):
    offset: int  # bytes, in sky.dsk
    size: int  # bytes, as stored
    has_header: bool
    may_be_packed: bool


def recordings(
    folder: str | os.PathLike[str], interpreter: str | os.PathLike[str]
) -> list[Recording]:
    """Lists the game's recorded lines, less the introduction.

    The data don't say whose voice a line has; `speaker` is the section of the game ("sky_0" to
    "sky_6") and has many voices, most often the hero's. `scene` is a run of 16 text numbers.

    Args:
        folder: with `sky.dnr` and `sky.dsk`.
        interpreter: the program `scummvm`, which has the texts' code.

    Raises:
        UserError: for a file that is missing, damaged or of another version.
    """
    folder = Path(folder)
    disk = folder / "sky.dsk"
    entries = _entries(folder / "sky.dnr")
    sections = [_load(disk, entries, _FIRST_TEXTS + section) for section in range(_SECTIONS)]
    speech = dict(sorted(_speech_entries(entries).items()))
    if not speech:
        raise UserError(f"{folder}: no speech; expected the talking version 0.0372")

    def texts(tree: Tree) -> list[str]:
        return [decode_text(sections[number >> 12], number & 0xFFF, tree) for number in speech]

    return [
        Recording(
            id=f"sky_{number:05d}",
            speaker=f"sky_{number >> 12}",
            scene=f"sky_{number // _SCENE}",
            split="",
            text=text,
            read=functools.partial(_read, str(disk), speech[number]),
        )
        for number, text in zip(speech, _plain_english(interpreter, texts), strict=True)
    ]


def _entries(path: Path) -> dict[int, _Entry]:
    """The table of contents: a count, then per entry its number, place and size in 2, 3 and 3 bytes."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    (count,) = struct.unpack_from("<I", content.ljust(4, b"\0"))
    if not 0 < 8 * count <= len(content) - 4:
        raise UserError(f"{path}: not the table of contents of Beneath a Steel Sky")
    entries: dict[int, _Entry] = {}
    for number, place, size in struct.iter_unpack("<H3s3s", content[4 : 4 + 8 * count]):
        place, size = int.from_bytes(place, "little"), int.from_bytes(size, "little")
        offset = place & 0x7FFFFF
        if place >> 23:
            offset *= 16
        entry = _Entry(offset, size & 0x3FFFFF, not size >> 22 & 1, not size >> 23 & 1)
        entries.setdefault(number, entry)
    return entries


def _speech_entries(entries: Mapping[int, _Entry]) -> dict[int, _Entry]:
    """The recordings' entries by the numbers of their texts."""
    found = {}
    for number, entry in entries.items():
        place = number - _FIRST_SPEECH
        if 0 <= place < _SECTION_STARTS[-1]:
            section = bisect_right(_SECTION_STARTS, place) - 1
            found[(section << 12) + place - _SECTION_STARTS[section]] = entry
    return found


def _load(disk: Path, entries: Mapping[int, _Entry], number: int) -> bytes:
    if number not in entries:
        raise UserError(f"{disk}: no entry {number}; expected the talking version 0.0372")
    return _content(disk, entries[number])


def _content(disk: Path, entry: _Entry) -> bytes:
    """An entry, unpacked, with its header if it has one."""
    try:
        with disk.open("rb") as file:
            file.seek(entry.offset)
            stored = file.read(entry.size)
    except OSError as error:
        raise UserError(f"{disk}: cannot be read ({error.strerror})") from error
    if len(stored) != entry.size:
        raise UserError(f"{disk}: ends before byte {entry.offset + entry.size}")
    packed = stored[_HEADER:]
    if not (entry.may_be_packed and stored[0] & 0x80 and packed.startswith(b"RNC\x01")):
        return stored
    try:
        content = unpack_rnc1(packed)
    except (IndexError, ValueError) as error:
        raise UserError(f"{disk}, byte {entry.offset}: damaged ({error})") from error
    return stored[:_HEADER] + content if entry.has_header else content


def _read(disk: str, entry: _Entry) -> Audio:
    content = _content(Path(disk), entry)
    samples = np.frombuffer(content, np.uint8, offset=min(_HEADER, len(content)))
    return samples.astype(np.float32) / 128 - 1, SPEECH_RATE


def unpack_rnc1(packed: bytes) -> bytes:
    """Unpacks RNC1: blocks of three Huffman codes, for runs of literals, distances and lengths.

    Bits come from little-endian words of 16, the low bit first. A word is taken when the first of its
    bits is needed, and literal bytes lie between the words at the place reached.

    Raises:
        ValueError, IndexError: damaged data.
    """
    size, _, blocks = struct.unpack_from(">II5xB", packed, 4)
    out = bytearray()
    position, buffer, count = 18, 0, 0

    def fill(wanted: int) -> None:
        nonlocal position, buffer, count
        while count < wanted:
            buffer |= int.from_bytes(packed[position : position + 2], "little") << count
            position += 2
            count += 16

    def bits(wanted: int) -> int:
        nonlocal buffer, count
        fill(wanted)
        value = buffer & ((1 << wanted) - 1)
        buffer >>= wanted
        count -= wanted
        return value

    def number(table: list[tuple[int, int] | None]) -> int:
        fill(len(table).bit_length() - 1)
        entry = table[buffer & (len(table) - 1)]
        if entry is None:
            raise ValueError("a code that is not in its table")
        length, symbol = entry
        bits(length)
        # Symbols above 1 say how many bits the number has, the highest of which is 1.
        return symbol if symbol < 2 else bits(symbol - 1) | 1 << (symbol - 1)

    def literals(length: int) -> bytes:
        nonlocal position, buffer, count
        while count >= 16:  # words looked ahead at, for a code that could have been longer
            position -= 2
            count -= 16
        buffer &= (1 << count) - 1
        position += length
        return packed[position - length : position]

    bits(2)
    for _ in range(blocks):
        runs, distances, lengths = (_code_table(bits) for _ in range(3))
        for left in range(bits(16), 0, -1):
            run = number(runs)
            if run:
                out += literals(run)
            if left > 1:
                _repeat(out, number(distances) + 1, number(lengths) + 2)
    if len(out) != size:
        raise ValueError(f"{len(out)} bytes in place of {size}")
    return bytes(out)


def _code_table(bits: Callable[[int], int]) -> list[tuple[int, int] | None]:
    """(length, symbol) of the canonical code that begins each pattern of next bits, low bit first."""
    code_lengths = [bits(4) for _ in range(bits(5))]
    longest = max(code_lengths, default=0)
    table: list[tuple[int, int] | None] = [None] * (1 << longest)
    code = 0  # with `longest` bits
    for length in range(1, longest + 1):
        for symbol, its_length in enumerate(code_lengths):
            if its_length == length:
                first = int(f"{code:0{longest}b}"[::-1], 2)
                table[first :: 1 << length] = [(length, symbol)] * (1 << (longest - length))
                code += 1 << (longest - length)
    return table


def _repeat(out: bytearray, distance: int, length: int) -> None:
    """Appends `length` bytes from `distance` before the end, which may run into themselves."""
    if distance > len(out):
        raise ValueError("a distance beyond the beginning")
    pattern = out[len(out) - distance :][:length]
    out += (pattern * (-(-length // distance)))[:length]


def decode_text(section: bytes, number: int, tree: Tree) -> str:
    """A text of a section.

    A section has the places of two tables, then the total length of every 32 texts; the tables are
    each text's length and the Huffman codes. Lengths count pairs of bits, in a byte with 7 bits of them,
    or if its high bit is set, of eights of them.

    Raises:
        IndexError, ValueError, struct.error: damaged data, or another tree than the texts' own.
    """
    lengths_at, codes_at = struct.unpack_from("<HH", section)
    block, index = divmod(number, 32)
    pairs = sum(struct.unpack_from(f"<{block}H", section, 4))
    start = lengths_at + 32 * block
    for length in section[start : start + index]:
        pairs += (length & 0x7F) << 3 if length & 0x80 else length
    bit = 8 * codes_at + 2 * pairs
    text = bytearray()
    while len(text) < _LONGEST_TEXT:
        node = 0
        while tree[node][0]:
            node = tree[node][section[bit >> 3] >> (~bit & 7) & 1]
            bit += 1
        if not tree[node][2]:
            return text.decode("latin-1")
        text.append(tree[node][2])
    raise ValueError(f"text {number} does not end")


def _plain_english(
    interpreter: str | os.PathLike[str], texts: Callable[[Tree], list[str]]
) -> list[str]:
    """The texts by the tree in the interpreter that makes them plain English."""
    try:
        trees = find_trees(Path(interpreter).read_bytes())
    except OSError as error:
        raise UserError(
            f"{interpreter}: cannot be read ({error.strerror}); expected the program scummvm"
        ) from error
    decoded = [found for tree in trees if (found := _decoded(texts, tree))]
    best = max(decoded, key=_englishness, default=[])
    if _englishness(best) < _ENGLISH:
        raise UserError(
            f"{interpreter}: none of {len(trees)} Huffman trees in it makes the texts of Beneath a "
            "Steel Sky plain English; expected the program scummvm"
        )
    return best


def _decoded(texts: Callable[[Tree], list[str]], tree: Tree) -> list[str]:
    """Empty with a tree that runs off the texts' ends, as others than their own do."""
    try:
        return texts(tree)
    except (IndexError, ValueError, struct.error):
        return []


def _englishness(texts: list[str]) -> float:
    """The share of common words, times that of texts with none but the characters of plain text.

    The second tells trees apart that differ in a rare letter, of which the common words have none.
    """
    everything = " ".join(texts).lower()
    words = re.findall("[a-z']+", everything)
    common = len(_COMMON_WORDS.findall(everything)) / max(len(words), 1)
    plain = sum(_PLAIN_TEXT.fullmatch(text) is not None for text in texts) / max(len(texts), 1)
    return common * plain


def find_trees(program: bytes) -> list[Tree]:
    """All arrays of at least 64 three-byte nodes in a program that are a binary tree, in any place.

    A root's left child comes next to it; see `_tree_at` for what makes a tree.
    """
    content = np.frombuffer(program, np.uint8)
    roots = (content[:-2] == 1) & (content[1:-1] > 1) & (content[2:] == 0)
    trees = (_tree_at(program, int(place)) for place in np.flatnonzero(roots))
    return [tree for tree in trees if tree is not None]


def _tree_at(program: bytes, place: int) -> Tree | None:
    """The tree whose root is at a place.

    Every child lies behind its parent and has no other, inner nodes have no character, all nodes up to
    the last one are reached, and some leaf ends texts (character 0).
    """
    nodes: dict[int, tuple[int, int, int]] = {}
    pending = [0]
    while pending:
        index = pending.pop()
        node = program[place + 3 * index : place + 3 * index + 3]
        if index in nodes or len(node) < 3:
            return None
        left, right, character = nodes[index] = (node[0], node[1], node[2])
        if left or right:
            if min(left, right) <= index or left == right or character:
                return None
            pending += [right, left]
    # Node numbers are distinct, so that they are 0 to n - 1 if the largest is n - 1.
    whole = len(nodes) >= _SMALLEST_TREE and max(nodes) == len(nodes) - 1
    if not whole or all(left or character for left, _, character in nodes.values()):
        return None
    return [nodes[index] for index in range(len(nodes))]
