"""From fonts to a set of glyphs: drawing, near copies, groups, splits, and a killed preparation."""

import json
import os
import shutil
import signal
import string
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from command import ROOT, fails
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont, newTable
from fontTools.ttLib.tables.ttProgram import Program
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.errors import UserError
from experiments.specialists import glyphs
from experiments.specialists.corpus import grouping, packages, pipeline, rendering, typefaces
from experiments.specialists.corpus.typefaces import Source

FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
LETTERS = string.ascii_letters
SOURCE = Source("fonts-x", "1.0-1", "free", FONTS / "LICENSE_DEJAVU")


def square(left, bottom, size):
    pen = TTGlyphPen(None)
    pen.moveTo((left, bottom))
    for point in ((left, bottom + size), (left + size, bottom + size), (left + size, bottom)):
        pen.lineTo(point)
    pen.closePath()
    return pen.glyph()


def make_font(path, outlines, missing):
    """A font of 1000 units to the em, with a character for each outline."""
    builder = FontBuilder(1000)
    names = {character: f"glyph{ord(character)}" for character in outlines}
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap({ord(character): name for character, name in names.items()})
    outline_of = {names[character]: outline for character, outline in outlines.items()}
    builder.setupGlyf({".notdef": missing, **outline_of})
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names.values()], (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800, usWinAscent=800, usWinDescent=200)
    builder.setupPost()
    builder.save(path)
    return path


def test_ink_is_fitted(tmp_path):
    """Three large squares and a small low one: 800 units span 28 pixels, and what is low stays so."""
    large, small = square(100, -100, 800), square(100, -100, 200)
    outlines = {"a": large, "b": square(100, -100, 800), "c": square(100, -100, 800), "d": small}
    path = make_font(tmp_path / "squares.ttf", outlines, square(0, 0, 10))
    images, drawn = rendering.render(path, 0, "abcd")
    assert images.dtype == np.uint8 and images.shape == (4, 32, 32) and drawn.all()
    expected = np.zeros((32, 32))
    expected[2:30, 2:30] = 255
    # An edge of the outline may lie within a pixel.
    inner, outer = expected[3:29, 3:29], [0, 1, 30, 31]
    np.testing.assert_array_equal(images[0, 3:29, 3:29], inner)
    assert not images[0][outer].any() and not images[0][:, outer].any()
    assert abs(images[0].sum() / 255 - 28**2) < 28
    rows, columns = np.nonzero(images[3])
    assert abs(images[3].sum() / 255 - 7**2) < 7
    assert rows.min() >= 22 and columns.max() <= 9  # the lower left corner
    assert not (images % 17).any()


def test_glyphs_that_are_none_are_left_out(tmp_path):
    """Blank, shown as the mark for missing ones, and absent."""
    blank, mark = TTGlyphPen(None).glyph(), square(50, 50, 300)
    outlines = {"a": square(100, 0, 500), "b": blank, "c": square(0, 0, 100)}
    path = make_font(tmp_path / "holes.ttf", outlines, mark)
    font = TTFont(path)
    for table in font["cmap"].tables:
        table.cmap[ord("c")] = ".notdef"
    font.save(path)
    images, drawn = rendering.render(path, 0, "abcda")
    assert drawn.tolist() == [True, False, False, False, True]
    assert not images[~drawn].any()
    np.testing.assert_array_equal(images[0], images[4])


def test_fonts_that_draw_nothing(tmp_path):
    """One is blank, and one has a program that fails."""
    blank = make_font(tmp_path / "blank.ttf", {"a": TTGlyphPen(None).glyph()}, square(0, 0, 10))
    faulty = make_font(tmp_path / "faulty.ttf", {"a": square(0, 0, 500)}, square(0, 0, 10))
    assert rendering.render(faulty, 0, "a")[1].all()
    font = TTFont(faulty)
    font["fpgm"] = newTable("fpgm")
    font["fpgm"].program = Program()
    font["fpgm"].program.fromBytecode(b"\x28")  # no instruction of TrueType
    font.save(faulty)
    for path in (blank, faulty):
        images, drawn = rendering.render(path, 0, "a")
        assert not drawn.any() and not images.any()


