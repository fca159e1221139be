"""Trained nets, and the folders that they are kept in.

A folder holds

    params.npz    the parameters by their paths, such as "hidden_0/kernel", each `[M, ...]`; of a model
                  with state "params/hidden_0/kernel", and "state/..." besides; and a few inputs. A "/"
                  within a name is written %2F. net.json has another name, if the net replaced one
    net.json      the model's description, the inputs' shape, history, config, fingerprint; written last

and whatever training keeps beside them. NumPy has no bfloat16: such an array is stored as its bits.
"""

import json
import os
import secrets
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from distill_jax import files, losses, models, processes, soft_targets
from distill_jax.batches import count_rows
from distill_jax.errors import UserError
from distill_jax.models import Model, Params, Variables

FORMAT = ("distill_jax.net", 1)
FILES = _META, _PARAMS = "net.json", "params.npz"
_INPUTS = "inputs"


class Net(NamedTuple):
    """M trained nets of one model, such as the seeds of a study or an ensemble's members; or one net.

    model: of all. params: what `model.apply` takes, so `models.Variables` of a model with state; each
    leaf `[M, ...]`; of one net without that axis. history: a record after
    each report of the training (`loop.Record`), lists over members or one net's numbers. seconds: of the
    training of all. members: M, or None for one net. about: what else is kept in net.json, "config",
    "inputs" {"shape", "dtype"} (or a tree of such) and "num_classes" among it.
    """

    model: Model
    params: Params | Variables
    history: list[dict[str, Any]]
    seconds: float
    members: int | None
    about: dict[str, Any]

    def member(self, m: int) -> "Net":
        """One of the nets, 0..M-1.

        Raises:
            UserError: if there is no such member.
        """
        if self.members is None or not 0 <= m < self.members:
            raise UserError(f"no member {m}; the folder holds {self.members or 1}, numbered from 0")
        history = [
            {name: x[m] if _is_per_member(x, self.members) else x for name, x in record.items()}
            for record in self.history
        ]
        params = jax.tree.map(lambda leaf: leaf[m], self.params)
        return self._replace(params=params, history=history, members=None)

    def some(self, first: int, count: int) -> "Net":
        """Members first..first+count-1 as a `Net` of their own, without their history."""
        params = jax.tree.map(lambda leaf: leaf[first : first + count], self.params)
        return self._replace(params=params, history=[], members=count)

    def logits(self, inputs: Any, batch_size: int = 1000) -> np.ndarray:
        """Logits float32 of inputs `[N, ...]`, in evaluation mode: `[N, C]`, of M nets `[M, N, C]`.

        The inputs may be a tree of arrays, if the model takes that.
        """
        if self.members is not None:
            each = [self.member(m).logits(inputs, batch_size) for m in range(self.members)]
            return np.stack(each)
        self._check_inputs(inputs)
        return soft_targets.logits_over(self.model.apply, self.params, inputs, batch_size)

    def probabilities(self, inputs: Any, temperature: float = 1.0) -> np.ndarray:
        """The softmax of `logits` at a temperature (Eq. 1)."""
        return np.asarray(losses.softmax(jnp.asarray(self.logits(inputs)), temperature))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that name these parameters and this config."""
        return soft_targets.fingerprint(self.params, self.about.get("config") or {})

    def _check_inputs(self, inputs: Any) -> None:
        count_rows(inputs)
        expected = self.about.get("inputs")
        if not expected:
            return
        found, known = _shapes_of(describe_inputs(inputs)), _shapes_of(expected)
        if found != known:
            raise UserError(f"inputs are {found} each, but the net was trained on {known} each")


def stack(nets: Sequence[Net]) -> Net:
    """The members of several trainings of one model as one `Net`; of the history, the last record."""
    params = jax.tree.map(lambda *leaves: np.concatenate(leaves), *[net.params for net in nets])
    last = [net.history[-1] for net in nets if net.history]
    per_member = [name for name, x in last[0].items() if isinstance(x, list)] if last else []
    record = {name: [x for one in last for x in one[name]] for name in per_member}
    return nets[0]._replace(
        params=params,
        history=[record],
        seconds=sum(net.seconds for net in nets),
        members=sum(net.members or 0 for net in nets),
    )


@processes.main_only
def save(
    folder: str | os.PathLike[str], net: Net, *, inputs: Any = None, overwrite: bool = False
) -> None:
    """Writes a net's two files into a folder, each whole; what else is there stays.

    Args:
        folder: made if it isn't there.
        net: whose parameters, and state if there is one, are nested dicts of arrays.
        inputs: a few real ones `[N, ...]`, or a dict of such, to try the net on (`load_inputs`).
        overwrite: replaces another net, in one step: a kill leaves the old or the new one.

    Raises:
        UserError: for a folder that holds another net, or a net.json that is none; for parameters that
            are not nested dicts of arrays.
    """
    folder = files.local_path(folder)
    files.check_writable(folder, "folder")
    folder.mkdir(parents=True, exist_ok=True)
    stored = net if net.members is not None else _with_member_axis(net)
    before = read_meta(folder) if exists(folder) else None
    if before and not overwrite:
        files.check_same(
            f"{folder} holds another net",
            before,
            {"fingerprint": stored.fingerprint},
            "Name another folder, or replace it with overwrite=True",
        )
    path = folder / _PARAMS
    if path.exists():  # until the new net.json names the new file, the old one names the old
        path = folder / f"params.{secrets.token_hex(4)}.npz"
    dtypes = save_params(path, _as_dict(stored.params), _named_inputs(inputs))
    kept: dict[str, Any] = {"file": path.name, "sha256": files.sha256(path), "dtypes": dtypes}
    if isinstance(stored.params, Variables):
        kept["has_state"] = True
    meta = {
        "model": describe(stored.model),
        "members": stored.members,
        "parameters": kept,
        "fingerprint": stored.fingerprint,
        "seconds": stored.seconds,
        **stored.about,
        "history": stored.history,
    }
    files.write_sealed(folder / _META, FORMAT, meta)
    if before:
        files.remove(_params_of(folder, before))


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a finished net."""
    return (files.local_path(folder) / _META).exists()


