"""Who waits for whom in attention_wgmma's thread blocks that take work (csrc/hopper/producer.cuh), in random orders.

The barriers are mbarriers as the hardware has them: waiters see a phase's parity alone, so one that comes two phases
late waits for ever. Actors are generators that yield what they wait for; a scheduler lets any go on that can.
"""

import random
from collections.abc import Callable, Iterator

import pytest

CONSUMERS = {2: 3, 4: 4}
"""Warpgroups by stages: head dimensions 128 and 64."""
Q_WARPS = 3
TILES_AHEAD = 8  # kTilesAhead
MEAN_SLOTS, PROMOTED = 16, 8  # kMeanSlots, and the tiles whose means a promotion reads

Wait = tuple["Barrier", int]


class Barrier:
    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self.pending = self.arrivals
            self.phase += 1

    def is_open(self, parity: int) -> bool:
        return self.phase % 2 != parity


class OverwrittenError(Exception):
    """A mean was overwritten before it was read."""


class Block:
    """A thread block's shared memory, and the pieces of work (their key tiles) that it will get."""

    def __init__(self, tiles: list[int], stages: int, everyone_waits: bool, mean_slots: int) -> None:
        self.tiles, self.stages, self.everyone_waits = tiles, stages, everyone_waits
        self.taken, consumers = 0, CONSUMERS[stages]
        self.piece: list[int | None] = [None, None]  # number of a piece, −1: none is left
        self.q: list[int | None] = [None, None]  # whose rows of Q are there
        self.full, self.empty = [Barrier(1) for _ in range(stages)], [Barrier(consumers) for _ in range(stages)]
        self.stage: list[tuple[int, int] | None] = [None] * stages
        self.means: list[list[tuple[int, int] | None]] = [[None] * mean_slots for _ in "ab"]
        self.q_full, self.q_empty = [Barrier(Q_WARPS + 1) for _ in "ab"], [Barrier(consumers) for _ in "ab"]
        self.piece_full, self.next_wanted = [Barrier(1) for _ in "ab"], Barrier(1)
        self.q_warps = Barrier(Q_WARPS)  # a named barrier
        self.worked_on: list[list[int]] = [[] for _ in range(consumers)]

    def copy_thread(self) -> Iterator[Wait]:
        loaded = 0
        for number in range(len(self.tiles) + 1):
            slot = number % 2
            yield self.piece_full[slot], number // 2 % 2
            if self.piece[slot] == -1:
                return self.q_full[slot].arrive()
            assert self.piece[slot] == number
            count = self.tiles[number]
            self.q_full[slot].arrive()
            if count == 0:
                self.next_wanted.arrive()
            for tile in range(count + 1 if count else 0):
                if tile == max(count - TILES_AHEAD, 0):
                    self.next_wanted.arrive()
                stage = loaded % self.stages
                yield self.empty[stage], loaded // self.stages % 2 ^ 1
                self.stage[stage] = (number, tile)
                if tile > 0:  # V's tile
                    self.means[slot][(tile - 1) % len(self.means[slot])] = (number, tile - 1)
                self.full[stage].arrive()
                loaded += 1
        raise AssertionError("the copying thread saw no end")

    def q_warp(self, warp: int) -> Iterator[Wait]:
        for number in range(len(self.tiles) + 1):
            slot = number % 2
            if warp == 0 or self.everyone_waits:
                yield self.next_wanted, slot ^ 1
            if warp == 0:
                yield self.q_empty[slot], number // 2 % 2 ^ 1
                self.piece[slot] = self.taken if self.taken < len(self.tiles) else -1
                self.taken += 1
                self.piece_full[slot].arrive()
            if self.everyone_waits:
                yield self.piece_full[slot], number // 2 % 2
            else:
                self.q_warps.arrive()
                yield self.q_warps, number % 2
            piece = self.piece[slot]
            yield Barrier(1), 1  # (time passes)
            if piece == -1:
                return self.q_full[slot].arrive()
            assert piece == number
            self.q[slot] = number
            self.q_full[slot].arrive()
        raise AssertionError("a warp saw no end")

    def check_means(self, number: int, last: int) -> None:
        """What a promotion reads, when tile ``last`` has been multiplied and its stage released, is still there."""
        slots = self.means[number % 2]
        for tile in range(max(0, last - PROMOTED + 1), last + 1):
            if slots[tile % len(slots)] != (number, tile):
                raise OverwrittenError

    def consumer(self, group: int) -> Iterator[Wait]:
        used = 0
        for number in range(len(self.tiles) + 1):
            slot = number % 2
            yield self.q_full[slot], number // 2 % 2
            if self.piece[slot] == -1:
                return
            for tile in range(self.tiles[number] + 1 if self.tiles[number] else 0):
                stage = used % self.stages
                yield self.full[stage], used // self.stages % 2
                assert self.stage[stage] == (number, tile)
                assert (self.piece[slot], self.q[slot]) == (number, number)
                self.empty[stage].arrive()
                used += 1
                if tile > 0:
                    yield Barrier(1), 1  # (time passes)
                    self.check_means(number, tile - 1)
            # the last promotion, of a warpgroup whose rows may see two tiles fewer than others'
            for last in range(max(0, self.tiles[number] - 3), self.tiles[number]):
                self.check_means(number, last)
            self.worked_on[group].append(number)
            self.q_empty[slot].arrive()
        raise AssertionError("a consumer saw no end")


