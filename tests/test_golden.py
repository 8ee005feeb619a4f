"""Golden cases in double precision: each loss is within 1e-12 of the authors' code.

Gradients and changed state were recorded in float32; the tests of each loss and method
compare them.
"""

from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hintjax import losses, memory, probes, regressors
from hintjax._numerics import at_smaller_size, unit

pytestmark = pytest.mark.quick

# A case c maps names to arrays. These are the authors' parameters under Flax's names:


def dense(c, name):
    keys = {"kernel": f"param.{name}.weight", "bias": f"param.{name}.bias"}
    return {ours: c[theirs] for ours, theirs in keys.items() if theirs in c}


def norm(c, name):
    return {"scale": c[f"param.{name}.weight"], "bias": c[f"param.{name}.bias"]}


def statistics(c, name):
    kinds = {"mean": "running_mean", "var": "running_var"}
    return {ours: c[f"state.{name}.{theirs}"] for ours, theirs in kinds.items()}


def applied(module, params, stats, *inputs, train):
    y, _ = module.apply(
        {"params": params, "batch_stats": stats},
        *inputs,
        train,
        mutable=["batch_stats"] if train else [],
    )
    return y


def lists(c, *names):
    """The entries `in.<name>.<i>` of each name."""
    keys = [[key for key in c if key.startswith(f"in.{name}.")] for name in names]
    return [[c[key] for key in sorted(own)] for own in keys]


# The loss of each case, from its arrays


def simple(loss, student="in.f_s", teacher="in.f_t"):
    return lambda c: loss(c[student], c[teacher]).mean()


def boundary(c):
    return sum(
        3 / 1000 * 2.0 ** (i - 2) * losses.activation_boundary_loss(s, t).mean()
        for i, (s, t) in enumerate(zip(*lists(c, "g_s", "g_t"), strict=True))
    )


def contrastive(c):
    size, width = c["state.contrast.memory_v1"].shape
    head = regressors.Embedding(width)
    student, teacher = (
        head.apply(
            {"params": {"linear": dense(c, f"embed_{x}.linear")}}, c[f"in.f_{x}"]
        )
        for x in "st"
    )
    # The code keeps its temperature in a float32 buffer.
    total, setting = 0.0, {"size": size, "temperature": float(np.float32(0.07))}
    for anchors, bank, z in (
        (student, c["state.contrast.memory_v2"], c["state.contrast.params"][2]),
        (teacher, c["state.contrast.memory_v1"], c["state.contrast.params"][3]),
    ):
        candidates = bank[c["int.contrast_idx"]]
        scores = jnp.einsum("bd,bkd->bk", anchors, candidates)
        first = losses.contrastive_log_constant(scores[:, 0], scores[:, 1:], **setting)
        log_z = jnp.where(z < 0, first, jnp.log(z))  # -1: not set
        total += losses.contrastive_loss(
            anchors, candidates, log_constant=log_z, **setting
        ).mean()
    return total


def conv_reg(c, train):
    sizing = partial(regressors.conv, batch_norm=True, activation=nn.relu)
    x, hint = c["in.f_s"], c["in.f_t"]
    params = {"layers_0": dense(c, "conv"), "BatchNorm_0": norm(c, "bn")}
    stats = {"BatchNorm_0": statistics(c, "bn")}
    module = sizing(x.shape[1:], hint.shape[1:])
    y = applied(module, params, stats, x, train=train)
    return losses.hint_loss(y, hint).mean()


def decoupled(c):
    logits = c["in.logits_student"], c["in.logits_teacher"]
    return losses.decoupled_kd_loss(*logits, c["int.target"]).mean()


def flow(c):
    s, t = lists(c, "g_s", "g_t")
    return sum(
        losses.fsp_loss((s[i], s[i + 1]), (t[i], t[i + 1])).mean() for i in range(3)
    )


def generation(c):
    layers = {"align": "align", "hidden": "generation.0", "generate": "generation.2"}
    mask = (c["state.mask_uniform"] >= 0.15).reshape(4, 1, 1, 12)
    y = regressors.Generator(12).apply(
        {"params": {ours: dense(c, theirs) for ours, theirs in layers.items()}},
        c["in.f_s"],
        mask=mask,
    )
    return 7e-5 * losses.masked_generation_loss(y, c["in.f_t"]).mean()


