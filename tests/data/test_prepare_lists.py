"""Releases become lists: `prepare` builds them from files as published, and `dataset=NAME` reads the official split."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import REPOSITORY, in_case
from omegaconf import OmegaConf

from gsdg.config.schema import as_dict, build
from gsdg.data.__main__ import main
from gsdg.data.dataset import DomainDataset
from gsdg.data.download import prepare, recipes, sources, spawrious
from gsdg.data.published_counts import PUBLISHED, count_faults
from gsdg.data.split import OfficialSplit
from gsdg.utils.errors import UserError
from tests.data.http_server import Server
from tests.data.samples import JPEG, files_below, write_files, write_tar, write_zip

Files = dict[str, bytes]


def config(name: str, data_dir: Path, **changes):
    dataset = OmegaConf.load(REPOSITORY / "conf" / "dataset" / f"{name}.yaml")
    return OmegaConf.create({"data_dir": str(data_dir), "dataset": OmegaConf.merge(dataset, changes)})


def images(*paths: str) -> Files:
    """{path: image}, all different."""
    return {path: JPEG.getvalue() + path.encode() for path in paths}


def table(header: str, *rows: str) -> bytes:
    return "\n".join([header, *rows, ""]).encode()


def prepared(name: str, tmp_path: Path, given: Path | None, **changes) -> str:
    """Prepare the data set in a new folder data/ and return the report."""
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    return prepare(config(name, tmp_path / "data", **changes), given=given, source=None, accept_counts=True)


def read(name: str, tmp_path: Path, **changes) -> DomainDataset:
    """The data set as a run with dataset=<name> reads it."""
    settings = config(name, tmp_path / "data", **changes)
    return build(as_dict(settings.dataset, resolve=True), data_dir=settings.data_dir).read()


def official(dataset: DomainDataset, *targets: str) -> dict[str, dict[str, list[str]]]:
    """{domain: {part: `class file` of its images}}, as a run with split=from_list trains and tests on them."""
    parts = OfficialSplit(target=[*targets], trial_seed=0).indices(dataset)
    return {
        name: {
            part: [f"{dataset.classes[domain.labels[i]]} {Path(domain.files[i]).name}" for i in of_name[part]]
            for part in of_name
            if len(of_name[part])
        }
        for (name, of_name), domain in zip(parts.items(), dataset.domains.values(), strict=True)
    }


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


# ---- WILDS ----------------------------------------------------------------------------------------------------------

# The first column, without a name, is the number of the row. `split` of the unseen hospitals means nothing in WILDS.
CAMELYON = table(
    ",patient,node,x_coord,y_coord,tumor,slide,center,split",
    "0,004,4,3328,21792,1,0,0,0",
    "1,004,4,3200,22272,0,0,0,1",
    "2,042,3,3168,22272,1,23,2,0",
    "3,042,3,3168,23000,0,23,2,1",
    "4,022,4,100,200,0,12,1,0",
    "5,022,4,100,300,1,12,1,1",
    "6,060,1,1,2,0,30,3,0",
    "7,060,1,1,3,1,30,3,0",
    "8,099,4,5,6,1,49,4,1",
    "9,099,4,5,7,0,49,4,0",
)
PATCHES = (
    ("004", 4, 3328, 21792),
    ("004", 4, 3200, 22272),
    ("042", 3, 3168, 22272),
    ("042", 3, 3168, 23000),
    ("022", 4, 100, 200),
    ("022", 4, 100, 300),
    ("060", 1, 1, 2),
    ("060", 1, 1, 3),
    ("099", 4, 5, 6),
    ("099", 4, 5, 7),
)
CAMELYON_IMAGES = images(
    *(f"patches/patient_{p}_node_{n}/patch_patient_{p}_node_{n}_x_{x}_y_{y}.png" for p, n, x, y in PATCHES)
)
CAMELYON_FILES = CAMELYON_IMAGES | {"metadata.csv": CAMELYON, "RELEASE_v1.0.txt": b""}
FOUR = ["center_0", "center_2", "center_3", "center_4"]


def test_camelyon17_from_its_tar_gz_and_as_wilds_has_unpacked_it(tmp_path):
    unpacked = write_files(
        tmp_path / "given", {f"data/camelyon17_v1.0/{name}": content for name, content in CAMELYON_FILES.items()}
    )
    for given in (write_tar(tmp_path / "archive.tar.gz", CAMELYON_FILES), unpacked):
        report = prepared("camelyon17", tmp_path, given)
        made = files_below(tmp_path / "data" / "camelyon17")
        assert os.listdir(tmp_path / "data") == ["camelyon17"], "something is left beside it"
        assert {name: content for name, content in made.items() if name != "list.csv"} == CAMELYON_IMAGES
        assert f"camelyon17: {tmp_path}/data/camelyon17\n  10 images, 2 classes, 5 domains: center_0 2, " in report
        assert "official split: 4 in, 2 out, 4 test" in report
        assert "accepted: split in: 4 images, 302,436 published" in report
        assert report.endswith(
            f"Next: python -m gsdg.data verify camelyon17 data_dir={tmp_path}/data\n"
            "Then: python launch.py dataset=camelyon17 model=resnet50 split=from_list split.target=center_2 "
            f"'dataset.domains=[center_0,center_2,center_3,center_4]' data_dir={tmp_path}/data"
        )
    assert files_below(unpacked / "data/camelyon17_v1.0") == CAMELYON_FILES


def test_camelyon17_has_wilds_splits(tmp_path):
    prepared("camelyon17", tmp_path, write_files(tmp_path / "given", CAMELYON_FILES))
    dataset = read("camelyon17", tmp_path, domains=FOUR)
    assert dataset.classes == ["normal", "tumor"], "in the order of WILDS' labels 0 and 1"
    found = official(dataset, "center_2")
    assert found == {
        "center_0": {
            "in": ["tumor patch_patient_004_node_4_x_3328_y_21792.png"],
            "out": ["normal patch_patient_004_node_4_x_3200_y_22272.png"],
        },
        "center_2": {
            "test": [
                "tumor patch_patient_042_node_3_x_3168_y_22272.png",
                "normal patch_patient_042_node_3_x_3168_y_23000.png",
            ]
        },
        "center_3": {
            "in": ["normal patch_patient_060_node_1_x_1_y_2.png", "tumor patch_patient_060_node_1_x_1_y_3.png"]
        },
        "center_4": {
            "in": ["normal patch_patient_099_node_4_x_5_y_7.png"],
            "out": ["tumor patch_patient_099_node_4_x_5_y_6.png"],
        },
    }
    both = official(read("camelyon17", tmp_path), "center_1", "center_2")
    assert both == found | {"center_1": both["center_1"]}
    assert [*both["center_1"]] == ["test"]
    assert len(both["center_1"]["test"]) == 2
    with pytest.raises(UserError, match="the source domain center_1 has no `in` images to train on"):
        official(read("camelyon17", tmp_path), "center_2")


IWILDCAM = table(
    ",split,location_remapped,location,sequence_remapped,seq_id,y,category_id,datetime,filename,image_id",
    "0,id_test,17,200,1,a,10,115,2013-06-05 05:44:19.000,t.jpg,t",
    "1,id_val,17,200,2,b,9,100,2013-06-06 05:44:19.000,v.jpg,v",
    "2,test,5,31,3,c,2,24,2013-06-07 05:44:19.000,x.jpg,x",
    "3,train,17,200,4,d,10,115,2013-06-08 05:44:19.000,a.jpg,a",
    "4,train,2,8,5,e,2,24,2013-06-09 05:44:19.000,b.jpg,b",
    "5,val,9,44,6,f,10,115,2013-06-10 05:44:19.000,y.jpg,y",
    "6,test,11,45,7,g,9,100,2013-06-11 05:44:19.000,z.jpg,z",
)
IWILDCAM_IMAGES = images(*(f"train/{name}.jpg" for name in "tvxabyz"))
IWILDCAM_FILES = IWILDCAM_IMAGES | {"metadata.csv": IWILDCAM, "categories.csv": b"y,category_id,name\n2,24,x\n"}


def test_iwildcam_has_wilds_splits_and_one_domain_of_all_unseen_cameras(tmp_path):
    report = prepared("iwildcam", tmp_path, write_tar(tmp_path / "iwildcam_v2.0.tar.gz", IWILDCAM_FILES))
    assert "7 images, 3 classes, 3 domains: camera_17 3, camera_2 1, unseen_cameras 3; " in report
    assert "official split: 2 in, 2 out, 3 test" in report
    assert "accepted: 3 classes, 182 published" in report
    dataset = read("iwildcam", tmp_path)
    assert dataset.classes == ["2", "9", "10"]
    assert official(dataset, "unseen_cameras") == {
        "camera_17": {"in": ["10 a.jpg"], "out": ["9 v.jpg"], "test": ["10 t.jpg"]},
        "camera_2": {"in": ["2 b.jpg"]},
        "unseen_cameras": {"out": ["10 y.jpg"], "test": ["2 x.jpg", "9 z.jpg"]},
    }


# An image's file has the number of its row, from 0. In the comments: WILDS' split.
FMOW_ROWS = (
    "train,AUT,airport,2010-05-01T09:00:00Z",  # train
    "train,KEN,dam,2015-01-01T00:00:00Z",  # not used: fMoW's train after 2012
    "seq,KEN,dam,2016-05-01T09:00:00Z",  # never used
    "val,BRA,zoo,2012-12-31T23:59:59Z",  # id_val
    "test,AUT,zoo,2012-01-01T00:00:00Z",  # id_test
    "val,KEN,airport,2013-01-01T00:00:00Z",  # val
    "val,KEN,airport,2016-01-01T00:00:00Z",  # not used: fMoW's val after 2015
    "test,KEN,dam,2016-01-01T00:00:00Z",  # test
    "test,KEN,dam,2015-12-31T23:59:59Z",  # not used: fMoW's test of 2013 to 2015
    "test,XKO,zoo,2017-12-31T00:00:00Z",  # test; no region
    "seq,AUT,airport,2003-05-01T09:00:00Z",  # never used
    "train,BRA,dam,2012-05-01T09:00:00Z",  # train
    "val,ATA,dam,2014-05-01T09:00:00Z",  # val; no region
)
COUNTRIES = table(
    "name,alpha-2,alpha-3,country-code,iso_3166-2,region,sub-region",
    "Austria,AT,AUT,040,ISO 3166-2:AT,Europe,Western Europe",
    "Kenya,KE,KEN,404,ISO 3166-2:KE,Africa,Eastern Africa",
    "Brazil,BR,BRA,076,ISO 3166-2:BR,Americas,Latin America",
    "Antarctica,AQ,ATA,010,ISO 3166-2:AQ,,",
)
FMOW_IMAGES = images(*(f"images/rgb_img_{i}.png" for i in range(len(FMOW_ROWS))))
FMOW_FILES = FMOW_IMAGES | {
    "rgb_metadata.csv": table("split,country_code,category,timestamp", *FMOW_ROWS),
    "country_code_mapping.csv": COUNTRIES,
}


def test_fmow_has_wilds_splits_by_year_and_later_by_region(tmp_path):
    report = prepared("fmow", tmp_path, write_zip(tmp_path / "fmow.zip", FMOW_FILES))
    assert "8 images, 3 classes, 4 domains: " in report
    made = files_below(tmp_path / "data" / "fmow")
    assert made.keys() - {"list.csv"} == {f"images/rgb_img_{i}.png" for i in (0, 3, 4, 5, 7, 9, 11, 12)}
    dataset = read("fmow", tmp_path, domains=None)
    assert official(dataset, "later_Africa", "later_Other") == {
        "later_Africa": {"out": ["airport rgb_img_5.png"], "test": ["dam rgb_img_7.png"]},
        "later_Other": {"out": ["dam rgb_img_12.png"], "test": ["zoo rgb_img_9.png"]},
        "year_2010": {"in": ["airport rgb_img_0.png"]},
        "year_2012": {"in": ["dam rgb_img_11.png"], "out": ["zoo rgb_img_3.png"], "test": ["zoo rgb_img_4.png"]},
    }


def test_fmows_targets_are_all_later_regions_but_other():
    domains, split = config("fmow", Path("/data")).dataset.domains, recipes.RECIPES["fmow"].split
    assert split.endswith(f"'split.target=[{','.join(domains[11:])}]'")
    assert all(name.startswith("year_") for name in domains[:11])


# ---- Spawrious ------------------------------------------------------------------------------------------------------

PLACES = ("beach", "desert", "dirt", "jungle", "mountain", "snow")
BREEDS = ("bulldog", "corgi", "dachshund", "labrador")
# The combinations of Spawrious' package, written a second time: {domain: {breed: (folder, number of images)}}.
O2O_MEDIUM = {
    "Test": {
        "bulldog": (("0/jungle", 5), ("1/jungle", 5)),
        "dachshund": (("0/dirt", 5), ("1/dirt", 5)),
        "labrador": (("0/beach", 5), ("1/beach", 5)),
        "corgi": (("0/snow", 5), ("1/snow", 5)),
    },
    "SC_group_1": {
        "bulldog": (("0/mountain", 4), ("0/desert", 1)),
        "dachshund": (("0/beach", 4), ("0/desert", 1)),
        "labrador": (("0/dirt", 4), ("0/desert", 1)),
        "corgi": (("0/jungle", 4), ("0/desert", 1)),
    },
    "SC_group_2": {
        "bulldog": (("1/mountain", 3), ("1/desert", 2)),
        "dachshund": (("1/beach", 3), ("1/desert", 2)),
        "labrador": (("1/dirt", 3), ("1/desert", 2)),
        "corgi": (("1/jungle", 3), ("1/desert", 2)),
    },
}
M2M_HARD = {
    "Test": {
        "bulldog": (("0/snow", 5), ("0/beach", 5)),
        "dachshund": (("0/beach", 5), ("0/snow", 5)),
        "labrador": (("0/dirt", 5), ("0/jungle", 5)),
        "corgi": (("0/jungle", 5), ("0/dirt", 5)),
    },
    "SC_group_1": {
        "bulldog": (("0/dirt", 5),),
        "dachshund": (("0/jungle", 5),),
        "labrador": (("0/snow", 5),),
        "corgi": (("0/beach", 5),),
    },
    "SC_group_2": {
        "bulldog": (("0/jungle", 5),),
        "dachshund": (("0/dirt", 5),),
        "labrador": (("0/beach", 5),),
        "corgi": (("0/snow", 5),),
    },
}


@pytest.mark.parametrize(("name", "wanted"), [("o2o_medium", O2O_MEDIUM), ("m2m_hard", M2M_HARD)])
def test_spawrious_challenges_have_the_combinations_of_its_package(tmp_path, monkeypatch, name, wanted):
    """With 5 images per folder: 4 or 3 of them in the breed's own place."""
    monkeypatch.setattr(spawrious, "IN_FOLDER", 5)
    monkeypatch.setattr(spawrious, "IN_THE_BREEDS_PLACE", (4, 3))
    files = images(
        *(
            f"spawrious224/{number}/{place}/{breed}/{breed}_{i}.png"
            for number in (0, 1, "domain_adaptation_ds")
            for place in PLACES
            for breed in BREEDS
            for i in range(5)
        )
    )
    report = prepared(f"spawrious_{name}", tmp_path, write_tar(tmp_path / "spawrious224.tar.gz", files))
    assert "80 images, 4 classes, 3 domains: SC_group_1 20, SC_group_2 20, Test 40\n" in report
    assert f"dataset=spawrious_{name} model=resnet50 split.target=Test data_dir=" in report
    folder = tmp_path / "data" / "spawrious" / name
    dataset = read(f"spawrious_{name}", tmp_path)
    assert list(dataset.domains) == ["Test", "SC_group_1", "SC_group_2"]
    for domain, by_breed in wanted.items():
        images_of = dataset.domains[domain]
        found = {
            (dataset.classes[label], os.path.relpath(path, folder))
            for label, path in zip(images_of.labels, images_of.files, strict=True)
        }
        assert found == {
            (breed, f"{place}/{breed}/{breed}_{i}.png")
            for breed, places in by_breed.items()
            for place, number in places
            for i in range(number)
        }


