"""`bascule serve` with workers that commit faults to order, and that are started again at once however often they end.

`python -m chaos.faulty_serve FOLDER PARENT serve MODEL ...`: a folder for sockets, what the parent does when a process
has ended, and the command line of `bascule`. The parent `tells` the router and starts another, `bascule serve`'s own
way; or tells it and starts one `later`, when all is over; or it is `deaf`, as where workers are started apart: it tells
nobody, and starts another when the router would have missed enough heartbeats.
"""

from __future__ import annotations

import sys
from typing import Any

from bascule.cli.main import main
from bascule.control.actuators import process
from bascule.control.actuators.process import ProcessActuator, WorkerPlan
from chaos.schedule import DEAD_S


def run() -> None:
    folder, parent = sys.argv[1:3]
    command, init = WorkerPlan.command, ProcessActuator.__init__

    def faulty(self: WorkerPlan, model: str, join: str) -> list[str]:
        python, _, _, *words = command(self, model, join)
        return [python, "-m", "chaos.faulty_worker", folder, self.worker, *words]

    def deaf(self: ProcessActuator, model: str, join: str, plans: Any, *_: Any) -> None:
        init(self, model, join, plans, lambda worker, how: None)

    WorkerPlan.command = faulty  # type: ignore[method-assign]
    process._STEADY_S = 0.0
    if parent != "tells":
        process._PAUSE_S = DEAD_S + 1.0
    if parent == "deaf":
        ProcessActuator.__init__ = deaf  # type: ignore[method-assign]
    sys.argv = ["bascule", *sys.argv[3:]]
    main()


if __name__ == "__main__":
    run()
