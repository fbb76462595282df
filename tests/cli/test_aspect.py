"""`jaxgen sample --aspect`: the shape that is drawn, and mistakes."""

from types import SimpleNamespace

import pytest

from jaxgen.cli.pictures import nearest_shape
from jaxgen.cli.sample import parser
from jaxgen.data.imagetext import LabelledImages
from jaxgen.errors import UserError

TABLE = LabelledImages(size=64, aspect=2.0, aspect_step=8).table


@pytest.mark.parametrize("aspect, shape", [("1:1", (64, 64)), ("3:2", (48, 80)), ("2:3", (80, 48)), ("9:1", (48, 80))])
def test_the_nearest_shape_is_drawn(aspect, shape):
    asked = parser().parse(["runs/a", "--aspect", aspect])
    assert nearest_shape(asked, TABLE, (64, 64, 3), "runs/a") == shape


@pytest.mark.parametrize("words, table, message", [
    ({"aspect": "3x2"}, TABLE, "--aspect is '3x2', which should be like 3:2, width to height"),
    ({"aspect": "0:2"}, TABLE, "--aspect is '0:2', which"),
    ({"aspect": "3:2", "size": "64x64"}, TABLE, "both --size 64x64 and --aspect 3:2 say what is drawn; give one"),
    ({"aspect": "3:2"}, (), "runs/a has learned pictures of one shape, 64 x 64 .data.aspect is 1.; --size asks"),
])
def test_mistakes(words, table, message):
    with pytest.raises(UserError, match=message):
        nearest_shape(SimpleNamespace(**{"size": None} | words), table, (64, 64, 3), "runs/a")
