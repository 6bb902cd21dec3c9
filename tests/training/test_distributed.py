"""Training on several processes: DistributedDataParallel, and batch norms with statistics of all of them."""

from __future__ import annotations

import copy
import os

import pytest
import torch
import torch.distributed as dist
from oracle import FACTOR, assert_close, decided, plain, randomize
from torch import nn

from mnv2_fused import InvertedResidual, MobileNetV2
from mnv2_fused.models.units import FusedConv2dNormActivation

SMALL = [[1, 8, 1, 1], [6, 16, 1, 2]]

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch is built without gloo", allow_module_level=True)


def _model(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """The same for every process: a module in training mode, and the joined batch."""
    torch.manual_seed(0)
    if kind == "network":
        model, x = MobileNetV2(5, 0.5, SMALL, dropout=0.0), torch.randn(6, 3, 12, 12)
    elif kind == "stem":
        model, x = FusedConv2dNormActivation(3, 16, stride=2, activation_layer=nn.ReLU6), torch.randn(6, 3, 9, 9)
    else:
        options = {"block": (8, 8, 1, 3), "strided": (8, 12, 2, 3), "no expansion": (8, 8, 1, 1)}[kind]
        model, x = InvertedResidual(*options), torch.randn(6, 8, 6, 6)
    model = randomize(model, x).train()
    return model, decided(model, x, 1e-6)


def _weighted(y: torch.Tensor, first: int) -> torch.Tensor:
    """A loss that is a sum over images; these are the images from `first` on."""
    generator = torch.Generator().manual_seed(4)
    weights = torch.randn((6, *y.shape[1:]), generator=generator).to(y.dtype)
    return (y * weights[first : first + len(y)]).sum()


def _process(rank: int, directory: str, kind: str, split: list[int], way: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=len(split))
    model, x = _model(kind)
    first = sum(split[:rank])
    x = x[first : first + split[rank]].requires_grad_()
    sizes: list[int] = []
    if way == "synchronised":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        reduce = dist.all_reduce

        def counted(tensor, *arguments, **options):
            sizes.append(tensor.numel())
            return reduce(tensor, *arguments, **options)

        dist.all_reduce = counted
        y = model(x)
        _weighted(y, first).backward()
        dist.all_reduce = reduce
    else:
        parallel = nn.parallel.DistributedDataParallel(model)  # its hooks live as long as it does
        y = parallel(x)
        _weighted(y, first).backward()
    found = {
        "output": y.detach(),
        "gradient of the input": x.grad,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "statistics": dict(model.named_buffers()),
        "sizes": sizes,
    }
    torch.save(found, f"{directory}/{rank}.pt")
    dist.destroy_process_group()


def _run(directory, kind: str, split: list[int], way: str) -> list[dict]:
    torch.multiprocessing.spawn(_process, (str(directory), kind, split, way), nprocs=len(split))
    return [torch.load(os.path.join(directory, f"{rank}.pt")) for rank in range(len(split))]


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("network", [3, 3]),
        ("network", [1, 5]),
        ("block", [2, 4]),
        ("strided", [5, 1]),
        ("no expansion", [2, 4]),
        ("stem", [2, 4]),
    ],
)
def test_synchronised_batch_norms_see_the_joined_batch(tmp_path, kind, split):
    ranks = _run(tmp_path, kind, split, "synchronised")
    model, x = _model(kind)
    expected = []
    for reference in (plain(model), plain(model).double()):
        given = x.detach().to(next(reference.parameters()).dtype).requires_grad_()
        y = reference(given)
        _weighted(y, 0).backward()
        expected.append((y, given.grad, reference))
    (y, dx, a), (exact, exact_dx, b) = expected
    assert_close(torch.cat([r["output"] for r in ranks]), y, exact, FACTOR)
    assert_close(torch.cat([r["gradient of the input"] for r in ranks]), dx, exact_dx, FACTOR)
    ours, theirs, right = [], [], []
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        ours.append(sum(r["gradients"][name] for r in ranks).flatten())
        theirs.append(p.grad.flatten())
        right.append(q.grad.flatten())
        scale = right[-1].abs().max()
        if scale > 1e-6:  # else it is 0 but for rounding
            for parts in (ours, theirs, right):
                parts[-1] = parts[-1] / scale.to(parts[-1].dtype)
    assert_close(torch.cat(ours), torch.cat(theirs), torch.cat(right), FACTOR)
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        for rank in ranks:
            if "num" in name:
                assert rank["statistics"][name] == p
            else:
                assert_close(rank["statistics"][name], p, q, FACTOR)
    # Only moments cross processes: no map, however large.
    assert 0 < len(ranks[0]["sizes"]) == len(ranks[1]["sizes"])
    widest = max(
        m.in_channels * m.kernel_size[0] ** 2 if m.groups == 1 else 1 for m in a.modules() if isinstance(m, nn.Conv2d)
    )
    channels = max(m.num_features for m in a.modules() if isinstance(m, nn.BatchNorm2d))
    assert max(ranks[0]["sizes"]) <= widest**2 + 4 * channels + 1


def test_gradients_are_averages_without_synchronised_batch_norms(tmp_path):
    ranks = _run(tmp_path, "network", [2, 4], "parallel")
    model, x = _model("network")
    sums: list[list[torch.Tensor]] = []
    for kind in (plain(model), plain(model).double()):
        total = None
        for first, part in ((0, x[:2]), (2, x[2:])):
            module = copy.deepcopy(kind)
            _weighted(module(part.to(next(kind.parameters()).dtype)), first).backward()
            found = [p.grad / 2 for p in module.parameters()]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        sums.append(total)
    names = [name for name, _ in model.named_parameters()]
    for name, a in zip(names, sums[0], strict=True):
        assert torch.equal(ranks[0]["gradients"][name], ranks[1]["gradients"][name])
        assert ranks[0]["gradients"][name].shape == a.shape
    flat = [torch.cat([t.flatten() for t in part]) for part in ([ranks[0]["gradients"][n] for n in names], *sums)]
    assert_close(*flat, FACTOR)
