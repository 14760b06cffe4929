"""The hardware file: what classes of workers and the links between them can do, by `bascule profile` and `probe`."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from bascule.errors import UNREADABLE, ConfigError
from bascule.types import CostModel, Count, LinkCost, Seconds, Size

Rate = Annotated[float, Meta(gt=0, le=1e15)]
StepKind = Literal["prefill", "cached prefix", "decode", "mixed"]


class ClassFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a file may say of a class of workers. None for what it leaves to flags."""

    cost: CostModel
    name: str | None = None
    model: str | None = None
    """The model that the cost model was measured with."""
    kv_tokens: Size | None = None
    """Tokens that a worker's KV memory holds."""
    kv_token_bytes: Size | None = None
    chunk_tokens: Size | None = None
    max_sequences: Size | None = None
    price_per_hour: Annotated[float, Meta(ge=0)] | None = None
    """Of one worker, in any currency."""
    device: str | None = None
    """`cpu` or `cuda`."""
    cores: Size | None = None
    """Of a worker on a CPU."""
    memory_bytes: Count | None = None
    """That a worker takes at most, its KV memory left out."""


class LinkFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to hand KV from one worker, or class of workers, to another."""

    source: str = field(name="from")
    target: str = field(name="to")
    transport: str
    """`shm` or `tcp`."""
    latency_s: Seconds
    bytes_per_s: Rate
    same_machine: bool = True

    @property
    def cost(self) -> LinkCost:
        return LinkCost(self.latency_s, self.bytes_per_s)


class Conditions(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When, where and by what something was measured."""

    when: str
    """ISO 8601, UTC."""
    machine: str
    version: str
    """Of Bascule."""
    load: float
    """Processes that wanted to run on average over the last minute, when it ended; those that measured included."""


class StepFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One kind of step, measured several times; seconds."""

    kind: StepKind
    new: Count
    """Prompt tokens computed."""
    behind: Count
    """Tokens of the prompt before them, which were there already."""
    streams: Count
    context: Count
    """Tokens of each stream, the new one included."""
    runs: Count
    measured_s: Seconds
    """Median."""
    least_s: Seconds
    most_s: Seconds
    fitted_s: Seconds


class ErrorFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """|fitted - measured| / measured over the steps of one kind."""

    kind: StepKind
    median: float
    worst: float
    worst_at: str
    """The step in words."""


class MemoryFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of a worker's process."""

    weights: Count
    kv_token: Count
    kv: Count
    """All KV memory; it is shared, and not in `at_start` and `under_load`."""
    at_start: Count
    """Resident, before the first step."""
    under_load: Count
    """Resident at most."""


class ProfileFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the cost model of one class was fitted to."""

    conditions: Conditions
    dtype: str
    memory: MemoryFile
    residuals: tuple[ErrorFile, ...]
    steps: tuple[StepFile, ...]


class TransferFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one link was measured by."""

    source: str = field(name="from")
    target: str = field(name="to")
    transport: str
    conditions: Conditions
    bytes: Count
    """Of one transfer."""
    seconds: tuple[Seconds, ...]
    """Of each transfer."""
    reserve_s: tuple[Seconds, ...]
    """Of each reservation of blocks that came before: two messages."""
    block_s: tuple[Seconds, ...]
    """Of each transfer of one block."""


