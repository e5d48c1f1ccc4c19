"""A long model's trace from three short ones: what a block adds is found in them, checked, and repeated.

Blocks that are alike leave alike events, so the trace of a model with one block more is the trace without it and some
chunks of events, put in where a loop goes round once more: one in each forward and backward pass, one in the
optimizer's loop over parameters, and so on. `continued` finds these chunks in traces of n, n + 1 and n + 2 blocks
(or periods of blocks) and repeats them as often as asked.

Which block a free ends is said without naming it: the r-th youngest, or the r-th oldest, of the living ones of its
kind (size, line and stream), where r may grow with the number of repetitions, or from one to the next. That holds in
each of them, since backward frees in the reverse order of forward, and loops over parameters in their order. Frees
without an allocation between them may come in any order (autograd's changes from run to run): it decides nothing.

Nothing is guessed: a chunk must be in the third trace twice, sizes that grow with the number of blocks must grow in a
straight line, and the rule of a free must be the same wherever its event is in the three. Else there is no answer, and
the caller rehearses the whole.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, pairwise, repeat
from operator import itemgetter

from brim.memory.trace import Block, Trace

_Event = tuple[bool, Block]
_Where = tuple[str, int]
"""A block's line and stream."""
_Token = tuple[bool, int, _Where]
"""What of an event is compared: allocated or freed, bytes, where."""
_Kind = tuple[int, int, _Where]
"""What tells blocks apart: bytes in the shortest model, bytes more with each repetition, where."""
_Rank = tuple[int, int, int, int]
"""Repetitions in the trace, those before this one, and which of the living of its kind a free ended: from the oldest,
from the youngest."""
_Rule = tuple[int, int]
"""Which of the living of its kind a free ends (0 the oldest, -1 the youngest), and how that changes with each round."""
_MOST_CUTS = 32
"""Ways to cut a trace that are tried."""
_Place = tuple[int, int, int]
"""A position in each of the three traces."""


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Events that follow each other, from a place on."""

    start: _Place
    length: int
    repeats: bool
    """Not in the first trace, once in the second, twice in the third."""


def continued(traces: tuple[Trace, Trace, Trace], *, times: int) -> Trace | None:
    """The first trace, with what the second has more put in `times` times.

    None where the three do not show beyond doubt what that is.
    """
    events = [ordered(trace) for trace in traces]
    tokens = [[(allocated, block.nbytes, (block.line, block.stream)) for allocated, block in each] for each in events]
    stretches = _aligned(tokens)
    for _ in range(_MOST_CUTS):
        if stretches is None:
            return None
        pattern = [token for stretch in stretches for token in _steps(tokens, stretch)]
        found = _rules(events, stretches, [kind for _, kind in pattern], times)
        if found is None:
            return None
        rules = {step: rule for step, rule in found.items() if rule is not None}
        if len(rules) == len(found):
            if _may_be_two_loops(pattern, stretches, rules):
                return None
            return _repeated(pattern, rules, stretches, list(_moments(traces[1], stretches, times)), times)
        stretches = _cut_earlier(tokens, stretches, found.keys() - rules.keys())
    return None


def _may_be_two_loops(
    pattern: Sequence[tuple[bool, _Kind]], stretches: Sequence[_Stretch], rules: Mapping[int, _Rule]
) -> bool:
    """Whether frees whose rank falls from round to round end blocks that other repeated frees end, too: three traces
    do not tell such from loops that follow each other over blocks that are alike."""
    steps = chain.from_iterable(repeat(stretch.repeats, stretch.length) for stretch in stretches)
    repeated = [step for step, repeats in enumerate(steps) if repeats and step in rules]
    freed = Counter(pattern[step][1] for step in repeated)
    return any(rules[step][1] < 0 and freed[pattern[step][1]] > 1 for step in repeated)


def _repeated(
    pattern: Sequence[tuple[bool, _Kind]],
    rules: Mapping[int, _Rule],
    stretches: Sequence[_Stretch],
    moments: list[tuple[str, int]],
    times: int,
) -> Trace:
    """What `times` repetitions allocate and free."""
    trace, living = Trace(), defaultdict[_Kind, list[Block]](list)
    for index, (step, round_) in enumerate(_order(stretches, times)):
        while moments and moments[0][1] <= index:
            trace.begin(moments.pop(0)[0])
        allocated, kind = pattern[step]
        if allocated:
            nbytes, growth, where = kind
            living[kind].append(trace.allocate(nbytes + times * growth, *where))
        else:
            rank, change = rules[step]
            trace.free(living[kind].pop(rank + change * round_))
    for name, _ in moments:
        trace.begin(name)
    return trace


def _moments(trace: Trace, stretches: Sequence[_Stretch], times: int) -> Iterator[tuple[str, int]]:
    """The second trace's moments, and where they begin in the continued one: after what is repeated before them."""
    for name, place in trace.moments:
        start = 0
        for stretch in stretches:
            offset = min(place - stretch.start[1], stretch.length)
            if offset <= 0:
                break
            start += offset + (stretch.length * (times - 1) if stretch.repeats else 0)
        yield name, start


