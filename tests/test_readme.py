"""The README and the pages of docs/ are correct: commands compose or parse, Python runs, files and links exist.

An indented line that begins like a command is one, wherever it stands; `\\` continues it on the next line.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from glob import glob
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from helpers import REPOSITORY, SMALL, in_case
from PIL import Image
from torch import nn

from gsdg import export, extend, predict, soup
from gsdg import log as log_command
from gsdg.analysis import __main__ as analysis_commands
from gsdg.config.choices import choices, groups
from gsdg.data import __main__ as data_commands
from gsdg.evaluate import __main__ as evaluate_command
from gsdg.evaluate import images
from gsdg.runs import __main__ as runs_commands
from gsdg.sweep import __main__ as sweep_commands

README = REPOSITORY / "README.md"
DOCS = REPOSITORY / "docs"
PAGES = {path.relative_to(REPOSITORY).as_posix(): path.read_text() for path in [README, *sorted(DOCS.rglob("*.md"))]}
EVERYTHING = "\n".join(PAGES.values())
LAUNCHERS = ("python launch.py", "OMP_NUM_THREADS=1 python launch.py", "PYTHONPATH=. gsdg")
MODULES = {  # python -m NAME, and what parses its words
    module.__name__.removesuffix(".__main__"): module
    for module in (export, extend, log_command, predict, runs_commands, soup)
}
OTHERS = ("python -m gsdg.data", "python -m gsdg.sweep", "python -m gsdg.evaluate", "python -m analysis")
CHECKED = (*LAUNCHERS, *OTHERS, *(f"python -m {name}" for name in MODULES), "pip install", "make ", ". .venv/")
FILES = re.compile(
    r"(?<![\w/.<])(?:gsdg|conf|docs|tests|benchmarks|analysis|hydra_plugins|examples)/[\w./*{},-]*[\w*}]"
)
OTHER_PLACES = {"docs/how-to/own_code.md": "conf/algorithm/my_algorithm"}  # in the folder of a user


def commands(program: str | tuple[str, ...] = "", text: str = EVERYTHING) -> list[str]:
    """The commands that begin with these words."""
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    return [line for line in lines if line.startswith(program)]


def python_blocks(word: str = "") -> list[str]:
    """The blocks of Python that have this word."""
    blocks = re.findall(r"```python\n(.*?)```", EVERYTHING, flags=re.DOTALL)
    return [code for code in blocks if word in code]


def overrides(page: str) -> list[str]:
    """The overrides in the second column of a page's tables of flags."""
    rows = [line for line in PAGES[page].splitlines() if line.startswith(("| `--", "| (", "| what", "| without"))]
    return [code for row in rows for code in re.findall(r"`([^`]*)`", row.split("|")[2])]


def first_values(command: str) -> list[str]:
    """The overrides of a command; for a sweep those of its first run."""
    words = [word for word in shlex.split(command)[2:] if not word.startswith("-")]
    words = [re.sub(r"=range\((\d+),\d+\)$", r"=\1", word) for word in words if "=" in word]
    words = [re.sub(r"=(tag\(log,)?interval\(([^,]+),.*", r"=\2", word) for word in words]
    return [word if "[" in word else word.split(",")[0] for word in words]


# ---- commands --------------------------------------------------------------------------------------------------------


def test_every_command_is_of_a_kind_that_a_test_checks():
    looks_like = re.compile(r"(python|pip|make|gsdg|[A-Z_]+=\S+|\.|sbatch|srun) ")
    for page, text in PAGES.items():
        with in_case(page):
            assert [
                line for line in commands(text=text) if looks_like.match(line) and not line.startswith(CHECKED)
            ] == []
            fenced = "\n".join(re.findall(r"^```(?!python|yaml).*?^```", text, flags=re.DOTALL | re.MULTILINE))
            assert not re.search(r"^(python|pip|make|gsdg) ", fenced, flags=re.MULTILINE), "indent commands"