def load(folder: str | os.PathLike[str], model: Model | None = None) -> Net:
    """Reads all members of a finished training; parameters are arrays of NumPy.

    Args:
        folder: of the training, or one that `save` wrote.
        model: where the net's model is one of your own; else it is made from its description.

    Raises:
        UserError: for a folder without a net, another version, a damaged file, a model of your own that
            is not handed in, or one that the parameters don't fit.
    """
    folder = files.local_path(folder)
    meta = read_meta(folder)
    kept = meta["parameters"]
    path = _params_of(folder, meta)
    files.check_sha256(path, kept["sha256"], "train the net again, or copy it again")
    params = load_params(path, kept["dtypes"])
    if kept.get("has_state"):
        params = Variables(params.get("params", {}), params["state"])
    known = {"format", "version", "model", "members", "parameters", "fingerprint"}
    about = {name: x for name, x in meta.items() if name not in known | {"history", "seconds"}}
    net = Net(
        _model_of(folder, meta, model),
        params,
        meta["history"],
        meta["seconds"],
        meta["members"],
        about,
    )
    _check_params(folder, net)
    return net


def load_net(folder: str | os.PathLike[str], member: int = 0, model: Model | None = None) -> Net:
    """Reads one trained net: its `logits`, `probabilities`, `params`, `model` and `history`.

    No config, data set or training code is needed.

    Args:
        folder: of a finished training, such as `runs/mnist/stages/distilled/distilled`.
        member: which one, where several nets were trained together: seeds, temperatures.
        model: where it is a model of your own.

    Raises:
        UserError: as `load` does, or for a member that is not there.
    """
    return load(folder, model).member(member)


def load_inputs(folder: str | os.PathLike[str]) -> Any:
    """The few real inputs that a net's folder holds: an array `[N, ...]` or a dict; None without any.

    Raises:
        UserError: as `read_meta` does, or for a damaged file.
    """
    folder = files.local_path(folder)
    meta = read_meta(folder)
    path = _params_of(folder, meta)
    files.check_sha256(path, meta["parameters"]["sha256"], "train the net again")
    with np.load(path) as stored:
        names = [name for name in stored.files if name.split(":")[0] == _INPUTS]
        found = {name.partition(":")[2]: stored[name] for name in names}
    return found.get("", _nested(found)) if found else None


def describe(model: Model) -> Any:
    """A model's description as plain data; None for a model of one's own."""
    return json.loads(model.description or "null")


