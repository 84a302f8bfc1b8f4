import io
import struct
import warnings
import zipfile

import numpy as np
import pytest

from bpt_rl.datasets import npz

DTYPES = ["<f2", "<f4", "<f8", ">f4", ">f8", "i1", "<i8", "?", "<c8", "S3", "<U2", "<M8[s]"]


def npz_of(**members):
    """An npz of arrays, or of raw bytes, under these keys."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, values in members.items():
            archive.writestr(f"{key}.npy", values if isinstance(values, bytes) else npy(values))
    return file.getvalue()


def npy(values, version=None):
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version)
    return file.getvalue()


def with_header(text, data=b""):
    """An npy of version 1 with any header, padded as NumPy does."""
    header = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def random_array(rng, dtype):
    shape = tuple(rng.integers(0, 5, rng.integers(0, 4)))
    values = rng.integers(-100, 100, shape).astype(dtype)
    return np.asfortranarray(values) if rng.random() < 0.5 else values


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_those_that_numpy_reads(save):
    rng = np.random.default_rng()
    arrays = {f"{dtype} {i}": random_array(rng, dtype) for dtype in DTYPES for i in range(8)}
    file = io.BytesIO()
    save(file, **arrays)
    read = npz.read_arrays(file.getvalue(), "a.npz")
    with np.load(io.BytesIO(file.getvalue())) as expected:
        assert list(read) == expected.files
        for key in read:
            np.testing.assert_array_equal(read[key], expected[key], strict=False)
            assert read[key].shape == expected[key].shape
            assert read[key].dtype == expected[key].dtype.newbyteorder("=")
            assert read[key].dtype.isnative and read[key].flags.aligned
            assert read[key].flags.f_contiguous == expected[key].flags.f_contiguous


def test_version_2_of_the_format_is_read():
    content = npz_of(a=npy(np.arange(6.0), version=(2, 0)))
    np.testing.assert_array_equal(npz.read_arrays(content, "a.npz")["a"], np.arange(6.0))


def test_an_array_that_lies_unaligned_is_copied():
    content = b"\x93NUMPY\1\0" + struct.pack("<H", 61)
    content += b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}".ljust(60) + b"\n"
    read = npz.read_arrays(npz_of(a=content + np.array([1.5, -2.5]).tobytes()), "a.npz")["a"]
    assert read.flags.aligned
    assert read.tolist() == [1.5, -2.5]


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (npy(np.array([None])), "Object arrays cannot be loaded"),
        (npy(np.zeros(2, "f4,f8")), "not a plain one"),
        (npy(np.zeros(2, "V2")), "not a plain one"),
        (npy(np.zeros(2), version=(3, 0)), "version 1 or 2"),
        (b"", "version 1 or 2"),
        (b"\x80\4K\1.", "version 1 or 2"),
        (npy(np.zeros(2))[:-1], r"shape \(2,\) and type float64 has 15 bytes"),
        (npy(np.zeros(2)) + b"\0", r"shape \(2,\) and type float64 has 17 bytes"),
        (npy(np.zeros(2))[:40], r"header length|EOF|header"),
        (b"\x93NUMPY\2\0" + b"\xff\xff\xff\x7f", "header has 2147483659 bytes, more than 10000"),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}"), "has 0 bytes"),
        (
            with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -2)}", b"\0" * 16),
            r"\(-1, -2\)",
        ),
        (with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (0, 10**40)}"), "'a.npy': "),
        (with_header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': (0, {10**40})}}"), "'a.npy': "),
        (
            with_header("{'descr': 'S0', 'fortran_order': False, 'shape': (1000000000000,)}"),
            "not a plain one",
        ),
        (with_header("{'descr': '<f8', 'fortran_order': False}"), "keys"),
        (with_header("{'descr': 'no type', 'fortran_order': False, 'shape': (1,)}"), "descr"),
        (with_header("(" * 9000), "'a.npy': "),
        (with_header("-" * 9000 + "1"), "'a.npy': "),
        (with_header("[1,\n2"), "'a.npy': "),
    ],
)
def test_an_array_that_is_damaged_or_not_plain_is_refused_with_its_name(member, reason):
    with warnings.catch_warnings(), pytest.raises(ValueError, match=reason) as caught:
        warnings.simplefilter("ignore")
        npz.read_arrays(npz_of(good=np.zeros(3), a=member), "b/c.npz")
    assert "must be a whole npz file; b/c.npz cannot be read ('a.npy': " in str(caught.value)


def test_members_that_are_no_arrays_are_refused():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "")
    with pytest.raises(ValueError, match=r"c\.npz cannot be read \('notes\.txt' is no npy array"):
        npz.read_arrays(file.getvalue(), "c.npz")


def test_the_size_of_all_arrays_together_is_bounded():
    content = npz_of(a=np.zeros(100), b=np.zeros(100))
    declared = 2 * (128 + 800)
    assert len(npz.read_arrays(content, "c.npz", largest=declared)) == 2
    with pytest.raises(
        ValueError, match=rf"c\.npz .*arrays declare {declared} bytes, more than {declared - 1}"
    ):
        npz.read_arrays(content, "c.npz", largest=declared - 1)


def test_a_mutated_array_with_a_valid_checksum_is_what_numpy_reads_or_refused():
    arrays = [np.arange(12.0).reshape(3, 4), np.asfortranarray(np.ones((2, 3), "f4")), np.array("ab")]
    tokens = [
        b"1",
        b"-1",
        b"(",
        b"'O'",
        b"'<f4'",
        b"'S0'",
        b"True ",
        b"9" * 20,
        b"10**9",
        b"L",
        b"\0",
        b"\xff",
    ]
    num_read = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        member = npy(arrays[seed % 3])
        begin, token = rng.integers(6, 100), tokens[rng.integers(len(tokens))]
        if seed % 2:
            begin, token = member.find(b"<"), [b"<i", b">f", b"=u", b"|V", b"<c", b">U"][rng.integers(6)]
        content = npz_of(a=member[:begin] + token + member[begin + len(token) :])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read = npz.read_arrays(content, "c.npz")["a"]
                expected = np.load(io.BytesIO(content))["a"]
        except ValueError as error:
            assert "c.npz cannot be read ('a.npy': " in str(error)
        else:
            native = expected.astype(expected.dtype.newbyteorder("="))
            assert (read.shape, read.dtype, read.tobytes()) == (native.shape, native.dtype, native.tobytes())
            num_read += 1
    assert 50 < num_read < 200
