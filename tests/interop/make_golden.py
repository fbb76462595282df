"""Makes the golden files of `tests/interop/golden`: tiny models with random weights of the projects whose weights are
imported, and what those projects compute with them. Run by hand, where torch, transformers, timm and open_clip are:

    python tests/interop/make_golden.py                  # all; or some, by name
    python tests/interop/make_golden.py --check clip DIR # DIR is `jaxgen import golden/clip M; jaxgen export M DIR`

Each folder is as the project itself saves a model, with `io.npz` beside: inputs (`image` uint8, (B, H, W, C)) and
the outputs in float32. Models that would be large have no weights stored, but `drawn.json`, by which they are drawn
again.
"""

import functools
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from drawn import draw
from safetensors.torch import save_file

HERE = Path(__file__).parent / "golden"
VISION = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, patch_size=8)
TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            max_position_embeddings=9, bos_token_id=38, eos_token_id=39, pad_token_id=39)  # fmt: skip


def without_torchvision() -> None:
    """timm and open_clip name torchvision at import, for pictures and frozen norms that are not used here."""
    import transformers  # noqa: F401   (which looks whether it is there, before it seems so)

    class Anything(types.ModuleType):
        __path__: list = []

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Value(name, (torch.nn.Module,), {})

    class Value(type):
        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return name

    names = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".transforms.v2", ".datasets",
             ".models", ".models.feature_extraction", ".utils")  # fmt: skip
    for name in names:
        module = sys.modules[f"torchvision{name}"] = Anything(f"torchvision{name}")
        if name:
            above, _, last = module.__name__.rpartition(".")
            setattr(sys.modules[above], last, module)


def randomise(model: torch.nn.Module, dtype=torch.float32) -> torch.nn.Module:
    """Weights of `drawn.draw`, rounded to the format that they are stored in."""
    kept = model.state_dict()   # masks and the like are buffers too, and are not stored
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if p.is_floating_point() and name in kept:
            with torch.no_grad():
                p.copy_(torch.from_numpy(draw(name, tuple(p.shape))).to(dtype))
    return model.eval()


def arrays(**tensors) -> dict[str, np.ndarray]:
    return {k: v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in tensors.items()}


