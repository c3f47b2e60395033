"""Five epochs: step 8's network, trained in five.

Target: 99.45 % in the last epoch, with fewer than 10,000 parameters in fewer than 6 epochs.

Change: against step 8, five epochs. The learning rate rises to 0.3, the augmentation is weaker (8 degrees, 5 %
scaling), and the average of the weights spans fewer batches (a decay of 0.995 per batch).

Result: 99.49 +- 0.03 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC without AVX-512,
torch 2.15). Each of the ten seeds ends at 99.44 or above.

Analysis: all targets are met: the mean is shown to be above 99.45 (p = 0.001). With a third of step 8's epochs it ends
0.07 points below step 8's 99.56. Averaging adds little, as there: without it the same ten networks end at 99.48.
"""

from dataclasses import replace
from functools import partial

from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_lab import Targets, main
from mnist_lab.augmentation import random_affine
from step8_averaging import EXPERIMENT as STEP8

EXPERIMENT = replace(
    STEP8,
    epochs=5,
    scheduler=partial(OneCycleLR, max_lr=0.3, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False),
    augmentation=partial(random_affine, degrees=8.0, shift=1.0, scale=0.05),
    average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True),
    targets=Targets(accuracy=99.45, params=10_000, epochs=6),
)

if __name__ == "__main__":
    main(EXPERIMENT)
