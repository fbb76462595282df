"""Labels from another column of pictures with captions: the same pictures, on the same sides."""

import numpy as np
import pytest
from PIL import Image
from toys import Pairs, Tables, setting

from jaxgen.data.imagetext import ImageText
from jaxgen.data.tokenizers import Bytes
from jaxgen.data.transforms import Flip, RandomResizedCrop
from jaxgen.errors import UserError
from jaxgen.evaluation import whole
from jaxgen.evaluation.labels import Labels
from jaxgen.evaluation.probe import LinearProbe, NearestNeighbours
from jaxgen.evaluation.zeroshot import ZeroShot
from jaxgen.tasks.base import Task

N = 40
KINDS = ["b", "c d", "a"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Forty pictures of one grey each, whose captions and columns tell which."""
    folder = tmp_path_factory.mktemp("labels")
    lines = ["file\tcaption\tkind\tnumber\tsome"]
    for i in range(N):
        Image.new("RGB", (12, 12), (5 * i,) * 3).save(folder / f"{i:02}.png")
        lines.append(f"{i:02}.png\tpicture {i}\t{KINDS[i % 3]}\t{2 * (i % 4)}\t{'' if i == 7 else 'x'}")
    (folder / "t.tsv").write_text("\n".join(lines))
    augment = RandomResizedCrop(8, (0.9, 1.0)), Flip()
    data = ImageText("t.tsv", str(folder), "file", tokenizer=Bytes(), length=16, size=8, augment=augment, heldout=0.25)
    return data.prepare(folder / "cache")


def shade(example):
    return int(example["image"][0, 0, 0]) // 5


def test_labels_are_those_of_the_pictures(prepared):
    data = Labels(prepared, "kind")
    assert data.classes == ("a", "b", "c d") and list(data.names("train")) == list(prepared.names("train"))
    assert len(data.heldout()) == len(prepared.heldout()) > 3
    for i in range(len(data.heldout())):
        example, theirs = data.heldout()[i], prepared.heldout()[i]
        assert set(example) == {"image", "label", "weights"} and np.array_equal(example["image"], theirs["image"])
        assert data.classes[example["label"]] == KINDS[shade(example) % 3]
    seen = set()
    for i in range(len(data.names("train"))):
        example = data.train(3)[i]
        assert np.array_equal(example["image"], prepared.train(3)[i]["image"])   # the same order and augmentation
        assert data.classes[example["label"]] == KINDS[shade(example) % 3]
        seen.add(shade(example))
    assert len(seen) == len(data.names("train")) and not seen & {shade(e) for e in data.heldout()}


def test_numbers_stand_for_themselves(prepared):
    data = Labels(prepared, "number")
    assert data.classes == tuple("0123456")
    assert all(e["label"] == 2 * (shade(e) % 4) for e in data.heldout())


class Shade(Task):
    """A picture's embedding tells its kind."""

    def embed_images(self, params, batch, state=None):
        return params["image"][batch["image"][:, 0, 0, 0] // 5]


@pytest.mark.parametrize("evaluation", [LinearProbe(label="kind", l2=(1e-3,)), NearestNeighbours(label="kind", k=3)])
def test_evaluations_take_them(evaluation, prepared):
    table = np.eye(3)[np.arange(N) % 3] + 0.01 * np.random.default_rng(0).normal(size=(N, 3))
    report = evaluation.build(setting(prepared, Shade()))({"image": np.float32(table)}, {}, 0)
    assert report.metrics == {"top1": 1}
    assert report.texts[evaluation.name].startswith(f"{len(prepared.names('train'))} training examples, 3 classes")


def test_zero_shot_takes_them_and_their_names(prepared):
    data = whole.prepared(ZeroShot(), None, setting(prepared), "label", label="kind")
    assert data.classes == ("a", "b", "c d")
    built = ZeroShot(label="kind").build(setting(prepared, Tables()))
    assert callable(built)


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        (ZeroShot(label="sort"), "has no label in the column 'sort'; its columns are .*caption, kind, number, some"),
        (LinearProbe(label="some"), "the picture 07.png has no label in the column 'some'"),
        (ZeroShot(), "needs label, .* in its field data, or the name of a column of the experiment's in its field la"),
        (ZeroShot(label="kind", data=ImageText()), "has data of its own, so the column 'kind' that its field label"),
    ],
)
def test_mistakes(evaluation, said, prepared):
    with pytest.raises(UserError, match=said):
        evaluation.build(setting(prepared))


def test_data_without_columns():
    with pytest.raises(UserError, match="from the column 'kind' of the experiment's data, which is no ImageText"):
        ZeroShot(label="kind").build(setting(Pairs(4, range(4))))
