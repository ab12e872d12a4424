"""Draws all pictures: python docs/pictures [FOLDER]"""

from pathlib import Path
import sys

import attention
import caches
import joint_step
import packing

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
for picture in (attention, caches, joint_step, packing):
    picture.main(folder / f"{picture.__name__}.svg")
