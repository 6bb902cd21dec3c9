"""The checks of the CUDA kernels find faults: each of these, put into a copy of the code, makes one of them fail."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulator import emulator_call
from test_cuda_ends import check_head, check_joined, check_stem, image
from test_cuda_kernels import A100, H200, RELU6, SCHEDULES, check_block
from test_cuda_large import far_apart, images_before
from test_cuda_networks import MEMORY, SOME, STEM, Block, Dense, Head, check_network
from test_kernels import block_weights

SOURCE = Path(__file__).parents[2] / "csrc"

# Name, file as seen from csrc/cuda, text that stands there once, and the fault that replaces it. Faults that show only
# if thread blocks run at the same time are not among them: the emulator runs one after the other.
WAIT = "wait_for_previous_kernel();\n  allow_next_kernel();\n"
FAULTS = [
    ("no barrier between expansion and filter", "block.cuh",
     "if (a.has_expand && !a.ahead) barrier();", ""),
    ("a chunk is expanded over the one before", "block.cuh", "expanded + expand_turn(turn) * a.e_second", "expanded"),
    ("a chunk is filtered before it is expanded", "block.cuh", "window + filter_turn(a, turn) * a.e_second",
     "window + expand_turn(turn) * a.e_second"),
    ("the second expanded tile is not cleared", "block.cuh",
     "if (a.ahead) zero_expanded(a, expanded + a.e_second);", ""),
    ("the last chunk is not filtered", "block.cuh", "steps = a.ahead ? chunks + 1 : chunks;", "steps = chunks;"),
    ("a step has the weights of the one before", "block.cuh",
     "place = task.first_chunk + number;", "place = task.first_chunk + number - (number > 0);"),
    ("the first step's weights begin where others' do", "block.cuh",
     "copy_bytes(a, to + skipped,", "copy_bytes(a, to,"),
    ("a stem's weights are not behind the block's", "block.cuh", "copy_bytes(a, to + a.rest,", "copy_bytes(a, to,"),
    ("no barrier after the copies", "block.cuh", "    barrier();  // weights and pixels are there", "    // weights"),
    ("no barrier before the next pixels", "block.cuh", "if (!a.has_expand) barrier();", ""),
    ("no barrier after the table of places", "block.cuh",
     "  barrier();\n\n  wait_for_previous", "\n  wait_for_previous"),
    ("no barrier after the ticket is taken", "store.cuh",
     "barrier();\n  if (!*last) return false;", "if (!*last) return false;"),
    ("no barrier before the sums of a cluster", "block.cuh",
     "barrier();  // before sums lie where weights and pixels are", "// before sums"),
    ("a cluster's sums are read before they are there", "block.cuh",
     "cluster_barrier();\n      store_cluster", "store_cluster"),
    ("a block ends whose sums a cluster reads", "block.cuh",
     "cluster_barrier();  // before a block ends whose sums others read", "// others read"),
    ("a block of a cluster reads its own sums alone", "store.cuh",
     "a.threads, split, values[", "a.threads, 0, values["),
    ("a cluster adds up from the last split on", "store.cuh",
     "a.threads, split, values[", "a.threads, a.splits - 1 - split, values["),
    ("a cluster leaves out the last split", "store.cuh",
     "if (first + i / 4 / kCount < a.splits)", "if (first + i / 4 / kCount + 1 < a.splits)"),
    ("a warp's sums are stored by no block of a cluster", "store.cuh",
     "unit < units; unit", "unit < units / 2; unit"),
    ("a cluster stores another row of a warp", "store.cuh", "row = warp_row % B::kRows;", "row = 0;"),
    ("a cluster's sums overlap the residual", "store.cuh",
     "(shared_memory() + a.weights_at)", "(shared_memory() + a.x_at)"),
    ("a cluster's sums have no room", "plan.cpp",
     "cluster ? std::max(t.shared, t.weights_at + sums * 32 * warps * 4) : t.shared;", "t.shared;"),
    ("splits are launched without a cluster", "arguments.cpp",
     ".cluster = plan.cluster ? plan.splits : 1};", ".cluster = 1};"),
    ("copies are not waited for", "block.cuh", "copy_async_wait<0>();", "copy_async_wait<1>();"),
    ("weights are not waited for", "block.cuh",
     "if (bulk_copies() && !(again && chunks == 1)) wait_for_arrival(", "if (false) wait_for_arrival("),
    ("weights are waited for until those before are there", "block.cuh",
     "(turn & 2) != 0);", "(turn & 2) == 0);"),
    ("every thread copies all weights", "block.cuh", "if (bulk_copies() && !copies_in_bulk(a)) return;", ""),
    ("more weights are waited for than come", "block.cuh",
     "bytes + a.stem_chunk);", "bytes + a.stem_chunk + 16);"),
    ("the next weights overwrite those in use", "block.cuh",
     "shared + a.weights_at + (turn & 1) * a.weights_bytes;", "shared + a.weights_at;"),
    ("the halo is a row too low", "block.cuh",
     "(in.row + row - in.origin_row)", "(in.row + row - in.origin_row + 1)"),
    ("the halo is a column too far right", "block.cuh",
     "(column - in.origin_column) *", "(column - in.origin_column + 1) *"),
    ("the border is not cleared", "block.cuh", "zero_expanded(a, expanded);  // beyond", "// beyond"),
    ("matrices of a fragment swapped", "tile.cuh",
     "to.first = {a[0], a[2]}, to.second = {a[1], a[3]};", "to.first = {a[0], a[1]}, to.second = {a[2], a[3]};"),
    ("registers of a fragment swapped", "tile.cuh",
     "rows.second.r[0], rows.first.r[1]", "rows.first.r[1], rows.second.r[0]"),
    ("halves of the projection swapped", "block.cuh",
     "load_operands(project + tile * 512, b);", "load_operands(project + tile * 512, b), b[0] = b[1];"),
    ("columns packed in the order of the channels", "pack.cuh",
     "return base * 8 + column / 2 * 2 * count + (tile - base) * 2 + column % 2;", "return tile * 8 + column;"),
    ("channels that do not exist are kept", "block.cuh",
     "i % 4 * 2 + 1 < channels ? word : i % 4 * 2 < channels ? word & 0xffffu : 0u;", "word;"),
    ("the last chunk's channels all count", "block.cuh", "a.expand_lo == 0.f && channels >= 32", "a.expand_lo == 0.f"),
    ("no upper bound after the expansion", "block.cuh", "clamped_pair<T, true>(pair[0], pair[1], 0, most)",
     "pack_relu<T>(pair[0], pair[1])"),
    ("rows that do not count are stored as a pixel", "block.cuh", "to = a.e_image * a.images;", "to = 0;"),
    ("rows in the order of pixels", "block.cuh",
     "row / (kRows * 8) * (kRows * 8) + row % 8 * kRows + row / 8 % kRows", "row"),
    ("images that do not exist are read", "block.cuh",
     "} else if (task.first_image + image < a.n) {", "} else {"),
    ("pixels beyond the image are stored", "store.cuh",
     "a.w_out - column ? a.tile_w - tile_column : a.w_out - column;", "a.w_out ? a.tile_w - tile_column : 0;"),
    ("a ticket is left", "store.cuh", "if (*last) a.tickets[place] = 0;", ""),
    ("the residual of another row", "store.cuh", "(p.image * in.height + row - in.row)", "(p.image * in.height + row)"),
    ("the residual of a block without expansion is its tile's", "store.cuh",
     "pixel_in = outputs.pixel + row", "pixel_in = outputs.in_tile + row"),
    ("the residual of the first channels", "store.cuh", "target.first_channel + channel, values",
     "channel % 4, values"),
    ("a filter's row skipped", "filter.cuh", "for (int ky = 0; ky < 3; ++ky)", "for (int ky = 0; ky < 2; ++ky)"),
    ("no upper bound after the filter", "filter.cuh",
     "clamp_filtered<true>(sums[i], a.lo, a.hi, out[i])", "clamp_filtered<true>(sums[i], a.lo, 1e4f, out[i])"),
    ("no lower bound of zero after the filter", "filter.cuh", "= fma_relu_half2(", "= fma_half2("),
    ("no other bounds after the filter", "filter.cuh",
     "clamp_filtered<false>(sums[i], a.lo, a.hi, out[i]);\n    }",
     "clamp_filtered<true>(sums[i], a.lo, a.hi, out[i]);\n    }"),
    ("the last product's pixel is another one", "filter.cuh", "last[y * kWidth + x] = pixel;", "last[x] = pixel;"),
    ("the only weights are overwritten while in use", "block.cuh",
     "if (a.has_expand) barrier();  // before the only place", "// before the only place"),
    ("the only weights are those of the chunk before", "block.cuh",
     "copy_weights(a, task, turn + 1, next, shared);\n      }\n",
     "copy_weights(a, task, turn + 1, number, shared);\n      }\n"),
    ("too little shared memory", "tiles.cpp", "t.weights_at + buffers * t.weights +", "t.weights_at + t.weights +"),

    ("a block does not wait for the kernel before", "block.cuh", WAIT, ""),
    ("the stem does not wait for the kernel before", "ends.cuh", WAIT + "  const unsigned", "  const unsigned"),
    ("pooling does not wait for the kernel before", "ends.cuh", WAIT + "  for (int i", "for (int i"),
    ("the classifier does not wait for the kernel before", "ends.cuh",
     "      wait_for_previous_kernel();\n      allow_next_kernel();\n", ""),
    ("the classifier's lanes do not wait for each other", "ends.cuh",
     "copy_async_wait<0>();\n    warp_barrier();\n    multiply", "copy_async_wait<0>();\n    multiply"),
    ("pooled sums are read before they are there", "ends.cuh",
     "      barrier();\n      MNV2_UNROLL\n      for (int j = 0; j < 8; ++j) {\n        sums[j] = partial",
     "      MNV2_UNROLL\n      for (int j = 0; j < 8; ++j) {\n        sums[j] = partial"),
    ("pooling leaves out a warp's pixels", "ends.cuh", "for (int w = 1; w < kWarps", "for (int w = 2; w < kWarps"),
    ("tickets are not cleared", "run.cpp", "if (block == 1 && clears", "if (block == 0 && clears"),
    ("one ticket is cleared", "block.cuh", "i < a.clears; i", "i < 1; i"),
    ("a block waits after it has read", "block.cuh",
     "  wait_for_previous_kernel();\n  allow_next_kernel();\n\n  if (a.clears > 0) clear_tickets(a);\n",
     "  copy_async(shared, first_row<T>(a, task.first_image, in), true);\n  wait_for_previous_kernel();\n"),

    ("no barrier before the next round's pixels", "block.cuh", "if (again && a.residual) barrier();", ""),
    ("every round has the first one's pixels", "block.cuh",
     "places, first_row<T>(a, first_image, in), x_tile)", "places, first_row<T>(a, task.first_image, in), x_tile)"),
    ("every round has the first one's images", "block.cuh",
     "load_images<M>(a, first_image, in", "load_images<M>(a, task.first_image, in"),
    ("every round has the first one's channels", "block.cuh",
     "first_row<T>(a, forgotten(first_image), in)", "first_row<T>(a, task.first_image, in)"),
    ("a later round's sums begin with those before", "block.cuh", "(&sums[0][0][0])[i] = 0.f;",
     "(&sums[0][0][0])[i] = first_image * 0.1f;"),
    ("a later round has no weights", "block.cuh", "next > 0 || (!last && chunks > 1)", "next > 0"),
    ("weights that stay are waited for again", "block.cuh", "!(again && chunks == 1)", "true"),
    ("weights that stay are copied again", "block.cuh", "(!last && chunks > 1)", "!last"),
    ("there is one round", "block.cuh", "if (last) return;", "return;"),
    ("images in the order of thread blocks", "task.cuh",
     "task.first_image = tile / a.tiles_y * of_block;", "task.first_image = tile / a.tiles_y * a.images;"),
    ("rounds beyond the last image", "task.cuh", "a.n - task.first_image < of_block", "a.n < 0"),
    ("a chunk's place is that of its number", "block.cuh",
     "int expand_turn(int turn) { return turn & 1; }", "int expand_turn(int turn) { return 0 * turn; }"),

    ("what lies beside a window is multiplied", "window.cuh", "0xffffffffu : 0x0000ffffu", "0xffffffffu : 0xffffffffu"),
    ("what fills up a sum is multiplied", "window.cuh", "!exists ? 0 :", "!exists ? 0xffffffffu :"),
    ("odd windows begin a value early", "window.cuh", "at + s.shifted - M::kBytes : at", "at - M::kBytes : at"),
    ("the copy begins with the tile's value", "window.cuh", "source(s, value + copy,", "source(s, value,"),
    ("the image's edge is not zero", "window.cuh", "if (in_image && source.inside[i])", "if (in_image)"),
    ("a window reads a row too low", "window.cuh", "row * s.stride - s.pad_top", "row * s.stride - s.pad_top + 1"),
    ("only the first rows of a tile are read", "window.cuh", "row += kRows * step", "row += 9999"),
    ("every slice is the first one", "window.cuh", "(channel + c) * stride_c", "c * stride_c"),
    ("no barrier before the next slice", "ends.cuh", "if (channel > 0) barrier();", ""),
    ("the table of the slice before", "ends.cuh", "channel == 0 || channels < s.slice", "channel == 0"),
    ("pairs in the order of a window", "window.cuh", "M::kBytes == 2 ? i / 8 * 8 + i % 4 * 2 + i / 4 % 2 : i", "i"),
    ("windows in the order of pixels", "block.cuh", "places.from[a.windows ? place : i]", "places.from[i]"),
    ("every image has the first one's tile", "block.cuh", "x_tile + i * a.window.image,", "x_tile,"),

    ("the output is clamped after the residual", "store.cuh",
     "(pixel_in), target.first_channel + channel, values);",
     "(pixel_in), target.first_channel + channel, values);"
     " for (float& value : values) value = clamp(value, a.out_lo, a.out_hi);"),
    ("each split is clamped by itself", "store.cuh",
     "to[i * a.threads] = sums[i];", "to[i * a.threads] = clamp(sums[i], a.out_lo, a.out_hi);"),
    ("each split of a cluster is clamped by itself", "store.cuh",
     "values[i / 4 / kCount][i / 4 % kCount][i % 4];",
     "clamp(values[i / 4 / kCount][i / 4 % kCount][i % 4], a.out_lo, a.out_hi);"),
    ("no output is clamped", "store.cuh", "if (!kPlain && a.clamps_out)", "if (false)"),
    ("every image has the first one's biases", "ends.cuh", "a.image_bias + image * a.c_out", "a.image_bias"),
    ("every chunk has the first one's biases", "ends.cuh", "block_index_y() * 32, a.c_out, lane", "0, a.c_out, lane"),
    ("biases beyond the last channel are read", "tile.cuh",
     "first + i < channels ? bias[first + i] : 0.f", "bias[first + i]"),

    ("every map is in the same place", "run.cpp", "place.offset = arena.place(", "arena.place("),
    ("the place of a map is given away while it is read", "run.cpp",
     "arena.place(i, last_reader(s, i),", "arena.place(i, last_reader(s, i) - 1,"),
    ("the place of a map is given away after its first reader", "run.cpp",
     "arena.place(i, last_reader(s, i),", "arena.place(i, std::min(last_reader(s, i), i + 1),"),
    ("every output is the first one", "run.cpp", "place.output = outputs++;", "place.output = 0;"),
    ("every unit reads the one before", "run.cpp", "map(unit.source);", "map(i - 1);"),
    ("rows of a map are read as columns", "../network.h",
     "1, s.w * s.c_in, s.c_in}", "1, s.c_in, s.w * s.c_in}"),
    ("tickets are in another place than the zeros", "run.cpp",
     "plan.memory.size - plan.tickets;\n  const", "plan.memory.size - 2 * plan.tickets;\n  const"),
    ("partial sums are in the place of a map", "run.cpp", "memory + plan.partial,", "memory,"),
    ("every unit has the first one's weights", "run.cpp", "    packed += packed_bytes(unit, dtype);\n", ""),
    ("a joined stem's weights are not counted", "run.cpp",
     "    packed += packed_bytes(unit, dtype);\n    if (plan.joined && i == 0) continue;\n",
     "    if (plan.joined && i == 0) continue;\n    packed += packed_bytes(unit, dtype);\n"),
    ("a joined stem's weights are the block's", "run.cpp", "args.stem = stem;", "args.stem = weights;"),
    ("pooled over the maps", "run.cpp", "memory + plan.pooled, map(i)", "memory, map(i)"),

    ("a block's input in 32 bits", "task.cuh",
     "image * a.x_image + static", "static_cast<int>(image * a.x_image) + static"),
    ("a block's output in 32 bits", "store.cuh",
     "image * a.y_image", "static_cast<int>(image * a.y_image)"),
    ("a stem's input in 32 bits", "window.cuh",
     "(s.x) + image * s.stride_n", "(s.x) + static_cast<int>(image * s.stride_n)"),
    ("a stem's values in 32 bits", "arguments.cpp", ".near = apart < static_cast<double>(kTooMany)", ".near = true"),
    ("a stem's output in 32 bits", "ends.cuh",
     "static_cast<T*>(a.y) + pixel * a.c_out", "static_cast<T*>(a.y) + static_cast<int>(pixel * a.c_out)"),
    ("a head's input in 32 bits", "ends.cuh",
     "image * a.pixels * a.c_in", "static_cast<int>(image * a.pixels * a.c_in)"),
    ("what is pooled in 32 bits", "ends.cuh", "image * row_values", "static_cast<int>(image * row_values)"),
    ("pooled rows in 32 bits", "ends.cuh",
     "(first + (valid ? row : 0)) * a.pooled_row", "static_cast<int>((first + (valid ? row : 0)) * a.pooled_row)"),
    ("a head's output in 32 bits", "ends.cuh", "image * a.classes", "static_cast<int>(image * a.classes)"),
]  # fmt: skip


KERNELS = Path(__file__).parents[1] / "cuda_emulator" / "kernels.cpp"
HOST = sorted(path for path in (SOURCE / "cuda").glob("*.cpp") if path.name != "infer.cpp")


def run(*command: str | Path) -> None:
    done = subprocess.run([*os.environ.get("CXX", "c++").split(), *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def compile_to(directory: Path, source: Path, include: Path) -> Path:
    """The object of a source, with the headers of a copy of csrc, and one variant of the kernels."""
    made = directory / f"{source.stem}.o"
    options = ("-std=c++20", "-O1", "-fPIC", "-DMNV2_CUDA_EMULATOR", "-DONE_VARIANT")
    run(*options, f"-I{KERNELS.parent}", f"-I{include}", "-c", source, "-o", made)
    return made


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Of the code as it is, by the name of the source."""
    directory = tmp_path_factory.mktemp("objects")
    return {source.name: compile_to(directory, source, SOURCE) for source in (KERNELS, *HOST)}


