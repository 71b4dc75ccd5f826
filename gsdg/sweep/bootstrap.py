"""`python .../gsdg/sweep/bootstrap.py -u -m MODULE ...`: run a module of the copy of the code that contains this file.

A job must run the copy of the code that it was submitted with (code_snapshot.py), wherever it starts. `python -m`
does not ensure that: it imports from the working directory first, which may be the checkout, and only then from
PYTHONPATH. The copy is checked before it is run, since a clean-up of old files may have removed some of its files.
Standard library only. This file imports nothing of gsdg, because gsdg may be what is missing.
"""

import hashlib
import json
import runpy
import shlex
import sys
from pathlib import Path

DAMAGED = 5  # exit code


def find_damage(folder):
    """What is wrong with the first damaged file of the copy in `folder`; "" if every file is as it was copied."""
    try:
        files = json.loads((folder / "files.json").read_text())
    except (OSError, ValueError) as error:
        return f"files.json: {error}"
    for name, digest in files.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            return f"{name}: {error.strerror}"
        if hashlib.sha256(content).hexdigest() != digest:
            return f"{name} was changed"
    return ""


def retry_command(folder, arguments):
    """The command that makes the copy again. It names the sweep if one of the arguments is a path in its folder."""
    parts = next((Path(word).parts for word in arguments if ".sweeps" in Path(word).parts), ())
    sweep = [parts[parts.index(".sweeps") + 1]] if parts else []
    return shlex.join(["python", "-m", "gsdg.sweep", "retry", *sweep, "--runs-dir", str(folder.parents[1])])


if __name__ == "__main__":
    folder = Path(__file__).resolve().parents[2]
    if folder.parent.name.startswith(".code"):  # a copy; the checkout itself is not checked
        sys.dont_write_bytecode = True  # the copy contains nothing but what was copied
        if damage := find_damage(folder):
            print(f"error: the copy of the code at {folder} is damaged ({damage}). To make it again:")
            print(f"    {retry_command(folder, sys.argv)}", flush=True)
            sys.exit(DAMAGED)
    sys.path[0] = str(folder)
    module = sys.argv.index("-m") + 1
    name, sys.argv = sys.argv[module], sys.argv[module:]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
