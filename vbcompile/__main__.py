"""Command line: ``vbcompile demo | run | explain | plan | calibrate | doctor | bench | tune``.

Exit status: 0 all well, 1 a problem was found, 2 wrong usage.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from vbcompile import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["demo"]:  # has options of its own, and reading them imports PyTorch
        from vbcompile.demo import main as demo

        return demo(argv[1:])
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.command is not _explain:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = [a for a in rest if a != "--"]
    try:
        _check_files(arguments)
        return arguments.command(arguments)
    except UsageError as error:
        print(f"vbcompile: {error}", file=sys.stderr)
        return 2


class UsageError(ValueError):
    """The command line asks for something that does not exist."""


def _check_files(arguments: argparse.Namespace) -> None:
    """Files that the command will write, before any work."""
    if getattr(arguments, "what", "") == "report":  # makes its folder
        return
    for option in ("html", "out"):
        named = getattr(arguments, option, None)
        if named and Path(named).is_dir():
            raise UsageError(f"--{option} {named}: this is a folder, and a file is to be written")
        if named and not Path(named).resolve().parent.is_dir():
            raise UsageError(f"--{option} {named}: no such folder: {Path(named).resolve().parent}")


def _check_settings(mode: str | None = None) -> None:
    """Raise UsageError for a mode or an environment variable that does not exist or makes no sense."""
    from vbcompile.config import resolve_config
    from vbcompile.config_error import ConfigError
    from vbcompile.kernels.registry import check_names, parse_forced

    try:
        resolve_config(mode)
        check_names(parse_forced(os.environ))
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vbcompile", description="Virtual Blackwell: torch.compile backend and tools")
    parser.add_argument("--version", action="version", version=f"vbcompile {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    commands.add_parser("demo", help="run two real models: eager, Inductor and vblackwell side by side")

    run = commands.add_parser("run", help="run an unchanged script with its models compiled")
    run.add_argument("script", help="Python file")
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    run.set_defaults(command=_run)

    explain = commands.add_parser("explain", help="what is rewritten in a model, what is not, and why")
    explain.add_argument(
        "target",
        help="FILE.py:NAME or package.module:NAME, a function that returns (model, inputs) or "
        "(model, inputs, keywords), inputs being a tensor, a tuple or a dictionary; or FILE.py, a script that is run "
        "with its models compiled and with all arguments that are not ours",
    )
    explain.add_argument("--mode", help="balanced, memory, speed or full")
    explain.add_argument(
        "--as", dest="arch", help="choose kernels as for this architecture, e.g. gfx942 or Ascend910B1"
    )
    explain.add_argument("--html", metavar="FILE", help="write one self-contained page")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(command=_explain)

    plan = commands.add_parser("plan", help="what of a model fits where, peak memory and step time, before a run")
    plan.add_argument("target", help="FILE.py:NAME or package.module:NAME, as for explain; built on the meta device")
    plan.add_argument("--budget", help="device memory, e.g. 20GiB (default: all of it, or VB_HBM_BUDGET)")
    plan.add_argument("--measure", action="store_true", help="measure this machine's memory, links and products first")
    plan.add_argument("--training", action="store_true", help="plan forward, backward and optimizer state")
    plan.add_argument("--weight-bits", type=float, help="bits per element of stored matrices, e.g. 4.5")
    plan.add_argument("--html", metavar="FILE", help="write one self-contained page with the transfer timeline")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.set_defaults(command=_plan)

    tune = commands.add_parser("tune", help="time the ways to run FP4 products of a model's shapes on this device")
    tune.add_argument("target", nargs="?", help="FILE.py:NAME or package.module:NAME, as for explain")
    tune.add_argument("--shape", action="append", default=[], metavar="NxK", help="a weight's rows and columns")
    tune.add_argument("--rows", type=int, nargs="+", help="rows of x (default: powers of two up to 4096)")
    tune.add_argument("--format", default="nvfp4", choices=["nvfp4", "mxfp4"])
    tune.set_defaults(command=_tune)

    calibrate = commands.add_parser("calibrate", help="pack a model to FP4 for the inputs it sees (GPTQ), and save it")
    calibrate.add_argument("target", help="folder of a Transformers language model; or FILE.py:NAME as for explain")
    calibrate.add_argument("--out", required=True, help="file to write, .safetensors")
    calibrate.add_argument("--text", help="UTF-8 text to calibrate on (default: Python's own documentation)")
    calibrate.add_argument("--tokens", type=int, default=8192, help="how many tokens of it")
    calibrate.add_argument("--length", type=int, default=512, help="tokens a sequence")
    calibrate.add_argument("--format", default="nvfp4", choices=("nvfp4", "mxfp4"), help="format of the weights")
    calibrate.add_argument("--lm-head", action="store_true", help="also the projection onto the vocabulary")
    calibrate.set_defaults(command=_calibrate)

    doctor = commands.add_parser(
        "doctor", help="devices, drivers, versions, kernels that can run here, and what to fix"
    )
    doctor.add_argument("--kernels", action="store_true", help="only which kernel can run where, and why not")
    doctor.add_argument(
        "--device", action="append", default=[], help="for --kernels: a device here, or an architecture that is not"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)
    bench = commands.add_parser("bench", help="measure this machine beside PyTorch's operators and its own floor")
    bench.add_argument("what", nargs="?", choices=("measure", "report"), default="measure")
    bench.add_argument("result", nargs="?", help="for report: the file of an earlier --out")
    bench.add_argument("--quick", action="store_true", help="fewer cases, at most three minutes on a processor")
    bench.add_argument("--device", help="where (default: the best device here)")
    bench.add_argument("--out", help="write JSON here; for report: the folder of the table and the plots")
    bench.set_defaults(command=_bench)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    """Run a script under the switch if ``ENABLE_VIRTUAL_BLACKWELL`` is 1 or absent; 0 runs it plainly."""
    from vbcompile.config import parse_flag
    from vbcompile.config_error import ConfigError

    try:
        wanted = parse_flag("ENABLE_VIRTUAL_BLACKWELL", os.environ.get("ENABLE_VIRTUAL_BLACKWELL") or "1")
    except ConfigError as error:
        raise UsageError(str(error)) from error
    if wanted:
        from vbcompile.global_switch import enable, is_enabled

        _check_settings()
        if not is_enabled():
            enable(verbose=False)
    _run_script(arguments.script, arguments.arguments)
    return 0


def _run_script(script: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The script's names, which keep its models alive."""
    if not Path(script).is_file():
        raise UsageError(f"no such file: {script}")
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    return runpy.run_path(script, run_name="__main__")


