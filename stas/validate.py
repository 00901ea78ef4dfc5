"""Loss and Dice on the images held out from training."""

from threading import Event

import numpy as np
import torch
from torch.nn.functional import interpolate

from stas import distributed
from stas.job import Job
from stas.loader import value_range
from stas.metrics import confusion, dice
from stas.transforms import as_input


@torch.no_grad()
def validate(job: Job, stop: Event) -> tuple[float, float] | None:
    """Mean over the validation images of loss and of Dice, both at each image's original size.

    Every rank takes its share and no image is counted twice. The reference averaged over batches, so that the images
    of a short last batch weighed more; here every image weighs the same. Dice is 1 where both masks are empty.

    None as soon as `stop` is set on any rank, which is looked at before each batch.
    """
    distributed.copy_from_first(job.network)
    job.network.eval()
    device = job.ranks.device
    losses = scores = 0.0
    share = job.validation[job.ranks.rank :: job.ranks.size]
    size = job.ranks.share(job.recipe.train.batch)
    # Shares differ by one image, and so by one batch: every rank makes the same number of rounds, to agree in each.
    for start in range(0, job.ranks.share(len(job.validation)), size):
        if distributed.any_of(stop.is_set())[0]:
            return None
        indices = share[start : start + size]
        if not indices:
            continue
        low, high = (ends.to(device) for ends in value_range([job.store.samples[index] for index in indices]))
        pixels = torch.from_numpy(np.stack([job.store.image(index) for index in indices])).to(device)
        with job.autocast():
            logits = job.network(as_input(pixels, low, high, job.recipe)).float()
        for index, logit in zip(indices, logits, strict=True):
            truth = job.store.full_mask(index)
            full = interpolate(logit[None], truth.shape, mode="bilinear")
            target = torch.from_numpy(truth).to(device)[None, None]
            losses += job.loss(full, target).item()
            scores += float(dice(confusion((full[0, 0] > 0).cpu().numpy(), truth)))
    total_loss, total_dice, count = distributed.sum_over_ranks([losses, scores, len(share)])
    return total_loss / count, total_dice / count
