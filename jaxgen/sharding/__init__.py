"""The device mesh, and the rules from logical axis names to mesh axes."""

from jaxgen.sharding.axes import RULES, Rules, Sharding, constrain, current, is_split, names_of, unbox
from jaxgen.sharding.mesh import AXES, Mesh

__all__ = ["AXES", "RULES", "Mesh", "Rules", "Sharding", "constrain", "current", "is_split", "names_of", "unbox"]
