"""Every form of file gives the same rows; every other file is refused with what it is and what to do."""

import bz2
import datetime
import decimal
import gzip
import io
import json
import lzma
import re
import sys
import tarfile
import types
import zipfile

import pytest

from srlm_jax.errors import MissingExtra
from srlm_jax.storage import rows
from srlm_jax.storage.jsonl import BadRecord

ROWS = [{"prompt": 'wie\ngeht’s, "ü"?', "response": "gut 😀"}, {"prompt": "q", "response": "r"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def gzipped(data):
    """The same bytes at any time: they are in the names of tests, which all processes must find alike."""
    return gzip.compress(data, mtime=0)


def read(path, *columns):
    return [row for _, row in rows.read(path, columns or ("prompt", "response"))]


def put(tmp_path, data, name="x.jsonl"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def refusal(path):
    with pytest.raises(BadRecord) as raised:
        read(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)
    return str(raised.value)


# --- what is read -----------------------------------------------------------------------------------------------------


def as_csv(delimiter):
    return delimiter.join(("prompt", "response")) + f'\n"wie\ngeht’s, ""ü""?"{delimiter}gut 😀\nq{delimiter}r\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("lines.jsonl", LINES),
        ("lines.json", LINES),  # the name does not matter
        ("lines.csv", LINES),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES),
        ("no_end.jsonl", LINES.removesuffix(b"\n")),
        ("windows.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("blank_lines.jsonl", b"\n" + LINES.replace(b"}\n", b"}\n \n") + b"\n\n"),
        ("array.json", json.dumps(ROWS)),
        ("array_of_lines.json", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n"),
        ("pretty.json", b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode()),
        ("pretty_objects.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("commas.csv", as_csv(",")),
        ("mark.csv", b"\xef\xbb\xbf" + as_csv(",").encode()),
        ("semicolons.csv", as_csv(";")),
        ("tabs.tsv", as_csv("\t")),
        ("tabs.csv", as_csv("\t")),
        ("windows.csv", as_csv(",").replace("\nq", "\r\nq").replace("response\n", "response\r\n")),
        ("blank_lines.csv", as_csv(",").replace("\nq", "\n\nq") + "\n,\n"),
        ("lines.jsonl.gz", gzipped(LINES)),
        ("two_parts.gz", gzipped(LINES[:50]) + gzipped(LINES[50:])),
        ("lines.bz2", bz2.compress(LINES)),
        ("lines.xz", lzma.compress(LINES)),
        ("commas.csv.gz", gzipped(as_csv(",").encode())),
        ("array.json.gz", gzipped(json.dumps(ROWS).encode())),
    ],
)  # fmt: skip
def test_every_form_of_text_gives_the_same_rows(tmp_path, name, data):
    assert read(put(tmp_path, data, name)) == ROWS


def test_rows_are_named_by_their_place(tmp_path):
    def places(data, name):
        path = put(tmp_path, data, name)
        return [where.removeprefix(f"{path}:") for where, _ in rows.read(path, ())]

    assert places(b"\n" + LINES, "x.jsonl") == ["2", "3"]
    assert places(json.dumps(ROWS, indent=1), "x.json") == ["2 (item 1)", "6 (item 2)"]
    assert places(as_csv(","), "x.csv") == ["2", "4"]


def test_cells_of_csv_are_text_and_empty_ones_are_null(tmp_path):
    path = put(tmp_path, 'id, prompt ,response,\n007,,"",x\n', "x.csv")
    assert read(path, "id", "prompt", "response") == [{"id": "007", "prompt": None, "response": None}]
    long = "long " * 100_000
    assert read(put(tmp_path, f"prompt\n{long}\n", "x.csv")) == [{"prompt": long}]


def test_a_nan_is_null_and_an_infinity_is_none_of_json(tmp_path):
    assert read(put(tmp_path, '{"prompt": NaN, "response": [NaN, 1.0]}')) == [{"prompt": None, "response": [None, 1.0]}]
    assert "not valid JSON: Infinity is not a JSON number" in refusal(put(tmp_path, '{"prompt": Infinity}'))


def test_a_separator_of_unicode_ends_no_line(tmp_path):
    assert read(put(tmp_path, '{"prompt": "a\u2028b\x85c"}\n')) == [{"prompt": "a\u2028b\x85c"}]


@pytest.fixture
def table():
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    columns = {
        "id": pyarrow.array([1.0, float("nan")]),
        "text": pyarrow.array(["a", "b"]).dictionary_encode(),
        "large": pyarrow.array(["a", None], pyarrow.large_string()),
        "binary": pyarrow.array(["ü".encode(), b"b"]),
        "rank": pyarrow.array([decimal.Decimal("0"), decimal.Decimal("1")]),
        "ranks": pyarrow.array([[0.0, 1.0], [float("nan")]]),
        "messages": pyarrow.array([[{"role": "user", "content": "q"}], [None]]),
        "day": pyarrow.array([datetime.date(2024, 1, 1)] * 2),
    }
    return pyarrow.table(columns)


def written(form, table, path):
    import pyarrow.feather
    import pyarrow.parquet

    if form == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif form == "feather":
        pyarrow.feather.write_feather(table, path)
    elif form == "stream":
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize("form", ["parquet", "feather", "stream"])
def test_columns_of_arrow_give_plain_values(tmp_path, table, form):
    path = written(form, table, tmp_path / "x")
    assert read(path, "id", "text", "large", "binary", "rank", "ranks", "messages") == [
        {
            "id": 1.0, "text": "a", "large": "a", "binary": "ü", "rank": 0.0, "ranks": [0.0, 1.0],
            "messages": [{"role": "user", "content": "q"}],
        },
        {"id": None, "text": "b", "large": None, "binary": "b", "rank": 1.0, "ranks": [None], "messages": [None]},
    ]  # fmt: skip
    assert rows.columns_of(path) == table.column_names
    (tmp_path / "cut").write_bytes(path.read_bytes()[:-200])
    assert "damaged" in refusal(tmp_path / "cut")


def test_a_column_of_arrow_that_occurs_twice_is_refused(tmp_path, table):
    path = written("feather", table.append_column("text", table["large"]), tmp_path / "x")
    assert len(read(path, "id")) == 2
    with pytest.raises(BadRecord, match="the column 'text' occurs 2 times"):
        read(path, "text")


# --- zstd -------------------------------------------------------------------------------------------------------------

ZSTD = b"\x28\xb5\x2f\xfd" + b"\0" * 20


def test_zstd_needs_its_package_or_is_unpacked_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtra, match=r"x\.jsonl\.zst is compressed with zstd: unpack it with `zstd -d FILE`"):
        read(put(tmp_path, ZSTD, "x.jsonl.zst"))


