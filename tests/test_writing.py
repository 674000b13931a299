"""What reports hand to JSON."""

import json
import math

from manifold_sde.writing import plain

VALUE = {"a": (1.0, math.inf), "b": [{"c": math.nan}, "text", None, 3], "d": -math.inf}


def test_what_json_has_no_number_for_is_none() -> None:
    found = plain(VALUE)
    assert found == {"a": [1.0, None], "b": [{"c": None}, "text", None, 3], "d": None}
    json.dumps(found, allow_nan=False)


def test_infinity_can_be_named() -> None:
    found = plain(VALUE, named=True)
    assert (found["a"][1], found["d"]) == ("Infinity", "-Infinity")
    assert float(found["d"]) == -math.inf
    json.dumps(found, allow_nan=False)
