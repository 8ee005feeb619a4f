"""A cache of a teacher's features: the teacher runs once per view of an example.

`contents` plans a cache: it says what a row holds, how many bytes it takes, and which
teacher and methods read it. `write` computes the rows into a directory, and `read`
reads them back; `in_memory` computes them without a directory. A stage with
`Contents.network` as its teacher then trains from rows. No method and no stage knows of
the cache.

The features of a view belong to that view alone: a feature map of a flipped image is
not the flipped feature map. So batches must hold "index" and "view", as
`hintjax.data.take` makes them from `hintjax.data.fixed_views`.
"""

from hintjax.cache.coding import CODINGS, Coding
from hintjax.cache.contents import ROWS, Contents, contents, flat, variables_of
from hintjax.cache.shards import (
    Compute,
    Rows,
    by_batches,
    check_identity,
    in_memory,
    read,
    write,
)

__all__ = [
    "CODINGS",
    "ROWS",
    "Coding",
    "Compute",
    "Contents",
    "Rows",
    "by_batches",
    "check_identity",
    "contents",
    "flat",
    "in_memory",
    "read",
    "variables_of",
    "write",
]
