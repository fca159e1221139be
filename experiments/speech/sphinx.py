"""The decoder in the pocketsphinx wheel: its files, its senones, and decoding with a net's scores.

The wheel's Python classes decode audio only with the wheel's own acoustic model. Its C library also
takes the scores of all senones (tied states of triphones) from a file, and ctypes reaches that. This
is the only file that knows the library's signatures. ctypes releases the interpreter's lock during a
call, so several decoders run in parallel threads. This module uses no JAX.
"""

import contextlib
import ctypes
import functools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from distill_jax.errors import UserError

MAX_COST = 32000
NATS_PER_COST = 1024 * float(np.log(1.0001))
"""Costs are int16 in steps of 1024 (a shift by 10 bits) of the logarithm of base 1.0001."""

_HEADER = "s3\nversion 0.1\nmdef_file none\nn_sen {}\nlogbase 1.000100\nendhdr\n"
_BYTE_ORDER = 0x11223344

Handle = int
"""A decoder: the address of the library's own structure."""


def model_file(*names: str) -> Path:
    """A file or folder of the wheel's model for American English.

    Raises:
        UserError: if pocketsphinx is not installed, or has no such file.
    """
    try:
        import pocketsphinx
    except ImportError as error:
        raise UserError(
            "decoding speech needs the package pocketsphinx 5, which is not installed: "
            "pip install -e '.[speech]'"
        ) from error
    path = Path(pocketsphinx.get_model_path(), "en-us", *names)
    if not path.exists():
        raise UserError(
            f"{path}: this file of pocketsphinx's model is missing; the wheel of pocketsphinx 5 has it"
        )
    return path


def acoustic_model() -> Path:
    """The folder of the wheel's acoustic model; its senones are the classes of the nets."""
    folder = model_file("en-us")
    model_file("en-us", "mdef")
    return folder


def dictionary() -> Path:
    """The wheel's pronunciations (CMU dictionary): lines of "word PH PH", "word(2) PH PH"."""
    return model_file("cmudict-en-us.dict")


class _Senones(NamedTuple):
    states: np.ndarray
    phones: list[str]


def num_senones() -> int:
    """Number of senones of the wheel's acoustic model (5126)."""
    return len(_senones().states)


def phone_states() -> np.ndarray:
    """Each senone's context-independent state.

    Returns:
        int32 `[num_senones]`. The first 126 senones are those states themselves: state k is senone k,
        three in a row to a phone.
    """
    return _senones().states.copy()


def phone_names() -> list[str]:
    """The phone that each senone belongs to: `[num_senones]`, as "AA", "SIL" or "+NSN+"."""
    return list(_senones().phones)


@functools.cache
def _senones() -> _Senones:
    library = _library()
    definition = library.bin_mdef_read(None, str(acoustic_model() / "mdef").encode())
    if not definition:
        raise UserError(f"{acoustic_model() / 'mdef'}: pocketsphinx can't read this file")
    with tempfile.TemporaryDirectory() as directory:
        text = Path(directory, "mdef.txt")
        library.bin_mdef_write_text(definition, str(text).encode())
        lines = text.read_text().splitlines()
    library.bin_mdef_free(definition)
    # Phones, then triphones: base, left, right, position, attribute, matrix, 3 senones, "N".
    rows = [line.split() for line in lines if line.endswith(" N") and line[0] != "#"]
    states: dict[int, int] = {}
    phones: dict[int, str] = {}
    own: dict[str, list[str]] = {}
    for row in rows:
        numbers = row[6:-1]
        for senone, state in zip(numbers, own.setdefault(row[0], numbers), strict=True):
            states[int(senone)] = int(state)
            phones[int(senone)] = row[0]
    size = len(states)
    return _Senones(
        np.array([states[senone] for senone in range(size)], np.int32),
        [phones[senone] for senone in range(size)],
    )


