"""Whatever is done to a directory, and in whatever order, a block that is unpacked is the one that was put."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from store_rig import PATIENT, file_of, name_of

from bascule.kv.store.directory import DirectoryStore
from bascule.kv.store.record import InvalidRecord, Payload, pack, unpack

CAPACITY = 20_000
NUMBERS = st.integers(0, 11)
MODELS = st.sampled_from(["one", "two"])


def tokens_of(number: int) -> tuple[int, ...]:
    return (number, number + 1, number + 2)


def payload_of(number: int, model: str) -> bytes:
    return Random(f"{number} {model}").randbytes(700 + 300 * number)


class DirectoryMachine(RuleBasedStateMachine):
    """Two stores on one directory, of which the model knows only what has been put and not damaged since."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="bascule-test-"))
        self.stores = [self.opened(), self.opened()]
        self.put_by: dict[int, str] = {}
        """The model whose block was put last."""
        self.damaged: set[int] = set()

    def opened(self) -> DirectoryStore:
        return DirectoryStore(self.directory, CAPACITY, timeout_s=PATIENT)

    def teardown(self) -> None:
        for store in self.stores:
            store.close()
        shutil.rmtree(self.directory)

    @rule(which=st.integers(0, 1), number=NUMBERS, model=MODELS)
    def put(self, which: int, number: int, model: str) -> None:
        record = pack(name_of(number), model, tokens_of(number), Payload("none", payload_of(number, model)))
        assert self.stores[which].put({name_of(number): record}) == 1
        self.put_by[number] = model
        self.damaged.discard(number)

    @rule(which=st.integers(0, 1), numbers=st.lists(NUMBERS, max_size=6), model=MODELS)
    def get(self, which: int, numbers: list[int], model: str) -> None:
        for number, answer in zip(numbers, self.stores[which].get([name_of(each) for each in numbers]), strict=True):
            if answer is None:
                continue
            try:
                payload = unpack(name_of(number), model, tokens_of(number), answer)
            except InvalidRecord:
                assert number in self.damaged or self.put_by[number] != model
            else:
                assert payload == Payload("none", payload_of(number, model))
                assert self.put_by[number] == model

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def get_what_was_just_put(self, which: int, number: int) -> None:
        self.put(which, number, "one")
        assert self.stores[1 - which].get([name_of(number)]) != [None]

    @rule(which=st.integers(0, 1), number=NUMBERS)
    def drop(self, which: int, number: int) -> None:
        self.stores[which].drop([name_of(number)])
        assert self.stores[1 - which].get([name_of(number)]) == [None]

    @rule(which=st.integers(0, 1))
    def restart(self, which: int) -> None:
        self.stores[which].close()
        self.stores[which] = self.opened()

    @rule(which=st.integers(0, 1))
    def clear(self, which: int) -> None:
        self.stores[which].clear()
        assert self.stores[1 - which].get([name_of(number) for number in self.put_by]) == [None] * len(self.put_by)

    @precondition(lambda self: self.put_by)
    @rule(data=st.data(), place=st.integers(0, 5000), kind=st.sampled_from(["flip", "truncate", "swap"]))
    def damage(self, data: st.DataObject, place: int, kind: str) -> None:
        """What is drawn depends on nothing that the stores delete behind the machine's back."""
        number, other = (data.draw(st.sampled_from(sorted(self.put_by))) for _ in range(2))
        file, content = file_of(self.directory, number), bytearray(self.content_of(number))
        if not content:
            return
        if kind == "flip":
            content[place % len(content)] ^= 1
        elif kind == "truncate":
            del content[place % len(content) :]
        else:
            content = bytearray(self.content_of(other))
        self.damaged.add(number)
        file.write_bytes(content)

    def content_of(self, number: int) -> bytes:
        """Nothing where the block has been deleted: a store makes room in a thread of its own."""
        try:
            return file_of(self.directory, number).read_bytes()
        except FileNotFoundError:
            return b""

    @invariant()
    def the_bound_is_kept_but_for_a_block_that_the_other_store_has_not_seen(self) -> None:
        largest = 5000
        stored = sum(len(self.content_of(number)) for number in self.put_by)
        assert stored <= CAPACITY * (1 + 1 / 32) + largest


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)
