"""What is wrong with a command before it begins ends it with one line."""

import sys
from pathlib import Path

import pytest
from absl import flags
from command import ROOT

from launch import command, sweep  # noqa: F401 - defines the flags

CONFIG = f"{ROOT}/experiments/mnist/config.py"
FILES = {
    "syntax.py": "def get_config(:\n",
    "imports.py": "import nosuch\n",
    "raises.py": "def get_config(name=''):\n    return {}['a']\n",
    "none.py": "",
    "number.py": "def get_config(name=''):\n    return 3\n",
}


@pytest.fixture
def message_of(tmp_path, monkeypatch):
    """The one line that a command ends with, in a folder with some config files."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    for name in flags.FLAGS:  # those of other commands, which other tests imported, may be required
        if not (flags.FLAGS.find_module_defining_flag(name) or "").startswith("launch."):
            monkeypatch.setattr(flags.FLAGS[name], "validators", [])

    def run(*words):
        argv = ["launch.sweep", "--workdir=run", *words]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for fields
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the last config file
        flags.FLAGS.unparse_flags()
        with pytest.raises(SystemExit) as ended:
            command._parse(argv)
        assert str(ended.value).startswith("error: ") and "\n" not in str(ended.value)
        return str(ended.value)

    return run


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
@pytest.mark.parametrize("more", [(), ("--config.seeds=(0,)",)])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("experiments/mnist/config.py:smoke", "no config file 'experiments/mnist/config.py'"),
        ("", "no config file '.'"),
        (".", "no config file '.'"),
        ("syntax.py", "--config=syntax.py: invalid syntax (syntax.py, line 1)"),
        ("imports.py", "ModuleNotFoundError: No module named 'nosuch' (imports.py, line 1)"),
        ("raises.py", "KeyError: 'a' (raises.py, line 2)"),
        ("none.py", "has no attribute 'get_config'"),
        (f"{CONFIG}:tiny", "error: no preset 'tiny'; there are smoke, default, full, paper"),
    ],
)
def test_a_config_that_can_not_be_read(message_of, config, message, more):
    assert message in message_of(f"--config={config}", *more)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config=number.py"], "get_config gives no ConfigDict"),
        (
            [f"--config={CONFIG}", "--config.techer.epochs=1"],
            "epochs: no such field; did you mean te",
        ),
        ([f"--config={CONFIG}", "--config.seeds.x=1"], "--config.seeds.x: tuple indices"),
        ([f"--config={CONFIG}", "--config.teacher=1"], "--config.teacher=1"),
        ([f"--config={CONFIG}", *["--config.seeds=(1,)"] * 2], "seeds is given 2 times: give all"),
        ([f"--config={CONFIG}", "--nosuch"], "Unknown command line flag 'nosuch'"),
        ([f"--config={CONFIG}", "--stages="], "names of stages are expected"),
        ([f"--config={CONFIG}", "--stages=teacher,,"], "names of stages are expected"),
        (["--config.seeds=1", f"--config={CONFIG}"], "before a value for --config"),
    ],
)
def test_flags_that_are_wrong(message_of, words, message):
    assert message in message_of(*words)
