"""Image folders are read in torchvision's order, and every fault is reported with its path."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from gsdg.data.image_io import EXTENSIONS
from gsdg.data.loader import EvaluationLoader, TrainBatches, train_loader
from gsdg.data.transforms_exact import Exact
from gsdg.types import ImageSpec
from gsdg.utils.errors import UserError
from tests.data.samples import image_folders, write_image, write_tree

SPEC = ImageSpec(size=8, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "toy", domains=("photo", "sketch"), suffix="jpg")


def check_refused(root: Path, message: str, /, *, at_once: bool = False, **changes) -> None:
    """at_once: by the constructor; otherwise when the folders are read."""
    with pytest.raises(UserError, match=message):
        image_folders(root, **changes) if at_once else image_folders(root, **changes).read()


def test_order_labels_and_extensions_are_torchvisions_image_folder(root):
    assert datasets.folder.IMG_EXTENSIONS == EXTENSIONS
    # sorted as text, "n-x" comes before "n/x"; only a walk that sorts folder by folder has torchvision's order
    for i, name in enumerate(["B.PNG", "a.jpeg", "10.png", "9.png", "n/1.jpg", "n/x/1.jpg", "n-x/1.jpg", "Z/0.webp"]):
        write_image(root / "photo" / "dog" / name, 100 + i)
    (root / "photo" / "dog" / "notes.txt").write_text("not an image")
    domain = image_folders(root).read().domains["photo"]
    theirs = datasets.ImageFolder(root / "photo")
    assert len(domain) == len(theirs) == 14
    assert domain.labels.tolist() == theirs.targets
    for i in range(len(domain)):
        assert domain.load(i).tobytes() == theirs[i][0].tobytes()


HIDDEN = ("._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg", "__MACOSX/dog/0.jpg", "deep/@eaDir/0.jpg", ".a/b/0.jpg")


def test_hidden_files_and_folders_are_no_images_and_their_number_is_logged(root, caplog):
    """As left by macOS, Jupyter and network drives: splits, labels and files are those of the tree without them."""
    clean = image_folders(root).read()
    for name in HIDDEN:
        write_image(root / "photo" / "dog" / name)
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "deep/.DS_Store"):
        (root / "photo" / "dog" / name).write_text("not an image")
    write_image(root / "__MACOSX" / "dog" / "0.jpg")
    write_image(root / "photo" / "__MACOSX" / "0.jpg")
    (root / "sketch" / ".ipynb_checkpoints").mkdir()
    dataset = image_folders(root).read()
    for name, domain in clean.domains.items():
        assert dataset.domains[name].files == domain.files
        assert dataset.domains[name].labels.tolist() == domain.labels.tolist()
    assert [record.getMessage() for record in caplog.records] == [
        f"photo: 5 hidden images left out, such as {root}/photo/dog/._0.jpg"
    ]


def test_links_to_folders_that_contain_them_are_refused(root, tmp_path):
    for place in ("photo/cat/up", "photo/cat/deep/up", "photo/up", "up"):
        for above in ("", ".."):
            link = root / place
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(root / above, target_is_directory=True)
            check_refused(root, rf"{place} is a link to .*which contains the link.*\bRemove the link: rm /")
            link.unlink()
            assert len(image_folders(root, domains=["photo"]).read().domains["photo"]) == 6
    for name, other in (("first", "second"), ("second", "first")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "to").symlink_to(tmp_path / other)
    (root / "photo" / "cat" / "more").symlink_to(tmp_path / "first")
    check_refused(root, "photo/cat/more/to/to is a link to .*first, which contains the link")


def test_links_to_other_folders_are_followed(root, tmp_path):
    """A dataset made of links to domains, to classes, to folders in a class, and to images."""
    store = tmp_path / "store"
    write_image(store / "many" / "a.jpg")
    (root / "photo" / "cat" / "many").symlink_to(store / "many")
    (root / "photo" / "cat" / "z.jpg").symlink_to(store / "many" / "a.jpg")
    for place, name in ((root / "sketch", "sketch"), (root / "sketch" / "dog", "dog")):
        place.rename(store / name)
        place.symlink_to(store / name)
    dataset = image_folders(root).read()
    assert [os.path.relpath(file, root) for file in dataset.domains["photo"].files[:5]] == [
        *(f"photo/cat/{name}" for name in ("0.jpg", "1.jpg", "2.jpg", "z.jpg")),
        "photo/cat/many/a.jpg",
    ]
    assert len(dataset.domains["sketch"]) == 6


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_folder_that_may_not_be_listed_is_named(root):
    """Its images would be missing silently. Root may list everything, so the test runs as another user."""
    write_image(root / "photo" / "cat" / "closed" / "0.jpg")
    (root / "photo" / "cat" / "closed").chmod(0)
    for folder in (root, *root.parents):
        mode = folder.stat().st_mode
        if folder.stat().st_uid == 0 and folder != Path("/") and mode & 0o055 != 0o055:
            folder.chmod(mode | 0o055)
    reader, writer = os.pipe()
    if not (pid := os.fork()):
        os.setuid(65534)
        try:
            image_folders(root).read()
        except UserError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    with os.fdopen(reader) as answer:
        assert answer.read().startswith(f"cannot list the folder {root}/photo/cat/closed (Permission denied): ")


def test_domains_are_the_sorted_folders_unless_they_are_named(root):
    (root / ".ipynb_checkpoints").mkdir()
    (root / "readme.txt").write_text("")
    assert image_folders(root).domains == ["photo", "sketch"]
    dataset = image_folders(root, domains=["sketch", "photo"]).read()
    assert list(dataset.domains) == ["sketch", "photo"]
    assert dataset.classes == ["cat", "dog"]
    absent = root.parent / "absent"
    assert image_folders(root, root=str(root), data_dir=str(absent)).domains == ["photo", "sketch"]
    assert image_folders(absent, domains=["b", "a"]).domains == ["b", "a"], "named domains need no look at the disk"


def test_missing_folders_are_named_with_what_is_there(root):
    pacs = {"root": "PACS", "domains": ["photo"]}
    message = r"data_dir=.*absent is not a folder\. Set data_dir=\.\.\. .*holds PACS"
    check_refused(root, message, **pacs, data_dir=str(root.parent / "absent"))
    check_refused(root, r"PACS is not a folder\..* holds: toy\. Set data_dir", **pacs)
    check_refused(root, r"PACS is not a folder\.", at_once=True, root="PACS")
    message = r"no folder for domain cartoon in .*toy\. Found: photo, sketch\."
    check_refused(root, message, domains=["cartoon", "photo"])
    empty = root.parent / "empty"
    empty.mkdir()
    check_refused(empty, r"no domain folders in .*empty\.", at_once=True)
    (empty / "photo").mkdir()
    check_refused(empty, r"no images in .*empty\. Layout: <domain>/<class>/<image>")


def test_classes_that_differ_between_domains_and_empty_ones_are_named(root):
    write_image(root / "photo" / "horse" / "0.jpg")
    (root / "sketch" / "cat").rename(root / "sketch" / "cats")
    check_refused(root, r"classes differ .*: photo lacks cats; sketch lacks cat, horse\. ")
    (root / "sketch" / "cats").rename(root / "sketch" / "cat")
    (root / "sketch" / "horse").mkdir()
    (root / "sketch" / "horse" / "0.txt").write_text("")
    check_refused(root, r"no images in .*sketch/horse\. .*at least one image \(\.jpg, ")


def test_with_classes_union_a_domain_may_lack_classes(root):
    """Labels are those of the union in every domain; a class that no domain has is refused."""
    for label in ("ant", "zebra"):
        write_image(root / "photo" / label / "0.jpg")
    (root / "sketch" / "zebra").mkdir()
    check_refused(root, r"sketch lacks ant\. .*dataset\.classes=union\.")
    dataset = image_folders(root, classes="union").read()
    assert dataset.classes == ["ant", "cat", "dog", "zebra"]
    assert dataset.domains["photo"].labels.tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert dataset.domains["sketch"].labels.tolist() == [1, 1, 1, 2, 2, 2]
    (root / "photo" / "zebra" / "0.jpg").unlink()
    check_refused(root, r"no domain of .* has images of zebra", classes="union")


def test_bad_arguments_are_refused_at_once(root):
    for changes in ({"domains": []}, {"domains": ["photo", "photo"]}, {"augment": "photo"}, {"classes": "all"}):
        check_refused(root, r"dataset\.(domains=|augment is|classes is)", at_once=True, **changes)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_through_the_loaders(root, workers):
    path = write_image(root / "sketch" / "dog" / "1.jpg", size=(64, 64))
    path.write_bytes(b"" if workers else path.read_bytes()[:-1000])
    dataset, transform = image_folders(root).read(), Exact(SPEC, "none")
    every = {name: np.arange(len(domain)) for name, domain in dataset.domains.items()}
    batches = TrainBatches(dataset, every, transform=transform, batch_size=8, seed=0, steps=50)
    here = {"workers": workers, "device": torch.device("cpu"), "memory_format": torch.contiguous_format}
    evaluation = EvaluationLoader(dataset, {"sketch": transform}, batch_size=4, **here)({"sketch": every["sketch"]}, 0)
    for loader in (train_loader(batches, 0, **here), evaluation):
        with pytest.raises(UserError) as caught:
            list(loader)
        assert str(caught.value).startswith(f"cannot read image {path} ")
        assert "Traceback" not in str(caught.value)