@contextlib.contextmanager
def open_decoder(options: Mapping[str, Any]) -> Iterator[Handle]:
    """Opens a decoder; only one thread at a time may use it.

    Args:
        options: the library's own: "lm", "dict", "lw", "beam" and so on.

    Raises:
        UserError: if the library rejects these options or can't read the files that they name.
    """
    library = _library()
    settings = {
        "hmm": str(acoustic_model()),
        "dict": str(dictionary()),
        "cmn": "batch",  # per utterance, so that results do not depend on earlier ones
        "compallsen": True,  # all scores of a frame are given, and read once
        "pl_window": 0,  # a look-ahead would need frames that were not read yet
        "loglevel": "FATAL",
        **options,
    }
    for name in ("dict", "lm"):
        if name in settings and not Path(settings[name]).is_file():
            raise UserError(f"{settings[name]}: no such file, to be the decoder's {name!r}")
    config = library.ps_config_parse_json(None, json.dumps(settings).encode())
    handle = library.ps_init(config) if config else None
    if config:
        library.ps_config_free(config)  # the decoder keeps its own reference
    if not handle:
        raise UserError(f"pocketsphinx can't make a decoder with the options {dict(options)}")
    try:
        yield handle
    finally:
        library.ps_free(handle)


def decode_costs(handle: Handle, costs: np.ndarray) -> str:
    """Decodes the senone scores of one utterance.

    Args:
        handle: from `open_decoder`.
        costs: int16 `[n, num_senones]` in 0..MAX_COST: the log-score of a frame's best senone minus
            that of each senone, in steps of NATS_PER_COST.

    Returns:
        Words separated by spaces; "" if the decoder finds none, and for no frames.
    """
    if not len(costs):
        return ""
    library = _library()
    # Each frame: how many senones follow (all), then their costs.
    records = np.empty((len(costs), costs.shape[1] + 1), np.int16)
    records[:, 0] = costs.shape[1]
    records[:, 1:] = costs
    header = _HEADER.format(costs.shape[1]).encode() + _BYTE_ORDER.to_bytes(4, sys.byteorder)
    data = header + records.tobytes()
    system = _system()
    stream = system.fmemopen(data, len(data), b"rb")
    if not stream:
        raise OSError(ctypes.get_errno(), "fmemopen failed")
    try:
        frames = library.ps_decode_senscr(handle, stream)
    finally:
        system.fclose(stream)
    if frames != len(costs):
        raise RuntimeError(f"pocketsphinx took {frames} of {len(costs)} frames of senone scores")
    return _hypothesis(handle)


def decode_samples(handle: Handle, samples: np.ndarray) -> str:
    """Decodes audio with the decoder's own acoustic model.

    Args:
        handle: from `open_decoder`.
        samples: int16 `[n]` at 16 kHz, a whole utterance.

    Returns:
        As `decode_costs`.
    """
    library = _library()
    samples = np.ascontiguousarray(samples)
    library.ps_start_stream(handle)  # forgets the noise of the previous utterance
    if library.ps_start_utt(handle) < 0:
        raise RuntimeError("pocketsphinx can't start an utterance")
    try:
        library.ps_process_raw(handle, samples.ctypes.data, len(samples), 0, 1)
    finally:
        library.ps_end_utt(handle)
    return _hypothesis(handle)


def _hypothesis(handle: Handle) -> str:
    score = ctypes.c_int32()
    words = _library().ps_get_hyp(handle, ctypes.byref(score))
    return (words or b"").decode()


@functools.cache
def _library() -> Any:
    model_file()  # for its message
    from pocketsphinx import _pocketsphinx

    library = ctypes.CDLL(_pocketsphinx.__file__)
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    _declare(library.ps_config_parse_json, pointer, pointer, text)
    _declare(library.ps_config_free, integer, pointer)
    _declare(library.ps_init, pointer, pointer)
    _declare(library.ps_free, integer, pointer)
    _declare(library.ps_decode_senscr, integer, pointer, pointer)
    _declare(library.ps_start_stream, integer, pointer)
    _declare(library.ps_start_utt, integer, pointer)
    _declare(library.ps_process_raw, integer, pointer, pointer, ctypes.c_size_t, integer, integer)
    _declare(library.ps_end_utt, integer, pointer)
    _declare(library.ps_get_hyp, text, pointer, ctypes.POINTER(ctypes.c_int32))
    _declare(library.bin_mdef_read, pointer, pointer, text)
    _declare(library.bin_mdef_write_text, integer, pointer, text)
    _declare(library.bin_mdef_free, integer, pointer)
    _declare(library.err_set_loglevel_str, text, text)
    library.err_set_loglevel_str(b"FATAL")
    return library


@functools.cache
def _system() -> Any:
    system = ctypes.CDLL(None, use_errno=True)
    _declare(system.fmemopen, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p)
    _declare(system.fclose, ctypes.c_int, ctypes.c_void_p)
    return system


def _declare(function: Any, result: Any, *arguments: Any) -> None:
    function.restype, function.argtypes = result, arguments
