"""What the data is: features in groups (user, item, context), the tasks to predict, and who is who.

A `Schema` is built in Python or read from the `schema:` part of a run's YAML.  Nothing here touches
data or tensors; every other room of the package is told by these objects what to do.
"""

from mtcl_torchrec.schema.declared import GROUPS, ConfigError, DataError, Group, GroupSet, check_unique, nearest
from mtcl_torchrec.schema.features import Feature, own_table
from mtcl_torchrec.schema.heads import Head, SampledSoftmax
from mtcl_torchrec.schema.tasks import RESERVED, Chain, Task, chain_links, check_groups, check_weights
from mtcl_torchrec.schema.whole import Schema

__all__ = [
    "GROUPS",
    "RESERVED",
    "Chain",
    "ConfigError",
    "DataError",
    "Feature",
    "Group",
    "GroupSet",
    "Head",
    "SampledSoftmax",
    "Schema",
    "Task",
    "chain_links",
    "check_groups",
    "check_unique",
    "check_weights",
    "nearest",
    "own_table",
]
