"""Data: sources, tokenizers, transforms, packing, batching.

Nothing here knows of models or of the mesh; `loader` takes shardings as they come.
"""

from jaxgen.data.base import Data, Prepared
from jaxgen.data.imagetext import ImageText, LabelledImages
from jaxgen.data.text import Mixture, Text
from jaxgen.data.tokenizers import Bytes, Characters, SentencePiece

__all__ = ["Bytes", "Characters", "Data", "ImageText", "LabelledImages", "Mixture", "Prepared", "SentencePiece", "Text"]