def test_spawrious_takes_as_many_images_as_its_package():
    assert (int(0.97 * 3168), int(0.87 * 3168)) == spawrious.IN_THE_BREEDS_PLACE
    for name, challenge in spawrious.CHALLENGES.items():
        paths = {}
        for domain, breed, folder, which in challenge.folders():
            images_of = paths.setdefault((domain, breed), [])
            images_of += [f"{folder}/{i}" for i in range(3168)[which]]
        counts = {domain: {} for domain, _ in paths}
        for (domain, breed), of_breed in paths.items():
            counts[domain][breed] = len(of_breed)
        assert count_faults(f"spawrious_{name}", counts) == []
        everything = [path for of_breed in paths.values() for path in of_breed]
        assert len(set(everything)) == len(everything) == 50_688, "no image is in two domains"


# ---- data sets of Dassl ---------------------------------------------------------------------------------------------


def test_digits_dg_has_dassls_split(tmp_path):
    domains = ("mnist", "mnist_m", "svhn", "syn")
    paths = [f"{d}/train/{y}/{y}_{i}.jpg" for d in domains for y in (0, 1) for i in range(2)]
    files = images(
        *(f"digits_dg/{path}" for path in paths + [f"{d}/val/{y}/v{y}.jpg" for d in domains for y in (0, 1)])
    )
    report = prepared("digits_dg", tmp_path, write_zip(tmp_path / "digits_dg.zip", files))
    assert "24 images, 2 classes, 4 domains: mnist 6, mnist_m 6, svhn 6, syn 6; " in report
    assert "official split: 16 in, 8 out, 0 test" in report
    found = official(read("digits_dg", tmp_path), "svhn")
    assert found == {
        d: {"in": ["0 0_0.jpg", "0 0_1.jpg", "1 1_0.jpg", "1 1_1.jpg"], "out": ["0 v0.jpg", "1 v1.jpg"]}
        for d in domains
    }


