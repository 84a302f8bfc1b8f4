"""Damaged and hostile archives: each is read exactly or refused by name, and nothing else happens."""

import io
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from bpt_rl.datasets import exorl

NUM_MUTATIONS = 200
EXTREMES = (0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF, 2**63, 2**64 - 1)
RECORDS = {b"PK\3\4": 30, b"PK\1\2": 46, b"PK\5\6": 22, b"PK\6\6": 56, b"PK\6\7": 20}


def archive_of(folder, file, compression):
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("buffer/", b"")
        for path in sorted(folder.iterdir()):
            archive.writestr(f"buffer/{path.name}", path.read_bytes())
        archive.writestr("video/0.mp4", b"a film")
    return file.getvalue()


@pytest.fixture(scope="module")
def archives(folder, make_pipe):
    """The three episodes in a zip stored, deflated, written to a pipe, and with 64-bit records."""
    made = [
        archive_of(folder, io.BytesIO(), zipfile.ZIP_STORED),
        archive_of(folder, io.BytesIO(), zipfile.ZIP_DEFLATED),
        archive_of(folder, make_pipe(), zipfile.ZIP_DEFLATED),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zipfile, "ZIP64_LIMIT", 20)
        made.append(archive_of(folder, io.BytesIO(), zipfile.ZIP_STORED))
    return made


