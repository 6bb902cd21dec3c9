"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mnv2_fused import _C, MobileNetV2, cli, weights
from mnv2_fused.cli import compare, gpu_plan
from mnv2_fused.data import images
from mnv2_fused.tools import measure, rates

SMALL = ["--width", "0.1", "--resolution", "32", "--batch", "1", "--threads", "1", "--seconds", "0.01"]


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").resize((80, 60)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small network with 5 classes: weights and labels."""
    directory = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = MobileNetV2(5, 0.1)
    weights.randomize_batch_norm(model)
    save_file(model.state_dict(), directory / "small.safetensors")
    (directory / "labels.txt").write_text("ant\nbee\ncat\ndog\neel\n", encoding="utf-8")
    return str(directory / "small.safetensors"), str(directory / "labels.txt")


def run(*arguments: str) -> int:
    """The exit code, also if argparse exits by itself."""
    try:
        return cli.main(list(arguments))
    except SystemExit as stop:
        return stop.code


# ------------------------------------------------------------------------------------------------------------- compare


def test_compare_is_the_default_and_writes_json(tmp_path, capsys):
    path = tmp_path / "out.json"
    assert run("--json", str(path), "--width", "0.1", "--resolution", "32", "--batch", "1,3", *SMALL[6:]) == 0
    out = capsys.readouterr().out
    assert "random, with randomised batch-norm statistics" in out
    assert "eager channels_last" in out and "fused is" in out
    assert "not fused" not in out

    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["machine"]["cpu"] and content["machine"]["isa"] in ("scalar", "avx2", "avx512")
    assert content["versions"]["torch"] == torch.__version__
    assert content["date"] and content["command"]
    assert content["settings"]["width"] == 0.1
    assert [(r["batch"], r["threads"]) for r in content["results"]] == [(1, 1), (3, 1)]
    for result in content["results"]:
        for name in compare.CONTENDERS:
            assert result["latency_ms"][name] > 0
            assert result["images_per_s"][name] == pytest.approx(1e3 * result["batch"] / result["latency_ms"][name])
            assert result["peak_activation_bytes"][name] > 0
        assert result["largest_relative_difference"] < 1e-4
        assert result["runs"] >= 5


def test_compare_in_words(capsys):
    assert run("compare", *SMALL) == 0
    assert "MobileNetV2 0.1, 32x32, float32" in capsys.readouterr().out


def test_json_alone_on_standard_output(capsys):
    assert run(*SMALL, "--json", "-") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["results"]
    assert "fused is" in captured.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_compare_in_16_bits(dtype, capsys):
    assert run(*SMALL, "--dtype", dtype, "--json", "-") == 0
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert 0 <= result["largest_relative_difference"] < 0.2


def test_compare_with_weights_and_a_photograph(files, photo, capsys):
    assert run("--weights", files[0], "--image", photo, *SMALL[2:]) == 0
    out = capsys.readouterr().out
    assert f"weights: {files[0]} (torchvision convention)" in out
    assert f"input: {photo}" in out


def test_compare_says_what_falls_back(capsys, monkeypatch):
    real = compare.MobileNetV2

    def hooked(*args, **kwargs):
        model = real(*args, **kwargs)
        model.features[3].conv[0].register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(compare, "MobileNetV2", hooked)
    assert run(*SMALL) == 0
    assert "not fused: features.3: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ classify


def test_classify(files, photo, capsys):
    assert run("classify", photo, "--weights", files[0], "--labels", files[1], "--top", "2", "--json", "-") == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert content["settings"]["classes"] == 5 and content["settings"]["convention"] == "torchvision"
    (answer,) = content["answers"]
    model, convention = weights.load_model(files[0], fused=False)
    with torch.no_grad():
        expected = model(images.load_batch([photo], convention))[0].softmax(0)
    best = expected.argsort(descending=True)[:2].tolist()
    assert [row["index"] for row in answer["top"]] == best
    assert [row["label"] for row in answer["top"]] == [["ant", "bee", "cat", "dog", "eel"][i] for i in best]
    assert [row["probability"] for row in answer["top"]] == pytest.approx(expected[best].tolist(), rel=1e-3)
    assert answer["top"][0]["label"] in captured.err


def test_classify_without_labels(files, photo, capsys):
    assert run("classify", photo, "--weights", files[0]) == 0
    assert "(no --labels)" in capsys.readouterr().out