def test_find(tmp_path):
    """Collections face by face; links, other files, and faces with too few characters passed over."""
    folder = tmp_path / "usr/fonts"
    folder.mkdir(parents=True)
    shutil.copy(FONTS / "DejaVuSans.ttf", folder / "z.TTF")
    collection = TTCollection()
    collection.fonts = [TTFont(FONTS / "DejaVuSerif.ttf"), TTFont(FONTS / "cmr10.ttf")]
    collection.save(folder / "both.ttc")
    make_font(folder / "few.otf", {c: square(0, 0, 100) for c in LETTERS[:46]}, square(0, 0, 10))
    make_font(folder / "some.otf", {c: square(0, 0, 100) for c in LETTERS[:47]}, square(0, 0, 10))
    (folder / "link.ttf").symlink_to(folder / "z.TTF")
    (folder / "readme.txt").write_text("no font")
    found = typefaces.find(tmp_path, LETTERS, SOURCE)
    assert [(face.name, face.number, face.present) for face in found] == [
        ("fonts-x/both.ttc#0", 0, 52),
        ("fonts-x/both.ttc#1", 1, 52),
        ("fonts-x/some.otf", 0, 47),
        ("fonts-x/z.TTF", 0, 52),
    ]
    assert {face.source for face in found} == {SOURCE}
    images = [rendering.render(face.path, face.number, "g")[0] for face in found]
    assert len({image.tobytes() for image in images}) == 4


def test_fonts_of_one_name_in_two_folders_are_two_typefaces(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / name / "x.ttf")
    shutil.copy(FONTS / "DejaVuSans.ttf", tmp_path / "a_x.ttf")
    names = [face.name for face in typefaces.find(tmp_path, LETTERS, SOURCE)]
    assert sorted(names) == ["fonts-x/a/x.ttf", "fonts-x/a_x.ttf", "fonts-x/b/x.ttf"]


@pytest.mark.parametrize("size", [0, 13, 1000, 20_000, 400_000])
def test_a_cut_font(tmp_path, size):
    path = tmp_path / "x.ttf"
    path.write_bytes((FONTS / "DejaVuSans.ttf").read_bytes()[:size])
    with pytest.raises(UserError, match=f"{path} can't be read as a font: ."):
        typefaces.find(tmp_path, LETTERS, SOURCE)


def random_glyphs(faces, characters, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (faces, characters, 8, 8)).astype(np.uint8)


def test_distances():
    images = random_glyphs(4, 5)
    images[1] = images[0] // 2  # the same in other grey levels
    drawn = np.ones((4, 5), bool)
    apart = grouping.distances(images, drawn)
    assert apart.dtype == np.float32
    np.testing.assert_array_equal(apart, apart.T)
    assert not apart.diagonal().any()
    assert apart[0, 1] < 0.001 and apart[0, 2] > 0.5
    by_hand = [np.corrcoef(*pair)[0, 1] for pair in zip(*blurred(images[[0, 2]]), strict=True)]
    np.testing.assert_allclose(apart[0, 2], 1 - np.mean(by_hand), atol=1e-5)


def blurred(images):
    """Every image blurred by a Gauss function of 0.8 pixels, mirrored at the edges."""
    offsets = np.arange(-3, 4)
    weights = np.exp(-0.5 * (offsets / 0.8) ** 2)
    weights /= weights.sum()
    for axis in (2, 3):
        width = [(0, 0)] * 4
        width[axis] = (3, 3)
        padded = np.pad(images.astype(float), width, mode="symmetric")
        images = sum(
            weight * np.take(padded, range(shift, shift + 8), axis)
            for shift, weight in enumerate(weights)
        )
    return images.reshape(*images.shape[:2], -1)