def entries(content):
    """Begin and end of each member, header and data, and of its name in the directory."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos, start = archive.infolist(), archive.start_dir
    begins = [info.header_offset for info in infos]
    found = []
    for info, end in zip(infos, [*begins[1:], start], strict=True):
        name = content.find(info.filename.encode(), start)
        found.append((info.header_offset, end, name, len(info.filename)))
    return found


def flip_one_bit(content, rng):
    return flip_bits(content, rng, 1)


def flip_bits(content, rng, num_bits=None):
    changed = bytearray(content)
    for _ in range(num_bits or rng.integers(2, 9)):
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def flip_outside_data(content, rng):
    """Flips a bit of a header or of the directory, which are a small part of the bytes."""
    changed = bytearray(content)
    begin, _ = random_record(content, rng)
    changed[begin + rng.integers(min(80, len(content) - begin))] ^= 1 << rng.integers(8)
    return bytes(changed)


def truncate(content, rng):
    return content[: rng.integers(len(content))]


def cut_out(content, rng):
    begin, end = np.sort(rng.integers(len(content) + 1, size=2))
    return content[:begin] + content[end:]


def append_junk(content, rng):
    return content + junk(content, rng)


def prepend_junk(content, rng):
    return junk(content, rng) + content


def junk(content, rng):
    kind = rng.integers(4)
    size = int(rng.integers(1, 100_000))
    return [rng.bytes(size), bytes(size), content, content[-size:]][kind]


def swap_members(content, rng):
    """Exchanges two members, headers and data, and leaves the directory as it was."""
    all_entries = entries(content)
    i, j = np.sort(rng.choice(len(all_entries), 2, replace=False))
    (a, b), (c, d) = all_entries[i][:2], all_entries[j][:2]
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def duplicate_name(content, rng):
    """Gives an episode the name of another, in the directory and before its data."""
    (_, _, name, _), (begin, _, other, size) = (entries(content)[i] for i in rng.permutation([1, 2, 3])[:2])
    return put(put(content, other, content[name : name + size]), begin + 30, content[name : name + size])


def lead_out(content, rng):
    """Makes a name absolute, or one with `..`, in the directory and before its data."""
    begin, _, name, size = entries(content)[rng.integers(1, 5)]
    evil = [b"../../../", b"/tmp/bpt/", b"a/../../b", b"..\\..\\..\\"][rng.integers(4)]
    evil = (evil + content[name + len(evil) : name + size])[:size]
    return put(put(content, name, evil), begin + 30, evil)


def make_special(content, rng):
    """Makes a member a symbolic link, a pipe or a device."""
    name = entries(content)[rng.integers(1, 5)][2]
    mode = [0o120777, 0o010666, 0o020666, 0o060666, 0o140666][rng.integers(5)]
    return put(content, name - 8, struct.pack("<L", mode << 16))


def absurd_field(content, rng):
    """Puts an extreme number anywhere in a header, the directory, or an end record."""
    begin, size = random_record(content, rng)
    width = int(rng.choice([2, 4, 8]))
    number = EXTREMES[rng.integers(len(EXTREMES))] & (2 ** (8 * width) - 1)
    return put(content, begin + int(rng.integers(4, size - 1)), number.to_bytes(width, "little"))


def drop_from_directory(content, rng):
    """Leaves an episode out of the directory, and corrects the end record."""
    names = [entry[2] for entry in entries(content)]
    i = int(rng.integers(1, 4))
    begin, end = names[i] - 46, names[i + 1] - 46
    changed = bytearray(content[:begin] + content[end:])
    last = changed.rfind(b"PK\5\6")
    count, _, size = struct.unpack_from("<2HL", changed, last + 8)
    struct.pack_into("<2HL", changed, last + 8, count - 1, count - 1, size - (end - begin))
    if changed[last - 20 : last - 16] == b"PK\6\7":
        struct.pack_into("<Q", changed, last - 12, last - 76)
        struct.pack_into("<3Q", changed, last - 52, count - 1, count - 1, size - (end - begin))
    return bytes(changed)


def random_record(content, rng):
    """Offset and size of a record: of the zip itself or of an npz in it."""
    signature, size = list(RECORDS.items())[rng.integers(len(RECORDS))]
    found = []
    begin = content.find(signature)
    while begin >= 0:
        found.append(begin)
        begin = content.find(signature, begin + 1)
    return (int(rng.choice(found)), size) if found else (len(content) - 22, 22)


def put(content, begin, part):
    return content[:begin] + part + content[begin + len(part) :]


MUTATIONS = (
    flip_one_bit,
    flip_bits,
    flip_outside_data,
    truncate,
    cut_out,
    append_junk,
    prepend_junk,
    swap_members,
    duplicate_name,
    lead_out,
    make_special,
    absurd_field,
    absurd_field,
    drop_from_directory,
)
ALWAYS_REFUSED = {
    truncate,
    append_junk,
    prepend_junk,
    duplicate_name,
    lead_out,
    make_special,
    drop_from_directory,
}


def verdict(path, episodes):
    """Returns whether the archive was read, having checked that it was read exactly or refused by name."""
    begin = time.monotonic()
    try:
        read = list(exorl.iterate_episodes(path))
    except (ValueError, FileNotFoundError) as error:
        assert path.name in str(error)
        return False
    finally:
        assert time.monotonic() - begin < 5
    assert [name for name, _ in read] == [
        f"buffer/episode_{i:06d}_{episode.num_steps}.npz" for i, episode in enumerate(episodes)
    ]
    for (_, trajectory), episode in zip(read, episodes, strict=True):
        assert_identical(trajectory, episode)
    return True


def assert_identical(trajectory, episode):
    assert not trajectory.extras
    for key in exorl.KEYS:
        values, expected = getattr(trajectory, key), getattr(episode, key)
        assert (values.shape, values.dtype) == (expected.shape, expected.dtype)
        assert values.tobytes() == expected.tobytes()


def test_every_archive_is_read_before_it_is_damaged(archives, episodes, tmp_path):
    for content in archives:
        (tmp_path / "a.zip").write_bytes(content)
        assert verdict(tmp_path / "a.zip", episodes)


@pytest.mark.parametrize("mutation", dict.fromkeys(MUTATIONS))
def test_mutated_archives_are_read_exactly_or_refused_by_name(mutation, archives, episodes, tmp_path):
    path = tmp_path / "target" / "mutated.zip"
    path.parent.mkdir()
    for seed in range(NUM_MUTATIONS):
        if MUTATIONS[seed % len(MUTATIONS)] is not mutation:
            continue
        rng = np.random.default_rng(seed)
        path.write_bytes(mutation(archives[rng.integers(len(archives))], rng))
        was_read = verdict(path, episodes)
        assert not (was_read and mutation in ALWAYS_REFUSED), f"seed {seed}"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_mutated_episodes_are_read_exactly_or_refused_by_name(folder, episodes, tmp_path):
    original = (folder / "episode_000000_40.npz").read_bytes()
    path = tmp_path / "episode_000000_40.npz"
    num_read = 0
    for seed in range(NUM_MUTATIONS):
        rng = np.random.default_rng(seed)
        mutation = (flip_one_bit, flip_bits, truncate, cut_out, absurd_field, append_junk)[seed % 6]
        path.write_bytes(mutation(original, rng))
        try:
            trajectory = exorl.read_episode(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert_identical(trajectory, episodes[0])
            num_read += 1
    # Dates and the like may differ; everything that says something has a checksum or a second copy.
    assert num_read < NUM_MUTATIONS / 10


BOMBS = """
import resource, struct, sys, zipfile, zlib
from bpt_rl.datasets import exorl

