"""Settings: sizes, ranges, config files, and flags that make the same settings again."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.cli.main import with_config_file
from bascule.cli.worker import flags_of
from bascule.config import (
    LEAST_SUSPECT_S,
    AttachConfig,
    EngineConfig,
    HandoffConfig,
    HttpConfig,
    PoolConfig,
    RoutingConfig,
    StoreConfig,
    parse_size,
    read_config_file,
)
from bascule.errors import ConfigError
from bascule.router.membership import HEARTBEAT_S


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("1KiB", 1024), ("1.5GiB", 3 << 29), ("2 GB", 2 * 10**9), ("3m", 3 * 10**6)]
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text, "kv-memory") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1XB", "1 2", "nan", "9" * 400])
def test_a_malformed_size_is_refused_with_the_key_named(text: str) -> None:
    with pytest.raises(ConfigError, match="kv-memory"):
        parse_size(text, "kv-memory")


def test_a_value_out_of_range_is_refused_with_its_flag_named() -> None:
    with pytest.raises(ConfigError, match="block-size is 0"):
        EngineConfig(block_size=0)
    with pytest.raises(ConfigError, match="port is 70000"):
        HttpConfig(port=70000)
    with pytest.raises(ConfigError, match="transfer-codec is int8, but must be none with transfer shm"):
        HandoffConfig(transfer="shm", transfer_codec="int8")
    with pytest.raises(ConfigError, match="dead-after"):
        RoutingConfig(suspect_after=5, dead_after=5)


@pytest.mark.parametrize("seconds", [0, 0.2, 0.99, float("nan")])
def test_workers_are_not_given_up_between_two_heartbeats(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"suspect-after is .*, but must be 1 second or more, as workers"):
        RoutingConfig(suspect_after=seconds, dead_after=2.0)
    assert LEAST_SUSPECT_S >= 2 * HEARTBEAT_S
    assert RoutingConfig(suspect_after=LEAST_SUSPECT_S, dead_after=2.0).suspect_after == LEAST_SUSPECT_S


def test_an_unknown_key_of_a_config_file_names_the_nearest_known_one(tmp_path: Path) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text('kv_memry = "2GiB"\n')
    with pytest.raises(ConfigError, match=r"kv_memry.*did you mean kv-memory"):
        read_config_file(path, (EngineConfig,))


@pytest.mark.parametrize("content", ["port = ", "[section]\nport = 1\n", "port = [1]\n"])
def test_a_config_file_that_cannot_be_meant_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bascule\.toml"):
        read_config_file(path, (HttpConfig,))


@pytest.mark.parametrize("key", ["kv-disk", "cluster_key_file", "log-level"])
def test_a_null_byte_is_refused_with_its_key_before_anything_is_opened(tmp_path: Path, key: str) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text(f'{key} = "/tmp/x\\u0000:1MiB"\n')
    with pytest.raises(ConfigError, match=f"bascule.toml: {key} has a null byte"):
        with_config_file(["serve", "smollm2", "--config", str(path)])


@pytest.mark.parametrize(
    ("content", "secret"),
    [
        ('api_key = "a-secret-key"', "api-key"),
        ('admin-key = "a-secret-key"', "admin-key"),
        ('kv-remote = "redis://:a-secret-key@host1,host2"', "kv-remote"),
    ],
)
def test_a_config_file_with_a_secret_is_its_owners_alone(tmp_path: Path, content: str, secret: str) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text(content)
    for mode in (0o644, 0o640, 0o602):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=f"secret \\({secret}\\) .*chmod 600 {path}") as caught:
            read_config_file(path, (HttpConfig, StoreConfig))
        assert "a-secret-key" not in str(caught.value)
    path.chmod(0o600)
    assert secret in read_config_file(path, (HttpConfig, StoreConfig))
    path.write_text('kv-remote = "redis://host1,host2"\napi-key-file = "keys"')
    path.chmod(0o644)
    assert len(read_config_file(path, (HttpConfig, StoreConfig))) == 2, "it says where secrets are, and none"


def test_the_config_file_fills_in_what_the_command_line_leaves_open(tmp_path: Path) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text('port = 9000\nkv-memory = "2GiB"\nprefix-cache = false\npolicy = "single"\n')
    line = with_config_file(["serve", "smollm2", "--port", "1234", "--config", str(path)])
    assert "--kv-memory=2GiB" in line and "--no-prefix-cache" in line and "--policy=single" in line
    assert not any(argument.startswith("--port=") for argument in line)
    for_worker = with_config_file(["worker", "--config", str(path)])
    assert "--kv-memory=2GiB" in for_worker and "--policy=single" not in for_worker


def test_flags_made_from_settings_name_only_what_differs_from_the_defaults() -> None:
    assert flags_of(EngineConfig(), PoolConfig()) == ()
    assert flags_of(HandoffConfig(transfer="tcp", transfer_codec="auto")) == ("--transfer=tcp", "--transfer-codec=auto")
    assert flags_of(EngineConfig(prefix_cache=False, chunk_tokens=64)) == ("--chunk-tokens=64", "--no-prefix-cache")


def test_attached_servers_are_urls_in_one_form() -> None:
    given = AttachConfig(attach="http://gpu1:8000/, https://gpu2/v1,http://[::1]:80/prefix/v1/")
    assert given.urls == ("http://gpu1:8000", "https://gpu2", "http://[::1]:80/prefix")
    assert AttachConfig().urls == ()


@pytest.mark.parametrize(
    "value",
    [
        "",
        "gpu1:8000",
        "ftp://gpu1",
        "http://",
        "http://gpu1:port",
        "http://gpu1,",
        "http://a?b",
        "http://u@a",
        "http://a,http://a/",
    ],
)
def test_what_is_no_server_s_url_is_refused_by_its_key(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^attach is "):
        AttachConfig(attach=value)
