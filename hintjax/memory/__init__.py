"""The memory bank of contrastive distillation (CRD): its state, rows and draws.

The bank holds one embedding per training example and network. `init`, `update` and
`select` make and change a bank; `draw_*` choose positive and negative examples;
`labeled` compares labels with those of the training set;
`batch_rows`, `shared_rows` and `scores_by_rows` read the rows, on one device or split
over a mesh.

`enqueue` is for a queue of the teacher's embeddings (`queue_similarity`): an array with
the embeddings of the examples seen last.
"""

from hintjax.memory.bank import init, select, set_once, update
from hintjax.memory.draws import (
    Classes,
    by_class,
    draw_others,
    draw_same,
    draw_shared,
    labeled,
)
from hintjax.memory.queue import enqueue
from hintjax.memory.rows import (
    HIGHEST,
    MemoryBank,
    batch_rows,
    scores_by_rows,
    shared_rows,
    split_rows,
)

__all__ = [
    "HIGHEST",
    "Classes",
    "MemoryBank",
    "batch_rows",
    "by_class",
    "draw_others",
    "draw_same",
    "draw_shared",
    "enqueue",
    "init",
    "labeled",
    "scores_by_rows",
    "select",
    "set_once",
    "shared_rows",
    "split_rows",
    "update",
]