def npz_of(data, declared, crc=0, name=b"a.npy"):
    sizes = struct.pack("<3L", crc, len(data), min(declared, 2**32 - 1))
    extra = struct.pack("<2HQ", 1, 8, declared)
    local = b"PK\\3\\4" + struct.pack("<5H", 20, 0, 8, 0, 0) + sizes + struct.pack("<2H", len(name), 0) + name + data
    entry = b"PK\\1\\2" + struct.pack("<6H", 20, 20, 0, 8, 0, 0) + sizes
    entry += struct.pack("<5H2L", len(name), len(extra), 0, 0, 0, 0, 0) + name + extra
    return local + entry + b"PK\\5\\6" + struct.pack("<4H2LH", 0, 0, 1, 1, len(entry), len(local), 0)

def deflated(content, repeats=1):
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflater.compress(content) + deflater.flush(zlib.Z_FULL_FLUSH)
    return block * repeats + deflater.flush()

header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}".ljust(117) + b"\\n"
claim = b"\\x93NUMPY\\1\\0" + struct.pack("<H", 118) + header
bomb = deflated(bytes(2**20), 10_000)
contents = {
    "declared.npz": npz_of(bomb, 10_000 * 2**20),
    "too_small.npz": npz_of(bomb, 2**20),
    "empty.npz": npz_of(bomb, 0),
    "claim.npz": npz_of(deflated(claim), len(claim), zlib.crc32(claim)),
}
for name, content in contents.items():
    with open(name, "wb") as file:
        file.write(content)
    with zipfile.ZipFile(f"nested_{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("episode_0_1000.npz", content)
with open("outer.zip", "wb") as file:
    file.write(npz_of(bomb, 10_000 * 2**20, name=b"episode_0_1000.npz"))
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 96 * 2**20,) * 2)
for name in contents:
    try:
        exorl.read_episode(name)
    except ValueError as error:
        print(error)
    try:
        list(exorl.iterate_episodes(f"nested_{name}.zip"))
    except ValueError as error:
        print(error)
try:
    exorl.list_episodes("outer.zip")
except ValueError as error:
    print(error)
"""


def test_bombs_of_10_gb_are_refused_within_96_mib_alone_and_nested(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    reasons = {
        "declared": "arrays declare 10485760000 bytes, more than 268435456",
        "too_small": "does not inflate to the size it declares",
        "empty": "does not inflate to the size it declares",
        "claim": r"shape (1000000000000,) and type float64 has 0 bytes",
    }
    lines = iter(run.stdout.splitlines())
    for name, reason in reasons.items():
        alone, nested = next(lines), next(lines)
        assert f"{name}.npz cannot be read" in alone and reason in alone
        assert f"nested_{name}.npz.zip/episode_0_1000.npz cannot be read" in nested and reason in nested
    assert "outer.zip/episode_0_1000.npz has 10485760000. Leave" in next(lines)
    assert not list(lines)
