"""Training of SSDLite: losses, gradients, modes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from detectors import SSD, Outputs, make, make_images, make_targets
from oracle import FACTOR, errors, operators, plain, step
from torch import nn

from mnv2_fused import extras

both = pytest.mark.parametrize("tf", [False, True], ids=["torchvision", "tensorflow"])


def losses(model, images, targets):
    """The losses of `model`, and the gradients of their sum by name."""
    model.zero_grad()
    found = model(images, targets)
    sum(found.values()).backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters()}


def to_double(targets):
    return [{**target, "boxes": target["boxes"].double()} for target in targets]


def test_losses_are_torchvision_s():
    model, images = make(fused=False).train(), make_images()
    targets = make_targets(images)
    mean, size = model.transform.image_mean, model.transform.fixed_size
    theirs = SSD(model.backbone, model.anchor_generator, size, 5, mean, mean, model.head).train()
    torch.testing.assert_close(model(images, targets), theirs(images, targets))


def loss_by_hand(model, image, target):
    """TensorFlow's multibox loss of one image, anchor by anchor in float64."""
    boxes, _ = model.transform([image], [target])
    output = model.head_outputs(boxes.tensors)
    codes, logits = output["bbox_regression"][0], output["cls_logits"][0]
    anchors = model.anchor_generator.boxes(*boxes.tensors.shape[-2:]).double()
    scale = torch.tensor([96 / image.shape[2], 96 / image.shape[1]] * 2)
    truth = target["boxes"] * scale
    iou = extras.use("torchvision.ops.boxes", "detection").box_iou(truth, anchors)
    owner = {}  # of an anchor: the box that it is to find
    for a in range(len(anchors)):
        best = int(iou[:, a].argmax())
        if iou[best, a] >= 0.5:
            owner[a] = best
    owner |= {int(row.argmax()): box for box, row in enumerate(iou)}
    box_loss, positive, negative = 0.0, 0.0, []
    for a in range(len(anchors)):
        label = int(target["labels"][owner[a]]) if a in owner else 0
        wanted = F.one_hot(torch.tensor(label), 5).double()
        loss = F.binary_cross_entropy(logits[a].sigmoid(), wanted, reduction="sum")
        if a not in owner:
            negative.append(loss)
            continue
        positive = positive + loss
        (x1, y1, x2, y2), (u1, v1, u2, v2) = truth[owner[a]], anchors[a]
        centre = ((x1 + x2 - u1 - u2) / 2 / (u2 - u1) * 10, (y1 + y2 - v1 - v2) / 2 / (v2 - v1) * 10)
        extent = (((x2 - x1) / (u2 - u1)).log() * 5, ((y2 - y1) / (v2 - v1)).log() * 5)
        difference = (codes[a] - torch.stack([*centre, *extent])).abs()
        box_loss = box_loss + torch.where(difference < 1, difference**2 / 2, difference - 0.5).sum()
    hardest = torch.stack(negative).sort(descending=True).values[: 3 * len(owner)].sum()
    return {"bbox_regression": box_loss / len(owner), "classification": (positive + hardest) / len(owner)}


def test_losses_of_tensorflow_s_convention():
    model = make(tf=True, fused=False).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the last maps are a single pixel of a single image
    image = make_images(1)[0].double()
    targets = to_double(make_targets([image], boxes=4))
    torch.testing.assert_close(model([image], targets), loss_by_hand(model, image, targets[0]))


@both
def test_losses_and_gradients_are_right(tf):
    """Without clamps: single masks that rounding decides would differ, in plain as in fused. The middle of several
    steps decides on all gradients together.
    """
    found = {"fused": [], "plain": []}
    for seed in range(5):
        torch.manual_seed(seed)
        model, images = make(tf=tf).train(), make_images(4)
        for m in model.modules():
            if isinstance(m, nn.ReLU6):
                m.min_val, m.max_val = -float("inf"), float("inf")
        targets, reference = make_targets(images), plain(model)
        exact = copy.deepcopy(reference).double()
        right, gradients = losses(exact, [image.double() for image in images], to_double(targets))
        for name, each in (("fused", model), ("plain", reference)):
            got, ours = losses(each, images, targets)
            norms = [errors(ours[key], value)[1] for key, value in gradients.items() if not _is_zero(key)]
            values = [errors(got[key], value)[1] for key, value in right.items()]
            found[name].append((sum(norms) / len(norms), sum(values)))
    for i in range(2):
        ours, theirs = (sorted(each[i] for each in found[name])[2] for name in ("fused", "plain"))
        assert ours <= FACTOR * theirs + torch.finfo(torch.float32).eps


