"""Three epochs: step 8's network, trained in three.

Target: 99.35 % in the last epoch, with fewer than 10,000 parameters in fewer than 4 epochs.

Change: against step 8, three epochs. Batches of 64 give twice as many steps an epoch, with the same peak of the
learning rate, 0.2. The augmentation is weaker (8 degrees, 5 % scaling), and the average of the weights spans fewer
batches (a decay of 0.99 per batch).

Result: 99.44 +- 0.04 % in the last epoch (mean and sd of seeds 0 to 9, two cores of an AMD EPYC without AVX-512,
torch 2.15), from 99.39 to 99.52; training accuracy 98.98.

Analysis: all targets are met: the mean is shown to be above 99.40 (p = 0.004). This is the second recipe that was
tested. Ten seeds of the first, with batches of 128 and a learning rate of 0.3, ended at 99.43 +- 0.07. So smaller
batches, which had 0.06 points more on held-out images, are not shown to help. Without averaging the same ten networks
end at 99.44.
"""

from dataclasses import replace
from functools import partial

from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mnist_lab import Targets, main
from mnist_lab.augmentation import random_affine
from step8_averaging import EXPERIMENT as STEP8

EXPERIMENT = replace(
    STEP8,
    epochs=3,
    batch_size=64,
    augmentation=partial(random_affine, degrees=8.0, shift=1.0, scale=0.05),
    average=partial(AveragedModel, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True),
    targets=Targets(accuracy=99.35, params=10_000, epochs=4),
)

if __name__ == "__main__":
    main(EXPERIMENT)
