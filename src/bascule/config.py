"""Settings as small frozen structs; flags of the CLI and keys of a config file are these fields, name for name."""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from bascule.errors import ConfigError
from bascule.types import Slo

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    unit + "B": 10 ** (3 * power) for power, unit in enumerate("KMGT", 1)
}
_UNITS |= {unit + "IB": 1 << (10 * power) for power, unit in enumerate("KMGT", 1)}
_MOST_DIGITS = 30
"""Of a size: more are no longer a float."""


def parse_size(text: str, key: str) -> int:
    """Bytes from `1.5GiB`, `512MB` or `4096`; raises ConfigError that names `key`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or len(match[1]) > _MOST_DIGITS:
        raise ConfigError(f"{key}: {text[:50]!r} is not a size; write for example 512MiB, 2GiB or 4GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key.replace('_', '-')} is {value}, but must be {rule}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and in what form it is computed."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of weights and KV cache; float32 is exact and slower."""
    quantize: Literal["auto", "none", "int8", "int4"] = "auto"
    """Weights as codes of 4 or 8 bits, which small batches read faster: auto where the file stores them so (none of its
    precision is lost), int8 or int4 for any model (some is), none for bfloat16 alone."""
    dense_twin: bool = True
    """Keep quantised weights in bfloat16 too, for large batches; without it, 4-bit ones take about a quarter of the
    memory."""
    model_name: str | None = None
    """Name under which the API serves the model (default: as given on the command line)."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens (default: what the model was trained for)."""

    def __post_init__(self) -> None:
        _require(self.max_model_len is None or self.max_model_len > 0, "max_model_len", self.max_model_len, "positive")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """One worker's engine."""

    engine: Literal["torch", "mock"] = "torch"
    """What computes: torch, or a mock timed by a cost model (for tests and simulation)."""
    cost_model: Path | None = None
    """JSON file that times the mock engine."""
    kv_memory: str = "1GiB"
    """Memory for KV blocks in each worker."""
    block_size: int = 16
    """Tokens in a KV block."""
    chunk_tokens: int = 512
    """Most prompt tokens of one sequence in one step."""
    step_tokens: int = 512
    """Most tokens of all sequences in one step."""
    max_sequences: int = 64
    """Most sequences that a worker runs at once."""
    prefix_cache: bool = True
    """Keep computed blocks and reuse them for prompts that begin alike."""

    def __post_init__(self) -> None:
        parse_size(self.kv_memory, "kv-memory")
        for key in ("block_size", "chunk_tokens", "step_tokens", "max_sequences"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "positive")
        _require(self.block_size <= 1024, "block_size", self.block_size, "at most 1024")
        _require(
            self.engine == "mock" or self.cost_model is None, "cost_model", self.cost_model, "left out but for mock"
        )

    @property
    def kv_bytes(self) -> int:
        return parse_size(self.kv_memory, "kv-memory")


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What is known of the hardware before anything runs."""

    hardware: Path | None = None
    """Hardware file of `bascule profile` and `probe`: what steps cost, so that workers need not measure it at their
    first start, and under `serve` what links take, until handoffs tell."""
    worker_class: str | None = None
    """Class of that file that workers are of (default: the one that was measured on such a device)."""

    def __post_init__(self) -> None:
        _require(
            self.hardware is not None or self.worker_class is None,
            "worker_class",
            self.worker_class,
            "left out without --hardware",
        )


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """The KV store: where computed blocks are kept beside the workers' own KV memory, and found again."""

    kv_host: str | None = None
    """Memory of this machine, shared by all its workers, in which blocks outlive their eviction: `4GiB`."""
    kv_disk: str | None = None
    """Directory and size, `/var/cache/kv:50GiB`, in which blocks outlive workers; machines may share it."""
    kv_remote: str | None = None
    """Redis or Valkey servers, `redis://host1:6379,host2`, over which blocks are spread; any number of clusters may
    share them. A bare host has the scheme, password, database and options of the first."""
    kv_codec: Literal["none", "fp8", "int8", "int4", "auto"] = "none"
    """Form of blocks in these tiers: as they are, or smaller and no longer exact; auto: for each tier the quickest of
    none, int8 and int4."""

    def __post_init__(self) -> None:
        _require(
            self.tiers or self.kv_codec == "none",
            "kv_codec",
            self.kv_codec,
            "left out without --kv-host, --kv-disk or --kv-remote",
        )

    @property
    def tiers(self) -> bool:
        """Whether there is any."""
        return (self.kv_host, self.kv_disk, self.kv_remote) != (None, None, None)


LEAST_SLO_S, MOST_SLO_S = 1e-4, 1e6
"""Beyond these, a bound is a slip of the pen."""
LEAST_SUSPECT_S = 1.0
"""Two heartbeats: one that is late is no sign of anything."""
MOST_TIMEOUT_S = 3600.0
"""What a request may ask for, unless its server's own time limit is longer: whatever waits for it has an end."""


