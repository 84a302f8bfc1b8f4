import io
import os
import stat
import struct
import zipfile

import pytest

from bpt_rl.datasets import zip_directory


def zip_of(*members, compression=zipfile.ZIP_DEFLATED, comment=b"", file=None):
    file = file or io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
        archive.comment = comment
    return file.getvalue()


def read(content):
    def read_at(offset, size):
        assert 0 <= offset <= len(content) and size >= 0
        return content[offset : offset + size]

    members = zip_directory.read_directory(read_at, len(content))
    return {name: zip_directory.read_member(read_at, member) for name, member in members.items()}


def random_members():
    return [(f"a/{i}.bin", os.urandom(i) * i) for i in range(20)] + [("a/", b""), ("a/ü.bin", b"x")]


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("comment", [b"", b"a comment", b"PK\5\6" + bytes(40)])
def test_members_are_those_that_zipfile_reads(compression, comment):
    members = random_members()
    assert read(zip_of(*members, compression=compression, comment=comment)) == dict(members)


def test_a_zip_written_to_a_pipe_is_read(make_pipe):
    members = random_members()
    assert read(zip_of(*members, file=make_pipe())) == dict(members)


def test_a_name_not_marked_as_utf_8_is_read_as_cp437():
    assert read(zip_of(("a_b", b"x")).replace(b"a_b", b"a\x81b")) == {"aüb": b"x"}


@pytest.mark.parametrize(("limit", "compression"), [(0, zipfile.ZIP_STORED), (100, zipfile.ZIP_DEFLATED)])
def test_a_zip_with_64_bit_records_is_read(monkeypatch, limit, compression):
    members = random_members()
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    content = zip_of(*members, compression=compression)
    assert b"PK\6\6" in content
    assert read(content) == dict(members)


def test_an_empty_zip_has_no_members():
    assert read(zip_of()) == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "leads out of the zip"),
        ("../a", "leads out of the zip"),
        ("a/../../b", "leads out of the zip"),
        ("a/..", "leads out of the zip"),
        ("C:/a", "leads out of the zip"),
        ("a\\b", "backslash or a control character"),
        ("a\nb", "backslash or a control character"),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused(name, reason):
    with pytest.raises(zipfile.BadZipFile, match=reason) as caught:
        read(zip_of(("good", b"x"), (name, b"x")))
    assert repr(name) in str(caught.value)


def test_a_name_with_nul_or_of_no_utf_8_is_refused():
    content = zip_of(("abcd", b"x"))
    with pytest.raises(zipfile.BadZipFile, match=r"'ab\\x00d' holds a backslash or a control character"):
        read(content.replace(b"abcd", b"ab\0d"))
    with pytest.raises(zipfile.BadZipFile, match="no UTF-8"):
        read(zip_of(("aé", b"x")).replace("é".encode(), b"\xff\xff"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFDIR, stat.S_IFSOCK])
def test_links_and_special_files_are_refused(kind):
    link = zipfile.ZipInfo("episode")
    link.external_attr = (kind | 0o777) << 16
    with pytest.raises(zipfile.BadZipFile, match="'episode' is a link or special file"):
        read(zip_of((link, b"/etc/passwd")))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_occurs_twice_is_refused():
    with pytest.raises(zipfile.BadZipFile, match="holds 'a' twice"):
        read(zip_of(("a", b"x"), ("b", b"x"), ("a", b"y")))


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(compression):
    with pytest.raises(zipfile.BadZipFile, match=r"'a' is compressed by method 1\d"):
        read(zip_of(("a", b"x"), compression=compression))


CENTRAL = {"flags": 8, "method": 10, "crc": 16, "compressed_size": 20, "size": 24, "disk": 34, "offset": 42}
LOCAL = {"flags": 6, "method": 8, "name_size": 26, "name": 30}
END = {"disk": 4, "count_here": 8, "count": 10, "size": 12, "offset": 16, "comment_size": 20}