def describe_inputs(inputs: Any) -> Any:
    """The shape and dtype of an input, of a batch `[B, ...]` of them or a tree of such, as plain data.

    Examples:
        >>> describe_inputs({"tokens": np.zeros((2, 7), np.int32)})
        {'tokens': {'shape': [7], 'dtype': 'int32'}}
    """
    return jax.tree.map(lambda x: {"shape": list(x.shape[1:]), "dtype": x.dtype.name}, inputs)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON-able config as it is read back: tuples are lists; a UserError if it isn't JSON-able."""
    try:
        return json.loads(json.dumps(dict(config)))
    except (TypeError, ValueError) as error:
        raise UserError(f"config is not JSON-able: {error}") from error


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a folder says of its net, without the parameters: "history", "config" and so on.

    Raises:
        UserError: for a folder without a net, another version, or a damaged file.
    """
    again = "expected the folder of a finished training"
    return files.read_sealed(files.local_path(folder) / _META, FORMAT, again)


def save_params(
    path: Path, params: Params, others: Mapping[str, np.ndarray] = types.MappingProxyType({})
) -> dict[str, str]:
    """Writes nested dicts of arrays as an npz file, whole; gives each array's dtype by its path.

    Other arrays are kept under their own names, and aren't read by `load_params`.

    Raises:
        UserError: for parameters that are not nested dicts, whose keys are text.
    """
    leaves = _by_path(params)
    plain: dict[str, Any] = dict(others) | {name: _plain(leaf) for name, leaf in leaves.items()}
    with files.write_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **plain)
    return {name: leaf.dtype.name for name, leaf in leaves.items()}


def load_params(path: Path, dtypes: Mapping[str, str]) -> Params:
    """Reads what `save_params` wrote."""
    with np.load(path) as stored:
        return _nested(
            {name: stored[name].view(jnp.dtype(dtype)) for name, dtype in dtypes.items()}
        )


def _named_inputs(inputs: Any) -> dict[str, np.ndarray]:
    """Inputs by the names that they are kept under, "inputs:" and the path in a dict."""
    if inputs is None:
        return {}
    leaves = _paths(inputs) if isinstance(inputs, Mapping) else [("", inputs)]
    return {f"{_INPUTS}:{name}": np.asarray(leaf) for name, leaf in leaves}


def _params_of(folder: Path, meta: Mapping[str, Any]) -> Path:
    return folder / meta["parameters"].get("file", _PARAMS)


def _with_member_axis(net: Net) -> Net:
    numbers = {"unit", "seconds", "epoch"}  # which are no member's
    history = [
        {name: x if name in numbers else [x] for name, x in record.items()}
        for record in net.history
    ]
    params = jax.tree.map(lambda leaf: np.asarray(leaf)[None], net.params)
    return net._replace(params=params, history=history, members=1)


def _is_per_member(value: Any, members: int) -> bool:
    return isinstance(value, list) and len(value) == members


def _model_of(folder: Path, meta: Mapping[str, Any], model: Model | None) -> Model:
    if model is not None:
        return model
    if meta["model"] is None:
        raise UserError(
            f"the net in {folder} has a model of your own, which its folder can't describe: hand it in, "
            "as in load_net(folder, model=...)"
        )
    return models.build(json.dumps(meta["model"]))


def _check_params(folder: Path, net: Net) -> None:
    """Raises a UserError if the model has other parameters than the folder."""
    inputs = net.about.get("inputs")
    if not inputs:
        return
    sample = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((1, *x["shape"]), x["dtype"]), inputs, is_leaf=_is_described
    )
    expected = jax.eval_shape(net.model.init, jax.random.key(0), sample)
    there = {name: list(leaf.shape[1:]) for name, leaf in _by_path(_as_dict(net.params)).items()}
    now = {name: list(leaf.shape) for name, leaf in _paths(_as_dict(expected))}
    lacking = {name: None for name in there if name not in now}
    files.check_same(f"the net in {folder} does not fit the model", there, {**now, **lacking})


def _is_described(tree: Any) -> bool:
    return isinstance(tree, Mapping) and set(tree) == {"shape", "dtype"}


def _shapes_of(described: Any) -> Any:
    """The shapes alone; tuples, which JSON doesn't have, as lists."""
    if _is_described(described):
        return described["shape"]
    if isinstance(described, Mapping):
        return {name: _shapes_of(part) for name, part in sorted(described.items())}
    return [_shapes_of(part) for part in described]


def _as_dict(variables: Params | Variables) -> Params:
    """The params, or a dict of them and of the state."""
    return variables._asdict() if isinstance(variables, Variables) else variables


def check_storable(variables: Params | Variables) -> None:
    """Raises a UserError if `save` couldn't hold a model's variables, of which shapes are enough."""
    _paths(_as_dict(variables))


def _paths(params: Params) -> list[tuple[str, Any]]:
    """The leaves of nested dicts with their names, joined by slashes; those in a name are escaped."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names: list[Any] = [getattr(entry, "key", None) for entry in path]
        if not names or not all(isinstance(name, str) for name in names):
            raise UserError(
                "parameters must be nested dicts, whose keys are text, but there is a leaf at "
                f"params{jax.tree_util.keystr(path)}"
            )
        escaped = [name.replace("%", "%25").replace("/", "%2F") for name in names]
        found.append(("/".join(escaped), leaf))
    dtypes = {name: getattr(leaf, "dtype", np.dtype(float)) for name, leaf in found}
    keys = [name for name, x in dtypes.items() if jnp.issubdtype(x, jax.dtypes.prng_key)]
    if keys:
        raise UserError(
            f"parameters {', '.join(keys)} are random keys, which a net's file can't hold"
        )
    return found


def _by_path(params: Params) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in _paths(params)}


def _nested(leaves: Mapping[str, np.ndarray]) -> Params:
    """The inverse of `_by_path`."""
    params: Params = {}
    for path, leaf in leaves.items():
        *outer, name = [part.replace("%2F", "/").replace("%25", "%") for part in path.split("/")]
        place = params
        for key in outer:
            place = place.setdefault(key, {})
        place[name] = leaf
    return params


def _plain(leaf: np.ndarray) -> np.ndarray:
    """An array of a dtype that NumPy's files know, of the same bits."""
    return leaf if leaf.dtype.isbuiltin == 1 else leaf.view(f"uint{8 * leaf.dtype.itemsize}")