def test_one_bad_image_does_not_cost_the_others(files, photo, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_text("no image", encoding="utf-8")
    assert run("classify", str(bad), photo, str(tmp_path / "none.png"), "--weights", files[0], "--json", "-") == 2
    captured = capsys.readouterr()
    assert [answer["image"] for answer in json.loads(captured.out)["answers"]] == [photo]
    assert "error: not an image" in captured.err and "no such image" in captured.err


# --------------------------------------------------------------------------------------------------------- plan, info


def test_plan_has_every_block(capsys):
    assert run("plan", "--json", "-", "--batch", "2", "--resolution", "96") == 0
    captured = capsys.readouterr()
    blocks = json.loads(captured.out)["blocks"]
    assert [block["block"] for block in blocks] == [f"features.{i}" for i in range(1, 18)]
    assert (blocks[0]["h"], blocks[0]["c_in"], blocks[0]["has_expand"]) == (48, 32, False)
    assert (blocks[-1]["h"], blocks[-1]["c_hidden"], blocks[-1]["plan"]["h_out"]) == (3, 960, 3)
    assert "features.17" in captured.err


@pytest.mark.parametrize(("resolution", "total"), [(224, 300.8), (192, 221.3), (160, 154.1), (128, 99.1), (96, 56.3)])
def test_plan_counts_the_multiply_adds_of_the_whole_network(resolution, total, capsys):
    assert run("plan", "--json", "-", "--resolution", str(resolution)) == 0
    blocks = sum(block["plan"]["macs"] for block in json.loads(capsys.readouterr().out)["blocks"])
    stem = (resolution // 2) ** 2 * 27 * 32
    head = (resolution // 32) ** 2 * 320 * 1280 + 1280 * 1000
    assert (blocks + stem + head) / 1e6 == pytest.approx(total, abs=0.06)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plan_measures_every_block(dtype, capsys, monkeypatch):
    real = rates.measured_seconds
    monkeypatch.setattr(rates, "measured_seconds", lambda block, x: real(block, x, seconds=0.001))
    assert run("plan", "--measure", "--json", "-", *SMALL[:8], "--batch", "2", "--dtype", dtype) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    total = content["total"]
    for row in (*content["blocks"], {"plan": total, **total}):
        macs = 2 * row["plan"]["macs"]
        assert row["measured_gmacs_per_second"] * row["measured_seconds"] == pytest.approx(macs / 1e9)
        assert row["predicted_gmacs_per_second"] * row["predicted_seconds"] == pytest.approx(macs / 1e9)
        assert row["predicted_gmacs_per_second"] < total["peak_gmacs_per_second"]
        assert row["share_of_peak"] == pytest.approx(row["measured_gmacs_per_second"] / total["peak_gmacs_per_second"])
    for key in ("measured_seconds", "predicted_seconds"):
        assert total[key] == pytest.approx(sum(row[key] for row in content["blocks"]))
    assert "all blocks" in captured.err and "predicted" in captured.err


def test_plan_measures_only_when_asked(capsys):
    assert run("plan", "--json", "-") == 0
    captured = capsys.readouterr()
    assert "total" not in json.loads(captured.out) and "predicted" not in captured.err


@pytest.mark.parametrize(("device", "gpu"), [("sm_80", "108 multiprocessors"), ("sm_90", "132 multiprocessors")])
def test_plan_of_a_gpu(device, gpu, capsys):
    assert run("plan", "--device", device, "--json", "-", "--batch", "32", "--dtype", "float16") == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert len(content["launches"]) == 19 and gpu in captured.err
    assert f"{gpu_plan.GPUS[device].memory / 1e12:.1f} TB/s" in captured.err and "stem joined with" in captured.err
    for launch in content["launches"]:
        assert f" {launch['name']} " in captured.err and f" {launch['predicted_us']:.1f} " in captured.err
        assert f" {gpu_plan.PARTS[launch['binds']]} " in captured.err
    for block in content["launches"][:17]:
        assert f"{block['tile_h']}x{block['tile_w']}" in captured.err
    total = sum(launch["predicted_us"] for launch in content["launches"])
    assert f" {total:.1f} " in captured.err


def test_plan_of_a_gpu_in_float32(capsys):
    tensor = {}
    for option in ("--tf32", "--no-tf32"):
        assert run("plan", "--device", "sm_90", "--json", "-", option) == 0
        captured = capsys.readouterr()
        tensor[option] = sum(launch["us"]["tensor"] for launch in json.loads(captured.out)["launches"])
        assert ("TF32" in captured.err) == (option == "--tf32")
    assert tensor["--no-tf32"] > 3 * tensor["--tf32"]


def test_a_gpu_is_not_measured(capsys):
    assert run("plan", "--device", "sm_90", "--measure") == 2
    assert "--measure needs --device cpu" in capsys.readouterr().err
    assert run("plan", "--device", "sm_70") == 2
    assert "invalid choice: 'sm_70'" in capsys.readouterr().err


def test_prediction_counts_all_multiply_adds_and_follows_the_peak():
    for shape in rates.block_shapes(MobileNetV2().eval(), 224):
        plan = _C.cpu_plan(*rates.plan_arguments(shape, 3), threads=1)
        assert sum(rates.macs_by_part(shape, plan)) == plan["macs"]
        seconds = rates.predicted_seconds(shape, plan, 3, 1e9)
        assert 0.5 < 3 * plan["macs"] / 1e9 / seconds < 0.9
        assert rates.predicted_seconds(shape, plan, 6, 4e9) == pytest.approx(seconds / 2)


def test_what_runs_plain_has_no_operator_to_measure():
    block = MobileNetV2(width_mult=0.1, fused=False).train().features[2]
    with pytest.raises(ValueError, match="expected a block that runs fused"):
        rates.operator(block, torch.zeros(1, 8, 8, 8))


def test_plan_shows_cut_columns(capsys):
    options = ("--resolution", "1025", "--output-stride", "8", "--threads", "1")
    assert run("plan", "--json", "-", *options) == 0
    captured = capsys.readouterr()
    block = json.loads(captured.out)["blocks"][-1]
    assert (block["h"], block["dilation"], block["plan"]["halo"]) == (129, 4, 8) and block["plan"]["columns"] > 1
    assert "columns" in captured.err and "halo" in captured.err and "output stride 8" in captured.err


def test_plan_prints_in_a_narrow_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert run("plan") == 0
    assert "112x112x32" in capsys.readouterr().out


def test_info(capsys):
    assert run("info", "--json", "-") == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts["isa"]["in_use"] in facts["isa"]["supported"]
    assert facts["build"] and facts["versions"]["torch"] == torch.__version__
    assert "supported" in captured.err


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "-1"], "argument --batch: expected whole numbers from 1 to 4096 separated by commas, got '-1'"),
        (["--batch", "1,,2"], "argument --batch"),
        (["--batch", "1.5"], "argument --batch"),
        (["--threads", "0"], "argument --threads"),
        (["--resolution", "many"], "argument --resolution: expected a whole number from 1 to 8192, got 'many'"),
        (["--width", "nan"], "argument --width: expected a number above 0"),
        (["--width", "-1"], "argument --width"),
        (["--seconds", "0"], "argument --seconds"),
        (["--seed", "9" * 30], "argument --seed: expected a whole number from -9223372036854775808 to "),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--convention", "caffe"], "argument --convention: invalid choice: 'caffe'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["predict"], "invalid choice: 'predict'"),
        (["classify"], "the following arguments are required: IMAGE, --weights"),
        (["classify", "a.png"], "the following arguments are required: --weights"),
        (["--weights", "nothing.pth"], "error: no such weights file: nothing.pth"),
        (["--weights", "IMAGENET1K_V3"], "no published checkpoint of that name"),
        (["--weights", "https://a.b/w.pth"], "got a URL: https://a.b/w.pth."),
        (["--image", "nothing.png"], "error: no such image: nothing.png"),
        (["plan", "--device", "sm_90", "--width", "16"], "no tile that fits into sm_90's shared memory"),
        (["--json", "/nonexistent/out.json"], "--json: no such directory: /nonexistent"),
        (["--json", "/"], "--json: expected a file, got a directory: /"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err and captured.out == ""


def test_bad_combinations(files, photo, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("ant\nbee\ncat\ndog\n", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    cases = {
        "--width 1 contradicts --weights, whose width is 0.1": ["--weights", files[0], "--width", "1"],
        "has 4 labels, but the weights have 5 classes; one of the two counts a background": [
            *["classify", photo, "--weights", files[0], "--labels", str(tmp_path / "short.txt")]
        ],
        "cannot read labels": ["classify", photo, "--weights", files[0], "--labels", str(tmp_path / "binary.txt")],
        "no such labels file": ["classify", photo, "--weights", files[0], "--labels", str(tmp_path / "none.txt")],
        "--top 6: the weights have 5 classes": ["classify", photo, "--weights", files[0], "--top", "6"],
        "not a file of weights": ["classify", photo, "--weights", files[1]],
    }
    for message, arguments in cases.items():
        assert run(*arguments) == 2, arguments
        assert message in capsys.readouterr().err


def test_out_of_memory_is_an_error_not_a_traceback(capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(compare, "_inputs", refuse)
    assert run(*SMALL) == 1
    assert "error: not enough memory; try a smaller --batch" in capsys.readouterr().err


def test_interrupted(capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "_measure_case", interrupt)
    assert run(*SMALL) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["compare"], ["classify"], ["train"], ["plan"], ["info"]])
def test_help(command, capsys):
    assert run(*command, "--help") == 0
    assert "usage: python -m mnv2_fused" in capsys.readouterr().out


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("mnv2_fused ")


def process() -> tuple[list[str], dict[str, str]]:
    """The command and the environment of a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return [sys.executable, "-W", "ignore", "-m", "mnv2_fused"], environment


def test_an_unknown_instruction_set_is_one_line():
    command, environment = process()
    environment["MNV2_FUSED_CPU_ISA"] = "mmx"
    bad = subprocess.run([*command, "info"], capture_output=True, text=True, env=environment)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: mnv2_fused: MNV2_FUSED_CPU_ISA must be one of scalar")
    assert bad.stderr.endswith("got 'mmx'\n") and bad.stderr.count("\n") == 1


def test_as_a_module_in_a_process_of_its_own(tmp_path):
    """Exit codes, streams and a reader that leaves early, as a shell sees them."""
    command, environment = process()
    bad = subprocess.run([*command, "--image", "none.png"], capture_output=True, text=True, env=environment)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error: no such image: none.png\n"
    piped = subprocess.Popen(
        [*command, "plan", "--json", "-"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    piped.stdout.close()
    assert b"Traceback" not in piped.stderr.read()
    piped.wait(60)


# --------------------------------------------------------------------------------------------------------- measurement


def test_peak_memory_counts_what_lives_at_once():
    x = torch.zeros(250_000)  # 1 MB

    def two_then_one():
        y = x + x
        z = y + x
        del y
        return z

    two_then_one()
    assert measure.peak_memory(two_then_one) == 2_000_000
    assert measure.peak_memory(lambda: x.add_(x)) == 0
    assert measure.peak_memory(lambda: [x + x, x + x, x + x]) == 3_000_000


def test_peak_memory_of_the_fused_model_includes_its_scratch():
    model = MobileNetV2(width_mult=0.35).eval()
    x = torch.zeros(1, 3, 64, 64)
    with torch.inference_mode():
        model(x)
        peak = measure.peak_memory(lambda: model(x))
    assert peak > _C.scratch_high_water() > 0


def test_interleaved_takes_turns():
    order, shares = [], []
    times = measure.interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        seconds=0.001,
        minimum=3,
        burst=2,
        progress=shares.append,
    )
    assert "".join(order[:12]) == "aaabbbaaabbb", "one call to warm up, two that are timed, then the other"
    assert len(times["a"]) == len(times["b"]) == len(order) // 6 * 2 >= 3
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert measure.medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_settle_waits_for_the_threads_of_others(monkeypatch):
    """Two windows in which others use 10 ms of processor time, and one in which only this thread does."""
    process, this = iter([1.0, 1.01, 1.01, 1.02, 1.02, 1.03]), iter([0.5, 0.5, 0.5, 0.5, 0.5, 0.51])
    monkeypatch.setattr(measure.time, "process_time", lambda: next(process))
    monkeypatch.setattr(measure.time, "thread_time", lambda: next(this))
    start = time.perf_counter()
    measure.settle()
    assert time.perf_counter() - start >= 0.03
    assert next(process, None) is next(this, None) is None


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), measure.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_difference():
    one = torch.tensor([1.0, -4.0])
    assert measure.difference(one + torch.tensor([0.0, 1.0]), one) == (1.0, 0.25)
    assert measure.difference(torch.zeros(2), torch.zeros(2)) == (0.0, 0.0)
    assert measure.difference(torch.ones(2), torch.zeros(2)) == (1.0, float("inf"))
    assert measure.difference(torch.tensor([float("nan")]), torch.ones(1))[0] != 0.0
    with pytest.raises(ValueError, match="shapes differ"):
        measure.difference(torch.zeros(2), torch.zeros(3))
