"""Write letters and numerals drawn from fonts as WebDataset shards of 32x32 PNGs, one class a character:

apt-get install --no-install-recommends $(python data_prep/glyphs.py --packages)
python data_prep/glyphs.py --fonts /usr/share/fonts --output data/glyphs

Any .ttf and .otf files below the folders are taken, some faces of each family. Splits are of whole families, and
families whose glyphs look alike, as metric clones do, share one. Left out and counted: symbol fonts, characters that a
font lacks, lower case of fonts without it. Beside each image is KEY.json with its character, family, style, weight,
width, italic angle and, where the font says so, whether it has serifs.
"""

from __future__ import annotations

import argparse
import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.glyphs import CHARACTERS, FontGlyphs
from lzn_dist.prepare.writer import parser, run

# Debian's, 85 MB to fetch; each begins with fonts-
PACKAGES = """
3270 adf-accanthis adf-baskervald adf-berenis adf-gillius adf-ikarius adf-irianis adf-libris adf-mekanus adf-oldania
adf-romande adf-solothurn adf-switzera adf-tribun adf-universalis adf-verana aenigma agave allerta anonymous-pro
apropal arapey arkpandora atarismall averia-gwf averia-sans-gwf averia-serif-gwf b612 bajaderka bebas-neue beteckna
blankenburg breip cabin cabinsketch campania cantarell cardo cherrybomb clear-sans comfortaa comic-neue
courier-prime crosextra-caladea crosextra-carlito dancingscript dejavu-core dejavu-extra dkg-handwriting dosis
dustin ebgaramond ecolier-court engadget essays1743 eurofurence f500 fantasma fantasque-sans fanwood femkeklaver
ferrite-core firacode freefont-ttf georgewilliams gfs-artemisia gfs-didot gfs-neohellenic gnutypewriter go
gotico-antiqua goudybookletter hack-ttf havana hermit humor-sans inconsolata inter isabella jetbrains-mono
johnsmith-induni joscelyn junction jura karla karmilla kaushanscript klaudia-berenika kristi lato league-mono
league-spartan leckerli-one levien-museum levien-typoscript liberation libfinal lindenhill linuxlibertine lmodern
lobster lobstertwo manrope monofur monoid mononoki national-park ocr-a ocr-b oflb-euterpe okolaks oldstandard
open-sans opendin opendyslexic paratype pc play prociono quattrocento quicksand radisnoir roadgeek roboto-unhinted
roboto-slab routed-gothic rufscript sil-andika sil-charis sil-gentium-basic sora staypuft stix summersby tiresias
tlwg-garuda-ttf tlwg-kinnari-ttf tlwg-mono-ttf tomsontalks tuffy ubuntu-title uniol urw-base35 vollkorn
yanone-kaffeesatz
"""


class _Packages(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(*(f"fonts-{name}" for name in PACKAGES.split()))
        parser.exit()


def _characters(text: str) -> str:
    if not text or set(text) - set(CHARACTERS) or len(set(text)) != len(text):
        raise argparse.ArgumentTypeError(f"each of {text!r} must be one of {CHARACTERS}, once")
    return text


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument(
        "--fonts", type=path_argument, required=True, nargs="+", metavar="DIR", help="folders of fonts, or font files"
    )
    options.add_argument("--characters", type=_characters, default=CHARACTERS, help="the classes, in this order")
    options.add_argument("--faces", type=int, default=2, metavar="N", help="of a family, at most (2; 0: all)")
    options.add_argument("--packages", action=_Packages, nargs=0, help="print Debian packages of some hundred families")
    options.set_defaults(samples_per_shard=2000)
    sys.exit(run(lambda given: FontGlyphs(tuple(given.fonts), given.characters, given.faces), options.parse_args()))
