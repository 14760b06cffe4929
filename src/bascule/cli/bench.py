"""`bascule bench`: what a server does under load, which architecture pays, and what the parts cost on this machine."""

from __future__ import annotations

from cyclopts import App

app = App(name="bench", help="Measure a server under load; or engine, handoff, front and router on this machine.")
# By name, so that measuring the front does not import torch.
app.command("bascule.cli.bench_load:load", name="load", help="Offer load to any OpenAI-compatible server.")
app.command(
    "bascule.cli.bench_compare:compare", name="compare", help="Single, replicated, split, adaptive at equal hardware."
)
app.command(
    "bascule.cli.bench_engine:engine", name="engine", help="Decode and prefill steps beside the memory and GEMM rate."
)
app.command("bascule.cli.bench_handoff:handoff", name="handoff", help="Transports beside memcpy and a raw socket.")
app.command("bascule.cli.bench_front:front", name="front", help="Router and API in front of mock workers.")
app.command("bascule.cli.bench_router:router", name="router", help="A routing decision, and how it grows.")
