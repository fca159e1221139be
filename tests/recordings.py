"""Recordings made up for tests."""

import io
import pickle

import soundfile


def audio_bytes(samples, rate, kind="FLAC"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def by_id(recordings):
    assert len({recording.id for recording in recordings}) == len(recordings)
    return {recording.id: recording for recording in pickle.loads(pickle.dumps(recordings))}
