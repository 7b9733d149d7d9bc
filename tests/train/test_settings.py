"""The strict builder of settings trees."""

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from train.settings.tree import ConfigError, from_dict, from_text, hint, settings, takes_text, to_dict


@dataclass(frozen=True)
class Inner:
    global_: Annotated[int, "a test's setting"] = 1
    rate: Annotated[float, "a test's setting"] = 0.5
    limit: Annotated[float | None, "a test's setting"] = None
    size: Annotated[int | str, "a test's setting"] = "auto"


@dataclass(frozen=True)
class Outer:
    must: Annotated[str, "the thing to give"]
    flag: Annotated[bool, "a test's setting"] = False
    pair: Annotated[tuple[float, float], "a test's setting"] = (0.9, 0.95)
    words: Annotated[tuple[str, ...], "a test's setting"] = ()
    inner: Inner = field(default_factory=Inner)


def refused(values: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        from_dict(Outer, {"must": "x"} | values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [2**63, -(2**63), 1e30, 10**400])
def test_a_whole_number_fits_what_counts(value):
    assert (
        refused({"inner": {"size": value}})
        == f"inner.size={value} cannot be used: inner.size takes a whole number below 2^63"
    )
    assert from_dict(Outer, {"must": "x", "inner": {"size": 2**63 - 1}}).inner.size == 2**63 - 1


def test_paths_drop_the_underscore_of_keywords():
    assert [item.path for item in settings(Outer)] == [
        "must",
        "flag",
        "pair",
        "words",
        "inner.global",
        "inner.rate",
        "inner.limit",
        "inner.size",
    ]


def test_values_land_where_they_belong_and_come_back():
    values = {
        "must": "x",
        "flag": True,
        "pair": [0.1, 0.2],
        "words": ["a", "b", "c"],
        "inner": {"global": 4, "rate": 0.25, "limit": 3.5, "size": 8},
    }
    built = from_dict(Outer, values)
    assert built == Outer("x", True, (0.1, 0.2), ("a", "b", "c"), Inner(4, 0.25, 3.5, 8))
    assert to_dict(built) == values
    assert from_dict(Outer, to_dict(built)) == built


def test_missing_values_take_their_defaults():
    assert from_dict(Outer, {"must": "x", "inner": {"rate": 0.25}}) == Outer("x", inner=Inner(rate=0.25))


def test_a_number_that_is_whole_is_fine_where_a_whole_number_is_wanted():
    assert from_dict(Outer, {"must": "x", "inner": {"global": 1e12}}).inner.global_ == 10**12
    built = from_text(Outer, ["must=x", "inner.global=1e3", "inner.size=2e3"])
    assert (built.inner.global_, built.inner.size) == (1000, 2000) and type(built.inner.size) is int


def test_a_whole_number_is_fine_where_a_number_is_wanted():
    rate = from_dict(Outer, {"must": "x", "inner": {"rate": 2}}).inner.rate
    assert rate == 2.0 and type(rate) is float


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"inner": {"global": 1.5}}, "inner.global=1.5 cannot be used: inner.global takes a whole number"),
        ({"inner": {"global": True}}, "inner.global=True cannot be used"),
        ({"inner": {"global": "4"}}, "inner.global='4' cannot be used"),
        ({"inner": {"global": None}}, "inner.global=null cannot be used"),
        ({"inner": {"rate": "fast"}}, "inner.rate='fast' cannot be used: inner.rate takes a number"),
        ({"inner": {"limit": "x"}}, "inner.limit takes a number or null"),
        ({"inner": {"size": 1.5}}, "inner.size takes a whole number or text"),
        ({"flag": 1}, "flag takes true or false"),
        ({"must": 3}, "must=3 cannot be used: must takes text"),
        ({"pair": [0.1]}, "pair takes a list such as [a number, a number]"),
        ({"pair": [0.1, "x"]}, "pair='x' cannot be used"),
        ({"pair": 0.1}, "pair=0.1 cannot be used"),
        ({"inner": 3}, "inner is a section"),
        ({"must": "???"}, "must must be given: must=... (the thing to give)"),
    ],
)
def test_wrong_types_are_refused(values, says):
    assert says in refused(values)


def test_a_setting_without_default_must_be_given():
    with pytest.raises(ConfigError, match="must must be given"):
        from_dict(Outer, {})


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"inner": {"rat": 1}}, "unknown setting inner.rat=1: did you mean inner.rate?"),
        ({"rate": 1}, "unknown setting rate=1: did you mean inner.rate?"),
        ({"iner": {"rate": 1}}, "unknown setting iner.rate=1: did you mean inner.rate?"),
        ({"inner": {"rate": {"deep": 1}}}, "unknown setting inner.rate.deep=1: did you mean inner.rate?"),
        ({"zzz": 1}, "unknown setting zzz=1: --help lists all that are known"),
    ],
)
def test_unknown_settings_name_the_nearest(values, says):
    assert says == refused(values)


def test_hint_names_every_path_with_the_same_last_part():
    assert hint("steps", ["run.steps", "mtp.steps", "seed"]) == "did you mean run.steps or mtp.steps?"


def test_text_is_read_by_the_type_of_its_setting():
    arguments = ["must=def f(x):  # a=b, [c]", "flag=true", "inner.rate=1e-1", "inner.limit=null", "inner.size=8"]
    assert from_text(Outer, arguments) == Outer("def f(x):  # a=b, [c]", True, inner=Inner(rate=0.1, size=8))
    assert from_text(Outer, ["must=3", "inner.size=auto"]) == Outer("3")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("must", "'must' is not a setting: write key=value"),
        ("mus=x", "unknown setting mus=x: did you mean must?"),
        ("inner.global=many", "inner.global='many' cannot be used"),
        ("inner.global=1.5", "inner.global='1.5' cannot be used"),
        ("flag=yes", "flag='yes' cannot be used"),
        ("inner=5", "unknown setting inner=5"),
    ],
)
def test_wrong_text_is_refused(argument, says):
    with pytest.raises(ConfigError) as caught:
        from_text(Outer, ["must=x", argument])
    assert says in str(caught.value)


def test_only_text_takes_text():
    assert takes_text(str) and takes_text(str | None)
    assert not any(map(takes_text, (int, int | str, tuple[str, ...], float | None)))