def picture(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def nchw(image: torch.Tensor) -> torch.Tensor:
    """As the models here want it: with the mean 0.5 and standard deviation 0.5 of every channel."""
    return normal(image).permute(0, 3, 1, 2)


def normal(image: torch.Tensor) -> torch.Tensor:
    return (image.float() / 255 - 0.5) / 0.5


def captions(eos: int, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, one eos, and padding by eos; and how many of them are real."""
    lengths = torch.tensor([length, 5, 2])
    tokens = torch.randint(0, 37, (3, length), generator=torch.Generator().manual_seed(2))
    for row, n in enumerate(lengths):
        tokens[row, n - 1 :] = eos
    return tokens, lengths


# Each is (what saves it, what runs it): `run(model) -> arrays`.


def clip(model):
    image, (tokens, lengths) = picture(3, 24, 24, 3), captions(39)
    out = model(input_ids=tokens, pixel_values=nchw(image))
    return arrays(image=image, tokens=tokens, lengths=lengths, image_embeds=out.image_embeds,
                  text_embeds=out.text_embeds, logits=out.logits_per_image)  # fmt: skip


def siglip2(model):
    """Three pictures of 3 x 4, 5 x 2 and 2 x 2 patches, padded to 12."""
    shapes = torch.tensor([[3, 4], [5, 2], [2, 2]])
    patches = picture(3, 12, 192)
    mask = torch.arange(12)[None] < shapes.prod(-1)[:, None]
    places = np.zeros((3, 12, 2), np.int64)
    for i, (rows, columns) in enumerate(shapes.tolist()):
        places[i, : rows * columns] = np.stack(np.divmod(np.arange(rows * columns), columns), -1)
    tokens, lengths = captions(39)
    out = model(input_ids=tokens, pixel_values=normal(patches), pixel_attention_mask=mask.int(), spatial_shapes=shapes)
    return arrays(patches=patches, coordinates=places, patch_mask=mask, tokens=tokens, lengths=lengths,
                  image_embeds=out.image_embeds, text_embeds=out.text_embeds, logits=out.logits_per_image)  # fmt: skip


def classifier(model, size=32):
    image = picture(2, size, size, 3)
    out = model(nchw(image))
    return arrays(image=image, logits=getattr(out, "logits", out))


def open_clip_run(model):
    """Its padding is 0: what comes after the first and largest id, eos, is not seen by what is before it."""
    image, (tokens, lengths) = picture(3, 24, 24, 3), captions(39)
    inside = torch.arange(tokens.shape[1])[None] < lengths[:, None]
    tokens = torch.where(inside, tokens, 0)
    images, texts = model.encode_image(nchw(image), normalize=True), model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp() * images @ texts.T
    if model.logit_bias is not None:
        logits = logits + model.logit_bias
    return arrays(image=image, tokens=tokens, lengths=lengths, image_embeds=images, text_embeds=texts,
                  logits=logits)  # fmt: skip


def transformers_models() -> dict:
    import transformers as t

    def named(architecture, config, run, dtype=torch.float32, **save):
        return lambda: (randomise(getattr(t, architecture)(config), dtype or torch.float32), run, dtype, save)

    pair = dict(text_config=TEXT, vision_config={**VISION, "image_size": 24})
    labels = dict(num_labels=5)
    nets = dict(embedding_size=8, hidden_sizes=[16, 32, 64, 128], num_labels=5)
    return {
        "clip": named("CLIPModel", t.CLIPConfig(
            text_config={**TEXT, "projection_dim": 20}, vision_config={**pair["vision_config"], "projection_dim": 20},
            projection_dim=20), clip),
        "siglip": named("SiglipModel", t.SiglipConfig(
            text_config={**TEXT, "projection_size": 24}, vision_config=pair["vision_config"]), clip,
            torch.bfloat16, max_shard_size="40KB"),
        "siglip2": named("Siglip2Model", t.Siglip2Config(
            text_config={**TEXT, "projection_size": 24}, vision_config={**VISION, "num_patches": 16}), siglip2),
        "vit": named("ViTForImageClassification", t.ViTConfig(**VISION, image_size=32, **labels), classifier),
        "resnet18": named("ResNetForImageClassification", t.ResNetConfig(
            **{**nets, "embedding_size": 4, "hidden_sizes": [4, 8, 16, 32]}, depths=[2, 2, 2, 2], layer_type="basic"),
            lambda m: classifier(m, 64)),
        "resnet50": named("ResNetForImageClassification", t.ResNetConfig(
            **{**nets, "embedding_size": 4}, depths=[3, 4, 6, 3]), lambda m: classifier(m, 64), torch.bfloat16),
        "bit50": named("BitForImageClassification", t.BitConfig(
            **{**nets, "embedding_size": 32, "hidden_sizes": [128, 256, 512, 1024]}, depths=[3, 4, 6, 3]),
            lambda m: classifier(m, 64), None),
    }  # fmt: skip


def save_transformers(name: str, made) -> None:
    model, run, dtype, save = made()
    folder = HERE / name
    if dtype is None:
        save_drawn(folder, model)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
    else:
        model.to(dtype).save_pretrained(folder, **save)
        model.float()
    write_io(folder, run(model))


def save_drawn(folder: Path, model: torch.nn.Module) -> None:
    """Names, shapes and formats of weights that are drawn again."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {k: [list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in model.state_dict().items()}
    (folder / "drawn.json").write_text(json.dumps(told))


def write_io(folder: Path, values: dict[str, np.ndarray]) -> None:
    np.savez_compressed(folder / "io.npz", **{k: v.astype(np.float32) if v.dtype == np.float64 else
                                              v.astype(np.int32) if v.dtype == np.int64 else v
                                              for k, v in values.items()})  # fmt: skip
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{folder.name}: {size / 1000:.0f} kB, outputs {[v.shape for v in values.values()]}")


TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2, num_classes=5)
TIMM = {   # name: (model, arguments beside)
    "timm_vit": ("vit_tiny_patch16_224", TINY),
    "timm_vit_mean": ("vit_tiny_patch16_224", {**TINY, "global_pool": "avg", "class_token": False}),
    "timm_resnet18": ("resnet18", dict(num_classes=5)),
    "timm_resnet50": ("resnet50", dict(num_classes=5)),
    "timm_bit": ("resnetv2_50x1_bit", dict(num_classes=5, channels=(128, 256, 512, 1024), stem_chs=32)),
}
TOWER = dict(layers=2, width=24, head_width=8, patch_size=8, mlp_ratio=2.0)
WORDS = dict(context_length=9, vocab_size=64, width=16, heads=2, layers=2, mlp_ratio=2.0)
OPEN_CLIP = {
    "open_clip": dict(embed_dim=20, vision_cfg=dict(image_size=24, **TOWER), text_cfg=WORDS),
    "open_clip_siglip": dict(
        embed_dim=24, init_logit_bias=-10, custom_text=True,
        vision_cfg=dict(image_size=24, timm_model_name="vit_tiny_patch16_siglip_golden", timm_model_pretrained=False,
                        timm_pool="map", timm_proj="none"),
        text_cfg=dict(**WORDS, no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs={"eps": 1e-6},
                      act_kwargs={"approximate": "tanh"})),
}  # fmt: skip


def timm_model(name: str) -> torch.nn.Module:
    without_torchvision()
    import timm

    architecture, arguments = TIMM[name]
    return timm.create_model(architecture, **arguments)


def save_timm(name: str) -> None:
    model = randomise(timm_model(name))
    architecture, arguments = TIMM[name]
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    if "vit" in name:
        save_file(model.state_dict(), folder / "model.safetensors")
    else:
        save_drawn(folder, model)
    config = {"architecture": architecture, "num_classes": 5, "num_features": model.num_features,
              "global_pool": arguments.get("global_pool", "token" if "vit" in architecture else "avg"),
              "model_args": arguments, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3,
                                                          "input_size": [3, 32, 32], "num_classes": 5}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if name != "timm_resnet50":   # for its names
        write_io(folder, classifier(model, 32 if "vit" in name else 64))


def open_clip_model(config: dict) -> torch.nn.Module:
    without_torchvision()
    import open_clip.model as m
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    @register_model
    def vit_tiny_patch16_siglip_golden(pretrained=False, **kwargs):
        kwargs = {k: v for k, v in kwargs.items() if k in ("img_size", "num_classes", "global_pool")}
        act = functools.partial(torch.nn.GELU, approximate="tanh")
        tiny = {**TINY, "img_size": 24, "class_token": False, "act_layer": act}
        return VisionTransformer(**{**tiny, **kwargs})

    config = dict(config)
    kind = m.CustomTextCLIP if config.pop("custom_text", False) else m.CLIP
    return kind(**config)


def save_open_clip(name: str) -> None:
    model = randomise(open_clip_model(OPEN_CLIP[name]))
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    config = {"model_cfg": OPEN_CLIP[name], "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    write_io(folder, open_clip_run(model))


TEXTS = ["a photo of a cat", "Two  red CUBES, one blue ball!", "caf\u00e9 \u4e2d <b>", "", "un-known'd ZZZ 42"]


def save_tokenizers() -> None:
    """Small tokenizers of CLIP, SigLIP and SigLIP 2, and the ids that they make of some texts."""
    import io

    import sentencepiece
    import transformers as t
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("p", "h"), ("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>"), ("o", "f</w>")]
    words = [*letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    clip = t.CLIPTokenizer({w: i for i, w in enumerate(words)}, merges)
    model = io.BytesIO()
    text = [x.lower() for x in TEXTS if x] + ["the quick brown fox jumps over a lazy dog"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20),
        model_writer=model, vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=3)
    (HERE / "tokenizer_siglip").mkdir(parents=True, exist_ok=True)
    (HERE / "tokenizer_siglip" / "spiece.model").write_bytes(model.getvalue())
    siglip = t.SiglipTokenizer(str(HERE / "tokenizer_siglip" / "spiece.model"))
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581",
              *"abcdefghijklmnopqrstuvwxyz'!,-", "ca", "cat", "\u2581a", "\u2581cat"]
    siglip2 = t.Siglip2Tokenizer({w: i for i, w in enumerate(pieces)},
                                 [("c", "a"), ("ca", "t"), ("\u2581", "a"), ("\u2581", "cat")])
    for name, tokenizer in (("clip", clip), ("siglip", siglip), ("siglip2", siglip2)):
        folder = HERE / f"tokenizer_{name}"
        tokenizer.save_pretrained(folder)
        ids = [tokenizer(text).input_ids for text in TEXTS]
        told = {"texts": TEXTS, "ids": ids, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id,
                "vocab_size": len(tokenizer)}
        (folder / "ids.json").write_text(json.dumps(told))
        print(folder.name, [f.name for f in folder.iterdir()], ids[:2])


