"""Exercises of lesson 0.3, reproducibility."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tutorial_lib.checks.probes import equals, holds, outcome, same_shape
from tutorial_lib.checks.spec import Exercise, Misconception, Probe
from tutorial_lib.tools.seeds import derive_seed, generator_for

Seeder = Callable[..., int]

# --- 0.3.a --------------------------------------------------------------------------------------------------


def _first_63(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def the_salted_hash(seed: int, *purpose: str | int) -> int:
    """hash() of a text is salted anew in every process, so tomorrow's run gets other seeds. SHA-256 is the
    same everywhere."""
    return hash((seed, *purpose)) % 2**63


def glued_together(seed: int, *purpose: str | int) -> int:
    """Without marks between the parts, ("ab", "c") and ("a", "bc") are the same text, and so are rank 11 of
    layer 2 and rank 1 of layer 12. json.dumps of the list keeps them apart."""
    return _first_63("".join(map(str, (seed, *purpose))).encode())


def joined_with_slashes(seed: int, *purpose: str | int) -> int:
    """Joined like a path, ("a/b",) and ("a", "b") are the same text, and the number 1 is the text "1".
    json.dumps of the list keeps them apart."""
    return _first_63("/".join(map(str, (seed, *purpose))).encode())


def added_up(seed: int, *purpose: str | int) -> int:
    """With sums, run 0 of rank 1 gets the seed of run 1 of rank 0, so runs that should be independent share a
    stream. Hash the parts together instead."""
    return seed + sum(part if isinstance(part, int) else zlib.crc32(part.encode()) for part in purpose)


def without_the_seed(seed: int, *purpose: str | int) -> int:
    """The run's seed is not part of what you hash, so every run gets the same streams."""
    return _first_63(json.dumps(purpose).encode())


def sorted_parts(seed: int, *purpose: str | int) -> int:
    """You put the parts of the purpose in order, so (1, 2) and (2, 1) share a stream: rank 1 of layer 2 is
    not rank 2 of layer 1."""
    return _first_63(json.dumps([seed, *sorted(purpose, key=str)]).encode())


def least_significant_byte_first(seed: int, *purpose: str | int) -> int:
    """A sound seed, but not the one that everybody else gets: read the 8 bytes with the most significant
    first, "big"."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()[:8], "little") >> 1


def all_64_bits(seed: int, *purpose: str | int) -> int:
    """Half of these seeds are above 2**63 - 1 and fit into no int64, which is what checkpoints and tensors
    hold. Shift the lowest bit out."""
    return int.from_bytes(hashlib.sha256(json.dumps([seed, *purpose]).encode()).digest()[:8], "big")


_MANY = [(seed, name, rank) for seed in range(3) for name in ("init", "data", "dropout") for rank in range(4)]


def _all_different(seeds: list[int]) -> str | None:
    for i, a in enumerate(seeds):
        if a in seeds[:i]:
            first, again = _MANY[seeds.index(a)], _MANY[i]
            return f"{first} and {again} got the same seed: their streams would be the same"
    return None


def _in_range(seeds: list[int]) -> str | None:
    wrong = [s for s in seeds if not 0 <= s < 2**63]
    return f"{wrong[0]} is not between 0 and 2**63 - 1: it does not fit into an int64" if wrong else None


BUILD = Exercise(
    id="0.3.a",
    symbol="derive_seed",
    reference=derive_seed,
    look_again="A generator for each purpose",
    probes=[
        Probe("an integer", lambda f: f(0, "data"), same_shape),
        Probe("fits into 63 bits", lambda f: [f(*purpose) for purpose in _MANY], holds(_in_range)),
        Probe(
            "other purposes, other seeds", lambda f: [f(*purpose) for purpose in _MANY], holds(_all_different)
        ),
        Probe(
            "run 7, data, rank 0: the number of the lesson",
            lambda f: str(f(7, "data", 0)),
            equals(),
            given='the SHA-256 of [7, "data", 0] begins with 8e313559ccbd4599, in hexadecimal',
        ),
        Probe(
            'the text "1" and the number 1 differ, and so do ("ab", "c") and ("a", "bc")',
            lambda f: (
                f(0, "1") != f(0, 1),
                f(0, "ab", "c") != f(0, "a", "bc"),
                f(0, "a/b") != f(0, "a", "b"),
            ),
            equals(),
        ),
        Probe("equals the reference", lambda f: [str(f(*purpose)) for purpose in _MANY], equals()),
        Probe(
            "no purpose, quotes and accents in it, large seeds",
            lambda f: [str(f(5)), str(f(0, 'say "é"', "日")), str(f(2**80, -3))],
            equals(),
        ),
    ],
    misconceptions=[
        the_salted_hash,
        glued_together,
        joined_with_slashes,
        added_up,
        without_the_seed,
        sorted_parts,
        least_significant_byte_first,
        all_64_bits,
    ],
)


# --- 0.3.b --------------------------------------------------------------------------------------------------

Split = tuple[list[str], list[str]]
Splitter = Callable[..., Split]


def split_scenes(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """The reference: a play's side is settled by the hash of its name."""
    return _by(lambda name: f"{salt}/{name.split('/')[0]}", names, val_fraction)


