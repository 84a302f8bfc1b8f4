"""Members of a zip, checked against each other before one is inflated, and read at any offset.

The standard library's reader passes over damage that matters here: it ignores the number of members that
the end record states, the names in the local headers of members it is not asked for, and bytes that no
member owns. One flipped bit can so drop an episode without a word.
"""

import dataclasses
import itertools
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator

ReadAt = Callable[[int, int], bytes]
"""Returns the bytes at an offset, fewer of them only where the file ends; asked for (offset, size)."""

LARGEST_DIRECTORY = 64 * 2**20
"""Bytes; a directory of 10,000 episodes has about 1 MiB."""

_END = struct.Struct("<4x4H2LH")
_LOCATOR64 = struct.Struct("<4xLQL")
_END64 = struct.Struct("<4xQ2H2L4Q")
_CENTRAL = struct.Struct("<4x6H3L5H2L")
_LOCAL = struct.Struct("<4x5H3L2H")
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED_OR_PATCHED = 0x1 | 0x20 | 0x40 | 0x2000
_UTF8 = 0x800


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a zip, as its directory states it."""

    name: str
    raw_name: bytes
    """As stored, in the directory and again before the data."""
    size: int
    """Bytes once inflated."""
    compressed_size: int
    """Bytes in the zip."""
    crc: int
    """CRC-32 of the inflated bytes."""
    is_deflated: bool
    header_offset: int
    """Where the local header begins."""
    data_offset: int = 0
    """Where the data begins, behind the local header."""


def read_directory(read_at: ReadAt, size: int) -> dict[str, Member]:
    """Returns the members of a zip by name, in the directory's order.

    Everything that can be checked without reading the data is: the end record, the directory and every
    local header agree, names are relative and distinct, members are plain files or folders, stored or
    deflated, not encrypted, and neither overlap nor leave room for a member that the directory lacks.

    Args:
      read_at: Reads the zip.
      size: Bytes of the zip.

    Raises:
      zipfile.BadZipFile: If the zip is damaged or unsafe; the message is the reason, without a file's name.

    Source: PKWARE's APPNOTE 6.3, section 4.3.
    """
    count, start, end = _find_directory(read_at, size)
    members: dict[str, Member] = {}
    for member in _entries(read_at(start, end - start), count):
        if member.name in members:
            raise zipfile.BadZipFile(f"it holds {member.name!r} twice")
        if member.header_offset >= start:
            raise zipfile.BadZipFile(f"{member.name!r} is not where the directory says")
        members[member.name] = _located(read_at, member)
    _check_extents(read_at, members.values(), start)
    return members


def read_member(read_at: ReadAt, member: Member) -> bytes:
    """Returns the bytes of a member, never more than it declares.

    Raises:
      zipfile.BadZipFile: If they do not have the declared size and CRC; the message is the reason.
    """
    content = read_at(member.data_offset, member.compressed_size)
    if len(content) != member.compressed_size:
        raise zipfile.BadZipFile(f"{member.name!r} is cut short")
    if member.is_deflated:
        content = _inflated(content, member)
    if len(content) != member.size or zlib.crc32(content) != member.crc:
        raise zipfile.BadZipFile(f"Bad CRC-32 or size for {member.name!r}")
    return content


def _inflated(content: bytes, member: Member) -> bytes:
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        # One byte more than declared: 0 would mean without limit, and the excess shows a lie.
        inflated = inflater.decompress(content, member.size + 1)
    except zlib.error as error:
        raise zipfile.BadZipFile(f"{member.name!r} cannot be inflated: {error}") from error
    if not inflater.eof:
        raise zipfile.BadZipFile(f"{member.name!r} does not inflate to the size it declares")
    return inflated


def _find_directory(read_at: ReadAt, size: int) -> tuple[int, int, int]:
    """Returns the number of members, and where the directory begins and ends."""
    tail_offset = max(0, size - _END.size - _FULL16)
    tail = read_at(tail_offset, size - tail_offset)
    position = len(tail) - _END.size
    while True:
        position = tail.rfind(b"PK\5\6", 0, position + 4) if position >= 0 else -1
        if position < 0:
            raise zipfile.BadZipFile("it has no end record, as if cut short")
        fields = _END.unpack_from(tail, position)
        if position + _END.size + fields[6] == len(tail):
            break
        position -= 1
    disk, directory_disk, count_here, count, directory_size, start, _ = fields
    end = tail_offset + position
    if read_at(max(0, end - _LOCATOR64.size), 4) == b"PK\6\7":
        disk, directory_disk, count_here, count, directory_size, start, end = _end64(read_at, end)
    if (disk, directory_disk, count_here) != (0, 0, count):
        raise zipfile.BadZipFile("it is one part of several, or its end record is damaged")
    if start + directory_size != end or count * _CENTRAL.size > directory_size:
        raise zipfile.BadZipFile("its directory is not where its end record says")
    if directory_size > LARGEST_DIRECTORY:
        raise zipfile.BadZipFile(f"its directory has {directory_size} bytes, above {LARGEST_DIRECTORY}")
    return count, start, end


def _end64(read_at: ReadAt, end: int) -> tuple[int, int, int, int, int, int, int]:
    """Returns the fields of the end record for large zips, and where that record begins."""
    locator_offset = end - _LOCATOR64.size
    _, offset, _ = _LOCATOR64.unpack(read_at(locator_offset, _LOCATOR64.size))
    record = read_at(offset, _END64.size) if offset + _END64.size <= locator_offset else b""
    if len(record) < _END64.size or record[:4] != b"PK\6\6":
        raise zipfile.BadZipFile("its 64-bit end record is not where its locator says")
    record_size, _, _, disk, directory_disk, count_here, count, directory_size, start = _END64.unpack(record)
    if offset + 12 + record_size != locator_offset:
        raise zipfile.BadZipFile("its 64-bit end record has another size than it states")
    return disk, directory_disk, count_here, count, directory_size, start, offset


def _entries(directory: bytes, count: int) -> Iterator[Member]:
    position = 0
    for i in range(count):
        if directory[position : position + 4] != b"PK\1\2" or position + _CENTRAL.size > len(directory):
            raise zipfile.BadZipFile(f"entry {i} of its directory is damaged")
        fields = _CENTRAL.unpack_from(directory, position)
        name_end = position + _CENTRAL.size + fields[9]
        extra_end = name_end + fields[10]
        yield _entry(fields, directory[position + _CENTRAL.size : name_end], directory[name_end:extra_end])
        position = extra_end + fields[11]
    if position != len(directory):
        raise zipfile.BadZipFile(f"its directory holds more or less than the {count} members it states")


def _entry(fields: tuple[int, ...], raw_name: bytes, extra: bytes) -> Member:
    _, _, flags, method, _, _, crc, compressed_size, size, *_, disk, _, attributes, offset = fields
    try:
        name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError as error:
        raise zipfile.BadZipFile(f"the name {raw_name!r} is no UTF-8") from error
    _check_name(name)
    _check_kind(name, attributes >> 16)
    if flags & _ENCRYPTED_OR_PATCHED:
        raise zipfile.BadZipFile(f"{name!r} is encrypted or a patch")
    if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise zipfile.BadZipFile(f"{name!r} is compressed by method {method}, neither stored nor deflated")
    size, compressed_size, offset = _with_64_bits([size, compressed_size, offset], extra, name)
    if disk != 0:
        raise zipfile.BadZipFile(f"{name!r} lies in another part of several")
    return Member(
        name=name,
        raw_name=raw_name,
        size=size,
        compressed_size=compressed_size,
        crc=crc,
        is_deflated=method == zipfile.ZIP_DEFLATED,
        header_offset=offset,
    )


def _with_64_bits(fields: list[int], extra: bytes, name: str) -> list[int]:
    """Returns sizes and offset, those too large for 32 bits taken from the extra field."""
    if _FULL32 not in fields:
        return fields
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            wide = iter(
                struct.unpack_from(f"<{min(size, len(extra) - position - 4) // 8}Q", extra, position + 4)
            )
            fields = [next(wide, _FULL32) if field == _FULL32 else field for field in fields]
            break
        position += 4 + size
    if _FULL32 in fields:
        raise zipfile.BadZipFile(f"{name!r} lacks its 64-bit size or offset")
    return fields


def _check_name(name: str) -> None:
    if not name or name.startswith("/") or name[1:2] == ":" or ".." in name.split("/"):
        raise zipfile.BadZipFile(f"the name {name!r} leads out of the zip")
    if "\\" in name or not name.isprintable():
        raise zipfile.BadZipFile(f"the name {name!r} holds a backslash or a control character")


def _check_kind(name: str, mode: int) -> None:
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG):
        raise zipfile.BadZipFile(f"{name!r} is a link or special file, not a plain one")


def _located(read_at: ReadAt, member: Member) -> Member:
    """Returns the member with the offset of its data, its local header checked."""
    header = read_at(member.header_offset, _LOCAL.size + len(member.raw_name))
    if len(header) < _LOCAL.size or header[:4] != b"PK\3\4":
        raise zipfile.BadZipFile(f"{member.name!r} is not where the directory says")
    _, flags, method, _, _, _, _, _, name_size, extra_size = _LOCAL.unpack_from(header)
    if name_size != len(member.raw_name) or header[_LOCAL.size :] != member.raw_name:
        raise zipfile.BadZipFile(f"{member.name!r} has another name in its own header")
    expected = zipfile.ZIP_DEFLATED if member.is_deflated else zipfile.ZIP_STORED
    if flags & _ENCRYPTED_OR_PATCHED or method != expected:
        raise zipfile.BadZipFile(f"{member.name!r} is compressed or encrypted otherwise in its own header")
    data_offset = member.header_offset + len(header) + extra_size
    return dataclasses.replace(member, data_offset=data_offset)


def _check_extents(read_at: ReadAt, members: Collection[Member], end: int) -> None:
    extents = [(m.header_offset, m.data_offset + m.compressed_size, m.name) for m in members]
    extents = [(0, 0, ""), *sorted(extents), (end, end, "its directory")]
    for (_, data_end, name), (begin, _, other) in itertools.pairwise(extents):
        if data_end > begin:
            raise zipfile.BadZipFile(f"{name!r} overlaps {other!r}")
        # Up to 24 bytes may repeat the sizes behind the data.
        if begin - data_end >= _LOCAL.size and b"PK\3\4" in read_at(data_end, _LOCAL.size + 24):
            raise zipfile.BadZipFile(f"a member before {other!r} is not in the directory")