def test_every_command_parses_and_its_overrides_compose(compose):
    launched = [command.removeprefix("OMP_NUM_THREADS=1 ") for command in commands(LAUNCHERS[:2])]
    for command in launched:
        with in_case(command):
            compose(*first_values(command))
    for command in commands("python -m gsdg.data"):
        with in_case(command):
            options = data_commands.parse(shlex.split(command)[3:])
            assert data_commands.compose_config(options).data_dir == "/data"
    for command in commands("python -m gsdg.sweep"):
        with in_case(command):
            options = sweep_commands.options(shlex.split(command)[3:])
            if not hasattr(options, "runs_dir"):  # a sweep that is not submitted yet: its words are those of launch.py
                compose(*first_values(command))
    for command in commands("python -m analysis"):
        with in_case(command):
            analysis_commands.parse_arguments(shlex.split(command)[3:])
    for name, module in MODULES.items():
        assert commands(f"python -m {name}"), name
        for command in commands(f"python -m {name}"):
            with in_case(command):
                module.parser().parse_args(shlex.split(command)[3:])
    for command in commands("python -m gsdg.evaluate"):
        with in_case(command):
            options = evaluate_command.parse(shlex.split(command)[3:])
            images.compose(options.overrides, adapt=options.adapt, config_dir=None)
    assert len(launched) >= 30
    assert len(commands("python -m gsdg.data")) >= 7


def test_what_make_and_pip_are_given_exists():
    made = set(re.findall(r"^\.PHONY: (.*)", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)[0].split())
    setup = (REPOSITORY / "setup.cfg").read_text().split("[options.extras_require]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) =$", setup, flags=re.MULTILINE))
    targets = [command.split()[1] for command in commands("make ")] + re.findall(r"`make (\w+)`", EVERYTHING)
    assert {"demo", "docs"} <= set(targets) <= made
    named = re.findall(r"install -e '\.\[([\w,]+)\]'", EVERYTHING) + re.findall(r"extras? `(\w+)`", EVERYTHING)
    assert {"search", "plots"} < {name for names in named for name in names.split(",")} <= extras
    table = PAGES["docs/index.md"].split("| extra |")[1]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == extras


def test_modules_that_are_run_exist():
    for name in set(re.findall(r"python -m ([\w.]+)", EVERYTHING)):
        with in_case(name):
            assert importlib.util.find_spec(name), name
    for path in set(re.findall(r"python ((?:\w+/)+\w+\.py)", EVERYTHING)):
        assert (REPOSITORY / path).is_file(), path


def test_a_translated_flag_is_a_real_override(compose):
    release, domainbed = overrides("docs/how-to/from_the_release.md"), overrides("docs/how-to/from_domainbed.md")
    assert {"algorithm.n_parts=10", "model.head=none"} < set(release)
    assert {"split.target=sketch", "trainer.keep=every"} < set(domainbed)
    for override in [*release, *domainbed]:
        with in_case(override):
            compose("dataset=pacs", *override.replace("=D", "=/data").split())


# ---- blocks of Python ------------------------------------------------------------------------------------------------


def test_every_block_of_python_is_run_by_a_test():
    tested = [*python_blocks("surgery.backward"), *python_blocks("gsdg.load"), *python_blocks("class MyAlgorithm")]
    assert sorted(tested) == sorted(python_blocks())


@pytest.mark.parametrize("code", python_blocks("surgery.backward"))
def test_the_lines_for_your_own_loop_train(code):
    torch.manual_seed(0)
    model, targets = nn.Linear(6, 3), torch.randint(3, (3, 8))
    images = torch.randn(3, 8, 6)
    loss = nn.CrossEntropyLoss()
    before = sum(loss(model(x), y) for x, y in zip(images, targets, strict=True)).item()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    loader = [list(zip(images, targets, strict=True))] * 20
    exec(code, {"model": model, "loader": loader, "loss": loss, "optimizer": optimizer})
    assert sum(loss(model(x), y) for x, y in zip(images, targets, strict=True)).item() < before - 0.1


def test_the_lines_that_load_a_run_predict(train, tmp_path):
    folder, photo = train("trainer.steps=1"), tmp_path / "photo.png"
    Image.new("RGB", (30, 20)).save(photo)
    assert len(python_blocks("gsdg.load")) == 2
    for code in python_blocks("gsdg.load"):
        names = {}
        exec(code.replace("runs/4f2d99ea7668", str(folder)).replace("photo.jpg", str(photo)), names)
        assert names["labels"][0] in names["predictor"].classes
        assert names["probabilities"].shape == (1, 10)