def run(tiles: list[int], stages: int, seed: int, everyone_waits: bool = False, mean_slots: int = MEAN_SLOTS) -> bool:
    """Whether all actors come to their end; with other speeds each, so that some fall far behind."""
    block, rng = Block(tiles, stages, everyone_waits, mean_slots), random.Random(seed)
    makers: list[Callable[[], Iterator[Wait]]] = [block.copy_thread]
    makers += [lambda w=w: block.q_warp(w) for w in range(Q_WARPS)]
    makers += [lambda g=g: block.consumer(g) for g in range(CONSUMERS[stages])]
    actors = [make() for make in makers]
    waits: dict[int, Wait] = {}
    for i, actor in enumerate(actors):
        waits[i] = next(actor)
    speed = [rng.choice((1, 5, 50)) for _ in actors]
    while waits:
        ready = [i for i, (barrier, parity) in waits.items() if barrier.is_open(parity)]
        if not ready:
            return False
        i = rng.choices(ready, [speed[i] for i in ready])[0]
        try:
            waits[i] = next(actors[i])
        except StopIteration:
            del waits[i]
    assert block.worked_on == [list(range(len(tiles)))] * CONSUMERS[stages]
    return True


PIECES = {
    "short": lambda rng: rng.choice((0, 1, 2)),
    "long": lambda rng: rng.randint(9, 20),
    "mixed": lambda rng: rng.choice((0, 1, 2, 3, 8, 9, 17)),
}


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("kind", PIECES)
def test_every_piece_is_worked_on_once_and_nobody_waits_for_ever(kind: str, stages: int) -> None:
    for seed in range(150):
        rng = random.Random(seed)
        assert run([PIECES[kind](rng) for _ in range(rng.randint(1, 12))], stages, seed), seed


def test_the_check_finds_warps_that_wait_for_a_barrier_with_two_phases_ahead() -> None:
    """As the kernel once did it: all three warps waited for the next piece being wanted."""
    ended = [run([1] * 10, 4, seed, everyone_waits=True) for seed in range(150)]
    assert not all(ended)


@pytest.mark.parametrize("stages", [2, 4])
def test_the_check_finds_means_that_are_overwritten(stages: int) -> None:
    with pytest.raises(OverwrittenError):
        [run([20] * 3, stages, seed, mean_slots=PROMOTED) for seed in range(50)]
