"""`python -m convert SRC DST [--dtype ...]`: the same as `coreinfer convert`."""

import sys

from coreinfer_command import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
