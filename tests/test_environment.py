"""A number can be traced to the code that made it."""

from __future__ import annotations

import subprocess

from gsdg.environment import environment, git_state


def commit_of(folder) -> dict:
    """A repository with one commit that holds a package."""
    (folder / "__init__.py").write_text("")
    for command in ("init -q", "add .", "-c user.name=n -c user.email=e commit -qm m"):
        subprocess.run(["git", *command.split()], cwd=folder, check=True)
    return git_state(folder)


def test_a_changed_tree_is_dirty(tmp_path):
    clean = commit_of(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "__init__.py").write_text("x = 1")
    assert git_state(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_a_package_installed_inside_another_checkout_has_no_commit(tmp_path):
    commit_of(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "__init__.py").write_text("")
    assert git_state(tmp_path / "site") == {"commit": None, "dirty": None}


def test_versions_host_and_command_are_noted():
    found = environment()
    assert {"torch", "numpy", "hydra-core"} <= set(found["packages"])
    assert found["host"]
    assert found["command"]