def overhaul(c):
    total = 0.0
    for i, (x, t) in enumerate(zip(*lists(c, "f_s", "f_t"), strict=True)):
        x, t = at_smaller_size(x, t)
        name = f"connectors.connectors.{i}"
        kernel = c[f"param.{name}.0.weight"][0, 0]
        params = {"layers_0": {"kernel": kernel}, "BatchNorm_0": norm(c, f"{name}.1")}
        stats = {"BatchNorm_0": statistics(c, f"{name}.1")}
        module = regressors.linear(
            x.shape[1:], t.shape[1:], batch_norm=True, bias=False
        )
        y = applied(module, params, stats, x, train=False)
        margin = losses.batch_norm_margin(
            c[f"state.teacher_bn_weight_{i}"], c[f"state.teacher_bn_bias_{i}"]
        )
        values = losses.partial_l2_loss(y, losses.margin_relu(t, margin))
        total += values.mean() / 2.0 ** (1 - i)
    return total


def relational(c):
    arrays = c["in.f_s"], c["in.f_t"]
    distance, angle = losses.distance_loss(*arrays), losses.angle_loss(*arrays)
    return (25 * distance + 50 * angle).mean()


def fusion(c, prefix=""):
    """An ABF's parameters and statistics."""
    names = {"reduce": "conv1.0", "expand": "conv2.0", "attention": "att_conv.0"}
    norms = {"reduce_norm": f"{prefix}conv1.1", "expand_norm": f"{prefix}conv2.1"}
    layers = {ours: dense(c, prefix + theirs) for ours, theirs in names.items()}
    params = {ours: layer for ours, layer in layers.items() if layer}
    params |= {ours: norm(c, theirs) for ours, theirs in norms.items()}
    return params, {ours: statistics(c, theirs) for ours, theirs in norms.items()}


def abf(c, train):
    module = regressors.ABF(10, 12, (8, 8))
    y, x = applied(module, *fusion(c), c["in.x"], c["in.y"], train=train)
    return (c["in.cot_out"] * y).sum() + (c["in.cot_res"] * x).sum()


def contexts(c):
    pairs = zip(*lists(c, "fs", "ft"), strict=True)
    return sum(losses.hierarchical_context_loss(s, t).mean() for s, t in pairs)


def review(c):
    total, deeper = 0.0, None
    stages = zip(*lists(c, "fs", "ft"), strict=True)
    for i, (x, hint) in enumerate(reversed(list(stages))):
        module = regressors.ABF(24, hint.shape[-1], hint.shape[1:3])
        parts = fusion(c, f"abfs.{i}.")
        y, deeper = applied(module, *parts, x, deeper, train=True)
        total += losses.hierarchical_context_loss(y, hint).mean()
    return total


def standardized(c):
    logits = c["in.logits_student"], c["in.logits_teacher"]
    return losses.kd_loss(
        *map(losses.standardize_logits, logits), temperature=2.0
    ).mean()


def projected(c):
    names = [f"simkd.transfer.{i}" for i in range(8)]
    params, stats = {}, {}
    for i in range(3):
        params[f"Conv_{i}"] = dense(c, names[3 * i])
        params[f"BatchNorm_{i}"] = norm(c, names[3 * i + 1])
        stats[f"BatchNorm_{i}"] = statistics(c, names[3 * i + 1])
    x, hint = at_smaller_size(c["in.f_s"], c["in.f_t"])
    y = applied(regressors.Bottleneck(6, 12), params, stats, x, train=False)
    return losses.hint_loss(y, hint).mean()


def variational(c):
    layers = [dense(c, f"regressor.{i}")["kernel"][0, 0] for i in (0, 2, 4)]
    x = c["in.f_s"] @ layers[0]
    for kernel in layers[1:]:
        x = nn.relu(x) @ kernel
    scale = c["param.log_scale"]
    return losses.variational_loss(x, c["in.f_t"], scale=scale).mean()


