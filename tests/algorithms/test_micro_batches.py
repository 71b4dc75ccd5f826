"""A batch in pieces has the gradient of the whole batch, and never more images in one forward pass."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from algorithm_cases import batches, made, ready
from torch import nn

from gsdg.plan import prepare
from gsdg.surgery import GradSurgery as Surgery
from gsdg.utils.errors import UserError


def gradients(name, size):
    """The gradients after one backward pass in pieces of `size`, the metrics, and the numbers of images per pass."""
    algorithm = ready(made(name)).double().eval()  # eval: BatchNorm keeps its statistics
    algorithm.micro_batch_size = size
    sizes = []
    algorithm.model.register_forward_pre_hook(lambda model, inputs: sizes.append(len(inputs[0])))
    metrics = algorithm.backward([b._replace(images=b.images.double()) for b in batches()])
    return [p.grad for p in algorithm.parameters()], metrics, sizes


@pytest.mark.parametrize("name", ["erm", "grad_surgery", "pcgrad"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_gradient_and_the_loss_are_those_of_the_whole_batch(name, size):
    torch.manual_seed(0)
    whole, metrics, together = gradients(name, None)
    torch.manual_seed(0)
    pieces, of_pieces, sizes = gradients(name, size)
    for first, second in zip(whole, pieces, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(of_pieces["loss"], metrics["loss"], rtol=1e-12, atol=0, check_dtype=False)
    assert max(sizes) == min(size, max(together))
    assert sum(sizes) == sum(together)


def test_a_loss_of_the_surgery_may_be_an_iterable_of_terms_whose_graphs_are_freed_in_between():
    torch.manual_seed(0)
    model, images, labels = nn.Linear(5, 3), torch.randn(2, 6, 5), torch.randint(3, (2, 6))
    alive = []

    def terms(d):
        for piece, its_labels in zip(images[d].split(4), labels[d].split(4), strict=True):
            assert not any(reference() is not None for reference in alive)
            term = F.cross_entropy(model(piece), its_labels, reduction="sum") / 6
            alive.append(weakref.ref(term))
            yield term
            del term

    surgery = Surgery(model.named_parameters(), n_parts=2, alpha=0.6)
    whole = surgery.backward(F.cross_entropy(model(x), y) for x, y in zip(images, labels, strict=True))
    expected, G = [p.grad.clone() for p in model.parameters()], surgery.gradients.clone()
    metrics = surgery.backward(terms(d) for d in range(2))
    torch.testing.assert_close(surgery.gradients, G)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    torch.testing.assert_close(metrics["loss"], whole["loss"])
    with pytest.raises(UserError, match="empty sequence of terms"):
        surgery.backward([[], []])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "words", [["algorithm=mixup"], ["algorithm=grad_surgery", "algorithm.engine=joint"], ["algorithm=sam"]]
)
def test_algorithms_that_need_the_whole_batch_refuse_pieces(compose, words):
    with pytest.raises(UserError, match="trainer.micro_batch_size: algorithm=.* in one forward pass"):
        prepare(compose("split.target=15", "trainer.micro_batch_size=2", *words))


def test_no_piece_is_refused(compose):
    with pytest.raises(UserError, match="trainer.micro_batch_size: found 0"):
        prepare(compose("split.target=15", "trainer.micro_batch_size=0", "algorithm=erm"))