@pytest.mark.parametrize(
    ("record", "field", "value", "reason"),
    [
        (b"PK\1\2", CENTRAL["flags"], b"\1", "'first' is encrypted"),
        (b"PK\1\2", CENTRAL["crc"], b"\0\0\0\0", "Bad CRC-32 or size for 'first'"),
        (b"PK\1\2", CENTRAL["size"], b"\3", "'first' does not inflate to the size it declares"),
        (b"PK\1\2", CENTRAL["size"], b"\6", "Bad CRC-32 or size for 'first'"),
        (b"PK\1\2", CENTRAL["compressed_size"], b"\2", "'first' does not inflate to the size it declares"),
        (b"PK\1\2", CENTRAL["compressed_size"], b"\xff", "'first' overlaps 'second'"),
        (b"PK\1\2", CENTRAL["disk"], b"\1", "'first' lies in another part of several"),
        (b"PK\1\2", CENTRAL["offset"], b"\1", "'first' is not where the directory says"),
        (b"PK\1\2", CENTRAL["offset"], b"\xff\xff\xff\x7f", "'first' is not where the directory says"),
        (b"PK\1\2", CENTRAL["offset"], b"\xff\xff\xff\xff", "'first' lacks its 64-bit size or offset"),
        (b"PK\1\2", 0, b"QK", "entry 0 of its directory is damaged"),
        (b"PK\1\2", 46, b"F", "'First' has another name in its own header"),
        (b"PK\3\4", LOCAL["name"], b"F", "'first' has another name in its own header"),
        (b"PK\3\4", LOCAL["name_size"], b"\4", "'first' has another name in its own header"),
        (b"PK\3\4", LOCAL["flags"], b"\1", "'first' is compressed or encrypted otherwise"),
        (b"PK\3\4", LOCAL["method"], b"\0", "'first' is compressed or encrypted otherwise"),
        (b"PK\5\6", END["disk"], b"\1", "one part of several"),
        (b"PK\5\6", END["count_here"], b"\1", "one part of several"),
        (b"PK\5\6", END["count_here"], b"\1\0\1\0", "holds more or less than the 1 members it states"),
        (b"PK\5\6", END["count_here"], b"\3\0\3\0", "directory is not where its end record says"),
        (b"PK\5\6", END["size"], b"\1", "directory is not where its end record says"),
        (b"PK\5\6", END["offset"], b"\xff\xff\xff\xff", "directory is not where its end record says"),
        (b"PK\5\6", END["comment_size"], b"\1", "no end record"),
    ],
)
def test_records_that_disagree_are_refused(record, field, value, reason):
    content = bytearray(zip_of(("first", b"first"), ("second", b"second")))
    position = content.find(record) + field
    content[position : position + len(value)] = value
    with pytest.raises(zipfile.BadZipFile, match=reason):
        read(bytes(content))


def without_entry(content, i):
    """The zip with the directory's entry of member `i` gone and the end record in order."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        start, infos = archive.start_dir, archive.infolist()
    sizes = [46 + len(info.filename) for info in infos]
    begin = start + sum(sizes[:i])
    count = len(infos) - 1
    end = struct.pack("<4H2LH", 0, 0, count, count, sum(sizes) - sizes[i], start, 0)
    return content[:begin] + content[begin + sizes[i] : start + sum(sizes)] + b"PK\5\6" + end


@pytest.mark.parametrize("is_pipe", [False, True])
@pytest.mark.parametrize("i", [0, 1, 2])
def test_a_member_that_the_directory_lacks_is_noticed(make_pipe, i, is_pipe):
    file = make_pipe() if is_pipe else None
    content = zip_of(*((name, os.urandom(50)) for name in "abc"), file=file)
    neighbour = {0: "'b'", 1: "'c'", 2: "'its directory'"}[i]
    with pytest.raises(zipfile.BadZipFile, match=f"a member before {neighbour} is not in the directory"):
        read(without_entry(content, i))


@pytest.mark.parametrize("junk", [b"\0", b"junk", bytes(70_000), zip_of(("other", b"x"))])
def test_bytes_before_and_after_a_zip_are_refused(junk):
    content = zip_of(("a", b"x"))
    for changed in (content + junk, junk + content):
        with pytest.raises(zipfile.BadZipFile):
            read(changed)


def test_every_shorter_piece_is_refused():
    content = zip_of(("a", b"abc"), ("b", zip_of(("c", b"d"))), compression=zipfile.ZIP_STORED)
    for i in range(len(content)):
        with pytest.raises(zipfile.BadZipFile):
            read(content[:i])


def test_a_directory_beyond_any_use_is_refused_before_it_is_read():
    size = zip_directory.LARGEST_DIRECTORY + 1
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 1, 1, size, 0, 0)

    def read_at(offset, num_bytes):
        assert num_bytes < 100_000
        return (end if offset + num_bytes > size else b"").rjust(num_bytes, b"\0")

    with pytest.raises(zipfile.BadZipFile, match=f"directory has {size} bytes, above"):
        zip_directory.read_directory(read_at, size + len(end))
