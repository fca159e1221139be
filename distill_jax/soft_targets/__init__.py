"""Soft targets: made once by a frozen teacher, stored by example id, joined to the examples.

    logits = soft_targets.logits_over(model.apply, params, inputs)
    soft_targets.write(folder, logits, soft_targets.digests(inputs), teacher="my teacher")
    examples = soft_targets.attach(examples, soft_targets.load(folder))

`writer` writes stores, `top_k_writer` those of a few log-probabilities, `views` those of augmented
views; `store` reads and joins them; `encodings` is what they keep of an example; `ensemble` has the
means of several teachers, `class_maps` is for other classes than the student's; `compare` measures what
an encoding changes.
"""

from distill_jax.soft_targets import compare as compare
from distill_jax.soft_targets.class_maps import map_classes as map_classes
from distill_jax.soft_targets.encodings import TOP_K_FIELDS as TOP_K_FIELDS
from distill_jax.soft_targets.encodings import Encoding as Encoding
from distill_jax.soft_targets.encodings import Kept as Kept
from distill_jax.soft_targets.encodings import as_targets as as_targets
from distill_jax.soft_targets.encodings import densify as densify
from distill_jax.soft_targets.encodings import most_draws as most_draws
from distill_jax.soft_targets.encodings import offsets as offsets
from distill_jax.soft_targets.encodings import sample as sample
from distill_jax.soft_targets.encodings import top_k as top_k
from distill_jax.soft_targets.ensemble import Mean as Mean
from distill_jax.soft_targets.ensemble import ensemble_logits as ensemble_logits
from distill_jax.soft_targets.ensemble import logits_over as logits_over
from distill_jax.soft_targets.ensemble import mean_log_probs as mean_log_probs
from distill_jax.soft_targets.ensemble import mean_probs as mean_probs
from distill_jax.soft_targets.ensemble import mean_probs_of_hidden as mean_probs_of_hidden
from distill_jax.soft_targets.identity import digests as digests
from distill_jax.soft_targets.identity import fingerprint as fingerprint
from distill_jax.soft_targets.shard_writer import finish as finish
from distill_jax.soft_targets.store import Store as Store
from distill_jax.soft_targets.store import attach as attach
from distill_jax.soft_targets.store import bytes_per_example as bytes_per_example
from distill_jax.soft_targets.store import check as check
from distill_jax.soft_targets.store import load as load
from distill_jax.soft_targets.store import rows as rows
from distill_jax.soft_targets.top_k_writer import write_top_k as write_top_k
from distill_jax.soft_targets.views import write_views as write_views
from distill_jax.soft_targets.writer import write as write
