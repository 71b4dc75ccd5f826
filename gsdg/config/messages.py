"""Messages for errors of Hydra and OmegaConf, which begin with what to write instead. No torch."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from traceback import extract_tb

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from gsdg.config.choices import choices, in_other_groups, most_similar, slash_hint
from gsdg.config.schema import as_dict
from gsdg.utils.errors import DISK_FULL, NO_RIGHT, UserError, listing, nearest

SWEEP = "Ambiguous value for argument '"  # Hydra's message for a sweep without -m begins like this


def message_of(error: BaseException) -> str | None:
    """The message to show for an error of Hydra or OmegaConf; None for any other error."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        return _no_such_choice(error.missing_cfg_file, error.options, str(error))
    if isinstance(error, OverrideParseException):
        open_quote = any(error.override.count(quote) % 2 for quote in "'\"")
        return f"{error.override}: {'a quote is not closed' if open_quote else error.message}"
    if isinstance(error, MissingMandatoryValue):
        return f"write {error.full_key}=VALUE\n{error.full_key} has no default."
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _sweep_without_m(str(error)) or _unknown_key(error) or _original_message(error)
    return (str(error) or repr(error)) if isinstance(error, ValueError) and _raised_by_hydra(error) else None


def _original_message(error: Exception) -> str:
    """The messages of the error and its cause, without OmegaConf's lines about types."""
    cause = error.__cause__
    texts = [str(error), str(cause)] if cause is not None and str(cause) not in str(error) else [str(error)]
    return "\n".join(re.sub(r"\n *(object|reference)_type=.*", "", without_plus(text)) for text in texts)


def without_plus(message: str) -> str:
    """Hydra's message without the advice to add a key with `+`, because a run's config accepts no additional keys."""
    return re.sub(r"\n *(To append to your|Or add a second \+).*", "", message)


def _raised_by_hydra(error: Exception) -> bool:
    """Whether the error was raised in Hydra's or OmegaConf's own code, so that their input is wrong."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_globals.get("__name__", "").split(".")[0] in ("hydra", "omegaconf")


# ---- choices that do not exist --------------------------------------------------------------------------------------


def _no_such_choice(missing: str, options: Sequence[str], message: str) -> str:
    """The message for a choice, such as `dataset/pasc`, that is none of the options."""
    group, _, name = missing.rpartition("/")
    if group.startswith("experiment/"):  # presets may lie in subfolders
        group, _, name = missing.partition("/")
        options = []
    valid = sorted({*options, *choices(group)})
    similar = [f"{group}={other}" for other in most_similar(name, valid)[:3]] or in_other_groups(name, group)
    guess = f" Did you mean {' or '.join(similar)}?" if similar else ""
    file = re.match(r"In '(.*?)'", message)
    where = f" (asked for in {file[1]}.yaml)" if file and file[1] not in ("config", "hydra/config") else ""
    return f"there is no {group}={name}{where}.{guess}\nValid: {listing(valid)}."


# ---- keys that do not exist -----------------------------------------------------------------------------------------


def _sweep_without_m(message: str) -> str | None:
    """The message for `algorithm=erm,irm` without -m; None for another of Hydra's messages."""
    if not message.startswith(SWEEP):
        return None
    word = message.removeprefix(SWEEP).partition("'\n")[0]
    key, _, value = word.partition("=")
    return f"write python launch.py -m {word}\nSeveral values are a sweep. One value that is a list: '{key}=[{value}]'."


def _unknown_key(error: Exception) -> str | None:
    """The message for a key that the config does not have, with the choice or the key that is probably meant."""
    cause = error if isinstance(error, ConfigAttributeError | ConfigKeyError) else error.__cause__
    if not isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return None
    typed = re.search(r"\n *To append to your config use \+(.*?)=(.*)", str(error))
    key = typed[1] if typed else str(cause.full_key)
    value = typed[2] if typed else "NAME"
    return slash_hint(key, value) or _choice_missing(key) or _similar_key(cause, key)


def _choice_missing(key: str) -> str | None:
    """For `search.hparams_seed=3` without a search, or `hydra.launcher.partition=gpu` with Hydra's own launcher."""
    group = key.rpartition(".")[0].replace(".", "/")
    if group in ("search", "trainer/averaging", "trainer/scheduler", "algorithm/surgery"):
        return (
            f"{key}: choose a {group} first, one of: {listing(f'{group}={name}' for name in sorted(choices(group)))}."
        )
    if group == "hydra/launcher":
        return f"{key} is a setting of a cluster's launcher: add {group}=slurm, slurm_cpu or local."
    return None


def _similar_key(error: OmegaConfBaseException, key: str) -> str | None:
    node = error.parent_node
    if not hasattr(node, "keys"):
        return None
    config = as_dict(node._get_root(), resolve=False)
    if not key.startswith("hydra."):
        config.pop("hydra", None)
    valid = listing(sorted(name for name in node if name not in ("_target_", "hydra")))
    return f"unknown key {key}.{nearest(key, config)} Valid here: {valid}."


def explain(error: BaseException) -> str | None:
    """The message for a mistake of the user, found by GSDG or by Hydra; None for a bug, whose traceback is shown."""
    if isinstance(error, UserError):
        return f"error: {error}"
    if isinstance(error, OSError) and error.filename and _user_can_fix(error):  # also OSErrors of Hydra
        return (
            f"error: {error.filename}: {error.strerror}.\n"
            "Free some space there or make it readable and writable, or choose another place: runs_dir=FOLDER, "
            "data_dir=FOLDER."
        )
    message = message_of(error)
    return f"error: {message}" if message else None


def _user_can_fix(error: OSError) -> bool:
    """Whether it is a full disk, missing permissions, or a folder that cannot be created (in /proc, for example)."""
    innermost = [frame.name for frame in extract_tb(error.__traceback__)[-1:]]
    return error.errno in (*DISK_FULL, *NO_RIGHT) or innermost in (["mkdir"], ["makedirs"])
