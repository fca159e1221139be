"""Numbered views of images, and a teacher's logits of each: students see pairs that belong together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from distill_jax import (
    models,
    optimizers,
    platforms,
    soft_targets,
    step_losses,
    trainer,
    training_note,
)
from distill_jax.data import augment
from distill_jax.errors import UserError

N = 16
MODEL = models.mlp([7], tiny.CLASSES)
EXAMPLES = tiny.examples(N, side=5)
PARAMS = MODEL.init(jax.random.key(3), EXAMPLES["inputs"])
SCHEMES = {"shifts": augment.shifts(1), "distortions": augment.distortions(3, 1.0, seed=5)}


def written(folder, views, **options):
    more = {"ids": EXAMPLES["id"], "teacher": "t", "batch_size": 4, **options}
    soft_targets.write_views(folder, MODEL.apply, PARAMS, EXAMPLES["inputs"], views, **more)
    return soft_targets.load(folder)


def shown(views, batch, seed=0):
    return jax.jit(augment.random_view(views))(batch, jax.random.key(seed))


@pytest.mark.parametrize("shape", [(12, 9), (8, 8, 3)])
@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_a_tpu_s_way_to_shift_gives_the_same_images(shape, pixels):
    views, random = augment.shifts(pixels), np.random.default_rng(0)
    images = jnp.asarray(random.integers(0, 256, (60, *shape), np.uint8))
    numbers = jnp.asarray(random.integers(0, views.num_views, 60, np.int32))
    with platforms.compiling_for("tpu"):
        found = views.make(images, numbers, numbers)
    tiny.assert_equal(found, views.make(images, numbers, numbers))


def test_shifts_are_the_images_that_jitter_makes():
    images = jnp.asarray(EXAMPLES["inputs"][:1])
    views = augment.shifts(2)
    every = np.concatenate(
        [views.make(images, jnp.zeros(1, int), jnp.array([v])) for v in range(views.num_views)]
    )
    for v in range(25):
        down, right = 2 - v // 5, 2 - v % 5
        padded = np.pad(images[0], 2)
        rows, columns = slice(2 - down, 7 - down), slice(2 - right, 7 - right)
        np.testing.assert_array_equal(every[v], padded[rows, columns])
    np.testing.assert_array_equal(every[12], images[0])
    for seed in range(5):
        moved = augment.jitter(2)({"inputs": images}, jax.random.key(seed))["inputs"][0]
        assert (every == np.asarray(moved)).all(axis=(1, 2)).any()


def test_distortions_are_the_images_of_a_set_of_views():
    views = SCHEMES["distortions"]
    made = augment.views(EXAMPLES, 3, 1.0, seed=5)["inputs"].reshape(3, N, 5, 5)
    numbers = np.arange(N) % 3
    found = views.make(*map(jnp.asarray, (EXAMPLES["inputs"], EXAMPLES["id"], numbers)))
    np.testing.assert_array_equal(found, made[numbers, np.arange(N)])


@pytest.mark.parametrize("name", SCHEMES)
def test_an_example_is_shown_with_the_logits_of_the_same_view(name, tmp_path):
    views = SCHEMES[name]
    store = written(tmp_path, views)
    joined = soft_targets.attach(EXAMPLES, store, views=views)
    assert joined[views.field].shape == (N, views.num_views, tiny.CLASSES)
    assert (
        soft_targets.bytes_per_example(store) == 8 + 8 + 4 * views.num_views * tiny.CLASSES
    )  # and ids
    order = np.random.default_rng(0).permutation(N)
    images = []
    for seed in range(3):
        batch = shown(views, {field: value[order] for field, value in joined.items()}, seed)
        assert set(batch) == {*EXAMPLES, "teacher_logits"}
        expected = MODEL.apply(PARAMS, batch["inputs"])
        np.testing.assert_allclose(batch["teacher_logits"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(batch["label"], EXAMPLES["label"][order])
        images.append(np.asarray(batch["inputs"]))
    assert (images[0] != images[1]).any(axis=(1, 2)).sum() > N / 2  # others in each step
    alone = shown(views, EXAMPLES)
    assert set(alone) == set(EXAMPLES)


def test_a_training_on_views_has_pairs_that_belong_together(tmp_path):
    views = augment.shifts(1)
    joined = soft_targets.attach(EXAMPLES, written(tmp_path / "store", views), views=views)
    start = jax.tree.map(lambda leaf: jnp.stack([leaf]), PARAMS)

    def still(steps, epochs):
        return optimizers.sgd(lambda step: 0.0)

    def losses_of(transform, examples, name):
        recipe = {"epochs": 3, "batch_size": 8, "optimizer": still, "transforms": [transform]}
        nets = trainer.train(
            tmp_path / name,
            MODEL,
            examples,
            step_losses.logit_matching_loss,
            trainer.Recipe(**recipe),
            keys=jax.random.split(jax.random.key(0), 1),
            hyper={"learning_rate": 1.0},
            start=start,
        )
        return [record["train_loss"][0] for record in nets.history]

    # The student is the teacher: its loss is 0 if, and only if, both saw the same image.
    np.testing.assert_allclose(losses_of(augment.random_view(views), joined, "views"), 0, atol=1e-8)
    other = {**joined, views.field: np.roll(joined[views.field], 1, axis=1)}
    assert min(losses_of(augment.random_view(views), other, "other")) > 1e-4


@pytest.mark.parametrize("name", SCHEMES)
def test_a_training_notes_its_views(name):
    found = training_note.describe({"transform": augment.random_view(SCHEMES[name])}).fields
    assert found["transform.views.name"] == SCHEMES[name].name
    assert found["transform.views.num_views"] == SCHEMES[name].num_views


def test_views_are_never_joined_to_anything_else(tmp_path):
    views, plain = augment.shifts(1), tmp_path / "plain"
    store = written(tmp_path / "views", views)
    logits = np.zeros((N, tiny.CLASSES), np.float32)
    digests = soft_targets.digests(EXAMPLES["inputs"])
    soft_targets.write(plain, logits, digests, teacher="t", ids=EXAMPLES["id"])
    attach = soft_targets.attach
    for run, message in (
        (
            lambda: attach(EXAMPLES, store),
            r"are of 9 views shifts\(1\), .* joined to the inputs as",
        ),
        (
            lambda: attach(EXAMPLES, store, views=augment.shifts(2)),
            r"joined to 25 views shifts\(2\)",
        ),
        (
            lambda: attach(EXAMPLES, soft_targets.load(plain), views=views),
            r"are of the inputs as they are, .* joined to 9 views",
        ),
        (
            lambda: written(tmp_path / "views", augment.shifts(0)),
            r"views is .*'count': 9\} there and",
        ),
        (
            lambda: attach({**EXAMPLES, "inputs": EXAMPLES["inputs"][::-1]}, store, views=views),
            "not the inputs that teacher t saw",
        ),
    ):
        with pytest.raises(UserError, match=message):
            run()
    joined = attach(EXAMPLES, store, views=views)
    with pytest.raises(UserError, match="can't be joined to jittered images"):
        augment.jitter(1)(joined, jax.random.key(0))
    with pytest.raises(UserError, match="can't be joined to distorted images"):
        augment.views(joined, 2, 1.0, seed=0)
    for batch in (attach(EXAMPLES, soft_targets.load(plain)), shown(views, joined)):
        with pytest.raises(
            UserError, match=r"the batch has teacher_logits, which are not of the views"
        ):
            shown(views, batch)
    with pytest.raises(UserError, match=r"has teacher_logits of shifts\(1\), which are not of"):
        shown(augment.shifts(2), joined)
    with pytest.raises(UserError, match="the batch has no teacher_logits, only"):
        step_losses.logit_matching_loss(jnp.zeros((N, tiny.CLASSES)), joined, {})


def test_views_of_another_program_and_what_is_no_views(tmp_path):
    views = augment.shifts(1)
    logits = np.random.default_rng(0).random((N, 9, tiny.CLASSES))
    digests = soft_targets.digests(EXAMPLES["inputs"])
    soft_targets.write(tmp_path / "array", logits, digests, teacher="t", views=views)
    found = soft_targets.rows(soft_targets.load(tmp_path / "array"), [3], views=views)
    np.testing.assert_array_equal(found[views.field], logits[[3]].astype(np.float32))
    for changes, message in (
        (
            {"source": logits[:, :8]},
            r"logits are \(16, 8, 3\) for 16 digests; expected arrays \(16, 9, C\)",
        ),
        (
            {"encoding": "top_k", "k": 1, "temperatures": 1.0},
            "kept as the dense logits of one teacher",
        ),
        (
            {"source": [logits, logits], "mean": "geometric"},
            "kept as the dense logits of one teacher",
        ),
        (
            {"source": lambda rows: logits[rows, 0], "num_classes": 3},
            r"\(16, 3\) .* expected \(16, 9, 3\)",
        ),
    ):
        arguments = {"source": logits, "digests": digests, "teacher": "t", "views": views}
        with pytest.raises(UserError, match=message):
            soft_targets.write(tmp_path / "none", **{**arguments, **changes})
    with pytest.raises(UserError, match="expected numbers of 32 bits"):
        written(tmp_path / "none", views, ids=np.arange(N) + 2**40)
    for make in (lambda: augment.shifts(-1), lambda: augment.distortions(0, 1.0, 0)):
        with pytest.raises(UserError, match="allowed: a whole number"):
            make()
