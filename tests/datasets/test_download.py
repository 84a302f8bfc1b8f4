"""Downloads from a real server on this machine that misbehaves as real servers do."""

import hashlib
import io
import re
import zipfile
from dataclasses import replace
from email.utils import formatdate

import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets import download as download_lib
from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import domain_and_tasks
from bpt_rl.datasets.catalogue import Archive
from bpt_rl.datasets.download import download

UNKNOWN = Archive(domain="walker", collector="icm")


def in_folder(target):
    return sorted(path.name for path in target.parent.iterdir())


def test_a_download_is_whole_verified_and_alone_in_its_folder(server, known, config, target):
    seen = []
    done = download(known, config, lambda done, total, note: seen.append((done, total, note)))
    assert target.read_bytes() == server.zip
    assert (done.path, done.num_bytes, done.sha256) == (target, len(server.zip), known.sha256)
    assert (done.verification, done.is_verified, done.is_new) == ("verified by SHA-256", True, True)
    assert in_folder(target) == ["icm.zip"]
    assert [done for done, _, _ in seen] == [*(i * 2**20 for i in range(1, 6)), len(server.zip)]
    assert {total for _, total, _ in seen} == {len(server.zip)}
    assert all(re.fullmatch(r"\d+\.\d MB/s", note) for _, _, note in seen)


def test_each_try_asks_for_just_what_is_missing(server, known, config, target):
    # Four cuts, more than tries in a row: each brings new bytes.
    server.script.extend([server.cut(1_000_000), server.cut(10), server.cut(1_100_000), server.cut(1)])
    assert download(known, config).verification == "verified by SHA-256"
    assert target.read_bytes() == server.zip
    assert [first for _, first in server.requests] == [None, 1_000_000, 1_000_010, 2_100_010, 2_100_011]


@pytest.mark.parametrize("validator", ["etag", "last_modified"])
def test_the_next_call_goes_on_where_one_gave_up(server, known, config, target, part, validator):
    if validator == "last_modified":
        # A weak ETag allows other bytes, so it must not be what a range is asked by.
        server.etag, server.last_modified = 'W/"weak"', formatdate(0, usegmt=True)
    server.script.append(server.cut(1_500_000))
    with pytest.raises(OSError, match=r"1,500,000 bytes are kept, and the same command goes on from there"):
        download(known, replace(config, num_tries=1))
    assert (target.exists(), part.read_bytes()) == (False, server.zip[:1_500_000])
    seen = []
    download(known, config, lambda done, total, note: seen.append(done))
    assert (target.read_bytes(), server.requests[1:]) == (server.zip, [("GET", 1_500_000)])
    assert min(seen) == 1_500_000
    assert in_folder(target) == ["icm.zip"]


def test_a_server_without_validators_or_ranges_sends_everything_anew(server, known, config, target):
    server.etag = ""
    server.script.append(server.cut(1_500_000))
    with pytest.raises(OSError, match="the connection ended early"):
        download(known, replace(config, num_tries=1))
    download(known, config)
    assert (target.read_bytes(), server.requests) == (server.zip, [("GET", None)] * 2)

    target.unlink()
    server.etag = '"version-1"'
    server.script.extend([server.cut(2_000_000), server.cut(1_000_000, offset=0), server.cut(None, offset=0)])
    download(known, config)
    assert target.read_bytes() == server.zip
    assert [first for _, first in server.requests[2:]] == [None, 2_000_000, 1_000_000]


def test_starting_anew_at_every_try_has_an_end(server, known, config):
    server.script.extend([server.cut(1_000_000, offset=0), server.cut(500_000, offset=0)] * 20)
    with pytest.raises(OSError, match="3 tries in a row failed"):
        download(known, config)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "second",
    [
        lambda server: server.cut(),
        lambda server: server.cut(offset=1_000_000),
        lambda server: server.status(416),
    ],
    ids=["whole", "a part of the new version", "416"],
)
def test_a_file_that_changed_meanwhile_is_fetched_anew(server, config, target, second):
    server.script.extend([server.cut(1_000_000, then=server.swap), second(server)])
    done = download(UNKNOWN, config)
    assert target.read_bytes() == server.other_zip
    assert done.sha256 == hashlib.sha256(server.other_zip).hexdigest()
    assert server.requests[1] == ("GET", 1_000_000)


def test_a_part_other_than_the_missing_one_is_not_taken(server, known, config, target):
    server.script.extend([server.cut(1_000_000), server.cut(None, offset=999_999)])
    download(known, config)
    assert target.read_bytes() == server.zip


def test_a_missing_file_is_refused_at_once(server, known, config, target):
    for code in (403, 404, 410):
        server.script.append(server.status(code))
        message = rf"{server.url}/walker/icm\.zip answered {code} .*--mirror or BPT_RL_EXORL_MIRROR"
        with pytest.raises(OSError, match=message):
            download(known, config)
    assert len(server.requests) == 3
    assert in_folder(target) == []


