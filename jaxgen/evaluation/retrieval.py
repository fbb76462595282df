"""Retrieval: which caption belongs to a picture, and which picture to a caption."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from jaxgen.data.sheets import sheet, unpatch
from jaxgen.errors import UserError
from jaxgen.evaluation import whole
from jaxgen.evaluation.base import Evaluation, Report, Setting
from jaxgen.sharding import Sharding

CHUNK = 4096
"""Queries, and candidates, whose similarities are held at a time."""
KS = (1, 5, 10)

Ranks = tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q"], Int[np.ndarray, "Q"]]
"""Of each query: wrong candidates above the best right one, and wrong and right candidates level with it. All are
0 where a right one's similarity is not a number."""


@dataclasses.dataclass(frozen=True)
class Retrieval(Evaluation):
    """Recall at 1, 5 and 10 over held-out pairs, both ways: how often a right answer is among the nearest k.

    Pairs with equal captions (equal tokens) are answers to each other's queries. Ties in similarity with wrong answers
    are broken by chance: the recall is the mean over all ways, so that a model that tells nothing apart scores chance,
    which the report's text gives beside the recall. Its picture shows queries with their nearest, the right ones framed
    in green.
    """

    name: str = "retrieval"
    among: int = 0
    """Pairs of a gallery: the held-out pairs are cut, in order, into galleries of this size (what is left over is left
    out) and the mean over them is taken; 0 for one gallery of all. Where fewer can be read, it is of those."""
    shown: int = 6
    """Queries of each direction in the report's picture; 0 for no picture."""
    batch_size: int = 0
    """Examples at a time; 0 for the training batch's."""

    def build(self, setting: Setting):
        task = setting.task
        whole.demand(self, task, "embeds pictures and texts", "embed_images", "embed_texts")
        data = whole.prepared(self, None, setting, "tokens", "lengths")
        dataset = whole.held_out(self, data)
        if self.among > len(dataset):
            raise UserError(
                f"the evaluation '{self.name}' looks among {self.among} pairs, and the data holds out {len(dataset)}"
            )

        def embed(params, state, batch):
            images, texts = task.embed_images(params, batch, state), task.embed_texts(params, batch)
            pair = {"images": images.astype(jnp.float32), "texts": texts.astype(jnp.float32)}
            return pair | {k: batch[k] for k in ("tokens", "lengths")}

        embedded = whole.rows(dataset, setting, self.batch_size or whole.default_batch(setting), embed)
        rank = ranker(setting.sharding)

        def run(params, state, step):
            found = embedded(params, state)
            pairs = len(found["index"])   # what cannot be read is none of them
            if not pairs:
                raise UserError(f"the evaluation '{self.name}': none of the {len(dataset)} held-out pairs can be read")
            gallery = min(self.among or pairs, pairs)
            captions = equal_captions(found["tokens"], found["lengths"])
            sums: dict[str, np.ndarray] = {}
            starts = range(0, pairs - gallery + 1, gallery)
            for start in starts:
                part = slice(start, start + gallery)
                images, texts, ids = found["images"][part], found["texts"][part], captions[part]
                both = {"image_to_text": rank(images, texts, ids, ids), "text_to_image": rank(texts, images, ids, ids)}
                right = np.bincount(ids, minlength=ids.max() + 1)[ids]
                both["chance"] = (np.zeros_like(right), gallery - right, right)
                for direction, ranks in both.items():
                    recalls = np.array([recall(ranks, k) for k in KS])
                    sums[direction] = sums.get(direction, 0) + recalls
            means = {direction: recalls / len(starts) for direction, recalls in sums.items()}
            metrics = {
                f"{direction}/recall@{k}": float(value)
                for direction in ("image_to_text", "text_to_image")
                for k, value in zip(KS, means[direction], strict=True)
            }
            pictures = {}
            if self.shown:
                pictures[self.name] = hits_sheet(dataset, data.tokenizer, found, captions, gallery, self.shown)
            head = f"among {gallery}" + (f", mean of {len(starts)} galleries" if len(starts) > 1 else "")
            if gallery < self.among:
                head += f", not {self.among}: the other pictures cannot be read"
            return Report(metrics, {self.name: f"{head}\n{_table(means)}"}, pictures)

        return run


def recall(ranks: Ranks, k: int) -> float:
    """The share of queries with a right candidate among the first k, each order of level candidates as likely."""
    above, wrong, right = (np.asarray(r, np.float64) for r in ranks)
    miss = np.ones_like(above)   # that none of the level candidates which still find a place is a right one
    for i in range(k):
        placed = above + i < k
        chance = np.maximum(wrong - i, 0) / np.maximum(wrong + right - i, 1)
        miss = np.where(placed, miss * chance, miss)
    return float(np.mean(np.where(wrong + right > 0, 1 - miss, 0)))


