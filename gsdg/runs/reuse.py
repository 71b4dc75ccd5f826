"""Whether a start may use what earlier starts left in the run's folder: compares code, data, weights and machine.

Other data or weights are refused, because under the same run id they would be another experiment. For other code,
`on_code_change` chooses: a warning (`note`), an error (`refuse`), or a run from scratch (`rerun`). A resume on another
machine, which may round differently, logs a warning.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from gsdg.config.identity import VERSION
from gsdg.runs.folder import Busy, RunFolder
from gsdg.runs.provenance import described_code, same_code
from gsdg.utils.digest import file_digest
from gsdg.utils.errors import UserError
from gsdg.utils.json_files import load_json, read_lines

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

OnCodeChange = Literal["note", "rerun", "refuse"]
# The values in environment.jsonl that the exact result of a step depends on: {dotted key: name in messages}.
MACHINE = {
    "device": "device",
    "gpus": "number of visible GPUs",
    "threads": "threads",
    "processor": "processor",
    "packages.torch": "torch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "tf32": "TF32",
    "compile": "trainer.compile",
}


# ---- data and weights -----------------------------------------------------------------------------------------------


class LabelledImages(Protocol):
    """What the digests need of a `gsdg.data.dataset.Domain`. `gsdg.runs` does not import `gsdg.data`."""

    @property
    def files(self) -> Sequence[str] | None: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def official(self) -> Mapping[str, np.ndarray] | None: ...
    def __len__(self) -> int: ...


class LabelledDomains(Protocol):
    """What the digests need of a `gsdg.data.dataset.DomainDataset`."""

    @property
    def classes(self) -> Sequence[str]: ...
    @property
    def domains(self) -> Mapping[str, LabelledImages]: ...


def data_digests(dataset: LabelledDomains) -> dict:
    """Digests of the classes, file names and labels of a DomainDataset.

    The file names are relative to the data set's folder; images in memory have none.

    Returns:
        {"classes": digest, "domains": {domain: {"images": number of images, "digest": of file names and labels}}};
        where the data set defines a split itself, also {"official": digest} for each domain.
    """
    folders = {os.path.dirname(file) for domain in dataset.domains.values() for file in domain.files or ()}
    root_length = len(os.path.commonpath(sorted(folders))) if folders else 0
    return {
        "classes": _digest("\n".join(dataset.classes).encode(errors="surrogateescape")),
        "domains": {name: _domain_digest(domain, root_length) for name, domain in dataset.domains.items()},
    }


def _domain_digest(domain: LabelledImages, root_length: int) -> dict:
    names = "\n".join(file[root_length:] for file in domain.files or ())
    digest = _digest(names.encode(errors="surrogateescape"), domain.labels.tobytes())
    parts = domain.official
    official = {"official": _digest(*(parts[part].tobytes() for part in sorted(parts)))} if parts else {}
    return {"images": len(domain), "digest": digest, **official}


def weights_digests(weights: str | None, file: Path | None) -> dict:
    """{value of model.weights: the digest of the file that it stands for}; {} if there is no such file."""
    return {str(weights): file_digest(file)} if weights is not None and file and os.path.isfile(file) else {}


def differences(before: dict, now: dict) -> list[str]:
    """One phrase per difference between the {"data", "weights"} of two starts; an entry of only one is not compared."""
    phrases = []
    if (old := before.get("data")) and (new := now.get("data")):
        phrases += ["other classes"] * (old["classes"] != new["classes"])
        for name in [*old["domains"], *(name for name in new["domains"] if name not in old["domains"])]:
            phrases += _domain_differences(name, old["domains"].get(name), new["domains"].get(name))
    old, new = before.get("weights") or {}, now.get("weights") or {}
    return phrases + [f"other weights in model.weights={key}" for key in old if key in new and old[key] != new[key]]


def _domain_differences(name: str, old: dict | None, new: dict | None) -> list[str]:
    if old == new:
        return []
    if not old or not new:
        return [f"domain {name}: {'only then' if old else 'only now'}"]
    if old["digest"] == new["digest"]:
        return [f"domain {name}: another column split in the list"]
    same = ", with other names or labels" if old["images"] == new["images"] else ""
    return [f"domain {name}: {old['images']:,} images then, {new['images']:,} now{same}"]


def check_inputs(folder: RunFolder, now: dict) -> None:
    """UserError if an earlier start had other data or weights than `now`, {"data", "weights"}."""
    if phrases := differences(load_json(folder.path / "identity.json"), now):
        more = f"; and {len(phrases) - 4} more" if len(phrases) > 4 else ""
        raise UserError(
            f"run {folder.path.name} was begun with other data or weights under the same config: "
            f"{'; '.join(phrases[:4])}{more}.\n"
            "Restore what it was begun with, or choose: force=true starts the run from scratch with what is here now; "
            f"another runs_dir keeps both. (Its folder: {folder.path})"
        )


def note_inputs(folder: RunFolder, identity: dict, now: dict) -> None:
    """Write identity.json for later starts; digests of earlier starts are kept."""
    before = load_json(folder.path / "identity.json")
    digests = {key: {**now[key], **before.get(key, {})} for key in ("data", "weights")}
    folder.write("identity.json", {"version": VERSION, "config": identity, **digests})


# ---- draw 0 of a search ---------------------------------------------------------------------------------------------


def with_search(folder: RunFolder, config: dict) -> dict:
    """The config with the `search` node of an earlier start, of which the run is draw 0, if this start has none."""
    search = load_json(folder.path / "config.json").get("search")
    return {**config, "search": search} if search and "search" not in config else config


def note_search(folder: RunFolder, config: dict, *, locked: bool = False) -> None:
    """Write the `search` node of `config` into the config.json of a run that is done.

    locked: this process has the lock of the run.

    Draw 0 of a search is the plain run, so a plain run that is done becomes draw 0 of the search. Tables count it for
    the last search that was noted.
    """
    noted = load_json(folder.path / "config.json")
    if noted and "search" in config and noted.get("search") != config["search"]:
        with suppress(Busy), nullcontext() if locked else folder.acquire():
            folder.write("config.json", {**noted, "search": config["search"]})


# ---- metrics --------------------------------------------------------------------------------------------------------


def unrecorded_metrics(folder: RunFolder, metrics: Sequence[str]) -> list[str]:
    """Those of `metrics` (trainer.metrics) that a record of the run lacks: it was made, or begun, with fewer."""
    wanted = [name for name in metrics if name != "accuracy"]
    records = folder.records() if wanted else []
    return [name for name in wanted if any(name not in record.get("scores", {}) for record in records)]


# ---- code -----------------------------------------------------------------------------------------------------------


def other_code(folder: Path, now: dict) -> dict | None:
    """The state of the code at the first start with other code than `now`; None if all starts had this code."""
    starts = (line for line in read_lines(Path(folder) / "environment.jsonl") if "code" in line)
    return next((start for start in starts if not same_code(start, now)), None)


def code_change(folder: RunFolder, now: dict, on_code_change: OnCodeChange) -> bool:
    """Whether the run starts from scratch, because an earlier start had other code. UserError for `refuse`."""
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
            f"{sentence} (on_code_change=refuse).\n"
            "Restore that code, or choose: on_code_change=rerun starts the run from scratch, "
            f"on_code_change=note {'keeps its result' if done else 'resumes it'}."
        )
    rerun = "it starts from scratch" if on_code_change == "rerun" else "on_code_change=rerun starts it from scratch"
    log.warning("%s: %s", sentence, rerun)
    return on_code_change == "rerun"


# ---- the machine ----------------------------------------------------------------------------------------------------


def warn_of_other_machine(folder: RunFolder, now: dict) -> None:
    """Warn if a resumed run is not bit-for-bit repeatable, because the machine differs from that of the last start."""
    before = next(reversed(read_lines(folder.path / "environment.jsonl")), {})
    changed = [
        f"{name} {old} then, {new} now"
        for key, name in MACHINE.items()
        if (old := _value_at(before, key)) not in (None, new := _value_at(now, key))
    ]
    if changed and any(folder.path.glob("checkpoints/step_*.pt")):
        log.warning("resumed on another machine, so the result may differ in the last bits: %s", "; ".join(changed))


def _value_at(line: dict, key: str) -> object:
    """The value of a dotted key; None if there is none."""
    node: object = line
    for word in key.split("."):
        node = node.get(word) if isinstance(node, dict) else None
    return node


def _digest(*parts: bytes) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part + b"\0")
    return total.hexdigest()[:16]