def test_a_busy_server_is_asked_again_after_waits_that_double(server, known, config, target, monkeypatch):
    waits, notes = [], []
    monkeypatch.setattr(download_lib.time, "sleep", waits.append)
    server.script.extend(
        [server.status(503), server.status(429), server.cut(1000), server.status(500), server.cut(0)]
    )
    download(
        known, replace(config, first_wait=1.5, num_tries=4), lambda done, total, note: notes.append(note)
    )
    assert target.read_bytes() == server.zip
    assert waits == [1.5, 3.0, 1.5, 3.0, 6.0]
    assert any("answered 503 Service Unavailable; next try in 2 s" in note for note in notes)


def test_the_wait_that_a_server_asks_for_is_kept(server, known, config, monkeypatch):
    waits = []
    monkeypatch.setattr(download_lib.time, "sleep", waits.append)
    monkeypatch.setattr("bpt_rl.datasets.remote_file.time.time", lambda: 1e9)
    date = formatdate(1e9 + 20, usegmt=True)
    server.script.extend(
        [server.status(503, **{"Retry-After": 7}), server.status(503, **{"Retry-After": date})]
    )
    download(known, config)
    assert waits == [7.0, 20.0]


def test_a_wait_of_hours_is_left_to_the_user(server, known, config, target):
    server.script.extend([server.cut(1000), server.status(429, **{"Retry-After": 3600})])
    with pytest.raises(OSError, match=r"within 600 s; \S+ asks to wait 3600 s\. 1,000 bytes are kept"):
        download(known, config)
    assert len(server.requests) == 2


def test_a_server_that_stays_busy_is_given_up(server, known, config, target):
    server.script.extend([server.status(503)] * 9)
    with pytest.raises(
        OSError, match=r"3 tries in a row failed .* answered 503 Service Unavailable\. 0 bytes"
    ):
        download(known, config)
    assert (len(server.requests), in_folder(target)) == (3, [])


def test_a_silent_server_is_asked_again(server, known, config, target):
    server.script.extend([server.hang(1_200_000), server.hang()])
    notes = []
    download(known, replace(config, timeout=0.4), lambda done, total, note: notes.append(note))
    assert target.read_bytes() == server.zip
    assert notes.count("the server fell silent; next try in 0 s") == 2
    # 1 MiB was read whole, the rest of the second piece may be lost with the connection.
    assert server.requests[1][1] >= 2**20


def test_redirects_are_followed_within_http_only(server, known, config, target):
    server.script.extend([server.cut(1_000_000), server.status(302, Location="/elsewhere.zip")])
    download(known, config)
    assert target.read_bytes() == server.zip
    assert [first for _, first in server.requests] == [None, 1_000_000, 1_000_000]
    target.unlink()
    for place in ("ftp://127.0.0.1/icm.zip", f"file://{__file__}"):
        server.script.append(server.status(302, Location=place))
        with pytest.raises(OSError, match="answered 302"):
            download(known, config)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Encoding": "gzip"}, r"must be sent as it is; \S+ sends it as gzip"),
        ({"Content-Length": ""}, "must state the length"),
        ({"Content-Length": 2_999_999}, r"must have 6,000,\d+ bytes; \S+ has 2,999,999\. .*--mirror"),
        ({"Content-Length": 4_000_000}, r"must have 6,000,\d+ bytes; \S+ has 4,000,000\. .*--mirror"),
    ],
)
def test_answers_that_cannot_be_the_zip_are_refused_and_cost_nothing(
    server, known, config, target, part, headers, message
):
    server.script.extend([server.cut(1_000_000), server.cut(None, offset=0, **headers)])
    with pytest.raises(ValueError, match=message):
        download(known, config)
    assert part.read_bytes() == server.zip[:1_000_000]
    download(known, config)
    assert (target.read_bytes(), server.requests[-1]) == (server.zip, ("GET", 1_000_000))


def test_a_body_shorter_than_announced_never_passes_for_whole(server, config, target):
    server.script.extend([server.cut(None, **{"Content-Length": len(server.zip) + 5})] * 3)
    with pytest.raises(OSError, match="the connection ended early"):
        download(UNKNOWN, config)
    assert not target.exists()


def test_wrong_bytes_are_set_aside_and_never_get_the_name(server, known, config, target):
    wrong = server.other_zip[: len(server.zip)]
    server.content = wrong
    message = (
        rf"must have SHA-256 {known.sha256}; got {hashlib.sha256(wrong).hexdigest()}\. What came is kept as"
    )
    with pytest.raises(ValueError, match=message):
        download(known, config)
    assert in_folder(target) == ["icm.zip.rejected"]
    assert target.with_name("icm.zip.rejected").read_bytes() == wrong
    server.content = server.zip
    assert download(known, config).is_verified
    assert server.requests[-1] == ("GET", None)


def test_a_page_in_place_of_the_zip_is_refused(server, config, target):
    server.content, server.etag = b"<html>Please log in</html>", ""
    with pytest.raises(ValueError, match="An archive must be a zip"):
        download(UNKNOWN, config)
    assert not target.exists()


