"""The two talking games as speech corpora, on tiny games made here in the form of the real ones."""

import gzip
import shutil
import struct
import tarfile

import numpy as np
import pytest
from recordings import audio_bytes, by_id

from distill_jax.errors import UserError
from experiments.speech.corpus import amazon_queen, debian, steel_sky

PCM = np.arange(200, dtype=np.uint8)
TEXTS = ["the " * 50] + [f"What have you to do with the {name}? ExIt." for name in "abcdefgh"] * 5
ALPHABET = "\0 abcdefghijklmnopqrstuvwxyzABCDEFGWHIT?!.,]"


def rnc1(*blocks):
    """Packs blocks of (literals, distance, length), for numbers up to 7 by the codes below."""
    out, free = bytearray(), []  # places of bits not yet used: (byte, bit)

    def put(bits):
        for bit in bits:
            if not free:  # a word begins where its first bit is written
                free.extend((len(out) + i // 8, i % 8) for i in range(16))
                out.extend(b"\0\0")
            byte, place = free.pop(0)
            out[byte] |= int(bit) << place

    def put_value(value, width):
        put(f"{value:0{width}b}"[::-1])

    def put_number(value, codes):
        symbol = value if value < 2 else value.bit_length()
        put(codes[symbol])
        put_value(value & ~(1 << (symbol - 1)), symbol - 1) if symbol > 1 else None

    put_value(0, 2)
    runs, others = {0: "110", 1: "0", 2: "10", 3: "111"}, {0: "00", 1: "01", 2: "10", 3: "11"}
    for block in blocks:
        for code_lengths in ([3, 1, 2, 3], [2, 2, 2, 2], [2, 2, 2, 2]):
            put_value(len(code_lengths), 5)
            for length in code_lengths:
                put_value(length, 4)
        put_value(len(block), 16)
        for left, (literals, distance, length) in zip(range(len(block), 0, -1), block, strict=True):
            put_number(len(literals), runs)
            out.extend(literals)
            if left > 1:
                put_number(distance - 1, others)
                put_number(length - 2, others)
    size = 0
    for block in blocks:
        size += sum(len(literals) for literals, *_ in block) + sum(x[2] for x in block[:-1])
    return struct.pack(">4sIIHHBB", b"RNC\x01", size, len(out), 0, 0, 0, len(blocks)) + bytes(out)


class TestRnc1:
    def test_literals_and_copies(self):
        first = [(b"abc", 3, 9), (b"", 1, 2), (b"defghij", 8, 3), (b"xy", 0, 0)]
        packed = rnc1(first, [(b"0123456", 2, 5), (b"", 0, 0)])
        expected = b"abcabcabcabc" + b"cc" + b"defghij" + b"cde" + b"xy" + b"0123456" + b"56565"
        assert steel_sky.unpack_rnc1(packed) == expected

    def test_literals_longer_than_the_words_between(self):
        blocks = [[(bytes([i] * 7), 1, 2)] * 20 + [(b"", 0, 0)] for i in range(3)]
        assert steel_sky.unpack_rnc1(rnc1(*blocks)) == b"".join(bytes([i] * 180) for i in range(3))

    def test_random_blocks(self):
        random = np.random.default_rng(0)
        for _ in range(100):
            block, expected = [(b"ab", 1, 2)], b"abbb"
            for literals, distance, length in random.integers(
                (0, 1, 2), (8, 5, 10), (20, 3)
            ).tolist():
                block.append((random.bytes(literals), distance, length))
                expected += block[-1][0]
                for _ in range(length):
                    expected += expected[-distance:][:1]
            assert steel_sky.unpack_rnc1(rnc1([*block, (b"", 0, 0)])) == expected

    @pytest.mark.parametrize("keep", [18, 30, 40])
    def test_cut_off(self, keep):
        packed = rnc1([(b"abcdefg", 1, 2)] * 9)
        with pytest.raises((ValueError, IndexError)):
            steel_sky.unpack_rnc1(packed[:keep])


def tree_of(characters):
    """A tree as an array, all leaves as deep as can be, and its codes; a node's left child is next."""
    nodes, codes = [], {}

    def add(part, code):
        place = len(nodes)
        nodes.append((0, 0, ord(part[0])) if len(part) == 1 else None)
        if len(part) == 1:
            codes[part[0]] = code
        else:
            half = len(part) // 2
            nodes[place] = (add(part[:half], code + "0"), add(part[half:], code + "1"), 0)
        return place

    add(characters, "")
    return nodes, codes


def text_section(texts, codes):
    lengths, stream, totals = bytearray(), "", [0]
    for number, text in enumerate(texts):
        code = "".join(codes[character] for character in text + "\0")
        pairs = -(-len(code) // 2)
        if pairs > 127:
            pairs = -(-pairs // 8) * 8
        lengths.append(pairs if pairs < 128 else 0x80 | pairs // 8)
        stream += code.ljust(2 * pairs, "1")
        totals[-1] += pairs
        if number % 32 == 31:
            totals.append(0)
    stream = stream.ljust(-(-len(stream) // 8) * 8, "0")
    data = int(stream or "0", 2).to_bytes(len(stream) // 8, "big")
    start = 4 + 2 * len(totals)
    head = struct.pack(f"<{2 + len(totals)}H", start, start + len(lengths), *totals)
    return head + bytes(lengths) + data


def make_sky(folder, texts=TEXTS):
    """The files of the game and an interpreter with trees, the right one neither first nor last."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes, codes = tree_of(ALPHABET)
    swapped = ALPHABET.translate(str.maketrans("x]", "]x"))
    trees = [tree_of(order)[0] for order in (ALPHABET[::-1], swapped, ALPHABET, ALPHABET[::2])]
    arrays = [bytes(value for node in tree for value in node) for tree in trees]
    (folder / "scummvm").write_bytes(b"\x01\x02\0\0\0\0\x01\x14\0".join([b"\x7fELF", *arrays, b""]))
    entries = {60600: (text_section(texts, codes), 2)}
    entries |= {60600 + section: (text_section([], codes), 2) for section in range(1, 8)}
    for number in range(len(texts)):
        header = struct.pack("<H20x", 0)
        entries[50000 + number] = (header + bytes(PCM), 2 if number % 2 else 0)
    packed = rnc1([(bytes(PCM[:7]), 1, 2), (b"", 0, 0)])
    entries[50000] = (struct.pack("<H20x", 0x80) + packed, 0)
    entries[50000 + 5230] = (b"introduction", 2)
    table, disk = b"", b""
    for number, (content, flags) in entries.items():
        disk += bytes(-len(disk) % 16)
        by_sixteen = number == 50001
        place = len(disk) // 16 | 1 << 23 if by_sixteen else len(disk)
        size = len(content) | flags << 22
        table += (
            struct.pack("<H", number) + place.to_bytes(3, "little") + size.to_bytes(3, "little")
        )
        disk += content
    (folder / "sky.dnr").write_bytes(struct.pack("<I", len(entries)) + table)
    (folder / "sky.dsk").write_bytes(disk)
    return nodes


class TestSteelSky:
    def test_trees_are_found_by_their_form(self, tmp_path):
        nodes = make_sky(tmp_path)
        program = (tmp_path / "scummvm").read_bytes()
        trees = steel_sky.find_trees(program)
        assert len(trees) == 3  # the last one is too small
        assert trees[2] == nodes
        place = program.index(bytes(value for node in nodes for value in node))
        assert len(steel_sky.find_trees(program[: place + 3 * len(nodes) - 1])) == 2
        damaged = bytearray(program)
        damaged[place + 3] = 0  # the second node's left child
        assert len(steel_sky.find_trees(bytes(damaged))) == 2

    def test_texts_and_speech(self, tmp_path):
        make_sky(tmp_path)
        found = by_id(steel_sky.recordings(tmp_path, tmp_path / "scummvm"))
        assert [recording.text for recording in found.values()] == TEXTS
        last = found["sky_00040"]
        assert (last.speaker, last.scene, last.split) == ("sky_0", "sky_2", "")
        packed, rate = found["sky_00000"].read()
        assert (rate, packed.dtype) == (11025, np.float32)
        np.testing.assert_array_equal(packed * 128 + 128, [0, 1, 2, 3, 4, 5, 6, 6, 6])
        for recording in list(found.values())[1:4]:
            np.testing.assert_array_equal(recording.read()[0] * 128 + 128, PCM)

    def test_mistakes(self, tmp_path):
        with pytest.raises(UserError, match=r"sky\.dnr: cannot be read"):
            steel_sky.recordings(tmp_path, tmp_path / "scummvm")
        make_sky(tmp_path)
        with pytest.raises(UserError, match="none of 0 Huffman trees"):
            steel_sky.recordings(tmp_path, tmp_path / "sky.dsk")
        recording = steel_sky.recordings(tmp_path, tmp_path / "scummvm")[0]
        disk = bytearray((tmp_path / "sky.dsk").read_bytes())
        disk[disk.index(b"RNC\x01") + 7] += 1
        (tmp_path / "sky.dsk").write_bytes(disk)
        with pytest.raises(
            UserError, match=r"sky\.dsk, byte \d+: damaged \(9 bytes in place of 10"
        ):
            recording.read()
        (tmp_path / "sky.dsk").write_bytes(disk[:100])
        with pytest.raises(UserError, match=r"sky\.dsk: ends before byte"):
            recording.read()


def queen_text(text, content, alignment):
    """Appends a text to an archive's file, padded as the game pads it."""
    content += bytes([len(text)]) + text.encode()
    content += bytes(-len(content) % alignment) if text else b""


def make_dialogue(key, hero, answers, last):
    content = bytearray(32 + 96)  # one level
    struct.pack_into(">5h", content, 0, -1, 0, key, len(hero), len(answers))
    for number, text in hero.items():
        content += struct.pack(">2xH", number)
        queen_text(text, content, 4)
    struct.pack_into(">H", content, 22, len(content))
    for number, text in answers.items():
        content += struct.pack(">2xH", number)
        queen_text(text, content, 4)
    struct.pack_into(">H", content, 26, len(content))
    for text in last:
        queen_text(text, content, 2)
    return bytes(20) + content


def make_cut_scene(texts):
    content = bytearray(struct.pack(">2xh4xH", -len(texts), 10))
    for text in ("", *texts):
        queen_text(text, content, 2)
    return bytes(20) + content


def make_queen(folder):
    """The game's archive; every part of speech has a level of its own, 0.1, 0.2, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "BOB2.DOG": make_dialogue(3, {0: "Hello", 26: "Wait*AB and see"}, {26: "No?"}, ("Bye", "")),
        "C5C.CUT": make_cut_scene(["One", "*", "#shown", "*XY0123456789 Two", "Silent"]),
        "QUEEN.JAS": bytes(20) + struct.pack(">4H", 1, 2, 0, 3),
        "QUEEN2.JAS": "\r\n".join(f"line {i}" for i in range(18 + 40)).encode(),
    }
    speech = ["0300SSSS", "030000J1", "03001AJ1", "03001AJ2", "03001AP1", "03XXXXP1", "C5C__011"]
    speech += ["C5C__042", "JOE00011", "JOE00171", "JOE00411", "MUSIC"]
    for number, name in enumerate(speech, start=1):
        level = np.full(200, number / 20, "f4")
        files[f"{name}.SB"] = audio_bytes(level, 11025 if name != "JOE00411" else 8000)
    table, content, start = b"", b"", 15 + 21 * len(files)
    for name, stored in files.items():
        table += struct.pack(">12sBII", name.encode(), 1, start + len(content), len(stored))
        content += stored
    header = b"QTBL".ljust(13, b"\0") + struct.pack(">H", len(files))
    (folder / "queen.1c").write_bytes(header + table + content)
    return speech


class TestAmazonQueen:
    def test_texts_and_speech(self, tmp_path):
        speech = make_queen(tmp_path)
        found = by_id(amazon_queen.recordings(tmp_path))
        bob, cut = "queen_BOB2.DOG", "queen_C5C.CUT"
        expected = {
            "030000J1": ("queen_JOE", bob, "Hello"),
            "03001AJ1": ("queen_JOE", bob, "Wait"),
            "03001AJ2": ("queen_JOE", bob, "and see"),
            "03001AP1": ("queen_BOB", bob, "No?"),
            "03XXXXP1": ("queen_BOB", bob, "Bye"),
            "C5C__011": ("queen_cut_C5C", cut, "One"),
            "C5C__042": ("queen_cut_C5C", cut, "Two"),
            "JOE00011": ("queen_JOE", "queen_JAS0", "line 18"),
            "JOE00171": ("queen_JOE", "queen_JAS1", "line 34"),
            "JOE00411": ("queen_JOE", "queen_JAS2", "line 0"),
        }
        assert {name: (r.speaker, r.scene, r.text) for name, r in found.items()} == {
            f"queen_{name}": values for name, values in expected.items()
        }
        for name in expected:
            samples, rate = found[f"queen_{name}"].read()
            assert rate == (8000 if name == "JOE00411" else 11840)
            np.testing.assert_allclose(samples, (speech.index(name) + 1) / 20, atol=1e-4)

    def test_mistakes(self, tmp_path):
        with pytest.raises(UserError, match=r"queen\.1c: cannot be read"):
            amazon_queen.recordings(tmp_path)
        make_queen(tmp_path)
        recording = amazon_queen.recordings(tmp_path)[0]
        path = tmp_path / "queen.1c"
        content = path.read_bytes()
        path.write_bytes(content.replace(b"fLaC", b"none"))
        with pytest.raises(UserError, match=r"queen\.1c, 030000J1\.SB: not readable as audio"):
            recording.read()
        path.write_bytes(content[:900])
        with pytest.raises(UserError, match=r"queen\.1c, 030000J1\.SB: damaged"):
            recording.read()
        for damaged, message in (
            (content[:400], "damaged"),
            (b"RIFF" + content[4:], "begins with QTBL"),
            (content.replace(b".SB", b".XX"), "no speech"),
        ):
            path.write_bytes(damaged)
            with pytest.raises(UserError, match=rf"queen\.1c: .*{message}"):
                amazon_queen.recordings(tmp_path)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A Debian archive of tar files, and programs that fetch and unpack them; only those are found."""
    for name in debian.PACKAGES:
        root = tmp_path / "build" / name
        documents = root / "usr/share/doc" / name
        documents.mkdir(parents=True)
        (documents / "copyright").write_text(f"notice of {name}")
        if name != "scummvm":
            (documents / "readme.txt.gz").write_bytes(gzip.compress(name.encode()))
        if name == "flight-of-the-amazon-queen":
            make_queen(root / "usr/share/scummvm" / name)
        elif name == "beneath-a-steel-sky":
            make_sky(root / "usr/share/scummvm" / name)
            game = root / "usr/share/scummvm" / name
        else:
            (root / "usr/games").mkdir(parents=True)
            (game / "scummvm").rename(root / "usr/games/scummvm")
        with tarfile.open(tmp_path / f"{name}_1_all.deb", "w") as package:
            package.add(root, ".")
    programs = {
        "apt-get": f'[ "$1" = download ] && cp {tmp_path}/"$2"_1_all.deb .',
        "dpkg-deb": '[ "$1" = -x ] && mkdir -p "$3" && tar -xf "$2" -C "$3"',
    }
    (tmp_path / "bin").mkdir()
    for tool in ("cp", "mkdir", "tar"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    for name, script in programs.items():
        set_program(tmp_path, name, script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def set_program(folder, name, script):
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bin" / name).chmod(0o755)


class TestDebian:
    def test_both_games_are_fetched_once(self, archive):
        cache = archive / "some" / "cache"
        found = debian.recordings(cache)
        assert len(by_id(found)) == len(TEXTS) + 10
        assert all(len(recording.read()[0]) for recording in found)
        for name in debian.PACKAGES:
            assert (cache / "licences" / name / "copyright").read_text() == f"notice of {name}"
        readme = cache / "licences" / "beneath-a-steel-sky" / "readme.txt"
        assert readme.read_text() == "beneath-a-steel-sky"
        for program in ("apt-get", "dpkg-deb"):
            set_program(archive, program, "exit 1")
        assert [r.id for r in debian.recordings(cache)] == [r.id for r in found]
        assert sorted(path.name for path in cache.iterdir()) == sorted(
            [*debian.PACKAGES, *(f"{name}_1_all.deb" for name in debian.PACKAGES), "licences"]
        )

    def test_packages_placed_into_the_cache(self, archive):
        cache = archive / "cache"
        cache.mkdir()
        (archive / "bin" / "apt-get").unlink()
        for package in archive.glob("*.deb"):
            shutil.copy(package, cache)
        assert len(debian.recordings(cache)) == len(TEXTS) + 10

    def test_a_package_that_cannot_be_fetched(self, archive):
        cache = archive / "cache"
        place = rf"place beneath-a-steel-sky_\*\.deb .*0\.0372-8.* in {cache}"
        # A broken download may leave a part of the file.
        set_program(archive, "apt-get", "echo x > $2_1_all.deb; echo 'E: no route' >&2; exit 100")
        with pytest.raises(UserError, match=rf"package beneath-a.*\(E: no route\).*{place}"):
            debian.recordings(cache)
        assert not list(cache.iterdir())
        (archive / "bin" / "apt-get").unlink()
        with pytest.raises(UserError, match=f"apt-get is not installed.*{place}"):
            debian.recordings(cache)

    def test_another_version_beside_an_unpacked_one(self, archive):
        debian.recordings(archive / "cache")
        shutil.copy(archive / "scummvm_1_all.deb", archive / "cache" / "scummvm_2_all.deb")
        message = (
            r"cache/scummvm is of scummvm_1_all\.deb, but .*cache has scummvm_2_all\.deb: delete"
        )
        with pytest.raises(UserError, match=message):
            debian.recordings(archive / "cache")
        (archive / "cache" / "scummvm_2_all.deb").unlink()
        assert debian.recordings(archive / "cache")

    def test_a_damaged_package(self, archive):
        cache = archive / "cache"
        cache.mkdir()
        package = cache / "scummvm_1_all.deb"
        package.write_bytes(b"damaged" * 1000)
        with pytest.raises(
            UserError, match=f"package scummvm: dpkg-deb failed .*{package} is damaged"
        ):
            debian.recordings(cache)
        assert not (cache / "scummvm").exists()
        package.unlink()
        assert len(debian.recordings(cache)) == len(TEXTS) + 10
        (archive / "bin" / "dpkg-deb").unlink()
        shutil.rmtree(cache / "scummvm")
        with pytest.raises(UserError, match="package scummvm: dpkg-deb is not installed"):
            debian.recordings(cache)
