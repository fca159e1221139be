"""The packages of Debian's main archive whose typefaces the study's characters are drawn with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.common import debian
from experiments.specialists.corpus import typefaces
from experiments.specialists.corpus.typefaces import Source, Typeface


class Package(NamedTuple):
    """A package of typefaces: the version that this was tried with, and the typefaces' licence."""

    tried: str
    licence: str


# Without fonts-misaki: in its 8 x 8 dots many characters look the same.
PACKAGES = {
    "fonts-aoyagi-kouzan-t": Package("20160404-6", "public domain"),
    "fonts-aoyagi-soseki": Package("20070207-17", "public domain"),
    "fonts-arphic-bkai00mp": Package("2.10-21", "Arphic Public License"),
    "fonts-arphic-bsmi00lp": Package("2.10-18", "Arphic Public License"),
    "fonts-arphic-gbsn00lp": Package("2.11-16", "Arphic Public License"),
    "fonts-arphic-gkai00mp": Package("2.11-16", "Arphic Public License"),
    "fonts-arphic-ukai": Package("0.2.20080216.2-5", "Arphic Public License"),
    "fonts-arphic-uming": Package("0.2.20080216.2-11", "Arphic Public License"),
    "fonts-baekmuk": Package("2.2-13", "Baekmuk (MIT-like)"),
    "fonts-cwtex-fs": Package("1.0-4", "GPL-2+"),
    "fonts-cwtex-heib": Package("1.0-4", "GPL-2+"),
    "fonts-cwtex-kai": Package("1.0-4", "GPL-2+"),
    "fonts-cwtex-ming": Package("1.0-4", "GPL-2+"),
    "fonts-cwtex-yen": Package("1.0-4", "GPL-2+"),
    "fonts-dejima-mincho": Package("227-16", "MIT"),
    "fonts-dotgothic16": Package("1.000-20210120-2", "OFL-1.1"),
    "fonts-droid-fallback": Package("1:6.0.1r16-1.1", "Apache-2.0"),
    "fonts-hanazono": Package("20170904-2.1", "Hanazono Font License or OFL-1.1"),
    "fonts-horai-umefont": Package("670-5", "UmeFont License"),
    "fonts-ipaexfont-gothic": Package("00401-5", "IPA Font License"),
    "fonts-ipaexfont-mincho": Package("00401-5", "IPA Font License"),
    "fonts-ipafont-gothic": Package("00303-23", "IPA Font License"),
    "fonts-ipafont-mincho": Package("00303-23", "IPA Font License"),
    "fonts-kanjistrokeorders": Package("4.003~dfsg-1", "BSD-3-Clause"),
    "fonts-kiloji": Package("1:2.1.0-25", "BSD-3-Clause"),
    "fonts-klee": Package("1.000-20210121-2", "OFL-1.1"),
    "fonts-komatuna": Package("20101113-15", "CC-BY-SA-3.0"),
    "fonts-konatu": Package("20121218-11", "MIT"),
    "fonts-kouzan-mouhitsu": Package("20170411-3", "public domain"),
    "fonts-lxgw-wenkai": Package("1.250+repack-1", "OFL-1.1"),
    "fonts-migmix": Package("20200307-1", "IPA Font License"),
    "fonts-mmcedar": Package("20101113a-5.1", "Apache-2.0 and M+ FONTS License"),
    "fonts-mona": Package("1:2.90-1.1", "public domain"),
    "fonts-monapo": Package("20170722-3", "IPA Font License and public domain"),
    "fonts-morisawa-bizud-gothic": Package("1.05-2", "OFL-1.1"),
    "fonts-morisawa-bizud-mincho": Package("1.05-2", "OFL-1.1"),
    "fonts-motoya-l-cedar": Package("1.01-5", "Apache-2.0"),
    "fonts-motoya-l-maruberi": Package("1.01-5", "Apache-2.0"),
    "fonts-mplus": Package("063+git20221017+ds-1", "OFL-1.1"),
    "fonts-nanum": Package("20200506-1", "OFL-1.1"),
    "fonts-noto-cjk": Package("1:20220127+repack1-1", "OFL-1.1"),
    "fonts-oradano-mincho-gsrr": Package("0.2018-3", "free use and redistribution"),
    "fonts-rampart": Package("1.000-20210120-2", "OFL-1.1"),
    "fonts-reggae": Package("1.000-20210120-2", "OFL-1.1"),
    "fonts-ricty-diminished": Package("4.1.1-4", "OFL-1.1"),
    "fonts-rocknroll": Package("1.000-20210120-2", "OFL-1.1"),
    "fonts-sawarabi-gothic": Package("20161015-4", "CC-BY-3.0"),
    "fonts-sawarabi-mincho": Package("20220815-1", "CC-BY-SA-3.0 or OFL-1.1"),
    "fonts-seto": Package("6.20-8", "OFL-1.1"),
    "fonts-smiley-sans": Package("1.1.1-1", "OFL-1.1"),
    "fonts-stick": Package("1.000-20210120-2", "OFL-1.1"),
    "fonts-train": Package("1.000-20210120-2", "OFL-1.1"),
    "fonts-umeplus-cl": Package("20180604-2", "M+ FONTS License and BSD-3-Clause"),
    "fonts-umeplus": Package("20180604-3", "M+ FONTS License and BSD-3-Clause"),
    "fonts-vlgothic": Package("20220612-1", "M+ FONTS License, Sazanami License and BSD-3-Clause"),
    "fonts-wqy-microhei": Package("0.2.0-beta-3.1", "Apache-2.0 or GPL-3+ with font exception"),
    "fonts-wqy-zenhei": Package("0.9.45-8", "GPL-2 with font embedding exception"),
    "fonts-yozvox-yozfont-antique": Package("14.04-2", "OFL-1.1"),
    "fonts-yozvox-yozfont-cute": Package("14.04-2", "OFL-1.1"),
    "fonts-yozvox-yozfont-edu": Package("14.04-2", "OFL-1.1"),
}


def fetch(cache: str | os.PathLike[str]) -> dict[str, Path]:
    """The folder of each package's files, by its name, fetched and unpacked on the first call.

    Args:
        cache: a folder of 2.1 GB, created if missing; packages that are in it are not fetched.

    Raises:
        UserError: a package can't be fetched or unpacked.
    """
    folders = {}
    for number, (name, package) in enumerate(PACKAGES.items(), 1):
        folders[name] = debian.unpacked(cache, name, package.tried)
        if number % 10 == 0 or number == len(PACKAGES):
            print(f"unpacked {number}/{len(PACKAGES)} packages", flush=True)
    return folders


def faces(cache: Path, characters: Sequence[str]) -> list[Typeface]:
    """The faces of all packages that have the characters; the packages are fetched into the cache."""
    found = []
    for name, folder in fetch(cache).items():
        source = Source(
            package=name,
            version=debian.version(cache, name),
            licence=PACKAGES[name].licence,
            notice=cache / "licences" / name / "copyright",
        )
        found += typefaces.find(folder, characters, source)
    return found