def _by(text_of: Callable[[str], str], names: list[str], val_fraction: float) -> Split:
    train: list[str] = []
    val: list[str] = []
    for name in names:
        number = int.from_bytes(hashlib.sha256(text_of(name).encode()).digest()[:8], "big")
        (val if number < val_fraction * 2**64 else train).append(name)
    return train, val


def sorted_by_hash_then_cut(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """This is the given code: the cut is at a position, which depends on all the other names, the scenes of a
    play are scattered, and the caller's own list is sorted. Let each name decide for itself."""
    names.sort(key=lambda name: hashlib.sha256(f"{salt}/{name}".encode()).digest())
    cut = round(len(names) * val_fraction)
    return names[cut:], names[:cut]


def whole_plays_shuffled_then_cut(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """The scenes of a play stay together now, but a play's place in the shuffled list still depends on which
    others there are. Add one, and old ones move. Hash the play's name instead."""
    plays = sorted({name.split("/")[0] for name in names})
    random.Random(salt).shuffle(plays)
    held = plays[: round(len(plays) * val_fraction)]
    return [n for n in names if n.split("/")[0] not in held], [n for n in names if n.split("/")[0] in held]


def the_whole_name_is_hashed(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """Each scene decides for itself, so a play ends up on both sides. Hash what the scenes of a play share:
    the part before the first slash."""
    return _by(lambda name: f"{salt}/{name}", names, val_fraction)


def a_hash_that_is_salted_anew(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """hash() of a text is salted anew in every process: the same play is on another side tomorrow, and the
    model has trained on it by then. Use hashlib."""
    held = [hash((salt, name.split("/")[0])) % 2**32 < val_fraction * 2**32 for name in names]
    return [n for n, h in zip(names, held, strict=True) if not h], [
        n for n, h in zip(names, held, strict=True) if h
    ]


def the_fraction_is_in_the_hash(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """With the fraction as a part of the text, every fraction draws a new split, and plays come back from
    validation into training when it grows. Only the comparison may know the fraction."""
    return _by(lambda name: f"{salt}/{val_fraction}/{name.split('/')[0]}", names, val_fraction)


def sides_swapped(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """Training and validation have changed places: what hashes below the fraction is held out, and the
    training names come first."""
    train, val = split_scenes(names, val_fraction, salt)
    return val, train


def the_top_end_is_held_out(names: list[str], val_fraction: float, salt: str = "") -> Split:
    """You hold out what hashes above 1 − fraction. That is a sound split, but another one than everybody
    else's: hold out what lies below the fraction."""
    val, train = split_scenes(names, 1 - val_fraction, salt)
    return train, val


_PLAYS = ("hamlet", "macbeth", "othello", "lear", "tempest", "pericles", "cymbeline", "john", "coriolanus")
_PLAYS += ("much ado", "as you like it", "twelfth night", "julius caesar", "troilus", "timon", "titus")


def _names(plays: tuple[str, ...] = _PLAYS) -> list[str]:
    return [f"{play}/{act}/{scene}" for play in plays for act in (1, 2) for scene in (1, 2, 3)]


def _torn_apart(result: tuple[list[str], list[str]]) -> str | None:
    train, val = ({name.split("/")[0] for name in side} for side in result)
    return f"scenes of {min(train & val)!r} are on both sides" if train & val else None


def _grown(f: Splitter) -> dict[str, list[str]]:
    """Who changed sides when four plays were added in front, and the names turned around."""
    before, after = f(_names(_PLAYS[4:]), 0.5, "s"), f(_names()[::-1], 0.5, "s")
    return {
        "from training to validation": sorted(set(before[0]) & set(after[1])),
        "from validation to training": sorted(set(before[1]) & set(after[0])),
    }


def _moved(result: dict[str, list[str]]) -> str | None:
    for way, names in result.items():
        if names:
            return f"{names[0]} went {way} when other plays were added: {len(sum(result.values(), []))} moved"
    return None


def _came_back(f: Splitter) -> tuple[list[str], list[str]]:
    """The validation names at a growing fraction that are not held out at the next larger one."""
    held = [f(_names(), fraction, "s")[1] for fraction in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
    lost = [name for small, large in zip(held, held[1:], strict=False) for name in small if name not in large]
    return lost, held[-1]


def _left_validation(result: tuple[list[str], list[str]]) -> str | None:
    lost, all_of_them = result
    if lost:
        return (
            f"{lost[0]} left the validation side when the fraction grew: what was held out is trained on now"
        )
    return None if len(all_of_them) == len(_names()) else "with a fraction of 1, not everything is held out"


_MIXED = ["lear/1/1", "hamlet/1/1", "macbeth/1/1", "lear/12/10", "Hamlet/1/1", "hamlet/2", "othello/1/1/b"]
_MIXED += ["tempest/3/2", "lear/4", "macbeth", "hamlet/1/12/c", "othello/2/1", "tempest/1", "Lear/1/1"]


def _left_alone(f: Splitter) -> bool:
    names = _names()
    f(names, 0.5, "s")
    return names == _names()


DEBUG = Exercise(
    id="0.3.b",
    symbol="split_scenes",
    reference=split_scenes,
    look_again="A split that does not leak",
    equivalent_mutants={
        "`int.from_bytes(digest[:8], 'big') < val_fraction * 2 ** 64` became "
        "`int.from_bytes(digest[:8], 'big') <= val_fraction * 2 ** 64`": "a hash meets the bound exactly once in 2⁶⁴",
    },
    probes=[
        Probe(
            "two lists that hold every name once",
            lambda f: sorted(sum(f(_names(), 0.3, "s"), [])),
            equals(),
        ),
        Probe(
            "the list that was handed in is left alone",
            lambda f: (_left_alone(f), *f(_names(), 0.5, "s")),
            holds(
                lambda r: None if r[0] else "the caller's own list was changed: work on a copy, or on none"
            ),
        ),
        Probe("the scenes of a play stay together", lambda f: f(_names(), 0.5, "s"), holds(_torn_apart)),
        Probe("nobody moves when plays are added", _grown, holds(_moved)),
        Probe("a larger fraction moves plays one way only", _came_back, holds(_left_validation)),
        Probe(
            "two plays, by hand",
            lambda f: f(["hamlet/1/1", "tempest/1/1", "hamlet/1/2"], 0.5, "s"),
            equals(),
            given="SHA-256 of s/hamlet begins with b166, of s/tempest with 74c4; half of 2⁶⁴ begins with 80",
        ),
        Probe("equals the reference", lambda f: f(_names(), 0.3, "salt"), equals()),
        Probe(
            "plays mixed, long and short names: in the order in which they came",
            lambda f: [side for salt in "stuv" for side in f(list(_MIXED), 0.5, salt)],
            equals(),
            given="lear/1/1, hamlet/1/1, macbeth/1/1, lear/12/10, Hamlet/1/1, hamlet/2, othello/1/1/b, …",
        ),
        Probe(
            "fractions down to a thousandth, without a salt, names without a slash",
            lambda f: [
                f([f"play {i}" for i in range(3000)], fraction)[1] for fraction in (0.001, 0.0015, 0.01)
            ],
            equals(),
        ),
        Probe("nothing to split", lambda f: f([], 0.5), equals()),
    ],
    misconceptions=[
        sorted_by_hash_then_cut,
        Misconception(
            "a sorted copy, then cut",
            lambda names, val_fraction, salt="": sorted_by_hash_then_cut(list(names), val_fraction, salt),
            "The caller's list is safe now, but the scenes of a play are still on both sides, and the cut is still "
            "at a position. Hash the play's name, and compare that with the fraction.",
        ),
        whole_plays_shuffled_then_cut,
        the_whole_name_is_hashed,
        a_hash_that_is_salted_anew,
        the_fraction_is_in_the_hash,
        sides_swapped,
        the_top_end_is_held_out,
    ],
)


# --- 0.3.c --------------------------------------------------------------------------------------------------


class ShuffledSampler:
    """The reference, in steps that the misconceptions below replace one at a time."""

    def __init__(self, n: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if world_size > n:
            raise ValueError(f"{n} items cannot be shared by {world_size} processes")
        self.n, self.seed, self.rank, self.world_size = n, seed, rank, world_size
        self._begin(0, 0)

    def next_index(self) -> int:
        index = self.share[self.position]
        self.position += 1
        if self.position == len(self.share):
            self._begin(self.epoch + 1, 0)
        return index

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin(state["epoch"], state["position"])

    def _begin(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        self.share = self._share(self._order())

    def _order(self) -> Tensor:
        return torch.randperm(self.n, generator=generator_for(self.seed, "order", self.epoch))

    def _share(self, order: Tensor) -> list[int]:
        usable = self.n - self.n % self.world_size
        return order[self.rank : usable : self.world_size].tolist()


class EveryEpochAlike(ShuffledSampler):
    """The order does not depend on the epoch, so the model meets the same neighbors in the same order again
    and again. The epoch belongs to the purpose: generator_for(seed, "order", epoch)."""

    def _order(self) -> Tensor:
        return torch.randperm(self.n, generator=generator_for(self.seed, "order", 0))


class AnOrderForEachRank(ShuffledSampler):
    """Each rank shuffles differently and takes its places from its own order, so some numbers go to two ranks
    and some to none. All ranks need the same order."""

    def _order(self) -> Tensor:
        return torch.randperm(self.n, generator=generator_for(self.seed, "order", self.epoch, self.rank))


class SharedBeforeShuffling(ShuffledSampler):
    """Each rank shuffles a fixed share, so it never sees the data of the others. Shuffle everything, then
    share out."""

    def _begin(self, epoch: int, position: int) -> None:
        self.epoch, self.position = epoch, position
        mine = self._share(torch.arange(self.n))
        order = torch.randperm(len(mine), generator=generator_for(self.seed, "order", epoch))
        self.share = [mine[i] for i in order.tolist()]


class TheEpochIsForgotten(ShuffledSampler):
    """Only the position was restored, so the resumed run starts again with the order of epoch 0."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin(0, state["position"])


class ThePositionIsForgotten(ShuffledSampler):
    """The resumed run starts its epoch from the beginning: some numbers come twice."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._begin(state["epoch"], 0)


class TheOldOrderIsKept(ShuffledSampler):
    """Epoch and position were set, but the order in use is still that of the epoch before loading. Make it
    anew."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class TheTailIsKept(ShuffledSampler):
    """With 11 numbers for 4 ranks, some ranks get three and one gets two. They fall out of step, and in
    distributed training the longer ones wait for ever. Leave the last n % world_size of the order out."""

    def _share(self, order: Tensor) -> list[int]:
        return order[self.rank :: self.world_size].tolist()


class TheGlobalGenerator(ShuffledSampler):
    """The order is right, but torch.manual_seed returns the global generator and sets it back: dropout and
    everything else starts over in each epoch. Use a generator of your own."""

    def _order(self) -> Tensor:
        return torch.randperm(
            self.n, generator=torch.manual_seed(derive_seed(self.seed, "order", self.epoch))
        )


Sampler = Callable[..., Any]


def _take(sampler: Any, count: int) -> list[int]:
    return [sampler.next_index() for _ in range(count)]


def _epochs(cls: Sampler) -> list[list[int]]:
    sampler = cls(12, 3)
    return [_take(sampler, 12) for _ in range(3)]


def _not_whole(epochs: list[list[int]]) -> str | None:
    for number, epoch in enumerate(epochs):
        if sorted(epoch) != list(range(12)):
            return f"epoch {number} of 12 numbers gave {epoch}: not every number once"
    return "two epochs have the same order" if epochs[0] in epochs[1:] or epochs[1] == epochs[2] else None


def _three_ranks(cls: Sampler) -> list[list[list[int]]]:
    """Four epochs of three ranks that share twelve numbers: `[epoch][rank]`."""
    ranks = [cls(12, 1, rank, 3) for rank in range(3)]
    return [[_take(sampler, 4) for sampler in ranks] for _ in range(4)]


def _badly_shared(epochs: list[list[list[int]]]) -> str | None:
    for number, shares in enumerate(epochs):
        if sorted(sum(shares, [])) != list(range(12)):
            return f"in epoch {number}, three ranks of twelve numbers had {shares}: not every number once"
    if len(set().union(*(shares[0] for shares in epochs))) == 4:
        return "rank 0 had the same four numbers in every epoch: it never sees the rest of the data"
    return None


def _states(cls: Sampler) -> list[dict[str, int]]:
    sampler = cls(5, 0)
    states = [dict(sampler.state_dict())]
    for _ in range(11):
        sampler.next_index()
        states.append(dict(sampler.state_dict()))
    return states


def _resumed(cls: Sampler) -> list[tuple[list[int], list[int]]]:
    """What comes after an interruption, and what would have come; stopped after 0, 3, 7 (an epoch) and 16."""
    results = []
    for stop in (0, 3, 7, 16):
        whole, stopped, fresh = (cls(15, 2, 1, 2) for _ in range(3))
        expected = _take(whole, stop + 9)[stop:]
        _take(stopped, stop)
        fresh.load_state_dict(dict(stopped.state_dict()))
        results.append((_take(fresh, 9), expected))
    return results


def _another_road(results: list[tuple[list[int], list[int]]]) -> str | None:
    for stop, (yours, expected) in zip((0, 3, 7, 16), results, strict=True):
        if yours != expected:
            return (
                f"stopped after {stop} numbers, a fresh sampler with the loaded state went on with {yours[:5]} …, "
                f"the uninterrupted one with {expected[:5]} …"
            )
    return None


def _back_and_forth(cls: Sampler) -> list[int]:
    """One sampler, sent on and back, and state dicts that must not change afterwards."""
    sampler = cls(7, 4)
    start = sampler.state_dict()
    first = _take(sampler, 10)
    sampler.load_state_dict({"epoch": 5, "position": 2})
    far = _take(sampler, 8)
    sampler.load_state_dict(start)
    return first + far + _take(sampler, 10)


def _states_of_a_rank(cls: Sampler) -> list[dict[str, int]]:
    """Rank 1 of three with 11 numbers: three in each epoch."""
    sampler = cls(11, 0, 1, 3)
    states = [dict(sampler.state_dict())]
    for _ in range(7):
        sampler.next_index()
        states.append(dict(sampler.state_dict()))
    return states


def _one_state_for_all(cls: Sampler) -> list[list[int]]:
    """A checkpoint holds one state, and every rank loads it; twice, since it must not change."""
    state, numbers = {"epoch": 2, "position": 1}, []
    for _ in range(2):
        ranks = [cls(11, 5, rank, 3) for rank in range(3)]
        for sampler in ranks:
            sampler.load_state_dict(state)
            numbers.append(_take(sampler, 4))
    return numbers


def _uneven(cls: Sampler) -> list[list[int]]:
    return [_take(cls(11, 5, rank, 4), 6) for rank in range(4)]


def _global_stream(cls: Sampler) -> tuple[bool, list[int]]:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    numbers = _take(cls(6, 0), 14)
    return bool(torch.equal(before, torch.get_rng_state())), numbers


EXTEND = Exercise(
    id="0.3.c",
    symbol="ShuffledSampler",
    reference=ShuffledSampler,
    look_again="Stopping and going on",
    probes=[
        Probe("the next number is an int", lambda cls: cls(5, 0).next_index(), same_shape),
        Probe("every number once in each epoch, in a new order", _epochs, holds(_not_whole)),
        Probe(
            "three ranks share an epoch, and each sees everything in time", _three_ranks, holds(_badly_shared)
        ),
        Probe(
            "epoch and position after each of 11 numbers, n = 5",
            _states,
            equals(),
            given="after 4 numbers: epoch 0, position 4; after 5: epoch 1, position 0",
        ),
        Probe(
            "equals the reference", lambda cls: (_take(cls(10, 7), 25), _take(cls(9, 8, 2, 3), 9)), equals()
        ),
        Probe("11 numbers, 4 ranks: equally many for all", _uneven, equals()),
        Probe(
            "rank 1 of three: epoch and position after each of 7 numbers",
            _states_of_a_rank,
            equals(),
            given="n = 11, so 3 numbers for each rank; position counts what this rank has had: 0, 1, 2, 0, …",
        ),
        Probe("goes on where it stopped", _resumed, holds(_another_road)),
        Probe("loads a state in the middle of things", _back_and_forth, equals()),
        Probe(
            "one state for all ranks, loaded again and again",
            _one_state_for_all,
            equals(),
            given='three ranks load {"epoch": 2, "position": 1}, take 4 numbers each, and three new ones load it again',
        ),
        Probe(
            "the global generator is left alone",
            _global_stream,
            holds(lambda r: None if r[0] else "the global generator was reseeded or drawn from"),
        ),
        Probe(
            "more processes than items: a ValueError",
            lambda cls: (
                outcome(lambda: cls(3, 0, 0, 4) and "no error"),
                outcome(lambda: cls(3, 0, 2, 3) and "ok"),
            ),
            equals(),
        ),
    ],
    misconceptions=[
        EveryEpochAlike,
        AnOrderForEachRank,
        SharedBeforeShuffling,
        TheEpochIsForgotten,
        ThePositionIsForgotten,
        TheOldOrderIsKept,
        TheTailIsKept,
        TheGlobalGenerator,
    ],
)

EXERCISES = [BUILD, DEBUG, EXTEND]
