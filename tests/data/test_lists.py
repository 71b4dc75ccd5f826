"""Lists of images: rows, classes, domains and official splits to the index, and each refusal with its row."""

from __future__ import annotations

import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import in_case, photos, write_list

from gsdg.data import list_table
from gsdg.data.list_table import OPTIONAL, REQUIRED, read_table
from gsdg.data.lists import ImageList
from gsdg.data.path_array import PathArray
from gsdg.data.split import OfficialSplit, Split
from gsdg.utils.errors import UserError
from tests.data.samples import image_folders, image_list, write_image

HEADER = "path,label,domain\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return photos(tmp_path / "photos", each=5)


def rows_list(folder: Path, rows: str, header: str = HEADER, /, **changes) -> ImageList:
    """The data set of a list with these lines; every path in it is an image."""
    folder.mkdir(exist_ok=True)
    (folder / "images.csv").write_text(header + rows, encoding="utf-8")
    for line in rows.splitlines():
        if not (folder / line.split(",")[0]).exists():
            write_image(folder / line.split(",")[0])
    return image_list(folder / "images.csv", **changes)


def refusal(source: ImageList) -> str:
    with pytest.raises(UserError) as caught:
        source.read()
    return str(caught.value)


def refused_list(folder: Path, content: str | bytes, name: str = "images.csv") -> str:
    """The message about a list with this content."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        image_list(folder / name).read()
    return str(caught.value).replace(f"{folder}/", "")


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_the_list_of_an_image_folder_is_the_same_data_set(root):
    listed, folders = image_list(write_list(root / "images.csv")).read(), image_folders(root).read()
    assert listed.classes == folders.classes
    assert list(listed.domains) == list(folders.domains)
    split = Split(target="b", trial_seed=1, holdout_fraction=0.2)
    parts, expected = split.indices(listed), split.indices(folders)
    for name, domain in folders.domains.items():
        assert list(listed.domains[name].files) == domain.files
        np.testing.assert_array_equal(listed.domains[name].labels, domain.labels)
        assert listed.domains[name].load(7).tobytes() == domain.load(7).tobytes()
        for part in ("in", "out"):
            np.testing.assert_array_equal(parts[name][part], expected[name][part])
    assert image_list(root / "images.csv").domains == ["a", "b", "c"]


def test_images_are_in_the_order_of_the_rows_and_domains_in_the_order_of_the_config(tmp_path):
    rows = "3.png,y,s\n1.png,x,p\n2.png,x,s\n0.png,y,p\n"
    dataset = rows_list(tmp_path, rows).read()
    assert {name: [Path(file).name for file in domain.files] for name, domain in dataset.domains.items()} == {
        "p": ["1.png", "0.png"],
        "s": ["3.png", "2.png"],
    }
    assert {name: domain.labels.tolist() for name, domain in dataset.domains.items()} == {"p": [0, 1], "s": [1, 0]}
    assert list(rows_list(tmp_path, rows, domains=["s", "p"]).read().domains) == ["s", "p"]
    only = rows_list(tmp_path, rows + "4.png,z,other\n", domains=["s"]).read()
    assert (list(only.domains), only.classes, len(only.domains["s"])) == (["s"], ["x", "y"], 2)
    numbers = rows_list(tmp_path, "1.png,x,007\n2.png,x,30\n", domains=[30, 7])
    assert numbers.domains == ["30", "007"]


def test_paths_with_spaces_commas_umlauts_and_quotes_relative_and_absolute(tmp_path):
    names = ["a b/ü.png", "x,y.png", 'q"q.png', "plain.png", "猫.png", "#.png"]
    elsewhere = write_image(tmp_path / "elsewhere" / "é 1.png", 9)
    paths = [write_image(tmp_path / "list" / name, seed) for seed, name in enumerate(names)]
    frame = pd.DataFrame({"path": [*names, "../elsewhere/é 1.png"], "label": "x", "domain": "Dömäin 1"})
    for suffix in (".csv", ".parquet"):
        file = tmp_path / "list" / f"images{suffix}"
        frame.to_csv(file, index=False) if suffix == ".csv" else frame.to_parquet(file)
        domain = image_list(file).read().domains["Dömäin 1"]
        assert list(domain.files) == [*map(str, paths), str(elsewhere)]
        domain.load(6)
    frame["path"] = [str(path) for path in [*paths, elsewhere]]
    frame.to_csv(tmp_path / "images.csv", index=False, encoding="utf-8-sig")  # with the mark that Excel writes
    assert list(image_list(tmp_path / "images.csv").read().domains["Dömäin 1"].files) == [
        *map(str, paths),
        str(elsewhere),
    ]


def test_parquet_with_categories_numbers_and_other_columns_is_read_as_csv_is(tmp_path, monkeypatch):
    monkeypatch.setattr(list_table, "CHUNK", 7)  # rows at a time: values must be the same in every chunk
    random = np.random.RandomState(0)
    frame = pd.DataFrame({"width": 3, "path": [f"{i}.png" for i in range(40)], "label": random.randint(0, 12, 40)})
    frame["domain"] = pd.Categorical(random.choice(["s", "p"], 40))
    frame["split"], frame["group"] = random.choice(["in", "out", "test"], 40), random.randint(0, 3, 40)
    frame.to_csv(tmp_path / "images.csv", index=False)
    frame.to_parquet(tmp_path / "images.parquet")
    for suffix in (".csv", ".parquet"):
        with in_case(suffix):
            table = read_table(tmp_path / f"images{suffix}", (*REQUIRED, *OPTIONAL))
            assert list(table.paths) == [str(tmp_path / path) for path in frame["path"]]
            for name in ("label", "domain", "split", "group"):
                column = getattr(table, name)
                assert np.array(column.values)[column.codes].tolist() == frame[name].astype(str).tolist()
                assert (len(set(column.values)), column.codes.dtype) == (len(column.values), np.int32)


def test_class_order_is_by_name_by_value_or_as_given(tmp_path):
    for labels, changes, expected in (
        (["b", "a", "10"], {}, ["10", "a", "b"]),
        (["10", "9", "-1"], {}, ["-1", "9", "10"]),
        (["b", "a", "c"], {"class_names": ["c", "a", "b"]}, ["c", "a", "b"]),
        (["2", "10", "1"], {"class_names": [10, 1, 2]}, ["10", "1", "2"]),
    ):
        rows = "".join(f"{i}.png,{label},d\n" for i, label in enumerate(labels))
        dataset = rows_list(tmp_path, rows, **changes).read()
        assert dataset.classes == expected
        assert dataset.domains["d"].labels.tolist() == [expected.index(label) for label in labels]


def test_classes_strict_union_and_intersection(tmp_path, caplog):
    rows = "0.png,x,p\n1.png,y,p\n2.png,z,p\n3.png,y,s\n4.png,w,s\n5.png,z,s\n6.png,z,p\n"
    message = refusal(rows_list(tmp_path, rows))
    assert "classes differ between domains of" in message
    assert "p lacks w; s lacks x." in message
    union = rows_list(tmp_path, rows, classes="union").read()
    assert union.classes == ["w", "x", "y", "z"]
    assert union.domains["s"].labels.tolist() == [2, 0, 3]
    shared = rows_list(tmp_path, rows, classes="intersection").read()
    assert shared.classes == ["y", "z"]
    assert shared.domains["p"].labels.tolist() == [0, 1, 1]
    assert [Path(file).name for file in shared.domains["p"].files] == ["1.png", "2.png", "6.png"]
    assert [record.getMessage() for record in caplog.records] == [
        "list: 2 rows of classes that not every domain has left out"
    ]
    message = refusal(rows_list(tmp_path / "none", "0.png,x,p\n1.png,y,s\n", classes="intersection"))
    assert message.startswith("dataset.classes=intersection: no class is in every domain of ")


def test_paths_are_kept_in_few_bytes_and_can_be_sliced_and_sent_to_other_processes(tmp_path):
    texts = [f"domain/class/{i:06}.png" for i in range(10_000)]
    paths = PathArray.joined([PathArray.of(texts[:1], "/x"), PathArray.of(texts[1:], "/x")])
    assert paths.text.nbytes + paths.offsets.nbytes + paths.rows.nbytes < 45 * len(texts)
    expected = [f"/x/{text}" for text in texts]
    again = pickle.loads(pickle.dumps(paths.take(np.arange(0, 10_000, 3))))
    assert (list(paths), list(again)) == (expected, expected[::3])
    assert (paths[-1], list(paths[5:20:4])) == (expected[-1], expected[5:20:4])
    assert list(again[1:9:2]) == expected[3:27:6]
    with pytest.raises(IndexError):
        paths[10_000]
    assert len(PathArray.of([], "/x")) == 0


# ---- official splits ------------------------------------------------------------------------------------------------


def split_list(tmp_path: Path, words: dict[str, str]) -> ImageList:
    """A list with the rows of all domains mixed. words: {domain: letters i, o, t of its images}."""
    rows = sorted((i, name, letter) for name, letters in words.items() for i, letter in enumerate(letters))
    word = {"i": "in", "o": "out", "t": "test"}
    lines = [f"{name}{i}.png,x,{name},{word[letter]}\n" for i, name, letter in rows]
    return rows_list(tmp_path, "".join(lines), "path,label,domain,split\n")


def official(target: str | list[str], **more) -> OfficialSplit:
    return OfficialSplit(target=target, trial_seed=0, **more)


def test_official_parts_are_honoured_to_the_index(tmp_path):
    source = split_list(tmp_path, {"a": "ioitio", "b": "oi", "c": "ttt"})
    parts = official("c").indices(source.read())
    assert {name: {part: i.tolist() for part, i in of_name.items()} for name, of_name in parts.items()} == {
        "a": {"in": [0, 2, 4], "out": [1, 5], "test": [3]},
        "b": {"in": [1], "out": [0]},
        "c": {"in": [], "out": [], "test": [0, 1, 2]},
    }
    assert {images.dtype for of_name in parts.values() for images in of_name.values()} == {np.dtype(np.int64)}
    assert source.has_official_split


def test_contradictory_splits_are_refused(tmp_path):
    dataset = split_list(tmp_path, {"a": "oot", "b": "io", "c": "t"}).read()
    message = (
        r"the source domain a, c has no `in` images to train on \(a: 0 in, 2 out, 1 test; c: 0 in, 0 out, 1 test\)"
    )
    with pytest.raises(UserError, match=message):
        official("b").indices(dataset)
    with pytest.raises(UserError, match=r"holdout_fraction=0\.2 contradicts split=from_list: the column split"):
        official("b", holdout_fraction=0.2)
    without = rows_list(tmp_path / "plain", "0.png,x,a\n1.png,x,b\n")
    assert not without.has_official_split
    with pytest.raises(UserError, match=r"split=from_list: dataset=list defines no split\. .* a column split with the"):
        official("b").indices(without.read())


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_every_kind_of_unusable_row_is_in_one_message_with_its_number(tmp_path, monkeypatch):
    rows = """path,label,domain,split
