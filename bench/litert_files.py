"""Makes LiteRT's files of the benchmarks' networks, in bench/files: ``python bench/litert_files.py``.

A file takes ten seconds, all take five minutes; files that exist stay. Needs the extra ``litert``. It may be installed
in an environment of its own, because it is heavy and only this script needs it.
"""

from __future__ import annotations

import contextlib
import io

from engines import GRID, Case, litert_file, network

from mnv2_fused.extras import use

NETWORK = [(1.0, 224, batch) for batch in (1, 8, 32)]


def make(width: float, resolution: int, batch: int) -> None:
    converter = use("litert_torch", "litert")
    images = Case(width, resolution, batch).images()
    model = converter.to_channel_last_io(network(width), args=[0]).eval()
    path = litert_file(width, resolution, batch)
    with contextlib.redirect_stdout(io.StringIO()):
        converted = converter.convert(model, (images.permute(0, 2, 3, 1).contiguous(),))
    unfinished = path.with_suffix(".part")
    converted.export(str(unfinished))
    unfinished.replace(path)


if __name__ == "__main__":
    for case in sorted({*NETWORK, *GRID}):
        if not litert_file(*case).exists():
            make(*case)
        print(litert_file(*case), flush=True)
