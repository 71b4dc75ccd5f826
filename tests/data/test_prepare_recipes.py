"""Each data set's tree comes out of archives, folders and shards of the structure in which it is published."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchvision import datasets

from gsdg.data.folders import ImageFolders
from gsdg.data.mnist import RotatedMNIST
from gsdg.data.prepare import mnist, prepare, recipes
from gsdg.errors import UserError

CONF = Path(__file__).parents[2] / "conf" / "dataset"
PACS = ("art_painting", "cartoon", "photo", "sketch")
ANIMALS = ("dog", "elephant")


def config(name: str, data_dir: Path) -> DictConfig:
    return OmegaConf.create({"data_dir": str(data_dir), "dataset": OmegaConf.load(CONF / f"{name}.yaml")})


def jpeg(shade: int, form: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def tree(*, top: str, domains: tuple[str, ...], classes: tuple[str, ...], each: int = 2) -> dict[str, bytes]:
    """path -> image, each image another: after its end it has its own path."""
    names = [f"{top}{d}/{c}/{i}.jpg" for d in domains for c in classes for i in range(each)]
    return {name: jpeg(0) + name.encode() for name in names}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made(name: str, tmp_path: Path, given: Path) -> str:
    report = prepare(config(name, tmp_path / "data"), given=given, source=None, accept_counts=True)
    root = config(name, tmp_path).dataset.root
    assert os.listdir(tmp_path / "data") == [root], "something is left beside it"
    return report


def final(name: str, tmp_path: Path) -> dict[str, bytes]:
    return contents(tmp_path / "data" / config(name, tmp_path).dataset.root)


def test_pacs_from_its_zip_without_what_macos_adds(tmp_path):
    files = tree(top="pacs/data/kfold/", domains=PACS, classes=ANIMALS)
    junk = tree(top="__MACOSX/kfold/", domains=PACS, classes=("._dog",)) | {
        "pacs/data/kfold/photo/dog/.DS_Store": b"?",
        "pacs/data/kfold/photo/dog/._0.jpg": b"?",
        "pacs/data/kfold/photo/dog/Thumbs.db": b"?",
    }
    report = made("pacs", tmp_path, zipped(tmp_path / "anything.zip", junk | files))
    assert final("pacs", tmp_path) == {
        name.removeprefix("pacs/data/kfold/"): content for name, content in files.items()
    }
    assert f"pacs: {tmp_path}/data/PACS\n  16 images, 2 classes: art_painting 4, cartoon 4, photo 4, sketch 4" in report
    assert report.endswith(
        f"Next: python -m gsdg.data verify pacs data_dir={tmp_path}/data\n"
        f"Then: python launch.py dataset=pacs model=resnet18 split.target=art_painting data_dir={tmp_path}/data"
    )


def test_what_was_made_is_what_a_run_reads(tmp_path):
    made("pacs", tmp_path, zipped(tmp_path / "x.zip", tree(top="", domains=PACS, classes=ANIMALS, each=3)))
    kept = {"name": "pacs", "root": "PACS", "domains": None, "augment": "photos"}
    dataset = ImageFolders(**kept, data_dir=str(tmp_path / "data")).read()
    assert (list(dataset.domains), dataset.classes, len(dataset.domains["photo"])) == ([*PACS], [*ANIMALS], 6)


def test_a_given_folder_is_found_at_any_depth_and_stays_as_it_is(tmp_path):
    files = tree(top="deep/er/PACS/", domains=PACS, classes=ANIMALS) | {
        "deep/er/PACS/photo/dog/more/1.png": jpeg(9, "png"),
        "deep/er/PACS/photo/dog/.hidden/1.png": jpeg(9, "png"),
        "deep/readme.txt": b"hello",
        "archive.zip": b"not looked at",
    }
    given = write(tmp_path / "given", files)
    before = {path: path.stat().st_mtime_ns for path in given.rglob("*") if path.is_file()}
    made("pacs", tmp_path, given)
    assert contents(given) == files
    assert {path: path.stat().st_mtime_ns for path in before} == before
    wanted = {name.removeprefix("deep/er/PACS/"): content for name, content in files.items() if "PACS" in name}
    del wanted["photo/dog/.hidden/1.png"]
    assert final("pacs", tmp_path) == wanted


def test_of_two_trees_the_nearest_to_the_top_is_taken(tmp_path):
    files = tree(top="m/PACS/", domains=PACS, classes=ANIMALS, each=1)
    older = tree(top="a/b/PACS/", domains=PACS, classes=ANIMALS, each=3) | tree(
        top="z/b/PACS/", domains=PACS, classes=ANIMALS, each=3
    )
    made("pacs", tmp_path, write(tmp_path / "given", files | older))
    assert final("pacs", tmp_path) == {name.removeprefix("m/PACS/"): content for name, content in files.items()}


def test_a_folder_on_another_disk_is_copied(tmp_path):
    elsewhere = Path("/dev/shm") / f"gsdg_{os.getpid()}"
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system at /dev/shm")
    files = tree(top="", domains=PACS, classes=ANIMALS)
    try:
        made("pacs", tmp_path, write(elsewhere, files))
        assert contents(elsewhere) == files == final("pacs", tmp_path)
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)


def test_images_reached_through_links_are_real_files_afterwards(tmp_path):
    real = write(tmp_path / "real", tree(top="", domains=PACS, classes=ANIMALS))
    given = tmp_path / "given"
    given.mkdir()
    for domain in PACS[1:]:
        (given / domain).symlink_to(real / domain)
    (given / PACS[0] / "dog").mkdir(parents=True)
    (given / PACS[0] / "elephant").symlink_to(real / PACS[0] / "elephant")
    for name in ("0.jpg", "1.jpg"):
        (given / PACS[0] / "dog" / name).symlink_to(real / PACS[0] / "dog" / name)
    made("pacs", tmp_path, given)
    assert final("pacs", tmp_path) == contents(real)
    assert not any(path.is_symlink() for path in (tmp_path / "data").rglob("*"))


VLCS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
FIVE = ("bird", "car", "chair", "dog", "person")


def test_vlcs_from_its_tar_gz(tmp_path):
    files = tree(top="VLCS/", domains=VLCS, classes=FIVE)
    made("vlcs", tmp_path, tarred(tmp_path / "x.tgz", files))
    assert final("vlcs", tmp_path) == {name.removeprefix("VLCS/"): content for name, content in files.items()}


def test_vlcs_in_numbered_classes_takes_full_and_no_other_split(tmp_path):
    others, numbers = ("CALTECH", "LABELME", "SUN", "PASCAL"), ("0", "1", "2", "3", "4")
    given = {}
    for split in ("crossval", "full", "test", "train"):
        for domain in others:
            given |= tree(top=f"VLCS/{domain}/", domains=(split,), classes=numbers, each=1)
    made("vlcs", tmp_path, zipped(tmp_path / "x.zip", given))
    wanted = {
        f"{domain}/{label}/0.jpg": given[f"VLCS/{other}/full/{number}/0.jpg"]
        for domain, other in zip(VLCS, others, strict=True)
        for label, number in zip(FIVE, numbers, strict=True)
    }
    assert final("vlcs", tmp_path) == wanted


@pytest.mark.parametrize("spelt", ["Real World", "RealWorld", "Real_World", "real-world"])
def test_officehome_whatever_the_real_world_is_called(tmp_path, spelt):
    top = "OfficeHomeDataset_10072016/"
    files = tree(top=top, domains=("Art", "Clipart", "Product", spelt), classes=("Alarm_Clock", "TV"))
    extras = {f"{top}ImageInfo.csv": b"a,b", f"{top}imagelist.txt": b"x"}
    made("officehome", tmp_path, zipped(tmp_path / "x.zip", files | extras))
    wanted = {name.removeprefix(top).replace(f"{spelt}/", "Real World/"): content for name, content in files.items()}
    assert final("officehome", tmp_path) == wanted


def test_two_folders_for_one_domain_are_refused(tmp_path):
    domains = ("Art", "Clipart", "Product", "Real World", "RealWorld")
    given = write(tmp_path / "given", tree(top="", domains=domains, classes=("TV",)))
    with pytest.raises(UserError, match=r"given: Real World and RealWorld both stand for domain Real World\."):
        made("officehome", tmp_path, given)


def test_names_that_only_look_like_domains_do_not_stop_the_search(tmp_path):
    files = tree(top="OfficeHome/", domains=("Art", "Clipart", "Product", "Real World"), classes=("TV",))
    given = write(tmp_path / "given", files | {"art/x.txt": b"", "Art/x.txt": b""})
    made("officehome", tmp_path, given)
    assert len(final("officehome", tmp_path)) == 8


# --- TerraIncognita

TERRA_PARTS = ("cis_test", "cis_val", "train", "trans_test", "trans_val")
TEN = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate((*TEN, "car", "rodent"))]


def terra_files(top: str = "eccv_18_all_images_sm/") -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """(images, the five annotation files, the tree that comes of them)."""
    images, wanted, notes = {}, {}, {part: {"images": [], "annotations": []} for part in TERRA_PARTS}
    for i in range(72):
        location = ("38", 46, "100", 43, "33", 7)[i % 6]  # the last two are not of the benchmark
        part = notes[TERRA_PARTS[i % 5]]
        name, first, second = f"{i:04d}-a.jpg", i // 6, (i // 6 + 1) % 12  # 10 and 11 are not of the benchmark
        images[top + name] = jpeg(i) + name.encode()
        part["images"].append({"id": f"id{i}", "file_name": name, "location": location})
        part["annotations"].append({"image_id": f"id{i}", "category_id": first, "id": i})
        part["annotations"].append({"image_id": f"id{i}", "category_id": first, "id": 1000 + i})  # a second box
        categories = {first, second} if i % 4 == 0 else {first}
        if i % 4 == 0:
            part["annotations"].append({"image_id": f"id{i}", "category_id": second, "id": 2000 + i})
        for category in categories:
            if str(location) in ("38", "46", "100", "43") and category < 10:
                wanted[f"location_{location}/{TEN[category]}/{name}"] = images[top + name]
    jsons = {
        f"eccv_18_annotation_files/{part}_annotations.json": json.dumps({**data, "categories": CATEGORIES}).encode()
        for part, data in notes.items()
    }
    return images, jsons, wanted


def merged(jsons: dict[str, bytes]) -> bytes:
    parts = [json.loads(content) for content in jsons.values()]
    both = {key: [item for part in parts for item in part[key]] for key in ("images", "annotations")}
    return json.dumps({**both, "categories": CATEGORIES}).encode()


def test_terra_from_its_two_archives(tmp_path):
    images, jsons, wanted = terra_files()
    tarred(tmp_path / "given" / "eccv_18_all_images_sm.tar.gz", images)
    tarred(tmp_path / "given" / "eccv_18_annotations.tar.gz", jsons)
    report = made("terraincognita", tmp_path, tmp_path / "given")
    assert final("terraincognita", tmp_path) == wanted
    assert any(name.endswith("0000-a.jpg") for name in wanted), "the first image has two categories"
    assert sum(name.endswith("0000-a.jpg") for name in wanted) == 2
    assert "left out" not in report


@pytest.mark.parametrize("name", ["caltech_camera_traps.json", "caltech_images_20190904.json"])
@pytest.mark.parametrize("form", ["zipped", "plain"])
def test_terra_from_the_older_single_annotation_file(tmp_path, name, form):
    images, jsons, wanted = terra_files("images/")
    given = write(tmp_path / "given", images)
    content = {name: merged(jsons)}
    write(given, content) if form == "plain" else zipped(given / f"{name}.zip", content)
    write(given, {"caltech_bboxes_20190904.json": b"{}", "other.json": b"?"})
    zipped(given / "unrelated.zip", {"a": b"a"})
    made("terraincognita", tmp_path, given)
    assert final("terraincognita", tmp_path) == wanted


def test_terra_counts_what_the_archive_lacks(tmp_path):
    images, jsons, wanted = terra_files()
    for gone in ("0000-a.jpg", "0001-a.jpg"):
        del images[f"eccv_18_all_images_sm/{gone}"]
    report = made("terraincognita", tmp_path, write(tmp_path / "given", images | jsons))
    assert final("terraincognita", tmp_path) == {
        name: content for name, content in wanted.items() if name[-10:] not in ("0000-a.jpg", "0001-a.jpg")
    }
    assert "2 annotated images are not in the archive, first 0000-a.jpg: left out" in report


def test_terra_says_which_part_is_not_there(tmp_path):
    images, jsons, _ = terra_files()
    with pytest.raises(
        UserError, match=r"no annotations found \(cis_test.*caltech_images.*\) in eccv_18_all_images_sm"
    ):
        made("terraincognita", tmp_path, write(tmp_path / "1", images))
    with pytest.raises(UserError, match="no images found"):
        made("terraincognita", tmp_path, write(tmp_path / "2", jsons))
    (first, content), *rest = jsons.items()
    with pytest.raises(UserError, match=r"annotations: only \['cis_val.* found of"):
        made("terraincognita", tmp_path, write(tmp_path / "3", images | dict(rest)))
    given = write(tmp_path / "4", images | dict(rest) | {first: content[:-20]})
    with pytest.raises(UserError, match=rf"{given / first} \([\d,]+ bytes\) is not a whole JSON file of annotations"):
        made("terraincognita", tmp_path, given)


def test_terra_as_a_ready_tree(tmp_path):
    _, _, wanted = terra_files()
    made("terraincognita", tmp_path, write(tmp_path / "given", wanted))
    assert final("terraincognita", tmp_path) == wanted


# --- DomainNet

SIX = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
LIST = "domain_net_duplicates.txt"


def domainnet() -> tuple[dict[str, bytes], bytes, dict[str, bytes]]:
    """(files of all domains, the list of duplicates, what stays)."""
    files = tree(top="", domains=SIX, classes=("axe", "bee"), each=3)
    gone = ["clipart/axe/1.jpg", "real/bee/2.jpg", "sketch/axe/99.jpg"]  # the last is in the list only
    return files, "\n".join(gone).encode(), {name: one for name, one in files.items() if name not in gone}


@pytest.mark.parametrize("form", ["zips", "folders"])
def test_domainnet_leaves_the_listed_duplicates_out(tmp_path, form):
    files, listed, wanted = domainnet()
    given = write(tmp_path / "given", {LIST: listed})
    if form == "folders":
        write(given, files)
    for domain in SIX if form == "zips" else ():
        zipped(given / f"{domain}.zip", {name: one for name, one in files.items() if name.startswith(domain)})
    zipped(given / "unrelated.zip", {"a": b"a"})
    report = made("domainnet", tmp_path, given)
    assert final("domainnet", tmp_path) == wanted
    assert f"2 of the 3 files in {LIST} left out" in report


def test_domainnet_is_never_built_without_the_list(tmp_path):
    given = write(tmp_path / "given", domainnet()[0])
    with pytest.raises(UserError, match=rf"{LIST} is not in clipart, .*Get it from https://raw.*{LIST} and put it"):
        made("domainnet", tmp_path, given)
    assert os.listdir(tmp_path / "data") == []


def test_domainnets_list_is_pinned_to_domainbeds():
    (item,) = [item for source in recipes.RECIPES["domainnet"].sources for item in source.items if item.sha256]
    assert (item.name, item.size, item.sha256[:8]) == (LIST, 365_663, "a52b4ab7")


# --- Parquet, as Hugging Face writes it


def shard(path: Path, rows: list[tuple], *, names: list[str] | None = None, domains: list[str] | None = None) -> Path:
    """rows of (bytes, path, domain, label); `names`, `domains`: then these columns hold numbers, -1 for others."""
    columns = {
        "image": [{"bytes": content, "path": name} for content, name, _, _ in rows],
        "domain": [domains.index(d) if domains else d for _, _, d, _ in rows],
        "label": [(names.index(y) if y in names else -1) if names else y for *_, y in rows],
    }
    features = {
        key: {"names": value, "_type": "ClassLabel"} for key, value in {"label": names, "domain": domains}.items()
    }
    features = {key: value for key, value in features.items() if value["names"]}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def parquet_rows() -> list[tuple]:
    return [(jpeg(i) + bytes([i]), f"pic_{i:03d}.jpg", domain, label) for i, (domain, label) in enumerate(pairs())]


def pairs() -> list[tuple[str, str]]:
    return [(domain, label) for domain in PACS for label in ANIMALS for _ in range(2)]


@pytest.mark.parametrize("numbered", [True, False])
def test_parquet_shards_keep_the_bytes_and_unique_names(tmp_path, numbered):
    rows = [(one, name.replace("pic", "a/b/pic"), d, y) for one, name, d, y in parquet_rows()]
    names, domains = (["elephant", "dog"], [*PACS[::-1]]) if numbered else (None, None)
    for i in range(2):
        shard(
            tmp_path / "given" / "data" / f"train-{i}.parquet",
            rows[i * 7 : 16 if i else 7],
            names=names,
            domains=domains,
        )
    write(tmp_path / "given", {"data/._train-0.parquet": b"macOS's"})
    report = made("pacs", tmp_path, tmp_path / "given")
    assert final("pacs", tmp_path) == {f"{d}/{y}/{name}": one for one, name, d, y in parquet_rows()}
    assert "file names: kept, and with them DomainBed's splits" in report


def test_parquet_rows_name_the_files_of_a_class_whose_names_do_not(tmp_path):
    rows = parquet_rows()
    rows[0] = (jpeg(0, "png"), "pic_001.jpg", *rows[0][2:])  # as the next one; and a PNG by its bytes
    rows[14] = (rows[14][0], None, *rows[14][2:])
    shard(tmp_path / "given" / "train-0.parquet", rows[:5])
    shard(tmp_path / "given" / "train-1.parquet", rows[5:])
    report = made("pacs", tmp_path, tmp_path / "given")
    wanted = {f"{d}/{y}/{name}": one for one, name, d, y in rows[2:14]}
    wanted |= {"art_painting/dog/000000.png": rows[0][0], "art_painting/dog/000001.jpg": rows[1][0]}
    wanted |= {"sketch/elephant/000014.jpg": rows[14][0], "sketch/elephant/000015.jpg": rows[15][0]}
    assert final("pacs", tmp_path) == wanted
    assert "NOT kept in 2 of 8 class folders (art_painting/dog, sketch/elephant" in report


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("../../evil.jpg", "evil.jpg"),
        ("x\\..\\evil.jpg", "evil.jpg"),
        ("..", "000000.jpg"),
        (".hidden.jpg", "000000.jpg"),
        ("noextension", "000000.jpg"),
        ("", "000000.jpg"),
    ],
)
def test_parquet_paths_never_leave_their_class(tmp_path, name, written):
    rows = parquet_rows()
    rows[0] = (rows[0][0], name, *rows[0][2:])
    made("pacs", tmp_path, shard(tmp_path / "one.parquet", rows))
    found = final("pacs", tmp_path)
    assert {path.rpartition("/")[0] for path in found} == {f"{d}/{y}" for d, y in pairs()}
    assert found[f"art_painting/dog/{written}"] == rows[0][0]
    assert len(found) == len(rows)
    assert sorted(os.listdir(tmp_path)) == ["data", "one.parquet"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((jpeg(0), "a.jpg", "clipart", "dog"), r"unknown domain clipart\. Known: art_painting, "),
        ((jpeg(0), "a.jpg", "photo", "../evil"), r"'\.\./evil' is no name for a class"),
        ((jpeg(0), "a.jpg", "photo", None), r"a row has None for its domain or label"),
        ((None, "a.jpg", "photo", "dog"), r"a row has no image bytes"),
        ((b"text", None, "photo", "dog"), r"row 0 is no image"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_shard(tmp_path, row, message):
    path = shard(tmp_path / "x.parquet", [row, *parquet_rows()])
    with pytest.raises(UserError, match=f"{path}: {message}"):
        made("pacs", tmp_path, path)
    assert os.listdir(tmp_path / "data") == []


def test_numbers_without_names_and_shards_without_columns_are_refused(tmp_path):
    rows = parquet_rows()
    path = shard(tmp_path / "x.parquet", [*rows, (jpeg(0), "z.jpg", "photo", "unlabelled")], names=[*ANIMALS])
    with pytest.raises(UserError, match="a row has -1 for its domain or label"):
        made("pacs", tmp_path, path)
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    with pytest.raises(UserError, match=r"x\.parquet: column label is neither text nor has its names"):
        made("pacs", tmp_path, path)
    pq.write_table(pq.read_table(path).drop_columns(["domain"]), path)
    with pytest.raises(UserError, match=r"columns image, label found; image, domain and label are needed"):
        made("pacs", tmp_path, path)


def test_what_a_bad_shard_left_is_not_mixed_with_an_archive(tmp_path):
    shard(tmp_path / "given" / "x.parquet", [*parquet_rows(), (None, "a.jpg", "photo", "dog")])
    files = tree(top="", domains=PACS, classes=ANIMALS, each=1)
    zipped(tmp_path / "given" / "PACS.zip", files)
    made("pacs", tmp_path, tmp_path / "given")
    assert final("pacs", tmp_path) == files


def test_a_cut_shard_is_named(tmp_path):
    path = shard(tmp_path / "x.parquet", parquet_rows())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{path} \([\d,]+ bytes\) is not a whole Parquet file: "):
        made("pacs", tmp_path, path)


# --- MNIST


def idx(numbers: np.ndarray) -> bytes:
    return struct.pack(f">4B{numbers.ndim}I", 0, 0, 8, numbers.ndim, *numbers.shape) + numbers.tobytes()


def mnist_files(suffix: str = "") -> dict[str, bytes]:
    random, files = np.random.RandomState(0), {}
    for part, number in (("train", 60), ("t10k", 24)):
        files[f"{part}-images-idx3-ubyte"] = idx(random.randint(0, 256, (number, 28, 28)).astype(np.uint8))
        files[f"{part}-labels-idx1-ubyte"] = idx(random.randint(0, 10, number).astype(np.uint8))
    return {f"{name}{suffix}": gzip.compress(one) if suffix else one for name, one in files.items()}


@pytest.mark.parametrize("name", ["rotated_mnist", "colored_mnist"])
@pytest.mark.parametrize("form", ["raw", "gz", "zip", "zip of gz"])
def test_mnist_lies_where_torchvision_and_a_run_read_it(tmp_path, name, form):
    files = {f"MNIST/raw/{one}": content for one, content in mnist_files(".gz" if "gz" in form else "").items()}
    given = zipped(tmp_path / "x.zip", files) if "zip" in form else write(tmp_path / "given", files)
    report = made(name, tmp_path, given)
    theirs = [datasets.MNIST(str(tmp_path / "data"), train=train) for train in (True, False)]
    assert [len(part) for part in theirs] == [60, 24]
    random = np.random.RandomState(0)
    assert theirs[0].data.numpy().tobytes() == random.randint(0, 256, (60, 28, 28)).astype(np.uint8).tobytes()
    run = RotatedMNIST(name="m", root="MNIST", domains=["0", "15"], data_dir=str(tmp_path / "data")).read()
    assert [len(domain) for domain in run.domains.values()] == [42, 42]
    assert "60 train + 24 t10k images" in report
    assert "accepted: train: 60 images and 60 labels found, 60,000 published" in report
    assert report.count(" MD5 ") == (4 if "gz" in form else 0)
    model = "convnet" if name == "rotated_mnist" else "convnet_2ch"
    assert f"\nNext: python launch.py dataset={name} model={model} split.target=" in report


def test_mnist_of_another_size_or_checksum_is_refused(tmp_path):
    given = write(tmp_path / "given", mnist_files(".gz"))
    with pytest.raises(
        UserError, match=r"not the published data set(.|\n)*t10k: 24 images(.|\n)*MD5 \w{32} found, f68b3c2d"
    ):
        prepare(config("rotated_mnist", tmp_path), given=given, source=None, accept_counts=False)
    assert not (tmp_path / "MNIST").exists()


def test_a_damaged_mnist_is_named(tmp_path):
    files = mnist_files(".gz")
    files["t10k-images-idx3-ubyte.gz"] = files["t10k-images-idx3-ubyte.gz"][:-500]
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz \([\d,]+ bytes\) is not a whole gzip file"):
        made("rotated_mnist", tmp_path, write(tmp_path / "1", files))
    files = mnist_files()
    files["train-labels-idx1-ubyte"] = files["train-labels-idx1-ubyte"][:-5]
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        made("rotated_mnist", tmp_path, write(tmp_path / "2", files))
    del files["t10k-images-idx3-ubyte"]
    with pytest.raises(UserError, match=r"no t10k-images-idx3-ubyte \(or with \.gz\) found in t10k-labels"):
        made("rotated_mnist", tmp_path, write(tmp_path / "3", files))


def test_mnists_addresses_and_files_are_torchvisions():
    assert list(mnist.MIRRORS.values()) == datasets.MNIST.mirrors
    for source, mirror in zip(mnist.Mnist("convnet").sources, datasets.MNIST.mirrors, strict=True):
        assert [item.url for item in source.items] == [mirror + name for name, _ in datasets.MNIST.resources]


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_every_recipe_builds_the_domains_that_its_config_names(name):
    recipe = recipes.RECIPES[name]
    configured = config(name, Path("/data")).dataset.domains
    if isinstance(recipe, recipes.Images):
        assert sorted(recipe.domains) == sorted(configured)
    assert all(item.url.startswith("http") for source in recipe.sources for item in source.items)