def ranker(sharding: Sharding, chunk: int = CHUNK) -> Callable[..., Ranks]:
    """Compiles the function (queries (Q, E), candidates (N, E), groups of both (Q,), (N,)) -> Ranks.

    A candidate of the query's group (numbers from 0) is right. Queries are split over the mesh, and at most
    `chunk` x `chunk` similarities exist at a time.
    """

    def similarities(queries, candidates):
        return jnp.matmul(queries, candidates.T, precision="highest")

    @jax.jit
    def best_of(best, queries, candidates, group, groups):
        right = group[:, None] == groups
        return jnp.maximum(best, jnp.max(jnp.where(right, similarities(queries, candidates), -jnp.inf), 1))

    @jax.jit
    def count_of(counts, best, queries, candidates, group, groups):
        ahead = similarities(queries, candidates) - best[:, None]
        right, level = group[:, None] == groups, jnp.abs(ahead) <= whole.NEAR
        wrong = ~right & (groups >= 0)
        return counts + jnp.stack([jnp.sum(x, 1) for x in (wrong & (ahead > whole.NEAR), wrong & level, right & level)])

    @jax.jit
    def gathered(x):
        return jax.lax.with_sharding_constraint(x, sharding.replicated)

    def run(queries, candidates, group, groups):
        rows = whole.whole_rows(sharding, min(chunk, len(queries)))
        columns = min(chunk, len(candidates))
        pieces = []
        for first in range(0, len(candidates), columns):
            part = slice(first, first + columns)
            pieces.append((whole.padded(candidates[part], columns), whole.padded(groups[part], columns, -1)))
        counts = []
        for first in range(0, len(queries), rows):
            part = slice(first, first + rows)
            query = whole.place(sharding, whole.padded(queries[part], rows), "batch", None)
            own = whole.place(sharding, whole.padded(group[part], rows, -2), "batch")
            best = whole.place(sharding, np.full(rows, -np.inf, np.float32), "batch")
            count = whole.place(sharding, np.zeros((3, rows), np.int32), None, "batch")
            for pair in pieces:
                candidate, theirs = (whole.place(sharding, x, *(None,) * x.ndim) for x in pair)
                best = best_of(best, query, candidate, own, theirs)
            for pair in pieces:
                candidate, theirs = (whole.place(sharding, x, *(None,) * x.ndim) for x in pair)
                count = count_of(count, best, query, candidate, own, theirs)
            counts.append(np.asarray(gathered(count)))
        return tuple(np.concatenate(counts, 1)[:, : len(queries)])

    return run


def equal_captions(tokens: Int[np.ndarray, "N L"], lengths: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """A number for each caption, from 0, the same for captions of the same tokens."""
    inside = np.arange(tokens.shape[1]) < lengths[:, None]
    captions = np.column_stack([lengths, np.where(inside, tokens, 0)])
    return np.unique(captions, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int32)


def _table(means: dict[str, np.ndarray]) -> str:
    lines = [f"{'':<14}" + "".join(f"{f'recall@{k}':>11}" for k in KS)]
    for direction, recalls in means.items():
        lines.append(f"{direction.replace('_', ' '):<14}" + "".join(f"{value:>11.4f}" for value in recalls))
    return "\n".join(lines) + "\n"


def hits_sheet(
    dataset: Any, tokenizer: Any, found: dict[str, np.ndarray], captions: np.ndarray, gallery: int, shown: int, top=5
) -> np.ndarray:
    """The first gallery's picture: rows of a query and its `top` nearest, first captions to pictures, then back.

    Right answers are framed in green. `found` holds images, texts (N, E), tokens, lengths, and index in the dataset.
    """
    top, queries = min(top, gallery), range(min(shown, gallery))

    def picture(i: int) -> np.ndarray:
        return picture_of(dataset[int(found["index"][i])])

    def caption(i: int) -> str:
        if tokenizer is None:
            return f"{i}"
        return tokenizer.decode(found["tokens"][i, : max(int(found["lengths"][i]) - 1, 0)].tolist())

    images, labels, frames = [], [], []
    ways: list[tuple[str, str, Float[np.ndarray, "N E"], Float[np.ndarray, "N E"]]] = [
        ("text", "", found["texts"], found["images"]), ("", "text", found["images"], found["texts"]),
    ]  # fmt: skip
    for query_kind, answer_kind, asked, answers in ways:
        for i in queries:
            similar = answers[:gallery] @ asked[i]
            images.append(None if query_kind == "text" else picture(i))
            labels.append(caption(i) if query_kind == "text" else "")
            frames.append(None)
            for j in np.argsort(-similar, kind="stable")[:top].tolist():
                images.append(None if answer_kind == "text" else picture(j))
                labels.append(f"{similar[j]:.3f} {caption(j)}" if answer_kind == "text" else f"{similar[j]:.3f}")
                frames.append("green" if captions[i] == captions[j] else None)
    return sheet(images, top + 1, labels, frames)


def picture_of(example: dict[str, np.ndarray]) -> np.ndarray:
    """The picture of an example, uint8 (H, W, C), put together where it is in patches."""
    if "image" in example:
        return example["image"]
    return unpatch(example["patches"], example["coordinates"], example["patch_mask"])
