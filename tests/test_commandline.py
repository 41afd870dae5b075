"""Flags that are mistyped: one line, status 1, and the name that was meant."""

import subprocess
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from srlm_jax import commandline
from srlm_jax.pipeline.settings import Settings, field_names

# How ml_collections loads a configuration.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ITER2 = "--config=configs/iter2.py"


@pytest.fixture
def parse(monkeypatch):
    """Parses the arguments of a command that has the flags `config`, `redo` and `debug`."""

    def parse(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        flags.DEFINE_string("redo", None, "", flag_values=values)
        flags.DEFINE_bool("debug", False, "", flag_values=values)
        flags.mark_flag_as_required("config", flag_values=values)
        argv = ["main.py", *arguments]
        monkeypatch.setattr(commandline.flags, "FLAGS", values)
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # the configuration of the last test
        return commandline.parse_flags(argv, field_names(Settings, "config")), values

    return parse


@pytest.fixture
def refusal(parse):
    """The line of arguments that are refused."""

    def refusal(*arguments):
        with pytest.raises(SystemExit) as stopped:
            parse(*arguments)
        assert isinstance(stopped.value.code, str)  # which Python prints on stderr, with status 1
        return stopped.value.code

    return refusal


def test_good_flags_are_parsed(parse):
    left, values = parse("--config", "configs/iter2.py:smoke", "--config.engine.rows=7", "--redo=m1/eval", "more")
    assert left == ["main.py", "more"]
    assert (values.config.engine.rows, values.redo) == (7, "m1/eval")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--confg=configs/iter2.py"], "error: --confg: no such flag; did you mean --config?"),
        ([ITER2, "--rdo=m1/eval"], "error: --rdo: no such flag; did you mean --redo?"),
        ([ITER2, "--zzzz"], "error: --zzzz: no such flag"),
        ([], "error: --config is not given"),
        (["--config"], "error: Missing value for flag --config"),
        (
            ["--config.engine.rows=3"],
            "error: --config.engine.rows is given, and --config is not: name the configuration with --config=FILE",
        ),
        (["--config=configs"], "error: --config=configs: is a folder; name one of its files"),
        (
            ["--config=configs/itr1.py:tiny"],
            "error: --config=configs/itr1.py:tiny: no such file; did you mean configs/iter1.py?",
        ),
        (["--config=nowhere/at/all.py"], "error: --config=nowhere/at/all.py: no such file"),
        ([ITER2, "--config.engine.rows=many"], "error: --config.engine.rows=many: must be a whole number"),
        ([ITER2, "--config.engine.rows=7.5"], "error: --config.engine.rows=7.5: must be a whole number"),
        ([ITER2, "--config.lora.rank=many"], "error: --config.lora.rank=many: must be a whole number"),
        ([ITER2, "--config.dpo.beta=big"], "error: --config.dpo.beta=big: must be a number"),
        ([ITER2, "--config.packed=maybe"], "error: --config.packed=maybe: must be true or false"),
        ([ITER2, "--config.engine=3"], "error: --config.engine=3: is a group of fields; set one of them"),
        (
            [ITER2, "--config.dpo.betta=0.2"],
            "error: --config.dpo.betta: no such field; did you mean --config.dpo.beta?",
        ),
        (
            [ITER2, "--config.engine.rows.most=3"],
            "error: --config.engine.rows.most: no such field; did you mean --config.engine.rows?",
        ),
    ],
)
def test_a_mistyped_flag_is_one_line(refusal, arguments, line):
    assert refusal(*arguments) == line


@pytest.mark.parametrize(
    ("scale", "meant"), [("tinny", "tiny"), ("lama2_7b", "llama2_7b"), ("smollm2", "smollm2_360m")]
)
def test_an_unknown_scale_is_one_line_with_the_nearest(refusal, scale, meant):
    line = refusal(f"{ITER2}:{scale}")
    assert line.startswith(f"error: {ITER2}:{scale}: unknown scale '{scale}' after the config's colon")
    assert f"did you mean '{meant}'? There are tiny, smoke, " in line and "\n" not in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("M0 → M1", "SyntaxError: invalid character '→' (U+2192)"),
        ("def get_config():\n    return missing", "NameError: name 'missing' is not defined"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("x = 1", "AttributeError: "),
        ("def get_config():\n    raise ValueError('one\\ntwo')", "one"),
    ],
)
def test_a_configuration_that_cannot_be_loaded_is_one_line(refusal, tmp_path, text, reason):
    path = tmp_path / "mine.py"
    path.write_text(text)
    line = refusal(f"--config={path}")
    assert line.startswith(f"error: --config={path}: {reason}") and "\n" not in line


def test_debug_adds_the_traceback(refusal, capsys):
    refusal(ITER2, "--config.engine.rows=many")
    assert capsys.readouterr().err == ""
    refusal(ITER2, "--config.engine.rows=many", "--debug")
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["main", "generate", "convert", "plan", "judging_examples"])
def test_every_command_says_it_so(command):
    made = subprocess.run(
        [sys.executable, "-m", f"srlm_jax.{command}", "--debgu"], capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr == "error: --debgu: no such flag; did you mean --debug?\n"