def test_faces_are_compared_on_what_both_have():
    images = random_glyphs(3, 6)
    drawn = np.ones((3, 6), bool)
    images[1, 2:] = images[0, 2:]
    drawn[1, :2] = False  # where the first two differ
    drawn[2, 2:] = False
    images[~drawn] = 0
    apart = grouping.distances(images, drawn)
    assert apart[0, 1] < 1e-5
    assert apart[1, 2] == 1  # nothing in common


@pytest.mark.parametrize(
    "threshold, expected",
    [(0.03, [0, 1, 2, 3]), (0.05, [0, 1, 0, 2]), (0.09, [0, 1, 0, 2]), (0.11, [0, 1, 0, 0])],
)
def test_groups_by_hand(threshold, expected):
    """On a line: the pair at 0.04 lies 0.12 and 0.08, so on average 0.10, from the next."""
    places = np.array([0.0, 1.0, 0.04, 0.12])
    apart = np.abs(places[:, None] - places)
    assert grouping.groups(apart, threshold).tolist() == expected


def test_one_face_is_one_group():
    assert grouping.groups(np.zeros((1, 1)), 0.05).tolist() == [0]


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_smaller_groups_lie_within_larger(faces, seed):
    places = np.random.default_rng(seed).uniform(size=(faces, 2))
    apart = np.linalg.norm(places[:, None] - places, axis=-1)
    fine, coarse = grouping.groups(apart, 0.2), grouping.groups(apart, 0.5)
    assert len({*zip(fine.tolist(), coarse.tolist(), strict=True)}) == len(set(fine.tolist()))
    first = [fine.tolist().index(number) for number in range(max(fine) + 1)]
    assert first == sorted(first)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 7), max_size=25))
def test_groups_are_held_out_whole(group):
    group = group + list(range(8, 20))  # of one face each, so that no split stays empty
    names = [f"face {number}" for number in range(len(group))]
    split = grouping.hold_out(group, names, {"test": 0.2, "validation": 0.1}, "train")
    place = dict(zip(group, split, strict=True))
    assert [place[number] for number in group] == split
    assert 0 < split.count("test") <= round(0.2 * len(group))
    assert 0 < split.count("validation") <= round(0.1 * len(group))