def _is_zero(name: str) -> bool:
    """Whether the gradient is almost 0: that of a shift before another batch norm, without clamps."""
    return name.startswith("backbone.") and name.endswith(".bias")


@both
def test_gradient_of_the_network(tf):
    """With clamps, and with a gradient in every output, so also in the tapped map."""
    found = {"fused": [], "plain": []}
    for seed in range(5):
        torch.manual_seed(seed)
        model, x = Outputs(make(tf=tf)).train(), torch.randn(4, 3, 96, 96)
        reference = plain(model)
        exact = step(copy.deepcopy(reference).double(), x.double())
        for name, each in (("fused", model), ("plain", reference)):
            got = step(each, x)
            norms = [errors(got[key], value)[1] for key, value in exact.items() if "gradient" in key]
            found[name].append(sum(norms) / len(norms))
    ours, theirs = (sorted(each)[2] for each in found.values())
    assert ours <= FACTOR * theirs
    assert "train_block_backward" in operators(lambda: step(model, x))


def test_gradient_of_the_tap():
    """It reaches the expansion and everything before it: the same as through these modules alone."""
    backbone, x = make(fused=False).backbone, torch.randn(2, 3, 96, 96)
    gradients = []
    for call in (lambda: backbone(x)["0"], lambda: backbone.features[14].conv[0](backbone.features[:14](x))):
        backbone.zero_grad()
        call().square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None})
    assert "features.14.conv.0.0.weight" in gradients[1] and "features.0.0.weight" in gradients[1]
    torch.testing.assert_close(*gradients)


@both
def test_images_without_boxes(tf):
    model, images = make(tf=tf).train(), make_images(3)
    targets = make_targets(images)
    targets[1] = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    assert all(value > 0 for value in model(images, targets).values())
    none, gradients = losses(model, images, [targets[1]] * 3)
    assert none["bbox_regression"] == 0 and none["classification"] > 0
    head = gradients["head.classification_head.module_list.1.1.bias"].view(6, 5)
    assert head[:, 0].sum() < 0 and head[:, 1:].min() >= 0  # gradient descent raises the background alone


def test_background_loss_is_that_of_the_three_hardest_anchors():
    model = make(fused=False)
    logits, empty = torch.randn(1, 20, 5), {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    outputs = {"bbox_regression": torch.randn(1, 20, 4), "cls_logits": logits}
    got = model.compute_loss([empty], outputs, [torch.rand(20, 4)], [torch.full((20,), -1)])
    hardest = -logits.log_softmax(-1)[0, :, 0].sort().values[:3]
    torch.testing.assert_close(got["classification"], hardest.sum())


def test_modes():
    model, images = make(), make_images(2)
    targets = make_targets(images)
    before = model(images)
    assert set(before[0]) == {"boxes", "scores", "labels"} and model(images, targets) is not None
    copies = [{key: value.clone() for key, value in target.items()} for target in targets]
    assert set(model.train()(images, targets)) == {"bbox_regression", "classification"}
    torch.testing.assert_close(targets, copies)
    after = model.eval()(images)  # with other statistics
    assert before[0]["scores"].shape != after[0]["scores"].shape or (before[0]["scores"] != after[0]["scores"]).any()
    torch.testing.assert_close(model(images), after)


def test_frozen_layers_get_no_gradient():
    model, images = make(trainable_backbone_layers=2).train(), make_images(2)
    sum(model(images, make_targets(images)).values()).backward()
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.grad is None} == {str(i) for i in range(14)}


def test_boxes_in_float64():
    model, images = make().train(), make_images(2)
    targets = make_targets(images)
    expected = copy.deepcopy(model)(images, targets)
    got = model(images, to_double(targets))
    assert got["bbox_regression"].dtype == torch.float32
    torch.testing.assert_close(got, expected)


def test_autocast():
    model, images = make().train(), make_images(2)
    targets = make_targets(images)
    exact = copy.deepcopy(model)(images, targets)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(images, targets)
    for name, loss in got.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.1)
    sum(got.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
