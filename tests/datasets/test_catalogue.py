import re
from urllib.parse import urlsplit

import pytest

from bpt_rl.datasets.catalogue import ARCHIVES, COLLECTORS, DOMAINS, describe, find
from bpt_rl.envs import tasks


def test_every_domain_has_the_zip_of_every_collector():
    assert (len(DOMAINS), len(COLLECTORS)) == (6, 9)
    assert set(ARCHIVES) == {f"{domain}/{collector}" for domain in DOMAINS for collector in COLLECTORS}
    assert all(
        find(*name.split("/")) is archive and archive.name == name for name, archive in ARCHIVES.items()
    )
    assert set(DOMAINS) <= set(tasks.DOMAINS)


def test_what_is_known_is_of_the_right_form_and_of_one_zip_only():
    known = [archive for archive in ARCHIVES.values() if archive.num_bytes]
    assert {archive.name for archive in known} == {f"{domain}/proto" for domain in DOMAINS} | {"walker/rnd"}
    assert len({archive.num_bytes for archive in known}) == len({a.sha256 or a.etag for a in known}) == 7
    for archive in known:
        if archive.sha256:
            assert re.fullmatch("[0-9a-f]{64}", archive.sha256)
        else:
            assert re.fullmatch(r"[0-9a-f]{32}-\d+", archive.etag)
    assert find("quadruped", "proto").num_bytes == 7_768_551_121
    assert find("walker", "proto").sha256.startswith("a34d0edf628d4824")


def test_urls_are_those_of_exorl_or_of_a_mirror():
    archive = find("point_mass_maze", "icm_apt")
    assert archive.url == "https://dl.fbaipublicfiles.com/exorl/point_mass_maze/icm_apt.zip"
    for folder in ("http://host:8000/a", "http://host:8000/a/"):
        assert archive.url_below(folder) == "http://host:8000/a/point_mass_maze/icm_apt.zip"
    assert len({archive.url for archive in ARCHIVES.values()}) == 54
    assert all(urlsplit(archive.url).scheme == "https" for archive in ARCHIVES.values())


def test_a_misspelt_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"A domain of ExoRL must be .*; got 'waker'\. .*: 'walker'\."):
        find("waker", "rnd")
    with pytest.raises(ValueError, match=r"A collector of ExoRL must be .*; got 'icmapt'\. .*: 'icm_apt'\."):
        find("walker", "icmapt")
    with pytest.raises(ValueError, match=r"got 'cheeta'\. .*: 'cheetah'\."):
        describe(["walker", "cheeta"])


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit_and_cut_no_word(width):
    text = describe(width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    words = set(re.split(r"[\s,]+", text))
    assert {*DOMAINS, *COLLECTORS, "SHA-256"} <= words
    for name in DOMAINS:
        domain = tasks.DOMAINS[name]
        assert {task.removeprefix(f"{name}_") for task in domain.tasks} <= words
        numbers = (domain.observation_dim, domain.action_dim, domain.physics_dim, domain.episode_steps)
        assert re.search(rf"^ {name} +{' +'.join(map(str, numbers))} ", text, re.M)


def test_only_the_chosen_domains_are_shown_and_how_each_zip_is_verified():
    rows = [line.split() for line in describe(["walker"], width=120).splitlines()]
    assert ["walker", "proto", "2,584,420,588", "SHA-256"] in rows
    assert ["walker", "rnd", "2,585,461,986", "known", "ETag"] in rows
    others = ["aps,", "diayn,", "disagreement,", "icm,", "icm_apt,", "random,", "smm"]
    assert ["walker", *others, "unknown", "server's", "ETag"] in rows
    assert not {"cheetah", "jaco"} & {word for row in rows for word in row}
