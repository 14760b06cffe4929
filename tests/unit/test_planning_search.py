"""The planner's search: what it may take, what it takes, and that it takes the same again."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace
from planning_rig import COST, LINKS, SLO, a_class, an_ask, demand

from bascule.analytic.catalogue import load_catalogue
from bascule.analytic.predictor import Predictor
from bascule.errors import ConfigError
from bascule.planning.answer import answer, require_possible
from bascule.planning.candidates import ARCHITECTURES, Budget, Candidate, candidates, largest
from bascule.planning.classes import WorkerClass, catalogue_classes
from bascule.planning.fluid import Links, Scale
from bascule.planning.insight import _brief, crossing
from bascule.planning.search import Ask, Found, Search, _levels
from bascule.planning.trial import Result, Setting, Trials
from bascule.sim.cluster import Cluster, Pool
from bascule.types import CostModel, Role, Slo

FLAWED = CostModel(step_s=0.002, token_s=0.0008, pair_s=2e-8, context_s=1e-7, stream_s=(0.006, 0.007, 0.009, 0.012))
"""Prompts stop streams for long: a chunk takes four tenths of a second."""


def found(ask: Ask) -> Found:
    return Search(ask, Trials()).found()


def catalogued(*names: str, model: str = "meta-llama/Llama-3.1-8B", ways: tuple[int, ...] = (1,)) -> list[WorkerClass]:
    return catalogue_classes(names, model, ways, "vllm", "bf16", load_catalogue(), Predictor())


def test_candidates_are_all_that_the_budget_holds_in_devices_and_in_money() -> None:
    small, large = a_class("small", price=1.0), a_class("large", devices=2, price=3.0)
    every = candidates((small, large), Budget(devices=4), ARCHITECTURES)
    assert all(one.devices <= 4 for one in every) and len(set(every)) == len(every)
    assert {one.architecture for one in every} == set(ARCHITECTURES)
    # Splits: small only (3 + 2 + 1), small with large (2 + 2), large only (1).
    assert len([one for one in every if one.splits]) == 6 + 4 + 1
    cheap = candidates((small, large), Budget(per_hour=4.0), ARCHITECTURES)
    assert max(one.price or 0.0 for one in cheap) == 4.0
    assert all(any(one.within(other) for other in largest(every)) for one in every)


def test_the_most_that_a_split_carries_is_that_of_its_scarcest_part() -> None:
    scale = Scale(demand("summarise", rate=1.0), SLO, LINKS)
    by_counts = {
        (one.shares[0].count, one.shares[1].count): scale.of(one)
        for one in candidates((a_class(),), Budget(devices=4), ["disaggregated"])
    }
    assert by_counts[1, 3].bound_by == by_counts[1, 1].bound_by == "prefill"
    assert by_counts[3, 1].capacity == pytest.approx(3 * by_counts[1, 1].capacity)
    thin = Scale(demand("summarise", rate=1.0), SLO, Links(between=1e6, within=1e6, machine_devices=8))
    narrow = thin.of(candidates((a_class(),), Budget(devices=4), ["disaggregated"])[0])
    assert narrow.bound_by == "network" and narrow.capacity == pytest.approx(
        1e6 / thin.handed_bytes(candidates((a_class(),), Budget(devices=2), ["disaggregated"])[0])
    )


def test_one_worker_is_enough_where_one_is_enough() -> None:
    decision = found(an_ask(demand(clients=1)))
    assert decision.keeps and str(decision.pick.candidate) == "single (1 mixed x core)"


def test_the_cheapest_that_keeps_the_slo_is_as_cheap_as_any_that_does() -> None:
    ask = an_ask(demand("chat", rate=16.0), budget=Budget(devices=2), requests=30)
    decision = found(ask)
    trials = Trials()
    keeping = [
        one.money
        for one in candidates(ask.classes, ask.budget, ask.architectures)
        if trials.result(one, ask.setting, ask.seeds, "").met >= ask.attainment
    ]
    assert decision.keeps and decision.pick.candidate.money == min(keeping)


def test_what_keeps_the_slo_by_two_seeds_only_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third seed finds one worker wanting, and two are within the budget."""
    real = Trials._run

    def harder(self: Trials, candidate: Candidate, setting: Setting, seed: int, why: str) -> dict[str, Any]:
        run = real(self, candidate, setting, seed, why)
        return run | {"slo_met": 0.0} if seed == 3 and candidate.devices == 1 else run

    monkeypatch.setattr(Trials, "_run", harder)
    ask = an_ask(demand("chat", rate=1.0), budget=Budget(devices=2), requests=30, seeds=(1, 2, 3))
    decision = found(ask)
    assert decision.keeps and decision.pick.candidate.devices == 2


