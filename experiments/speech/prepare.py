"""Prepares a corpus: recordings and transcripts in, the data set `speech_frames` out.

    python -m experiments.speech.prepare --corpus=debian --out=DIR
    python -m experiments.speech.prepare --corpus=librispeech:FOLDER --out=DIR
    python -m experiments.speech.prepare --corpus=manifest:FILE.jsonl --out=DIR

Every recording is aligned with its transcript, on all cores: on two, about 60 times real time.
The same command resumes a killed one. `--config.data.source=DIR` then trains on it.
"""

from pathlib import Path

from absl import flags

from distill_jax import files
from distill_jax.command import run
from distill_jax.errors import UserError
from experiments.common import extras

extras.exit_without("speech")

from experiments.speech.corpus import debian, librispeech, manifest, pipeline  # noqa: E402
from experiments.speech.corpus.recordings import Recording  # noqa: E402

_CORPUS = flags.DEFINE_string(
    "corpus",
    "debian",
    "debian (recorded English in two Debian packages), librispeech:FOLDER, tfds:NAME (LibriSpeech as "
    "prepared by TFDS) or manifest:FILE.jsonl, a line of audio, text and, if known, id, speaker, scene, "
    "split for each recording.",
)
_OUT = flags.DEFINE_string(
    "out", None, "Folder for the set and its unfinished work.", required=True
)
_PROCESSES = flags.DEFINE_integer(
    "processes", 0, "Processes that align; 0 for one per core.", lower_bound=0
)
_HIGH = flags.DEFINE_float(
    "high_frequency",
    0.0,
    "Upper edge of the mel bands, Hz; 0: 5000 for debian, whose recordings "
    "hold nothing above, else 7600.",
    lower_bound=0.0,
)
_FRAMES = {
    split: flags.DEFINE_integer(
        f"{split}_frames", 0, f"Frames of {split} to keep; 0 for all.", lower_bound=0
    )
    for split in pipeline.SPLITS
}
_AUDIO_WORDS = flags.DEFINE_integer(
    "audio_words",
    10_000,
    "Words of test whose recordings are kept in the set, for the decoder's own acoustic model to be "
    "compared with; -1 for all.",
    lower_bound=-1,
)


def recordings(corpus: str, out: Path) -> list[Recording]:
    """The recordings of the corpus named by --corpus."""
    kind, _, where = corpus.partition(":")
    if kind == "debian" and not where:
        return debian.recordings(out / "packages")
    readers = {
        "librispeech": lambda: librispeech.recordings(files.local_path(where)),
        "tfds": lambda: librispeech.tfds_recordings(where),
        "manifest": lambda: manifest.recordings(files.local_path(where)),
    }
    if kind not in readers or not where:
        raise UserError(
            f"--corpus={corpus}: expected debian, librispeech:FOLDER, tfds:NAME or manifest:FILE.jsonl"
        )
    return readers[kind]()


def main() -> None:
    """Runs the command."""
    out, debian_set = files.local_path(_OUT.value), _CORPUS.value == "debian"
    files.check_writable(out, "--out")
    folder = pipeline.prepare(
        _CORPUS.value,
        recordings(_CORPUS.value, out),
        out,
        high_frequency=_HIGH.value or (5000.0 if debian_set else 7600.0),
        frames={split: flag.value for split, flag in _FRAMES.items()},
        audio_words=_AUDIO_WORDS.value,
        processes=_PROCESSES.value,
    )
    print(f"prepared {folder}")


if __name__ == "__main__":
    run(main)
