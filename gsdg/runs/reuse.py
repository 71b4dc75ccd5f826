"""May a start use what earlier starts left in a run's folder? Their code, data, weights and machine beside its own.

Other data or weights are refused: under the same id they would be another experiment. Other code is said, refused or
answered by a new run, as `on_code_change` wants. A resume on a machine that computes otherwise is said.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from gsdg.environment import described_code, same_code
from gsdg.errors import UserError
from gsdg.identity import VERSION, file_digest
from gsdg.runs import Busy, RunFolder, read_json, read_lines

log = logging.getLogger(__name__)

OnCodeChange = Literal["note", "rerun", "refuse"]
# What of environment.jsonl a step's bits depend on: {its dotted key: what it is called}.
COMPUTES = {
    "device": "device",
    "gpus": "number of visible GPUs",
    "threads": "threads",
    "processor": "processor",
    "packages.torch": "torch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "tf32": "TF32",
}


# ---- data and weights -----------------------------------------------------------------------------------------------


def data_digests(dataset: object) -> dict:
    """Of a DomainDataset: {"classes": digest, "domains": {name: {"images": how many, "digest": of names and labels}}}.

    Names are those of the files, relative to the data set's folder; images in memory have labels only.
    """
    files = [file for domain in dataset.domains.values() for file in domain.files or ()]
    above = len(os.path.commonpath([os.path.dirname(file) for file in files])) if files else 0
    return {
        "classes": _digest("\n".join(dataset.classes).encode()),
        "domains": {name: _domain_digest(domain, above) for name, domain in dataset.domains.items()},
    }


def _domain_digest(domain: object, above: int) -> dict:
    names = "\n".join(file[above:] for file in domain.files or ())
    return {"images": len(domain), "digest": _digest(names.encode(errors="surrogateescape"), domain.labels.tobytes())}


def weights_digests(weights: str | None, file: Path | None) -> dict:
    """{what model.weights says: the digest of the file it is read from}; {} where there is no such file."""
    return {str(weights): file_digest(file)} if weights is not None and file and os.path.isfile(file) else {}


def differences(before: dict, now: dict) -> list[str]:
    """What differs between two starts' {"data", "weights"}, a phrase each; what only one has is not compared."""
    found = []
    if (old := before.get("data")) and (new := now.get("data")):
        found += ["other classes"] * (old["classes"] != new["classes"])
        for name in [*old["domains"], *(name for name in new["domains"] if name not in old["domains"])]:
            found += _of_domain(name, old["domains"].get(name), new["domains"].get(name))
    old, new = before.get("weights") or {}, now.get("weights") or {}
    return found + [f"other weights in model.weights={key}" for key in old if key in new and old[key] != new[key]]


def _of_domain(name: str, old: dict | None, new: dict | None) -> list[str]:
    if old == new:
        return []
    if not old or not new:
        return [f"domain {name}: {'only then' if old else 'only now'}"]
    same = ", with other names or labels" if old["images"] == new["images"] else ""
    return [f"domain {name}: {old['images']:,} images then, {new['images']:,} now{same}"]


def check_inputs(folder: RunFolder, now: dict) -> None:
    """UserError if the run was begun with other data or weights than `now` has ({"data", "weights"})."""
    if found := differences(read_json(folder.path / "identity.json"), now):
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        raise UserError(
            f"run {folder.path.name} was begun with other data or weights under the same config: "
            f"{'; '.join(found[:4])}{more}.\n"
            "Restore what it was begun with, or choose: force=true makes the run afresh with what is here now; "
            f"another runs_dir keeps both. (Its folder: {folder.path})"
        )


def note_inputs(folder: RunFolder, identity: dict, now: dict) -> None:
    """Leave identity.json for later starts; the digests of the first start stay."""
    before = read_json(folder.path / "identity.json")
    known = {key: {**now[key], **before.get(key, {})} for key in ("data", "weights")}
    folder.write("identity.json", {"version": VERSION, "config": identity, **known})


# ---- a search's draw 0 ----------------------------------------------------------------------------------------------


def with_search(folder: RunFolder, config: dict) -> dict:
    """The config with the search that the run is draw 0 of, if an earlier start had one and this one has none."""
    known = read_json(folder.path / "config.json").get("search")
    return {**config, "search": known} if known and "search" not in config else config


def note_search(folder: RunFolder, config: dict) -> None:
    """Draw 0 of a search is the plain run: one that is done becomes its draw, if only its config.json says so.

    Tables count it for the search that asked last.
    """
    known = read_json(folder.path / "config.json")
    if known and "search" in config and known.get("search") != config["search"]:
        with suppress(Busy), folder.hold():
            folder.write("config.json", {**known, "search": config["search"]})


# ---- code -----------------------------------------------------------------------------------------------------------


def other_code(folder: Path, now: dict) -> dict | None:
    """The first start's noted code that is not `now`; None where every start had this code."""
    starts = (line for line in read_lines(Path(folder) / "environment.jsonl") if "code" in line)
    return next((start for start in starts if not same_code(start, now)), None)


def code_change(folder: RunFolder, now: dict, on_code_change: OnCodeChange) -> bool:
    """Whether the run is to be made afresh because other code has worked on it. UserError if that is refused."""
    before = other_code(folder.path, now)
    if before is None:
        return False
    done = folder.status.get("state") == "done"
    sentence = (
        f"run {folder.path.name} was {'made' if done else 'begun'} with other code: {described_code(before)} then, "
        f"{described_code(now)} now"
    )
    if on_code_change == "refuse":
        raise UserError(
            f"{sentence} (on_code_change=refuse).\nRestore that code, or choose: on_code_change=rerun makes the run "
            f"afresh, on_code_change=note {'keeps its result' if done else 'goes on'}."
        )
    answer = "it is made afresh" if on_code_change == "rerun" else "on_code_change=rerun makes it afresh"
    log.warning("%s: %s", sentence, answer)
    return on_code_change == "rerun"


# ---- the machine ----------------------------------------------------------------------------------------------------


def note_other_machine(folder: RunFolder, now: dict, say: Callable[..., None] = log.warning) -> None:
    """Say what of the machine differs from the start before: a run that is resumed is then not the same to the bit."""
    before = next(reversed(read_lines(folder.path / "environment.jsonl")), {})
    changed = [
        f"{name} {old} then, {new} now"
        for key, name in COMPUTES.items()
        if (old := _at(before, key)) not in (None, new := _at(now, key))
    ]
    if changed and any(folder.path.glob("checkpoints/step_*.pt")):
        say("resumed on a machine that computes otherwise, so not the same to the bit: %s", "; ".join(changed))


def _at(line: dict, key: str) -> object:
    node: object = line
    for word in key.split("."):
        node = node.get(word) if isinstance(node, dict) else None
    return node


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part + b"\0")
    return total.hexdigest()[:16]