def test_dear_candidates_that_keep_the_slo_come_before_cheaper_ones_that_do_not() -> None:
    search = Search(an_ask(demand("chat", rate=1.0), a_class(price=100.0), attainment=0.995), Trials())
    one, two = (next(each for each in search.all if each.devices == count) for count in (1, 2))
    figures = {"goodput_per_s": 1.0, "slo_met": 0.994}
    cheap, dear = Result(one, (figures,)), Result(two, (figures | {"slo_met": 0.996},))
    assert [each.candidate for each in search.ranked([cheap, dear])] == [two, one]


def test_prices_that_lie_close_together_are_no_single_price() -> None:
    classes = (a_class("dear", price=2.7), a_class("cheap", price=1.4))
    every = candidates(classes, Budget(per_hour=100.0), ARCHITECTURES)
    levels = _levels(every)
    assert all(
        money <= 1.03 * min(one.money for one in every if one.money > below) for below, money in pairwise(levels)
    )
    assert levels[-1] == max(one.money for one in every)


def test_money_and_devices_are_not_compared() -> None:
    every = candidates((a_class("priced", price=2.7), a_class("not", price=None)), Budget(devices=4), ARCHITECTURES)
    assert all(one.money == one.devices for one in every)


def test_a_closed_loop_is_simulated_with_more_requests_than_clients() -> None:
    setting = replace(an_ask(demand("chat", clients=1000)).setting, requests=0)
    assert setting.count >= 2000 and _brief(setting).count >= 2000
    few = replace(setting, demand=demand("chat", clients=8))
    assert _brief(few).count == few.count == 80


def test_splitting_is_advised_where_prompts_would_stop_streams_for_longer_than_the_slo_allows() -> None:
    ask = an_ask(
        demand(clients=6),
        a_class(cost=FLAWED),
        slo=Slo(6.0, 0.1, 0.025),
        requests=24,
        budget=Budget(devices=2),
        objective="goodput",
    )
    search = Search(ask, Trials())
    decision = search.found()
    assert decision.pick.candidate.architecture in ("disaggregated", "adaptive")
    whole = next(one for one in decision.ranked if one.candidate.architecture == "replicated")
    assert whole.goodput < 0.8 * decision.pick.goodput
    curve = crossing(search, decision)
    assert curve.value is not None and curve.lo is not None and curve.lo <= curve.value


def test_splitting_is_not_advised_over_a_link_that_cannot_carry_it() -> None:
    ask = an_ask(
        demand("summarise", clients=4),
        a_class(),
        links=Links(between=2e6, within=2e6, machine_devices=8),
        budget=Budget(devices=2),
        objective="goodput",
    )
    told = answer(ask, "smollm2", lambda _: None, around=False)
    assert not told.found.pick.candidate.splits and told.reason.startswith("Do not disaggregate")
    rule = next(one.rule for one in told.rules if one.rule.about == "network")
    assert rule.says == "whole"


def test_dear_prefill_workers_are_put_before_cheap_decode_workers_where_that_is_cheapest() -> None:
    fast = a_class("fast", replace(COST, token_s=COST.token_s / 10), price=3.0)
    slow = a_class("slow", replace(COST, token_s=10 * COST.token_s), price=0.3)
    ask = an_ask(
        demand("chat", rate=14.0),
        fast,
        slow,
        slo=Slo(0.2, 0.014, 0.1),
        budget=Budget(per_hour=9.0, devices=5),
        architectures=("single", "replicated", "disaggregated"),
        requests=50,
    )
    decision = found(ask)
    assert decision.keeps and str(decision.pick.candidate) == "disaggregated (1 prefill x fast, 3 decode x slow)"
    assert decision.pick.candidate.price == pytest.approx(3.9)