def test_mini_domainnet_takes_the_images_of_its_lists(tmp_path):
    domains = ("clipart", "painting", "real", "sketch")
    files = images(*(f"{d}/{label}/{d}_{i}.jpg" for d in domains for label in ("axe", "bee", "cat") for i in range(3)))
    splits = {}
    for d in domains:
        splits[f"splits_mini/{d}_train.txt"] = f"{d}/axe/{d}_0.jpg 0\n{d}/cat/{d}_1.jpg 1\n".encode()
        splits[f"splits_mini/{d}_test.txt"] = f"{d}/cat/{d}_2.jpg 1\n{d}/axe/{d}_1.jpg 0\n".encode()
    zips = tmp_path / "zips"
    write_zip(zips / "splits_mini.zip", splits)
    for d in domains:
        write_zip(zips / f"{d}.zip", {path: content for path, content in files.items() if path.startswith(f"{d}/")})
    folders = write_files(tmp_path / "folders", files | splits)
    for given in (zips, folders):
        prepared("mini_domainnet", tmp_path, given)
        dataset = read("mini_domainnet", tmp_path)
        assert dataset.classes == ["axe", "cat"]
        assert official(dataset, "sketch") == {
            d: {"in": [f"axe {d}_0.jpg", f"cat {d}_1.jpg"], "test": [f"cat {d}_2.jpg", f"axe {d}_1.jpg"]}
            for d in domains
        }
        assert len(files_below(tmp_path / "data/mini_domainnet")) == 17