def _explain(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from vbcompile.estimator import PlanError

    _check_settings(arguments.mode)
    path, _, name = arguments.target.rpartition(":")
    if path and arguments.rest:
        raise UsageError(f"unrecognized arguments: {' '.join(arguments.rest)}")
    try:
        explanation, status = (_explain_call(path, name, arguments), 0) if path else _explain_script(arguments)
    except PlanError as error:
        print(f"vbcompile: {error}", file=sys.stderr)
        return 1
    if arguments.html:
        Path(arguments.html).write_text(explanation.to_html(arguments.target), encoding="utf-8")
    if arguments.json:
        print(explanation.to_json())
    elif not arguments.html:
        Console().print(explanation)
    return 1 if status or any(r.failures for r in explanation.reports) else 0


def _explain_call(path: str, name: str, arguments: argparse.Namespace) -> Any:
    from vbcompile.device import DeviceError
    from vbcompile.explainer import explain

    model, inputs, keywords = _make(path, name)
    try:
        return explain(model, *inputs, mode=arguments.mode, as_device=arguments.arch, **keywords)
    except DeviceError as error:
        raise UsageError(str(error)) from error


def _make(path: str, name: str) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    """Model, inputs and keyword inputs from the user's function."""
    make = _load(path, name)
    if hasattr(make, "forward"):
        raise UsageError(f"{name} must be a function that returns (model, inputs), not the model")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UsageError(f"{name} is called without arguments: {error}") from error
    except ValueError:  # a built-in that does not tell
        pass
    made = make()
    if not isinstance(made, tuple) or not 2 <= len(made) <= 3:
        raise UsageError(f"{name} must return (model, inputs) or (model, inputs, keywords)")
    model, inputs, keywords = (*made, {})[:3]
    if not callable(model):
        raise UsageError(f"{name} must return a model first, not {type(model).__name__}")
    if isinstance(inputs, Mapping) and len(made) == 2:  # what tokenizers and processors return
        return model, (), dict(inputs)
    return model, inputs if isinstance(inputs, (tuple, list)) else (inputs,), keywords


def _make_module(path: str, name: str) -> tuple[Any, Sequence[Any], dict[str, Any]]:
    """The same where it has to be a module."""
    import torch

    model, inputs, keywords = _make(path, name)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{name} must return a torch.nn.Module first, not {type(model).__name__}")
    return model, inputs, keywords


def _load(path: str, name: str) -> Callable[..., Any]:
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise UsageError(f"no such file: {path}")
        sys.path.insert(0, str(Path(path).resolve().parent))  # as for a script
    else:
        sys.path.insert(0, "")
    try:
        module = _import_file(path) if path.endswith(".py") else importlib.import_module(path)
    except (ImportError, SyntaxError, ValueError) as error:
        raise UsageError(f"cannot import {path or repr(path)}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UsageError(f"{path} has no function {name!r}")
    return found


def _import_file(path: str) -> ModuleType:
    """A file as a module that stays importable: Dynamo imports the modules of functions that it follows."""
    name = Path(path).stem
    if name in sys.modules:
        name = f"vbcompile_target_{name}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _explain_script(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """What was compiled, and the status with which the script ended: many end with ``sys.exit(main())``."""
    from vbcompile.explainer import explain_script
    from vbcompile.global_switch import enable

    if arguments.arch:
        raise UsageError("--as needs FILE.py:NAME or package.module:NAME: a script runs on the devices that are here")
    enable(arguments.mode, verbose=False)
    status: list[Any] = [0]

    def run() -> Any:
        try:
            return _run_script(arguments.target, arguments.rest)
        except SystemExit as end:
            status[0] = end.code
            return end  # its frames hold what the script made

    explanation = explain_script(run)
    if status[0]:
        print(f"vbcompile: the script ended with status {status[0]}", file=sys.stderr)
    return explanation, status[0]


def _plan(arguments: argparse.Namespace) -> int:
    import torch

    from vbcompile.config_error import ConfigError
    from vbcompile.estimator import PlanError, estimate
    from vbcompile.vgpu import create_vgpu_stack

    path, _, name = arguments.target.rpartition(":")
    if not path:
        raise UsageError(f"plan needs FILE.py:NAME or package.module:NAME, not {arguments.target!r}")
    with torch.device("meta"):
        model, inputs, keywords = _make_module(path, name)
    if inputs and keywords:
        raise UsageError("plan takes inputs by position or by keyword, not both")
    try:
        result = estimate(
            model,
            inputs=keywords or inputs,
            budget=arguments.budget,
            stack=create_vgpu_stack(measure=True) if arguments.measure else None,
            training=arguments.training,
            weight_bits=arguments.weight_bits,
        )
    except PlanError as error:
        print(f"vbcompile: {error}", file=sys.stderr)
        return 1
    except (ConfigError, ValueError) as error:
        raise UsageError(str(error)) from error
    if arguments.html:
        from vbcompile.report_page import Movement, html_page

        page = html_page([], arguments.target, [Movement(result.plan, result.memory)])
        Path(arguments.html).write_text(page, encoding="utf-8")
    print(result.to_json() if arguments.json else result)
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    """Writes the user's table of FP4 products, which goes before the shipped one."""
    import torch

    from vbcompile import tune
    from vbcompile.kernels.fp4_tuning import user_table

    shapes = [_shape(text) for text in arguments.shape]
    if any(rows < 1 for rows in arguments.rows or ()):
        raise UsageError("--rows wants numbers from 1")
    if arguments.target:
        path, _, name = arguments.target.rpartition(":")
        if not path:
            raise UsageError(f"tune needs FILE.py:NAME or package.module:NAME, not {arguments.target!r}")
        with torch.device("meta"):
            shapes += tune.shapes_of(_make_module(path, name)[0])
    if not shapes:
        raise UsageError("tune needs a model or --shape NxK")
    try:
        for format_name, n, k, rows, dense, times in tune.tune(shapes, arguments.rows or tune.ROWS, arguments.format):
            best = ", ".join(f"{name} {time}" for name, (time, _) in sorted(times.items(), key=lambda item: item[1][0]))
            print(f"{format_name} [{n}, {k}] x {rows}: {best} us; bfloat16 {dense} us", flush=True)
    except tune.TuneError as error:
        print(f"vbcompile: {error}", file=sys.stderr)
        return 1
    print(f"written to {user_table()}")
    return 0


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
        raise UsageError(f"--shape wants rows x columns of the weight, as 4096x14336, not {text!r}")
    return int(n), int(k)


def _calibrate(arguments: argparse.Namespace) -> int:
    from vbcompile.fp4_calibration import calibrate_folder, calibrate_to_file

    if not arguments.out.endswith(".safetensors"):
        raise UsageError(f"--out {arguments.out}: the name must end in .safetensors")
    if arguments.tokens < 1 or arguments.length < 1:
        raise UsageError("--tokens and --length want numbers from 1")
    path, _, name = arguments.target.rpartition(":")
    try:
        if path and not Path(arguments.target).is_dir():
            model, inputs, keywords = _make_module(path, name)
            if inputs and keywords:
                raise UsageError("calibrate takes inputs by position or by keyword, not both")
            return calibrate_to_file(model, keywords or inputs, arguments.out, arguments.format, arguments.lm_head)
        if not Path(arguments.target).is_dir():
            raise UsageError(f"no such folder: {arguments.target}")
        return calibrate_folder(
            arguments.target,
            arguments.out,
            arguments.format,
            arguments.lm_head,
            text=arguments.text,
            tokens=arguments.tokens,
            length=arguments.length,
        )
    except (ValueError, OSError) as error:
        if isinstance(error, UsageError):
            raise
        print(f"vbcompile: {error}", file=sys.stderr)
        return 1


def _doctor(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    if arguments.kernels or arguments.device:
        return _kernels(arguments)
    from vbcompile.doctor import diagnose

    diagnosis = diagnose()
    if arguments.json:
        print(diagnosis.to_json())
    else:
        Console().print(diagnosis)
    return diagnosis.exit_status


def _kernels(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from vbcompile.device import DeviceError
    from vbcompile.doctor import list_kernels
    from vbcompile.doctor_findings import kernel_tables

    try:
        rows = list_kernels(arguments.device)
    except DeviceError as error:
        raise UsageError(str(error)) from error
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        Console().print(*kernel_tables(rows), sep="\n")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from vbcompile.bench import bench
    from vbcompile.device import DeviceError

    if arguments.what == "report":
        return _bench_report(arguments)
    try:
        result = bench(arguments.quick, arguments.device)
    except DeviceError as error:
        raise UsageError(str(error)) from error
    if arguments.out:
        Path(arguments.out).write_text(result.to_json(), encoding="utf-8")
    Console().print(result)
    return int(not result.right)


def _bench_report(arguments: argparse.Namespace) -> int:
    from vbcompile.bench_report import report

    if not arguments.result:
        raise UsageError("bench report needs the file that `vbcompile bench --out FILE` wrote")
    try:
        written = report(Path(arguments.result), Path(arguments.out or "."))
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    print("\n".join(map(str, written)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
