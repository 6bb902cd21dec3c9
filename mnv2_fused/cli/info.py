"""`info`: what is installed and in use."""

from __future__ import annotations

import argparse
import os

import torch

from mnv2_fused import _C
from mnv2_fused._core import library
from mnv2_fused.cli import options, output
from mnv2_fused.tools import measure


def add(commands: argparse._SubParsersAction) -> None:
    """Declares the command and its options."""
    parser = commands.add_parser(
        "info",
        help="versions, instruction set, threads, CUDA, build",
        description="Prints what is installed and in use.",
    )
    parser.set_defaults(run=run)
    options.add_json(parser)


def run(arguments: argparse.Namespace) -> None:
    """Prints every fact on a line of its own."""
    output.check_json(arguments.json)
    facts = measure.environment()
    facts["threads"] = torch.get_num_threads()
    facts["isa"] = {
        "in_use": _C.cpu_isa(),
        "supported": list(_C.cpu_supported_isas()),
        "MNV2_FUSED_CPU_ISA": os.environ.get("MNV2_FUSED_CPU_ISA"),
    }
    facts["cuda"] = {
        "torch": torch.version.cuda,
        "available": torch.cuda.is_available(),
        "kernels": library.cuda_missing or "loaded",
        "gpus": [
            f"{torch.cuda.get_device_name(i)}: {library.gpu_reason(i) or 'runs them'}"
            for i in range(0 if library.cuda_missing else torch.cuda.device_count())
        ],
    }
    facts["build"] = dict(_C.build_info())
    for package in ("numpy", "pillow", "rich", "safetensors"):
        facts["versions"][package] = measure.version_of(package)
    table = output.table("<fact", "<value", box=None, show_header=False)
    for section, content in facts.items():
        if isinstance(content, dict):
            for key, value in content.items():
                text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
                table.add_row(f"{section} {key}", text)
        else:
            table.add_row(section, str(content))
    output.console(arguments).print(table)
    output.write_json(arguments.json, facts)
