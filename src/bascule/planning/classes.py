"""Classes of workers that a plan may use: measured ones from files, and those of a catalogue by physics."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import replace

from bascule.analytic.catalogue import Catalogue, Hardware
from bascule.analytic.deployment import NUMBER_BYTES, Deployment, Load, Spread
from bascule.analytic.physics import MEMORY_SHARE, kv_bytes_kept, weight_bytes
from bascule.analytic.predictor import Basis, Expected, Predictor
from bascule.analytic.questions import Questions
from bascule.errors import ConfigError
from bascule.hardware import ClassFile
from bascule.sim.classes import Memory, kind_of
from bascule.sim.cluster import Overheads
from bascule.sim.worker import Kind
from bascule.types import CostModel

_TYPICAL = 4096
"""Tokens of a sequence at which its KV is counted, where a part of the layers keeps only a window."""
_ROOM = 0.15
"""Of a worker's memory, the least that is left for KV where nobody says over how many GPUs it lies."""
_GPU_CHUNK, _GPU_SEQUENCES = 2048, 256


class Analytic(Struct, frozen=True):
    """What is known of a class that nobody has measured."""

    basis: Basis
    expected: Expected
    """Mean relative errors of the predictor where it was held against measurements that it had not seen."""
    framework: str
    weights: str
    """A key of `NUMBER_BYTES`."""


class WorkerClass(Struct, frozen=True, kw_only=True):
    """Workers that are alike. The kind's cost has what live serving takes beside the model in it."""

    kind: Kind
    devices: int
    """GPUs or cores of one worker."""
    price_per_hour: float | None
    """Of one worker; None where nobody said."""
    kv_token_bytes: int
    hardware: str
    """What its machines are made of; other hardware is in other machines."""
    device: str
    """`cpu` or `cuda`."""
    model: str | None = None
    parameters: float | None = None
    """Of the model, where its shape is known."""
    analytic: Analytic | None = None
    """None for measured ones."""

    @property
    def name(self) -> str:
        return self.kind.name

    def slower(self, factor: float) -> WorkerClass:
        """The same with steps that take so many times as long."""
        cost = self.kind.cost
        scaled = CostModel(
            step_s=cost.step_s * factor,
            token_s=cost.token_s * factor,
            pair_s=cost.pair_s * factor,
            context_s=cost.context_s * factor,
            draw_s=cost.draw_s * factor,
            stream_s=tuple(value * factor for value in cost.stream_s),
        )
        return replace(self, kind=replace(self.kind, cost=scaled))


def measured_class(name: str, devices: int | None, told: ClassFile, memory: Memory) -> WorkerClass:
    """A class of a file. `devices`: of one worker, where the file does not say how many cores it has."""
    kind = kind_of(name, told, memory)
    device = told.device or "cpu"
    return WorkerClass(
        kind=replace(kind, cost=Overheads().of(kind.cost)),
        devices=devices or told.cores or 1,
        price_per_hour=told.price_per_hour,
        kv_token_bytes=told.kv_token_bytes or memory.kv_token_bytes,
        hardware=device,
        device=device,
        model=told.model,
    )


def catalogue_classes(
    names: Sequence[str],
    model: str,
    ways: Sequence[int],
    framework: str,
    weights: str,
    catalogue: Catalogue,
    predictor: Predictor,
) -> list[WorkerClass]:
    """Workers of each hardware named, over so many GPUs each (none: the fewest that hold the model, and twice those).

    Raises ConfigError for what is not in the catalogue, and for a model that does not fit.
    """
    if weights not in NUMBER_BYTES:
        raise ConfigError(f"--weights {weights!r} is not known; there are {', '.join(NUMBER_BYTES)}")
    known = catalogue.resolve(model)
    shape = catalogue.find_model(model)
    found = []
    for name in names:
        full = _full_name(name, catalogue)
        hardware = catalogue.find_hardware(full)
        kv_bytes = 2.0 if weights == "bf16" else 1.0
        asked = [
            Deployment(
                model=known,
                shape=shape,
                system=full,
                hardware=hardware,
                framework=framework,
                weights=weights,
                kv_bytes=kv_bytes,
                decode=Spread(tp=tp, moe_tp=tp),
            )
            for tp in ways or [1 << power for power in range(hardware.node.bit_length()) if 1 << power <= hardware.node]
        ]
        fitting = [one for one in asked if _kv_tokens(one) > 0]
        if not ways:
            fitting = [one for one in fitting if _room(one) >= _ROOM][:2] or fitting[-1:]
        if len(fitting) < (len(ways) or 1):
            wrong = next(one for one in reversed(asked) if one not in fitting)
            raise ConfigError(_too_big(wrong, model))
        found += [_analytic_class(one, predictor) for one in fitting]
    return found


def _full_name(name: str, catalogue: Catalogue) -> str:
    """The catalogue's name; what stands before its first underscore is enough where only one begins so."""
    starting = [known for known in catalogue.hardware if known.startswith(f"{name}_")]
    if name not in catalogue.hardware and len(starting) == 1:
        return starting[0]
    return name


def _analytic_class(deployment: Deployment, predictor: Predictor) -> WorkerClass:
    tp, hardware = deployment.decode.tp, deployment.hardware
    basis = predictor.basis(deployment)
    shape = deployment.shape
    kind = Kind(
        name=deployment.system if tp == 1 else f"{deployment.system}-tp{tp}",
        cost=predictor.cost_model(deployment),
        kv_tokens=_kv_tokens(deployment),
        max_sequences=_GPU_SEQUENCES,
        chunk_tokens=_GPU_CHUNK,
        step_tokens=_GPU_CHUNK,
    )
    return WorkerClass(
        kind=kind,
        devices=tp,
        price_per_hour=tp * hardware.price_per_h,
        kv_token_bytes=round(_kept(deployment) * min(tp, shape.kv_heads)),
        hardware=deployment.system,
        device="cuda",
        model=deployment.model,
        parameters=shape.parameters,
        analytic=Analytic(basis, predictor.calibration.expected[basis], deployment.framework, deployment.weights),
    )


def _kept(deployment: Deployment) -> float:
    """Bytes of KV of a token on each GPU, in a sequence of typical length."""
    question = Questions.of([deployment], [Load(prompt=_TYPICAL, output=1, concurrency=1)])
    return float(kv_bytes_kept(question.worker, question.traffic.prompt)[0]) / _TYPICAL


def _room(deployment: Deployment) -> float:
    """Share of a GPU's memory that is left for KV."""
    weights = float(weight_bytes(Questions.of([deployment], [Load(prompt=1, output=1, concurrency=1)]).worker)[0])
    return MEMORY_SHARE - weights / (1e9 * deployment.hardware.memory_gb)


def _kv_tokens(deployment: Deployment) -> int:
    return int(_room(deployment) * 1e9 * deployment.hardware.memory_gb / _kept(deployment))


def _too_big(deployment: Deployment, model: str) -> str:
    hardware: Hardware = deployment.hardware
    weights = (MEMORY_SHARE - _room(deployment)) * hardware.memory_gb
    return (
        f"{model} in {deployment.weights} takes {weights:.0f} GB on each of {deployment.decode.tp} GPUs "
        f"{deployment.system}, and one has {hardware.memory_gb:.0f}, of which {MEMORY_SHARE:.0%} can be used; spread "
        "it over more (--tp), or take smaller weights (--weights) or other hardware"
    )