a.png,cat,p,in
,cat,p,in
b.png,,p,in
c.png,cat, ,in
https://x.org/d.png,cat,p,in
s3://x/e.png,cat,p,in
f.png,cat,p,train
g.png,cat,p,
./a.png,dog,s,out
d/../a.png,dog,s,out
"""
    rows += f"{tmp_path}/a.png,dog,s,out\n"
    for chunk in (100_000, 3):
        monkeypatch.setattr(list_table, "CHUNK", chunk)
        assert refused_list(tmp_path, rows).splitlines() == [
            "images.csv: rows that cannot be used. Row 1 is the first one after the column names.",
            "  no path: row 2 (no path)",
            "  no label: row 3 (b.png)",
            "  no domain: row 4 (c.png)",
            "  a URL, but only files are read: download them: row 5 (https://x.org/d.png), row 6 (s3://x/e.png)",
            "  an unknown word in the column split; valid: in (training), out (validation), test: "
            "row 7 ('train', f.png), row 8 ('', g.png)",
            "  a path that is there already: row 9 (a.png, as row 1), row 10 (a.png, as row 9), "
            "row 11 (a.png, as row 10)",
        ]
    many = "".join(f"{i}.png,,p\n" for i in range(1234))
    assert refused_list(tmp_path, HEADER + many).endswith(
        "no label: row 1 (0.png), row 2 (1.png), row 3 (2.png), and 1,231 more"
    )


def test_wrong_columns_are_named_with_those_that_are_valid(tmp_path):
    valid = "Needed: path, label, domain; optional: split, group; in a CSV file separated by commas, their names in the"
    for header, message in (
        ("path;label;domain\n", "it lacks path, label, domain. Its columns: 'path;label;domain'. "),
        ("Path,label,domain\n", "it lacks path; 'Path' is probably meant to be path. Its columns: 'Path', "),
        ("path,label,domain,splits,w\n", "'splits' is probably meant to be split. "),
        ("path,label,domain,label\n", "it has label twice. "),
    ):
        found = refused_list(tmp_path, header + "a.png,x,y\n")
        assert found.startswith(f"images.csv: {message}")
        assert valid in found
    assert "Its columns: (none). " in refused_list(tmp_path, "")
    assert refused_list(tmp_path, HEADER).startswith("images.csv has no rows, only the column names.")


def test_files_that_are_no_list_are_named(tmp_path):
    long = "row 2 has 4 values for 3 columns (a,b.png,cat,p). A value with a comma in it needs double quotes"
    assert long in refused_list(tmp_path, HEADER + "b.png,dog,s\n\na,b.png,cat,p\n")
    assert "row 1 has 4 values" in refused_list(tmp_path, HEADER + "a,b.png,cat,p\na,c.png,cat,p\n")
    assert "no domain: row 1 (b.png)" in refused_list(tmp_path, HEADER + "b.png,dog\n")
    assert "images.csv is not in UTF-8." in refused_list(tmp_path, (HEADER + "ü.png,x,y\n").encode("latin-1"))
    assert "cannot read the list images.csv: " in refused_list(tmp_path, HEADER + '"a.png,x,y\n')
    assert "Valid ends: .csv, .parquet." in refused_list(tmp_path, HEADER, "images.txt")
    assert "cannot read the list images.parquet: " in refused_list(tmp_path, HEADER, "images.parquet")
    pd.DataFrame({"path": ["a"], "label": [1.5], "domain": ["d"]}).to_parquet(tmp_path / "images.parquet")
    pd.DataFrame({"path": ["a", "b"], "label": ["x", None], "domain": "d"}).to_parquet(tmp_path / "null.parquet")
    with pytest.raises(UserError, match=r"no label: row 2 \(b\)"):
        image_list(tmp_path / "null.parquet").read()
    with pytest.raises(UserError, match=r"the column label holds double; valid: text or whole numbers\."):
        image_list(tmp_path / "images.parquet").read()


def test_without_pyarrow_the_message_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused_list(tmp_path, b"", "i.parquet").startswith(
        "dataset.file=i.parquet needs pyarrow: pip install 'gsdg[parquet]'"
    )
    rows_list(tmp_path, "1.png,x,y\n").read()


def test_a_missing_list_and_missing_first_images_are_named(root, tmp_path, monkeypatch):
    file = write_list(root / "images.csv")
    with pytest.raises(UserError, match=rf"the list {tmp_path}/images\.csv does not exist\. .* relative to data_dir="):
        image_list(tmp_path / "images.csv")
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=rf"There is one in the working directory: dataset\.file={file}$"):
        image_list(tmp_path / "images.csv", domains=["a"]).check_present()
    (root / "b/y/4.png").unlink()
    image_list(file).read()  # not one of the first images
    (root / "b/x/2.png").unlink()
    message = refusal(image_list(file))
    assert message.startswith(f"list: no such image: {root}/b/x/2.png. Paths in the list are absolute, or relative to")
    assert message.endswith(f"python -m gsdg.data verify list dataset.file={file}")


def test_bad_arguments_are_refused_with_what_is_valid(root):
    file = write_list(root / "images.csv")
    for changes, message in (
        ({"classes": "same"}, "dataset.classes is 'same'; valid: strict, union, intersection"),
        ({"augment": "photo"}, "dataset.augment is 'photo'; valid: photos, none"),
        ({"domains": []}, "dataset.domains=[]: name at least one domain, each once."),
        ({"domains": ["a", "d"]}, f"dataset.domains: {file} has no domain d. Valid: a, b, c."),
        (
            {"class_names": ["x", "z", "x"]},
            f"dataset.class_names must name each label of {file} once. No such label: z; not named: y; twice: x.",
        ),
    ):
        with in_case(changes), pytest.raises(UserError) as caught:
            image_list(file, **changes).read()
        assert str(caught.value) == message


def test_the_cache_is_keyed_by_content_as_for_folders(root, tmp_path):
    cache = {"cache": str(tmp_path / "cache")}
    listed = image_list(write_list(root / "images.csv", parts=lambda i, n: "out" if i == 1 else "in"), **cache)
    folders = image_folders(root, **cache)
    folder = folders.cache.folder(folders.read().domains["b"])
    domain = listed.read().domains["b"]
    assert listed.cache.folder(domain) == folder
    opened = listed.cache.open(domain)
    assert opened.load(3).shape == (48, 51, 3)
    assert opened.official is domain.official
    assert opened.official["out"].tolist() == [1, 6]
    assert image_list(root / "images.csv").cache.folders[0] == root / ".gsdg_cache"
    shutil.rmtree(root / "b/x")
    with pytest.raises(UserError, match="no such image"):
        listed.read()
