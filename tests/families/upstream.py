"""Runs another project's own tests twice, with its models plain and converted, and compares the outcomes.

    python tests/families/upstream.py PROJECT FOLDER [OPTIONS OF PYTEST]

PROJECT is a key of `PROJECTS`. FOLDER is that project's source, of the version that is installed: an unpacked source
archive or a checkout. Prints each test whose outcome differs. Exits with 1 if there is one, or if no test passed.

The file is also the plugin that pytest loads for it: with CONVERT set in the environment every model of the project is
converted as soon as it is built.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CONVERT = "MNV2_FUSED_TEST_CONVERT"


class Project(NamedTuple):
    """A project's tests, pytest's expression that selects from them, and the classes whose instances are converted."""

    tests: tuple[str, ...]
    selected: str
    classes: tuple[str, ...]  # module:class


PROJECTS = {
    "timm": Project(
        ("tests/test_models.py",),
        "(mobilenetv2 or efficientnet_lite or mnasnet or fbnetc or spnasnet) and not pretrained",
        ("timm.models.efficientnet:EfficientNet", "timm.models.efficientnet:EfficientNetFeatures"),
    ),
    "torchvision": Project(
        ("test/test_models.py", "test/test_backbone_utils.py"),
        "mobilenet_v2 or mobilenetv2 or mnasnet",
        ("torchvision.models.mobilenetv2:MobileNetV2", "torchvision.models.mnasnet:MNASNet"),
    ),
    "transformers": Project(
        ("tests/models/mobilenet_v2/test_modeling_mobilenet_v2.py",),
        "MobileNetV2",
        tuple(
            f"transformers.models.mobilenet_v2.modeling_mobilenet_v2:MobileNetV2{name}"
            for name in ("Model", "ForImageClassification", "ForSemanticSegmentation")
        ),
    ),
    "segmentation_models_pytorch": Project(
        ("tests/encoders/test_torchvision_encoders.py", "tests/encoders/test_timm_universal.py"),
        "TestMobileNetEncoder or TestTimmUniversalEncoder",
        (
            "segmentation_models_pytorch.encoders.mobilenet:MobileNetV2Encoder",
            "segmentation_models_pytorch.encoders.timm_universal:TimmUniversalEncoder",
        ),
    ),
}


# -------------------------------------------------------------------------------------------------------- the plugin


def convert_when_built(name: str) -> None:
    """Makes the constructor of `name` (module:class) convert what it built. Subclasses call it before they are done,
    so they are left alone.
    """
    import mnv2_fused

    module, _, attribute = name.partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    plain = cls.__init__

    @functools.wraps(plain)
    def build(self, *arguments, **keywords) -> None:
        plain(self, *arguments, **keywords)
        if type(self) is cls:
            try:
                mnv2_fused.convert(self)
            except ValueError:  # nothing of it can be converted
                counts["left plain"] += 1
            else:
                counts["converted"] += 1

    cls.__init__ = build


counts: Counter[str] = Counter()


# Before the project's conftest.py imports torchvision, whose wheel may be built for a torch with CUDA.
if os.environ.get(CONVERT) is not None:
    from mnv2_fused import extras

    with contextlib.suppress(ImportError):
        extras.use("torchvision", "detection")


def pytest_configure(config) -> None:
    for name in PROJECTS[os.environ[CONVERT]].classes if os.environ.get(CONVERT) else ():
        convert_when_built(name)


def pytest_terminal_summary(terminalreporter) -> None:
    if counts:
        terminalreporter.write_line(f"models: {dict(counts)}")


# -------------------------------------------------------------------------------------------------------- the script


def outcomes(project: Project, folder: Path, converted: str, options: list[str]) -> dict[str, str]:
    """The outcome of each test, by its name."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        here = str(Path(__file__).resolve().parent)
        path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "upstream",
            "-k",
            project.selected,
            f"--junitxml={report}",
        ]
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", "--tb=short", *project.tests, *options],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", CONVERT: converted},
            check=False,
        )
        if not report.exists():
            sys.exit(f"pytest ended with {done.returncode} before it wrote a report")
        cases = ElementTree.parse(report).iter("testcase")
    found = {}
    for case in cases:
        bad = {child.tag for child in case} & {"failure", "error", "skipped"}
        found[f"{case.get('classname')}::{case.get('name')}"] = min(bad, default="passed")
    return found


def main(arguments: list[str]) -> int:
    if len(arguments) < 2 or arguments[0] not in PROJECTS:
        print(
            f"usage: upstream.py PROJECT FOLDER [OPTIONS OF PYTEST]; projects: {', '.join(PROJECTS)}", file=sys.stderr
        )
        return 2
    name, folder, *options = arguments
    project = PROJECTS[name]
    plain, converted = (outcomes(project, Path(folder), which, options) for which in ("", name))
    different = sorted(test for test in plain.keys() | converted.keys() if plain.get(test) != converted.get(test))
    for test in different:
        print(f"{test}: plain {plain.get(test, 'missing')}, converted {converted.get(test, 'missing')}")
    passed = sum(outcome == "passed" for outcome in converted.values())
    print(f"{name}: {len(plain)} tests, {passed} pass with converted models, {len(different)} differ from plain")
    return int(bool(different) or not passed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
