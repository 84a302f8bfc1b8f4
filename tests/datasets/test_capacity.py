import jax
import pytest

from bpt_rl.datasets import capacity
from bpt_rl.datasets.capacity import Capacity, choose

GIB = 1 << 30


@pytest.mark.parametrize(
    ("num_bytes", "accelerator", "host", "place"),
    [
        (10 * GIB, 50 * GIB, 1, "accelerator"),
        (10 * GIB + 1, 50 * GIB, 100 * GIB, "host"),
        (10 * GIB, None, 20 * GIB, "host"),
        (10 * GIB + 1, None, 20 * GIB, "stream"),
        (10 * GIB + 1, 50 * GIB, 20 * GIB, "stream"),
    ],
)
def test_auto_takes_the_nearest_place_with_room_to_spare(num_bytes, accelerator, host, place):
    choice = choose("auto", num_bytes, Capacity(accelerator=accelerator, host=host))
    assert (choice.place, choice.num_bytes) == (place, num_bytes)


def test_the_choice_says_its_reason_and_the_bytes():
    free = Capacity(accelerator=50 * GIB, host=20 * GIB)
    assert str(choose("auto", 5 * GIB, free)) == (
        "accelerator: episodes of 5 GiB take at most 20% of the 50 GiB free there"
    )
    assert (
        str(choose("auto", 11 * GIB, free))
        == "stream: episodes of 11 GiB take more than 50% of the host's 20 GiB"
    )
    assert str(choose("host", 3 << 20, free)) == "host: asked for; episodes of 3 MiB"


def test_a_place_asked_for_is_taken_to_the_last_byte_and_refused_beyond():
    free = Capacity(accelerator=5 * GIB, host=3 * GIB)
    for place, room in (("accelerator", 5 * GIB), ("host", 3 * GIB)):
        assert choose(place, room, free).place == place
        with pytest.raises(
            ValueError, match=rf"got data\.place '{place}', \S+ GiB of episodes and {room // GIB} GiB"
        ):
            choose(place, room + GIB, free)
    assert choose("stream", 1000 * GIB, free).place == "stream"
    # JAX's CPU "device" tells no capacity: it is the host's.
    assert choose("accelerator", 2 * GIB, Capacity(accelerator=None, host=3 * GIB)).place == "accelerator"
    with pytest.raises(ValueError, match=r"4 GiB of episodes and 3 GiB free\. Use data\.place stream"):
        choose("accelerator", 4 * GIB, Capacity(accelerator=None, host=3 * GIB))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_is_what_the_machine_has_left_or_the_container_if_that_is_less(tmp_path, monkeypatch):
    monkeypatch.setattr(capacity, "CGROUPS", tmp_path)
    monkeypatch.setattr(capacity, "MEMORY_INFORMATION", tmp_path / "meminfo")
    write(tmp_path / "meminfo", "MemTotal:       9000 kB\nMemAvailable:    4000 kB\nHugePages_Total:   0\n")
    assert capacity.measure().host == 4000 * 1024
    write(tmp_path / "memory.max", "max\n")
    write(tmp_path / "memory.current", "3000\n")
    write(tmp_path / "memory.stat", "anon 1000\ninactive_file 500\n")
    assert capacity.measure().host == 4000 * 1024
    write(tmp_path / "memory.max", "5000\n")
    assert capacity.measure().host == 5000 - 3000 + 500
    write(tmp_path / "memory" / "memory.limit_in_bytes", "2000\n")
    write(tmp_path / "memory" / "memory.usage_in_bytes", "1500\n")
    write(tmp_path / "memory" / "memory.stat", "inactive_file 7\ntotal_inactive_file 200\n")
    assert capacity.measure().host == 2000 - 1500 + 200


def test_a_machine_without_an_accelerator_has_no_room_there():
    room = capacity.measure()
    assert room.host > 0
    assert (room.accelerator is None) == (jax.default_backend() == "cpu")
