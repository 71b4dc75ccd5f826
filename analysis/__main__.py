"""`python -m analysis FOLDER...`: the tables of runs on disk; the same as `python -m gsdg.analysis`."""

import sys

from gsdg.analysis.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