def test_held_out_groups_do_not_depend_on_numbers_or_later_faces():
    names = [f"face {number}" for number in range(20)]
    group = [number // 2 for number in range(20)]
    parts = {"test": 0.2, "validation": 0.1}
    split = grouping.hold_out(group, names, parts, "train")
    assert grouping.hold_out([9 - number for number in group], names, parts, "train") == split
    assert split.count("test") == 4 and split.count("validation") == 2
    for names_of_seconds in (names[1::2], [name + "x" for name in names[1::2]]):
        names[1::2] = names_of_seconds
        assert grouping.hold_out(group, names, parts, "train") == split


def test_too_few_groups_to_hold_out():
    with pytest.raises(UserError, match="too few kinds of typefaces: 2, and none for"):
        grouping.hold_out([0, 0, 1], ["a", "b", "c"], {"test": 0.2, "validation": 0.1}, "train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """25 faces, of which one draws the same mark for all, two near copies and a blank one."""
    folder = tmp_path_factory.mktemp("fonts")
    for path in FONTS.glob("*.ttf"):
        shutil.copy(path, folder)
    fewer = TTFont(FONTS / "DejaVuSerif.ttf")
    for table in fewer["cmap"].tables:
        table.cmap.pop(ord("Q"), None)
    fewer.save(folder / "ASerif.ttf")  # comes first, but has a letter less
    shutil.copy(FONTS / "DejaVuSans.ttf", folder / "ZSans.ttf")
    blank = {letter: TTGlyphPen(None).glyph() for letter in LETTERS}
    make_font(folder / "blank.ttf", blank, square(0, 0, 10))
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """The output folder of a preparation in two processes, and what it read back as."""
    out = tmp_path_factory.mktemp("undisturbed")
    pipeline.prepare(typefaces.find(folder, LETTERS, SOURCE), LETTERS, out, 2)
    return out, glyphs.load(out)


def test_what_became_of_the_typefaces(undisturbed):
    out, prepared = undisturbed
    report = json.loads((out / "report.json").read_text())
    assert report["typefaces found"] == 28
    # The blank one, and that for mathematical symbols, whose brackets are few.
    assert report["that don't draw the characters"] == 2
    assert report["near copies of another"] == 2
    assert report["left out"] == [
        "fonts-x/ASerif.ttf",
        "fonts-x/ZSans.ttf",
        "fonts-x/blank.ttf",
        "fonts-x/cmex10.ttf",
    ]
    assert report["typefaces kept"] == len(prepared.typefaces) == 24
    assert report["groups of similar ones"] == len({f["group"] for f in prepared.typefaces})
    for name, part in prepared.splits.items():
        assert report[f"examples of {name}"] == len(part["id"]) > 0
    total = sum(len(part["id"]) for part in prepared.splits.values())
    assert total + report["blank glyphs left out"] == 24 * 52
    assert sum(map(len, report["blank"].values())) == report["blank glyphs left out"]
    assert (out / "licences/fonts-x/copyright").read_text() == SOURCE.notice.read_text()
    assert not (out / "work").exists()


def test_the_set_is_what_the_fonts_draw(undisturbed, folder):
    _, prepared = undisturbed
    assert prepared.characters == tuple(LETTERS)
    for part in prepared.splits.values():
        for number in np.unique(part["typeface"]):
            path = folder / prepared.typefaces[number]["name"].removeprefix("fonts-x/")
            images, drawn = rendering.render(path, 0, LETTERS)
            mine = part["typeface"] == number
            labels = part["label"][mine]
            assert drawn[labels].all()
            np.testing.assert_array_equal(part["inputs"][mine], images[labels])


def test_similar_typefaces_are_in_one_split(undisturbed):
    _, prepared = undisturbed
    of = {face["name"].removeprefix("fonts-x/"): face for face in prepared.typefaces}
    for one, other in [("DejaVuSansMono-Bold", "DejaVuSansMono"), ("STIXGeneral", "cmr10")]:
        assert of[f"{one}.ttf"]["group"] == of[f"{other}.ttf"]["group"]
    assert of["DejaVuSans.ttf"]["group"] != of["DejaVuSansMono.ttf"]["group"]
    splits = {}
    for face in prepared.typefaces:
        assert splits.setdefault(face["group"], face["split"]) == face["split"]
    assert set(splits.values()) == {"train", "validation", "test"}


def test_a_tenth_of_training_examples_is_unseen(undisturbed):
    _, prepared = undisturbed
    train, seen = prepared.splits["train"], prepared.splits["seen"]
    assert 0.07 < len(seen["id"]) / (len(seen["id"]) + len(train["id"])) < 0.13
    assert set(seen["typeface"]) <= set(train["typeface"])
    assert not set(seen["id"]) & set(train["id"])


DYING = """
import os, signal
from pathlib import Path
from experiments.common import workers
from experiments.specialists.corpus import pipeline, typefaces

left = {left}
replace = os.replace

def dying(source, target):
    global left
    if str(target).endswith({suffix!r}):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    replace(source, target)

def in_this_process(function, tasks, *_):
    for task in tasks:
        function(task)

os.replace, workers.run_all = dying, in_this_process
source = typefaces.Source("fonts-x", "1.0-1", "free", Path({notice!r}))
faces = typefaces.find(Path({folder!r}), {letters!r}, source)
pipeline.prepare(faces, {letters!r}, Path({out!r}))
"""


def kill(folder, out, left, suffix):
    """Runs a preparation that is killed with -9 just before it puts a further file in place."""
    code = DYING.format(
        left=left,
        suffix=suffix,
        notice=str(SOURCE.notice),
        folder=str(folder),
        letters=LETTERS,
        out=str(out),
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr


def test_a_killed_run_goes_on(folder, undisturbed, tmp_path, capsys):
    kill(folder, tmp_path, 3, ".npz")
    assert len([*tmp_path.glob("work/samples/*.npz")]) == 3
    kill(folder, tmp_path, 25 + 4, ".npz")  # the other 25 samples, then four faces
    assert len([*tmp_path.glob("work/samples/*.npz")]) == 28
    assert len([*tmp_path.glob("work/glyphs/*.npz")]) == 4
    with pytest.raises(UserError, match="its preparation did not end: run the same command again"):
        glyphs.load(tmp_path)
    kill(folder, tmp_path, 0, "report.json")
    (tmp_path / "glyphs/incomplete.AB12_1.0.0").mkdir(parents=True)  # as a killed write leaves
    # All is drawn: the fonts are not opened again.
    faces = [
        face._replace(path=tmp_path / "gone") for face in typefaces.find(folder, LETTERS, SOURCE)
    ]
    capsys.readouterr()
    pipeline.prepare(faces, LETTERS, tmp_path)
    printed = capsys.readouterr().out
    assert "28 of 28 typefaces were drawn before\n24 of 24 typefaces were drawn before" in printed
    assert glyphs.load(tmp_path).fingerprint == undisturbed[1].fingerprint
    assert [path.name for path in (tmp_path / "glyphs").iterdir()] == ["1.0.0"]
    report = (tmp_path / "report.json").read_text()
    assert report == (undisturbed[0] / "report.json").read_text()


def test_a_folder_of_another_set(folder, undisturbed, tmp_path):
    faces = typefaces.find(folder, LETTERS, SOURCE)
    with pytest.raises(UserError, match=r"1\.0\.0 is a prepared set already: name another --out"):
        pipeline.prepare(faces, LETTERS, undisturbed[0])
    kill(folder, tmp_path, 1, ".npz")
    for others, letters in [(faces[1:], LETTERS), (faces, LETTERS[1:])]:
        with pytest.raises(
            UserError,
            match=r"another set half prepared: .* there and .*Name another --out",
        ):
            pipeline.prepare(others, letters, tmp_path)


def test_no_typeface(folder, tmp_path):
    blank = [f for f in typefaces.find(folder, LETTERS, SOURCE) if "blank" in f.name]
    for faces in ([], blank):
        out = tmp_path / str(len(faces))
        with pytest.raises(UserError, match=f"none of {len(faces)} typefaces draws the characters"):
            pipeline.prepare(faces, LETTERS, out)


def test_the_command_refuses(tmp_path):
    module = "experiments.specialists.prepare"
    assert fails(f"--out={tmp_path}", "x", module=module).startswith("error: unexpected argument")
    message = fails(f"--out={tmp_path}", "--characters=3000", module=module)
    assert message == "error: --characters=3000: expected 2 to 2965"
    damaged = tmp_path / "fonts-aoyagi-kouzan-t_1_all.deb"
    damaged.write_bytes(b"damaged")
    message = fails(f"--out={tmp_path}/out", f"--packages={tmp_path}", module=module)
    assert f"if {damaged} is damaged, delete it and run this again" in message
    assert os.listdir(tmp_path) == [damaged.name]


def test_faces_of_packages(tmp_path, monkeypatch):
    """With the version that is in the cache, not the one that was tried."""
    tried = packages.Package("1.0-1", "OFL-1.1")
    monkeypatch.setattr(packages, "PACKAGES", {"fonts-a": tried, "fonts-b": tried})
    for name, font in {"fonts-a": "DejaVuSans.ttf", "fonts-b": "cmr10.ttf"}.items():
        (tmp_path / f"{name}_1%3a2.0-1_all.deb").write_bytes(b"unpacked already")
        documents = tmp_path / name / "usr/share/doc" / name
        documents.mkdir(parents=True)
        (documents / "copyright").write_text(f"notice of {name}")
        shutil.copy(FONTS / font, tmp_path / name)
    found = packages.faces(tmp_path, LETTERS)
    assert [face.name for face in found] == ["fonts-a/DejaVuSans.ttf", "fonts-b/cmr10.ttf"]
    for face in found:
        assert (face.source.version, face.source.licence) == ("1:2.0-1", "OFL-1.1")
        assert face.source.notice.read_text() == f"notice of {face.source.package}"
