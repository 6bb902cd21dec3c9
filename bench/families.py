"""Other libraries' networks, plain and converted: units fused, errors, speed-ups. Writes the table in docs/models.md.

    python bench/families.py [--json docs/models.json] [--only TEXT] [--threads N] [--no-write]

Every network gets random scales and biases, and the batch-norm statistics of a batch of noise. Errors are the largest
difference to the plain network in float64, relative to the largest value. Times are medians of calls in turns, in one
process, plain and converted with channels_last weights and input: inference at 1x224x224 and a training step (forward,
backward) at 8x160x160. Networks of libraries that are missing are left out.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from tabulate import tabulate
from torch import Tensor, nn
from training_engines import memory_kept

import mnv2_fused
from mnv2_fused import extras
from mnv2_fused.tools import measure
from mnv2_fused.weights import randomize_batch_norm

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
PLAIN, FUSED = "plain", "converted"


class Network(NamedTuple):
    family: str  # the package, which is imported when the network is built
    name: str
    build: Callable[[object], nn.Module]  # from the imported package


def _shown(name: str, options: dict[str, object]) -> str:
    return ", ".join([name, *(f"{key}={value}" for key, value in options.items())])


def _timm(name: str, **options: object) -> Network:
    return Network("timm", _shown(name, options), lambda timm: timm.create_model(name, **options))


def _transformers(kind: str, **options: object) -> Network:
    def build(transformers) -> nn.Module:
        return getattr(transformers, kind)(transformers.MobileNetV2Config(**options))

    return Network("transformers", _shown(kind, options), build)


def _smp(architecture: str, encoder: str) -> Network:
    def build(smp) -> nn.Module:
        return getattr(smp, architecture)(encoder, encoder_weights=None, classes=2)

    return Network("segmentation_models_pytorch", f"{architecture}, {encoder}", build)


def _fpn(torchvision) -> nn.Module:
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    return mobilenet_backbone(backbone_name="mobilenet_v2", weights=None, fpn=True, trainable_layers=6)


def _lraspp(torchvision) -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.lraspp import LRASPP

    features = torchvision.models.mobilenet_v2(weights=None).features
    backbone = IntermediateLayerGetter(features, {"3": "low", "17": "high"})
    return LRASPP(backbone, 24, 320, 21)


NETWORKS = (
    Network("mnv2_fused", "MobileNetV2", lambda package: package.MobileNetV2(fused=False)),
    Network("torchvision", "mobilenet_v2", lambda torchvision: torchvision.models.mobilenet_v2()),
    Network("torchvision", "mnasnet1_0", lambda torchvision: torchvision.models.mnasnet1_0()),
    Network("torchvision", "mobilenet_backbone, fpn, frozen norms", _fpn),
    Network("torchvision", "LRASPP on mobilenet_v2", _lraspp),
    *map(_timm, ("mobilenetv2_035", "mobilenetv2_050", "mobilenetv2_100", "mobilenetv2_140")),
    *map(_timm, ("mobilenetv2_110d", "mobilenetv2_120d")),
    _timm("mobilenetv2_100", features_only=True),
    _timm("mobilenetv2_100", features_only=True, output_stride=16),
    *map(_timm, ("efficientnet_lite0", "tf_efficientnet_lite0", "tf_efficientnet_lite4")),
    *map(_timm, ("mnasnet_100", "fbnetc_100", "spnasnet_100", "semnasnet_100", "mobilenetv3_large_100")),
    _transformers("MobileNetV2ForImageClassification"),
    _transformers("MobileNetV2ForImageClassification", depth_multiplier=0.35),
    _transformers("MobileNetV2ForImageClassification", tf_padding=False),
    _transformers("MobileNetV2ForSemanticSegmentation", output_stride=8),
    _smp("Unet", "mobilenet_v2"),
    _smp("DeepLabV3Plus", "mobilenet_v2"),
    _smp("Unet", "tu-mobilenetv2_100"),
    _smp("Unet", "tu-efficientnet_lite0"),
)


def tensors(output: object) -> Iterator[Tensor]:
    """The floating-point tensors of an output: a tensor, or a list or dict of outputs."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif output is not None:
        for part in output.values() if hasattr(output, "values") else output:
            yield from tensors(part)


