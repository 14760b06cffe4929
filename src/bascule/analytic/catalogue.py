"""Hardware with prices, and models with shapes: what ships in catalogue.json, and a file of the user's over it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

import msgspec
from msgspec import Struct

from bascule.analytic.shapes import ModelShape
from bascule.errors import ConfigError


class Hardware(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One GPU and how it hangs together with others; figures of its maker, dense."""

    tflops: dict[str, float]
    """By the type that products are computed in: bf16, fp8, fp4, int8."""
    memory_tb_s: float
    memory_gb: float
    link_gb_s: float
    """One way, to GPUs of its node."""
    node: int
    """GPUs that such links join."""
    nic_gbit_s: float
    price_per_h: float
    """Dollars for one GPU; differs between sellers, so set your own."""

    def peak(self, number: str) -> float:
        """Operations per second of products in `number`; in the next wider type where the GPU lacks it."""
        for wider in _WIDER[number]:
            if wider in self.tflops:
                return 1e12 * self.tflops[wider]
        return 1e12 * self.tflops["bf16"]


class Catalogue(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All hardware and models that are known by name."""

    hardware: dict[str, Hardware] = {}
    models: dict[str, ModelShape] = {}
    aliases: dict[str, str] = {}
    """Names of models that have the shape of another."""

    def find_hardware(self, name: str) -> Hardware:
        """Raises ConfigError, with the nearest name, for one that is not here."""
        if name not in self.hardware:
            raise ConfigError(_unknown("hardware", name, self.hardware))
        return self.hardware[name]

    def resolve(self, name: str) -> str:
        """The name under which the model's shape is kept, or `name` itself where none is.

        Who publishes a model, and which numbers its weights are in, does not change its shape.
        """
        if name in self.models:
            return name
        if name in self.aliases:
            return self.aliases[name]
        plain = {_plain(known): known for known in self.models}
        plain |= {_plain(alias): known for alias, known in self.aliases.items()}
        return plain.get(_plain(name), name)

    def find_model(self, name: str) -> ModelShape:
        """Raises ConfigError, with the nearest name, for one that is not here."""
        known = self.resolve(name)
        if known not in self.models:
            raise ConfigError(_unknown("model", name, [*self.models, *self.aliases]))
        return self.models[known]


_WIDER = {"fp4": ("fp4", "fp8", "bf16"), "fp8": ("fp8", "bf16"), "int8": ("int8", "bf16"), "bf16": ("bf16",)}


_FORMS = re.compile(r"[-_.](instruct|chat|hf|fp8|fp4|nvfp4|mxfp4|bf16|int4|int8|awq|gptq|w4a16|w8a8)$")


def _plain(name: str) -> str:
    """A model's name without its publisher, its training's last step and the form of its weights."""
    name = name.lower().rsplit("/", 1)[-1]
    while (shorter := _FORMS.sub("", name)) != name:
        name = shorter
    return name


def load_catalogue(path: Path | None = None) -> Catalogue:
    """The shipped catalogue, with what the file at `path` adds or replaces. Raises ConfigError if unreadable."""
    shipped = resources.files("bascule.analytic").joinpath("catalogue.json").read_bytes()
    catalogue = msgspec.json.decode(shipped, type=Catalogue)
    if path is None:
        return catalogue
    try:
        mine = msgspec.json.decode(path.read_bytes(), type=Catalogue)
    except OSError as error:
        raise ConfigError(f"cannot read the catalogue {path}: {error.strerror}") from error
    except msgspec.DecodeError as error:
        raise ConfigError(f"the catalogue {path} is not of the form that is expected: {error}") from error
    return Catalogue(
        hardware=catalogue.hardware | mine.hardware,
        models=catalogue.models | mine.models,
        aliases=catalogue.aliases | mine.aliases,
    )


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; the nearest name is {near[0]!r}" if near else f"; there are {', '.join(names)}"
    return (
        f"the {kind} {name!r} is not in the catalogue{hint}; add it in a file of your own and name that by --catalogue"
    )
