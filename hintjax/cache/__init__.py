"""A cache of a teacher's features: the teacher runs once per view of an example.

`contents` plans a cache: it says what a row holds, how many bytes it takes, and which
teacher and methods read it. `write` computes the rows into a directory, and `read`
reads them back; `in_memory` computes them without a directory. A stage with
`Contents.network` as its teacher then trains from rows. No method and no stage knows of
the cache.

>>> import flax.linen as nn, jax, numpy as np, optax
>>> import hintjax as hj
>>> from hintjax import cache
>>> images = np.ones((6, 4, 4, 1), np.float32)
>>> net = hj.linen(nn.Sequential([nn.Conv(2, (3, 3)), lambda x: x.mean((1, 2))]))
>>> variables = net.init(jax.random.key(0), images[:2])
>>> method = hj.attention_transfer([("layers_0", "layers_0")])
>>> def batch_of(index, view):
...     views = np.full(len(index), view, np.int32)
...     return {"image": images[index], "index": index.astype(np.int32), "view": views}
>>> batch = batch_of(np.arange(2), 0)
>>> plan = cache.contents(net, net, method, variables, variables, batch, examples=6)
>>> plan.nbytes, "bytes per view of an example"
(64, 'bytes per view of an example')
>>> encode = jax.jit(lambda batch: plan.encode(plan.features(variables, batch)))
>>> compute = cache.by_batches(encode, batch_of, batch_size=2, examples=6)
>>> rows = cache.in_memory(plan.rows, total=6, examples=6, compute=compute)
>>> stage = hj.distillation_stage(
...     net,
...     plan.network,
...     plan.reading(method),
...     optax.sgd(0.1),
...     teacher_inputs=plan.inputs,
... )
>>> teacher = cache.variables_of(variables, cache.flat(rows.everything()))
>>> state = stage.init(jax.random.key(1), variables, teacher, batch)
>>> state, metrics = stage.update(state, teacher, batch)

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