def check(name: str, folder: Path) -> None:
    """What `jaxgen export` wrote, loaded and run by the reference, against what it gave at first."""
    wanted = dict(np.load(HERE / name / "io.npz"))
    if name in OPEN_CLIP:
        from safetensors.torch import load_file

        model = open_clip_model(json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]).eval()
        told = model.load_state_dict(load_file(folder / "open_clip_model.safetensors"), strict=True)
        found = open_clip_run(model)
    else:
        import transformers as t

        run = transformers_models()[name]()[1]
        (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
        more = {}
        if name == "clip":   # without a tokenizer, `jaxgen export` takes the last id for the end of text
            more["config"] = t.AutoConfig.from_pretrained(folder)
            more["config"].text_config.eos_token_id = 39
        model, told = getattr(t, architecture).from_pretrained(folder, output_loading_info=True, **more)
        assert not any(told.values()), told
        found = run(model.eval())
    for key in ("image_embeds", "text_embeds", "logits"):
        if key in wanted:
            print(f"{name} {key}: {np.abs(found[key] - wanted[key]).max() / np.abs(wanted[key]).max():.1e}")


def main(names: list[str]) -> None:
    if names and names[0] == "--check":
        check(names[1], Path(names[2]))
        return
    if not names or "tokenizers" in names:
        save_tokenizers()
        names = [name for name in names if name != "tokenizers"]
        if not names and len(sys.argv) > 1:
            return
    made = transformers_models()
    for name in names or [*made, *TIMM, *OPEN_CLIP]:
        if name in made:
            save_transformers(name, made[name])
        elif name in TIMM:
            save_timm(name)
        else:
            save_open_clip(name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
