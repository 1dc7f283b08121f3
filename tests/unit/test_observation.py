"""What the policy sees: bounded, and enough to tell what stands in the text."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from teams_hpc.rewriting.observation import FEATURE_NAMES, History, observation_size, observe
from teams_hpc.rewriting.operations import OPERATIONS, Operation

BREADTH = OPERATIONS.index(Operation.BREADTH)
STEPS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=15)


def play(steps: list[tuple[int, bool]]) -> History:
    history = History.start()
    for operation, is_kept in steps:
        history = history.after(operation, is_kept=is_kept)
    return history


@given(st.text(), st.text(max_size=20), STEPS, st.integers(1, 6))
def test_any_text_after_any_chain_is_within_bounds(
    text: str, input_text: str, steps: list[tuple[int, bool]], length: int
) -> None:
    for kind in ("features", "one_hot"):
        seen = observe(kind, text, input_text, play(steps), length)
        assert seen.shape == (observation_size(kind),)
        assert ((seen >= 0.0) & (seen <= 1.0)).all()


@given(STEPS)
def test_counts_since_breadth_are_those_after_the_last_kept_breadth(
    steps: list[tuple[int, bool]],
) -> None:
    kept = [number for number, step in enumerate(steps) if step == (BREADTH, True)]
    present = steps[kept[-1] + 1 :] if kept else steps
    history = play(steps)
    for code in range(len(OPERATIONS)):
        assert history.counts[code] == [operation for operation, _ in steps].count(code)
        assert history.since_breadth[code] == [operation for operation, _ in present].count(code)


def test_a_breadth_in_vain_does_not_hide_what_stands_in_the_text() -> None:
    before = play([(0, True), (2, True)])
    vain, real = before.after(BREADTH, is_kept=False), before.after(BREADTH, is_kept=True)
    place = FEATURE_NAMES.index("since_breadth_add_constraints")
    assert observe("features", "Sing.", "", vain, 6)[place] == 1.0
    assert observe("features", "Sing.", "", real, 6)[place] == 0.0


def test_features_say_what_their_names_say() -> None:
    def on(text: str) -> set[str]:
        seen = observe("features", text, "", History.start(), 6)
        binary = {"question_mark", "digits", "code", "asks_for_steps", "data", "limits"}
        names = {name for name in FEATURE_NAMES if name in binary or name.startswith("kind_")}
        return {name for name in names if seen[FEATURE_NAMES.index(name)] == 1.0}

    assert on("What is photosynthesis?") == {"kind_question", "question_mark"}
    assert on("Write a Python function.") == {"kind_write", "code"}
    assert on("Please translate this in at most 9 words.") == {"kind_transform", "digits", "limits"}
    assert on("Compare the rows of the table step by step.") == {
        "kind_compare",
        "data",
        "asks_for_steps",
    }
    assert on("") == set()


def test_an_observation_is_a_pure_function() -> None:
    history = play([(1, True), (5, False)])
    first, again = (observe("features", "Sing 7 songs.", "x", history, 6) for _ in range(2))
    assert np.array_equal(first, again)
