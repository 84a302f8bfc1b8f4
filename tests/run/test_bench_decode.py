"""The benchmark of decoding, on one device and on several virtual ones that share the cache."""

import dataclasses
import json

import pytest

from bpt_rl import config_toml
from bpt_rl.bench_config import DecodeBenchConfig
from bpt_rl.config import ModelConfig, TrainConfig
from bpt_rl.run.bench_decode import decode_variants

TRAIN = TrainConfig(
    model=ModelConfig(
        layout="fused",
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        dropout=0.0,
        implementation="reference",
        activations="keep",
    )
)


@pytest.fixture
def decoded(tmp_path, cli):
    """Returns the rows of the record, and the table, that options give."""
    preset, out = tmp_path / "tiny.toml", tmp_path / "decode.json"
    preset.write_text(config_toml.to_toml(TRAIN))

    def measured(options):
        line = f"bench decode {preset} --num-calls 2 --copy-bytes 1_000_000 --out {out} {options}"
        printed = cli.succeed(line)
        rows = json.loads(out.read_text())["rows"]
        for row in rows:
            total = row["cache_bytes"] + row["parameter_bytes"]
            assert row["bytes_per_second"] * row["step_seconds"] == pytest.approx(total)
            assert row["copy_share"] * row["copy_bytes_per_second"] == pytest.approx(row["bytes_per_second"])
        return rows, printed

    return measured


def test_bench_decode_reads_the_cache_in_place(decoded):
    rows, out = decoded("--tokens 4096 --num-rows 3 --num-kv-heads 4 2")
    for row, heads in zip(rows, (4, 2), strict=True):
        assert row["num_kv_heads"] == heads
        assert row["cache_bytes"] == 2 * 2 * 3 * heads * 4096 * 8 * 4
        matrices = 32 * 32 * 2 + 2 * 32 * heads * 8 + 2 * 32 * 128
        assert row["parameter_bytes"] == 4 * (2 * (matrices + 2 * 32) + 32)
        # A copy of keys or values would be as large as half of the cache.
        assert row["temporary_bytes"] < row["cache_bytes"] / 2
        # The stream of three rows of 32 numbers, and how results lie; the cache is written in place.
        assert row["result_bytes"] < 2000
    assert "% of copy" in out


def test_devices_that_decode_together_have_a_share_of_the_cache_and_all_parameters(decoded):
    [alone], out = decoded("--tokens 512 --num-rows 2")
    assert (alone["mesh"], "context" in out) == ("", False)
    [row], out = decoded("--tokens 512 --num-rows 2 --train.mesh.data 2 --train.mesh.context 4")
    assert (row["mesh"], "data 2, context 4" in out) == ("data 2, context 4", True)
    assert row["cache_bytes"] == alone["cache_bytes"] // 8
    assert row["parameter_bytes"] == alone["parameter_bytes"]


def test_a_decoding_cache_must_exactly_hold_the_tokens_of_every_call():
    train = dataclasses.replace(TRAIN, model=dataclasses.replace(TRAIN.model, layout="return_state_action"))
    assert decode_variants(DecodeBenchConfig(tokens=(63,), num_calls=20, train=train))
    with pytest.raises(ValueError, match="62 tokens"):
        decode_variants(DecodeBenchConfig(tokens=(63, 62), num_calls=20, train=train))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("at_paper --train.mesh.data 2", "a multiple of mesh.data; got 1 chains and mesh.data 2"),
        ("at_paper --train.mesh.fsdp 2", "so mesh.fsdp must be 1; got 2"),
        (
            "at_paper --train.mesh.context 3",
            "got (4096,) tokens for 3 devices and 4 tokens a step. Use multiples of 12",
        ),
        (
            "at_paper --tokens 80 --train.mesh.context 2 --num-calls 19",
            "got 80 tokens, and 19 calls after a first one write 84",
        ),
    ],
)
def test_devices_that_cannot_share_a_cache_are_refused(line, message, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    assert message in cli.refuse(f"bench decode {line}")
    assert not list(tmp_path.iterdir())