def standardizations(moments, case):
    """Each transform, with the signs of the eigenvectors of the case."""
    h, u = case["state.hadamard"], case["state.eigenvectors"]
    found = {
        "global": losses.global_standardization(moments),
        "channel": losses.channel_standardization(moments),
        "pca": losses.pca_whitening(moments),
        "zca": losses.zca_whitening(moments),
        "hca": losses.hadamard_whitening(moments),
        "phis": losses.phi_standardization(moments),
    }
    signs = jnp.sign(jnp.sum(found["pca"].matrix * u.T, 1))
    turns = {"pca": jnp.diag(signs)} | dict.fromkeys(("hca", "phis"), h * signs @ h.T)
    for name, turn in turns.items():
        one = found[name]
        found[name] = one._replace(matrix=turn @ one.matrix, inverse=one.inverse @ turn)
    return found


def all_standardized(c):
    moments = losses.feature_moments(c["in.tokens"])
    return sum(
        losses.hint_loss(
            c["in.pred"], losses.standardize_features(c["in.tokens"], one)
        ).mean()
        for one in standardizations(moments, c).values()
    )


def phi_standardized(c, teacher="in.f_t", state="state"):
    mean, matrix = c[f"{state}.mean"], c[f"{state}.whiten"]
    transform = losses.Standardization(mean, matrix, matrix)
    hint = losses.standardize_features(c[teacher], transform)
    return losses.hint_loss(c["in.f_s"], hint).mean()


def resized(c):
    hint = jnp.concatenate([c["in.f_t.0"], c["in.f_t.1"]], -1)
    name = "student_projection_head.mlp"
    if f"param.{name}.weight" in c:
        params, sizing = {"layers_0": dense(c, name)}, regressors.linear
    else:
        block = {"layers_0": dense(c, f"{name}.0"), "layers_1": norm(c, f"{name}.1")}
        params = {"layers_0": block, "layers_1": dense(c, f"{name}.3")}
        sizing = partial(regressors.layer_norm_mlp, hidden=20)
    shape = c["in.f_s"].shape[1:]
    projection = sizing(shape, (*shape[:2], hint.shape[-1]))
    module = regressors.Resized(projection, hint.shape[1:3])
    params = {"regressor": params}
    y = applied(module, params, {}, c["in.f_s"], train=False)
    return losses.hint_loss(y, hint).mean()


def kept(c):
    """UNIC: the teachers that count for each example, normalized by old statistics."""
    values = []
    for teacher in "t0", "t1":
        parts = []
        for part in "cls", "patch":
            name = f"state.{teacher}.{part}"
            mean, deviation = c[f"{name}.mean"], c[f"{name}.std"]
            hint = (c[f"in.{part}_t.{teacher}"] - mean) / (deviation + 1e-6)
            student = c[f"in.{part}_s.{teacher}"]
            weights = {"cosine": 0.5, "smooth_l1": 0.5}
            parts.append(losses.cosine_smooth_l1_loss(student, hint, **weights))
        values.append(sum(parts) / 2)
    keep = c["out.keep"]
    return (keep * jnp.stack(values)).sum() / keep.sum()


def queued(c, student="in.f_s", teacher="in.f_t", head="student_projection_head"):
    module = regressors.Embedding(c[teacher].shape[-1])
    s = module.apply({"params": {"linear": dense(c, head)}}, c[student])
    queue = memory.enqueue(c["state.teacher_queue"], unit(c[teacher]))
    return losses.queue_similarity_loss(s, c[teacher], queue).mean()


def local_and_global(c):
    head = "student_projection_head"
    whole = queued(c, "in.g_s", "in.g_t", f"{head}_global")
    shape, grid = c["in.f_s"].shape[1:], c["in.f_t"].shape[1:3]
    projection = regressors.linear(shape, (*shape[:2], 10))
    module = regressors.Resized(projection, grid)
    params = {"regressor": {"layers_0": dense(c, f"{head}_local")}}
    y = applied(module, params, {}, c["in.f_s"], train=False)
    return whole + losses.position_similarity_loss(y, c["in.f_t"]).mean()


def rotated(c):
    """VkD; the free matrix of an orthonormal matrix is the matrix itself."""
    module, params = regressors.Orthogonal(20), {"free": c["out.weight"]}
    y = module.apply({"params": params}, c["in.z_s"].mean(1))
    hint = losses.layer_normalize(c["in.f_t"].mean((1, 2)))
    return losses.smooth_l1_loss(y, hint).mean()


def voted(c):
    """The accuracy of 20 neighbors, in percent."""
    known = c["in.train"], c["int.train_labels"]
    scores = probes.knn_scores(c["in.test"], *known, classes=7)
    return 100 * jnp.mean(jnp.argmax(scores, -1) == c["int.test_labels"])


