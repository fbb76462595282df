"""Tokenizers of other projects: the ids that transformers gives, in `tests/interop/golden`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxgen.data import huggingface
from jaxgen.data.captions import encode_captions
from jaxgen.data.huggingface import CaptionTokenizer, Existing, read
from jaxgen.data.tokenizers import load
from jaxgen.errors import UserError

GOLDEN = Path(__file__).parent.parent / "interop" / "golden"


@pytest.fixture(params=["clip", "siglip", "siglip2"])
def golden(request):
    if request.param != "siglip":
        pytest.importorskip("tokenizers")
    folder = GOLDEN / f"tokenizer_{request.param}"
    return folder, json.loads((folder / "ids.json").read_text())


def test_the_ids_of_transformers(golden):
    folder, told = golden
    tokenizer = read(folder)
    assert (tokenizer.vocab_size, tokenizer.eos) == (told["vocab_size"], told["eos"])
    for text, ids in zip(told["texts"], told["ids"], strict=True):
        assert [*tokenizer.encode(text).tolist(), told["eos"]][: len(ids)] == ids, text
        assert told["eos"] not in tokenizer.encode(text)


def test_rows_of_captions(golden):
    folder, told = golden
    tokens, lengths = encode_captions(read(folder), told["texts"], 16)
    for row, n, ids in zip(tokens, lengths, told["ids"], strict=True):
        ids = [i for i in ids if i != told["eos"]][:15] + [told["eos"]]
        assert n == len(ids)
        assert row.tolist() == ids + [told["padding"]] * (16 - len(ids))


def test_saved_and_loaded(golden, tmp_path):
    folder, told = golden
    tokenizer = read(folder)
    tokenizer.save(tmp_path)
    again = load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.padding == tokenizer.padding
    for text in told["texts"]:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_an_experiment_names_it(golden):
    folder, told = golden
    config = Existing(str(folder), told["vocab_size"])
    assert not config.trained
    assert config.fit().encode("a cat").tolist() == read(folder).encode("a cat").tolist()
    with pytest.raises(UserError, match=rf"has {told['vocab_size']} entries, but tokenizer.vocab_size is 7"):
        Existing(str(folder), 7).fit()


def test_siglip_cleans_up():
    tokenizer = read(GOLDEN / "tokenizer_siglip")
    assert isinstance(tokenizer, CaptionTokenizer) and tokenizer.lower and tokenizer.plain
    same = tokenizer.encode("a red cat's")
    for text in ("A Red CAT's", "  a   red\ncats ", "a, red: (cats)!"):
        np.testing.assert_array_equal(tokenizer.encode(text), same)
    assert tokenizer.decode(same) == "a red cats"


def test_open_clip_says_what_is_cleaned(tmp_path):
    """Whatever class transformers knows the tokenizer as; the model's folder may be another."""
    folder, model = tmp_path / "tokenizer", tmp_path / "model"
    shutil.copytree(GOLDEN / "tokenizer_siglip", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "eos_token": "</s>"}')
    assert not isinstance(read(folder), CaptionTokenizer)
    model.mkdir()

    def cleaned(clean, folder):
        told = {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": clean}}}}
        (folder / "open_clip_config.json").write_text(json.dumps(told))

    cleaned("canonicalize", model)
    tokenizer = read(folder, model)
    assert tokenizer.lower and tokenizer.plain
    for text in ("A Red_CAT.", " a  red cat"):
        np.testing.assert_array_equal(tokenizer.encode(text), tokenizer.inner.encode("a red cat"))
    tokenizer.save(tmp_path / "saved")
    assert load(tmp_path / "saved") == tokenizer
    cleaned("lower", folder)
    tokenizer = read(folder, model)
    assert tokenizer.lower and not tokenizer.plain and not tokenizer.apart


def test_padding_goes_when_the_file_asks_for_it(tmp_path):
    """A file may say that rows are padded and cut: here rows are made elsewhere."""
    pytest.importorskip("tokenizers")
    shutil.copytree(GOLDEN / "tokenizer_clip", tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    told = json.loads(file.read_text())
    told["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    told["padding"] = {"strategy": {"Fixed": 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                       "pad_type_id": 0, "pad_token": "!"}  # fmt: skip
    file.write_text(json.dumps(told))
    np.testing.assert_array_equal(read(file).encode("a photo"), read(GOLDEN / "tokenizer_clip").encode("a photo"))


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(UserError, match="no tokenizer at .*: it has none of tokenizer.json, spiece.model"):
        read(tmp_path)
    with pytest.raises(UserError, match="no tokenizer at .*nowhere$"):
        read(tmp_path / "nowhere")
    (tmp_path / "spiece.model").write_bytes(b"no")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        read(tmp_path)
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        read(tmp_path)
    shutil.copy(GOLDEN / "tokenizer_clip" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftxt|>"}')
    with pytest.raises(UserError, match=r"no token that ends a text \('<\|endoftxt\|>'\); did you mean"):
        read(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer_config.json cannot be read"):
        read(tmp_path)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    huggingface._parsed.cache_clear()
    with pytest.raises(UserError, match=r"needs the package 'tokenizers': pip install 'jaxgen\[hf\]'"):
        read(GOLDEN / "tokenizer_clip")
