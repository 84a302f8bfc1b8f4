import hashlib
import struct

import h5py
import numpy as np
import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.store_format import COLUMNS
from bpt_rl.datasets.store_seal import Gap, seal, seal_fault

GAPS = (Gap(100, 50), Gap(20, 30), Gap(60, 0), Gap(50, 10))
"""In any order; two touch, one is empty."""
LEFT_OUT = {*range(20, 60), *range(100, 150)}


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(0).bytes(200))
    with path.open("r+b", buffering=0) as file:
        seal(file, GAPS)
    return path


def test_the_seal_holds_the_digest_of_what_lies_between_the_gaps(sealed):
    content = sealed.read_bytes()
    gaps = struct.pack("<6Q", 20, 30, 50, 10, 100, 50)
    digest = hashlib.sha256(gaps + content[:20] + content[60:100] + content[150:200]).digest()
    assert content[200:] == gaps + digest + struct.pack("<I", 3) + b"BPTSEAL1"
    assert seal_fault(sealed) == ""


def test_every_byte_counts_but_those_in_a_gap(sealed):
    content = sealed.read_bytes()
    for place in range(len(content)):
        for bit in (0, 7):
            spoilt = bytearray(content)
            spoilt[place] ^= 1 << bit
            sealed.write_bytes(spoilt)
            assert bool(seal_fault(sealed)) == (place not in LEFT_OUT), place


def test_a_piece_more_or_less_anywhere_is_noticed(sealed):
    content = sealed.read_bytes()
    for place in range(len(content)):
        # In a gap, too: what lies behind it changes its place.
        for spoilt in (content[:place], content[:place] + content[place + 1 :], content[:place] + content):
            if spoilt != content:
                sealed.write_bytes(spoilt)
                assert seal_fault(sealed), place


@pytest.mark.parametrize("number", [1, 2**31, 2**63, 2**64 - 1])
def test_absurd_places_and_counts_are_refused_at_once(sealed, number):
    content = sealed.read_bytes()
    for place in (200, 208, 216, 240):
        sealed.write_bytes(content[:place] + struct.pack("<Q", number) + content[place + 8 :])
        assert "structure does not match" in seal_fault(sealed)
    sealed.write_bytes(content[:-12] + struct.pack("<I", number % 2**32) + content[-8:])
    assert "structure does not match" in seal_fault(sealed)


def test_pieces_larger_than_a_reading_are_sealed_to_their_last_byte(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(5 << 19))
    with path.open("r+b", buffering=0) as file:
        seal(file, ())
    assert seal_fault(path) == ""
    with path.open("r+b") as file:
        file.seek((5 << 19) - 1)
        file.write(b"\1")
    assert "structure does not match" in seal_fault(path)


def test_a_store_leaves_out_the_arrays_of_its_episodes_and_nothing_else(folder, tmp_path):
    path = build_store(BuildConfig(source=(str(folder),), out=str(tmp_path / "s.h5"), num_workers=1))
    content = path.read_bytes()
    [num_gaps] = struct.unpack("<I", content[-12:-8])
    found = {*struct.iter_unpack("<QQ", content[-44 - 16 * num_gaps : -44])}
    with h5py.File(path) as file:
        columns = [file[name] for name in COLUMNS] + list(file["reward"].values())
        expected = {
            (column.id.get_chunk_info(0).byte_offset, column.id.get_storage_size()) for column in columns
        }
    assert found == expected
