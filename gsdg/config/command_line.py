"""Check the words of a command line before Hydra parses them. A message begins with the command that works. No torch.

Hydra's own messages name tokens of its grammar. The typical mistakes are spaces after commas, DomainBed's flags, and -m
together with --cfg.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

from hydra._internal.utils import get_args_parser  # private: the options of hydra.main are nowhere public

from gsdg.config.choices import choices, groups, in_other_groups, most_similar, shipped_node
from gsdg.utils.errors import UserError, listing

LAUNCH = "python launch.py"
NEEDED = ("dataset", "split", "model", "algorithm", "optimizer", "trainer")  # the groups that every run needs
# {DomainBed's flag: the key here}; any other flag keeps its name.
FLAGS = {
    "test_envs": "split.target",
    "trial_seed": "split.trial_seed",
    "holdout_fraction": "split.holdout_fraction",
    "hparams_seed": "search.hparams_seed",
    "steps": "trainer.steps",
    "checkpoint_freq": "trainer.eval_every",
    "batch_size": "trainer.batch_size",
    "output_dir": "runs_dir",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "resnet_dropout": "model.dropout",
    "n_parts": "algorithm.n_parts",
    "alpha": "algorithm.alpha",
}


def check_arguments(words: Sequence[str]) -> list[str]:
    """Check the arguments of `python launch.py` and return them with the overrides first.

    Hydra's argparse accepts no override after an option. UserError for every mistake.
    """
    _check_directory()
    given, more = get_args_parser().parse_known_args(list(words))
    overrides = [*given.overrides, *(word for word in more if not word.startswith("--"))]
    refuse_flags(words, [word for word in more if word.startswith("--")], LAUNCH)
    check_words(overrides, f"{LAUNCH} -m" if given.multirun else LAUNCH)
    _check_options(given, overrides)
    if added := _default_target(given, overrides):
        print(
            f"no data set and no target are chosen: {added}, the last domain of the digits; dataset=... chooses others"
        )
        return [*overrides, added, *_options(words, overrides)]
    return [*overrides, *_options(words, overrides)]


def _options(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The words without the overrides."""
    counts, options = Counter(overrides), []
    for word in words:
        if counts[word] > 0:
            counts[word] -= 1
        else:
            options.append(word)
    return options


def _default_target(given, overrides: Sequence[str]) -> str | None:
    """The target of a single run of which neither data set nor target nor preset are chosen; else None.

    So `python launch.py` trains something. With a data set of one's own, or in a sweep, a target is never guessed.
    """
    options = {name for name, value in vars(given).items() if value} - {"overrides", "run"}
    groups = {re.split(r"[./=@]", override.lstrip("+~"))[0] for override in overrides}
    if options or groups & {"dataset", "split", "experiment", "hydra"}:
        return None
    return f"split.target={shipped_node('dataset', 'rotated_digits')['domains'][-1]}"


def _check_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the working directory does not exist any more: `cd` to one that does.") from None


def _check_options(given, overrides: Sequence[str]) -> None:
    """UserError for options of Hydra that cannot be combined."""
    if given.cfg and given.multirun:
        first = shlex.join(word.split(",")[0] if "[" not in word else word for word in overrides)
        raise UserError(
            f"--cfg shows the config of one run. Leave out -m and choose one: {LAUNCH} {first} --cfg {given.cfg}\n"
            f"All runs of the sweep: python -m gsdg.sweep plan {shlex.join(overrides)} --all"
        )
    if given.resolve and not (given.cfg or given.help):
        raise UserError(f"--resolve goes with --cfg: {LAUNCH} {shlex.join([*overrides, '--cfg', 'job', '--resolve'])}")
    chosen = {"--cfg": given.cfg, "--info": given.info, "--run": given.run, "-m": given.multirun}
    if len(several := [option for option, value in chosen.items() if value]) > 1:
        raise UserError(f"{' and '.join(several)} exclude one another: choose one.")


def check_words(words: Sequence[str], command: str) -> None:
    """UserError for overrides with spaces in them, words that are not overrides, and overrides that remove a group."""
    for pieces in _split_overrides(words):
        if len(pieces) > 1 or pieces[0].endswith(","):
            joined = "".join(pieces).rstrip(",")
            where = "=" if any(piece.startswith("=") or piece.endswith("=") for piece in pieces) else "the comma"
            place = "around =" if where == "=" else f"after {where}"
            sweep = " -m" if command == LAUNCH and "," in joined and "[" not in joined else ""
            raise UserError(f"no space {place}: {command}{sweep} {shlex.quote(joined)}\n(found: {' '.join(pieces)})")
        _check_word(pieces[0], command)


