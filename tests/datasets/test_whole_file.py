import errno

import pytest

from bpt_rl.datasets.whole_file import whole_file


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a" / "file"
    with whole_file(path) as file:
        file.write(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError, match="mine"), whole_file(path) as file:
        file.write(b"new")
        raise KeyError("mine")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_is_the_reason_even_if_something_else_fails_after_it(tmp_path):
    path = tmp_path / "file"
    message = rf"must be written whole; {path} was not: No space left on device\. Free space"
    with pytest.raises(OSError, match=message) as caught, whole_file(path) as file:
        file.error = OSError(errno.ENOSPC, "No space left on device")
        assert file.write(b"lost") == 4
        raise RuntimeError("a consequence")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with (
        pytest.raises(OSError, match=r"must be written whole; .* was not: "),
        whole_file(tmp_path / "file" / "a"),
    ):
        pass