def test_zstd_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    """With a stand-in for the package, which the tests do not install."""

    class Failed(Exception):
        pass

    def stand_in(stream):
        decompressor = types.SimpleNamespace(stream_reader=lambda data, read_across_frames: stream())
        return types.SimpleNamespace(ZstdDecompressor=lambda: decompressor, ZstdError=Failed)

    def broken():
        raise Failed("did not decompress full frame")

    monkeypatch.setitem(sys.modules, "zstandard", stand_in(lambda: io.BytesIO(LINES)))
    assert read(put(tmp_path, ZSTD)) == ROWS
    monkeypatch.setitem(sys.modules, "zstandard", stand_in(broken))
    assert "not a whole zstd file (did not decompress full frame)" in refusal(put(tmp_path, ZSTD))


# --- what is refused --------------------------------------------------------------------------------------------------


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, LINES)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x.jsonl"))
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (LINES.decode().encode("utf-16"), "UTF-16 text; save it as UTF-8"),
        (LINES.decode().encode("utf-32"), "UTF-32 text; save it as UTF-8, as `iconv -f UTF-32 "),
        (LINES.decode().encode("utf-16-be"), "UTF-16 text; save it as UTF-8"),
        (LINES.decode().encode("utf-16-le"), "UTF-16 text; save it as UTF-8"),
        (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook; save the sheet as CSV in UTF-8"),
        (zipped("x.jsonl"), "a zip archive; unpack it"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Excel workbook"),
        (tarred(), "a tar archive; unpack it"),
        (gzipped(tarred()), "a tar archive; unpack it"),
        (gzipped(gzipped(LINES)), "compressed twice; unpack it once"),
        (b"\n<!DOCTYPE html>\n<html><title>Login</title>", "a page of HTML or XML, such as a login or an error page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a page of HTML or XML"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
            "a Git LFS pointer, not the file itself; run `git lfs pull`",
        ),
        (b"SQLite format 3\0" + b"\0" * 99, "an SQLite database; export the table as CSV"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\x01" * 40, "a binary file of an unknown kind"),
        (b"Entry not found", "a text that begins with 'Entry not found'; rows are read from JSON Lines"),
        (b"prompt,response\nq,r\n", "begins with 'prompt,response'; rows are read from JSON Lines, .*CSV .named .csv"),
        (b"", "holds no row"),
        (b" \n\n", "holds no row"),
        (b"[]", "holds no row"),
        (gzipped(b""), "holds no row"),
        (b"\xef\xbb\xbf", "holds no row"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_what_it_is(tmp_path, data, problem):
    message = refusal(put(tmp_path, data))
    assert re.search(problem, message), message


@pytest.mark.parametrize("packed", [gzipped(LINES), bz2.compress(LINES), lzma.compress(LINES)])
def test_a_cut_archive_is_refused(tmp_path, packed):
    assert "not a whole" in refusal(put(tmp_path, packed[:-10]))


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("x.jsonl", '{"prompt": "q"}\n{"prompt": }\n{}\nx\n', ":2: not valid JSON: .*; 2 of 4 rows cannot be read"),
        ("x.jsonl", '{"prompt": "q"}\n"r"\n[]\n', ":2: expected an object, found 'r'; 2 of 3 rows cannot be read"),
        ("x.jsonl", '{"prompt": "q"}\n{"prompt": "cu', ":2: not valid JSON: Unterminated string.*; correct the row or"),
        ("x.jsonl", '{"prompt": "q", "prompt": "r"}\n', ":1: not valid JSON: a key occurs twice"),
        ("x.jsonl", "{'prompt': 'q'}\n", ":1: not valid JSON: Expecting property name enclosed in double quotes"),
        ("x.jsonl", b'{"prompt": "\xff"}\n', ":1: not UTF-8 text .byte 12 of the line"),
        ("x.json", '["q", "r"]', r":1 \(item 1\): expected an object, found 'q'"),
        ("x.json", '[{"prompt": "q"},\n {"prompt": }]', r":2 \(item 2\): not valid JSON"),
        ("x.json", '[{"prompt": "q"}\n {}]', r":1 \(item 1\): expected a comma or the end of the array"),
        ("x.json", '[\n{"prompt": "q"},\n', r":3 \(item 2\): the array does not end, so the file was cut short"),
        ("x.json", '[{"prompt": "q"}]\n[{}]', r":1 \(item 2\): text after the end of the array"),
        ("x.json", b'[{"prompt": "q"},\n{"prompt": "\xe4"}]', ":2: not UTF-8 text"),
        ("x.csv", "prompt,response\n", ": holds no row"),
        ("x.csv", "prompt,prompt\nq,r\n", ": the column 'prompt' occurs 2 times"),
        ("x.csv", "prompt,response\nq,r\nwell, yes,r\na,b,c\n", ":3: 3 cells, and the header has 2; 2 of 3 rows are"),
        ("x.csv", 'prompt,response\nq,r\nq,"r\n', ":3: not valid CSV: unexpected end of data"),
        ("x.csv", b"prompt\nq\n\xe4\n", ":3: not UTF-8 text"),
    ],
)
def test_a_broken_row_is_named_with_its_place(tmp_path, name, data, problem):
    message = refusal(put(tmp_path, data, name))
    assert re.search(rf"/{name}{problem}", message), message
