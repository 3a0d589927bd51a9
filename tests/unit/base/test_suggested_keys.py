"""A mistyped key of any config is answered with the key that was meant, and a key like no other with all keys."""

from __future__ import annotations

import dataclasses

import pytest

from base.config import OTHER_NAMES, ConfigError, from_dict
from helpers.run_configs import RUNS, sections

SECTIONS = sorted(set().union(*map(sections, RUNS)), key=str)  # str: module and name


def typos(key: str) -> set[str]:
    """Everything that one edit makes of a key: a letter too many, one left out, another one, two swapped."""
    cuts = [(key[:place], key[place:]) for place in range(len(key))]
    found = {head + "x" + tail for head, tail in cuts} | {head + tail[1:] for head, tail in cuts}
    found |= {head + "x" + tail[1:] for head, tail in cuts}
    found |= {head + tail[1] + tail[0] + tail[2:] for head, tail in cuts[:-1]}
    return found - {key}


def suggestion(section: type, key: str) -> str:
    """The key that an error offers; "" if it lists the keys."""
    with pytest.raises(ConfigError) as error:
        from_dict(section, {key: 1})
    _, found, rest = str(error.value).partition("did you mean '")
    return rest.partition("'")[0] if found else ""


@pytest.mark.parametrize("section", SECTIONS)
def test_one_wrong_letter_of_a_long_key_suggests_that_key(section: type) -> None:
    """Or its twin, where one typo may mean both: beta1 and beta2, encoder_ and decoder_mlp_ratio."""
    names = [field.name for field in dataclasses.fields(section)]
    for meant in (name for name in names if len(name) >= 5):
        twins = {name for name in names if typos(name) & typos(meant)}
        for typo in typos(meant) - set(names):
            assert suggestion(section, typo) in twins, typo


@pytest.mark.parametrize("section", SECTIONS)
def test_a_key_like_no_other_is_met_with_the_list(section: type) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict(section, {"qqqqqq": 1})
    assert "did you mean" not in str(error.value)
    assert all(field.name in str(error.value) for field in dataclasses.fields(section))


def test_the_names_of_other_trainers_lead_to_keys_that_exist() -> None:
    for meant, others in OTHER_NAMES.items():
        owners = [
            section for section in SECTIONS if meant in (field.name for field in dataclasses.fields(section))
        ]
        assert owners
        for section in owners:
            assert {suggestion(section, other) for other in others} == {meant}
