"""Each prompt token is found once or computed: what requests are told, what they are explained by, and the metrics."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.cluster import Cluster, run_cli, serve
from support.redis_server import wait_until

LENGTH = 500
"""Of each prompt: 31 full blocks, and a part of one that no tier has."""
TRIES = 3


@pytest.fixture
def quick_disk() -> Iterator[Path]:
    """In memory: to a disk that is slow for a moment, a worker writes nothing."""
    with tempfile.TemporaryDirectory(prefix="bascule-test-", dir="/dev/shm") as folder:
        yield Path(folder)


def metric(cluster: Cluster, name: str) -> dict[str, float]:
    """The counters of a name: by tier, where they have one, and way."""
    families = text_string_to_metric_families(cluster.http.get(f"{cluster.url}/metrics").text)
    return {
        " ".join(filter(None, (sample.labels.get("tier"), sample.labels.get("way")))): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and sample.value
    }


class Books:
    """What the answers say of the prompts that were sent."""

    def __init__(self) -> None:
        self.prompts = self.computed_again = 0
        self.hits: Counter[str] = Counter()
        self.handed: Counter[str] = Counter()

    def ask(self, cluster: Cluster, prompt: list[int]) -> Counter[str]:
        """Send a prompt; returns what of it was found, by tier."""
        answer = cluster.complete(prompt, max_tokens=4, ignore_eos=True)
        assert answer["route"].startswith("remote;")
        details = answer["usage"]["prompt_tokens_details"]
        found = Counter(details.get("loaded_tokens", {}))
        found["device"] = details["cached_tokens"] - found.total()
        assert 0 <= found["device"] <= details["cached_tokens"] < len(prompt)
        self.prompts += len(prompt)
        self.hits += found
        if (handoff := details.get("handoff")) is not None:
            assert sum(handoff["loaded_tokens"].values()) + handoff["computed_tokens"] <= len(prompt)
            self.computed_again += handoff["computed_tokens"]
            for way in ("saved", "loaded"):
                self.handed.update({f"{tier} {way}": size for tier, size in handoff[f"{way}_bytes"].items()})
        return found

    def check(self, cluster: Cluster) -> None:
        """The metrics say the same, and what steps computed is what was not found, and what decode computed again."""
        assert metric(cluster, "bascule_prompt_tokens_total") == {"": self.prompts}
        assert metric(cluster, "bascule_kv_hit_tokens_total") == dict(+self.hits)
        assert metric(cluster, "bascule_store_handoff_bytes_total") == dict(+self.handed)
        again = metric(cluster, "bascule_store_handoff_computed_tokens_total").get("", 0)
        assert again == self.computed_again
        computed = self.prompts - self.hits.total() + again
        wait_until(lambda: metric(cluster, "bascule_prompt_tokens_computed_total") == {"": computed}, "the heartbeats")

    def check_records(self, cluster: Cluster, way: str) -> None:
        """The decision records say the same, and `explain` tells what went by way of the store."""
        answer = cluster.http.get(f"{cluster.ready['admin_url']}/admin/decisions", params={"limit": 100})
        listed: list[dict[str, Any]] = answer.json()["decisions"]
        actuals = [each["actual"] for each in listed]
        assert sum(each["prompt_tokens"] for each in listed) == self.prompts
        assert sum(each["cached_tokens"] for each in actuals) == self.hits.total()
        assert sum(each["loaded_tokens"].get("disk", 0) for each in actuals) == self.hits["disk"]
        handoffs = [each["handoff"] for each in actuals if each["handoff"] is not None]
        assert len(handoffs) == (len(listed) if way == "store" else 0)
        assert metric(cluster, "bascule_store_handoffs_total").get("", 0) == len(handoffs)
        assert sum(each["computed_tokens"] for each in handoffs) == self.computed_again
        assert sum(each["saved_bytes"].get("disk", 0) for each in handoffs) == self.handed["disk saved"]
        shown = run_cli("explain", listed[0]["id"], "--admin", cluster.ready["admin_url"])
        assert shown.returncode == 0, shown.stderr
        told = "by way of the disk tier of the store: prefill saved"
        assert (told in shown.stdout) == (way == "store")
        assert "0 prompt tokens were queued on" in shown.stdout


@pytest.fixture(params=["push", "store"])
def handed(request: pytest.FixtureRequest, tmp_path: Path, quick_disk: Path) -> Iterator[tuple[str, Cluster]]:
    """Split workers whose devices hold two of the prompts each, and the way from one to the other."""
    (tmp_path / "cost.json").write_text('{"token_s": 2e-3}')
    flags = ["--engine", "mock", "--kv-memory", "40KiB", "--cost-model", str(tmp_path / "cost.json")]
    flags += ["--policy", "disaggregated", "--handoff", request.param, "--kv-disk", f"{quick_disk}:1GiB"]
    with serve("smollm2", *flags) as cluster:
        yield request.param, cluster


@pytest.mark.timeout(300)
def test_found_and_computed_prompt_tokens_add_up_to_those_that_were_sent(handed: tuple[str, Cluster]) -> None:
    """A prompt that is new, one that the device has, and one whose end only the disk has still. To a disk that was slow
    for a moment not all is written, and not all that it has comes in time: then another round tells."""
    way, cluster = handed
    books, draw = Books(), Random(1)
    found: Counter[str] = Counter()
    for _ in range(TRIES):
        prompts = [[draw.randrange(100, 40_000) for _ in range(LENGTH)] for _ in range(4)]
        assert books.ask(cluster, prompts[0]).total() == 0
        assert books.ask(cluster, prompts[0])["device"] > LENGTH // 2
        for other in prompts[1:]:
            books.ask(cluster, other)
        found = books.ask(cluster, prompts[0])
        books.check(cluster)
        if found["disk"] > LENGTH // 4 and (way == "push" or books.handed["disk loaded"]):
            break
    assert found["disk"] > LENGTH // 4, found
    books.check_records(cluster, way)
    cluster.wait_idle()
