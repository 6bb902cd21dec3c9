"""The next forward sees every change of a weight or a batch-norm buffer."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import check, randomize
from torch import nn

from mnv2_fused import _C, InvertedResidual, MobileNetV2
from mnv2_fused.models.units import FusedConv2dNormActivation

BLOCK = ["inverted_residual"]


def make_block(expand_ratio=6, **options):
    return randomize(InvertedResidual(8, 8, 1, expand_ratio, **options), torch.randn(2, 8, 9, 9))


def _step(block):
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)
    with torch.enable_grad():
        block.train()(torch.randn(2, 8, 9, 9)).square().mean().backward()
    optimizer.step()
    block.eval()


def _fused_adam(block):
    for p in block.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(block.parameters(), lr=0.1, fused=True).step()


def _load(block):
    block.load_state_dict(make_block().state_dict())


def _load_assign(block):
    block.load_state_dict(make_block().state_dict(), assign=True)


def _copy(block):
    block.conv[2].weight.copy_(torch.randn(8, 48, 1, 1))


def _data_mul(block):
    block.conv[0][0].weight.data.mul_(1.5)


def _data_add_to_a_buffer(block):
    block.conv[1][1].running_mean.data.add_(0.5)


def _data_of_one_element(block):
    block.conv[3].bias.data[3] = 4.0


def _data_of_one_tap(block):
    block.conv[1][0].weight.data[5, 0, 1, 2] += 1.0


def _data_of_one_row(block):
    block.conv[0][0].weight.data[40] += 1.0


def _data_of_one_column(block):
    block.conv[2].weight.data[:, 17] += 1.0


def _assign_data(block):
    block.conv[2].weight.data = torch.randn(8, 48, 1, 1)


def _assign_data_of_one_element(block):
    # The allocator often gives the second clone the address of the first weight.
    weight = block.conv[2].weight
    weight.data = weight.data.clone()
    changed = weight.data.clone()
    changed[3, 11] += 2.0
    weight.data = changed


def _assign_view(block):
    # Storage, address and version stay the same; only the strides change.
    weight = block.conv[2].weight
    weight.data = weight.data[:, :8].clone().repeat(1, 6, 1, 1)
    check(block, torch.randn(1, 8, 9, 9), BLOCK)
    weight.data = weight.data.as_strided((8, 48, 1, 1), (1, 8, 1, 1))


def _expand_a_vector(block):
    norm = block.conv[1][1]
    norm.weight.data = norm.weight.data[:1].expand(48)


def _reset(block):
    for m in block.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()


def _numpy(block):
    block.conv[1][1].weight.detach().numpy()[7] = 3.0


def _set(block):
    block.conv[2].weight.set_(torch.randn(8, 48, 1, 1))


def _swap_tensors(block):
    torch.utils.swap_tensors(block.conv[2].weight, nn.Parameter(torch.randn(8, 48, 1, 1)))


def _new_parameter(block):
    block.conv[2].weight = nn.Parameter(torch.randn(8, 48, 1, 1))


def _new_buffer(block):
    block.conv[1][1].running_var = torch.rand(48) + 1


def _bias_appears(block):
    block.conv[2].bias = nn.Parameter(torch.randn(8))


def _affine_goes(block):
    block.conv[1][1].weight = None


def _share_memory(block):
    block.share_memory()
    _data_mul(block)


def _resize_storage(block):
    weight = block.conv[2].weight
    storage, saved = weight.untyped_storage(), weight.detach() * 2
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    weight.data.copy_(saved)


def _bfloat16(block):
    block.to(torch.bfloat16).to(torch.float32)


def _batch_norm_update(block):
    block.train()
    block(torch.randn(4, 8, 9, 9) * 2)
    block.eval()


def _vector(block):
    vector = torch.nn.utils.parameters_to_vector(block.parameters())
    torch.nn.utils.vector_to_parameters(vector * 1.1, block.parameters())


def _average(block):
    average = torch.optim.swa_utils.AveragedModel(block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(make_block())
    block.load_state_dict(average.module.state_dict())


CHANGES = [change for name, change in sorted(globals().items()) if name.startswith("_") and callable(change)]
CHANGES = [change for change in CHANGES if getattr(change, "__module__", None) == __name__]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_change_is_seen(change):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    before = check(block, x, BLOCK)
    change(block)
    after = check(block, x, BLOCK)
    assert not torch.equal(before, after)
    assert torch.equal(after, copy.deepcopy(block)(x))


def unsampled_element(weight):
    """An element of `weight` that its fingerprint does not read."""
    same = _C.SameTensors([(weight, _C.Watch.CONTENTS)])
    for i in range(weight.shape[1]):
        weight.data[7, i] += 1.0
        unseen = same.holds()
        weight.data[7, i] -= 1.0
        if unseen:
            return 7, i
    raise AssertionError("this fingerprint reads everything")


@pytest.mark.parametrize("how", ["no_grad", "data of another tensor", "data at the same address"])
@torch.no_grad()
def test_change_that_the_fingerprint_misses_is_seen(how):
    block, x = randomize(InvertedResidual(64, 64, 1, 6), torch.randn(2, 64, 9, 9)), torch.randn(1, 64, 9, 9)
    weight = block.conv[0][0].weight
    where = unsampled_element(weight)
    before = check(block, x, BLOCK)
    if how == "no_grad":
        weight[where] += 1.0
    elif how == "data of another tensor":
        changed = weight.data.clone()
        changed[where] += 1.0
        weight.data = changed
    else:
        # After the first storage is freed, another tensor may get its address.
        address, tried = weight.data_ptr(), []
        weight.data = weight.data.clone()
        for _ in range(100):
            tried.append(weight.data.clone())
            if tried[-1].data_ptr() == address:
                break
        tried[-1][where] += 1.0
        weight.data = tried[-1]
    assert not torch.equal(before, check(block, x, BLOCK))


@torch.no_grad()
def test_transposed_square_weight_is_seen():
    block, x = make_block(expand_ratio=1), torch.randn(1, 8, 9, 9)
    before = check(block, x, BLOCK)
    weight = block.conv[1].weight
    weight.data = weight.data.transpose(0, 1)
    assert not torch.equal(before, check(block, x, BLOCK))


@torch.no_grad()
def test_sliced_weight_raises_the_error_of_plain():
    # Pruning by hand: the first rows of a weight have the same address as all of it.
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    check(block, x, BLOCK)
    block.conv[0][0].weight.data = block.conv[0][0].weight.data[:40]
    with pytest.raises(RuntimeError, match="48"):
        block(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_another_dtype_is_seen(dtype):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    check(block, x, BLOCK)
    check(block.to(dtype), x.to(dtype), BLOCK)
    with pytest.raises(RuntimeError, match=r"expected scalar type Float|same"):
        block(x)
    check(block.double(), x.double(), [])
    check(block.float(), x, BLOCK)


def _expand(block):
    return block.conv[0][0].weight


INFERENCE_CHANGES = {
    "an optimizer's step": lambda block: torch._foreach_add_(list(block.parameters()), 1e-4),
    "copy_": lambda block: _expand(block).copy_(torch.randn(384, 64, 1, 1)),
    "load_state_dict": lambda block: block.load_state_dict(copy.deepcopy(block).apply(_redraw).state_dict()),
    "a row": lambda block: _expand(block)[300].add_(1.0),
    "a column": lambda block: _expand(block)[:, 41].mul_(1.5),
    "an element of a bias": lambda block: block.conv[3].bias[63].add_(1.0),
    "an element of a variance": lambda block: block.conv[0][1].running_var[17].mul_(2.0),
    "a tap": lambda block: block.conv[1][0].weight[383, 0, 2, 2].add_(1.0),
}


def _redraw(module):
    if isinstance(module, nn.Conv2d):
        module.reset_parameters()


@pytest.mark.parametrize("change", INFERENCE_CHANGES)
def test_inference_tensors_are_watched_without_a_version(change):
    with torch.inference_mode():
        block = randomize(InvertedResidual(64, 64, 1, 6), torch.randn(2, 64, 9, 9))
        x = torch.randn(1, 64, 9, 9)
        assert _expand(block).is_inference()
        before = check(block, x, BLOCK)
        packed = block._cache.readings[None].packed
        block(x)
        assert block._cache.readings[None].packed is packed and not packed.exact
        INFERENCE_CHANGES[change](block)
        after = check(block, x, BLOCK)
        assert not torch.equal(before, after)
    with torch.no_grad():
        assert torch.equal(check(block, x, BLOCK), after)


@torch.no_grad()
def test_weights_with_gaps_are_compared_in_full():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block.conv[2].weight.data = torch.randn(8, 96, 1, 1)[:, ::2]
    before = check(block, x, BLOCK)
    block.conv[2].weight.data[3, 11] += 2.0
    assert not torch.equal(before, check(block, x, BLOCK))


@torch.no_grad()
def test_bits_read_as_another_dtype_raise_the_error_of_plain():
    block, x = make_block().bfloat16(), torch.randn(1, 8, 9, 9).bfloat16()
    check(block, x, BLOCK)
    weight = block.conv[0][0].weight
    weight.data = weight.data.view(torch.float16)
    with pytest.raises(RuntimeError, match="same"):
        block(x)


@torch.no_grad()
def test_functional_call_uses_the_given_weights_once():
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    other = make_block()
    before = check(block, x, BLOCK)
    given = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(block, given, x), other(x))
    assert torch.equal(block(x), before)


@torch.no_grad()
def test_unchanged_weights_are_packed_once(monkeypatch):
    block, x = make_block(), torch.randn(1, 8, 9, 9)
    block(x)
    packed = block._cache.readings[None].packed
    for _ in range(3):
        block(x)
    assert block._cache.readings[None].packed is packed
    block.requires_grad_(False).requires_grad_(True)
    block.train().eval()
    block(x)
    assert block._cache.readings[None].packed.data is not None


@pytest.mark.parametrize("how", ["data", "no_grad", "assign"])
@torch.no_grad()
def test_every_tensor_of_a_network_counts(how):
    x = torch.randn(2, 3, 33, 33)
    model = randomize(MobileNetV2(5, 0.35, [[1, 8, 1, 1], [6, 8, 1, 2]]), torch.randn(4, 3, 33, 33))
    model.classifier[1].bias.copy_(torch.randn(5))
    y = model(x)
    seen = 0
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        saved = tensor.detach().clone()
        factor = torch.linspace(1.2, 2.0, len(tensor)).view(-1, *[1] * (tensor.dim() - 1))
        if how == "data":
            tensor.data.mul_(factor)
        elif how == "no_grad":
            tensor.mul_(factor)
        else:
            tensor.data = saved * factor
        changed = model(x)
        assert not torch.equal(changed, y), name
        assert torch.equal(changed, copy.deepcopy(model)(x)), name
        tensor.data.copy_(saved)
        assert torch.equal(model(x), y), name
        seen += 1
    assert seen == 5 * (1 + 3 + 2 + 1) + 2


@torch.no_grad()
def test_stem_sees_changes():
    stem = randomize(FusedConv2dNormActivation(3, 16, stride=2, activation_layer=nn.ReLU6), torch.randn(2, 3, 9, 9))
    x = torch.randn(1, 3, 9, 9)
    before = check(stem, x, ["dense"])
    stem[0].weight.data[3] += 1.0
    assert not torch.equal(before, check(stem, x, ["dense"]))
    stem[0] = nn.Conv2d(3, 16, 5, 2, 2)
    check(stem, x, ["dense"])


def test_a_failed_call_leaves_nothing_behind():
    model, x = MobileNetV2(5, 0.35).eval(), torch.randn(1, 3, 33, 33)
    with torch.no_grad():
        y = model(x)
        for wrong in (x[:, :2], x[0], x.double()):
            with pytest.raises((RuntimeError, ValueError)):
                model(wrong)
        model.classifier[1].bias.add_(1)
        assert torch.equal(model.features(x), model.features(x))  # runs other operators on this thread
        assert torch.allclose(model(x), y + 1)
