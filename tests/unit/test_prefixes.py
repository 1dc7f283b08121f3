"""What prompts are computed together."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.llm.prefixes import SHORTEST, common_length, group_prompts, split_by_length

HEADS = ([1] * SHORTEST, [2] * SHORTEST * 2, [1] * SHORTEST + [3] * SHORTEST)
PROMPTS = st.lists(
    st.builds(
        lambda head, tail: [*head, *tail],
        st.sampled_from([*HEADS, []]),
        st.lists(st.integers(1, 3), max_size=5),
    ),
    max_size=12,
)


@given(PROMPTS)
def test_groups_hold_each_prompt_once_and_share_what_they_say(prompts: list[list[int]]) -> None:
    groups = group_prompts(prompts)
    members = [number for group in groups for number in group.members]
    assert sorted(members) == list(range(len(prompts)))
    for group in groups:
        assert group.length == 0 or group.length >= SHORTEST
        for one, other in itertools.pairwise(group.members):
            assert common_length(prompts[one], prompts[other]) >= group.length


def test_the_division_saves_the_most() -> None:
    prompts = [[*HEADS[number % 3], 5, number] for number in range(12)]
    found = {(tuple(sorted(group.members)), group.length) for group in group_prompts(prompts)}
    assert found == {
        ((0, 3, 6, 9), SHORTEST + 1),
        ((1, 4, 7, 10), 2 * SHORTEST + 1),
        ((2, 5, 8, 11), 2 * SHORTEST + 1),
    }


def test_many_equal_prompts_are_no_problem() -> None:
    groups = group_prompts([[1] * 40] * 5000)
    assert sum(len(group.members) for group in groups) == 5000


@given(st.lists(st.integers(1, 300), max_size=7), st.integers(0, 400))
def test_passes_cost_the_least(lengths: list[int], cost: int) -> None:
    def price(passes: list[list[int]]) -> int:
        return sum(cost + len(one) * max(lengths[number] for number in one) for one in passes)

    passes = split_by_length(lengths, cost)
    assert sorted(number for one in passes for number in one) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for cuts in itertools.product((False, True), repeat=max(0, len(order) - 1)):
        ends = [place + 1 for place, is_cut in enumerate(cuts) if is_cut]
        parts = [order[a:b] for a, b in itertools.pairwise([0, *ends, len(order)]) if a < b]
        assert price(passes) <= price(parts)