def ordered(trace: Trace) -> list[_Event]:
    """The trace's events; of blocks that are freed without an allocation between, the youngest first."""
    births: dict[int, int] = {}
    events: list[_Event] = []
    for allocated, run in groupby(trace.events, key=itemgetter(0)):
        together = list(run)
        if allocated:
            births |= {id(block): len(births) + index for index, (_, block) in enumerate(together)}
        else:
            together.sort(key=lambda event: -births[id(event[1])])
        events += together
    return events


def _aligned(tokens: Sequence[Sequence[_Token]]) -> list[_Stretch] | None:
    """The three traces cut into stretches, in order; None where some events follow no pattern."""
    place, stretches = (0, 0, 0), []
    while place != tuple(map(len, tokens)):
        length, repeats = _common(tokens, place), False
        if not length:
            # of several that would do, the one after which the traces agree the longest
            lengths = _chunks(tokens, place)
            length = max(lengths, key=lambda chunk: _common(tokens, _after(place, chunk, repeats=True)), default=0)
            repeats = True
        if not length:
            return None
        stretches.append(_Stretch(place, length, repeats))
        place = _after(place, length, repeats=repeats)
    return stretches


def _after(place: _Place, length: int, *, repeats: bool) -> _Place:
    first, second, third = place
    if repeats:
        return first, second + length, third + 2 * length
    return first + length, second + length, third + length


def _common(tokens: Sequence[Sequence[_Token]], place: _Place) -> int:
    """How many events all three traces have from here on, with sizes that stay or grow in a straight line."""
    length, most = 0, min(len(line) - start for line, start in zip(tokens, place, strict=True))
    while length < most and _alike(*(line[start + length] for line, start in zip(tokens, place, strict=True))):
        length += 1
    return length


def _alike(first: _Token, second: _Token, third: _Token) -> bool:
    if first == second == third:
        return True
    straight = third[1] - second[1] == second[1] - first[1]
    return straight and first[0] == second[0] == third[0] and first[2] == second[2] == third[2]