class Measured(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How what a file says came about. Files that were written by hand have none of it."""

    classes: dict[str, ProfileFile] = {}
    """By name."""
    links: tuple[TransferFile, ...] = ()


class Hardware(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of one file. Raises ValueError for two classes of the same name, or of different models."""

    classes: tuple[ClassFile, ...] = ()
    links: tuple[LinkFile, ...] = ()
    model: str | None = None
    """The model that all was measured with."""
    fingerprint: str | None = None
    """Of its KV: two with equal ones are the same model in the same number format, whatever they are called."""
    measured: Measured = Measured()

    def __post_init__(self) -> None:
        names = self.names
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two classes are called {repeated[0]!r}")
        models = dict.fromkeys(model for model in (self.model, *(one.model for one in self.classes)) if model)
        if len(models) > 1:
            raise ValueError(f"it is of several models: {', '.join(models)}; give each a file of its own")

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return [one.name for one in self.classes if one.name is not None]

    def named(self, name: str) -> ClassFile:
        """The class of that name; raises ConfigError that says which there are."""
        found = next((one for one in self.classes if one.name == name), None)
        if found is None:
            near = difflib.get_close_matches(name, self.names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"there is no class {name!r}; there are {', '.join(self.names) or 'none'}{hint}")
        return found

    def class_of(self, name: str | None, device: str, cores: int) -> ClassFile:
        """The class of that name, or without one that of workers on such a device; raises ConfigError as these do."""
        return self.named(name) if name else self.fitting(device, cores)

    def fitting(self, device: str, cores: int) -> ClassFile:
        """The class of workers on such a device (`cores` counts on a CPU only), or the only one, where it does not say
        what device it is of; raises ConfigError that says which there are, and how to measure another."""
        for one in self.classes:
            if one.device == device and (device != "cpu" or one.cores == cores):
                return one
        if len(self.classes) == 1 and self.classes[0].device is None:
            return self.classes[0]
        here = f"{device} with {cores} core{'s' * (cores > 1)}" if device == "cpu" else device
        there = ", ".join(map(_described, self.classes)) or "none"
        raise ConfigError(
            f"there is no class of workers on {here}; there are {there}; measure one with `bascule profile`"
        )

    def link(self, source: Sequence[str], target: Sequence[str], *transports: str) -> LinkFile | None:
        """From one end to the other, each known by several names, by the first of `transports` that was measured; names
        that come first count more."""
        by_ends = {(one.source, one.target, one.transport): one for one in self.links}
        ends = [(start, end) for start in source for end in target]
        ways = ((start, end, transport) for transport in transports for start, end in ends)
        return next((by_ends[way] for way in ways if way in by_ends), None)

    def typical(self, *, same_machine: bool, transports: Sequence[str] = ("shm", "tcp")) -> LinkCost | None:
        """Of links within a machine, or between two: the medians over them, each by its fastest of `transports`. None
        where there are none."""
        fastest: dict[tuple[str, str], LinkFile] = {}
        for one in sorted(self.links, key=lambda link: link.bytes_per_s):
            if one.same_machine == same_machine and one.transport in transports:
                fastest[one.source, one.target] = one
        if not fastest:
            return None
        return LinkCost(
            median(one.latency_s for one in fastest.values()), median(one.bytes_per_s for one in fastest.values())
        )

    @property
    def served(self) -> str | None:
        """The model that all of it is of; None where nobody said."""
        return self.model or next((one.model for one in self.classes if one.model), None)

    def require_model(self, model: str, fingerprint: str | None, path: Path) -> None:
        """Raises ConfigError where this was measured with another model, or the same one in another number format."""
        if fingerprint is not None and self.fingerprint is not None:
            same = _weights(fingerprint) == _weights(self.fingerprint)
        else:
            same = self.served in (None, model)
        if same:
            return
        form = " in another number format, or with other weights" if model == self.served else ""
        raise ConfigError(
            f"{path} was measured with the model {self.served}{form}, and this is {model}; give another file, or "
            "measure this model into one of its own"
        )

    def adding(self, new: Hardware, path: Path) -> Hardware:
        """This with what was measured anew in place of what it says of the same classes and links; raises ConfigError
        for another model. `path` is where this is from."""
        if new.model is not None:
            self.require_model(new.model, new.fingerprint, path)
        model = self.served or new.model
        classes = {one.name: msgspec.structs.replace(one, model=model) for one in (*self.classes, *new.classes)}
        transfers = {_way(one): one for one in (*self.measured.links, *new.measured.links)}
        return Hardware(
            classes=tuple(classes.values()),
            links=tuple({_way(one): one for one in (*self.links, *new.links)}.values()),
            model=model,
            fingerprint=self.fingerprint or new.fingerprint,
            measured=Measured(classes=self.measured.classes | new.measured.classes, links=tuple(transfers.values())),
        )


def _weights(fingerprint: str) -> str:
    """A fingerprint without the codecs that KV may go through, which change nothing that is measured."""
    return fingerprint.partition("+")[0]


def _way(link: LinkFile | TransferFile) -> tuple[str, str, str]:
    return link.source, link.target, link.transport


def _described(one: ClassFile) -> str:
    device = "" if one.device is None else f" ({one.device}{'' if one.cores is None else f', cores: {one.cores}'})"
    return f"{one.name}{device}"


def read_hardware(path: Path) -> Hardware:
    """What a file says: a hardware file, or one class of workers, or a bare cost model; a class without a name gets the
    file's. Raises ConfigError, which names the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        found = _converted(msgspec.json.decode(data), path)
    except (*UNREADABLE, ValueError) as error:
        raise ConfigError(
            f"{path} is neither a hardware file nor a class of workers nor a cost model: {error}; `bascule profile` "
            "and `bascule probe` write hardware files"
        ) from error
    for one in found.classes:
        _require_time(one, path)
    return found


def _converted(plain: Any, path: Path) -> Hardware:
    if isinstance(plain, dict) and not {"classes", "links"}.isdisjoint(plain):
        found = msgspec.convert(plain, Hardware)
        if unnamed := [number for number, one in enumerate(found.classes, 1) if not one.name]:
            raise ValueError(f"class {unnamed[0]} has no name")
        return found
    if isinstance(plain, dict) and "cost" in plain:
        only = msgspec.convert(plain, ClassFile)
    else:
        only = ClassFile(cost=msgspec.convert(plain, CostModel))
    return Hardware(classes=(msgspec.structs.replace(only, name=only.name or path.stem),), model=only.model)


def _require_time(one: ClassFile, path: Path) -> None:
    cost = one.cost
    if not (cost.token_s or cost.pair_s) or not (cost.step_s or any(cost.stream_s)):
        raise ConfigError(
            f"{path}: the cost model of {one.name} says that steps take no time; measure one with real steps"
        )


def read_class(path: Path) -> ClassFile:
    """The only class of a file as `read_hardware` takes it; raises ConfigError, which names the file."""
    found = read_hardware(path)
    if len(found.classes) != 1:
        has = f"{len(found.classes)} classes of workers" if found.classes else "no class of workers, only links"
        raise ConfigError(f"{path} has {has}; give it as --hardware {path}, and classes by their names")
    return found.classes[0]


def require_one_model(classes: Iterable[tuple[Path, ClassFile]]) -> None:
    """Raises ConfigError where two classes are of different models: their KV and their steps do not go together."""
    first: tuple[Path, ClassFile] | None = None
    for path, found in classes:
        if found.model is None:
            continue
        if first is not None and found.model != first[1].model:
            raise ConfigError(
                f"{first[0]} is a cost model of {first[1].model}, {path} of {found.model}; "
                "all workers of a cluster serve the same model"
            )
        first = first or (path, found)


def add_to_file(path: Path, new: Hardware) -> Hardware:
    """Write what was measured to a new file, or into what a file has; whole or not at all. Returns all of it.

    Raises ConfigError where the file is of another model, is damaged, or cannot be written.
    """
    found = read_hardware(path).adding(new, path) if path.exists() else new
    for one in found.classes:
        _require_time(one, path)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give another --out") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return found
