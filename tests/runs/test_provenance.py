"""The provenance of a run: its code can be identified."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gsdg.runs import provenance as module
from gsdg.runs.provenance import PACKAGE, code_state, described_code, environment, git_state, same_code
from gsdg.runs.user_code import _own_path, code_files, fingerprint, own_modules, targets


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *words], cwd=folder, check=True)


def commit_of(folder: Path) -> dict:
    """A repository with one commit that holds a package."""
    (folder / "__init__.py").write_text("")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "m")
    return git_state(folder)


def test_a_change_of_the_package_is_dirty_unless_it_is_ignored(tmp_path):
    clean = commit_of(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "new.py").write_text("")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}
    (tmp_path / ".gitignore").write_text("new.py\n.gitignore\n")
    assert git_state(tmp_path) == clean
    (tmp_path / "__init__.py").write_text("x = 1")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_only_files_of_the_package_count(tmp_path):
    for name in ("package", "site"):
        (tmp_path / name).mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    commit_of(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "site" / "__init__.py").write_text("")
    assert git_state(tmp_path / "package")["dirty"] is False
    assert git_state(tmp_path / "site") == {"commit": None, "dirty": None}  # installed inside another checkout


@pytest.mark.skipif(os.geteuid() != 0, reason="giving a folder to another user needs root")
def test_a_checkout_that_another_user_owns_still_has_a_commit(tmp_path):
    """git refuses it ("dubious ownership"), but its code runs anyway."""
    clean = commit_of(tmp_path)
    for path in [tmp_path, *tmp_path.rglob("*")]:
        os.chown(path, 65534, 65534)
    refused = subprocess.run(["git", "status"], cwd=tmp_path, capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    assert git_state(tmp_path) == clean


def test_an_error_of_git_is_not_taken_for_a_missing_checkout(tmp_path):
    commit_of(tmp_path)
    (tmp_path / ".git" / "index").write_bytes(b"damaged")
    state = git_state(tmp_path)
    assert (state["commit"], state["dirty"]) == (None, None)
    assert "index" in state["git"]
    assert "commit unknown, git says: " in described_code({"code": "abc", **state})


def test_versions_host_processor_and_command_are_noted():
    noted = environment()
    assert {"torch", "numpy", "hydra-core"} <= set(noted["packages"])
    assert all(noted[key] for key in ("host", "processor", "command"))


# ---- the user's own code --------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder on the import path: a module, a module that it imports, a package, and a module that is not imported."""
    folder = tmp_path / "own"
    (folder / "gsdg_test_package" / "inner").mkdir(parents=True)
    imports = "import torch, os\nfrom gsdg.utils.errors import UserError\nimport gsdg_test_too\n"
    (folder / "gsdg_test_net.py").write_text(imports)
    (folder / "gsdg_test_too.py").write_text("def f():\n    from gsdg_test_package.inner import x\n")
    (folder / "gsdg_test_unused.py").write_text("")
    for file in ("__init__.py", "inner/__init__.py", "inner/x.py", ".hidden/x.py", "weights.bin"):
        (folder / "gsdg_test_package" / file).parent.mkdir(exist_ok=True)
        (folder / "gsdg_test_package" / file).write_text("")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    _own_path.cache_clear()
    return folder


CONFIG = {
    "model": {"_target_": "gsdg.models.Classifier", "backbone": {"_target_": "gsdg_test_net.Net"}},
    "optimizer": {"_target_": "torch.optim.Adam"},
    "trainer": {"_target_": "gsdg.trainer.Trainer", "hooks": [{"_target_": "os.path.join"}]},
}


def test_every_target_in_a_config_is_found():
    names = "gsdg.models.Classifier gsdg_test_net.Net torch.optim.Adam gsdg.trainer.Trainer os.path.join"
    assert set(targets(CONFIG)) == set(names.split())


def test_the_users_own_modules_are_those_named_and_those_they_import(own):
    assert own_modules(CONFIG) == {
        "gsdg_test_net": own / "gsdg_test_net.py",
        "gsdg_test_package": own / "gsdg_test_package",
        "gsdg_test_too": own / "gsdg_test_too.py",
    }
    assert own_modules([{"a": {"_target_": "gsdg_test_too.f"}}, CONFIG]) == own_modules(CONFIG)
    assert own_modules({"a": {"_target_": "gsdg_test_nowhere.f"}}) == {}


def test_the_fingerprint_of_a_package_is_of_its_python_files(own):
    package = own / "gsdg_test_package"
    names = [path.relative_to(package).as_posix() for path in code_files(package)]
    assert names == ["__init__.py", "inner/__init__.py", "inner/x.py"]
    before = fingerprint(package, code_files(package))
    (package / "weights.bin").write_text("other")
    (package / ".hidden" / "x.py").write_text("other")
    assert fingerprint(package, code_files(package)) == before
    (package / "inner" / "x.py").write_text("other")
    assert fingerprint(package, code_files(package)) != before


def test_each_own_module_has_a_fingerprint_in_the_state_of_the_code(own):
    before = code_state(CONFIG)
    assert set(before["modules"]) == {"gsdg_test_net", "gsdg_test_too", "gsdg_test_package"}
    assert before["code"] == code_state()["code"]
    (own / "gsdg_test_package" / "inner" / "x.py").write_text("y = 1")
    after = code_state(CONFIG)
    changed = {name for name in after["modules"] if after["modules"][name] != before["modules"][name]}
    assert changed == {"gsdg_test_package"}
    assert not same_code(before, after)
    assert same_code(before, dict(before, commit="other"))
    assert "with gsdg_test_net" in described_code(after)


def test_an_own_module_that_is_not_committed_makes_the_state_dirty(own, monkeypatch):
    monkeypatch.setattr(module, "git_state", lambda folder: {"commit": "1" * 40, "dirty": False})
    git(own, "init", "-q")
    git(own, "add", ".")
    git(own, "commit", "-qm", "m")
    assert code_state(CONFIG)["dirty"] is False
    (own / "gsdg_test_unused.py").write_text("changed")
    assert code_state(CONFIG)["dirty"] is False
    (own / "gsdg_test_too.py").write_text("changed = 1")
    assert code_state(CONFIG)["dirty"] is True
    git(own, "commit", "-qam", "m")
    assert code_state(CONFIG)["dirty"] is False
    (own / "gsdg_test_package" / "untracked.py").write_text("")
    own_modules(CONFIG)
    assert code_state({"a": {"_target_": "gsdg_test_package.f"}})["dirty"] is True


def test_installed_modules_are_not_the_users_own(tmp_path, monkeypatch):
    place = tmp_path / "lib" / "site-packages"
    place.mkdir(parents=True)
    (place / "gsdg_test_installed.py").write_text("")
    monkeypatch.syspath_prepend(str(place))
    importlib.invalidate_caches()
    _own_path.cache_clear()
    assert own_modules({"a": {"_target_": "gsdg_test_installed.f"}}) == {}


def test_the_fingerprint_of_gsdg_is_of_all_its_files():
    assert (PACKAGE / "data" / "digits.npz") in code_files(PACKAGE, "*")
    assert sys.modules["gsdg"].__file__ in map(str, code_files(PACKAGE, "*"))
