"""A study without its packages ends with one line."""

from importlib import metadata

import pytest

from distill_jax.errors import UserError
from experiments.common import extras


def hide(monkeypatch, *packages):
    """Makes packages look as if they weren't installed."""
    find = metadata.distribution

    def distribution(name):
        if name in packages:
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(metadata, "distribution", distribution)


@pytest.mark.parametrize("study", ["mnist", "speech", "specialists"])
def test_a_study_with_all_packages_is_imported(study):
    name = f"experiments.{study}.study"
    assert extras.import_study(name).__name__ == name


@pytest.mark.parametrize(
    "study, package, extra",
    [
        ("mnist", "matplotlib", "report"),
        ("speech", "jiwer", "speech"),
        ("speech", "jinja2", "speech"),  # an extra has all that a study needs
        ("specialists", "fonttools", "specialists"),
    ],
)
def test_missing_packages_are_named_with_the_command(monkeypatch, study, package, extra):
    hide(monkeypatch, package)
    with pytest.raises(UserError) as raised:
        extras.import_study(f"experiments.{study}.study")
    expected = f"experiments.{study}.study needs {package}: pip install -e '.[{extra}]'"
    assert str(raised.value) == expected


def test_a_study_does_not_need_another_study_s_packages(monkeypatch):
    hide(monkeypatch, "pocketsphinx", "fonttools")
    extras.import_study("experiments.mnist.study")


def test_a_command_without_its_packages_ends_with_one_line(monkeypatch):
    extras.exit_without("speech")
    hide(monkeypatch, "pocketsphinx")
    with pytest.raises(SystemExit) as raised:
        extras.exit_without("speech")
    assert raised.value.code == (
        "error: this command needs pocketsphinx: pip install -e '.[speech]'"
    )
