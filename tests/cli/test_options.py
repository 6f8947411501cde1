"""The options of the commands: where they come from, what is wrong with them, and what the help costs."""

import json
import subprocess
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config

from gptq_ao import cli, load_quantized
from gptq_ao.checkpoint import hub
from gptq_ao.cli import options, quantization
from gptq_ao.cli.gguf_files import GGUF
from gptq_ao.cli.request import EngineName, OutFormat
from gptq_ao.config import ACT_ORDERS, EFFORTS, METHODS
from gptq_ao.errors import CheckpointError, ConfigError
from gptq_ao.version import VERSION

from ..models import tiny_llama
from .test_commands import TINY, fail, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    return str(path)


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gptq_ao", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "", **environment})


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["plan", "--help"], []])
def test_the_help_imports_nothing_heavy(arguments: list[str]) -> None:
    """What is imported, from Python's own list of imports."""
    command = [sys.executable, "-X", "importtime", "-m", "gptq_ao", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if arguments else 2)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    packages = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names)
    heavy = {"torch", "torchao", "transformers", "datasets", "triton", "safetensors", "numpy", "pandas", "pyarrow"}
    assert not packages & heavy
    assert "typer" in packages
    ours = {name for name in imported if name.startswith("gptq_ao")}
    files = {
        "interruption",
        "options",
        "request",
        "merge",
        "quantization",
        "checkpoints",
        "reports",
        "quality",
        "diagnosis",
        "gguf_files",
        "mixture",
        "score",
    }
    expected = {"gptq_ao", "gptq_ao.cli", "gptq_ao.errors", "gptq_ao.version", "gptq_ao.__main__"}
    expected |= {"gptq_ao.integrations", "gptq_ao.integrations.on_import", *(f"gptq_ao.cli.{file}" for file in files)}
    assert ours <= expected


