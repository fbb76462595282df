"""`jaxgen import` and `jaxgen export`: another project's model in, used as a run is, and out again."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxgen.cli.main import main
from jaxgen.data.scenes import Scenes
from jaxgen.data.transforms import CenterCrop, Resize
from jaxgen.errors import UserError
from jaxgen.experiment import Experiment, train
from jaxgen.interop.safetensors import Lazy, Tensors, write
from jaxgen.models.text import TextTower
from jaxgen.models.vit import ViT
from jaxgen.pretrained import Pretrained
from jaxgen.record import from_record, stored
from jaxgen.tasks.contrastive import Contrastive
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.leaves import named
from jaxgen.training.optimizers import AdamW

SCENES = Scenes(heldout=16)
GOLDEN = Path(__file__).parent.parent / "interop" / "golden"
TOKENIZER = str(GOLDEN / "tokenizer_siglip")


def jaxgen(*words) -> int:
    return main([str(word) for word in words])


def refused(capsys, *words) -> str:
    assert jaxgen(*words) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Model directories by name, made once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("imported") / name
            assert jaxgen("import", GOLDEN / name, made[name], "--tokenizer", TOKENIZER) == 0
        return made[name]

    return make


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "vit", "resnet18"])
def test_in_and_out_again(name, imported, tmp_path, capsys):
    assert jaxgen("export", imported(name), tmp_path / "out") == 0
    found, wanted = Tensors(tmp_path / "out"), Tensors(GOLDEN / name)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value.astype(found[key].dtype), err_msg=key)
    config, first = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", GOLDEN / name))
    assert config["architectures"] == first["architectures"]
    for part in ("text_config", "vision_config"):
        shared = config.get(part, {}).keys() & first.get(part, {}).keys() - {"bos_token_id", "eos_token_id",
                                                                            "pad_token_id"}  # fmt: skip
        assert {k: config[part][k] for k in shared} == {k: first[part][k] for k in shared}
    if "text_config" in config:
        assert config["text_config"]["eos_token_id"] == 1
        assert (tmp_path / "out" / "spiece.model").read_bytes() == Path(TOKENIZER, "spiece.model").read_bytes()


def test_what_the_directory_says(imported):
    record = stored(imported("siglip2")).experiment
    assert record["task"]["objective"] == "sigmoid" and record["task"]["mean"] == [0.5, 0.5, 0.5]
    assert (record["data"]["patches"], record["data"]["patch"], record["data"]["length"]) == (16, 8, 9)
    assert json.loads((imported("clip") / "run.json").read_text())["imported"]["format"] == "transformers CLIP"
    squeezed, cropped = (stored(imported(name)).experiment["data"]["fit"] for name in ("siglip", "clip"))
    assert squeezed[0]["mode"] == "exact" and cropped == []


def test_other_formats_of_numbers(imported, tmp_path):
    assert jaxgen("export", imported("vit"), tmp_path / "out", "--dtype", "bfloat16") == 0
    found = Tensors(tmp_path / "out")
    assert {str(v.dtype) for v in found.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    np.testing.assert_allclose(
        found["classifier.bias"].astype(np.float32), Tensors(GOLDEN / "vit")["classifier.bias"], rtol=1e-2
    )


def test_search_in_an_imported_model(imported, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("JAXGEN_CACHE", str(tmp_path / "cache"))
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    run = shutil.copytree(imported("clip"), tmp_path / "run")
    capsys.readouterr()
    assert jaxgen("search", run, "--images", tmp_path, "--query", "a red cat", "--json") == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 3 and len({r["similarity"] for r in results}) == 3


def test_without_a_tokenizer_no_text_is_read(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (30, 40)).save(tmp_path / "a.png")
    assert jaxgen("import", GOLDEN / "clip", tmp_path / "run", "--tokenizer", "none") == 0
    told = refused(capsys, "search", tmp_path / "run", "--images", tmp_path, "--query", "a red cat")
    assert "the model has no tokenizer" in told and "import it again with --tokenizer PATH" in told
    data = from_record(stored(tmp_path / "run").experiment["data"])
    with pytest.raises(UserError, match="the model has no tokenizer"):
        dataclasses.replace(data, path=str(tmp_path)).tokenizer.fit(())


def said_of_pictures(folder, **told) -> Path:
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def test_how_pictures_are_fitted(tmp_path):
    """As microsoft/resnet-50 and google/vit-base-patch16-224 say it, and in and out again."""
    resnet = said_of_pictures(shutil.copytree(GOLDEN / "resnet18", tmp_path / "resnet"), size=224, crop_pct=0.875,
                              resample=2, do_resize=True, feature_extractor_type="ConvNextFeatureExtractor")
    assert jaxgen("import", resnet, tmp_path / "m") == 0
    fit = (Resize(256, "shortest", "bilinear"), CenterCrop(224))
    data = from_record(stored(tmp_path / "m").experiment["data"])
    assert (data.size, data.fit) == (224, fit)
    assert jaxgen("export", tmp_path / "m", tmp_path / "out") == 0
    told = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (told["size"], told["crop_size"]["height"], told["resample"]) == ({"shortest_edge": 256}, 224, 2)
    assert jaxgen("import", tmp_path / "out", tmp_path / "again") == 0
    assert from_record(stored(tmp_path / "again").experiment["data"]).fit == fit
    vit = said_of_pictures(shutil.copytree(GOLDEN / "vit", tmp_path / "vit"), size=224, resample=2)
    assert jaxgen("import", vit, tmp_path / "v") == 0
    fitted = from_record(stored(tmp_path / "v").experiment["data"]).fit
    assert [(f.mode, f.filter) for f in fitted] == [("exact", "bilinear")]


def test_patches_are_cut_bilinearly(imported, tmp_path):
    for name, resample in (("siglip2", 2), ("siglip", 3)):
        assert jaxgen("export", imported(name), tmp_path / name) == 0
        assert json.loads((tmp_path / name / "preprocessor_config.json").read_text())["resample"] == resample


@pytest.mark.experiments
def test_a_tower_stands_in_another_experiment(imported, tmp_path):
    source = imported("clip")
    task = Contrastive(Pretrained(str(source), part="task.image"), TextTower(
        vocab_size=128, width=16, depth=1, heads=2, max_length=SCENES.length, out=20
    ))  # fmt: skip
    optimizer = AdamW(freeze=("^image/",))
    result = train(Experiment("lit", task, SCENES, optimizer, 8, 1), run_dir=tmp_path / "run")
    kept = Checkpoints(source / "checkpoints", read_only=True)
    target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in kept.contents("latest", "params/image").items()}
    assert target
    frozen = named(result.state.frozen["image"])
    wanted = Tensors(GOLDEN / "clip")
    np.testing.assert_array_equal(frozen["class_token"], wanted["vision_model.embeddings.class_embedding"])
    np.testing.assert_array_equal(frozen["final_norm/scale"], wanted["vision_model.post_layernorm.weight"])
    assert len(frozen) == len(target)


class Forgetful(Contrastive):
    """Keeps no state."""

    def init(self, key):
        return super().init(key)[0], {}


@pytest.mark.experiments
def test_a_tower_brings_its_batch_statistics(imported, tmp_path):
    """As another part than it was; locked, they stay what they were."""
    image = Pretrained(str(imported("resnet18")))
    text = TextTower(vocab_size=128, width=16, depth=1, heads=2, max_length=SCENES.length, out=5)
    wanted = Tensors(GOLDEN / "resnet18")

    def statistics(name, task):
        state = train(Experiment(name, task, SCENES, AdamW(), 8, 1), run_dir=tmp_path / name).state
        return state, state.state["image"]["batch_stats"]["stem_norm"]

    state, found = statistics("lit", Contrastive(image, text, locked=("image",)))
    np.testing.assert_array_equal(found["mean"], wanted["resnet.embedder.embedder.normalization.running_mean"])
    np.testing.assert_array_equal(found["var"], wanted["resnet.embedder.embedder.normalization.running_var"])
    assert jax.tree.leaves(state.params["image"]) == []
    _, moved = statistics("tuned", Contrastive(image, text))
    assert np.abs(moved["mean"] - found["mean"]).max() > 0
    again = Contrastive(Pretrained(str(tmp_path / "tuned"), part="task.image"), text, locked=("image",))
    state, found = statistics("again", again)
    np.testing.assert_array_equal(found["mean"], moved["mean"])
    locked = Contrastive(Pretrained(str(tmp_path / "again"), part="task.image"), text, locked=("image",))
    other, found = statistics("locked", locked)  # of a run in which the tower is no trained part
    np.testing.assert_array_equal(found["mean"], moved["mean"])
    jax.tree.map(np.testing.assert_array_equal, *map(jax.device_get, (other.frozen, state.frozen)))

    with pytest.raises(UserError, match="keeps state of task.model, such as batch statistics, and the task keeps none"):
        statistics("forgetful", Forgetful(image, text))
    assert not (tmp_path / "forgetful").exists()


def test_a_model_without_classes_gives_features(imported, tmp_path, capsys):
    """It is imported and measured, and not trained."""
    bare = shutil.copytree(GOLDEN / "resnet18", tmp_path / "bare")
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"architectures": ["ResNetModel"]}))
    tensors = {k.removeprefix("resnet."): v for k, v in Tensors(GOLDEN / "resnet18").items() if "resnet." in k}
    write(bare, {name: Lazy(v.shape, v.dtype, lambda v=v: v) for name, v in tensors.items()})
    assert jaxgen("import", bare, tmp_path / "model") == 0
    experiment = from_record(stored(tmp_path / "model").experiment)
    assert experiment.task.model.out == 0 and experiment.evaluations == ()
    with pytest.raises(UserError, match="task.model.out is 0, which should be the number of classes"):
        train(experiment, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mistakes_of_import(tmp_path, capsys):
    assert "needs the folder of the model and the directory to make" in refused(capsys, "import", GOLDEN / "clip")
    told = refused(capsys, "import", GOLDEN / "clip", tmp_path / "m")
    assert "has no tokenizer (tokenizer.json, spiece.model" in told and "--tokenizer PATH" in told
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "exists already" in refused(capsys, "import", GOLDEN / "vit", tmp_path / "full")
    assert "is no folder with a model" in refused(capsys, "import", tmp_path / "nowhere", tmp_path / "m")
    broken = shutil.copytree(GOLDEN / "siglip", tmp_path / "broken")
    sorted(broken.glob("*.safetensors"))[0].unlink()
    assert "which is missing" in refused(capsys, "import", broken, tmp_path / "m", "--tokenizer", "none")
    small = shutil.copytree(GOLDEN / "clip", tmp_path / "small")
    config = json.loads((small / "config.json").read_text())
    config["text_config"]["vocab_size"] = 40
    (small / "config.json").write_text(json.dumps(config))
    told = refused(capsys, "import", small, tmp_path / "m", "--tokenizer", TOKENIZER)
    assert "has 49 entries, and the model knows 40" in told or "and the model knows 40" in told
    told = refused(capsys, "import", small, tmp_path / "m", "--tokenizer", "none")
    assert "text_model.embeddings.token_embedding.weight has the shape (64, 16), and (40, 16) is wanted" in told
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m.*"))   # nothing is left behind


def test_mistakes_of_export(imported, tmp_path, capsys):
    assert "needs a run and the folder to write" in refused(capsys, "export", imported("vit"))
    assert "exists already" in refused(capsys, "export", imported("vit"), imported("clip"))
    told = refused(capsys, "export", imported("vit"), tmp_path / "out", "--format", "open_clip")
    assert "a ViT cannot be written in the form of open_clip" in told
    told = refused(capsys, "export", imported("timm_vit_mean"), tmp_path / "out")
    assert "cannot be written as transformers ViT" in told and "pool is 'mean' and would be 'class'" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.experiments
def test_a_run_of_our_own_goes_out(tmp_path, capsys):
    image = ViT(patch=8, width=16, depth=1, heads=2, out=8, image_size=32, pre_norm=True, patch_bias=False,
                head_bias=False, norm_epsilon=1e-5)  # fmt: skip
    text = TextTower(vocab_size=128, width=16, depth=1, heads=2, max_length=SCENES.length, out=8)
    train(Experiment("own", Contrastive(image, text), SCENES, AdamW(), 8, 1), run_dir=tmp_path / "run")
    assert jaxgen("export", tmp_path / "run", tmp_path / "out") == 0
    assert "its tokenizer (words) has no form there" in capsys.readouterr().out
    assert jaxgen("import", tmp_path / "out", tmp_path / "again", "--tokenizer", "none") == 0
    first, again = (Checkpoints(tmp_path / name / "checkpoints", read_only=True) for name in ("run", "again"))
    target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in first.contents("latest", "params").items()}
    assert again.contents("latest", "params").keys() == target.keys()
    assert stored(tmp_path / "again").experiment["task"]["text"] == stored(tmp_path / "run").experiment["task"]["text"]
