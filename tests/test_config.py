"""Tests of reading, checking and writing configurations."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bpt_rl import ablate_config
from bpt_rl import config as config_lib
from bpt_rl.ablate_config import AblateConfig, DemoConfig, GridConfig
from bpt_rl.collect_config import CollectConfig
from bpt_rl.config import (
    BuildConfig,
    DataConfig,
    DownloadConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    PlanConfig,
    TDConfig,
    TrainConfig,
)
from bpt_rl.config_toml import from_mapping, load, preset_names, to_toml
from bpt_rl.expected_return_config import ExpectedReturnConfig
from bpt_rl.mesh_config import MeshConfig

ALL = (
    ModelConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    EvaluateConfig,
    CollectConfig,
    BuildConfig,
    AblateConfig,
    GridConfig,
    DemoConfig,
    DownloadConfig,
    ExportConfig,
    PlanConfig,
    TDConfig,
    ExpectedReturnConfig,
    MeshConfig,
)
CHANGED: tuple[Any, ...] = (
    ModelConfig(layout="fused", embed_dim=64, num_heads=8, num_kv_heads=2, dropout=0.0, activations="keep"),
    DataConfig(store='a "quoted" \\ path\nof two lines\t\x7fé', top_fraction=0.1, window=7, loss_on="last"),
    OptimizerConfig(num_steps=3, warmup_steps=0, learning_rate=1e-30, weight_decay=1e22, clip_norm=0.1 + 0.2),
    TrainConfig(
        agent="dt",
        logger=("tensorboard", "wandb"),
        data=DataConfig(task="cheetah_run"),
        model=ModelConfig(activation="gelu"),
        optimizer=OptimizerConfig(accumulation=4),
    ),
    EvaluateConfig(target="quantile", target_multiple=1.5, memoryless=False),
    CollectConfig(algorithm="random", num_workers=3),
    DownloadConfig(mirror="http://host/exorl", timeout=5.0),
    BuildConfig(tasks=("walker_walk", "walker_run"), domain="walker"),
)


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("config", [*(kind() for kind in ALL), *CHANGED], ids=lambda c: type(c).__name__)
def test_what_is_written_is_read_back(tmp_path: Path, config: Any) -> None:
    assert load(type(config), written(tmp_path, to_toml(config))) == config


def test_every_config_class_is_tested() -> None:
    names = {**vars(config_lib), **vars(ablate_config)}
    found = {v for v in names.values() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    assert found == set(ALL)


def test_fields_left_out_keep_their_defaults(tmp_path: Path) -> None:
    path = written(tmp_path, "seed = 3\n[model]\nnum-layers = 6\n")
    assert load(TrainConfig, path) == TrainConfig(seed=3, model=ModelConfig(num_layers=6))


def test_whole_numbers_become_floats(tmp_path: Path) -> None:
    rate = load(OptimizerConfig, written(tmp_path, "learning_rate = 1")).learning_rate
    assert (rate, type(rate)) == (1.0, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "field of TrainConfig; got 'sed'.*valid key: 'seed'"),
        (
            {"model": {"num_layer": 1}},
            "ModelConfig; got 'model.num_layer'.*valid key: 'model.num_layers'",
        ),
        ({"data": {"top-fractoin": 1.0}}, "got 'data.top-fractoin'.*valid key: 'data.top_fraction'"),
        ({"seed": "3"}, "seed must be of type int; got '3'"),
        ({"seed": 3.0}, "seed must be of type int; got 3.0"),
        ({"seed": True}, "seed must be of type int; got True"),
        ({"run": 1}, "run must be of type str; got 1"),
        ({"model": {"activations": 1}}, "model.activations must be"),
        ({"model": {"dropout": False}}, "model.dropout must be of type float; got False"),
        ({"model": "small"}, "model must be of type ModelConfig; got 'small'"),
        ({"agent": "ppo"}, "agent must be one of at, dt, ad, bc, td3, td3_bc, crr, cql, iql; got 'ppo'"),
        (
            {"model": {"layout": "Fused"}},
            "model.layout must be one of return_state_.*; got 'Fused'",
        ),
        ({"logger": "wandb"}, "logger must be of type .*tuple.*; got 'wandb'"),
        ({"logger": ["mlflow"]}, "logger must be one of tensorboard, wandb; got 'mlflow'"),
    ],
)
def test_wrong_key_or_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_mapping(TrainConfig, values)


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (ModelConfig, {"embed_dim": 0}, "embed_dim must be positive; got 0"),
        (ModelConfig, {"key_chunk_size": -1}, "key_chunk_size must be positive; got -1"),
        (ModelConfig, {"embed_dim": 6, "num_heads": 2}, "multiple of 2 \\* num_heads.*a multiple of 4"),
        (ModelConfig, {"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads must divide num_heads; got 3 and 4"),
        (ModelConfig, {"num_kv_heads": -1}, "num_kv_heads must divide num_heads; got -1"),
        (ModelConfig, {"dropout": 1.0}, "dropout must lie in"),
        (ModelConfig, {"dropout": float("nan")}, "dropout must lie in"),
        (ModelConfig, {"feedforward_dim": -8}, "feedforward_dim"),
        (ModelConfig, {"episode_embedding": -1}, "episode_embedding"),
        (DataConfig, {"top_fraction": 0.0}, "top_fraction must lie in"),
        (DataConfig, {"window": -1}, "window must not be negative; got -1"),
        (OptimizerConfig, {"num_steps": 10, "warmup_steps": 10}, "warmup_steps must be smaller.*10 and 10"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "learning_rate must be positive; got nan"),
        (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay"),
        (OptimizerConfig, {"beta2": 1.0}, r"beta2 must lie in \(0, 1\); got 1.0"),
        (ExpectedReturnConfig, {"held_out": 1.0}, r"held_out must lie in \(0, 1\); got 1.0"),
        (MeshConfig, {"fsdp": 0}, "fsdp must be positive; got 0"),
        (TrainConfig, {"agent": "bc", "mesh": MeshConfig(data=2)}, "got agent 'bc' and mesh data 2"),
        (
            TrainConfig,
            {"optimizer": OptimizerConfig(place="host"), "mesh": MeshConfig(data=2)},
            "got optimizer.place 'host' and mesh data 2",
        ),
        (ExpectedReturnConfig, {"max_episodes": 1}, "one to measure on; got 1. Use at least 2"),
        (TrainConfig, {"log_every": 0}, "log_every must be positive"),
        (EvaluateConfig, {"target_quantile": 1.5}, "target_quantile must lie in"),
        (EvaluateConfig, {"num_episodes": -1}, "num_episodes"),
        (CollectConfig, {"noise_decay": 0.0}, "noise_decay must lie in"),
        (CollectConfig, {"num_workers": -1}, "num_workers"),
        (DownloadConfig, {"num_tries": 0}, "num_tries must be positive; got 0"),
        (DownloadConfig, {"timeout": 0.0}, "timeout must be positive"),
        (DownloadConfig, {"first_wait": -1.0}, "first_wait must not be negative"),
        (CollectConfig, {"seed": -1}, "seed must not be negative; got -1"),
        (BuildConfig, {"action_repeat": 0}, "action_repeat must be positive"),
        (BuildConfig, {"num_workers": -1}, "num_workers"),
    ],
)
def test_impossible_values_are_refused(config: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**values)


def test_invalid_toml_names_the_file_and_the_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be valid TOML; .*config\.toml: .*line 2"):
        load(TrainConfig, written(tmp_path, "seed = 1\nagent = at\n"))


def test_missing_preset_lists_the_presets() -> None:
    with pytest.raises(FileNotFoundError, match=r"preset; got 'no_such_preset'.*Presets: ") as caught:
        load(TrainConfig, "no_such_preset")
    assert all(name in str(caught.value) for name in preset_names())


def test_folder_is_not_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="must be a TOML file or a preset"):
        load(TrainConfig, str(tmp_path))


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        ({}, "one device"),
        ({"data": 2}, "data 2"),
        ({"context": 4}, "context 4"),
        ({"fsdp": 2, "context": 4, "attention": "ring"}, "fsdp 2, context 4 (ring)"),
        # Of no meaning without a context that devices share.
        ({"data": 2, "attention": "ulysses"}, "data 2"),
    ],
)
def test_a_mesh_is_named_by_its_axes_of_several_devices_and_what_attention_it_asks_for(mesh, name):
    assert str(MeshConfig(**mesh)) == name