@pytest.mark.parametrize(
    ("etag", "verification"),
    [
        ("the MD5", "verified by the server's ETag, an MD5"),
        ('"5fcbe90c-2d3f"', 'NOT verified: .* ETag "5fcbe90c-2d3f" is not made of MD5s'),
        ("", "NOT verified: .* the server gave no ETag"),
    ],
)
def test_without_a_known_digest_the_etag_is_what_is_checked(server, config, target, etag, verification):
    server.etag = f'"{hashlib.md5(server.zip).hexdigest()}"' if etag == "the MD5" else etag
    done = download(UNKNOWN, config)
    assert re.fullmatch(verification, done.verification)
    assert done.is_verified == done.verification.startswith("verified")
    server.script.append(server.status(302, Location="/elsewhere.zip"))
    again = download(UNKNOWN, config)
    assert (again.verification, again.is_new) == (done.verification, False)
    assert server.requests == [("GET", None), ("HEAD", None), ("HEAD", None)]


def test_a_multipart_etag_is_checked_across_a_resume(server, config, target):
    parts = [server.zip[: 5 * 2**20], server.zip[5 * 2**20 :]]
    digests = b"".join(hashlib.md5(part).digest() for part in parts)
    server.etag = f'"{hashlib.md5(digests).hexdigest()}-2"'
    server.script.extend([server.cut(1_000_000), server.cut(4_500_000)])
    with pytest.raises(OSError, match="kept"):
        download(UNKNOWN, replace(config, num_tries=1))
    assert download(UNKNOWN, config).verification == "verified by the server's multipart ETag (5 MiB parts)"
    target.unlink()
    # What the catalogue knows counts more than what a server says.
    archive = replace(UNKNOWN, etag=server.etag.strip('"'))
    server.etag = '"another"'
    assert download(archive, config).verification == (
        "verified by the catalogue's multipart ETag (5 MiB parts)"
    )


def test_a_wrong_etag_refuses_the_bytes_also_after_a_resume(server, config, target):
    server.etag = f'"{hashlib.md5(server.other_zip).hexdigest()}"'
    server.script.append(server.cut(1_000_000))
    with pytest.raises(ValueError, match=r"must have the server's ETag, an MD5, .* What came is kept as"):
        download(UNKNOWN, config)
    assert in_folder(target) == ["icm.zip.rejected"]


def test_a_zip_that_is_there_is_checked_and_never_fetched_again(server, known, config, target):
    target.parent.mkdir()
    target.write_bytes(server.zip)
    seen = []
    done = download(known, config, lambda done, total, note: seen.append((done, total)))
    assert (done.verification, done.is_new, server.requests) == ("verified by SHA-256", False, [])
    assert (seen[-1], in_folder(target)) == ((len(server.zip), len(server.zip)), ["icm.zip"])

    message = rf"It stays as it is; move {target} away, and the same command downloads anew"
    for wrong in (server.other_zip[: len(server.zip)], server.zip[:-1]):
        target.write_bytes(wrong)
        with pytest.raises(ValueError, match=message):
            download(known, config)
        assert (target.read_bytes(), in_folder(target)) == (wrong, ["icm.zip"])
    with pytest.raises(ValueError, match=r"must have 6,\d+,\d+ bytes; \S+ has 6,\d+,\d+\. It stays"):
        download(UNKNOWN, config)


def test_a_zip_that_is_there_needs_no_server(server, config, target):
    target.parent.mkdir()
    target.write_bytes(server.zip)
    done = download(UNKNOWN, replace(config, mirror="http://127.0.0.1:9"))
    assert re.search(r"^NOT verified: .* could not be asked \(Connection refused\)$", done.verification)


@pytest.mark.parametrize(
    "mirror",
    [
        "ftp://host/exorl",
        "file:///exorl",
        "host/exorl",
        "http://",
        "http://host:port/",
        "http://a b/",
        "https://h/?a=1",
    ],
)
def test_a_mirror_must_be_a_url_of_a_folder(known, config, tmp_path, mirror):
    with pytest.raises(ValueError, match=r"must be a plain http or https URL of a folder; got"):
        download(known, replace(config, mirror=mirror))
    assert not list(tmp_path.iterdir())


def test_a_host_that_nobody_knows_is_refused_at_once(known, config):
    with pytest.raises(OSError, match=r"host\.invalid/walker/icm\.zip names none that is"):
        download(known, replace(config, mirror="http://host.invalid"))


def test_a_folder_that_cannot_be_made_is_named(known, config, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"file/walker/icm\.zip was not: "):
        download(known, replace(config, out=str(tmp_path / "file")))


def test_a_downloaded_zip_is_what_a_store_is_built_from(server, config, tmp_path, folder, episodes):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"buffer/{path.name}")
    server.content = file.getvalue()
    done = download(Archive(domain="cartpole", collector="random"), config)
    assert done.path == tmp_path / "cartpole" / "random.zip"
    read = list(exorl.iterate_episodes(done.path))
    assert len(read) == len(episodes)
    domain, task_names = domain_and_tasks(BuildConfig(source=(str(done.path),)))
    assert (domain, "cartpole_swingup" in task_names) == ("cartpole", True)