@dataclass(frozen=True, kw_only=True)
class SloConfig:
    """The latencies to be kept, in seconds; `inf` for none. A request may ask for its own with X-SLO-TTFT and so on."""

    slo_ttft: float = 2.0
    """From receiving a request to its first token."""
    slo_tpot: float = 0.06
    """Mean time between a request's tokens."""
    slo_gap: float = 0.2
    """Longest gap between two tokens of a running stream; prompts beside it are cut into chunks that keep it."""

    def __post_init__(self) -> None:
        for key in ("slo_ttft", "slo_tpot", "slo_gap"):
            value = getattr(self, key)
            rule = f"from {LEAST_SLO_S:g} to {MOST_SLO_S:g} seconds, or inf for no bound"
            _require(LEAST_SLO_S <= value <= MOST_SLO_S or value == math.inf, key, value, rule)

    @property
    def slo(self) -> Slo:
        return Slo(self.slo_ttft, self.slo_tpot, self.slo_gap)


@dataclass(frozen=True, kw_only=True)
class HandoffConfig:
    """How KV goes from a prefill worker to a decode worker."""

    transfer: Literal["auto", "shm", "tcp"] = "auto"
    """Transport: shared memory where both workers are on one host, else TCP; or one of them always."""
    transfer_codec: Literal["none", "fp8", "int8", "int4", "auto"] = "none"
    """Form of full blocks pushed over TCP: as they are, or smaller and no longer exact; auto: for each link the
    quickest of none, int8 and int4. Over shared memory all go as they are."""
    peer_fetch: bool = True
    """Let other workers fetch what this one has computed, where that is predicted to be quicker than computing it."""
    reserve_timeout: float = 5.0
    """Seconds that a handoff waits for blocks on the decode worker; then the request decodes where it prefilled."""
    handoff_timeout: float = 30.0
    """Seconds without a sign of life after which either side gives a handoff up."""

    def __post_init__(self) -> None:
        coded = self.transfer_codec != "none"
        rule = "none with transfer shm, where nothing crosses a link"
        _require(not coded or self.transfer != "shm", "transfer_codec", self.transfer_codec, rule)
        _require(self.reserve_timeout > 0, "reserve_timeout", self.reserve_timeout, "positive")
        _require(self.handoff_timeout > 0, "handoff_timeout", self.handoff_timeout, "positive")


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Where requests go, and when workers count as lost."""

    policy: str = "disaggregated"
    """single: one worker does all; replicated: whole requests over mixed workers; disaggregated: prefill and decode
    workers, with the KV handed over; adaptive: whatever is predicted to be best for each request. To compare with:
    least-loaded, round-robin, random, prefix-only, thresholds. Or your own: pkg.module:function."""
    admission: Literal["queue", "slo"] = "queue"
    """queue: requests wait, up to queue-limit of them; slo: those that are predicted to miss their TTFT or
    TPOT are answered 429 with Retry-After, when they come; those that wait in line are let in."""
    handoff: Literal["push", "store", "auto"] = "push"
    """How KV goes from a prefill to a decode worker: pushed from one to the other; or by way of a tier of the KV store
    that both have (else pushed), so that neither needs to reach the other; or whichever is predicted to be quicker."""
    balance: Literal["least-loaded", "round-robin"] = "least-loaded"
    """How a worker is picked within a pool."""
    queue_limit: int = 1024
    """Requests that may wait for a worker; more are answered 429."""
    request_timeout: float = 600.0
    """Seconds after which a request ends with an error (header X-Request-Timeout overrides it, up to
    an hour or this, if it is more)."""
    decision_log: Path | None = None
    """File to which each request's decision and outcome is appended, a line of JSON each."""
    suspect_after: float = 3.0
    """Seconds without a heartbeat after which a worker gets no new requests, 1 or more."""
    dead_after: float = 10.0
    """Seconds without a heartbeat after which a worker's requests go elsewhere, for good."""
    check_reach: bool = True
    """Refuse workers that the router cannot connect to at the addresses that they offer, and give up silent ones that
    refuse connections there. Without it they are warned of, and waited for: for networks in which workers reach each
    other and the router need not."""

    def __post_init__(self) -> None:
        _require(self.queue_limit >= 0, "queue_limit", self.queue_limit, "0 or more")
        _require(self.request_timeout > 0, "request_timeout", self.request_timeout, "positive")
        beats = f"{LEAST_SUSPECT_S:g} second or more, as workers send a heartbeat every half second"
        _require(self.suspect_after >= LEAST_SUSPECT_S, "suspect_after", self.suspect_after, beats)
        _require(self.dead_after > self.suspect_after, "dead_after", self.dead_after, "longer than suspect-after")


@dataclass(frozen=True, kw_only=True)
class AttachConfig:
    """Running OpenAI-compatible servers that serve requests beside the workers, or instead of them."""

    attach: str | None = None
    """URLs of running OpenAI-compatible servers with the same model, such as `http://gpu1:8000,http://gpu2:8000`; each
    becomes a mixed worker that takes whole requests."""
    attach_sequences: int = 64
    """Most requests at once to each attached server."""

    def __post_init__(self) -> None:
        _require(self.attach_sequences > 0, "attach_sequences", self.attach_sequences, "positive")
        _require(len(set(self.urls)) == len(self.urls), "attach", self.attach, "a list without repeats")

    @property
    def urls(self) -> tuple[str, ...]:
        """The servers' base URLs, without a slash or `/v1` at their ends; raises ConfigError for what is none."""
        return () if self.attach is None else tuple(_server_url(url.strip()) for url in self.attach.split(","))


