"""Each dataset is built from archives, folders and shards with the structure in which it is published."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import REPOSITORY
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torchvision import datasets

from gsdg.data.download import mnist, prepare, recipes
from gsdg.data.folders import ImageFolders
from gsdg.data.mnist import RotatedMNIST
from gsdg.utils.errors import UserError
from tests.data.samples import files_below, jpeg_tree, mnist_files, write_files, write_tar, write_zip

PACS = ("art_painting", "cartoon", "photo", "sketch")
ANIMALS = ("dog", "elephant")


def config(name: str, data_dir: Path) -> DictConfig:
    dataset = OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml")
    return OmegaConf.create({"data_dir": str(data_dir), "dataset": dataset})


def pacs(top: str = "", each: int = 2, domains=PACS, classes=ANIMALS) -> dict[str, bytes]:
    return jpeg_tree(top=top, domains=domains, classes=classes, each=each)


def without(top: str, files: dict[str, bytes]) -> dict[str, bytes]:
    """The files below `top`, with their names there."""
    return {name.removeprefix(top): content for name, content in files.items() if name.startswith(top)}


def made(name: str, tmp_path: Path, given: Path) -> str:
    """Prepare the data set in a new folder data/ and return the report."""
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    report = prepare(config(name, tmp_path / "data"), given=given, source=None, accept_counts=True)
    root = config(name, tmp_path).dataset.root
    assert os.listdir(tmp_path / "data") == [root], "something is left beside it"
    return report


def check_made(name: str, tmp_path: Path, given: Path, expected: dict[str, bytes]) -> str:
    """Prepare the data set, compare its files, and return the report."""
    report = made(name, tmp_path, given)
    assert files_below(tmp_path / "data" / config(name, tmp_path).dataset.root) == expected
    return report


def check_refused(name: str, tmp_path: Path, given: Path, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(name, tmp_path, given)
    assert os.listdir(tmp_path / "data") == []


# --- Trees of images


def test_pacs_from_its_zip_without_what_macos_adds(tmp_path):
    top = "pacs/data/kfold/"
    files = pacs(top)
    names = ("photo/dog/.DS_Store", "photo/dog/._0.jpg", "photo/dog/Thumbs.db")
    junk = pacs("__MACOSX/kfold/", classes=("._dog",)) | {f"{top}{name}": b"?" for name in names}
    report = check_made("pacs", tmp_path, write_zip(tmp_path / "anything.zip", junk | files), without(top, files))
    assert f"pacs: {tmp_path}/data/PACS\n  16 images, 2 classes: art_painting 4, cartoon 4, photo 4, sketch 4" in report
    assert report.endswith(
        f"Next: python -m gsdg.data verify pacs data_dir={tmp_path}/data\n"
        f"Then: python launch.py dataset=pacs model=resnet18 split.target=art_painting data_dir={tmp_path}/data"
    )
    settings = {"name": "pacs", "root": "PACS", "domains": None, "augment": "photos"}
    dataset = ImageFolders(**settings, data_dir=str(tmp_path / "data")).read()  # as a run reads it
    assert (list(dataset.domains), dataset.classes, len(dataset.domains["photo"])) == ([*PACS], [*ANIMALS], 4)


def test_a_given_folder_is_found_at_any_depth_and_does_not_change(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "png")
    files = pacs("deep/er/PACS/") | {"deep/er/PACS/photo/dog/more/1.png": png.getvalue()}
    others = {"deep/er/PACS/photo/dog/.hidden/1.png": png.getvalue(), "deep/readme.txt": b"", "archive.zip": b"?"}
    given = write_files(tmp_path / "given", files | others)
    before = {path: path.stat().st_mtime_ns for path in given.rglob("*") if path.is_file()}
    check_made("pacs", tmp_path, given, without("deep/er/PACS/", files))
    assert files_below(given) == files | others
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_of_two_trees_the_nearest_to_the_top_is_taken(tmp_path):
    files = pacs("m/PACS/", 1)
    given = write_files(tmp_path / "given", files | pacs("a/b/PACS/", 3) | pacs("z/b/PACS/", 3))
    check_made("pacs", tmp_path, given, without("m/PACS/", files))


def test_a_folder_on_another_disk_is_copied(tmp_path):
    elsewhere = Path("/dev/shm") / f"gsdg_{os.getpid()}"
    if not os.access("/dev/shm", os.W_OK) or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("no second file system at /dev/shm")
    try:
        check_made("pacs", tmp_path, write_files(elsewhere, pacs()), pacs())
        assert files_below(elsewhere) == pacs()
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)


def test_images_reached_through_links_are_real_files_afterwards(tmp_path):
    real, given = write_files(tmp_path / "real", pacs()), tmp_path / "given"
    (given / PACS[0] / "dog").mkdir(parents=True)
    for name in (*PACS[1:], f"{PACS[0]}/elephant", f"{PACS[0]}/dog/0.jpg", f"{PACS[0]}/dog/1.jpg"):
        (given / name).symlink_to(real / name)
    check_made("pacs", tmp_path, given, pacs())
    assert not any(path.is_symlink() for path in (tmp_path / "data").rglob("*"))


VLCS = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
FIVE = ("bird", "car", "chair", "dog", "person")


def test_vlcs_from_its_tar_gz_and_in_numbered_classes_with_full_and_no_other_split(tmp_path):
    files = jpeg_tree(top="VLCS/", domains=VLCS, classes=FIVE)
    check_made("vlcs", tmp_path, write_tar(tmp_path / "x.tgz", files), without("VLCS/", files))
    others, numbers = ("CALTECH", "LABELME", "SUN", "PASCAL"), ("0", "1", "2", "3", "4")
    given = {}
    for domain in others:
        splits = ("crossval", "full", "test", "train")
        given |= jpeg_tree(top=f"VLCS/{domain}/", domains=splits, classes=numbers, each=1)
    wanted = {
        f"{domain}/{label}/0.jpg": given[f"VLCS/{other}/full/{number}/0.jpg"]
        for domain, other in zip(VLCS, others, strict=True)
        for label, number in zip(FIVE, numbers, strict=True)
    }
    check_made("vlcs", tmp_path, write_zip(tmp_path / "x.zip", given), wanted)


def test_officehome_with_every_spelling_of_real_world(tmp_path):
    top = "OfficeHomeDataset_10072016/"
    others = {f"{top}ImageInfo.csv": b"a,b", f"{top}imagelist.txt": b"x"}
    for spelling in ("Real World", "RealWorld", "Real_World", "real-world"):
        domains = ("Art", "Clipart", "Product", spelling)
        files = jpeg_tree(top=top, domains=domains, classes=("Alarm_Clock", "TV"))
        wanted = {name.replace(f"{spelling}/", "Real World/"): content for name, content in without(top, files).items()}
        check_made("officehome", tmp_path, write_zip(tmp_path / "x.zip", files | others), wanted)
    given = write_files(tmp_path / "given", files | {"art/x.txt": b"", "Art/x.txt": b""})  # do not stop the search
    check_made("officehome", tmp_path, given, wanted)
    write_files(given / top / "RealWorld", {"TV/0.jpg": b""})
    message = r"OfficeHome.*: RealWorld and real-world both stand for domain Real World\."
    check_refused("officehome", tmp_path, given, message)


def test_office31_without_the_folder_images_of_its_domains_from_one_archive_and_from_three(tmp_path):
    domains, labels = ("amazon", "dslr", "webcam"), ("back_pack", "bike")
    wanted = jpeg_tree(domains=domains, classes=labels)
    files = {name.replace("/", "/images/", 1): content for name, content in wanted.items()}
    both = files | {"amazon/interest_points/back_pack/histogram.mat": b"?"}
    check_made("office31", tmp_path, write_tar(tmp_path / "domain_adaptation_images.tar.gz", both), wanted)
    for domain in domains:
        write_tar(tmp_path / "three" / f"{domain}.tgz", {name: both[name] for name in both if name.startswith(domain)})
    check_made("office31", tmp_path, tmp_path / "three", wanted)


def test_sviro_and_nico_from_the_folders_of_their_archives(tmp_path):
    cars = ("aclass", "escape", "hilux", "i3", "lexus", "tesla", "tiguan", "tucson", "x5", "zoe")
    files = jpeg_tree(top="SVIRO_DOMAINBED/", domains=cars, classes=("0", "1"), each=1)
    check_made("sviro", tmp_path, write_zip(tmp_path / "sviro.zip", files), without("SVIRO_DOMAINBED/", files))
    contexts, top = ("autumn", "dim", "grass", "outdoor", "rock", "water"), "track_1/public_dg_0416/train/"
    files = jpeg_tree(top=top, domains=contexts, classes=("fishing rod", "wolf"), each=1)
    tests = {"track_1/public_dg_0416/public_test_flat/1.jpg": b"?", "track_1/dg_label_id_mapping.json": b"{}"}
    check_made("nico", tmp_path, write_zip(tmp_path / "track_1.zip", files | tests), without(top, files))


def test_pacs_as_dassl_has_it_and_officehome_in_an_archive_per_domain(tmp_path):
    files = pacs("pacs/images/")
    splits = {"pacs/splits/photo_train_kfold.txt": b"photo/dog/0.jpg 1"}
    check_made("pacs", tmp_path, write_zip(tmp_path / "pacs.zip", files | splits), without("pacs/images/", files))
    files = jpeg_tree(domains=("Art", "Clipart", "Product", "Real_World"), classes=("Alarm_Clock", "TV"))
    for domain in ("Art", "Clipart", "Product", "Real_World"):
        write_tar(tmp_path / "tgz" / f"{domain}.tgz", {name: files[name] for name in files if name.startswith(domain)})
    wanted = {name.replace("Real_World/", "Real World/"): content for name, content in files.items()}
    check_made("officehome", tmp_path, tmp_path / "tgz", wanted)


# --- TerraIncognita

TERRA_PARTS = ("cis_test", "cis_val", "train", "trans_test", "trans_val")
TEN = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
CATEGORIES = [{"id": i, "name": name} for i, name in enumerate((*TEN, "car", "rodent"))]


def terra_files(top: str = "eccv_18_all_images_sm/") -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """(images, the five annotation files, the expected tree)."""
    wanted, notes = {}, {part: {"images": [], "annotations": []} for part in TERRA_PARTS}
    images = without("x/x/", jpeg_tree(top="", domains="x", classes="x", each=72))
    images = {f"{top}{i:04d}-a.jpg": content for i, content in enumerate(images.values())}
    for i, (path, content) in enumerate(images.items()):
        location = ("38", 46, "100", 43, "33", 7)[i % 6]  # the last two are not part of the benchmark
        part, name = notes[TERRA_PARTS[i % 5]], path.removeprefix(top)
        categories = {i // 6, (i // 6 + 1) % 12} if i % 4 == 0 else {i // 6}  # 10 and 11 are not part of the benchmark
        part["images"].append({"id": f"id{i}", "file_name": name, "location": location})
        for category in (i // 6, *categories):  # the first one has a second box
            part["annotations"].append({"image_id": f"id{i}", "category_id": category, "id": len(part["annotations"])})
        for category in categories:
            if str(location) in ("38", "46", "100", "43") and category < 10:
                wanted[f"location_{location}/{TEN[category]}/{name}"] = content
    jsons = {
        f"eccv_18_annotation_files/{part}_annotations.json": json.dumps({**data, "categories": CATEGORIES}).encode()
        for part, data in notes.items()
    }
    return images, jsons, wanted


def test_terra_from_its_two_archives_and_as_a_ready_tree(tmp_path):
    images, jsons, wanted = terra_files()
    write_tar(tmp_path / "given" / "eccv_18_all_images_sm.tar.gz", images)
    write_tar(tmp_path / "given" / "eccv_18_annotations.tar.gz", jsons)
    report = check_made("terraincognita", tmp_path, tmp_path / "given", wanted)
    assert sum(name.endswith("0000-a.jpg") for name in wanted) == 2, "the first image has two categories"
    assert "left out" not in report
    check_made("terraincognita", tmp_path, write_files(tmp_path / "tree", wanted), wanted)


def test_terra_from_the_older_single_annotation_file(tmp_path):
    images, jsons, wanted = terra_files("images/")
    parts = [json.loads(content) for content in jsons.values()]
    both = {key: [item for part in parts for item in part[key]] for key in ("images", "annotations")}
    content = json.dumps({**both, "categories": CATEGORIES}).encode()
    for name in ("caltech_camera_traps.json", "caltech_images_20190904.json"):
        for form in ("zipped", "plain"):
            given = write_files(tmp_path / f"{name} {form}", images)
            if form == "plain":
                write_files(given, {name: content})
            else:
                write_zip(given / f"{name}.zip", {name: content})
            write_files(given, {"caltech_bboxes_20190904.json": b"{}", "other.json": b"?"})
            write_zip(given / "unrelated.zip", {"a": b"a"})
            check_made("terraincognita", tmp_path, given, wanted)


def test_terra_counts_the_images_that_the_archive_lacks_and_names_a_missing_part(tmp_path):
    images, jsons, wanted = terra_files()
    lost = ("0000-a.jpg", "0001-a.jpg")
    fewer = {name: content for name, content in images.items() if not name.endswith(lost)}
    wanted = {name: content for name, content in wanted.items() if not name.endswith(lost)}
    report = check_made("terraincognita", tmp_path, write_files(tmp_path / "0", fewer | jsons), wanted)
    assert "2 annotated images are not in the archive, first 0000-a.jpg: left out" in report
    (first, content), *rest = jsons.items()
    damaged = rf"4/{first} \([\d,]+ bytes\) is not a complete JSON file of annotations"
    for i, (files, message) in enumerate(
        (
            (images, r"no annotations found \(cis_test.*caltech_images.*\) in eccv_18_all_images_sm"),
            (jsons, "no images found"),
            (images | dict(rest), r"annotations: only \['cis_val.* found of"),
            (images | dict(rest) | {first: content[:-20]}, damaged),
        ),
        1,
    ):
        check_refused("terraincognita", tmp_path, write_files(tmp_path / str(i), files), message)


# --- DomainNet

SIX = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
LIST = "domain_net_duplicates.txt"


def test_domainnet_leaves_the_listed_duplicates_out_and_is_never_built_without_the_list(tmp_path):
    files = jpeg_tree(domains=SIX, classes=("axe", "bee"), each=3)
    duplicates = ["clipart/axe/1.jpg", "real/bee/2.jpg", "sketch/axe/99.jpg"]  # the last is in the list only
    wanted = {name: content for name, content in files.items() if name not in duplicates}
    folders, zips = write_files(tmp_path / "folders", files), tmp_path / "zips"
    message = rf"{LIST} is not in clipart, .*Get it from https://raw.*{LIST} and put it"
    check_refused("domainnet", tmp_path, folders, message)
    for domain in SIX:
        write_zip(zips / f"{domain}.zip", {name: files[name] for name in files if name.startswith(domain)})
    for given in (folders, zips):
        write_files(given, {LIST: "\n".join(duplicates).encode()})
        write_zip(given / "unrelated.zip", {"a": b"a"})
        report = check_made("domainnet", tmp_path, given, wanted)
        assert f"2 of the 3 files in {LIST} left out" in report
    (item,) = [item for source in recipes.RECIPES["domainnet"].sources for item in source.items if item.sha256]
    assert (item.name, item.size, item.sha256[:8]) == (LIST, 365_663, "a52b4ab7"), "the list is DomainBed's"


# --- Parquet, as Hugging Face writes it


def shard(path: Path, rows: list[tuple], *, names: list[str] | None = None, domains: list[str] | None = None) -> Path:
    """rows of (bytes, path, domain, label). With `names` or `domains`, columns are integers, -1 for other names."""
    columns = {
        "image": [{"bytes": content, "path": name} for content, name, _, _ in rows],
        "domain": [domains.index(d) if domains else d for _, _, d, _ in rows],
        "label": [(names.index(y) if y in names else -1) if names else y for *_, y in rows],
    }
    features = {key: {"names": value} for key, value in {"label": names, "domain": domains}.items() if value}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


JPEGS = pacs()
ROWS = [(content, f"pic_{i:03d}.jpg", *path.split("/")[:2]) for i, (path, content) in enumerate(JPEGS.items())]


def tree_of(rows: list[tuple]) -> dict[str, bytes]:
    return {f"{domain}/{label}/{name}": content for content, name, domain, label in rows}


def test_parquet_shards_keep_the_bytes_and_unique_names(tmp_path):
    rows = [(content, f"a/b/{name}", domain, label) for content, name, domain, label in ROWS]
    for names, domains in ((["elephant", "dog"], [*PACS[::-1]]), (None, None)):
        given = tmp_path / f"given {domains}"
        for i in range(2):
            part = rows[i * 7 : 16 if i else 7]
            shard(given / "data" / f"train-{i}.parquet", part, names=names, domains=domains)
        write_files(given, {"data/._train-0.parquet": b"macOS's"})
        report = check_made("pacs", tmp_path, given, tree_of(ROWS))
        assert "file names: kept; if they are those of the original archive, so are DomainBed's splits" in report


def test_files_of_a_class_without_unique_names_are_named_by_row(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "png")
    rows = [*ROWS]
    rows[0] = (png.getvalue(), "pic_001.jpg", *rows[0][2:])  # the name of the next one; and its bytes are a PNG
    rows[14] = (rows[14][0], None, *rows[14][2:])
    for i in range(4):
        shard(tmp_path / "given" / f"train-{i}.parquet", rows[i * 5 : (i + 1) * 5])
    by_row = {0: "000000.png", 1: "000001.jpg", 14: "000014.jpg", 15: "000015.jpg"}
    wanted = tree_of([(row[0], by_row.get(i, row[1]), *row[2:]) for i, row in enumerate(rows)])
    report = check_made("pacs", tmp_path, tmp_path / "given", wanted)
    assert "NOT kept in 2 of 8 class folders (art_painting/dog, sketch/elephant" in report


def test_parquet_paths_never_leave_their_class(tmp_path):
    for name, written in (
        ("../../evil.jpg", "evil.jpg"),
        ("x\\..\\evil.jpg", "evil.jpg"),
        ("..", "000000.jpg"),
        (".hidden.jpg", "000000.jpg"),
        ("noextension", "000000.jpg"),
        ("", "000000.jpg"),
    ):
        other = "000001.jpg" if written == "000000.jpg" else ROWS[1][1]  # of the same class
        rows = [(ROWS[0][0], name, *ROWS[0][2:]), *ROWS[1:]]
        wanted = tree_of([(ROWS[0][0], written, *ROWS[0][2:]), (ROWS[1][0], other, *ROWS[1][2:]), *ROWS[2:]])
        check_made("pacs", tmp_path, shard(tmp_path / "x.parquet", rows), wanted)
        assert sorted(os.listdir(tmp_path)) == ["data", "x.parquet"]


def test_rows_and_shards_that_do_not_fit_are_named(tmp_path):
    path, content = tmp_path / "x.parquet", ROWS[0][0]
    for row, message in (
        ((content, "a.jpg", "clipart", "dog"), r"unknown domain clipart\. Known: art_painting, "),
        ((content, "a.jpg", "photo", "../evil"), r"'\.\./evil' is not a valid name for a class"),
        ((content, "a.jpg", "photo", None), r"a row has None for its domain or label"),
        ((None, "a.jpg", "photo", "dog"), r"a row contains no image bytes"),
        ((b"text", None, "photo", "dog"), r"row 0 is not an image"),
    ):
        check_refused("pacs", tmp_path, shard(path, [row, *ROWS]), f"{path}: {message}")
    shard(path, [*ROWS, (content, "z.jpg", "photo", "unlabelled")], names=[*ANIMALS])
    check_refused("pacs", tmp_path, path, "a row has -1 for its domain or label")
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)
    check_refused("pacs", tmp_path, path, r"x\.parquet: column label is neither text nor has its names")
    pq.write_table(pq.read_table(path).drop_columns(["domain"]), path)
    check_refused("pacs", tmp_path, path, r"columns image, label found; image, domain and label are needed")
    path.write_bytes(shard(path, ROWS).read_bytes()[:-100])
    check_refused("pacs", tmp_path, path, rf"{path} \([\d,]+ bytes\) is not a complete Parquet file: ")


def test_what_a_bad_shard_left_is_not_mixed_with_an_archive(tmp_path):
    shard(tmp_path / "given" / "x.parquet", [*ROWS, (None, "a.jpg", "photo", "dog")])
    write_zip(tmp_path / "given" / "PACS.zip", pacs(each=1))
    check_made("pacs", tmp_path, tmp_path / "given", pacs(each=1))


# --- MNIST


@pytest.mark.parametrize("name", ["rotated_mnist", "colored_mnist"])
def test_mnist_lies_where_torchvision_and_a_run_read_it(tmp_path, name):
    files = mnist_files(60, 24)
    packed = {f"{key}.gz": gzip.compress(content) for key, content in files.items()}
    for form, given_files in {"raw": files, "zip": files, "gz": packed, "zip of gz": packed}.items():
        inside = {f"MNIST/raw/{key}": content for key, content in given_files.items()}
        given = write_zip(tmp_path / form / "x.zip", inside) if "zip" in form else write_files(tmp_path / form, inside)
        report = made(name, tmp_path, given)
        theirs = [datasets.MNIST(str(tmp_path / "data"), train=train) for train in (True, False)]
        assert [len(part) for part in theirs] == [60, 24]
        assert theirs[0].data.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
        run = RotatedMNIST(name="m", root="MNIST", domains=["0", "15"], data_dir=str(tmp_path / "data")).read()
        assert [len(domain) for domain in run.domains.values()] == [42, 42]
        assert "60 train + 24 t10k images" in report
        assert "accepted: train: 60 images and 60 labels found, 60,000 published" in report
        assert report.count(" MD5 ") == (4 if "gz" in form else 0), form
        model = "convnet" if name == "rotated_mnist" else "convnet_2ch"
        assert f"\nNext: python launch.py dataset={name} model={model} split.target=" in report


def test_a_damaged_mnist_and_one_of_another_size_or_checksum_are_refused(tmp_path):
    files = mnist_files(60, 24)
    packed = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    given = write_files(tmp_path / "0", packed)
    message = r"not the published data set(.|\n)*t10k: 24 images(.|\n)*MD5 \w{32} found, f68b3c2d"
    with pytest.raises(UserError, match=message):
        prepare(config("rotated_mnist", tmp_path / "data"), given=given, source=None, accept_counts=False)
    assert not (tmp_path / "data" / "MNIST").exists()
    images, labels = "t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"
    fewer = {name: content for name, content in files.items() if name != images}
    for i, (changed, message) in enumerate(
        (
            (packed | {f"{images}.gz": packed[f"{images}.gz"][:-500]}, r"\.gz \([\d,]+ bytes\) is not a complete gzip"),
            (files | {labels: files[labels][:-5]}, labels),
            (fewer, rf"no {images} \(or with \.gz\) found in t10k-labels"),
        ),
        1,
    ):
        check_refused("rotated_mnist", tmp_path, write_files(tmp_path / str(i), changed), message)


def test_recipes_have_the_domains_of_their_configs_and_mnist_has_torchvisions_addresses():
    for name, recipe in recipes.RECIPES.items():
        if isinstance(recipe, recipes.Images):
            assert sorted(recipe.domains) == sorted(config(name, Path("/data")).dataset.domains)
        assert all(item.url.startswith("http") for source in recipe.sources for item in source.items), name
        assert len({source.name for source in recipe.sources}) == len(recipe.sources), f"{name}: --source is ambiguous"
    assert sorted(mnist.MIRRORS.values()) == sorted(datasets.MNIST.mirrors)  # in another order in older versions
    for source, mirror in zip(mnist.Mnist("convnet").sources, mnist.MIRRORS.values(), strict=True):
        assert [item.url for item in source.items] == [mirror + name for name, _ in datasets.MNIST.resources]