def test_a_source_may_have_files_on_drive_and_elsewhere(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(sources, "drive", lambda item, folder: used.append(("drive", item.name)))
    monkeypatch.setattr(sources, "http", lambda item, folder: used.append(("http", item.name)))
    (source,) = recipes.RECIPES["mini_domainnet"].sources
    for item in source.items:
        source.via(item, tmp_path)
    assert used == [
        ("drive", "splits_mini.zip"),
        *(("http", f"{d}.zip") for d in ("clipart", "painting", "real", "sketch")),
    ]


# ---- what all lists share -------------------------------------------------------------------------------------------


def test_missing_images_are_left_out_and_counted(tmp_path):
    files = {name: content for name, content in IWILDCAM_FILES.items() if name not in ("train/a.jpg", "train/x.jpg")}
    report = prepared("iwildcam", tmp_path, write_files(tmp_path / "given", files))
    assert "2 listed images are missing, first train/x.jpg: left out" in report
    assert [row["path"] for row in rows_of(tmp_path / "data/iwildcam/list.csv")] == [
        f"train/{name}.jpg" for name in "tvbyz"
    ]


def test_files_that_are_no_release_are_refused_and_nothing_is_left(tmp_path):
    metadata = "metadata.csv"
    for i, (files, message) in enumerate(
        (
            ({"x.txt": b""}, r"no folder with metadata\.csv, train found in x\.txt"),
            ({metadata: IWILDCAM, "train/other.jpg": b""}, "none of the 7 images that the list needs is in "),
            (IWILDCAM_FILES | {metadata: IWILDCAM.replace(b"filename", b"file")}, "CSV file with the columns split, "),
            (IWILDCAM_FILES | {metadata: b""}, r"metadata\.csv \(0 bytes\) is not a complete CSV file"),
            (IWILDCAM_FILES | {metadata: IWILDCAM.replace(b"id_val", b"idval")}, "unknown 'idval' in a column with"),
            (IWILDCAM_FILES | {metadata: IWILDCAM.replace(b"id_val", b"")}, "unknown '' in a column with"),
        )
    ):
        with in_case(message), pytest.raises(UserError, match=message):
            prepared("iwildcam", tmp_path, write_files(tmp_path / str(i), files))
        assert os.listdir(tmp_path / "data") == []


def test_other_numbers_than_the_published_are_refused(tmp_path):
    given = write_files(tmp_path / "given", IWILDCAM_FILES)
    with pytest.raises(UserError) as caught:
        prepare(config("iwildcam", tmp_path / "data"), given=given, source=None, accept_counts=False)
    assert str(caught.value).splitlines()[:5] == [
        "iwildcam: this is not the published data set; nothing was put in place.",
        "  3 classes, 182 published",
        "  split in: 2 images, 129,809 published",
        "  split out: 2 images, 22,275 published",
        "  split test: 3 images, 50,945 published",
    ]


def test_a_list_that_exists_is_not_changed(tmp_path):
    given = write_files(tmp_path / "given", IWILDCAM_FILES)
    prepared("iwildcam", tmp_path, given)
    file = tmp_path / "data/iwildcam/list.csv"
    file.write_text("mine")
    settings = config("iwildcam", tmp_path / "data")
    assert "already exists and was not changed" in prepare(settings, given=given, source=None, accept_counts=True)
    assert file.read_text() == "mine"


def test_the_list_is_prepared_where_dataset_file_says_in_a_folder_of_its_own(tmp_path):
    given = write_files(tmp_path / "given", IWILDCAM_FILES)
    prepared("iwildcam", tmp_path, given, file=f"{tmp_path}/elsewhere/list.csv")
    assert (tmp_path / "elsewhere/train/a.jpg").is_file()
    for file in ("list.csv", "iwildcam/images.csv"):
        with pytest.raises(UserError, match=r"is prepared in a folder of its own, as <folder>/list\.csv"):
            prepared("iwildcam", tmp_path, given, file=file)


def test_a_missing_list_names_the_command_that_prepares_it(tmp_path):
    command = rf"or get it: python -m gsdg\.data prepare iwildcam data_dir={tmp_path}/data\."
    with pytest.raises(UserError, match=command):
        read("iwildcam", tmp_path)
    with pytest.raises(UserError) as caught:
        read("iwildcam", tmp_path, file="/elsewhere/list.csv")
    assert "prepare" not in str(caught.value)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server.start()


def test_the_download_is_unpacked_built_and_removed(tmp_path, monkeypatch, server):
    server.files["/rest/bundles/0x1/contents/blob/"] = write_tar(tmp_path / "sent.tar.gz", IWILDCAM_FILES).read_bytes()
    recipe = recipes.RECIPES["iwildcam"]
    (item,) = recipe.sources[0].items
    local = replace(item, url=f"{server.url}/rest/bundles/0x1/contents/blob/", size=0)
    source = replace(recipe.sources[0], items=(local,))
    monkeypatch.setitem(recipes.RECIPES, "iwildcam", replace(recipe, sources=(source,)))
    assert "from codalab" in prepared("iwildcam", tmp_path, None)
    assert os.listdir(tmp_path / "data") == ["iwildcam"]
    assert len(rows_of(tmp_path / "data/iwildcam/list.csv")) == 7


def test_verify_compares_the_whole_list_with_the_published_numbers(tmp_path, capsys):
    prepared("camelyon17", tmp_path, write_files(tmp_path / "given", CAMELYON_FILES))
    command = ["verify", "camelyon17", f"data_dir={tmp_path}/data", f"dataset.domains=[{','.join(FOUR)}]"]
    assert main(command) == 1
    text = capsys.readouterr().out
    assert "FAULT numbers of images that are not the published ones: 3" in text
    assert "split test: 4 images, 119,958 published" in text, "all domains are compared, also those not used"


def test_verify_has_no_faults_if_the_numbers_are_the_published_ones(tmp_path, capsys, monkeypatch):
    """Then copies of an image are as published, and only noted."""
    prepared("camelyon17", tmp_path, write_files(tmp_path / "given", CAMELYON_FILES))
    paths = [row["path"] for row in rows_of(tmp_path / "data/camelyon17/list.csv")]
    folder = tmp_path / "data/camelyon17"
    (folder / paths[1]).unlink()
    shutil.copy(folder / paths[0], folder / paths[1])  # one is `in`, the other `out`
    command = ["verify", "camelyon17", f"data_dir={tmp_path}/data", "split=from_list"]
    assert main(command) == 1
    assert "FAULT the same image in several parts of the column split: 1" in capsys.readouterr().out
    edition = replace(PUBLISHED["camelyon17"][0], parts={"in": 4, "out": 2, "test": 4})
    monkeypatch.setitem(PUBLISHED, "camelyon17", (edition,))
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "note: the same image in several parts of the column split, as published: 1 (" in text
    assert text.endswith("camelyon17: no faults\n")
