"""Values that are read when they are asked for."""

import pytest

from devec.lazy import LazyMapping, joined, mapped, outlines, renamed, selected


class Source:
    """Values by key, and a list of those that were read."""

    def __init__(self, **values):
        self.values, self.read = values, []

    def lazy(self):
        def read(key):
            self.read.append(key)
            return self.values[key]

        return LazyMapping({key: f"outline of {key}" for key in self.values}, read)


def test_nothing_is_read_before_it_is_asked_for_and_then_each_time():
    source = Source(a="1", b="2")
    lazy = source.lazy()
    assert (list(lazy), len(lazy), "a" in lazy, "c" in lazy) == (["a", "b"], 2, True, False)
    assert outlines(lazy) == {"a": "outline of a", "b": "outline of b"}
    assert source.read == []
    assert (lazy["b"], lazy["b"]) == ("2", "2")
    assert source.read == ["b", "b"]
    assert dict(lazy) == source.values


def test_what_is_not_there_is_not_read():
    source = Source(a="1")
    with pytest.raises(KeyError, match="c"):
        source.lazy()["c"]
    assert source.lazy().get("c") is None
    assert source.read == []


def test_values_in_memory_are_their_own_outlines():
    values = {"a": 1}
    assert outlines(values) is values


CHANGES = {
    "mapped": (
        lambda v: mapped(v, lambda key, value: f"{key}: {value}"),
        {"a": "a: 1", "b": "b: 2"},
    ),
    "only": (lambda v: selected(v, {"b", "c"}), {"b": "2"}),
    "renamed": (lambda v: renamed(v, {"a": "x", "b": "y"}), {"x": "1", "y": "2"}),
    "joined": (lambda v: joined(v, {"b": "3", "c": "4"}), {"a": "1", "b": "3", "c": "4"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_made_of_lazy_values_is_lazy_and_else_the_same(name):
    change, want = CHANGES[name]
    source = Source(a="1", b="2")
    made = change(source.lazy())
    assert isinstance(made, LazyMapping)
    assert source.read == []
    assert list(made) == list(want)
    assert dict(made) == want
    eager = change(dict(source.values))
    assert not isinstance(eager, LazyMapping)
    assert eager == want


def test_of_two_the_second_is_read_where_both_have_a_value():
    first, second = Source(a="1", b="2"), Source(b="3")
    made = joined(first.lazy(), second.lazy())
    assert made["b"] == "3"
    assert (first.read, second.read) == ([], ["b"])


def test_outlines_follow_changes():
    lazy = Source(a="1", b="2").lazy()
    assert outlines(CHANGES["renamed"][0](lazy)) == {"x": "outline of a", "y": "outline of b"}
    assert outlines(CHANGES["mapped"][0](lazy))["a"] == "a: outline of a"
    assert outlines(CHANGES["joined"][0](lazy)) == {"a": "outline of a", "b": "3", "c": "4"}
