"""How tensors are watched, and that freed storage is never read."""

from __future__ import annotations

import os
import sys
import traceback

import pytest
import torch
from oracle import randomize
from test_weight_changes import make_block
from torch import nn

from mnv2_fused import _C, MobileNetV2
from mnv2_fused.models.units import FusedConv2dNormActivation

# ---------------------------------------------------------------------------------------------- how tensors are watched


@pytest.mark.parametrize("watch, seen", [("PLACE", ()), ("VERSION", ("version",)), ("CONTENTS", ("version", "data"))])
@torch.no_grad()
def test_watch(watch, seen):
    t = torch.randn(16, 9)

    def holds_after(change):
        same = _C.SameTensors([(t, getattr(_C.Watch, watch))])
        assert same.holds()
        change()
        return same.holds()

    assert holds_after(lambda: t.add_(1.0)) == ("version" not in seen)
    assert holds_after(lambda: t.data.add_(1.0)) == ("data" not in seen)
    for value in (t.clone(), t[1:], t.view(9, 16), t.view(torch.int32)):
        assert not holds_after(lambda value=value: setattr(t, "data", value))


@torch.no_grad()
def test_watch_counts_the_version_if_the_fingerprint_is_partial():
    small, large = torch.zeros(128, 128), torch.zeros(129, 128)
    for t, held in ((small, True), (large, False)):
        same = _C.SameTensors([(t, _C.Watch.CONTENTS)])
        t.add_(0.0)
        assert same.holds() == held
    with torch.inference_mode():
        large = torch.zeros(129, 128)
        same = _C.SameTensors([(large, _C.Watch.CONTENTS)])
        large.add_(0.0)
        assert same.holds()
        large.add_(1.0)
        assert not same.holds()
        with pytest.raises(RuntimeError, match="version counter"):
            _C.SameTensors([(large, _C.Watch.VERSION)])


@pytest.mark.parametrize("pattern", [0x5A5A5A5A, 0x01010101 << 4 | 0x01010101, -(2**31), 1])
@torch.no_grad()
def test_no_row_or_column_of_a_large_matrix_is_missed(pattern):
    matrix = torch.randn(300, 130)
    bits = matrix.view(torch.int32)
    for part in [bits[i] for i in range(300)] + [bits[:, i] for i in range(130)]:
        same = _C.SameTensors([(matrix, _C.Watch.CONTENTS)])
        part.data.bitwise_xor_(pattern)
        assert not same.holds()


@torch.no_grad()
def test_watch_takes_contents_of_dense_tensors_only():
    t = torch.randn(6, 4, 3, 5)
    for dense in (t, t.to(memory_format=torch.channels_last), t[2:3], t[:, :, :0], t[0, 0, 0, 0], t[:1, :1, :1]):
        assert _C.SameTensors([(dense, _C.Watch.CONTENTS)]).holds()
    for gaps in (t[:, ::2], t[..., :3], t.transpose(0, 1), t[:, :, :1].expand(6, 4, 3, 5)):
        with pytest.raises(ValueError, match=r"contents.*got a torch.float32 tensor of shape \[\d"):
            _C.SameTensors([(gaps, _C.Watch.CONTENTS)])
        assert _C.SameTensors([(gaps, _C.Watch.PLACE)]).holds()


# -------------------------------------------------------------------------------------------------------- freed storage


def in_a_child(function):
    """Runs `function` in a forked process: reading unmapped memory ends only that process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the parent's threads do not exist in the child
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def free(t):
    t.untyped_storage().resize_(0)


def free_half(t):
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)


@pytest.mark.parametrize("free_it", [free, free_half])
@pytest.mark.parametrize("watch", ["PLACE", "VERSION", "CONTENTS"])
def test_freed_storage_is_never_read(watch, free_it):
    def function():
        for t in (torch.randn(384), torch.randn(2**18), torch.randn(400)[8:]):
            watched = [(t, getattr(_C.Watch, watch))]
            same = _C.SameTensors(watched)
            free_it(t)
            assert not same.holds()
            with pytest.raises(RuntimeError, match=r"torch.float32 tensor of shape \[\d+\].*storage"):
                _C.SameTensors(watched)

    in_a_child(function)


@pytest.mark.parametrize("watch", ["PLACE", "VERSION", "CONTENTS"])
def test_freed_storage_that_is_smaller_at_the_same_address(watch):
    def function():
        # Larger than any hole in the heap, so it has a mapping of its own, which comes back at its address.
        t = torch.empty(10_000, 25_000)
        storage, address, size = t.untyped_storage(), t.data_ptr(), t.untyped_storage().nbytes()
        watched = [(t, getattr(_C.Watch, watch))]
        same = _C.SameTensors(watched)
        storage.resize_(0)
        storage.resize_(size - 4)
        assert t.data_ptr() == address and not same.holds()
        with pytest.raises(RuntimeError, match="a storage of 1000000000 bytes; got 999999996"):
            _C.SameTensors(watched)

    in_a_child(function)


@pytest.mark.parametrize("free_it", [free, free_half])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("make", ["block", "model"])
def test_freed_weight_raises_and_comes_back(make, inference, free_it):
    def function():
        with torch.inference_mode() if inference else torch.no_grad():
            if make == "block":
                module, x = make_block(), torch.randn(1, 8, 9, 9)
                weights = [module.conv[2].weight, module.conv[1][1].running_var]
            else:
                module = randomize(MobileNetV2(5, 0.35, [[1, 8, 1, 1], [6, 8, 1, 2]]), torch.randn(4, 3, 33, 33))
                x = torch.randn(2, 3, 33, 33)
                weights = [module.features[2].conv[0][0].weight, module.classifier[1].weight]
            y = module(x)
            for weight in weights:
                saved, size = weight.clone(), weight.untyped_storage().nbytes()
                free_it(weight)
                for _ in range(2):
                    with pytest.raises(RuntimeError, match=r"shape \[\d.* storage"):
                        module(x)
                weight.untyped_storage().resize_(size)
                weight.copy_(saved)
                assert torch.equal(module(x), y)

    in_a_child(function)


def test_freed_weight_raises_in_an_exported_program():
    def function():
        block, x = make_block(), torch.randn(1, 8, 9, 9)
        with torch.no_grad():
            program = torch.export.export(block, (x,)).module()
            program(x)
            free(block.conv[2].weight)
            with pytest.raises(RuntimeError, match=r"a weight must have memory .*: its data is not allocated"):
                program(x)

    in_a_child(function)


@pytest.mark.parametrize("free_it", [free, free_half])
@pytest.mark.parametrize("recompute", ["most", "least"])
def test_freed_weight_raises_in_training(free_it, recompute):
    def function():
        block, stem = make_block().train(), FusedConv2dNormActivation(3, 8, stride=2, activation_layer=nn.ReLU6)
        block.recompute = recompute
        for module, x in ((block, torch.randn(2, 8, 9, 9)), (stem, torch.randn(2, 3, 9, 9))):
            for name, weight in module.named_parameters():
                saved, size = weight.detach().clone(), weight.untyped_storage().nbytes()
                free_it(weight)
                with pytest.raises(RuntimeError):
                    module(x)
                weight.untyped_storage().resize_(size)
                weight.data.copy_(saved)
                assert module(x).requires_grad, name  # no backward: autograd's threads do not survive a fork

    in_a_child(function)
