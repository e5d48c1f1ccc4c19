"""A budget's choice against all choices there are; patterns against Python's own, in bounded time."""

import itertools
import re
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brim.checkpoints import budget as module
from brim.checkpoints.budget import Choice, cheapest
from brim.checkpoints.patterns import matcher, named
from brim.errors import BrimError, DoesNotFitError, UsageError

CHOICES = st.lists(
    st.lists(st.builds(Choice, st.integers(0, 60), st.integers(0, 50).map(float)), min_size=1, max_size=3),
    min_size=1, max_size=6,
)  # fmt: skip


@given(CHOICES, st.integers(0, 300))
def test_no_other_choice_within_the_budget_errs_less(tensors: list[list[Choice]], budget: int) -> None:
    """The choice is within the budget and its error is the least over all choices that are; without any, it is refused
    with what is missing."""
    within = [
        sum(choice.error for choice in picked)
        for picked in itertools.product(*tensors)
        if sum(choice.nbytes for choice in picked) <= budget
    ]
    if not within:
        with pytest.raises(DoesNotFitError, match="missing"):
            cheapest(tensors, budget_bytes=budget)
        return
    picked = [choices[number] for choices, number in zip(tensors, cheapest(tensors, budget_bytes=budget), strict=True)]
    assert sum(choice.nbytes for choice in picked) <= budget
    assert sum(choice.error for choice in picked) == min(within)


@given(CHOICES, st.integers(0, 300))
def test_in_coarse_units_the_budget_is_kept(tensors: list[list[Choice]], budget: int) -> None:
    """Where there are more sizes than cells, what is chosen still takes no more than the budget."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_CELLS", 5)
        try:
            picked = cheapest(tensors, budget_bytes=budget)
        except DoesNotFitError:
            assert sum(min(choice.nbytes for choice in choices) for choices in tensors) > budget
            return
    assert sum(choices[number].nbytes for choices, number in zip(tensors, picked, strict=True)) <= budget


@pytest.mark.parametrize("pattern", ["*.mlp.*", "model.layers.[01].*", "*.q_proj.weight", "model.layers.?.self_attn.*"])
def test_globs_are_fnmatchs(pattern: str) -> None:
    """A glob matches names as a shell matches file names, capitals and all."""
    names = [
        f"model.layers.{n}.{part}.weight" for n in range(12) for part in ("mlp.up_proj", "self_attn.q_proj", "MLP.x")
    ]
    found = named(pattern, names)
    for name in names:
        layer, part = name.split(".")[2], name.split(".")[3]
        expected = {
            "*.mlp.*": part == "mlp",
            "model.layers.[01].*": layer in "01",
            "*.q_proj.weight": "q_proj" in name,
            "model.layers.?.self_attn.*": len(layer) == 1 and part == "self_attn",
        }[pattern]
        assert (name in found) == expected


def test_expressions_match_whole_names() -> None:
    r"""`re:` is Python's fullmatch: alternatives, classes and escapes included."""
    names = ["a.0.down_proj.weight", "a.12.down_proj.weight", "a.12.up_proj.weight", "a.x.down_proj.weight"]
    for expression in (r"a\.\d+\.down_proj\.weight", r"a\.[0-9]+\.(?:up|down)_proj.*", r".*\.(up|down)_proj\.weight"):
        assert named(f"re:{expression}", names) == {name for name in names if re.fullmatch(expression, name)}


EVIL = [
    "re:(a+)+$", "re:(a|aa)+$", "re:(.*)*x", "re:(a*)*b", r"re:(a)\1+", "re:(?=a+)a", "re:a{1,9999}{1,9999}",
    "re:.*.*.*.*x", "re:((a?)?)?b", "re:[", "re:(", "re:a" * 200, "", "re:(?P<x>a)+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", EVIL)
def test_patterns_that_may_explode_are_refused(pattern: str) -> None:
    """Repeated groups, references, look-arounds, counts and too many repeats are refused, as is what is no pattern."""
    with pytest.raises(UsageError):
        named(pattern, ["a" * 100])


def test_a_pattern_without_a_match_is_refused() -> None:
    """It is most often a slip of the pen, so a name that could be meant is told."""
    with pytest.raises(UsageError, match=r"none of the 1 weights .*one is 'a\.weight'"):
        named("*.bias", ["a.weight"])


@given(st.text(alphabet="ab.*+?|()[]\\d{}:^$", max_size=24), st.booleans())
def test_any_pattern_is_refused_or_quick(text: str, expression: bool) -> None:
    """Whatever the pattern, it is an error of ours or it answers in under two seconds of this process, for names on
    which expressions explode."""
    names = ["a" * 256, "ab" * 128, "a." * 127 + "b", string.ascii_lowercase * 9]
    begin_s = time.process_time()
    try:
        matches = matcher(f"re:{text}" if expression else text)
    except BrimError:
        return
    assert {matches(name) for name in names} <= {True, False}
    assert time.process_time() - begin_s < 2
