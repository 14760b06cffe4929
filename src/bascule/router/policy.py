"""The routing policy by its name: ours, a baseline, or a plug-in, which is watched and stood in for when it fails."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Collection
from functools import partial
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from msgspec import Struct

from bascule.errors import ConfigError
from bascule.policies.baselines import BASELINES, FIXED, PICKS, whole
from bascule.policies.cost import CostColumns
from bascule.policies.route import adaptive
from bascule.policies.snapshot import Decision, Policy, RouteQuery, Snapshot
from bascule.types import Placement, Role

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Struct)
_REASON = 300

NAMES = (*BASELINES, "adaptive", *FIXED)


def policy_named(name: str, balance: str) -> Policy:
    """The policy called `name`, or the plug-in at `pkg.module:function`; raises ConfigError for an unknown one."""
    if name == "adaptive":
        return adaptive
    if name in BASELINES:
        return partial(BASELINES[name], pick=PICKS[balance])
    if name in FIXED:
        return FIXED[name]
    if ":" in name:
        return PlugIn(name, _imported(name))
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(NAMES)}."
    raise ConfigError(f"policy {name!r} is not known; {hint} A policy of your own is named pkg.module:function")


def orders_by_work(name: str) -> bool:
    """Whether requests wait shortest first under this policy; the baselines keep the order of arrival."""
    return name not in BASELINES and name not in FIXED


def keeps_whole(name: str) -> bool:
    """Whether every request stays with one worker under this policy, so that nothing is ever handed over."""
    return name in FIXED or (name in BASELINES and BASELINES[name] is whole)


def lacking(name: str, roles: Collection[Role]) -> str:
    """What the policy called `name` needs and workers of these roles do not give; empty if it can do what it is for."""
    if name == "disaggregated":
        for role in (Role.PREFILL, Role.DECODE):
            if role not in roles and Role.MIXED not in roles:
                return f"policy {name} needs a {role} worker, or a mixed one"
    return ""


def _imported(name: str) -> Policy:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"policy {name}: {error}; the module must be importable from here (PYTHONPATH) and have that function"
        ) from error
    if not callable(found):
        raise ConfigError(f"policy {name} is a {type(found).__name__}, not a function of (Snapshot, RouteQuery)")
    policy: Policy = found
    return policy


class PlugIn:
    """Somebody else's policy: where it fails, that is counted, told once, and the least loaded worker taken."""

    def __init__(self, name: str, policy: Policy) -> None:
        self.failures = 0
        self._name = name
        self._policy = policy
        self._stand_in = FIXED["least-loaded"]

    def __call__(self, snapshot: Snapshot, query: RouteQuery) -> Decision:
        try:
            decision = self._policy(_read_only(snapshot), _read_only(query))
            wrong = nonsense(snapshot, query, decision)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if not wrong:
            # What comes with it may be anything: a placement is priced by our own predictions.
            return Decision(placement=decision.placement, reason=str(decision.reason)[:_REASON])
        self.failures += 1
        if self.failures == 1:
            log.error(
                "policy %s: %s; taking the least loaded worker, and counting such cases from here on", self._name, wrong
            )
        return self._stand_in(snapshot, query)


def _read_only(struct: T) -> T:
    """A view of a struct of columns that cannot be written: the columns are the router's own."""
    return type(struct)(**{name: _shut(getattr(struct, name)) for name in struct.__struct_fields__})


def _shut(value: object) -> object:
    if isinstance(value, np.ndarray):
        value = value.view()
        value.flags.writeable = False
        return value
    if isinstance(value, CostColumns):
        return _read_only(value)
    if isinstance(value, list):
        return list(value)
    return MappingProxyType(value) if isinstance(value, dict) else value


def nonsense(snapshot: Snapshot, query: RouteQuery, decision: object) -> str:
    """What is wrong with what a policy returned; empty if it can be carried out."""
    if not isinstance(decision, Decision):
        return f"it returned a {type(decision).__name__}, not a Decision"
    if decision.placement is None:
        return ""
    if not isinstance(decision.placement, Placement):
        return f"its placement is a {type(decision.placement).__name__}"
    rows = {worker: row for row, worker in enumerate(snapshot.ids) if worker}
    for worker in (decision.placement.prefill, decision.placement.decode):
        if worker not in rows:
            return f"it chose worker {worker!r}, which is not there"
        if not snapshot.placeable[rows[worker]]:
            return f"it chose worker {worker}, which takes no requests now"
        if decision.placement.remote and not snapshot.hands_off[rows[worker]]:
            return f"it chose worker {worker} for a handoff, which cannot take part in one"
    if not query.portable and not snapshot.hands_off[rows[decision.placement.decode]]:
        return "it chose an attached server for an output that only our own engine can continue"
    if snapshot.decoding[rows[decision.placement.decode]] >= snapshot.slots[rows[decision.placement.decode]]:
        return f"it chose worker {decision.placement.decode}, all of whose slots are taken"
    return ""
