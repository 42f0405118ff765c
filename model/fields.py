"""Rules for the fields of a configuration: the type first, then the range, so that no value of any type raises."""

import reprlib
from collections.abc import Callable, Mapping

Rule = tuple[Callable[[object], bool], str]  # predicate, the wanted thing in words
MISSING = ...  # the value of a field that is missing


def integer(low: int, high: int) -> Rule:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def number(low: float, high: float) -> Rule:  # NaN lies in no range
    return lambda v: type(v) in (int, float) and low <= v <= high, f"a number from {low:g} to {high:g}"


def one_of_type(kind: type, words: str) -> Rule:
    return lambda value: isinstance(value, kind), words


def optional(rule: Rule) -> Rule:
    return lambda value: value is MISSING or rule[0](value), rule[1]


def list_of(rule: Rule, words: str, length: int | None = None) -> Rule:
    """A list of `length` valid values, or, without a length, of distinct ones."""
    return lambda v: isinstance(v, list) and all(map(rule[0], v)) and len(v) == (length or len({*v})), words


def first_flaw(values: object, rules: dict[str, Rule]) -> str | None:
    """Describe the first field that breaks its rule. A name "a.b" means field b of the mapping in a."""
    for name, (is_valid, wanted) in rules.items():
        value = values
        for key in name.split("."):
            value = value.get(key, MISSING) if isinstance(value, Mapping) else MISSING
        if not is_valid(value):
            return f"{name} is {'missing' if value is MISSING else reprlib.repr(value)}, not {wanted}"
    return None