def build(directory: Path, emulator, objects: dict[str, Path], fault: tuple[str, ...]):
    """The emulator's library with one variant of the kernels, from a copy with the fault."""
    (directory / "cuda").mkdir()
    for path in SOURCE.glob("*.h"):
        shutil.copy(path, directory)
    for path in (SOURCE / "cuda").iterdir():
        if path.suffix in (".h", ".cuh", ".cpp"):
            shutil.copy(path, directory / "cuda")
    _, name, before, after = fault
    faulty = directory / "cuda" / name
    text = faulty.read_text()
    assert text.count(before) == 1, f"{name} has no longer the place of this fault: {before}"
    faulty.write_text(text.replace(before, after))
    anew = {".cuh": [KERNELS], ".cpp": [faulty], ".h": [KERNELS, *(directory / "cuda" / path.name for path in HOST)]}
    linked = {**objects, **{path.name: compile_to(directory, path, directory) for path in anew[faulty.suffix]}}
    return link(directory, emulator, linked)


def link(directory: Path, emulator, objects: dict[str, Path]):
    library = directory / "libfaulty.so"
    run("-shared", *objects.values(), emulator.path, "-o", library)
    return emulator_call(library)


def checks(emulator):
    """As few and small as find all faults, in fp16 with at most 16 output channels, 3x3 and stride 1."""

    def block(x, weights, **options):
        return lambda: check_block(emulator, x, weights, **options)

    def network(network, x, device=SOME, **options):
        return lambda: check_network(emulator, network, x, torch.float16, device=device, schedules=(0, 1), **options)

    x_infinite = torch.randn(1, 16, 5, 5)
    x_infinite[0, 3, 2, 2] = float("inf")
    joined = [Dense(32, 3, 2), Block(1, 16), Block(4, 16), Block(40, 8), Block(80, 12), Head(40, 100)]
    branches = [
        STEM, Block(2, 16), Block(12, 16, tap=True, output=RELU6), Dense(24), Block(2, 12, source=1),
        Block(2, 16, source=3, tap=True), Dense(9, source=4, tap=True), Head(40, 20, 5),
    ]  # fmt: skip
    yield block(torch.randn(2, 16, 9, 7), block_weights(16, 72, 16), tile=(4, 4, 1, 1), schedules=SCHEDULES)
    yield block(torch.randn(2, 16, 9, 7), block_weights(16, 168, 16), tile=(4, 4, 1, 1, 1), schedules=SCHEDULES)
    # Rounds of an odd number of chunks, of one chunk and without an expansion.
    yield block(torch.randn(5, 16, 9, 7), block_weights(16, 72, 16), tile=(4, 4, 1, 1, 0, 2), schedules=SCHEDULES)
    yield block(torch.randn(3, 16, 9, 7), block_weights(16, 72, 16), tile=(4, 4, 1, 1, 1, 2), schedules=SCHEDULES)
    yield block(torch.randn(3, 16, 9, 7), block_weights(16, 32, 16), tile=(4, 4, 1, 1, 0, 3), schedules=SCHEDULES)
    yield block(torch.randn(3, 40, 5, 4), block_weights(40, 40, 16, expand=False), tile=(3, 2, 1, 1, 0, 2))
    # Without room for the weights of two chunks.
    small = dict(device=(1, 10240, 11264), schedules=SCHEDULES)
    yield block(torch.randn(2, 16, 9, 7), block_weights(16, 72, 16), tile=(4, 4, 1, 1), **small)
    yield block(torch.randn(3, 16, 9, 7), block_weights(16, 72, 16), tile=(4, 4, 1, 1, 0, 2), **small)
    weights = block_weights(80, 80, 16, expand=False)
    yield block(torch.randn(1, 80, 6, 5), weights, tile=(6, 3, 1, 1), schedules=SCHEDULES)
    # Splits that add up in a cluster, and in memory. The sums take more shared memory than a chunk's weights.
    splits = dict(tile=(5, 4, 1, 3), device=H200, same_on=A100, schedules=SCHEDULES)
    yield block(torch.randn(1, 16, 10, 4), block_weights(16, 128, 16), **splits)
    yield block(torch.randn(1, 16, 9, 8), block_weights(16, 64, 16), tile=(9, 8, 1, 2), schedules=(0, 1))
    yield block(torch.randn(3, 8, 3, 4), block_weights(8, 40, 8), tile=(3, 4, 2, 1), schedules=(0, 1))
    yield block(torch.randn(1, 16, 5, 4), block_weights(16, 16, 16, expand=False), tile=(3, 2, 1, 1))
    yield block(x_infinite, block_weights(16, 40, 16), tile=(5, 5, 1, 1))
    for device in (SOME, MEMORY):
        yield network(joined, image(2, 3, 10, 9, "NCHW"), device, same=True)
    yield network([STEM, Block(2, 16), Block(12, 16), Head(40, 100)], image(2, 3, 15, 12, "NHWC"), MEMORY)
    yield network(branches, image(2, 3, 11, 14, "NCHW"), MEMORY)
    for splits, device in ((1, H200), (2, H200), (2, A100)):
        clamped = dict(output=(0.0, 1.0), tile=(3, 4, 1, splits), device=device)
        yield block(torch.randn(1, 16, 5, 4), block_weights(16, 128, 16), **clamped)
    for c_out in (12, 36):
        x = image(2, 5, 7, 6, "NHWC")
        yield lambda c=c_out, x=x: check_stem(emulator, x, c, torch.float16, image_bias=True, schedules=(0, 1))
    yield block(torch.randn(2, 16, 9, 8), block_weights(16, 40, 16), before=images_before(9 * 8 * 16))
    yield lambda: check_stem(emulator, image(2, 3, 9, 14, "view"), 12, torch.float16, stride=1, schedules=(0, 1))
    for kernel, c_in, stride, pad in ((1, 100, 1, 0), (7, 90, 2, 1)):
        options = dict(kernel=kernel, stride=stride, padding=(pad,) * 4, schedules=(0, 1))
        x = image(1, c_in, 9, 14, "NHWC")
        yield lambda x=x, options=options: check_stem(emulator, x, 8, torch.float16, **options)
    yield lambda: check_joined(emulator, image(3, 3, 8, 6, "NHWC"), 40, 12, torch.float16, tile=(4, 3, 2, 1))
    yield lambda: check_joined(emulator, image(3, 3, 8, 6, "NHWC"), 40, 12, torch.float16, tile=(4, 3, 1, 1, 0, 2))
    infinite = image(2, 3, 9, 9, "NCHW")
    infinite[0, :, 3, 3] = infinite[1, :, 4, 4] = float("inf")  # first in a window, and beside one
    yield lambda: check_stem(emulator, infinite, 12, torch.float16)
    x, before = image(2, 3, 15, 16, "NCHW"), images_before(3 * 15 * 16)
    yield lambda: check_stem(emulator, x, 12, torch.float16, before=before)
    yield lambda: check_stem(emulator, far_apart(torch.float16), 12, torch.float16)
    yield lambda: check_head(emulator, 2, (2, 2), 17, 33, 33, torch.float16, before=images_before(33))
    # Rounding to fp16 hides another order of the sums but in a few of many values.
    order = dict(tile=(5, 16, 1, 8), device=H200, same_on=A100, schedules=(0,))
    yield block(torch.randn(1, 16, 10, 32), block_weights(16, 256, 16), **order)


def test_the_code_as_it_is_passes(cuda_emulator, objects, tmp_path):
    for check in checks(link(tmp_path, cuda_emulator, objects)):
        check()


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_faults_are_found(cuda_emulator, objects, tmp_path, fault):
    for check in checks(build(tmp_path, cuda_emulator, objects, fault)):
        try:
            check()
        except (AssertionError, RuntimeError):
            return
    pytest.fail("no check has found it")
