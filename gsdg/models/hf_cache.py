"""Weights files of the Hugging Face hub, in the cache of huggingface_hub, where timm would put them.

With GSDG_OFFLINE set (in jobs on compute nodes) nothing is downloaded and no request is made. This cache is not that of
torch.hub: HF_HOME or HF_HUB_CACHE says where it is, not TORCH_HOME.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gsdg.utils.errors import UserError


@dataclass(frozen=True)
class HubFile:
    """One file of a repository on the hub: the first of `names` that the repository has, at `revision` (None: main)."""

    repo: str
    names: tuple[str, ...]
    revision: str | None = None

    def file(self) -> Path:
        """Where the file is, or a pattern for where it will be: its folder is named after a commit of the hub."""
        return self._cached() or self._folder() / "snapshots" / "*" / self.names[0]

    def fetch(self) -> Path:
        """The file, downloaded if it is not in the cache. UserError if that is impossible."""
        if cached := self._cached():
            return cached
        if command := os.environ.get("GSDG_OFFLINE"):
            raise UserError(self._offline(command))
        return self._download()

    def _cached(self) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        paths = (try_to_load_from_cache(self.repo, name, revision=self.revision) for name in self.names)
        return next((Path(path) for path in paths if isinstance(path, str)), None)

    def _download(self) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError

        reason: Exception | None = None
        for name in self.names:
            try:
                return Path(hf_hub_download(self.repo, name, revision=self.revision))
            except LocalEntryNotFoundError as error:  # no connection; it is a subclass of the next
                reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
                break
            except EntryNotFoundError as error:
                reason = error
            except Exception as error:  # of requests or httpx, which depends on the version of huggingface_hub
                reason = error
                break
        raise UserError(self._unreachable(reason)) from reason

    def _folder(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.replace('/', '--')}"

    def _offline(self, command: str) -> str:
        """One complete line, because a status shows only the first; then what to do if `command` was run already."""
        return (
            f"the weights {self.repo} are not in the Hugging Face cache at {self._folder()}, and a compute node "
            f"downloads nothing; on a login node: {command}\nIf you have done so, the login node stored them "
            "elsewhere: set HF_HOME (or HF_HUB_CACHE; TORCH_HOME is another cache), there and in the job, to a folder "
            "that both can read, or give the file with model.weights=<file>; model.weights=null model.freeze_bn=false "
            "starts from random weights"
        )

    def _unreachable(self, reason: Exception | None) -> str:
        from huggingface_hub import constants

        first = (str(reason).strip() or repr(reason)).splitlines()[0]
        return (
            f"the weights {' or '.join(self.names)} of {self.repo} can't be downloaded from {constants.ENDPOINT} "
            f"({type(reason).__name__}: {first}). Run the same command on a machine with internet, then copy its "
            f"folder {self._folder().name} into {self._folder().parent}, or give the file with model.weights=<file>; "
            "model.weights=null model.freeze_bn=false starts from random weights"
        )