def _split_overrides(words: Sequence[str]) -> Iterator[list[str]]:
    """The words in groups; a group with several words is one override that the shell has split at spaces."""
    groups: list[list[str]] = []
    for word in words:
        last = groups[-1][-1] if groups else ""
        continues = last.endswith(",") and "=" not in word or last.endswith("=") and "=" not in word
        if groups and (continues or word.startswith((",", "="))):
            groups[-1].append(word)
        else:
            groups.append([word])
    yield from groups


def _check_word(word: str, command: str) -> None:
    key, equals, value = word.lstrip("+").partition("=")
    if key.startswith("~"):
        if key.removeprefix("~") in NEEDED:
            raise UserError(f"{word}: a run needs one. Choose: {_valid(key.removeprefix('~'))}")
    elif key == "adaptation":
        command = f"python -m gsdg.evaluate RUN --adapt {value or 'NAME'}"
        raise UserError(f"{word}: a finished run is adapted, when it is evaluated: {command}")
    elif not equals:
        raise UserError(_not_an_override(word, command))
    elif key in NEEDED and value in ("null", "~", "None"):
        raise UserError(f"{word}: a run needs one. Choose: {_valid(key)}")
    elif word.startswith("+") and key in NEEDED:
        raise UserError(f"write {command} {shlex.quote(f'{key}={value}')}\n{key} has a choice already, so without +.")


def _valid(group: str) -> str:
    return listing(f"{group}={name}" for name in sorted(choices(group)))


def _not_an_override(word: str, command: str) -> str:
    """The message for a word without `=`, with the choices that have this name or a similar one."""
    if word in groups():
        return f"write {command} {word}=NAME\n{word} is a choice among files: {listing(sorted(choices(word)))}."
    if word in choices("algorithm"):
        overrides = [f"algorithm={word}"]
    else:
        similar = [f"{group}={name}" for group in NEEDED for name in most_similar(word, choices(group))]
        overrides = in_other_groups(word, "") or similar
    guess = " or ".join(f"{command} {override}" for override in overrides[:3])
    return (f"did you mean {guess}?\n" if guess else "") + f"{word}: every word is key=value, without spaces around =."


# ---- DomainBed's flags ----------------------------------------------------------------------------------------------


def refuse_flags(words: Sequence[str], unknown: Sequence[str], command: str) -> None:
    """UserError if there are `unknown` options among the words. The message has the whole command as overrides."""
    if unknown:
        flags = {word.split("=")[0] for word in unknown}
        raise UserError(
            f"write {command} {shlex.join(translate_flags(words, flags))}\n"
            f"Settings are key=value, without dashes; {command} has no {listing(unknown)}.\n"
            "All of DomainBed's flags: see `From the release's command line` in the README."
        )


def translate_flags(words: Sequence[str], flags: set[str]) -> list[str]:
    """`--algorithm ERM --lr 1e-3` as `algorithm=erm optimizer.lr=1e-3`; words that belong to no flag stay the same."""
    parsed: list[tuple[str, list[str]]] = []  # (flag, its values), or ("", [another word])
    for word in words:
        flag, _, value = word.partition("=")
        if flag in flags:
            parsed.append((flag.lstrip("-").replace("-", "_"), [value] if value else []))
        elif parsed and parsed[-1][0] and not word.startswith("-") and "=" not in word:
            parsed[-1][1].append(word)
        else:
            parsed.append(("", [word]))
    values_of = {flag: values for flag, values in parsed if flag}
    dataset = (values_of.get("dataset") or [""])[0]
    return [
        override for flag, values in parsed for override in ([_as_override(flag, values, dataset)] if flag else values)
    ]


def _as_override(flag: str, values: list[str], dataset: str) -> str:
    """One flag as an override; a switch, which has no value, as `=true`."""
    if not values:
        return f"{FLAGS.get(flag, flag)}=true"
    if flag in NEEDED:
        values = [*most_similar(values[0], choices(flag)), *values][:1]
    if flag == "test_envs":
        values = [_domain(value, dataset) for value in values]
    return f"{FLAGS.get(flag, flag)}={values[0] if len(values) == 1 else '[' + ','.join(values) + ']'}"


def _domain(number: str, dataset: str) -> str:
    """The name of DomainBed's domain `number`, which is its index among the domains of the data set."""
    names = [shipped_node("dataset", name)["domains"] or [] for name in most_similar(dataset, choices("dataset"))]
    return names[0][int(number)] if names and number.isdigit() and int(number) < len(names[0]) else number
