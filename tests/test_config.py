"""Configuration: precedence, the four modes, and errors that list what is valid."""

import dataclasses
from pathlib import Path

import pytest

from vbcompile.config import INDUCTOR_MODES, MODES, OPTIONS, Config, resolve_config
from vbcompile.config_error import ConfigError


def test_defaults_are_the_balanced_mode_without_a_named_mode():
    config = resolve_config(environ={})
    assert config == dataclasses.replace(Config(), sources=config.sources)
    assert not config.mode_named


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_sets_its_passes(mode):
    config = resolve_config(mode, environ={})
    assert {name: getattr(config, name) for name in MODES[mode]} == MODES[mode]
    assert config.mode_named and config.sources["fp4"] == f"mode {mode}"


def test_precedence_is_argument_then_environment_then_mode_then_default():
    environ = {"VB_MODE": "memory", "VB_STRICT": "1"}
    assert resolve_config(environ=environ).offload
    config = resolve_config("speed", {"strict": False, "recompute": True}, environ)
    assert (config.mode, config.strict, config.recompute, config.fp4) == ("speed", False, True, True)
    assert config.sources["mode"] == "mode=" and config.sources["strict"] == "options"
    assert config.to_dict()["recompute"] == {"value": True, "source": "options"}


@pytest.mark.parametrize("mode", INDUCTOR_MODES)
def test_modes_of_torch_compile_go_to_inductor(mode):
    config = resolve_config(mode, environ={"VB_MODE": "memory"})
    assert (config.mode, config.inductor_mode) == ("memory", mode)


def test_options_of_inductor_pass_through():
    config = resolve_config(options={"mode": "full", "max_autotune": False, "triton.cudagraphs": True}, environ={})
    assert config.inductor_options == {"max_autotune": False, "triton.cudagraphs": True}
    assert config.mode == "full"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, True),
        ({"mode": "balanced"}, True),
        ({"mode": "reduce-overhead"}, True),
        ({"offload": False}, False),
        ({"mode": "speed"}, False),
    ],
)
def test_the_balanced_mode_offloads_within_a_budget(options, wanted):
    for given, environ in (({"budget": "1GiB"}, {}), ({}, {"VB_HBM_BUDGET": "1GiB"})):
        config = resolve_config(options={**options, **given}, environ=environ)
        assert config.offload is wanted and not config.recompute
    assert not resolve_config(options=options, environ={}).offload


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "Sped"}, r"valid: balanced, memory, speed, full.*did you mean 'speed'"),
        ({"options": {"strct": True}}, r"unknown option 'strct'.*did you mean 'strict'"),
        ({"options": {"max_autotun": True}}, r"did you mean 'max_autotune'"),
        ({"options": {"max-autotune": "maybe"}}, r"option 'max_autotune' of Inductor must be bool, not 'maybe'"),
        ({"options": {"strict": 1}}, r"'strict' must be True or False"),
        ({"options": {"downstream": "tvm"}}, r"valid: inductor, aot_eager, eager"),
        ({"environ": {"VB_MODE": "turbo"}}, r"environment variable VB_MODE: unknown mode 'turbo'"),
        ({"environ": {"VB_STRICT": "perhaps"}}, r"VB_STRICT='perhaps': valid values are 1, true"),
    ],
)
def test_bad_values_name_the_valid_ones(arguments, message):
    with pytest.raises(ConfigError, match=message):
        resolve_config(**{"environ": {}, **arguments})


def test_every_option_is_a_documented_field():
    names = {f.name for f in dataclasses.fields(Config)}
    assert set(OPTIONS) <= names
    assert all(f"{name}:" in (Config.__doc__ or "") for name in names)
    page = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
    assert all(f"`{name}`" in page for name in OPTIONS)