def test_version_and_completion() -> None:
    assert process("--version").stdout == f"gptq_ao {VERSION}\n"
    shown = process("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "--show-completion" in process("--help").stdout
    assert "Traceback" not in shown.stderr


def test_nothing_of_other_libraries_is_said(model: str, tmp_path: Path) -> None:
    """torchao warns of its libraries for other machines; the whole of stderr is ours."""
    done = process("quantize", model, str(tmp_path / "q"), "--method", "rtn", "--group-size", "32")
    assert done.returncode == 0
    assert not [line for line in done.stderr.splitlines() if "torchao" in line or "_pytree" in line]


def test_exit_statuses(model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "q")
    assert process("quantize", model).returncode == 2  # an argument is missing
    assert process("quantize", model, out, "--bitz", "4").returncode == 2
    assert process("quantize", model, out, "--bits", "5", "--method", "rtn").returncode == 2
    assert process("inspect", out).returncode == 1  # there is no such directory
    assert not Path(out).exists()


def test_strictness_not_met_has_a_status_of_its_own(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(Path(model) / "model.safetensors")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
    save_file({**tensors, "vision.weight": torch.ones(4)}, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    arguments = ["gptq-ao", "quantize", str(tmp_path / "a"), str(tmp_path / "q"), "--method", "rtn", "--strict"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as e:
        cli.main()
    assert e.value.code == 3
    assert "strict=True, and 1 tensors of" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()


# Wrong input of every kind → what is said.
WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "model-gone": (
        ("quantize", "no/such-model", "OUT", "--method", "rtn"),
        "'no/such-model' is neither a directory",
    ),
    "model-is-a-file": (
        ("quantize", "FILE", "OUT", "--method", "rtn"),
        "is a file: give the directory that it is in",
    ),
    **{
        f"{command}-{what}": ((command, source, *more), message)
        for command, *more in (
            ("quantize", "OUT", "--method", "rtn"),
            ("plan",),
            ("eval", "--data", "FILE"),
            ("inspect",),
        )
        for what, source, message in (
            ("is-a-file", "FILE", "is a file: give the directory that it is in"),
            ("path-gone", "/no/such", "/no/such does not exist: give a directory, or the id of a model on the hub"),
            ("long-name", "x" * 5000, "xxx"),
        )
    },
    "no-config": (("quantize", "EMPTY", "OUT", "--method", "rtn"), "has no config.json"),
    "out-in-use": (("quantize", "MODEL", "MODEL", "--method", "rtn"), "exists and is not empty"),
    "out-is-a-file": (("quantize", "MODEL", "FILE", "--method", "rtn"), "exists and is not empty"),
    "data-gone": (("quantize", TINY, "OUT", "--calibration", "gone.jsonl"), "there is no file 'gone.jsonl'"),
    "no-tokenizer": (("quantize", "MODEL", "OUT", "--calibration", "FILE"), "has no tokenizer that can be loaded"),
    "device": (("quantize", "MODEL", "OUT", "--method", "rtn", "--device", "warp"), "--device warp: "),
    "device-meta": (("quantize", "MODEL", "OUT", "--method", "rtn", "--device", "meta"), "nothing is computed there"),
    "seed": (
        ("quantize", TINY, "OUT", "--calibration", "FILE", "--seed", "9" * 30),
        "give a number of at most 64 bits",
    ),
    "plan-format-asym": (("plan", "MODEL", "--asym", "--format", "gptq"), "holds no asymmetric"),
    "device-gone": (("quantize", "MODEL", "OUT", "--method", "rtn", "--device", "cuda:77"), "--device cuda:77: "),
    "memory": (("quantize", "MODEL", "OUT", "--method", "rtn", "--max-memory", "8"), "'8' is not DEVICE=AMOUNT"),
    "memory-unit": (("quantize", "MODEL", "OUT", "--method", "rtn", "--max-memory", "cpu=8Q"), "8Q"),
    "format": (("quantize", "MODEL", "OUT", "--method", "rtn", "--format", "ggml"), "'ggml' is not one of"),
    "gguf-name": (("quantize", "MODEL", "OUT", "--method", "rtn", "--format", "gguf"), "gguf is one file: give a name"),
    "gguf-name-only": (
        ("quantize", "MODEL", "OUT.gguf", "--method", "rtn"),
        "is the name of a GGUF file: give --format",
    ),
    "gguf-bits": (
        ("quantize", "MODEL", "OUT.gguf", "--method", "rtn", "--bits", "3", "--format", "gguf"),
        "--format gguf holds weights of 4 and 8 bits only",
    ),
    "gguf-mixed": (("plan", "MODEL", "--target-bits", "4.5", "--format", "gguf"), "holds weights of 4 and 8 bits only"),
    "gguf-asym": (("plan", "MODEL", "--bits", "8", "--asym", "--format", "gguf"), "no asymmetric weights of 8 bits"),
    "gguf-order": (("plan", "MODEL", "--act-order", "group", "--format", "gguf"), "--format gguf holds no weights of"),
    "gguf-adapter": (
        ("plan", "MODEL", "--adapter-rank", "4", "--format", "gguf"),
        "--format gguf has no place for an adapter",
    ),
    "gguf-model": (
        ("quantize", "GPT2", "OUT.gguf", "--method", "rtn", "--format", "gguf"),
        "cannot be written as GGUF: language models of the types",
    ),
    "format-awq-bits": (
        ("quantize", "MODEL", "OUT", "--method", "rtn", "--bits", "8", "--format", "awq"),
        "--format awq holds weights of 4 bits only",
    ),
    "format-awq-mixed": (("plan", "MODEL", "--target-bits", "4.5", "--format", "awq"), "holds weights of 4 bits only"),
    "format-awq-order": (
        ("plan", "MODEL", "--act-order", "group", "--format", "awq"),
        "--format awq holds no weights of",
    ),
    "format-mlx-order": (
        ("plan", "MODEL", "--act-order", "group", "--format", "mlx"),
        "--format mlx holds no weights of",
    ),
    "format-asym": (
        ("quantize", "MODEL", "OUT", "--method", "rtn", "--asym", "--format", "gptq"),
        "holds no asymmetric",
    ),
    "sharding-in-memory": (
        ("quantize", "MODEL", "OUT", "--method", "rtn", "--output-sharding", "rank"),
        "--output-sharding rank is for --stream and --format native",
    ),
    "sharding-of-others": (
        ("plan", "MODEL", "--stream", "--format", "gptq", "--output-sharding", "rank"),
        "--output-sharding rank is for --stream and --format native",
    ),
    "format-order": (
        ("quantize", "MODEL", "OUT", "--calibration", "FILE", "--act-order", "group", "--format", "compressed-tensors"),
        "holds no weights of --act-order group",
    ),
    **{
        f"{command}-for-{engine}{''.join(more)}": ((command, "MODEL", *out, *more, "--for", engine), message)
        for command, *out in (("quantize", "OUT", "--method", "rtn"), ("plan",))
        for engine, more, message in (
            ("sglang-cpu", ("--bits", "3"), "--for sglang-cpu: SGLang 0.5.23 on a CPU serves none of native, gptq, "),
            (
                "vllm-cpu",
                ("--bits", "8", "--format", "gptq"),
                "serves no gptq files with 8 bits; choose native (with gptq_ao installed there)",
            ),
            (
                "vllm",
                ("--asym", "--format", "gptq_v2"),
                "(asymmetric weights); choose compressed-tensors or awq or native (with",
            ),
            ("vllm", ("--format", "gptq", "--group-size", "16"), "serves no gptq files with groups of 16; choose"),
            ("llama.cpp", ("--bits", "3"), "--for llama.cpp: llama.cpp in "),
        )
    },
    "for-no-engine": (("plan", "MODEL", "--for", "ollama"), "'ollama' is not one of"),
    "preset": (("quantize", "MODEL", "OUT", "--method", "rtn", "--preset", "5bit"), "preset is '5bit': give one of"),
    "preset-and-bits": (
        ("quantize", "MODEL", "OUT", "--method", "rtn", "--preset", "4bit-128", "--bits", "3"),
        "preset '4bit-128' already sets bits",
    ),
    "config-gone": (("quantize", "MODEL", "OUT", "--config", "gone.yaml"), "--config gone.yaml cannot be read"),
    "config-list": (("quantize", "MODEL", "OUT", "--config", "LIST"), "holds a list: give names and values"),
    "config-broken": (("quantize", "MODEL", "OUT", "--config", "BROKEN"), "cannot be read: "),
    "config-unknown": (
        ("quantize", "MODEL", "OUT", "--config", "UNKNOWN"),
        "has 'bitz', which is no setting: act_order",
    ),
    "rules-value": (("quantize", "MODEL", "OUT", "--method", "rtn", "--rules", "UNKNOWN"), "rule 'bitz'"),
    "rules-unmatched": (("quantize", "MODEL", "OUT", "--method", "rtn", "--rules", "RULES"), "rule 'nothing'"),
    "binary": (("quantize", "MODEL", "OUT", "--config", "BINARY"), "cannot be read: "),
    "eval-gone": (("eval", "no/such-model", "--data", "FILE"), "'no/such-model' has no tokenizer"),
    "plan-gone": (("plan", "no/such-model"), "'no/such-model' is neither a directory"),
    "inspect-file": (("inspect", "FILE"), "is a file: give the directory"),
    "convert-file": (("convert", "FILE", "OUT", "--format", "gptq"), "is a file: give the directory"),
    "convert-dense": (("convert", "MODEL", "OUT", "--format", "gptq"), "is not quantized: load it with"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_message_without_a_traceback(
    case: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    files = {"FILE": "text", "LIST": "[1, 2]", "BROKEN": "{a: ", "UNKNOWN": "bitz: 4", "RULES": "nothing: null"}
    places = {"MODEL": model, "OUT": str(tmp_path / "out"), "EMPTY": str(tmp_path / "empty")}
    (tmp_path / "empty").mkdir()
    places |= {"OUT.gguf": str(tmp_path / "out.gguf"), "GPT2": str(tmp_path / "gpt2")}
    GPT2Config(architectures=["GPT2LMHeadModel"], n_layer=1).save_pretrained(tmp_path / "gpt2")
    for name, text in files.items():
        places[name] = str(tmp_path / (f"{name}.txt" if name == "FILE" else f"{name}.yaml"))
        Path(places[name]).write_text(text)
    places["BINARY"] = str(tmp_path / "binary.yaml")
    Path(places["BINARY"]).write_bytes(b"\xff\xfe\x00")
    arguments, message = WRONG[case]
    said = fail(monkeypatch, capsys, *(places.get(word, word) for word in arguments))
    assert message in said
    assert "Traceback" not in said
    assert "not foreseen" not in said
    assert not (tmp_path / "out").exists()


def test_an_error_that_nobody_foresaw(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("weight")

    monkeypatch.setattr(quantization, "_check", broken)
    said = fail(monkeypatch, capsys, "quantize", model, "out", "--method", "rtn")
    assert said.startswith("error: KeyError: 'weight'\n(not foreseen: GPTQ_AO_TRACEBACK=1")
    monkeypatch.setenv("GPTQ_AO_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["gptq-ao", "quantize", model, "out", "--method", "rtn"])
    with pytest.raises(KeyError, match="weight"):
        cli.main()


def test_plan_takes_every_option_of_quantize() -> None:
    """With the same types, defaults and words, so that one word of a command line says what it would take."""
    ours, theirs = (dict(signature(command).parameters) for command in (cli.plan, cli.quantize))
    assert set(ours) - {"nproc"} == set(theirs)  # which torchrun is told
    for name in set(theirs) - {"model", "out"}:  # for a plan a config is enough, and nothing is written
        assert ours[name] == theirs[name], name


def test_choices_are_those_of_the_package() -> None:
    from gptq_ao.checkpoint.engines import ENGINES
    from gptq_ao.checkpoint.formats import FORMATS

    assert [*options.ActOrder] == [*ACT_ORDERS]
    assert [*options.Effort] == [*EFFORTS]
    assert [*options.Method] == [*METHODS]
    assert [*OutFormat] == [*FORMATS, GGUF]
    assert [*EngineName] == [*ENGINES]


def test_the_device_is_the_accelerator_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert options.device_of("cpu") == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert options.device_of(None) == "cpu"
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert options.device_of(None) == "cuda"
    with pytest.raises(ConfigError, match="--device nowhere: "):
        options.device_of("nowhere")


@pytest.mark.parametrize(
    ("arguments", "format"),
    [
        (("--for", "vllm"), "compressed-tensors"),
        (("--for", "vllm", "--format", "gptq"), "gptq"),
        (("--for", "sglang-cpu"), "gptq"),
        (("--for", "mlx"), "mlx"),
        (("--for", "transformers", "--asym", "--bits", "3"), "gptq_v2"),
    ],
)
def test_the_engine_chooses_the_format(
    arguments: tuple[str, ...], format: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"
    usual = (model, str(out), "--method", "rtn", "--group-size", "32", *arguments, "--json")
    planned = run(monkeypatch, "plan", *usual)
    assert (planned["for"], planned["format"]) == (arguments[1], format)
    assert run(monkeypatch, "quantize", *usual)["format"] == format
    assert run(monkeypatch, "inspect", str(out), "--json").get("format", "native") == format


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_a_recipe_comes_from_a_file(suffix: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All settings of `gptq_config`; an option of the command line comes before one of the file."""
    rules = {"re:.*down_proj": {"bits": 8}, "model.layers.0.mlp.up_proj": None}
    settings = {"bits": 3, "group_size": 32, "method": "rtn", "sym": False, "rules": rules}
    path = tmp_path / f"recipe.{suffix}"
    # JSON is YAML as well.
    path.write_text(json.dumps(settings))
    usual = ("quantize", model, str(tmp_path / "q"), "--config", str(path), "--json")
    report = run(monkeypatch, *usual, "--group-size", "16")
    assert {w["name"]: w["bits"] for w in report["layers"] if "layers.0.mlp" in w["name"]} == {
        "model.layers.0.mlp.gate_proj.weight": 3,
        "model.layers.0.mlp.down_proj.weight": 8,
    }
    assert {w["group_size"] for w in report["layers"]} == {16}
    assert "asymmetric" in report["recipe"]["recipe"]
    assert run(monkeypatch, "plan", *usual[1:])["bits_per_weight"] > 3


def test_rules_and_presets(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("lm_head: {bits: 8}\n're:.*k_proj': null\n")
    out = tmp_path / "q"
    arguments = ("quantize", model, str(out), "--method", "rtn", "--group-size", "32", "--rules", str(rules), "--json")
    report = run(monkeypatch, *arguments)
    bits = {w["name"]: w["bits"] for w in report["layers"]}
    assert bits["lm_head.weight"] == 8
    assert not any("k_proj" in name for name in bits)
    plan = run(monkeypatch, "plan", TINY, "ignored", "--preset", "3bit-128-act", "--seq-len", "32", "--json")
    assert 3 + 24 / 128 < plan["bits_per_weight"] < 3.5  # codes, scales and zero points; the order of the columns


@pytest.mark.parametrize("stream", [(), ("--stream",)])
@pytest.mark.parametrize(
    "format", [f for f in OutFormat if f != GGUF]
)  # that is one file: tests/checkpoint/test_gguf.py
def test_any_format_is_written(
    format: str, stream: tuple[str, ...], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "q"
    arguments = ("quantize", model, str(out), "--method", "rtn", "--group-size", "32", "--format", format, *stream)
    report = run(monkeypatch, *arguments, "--json")
    assert report["format"] == format
    card = (out / "README.md").read_text()
    assert f"- format: {format}" in card
    assert "rounded to nearest" in card
    found = run(monkeypatch, "inspect", str(out), "--json")
    assert len(found["quantized"]) == report["weights"]
    ids = torch.arange(8)[None]
    expected = quantized_logits(model, ids)
    assert torch.equal(load_quantized(out)(ids).logits, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["q"]


def quantized_logits(model: str, ids: torch.Tensor) -> torch.Tensor:
    from gptq_ao import gptq_config, quantize_
    from gptq_ao.integrations.transformers import load_model

    loaded: Any = load_model(model)
    quantize_(loaded, gptq_config(4, 32, method="rtn"))
    return loaded(ids).logits


def test_what_a_format_cannot_hold_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Known only from the weights (here: 16 output features, which readers of GPTQ do not take), after all the work."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path / "a")
    arguments = ("quantize", str(tmp_path / "a"), str(tmp_path / "q"), "--method", "rtn", "--group-size", "16")
    said = fail(monkeypatch, capsys, *arguments, "--format", "gptq")
    assert "readers of GPTQ need multiples of 32" in said
    assert f"It was written to {tmp_path / 'q'} in the native format instead" in said
    load_quantized(tmp_path / "q")


def test_push_to_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether one may is asked first; what is written is what is uploaded."""
    calls: list[tuple[str, Any]] = []

    class Api:
        def whoami(self) -> None:
            calls.append(("whoami", (tmp_path / "q").exists()))

        def create_repo(self, repository: str, exist_ok: bool) -> str:
            calls.append(("create", (repository, exist_ok)))
            return f"hub/{repository}"

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append(("upload", (repo_id, sorted(p.name for p in Path(folder_path).iterdir()))))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    arguments = ("quantize", model, str(tmp_path / "q"), "--method", "rtn", "--push-to-hub", "me/model-4bit")
    with monkeypatch.context() as patch:
        assert run(patch, *arguments).endswith("uploaded to hub/me/model-4bit")
    files = sorted(p.name for p in (tmp_path / "q").iterdir())
    assert calls == [
        ("whoami", False),
        ("create", ("me/model-4bit", True)),
        ("upload", ("me/model-4bit", files)),
    ]

    def refused(self: Api, **_: Any) -> None:
        raise OSError("403")

    monkeypatch.setattr(Api, "upload_folder", refused)
    with pytest.raises(CheckpointError, match=r"q is complete, but could not be uploaded to 'me/model-4bit': 403"):
        hub.upload(tmp_path / "q", "me/model-4bit")
    monkeypatch.setattr(Api, "whoami", refused)
    again = (*arguments[:2], str(tmp_path / "r"), *arguments[3:])
    assert "--push-to-hub: not logged in, call `hf auth login` first: 403" in fail(monkeypatch, capsys, *again)
    assert not (tmp_path / "r").exists()
