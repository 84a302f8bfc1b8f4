import hashlib

import numpy as np
import pytest

from bpt_rl.datasets.catalogue import Archive, find
from bpt_rl.datasets.checksums import Verification, part_sizes

MIB = 2**20
DATA = np.random.default_rng(0).bytes(11 * MIB + 7)
UNKNOWN = Archive(domain="walker", collector="icm")


def multipart_etag(data, part_size):
    """The rule itself: the MD5 of all parts' MD5s, and how many there are."""
    parts = [data[start : start + part_size] for start in range(0, len(data), part_size)]
    digests = b"".join(hashlib.md5(part).digest() for part in parts)
    return f"{hashlib.md5(digests).hexdigest()}-{len(parts)}"


def conclude(archive=UNKNOWN, data=DATA, etag="", piece_size=MIB):
    verification = Verification(archive, num_bytes=len(data), etag=etag)
    for start in range(0, len(data), piece_size):
        verification.update(data[start : start + piece_size])
    assert verification.sha256 == hashlib.sha256(data).hexdigest()
    return verification.conclude()


@pytest.mark.parametrize("piece_size", [MIB, 5 * MIB, 8 * MIB, 999_983, len(DATA)])
@pytest.mark.parametrize("part_size", [5, 8, 10, 16])
def test_a_multipart_etag_verifies_however_the_bytes_come(part_size, piece_size):
    etag = multipart_etag(DATA, part_size * MIB)
    said = conclude(etag=f'"{etag}"', piece_size=piece_size)
    named = "one part" if part_size == 16 else f"{part_size} MiB parts"
    assert said == f"verified by the server's multipart ETag ({named})"


@pytest.mark.parametrize("num_parts", [1, 2])
def test_parts_that_fill_the_file_exactly_leave_no_empty_one(num_parts):
    data = DATA[: num_parts * 5 * MIB]
    assert conclude(data=data, etag=multipart_etag(data, 5 * MIB)).startswith(
        "verified by the server's multi"
    )


def test_one_changed_byte_is_found():
    data = bytearray(DATA)
    data[7 * MIB] ^= 1
    for etag in (multipart_etag(DATA, 8 * MIB), hashlib.md5(DATA).hexdigest()):
        with pytest.raises(ValueError, match=rf"walker/icm must have the server's .*ETag.*, {etag}; got "):
            conclude(data=bytes(data), etag=etag)
    archive = Archive(domain="walker", collector="icm", sha256=hashlib.sha256(DATA).hexdigest())
    assert conclude(archive) == "verified by SHA-256"
    with pytest.raises(ValueError, match=rf"must have SHA-256 {archive.sha256}; got [0-9a-f]{{64}}$"):
        conclude(archive, data=bytes(data))


def test_a_known_digest_counts_more_than_an_etag():
    etag = multipart_etag(DATA, 5 * MIB)
    known = Archive(domain="walker", collector="icm", etag=etag)
    assert conclude(known, etag='"0123"') == "verified by the catalogue's multipart ETag (5 MiB parts)"
    known = Archive(domain="walker", collector="icm", sha256=hashlib.sha256(DATA).hexdigest(), etag="no")
    assert conclude(known, etag=f'"{"0" * 32}"') == "verified by SHA-256"


@pytest.mark.parametrize(
    ("etag", "reason"),
    [
        ("", "the server gave no ETag"),
        ('"5f8a3c1e-b00007"', 'the server\'s ETag "5f8a3c1e-b00007" is not made of MD5s'),
        (f'W/"{"0" * 32}"', f'the server\'s ETag W/"{"0" * 32}" is not made of MD5s'),
        (f'"{"0" * 32}-7"', f'no usual part size gives the 7 parts of the server\'s ETag "{"0" * 32}-7"'),
    ],
)
def test_an_etag_that_says_nothing_of_the_bytes_is_named(etag, reason):
    assert conclude(etag=etag) == f"NOT verified: the catalogue knows no SHA-256, and {reason}"


def test_part_sizes_are_those_that_give_the_count():
    archive = find("walker", "rnd")
    assert part_sizes(archive.num_bytes, int(archive.etag.partition("-")[2])) == (8 * MIB,)
    assert part_sizes(16 * MIB, 2) == (8 * MIB, 10 * MIB, 15 * MIB)
    assert part_sizes(16 * MIB + 1, 2) == (10 * MIB, 15 * MIB, 16 * MIB)
    assert part_sizes(100 * MIB, 1000) == ()
