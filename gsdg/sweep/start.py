"""`python .../gsdg/sweep/start.py -u -m MODULE ...`: run a module with the gsdg that this file belongs to.

A job must run the snapshot it was submitted with (code.py), wherever it stands: `python -m` would look into the working
directory first, which is the checkout, and PYTHONPATH comes after it.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    module = sys.argv.index("-m") + 1
    name, sys.argv = sys.argv[module], sys.argv[module:]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
