"""Labels of pictures that have captions, from another column of the same source."""

import dataclasses

import numpy as np

from jaxgen.data.imagetext import PARTS, PreparedImageText, PreparedLabelledImages, Reader, number_labels
from jaxgen.errors import UserError


class Labels(PreparedLabelledImages):
    """The pictures of `ImageText`, on the same sides and seen the same way, with labels in place of captions.

    Labels are numbered as `LabelledImages` does; a class may be in one part alone.
    """

    def __init__(self, data: PreparedImageText, column: str):
        self.view, self.workers = data.view, data.workers
        readers = {part: data.readers(part, 0) for part in PARTS}
        found = {part: _values(reader, column) for part, reader in readers.items()}
        every = {value for values in found.values() for value in values}
        self.classes, number = number_labels(every, readers["train"].index.train.classes(column))
        labels = {part: np.array([number[v] for v in values], np.int32) for part, values in found.items()}

        def reader(part: str, seed: int) -> _Labelled:
            theirs = data.readers(part, seed)
            return _Labelled(*(getattr(theirs, f.name) for f in dataclasses.fields(Reader)), labels=labels[part])

        self.readers = reader


@dataclasses.dataclass(frozen=True, eq=False)
class _Labelled(Reader):
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    def about(self, place, rng):
        return {"label": self.labels[place]}


def _values(reader: Reader, column: str) -> list[str]:
    """The column of each picture of a part."""
    source, found = getattr(reader.index, reader.part), []
    for i in reader.index.load(reader.part, "rows"):
        row = source.row(int(i))
        value = row.columns.get(column)
        if not isinstance(value, int | str) or value == "":
            raise UserError(f"the picture {row.name} has no label in the column '{column}'; its columns are "
                            f"{', '.join(row.columns)}")
        found.append(str(value))
    return found
