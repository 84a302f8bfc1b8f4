"""`bpt-rl data list` and `data download` as users meet them."""

import functools
import hashlib
import os
import re
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        """Keeps quiet."""


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A plain web server that holds one zip, named by the environment."""
    path = tmp_path / "mirror" / "walker" / "icm.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("buffer/noise", np.random.default_rng(0).bytes(2_000_000))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    handler = functools.partial(Quiet, directory=tmp_path / "mirror")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("BPT_RL_EXORL_MIRROR", f"http://127.0.0.1:{server.server_address[1]}")
        yield path
        server.shutdown()
        thread.join()


def test_data_list_shows_every_zip_and_a_domain_alone(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    status, out, err = cli.run("data list")
    assert (status, err) == (0, "")
    assert len(re.findall(r"^ \w+ +proto +[\d,]+ +SHA-256$", out, re.M)) == 6
    assert 80 < max(map(len, out.splitlines())) <= 100
    status, out, err = cli.run("data list walker")
    assert (status, err, "cheetah" in out) == (0, "", False)
    assert re.search(r"^ walker +24 +6 +18 +1000 +stand, walk, run", out, re.M)


def test_a_download_says_how_it_was_verified_and_the_second_that_it_was_there(cli, mirror, tmp_path):
    line = f"data download walker icm --out {tmp_path}/exorl"
    status, out, err = cli.run(line)
    path = tmp_path / "exorl" / "walker" / "icm.zip"
    sha256 = hashlib.sha256(mirror.read_bytes()).hexdigest()
    rest = (
        f"{len(mirror.read_bytes()):,} bytes, SHA-256 {sha256}: NOT verified: the catalogue knows no SHA-256, and the "
        f"server gave no ETag.\n`bpt-rl data verify {path}` can still tell whether every episode is readable.\n"
    )
    assert (status, out) == (0, f"Archive: {path}\n{rest}")
    assert re.search(r"^download walker/icm \(MB\): done in \d+ s \(\d+\.\d MB/s\)$", err, re.M)
    assert path.read_bytes() == mirror.read_bytes()
    assert cli.run(line)[:2] == (0, f"Archive: {path} (it was there already)\n{rest}")


def test_an_option_counts_more_than_the_environment(cli, mirror, tmp_path, monkeypatch):
    good = f"--mirror {os.environ['BPT_RL_EXORL_MIRROR']}"
    monkeypatch.setenv("BPT_RL_EXORL_MIRROR", "http://nowhere.invalid")
    line = f"data download walker icm --out {tmp_path}/exorl"
    assert "http://nowhere.invalid/walker/icm.zip names none that is" in cli.refuse(line)
    assert cli.run(f"{line} {good}")[0] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data list waker", r"got 'waker'\. Nearest valid one: 'walker'\."),
        ("data list --width 3", r"no option --width\."),
        (
            "data download",
            r"`bpt-rl data download` needs a domain and a collector, .* Example: bpt-rl data down",
        ),
        (
            "data download walker",
            r"needs one domain and one collector, as `bpt-rl data list` .*; got walker\.",
        ),
        ("data download walker rnd icm", r"needs one domain and one collector, .*; got walker rnd icm\."),
        ("data download waker rnd", r"got 'waker'\. Nearest valid one: 'walker'\."),
        ("data download walker rdn", r"got 'rdn'\. Nearest valid one: 'rnd'\."),
        ("data download walker rnd --miror a", r"no option --miror\. Nearest: --mirror\."),
        (
            "data download walker rnd --mirror ftp://host",
            r"plain http or https URL of a folder; got ftp://host\.",
        ),
        ("data download walker icm_apt", r"/walker/icm_apt\.zip answered 404 File not found\. .*--mirror"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(cli, mirror, tmp_path, monkeypatch, line, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, cli.refuse(line))
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != mirror]


def test_numbers_that_make_no_sense_are_refused(cli):
    for option in ("--num-tries 0", "--timeout 0", "--first-wait -1"):
        status, _, err = cli.run(f"data download walker rnd {option}")
        assert (status, "must" in err, "Traceback" in err) == (2, True, False)
