"""What the figures mean, in plain words: whether to split here, from where on, and what the SLO has to do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bascule.bench.compare.architectures import Side
from bascule.bench.compare.figures import GOODPUT, Compared
from bascule.bench.compare.paired import Outcome, Ratio

_HARDLY = 0.5
"""Share of requests below which the SLO is hardly kept."""


def decision(compared: Compared) -> dict[str, Any]:
    """`split`: yes, no, depends, undecided or unknown; with the two sides that speak for it, and where who is ahead."""
    split, whole = (_best(compared, side) for side in (Side.SPLIT, Side.WHOLE))
    if split is None or whole is None:
        return {"split": "unknown", "why": "no split and whole architecture were measured beside each other"}
    if not _any_goodput(compared):
        return {"split": "unknown", "why": "no request met the SLO"}
    overall = compared.overall(split, whole)
    pays, loses = where(compared, Side.SPLIT, Side.WHOLE), where(compared, Side.WHOLE, Side.SPLIT)
    sure = {Outcome.MORE: "yes", Outcome.LESS: "no"}
    split_here = "depends" if pays and loses else sure.get(overall.outcome, "undecided")
    return {
        "split": split_here,
        "best_split": split,
        "best_whole": whole,
        "ratio": overall.value,
        "lo": overall.lo,
        "hi": overall.hi,
        "pays_at": pays,
        "loses_at": loses,
    }


def where(compared: Compared, ours: Side, theirs: Side) -> list[int]:
    """Levels at which one of `ours` surely has more goodput than all of `theirs`."""
    mine, others = ([name for name, side in compared.sides.items() if side is wanted] for wanted in (ours, theirs))
    return [
        level
        for level in compared.levels
        if any(
            all(compared.ratios[GOODPUT.key, level][one][other].outcome is Outcome.MORE for other in others)
            for one in mine
        )
    ]


def sentences(compared: Compared, decided: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """The verdict first, then what there is to be said of the adaptive and other systems, and of the SLO."""
    return [
        _split_words(compared, decided),
        *_others(compared, Side.ADAPTIVE, "the best of those that do not adapt"),
        *_others(compared, Side.OTHER, "the best of ours"),
        *_slo_words(compared, cells),
    ]


def _split_words(compared: Compared, decided: Mapping[str, Any]) -> str:
    if decided["split"] == "unknown":
        return f"Nothing can be said of splitting: {decided['why']}."
    split, whole = decided["best_split"], decided["best_whole"]
    overall = _times(compared.overall(split, whole))
    over = "all levels" if compared.counted == compared.levels else _levels(compared.counted)
    figure = (
        f"over {over} {split} has {overall} the goodput of {whole} "
        f"({compared.mean_goodput(split):.3g} against {compared.mean_goodput(whole):.3g} requests/s)"
    )
    pays, loses = decided["pays_at"], decided["loses_at"]
    ahead = f"ahead at {_levels(pays)}" if pays else "surely ahead nowhere"
    behind = f"behind at {_levels(loses)}" if loses else "surely behind nowhere"
    head = {
        "yes": "Splitting pays here",
        "no": "Do not split here",
        "depends": "Whether splitting pays depends on the load",
        "undecided": "Undecided, so no reason to split",
    }[decided["split"]]
    return f"{head}: {figure}; it is {ahead}, {behind}."


def _others(compared: Compared, side: Side, than: str) -> Iterator[str]:
    known = Side.ADAPTIVE if side is Side.OTHER else None
    rest = [
        name for name, other in compared.sides.items() if other in (Side.WHOLE, Side.SPLIT, known) and other is not side
    ]
    if not rest or not _any_goodput(compared):
        return
    best = max(rest, key=compared.mean_goodput)
    for name in (name for name, other in compared.sides.items() if other is side):
        one = compared.overall(name, best)
        words = {Outcome.MORE: "more", Outcome.LESS: "less", Outcome.EQUAL: "equal"}.get(one.outcome, "undecided")
        yield f"As for {name}: it has {_times(one)} the goodput of {best}, {than}: {words}."


def crossover_words(crossed: Mapping[str, Any], levels: Sequence[int]) -> str:
    """One crossover for a reader."""
    ours, over = crossed["architecture"], crossed["over"]
    if len(levels) < 2:
        return f"{ours} over {over}: cannot be told from one level"
    if crossed["share"] is None:
        told = "nowhere" if crossed["value"] is None else f"from {crossed['value']:g} clients on"
        return f"{ours} over {over}: ahead {told} with the one seed there was, which decides nothing"
    share = f"{100 * crossed['share']:.0f} % of the bootstrap draws"
    if crossed["value"] is None:
        return f"{ours} over {over}: none in this range ({levels[0]} to {levels[-1]} clients; {share} have one)"
    upper = f"{crossed['hi']:g}" if crossed["hi"] is not None else "beyond the range"
    if crossed["value"] == levels[0]:
        where_from = f"ahead at every level from {crossed['value']:g} on"
    else:
        where_from = f"ahead from {crossed['value']:g} clients on"
    lower = f"{crossed['lo']:g}" if crossed["lo"] is not None else upper
    return f"{ours} over {over}: {where_from} (95 % interval: {lower} to {upper}; {share} have one)"


def _slo_words(compared: Compared, cells: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Where the SLO is hardly kept by anyone, what would have been."""
    best = max(cells, key=lambda cell: cell["slo_met"]["median"] if cell["slo_met"] else 0.0)
    share = best["slo_met"]["median"] if best["slo_met"] else 0.0
    if share >= _HARDLY:
        return
    reach = []
    for name, key, which in (("TTFT", "ttft_s", "p90"), ("TPOT", "tpot_s", "p90"), ("single gap", "itl_s", "max")):
        known = [cell for cell in cells if cell[key][which]]
        if known:
            least = min(known, key=lambda cell: float(cell[key][which]["median"]))
            reach.append(
                f"{name} {least[key][which]['median']:.3g} s ({which}, {least['architecture']} at "
                f"{least['concurrency']})"
            )
    yield (
        f"This SLO is hardly reachable here: at best {100 * share:.0f} % of the requests kept it "
        f"({best['architecture']} at {best['concurrency']}). Best reached: {', '.join(reach) or 'nothing'}."
    )


def _best(compared: Compared, side: Side) -> str | None:
    names = [name for name, other in compared.sides.items() if other is side]
    return max(names, key=compared.mean_goodput, default=None)


def _any_goodput(compared: Compared) -> bool:
    return any(compared.mean_goodput(name) for name in compared.names)


def _times(one: Ratio) -> str:
    if one.seeds < 2:
        return f"{one.value:.2f} times (one seed, no interval)"
    return f"{one.value:.2f} times ({one.lo:.2f} to {one.hi:.2f})"


def _levels(levels: Sequence[int]) -> str:
    told = ", ".join(map(str, levels[:-1])) + (" and " if len(levels) > 1 else "") + str(levels[-1])
    return f"{told} client{'s' if levels[-1] > 1 else ''}"
