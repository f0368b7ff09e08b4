"""Balancing by entries: matches are those of a search for each entry, shares those of the paper's formula."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmcontrast.curation.balance import Entries, is_kept, limit_of_tail, shares

WORDS = st.lists(st.sampled_from(["a", "b", "c", "ab", "St", "Louis", ".", ",", " ", "\n", "!", "é"]), max_size=12)
PHRASES = st.lists(st.lists(st.sampled_from(["a", "b", "ab", "St", "Louis", ".", "é"]), min_size=1, max_size=3), max_size=8)


def spaced(text):
    """The paper's: marks between spaces, other white space a space, a space before and behind."""
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for white in "\t\n\r":
        text = text.replace(white, " ")
    return f" {text} "


@settings(max_examples=300, deadline=None)
@given(words=WORDS, phrases=PHRASES, joint=st.sampled_from(["", " ", "  "]))
def test_what_is_found_is_what_a_search_for_each_entry_finds(words, phrases, joint):
    entries = list(dict.fromkeys(" ".join(phrase) for phrase in phrases))
    text = joint.join(words)
    assert Entries(entries).found_in(text) == [k for k, entry in enumerate(entries) if f" {entry} " in spaced(text)]


def test_phrases_marks_and_what_is_no_entry():
    entries = Entries(["dog", "dog house", "St. Louis", "hot dog"])
    assert entries.found_in("A dog house, a hot dog!") == [0, 1, 3]
    assert (
        entries.found_in("Dogs in St. Louis") == []
    )  # capitals count; marks are set apart in texts alone
    assert entries.count(["dog dog", "a dog", "hot dog"]).tolist() == [3, 0, 0, 1]
    with pytest.raises(ValueError, match="entry 1 is empty"):
        Entries(["dog", " "])
    with pytest.raises(ValueError, match="entry 2, 'dog', is entry 0 already"):
        Entries(["dog", "cat", "dog"])


def test_a_frequent_entry_keeps_about_its_limit_and_a_rare_one_all():
    counts = np.array([50_000, 200, 0])
    share = shares(counts, 2_000)
    assert share.tolist() == [0.04, 1.0, 1.0]
    kept = sum(is_kept(k, [0], share, 3) for k in range(50_000))
    assert abs(kept - 2_000) < 5 * 2_000**0.5
    assert all(is_kept(k, [0, 1], share, 3) for k in range(200)) and not is_kept(0, [], share, 3)
    two = sum(is_kept(k, [0, 1], np.array([0.5, 0.5]), 0) for k in range(20_000))
    assert abs(two / 20_000 - 0.75) < 0.02  # any of them


def test_the_limit_of_a_share_of_the_tail():
    counts = np.array([1, 2, 3, 4, 90])
    assert limit_of_tail(counts, 0.1) == 4 and limit_of_tail(counts, 0.03) == 2 and limit_of_tail(counts, 1.0) == 90
    with pytest.raises(ValueError, match="no text matches"):
        limit_of_tail(np.zeros(3, dtype=np.int64), 0.1)