def test_the_same_question_has_the_same_answer() -> None:
    one, other = (found(an_ask(demand(rate=3.0), objective="goodput", budget=Budget(devices=2))) for _ in range(2))
    assert [(each.candidate, each.goodput) for each in one.ranked] == [
        (each.candidate, each.goodput) for each in other.ranked
    ]


def test_a_budget_that_is_too_small_is_told_with_the_smallest_that_would_do() -> None:
    told = answer(an_ask(demand("chat", rate=16.0), budget=Budget(devices=1)), "smollm2", lambda _: None, around=False)
    assert not told.found.keeps and told.found.enough is not None and told.found.enough.devices > 1
    assert told.short is not None and "the smallest that would do is" in told.short


def test_an_slo_that_no_request_keeps_alone_is_refused_with_what_is_reachable() -> None:
    with pytest.raises(ConfigError, match=r"not even one request at a time .* best reachable .* TTFT 0\.\d+ s"):
        require_possible(Search(an_ask(demand(rate=1.0), slo=Slo(0.001, 0.03, 0.1)), Trials()))


def test_a_request_costs_what_its_share_of_the_workers_costs() -> None:
    told = answer(an_ask(demand(clients=1)), "smollm2", lambda _: None, around=False)
    assert told.cost is not None and told.cost.per_hour == 1.0
    pick = told.found.pick
    per_s = (
        told.cost.per_million_input_tokens * pick.mean("input_tokens_per_s")
        + told.cost.per_million_output_tokens * pick.mean("output_tokens_per_s")
    ) / 1e6
    assert per_s == pytest.approx(1.0 / 3600)


def test_workers_of_different_hardware_share_no_machine() -> None:
    kind = a_class().kind
    cluster = Cluster(
        policy="disaggregated",
        pools=(
            Pool(Role.PREFILL, kind, 3, 2, "a"),
            Pool(Role.DECODE, kind, 2, 1, "b"),
            Pool(Role.DECODE, kind, 1, 8, "b"),
        ),
        machine_workers=4,
    )
    assert cluster.machines() == [0, 0, 1, 2, 2, 3]


def test_catalogue_workers_have_the_memory_that_weights_leave_and_a_price() -> None:
    [h100, a100] = catalogued("h100_sxm", "a100")
    assert (h100.name, a100.name) == ("h100_sxm", "a100_sxm")
    assert h100.kv_token_bytes == 2 * 32 * 8 * 128 * 2
    weights = 2 * 8.03e9
    assert h100.kind.kv_tokens == pytest.approx((0.9 * 80e9 - weights) / 131_072, rel=0.02)
    assert h100.price_per_hour == 2.7 and h100.analytic is not None and 0 < h100.analytic.expected.tpot < 1
    assert a100.kind.cost.token_s > 2 * h100.kind.cost.token_s
    [two, four] = catalogued("h100_sxm", model="meta-llama/Llama-3.1-70B", ways=())
    assert (two.devices, four.devices) == (4, 8) or (two.devices, four.devices) == (2, 4)


def test_a_model_that_does_not_fit_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"takes 1\d\d GB on each of 1 GPUs h100_sxm.*--tp"):
        catalogued("h100_sxm", model="meta-llama/Llama-3.1-70B")


def test_half_and_twice_of_a_workload_are_half_and_twice() -> None:
    for name in ("chat", "shared-prefix", "multi-turn"):
        base = demand(name, clients=2)
        assert base.with_prompts(2).reuse == pytest.approx(base.reuse, abs=0.06)
        assert base.with_outputs(0.5).output_tokens == pytest.approx(base.output_tokens / 2, rel=0.02)
    assert demand("chat", clients=2).with_prompts(2).prompt_tokens == pytest.approx(256, rel=0.01)
    assert demand("chat", clients=2).with_reuse(0.5) is None
    shared = demand("shared-prefix", clients=2)
    halved = shared.with_reuse(0.5)
    assert halved is not None and halved.reuse == pytest.approx(shared.reuse / 2, abs=0.01)
    assert halved.prompt_tokens == pytest.approx(shared.prompt_tokens, rel=0.01)
    assert math.isclose(demand("chat", rate=2.0).at(4.0).rate or 0, 4.0)
