"""`jaxgen search`, and `jaxgen eval`, with a small run that has learned four colours."""

import dataclasses
import json
import os
import shutil
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxgen.cli import search
from jaxgen.cli.main import main
from jaxgen.data.imagetext import View
from jaxgen.data.scenes import Scenes

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (20, 40, 230), "yellow": (230, 220, 30)}

FILE = textwrap.dedent("""
    from jaxgen.data.imagetext import ImageText
    from jaxgen.data.tokenizers import Characters
    from jaxgen.evaluation.retrieval import Retrieval
    from jaxgen.experiment import Experiment
    from jaxgen.models.text import TextTower
    from jaxgen.models.vit import ViT
    from jaxgen.tasks.contrastive import Contrastive
    from jaxgen.training.checkpoint import Checkpointing
    from jaxgen.training.optimizers import AdamW

    experiment = Experiment(
        "colours",
        Contrastive(
            ViT(patch=8, image_size=16, width=16, depth=1, heads=2, out=8),
            TextTower(vocab_size=32, width=16, depth=1, heads=2, max_length=8, out=8),
        ),
        ImageText(path=PATH, tokenizer=Characters(), size=16, length=8, heldout_by="tail", heldout=0.25),
        AdamW(1e-2), batch_size=8, steps=40, evaluations=(Retrieval(shown=2),), checkpoint=Checkpointing(every=40),
    )
""")


