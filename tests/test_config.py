import dataclasses
import re
from typing import Any

import pytest
import torch
import torchao.core.config as torchao_config

from gptq_ao.config import EFFORTS, PRESETS, GPTQConfig, gptq_config
from gptq_ao.errors import ConfigError, GPTQError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, r"bits is 5: give one of 2, 3, 4, 8"),
        ({"bits": True}, r"bits is True: give one of 2, 3, 4, 8"),
        ({"bits": "4"}, r"bits is '4': give one of 2, 3, 4, 8"),
        ({"group_size": 0}, r"group_size is 0: give a number of input features that share a scale"),
        ({"group_size": 1}, r"group_size is 1: .* -1 for one scale per output row, or None to choose by the width"),
        ({"group_size": -2}, r"group_size is -2: "),
        ({"group_size": True}, r"group_size is True: "),
        ({"group_size": "x"}, r"group_size is 'x': "),
        ({"group_size": 32.0}, r"group_size is 32\.0: "),
        ({"act_order": "desc"}, r"act_order is 'desc': give one of 'group_aware', 'static', 'none', 'group'"),
        ({"effort": "slow"}, r"effort is 'slow': give one of 'fast', 'default', 'max'"),
        ({"compensate": True}, r"compensate is True: give one of 'none', 'inputs', 'residual'"),
        ({"signed_scale": 1}, r"signed_scale is 1: give one of True, False"),
        ({"scale_candidates": 0}, r"scale_candidates is 0: give a number of scales to try per group, 1 or more"),
        ({"scale_candidates": True}, r"scale_candidates is True: "),
        ({"refine_sweeps": -1}, r"refine_sweeps is -1: give a number of sweeps, 0 or more"),
        ({"refine_sweeps": 1.0}, r"refine_sweeps is 1\.0: "),
        ({"rules": {"a": {"effort": "max"}}}, r"rule 'a' sets 'effort': a rule may set bits, "),
        ({"act_order": True}, r"act_order is True: give one of"),
        ({"method": "awq"}, r"method is 'awq': give one of 'gptq', 'rtn'"),
        ({"damp_percent": 0.0}, r"damp_percent is 0\.0: give a fraction of the Hessian's mean diagonal"),
        ({"damp_percent": -0.01}, r"damp_percent is -0\.01: .* or None to derive it"),
        ({"damp_percent": 10.5}, r"damp_percent is 10\.5: "),
        ({"damp_percent": float("nan")}, r"damp_percent is nan: "),
        ({"preset": "4bit"}, r"preset is '4bit': give one of '4bit-128', '4bit-32-act', '3bit-128-act'"),
        ({"preset": "4bit-128", "bits": 3}, r"preset '4bit-128' already sets bits, group_size and act_order"),
        ({"preset": "4bit-128", "group_size": 32}, r"preset '4bit-128' already sets .* not both"),
        ({"preset": "4bit-128", "act_order": "none"}, r"preset '4bit-128' already sets"),
        ({"preset": "4bit-128", "desc_act": False}, r"preset '4bit-128' already sets"),
        ({"desc_act": True, "act_order": "group"}, r"desc_act=True and act_order='group' name the same setting"),
        ({"desc_act": False, "act_order": "none"}, r"desc_act=False and act_order='none' .*: give one"),
        (
            {"rules": {"lm_head": {"bit": 8}}},
            r"rule 'lm_head' sets 'bit': a rule may set bits, group_size, sym, act_ord",
        ),
        ({"rules": {"lm_head": {"rules": {}}}}, r"rule 'lm_head' sets 'rules': "),
        ({"rules": {"re:(": None}}, r"rule 're:\(' is not a regular expression: .*unterminated"),
        ({"rules": {"re:.*": {"bits": 7}}}, r"rule 're:\.\*': bits is 7: give one of"),
        ({"rules": {"a": None, "b": {"group_size": 0}}}, r"rule 'b': group_size is 0: "),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_say_what_to_give(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gptq_config(**arguments)


def test_rules_of_the_class_must_be_a_dict() -> None:
    with pytest.raises(ConfigError, match=r"rules must be a dict \{pattern: override or None\}, got list"):
        GPTQConfig(rules=["lm_head"])  # type: ignore[arg-type]


def test_config_error_is_a_gptq_error_and_a_value_error() -> None:
    assert issubclass(ConfigError, GPTQError)
    assert issubclass(ConfigError, ValueError)


def test_limits_are_accepted() -> None:
    for bits in (2, 3, 4, 8):
        assert gptq_config(bits).bits == bits
    for group_size in (-1, 2, 48, 4096, None):
        assert gptq_config(group_size=group_size).group_size == group_size
    assert gptq_config(damp_percent=10).damp_percent == 10


def test_defaults() -> None:
    assert gptq_config() == GPTQConfig(4, None, True, "group_aware", None, "gptq", True, 40, 4, "residual")
    assert gptq_config() == GPTQConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_the_same_as_its_settings(preset: str) -> None:
    bits, group_size, *act = preset.split("-")
    expected = gptq_config(int(bits[0]), int(group_size), act_order="group" if act else "group_aware")
    assert gptq_config(preset=preset) == expected
    assert gptq_config(preset=preset, sym=False, method="rtn") == dataclasses.replace(expected, sym=False, method="rtn")


@pytest.mark.parametrize(("desc_act", "act_order"), [(True, "group"), (False, "none"), (None, "group_aware")])
def test_desc_act(desc_act: bool | None, act_order: str) -> None:
    assert gptq_config(desc_act=desc_act).act_order == act_order


@pytest.mark.parametrize("effort", EFFORTS)
def test_effort_is_the_same_as_its_settings(effort: str) -> None:
    assert gptq_config(effort=effort) == gptq_config(**EFFORTS[effort])
    changed = gptq_config(effort=effort, act_order="static", signed_scale=False, refine_sweeps=7)
    assert changed == dataclasses.replace(
        gptq_config(effort=effort), act_order="static", signed_scale=False, refine_sweeps=7
    )


def test_frozen() -> None:
    config = gptq_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.bits = 8  # type: ignore[misc]


def test_rules_are_copied() -> None:
    override: dict[str, Any] = {"bits": 8}
    rules: dict[str, dict[str, Any] | None] = {"lm_head": override}
    config = gptq_config(rules=rules)
    override["bits"] = 5
    rules.clear()
    assert config.rules == {"lm_head": {"bits": 8}}


def test_first_matching_rule_wins() -> None:
    config = gptq_config(rules={"h.0.up": {"bits": 8}, r"re:h\.\d+\.up": {"bits": 2}, "re:.*": None})
    assert [config.rule_for(f"{m}.weight") for m in ("h.0.up", "h.1.up", "h.1.down")] == list(config.rules)
    for module, bits in (("h.0.up", 8), ("h.1.up", 2)):
        settings = config.for_weight(f"{module}.weight")
        assert settings is not None
        assert settings.bits == bits
    assert config.for_weight("h.1.down.weight") is None


def test_unmatched_weight_keeps_the_settings() -> None:
    config = gptq_config(rules={"lm_head": None})
    assert config.rule_for("h.0.up.weight") is None
    assert config.for_weight("h.0.up.weight") is config


def test_pattern_is_a_parameter_or_its_module() -> None:
    config = gptq_config(rules={"experts.w1": None, "attn": {"bits": 8}, "head.weight": None})
    assert config.rule_for("experts.w1") == "experts.w1"  # a parameter without a module of its own
    assert config.rule_for("attn.weight") == "attn"
    assert config.rule_for("head.weight") == "head.weight"
    assert config.rule_for("attn.q.weight") is None  # neither the parameter nor its module, but one further up
    assert config.rule_for("head.bias") is None
    assert config.rule_for("attention.weight") is None


def test_regular_expression_must_match_all_of_a_name() -> None:
    config = gptq_config(rules={"re:up": {"bits": 2}, r"re:h\.\d": {"bits": 3}, r"re:.*\.q": {"bits": 8}})
    assert config.rule_for("up.weight") == "re:up"
    assert config.rule_for("h.0.up.weight") is None
    assert config.rule_for("h.1.weight") == r"re:h\.\d"
    assert config.rule_for("h.11.weight") is None
    assert config.rule_for("h.11.q.weight") == r"re:.*\.q"


def test_plain_pattern_is_no_regular_expression() -> None:
    assert gptq_config(rules={"h.0": None}).rule_for("hx0.weight") is None


def test_override_keeps_all_other_settings() -> None:
    batches = [torch.zeros(1)]
    config = gptq_config(3, 64, sym=False, calibration=batches, rules={"q": {"bits": 8, "damp_percent": 0.1}})
    settings = config.for_weight("q.weight")
    assert settings == dataclasses.replace(config, bits=8, damp_percent=0.1)
    assert settings.calibration is batches


def test_calibration_is_in_neither_repr_nor_eq() -> None:
    config = gptq_config(calibration=["some secret text"])
    assert config.calibration == ["some secret text"]
    assert "secret" not in repr(config)
    assert "calibration" not in repr(config)
    assert config == gptq_config()


def test_serialized_config_has_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {*torchao_config.ALLOWED_AO_MODULES, "gptq_ao.config"}
    monkeypatch.setattr(torchao_config, "ALLOWED_AO_MODULES", allowed)
    rules = {"lm_head": None, r"re:h\.\d+": {"bits": 8, "group_size": -1, "sym": True}}
    config = gptq_config(
        3, 64, sym=False, act_order="group", damp_percent=0.05, rules=rules, strict=True, calibration=[torch.ones(1)]
    )
    data = torchao_config.config_to_dict(config)
    assert not re.search("calibration", str(data))
    loaded = torchao_config.config_from_dict(data)
    assert isinstance(loaded, GPTQConfig)
    assert loaded == config
    assert list(loaded.rules) == list(rules)  # the order is their meaning
    assert loaded.calibration is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sym": "yes"}, "sym is 'yes': give one of True, False"),
        ({"strict": 1}, "strict is 1: give one of True, False"),
        ({"desc_act": "yes"}, "desc_act is 'yes'"),
        ({"bits": 4.0}, "bits is 4.0: give one of 2, 3, 4, 8"),
        ({"damp_percent": True}, "damp_percent is True"),
        ({"damp_percent": "0.1"}, "damp_percent is '0.1'"),
        ({"rules": {"a": "skip"}}, "rule 'a': 'skip' is not a pattern and a dict of settings or None"),
        ({"rules": {"a": False}}, "rule 'a': False is not"),
        ({"rules": {3: None}}, "rule 3: None is not a pattern"),
        ({"rules": ["a"]}, "rules must be a dict .*, got list"),
        ({"preset": ["a"]}, r"preset is \['a'\]"),
    ],
)
def test_values_of_the_wrong_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        gptq_config(**settings)