def images(batch: int, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def error(got: object, expected: object) -> float:
    """The largest relative difference of any tensor."""
    pairs = zip(tensors(got), tensors(expected), strict=True)
    return max(measure.difference(one, other)[1] for one, other in pairs)


def with_statistics(model: nn.Module) -> nn.Module:
    """`model` in eval mode, with random scales and biases, and the statistics that a batch of noise then has."""
    randomize_batch_norm(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(4, 128))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    sum(t.square().mean() for t in tensors(model(x))).backward()


def speed_up(functions: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds of each."""
    for function in functions.values():
        function()
    return {
        name: 1e3 * value for name, value in measure.medians(measure.interleaved(functions, seconds=seconds)).items()
    }


def measured(network: Network, seconds: float) -> dict:
    """A row. Raises MissingExtraError if the network's library is missing."""
    package = mnv2_fused if network.family == "mnv2_fused" else extras.use(network.family, "bench")
    torch.manual_seed(0)
    plain = with_statistics(network.build(package)).to(memory_format=torch.channels_last)
    converted = copy.deepcopy(plain)
    if network.family == "mnv2_fused":
        converted = mnv2_fused.MobileNetV2().eval().to(memory_format=torch.channels_last)
        converted.load_state_dict(plain.state_dict())
    else:
        mnv2_fused.convert(converted)
    x = images(1, 224)
    row = {"family": network.family, "network": network.name}
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        row["units"] = mnv2_fused.explain(converted, x)
        row["error"] = {PLAIN: error(plain(x), exact), FUSED: error(converted(x), exact)}
        del exact
        row["inference"] = speed_up({PLAIN: lambda: plain(x), FUSED: lambda: converted(x)}, seconds)
    plain.train(), converted.train()
    x = images(8, 160)
    with memory_kept():
        row["training"] = speed_up({PLAIN: lambda: step(plain, x), FUSED: lambda: step(converted, x)}, 2 * seconds)
    return row


def table(rows: list[dict]) -> str:
    def times(milliseconds: dict[str, float]) -> str:
        plain, fused = milliseconds[PLAIN], milliseconds[FUSED]
        return f"{plain:.1f} → {fused:.1f}, **{plain / fused:.2f}x**"

    lines = [
        {
            "library": row["family"],
            "network": f"`{row['network']}`",
            "units fused": f"{sum(why is None for why in row['units'].values())} of {len(row['units'])}",
            "error, plain": f"{row['error'][PLAIN]:.1e}",
            "error, converted": f"{row['error'][FUSED]:.1e}",
            "inference 1x224², ms": times(row["inference"]),
            "training step 8x160², ms": times(row["training"]),
        }
        for row in rows
    ]
    align = ("left", "left", "right", "right", "right", "right", "right")
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True, colalign=align)


def reasons(rows: list[dict]) -> str:
    """A list of the networks that have plain units, each with the reasons."""
    lines = []
    for row in rows:
        why: dict[str, int] = {}
        for reason in filter(None, row["units"].values()):
            why[reason] = why.get(reason, 0) + 1
        if why:
            text = "; ".join(f"{count} because {reason}" for reason, count in why.items())
            lines.append(f"- `{row['network']}` runs units plain: {text}.")
    return "\n".join(lines)


def section(content: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine = content["machine"]
    threads = f"{content['threads']} thread" + ("s" if content["threads"] > 1 else "")
    head = (
        f"{content['date'][:10]}, {machine['cpu']} ({machine['isa']}), {threads}, {versions}.\n"
        f"Command: `{content['command']}`."
    )
    return "\n\n".join(filter(None, [head, table(content["rows"]), reasons(content["rows"])]))


def write(path: Path, text: str) -> None:
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "models.json", metavar="FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="networks whose library or name contains TEXT")
    parser.add_argument("--seconds", type=float, default=1.5, help="of each figure and engine (default 1.5)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--no-write", action="store_true", help="print the table, and leave file and page as they are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, missing = [], {}
    content = {**measure.environment(), "threads": options.threads, "rows": rows}
    chosen = [n for n in NETWORKS if options.only in n.family or options.only in n.name]
    for network in track(chosen, description="measuring"):
        try:
            rows.append(measured(network, options.seconds))
        except extras.MissingExtraError as why:
            missing[network.family] = str(why)
            continue
        if network.family != "mnv2_fused":
            content["versions"][network.family] = measure.version_of(network.family)
        if not options.no_write:  # after each, as the whole takes minutes
            options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            write(PAGE, section(content))
    print(section(content), *missing.values(), sep="\n")


if __name__ == "__main__":
    main()