def _chunks(tokens: Sequence[Sequence[_Token]], place: _Place) -> Iterator[int]:
    """Lengths of what may have been put in here: once into the second trace, twice into the third."""
    (_, second, third), (_, here, there) = tokens, place
    for length in range(1, min(len(second) - here, (len(third) - there) // 2) + 1):
        if second[here + length - 1] == third[there + length - 1] == third[there + 2 * length - 1]:
            chunk = second[here : here + length]
            if chunk == third[there : there + length] == third[there + length : there + 2 * length]:
                yield length


def _steps(tokens: Sequence[Sequence[_Token]], stretch: _Stretch) -> Iterator[tuple[bool, _Kind]]:
    """Whether each event of a stretch allocates, and what kind of block."""
    first, second, _ = (line[start : start + stretch.length] for line, start in zip(tokens, stretch.start, strict=True))
    for before, (allocated, nbytes, where) in zip(second if stretch.repeats else first, second, strict=True):
        yield allocated, (before[1], nbytes - before[1], where)


def _order(stretches: Sequence[_Stretch], times: int) -> Iterator[tuple[int, int]]:
    """Steps of the pattern in the order in which they are taken, with `times` repetitions; each with its repetition."""
    start = 0
    for stretch in stretches:
        for round_ in range(times if stretch.repeats else 1):
            yield from ((step, round_) for step in range(start, start + stretch.length))
        start += stretch.length


def _cut_earlier(
    tokens: Sequence[Sequence[_Token]], stretches: Sequence[_Stretch], odd: Collection[int]
) -> list[_Stretch] | None:
    """The same stretches, one that repeats begun earlier, at a free before it that follows no rule; None: none can be.

    Where the events before a chunk are as its last, it may be cut earlier: the traces agree, and other frees are the
    loop's first and last.
    """
    start = 0
    for index, (before, chunk) in enumerate(pairwise(stretches)):
        end = start + before.length
        earlier = max((end - step for step in odd if start <= step < end and end - step <= chunk.length), default=0)
        if earlier and chunk.repeats and not before.repeats and _ends_alike(tokens, chunk, earlier):
            first, second, third = chunk.start
            moved = replace(chunk, start=(first - earlier, second - earlier, third - earlier))
            rest = _Stretch(_after(moved.start, chunk.length, repeats=True), earlier, repeats=False)
            return [
                *stretches[:index],
                replace(before, length=before.length - earlier),
                moved,
                rest,
                *stretches[index + 2 :],
            ]
        start = end
    return None


def _ends_alike(tokens: Sequence[Sequence[_Token]], chunk: _Stretch, length: int) -> bool:
    """Whether a chunk's last events are those before it, too, in each trace."""
    last = tokens[1][chunk.start[1] + chunk.length - length : chunk.start[1] + chunk.length]
    return all(line[place - length : place] == last for line, place in zip(tokens, chunk.start, strict=True))


def _rules(
    events: Sequence[Sequence[_Event]], stretches: Sequence[_Stretch], kinds: Sequence[_Kind], times: int
) -> dict[int, _Rule | None] | None:
    """Which of the living of its kind each free ends after `times` repetitions; of a free, None where no rule holds.

    None where a block's kind changes.
    """
    seen: dict[int, list[_Rank]] = defaultdict(list)
    for repetitions, each in enumerate(events):
        living = defaultdict[_Kind, list[int]](list)
        for (step, round_), (allocated, block) in zip(_order(stretches, repetitions), each, strict=True):
            alike = living[kinds[step]]
            if allocated:
                alike.append(id(block))
                continue
            if id(block) not in alike:
                return None
            rank = alike.index(id(block))
            seen[step].append((repetitions, round_, rank, rank - len(alike)))
            del alike[rank]
    return {step: _rule(ranks, times) for step, ranks in seen.items()}


def _rule(seen: Sequence[_Rank], times: int) -> _Rule | None:
    """The same from the youngest or from the oldest; or behind more older ones with each repetition (what lived before
    the loop), with each that is done, or that is to come. Three sightings of two numbers: the third confirms."""
    *_, oldest, youngest = seen[0]
    if all(rank == youngest for *_, rank in seen):
        return youngest, 0
    if all(rank == oldest for *_, rank, _ in seen):
        return oldest, 0
    if (growth := _growth([(repetitions, rank) for repetitions, _, rank, _ in seen])) is not None:
        (first, _, low, _), *_ = seen
        return low + growth * (times - first), 0
    if (growth := _growth([(round_, rank) for _, round_, rank, _ in seen])) is not None:
        return oldest, growth
    if (growth := _growth([(repetitions - round_, rank) for repetitions, round_, rank, _ in seen])) is not None:
        return oldest + growth * (times - 1), -growth
    return None


def _growth(points: Sequence[tuple[int, int]]) -> int | None:
    """How much a number grows with another; None where it does not in a straight line."""
    (first, low), (last, high) = min(points), max(points)
    if first == last:
        return None
    growth = (high - low) // (last - first)
    return growth if all(rank == low + growth * (number - first) for number, rank in points) else None
