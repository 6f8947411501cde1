"""What an installed package requires, for pip, without what only models for images and sound need (large, and each for
one version of torch): PACKAGE."""

import re
import sys
from importlib.metadata import requires

SKIPPED = ("torch", "torchvision", "torchaudio", "torchcodec")

if __name__ == "__main__":
    for line in requires(sys.argv[1]) or ():
        name = re.split(r"[^\w.-]", line, maxsplit=1)[0]
        if name.lower() not in SKIPPED and "extra ==" not in line:
            print(line)