def _server_url(url: str) -> str:
    """A server's base URL, in one form."""
    try:
        parts = urlsplit(url)
        sane = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sane = False
    _require(sane, "attach", repr(url), "the URL of a server, such as http://gpu1:8000")
    _require(parts.username is None and not parts.query and not parts.fragment, "attach", repr(url), "a bare URL")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


@dataclass(frozen=True, kw_only=True)
class SecurityConfig:
    """Who may take part in the cluster."""

    cluster_key_file: Path | None = None
    """File that `bascule cluster-key` made: router and workers encrypt what they say to each other, and let only those
    in that have it too (default: the environment's BASCULE_CLUSTER_KEY_FILE)."""
    insecure: bool = False
    """Without a cluster key, listen to other machines and join them all the same; with one, use --kv-remote redis://
    and --attach http:// of other machines, which get prompts in clear: for networks that you trust."""


@dataclass(frozen=True, kw_only=True)
class HttpConfig:
    """The listening side of the router."""

    host: str = "127.0.0.1"
    """Address that the API listens on."""
    port: int = 8000
    """Port of the API (0: a free one)."""
    admin_port: int = 0
    """Port of the admin API, on loopback (0: a free one)."""
    max_body: str = "16MiB"
    """Largest request body."""
    ssl_certfile: Path | None = None
    """Certificate (PEM, with those between it and the root) with which the API speaks HTTPS."""
    ssl_keyfile: Path | None = None
    """The certificate's key (PEM), where that is in a file of its own."""
    api_key: str | None = field(default=None, repr=False)
    """Keys that the API asks for, with commas between; all can be seen in the list of processes, so rather use the
    environment's BASCULE_API_KEY or api-key-file."""
    api_key_file: Path | None = None
    """File of keys that the API asks for, one a line."""
    admin_key: str | None = field(default=None, repr=False)
    """Likewise for the admin API, or BASCULE_ADMIN_KEY."""
    admin_key_file: Path | None = None
    """File of keys that the admin API asks for, one a line."""
    ready_file: Path | None = None
    """Written (as JSON) once requests can be answered."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much to say on standard error."""

    def __post_init__(self) -> None:
        parse_size(self.max_body, "max-body")
        for key in ("port", "admin_port"):
            _require(0 <= getattr(self, key) <= 65535, key, getattr(self, key), "between 0 and 65535")

    @property
    def max_body_bytes(self) -> int:
        return parse_size(self.max_body, "max-body")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The workers that `serve` starts on this machine."""

    prefill: int | None = None
    """Prefill workers (default: 1 for policies disaggregated and thresholds, else 0)."""
    decode: int | None = None
    """Decode workers (default: 1 for policies disaggregated and thresholds, else 0)."""
    mixed: int | None = None
    """Mixed workers (default: 1 for policy single, 0 for disaggregated and thresholds, else 2)."""
    devices: str | None = None
    """A device for each worker, prefill first, then decode, then mixed: for example `cpu:0,cpu:1`, `cpu:0+1` (two
    cores) or `cuda:0,cuda:0` (default: this machine's cores dealt out evenly)."""
    start_timeout: float = 180.0
    """Seconds that the workers may take to be ready."""

    def __post_init__(self) -> None:
        for key in ("prefill", "decode", "mixed"):
            count = getattr(self, key)
            _require(count is None or count >= 0, key, count, "0 or more")


def read_config_file(path: Path, structs: tuple[type, ...]) -> dict[str, Any]:
    """Keys and values of a TOML file, checked against the fields of `structs`.

    Keys are written as in flags (`kv-memory`) or with underscores. Raises ConfigError that names the file, the key and,
    for an unknown one, the nearest known key; also for a file that holds a secret and that others can read.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    known = {field.name.replace("_", "-") for struct in structs for field in fields(struct)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = key.replace("_", "-")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: unknown key {key!r}{hint}")
        if isinstance(value, dict | list):
            raise ConfigError(f"{path}: {key} must be a single value, not a {type(value).__name__}")
        if isinstance(value, str) and "\0" in value:  # in no flag, nor in any file's name
            raise ConfigError(f"{path}: {key} has a null byte (\\u0000); write it without")
        values[name] = value
    secrets = [key for key, value in values.items() if _is_secret(key, value)]
    if secrets and stat.S_ISREG(mode) and mode & 0o077:
        raise ConfigError(
            f"{path} holds a secret ({secrets[0]}) and others than its owner can read it (mode "
            f"{stat.S_IMODE(mode):04o}); do: chmod 600 {path}"
        )
    return values


def _is_secret(key: str, value: object) -> bool:
    """Keys are, and URLs with a password (before an @) may be."""
    return key in ("api-key", "admin-key") or (key == "kv-remote" and "@" in str(value))