def test_the_algorithm_outside_the_repository_trains(launch_here, tmp_path, monkeypatch):
    (code,) = python_blocks("class MyAlgorithm")
    (node,) = re.findall(r"```yaml\n(.*?)```", PAGES["docs/how-to/own_code.md"], flags=re.DOTALL)
    (command,) = commands("PYTHONPATH=. gsdg")
    for name, text in {"mine/algorithm.py": code, "conf/algorithm/my_algorithm.yaml": node}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    words = [word for word in SMALL if not word.startswith("split.target")]
    done = launch_here(*shlex.split(command)[2:], *words, "trainer.steps=1")
    assert done.returncode == 0, done.stderr
    (records,) = tmp_path.glob("runs/*/records.jsonl")
    assert '"penalty"' in records.read_text()


# ---- files, links, the site ------------------------------------------------------------------------------------------


def test_the_files_that_a_page_names_exist():
    for page, text in PAGES.items():
        prose = re.sub(r"^    [^\n]*$|^```.*?^```|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(r"`([^`\n]+)`", prose):
            for name in FILES.findall(code):
                if "NAME" in name or re.match(OTHER_PLACES.get(page, "$"), name):
                    continue
                with in_case(page, name):
                    alternatives = re.search(r"\{(.*?)\}", name)
                    options = alternatives.group(1).split(",") if alternatives else [""]
                    for option in [option for option in options if option != "..."]:
                        path = re.sub(r"\{.*?\}", option, name)
                        assert glob(str(REPOSITORY / path)) or glob(str(REPOSITORY / f"{path}.yaml")), path


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_links_lead_to_a_page_and_a_heading_that_exist():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            with in_case(page, target):
                path, _, anchor = target.partition("#")
                linked = (REPOSITORY / page).parent / path if path else REPOSITORY / page
                assert linked.is_file()
                assert not anchor or anchor in anchors(linked.read_text())


def test_the_readme_is_short_and_every_page_is_in_the_navigation():
    assert len(README.read_text().splitlines()) <= 130
    assert (DOCS / "images" / "report.png").stat().st_size < 200_000
    navigation = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages_of(navigation)) == sorted(page.removeprefix("docs/") for page in PAGES if page != "README.md")


def pages_of(navigation: list | str) -> list[str]:
    if isinstance(navigation, str):
        return [navigation]
    return [page for entry in navigation for value in entry.values() for page in pages_of(value)]


@cache
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", DOCS / "mkdocs_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_choice_of_conf_is_in_the_reference_with_a_sentence():
    text = hooks().on_page_markdown(PAGES["docs/reference/config_groups.md"])
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    left_out = {
        group for group in groups() if re.match("experiment/|experiment_algorithm|dataset_trainer|hydra/job", group)
    }
    assert set(sections) == set(groups()) - left_out
    for group, section in sections.items():
        rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, flags=re.MULTILINE))
        assert set(rows) == choices(group), group
        assert all(len(sentence) > 3 for sentence in rows.values()), group


def test_a_summary_is_the_first_sentence_before_a_command():
    first = hooks().first_sentence
    assert first(["# @package _global_", "# PACS (Li et al. 2017, v1.0) is", "# split. More.", "x: 1"]) == (
        "PACS (Li et al. 2017, v1.0) is split."
    )
    assert first(["# A sweep:", "#   python launch.py -m ...", "# More."]) == "A sweep"
    assert first(["x: 1", "# no heading"]) == ""


def test_pages_beside_the_code_are_included():
    page = hooks().on_page_markdown
    for name in PAGES:
        if "<!-- include" in PAGES[name]:
            assert "<!--" not in page(PAGES[name]), name
    assert "**`there is no SLURM here`**" in page(PAGES["docs/troubleshooting.md"])
    sweeps = page(PAGES["docs/reference/sweeps.md"])
    assert "## What happens" in sweeps
    assert "## Symptoms" not in sweeps
    assert "| `coral` |" in page(PAGES["docs/reference/algorithms.md"])


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_the_internet(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        package = name.partition(".")[0]
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=["']https?:""", path.read_text()), path
    python = Path(tmp_path, "site", "reference", "python.html").read_text()
    assert 'id="gsdg.surgery.GradSurgery"' in python
    assert 'id="gsdg.predict.load"' in python
