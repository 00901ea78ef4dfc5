"""Loss and Dice on the held-out images."""

from threading import Event

import torch

from stas.models.predict import Settings, predict_logits, stored_picture
from stas.results.metrics import confusion, dice
from stas.system import distributed
from stas.training.run import TrainingRun


@torch.no_grad()
def validate(run: TrainingRun, stop: Event) -> tuple[float, float] | None:
    """Mean loss and mean Dice over the held-out images, both at each image's original size.

    Every rank takes its share and no image is counted twice. The reference averaged over batches, so the images of
    a short last batch weighed more; here every image weighs the same. Dice is 1 if both masks are empty.

    Returns None once `stop` is set on any rank; this is checked before each image.
    """
    distributed.broadcast_buffers(run.network)
    run.network.eval()
    settings = Settings.of(run.recipe, tta=False)
    losses = scores = 0.0
    share = run.validation[run.ranks.rank :: run.ranks.size]
    # Shares differ by at most one image. Every rank makes the same number of rounds, so that all agree in each.
    for turn in range(run.ranks.share(len(run.validation))):
        if distributed.any_rank(stop.is_set())[0]:
            return None
        if turn == len(share):
            continue
        logits = predict_logits(run.network, stored_picture(run.store, share[turn]), settings)
        truth = run.store.full_mask(share[turn])
        target = torch.from_numpy(truth).to(logits.device)
        losses += run.loss(logits[None, None], target[None, None]).item()
        scores += float(dice(confusion((logits > 0).cpu().numpy(), truth)))
    total_loss, total_dice, count = distributed.sum_over_ranks([losses, scores, len(share)])
    return total_loss / count, total_dice / count
