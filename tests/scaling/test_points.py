"""A sweep's points are read back as written, and wrong ones are refused with line and field."""

import json
import math

import pytest

from mmtrain.errors import ConfigError
from mmtrain.scaling.points import FIELDS, read_points, write_points
from tests.scaling.made import point


def test_round_trip(tmp_path):
    points = [point(), point(run="b", group="1e18", experts=16, parameters=3e8, activated=1e8, final=False)]
    path = write_points(tmp_path, points)
    assert read_points(tmp_path) == read_points(path) == points
    assert [file.name for file in tmp_path.iterdir()] == ["points.jsonl"]
    assert tuple(json.loads(path.read_text().splitlines()[0])) == FIELDS


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("loss", math.nan, "diverged"),
        ("loss", math.inf, "positive finite"),
        ("loss", None, "positive finite"),
        ("tokens", 0, "positive finite"),
        ("flops", "1e18", "positive finite"),
        ("learning_rate", True, "positive finite"),
        ("experts", -1, "0 or more"),
        ("experts", 1.5, "0 or more"),
        ("final", 1, "true or false"),
        ("group", 3, "text or null"),
        ("run", "", "wants a text"),
        ("activated", 2e8, "more activated parameters"),
    ],
)
def test_wrong_values_name_line_and_field(tmp_path, field, value, said):
    path = write_points(tmp_path, [point(), point()])
    lines = path.read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {field: value})
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=said) as caught:
        read_points(tmp_path)
    assert f"{path}:2" in str(caught.value) and caught.value.option == f"points.{field}"


def test_wrong_lines_name_the_line(tmp_path):
    path = write_points(tmp_path, [point()])
    good = json.loads(path.read_text())
    for line, said in (
        ('{"run": ', "not JSON"),
        ("[1]", "not an object"),
        (json.dumps({name: value for name, value in good.items() if name != "flops"}), "field flops is missing"),
        (json.dumps(good | {"flop": 1}), "did you mean 'flops'"),
    ):
        path.write_text(json.dumps(good) + "\n\n" + line + "\n")
        with pytest.raises(ConfigError, match=said) as caught:
            read_points(path)
        assert f"{path}:3" in str(caught.value)


def test_nothing_to_read(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_points(tmp_path)
    (tmp_path / "points.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="no point"):
        read_points(tmp_path)


def test_nothing_wrong_is_written(tmp_path):
    with pytest.raises(ConfigError, match="point 2"):
        write_points(tmp_path, [point(), point(loss=math.nan)])
    assert list(tmp_path.iterdir()) == []
