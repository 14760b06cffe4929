"""The `bascule` command: finds the subcommand, merges the config file in, and turns our errors into one line."""

from __future__ import annotations

import os
import sys
from dataclasses import fields
from pathlib import Path

from cyclopts import App

from bascule import __version__
from bascule.config import (
    AttachConfig,
    EngineConfig,
    HandoffConfig,
    HardwareConfig,
    HttpConfig,
    ModelConfig,
    PoolConfig,
    RoutingConfig,
    SecurityConfig,
    SloConfig,
    StoreConfig,
    read_config_file,
)
from bascule.errors import BasculeError, ConfigError, ModelError

app = App(
    name="bascule",
    version=__version__,
    help="Disaggregated LLM inference: prefill and decode on separate workers, the KV cache handed off between them.",
)
# By name, so that a process imports only what its own command needs.
app.command("bascule.cli.serve:serve", name="serve", help="Serve a model from this machine: a router and its workers.")
app.command("bascule.cli.router:router", name="router", help="Run a router without workers.")
app.command("bascule.cli.worker:worker", name="worker", help="Run one worker and join a router.")
app.command(
    "bascule.cli.simulate:simulate", name="simulate", help="Say what a cluster would do with this traffic, and which."
)
app.command("bascule.cli.explain:explain", name="explain", help="Say why a request went where it did.")
app.command("bascule.cli.admin:app", name="admin", help="List, drain, resume or re-role workers of a running server.")
app.command("bascule.cli.models:app", name="models", help="Pull models, and list those on this machine.")
app.command("bascule.cli.kv:app", name="kv", help="Count, check or clear what the tiers of the KV store hold.")
app.command("bascule.cli.plan:app", name="plan", help="Say what to build for this traffic, SLO and budget.")
app.command("bascule.cli.bench:app", name="bench", help="Measure a server under load, or what its parts cost here.")
app.command("bascule.cli.profile:profile", name="profile", help="Measure what workers of a class can do here.")
app.command("bascule.cli.probe:probe", name="probe", help="Measure the links between workers of a running server.")
app.command("bascule.cli.traffic:traffic", name="traffic", help="Profile traffic, recorded or of a running server.")
app.command("bascule.cli.keys:cluster_key", name="cluster-key", help="Make the key that a cluster's machines share.")
app.command("bascule.cli.doctor:doctor", name="doctor", help="Check this machine for serving a model.")

_SERVE = (
    ModelConfig,
    EngineConfig,
    HandoffConfig,
    RoutingConfig,
    HttpConfig,
    PoolConfig,
    SloConfig,
    AttachConfig,
    StoreConfig,
    SecurityConfig,
    HardwareConfig,
)
_WORKER = (ModelConfig, EngineConfig, HandoffConfig, SloConfig, StoreConfig, SecurityConfig, HardwareConfig)
_STRUCTS = {
    "serve": _SERVE,
    "router": (ModelConfig, RoutingConfig, HttpConfig, SloConfig, AttachConfig, SecurityConfig),
    "worker": _WORKER,
    "doctor": _SERVE,
    "profile": (ModelConfig, EngineConfig),
}


def main() -> None:
    """Run the command line; exit code 2 means wrong use or a setting that cannot work."""
    try:
        try:
            app(with_config_file(sys.argv[1:]))
        finally:
            sys.stdout.flush()
    except (ConfigError, ModelError) as error:
        _fail(error, 2)
    except BasculeError as error:
        _fail(error, 1)
    except BrokenPipeError:  # whoever reads what we say has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def with_config_file(arguments: list[str]) -> list[str]:
    """The command line with the keys of `--config FILE` added as flags, where it does not set them itself.

    A file may hold the keys of all commands, so that one file serves a router and its workers; a command takes those
    it knows.
    """
    if not arguments or arguments[0] not in _STRUCTS:
        return arguments
    path = _value_of("--config", arguments)
    if path is None:
        return arguments
    values = read_config_file(Path(path), _SERVE)
    examines_worker = arguments[0] == "doctor" and _value_of("--join", arguments) is not None
    structs = _WORKER if examines_worker else _STRUCTS[arguments[0]]
    mine = {field.name.replace("_", "-") for struct in structs for field in fields(struct)}
    given = {argument.split("=")[0] for argument in arguments}
    extra: list[str] = []
    for key, value in values.items():
        if key not in mine or f"--{key}" in given or f"--no-{key}" in given:
            continue
        if isinstance(value, bool):
            extra.append(f"--{key}" if value else f"--no-{key}")
        else:
            extra.append(f"--{key}={value}")
    return [arguments[0], *extra, *arguments[1:]]


def _value_of(flag: str, arguments: list[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


def _fail(error: BasculeError, code: int) -> None:
    print(f"bascule: {error}", file=sys.stderr)
    sys.exit(code)