FOLDER = Path(__file__).parent / "golden"
CASES = {
    "ab/rep_3stages": boundary,
    "at/rep_equal": simple(losses.attention_transfer_loss),
    "at/rep_teacher_larger_8_16": simple(losses.attention_transfer_loss),
    "at/szagoruyko_equal": simple(losses.attention_transfer_loss, "in.x", "in.y"),
    "catkd/normalized_res2": simple(losses.class_attention_loss),
    "cc/rep": simple(losses.correlation_loss),
    "crd/feat128_K64": contrastive,
    "crd/step1_exact_Z_unset": contrastive,
    "crd/step2_exact_Z_set": contrastive,
    "dist/b8_c20": simple(losses.dist_loss, "in.y_s", "in.y_t"),
    "dkd/b6_c100_beta8": decoupled,
    "fsp/rep_4layers": flow,
    "ft/rep_p2_1": simple(losses.factor_loss),
    "hint/convreg_down2_eval": partial(conv_reg, train=False),
    "hint/convreg_same_train": partial(conv_reg, train=True),
    "hint/convreg_up2_train": partial(conv_reg, train=True),
    "hint/mse_equal": simple(losses.hint_loss),
    "kd/logit_standardized_T2": standardized,
    "kd/rep_T4_b8_c100": simple(losses.kd_loss, "in.y_s", "in.y_t"),
    "knn/n300_c7": voted,
    "lightly_v1/queue_larger_half_filled": queued,
    "lightly_v1/queue_smaller_b6_q4": queued,
    "lightly_v2/linear_5x7_to_16x16": resized,
    "lightly_v2/mlp2_16x16_to_5x7": resized,
    "lightly_v3/6x4_to_5x7": local_and_global,
    "mgd/cls_channel_mask": generation,
    "nst/rep": simple(losses.selectivity_loss),
    "ofd/mdistiller_eval": overhaul,
    "oracle/at_paper_eq2_halfbeta_norm": lambda c: (
        simple(losses.attention_transfer_loss_paper)(c) / 2
    ),
    "oracle/fitnets_paper_stage1": simple(
        losses.hint_loss_paper, "in.regressed", "in.hint"
    ),
    "oracle/standardisations_d24": all_standardized,
    "phis/d48_sylvester4_x_paley12": phi_standardized,
    "phis/running_3_batches_masked": partial(
        phi_standardized, teacher="in.f_t.2", state="state_out"
    ),
    "pkt/rep": simple(losses.probability_loss),
    "reviewkd/abf_fuse_eval": partial(abf, train=False),
    "reviewkd/abf_fuse_train": partial(abf, train=True),
    "reviewkd/full_train": review,
    "reviewkd/hcl_4stages": contexts,
    "rkd/rep": relational,
    "simkd/factor2_eval": projected,
    "sp/rep": simple(losses.similarity_loss),
    "transformer/att_mse": simple(
        partial(losses.attention_score_loss_code, floor=-1e-3)
    ),
    "transformer/hid_mse": simple(losses.hint_loss),
    "unic/two_teachers_dropping": kept,
    "vid/rep_equal": variational,
    "vkd/tall_12_to_20": rotated,
}
# Matrices and targets of these cases are in float32; the code had them in float64.
ROUNDED = {
    "oracle/standardisations_d24": 1e-7,
    "phis/d48_sylvester4_x_paley12": 1e-7,
    "phis/running_3_batches_masked": 1e-7,
    "vkd/tall_12_to_20": 1e-7,
}


def test_every_case_is_here():
    files = {path.stem.replace("__", "/") for path in FOLDER.glob("*.npz")}
    assert set(CASES) == files


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_code_in_double_precision(name):
    with jax.enable_x64(True):
        with np.load(FOLDER / f"{name.replace('/', '__')}.npz") as file:
            c = {
                key: jnp.asarray(x, x.dtype if key.startswith("int.") else np.float64)
                for key, x in file.items()
                if key.startswith(
                    (
                        "in.",
                        "int.",
                        "param.",
                        "state",
                        "out.loss",
                        "out.keep",
                        "out.weight",
                    )
                )
            }
        got = jax.jit(lambda c: CASES[name](c))(c)
        np.testing.assert_allclose(got, c["out.loss"], rtol=ROUNDED.get(name, 1e-12))
