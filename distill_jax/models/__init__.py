"""Networks as pure functions; the only package that imports flax.

`model` says what a model is. `ready` has models that a net's folder describes, whose Flax modules are in
`modules`. `linen` and `nnx` make models of any Flax modules.
"""

from distill_jax.models.linen import from_linen as from_linen
from distill_jax.models.model import Model as Model
from distill_jax.models.model import Params as Params
from distill_jax.models.model import Variables as Variables
from distill_jax.models.model import chain as chain
from distill_jax.models.model import head_params as head_params
from distill_jax.models.model import join as join
from distill_jax.models.model import parameter_count as parameter_count
from distill_jax.models.model import run as run
from distill_jax.models.model import split as split
from distill_jax.models.modules import Activation as Activation
from distill_jax.models.modules import dropout as dropout
from distill_jax.models.modules import patches as patches
from distill_jax.models.nnx import from_nnx as from_nnx
from distill_jax.models.ready import ACTIVATIONS as ACTIVATIONS
from distill_jax.models.ready import build as build
from distill_jax.models.ready import conv_trunk as conv_trunk
from distill_jax.models.ready import gradient_dtype as gradient_dtype
from distill_jax.models.ready import mlp as mlp
from distill_jax.models.ready import resnet as resnet