def picture(colour, seed):
    noise = np.random.default_rng(seed).integers(-20, 21, (16, 16, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an experiment's run, and its cache."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "pairs").mkdir()
    for n in range(32):
        name = list(COLOURS)[n % 4]
        Image.fromarray(picture(COLOURS[name], n)).save(folder / "pairs" / f"{n:02d}.png")
        (folder / "pairs" / f"{n:02d}.txt").write_text(name)
    (folder / "colours.py").write_text(FILE.replace("PATH", repr(str(folder / "pairs"))))
    before = {name: os.environ.get(name) for name in ("JAXGEN_CACHE",)}
    here = os.getcwd()
    os.environ["JAXGEN_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    try:
        assert main(["train", "colours.py"]) == 0
    finally:
        os.chdir(here)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """The run, without the pictures that it was trained on, in a folder of its own, beside pictures to search."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "BATCH", 8)
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for n, (name, colour) in enumerate(COLOURS.items()):
        Image.fromarray(picture(colour, 100 + n)).save(tmp_path / "photos" / f"{name}.jpg", quality=95)
        Image.fromarray(picture(colour, 200 + n)).resize((40, 24)).save(tmp_path / "photos" / "deep" / f"{name}.PNG")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path


def told(capsys, *options):
    assert main(["search", "colours", "--images", "photos", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_search(run, capsys):
    for name in COLOURS:
        found = told(capsys, "--query", name)
        assert {r["file"] for r in found["results"][:2]} == {f"photos/{name}.jpg", f"photos/deep/{name}.PNG"}
        similarities = [r["similarity"] for r in found["results"]]
        assert similarities == sorted(similarities, reverse=True) and -1 <= similarities[-1] < similarities[0] <= 1
        assert found["pictures"] == len(found["results"]) == 8 and found["skipped"] == [] and found["step"] == 40


def test_what_of_the_query_was_not_read(run, capsys):
    assert "query_unread" not in told(capsys, "--query", "red")
    assert told(capsys, "--query", "redz")["query_unread"] == "1 of 4 tokens were never learned"
    assert told(capsys, "--query", "red " * 40)["query_unread"].endswith("tokens is cut off")
    assert main(["search", "colours", "--images", "photos", "--query", "zzz"]) == 2
    assert "the run has learned nothing of the query 'zzz'" in capsys.readouterr().err


def test_a_run_beside_a_folder_of_its_name(run, capsys):
    (run / "colours").mkdir()
    assert told(capsys, "--query", "red")["run"] == "runs/colours"


def test_what_is_printed(run, capsys):
    assert main(["search", "colours", "--images", "photos", "--query", " blue ", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "runs/colours, step 40, raw weights: 'blue' among 8 pictures"
    assert lines[2].split() == ["similarity", "file"] and [line.split()[0] for line in lines[3:6]] == ["1", "2", "3"]
    assert {line.split()[2] for line in lines[3:5]} == {"photos/blue.jpg", "photos/deep/blue.PNG"}
    assert lines[6:] == ["", "runs/colours/search/blue.png"]
    sheet = np.asarray(Image.open("runs/colours/search/blue.png"))
    assert sheet.shape[1] > sheet.shape[0]   # three pictures beside one another
    middle = sheet[search.SIDE // 2, [search.SIDE // 2, search.SIDE * 3 // 2]]
    assert (np.abs(middle.astype(int) - COLOURS["blue"]) < 40).all()


def test_sheet_in_a_place_of_its_own(run, capsys):
    found = told(capsys, "--query", "red", "--sheet", "here.png", "--top", "1")
    assert found["sheet"] == "here.png" and Image.open("here.png").width == search.SIDE + 12
    assert not os.path.exists("runs/colours/search")


def test_pictures_that_cannot_be_read(run, capsys):
    content = (run / "photos" / "red.jpg").read_bytes()
    (run / "photos" / "cut.jpg").write_bytes(content[: len(content) // 2])
    (run / "photos" / "empty.png").touch()
    (run / "photos" / "page.webp").write_text("<html>")
    found = told(capsys, "--query", "red")
    assert {s["file"]: s["reason"].split()[0] for s in found["skipped"]} == {
        "photos/cut.jpg": "it", "photos/empty.png": "the", "photos/page.webp": "it"}
    assert found["pictures"] == 8
    assert main(["search", "colours", "--images", "photos", "--query", "red"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("3 of 11 pictures cannot be read: photos/cut.jpg (it is damaged")
    assert "photos/empty.png (the file is empty)" in said
    for name in (*(f"{c}.jpg" for c in COLOURS), *(f"deep/{c}.PNG" for c in COLOURS)):
        (run / "photos" / name).unlink()
    assert main(["search", "colours", "--images", "photos", "--query", "red"]) == 2
    assert "none of the 3 pictures in photos can be read: photos/cut.jpg" in capsys.readouterr().err


def test_a_picture_that_has_gone_leaves_a_blank_cell(run, capsys, monkeypatch):
    """Between its embedding and the contact sheet; another has been written over."""
    drawn = search._draw

    def later(ranked, *rest):
        ranked[0][0].unlink()
        ranked[1][0].write_text("no picture")
        return drawn(ranked, *rest)

    monkeypatch.setattr(search, "_draw", later)
    found = told(capsys, "--query", "red", "--top", "3")
    sheet = np.asarray(Image.open(found["sheet"]))
    middles = sheet[search.SIDE // 2, [search.SIDE // 2, search.SIDE * 3 // 2, search.SIDE * 5 // 2]].astype(int)
    assert (middles[:2] > 200).all() and (middles[2] < 200).any() and len(found["results"]) == 3


def test_the_sheet_shows_pictures_as_the_model_sees_them(run):
    """Of the data's own background, and of as many pixels as it allows."""
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save("clear.png")
    Image.new("RGB", (50, 50), (200, 0, 0)).save("large.png")
    ranked = [(Path("clear.png"), 0.5), (Path("large.png"), 0.4)]
    for view, middle, second in ((View(16, background=(0, 0, 255), max_pixels=2000), (0, 0, 255), (255, 255, 255)),
                                 (None, (255, 255, 255), (200, 0, 0))):
        place = search._draw(ranked, "both.png", Path("no.png"), view)
        sheet = np.asarray(Image.open(place))
        assert tuple(sheet[search.SIDE // 2, search.SIDE // 2]) == middle
        assert tuple(sheet[30, search.SIDE * 3 // 2]) == second


def test_embeddings_are_kept_by_content(run, capsys, monkeypatch):
    read, reading = [], search.reading

    def counted(data):
        example, *rest = reading(data)
        return lambda content: read.append(content) or example(content), *rest

    monkeypatch.setattr(search, "reading", counted)
    first = told(capsys, "--query", "green")
    assert len(read) == 8
    os.rename(run / "photos" / "green.jpg", run / "photos" / "renamed.jpg")
    Image.fromarray(picture(COLOURS["green"], 999)).save(run / "photos" / "blue.jpg")   # another picture
    again = told(capsys, "--query", "green")
    assert len(read) == 9
    assert "photos/renamed.jpg" in [r["file"] for r in again["results"][:3]]
    values = {r["file"]: r["similarity"] for r in first["results"]}
    for result in again["results"]:
        if result["file"] in values and result["file"] != "photos/blue.jpg":
            assert result["similarity"] == pytest.approx(values[result["file"]], abs=1e-6)

    (file,) = (run / "cache" / "embeddings").glob("*.npz")
    file.write_bytes(file.read_bytes()[:100])   # damaged: made anew
    assert told(capsys, "--query", "green")["results"] == again["results"] and len(read) == 17
    told(capsys, "--query", "green", "--devices", "8")
    assert len(read) == 17


def test_another_checkpoint_has_embeddings_of_its_own(run, capsys, monkeypatch):
    from jaxgen.cli.opened import open_run
    from jaxgen.cli.search import _cache_key, parser

    def key(*options):
        arguments = parser().parse(["colours", *options])
        return _cache_key(open_run(arguments, "search"), arguments.weights)

    def of_data(data):
        opened = open_run(parser().parse(["colours"]), "search")
        experiment = dataclasses.replace(opened.experiment, data=data)
        return _cache_key(dataclasses.replace(opened, experiment=experiment), "ema")

    assert len({of_data(Scenes(size=32)), of_data(Scenes(size=64)), key()}) == 3   # data that has no `view`
    assert key() == key("--step", "40") == key("--step", "latest")
    assert len({key(), key("--weights", "raw")}) == 2


def test_a_folder_that_cannot_be_written(run, capsys):
    """The sheet's default place is no reason to fail; a named one is."""
    (run / "runs" / "colours" / "search").write_text("in the way")
    assert main(["search", "colours", "--images", "photos", "--query", "red"]) == 0
    printed = capsys.readouterr()
    assert "no contact sheet" in printed.err and "photos/red.jpg" in printed.out
    (run / "sheet.png").mkdir()
    assert main(["search", "colours", "--images", "photos", "--query", "red", "--sheet", "sheet.png"]) == 2
    assert "the contact sheet sheet.png cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "jaxgen search needs a run directory"),
        (["r", "--images", "."], 'jaxgen search needs what to look for: --query "a black cat"'),
        (["r", "--images", ".", "--query", " "], "jaxgen search needs what to look for"),
        (["r", "--query", "x"], "jaxgen search needs a folder of pictures: --images DIR"),
        (["r", "--query", "x", "--images", "no"], "--images is no, which is no folder"),
        (["r", "--query", "x", "--images", "file"], "--images is file, which is a file, not a folder of pictures"),
        (["r", "--query", "x", "--images", "empty"], "there are no pictures in empty (files that end in .png, .jpg"),
        (["r", "--query", "x", "--images", ".", "--top", "0"], "--top is 0, which should be at least 1"),
        (["r", "--query", "x", "--images", ".", "--sheet", "no/x"], "--sheet is no/x, and there is no folder no"),
        (["r", "--query", "x", "--images", "full"], "there is no run directory r"),
        (["r", "--qeury", "x"], "there is no option --qeury; did you mean '--query'?"),
    ],
)
def test_mistakes(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a.png").touch()
    (tmp_path / "file").touch()
    assert main(["search", *options]) == 2
    assert capsys.readouterr().err.startswith(f"jaxgen: {said}")


def test_a_run_that_is_not_contrastive(run, capsys, monkeypatch):
    from jaxgen.tasks.language import LanguageModel

    opened = SimpleNamespace(directory="runs/text", experiment=SimpleNamespace(task=LanguageModel()))
    monkeypatch.setattr("jaxgen.cli.opened.open_run", lambda *_: opened)
    assert main(["search", "text", "--images", "photos", "--query", "red"]) == 2
    assert capsys.readouterr().err == (
        "jaxgen: runs/text is a run of a LanguageModel: only contrastive runs can search\n"
    )


# eval


def test_eval_prints_a_table_and_writes_json_and_pictures(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    monkeypatch.setenv("JAXGEN_CACHE", str(trained / "cache"))
    assert main(["eval", "colours"]) == 0
    shown = capsys.readouterr().out
    assert "eval/retrieval/image_to_text/recall@1" in shown and "among 8" in shown and "chance" in shown
    written = json.loads((trained / "runs/colours/eval/00000040-raw.json").read_text())
    metrics = written["metrics"]
    assert metrics["eval/retrieval/text_to_image/recall@1"] == 1 and written["step"] == 40
    assert "runs/colours/eval/00000040-raw.json" in shown
    picture = Image.open(trained / "runs/colours/eval/00000040-raw-retrieval.png")
    assert picture.format == "PNG" and picture.width == 6 * (96 + 12)   # a query and its five nearest
    assert written["images"] == {"retrieval": "runs/colours/eval/00000040-raw-retrieval.png"}
    assert main(["eval", "colours", "--evaluations.0.among", "4", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["overrides"] == ["--evaluations.0.among", "4"] and "among 4" in other["texts"]["retrieval"]
    assert json.loads((trained / "runs/colours/eval/00000040-raw.json").read_text()) == written   # is not overwritten
