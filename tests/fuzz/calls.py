"""A sound call of each public function that takes arrays, for the fuzz test to spoil."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import (
    fused_loss,
    later_losses,
    losses,
    metrics,
    models,
    multi_label,
    nets,
    soft_targets,
    step_losses,
    top_k_losses,
    train_step,
)
from distill_jax.data import augment, distortion, images, transfer
from distill_jax.soft_targets import class_maps, compare, encodings, ensemble
from distill_jax.specialists import clustering, coverage, enrichment, eq5, greedy, heads, inference
from fuzz.inputs import (
    BATCH,
    EXAMPLES,
    HYPER,
    IDS,
    KEPT,
    LABELS,
    LAYER,
    LOGITS,
    MODEL,
    SETS,
    TAIL,
    TARGETS,
    VIEWS,
    B,
    C,
    D,
    K,
    S,
    floats,
    ints,
    loss_of_labels,
    make_step,
    make_store,
    top_k_batch,
    write,
    write_top_k,
    write_views,
)


class Call(NamedTuple):
    """A function of trees of arrays by name, and arguments that fit; traced: under `jax.eval_shape`."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    traced: bool = True


def calls() -> dict[str, Call]:
    """The calls by the functions' names."""
    store = make_store()
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, D)))
    net = nets.Net(MODEL, params, [], 0.0, None, {"inputs": {"shape": [D], "dtype": "float32"}})
    evidence = {
        "generalist": LOGITS,
        "specialists": floats(B, K, S + 1),
        "class_sets": np.tile(SETS[None], (B, 1, 1)),
        "active": np.ones((B, K), bool),
    }
    top_k = {"logits": LOGITS, "ids": IDS, "probabilities": KEPT, "tail": TAIL}
    batch = {"logits": LOGITS, "batch": BATCH}
    one_set = {"class_set": SETS[0]}

    def loss(function: Any, constants: Any = None) -> Callable[..., Any]:
        return lambda logits, batch: function(logits, batch, HYPER, constants)

    return {
        "softmax": Call(losses.softmax, {"logits": LOGITS}),
        "log_softmax": Call(losses.log_softmax, {"logits": LOGITS}),
        "soft_cross_entropy": Call(
            lambda **a: losses.soft_cross_entropy(**a, temperature=2.0),
            {"logits": LOGITS, "soft_targets": TARGETS},
        ),
        "soft_kl": Call(
            lambda **a: losses.soft_kl(**a, temperature=2.0),
            {"logits": LOGITS, "soft_targets": TARGETS},
        ),
        "hard_cross_entropy": Call(losses.hard_cross_entropy, {"logits": LOGITS, "labels": LABELS}),
        "distillation": Call(
            lambda **a: losses.distillation(**a, temperature=2.0, hard_weight=0.5),
            {
                "logits": LOGITS,
                "soft_targets": TARGETS,
                "labels": LABELS,
                "label_known": np.ones(B, bool),
            },
        ),
        "top_k_soft_cross_entropy": Call(
            lambda **a: top_k_losses.soft_cross_entropy(**a, temperature=2.0),
            {**top_k, "tail_weights": floats(C)},
        ),
        "top_k_distillation": Call(
            lambda **a: top_k_losses.distillation(**a, temperature=2.0, hard_weight=0.5),
            {**top_k, "labels": LABELS},
        ),
        "tail_distribution": Call(
            lambda **a: top_k_losses.tail_distribution(**a, num_classes=C),
            {"ids": IDS, "tail_weights": floats(C)},
        ),
        "label_modified": Call(
            lambda **a: losses.label_modified(**a, weight=0.5),
            {"soft_targets": TARGETS, "labels": LABELS, "label_known": np.ones(B, bool)},
        ),
        "logit_matching": Call(
            lambda **a: losses.logit_matching(**a, zero_mean=True),
            {"logits": LOGITS, "teacher_logits": LOGITS},
        ),
        **{
            name: Call(
                lambda loss=loss, **a: loss(**a, temperature=2.0),
                {"logits": LOGITS, "teacher_logits": LOGITS},
            )
            for name, loss in (
                ("reverse_kl", later_losses.reverse_kl),
                ("jensen_shannon", later_losses.jensen_shannon),
                ("standardised_kl", later_losses.standardised_kl),
                ("transformed_teacher", later_losses.transformed_teacher),
            )
        },
        "decoupled": Call(
            lambda **a: later_losses.decoupled(**a, temperature=2.0),
            {"logits": LOGITS, "teacher_logits": LOGITS, "labels": LABELS},
        ),
        "correlation": Call(
            lambda **a: later_losses.correlation(**a, temperature=2.0),
            {"logits": LOGITS, "teacher_logits": LOGITS, "weight": TAIL},
        ),
        "standardise": Call(later_losses.standardise, {"logits": LOGITS}),
        "with_labels": Call(
            lambda **a: losses.with_labels(**a, hard_weight=0.5),
            {"soft": TAIL, "logits": LOGITS, "labels": LABELS},
        ),
        "sigmoid": Call(multi_label.sigmoid, {"logits": LOGITS}),
        "multi-label cross_entropy": Call(
            multi_label.cross_entropy, {"logits": LOGITS, "labels": ints(B, C)}
        ),
        "multi-label distillation": Call(
            lambda **a: multi_label.distillation(**a, temperature=2.0, hard_weight=0.5),
            {"logits": LOGITS, "soft_targets": TARGETS, "labels": ints(B, C)},
        ),
        "multi_label_counts": Call(
            metrics.multi_label_counts, {"logits": LOGITS, "labels": ints(B, C)}
        ),
        "multi_label_distillation_loss": Call(
            loss(step_losses.multi_label_distillation_loss),
            {"logits": LOGITS, "batch": {**BATCH, "labels": ints(B, C)}},
        ),
        "reverse_kl_loss": Call(loss(step_losses.reverse_kl_loss), batch),
        "error_counts": Call(metrics.error_counts, {"logits": LOGITS, "labels": LABELS}),
        "prediction_counts": Call(
            metrics.prediction_counts, {"predicted": LABELS, "labels": LABELS}
        ),
        "mean_loss": Call(
            lambda **a: fused_loss.mean_loss(loss_of_labels, **a, constants=None, rows=3),
            {"hidden": floats(B, D), "layer": LAYER, "fields": {"label": LABELS}},
        ),
        "per_example": Call(
            lambda **a: fused_loss.per_example(loss_of_labels, **a, constants=None, rows=3),
            {"hidden": floats(B, D), "layer": LAYER, "fields": {"label": LABELS}},
        ),
        "label_loss": Call(loss(step_losses.label_loss), batch),
        "distillation_loss": Call(loss(step_losses.distillation_loss), batch),
        "label_modified_loss": Call(loss(step_losses.label_modified_loss), batch),
        "logit_matching_loss": Call(loss(step_losses.logit_matching_loss), batch),
        "top_k_distillation_loss": Call(
            loss(step_losses.top_k_distillation_loss()),
            {"logits": LOGITS, "batch": top_k_batch(BATCH)},
        ),
        "step": Call(make_step(step_losses.distillation_loss), {"batch": BATCH}),
        "fused step": Call(
            make_step(train_step.Fused(step_losses.distillation_loss)), {"batch": BATCH}
        ),
        "micro-batches": Call(
            make_step(step_losses.distillation_loss, micro_batches=2), {"batch": BATCH}
        ),
        "eval_step": Call(
            lambda batch: train_step.make_eval_step(MODEL)(params, batch), {"batch": BATCH}
        ),
        "apply": Call(lambda inputs: MODEL.apply(params, inputs), {"inputs": BATCH["inputs"]}),
        "resnet": Call(
            lambda inputs: models.resnet(8, C, width=2).init(jax.random.key(0), inputs),
            {"inputs": np.zeros((B, 4, 4), np.uint8)},
            traced=True,
        ),
        "hint_loss": Call(
            loss(step_losses.hint_loss("a", "b")),
            {
                "logits": LOGITS,
                "batch": {
                    **BATCH,
                    "student_activations": {"a": floats(B, 3, D)},
                    "teacher_activations": {"b": floats(B, 3, D)},
                },
            },
        ),
        "conv_trunk": Call(
            lambda inputs: models.conv_trunk([4], [2]).init(jax.random.key(0), inputs),
            {"inputs": EXAMPLES["inputs"]},
        ),
        "top_k": Call(lambda **a: encodings.top_k(**a, k=2), {"probabilities": TARGETS}),
        "densify": Call(
            lambda **a: encodings.densify(**a, num_classes=C),
            {"classes": IDS, "probabilities": KEPT, "tail": TAIL, "tail_weights": floats(C)},
        ),
        "sample": Call(
            lambda **a: encodings.sample(**a, draws=3), {"probabilities": TARGETS, "offsets": TAIL}
        ),
        "offsets": Call(lambda ids: encodings.offsets(0, ids), {"ids": LABELS}),
        "mean_log_probs": Call(
            lambda **a: ensemble.mean_log_probs(**a, temperature=2.0, mean="geometric"),
            {"member_logits": floats(K, B, C), "weights": floats(B, K)},
        ),
        "mean_probs": Call(
            lambda **a: ensemble.mean_probs(**a, temperature=2.0, mean="arithmetic"),
            {"member_logits": floats(K, B, C)},
        ),
        "ensemble_logits": Call(
            lambda **a: ensemble.ensemble_logits(**a, temperature=2.0, mean="arithmetic"),
            {"member_logits": floats(K, B, C)},
        ),
        "mean_probs_of_hidden": Call(
            lambda **a: ensemble.mean_probs_of_hidden(**a, temperature=2.0, mean="arithmetic"),
            {
                "hidden": floats(B, K, D),
                "layer": {"kernel": floats(K, D, C), "bias": floats(K, C)},
            },
        ),
        "map_classes": Call(
            lambda logits: soft_targets.map_classes(logits, [3, -1, 0]), {"logits": LOGITS}
        ),
        "check_class_map": Call(
            lambda class_map: class_maps.check_class_map(class_map, C),
            {"class_map": np.array([3, -1, 0])},
            traced=False,
        ),
        "shared_classes_loss": Call(loss(step_losses.shared_classes_loss), batch),
        "against_dense": Call(
            lambda kept, **a: compare.against_dense(
                **a, kept=[tuple(kept.values())], temperature=2.0, tail_weights=None
            ),
            {
                "probabilities": TARGETS,
                "kept": {"ids": IDS, "probabilities": KEPT, "tail": TAIL},
                "logits": LOGITS,
            },
        ),
        "jitter": Call(
            lambda inputs: augment.jitter(2)({"inputs": inputs}, jax.random.key(0)),
            {"inputs": EXAMPLES["inputs"]},
        ),
        "random_view": Call(
            lambda batch: [
                augment.random_view(VIEWS)(batch, jax.random.key(0))[name]
                for name in ("inputs", "teacher_logits")  # others are passed on as they are
            ],
            {"batch": {**EXAMPLES, VIEWS.field: floats(B, 9, C)}},
        ),
        "write_top_k": Call(
            write_top_k,
            {
                "classes": np.tile(np.arange(K), (B, 1)),
                "log_probabilities": np.full((B, K), -1.0, np.float32),
                "digests": soft_targets.digests(BATCH["inputs"]),
                "ids": np.arange(B),
            },
            traced=False,
        ),
        "write_views": Call(
            write_views, {"inputs": EXAMPLES["inputs"], "ids": EXAMPLES["id"]}, traced=False
        ),
        "distort": Call(
            lambda images: distortion.distort(images, jax.random.split(jax.random.key(0), B), 1.0),
            {"images": EXAMPLES["inputs"]},
        ),
        "distort_handwriting": Call(
            lambda images: distortion.distort_handwriting(
                images, jax.random.split(jax.random.key(0), B)
            ),
            {"images": EXAMPLES["inputs"]},
        ),
        "columns": Call(clustering.columns, {"matrix": floats(C, C)}),
        "online_k_means": Call(
            lambda points: clustering.online_k_means(points, K, jax.random.key(0)),
            {"points": floats(C, D)},
        ),
        "class_sets": Call(
            lambda **a: clustering.class_sets(**a, size=S),
            {"points": floats(C, D), "centroids": floats(K, D)},
        ),
        "dustbin_labels": Call(lambda class_set: heads.dustbin_labels(class_set, C), one_set),
        "correct_dustbin": Call(
            lambda logits: heads.correct_dustbin(logits, 0.5), {"logits": LOGITS}
        ),
        "correct_others": Call(
            lambda **a: heads.correct_others(**a, correction=0.5), {"logits": LOGITS, **one_set}
        ),
        "reduce_output": Call(
            lambda output, class_set: heads.reduce_output({"output": output}, class_set, C),
            {"output": LAYER, **one_set},
        ),
        "collapse": Call(heads.collapse, {"logits": LOGITS, **one_set}),
        "collapsed_loss": Call(
            lambda logits, batch, **constants: heads.collapsed_loss(
                logits, batch, HYPER, constants
            ),
            {**batch, **one_set},
        ),
        "full_softmax_loss": Call(
            lambda logits, batch, **constants: heads.full_softmax_loss(
                logits, batch, HYPER, constants
            ),
            {**batch, **one_set},
        ),
        "active_specialists": Call(
            lambda **a: inference.active_specialists(**a, max_active=K),
            {"generalist_logits": LOGITS, "class_sets": SETS},
        ),
        "pose": Call(
            eq5.pose,
            {
                "generalist": LOGITS[0],
                "specialists": floats(K, S + 1),
                "class_sets": SETS,
                "active": np.ones(K, bool),
            },
        ),
        "combine": Call(lambda **a: inference.combine(inference.Evidence(**a)), evidence),
        # From here on functions of NumPy arrays, which are called.
        "logits_over": Call(
            lambda inputs: soft_targets.logits_over(MODEL.apply, params, inputs),
            {"inputs": BATCH["inputs"]},
            traced=False,
        ),
        "logits": Call(net.logits, {"inputs": BATCH["inputs"]}, traced=False),
        "digests": Call(soft_targets.digests, {"inputs": BATCH["inputs"]}, traced=False),
        "write": Call(
            write,
            {
                "source": LOGITS,
                "digests": soft_targets.digests(BATCH["inputs"]),
                "ids": np.arange(B),
            },
            traced=False,
        ),
        "attach": Call(
            lambda examples: soft_targets.attach(examples, store),
            {"examples": {"id": BATCH["id"], "inputs": BATCH["inputs"]}},
            traced=False,
        ),
        "rows": Call(lambda ids: soft_targets.rows(store, ids), {"ids": BATCH["id"]}, traced=False),
        "validate": Call(
            lambda examples: images.validate(examples, C, "a set"),
            {"examples": EXAMPLES},
            traced=False,
        ),
        "from_arrays": Call(
            images.from_arrays,
            {
                "train": (EXAMPLES["inputs"], np.arange(B, dtype=np.int32)),
                "test": (EXAMPLES["inputs"][1:], np.arange(B - 1, dtype=np.int32)),
            },
            traced=False,
        ),
        "views": Call(
            lambda examples: augment.views(examples, 2, 1.0, seed=0),
            {"examples": EXAMPLES},
            traced=False,
        ),
        "fraction": Call(
            lambda examples: transfer.fraction(examples, 0.5, 0),
            {"examples": EXAMPLES},
            traced=False,
        ),
        "only_classes": Call(
            lambda examples: transfer.only_classes(examples, [0]),
            {"examples": EXAMPLES},
            traced=False,
        ),
        "labels_known": Call(
            lambda examples: transfer.labels_known(examples, 0.5, 0),
            {"examples": EXAMPLES},
            traced=False,
        ),
        "hold_out": Call(
            lambda examples: transfer.hold_out(examples, 1, 0), {"examples": EXAMPLES}, traced=False
        ),
        "prediction_covariance": Call(
            lambda logits: clustering.prediction_covariance([logits]),
            {"logits": LOGITS},
            traced=False,
        ),
        "confusion": Call(
            lambda labels, logits: clustering.confusion([(labels, logits)]),
            {"labels": LABELS, "logits": LOGITS},
            traced=False,
        ),
        "greedy_sets": Call(
            lambda matrix: greedy.greedy_sets(matrix, K, S), {"matrix": floats(C, C)}, traced=False
        ),
        "partition": Call(
            clustering.partition,
            {"points": np.eye(C, dtype=np.float32), "centroids": np.eye(C, dtype=np.float32)},
            traced=False,
        ),
        "check_class_sets": Call(
            lambda class_sets: coverage.check_class_sets(class_sets, C),
            {"class_sets": SETS},
            traced=False,
        ),
        "statistics": Call(lambda sets: coverage.statistics(sets, C), {"sets": SETS}, traced=False),
        "mistakes_covered": Call(
            lambda **a: coverage.mistakes_covered(num_classes=C, **a),
            {"sets": SETS, "labels": LABELS, "predictions": LABELS},
            traced=False,
        ),
        "enriched_rows": Call(
            lambda **a: enrichment.enriched_rows(**a, num_classes=C),
            {"labels": np.arange(C, dtype=np.int32), "class_set": SETS[0]},
            traced=False,
        ),
    }
